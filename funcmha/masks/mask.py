"""What a mask is: the questions that it answers; an array as one; and what several allow."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from operator import and_
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, beside, described, dtype_name, from_host, is_array, namespace, of_sample

Range = tuple[int, int]  # start, stop within 0 … T or 0 … S
Block = Literal["empty", "full", "mixed"]

ROWS, COLS = 256, 32  # of the tiles in which an intersection looks for a key of each query: most find one in the first


class Mask(ABC):
    """A boolean (..., H, T, S), True = attend, that can be asked about its blocks.

    `mask & other` and `other & mask` are what both allow; `other` is a mask or a boolean array. (Libraries that refuse
    foreign operands, such as array-api-strict, want the mask on the left.)

    Each kind is also a `NamedTuple` of what it holds, so that a cache with a mask is a plain pytree. Two masks are
    equal only if they are one: their arrays are not compared.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that NumPy leaves array & mask to __rand__
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    @abstractmethod
    def shape(self, T: int, S: int) -> tuple[int, ...]:
        """The shape that `dense(T, S)` has, which is not made; ValueError if the mask was built for another T or S."""

    def dense(self, T: int, S: int, like: Array = None) -> Array:
        """The booleans: (T or 1, S or 1), and before them the batch and a head axis where the mask has them.

        In the library and on the device of `like`, or of NumPy. ValueError if the mask was built for another T or S,
        TypeError if it holds an array of a third library.
        """
        self.shape(T, S)
        return self.tile((0, T), (0, S), like)

    @abstractmethod
    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        """`dense(T, S, like)[..., rows, cols]` where an axis of size 1 stays as it is, at the cost of the tile."""

    def block(self, rows: Range, cols: Range) -> Block:
        """Whether the block is "empty" (no True), "full" (no False) or "mixed", in all of the batch and heads at once.

        A block without rows or columns is empty. The answer is exact, but for two kinds of mask for which "mixed" means
        "perhaps": an intersection, whose parts may exclude each other, and an array outside NumPy, where a look would
        wait for the device.
        """
        return "empty" if rows[0] >= rows[1] or cols[0] >= cols[1] else self._block(rows, cols)

    def columns(self, rows: Range, S: int) -> Range:
        """The columns outside which these rows attend to nothing; (0, 0) if there are none.

        The least such range, but for arrays (always all of S) and intersections (all that is common to their parts).
        """
        start, stop = self._columns(rows, S) if rows[0] < rows[1] else (0, 0)
        return (start, stop) if start < stop else (0, 0)

    def attended_keys(self, T: int, S: int, like: Array = None) -> Array:
        """The keys that any query attends to: the rows of `dense(T, S, like)` joined by or, at the cost of one row.

        Exactly. An array costs all its rows; of an intersection tiles are looked at until each key has a query.
        """
        return self.tile((0, 1), (0, S), like)  # of the masks whose rows are all alike

    def attending_queries(self, T: int, S: int, like: Array = None) -> Array:
        """The queries that attend to any key: the columns of `dense(T, S, like)` joined into one by or, exactly.

        Without the T × S array: of an intersection tiles are looked at until each query has a key, or none is left. An
        array costs all its columns, and an intersection with one outside NumPy is made whole.
        """
        return from_host(self.tile((0, 1), (0, S)).any(axis=-1, keepdims=True), like)  # of the same

    def at(self, index: tuple[int, ...]) -> "Mask":
        """The mask of one element of the batch; a head axis stays.

        `index` has one entry per batch axis of q: a mask with fewer reads the last ones, and one of size 1 serves all.
        """
        return self

    def heads(self, start: int, stop: int) -> "Mask":
        """The mask of heads start … stop, where it has a head axis."""
        return self

    def __and__(self, other: Any) -> "Intersection":
        return Intersection(_parts(self) + _parts(as_mask(other, "an operand of &")))

    __rand__ = __and__

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask is neither true nor false: join masks with &, and test for absence with `is None`")

    @abstractmethod
    def _block(self, rows: Range, cols: Range) -> Block: ...  # has a row and a column

    def _columns(self, rows: Range, S: int) -> Range:  # has a row; stop ≤ start means none
        return 0, S


class Dense(Mask, NamedTuple("_Dense", [("array", Array)])):
    """A boolean array of any library, which is not copied. Blocks read their tile.

    array   (T or 1, S or 1), and before them nothing, (H or 1) or (..., H or 1)
    """

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        if shape[-2] not in (1, T) or shape[-1] not in (1, S):
            raise ValueError(f"mask must broadcast to (..., H, T, S) with T={T} as in q, S={S} as in k, got {shape}")
        return shape

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        T, S = self.array.shape[-2:]
        tile = self.array[..., slice(*rows) if T != 1 else slice(1), slice(*cols) if S != 1 else slice(1)]
        if not isinstance(tile, np.ndarray) and (like is None or namespace(like) is not namespace(tile)):
            wanted = "a NumPy array" if like is None else f"{described(like)} as q is, or a NumPy array"
            raise TypeError(f"mask must be {wanted}, got {described(tile)}")
        return beside(tile, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return summary(self.tile(rows, cols)) if isinstance(self.array, np.ndarray) else "mixed"

    def attended_keys(self, T: int, S: int, like: Array = None) -> Array:
        return _any(self.dense(T, S, like), -2)

    def attending_queries(self, T: int, S: int, like: Array = None) -> Array:
        return _any(self.dense(T, S, like), -1)

    def at(self, index: tuple[int, ...]) -> Mask:
        return Dense(of_sample(self.array, index)) if self.array.ndim > 3 else self

    def heads(self, start: int, stop: int) -> Mask:
        return Dense(self.array[..., start:stop, :, :]) if self.array.ndim > 2 and self.array.shape[-3] > 1 else self


class Intersection(Mask, NamedTuple("_Intersection", [("parts", tuple[Mask, ...])])):
    """What every part allows: two or more, none of them an intersection."""

    __slots__ = ()

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        shapes = [part.shape(T, S) for part in self.parts]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(f"mask must have parts that broadcast to one (..., H, T, S), got {shapes}") from None

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        return reduce(and_, (part.tile(rows, cols, like) for part in self.parts))

    def _block(self, rows: Range, cols: Range) -> Block:
        answers = {part.block(rows, cols) for part in self.parts}
        if "empty" in answers:
            return "empty"
        return "mixed" if "mixed" in answers else "full"

    def _columns(self, rows: Range, S: int) -> Range:
        starts, stops = zip(*(part.columns(rows, S) for part in self.parts), strict=True)
        return max(starts), min(stops)

    def attended_keys(self, T: int, S: int, like: Array = None) -> Array:
        if self._needs_device():
            return _any(self.dense(T, S, like), -2)
        may = reduce(and_, (part.attended_keys(T, S) for part in self.parts))
        *outer, _, n = self.shape(T, S)
        may = np.broadcast_to(may, (*outer, 1, n))
        found = np.zeros(may.shape, dtype=bool)
        for stop in range(T, 0, -ROWS):  # the last rows of most masks attend the most keys
            if np.array_equal(found, may):
                break
            rows = max(stop - ROWS, 0), stop
            cols = self.columns(rows, S)
            found[..., slice(*cols) if n > 1 else slice(None)] |= self.tile(rows, cols).any(axis=-2, keepdims=True)
        return from_host(found, like)

    def _needs_device(self) -> bool:
        return any(isinstance(part, Dense) and not isinstance(part.array, np.ndarray) for part in self.parts)

    def attending_queries(self, T: int, S: int, like: Array = None) -> Array:
        if self._needs_device():
            return _any(self.dense(T, S, like), -1)
        may = reduce(and_, (part.attending_queries(T, S) for part in self.parts))
        return from_host(self._found(np.broadcast_to(may, (*self.shape(T, S)[:-1], 1)), S), like)

    def _found(self, may: np.ndarray, S: int) -> np.ndarray:
        """Of the queries for which each part has a key, those that attend to one     (..., H, T or 1, 1)"""
        found = np.zeros(may.shape, dtype=bool)
        for start in range(0, may.shape[-2], ROWS):
            rows = start, min(start + ROWS, may.shape[-2])
            wanted, some = may[..., slice(*rows), :], found[..., slice(*rows), :]  # a view, written to
            for cols in _wider_each_time(self.columns(rows, S)):
                if np.array_equal(some, wanted):
                    break
                some |= self.tile(rows, cols).any(axis=-1, keepdims=True)
        return found

    def at(self, index: tuple[int, ...]) -> Mask:
        return Intersection(tuple(part.at(index) for part in self.parts))

    def heads(self, start: int, stop: int) -> Mask:
        return Intersection(tuple(part.heads(start, stop) for part in self.parts))


def as_mask(mask: Any, name: str = "mask") -> Mask:
    """A boolean array as a `Mask`, and a `Mask` as it is; TypeError for anything else."""
    if isinstance(mask, Mask):
        return mask
    if not is_array(mask) or dtype_name(mask) != "bool":
        got = f"dtype {mask.dtype}" if is_array(mask) else type(mask).__name__
        wanted = "a boolean array, True = attend, or a structured mask"
        raise TypeError(f"{name} must be {wanted}, got {got}{_check.no_booleans(name, mask)}")
    return Dense(mask if mask.ndim >= 2 else namespace(mask).reshape(mask, (1, -1)))


def arrays_of(mask: Mask) -> list[Array]:
    """The arrays, of any library, that are a part of the mask."""
    if isinstance(mask, Dense):
        return [mask.array]
    return [array for part in getattr(mask, "parts", ()) for array in arrays_of(part)]


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, Intersection) else (mask,)


def _any(allowed: Array, axis: int) -> Array:
    return namespace(allowed).any(allowed, axis=axis, keepdims=True)


def _wider_each_time(cols: Range) -> Iterator[Range]:
    """Columns from left to right, few at first, then twice as many each time."""
    (start, stop), width = cols, COLS
    while start < stop:
        yield start, min(start + width, stop)
        start, width = start + width, 2 * width


def summary(allowed: np.ndarray) -> Block:
    """What `block` says of these booleans."""
    if not allowed.any():
        return "empty"
    return "full" if allowed.all() else "mixed"
