"""`flash_attn_varlen_func`: sequences of different lengths, packed one after another, padded, or in pages.

Axes: B sequences, N query tokens of all of them, M key tokens, T and S those of the longest, P pages of L slots, H
query heads, K key/value heads, D query/key width, E value width, R listed keys. Padded keys are B pages.
"""

from itertools import chain
from math import prod
from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, downcast, from_host, full, namespace, of_sample, outline, unbroadcast, upcast
from funcmha.dropout import Masked, Seeded
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.ops import INF

from .dense import (
    FlashAttnFuncCache,
    ScoreOptions,
    Scores,
    attend,
    attend_vjp,
    check_dropout,
    check_listed,
    check_per_head,
    check_tokens,
    rounded,
    score_options,
    takes_options_of,
)
from .sequences import Sequences, Table, longest, paged, spans, table_of

# ── flash_attn_varlen_func ───────────────────────────────────────────────────────────────────────────────────────


class FlashAttnVarlenFuncCache(NamedTuple):
    q: Array  # (N, H, D, 0) or (B, T, H, D, 0): only the shape, and the dtype that is computed in
    k: Array  # (M, K, D, 0) or (P, L, K, D, 0)
    v: Array  # (M, K, E, 0) or (P, L, K, E, 0)
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    qv: Array  # (N, H, E, 0) or (B, T, H, E, 0), or None
    parts: tuple[FlashAttnFuncCache, ...]  # B
    at: Sequences


@takes_options_of(score_options)
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    qv: Array = None,
    /,
    *,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    page_table: np.ndarray | None = None,
    gather_kv_indices: np.ndarray | None = None,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    **options: Unpack[ScoreOptions],
) -> tuple[Array, FlashAttnVarlenFuncCache]:
    """out = [flash_attn_func(q₀, k₀, v₀); flash_attn_func(q₁, k₁, v₁); …]
    q (N, H, D)   k (M, K, D)   v (M, K, E)   qv (N, H, E)   cu_seqlens_q, cu_seqlens_k (B + 1,)   →   out (N, H, E)

    cu_seqlens_q, _k   the start of each sequence, and last the end, N and M: NumPy integers. Without cu_seqlens_q, q,
                       qv and out are (B, T, H, …), without cu_seqlens_k, k and v (B, S, K, …), as in FA4
    max_seqlen_q, _k   T and S of `keep` and the weights: the longest, or those of padded arrays, unless given
    seqused_q, _k      (B,): only the first so many tokens of each sequence count, and the last of these are aligned.
                       Other queries have out 0 and lse −∞, where the kernels write nothing. FA3's and FA4's
    block_table        (B, …): k and v are pages (P, L, K, …), and these are the pages of each sequence, in order; those
                       beyond its tokens are ignored. Its length is that of cu_seqlens_k (FA2) or seqused_k (FA4), or
                       else all slots. Sequences may share pages
    page_table         FA4's name for it
    gather_kv_indices  (N, R) or (B, T, R): as in `flash_attn_func`; keys are numbered within their sequence
    keep               broadcasts to (B, H, T, S), of which each sequence has the upper left

    All other options are those of `flash_attn_func`, sequence by sequence; alibi_slopes are (H,) or (B, H). Nothing is
    computed between sequences. `log_sum_exp(cache)` is (H, N), or (B, H, T), `attention_weights(cache)` (B, H, T, S).
    """
    scores, axes = score_options(**options), _check.Axes()
    table, tokens = table_of(block_table, page_table), "B T" if cu_seqlens_q is None else "N"
    held = "P L" if table is not None else "B S" if cu_seqlens_k is None else "M"
    of_q, of_k = {"q": (q, f"{tokens} H D")}, {"k": (k, f"{held} K D"), "v": (v, f"{held} K E")}
    check_tokens(axes, of_q | of_k | {"qv": (qv, f"{tokens} H E")})
    listed = check_listed(axes, gather_kv_indices, tokens)
    queries = spans(axes, "q", cu_seqlens_q, seqused_q)
    rows, keys = _keys(axes, table, cu_seqlens_k, seqused_k)
    T, S = longest(axes, "q", max_seqlen_q, queries), longest(axes, "k", max_seqlen_k, keys)
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    inputs, dropout = (q, k, v, alibi_slopes, learnable_sink, qv), check_dropout(axes, keep, dropout_p)
    return attend_each(*inputs, at=Sequences(queries, keys, (T, S), rows, listed), scores=scores, dropout=dropout)


def flash_attn_varlen_func_vjp(
    cache: FlashAttnVarlenFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink, dqv: `flash_attn_varlen_func` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (H, N), or (B, H, T)
    """
    _check.cache(cache, FlashAttnVarlenFuncCache, "flash_attn_varlen_func")
    check_cotangents(cache, dout, dweights, dlse)
    dq, dk, dv, dslopes, dsink, dqv = attend_each_vjp(cache, dout, dweights=dweights, dlse=dlse)
    dq, dk, dv, dqv = (downcast(dx, dout.dtype) for dx in (dq, dk, dv, dqv))
    return dq, dk, dv, dslopes, dsink, dqv


def _keys(
    axes: _check.Axes, table: Table | None, cu_seqlens_k: Any, seqused_k: Any
) -> tuple[np.ndarray | None, np.ndarray]:
    """The rows of all keys, unless they are in order, and start and stop of each sequence among them."""
    if table is not None:
        return paged(axes, table, cu_seqlens_k, seqused_k).attended()
    return None, spans(axes, "k", cu_seqlens_k, seqused_k)


# ── one sequence after another ───────────────────────────────────────────────────────────────────────────────────


def attend_each(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array,
    sink: Array,
    qv: Array,
    /,
    *,
    at: Sequences,
    scores: Scores,
    dropout: Masked | Seeded | None = None,
) -> tuple[Array, FlashAttnVarlenFuncCache]:
    """out[queries b] = attend(q[queries b], k[keys b], v[keys b], slopes[b], sink, qv[queries b]), unchecked
    q (N, H, D) or (B, T, H, D)   k (M, K, D) or (P, L, K, D)   v (M, K, E) or (P, L, K, E)   slopes (H,) or (B, H)
    sink (H,)   qv (N, H, E) or (B, T, H, E)   →   out (N, H, E) or (B, T, H, E)

    Sequence after sequence: nothing is computed between them, and slopes may differ.
    """
    queries, keys, values, of_values = flat(q), flat(k), flat(v), flat(qv)
    if at.rows is not None:
        keys, values = _picked(keys, at.rows), _picked(values, at.rows)
    outs, parts = [], []
    for b, (i, j) in enumerate(at.slices()):
        inputs = queries[i, ...], keys[j, ...], values[j, ...], of_sample(slopes, (b,), 1), sink
        own = None if qv is None else of_values[i, ...]
        drop = _dropout_of(dropout, b, i.stop - i.start, j.stop - j.start)
        out, cache = attend(*inputs, own, scores=scores, listed=at.listed_by(i), dropout=drop)
        outs.append(out)
        parts.append(cache)
    of_q, of_k, of_v, of_qv = (upcast(outline(x)) for x in (q, k, v, qv))
    joined = downcast(_placed(outs, at.queries, (*queries.shape[:-1], v.shape[-1]), of_q), q.dtype)
    out = namespace(q).reshape(joined, (*q.shape[:-1], v.shape[-1]))
    return out, FlashAttnVarlenFuncCache(of_q, of_k, of_v, slopes, sink, of_qv, tuple(parts), at)


def attend_each_vjp(
    cache: FlashAttnVarlenFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink, dqv: `attend_each` from the bottom up; those of tokens are not yet rounded"""
    q, k, v, slopes, sink, qv, parts, at = cache
    dout, transpose = flat(upcast(dout)), namespace(dout).matrix_transpose
    dlse = None if dlse is None else namespace(dlse).reshape(transpose(dlse), dout.shape[:-1])
    grads: list[tuple[Array, ...]] = []
    for b, (i, j) in enumerate(at.slices()):
        T, S = i.stop - i.start, j.stop - j.start
        of_weights = None if dweights is None else dweights[b, :, :T, :S]
        of_lse = None if dlse is None else transpose(dlse[i, ...])
        grads.append(attend_vjp(parts[b], dout[i, ...], dweights=of_weights, dlse=of_lse))
    dq, dk, dv, dslopes, dsink, dqv = zip(*grads, strict=True) if grads else ((),) * 6
    return (
        _unflat(dq, at.queries, q),
        _unflat(dk, at.keys, k, at.rows),
        _unflat(dv, at.keys, v, at.rows),
        _summed(dslopes, slopes),
        _summed(dsink, sink),
        None if qv is None else _unflat(dqv, at.queries, qv),
    )


@log_sum_exp.register
def _(cache: FlashAttnVarlenFuncCache, /) -> Array:
    (*tokens, H, _, _), xp = cache.q.shape, namespace(cache.q)
    parts = [xp.matrix_transpose(log_sum_exp(part)) for part in cache.parts]
    lse = _placed(parts, cache.at.queries, (prod(tokens), H), cache.q, -INF)  # a token of no sequence is fully masked
    return xp.matrix_transpose(xp.reshape(lse, (*tokens, H)))


@attention_weights.register
def _(cache: FlashAttnVarlenFuncCache, /) -> Array:
    B, H, (T, S) = len(cache.parts), cache.q.shape[-3], cache.at.longest
    parts = [_padded(attention_weights(part), T, S) for part in cache.parts]
    return namespace(cache.q).stack(parts) if B else full((B, H, T, S), 0.0, cache.q)


def check_cotangents(
    cache: FlashAttnVarlenFuncCache, dout: Array, dweights: Array, dlse: Array, *, optional: bool = False
) -> None:
    """Of `attend_each`; `optional` for a dout that may be None."""
    (*tokens, H, _, _), E, q, B = cache.q.shape, cache.v.shape[-2], cache.q, len(cache.parts)
    letters, of_lse = ("N", "H N") if len(tokens) == 1 else ("B T", "B H T")
    _check.cotangent("dout", dout, (*tokens, H, E), q, f"{letters} H E", optional=optional)
    _check.cotangent("dweights", dweights, (B, H, *cache.at.longest), q, "B H T S", optional=True)
    _check.cotangent("dlse", dlse, (*tokens[:-1], H, tokens[-1]), q, of_lse, optional=True)


def flat(x: Array) -> Array:
    """(N, H, D) or (B, T, H, D), or None   →   (N, H, D)"""
    return x if x is None or x.ndim == 3 else namespace(x).reshape(x, (prod(x.shape[:-2]), *x.shape[-2:]))


def _unflat(parts: Any, spans: np.ndarray, like: Array, rows: np.ndarray | None = None) -> Array:
    """The gradient of `flat`, of `_picked` where there are rows, and of slicing   →   the shape of `like`"""
    *tokens, H, D, _ = like.shape
    n = prod(tokens) if rows is None else rows.size
    dx = _placed(parts, spans, (n, H, D), like)
    dx = dx if rows is None else _picked_vjp(dx, rows, prod(tokens))
    return namespace(dx).reshape(dx, (*tokens, H, D))


def _picked(x: Array, rows: np.ndarray) -> Array:
    """y = x[rows]      x (N, ...)   rows (M,), each any number of times   →   y (M, ...)"""
    return namespace(x).take(x, from_host(rows, x), axis=0)


def _picked_vjp(dy: Array, rows: np.ndarray, N: int) -> Array:
    """dx[n] = Σ dy[m] over all m with rows[m] = n

    First the first use of each row, then the second, and so on: without atomics, and always the same bits. O(N) rows
    for each use of the most used row.
    """
    xp, rest = namespace(dy), dy.shape[1:]
    padded = xp.concat([dy, full((1, *rest), 0.0, dy)], axis=0)
    dx = full((N, *rest), 0.0, dy)
    for m in _uses(rows, N):
        dx = dx + xp.take(padded, from_host(m, dy), axis=0)
    return dx


def _uses(rows: np.ndarray, N: int) -> np.ndarray:
    """(uses, N): the m of the first, second, … use of each row, and M where there is none"""
    order = np.argsort(rows, stable=True)
    ordered = rows[order]
    use = np.arange(rows.size) - np.searchsorted(ordered, ordered)
    found = np.full((int(use.max(initial=-1)) + 1, N), rows.size)
    found[use, ordered] = order
    return found


def _dropout_of(dropout: Masked | Seeded | None, b: int, T: int, S: int) -> Masked | Seeded | None:
    """Of one sequence: the upper left T × S of its booleans."""
    if dropout is None or isinstance(dropout, Seeded):
        return dropout if dropout is None else dropout.sample(b)
    keep = of_sample(dropout.keep, (b,))
    keep = namespace(keep).reshape(keep, (*(1,) * (2 - keep.ndim), *keep.shape))
    return Masked(keep[..., : T if keep.shape[-2] > 1 else 1, : S if keep.shape[-1] > 1 else 1], dropout.rate)


def _placed(parts: Any, spans: np.ndarray, shape: tuple[int, ...], like: Array, fill: float = 0.0) -> Array:
    """The parts (n, ...) at the rows of their spans, `fill` elsewhere   →   `shape`, in the dtype of `like`"""
    total, *rest = shape
    edges = zip([0, *spans[:, 1].tolist()], [*spans[:, 0].tolist(), total], strict=True)
    first, *gaps = (full((stop - start, *rest), fill, like) for start, stop in edges)
    return namespace(like).concat([first, *chain(*zip(parts, gaps, strict=True))], axis=0)


def _summed(parts: Any, x: Array) -> Array:
    """The gradient of what sequences share, or have of their own: B of (H,)   →   as x, (H,) or (B, H)"""
    if x is None:
        return None
    dx = unbroadcast(namespace(x).stack(parts), tuple(x.shape)) if parts else full(tuple(x.shape), 0.0, x)
    return rounded(dx, x)


def _padded(p: Array, T: int, S: int) -> Array:
    """p (H, t, s)   →   (H, T, S), 0 where there is no such query or key"""
    (H, t, s), xp = p.shape, namespace(p)
    wide = xp.concat([p, full((H, t, S - s), 0.0, p)], axis=-1)
    return xp.concat([wide, full((H, T - t, S), 0.0, p)], axis=-2)
