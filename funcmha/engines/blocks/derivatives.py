"""Forward mode and second order by blocks: `attention_jvp` and `attention_vjp_jvp` in linear memory.

A row needs its sums before its tangents: every block is made twice for the one, up to five times for the other.

    ṗ = p (ż − l̇se)     dz = p (dp + r)     ḋz = dz (ż − l̇se) + p (ḋp + r′)

with r = dlse − δ and r′ = ḋlse − Σ p ḋp − Σ dz (ż − l̇se) − dsink (ṡink − l̇se).

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
block; `...` is batch.
"""

from typing import Any, NamedTuple

from funcmha._arguments import Cotangents as Given
from funcmha._arguments import Tangents, check_cotangents, check_tangents
from funcmha._arrays import Array, Sum, downcast, full, namespace, quiet_underflow
from funcmha.engines.tiled.threads import with_single_threaded_blas
from funcmha.masks.zero import zero_masked_queries, zero_unattended_keys

from .attention import Cotangents, Gradients, row_gradient, shifted
from .cache import AttentionCache, attended
from .cut import Block, Rows, Whole, centred, place, sum_over_rows, times_keys, times_rows

# ── forward mode ─────────────────────────────────────────────────────────────────────────────────────────────────


@with_single_threaded_blas
@quiet_underflow
def attention_jvp(cache: AttentionCache, dots: tuple[Any, ...]) -> tuple[Array, Array]:
    """ȯ = Σ dropout(ṗ) v + Σ dropout(p) v̇     l̇se = Σ p ż + p_sink ṡink     as `funcmha.derivatives.attention_jvp`"""
    q, k, v, rest = cache
    tangents, dtype = check_tangents(q, k, v, rest.bias, rest.sink, dots)
    whole, dot = Whole.of(cache), zeroed(cache, tangents)
    o_dot, lse_dot = Sum(tuple(rest.o.shape), q), Sum(tuple(q.shape[:-1]), q)
    for rows in whole.all_rows():
        x = whole.found(rows)
        d = RowDots.of(whole, x, dot)
        lse_dot.add((rows,), d.lse[..., 0])
        for block in whole.blocks(rows):
            e, p_dot = d.weights(whole, x, block)
            o_dot.add(place(rows, rest.o), times_rows(whole.drop(p_dot, block), block.v))
            if dot.v is not None:
                v_dot = dot.v[..., slice(*block.cols), :]
                o_dot.add(place(rows, rest.o), times_rows(whole.drop(e / x.total, block), v_dot))
    return downcast(o_dot.total(), dtype), downcast(lse_dot.total(), dtype)


def zeroed(cache: AttentionCache, dot: Tangents) -> Tangents:
    """The tangents with 0 at fully masked queries and unattended keys, whatever is there: 0 · NaN would spread"""
    keys, queries = attended(cache)
    return dot._replace(
        q=zero_masked_queries(dot.q, queries),
        k=zero_unattended_keys(dot.k, keys),
        v=zero_unattended_keys(dot.v, keys),
    )


class RowDots(NamedTuple):
    """The tangents of some rows."""

    dot: Tangents  # of all
    q: Array  # (..., H, R, D), times the scale, or None
    m: Array  # (..., H, R, 1), the ż of the largest weight
    mean: Array  # (..., H, R, 1), l̇se less m
    lse: Array  # (..., H, R, 1)

    @staticmethod
    def of(whole: Whole, x: Rows, dot: Tangents) -> "RowDots":
        """l̇se = Σ p ż + p_sink ṡink = m + Σ p (ż − m) + p_sink (ṡink − m)"""
        zero, rest = namespace(x.top).zeros_like(x.top), whole.rest
        q = None if dot.q is None else rest.scale * dot.q[..., slice(*x.rows), :]
        unknown = RowDots(dot, q, zero, zero, zero)
        m, mean = centred((unknown.scores(whole, x, block)[:2] for block in whole.blocks(x.rows)), zero)
        mean = mean / x.total
        if x.sink is not None:
            sink_dot = 0.0 if dot.sink is None else dot.sink[..., None, None]
            mean = mean + x.sink / x.total * (sink_dot - m)
        return RowDots(dot, q, m, mean, m + mean)

    def scores(self, whole: Whole, x: Rows, block: Block) -> tuple[Array, Array, Array, Array]:
        """e     ż = slope · u̇ + ḃias (..., H, R, N), 0 where e is     t     u̇ = scale (q̇ kᵀ + q k̇ᵀ)"""
        (e, t), cols, xp = whole.exponentials(x, block), block.cols, namespace(x.q)
        u_dot = xp.zeros_like(e) if self.q is None else times_keys(self.q, block.k)
        if self.dot.k is not None:
            u_dot = u_dot + times_keys(x.q, self.dot.k[..., slice(*cols), :])
        z_dot = u_dot if t is None else (1 - t * t) * u_dot
        if self.dot.bias is not None:
            z_dot = z_dot + self.dot.bias.part(x.rows, cols, whole.q.shape[-2]).dense(*z_dot.shape[-2:])
        return e, xp.where(e == 0, 0.0, z_dot), t, u_dot

    def change(self, z_dot: Array) -> Array:
        """ż − l̇se, of which no digits cancel at the largest weight"""
        return (z_dot - self.m) - self.mean

    def weights(self, whole: Whole, x: Rows, block: Block) -> tuple[Array, Array]:
        """e     ṗ = p (ż − l̇se)"""
        e, z_dot, *_ = self.scores(whole, x, block)
        return e, e * self.change(z_dot) / x.total


# ── second order ─────────────────────────────────────────────────────────────────────────────────────────────────


@with_single_threaded_blas
@quiet_underflow
def attention_vjp_jvp(cache: AttentionCache, cotangents: Given, dots: tuple[Any, ...]) -> tuple[Any, ...]:
    """ḋq, ḋk, ḋv, ḋbias, ḋsink     as `funcmha.derivatives.attention_vjp_jvp`"""
    q, k, v, rest = cache
    y = check_cotangents(q, v, cotangents, dots)
    dot = zeroed(cache, check_tangents(q, k, v, rest.bias, rest.sink, dots)[0])
    do, do_dot = (zero_masked_queries(a, (rest.row_sum != 0)[..., None]) for a in (y.do, y.do_dot))
    do_dot = full(tuple(do.shape), 0.0, do) if do_dot is None else do_dot
    whole, grads = Whole.of(cache), Gradients.of(cache)
    for rows in reversed(whole.all_rows()):
        x = whole.found(rows)
        first = Cotangents.of(whole, x, do, None, y.dlse)
        second = Cotangents.of(whole, x, do_dot, None, y.dlse_dot)._replace(delta=None)
        if dot.v is not None:
            second = second._replace(products=(*second.products, (first.do, dot.v)))
        _Second.of(whole, x, RowDots.of(whole, x, dot), first, second).add(whole, x, grads)
    return grads.results(rest, cotangents.do.dtype, 0)


class _Second(NamedTuple):
    """What some rows need before their blocks are added."""

    d: RowDots
    first: Cotangents  # do, dlse
    second: Cotangents  # their tangents, with which dp changes
    of_first: tuple[Array, Array]  # m and r of dz
    of_second: tuple[Array, Array]  # m and r of what ḋz has beside dz (ż − l̇se)
    dsink: Array  # (..., H, R, 1), ḋsink, or None

    @staticmethod
    def of(whole: Whole, x: Rows, d: RowDots, first: Cotangents, second: Cotangents) -> "_Second":
        """r′ = ḋlse − Σ p ḋp − Σ dz (ż − l̇se) − dsink (ṡink − l̇se)"""
        m, r, dsink = row_gradient(whole, x, first)
        bent, moved = namespace(r).zeros_like(r), None
        for block in whole.blocks(x.rows):
            e, z_dot, *_ = d.scores(whole, x, block)
            dz = e * shifted(first.of_weights(whole, e, block), m, r)
            bent = bent + namespace(e).sum(dz * d.change(z_dot), axis=-1, keepdims=True)
        if dsink is not None:
            moved = dsink * ((0.0 if d.dot.sink is None else d.dot.sink[..., None, None]) - d.lse)
            bent = bent + moved
        second = second._replace(dlse=second.dlse - bent)
        *of_second, more = row_gradient(whole, x, second)
        return _Second(d, first, second, (m, r), tuple(of_second), None if moved is None else moved + more)

    def add(self, whole: Whole, x: Rows, grads: Gradients) -> None:
        """Add the shares of the blocks of these rows."""
        if grads.sink is not None:
            grads.sink.add((x.rows,), self.dsink[..., 0])
        for block in whole.blocks(x.rows):
            e, z_dot, t, u_dot = self.d.scores(whole, x, block)
            p_dot = e * self.d.change(z_dot)
            a, a_dot, v = whole.drop(e, block), whole.drop(p_dot, block), whole.v
            grads.v.add(place(block.cols, v), sum_over_rows(a_dot, self.first.do, v))
            grads.v.add(place(block.cols, v), sum_over_rows(a, self.second.do, v))
            moved = shifted(self.first.of_weights(whole, e, block), *self.of_first)
            more = shifted(self.second.of_weights(whole, e, block), *self.of_second)
            self.add_scores(whole, x, block, (e * moved, p_dot * moved + e * more), (t, u_dot), grads)

    def add_scores(self, whole: Whole, x: Rows, block: Block, dzs: Any, of_cap: Any, grads: Gradients) -> None:
        """ḋbias, and ḋq and ḋk by the rule of a product, of dz and ḋz"""
        (q, k, _, rest, *_), (dz, dz_dot), (t, u_dot), dot = whole, dzs, of_cap, self.d.dot
        if grads.bias is not None:
            grads.bias.add(rest.bias.place(x.rows, block.cols, q.shape[-2]), block.bias.dense_vjp(dz_dot).values)
        if t is not None:
            slope = 1 - t * t
            dz, dz_dot = slope * dz, slope * (dz_dot - 2 * t * (u_dot / rest.softcap) * dz)
        grads.q.add(place(x.rows, q), rest.scale * times_rows(dz_dot, block.k))
        grads.k.add(place(block.cols, k), sum_over_rows(dz_dot, x.q, k))
        if dot.k is not None:
            grads.q.add(place(x.rows, q), rest.scale * times_rows(dz, dot.k[..., slice(*block.cols), :]))
        if self.d.q is not None:
            grads.k.add(place(block.cols, k), sum_over_rows(dz, self.d.q, k))
