"""`jax.nn.dot_product_attention` and its gradient: its layout, masks and results, for arrays of any library.

    y, cache = dot_product_attention(query, key, value, bias, mask=mask, is_causal=True)
    dquery, dkey, dvalue, dbias = dot_product_attention_vjp(cache, dy)
    log_sum_exp(cache)                                           # (B, T, N): what return_residual=True returns beside y

Differences from `funcmha.attention`. Heads come after tokens. Causal is top-left, key j ≤ query i whatever T and S. A
window includes both its ends, and one int bounds both sides. The bias is added before the mask.

JAX fills a forbidden score with −0.7 times the largest float32, where funcmha has −∞. So a fully masked row has equal
weights for *all* keys, and is the mean of the values; queries from `query_seq_lengths` on give 0. So they do here, with
gradients: each value gets dy / S from the former, and nothing flows back from the latter. The residual of either is the
fill. But no score is lost to the fill here: with a bias below it (−∞, or the least float32) JAX attends to keys that
the mask forbids, or gives NaN where none is forbidden. Here a bias of −∞ forbids, as everywhere in funcmha, and a query
without other keys gives 0, with gradients 0.

JAX's softmax is float32 even for float64, and rounds the weights of half types. Here float64 stays float64, half types
are computed in float32 and rounded once, and `log_sum_exp` and `attention_weights` have the dtype of the computation.
(In float16 the fill is −∞ in JAX's residual; and on a CPU jax 0.10.2 does not compile its float16 at all.)

Two of its arguments are not supported: `implementation`, which changes no result, and `return_residual`: see above.

JAX is not imported. The same on JAX's own arrays, under its own `jit` and `grad`: `jax.custom_vjp(f).defvjp(f, f_vjp)`.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H width of a head.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check, engines, masks
from funcmha._arrays import (
    HALF,
    Array,
    downcast,
    dtype_name,
    from_host,
    full,
    heads_first,
    heads_last,
    is_array,
    namespace,
    upcast,
)
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.masks import Mask

FILL = -0.7 * float(np.finfo(np.float32).max)  # a forbidden score: _get_large_negative in jax/_src/nn/functions.py
CHUNK = 256  # rows of a mask that are searched together for fully masked ones: memory stays linear


class DotProductAttentionCache(NamedTuple):
    attention: Any  # of an engine; fully masked rows give 0
    mean: Any  # of an engine, of one query for each head with equal weights; None if there is no fully masked row
    masked: Array  # (B or 1, N or 1, T or 1), the fully masked rows, which give that mean; None if there is none
    padding: Array  # (B, 1, T), the queries from query_seq_lengths on; None without them
    query: Array  # as given, of y's shape and dtype
    bias: Array  # as given, or None


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    /,
    *,
    mask: Array = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array = None,
    key_value_seq_lengths: Array = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> tuple[Array, DotProductAttentionCache]:
    """y = softmax(scale · query keyᵀ + bias) value
    query (B, T, N, H)   key, value (B, S, K, H)   →   y (B, T, N, H)     or all without B

    bias   broadcasts to (B, N, T, S); of the dtype of the rest, or float32 with half types
    mask   boolean, True = attend, broadcasts to (B, N, T, S)
    scale  H ** -0.5 unless given
    query_seq_lengths, key_value_seq_lengths   integers (B,), known when the function is called; the rest is padding
    local_window_size   (left, right), both inclusive, or one int for both

    N is a multiple of K, and head n reads n // (N // K). Raises TypeError for wrong dtypes, ValueError for shapes that
    do not fit, before any arithmetic. Defaults, names and results of jax 0.10.2.
    """
    B, T, S = _check_inputs(query, key, value, bias, mask)
    allowed = _allowed(mask, is_causal, key_value_seq_lengths, local_window_size, B)
    padding = None if query_seq_lengths is None else _padding(_lengths("query", query_seq_lengths, B), T)
    if S == 0:  # there is no score to fill
        allowed = padding = None
    scale = None if scale is None else _check.number("scale", scale)
    q, k, v = (_heads_first(x) for x in (query, key, value))
    if bias is not None and bias.dtype != query.dtype:
        q, k, v = upcast(q), upcast(k), upcast(v)

    o, attention = engines.attention(q, k, v, bias, mask=_without(allowed, padding), scale=scale)
    padding = None if padding is None else from_host(padding, q)
    masked = None if allowed is None else _fully_masked(allowed, padding, T, S, q)
    mean = None
    if masked is not None:
        zero_q, zero_k = full((*q.shape[:2], 1, 1), 0.0, q), full((*k.shape[:3], 1), 0.0, k)
        average, mean = engines.attention(zero_q, zero_k, v)
        o = namespace(o).where(masked[..., None], average, o)
    return downcast(_heads_last(o, query), query.dtype), DotProductAttentionCache(
        attention, mean, masked, padding, query, bias
    )


def dot_product_attention_vjp(
    cache: DotProductAttentionCache, dy: Array, /, *, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dquery, dkey, dvalue, dbias: a fully masked row gives dy / S to every value, and nothing else
    from the cotangents of y and, where given, of the residual (B, T, N)
    """
    _check.cache(cache, DotProductAttentionCache, "dot_product_attention")
    attention, mean, masked, _, query, bias = cache
    batch, computed = "B " if query.ndim == 4 else "", log_sum_exp(attention)
    _check.cotangent("dy", dy, query.shape, computed, batch + "T N H")
    _check.cotangent("dlse", dlse, query.shape[:-1], computed, batch + "T N", optional=True)
    do = _heads_first(upcast(dy))
    dlse = None if dlse is None else _heads_first(upcast(dlse)[..., None])[..., 0]

    dq, dk, dv, dbias, _ = engines.attention_vjp(attention, do, dlse=dlse)
    if masked is not None:
        xp = namespace(do)
        dmean = xp.sum(xp.where(masked[..., None], do, 0.0), axis=-2, keepdims=True)
        dv = dv + engines.attention_vjp(mean, dmean)[2]
    dquery, dkey, dvalue = (downcast(_heads_last(dx, query), dy.dtype) for dx in (dq, dk, dv))
    alike = bias is None or bias.dtype == query.dtype
    return dquery, dkey, dvalue, downcast(dbias, dy.dtype if alike else bias.dtype)


@attention_weights.register
def _(cache: DotProductAttentionCache, /) -> Array:
    """p (B, N, T, S), or (N, T, S): 1 / S in fully masked rows, 0 in padding"""
    p = attention_weights(cache.attention)
    if cache.masked is not None:
        p = namespace(p).where(cache.masked[..., None], attention_weights(cache.mean), p)
    return p if cache.query.ndim == 4 else p[0, ...]


@log_sum_exp.register
def _(cache: DotProductAttentionCache, /) -> Array:
    """lse (B, T, N), or (T, N): the fill in fully masked rows and padding"""
    lse = log_sum_exp(cache.attention)
    for rows in (cache.masked, cache.padding):
        lse = lse if rows is None else namespace(lse).where(rows, FILL, lse)
    return _heads_last(lse[..., None], cache.query)[..., 0]


# ── layout ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _heads_first(x: Array) -> Array:
    """(B, T, N, H) or (T, N, H)  →  (B, N, T, H)"""
    return heads_first(x if x.ndim == 4 else x[None, ...])


def _heads_last(x: Array, query: Array) -> Array:
    """(B, N, T, H)  →  (B, T, N, H), or (T, N, H) as the query is"""
    x = heads_last(x)
    return x if query.ndim == 4 else x[0, ...]


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _allowed(mask: Array, is_causal: bool, key_lengths: Array, window: Any, B: int) -> Mask | None:
    """The mask, causality, the lengths of the keys and the window together; None for everything."""
    _check.flag("is_causal", is_causal)
    return masks.intersection(
        masks.per_head(mask),
        masks.causal() if is_causal else None,
        None if window is None else masks.window(*_window(window)),
        None if key_lengths is None else masks.lengths(_lengths("key_value", key_lengths, B)),
    )


def _padding(lengths: np.ndarray, T: int) -> np.ndarray:
    """(B,)  →  (B, 1, T), True behind each length"""
    return np.arange(T) >= lengths[:, None, None]


def _without(allowed: Mask | None, padding: np.ndarray | None) -> Mask | None:
    """`allowed`, with padding queries fully masked."""
    return masks.intersection(allowed, None if padding is None else ~padding[..., None])


def _fully_masked(allowed: Mask, padding: Array, T: int, S: int, like: Array) -> Array:
    """The fully masked rows, without padding; None if NumPy can tell that there are none."""
    xp, rows = namespace(like), allowed.shape(T, S)[-2]
    tiles = (allowed.tile((i, min(i + CHUNK, rows)), (0, S), like) for i in range(0, max(rows, 1), CHUNK))
    masked = ~xp.concat([xp.any(tile, axis=-1) for tile in tiles], axis=-1)
    masked = masked if padding is None else masked & ~padding
    return None if isinstance(masked, np.ndarray) and not masked.any() else masked


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_inputs(query: Array, key: Array, value: Array, bias: Array, mask: Array) -> tuple[int, int, int]:
    """The argument checks; B, T, S."""
    _check.one_dtype([("query", query), ("key", key), ("value", value)])
    if not (dtype_name(query) in HALF and is_array(bias) and dtype_name(bias) == "float32"):
        _check.one_dtype([("query", query)], optional=[("bias", bias)])
    _check.boolean("mask", mask, "True = attend (a mask to be added to the scores is a bias)")
    batch = "" if query.ndim == 3 else "B "
    axes = _check.Axes()
    axes("query", query, batch + "T N H")
    axes("key", key, batch + "S K H")
    axes("value", value, batch + "S K H")
    _check.multiple("query", axes["N"], "key", axes["K"], "N K")
    axes.size.setdefault("B", 1)
    axes.broadcast("bias", _check.shape_of(bias), "B N T S")
    if mask is not None:
        axes.static("mask", mask)
    axes.broadcast("mask", _check.shape_of(mask), "B N T S")
    return axes["B"], axes["T"], axes["S"]


def _lengths(name: str, n: Array, B: int) -> np.ndarray:
    """n (B,) of integers, as NumPy's"""
    lengths = _check.integers(f"{name}_seq_lengths", np.asarray(n) if is_array(n) else n, 0)
    if lengths.shape != (B,):
        raise ValueError(f"{name}_seq_lengths must be (B,) with B={B} as in query, got {lengths.shape}")
    return lengths


def _window(window: Any) -> tuple[int, int]:
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"local_window_size must be an int or a pair of them, (left, right), got {window!r}")
    left, right = (_check.integer("local_window_size", n, 0, or_else=" or a pair of them") for n in pair)
    return left, right
