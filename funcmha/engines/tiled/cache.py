"""What attention in tiles keeps, and how its parts are reached: the arrays of a sample and a head, as views.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias
from funcmha._arrays import Array
from funcmha.biases import RelativeBias
from funcmha.dropout import Masked, Seeded
from funcmha.engines.plan import Plan, evenly
from funcmha.masks import Mask

from .threads import workers
from .tiles import Heads


class Rest(NamedTuple):
    """What the gradient needs beside q, k and v."""

    bias: Bias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    o: Array  # (..., H, T, E)
    row_sum: Array  # (..., H, T), Σ 2^(s − c) and the sink's share, 0 where no key is attended and there is no sink
    row_max: Array  # (..., H, T), c
    dominant: Array  # (..., H, T), the key with more than half of the weight, −1 where none has
    shifted: bool  # whether c is not 0 everywhere
    mask: Mask | None
    dropout: Masked | Seeded | None
    scale: Array | float  # of every head, or (H,)
    softcap: Array | float | None  # of every head, or (H,)
    keys: int  # S
    plan: Plan

    @property
    def num_keys(self) -> int:
        """S"""
        return self.keys

    def with_qkv(self, q: Array, k: Array, v: Array) -> "AttentionCache":
        """The cache with these q, k and v"""
        return AttentionCache(q, k, v, self)

    def heads(self, h: slice) -> "Rest":
        """Of the query heads h, as views"""
        return self._replace(
            bias=None if self.bias is None else self.bias.heads(h),
            sink=None if self.sink is None else self.sink[h],
            o=self.o[..., h, :, :],
            row_sum=self.row_sum[..., h, :],
            row_max=self.row_max[..., h, :],
            dominant=self.dominant[..., h, :],
            mask=None if self.mask is None else self.mask.heads(h.start, h.stop),
            dropout=None if self.dropout is None else self.dropout.heads(h),
            scale=self.scale[h] if isinstance(self.scale, np.ndarray) else self.scale,
            softcap=self.softcap[h] if isinstance(self.softcap, np.ndarray) else self.softcap,
        )


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at fully masked queries
    k: Array  # (..., K, S, D), 0 at unattended keys
    v: Array  # (..., K, S, E), 0 at unattended keys
    rest: Rest


class Views(NamedTuple):
    """The arrays of a cache with a head axis and with the broadcast axes spelt out, by strides of 0."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Array  # (..., H, T, S), or (..., H, T + S − 1) of a `RelativeBias`, or None
    sink: Array  # (H,) or None; this, the scales and the caps in float64
    o: Array  # (..., H, T, E)
    row_sum: Array  # (..., H, T)
    row_max: Array  # (..., H, T), or None where it is 0 everywhere
    dominant: Array  # (..., H, T)
    mask: Mask | None
    keep: Array | Seeded  # (..., H, T, S) or None
    rate: float
    scale: Array  # (H,)
    softcap: Array  # (H,) or None
    plan: Plan

    @staticmethod
    def of(cache: AttentionCache) -> "Views":
        """Those of a cache"""
        rest = cache.rest
        q, k, v, o = (with_head_axis(a) for a in (cache.q, cache.k, cache.v, rest.o))
        scores, (*batch, H, _, _) = (*q.shape[:-1], k.shape[-2]), q.shape
        bias = rest.bias
        if isinstance(bias, RelativeBias):
            bias = np.broadcast_to(bias.values, (*batch, H, bias.values.shape[-1]))
        elif bias is not None:
            bias = np.broadcast_to(bias.values, scores)
        keep: Any = rest.dropout
        rate = 0.0 if keep is None else keep.rate
        keep = np.broadcast_to(keep.keep, scores) if isinstance(keep, Masked) else keep
        sink, scale, softcap = (
            None if a is None else np.broadcast_to(np.asarray(a, np.float64), H)
            for a in (rest.sink, rest.scale, rest.softcap)
        )
        row_sum, row_max = with_head_axis(rest.row_sum, 1), with_head_axis(rest.row_max, 1) if rest.shifted else None
        dominant = with_head_axis(rest.dominant, 1)
        return Views(
            q, k, v, bias, sink, o, row_sum, row_max, dominant, rest.mask, keep, rate, scale, softcap, rest.plan
        )

    @property
    def has_one_tile(self) -> bool:
        """Whether each head is one tile, of all its scores, and reads keys and values of its own"""
        (H, T), (K, S) = self.q.shape[-3:-1], self.k.shape[-3:-1]
        fits = 0 < T <= self.plan.tile_rows and 0 < S <= self.plan.columns(T)
        return fits and H == K and self.mask is None

    @property
    def has_few_queries(self) -> bool:
        """Whether the queries that read a key/value head are so few that they are rows of one product"""
        (H, T, _), K = self.q.shape[-3:], self.k.shape[-3]
        return bool(H // max(K, 1) * T <= self.plan.few_queries)

    @property
    def is_whole(self) -> bool:
        """Whether a mask cuts nothing off from tiles"""
        return self.plan.is_whole(self.q.shape[-2], self.k.shape[-2])

    @property
    def flops(self) -> float:
        """Of the two products of the forward"""
        (*_, D), (S, E) = self.q.shape, self.v.shape[-2:]
        return float(2 * prod(self.q.shape[:-1]) * S * (D + E))

    def workers(self, forwards: int) -> int:
        """How many threads share the work of so many forwards"""
        return workers(forwards * self.flops, self.plan)

    def samples(self) -> list[Any]:
        """Each sample, by its place in the batch"""
        return list(np.ndindex(*self.q.shape[:-3]))

    def stacks(self) -> list[slice]:
        """The heads that go together, enough for all threads"""
        return [h for some in self._stacks(self.workers(1)) for h in some]

    def stacks_of_samples(self) -> list[tuple[Any, slice]]:
        """The same, with the samples that go together"""
        stacks, T = self.stacks(), self.q.shape[-2]
        tasks = len(stacks) * -(-T // self.plan.tile_rows) / self.workers(1)
        samples = self._samples_together(stacks, T, tasks, self.is_whole)
        return [(b, h) for h in stacks for b in samples]

    def stacks_of_few_queries(self) -> list[tuple[Any, slice, slice]]:
        """Samples, key/value heads and their readers that go together, where the readers of each are rows of one"""
        (*batch, H, T, _), (K, S) = self.q.shape, self.k.shape[-3:-1]
        readers, workers = H // max(K, 1), self.workers(1)
        stacks = [h for (h,) in self.plan.stacks(K, K, readers * T, S, -(-workers // max(prod(batch), 1)))]
        samples = self._samples_together(stacks, readers * T, len(stacks) / workers, whole=False)
        return [(b, kv, slice(kv.start * readers, kv.stop * readers)) for kv in stacks for b in samples]

    def stacks_of_keys(self) -> list[list[slice]]:
        """The heads that go together in the backward, in lists of those that read one key/value head

        As they are added up in another order, the number of threads says nothing where heads share a gradient.
        """
        shared = self.bias is not None or self.q.shape[-3] != self.k.shape[-3]
        return self._stacks(1 if shared else self.workers(3))

    def samples_of_keys(self, stacks: list[list[slice]]) -> list[Any]:
        """The samples that go together in the backward"""
        every, tasks = [h for some in stacks for h in some], len(stacks) / self.workers(3)
        return self._samples_together(every, self.q.shape[-2], tasks, self.is_whole)

    def _samples_together(self, stacks: list[slice], rows: int, tasks: float, whole: bool) -> list[Any]:
        """The samples that go together where a stack is of so many rows, and a sample of so many tasks for each thread:
        their place in the batch, its last axis by a slice; each by itself where their masks cut off something else
        """
        (*batch, _, T, _), S = self.q.shape, self.k.shape[-2]
        one_mask = self.mask is None or prod(self.mask.shape(T, S)[:-3]) == 1
        if not batch or not (one_mask or whole):
            return self.samples()
        heads = max((h.stop - h.start for h in stacks), default=1)
        size = self.plan.samples(heads, rows, S, most=int(prod(batch) * tasks))
        return [(*b, some) for b in np.ndindex(*batch[:-1]) for some in evenly(0, batch[-1], size)]

    def _stacks(self, workers: int) -> list[list[slice]]:
        (*batch, H, T, _), (K, S) = self.q.shape, self.k.shape[-3:-1]
        tasks = prod(batch) * -(-T // self.plan.tile_rows)
        return self.plan.stacks(H, K, T, S, least=-(-workers // max(tasks, 1)))

    def key_heads(self, b: tuple[Any, ...], h: slice) -> tuple[Any, ...]:
        """Where the key/value heads are that heads h of sample b, or of some, read: one, or as many"""
        readers = self.q.shape[-3] // self.k.shape[-3]
        return (*b, slice(h.start // readers, (h.stop - 1) // readers + 1))

    def heads(self, b: tuple[Any, ...], h: slice) -> Heads:
        """Heads h of sample b, or of some that go together"""
        at, of_keys, keep, n = (*b, h), self.key_heads(b, h), self.keep, h.stop - h.start
        first = tuple(i.start if isinstance(i, slice) else i for i in b)
        start = int(np.ravel_multi_index(first, self.q.shape[:-3])) if b else 0
        count = b[-1].stop - b[-1].start if b and isinstance(b[-1], slice) else 1
        return Heads(
            self.q[at],
            repeated(self.k[of_keys], n),
            repeated(self.v[of_keys], n),
            None if self.bias is None else self.bias[at],
            None if self.sink is None else self.sink[h, None],
            None if self.mask is None else self.mask.at(b),
            (start, start + count),
            h,
            keep if keep is None or isinstance(keep, Seeded) else keep[at],
            self.rate,
            self.scale[h, None, None],
            None if self.softcap is None else self.softcap[h, None, None],
            self.plan,
        )


def with_head_axis(a: Any, rank: int = 2) -> Any:
    """`a` with a head axis before its last `rank` axes, where it has no other"""
    return a if a is None or a.ndim > rank else a[None]


def repeated(a: Array, n: int) -> Array:
    """a (..., K, S, D), or (..., 1, S, D) for each of n, by a stride of 0"""
    return a if a.shape[-3] != 1 else np.broadcast_to(a, (*a.shape[:-3], n, *a.shape[-2:]))
