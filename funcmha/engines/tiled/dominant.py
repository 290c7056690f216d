"""Keys with more than half of the weight of their row: what they get is what the others leave.

A row of dz sums to something known, 0 if there is neither sink nor dlse. Where one weight is nearly 1, its dz is as
small as the sum of the others, and p (dp − δ) would be the rounding of two large numbers. So dz is left out there while
the tiles are added up, and set at the end: a row is in many tiles, but a weight over 1/2 is known in its own.

Axes: T queries, S keys, D width; R rows and N columns of a tile.
"""

from typing import NamedTuple, Optional

import numpy as np

from funcmha._arrays import Array
from funcmha.masks import Range


class Dominant(NamedTuple):
    saturated: Array  # booleans (T), where a weight may exceed 1/2
    inverse: Array  # (T), of the sums of exponentials
    key: Array  # (T), the key whose weight exceeds 1/2, −1 where none does
    rest: tuple[Array, ...]  # (T), what is left out, summed over the other keys
    beside: tuple[Array, ...]  # (T), other numbers of the key

    @staticmethod
    def of(saturated: Array, inverse: Array, sums: int, others: int) -> Optional["Dominant"]:
        """None where no row may be saturated"""
        if not saturated.any():
            return None
        zeros = [np.zeros_like(inverse) for _ in range(sums + others)]
        return Dominant(saturated, inverse, np.full(inverse.shape, -1), tuple(zeros[:sums]), tuple(zeros[sums:]))

    def leave_out(
        self, rows: Range, cols: Range, e: Array, arrays: tuple[Array, ...], beside: tuple[Array | float, ...]
    ) -> None:
        """Make the arrays (R, N) 0 at weights over 1/2, and add up the rest; keep what is beside there"""
        i = slice(*rows)
        if not self.saturated[i].any():
            return
        at = heaviest(e, self.inverse[i])
        self.key[i][at[0]] = cols[0] + at[1]
        for a in arrays:
            a[at] -= a[at]  # NaN stays
        for number, other in zip(self.beside, beside, strict=True):
            number[i][at[0]] = np.broadcast_to(other, e.shape)[at]
        ones = np.ones(e.shape[1], e.dtype)
        for number, a in zip(self.rest, arrays, strict=True):
            number[i] += a @ ones

    def found(self) -> Array:
        """The rows that have one"""
        return np.flatnonzero(self.key >= 0)


def heaviest(e: Array, inverse: Array) -> tuple[Array, Array]:
    """Rows and columns of the weights over 1/2, of which a row has one at most"""
    cols = e.argmax(axis=-1)
    rows = np.flatnonzero(e[np.arange(len(e)), cols] * inverse > 0.5)
    return rows, cols[rows]


def add_to_keys(total: Array, keys: Array, a: Array) -> None:
    """total[keys] += a, where keys repeat       total (S, D)   keys (R)   a (R, D)"""
    if len(keys):
        order = np.argsort(keys, kind="stable")
        some, first = np.unique(keys[order], return_index=True)
        total[some] += np.add.reduceat(a[order], first, axis=0)
