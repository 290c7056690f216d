"""Engines: the same ops done in different ways, and the choice among them.

An engine is a value: the ops that it does, by the protocol of `funcmha.ops` and with the results of `funcmha.ops`. Its
`linear` takes `onto` as well, an array that y is added to, and its `linear_vjp` one that dx is added to; both may write
into it. And its `linear_vjp` takes dy in parts too, a tuple of arrays that stand side by side. To add an engine, write
the four functions, make an `Engine` of them here, and name it in ENGINES for the conformance tests.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from . import ops, tiled
from ._xp import Array, namespace
from .biases import RelativeBias
from .dropout import Masked, Seeded
from .masks import Mask
from .ops import AttentionCache, LinearCache


class Engine(NamedTuple):
    name: str
    linear: Callable[..., Any]
    linear_vjp: Callable[..., Any]
    attention: Callable[..., Any]
    attention_vjp: Callable[..., Any]


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────


def _linear(x: Array, w: Array, b: Array = None, /, *, onto: Array = None) -> tuple[Array, LinearCache]:
    """y = onto + x wᵀ + b"""
    y, cache = ops.linear(x, w, b)
    return y if onto is None else onto + y, cache


def _linear_vjp(
    cache: LinearCache, dy: Array | tuple[Array, ...], /, *, onto: Array = None
) -> tuple[Array, Array, Array]:
    """onto + dx, dw, db"""
    dy = namespace(dy[0]).concat(dy, axis=-1) if isinstance(dy, tuple) else dy
    dx, dw, db = ops.linear_vjp(cache, dy)
    return dx if onto is None else onto + dx, dw, db


# ── the engines, and which one ───────────────────────────────────────────────────────────────────────────────────

REFERENCE = Engine("reference", _linear, _linear_vjp, ops.attention, ops.attention_vjp)
TILED = Engine("tiled", tiled.linear, tiled.linear_vjp, tiled.attention, tiled.attention_vjp)
BATCHED = Engine("batched", tiled.linear, tiled.linear_vjp, tiled.batched.attention, tiled.batched.attention_vjp)
ENGINES = (REFERENCE, TILED)  # each op once: BATCHED has those of both
# Queries and keys up to which attention takes all heads of all samples at once, rather than tile by tile: for 256
# samples of 8 tokens it is 20 times faster, there and back, and at 80 about as fast (docs/performance.md).
SHORT = 80


def pick(engine: Engine | None, x: Array, longest: int) -> Engine:
    """The engine given, else the fastest for so many queries and keys at most, in arrays like `x`: for real NumPy
    arrays TILED, or BATCHED where sequences are short; REFERENCE for others
    """
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(f"engine must be one of funcmha.engines or None, got {engine!r}")
    if engine is not None:
        return engine
    if not isinstance(x, np.ndarray) or x.dtype.kind == "c":
        return REFERENCE
    return TILED if longest > SHORT else BATCHED


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | RelativeBias = None,
    sink: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    dropout: Masked | Seeded | None = None,
    engine: Engine | None = None,
) -> tuple[Array, Any]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     or all three without head axis

    What `funcmha.ops.attention` says, by an engine of `funcmha.engines`: REFERENCE for all arrays; for NumPy's TILED in
    linear memory, and BATCHED for short sequences; None picks the fastest. The results are the same, to rounding.
    """
    longest = max((x.shape[-2] for x in (q, k) if getattr(x, "ndim", 0) > 1), default=0)
    chosen = pick(engine, q, longest)
    o, cache = chosen.attention(q, k, v, bias, sink, mask=mask, scale=scale, softcap=softcap, dropout=dropout)
    return o, cache


@singledispatch
def attention_vjp(
    cache: Any, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array | RelativeBias, Array]:
    """dq, dk, dv, dbias, dsink: `attention` from the bottom up, by the engine that the cache is from
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@attention_vjp.register
def _(cache: AttentionCache, do: Array, /, **cotangents: Array) -> tuple[Array, ...]:
    if isinstance(do, np.ndarray):
        return tiled.batched.attention_vjp(cache, do, **cotangents)
    return ops.attention_vjp(cache, do, **cotangents)


attention_vjp.register(tiled.AttentionCache, tiled.attention_vjp)
