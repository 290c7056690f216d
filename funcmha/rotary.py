"""Rotary position embeddings: pairs of features rotated by an angle that grows with the position.

    angles = table(np.arange(T), frequencies(64))
    q, cache = rotate(q, rotary=angles)

The score of a query at position m and a key at position n then depends on m − n only. Tables are static values, as
masks are; `rotate` is the op. Methods for longer contexts change the arguments of `table`: interpolation (Chen et al.
2023) is `table(positions / factor, …)`, others are `ntk_base`, `llama3_frequencies` and `yarn_frequencies`, and any
other array of frequencies works as well.

Axes: T positions, D width, N rotated pairs of features (N ≤ D / 2); `...` is batch.
"""

from math import ceil, floor, log, pi
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _check
from ._arrays import (
    HALF,
    Array,
    downcast,
    dtype_name,
    from_host,
    in_library_of,
    is_array,
    namespace,
    native,
    outline,
    quiet_underflow,
    upcast,
)

__all__ = [
    "HalfPairs",
    "InterleavedPairs",
    "frequencies",
    "llama3_frequencies",
    "ntk_base",
    "rotate",
    "rotate_vjp",
    "table",
    "yarn_frequencies",
]


class HalfPairs(NamedTuple):
    """Feature i is paired with i + N: GPT-NeoX, and Llama in `transformers`."""

    cos: Array  # (..., T, N)
    sin: Array  # (..., T, N)


class InterleavedPairs(NamedTuple):
    """Feature 2i is paired with 2i + 1: RoFormer, GPT-J, and Llama as published."""

    cos: Array  # (..., T, N)
    sin: Array  # (..., T, N)


# The pairing is a type and not a field: a string would be a leaf of the cache, which JAX and torch refuse.
Rotary = HalfPairs | InterleavedPairs
PAIRS: dict[str, type[HalfPairs] | type[InterleavedPairs]] = {"half": HalfPairs, "interleaved": InterleavedPairs}


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def table(
    positions: Array, frequencies: np.ndarray, *, pairs: Literal["half", "interleaved"] = "half", gain: float = 1.0
) -> Rotary:
    """gain · cos, sin of position · frequency        positions (..., T)   frequencies (N,)   →   cos, sin (..., T, N)

    positions     integers, float32 or float64, of any library; after a key/value cache, an `arange` that starts at its
                  length. Negative positions rotate backwards. Batch axes are those of x, of its size or 1: positions
                  per sample of x (B, H, T, D) are (B, 1, T)
    frequencies   a NumPy array of float64; 2N features are rotated, and the rest of x passes through
    pairs         "half": feature i is paired with i + N; "interleaved": 2i with 2i + 1
    gain          a factor of the rotated features: YaRN's compensation for longer contexts (its section 3.4)

    In float64, in the library of `positions` (JAX needs x64, or positions of NumPy). The error of cos and sin is at
    most 2⁻⁵² |position|, that is 1e-10 at 500,000. Raises TypeError for half types, which round positions above 256 or
    2048. Su et al. 2021, eq. 34.
    """
    if not is_array(positions):
        raise TypeError(f"positions must be an array, got {type(positions).__name__}")
    positions = native(positions) if isinstance(positions, np.ndarray) else positions
    name = dtype_name(positions)
    if name in HALF or not name.startswith(("int", "uint", "float")):
        raise TypeError(f"positions must be integers, float32 or float64, got dtype {positions.dtype}")
    if positions.ndim == 0:
        raise ValueError("positions must be (..., T), got ()")
    frequencies = _check_frequencies(frequencies)
    if not isinstance(pairs, str) or pairs not in PAIRS:
        raise ValueError(f"pairs must be {' or '.join(map(repr, PAIRS))}, got {pairs!r}")

    xp, gain = namespace(positions), _check.number("gain", gain)
    angle = xp.astype(positions, xp.float64)[..., None] * from_host(frequencies, positions)
    return PAIRS[pairs](gain * xp.cos(angle), gain * xp.sin(angle))


def frequencies(width: int, *, base: float = 10000.0) -> np.ndarray:
    """θᵢ = base^(−2i / width)    for i = 0 … width / 2 − 1, float64        Su et al. 2021, section 3.2.2

    `width` features are rotated: D, or fewer for a partial rotation.
    """
    width, base = _even("width", width), _check.number("base", base, 1.0)
    return np.array([base ** (-2 * i / width) for i in range(width // 2)], np.float64)


def ntk_base(width: int, factor: float, *, base: float = 10000.0) -> float:
    """base · factor^(width / (width − 2))        the "NTK-aware" base of a context that is `factor` times as long

    The last frequency is then divided by `factor`, the first stays 1, and those between change geometrically. In
    `transformers` this is the "dynamic" kind at a length of `factor` contexts, where its own factor is 1. (bloc97 2023;
    Peng et al. 2023, YaRN, section 3.1.)
    """
    width, factor, base = _even("width", width), _check.number("factor", factor, 1.0), _check.number("base", base, 1.0)
    if width < 4:
        raise ValueError(f"width must be 4 or more, as the first and the last frequency must differ, got {width}")
    return float(base * factor ** (width / (width - 2)))


def llama3_frequencies(
    frequencies: np.ndarray, *, factor: float = 8.0, context: float = 8192, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """θ (s + (1 − s) / factor)    where s = clip((context · θ / 2π − low) / (high − low), 0, 1)

    Frequencies with `high` or more rotations within the training `context` stay, those with `low` or fewer are
    interpolated, and s interpolates between the two. Llama 3.1: `apply_scaling` in its reference code, "llama3" in
    `transformers`.
    """
    frequencies = _check_frequencies(frequencies)
    factor, context = _check.number("factor", factor, 1.0), _check.number("context", context, 1.0)
    low, high = _check.number("low", low, 0.0), _check.number("high", high, 0.0)
    if not low < high:
        raise ValueError(f"low must be below high, got low={low} and high={high}")
    s = np.clip((context * frequencies / (2 * pi) - low) / (high - low), 0.0, 1.0)
    return frequencies * (s + (1 - s) / factor)


def yarn_frequencies(
    width: int,
    *,
    factor: float,
    context: float,
    base: float = 10000.0,
    fast: float = 32.0,
    slow: float = 1.0,
    truncate: bool = True,
) -> np.ndarray:
    """θᵢ (1 − s + s / factor)    where s = clip((i − low) / (high − low), 0, 1)

    Pair number `low` makes `fast` rotations within the training `context`, number `high` makes `slow`. These numbers
    need not be integers: `truncate` rounds them outwards. Peng et al. 2023, YaRN, section 3.2, in the form of its
    reference code; "yarn" in `transformers`. See also `gain` of `table`.
    """
    freqs, factor = frequencies(width, base=base), _check.number("factor", factor, 1.0)
    context, slow = _check.number("context", context, 1.0), _check.number("slow", slow, 0.0)
    fast = _check.number("fast", fast, 0.0)
    if not 0 < slow < fast or base == 1:
        raise ValueError(f"slow must be above 0 and below fast, and base above 1, got {slow=}, {fast=}, {base=}")
    low, high = (width * log(context / (2 * pi * rotations)) / (2 * log(base)) for rotations in (fast, slow))
    if truncate:
        low, high = floor(low), ceil(high)
    low = max(low, 0)
    high = max(min(high, width - 1), low + 0.001)
    s: np.ndarray = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    return freqs * (1 - s + s / factor)


# ── rotate ───────────────────────────────────────────────────────────────────────────────────────────────────────


class RotateCache(NamedTuple):
    rotary: Rotary  # its tables (..., T, N), in the dtype computed with
    like: Array  # (..., T, D, 0): the shape of x, without its numbers


@quiet_underflow
def rotate(x: Array, /, *, rotary: Rotary) -> tuple[Array, RotateCache]:
    """y = (a cos − b sin, b cos + a sin)    for pairs (a, b) of x
    x (..., T, D)   cos, sin (..., T, N)   →   y (..., T, D)

    The type of `rotary` gives the N pairs; features beyond 2N pass through. The tables are rounded once, to the dtype
    that x is computed in. Their T is that of x, and their batch axes broadcast to those of x. Raises TypeError and
    ValueError otherwise. Su et al. 2021, eq. 34.
    """
    _check_rotate(x, rotary)
    dtype, x = x.dtype, upcast(x)
    rotary = rotary._replace(cos=_in_library_of(rotary.cos, x), sin=_in_library_of(rotary.sin, x))
    return downcast(_rotated(x, rotary), dtype), RotateCache(rotary, outline(x))


@quiet_underflow
def rotate_vjp(cache: RotateCache, dy: Array, /) -> tuple[Array]:
    """dx = (da cos + db sin, db cos − da sin)    for pairs (da, db) of dy: the inverse rotation, which needs no x"""
    rotary, like = _check.cache(cache, RotateCache, "rotate")
    _check.cotangent("dy", dy, like.shape[:-1], like, "... T D")
    return (downcast(_rotated(upcast(dy), rotary._replace(sin=-rotary.sin)), dy.dtype),)


def _rotated(x: Array, rotary: Rotary) -> Array:
    """The rotation itself, in one dtype."""
    xp, (cos, sin) = namespace(x), rotary
    n, interleaved = cos.shape[-1], isinstance(rotary, InterleavedPairs)
    a, b = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    parts = [a * cos - b * sin, b * cos + a * sin]
    if interleaved:
        parts = [xp.reshape(xp.stack(parts, axis=-1), (*x.shape[:-1], 2 * n))]
    return xp.concat([*parts, x[..., 2 * n :]], axis=-1)


def _in_library_of(table: Array, x: Array) -> Array:
    """The table in the library, on the device and in the dtype of x."""
    return namespace(x).astype(in_library_of(table, x), x.dtype, copy=False)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def check_table(rotary: Any) -> None:
    """Raise unless cos and sin are real arrays of one dtype and one shape (..., T, N), as `table` makes them."""
    if not isinstance(rotary, (HalfPairs, InterleavedPairs)):
        raise TypeError(f"rotary must come from funcmha.rotary, got {type(rotary).__name__}")
    _check.one_dtype([("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)])
    if dtype_name(rotary.cos) == "complex128":
        raise TypeError(f"rotary.cos must be real, got {rotary.cos.dtype}")
    cos, sin = (tuple(table.shape) for table in rotary)
    if cos != sin or len(cos) < 2:
        raise ValueError(f"rotary must have cos and sin of one shape (..., T, N), got {cos} and {sin}")


def _check_frequencies(frequencies: Any) -> np.ndarray:
    """Them in native byte order."""
    if not isinstance(frequencies, np.ndarray) or frequencies.dtype.type != np.float64:
        got = getattr(frequencies, "dtype", type(frequencies).__name__)
        raise TypeError(f"frequencies must be a NumPy array of float64, got {got}")
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies must be (N,), got {frequencies.shape}")
    if not np.isfinite(frequencies).all():
        raise ValueError(f"frequencies must be finite, got {frequencies}")
    return native(frequencies)


def _check_rotate(x: Array, rotary: Any) -> None:
    axes = _check.arrays(("x", x, "... T D"))
    check_table(rotary)
    axes.static("rotary", rotary.cos)
    *batch, T, N = rotary.cos.shape
    if axes["T"] != T:  # a single position would broadcast, and is a mistake
        raise ValueError(f"rotary must have T={axes['T']} positions as x has, got {T}")
    if axes["D"] < 2 * N:
        raise ValueError(f"rotary must rotate at most D={axes['D']} features as in x, got {2 * N}")
    axes.broadcast("rotary", (*batch, T), "... T")


def _even(name: str, n: int) -> int:
    n = _check.integer(name, n)
    if n < 0 or n % 2:
        raise ValueError(f"{name} must be even and not negative, as features are rotated in pairs, got {n}")
    return n
