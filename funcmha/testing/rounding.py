"""Floating-point arithmetic whose numbers carry an error bound, and the ops of funcmha written in it.

`tolerance` replays an op and its vjp in this arithmetic, line by line. The rules:

  * Roundings are independent, with mean 0. So the errors of the n terms of a sum add to √(Σ e²), and forming the sum
    adds (1 + √n) u Σ |terms|: Theorem 3.1 of Higham and Mary (SIAM J. Sci. Comput. 41(5), 2019) with λ = 1, and 1 more
    for the shortest sums. Errors of different origin add plainly.
  * A shared error does not average out. An error of a value enters the outputs of all queries; the row sum, and Σ p dp
    in its gradient, have one error for all keys of the row; equal queries are rounded equally. `Rounded.rows` and
    `Rounded.cols` carry these errors, to be added plainly along a row or down a column.
  * A constant (a scale, a soft cap, 1 / (1 − rate)) that is not exact in float32 costs one more rounding, in any
    precision.
  * Numbers below the smallest normal number may be flushed to 0. What is 0 by structure (a masked weight, a fully
    masked row) has bound 0.

float16 and bfloat16 are storage: the arithmetic is that of float32, and the one rounding at the end may cost a unit in
the last place. Weights and lse stay float32 there. What an implementation rounds on its way besides is declared in a
`Profile`: half a unit in the last place of each such number, and half the least subnormal where it underflows. These
roundings add plainly, not as if they were independent, for equal weights are rounded equally.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from funcmha._arrays import HALF, Array, unbroadcast

from .profiles import STRICT, Profile

U = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "complex128": 2.0**-53}
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-500}  # as we take squares
LEAST = {"float16": 2.0**-25, "bfloat16": 2.0**-134}  # half the least subnormal: what rounding costs near 0
EXP = 4.0  # exp and log have an error of at most 2 units in the last place, in NumPy, PyTorch and CUDA


class Rounded(NamedTuple):
    value: Array  # in exact arithmetic
    error: Array  # |computed − value| ≤ error, entry by entry
    rows: tuple[Array, ...] = ()  # parts of the error: each is this times one unknown of [−1, 1] per row
    cols: tuple[Array, ...] = ()  # parts of the error: each is this times one unknown of [−1, 1] per column


Maybe = Rounded | None  # None where there is none
R = TypeVar("R", bound=Maybe)


def exact(x: Array) -> Any:
    """x without error; None for None."""
    return None if x is None else Rounded(host(x), np.zeros(tuple(x.shape)))


def each(f: Callable[[Array], Array], x: R) -> R:
    """x after f, which only moves numbers; None for None."""
    return x if x is None else Rounded(f(x.value), f(x.error), tuple(map(f, x.rows)), tuple(map(f, x.cols)))  # type: ignore[return-value]


def total(a: Array) -> Array:
    """Σ along each row: (..., n)   →   (..., 1)"""
    return np.sum(a, axis=-1, keepdims=True)


def transpose(x: Rounded) -> Rounded:
    """xᵀ"""
    value, error, rows, cols = each(lambda a: np.swapaxes(a, -1, -2), x)
    return Rounded(value, error, rows=cols, cols=rows)


def alike(x: Rounded) -> Rounded:
    """x before a sum over rows that may be almost equal: then they are rounded equally."""
    return x._replace(cols=(x.error,) if np.any(x.error) else ())


def tie(x: Rounded) -> Rounded:
    """x before a sum over rows: the errors of m equal rows add to m e, which is √m times √(Σ e²)."""
    *batch, T, n = x.value.shape
    error = np.sum(x.error, axis=-1)
    mark = np.rint(1e3 * np.sum(x.value * np.cos(np.arange(n)), axis=-1) / np.where(error > 0, error, 1.0))
    matrix = np.arange(prod(batch)).reshape(*batch, 1)
    _, row, count = np.unique(mark + 1j * matrix, return_inverse=True, return_counts=True)
    return x._replace(error=x.error * np.sqrt(count[row].reshape(*batch, T, 1)))


class Arithmetic(NamedTuple):
    """Floating-point arithmetic on `Rounded`: its primitives, and the ops of funcmha written in them."""

    u: float
    tiny: float  # a result below this may be computed as 0
    profile: Profile = STRICT
    u_stored: float = 0.0  # of what the profile says is rounded on the way, and half the least subnormal of its dtype
    least: float = 0.0

    @classmethod
    def of(cls, dtype: Any, profile: Profile = STRICT) -> "Arithmetic":
        """The arithmetic for arrays stored as `dtype`, of an implementation that computes as the profile says."""
        stored = name_of(dtype)
        if stored not in HALF:
            return cls(U[stored], TINY.get(stored, TINY["float64"]), profile)
        return cls(U["float32"], TINY["float32"], profile, U[stored], LEAST[stored])

    def stored(self, name: str, x: Array) -> Array:
        """What rounding x to the dtype of the inputs costs, if the profile says that it is, else 0"""
        return (self.u_stored * np.abs(x) + self.least * (x != 0)) * (name in self.profile.stored)

    def rounding(self, size: Array, n: Array | float = 0) -> Array:
        """Error of a sum of n products with Σ |terms| = size; for n = 0 of one operation with a result of that size."""
        return (1 + n**0.5) * (self.u * size + self.tiny * (size > 0))

    def add(self, x: Rounded, y: Rounded) -> Rounded:
        """x + y"""
        value = x.value + y.value
        return Rounded(value, x.error + y.error + self.rounding(np.abs(value)), x.rows)

    def constant(self, c: Array | float) -> Array:
        """The roundings in c: 1, or 0 if it is exact in float32."""
        exactly = np.asarray(c, np.float64)
        return np.where(exactly.astype(np.float32) == exactly, 0.0, 1.0)

    def times(self, x: Rounded, c: Array | float) -> Rounded:
        """x c, where c is a constant"""
        y = each(lambda a: a * c, x)
        error = np.abs(y.error) + (1 + self.constant(c)) * self.rounding(np.abs(y.value))
        return y._replace(error=error)

    def multiply(self, x: Rounded, y: Rounded) -> Rounded:
        """x ⊙ y"""
        value = x.value * y.value
        error = np.abs(x.value) * y.error + (np.abs(y.value) + y.error) * x.error + self.rounding(np.abs(value))
        return Rounded(value, error, tuple(row * y.value for row in x.rows))

    def matmul(self, x: Rounded, y: Rounded) -> Rounded:
        """x y"""
        fl = self._replace(u=max(self.u, self.u_stored), tiny=max(self.tiny, self.least))
        fl = fl if "sums" in self.profile.stored else self
        error = fl.rounding(np.abs(x.value) @ np.abs(y.value), x.value.shape[-1])
        if np.any(x.error):
            error += np.sqrt(x.error**2 @ y.value**2)
        if np.any(y.error):
            error += np.sqrt((np.abs(x.value) + x.error) ** 2 @ y.error**2)
        rows = tuple(row @ y.value for row in x.rows)
        for part in (*rows, *(x.value @ col for col in y.cols)):
            error += np.abs(part)
        return Rounded(x.value @ y.value, error, rows)

    def product(self, x: Rounded, y: Rounded, stored: Array) -> Rounded:
        """x y, where x is off by `stored` besides, in entries that are rounded alike"""
        z = self.matmul(x, y)
        return z._replace(error=z.error + stored @ np.abs(y.value)) if np.any(stored) else z

    def partial(self, name: str, x: Rounded, y: Rounded) -> Array:
        """What the running sums of x y cost, x (..., S, T), where they are stored after each tile and at the end"""
        if name not in self.profile.stored or not self.u_stored:
            return np.zeros(())
        T, at = x.value.shape[-1], 0
        total, cost = np.zeros((*x.value.shape[:-1], y.value.shape[-1])), np.zeros(())
        while at < T:
            rows = slice(at, at := at + (self.profile.tile or T))
            total = total + x.value[..., rows] @ y.value[..., rows, :]
            cost = cost + self.stored(name, total)
        return cost

    def unbroadcast(self, x: Rounded, shape: tuple[int, ...]) -> Rounded:
        """The sum over the axes along which `shape` was broadcast."""
        if x.value.shape == shape:
            return x
        size = unbroadcast(np.abs(x.value), shape)
        error = self.rounding(size, x.value.size // max(size.size, 1)) + np.sqrt(unbroadcast(x.error**2, shape))
        for parts, axis in ((x.rows, -1), (x.cols, -2)):
            for part in parts if len(shape) < -axis or shape[axis] == 1 else ():
                error += np.sqrt(unbroadcast(np.sum(part, axis=axis, keepdims=True) ** 2, shape))
        cols = x.cols if shape[-2:] == x.value.shape[-2:] else ()
        return Rounded(unbroadcast(x.value, shape), error, cols=tuple(unbroadcast(col, shape) for col in cols))

    def sum_rows(self, x: Rounded) -> Rounded:
        """Σ over the rows, some of which may be equal: (..., T, n)   →   (..., n)"""
        *batch, _, n = x.value.shape
        return each(lambda a: a[..., 0, :], self.unbroadcast(tie(Rounded(x.value, x.error)), (*batch, 1, n)))

    def linear(self, x: Rounded, w: Rounded, b: Maybe) -> Rounded:
        """`ops.linear`"""
        y = self.matmul(x, transpose(w))
        return y if b is None else self.add(y, b)

    def linear_vjp(self, x: Rounded, w: Rounded, b: Maybe, dy: Rounded) -> tuple[Any, ...]:
        """`ops.linear_vjp`"""
        rows, drows = (tie(each(lambda a: a.reshape(prod(a.shape[:-1]), a.shape[-1]), a)) for a in (x, dy))
        dx = self.matmul(dy, w)
        dw = self.matmul(transpose(drows), alike(rows))
        db = None if b is None else self.unbroadcast(drows, b.value.shape)
        return dx, dw, db


# ── shapes, dtypes ───────────────────────────────────────────────────────────────────────────────────────────────


def host(x: Array) -> Array:
    """x, from any library, as a NumPy array: float64, or boolean."""
    if x is None:
        return None
    if type(x).__module__.startswith("cupy"):
        x = x.get()
    if type(x).__module__.startswith("torch"):
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    x = np.asarray(x)
    return x if x.dtype == bool else x.astype(np.float64)


def name_of(dtype: Any) -> str:
    """'float32' for numpy.float32, torch.float32, "float32", …; TypeError for other dtypes."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if name not in U:
        raise TypeError(f"dtype must be one of {', '.join(U)}, got {dtype!r}")
    return str(name)
