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
from .tiles import LOG2E, Head, Tile, of_sink, powers_of_two


def forward(heads: list[Head]) -> tuple[Array, Array, Array, Array]:
    """o (G, T, E); the sums of exponentials, the sink's included; the row maxima, rounded up; the keys with more than
    half of the weight, −1 for none; these (G, T)
    """
    T, S, mask = len(heads[0].q), len(heads[0].k), heads[0].mask
    start, stop = (0, S) if mask is None else mask.columns((0, T), S)
    tile = Tile((0, T), (start, max(start, stop)), mixed=mask is not None)
    k, v, block = heads[0].k[start:stop], heads[0].v[start:stop], heads[0].plan.few_block

    s = _with_keys(np.concatenate([head.score_scale * head.q for head in heads]), k, block).reshape(
        len(heads), T, len(k)
    )
    for head, scores in zip(heads, s, strict=True):
        head.complete(scores, tile)
        if tile.mixed:
            head.forbid(scores, tile, -np.inf)
    sinks = np.array([-np.inf if head.sink is None else LOG2E * head.sink for head in heads], s.dtype)[:, None]
    top = np.maximum(s.max(axis=-1, initial=-np.inf), sinks)
    row_max = np.where(top == -np.inf, 0.0, np.ceil(top))
    e = powers_of_two(np.subtract(s, row_max[..., None], out=s))
    row_sum = e.sum(axis=-1)
    if heads[0].sink is not None:
        row_sum += np.stack([of_sink(head, c) for head, c in zip(heads, row_max, strict=True)])
    key = over_half(e, row_sum, start)
    a = e if heads[0].keep is None else np.stack([head.drop(x, tile) for head, x in zip(heads, e, strict=True)])
    o = _with_values(a.reshape(len(heads) * T, len(k)), v, block).reshape(len(heads), T, v.shape[-1])
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
