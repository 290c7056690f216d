"""In which order the tiles of a backward are done, so that what is added to is never shared."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from funcmha._arrays import Array, unbroadcast
from funcmha.biases import diagonal_sums, diagonals

from .tiles import Head, Tile, blocks


def wavefronts(head: Callable[[Any, int], Head], samples: list[Any], T: int, S: int) -> list[list[Any]]:
    """Blocks of tiles, as (sample, tiles), in wavefronts; in one of them no two of a sample share rows or columns.

    So each may add to its rows of dq and columns of dk and dv, and these are added to in the order of the wavefronts,
    whatever the number of threads: diagonal by diagonal. Blocks are as high as those of the forward, for the products
    to have the same bits, and so whatever the number of samples.
    """
    fronts: dict[int, list[Any]] = {}
    for b in samples:
        of_sample = head(b, 0)
        height, width = of_sample.plan.tile_rows, of_sample.plan.columns(T)
        n = max(-(-T // height), -(-S // width), 1)
        for i, some in enumerate(blocks(T, height)):
            for block in of_sample.tiles(some):
                fronts.setdefault((i - block[0].cols[0] // width) % n, []).append((b, block))
    return [fronts[i] for i in sorted(fronts)]


class RelativeBiasGradient:
    """The gradient of a `RelativeBias`, tile by tile; tiles of a wavefront share diagonals, and are added after it."""

    def __init__(self, values: Array, scores: tuple[int, ...]) -> None:
        self.T, self.sums_samples = scores[-2], False  # `flush` keeps the order
        self.sum = np.zeros_like(values)
        self.given: dict[Any, Array] = {}

    def add(self, index: tuple[int, ...], tile: Tile, dz: Array) -> None:
        """Take the tile of one sample and head."""
        self.given[index, tile.rows, tile.cols] = diagonal_sums(dz)

    def flush(self) -> None:
        """Add what was given, in the order of the tiles."""
        for (index, rows, cols), sums in sorted(self.given.items(), key=lambda item: item[0]):
            self.place(index)[diagonals(rows, cols, self.T)] += sums
        self.given.clear()

    def add_at(self, index: tuple[int, ...], rows: Array, cols: Array, dz: Array) -> None:
        """Add some numbers of one sample and head, on one thread."""
        np.add.at(self.place(index), cols - rows + self.T - 1, dz)

    def place(self, index: tuple[int, ...]) -> Array:
        """The values (T + S − 1) of one sample and head"""
        whole = self.sum.reshape((1,) * max(2 - self.sum.ndim, 0) + self.sum.shape)
        outer = index[len(index) - (whole.ndim - 1) :]
        return whole[tuple(i if n > 1 else 0 for i, n in zip(outer, whole.shape[:-1], strict=True))]

    def total(self) -> Array:
        """The gradient of the values"""
        return self.sum


class BiasGradient:
    """The gradient of a bias, tile by tile: summed over the axes along which it was broadcast."""

    def __init__(self, bias: Array, scores: tuple[int, ...]) -> None:
        if len(scores) == 2:
            scores = (1, *scores)
        shape = (1,) * (len(scores) - bias.ndim) + tuple(bias.shape)
        self.shape = tuple(bias.shape)
        # Where rows are summed the columns are kept apart to the end: no two tiles of a front may add to one number.
        self.sums_rows = shape[-2] == 1 and scores[-2] != 1
        self.sums_cols = shape[-1] == 1 and scores[-1] != 1 and not self.sums_rows
        self.sums_samples = prod(shape[:-3]) != prod(scores[:-3])
        self.sum = np.zeros((*shape[:-1], shape[-1] if self.sums_cols else scores[-1]), bias.dtype)

    def add(self, index: tuple[int, ...], tile: Tile, dz: Array) -> None:
        """Add the tile of one sample and head."""
        rows, cols = slice(*tile.rows), slice(*tile.cols)
        if self.sums_rows:
            dz, rows = dz.sum(axis=0, keepdims=True), slice(0, 1)
        if self.sums_cols:
            dz, cols = dz.sum(axis=1, keepdims=True), slice(0, 1)
        self.place(index)[rows, cols] += dz

    def add_at(self, index: tuple[int, ...], rows: Array, cols: Array, dz: Array) -> None:
        """Add some numbers of one sample and head, on one thread."""
        np.add.at(self.place(index), (0 if self.sums_rows else rows, 0 if self.sums_cols else cols), dz)

    def place(self, index: tuple[int, ...]) -> Array:
        """The matrix of one sample and head"""
        return self.sum[tuple(i if n > 1 else 0 for i, n in zip(index, self.sum.shape[:-2], strict=True))]

    def flush(self) -> None:
        """All is added already."""

    def total(self) -> Array:
        """The gradient, in the shape of the bias."""
        return unbroadcast(self.sum, self.shape)
