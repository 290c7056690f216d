"""Norms over the last axis, for queries and keys before their scores: `rms_norm`, `l2_norm`, `layer_norm`.

    y, cache = rms_norm(x, w, eps=1e-6)
    dx, dw   = rms_norm_vjp(cache, dy)                               and so the jvp, and the tangents of the vjp
    y, cache = mha(params, x, x, x, qk_norm=RMSNorm(eps=1e-6))       a norm as a static value, for `mha`

Rows of any size are rows like others: each is divided by a power of two near its largest magnitude, which is exact,
before anything is squared. Where eps = 0 leaves nothing to divide by, a row of zeros (for `layer_norm` of one number
D times) is normalised to 0, and its x has gradient 0, whatever the finite cotangent; the formula has neither value nor
derivative there, and PyTorch gives NaN. An eps too small for the dtype of x counts as 0. A row with an infinity or a
NaN has a NaN.

Each is y = w n + b of normalised rows n, where the Jacobian J = ∂n/∂x is symmetric: (I − n nᵀ / D) / root for
`rms_norm`. So a jvp multiplies by what the vjp multiplies by, and one set of derivatives serves all three.

Axes: D the width that is normalised over; `...` is batch.
"""

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar, NamedTuple

from . import _check
from ._arrays import Array, downcast, full, namespace, or_zeros, own, quiet_underflow, row_blocks, upcast

__all__ = [
    "L2Norm",
    "LayerNorm",
    "RMSNorm",
    "l2_norm",
    "l2_norm_jvp",
    "l2_norm_vjp",
    "l2_norm_vjp_jvp",
    "layer_norm",
    "layer_norm_jvp",
    "layer_norm_vjp",
    "layer_norm_vjp_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "rms_norm_vjp",
    "rms_norm_vjp_jvp",
]

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
    dtype, x, w = x.dtype, upcast(x), upcast(w)
    w = w + offset if offset else w
    n, root, unit = _rms(x, eps**0.5)
    return own(downcast(_affine(n, w), dtype), n), RmsNormCache(n, root, unit, w)


def rms_norm_vjp(cache: RmsNormCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array, Array]:
    """dx = (g − n mean(n g)) / √(mean x² + eps)     dw = Σ n dy        where w has the offset, g = w dy, n = y / w

    batch_axes   how many of the first axes of x the sum is not over: dw is (*x.shape[:batch_axes], D)
    """
    _check.cache(cache, RmsNormCache, "rms_norm")
    return _gradients(cache, cache.w, None, dy, batch_axes)[:2]


def rms_norm_jvp(cache: RmsNormCache, x_dot: Array = None, w_dot: Array = None, /) -> Array:
    """ẏ = w ṅ + ẇ n        where ṅ = (ẋ − n mean(n ẋ)) / √(mean x² + eps)"""
    _check.cache(cache, RmsNormCache, "rms_norm")
    return _tangent(cache, cache.w, None, x_dot, w_dot)


def rms_norm_vjp_jvp(
    cache: RmsNormCache, dy: Array, dy_dot: Array = None, x_dot: Array = None, w_dot: Array = None, /
) -> tuple[Array, Array]:
    """ḋx = J ġ − (ṅ ⟨n, g⟩ + n ⟨ṅ, g⟩ + J g ⟨n, ẋ⟩) / √(mean x² + eps)     ḋw = Σ ṅ dy + n ḋy

    The tangents of `rms_norm_vjp`. With g = w dy, and so ġ = w ḋy + ẇ dy; J = ∂n/∂x, which is symmetric; ⟨·,·⟩ the mean
    over D: J g = (g − n ⟨n, g⟩) / root differentiated, with root˙ = ⟨n, ẋ⟩.
    """
    _check.cache(cache, RmsNormCache, "rms_norm")
    return _tangents_of_gradients(cache, cache.w, None, dy, dy_dot, x_dot, w_dot)[:2]


# ── l2_norm ──────────────────────────────────────────────────────────────────────────────────────────────────────


class L2NormCache(NamedTuple):
    n: Array  # (..., D), which is y
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
    dtype, x = x.dtype, upcast(x)
    xp, unit = namespace(x), _leading_bit(x, eps)
    x, floor = x / unit, eps / unit
    root = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    below = xp.abs(root) < floor
    root = xp.where(below, floor, root)
    root = xp.where(root == 0, INF, root)
    n = x / root
    return own(downcast(n, dtype), n), L2NormCache(n, root, unit, below)


def l2_norm_vjp(cache: L2NormCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array]:
    """dx = (dy − y Σ y dy) / ‖x‖,   or dy / eps where ‖x‖ < eps

    batch_axes   as for the other norms: there are no sums here that it could say anything of
    """
    _check.cache(cache, L2NormCache, "l2_norm")
    return _gradients(cache, None, None, dy, batch_axes)[:1]


def l2_norm_jvp(cache: L2NormCache, x_dot: Array = None, /) -> Array:
    """ẏ = (ẋ − y Σ y ẋ) / ‖x‖,   or ẋ / eps where ‖x‖ < eps"""
    _check.cache(cache, L2NormCache, "l2_norm")
    return _tangent(cache, None, None, x_dot)


def l2_norm_vjp_jvp(cache: L2NormCache, dy: Array, dy_dot: Array = None, x_dot: Array = None, /) -> tuple[Array]:
    """ḋx = J ḋy − (ẏ ⟨y, dy⟩ + y ⟨ẏ, dy⟩ + J dy ⟨y, ẋ⟩) / ‖x‖,   or ḋy / eps where ‖x‖ < eps

    The tangents of `l2_norm_vjp`. J = ∂y/∂x, which is symmetric, and ⟨·,·⟩ the sum over D.
    """
    _check.cache(cache, L2NormCache, "l2_norm")
    return _tangents_of_gradients(cache, None, None, dy, dy_dot, x_dot)[:1]


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
    dtype, x, w, b = x.dtype, upcast(x), upcast(w), upcast(b)
    c, scale = _centred(x)
    n, root, unit = _rms(c, eps**0.5 * scale)
    return own(downcast(_affine(n, w, b), dtype), n), LayerNormCache(n, root, unit, scale, w, b)


def layer_norm_vjp(cache: LayerNormCache, dy: Array, /, *, batch_axes: int = 0) -> tuple[Array, Array, Array]:
    """dx = (h − n mean(n h)) / √(var x + eps)     dw = Σ n dy     db = Σ dy        where g = w dy, h = g − mean g

    batch_axes   how many of the first axes of x the sums are not over: dw and db are (*x.shape[:batch_axes], D)
    """
    _check.cache(cache, LayerNormCache, "layer_norm")
    return _gradients(cache, cache.w, cache.b, dy, batch_axes)


def layer_norm_jvp(cache: LayerNormCache, x_dot: Array = None, w_dot: Array = None, b_dot: Array = None, /) -> Array:
    """ẏ = w ṅ + ẇ n + ḃ        where ṅ = (h − n mean(n h)) / √(var x + eps), h = ẋ − mean ẋ"""
    _check.cache(cache, LayerNormCache, "layer_norm")
    return _tangent(cache, cache.w, cache.b, x_dot, w_dot, b_dot)


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
    return _tangents_of_gradients(cache, cache.w, cache.b, dy, dy_dot, x_dot, w_dot, b_dot)


def _centred(x: Array) -> tuple[Array, Array]:
    """scale · (x − mean x), and scale: a power of two with which no sum overflows, and no mean is subnormal."""
    xp, size = namespace(x), _largest(x)
    down = 0.5 ** (4 * x.shape[-1]).bit_length()  # the D differences may be twice as large as x
    scale = xp.where(size > 1, down, xp.where(size < 2.0**-64, 2.0**64, xp.ones_like(size)))
    x = x * scale
    # The shift changes nothing in exact arithmetic; in a row of one number it leaves 0, where x − mean x may not.
    x = x - x[..., :1]
    return x - _mean(x), scale


# ── derivatives of y = w n + b ───────────────────────────────────────────────────────────────────────────────────

Cache = RmsNormCache | L2NormCache | LayerNormCache


def _affine(n: Array, w: Array, b: Array = None) -> Array:
    """y = w n + b"""
    y = n if w is None else n * w
    return y if b is None else y + b


@quiet_underflow
def _gradients(cache: Cache, w: Array, b: Array, dy: Array, batch_axes: int) -> tuple[Any, ...]:
    """dx = J g     dw = Σ n dy     db = Σ dy        where g = w dy"""
    n = cache.n
    _check.cotangent("dy", dy, n.shape, n, "... D")
    if _check.integer("batch_axes", batch_axes, 0) > n.ndim - 1:
        raise ValueError(f"batch_axes must be at most {n.ndim - 1}, as x is {tuple(n.shape)}, got {batch_axes}")
    dtype, g = dy.dtype, upcast(dy)
    db = None if b is None else _row_sum(g, b, batch_axes)
    dw = None if w is None else _row_sum(n * g, w, batch_axes)
    dx = _jacobian(cache, g if w is None else w * g)
    return downcast(dx, dtype), downcast(dw, dtype), downcast(db, dtype)


@quiet_underflow
def _tangent(cache: Cache, w: Array, b: Array, x_dot: Array, w_dot: Array = None, b_dot: Array = None) -> Array:
    """ẏ = w ṅ + ẇ n + ḃ        where ṅ = J ẋ"""
    n = cache.n
    _check_tangents(n, w, b, x_dot, w_dot, b_dot)
    y_dot = _affine(_jacobian(cache, or_zeros(x_dot, n.shape, n)), w)
    y_dot = y_dot if w_dot is None else y_dot + upcast(w_dot) * n
    y_dot = y_dot if b_dot is None else y_dot + upcast(b_dot)
    return downcast(y_dot, _check.dtype_of(n, x_dot, w_dot, b_dot))


@quiet_underflow
def _tangents_of_gradients(
    cache: Cache, w: Array, b: Array, dy: Array, dy_dot: Array, x_dot: Array, w_dot: Array = None, b_dot: Array = None
) -> tuple[Any, ...]:
    """ḋx = J ġ − (ṅ ⟨n, g⟩ + n ⟨ṅ, g⟩ + J g ⟨n, ẋ⟩) / root     ḋw = Σ ṅ dy + n ḋy     ḋb = Σ ḋy     ġ = w ḋy + ẇ dy"""
    n = cache.n
    _check_tangents(n, w, b, x_dot, w_dot, b_dot, dy=dy, dy_dot=dy_dot)
    _check.cotangent("dy", dy, n.shape, n, "... D")
    _check.tangent("dy_dot", dy_dot, n.shape, n, "... D")
    dtype, dy, w_dot = dy.dtype, upcast(dy), upcast(w_dot)
    dy_dot, x_dot = or_zeros(dy_dot, n.shape, n), or_zeros(x_dot, n.shape, n)
    g, g_dot = _affine(dy, w), _affine(dy_dot, w)
    g_dot = g_dot if w_dot is None else g_dot + w_dot * dy
    n_dot, j_g, j_g_dot = (_jacobian(cache, a) for a in (x_dot, g, g_dot))
    bent = n_dot * _inner(cache, n, g) + n * _inner(cache, n_dot, g) + j_g * _inner(cache, n, x_dot)
    dw_dot = None if w is None else _row_sum(n_dot * dy + n * dy_dot, w)
    db_dot = None if b is None else _row_sum(dy_dot, b)
    return downcast(j_g_dot - _over_root(cache, bent), dtype), downcast(dw_dot, dtype), downcast(db_dot, dtype)


def _jacobian(cache: Cache, g: Array) -> Array:
    """J g = (h − n ⟨n, h⟩) / root        where h = g, and for `layer_norm` g − mean g

    x − mean x is its own adjoint, and may come before that of the root, as mean n = 0.
    """
    h = g - _mean(g) if isinstance(cache, LayerNormCache) else g
    return _over_root(cache, h - cache.n * _inner(cache, cache.n, h))


def _inner(cache: Cache, a: Array, b: Array) -> Array:
    """⟨a, b⟩ of each row (..., 1): mean a b, but for `l2_norm` Σ a b, and 0 where its root is the constant eps"""
    if not isinstance(cache, L2NormCache):
        return _mean(a * b)
    xp = namespace(a)
    return xp.where(cache.below, 0.0, xp.sum(a * b, axis=-1, keepdims=True))


def _over_root(cache: Cache, g: Array) -> Array:
    """g / root, in steps, as root · unit may overflow"""
    g = g / cache.root / cache.unit
    return g * cache.scale if isinstance(cache, LayerNormCache) else g


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _leading_bit(x: Array, floor: Array | float) -> Array:
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


def _rms(x: Array, floor: Array | float) -> tuple[Array, Array, Array]:
    """n = x / √(mean x² + floor²), and that root as root · unit."""
    xp, unit = namespace(x), _leading_bit(x, floor)
    x, floor = x / unit, floor / unit
    root = xp.sqrt(_mean(x * x) + floor * floor)
    root = xp.where(root == 0, INF, root)
    return x / root, root, unit


def _row_sum(g: Array, like: Array, batch_axes: int = 0) -> Array:
    """Σ g over the batch: (..., D)   →   (D,) as `like`, in blocks as `linear_vjp` sums; not over `batch_axes` axes"""
    xp, batch, D = namespace(g), g.shape[:batch_axes], g.shape[-1]
    n = prod(g.shape[batch_axes:-1])
    rows = xp.reshape(g, (*batch, n, D))
    return sum((xp.sum(rows[..., i, :], axis=-2) for i in row_blocks(n)), start=full((*batch, D), 0.0, like))


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_norm(x: Array, w: Array, b: Array, eps: float) -> float:
    """eps as a float, of a norm with these parameters."""
    _check.arrays(("x", x, "... D"), optional=[("w", w, "D"), ("b", b, "D")])
    return _check.number("eps", eps, 0.0)


def _check_tangents(n: Array, w: Array, b: Array, x_dot: Array, w_dot: Array, b_dot: Array, **beside: Array) -> None:
    """Raise unless each is None, or what it is the tangent of has its shape and dtype, and so has what is beside it."""
    _check.one_dtype(optional=[*beside.items(), ("x_dot", x_dot), ("w_dot", w_dot), ("b_dot", b_dot)])
    _check.tangent("x_dot", x_dot, n.shape, n, "... D")
    _check.tangent("w_dot", w_dot, _check.shape_of(w), n, "D")
    _check.tangent("b_dot", b_dot, _check.shape_of(b), n, "D")


# ── values for `mha` ─────────────────────────────────────────────────────────────────────────────────────────────


class Norm:
    """A norm of queries and keys as a static value: its functions, with a dict of the parameters that there are."""

    __slots__ = ()
    eps: float
    leaves: ClassVar[tuple[str, ...]]  # what it may have for parameters
    functions: ClassVar[tuple[Callable[..., Any], ...]]  # itself, its vjp, its jvp, and the tangents of its vjp

    def apply(self: Any, x: Array, params: dict[str, Array]) -> tuple[Array, Any]:
        """y, cache"""
        found: tuple[Array, Any] = self.functions[0](x, *map(params.get, self.leaves), **self._asdict())
        return found

    def apply_vjp(self, cache: Any, dy: Array, *, batch_axes: int = 0) -> tuple[Array, dict[str, Array]]:
        """dx, dparams"""
        return self._named(*self.functions[1](cache, dy, batch_axes=batch_axes))

    def apply_jvp(self, cache: Any, x_dot: Array, params_dot: dict[str, Array]) -> Array:
        """ẏ"""
        return self.functions[2](cache, x_dot, *map(params_dot.get, self.leaves))

    def apply_vjp_jvp(
        self, cache: Any, dy: Array, dy_dot: Array, x_dot: Array, params_dot: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """ḋx, ḋparams"""
        return self._named(*self.functions[3](cache, dy, dy_dot, x_dot, *map(params_dot.get, self.leaves)))

    def _named(self, dx: Array, *grads: Array) -> tuple[Array, dict[str, Array]]:
        return dx, {leaf: grad for leaf, grad in zip(self.leaves, grads, strict=True) if grad is not None}


class _RMSNorm(NamedTuple):
    eps: float = 1e-6
    offset: float = 0.0  # to be added to w


class RMSNorm(Norm, _RMSNorm):
    """`rms_norm` of queries and keys, by q_norm.w and k_norm.w if there are any: Qwen 3, and Gemma 3 with offset 1."""

    __slots__ = ()
    leaves = ("w",)
    functions = (rms_norm, rms_norm_vjp, rms_norm_jvp, rms_norm_vjp_jvp)


class _L2Norm(NamedTuple):
    eps: float = 1e-12


class L2Norm(Norm, _L2Norm):
    """`l2_norm` of queries and keys, which has no parameters (Henry et al. 2020)."""

    __slots__ = ()
    leaves = ()
    functions = (l2_norm, l2_norm_vjp, l2_norm_jvp, l2_norm_vjp_jvp)


class _LayerNorm(NamedTuple):
    eps: float = 1e-5


class LayerNorm(Norm, _LayerNorm):
    """`layer_norm` of queries and keys, by q_norm and k_norm, w and b, if there are any (Dehghani et al. 2023)."""

    __slots__ = ()
    leaves = ("w", "b")
    functions = (layer_norm, layer_norm_vjp, layer_norm_jvp, layer_norm_vjp_jvp)
