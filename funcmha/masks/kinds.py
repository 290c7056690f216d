"""The kinds of structured masks. They neither check nor copy what they hold: the functions that make them do."""

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import numpy as np

from funcmha._arrays import Array, of_sample

from .mask import Block, Mask, Range, summary, to_library


class _Band(NamedTuple):
    left: int | None
    right: int | None
    offset: int


class Band(Mask, _Band):
    """i + offset − left ≤ j ≤ i + offset + right, where None is no bound. Blocks and columns cost O(1)."""

    __slots__ = ()

    @property
    def diagonals(self) -> tuple[float, float]:
        """The least and the greatest j − i that attend, or ∓inf."""
        least = -inf if self.left is None else self.offset - self.left
        return least, inf if self.right is None else self.offset + self.right

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        return T, S

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        n, m = rows[1] - rows[0], cols[1] - cols[0]
        least, greatest = (int(min(max(d + rows[0] - cols[0], -n), m)) for d in self.diagonals)  # of this tile
        allowed = np.tri(n, m, greatest, dtype=bool)
        if least > -n:
            allowed &= ~np.tri(n, m, least - 1, dtype=bool)
        return to_library(allowed, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        least, greatest = self.diagonals
        low, high = cols[0] - (rows[1] - 1), (cols[1] - 1) - rows[0]  # j − i takes every value between
        if high < least or greatest < low:
            return "empty"
        return "full" if least <= low and high <= greatest else "mixed"

    def _columns(self, rows: Range, S: int) -> Range:
        least, greatest = self.diagonals
        return int(max(0, rows[0] + least)), int(min(S, rows[1] + greatest))

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        start, stop = self.columns((0, T), S)
        keys = np.arange(S)
        return to_library(((start <= keys) & (keys < stop))[None], like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        i, (least, greatest) = np.arange(T), self.diagonals
        return to_library(((i >= -greatest) & (i < S - least) & (S > 0))[:, None], like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return self


class _Bands(NamedTuple):
    left: int | None
    right: int | None
    offset: np.ndarray  # (...) integers


class Bands(Mask, _Bands):
    """i + offset[b] − left ≤ j ≤ i + offset[b] + right. Blocks and columns cost O(batch), and ask its bands."""

    __slots__ = ()

    @property
    def bands(self) -> list[Band]:
        """The band of each offset there is."""
        return [Band(self.left, self.right, int(offset)) for offset in np.unique(self.offset)]

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.offset.shape, T, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        ahead = np.arange(*cols) - np.arange(*rows)[:, None] - self.offset[..., None, None]  # of the query's own key
        allowed = np.ones(ahead.shape, bool) if self.left is None else ahead >= -self.left
        return to_library(_with_head(allowed if self.right is None else allowed & (ahead <= self.right)), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({band.block(rows, cols) for band in self.bands})

    def _columns(self, rows: Range, S: int) -> Range:
        some = [(start, stop) for start, stop in (band.columns(rows, S) for band in self.bands) if start < stop]
        return (min(start for start, _ in some), max(stop for _, stop in some)) if some else (0, 0)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        some = [self.at(index).attended_keys(T, S) for index in np.ndindex(self.offset.shape)]
        return to_library(np.array(some, bool).reshape(*_full_shape(self.offset.shape, 1, S)), like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        some = [self.at(index).attending_queries(T, S) for index in np.ndindex(self.offset.shape)]
        return to_library(np.array(some, bool).reshape(*_full_shape(self.offset.shape, T, 1)), like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Band(self.left, self.right, int(of_sample(self.offset, index, 0)))


class _Lengths(NamedTuple):
    n: np.ndarray  # (...) integers


class Lengths(Mask, _Lengths):
    """j < n. Blocks and columns cost O(batch)."""

    __slots__ = ()

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.n.shape, 1, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        return to_library(_with_head(np.arange(*cols) < self.n[..., None, None]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        if cols[0] >= self.n.max(initial=0):
            return "empty"
        return "full" if cols[1] <= self.n.min() else "mixed"

    def _columns(self, rows: Range, S: int) -> Range:
        return 0, min(S, int(self.n.max(initial=0)))

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Lengths(of_sample(self.n, index, 0))


class _Padding(NamedTuple):
    keep: np.ndarray  # (..., S) booleans


class Padding(Mask, _Padding):
    """keep[j]. Blocks cost O(batch · columns), columns cost O(batch · S)."""

    __slots__ = ()

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("keep", self.keep, "S", S, "k")
        return _full_shape(self.keep.shape[:-1], 1, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        return to_library(_with_head(self.keep[..., None, slice(*cols)]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return summary(self.keep[..., slice(*cols)])

    def _columns(self, rows: Range, S: int) -> Range:
        return _span(np.any(self.keep, axis=tuple(range(self.keep.ndim - 1))))

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Padding(of_sample(self.keep, index, 1))


class _Segments(NamedTuple):
    q_ids: np.ndarray  # (..., T) integers
    k_ids: np.ndarray  # (..., S) integers


class Segments(Mask, _Segments):
    """q_ids[i] = k_ids[j]. Blocks sort their rows and columns, if the extremes do not decide; columns sort all of S."""

    __slots__ = ()

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("q_ids", self.q_ids, "T", T, "q")
        _check_size("k_ids", self.k_ids, "S", S, "k")
        return _full_shape(np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1]), T, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        q, k = self.q_ids[..., slice(*rows), None], self.k_ids[..., None, slice(*cols)]
        return to_library(_with_head(q == k), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({_meeting(q, k) for q, k in self._samples(rows, cols)})

    def _columns(self, rows: Range, S: int) -> Range:
        attended = np.zeros(S, dtype=bool)
        for q, k in self._samples(rows, (0, S)):
            attended |= np.isin(k, q)
        return _span(attended)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        some = [np.isin(k, q) for q, k in self._samples((0, T), (0, S))]
        shape = self._shape(T, S)
        return to_library(np.array(some).reshape(*shape[:-2], 1, S), like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        some = [np.isin(q, k) for q, k in self._samples((0, T), (0, S))]
        return to_library(np.array(some, bool).reshape(*self._shape(T, S)[:-1], 1), like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Segments(of_sample(self.q_ids, index, 1), of_sample(self.k_ids, index, 1))

    def _samples(self, rows: Range, cols: Range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of these rows and of these columns, for one element of the batch after another."""
        batch = np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1])
        for index in np.ndindex(batch):
            yield of_sample(self.q_ids, index, 1)[slice(*rows)], of_sample(self.k_ids, index, 1)[slice(*cols)]


class _Spans(NamedTuple):
    start: np.ndarray  # (T,) integers, at most stop
    stop: np.ndarray  # (T,) integers, at most S
    keys: int  # S


class Spans(Mask, _Spans):
    """start[i] ≤ j < stop[i]. Blocks and columns cost O(rows); made by `funcmha.packing`."""

    __slots__ = ()

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        if (self.start.size, self.keys) != (T, S):
            raise ValueError(
                f"mask must be (T, S) with T={T} as in q, S={S} as in k, got {(self.start.size, self.keys)}"
            )
        return T, S

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        start, stop = self.start[slice(*rows), None], self.stop[slice(*rows), None]
        j = np.arange(*cols)
        tile = (start <= j) & (j < stop)
        return to_library(tile, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        start, stop = self.start[slice(*rows)], self.stop[slice(*rows)]
        if (start <= cols[0]).all() and (cols[1] <= stop).all():
            return "full"
        return "mixed" if (np.maximum(start, cols[0]) < np.minimum(stop, cols[1])).any() else "empty"

    def _columns(self, rows: Range, S: int) -> Range:
        start, stop = self.start[slice(*rows)], self.stop[slice(*rows)]
        some = start < stop
        return int(start[some].min(initial=S)), int(stop[some].max(initial=0))

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        opened, closed = (np.bincount(ends, minlength=S + 1) for ends in (self.start, self.stop))
        attended = (np.cumsum(opened - closed) > 0)[None, :S]
        return to_library(attended, like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        return to_library((self.start < self.stop)[:, None], like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return self


def _full_shape(batch: tuple[int, ...], T: int, S: int) -> tuple[int, ...]:
    return (*batch, 1, T, S) if batch else (T, S)


def _with_head(tile: np.ndarray) -> np.ndarray:
    """(..., T, S)  →  (..., 1, T, S), but (T, S) as it is"""
    return tile[..., None, :, :] if tile.ndim > 2 else tile


def _of_samples(answers: set[Block]) -> Block:
    if answers <= {"empty"}:
        return "empty"
    return "full" if answers == {"full"} else "mixed"


def _meeting(q: np.ndarray, k: np.ndarray) -> Block:
    """The block of rows with ids `q` and columns with ids `k`."""
    if q.max() < k.min() or k.max() < q.min():
        return "empty"
    if q.min() == q.max() == k.min() == k.max():
        return "full"
    return "mixed" if np.isin(q, k).any() else "empty"


def _span(some: np.ndarray) -> Range:
    """From the first True to the last."""
    found = np.flatnonzero(some)
    return (int(found[0]), int(found[-1]) + 1) if found.size else (0, 0)


def _check_size(name: str, x: np.ndarray, letter: str, size: int, owner: str) -> None:
    if x.shape[-1] != size:
        raise ValueError(f"mask.{name} must be (..., {letter}) with {letter}={size} as in {owner}, got {x.shape}")
