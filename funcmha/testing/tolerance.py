"""How far off a correct implementation may be: an error bound for every entry of every output and gradient.

    bounds = mha_bounds(params, query, key, value, bias, dy, mask=mask, dtype="float32")
    assert_within(got, want, bounds.y, name="y")      got in float32, want in float64, from the same inputs

The bounds come from replaying an op and its vjp, line by line, in an arithmetic whose numbers know their errors. Its
rules are derived, not fitted, and there is no factor in front:

  * Roundings are independent, with mean 0. So the errors of the n terms of a sum add to √(Σ e²), and forming the sum
    adds (1 + √n) u Σ |terms|: Theorem 3.1 of Higham and Mary (SIAM J. Sci. Comput. 41(5), 2019) with λ = 1, where the
    1 makes it true of the shortest sums. Rows that are equal are rounded equally, and their errors add plainly; so do
    errors of different origin.
  * Softmax makes an absolute error of a score a relative error of its weight. A common shift cancels, so errors are
    counted from the largest weight, and a saturated row is exact (Blanchard, Higham and Higham, IMA J. Numer. Anal.
    41(4), 2021, Theorem 4.3, with the error of the scores themselves in place of that of their differences).
  * The total of a row, and Σ p dp in the gradient, are off by one amount for all keys. That does not average out over
    keys, and is carried apart: `Rounded.shared`.
  * What is smaller than the smallest normal number may be flushed to 0. What is 0 by structure (a masked weight, an
    empty row) has bound 0. Overflow is not covered.

float16 and bfloat16 are storage: the arithmetic is float32's, and the one rounding at the end may cost a unit in the
last place. Weights and lse stay float32 there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from funcmha import tree
from funcmha._xp import HALF, Array, unbroadcast
from funcmha.heads import extend, extend_scores
from funcmha.masks import Mask, dense
from funcmha.params import Params

U = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "complex128": 2.0**-53}
TINY = {
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    "float64": 2.0**-1022,
    "complex128": 2.0**-1022,
}
EXP = 4.0  # exp and log are off by 2 units in the last place at most, in NumPy, PyTorch and CUDA


def unit_roundoff(dtype: Any) -> float:
    """u, such that rounding x costs at most u |x|: 2⁻²⁴ for float32

    `dtype` is a name, or a dtype of any library. Raises TypeError unless it is one that funcmha takes.
    """
    return U[_name(dtype)]


# ── to compare ───────────────────────────────────────────────────────────────────────────────────────────────────


def worst_ratio(got: Array, want: Array, bound: Array) -> float:
    """max |got − want| / bound      at most 1 for what is correct

    Equal entries count 0, −∞ and −∞ too; others ∞ where the bound is 0, or one of the three is not finite. No entries
    count 0. Raises ValueError unless all have one shape.
    """
    return float(np.max(_ratios(_host(got), _host(want), _host(bound)), initial=0.0))


def assert_within(got: Array, want: Array, bound: Array, *, factor: float = 1.0, name: str = "result") -> None:
    """Raise AssertionError, which shows the worst entry, unless |got − want| ≤ factor · bound in each."""
    g, w, b = _host(got), _host(want), _host(bound)
    ratios = _ratios(g, w, b)
    failed = np.count_nonzero(ratios > factor)
    if failed:
        i = np.unravel_index(np.argmax(ratios), ratios.shape)
        raise AssertionError(
            f"{name}[{', '.join(map(str, i))}] must be {w[i]:.17g} within {factor:g} × {b[i]:.3g}, got {g[i]:.17g}, "
            f"off by {ratios[i]:.3g} × the bound; {failed} of {ratios.size} entries of {got.dtype} fail"
        )


def _ratios(got: Array, want: Array, bound: Array) -> Array:
    if not got.shape == want.shape == bound.shape:
        raise ValueError(f"got, want and bound must have one shape, got {got.shape}, {want.shape} and {bound.shape}")
    with np.errstate(all="ignore"):
        ratios = np.abs(got - want) / bound
    return np.where(got == want, 0.0, np.where(np.isfinite(ratios) & np.isfinite(bound), ratios, np.inf))


# ── the bounds ───────────────────────────────────────────────────────────────────────────────────────────────────


class LinearBounds(NamedTuple):
    y: Array
    dx: Array
    dw: Array
    db: Array


class AttentionBounds(NamedTuple):
    o: Array
    weights: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array
    dbias: Array


class MhaBounds(NamedTuple):
    y: Array
    weights: Array
    lse: Array
    dparams: Params
    dquery: Array
    dkey: Array
    dvalue: Array
    dbias: Array


def linear_bounds(x: Array, w: Array, b: Array, dy: Array, /, *, dtype: Any) -> LinearBounds:
    """Bounds for `linear` and its vjp in `dtype`. The arguments, of any dtype, are what is computed with, exactly."""
    fl = Arithmetic.of(dtype)
    x, w, b, dy = exact(x), exact(w), exact(b), exact(dy)
    return LinearBounds(*_bounds((fl.linear(x, w, b), *fl.linear_vjp(x, w, b, dy)), dtype))


def attention_bounds(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    do: Array,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | None = None,
    keep: Array = None,
    rate: float = 0.0,
    dweights: Array = None,
    dlse: Array = None,
    dtype: Any,
) -> AttentionBounds:
    """Bounds for `attention`, its weights (before dropout) and lse, and its vjp, in `dtype`."""
    fl, mask = Arithmetic.of(dtype), _host(dense(mask, q.shape[-2], k.shape[-2], None))
    q, k, v, bias, do, dweights, dlse = (exact(a) for a in (q, k, v, bias, do, dweights, dlse))
    o, p, lse, dq, dk, dv, dz = fl.attention(
        q, k, v, bias, do, mask=mask, scale=scale, keep=_host(keep), rate=rate, dweights=dweights, dlse=dlse
    )
    dbias = None if bias is None else fl.unbroadcast(dz, bias.value.shape)
    o, dq, dk, dv, dbias = _bounds((o, dq, dk, dv, dbias), dtype)
    return AttentionBounds(o, p.error, lse.error, dq, dk, dv, dbias)


def mha_bounds(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    dy: Array,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | None = None,
    zero_attn: bool = False,
    keep: Array = None,
    rate: float = 0.0,
    dweights: Array = None,
    dlse: Array = None,
    dtype: Any,
) -> MhaBounds:
    """Bounds for `mha`, its weights (before dropout) and lse, and its vjp, in `dtype`."""
    fl, T, S = Arithmetic.of(dtype), query.shape[-2], key.shape[-2]
    params = tree.map(exact, params)
    query, key, value, bias, dy, dweights, dlse = (exact(a) for a in (query, key, value, bias, dy, dweights, dlse))
    rows = params.get("bias_kv", {"k": None, "v": None})
    extra = (rows["k"] is not None) + zero_attn
    mask = extend_scores(_host(dense(mask, T, S, None)), S, extra, True)
    all_bias = None if bias is None else each(lambda a: extend_scores(a, S, extra, 0.0), bias)
    wo, bo = each(lambda a: a.reshape(len(a), -1), params["out_proj"]["w"]), params["out_proj"].get("b")

    q = fl.project(params["q_proj"], query)
    k = _extend(fl.project(params["k_proj"], key), rows["k"], zero_attn)
    v = _extend(fl.project(params["v_proj"], value), rows["v"], zero_attn)
    do = each(lambda a: a.reshape(*a.shape[:-1], *params["out_proj"]["w"].value.shape[1:]), fl.matmul(dy, wo))
    o, p, lse, dq, dk, dv, dz = fl.attention(
        each(_swap_heads, q),
        each(_swap_heads, k),
        each(_swap_heads, v),
        all_bias,
        each(_swap_heads, do),
        mask=mask,
        scale=scale,
        keep=_host(keep),
        rate=rate,
        dweights=dweights,
        dlse=dlse,
    )
    o, dq, dk, dv = (each(_swap_heads, x) for x in (o, dq, dk, dv))
    o = each(lambda a: a.reshape(*a.shape[:-2], -1), o)
    y = fl.linear(o, wo, bo)

    _, dwo, dbo = fl.linear_vjp(o, wo, bo, dy)
    dq_proj, dquery = fl.project_vjp(params["q_proj"], query, dq)
    dk_proj, dkey = fl.project_vjp(params["k_proj"], key, each(lambda a: a[..., :S, :, :], dk))
    dv_proj, dvalue = fl.project_vjp(params["v_proj"], value, each(lambda a: a[..., :S, :, :], dv))
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj, "out_proj": _like(params["out_proj"], dwo, dbo)}
    if rows["k"] is not None:
        dk_row, dv_row = (each(lambda a: a[..., S, :, :], d) for d in (dk, dv))
        dparams["bias_kv"] = {
            "k": fl.unbroadcast(dk_row, rows["k"].value.shape),
            "v": fl.unbroadcast(dv_row, rows["v"].value.shape),
        }
    dbias = None if bias is None else fl.unbroadcast(each(lambda a: a[..., :S], dz), bias.value.shape)
    y, dparams, *dinputs = _bounds((y, dparams, dquery, dkey, dvalue, dbias), dtype)
    return MhaBounds(y, p.error, lse.error, dparams, *dinputs)


# ── an arithmetic whose numbers know their errors ────────────────────────────────────────────────────────────────


class Rounded(NamedTuple):
    value: Array  # in exact arithmetic
    error: Array  # |computed − value| ≤ error
    shared: Array  # the part of it that is one unknown in [−1, 1] for a row, times this; or None


def exact(x: Array) -> Any:
    """x, or None, with no error."""
    return None if x is None else Rounded(_host(x), np.zeros(x.shape), None)


def each(f: Callable[[Array], Array], x: Any) -> Any:
    """f of the value and f of the error of x, where f only moves numbers about; None for None."""
    return None if x is None else Rounded(*(None if a is None else f(a) for a in x))


def transpose(x: Rounded) -> Rounded:
    """What rows share, columns do not."""
    return Rounded(_transpose(x.value), _transpose(x.error), None)


def tie(x: Rounded) -> Rounded:
    """x, about to be summed over its rows: of m equal rows, the errors add to m e, and not to √m e."""
    *batch, T, n = x.value.shape
    mark = np.sum(x.value * np.cos(np.arange(n)), axis=-1).astype(np.float32)
    matrix = np.arange(np.prod(batch, dtype=int)).reshape(*batch, 1)
    _, row, count = np.unique(mark + 1j * matrix, return_inverse=True, return_counts=True)
    return x._replace(error=x.error * np.sqrt(count[row].reshape(*batch, T, 1)))


class Arithmetic(NamedTuple):
    """Floating-point arithmetic on `Rounded`: the primitives, then `funcmha.ops` written in them."""

    u: float
    tiny: float  # the smallest normal number

    @classmethod
    def of(cls, dtype: Any) -> "Arithmetic":
        """The arithmetic that is done on arrays of `dtype`."""
        name = "float32" if _name(dtype) in HALF else _name(dtype)
        return cls(U[name], TINY[name])

    def rounding(self, size: Array, n: int = 0) -> Array:
        """Of a sum of n products, Σ |terms| = size; with n = 0, of a single operation on its result."""
        return (1 + n**0.5) * np.where(size > 0, self.u * size + self.tiny, 0.0)

    def add(self, x: Rounded, y: Rounded) -> Rounded:
        """x + y"""
        value = x.value + y.value
        return Rounded(value, x.error + y.error + self.rounding(np.abs(value)), None)

    def times(self, x: Rounded, c: Array | float) -> Rounded:
        """x c, where c is exact"""
        value = x.value * c
        error = x.error * np.abs(c) + self.rounding(np.abs(value))
        return Rounded(value, error, None if x.shared is None else x.shared * c)

    def matmul(self, x: Rounded, y: Rounded) -> Rounded:
        """x y"""
        error = self.rounding(np.abs(x.value) @ np.abs(y.value), x.value.shape[-1])
        if np.any(x.error):
            error += np.sqrt(x.error**2 @ y.value**2)
        if np.any(y.error):
            error += np.sqrt((np.abs(x.value) + x.error) ** 2 @ y.error**2)
        if x.shared is not None:
            error += np.abs(x.shared @ y.value)
        return Rounded(x.value @ y.value, error, None)

    def unbroadcast(self, x: Rounded, shape: tuple[int, ...]) -> Rounded:
        """The sum over the axes along which `shape` was broadcast."""
        if x.value.shape == shape:
            return x
        size = unbroadcast(np.abs(x.value), shape)
        error = self.rounding(size, x.value.size // max(size.size, 1)) + np.sqrt(unbroadcast(x.error**2, shape))
        if x.shared is not None and shape[-1:] in ((), (1,)):
            error += np.sqrt(unbroadcast(np.sum(x.shared, axis=-1, keepdims=True) ** 2, shape))
        return Rounded(unbroadcast(x.value, shape), error, None)

    def linear(self, x: Rounded, w: Rounded, b: Rounded | None) -> Rounded:
        """`ops.linear`"""
        y = self.matmul(x, transpose(w))
        return y if b is None else self.add(y, b)

    def linear_vjp(self, x: Rounded, w: Rounded, b: Rounded | None, dy: Rounded) -> tuple[Any, ...]:
        """`ops.linear_vjp`"""
        rows, drows = (tie(each(lambda a: a.reshape(-1, a.shape[-1]), a)) for a in (x, dy))
        dx = self.matmul(dy, w)
        dw = self.matmul(transpose(drows), rows)
        db = None if b is None else self.unbroadcast(drows, b.value.shape)
        return dx, dw, db

    def project(self, p: Params, x: Rounded) -> Rounded:
        """`heads.project`"""
        return each(lambda a: a.reshape(*a.shape[:-1], *p["w"].value.shape[:2]), self.linear(x, *_stacked(p)))

    def project_vjp(self, p: Params, x: Rounded, dy: Rounded) -> tuple[Params, Rounded]:
        """`heads.project_vjp`"""
        dx, dw, db = self.linear_vjp(x, *_stacked(p), each(lambda a: a.reshape(*a.shape[:-2], -1), dy))
        return _like(p, dw, db), dx

    def softmax(self, z: Rounded, allowed: Array) -> tuple[Rounded, Rounded]:
        """`ops.softmax`: p and lse"""
        u, n = self.u, z.value.shape[-1] ** 0.5
        x = np.where(allowed, z.value, -np.inf)
        top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
        empty = np.isneginf(top)
        top = np.where(empty, 0.0, top)
        e = np.exp(x - top)
        total = np.where(empty, 1.0, np.sum(e, axis=-1, keepdims=True))
        p, lse = e / total, np.where(empty, -np.inf, top + np.log(total))

        below = np.where(allowed, top - x, 0.0)
        score = np.where(allowed, z.error, 0.0)
        own = score + u * (below + EXP)  # relative, of e
        first = (x == top) & (np.cumsum(x == top, axis=-1) == 1)
        own = np.where(first, 0.0, own + np.sum(own * first, axis=-1, keepdims=True))
        common = np.sqrt(np.sum((p * own) ** 2, axis=-1, keepdims=True)) + u * (2 + n)
        # p (1 − exp(−r)) for p up to p exp(r), as first order will not do where scores are off by more than 1
        r = own + common
        error = np.exp(np.minimum(r - below - np.log(total), 0.0)) * -np.expm1(-r)
        weights = Rounded(p, np.where(allowed, error + self.tiny, 0.0), p * np.minimum(common, 1.0))

        shift = np.log1p(np.sum(p * np.expm1(np.minimum(score, 700.0)), axis=-1, keepdims=True))
        size = np.sum(p * (below + EXP), axis=-1, keepdims=True) + 1 + n + EXP * np.log(total) + np.abs(lse)
        return weights, Rounded(lse[..., 0], np.where(empty, 0.0, shift + u * size)[..., 0], None)

    def softmax_vjp(self, p: Rounded, dp: Rounded, dlse: Rounded | None) -> Rounded:
        """`ops._softmax_vjp`"""
        delta = self.matmul(each(lambda a: a[..., None, :], p), each(lambda a: a[..., None], dp))
        delta = each(lambda a: a[..., 0], delta)
        size = np.abs(dp.value) + np.abs(delta.value)
        g, common = dp.value - delta.value, delta.error
        if dlse is not None:
            g, size = g + dlse.value[..., None], size + np.abs(dlse.value[..., None])
        error = (p.value + p.error) * (dp.error + common + 2 * self.rounding(size)) + p.error * np.abs(g)
        return Rounded(p.value * g, error + self.rounding(np.abs(p.value * g)), p.value * common)

    def attention(
        self,
        q: Rounded,
        k: Rounded,
        v: Rounded,
        bias: Rounded | None,
        do: Rounded,
        *,
        mask: Array,
        scale: float | None,
        keep: Array,
        rate: float,
        dweights: Rounded | None,
        dlse: Rounded | None,
    ) -> tuple[Rounded, ...]:
        """`ops.attention` and `ops.attention_vjp`: o, p, lse, dq, dk, dv, dz"""
        (*lead, D), S = q.value.shape, k.value.shape[-2]
        scale = max(D, 1) ** -0.5 if scale is None else scale
        dropout = 1.0 if keep is None else keep / (1 - rate)
        allowed = np.broadcast_to(True if mask is None else mask, (*lead, S))
        if bias is not None:
            allowed = allowed & (bias.value > -np.inf)
            bias = each(lambda a: np.where(np.isneginf(a), 0.0, a), bias)
        group = 1 if q.value.ndim < 3 else q.value.shape[-3] // max(k.value.shape[-3], 1)
        seen = np.any(allowed, axis=-2)[..., None]
        kh, vh = (each(lambda a: np.where(seen, a if group == 1 else np.repeat(a, group, -3), 0.0), a) for a in (k, v))

        z = self.matmul(self.times(q, scale), transpose(kh))
        z = z if bias is None else self.add(z, bias)
        p, lse = self.softmax(z, allowed)
        a = self.times(p, dropout)
        o = self.matmul(a, vh)

        dv = self.matmul(transpose(tie(a)), tie(do))
        dp = self.times(self.matmul(do, transpose(vh)), dropout)
        dp = dp if dweights is None else self.add(dp, dweights)
        dz = self.softmax_vjp(p, dp, dlse)
        dk = self.matmul(transpose(tie(dz)), tie(self.times(q, scale)))
        dq = self.times(self.matmul(dz, kh), scale)
        return o, p, lse, dq, self.per_key_head(dk, group), self.per_key_head(dv, group), dz

    def per_key_head(self, g: Rounded, group: int) -> Rounded:
        """`ops._per_key_head`"""
        if group == 1:
            return g
        *batch, H, S, D = g.value.shape
        g = each(lambda a: a.reshape(*batch, H // group, group, S, D), g)
        return each(lambda a: a[..., 0, :, :], self.unbroadcast(g, (*batch, H // group, 1, S, D)))


# ── shapes, dtypes ───────────────────────────────────────────────────────────────────────────────────────────────


def _transpose(a: Array) -> Array:
    return np.swapaxes(a, -1, -2)


def _swap_heads(a: Array) -> Array:
    """(..., T, H, D)   →   (..., H, T, D), and back"""
    return np.swapaxes(a, -2, -3)


def _extend(x: Rounded, row: Rounded | None, zero: bool) -> Rounded:
    """`heads.extend`"""
    value, error = (None, None) if row is None else row[:2]
    return Rounded(extend(x.value, value, zero), extend(x.error, error, zero), None)


def _stacked(p: Params) -> tuple[Rounded, Rounded | None]:
    """w and b of all heads, as the rows of one matrix."""
    return each(lambda a: a.reshape(-1, a.shape[-1]), p["w"]), each(np.ravel, p.get("b"))


def _like(p: Params, w: Rounded, b: Rounded | None) -> Params:
    """w and b in the shapes of p."""
    leaves = {"w": w, "b": b}
    return {name: each(lambda a, name=name: a.reshape(p[name].value.shape), leaves[name]) for name in p}


def _bounds(results: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    return tuple(tree.map(lambda r: None if r is None else _stored(r, _name(dtype)), r) for r in results)


def _stored(x: Rounded, dtype: str) -> Array:
    """The error of x, and one unit in the last place where it is rounded to 16 bits at the end."""
    if dtype not in HALF:
        return x.error
    _, exponent = np.frexp(x.value)
    ulp = 2 * U[dtype] * np.maximum(np.ldexp(0.5, exponent), TINY[dtype])
    return x.error + np.where((x.value != 0) | (x.error > 0), ulp, 0.0)


def _host(x: Array) -> Array:
    """x, from any library, as a NumPy array: float64, or boolean."""
    if x is None:
        return None
    if type(x).__module__.startswith("cupy"):
        x = x.get()
    if type(x).__module__.startswith("torch"):
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    x = np.asarray(x)
    return x if x.dtype == bool else x.astype(np.float64)


def _name(dtype: Any) -> str:
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if name not in U:
        raise TypeError(f"dtype must be one of {', '.join(U)}, got {dtype!r}")
    return str(name)
