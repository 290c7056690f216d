"""What a mask says of keys that are appended: every query attends them."""

from funcmha._arrays import Array, full, namespace

from .mask import Mask, as_mask


def append_keys(mask: Mask | None, T: int, S: int, appended: int, like: Array) -> Mask | None:
    """mask (..., T, S)   →   (..., T, S + appended), True for the keys that were appended"""
    if mask is None or not appended:
        return mask
    allowed = mask.dense(T, S, like)
    xp, shape = namespace(allowed), tuple(allowed.shape[:-1])
    return as_mask(xp.concat([xp.broadcast_to(allowed, (*shape, S)), full((*shape, appended), True, allowed)], axis=-1))
