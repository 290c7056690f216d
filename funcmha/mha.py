"""Multi-head attention and one head of it: check, widen, compose, round; and the same from the bottom up.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, Cq Ck Cv input widths; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from typing import Any, NamedTuple

from . import _check, tree
from ._xp import Array, narrow, widen
from .engines import Engine, pick
from .heads import CombineCache, HeadsCache, attend, attend_vjp, combine, combine_vjp
from .masks import Mask, as_mask
from .ops import attention_weights, blank, check_keep, check_mask, log_sum_exp
from .params import HEAD_SPEC, SPEC, Params, check

# ── head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HeadCache(NamedTuple):
    heads: HeadsCache  # of one head


def head(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | None = None,
    zero_attn: bool = False,
    keep: Array = None,
    rate: float = 0.0,
    engine: Engine | None = None,
) -> tuple[Array, HeadCache]:
    """o = attention(query wqᵀ + bq, key wkᵀ + bk, value wvᵀ + bv)
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   o (..., T, E)

    One head with its own projections, headᵢ of Vaswani et al. 2017, section 3.2.2. `params` is
    `head_params(params, h)`: q_proj w (D, Cq), b (D); k_proj w (D, Ck), b (D); v_proj w (E, Cv), b (E); bias_kv k (D),
    v (E). `bias` and `mask` broadcast to (..., T, S), `keep` to (..., T, S'). All else is as in `mha`, which equals its
    heads side by side times its out_proj.
    """
    axes, leaves = check(params, HEAD_SPEC)
    mask, scale = _check_inputs(axes, leaves, query, key, value, bias, mask, scale, zero_attn, keep, rate)

    stack = tree.map(lambda a: widen(a)[None, ...], params)
    o, heads = attend(
        stack,
        widen(query),
        _blank(widen(key), mask, query.shape[-2]),
        _blank(widen(value), mask, query.shape[-2]),
        _as_head(widen(bias)),
        mask=mask,
        scale=scale,
        zero_attn=zero_attn,
        keep=_as_head(keep),
        rate=rate,
        engine=pick(engine, query),
    )
    return narrow(o[..., 0, :], query.dtype), HeadCache(heads)


def head_vjp(cache: HeadCache, do: Array, /, *, dweights: Array = None, dlse: Array = None) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `head` from the bottom up
    from the cotangents of o and, where given, of the weights (..., T, S') and lse (..., T)
    """
    (heads,) = cache
    *batch, T, _ = heads.q.x.shape
    like = heads.q.x
    _check.cotangent("do", do, (*batch, T, heads.v.w.shape[-2]), like, "... T E")
    _check.cotangent("dweights", dweights, (*batch, T, _keys(heads)), like, "... T S'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, T), like, "... T", optional=True)
    dstack, dquery, dkey, dvalue, dbias = attend_vjp(
        heads,
        widen(do)[..., None, :],
        dweights=None if dweights is None else widen(dweights)[..., None, :, :],
        dlse=None if dlse is None else widen(dlse)[..., None, :],
    )
    dparams = tree.map(lambda a: a[0, ...], dstack)
    dbias = dbias if dbias is None or dbias.ndim < 4 else dbias[..., 0, :, :]
    return _narrow((dparams, dquery, dkey, dvalue, dbias), do)


def _as_head(a: Array) -> Array:
    """a (..., T, S)   →   (..., 1, T, S); with no batch axes there is nothing to tell apart"""
    return a if a is None or a.ndim < 3 else a[..., None, :, :]


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class MhaCache(NamedTuple):
    heads: HeadsCache
    out: CombineCache


def mha(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | None = None,
    zero_attn: bool = False,
    keep: Array = None,
    rate: float = 0.0,
    engine: Engine | None = None,
) -> tuple[Array, MhaCache]:
    """y = Σₕ attention(query wqₕᵀ + bqₕ, key wkₕᵀ + bkₕ, value wvₕᵀ + bvₕ) woₕᵀ + bo
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   y (..., T, O)

    params     a tree of `funcmha.params.SPEC`; without biases where it has none, with K < H for grouped queries
    mask       boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S); per batch: (B, 1, T, S)
    bias       added to the scores, differentiable, broadcasts to (..., H, T, S)
    scale      D ** -0.5 unless given
    zero_attn  append a key and value of zeros that every query may see, after those of params["bias_kv"]
    keep       boolean, True = keep: dropout of the weights at `rate`, broadcasts to (..., H, T, S')
    engine     the way to do it, of `funcmha.engines`: TILED in linear memory, for NumPy arrays, REFERENCE for all; None
               picks one. The results are the same, to rounding

    The dtype of the result is that of the inputs; float16 and bfloat16 are computed with in float32 and rounded once. A
    query that may see no key gives out_proj's bias, and gradients 0. Raises KeyError for a missing or unexpected leaf,
    TypeError for wrong dtypes, ValueError for shapes that do not fit; each names the argument, before any arithmetic.
    Vaswani et al. 2017, section 3.2.2; appended keys as in `torch.nn.MultiheadAttention`.
    """
    axes, leaves = check(params, SPEC)
    mask, scale = _check_inputs(axes, leaves, query, key, value, bias, mask, scale, zero_attn, keep, rate)
    engine = pick(engine, query)

    params = tree.map(widen, params)
    o, heads = attend(
        params,
        widen(query),
        _blank(widen(key), mask, query.shape[-2]),
        _blank(widen(value), mask, query.shape[-2]),
        widen(bias),
        mask=mask,
        scale=scale,
        zero_attn=zero_attn,
        keep=keep,
        rate=rate,
        engine=engine,
    )
    y, out = combine(params["out_proj"], o, engine=engine)
    return narrow(y, query.dtype), MhaCache(heads, out)


def mha_vjp(cache: MhaCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `mha` from the bottom up
    from the cotangents of y and, where given, of the weights (..., H, T, S') and lse (..., H, T)
    """
    heads, out = cache
    *batch, T, H, _ = out.o.shape
    _check.cotangent("dy", dy, (*batch, T, out.w.shape[0]), out.o, "... T O")
    _check.cotangent("dweights", dweights, (*batch, H, T, _keys(heads)), out.o, "... H T S'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, H, T), out.o, "... H T", optional=True)

    dout_proj, do = combine_vjp(out, widen(dy))
    dparams, dquery, dkey, dvalue, dbias = attend_vjp(heads, do, dweights=widen(dweights), dlse=widen(dlse))
    return _narrow((dparams | {"out_proj": dout_proj}, dquery, dkey, dvalue, dbias), dy)


# ── self-attention ───────────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionCache(NamedTuple):
    mha: MhaCache


def self_attention(params: Params, x: Array, bias: Array = None, /, **static: Any) -> tuple[Array, SelfAttentionCache]:
    """y = mha(params, x, x, x, bias)      x (..., T, C)   →   y (..., T, O)

    Takes the keyword arguments of `mha`, and raises what it raises.
    """
    axes, leaves = check(params, SPEC)
    _check.one_dtype([*leaves.items(), ("x", x)], optional=[("bias", bias)])
    for projection in ("Cq", "Ck", "Cv"):
        axes("x", x, f"... T {projection}")
    y, cache = mha(params, x, x, x, bias, **static)
    return y, SelfAttentionCache(cache)


def self_attention_vjp(
    cache: SelfAttentionCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Any, ...]:
    """dparams, dx, dbias      dx = dquery + dkey + dvalue"""
    dparams, dquery, dkey, dvalue, dbias = mha_vjp(cache.mha, widen(dy), dweights=widen(dweights), dlse=widen(dlse))
    return _narrow((dparams, dquery + dkey + dvalue, dbias), dy)


# ── what the caches can tell, and the doors ──────────────────────────────────────────────────────────────────────


@attention_weights.register
def _(cache: HeadCache, /) -> Array:
    return attention_weights(cache.heads.attention)[..., 0, :, :]


@log_sum_exp.register
def _(cache: HeadCache, /) -> Array:
    return log_sum_exp(cache.heads.attention)[..., 0, :]


@attention_weights.register
def _(cache: MhaCache, /) -> Array:
    return attention_weights(cache.heads.attention)


@log_sum_exp.register
def _(cache: MhaCache, /) -> Array:
    return log_sum_exp(cache.heads.attention)


@attention_weights.register
def _(cache: SelfAttentionCache, /) -> Array:
    return attention_weights(cache.mha)


@log_sum_exp.register
def _(cache: SelfAttentionCache, /) -> Array:
    return log_sum_exp(cache.mha)


def _check_inputs(
    axes: _check.Axes,
    leaves: dict[str, Array],
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    mask: Any,
    scale: float | None,
    zero_attn: bool,
    keep: Array,
    rate: float,
) -> tuple[Mask | None, float | None]:
    """The door of `head` and `mha`: the mask as a `Mask` or None, and the scale as a Python float or None."""
    inputs = [("query", query), ("key", key), ("value", value)]
    _check.one_dtype([*leaves.items(), *inputs], optional=[("bias", bias)])
    axes("query", query, "... T Cq")
    axes("key", key, "... S Ck")
    axes("value", value, "... S Cv")
    one_head = "H" not in axes.size
    lead = "... " if one_head else "... H "
    axes.broadcast("bias", _check.shape_of(bias), lead + "T S")
    if one_head and isinstance(mask, Mask):
        axes.size["1"] = 1
        mask = check_mask(axes, mask, "... 1 T S")
    else:
        mask = check_mask(axes, mask, lead + "T S")
        mask = as_mask(_as_head(mask.array)) if one_head and mask is not None else mask
    if not isinstance(zero_attn, bool):
        raise TypeError(f"zero_attn must be True or False, got {zero_attn!r}")
    axes.size["S'"] = axes["S"] + ("bias_kv.k" in leaves) + zero_attn
    check_keep(axes, keep, rate, lead + "T S'")
    return mask, None if scale is None else _check.number("scale", scale)


def _keys(cache: HeadsCache) -> int:
    """S'"""
    return int(cache.attention.k.shape[-2])


def _blank(x: Array, mask: Mask | None, T: int) -> Array:
    """x (..., S, C) with 0 at the keys that no query of any head may see: a NaN there would reach Σ dk xᵀ as 0 · NaN"""
    if mask is None:
        return x
    return blank(x[..., None, :, :], mask.seen(T, x.shape[-2], x))[..., 0, :, :]


def _narrow(grads: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    """Every gradient in the dtype of the cotangent."""
    return tuple(tree.map(lambda g: narrow(g, dy.dtype), grad) for grad in grads)
