"""What becomes of queries and keys between their projection and the scores: they are normalised, then turned.

Axes: T positions, H heads, D width; `...` is batch.
"""

from typing import Any, NamedTuple

from ._xp import Array, namespace
from .norms import Norm
from .params import Params
from .rotary import Rotary, rotate, rotate_vjp


class ReadyCache(NamedTuple):
    x: Array  # (..., T, H, D) as projected, or None where nothing is normalised, or x is made again
    w: Params  # w (D,), b (D,), either of which may be absent
    norm: Norm | None
    rotary: Any  # what turns them back, or None


def ready(x: Array, params: Params, /, *, norm: Norm | None, rotary: Rotary | None) -> tuple[Array, ReadyCache]:
    """y = rotate(norm(x, w, b))     x (..., T, H, D)   w, b (D,) or absent   →   y (..., T, H, D)"""
    y, turned = x, None
    if norm is not None:
        y, _ = norm.apply(x, params)
    if rotary is not None:
        y, turned = rotate(heads_first(y), rotary=rotary)
        y = heads_last(y)
    return y, ReadyCache(None if norm is None else x, params, norm, turned)


def ready_vjp(cache: ReadyCache, dy: Array, /) -> tuple[Array, Params]:
    """dx, dparams"""
    if cache.rotary is not None:
        (dy,) = rotate_vjp(cache.rotary, heads_first(dy))
        dy = heads_last(dy)
    if cache.norm is None:
        return dy, {}
    _, normed = cache.norm.apply(cache.x, cache.w)
    return cache.norm.apply_vjp(normed, dy)


def heads_first(x: Array) -> Array:
    """x (..., T, H, D)   →   (..., H, T, D)"""
    return namespace(x).moveaxis(x, -2, -3)


def heads_last(x: Array) -> Array:
    """x (..., H, T, D)   →   (..., T, H, D)"""
    return namespace(x).moveaxis(x, -3, -2)
