"""`funcmha.ops.linear` and its vjp, in blocks of rows shared out among the threads."""

from math import isqrt, prod
from typing import Any

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, downcast, upcast
from funcmha.engines.plan import Plan
from funcmha.ops import LinearCache

from . import threads
from .products import product


def linear(x: Array, w: Array, b: Array = None, /, *, add_to: Array = None, plan: Plan) -> tuple[Array, LinearCache]:
    """y = add_to + x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)     as `funcmha.ops.linear`

    `add_to` is of y's shape and in the dtype computed with, and y is written into it; or None.
    """
    cache = LinearCache(upcast(x), upcast(w), upcast(b))
    rows, wt = _rows(cache.x), cache.w.T
    if len(rows) > plan.copied_rows:
        wt = np.ascontiguousarray(wt)  # row-major by row-major is the fastest of the products
    y = np.empty((len(rows), len(w)), rows.dtype) if add_to is None else _rows(add_to)

    def work(at: tuple[slice, slice]) -> None:
        block = product(rows[at[0]], wt[:, at[1]], out=y[at], add=add_to is not None, terms=plan.terms)
        if b is not None:
            block += cache.b[at[1]]

    with threads.single_threaded_blas():
        threads.run(work, _pieces(y, plan), flops=2 * rows.size * len(w), plan=plan)
    return downcast(y.reshape(*x.shape[:-1], len(w)), x.dtype), cache


def linear_vjp(
    cache: LinearCache, dy: Array | tuple[Array, ...], /, *, add_to: Array = None, batch_axes: int = 0, plan: Plan
) -> tuple[Array, Array, Array]:
    """dx = add_to + dy w     dw = Σ dy xᵀ     db = Σ dy        sums over all axes but the first `batch_axes`

    `dy` is one array, or several side by side, which are put together a block of rows at a time. `add_to` is of x's
    shape and in the dtype computed with, and dx is written into it; or None.
    """
    x, w, b = cache
    given = dy if isinstance(dy, tuple) else (dy,)
    if not isinstance(dy, tuple):  # several come from within
        _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    rows, parts = _rows(x), [_rows(upcast(part)) for part in given]
    dx = np.empty(rows.shape, x.dtype) if add_to is None else _rows(add_to)

    def of_x(at: tuple[slice, slice]) -> None:
        product(_side_by_side(parts, at[0]), w[:, at[1]], out=dx[at], add=add_to is not None, terms=plan.terms)

    batch = x.shape[:batch_axes]
    of_all = _of_all if batch_axes == 0 else _of_samples
    dw, db = np.empty((*batch, *w.shape), w.dtype), np.empty((*batch, len(w)), w.dtype)
    tasks = of_all(parts, rows, dw, None if b is None else db, plan)
    tasks += [(of_x, at) for at in _pieces(dx, plan)]  # the shortest last, for the threads to end together
    with threads.single_threaded_blas():
        threads.run(lambda task: task[0](task[1]), tasks, flops=4 * rows.size * len(w), plan=plan)
    dtype = given[0].dtype
    return downcast(dx.reshape(x.shape), dtype), downcast(dw, dtype), None if b is None else downcast(db, dtype)


def _of_all(parts: list[Array], rows: Array, dw: Array, db: Array, plan: Plan) -> list[Any]:
    """Tasks that write dw (O, I) and db (O), in partial sums"""

    def of_w(at: tuple[slice, slice]) -> None:
        for k in range(0, max(len(rows), 1), plan.terms):
            some = slice(k, k + plan.terms)
            product(_side_by_side(parts, some, at[0]).T, rows[some, at[1]], out=dw[at], add=k > 0, terms=plan.terms)

    def of_b(_: None) -> None:
        n = max(isqrt(len(rows)), 1)
        sums = [_sum(_side_by_side(parts, slice(k, k + n))) for k in range(0, len(rows), n)]
        db[:] = _sum(np.stack(sums)) if sums else 0.0

    tasks: list[Any] = [(of_w, at) for at in _blocks(dw, plan.weight_block, plan.weight_block)]
    return tasks if db is None else [*tasks, (of_b, None)]


def _of_samples(parts: list[Array], rows: Array, dw: Array, db: Array, plan: Plan) -> list[Any]:
    """Tasks that write dw (..., O, I) and db (..., O) of each sample, in partial sums: some samples each"""
    (O, I), B = dw.shape[-2:], prod(dw.shape[:-2])
    n = len(rows) // max(B, 1)  # of a sample
    x, dw, db = rows.reshape(B, n, I), dw.reshape(B, O, I), None if db is None else db.reshape(B, O)

    def of_some(some: slice) -> None:
        g = _side_by_side(parts, slice(some.start * n, some.stop * n)).reshape(some.stop - some.start, n, O)
        for k in range(0, max(n, 1), plan.terms):
            part = g[:, k : k + plan.terms]
            product_of_part = np.matmul(part.swapaxes(1, 2), x[some, k : k + plan.terms])
            dw[some] = product_of_part if k == 0 else dw[some] + product_of_part
        if db is not None:
            size = max(isqrt(n), 1)
            sums = [np.ones(min(size, n - k), g.dtype) @ g[:, k : k + size] for k in range(0, n, size)]
            db[some] = np.stack(sums).sum(axis=0) if sums else 0.0

    size = max(plan.linear_rows // max(n, 1), 1)
    return [(of_some, slice(i, min(i + size, B))) for i in range(0, B, size)]


def _pieces(y: Array, plan: Plan) -> list[tuple[slice, slice]]:
    """y (N, O) by rows, and, where these are of one task, by columns too"""
    return _blocks(y, plan.linear_rows, plan.linear_cols if len(y) <= plan.linear_rows else max(len(y.T), 1))


def _blocks(y: Array, rows: int, cols: int) -> list[tuple[slice, slice]]:
    """y (N, O) in blocks of so many rows and columns"""
    return [(slice(i, i + rows), slice(j, j + cols)) for i in range(0, len(y), rows) for j in range(0, len(y.T), cols)]


def _side_by_side(parts: list[Array], rows: slice, cols: slice = slice(None)) -> Array:
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
