"""How far off a correct implementation may be: an error bound for every entry of every output and gradient.

    bounds = mha_bounds(params, query, key, value, bias, dy, mask=mask, dtype="float32")
    assert_within(got, want, bounds.y, name="y")      got in float32, want in float64, from the same inputs

The bounds come from replaying an op and its vjp, line by line, in the arithmetic of `funcmha.testing.rounding`, whose
numbers know their errors. Its rules are derived, not fitted, and there is no factor in front.

Not covered: overflow, and sums over thousands of terms that are all but equal, whose roundings are not independent
(512 equal terms: measured at 3 times the bound).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funcmha import tree
from funcmha._bias import dense_bias
from funcmha._xp import HALF, Array, quiet_underflow
from funcmha.biases import Relative
from funcmha.dropout import Seeded
from funcmha.heads import extend, extend_scores
from funcmha.masks import Mask, dense
from funcmha.norms import Norm
from funcmha.params import Params
from funcmha.rotary import Rotary

from .rounding import TINY, Arithmetic, Rounded, U, each, exact, host, name_of
from .rounding_attention import Static, attention, over_diagonals
from .rounding_ready import ready, ready_vjp


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
    dbias: Array | Relative
    dsink: Array


class MhaBounds(NamedTuple):
    y: Array
    weights: Array
    lse: Array
    dparams: Params
    dquery: Array
    dkey: Array
    dvalue: Array
    dbias: Array | Relative


@quiet_underflow
def linear_bounds(x: Array, w: Array, b: Array, dy: Array, /, *, dtype: Any) -> LinearBounds:
    """Bounds for `linear` and its vjp in `dtype`. The arguments, of any dtype, are what is computed with, exactly."""
    fl = Arithmetic.of(dtype)
    x, w, b, dy = exact(x), exact(w), exact(b), exact(dy)
    return LinearBounds(*_bounds((fl.linear(x, w, b), *fl.linear_vjp(x, w, b, dy)), dtype))


@quiet_underflow
def attention_bounds(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | Relative,
    do: Array,
    /,
    *,
    sink: Array = None,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    cap: float | Sequence[float] | None = None,
    keep: Array | Seeded = None,
    rate: float = 0.0,
    dweights: Array = None,
    dlse: Array = None,
    recomputed: bool = False,
    dtype: Any,
) -> AttentionBounds:
    """Bounds for `attention`, its weights (before dropout) and lse, and its vjp, in `dtype`.

    recomputed  for what keeps no weights, and has them from the scores and lse when it needs them: exp(score − lse)
    """
    fl, T, S = Arithmetic.of(dtype), q.shape[-2], k.shape[-2]
    mask = host(dense(mask, T, S, None))
    keep, rate = _keep(keep, rate, (*q.shape[:-1], S))
    q, k, v, sink, do, dweights, dlse = (exact(a) for a in (q, k, v, sink, do, dweights, dlse))
    static = Static(mask, _per_head(scale), _per_head(cap), keep, rate, dweights, dlse, recomputed)
    o, p, lse, dq, dk, dv, dz, dsink = attention(fl, q, k, v, _exact_bias(bias, T, S), sink, do, static)
    o, dq, dk, dv, dbias, dsink = _bounds((o, dq, dk, dv, _dbias(fl, bias, dz), dsink), dtype)
    return AttentionBounds(o, p.error, lse.error, dq, dk, dv, _as(bias, dbias), dsink)


@quiet_underflow
def mha_bounds(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Relative,
    dy: Array,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    cap: float | Sequence[float] | None = None,
    zero_attn: bool = False,
    norm: Norm | None = None,
    rotary: Rotary | tuple[Rotary | None, Rotary | None] | None = None,
    keep: Array | Seeded = None,
    rate: float = 0.0,
    dweights: Array = None,
    dlse: Array = None,
    recomputed: bool = False,
    dtype: Any,
) -> MhaBounds:
    """Bounds for `mha`, its weights (before dropout) and lse, and its vjp, in `dtype`; as in `attention_bounds`."""
    fl, T, S = Arithmetic.of(dtype), query.shape[-2], key.shape[-2]
    params = tree.map(exact, params)
    query, key, value, dy, dweights, dlse = (exact(a) for a in (query, key, value, dy, dweights, dlse))
    rows, zero, sink = params.get("bias_kv", {"k": None, "v": None}), zero_attn, params.get("sink", {"w": None})
    extra = (rows["k"] is not None) + zero
    turns: Any = rotary if type(rotary) is tuple else (rotary, rotary)  # a table is a NamedTuple
    mask, added = extend_scores(host(dense(mask, T, S, None)), S, extra, True), _exact_bias(bias, T, S)

    q, q_ready = ready(fl, fl.project(params["q_proj"], query), params.get("q_norm", {}), norm, turns[0])
    k, k_ready = ready(fl, fl.project(params["k_proj"], key), params.get("k_norm", {}), norm, turns[1])
    k, v = _extend(k, rows["k"], zero), _extend(fl.project(params["v_proj"], value), rows["v"], zero)
    do = fl.combine_do(params["out_proj"], dy)
    q, k, v, do = (each(_swap_heads, x) for x in (q, k, v, do))
    keep, rate = _keep(keep, rate, (*q.value.shape[:-1], S + extra))
    static = Static(mask, _per_head(scale), _per_head(cap), keep, rate, dweights, dlse, recomputed)
    added = each(lambda a: extend_scores(a, S, extra, 0.0), added)
    o, p, lse, dq, dk, dv, dz, dsink = attention(fl, q, k, v, added, sink["w"], do, static)
    o, dq, dk, dv = (each(_swap_heads, x) for x in (o, dq, dk, dv))
    y, dout_proj = fl.combine(params["out_proj"], o, dy)

    own_dk, own_dv = (each(lambda a: a[..., :S, :, :], dx) for dx in (dk, dv))
    own_dk, dk_norm = ready_vjp(fl, k_ready, params.get("k_norm", {}), norm, turns[1], own_dk)
    dq, dq_norm = ready_vjp(fl, q_ready, params.get("q_norm", {}), norm, turns[0], dq)
    dq_proj, dquery = fl.project_vjp(params["q_proj"], query, dq)
    dk_proj, dkey = fl.project_vjp(params["k_proj"], key, own_dk)
    dv_proj, dvalue = fl.project_vjp(params["v_proj"], value, own_dv)
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj, "out_proj": dout_proj}
    dparams |= {name: d for name, d in (("q_norm", dq_norm), ("k_norm", dk_norm)) if d}
    if rows["k"] is not None:
        dparams["bias_kv"] = {name: fl.extend_drow(d, S) for name, d in (("k", dk), ("v", dv))}
    if dsink is not None:
        dparams["sink"] = {"w": dsink}
    dbias = _dbias(fl, bias, each(lambda a: a[..., :S], dz))
    y, dparams, dquery, dkey, dvalue, dbias = _bounds((y, dparams, dquery, dkey, dvalue, dbias), dtype)
    return MhaBounds(y, p.error, lse.error, dparams, dquery, dkey, dvalue, _as(bias, dbias))


# ── shapes, dtypes ───────────────────────────────────────────────────────────────────────────────────────────────


def _swap_heads(a: Array) -> Array:
    """(..., T, H, D)   →   (..., H, T, D), and back"""
    return np.swapaxes(a, -2, -3)


def _extend(x: Rounded, row: Rounded | None, zero: bool) -> Rounded:
    """`heads.extend`"""
    value, none = (None, None) if row is None else (row.value, np.zeros(row.value.shape))
    rows = tuple(extend(row, none, zero) for row in x.rows)
    return Rounded(extend(x.value, value, zero), extend(x.error, none, zero), rows)


def _exact_bias(bias: Any, T: int, S: int) -> Any:
    """A bias without error, as an array that broadcasts to (..., H, T, S)."""
    return exact(dense_bias(Relative(host(bias.values)), T, S) if isinstance(bias, Relative) else bias)


def _dbias(fl: Arithmetic, bias: Any, dz: Rounded) -> Any:
    """`_bias.dense_bias_vjp`"""
    if isinstance(bias, Relative):
        return over_diagonals(fl, dz, tuple(bias.values.shape))
    return None if bias is None else fl.unbroadcast(dz, tuple(bias.shape))


def _as(bias: Any, bound: Array) -> Any:
    return Relative(bound) if isinstance(bias, Relative) else bound


def _per_head(x: Any) -> Any:
    """A number as it is, and one for each head as (H, 1, 1)."""
    return np.asarray(x, np.float64)[:, None, None] if isinstance(x, tuple | list | np.ndarray) else x


def _keep(keep: Any, rate: float, shape: tuple[int, ...]) -> tuple[Array, float]:
    """The booleans of dropout, or None, and its rate."""
    return (keep.dense(shape), keep.rate) if isinstance(keep, Seeded) else (host(keep), rate)


def _bounds(results: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    return tuple(tree.map(lambda r: None if r is None else _stored(r, name_of(dtype)), r) for r in results)


def _stored(x: Rounded, dtype: str) -> Array:
    """The error of x, and one unit in the last place where it is rounded to 16 bits at the end."""
    if dtype not in HALF:
        return x.error
    _, exponent = np.frexp(x.value)
    ulp = 2 * U[dtype] * np.maximum(np.ldexp(0.5, exponent), TINY[dtype])
    return x.error + np.where((x.value != 0) | (x.error > 0), ulp, 0.0)
