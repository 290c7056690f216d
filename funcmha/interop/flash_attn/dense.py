"""Batches of sequences of equal lengths: `flash_attn_func`, and with its inputs packed into one or two arrays.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, D query/key width, E value width.
"""

from typing import Any, NamedTuple

from funcmha import _check
from funcmha._xp import Array, namespace, narrow, widen
from funcmha.dropout import Seeded
from funcmha.ops import attention_weights, log_sum_exp

from .aligned import AlignedCache, aligned, aligned_vjp, rounded, swapped
from .doors import asked, check_dropout, check_per_head, check_tokens

# ── flash_attn_func ──────────────────────────────────────────────────────────────────────────────────────────────


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
    /,
    *,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> tuple[Array, FlashAttnFuncCache]:
    """out = dropout(softmax(softcap · tanh(softmax_scale · q kᵀ / softcap) − alibi_slopes |i + S − T − j|, sink)) v
    q (B, T, H, D)   k (B, S, K, D)   v (B, S, K, E)   →   out (B, T, H, E)

    alibi_slopes     (H,) or (B, H). FA2's; here they have a gradient
    learnable_sink   (H,): joins the denominator and lse. FA4's
    dropout_p        with `keep`, which FA2 draws itself: boolean, True = keep, that broadcasts to (B, H, T, S), or a
                     `Seeded` of `funcmha.dropout`, which has a rate of its own. FA2's
    softmax_scale    D ** -0.5 unless given
    causal           j ≤ i + S − T: the last query sees the last key. With a window, both hold
    window_size      i + S − T − left ≤ j ≤ i + S − T + right, inclusive; -1 (FA2, FA3) and None (FA4) are no bound
    attention_chunk  keys in a block, where a query sees those of its own, ⌊(i + S − T) / chunk⌋; 0 for all. FA3's
    softcap          0.0 is none

    A query that sees no key gets 0, and lse −∞ or the sink. `log_sum_exp(cache)` is (B, H, T). Raises TypeError and
    ValueError, under these names.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    check_tokens(axes, q=(q, "B T H D"), k=(k, "B S K D"), v=(v, "B S K E"))
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    rate = check_dropout(axes, keep, dropout_p, "B H T S")
    wide = (*(swapped(widen(x)) for x in (q, k, v)), widen(alibi_slopes), widen(learnable_sink))
    o, cache = aligned(*wide, scores=scores, keep=keep, rate=rate)
    return narrow(swapped(o), q.dtype), FlashAttnFuncCache(alibi_slopes, learnable_sink, cache)


def flash_attn_func_vjp(
    cache: FlashAttnFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink: `flash_attn_func` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (B, H, T)
    """
    slopes, sink, attention = cache
    q, v = attention.attention.q, attention.attention.v
    B, H, T, _ = q.shape
    _check.cotangent("dout", dout, (B, T, H, v.shape[-1]), q, "B T H E")
    *grads, dslopes, dsink = aligned_vjp(attention, swapped(widen(dout)), dweights=dweights, dlse=dlse)
    dq, dk, dv = (narrow(swapped(dx), dout.dtype) for dx in grads)
    return dq, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink)


# ── packed inputs ────────────────────────────────────────────────────────────────────────────────────────────────


class FlashAttnQkvpackedFuncCache(NamedTuple):
    attention: FlashAttnFuncCache


def flash_attn_qkvpacked_func(
    qkv: Array, alibi_slopes: Array = None, learnable_sink: Array = None, /, **static: Any
) -> tuple[Array, FlashAttnQkvpackedFuncCache]:
    """out = flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])      qkv (B, T, 3, H, D)   →   out (B, T, H, D)

    Takes the keyword arguments of `flash_attn_func`.
    """
    _check_packed("qkv", qkv, 3, "B, T, 3, H, D")
    q, k, v = (qkv[:, :, n, ...] for n in range(3))
    out, cache = flash_attn_func(q, k, v, alibi_slopes, learnable_sink, **static)
    return out, FlashAttnQkvpackedFuncCache(cache)


def flash_attn_qkvpacked_func_vjp(
    cache: FlashAttnQkvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array]:
    """dqkv, dalibi_slopes, dlearnable_sink"""
    dq, dk, dv, dslopes, dsink = flash_attn_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    return namespace(dq).stack([dq, dk, dv], axis=-3), dslopes, dsink


class FlashAttnKvpackedFuncCache(NamedTuple):
    attention: FlashAttnFuncCache


def flash_attn_kvpacked_func(
    q: Array, kv: Array, alibi_slopes: Array = None, learnable_sink: Array = None, /, **static: Any
) -> tuple[Array, FlashAttnKvpackedFuncCache]:
    """out = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1])    q (B, T, H, D)   kv (B, S, 2, K, D)   →   out (B, T, H, D)

    Takes the keyword arguments of `flash_attn_func`.
    """
    _check_packed("kv", kv, 2, "B, S, 2, K, D")
    out, cache = flash_attn_func(q, kv[:, :, 0, ...], kv[:, :, 1, ...], alibi_slopes, learnable_sink, **static)
    return out, FlashAttnKvpackedFuncCache(cache)


def flash_attn_kvpacked_func_vjp(
    cache: FlashAttnKvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dkv, dalibi_slopes, dlearnable_sink"""
    dq, dk, dv, dslopes, dsink = flash_attn_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    return dq, namespace(dk).stack([dk, dv], axis=-3), dslopes, dsink


def _check_packed(name: str, x: Array, parts: int, symbols: str) -> None:
    """Raise unless x is an array of five axes, of which the third has this many parts."""
    _check.one_dtype([(name, x)])
    if x.ndim != 5 or x.shape[2] != parts:
        raise ValueError(f"{name} must be ({symbols}), got {tuple(x.shape)}")


Cache = FlashAttnFuncCache | FlashAttnQkvpackedFuncCache | FlashAttnKvpackedFuncCache


@attention_weights.register
def _(cache: Cache, /) -> Array:
    return attention_weights(cache.attention)


@log_sum_exp.register
def _(cache: Cache, /) -> Array:
    return log_sum_exp(cache.attention)
