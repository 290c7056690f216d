"""The largest error of a correct implementation: a bound for every entry of every output and gradient.

    bounds = mha_bounds(params, query, key, value, bias, dy, mask=mask, dtype="float32")
    assert_within(got, want, bounds.y, name="y")      got in float32, want in float64, from the same inputs

The bounds come from replaying an op and its vjp, line by line, in the arithmetic of `funcmha.testing.rounding`, whose
numbers carry their errors. Its rules are derived, not fitted, and there is no factor in front.

Not covered: overflow, and sums over thousands of almost equal terms, whose roundings are not independent (512 equal
terms: measured at 3 times the bound).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funcmha import tree
from funcmha._arrays import HALF, Array
from funcmha.biases import ArrayBias, RelativeBias
from funcmha.dropout import Masked, Seeded
from funcmha.engines.grouped import append_rows
from funcmha.masks import Mask, as_mask, dense
from funcmha.masks.appended import append_keys
from funcmha.norms import Norm
from funcmha.params import Params
from funcmha.rotary import Rotary

from .rounding import TINY, Arithmetic, Rounded, U, each, exact, host, name_of
from .rounding_attention import Static, attention, over_diagonals
from .rounding_position import position, position_vjp


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


def linear_bounds(x: Array, w: Array, b: Array, dy: Array, /, *, dtype: Any) -> LinearBounds:
    """Bounds for `linear` and its vjp in `dtype`. The arguments, of any dtype, are taken as exact."""
    fl = Arithmetic.of(dtype)
    x, w, b, dy = exact(x), exact(w), exact(b), exact(dy)
    return LinearBounds(*_bounds((fl.linear(x, w, b), *fl.linear_vjp(x, w, b, dy)), dtype))


def attention_bounds(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | RelativeBias,
    do: Array,
    /,
    *,
    sink: Array = None,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    dropout: Masked | Seeded | None = None,
    dweights: Array = None,
    dlse: Array = None,
    recomputed: bool = False,
    dtype: Any,
) -> AttentionBounds:
    """Bounds for `attention`, its weights (before dropout) and lse, and its vjp, in `dtype`.

    recomputed  for implementations that keep no weights, and recompute them from the scores and lse: exp(score − lse)
    """
    fl, T, S = Arithmetic.of(dtype), q.shape[-2], k.shape[-2]
    mask = host(dense(mask, T, S, None))
    keep, rate = _keep(dropout, (*q.shape[:-1], S))
    q, k, v, sink, do, dweights, dlse = (exact(a) for a in (q, k, v, sink, do, dweights, dlse))
    static = Static(mask, _per_head(scale), _per_head(softcap), keep, rate, dweights, dlse, recomputed)
    o, p, lse, dq, dk, dv, dz, dsink = attention(fl, q, k, v, _exact_bias(bias, T, S), sink, do, static)
    o, dq, dk, dv, dbias, dsink = _bounds((o, dq, dk, dv, _dbias(fl, bias, dz), dsink), dtype)
    return AttentionBounds(o, p.error, lse.error, dq, dk, dv, _as(bias, dbias), dsink)


def mha_bounds(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias,
    dy: Array,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    zero_attn: bool = False,
    qk_norm: Norm | None = None,
    rotary: Rotary | tuple[Rotary | None, Rotary | None] | None = None,
    dropout: Masked | Seeded | None = None,
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
    tables: Any = rotary if type(rotary) is tuple else (rotary, rotary)  # a table is a NamedTuple
    mask, added = append_keys(_on_host(mask), T, S, extra, None), _exact_bias(bias, T, S)
    mask = host(dense(mask, T, S + extra, None))

    q, q_position = position(fl, fl.project(params["q_proj"], query), params.get("q_norm", {}), qk_norm, tables[0])
    k, k_position = position(fl, fl.project(params["k_proj"], key), params.get("k_norm", {}), qk_norm, tables[1])
    k, v = _append_rows(k, rows["k"], zero), _append_rows(fl.project(params["v_proj"], value), rows["v"], zero)
    do = fl.combine_do(params["out_proj"], dy)
    q, k, v, do = (each(_swap_heads, x) for x in (q, k, v, do))
    keep, rate = _keep(dropout, (*q.value.shape[:-1], S + extra))
    static = Static(mask, _per_head(scale), _per_head(softcap), keep, rate, dweights, dlse, recomputed)
    added = None if added is None else each(lambda a: ArrayBias(a).append_keys(S, extra).values, added)
    o, p, lse, dq, dk, dv, dz, dsink = attention(fl, q, k, v, added, sink["w"], do, static)
    o, dq, dk, dv = (each(_swap_heads, x) for x in (o, dq, dk, dv))
    y, dout_proj = fl.combine(params["out_proj"], o, dy)

    own_dk, own_dv = (each(lambda a: a[..., :S, :, :], dx) for dx in (dk, dv))
    own_dk, dk_norm = position_vjp(fl, k_position, params.get("k_norm", {}), qk_norm, tables[1], own_dk)
    dq, dq_norm = position_vjp(fl, q_position, params.get("q_norm", {}), qk_norm, tables[0], dq)
    dq_proj, dquery = fl.project_vjp(params["q_proj"], query, dq)
    dk_proj, dkey = fl.project_vjp(params["k_proj"], key, own_dk)
    dv_proj, dvalue = fl.project_vjp(params["v_proj"], value, own_dv)
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj, "out_proj": dout_proj}
    dparams |= {name: d for name, d in (("q_norm", dq_norm), ("k_norm", dk_norm)) if d}
    if rows["k"] is not None:
        dparams["bias_kv"] = {name: fl.append_drow(d, S) for name, d in (("k", dk), ("v", dv))}
    if dsink is not None:
        dparams["sink"] = {"w": dsink}
    dbias = _dbias(fl, bias, each(lambda a: a[..., :S], dz))
    y, dparams, dquery, dkey, dvalue, dbias = _bounds((y, dparams, dquery, dkey, dvalue, dbias), dtype)
    return MhaBounds(y, p.error, lse.error, dparams, dquery, dkey, dvalue, _as(bias, dbias))


# ── shapes, dtypes ───────────────────────────────────────────────────────────────────────────────────────────────


def _on_host(mask: Any) -> Mask | None:
    """A mask, which may be an array of any library, on the host."""
    return mask if mask is None or isinstance(mask, Mask) else as_mask(host(mask))


def _swap_heads(a: Array) -> Array:
    """(..., T, H, D)   →   (..., H, T, D), and back"""
    return np.swapaxes(a, -2, -3)


def _append_rows(x: Rounded, row: Rounded | None, zero: bool) -> Rounded:
    """`grouped.append_rows`"""
    value, none = (None, None) if row is None else (row.value, np.zeros(row.value.shape))
    rows = tuple(append_rows(row, none, zero) for row in x.rows)
    return Rounded(append_rows(x.value, value, zero), append_rows(x.error, none, zero), rows)


def _exact_bias(bias: Any, T: int, S: int) -> Any:
    """A bias without error, as an array that broadcasts to (..., H, T, S)."""
    return exact(RelativeBias(host(bias.values)).dense(T, S) if isinstance(bias, RelativeBias) else bias)


def _dbias(fl: Arithmetic, bias: Any, dz: Rounded) -> Any:
    """`dense_vjp` of a bias"""
    if isinstance(bias, RelativeBias):
        return over_diagonals(fl, dz, tuple(bias.values.shape))
    return None if bias is None else fl.unbroadcast(dz, tuple(bias.shape))


def _as(bias: Any, bound: Array) -> Any:
    return RelativeBias(bound) if isinstance(bias, RelativeBias) else bound


def _per_head(x: Any) -> Any:
    """A number as it is, and one for each head as (H, 1, 1)."""
    return np.asarray(x, np.float64)[:, None, None] if isinstance(x, tuple | list | np.ndarray) else x


def _keep(dropout: Masked | Seeded | None, shape: tuple[int, ...]) -> tuple[Array, float]:
    """The booleans of dropout, or None, and its rate."""
    return (None, 0.0) if dropout is None else (host(dropout.dense(shape)), dropout.rate)


def _bounds(results: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    return tuple(tree.map(lambda r: None if r is None else _stored(r, name_of(dtype)), r) for r in results)


def _stored(x: Rounded, dtype: str) -> Array:
    """The error of x, and one unit in the last place where it is rounded to 16 bits at the end."""
    if dtype not in HALF:
        return x.error
    _, exponent = np.frexp(x.value)
    ulp = 2 * U[dtype] * np.maximum(np.ldexp(0.5, exponent), TINY[dtype])
    return x.error + np.where((x.value != 0) | (x.error > 0), ulp, 0.0)
