"""The node `sdpa`, and its gradient. The package docstring lists the differences from funcmha.

Axes: B batch, H_q query heads, H_k key heads, H_v value heads, S_q queries, S_kv keys, D_qk query/key width, D_v value
width.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check, masks
from funcmha._arrays import HALF, Array, downcast, dtype_name, from_host, is_array, namespace, unbroadcast, upcast
from funcmha.biases import RelativeBias, alibi_slopes, dense, distances
from funcmha.dropout import Masked, masked
from funcmha.engines import attention, attention_vjp, log_sum_exp
from funcmha.masks import Mask
from funcmha.ops import per_key_head, per_query_head

LOG2E = float(np.log2(np.e))
ALIGNMENTS = ("top_left", "bottom_right")


# ── sdpa ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class SdpaCache(NamedTuple):
    attention: Any  # the cache of `engines.attention`, of (B, H_q, S_q, D_qk), with ALiBi in the bias
    k: Array  # (B, H_k, S_kv, D_qk)
    v: Array  # (B, H_v, S_kv, D_v)
    bias: Array  # broadcasts to (B, H_q, S_q, S_kv), or None
    sink_token: Array  # (1, H_q, 1, 1), or None


def sdpa(
    q: Array,
    k: Array,
    v: Array,
    bias: Array = None,
    sink_token: Array = None,
    /,
    *,
    attn_scale: float | None = None,
    use_alibi_mask: bool = False,
    use_padding_mask: bool = False,
    seq_len_q: np.ndarray | None = None,
    seq_len_kv: np.ndarray | None = None,
    diagonal_alignment: Any = "top_left",
    diagonal_band_left_bound: int | None = None,
    diagonal_band_right_bound: int | None = None,
    use_causal_mask: bool = False,
    use_causal_mask_bottom_right: bool = False,
    sliding_window_length: int | None = None,
    dropout: tuple[Array, float] | None = None,
) -> tuple[Array, SdpaCache]:
    """o = dropout(softmax(attn_scale · q kᵀ + bias + slope · (j − i), sink_token)) v
    q (B, H_q, S_q, D_qk)   k (B, H_k, S_kv, D_qk)   v (B, H_v, S_kv, D_v)   →   o (B, H_q, S_q, D_v)

    bias        added to the scaled scores, differentiable, four axes that broadcast to (B, H_q, S_q, S_kv)
    sink_token  (1, H_q, 1, 1), a logit for each head in the softmax's denominator only, differentiable
    use_alibi_mask      requires a right bound of 0
    use_padding_mask    requires the lengths, NumPy arrays (B,) or (B, 1, 1, 1) of integers
    diagonal_alignment  "top_left" or "bottom_right", or the member of `cudnn.diagonal_alignment`
    diagonal_band_left_bound    forbids j ≤ i + offset − left, where None is no bound
    diagonal_band_right_bound   forbids j > i + offset + right, where None is no bound
    use_causal_mask, use_causal_mask_bottom_right, sliding_window_length
                the older options for a right bound of 0, top-left or bottom-right, and for a left bound
    dropout     (mask, scale): booleans, or numbers 0 and 1, that broadcast as bias does, and 1 / (1 − p), the factor of
                the weights that are kept

    Raises TypeError and ValueError before any arithmetic.
    """
    axes = _check_inputs(q, k, v, bias, sink_token)
    scale = 1.0 if attn_scale is None else _check.number("attn_scale", attn_scale)
    lengths = _check_lengths(axes, use_padding_mask, seq_len_q, seq_len_kv)
    alignment, right = _causal(
        use_causal_mask, use_causal_mask_bottom_right, diagonal_alignment, diagonal_band_right_bound
    )
    left = _left(diagonal_band_left_bound, sliding_window_length)
    band = _band(axes, lengths, alignment, left, right)
    _check.flag("use_alibi_mask", use_alibi_mask)
    if use_alibi_mask and right != 0:
        raise ValueError(f"diagonal_band_right_bound must be 0 with use_alibi_mask, got {right!r}")
    kept = _check_dropout(axes, dropout)

    dtype = q.dtype
    mask, q, kh, vh = _within(axes, lengths, band), upcast(q), upcast(k), upcast(v)
    if axes["H_k"] != axes["H_v"]:
        kh, vh = per_query_head(kh, q), per_query_head(vh, q)
    added = _with_alibi(axes, upcast(bias), q) if use_alibi_mask else upcast(bias)
    sink = None if sink_token is None else upcast(sink_token)[0, :, 0, 0]
    o, inner = attention(q, kh, vh, added, sink, mask=mask, scale=scale, dropout=kept)
    return downcast(o, dtype), SdpaCache(inner, k, v, bias, sink_token)


def sdpa_vjp(
    cache: SdpaCache, do: Array, /, *, dstats: Array = None
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """dq, dk, dv, dbias, dsink_token: `sdpa` from the bottom up
    from the cotangents of o and, where given, of `stats(cache)` (B, H_q, S_q, 1); cuDNN takes no second one
    """
    _check.cache(cache, SdpaCache, "sdpa")
    inner, k, v, bias, sink_token = cache
    lse = log_sum_exp(inner)
    _check.cotangent("do", do, (*lse.shape, v.shape[-1]), lse, "B H_q S_q D_v")
    _check.cotangent("dstats", dstats, (*lse.shape, 1), lse, "B H_q S_q 1", optional=True)
    dlse = None if dstats is None else upcast(dstats)[..., 0]
    dq, dk, dv, dadded, dsink = attention_vjp(inner, upcast(do), dlse=dlse)
    dsink_token = None if sink_token is None else downcast(dsink[None, :, None, None], sink_token.dtype)
    dbias = None if bias is None else unbroadcast(dadded, bias.shape)
    dk, dv = per_key_head(dk, k), per_key_head(dv, v)
    dq, dk, dv, dbias = (downcast(dx, do.dtype) for dx in (dq, dk, dv, dbias))
    return dq, dk, dv, dbias, dsink_token


def stats(cache: SdpaCache, /, *, log2: bool = False) -> Array:
    """log (Σ exp(score) + exp(sink))   (B, H_q, S_q, 1), natural; with `log2` times log₂ e, as with `stats_use_log2`

    −∞ or the sink for fully masked rows. In float32 for 16-bit inputs. `sdpa_backward` takes natural ones.
    """
    _check.flag("log2", log2)
    lse = log_sum_exp(cache)[..., None]
    return LOG2E * lse if log2 else lse


def _with_alibi(axes: _check.Axes, bias: Array, like: Array) -> Array | RelativeBias:
    """bias + slope · (j − i): in linear memory if there is no bias"""
    T, S = axes["S_q"], axes["S_kv"]
    values = alibi_slopes(axes["H_q"])[:, None] * distances(T, S)
    relative = RelativeBias(downcast(from_host(values, like), like.dtype))
    return relative if bias is None else bias + dense(relative, T, S)


def _causal(top_left: bool, bottom_right: bool, alignment: Any, right: int | None) -> tuple[str, int | None]:
    """The alignment and the right bound, also from one of the older flags."""
    _check.flag("use_causal_mask", top_left)
    _check.flag("use_causal_mask_bottom_right", bottom_right)
    name = str(getattr(alignment, "name", alignment)).lower()
    if name not in ALIGNMENTS:
        raise ValueError(f"diagonal_alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    if not (top_left or bottom_right):
        return name, right
    if (top_left and bottom_right) or right is not None or name != "top_left":
        raise ValueError(
            "use_causal_mask and use_causal_mask_bottom_right must be given without the other one, diagonal_alignment "
            f"and diagonal_band_right_bound, got {top_left}, {bottom_right}, {alignment!r} and {right!r}"
        )
    return ALIGNMENTS[bottom_right], 0


def _left(bound: int | None, length: int | None) -> int | None:
    """The left bound under its newer or its older name."""
    if length is None:
        return bound
    if bound is not None:
        raise ValueError(f"sliding_window_length must be None with diagonal_band_left_bound, got {length!r}")
    return _check.integer("sliding_window_length", length, 1, or_else=" or None")


def _band(axes: _check.Axes, lengths: Any, alignment: str, left: int | None, right: int | None) -> Mask | None:
    """i + offset − left < j ≤ i + offset + right, with the offset of each sequence where there are lengths"""
    left, right = _check_bound("diagonal_band_left_bound", left), _check_bound("diagonal_band_right_bound", right)
    if right is not None and right < 0:
        raise ValueError(f"diagonal_band_right_bound must be at least 0, or None for no bound, got {right}")
    if left is not None and right is not None and left + right < 1:
        raise ValueError(f"diagonal_band_left_bound must be above {-right}, else no key is allowed, got {left}")
    ends = (axes["S_q"], axes["S_kv"]) if lengths is None else lengths
    offset = 0 if alignment == "top_left" else ends[1] - ends[0]
    if right is not None:
        return masks.window(None if left is None else left + right - 1, 0, offset + right)
    return None if left is None else masks.window(0, None, offset - left + 1)


def _within(axes: _check.Axes, lengths: Any, band: Mask | None) -> Mask | None:
    """The band within the lengths; queries beyond them are fully masked."""
    if lengths is None:
        return band
    n_q, n_kv = lengths
    rows = np.arange(axes["S_q"])[:, None] < n_q[:, None, None, None]
    return masks.intersection(masks.lengths(n_kv), rows, band)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_inputs(q: Array, k: Array, v: Array, bias: Array, sink_token: Array) -> _check.Axes:
    _check.one_dtype([("q", q), ("k", k), ("v", v)], optional=[("bias", bias)])
    axes = _check.Axes()
    axes("q", q, "B H_q S_q D_qk")
    axes("k", k, "B H_k S_kv D_qk")
    axes("v", v, "B H_v S_kv D_v")
    for name in "k", "v":
        _check.multiple("q", axes["H_q"], name, axes[f"H_{name}"], f"H_q H_{name}")
    if bias is not None:
        _check_scores(axes, "bias", bias)
    if sink_token is not None:
        _check.one_dtype([("sink_token", sink_token)])
        _check.one_library("sink_token", sink_token, "q", q)
        if sink_token.dtype != q.dtype and not (dtype_name(q) in HALF and dtype_name(sink_token) == "float32"):
            raise TypeError(
                f"sink_token must have dtype {q.dtype} as q has, or be float32 with 16-bit q, got {sink_token.dtype}"
            )
        if tuple(sink_token.shape) != (1, axes["H_q"], 1, 1):
            raise ValueError(
                f"sink_token must be (1, H_q, 1, 1) with H_q={axes['H_q']} as in q, got {tuple(sink_token.shape)}"
            )
    return axes


def _check_scores(axes: _check.Axes, name: str, x: Array) -> None:
    """Four axes that broadcast to the scores."""
    if x.ndim != 4:
        raise ValueError(f"{name} must have four axes that broadcast to (B, H_q, S_q, S_kv), got {tuple(x.shape)}")
    axes.broadcast(name, tuple(x.shape), "B H_q S_q S_kv")


def _check_lengths(axes: _check.Axes, use: bool, n_q: Any, n_kv: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Both lengths as (B,), or None without a padding mask."""
    _check.flag("use_padding_mask", use)
    given = {"seq_len_q": n_q, "seq_len_kv": n_kv}
    for name, n in given.items():
        if use is (n is None):
            raise ValueError(f"{name} must be given with use_padding_mask, and only then, got {n!r}")
    if not use:
        return None
    return _check_length(axes, "seq_len_q", n_q, "S_q"), _check_length(axes, "seq_len_kv", n_kv, "S_kv")


def _check_length(axes: _check.Axes, name: str, n: Any, letter: str) -> np.ndarray:
    lengths, B = check_integers(name, n, axes[letter]), axes["B"]
    if lengths.shape != (B,):
        raise ValueError(f"{name} must be (B, 1, 1, 1) or (B,) with B={B} as in q, got {lengths.shape}")
    return lengths


def check_integers(name: str, n: Any, most: int = 2**63 - 1) -> np.ndarray:
    """A NumPy array (…,) or (…, 1, 1, 1) of integers within 0 … `most`, as int64 (…,)."""
    checked = _check.integers(name, n, 0, most)
    return checked.reshape(checked.shape[:1]) if checked.shape[1:] == (1, 1, 1) else checked


def _check_bound(name: str, x: Any) -> int | None:
    return None if x is None else _check.integer(name, x, or_else=" or None")


def _check_dropout(axes: _check.Axes, dropout: Any) -> Masked | None:
    """The mask as booleans, True = keep, with the rate whose 1 / (1 − rate) is the scale."""
    if dropout is None:
        return None
    if not isinstance(dropout, tuple) or len(dropout) != 2:
        raise TypeError(
            "dropout must be (mask, scale): only cuDNN can draw the mask of (probability, seed, offset); "
            f"take its rng_dump for the mask, and 1 / (1 − probability) for the scale; got {dropout!r}"
        )
    mask, scale = dropout
    if not is_array(mask):
        raise TypeError(f"dropout[0] must be an array of booleans, or of 0 and 1, got {type(mask).__name__}")
    _check_scores(axes, "dropout[0]", mask)
    if dtype_name(mask) != "bool":
        if not bool(namespace(mask).all((mask == 0) | (mask == 1))):
            raise ValueError("dropout[0] must be booleans, or numbers 0 (drop) and 1 (keep), got others")
        mask = mask != 0
    if (scale := _check.number("dropout[1]", scale)) < 1:
        raise ValueError(f"dropout[1] must be 1 / (1 − p) and so at least 1, got {scale}")
    return masked(mask, 1 - 1 / scale)
