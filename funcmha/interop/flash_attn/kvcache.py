"""Decoding against a key/value cache: `flash_attn_with_kvcache` is to turn, to write, and to attend to what is there.

Axes: B sequences, T queries and U new keys of each, M keys of all of them, P pages of N slots, H query heads, K
key/value heads, D query/key width, E value width, W positions and F pairs of a rotary table.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._qk import heads_first, heads_last
from funcmha._xp import Array, from_host, full, namespace, narrow, or_zeros, widen
from funcmha.ops import attention_weights, log_sum_exp
from funcmha.rotary import PAIRS, RotateCache, rotate, rotate_vjp

from .aligned import RaggedCache, Scores, ragged, ragged_vjp, rounded
from .doors import asked, check_per_head, check_tokens
from .rows import PickedCache, WrittenCache, picked, picked_vjp, written, written_vjp
from .slots import Slots, slots

# ── flash_attn_with_kvcache ──────────────────────────────────────────────────────────────────────────────────────


class FlashAttnWithKvcacheCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    q: RotateCache | None  # how it was turned
    k: RotateCache | None
    appended: "tuple[AppendedCache, AppendedCache] | None"  # k and v
    attended: "AttendedCache"


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array = None,
    v: Array = None,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    /,
    *,
    rotary_cos: Array = None,
    rotary_sin: Array = None,
    cache_seqlens: int | np.ndarray | None = None,
    cache_batch_idx: np.ndarray | None = None,
    cache_leftpad: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
) -> tuple[tuple[Array, Array, Array], FlashAttnWithKvcacheCache]:
    """(out, k_cache', v_cache') = flash_attn_func(q, [k_cache; k], [v_cache; v]), and the caches with k and v in them
    q (B, T, H, D)   k_cache (P, N, K, D)   v_cache (P, N, K, E)   k (B, U, K, D)   v (B, U, K, E)  →  out (B, T, H, E)

    The original writes k and v into the caches, and returns `out`. Here the caches stay what they were, and new ones
    come back beside `out`, or without k those that went in. That copies them: to decode for long, see `funcmha.decode`,
    which does not. The gradient is that of all three and reaches the past, where the original has none.

    cache_seqlens       how many slots of a sequence are taken, behind which k is written: an int or (B,). All of them
                        unless given, which it must be with k
    cache_batch_idx     (B,): the page of each sequence, which has one; page b unless given
    cache_leftpad       (B,): so many slots come first that nobody sees
    block_table         (B, …): the pages of each sequence, in order; those beyond the slots in use are not looked at.
                        FA3's `page_table`
    rotary_cos, _sin    (W, F): k is turned by rows cache_seqlens, cache_seqlens + 1, …, and so is q if it is causal or
                        has a window or chunks; else all of q is turned by row cache_seqlens. Features beyond 2F pass
    rotary_interleaved  feature 2i turns with 2i + 1; or else i with i + F

    First all is written, then all is read; pages may be read by more than one. All else is as in `flash_attn_func`, of
    which S are the slots that a sequence sees. `log_sum_exp(cache)` is (B, H, T), and `attention_weights(cache)` is
    (B, H, T, S) for the longest S, where a sequence begins with the first slot that it sees.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    _check_arrays(axes, q, k_cache, v_cache, k, v)
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    at = slots(axes, k, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    _check_rotary(axes, k, rotary_cos, rotary_sin, at.taken, scores)
    _check.flag("rotary_interleaved", rotary_interleaved)

    of_q = of_k = appended = None
    if rotary_cos is not None:
        step = 1 if scores.local else 0
        q, of_q = _turned(q, at.taken, step, rotary_cos, rotary_sin, rotary_interleaved)
        k, of_k = _turned(k, at.taken, 1, rotary_cos, rotary_sin, rotary_interleaved)
    if k is not None:
        k_cache, of_keys = _appended(k_cache, k, at)
        v_cache, of_values = _appended(v_cache, v, at)
        appended = of_keys, of_values
    out, attended = _attended(q, k_cache, v_cache, alibi_slopes, learnable_sink, at, scores)
    cache = FlashAttnWithKvcacheCache(alibi_slopes, learnable_sink, of_q, of_k, appended, attended)
    return (out, k_cache, v_cache), cache


def flash_attn_with_kvcache_vjp(
    cache: FlashAttnWithKvcacheCache,
    dy: tuple[Array, Array, Array],
    /,
    *,
    dweights: Array = None,
    dlse: Array = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """dq, dk_cache, dv_cache, dk, dv, dalibi_slopes, dlearnable_sink: `flash_attn_with_kvcache` from the bottom up
    from the cotangents of out, k_cache' and v_cache', of which None is 0, and, where given, of the weights (B, H, T, S)
    and lse (B, H, T)
    """
    _check.cache(cache, FlashAttnWithKvcacheCache, "flash_attn_with_kvcache")
    slopes, sink, of_q, of_k, appended, attended = cache
    dout, dk_cache, dv_cache = _cotangents(attended, dy, dweights, dlse)
    dtype = next((dx.dtype for dx in dy if dx is not None), dout.dtype)

    dq, dkeys, dvalues, dslopes, dsink = _attended_vjp(attended, dout, widen(dweights), widen(dlse))
    dk_cache, dv_cache, dk, dv = dk_cache + dkeys, dv_cache + dvalues, None, None
    if appended is not None:
        of_keys, of_values = appended
        dv_cache, dv = _appended_vjp(of_values, dv_cache)
        dk_cache, dk = _appended_vjp(of_keys, dk_cache)
    if of_q is not None and of_k is not None:
        dk = _turned_vjp(of_k, dk)
        dq = _turned_vjp(of_q, dq)
    dq, dk_cache, dv_cache, dk, dv = (narrow(dx, dtype) for dx in (dq, dk_cache, dv_cache, dk, dv))
    return dq, dk_cache, dv_cache, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink)


# ── to turn ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _turned(
    x: Array, first: np.ndarray, step: int, cos: Array, sin: Array, interleaved: bool
) -> tuple[Array, RotateCache]:
    """y = x (B, T, H, D), where token t of sequence b is turned by row first[b] + step · t of the tables"""
    B, T = x.shape[:2]
    rows = first[:, None] + step * np.arange(T)

    def at(table: Array) -> Array:
        xp, index = namespace(table), from_host(rows.reshape(-1), table)
        return xp.reshape(xp.take(table, index, axis=0), (B, 1, T, table.shape[1]))

    turn = PAIRS["interleaved" if interleaved else "half"](at(cos), at(sin))
    y, cache = rotate(heads_first(x), rotary=turn)
    return heads_last(y), cache


def _turned_vjp(cache: RotateCache, dy: Array) -> Array:
    """dx"""
    (dx,) = rotate_vjp(cache, heads_first(dy))
    return heads_last(dx)


# ── to write ─────────────────────────────────────────────────────────────────────────────────────────────────────


class AppendedCache(NamedTuple):
    x: Array  # (B, U, K, D, 0): of what was written nothing but its shape
    written: WrittenCache


def _appended(pages: Array, x: Array, at: Slots) -> tuple[Array, AppendedCache]:
    """pages' = pages, with x in its slots      pages (P, N, K, D)   x (B, U, K, D)   →   pages' (P, N, K, D)"""
    y, cache = written(_flat(pages), _flat(x), rows=at.written())
    return namespace(y).reshape(y, pages.shape), AppendedCache(full((*x.shape, 0), 0.0, x), cache)


def _appended_vjp(cache: AppendedCache, dpages: Array) -> tuple[Array, Array]:
    """dpages, dx"""
    x, of_rows = cache
    dold, dnew = written_vjp(of_rows, _flat(dpages))
    reshape = namespace(dpages).reshape
    return reshape(dold, dpages.shape), reshape(dnew, x.shape[:-1])


# ── to attend ────────────────────────────────────────────────────────────────────────────────────────────────────


class AttendedCache(NamedTuple):
    q: Array  # (B, T, H, D, 0): nothing but shapes
    k_cache: Array  # (P, N, K, D, 0)
    v_cache: Array  # (P, N, K, E, 0)
    keys: PickedCache
    values: PickedCache
    attention: RaggedCache  # of one sequence after another


def _attended(
    q: Array, k_cache: Array, v_cache: Array, slopes: Array, sink: Array, at: Slots, scores: Scores
) -> tuple[Array, AttendedCache]:
    """out = attention of each sequence over the slots that it sees
    q (B, T, H, D)   k_cache (P, N, K, D)   v_cache (P, N, K, E)   slopes (H,) or (B, H)   sink (H,)
      →   out (B, T, H, E)
    """
    (B, T, *_), (rows, spans), xp = q.shape, at.read(), namespace(q)
    (keys, of_keys), (values, of_values) = (picked(_flat(x), rows=rows) for x in (k_cache, v_cache))
    starts = T * np.arange(B)
    queries = np.stack([starts, starts + T], axis=-1)
    wide = (widen(x) for x in (_flat(q), keys, values, slopes, sink))
    weights = B, q.shape[2], T, int((spans[:, 1] - spans[:, 0]).max(initial=0))
    o, cache = ragged(*wide, queries=queries, keys=spans, weights=weights, scores=scores)
    out = xp.reshape(narrow(o, q.dtype), (*q.shape[:-1], v_cache.shape[-1]))
    of_q, of_k, of_v = (full((*x.shape, 0), 0.0, widen(x[:0, ...])) for x in (q, k_cache, v_cache))
    return out, AttendedCache(of_q, of_k, of_v, of_keys, of_values, cache)


def _attended_vjp(cache: AttendedCache, dout: Array, dweights: Array, dlse: Array) -> tuple[Array, ...]:
    """dq, dk_cache, dv_cache, dslopes, dsink"""
    q, k_cache, v_cache, of_keys, of_values, attention = cache
    xp, (B, T, H, *_) = namespace(dout), q.shape
    dlse = None if dlse is None else xp.reshape(xp.moveaxis(dlse, 0, 1), (H, B * T))
    dq, dkeys, dvalues, dslopes, dsink = ragged_vjp(attention, _flat(dout), dweights=dweights, dlse=dlse)
    (dv_rows,), (dk_rows,) = picked_vjp(of_values, dvalues), picked_vjp(of_keys, dkeys)
    shaped = (xp.reshape(dx, x.shape[:-1]) for dx, x in ((dq, q), (dk_rows, k_cache), (dv_rows, v_cache)))
    return (*shaped, dslopes, dsink)


@attention_weights.register
def _(cache: FlashAttnWithKvcacheCache, /) -> Array:
    return attention_weights(cache.attended.attention)


@log_sum_exp.register
def _(cache: FlashAttnWithKvcacheCache, /) -> Array:
    (B, T, H, *_), lse = cache.attended.q.shape, log_sum_exp(cache.attended.attention)
    xp = namespace(lse)
    return xp.moveaxis(xp.reshape(lse, (H, B, T)), 1, 0)


def _flat(x: Array) -> Array:
    """(B, T, …)   →   (B · T, …)"""
    return namespace(x).reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_arrays(axes: _check.Axes, q: Array, k_cache: Array, v_cache: Array, k: Array, v: Array) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"k and v must both be given or neither, got no {'k' if k is None else 'v'}")
    held = {"q": (q, "B T H D"), "k_cache": (k_cache, "P N K D"), "v_cache": (v_cache, "P N K E")}
    check_tokens(axes, **held, **({} if k is None else {"k": (k, "B U K D"), "v": (v, "B U K E")}))


def _check_rotary(axes: _check.Axes, k: Array, cos: Any, sin: Any, taken: np.ndarray, scores: Scores) -> None:
    if (cos is None) != (sin is None):
        raise ValueError(
            f"rotary_cos and rotary_sin must both be given or neither, got no {'cos' if cos is None else 'sin'}"
        )
    if cos is None:
        return
    if k is None:
        raise ValueError("rotary_cos must be left out without k, as in the original")
    _check.one_dtype([("rotary_cos", cos), ("rotary_sin", sin)])
    axes("rotary_cos", cos, "W F")
    axes("rotary_sin", sin, "W F")
    last = int(taken.max(initial=0)) + max(axes["U"], axes["T"] if scores.local else min(axes["T"], 1))
    if axes["W"] < last:
        raise ValueError(
            f"rotary_cos must have W={last} positions, up to cache_seqlens and the new ones, got {axes['W']}"
        )
    if 2 * axes["F"] > axes["D"]:
        raise ValueError(f"rotary_cos must turn at most D={axes['D']} features as in q, got {2 * axes['F']}")


def _cotangents(cache: AttendedCache, dy: Any, dweights: Array, dlse: Array) -> tuple[Array, Array, Array]:
    dout, dk_cache, dv_cache = _check.parts("dy", dy, "dout, dk_cache, dv_cache")
    q, k_cache, v_cache, *_, attention = cache
    (B, T, H, *_), (P, N, K, D, _), E = q.shape, k_cache.shape, v_cache.shape[-2]
    _check.cotangent("dweights", dweights, attention.weights.shape[:-1], q, "B H T S", optional=True)
    _check.cotangent("dlse", dlse, (B, H, T), q, "B H T", optional=True)
    of_out, of_keys, of_values = (B, T, H, E), (P, N, K, D), (P, N, K, E)
    _check.cotangent("dout", dout, of_out, q, "B T H E", optional=True)
    _check.cotangent("dk_cache", dk_cache, of_keys, q, "P N K D", optional=True)
    _check.cotangent("dv_cache", dv_cache, of_values, q, "P N K E", optional=True)
    return or_zeros(dout, of_out, q), or_zeros(dk_cache, of_keys, q), or_zeros(dv_cache, of_values, q)
