"""Attention of all heads of all samples at once, for arrays of any library: in one block where the scores fit.

Where they do not, `blocks` takes some queries and keys at a time. In one block the mathematics is that of
`funcmha.ops`, in as many products as there are heads, each so small that OpenBLAS takes longer to wake its threads than
to do it alone: with NumPy arrays BLAS is held at one thread.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import ops
from funcmha._arguments import Bias, Options, check_attention
from funcmha._arrays import Array, downcast, half_of_factors, of_heads, own, upcast

from . import blocks
from .plan import Plan
from .tiled.threads import with_single_threaded_blas


class Rest(NamedTuple):
    """What `funcmha.ops.AttentionCache` has beside q, k and v."""

    bias: Bias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    slope: Array  # (..., H, T, S), dc/du of the soft cap, or None
    p: Array  # (..., H, T, S), the weights before dropout
    lse: Array  # (..., H, T)
    keep: Array  # booleans that broadcast to (..., H, T, S), or None
    scale: Array | float  # of every head, or (H, 1, 1)
    softcap: Array | float | None  # of every head, or (H, 1, 1)
    rate: float
    plan: Plan | None  # None for arrays that are no NumPy arrays, so that JAX sees arrays and numbers it may trace

    @property
    def num_keys(self) -> int:
        """S"""
        return int(self.p.shape[-1])

    def with_qkv(self, q: Array, k: Array, v: Array) -> "AttentionCache":
        """The cache with these q, k and v"""
        return AttentionCache(q, k, v, self)

    def heads(self, h: slice) -> "Rest":
        """Of the query heads h, as views"""
        scale, softcap = (a if a is None or isinstance(a, float) else a[h, ...] for a in (self.scale, self.softcap))
        return self._replace(
            bias=None if self.bias is None else self.bias.heads(h),
            sink=None if self.sink is None else self.sink[h],
            slope=of_heads(self.slope, h),
            p=self.p[..., h, :, :],
            lse=self.lse[..., h, :],
            keep=of_heads(self.keep, h),
            scale=scale,
            softcap=softcap,
        )


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at fully masked queries
    k: Array  # (..., K, S, D), 0 at unattended keys
    v: Array  # (..., K, S, E), 0 at unattended keys
    rest: Rest

    @property
    def of_ops(self) -> ops.AttentionCache:
        """The specification's cache, which has the same arrays"""
        return ops.AttentionCache(*self[:3], *self.rest[:-1])


@with_single_threaded_blas
def attend(
    q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options, plan: Plan, half: str | None = None
) -> tuple[Array, AttentionCache | blocks.AttentionCache]:
    """`attention`, of arguments that are checked and upcast; o may be the cache's own

    With products of a half type, of which q, k and v have numbers.
    """
    if half is not None or blocks.block_sizes(q, k, plan) != (q.shape[-2], k.shape[-2]):
        return blocks.attend(q, k, v, bias, sink, x, plan, half)
    o, cache = ops.attend(q, k, v, bias, sink, x)
    rest = Rest(*cache[3:], plan if isinstance(cache.q, np.ndarray) else None)
    return o, rest.with_qkv(cache.q, cache.k, cache.v)


def attention(
    q: Array, k: Array, v: Array, bias: Any = None, sink: Array = None, /, *, plan: Plan, **options: Any
) -> tuple[Array, AttentionCache | blocks.AttentionCache]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v     as `funcmha.ops.attention`"""
    bias, x = check_attention(q, k, v, bias, sink, options)
    bias = None if bias is None else bias.map(upcast)
    half = half_of_factors(q) if plan.half_products else None
    o, cache = attend(upcast(q), upcast(k), upcast(v), bias, upcast(sink), x, plan, half)
    o_own = cache.rest.o if isinstance(cache, blocks.AttentionCache) else None
    return own(downcast(o, q.dtype), o_own), cache


@with_single_threaded_blas
def attention_vjp(cache: AttentionCache, do: Array, /, **cotangents: Any) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink     as `funcmha.ops.attention_vjp`"""
    return ops.attention_vjp(cache.of_ops, do, **cotangents)
