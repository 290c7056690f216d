"""Batches of sequences of equal lengths: `flash_attn_func`.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, R keys in a list.
"""

from typing import NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import heads_first, heads_last
from funcmha._xp import Array, narrow, widen
from funcmha.dropout import Seeded

from .aligned import AlignedCache, aligned, aligned_vjp, rounded
from .doors import asked, check_dropout, check_listed, check_per_head, check_tokens


class FlashAttnFuncCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    attention: AlignedCache  # with the heads before the tokens


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    qv: Array = None,
    /,
    *,
    gather_kv_indices: np.ndarray | None = None,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> tuple[Array, FlashAttnFuncCache]:
    """out = dropout(softmax(softcap · tanh(softmax_scale · u / softcap) − alibi_slopes |i + S − T − j|, sink)) v
    where u = q kᵀ + qv vᵀ
    q (B, T, H, D)   k (B, S, K, D)   v (B, S, K, E)   qv (B, T, H, E)   →   out (B, T, H, E)

    alibi_slopes       (H,) or (B, H). FA2's; here they have a gradient
    learnable_sink     (H,): joins the denominator and lse. FA4's
    qv                 0 unless given. FA3's and FA4's
    gather_kv_indices  (B, T, R): the only keys that a query sees, each of them once; a number outside 0 … S, as -1, is
                       none. With a mask, both hold. FA4's
    dropout_p          with `keep`, which FA2 draws itself: boolean, True = keep, that broadcasts to (B, H, T, S), or a
                       `Seeded` of `funcmha.dropout`, which has a rate of its own. FA2's
    softmax_scale      D ** -0.5 unless given, with qv (D + E) ** -0.5
    causal             j ≤ i + S − T: the last query sees the last key. With a window, both hold
    window_size        i + S − T − left ≤ j ≤ i + S − T + right, inclusive; -1 (FA2, FA3) and None (FA4) are no bound
    attention_chunk    keys in a block, where a query sees those of its own, ⌊(i + S − T) / chunk⌋; 0 for all. FA3's
    softcap            0.0 is none

    A query that sees no key gets 0, and lse −∞ or the sink. `log_sum_exp(cache)` is (B, H, T). Raises TypeError and
    ValueError, under these names.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    check_tokens(axes, q=(q, "B T H D"), k=(k, "B S K D"), v=(v, "B S K E"), qv=(qv, "B T H E"))
    listed = check_listed(axes, gather_kv_indices, "B T")
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    rate = check_dropout(axes, keep, dropout_p)
    of_heads = widen(alibi_slopes), widen(learnable_sink), None if qv is None else heads_first(widen(qv))
    wide = *(heads_first(widen(x)) for x in (q, k, v)), *of_heads
    o, cache = aligned(*wide, scores=scores, listed=listed, keep=keep, rate=rate)
    return narrow(heads_last(o), q.dtype), FlashAttnFuncCache(alibi_slopes, learnable_sink, cache)


def flash_attn_func_vjp(
    cache: FlashAttnFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink, dqv: `flash_attn_func` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (B, H, T)
    """
    _check.cache(cache, FlashAttnFuncCache, "flash_attn_func")
    slopes, sink, attention = cache
    q, v = attention.attention.q, attention.attention.v
    B, H, T, _ = q.shape
    _check.cotangent("dout", dout, (B, T, H, v.shape[-1]), q, "B T H E")
    *grads, dslopes, dsink, dqv = aligned_vjp(attention, heads_first(widen(dout)), dweights=dweights, dlse=dlse)
    dq, dk, dv = (narrow(heads_last(dx), dout.dtype) for dx in grads)
    dqv = None if dqv is None else narrow(heads_last(dqv), dout.dtype)
    return dq, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink), dqv
