"""Multi-head attention and one head of it: check, widen, compose group after group, round; and from the bottom up.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, Cq Ck Cv input widths; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from . import _check, tree
from ._bias import (
    bias_as_head,
    bias_as_head_vjp,
    bias_of_heads,
    bias_of_sample,
    join_biases,
    join_samples,
    on_bias,
)
from ._doors import values_of
from ._doors_of_heads import check_inputs, visible
from ._xp import Array, namespace, narrow, of_heads, widen
from .biases import RelativeBias
from .dropout import Masked, Seeded
from .engines import BATCHED, REFERENCE, Engine
from .heads import (
    AttendCache,
    CombineCache,
    Options,
    attend,
    attend_vjp,
    cheap,
    combine,
    combine_vjp,
    cut,
    cut_attended,
    cut_combined,
    engine_of,
    num_keys,
    recall,
)
from .masks import Mask
from .norms import Norm
from .ops import attention_weights, log_sum_exp
from .params import HEAD_SPEC, SPEC, Params, check, group_params, join_groups, stack_head, unstack_head
from .rotary import Rotary
from .tiled.tiles import ROWS

# So many numbers of the queries, keys and values of a few heads are worth a task for all threads: the gradient goes so
# many heads at a time, and holds what it needs between projection and attention for these alone. Of short sequences,
# where projections take longest and want to be wide, eight times as many.
GROUP = 2**18

# ── head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HeadCache(NamedTuple):
    heads: AttendCache  # of one head


def head(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    zero_attn: bool = False,
    qk_norm: Norm | None = None,
    rotary: Rotary | tuple[Rotary | None, Rotary | None] | None = None,
    dropout: Masked | Seeded | None = None,
    engine: Engine | None = None,
) -> tuple[Array, HeadCache]:
    """o = attention(query wqᵀ + bq, key wkᵀ + bk, value wvᵀ + bv)
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   o (..., T, E)

    One head with its own projections, headᵢ of Vaswani et al. 2017, section 3.2.2. `params` is
    `head_params(params, h)`: q_proj w (D, Cq), b (D); k_proj w (D, Ck), b (D); v_proj w (E, Cv), b (E); bias_kv k (D),
    v (E). `bias` and `mask` broadcast to (..., T, S), a mask of
    dropout to (..., T, S'). All else is as in `mha`, which equals its
    heads side by side times its out_proj.
    """
    axes, leaves = check(params, HEAD_SPEC)
    given = Options(mask, scale, softcap, zero_attn, qk_norm, rotary, dropout, engine)
    options = check_inputs(axes, leaves, query, key, value, bias, given)
    dtype, stack = query.dtype, tree.map(widen, stack_head(params))
    query, key, value = visible(query, key, value, options.mask, zero_attn or "bias_kv" in params)
    o, heads = attend(stack, query, key, value, bias_as_head(on_bias(widen, bias)), options)
    return narrow(o[..., 0, :], dtype), HeadCache(heads)


def head_vjp(
    cache: HeadCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `head` from the bottom up
    from the cotangents of o and, where given, of the weights (..., T, S') and lse (..., T)

    per_sample   as in `mha_vjp`
    """
    _check.cache(cache, HeadCache, "head")
    _check.flag("per_sample", per_sample)
    (heads,) = cache
    *batch, T, _ = heads.q.x.shape
    like = heads.q.x
    _check.cotangent("do", do, (*batch, T, heads.v.w.shape[-2]), like, "... T E")
    _check.cotangent("dweights", dweights, (*batch, T, num_keys(heads)), like, "... T S'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, T), like, "... T", optional=True)
    dweights = None if dweights is None else widen(dweights)[..., None, :, :]
    dlse = None if dlse is None else widen(dlse)[..., None, :]

    def back(b: tuple[int, ...], g: Array, dweights: Array, dlse: Array) -> tuple[Any, ...]:
        return _one_head(cut_attended(heads, b), g, dweights, dlse)

    cotangents = widen(do)[..., None, :], dweights, dlse
    *grads, dbias = (
        _each_sample("do", tuple(batch), heads.bias, back, *cotangents) if per_sample else _one_head(heads, *cotangents)
    )
    return narrow_all((*grads, bias_as_head_vjp(dbias)), do)


def _one_head(heads: AttendCache, do: Array, dweights: Array, dlse: Array) -> tuple[Any, ...]:
    """The gradients of a stack of one head, without its axis in those of the parameters"""
    dstack, dxs, dbias = attend_vjp(heads, do, dweights=dweights, dlse=dlse, onto=(None, None, None))
    return unstack_head(dstack), *dxs, dbias


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class GroupCache(NamedTuple):
    heads: AttendCache
    out: CombineCache


class MhaCache(NamedTuple):
    groups: tuple[GroupCache, ...]  # some heads each, in order
    bias: Array  # broadcasts to (..., H, T, S), or None


def mha(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    zero_attn: bool = False,
    qk_norm: Norm | None = None,
    rotary: Rotary | tuple[Rotary | None, Rotary | None] | None = None,
    dropout: Masked | Seeded | None = None,
    engine: Engine | None = None,
) -> tuple[Array, MhaCache]:
    """y = Σₕ attention(query wqₕᵀ + bqₕ, key wkₕᵀ + bkₕ, value wvₕᵀ + bvₕ, bias, sinkₕ) woₕᵀ + bo
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   y (..., T, O)

    params     a tree of `funcmha.params.SPEC`; without biases where it has none, with K < H for grouped queries
    mask       boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S); per batch: (B, 1, T, S)
    bias       added to the scores, differentiable, broadcasts to (..., H, T, S); or a `biases.RelativeBias`
    scale      D ** -0.5 unless given: a number, or one for each head
    softcap    soft cap of the scores, before the bias: a number, or one for each head
    qk_norm    `RMSNorm`, `L2Norm` or `LayerNorm` of `funcmha.norms`: of queries and keys after their projection, by the
               parameters q_norm and k_norm, which are those of every head
    rotary     a table of `funcmha.rotary` that turns queries and keys after that, or two, of T and of S positions;
               those of each sample are (B, 1, T)
    zero_attn  append a key and value of zeros that every query may see, after those of params["bias_kv"]
    dropout    `dropout.masked(keep, rate)` of `funcmha`: of the weights by a boolean mask, True = keep, that broadcasts
               to (..., H, T, S'); or `dropout.seeded(seed, rate)`, which draws it
    engine     the way to do it, of `funcmha.engines`: REFERENCE for all arrays; for NumPy's TILED in linear memory, and
               BATCHED for short sequences; None picks the fastest. The results are the same, to rounding

    The dtype of the result is that of the inputs; float16 and bfloat16 are computed with in float32 and rounded once. A
    query that may see no key gives out_proj's bias, and gradients 0. It has no effect, even if it is NaN; nor has a key
    that no query may see; nor a token of `self_attention` that is both. Raises KeyError for a missing or unexpected
    leaf, TypeError for wrong dtypes, ValueError for shapes that do not fit; each names the argument, before any
    arithmetic.
    Vaswani et al. 2017, section 3.2.2; appended keys as in `torch.nn.MultiheadAttention`.
    """
    axes, leaves = check(params, SPEC)
    given = Options(mask, scale, softcap, zero_attn, qk_norm, rotary, dropout, engine)
    options = check_inputs(axes, leaves, query, key, value, bias, given)
    dtype, params, bias = query.dtype, tree.map(widen, params), on_bias(widen, bias)
    query, key, value = visible(query, key, value, options.mask, zero_attn or "bias_kv" in params)
    y, groups, per_key_head = None, [], axes["H"] // max(axes["K"], 1)
    for start, stop in _groups(axes, options.engine):
        group, h = group_params(params, start, stop), slice(start * per_key_head, stop * per_key_head)
        o, heads = attend(group, query, key, value, bias_of_heads(bias, h), _of_heads(options, h))
        y, out = combine(group["out_proj"], o, engine=options.engine, onto=y)
        groups.append(GroupCache(heads, out))
    return narrow(y, dtype), MhaCache(tuple(groups), bias)


def mha_vjp(
    cache: MhaCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `mha` from the bottom up
    from the cotangents of y and, where given, of the weights (..., H, T, S') and lse (..., H, T)

    per_sample   each leaf of dparams with the batch before it, (..., *leaf), for clipping and influence: its sum over
                 the batch is the gradient. The other gradients are what they are without

    A NaN in the dy of a query that may see no key reaches out_proj, whose bias has the sum of dy, and nothing else.
    """
    _check.cache(cache, MhaCache, "mha")
    return _backward(cache, dy, dweights, dlse, 3, per_sample)


def _backward(
    cache: MhaCache, dy: Array, dweights: Array, dlse: Array, inputs: int, per_sample: bool
) -> tuple[Any, ...]:
    """`mha_vjp` with a gradient for each of three inputs, or one for one input that is query, key and value."""
    _check.flag("per_sample", per_sample)
    heads, out = cache.groups[0]
    *batch, T, _, _ = out.o.shape
    H = sum(group.out.o.shape[-2] for group in cache.groups)
    _check.cotangent("dy", dy, (*batch, T, out.w.shape[0]), out.o, "... T O")
    _check.cotangent("dweights", dweights, (*batch, H, T, num_keys(heads)), out.o, "... H T S'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, H, T), out.o, "... H T", optional=True)

    def back(b: tuple[int, ...], g: Array, dweights: Array, dlse: Array) -> tuple[Any, ...]:
        groups = tuple(GroupCache(cut_attended(heads, b), out._replace(o=out.o[b])) for heads, out in cache.groups)
        return _all_groups(MhaCache(groups, bias_of_sample(cache.bias, b)), g, dweights, dlse, inputs)

    cotangents = widen(dy), widen(dweights), widen(dlse)
    if per_sample:
        return narrow_all(_each_sample("dy", tuple(batch), cache.bias, back, *cotangents), dy)
    return narrow_all(_all_groups(cache, *cotangents, inputs), dy)


def _each_sample(
    name: str,
    batch: tuple[int, ...],
    bias: Array | RelativeBias,
    back: Callable[..., tuple[Any, ...]],
    *cotangents: Array,
) -> tuple[Any, ...]:
    """What `back` gives of one element of the batch after another, with the batch before each leaf of dparams"""
    xp = namespace(cotangents[0])
    if not prod(batch):
        raise ValueError(f"{name} must have a sample to be per_sample, got a batch of {batch}")
    parts = {b: back(b, *(None if a is None else a[b] for a in cotangents)) for b in np.ndindex(*batch)}

    def stacked(*leaves: Array) -> Array:
        return xp.reshape(xp.stack(leaves), (*batch, *leaves[0].shape))

    dparams, *dxs, dbiases = zip(*parts.values(), strict=True)
    joined = join_samples(bias, dict(zip(parts, dbiases, strict=True)))
    return tree.map(stacked, *dparams), *(stacked(*dx) for dx in dxs), joined


def _all_groups(cache: MhaCache, g: Array, dweights: Array, dlse: Array, inputs: int) -> tuple[Any, ...]:
    """The gradients, group after group of heads."""
    dxs: tuple[Array, ...] = (None,) * inputs
    dgroups, dbiases = [], []
    for h, (heads, out) in reversed(_pieces(cache)):
        dout, do = combine_vjp(out, g)
        dlse_h = None if dlse is None else dlse[..., h, :]
        dgroup, dxs, dbias = attend_vjp(heads, do, dweights=of_heads(dweights, h), dlse=dlse_h, onto=dxs)
        dgroups.append(dgroup | {"out_proj": dout})
        dbiases.append(dbias)
    return join_groups(dgroups[::-1]), *dxs, join_biases(cache.bias, dbiases[::-1])


def _of_heads(x: Options, h: slice) -> Options:
    """The options of some query heads."""
    mask = None if x.mask is None else x.mask.heads(h.start, h.stop)
    scale, softcap = (a if a is None or isinstance(a, float) else a[h] for a in (x.scale, x.softcap))
    dropout = None if x.dropout is None else x.dropout.heads(h)
    return x._replace(mask=mask, scale=scale, softcap=softcap, dropout=dropout)


def _groups(axes: _check.Axes, engine: Engine) -> list[tuple[int, int]]:
    """The key/value heads, start … stop, to project at once: few, or all if the projections are kept anyhow.

    But the reference, which takes at once what it is given, gets few in any case.
    """
    T, S, K, width = axes["T"], axes["S"], axes["K"], max(axes["Cq"], axes["Ck"], axes["Cv"])
    if engine is not REFERENCE and not cheap(T, S, width):
        return [(0, K)]
    return _few(K, prod(axes["..."]) * max(axes["H"] // max(K, 1) * T, S) * (axes["D"] + axes["E"]))


def _pieces(cache: MhaCache) -> list[tuple[slice, GroupCache]]:
    """The groups, cut into few heads each, and which query heads those are."""
    pieces, stop = [], 0
    for heads, out in cache.groups:
        (H, D, _), (K, E, _) = heads.q.w.shape, heads.v.w.shape
        samples, T = prod(out.o.shape[:-3]), out.o.shape[-3]
        numbers = samples * max(H // max(K, 1) * T, num_keys(heads)) * (D + E)
        least = 2 if samples == 1 and T <= ROWS else 1  # nothing of a head is work for two threads there
        for kv in _few(K, numbers // 8 if engine_of(heads.q) == BATCHED else numbers, least):
            h = slice(kv[0] * (H // max(K, 1)), kv[1] * (H // max(K, 1)))
            piece = GroupCache(heads, out) if h == slice(0, H) else GroupCache(cut(heads, *kv), cut_combined(out, h))
            pieces.append((slice(stop + h.start, stop + h.stop), piece))
        stop += H
    return pieces


def _few(K: int, numbers: int, least: int = 1) -> list[tuple[int, int]]:
    """0 … K in ranges of so many heads as have at most GROUP `numbers`, one head having so many; but of the least"""
    size = max(GROUP // max(numbers, 1), least)
    return [(i, min(i + size, K)) for i in range(0, max(K, 1), size)]


# ── self-attention ───────────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionCache(NamedTuple):
    mha: MhaCache


def self_attention(
    params: Params, x: Array, bias: Array | RelativeBias = None, /, **static: Any
) -> tuple[Array, SelfAttentionCache]:
    """y = mha(params, x, x, x, bias)      x (..., T, C)   →   y (..., T, O)

    Takes the keyword arguments of `mha`, and raises what it raises.
    """
    axes, leaves = check(params, SPEC)
    _check.one_dtype([*leaves.items(), ("x", x)], optional=[("bias", values_of(bias))])
    for projection in ("Cq", "Ck", "Cv"):
        axes("x", x, f"... T {projection}")
    y, cache = mha(params, x, x, x, bias, **static)
    return y, SelfAttentionCache(cache)


def self_attention_vjp(
    cache: SelfAttentionCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dx, dbias      dx = dquery + dkey + dvalue; `per_sample` as in `mha_vjp`"""
    _check.cache(cache, SelfAttentionCache, "self_attention")
    return _backward(cache.mha, dy, dweights, dlse, 1, per_sample)


# ── what the caches can tell, and the doors ──────────────────────────────────────────────────────────────────────


@attention_weights.register
def _(cache: HeadCache, /) -> Array:
    return attention_weights(recall(cache.heads).attention)[..., 0, :, :]


@log_sum_exp.register
def _(cache: HeadCache, /) -> Array:
    return log_sum_exp(cache.heads.attention)[..., 0, :]


@attention_weights.register
def _(cache: MhaCache, /) -> Array:
    parts = [attention_weights(recall(heads).attention) for heads, _ in cache.groups]
    return namespace(parts[0]).concat(parts, axis=-3)


@log_sum_exp.register
def _(cache: MhaCache, /) -> Array:
    parts = [log_sum_exp(heads.attention) for heads, _ in cache.groups]
    return namespace(parts[0]).concat(parts, axis=-2)


@attention_weights.register
def _(cache: SelfAttentionCache, /) -> Array:
    return attention_weights(cache.mha)


@log_sum_exp.register
def _(cache: SelfAttentionCache, /) -> Array:
    return log_sum_exp(cache.mha)


def narrow_all(grads: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    """Every gradient in the dtype of the cotangent: of the parameters, the inputs, and the bias."""

    def rounded(g: Array) -> Array:
        return narrow(g, dy.dtype)

    dparams, *dxs, dbias = grads
    return tree.map(rounded, dparams), *(rounded(dx) for dx in dxs), on_bias(rounded, dbias)
