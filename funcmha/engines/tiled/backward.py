"""The backward of attention in tiles, shared out among the threads.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array
from funcmha.engines.plan import Plan
from funcmha.masks import Range

from . import threads
from .cache import Views, repeated
from .dominant import Dominant, add_to_keys, inside
from .schedule import BiasGradient, RelativeBiasGradient, wavefronts
from .tiles import Heads, Rows, Tile, mean_cotangent, of_sink, score_cotangent, tile_backward


class _Prepared(NamedTuple):
    """What all tiles of some heads need, of one sample or of several, `...`."""

    heads: Heads  # with keys row after row
    v1: Array  # (..., G, S, E + 1), [v, 1]
    r: Array  # (..., G, T), dlse − δ
    sum: Array  # (..., G, T), Σ dz: dlse less what the sink has of it
    dominant: Dominant | None  # Σ dz of the other keys, and the slope of the soft cap


class Backward(NamedTuple):
    x: Views
    inverse: Array  # (..., H, T, 1), of the row sums, 0 where no key is attended
    do: Array  # (..., H, T, E)
    dweights: Array  # (..., H, T, S) or None
    dlse: Array  # (..., H, T) or None
    dq: Array  # (..., H, T, D)
    dk: Array  # (..., K, S, D)
    dv: Array  # (..., K, S, E)
    dbias: BiasGradient | RelativeBiasGradient | None
    dsink: Array  # (..., H)
    known: Array = None  # (..., H, T), dz of dominant keys: these are some keys of a softmax, and dlse is dlse − δ

    def run(self) -> None:
        """Every tile once. What a row or a column is added up from comes in the order of `wavefronts`, on one thread or
        many
        """
        (*batch, H, T, _), S, x = self.dq.shape, self.dk.shape[-2], self.x
        stacks, flops = x.stacks_of_keys(), 3 * x.flops
        if self.dbias is None and _busy(prod(batch) * len(stacks), x.plan):
            alone = [(some, b) for some in stacks for b in x.samples_of_keys(stacks)]  # each on a thread: share nothing
            threads.run(lambda task: self.alone(*task), alone, flops, x.plan)
            return

        samples = x.samples()
        together = [[b] for b in samples] if self.dbias is not None and self.dbias.sums_samples else [samples]
        schedule = [front for some in together for front in wavefronts(x.heads, some, T, S)] if H else []
        for some in stacks:
            for h in some:
                self.all_samples(h, samples, schedule, flops * (h.stop - h.start) / H)

    def alone(self, stacks: list[slice], b: Any) -> None:
        """Heads that share nothing with others, of one sample or of several, on this thread"""
        schedule = wavefronts(self.x.heads, [b], self.dq.shape[-2], self.dk.shape[-2])
        for h in stacks:
            p = self.prepare(b, h)
            for front in schedule:
                for _, block in front:
                    self.tiles(b, h, p, block)
            self.dominant_keys(b, h, p)

    def all_samples(self, h: slice, samples: list[Any], schedule: list[Any], flops: float) -> None:
        """Some heads of all samples, front after front on all threads"""
        prepared: dict[Any, _Prepared] = {}

        def prepare(b: Any) -> None:
            prepared[b] = self.prepare(b, h)

        threads.run(prepare, samples, flops / max(self.dv.shape[-2], 1), plan=self.x.plan)
        for front in schedule:
            threads.run(
                lambda task: self.tiles(task[0], h, prepared[task[0]], task[1]),
                front,
                flops / len(schedule),
                plan=self.x.plan,
            )
            if self.dbias is not None:
                self.dbias.flush()
        for b in samples:
            self.dominant_keys(b, h, prepared[b])

    def prepare(self, b: Any, h: slice) -> _Prepared:
        """δ = Σ p dp = Σ do o + Σ p dweights"""
        at, heads = (*b, h), self.in_rows(b, h)
        delta = np.einsum("...te,...te->...t", self.do[at], self.x.o[at])
        for tile in heads.of_all_rows() if self.dweights is not None and self.known is None else ():
            i, j = slice(*tile.rows), slice(*tile.cols)
            x = self.rows(at, heads, delta, tile.rows)
            delta[..., i] += mean_cotangent(heads, tile, x, self.dweights[at][..., i, j])
        total = np.zeros_like(delta) if self.dlse is None else np.where(self.x.row_sum[at] == 0, 0.0, self.dlse[at])
        r = -delta if self.dlse is None else total - delta
        if heads.sink is not None:
            p_sink = of_sink(heads, None if self.x.row_max is None else self.x.row_max[at]) * self.inverse[at][..., 0]
            self.dsink[at] = np.sum(p_sink * r, axis=-1)
            total = total - p_sink * r
        v = self.x.v[self.x.key_heads(b, h)]
        v1 = np.ones((*v.shape[:-1], v.shape[-1] + 1), v.dtype)
        v1[..., :-1] = v
        dominant = Dominant.of(self.x.dominant[at], v.dtype, 1, 1)
        return _Prepared(heads, repeated(v1, r.shape[-2]), r, total, dominant)

    def row_sums(self) -> Array:
        """Σ dz of each row, but for its dominant key (..., H, T)"""
        total = np.zeros(self.x.q.shape[:-1], self.dq.dtype)

        def add(task: tuple[Any, slice]) -> None:
            (b, h), p = task, self.prepare(*task)
            at = (*b, h)
            for tile in p.heads.of_all_rows():
                i, j = slice(*tile.rows), slice(*tile.cols)
                cotangent = None if self.dweights is None else self.dweights[at][..., i, j]
                x = self.rows(at, p.heads, p.r, tile.rows)
                e = p.heads.exponentials(x.q, tile, x.row_max)
                dz = score_cotangent(p.heads, tile, x, e, p.v1[..., j, :], cotangent)
                dz[inside(self.x.dominant[at][..., i], tile.cols)] = 0.0
                total[at][..., i] += dz @ np.ones(dz.shape[-1], dz.dtype)

        threads.run(add, self.x.stacks_of_samples(), self.x.flops, self.x.plan)
        return total

    def in_rows(self, b: Any, h: slice) -> Heads:
        """Some heads, with the keys row after row"""
        heads, k = self.x.heads(b, h), np.ascontiguousarray(self.x.k[self.x.key_heads(b, h)])
        return heads._replace(k=repeated(k, heads.k.shape[-3]))

    def rows(self, at: tuple[Any, ...], heads: Heads, r: Array, rows: Range) -> Rows:
        """What a tile needs to know of some rows"""
        i, E = slice(*rows), self.do.shape[-1]
        d = np.empty((*r.shape[:-1], rows[1] - rows[0], E + 1), self.do.dtype)
        d[..., :E], d[..., E] = self.do[at][..., i, :], r[..., i]
        np.multiply(d, self.inverse[at][..., i, :], out=d)
        row_max = None if self.x.row_max is None else self.x.row_max[at][..., i]
        return Rows(heads.scaled_q(rows), row_max, self.inverse[at][..., i, :], d)

    def tiles(self, b: Any, h: slice, p: _Prepared, block: list[Tile]) -> None:
        """Add the share of a block of tiles to dq, dk, dv and dbias"""
        for tile in block:
            self.tile(b, h, p, tile)

    def tile(self, b: Any, h: slice, p: _Prepared, tile: Tile) -> None:
        """Add the share of one tile"""
        at, i, j = (*b, h), slice(*tile.rows), slice(*tile.cols)
        of_keys = self.x.key_heads(b, h)
        cotangent = None if self.dweights is None else self.dweights[at][..., i, j]
        grads = self.dq[at][..., i, :], self.dk[of_keys][..., j, :], self.dv[of_keys][..., j, :]
        x = self.rows(at, p.heads, p.r, tile.rows)
        dz = tile_backward(p.heads, tile, x, p.v1[..., j, :], cotangent, p.dominant, *grads, only=self.x.has_one_tile)
        if self.dbias is not None:
            self.dbias.add(b, h, tile, dz)

    def dominant_keys(self, b: Any, h: slice, p: _Prepared) -> None:
        """Add what was left out: dz = Σ dz − Σ dz of the other keys"""
        if p.dominant is None:
            return
        at, found = (*b, h), p.dominant.found()
        *of_head, i = found  # the head, before it the sample where several go together
        g, j, (rest,), (slope,) = of_head[-1], p.dominant.key[found], p.dominant.rest, p.dominant.others
        dz = (p.sum - rest if self.known is None else self.known[at])[found]
        du = (dz * slope[found] * p.heads.rounded(p.heads.scale[g, 0, 0]))[:, None]
        self.dq[at][found] += du * p.heads.k[(*of_head, j)]
        add_to_keys(self.dk[self.x.key_heads(b, h)], tuple(of_head), j, du * p.heads.q[found])
        if self.dbias is not None:
            self.dbias.add_at(b, h, (g, i, j), dz)


def _busy(tasks: int, plan: Plan) -> bool:
    """Whether so many tasks keep all threads busy to the end, or nearly"""
    n = threads.num_threads()
    return tasks >= plan.thread_tasks * n or (tasks > 0 and tasks % n == 0)
