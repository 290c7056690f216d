"""An attention layer as a value: its parameters, its options, and the form of its state dict."""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import Array
from funcmha.interop._tensors import to_array
from funcmha.masks import Mask, intersection, padding, window
from funcmha.norms import RMSNorm
from funcmha.params import Params
from funcmha.rotary import Rotary

from . import families, names, ropes


class Layer(NamedTuple):
    """One attention layer: `self_attention(layer.params, x, **layer.options(T))`."""

    params: Params
    scale: float
    softcap: float | None
    qk_norm: RMSNorm | None  # of queries and keys
    rope: ropes.Rope | None  # rotary positions, or None
    left: int | None  # `masks.window(left, right)`
    right: int | None
    form: names.Form

    def options(self, T: int, offset: int = 0, *, S: int | None = None, attention_mask: Array = None) -> dict[str, Any]:
        """The keyword arguments of `mha` for T queries at positions offset, offset + 1, …

        S                where the keys are S tokens at positions 0, 1, …: `mha(params, x[..., -T:, :], x, x,
                         **layer.options(T, S - T, S=S))`; without it they are the tokens of the queries
        attention_mask   (N, S), 1 for text and 0 for padding, as tokenizers make it
        """
        T, offset = _check.integer("T", T, 0), _check.integer("offset", offset, 0)
        S = None if S is None else _check.integer("S", S, 0)
        length = max(offset + T, S or 0)
        table: Any = self.rotary(offset + np.arange(T), length)
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "qk_norm": self.qk_norm,
            "rotary": table if S is None else (table, self.rotary(np.arange(S), length)),
            "mask": self.mask(0 if S is None else offset, attention_mask=attention_mask),
        }

    def rotary(self, positions: Array, length: int) -> Rotary | None:
        """The rotary table at `positions` (..., T), in a text of `length` tokens."""
        return None if self.rope is None else self.rope.table(positions, length)

    def mask(self, offset: int = 0, *, attention_mask: Array = None) -> Mask | None:
        """The window of query i at key position i + offset, without padding; None for all keys."""
        band = None if self.left is None and self.right is None else window(self.left, self.right, offset)
        return intersection(band, None if attention_mask is None else padding(_kept(attention_mask)))


def static(c: dict[str, Any], n: int, prefix: str, *, cross: bool = False) -> Layer:
    """Layer n by its config, without parameters."""
    form, rope = names.form(c, prefix, cross=cross), families.rope(c, n)
    left, right = (None, None) if cross else families.window(c, n)
    return Layer(
        params={},
        scale=families.scale(c, n),
        softcap=c["attn_logit_softcapping"],
        qk_norm=families.norm(c),
        rope=None if rope is None else ropes.rope(rope, form.sizes.D, families.pairs(c)),
        left=left,
        right=right,
        form=form,
    )


def _kept(attention_mask: Any) -> np.ndarray:
    """True where there is text, checked."""
    keep = np.asarray(to_array("attention_mask", attention_mask))
    if keep.dtype.kind not in "biu" or keep.ndim == 0:
        raise TypeError(
            f"attention_mask must be (N, S) of integers or booleans, 1 for text, got {keep.dtype} of shape {keep.shape}"
        )
    if not np.isin(keep, (0, 1)).all():
        raise ValueError(f"attention_mask must be 0 and 1 only, got {np.unique(keep)}")
    return keep.astype(bool)
