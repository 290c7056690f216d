"""The path of few queries and many keys, as in decoding: those that read a key/value head are rows of one product.

So its keys and values are read once for all of them, and not at all for a bound on the scores: there are so few scores
that their maximum is cheaper. There are no tiles. Keys and values go in blocks: OpenBLAS has faster kernels for small
products than for long ones, and NumPy computes many at once without the interpreter's lock, which it holds for a single
one with few numbers in its result.

Axes: T queries, S keys, H query heads and K key/value heads, that go together, D query/key width, E value width, R
rows that read a key/value head; `...` is an axis of samples, where these go together too.
"""

import numpy as np

from funcmha._arrays import Array

from .dominant import over_half
from .tiles import Heads, Tile, of_sink, powers_of_two


def forward(heads: Heads) -> tuple[Array, Array, Array, Array]:
    """o (..., H, T, E); the sums of exponentials, the sink's included; the row maxima, rounded up; the keys with more
    than half of the weight, −1 for none; these (..., H, T)

    Of heads with k (..., K, S, D) and v (..., K, S, E), not repeated for those that read them.
    """
    (*batch, H, T, D), (K, S), mask, block = heads.q.shape, heads.k.shape[-3:-1], heads.mask, heads.plan.few_block
    start, stop = (0, S) if mask is None else mask.columns((0, T), S)
    tile, R = Tile((0, T), (start, max(start, stop)), mixed=mask is not None), H // K * T
    k, v = heads.k[..., start:stop, :], heads.v[..., start:stop, :]

    s = _with_keys(heads.scaled_q((0, T)).reshape(*batch, K, R, D), k, block).reshape(*batch, H, *tile.shape)
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
    a = heads.drop(e, tile).reshape(*batch, K, R, tile.shape[1])
    o = _with_values(a, v, block).reshape(*batch, H, T, v.shape[-1])
    o /= np.where(row_sum == 0, 1.0, row_sum)[..., None]
    return o, row_sum, row_max, key


def _with_keys(q: Array, k: Array, block: int) -> Array:
    """q kᵀ     q (..., R, D)   k (..., S, D)   →   (..., R, S)"""
    (*outer, R, D), S = q.shape, k.shape[-2]
    n, s = S - S % block, np.empty((*outer, R, S), q.dtype)
    blocks = s[..., :n].reshape(*outer, R, n // block, block).swapaxes(-2, -3)  # a view
    k_blocks = k[..., :n, :].reshape(*outer, n // block, block, D)
    np.matmul(q[..., None, :, :], k_blocks.swapaxes(-1, -2), out=blocks)
    np.matmul(q, k[..., n:, :].swapaxes(-1, -2), out=s[..., n:])
    return s


def _with_values(a: Array, v: Array, block: int) -> Array:
    """a v     a (..., R, S)   v (..., S, E)   →   (..., R, E)"""
    (*outer, R, S), E = a.shape, v.shape[-1]
    n = S - S % block
    a_blocks = a[..., :n].reshape(*outer, R, n // block, block).swapaxes(-2, -3)
    blocks = np.matmul(a_blocks, v[..., :n, :].reshape(*outer, n // block, block, E))
    return blocks.sum(axis=-3) + a[..., n:] @ v[..., n:, :]
