"""The plan of an engine: every threshold, with its unit and the measurement behind it.

A plan decides how a result is made, and so its last bits and its time, never what it is. `engine._replace(plan=…)` is
an engine with another one.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, C input width.
"""

from itertools import pairwise
from math import isqrt, prod
from numbers import Real
from sys import maxsize
from typing import NamedTuple


class Plan(NamedTuple):
    # ── attention in tiles ──
    tile_rows: int = 512  # queries; smaller tiles fit a level 2 cache better, but then threads meet in the interpreter
    tile_cols: int = 512  # keys
    tile_cut: int = 4  # into which a tile is cut at most, for what a mask leaves out: smaller pieces make more calls
    many_heads: int = 12  # that go together, from which on masked tiles are half as high and wide, and cut no further
    many_tokens: int = 2048  # up to which they are so: of more, the diagonal is a small part (docs/decisions/0042)
    stack_numbers: int = 2**20  # scores, one tile for each of the heads that go together (docs/decisions/0037)
    sample_numbers: int = 2**19  # the same, up to which samples go together too (docs/decisions/0044)
    whole_scores: int = 2**12  # of a head, up to which a mask cuts nothing off: samples of other masks go together
    guess_keys: int = 32  # from whose scores the row maximum is guessed
    few_queries: int = 16  # that read one key/value head, up to which they are rows of one product, faster than tiles
    few_block: int = 128  # keys in one product of few queries: OpenBLAS has faster kernels for small products
    # ── attention in blocks ──
    score_bytes: int = 2**24  # of scores of all heads and samples held at once, and of a block where there are more
    numpy_bytes: int = 2**21  # the same of NumPy's arrays, as fits a processor's cache (docs/decisions/0035)
    half_products: bool = False  # of half types, of factors rounded to them and summed in float32, where a library can
    block_side: int = 128  # queries and keys of a block at least: below that its scores are no more than q, k and v
    # ── projections ──
    joined: int = 512  # columns of q, k or v, up to which those of one input are one product, if there are
    joined_rows: int = 2048  # rows: of fewer it costs more to copy their parameters (docs/decisions/0044)
    wide: int = 256  # columns of q, k or v, up to which the gradient of their one input is of one product
    copied_rows: int = 8192  # of x above which w is transposed first: takes 2 ms, saves a 20th of a product
    linear_rows: int = 512  # of x in one task: fixed, so that no result depends on the number of threads
    linear_cols: int = 256  # of y, or of dx, in one task, where there are no more rows than those of one
    weight_block: int = 384  # rows and columns of dw in one task: larger is faster, but then one thread waits
    terms: int = 384  # of a sum before it is added to the others, where BLAS does not do that (docs/decisions/0037)
    small_product: int = 10**6  # multiplications up to which OpenBLAS does not, but adds up all terms in turn
    # ── several heads at once ──
    kept_numbers: int = maxsize  # of o, up to which q, k and v are kept; with more, they are projected again
    kept_long: int = 2**18  # the same of long sequences, whose q, k and v are projected again for next to no time
    group_numbers: int = 2**20  # of q, k and v of the heads that go together, or as many columns of k as follows
    group_columns: int = 768  # a product as wide is as fast as a wider one
    group_long: int = 128  # the same of long sequences, whose projections take little time and much memory
    # ── threads ──
    thread_flops: float = 5e7  # that one thread has done before another has woken up and taken over
    thread_tasks: int = 4  # of attention, from which on for each thread it does not matter which ends last

    def check(self) -> None:
        """Raise for a size that is no size, TypeError or ValueError: a negative block would leave out a part of the
        result.
        """
        for name, n in self._asdict().items():
            least = 0 if name in MAY_BE_ZERO else 1
            if not isinstance(n, Real):
                raise TypeError(f"plan.{name} must be a number, got {n!r}")
            if not float(n) >= least:
                raise ValueError(f"plan.{name} must be at least {least}, got {n!r}")

    def of_masked(self, H: int, K: int, T: int, S: int) -> "Plan":
        """The plan for masked attention: where many heads go together smaller tiles make fewer calls, not more"""
        together = H if H == K else H // max(K, 1)
        if together < self.many_heads or max(T, S) > self.many_tokens:
            return self
        rows, cols = max(self.tile_rows // 2, 1), max(self.tile_cols // 2, 1)
        return self._replace(tile_rows=rows, tile_cols=cols, tile_cut=1, many_heads=maxsize)

    def columns(self, T: int) -> int:
        """Keys of a tile: more where there are few queries, as when one token is decoded against a long cache"""
        return max(self.tile_cols, self.tile_rows * self.tile_cols // max(T, 1))

    def block(self, number: int, T: int, S: int, numpy: bool) -> tuple[int, int]:
        """Queries and keys of a block of scores, of `number` bytes each in all heads and samples: T and S where all fit

        Four times as many keys as queries: then a causal mask empties more, and sums of rows are scaled less often.
        """
        held = self.numpy_bytes if numpy else self.score_bytes
        if number * T * S <= held or max(T, S) <= self.block_side:
            return T, S
        area = held // number
        rows = min(T, max(_round(isqrt(area // 4)), self.block_side))
        cols = min(S, max(_round(area // rows), self.block_side))
        return min(T, max(rows, _round(area // cols))), cols

    def stacks(self, H: int, K: int, T: int, S: int, least: int) -> list[list[slice]]:
        """0 … H in ranges of heads that go together, of `stack_numbers` scores in a tile each, but so many at `least`

        In lists of those that read one key/value head: a range has heads of one, or, where each has its own, of many.
        """
        size = max(self.stack_numbers // max(min(T, self.tile_rows) * min(S, self.columns(T)), 1), 1)
        size = max(min(size, H // max(least, 1)), 1)
        if H == K:
            return [[h] for h in evenly(0, H, size)]
        return [evenly(h, h + H // K, size) for h in range(0, H, H // max(K, 1))]

    def samples(self, heads: int, T: int, S: int, most: int) -> int:
        """Samples that go together, of so many heads each, `sample_numbers` of scores, and so many at most"""
        numbers = heads * min(T, self.tile_rows) * min(S, self.columns(T))
        return max(min(self.sample_numbers // max(numbers, 1), self.stack_numbers // max(numbers, 1), most), 1)

    def is_whole(self, T: int, S: int) -> bool:
        """Whether a mask cuts nothing off from the tiles of a head"""
        return self.whole_scores >= T * S

    def recomputed(self, T: int, S: int, C: int) -> int:
        """How many of q, k and v can be projected again in a seventh of the time that all takes, forward and back

        For a row of a head, in units of D: to project once is 2 C, all projections and their vjp are 24 C, and
        attention and its vjp 14 min(T, S), or half of that if causal.
        """
        return min((24 * C + 14 * min(T, S)) // max(14 * C, 1), 3)

    def long(self, T: int, S: int, C: int) -> bool:
        """Whether to project all three again takes a twentieth or so of all time"""
        return min(T, S) >= 16 * C

    def keeps(self, numbers: int, T: int, S: int, C: int) -> bool:
        """Whether q, k and v are kept for the gradient, beside an o of so many numbers"""
        return numbers <= (min(self.kept_long, self.kept_numbers) if self.long(T, S, C) else self.kept_numbers)

    def forward_ranges(
        self, batch: tuple[int, ...], T: int, S: int, H: int, K: int, D: int, E: int, C: int
    ) -> list[slice]:
        """The key/value heads to project at once: few, or all if the projections are kept anyhow"""
        return self.backward_ranges(batch, T, S, H, K, D, E, C) if self.long(T, S, C) else [slice(0, K)]

    def backward_ranges(
        self, batch: tuple[int, ...], T: int, S: int, H: int, K: int, D: int, E: int, C: int
    ) -> list[slice]:
        """The key/value heads whose gradient is taken at once"""
        numbers = prod(batch) * max(H // max(K, 1) * T, S) * (D + E)
        columns = min(self.group_long, self.group_columns) if self.long(T, S, C) else self.group_columns
        return evenly(0, K, max(self.group_numbers // max(numbers, 1), columns // max(D, 1), 1))


# Memory above speed: the gradient takes few heads at a time, and projects q, k and v again.
LEAN = Plan(stack_numbers=2**18, many_heads=maxsize, joined=0, kept_numbers=2**18, group_numbers=2**18, group_columns=1)

# Of a sample, up to which BATCHED is the default for NumPy's arrays: up to twice as fast of a few samples, and about as
# fast of many at as many scores as these (docs/decisions/0044).
FEW_SCORES = 5_000  # scores of all heads
FEW_SHARED_KEYS = 128  # keys, where heads share key/value heads: they are copied for each head


def _round(n: int) -> int:
    """A multiple of 64 below n, if there is one: products of such sizes have no rest"""
    return max(n - n % 64, min(n, 64))


MAY_BE_ZERO = (
    *("sample_numbers", "whole_scores", "few_queries", "score_bytes", "numpy_bytes", "half_products"),
    *("joined", "wide", "copied_rows", "small_product", "kept_numbers", "kept_long"),
    *("group_numbers", "group_columns", "group_long", "thread_flops"),
)


def evenly(start: int, stop: int, size: int) -> list[slice]:
    """start … stop in ranges of about the same size, this at most"""
    n = -(-(stop - start) // size)
    ends = [start + (stop - start) * i // n for i in range(n + 1)] if n else [start]
    return [slice(a, b) for a, b in pairwise(ends)]
