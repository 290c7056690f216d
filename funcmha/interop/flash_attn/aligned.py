"""Attention as every call of flash-attention asks for it: the last query stands at the last key.

The two ops here are in funcmha's layout, (..., H, T, D) and (H, T, D) sequence after sequence, and take arrays in the
dtype that is computed in; the calls turn, widen and round.

Axes: B sequences, N tokens of all of them, M keys of all of them, T queries and S keys of one, H query heads, K
key/value heads, D query/key width, E value width; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import masks
from funcmha._qk import heads_first, heads_last
from funcmha._xp import Array, full, namespace, narrow, of_sample, unbroadcast
from funcmha.biases import AlibiCache, alibi, alibi_vjp
from funcmha.dropout import Seeded
from funcmha.engines import attention, attention_vjp
from funcmha.masks import Mask
from funcmha.ops import INF, attention_weights, log_sum_exp


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


# ── one sequence, or a batch of equal lengths ────────────────────────────────────────────────────────────────────


class AlignedCache(NamedTuple):
    slopes: AlibiCache | None
    attention: Any  # of an engine


def aligned(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array = None,
    sink: Array = None,
    /,
    *,
    scores: Scores,
    keep: Array | Seeded = None,
    rate: float = 0.0,
) -> tuple[Array, AlignedCache]:
    """o = attention(q, k, v, −slopes |i + S − T − j|, sink)
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   slopes (H,) or (..., H)   sink (H,)   →   o (..., H, T, E)
    """
    T, S = q.shape[-2], k.shape[-2]
    bias, of_slopes = (None, None) if slopes is None else alibi(slopes, T=T, S=S, offset=S - T)
    scale, cap, mask = scores.scale, scores.cap, scores.mask(T, S)
    o, of_scores = attention(q, k, v, bias, sink, mask=mask, scale=scale, cap=cap, keep=keep, rate=rate)
    return o, AlignedCache(of_slopes, of_scores)


def aligned_vjp(
    cache: AlignedCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink: `aligned` from the bottom up"""
    of_slopes, of_scores = cache
    dq, dk, dv, dbias, dsink = attention_vjp(of_scores, do, dweights=dweights, dlse=dlse)
    (dslopes,) = (None,) if of_slopes is None else alibi_vjp(of_slopes, dbias)
    return dq, dk, dv, dslopes, dsink


# ── sequences of different lengths ───────────────────────────────────────────────────────────────────────────────


class RaggedCache(NamedTuple):
    slopes: Array  # (H,) or (B, H), or None
    sink: Array  # (H,) or None
    sequences: tuple[AlignedCache, ...]  # B
    q: Array  # (N, H, 0): of the queries nothing but their shape
    k: Array  # (M, K, D, 0)
    v: Array  # (M, K, E, 0)
    weights: Array  # (B, H, T, S, 0), of the longest
    queries: np.ndarray  # (B, 2) integers: start, stop
    keys: np.ndarray  # (B, 2) integers


def ragged(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array = None,
    sink: Array = None,
    /,
    *,
    queries: np.ndarray,
    keys: np.ndarray,
    weights: tuple[int, ...],
    scores: Scores,
    keep: Array | Seeded = None,
    rate: float = 0.0,
) -> tuple[Array, RaggedCache]:
    """o[queries b] = aligned(q[queries b], k[keys b], v[keys b], slopes[b], sink)
    q (N, H, D)   k (M, K, D)   v (M, K, E)   slopes (H,) or (B, H)   sink (H,)   →   o (N, H, E)

    queries, keys   start and stop of each sequence, (B, 2), which rise; a token of none has o = 0
    weights         their shape (B, H, T, S), with T and S of the longest or more: a sequence has the upper left
    keep            broadcasts to that, likewise

    Sequence after sequence, so that nothing is computed between them and slopes may differ among them.
    """
    parts, caches = [], []
    for b, (rows, cols) in enumerate(zip(_slices(queries), _slices(keys), strict=True)):
        of_b = _of_sequence(keep, b, rows.stop - rows.start, cols.stop - cols.start)
        inputs = *(heads_first(x) for x in (q[rows, ...], k[cols, ...], v[cols, ...])), of_sample(slopes, (b,), 1), sink
        o, cache = aligned(*inputs, scores=scores, keep=of_b, rate=rate)
        parts.append(heads_last(o))
        caches.append(cache)
    (N, H, _), E = q.shape, v.shape[-1]
    shapes = ((N, H), k.shape, v.shape, weights)
    of_q, of_k, of_v, of_weights = (full((*shape, 0), 0.0, q) for shape in shapes)
    o = _placed(parts, queries, full((N, H, E, 0), 0.0, q))
    return o, RaggedCache(slopes, sink, tuple(caches), of_q, of_k, of_v, of_weights, queries, keys)


def ragged_vjp(
    cache: RaggedCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink: each sequence from the bottom up
    from the cotangents of o (N, H, E) and, where given, of the weights (B, H, T, S) and lse (H, N)
    """
    slopes, sink, sequences, q, k, v, _, queries, keys = cache
    grads: list[tuple[Array, ...]] = []
    for b, (rows, cols) in enumerate(zip(_slices(queries), _slices(keys), strict=True)):
        T, S = rows.stop - rows.start, cols.stop - cols.start
        of_weights = None if dweights is None else dweights[b, :, :T, :S]
        of_lse = None if dlse is None else dlse[:, rows]
        grads.append(aligned_vjp(sequences[b], heads_first(do[rows, ...]), dweights=of_weights, dlse=of_lse))
    dq, dk, dv, dslopes, dsink = zip(*grads, strict=True) if grads else ((),) * 5
    like = full((*q.shape[:-1], k.shape[-2], 0), 0.0, q)
    return (
        _placed([heads_last(g) for g in dq], queries, like),
        _placed([heads_last(g) for g in dk], keys, k),
        _placed([heads_last(g) for g in dv], keys, v),
        _summed(dslopes, slopes),
        _summed(dsink, sink),
    )


def rounded(dx: Array, x: Array) -> Array:
    """The gradient of slopes or of a sink, which have a dtype of their own."""
    return None if x is None else narrow(dx, x.dtype)


def _slices(spans: np.ndarray) -> list[slice]:
    return [slice(start, stop) for start, stop in spans.tolist()]


def _of_sequence(keep: Array | Seeded, b: int, T: int, S: int) -> Array | Seeded:
    """The booleans of one sequence, which stand in the upper left of its T × S."""
    if keep is None or isinstance(keep, Seeded):
        return keep if keep is None else keep.sample(b)
    own = of_sample(keep, (b,))
    own = namespace(own).reshape(own, (*(1,) * (2 - own.ndim), *own.shape))
    return own[..., : T if own.shape[-2] > 1 else 1, : S if own.shape[-1] > 1 else 1]


def _placed(parts: Any, spans: np.ndarray, like: Array, fill: float = 0.0) -> Array:
    """The parts (n, ...) on the rows of their spans, `fill` elsewhere: the shape of `like`, less its last axis."""
    total, *rest = like.shape[:-1]
    pieces, at = [], 0
    for part, (start, stop) in zip(parts, spans.tolist(), strict=True):
        pieces += [full((start - at, *rest), fill, like), part]
        at = stop
    pieces.append(full((total - at, *rest), fill, like))
    return namespace(like).concat(pieces, axis=0)


def _summed(parts: Any, x: Array) -> Array:
    """The gradient of what sequences share, or have of their own: B of (H,)   →   as x, (H,) or (B, H)"""
    if x is None or not parts:
        return None if x is None else full(tuple(x.shape), 0.0, x)
    return unbroadcast(namespace(x).stack(parts), tuple(x.shape))


@log_sum_exp.register
def _(cache: RaggedCache, /) -> Array:
    transpose = namespace(cache.q).matrix_transpose
    parts = [transpose(log_sum_exp(of_b)) for of_b in cache.sequences]
    return transpose(_placed(parts, cache.queries, cache.q, -INF))  # a token of no sequence sees no key


@attention_weights.register
def _(cache: RaggedCache, /) -> Array:
    B, _, T, S, _ = cache.weights.shape
    parts = [_padded(attention_weights(of_b), T, S) for of_b in cache.sequences]
    return namespace(cache.q).stack(parts) if B else full(cache.weights.shape[:-1], 0.0, cache.q)


def _padded(p: Array, T: int, S: int) -> Array:
    """p (H, t, s)   →   (H, T, S), 0 where there is no such query or key"""
    (H, t, s), xp = p.shape, namespace(p)
    wide = xp.concat([p, full((H, t, S - s), 0.0, p)], axis=-1)
    return xp.concat([wide, full((H, T - t, S), 0.0, p)], axis=-2)
