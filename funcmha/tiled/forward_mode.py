"""Forward mode in tiles: `funcmha.forward.attention_jvp` in linear memory, every tile once more.

With the weights of the forward, p = 2^(s − c) / total, the outputs change by

    l̇se = Σ p ż + p_sink ṡink        ȯ = Σ dropout(p ż) v + Σ dropout(p) v̇ − l̇se o

so that one pass over the tiles of a row sums all that it needs. Rows share nothing: a block of them is a task.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
tile; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._bias import Bias
from funcmha._tangents import Tangents, check_tangents, dtype_of
from funcmha._xp import Array, narrow
from funcmha.masks import Range

from . import threads, tiles
from .attention import AttentionCache, _Views, _with_head, blanked
from .threads import scratch
from .tiles import Head, Tile, blocks, of_sink


def attention_jvp(
    cache: AttentionCache,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Bias = None,
    sink_dot: Array = None,
    /,
) -> tuple[Array, Array]:
    """ȯ = Σ dropout(p ż) v + Σ dropout(p) v̇ − l̇se o     l̇se = Σ p ż + p_sink ṡink

    As `funcmha.forward.attention_jvp`. Memory O(H (T + S)) beside the inputs.
    """
    dot = check_tangents(cache, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    dtype = dtype_of(cache.q, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    o_dot, lse_dot = np.empty_like(cache.o), np.empty_like(cache.total)
    x, x_dot = _Views.again(cache), tangent_views(cache, dot)
    work = _Forward(x, x_dot, dot, _with_head(o_dot), _with_head(lse_dot, 1))
    *batch, H, T, D = x.q.shape
    S, E = x.v.shape[-2:]
    samples = list(np.ndindex(*batch))
    tasks = [(h, rows, b) for h in range(H) for rows in reversed(blocks(T, tiles.ROWS)) for b in samples]
    with threads.single_threaded_blas():
        threads.run(lambda task: work.rows(*task), tasks, flops=2.0 * prod(batch) * H * T * S * (3 * D + 2 * E))
    return narrow(o_dot, dtype), narrow(lse_dot, dtype)


def tangent_views(cache: AttentionCache, dot: Tangents) -> _Views:
    """The tangents in the place of what they are the tangents of, 0 at the queries and keys that the mask keeps out."""
    zero = cache.q.dtype.type(0)
    q, k, v = (np.broadcast_to(zero, a.shape) if d is None else d for a, d in zip(cache[:3], dot[:3], strict=True))
    q, k, v = blanked(q, k, v, cache.mask)
    return _Views.of(cache._replace(q=q, k=k, v=v, bias=dot.bias, sink=dot.sink))


class _Forward(NamedTuple):
    x: _Views
    x_dot: _Views
    dot: Tangents  # None where one is zero
    o_dot: Array  # (..., H, T, E)
    lse_dot: Array  # (..., H, T)

    def rows(self, h: int, rows: Range, b: Any) -> None:
        """Write the tangents of some rows of a head."""
        at, x = (*b, h, slice(*rows)), self.x
        head, head_dot = x.head(b, h), self.x_dot.head(b, h)
        shift = None if x.shift is None else x.shift[at]
        acc, mean = self.sums(head, head_dot, rows, shift)
        if head.sink is not None and head_dot.sink is not None:
            mean += of_sink(head, shift) * head_dot.sink
        inverse = np.where(x.total[at] == 0, 0.0, 1 / np.where(x.total[at] == 0, 1.0, x.total[at]))
        self.lse_dot[at] = np.where(inverse == 0, 0.0, mean * inverse)
        self.o_dot[at] = acc * inverse[:, None] - self.lse_dot[at][:, None] * x.o[at]

    def sums(self, head: Head, head_dot: Head, rows: Range, shift: Array) -> tuple[Array, Array]:
        """Σ dropout(e ż) v + Σ dropout(e) v̇ (rows, E)     Σ e ż (rows)     with e = 2^(s − c)"""
        q, (left, right) = head.unit * head.q[slice(*rows)], self.factors(head, head_dot, rows)
        acc, mean = np.zeros((len(q), head.v.shape[-1]), q.dtype), np.zeros(len(q), q.dtype)
        for tile in head.all_tiles(rows):
            i, j = slice(tile.rows[0] - rows[0], tile.rows[1] - rows[0]), slice(*tile.cols)
            slope = None if head.softcap is None else scratch("slope", tile.shape, q.dtype)
            e = head.exponentials(q[i], tile, None if shift is None else shift[i], slope)
            ez = self.scores(head_dot, tile, left[i], right[j], slope)
            ez *= e
            mean[i] += ez @ np.ones(len(ez.T), ez.dtype)
            if head.keep is not None:
                ez, e = head.drop(np.stack((ez, e)), tile)
            acc[i] += ez @ head.v[j]
            if self.dot.v is not None:
                acc[i] += e @ head_dot.v[j]
        return acc, mean

    def factors(self, head: Head, head_dot: Head, rows: Range) -> tuple[Array, Array]:
        """u̇ = left rightᵀ     left scale · [q̇, q] (R, 2D), right [k, k̇] (S, 2D), without what is zero"""
        i = slice(*rows)
        pairs = [(head_dot.q[i], head.k)] * (self.dot.q is not None) + [(head.q[i], head_dot.k)] * (
            self.dot.k is not None
        )
        if not pairs:
            return head.q[i, :0], head.k[:, :0]
        return head.scale * np.concatenate([q for q, _ in pairs], axis=1), np.concatenate([k for _, k in pairs], axis=1)

    def scores(self, head_dot: Head, tile: Tile, left: Array, right: Array, slope: Array) -> Array:
        """ż = slope · u̇ + ḃias (R, N), 0 where not mask"""
        z_dot = np.matmul(left, right.T, out=scratch("dp", tile.shape, left.dtype))
        if slope is not None:
            z_dot *= slope
        if head_dot.bias is not None:
            z_dot += head_dot.bias_of(tile)
        if tile.mixed:  # where the exponentials are 0, and a tangent may be anything
            head_dot.hide(z_dot, tile, 0.0)
        return z_dot
