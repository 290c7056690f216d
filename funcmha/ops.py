"""Primitives and their gradients, in pairs: the specification that every engine must equal.

    y, cache = f(*inputs, **static)      positional inputs are differentiable, keyword ones are not
    grads    = f_vjp(cache, dy)          one gradient per input, in order, of its shape; None where the input was None

Dtypes: float64, float32, and float16 and bfloat16, which are computed with in float32 and rounded once, at the end.
(complex128 is taken too, as the holomorphic extension, for complex-step checks.) A gradient has the dtype of `dy`.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out;
`...` is batch.
"""

from collections.abc import Sequence
from functools import singledispatch
from math import prod
from typing import Any, NamedTuple

from . import _check
from ._bias import bias_of_heads, bias_of_sample, dense_bias, dense_bias_vjp, on_bias
from ._doors import blank_keys, blank_queries, check_attention, check_linear
from ._xp import Array, from_host, namespace, narrow, of_heads, of_sample, row_blocks, unbroadcast, widen
from .biases import RelativeBias
from .dropout import Masked, Seeded
from .masks import Mask, dense

INF = float("inf")


# ── linear ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LinearCache(NamedTuple):
    x: Array  # (..., I)
    w: Array  # (O, I)
    b: Array  # (O,) or None


def linear(x: Array, w: Array, b: Array = None, /) -> tuple[Array, LinearCache]:
    """y = x wᵀ + b        x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)

    Raises TypeError for mixed or unknown dtypes, ValueError for shapes that do not fit.
    """
    check_linear(x, w, b)
    dtype = x.dtype
    x, w, b = widen(x), widen(w), widen(b)
    y = x @ namespace(x).matrix_transpose(w)
    y = y if b is None else y + b
    return narrow(y, dtype), LinearCache(x, w, b)


def linear_vjp(cache: LinearCache, dy: Array, /) -> tuple[Array, Array, Array]:
    """dx = dy w     dw = Σ dy xᵀ     db = Σ dy        sums over the batch axes"""
    _check.cache(cache, LinearCache, "linear")
    x, w, b = cache
    _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    xp, g = namespace(x), widen(dy)
    n = prod(x.shape[:-1])
    rows_g, rows_x = xp.reshape(g, (n, w.shape[0])), xp.reshape(x, (n, w.shape[1]))
    dx = g @ w
    dw = sum((xp.matrix_transpose(rows_g[i, :]) @ rows_x[i, :] for i in row_blocks(n)), start=xp.zeros_like(w))
    db = None if b is None else sum((xp.sum(rows_g[i, :], axis=0) for i in row_blocks(n)), start=xp.zeros_like(b))
    return narrow(dx, dy.dtype), narrow(dw, dy.dtype), narrow(db, dy.dtype)


# ── softmax ──────────────────────────────────────────────────────────────────────────────────────────────────────


class SoftmaxCache(NamedTuple):
    p: Array  # (..., S)


def softmax(x: Array, /, *, where: Array = None) -> tuple[Array, SoftmaxCache]:
    """p = exp(x) / Σ exp(x)    over the last axis, where `where` is True      x (..., S)   →   p (..., S)

    p is 0 where `where` is False, whatever x is there, NaN included; a row with nothing allowed is 0 altogether.
    Shifted by the row's maximum and divided by the sum: the most accurate of the variants that Blanchard, Higham and
    Higham (IMA J. Numer. Anal. 41, 2021, Theorem 4.3) analyse. Raises TypeError unless `where` is boolean.
    """
    _check.one_dtype([("x", x)])
    _check.boolean("where", where, "True = allowed")
    axes = _check.Axes()
    axes("x", x, "... S")
    axes.broadcast("where", _check.shape_of(where), "... S")

    p, *_ = _softmax(widen(x), where)
    return narrow(p, x.dtype), SoftmaxCache(p)


def softmax_vjp(cache: SoftmaxCache, dp: Array, /) -> tuple[Array]:
    """dx = p (dp − Σ p dp)        needs p alone, never x"""
    _check.cache(cache, SoftmaxCache, "softmax")
    (p,) = cache
    _check.cotangent("dp", dp, p.shape, p, "... S")
    dx, _ = _softmax_vjp(p, widen(dp))
    return (narrow(dx, dp.dtype),)


def _softmax(x: Array, where: Array, sink: Array = None) -> tuple[Array, Array, Array]:
    """p = exp(x − lse) (..., S), lse = log (Σ exp(x) + exp(sink)) (...), and exp(sink − lse) (...), 0 without a sink

    Without a sink, a row with nothing allowed has p = 0 and lse = −∞.
    """
    xp = namespace(x)
    x = x if where is None else xp.where(where, x, -INF)
    largest = xp.max if x.shape[-1] else xp.sum  # no keys: any shift will do, and Σ of none is 0
    top = largest(x, axis=-1, keepdims=True)
    top = top if sink is None else xp.where(sink > top, sink, top)
    top = xp.where(top == -INF, 0.0, top)
    e = xp.exp(x - top)
    e_sink = xp.zeros_like(top) if sink is None else xp.exp(sink - top)
    total = xp.sum(e, axis=-1, keepdims=True) + e_sink
    empty = total == 0
    total = xp.where(empty, 1.0, total)
    lse = xp.where(empty, -INF, top + xp.log(total))
    return e / total, lse[..., 0], (e_sink / total)[..., 0]


def _softmax_vjp(p: Array, dp: Array, dlse: Array = None, p_sink: Array = None) -> tuple[Array, Array]:
    """dx = p (dp − δ + dlse)     dsink = p_sink (dlse − δ)     δ = Σ p dp

    dp is first centred at the largest weight, m = dp there: with h = dp − m and Σ p = 1 − p_sink, δ = Σ p h + m (1 −
    p_sink). That saves the digits of a saturated row, where dp − Σ p dp would cancel. Where p is 0 the gradient is 0,
    whatever dp is there.
    """
    xp = namespace(p)
    if p.shape[-1] == 0:
        return p * dp, None if p_sink is None else p_sink * (xp.zeros_like(p_sink) if dlse is None else dlse)
    largest = xp.argmax(p, axis=-1, keepdims=True)
    m = xp.where(xp.take_along_axis(p, largest, axis=-1) == 0, 0.0, xp.take_along_axis(dp, largest, axis=-1))
    h = xp.where(p == 0, 0.0, dp - m)
    r = -xp.sum(p * h, axis=-1, keepdims=True)  # dlse − δ + m
    r = r if p_sink is None else r + m * p_sink[..., None]
    r = r if dlse is None else r + dlse[..., None]
    return xp.where(p == 0, 0.0, p * (h + r)), None if p_sink is None else p_sink * (r - m)[..., 0]


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at the queries that may see no key
    k: Array  # (..., K, S, D), 0 at the keys that nobody may see
    v: Array  # (..., K, S, E), 0 at the keys that nobody may see
    bias: Array | RelativeBias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    slope: Array  # (..., H, T, S), dc/du of the soft cap, or None
    p: Array  # (..., H, T, S), the weights before dropout
    lse: Array  # (..., H, T)
    keep: Array  # broadcasts to (..., H, T, S), or None
    scale: Array | float  # of every head, or (H, 1, 1)
    softcap: Array | float | None  # of every head, or (H, 1, 1)
    rate: float


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | RelativeBias = None,
    sink: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    dropout: Masked | Seeded | None = None,
) -> tuple[Array, AttentionCache]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     or all three without head axis

    bias    added to the scores, differentiable, broadcasts to (..., H, T, S); −∞ means "do not attend", but only a mask
            keeps out a NaN of the key. Or a `RelativeBias` of `funcmha.biases`, in linear memory: ALiBi, T5, tables
    sink    a logit for each head, (H,), that joins the softmax's denominator and lse, and nothing else: the weights of
            a row sum to 1 − exp(sink − lse) (Xiao et al. 2023; gpt-oss)
    mask    boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S). A query that may see no key
            gets o = 0, weights 0, lse = −∞ (or the sink) and gradients 0, and has no effect, even if it or its
            cotangent is NaN. A key that no query may see has no effect, even if NaN. Read as (..., H, T, S) from the
            right: a mask per sample is (B, 1, T, S), for (B, T, S) would be per head
    scale   D ** -0.5 unless given; 0 is zero. A number, or one for each head
    softcap soft cap of the scores before the bias (Gemma 2, section 2): a positive number, or one for each head
    dropout `dropout.masked(keep, rate)` of `funcmha`: inverted dropout of the weights by a boolean mask, True = keep,
            that broadcasts to (..., H, T, S); or `dropout.seeded(seed, rate)`, which draws it

    H is a multiple of K, and query head h reads key/value head h // (H // K): grouped-query attention (Ainslie et al.
    2023), multi-query where K = 1. Time and memory O(H T S). Raises TypeError for a mask that is not boolean and for
    mixed dtypes, ValueError for shapes that do not fit and options that contradict, before any arithmetic.
    Vaswani et al. 2017, eq. 1.
    """
    mask, scale, softcap = check_attention(q, k, v, bias, sink, mask, scale, softcap, dropout)
    mask = dense(mask, q.shape[-2], k.shape[-2], q)

    dtype = q.dtype
    q, k, v = blank_queries(widen(q), mask), blank_keys(widen(k), mask), blank_keys(widen(v), mask)
    bias, sink = on_bias(widen, bias), widen(sink)
    scale, softcap = _per_head(scale, q), _per_head(softcap, q)
    z, slope = _scores(q, k, bias, scale, softcap)
    p, lse, _ = _softmax(z, mask, None if sink is None else sink[..., None, None])
    keep, rate = (None, 0.0) if dropout is None else (dropout.dense(p.shape, q), dropout.rate)
    o = _dropout(p, keep, rate) @ _per_query_head(v, q)
    return narrow(o, dtype), AttentionCache(q, k, v, bias, sink, slope, p, lse, keep, scale, softcap, rate)


def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array | RelativeBias, Array]:
    """dq, dk, dv, dbias, dsink: `attention` from the bottom up
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    _check.cache(cache, AttentionCache, "attention")
    q, k, v, bias, sink, slope, p, lse, keep, scale, _, rate = cache
    _check.cotangent("do", do, (*q.shape[:-1], v.shape[-1]), q, "... H T E")
    _check.cotangent("dweights", dweights, p.shape, p, "... H T S", optional=True)
    _check.cotangent("dlse", dlse, lse.shape, lse, "... H T", optional=True)
    xp, g = namespace(q), blank_queries(widen(do), seeing_queries(cache))

    # o = a v   with   a = dropout(p)
    dv = _per_key_head(xp.matrix_transpose(_dropout(p, keep, rate)) @ g, v)
    dp = _dropout(g @ xp.matrix_transpose(_per_query_head(v, q)), keep, rate)
    dp = dp if dweights is None else dp + widen(dweights)
    # p, lse = softmax(z, sink)
    p_sink = None if sink is None else xp.exp(sink[..., None] - lse)
    dz, drows = _softmax_vjp(p, dp, widen(dlse), p_sink)
    dsink = None if sink is None else unbroadcast(xp.sum(drows, axis=-1), sink.shape)
    # z = softcap · tanh(scale · q kᵀ / softcap) + bias
    dq, dk, dbias = _scores_vjp(q, k, bias, scale, slope, dz)
    dq, dk, dv, dsink = (narrow(dx, do.dtype) for dx in (dq, dk, dv, dsink))
    return dq, dk, dv, on_bias(lambda dx: narrow(dx, do.dtype), dbias), dsink


def seeing_queries(cache: AttentionCache) -> Array:
    """Booleans (..., H, T, S or 1), over whose columns `any` says which queries see a key"""
    return cache.lse[..., None] != -INF if cache.sink is None else cache.p != 0


def _scores(q: Array, k: Array, bias: Array | RelativeBias, scale: Any, softcap: Any) -> tuple[Array, Array]:
    """z = c + bias   with   c = softcap · tanh(u / softcap)   and   u = scale · q kᵀ     and dc/du for the gradient"""
    u = (scale * q) @ namespace(q).matrix_transpose(_per_query_head(k, q))
    c, slope = _soft_cap(u, softcap)
    return c if bias is None else c + dense_bias(bias, *u.shape[-2:]), slope


def _scores_vjp(
    q: Array, k: Array, bias: Array | RelativeBias, scale: Any, slope: Array, dz: Array
) -> tuple[Array, Array, Array | RelativeBias]:
    """dq, dk, dbias"""
    dbias = None if bias is None else dense_bias_vjp(bias, dz)
    du = dz if slope is None else dz * slope
    dk = _per_key_head(namespace(q).matrix_transpose(du) @ (scale * q), k)
    dq = scale * (du @ _per_query_head(k, q))
    return dq, dk, dbias


def _soft_cap(u: Array, softcap: Array | float | None) -> tuple[Array, Array]:
    """c = softcap · tanh(u / softcap)   and   dc/du = 1 − tanh(u / softcap)² for the gradient, None without softcap"""
    if softcap is None:
        return u, None
    t = namespace(u).tanh(u / softcap)
    return softcap * t, 1 - t * t


def _per_head(x: Any, q: Array) -> Any:
    """A number as it is, and one for each head as (H, 1, 1), in the library and dtype of q."""
    return x if x is None or isinstance(x, float) else namespace(q).astype(from_host(x, q), q.dtype)[:, None, None]


@singledispatch
def attention_weights(cache: Any, /) -> Array:
    """p = softmax(z, sink)    (..., H, T, S), z the scores of `attention`, before dropout, from any attention's cache

    In the dtype computed with: float32 for float16 and bfloat16.
    """
    return attention_weights(_attention_in(cache))


@singledispatch
def log_sum_exp(cache: Any, /) -> Array:
    """lse = log (Σ exp(z) + exp(sink))    (..., H, T), natural, z the scores of `attention`, from any attention's cache

    −∞, or the sink, for a query that may see no key. In the dtype computed with: float32 for float16 and bfloat16.
    """
    return log_sum_exp(_attention_in(cache))


def _attention_in(cache: Any) -> Any:
    """What a cache that is not an attention's own has of one, in its field `attention`."""
    if isinstance(cache, tuple) and hasattr(cache, "attention"):
        return cache.attention
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@singledispatch
def cut_heads(cache: Any, h: slice, kv: slice, /) -> Any:
    """The cache of query heads `h` and of the key/value heads `kv` that they read, as views."""
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@singledispatch
def cut_sample(cache: Any, b: tuple[int, ...], /) -> Any:
    """The cache of one element of the batch, as views."""
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@cut_sample.register
def _(cache: AttentionCache, b: tuple[int, ...], /) -> AttentionCache:
    return cache._replace(
        q=None if cache.q is None else cache.q[b],
        k=None if cache.k is None else cache.k[b],
        v=None if cache.v is None else cache.v[b],
        bias=bias_of_sample(cache.bias, b),
        slope=None if cache.slope is None else cache.slope[b],
        p=cache.p[b],
        lse=cache.lse[b],
        keep=of_sample(cache.keep, b),
    )


@cut_heads.register
def _(cache: AttentionCache, h: slice, kv: slice, /) -> AttentionCache:
    q, k, v, bias, sink, slope, p, lse, keep, scale, softcap, rate = cache
    return AttentionCache(
        None if q is None else q[..., h, :, :],
        None if k is None else k[..., kv, :, :],
        None if v is None else v[..., kv, :, :],
        bias_of_heads(bias, h),
        None if sink is None else sink[h],
        of_heads(slope, h),
        p[..., h, :, :],
        lse[..., h, :],
        of_heads(keep, h),
        scale if isinstance(scale, float) else scale[h, ...],
        softcap if softcap is None or isinstance(softcap, float) else softcap[h, ...],
        rate,
    )


@attention_weights.register
def _(cache: AttentionCache, /) -> Array:
    return cache.p


@log_sum_exp.register
def _(cache: AttentionCache, /) -> Array:
    return cache.lse


def _dropout(p: Array, keep: Array, rate: float) -> Array:
    """a = p ⊙ keep / (1 − rate)    linear in p and its own adjoint, so the gradient is the same function"""
    return p if keep is None else namespace(p).where(keep, p, 0.0) / (1 - rate)


def _per_query_head(x: Array, q: Array) -> Array:
    """x (..., K, S, ·)  →  (..., H, S, ·): head h reads h // (H // K)"""
    if x.ndim < 3 or x.shape[-3] == q.shape[-3]:
        return x
    return namespace(x).repeat(x, q.shape[-3] // x.shape[-3], axis=-3)


def _per_key_head(g: Array, x: Array) -> Array:
    """g (..., H, S, ·)  →  (..., K, S, ·) as x: the adjoint of `_per_query_head` sums over each group"""
    if x.ndim < 3 or x.shape[-3] == g.shape[-3]:
        return g
    *batch, heads, n, width = g.shape
    groups = x.shape[-3]
    xp = namespace(g)
    return xp.sum(xp.reshape(g, (*batch, groups, heads // groups, n, width)), axis=-3)
