"""Self-attention of new tokens over a key/value cache: a layer of a decoder, for a prompt, one token or several.

    table = rotary.table(np.arange(2048), frequencies(64))            # of the whole context, once
    (y, kv), cache = step(params, x, kv, rotary=table)                # kv is None before the first token
    dparams, dx, dkv, _ = step_vjp(cache, (dy, dkv))                  # from the last step to the first

Steps one after another are `self_attention` of all tokens with a causal mask, or with `left` a causal window, and so
are their gradients: those of the parameters add up, and that of the past goes from each step to the one before.

Axes: N keys held, N' with those of the new tokens, T new tokens, P positions of a context, H query heads, K key/value
heads, D query/key width, E value width, C input width, O output width; `...` is batch. Parameters: `params.SPEC`.
"""

from functools import reduce
from numbers import Integral
from operator import or_
from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import _check, tree
from funcmha._arguments import (
    AttentionOptions,
    Bias,
    Options,
    check_known,
    check_names,
    check_options,
    name_of,
    takes,
    values_of,
)
from funcmha._arrays import Array, downcast, heads_first, heads_last, namespace, or_zeros, upcast
from funcmha.biases import RelativeBias, as_bias
from funcmha.dropout import Seeded
from funcmha.engines import Engine, pick
from funcmha.engines.grouped import Position, positioned, positioned_vjp
from funcmha.engines.plan import Plan
from funcmha.engines.projections import CombineCache, ProjectCache, combine, combine_vjp, project_qkv, project_qkv_vjp
from funcmha.engines.table import attention_vjp
from funcmha.engines.tiled.threads import with_single_threaded_blas
from funcmha.masks import Band, Bands, Mask, intersection, operands, window
from funcmha.norms import Norm
from funcmha.ops import round_bias
from funcmha.params import SPEC, Params, check, in_order_of, leaf
from funcmha.rotary import Rotary, check_table

from .append import (
    AppendCache,
    KVCache,
    append_vjp,
    appended,
    check_kv,
    check_position,
    empty,
    two_cotangents,
)


class StepOptions(AttentionOptions, total=False):
    """What `step` takes beside its differentiable inputs."""

    left: int | None
    qk_norm: Norm | None
    rotary: Rotary | None


class StepCall(StepOptions, total=False):
    """The options of `step`, and who computes it."""

    engine: Engine | str | None


# ── step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class StepCache(NamedTuple):
    params: Params
    q: ProjectCache
    k: ProjectCache
    v: ProjectCache
    q_position: Position
    k_position: Position
    q_projected: Array  # (..., T, H, D), or None where nothing is normalised
    k_projected: Array  # (..., T, K, D), or None where nothing is normalised
    appended: AppendCache | None  # None where there was no past
    attention: Any  # what the engine keeps, of T queries and N' keys
    out: CombineCache
    bias: Bias  # as it was given, or None
    plan: Plan | None  # None for arrays that are no NumPy arrays, so that JAX sees arrays and numbers it may trace


@takes(StepOptions)
@with_single_threaded_blas
def step(
    params: Params,
    x: Array,
    kv: KVCache | None = None,
    bias: Any = None,
    /,
    *,
    engine: Engine | str | None = None,
    **options: Unpack[StepOptions],
) -> tuple[tuple[Array, KVCache], StepCache]:
    """y = Σₕ attention(qₕ, keys'ₕ, values'ₕ, bias, sinkₕ) woₕᵀ + bo     kv' = append(kv, k, v)     q, k, v of x
    x (..., T, C)   kv of (..., K, N, D) and (..., K, N, E), or None   →   y (..., T, O), kv' of N' tokens

    kv       a `KVCache`, or None for no past; it stays as it is. `empty(…, capacity=…)` reserves its room
    left     each token attends itself and so many before, as in `masks.window`, and kv' drops what no other will
             attend; None is all that is held
    mask     what is forbidden beside that. A structured mask is that of a whole context, of which the step takes the
             rows of its tokens and the columns of its keys; an array is that of the step, and broadcasts to
             (..., H, T, N'), so (B, 1, 1, N') for padding. No token attends a later one, whatever the mask allows
    bias     broadcasts to (..., H, T, N'), differentiable. A `RelativeBias` is that of a whole context, 2P − 1 values
             of which the step takes those for its N' keys
    rotary   the table of a whole context, positions 0 … P − 1, of which the step takes the rows from kv.position on;
             those of each sample are (B, 1, P). Keys are held normalised and rotated
    dropout  as in `mha`, for (..., H, T, N'); a `Seeded` is that of a whole context, of which the step takes its part

    All else is as in `mha`, and so is what it raises; also ValueError for a context that is too short, and for
    `bias_kv`, whose key comes from no token. In float16 and bfloat16 the new keys are rounded in kv', and not for y.
    """
    left, N, own, o = _check_step(params, x, kv, bias, options)
    H, K = (params[name]["w"].shape[0] for name in ("q_proj", "k_proj"))
    chosen = pick(engine, x, H, K, x.shape[-2], N)
    dtype, params, plan = x.dtype, tree.map(upcast, params), chosen.plan or Plan()
    wide = upcast(x)
    (q, q_cache), (k, k_cache), (v, v_cache) = project_qkv(params, (wide, wide, wide), plan=plan)
    q_projected, k_projected = (None, None) if o.qk_norm is None else (q, k)
    q, q_position = positioned(q, params.get("q_norm", {}), o.qk_norm, o.rotary[0])
    k, k_position = positioned(k, params.get("k_norm", {}), o.qk_norm, o.rotary[1])
    held, after, appended = _append(kv, heads_first(k), heads_first(v), left, dtype)
    heads, attention = chosen.attend(
        heads_first(q),
        held.keys,
        held.values,
        None if own is None else own.map(upcast),
        leaf(params, "sink.w"),
        o,
        plan,
    )
    y, out = combine(params["out_proj"], heads_last(heads), plan=plan)
    cache = StepCache(
        params, q_cache, k_cache, v_cache, q_position, k_position, q_projected, k_projected, appended, attention, out,
        as_bias(bias), plan if isinstance(x, np.ndarray) else None,
    )  # fmt: skip
    return (downcast(y, dtype), after), cache


def step_vjp(
    cache: StepCache,
    dy_dkv: tuple[Array, KVCache | tuple[Array, Array] | None],
    /,
    *,
    dweights: Array = None,
    dlse: Array = None,
) -> tuple[Params, Array, KVCache | None, Array | RelativeBias]:
    """dparams, dx, dkv, dbias: `step` from the bottom up
    from the cotangents of y and kv', either of which may be None for zero, and, where given, of the weights
    (..., H, T, N') and lse (..., H, T)

    The dkv of a step is the cotangent of the kv' of the step before. A token has no effect, even if it is NaN, where
    the mask of each step keeps it from attending and from being attended, as padding on the left does.
    """
    _check.cache(cache, StepCache, "step")
    dtype, dy, dheld = _check_cotangents(cache, dy_dkv, dweights, dlse)
    plan = Plan() if cache.plan is None else cache.plan
    dout, do = combine_vjp(cache.out, dy, plan=plan)
    dq, dkeys, dvalues, dbias, dsink = attention_vjp(
        cache.attention, heads_first(do), dweights=upcast(dweights), dlse=upcast(dlse)
    )
    dkeys, dvalues = (dkeys, dvalues) if dheld is None else (dkeys + upcast(dheld[0]), dvalues + upcast(dheld[1]))
    dkv, dk, dv = (None, dkeys, dvalues) if cache.appended is None else append_vjp(cache.appended, (dkeys, dvalues))
    dq, dk, dv = heads_last(dq), heads_last(dk), heads_last(dv)
    cache = _zeroed(cache, dq, dk, dv)
    dk, dk_norm = positioned_vjp(cache.k_position, cache.k_projected, dk, 0)
    dq, dq_norm = positioned_vjp(cache.q_position, cache.q_projected, dq, 0)
    dparams, (dx,) = project_qkv_vjp((cache.q, cache.k, cache.v), (dq, dk, dv), add_to=(None,), batch_axes=0, plan=plan)
    dparams |= {"out_proj": dout}
    dparams |= {} if dsink is None else {"sink": {"w": dsink}}
    dparams |= {name: g for name, g in (("q_norm", dq_norm), ("k_norm", dk_norm)) if g}
    dpast = None if dkv is None else KVCache(downcast(dkv.keys, dtype), downcast(dkv.values, dtype), dkv.position)
    dbias = _differences_vjp(cache.bias, cache.out.o.shape[-3], as_bias(dbias))
    return (
        tree.map(lambda g: downcast(g, dtype), in_order_of(cache.params, dparams)),
        downcast(dx, dtype),
        dpast,
        round_bias(dbias, dtype),
    )


def _zeroed(cache: StepCache, *dys: Array) -> StepCache:
    """The cache with 0 at tokens that no gradient (..., T, H, D) reaches, as in padding: 0 · NaN would reach Σ dy xᵀ

    Not by the mask, before the forward: what a token's key is to later steps, whose mask is another, is in kv'.
    """
    xp = namespace(cache.q.x)
    some = reduce(or_, (xp.any(dy != 0, axis=(-2, -1)) for dy in dys))  # (..., T)
    if isinstance(some, np.ndarray) and some.all():
        return cache
    x = xp.where(some[..., None], cache.q.x, 0.0)
    q, k, v = (projected._replace(x=x) for projected in (cache.q, cache.k, cache.v))
    q_projected, k_projected = (
        a if a is None else xp.where(some[..., None, None], a, 0.0) for a in (cache.q_projected, cache.k_projected)
    )
    return cache._replace(q=q, k=k, v=v, q_projected=q_projected, k_projected=k_projected)


def _append(
    kv: KVCache | None, k: Array, v: Array, left: int | None, dtype: Any
) -> tuple[KVCache, KVCache, AppendCache | None]:
    """What the queries attend, in the dtype computed with; what is handed on, in `dtype`; and for the gradient"""
    past = empty(k, v) if kv is None else KVCache(upcast(kv.keys), upcast(kv.values), kv.position)
    held, cache = appended(past, k, v, left)
    after = held
    if k.dtype != dtype:
        k, v = downcast(k, dtype), downcast(v, dtype)
        after, _ = appended(empty(k, v) if kv is None else kv, k, v, left)
    return held, after, None if kv is None else cache


# ── the part of a context that a step has ────────────────────────────────────────────────────────────────────────


def _rows_from(rotary: Any, position: Any, T: int) -> Any:
    """Rows position … position + T of a table."""
    if rotary is None:
        return None
    check_table(rotary)
    if not isinstance(position, Integral):  # JAX traces integers
        xp, at = namespace(position), position + namespace(position).arange(T)
        cos, sin = (xp.take(xp.asarray(table), at, axis=-2) for table in rotary)
        return rotary._replace(cos=cos, sin=sin)
    if position + T > (P := rotary.cos.shape[-2]):
        raise ValueError(
            f"rotary must have positions 0, 1, … up to {position + T}, as kv.position={position} and T={T}, got {P}"
        )
    at = slice(int(position), int(position) + T)
    return rotary._replace(cos=rotary.cos[..., at, :], sin=rotary.sin[..., at, :])


def _rows_of_mask(mask: Any, position: Any, T: int, held: int) -> Any:
    """Queries position … position + T of a structured mask, and the keys held, the last of which are theirs."""
    if not isinstance(mask, Mask):
        return mask
    check_known(mask)
    if not isinstance(position, Integral):  # JAX traces integers, and a band depends on no position
        if not all(isinstance(leaf, Band | Bands) for leaf in operands(mask)):
            raise TypeError("kv.position must be an int for a mask that is no causal mask or window, got a traced one")
        position = held - T
    start, stop = int(position), int(position) + T
    return mask.part((start, stop), (stop - held, stop))


def _differences(bias: Bias, T: int, held: int) -> Bias:
    """T + N' − 1 of the 2P − 1 values of a `RelativeBias`: query i stands at key i + N' − T. An array is as it is"""
    if not isinstance(bias, RelativeBias):
        return bias
    shape = tuple(bias.values.shape)
    P, even = divmod(shape[-1] + 1 if shape else 0, 2)
    if even or held > P:
        raise ValueError(f"bias.values must be (..., H or 1, 2P − 1) of P={held} positions or more, got {shape}")
    return bias.part((P - T, P), (P - held, P), P)


def _differences_vjp(bias: Bias, T: int, dbias: Bias) -> Bias:
    """The gradient of all values: 0 for those that the step had no part of"""
    if not isinstance(bias, RelativeBias):
        return dbias
    P = (bias.values.shape[-1] + 1) // 2
    held = dbias.values.shape[-1] - T + 1
    return bias.part_vjp((P - T, P), (P - held, P), P, dbias)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_step(params: Params, x: Array, kv: Any, bias: Any, options: Any) -> tuple[int | None, int, Bias, Options]:
    """`left`, N', the bias of this step, and its options: its mask, its rows of the table, its part of the dropout"""
    axes, leaves = check(params, SPEC)
    if "bias_kv.k" in leaves:
        raise ValueError("params must have no bias_kv: its key comes from no token, and has no place among the past")
    check_names(options, StepCall)
    bias = as_bias(bias)
    _check.one_dtype([*leaves.items(), ("x", x)], optional=[(name_of(bias), values_of(bias))])
    for projection in ("Cq", "Ck", "Cv"):
        axes("x", x, f"... T {projection}")
    left = window(options.get("left"), 0).left
    T, (N, position) = axes["T"], _check_past(axes, x, kv, left)
    held = T + (N if left is None else min(N, left))
    axes.size["S"] = held
    own, table, dropout = (
        _differences(bias, T, held),
        _rows_from(options.get("rotary"), position, T),
        options.get("dropout"),
    )
    if isinstance(dropout, Seeded):
        dropout = dropout.part((position, position + T), (position + T - held, position + T))
    rest = {name: value for name, value in options.items() if name != "left"}
    mask = _rows_of_mask(options.get("mask"), position, T, held)
    own, o = check_options(axes, leaves, own, rest | {"rotary": (table, None), "dropout": dropout, "mask": mask})
    return left, held, own, o._replace(mask=intersection(window(left, 0, held - T), o.mask), rotary=(table, table))


def _check_past(axes: _check.Axes, x: Array, kv: Any, left: int | None) -> tuple[int, Any]:
    """N and `position` of a `KVCache` that x and the parameters can follow."""
    if kv is None:
        return 0, 0
    check_kv(kv)
    _check.one_dtype([("x", x), ("kv.keys", kv.keys), ("kv.values", kv.values)])
    axes("kv.keys", kv.keys, "... K N D")
    axes("kv.values", kv.values, "... K N E")
    check_position(kv, N := axes["N"])
    if left is not None and left > N and isinstance(kv.position, Integral) and kv.position > N:
        raise ValueError(
            f"left must be at most N={N} as in kv.keys, as {kv.position - N} tokens are dropped, got {left}"
        )
    return N, kv.position


def _check_cotangents(
    cache: StepCache, dy_dkv: Any, dweights: Array, dlse: Array
) -> tuple[Any, Array, tuple[Array, Array] | None]:
    """The dtype of the gradients, dy in the dtype to compute in, and those of keys' and values', or None."""
    (dy, dkv), like, (*batch, T, H, _) = _check.parts("dy_dkv", dy_dkv, "dy, dkv"), cache.out.o, cache.out.o.shape
    if dy is None and dkv is None:
        raise TypeError("dy_dkv must have dy or dkv, got None for both")
    held: tuple[Array, Array] = (None, None) if dkv is None else two_cotangents(dkv)
    dkeys, dvalues = held
    keys, values = cache.attention.k, cache.attention.v
    y = (*batch, T, cache.out.w.shape[0])
    _check.cotangent("dy", dy, y, like, "... T O", optional=True)
    _check.cotangent("dkeys", dkeys, keys.shape, like, "... K N' D", optional=dkv is None)
    _check.cotangent("dvalues", dvalues, values.shape, like, "... K N' E", optional=dkv is None)
    _check.cotangent("dweights", dweights, (*batch, H, T, keys.shape[-2]), like, "... H T N'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, H, T), like, "... H T", optional=True)
    _check.one_dtype([], optional=[("dy", dy), ("dkeys", dkeys), ("dvalues", dvalues)])
    dtype = dkeys.dtype if dy is None else dy.dtype
    return dtype, or_zeros(dy, y, like), None if dkv is None else held
