"""An attention layer as a value: its parameters, what attention needs beside them, and the form of its state dict."""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import Array
from funcmha.interop._tensors import to_array
from funcmha.masks import Mask, intersection, padding, window
from funcmha.norms import Rms
from funcmha.params import Params
from funcmha.rotary import Rotary, rotary

from . import families, ropes


class Form(NamedTuple):
    """The names and shapes that the tensors of a layer have in a state dict."""

    prefix: str  # "model.layers.3.self_attn."
    sizes: families.Sizes
    leaves: tuple[str, ...]  # of funcmha's tree
    fused: bool  # GPT-2


class Layer(NamedTuple):
    """One attention layer: `self_attention(layer.params, x, **layer.options(T))`."""

    params: Params
    scale: float
    cap: float | None
    norm: Rms | None  # of queries and keys
    frequencies: np.ndarray | None  # (D / 2,), of rotary positions; None where nothing turns
    gain: float  # of what turns
    left: int | None  # how many keys before its own a query may see: `masks.window(left, right)`
    right: int | None  # how many after it
    form: Form

    def options(self, T: int, offset: int = 0, *, S: int | None = None, attention_mask: Array = None) -> dict[str, Any]:
        """The keyword arguments of `mha` for T queries at positions offset, offset + 1, …

        S                where the keys are S tokens at positions 0, 1, …: `mha(params, x[..., -T:, :], x, x,
                         **layer.options(T, S - T, S=S))`; without it they are the tokens of the queries
        attention_mask   (N, S), 1 for text and 0 for padding, as tokenizers make it
        """
        T, offset = _check.integer("T", T, 0), _check.integer("offset", offset, 0)
        S = None if S is None else _check.integer("S", S, 0)
        turn: Any = self.rotary(offset + np.arange(T))
        return {
            "scale": self.scale,
            "cap": self.cap,
            "norm": self.norm,
            "rotary": turn if S is None else (turn, self.rotary(np.arange(S))),
            "mask": self.mask(0 if S is None else offset, attention_mask=attention_mask),
        }

    def rotary(self, positions: Array) -> Rotary | None:
        """The table that turns queries and keys at `positions` (..., T)."""
        return None if self.frequencies is None else rotary(positions, self.frequencies, gain=self.gain)

    def mask(self, offset: int = 0, *, attention_mask: Array = None) -> Mask | None:
        """Which keys a query may see that stands at key position i + offset; None: all of them."""
        seen = None if self.left is None and self.right is None else window(self.left, self.right, offset)
        return intersection(seen, None if attention_mask is None else padding(_kept(attention_mask)))


def static(c: dict[str, Any], n: int, prefix: str) -> Layer:
    """Layer n as its config has it, without parameters."""
    sizes, rope = families.sizes(c), families.rope(c, n)
    frequencies, gain = (None, 1.0) if rope is None else ropes.table(rope, sizes.D)
    left, right = families.reach(c, n)
    return Layer(
        params={},
        scale=families.scale(c, n),
        cap=c["attn_logit_softcapping"],
        norm=families.norm(c),
        frequencies=frequencies,
        gain=gain,
        left=left,
        right=right,
        form=Form(prefix, sizes, _leaves(c), c["model_type"] == "gpt2"),
    )


def _leaves(c: dict[str, Any]) -> tuple[str, ...]:
    """The parameters that a layer of this config has, all of them and no others."""
    kind, inputs = c["model_type"], ("q_proj.b", "k_proj.b", "v_proj.b")
    all_four = kind == "gpt2" or c["attention_bias"]
    biases = inputs if kind == "qwen2" else (*inputs, "out_proj.b") if all_four else ()
    norms = ("q_norm.w", "k_norm.w") if kind in families.NORM_OFFSET else ()
    sink = ("sink.w",) if kind == "gpt_oss" else ()
    return ("q_proj.w", "k_proj.w", "v_proj.w", "out_proj.w", *biases, *sink, *norms)


def _kept(attention_mask: Any) -> np.ndarray:
    """True where there is text."""
    keep = np.asarray(to_array("attention_mask", attention_mask))
    if keep.dtype.kind not in "biu" or keep.ndim == 0:
        raise TypeError(
            f"attention_mask must be (N, S) of integers or booleans, 1 for text, got {keep.dtype} of shape {keep.shape}"
        )
    if not np.isin(keep, (0, 1)).all():
        raise ValueError(f"attention_mask must be 0 and 1 alone, got {np.unique(keep)}")
    return keep.astype(bool)
