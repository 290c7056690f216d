"""In which order the tiles of a backward are done, so that what is added to is never shared."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from funcmha._xp import Array, unbroadcast

from . import tiles
from .tiles import Head, blocks, columns


def steps(head: Callable[[Any, int], Head], samples: list[Any], T: int, S: int) -> list[list[Any]]:
    """Blocks of tiles, as (sample, tiles), in steps; in one step no two of a sample share rows or columns.

    So each may add to its rows of dq and columns of dk and dv, and these are added to in the order of the steps,
    whatever the number of threads: diagonal by diagonal.
    """
    width = columns(T)
    n = max(-(-T // tiles.ROWS), -(-S // width), 1)
    out: list[list[Any]] = [[] for _ in range(n)]
    for b in samples:
        of_sample = head(b, 0)
        for rows in blocks(T, tiles.ROWS):
            for block in of_sample.tiles(rows):
                out[(rows[0] // tiles.ROWS - block[0].cols[0] // width) % n].append((b, block))
    return [tasks for tasks in out if tasks]


class BiasGradient:
    """The gradient of a bias, tile by tile: summed over the axes along which it was broadcast."""

    def __init__(self, bias: Array, scores: tuple[int, ...]) -> None:
        if len(scores) == 2:
            scores = (1, *scores)
        shape = (1,) * (len(scores) - bias.ndim) + tuple(bias.shape)
        self.shape = tuple(bias.shape)
        # Where rows are summed the columns are kept apart to the end, so that no two tiles of a step add to one number.
        self.sums_rows = shape[-2] == 1 and scores[-2] != 1
        self.sums_cols = shape[-1] == 1 and scores[-1] != 1 and not self.sums_rows
        self.sums_samples = prod(shape[:-3]) != prod(scores[:-3])
        self.sum = np.zeros((*shape[:-1], shape[-1] if self.sums_cols else scores[-1]), bias.dtype)

    def add(self, index: tuple[int, ...], at: tuple[slice, slice], dz: Array) -> None:
        """Add the tile of one sample and head."""
        rows, cols = at
        if self.sums_rows:
            dz, rows = dz.sum(axis=0, keepdims=True), slice(0, 1)
        if self.sums_cols:
            dz, cols = dz.sum(axis=1, keepdims=True), slice(0, 1)
        place = tuple(i if n > 1 else 0 for i, n in zip(index, self.sum.shape[:-2], strict=True))
        self.sum[place][rows, cols] += dz

    def total(self) -> Array:
        """The gradient, in the shape of the bias."""
        return unbroadcast(self.sum, self.shape)
