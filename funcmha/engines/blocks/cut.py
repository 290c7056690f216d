"""The blocks that attention is cut into: their scores, their exponentials, and the products of heads that share keys.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
block; `...` is batch.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from funcmha._arguments import Bias
from funcmha._arrays import Array, Place, dtype_name, into, namespace, product, product_of_transposed, replaced
from funcmha.engines.plan import Plan
from funcmha.masks import Mask, Range
from funcmha.ops import drop

from .cache import AttentionCache, Rest

INF = float("inf")


class Block(NamedTuple):
    """Some keys, and what stands between them and some queries."""

    cols: Range
    k: Array  # (..., K, N, D)
    v: Array  # (..., K, N, E)
    bias: Bias  # of these queries and keys, or None
    allowed: Array  # booleans that broadcast to (..., H, R, N), or None for all
    keep: Array  # booleans that broadcast to (..., H, R, N), or None for all


class Rows(NamedTuple):
    """Some queries, and what the forward found of them."""

    rows: Range
    q: Array  # (..., H, R, D), as `Whole.queries` gives it
    top: Array  # (..., H, R, 1), the row maxima
    norm: Array  # (..., H, R, 1), what exponentials are divided by, or None
    keys: Array  # (..., H, R, 1), Σ exp(z − top) / norm
    total: Array  # (..., H, R, 1), that with the sink's share; 1 where it is 0
    attending: Array  # booleans (..., H, R, 1), whether there is a weight that is not 0
    sink: Array  # (..., H, R, 1), exp(sink − top) / norm, or None

    def normalised(self) -> "Rows":
        """So that an exponential is a weight"""
        total, sink = self.total, None if self.sink is None else self.sink / self.total
        one = namespace(total).ones_like(total)
        return self._replace(norm=total, keys=self.keys / total, total=one, sink=sink)


class Whole(NamedTuple):
    """What the blocks are cut from."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    rest: Rest
    mask: Mask | None
    sizes: tuple[int, int]  # rows and columns of a block, but for the last ones
    half: str | None  # whose products are taken: then p is one factor and the scale none, to be rounded once at most

    @staticmethod
    def of(cache: AttentionCache, half: str | None = None) -> "Whole":
        """That of a cache"""
        return Whole(*cache, cache.rest.whole_mask, block_sizes(cache.q, cache.k, cache.rest.plan), half)

    def all_rows(self) -> list[Range]:
        """The queries, block by block"""
        return ranges((0, self.q.shape[-2]), self.sizes[0])

    def queries(self, rows: Range) -> Array:
        """q (..., H, R, D), times the scale unless that is left to `scaled`"""
        q = self.q[..., slice(*rows), :]
        return q if self.half is not None else self.rest.scale * q

    def scaled(self, a: Array) -> Array:
        """a (..., H, R, N), times the scale unless q is"""
        return a if self.half is None else self.rest.scale * a

    def found(self, rows: Range) -> Rows:
        """What the forward found of some rows"""
        xp, rest, i = namespace(self.q), self.rest, slice(*rows)
        top, keys, sink = rest.row_max[..., i, None], rest.row_sum[..., i, None], None
        total = keys
        if rest.sink is not None:
            sink = xp.exp(rest.sink[..., None, None] - top)
            total = keys + sink
        found = Rows(rows, self.queries(rows), top, None, keys, xp.where(total == 0, 1.0, total), keys != 0, sink)
        return found if self.half is None else found.normalised()

    def blocks(self, rows: Range) -> Iterator[Block]:
        """The keys that these rows may attend, block by block: without what the mask empties"""
        S, mask = self.k.shape[-2], self.mask
        start, stop = (0, S) if mask is None else mask.columns(rows, S)
        width = self.sizes[1]
        for cols in ranges((start - start % max(width, 1), stop), width):  # on one grid for all rows
            answer = "full" if mask is None else mask.block(rows, cols)
            if answer != "empty":
                yield self.block(rows, cols, answer == "mixed")

    def block(self, rows: Range, cols: Range, mixed: bool) -> Block:
        """One block, with the booleans of its mask where that is mixed"""
        rest, j = self.rest, slice(*cols)
        shape = (*self.q.shape[:-2], rows[1] - rows[0], cols[1] - cols[0])
        return Block(
            cols,
            self.k[..., j, :],
            self.v[..., j, :],
            None if rest.bias is None else rest.bias.part(rows, cols, self.q.shape[-2]),
            self.mask.tile(rows, cols, self.q) if mixed else None,  # type: ignore[union-attr]  # by the mask
            None if rest.dropout is None else rest.dropout.part(rows, cols).dense(shape, self.q),
        )

    def drop(self, a: Array, block: Block) -> Array:
        """a ⊙ keep / (1 − rate)"""
        return a if self.rest.dropout is None else drop(a, block.keep, self.rest.dropout.rate)

    def scores(self, q: Array, block: Block) -> tuple[Array, Array]:
        """z (..., H, R, N) = softcap · t + bias, −∞ where not mask     and t = tanh(q kᵀ / softcap), or None"""
        xp, softcap, t = namespace(q), self.rest.softcap, None
        z = self.scaled(times_keys(q, block.k, self.half))
        if softcap is not None:
            t = into(z, xp.tanh, into(z, xp.divide, z, softcap))
            z = softcap * t
        if block.bias is not None:
            z = into(z, xp.add, z, block.bias.dense(*z.shape[-2:]))
        return z if block.allowed is None else replaced(z, block.allowed, -INF), t

    def exponentials(self, x: Rows, block: Block) -> tuple[Array, Array]:
        """e = exp(z − row_max) / norm, so that a weight is e / total     and t"""
        z, t = self.scores(x.q, block)
        e = exp_less(z, x.top)
        return e if x.norm is None else e / x.norm, t


def exp_less(z: Array, top: Array) -> Array:
    """exp(z − top), in the memory of z"""
    xp = namespace(z)
    return into(z, xp.exp, into(z, xp.subtract, z, top))


def block_sizes(q: Array, k: Array, plan: Plan) -> tuple[int, int]:
    """Rows and columns of a block; T and S where all scores are held at once"""
    numbers = prod(q.shape[:-2]) * np.dtype(dtype_name(q)).itemsize
    return plan.block(numbers, q.shape[-2], k.shape[-2], isinstance(q, np.ndarray))


def ranges(some: Range, size: int) -> list[Range]:
    """start … stop in ranges of `size`, the last one shorter"""
    return [(i, min(i + size, some[1])) for i in range(some[0], some[1], max(size, 1))]


def place(some: Range, like: Array) -> Place:
    """Where some queries or keys are in an array (..., T or S, ·)"""
    return some, (0, like.shape[-1])


# ── the heads that read one are rows of one product ──────────────────────────────────────────────────────────────


def times_keys(a: Array, k: Array, half: str | None = None) -> Array:
    """a kᵀ     a (..., H, R, D)   k (..., K, N, D)   →   (..., H, R, N)"""
    return _apart(product(_together(a, k), namespace(a).matrix_transpose(k), half), a)


def times_rows(a: Array, k: Array, half: str | None = None) -> Array:
    """a k     a (..., H, R, N)   k (..., K, N, D)   →   (..., H, R, D)"""
    return _apart(product(_together(a, k), k, half), a)


def sum_over_rows(a: Array, b: Array, k: Array, half: str | None = None) -> Array:
    """aᵀ b, summed over the heads that read one     a (..., H, R, N)   b (..., H, R, D)   →   (..., K, N, D) as k"""
    return product_of_transposed(_together(a, k), _together(b, k), half)


def _together(a: Array, k: Array) -> Array:
    """a (..., H, R, ·)   →   (..., K, H // K · R, ·) as k"""
    if a.ndim < 3 or a.shape[-3] == k.shape[-3]:
        return a
    *batch, H, R, width = a.shape
    return namespace(a).reshape(a, (*batch, k.shape[-3], H // k.shape[-3] * R, width))


def _apart(a: Array, like: Array) -> Array:
    """a (..., K, H // K · R, ·)   →   (..., H, R, ·) as like"""
    return a if a.shape[:-1] == like.shape[:-1] else namespace(a).reshape(a, (*like.shape[:-1], a.shape[-1]))


# ── Σ p g without cancellation ───────────────────────────────────────────────────────────────────────────────────


def centred(pairs: Iterable[tuple[Array, Array]], zero: Array) -> tuple[Array, Array]:
    """m, the g of the largest e of each row, and Σ e (g − m)     of pairs e, g (..., R, N)   →   (..., R, 1) as zero

    As `funcmha.ops.softmax_with_sink_vjp` centres it, but with the largest so far: where a larger one comes, what was
    summed is moved to its g. No large numbers cancel, for what was summed has not the largest weight.
    """
    xp = namespace(zero)
    largest, m, mean, seen = zero, zero, zero, zero
    for e, g in pairs:
        at = xp.argmax(e, axis=-1, keepdims=True)
        here = xp.take_along_axis(e, at, axis=-1)
        moved = xp.where(here > largest, xp.take_along_axis(g, at, axis=-1), m)
        mean = mean + seen * (m - moved) + xp.sum(e * (g - moved), axis=-1, keepdims=True)
        largest, m, seen = xp.where(here > largest, here, largest), moved, seen + xp.sum(e, axis=-1, keepdims=True)
    return m, mean
