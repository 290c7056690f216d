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

FEW = 16  # rows for which w is not laid out anew: of 512 × 512 in float32 that takes 336 µs, the product of 8 rows 66
ROWS = 256  # of x in one task: a fixed number, so that the result does not depend on how many threads there are
BLOCK = 192  # rows and columns of dw in one task: larger ones are faster, but then one thread waits for the other


def linear(x: Array, w: Array, b: Array = None, /, *, onto: Array = None) -> tuple[Array, LinearCache]:
    """y = onto + x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)     as `funcmha.ops.linear`

    `onto` is of y's shape and in the dtype computed with, and y is written into it; or None.
    """
    check_linear(x, w, b)
    cache = LinearCache(widen(x), widen(w), widen(b))
    rows, wt = _rows(cache.x), cache.w.T
    if len(rows) >= FEW:
        wt = np.ascontiguousarray(wt)  # row-major by row-major is the fastest of the products
    y = np.empty((len(rows), len(w)), rows.dtype) if onto is None else _rows(onto)

    def work(i: int) -> None:
        block = product(rows[i : i + ROWS], wt, out=y[i : i + ROWS], add=onto is not None)
        if b is not None:
            block += cache.b

    with threads.single_threaded_blas():
        threads.run(work, range(0, len(rows), ROWS), flops=2 * rows.size * len(w))
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
    dw, db = np.zeros_like(w), np.zeros(len(w), w.dtype)
    wide = w.shape[1] >= len(w)
    out = dw if wide else dw.T  # leftᵀ right

    def of_x(i: int, _: int) -> None:
        product(_beside(parts, i, ROWS), w, out=dx[i : i + ROWS], add=onto is not None)

    def of_w(i: int, j: int) -> None:
        at = slice(i, i + BLOCK), slice(j, j + BLOCK)
        for k in range(0, len(rows), TERMS):
            g, block = _beside(parts, k, TERMS), rows[k : k + TERMS]
            left, right = (g, block) if wide else (block, g)
            product(left[:, at[0]].T, right[:, at[1]], out=out[at], add=True)

    def of_b(_: int, __: int) -> None:
        n = max(isqrt(len(rows)), 1)
        sums = [_sum(_beside(parts, k, n)) for k in range(0, len(rows), n)]
        db[:] = _sum(np.stack(sums)) if sums else 0.0

    tasks: list[Any] = [(of_w, i, j) for i in range(0, len(out), BLOCK) for j in range(0, len(out.T), BLOCK)]
    tasks += [(of_x, i, 0) for i in range(0, len(rows), ROWS)] + [(of_b, 0, 0)] * (b is not None)
    with threads.single_threaded_blas():
        threads.run(lambda task: task[0](*task[1:]), tasks, flops=4 * rows.size * len(w))
    dtype = given[0].dtype
    return narrow(dx.reshape(x.shape), dtype), narrow(dw, dtype), None if b is None else narrow(db, dtype)


def _beside(parts: list[Array], start: int, n: int) -> Array:
    """So many rows of arrays (N, ·) that stand side by side"""
    blocks = [part[start : start + n] for part in parts]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


def _sum(x: Array) -> Array:
    """Σ of the rows of x (N, I)   →   (I)"""
    return np.ones(len(x), x.dtype) @ x


def _rows(x: Array) -> Array:
    """x (..., I)   →   (N, I)"""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])
