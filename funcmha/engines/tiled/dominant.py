"""Keys with more than half of the weight of their row: what they get is what the others leave.

A row of dz sums to something known, 0 if there is neither sink nor dlse. Where one weight is nearly 1, its dz is as
small as the sum of the others, and p (dp − δ) would be the difference of two large numbers. So dz is left out there
while the tiles are added up, and set at the end. The forward says which keys these are.

Axes: G heads, T queries, S keys, D width; R rows and N columns of a tile or of a block of them; `...` is an axis of
samples, where these go together.
"""

from typing import Any, NamedTuple, Optional

import numpy as np

from funcmha._arrays import Array
from funcmha.masks import Range


class Heavy(NamedTuple):
    rows: tuple[Array, ...]  # head and row, before them the sample where several go together
    keys: Array
    e: Array  # exponentials, of which each was over half of the sum of its row, as far as that had come

    def of(self, some: Array) -> "Heavy":
        """Those of some rows, by booleans for all"""
        i = some[self.rows]
        return Heavy(tuple(axis[i] for axis in self.rows), self.keys[i], self.e[i])


def heaviest(e: Array, row_sum: Array, row: int, col: int) -> Heavy | None:
    """Of a tile e (G, R, N) that begins at this row and column; None where it has none"""
    twice = 2 * np.maximum.reduce(e, axis=None)
    if twice <= np.minimum.reduce(row_sum, axis=None):  # so it is of most tiles, and of none with a NaN
        return None
    at = np.nonzero(~(twice <= row_sum))
    if len(at[0]) > row_sum.size // 2:  # a copy of so many rows takes longer than to look at all
        cols = e.argmax(axis=-1)[at]
        largest = e[(*at, cols)]
    else:
        some = e[at]
        cols = some.argmax(axis=-1)
        largest = some[np.arange(len(some)), cols]
    over = 2 * largest > row_sum[at]
    *heads, t = (axis[over] for axis in at)
    return Heavy((*heads, row + t), col + cols[over], largest[over])


def dominant_keys(heavy: list[Heavy], row_sum: Array) -> Array:
    """The keys with more than half of the weight (..., G, R), −1 where none has; None where none has in any row"""
    if not any(len(x.keys) for x in heavy):
        return None
    key = np.full(row_sum.shape, -1)
    for x in heavy:
        over = 2 * x.e > row_sum[x.rows]
        key[tuple(axis[over] for axis in x.rows)] = x.keys[over]
    return key


def over_half(e: Array, row_sum: Array, first: int) -> Array:
    """The same of whole rows e (..., S), whose keys begin with `first`     →   (...)"""
    if not e.shape[-1]:
        return np.full(row_sum.shape, -1)
    cols = e.argmax(axis=-1)
    return np.where(2 * np.take_along_axis(e, cols[..., None], axis=-1)[..., 0] > row_sum, first + cols, -1)


class Dominant(NamedTuple):
    key: Array  # (..., G, T), −1 where no key has more than half of the weight
    rest: tuple[Array, ...]  # (..., G, T), what is left out, summed over the other keys
    others: tuple[Array, ...]  # (..., G, T), other numbers of the key

    @staticmethod
    def of(key: Array, dtype: Any, sums: int, others: int) -> Optional["Dominant"]:
        """None where no row has such a key"""
        if not key.max(initial=-1) >= 0:
            return None
        zeros = [np.zeros(key.shape, dtype) for _ in range(sums + others)]
        return Dominant(key, tuple(zeros[:sums]), tuple(zeros[sums:]))

    def leave_out(self, rows: Range, cols: Range, arrays: tuple[Array, ...], others: tuple[Array | float, ...]) -> None:
        """Make the arrays (..., G, R, N) 0 at the keys, and add up the rest; keep the other numbers there"""
        i = slice(*rows)
        if not self.key[..., i].max() >= 0:
            return
        at = inside(self.key[..., i], cols)
        for a in arrays:
            a[at] -= a[at]  # NaN stays
        for number, other in zip(self.others, others, strict=True):
            number[..., i][at[:-1]] = np.broadcast_to(other, arrays[0].shape)[at]
        ones = np.ones(cols[1] - cols[0], arrays[0].dtype)
        for number, a in zip(self.rest, arrays, strict=True):
            number[..., i] += a @ ones

    def found(self) -> tuple[Array, ...]:
        """The heads and rows that have one, before them the samples where several go together"""
        return np.nonzero(self.key >= 0)


def inside(key: Array, cols: Range) -> tuple[Array, ...]:
    """Heads, rows and columns of a tile where its keys are, before them the samples where several go together"""
    at = np.nonzero((key >= cols[0]) & (key < cols[1]))
    return *at, key[at] - cols[0]


def add_to_keys(total: Array, heads: tuple[Array, ...], keys: Array, a: Array) -> None:
    """total[*heads, keys] += a, where keys repeat
    total (..., G, S, D), or (..., 1, S, D) for all   heads: (R), before it of samples   keys (R)   a (R, D)
    """
    *samples, g = heads
    places = (*samples, g if total.shape[-3] > 1 else np.zeros_like(g), keys)
    at = np.ravel_multi_index(places, total.shape[:-1])
    order = np.argsort(at, kind="stable")
    some, first = np.unique(at[order], return_index=True)
    total[np.unravel_index(some, total.shape[:-1])] += np.add.reduceat(a[order], first, axis=0)
