"""ONNX's operator `Attention`, of opsets 23, 24 and 25: its inputs, outputs and attributes by their names.

    (Y, present_key, present_value, qk), cache = attention(Q, K, V, attn_mask, past_key, past_value, is_causal=1)
    dQ, dK, dV, dattn_mask, dpast_key, dpast_value = attention_vjp(cache, (dY, dpresent_key, None, None))

Differences from funcmha. Q, K, V and Y are (B, H, T, D), or (B, T, H·D) with the numbers of heads as attributes. All
four outputs are returned, the last, which takes T × S, unless `qk_matmul_output_mode=None`; past and present are always
(B, K, S, D). No window is −1 and no softcap 0, not None. A boolean attn_mask is True = attend, as here; a floating one
is added. It is read from the right, (H, T, S) and not (B, T, S), and where its last axis is shorter than the keys, the
other keys are forbidden: from opset 24 on an axis of 1 is short too, and not broadcast. Query i is at key position i,
after a past of P keys at P + i, and in a cache with `nonpad_kv_seqlen` n at n − T + i, for each sample.

ONNX rounds float16 and bfloat16 at every step, and softmax_precision adds casts before and after the softmax; here all
is computed in the wider of the two, float32 at least, and rounded once. The schema allows another dtype for V than for
Q and K, but the operator's definition cannot multiply the two; here it is refused.

The package onnx is not imported, nor any runtime.

Axes: B batch, H query heads, K key/value heads, T queries, L new keys, P past keys, S = P + L keys, D and E widths.
"""

from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from funcmha import _check, engines, masks
from funcmha._arrays import (
    Array,
    downcast,
    dtype_name,
    full,
    heads_first,
    heads_last,
    is_array,
    namespace,
    outline,
    upcast,
)
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.kv_cache import AppendCache, KVCache, append, append_vjp
from funcmha.masks import Mask
from funcmha.ops import ScoresCache, scores, scores_vjp

__all__ = ["Weights", "attention", "attention_vjp"]

OPSETS = (23, 24, 25)
PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # onnx.TensorProto.DataType
BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64, "complex128": 64}


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


class Weights(NamedTuple):
    """The cache of a qk_matmul_output after the softmax: empty, as that of attention has everything."""


class AttentionCache(NamedTuple):
    Q: Array  # as given: outputs and gradients have its layout and dtype
    attn_mask: Array  # as given, or None
    append: AppendCache | None  # of K and V to the past
    keys: Array  # (B, K, S, D, 0): only the shape, and the dtype that is computed in
    values: Array  # (B, K, S, E, 0)
    attention: Any  # of funcmha.engines.attention
    qk_matmul_output: ScoresCache | Weights | None  # None where there is no such output


def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array = None,
    past_key: Array = None,
    past_value: Array = None,
    /,
    *,
    nonpad_kv_seqlen: np.ndarray | None = None,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    softmax_precision: int | None = None,
    qk_matmul_output_mode: int | None = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    opset: int = 25,
) -> tuple[tuple[Array, Array, Array, Array], AttentionCache]:
    """Y = softmax(softcap · tanh(scale · Q present_keyᵀ / softcap) + attn_mask) present_value
    Q (B, H, T, D)   K (B, K, L, D)   V (B, K, L, E)   past_key (B, K, P, D)   past_value (B, K, P, E)
      →   Y (B, H, T, E)   present_key (B, K, S, D)   present_value (B, K, S, E)   qk_matmul_output (B, H, T, S)
    or Q (B, T, H·D)   K (B, L, K·D)   V (B, L, K·E)   →   Y (B, T, H·E) and the rest as before

    attn_mask           boolean or floating, broadcasts to (B, H, T, S); from opset 24 on its last axis may be shorter
    nonpad_kv_seqlen    integers (B,), the number of valid keys of each sample, where K and V are the whole cache
    softmax_precision   a dtype by its number: 1 float32, 10 float16, 11 float64, 16 bfloat16, no smaller than Q's
    qk_matmul_output_mode    0: scale · Q present_keyᵀ, 1: after the softcap, 2: after the mask, 3: after the softmax,
                        None: no such output, None
    left_window_size, right_window_size    inclusive, −1 for no bound; from opset 25 on
    opset               the version of the operator; 25 serves all later opsets until the operator changes

    A fully masked row has Y = 0 and weights 0. The present grows in place, see `funcmha.kv_cache`, if it is the past of
    the next call; without a past it is K and V. Raises TypeError and ValueError for what the operator of this opset
    does not support, before any arithmetic.
    https://onnx.ai/onnx/operators/onnx__Attention.html
    """
    check_opset(opset, nonpad_kv_seqlen, left_window_size, right_window_size)
    check_attributes(is_causal, scale, softcap, qk_matmul_output_mode)
    q, k, v = check_layout(Q, K, V, q_num_heads, kv_num_heads)
    check_inputs(q, k, v, attn_mask, past_key, past_value, nonpad_kv_seqlen, opset)
    check_precision(softmax_precision, Q)

    keys, values, appended = _present(past_key, past_value, k, v)
    valid = None if nonpad_kv_seqlen is None else nonpad_kv_seqlen.astype(np.int64)  # unsigned n − T would wrap around
    offset = keys.shape[-2] - k.shape[-2] if valid is None else valid - q.shape[-2]
    structured = _structured(is_causal, left_window_size, right_window_size, offset, valid)
    mask, bias = _mask_and_bias(attn_mask, structured, keys.shape[-2], opset)
    q, k, v, bias = (_computed(x, softmax_precision) for x in (q, keys, values, bias))
    shapes = outline(k), outline(v)
    options: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": None if softcap == 0 else softcap}
    o, heads = engines.attention(q, k, v, bias, **options)
    qk, output = _qk_matmul_output(qk_matmul_output_mode, heads, (q, k, bias), **options)

    Y, qk = downcast(_as_given(o, Q), Q.dtype), downcast(qk, Q.dtype)
    return (Y, keys, values, qk), AttentionCache(Q, attn_mask, appended, *shapes, heads, output)


def attention_vjp(cache: AttentionCache, dy: tuple[Array, Array, Array, Array], /) -> tuple[Array, ...]:
    """dQ, dK, dV, dattn_mask, dpast_key, dpast_value: `attention` from the bottom up
    from the cotangents of Y, present_key, present_value and qk_matmul_output, each of which may be None, for 0

    A boolean attn_mask has the gradient None. A score of −∞ in mode 2 is a constant: its cotangent has no effect.
    """
    _check.cache(cache, AttentionCache, "attention of ONNX")
    Q, attn_mask, appended, _, _, heads, output = cache
    do, dkeys, dvalues, dqk = _cotangents(cache, dy)

    dq, dk, dv, dbias, _ = engines.attention_vjp(heads, do, dweights=dqk if isinstance(output, Weights) else None)
    if isinstance(output, ScoresCache) and dqk is not None:
        dq_output, dk_output, dbias_output = scores_vjp(output, dqk)
        dq, dk = dq + dq_output, dk + dk_output
        dbias = dbias if dbias_output is None else dbias + dbias_output
    dk, dv = dk if dkeys is None else dk + dkeys, dv if dvalues is None else dv + dvalues

    dq, dk, dv, dbias = (downcast(dx, Q.dtype) for dx in (dq, dk, dv, dbias))
    dpast = KVCache(None, None, None)  # type: ignore[arg-type]
    if appended is not None:
        dpast, dk, dv = append_vjp(appended, (dk, dv))
    dmask = None if dbias is None else dbias[..., : attn_mask.shape[-1]]
    return _as_given(dq, Q), _as_given(dk, Q), _as_given(dv, Q), dmask, dpast.keys, dpast.values


def _qk_matmul_output(
    mode: int | None, heads: Any, inputs: tuple[Array, ...], *, mask: Any, scale: Any, softcap: Any
) -> tuple[Array, ScoresCache | Weights | None]:
    """The fourth output (B, H, T, S), and its own cache"""
    q, k, bias = inputs
    if mode is None:
        return None, None
    if mode == 0:
        return scores(q, k, scale=scale)
    if mode == 1:
        return scores(q, k, scale=scale, softcap=softcap)
    if mode == 2:
        return scores(q, k, bias, mask=mask, scale=scale, softcap=softcap)
    return attention_weights(heads), Weights()


# ── layout, past and precision ───────────────────────────────────────────────────────────────────────────────────


def _split(x: Array, heads: int) -> Array:
    """(B, T, H·D)   →   (B, H, T, D)"""
    B, T, C = x.shape
    return heads_first(namespace(x).reshape(x, (B, T, heads, C // heads)))


def _as_given(x: Array, Q: Array) -> Array:
    """(B, H, T, D)   →   (B, T, H·D) where Q is; also for gradients"""
    if Q.ndim == 4:
        return x
    B, H, T, D = x.shape
    return namespace(x).reshape(heads_last(x), (B, T, H * D))


def _present(past_key: Array, past_value: Array, k: Array, v: Array) -> tuple[Array, Array, AppendCache | None]:
    """[past_key; k]   [past_value; v]"""
    if past_key is None:
        return k, v, None
    present, cache = append(KVCache(past_key, past_value, past_key.shape[-2]), k, v)
    return present.keys, present.values, cache


def _computed(x: Array, softmax_precision: int | None) -> Array:
    """`x` in the dtype to compute in: float64 if softmax_precision is, else as everywhere"""
    if x is None or PRECISIONS.get(softmax_precision or 0) != "float64":
        return upcast(x)
    return x if dtype_name(x) == "complex128" else downcast(x, namespace(x).float64)


def _cotangents(cache: AttentionCache, dy: Any) -> list[Array]:
    """With an axis of heads and in the engine's dtype; that of Y is 0 where it is None."""
    dy = _check.parts("dy", dy, "dY, dpresent_key, dpresent_value, dqk_matmul_output")
    Q, keys, values = cache.Q, cache.keys.shape[:-1], cache.values.shape[:-1]
    (B, H, T), E = log_sum_exp(cache.attention).shape, values[-1]
    o = B, H, T, E
    Y, symbols = (o, "B H T E") if Q.ndim == 4 else ((B, T, H * E), "B T H·E")
    _check.cotangent("dY", dy[0], Y, Q, symbols, optional=True)
    _check.cotangent("dpresent_key", dy[1], keys, Q, "B K S D", optional=True)
    _check.cotangent("dpresent_value", dy[2], values, Q, "B K S E", optional=True)
    _check.cotangent("dqk_matmul_output", dy[3], (B, H, T, keys[-2]), Q, "B H T S", optional=True)
    if dy[3] is not None and cache.qk_matmul_output is None:
        raise ValueError("dqk_matmul_output must be None, as qk_matmul_output is, got an array")
    dY, *others = (downcast(d, cache.keys.dtype) for d in dy)
    do = full(o, 0.0, cache.keys) if dY is None else dY if Q.ndim == 4 else _split(dY, H)
    return [do, *others]


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _structured(is_causal: int, left: int, right: int, offset: int | np.ndarray, n: Any) -> Mask | None:
    """Causal and the window as one band, within the n valid keys."""
    bounds = (None if left == -1 else left), (0 if is_causal else None if right == -1 else right)
    band = None if bounds == (None, None) else masks.window(*bounds, offset)
    return masks.intersection(band, None if n is None else masks.lengths(n))


def _mask_and_bias(attn_mask: Array, mask: Mask | None, S: int, opset: int) -> tuple[Mask | None, Array]:
    """The mask with a boolean attn_mask, and a floating one as bias; a short one forbids the keys after it."""
    n = S if attn_mask is None or opset == 23 else attn_mask.shape[-1]
    if n < S:
        rest = full((*attn_mask.shape[:-1], S - n), 0, attn_mask)
        attn_mask = namespace(attn_mask).concat([attn_mask, rest], axis=-1)
        mask = masks.intersection(mask, masks.lengths(n))
    if attn_mask is not None and dtype_name(attn_mask) == "bool":
        return masks.intersection(mask, masks.per_head(attn_mask)), None
    return mask, attn_mask


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def check_opset(opset: int, nonpad_kv_seqlen: Any, left: int, right: int) -> None:
    """No argument of a later opset."""
    _check_one_of("opset", opset, OPSETS, "25 serves all later ones until the operator changes")
    if nonpad_kv_seqlen is not None and opset < 24:
        raise ValueError(f"nonpad_kv_seqlen must be left out before opset 24, got it with opset={opset}")
    for name, size in (("left_window_size", left), ("right_window_size", right)):
        if _check.integer(name, size, -1, or_else=", where -1 is no bound") != -1 and opset < 25:
            raise ValueError(f"{name} must be left out before opset 25, got {size} with opset={opset}")


def check_attributes(is_causal: Any, scale: Any, softcap: Any, mode: Any) -> None:
    """The attributes that are numbers."""
    _check_one_of("is_causal", is_causal, (0, 1), "1 for a causal mask")
    _check_one_of("qk_matmul_output_mode", mode, (0, 1, 2, 3, None), "None for no such output")
    if scale is not None and _check.number("scale", scale) < 0:
        raise ValueError(f"scale must be at least 0, as ONNX multiplies Q and K by its square root, got {scale}")
    if _check.number("softcap", softcap) < 0:
        raise ValueError(f"softcap must be above 0, or 0 for none, got {softcap}")


def check_layout(Q: Array, K: Array, V: Array, H: Any, G: Any) -> list[Array]:
    """Q, K and V with an axis of heads, (B, H, T, D): split off the last where there are three."""
    _check.one_dtype([("Q", Q), ("K", K), ("V", V)])
    if Q.ndim not in (3, 4):
        raise ValueError(f"Q must be (B, H, T, D) or (B, T, H·D), got {tuple(Q.shape)}")
    for name, x in (("K", K), ("V", V)):
        if x.ndim != Q.ndim:
            raise ValueError(f"{name} must have {Q.ndim} axes as Q has, got {tuple(x.shape)}")
    for name, n in (("q_num_heads", H), ("kv_num_heads", G)):
        if Q.ndim == 4 and n is not None:
            raise ValueError(f"{name} must be left out where Q is (B, H, T, D), as that has them, got {n!r}")
    if Q.ndim == 4:
        return [Q, K, V]
    return [
        _with_heads("Q", Q, "q_num_heads", H),
        _with_heads("K", K, "kv_num_heads", G),
        _with_heads("V", V, "kv_num_heads", G),
    ]


def _with_heads(name: str, x: Array, heads: str, n: Any) -> Array:
    n = _check.integer(heads, n, 1, or_else=" where Q is (B, T, H·D)")
    if x.shape[-1] % n:
        raise ValueError(f"{name} must have a last axis that {heads}={n} divides, got {tuple(x.shape)}")
    return _split(x, n)


def check_inputs(
    q: Array, k: Array, v: Array, attn_mask: Any, past_key: Any, past_value: Any, nonpad: Any, opset: int
) -> None:
    """Shapes and dtypes, with an axis of heads."""
    axes = _check.Axes()
    axes("Q", q, "B H T D")
    axes("K", k, "B K L D")
    axes("V", v, "B K L E")
    _check.multiple("Q", axes["H"], "K", axes["K"])
    if (past_key is None) != (past_value is None):
        raise ValueError(
            f"past_key and past_value must come together, got no {'past_key' if past_key is None else 'past_value'}"
        )
    if past_key is not None:
        _check.one_dtype([("Q", q), ("past_key", past_key), ("past_value", past_value)])
        axes("past_key", past_key, "B K P D")
        axes("past_value", past_value, "B K P E")
    axes.size["S"] = axes["L"] + axes.size.get("P", 0)
    check_attn_mask(axes, attn_mask, q, opset)
    if nonpad is not None:
        check_nonpad(axes, nonpad, attn_mask, past_key)


def check_attn_mask(axes: _check.Axes, attn_mask: Any, q: Array, opset: int) -> None:
    """Boolean or of the dtype of Q; from opset 24 on, its last axis may be shorter, and is not broadcast."""
    if attn_mask is None:
        return
    if not is_array(attn_mask):
        raise TypeError(f"attn_mask must be an array, got {type(attn_mask).__name__}")
    _check.native_order("attn_mask", attn_mask)
    _check.one_library("attn_mask", attn_mask, "Q", q, static=dtype_name(attn_mask) == "bool")
    if dtype_name(attn_mask) != "bool" and attn_mask.dtype != q.dtype:
        wanted = f"boolean, True = attend, or of dtype {q.dtype} as Q has, added to the scores"
        raise TypeError(f"attn_mask must be {wanted}, got dtype {attn_mask.dtype}")
    if attn_mask.ndim == 0:
        raise ValueError("attn_mask must have an axis of keys, got ()")
    shape = tuple(attn_mask.shape)
    if opset > 23 and shape[-1] <= axes["S"]:
        shape = (*shape[:-1], axes["S"])
    axes.broadcast("attn_mask", shape, "B H T S")


def check_nonpad(axes: _check.Axes, nonpad: Any, attn_mask: Any, past_key: Any) -> None:
    """The number of valid keys in K and V."""
    if past_key is not None:
        raise ValueError("nonpad_kv_seqlen must be left out with past_key: K and V are the whole cache or the new keys")
    _check.integers("nonpad_kv_seqlen", nonpad)
    axes("nonpad_kv_seqlen", nonpad, "B")
    most = axes["S"] if attn_mask is None else min(axes["S"], attn_mask.shape[-1])
    if np.any((nonpad < 0) | (nonpad > most)):
        owner = "K" if most == axes["S"] else "attn_mask"
        raise ValueError(f"nonpad_kv_seqlen must be from 0 to the {most} keys of {owner}, got {nonpad}")


def check_precision(softmax_precision: Any, Q: Array) -> None:
    """No precision below that of the inputs: funcmha never rounds below it."""
    if softmax_precision is None:
        return
    _check_one_of("softmax_precision", softmax_precision, tuple(PRECISIONS), "as in onnx.TensorProto.DataType")
    name = PRECISIONS[softmax_precision]
    if BITS[name] < BITS[dtype_name(Q)]:
        raise ValueError(f"softmax_precision must not have fewer bits than {Q.dtype} as Q has, got {name}")


def _check_one_of(name: str, x: Any, allowed: tuple[Any, ...], why: str) -> None:
    if not (x is None or isinstance(x, Integral)) or x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))} ({why}), got {x!r}")
