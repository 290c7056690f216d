"""`l2_norm`: each row divided by its Euclidean norm.

Axes: D the width that is normalised over; `...` is batch.
"""

from typing import Any, NamedTuple

from funcmha import _check
from funcmha._arrays import Array, downcast, namespace, or_zeros, own, upcast

from .rows import INF, check_batch_axes, check_norm, check_second, check_tangents, leading_bit


class L2NormCache(NamedTuple):
    y: Array  # (..., D)
    root: Array  # (..., 1), max(‖x‖, eps) / unit; ∞ where that is 0
    unit: Array  # (..., 1), a power of two
    below: Array  # (..., 1), whether ‖x‖ < eps


def l2_norm(x: Array, /, *, eps: float) -> tuple[Array, L2NormCache]:
    """y = x / max(‖x‖, eps)        x (..., D)   →   y (..., D)

    eps is a floor under the norm, as in `torch.nn.functional.normalize`: shorter rows are x / eps, and all others have
    norm 1. With eps = 0 a row of zeros gives 0, with dx = 0. Raises TypeError for an unknown dtype,
    ValueError for a negative eps.
    """
    eps = check_norm(x, None, None, eps)
    dtype, x = x.dtype, upcast(x)
    xp, unit = namespace(x), leading_bit(x, eps)
    x, floor = x / unit, eps / unit
    root = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    below = xp.abs(root) < floor
    root = xp.where(below, floor, root)
    root = xp.where(root == 0, INF, root)
    y = x / root
    return own(downcast(y, dtype), y), L2NormCache(y, root, unit, below)


def l2_norm_vjp(cache: L2NormCache, dy: Array, /) -> tuple[Array]:
    """dx = (dy − y Σ y dy) / ‖x‖,   or dy / eps where ‖x‖ < eps"""
    _check.cache(cache, L2NormCache, "l2_norm")
    _check.cotangent("dy", dy, cache.y.shape, cache.y, "... D")
    return (downcast(_jacobian(cache, upcast(dy)), dy.dtype),)


def l2_norm_jvp(cache: L2NormCache, x_dot: Array = None, /) -> Array:
    """ẏ = (ẋ − y Σ y ẋ) / ‖x‖,   or ẋ / eps where ‖x‖ < eps"""
    _check.cache(cache, L2NormCache, "l2_norm")
    y = cache.y
    check_tangents(y, None, None, x_dot, None, None)
    return downcast(_jacobian(cache, or_zeros(x_dot, y.shape, y)), _check.dtype_of(y, x_dot))


def l2_norm_vjp_jvp(cache: L2NormCache, dy: Array, dy_dot: Array = None, x_dot: Array = None, /) -> tuple[Array]:
    """ḋx = J ḋy − (ẏ ⟨y, dy⟩ + y ⟨ẏ, dy⟩ + J dy ⟨y, ẋ⟩) / ‖x‖,   or ḋy / eps where ‖x‖ < eps

    The tangents of `l2_norm_vjp`. J = ∂y/∂x, which is symmetric, and ⟨·,·⟩ the sum over D.
    """
    _check.cache(cache, L2NormCache, "l2_norm")
    y = cache.y
    check_second(y, dy, dy_dot, x_dot=x_dot)
    check_tangents(y, None, None, x_dot, None, None)
    dtype, dy, dy_dot, x_dot = dy.dtype, upcast(dy), or_zeros(dy_dot, y.shape, y), or_zeros(x_dot, y.shape, y)
    y_dot, j_g, j_g_dot = (_jacobian(cache, a) for a in (x_dot, dy, dy_dot))
    bent = y_dot * _along(cache, y, dy) + y * _along(cache, y_dot, dy) + j_g * _along(cache, y, x_dot)
    return (downcast(j_g_dot - bent / cache.root / cache.unit, dtype),)


def _jacobian(cache: L2NormCache, g: Array) -> Array:
    """(g − y Σ y g) / root"""
    return (g - cache.y * _along(cache, cache.y, g)) / cache.root / cache.unit


def _along(cache: L2NormCache, a: Array, b: Array) -> Array:
    """Σ a b of each row (..., 1), and 0 where the norm is below its floor, and so constant"""
    xp = namespace(a)
    return xp.where(cache.below, 0.0, xp.sum(a * b, axis=-1, keepdims=True))


class L2Norm(NamedTuple):
    """`l2_norm` of queries and keys, which has no parameters (Henry et al. 2020)."""

    eps: float = 1e-12

    @property
    def leaves(self) -> tuple[str, ...]:
        """What it may have for parameters."""
        return ()

    def apply(self, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y = l2_norm(x)"""
        return l2_norm(x, eps=self.eps)

    def apply_vjp(self, cache: Any, dy: Array, *, batch_axes: int = 0) -> tuple[Array, dict[str, Array]]:
        """dx, {}"""
        (dx,) = l2_norm_vjp(cache, dy)
        check_batch_axes(batch_axes, dx)
        return dx, {}

    def apply_jvp(self, cache: Any, x_dot: Array, params_dot: dict[str, Array]) -> Array:
        """ẏ"""
        return l2_norm_jvp(cache, x_dot)

    def apply_vjp_jvp(
        self, cache: Any, dy: Array, dy_dot: Array, x_dot: Array, params_dot: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """ḋx, {}"""
        (dx_dot,) = l2_norm_vjp_jvp(cache, dy, dy_dot, x_dot)
        return dx_dot, {}
