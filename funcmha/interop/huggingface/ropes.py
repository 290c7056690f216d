"""The kinds of rotary positions in `transformers`: their frequencies, and the gain of cos and sin.

Two of them depend on the length of the text: "dynamic" beyond the config's max_position_embeddings, and "longrope",
which has one table of factors up to the length in training and another beyond it.
"""

from collections.abc import Callable
from math import log
from typing import Any, Literal, NamedTuple

import numpy as np

from funcmha import _check, rotary
from funcmha._arrays import Array
from funcmha.rotary import Rotary, frequencies, llama3_frequencies, ntk_base, yarn_frequencies

Config = dict[str, Any]  # rope_parameters with all defaults
Frequencies = tuple[np.ndarray, float]  # (N,), and the gain


class Rope(NamedTuple):
    """The rotary positions of a layer."""

    config: Config
    width: int  # of a head
    pairs: Literal["half", "interleaved"]

    def frequencies(self, length: int = 1) -> Frequencies:
        """(N,) and the gain, in a text of `length` tokens, for the 2N features that are rotated"""
        return KINDS[self.config["rope_type"]](self.config, self.width, length)

    def table(self, positions: Array, length: int) -> Rotary:
        """cos, sin (..., T, N) at `positions` (..., T) of a text of `length` tokens"""
        freqs, gain = self.frequencies(length)
        return rotary.table(positions, freqs, pairs=self.pairs, gain=gain)


def rope(config: Config, width: int, pairs: Literal["half", "interleaved"]) -> Rope:
    """The rotary positions of a config, checked to be complete."""
    kind = config["rope_type"]
    if kind not in KINDS:
        raise ValueError(f"rope_type must be {', '.join(KINDS)}, got {kind!r}")
    found = Rope(config, width, pairs)
    for length in (1, config["original_max_position_embeddings"] + 1):
        found.frequencies(length)
    return found


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _default(config: Config, width: int, length: int) -> Frequencies:
    return frequencies(_part(config, width), base=config["rope_theta"]), 1.0


def _linear(config: Config, width: int, length: int) -> Frequencies:
    freqs, gain = _default(config, width, length)
    return freqs / _needed(config, "factor"), gain


def _dynamic(config: Config, width: int, length: int) -> Frequencies:
    """The "NTK-aware" base for a text of this length."""
    width, factor, context = _part(config, width), _needed(config, "factor"), config["max_position_embeddings"]
    grown = factor * max(length, context) / context - (factor - 1)
    return frequencies(width, base=ntk_base(width, grown, base=config["rope_theta"])), 1.0


def _proportional(config: Config, width: int, length: int) -> Frequencies:
    """Frequencies of all features, but the angle of the last pairs is 0."""
    freqs = frequencies(width, base=config["rope_theta"])
    rotated = int(config["partial_rotary_factor"] * width // 2)
    return np.where(np.arange(width // 2) < rotated, freqs, 0.0) / config.get("factor", 1.0), 1.0


def _longrope(config: Config, width: int, length: int) -> Frequencies:
    context = config["original_max_position_embeddings"]
    freqs, _ = _default(config, width, length)
    name = "long_factor" if length > context else "short_factor"
    return freqs / _factors(config, name, len(freqs)), _longrope_gain(config, context)


def _longrope_gain(config: Config, context: int) -> float:
    """√(1 + ln factor / ln context), unless there is an `attention_factor`"""
    given, factor = config.get("attention_factor"), _grown(config, context)
    if given is not None:
        return _check.number("attention_factor", given)
    return 1.0 if factor <= 1 else float((1 + log(factor) / log(context)) ** 0.5)


def _llama3(config: Config, width: int, length: int) -> Frequencies:
    freqs, gain = _default(config, width, length)
    scaled = llama3_frequencies(
        freqs,
        factor=_needed(config, "factor"),
        context=config["original_max_position_embeddings"],
        low=_needed(config, "low_freq_factor"),
        high=_needed(config, "high_freq_factor"),
    )
    return scaled, gain


def _yarn(config: Config, width: int, length: int) -> Frequencies:
    context = config["original_max_position_embeddings"]
    factor = _grown(config, context)
    scaled = yarn_frequencies(
        _part(config, width),
        factor=factor,
        context=context,
        base=config["rope_theta"],
        fast=config.get("beta_fast") or 32.0,
        slow=config.get("beta_slow") or 1.0,
        truncate=config.get("truncate", True),
    )
    return scaled, _yarn_gain(config, factor)


def _yarn_gain(config: Config, factor: float) -> float:
    """0.1 ln factor + 1, unless there is an `attention_factor`, or DeepSeek's pair of `mscale`"""
    given, over, under = (config.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    grown = log(max(factor, 1.0)) / 10
    return (over * grown + 1) / (under * grown + 1) if over and under else grown + 1


KINDS: dict[str, Callable[[Config, int, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


# ── fields of the config ────────────────────────────────────────────────────────────────────────────────────────


def _part(config: Config, width: int) -> int:
    """The number of features of a head that are rotated."""
    part = _check.number("partial_rotary_factor", config["partial_rotary_factor"], 0.0)
    rotated = int(width * part)
    if rotated > width or rotated % 2:
        raise ValueError(f"partial_rotary_factor must make an even part of head_dim={width}, got {part}")
    return rotated


def _grown(config: Config, context: int) -> float:
    """The ratio of the longest text to the longest in training."""
    factor = config.get("factor")
    return float(config["max_position_embeddings"] / context if factor is None else factor)


def _needed(config: Config, name: str) -> float:
    if config.get(name) is None:
        raise KeyError(f"rope_parameters must have {name} where rope_type is {config['rope_type']}")
    return float(config[name])


def _factors(config: Config, name: str, n: int) -> np.ndarray:
    """One factor for each pair of features."""
    factors = np.asarray([] if config.get(name) is None else config[name], np.float64)
    if factors.shape != (n,):
        raise ValueError(f"{name} must be {n} numbers, one for each rotated pair, got {factors.shape}")
    return factors
