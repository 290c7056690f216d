"""Self-attention of new tokens over a key/value cache: a layer of a decoder, for a prompt, one token or several.

    turn = table(np.arange(2048), frequencies(64))                           # of the whole context, once
    (y, kv), cache = self_attention_step(params, x, kv, rotary=turn)         # kv is None before the first token
    dparams, dx, dkv, _ = self_attention_step_vjp(cache, (dy, dkv))          # from the last step to the first

Steps one after another are `self_attention` of all tokens with a causal mask, or with `left` a causal window, and so
are their gradients: those of the parameters add up, and that of the past goes from each step to the one before.

Axes: N keys held, N' with those of the new tokens, T new tokens, P positions of a context, H query heads, K key/value
heads, D query/key width, E value width, C input width, O output width; `...` is batch. Parameters: `params.SPEC`.
"""

from collections.abc import Sequence
from functools import reduce
from numbers import Integral
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from . import _check, tree
from ._bias import on_bias
from ._doors import values_of
from ._doors_of_heads import check_options
from ._qk import ReadyCache, heads_first, heads_last, ready, ready_vjp
from ._xp import Array, full, namespace, narrow, or_zeros, widen
from .biases import RelativeBias
from .decode import KV, AppendCache, append, append_vjp, check_kv, check_library, check_seen, empty, two_cotangents
from .dropout import Masked, Seeded
from .engines import Engine
from .heads import CombineCache, Options, ProjectCache, combine, combine_vjp, engine_of, project_qkv, project_qkv_vjp
from .masks import Mask, intersection, window
from .norms import Norm
from .params import SPEC, Params, check
from .rotary import Rotary, check_table

# ── self_attention_step ──────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionStepCache(NamedTuple):
    q: ProjectCache
    k: ProjectCache
    v: ProjectCache
    q_ready: ReadyCache
    k_ready: ReadyCache
    appended: AppendCache | None  # None where there was no past
    attention: Any  # what the engine keeps, of T queries and N' keys
    out: CombineCache
    bias: Array | RelativeBias  # as it was given, or None


def self_attention_step(
    params: Params,
    x: Array,
    kv: KV | None = None,
    bias: Array | RelativeBias = None,
    /,
    *,
    left: int | None = None,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    qk_norm: Norm | None = None,
    rotary: Rotary | None = None,
    dropout: Masked | Seeded | None = None,
    engine: Engine | None = None,
) -> tuple[tuple[Array, KV], SelfAttentionStepCache]:
    """y = Σₕ attention(qₕ, keys'ₕ, values'ₕ, bias, sinkₕ) woₕᵀ + bo     kv' = append(kv, k, v)     q, k, v of x
    x (..., T, C)   kv of (..., K, N, D) and (..., K, N, E), or None   →   y (..., T, O), kv' of N' tokens

    kv      a `KV` of `funcmha.decode`, or None for no past; it stays as it is. `empty(…, capacity=…)` reserves its room
    left    each token sees itself and so many before, as in `masks.window`, and kv' forgets what no other will see;
            None is all that is held
    mask    what is forbidden beside that; broadcasts to (..., H, T, N'), so (B, 1, 1, N') for padding
    bias    broadcasts to (..., H, T, N'), differentiable. A `RelativeBias` is that of a whole context, 2P − 1 values of
            which the step takes those for its N' keys
    rotary  the table of a whole context, positions 0 … P − 1, of which the step takes the rows from kv.seen on; those
            of each sample are (B, 1, P). Keys are held normed and turned
    dropout as in `mha`, for (..., H, T, N'); a seed is that of a whole context, of which the step takes its part

    All else is as in `mha`, and so is what it raises; also ValueError for a context that is too short, and for
    `bias_kv`, whose key comes from no token. In float16 and bfloat16 the new keys are rounded in kv', and not for y.
    """
    given = Options(mask, scale, softcap, False, qk_norm, rotary, dropout, engine)
    left, own, o = _door(params, x, kv, bias, left, given)
    dtype, params = x.dtype, tree.map(widen, params)
    (q, k, v), (q_cache, k_cache, v_cache) = project_qkv(params, (widen(x),) * 3, engine=o.engine)
    q, q_ready = ready(q, params.get("q_norm", {}), norm=o.qk_norm, rotary=o.rotary[0])
    k, k_ready = ready(k, params.get("k_norm", {}), norm=o.qk_norm, rotary=o.rotary[1])
    held, after, appended = _appended(kv, heads_first(k), heads_first(v), left, dtype)
    heads, attended = o.engine.attention(
        heads_first(q),
        held.keys,
        held.values,
        on_bias(widen, own),
        params["sink"]["w"] if "sink" in params else None,
        mask=o.mask,
        scale=o.scale,
        softcap=o.softcap,
        dropout=o.dropout,
    )
    y, out = combine(params["out_proj"], heads_last(heads), engine=o.engine, onto=None)
    cache = SelfAttentionStepCache(q_cache, k_cache, v_cache, q_ready, k_ready, appended, attended, out, bias)
    return (narrow(y, dtype), after), cache


def self_attention_step_vjp(
    cache: SelfAttentionStepCache,
    dy_dkv: tuple[Array, KV | tuple[Array, Array] | None],
    /,
    *,
    dweights: Array = None,
    dlse: Array = None,
) -> tuple[Params, Array, KV | None, Array | RelativeBias]:
    """dparams, dx, dkv, dbias: `self_attention_step` from the bottom up
    from the cotangents of y and kv', either of which may be None for zero, and, where given, of the weights
    (..., H, T, N') and lse (..., H, T)

    The dkv of a step is the cotangent of the kv' of the step before. A token has no effect, even if it is NaN, where
    the mask of each step keeps it from seeing and from being seen, as padding on the left does.
    """
    _check.cache(cache, SelfAttentionStepCache, "self_attention_step")
    dtype, dy, dheld = _check_cotangents(cache, dy_dkv, dweights, dlse)
    dout, do = combine_vjp(cache.out, dy)
    dq, dkeys, dvalues, dbias, dsink = engine_of(cache.out).attention_vjp(
        cache.attention, heads_first(do), dweights=widen(dweights), dlse=widen(dlse)
    )
    dkeys, dvalues = (dkeys, dvalues) if dheld is None else (dkeys + widen(dheld[0]), dvalues + widen(dheld[1]))
    dkv, dk, dv = (None, dkeys, dvalues) if cache.appended is None else append_vjp(cache.appended, (dkeys, dvalues))
    dq, dk, dv = heads_last(dq), heads_last(dk), heads_last(dv)
    cache = _with_share(cache, dq, dk, dv)
    dk, dk_norm = ready_vjp(cache.k_ready, dk)
    dq, dq_norm = ready_vjp(cache.q_ready, dq)
    dparams, (dx,) = project_qkv_vjp((cache.q, cache.k, cache.v), (dq, dk, dv), onto=(None,))
    dparams |= {"out_proj": dout}
    dparams |= {} if dsink is None else {"sink": {"w": dsink}}
    dparams |= {name: g for name, g in (("q_norm", dq_norm), ("k_norm", dk_norm)) if g}

    def rounded(g: Array) -> Array:
        return narrow(g, dtype)

    dpast = None if dkv is None else KV(rounded(dkv.keys), rounded(dkv.values), dkv.seen)
    return (
        tree.map(rounded, dparams),
        rounded(dx),
        dpast,
        on_bias(rounded, _differences_vjp(cache.bias, cache.out.o.shape[-3], dbias)),
    )


def _with_share(cache: SelfAttentionStepCache, *dys: Array) -> SelfAttentionStepCache:
    """The cache with 0 at tokens that no gradient (..., T, H, D) reaches, as in padding: 0 · NaN would reach Σ dy xᵀ

    Not at the door, by the mask: what a token's key is to later steps, whose mask is another, is in kv'.
    """
    xp = namespace(cache.q.x)
    some = reduce(or_, (xp.any(dy != 0, axis=(-2, -1)) for dy in dys))  # (..., T)
    if isinstance(some, np.ndarray) and some.all():
        return cache
    x = xp.where(some[..., None], cache.q.x, 0.0)
    q, k, v = (projected._replace(x=x) for projected in (cache.q, cache.k, cache.v))
    q_ready, k_ready = (
        of if of.x is None else of._replace(x=xp.where(some[..., None, None], of.x, 0.0))
        for of in (cache.q_ready, cache.k_ready)
    )
    return cache._replace(q=q, k=k, v=v, q_ready=q_ready, k_ready=k_ready)


def _appended(kv: KV | None, k: Array, v: Array, left: int | None, dtype: Any) -> tuple[KV, KV, AppendCache | None]:
    """What the queries see, in the dtype computed with; what is handed on, in `dtype`; and for the gradient"""
    past = empty(k, v) if kv is None else KV(widen(kv.keys), widen(kv.values), kv.seen)
    held, cache = append(past, k, v, left=left)
    after = held
    if k.dtype != dtype:
        k, v = narrow(k, dtype), narrow(v, dtype)
        after, _ = append(empty(k, v) if kv is None else kv, k, v, left=left)
    return held, after, None if kv is None else cache


# ── the part of a context that a step has ────────────────────────────────────────────────────────────────────────


def _turns_from(rotary: Any, seen: Any, T: int) -> Any:
    """Rows seen … seen + T of a table."""
    if rotary is None:
        return None
    check_table(rotary)
    if not isinstance(seen, Integral):  # JAX traces integers
        xp, at = namespace(seen), seen + namespace(seen).arange(T)
        cos, sin = (xp.take(xp.asarray(table), at, axis=-2) for table in rotary)
        return rotary._replace(cos=cos, sin=sin)
    if seen + T > (P := rotary.cos.shape[-2]):
        raise ValueError(f"rotary must have positions 0, 1, … up to {seen + T}, as kv.seen={seen} and T={T}, got {P}")
    at = slice(int(seen), int(seen) + T)
    return rotary._replace(cos=rotary.cos[..., at, :], sin=rotary.sin[..., at, :])


def _differences(bias: Any, T: int, held: int) -> Any:
    """T + N' − 1 of the 2P − 1 values of a `RelativeBias`: query i stands at key i + N' − T. Arrays are of the step."""
    if not isinstance(bias, RelativeBias):
        return bias
    shape = tuple(bias.values.shape)
    P, even = divmod(shape[-1] + 1 if shape else 0, 2)
    if even or held > P:
        raise ValueError(f"bias.values must be (..., H or 1, 2P − 1) of P={held} positions or more, got {shape}")
    return RelativeBias(bias.values[..., P - held : P + T - 1])


def _differences_vjp(bias: Any, T: int, dbias: Any) -> Any:
    """The gradient of all values: 0 for those that the step had no part of."""
    if not isinstance(bias, RelativeBias):
        return dbias
    d, P = dbias.values, (bias.values.shape[-1] + 1) // 2
    held = d.shape[-1] - T + 1
    before, after = (full((*d.shape[:-1], n), 0.0, d) for n in (P - held, P - T))
    return RelativeBias(namespace(d).concat([before, d, after], axis=-1))


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _door(params: Params, x: Array, kv: Any, bias: Any, left: Any, given: Options) -> tuple[int | None, Any, Options]:
    """`left`, the bias of this step, and its options: its mask, its rows of the table, its part of what is dropped."""
    axes, leaves = check(params, SPEC)
    if "bias_kv.k" in leaves:
        raise ValueError("params must have no bias_kv: its key comes from no token, and has no place among the past")
    _check.one_dtype([*leaves.items(), ("x", x)], optional=[("bias", values_of(bias))])
    for projection in ("Cq", "Ck", "Cv"):
        axes("x", x, f"... T {projection}")
    left = window(left, 0).left
    T, (N, seen) = axes["T"], _check_past(axes, x, kv, left)
    held = T + (N if left is None else min(N, left))
    axes.size["S"] = held
    own, turns, dropout = _differences(bias, T, held), _turns_from(given.rotary, seen, T), given.dropout
    if isinstance(dropout, Seeded):
        first = seen + T - held  # of the keys held
        dropout = dropout._replace(first_query=dropout.first_query + seen, first_key=dropout.first_key + first)
    o = check_options(axes, leaves, x, own, given._replace(rotary=(turns, None), dropout=dropout))
    mask = intersection(window(left, 0, held - T), o.mask)
    return left, own, o._replace(mask=mask, rotary=(turns, turns))


def _check_past(axes: _check.Axes, x: Array, kv: Any, left: int | None) -> tuple[int, Any]:
    """N and `seen` of a `KV` that x and the parameters can follow."""
    if kv is None:
        return 0, 0
    check_kv(kv)
    _check.one_dtype([("x", x), ("kv.keys", kv.keys), ("kv.values", kv.values)])
    check_library(kv, ("x", x))
    axes("kv.keys", kv.keys, "... K N D")
    axes("kv.values", kv.values, "... K N E")
    check_seen(kv, N := axes["N"])
    if left is not None and left > N and isinstance(kv.seen, Integral) and kv.seen > N:
        raise ValueError(f"left must be at most N={N} as in kv.keys, as {kv.seen - N} tokens are forgotten, got {left}")
    return N, kv.seen


def _check_cotangents(
    cache: SelfAttentionStepCache, dy_dkv: Any, dweights: Array, dlse: Array
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
