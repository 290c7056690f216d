"""`torch.nn.functional.scaled_dot_product_attention` on arrays, with its gradient: torch's arguments and defaults.

    y, cache = scaled_dot_product_attention(query, key, value, attn_mask, is_causal=False, scale=None)
    dquery, dkey, dvalue, dattn_mask = scaled_dot_product_attention_vjp(cache, dy)

Differences from funcmha: the axes before the last two broadcast, a boolean attn_mask and a floating one are one
argument, causal is top-left, and grouped queries need enable_gqa. Differences from PyTorch: dropout takes its mask as
an input, as PyTorch's cannot be drawn again; and on a CPU the default path of PyTorch 2.13 has a wrong gradient where
all scores of a row are the least finite number.

Axes: L queries, S keys, H query heads, K key/value heads, D query/key width, Dv value width; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import (
    Array,
    downcast,
    dtype_name,
    from_host,
    is_array,
    namespace,
    quiet_underflow,
    unbroadcast,
    upcast,
)
from funcmha.dropout import Masked, Seeded, masked
from funcmha.engines import attention, attention_vjp, log_sum_exp
from funcmha.masks import Mask, causal, per_head
from funcmha.ops import per_key_head, per_query_head


class ScaledDotProductAttentionCache(NamedTuple):
    attention: Any  # of an engine, with the inputs broadcast to one batch
    inputs: tuple[Array, ...]  # query, key, value, attn_mask, as given


@quiet_underflow
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array = None,
    /,
    *,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Array, ScaledDotProductAttentionCache]:
    """y = dropout(softmax(scale · query keyᵀ + attn_mask)) value
    query (..., H, L, D)   key (..., K, S, D)   value (..., K, S, Dv)   →   y (..., H, L, Dv)     or without H and K

    attn_mask   boolean, True = attend, or floating, added to the scores: of the dtype of query, or float32; broadcasts
                to the scores. Its gradient is summed to its shape, and None if it is boolean
    dropout_p   with keep. At 1 nothing is kept, whatever keep is
    is_causal   j ≤ i; refused with attn_mask, as in PyTorch
    scale       D ** -0.5 unless given; 0 is zero
    enable_gqa  H may be a multiple of the heads of key, and of those of value

    The axes before L and S broadcast. A fully masked row gives 0 with zero gradients, as in PyTorch 2.13.
    `attention_weights(cache)` and `log_sum_exp(cache)` read the cache.
    """
    batch = _check_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    dropout = kept(dropout_p, per_head(keep) if len(batch) > 1 else keep, query)
    q, k, v = (_spread(upcast(x), batch, enable_gqa) for x in (query, key, value))
    if k.ndim > 2 and k.shape[-3] != v.shape[-3]:  # PyTorch repeats each by itself
        k, v = per_query_head(k, q), per_query_head(v, q)
    mask, bias = _mask_and_bias(attn_mask, is_causal, q)
    o, cache = attention(q, k, v, bias, mask=mask, scale=scale, dropout=dropout)
    return downcast(o, query.dtype), ScaledDotProductAttentionCache(cache, (query, key, value, attn_mask))


@quiet_underflow
def scaled_dot_product_attention_vjp(
    cache: ScaledDotProductAttentionCache, dy: Array, /
) -> tuple[Array, Array, Array, Array]:
    """dquery, dkey, dvalue, dattn_mask: each summed over its broadcast axes"""
    _check.cache(cache, ScaledDotProductAttentionCache, "scaled_dot_product_attention")
    _, _, value, attn_mask = cache.inputs
    lse = log_sum_exp(cache.attention)
    _check.cotangent("dy", dy, (*lse.shape, value.shape[-1]), lse, "... H L Dv")
    *grads, dbias, _ = attention_vjp(cache.attention, upcast(dy))
    dquery, dkey, dvalue = (
        downcast(unbroadcast(per_key_head(dx, x), x.shape), dy.dtype)
        for dx, x in zip(grads, cache.inputs, strict=False)
    )
    return dquery, dkey, dvalue, None if dbias is None else downcast(dbias, attn_mask.dtype)


def _spread(x: Array, batch: tuple[int, ...], enable_gqa: bool) -> Array:
    """x with the axes of `batch`, but its own heads with enable_gqa: a view"""
    own = (*batch[:-1], x.shape[-3]) if enable_gqa else batch
    return x if own == tuple(x.shape[:-2]) else namespace(x).broadcast_to(x, (*own, *x.shape[-2:]))


def _mask_and_bias(attn_mask: Array, is_causal: bool, q: Array) -> tuple[Array | Mask, Array]:
    if is_causal:
        return causal(), None
    if attn_mask is None or dtype_name(attn_mask) == "bool":
        return per_head(attn_mask) if q.ndim > 3 else attn_mask, None
    return None, downcast(attn_mask, q.dtype)


def kept(dropout_p: float, keep: Array | Seeded, like: Array) -> Masked | Seeded | None:
    """funcmha's dropout. At dropout_p = 1, where funcmha would divide by 0, nothing is kept."""
    if (p := _check.number("dropout_p", dropout_p)) < 0 or p > 1:
        raise ValueError(f"dropout_p must be at least 0 and at most 1, got {dropout_p}")
    if p == 1:
        return Masked(from_host(np.zeros((1, 1), dtype=bool), like), 0.0)
    if isinstance(keep, Seeded):
        if p not in (0.0, keep.rate):
            raise ValueError(f"dropout_p must be left out, as keep has rate={keep.rate}, got {dropout_p}")
        return keep
    if (p > 0) != (keep is not None):
        missing, given, got = ("keep", f"dropout_p={p}", None) if keep is None else ("dropout_p", "keep", p)
        raise ValueError(f"{missing} must be given with {given}, as dropout takes its mask as an input, got {got}")
    if keep is None:
        return None
    _check.boolean("keep", keep, "True = keep")
    _check.one_library("keep", keep, "query", like, static=True)
    return masked(keep, p)


def _check_sdpa(
    query: Array, key: Array, value: Array, attn_mask: Array, is_causal: bool, scale: Any, enable_gqa: bool
) -> tuple[int, ...]:
    """The argument checks; the axes of the output before L."""
    _check.flag("is_causal", is_causal)
    _check.flag("enable_gqa", enable_gqa)
    given = {"query": query, "key": key, "value": value}
    _check.one_dtype(given.items())
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    for name, shape in shapes.items():
        if len(shape) < 2 + enable_gqa:
            heads = "heads, " * enable_gqa
            raise ValueError(f"{name} must be (..., {heads}length, width) with {enable_gqa=}, got {shape}")
    if shapes["key"][-1] != shapes["query"][-1]:
        raise ValueError(f"key must be (..., S, D) with D={shapes['query'][-1]} as in query, got {shapes['key']}")
    if shapes["value"][-2] != shapes["key"][-2]:
        raise ValueError(f"value must be (..., S, Dv) with S={shapes['key'][-2]} as in key, got {shapes['value']}")
    batch = _batch(shapes, enable_gqa)
    if scale is not None:
        _check.number("scale", scale)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, is_causal, query, (*batch, shapes["query"][-2], shapes["key"][-2]))
    return batch


def _batch(shapes: dict[str, tuple[int, ...]], enable_gqa: bool) -> tuple[int, ...]:
    """The broadcast axes before L and S. With enable_gqa the output has the heads of query."""
    free = 2 + enable_gqa
    try:
        batch = np.broadcast_shapes(*(shape[:-free] for shape in shapes.values()))
    except ValueError:
        raise ValueError(
            f"query, key and value must broadcast in all axes before their last {free}, got "
            f"{', '.join(map(str, shapes.values()))}" + ": fewer heads require enable_gqa=True" * (not enable_gqa)
        ) from None
    if not enable_gqa:
        return batch
    for name in ("key", "value"):
        _check.multiple("query", shapes["query"][-3], name, shapes[name][-3])
    return *batch, shapes["query"][-3]


def _check_attn_mask(attn_mask: Any, is_causal: bool, query: Array, scores: tuple[int, ...]) -> None:
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal=True, which is a mask itself, got both: leave out one")
    if not is_array(attn_mask):
        raise TypeError(f"attn_mask must be an array, got {type(attn_mask).__name__}")
    _check.native_order("attn_mask", attn_mask)
    _check.one_library("attn_mask", attn_mask, "query", query, static=dtype_name(attn_mask) == "bool")
    if dtype_name(attn_mask) not in ("bool", "float32", dtype_name(query)):
        wanted = f"of dtype {query.dtype} as query has{'' if dtype_name(query) == 'float32' else ', or float32'}"
        raise TypeError(
            f"attn_mask must be boolean, True = attend, or {wanted}, added to the scores, got dtype {attn_mask.dtype}"
        )
    axes = _check.Axes()
    axes.size |= {"...": scores[:-2], "L": scores[-2], "S": scores[-1]}
    axes.broadcast("attn_mask", tuple(attn_mask.shape), "... L S")
