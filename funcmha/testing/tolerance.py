"""How far off a correct implementation may be: an error bound for every entry of every output and gradient.

    bounds = mha_bounds(params, query, key, value, bias, dy, mask=mask, dtype="float32")
    assert_within(got, want, bounds.y, name="y")      got in float32, want in float64, from the same inputs

The bounds come from replaying an op and its vjp, line by line, in the arithmetic of `funcmha.testing.rounding`, whose
numbers know their errors. Its rules are derived, not fitted, and there is no factor in front.

Not covered: overflow, and sums over thousands of terms that are all but equal, whose roundings are not independent
(512 equal terms: measured at 3 times the bound).
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import tree
from funcmha._xp import HALF, Array
from funcmha.heads import extend, extend_scores
from funcmha.masks import Mask, dense
from funcmha.params import Params

from .rounding import TINY, Arithmetic, Rounded, Static, U, each, exact, host, name_of


def unit_roundoff(dtype: Any) -> float:
    """u, such that rounding x costs at most u |x|: 2⁻²⁴ for float32

    `dtype` is a name, or a dtype of any library. Raises TypeError unless it is one that funcmha takes.
    """
    return U[name_of(dtype)]


# ── to compare ───────────────────────────────────────────────────────────────────────────────────────────────────


def worst_ratio(got: Array, want: Array, bound: Array) -> float:
    """max |got − want| / bound      at most 1 for what is correct

    Equal entries count 0, −∞ and −∞ too; others ∞ where the bound is 0, or one of the three is not finite. No entries
    count 0. Raises ValueError unless all have one shape.
    """
    return float(np.max(_ratios(host(got), host(want), host(bound)), initial=0.0))


def assert_within(got: Array, want: Array, bound: Array, *, factor: float = 1.0, name: str = "result") -> None:
    """Raise AssertionError, which shows the worst entry, unless |got − want| ≤ factor · bound in each."""
    g, w, b = host(got), host(want), host(bound)
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
    recomputed: bool = False,
    dtype: Any,
) -> AttentionBounds:
    """Bounds for `attention`, its weights (before dropout) and lse, and its vjp, in `dtype`.

    recomputed  for what keeps no weights, and has them from the scores and lse when it needs them: exp(score − lse)
    """
    fl, mask = Arithmetic.of(dtype), host(dense(mask, q.shape[-2], k.shape[-2], None))
    q, k, v, bias, do, dweights, dlse = (exact(a) for a in (q, k, v, bias, do, dweights, dlse))
    static = Static(mask, scale, host(keep), rate, dweights, dlse, recomputed)
    o, p, lse, dq, dk, dv, dz = fl.attention(q, k, v, bias, do, static)
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
    recomputed: bool = False,
    dtype: Any,
) -> MhaBounds:
    """Bounds for `mha`, its weights (before dropout) and lse, and its vjp, in `dtype`; as in `attention_bounds`."""
    fl, T, S = Arithmetic.of(dtype), query.shape[-2], key.shape[-2]
    params = tree.map(exact, params)
    query, key, value, bias, dy, dweights, dlse = (exact(a) for a in (query, key, value, bias, dy, dweights, dlse))
    rows, zero = params.get("bias_kv", {"k": None, "v": None}), zero_attn
    extra = (rows["k"] is not None) + zero
    mask = extend_scores(host(dense(mask, T, S, None)), S, extra, True)

    q = fl.project(params["q_proj"], query)
    k = _extend(fl.project(params["k_proj"], key), rows["k"], zero)
    v = _extend(fl.project(params["v_proj"], value), rows["v"], zero)
    do = fl.combine_do(params["out_proj"], dy)
    o, p, lse, dq, dk, dv, dz = fl.attention(
        each(_swap_heads, q),
        each(_swap_heads, k),
        each(_swap_heads, v),
        each(lambda a: extend_scores(a, S, extra, 0.0), bias),
        each(_swap_heads, do),
        Static(mask, scale, host(keep), rate, dweights, dlse, recomputed),
    )
    o, dq, dk, dv = (each(_swap_heads, x) for x in (o, dq, dk, dv))
    y, dout_proj = fl.combine(params["out_proj"], o, dy)

    dq_proj, dquery = fl.project_vjp(params["q_proj"], query, dq)
    dk_proj, dkey = fl.project_vjp(params["k_proj"], key, each(lambda a: a[..., :S, :, :], dk))
    dv_proj, dvalue = fl.project_vjp(params["v_proj"], value, each(lambda a: a[..., :S, :, :], dv))
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj, "out_proj": dout_proj}
    if rows["k"] is not None:
        dparams["bias_kv"] = {name: fl.extend_drow(d, S) for name, d in (("k", dk), ("v", dv))}
    dbias = None if bias is None else fl.unbroadcast(each(lambda a: a[..., :S], dz), bias.value.shape)
    y, dparams, *dinputs = _bounds((y, dparams, dquery, dkey, dvalue, dbias), dtype)
    return MhaBounds(y, p.error, lse.error, dparams, *dinputs)


# ── shapes, dtypes ───────────────────────────────────────────────────────────────────────────────────────────────


def _swap_heads(a: Array) -> Array:
    """(..., T, H, D)   →   (..., H, T, D), and back"""
    return np.swapaxes(a, -2, -3)


def _extend(x: Rounded, row: Rounded | None, zero: bool) -> Rounded:
    """`heads.extend`"""
    value, error = (None, None) if row is None else row[:2]
    return Rounded(extend(x.value, value, zero), extend(x.error, error, zero))


def _bounds(results: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    return tuple(tree.map(lambda r: None if r is None else _stored(r, name_of(dtype)), r) for r in results)


def _stored(x: Rounded, dtype: str) -> Array:
    """The error of x, and one unit in the last place where it is rounded to 16 bits at the end."""
    if dtype not in HALF:
        return x.error
    _, exponent = np.frexp(x.value)
    ulp = 2 * U[dtype] * np.maximum(np.ldexp(0.5, exponent), TINY[dtype])
    return x.error + np.where((x.value != 0) | (x.error > 0), ulp, 0.0)
