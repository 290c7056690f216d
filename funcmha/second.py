"""Second order: the change of a gradient from the changes of its inputs, forward mode over reverse.

    y, cache  = f(*inputs, **static)
    grads     = f_vjp(cache, dy)
    grads_dot = f_vjp_jvp(cache, dy, dy_dot, *inputs_dot)     a tuple as `grads` is

For a loss L(y) with gradient dy and Hessian L″, the Hessian of the loss times a direction of the inputs is one call,
with dy_dot = L″ ẏ and ẏ = f_jvp(cache, *inputs_dot). As the second derivatives of ⟨dy, f⟩ are symmetric, the same two
functions are the vjp of the vjp, for frameworks that ask for it: with cotangents c of the gradients, the inputs get
f_vjp_jvp(cache, dy, None, *c), and dy gets f_jvp(cache, *c).

A tangent is None, which is zero, or has the shape of what it is the tangent of. All have the dtype of dy, and so has
the result; float16 and bfloat16 are computed with in float32 and rounded once.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from functools import singledispatch
from typing import Any

from ._bias import dense_bias_vjp, on_bias
from ._doors import blank_queries
from ._tangents import Cotangents, check_cotangents, check_tangents
from ._xp import Array, full, namespace, narrow, unbroadcast
from .biases import RelativeBias
from .forward import scores_jvp, softmax_jvp, visible
from .ops import AttentionCache, _dropout, _per_key_head, _per_query_head, _softmax_vjp, seeing_queries
from .tiled import second_order
from .tiled.attention import AttentionCache as TiledCache


@singledispatch
def attention_vjp_jvp(
    cache: Any,
    do: Array,
    do_dot: Array = None,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    sink_dot: Array = None,
    /,
    *,
    dlse: Array = None,
    dlse_dot: Array = None,
) -> tuple[Array, Array, Array, Array | RelativeBias, Array]:
    """ḋq, ḋk, ḋv, ḋbias, ḋsink: the tangents of `attention_vjp`
    from those of its inputs: of do (..., H, T, E), q, k, v, bias, sink and, where given, of dlse (..., H, T)

        ḋz = dz (ż − l̇se) + p (ḋp − Σ p ḋp − Σ dz (ż − l̇se) − dsink (ṡink − l̇se) + ḋlse)
        ḋu = slope · ḋz + slope˙ · dz     slope˙ = −2 tanh(u / softcap) slope u̇ / softcap

    From the cache of any attention, by the engine that it is from: in linear memory from that of TILED. All else is the
    rule of a product. Rows with no key allowed, and keys that nobody sees, have 0.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


def _attention_vjp_jvp(
    cache: Any,
    do: Array,
    do_dot: Array = None,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    sink_dot: Array = None,
    /,
    *,
    dlse: Array = None,
    dlse_dot: Array = None,
) -> tuple[Any, ...]:
    y = check_cotangents(cache, do, do_dot, dlse, dlse_dot, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    x = visible(cache, check_tangents(cache, q_dot, k_dot, v_dot, bias_dot, sink_dot))
    y = y._replace(**{name: blank_queries(getattr(y, name), seeing_queries(cache)) for name in ("do", "do_dot")})
    q, k, p, xp = cache.q, cache.k, cache.p, namespace(cache.q)
    x, y = _filled(x, cache[:3]), _filled(y, (y.do, y.do, cache.lse, cache.lse))
    u_dot, z_dot = scores_jvp(cache, x)
    p_dot, lse_dot = softmax_jvp(cache, z_dot, x.sink)

    # o = a v   with   a = dropout(p)
    a, a_dot = (_dropout(w, cache.keep, cache.rate) for w in (p, p_dot))
    v, v_dot = (_per_query_head(w, q) for w in (cache.v, x.v))
    dv_dot = _per_key_head(xp.matrix_transpose(a_dot) @ y.do + xp.matrix_transpose(a) @ y.do_dot, cache.v)
    dp = _dropout(y.do @ xp.matrix_transpose(v), cache.keep, cache.rate)
    dp_dot = y.do_dot @ xp.matrix_transpose(v) + y.do @ xp.matrix_transpose(v_dot)
    dp_dot = _dropout(dp_dot, cache.keep, cache.rate)
    # p, lse = softmax(z, sink)   and   u = scale · q kᵀ
    dz, dz_dot, dsink_dot = _softmax_vjp_jvp(cache, dp, dp_dot, y, z_dot - lse_dot[..., None], lse_dot, x.sink)
    du, du_dot = _soft_cap_vjp_jvp(cache, dz, dz_dot, u_dot)
    dq_dot = cache.scale * (du_dot @ _per_query_head(k, q) + du @ _per_query_head(x.k, q))
    dk_dot = xp.matrix_transpose(du_dot) @ (cache.scale * q) + xp.matrix_transpose(du) @ (cache.scale * x.q)
    dbias_dot = None if cache.bias is None else dense_bias_vjp(cache.bias, dz_dot)
    dq_dot, dk_dot, dv_dot, dsink_dot = (
        narrow(g, do.dtype) for g in (dq_dot, _per_key_head(dk_dot, k), dv_dot, dsink_dot)
    )
    return dq_dot, dk_dot, dv_dot, on_bias(lambda g: narrow(g, do.dtype), dbias_dot), dsink_dot


attention_vjp_jvp.register(AttentionCache, _attention_vjp_jvp)
attention_vjp_jvp.register(TiledCache, second_order.attention_vjp_jvp)


def _softmax_vjp_jvp(
    cache: AttentionCache, dp: Array, dp_dot: Array, y: Cotangents, change: Array, lse_dot: Array, sink_dot: Array
) -> tuple[Array, Array, Array]:
    """dz     ḋz = dz (ż − l̇se) + p (ḋp − δ̇ + ḋlse)     ḋsink        `change` is ż − l̇se = ṗ / p

    δ̇ = Σ p ḋp + Σ dz (ż − l̇se) + dsink (ṡink − l̇se): the covariance of two changes, so no digits cancel.
    """
    p, sink, xp = cache.p, cache.sink, namespace(cache.p)
    p_sink = None if sink is None else xp.exp(sink[..., None] - cache.lse)
    dz, dsink = _softmax_vjp(p, dp, y.dlse, p_sink)
    moved = dz * change
    bent = xp.sum(moved, axis=-1)
    if sink is None:
        more, _ = _softmax_vjp(p, dp_dot, y.dlse_dot - bent)
        return dz, moved + more, None
    moved_sink = dsink * ((0.0 if sink_dot is None else sink_dot[..., None]) - lse_dot)
    more, more_sink = _softmax_vjp(p, dp_dot, y.dlse_dot - bent - moved_sink, p_sink)
    return dz, moved + more, unbroadcast(xp.sum(moved_sink + more_sink, axis=-1), sink.shape)


def _soft_cap_vjp_jvp(cache: Any, dz: Array, dz_dot: Array, u_dot: Array) -> tuple[Array, Array]:
    """du = slope · dz     ḋu = slope · ḋz − 2 tanh(u / softcap) slope u̇ / softcap · dz"""
    slope = cache.slope
    if slope is None:
        return dz, dz_dot
    xp = namespace(slope)
    t = xp.tanh((cache.scale * cache.q) @ xp.matrix_transpose(_per_query_head(cache.k, cache.q)) / cache.softcap)
    return slope * dz, slope * (dz_dot - 2 * t * (u_dot / cache.softcap) * dz)


def _filled(dots: Any, like: tuple[Array, ...]) -> Any:
    """The tangents with zeros for None, but for what comes after those of `like`."""
    zeros = [full(tuple(a.shape), 0.0, a) if d is None else d for d, a in zip(dots, like, strict=False)]
    return type(dots)(*zeros, *dots[len(zeros) :])
