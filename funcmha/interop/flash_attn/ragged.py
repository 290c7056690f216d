"""Sequences of different lengths, one after another: `aligned` for each.

In funcmha's layout of a sequence, (H, T, D) sequence after sequence, and in the dtype that is computed in.

Axes: B sequences, N tokens of all of them, M keys of all of them, T queries and S keys of one, H query heads, K
key/value heads, D query/key width, E value width, R keys in a list; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha._xp import heads_first, heads_last
from funcmha._xp import Array, full, namespace, of_sample, outline, unbroadcast
from funcmha.dropout import Seeded
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.ops import INF

from .aligned import AlignedCache, Scores, aligned, aligned_vjp


class Sequences(NamedTuple):
    """Which tokens are whose."""

    queries: np.ndarray  # (B, 2) integers: start, stop, which rise; a token of no sequence has o = 0
    keys: np.ndarray  # (B, 2) integers
    longest: tuple[int, int]  # T and S of the weights, of which a sequence has the upper left
    rows: np.ndarray | None = None  # (M,) where the keys are, unless they are in order
    listed: np.ndarray | None = None  # (N, R) the only keys that a query sees, numbered within its sequence


class RaggedCache(NamedTuple):
    slopes: Array  # (H,) or (B, H), or None
    sink: Array  # (H,) or None
    sequences: tuple[AlignedCache, ...]  # B
    q: Array  # (N, H, D, 0): of q, k, v and qv nothing but their shapes
    k: Array  # (M, K, D, 0)
    v: Array  # (M, K, E, 0)
    qv: Array  # (N, H, E, 0) or None
    weights: Array  # (B, H, T, S, 0), of the longest
    queries: np.ndarray  # (B, 2) integers: start, stop
    keys: np.ndarray  # (B, 2) integers


def ragged(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array = None,
    sink: Array = None,
    qv: Array = None,
    /,
    *,
    at: Sequences,
    scores: Scores,
    keep: Array | Seeded = None,
    rate: float = 0.0,
) -> tuple[Array, RaggedCache]:
    """o[queries b] = aligned(q[queries b], k[keys b], v[keys b], slopes[b], sink, qv[queries b])
    q (N, H, D)   k (M, K, D)   v (M, K, E)   slopes (H,) or (B, H)   sink (H,)   qv (N, H, E)   →   o (N, H, E)

    keep   broadcasts to the weights (B, H, T, S), of which a sequence has the upper left

    Sequence after sequence, so that nothing is computed between them and slopes may differ among them.
    """
    parts, caches, (T, S) = [], [], at.longest
    for b, (rows, cols) in enumerate(zip(_slices(at.queries), _slices(at.keys), strict=True)):
        tokens = (heads_first(x) for x in (q[rows, ...], k[cols, ...], v[cols, ...]))
        inputs = *tokens, of_sample(slopes, (b,), 1), sink, None if qv is None else heads_first(qv[rows, ...])
        own = _of_sequence(keep, b, rows.stop - rows.start, cols.stop - cols.start)
        listed = None if at.listed is None else at.listed[rows]
        o, cache = aligned(*inputs, scores=scores, listed=listed, keep=own, rate=rate)
        parts.append(heads_last(o))
        caches.append(cache)
    (N, H, _), E = q.shape, v.shape[-1]
    o = _placed(parts, at.queries, full((N, H, E, 0), 0.0, q))
    of_q, of_k, of_v, of_qv = (outline(x) for x in (q, k, v, qv))
    weights = full((len(caches), H, T, S, 0), 0.0, q)
    return o, RaggedCache(slopes, sink, tuple(caches), of_q, of_k, of_v, of_qv, weights, at.queries, at.keys)


def ragged_vjp(
    cache: RaggedCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink, dqv: each sequence from the bottom up
    from the cotangents of o (N, H, E) and, where given, of the weights (B, H, T, S) and lse (H, N)
    """
    slopes, sink, sequences, q, k, v, qv, _, queries, keys = cache
    grads: list[tuple[Array, ...]] = []
    for b, (rows, cols) in enumerate(zip(_slices(queries), _slices(keys), strict=True)):
        T, S = rows.stop - rows.start, cols.stop - cols.start
        of_weights = None if dweights is None else dweights[b, :, :T, :S]
        of_lse = None if dlse is None else dlse[:, rows]
        grads.append(aligned_vjp(sequences[b], heads_first(do[rows, ...]), dweights=of_weights, dlse=of_lse))
    dq, dk, dv, dslopes, dsink, dqv = zip(*grads, strict=True) if grads else ((),) * 6
    return (
        _placed([heads_last(g) for g in dq], queries, q),
        _placed([heads_last(g) for g in dk], keys, k),
        _placed([heads_last(g) for g in dv], keys, v),
        _summed(dslopes, slopes),
        _summed(dsink, sink),
        None if qv is None else _placed([heads_last(g) for g in dqv], queries, qv),
    )


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
    transpose, (N, H, _, _) = namespace(cache.q).matrix_transpose, cache.q.shape
    parts = [transpose(log_sum_exp(of_b)) for of_b in cache.sequences]
    like = full((N, H, 0), 0.0, cache.q)
    return transpose(_placed(parts, cache.queries, like, -INF))  # a token of no sequence sees no key


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
