"""Biases of the scores: an array, or a number per head and difference of positions, in linear memory.

    bias, cache = alibi(alibi_slopes(8), T=T, S=S)                                            # ALiBi
    bias, cache = lookup(table, index=t5_buckets(distances(T, S), bidirectional=False))       # T5
    bias, cache = lookup(table, index=clipped(distances(T, S), 16))                           # Shaw et al.
    y, cache = attention(q, k, v, bias)

A bias that depends on j − i alone is constant along its diagonals, of which T × S scores have T + S − 1. `RelativeBias`
holds those; the array that it stands for is never made, but tile by tile, as views. Query i stands at key position
i + offset, as it does for masks: with a key/value cache, the offset is its length.

Axes: T queries, S keys, H heads; `...` is batch. What a bias is and what it answers is in `bias`, tiles of a relative
one are in `tiles`, what makes one in `relative`.
"""

from funcmha._arrays import Array

from .bias import ArrayBias, Bias, RelativeBias, as_bias, check_relative
from .relative import (
    AlibiCache,
    LookupCache,
    alibi,
    alibi_slopes,
    alibi_vjp,
    clipped,
    distances,
    lookup,
    lookup_vjp,
    t5_buckets,
)
from .tiles import diagonal_sums, diagonals, toeplitz

__all__ = [
    "AlibiCache",
    "ArrayBias",
    "Bias",
    "LookupCache",
    "RelativeBias",
    "alibi",
    "alibi_slopes",
    "alibi_vjp",
    "as_bias",
    "check_relative",
    "clipped",
    "dense",
    "diagonal_sums",
    "diagonals",
    "distances",
    "lookup",
    "lookup_vjp",
    "t5_buckets",
    "toeplitz",
]


def dense(relative: RelativeBias, T: int, S: int) -> Array:
    """bias (..., H or 1, T, S) of values (..., H or 1, T + S − 1)        in NumPy a view, that cannot be written to

    Its adjoint is `diagonal_sums`. Raises ValueError unless there are T + S − 1 values.
    """
    check_relative("relative", relative, T, S)
    return relative.dense(T, S)
