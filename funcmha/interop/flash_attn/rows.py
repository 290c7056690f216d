"""Rows of a key/value cache, picked by number: what is read and what is written, paged or not.

Axes: N rows of x, M rows picked; `...` is whatever a row holds.
"""

from typing import NamedTuple

import numpy as np

from funcmha._xp import Array, from_host, full, namespace, outline


class PickedCache(NamedTuple):
    like: Array  # (N, ..., 0): of x nothing but its shape
    rows: np.ndarray  # (M,) integers


def picked(x: Array, /, *, rows: np.ndarray) -> tuple[Array, PickedCache]:
    """y = x[rows]      x (N, ...)   rows (M,), each of them any number of times   →   y (M, ...)"""
    y = namespace(x).take(x, from_host(rows, x), axis=0)
    return y, PickedCache(outline(x), rows)


def picked_vjp(cache: PickedCache, dy: Array, /) -> tuple[Array]:
    """dx[n] = Σ dy[m] over all m with rows[m] = n

    First what was picked first, then what was picked for the second time, and so on: without atomics, and the same bits
    each time. O(N) rows for each time that the most popular row was picked.
    """
    like, rows = cache
    xp, (N, *rest, _) = namespace(dy), like.shape
    padded = xp.concat([dy, full((1, *rest), 0.0, dy)], axis=0)
    total = full((N, *rest), 0.0, dy)
    for of_row in _times(rows, N):
        total = total + xp.take(padded, from_host(of_row, dy), axis=0)
    return (total,)


def _times(rows: np.ndarray, N: int) -> list[np.ndarray]:
    """(N,) for the first time, the second, …: the m at which each row is picked then, and M if it is not"""
    order = np.argsort(rows, stable=True)
    ordered = rows[order]
    time = np.arange(rows.size) - np.searchsorted(ordered, ordered)
    found = np.full((int(time.max(initial=-1)) + 1, N), rows.size)
    found[time, ordered] = order
    return list(found)


class WrittenCache(NamedTuple):
    rows: np.ndarray  # (M,) integers


def written(x: Array, new: Array, /, *, rows: np.ndarray) -> tuple[Array, WrittenCache]:
    """y = x, but y[rows] = new      x (N, ...)   new (M, ...)   rows (M,), which differ   →   y (N, ...)"""
    N, M = x.shape[0], rows.size
    where = np.arange(N)
    where[rows] = N + np.arange(M)
    xp = namespace(x)
    return xp.take(xp.concat([x, new], axis=0), from_host(where, x), axis=0), WrittenCache(rows)


def written_vjp(cache: WrittenCache, dy: Array, /) -> tuple[Array, Array]:
    """dx = dy, but dx[rows] = 0     dnew = dy[rows]"""
    (rows,) = cache
    xp, zeros = namespace(dy), full((rows.size, *dy.shape[1:]), 0.0, dy)
    dx, _ = written(dy, zeros, rows=rows)
    return dx, xp.take(dy, from_host(rows, dy), axis=0)
