"""Floating-point arithmetic whose numbers know how far off they may be, and the ops of funcmha written in it.

`tolerance` replays an op and its vjp in it, line by line. The rules:

  * Roundings are independent, with mean 0. So the errors of the n terms of a sum add to √(Σ e²), and forming the sum
    adds (1 + √n) u Σ |terms|: Theorem 3.1 of Higham and Mary (SIAM J. Sci. Comput. 41(5), 2019) with λ = 1, and 1 more
    for the shortest sums. Errors of different origin add plainly.
  * What is one error in many places does not average out. An error of a value enters the outputs of all queries; the
    total of a row, and Σ p dp in its gradient, are off by one amount for all its keys; queries that are alike are
    rounded alike. `Rounded.row` and `Rounded.col` carry these, to be added plainly along a row or down a column.
  * Softmax makes an absolute error of a score a relative error of its weight. A common shift changes nothing, so a
    weight over 1/2 is what the others of its row are compared with, and has no error itself: a saturated row is exact.
    (After Blanchard, Higham and Higham, IMA J. Numer. Anal. 41(4), 2021, Theorem 4.3, with errors in the scores.)
  * What is smaller than the smallest normal number may be flushed to 0. What is 0 by structure (a masked weight, an
    empty row) has bound 0.

float16 and bfloat16 are storage: the arithmetic is float32's, and the one rounding at the end may cost a unit in the
last place. Weights and lse stay float32 there.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._xp import HALF, Array, unbroadcast
from funcmha.params import Params

U = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "complex128": 2.0**-53}
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-500}  # as we take squares
EXP = 4.0  # exp and log are off by 2 units in the last place at most, in NumPy, PyTorch and CUDA


class Rounded(NamedTuple):
    value: Array  # in exact arithmetic
    error: Array  # |computed − value| ≤ error, entry by entry
    row: Array = None  # the part of it that is one unknown of [−1, 1] in each row, times this
    col: Array = None  # the part of it that is one unknown of [−1, 1] in each column, times this


class Static(NamedTuple):
    mask: Array
    scale: float | None
    keep: Array
    rate: float
    dweights: Rounded | None
    dlse: Rounded | None
    recomputed: bool


def exact(x: Array) -> Any:
    """x without error; None for None."""
    return None if x is None else Rounded(host(x), np.zeros(tuple(x.shape)))


def each(f: Callable[[Array], Array], x: Any) -> Any:
    """x after f, which only moves numbers about; None for None."""
    return None if x is None else Rounded(*(None if a is None else f(a) for a in x))


def transpose(x: Rounded) -> Rounded:
    """xᵀ"""
    value, error, row, col = each(lambda a: np.swapaxes(a, -1, -2), x)
    return Rounded(value, error, row=col, col=row)


def alike(x: Rounded) -> Rounded:
    """x, where rows will be summed over that may be all but equal: then they are rounded alike."""
    return x._replace(col=x.error if np.any(x.error) else None)


def tie(x: Rounded) -> Rounded:
    """x, where rows will be summed over: of m that are equal the errors add to m e, which is √m times √(Σ e²)."""
    *batch, T, n = x.value.shape
    error = np.sum(x.error, axis=-1)
    mark = np.rint(1e3 * np.sum(x.value * np.cos(np.arange(n)), axis=-1) / np.where(error > 0, error, 1.0))
    matrix = np.arange(prod(batch)).reshape(*batch, 1)
    _, row, count = np.unique(mark + 1j * matrix, return_inverse=True, return_counts=True)
    return x._replace(error=x.error * np.sqrt(count[row].reshape(*batch, T, 1)))


class Arithmetic(NamedTuple):
    """Floating-point arithmetic on `Rounded`: its primitives, and the ops of funcmha written in them."""

    u: float
    tiny: float  # below this, what is computed may be 0

    @classmethod
    def of(cls, dtype: Any) -> "Arithmetic":
        """What is computed with where `dtype` is stored."""
        name = "float32" if name_of(dtype) in HALF else name_of(dtype)
        return cls(U[name], TINY.get(name, TINY["float64"]))

    def rounding(self, size: Array, n: int = 0) -> Array:
        """Of a sum of n products where Σ |terms| = size; n = 0: of one operation whose result has that size."""
        return (1 + n**0.5) * (self.u * size + self.tiny * (size > 0))

    def add(self, x: Rounded, y: Rounded) -> Rounded:
        """x + y"""
        value = x.value + y.value
        return Rounded(value, x.error + y.error + self.rounding(np.abs(value)), x.row)

    def times(self, x: Rounded, c: Array | float) -> Rounded:
        """x c, where c is exact"""
        y = each(lambda a: a * c, x)
        return y._replace(error=np.abs(y.error) + self.rounding(np.abs(y.value)))  # type: ignore[no-any-return]

    def matmul(self, x: Rounded, y: Rounded) -> Rounded:
        """x y"""
        error = self.rounding(np.abs(x.value) @ np.abs(y.value), x.value.shape[-1])
        row = None
        if np.any(x.error):
            error += np.sqrt(x.error**2 @ y.value**2)
        if np.any(y.error):
            error += np.sqrt((np.abs(x.value) + x.error) ** 2 @ y.error**2)
        if x.row is not None:
            row = x.row @ y.value
            error += np.abs(row)
        if y.col is not None:
            error += np.abs(x.value @ y.col)
        return Rounded(x.value @ y.value, error, row)

    def unbroadcast(self, x: Rounded, shape: tuple[int, ...]) -> Rounded:
        """The sum over the axes along which `shape` was broadcast."""
        if x.value.shape == shape:
            return x
        size = unbroadcast(np.abs(x.value), shape)
        error = self.rounding(size, x.value.size // max(size.size, 1)) + np.sqrt(unbroadcast(x.error**2, shape))
        for part, axis in ((x.row, -1), (x.col, -2)):
            if part is not None and (len(shape) < -axis or shape[axis] == 1):
                error += np.sqrt(unbroadcast(np.sum(part, axis=axis, keepdims=True) ** 2, shape))
        col = None if x.col is None or shape[-2:] != x.value.shape[-2:] else unbroadcast(x.col, shape)
        return Rounded(unbroadcast(x.value, shape), error, col=col)

    def linear(self, x: Rounded, w: Rounded, b: Rounded | None) -> Rounded:
        """`ops.linear`"""
        y = self.matmul(x, transpose(w))
        return y if b is None else self.add(y, b)

    def linear_vjp(self, x: Rounded, w: Rounded, b: Rounded | None, dy: Rounded) -> tuple[Any, ...]:
        """`ops.linear_vjp`"""
        rows, drows = (tie(each(lambda a: a.reshape(prod(a.shape[:-1]), a.shape[-1]), a)) for a in (x, dy))
        dx = self.matmul(dy, w)
        dw = self.matmul(transpose(drows), alike(rows))
        db = None if b is None else self.unbroadcast(drows, b.value.shape)
        return dx, dw, db

    def project(self, p: Params, x: Rounded) -> Rounded:
        """`heads.project`"""
        H, D, _ = p["w"].value.shape
        y = self.linear(x, each(_rows, p["w"]), each(np.ravel, p.get("b")))
        return each(lambda a: a.reshape(*a.shape[:-1], H, D), y)  # type: ignore[no-any-return]

    def project_vjp(self, p: Params, x: Rounded, dy: Rounded) -> tuple[Params, Rounded]:
        """`heads.project_vjp`"""
        dx, dw, db = self.linear_vjp(x, each(_rows, p["w"]), each(np.ravel, p.get("b")), each(_merge, dy))
        return _like(p, dw, db), dx

    def extend_drow(self, dy: Rounded, S: int) -> Rounded:
        """`heads.extend_vjp`: of the row that is appended after S"""
        return self.unbroadcast(Rounded(dy.value[..., S, :, :], dy.error[..., S, :, :]), dy.value.shape[-2:])

    def combine(self, p: Params, o: Rounded, dy: Rounded) -> tuple[Rounded, Params]:
        """`heads.combine` and the parameters' part of `heads.combine_vjp`: y, dparams"""
        w, b, o = each(_merge, p["w"]), p.get("b"), each(_merge, o)
        _, dw, db = self.linear_vjp(o, w, b, dy)
        return self.linear(o, w, b), _like(p, dw, db)

    def combine_do(self, p: Params, dy: Rounded) -> Rounded:
        """do of `heads.combine_vjp`"""
        _, H, E = p["w"].value.shape
        do = self.matmul(dy, each(_merge, p["w"]))
        return each(lambda a: a.reshape(*a.shape[:-1], H, E), do)  # type: ignore[no-any-return]

    def softmax(self, z: Rounded, allowed: Array) -> tuple[Rounded, Rounded, Rounded]:
        """`ops._softmax`: p, p from lse, and lse"""
        u, n = self.u, z.value.shape[-1] ** 0.5
        x = np.where(allowed, z.value, -np.inf)
        top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
        empty = np.isneginf(top)
        top = np.where(empty, 0.0, top)
        e = np.exp(x - top)
        total = np.where(empty, 1.0, np.sum(e, axis=-1, keepdims=True))
        p, log_total = e / total, np.log(total)
        lse = np.where(empty, -np.inf, top + log_total)

        below = np.where(allowed, top - x, 0.0)
        score = np.where(allowed, z.error, 0.0)
        heavy = p > 0.5  # no row has two
        light = np.where(heavy, 0.0, p)

        def of_heavy(error: Array) -> Array:
            return np.sum(error * heavy, axis=-1, keepdims=True)

        def apart(error: Array) -> Array:
            return np.where(heavy, 0.0, error + of_heavy(error))

        e_error = score + u * (below + EXP)  # relative
        common = np.sqrt(np.sum((light * e_error) ** 2, axis=-1, keepdims=True)) + u * (2 + n)
        common += np.sum(light, axis=-1, keepdims=True) * of_heavy(e_error)
        if z.row is not None:
            common += np.sum(p * apart(z.row), axis=-1, keepdims=True)
        shift = np.log1p(np.sum(p * np.expm1(np.minimum(score, 700.0)), axis=-1, keepdims=True))
        size = np.sum(p * (below + EXP), axis=-1, keepdims=True) + 1 + n + EXP * log_total + np.abs(lse)
        lse_error = np.where(empty, 0.0, shift + u * size)

        def weights(own: Array, common: Array) -> Rounded:
            # p grows to p exp(r) at most, and to 1; first order would not do where scores are off by more than 1
            r = own + common
            error = np.exp(np.minimum(r - below - log_total, 0.0)) * -np.expm1(-r) + self.tiny
            return Rounded(p, np.where(allowed, error, 0.0), p * np.minimum(common, 1.0))

        again = weights(e_error, lse_error)  # exp(x − lse)
        return weights(apart(e_error), common), again, Rounded(lse[..., 0], lse_error[..., 0])

    def softmax_vjp(self, p: Rounded, dp: Rounded, dlse: Rounded | None) -> Rounded:
        """`ops._softmax_vjp`"""
        delta = self.matmul(each(lambda a: a[..., None, :], p), each(lambda a: a[..., None], dp))
        delta = each(lambda a: a[..., 0], delta)
        size = np.abs(dp.value) + np.abs(delta.value)
        g, common = dp.value - delta.value, delta.error
        if dlse is not None:
            g = g + dlse.value[..., None]
        error = (p.value + p.error) * (dp.error + common + 2 * self.rounding(size)) + p.error * np.abs(g)
        error += self.rounding(np.abs(p.value * g))
        return Rounded(p.value * g, error, p.value * common)

    def attention(
        self, q: Rounded, k: Rounded, v: Rounded, bias: Rounded | None, do: Rounded, static: Static
    ) -> tuple[Rounded, ...]:
        """`ops.attention` and `ops.attention_vjp`: o, p, lse, dq, dk, dv, dz"""
        mask, scale, keep, rate, dweights, dlse, recomputed = static
        (*lead, D), S = q.value.shape, k.value.shape[-2]
        scale = max(D, 1) ** -0.5 if scale is None else scale
        dropout = 1.0 if keep is None else keep / (1 - rate)
        allowed = np.broadcast_to(True if mask is None else mask, (*lead, S))
        if bias is not None:
            allowed = allowed & (bias.value > -np.inf)
            bias = each(lambda a: np.where(np.isneginf(a), 0.0, a), bias)
        group = 1 if q.value.ndim < 3 else q.value.shape[-3] // max(k.value.shape[-3], 1)
        seen = np.any(allowed, axis=-2)[..., None]
        kh, vh = (each(lambda a: np.where(seen, a if group == 1 else np.repeat(a, group, -3), 0.0), a) for a in (k, v))

        qs = self.times(q, scale)
        z = self.matmul(qs, transpose(kh))._replace(row=np.sqrt(qs.error**2 @ np.swapaxes(kh.value, -1, -2) ** 2))
        z = z if bias is None else self.add(z, bias)
        p, again, lse = self.softmax(z, allowed)
        o = self.matmul(self.times(p, dropout), vh)
        p = again if recomputed else p
        a = self.times(p, dropout)

        dv = self.matmul(transpose(alike(a)), do)
        # an error of do is one for all dv of a column
        dv = dv._replace(col=np.sqrt(np.swapaxes(a.value, -1, -2) ** 2 @ tie(do).error ** 2))
        dp = self.times(self.matmul(do, transpose(vh)), dropout)
        dp = dp if dweights is None else self.add(dp, dweights)
        dz = self.softmax_vjp(p, dp, dlse)
        dk = self.matmul(transpose(alike(dz)), qs)
        dq = self.times(self.matmul(dz, kh), scale)
        return o, p, lse, dq, self.per_key_head(dk, group), self.per_key_head(dv, group), dz

    def per_key_head(self, g: Rounded, group: int) -> Rounded:
        """`ops._per_key_head`"""
        if group == 1:
            return g
        *batch, H, S, D = g.value.shape
        g = self.unbroadcast(
            each(lambda a: a.reshape(*batch, H // group, group, S, D), g), (*batch, H // group, 1, S, D)
        )
        return each(lambda a: a[..., 0, :, :], g)  # type: ignore[no-any-return]


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
    """'float32' for numpy.float32, torch.float32, "float32", …; TypeError unless it is one that funcmha takes."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if name not in U:
        raise TypeError(f"dtype must be one of {', '.join(U)}, got {dtype!r}")
    return str(name)


def _rows(w: Array) -> Array:
    """The heads as the rows of one matrix: (H, D, C)   →   (H·D, C)"""
    return w.reshape(w.shape[0] * w.shape[1], w.shape[2])


def _merge(a: Array) -> Array:
    """The heads side by side: (..., H, E)   →   (..., H·E)"""
    return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])


def _like(p: Params, w: Rounded, b: Rounded | None) -> Params:
    """w and b in the shapes of those of p."""
    dw = each(lambda a: a.reshape(p["w"].value.shape), w)
    return {"w": dw} if b is None else {"w": dw, "b": each(lambda a: a.reshape(p["b"].value.shape), b)}
