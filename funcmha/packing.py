"""Packed sequences: sequences of different lengths, one after another on one axis, with no padding.

    q, cache = pack(*qs)                                    # qs of (H, T_b, D)  →  q (H, N, D)
    cu = cumulative([x.shape[-2] for x in qs])              # (B + 1,): 0, …, N, the cu_seqlens of flash-attention
    o, cache = attention(q, k, v, mask=packing.causal(cu))  # tokens attend their own sequence only
    os, cache = unpack(o, cu_seqlens=cu)                    # one (H, T_b, E) for each sequence

`pad` and `unpad` convert to padded batches and back. All four move rows and compute nothing, in any dtype of funcmha.

Axes: B sequences, N tokens of all of them, T tokens of the longest, C width; `...` is heads, and batch of packed rows.
"""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from . import _check, masks
from ._arrays import Array, from_host, full, namespace, read_only
from .masks import Spans

__all__ = [
    "causal",
    "cumulative",
    "mask",
    "pack",
    "pack_vjp",
    "pad",
    "pad_vjp",
    "positions",
    "unpack",
    "unpack_vjp",
    "unpad",
    "unpad_vjp",
    "window",
]

FAR = 2**62  # further than any token, and a sum of two such numbers fits into int64

# ── what cu_seqlens means ────────────────────────────────────────────────────────────────────────────────────────


def cumulative(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """cu[b] = Σ lengths[:b]      lengths (B,)   →   cu (B + 1,) int64, from 0 to N"""
    try:
        n = np.asarray(lengths)
    except ValueError:  # rows of different lengths
        raise TypeError(f"lengths must be (B,) of integers, got {lengths!r}") from None
    if n.ndim != 1 or (n.size and n.dtype.kind not in "iu"):
        raise TypeError(f"lengths must be (B,) of integers, got {n.dtype} {n.shape}")
    if n.size and n.min() < 0:
        raise ValueError(f"lengths must be at least 0, got {n.min()}")
    cu = np.zeros(n.size + 1, np.int64)
    np.cumsum(n, out=cu[1:])
    return cu


def positions(cu_seqlens: np.ndarray, offset: int | np.ndarray = 0) -> np.ndarray:
    """t + offset[b]      for token t of sequence b      cu_seqlens (B + 1,)   offset an int or (B,)   →   (N,) int64

    For rotary and other embeddings of the position; the offset is the length of the past.
    """
    cu = check_cumulative("cu_seqlens", cu_seqlens)
    offsets = _offsets(offset, cu.size - 1)
    if not all(-FAR <= each <= FAR for each in offsets):
        raise ValueError(f"offset must be within ±2**62, got {offset}")
    at: np.ndarray = np.arange(cu[-1]) + np.repeat(np.array(offsets, np.int64) - cu[:-1], np.diff(cu))
    return at


def _offsets(offset: Any, B: int) -> list[int]:
    """One integer for each sequence, of any size."""
    if isinstance(offset, Integral) and not isinstance(offset, bool):
        return [int(offset)] * B
    some = np.asarray(offset)
    if some.dtype.kind not in "iu":
        raise TypeError(f"offset must be an int or (B,) of integers, got {offset!r} of type {type(offset).__name__}")
    if some.shape not in ((), (B,)):
        raise ValueError(f"offset must be an int or (B,) with B={B} as in cu_seqlens, got {some.shape}")
    return [int(each) for each in np.broadcast_to(some, (B,))]


def mask(cu_q: np.ndarray, cu_k: np.ndarray | None = None) -> Spans:
    """b(i) = b(j)      a query attends the keys of its own sequence      cu_q (B + 1,)   cu_k (B + 1,), or as cu_q

    For T = cu_q[-1] queries and S = cu_k[-1] keys: `window` without bounds.
    """
    return window(None, None, cu_q, cu_k)


def causal(cu_q: np.ndarray, cu_k: np.ndarray | None = None, offset: int | np.ndarray = 0) -> Spans:
    """b(i) = b(j) and t(j) ≤ t(i) + offset[b]      `window` without a bound on the left"""
    return window(None, 0, cu_q, cu_k, offset)


def window(
    left: int | None,
    right: int | None,
    cu_q: np.ndarray,
    cu_k: np.ndarray | None = None,
    offset: int | np.ndarray = 0,
) -> Spans:
    """b(i) = b(j) and t(i) + offset[b] − left ≤ t(j) ≤ t(i) + offset[b] + right

    t counts the tokens of a sequence from 0. offset is an int or (B,): 0 aligns the first query of each sequence with
    its first key, as in `masks.window`, and np.diff(cu_k) − np.diff(cu_q) the last with the last, as flash-attention
    does. Inclusive: left = 3 attends the query's own position and three before. None is no bound.
    """
    cu_q = check_cumulative("cu_q", cu_q)
    cu_k = cu_q if cu_k is None else check_cumulative("cu_k", cu_k)
    if cu_q.size != cu_k.size:
        raise ValueError(f"cu_k must be (B + 1,) with B={cu_q.size - 1} as in cu_q, got {cu_k.shape}")
    band = masks.window(left, right)  # which checks them
    n = np.diff(cu_q)
    low, high = np.repeat(cu_k[:-1], n), np.repeat(cu_k[1:], n)
    at, offsets = positions(cu_q, cu_k[:-1]), _offsets(offset, n.size)  # each query's own place on the key axis

    def from_own(keys: int) -> np.ndarray:
        ahead = [min(max(each + keys, -FAR), FAR) for each in offsets]  # which may be no int64 before
        place: np.ndarray = at + np.repeat(np.array(ahead, np.int64), n)
        return place.clip(low, high)

    start = low if band.left is None else from_own(-band.left)
    stop = high if band.right is None else from_own(band.right + 1)
    return Spans(read_only(start), read_only(stop), int(cu_k[-1]))


# ── pack, unpack ─────────────────────────────────────────────────────────────────────────────────────────────────


class PackCache(NamedTuple):
    xs: tuple[Array, ...]  # B of (..., T_b, C)


def pack(*xs: Array) -> tuple[Array, PackCache]:
    """x = [x₀; x₁; …]      B of (..., T_b, C)   →   x (..., N, C)

    Raises TypeError for mixed dtypes, ValueError unless there is at least one array, and they differ in T_b only.
    """
    if not xs:
        raise ValueError("xs must be one or more arrays (..., T_b, C), got none")
    _check.arrays(*((f"xs[{b}]", x, f"... T_{b} C") for b, x in enumerate(xs)))
    return namespace(xs[0]).concat(xs, axis=-2), PackCache(xs)


def pack_vjp(cache: PackCache, dx: Array, /) -> tuple[Array, ...]:
    """dx_b = the rows of x_b in dx"""
    (xs,) = _check.cache(cache, PackCache, "pack")
    cu = cumulative([x.shape[-2] for x in xs])
    *batch, _, width = xs[0].shape
    _check.cotangent("dx", dx, (*batch, int(cu[-1]), width), xs[0], "... N C")
    return _split(dx, cu)


class UnpackCache(NamedTuple):
    x: Array  # (..., N, C)
    xs: tuple[Array, ...]  # B of (..., T_b, C), views of x where the library has views


def unpack(x: Array, /, *, cu_seqlens: np.ndarray) -> tuple[tuple[Array, ...], UnpackCache]:
    """x_b = x[cu[b] … cu[b + 1]]      x (..., N, C)   cu_seqlens (B + 1,)   →   B of (..., T_b, C)"""
    cu = _rows("x", x, cu_seqlens)
    xs = _split(x, cu)
    return xs, UnpackCache(x, xs)


def unpack_vjp(cache: UnpackCache, dxs: Sequence[Array], /) -> tuple[Array]:
    """dx = [dx₀; dx₁; …]"""
    x, xs = _check.cache(cache, UnpackCache, "unpack")
    if not isinstance(dxs, tuple | list) or len(dxs) != len(xs):
        got = len(dxs) if isinstance(dxs, tuple | list) else type(dxs).__name__
        raise ValueError(f"dxs must be B={len(xs)} arrays as the output is, got {got}")
    for b, (dy, y) in enumerate(zip(dxs, xs, strict=True)):
        _check.cotangent(f"dxs[{b}]", dy, y.shape, y, f"... T_{b} C")
    _check.one_dtype((f"dxs[{b}]", dy) for b, dy in enumerate(dxs))
    return (namespace(x).concat(tuple(dxs), axis=-2) if dxs else x,)  # of no sequences: x has no rows


# ── pad, unpad ───────────────────────────────────────────────────────────────────────────────────────────────────


class PadCache(NamedTuple):
    x: Array  # (..., N, C)
    slots: Array  # (N,) integers: where in B · T each token goes
    rows: Array  # (B, T) integers: the token of each slot, N for none


def pad(x: Array, /, *, cu_seqlens: np.ndarray, length: int | None = None) -> tuple[Array, PadCache]:
    """y[b, ..., t] = x[..., cu[b] + t], 0 past the end      x (..., N, C)   →   y (B, ..., T, C)

    T is the greatest length, or `length`, which must not be less. Heads stay between: (H, N, D) becomes (B, H, T, D).
    The mask of a padded batch is `masks.lengths(np.diff(cu_seqlens))`.
    """
    cu = _rows("x", x, cu_seqlens)
    slots, rows = _places(cu, length, x)
    return _scatter(x, rows), PadCache(x, slots, rows)


def pad_vjp(cache: PadCache, dy: Array, /) -> tuple[Array]:
    """dx[..., cu[b] + t] = dy[b, ..., t]"""
    x, slots, rows = _check.cache(cache, PadCache, "pad")
    B, T = rows.shape
    _check.cotangent("dy", dy, (B, *x.shape[:-2], T, x.shape[-1]), x, "B ... T C")
    return (_gather(dy, slots),)


class UnpadCache(NamedTuple):
    y: Array  # (B, ..., T, C)
    slots: Array  # (N,) integers: where in B · T each token is
    rows: Array  # (B, T) integers: the token of each slot, N for none


def unpad(y: Array, /, *, cu_seqlens: np.ndarray) -> tuple[Array, UnpadCache]:
    """x[..., cu[b] + t] = y[b, ..., t]      y (B, ..., T, C)   →   x (..., N, C)

    The contents of the padding have no effect, even NaN, and gradient 0.
    """
    _check.one_dtype([("y", y)])
    if y.ndim < 3:
        raise ValueError(f"y must be (B, ..., T, C), got {tuple(y.shape)}")
    cu = check_cumulative("cu_seqlens", cu_seqlens)
    if cu.size - 1 != y.shape[0]:
        raise ValueError(f"cu_seqlens must be (B + 1,) with B={y.shape[0]} as in y, got {cu.shape}")
    if np.diff(cu).max(initial=0) > y.shape[-2]:
        raise ValueError(f"cu_seqlens must have lengths of at most T={y.shape[-2]} as in y, got {np.diff(cu).max()}")
    slots, rows = _places(cu, y.shape[-2], y)
    return _gather(y, slots), UnpadCache(y, slots, rows)


def unpad_vjp(cache: UnpadCache, dx: Array, /) -> tuple[Array]:
    """dy[b, ..., t] = dx[..., cu[b] + t], 0 past the end"""
    y, slots, rows = _check.cache(cache, UnpadCache, "unpad")
    _check.cotangent("dx", dx, (*y.shape[1:-2], slots.shape[0], y.shape[-1]), y, "... N C")
    return (_scatter(dx, rows),)


def _split(x: Array, cu: np.ndarray) -> tuple[Array, ...]:
    return tuple(x[..., int(start) : int(stop), :] for start, stop in pairwise(cu))


def _places(cu: np.ndarray, length: int | None, like: Array) -> tuple[Array, Array]:
    """slots (N,) and rows (B, T), which are each other's inverse, in the library of `like`."""
    n = np.diff(cu)
    longest = int(n.max(initial=0))
    T = longest if length is None else _check.integer("length", length, or_else=" or None")
    if longest > T:
        raise ValueError(f"length must be at least {longest} as in cu_seqlens, got {length}")
    slots, t = positions(cu, T * np.arange(n.size)), np.arange(T)
    rows = np.where(t < n[:, None], cu[:-1, None] + t, cu[-1])
    return from_host(slots, like), from_host(rows, like)


def _scatter(x: Array, rows: Array) -> Array:
    """x (..., N, C)   →   (B, ..., T, C), with 0 where rows (B, T) is N"""
    xp = namespace(x)
    *batch, _, width = x.shape
    x = xp.concat([x, full((*batch, 1, width), 0.0, x)], axis=-2)
    y = xp.take(x, xp.reshape(rows, (-1,)), axis=-2)
    return xp.moveaxis(xp.reshape(y, (*batch, *rows.shape, width)), -3, 0)


def _gather(y: Array, slots: Array) -> Array:
    """y (B, ..., T, C)   →   (..., N, C)"""
    xp = namespace(y)
    y = xp.moveaxis(y, 0, -3)
    *batch, B, T, width = y.shape
    return xp.take(xp.reshape(y, (*batch, B * T, width)), slots, axis=-2)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def check_cumulative(name: str, cu: np.ndarray, total: int | None = None, owner: str = "") -> np.ndarray:
    """`cu` as int64; it must rise from 0 to `total`."""
    cu = _check.integers(name, cu)
    if cu.ndim != 1 or cu.size == 0:
        raise ValueError(f"{name} must be (B + 1,), got {cu.shape}")
    if cu[0] != 0 or (np.diff(cu) < 0).any():
        raise ValueError(f"{name} must begin with 0 and never fall, got {cu}")
    if total is not None and cu[-1] != total:
        raise ValueError(f"{name} must end with N={total} as in {owner}, got {cu[-1]}")
    return cu


def _rows(name: str, x: Any, cu: Any) -> np.ndarray:
    return check_cumulative("cu_seqlens", cu, _check.arrays((name, x, "... N C"))["N"], name)
