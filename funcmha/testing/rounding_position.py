"""Errors of norms and rotary positions of queries and keys, in the arithmetic of `funcmha.testing.rounding`.

  * The root of a row has one error for all its features, which moves n = x / root along itself; so has the mean.
  * Rows are first divided by a power of two, so nothing under- or overflows on the way.
  * A table is rounded once. A rotation is two sums of two products, and rotates a shared error of a row as it does x.

Not covered: rows of zeros with an eps of 0, and rows whose norm is the eps of `L2Norm`, to rounding, where its gradient
jumps.

Axes: H heads, T positions, D width, N rotated pairs of features; `...` is batch.
"""

from typing import NamedTuple

import numpy as np

from funcmha._arrays import Array
from funcmha.norms import L2Norm, LayerNorm, Norm, RMSNorm
from funcmha.params import Params
from funcmha.rotary import InterleavedPairs, Rotary

from .rounding import Arithmetic, Rounded, each, host, total, transpose


class Normed(NamedTuple):
    """The cache of a norm."""

    n: Rounded  # (..., H, T, D)
    root: Array  # (..., H, T, 1)
    off: Array  # (..., H, T, 1), the relative error of 1 / root
    short: Array  # (..., H, T, 1), whether the root is the eps of `L2Norm`


def position(
    fl: Arithmetic, x: Rounded, p: Params, norm: Norm | None, rotary: Rotary | None
) -> tuple[Rounded, Normed | None]:
    """`mha.position`"""
    cache = None
    if norm is not None:
        cache = normalise(fl, x, norm)
        x = cache.n if "w" not in p else fl.multiply(cache.n, weight(fl, p["w"], norm))
        x = x if "b" not in p else fl.add(x, p["b"])
    return (x if rotary is None else rotate(fl, x, rotary, 1)), cache


def position_vjp(
    fl: Arithmetic, cache: Normed | None, p: Params, norm: Norm | None, rotary: Rotary | None, dy: Rounded
) -> tuple[Rounded, Params]:
    """`mha.position_vjp`"""
    dy = dy if rotary is None else rotate(fl, dy, rotary, -1)
    if norm is None or cache is None:
        return dy, {}
    terms = {"w": fl.multiply(cache.n, dy), "b": dy}
    dparams = {leaf: fl.sum_rows(each(lambda a: a.reshape(-1, a.shape[-1]), terms[leaf])) for leaf in p}
    return normalise_vjp(fl, cache, norm, dy if "w" not in p else fl.multiply(dy, weight(fl, p["w"], norm))), dparams


def weight(fl: Arithmetic, w: Rounded, norm: Norm) -> Rounded:
    """w, plus the offset of `rms_norm`"""
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    return fl.add(w, Rounded(np.full(w.value.shape, offset), np.zeros(w.value.shape))) if offset else w


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def less_its_mean(fl: Arithmetic, x: Rounded, first_subtracted: bool) -> Rounded:
    """x − mean x: in `layer_norm` the row's first number is subtracted before, in its gradient it is not"""
    D = max(x.value.shape[-1], 1)
    terms = np.abs(x.value - x.value[..., :1]) if first_subtracted else np.abs(x.value)
    own = x.error + fl.u * terms * first_subtracted
    mean = np.sqrt(total(own**2)) / D + (2 + D**0.5) * fl.u * total(terms) / D
    value = x.value - total(x.value) / D
    rows = (*(row - total(row) / D for row in x.rows), np.broadcast_to(mean, value.shape))
    of_rows = sum((np.abs(total(row)) / D for row in x.rows), mean)
    return Rounded(value, own + of_rows + fl.u * np.abs(value), rows)


def normalise(fl: Arithmetic, x: Rounded, norm: Norm) -> Normed:
    """n = x / root, and its root: of `norms.rms_norm`, `l2_norm` or `layer_norm`"""
    x = less_its_mean(fl, x, True) if isinstance(norm, LayerNorm) else x
    D, is_l2 = max(x.value.shape[-1], 1), isinstance(norm, L2Norm)
    square, own = total(x.value**2), x.error - sum(map(np.abs, x.rows), np.zeros(()))
    error = 2 * np.sqrt(total((x.value * own) ** 2)) + total(x.error**2) + (1 + D**0.5) * fl.u * square
    error += sum((2 * np.abs(total(x.value * row)) for row in x.rows), np.zeros(()))
    short = np.sqrt(square) < norm.eps if is_l2 else np.zeros(square.shape, bool)
    if not is_l2:  # + eps, the square of a rounded root
        square, error = square / D + norm.eps, error / D + fl.u * (square / D + 3 * norm.eps)
        error = error + fl.u * square
    relative = np.divide(error, square, out=np.zeros(square.shape), where=square > 0)
    off = np.where(short, fl.constant(norm.eps) * fl.u, relative / (1 + np.sqrt(np.maximum(1 - relative, 0.0))) + fl.u)
    off = off / np.maximum(1 - off, fl.u)
    root = np.where(short, norm.eps, np.sqrt(square))
    root = np.where(root == 0, np.inf, root)
    n = x.value / root
    most = np.abs(n) + (1 if is_l2 else D**0.5)  # the largest norm of a row
    error = np.minimum(x.error / root * (1 + off) + np.abs(n) * off + fl.rounding(np.abs(n)), most)
    return Normed(Rounded(n, error, (n * np.minimum(off, 1.0), *(row / root for row in x.rows))), root, off, short)


def normalise_vjp(fl: Arithmetic, cache: Normed, norm: Norm, g: Rounded) -> Rounded:
    """dx = (g − n mean(n g)) / root; in `l2_norm` the sum instead of the mean, in `layer_norm` g less its mean"""
    n, root, off, short = cache
    g = less_its_mean(fl, g, False) if isinstance(norm, LayerNorm) else g
    share = np.where(short, 0.0, 1.0 if isinstance(norm, L2Norm) else 1 / max(n.value.shape[-1], 1))
    along = fl.matmul(each(lambda a: a[..., None, :], n), transpose(each(lambda a: a[..., None, :], g)))
    a, a_error = along.value[..., 0] * share, along.error[..., 0] * share
    a_error = a_error + fl.rounding(np.abs(a))
    t = g.value - n.value * a
    error = g.error + np.abs(a) * n.error + np.abs(n.value) * a_error
    error += 2 * fl.rounding(np.abs(g.value) + np.abs(n.value * a))
    rows = [row - n.value * share * total(n.value * row) for row in g.rows]
    rows += [n.value * a_error, *(a * row for row in n.rows), t * off]
    error = (error + np.abs(t) * off) / root * (1 + off) + 2 * fl.rounding(np.abs(t / root))
    return Rounded(t / root, error, tuple(row / root for row in rows))


# ── rotary positions ─────────────────────────────────────────────────────────────────────────────────────────────


def rotate(fl: Arithmetic, x: Rounded, rotary: Rotary, sign: int) -> Rounded:
    """`rotary.rotate` of x (..., H, T, D), and for sign = −1 its gradient"""
    cos, sin = host(rotary.cos), sign * host(rotary.sin)  # (..., T, N)
    n = cos.shape[-1]
    interleaved = isinstance(rotary, InterleavedPairs)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))

    def pairs(a: Array, cos: Array, sin: Array, minus: int) -> Array:
        y = np.array(a)
        y[..., first] = a[..., first] * cos + minus * a[..., second] * sin
        y[..., second] = a[..., second] * cos + a[..., first] * sin
        return y

    size = pairs(np.abs(x.value), np.abs(cos), np.abs(sin), 1)
    error = np.sqrt(pairs(x.error**2, cos**2, sin**2, 1))
    rotated = np.arange(x.value.shape[-1]) < 2 * n  # the others pass through
    error = error + np.where(rotated, fl.rounding(size, 2) + fl.rounding(size), 0.0)
    return Rounded(pairs(x.value, cos, sin, -1), error, tuple(pairs(row, cos, sin, -1) for row in x.rows))
