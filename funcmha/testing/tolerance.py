"""The largest error of a correct implementation: a bound for every entry of every output and gradient.

    bounds = mha_bounds(params, query, key, value, bias, dy, mask=mask, dtype="float32")
    assert_within(got, want, bounds.y, name="y")      got in float32, want in float64, from the same inputs

The bounds come from replaying an op and its vjp, line by line, in the arithmetic of `funcmha.testing.rounding`, whose
numbers carry their errors. Its rules are derived, not fitted, and there is no factor in front.

Not covered: overflow, and sums over thousands of almost equal terms, whose roundings are not independent (512 equal
terms: measured at 3 times the bound).
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import tree
from funcmha._arguments import AttentionOptions, HeadOptions, check_names, takes
from funcmha._arrays import HALF, Array, heads_first, heads_last, quiet_underflow
from funcmha.biases import ArrayBias, RelativeBias, as_bias
from funcmha.mha import append_rows
from funcmha.params import Params

from .profiles import STRICT, Profile, profile_of
from .rounding import TINY, Arithmetic, Maybe, Rounded, U, each, exact, host, name_of
from .rounding_attention import attention
from .rounding_position import position, position_vjp

__all__ = [
    "AttentionBounds",
    "LinearBounds",
    "MhaBounds",
    "assert_within",
    "attention_bounds",
    "linear_bounds",
    "mha_bounds",
    "unit_roundoff",
    "worst_ratio",
]


def unit_roundoff(dtype: Any) -> float:
    """u, such that rounding x costs at most u |x|: 2⁻²⁴ for float32

    `dtype` is a name, or a dtype of any library. Raises TypeError for dtypes that funcmha does not support.
    """
    return U[name_of(dtype)]


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────


def worst_ratio(got: Array, want: Array, bound: Array) -> float:
    """max |got − want| / bound      at most 1 for correct results

    Equal entries count as 0, also −∞ and −∞; others as ∞ where the bound is 0, or one of the three is not finite.
    Arrays without entries count as 0. Raises ValueError unless all have one shape.
    """
    return float(np.max(_ratios(host(got), host(want), host(bound)), initial=0.0))


def assert_within(got: Array, want: Array, bound: Array, *, factor: float = 1.0, name: str = "result") -> None:
    """Raise AssertionError, which names the worst entry, unless |got − want| ≤ factor · bound in every entry."""
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
    dbias: Array | RelativeBias
    dsink: Array


class MhaBounds(NamedTuple):
    y: Array
    weights: Array
    lse: Array
    dparams: Params
    dquery: Array
    dkey: Array
    dvalue: Array
    dbias: Array | RelativeBias


@quiet_underflow
def linear_bounds(x: Array, w: Array, b: Array, dy: Array, /, *, dtype: Any) -> LinearBounds:
    """Bounds for `linear` and its vjp in `dtype`. The arguments, of any dtype, are taken as exact."""
    fl = Arithmetic.of(dtype)
    x, w, b, dy = exact(x), exact(w), exact(b), exact(dy)
    return LinearBounds(*_bounds((fl.linear(x, w, b), *fl.linear_vjp(x, w, b, dy)), dtype))


@takes(AttentionOptions)
@quiet_underflow
def attention_bounds(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | RelativeBias,
    do: Array,
    /,
    *,
    sink: Array = None,
    dweights: Array = None,
    dlse: Array = None,
    arithmetic: Profile | str = STRICT,
    dtype: Any,
    **options: Unpack[AttentionOptions],
) -> AttentionBounds:
    """Bounds for `attention`, its weights (before dropout) and lse, and its vjp, in `dtype`.

    arithmetic  "strict" for what is rounded once, at the end; "flash" for kernels like FlashAttention's, whose gradient
                recomputes the weights as exp(score − lse) and is p (dp − δ) as it stands, so that a row with one heavy
                key loses its digits, and which in half precision round weights, gradients of scores and outputs on
                their way; or a `Profile` of `funcmha.testing.profiles`
    """
    check_names(options, AttentionOptions)
    fl, given = Arithmetic.of(dtype, profile_of(arithmetic)), {**options, "dweights": dweights, "dlse": dlse}
    q, k, v, sink, do = (exact(a) for a in (q, k, v, sink, do))
    return AttentionBounds(*_bounds(attention(fl, q, k, v, as_bias(bias), sink, do, k.value.shape[-2], given), dtype))


@takes(HeadOptions)
@quiet_underflow
def mha_bounds(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias,
    dy: Array,
    /,
    *,
    dweights: Array = None,
    dlse: Array = None,
    arithmetic: Profile | str = STRICT,
    dtype: Any,
    **options: Unpack[HeadOptions],
) -> MhaBounds:
    """Bounds for `mha`, its weights (before dropout) and lse, and its vjp, in `dtype`; as in `attention_bounds`."""
    check_names(options, HeadOptions)
    fl, given = Arithmetic.of(dtype, profile_of(arithmetic)), {**options, "dweights": dweights, "dlse": dlse}
    p = {name: exact(a) for name, a in tree.flatten(params).items()}
    zero, norm, rotary = bool(options.get("zero_attn")), options.get("qk_norm"), options.get("rotary")
    q_rotary, k_rotary = rotary if type(rotary) is tuple else (rotary, rotary)  # a table is a NamedTuple
    q, q_vjp = _projected(fl, p, "q", exact(query), norm, q_rotary, False)
    k, k_vjp = _projected(fl, p, "k", exact(key), norm, k_rotary, zero)
    v, v_vjp = _projected(fl, p, "v", exact(value), None, None, zero)
    w, b, dy = _matrix(p["out_proj.w"], 1), p.get("out_proj.b"), exact(dy)
    do, S = _split(fl.matmul(dy, w), q.value.shape[-3]), key.shape[-2]
    o, weights, lse, dq, dk, dv, dbias, dsink = attention(fl, q, k, v, as_bias(bias), p.get("sink.w"), do, S, given)
    y = fl.linear(_join(o), w, b)

    _, dw, db = fl.linear_vjp(_join(o), w, b, dy)
    (dquery, dparams_q), (dkey, dparams_k), (dvalue, dparams_v) = q_vjp(dq), k_vjp(dk), v_vjp(dv)
    dparams = {"out_proj.w": dw, "out_proj.b": db, "sink.w": dsink} | dparams_q | dparams_k | dparams_v
    dparams = {name: each(lambda a: a.reshape(x.value.shape), dparams[name]) for name, x in p.items()}  # noqa: B023
    return MhaBounds(*_bounds((y, weights, lse, tree.unflatten(dparams), dquery, dkey, dvalue, dbias), dtype))


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _projected(
    fl: Arithmetic, p: dict[str, Any], name: str, x: Rounded, norm: Any, table: Any, zero: bool
) -> tuple[Rounded, Callable[[Rounded], tuple[Rounded, dict[str, Maybe]]]]:
    """q, k or v (..., H, S', D), and its vjp: the gradients of x and of its parameters by their names"""
    w, b, row = _matrix(p[f"{name}_proj.w"], 0), each(np.ravel, p.get(f"{name}_proj.b")), p.get(f"bias_kv.{name}")
    of_norm = {leaf: p[key] for leaf in "wb" if (key := f"{name}_norm.{leaf}") in p}
    y, cache = position(fl, _split(fl.linear(x, w, b), p[f"{name}_proj.w"].value.shape[0]), of_norm, norm, table)
    S = x.value.shape[-2]

    def vjp(dy: Rounded) -> tuple[Rounded, dict[str, Maybe]]:
        drow = None
        if row is not None:
            drow = fl.unbroadcast(Rounded(dy.value[..., S, :], dy.error[..., S, :]), row.value.shape)
        dy, dnorm = position_vjp(fl, cache, of_norm, norm, table, each(lambda a: a[..., :S, :], dy))
        dx, dw, db = fl.linear_vjp(x, w, b, _join(dy))
        dparams = {f"{name}_proj.w": dw, f"{name}_proj.b": db, f"bias_kv.{name}": drow}
        return dx, dparams | {f"{name}_norm.{leaf}": d for leaf, d in dnorm.items()}

    value, none = (None, None) if row is None else (row.value[:, None], row.error[:, None])
    appended = each(lambda a: append_rows(a, none, zero), y)
    return appended._replace(value=append_rows(y.value, value, zero)), vjp


def _matrix(w: Rounded, axis: int) -> Rounded:
    """The heads side by side: (H, D, C)   →   (H·D, C), and (O, H, E)   →   (O, H·E) for axis 1"""
    shape = list(w.value.shape)
    shape[axis : axis + 2] = [prod(shape[axis : axis + 2])]
    return each(lambda a: a.reshape(shape), w)


def _split(x: Rounded, H: int) -> Rounded:
    """(..., T, H·D)   →   (..., H, T, D)"""
    return each(lambda a: heads_first(a.reshape(*a.shape[:-1], H, a.shape[-1] // H)), x)


def _join(x: Rounded) -> Rounded:
    """(..., H, T, D)   →   (..., T, H·D)"""
    return each(lambda a: heads_last(a).reshape(*a.shape[:-3], a.shape[-2], a.shape[-3] * a.shape[-1]), x)


def _bounds(results: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    return tuple(tree.map(lambda r: _stored(r, name_of(dtype)), r) for r in results)


def _stored(x: Any, dtype: str) -> Any:
    """The error of x, and one unit in the last place where it is rounded to 16 bits at the end."""
    if isinstance(x, ArrayBias | RelativeBias):
        return x.map(lambda values: _stored(values, dtype)).given
    if not isinstance(x, Rounded) or dtype not in HALF:
        return x.error if isinstance(x, Rounded) else x
    _, exponent = np.frexp(x.value)
    ulp = 2 * U[dtype] * np.maximum(np.ldexp(0.5, exponent), TINY[dtype])
    return x.error + np.where((x.value != 0) | (x.error > 0), ulp, 0.0)
