"""Statistics and surgery of heads: norms, largest scores, pruning, merging. Trees in, trees out.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from . import _check, tree
from ._arguments import check_mask
from ._arrays import Array, full, namespace
from .engines import heads
from .masks import Mask
from .ops import AttentionCache
from .params import SPEC, Params, sizes

__all__ = ["head_norms", "max_logit", "merge_kv_heads", "prune_heads"]

INF = float("inf")
ROWS = 512  # queries whose scores are held at once


def head_norms(params: Params, /) -> dict[str, Array]:
    """‖w‖ of each head: q_proj (H,)   k_proj (K,)   v_proj (K,)   out_proj (H,)     Frobenius, without the biases

    Used by magnitude pruning and weight clipping. Raises what `sizes` raises.
    """
    sizes(params)
    norms = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        w = params[name]["w"]
        others = tuple(i for i, axis in enumerate(SPEC[f"{name}.w"].split()) if axis not in "HK")
        norms[name] = namespace(w).sqrt(namespace(w).sum(w * w, axis=others))
    return norms


def max_logit(cache: Any, /, *, mask: Array | Mask = None) -> Array:
    """max over i, j of scale · qᵢ · kⱼ        from the cache of `mha` or `self_attention`   →   (..., H)

    Before soft cap and bias: QK-clip bounds it (Kimi K2 2025, section 2.1). Over all keys, or over those that `mask`,
    as given to `mha`, allows; −∞ where there are none. Holds the scores of 512 queries of one head at a time.
    """
    allowed, parts = None, []
    for h, one in enumerate(heads(cache)):
        q, k = one.attention.q[..., 0, :, :], one.attention.k[..., 0, :, :]
        if h == 0:
            allowed = _allowed(cache, mask, q, k)
        own = None if allowed is None else allowed.heads(h, h + 1)
        parts.append(_largest(q, k, own, _scale(one.attention)))
    return namespace(parts[0]).stack(parts, axis=-1)


def _allowed(cache: Any, mask: Any, q: Array, k: Array) -> Mask | None:
    """The mask, which must broadcast to the scores"""
    params = getattr(cache, "mha", cache).params
    axes, H = _check.Axes(), params["q_proj"]["w"].shape[0]
    axes.first = "params", q
    axes.size |= {"...": tuple(q.shape[:-2]), "H": H, "T": q.shape[-2], "S": k.shape[-2]}
    return check_mask(axes, mask, "... H T S")


def _largest(q: Array, k: Array, mask: Mask | None, scale: Any) -> Array:
    """max scale · q kᵀ of one head     q (..., T, D)   k (..., S, D)   →   (...)"""
    xp, (T, S), top = namespace(q), (q.shape[-2], k.shape[-2]), full(q.shape[:-2], -INF, q)
    for start in range(0, T if S else 0, ROWS):
        rows = (start, min(start + ROWS, T))
        u = scale * (q[..., rows[0] : rows[1], :] @ xp.matrix_transpose(k))
        if mask is not None:
            allowed = mask.tile(rows, (0, S), q)
            u = xp.where(allowed[..., 0, :, :] if allowed.ndim > 2 else allowed, u, -INF)
        top = xp.maximum(top, xp.max(u, axis=(-2, -1)))
    return top


def _scale(cache: Any) -> Any:
    """Of an attention of one head: a number"""
    scale = cache.scale if isinstance(cache, AttentionCache) else cache.rest.scale
    return scale if isinstance(scale, float) else scale.reshape(-1)[0]


def prune_heads(params: Params, /, keep: Sequence[int]) -> Params:
    """The tree with only the query heads `keep`, in this order, as copies     H → len(keep)

    A key/value head is dropped with the last of its query heads. Those that stay must all keep the same number of query
    heads, and these next to each other, so that h // (H // K) still maps them; else ValueError. IndexError for a head
    that does not exist.
    """
    H, K, *_ = sizes(params)
    heads = _numbers(keep)
    if not heads or len(set(heads)) != len(heads):
        raise ValueError(f"keep must name heads, each once, got {list(keep)}")
    if not all(0 <= h < H for h in heads):
        raise IndexError(f"keep must be in 0 … {H - 1}, as q_proj.w has H={H} heads, got {list(keep)}")
    groups = [h // (H // K) for h in heads]
    kv = list(dict.fromkeys(groups))
    if groups != [g for g in kv for _ in range(len(heads) // len(kv))]:
        raise ValueError(f"keep must leave each key/value head as many query heads, side by side, got {list(keep)}")
    kept, taken = {"H": heads, "K": kv}, {}
    for leaf, a in tree.flatten(params).items():
        for axis, letter in enumerate(SPEC[leaf].split()):
            if letter in kept:
                each = [a[(slice(None),) * axis + (slice(h, h + 1),)] for h in kept[letter]]
                a = namespace(a).concat(each, axis=axis)
        taken[leaf] = a
    return tree.unflatten(taken)


def merge_kv_heads(params: Params, /, num_kv_heads: int) -> Params:
    """The tree with the mean of each K / num_kv_heads neighbouring key/value heads in their place

    Ainslie et al. 2023, section 2.1, convert multi-head to grouped-query attention in this way. Raises ValueError
    unless num_kv_heads divides K.
    """
    K, num_kv_heads = sizes(params).K, _check.integer("num_kv_heads", num_kv_heads, 1)
    if K % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide K={K} as in k_proj.w, got {num_kv_heads}")
    merged = {}
    for leaf, a in tree.flatten(params).items():
        if SPEC[leaf].startswith("K"):
            groups = namespace(a).reshape(a, (num_kv_heads, K // num_kv_heads, *a.shape[1:]))
            a = namespace(a).mean(groups, axis=1)
        merged[leaf] = a
    return tree.unflatten(merged)


def _numbers(keep: Any) -> list[int]:
    """`keep` as a list of ints. Booleans and fractions are refused, though Python would take them for indices."""
    heads: list[Any] = list(keep) if isinstance(keep, Iterable) else [None]
    if not all(isinstance(h, Integral) and not isinstance(h, bool) for h in heads):
        raise TypeError(f"keep must be a sequence of ints, the numbers of heads, got {keep!r}")
    return [int(h) for h in heads]
