"""Attention by blocks: `funcmha.ops.attention` and its vjp in linear memory.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
block; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias, Options, check_cotangents_of_attention
from funcmha._arrays import (
    Array,
    Sum,
    downcast,
    dtype_name,
    full,
    into,
    namespace,
    quiet_underflow,
    row_maxima,
    sum_over_batch,
    upcast,
)
from funcmha.engines.plan import Plan
from funcmha.engines.tiled.threads import with_single_threaded_blas
from funcmha.masks import Range
from funcmha.masks.zero import zero_masked_queries, zero_unattended
from funcmha.ops import round_bias

from .cache import AttentionCache, begun
from .cut import INF, Block, Rows, Whole, centred, exp_less, place, sum_over_rows, times_keys, times_rows

# ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────


@with_single_threaded_blas
@quiet_underflow
def attend(
    q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options, plan: Plan, half: str | None
) -> tuple[Array, AttentionCache]:
    """`attention`, of arguments that are checked and upcast; o is that of the cache, not to be written to"""
    q, k, v = zero_unattended(q, k, v, x.mask)
    rest = begun(q, k, bias, sink, x, plan, half)
    whole, rows = Whole.of(rest.with_qkv(q, k, v), half), tuple(q.shape[:-1])
    o, row_sum, row_max = sums = Sum((*rows, v.shape[-1]), q), Sum((*rows, 1), q), Sum((*rows, 1), q)
    for some in whole.all_rows():
        for total, part in zip(sums, _forward(whole, some), strict=True):
            total.add(place(some, part), part)
    rest = rest._replace(o=o.total(), row_sum=row_sum.total()[..., 0], row_max=row_max.total()[..., 0])
    return rest.o, rest.with_qkv(q, k, v)


def _forward(whole: Whole, rows: Range) -> tuple[Array, Array, Array]:
    """o (..., H, R, E), row_sum and row_max (..., H, R, 1) of some rows"""
    q, xp, sink = whole.queries(rows), namespace(whole.q), whole.rest.sink
    top, row_sum, o = (full((*q.shape[:-1], n), x, q) for n, x in ((1, -INF), (1, 0.0), (whole.v.shape[-1], 0.0)))
    for block in whole.blocks(rows):
        top, row_sum, o = _next(whole, q, block, top, row_sum, o)
    if sink is None:
        return o / xp.where(row_sum == 0, 1.0, row_sum), row_sum, xp.where(top == -INF, 0.0, top)
    top, shift, fade = _raised(top, sink[..., None, None])
    row_sum = row_sum * fade
    total = row_sum + xp.exp(sink[..., None, None] - shift)
    return o * fade / xp.where(total == 0, 1.0, total), row_sum, shift


def _next(whole: Whole, q: Array, block: Block, top: Array, row_sum: Array, o: Array) -> tuple[Array, Array, Array]:
    """The largest score, Σ e and Σ dropout(e) v with one block more"""
    xp, (z, _) = namespace(q), whole.scores(q, block)
    top, shift, fade = _raised(top, row_maxima(z))
    e = exp_less(z, shift)
    row_sum = row_sum * fade + xp.sum(e, axis=-1, keepdims=True)
    return (
        top,
        row_sum,
        into(o, xp.add, into(o, xp.multiply, o, fade), times_rows(whole.drop(e, block), block.v, whole.half)),
    )


def _raised(top: Array, other: Array) -> tuple[Array, Array, Array]:
    """The larger of two maxima; what is subtracted from scores then; and the factor of what was summed before"""
    xp = namespace(top)
    new = xp.maximum(top, other)
    shift = xp.where(new == -INF, 0.0, new)
    return new, shift, xp.exp(top - shift)


# ── the vjp ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Gradients(NamedTuple):
    """Sums over blocks."""

    q: Sum  # (..., H, T, D)
    k: Sum  # (..., K, S, D)
    v: Sum  # (..., K, S, E)
    bias: Sum | None
    sink: Sum | None  # (..., H, T)

    @staticmethod
    def of(cache: AttentionCache) -> "Gradients":
        """Those of the inputs of a cache, 0 at first"""
        (q, k, v, rest), lead = cache, cache.q
        bias = None if rest.bias is None else Sum(tuple(rest.bias.values.shape), lead)
        sink = None if rest.sink is None else Sum(tuple(q.shape[:-1]), lead)
        dq, dk, dv = (Sum(tuple(a.shape), lead) for a in (q, k, v))
        return Gradients(dq, dk, dv, bias, sink)

    def results(self, rest: Any, dtype: Any, batch_axes: int) -> tuple[Any, ...]:
        """dq, dk, dv, dbias, dsink, rounded"""
        dq, dk, dv, dbias, rows = (None if a is None else a.total() for a in self)
        dbias = None if dbias is None else round_bias(rest.bias._replace(values=dbias), dtype)
        dsink = None
        if rows is not None:
            dsink = sum_over_batch(namespace(rows).sum(rows, axis=-1), rest.sink.ndim, batch_axes)
        return downcast(dq, dtype), downcast(dk, dtype), downcast(dv, dtype), dbias, downcast(dsink, dtype)


@with_single_threaded_blas
@quiet_underflow
def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, batch_axes: int = 0
) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink: every block once more, from the last rows to the first
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    check_cotangents_of_attention(do, dweights, dlse, *cache[:3], batch_axes)
    rest, grads, half = cache.rest, Gradients.of(cache), cache.rest.known.half
    whole = Whole.of(cache, half if dtype_name(do) == half else None)
    g = zero_masked_queries(upcast(do), (rest.row_sum != 0)[..., None])
    for rows in reversed(whole.all_rows()):
        x = whole.found(rows)
        _rows_vjp(whole, x, Cotangents.of(whole, x, g, upcast(dweights), upcast(dlse)), grads)
    return grads.results(rest, do.dtype, batch_axes)


def _rows_vjp(whole: Whole, x: Rows, y: "Cotangents", grads: Gradients) -> None:
    """`_forward` from the bottom up"""
    dq, (m, r, dsink) = None, row_gradient(whole, x, y)
    for block in whole.blocks(x.rows):
        part = _block_vjp(whole, x, y, block, (m, r), grads)
        dq = part if dq is None else into(dq, namespace(dq).add, dq, part)
    if dq is not None:
        grads.q.add(place(x.rows, whole.q), dq if whole.half is not None else whole.rest.scale * dq)
    if grads.sink is not None:
        grads.sink.add((x.rows,), dsink[..., 0])


def _block_vjp(whole: Whole, x: Rows, y: "Cotangents", block: Block, centre: Any, grads: Gradients) -> Array:
    """The share of one block in dq / scale; a function of its own, whose arrays are gone before the next block's"""
    xp, (q, k, v, rest, *_) = namespace(x.q), whole
    # o = dropout(e) v / row_sum
    e, t = whole.exponentials(x, block)
    grads.v.add(place(block.cols, v), sum_over_rows(whole.drop(e, block), y.do, v, whole.half))
    dp = y.of_weights(whole, e, block)
    # e = exp(z − row_max)
    dz = into(dp, xp.multiply, shifted(dp, *centre), e)
    # z = softcap · t + bias   with   t = tanh(scale · q kᵀ / softcap)
    if grads.bias is not None:
        grads.bias.add(rest.bias.place(x.rows, block.cols, q.shape[-2]), block.bias.dense_vjp(dz).values)
    du = whole.scaled(dz if t is None else (1 - t * t) * dz)
    grads.k.add(place(block.cols, k), sum_over_rows(du, x.q, k, whole.half))
    return times_rows(du, block.k, whole.half)


class Cotangents(NamedTuple):
    """Those of some rows, divided by the row sums: so exponentials need not be."""

    do: Array  # (..., H, R, E)
    products: tuple[tuple[Array, Array], ...]  # Σ do vᵀ is dp: do (..., H, R, E), v (..., K, S, E)
    dweights: Array  # (..., H, R, S), or None
    dlse: Array  # (..., H, R, 1), not divided; 0 for none
    delta: Array  # (..., H, R, 1), Σ do o, not divided; None where that is not Σ p dp

    @staticmethod
    def of(whole: Whole, x: Rows, do: Array, dweights: Array, dlse: Array) -> "Cotangents":
        """Those of all rows, cut"""
        i, delta = slice(*x.rows), None
        do = do[..., i, :]
        if isinstance(do, np.ndarray) and dweights is None:
            delta = np.sum(do * whole.rest.o[..., i, :], axis=-1, keepdims=True)
        do = do / x.total
        dweights = None if dweights is None else dweights[..., i, :] / x.total
        return Cotangents(do, ((do, whole.v),), dweights, 0.0 if dlse is None else dlse[..., i, None], delta)

    def of_weights(self, whole: Whole, e: Array, block: Block) -> Array:
        """dp (..., H, R, N)"""
        j, xp = slice(*block.cols), namespace(e)
        first, *others = (times_keys(do, v[..., j, :], whole.half) for do, v in self.products)
        dp = whole.drop(sum(others, first), block)
        if self.dweights is None:
            return dp
        return into(dp, xp.add, dp, xp.where(e == 0, 0.0, self.dweights[..., j]))  # whatever it is there


def row_gradient(whole: Whole, x: Rows, y: Cotangents) -> tuple[Array, Array, Array]:
    """m, the dp of the largest weight, or None for 0; r = m + dlse − δ; and dsink = p_sink (dlse − δ), or None

    All (..., H, R, 1), m and r divided by the row sums: dz = e ((dp − m) + r).
    """
    xp = namespace(x.q)
    m, mean = _mean_cotangent(whole, x, y)
    r, dsink = y.dlse - mean, None
    if x.sink is not None:
        # Σ of the keys is not the total less the sink, which may be nearly all
        dsink = x.sink / x.total * (r if m is None else r - m * x.keys)
        r = r if m is None else r + m * x.sink
    return m, xp.where(x.attending, r / x.total, 0.0), dsink


def _mean_cotangent(whole: Whole, x: Rows, y: Cotangents) -> tuple[Array, Array]:
    """m as above, and Σ p dp less its share, Σ p (dp − m)     (..., H, R, 1) each"""
    spread = None if y.delta is None else x.total >= 2  # no weight is over 1/2, and so nothing cancels without m
    if spread is not None and spread.all():
        return None, y.delta
    pairs = ((e, y.of_weights(whole, e, block)) for block, e in _exponentials(whole, x))
    m, mean = centred(pairs, namespace(x.q).zeros_like(x.top))
    return (m, mean) if spread is None else (np.where(spread, 0.0, m), np.where(spread, y.delta, mean))


def shifted(dp: Array, m: Array, r: Array) -> Array:
    """(dp − m) + r, in the memory of dp: 0 + r at the largest weight, which has no digits of dp to lose"""
    xp = namespace(dp)
    dp = dp if m is None else into(dp, xp.subtract, dp, m)
    return into(dp, xp.add, dp, r)


def _exponentials(whole: Whole, x: Rows) -> Any:
    return ((block, whole.exponentials(x, block)[0]) for block in whole.blocks(x.rows))


# ── what the cache can tell ──────────────────────────────────────────────────────────────────────────────────────


def log_sum_exp(cache: AttentionCache, /) -> Array:
    """lse (..., H, T)"""
    row_max, row_sum, sink, xp = cache.rest.row_max, cache.rest.row_sum, cache.rest.sink, namespace(cache.q)
    total = row_sum if sink is None else row_sum + xp.exp(sink[..., None] - row_max)
    return xp.where(total == 0, -INF, row_max + xp.log(xp.where(total == 0, 1.0, total)))


@with_single_threaded_blas
@quiet_underflow
def attention_weights(cache: AttentionCache, /) -> Array:
    """p (..., H, T, S), the weights before dropout"""
    whole = Whole.of(cache)
    p = Sum((*cache.q.shape[:-1], cache.k.shape[-2]), cache.q)
    for rows in whole.all_rows():
        x = whole.found(rows)
        for block, e in _exponentials(whole, x):
            p.add((rows, block.cols), e / x.total)
    return p.total()
