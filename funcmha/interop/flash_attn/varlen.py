"""Sequences of different lengths, one after another, padded, or in pages: `flash_attn_varlen_func`.

Axes: B sequences, N query tokens of all of them, M key tokens, T and S those of the longest, P pages of L slots, H
query heads, K key/value heads, D query/key width, E value width, R keys in a list.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import Array, narrow
from funcmha.dropout import Seeded

from .aligned import rounded
from .attended import AttendedCache, attended, attended_vjp, check_cotangents
from .doors import asked, check_dropout, check_listed, check_per_head, check_tokens, longest, spans
from .ragged import Sequences
from .slots import Table, paged, table_of


class FlashAttnVarlenFuncCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    attention: AttendedCache


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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> tuple[Array, FlashAttnVarlenFuncCache]:
    """out = [flash_attn_func(q₀, k₀, v₀); flash_attn_func(q₁, k₁, v₁); …]
    q (N, H, D)   k (M, K, D)   v (M, K, E)   qv (N, H, E)   cu_seqlens_q, cu_seqlens_k (B + 1,)   →   out (N, H, E)

    cu_seqlens_q, _k   where each sequence begins, and then where the last one ends, which is N and M: NumPy integers.
                       Without cu_seqlens_q, q, qv and out are (B, T, H, …), without cu_seqlens_k, k and v (B, S, K, …),
                       as in FA4
    max_seqlen_q, _k   T and S of `keep` and the weights: the longest, or those of padded arrays, unless given
    seqused_q, _k      (B,): only so many tokens of a sequence count, its first ones, and the last of these are what is
                       aligned. A query that does not count has out 0 and lse −∞, where the kernels write nothing. FA3's
                       and FA4's
    block_table        (B, …): k and v are pages (P, L, K, …), and these are the pages of each sequence, in order; those
                       beyond its tokens are not looked at. Of these there are as many as cu_seqlens_k says (FA2), or
                       seqused_k (FA4), or all that have room. A page may be read by several sequences
    page_table         FA4's word for the same
    gather_kv_indices  (N, R) or (B, T, R): as in `flash_attn_func`; keys are numbered within their sequence
    keep               broadcasts to (B, H, T, S), of which a sequence has the upper left

    All else is as in `flash_attn_func`, sequence by sequence, and alibi_slopes are (H,) or (B, H). Nothing is computed
    between sequences. `log_sum_exp(cache)` is (H, N), or (B, H, T), `attention_weights(cache)` (B, H, T, S) as `keep`.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    table, tokens = table_of(block_table, page_table), "B T" if cu_seqlens_q is None else "N"
    held = "P L" if table is not None else "B S" if cu_seqlens_k is None else "M"
    of_keys = {"k": (k, f"{held} K D"), "v": (v, f"{held} K E")}
    check_tokens(axes, q=(q, f"{tokens} H D"), **of_keys, qv=(qv, f"{tokens} H E"))
    listed = _in_order(check_listed(axes, gather_kv_indices, tokens))
    queries = spans(axes, "q", cu_seqlens_q, seqused_q, total=axes.size.get("N"), each=axes.size.get("T", 0))
    rows, keys = _keys(axes, table, cu_seqlens_k, seqused_k)
    axes.size["T"] = longest("q", max_seqlen_q, queries, axes.size.get("T", 0))
    axes.size["S"] = longest("k", max_seqlen_k, keys, axes.size.get("S", 0))
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    rate = check_dropout(axes, keep, dropout_p)
    at = Sequences(queries, keys, (axes["T"], axes["S"]), rows, listed)
    out, cache = attended(q, k, v, alibi_slopes, learnable_sink, qv, at=at, scores=scores, keep=keep, rate=rate)
    return out, FlashAttnVarlenFuncCache(alibi_slopes, learnable_sink, cache)


def flash_attn_varlen_func_vjp(
    cache: FlashAttnVarlenFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink, dqv: `flash_attn_varlen_func` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (H, N), or (B, H, T)
    """
    _check.cache(cache, FlashAttnVarlenFuncCache, "flash_attn_varlen_func")
    slopes, sink, attention = cache
    check_cotangents(attention, dout, dweights, dlse)
    *grads, dslopes, dsink, dqv = attended_vjp(attention, dout, dweights=dweights, dlse=dlse)
    dq, dk, dv, dqv = (narrow(dx, dout.dtype) for dx in (*grads, dqv))
    return dq, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink), dqv


def _keys(
    axes: _check.Axes, table: Table | None, cu_seqlens_k: Any, seqused_k: Any
) -> tuple[np.ndarray | None, np.ndarray]:
    """The rows of all keys, unless they are as they come, and where each sequence has its own among them."""
    if table is not None:
        return paged(axes, table, cu_seqlens_k, seqused_k).read()
    return None, spans(axes, "k", cu_seqlens_k, seqused_k, total=axes.size.get("M"), each=axes.size.get("S", 0))


def _in_order(listed: np.ndarray | None) -> np.ndarray | None:
    """(N, R) or (B, T, R), or None   →   (N, R)"""
    return None if listed is None else listed.reshape(prod(listed.shape[:-1]), listed.shape[-1])
