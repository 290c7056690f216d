"""`funcmha.ops.linear` and its vjp, in blocks of rows shared out among the threads."""

from math import prod

import numpy as np

from funcmha import _check
from funcmha._xp import Array, narrow, widen
from funcmha.ops import LinearCache, check_linear

from . import threads

ROWS = 512  # of x in one task: a fixed number, so that the result does not depend on how many threads there are
ROWS_OF_W = 192  # of dw in one task
# Terms of a sum over rows before it is added to the others: shorter sums lose fewer digits, longer ones are faster.
TERMS = 128


def linear(x: Array, w: Array, b: Array = None, /) -> tuple[Array, LinearCache]:
    """y = x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)     as `funcmha.ops.linear`"""
    check_linear(x, w, b)
    cache = LinearCache(widen(x), widen(w), widen(b))
    rows, wt = _rows(cache.x), np.ascontiguousarray(cache.w.T)  # row-major by row-major is the fastest of the products
    y = np.empty((len(rows), len(w)), rows.dtype)

    def work(i: int) -> None:
        block = np.matmul(rows[i : i + ROWS], wt, out=y[i : i + ROWS])
        if b is not None:
            block += cache.b

    with threads.single_threaded_blas():
        threads.run(work, range(0, len(rows), ROWS), flops=2 * rows.size * len(w))
    return narrow(y.reshape(*x.shape[:-1], len(w)), x.dtype), cache


def linear_vjp(cache: LinearCache, dy: Array, /) -> tuple[Array, Array, Array]:
    """dx = dy w     dw = Σ dy xᵀ     db = Σ dy        sums over the batch axes, in partial sums of TERMS"""
    x, w, b = cache
    _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    rows, g = _rows(x), _rows(widen(dy))
    dx, dw, db = np.empty(rows.shape, x.dtype), np.zeros_like(w), None if b is None else np.zeros_like(b)

    def of_x(i: int) -> None:
        np.matmul(g[i : i + ROWS], w, out=dx[i : i + ROWS])

    def of_w(o: int) -> None:
        columns = slice(o, o + ROWS_OF_W)
        for i in range(0, len(rows), TERMS):
            block = g[i : i + TERMS, columns]
            dw[columns] += block.T @ rows[i : i + TERMS]
            if db is not None:
                db[columns] += np.ones(len(block), g.dtype) @ block

    tasks = [(of_w, o) for o in range(0, len(w), ROWS_OF_W)] + [(of_x, i) for i in range(0, len(rows), ROWS)]
    with threads.single_threaded_blas():
        threads.run(lambda task: task[0](task[1]), tasks, flops=4 * rows.size * len(w))
    return narrow(dx.reshape(x.shape), dy.dtype), narrow(dw, dy.dtype), narrow(db, dy.dtype)


def _rows(x: Array) -> Array:
    """x (..., I)   →   (N, I)"""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])
