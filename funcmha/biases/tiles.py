"""Tiles of a relative bias: what depends on j − i alone, constant along the diagonals, and sums along them.

Axes: T queries, S keys; R rows and N columns of a tile; `...` is batch and heads. L is short for T + S − 1, the number
of diagonals, and for 0 where T = S = 0.
"""

import numpy as np

from funcmha._arrays import Array, downcast, from_host, full, namespace, upcast
from funcmha.masks import Range

ROWS = 128  # of a tile, summed up at once: measured, 26 µs for 256 × 256 of float32 and 69 µs for 512 × 512


def toeplitz(values: Array, rows: Range, cols: Range, T: int) -> Array:
    """tile (..., R, N) of values (..., L): entry (i, j) of these rows and columns is values[..., j − i + T − 1]

    In NumPy a view, that cannot be written to; elsewhere a copy. Raises ValueError if the values do not reach so far.
    """
    R, N = rows[1] - rows[0], cols[1] - cols[0]
    part = values[..., diagonals(rows, cols, T)]
    if part.shape[-1] != max(R + N - 1, 0):
        raise ValueError(f"values must reach rows {rows} and columns {cols} with T={T}, got {tuple(values.shape)}")
    if isinstance(part, np.ndarray):
        *batch, step = part.strides
        first = part[..., R - 1 :]  # entry (0, 0), from which rows go down and columns up
        strides = (*batch, -step, step)
        return np.lib.stride_tricks.as_strided(first, (*part.shape[:-1], R, N), strides, writeable=False)
    index = np.arange(N) - np.arange(R)[:, None] + (R - 1)
    xp = namespace(part)
    return xp.reshape(xp.take(part, from_host(index.ravel(), part), axis=-1), (*part.shape[:-1], R, N))


def diagonals(rows: Range, cols: Range, T: int) -> slice:
    """The values of a tile among all T + S − 1, so that a gradient adds up tile by tile:

    whole[..., diagonals(rows, cols, T)] += diagonal_sums(dz)
    """
    start = cols[0] - rows[1] + T
    return slice(start, max(cols[1] - rows[0] + T - 1, start))


def diagonal_sums(dz: Array) -> Array:
    """dvalues (..., R + N − 1) of dz (..., R, N): entry j − i + R − 1 is the sum along that diagonal

    The adjoint of `toeplitz`. One pass over dz, in NumPy with a buffer of 128 rows, elsewhere of all.
    """
    g, (R, N) = upcast(dz), dz.shape[-2:]
    if R < 2 or not isinstance(g, np.ndarray):
        return downcast(_sheared(g), dz.dtype)
    size = min(R, ROWS)
    width = size + N - 1
    # Rows one shorter than the buffer's begin one further left each time: there a diagonal of g is a column.
    flat = np.zeros((*g.shape[:-2], size * width), g.dtype)
    skewed = flat[..., size - 1 : -1].reshape(*g.shape[:-2], size, width - 1)[..., :N]
    buffer, ones = flat.reshape(*g.shape[:-2], size, width), np.ones(size, g.dtype)
    total = np.zeros((*g.shape[:-2], R + N - 1), g.dtype)
    for start, stop in _blocks(R, size):
        skewed[..., : stop - start, :] = g[..., start:stop, :]
        total[..., R - start - size : R - start + N - 1] += ones @ buffer
    return downcast(total, dz.dtype)


def _blocks(n: int, size: int) -> list[Range]:
    """0 … n in ranges of `size`, the first one shorter: what it leaves of the buffer is still 0"""
    return [(max(stop - size, 0), stop) for stop in range(n % size or size, n + 1, size)]


def _sheared(g: Array) -> Array:
    """`diagonal_sums`, all rows at once: in rows one shorter than they were made, diagonals lie below each other."""
    xp, (*batch, R, N) = namespace(g), g.shape
    zeros = xp.broadcast_to(full((1,), 0.0, g), (*batch, R, R))
    padded = xp.concat([xp.flip(g, axis=-2), zeros], axis=-1)
    flat = xp.reshape(padded, (*batch, R * (R + N)))[..., : R * (R + N) - R]
    return xp.sum(xp.reshape(flat, (*batch, R, max(R + N - 1, 0))), axis=-2)
