"""What the norms share: the size of a row, sums over rows, and the argument checks.

Axes: D the width that is normalised over; `...` is batch.
"""

from math import prod
from typing import Any

from funcmha import _check
from funcmha._arrays import Array, full, namespace, row_blocks

INF = float("inf")


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def leading_bit(x: Array, floor: Array | float) -> Array:
    """The largest power of two that is at most max(|row|, floor), exactly; 1 where that is 0, ∞ or NaN."""
    xp, size = namespace(x), largest(x)
    size = xp.where(size < floor, floor, size)
    size = xp.where((size > 0) & (size < INF), size, 1.0)
    # φ = 1 / 2u + 1, q = φ p  ⇒  q − (1 − u) q is the leading bit of p (Rump, SIAM J. Sci. Comput. 31(5), 2009), where
    # φ p does not overflow. The array-API standard has no frexp, and a power function may be off by an ulp.
    eps = float(xp.finfo(size.dtype).eps)
    large = size > 1
    q = (1 / eps + 1) * xp.where(large, 2.0**-64 * size, size)
    unit = q - (1 - eps / 2) * q
    return xp.where(large, 2.0**64 * unit, unit)


def largest(x: Array) -> Array:
    """max |x| of each row (..., 1), real for complex x; of no numbers 0."""
    xp = namespace(x)
    return (xp.max if x.shape[-1] else xp.sum)(xp.abs(x), axis=-1, keepdims=True)


def mean(x: Array) -> Array:
    """The mean of each row (..., 1); of no numbers 0."""
    return namespace(x).sum(x, axis=-1, keepdims=True) / max(x.shape[-1], 1)


def rms(x: Array, floor: Array | float) -> tuple[Array, Array, Array]:
    """n = x / √(mean x² + floor²), and that root as root · unit."""
    xp, unit = namespace(x), leading_bit(x, floor)
    x, floor = x / unit, floor / unit
    root = xp.sqrt(mean(x * x) + floor * floor)
    root = xp.where(root == 0, INF, root)
    return x / root, root, unit


def rms_vjp(n: Array, root: Array, unit: Array, g: Array) -> Array:
    """dx = (g − n mean(n g)) / (root · unit)    in two steps, as the product may overflow"""
    return (g - n * mean(n * g)) / root / unit


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


def affine_jvp(n: Array, n_dot: Array, w: Array, w_dot: Array, b_dot: Array = None) -> Array:
    """ẏ = w ṅ + ẇ n + ḃ"""
    y_dot = n_dot if w is None else w * n_dot
    y_dot = y_dot if w_dot is None else y_dot + w_dot * n
    return y_dot if b_dot is None else y_dot + b_dot


def weighted(w: Array, w_dot: Array, dy: Array, dy_dot: Array) -> tuple[Array, Array]:
    """g = w dy     ġ = w ḋy + ẇ dy"""
    if w is None:
        return dy, dy_dot
    return w * dy, w * dy_dot if w_dot is None else w * dy_dot + w_dot * dy


def row_sum(g: Array, like: Array, batch_axes: int = 0) -> Array:
    """Σ g over the batch: (..., D)   →   (D,) as `like`, in blocks as `linear_vjp` sums; not over `batch_axes` axes"""
    xp, batch, D = namespace(g), g.shape[:batch_axes], g.shape[-1]
    n = prod(g.shape[batch_axes:-1])
    rows = xp.reshape(g, (*batch, n, D))
    return sum((xp.sum(rows[..., i, :], axis=-2) for i in row_blocks(n)), start=full((*batch, D), 0.0, like))


def present(**grads: Array) -> dict[str, Array]:
    """Of these, those that there are."""
    return {leaf: grad for leaf, grad in grads.items() if grad is not None}


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def check_norm(x: Array, w: Array, b: Array, eps: float) -> float:
    """eps as a float, of a norm with these parameters."""
    _check.one_dtype([("x", x)], optional=[("w", w), ("b", b)])
    axes = _check.Axes()
    axes("x", x, "... D")
    for name, p in (("w", w), ("b", b)):
        if p is not None:
            axes(name, p, "D")
    return _check.number("eps", eps, 0.0)


def check_batch_axes(batch_axes: int, x: Array) -> None:
    """Raise unless x (..., D) has so many axes before its last."""
    if _check.integer("batch_axes", batch_axes, 0) > x.ndim - 1:
        raise ValueError(f"batch_axes must be at most {x.ndim - 1}, as x is {tuple(x.shape)}, got {batch_axes}")


def check_tangents(n: Array, w: Array, b: Array, x_dot: Array, w_dot: Array, b_dot: Array) -> None:
    """Raise unless each is None, or what it is the tangent of has its shape and dtype."""
    _check.one_dtype(optional=[("x_dot", x_dot), ("w_dot", w_dot), ("b_dot", b_dot)])
    _check.tangent("x_dot", x_dot, n.shape, n, "... D")
    _check.tangent("w_dot", w_dot, _check.shape_of(w), n, "D")
    _check.tangent("b_dot", b_dot, _check.shape_of(b), n, "D")


def check_second(n: Array, dy: Array, dy_dot: Array, **tangents: Any) -> None:
    """Raise unless dy is a cotangent of y, and dy_dot and the tangents of the inputs go with it."""
    _check.one_dtype([("dy", dy)], optional=[("dy_dot", dy_dot), *tangents.items()])
    _check.cotangent("dy", dy, n.shape, n, "... D")
    _check.tangent("dy_dot", dy_dot, n.shape, n, "... D")
