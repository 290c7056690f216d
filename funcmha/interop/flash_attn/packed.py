"""Queries, keys and values in one array, or keys and values in one: the calls of `dense` and `varlen` on slices.

Axes: B batch, T queries, S keys, N and M the tokens of all sequences, H query heads, K key/value heads, D width.
"""

from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, namespace
from funcmha.dropout import Seeded
from funcmha.packing import check_cumulative

from .dense import FlashAttnFuncCache, ScoreOptions, flash_attn_func, flash_attn_func_vjp, takes_options_of
from .varlen import FlashAttnVarlenFuncCache, flash_attn_varlen_func, flash_attn_varlen_func_vjp


class Options(ScoreOptions, total=False):
    """Those of `flash_attn_func`."""

    gather_kv_indices: np.ndarray | None
    dropout_p: float
    keep: Array | Seeded


# ── batches of equal lengths ─────────────────────────────────────────────────────────────────────────────────────


class FlashAttnQkvpackedFuncCache(NamedTuple):
    attention: FlashAttnFuncCache
    num_heads_q: int | None


@takes_options_of(flash_attn_func)
def flash_attn_qkvpacked_func(
    qkv: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    /,
    *,
    num_heads_q: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, FlashAttnQkvpackedFuncCache]:
    """out = flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])      qkv (B, T, 3, H, D)   →   out (B, T, H, D)

    num_heads_q   H, where qkv is (B, T, H + K + K, D): the heads of q, then those of k, then those of v. FA3's
    """
    q, k, v = _parts("qkv", qkv, "B, T, 3, H, D") if num_heads_q is None else _side_by_side(qkv, num_heads_q)
    out, cache = flash_attn_func(q, k, v, alibi_slopes, learnable_sink, **options)
    return out, FlashAttnQkvpackedFuncCache(cache, num_heads_q)


def flash_attn_qkvpacked_func_vjp(
    cache: FlashAttnQkvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array]:
    """dqkv, dalibi_slopes, dlearnable_sink"""
    _check.cache(cache, FlashAttnQkvpackedFuncCache, "flash_attn_qkvpacked_func")
    *parts, dslopes, dsink, _ = flash_attn_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    dqkv = _stacked(parts) if cache.num_heads_q is None else namespace(dout).concat(parts, axis=-2)
    return dqkv, dslopes, dsink


class FlashAttnKvpackedFuncCache(NamedTuple):
    attention: FlashAttnFuncCache


@takes_options_of(flash_attn_func)
def flash_attn_kvpacked_func(
    q: Array, kv: Array, alibi_slopes: Array = None, learnable_sink: Array = None, /, **options: Unpack[Options]
) -> tuple[Array, FlashAttnKvpackedFuncCache]:
    """out = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1])   q (B, T, H, D)   kv (B, S, 2, K, D)  →  out (B, T, H, D)"""
    k, v = _parts("kv", kv, "B, S, 2, K, D")
    out, cache = flash_attn_func(q, k, v, alibi_slopes, learnable_sink, **options)
    return out, FlashAttnKvpackedFuncCache(cache)


def flash_attn_kvpacked_func_vjp(
    cache: FlashAttnKvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dkv, dalibi_slopes, dlearnable_sink"""
    _check.cache(cache, FlashAttnKvpackedFuncCache, "flash_attn_kvpacked_func")
    dq, *parts, dslopes, dsink, _ = flash_attn_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    return dq, _stacked(parts), dslopes, dsink


# ── sequences of different lengths ───────────────────────────────────────────────────────────────────────────────


class FlashAttnVarlenQkvpackedFuncCache(NamedTuple):
    attention: FlashAttnVarlenFuncCache


@takes_options_of(flash_attn_func)
def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    /,
    *,
    cu_seqlens: np.ndarray,
    max_seqlen: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, FlashAttnVarlenQkvpackedFuncCache]:
    """out = flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2])      qkv (N, 3, H, D)   →   out (N, H, D)

    cu_seqlens (B + 1,) and max_seqlen are those of queries and keys.
    """
    q, k, v = _parts("qkv", qkv, "N, 3, H, D")
    check_cumulative("cu_seqlens", cu_seqlens, qkv.shape[0], "qkv")
    lengths: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen}
    lengths |= {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
    out, cache = flash_attn_varlen_func(q, k, v, alibi_slopes, learnable_sink, **lengths, **options)
    return out, FlashAttnVarlenQkvpackedFuncCache(cache)


def flash_attn_varlen_qkvpacked_func_vjp(
    cache: FlashAttnVarlenQkvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array]:
    """dqkv, dalibi_slopes, dlearnable_sink"""
    _check.cache(cache, FlashAttnVarlenQkvpackedFuncCache, "flash_attn_varlen_qkvpacked_func")
    *parts, dslopes, dsink, _ = flash_attn_varlen_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    return _stacked(parts), dslopes, dsink


class FlashAttnVarlenKvpackedFuncCache(NamedTuple):
    attention: FlashAttnVarlenFuncCache


@takes_options_of(flash_attn_func)
def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    /,
    *,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, FlashAttnVarlenKvpackedFuncCache]:
    """out = flash_attn_varlen_func(q, kv[:, 0], kv[:, 1])      q (N, H, D)   kv (M, 2, K, D)   →   out (N, H, D)"""
    k, v = _parts("kv", kv, "M, 2, K, D")
    lengths: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    lengths |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
    out, cache = flash_attn_varlen_func(q, k, v, alibi_slopes, learnable_sink, **lengths, **options)
    return out, FlashAttnVarlenKvpackedFuncCache(cache)


def flash_attn_varlen_kvpacked_func_vjp(
    cache: FlashAttnVarlenKvpackedFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dkv, dalibi_slopes, dlearnable_sink"""
    _check.cache(cache, FlashAttnVarlenKvpackedFuncCache, "flash_attn_varlen_kvpacked_func")
    dq, *parts, dslopes, dsink, _ = flash_attn_varlen_func_vjp(cache.attention, dout, dweights=dweights, dlse=dlse)
    return dq, _stacked(parts), dslopes, dsink


def _parts(name: str, x: Array, symbols: str) -> list[Array]:
    """(..., n, H, D)   →   n of (..., H, D), as views; ValueError unless x has the axes of `symbols`"""
    _check.one_dtype([(name, x)])
    letters = symbols.split(", ")
    n = int(letters[-3])
    if x.ndim != len(letters) or x.shape[-3] != n:
        raise ValueError(f"{name} must be ({symbols}), got {tuple(x.shape)}")
    return [x[..., i, :, :] for i in range(n)]


def _stacked(parts: list[Array]) -> Array:
    """`_parts` from the bottom up"""
    return namespace(parts[0]).stack(parts, axis=-3)


def _side_by_side(qkv: Array, num_heads_q: Any) -> list[Array]:
    """(B, T, H + K + K, D)   →   (B, T, H, D) and two of (B, T, K, D), as views"""
    _check.one_dtype([("qkv", qkv)])
    H = _check.integer("num_heads_q", num_heads_q, 1)
    heads = qkv.shape[2] if qkv.ndim == 4 else 0
    K = (heads - H) // 2
    if K < 1 or heads != H + 2 * K:
        raise ValueError(f"qkv must be (B, T, H + K + K, D) with H={H} as in num_heads_q, got {tuple(qkv.shape)}")
    return [qkv[:, :, start:stop, :] for start, stop in ((0, H), (H, H + K), (H + K, H + 2 * K))]
