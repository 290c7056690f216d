"""What a bias is: an array of the scores, or a number for each difference of positions, behind the same methods.

Axes: T queries, S keys, S' keys with appended ones, H heads; `...` is batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from funcmha import _check
from funcmha._arrays import Array, full, is_array, namespace, of_heads, unbroadcast

from .tiles import diagonal_sums, toeplitz


class _Values(NamedTuple):
    values: Array


class Bias(_Values):
    """What is added to the scores, in its own shape. A gradient is of the same kind, with the shape of the values."""

    __slots__ = ()
    name: ClassVar[str]  # of the values, in messages
    rank: ClassVar[int]  # axes from the head axis on

    @property
    def given(self) -> Any:
        """What the caller writes for it: an array, or the `RelativeBias` itself."""
        raise NotImplementedError

    def dense(self, T: int, S: int) -> Array:
        """An array that broadcasts to (..., H, T, S)"""
        raise NotImplementedError

    def dense_vjp(self, dz: Array) -> Self:
        """The gradient from that of the scores (..., H, T, S): the sum over all scores that have the same number"""
        raise NotImplementedError

    def append_keys(self, S: int, extra: int) -> Self:
        """For S keys and `extra` more, at which it is 0     S' = S + extra"""
        raise NotImplementedError

    def append_keys_vjp(self, S: int, dbias: Self) -> Self:
        """The gradient of this bias from that of the one with appended keys"""
        raise NotImplementedError

    def check(self, axes: _check.Axes, scores: str) -> None:
        """Raise ValueError unless it broadcasts to `scores`, such as "... H T S", whose sizes `axes` knows."""
        raise NotImplementedError

    def map(self, f: Callable[[Array], Array]) -> Self:
        """The bias with f of its values."""
        return type(self)(f(self.values))

    def heads(self, h: slice) -> Self:
        """Of the heads `h`, where it has a head axis."""
        return type(self)(of_heads(self.values, h, self.rank))

    def with_head_axis(self) -> Self:
        """(..., T, S)   →   (..., 1, T, S); without batch axes there is nothing to tell apart"""
        return self if self.values.ndim < self.rank else type(self)(self.values[self._at(None)])

    def without_head_axis(self) -> Self:
        """(..., 1, T, S)   →   (..., T, S): the inverse of `with_head_axis`"""
        return self if self.values.ndim <= self.rank else type(self)(self.values[self._at(0)])

    def join(self, parts: Sequence[Self]) -> Self:
        """The gradient of this bias from those of groups of heads, which had their heads of it each, or all of it."""
        if len(parts) == 1:
            return parts[0]
        values, axis = [part.values for part in parts], -self.rank
        own = self.values.ndim >= self.rank and self.values.shape[axis] > 1
        return type(self)(namespace(values[0]).concat(values, axis=axis) if own else sum(values[1:], values[0]))

    def _at(self, head: int | None) -> tuple[Any, ...]:
        return (..., head, *(slice(None),) * (self.rank - 1))


class ArrayBias(Bias):
    """z = u + values     values broadcast to (..., H, T, S)"""

    __slots__ = ()
    name = "bias"
    rank = 3

    @property
    def given(self) -> Array:
        """The array."""
        return self.values

    def dense(self, T: int, S: int) -> Array:
        """The array as it is."""
        return self.values

    def dense_vjp(self, dz: Array) -> "ArrayBias":
        """Σ dz over every axis that was broadcast"""
        return ArrayBias(unbroadcast(dz, tuple(self.values.shape)))

    def append_keys(self, S: int, extra: int) -> "ArrayBias":
        """(..., S or 1)   →   (..., S')     columns of 0"""
        if extra == 0:
            return self
        a, xp = self.values, namespace(self.values)
        columns = full((*a.shape[:-1], extra), 0.0, a)
        return ArrayBias(xp.concat([xp.broadcast_to(a, (*a.shape[:-1], S)), columns], axis=-1))

    def append_keys_vjp(self, S: int, dbias: "ArrayBias") -> "ArrayBias":
        """(..., S')   →   (..., S or 1)"""
        if dbias.values.ndim == 0:  # one number, and nothing was appended to it
            return dbias
        return ArrayBias(unbroadcast(dbias.values[..., :S], tuple(self.values.shape)))

    def check(self, axes: _check.Axes, scores: str) -> None:
        """Raise ValueError unless the array broadcasts to `scores`."""
        axes.broadcast("bias", tuple(self.values.shape), scores)


class RelativeBias(Bias):
    """z = u + values[..., j − i + T − 1] at score (i, j): a bias in place of its array (..., H or 1, T, S)

    values   (..., H or 1, T + S − 1), or (T + S − 1,) for all heads
    """

    __slots__ = ()
    name = "bias.values"
    rank = 2

    @property
    def given(self) -> "RelativeBias":
        """The bias itself."""
        return self

    def dense(self, T: int, S: int) -> Array:
        """bias (..., H or 1, T, S)     in NumPy a view, that cannot be written to; ValueError for other T and S"""
        check_relative("bias", self, T, S)
        return toeplitz(self.values, (0, T), (0, S), T)

    def dense_vjp(self, dz: Array) -> "RelativeBias":
        """Σ dz along each diagonal, and over the axes that were broadcast"""
        return RelativeBias(unbroadcast(diagonal_sums(dz), tuple(self.values.shape)))

    def append_keys(self, S: int, extra: int) -> "RelativeBias":
        """Raises ValueError where there are more keys: they have no position."""
        if extra:
            raise ValueError("bias must be an array with bias_kv or zero_attn: an appended key has no position")
        return self

    def append_keys_vjp(self, S: int, dbias: "RelativeBias") -> "RelativeBias":
        """The gradient as it is."""
        return dbias

    def check(self, axes: _check.Axes, scores: str) -> None:
        """Raise ValueError unless there are T + S − 1 values, whose other axes broadcast to those of `scores`."""
        check_relative("bias", self, axes["T"], axes["S"])
        axes.size["T+S-1"] = self.values.shape[-1]
        axes.broadcast(self.name, tuple(self.values.shape), scores.replace("T S", "T+S-1"))


def as_bias(x: Any) -> ArrayBias | RelativeBias | None:
    """An array as an `ArrayBias`, a `RelativeBias` and None as they are; TypeError for anything else"""
    if x is None or isinstance(x, ArrayBias | RelativeBias):
        return x
    if not is_array(x):
        raise TypeError(f"bias must be an array, got {type(x).__name__}")
    return ArrayBias(x)


def check_relative(name: str, relative: Any, T: int, S: int) -> None:
    """Raise unless `relative` is a RelativeBias of T + S − 1 values."""
    if not isinstance(relative, RelativeBias):
        raise TypeError(f"{name} must be a RelativeBias, got {type(relative).__name__}")
    _check.one_dtype([(f"{name}.values", relative.values)])
    shape = tuple(relative.values.shape)
    if not shape or shape[-1] != max(T + S - 1, 0):
        raise ValueError(f"{name}.values must be (..., H or 1, T + S − 1) with T={T} and S={S}, got {shape}")
