"""Structured masks: which query attends to which key, without the T × S array.

    mask = causal() & lengths(np.array([7, 4]))     # True = attend; & is what both allow
    mask = window(1023, 0) | first(4)               # | what either does, and ~ what a mask forbids
    y, cache = attention(q, k, v, mask=mask)

Axes: T queries, S keys, H heads, and before them the batch `...`. Every mask broadcasts to (..., H, T, S).
An engine that works in tiles asks for a block of rows and columns at a time: `block` says whether it is empty, full or
mixed, `tile` gives its booleans, `columns` says where to look at all, and `at` leaves one element of the batch.

Two masks that hold the same are equal, and one is a static argument of `jax.jit`, in `static_argnames`.

Build masks with the functions here: they check and copy what they are given, the classes do neither. What a mask is
and what it answers is in `mask`, the kinds there are in `kinds`; those of packed sequences are built by `packing`.
"""

from functools import reduce
from operator import and_
from typing import Any, Literal

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, full, is_array, namespace, read_only

from .kinds import Band, Bands, Chunks, Lengths, Padding, Segments, Spans
from .mask import Block, Complement, Dense, Intersection, Mask, Range, Union, as_mask, operands

__all__ = [
    "Band",
    "Bands",
    "Block",
    "Chunks",
    "Complement",
    "Dense",
    "Intersection",
    "Lengths",
    "Mask",
    "Padding",
    "Range",
    "Segments",
    "Spans",
    "Union",
    "append_keys",
    "as_mask",
    "causal",
    "chunks",
    "dense",
    "first",
    "intersection",
    "lengths",
    "operands",
    "padding",
    "per_head",
    "prefix",
    "segments",
    "window",
]


def causal(offset: int | np.ndarray = 0) -> Band | Bands:
    """j ≤ i + offset

    Query i stands at key position i + offset: 0 aligns the first query with the first key, S − T the last query with
    the last key, and after a key/value cache the offset is the cache's length.
    """
    return window(None, 0, offset)


def window(left: int | None, right: int | None, offset: int | np.ndarray = 0) -> Band | Bands:
    """i + offset − left ≤ j ≤ i + offset + right

    Inclusive: left = 3 attends to itself and three before. None is no bound. Query i stands at key position i + offset;
    offset an int, or a NumPy array (...) of integers, one per element of the batch.
    """
    left = None if left is None else _check.integer("left", left, 0, None, ", or None for no bound")
    right = None if right is None else _check.integer("right", right, 0, None, ", or None for no bound")
    if isinstance(offset, np.ndarray):
        frozen = _frozen("offset", offset, "(...)", "integers")
        return Bands(left, right, read_only(np.clip(frozen, -(2**62), 2**62)))  # so far away that j − i − offset fits
    return Band(left, right, _check.integer("offset", offset, below=None, or_else=" or a NumPy array of integers"))


def lengths(n: int | np.ndarray) -> Lengths:
    """j < n     n an int, or a NumPy array (...) of integers, one per element of the batch"""
    if not isinstance(n, np.ndarray):
        n = np.asarray(_check.integer("n", n, or_else=" or a NumPy array of integers"))
    n = _frozen("n", n, "(...)", "integers")
    if np.any(n < 0):
        raise ValueError(f"n must be at least 0, got {n.min()}")
    return Lengths(n)


def first(n: int) -> Lengths:
    """j < n     every query attends the first n keys: the sink tokens beside a window (Xiao et al. 2023)"""
    return lengths(_check.integer("n", n))


def prefix(n: int | np.ndarray, offset: int | np.ndarray = 0) -> Mask:
    """j < n or j ≤ i + offset     a prefix that all attend, and causal after it (prefix LM, Raffel et al. 2020)

    n as in `lengths`, offset as in `causal`.
    """
    return lengths(n) | causal(offset)


def chunks(n: int, offset: int = 0) -> Chunks:
    """⌊(i + offset) / n⌋ = ⌊j / n⌋     each query attends the n keys of its own chunk

    Query i stands at key position i + offset. `causal() & chunks(n)` is chunked attention in a decoder.
    """
    return Chunks(_check.integer("n", n, 1), _check.integer("offset", offset, -(2**62), 2**62), 0)


def padding(keep: np.ndarray) -> Padding:
    """keep[j]     keep a NumPy array (..., S) of booleans, True = attend"""
    return Padding(_frozen("keep", keep, "(..., S)", "booleans"))


def segments(q_ids: np.ndarray, k_ids: np.ndarray) -> Segments:
    """q_ids[i] = k_ids[j]     q_ids (..., T)  k_ids (..., S)  NumPy arrays of integers

    For sequences packed into one. Ids come in any order, and a segment need not be contiguous.
    """
    q_ids = _frozen("q_ids", q_ids, "(..., T)", "integers")
    k_ids = _frozen("k_ids", k_ids, "(..., S)", "integers")
    try:
        np.broadcast_shapes(q_ids.shape[:-1], k_ids.shape[:-1])
    except ValueError:
        raise ValueError(f"k_ids must be (..., S) with ...={q_ids.shape[:-1]} as in q_ids, got {k_ids.shape}") from None
    return Segments(q_ids, k_ids)


def intersection(*given: Mask | Array | None) -> Mask | None:
    """What all of them allow, where None allows everything     masks and boolean arrays   →   a mask, or None"""
    parts = [as_mask(mask) for mask in given if mask is not None]
    return reduce(and_, parts) if parts else None


def per_head(mask: Array) -> Array:
    """mask (H, T, S)  →  (1, H, T, S): for each head, whatever the batch; all else, and None, as it is"""
    return mask[None, ...] if getattr(mask, "ndim", 0) == 3 else mask


def dense(mask: Any, T: int, S: int, like: Array) -> Array:
    """mask  →  booleans that broadcast to (..., H, T, S), in the library and on the device of `like`

    None stays None, and a boolean array comes back as it is, unchecked for T and S. TypeError for what is no mask,
    ValueError for a structured one that was built for another T or S.
    """
    if isinstance(mask, Mask):
        return mask.dense(T, S, like)
    if mask is not None:
        as_mask(mask)  # which checks it
    return mask


def append_keys(mask: Mask | None, T: int, S: int, extra: int, like: Array) -> Mask | None:
    """mask (..., T, S)   →   (..., T, S + extra), True for the keys that were appended: every query attends them"""
    if mask is None or not extra:
        return mask
    allowed = mask.dense(T, S, like)
    xp, shape = namespace(allowed), tuple(allowed.shape[:-1])
    return Dense(xp.concat([xp.broadcast_to(allowed, (*shape, S)), full((*shape, extra), True, allowed)], axis=-1))


def _frozen(name: str, x: Any, symbols: str, kind: Literal["booleans", "integers"]) -> np.ndarray:
    """A read-only copy of `x`: what becomes of the caller's array does not change a mask."""
    if not isinstance(x, np.ndarray) or not is_array(x):
        got = f"{type(x).__module__}.{type(x).__name__}"
        instead = f"{name}.filled(…)" if hasattr(x, "filled") else f"np.asarray({name})"
        raise TypeError(f"{name} must be a NumPy array {symbols} of {kind}, got {got}: write {instead}")
    # not uint64: np.isin compares it with int64 by rounding both to float64
    if x.dtype.kind not in ("b" if kind == "booleans" else "iu") or x.dtype == np.uint64:
        instead = f"{name} != 0" if kind == "booleans" else f"{name}.astype(np.int64)"
        raise TypeError(f"{name} must be {symbols} of {kind}, got dtype {x.dtype}: write {instead}")
    if x.ndim < symbols.count(","):
        raise ValueError(f"{name} must be {symbols}, got {x.shape}")
    frozen: np.ndarray = read_only(np.array(x, dtype=bool if kind == "booleans" else np.int64))
    return frozen
