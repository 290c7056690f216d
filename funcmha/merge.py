"""Attention over disjoint sets of keys, merged: the building block of ring attention and split-key decoding.

    o1, c1 = attention(q, k[..., :s, :], v[..., :s, :])
    o2, c2 = attention(q, k[..., s:, :], v[..., s:, :])
    o, cache = merge(o1, log_sum_exp(c1), o2, log_sum_exp(c2))      # as attention over all keys
    lse = log_sum_exp(cache)

Axes: T queries, E value width; `...` is batch, heads included.
"""

from typing import NamedTuple

from . import _check
from ._arrays import HALF, Array, downcast, dtype_name, namespace, quiet_underflow, upcast
from .engines import log_sum_exp

__all__ = ["merge", "merge_vjp"]

INF = float("inf")


class MergeCache(NamedTuple):
    o1: Array  # (..., T, E)
    o2: Array  # (..., T, E)
    w1: Array  # (..., T), the share of the first part: 0 where it is fully masked
    w2: Array  # (..., T)
    lse: Array  # (..., T)


@quiet_underflow
def merge(o1: Array, lse1: Array, o2: Array, lse2: Array, /) -> tuple[Array, MergeCache]:
    """o = (e^lse1 o1 + e^lse2 o2) / (e^lse1 + e^lse2)      o1, o2 (..., T, E)   lse1, lse2 (..., T)   →   o (..., T, E)

    With o and lse of attention over two disjoint sets of keys, o is that of attention over both, and so is
    lse = log(e^lse1 + e^lse2), which `log_sum_exp(cache)` reads. Parts may be merged in any order: the op is
    commutative, and associative to rounding.

    A part with lse = −∞ is fully masked and has no effect, even if its o is NaN; two of them give o = 0 and lse = −∞.
    No finite scores have lse = +∞: like NaN it makes o and lse of the row NaN. (flash-attention marks a fully masked
    row with +∞: write −∞ there first.) lse is that of `log_sum_exp`, float32 where o is float16 or bfloat16.

    Raises TypeError for mixed dtypes, ValueError for shapes that do not fit.
    Milakov and Gimelshein 2018, section 3.1.
    """
    check_merge(o1, lse1, o2, lse2)
    dtype, xp = o1.dtype, namespace(lse1)
    o1, o2 = upcast(o1), upcast(o2)
    top = xp.maximum(lse1, lse2)
    top = xp.where(top == -INF, 0.0, top)
    e1, e2 = xp.exp(lse1 - top), xp.exp(lse2 - top)  # the larger is 1, so that e1 + e2 = 1 + e1 e2
    row_sum = e1 + e2
    lse = xp.where(row_sum == 0, -INF, top + xp.log1p(e1 * e2))
    row_sum = xp.where(row_sum == 0, 1.0, row_sum)
    w1, w2 = e1 / row_sum, e2 / row_sum
    o = _share(w1, o1, lse1 == -INF) + _share(w2, o2, lse2 == -INF)
    return downcast(o, dtype), MergeCache(o1, o2, w1, w2, lse)


@quiet_underflow
def merge_vjp(cache: MergeCache, do: Array, /, *, dlse: Array = None) -> tuple[Array, Array, Array, Array]:
    """do1, dlse1, do2, dlse2
    from the cotangents of o (..., T, E) and, where given, of lse (..., T)

    The gradients of o1 and o2 have the dtype of `do`, those of lse1 and lse2 the dtype of lse. They are the cotangents
    of the parts: `attention_vjp(c1, do1, dlse=dlse1)`. Where a part has no share its gradients are 0, whatever do and
    dlse.
    """
    o1, o2, w1, w2, lse = _check.cache(cache, MergeCache, "merge")
    _check.cotangent("do", do, o1.shape, o1, "... T E")
    _check.cotangent("dlse", dlse, lse.shape, lse, "... T", optional=True)
    xp, g, dlse = namespace(lse), upcast(do), upcast(dlse)
    # ⟨do, o1⟩ − ⟨do, o⟩ = w2 ⟨do, o1 − o2⟩, as w1 + w2 = 1: nothing cancels where one part has almost all
    moved = xp.where(w1 * w2 == 0, 0.0, w1 * w2 * xp.sum(g * (o1 - o2), axis=-1))
    dlse1 = moved if dlse is None else moved + xp.where(w1 == 0, 0.0, w1 * dlse)
    dlse2 = -moved if dlse is None else xp.where(w2 == 0, 0.0, w2 * dlse) - moved
    do1, do2 = _share(w1, g, w1 == 0), _share(w2, g, w2 == 0)
    return downcast(do1, do.dtype), dlse1, downcast(do2, do.dtype), dlse2


@log_sum_exp.register
def _(cache: MergeCache, /) -> Array:
    return cache.lse


def check_merge(o1: Array, lse1: Array, o2: Array, lse2: Array) -> None:
    """The arguments of `merge`."""
    axes = _check.arrays(("o1", o1, "... T E"), ("o2", o2, "... T E"))
    _check.one_dtype([("lse1", lse1), ("lse2", lse2)])
    _check.one_library("lse1", lse1, "o1", o1)
    computed = "float32" if dtype_name(o1) in HALF else dtype_name(o1)
    if dtype_name(lse1) != computed:
        raise TypeError(f"lse1 must have dtype {computed}, in which o1 of {o1.dtype} is computed, got {lse1.dtype}")
    axes("lse1", lse1, "... T")
    axes("lse2", lse2, "... T")


def _share(w: Array, x: Array, absent: Array) -> Array:
    """w (..., T) · x (..., T, E), and 0 where a row is absent, whatever x is there"""
    return namespace(w).where(absent[..., None], 0.0, w[..., None] * x)
