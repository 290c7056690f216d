"""Forward mode: the change of an output from the changes of the inputs, one jvp for each op.

    y, cache = f(*inputs, **static)
    y_dot    = f_jvp(cache, *inputs_dot)     ẏ = J ẋ: `f_vjp` from the other side, ⟨dy, J ẋ⟩ = ⟨Jᵀ dy, ẋ⟩

A jvp takes the cache that the vjp takes, and so no option again. An input's tangent has its shape and tree, or is None,
which is zero and costs nothing. The result has the dtype of the tangents; float16 and bfloat16 are computed with in
float32 and rounded once. A tangent is written `q_dot`, for q̇: `dq` is a gradient.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out; `...` is
batch.
"""

from functools import singledispatch
from typing import Any

from ._bias import dense_bias
from ._check import shape_of
from ._doors import blank_keys, blank_queries
from ._tangents import Tangents, check_tangent, check_tangents, dtype_of, one_dtype
from ._xp import Array, full, namespace, narrow, widen
from .biases import RelativeBias
from .norms import (
    L2NormCache,
    LayerNormCache,
    RmsNormCache,
    l2_norm_jvp,
    layer_norm_jvp,
    rms_norm_jvp,
)
from .ops import AttentionCache, LinearCache, _dropout, _per_query_head, _softmax_vjp, seeing_queries
from .tiled import forward_mode
from .tiled.attention import AttentionCache as TiledCache

# ── linear ───────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_jvp(cache: LinearCache, x_dot: Array = None, w_dot: Array = None, b_dot: Array = None, /) -> Array:
    """ẏ = ẋ wᵀ + x ẇᵀ + ḃ        x (..., I)   w (O, I)   b (O,) or None   →   ẏ (..., O)"""
    x, w, b = cache
    one_dtype([("x_dot", x_dot), ("w_dot", w_dot), ("b_dot", b_dot)])
    check_tangent("x_dot", x_dot, x.shape, x, "... I")
    check_tangent("w_dot", w_dot, w.shape, x, "O I")
    check_tangent("b_dot", b_dot, shape_of(b), x, "O")
    xp = namespace(x)
    y_dot = full((*x.shape[:-1], w.shape[0]), 0.0, x)
    y_dot = y_dot if x_dot is None else y_dot + widen(x_dot) @ xp.matrix_transpose(w)
    y_dot = y_dot if w_dot is None else y_dot + x @ xp.matrix_transpose(widen(w_dot))
    y_dot = y_dot if b_dot is None else y_dot + widen(b_dot)
    return narrow(y_dot, dtype_of(x, x_dot, w_dot, b_dot))


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────


@singledispatch
def norm_jvp(cache: Any, x_dot: Array = None, w_dot: Array = None, b_dot: Array = None, /) -> Array:
    """ẏ = w ṅ + ẇ n + ḃ        x (..., D)   w, b (D,) or None   →   ẏ (..., D)     from the cache of any norm"""
    raise TypeError(f"cache must come from a norm of funcmha.norms, got {type(cache).__name__}")


norm_jvp.register(RmsNormCache, rms_norm_jvp)
norm_jvp.register(L2NormCache, l2_norm_jvp)
norm_jvp.register(LayerNormCache, layer_norm_jvp)


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


@singledispatch
def attention_jvp(
    cache: Any,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    sink_dot: Array = None,
    /,
) -> tuple[Array, Array]:
    """ȯ = ȧ v + a v̇     l̇se = Σ p ż + p_sink ṡink     where  ż = slope · scale (q̇ kᵀ + q k̇ᵀ) + ḃias,  ṗ = p (ż − l̇se)
    q̇ (..., H, T, D)   k̇ (..., K, S, D)   v̇ (..., K, S, E)   →   ȯ (..., H, T, E)   l̇se (..., H, T)

    From the cache of any attention, by the engine that it is from: in linear memory from that of TILED. A row with no
    key allowed has ȯ = 0 and l̇se = 0. A tangent of −∞ or NaN where the mask hides has no effect. The rows of a
    saturated softmax keep their digits in the reference alone, as they do in the vjp.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


def _attention_jvp(
    cache: AttentionCache,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    sink_dot: Array = None,
    /,
) -> tuple[Array, Array]:
    x = visible(cache, check_tangents(cache, q_dot, k_dot, v_dot, bias_dot, sink_dot))
    dtype = dtype_of(cache.q, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    _, z_dot = scores_jvp(cache, x)
    p_dot, lse_dot = softmax_jvp(cache, z_dot, x.sink)
    o_dot = _dropout(p_dot, cache.keep, cache.rate) @ _per_query_head(cache.v, cache.q)
    if x.v is not None:
        o_dot = o_dot + _dropout(cache.p, cache.keep, cache.rate) @ _per_query_head(x.v, cache.q)
    return narrow(o_dot, dtype), narrow(lse_dot, dtype)


attention_jvp.register(AttentionCache, _attention_jvp)
attention_jvp.register(TiledCache, forward_mode.attention_jvp)


def visible(cache: AttentionCache, x: Tangents) -> Tangents:
    """The tangents with 0 at the queries and keys that see or show nothing, whatever is there: 0 · NaN would spread."""
    seen = None if x.k is None and x.v is None else cache.p != 0
    return x._replace(q=blank_queries(x.q, seeing_queries(cache)), k=blank_keys(x.k, seen), v=blank_keys(x.v, seen))


def scores_jvp(cache: AttentionCache, x: Tangents) -> tuple[Array, Array]:
    """u̇ = scale (q̇ kᵀ + q k̇ᵀ)     ż = slope · u̇ + ḃias, 0 where p is     (..., H, T, S)"""
    q, xp = cache.q, namespace(cache.q)
    u_dot = xp.zeros_like(cache.p)
    if x.q is not None:
        u_dot = u_dot + (cache.scale * x.q) @ xp.matrix_transpose(_per_query_head(cache.k, q))
    if x.k is not None:
        u_dot = u_dot + (cache.scale * q) @ xp.matrix_transpose(_per_query_head(x.k, q))
    z_dot = u_dot if cache.slope is None else cache.slope * u_dot
    z_dot = z_dot if x.bias is None else z_dot + dense_bias(x.bias, *u_dot.shape[-2:])
    return u_dot, xp.where(cache.p == 0, 0.0, z_dot)


def softmax_jvp(cache: AttentionCache, z_dot: Array, sink_dot: Array) -> tuple[Array, Array]:
    """ṗ = p (ż − l̇se)     l̇se = Σ p ż + p_sink ṡink"""
    p, sink, xp = cache.p, cache.sink, namespace(cache.p)
    lse_dot = xp.sum(p * z_dot, axis=-1)
    if sink is None:
        return _softmax_vjp(p, z_dot)[0], lse_dot  # symmetric, and centred as the vjp is
    p_sink = xp.exp(sink[..., None] - cache.lse)
    of_sink = xp.zeros_like(lse_dot) if sink_dot is None else p_sink * sink_dot[..., None]
    return _softmax_vjp(p, z_dot, -of_sink, p_sink)[0], lse_dot + of_sink
