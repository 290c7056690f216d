"""Primitives and their gradients, in pairs: the specification that every engine must equal.

    y, cache = f(*inputs, **static)      positional inputs are differentiable, keyword ones are not
    grads    = f_vjp(cache, dy)          one gradient per input, in order, of its shape; None where the input was None

Dtypes: float64, float32, and float16 and bfloat16, which are computed with in float32 and rounded once, at the end.
(complex128 is taken too, as the holomorphic extension, for complex-step checks.) A gradient has the dtype of `dy`.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out;
`...` is batch.
"""

from functools import singledispatch
from math import isqrt, prod
from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._xp import Array, namespace, narrow, unbroadcast, widen
from .masks import Mask, as_mask, dense

INF = float("inf")


# ── linear ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LinearCache(NamedTuple):
    x: Array  # (..., I)
    w: Array  # (O, I)
    b: Array  # (O,) or None


def linear(x: Array, w: Array, b: Array = None, /) -> tuple[Array, LinearCache]:
    """y = x wᵀ + b        x (..., I)   w (O, I)   b (O,) or None   →   y (..., O)

    Raises TypeError for mixed or unknown dtypes, ValueError for shapes that do not fit.
    """
    check_linear(x, w, b)
    dtype = x.dtype
    x, w, b = widen(x), widen(w), widen(b)
    y = x @ namespace(x).matrix_transpose(w)
    y = y if b is None else y + b
    return narrow(y, dtype), LinearCache(x, w, b)


def linear_vjp(cache: LinearCache, dy: Array, /) -> tuple[Array, Array, Array]:
    """dx = dy w     dw = Σ dy xᵀ     db = Σ dy        sums over the batch axes"""
    x, w, b = cache
    _check.cotangent("dy", dy, (*x.shape[:-1], w.shape[0]), x, "... O")
    xp, g = namespace(x), widen(dy)
    n = prod(x.shape[:-1])
    rows_g, rows_x = xp.reshape(g, (n, w.shape[0])), xp.reshape(x, (n, w.shape[1]))
    dx = g @ w
    dw = sum((xp.matrix_transpose(rows_g[i, :]) @ rows_x[i, :] for i in _blocks(n)), start=xp.zeros_like(w))
    db = None if b is None else sum((xp.sum(rows_g[i, :], axis=0) for i in _blocks(n)), start=xp.zeros_like(b))
    return narrow(dx, dy.dtype), narrow(dw, dy.dtype), narrow(db, dy.dtype)


def _blocks(n: int) -> list[slice]:
    """About √n blocks of n rows: a sum of partial sums of √n terms loses √n ulps at worst, one long sum n."""
    size = max(isqrt(n), 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ── softmax ──────────────────────────────────────────────────────────────────────────────────────────────────────


class SoftmaxCache(NamedTuple):
    p: Array  # (..., S)


def softmax(x: Array, /, *, where: Array = None) -> tuple[Array, SoftmaxCache]:
    """p = exp(x) / Σ exp(x)    over the last axis, where `where` is True      x (..., S)   →   p (..., S)

    p is 0 where `where` is False, whatever x is there, NaN included; a row with nothing allowed is 0 altogether.
    Shifted by the row's maximum and divided by the sum: the most accurate of the variants that Blanchard, Higham and
    Higham (IMA J. Numer. Anal. 41, 2021, Theorem 4.3) analyse. Raises TypeError unless `where` is boolean.
    """
    _check.one_dtype([("x", x)])
    _check.boolean("where", where, "True = allowed")
    axes = _check.Axes()
    axes("x", x, "... S")
    axes.broadcast("where", _check.shape_of(where), "... S")

    p, _ = _softmax(widen(x), where)
    return narrow(p, x.dtype), SoftmaxCache(p)


def softmax_vjp(cache: SoftmaxCache, dp: Array, /) -> tuple[Array]:
    """dx = p (dp − Σ p dp)        needs p alone, never x"""
    (p,) = cache
    _check.cotangent("dp", dp, p.shape, p, "... S")
    return (narrow(_softmax_vjp(p, widen(dp)), dp.dtype),)


def _softmax(x: Array, where: Array) -> tuple[Array, Array]:
    """p (..., S) and lse = log Σ exp(x) (...); a row with nothing allowed has p = 0 and lse = −∞."""
    xp = namespace(x)
    x = x if where is None else xp.where(where, x, -INF)
    top = (xp.max if x.shape[-1] else xp.sum)(
        x, axis=-1, keepdims=True
    )  # no keys: any shift will do, and Σ of none is 0
    top = xp.where(top == -INF, 0.0, top)
    e = xp.exp(x - top)
    total = xp.sum(e, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, 1.0, total)
    lse = xp.where(empty, -INF, top + xp.log(total))
    return e / total, lse[..., 0]


def _softmax_vjp(p: Array, dp: Array, dlse: Array = None) -> Array:
    """dx = p (dp − Σ p dp + dlse)

    dp is first centred at the largest weight. That changes nothing in exact arithmetic, as Σ p = 1, and saves the
    digits of a saturated row, where dp − Σ p dp would cancel. Where p is 0 the gradient is 0, whatever dp is there.
    """
    xp = namespace(p)
    if p.shape[-1] == 0:
        return p * dp
    largest = xp.argmax(p, axis=-1, keepdims=True)
    h = xp.where(p == 0, 0.0, dp - xp.take_along_axis(dp, largest, axis=-1))
    g = h - xp.sum(p * h, axis=-1, keepdims=True)
    g = g if dlse is None else g + dlse[..., None]
    return xp.where(p == 0, 0.0, p * g)


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D), 0 at the keys that nobody may see
    v: Array  # (..., K, S, E), 0 at the keys that nobody may see
    bias: Array  # broadcasts to (..., H, T, S), or None
    p: Array  # (..., H, T, S), the weights before dropout
    lse: Array  # (..., H, T)
    keep: Array  # broadcasts to (..., H, T, S), or None
    scale: float
    rate: float


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
) -> tuple[Array, AttentionCache]:
    """o = dropout(softmax(scale · q kᵀ + bias)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     or all three without head axis

    mask    boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S). A query that may see no key
            gets o = 0, weights 0, lse = −∞ and gradients 0. A key that no query may see has no effect, even if NaN.
            Read as (..., H, T, S) from the right: a mask per sample is (B, 1, T, S), for (B, T, S) would be per head
    bias    added to the scores, differentiable, broadcasts to (..., H, T, S); −∞ means "do not attend", but only a mask
            keeps out a NaN of the key
    scale   D ** -0.5 unless given; 0 is zero
    keep    boolean, True = keep: inverted dropout of the weights at `rate`, broadcasts to (..., H, T, S)

    H is a multiple of K, and query head h reads key/value head h // (H // K): grouped-query attention (Ainslie et al.
    2023), multi-query where K = 1. Time and memory O(H T S). Raises TypeError for a mask that is not boolean and for
    mixed dtypes, ValueError for shapes that do not fit, both before any arithmetic.
    Vaswani et al. 2017, eq. 1.
    """
    mask, scale, rate = check_attention(q, k, v, bias, mask, scale, keep, rate)
    mask = dense(mask, q.shape[-2], k.shape[-2], q)

    dtype = q.dtype
    q, k, v, bias = widen(q), blank(widen(k), mask), blank(widen(v), mask), widen(bias)
    xp = namespace(q)
    z = (scale * q) @ xp.matrix_transpose(_per_query_head(k, q))
    z = z if bias is None else z + bias
    p, lse = _softmax(z, mask)
    o = _dropout(p, keep, rate) @ _per_query_head(v, q)
    return narrow(o, dtype), AttentionCache(q, k, v, bias, p, lse, keep, scale, rate)


def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv, dbias: `attention` from the bottom up
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    q, k, v, bias, p, lse, keep, scale, rate = cache
    _check.cotangent("do", do, (*q.shape[:-1], v.shape[-1]), q, "... H T E")
    _check.cotangent("dweights", dweights, p.shape, p, "... H T S", optional=True)
    _check.cotangent("dlse", dlse, lse.shape, lse, "... H T", optional=True)
    xp, g = namespace(q), widen(do)

    # o = a v   with   a = dropout(p)
    dv = _per_key_head(xp.matrix_transpose(_dropout(p, keep, rate)) @ g, v)
    dp = _dropout(g @ xp.matrix_transpose(_per_query_head(v, q)), keep, rate)
    dp = dp if dweights is None else dp + widen(dweights)
    # p, lse = softmax(z)
    dz = _softmax_vjp(p, dp, widen(dlse))
    # z = scale · q kᵀ + bias
    dbias = None if bias is None else unbroadcast(dz, bias.shape)
    dk = _per_key_head(xp.matrix_transpose(dz) @ (scale * q), k)
    dq = scale * (dz @ _per_query_head(k, q))
    return narrow(dq, do.dtype), narrow(dk, do.dtype), narrow(dv, do.dtype), narrow(dbias, do.dtype)


@singledispatch
def attention_weights(cache: Any, /) -> Array:
    """p = softmax(scale · q kᵀ + bias)    (..., H, T, S), before dropout, from the cache of any attention

    In the dtype computed with: float32 for float16 and bfloat16.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@singledispatch
def log_sum_exp(cache: Any, /) -> Array:
    """lse = log Σ exp(scale · q kᵀ + bias)    (..., H, T), natural, from the cache of any attention

    −∞ for a query that may see no key. In the dtype computed with: float32 for float16 and bfloat16.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@singledispatch
def cut_heads(cache: Any, h: slice, kv: slice, /) -> Any:
    """The cache of query heads `h` and of the key/value heads `kv` that they read, as views."""
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


def of_heads(a: Array, h: slice) -> Array:
    """a (..., H or 1, ·, ·), or without a head axis, or None, as the heads `h` see it"""
    return a if a is None or a.ndim < 3 or a.shape[-3] == 1 else a[..., h, :, :]


@cut_heads.register
def _(cache: AttentionCache, h: slice, kv: slice, /) -> AttentionCache:
    q, k, v, bias, p, lse, keep, *statics = cache
    cut = q[..., h, :, :], k[..., kv, :, :], v[..., kv, :, :], of_heads(bias, h), p[..., h, :, :], lse[..., h, :]
    return AttentionCache(*cut, of_heads(keep, h), *statics)


@attention_weights.register
def _(cache: AttentionCache, /) -> Array:
    return cache.p


@log_sum_exp.register
def _(cache: AttentionCache, /) -> Array:
    return cache.lse


def check_linear(x: Array, w: Array, b: Array) -> None:
    """The door of `linear`."""
    _check.one_dtype([("x", x), ("w", w)], optional=[("b", b)])
    axes = _check.Axes()
    axes("x", x, "... I")
    axes("w", w, "O I")
    if b is not None:
        axes("b", b, "O")


def check_attention(
    q: Array, k: Array, v: Array, bias: Array, mask: Any, scale: float | None, keep: Array, rate: float
) -> tuple[Mask | None, float, float]:
    """The door of `attention`: the mask as a `Mask` or None, scale and rate as Python floats."""
    _check.one_dtype([("q", q), ("k", k), ("v", v)], optional=[("bias", bias)])
    axes = _check.Axes()
    head, group, scores = ("... H ", "... K ", "... H T S") if q.ndim > 2 else ("", "", "T S")
    axes("q", q, head + "T D")
    axes("k", k, group + "S D")
    axes("v", v, group + "S E")
    if head:
        _check.multiple("q", axes["H"], "k", axes["K"])
    axes.broadcast("bias", _check.shape_of(bias), scores)
    mask = check_mask(axes, mask, scores)
    check_keep(axes, keep, rate, scores)
    scale = max(axes["D"], 1) ** -0.5 if scale is None else _check.number("scale", scale)
    return mask, scale, float(rate)


def check_mask(axes: _check.Axes, mask: Any, scores: str) -> Mask | None:
    """The mask as a `Mask` that broadcasts to `scores`, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        _check.boolean("mask", mask, "True = attend (a mask to be added to the scores is a bias)")
        axes.broadcast("mask", mask.shape, scores)
    checked = as_mask(mask)
    axes.broadcast("mask", checked.shape(axes["T"], axes["S"]), scores)
    return checked


def check_keep(axes: _check.Axes, keep: Array, rate: float, scores: str) -> None:
    """Dropout is a mask and a rate, or neither."""
    _check.boolean("keep", keep, "True = keep")
    axes.broadcast("keep", _check.shape_of(keep), scores)
    if _check.number("rate", rate, 0.0, 1.0) > 0 and keep is None:
        raise ValueError(f"keep must be given with rate={rate}: dropout takes its mask as an input")


def _dropout(p: Array, keep: Array, rate: float) -> Array:
    """a = p ⊙ keep / (1 − rate)    linear in p and its own adjoint, so the gradient is the same function"""
    return p if keep is None else namespace(p).where(keep, p, 0.0) / (1 - rate)


def blank(x: Array, mask: Array) -> Array:
    """x (..., K, S, ·) with 0 at each key that no query of its heads may see, so that 0 · NaN cannot arise there."""
    if mask is None:
        return x
    xp = namespace(x)
    seen = xp.any(mask, axis=-2)  # (..., H or 1, S or 1)
    if isinstance(seen, np.ndarray) and seen.all():
        return x
    if seen.ndim > 1 and seen.shape[-2] not in (1, x.shape[-3]):
        *batch, heads, n = seen.shape
        seen = xp.any(xp.reshape(seen, (*batch, x.shape[-3], heads // x.shape[-3], n)), axis=-2)
    return xp.where(seen[..., None], x, 0.0)


def _per_query_head(x: Array, q: Array) -> Array:
    """x (..., K, S, ·)  →  (..., H, S, ·): head h reads h // (H // K)"""
    if x.ndim < 3 or x.shape[-3] == q.shape[-3]:
        return x
    return namespace(x).repeat(x, q.shape[-3] // x.shape[-3], axis=-3)


def _per_key_head(g: Array, x: Array) -> Array:
    """g (..., H, S, ·)  →  (..., K, S, ·) as x: the adjoint of `_per_query_head` sums over each group"""
    if x.ndim < 3 or x.shape[-3] == g.shape[-3]:
        return g
    *batch, heads, n, width = g.shape
    groups = x.shape[-3]
    xp = namespace(g)
    return xp.sum(xp.reshape(g, (*batch, groups, heads // groups, n, width)), axis=-3)
