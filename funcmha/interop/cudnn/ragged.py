"""Packed tensors with a ragged offset (THD) as padded ones (BHSD), and back.

In cuDNN each of q, k, v, o and the gradients may have an offset or not, and keeps its padded shape in the graph. Here
padding is an op of its own, and the padded array exists. Attention without padding is `funcmha.attention` with the
masks of `funcmha.packing`.

From the documentation of cudnn-frontend, `docs/operations/Attention.md` at commit 0512390, note 3.

Axes: B sequences, N tokens of all of them and of the gaps, H heads, S places for a sequence, D width.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, from_host, namespace
from funcmha.packing import _scatter

from .attention import check_integers


class FromRaggedCache(NamedTuple):
    x: Array  # (N, H, D)
    rows: Array  # (B, S) integers: the token of each place, N for none
    slots: Array  # (1, N) integers: the place of each token in B · S, B · S for none


def from_ragged(
    x: Array, /, *, ragged_offset: np.ndarray, seq_len: np.ndarray, s: int, stride: int | None = None
) -> tuple[Array, FromRaggedCache]:
    """y[b, h, i] = x[ragged_offset[b] / stride + i, h]  for i < seq_len[b], else 0     x (N, H, D)   →   y (B, H, S, D)

    ragged_offset  (B + 1, 1, 1, 1) or (B + 1,), NumPy: the start of each sequence in elements, as for the tensor's
                   `set_ragged_offset`. The last one is ignored, as the lengths give the ends
    seq_len        (B, 1, 1, 1) or (B,), NumPy
    s              S, the length of the graph's tensor
    stride         from a token to the next, in elements: H · D unless given, 3 · H · D for views of (N, 3, H, D)

    Sequences may have gaps between them, and may not overlap.
    """
    _check.one_dtype([("x", x)])
    axes = _check.Axes()
    axes("x", x, "N H D")
    rows, slots = _places(axes, ragged_offset, seq_len, s, stride, x)
    return _scatter(namespace(x).moveaxis(x, 0, 1), rows), FromRaggedCache(x, rows, slots)


def from_ragged_vjp(cache: FromRaggedCache, dy: Array, /) -> tuple[Array]:
    """dx[ragged_offset[b] / stride + i, h] = dy[b, h, i], 0 in the gaps"""
    _check.cache(cache, FromRaggedCache, "from_ragged")
    x, rows, slots = cache
    (B, S), (_, H, D) = rows.shape, x.shape
    _check.cotangent("dy", dy, (B, H, S, D), x, "B H S D")
    return (_pack(dy, slots),)


class ToRaggedCache(NamedTuple):
    y: Array  # (B, H, S, D)
    rows: Array  # (B, S) integers, as in FromRaggedCache
    slots: Array  # (1, N) integers, as in FromRaggedCache


def to_ragged(
    y: Array, /, *, ragged_offset: np.ndarray, seq_len: np.ndarray, n: int, stride: int | None = None
) -> tuple[Array, ToRaggedCache]:
    """x[ragged_offset[b] / stride + i, h] = y[b, h, i]  for i < seq_len[b], else 0     y (B, H, S, D)   →   x (N, H, D)

    The inverse of `from_ragged`, except in the gaps; n is N. It packs stats too.
    """
    _check.one_dtype([("y", y)])
    axes = _check.Axes()
    axes("y", y, "B H S D")
    axes.size["N"] = _check.integer("n", n, 0)
    rows, slots = _places(axes, ragged_offset, seq_len, axes["S"], stride, y)
    return _pack(y, slots), ToRaggedCache(y, rows, slots)


def to_ragged_vjp(cache: ToRaggedCache, dx: Array, /) -> tuple[Array]:
    """dy[b, h, i] = dx[ragged_offset[b] / stride + i, h], 0 beyond seq_len[b]"""
    _check.cache(cache, ToRaggedCache, "to_ragged")
    y, rows, slots = cache
    _check.cotangent("dx", dx, (slots.shape[1], y.shape[1], y.shape[3]), y, "N H D")
    return (_scatter(namespace(y).moveaxis(dx, 0, 1), rows),)


def _pack(y: Array, slots: Array) -> Array:
    """y (B, H, S, D)   →   (N, H, D), 0 for tokens that have no place"""
    xp, (B, H, S, D) = namespace(y), y.shape
    flat = xp.reshape(xp.moveaxis(y, 0, 1), (H, B * S, D))
    return xp.moveaxis(_scatter(flat, slots)[0, ...], 0, 1)


def _places(
    axes: _check.Axes, ragged_offset: Any, seq_len: Any, s: Any, stride: Any, like: Array
) -> tuple[Array, Array]:
    """rows (B, S) and slots (1, N), inverse to each other, in the library of `like`."""
    N, S = axes["N"], _check.integer("s", s, 0)
    start, n = _check_offsets(axes, ragged_offset, seq_len, stride)
    used, tokens = np.arange(S) < n[:, None], start[:, None] + np.arange(S)
    found = np.sort(tokens[used])
    if n.max(initial=0) > S or found.min(initial=0) < 0 or found.max(initial=-1) >= N or (np.diff(found) == 0).any():
        raise ValueError(
            f"ragged_offset and seq_len must be sequences of at most s={S} tokens that do not overlap within N={N}, "
            f"got tokens {start} and lengths {n}"
        )
    rows, slots = np.where(used, tokens, N), np.full((1, N), used.size)
    slots[0, tokens[used]] = np.flatnonzero(used)
    return from_host(rows, like), from_host(slots, like)


def _check_offsets(axes: _check.Axes, ragged_offset: Any, seq_len: Any, stride: Any) -> tuple[np.ndarray, np.ndarray]:
    """The first token and the length of each sequence, (B,) each."""
    offset, n = check_integers("ragged_offset", ragged_offset), check_integers("seq_len", seq_len)
    if n.ndim != 1 or n.size != axes.size.get("B", n.size):
        raise ValueError(f"seq_len must be (B, 1, 1, 1) or (B,) with B as in y, got {n.shape}")
    if offset.shape != (n.size + 1,):
        raise ValueError(f"ragged_offset must be (B + 1,) with B={n.size} as in seq_len, got {offset.shape}")
    step = max(axes["H"] * axes["D"] if stride is None else _check.integer("stride", stride, 0), 1)
    if (offset[:-1] % step).any():
        raise ValueError(f"ragged_offset must count elements, {step} from a token to the next, got {offset}")
    return offset[:-1] // step, n
