"""`funcmha.ops.linear` and its vjp, in blocks of rows shared out among the threads."""

from math import isqrt, prod
from typing import Any

import numpy as np

from funcmha import _check
from funcmha._doors import check_linear
from funcmha._xp import Array, narrow, widen
from funcmha.ops import LinearCache

from . import threads
from .products import TERMS, product

FEW = 2048  # rows for which w is not laid out anew: that takes a fifth of the product of 1024, and spares a twentieth
ROWS = 256  # of x in one task: a fixed number, so that the result does not depend on how many threads there are
COLS = 256  # of y, or of dx, in one task where there are no more rows than those of one
BLOCK = 192  # rows and columns of dw in one task: larger ones are faster, but then one thread waits for the other


def linear(x: Array, w: Array, b: Array = None, /, *, onto: Array = None) -> tuple[Array, LinearCache]:
    """y = onto + x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)     as `funcmha.ops.linear`

    `onto` is of y's shape and in the dtype computed with, and y is written into it; or None.
    """
    check_linear(x, w, b)
    cache = LinearCache(widen(x), widen(w), widen(b))
    rows, wt = _rows(cache.x), cache.w.T
    if len(rows) > FEW:
        wt = np.ascontiguousarray(wt)  # row-major by row-major is the fastest of the products
    y = np.empty((len(rows), len(w)), rows.dtype) if onto is None else _rows(onto)

    def work(at: tuple[slice, slice]) -> None:
        block = product(rows[at[0]], wt[:, at[1]], out=y[at], add=onto is not None)
        if b is not None:
            block += cache.b[at[1]]

    with threads.single_threaded_blas():
        threads.run(work, _pieces(y), flops=2 * rows.size * len(w))
    return narrow(y.reshape(*x.shape[:-1], len(w)), x.dtype), cache


def linear_vjp(
    cache: LinearCache, dy: Array | tuple[Array, ...], /, *, onto: Array = None
) -> tuple[Array, Array, Array]:
    """dx = onto + dy w     dw = Σ dy xᵀ     db = Σ dy        sums over the batch axes, in partial sums of TERMS

    `dy` is one array, or several side by side, which are put together a block of rows at a time. `onto` is of x's shape
    and in the dtype computed with, and dx is written into it; or None.
    """
    x, w, b = cache
    given = dy if isinstance(dy, tuple) else (dy,)
    if not isinstance(dy, tuple):  # several come from within
        _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    rows, parts = _rows(x), [_rows(widen(part)) for part in given]
    dx = np.empty(rows.shape, x.dtype) if onto is None else _rows(onto)
    dw, db = np.empty(w.shape, w.dtype), np.empty(len(w), w.dtype)

    def of_x(at: tuple[slice, slice]) -> None:
        product(_beside(parts, at[0]), w[:, at[1]], out=dx[at], add=onto is not None)

    def of_w(at: tuple[slice, slice]) -> None:
        for k in range(0, max(len(rows), 1), TERMS):
            terms = slice(k, k + TERMS)
            product(_beside(parts, terms, at[0]).T, rows[terms, at[1]], out=dw[at], add=k > 0)

    def of_b(_: None) -> None:
        n = max(isqrt(len(rows)), 1)
        sums = [_sum(_beside(parts, slice(k, k + n))) for k in range(0, len(rows), n)]
        db[:] = _sum(np.stack(sums)) if sums else 0.0

    tasks: list[Any] = [(of_w, at) for at in _blocks(w, BLOCK, BLOCK)] + [(of_b, None)] * (b is not None)
    tasks += [(of_x, at) for at in _pieces(dx)]  # the shortest last, for the threads to end together
    with threads.single_threaded_blas():
        threads.run(lambda task: task[0](task[1]), tasks, flops=4 * rows.size * len(w))
    dtype = given[0].dtype
    return narrow(dx.reshape(x.shape), dtype), narrow(dw, dtype), None if b is None else narrow(db, dtype)


def _pieces(y: Array) -> list[tuple[slice, slice]]:
    """y (N, O) by rows, and, where these are of one task, by columns too"""
    return _blocks(y, ROWS, COLS if len(y) <= ROWS else max(len(y.T), 1))


def _blocks(y: Array, rows: int, cols: int) -> list[tuple[slice, slice]]:
    """y (N, O) in blocks of so many rows and columns"""
    return [(slice(i, i + rows), slice(j, j + cols)) for i in range(0, len(y), rows) for j in range(0, len(y.T), cols)]


def _beside(parts: list[Array], rows: slice, cols: slice = slice(None)) -> Array:
    """These rows and columns of arrays (N, ·) that stand side by side"""
    if len(parts) == 1:
        return parts[0][rows, cols]
    blocks, (start, stop, _) = [], cols.indices(sum(len(part.T) for part in parts))
    for part in parts:
        blocks.append(part[rows, max(start, 0) : max(stop, 0)])
        start, stop = start - len(part.T), stop - len(part.T)
    return np.concatenate(blocks, axis=1)


def _sum(x: Array) -> Array:
    """Σ of the rows of x (N, I)   →   (I)"""
    return np.ones(len(x), x.dtype) @ x


def _rows(x: Array) -> Array:
    """x (..., I)   →   (N, I)"""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])
