"""`rms_norm`: each row divided by the root of the mean of its squares.

Axes: D the width that is normalised over; `...` is batch.
"""

from typing import Any, NamedTuple

from funcmha import _check
from funcmha._arrays import Array, downcast, or_zeros, own, upcast

from .rows import (
    affine_jvp,
    check_batch_axes,
    check_norm,
    check_second,
    check_tangents,
    mean,
    present,
    rms,
    rms_vjp,
    row_sum,
    weighted,
)


class RmsNormCache(NamedTuple):
    n: Array  # (..., D), x / (root · unit)
    root: Array  # (..., 1), √(mean x² + eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    w: Array  # (D,), with the offset, or None


def rms_norm(x: Array, w: Array = None, /, *, eps: float, offset: float = 0.0) -> tuple[Array, RmsNormCache]:
    """y = (offset + w) x / √(mean x² + eps)        x (..., D)   w (D,) or None, for 1   →   y (..., D)

    eps stands inside the root, beside the mean, as in `torch.nn.functional.rms_norm`. With eps = 0 a row of zeros gives
    0, with dx = 0. An offset of 1 is that of Gemma, whose w is stored as what it differs from 1 by. Raises TypeError
    for mixed dtypes, ValueError for shapes that do not fit, a negative eps, or an offset without w. Zhang and Sennrich
    2019, eq. 4.
    """
    eps, offset = check_norm(x, w, None, eps), _check.number("offset", offset)
    if offset and w is None:
        raise ValueError(f"offset must be 0 where there is no w that it could be added to, got {offset}")
    dtype, x, w = x.dtype, upcast(x), upcast(w)
    w = w + offset if offset else w
    n, root, unit = rms(x, eps**0.5)
    y = n if w is None else n * w
    return own(downcast(y, dtype), n), RmsNormCache(n, root, unit, w)


def rms_norm_vjp(cache: RmsNormCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array, Array]:
    """dx = (g − n mean(n g)) / √(mean x² + eps)     dw = Σ n dy        where w has the offset, g = w dy, n = y / w

    batch_axes   how many of the first axes of x the sum is not over: dw is (*x.shape[:batch_axes], D)
    """
    _check.cache(cache, RmsNormCache, "rms_norm")
    n, root, unit, w = cache
    _check.cotangent("dy", dy, n.shape, n, "... D")
    check_batch_axes(batch_axes, n)
    g = upcast(dy)
    dw = None if w is None else row_sum(n * g, w, batch_axes)
    dx = rms_vjp(n, root, unit, g if w is None else w * g)
    return downcast(dx, dy.dtype), downcast(dw, dy.dtype)


def rms_norm_jvp(cache: RmsNormCache, x_dot: Array = None, w_dot: Array = None, /) -> Array:
    """ẏ = w ṅ + ẇ n        where ṅ = (ẋ − n mean(n ẋ)) / √(mean x² + eps)"""
    _check.cache(cache, RmsNormCache, "rms_norm")
    n, root, unit, w = cache
    check_tangents(n, w, None, x_dot, w_dot, None)
    n_dot = rms_vjp(n, root, unit, or_zeros(x_dot, n.shape, n))
    return downcast(affine_jvp(n, n_dot, w, upcast(w_dot)), _check.dtype_of(n, x_dot, w_dot))


def rms_norm_vjp_jvp(
    cache: RmsNormCache, dy: Array, dy_dot: Array = None, x_dot: Array = None, w_dot: Array = None, /
) -> tuple[Array, Array]:
    """ḋx = J ġ − (ṅ ⟨n, g⟩ + n ⟨ṅ, g⟩ + J g ⟨n, ẋ⟩) / √(mean x² + eps)     ḋw = Σ ṅ dy + n ḋy

    The tangents of `rms_norm_vjp`. With g = w dy, and so ġ = w ḋy + ẇ dy; J = ∂n/∂x, which is symmetric; ⟨·,·⟩ the mean
    over D: J g = (g − n ⟨n, g⟩) / root differentiated, with root˙ = ⟨n, ẋ⟩.
    """
    _check.cache(cache, RmsNormCache, "rms_norm")
    n, root, unit, w = cache
    check_second(n, dy, dy_dot, x_dot=x_dot, w_dot=w_dot)
    check_tangents(n, w, None, x_dot, w_dot, None)
    dtype, dy, dy_dot, x_dot = dy.dtype, upcast(dy), or_zeros(dy_dot, n.shape, n), or_zeros(x_dot, n.shape, n)
    g, g_dot = weighted(w, upcast(w_dot), dy, dy_dot)
    n_dot, j_g, j_g_dot = (rms_vjp(n, root, unit, a) for a in (x_dot, g, g_dot))
    bent = n_dot * mean(n * g) + n * mean(n_dot * g) + j_g * mean(n * x_dot)
    dw_dot = None if w is None else row_sum(n_dot * dy + n * dy_dot, w)
    return downcast(j_g_dot - bent / root / unit, dtype), downcast(dw_dot, dtype)


class RMSNorm(NamedTuple):
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

    def apply_vjp(self, cache: Any, dy: Array, *, batch_axes: int = 0) -> tuple[Array, dict[str, Array]]:
        """dx, dparams"""
        dx, dw = rms_norm_vjp(cache, dy, batch_axes=batch_axes)
        return dx, present(w=dw)

    def apply_jvp(self, cache: Any, x_dot: Array, params_dot: dict[str, Array]) -> Array:
        """ẏ"""
        return rms_norm_jvp(cache, x_dot, params_dot.get("w"))

    def apply_vjp_jvp(
        self, cache: Any, dy: Array, dy_dot: Array, x_dot: Array, params_dot: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """ḋx, ḋparams"""
        dx_dot, dw_dot = rms_norm_vjp_jvp(cache, dy, dy_dot, x_dot, params_dot.get("w"))
        return dx_dot, present(w=dw_dot)
