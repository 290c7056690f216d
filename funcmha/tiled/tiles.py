"""What is done with one tile of scores: made, used and forgotten.

Exponentials are powers of two, which NumPy computes faster and more accurately than powers of e: the scores here are
s = log₂e · z. Before the exponential a shift c is subtracted from each row. By Cauchy and Schwarz no score exceeds
m = |q| max |k|. Where m ≤ BOUND no exponential can overflow and no sum vanish, and nothing is shifted; else c is
m − BOUND, and only where the sum then comes out small is the true maximum of the row looked for. The backward uses the
same shift, and so has the same exponentials to the bit; made from the log-sum-exp they would lose |s| ulps.

Axes: T queries, S keys, D query/key width, E value width; R rows and N columns of a tile.
"""

import threading
from math import e, log, log2
from typing import Any, NamedTuple

import numpy as np

from funcmha._xp import Array
from funcmha.masks import Mask, Range

LOG2E, LN2 = log2(e), log(2)
BOUND = 60.0  # |s| up to which 2^s can be summed in float32 without a shift: 65536 terms stay below 2^76
FLOOR = 2.0**-40  # a sum of 2^(s − c) below this may have lost keys to underflow
# Of a tile, at most: smaller ones fit a level 2 cache better, but then threads meet more often in the interpreter.
ROWS, COLS = 512, 512


class Tile(NamedTuple):
    rows: Range
    cols: Range
    mixed: bool  # whether the mask hides some of it


class Head(NamedTuple):
    q: Array  # (T, D)
    k: Array  # (S, D)
    v: Array  # (S, E)
    bias: Array  # (T, S) or None
    mask: Mask | None  # (T, S), or with a head axis
    h: int  # which of its heads
    keep: Array  # (T, S) or None
    scale: float
    rate: float

    def tiles(self, rows: Range) -> list[list[Tile]]:
        """The tiles of these rows, in blocks of columns from left to right."""
        S = len(self.k)
        start, stop = (0, S) if self.mask is None else self.mask.columns(rows, S)
        found, width = [], columns(len(self.q))
        for j in range(start - start % width, stop, width):  # on one grid for all rows, as the backward needs it
            cols = (max(j, start), min(j + width, stop))
            block = [Tile(rows, cols, mixed=False)] if self.mask is None else _parts(self.mask, rows, cols)
            if block:
                found.append(block)
        return found

    def scores(self, q: Array, tile: Tile) -> Array:
        """s = q kᵀ + log₂e · bias     q (R, D), these rows times scale · log₂e   →   s (R, N)"""
        rows, cols = slice(*tile.rows), slice(*tile.cols)
        s = np.matmul(q, self.k[cols].T, out=_scratch("s", (len(q), cols.stop - cols.start), q.dtype))
        if self.bias is not None:
            s += LOG2E * self.bias[rows, cols]
        return s

    def exponentials(self, q: Array, tile: Tile, shift: Array) -> Array:
        """2^(s − c)     the same bits whenever it is asked for   →   (R, N)"""
        s = self.scores(q, tile)
        if shift is not None:  # above the shift by more than BOUND are only scores that the mask hides
            np.minimum(np.subtract(s, shift[:, None], out=s), 2 * BOUND, out=s)
        np.exp2(s, out=s)
        if tile.mixed:
            self.hide(s, tile, 0.0)
        return s

    def hide(self, a: Array, tile: Tile, value: float) -> None:
        """a = value where not mask"""
        assert self.mask is not None
        allowed = self.mask.tile(tile.rows, tile.cols)
        allowed = allowed[self.h if len(allowed) > 1 else 0] if allowed.ndim == 3 else allowed
        np.copyto(a, value, where=~allowed)

    def drop(self, a: Array, tile: Tile) -> Array:
        """a ⊙ keep / (1 − rate)"""
        if self.keep is None:
            return a
        return np.where(self.keep[slice(*tile.rows), slice(*tile.cols)], a / (1 - self.rate), 0.0)


def _parts(mask: Mask, rows: Range, cols: Range) -> list[Tile]:
    """A block, without what the mask empties: by halves, if that spares anything."""
    answer, area = mask.block(rows, cols), (rows[1] - rows[0]) * (cols[1] - cols[0])
    if answer != "mixed":
        return [Tile(rows, cols, mixed=False)] if answer == "full" else []
    if 4 * area <= ROWS * COLS:
        return [Tile(rows, cols, mixed=True)]
    quarters = [_parts(mask, r, c) for r in _halves(rows) for c in _halves(cols)]
    found = [tile for quarter in quarters for tile in quarter]
    spared = area - sum((r[1] - r[0]) * (c[1] - c[0]) for r, c, _ in found)
    return found if spared else [Tile(rows, cols, mixed=True)]


def _halves(a: Range) -> tuple[Range, Range]:
    middle = (a[0] + a[1] + 1) // 2
    return (a[0], middle), (middle, a[1])


def forward(head: Head, rows: Range, longest: float) -> tuple[Array, Array, Array]:
    """o (R, E), the sums of exponentials (R), and the shift of the rows (R) or None"""
    q, tiles = (head.scale * LOG2E) * head.q[slice(*rows)], [tile for block in head.tiles(rows) for tile in block]
    m = longest * np.sqrt(np.einsum("td,td->t", q, q).max(initial=0.0))
    shift = _guess(head, rows, tiles, m)
    total, acc = _sums(head, q, rows, tiles, shift)
    if not np.all(total >= FLOOR):
        shift = _maximum(head, q, rows, tiles)
        total, acc = _sums(head, q, rows, tiles, shift)
    return acc / np.where(total == 0, 1.0, total)[:, None], total, shift


def _guess(head: Head, rows: Range, tiles: list[Tile], m: float) -> Array:
    """A whole shift c with s − c ≤ BOUND for certain, and not far below it in all likelihood; None for none."""
    c = np.maximum(m - BOUND, 0.0)
    if head.bias is not None and tiles:
        visible = slice(tiles[0].cols[0], tiles[-1].cols[1])
        top = LOG2E * head.bias[slice(*rows), visible].max(axis=-1)
        return np.ceil(c + np.where(np.isfinite(top), top, 0.0))
    return np.full(rows[1] - rows[0], np.ceil(c)) if c > 0 else None


def _sums(head: Head, q: Array, rows: Range, tiles: list[Tile], shift: Array) -> tuple[Array, Array]:
    """Σ 2^(s − c) (rows) and Σ dropout(2^(s − c)) v (rows, E)"""
    E = head.v.shape[-1]
    total, acc = np.zeros(len(q), q.dtype), np.zeros((len(q), E), q.dtype)
    for tile in tiles:
        i = _within(rows, tile)
        e = head.exponentials(q[i], tile, None if shift is None else shift[i])
        total[i] += e @ np.ones(len(e.T), e.dtype)
        acc[i] += np.matmul(head.drop(e, tile), head.v[slice(*tile.cols)], out=_scratch("o", (len(e), E), q.dtype))
    return total, acc


def _maximum(head: Head, q: Array, rows: Range, tiles: list[Tile]) -> Array:
    """The largest score of each row, 0 where there is none"""
    top = np.full(len(q), -np.inf, q.dtype)
    for tile in tiles:
        i = _within(rows, tile)
        s = head.scores(q[i], tile)
        if tile.mixed:
            head.hide(s, tile, -np.inf)
        top[i] = np.maximum(top[i], s.max(axis=-1))
    return np.where(top == -np.inf, 0.0, top)


def _within(rows: Range, tile: Tile) -> slice:
    """The rows of a tile, counted from the first of `rows`."""
    return slice(tile.rows[0] - rows[0], tile.rows[1] - rows[0])


class Rows(NamedTuple):
    """What a backward needs to know of some rows. The weights are p = 2^(s − c) · inverse, never made as such."""

    q: Array  # (R, D), times scale · log₂e
    shift: Array  # (R) or None
    inverse: Array  # (R, 1), of the sum of exponentials
    d: Array  # (R, E + 1), [do, dlse − δ] · inverse


def backward(
    head: Head,
    tile: Tile,
    x: Rows,
    v1: Array,
    dweights: Array,
    dq: Array,
    dk: Array,
    dv: Array,
) -> Array:
    """Add the share of one tile to dq (R, D), dk (N, D) and dv (N, E); return its dz (R, N), good until the next tile.

    v1 (N, E + 1) is [v, 1], so that d · v1ᵀ is (dp − δ + dlse) · inverse; dweights is (R, N) or None.
    """
    (n, D), (N, E), dtype = x.q.shape, dv.shape, v1.dtype
    e = head.exponentials(x.q, tile, x.shift)
    dv += np.matmul(head.drop(e, tile).T, x.d[:, :E], out=_scratch("n", (N, E), dtype))
    if head.keep is None:
        dp = np.matmul(x.d, v1.T, out=_scratch("dp", (n, N), dtype))
    else:
        dp = head.drop(x.d[:, :E] @ v1[:, :E].T, tile) + x.d[:, E:]
    if dweights is not None:
        dp += dweights * x.inverse
    dz = np.multiply(e, dp, out=dp)
    dq += np.multiply(
        np.matmul(dz, head.k[slice(*tile.cols)], out=(t := _scratch("r", (n, D), dtype))), head.scale, out=t
    )
    dk += np.multiply(np.matmul(dz.T, x.q, out=(t := _scratch("n", (N, D), dtype))), LN2, out=t)
    return dz


def mean_cotangent(head: Head, tile: Tile, x: Rows, dweights: Array) -> Array:
    """Σ p dweights over one tile (R)"""
    e = head.exponentials(x.q, tile, x.shift)
    return np.einsum("ts,ts->t", e, dweights) * x.inverse[:, 0]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, Any], Array] = {}


_local = _Scratch()


def _scratch(name: str, shape: tuple[int, int], dtype: Any) -> Array:
    """An uninitialised array that belongs to this thread until it asks for the same name again."""
    size = shape[0] * shape[1]
    buffer = _local.buffers.get((name, dtype))
    if buffer is None or buffer.size < size:
        buffer = _local.buffers[name, dtype] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def columns(T: int) -> int:
    """Columns of a tile: more where there are few rows, as when one token is decoded against a long cache."""
    return max(COLS, ROWS * COLS // max(T, 1))


def blocks(n: int, size: int) -> list[Range]:
    """0 … n in ranges of `size`, the last one shorter"""
    return [(i, min(i + size, n)) for i in range(0, n, size)]
