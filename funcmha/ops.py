"""The specification of attention: `linear`, `softmax`, `scores`, `attention`, each followed by its gradient.

    y, cache = f(*inputs, **static)      positional inputs are differentiable, keyword ones are not
    grads    = f_vjp(cache, dy)          one gradient per input, in order, of its shape; None where the input was None

Dtypes: float64, float32, and float16 and bfloat16, which are computed with in float32 and rounded once, at the end.
(complex128 is taken too, as the holomorphic extension, for complex-step checks.) A gradient has the dtype of `dy`.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out;
`...` is batch.
"""

from functools import singledispatch
from math import prod
from typing import Any, NamedTuple, Unpack

from . import _check
from ._arguments import (
    AttentionOptions,
    Bias,
    Options,
    ScoresOptions,
    check_attention,
    check_cotangents_of_attention,
    check_linear,
    takes,
)
from ._arrays import (
    Array,
    downcast,
    from_host,
    full,
    in_library_of,
    namespace,
    own,
    quiet_underflow,
    row_blocks,
    sum_over_batch,
    upcast,
)
from .masks import dense
from .masks.zero import zero_masked_queries, zero_unattended_keys

__all__ = ["attention", "attention_vjp", "linear", "linear_vjp", "scores", "scores_vjp", "softmax", "softmax_vjp"]

INF = float("inf")


# ── linear ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LinearCache(NamedTuple):
    x: Array  # (..., I)
    w: Array  # (O, I)
    b: Array  # (O,) or None


@quiet_underflow
def linear(x: Array, w: Array, b: Array = None, /) -> tuple[Array, LinearCache]:
    """y = x wᵀ + b        x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)

    Raises TypeError for mixed or unknown dtypes, ValueError for shapes that do not fit.
    """
    check_linear(x, w, b)
    dtype = x.dtype
    x, w, b = upcast(x), upcast(w), upcast(b)
    y = x @ namespace(x).matrix_transpose(w)
    y = y if b is None else y + b
    return downcast(y, dtype), LinearCache(x, w, b)


@quiet_underflow
def linear_vjp(cache: LinearCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array, Array, Array]:
    """dx = dy w     dw = Σ dy xᵀ     db = Σ dy        sums over all axes but the first `batch_axes`

    So dw is (O, I), or with batch_axes=n it is (b₁, …, bₙ, O, I), a gradient for each element of the batch.
    """
    _check.cache(cache, LinearCache, "linear")
    x, w, b = cache
    _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    _check.batch_axes(batch_axes, x.ndim - 1)
    xp, g, batch = namespace(x), upcast(dy), tuple(x.shape[:batch_axes])
    n = prod(x.shape[batch_axes:-1])
    rows_g, rows_x = xp.reshape(g, (*batch, n, w.shape[0])), xp.reshape(x, (*batch, n, w.shape[1]))
    dx, dw, db = g @ w, full((*batch, *w.shape), 0.0, w), None if b is None else full((*batch, *b.shape), 0.0, b)
    for i in row_blocks(n):
        dw = dw + xp.matrix_transpose(rows_g[..., i, :]) @ rows_x[..., i, :]
        db = None if b is None else db + xp.sum(rows_g[..., i, :], axis=-2)
    return downcast(dx, dy.dtype), downcast(dw, dy.dtype), downcast(db, dy.dtype)


# ── softmax ──────────────────────────────────────────────────────────────────────────────────────────────────────


class SoftmaxCache(NamedTuple):
    p: Array  # (..., S)


@quiet_underflow
def softmax(x: Array, /, *, where: Array = None) -> tuple[Array, SoftmaxCache]:
    """p = exp(x) / Σ exp(x)    over the last axis, where `where` is True      x (..., S)   →   p (..., S)

    p is 0 where `where` is False, whatever x is there, NaN included; a row with nothing allowed is 0 altogether.
    Shifted by the row's maximum and divided by the sum: the most accurate of the variants that Blanchard, Higham and
    Higham (IMA J. Numer. Anal. 41, 2021, Theorem 4.3) analyse. Raises TypeError unless `where` is boolean.
    """
    axes = _check.arrays(("x", x, "... S"))
    _check.boolean("where", where, "True = allowed")
    axes.broadcast("where", _check.shape_of(where), "... S")
    if where is not None:
        axes.static("where", where)

    p, _ = softmax_with_sink(upcast(x), in_library_of(where, x))
    return own(downcast(p, x.dtype), p), SoftmaxCache(p)


@quiet_underflow
def softmax_vjp(cache: SoftmaxCache, dp: Array, /) -> tuple[Array]:
    """dx = p (dp − Σ p dp)        needs p alone, never x"""
    _check.cache(cache, SoftmaxCache, "softmax")
    (p,) = cache
    _check.cotangent("dp", dp, p.shape, p, "... S")
    dx, _ = softmax_with_sink_vjp(p, upcast(dp))
    return (downcast(dx, dp.dtype),)


def softmax_with_sink(x: Array, where: Array, sink: Array = None) -> tuple[Array, Array]:
    """p = exp(x − lse) (..., S)   with   lse = log (Σ exp(x) + exp(sink)) (...)

    Without a sink, a row with nothing allowed has p = 0 and lse = −∞.
    """
    xp = namespace(x)
    x = x if where is None else xp.where(where, x, -INF)
    largest = xp.max if x.shape[-1] else xp.sum  # no keys: any shift will do, and Σ of none is 0
    top = largest(x, axis=-1, keepdims=True)
    top = top if sink is None else xp.where(sink > top, sink, top)
    top = xp.where(top == -INF, 0.0, top)
    e = xp.exp(x - top)
    total = xp.sum(e, axis=-1, keepdims=True)
    total = total if sink is None else total + xp.exp(sink - top)
    empty = total == 0
    total = xp.where(empty, 1.0, total)
    lse = xp.where(empty, -INF, top + xp.log(total))
    return e / total, lse[..., 0]


def softmax_with_sink_vjp(p: Array, dp: Array, dlse: Array = None, p_sink: Array = None) -> tuple[Array, Array]:
    """dx = p (dp − δ + dlse)     dsink = p_sink (dlse − δ)     δ = Σ p dp

    dp is first centred at the largest weight, m = dp there: with h = dp − m and Σ p = 1 − p_sink, δ = Σ p h + m (1 −
    p_sink). That saves the digits of a saturated row, where dp − Σ p dp would cancel. The sink has Σ p dp as it stands,
    for where the sink has nearly all of the weight 1 − p_sink cancels. Where p is 0 the gradient is 0, whatever dp is
    there.
    """
    xp = namespace(p)
    if p.shape[-1] == 0:
        return p * dp, None if p_sink is None else p_sink * (xp.zeros_like(p_sink) if dlse is None else dlse)
    at_largest = xp.take_along_axis(dp, xp.argmax(p, axis=-1, keepdims=True), axis=-1)
    m = xp.where(xp.max(p, axis=-1, keepdims=True) == 0, 0.0, at_largest)
    h = xp.where(p == 0, 0.0, dp - m)
    r = -xp.sum(p * h, axis=-1, keepdims=True)  # dlse − δ + m
    r = r if p_sink is None else r + m * p_sink[..., None]
    r = r if dlse is None else r + dlse[..., None]
    dx = xp.where(p == 0, 0.0, p * (h + r))
    if p_sink is None:
        return dx, None
    delta = xp.sum(p * xp.where(p == 0, 0.0, dp), axis=-1)
    return dx, p_sink * ((0.0 if dlse is None else dlse) - delta)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────


class ScoresCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at fully masked queries
    k: Array  # (..., K, S, D), 0 at unattended keys
    bias: Bias  # broadcasts to (..., H, T, S), or None
    slope: Array  # (..., H, T, S), dc/du of the soft cap, or None
    allowed: Array  # booleans (..., H, T, S), where z is not −∞
    scale: Array | float  # of every head, or (H, 1, 1)


@takes(ScoresOptions)
def scores(q: Array, k: Array, bias: Any = None, /, **options: Unpack[ScoresOptions]) -> tuple[Array, ScoresCache]:
    """z = softcap · tanh(scale · q kᵀ / softcap) + bias, and −∞ where not mask
    q (..., H, T, D)   k (..., K, S, D)   →   z (..., H, T, S)     or both without head axis

    What `attention` with the same arguments takes the softmax of: its weights are exp(z − lse). A key that no query
    attends has z = −∞ and no effect, even if it is NaN, and so has a query that attends no key. Time and memory
    O(H T S).
    """
    bias, x = check_attention(q, k, k, bias, None, options, ScoresOptions)  # no values
    mask = dense(x.mask, q.shape[-2], k.shape[-2], q)

    dtype, xp = q.dtype, namespace(q)
    q, k = zero_masked_queries(upcast(q), mask), zero_unattended_keys(upcast(k), mask)
    bias = None if bias is None else bias.map(upcast)
    scale = per_head(x.scale, q)
    z, slope = _scores(q, k, bias, scale, per_head(x.softcap, q))
    z = z if mask is None else xp.where(mask, z, -INF)
    return downcast(z, dtype), ScoresCache(q, k, bias, slope, z != -INF, scale)


def scores_vjp(cache: ScoresCache, dz: Array, /) -> tuple[Array, Array, Any]:
    """dq, dk, dbias: `scores` from the bottom up

    A score of −∞ stays what it is however little an input moves: its cotangent has no effect.
    """
    _check.cache(cache, ScoresCache, "scores")
    q, k, bias, slope, allowed, scale = cache
    _check.cotangent("dz", dz, allowed.shape, q, "... H T S")
    dtype, xp = dz.dtype, namespace(q)
    g = xp.where(allowed, upcast(dz), 0.0)
    dq, dk, dbias = _scores_vjp(q, k, bias, scale, slope, g)
    return downcast(dq, dtype), downcast(dk, dtype), round_bias(dbias, dtype)


def _scores(q: Array, k: Array, bias: Bias, scale: Any, softcap: Any) -> tuple[Array, Array]:
    """z = c + bias   with   c = softcap · tanh(u / softcap)   and   u = scale · q kᵀ     and dc/du for the gradient"""
    xp = namespace(q)
    z, slope = (scale * q) @ xp.matrix_transpose(per_query_head(k, q)), None
    if softcap is not None:
        c = xp.tanh(z / softcap)
        z, slope = softcap * c, 1 - c * c
    return z if bias is None else z + bias.dense(q.shape[-2], k.shape[-2]), slope


def _scores_vjp(q: Array, k: Array, bias: Bias, scale: Any, slope: Array, dz: Array) -> tuple[Array, Array, Bias]:
    """dq, dk, dbias"""
    xp = namespace(q)
    dbias = None if bias is None else bias.dense_vjp(dz)
    du = dz if slope is None else slope * dz
    dq = scale * (du @ per_query_head(k, q))
    dk = per_key_head(xp.matrix_transpose(du) @ (scale * q), k)
    return dq, dk, dbias


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at fully masked queries
    k: Array  # (..., K, S, D), 0 at unattended keys
    v: Array  # (..., K, S, E), 0 at unattended keys
    bias: Bias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    slope: Array  # (..., H, T, S), dc/du of the soft cap, or None
    p: Array  # (..., H, T, S), the weights before dropout
    lse: Array  # (..., H, T)
    keep: Array  # booleans that broadcast to (..., H, T, S), or None
    scale: Array | float  # of every head, or (H, 1, 1)
    softcap: Array | float | None  # of every head, or (H, 1, 1)
    rate: float


@takes(AttentionOptions)
def attention(
    q: Array, k: Array, v: Array, bias: Any = None, sink: Array = None, /, **options: Unpack[AttentionOptions]
) -> tuple[Array, AttentionCache]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     or all three without head axis

    bias      added to the scores, differentiable, broadcasts to (..., H, T, S); −∞ means "do not attend", but only a
              mask keeps out a NaN of the key. Or a `RelativeBias` of `funcmha.biases`: ALiBi, T5, tables
    sink      a logit for each head, (H,), that joins the softmax's denominator and lse, and nothing else: the weights
              of a row sum to 1 − exp(sink − lse) (Xiao et al. 2023; gpt-oss)
    mask      boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S). A fully masked query gets
              o = 0, weights 0, lse = −∞ (or the sink) and gradients 0, and has no effect, even if it or its cotangent
              is NaN. A key that no query attends has no effect, even if NaN. Read as (..., H, T, S) from the right: a
              mask per sample is (B, 1, T, S), for (B, T, S) would be per head
    scale     D ** -0.5 unless given; 0 is zero. A number, or one for each head
    softcap   soft cap of the scores before the bias (Gemma 2, section 2): a positive number, or one for each head
    dropout   inverted dropout of the weights: `dropout.masked(keep, rate)`, whose keep broadcasts to (..., H, T, S), or
              `dropout.seeded(seed, rate)`

    H is a multiple of K, and query head h reads key/value head h // (H // K): grouped-query attention (Ainslie et al.
    2023), multi-query where K = 1. Time and memory O(H T S). Raises TypeError for a mask that is not boolean and for
    mixed dtypes, ValueError for shapes that do not fit and options that contradict, before any arithmetic.
    Vaswani et al. 2017, eq. 1.
    """
    bias, x = check_attention(q, k, v, bias, sink, options)
    bias = None if bias is None else bias.map(upcast)
    o, cache = attend(upcast(q), upcast(k), upcast(v), bias, upcast(sink), x)
    return downcast(o, q.dtype), cache


@singledispatch
@quiet_underflow
def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, batch_axes: int = 0
) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink: `attention` from the bottom up
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)

    dsink is (H,), or with batch_axes=n it keeps the first n axes of the batch before it.
    """
    _check.cache(cache, AttentionCache, "attention")
    q, k, v, bias, sink, slope, p, _, keep, scale, _, rate = cache
    check_cotangents_of_attention(do, dweights, dlse, q, k, v, batch_axes)
    dtype, xp, g = do.dtype, namespace(q), zero_masked_queries(upcast(do), attended_pairs(cache))

    # o = a v   with   a = dropout(p)
    dv = per_key_head(xp.matrix_transpose(drop(p, keep, rate)) @ g, v)
    dp = drop(g @ xp.matrix_transpose(per_query_head(v, q)), keep, rate)
    dp = dp if dweights is None else dp + upcast(dweights)
    # p, lse = softmax(z, sink)
    p_sink = share_of_sink(cache)
    dz, drows = softmax_with_sink_vjp(p, dp, upcast(dlse), p_sink)
    dsink = None if sink is None else sum_over_batch(xp.sum(drows, axis=-1), sink.ndim, batch_axes)
    # z = softcap · tanh(scale · q kᵀ / softcap) + bias
    dq, dk, dbias = _scores_vjp(q, k, bias, scale, slope, dz)
    dq, dk, dv, dsink = (downcast(dx, dtype) for dx in (dq, dk, dv, dsink))
    return dq, dk, dv, round_bias(dbias, dtype), dsink


@quiet_underflow
def attend(q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options) -> tuple[Array, AttentionCache]:
    """`attention`, of arguments that are checked and upcast"""
    mask = dense(x.mask, q.shape[-2], k.shape[-2], q)
    q, k, v = zero_masked_queries(q, mask), zero_unattended_keys(k, mask), zero_unattended_keys(v, mask)
    scale, softcap, (keep, rate) = per_head(x.scale, q), per_head(x.softcap, q), _kept(x, q, k)
    z, slope = _scores(q, k, bias, scale, softcap)
    p, lse = softmax_with_sink(z, mask, None if sink is None else sink[..., None, None])
    o = drop(p, keep, rate) @ per_query_head(v, q)
    return o, AttentionCache(q, k, v, bias, sink, slope, p, lse, keep, scale, softcap, rate)


def share_of_sink(cache: AttentionCache) -> Array:
    """exp(sink − lse) (..., H, T), 0 in an empty row; None without a sink"""
    if cache.sink is None:
        return None
    xp, empty = namespace(cache.lse), cache.lse == -INF
    return xp.where(empty, 0.0, xp.exp(cache.sink[..., None] - xp.where(empty, 0.0, cache.lse)))


def attended_pairs(cache: AttentionCache) -> Array:
    """Booleans (..., H, T, S or 1), over whose columns `any` says which queries attend a key"""
    return cache.lse[..., None] != -INF if cache.sink is None else cache.p != 0


def round_bias(dbias: Bias, dtype: Any) -> Any:
    """The gradient of a bias as the bias was given, an array or a `RelativeBias`, rounded to `dtype`."""
    return None if dbias is None else dbias.map(lambda g: downcast(g, dtype)).given


def per_head(x: Any, q: Array) -> Any:
    """A number of every head, or (H,) of NumPy as (H, 1, 1) beside q, or None"""
    return x if x is None or isinstance(x, float) else namespace(q).astype(from_host(x, q), q.dtype)[:, None, None]


def _kept(x: Options, q: Array, k: Array) -> tuple[Array, float]:
    """The booleans and the rate of dropout"""
    if x.dropout is None:
        return None, 0.0
    return x.dropout.dense((*q.shape[:-1], k.shape[-2]), q), x.dropout.rate


def drop(p: Array, keep: Array, rate: float) -> Array:
    """a = p ⊙ keep / (1 − rate)    linear in p and its own adjoint, so the gradient is the same function"""
    return p if keep is None else namespace(p).where(keep, p, 0.0) / (1 - rate)


def per_query_head(x: Array, q: Array) -> Array:
    """x (..., K, S, ·)  →  (..., H, S, ·): head h reads h // (H // K)"""
    if x.ndim < 3 or x.shape[-3] == q.shape[-3]:
        return x
    return namespace(x).repeat(x, q.shape[-3] // x.shape[-3], axis=-3)


def per_key_head(g: Array, x: Array) -> Array:
    """g (..., H, S, ·)  →  (..., K, S, ·) as x: the adjoint of `per_query_head` sums over the heads that read one"""
    if x.ndim < 3 or x.shape[-3] == g.shape[-3]:
        return g
    *batch, heads, n, width = g.shape
    K = x.shape[-3]
    xp = namespace(g)
    return xp.sum(xp.reshape(g, (*batch, K, heads // K, n, width)), axis=-3)
