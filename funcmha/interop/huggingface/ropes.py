"""The kinds of rotary positions that `transformers` names: their frequencies, and the gain of cos and sin.

Two of them depend on the length of the text: "dynamic" beyond the config's max_position_embeddings, and "longrope",
which has one table of factors up to the length that was trained on and another beyond it.
"""

from collections.abc import Callable
from math import log
from typing import Any, Literal, NamedTuple

import numpy as np

from funcmha import _check, rotary
from funcmha._xp import Array
from funcmha.rotary import Rotary, frequencies, llama3_frequencies, ntk_base, yarn_frequencies

Said = dict[str, Any]  # rope_parameters, in which nothing is missing that has a default
Turns = tuple[np.ndarray, float]  # frequencies (N,), gain


class Rope(NamedTuple):
    """The rotary positions of a layer."""

    said: Said
    width: int  # of a head
    pairs: Literal["half", "interleaved"]

    def turns(self, length: int = 1) -> Turns:
        """In a text of `length` tokens, where 2N features turn"""
        return KINDS[self.said["rope_type"]](self.said, self.width, length)

    def table(self, positions: Array, length: int) -> Rotary:
        """cos, sin (..., T, N) at `positions` (..., T) of a text of `length` tokens"""
        freqs, gain = self.turns(length)
        return rotary.table(positions, freqs, pairs=self.pairs, gain=gain)


def rope(said: Said, width: int, pairs: Literal["half", "interleaved"]) -> Rope:
    """What the config says, once it is known to be complete."""
    kind = said["rope_type"]
    if kind not in KINDS:
        raise ValueError(f"rope_type must be {', '.join(KINDS)}, got {kind!r}")
    found = Rope(said, width, pairs)
    for length in (1, said["original_max_position_embeddings"] + 1):
        found.turns(length)
    return found


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _default(said: Said, width: int, length: int) -> Turns:
    return frequencies(_part(said, width), base=said["rope_theta"]), 1.0


def _linear(said: Said, width: int, length: int) -> Turns:
    freqs, gain = _default(said, width, length)
    return freqs / _needed(said, "factor"), gain


def _dynamic(said: Said, width: int, length: int) -> Turns:
    """The "NTK-aware" base, of a text as long as this one."""
    width, factor, context = _part(said, width), _needed(said, "factor"), said["max_position_embeddings"]
    grown = factor * max(length, context) / context - (factor - 1)
    return frequencies(width, base=ntk_base(width, grown, base=said["rope_theta"])), 1.0


def _proportional(said: Said, width: int, length: int) -> Turns:
    """All features are there, but of the last pairs the angle is 0; the others turn as they do among all."""
    freqs = frequencies(width, base=said["rope_theta"])
    turning = int(said["partial_rotary_factor"] * width // 2)
    return np.where(np.arange(width // 2) < turning, freqs, 0.0) / said.get("factor", 1.0), 1.0


def _longrope(said: Said, width: int, length: int) -> Turns:
    context = said["original_max_position_embeddings"]
    freqs, _ = _default(said, width, length)
    name = "long_factor" if length > context else "short_factor"
    return freqs / _factors(said, name, len(freqs)), _longrope_gain(said, context)


def _longrope_gain(said: Said, context: int) -> float:
    """√(1 + ln factor / ln context), unless `attention_factor` says otherwise"""
    given, factor = said.get("attention_factor"), _grown(said, context)
    if given is not None:
        return _check.number("attention_factor", given)
    return 1.0 if factor <= 1 else float((1 + log(factor) / log(context)) ** 0.5)


def _llama3(said: Said, width: int, length: int) -> Turns:
    freqs, gain = _default(said, width, length)
    scaled = llama3_frequencies(
        freqs,
        factor=_needed(said, "factor"),
        context=said["original_max_position_embeddings"],
        low=_needed(said, "low_freq_factor"),
        high=_needed(said, "high_freq_factor"),
    )
    return scaled, gain


def _yarn(said: Said, width: int, length: int) -> Turns:
    context = said["original_max_position_embeddings"]
    factor = _grown(said, context)
    scaled = yarn_frequencies(
        _part(said, width),
        factor=factor,
        context=context,
        base=said["rope_theta"],
        fast=said.get("beta_fast") or 32.0,
        slow=said.get("beta_slow") or 1.0,
        truncate=said.get("truncate", True),
    )
    return scaled, _yarn_gain(said, factor)


def _yarn_gain(said: Said, factor: float) -> float:
    """0.1 ln factor + 1, unless `attention_factor` says otherwise, or DeepSeek's pair of `mscale` does"""
    given, over, under = (said.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    grown = log(max(factor, 1.0)) / 10
    return (over * grown + 1) / (under * grown + 1) if over and under else grown + 1


KINDS: dict[str, Callable[[Said, int, int], Turns]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


# ── what they read ───────────────────────────────────────────────────────────────────────────────────────────────


def _part(said: Said, width: int) -> int:
    """How many of the features of a head turn."""
    part = _check.number("partial_rotary_factor", said["partial_rotary_factor"], 0.0)
    turning = int(width * part)
    if turning > width or turning % 2:
        raise ValueError(f"partial_rotary_factor must make an even part of head_dim={width}, got {part}")
    return turning


def _grown(said: Said, context: int) -> float:
    """By what a text may be longer than those that were trained on."""
    factor = said.get("factor")
    return float(said["max_position_embeddings"] / context if factor is None else factor)


def _needed(said: Said, name: str) -> float:
    if said.get(name) is None:
        raise KeyError(f"rope_parameters must have {name} where rope_type is {said['rope_type']}")
    return float(said[name])


def _factors(said: Said, name: str, n: int) -> np.ndarray:
    """One factor for each pair of features."""
    factors = np.asarray([] if said.get(name) is None else said[name], np.float64)
    if factors.shape != (n,):
        raise ValueError(f"{name} must be {n} numbers, one for each pair that turns, got {factors.shape}")
    return factors
