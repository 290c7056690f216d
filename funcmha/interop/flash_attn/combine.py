"""`flash_attn_combine`: attention over parts of the keys, joined by `funcmha.merge`, part after part.

Axes: Z parts, B batch, T queries, N queries of all sequences, H query heads, E value width; `...` is B T, or N.
"""

from typing import NamedTuple

from funcmha import _check
from funcmha._arrays import Array, downcast, full, namespace, or_zeros, outline, upcast
from funcmha.engines import log_sum_exp
from funcmha.merge import MergeCache, merge, merge_vjp
from funcmha.ops import INF


class FlashAttnCombineCache(NamedTuple):
    out_partial: Array  # (Z, ..., H, E, 0): only the shape
    merges: tuple[MergeCache, ...]  # Z


def flash_attn_combine(out_partial: Array, lse_partial: Array, /) -> tuple[tuple[Array, Array], FlashAttnCombineCache]:
    """(out, lse) = (Σ exp(lse_partial − lse) out_partial, log Σ exp(lse_partial)), sums over parts
    out_partial (Z, B, T, H, E) or (Z, N, H, E)   lse_partial (Z, B, T, H) or (Z, N, H)
      →   out (B, T, H, E) or (N, H, E)   lse (B, T, H) or (N, H)

    lse has heads last, as in the original; its kernels return it with tokens last. A part with lse −∞ is empty and has
    no effect; where all are, out is 0 and lse −∞. For half types out is rounded once, at the end, and lse is float32.
    FA3's and FA4's, where it has no gradient.
    """
    _check_parts(out_partial, lse_partial)
    like = upcast(out_partial[:1, ..., :0])
    out, lse, merges = full(out_partial.shape[1:], 0.0, like), full(lse_partial.shape[1:], -INF, like), []
    for z in range(out_partial.shape[0]):
        out, cache = merge(out, lse, upcast(out_partial[z, ...]), lse_partial[z, ...])
        lse = log_sum_exp(cache)
        merges.append(cache)
    return (downcast(out, out_partial.dtype), lse), FlashAttnCombineCache(upcast(outline(out_partial)), tuple(merges))


def flash_attn_combine_vjp(cache: FlashAttnCombineCache, dy: tuple[Array, Array], /) -> tuple[Array, Array]:
    """dout_partial, dlse_partial: the last part first, from the cotangents of out and lse, of which None is 0"""
    _check.cache(cache, FlashAttnCombineCache, "flash_attn_combine")
    like, merges = cache
    (_, *shape, _), letters = like.shape, "N H" if like.ndim == 5 else "B T H"
    dout, dlse = _check.parts("dy", dy, "dout, dlse")
    _check.cotangent("dout", dout, tuple(shape), like, f"{letters} E", optional=True)
    _check.cotangent("dlse", dlse, tuple(shape[:-1]), like, letters, optional=True)

    dtype, grads = like.dtype if dout is None else dout.dtype, []
    dout, dlse = or_zeros(dout, tuple(shape), like), or_zeros(dlse, tuple(shape[:-1]), like)
    for part in reversed(merges):
        dout, dlse, *of_part = merge_vjp(part, dout, dlse=dlse)
        grads.append(of_part)
    dout_partial, dlse_partial = (namespace(like).stack(parts[::-1]) for parts in zip(*grads, strict=True))
    return downcast(dout_partial, dtype), dlse_partial


def _check_parts(out_partial: Array, lse_partial: Array) -> None:
    _check.one_dtype([("out_partial", out_partial)])
    _check.one_dtype([("lse_partial", lse_partial)])
    _check.one_library("lse_partial", lse_partial, "out_partial", out_partial)
    axes, tokens = _check.Axes(), "N" if out_partial.ndim == 4 else "B T"
    axes("out_partial", out_partial, f"Z {tokens} H E")
    axes("lse_partial", lse_partial, f"Z {tokens} H")
    if axes["Z"] == 0:
        raise ValueError("out_partial must have at least one part, got Z=0")
    wanted = upcast(outline(out_partial)).dtype
    if lse_partial.dtype != wanted:
        raise TypeError(f"lse_partial must have dtype {wanted}, in which out is computed, got {lse_partial.dtype}")
