"""The backward of attention in tiles, shared out among the threads.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array
from funcmha.masks import Range

from . import threads
from .cache import Views
from .dominant import Dominant, add_to_keys
from .schedule import BiasGradient, RelativeBiasGradient, wavefronts
from .tiles import Head, Rows, Tile, blocks, mean_cotangent, of_sink, tile_backward


class _Prepared(NamedTuple):
    """What all tiles of one head of one sample need."""

    k: Array  # (S, D), row after row
    v1: Array  # (S, E + 1), [v, 1]
    r: Array  # (T), dlse − δ
    sum: Array  # (T), Σ dz: dlse less what the sink has of it
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

    def run(self) -> None:
        """Every tile once. What a row or a column is added up from comes in the order of `wavefronts`, on one thread or
        many
        """
        *batch, H, T, D = self.dq.shape
        K, S, E = self.dv.shape[-3:]
        samples = list(np.ndindex(*batch)) if H else []
        flops = 6.0 * prod(batch) * T * S * (D + E)
        alone = [(kv, b) for kv in range(K) for b in samples]  # these share nothing: each has a thread to itself
        if self.dbias is None and _busy(len(alone)):
            threads.run(lambda task: self.one_sample(*task), alone, flops * H, plan=self.x.plan)
            return

        together = [[b] for b in samples] if self.dbias is not None and self.dbias.sums_samples else [samples]
        schedule = [front for some in together for front in wavefronts(self.x.head, some, T, S)]
        for h in range(H):
            self.all_samples(h, samples, schedule, flops)

    def one_sample(self, kv: int, b: Any) -> None:
        """The heads that read key/value head kv of one sample, on this thread"""
        (H, T, _), (K, S, _) = self.dq.shape[-3:], self.dv.shape[-3:]
        schedule = wavefronts(self.x.head, [b], T, S)
        for h in range(kv * H // K, (kv + 1) * H // K):
            p = self.prepare(b, h)
            for front in schedule:
                for _, block in front:
                    self.tiles(b, h, p, block)
            self.dominant_keys(b, h, p)

    def all_samples(self, h: int, samples: list[Any], schedule: list[Any], flops: float) -> None:
        """One head of all samples, front after front on all threads"""
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

    def prepare(self, b: Any, h: int) -> _Prepared:
        """δ = Σ p dp = Σ do o + Σ p dweights"""
        at, head = (*b, h), self.x.head(b, h)
        delta = np.einsum("te,te->t", self.do[at], self.x.o[at])
        for rows in blocks(len(delta), self.x.plan.tile_rows) if self.dweights is not None else ():
            for tile in head.all_tiles(rows):
                i, j = slice(*tile.rows), slice(*tile.cols)
                delta[i] += mean_cotangent(head, tile, self.rows(at, head, delta, tile.rows), self.dweights[at][i, j])
        total = np.zeros_like(delta) if self.dlse is None else np.where(self.x.row_sum[at] == 0, 0.0, self.dlse[at])
        r = -delta if self.dlse is None else total - delta
        if head.sink is not None:
            p_sink = of_sink(head, None if self.x.row_max is None else self.x.row_max[at]) * self.inverse[at][:, 0]
            self.dsink[at] = np.sum(p_sink * r)
            total = total - p_sink * r
        (S, E) = head.v.shape
        v1 = np.ones((S, E + 1), head.v.dtype)
        v1[:, :E] = head.v
        dominant = Dominant.of(self.x.dominant[at], head.v.dtype, 1, 1)
        return _Prepared(np.ascontiguousarray(head.k), v1, r, total, dominant)

    def rows(self, at: tuple[Any, ...], head: Head, r: Array, rows: Range) -> Rows:
        """What a tile needs to know of some rows"""
        i, E = slice(*rows), self.do.shape[-1]
        d = np.empty((rows[1] - rows[0], E + 1), self.do.dtype)
        d[:, :E], d[:, E] = self.do[at][i], r[i]
        np.multiply(d, self.inverse[at][i], out=d)
        row_max = None if self.x.row_max is None else self.x.row_max[at][i]
        return Rows(head.score_scale * head.q[i], row_max, self.inverse[at][i], d)

    def tiles(self, b: Any, h: int, p: _Prepared, block: list[Tile]) -> None:
        """Add the share of a block of tiles to dq, dk, dv and dbias"""
        for tile in block:
            self.tile(b, h, p, tile)

    def tile(self, b: Any, h: int, p: _Prepared, tile: Tile) -> None:
        """Add the share of one tile"""
        at, i, j = (*b, h), slice(*tile.rows), slice(*tile.cols)
        of_key = self.x.key_head(b, h)
        cotangent = None if self.dweights is None else self.dweights[at][i, j]
        grads = self.dq[at][i], self.dk[of_key][j], self.dv[of_key][j]
        head = self.x.head(b, h)._replace(k=p.k)
        x = self.rows(at, head, p.r, tile.rows)
        dz = tile_backward(head, tile, x, p.v1[j], cotangent, p.dominant, *grads)
        if self.dbias is not None:
            self.dbias.add(at, tile, dz)

    def dominant_keys(self, b: Any, h: int, p: _Prepared) -> None:
        """Add what was left out: dz = Σ dz − Σ dz of the other keys"""
        if p.dominant is None:
            return
        at, head, i = (*b, h), self.x.head(b, h), p.dominant.found()
        j, (rest,), (slope,) = p.dominant.key[i], p.dominant.rest, p.dominant.others
        dz = p.sum[i] - rest[i]
        du = (dz * slope[i] * head.scale)[:, None]
        self.dq[at][i] += du * p.k[j]
        add_to_keys(self.dk[self.x.key_head(b, h)], j, du * head.q[i])
        if self.dbias is not None:
            self.dbias.add_at(at, i, j, dz)


def _busy(tasks: int) -> bool:
    """Whether so many tasks keep all threads busy to the end, or nearly"""
    return tasks >= 4 * threads.num_threads() or (tasks > 0 and tasks % threads.num_threads() == 0)
