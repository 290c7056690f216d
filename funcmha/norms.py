"""Norms over the last axis, for queries and keys before their scores: `rms_norm`, `l2_norm`, `layer_norm`.

Rows of any size are rows like others: each is divided by a power of two near its largest magnitude, which is exact,
before anything is squared. Where eps = 0 leaves nothing to divide by, a row of zeros (for `layer_norm` of one number
D times) is normalised to 0, and its x has gradient 0, whatever the finite cotangent; the formula has neither value nor
derivative there, and PyTorch gives NaN. An eps too small for the dtype of x counts as 0. A row with an infinity or a
NaN has a NaN.

Axes: D the width that is normalised over; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

from . import _check
from ._xp import Array, namespace, narrow, quiet_underflow, widen
from .ops import _blocks

INF = float("inf")


# ── rms_norm ─────────────────────────────────────────────────────────────────────────────────────────────────────


class RmsNormCache(NamedTuple):
    n: Array  # (..., D), x / (root · unit)
    root: Array  # (..., 1), √(mean x² + eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    w: Array  # (D,), with the offset, or None


@quiet_underflow
def rms_norm(x: Array, w: Array = None, /, *, eps: float, offset: float = 0.0) -> tuple[Array, RmsNormCache]:
    """y = (offset + w) x / √(mean x² + eps)        x (..., D)   w (D,) or None, for 1   →   y (..., D)

    eps stands inside the root, beside the mean, as in `torch.nn.functional.rms_norm`. With eps = 0 a row of zeros gives
    0, with dx = 0. An offset of 1 is that of Gemma, whose w is stored as what it differs from 1 by. Raises TypeError
    for mixed dtypes, ValueError for shapes that do not fit, a negative eps, or an offset without w. Zhang and Sennrich
    2019, eq. 4.
    """
    eps, offset = _check_norm(x, w, None, eps), _check.number("offset", offset)
    if offset and w is None:
        raise ValueError(f"offset must be 0 where there is no w that it could be added to, got {offset}")
    dtype, x, w = x.dtype, widen(x), widen(w)
    w = w + offset if offset else w
    n, root, unit = _rms(x, eps**0.5)
    y = n if w is None else n * w
    return narrow(y, dtype), RmsNormCache(n, root, unit, w)


@quiet_underflow
def rms_norm_vjp(cache: RmsNormCache, dy: Array, /) -> tuple[Array, Array]:
    """dx = (g − n mean(n g)) / √(mean x² + eps)     dw = Σ n dy        where w has the offset, g = w dy, n = y / w"""
    _check.cache(cache, RmsNormCache, "rms_norm")
    n, root, unit, w = cache
    _check.cotangent("dy", dy, n.shape, n, "... D")
    g = widen(dy)
    dw = None if w is None else _row_sum(n * g, w)
    dx = _rms_vjp(n, root, unit, g if w is None else w * g)
    return narrow(dx, dy.dtype), narrow(dw, dy.dtype)


def _rms(x: Array, floor: Array | float) -> tuple[Array, Array, Array]:
    """n = x / √(mean x² + floor²), and that root as root · unit."""
    xp, unit = namespace(x), _unit(x, floor)
    x, floor = x / unit, floor / unit
    root = xp.sqrt(_mean(x * x) + floor * floor)
    root = xp.where(root == 0, INF, root)
    return x / root, root, unit


def _rms_vjp(n: Array, root: Array, unit: Array, g: Array) -> Array:
    """dx = (g − n mean(n g)) / (root · unit)    in two steps, as the product may overflow"""
    return (g - n * _mean(n * g)) / root / unit


# ── l2_norm ──────────────────────────────────────────────────────────────────────────────────────────────────────


class L2NormCache(NamedTuple):
    y: Array  # (..., D)
    root: Array  # (..., 1), max(‖x‖, eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    below: Array  # (..., 1), whether ‖x‖ < eps


@quiet_underflow
def l2_norm(x: Array, /, *, eps: float) -> tuple[Array, L2NormCache]:
    """y = x / max(‖x‖, eps)        x (..., D)   →   y (..., D)

    eps is a floor under the norm, as in `torch.nn.functional.normalize`: shorter rows are x / eps, and all others have
    norm 1. With eps = 0 a row of zeros gives 0, with dx = 0. Raises TypeError for an unknown dtype,
    ValueError for a negative eps.
    """
    eps = _check_norm(x, None, None, eps)
    dtype, x = x.dtype, widen(x)
    xp, unit = namespace(x), _unit(x, eps)
    x, floor = x / unit, eps / unit
    root = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    below = xp.abs(root) < floor
    root = xp.where(below, floor, root)
    root = xp.where(root == 0, INF, root)
    y = x / root
    return narrow(y, dtype), L2NormCache(y, root, unit, below)


@quiet_underflow
def l2_norm_vjp(cache: L2NormCache, dy: Array, /) -> tuple[Array]:
    """dx = (dy − y Σ y dy) / ‖x‖,   or dy / eps where ‖x‖ < eps"""
    _check.cache(cache, L2NormCache, "l2_norm")
    y, root, unit, below = cache
    _check.cotangent("dy", dy, y.shape, y, "... D")
    xp, g = namespace(y), widen(dy)
    along = xp.where(below, 0.0, xp.sum(y * g, axis=-1, keepdims=True))
    return (narrow((g - y * along) / root / unit, dy.dtype),)


# ── layer_norm ───────────────────────────────────────────────────────────────────────────────────────────────────


class LayerNormCache(NamedTuple):
    n: Array  # (..., D), (x − mean x) / (root · unit)
    root: Array  # (..., 1), √(var x + eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    scale: Array  # (..., 1), the power of two that x was multiplied by before its mean was taken
    w: Array  # (D,) or None
    b: Array  # (D,) or None


@quiet_underflow
def layer_norm(x: Array, w: Array = None, b: Array = None, /, *, eps: float) -> tuple[Array, LayerNormCache]:
    """y = w (x − mean x) / √(var x + eps) + b        x (..., D)   w (D,) or None   b (D,) or None   →   y (..., D)

    eps stands inside the root, beside the variance, which is mean (x − mean x)², as in
    `torch.nn.functional.layer_norm`. With eps = 0 a row of one number D times gives b, with dx = 0. A mean far from 0
    costs no digits: rows are first shifted by their first number. Raises TypeError for mixed dtypes, ValueError for
    shapes that do not fit or a negative eps. Ba, Kiros and Hinton 2016, eq. 4.
    """
    eps = _check_norm(x, w, b, eps)
    dtype, x, w, b = x.dtype, widen(x), widen(w), widen(b)
    c, scale = _centred(x)
    n, root, unit = _rms(c, eps**0.5 * scale)
    y = n if w is None else n * w
    y = y if b is None else y + b
    return narrow(y, dtype), LayerNormCache(n, root, unit, scale, w, b)


@quiet_underflow
def layer_norm_vjp(cache: LayerNormCache, dy: Array, /) -> tuple[Array, Array, Array]:
    """dx = (h − n mean(n h)) / √(var x + eps)     dw = Σ n dy     db = Σ dy        where g = w dy, h = g − mean g"""
    _check.cache(cache, LayerNormCache, "layer_norm")
    n, root, unit, scale, w, b = cache
    _check.cotangent("dy", dy, n.shape, n, "... D")
    g = widen(dy)
    db = None if b is None else _row_sum(g, b)
    dw = None if w is None else _row_sum(n * g, w)
    g = g if w is None else w * g
    # c = x − mean x    is its own adjoint, and may come before that of the root, as mean n = 0
    dx = _rms_vjp(n, root, unit, g - _mean(g)) * scale
    return narrow(dx, dy.dtype), narrow(dw, dy.dtype), narrow(db, dy.dtype)


# ── a norm as a static value, for `mha` ──────────────────────────────────────────────────────────────────────────


class Rms(NamedTuple):
    """`rms_norm` of queries and keys, by q_norm.w and k_norm.w if there are any: Qwen 3, and Gemma 3 with offset 1."""

    eps: float = 1e-6
    offset: float = 0.0  # to be added to w

    @property
    def leaves(self) -> tuple[str, ...]:
        """What it may have for parameters."""
        return ("w",)

    def apply(self, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y = rms_norm(x, offset + w)"""
        return rms_norm(x, params.get("w"), eps=self.eps, offset=self.offset)

    def apply_vjp(self, cache: Any, dy: Array) -> tuple[Array, dict[str, Array]]:
        """dx, dparams"""
        dx, dw = rms_norm_vjp(cache, dy)
        return dx, _present(w=dw)


class L2(NamedTuple):
    """`l2_norm` of queries and keys, which has no parameters (Henry et al. 2020)."""

    eps: float = 1e-12

    @property
    def leaves(self) -> tuple[str, ...]:
        """What it may have for parameters."""
        return ()

    def apply(self, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y = l2_norm(x)"""
        return l2_norm(x, eps=self.eps)

    def apply_vjp(self, cache: Any, dy: Array) -> tuple[Array, dict[str, Array]]:
        """dx, {}"""
        (dx,) = l2_norm_vjp(cache, dy)
        return dx, {}


class Layer(NamedTuple):
    """`layer_norm` of queries and keys, by q_norm and k_norm, w and b, if there are any (Dehghani et al. 2023)."""

    eps: float = 1e-5

    @property
    def leaves(self) -> tuple[str, ...]:
        """What it may have for parameters."""
        return ("w", "b")

    def apply(self, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y = layer_norm(x, w, b)"""
        return layer_norm(x, params.get("w"), params.get("b"), eps=self.eps)

    def apply_vjp(self, cache: Any, dy: Array) -> tuple[Array, dict[str, Array]]:
        """dx, dparams"""
        dx, dw, db = layer_norm_vjp(cache, dy)
        return dx, _present(w=dw, b=db)


Norm = Rms | L2 | Layer


def _present(**grads: Array) -> dict[str, Array]:
    return {leaf: grad for leaf, grad in grads.items() if grad is not None}


def _centred(x: Array) -> tuple[Array, Array]:
    """scale · (x − mean x), and scale: a power of two with which no sum overflows, and no mean is subnormal."""
    xp, size = namespace(x), _largest(x)
    down = 0.5 ** (4 * x.shape[-1]).bit_length()  # the D differences may be twice as large as x
    scale = xp.where(size > 1, down, xp.where(size < 2.0**-64, 2.0**64, xp.ones_like(size)))
    x = x * scale
    # The shift changes nothing in exact arithmetic; in a row of one number it leaves 0, where x − mean x may not.
    x = x - x[..., :1]
    return x - _mean(x), scale


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _unit(x: Array, floor: Array | float) -> Array:
    """The largest power of two that is at most max(|row|, floor), exactly; 1 where that is 0, ∞ or NaN."""
    xp, size = namespace(x), _largest(x)
    size = xp.where(size < floor, floor, size)
    size = xp.where((size > 0) & (size < INF), size, 1.0)
    # φ = 1 / 2u + 1, q = φ p  ⇒  q − (1 − u) q is the leading bit of p (Rump, SIAM J. Sci. Comput. 31(5), 2009), where
    # φ p does not overflow. The array-API standard has no frexp, and a power function may be off by an ulp.
    eps = float(xp.finfo(size.dtype).eps)
    large = size > 1
    q = (1 / eps + 1) * xp.where(large, 2.0**-64 * size, size)
    unit = q - (1 - eps / 2) * q
    return xp.where(large, 2.0**64 * unit, unit)


def _largest(x: Array) -> Array:
    """max |x| of each row (..., 1), real for complex x; of no numbers 0."""
    xp = namespace(x)
    return (xp.max if x.shape[-1] else xp.sum)(xp.abs(x), axis=-1, keepdims=True)


def _mean(x: Array) -> Array:
    """The mean of each row (..., 1); of no numbers 0."""
    return namespace(x).sum(x, axis=-1, keepdims=True) / max(x.shape[-1], 1)


def _row_sum(g: Array, like: Array) -> Array:
    """Σ g over the batch: (..., D)   →   (D,) as `like`, in blocks as `linear_vjp` sums"""
    xp, n = namespace(g), prod(g.shape[:-1])
    rows = xp.reshape(g, (n, g.shape[-1]))
    return sum((xp.sum(rows[i, :], axis=0) for i in _blocks(n)), start=xp.zeros_like(like))


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_norm(x: Array, w: Array, b: Array, eps: float) -> float:
    _check.one_dtype([("x", x)], optional=[("w", w), ("b", b)])
    axes = _check.Axes()
    axes("x", x, "... D")
    for name, p in (("w", w), ("b", b)):
        if p is not None:
            axes(name, p, "D")
    return _check.number("eps", eps, 0.0)
