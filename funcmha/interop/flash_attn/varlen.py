"""Sequences of different lengths, one after another: `flash_attn_varlen_func`.

Axes: B sequences, N query tokens of all of them, M key tokens, T and S those of the longest, H query heads, K key/value
heads, D query/key width, E value width.
"""

from typing import NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import Array, narrow, widen
from funcmha.dropout import Seeded

from .aligned import RaggedCache, ragged, ragged_vjp, rounded
from .doors import asked, check_dropout, check_per_head, check_tokens, longest, spans


class FlashAttnVarlenFuncCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    attention: RaggedCache  # of one sequence after another


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    /,
    *,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> tuple[Array, FlashAttnVarlenFuncCache]:
    """out = [flash_attn_func(q₀, k₀, v₀); flash_attn_func(q₁, k₁, v₁); …]
    q (N, H, D)   k (M, K, D)   v (M, K, E)   cu_seqlens_q, cu_seqlens_k (B + 1,)   →   out (N, H, E)

    cu_seqlens_q, _k  where each sequence begins, and then where the last one ends, which is N and M: NumPy integers
    max_seqlen_q, _k  T and S: the longest, unless more is given
    seqused_q, _k     (B,): only so many tokens of a sequence count, its first ones, and the last of these are what is
                      aligned. A query that does not count has out 0 and lse −∞, where the kernels write nothing. FA3's
                      and FA4's
    keep              broadcasts to (B, H, T, S), of which a sequence has the upper left

    All else is as in `flash_attn_func`, sequence by sequence, and alibi_slopes are (H,) or (B, H). Nothing is computed
    between sequences. `log_sum_exp(cache)` is (H, N), `attention_weights(cache)` (B, H, T, S) as `keep` is.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    check_tokens(axes, q=(q, "N H D"), k=(k, "M K D"), v=(v, "M K E"))
    queries = spans("cu_seqlens_q", cu_seqlens_q, "seqused_q", seqused_q, axes["N"], "q")
    keys = spans("cu_seqlens_k", cu_seqlens_k, "seqused_k", seqused_k, axes["M"], "k")
    if len(queries) != len(keys):
        raise ValueError(f"cu_seqlens_k must be (B + 1,) with B={len(queries)} as in cu_seqlens_q, got B={len(keys)}")
    axes.size["B"], axes.owner["B"] = len(queries), "cu_seqlens_q"
    axes.size["T"] = longest("max_seqlen_q", max_seqlen_q, queries, "cu_seqlens_q")
    axes.size["S"] = longest("max_seqlen_k", max_seqlen_k, keys, "cu_seqlens_k")
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    rate = check_dropout(axes, keep, dropout_p)
    wide = tuple(widen(x) for x in (q, k, v, alibi_slopes, learnable_sink))
    weights = (axes["B"], axes["H"], axes["T"], axes["S"])
    o, cache = ragged(*wide, queries=queries, keys=keys, weights=weights, scores=scores, keep=keep, rate=rate)
    return narrow(o, q.dtype), FlashAttnVarlenFuncCache(alibi_slopes, learnable_sink, cache)


def flash_attn_varlen_func_vjp(
    cache: FlashAttnVarlenFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink: `flash_attn_varlen_func` from the bottom up
    from the cotangents of out (N, H, E) and, where given, of the weights (B, H, T, S) and lse (H, N)
    """
    _check.cache(cache, FlashAttnVarlenFuncCache, "flash_attn_varlen_func")
    slopes, sink, attention = cache
    (N, H, _), E = attention.q.shape, attention.v.shape[-2]
    _check.cotangent("dout", dout, (N, H, E), attention.q, "N H E")
    _check.cotangent("dweights", dweights, attention.weights.shape[:-1], attention.q, "B H T S", optional=True)
    _check.cotangent("dlse", dlse, (H, N), attention.q, "H N", optional=True)
    *grads, dslopes, dsink = ragged_vjp(attention, widen(dout), dweights=widen(dweights), dlse=widen(dlse))
    dq, dk, dv = (narrow(dx, dout.dtype) for dx in grads)
    return dq, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink)
