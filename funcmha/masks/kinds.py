"""The kinds of structured masks. They neither check nor copy what they hold: the functions that make them do."""

from collections.abc import Iterator
from functools import reduce
from math import inf
from operator import and_, or_
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array, arange, from_host, of_sample

from .mask import Block, Complement, Mask, Range, hull, summary


class _Diagonal(Mask):
    """i + offset − left ≤ j ≤ i + offset + right: what it forbids lies on either side, and is a band again"""

    __slots__ = ()
    left: int | None
    right: int | None
    offset: Any

    def __invert__(self) -> Mask:
        kind: Any = type(self)
        below = [] if self.left is None else [kind(None, -self.left - 1, self.offset)]
        above = [] if self.right is None else [kind(-self.right - 1, None, self.offset)]
        return reduce(or_, below + above) if below or above else Complement(self)

    def part(self, rows: Range, cols: Range) -> Mask:
        kind: Any = type(self)
        return kind(self.left, self.right, self.offset + (rows[0] - cols[0]))  # type: ignore[no-any-return]

    def _every(self, n: int, T: int, S: int) -> Mask:  # n j ≤ n i + offset + right is j ≤ i + ⌊(offset + right) / n⌋
        kind: Any = type(self)
        below = [] if self.left is None else [kind(0, None, -((self.left - self.offset) // n))]
        above = [] if self.right is None else [kind(None, 0, (self.right + self.offset) // n)]
        return reduce(and_, below + above) if below or above else self


class Band(_Diagonal, NamedTuple("_Band", [("left", int | None), ("right", int | None), ("offset", int)])):
    """i + offset − left ≤ j ≤ i + offset + right, where None is no bound. Blocks and columns cost O(1)."""

    __slots__ = ()

    @property
    def diagonals(self) -> tuple[float, float]:
        """The least and the greatest j − i that attend, or ∓inf."""
        least = -inf if self.left is None else self.offset - self.left
        return least, inf if self.right is None else self.offset + self.right

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        return T, S

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        n, m = rows[1] - rows[0], cols[1] - cols[0]
        least, greatest = (int(min(max(d + rows[0] - cols[0], -n), m)) for d in self.diagonals)  # of this tile
        if like is not None and not isinstance(like, np.ndarray):  # made there: nothing is sent
            ahead = arange(m, like) - arange(n, like)[:, None]
            return (least <= ahead) & (ahead <= greatest)
        allowed: np.ndarray = np.tri(n, m, greatest, dtype=bool)
        if least > -n:
            allowed &= ~np.tri(n, m, least - 1, dtype=bool)
        return allowed

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
        return _all_columns(self, T, S, like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        i, (least, greatest) = np.arange(T), self.diagonals
        return from_host(((i >= -greatest) & (i < S - least))[:, None], like)


class Bands(_Diagonal, NamedTuple("_Bands", [("left", int | None), ("right", int | None), ("offset", np.ndarray)])):
    """i + offset[b] − left ≤ j ≤ i + offset[b] + right     offset (...) integers. Blocks and columns cost O(batch)."""

    __slots__ = ()

    @property
    def bands(self) -> list[Band]:
        """The band of each element of the batch."""
        return [Band(self.left, self.right, int(offset)) for offset in self.offset.flat]

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.offset.shape, T, S)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        ahead = np.arange(*cols) - np.arange(*rows)[:, None] - self.offset[..., None, None]  # of the query's own key
        allowed = np.ones(ahead.shape, bool) if self.left is None else ahead >= -self.left
        return from_host(_with_head(allowed if self.right is None else allowed & (ahead <= self.right)), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({band.block(rows, cols) for band in self.bands})

    def _columns(self, rows: Range, S: int) -> Range:
        return hull(band.columns(rows, S) for band in self.bands)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        some = [band.attended_keys(T, S) for band in self.bands]
        return from_host(np.array(some, bool).reshape(*_full_shape(self.offset.shape, 1, S)), like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        some = [band.attending_queries(T, S) for band in self.bands]
        return from_host(np.array(some, bool).reshape(*_full_shape(self.offset.shape, T, 1)), like)

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        offset = of_sample(self.offset, index, 0)
        return Bands(self.left, self.right, offset) if offset.ndim else Band(self.left, self.right, int(offset))


class Lengths(Mask, NamedTuple("_Lengths", [("n", np.ndarray)])):
    """j < n     n (...) integers. Blocks and columns cost O(batch)."""

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.n.shape, 1, S)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        return from_host(_with_head(np.arange(*cols) < self.n[..., None, None]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        if cols[0] >= self.n.max(initial=0):
            return "empty"
        return "full" if cols[1] <= self.n.min() else "mixed"

    def _columns(self, rows: Range, S: int) -> Range:
        return 0, min(S, int(self.n.max(initial=0)))

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return Lengths(of_sample(self.n, index, 0))

    def part(self, rows: Range, cols: Range) -> Mask:
        return Lengths(np.maximum(self.n - cols[0], 0))

    def _every(self, n: int, T: int, S: int) -> Mask:
        return Lengths(-(-self.n // n))


class Padding(Mask, NamedTuple("_Padding", [("keep", np.ndarray)])):
    """keep[j]     keep (..., S) booleans. Blocks cost O(batch · columns), columns cost O(batch · S)."""

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("keep", self.keep, "S", S, "k")
        return _full_shape(self.keep.shape[:-1], 1, S)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        return from_host(_with_head(self.keep[..., None, slice(*cols)]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return summary(self.keep[..., slice(*cols)])

    def _columns(self, rows: Range, S: int) -> Range:
        return _span(np.any(self.keep, axis=tuple(range(self.keep.ndim - 1))))

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return Padding(of_sample(self.keep, index, 1))

    def part(self, rows: Range, cols: Range) -> Mask:
        return Padding(_slice("keep", self.keep, "S", cols))

    def _every(self, n: int, T: int, S: int) -> Mask:
        return Padding(self.keep[..., ::n])


class Segments(Mask, NamedTuple("_Segments", [("q_ids", np.ndarray), ("k_ids", np.ndarray)])):
    """q_ids[i] = k_ids[j]     q_ids (..., T), k_ids (..., S) integers

    Blocks sort their rows and columns, if the extremes do not decide; columns sort all of S.
    """

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("q_ids", self.q_ids, "T", T, "q")
        _check_size("k_ids", self.k_ids, "S", S, "k")
        return _full_shape(np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1]), T, S)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        q, k = self.q_ids[..., slice(*rows), None], self.k_ids[..., None, slice(*cols)]
        return from_host(_with_head(q == k), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({_meeting(q, k) for q, k in self._samples(rows, cols)})

    def _columns(self, rows: Range, S: int) -> Range:
        attended = np.zeros(S, dtype=bool)
        for q, k in self._samples(rows, (0, S)):
            attended |= np.isin(k, q)
        return _span(attended)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        some = [np.isin(k, q) for q, k in self._samples((0, T), (0, S))]
        return from_host(np.array(some, bool).reshape(*self.shape(T, S)[:-2], 1, S), like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        some = [np.isin(q, k) for q, k in self._samples((0, T), (0, S))]
        return from_host(np.array(some, bool).reshape(*self.shape(T, S)[:-1], 1), like)

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return Segments(of_sample(self.q_ids, index, 1), of_sample(self.k_ids, index, 1))

    def part(self, rows: Range, cols: Range) -> Mask:
        return Segments(_slice("q_ids", self.q_ids, "T", rows), _slice("k_ids", self.k_ids, "S", cols))

    def _every(self, n: int, T: int, S: int) -> Mask:
        return Segments(self.q_ids[..., ::n], self.k_ids[..., ::n])

    def _samples(self, rows: Range, cols: Range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of these rows and of these columns, for one element of the batch after another."""
        batch = np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1])
        for index in np.ndindex(batch):
            yield of_sample(self.q_ids, index, 1)[slice(*rows)], of_sample(self.k_ids, index, 1)[slice(*cols)]


class Spans(Mask, NamedTuple("_Spans", [("start", np.ndarray), ("stop", np.ndarray), ("keys", int)])):
    """start[i] ≤ j < stop[i]    start, stop (T,) integers, start ≤ stop ≤ keys = S. Blocks and columns cost O(rows)."""

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        own = (self.start.size, self.keys)
        if own != (T, S):
            raise ValueError(f"mask must be (T, S) with T={T} as in q, S={S} as in k, got {own}")
        return own

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        start, stop = self.start[slice(*rows), None], self.stop[slice(*rows), None]
        j = np.arange(*cols)
        return from_host((start <= j) & (j < stop), like)

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
        return from_host((np.cumsum(opened - closed) > 0)[None, :S], like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        return from_host((self.start < self.stop)[:, None], like)

    def part(self, rows: Range, cols: Range) -> Mask:
        start, stop = (_slice(name, getattr(self, name), "T", rows) for name in ("start", "stop"))
        if cols[1] > self.keys:
            raise ValueError(f"mask must have {cols[1]} keys or more, got {self.keys}")
        return Spans(np.clip(start, *cols) - cols[0], np.clip(stop, *cols) - cols[0], cols[1] - cols[0])

    def _every(self, n: int, T: int, S: int) -> Mask:
        return Spans(-(-self.start[::n] // n), -(-self.stop[::n] // n), -(-self.keys // n))


class Chunks(Mask, NamedTuple("_Chunks", [("size", int), ("first_query", int), ("first_key", int)])):
    """⌊(i + first_query) / size⌋ = ⌊(j + first_key) / size⌋. Blocks and columns cost O(1)."""

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        return T, S

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        i, j = np.arange(*rows)[:, None] + self.first_query, np.arange(*cols) + self.first_key
        return from_host(i // self.size == j // self.size, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        (a, b), (c, d) = self._chunks(rows, self.first_query), self._chunks(cols, self.first_key)
        if b < c or d < a:
            return "empty"
        return "full" if a == b == c == d else "mixed"

    def _chunks(self, some: Range, first: int) -> Range:
        """The first and the last chunk that rows or columns are in."""
        return (some[0] + first) // self.size, (some[1] - 1 + first) // self.size

    def _columns(self, rows: Range, S: int) -> Range:
        first, last = self._chunks(rows, self.first_query)
        return max(0, first * self.size - self.first_key), min(S, (last + 1) * self.size - self.first_key)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        return _all_columns(self, T, S, like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        first, last = self._chunks((0, S), self.first_key)
        own = (np.arange(T) + self.first_query) // self.size
        return from_host(((first <= own) & (own <= last))[:, None], like)

    def part(self, rows: Range, cols: Range) -> Mask:
        return Chunks(self.size, self.first_query + rows[0], self.first_key + cols[0])

    def _every(self, n: int, T: int, S: int) -> Mask:
        own = ((np.arange(0, m, n) + first) // self.size for m, first in ((T, self.first_query), (S, self.first_key)))
        return Segments(*own)


def _full_shape(batch: tuple[int, ...], T: int, S: int) -> tuple[int, ...]:
    return (*batch, 1, T, S) if batch else (T, S)


def _all_columns(mask: Mask, T: int, S: int, like: Array) -> Array:
    """The attended keys (1, S) of a mask that leaves out no key between two"""
    start, stop = mask.columns((0, T), S)
    keys = np.arange(S)
    return from_host(((start <= keys) & (keys < stop))[None], like)


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


def _slice(name: str, x: np.ndarray, letter: str, some: Range) -> np.ndarray:
    if x.shape[-1] < some[1]:
        raise ValueError(f"mask.{name} must be (..., {letter}) with {letter}={some[1]} or more, got {x.shape}")
    return x[..., slice(*some)]


def _check_size(name: str, x: np.ndarray, letter: str, size: int, owner: str) -> None:
    if x.shape[-1] != size:
        raise ValueError(f"mask.{name} must be (..., {letter}) with {letter}={size} as in {owner}, got {x.shape}")
