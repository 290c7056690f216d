"""Keys with more than half of the weight of their row: what they take is what the others leave.

A row of dz sums to something known, 0 if there is neither sink nor dlse. Where one weight is nearly 1, its dz is as small
as the sum of the others, and p (dp − δ) would be the rounding of two large numbers. So dz is left out there while the
tiles are added up, and set at the end: a row is in many tiles, but a weight over 1/2 is seen in its own.

Axes: T queries, S keys, D width; R rows and N columns of a tile.
"""

from typing import NamedTuple

import numpy as np

from funcmha._arrays import Array
from funcmha.masks import Range


class Dominant(NamedTuple):
    key: Array  # (T), the key with more than half of the weight, −1 where none has
    rest: tuple[Array, ...]  # (T), what is left out, summed over the other keys
    beside: tuple[Array, ...]  # (T), other numbers of the key
    inverse: Array  # (T), of the sums of exponentials
    half: float  # exponentials up to this are no such weight in any row

    @staticmethod
    def of(inverse: Array, sums: int, others: int) -> "Dominant":
        """None yet, from the inverses of the sums of exponentials"""
        largest = float(inverse.max(initial=0.0))
        return Dominant(
            np.full(inverse.shape, -1),
            tuple(np.zeros_like(inverse) for _ in range(sums)),
            tuple(np.ones_like(inverse) for _ in range(others)),
            inverse,
            0.5 / largest if largest else np.inf,
        )

    def leave_out(
        self, rows: Range, cols: Range, e: Array, arrays: tuple[Array, ...], beside: tuple[Array | None, ...]
    ) -> None:
        """Make the arrays (R, N) 0 at weights over 1/2, and add up the rest; None beside is 1 everywhere"""
        i = slice(*rows)
        if not e.max() <= self.half:  # NaN too: other rows may have one
            at = heaviest(e, self.inverse[i])
            self.key[i][at[0]] = cols[0] + at[1]
            for a in arrays:
                a[at] -= a[at]  # NaN stays
            for number, a in zip(self.beside, beside, strict=True):
                if a is not None:
                    number[i][at[0]] = a[at]
        ones = np.ones(e.shape[1], e.dtype)
        for number, a in zip(self.rest, arrays, strict=True):
            number[i] += a @ ones

    def found(self) -> Array:
        """Those that have one"""
        return np.flatnonzero(self.key >= 0)


def heaviest(e: Array, inverse: Array) -> tuple[Array, Array]:
    """Rows and columns of the weights over 1/2, of which a row has one at most"""
    cols = e.argmax(axis=-1)
    rows = np.flatnonzero(e[np.arange(len(e)), cols] * inverse > 0.5)
    return rows, cols[rows]


def add_to_keys(total: Array, keys: Array, a: Array) -> None:
    """total[keys] += a, where keys repeat       total (S, D)   keys (R)   a (R, D)"""
    order = np.argsort(keys, kind="stable")
    some, first = np.unique(keys[order], return_index=True)
    total[some] += np.add.reduceat(a[order], first, axis=0)
