"""`jax.nn.dot_product_attention` and its gradient: its layout, its masks and its answers, for arrays of any library.

    y, cache = dot_product_attention(query, key, value, bias, mask=mask, is_causal=True)
    dquery, dkey, dvalue, dbias = dot_product_attention_vjp(cache, dy)
    log_sum_exp(cache)                                           # (B, T, N): what return_residual=True returns beside y

What differs from `funcmha.attention`. The heads come after the tokens. Causal is top-left, key j ≤ query i whatever T
and S; a window includes both its ends, and one int reaches as far to both sides. The bias is added, then masked.

JAX fills a forbidden score with −0.7 times the largest float32, where funcmha has −∞. So a query that may see no key
sees *all* of them alike, and gives the mean of the values; queries from `query_seq_lengths` on give 0. Both are given
here, gradients included: each value gets dy / S from the former, and from the latter nothing flows back. The residual
of either is the fill. But no score is lost in it here: a bias of less than the fill (−∞, or the least float32) has JAX
look at keys that the mask forbids, or give NaN where it forbids none. Here a bias of −∞ forbids, as ever in funcmha,
and a query that it leaves without keys gives 0, with gradients 0.

JAX's softmax is float32 even for float64, and rounds the weights of half types. Here float64 stays float64, half types
are computed with in float32 and rounded once, and `log_sum_exp` and `attention_weights` are in the dtype computed with.
(In float16 the fill is −∞ in JAX's residual; and on a CPU jax 0.10.2 does not compile its float16 at all.)

Two of its arguments are not here: `implementation`, as the numbers are the same, and `return_residual`, as above.

JAX is not imported. The same on JAX's own arrays, under its own `jit` and `grad`: `jax.custom_vjp(f).defvjp(f, f_vjp)`.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H width of a head.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check, engines, masks
from funcmha._xp import (
    HALF,
    Array,
    dtype_name,
    from_host,
    full,
    heads_first,
    heads_last,
    is_array,
    namespace,
    narrow,
    widen,
)
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.masks import Mask

FILL = -0.7 * float(np.finfo(np.float32).max)  # a forbidden score: _get_large_negative in jax/_src/nn/functions.py
CHUNK = 256  # rows of a mask to look at together, for those without a key: memory stays linear


class DotProductAttentionCache(NamedTuple):
    attention: Any  # by an engine; queries without keys give 0
    mean: Any  # by an engine, of a query in each head that sees all keys alike; None if nobody asks for it
    blind: Array  # (B or 1, N or 1, T or 1), the queries whose answer is that mean; None if there is none
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

    bias   broadcasts to (B, N, T, S); of the dtype of the rest, or float32 beside half types
    mask   boolean, True = attend, broadcasts to (B, N, T, S)
    scale  H ** -0.5 unless given
    query_seq_lengths, key_value_seq_lengths   integers (B,), known when the function is called; the rest is padding
    local_window_size   (left, right), both inclusive, or one int for both

    N is a multiple of K, and head n reads n // (N // K). Raises TypeError for wrong dtypes, ValueError for shapes that
    do not fit, before any arithmetic. Defaults, names and answers of jax 0.10.2.
    """
    B, T, S = _check_inputs(query, key, value, bias, mask)
    visible = _visible(mask, is_causal, key_value_seq_lengths, local_window_size, B)
    padding = None if query_seq_lengths is None else _padding(_lengths("query", query_seq_lengths, B), T)
    if S == 0:  # no score that could be filled
        visible = padding = None
    scale = None if scale is None else _check.number("scale", scale)
    q, k, v = (_heads_first(x) for x in (query, key, value))
    if bias is not None and bias.dtype != query.dtype:
        q, k, v = widen(q), widen(k), widen(v)

    o, attention = engines.attention(q, k, v, bias, mask=_without(visible, padding), scale=scale)
    padding = None if padding is None else from_host(padding, q)
    blind = None if visible is None else _blind(visible, padding, T, S, q)
    mean = None
    if blind is not None:
        zero_q, zero_k = full((*q.shape[:2], 1, 1), 0.0, q), full((*k.shape[:3], 1), 0.0, k)
        average, mean = engines.attention(zero_q, zero_k, v)
        o = namespace(o).where(blind[..., None], average, o)
    return narrow(_heads_last(o, query), query.dtype), DotProductAttentionCache(
        attention, mean, blind, padding, query, bias
    )


def dot_product_attention_vjp(
    cache: DotProductAttentionCache, dy: Array, /, *, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dquery, dkey, dvalue, dbias: a query that sees no key gives dy / S to every value, and nothing to the rest
    from the cotangents of y and, where given, of the residual (B, T, N)
    """
    _check.cache(cache, DotProductAttentionCache, "dot_product_attention")
    attention, mean, blind, _, query, bias = cache
    batch, computed = "B " if query.ndim == 4 else "", log_sum_exp(attention)
    _check.cotangent("dy", dy, query.shape, computed, batch + "T N H")
    _check.cotangent("dlse", dlse, query.shape[:-1], computed, batch + "T N", optional=True)
    do = _heads_first(widen(dy))
    dlse = None if dlse is None else _heads_first(widen(dlse)[..., None])[..., 0]

    dq, dk, dv, dbias, _ = engines.attention_vjp(attention, do, dlse=dlse)
    if blind is not None:
        xp = namespace(do)
        dmean = xp.sum(xp.where(blind[..., None], do, 0.0), axis=-2, keepdims=True)
        dv = dv + engines.attention_vjp(mean, dmean)[2]
    dquery, dkey, dvalue = (narrow(_heads_last(dx, query), dy.dtype) for dx in (dq, dk, dv))
    alike = bias is None or bias.dtype == query.dtype
    return dquery, dkey, dvalue, narrow(dbias, dy.dtype if alike else bias.dtype)


@attention_weights.register
def _(cache: DotProductAttentionCache, /) -> Array:
    """p (B, N, T, S), or (N, T, S): 1 / S where a query sees no key, 0 where it is padding"""
    p = attention_weights(cache.attention)
    if cache.blind is not None:
        p = namespace(p).where(cache.blind[..., None], attention_weights(cache.mean), p)
    return p if cache.query.ndim == 4 else p[0, ...]


@log_sum_exp.register
def _(cache: DotProductAttentionCache, /) -> Array:
    """lse (B, T, N), or (T, N): the fill where a query sees no key, or is padding"""
    lse = log_sum_exp(cache.attention)
    for rows in (cache.blind, cache.padding):
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


def _visible(mask: Array, is_causal: bool, key_lengths: Array, window: Any, B: int) -> Mask | None:
    """What the mask, causality, the lengths of the keys and the window allow together; None for everything."""
    _check.flag("is_causal", is_causal)
    return masks.intersection(
        mask,
        masks.causal() if is_causal else None,
        None if window is None else masks.window(*_window(window)),
        None if key_lengths is None else masks.lengths(_lengths("key_value", key_lengths, B)),
    )


def _padding(lengths: np.ndarray, T: int) -> np.ndarray:
    """(B,)  →  (B, 1, T), True behind each length"""
    return np.arange(T) >= lengths[:, None, None]


def _without(visible: Mask | None, padding: np.ndarray | None) -> Mask | None:
    """`visible`, and nothing for the queries that are padding."""
    return masks.intersection(visible, None if padding is None else ~padding[..., None])


def _blind(visible: Mask, padding: Array, T: int, S: int, like: Array) -> Array:
    """The queries, but padding, that see no key; None if NumPy can tell that there are none."""
    xp, rows = namespace(like), visible.shape(T, S)[-2]
    tiles = (visible.tile((i, min(i + CHUNK, rows)), (0, S), like) for i in range(0, max(rows, 1), CHUNK))
    blind = ~xp.concat([xp.any(tile, axis=-1) for tile in tiles], axis=-1)
    blind = blind if padding is None else blind & ~padding
    return None if isinstance(blind, np.ndarray) and not blind.any() else blind


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_inputs(query: Array, key: Array, value: Array, bias: Array, mask: Array) -> tuple[int, int, int]:
    """B, T, S; and that everything fits."""
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
