"""Keys with more than half of the weight of their row: what they get is what the others leave.

A row of dz sums to something known, 0 if there is neither sink nor dlse. Where one weight is nearly 1, its dz is as
small as the sum of the others, and p (dp − δ) would be the difference of two large numbers. So dz is left out there
while the tiles are added up, and set at the end. The forward says which keys these are.

Axes: T queries, S keys, D width; R rows and N columns of a tile or of a block of them.
"""

from typing import Any, NamedTuple, Optional

import numpy as np

from funcmha._arrays import Array
from funcmha.masks import Range


class Heavy(NamedTuple):
    rows: Array
    keys: Array
    e: Array  # exponentials, of which each was over half of the sum of its row, as far as that had come

    def of(self, some: Array) -> "Heavy":
        """Those of some rows, by booleans for all"""
        return Heavy(*(a[some[self.rows]] for a in self))


def heaviest(e: Array, row_sum: Array, row: int, col: int) -> Heavy:
    """Of a tile that begins at this row and column"""
    cols = e.argmax(axis=-1)
    largest = e[np.arange(len(e)), cols]
    rows = np.flatnonzero(2 * largest > row_sum)
    return Heavy(row + rows, col + cols[rows], largest[rows])


def dominant_keys(heavy: list[Heavy], row_sum: Array) -> Array:
    """The keys with more than half of the weight (R), −1 where none has; None where none has in any row"""
    if not any(len(x.rows) for x in heavy):
        return None
    key = np.full(len(row_sum), -1)
    for x in heavy:
        over = 2 * x.e > row_sum[x.rows]
        key[x.rows[over]] = x.keys[over]
    return key


def over_half(e: Array, row_sum: Array, first: int) -> Array:
    """The same of whole rows e (..., S), whose keys begin with `first`     →   (...)"""
    if not e.shape[-1]:
        return np.full(row_sum.shape, -1)
    cols = e.argmax(axis=-1)
    return np.where(2 * np.take_along_axis(e, cols[..., None], axis=-1)[..., 0] > row_sum, first + cols, -1)


class Dominant(NamedTuple):
    key: Array  # (T), −1 where no key has more than half of the weight
    rest: tuple[Array, ...]  # (T), what is left out, summed over the other keys
    others: tuple[Array, ...]  # (T), other numbers of the key

    @staticmethod
    def of(key: Array, dtype: Any, sums: int, others: int) -> Optional["Dominant"]:
        """None where no row has such a key"""
        if not key.max(initial=-1) >= 0:
            return None
        zeros = [np.zeros(key.shape, dtype) for _ in range(sums + others)]
        return Dominant(key, tuple(zeros[:sums]), tuple(zeros[sums:]))

    def leave_out(self, rows: Range, cols: Range, arrays: tuple[Array, ...], others: tuple[Array | float, ...]) -> None:
        """Make the arrays (R, N) 0 at the keys, and add up the rest; keep the other numbers there"""
        i = slice(*rows)
        if not self.key[i].max() >= 0:
            return
        at = inside(self.key[i], cols)
        for a in arrays:
            a[at] -= a[at]  # NaN stays
        for number, other in zip(self.others, others, strict=True):
            number[i][at[0]] = np.broadcast_to(other, arrays[0].shape)[at]
        ones = np.ones(cols[1] - cols[0], arrays[0].dtype)
        for number, a in zip(self.rest, arrays, strict=True):
            number[i] += a @ ones

    def found(self) -> Array:
        """The rows that have one"""
        return np.flatnonzero(self.key >= 0)


def inside(key: Array, cols: Range) -> tuple[Array, Array]:
    """Rows and columns of a tile where its keys are"""
    rows = np.flatnonzero((key >= cols[0]) & (key < cols[1]))
    return rows, key[rows] - cols[0]


def add_to_keys(total: Array, keys: Array, a: Array) -> None:
    """total[keys] += a, where keys repeat       total (S, D)   keys (R)   a (R, D)"""
    order = np.argsort(keys, kind="stable")
    some, first = np.unique(keys[order], return_index=True)
    total[some] += np.add.reduceat(a[order], first, axis=0)
