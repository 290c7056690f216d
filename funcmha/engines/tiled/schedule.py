"""In which order the tiles of a backward are done, so that what is added to is never shared."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from funcmha._arrays import Array, unbroadcast
from funcmha.biases import diagonal_sums, diagonals

from .tiles import Heads, Tile, add_heads, blocks


def wavefronts(heads: Callable[[Any, slice], Heads], samples: list[Any], T: int, S: int) -> list[list[Any]]:
    """Blocks of tiles, as (sample, tiles), in wavefronts; in one of them no two of a sample share rows or columns.

    So each may add to its rows of dq and columns of dk and dv, and these are added to in the order of the wavefronts,
    whatever the number of threads: diagonal by diagonal. Blocks are as high as those of the forward, for the products
    to have the same bits, and so whatever the number of samples.
    """
    fronts: dict[int, list[Any]] = {}
    for b in samples:
        of_sample = heads(b, slice(0, 1))
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

    def add(self, b: tuple[int, ...], h: slice, tile: Tile, dz: Array) -> None:
        """Take the tile of some heads of one sample."""
        self.given[b, (h.start, h.stop), tile.rows, tile.cols] = diagonal_sums(dz)

    def flush(self) -> None:
        """Add what was given, in the order of the tiles."""
        for (b, h, rows, cols), sums in sorted(self.given.items(), key=lambda item: item[0]):
            add_heads(self.place(b, slice(*h))[:, None, diagonals(rows, cols, self.T)], sums[:, None])
        self.given.clear()

    def add_at(self, b: tuple[int, ...], h: slice, at: tuple[Array, Array, Array], dz: Array) -> None:
        """Add some numbers of some heads of one sample, on one thread."""
        (g, rows, cols), place = at, self.place(b, h)
        np.add.at(place, (g if len(place) > 1 else 0, cols - rows + self.T - 1), dz)

    def place(self, b: tuple[int, ...], h: slice) -> Array:
        """The values (G or 1, T + S − 1) of some heads of one sample"""
        whole = self.sum.reshape((1,) * max(2 - self.sum.ndim, 0) + self.sum.shape)
        return _of_heads(whole, b[len(b) - (whole.ndim - 2) :], h)

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

    def add(self, b: tuple[int, ...], h: slice, tile: Tile, dz: Array) -> None:
        """Add the tile of some heads of one sample."""
        rows, cols = slice(*tile.rows), slice(*tile.cols)
        if self.sums_rows:
            dz, rows = dz.sum(axis=1, keepdims=True), slice(0, 1)
        if self.sums_cols:
            dz, cols = dz.sum(axis=2, keepdims=True), slice(0, 1)
        add_heads(_of_heads(self.sum, b, h)[:, rows, cols], dz)

    def add_at(self, b: tuple[int, ...], h: slice, at: tuple[Array, Array, Array], dz: Array) -> None:
        """Add some numbers of some heads of one sample, on one thread."""
        (g, rows, cols), place = at, _of_heads(self.sum, b, h)
        at = (g if len(place) > 1 else 0, 0 if self.sums_rows else rows, 0 if self.sums_cols else cols)
        np.add.at(place, at, dz)

    def flush(self) -> None:
        """All is added already."""

    def total(self) -> Array:
        """The gradient, in the shape of the bias."""
        return unbroadcast(self.sum, self.shape)


def _of_heads(total: Array, b: tuple[int, ...], h: slice) -> Array:
    """What some heads of one sample add to, of a sum (..., H or 1, ·), as a view with an axis of heads"""
    outer = total.shape[: len(b)]
    return total[
        (*(i if n > 1 else 0 for i, n in zip(b, outer, strict=True)), h if total.shape[len(b)] > 1 else slice(0, 1))
    ]
