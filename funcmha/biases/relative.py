"""Relative biases of models: ALiBi, T5's buckets, clipped distances. Each makes a `RelativeBias`.

Axes: T queries, S keys, H heads, B rows of a table; `...` is batch. L is short for T + S − 1, the number of diagonals.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, downcast, from_host, full, namespace, outline, upcast

from .bias import RelativeBias

# ── alibi ────────────────────────────────────────────────────────────────────────────────────────────────────────


class AlibiCache(NamedTuple):
    slopes: Array  # (..., H)
    distance: Array  # (L,), |j − i − offset|


def alibi(slopes: Array, /, *, T: int, S: int, offset: int = 0) -> tuple[RelativeBias, AlibiCache]:
    """values = −slope · |j − i − offset|        slopes (..., H)   →   values (..., H, T + S − 1)

    In float32 off by two roundings at most: distances are whole up to 2²⁴, and are rounded once beyond. In float16 a
    value below −65504 is −∞. Where the mask is causal, adding slope · j instead, as the reference implementation does,
    gives the same weights, and another lse. Press et al. 2022, section 3.
    """
    _check.one_dtype([("slopes", slopes)])
    _check.Axes()("slopes", slopes, "... H")
    far = np.abs(distances(T, S, offset)).astype(np.float64)

    dtype, slopes = slopes.dtype, upcast(slopes)
    distance = namespace(slopes).astype(from_host(far, slopes), slopes.dtype)
    return RelativeBias(downcast(-slopes[..., None] * distance, dtype)), AlibiCache(slopes, distance)


def alibi_vjp(cache: AlibiCache, dbias: RelativeBias, /) -> tuple[Array]:
    """dslope = −Σ dvalues |j − i − offset|        over the diagonals"""
    _check.cache(cache, AlibiCache, "alibi")
    slopes, distance = cache
    _check_dbias(dbias, (*slopes.shape, distance.shape[0]), slopes)
    return (downcast(-(upcast(dbias.values) @ distance), dbias.values.dtype),)


def alibi_slopes(H: int) -> np.ndarray:
    """slope = 2^(−8 h / n)    for h = 1 … n, float64, where n is the greatest power of two up to H

    The other H − n are every other one of the sequence for 2n: 2^(−4 h / n) for h = 1, 3, 5 … As in the reference
    implementation of Press et al. 2022.
    """
    H = _check.integer("H", H, 0)
    n = 1 << (H.bit_length() - 1) if H else 0
    whole, between = [-8 * h / n for h in range(1, n + 1)], [-4 * h / n for h in range(1, 2 * (H - n), 2)]
    return np.array([2.0**x for x in whole + between], np.float64)


# ── lookup ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LookupCache(NamedTuple):
    order: Array  # (L,), which sorts the index
    rows: Array  # (L,), the index sorted: which row of the table each value is of
    first: Array  # (B,), where in `rows` each row begins; L if it is not there
    like: Array  # (B, H, 0): of the table nothing but its shape


def lookup(table: Array, /, *, index: np.ndarray) -> tuple[RelativeBias, LookupCache]:
    """values[h, n] = table[index[n], h]        table (B, H)   index (T + S − 1,)   →   values (H, T + S − 1)

    index   a NumPy array of integers, 0 … B − 1: `t5_buckets` or `clipped` of `distances(T, S)`

    T5's table is the weight of its embedding, (num_buckets, num_heads). A table of one column serves all heads.
    """
    _check_lookup(table, index)
    order = np.argsort(index, stable=True)
    rows, numbers = index[order].astype(np.int64), np.arange(table.shape[0])
    first = np.where(np.isin(numbers, rows), np.searchsorted(rows, numbers), len(rows))

    xp = namespace(table)
    values = xp.take(xp.matrix_transpose(table), from_host(index.astype(np.int64), table), axis=-1)
    order, rows, first = (from_host(a, table) for a in (order, rows, first))
    return RelativeBias(values), LookupCache(order, rows, first, upcast(outline(table)))


def lookup_vjp(cache: LookupCache, dbias: RelativeBias, /) -> tuple[Array]:
    """dtable[b, h] = Σ dvalues[h, n] over all n with index[n] = b

    By halves, and so without atomics: O(H L log L) work in memory O(H L), the same bits each time.
    """
    _check.cache(cache, LookupCache, "lookup")
    order, rows, first, like = cache
    _check_dbias(dbias, (like.shape[1], order.shape[0]), like)
    xp = namespace(like)
    # After each step a value is the sum of up to twice as many of its row, itself the first (Hillis and Steele 1986).
    g, reach = xp.take(upcast(dbias.values), order, axis=-1), 1
    while reach < rows.shape[0]:
        more = xp.where(rows[:-reach] == rows[reach:], g[:, reach:], 0.0)
        g, reach = xp.concat([g[:, :-reach] + more, g[:, -reach:]], axis=-1), 2 * reach
    g = xp.concat([g, full((g.shape[0], 1), 0.0, g)], axis=-1)
    return (downcast(xp.matrix_transpose(xp.take(g, first, axis=-1)), dbias.values.dtype),)


# ── what to look up ──────────────────────────────────────────────────────────────────────────────────────────────


def distances(T: int, S: int, offset: int = 0) -> np.ndarray:
    """j − i − offset    of each diagonal, from the last query and first key on   →   (T + S − 1,) of int64

    How far the key is behind (negative) or ahead of the query, which stands at i + offset.
    """
    T, S = _check.integer("T", T, 0), _check.integer("S", S, 0)
    return np.arange(1 - T, S, dtype=np.int64) - _check.integer("offset", offset)


def clipped(distance: np.ndarray, reach: int) -> np.ndarray:
    """clip(distance, −reach, reach) + reach        rows of a table of 2 · reach + 1: Shaw et al. 2018, section 3.2"""
    _check.integers("distance", distance)
    reach = _check.integer("reach", reach, 0)
    return np.clip(distance.astype(np.int64), -reach, reach) + reach


def t5_buckets(
    distance: np.ndarray, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """bucket = |d|                                        where |d| < m
             m + ⌊(n − m) log(|d| / m) / log(max / m)⌋     elsewhere, n − 1 at most        distance d = key − query

    With m = ⌊n / 2⌋. Where not bidirectional, n is `num_buckets` and keys ahead of the query are in bucket 0. Else n is
    ⌊num_buckets / 2⌋, and what is ahead has buckets of its own, from n on. The floor is that of exact arithmetic. The
    float32 of others gives the same with T5's numbers, and so it did with all but 2 of 1,700 others that we tried: with
    83 buckets up to 1000 for instance distance 796, which is not quite at the bound, is in the next bucket there.
    Raffel et al. 2020, section 2.1; `_relative_position_bucket` in `transformers`, whose relative position is d.
    """
    n, m, max_distance = _check_t5(distance, bidirectional, num_buckets, max_distance)
    d = distance.astype(np.int64)
    behind = np.abs(d) if bidirectional else np.maximum(-d, 0)
    bucket = np.where(behind < m, behind, m + np.searchsorted(_bounds(n, m, max_distance), behind, side="right"))
    return bucket + n * (d > 0) if bidirectional else bucket


def _bounds(n: int, m: int, furthest: int) -> np.ndarray:
    """The least d with (d / m)^(n − m) ≥ (furthest / m)^k, for k = 1 … n − m − 1, in whole numbers"""
    found, p = [], n - m
    for k in range(1, p):
        d = int(m * (furthest / m) ** (k / p) * (1 - 1e-12))
        while d**p * m**k < furthest**k * m**p:
            d += 1
        found.append(d)
    return np.array(found, np.int64)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_dbias(dbias: Any, shape: tuple[int, ...], computed: Array) -> None:
    if not isinstance(dbias, RelativeBias):
        raise TypeError(f"dbias must be a RelativeBias, got {type(dbias).__name__}")
    _check.cotangent("dbias.values", dbias.values, shape, computed, "... H L")


def _check_lookup(table: Array, index: Any) -> None:
    _check.one_dtype([("table", table)])
    axes = _check.Axes()
    axes("table", table, "B H")
    _check.integers("index", index)
    if index.ndim != 1:
        raise ValueError(f"index must be (T + S − 1,), got {index.shape}")
    if index.size and not 0 <= index.min() <= index.max() < axes["B"]:
        raise ValueError(f"index must be within the B={axes['B']} rows of table, got {index.min()} … {index.max()}")


def _check_t5(distance: Any, bidirectional: Any, num_buckets: Any, max_distance: Any) -> tuple[int, int, int]:
    """Buckets of one direction, those of them that hold one distance, and where the last one begins to be the last."""
    _check.integers("distance", distance)
    _check.flag("bidirectional", bidirectional)
    n = _check.integer("num_buckets", num_buckets, 4 if bidirectional else 2) // (2 if bidirectional else 1)
    return n, n // 2, _check.integer("max_distance", max_distance, n // 2 + 1)
