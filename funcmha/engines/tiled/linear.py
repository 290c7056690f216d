"""`funcmha.ops.linear` and its vjp, one or several, in blocks of rows shared out among the threads."""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt, prod
from typing import Any

import numpy as np

from funcmha._arrays import Array
from funcmha.engines.plan import Plan, evenly
from funcmha.ops import LinearCache

from . import threads
from .products import product


def linear(x: Array, w: Array, b: Array = None, /, *, add_to: Array = None, plan: Plan) -> Array:
    """y = add_to + x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)

    Of arguments that are checked and upcast. y is written into `add_to`, unless that is None.
    """
    (y,) = linears([LinearCache(x, w, b)], add_to=add_to, plan=plan)
    return y


def linear_vjp(
    cache: LinearCache, dy: Array | tuple[Array, ...], /, *, add_to: Array = None, batch_axes: int = 0, plan: Plan
) -> tuple[Array, Array, Array]:
    """dx = add_to + dy w     dw = Σ dy xᵀ     db = Σ dy        sums over all axes but the first `batch_axes`

    Of arguments that are checked and upcast. `dy` is one array, or several side by side, which are put together a block
    of rows at a time. dx is written into `add_to`, unless that is None.
    """
    (dx,), ((dw, db),) = linears_vjp([cache], [dy], add_to=[add_to], batch_axes=batch_axes, plan=plan)
    return dx, dw, db


def linears(caches: Sequence[LinearCache], /, *, add_to: Array = None, plan: Plan) -> list[Array]:
    """`linear` of each, on threads that need not wait between them"""
    ys, tasks, flops = [], [], 0
    for x, w, b in caches:
        rows, wt = _rows(x), w.T
        if len(rows) > plan.copied_rows:
            wt = np.ascontiguousarray(wt)  # row-major by row-major is the fastest of the products
        y = np.empty((len(rows), len(w)), rows.dtype) if add_to is None else _rows(add_to)
        tasks += [(rows[i], wt[:, j], None if b is None else b[j], y[i, j]) for i, j in _pieces(y, plan)]
        ys.append(y.reshape(*x.shape[:-1], len(w)))
        flops += 2 * rows.size * len(w)

    def work(task: tuple[Array, Array, Array, Array]) -> None:
        x, wt, b, y = task
        product(x, wt, out=y, add=add_to is not None, plan=plan)
        if b is not None:
            y += b

    with threads.single_threaded_blas():
        threads.run(work, tasks, flops, plan)
    return ys


def linears_vjp(
    caches: Sequence[LinearCache],
    dys: Sequence[Array | tuple[Array, ...]],
    /,
    *,
    add_to: Sequence[Array],
    batch_axes: int = 0,
    plan: Plan,
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """`linear_vjp` of each: a dx for each of `add_to`, and all (dw, db)

    Where `add_to` is one array, or None, and they are several, they are of one x, and dx = add_to + Σ dyᵢ wᵢ.
    """
    xs, parts, n = [_rows(cache.x) for cache in caches], [_parts(dy) for dy in dys], len(add_to)
    dxs = [np.empty(x.shape, x.dtype) if a is None else _rows(a) for x, a in zip(xs, add_to, strict=False)]
    dws, tasks, of_all = [], [], _of_all if batch_axes == 0 else _of_samples
    for (x, w, b), rows, dy in zip(caches, xs, parts, strict=True):
        batch = x.shape[:batch_axes]
        dw, db = np.empty((*batch, *w.shape), w.dtype), None if b is None else np.empty((*batch, len(w)), w.dtype)
        tasks += of_all(dy, rows, dw, db, plan)
        dws.append((dw, db))
    for i, (dx, a) in enumerate(zip(dxs, add_to, strict=True)):  # the shortest last, for the threads to end together
        of_one = [(dy, cache.w) for dy, cache in zip(parts[i::n], caches[i::n], strict=True)]
        tasks += _of_x(of_one, dx, a is not None, plan)
    flops = sum(4 * rows.size * len(cache.w) for cache, rows in zip(caches, xs, strict=True))
    with threads.single_threaded_blas():
        threads.run(lambda task: task[0](task[1]), tasks, flops, plan)
    return [dx.reshape(cache.x.shape) for cache, dx in zip(caches, dxs, strict=False)], dws


def _of_x(factors: list[tuple[list[Array], Array]], dx: Array, add: bool, plan: Plan) -> list[Any]:
    """Tasks that write Σ dyᵢ wᵢ into dx (N, I), or add it"""

    def of_x(at: tuple[slice, slice]) -> None:
        for n, (dy, w) in enumerate(factors):
            product(_side_by_side(dy, at[0]), w[:, at[1]], out=dx[at], add=add or n > 0, plan=plan)

    return [(of_x, at) for at in _pieces(dx, plan)]


def _of_all(parts: list[Array], rows: Array, dw: Array, db: Array, plan: Plan) -> list[Any]:
    """Tasks that write dw (O, I) and db (O), in partial sums"""

    def of_w(at: tuple[slice, slice]) -> None:
        size = max(len(rows), 1) if len(parts) == 1 else plan.terms  # of several parts some rows are copied at a time
        for k in range(0, max(len(rows), 1), size):
            some = slice(k, k + size)
            product(_side_by_side(parts, some, at[0]).T, rows[some, at[1]], out=dw[at], add=k > 0, plan=plan)

    def of_b(_: None) -> None:
        np.concatenate([_sum(part) for part in parts], out=db)

    tasks: list[Any] = [(of_w, at) for at in _blocks(*dw.shape, plan.weight_block, plan.weight_block)]
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
            db[some] = _sum(g)

    size = max(plan.linear_rows // max(n, 1), 1)
    return [(of_some, slice(i, min(i + size, B))) for i in range(0, B, size)]


def _pieces(y: Array, plan: Plan) -> tuple[tuple[slice, slice], ...]:
    """y (N, O) by rows, and, where these are of one task, by columns too"""
    N, O = y.shape
    return _blocks(N, O, plan.linear_rows, plan.linear_cols if plan.linear_rows >= N else max(O, 1))


@lru_cache(64)
def _blocks(N: int, O: int, rows: int, cols: int) -> tuple[tuple[slice, slice], ...]:
    """0 … N and 0 … O in blocks of so many rows and columns at most, of about the same size"""
    return tuple((i, j) for i in _in_pairs(N, rows) for j in _in_pairs(O, cols))


def _in_pairs(n: int, size: int) -> list[slice]:
    """0 … n in an even number of ranges of this size at most, or in one: then two threads end together"""
    if n <= size:
        return [slice(0, n)] if n else []
    pairs = -(-n // (2 * size))
    return evenly(0, n, -(-n // (2 * pairs)))


def _parts(dy: Array | tuple[Array, ...]) -> list[Array]:
    """One array, or several side by side, as matrices (N, ·)"""
    return [_rows(part) for part in (dy if isinstance(dy, tuple) else (dy,))]


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
    """Σ of the rows of x (..., N, I)   →   (..., I)     in sums of √N"""
    *batch, N, I = x.shape
    n = max(isqrt(N), 1)
    m, ones = N // n, np.ones(max(n, N // n), x.dtype)
    sums = ones[:n] @ x[..., : m * n, :].reshape(*batch, m, n, I)
    total = ones[:m] @ sums
    return total if m * n == N else total + ones[: N - m * n] @ x[..., m * n :, :]


def _rows(x: Array) -> Array:
    """x (..., I)   →   (N, I)"""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])
