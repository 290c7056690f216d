"""Decoding against a key/value cache: `flash_attn_with_kvcache` is to turn, to write, and to attend to what is there.

Axes: B sequences, T queries and U new keys of each, N queries and M new keys of all of them, S slots that one sees, P
pages of L slots, H query heads, K key/value heads, D query/key width, E value width, W positions and F pairs of a
rotary table.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import heads_first, heads_last
from funcmha._xp import Array, from_host, namespace, narrow, or_zeros, outline
from funcmha.packing import cumulative, positions
from funcmha.rotary import PAIRS, Rotary, RotateCache, rotate, rotate_vjp

from .aligned import Scores, rounded
from .attended import AttendedCache, attended, attended_vjp, check_cotangents, flat
from .doors import asked, check_per_head, check_tokens, longest, per_sequence, spans
from .ragged import Sequences
from .rows import WrittenCache, written, written_vjp
from .slots import Slots, slots, table_of

# ── flash_attn_with_kvcache ──────────────────────────────────────────────────────────────────────────────────────


class FlashAttnWithKvcacheCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (B, H), or None
    learnable_sink: Array  # (H,) or None
    q: RotateCache | None  # how it was turned
    k: RotateCache | None
    appended: "tuple[AppendedCache, AppendedCache] | None"  # k and v
    attention: AttendedCache


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array = None,
    v: Array = None,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    qv: Array = None,
    /,
    *,
    rotary_cos: Array = None,
    rotary_sin: Array = None,
    cache_seqlens: int | np.ndarray | None = None,
    cache_batch_idx: np.ndarray | None = None,
    cache_leftpad: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    page_table: np.ndarray | None = None,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k_new: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: np.ndarray | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
) -> tuple[tuple[Array, Array, Array], FlashAttnWithKvcacheCache]:
    """(out, k_cache', v_cache') = flash_attn_func(q, [k_cache; k], [v_cache; v]), and the caches with k and v in them
    q (B, T, H, D)   k_cache (P, L, K, D)   v_cache (P, L, K, E)   k (B, U, K, D)   v (B, U, K, E)   qv (B, T, H, E)
      →   out (B, T, H, E)

    The original writes k and v into the caches, and returns `out`. Here the caches stay what they were, and new ones
    come back beside `out`, or without k those that went in. That copies them: to decode for long, see `funcmha.decode`,
    which does not. The gradient is that of all three and reaches the past, where the original has none.

    cache_seqlens       how many slots of a sequence are taken, behind which k is written: an int or (B,). All of them
                        unless given, which it must be with k
    cache_batch_idx     (B,): the page of each sequence, which has one, or its row of the table; b unless given
    cache_leftpad       (B,): so many slots come first that nobody sees
    block_table         (B, …): the pages of each sequence, in order; those beyond the slots in use are not looked at
    page_table          FA3's word for the same. FA2 refuses its table beside the two above
    cu_seqlens_q        (B + 1,): q, qv and out are (N, H, …), one sequence after another. FA3's
    cu_seqlens_k_new    (B + 1,): so are k and v, (M, K, …). FA3's
    max_seqlen_q        T of the weights, unless it is that of q or of the longest sequence
    rotary_cos, _sin    (W, F): k is turned by rows cache_seqlens, cache_seqlens + 1, …, and so is q if it is causal or
                        has a window or chunks; else all of q is turned by row cache_seqlens. Features beyond 2F pass
    rotary_seqlens      (B,): these rows begin here instead. FA3's
    rotary_interleaved  feature 2i turns with 2i + 1; or else i with i + F

    First all is written, then all is read; pages may be read by more than one. qv is not turned. All else is as in
    `flash_attn_func`, of which S are the slots that a sequence sees. `log_sum_exp(cache)` is (B, H, T), or (H, N) with
    cu_seqlens_q, and `attention_weights(cache)` is (B, H, T, S) for the longest S, where a sequence begins with the
    first slot that it sees.
    """
    scores, axes = asked(softmax_scale, causal, window_size, attention_chunk, softcap), _check.Axes()
    _check_arrays(axes, q, k_cache, v_cache, k, v, qv, cu_seqlens_q, cu_seqlens_k_new)
    queries, new = _spans(axes, k, cu_seqlens_q, cu_seqlens_k_new)
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    at = slots(axes, table_of(block_table, page_table), new, cache_seqlens, cache_batch_idx, cache_leftpad)
    turns = _turns(axes, k, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, queries, at, scores)
    (rows, keys), T = at.read(), longest("q", max_seqlen_q, queries, axes.size.get("T", 0))
    sequences = Sequences(queries, keys, (T, longest("k", None, keys, 0)), rows)

    of_q = of_k = appended = None
    if turns is not None:
        q, of_q = _turned(q, turns[0])
        k, of_k = _turned(k, turns[1])
    if k is not None:
        k_cache, of_keys = _appended(k_cache, k, at)
        v_cache, of_values = _appended(v_cache, v, at)
        appended = of_keys, of_values
    out, cache = attended(q, k_cache, v_cache, alibi_slopes, learnable_sink, qv, at=sequences, scores=scores)
    own = FlashAttnWithKvcacheCache(alibi_slopes, learnable_sink, of_q, of_k, appended, cache)
    return (out, k_cache, v_cache), own


def flash_attn_with_kvcache_vjp(
    cache: FlashAttnWithKvcacheCache,
    dy: tuple[Array, Array, Array],
    /,
    *,
    dweights: Array = None,
    dlse: Array = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array]:
    """dq, dk_cache, dv_cache, dk, dv, dalibi_slopes, dlearnable_sink, dqv: `flash_attn_with_kvcache` from the bottom up
    from the cotangents of out, k_cache' and v_cache', of which None is 0, and, where given, of the weights (B, H, T, S)
    and lse (B, H, T) or (H, N)
    """
    _check.cache(cache, FlashAttnWithKvcacheCache, "flash_attn_with_kvcache")
    slopes, sink, of_q, of_k, appended, attention = cache
    dout, dk_cache, dv_cache = _cotangents(attention, dy, dweights, dlse)
    dtype = next((dx.dtype for dx in dy if dx is not None), dout.dtype)

    dq, dkeys, dvalues, dslopes, dsink, dqv = attended_vjp(attention, dout, dweights=dweights, dlse=dlse)
    dk_cache, dv_cache, dk, dv = dk_cache + dkeys, dv_cache + dvalues, None, None
    if appended is not None:
        of_keys, of_values = appended
        dv_cache, dv = _appended_vjp(of_values, dv_cache)
        dk_cache, dk = _appended_vjp(of_keys, dk_cache)
    if of_q is not None and of_k is not None:
        dk = _turned_vjp(of_k, dk)
        dq = _turned_vjp(of_q, dq)
    dq, dk_cache, dv_cache, dk, dv, dqv = (narrow(dx, dtype) for dx in (dq, dk_cache, dv_cache, dk, dv, dqv))
    return dq, dk_cache, dv_cache, dk, dv, rounded(dslopes, slopes), rounded(dsink, sink), dqv


# ── to turn ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _turned(x: Array, turn: Rotary) -> tuple[Array, RotateCache]:
    """y = x turned, each token by its row of the tables      x (N, H, D) or (B, T, H, D), as y   cos, sin (N, F)"""
    y, cache = rotate(heads_first(flat(x)), rotary=turn)
    return namespace(y).reshape(heads_last(y), x.shape), cache


def _turned_vjp(cache: RotateCache, dy: Array) -> Array:
    """dx"""
    (dx,) = rotate_vjp(cache, heads_first(flat(dy)))
    return namespace(dx).reshape(heads_last(dx), dy.shape)


# ── to write ─────────────────────────────────────────────────────────────────────────────────────────────────────


class AppendedCache(NamedTuple):
    x: Array  # (B, U, K, D, 0) or (M, K, D, 0): of what was written nothing but its shape
    written: WrittenCache


def _appended(pages: Array, x: Array, at: Slots) -> tuple[Array, AppendedCache]:
    """pages' = pages, with x in its slots     pages (P, L, K, D)   x (B, U, K, D) or (M, K, D)   →   pages' as pages"""
    y, cache = written(flat(pages), flat(x), rows=at.written())
    return namespace(y).reshape(y, pages.shape), AppendedCache(outline(x), cache)


def _appended_vjp(cache: AppendedCache, dpages: Array) -> tuple[Array, Array]:
    """dpages, dx"""
    x, of_rows = cache
    dold, dnew = written_vjp(of_rows, flat(dpages))
    reshape = namespace(dpages).reshape
    return reshape(dold, dpages.shape), reshape(dnew, x.shape[:-1])


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_arrays(
    axes: _check.Axes,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array,
    v: Array,
    qv: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k_new: Any,
) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"k and v must both be given or neither, got no {'k' if k is None else 'v'}")
    if k is None and cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new must be left out without k, whose sequences it is of")
    tokens, of_new = "B T" if cu_seqlens_q is None else "N", "B U" if cu_seqlens_k_new is None else "M"
    held = {"q": (q, f"{tokens} H D"), "k_cache": (k_cache, "P L K D"), "v_cache": (v_cache, "P L K E")}
    new = {} if k is None else {"k": (k, f"{of_new} K D"), "v": (v, f"{of_new} K E")}
    check_tokens(axes, **held, **new, qv=(qv, f"{tokens} H E"))


def _spans(
    axes: _check.Axes, k: Array, cu_seqlens_q: Any, cu_seqlens_k_new: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Start and stop of each sequence of queries (B, 2), and how many new keys it has (B,), if there are any"""
    size = axes.size
    queries = spans(axes, "q", cu_seqlens_q, total=size.get("N"), each=size.get("T", 0))
    if k is None:
        return queries, None
    new = spans(axes, "k_new", cu_seqlens_k_new, total=size.get("M"), each=size.get("U", 0))
    return queries, new[:, 1] - new[:, 0]


def _turns(
    axes: _check.Axes,
    k: Array,
    cos: Any,
    sin: Any,
    interleaved: Any,
    first: Any,
    queries: np.ndarray,
    at: Slots,
    scores: Scores,
) -> tuple[Rotary, Rotary] | None:
    """What turns q and what turns k, token by token; or the error."""
    _check.flag("rotary_interleaved", interleaved)
    if not _is_turned(k, cos, sin, first):
        return None
    _check.one_dtype([("rotary_cos", cos), ("rotary_sin", sin)])
    axes("rotary_cos", cos, "W F")
    axes("rotary_sin", sin, "W F")
    if 2 * axes["F"] > axes["D"]:
        raise ValueError(f"rotary_cos must turn at most D={axes['D']} features as in q, got {2 * axes['F']}")
    start = at.taken if first is None else per_sequence("rotary_seqlens", first, axes["B"])
    n = queries[:, 1] - queries[:, 0]
    of_q = positions(cumulative(n), start) if scores.local else np.repeat(start, n)
    of_k = positions(cumulative(at.new), start)
    last = 1 + int(max(of_q.max(initial=-1), of_k.max(initial=-1)))
    if axes["W"] < last:
        raise ValueError(f"rotary_cos must have W={last} positions, up to the last new one, got {axes['W']}")
    pairs = PAIRS["interleaved" if interleaved else "half"]
    return pairs(_rows(cos, of_q), _rows(sin, of_q)), pairs(_rows(cos, of_k), _rows(sin, of_k))


def _is_turned(k: Array, cos: Any, sin: Any, first: Any) -> bool:
    if (cos is None) != (sin is None):
        raise ValueError(
            f"rotary_cos and rotary_sin must both be given or neither, got no {'cos' if cos is None else 'sin'}"
        )
    if cos is None and first is not None:
        raise ValueError("rotary_seqlens must be left out without rotary_cos, whose rows they are")
    if cos is not None and k is None:
        raise ValueError("rotary_cos must be left out without k, as in the original")
    return cos is not None


def _rows(table: Array, at: np.ndarray) -> Array:
    return namespace(table).take(table, from_host(at, table), axis=0)


def _cotangents(cache: AttendedCache, dy: Any, dweights: Array, dlse: Array) -> tuple[Array, Array, Array]:
    dout, dk_cache, dv_cache = _check.parts("dy", dy, "dout, dk_cache, dv_cache")
    q, k_cache, v_cache, *_ = cache
    of_keys, of_values = k_cache.shape[:-1], v_cache.shape[:-1]
    check_cotangents(cache, dout, dweights, dlse, optional=True)
    _check.cotangent("dk_cache", dk_cache, of_keys, q, "P L K D", optional=True)
    _check.cotangent("dv_cache", dv_cache, of_values, q, "P L K E", optional=True)
    of_out = (*q.shape[:-2], v_cache.shape[-2])
    return or_zeros(dout, of_out, q), or_zeros(dk_cache, of_keys, q), or_zeros(dv_cache, of_values, q)
