"""A problem in a few words, and its numbers: drawn from a seed, in numbers that the dtype has.

Axes: B batch, H query heads, K key/value heads, T queries, S keys, D query/key width, E value width.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from funcmha._arrays import Array

MASKS = ("none", "dense", "heads", "keys", "some rows", "samples")
BIASES = ("B H T S", "1 H T S", "B 1 T S", "1 1 T S", "1 1 1 S", "1 H T 1", "B H 1 S", "1 1 1 1")


@dataclass(frozen=True)
class Problem:
    """Sizes, options and kinds of numbers, from which the numbers are drawn."""

    B: int = 2
    H: int = 3
    K: int = 3
    T: int = 13
    S: int = 17
    D: int = 16
    E: int = 16
    mask: str = "none"  # one of MASKS; "keys": some that no query attends; "some rows", "samples": attend nothing
    causal: bool = False
    window: tuple[int, int] | None = None  # keys before and after, inclusive
    bias: str | None = None  # its axes, 1 where it is broadcast
    lowest: bool = False  # the bias is the least number of the dtype all along some rows, and 0 elsewhere
    sink: float | None = None  # what normal numbers are moved by
    appended: bool = False  # a key and a value more, which every query attends
    scale: float | None = None
    softcap: float | None = None
    gain: float = 1.0  # of the queries
    shift: float = 0.0  # of the scores of all keys
    offset: float = 0.0  # of the values
    cotangents: tuple[str, ...] = ("o",)  # of which outputs
    only: str | None = None  # the one input that asks for a gradient
    seed: int = 0

    def sizes(self) -> dict[str, int]:
        """By axis letter, G = H / K, and whether it is causal: what limits may be of."""
        named = {letter: getattr(self, letter) for letter in "BHKTSDE"}
        return named | {"G": self.H // max(self.K, 1), "causal": self.causal}


class Numbers(NamedTuple):
    """Float64 and boolean arrays: the inputs of attention and the cotangents of its outputs."""

    q: Array  # (B, H, T, D)
    k: Array  # (B, K, S, D)
    v: Array  # (B, K, S, E)
    bias: Array  # broadcasts to (B, H, T, S)
    mask: Array  # (B or 1, H or 1, T, S), True = attend
    sink: Array  # (H,)
    do: Array  # (B, H, T, E)
    dlse: Array  # (B, H, T)
    dweights: Array  # (B, H, T, S)
    bias_k: Array = None  # (K, D), the appended key
    bias_v: Array = None  # (K, E)


def numbers(problem: Problem, dtype: str) -> Numbers:
    """The numbers of a problem, the same for every implementation and on every machine."""
    x = problem

    def normal(name: str, axes: str, gain: float = 1.0, offset: float = 0.0) -> Array:
        rng = np.random.default_rng([x.seed, zlib.crc32(name.encode())])
        shape = [1 if axis == "1" else getattr(x, axis) for axis in axes.split()]
        return rounded(offset + gain * rng.standard_normal(shape), dtype)

    q, k = normal("q", "B H T D", x.gain), normal("k", "B K S D")
    if x.shift:  # q · k gets −shift / scale from a direction that all share
        each = np.sqrt(abs(x.shift) * x.D**0.5 / x.D)
        q, k = rounded(q + np.copysign(each, x.shift), dtype), rounded(k + each, dtype)
    cotangents = {
        name: normal(f"d{name}", axes) if name in x.cotangents else None for name, axes in OUTPUT_AXES.items()
    }
    sink = None if x.sink is None else normal("sink", "H", offset=x.sink)
    row = {"bias_k": normal("bias_k", "K D"), "bias_v": normal("bias_v", "K E")} if x.appended else {}
    v, bias, mask = normal("v", "B K S E", offset=x.offset), _bias(x, normal, dtype), _mask(x)
    return Numbers(q, k, v, bias, mask, sink, *cotangents.values(), **row)


OUTPUT_AXES = {"o": "B H T E", "lse": "B H T", "weights": "B H T S"}


def _bias(x: Problem, normal: object, dtype: str) -> Array:
    if x.bias is None:
        return None
    bias: Array = normal("bias", x.bias)  # type: ignore[operator]
    if not x.lowest:
        return bias
    rows = np.arange(bias.shape[-2])[:, None] % 3 == 1
    return np.where(rows, LOWEST[dtype], np.zeros_like(bias))


def _mask(x: Problem) -> Array:
    if x.mask == "none":
        return None
    rng = np.random.default_rng([x.seed, zlib.crc32(b"mask")])
    mask = rng.random((x.B, x.H if x.mask == "heads" else 1, x.T, x.S)) < 0.7
    mask[..., :1] |= ~mask.any(-1, keepdims=True)  # no row is empty by accident
    if x.mask == "keys":
        mask[...] = np.arange(x.S) < max(x.S - max(x.S // 4, 1), 1)
    if x.mask == "some rows":
        mask[..., 1::3, :] = False
    if x.mask == "samples":
        mask[-1:] = False
    return mask


LOWEST = {"float64": float(np.finfo(np.float64).min)}
LOWEST |= {"float32": float(np.finfo(np.float32).min), "float16": -65504.0, "bfloat16": -(2.0**128 - 2.0**120)}


def rounded(a: Array, dtype: str) -> Array:
    """The nearest numbers that the dtype has, as float64: of two the even one"""
    if dtype == "float64":
        return np.asarray(a, np.float64)
    if dtype != "bfloat16":
        return np.asarray(a).astype(dtype).astype(np.float64)
    bits = np.asarray(a, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)
