"""Forward mode and second order of `linear` and `attention`, from the cache of any engine.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out; `...` is
batch.
"""

from functools import singledispatch
from typing import Any

from funcmha import _check
from funcmha._arguments import Cotangents, Tangents, check_cotangents, check_tangents
from funcmha._arrays import Array, downcast, full, namespace, quiet_underflow, unbroadcast, upcast
from funcmha._check import shape_of
from funcmha.engines import batched, blocks, tiled
from funcmha.engines.tiled import forward_mode, second_order
from funcmha.masks.zero import zero_masked_queries, zero_unattended_keys
from funcmha.ops import (
    AttentionCache,
    LinearCache,
    attended_pairs,
    drop,
    linear_vjp,
    per_key_head,
    per_query_head,
    round_bias,
    share_of_sink,
    softmax_with_sink_vjp,
)

# ── linear ───────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_jvp(cache: LinearCache, x_dot: Array = None, w_dot: Array = None, b_dot: Array = None, /) -> Array:
    """ẏ = ẋ wᵀ + x ẇᵀ + ḃ        x (..., I)   w (O, I)   b (O,) or None   →   ẏ (..., O)"""
    x, w, b = _check.cache(cache, LinearCache, "linear")
    dots = [("x_dot", x_dot), ("w_dot", w_dot), ("b_dot", b_dot)]
    _check.one_dtype([], optional=dots)
    _check.tangent("x_dot", x_dot, x.shape, x, "... I")
    _check.tangent("w_dot", w_dot, w.shape, x, "O I")
    _check.tangent("b_dot", b_dot, shape_of(b), x, "O")
    xp = namespace(x)
    y_dot = full((*x.shape[:-1], w.shape[0]), 0.0, x)
    y_dot = y_dot if x_dot is None else y_dot + upcast(x_dot) @ xp.matrix_transpose(w)
    y_dot = y_dot if w_dot is None else y_dot + x @ xp.matrix_transpose(upcast(w_dot))
    y_dot = y_dot if b_dot is None else y_dot + upcast(b_dot)
    return downcast(y_dot, next((dot.dtype for _, dot in dots if dot is not None), x.dtype))


def linear_vjp_jvp(
    cache: LinearCache,
    dy: Array,
    dy_dot: Array = None,
    x_dot: Array = None,
    w_dot: Array = None,
    b_dot: Array = None,
    /,
) -> tuple[Array, Array, Array]:
    """ḋx = ḋy w + dy ẇ     ḋw = Σ ḋy xᵀ + dy ẋᵀ     ḋb = Σ ḋy        the tangents of `linear_vjp`"""
    x, w, b = _check.cache(cache, LinearCache, "linear")
    dots = {"dy_dot": dy_dot, "x_dot": x_dot, "w_dot": w_dot, "b_dot": b_dot}
    _check.one_dtype([("dy", dy)], optional=dots.items())
    _check.tangent("dy_dot", dy_dot, dy.shape, x, "... O")
    _check.tangent("x_dot", x_dot, x.shape, x, "... I")
    _check.tangent("w_dot", w_dot, w.shape, x, "O I")
    _check.tangent("b_dot", b_dot, shape_of(b), x, "O")
    zeros, dtype = namespace(x).zeros_like, dy.dtype
    dy_dot, x_dot, w_dot = (
        zeros(a) if dot is None else upcast(dot) for dot, a in ((dy_dot, upcast(dy)), (x_dot, x), (w_dot, w))
    )
    dx_dot, dw_dot, db_dot = linear_vjp(cache, dy_dot)
    dx_more, dw_more, _ = linear_vjp(LinearCache(x_dot, w_dot, None), upcast(dy))
    return downcast(dx_dot + dx_more, dtype), downcast(dw_dot + dw_more, dtype), downcast(db_dot, dtype)


# ── attention, forward mode ──────────────────────────────────────────────────────────────────────────────────────


def attention_jvp(
    cache: Any,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Any = None,
    sink_dot: Array = None,
    /,
) -> tuple[Array, Array]:
    """ȯ = ȧ v + a v̇     l̇se = Σ p ż + p_sink ṡink     where  ż = slope · scale (q̇ kᵀ + q k̇ᵀ) + ḃias,  ṗ = p (ż − l̇se)
    q̇ (..., H, T, D)   k̇ (..., K, S, D)   v̇ (..., K, S, E)   →   ȯ (..., H, T, E)   l̇se (..., H, T)

    From the cache of any attention, by the engine that it is from: in linear memory from that of TILED or, by
    blocks, BATCHED. A fully masked row has ȯ = 0 and l̇se = 0. A tangent of −∞ or NaN where the mask forbids has no
    effect.
    """
    return jvp_of(cache, (q_dot, k_dot, v_dot, bias_dot, sink_dot))


@singledispatch
def jvp_of(cache: Any, dots: tuple[Any, ...]) -> tuple[Array, Array]:
    """`attention_jvp`, by the type of the cache"""
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@jvp_of.register
@quiet_underflow
def _(cache: AttentionCache, dots: tuple[Any, ...]) -> tuple[Array, Array]:
    q, k, v, bias, sink, *_ = cache
    tangents, dtype = check_tangents(q, k, v, bias, sink, dots)
    x = _zeroed(cache, tangents)
    _, z_dot = _scores_jvp(cache, x)
    p_dot, lse_dot = _softmax_jvp(cache, z_dot, x.sink)
    o_dot = drop(p_dot, cache.keep, cache.rate) @ per_query_head(v, q)
    if x.v is not None:
        o_dot = o_dot + drop(cache.p, cache.keep, cache.rate) @ per_query_head(x.v, q)
    return downcast(o_dot, dtype), downcast(lse_dot, dtype)


jvp_of.register(batched.AttentionCache, lambda cache, dots: jvp_of(cache.of_ops, dots))
jvp_of.register(blocks.AttentionCache, blocks.attention_jvp)
jvp_of.register(tiled.AttentionCache, forward_mode.attention_jvp)


def _zeroed(cache: AttentionCache, x: Tangents) -> Tangents:
    """The tangents with 0 at fully masked queries and unattended keys, whatever is there: 0 · NaN would spread"""
    keys = None if x.k is None and x.v is None else cache.p != 0
    q, k, v = (
        zero_masked_queries(x.q, attended_pairs(cache)),
        zero_unattended_keys(x.k, keys),
        zero_unattended_keys(x.v, keys),
    )
    return x._replace(q=q, k=k, v=v)


def _scores_jvp(cache: AttentionCache, x: Tangents) -> tuple[Array, Array]:
    """u̇ = scale (q̇ kᵀ + q k̇ᵀ)     ż = slope · u̇ + ḃias, 0 where p is     (..., H, T, S)"""
    q, xp = cache.q, namespace(cache.q)
    u_dot = xp.zeros_like(cache.p)
    if x.q is not None:
        u_dot = u_dot + (cache.scale * x.q) @ xp.matrix_transpose(per_query_head(cache.k, q))
    if x.k is not None:
        u_dot = u_dot + (cache.scale * q) @ xp.matrix_transpose(per_query_head(x.k, q))
    z_dot = u_dot if cache.slope is None else cache.slope * u_dot
    z_dot = z_dot if x.bias is None else z_dot + x.bias.dense(*u_dot.shape[-2:])
    return u_dot, xp.where(cache.p == 0, 0.0, z_dot)


def _softmax_jvp(cache: AttentionCache, z_dot: Array, sink_dot: Array) -> tuple[Array, Array]:
    """ṗ = p (ż − l̇se)     l̇se = Σ p ż + p_sink ṡink"""
    p, sink, xp = cache.p, cache.sink, namespace(cache.p)
    lse_dot = xp.sum(p * z_dot, axis=-1)
    if sink is None:
        return softmax_with_sink_vjp(p, z_dot)[0], lse_dot  # symmetric, and centred as the vjp is
    p_sink = share_of_sink(cache)
    of_sink = xp.zeros_like(lse_dot) if sink_dot is None else p_sink * sink_dot[..., None]
    return softmax_with_sink_vjp(p, z_dot, -of_sink, p_sink)[0], lse_dot + of_sink


# ── attention, second order ──────────────────────────────────────────────────────────────────────────────────────


def attention_vjp_jvp(
    cache: Any,
    do: Array,
    do_dot: Array = None,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Any = None,
    sink_dot: Array = None,
    /,
    *,
    dlse: Array = None,
    dlse_dot: Array = None,
) -> tuple[Any, ...]:
    """ḋq, ḋk, ḋv, ḋbias, ḋsink: the tangents of `attention_vjp`
    from those of its inputs: of do (..., H, T, E), q, k, v, bias, sink and, where given, of dlse (..., H, T)

        ḋz = dz (ż − l̇se) + p (ḋp − Σ p ḋp − Σ dz (ż − l̇se) − dsink (ṡink − l̇se) + ḋlse)
        ḋu = slope · ḋz + slope˙ · dz     slope˙ = −2 tanh(u / softcap) slope u̇ / softcap

    From the cache of any attention, by the engine that it is from: in linear memory from that of TILED or, by
    blocks, BATCHED. All else is the rule of a product. Fully masked queries and unattended keys have 0.
    """
    return vjp_jvp_of(cache, Cotangents(do, do_dot, dlse, dlse_dot), (q_dot, k_dot, v_dot, bias_dot, sink_dot))


@singledispatch
def vjp_jvp_of(cache: Any, cotangents: Cotangents, dots: tuple[Any, ...]) -> tuple[Any, ...]:
    """`attention_vjp_jvp`, by the type of the cache"""
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@vjp_jvp_of.register
@quiet_underflow
def _(cache: AttentionCache, cotangents: Cotangents, dots: tuple[Any, ...]) -> tuple[Any, ...]:
    y, dtype = check_cotangents(cache.q, cache.v, cotangents, dots), cotangents.do.dtype
    x = _zeroed(cache, check_tangents(cache.q, cache.k, cache.v, cache.bias, cache.sink, dots)[0])
    y = y._replace(**{name: zero_masked_queries(getattr(y, name), attended_pairs(cache)) for name in ("do", "do_dot")})
    q, k, p, xp = cache.q, cache.k, cache.p, namespace(cache.q)
    x, y = _filled(x, cache[:3]), _filled(y, (y.do, y.do, cache.lse, cache.lse))
    u_dot, z_dot = _scores_jvp(cache, x)
    p_dot, lse_dot = _softmax_jvp(cache, z_dot, x.sink)

    # o = a v   with   a = dropout(p)
    a, a_dot = (drop(w, cache.keep, cache.rate) for w in (p, p_dot))
    v, v_dot = (per_query_head(w, q) for w in (cache.v, x.v))
    dv_dot = per_key_head(xp.matrix_transpose(a_dot) @ y.do + xp.matrix_transpose(a) @ y.do_dot, cache.v)
    dp = drop(y.do @ xp.matrix_transpose(v), cache.keep, cache.rate)
    dp_dot = y.do_dot @ xp.matrix_transpose(v) + y.do @ xp.matrix_transpose(v_dot)
    dp_dot = drop(dp_dot, cache.keep, cache.rate)
    # p, lse = softmax(z, sink)   and   u = scale · q kᵀ
    dz, dz_dot, dsink_dot = _softmax_vjp_jvp(cache, dp, dp_dot, y, z_dot - lse_dot[..., None], lse_dot, x.sink)
    du, du_dot = _soft_cap_vjp_jvp(cache, dz, dz_dot, u_dot)
    dq_dot = cache.scale * (du_dot @ per_query_head(k, q) + du @ per_query_head(x.k, q))
    dk_dot = xp.matrix_transpose(du_dot) @ (cache.scale * q) + xp.matrix_transpose(du) @ (cache.scale * x.q)
    dbias_dot = None if cache.bias is None else cache.bias.dense_vjp(dz_dot)
    dq_dot, dk_dot, dv_dot, dsink_dot = (
        downcast(g, dtype) for g in (dq_dot, per_key_head(dk_dot, k), dv_dot, dsink_dot)
    )
    return dq_dot, dk_dot, dv_dot, round_bias(dbias_dot, dtype), dsink_dot


vjp_jvp_of.register(batched.AttentionCache, lambda cache, *args: vjp_jvp_of(cache.of_ops, *args))
vjp_jvp_of.register(blocks.AttentionCache, blocks.attention_vjp_jvp)
vjp_jvp_of.register(tiled.AttentionCache, second_order.attention_vjp_jvp)


def _softmax_vjp_jvp(
    cache: AttentionCache, dp: Array, dp_dot: Array, y: Cotangents, change: Array, lse_dot: Array, sink_dot: Array
) -> tuple[Array, Array, Array]:
    """dz     ḋz = dz (ż − l̇se) + p (ḋp − δ̇ + ḋlse)     ḋsink        `change` is ż − l̇se = ṗ / p

    δ̇ = Σ p ḋp + Σ dz (ż − l̇se) + dsink (ṡink − l̇se): the covariance of two changes, so no digits cancel.
    """
    p, sink, xp = cache.p, cache.sink, namespace(cache.p)
    p_sink = share_of_sink(cache)
    dz, dsink = softmax_with_sink_vjp(p, dp, y.dlse, p_sink)
    moved = dz * change
    bent = xp.sum(moved, axis=-1)
    if sink is None:
        more, _ = softmax_with_sink_vjp(p, dp_dot, y.dlse_dot - bent)
        return dz, moved + more, None
    moved_sink = dsink * ((0.0 if sink_dot is None else sink_dot[..., None]) - lse_dot)
    more, more_sink = softmax_with_sink_vjp(p, dp_dot, y.dlse_dot - bent - moved_sink, p_sink)
    return dz, moved + more, unbroadcast(xp.sum(moved_sink + more_sink, axis=-1), sink.shape)


def _soft_cap_vjp_jvp(cache: AttentionCache, dz: Array, dz_dot: Array, u_dot: Array) -> tuple[Array, Array]:
    """du = slope · dz     ḋu = slope · ḋz − 2 tanh(u / softcap) slope u̇ / softcap · dz"""
    slope = cache.slope
    if slope is None:
        return dz, dz_dot
    xp = namespace(slope)
    t = xp.tanh((cache.scale * cache.q) @ xp.matrix_transpose(per_query_head(cache.k, cache.q)) / cache.softcap)
    return slope * dz, slope * (dz_dot - 2 * t * (u_dot / cache.softcap) * dz)


def _filled(dots: Any, like: tuple[Array, ...]) -> Any:
    """The tangents with zeros for None, but for what comes after those of `like`."""
    zeros = [full(tuple(a.shape), 0.0, a) if d is None else d for d, a in zip(dots, like, strict=False)]
    return type(dots)(*zeros, *dots[len(zeros) :])
