"""Attention as every call of flash-attention asks for it: the last query stands at the last key.

In funcmha's layout and in the dtype that is computed in; the calls turn, widen and round.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, R keys in a list; `...` is
batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import masks
from funcmha._xp import Array, namespace, narrow
from funcmha.biases import AlibiCache, alibi, alibi_vjp
from funcmha.dropout import Seeded
from funcmha.engines import attention, attention_vjp
from funcmha.masks import Mask


class Scores(NamedTuple):
    """What a call asks of the scores, in funcmha's words."""

    scale: float | None
    left: int | None
    right: int | None  # 0 where causal
    chunk: int  # keys in a block, where a query sees those of its own; 0 for no blocks
    cap: float | None

    @property
    def local(self) -> bool:
        """Whether it matters where a query stands."""
        return self.left is not None or self.right is not None or self.chunk > 0

    def mask(self, T: int, S: int) -> Mask | None:
        """Query i stands at key i + S − T; before the first key it is in a block without keys."""
        band = None if self.left is None and self.right is None else masks.window(self.left, self.right, S - T)
        if self.chunk == 0:
            return band
        block = masks.segments((np.arange(T) + S - T) // self.chunk, np.arange(S) // self.chunk)
        return masks.intersection(band, block)


class AlignedCache(NamedTuple):
    slopes: AlibiCache | None
    attention: Any  # of an engine
    width: int | None  # D where there is a qv, behind which it stands


def aligned(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array = None,
    sink: Array = None,
    qv: Array = None,
    /,
    *,
    scores: Scores,
    listed: np.ndarray | None = None,
    keep: Array | Seeded = None,
    rate: float = 0.0,
) -> tuple[Array, AlignedCache]:
    """o = attention([q, qv], [k, v], v, −slopes |i + S − T − j|, sink)
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   slopes (H,) or (..., H)   sink (H,)   qv (..., H, T, E)
      →   o (..., H, T, E)

    q · k + qv · v is one product of rows of D + E, which are also what the scale is of.

    listed   (..., T, R) integers: the only keys that a query sees
    """
    (T, D), S = q.shape[-2:], k.shape[-2]
    bias, of_slopes = (None, None) if slopes is None else alibi(slopes, T=T, S=S, offset=S - T)
    mask = masks.intersection(scores.mask(T, S), None if listed is None else _among(listed, S))
    scale, cap = scores.scale, scores.cap
    if qv is not None:
        q, k = (namespace(q).concat(pair, axis=-1) for pair in ((q, qv), (k, v)))
    o, of_scores = attention(q, k, v, bias, sink, mask=mask, scale=scale, cap=cap, keep=keep, rate=rate)
    return o, AlignedCache(of_slopes, of_scores, None if qv is None else D)


def aligned_vjp(
    cache: AlignedCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink, dqv: `aligned` from the bottom up; v has the gradients of both its parts"""
    of_slopes, of_scores, D = cache
    dq, dk, dv, dbias, dsink = attention_vjp(of_scores, do, dweights=dweights, dlse=dlse)
    dqv = None
    if D is not None:
        dq, dqv = dq[..., :D], dq[..., D:]
        dk, dv = dk[..., :D], dv + dk[..., D:]
    (dslopes,) = (None,) if of_slopes is None else alibi_vjp(of_slopes, dbias)
    return dq, dk, dv, dslopes, dsink, dqv


def rounded(dx: Array, x: Array) -> Array:
    """The gradient of slopes or of a sink, which have a dtype of their own."""
    return None if x is None else narrow(dx, x.dtype)


def _among(listed: np.ndarray, S: int) -> np.ndarray:
    """Whether a key is in the list: (..., T, R)   →   (..., 1, T, S); what is no key, as -1, stands for none"""
    seen = np.zeros((*listed.shape[:-1], S + 1), bool)
    np.put_along_axis(seen, np.where((listed < 0) | (listed >= S), S, listed), True, axis=-1)
    return seen[..., None, :, :S]
