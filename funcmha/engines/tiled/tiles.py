"""What is done with one tile of scores: made, used and dropped.

Exponentials are powers of two, which NumPy computes faster and more accurately than powers of e: the scores here are
s = log₂e · z. Before the exponential a number c near its maximum, `row_max`, is subtracted from each row. By Cauchy and
Schwarz no score exceeds m = |q| max |k|. Where m ≤ BOUND no exponential can overflow and no sum vanish, and nothing is
subtracted; else c is m − BOUND, or the largest score of some keys where that is less, and only where the sum then comes
out too small or too large is the true maximum of the row looked for. c is a whole number, so that the log-sum-exp has
the digits of the sum. The backward subtracts the same c, and so has the same exponentials, from the same q and k to the
bit; made from the log-sum-exp they would lose |s| ulps.

Several heads go together where sequences are short, of one sample or of several: then a tile is one of each, and a call
of NumPy makes them all. Its cost, and that of waiting for the interpreter's lock after it, is that of a 256 × 256
product.

Axes: G heads, T queries, S keys, D query/key width, E value width; R rows and N columns of a tile; `...` is an axis of
samples, where these go together.
"""

from math import e, log, log2, prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array
from funcmha.biases import toeplitz
from funcmha.dropout import Seeded
from funcmha.engines.plan import Plan
from funcmha.masks import Mask, Range

from .dominant import Dominant, Heavy, dominant_keys, heaviest
from .products import product
from .threads import scratch

LOG2E, LN2 = log2(e), log(2)
BOUND = 60.0  # |s| up to which 2^s can be summed in float32 as they are: 65536 terms stay below 2^76
FLOOR = 2.0**-40  # a sum of 2^(s − c) below this may have lost keys to underflow
FLOOR_OF_KEYS = 2.0**-6  # the same where one key has more than half of it, and the others count, however small
CEILING = 2.0**80  # and one above this was cut off: the scores are far above c


class Tile(NamedTuple):
    rows: Range
    cols: Range
    mixed: bool  # whether the mask forbids some of it

    @property
    def shape(self) -> tuple[int, int]:
        """(R, N)"""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


class Heads(NamedTuple):
    """Some heads, the same of each sample, that read one key/value head, repeated by a stride of 0, or each its own."""

    q: Array  # (..., G, T, D)
    k: Array  # (..., G, S, D)
    v: Array  # (..., G, S, E)
    bias: Array  # (..., G, T, S), or (..., G, T + S − 1) as of a `RelativeBias`, or None
    sink: Array  # (G, 1), or None; a score of −∞ is as good as none
    mask: Mask | None  # (..., H, T, S), of all heads, or with fewer axes
    samples: Range  # which ones
    h: slice  # which heads of them
    keep: Array | Seeded  # (..., G, T, S), or by the sample and the head, or None
    rate: float
    scale: Array  # (G, 1, 1)
    softcap: Array  # (G, 1, 1) or None
    plan: Plan

    @property
    def score_scale(self) -> Array:
        """What q is multiplied by before its product with the keys: that is s, z less the bias, or u / softcap"""
        if self.softcap is not None:
            return self.rounded(self.scale / self.softcap)
        return self.rounded(self.scale * LOG2E if self.bias is None else self.scale)

    @property
    def scale_by_score_scale(self) -> Array:
        """Also where the scale is 0"""
        if self.softcap is not None:
            return self.rounded(self.softcap)
        return self.q.dtype.type(LN2 if self.bias is None else 1.0)

    @property
    def log2_sink(self) -> Array:
        """log₂e · sink (G, 1)"""
        return self.rounded(LOG2E * self.sink)

    def rounded(self, x: Array) -> Array:
        """A number of each head, which is float64, in the dtype computed with"""
        return x.astype(self.q.dtype)

    def scaled_q(self, rows: Range) -> Array:
        """These rows of q (..., G, R, D), times `score_scale`"""
        return self.score_scale * self.q[..., slice(*rows), :]

    def columns(self, rows: Range) -> Range:
        """The columns outside which these rows attend nothing"""
        S = self.k.shape[-2]
        return (0, S) if self.mask is None or self.is_whole else self.mask.columns(rows, S)

    def all_tiles(self, rows: Range) -> list[Tile]:
        """The tiles of these rows, from left to right."""
        return [tile for block in self.tiles(rows) for tile in block]

    def of_all_rows(self) -> list[Tile]:
        """The tiles of all rows, in blocks as high as those of the forward."""
        return [tile for rows in blocks(self.q.shape[-2], self.plan.tile_rows) for tile in self.all_tiles(rows)]

    def tiles(self, rows: Range) -> list[list[Tile]]:
        """The same in blocks of columns."""
        start, stop = self.columns(rows)
        found, width = [], self.plan.columns(self.q.shape[-2])
        for j in range(start - start % width, stop, width):  # on one grid for all rows, as the backward needs it
            cols = (max(j, start), min(j + width, stop))
            if self.mask is None:
                block = [Tile(rows, cols, mixed=False)]
            elif self.is_whole:
                block = [Tile(rows, cols, mixed=self.mask.block(rows, cols) != "full")]
            else:
                block = _parts(self.mask, rows, cols, self.plan)
            if block:
                found.append(block)
        return found

    @property
    def is_whole(self) -> bool:
        """Whether the mask cuts nothing off"""
        return self.plan.is_whole(self.q.shape[-2], self.k.shape[-2])

    def scores(self, q: Array, tile: Tile, slope: Array = None) -> Array:
        """s = log₂e · (softcap · tanh(q kᵀ) + bias), log₂e · (q kᵀ + bias) or q kᵀ

        q (..., G, R, D) is that of these rows, times `score_scale`. Into `slope`, where it is given, goes what the
        gradient of the soft cap is multiplied by, 1 − tanh².
        """
        k = self.k[..., slice(*tile.cols), :]
        s = np.matmul(q, k.swapaxes(-1, -2), out=scratch("s", (*q.shape[:-2], *tile.shape), q.dtype))
        return self.complete(s, tile, slope)

    def complete(self, s: Array, tile: Tile, slope: Array = None) -> Array:
        """`scores` from the product with the keys, in its place"""
        if self.softcap is not None:
            np.tanh(s, out=s)
            if slope is not None:
                np.subtract(1.0, np.multiply(s, s, out=slope), out=slope)
            s *= self.rounded(self.softcap * LOG2E if self.bias is None else self.softcap)
        if self.bias is not None:  # before log₂e, whose rounding would be that of a large bias, however small the sum
            s += self.bias_of(tile)
            s *= LOG2E
        return s

    def bias_of(self, tile: Tile) -> Array:
        """The bias of these scores (..., G, R, N)"""
        if self.bias.ndim < self.q.ndim:
            return toeplitz(self.bias, tile.rows, tile.cols, self.q.shape[-2])
        return self.bias[..., slice(*tile.rows), slice(*tile.cols)]

    def exponentials(self, q: Array, tile: Tile, row_max: Array, slope: Array = None) -> Array:
        """2^(s − c)     the same bits whenever it is asked for   →   (..., G, R, N)"""
        s = self.scores(q, tile, slope)
        if row_max is not None:
            np.subtract(s, row_max[..., None], out=s)
        if row_max is None and self.bias is None:
            np.exp2(s, out=s)
        else:
            powers_of_two(s)
        if tile.mixed:
            self.forbid(s, tile, 0.0)
        return s

    def forbid(self, a: Array, tile: Tile, value: float) -> None:
        """a = value where not mask"""
        allowed = self.mask.tile(tile.rows, tile.cols)  # type: ignore[union-attr]  # a tile is mixed by its mask
        allowed = allowed[..., self.h, :, :] if allowed.ndim > 2 and allowed.shape[-3] > 1 else allowed
        np.copyto(a, value, where=~allowed)

    def drop(self, a: Array, tile: Tile) -> Array:
        """a ⊙ keep / (1 − rate)"""
        if self.keep is None:
            return a
        if isinstance(self.keep, Seeded):
            keep = self.keep.tiles(self.samples, (self.h.start, self.h.stop), tile.rows, tile.cols)
            keep = keep.reshape(*self.q.shape[:-2], *tile.shape)
        else:
            keep = self.keep[..., slice(*tile.rows), slice(*tile.cols)]
        return np.where(keep, a / (1 - self.rate), 0.0)


def powers_of_two(s: Array) -> Array:
    """2^s in its place, 0 where that would be subnormal: a tile that is so in a tenth takes NumPy ten times longer.

    So far above c as to be cut off are only scores that the mask forbids, once `rows_forward` is done.
    """
    kind = np.finfo(s.dtype)
    np.exp2(np.clip(s, kind.minexp, log2(CEILING) + 1, out=s), out=s)
    if not s.min(initial=1.0) > kind.smallest_normal:
        np.multiply(s, s > kind.smallest_normal, out=s)
    return s


def _parts(mask: Mask, rows: Range, cols: Range, plan: Plan) -> list[Tile]:
    """A block, without what the mask empties: by halves, if that spares anything."""
    answer, area = mask.block(rows, cols), prod(Tile(rows, cols, mixed=True).shape)
    if answer != "mixed":
        return [Tile(rows, cols, mixed=False)] if answer == "full" else []
    if plan.tile_cut * area <= plan.tile_rows * plan.tile_cols or area == 1:
        return [Tile(rows, cols, mixed=True)]
    quarters = [_parts(mask, r, c, plan) for r in _halves(rows) for c in _halves(cols)]
    found = [tile for quarter in quarters for tile in quarter]
    spared = area - sum(prod(tile.shape) for tile in found)
    return found if spared else [Tile(rows, cols, mixed=True)]


def _halves(a: Range) -> tuple[Range, Range]:
    middle = (a[0] + a[1] + 1) // 2
    return (a[0], middle), (middle, a[1])


def rows_forward(heads: Heads, rows: Range, longest: Array, o: Array) -> tuple[Array, Array, Array]:
    """Write o (..., G, R, E)
    return the sums of exponentials, the sink's included (..., G, R); c or None; `dominant_keys` (..., G, R) or None
    """
    q = heads.scaled_q(rows)
    m = longest * np.sqrt(np.einsum("...td,...td->...t", q, q))
    if heads.softcap is not None or heads.bias is not None:
        m = LOG2E * (m if heads.softcap is None else heads.softcap[..., 0].astype(m.dtype) * np.minimum(m, 1.0))
    row_max, all_tiles = _guess(heads, q, rows, m), heads.all_tiles(rows)
    with np.errstate(over="ignore", invalid="ignore"):  # which is seen in the next line
        row_sum, acc, heavy = _sums(heads, q, rows, all_tiles, row_max)
        wrong = _wrong(row_sum, acc)
    if (key := dominant_keys(heavy, row_sum)) is not None:  # what the others have counts, however little it is
        wrong = wrong | (key >= 0) & (row_sum < FLOOR_OF_KEYS)
    if np.any(wrong):  # in whole tiles, as in the backward: a product of some of their rows would have other bits
        some = [tile for tile in all_tiles if wrong[..., within(rows, tile)].any()]
        row_max = np.where(wrong, _maximum(heads, q, rows, some), 0.0 if row_max is None else row_max)
        sum_again, acc_again, heavy_again = _sums(heads, q, rows, some, row_max)
        row_sum, acc = np.where(wrong, sum_again, row_sum), np.where(wrong[..., None], acc_again, acc)
        heavy = [x.of(~wrong) for x in heavy] + [x.of(wrong) for x in heavy_again]
        row_max = row_max if row_max.any() else None
    if heads.sink is not None:
        row_sum += of_sink(heads, row_max)
    np.divide(acc, (row_sum if row_sum.all() else np.where(row_sum == 0, 1.0, row_sum))[..., None], out=o)
    return row_sum, row_max, dominant_keys(heavy, row_sum)


def _wrong(row_sum: Array, acc: Array) -> Any:
    """Rows whose c was far from the maximum (..., G, R); False for none, which three numbers tell"""
    if row_sum.min() >= FLOOR and row_sum.max() <= CEILING and np.isfinite(acc.sum()):
        return False
    return ~((row_sum >= FLOOR) & (row_sum <= CEILING) & np.isfinite(acc).all(axis=-1))


def _guess(heads: Heads, q: Array, rows: Range, m: Array) -> Array:
    """A whole c with the largest s − c near 0 in all likelihood; None for none.

    None where it can be, for s − c loses as many digits as c has; else what some keys have, if it is less than the
    bound on all of them, which may be far too high.
    """
    if heads.bias is None and heads.sink is None and m.max() <= BOUND:
        return None
    top, (start, stop) = np.zeros(m.shape, q.dtype), heads.columns(rows)
    if heads.bias is not None and start < stop:
        largest = LOG2E * heads.bias_of(Tile(rows, (start, stop), mixed=True)).max(axis=-1)
        top = np.where(np.isfinite(largest), largest, top)
    c = np.where((m + top <= BOUND) & (top >= log2(FLOOR)), 0.0, np.maximum(m - BOUND, 0.0) + top)
    if c.any() and start < stop:
        some = (start, min(start + heads.plan.guess_keys, stop))
        likely = _largest(heads, q, Tile(rows, some, mixed=heads.mask is not None))
        c = np.where(likely > -np.inf, np.fmin(c, np.fmax(likely, 0.0)), c)
    if heads.sink is not None:
        c = np.maximum(c, heads.log2_sink - BOUND)
    return np.ceil(c) if c.any() else None


def _sums(heads: Heads, q: Array, rows: Range, some: list[Tile], row_max: Array) -> tuple[Array, Array, list[Heavy]]:
    """Over some tiles
    Σ 2^(s − c) (..., G, rows), Σ dropout(2^(s − c)) v (..., G, rows, E), and what may be over half of a sum
    """
    E, heavy = heads.v.shape[-1], list[Heavy]()
    row_sum, acc = np.zeros(q.shape[:-1], q.dtype), np.zeros((*q.shape[:-1], E), q.dtype)
    for tile in some:
        i = within(rows, tile)
        e = heads.exponentials(q[..., i, :], tile, None if row_max is None else row_max[..., i])
        row_sum[..., i] += e @ np.ones(e.shape[-1], e.dtype)
        if (found := heaviest(e, row_sum[..., i], i.start, tile.cols[0])) is not None:
            heavy.append(found)
        v = heads.v[..., slice(*tile.cols), :]
        product(heads.drop(e, tile), v, out=acc[..., i, :], add=len(some) > 1, plan=heads.plan)
    return row_sum, acc, heavy


def sums(heads: Heads, row_max: Array) -> Array:
    """The sums of exponentials of all rows, the sink's included (..., G, T)"""
    row_sum = np.zeros(heads.q.shape[:-1], heads.q.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # as in the forward, which has seen it
        for tile in heads.of_all_rows():
            i = slice(*tile.rows)
            e = heads.exponentials(heads.scaled_q(tile.rows), tile, None if row_max is None else row_max[..., i])
            row_sum[..., i] += e @ np.ones(e.shape[-1], e.dtype)
    return row_sum if heads.sink is None else row_sum + of_sink(heads, row_max)


def of_sink(heads: Heads, row_max: Array) -> Array:
    """2^(log₂e · sink − c)     (..., G, R), or (G, 1) for all rows"""
    return np.exp2(heads.log2_sink if row_max is None else heads.log2_sink - row_max)


def _maximum(heads: Heads, q: Array, rows: Range, some: list[Tile]) -> Array:
    """The largest score of each row in some tiles, rounded up, 0 where there is none   →   (..., G, R)"""
    top = np.full(q.shape[:-1], -np.inf, q.dtype)
    if heads.sink is not None:
        top[:] = heads.log2_sink
    for tile in some:
        i = within(rows, tile)
        top[..., i] = np.maximum(top[..., i], _largest(heads, q[..., i, :], tile))
    return np.where(top == -np.inf, 0.0, np.ceil(top))


def _largest(heads: Heads, q: Array, tile: Tile) -> Array:
    """The largest score of each row of a tile (..., G, R), −∞ where the mask hides all"""
    s = heads.scores(q, tile)
    if tile.mixed:
        heads.forbid(s, tile, -np.inf)
    return s.max(axis=-1)


def within(rows: Range, tile: Tile) -> slice:
    """The rows of a tile, counted from the first of `rows`."""
    return slice(tile.rows[0] - rows[0], tile.rows[1] - rows[0])


def inverse_of(row_sum: Array) -> Array:
    """1 / row_sum, 0 where that is 0"""
    return np.where(row_sum == 0, 0.0, 1 / np.where(row_sum == 0, 1.0, row_sum))


class Rows(NamedTuple):
    """What a backward needs to know of some rows. The weights are p = 2^(s − c) · inverse, never made as such."""

    q: Array  # (..., G, R, D), times `score_scale`
    row_max: Array  # (..., G, R) or None
    inverse: Array  # (..., G, R, 1), of the sum of exponentials
    d: Array  # (..., G, R, E + 1), [do, dlse − δ] · inverse


def tile_backward(
    heads: Heads,
    tile: Tile,
    x: Rows,
    v1: Array,
    dweights: Array,
    dominant: Dominant | None,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    only: bool = False,
) -> Array:
    """Add the share of one tile to dq (..., G, R, D), dk (..., G or 1, N, D) and dv (..., G or 1, N, E), or write it if
    it is the only; return its dz (..., G, R, N), good until the next tile

    v1 (..., G, N, E + 1) is [v, 1], so that d · v1ᵀ is (dp − δ + dlse) · inverse; dweights is (..., G, R, N) or None.
    At dominant keys dz is left out.
    """
    (*G, R, D), (N, E), dtype = x.q.shape, dv.shape[-2:], v1.dtype
    slope = None if heads.softcap is None else scratch("slope", (*G, R, N), dtype)
    e = heads.exponentials(x.q, tile, x.row_max, slope)
    a = heads.drop(e, tile)
    t = np.matmul(a.swapaxes(-1, -2), x.d[..., :E], out=dv if only else scratch("n", (*G, N, E), dtype))
    if not only:
        add_heads(dv, t)
    dz = score_cotangent(heads, tile, x, e, v1, dweights)
    if dominant is not None:
        dominant.leave_out(tile.rows, tile.cols, (dz,), (1.0 if slope is None else slope,))
    du = dz if slope is None else np.multiply(dz, slope, out=slope)
    t = product(du, heads.k[..., slice(*tile.cols), :], out=scratch("r", (*G, R, D), dtype), plan=heads.plan)
    np.multiply(t, heads.rounded(heads.scale), out=dq if only else t)
    if not only:
        dq += t
    t = np.matmul(du.swapaxes(-1, -2), x.q, out=scratch("n", (*G, N, D), dtype))
    np.multiply(t, heads.scale_by_score_scale, out=dk if only else t)
    if not only:
        add_heads(dk, t)
    return dz


def score_cotangent(heads: Heads, tile: Tile, x: Rows, e: Array, v1: Array, dweights: Array) -> Array:
    """dz = e (dp − δ + dlse) · inverse (..., G, R, N), good until the next tile     of the exponentials e"""
    E = v1.shape[-1] - 1
    if heads.keep is None:
        dp = np.matmul(x.d, v1.swapaxes(-1, -2), out=scratch("dp", e.shape, v1.dtype))
    else:
        dp = heads.drop(x.d[..., :E] @ v1[..., :E].swapaxes(-1, -2), tile) + x.d[..., E:]
    if dweights is not None:
        dp += _of_some(e, dweights) * x.inverse
    return np.multiply(e, dp, out=dp)


def add_heads(total: Array, x: Array) -> None:
    """total (..., G or 1, R, D) += x (..., G, R, D), head by head where there is one for all: then it is the same,
    however many go together
    """
    for h in range(x.shape[-3] // total.shape[-3]):
        total += x[..., h : h + total.shape[-3], :, :]


def mean_cotangent(heads: Heads, tile: Tile, x: Rows, dweights: Array) -> Array:
    """Σ p dweights over one tile (..., G, R)"""
    e = heads.exponentials(x.q, tile, x.row_max)
    return np.einsum("...ts,...ts->...t", e, _of_some(e, dweights)) * x.inverse[..., 0]


def _of_some(e: Array, dweights: Array) -> Array:
    """The cotangents of weights that are not 0, whatever the others are: the derivative of an entropy is −∞ there"""
    return np.where(e == 0, 0.0, dweights)


def blocks(n: int, size: int) -> list[Range]:
    """0 … n in ranges of `size`, the last one shorter"""
    return [(i, min(i + size, n)) for i in range(0, n, size)]
