"""Structured masks: which query sees which key, without the T × S array.

    mask = causal() & lengths(np.array([7, 4]))     # True = attend; & keeps what both allow
    y, cache = attention(q, k, v, mask=mask)

Axes: T queries, S keys, H heads, and before them the batch `...`. Every mask broadcasts to (..., H, T, S).
An engine that works in tiles asks for a block of rows and columns at a time: `block` says whether it is empty, full or
mixed, `tile` gives its booleans, `columns` says where to look at all, and `at` leaves one element of the batch.

Build masks with the functions after the classes: they check and copy what they are given, the classes do neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import inf
from operator import and_
from typing import Any, Literal, NoReturn

import numpy as np

from . import _check
from ._xp import Array, dtype_name, from_host, is_array, namespace, of_sample

Range = tuple[int, int]  # start, stop within 0 … T or 0 … S
Block = Literal["empty", "full", "mixed"]


class Mask(ABC):
    """A boolean (..., H, T, S), True = attend, that can be asked about its blocks.

    `mask & other` and `other & mask` are what both allow; `other` is a mask or a boolean array. (Libraries that refuse
    foreign operands, such as array-api-strict, want the mask on the left.)
    """

    __array_ufunc__ = None  # so that NumPy leaves array & mask to __rand__

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        """The shape that `dense(T, S)` has, which is not made; ValueError if the mask was built for another T or S."""
        return self._shape(T, S)

    def dense(self, T: int, S: int, like: Array = None) -> Array:
        """The booleans: (T or 1, S or 1), and before them the batch and a head axis where the mask has them.

        In the library and on the device of `like`, or of NumPy. ValueError if the mask was built for another T or S,
        TypeError if it holds an array of a third library.
        """
        self._shape(T, S)
        return self._tile((0, T), (0, S), like)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        """`dense(T, S, like)[..., rows, cols]` where an axis of size 1 stays as it is, at the cost of the tile."""
        return self._tile(rows, cols, like)

    def block(self, rows: Range, cols: Range) -> Block:
        """Whether the block is "empty" (no True), "full" (no False) or "mixed", in all of the batch and heads at once.

        A block without rows or columns is empty. The answer is exact, but for two kinds of mask for which "mixed" means
        "perhaps": an intersection, whose parts may exclude each other, and an array outside NumPy, where a look would
        wait for the device.
        """
        return "empty" if rows[0] >= rows[1] or cols[0] >= cols[1] else self._block(rows, cols)

    def columns(self, rows: Range, S: int) -> Range:
        """The columns outside which these rows see nothing; (0, 0) if they see nothing at all.

        The least such range, but for arrays (always all of S) and intersections (all that is common to their parts).
        """
        start, stop = self._columns(rows, S) if rows[0] < rows[1] else (0, 0)
        return (start, stop) if start < stop else (0, 0)

    def seen(self, T: int, S: int, like: Array = None) -> Array:
        """The keys that any query sees: the rows of `dense(T, S, like)` joined into one by or, at the cost of one.

        An array costs all its rows. An intersection says what each part sees, which may be more than all of them do.
        """
        return self._seen(T, S, like)

    def at(self, index: tuple[int, ...]) -> "Mask":
        """The mask of one element of the batch; a head axis stays.

        `index` has one entry per batch axis of q: a mask with fewer reads the last ones, and one of size 1 serves all.
        """
        return self._at(index)

    def heads(self, start: int, stop: int) -> "Mask":
        """The mask of heads start … stop, where it has a head axis."""
        return self._heads(slice(start, stop))

    def __and__(self, other: Any) -> "Intersection":
        return Intersection(_parts(self) + _parts(as_mask(other, "an operand of &")))

    __rand__ = __and__

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask is neither true nor false: join masks with &, and test for absence with `is None`")

    @abstractmethod
    def _shape(self, T: int, S: int) -> tuple[int, ...]: ...

    @abstractmethod
    def _tile(self, rows: Range, cols: Range, like: Array) -> Array: ...

    @abstractmethod
    def _block(self, rows: Range, cols: Range) -> Block: ...  # has a row and a column

    def _columns(self, rows: Range, S: int) -> Range:  # has a row; stop ≤ start means none
        return 0, S

    def _seen(self, T: int, S: int, like: Array) -> Array:  # of the masks whose rows are all alike
        return self._tile((0, 1), (0, S), like)

    @abstractmethod
    def _at(self, index: tuple[int, ...]) -> "Mask": ...

    def _heads(self, heads: slice) -> "Mask":  # of the masks without a head axis
        return self


@dataclass(frozen=True, eq=False)
class Band(Mask):
    """i + offset − left ≤ j ≤ i + offset + right, where None is no bound. Blocks and columns cost O(1)."""

    left: int | None
    right: int | None
    offset: int

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
        return _to(allowed, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        least, greatest = self.diagonals
        low, high = cols[0] - (rows[1] - 1), (cols[1] - 1) - rows[0]  # j − i takes every value between
        if high < least or greatest < low:
            return "empty"
        return "full" if least <= low and high <= greatest else "mixed"

    def _columns(self, rows: Range, S: int) -> Range:
        least, greatest = self.diagonals
        return int(max(0, rows[0] + least)), int(min(S, rows[1] + greatest))

    def _seen(self, T: int, S: int, like: Array) -> Array:
        start, stop = self.columns((0, T), S)
        keys = np.arange(S)
        return _to(((start <= keys) & (keys < stop))[None], like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return self


@dataclass(frozen=True, eq=False)
class Bands(Mask):
    """i + offset[b] − left ≤ j ≤ i + offset[b] + right. Blocks and columns cost O(batch), and ask its bands."""

    left: int | None
    right: int | None
    offset: np.ndarray  # (...) integers

    @property
    def bands(self) -> list[Band]:
        """The band of each offset there is."""
        return [Band(self.left, self.right, int(offset)) for offset in np.unique(self.offset)]

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.offset.shape, T, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        ahead = np.arange(*cols) - np.arange(*rows)[:, None] - self.offset[..., None, None]  # of the query's own key
        allowed = np.ones(ahead.shape, bool) if self.left is None else ahead >= -self.left
        return _to(_with_head(allowed if self.right is None else allowed & (ahead <= self.right)), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({band.block(rows, cols) for band in self.bands})

    def _columns(self, rows: Range, S: int) -> Range:
        some = [(start, stop) for start, stop in (band.columns(rows, S) for band in self.bands) if start < stop]
        return (min(start for start, _ in some), max(stop for _, stop in some)) if some else (0, 0)

    def _seen(self, T: int, S: int, like: Array) -> Array:
        seen = [self.at(index).seen(T, S) for index in np.ndindex(self.offset.shape)]
        return _to(np.array(seen, bool).reshape(*_full_shape(self.offset.shape, 1, S)), like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Band(self.left, self.right, int(of_sample(self.offset, index, 0)))


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """j < n. Blocks and columns cost O(batch)."""

    n: np.ndarray  # (...) integers

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        return _full_shape(self.n.shape, 1, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        return _to(_with_head(np.arange(*cols) < self.n[..., None, None]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        if cols[0] >= self.n.max(initial=0):
            return "empty"
        return "full" if cols[1] <= self.n.min() else "mixed"

    def _columns(self, rows: Range, S: int) -> Range:
        return 0, min(S, int(self.n.max(initial=0)))

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Lengths(of_sample(self.n, index, 0))


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """keep[j]. Blocks cost O(batch · columns), columns cost O(batch · S)."""

    keep: np.ndarray  # (..., S) booleans

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("keep", self.keep, "S", S, "k")
        return _full_shape(self.keep.shape[:-1], 1, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        return _to(_with_head(self.keep[..., None, slice(*cols)]), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _summary(self.keep[..., slice(*cols)])

    def _columns(self, rows: Range, S: int) -> Range:
        return _span(np.any(self.keep, axis=tuple(range(self.keep.ndim - 1))))

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Padding(of_sample(self.keep, index, 1))


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """q_ids[i] = k_ids[j]. Blocks sort their rows and columns, if the extremes do not decide; columns sort all of S."""

    q_ids: np.ndarray  # (..., T) integers
    k_ids: np.ndarray  # (..., S) integers

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        _check_size("q_ids", self.q_ids, "T", T, "q")
        _check_size("k_ids", self.k_ids, "S", S, "k")
        return _full_shape(np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1]), T, S)

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        q, k = self.q_ids[..., slice(*rows), None], self.k_ids[..., None, slice(*cols)]
        return _to(_with_head(q == k), like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return _of_samples({_meeting(q, k) for q, k in self._samples(rows, cols)})

    def _columns(self, rows: Range, S: int) -> Range:
        seen = np.zeros(S, dtype=bool)
        for q, k in self._samples(rows, (0, S)):
            seen |= np.isin(k, q)
        return _span(seen)

    def _seen(self, T: int, S: int, like: Array) -> Array:
        seen = [np.isin(k, q) for q, k in self._samples((0, T), (0, S))]
        shape = self._shape(T, S)
        return _to(np.array(seen).reshape(*shape[:-2], 1, S), like)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Segments(of_sample(self.q_ids, index, 1), of_sample(self.k_ids, index, 1))

    def _samples(self, rows: Range, cols: Range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of these rows and of these columns, for one element of the batch after another."""
        batch = np.broadcast_shapes(self.q_ids.shape[:-1], self.k_ids.shape[:-1])
        for index in np.ndindex(batch):
            yield of_sample(self.q_ids, index, 1)[slice(*rows)], of_sample(self.k_ids, index, 1)[slice(*cols)]


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A boolean array of any library, which is not copied. Blocks read their tile."""

    array: Array  # (T or 1, S or 1), and before them nothing, (H or 1) or (..., H or 1)

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        if shape[-2] not in (1, T) or shape[-1] not in (1, S):
            raise ValueError(f"mask must broadcast to (..., H, T, S) with T={T} as in q, S={S} as in k, got {shape}")
        return shape

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        T, S = self.array.shape[-2:]
        tile = self.array[..., slice(*rows) if T != 1 else slice(1), slice(*cols) if S != 1 else slice(1)]
        if isinstance(tile, np.ndarray):
            return _to(tile, like)
        if like is None or namespace(like) is not namespace(tile):
            wanted = "numpy" if like is None else namespace(like).__name__
            raise TypeError(f"mask must be an array of {wanted} as q is, or of numpy, got {namespace(tile).__name__}")
        return tile

    def _block(self, rows: Range, cols: Range) -> Block:
        return _summary(self.tile(rows, cols)) if isinstance(self.array, np.ndarray) else "mixed"

    def _seen(self, T: int, S: int, like: Array) -> Array:
        whole = self._tile((0, T), (0, S), like)
        return namespace(whole).any(whole, axis=-2, keepdims=True)

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Dense(of_sample(self.array, index)) if self.array.ndim > 3 else self

    def _heads(self, heads: slice) -> Mask:
        return Dense(self.array[..., heads, :, :]) if self.array.ndim > 2 and self.array.shape[-3] > 1 else self


@dataclass(frozen=True, eq=False)
class Intersection(Mask):
    """What every part allows."""

    parts: tuple[Mask, ...]  # two or more, none of them an intersection

    def _shape(self, T: int, S: int) -> tuple[int, ...]:
        shapes = [part.shape(T, S) for part in self.parts]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(f"mask must have parts that broadcast to one (..., H, T, S), got {shapes}") from None

    def _tile(self, rows: Range, cols: Range, like: Array) -> Array:
        return reduce(and_, (part.tile(rows, cols, like) for part in self.parts))

    def _block(self, rows: Range, cols: Range) -> Block:
        answers = {part.block(rows, cols) for part in self.parts}
        if "empty" in answers:
            return "empty"
        return "mixed" if "mixed" in answers else "full"

    def _columns(self, rows: Range, S: int) -> Range:
        starts, stops = zip(*(part.columns(rows, S) for part in self.parts), strict=True)
        return max(starts), min(stops)

    def _seen(self, T: int, S: int, like: Array) -> Array:
        return reduce(and_, (part.seen(T, S, like) for part in self.parts))

    def _at(self, index: tuple[int, ...]) -> Mask:
        return Intersection(tuple(part.at(index) for part in self.parts))

    def _heads(self, heads: slice) -> Mask:
        return Intersection(tuple(part.heads(heads.start, heads.stop) for part in self.parts))


def causal(offset: int | np.ndarray = 0) -> Band | Bands:
    """j ≤ i + offset

    Query i stands at key position i + offset: 0 aligns the first query with the first key, S − T the last query with
    the last key, and after a key/value cache the offset is the cache's length.
    """
    return window(None, 0, offset)


def window(left: int | None, right: int | None, offset: int | np.ndarray = 0) -> Band | Bands:
    """i + offset − left ≤ j ≤ i + offset + right

    Inclusive: left = 3 sees itself and three before. None is no bound. Query i stands at key position i + offset;
    offset an int, or a NumPy array (...) of integers, one per element of the batch.
    """
    left, right = _reach("left", left), _reach("right", right)
    if isinstance(offset, np.ndarray):
        return Bands(left, right, _frozen("offset", offset, "(...)", "integers"))
    return Band(left, right, _check.integer("offset", offset, below=None, or_else=" or a NumPy array of integers"))


def lengths(n: int | np.ndarray) -> Lengths:
    """j < n     n an int, or a NumPy array (...) of integers, one per element of the batch"""
    if not isinstance(n, np.ndarray):
        n = np.asarray(_check.integer("n", n, or_else=" or a NumPy array of integers"))
    n = _frozen("n", n, "(...)", "integers")
    if np.any(n < 0):
        raise ValueError(f"n must be at least 0, got {n.min()}")
    return Lengths(n)


def padding(keep: np.ndarray) -> Padding:
    """keep[j]     keep a NumPy array (..., S) of booleans, True = attend"""
    return Padding(_frozen("keep", keep, "(..., S)", "booleans"))


def segments(q_ids: np.ndarray, k_ids: np.ndarray) -> Segments:
    """q_ids[i] = k_ids[j]     q_ids (..., T)  k_ids (..., S)  NumPy arrays of integers

    For sequences packed into one. Ids come in any order, and a segment need not be contiguous.
    """
    q_ids = _frozen("q_ids", q_ids, "(..., T)", "integers")
    k_ids = _frozen("k_ids", k_ids, "(..., S)", "integers")
    try:
        np.broadcast_shapes(q_ids.shape[:-1], k_ids.shape[:-1])
    except ValueError:
        raise ValueError(f"k_ids must be (..., S) with ...={q_ids.shape[:-1]} as in q_ids, got {k_ids.shape}") from None
    return Segments(q_ids, k_ids)


def intersection(*given: Mask | Array | None) -> Mask | None:
    """What all of them allow, where None allows everything     masks and boolean arrays   →   a mask, or None"""
    parts = [as_mask(mask) for mask in given if mask is not None]
    return reduce(and_, parts) if parts else None


def as_mask(mask: Any, name: str = "mask") -> Mask:
    """A boolean array as a `Mask`, and a `Mask` as it is; TypeError for anything else."""
    if isinstance(mask, Mask):
        return mask
    if not is_array(mask) or dtype_name(mask) != "bool":
        got = f"dtype {mask.dtype}" if is_array(mask) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean array, True = attend, or a structured mask, got {got}")
    return Dense(mask if mask.ndim >= 2 else namespace(mask).reshape(mask, (1, -1)))


def dense(mask: Any, T: int, S: int, like: Array) -> Array:
    """mask  →  booleans that broadcast to (..., H, T, S), in the library and on the device of `like`

    None stays None, and a boolean array comes back as it is, unchecked for T and S. TypeError for what is no mask,
    ValueError for a structured one that was built for another T or S.
    """
    if mask is None:
        return None
    if isinstance(mask, Mask):
        return mask.dense(T, S, like)
    as_mask(mask)
    return mask


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, Intersection) else (mask,)


def _to(tile: np.ndarray, like: Array) -> Array:
    return tile if like is None else from_host(tile, like)


def _full_shape(batch: tuple[int, ...], T: int, S: int) -> tuple[int, ...]:
    return (*batch, 1, T, S) if batch else (T, S)


def _with_head(tile: np.ndarray) -> np.ndarray:
    """(..., T, S)  →  (..., 1, T, S), but (T, S) as it is"""
    return tile[..., None, :, :] if tile.ndim > 2 else tile


def _summary(allowed: np.ndarray) -> Block:
    if not allowed.any():
        return "empty"
    return "full" if allowed.all() else "mixed"


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


def _span(seen: np.ndarray) -> Range:
    """From the first True to the last."""
    found = np.flatnonzero(seen)
    return (int(found[0]), int(found[-1]) + 1) if found.size else (0, 0)


def _reach(name: str, x: Any) -> int | None:
    if x is None:
        return None
    reach = _check.integer(name, x, below=None, or_else=" or None")
    if reach < 0:
        raise ValueError(f"{name} must be at least 0, or None for no bound, got {reach}")
    return reach


def _frozen(name: str, x: Any, symbols: str, kind: Literal["booleans", "integers"]) -> np.ndarray:
    """A read-only copy of `x`: what becomes of the caller's array does not change a mask."""
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{name} must be a NumPy array {symbols} of {kind}, got {type(x).__module__}.{type(x).__name__}"
        )
    # not uint64: np.isin compares it with int64 by rounding both to float64
    if x.dtype.kind not in ("b" if kind == "booleans" else "iu") or x.dtype == np.uint64:
        raise TypeError(f"{name} must be {symbols} of {kind}, got dtype {x.dtype}")
    if x.ndim < symbols.count(","):
        raise ValueError(f"{name} must be {symbols}, got {x.shape}")
    frozen = np.array(x)
    frozen.flags.writeable = False
    return frozen


def _check_size(name: str, x: np.ndarray, letter: str, size: int, owner: str) -> None:
    if x.shape[-1] != size:
        raise ValueError(f"mask.{name} must be (..., {letter}) with {letter}={size} as in {owner}, got {x.shape}")
