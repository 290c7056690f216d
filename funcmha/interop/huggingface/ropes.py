"""The kinds of rotary positions that `transformers` names: their frequencies, and the gain of cos and sin."""

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np

from funcmha.rotary import frequencies, llama3_frequencies, yarn_frequencies


def table(rope: dict[str, Any], width: int) -> tuple[np.ndarray, float]:
    """frequencies (width / 2,), gain"""
    kind = rope["rope_type"]
    if kind not in KINDS:
        raise ValueError(f"rope_type must be {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](rope, width)


def _default(rope: dict[str, Any], width: int) -> tuple[np.ndarray, float]:
    return frequencies(width, base=rope["rope_theta"]), 1.0


def _linear(rope: dict[str, Any], width: int) -> tuple[np.ndarray, float]:
    return frequencies(width, base=rope["rope_theta"]) / _needed(rope, "factor"), 1.0


def _llama3(rope: dict[str, Any], width: int) -> tuple[np.ndarray, float]:
    scaled = llama3_frequencies(
        frequencies(width, base=rope["rope_theta"]),
        factor=_needed(rope, "factor"),
        context=rope["original_max_position_embeddings"],
        low=_needed(rope, "low_freq_factor"),
        high=_needed(rope, "high_freq_factor"),
    )
    return scaled, 1.0


def _yarn(rope: dict[str, Any], width: int) -> tuple[np.ndarray, float]:
    context = rope["original_max_position_embeddings"]
    factor = rope.get("factor")
    factor = rope["max_position_embeddings"] / context if factor is None else factor
    scaled = yarn_frequencies(
        width,
        factor=factor,
        context=context,
        base=rope["rope_theta"],
        fast=rope.get("beta_fast") or 32.0,
        slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
    )
    return scaled, _yarn_gain(rope, factor)


def _yarn_gain(rope: dict[str, Any], factor: float) -> float:
    """0.1 ln factor + 1, unless `attention_factor` says otherwise, or DeepSeek's pair of `mscale` does"""
    given, over, under = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    grown = log(max(factor, 1.0)) / 10
    return (over * grown + 1) / (under * grown + 1) if over and under else grown + 1


def _needed(rope: dict[str, Any], name: str) -> float:
    if rope.get(name) is None:
        raise KeyError(f"rope_parameters must have {name} where rope_type is {rope['rope_type']}")
    return float(rope[name])


KINDS: dict[str, Callable[[dict[str, Any], int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
