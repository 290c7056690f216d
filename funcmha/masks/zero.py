"""Zero where a mask leaves nothing: at keys that no query attends, and at fully masked queries.

0 · NaN is NaN: a key that no query attends, or a fully masked query, would reach every sum that it is a term of.

Axes: T queries, S keys, H query heads, K key/value heads; `...` is batch.
"""

import numpy as np

from funcmha._arrays import Array, namespace, upcast

from .mask import Dense, Mask


def zero_unattended_keys(x: Array, mask: Array) -> Array:
    """x (..., K, S, ·) with 0 at each key that no query of its heads attends     mask (..., H or 1, T or 1, S or 1)"""
    return x if mask is None or x is None else _zero_unless(x, namespace(x).any(mask, axis=-2))


def zero_masked_queries(x: Array, mask: Array) -> Array:
    """x (..., H, T, ·) with 0 at each query that attends no key     mask (..., H or 1, T or 1, S or 1)"""
    return x if mask is None or x is None else _zero_unless(x, namespace(x).any(mask, axis=-1))


def attended_and_attending(mask: Mask | None, T: int, S: int, like: Array = None) -> tuple[Array, Array]:
    """The keys that any query attends (..., 1, S or 1), and the queries that attend any (..., T or 1, 1); None is all

    Where there are no queries no key is attended, and where there are no keys no query attends one, whatever the mask.
    """
    if mask is None and T and S:
        return None, None
    mask = Dense(np.ones((1, 1), dtype=bool)) if mask is None else mask
    return mask.attended_keys(T, S, like), mask.attending_queries(T, S, like)


def zero_unattended(q: Array, k: Array, v: Array, mask: Mask | None) -> tuple[Array, Array, Array]:
    """q (..., H, T, D) with 0 at fully masked queries, k and v (..., K, S, ·) at unattended keys"""
    attended, attending = attended_and_attending(mask, q.shape[-2], k.shape[-2], q)
    return zero_masked_queries(q, attending), zero_unattended_keys(k, attended), zero_unattended_keys(v, attended)


def zero_inputs(
    query: Array, key: Array, value: Array, mask: Mask | None, appended: bool
) -> tuple[Array, Array, Array]:
    """The inputs of all heads, upcast, with 0 at queries that attend no key in any head, and at unattended keys

    A NaN there would reach Σ dq xᵀ and Σ dk xᵀ as 0 · NaN. Where all three are one array they stay one, as the gradient
    of `self_attention` takes it: with 0 at tokens that neither attend nor are attended. Every query attends `appended`
    keys.
    """
    if query is key and key is value:
        query = key = value = upcast(query)
    else:
        query, key, value = upcast(query), upcast(key), upcast(value)
    attended, attending = attended_and_attending(mask, query.shape[-2], key.shape[-2], query)
    if attended is None:
        return query, key, value
    attending = None if appended else namespace(query).matrix_transpose(attending)
    return zero_tokens(query, key, value, attended, attending)


def zero_tokens(
    query: Array, key: Array, value: Array, attended: Array, attending: Array
) -> tuple[Array, Array, Array]:
    """The inputs with 0 at other tokens than the attended (..., 1, S or 1) and the attending (..., 1, T or 1)

    No attending is all.
    """
    if query is key and key is value:
        x = _zero_rows(query, None if attending is None else attended | attending)
        return x, x, x
    return _zero_rows(query, attending), _zero_rows(key, attended), _zero_rows(value, attended)


def _zero_rows(x: Array, some: Array) -> Array:
    """x (..., n, C) with 0 where not some (..., H or 1, 1, n or 1), in no head"""
    return zero_unattended_keys(x[..., None, :, :], some)[..., 0, :, :]


def _zero_unless(x: Array, some: Array) -> Array:
    """x (..., K, n, ·) with 0 unless some (..., H or 1, n or 1), in any head that reads it"""
    if isinstance(some, np.ndarray) and some.all():
        return x
    xp = namespace(x)
    if some.ndim > 1 and some.shape[-2] not in (1, x.shape[-3]):
        *batch, heads, n = some.shape
        some = xp.any(xp.reshape(some, (*batch, x.shape[-3], heads // x.shape[-3], n)), axis=-2)
    return xp.where(some[..., None], x, 0.0)
