"""Which keys and queries of joined masks take part, without the T × S array."""

from collections.abc import Iterator
from functools import reduce
from operator import and_
from typing import Any

import numpy as np

from funcmha._arrays import Array, from_host, namespace

ROWS = 256  # of the tiles that are looked at
COLS = 32  # of the first in which a key of each query is looked for: most find one there
STRIP = 1024  # keys for which a query is looked for at a time, unless all of them are found, or the block is empty


def any_along(allowed: Array, axis: int) -> Array:
    """any(allowed) along an axis, which stays"""
    return namespace(allowed).any(allowed, axis=axis, keepdims=True)


def found_keys(mask: Any, may: list[np.ndarray], T: int, S: int, like: Array) -> Array:
    """The keys that any query attends, of those that all `may`: blocks are looked at until each of them is found."""
    if not mask.on_host:
        return any_along(mask.dense(T, S, like), -2)
    *outer, n, m = mask.shape(T, S)
    wanted = reduce(and_, may, np.ones((*outer, 1, m), dtype=bool))
    found = np.zeros(wanted.shape, dtype=bool)
    for stop in range(n, 0, -ROWS):  # the last rows of most masks attend the most keys
        if np.array_equal(found, wanted):
            break
        rows = max(stop - ROWS, 0), stop
        for cols in _strips(mask.columns(rows, S)):
            own = slice(*cols) if m > 1 else slice(None)
            some = found[..., own]  # a view, written to
            if not np.array_equal(some, wanted[..., own]) and mask.block(rows, cols) != "empty":
                some |= mask.tile(rows, cols).any(axis=-2, keepdims=True)
    return from_host(found, like)


def found_queries(mask: Any, may: list[np.ndarray], T: int, S: int, like: Array) -> Array:
    """The queries that attend any key, of those that all `may`"""
    if not mask.on_host:
        return any_along(mask.dense(T, S, like), -1)
    *outer, n, _ = mask.shape(T, S)
    wanted = reduce(and_, may, np.ones((*outer, n, 1), dtype=bool))
    found = np.zeros(wanted.shape, dtype=bool)
    for start in range(0, n, ROWS):
        rows = start, min(start + ROWS, n)
        want, some = wanted[..., slice(*rows), :], found[..., slice(*rows), :]  # views, one of them written to
        for cols in _wider_each_time(mask.columns(rows, S)):
            if np.array_equal(some, want):
                break
            some |= mask.tile(rows, cols).any(axis=-1, keepdims=True)
    return from_host(found, like)


def _strips(cols: tuple[int, int]) -> Iterator[tuple[int, int]]:
    start, stop = cols
    return ((j, min(j + STRIP, stop)) for j in range(start, stop, STRIP))


def _wider_each_time(cols: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Columns from left to right, few at first, then twice as many each time."""
    (start, stop), width = cols, COLS
    while start < stop:
        yield start, min(start + width, stop)
        start, width = start + width, 2 * width
