"""`layer_norm`: each row less its mean, divided by the root of its variance.

Axes: D the width that is normalised over; `...` is batch.
"""

from typing import Any, NamedTuple

from funcmha import _check
from funcmha._arrays import Array, downcast, namespace, or_zeros, own, upcast

from .rows import (
    affine_jvp,
    check_batch_axes,
    check_norm,
    check_second,
    check_tangents,
    largest,
    mean,
    present,
    rms,
    rms_vjp,
    row_sum,
    weighted,
)


class LayerNormCache(NamedTuple):
    n: Array  # (..., D), (x − mean x) / (root · unit)
    root: Array  # (..., 1), √(var x + eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    scale: Array  # (..., 1), the power of two that x was multiplied by before its mean was taken
    w: Array  # (D,) or None
    b: Array  # (D,) or None


def layer_norm(x: Array, w: Array = None, b: Array = None, /, *, eps: float) -> tuple[Array, LayerNormCache]:
    """y = w (x − mean x) / √(var x + eps) + b        x (..., D)   w (D,) or None   b (D,) or None   →   y (..., D)

    eps stands inside the root, beside the variance, which is mean (x − mean x)², as in
    `torch.nn.functional.layer_norm`. With eps = 0 a row of one number D times gives b, with dx = 0. A mean far from 0
    costs no digits: rows are first shifted by their first number. Raises TypeError for mixed dtypes, ValueError for
    shapes that do not fit or a negative eps. Ba, Kiros and Hinton 2016, eq. 4.
    """
    eps = check_norm(x, w, b, eps)
    dtype, x, w, b = x.dtype, upcast(x), upcast(w), upcast(b)
    c, scale = _centred(x)
    n, root, unit = rms(c, eps**0.5 * scale)
    y = n if w is None else n * w
    y = y if b is None else y + b
    return own(downcast(y, dtype), n), LayerNormCache(n, root, unit, scale, w, b)


def layer_norm_vjp(cache: LayerNormCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array, Array, Array]:
    """dx = (h − n mean(n h)) / √(var x + eps)     dw = Σ n dy     db = Σ dy        where g = w dy, h = g − mean g

    batch_axes   how many of the first axes of x the sums are not over: dw and db are (*x.shape[:batch_axes], D)
    """
    _check.cache(cache, LayerNormCache, "layer_norm")
    n, w, b = cache.n, cache.w, cache.b
    _check.cotangent("dy", dy, n.shape, n, "... D")
    check_batch_axes(batch_axes, n)
    g = upcast(dy)
    db = None if b is None else row_sum(g, b, batch_axes)
    dw = None if w is None else row_sum(n * g, w, batch_axes)
    dx = _jacobian(cache, g if w is None else w * g)
    return downcast(dx, dy.dtype), downcast(dw, dy.dtype), downcast(db, dy.dtype)


def layer_norm_jvp(cache: LayerNormCache, x_dot: Array = None, w_dot: Array = None, b_dot: Array = None, /) -> Array:
    """ẏ = w ṅ + ẇ n + ḃ        where ṅ = (h − n mean(n h)) / √(var x + eps), h = ẋ − mean ẋ"""
    _check.cache(cache, LayerNormCache, "layer_norm")
    n, w, b = cache.n, cache.w, cache.b
    check_tangents(n, w, b, x_dot, w_dot, b_dot)
    n_dot = _jacobian(cache, or_zeros(x_dot, n.shape, n))
    return downcast(affine_jvp(n, n_dot, w, upcast(w_dot), upcast(b_dot)), _check.dtype_of(n, x_dot, w_dot, b_dot))


def layer_norm_vjp_jvp(
    cache: LayerNormCache,
    dy: Array,
    dy_dot: Array = None,
    x_dot: Array = None,
    w_dot: Array = None,
    b_dot: Array = None,
    /,
) -> tuple[Array, Array, Array]:
    """ḋx = J ġ − (ṅ ⟨n, g⟩ + n ⟨ṅ, g⟩ + J g ⟨n, ẋ⟩) / √(var x + eps)     ḋw = Σ ṅ dy + n ḋy     ḋb = Σ ḋy

    The tangents of `layer_norm_vjp`, as in `rms_norm_vjp_jvp`. That of b has no effect: y is linear in b.
    """
    _check.cache(cache, LayerNormCache, "layer_norm")
    n, root, unit, scale, w, b = cache
    check_second(n, dy, dy_dot, x_dot=x_dot, w_dot=w_dot, b_dot=b_dot)
    check_tangents(n, w, b, x_dot, w_dot, b_dot)
    dtype, dy, dy_dot, x_dot = dy.dtype, upcast(dy), or_zeros(dy_dot, n.shape, n), or_zeros(x_dot, n.shape, n)
    g, g_dot = weighted(w, upcast(w_dot), dy, dy_dot)
    n_dot, j_g, j_g_dot = (_jacobian(cache, a) for a in (x_dot, g, g_dot))
    bent = n_dot * mean(n * g) + n * mean(n_dot * g) + j_g * mean(n * x_dot)
    dw_dot = None if w is None else row_sum(n_dot * dy + n * dy_dot, w)
    db_dot = None if b is None else row_sum(dy_dot, b)
    return downcast(j_g_dot - bent / root / unit * scale, dtype), downcast(dw_dot, dtype), downcast(db_dot, dtype)


def _jacobian(cache: LayerNormCache, g: Array) -> Array:
    """(h − n mean(n h)) / root        where h = g − mean g

    c = x − mean x    is its own adjoint, and may come before that of the root, as mean n = 0
    """
    return rms_vjp(cache.n, cache.root, cache.unit, g - mean(g)) * cache.scale


def _centred(x: Array) -> tuple[Array, Array]:
    """scale · (x − mean x), and scale: a power of two with which no sum overflows, and no mean is subnormal."""
    xp, size = namespace(x), largest(x)
    down = 0.5 ** (4 * x.shape[-1]).bit_length()  # the D differences may be twice as large as x
    scale = xp.where(size > 1, down, xp.where(size < 2.0**-64, 2.0**64, xp.ones_like(size)))
    x = x * scale
    # The shift changes nothing in exact arithmetic; in a row of one number it leaves 0, where x − mean x may not.
    x = x - x[..., :1]
    return x - mean(x), scale


class LayerNorm(NamedTuple):
    """`layer_norm` of queries and keys, by q_norm and k_norm, w and b, if there are any (Dehghani et al. 2023)."""

    eps: float = 1e-5

    @property
    def leaves(self) -> tuple[str, ...]:
        """What it may have for parameters."""
        return ("w", "b")

    def apply(self, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y = layer_norm(x, w, b)"""
        return layer_norm(x, params.get("w"), params.get("b"), eps=self.eps)

    def apply_vjp(self, cache: Any, dy: Array, *, batch_axes: int = 0) -> tuple[Array, dict[str, Array]]:
        """dx, dparams"""
        dx, dw, db = layer_norm_vjp(cache, dy, batch_axes=batch_axes)
        return dx, present(w=dw, b=db)

    def apply_jvp(self, cache: Any, x_dot: Array, params_dot: dict[str, Array]) -> Array:
        """ẏ"""
        return layer_norm_jvp(cache, x_dot, params_dot.get("w"), params_dot.get("b"))

    def apply_vjp_jvp(
        self, cache: Any, dy: Array, dy_dot: Array, x_dot: Array, params_dot: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """ḋx, ḋparams"""
        dx_dot, dw_dot, db_dot = layer_norm_vjp_jvp(cache, dy, dy_dot, x_dot, params_dot.get("w"), params_dot.get("b"))
        return dx_dot, present(w=dw_dot, b=db_dot)
