"""`flash_attn_with_kvcache`: rotate the new tokens, append them to the cache, attend to what it holds.

Axes: B sequences, T queries and U new keys of each, N queries and M new keys of all of them, S attended slots of one, P
pages of L slots, H query heads, K key/value heads, D query/key width, E value width, W positions and F pairs of a
rotary table.
"""

from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import _check
from funcmha._arrays import Array, downcast, from_host, heads_first, heads_last, namespace, or_zeros, outline
from funcmha.packing import cumulative, positions
from funcmha.rotary import PAIRS, Rotary, RotateCache, rotate, rotate_vjp

from .dense import ScoreOptions, Scores, check_per_head, check_tokens, score_options, takes_options_of
from .sequences import Sequences, Slots, longest, per_sequence, slots, spans, table_of
from .varlen import FlashAttnVarlenFuncCache, attend_each, attend_each_vjp, check_cotangents, flat

# ── flash_attn_with_kvcache ──────────────────────────────────────────────────────────────────────────────────────


class FlashAttnWithKvcacheCache(NamedTuple):
    rotated: tuple[RotateCache, RotateCache] | None  # q and k
    appended: "tuple[AppendCache, AppendCache] | None"  # k and v
    attention: FlashAttnVarlenFuncCache


@takes_options_of(score_options)
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
    rotary_interleaved: bool = True,
    **options: Unpack[ScoreOptions],
) -> tuple[tuple[Array, Array, Array], FlashAttnWithKvcacheCache]:
    """(out, k_cache', v_cache') = flash_attn_func(q, [k_cache; k], [v_cache; v]), and the caches with k and v in them
    q (B, T, H, D)   k_cache (P, L, K, D)   v_cache (P, L, K, E)   k (B, U, K, D)   v (B, U, K, E)   qv (B, T, H, E)
      →   out (B, T, H, E)

    The original writes k and v into the caches, and returns `out`. Here the inputs stay as they were: new caches are
    returned beside `out`, or without k the given ones. That copies them; `funcmha.kv_cache` does not. The gradient is
    that of all three outputs and reaches earlier tokens; the original has none.

    cache_seqlens       an int or (B,): the number of slots in use, behind which k is written. All slots unless given,
                        and required with k
    cache_batch_idx     (B,): the page of each sequence, or its row of the table; b unless given
    cache_leftpad       (B,): the number of first slots that are skipped
    block_table         (B, …): the pages of each sequence, in order; those beyond the slots in use are ignored
    page_table          FA3's name for it. FA2 refuses its table beside the two above
    cu_seqlens_q        (B + 1,): q, qv and out are (N, H, …), one sequence after another. FA3's
    cu_seqlens_k_new    (B + 1,): so are k and v, (M, K, …). FA3's
    max_seqlen_q        T of the weights, unless it is that of q or of the longest sequence
    rotary_cos, _sin    (W, F): k is rotated by rows cache_seqlens, cache_seqlens + 1, …, and so is q with causal, a
                        window or chunks; else all of q by row cache_seqlens. Features beyond 2F stay as they are
    rotary_seqlens      (B,): the first of these rows instead. FA3's
    rotary_interleaved  feature 2i is paired with 2i + 1; or else i with i + F

    All is written before anything is read; sequences may share pages. qv is not rotated. All other options are those of
    `flash_attn_func`, where S are the attended slots of a sequence. `log_sum_exp(cache)` is (B, H, T), or (H, N) with
    cu_seqlens_q. `attention_weights(cache)` is (B, H, T, S) for the longest S, and begins with the first attended slot.
    """
    scores, axes = score_options(**options), _check.Axes()
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "qv": qv}
    queries, new = _lengths(axes, arrays, cu_seqlens_q, cu_seqlens_k_new)
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    at = slots(axes, table_of(block_table, page_table), new, cache_seqlens, cache_batch_idx, cache_leftpad)
    tables = _tables(axes, k, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, queries, at, scores)
    rows, keys = at.attended()
    T, S = longest(axes, "q", max_seqlen_q, queries), longest(axes, "k", None, keys)

    rotated = appended = None
    if tables is not None:
        q, of_q = _rotate(q, tables[0])
        k, of_k = _rotate(k, tables[1])
        rotated = of_q, of_k
    if k is not None:
        k_cache, of_keys = _append(k_cache, k, at.written())
        v_cache, of_values = _append(v_cache, v, at.written())
        appended = of_keys, of_values
    sequences = Sequences(queries, keys, (T, S), rows)
    out, cache = attend_each(q, k_cache, v_cache, alibi_slopes, learnable_sink, qv, at=sequences, scores=scores)
    return (out, k_cache, v_cache), FlashAttnWithKvcacheCache(rotated, appended, cache)


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
    rotated, appended, attention = cache
    dout, dk_cache, dv_cache = _cotangents(attention, dy, dweights, dlse)
    dtype = next((dx.dtype for dx in dy if dx is not None), dout.dtype)

    dq, dkeys, dvalues, dslopes, dsink, dqv = attend_each_vjp(attention, dout, dweights=dweights, dlse=dlse)
    dk_cache, dv_cache, dk, dv = dk_cache + dkeys, dv_cache + dvalues, None, None
    if appended is not None:
        of_keys, of_values = appended
        dv_cache, dv = _append_vjp(of_values, dv_cache)
        dk_cache, dk = _append_vjp(of_keys, dk_cache)
    if rotated is not None:
        of_q, of_k = rotated
        dk = _rotate_vjp(of_k, dk)
        dq = _rotate_vjp(of_q, dq)
    dq, dk_cache, dv_cache, dk, dv, dqv = (downcast(dx, dtype) for dx in (dq, dk_cache, dv_cache, dk, dv, dqv))
    return dq, dk_cache, dv_cache, dk, dv, dslopes, dsink, dqv


# ── rotate, append ───────────────────────────────────────────────────────────────────────────────────────────────


def _rotate(x: Array, table: Rotary) -> tuple[Array, RotateCache]:
    """y = x, each token rotated by its row of the table      x (N, H, D) or (B, T, H, D), as y   cos, sin (N, F)"""
    y, cache = rotate(heads_first(flat(x)), rotary=table)
    return namespace(y).reshape(heads_last(y), x.shape), cache


def _rotate_vjp(cache: RotateCache, dy: Array) -> Array:
    """dx"""
    (dx,) = rotate_vjp(cache, heads_first(flat(dy)))
    return namespace(dx).reshape(heads_last(dx), dy.shape)


class AppendCache(NamedTuple):
    x: Array  # (B, U, K, D, 0) or (M, K, D, 0): only the shape
    rows: np.ndarray  # (M,) integers


def _append(pages: Array, x: Array, rows: np.ndarray) -> tuple[Array, AppendCache]:
    """pages' = pages, but pages'[rows] = x
    pages (P, L, K, D)   x (B, U, K, D) or (M, K, D)   rows (M,) of the P · L slots, all different   →   pages' as pages
    """
    held, xp = flat(pages), namespace(pages)
    source = np.arange(held.shape[0])
    source[rows] = held.shape[0] + np.arange(rows.size)
    y = xp.take(xp.concat([held, flat(x)], axis=0), from_host(source, pages), axis=0)
    return xp.reshape(y, pages.shape), AppendCache(outline(x), rows)


def _append_vjp(cache: AppendCache, dpages: Array) -> tuple[Array, Array]:
    """dpages = dpages', but 0 in `rows`     dx = dpages'[rows]"""
    x, rows = cache
    (*slots, K, D), xp = dpages.shape, namespace(dpages)
    written = np.zeros((slots[0] * slots[1], 1, 1), bool)
    written[rows] = True
    dx = xp.reshape(xp.take(flat(dpages), from_host(rows, dpages), axis=0), x.shape[:-1])
    return xp.reshape(xp.where(from_host(written, dpages), 0.0, flat(dpages)), (*slots, K, D)), dx


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _lengths(
    axes: _check.Axes, arrays: dict[str, Array], cu_seqlens_q: Any, cu_seqlens_k_new: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Start and stop of the queries of each sequence (B, 2), and the number of its new keys (B,), or None"""
    k, v = arrays["k"], arrays["v"]
    if (k is None) != (v is None):
        raise ValueError(f"k and v must both be given or neither, got no {'k' if k is None else 'v'}")
    if k is None and cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new must be left out without k, whose sequences it is of, got it alone")
    tokens, new = "B T" if cu_seqlens_q is None else "N", "B U" if cu_seqlens_k_new is None else "M"
    symbols = f"{tokens} H D", "P L K D", "P L K E", f"{new} K D", f"{new} K E", f"{tokens} H E"
    pairs = zip(arrays.values(), symbols, strict=True)
    check_tokens(axes, dict(zip(arrays, pairs, strict=True)), "k", "v")
    queries = spans(axes, "q", cu_seqlens_q)
    if k is None:
        return queries, None
    start, stop = spans(axes, "k_new", cu_seqlens_k_new).T
    return queries, stop - start


def _tables(
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
    """The rotation of each token of q and of k, or None."""
    _check.flag("rotary_interleaved", interleaved)
    if not _is_rotated(k, cos, sin, first):
        return None
    _check.one_dtype([("rotary_cos", cos), ("rotary_sin", sin)])
    axes.static("rotary_cos", cos)
    axes("rotary_cos", cos, "W F")
    axes("rotary_sin", sin, "W F")
    if 2 * axes["F"] > axes["D"]:
        raise ValueError(f"rotary_cos must rotate at most D={axes['D']} features as in q, got {2 * axes['F']}")
    start = at.taken if first is None else per_sequence("rotary_seqlens", first, axes["B"])
    n = queries[:, 1] - queries[:, 0]
    of_q = positions(cumulative(n), start) if scores.positional else np.repeat(start, n)
    of_k = positions(cumulative(at.new), start)
    last = 1 + int(max(of_q.max(initial=-1), of_k.max(initial=-1)))
    if axes["W"] < last:
        raise ValueError(f"rotary_cos must have W={last} positions, up to the last new one, got {axes['W']}")
    pairs = PAIRS["interleaved" if interleaved else "half"]
    return pairs(_rows(cos, of_q), _rows(sin, of_q)), pairs(_rows(cos, of_k), _rows(sin, of_k))


def _is_rotated(k: Array, cos: Any, sin: Any, first: Any) -> bool:
    if (cos is None) != (sin is None):
        raise ValueError(
            f"rotary_cos and rotary_sin must both be given or neither, got no {'cos' if cos is None else 'sin'}"
        )
    if cos is None and first is not None:
        raise ValueError("rotary_seqlens must be left out without rotary_cos, whose rows they are, got them alone")
    if cos is not None and k is None:
        raise ValueError(
            "rotary_cos must be left out without k, as in the original, got it: rotate q by funcmha.rotary"
        )
    return cos is not None


def _rows(table: Array, at: np.ndarray) -> Array:
    return namespace(table).take(table, from_host(at, table), axis=0)


def _cotangents(cache: FlashAttnVarlenFuncCache, dy: Any, dweights: Array, dlse: Array) -> tuple[Array, Array, Array]:
    dout, dk_cache, dv_cache = _check.parts("dy", dy, "dout, dk_cache, dv_cache")
    q, k_cache, v_cache = cache.q, cache.k, cache.v
    of_keys, of_values = k_cache.shape[:-1], v_cache.shape[:-1]
    check_cotangents(cache, dout, dweights, dlse, optional=True)
    _check.cotangent("dk_cache", dk_cache, of_keys, q, "P L K D", optional=True)
    _check.cotangent("dv_cache", dv_cache, of_values, q, "P L K E", optional=True)
    of_out = (*q.shape[:-2], v_cache.shape[-2])
    return or_zeros(dout, of_out, q), or_zeros(dk_cache, of_keys, q), or_zeros(dv_cache, of_values, q)
