"""Forward mode in tiles: `funcmha.derivatives.attention_jvp` in linear memory, every tile once more.

With the weights of the forward, p = 2^(s − c) / row_sum, the outputs change by

    l̇se = Σ p ż + p_sink ṡink        ȯ = Σ dropout(p ż) v + Σ dropout(p) v̇ − l̇se o

so that one pass over the tiles of a row sums all that it needs. Rows share nothing: a block of them is a task. Where
one key has more than half of the weight, its ż is first subtracted from all and from ṡink. That leaves ȯ as it is, and
spares it a difference of two large numbers.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; G heads, R rows and N
columns of a tile; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Tangents, check_tangents
from funcmha._arrays import Array, downcast, quiet_underflow
from funcmha.masks import Range
from funcmha.masks.zero import zero_unattended

from . import threads
from .cache import AttentionCache, Views, with_head_axis
from .dominant import inside
from .forward import recomputed
from .threads import scratch
from .tiles import Heads, Tile, blocks, inverse_of, of_sink, within


@quiet_underflow
def attention_jvp(cache: AttentionCache, dots: tuple[Any, ...]) -> tuple[Array, Array]:
    """ȯ = Σ dropout(p ż) v + Σ dropout(p) v̇ − l̇se o     l̇se = Σ p ż + p_sink ṡink

    As `funcmha.derivatives.attention_jvp`. Memory O(H (T + S)) beside the inputs.
    """
    q, k, v, rest = cache
    dot, dtype = check_tangents(q, k, v, rest.bias, rest.sink, dots)
    o_dot, lse_dot = np.empty_like(rest.o), np.empty_like(rest.row_sum)
    x, x_dot = recomputed(Views.of(cache)), tangent_views(cache, dot)
    work = _Forward(x, x_dot, dot, with_head_axis(o_dot), with_head_axis(lse_dot, 1))
    *batch, H, T, D = x.q.shape
    S, E = x.v.shape[-2:]
    samples = list(np.ndindex(*batch))
    tasks = [(h, rows, b) for h in x.stacks() for rows in reversed(blocks(T, x.plan.tile_rows)) for b in samples]
    with threads.single_threaded_blas():
        threads.run(
            lambda task: work.rows(*task), tasks, flops=2.0 * prod(batch) * H * T * S * (3 * D + 2 * E), plan=x.plan
        )
    return downcast(o_dot, dtype), downcast(lse_dot, dtype)


def tangent_views(cache: AttentionCache, dot: Tangents) -> Views:
    """The tangents in the place of what they are the tangents of, 0 at the queries and keys that the mask keeps out."""
    zero = cache.q.dtype.type(0)
    q, k, v = (np.broadcast_to(zero, a.shape) if d is None else d for a, d in zip(cache[:3], dot[:3], strict=True))
    q, k, v = zero_unattended(q, k, v, cache.rest.mask)
    return Views.of(cache.rest._replace(bias=dot.bias, sink=dot.sink).with_qkv(q, k, v))


class _Forward(NamedTuple):
    x: Views
    x_dot: Views
    dot: Tangents  # None where one is zero
    o_dot: Array  # (..., H, T, E)
    lse_dot: Array  # (..., H, T)

    def rows(self, h: slice, rows: Range, b: Any) -> None:
        """Write the tangents of some rows of some heads."""
        at, x = (*b, h, slice(*rows)), self.x
        heads, heads_dot = x.heads(b, h), self.x_dot.heads(b, h)
        row_max = None if x.row_max is None else x.row_max[at]
        inverse = inverse_of(x.row_sum[at])
        key, z_dot = None, np.zeros_like(inverse)
        if x.dominant[at].max(initial=-1) >= 0:
            key = x.dominant[at]
            z_dot = self.of_keys(heads, heads_dot, rows, key)
        acc, mean = self.sums(heads, heads_dot, rows, row_max, key, z_dot)
        if heads.sink is not None:
            sink_dot = 0.0 if heads_dot.sink is None else heads.rounded(heads_dot.sink)
            mean += of_sink(heads, row_max) * (sink_dot - z_dot)
        mean = np.where(inverse == 0, 0.0, mean * inverse)
        self.lse_dot[at] = z_dot + mean
        self.o_dot[at] = acc * inverse[..., None] - mean[..., None] * x.o[at]

    def of_keys(self, heads: Heads, heads_dot: Heads, rows: Range, key: Array) -> Array:
        """ż of these rows at a key each (G, R), 0 where that is −1"""
        (g, i), (left, right) = np.nonzero(key >= 0), self.factors(heads, heads_dot, rows)
        t, j, z_dot = rows[0] + i, key[g, i], np.zeros(key.shape, left.dtype)
        z = np.einsum("nd,nd->n", left[g, i], right[g, j])
        if heads.softcap is not None:
            u = np.broadcast_to(heads.score_scale, (len(key), 1, 1))[g, 0, 0]
            z *= 1 - np.tanh(u * np.einsum("nd,nd->n", heads.q[g, t], heads.k[g, j])) ** 2
        if heads_dot.bias is not None:
            relative, bias = heads_dot.bias.ndim == 2, heads_dot.bias
            z += bias[g, j - t + heads.q.shape[1] - 1] if relative else bias[g, t, j]
        z_dot[g, i] = z
        return z_dot

    def sums(
        self, heads: Heads, heads_dot: Heads, rows: Range, row_max: Array, key: Array, z_dot: Array
    ) -> tuple[Array, Array]:
        """Σ dropout(e ż) v + Σ dropout(e) v̇ (G, rows, E)     Σ e ż (G, rows)     with e = 2^(s − c)

        of ż less z_dot (G, rows), which is that of the keys, if there are any.
        """
        q, (left, right) = heads.scaled_q(rows), self.factors(heads, heads_dot, rows)
        acc, mean = np.zeros((*q.shape[:-1], heads.v.shape[-1]), q.dtype), np.zeros(q.shape[:-1], q.dtype)
        for tile in heads.all_tiles(rows):
            i, j = within(rows, tile), slice(*tile.cols)
            slope = None if heads.softcap is None else scratch("slope", (len(q), *tile.shape), q.dtype)
            e = heads.exponentials(q[:, i], tile, None if row_max is None else row_max[:, i], slope)
            ez = self.scores(heads_dot, tile, left[:, i], right[:, j], slope)
            if key is not None:
                ez -= z_dot[:, i, None]
                ez[inside(key[:, i], tile.cols)] = 0.0
            ez *= e
            mean[:, i] += ez @ np.ones(ez.shape[-1], ez.dtype)
            if heads.keep is not None:
                ez, e = heads.drop(np.stack((ez, e)), tile)
            acc[:, i] += ez @ heads.v[:, j]
            if self.dot.v is not None:
                acc[:, i] += e @ heads_dot.v[:, j]
        return acc, mean

    def factors(self, heads: Heads, heads_dot: Heads, rows: Range) -> tuple[Array, Array]:
        """u̇ = left rightᵀ     left scale · [q̇, q] (G, R, 2D), right [k, k̇] (G, S, 2D), without what is zero"""
        i = slice(*rows)
        q, q_dot = heads.q[:, i], heads_dot.q[:, i]
        pairs = [(q_dot, heads.k)] * (self.dot.q is not None) + [(q, heads_dot.k)] * (self.dot.k is not None)
        if not pairs:
            return q[..., :0], heads.k[..., :0]
        # Row after row, as a head alone has them: of keys that are repeated NumPy makes columns, whose bits are others.
        left, right = (np.ascontiguousarray(np.concatenate(some, axis=-1)) for some in zip(*pairs, strict=True))
        return heads.rounded(heads.scale) * left, right

    def scores(self, heads_dot: Heads, tile: Tile, left: Array, right: Array, slope: Array) -> Array:
        """ż = slope · u̇ + ḃias (G, R, N), 0 where not mask"""
        out = scratch("dp", (len(left), *tile.shape), left.dtype)
        z_dot = np.matmul(left, right.swapaxes(1, 2), out=out)
        if slope is not None:
            z_dot *= slope
        if heads_dot.bias is not None:
            z_dot += heads_dot.bias_of(tile)
        if tile.mixed:  # where the exponentials are 0, and a tangent may be anything
            heads_dot.forbid(z_dot, tile, 0.0)
        return z_dot
