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
ROWS, COLS = 256, 256  # of a tile: two of float32 fit in a level 2 cache


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

    def tiles(self, rows: Range) -> list[tuple[Range, bool]]:
        """The column ranges that these rows may see, and whether the mask has to be asked."""
        S = len(self.k)
        start, stop = (0, S) if self.mask is None else self.mask.columns(rows, S)
        found, width = [], columns(len(self.q))
        for j in range(start - start % width, stop, width):  # on one grid for all rows, as the backward needs it
            cols = (max(j, start), min(j + width, stop))
            block = "full" if self.mask is None else self.mask.block(rows, cols)
            if block != "empty":
                found.append((cols, block == "mixed"))
        return found

    def scores(self, q: Array, rows: Range, cols: Range) -> Array:
        """s = q kᵀ + log₂e · bias     q (R, D), these rows times scale · log₂e   →   s (R, N)"""
        s = np.matmul(q, self.k[slice(*cols)].T, out=_scratch("s", (len(q), cols[1] - cols[0]), q.dtype))
        if self.bias is not None:
            s += LOG2E * self.bias[slice(*rows), slice(*cols)]
        return s

    def exponentials(self, q: Array, rows: Range, cols: Range, mixed: bool, shift: Array) -> Array:
        """2^(s − c)     the same bits whenever it is asked for   →   (R, N)"""
        s = self.scores(q, rows, cols)
        if shift is not None:  # above the shift by more than BOUND are only scores that the mask hides
            np.minimum(np.subtract(s, shift[:, None], out=s), 2 * BOUND, out=s)
        np.exp2(s, out=s)
        if mixed:
            self.hide(s, rows, cols, 0.0)
        return s

    def hide(self, a: Array, rows: Range, cols: Range, value: float) -> None:
        """a = value where not mask"""
        assert self.mask is not None
        tile = self.mask.tile(rows, cols)
        tile = tile[self.h if len(tile) > 1 else 0] if tile.ndim == 3 else tile
        np.copyto(a, value, where=~tile)

    def drop(self, a: Array, rows: Range, cols: Range) -> Array:
        """a ⊙ keep / (1 − rate)"""
        if self.keep is None:
            return a
        return np.where(self.keep[slice(*rows), slice(*cols)], a / (1 - self.rate), 0.0)


def forward(head: Head, rows: Range, longest: float) -> tuple[Array, Array, Array]:
    """o (R, E), the sums of exponentials (R), and the shift of the rows (R) or None"""
    q, tiles = (head.scale * LOG2E) * head.q[slice(*rows)], head.tiles(rows)
    m = longest * np.sqrt(np.einsum("td,td->t", q, q).max(initial=0.0))
    shift = _guess(head, rows, tiles, m)
    total, acc = _sums(head, q, rows, tiles, shift)
    if not np.all(total >= FLOOR):
        shift = _maximum(head, q, rows, tiles)
        total, acc = _sums(head, q, rows, tiles, shift)
    return acc / np.where(total == 0, 1.0, total)[:, None], total, shift


def _guess(head: Head, rows: Range, tiles: list[Any], m: float) -> Array:
    """A whole shift c with s − c ≤ BOUND for certain, and not far below it in all likelihood; None for none."""
    c = np.maximum(m - BOUND, 0.0)
    if head.bias is not None and tiles:
        visible = slice(tiles[0][0][0], tiles[-1][0][1])
        top = LOG2E * head.bias[slice(*rows), visible].max(axis=-1)
        return np.ceil(c + np.where(np.isfinite(top), top, 0.0))
    return np.full(rows[1] - rows[0], np.ceil(c)) if c > 0 else None


def _sums(head: Head, q: Array, rows: Range, tiles: list[Any], shift: Array) -> tuple[Array, Array]:
    """Σ 2^(s − c) (rows) and Σ dropout(2^(s − c)) v (rows, E)"""
    n, E = len(q), head.v.shape[-1]
    total, acc = np.zeros(n, q.dtype), np.zeros((n, E), q.dtype)
    for cols, mixed in tiles:
        e = head.exponentials(q, rows, cols, mixed, shift)
        total += e @ np.ones(len(e.T), e.dtype)
        acc += np.matmul(head.drop(e, rows, cols), head.v[slice(*cols)], out=_scratch("o", (n, E), q.dtype))
    return total, acc


def _maximum(head: Head, q: Array, rows: Range, tiles: list[Any]) -> Array:
    """The largest score of each row, 0 where there is none"""
    top = np.full(len(q), -np.inf, q.dtype)
    for cols, mixed in tiles:
        s = head.scores(q, rows, cols)
        if mixed:
            head.hide(s, rows, cols, -np.inf)
        top = np.maximum(top, s.max(axis=-1))
    return np.where(top == -np.inf, 0.0, top)


class Rows(NamedTuple):
    """What a backward needs to know of some rows. The weights are p = 2^(s − c) · inverse, never made as such."""

    q: Array  # (R, D), times scale · log₂e
    shift: Array  # (R) or None
    inverse: Array  # (R, 1), of the sum of exponentials
    d: Array  # (R, E + 1), [do, dlse − δ] · inverse


def backward(
    head: Head,
    rows: Range,
    cols: Range,
    mixed: bool,
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
    e = head.exponentials(x.q, rows, cols, mixed, x.shift)
    dv += np.matmul(head.drop(e, rows, cols).T, x.d[:, :E], out=_scratch("n", (N, E), dtype))
    if head.keep is None:
        dp = np.matmul(x.d, v1.T, out=_scratch("dp", (n, N), dtype))
    else:
        dp = head.drop(x.d[:, :E] @ v1[:, :E].T, rows, cols) + x.d[:, E:]
    if dweights is not None:
        dp += dweights * x.inverse
    dz = np.multiply(e, dp, out=dp)
    dq += np.multiply(np.matmul(dz, head.k[slice(*cols)], out=(t := _scratch("r", (n, D), dtype))), head.scale, out=t)
    dk += np.multiply(np.matmul(dz.T, x.q, out=(t := _scratch("n", (N, D), dtype))), LN2, out=t)
    return dz


def mean_cotangent(head: Head, rows: Range, x: Rows, dweights: Array) -> Array:
    """Σ p dweights (R)"""
    total = np.zeros(len(x.q), x.q.dtype)
    for cols, mixed in head.tiles(rows):
        e = head.exponentials(x.q, rows, cols, mixed, x.shift)
        total += np.einsum("ts,ts->t", e, dweights[:, slice(*cols)])
    return total * x.inverse[:, 0]


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
