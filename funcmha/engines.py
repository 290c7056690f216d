"""Engines: the same ops done in different ways, and the choice among them.

An engine is a value: the ops that it does, by the protocol of `funcmha.ops` and with the results of `funcmha.ops`. To
add one, write the four functions, make an `Engine` of them here, and name it in ENGINES for the conformance tests.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from . import ops, tiled
from ._xp import Array, namespace, unbroadcast
from .masks import Mask, dense
from .ops import AttentionCache, attention_weights, log_sum_exp


class Engine(NamedTuple):
    name: str
    linear: Callable[..., Any]
    linear_vjp: Callable[..., Any]
    attention: Callable[..., Any]
    attention_vjp: Callable[..., Any]


# ── the reference, head by head ──────────────────────────────────────────────────────────────────────────────────


class OneByOneCache(NamedTuple):
    k: Array  # (..., K, S, D)
    bias: Array  # broadcasts to (..., H, T, S), or None
    heads: tuple[AttentionCache, ...]  # H


def one_by_one(
    q: Array, k: Array, v: Array, bias: Array = None, /, *, mask: Array | Mask = None, keep: Array = None, **static: Any
) -> tuple[Array, OneByOneCache]:
    """oₕ = attention(qₕ, kₕ, vₕ, biasₕ)
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)
    """
    H, K = q.shape[-3], k.shape[-3]
    mask = dense(mask, q.shape[-2], k.shape[-2], q)
    heads = []
    for h in range(H):
        kv = h // (H // K)
        of_head = (q[..., h, :, :], k[..., kv, :, :], v[..., kv, :, :], _head_of(bias, h))
        heads.append(ops.attention(*of_head, mask=_head_of(mask, h), keep=_head_of(keep, h), **static))
    os, caches = zip(*heads, strict=True)
    return namespace(q).stack(os, axis=-3), OneByOneCache(k, bias, caches)


def one_by_one_vjp(
    cache: OneByOneCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv, dbias: `one_by_one`, where the heads of a group share keys and values, so that their gradients add"""
    k, bias, heads = cache
    xp = namespace(do)
    grads = [
        ops.attention_vjp(
            head,
            do[..., h, :, :],
            dweights=None if dweights is None else dweights[..., h, :, :],
            dlse=None if dlse is None else dlse[..., h, :],
        )
        for h, head in enumerate(heads)
    ]
    dqs, dks, dvs, dbiases = zip(*grads, strict=True)
    dbias = None if bias is None else unbroadcast(xp.stack(dbiases, axis=-3 if bias.ndim >= 3 else 0), bias.shape)
    return xp.stack(dqs, axis=-3), _per_key_head(dks, k.shape[-3]), _per_key_head(dvs, k.shape[-3]), dbias


def _head_of(a: Array, h: int) -> Array:
    """a (..., H or 1, T, S) as head h sees it: (..., T, S). An array without head axis serves every head."""
    if a is None or a.ndim < 3:
        return a
    return a[..., h if a.shape[-3] > 1 else 0, :, :]


def _per_key_head(dxs: tuple[Array, ...], K: int) -> Array:
    """H gradients (..., S, D)   →   (..., K, S, D), summed over each group"""
    group = len(dxs) // K
    sums = [sum(dxs[g * group + 1 : (g + 1) * group], dxs[g * group]) for g in range(K)]
    return namespace(dxs[0]).stack(sums, axis=-3)


@attention_weights.register
def _(cache: OneByOneCache, /) -> Array:
    return namespace(cache.k).stack([head.p for head in cache.heads], axis=-3)


@log_sum_exp.register
def _(cache: OneByOneCache, /) -> Array:
    return namespace(cache.k).stack([head.lse for head in cache.heads], axis=-2)


# ── the engines, and which one ───────────────────────────────────────────────────────────────────────────────────

REFERENCE = Engine("reference", ops.linear, ops.linear_vjp, one_by_one, one_by_one_vjp)
TILED = Engine("tiled", tiled.linear, tiled.linear_vjp, tiled.attention, tiled.attention_vjp)
ENGINES = (REFERENCE, TILED)


def pick(engine: Engine | None, x: Array) -> Engine:
    """The engine given, else the fastest for arrays like `x`: TILED for real NumPy arrays, REFERENCE for all others."""
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(f"engine must be one of funcmha.engines or None, got {engine!r}")
    if engine is not None:
        return engine
    return TILED if isinstance(x, np.ndarray) and x.dtype.kind != "c" else REFERENCE


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | None = None,
    keep: Array = None,
    rate: float = 0.0,
    engine: Engine | None = None,
) -> tuple[Array, Any]:
    """o = dropout(softmax(scale · q kᵀ + bias)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     or all three without head axis

    What `funcmha.ops.attention` says, by an engine of `funcmha.engines`: TILED in linear memory, for NumPy arrays,
    REFERENCE for all; None picks one. The results are the same, to rounding.
    """
    chosen = pick(engine, q)
    run = ops.attention if chosen is REFERENCE else chosen.attention  # which needs no head axis, and takes all at once
    return run(q, k, v, bias, mask=mask, scale=scale, keep=keep, rate=rate)


@singledispatch
def attention_vjp(
    cache: Any, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv, dbias: `attention` from the bottom up, by the engine that the cache is from
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


attention_vjp.register(AttentionCache, ops.attention_vjp)
attention_vjp.register(tiled.AttentionCache, tiled.attention_vjp)
