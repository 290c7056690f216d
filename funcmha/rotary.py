"""Rotary position embeddings: pairs of features turned by an angle that grows with the position.

    turn = rotary(np.arange(T), frequencies(64))
    q, cache = rotate(q, rotary=turn)

A score of a query at position m and a key at n then depends on m − n alone. The tables of `rotary` are static values,
as masks are; `rotate` is the op. What extends the context acts on what `rotary` is given: interpolation (Chen et al.
2023) is `rotary(positions / factor, …)`, the others are `ntk_base`, `llama3_frequencies` and `yarn_frequencies`, and
any other array of frequencies will do.

Axes: T positions, D width, N pairs of features that turn (N ≤ D / 2); `...` is batch.
"""

from math import ceil, floor, log, pi
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _check
from ._xp import (
    HALF,
    Array,
    dtype_name,
    from_host,
    is_array,
    namespace,
    narrow,
    of_sample,
    outline,
    quiet_underflow,
    widen,
)


class HalfPairs(NamedTuple):
    """Feature i turns with i + N: GPT-NeoX, and Llama in `transformers`."""

    cos: Array  # (..., T, N)
    sin: Array  # (..., T, N)


class InterleavedPairs(NamedTuple):
    """Feature 2i turns with 2i + 1: RoFormer, GPT-J, and Llama as published."""

    cos: Array  # (..., T, N)
    sin: Array  # (..., T, N)


# The pairing is a type and no field: a string would be a leaf of the cache, which JAX and torch refuse.
Rotary = HalfPairs | InterleavedPairs
PAIRS: dict[str, type[HalfPairs] | type[InterleavedPairs]] = {"half": HalfPairs, "interleaved": InterleavedPairs}


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


@quiet_underflow
def rotary(
    positions: Array, frequencies: np.ndarray, *, pairs: Literal["half", "interleaved"] = "half", gain: float = 1.0
) -> Rotary:
    """gain · cos, sin of position · frequency        positions (..., T)   frequencies (N,)   →   cos, sin (..., T, N)

    positions     integers, float32 or float64, of any library; after a key/value cache, an `arange` that starts at its
                  length. Negative positions turn backwards. Batch axes are those of x, of its size or 1: positions per
                  sample of a (B, H, T, D) are (B, 1, T)
    frequencies   a NumPy array of float64; 2N features turn, and those of x beyond them pass
    pairs         "half": feature i turns with i + N; "interleaved": 2i with 2i + 1
    gain          what turns also grows by this factor: YaRN's, which makes up for longer contexts (its section 3.4)

    In float64, in the library of `positions` (in JAX that needs x64, or positions of NumPy): cos and sin are off by
    2⁻⁵² |position| at most, that is 1e-10 at 500,000. Raises TypeError for half types, which round positions above 256
    or 2048. Su et al. 2021, eq. 34.
    """
    _check_rotary(positions, frequencies, pairs)
    xp, gain = namespace(positions), _check.number("gain", gain)
    angle = xp.astype(positions, xp.float64)[..., None] * from_host(frequencies, positions)
    return PAIRS[pairs](gain * xp.cos(angle), gain * xp.sin(angle))


def frequencies(width: int, *, base: float = 10000.0) -> np.ndarray:
    """θᵢ = base^(−2i / width)    for i = 0 … width / 2 − 1, float64        Su et al. 2021, section 3.2.2

    `width` features turn: D, or less of them for a partial rotation.
    """
    width, base = _even("width", width), _check.number("base", base, 1.0)
    return np.array([base ** (-2 * i / width) for i in range(width // 2)], np.float64)


def ntk_base(width: int, factor: float, *, base: float = 10000.0) -> float:
    """base · factor^(width / (width − 2))        the "NTK-aware" base of a context that is `factor` times as long

    The last frequency is then divided by `factor`, the first stays 1, and those between share the change geometrically.
    In `transformers` this is the "dynamic" kind at a length of `factor` contexts, where that factor is 1. (bloc97 2023;
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

    What turns `high` times or more within the `context` that was trained on stays, what turns `low` times or less is
    interpolated, and s blends between. Llama 3.1: `apply_scaling` in its reference code, "llama3" in `transformers`.
    """
    _check_frequencies(frequencies)
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

    Pair number `low` turns `fast` times within the `context` that was trained on, number `high` turns `slow` times, for
    some i that need not be whole: `truncate` takes them outwards to whole ones. Peng et al. 2023, YaRN, section 3.2, in
    the form of its reference code; "yarn" in `transformers`. See `gain` of `rotary` too.
    """
    freqs, factor = frequencies(width, base=base), _check.number("factor", factor, 1.0)
    context, slow = _check.number("context", context, 1.0), _check.number("slow", slow, 0.0)
    fast = _check.number("fast", fast, 0.0)
    if not 0 < slow < fast or base == 1:
        raise ValueError(f"slow must be above 0 and below fast, and base above 1, got {slow=}, {fast=}, {base=}")
    low, high = (width * log(context / (2 * pi * turns)) / (2 * log(base)) for turns in (fast, slow))
    if truncate:
        low, high = floor(low), ceil(high)
    low = max(low, 0)
    high = max(min(high, width - 1), low + 0.001)
    s: np.ndarray = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    return freqs * (1 - s + s / factor)


# ── rotate ───────────────────────────────────────────────────────────────────────────────────────────────────────


class RotateCache(NamedTuple):
    rotary: Rotary  # its tables (..., T, N), in the dtype computed with
    like: Array  # (..., T, D, 0): of x nothing but its shape


@quiet_underflow
def rotate(x: Array, /, *, rotary: Rotary) -> tuple[Array, RotateCache]:
    """y = x turned: (a, b) ↦ (a cos − b sin, b cos + a sin)    x (..., T, D)   cos, sin (..., T, N)   →   y (..., T, D)

    (a, b) are the N pairs that `rotary` says; features beyond 2N pass as they are. The tables are rounded once, to the
    dtype that x is computed in. Their T is that of x, and their batch axes broadcast to those of x. Raises TypeError
    and ValueError otherwise. Su et al. 2021, eq. 34.
    """
    _check_rotate(x, rotary)
    dtype, x = x.dtype, widen(x)
    turn = rotary._replace(cos=_beside(rotary.cos, x), sin=_beside(rotary.sin, x))
    return narrow(_turned(x, turn), dtype), RotateCache(turn, outline(x))


@quiet_underflow
def rotate_vjp(cache: RotateCache, dy: Array, /) -> tuple[Array]:
    """dx = dy turned backwards: (da, db) ↦ (da cos + db sin, db cos − da sin)        needs the tables alone, never x"""
    _check.cache(cache, RotateCache, "rotate")
    turn, like = cache
    _check.cotangent("dy", dy, like.shape[:-1], like, "... T D")
    return (narrow(_turned(widen(dy), turn._replace(sin=-turn.sin)), dy.dtype),)


def cut_turned(cache: RotateCache, heads: slice) -> RotateCache:
    """The cache of some heads of x (..., H, T, D), which all have the same positions."""
    return cache._replace(like=cache.like[..., heads, :, :, :])


def cut_turned_sample(cache: RotateCache, b: tuple[int, ...]) -> RotateCache:
    """The cache of one element of the batch of x (..., H, T, D)."""
    rotary, like = cache
    return RotateCache(rotary._replace(cos=of_sample(rotary.cos, b), sin=of_sample(rotary.sin, b)), like[b])


def _turned(x: Array, rotary: Rotary) -> Array:
    """The rotation itself, in one dtype."""
    xp, (cos, sin) = namespace(x), rotary
    n, interleaved = cos.shape[-1], isinstance(rotary, InterleavedPairs)
    a, b = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    parts = [a * cos - b * sin, b * cos + a * sin]
    if interleaved:
        parts = [xp.reshape(xp.stack(parts, axis=-1), (*x.shape[:-1], 2 * n))]
    return xp.concat([*parts, x[..., 2 * n :]], axis=-1)


def _beside(table: Array, x: Array) -> Array:
    """The table in the library, on the device and in the dtype of x."""
    table = from_host(table, x) if isinstance(table, np.ndarray) else table
    return namespace(x).astype(table, x.dtype, copy=False)


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_table(rotary: Any) -> None:
    """A table that `rotary` could have made: cos and sin are real arrays of one dtype and one shape (..., T, N)."""
    if not isinstance(rotary, (HalfPairs, InterleavedPairs)):
        raise TypeError(f"rotary must come from funcmha.rotary, got {type(rotary).__name__}")
    _check.one_dtype([("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)])
    if dtype_name(rotary.cos) == "complex128":
        raise TypeError(f"rotary.cos must be real, got {rotary.cos.dtype}")
    cos, sin = (tuple(table.shape) for table in rotary)
    if cos != sin or len(cos) < 2:
        raise ValueError(f"rotary must have cos and sin of one shape (..., T, N), got {cos} and {sin}")


def _check_rotary(positions: Array, frequencies: np.ndarray, pairs: str) -> None:
    if not is_array(positions):
        raise TypeError(f"positions must be an array, got {type(positions).__name__}")
    name = dtype_name(positions)
    if name in HALF or not name.startswith(("int", "uint", "float")):
        raise TypeError(f"positions must be integers, float32 or float64, got dtype {positions.dtype}")
    if positions.ndim == 0:
        raise ValueError("positions must be (..., T), got ()")
    _check_frequencies(frequencies)
    if not isinstance(pairs, str) or pairs not in PAIRS:
        raise ValueError(f"pairs must be {' or '.join(map(repr, PAIRS))}, got {pairs!r}")


def _check_frequencies(frequencies: Any) -> None:
    if not isinstance(frequencies, np.ndarray) or frequencies.dtype != np.float64:
        got = getattr(frequencies, "dtype", type(frequencies).__name__)
        raise TypeError(f"frequencies must be a NumPy array of float64, got {got}")
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies must be (N,), got {frequencies.shape}")
    if not np.isfinite(frequencies).all():
        raise ValueError(f"frequencies must be finite, got {frequencies}")


def _check_rotate(x: Array, rotary: Any) -> None:
    _check.one_dtype([("x", x)])
    check_table(rotary)
    if not isinstance(rotary.cos, np.ndarray) and namespace(rotary.cos) is not namespace(x):
        raise TypeError(f"rotary must be of NumPy or of the library of x, got {type(rotary.cos).__name__}")
    axes = _check.Axes()
    axes("x", x, "... T D")
    *batch, T, N = rotary.cos.shape
    if axes["T"] != T:  # one position for all would broadcast, and is a mistake
        raise ValueError(f"rotary must have T={axes['T']} positions as x has, got {T}")
    if axes["D"] < 2 * N:
        raise ValueError(f"rotary must turn at most D={axes['D']} features as in x, got {2 * N}")
    axes.broadcast("rotary", (*batch, T), "... T")


def _even(name: str, n: Any) -> int:
    if not isinstance(n, Integral) or isinstance(n, bool):
        raise TypeError(f"{name} must be an integer, got {n!r} of type {type(n).__name__}")
    if n < 0 or n % 2:
        raise ValueError(f"{name} must be even and not negative, as features turn in pairs, got {n}")
    return int(n)
