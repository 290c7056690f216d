"""The path of few queries and many keys, as in decoding: those that read a key/value head are rows of one product.

So its keys and values are read once for all of them, and not at all for a bound on the scores: there are so few scores
that their maximum is cheaper. There are no tiles. Keys and values go in blocks: OpenBLAS has faster kernels for small
products than for long ones, and NumPy computes many at once without the interpreter's lock, which it holds for a single
one with few numbers in its result.

Axes: T queries, S keys, G query heads that read the key/value head, D query/key width, E value width.
"""

import numpy as np

from funcmha._arrays import Array

from .dominant import over_half
from .tiles import Heads, Tile, of_sink, powers_of_two


def forward(heads: Heads) -> tuple[Array, Array, Array, Array]:
    """o (G, T, E); the sums of exponentials, the sink's included; the row maxima, rounded up; the keys with more than
    half of the weight, −1 for none; these (G, T)
    """
    (G, T, D), S, mask = heads.q.shape, heads.k.shape[1], heads.mask
    start, stop = (0, S) if mask is None else mask.columns((0, T), S)
    tile = Tile((0, T), (start, max(start, stop)), mixed=mask is not None)
    k, v, block = heads.k[0, start:stop], heads.v[0, start:stop], heads.plan.few_block

    s = _with_keys(heads.scaled_q((0, T)).reshape(G * T, D), k, block).reshape(G, T, len(k))
    heads.complete(s, tile)
    if tile.mixed:
        heads.forbid(s, tile, -np.inf)
    top = s.max(axis=-1, initial=-np.inf)
    if heads.sink is not None:
        top = np.maximum(top, heads.log2_sink)
    row_max = np.where(top == -np.inf, 0.0, np.ceil(top))
    e = powers_of_two(np.subtract(s, row_max[..., None], out=s))
    row_sum = e.sum(axis=-1)
    if heads.sink is not None:
        row_sum += of_sink(heads, row_max)
    key = over_half(e, row_sum, start)
    o = _with_values(heads.drop(e, tile).reshape(G * T, len(k)), v, block).reshape(G, T, v.shape[-1])
    o /= np.where(row_sum == 0, 1.0, row_sum)[..., None]
    return o, row_sum, row_max, key


def _with_keys(q: Array, k: Array, block: int) -> Array:
    """q kᵀ     q (R, D)   k (S, D)   →   (R, S)"""
    R, (S, D) = len(q), k.shape
    n, s = S - S % block, np.empty((R, S), q.dtype)
    blocks = s[:, :n].reshape(R, n // block, block).swapaxes(0, 1)  # a view
    np.matmul(q, k[:n].reshape(n // block, block, D).swapaxes(1, 2), out=blocks)
    np.matmul(q, k[n:].T, out=s[:, n:])
    return s


def _with_values(a: Array, v: Array, block: int) -> Array:
    """a v     a (R, S)   v (S, E)   →   (R, E)"""
    R, (S, E) = len(a), v.shape
    n = S - S % block
    blocks = np.matmul(a[:, :n].reshape(R, n // block, block).swapaxes(0, 1), v[:n].reshape(n // block, block, E))
    return blocks.sum(axis=0) + a[:, n:] @ v[n:]
