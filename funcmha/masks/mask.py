"""What a mask is: the questions that it answers; an array as one; and masks joined with &, | and ~."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import and_, or_
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from funcmha import _check
from funcmha._arrays import (
    Array,
    cut,
    described,
    dtype_name,
    from_host,
    in_library_of,
    is_array,
    namespace,
    of_sample,
    rows_and_columns,
)

from .search import any_along, found_keys, found_queries

Range = tuple[int, int]  # start, stop within 0 … T or 0 … S
Block = Literal["empty", "full", "mixed"]


class Mask(ABC):
    """A boolean (..., H, T, S), True = attend, that can be asked about its blocks.

    `mask & other` is what both allow, `mask | other` what either does, `~mask` what it forbids; `other` is a mask or a
    boolean array, on either side. (Libraries that refuse foreign operands, such as array-api-strict, want it on the
    right.)

    Each kind is also a `NamedTuple` of what it holds, so that a cache with a mask is a plain pytree. Two masks are
    equal, and have one hash, if they are of one kind and hold the same: as a static argument of `jax.jit` a mask is
    traced once. An array that was made a mask is not compared, as it may change: it is equal to itself alone.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that NumPy leaves array & mask to __rand__

    @property
    def on_host(self) -> bool:
        """Whether it can be looked at: no array of it is outside NumPy, where a look would wait for a device."""
        return all(isinstance(leaf.array, np.ndarray) for leaf in operands(self) if isinstance(leaf, Dense))

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

        A block without rows or columns is empty. The answer is exact; only of arrays outside NumPy, where a look would
        wait for the device, "mixed" means "perhaps". Where two or more joined masks are mixed, it costs their tiles.
        """
        return "empty" if rows[0] >= rows[1] or cols[0] >= cols[1] else self._block(rows, cols)

    def columns(self, rows: Range, S: int) -> Range:
        """The columns outside which these rows attend to nothing; (0, 0) if there are none.

        The least such range, but for arrays and complements (always all of S) and intersections (all that is common to
        their parts).
        """
        start, stop = self._columns(rows, S) if rows[0] < rows[1] else (0, 0)
        return (start, stop) if start < stop else (0, 0)

    def attended_keys(self, T: int, S: int, like: Array = None) -> Array:
        """The keys that any query attends to: the rows of `dense(T, S, like)` joined by or, at the cost of one row.

        Exactly, and none where there are no queries. An array costs all its rows; of intersections and complements
        tiles are looked at until each key has a query, or none is left.
        """
        if T and S:
            return self._attended_keys(T, S, like)
        *outer, _, m = self.shape(T, S)
        return from_host(np.zeros((*outer, 1, m), dtype=bool), like)

    def attending_queries(self, T: int, S: int, like: Array = None) -> Array:
        """The queries that attend to any key: the columns of `dense(T, S, like)` joined into one by or, exactly.

        None where there are no keys. Without the T × S array: of intersections and complements tiles are looked at
        until each query has a key, or none is left. An array costs all its columns, and what is joined with one outside
        NumPy is made whole.
        """
        if T and S:
            return self._attending_queries(T, S, like)
        *outer, n, _ = self.shape(T, S)
        return from_host(np.zeros((*outer, n, 1), dtype=bool), like)

    def at(self, index: tuple[int | slice, ...]) -> "Mask":
        """The mask of one element of the batch, or, where the last entry of `index` is a slice, of several; a head axis
        stays.

        `index` has one entry per batch axis of q: a mask with fewer reads the last ones, and one of size 1 serves all.
        """
        return self

    def heads(self, start: int, stop: int) -> "Mask":
        """The mask of heads start … stop, where it has a head axis."""
        return self

    @abstractmethod
    def part(self, rows: Range, cols: Range) -> "Mask":
        """The mask of these queries and keys alone, which are 0, 1, … of it; ValueError if it has none of them.

        Rows of a mask that was built for more: a step of a decoder takes those of its tokens.
        """

    def select(self, rows: range, cols: range) -> "Mask":
        """The mask of the queries and keys in two ranges of one step, neither empty, which are 0, 1, … of it"""
        part = self.part((rows.start, rows[-1] + 1), (cols.start, cols[-1] + 1))
        return part if rows.step == 1 else part._every(rows.step, rows[-1] + 1 - rows.start, cols[-1] + 1 - cols.start)

    def __and__(self, other: Any) -> "Mask":
        return Intersection(_parts(self, Intersection) + _parts(as_mask(other, "an operand of &"), Intersection))

    def __or__(self, other: Any) -> "Mask":
        return Union(_parts(self, Union) + _parts(as_mask(other, "an operand of |"), Union))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> "Mask":
        return Complement(self)

    def __add__(self, other: Any) -> NoReturn:  # which would join the tuples that masks are
        raise TypeError("masks are joined with & (what both allow) or | (what either does), not with +")

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and _held(self) == _held(other))

    def __ne__(self, other: object) -> bool:  # or that of tuples would answer
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), _held(self)))

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask is neither true nor false: join masks with &, | and ~, and test absence with `is None`")

    @abstractmethod
    def _block(self, rows: Range, cols: Range) -> Block: ...  # has a row and a column

    def _columns(self, rows: Range, S: int) -> Range:  # has a row; stop ≤ start means none
        return 0, S

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:  # has a row and a column
        return self.tile((0, 1), (0, S), like)  # of the masks whose rows are all alike

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:  # has a row and a column
        return from_host(self.tile((0, 1), (0, S)).any(axis=-1, keepdims=True), like)  # of the same

    @abstractmethod
    def _every(self, n: int, T: int, S: int) -> "Mask": ...  # of queries and keys 0, n, 2n, … of T and S


class Dense(Mask, NamedTuple("_Dense", [("array", Array)])):
    """A boolean array of any library, which is not copied. Blocks read their tile.

    array   (T or 1, S or 1), and before them nothing, (H or 1) or (..., H or 1)
    """

    __slots__ = ()
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        if shape[-2] not in (1, T) or shape[-1] not in (1, S):
            raise ValueError(f"mask must broadcast to (..., H, T, S) with T={T} as in q, S={S} as in k, got {shape}")
        return shape

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        tile = cut(self.array, rows_and_columns(self.array, rows, cols))
        if not isinstance(tile, np.ndarray) and (like is None or namespace(like) is not namespace(tile)):
            wanted = "a NumPy array" if like is None else f"{described(like)} as q is, or a NumPy array"
            raise TypeError(f"mask must be {wanted}, got {described(tile)}")
        return in_library_of(tile, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        return summary(self.tile(rows, cols)) if self.on_host else "mixed"

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        return any_along(self.dense(T, S, like), -2)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        return any_along(self.dense(T, S, like), -1)

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return Dense(of_sample(self.array, index)) if self.array.ndim > 3 else self

    def heads(self, start: int, stop: int) -> Mask:
        return Dense(self.array[..., start:stop, :, :]) if self.array.ndim > 2 and self.array.shape[-3] > 1 else self

    def part(self, rows: Range, cols: Range) -> Mask:
        T, S = self.array.shape[-2:]
        if (T != 1 and rows[1] > T) or (S != 1 and cols[1] > S):
            raise ValueError(
                f"mask must have {rows[1]} queries and {cols[1]} keys, or 1, got {tuple(self.array.shape)}"
            )
        return Dense(cut(self.array, rows_and_columns(self.array, rows, cols)))

    def _every(self, n: int, T: int, S: int) -> Mask:
        return Dense(self.array[..., ::n, ::n])  # an axis of size 1 stays as it is


class _Joined(Mask):
    """What two operators have in common: `_join` joins booleans, and one answer of a part decides a block."""

    __slots__ = ()
    parts: tuple[Mask, ...]  # two or more, none of them of this class
    _join: Callable[[Any, Any], Any]
    _decides: Block
    _leaves: Block  # to the other parts

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        shapes = [part.shape(T, S) for part in self.parts]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(f"mask must have parts that broadcast to one (..., H, T, S), got {shapes}") from None

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        return reduce(self._join, (part.tile(rows, cols, like) for part in self.parts))

    def _block(self, rows: Range, cols: Range) -> Block:
        answers = [part.block(rows, cols) for part in self.parts]
        if self._decides in answers:
            return self._decides
        mixed = [part for part, answer in zip(self.parts, answers, strict=True) if answer == "mixed"]
        if len(mixed) < 2 or not self.on_host:
            return "mixed" if mixed else self._leaves
        return summary(reduce(self._join, (part.tile(rows, cols) for part in mixed)))

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return type(self)(tuple(part.at(index) for part in self.parts))  # type: ignore[call-arg]

    def heads(self, start: int, stop: int) -> Mask:
        return type(self)(tuple(part.heads(start, stop) for part in self.parts))  # type: ignore[call-arg]

    def part(self, rows: Range, cols: Range) -> Mask:
        return type(self)(tuple(part.part(rows, cols) for part in self.parts))  # type: ignore[call-arg]

    def _every(self, n: int, T: int, S: int) -> Mask:
        return reduce(self._join, (part._every(n, T, S) for part in self.parts))


class Intersection(_Joined, NamedTuple("_Intersection", [("parts", tuple[Mask, ...])])):
    """What every part allows: two or more, none of them an intersection."""

    __slots__ = ()
    _join, _decides, _leaves = staticmethod(and_), "empty", "full"

    def _columns(self, rows: Range, S: int) -> Range:
        starts, stops = zip(*(part.columns(rows, S) for part in self.parts), strict=True)
        return max(starts), min(stops)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        may = [part.attended_keys(T, S) for part in self.parts] if self.on_host else []
        return found_keys(self, may, T, S, like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        may = [part.attending_queries(T, S) for part in self.parts] if self.on_host else []
        return found_queries(self, may, T, S, like)


class Union(_Joined, NamedTuple("_Union", [("parts", tuple[Mask, ...])])):
    """What any part allows: two or more, none of them a union."""

    __slots__ = ()
    _join, _decides, _leaves = staticmethod(or_), "full", "empty"

    def _columns(self, rows: Range, S: int) -> Range:
        return hull(part.columns(rows, S) for part in self.parts)

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        return reduce(or_, (part.attended_keys(T, S, like) for part in self.parts))

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        return reduce(or_, (part.attending_queries(T, S, like) for part in self.parts))


class Complement(Mask, NamedTuple("_Complement", [("mask", Mask)])):
    """What `mask` forbids."""

    __slots__ = ()

    def __invert__(self) -> Mask:
        return self.mask

    def shape(self, T: int, S: int) -> tuple[int, ...]:
        return self.mask.shape(T, S)

    def tile(self, rows: Range, cols: Range, like: Array = None) -> Array:
        return ~self.mask.tile(rows, cols, like)

    def _block(self, rows: Range, cols: Range) -> Block:
        opposite: dict[Block, Block] = {"empty": "full", "full": "empty", "mixed": "mixed"}
        return opposite[self.mask.block(rows, cols)]

    def _attended_keys(self, T: int, S: int, like: Array) -> Array:
        return found_keys(self, [], T, S, like)

    def _attending_queries(self, T: int, S: int, like: Array) -> Array:
        return found_queries(self, [], T, S, like)

    def at(self, index: tuple[int | slice, ...]) -> Mask:
        return Complement(self.mask.at(index))

    def heads(self, start: int, stop: int) -> Mask:
        return Complement(self.mask.heads(start, stop))

    def part(self, rows: Range, cols: Range) -> Mask:
        return Complement(self.mask.part(rows, cols))

    def _every(self, n: int, T: int, S: int) -> Mask:
        return ~self.mask._every(n, T, S)


def as_mask(mask: Any, name: str = "mask") -> Mask:
    """A boolean array as a `Mask`, and a `Mask` as it is; TypeError for anything else."""
    if isinstance(mask, Mask):
        return mask
    if not is_array(mask) or dtype_name(mask) != "bool":
        got = f"dtype {mask.dtype}" if is_array(mask) else type(mask).__name__
        wanted = "a boolean array, True = attend, or a structured mask"
        raise TypeError(f"{name} must be {wanted}, got {got}{_check.no_booleans(name, mask)}")
    return Dense(mask if mask.ndim >= 2 else namespace(mask).reshape(mask, (1, -1)))


def operands(mask: Mask) -> Iterator[Mask]:
    """The masks that were joined into this one, or itself."""
    match mask:
        case Intersection(parts) | Union(parts):
            for part in parts:
                yield from operands(part)
        case Complement(forbidden):
            yield from operands(forbidden)
        case _:
            yield mask


def _held(mask: Any) -> tuple[Any, ...]:
    """What a mask holds, by value: each of its arrays as its shape, dtype and bytes"""
    return tuple((x.shape, x.dtype.str, x.tobytes()) if isinstance(x, np.ndarray) else x for x in mask)


def _parts(mask: Mask, kind: type[_Joined]) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, kind) else (mask,)


def hull(ranges: Iterable[Range]) -> Range:
    """From the first to the last of what is in any of the ranges"""
    some = [a for a in ranges if a != (0, 0)]
    return min((start for start, _ in some), default=0), max((stop for _, stop in some), default=0)


def summary(allowed: np.ndarray) -> Block:
    """What `block` says of these booleans."""
    if not allowed.any():
        return "empty"
    return "full" if allowed.all() else "mixed"
