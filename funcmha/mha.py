"""The specification of multi-head attention: the heads, one after another, and their gradients, last head first.

    head              project → normalise and rotate → append keys → attention
    mha               Σ over the heads of head × its rows of the output projection
    self_attention    mha of one input

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, Cq Ck Cv input widths; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from typing import Any, NamedTuple, Unpack

from . import _arguments, _check, tree
from ._arguments import Bias, HeadOptions, Options, takes
from ._arrays import Array, downcast, full, namespace, sum_over_batch, upcast
from .biases import as_bias
from .masks import append_keys
from .masks.zero import zero_inputs
from .norms import Norm
from .ops import AttentionCache, LinearCache, attend, attention_vjp, linear, linear_vjp, round_bias
from .params import Params, drop_absent, in_order_of, join_heads, leaf, one_head
from .rotary import RotateCache, rotate, rotate_vjp

# ── one head ─────────────────────────────────────────────────────────────────────────────────────────────────────


class HeadCache(NamedTuple):
    params: Params  # of `HEAD_SPEC`
    query: LinearCache  # of (..., T, Cq)
    key: LinearCache  # of (..., S, Ck)
    value: LinearCache  # of (..., S, Cv)
    q_position: "PositionCache"
    k_position: "PositionCache"
    bias: Bias  # broadcasts to (..., 1, T, S), or None
    attention: AttentionCache  # with a head axis of 1, of S' keys


@takes(HeadOptions)
def head(
    params: Params, query: Array, key: Array, value: Array, bias: Any = None, /, **options: Unpack[HeadOptions]
) -> tuple[Array, HeadCache]:
    """o = attention(query wqᵀ + bq, key wkᵀ + bk, value wvᵀ + bv)
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   o (..., T, E)

    One head with its own projections, headᵢ of Vaswani et al. 2017, section 3.2.2. `params` is
    `head_params(params, h)`: q_proj w (D, Cq), b (D); k_proj w (D, Ck), b (D); v_proj w (E, Cv), b (E); bias_kv k (D),
    v (E). `bias` and `mask` broadcast to (..., T, S), the booleans of `dropout` to (..., T, S'). All else is as in
    `mha`.
    """
    _, bias, x = _arguments.check_head(params, query, key, value, bias, options)
    dtype, params, bias = query.dtype, tree.map(upcast, params), None if bias is None else bias.map(upcast)
    inputs = zero_inputs(query, key, value, x.mask, x.zero_attn or "bias_kv" in params)
    o, cache = _head(params, *inputs, bias, x)
    return downcast(o, dtype), cache


def head_vjp(
    cache: HeadCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `head` from the bottom up
    from the cotangents of o and, where given, of the weights (..., T, S') and lse (..., T)

    per_sample   as in `mha_vjp`
    """
    _check.cache(cache, HeadCache, "head")
    _check.flag("per_sample", per_sample)
    x, k, v = cache.query.x, cache.attention.k, cache.attention.v
    _arguments.check_cotangents_of_head(do, dweights, dlse, x, v.shape[-1], k.shape[-2])
    dweights = None if dweights is None else upcast(dweights)[..., None, :, :]
    dlse = None if dlse is None else upcast(dlse)[..., None, :]
    *grads, dbias = _head_vjp(cache, upcast(do), dweights, dlse, x.ndim - 2 if per_sample else 0)
    dparams, *dxs = grads
    dbias = None if dbias is None else dbias.without_head_axis()
    return round_gradients((in_order_of(cache.params, dparams), *dxs, dbias), do.dtype)


def _head(params: Params, query: Array, key: Array, value: Array, bias: Bias, x: Options) -> tuple[Array, HeadCache]:
    """`head`, of arguments that are checked and upcast"""
    q, query_cache = linear(query, leaf(params, "q_proj.w"), leaf(params, "q_proj.b"))
    k, key_cache = linear(key, leaf(params, "k_proj.w"), leaf(params, "k_proj.b"))
    v, value_cache = linear(value, leaf(params, "v_proj.w"), leaf(params, "v_proj.b"))
    q, q_position = position(q[..., None, :, :], params.get("q_norm", {}), x.qk_norm, x.rotary[0])
    k, k_position = position(k[..., None, :, :], params.get("k_norm", {}), x.qk_norm, x.rotary[1])
    k = append_rows(k, leaf(params, "bias_kv.k"), x.zero_attn)
    v = append_rows(v[..., None, :, :], leaf(params, "bias_kv.v"), x.zero_attn)
    sink, appended = leaf(params, "sink.w"), k.shape[-2] - key.shape[-2]
    o, attention_cache = attend(
        q,
        k,
        v,
        bias if bias is None else bias.append_keys(key.shape[-2], appended),
        sink if sink is None else sink[None],
        x._replace(mask=append_keys(x.mask, q.shape[-2], key.shape[-2], appended, q)),
    )
    cache = HeadCache(params, query_cache, key_cache, value_cache, q_position, k_position, bias, attention_cache)
    return o[..., 0, :, :], cache


def _head_vjp(cache: HeadCache, do: Array, dweights: Array, dlse: Array, batch_axes: int) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias"""
    dq, dk, dv, dbias, dsink = attention_vjp(
        cache.attention, do[..., None, :, :], dweights=dweights, dlse=dlse, batch_axes=batch_axes
    )
    dbias = dbias if dbias is None else cache.bias.append_keys_vjp(cache.key.x.shape[-2], as_bias(dbias))
    dv, dv_row = append_rows_vjp(cache.value.x.shape[-2], leaf(cache.params, "bias_kv.v"), dv, batch_axes)
    dk, dk_row = append_rows_vjp(cache.key.x.shape[-2], leaf(cache.params, "bias_kv.k"), dk, batch_axes)
    dk, dk_norm = position_vjp(cache.k_position, dk, batch_axes)
    dq, dq_norm = position_vjp(cache.q_position, dq, batch_axes)
    dvalue, dv_w, dv_b = linear_vjp(cache.value, dv[..., 0, :, :], batch_axes=batch_axes)
    dkey, dk_w, dk_b = linear_vjp(cache.key, dk[..., 0, :, :], batch_axes=batch_axes)
    dquery, dq_w, dq_b = linear_vjp(cache.query, dq[..., 0, :, :], batch_axes=batch_axes)
    dparams = {
        "q_proj": {"w": dq_w, "b": dq_b},
        "k_proj": {"w": dk_w, "b": dk_b},
        "v_proj": {"w": dv_w, "b": dv_b},
        "bias_kv": {"k": dk_row, "v": dv_row},
        "sink": {"w": dsink if dsink is None else dsink[..., 0]},
        "q_norm": dq_norm,
        "k_norm": dk_norm,
    }
    return drop_absent(dparams), dquery, dkey, dvalue, dbias


# ── all heads ────────────────────────────────────────────────────────────────────────────────────────────────────


class MhaCache(NamedTuple):
    params: Params  # of `SPEC`
    heads: tuple[HeadCache, ...]  # H
    out: tuple[LinearCache, ...]  # H, of (..., T, E) by (O, E)
    bias: Bias  # broadcasts to (..., H, T, S), or None


@takes(HeadOptions)
def mha(
    params: Params, query: Array, key: Array, value: Array, bias: Any = None, /, **options: Unpack[HeadOptions]
) -> tuple[Array, MhaCache]:
    """y = Σₕ head(paramsₕ, query, key, value, biasₕ) woₕᵀ + bo
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   y (..., T, O)

    params     a tree of `funcmha.params.SPEC`; without biases where it has none, with K < H for grouped-query attention
    bias       added to the scores, differentiable, broadcasts to (..., H, T, S); or a `RelativeBias`
    mask       boolean or from `funcmha.masks`, True = attend, broadcasts to (..., H, T, S); per batch: (B, 1, T, S)
    scale      D ** -0.5 unless given: a number, or one for each head
    softcap    soft cap of the scores, before the bias: a number, or one for each head
    dropout    of the weights: `dropout.masked(keep, rate)`, whose keep broadcasts to (..., H, T, S'), or
               `dropout.seeded(seed, rate)`
    zero_attn  append a key and value of zeros that every query attends, after those of params["bias_kv"]
    qk_norm    `RMSNorm`, `L2Norm` or `LayerNorm` of `funcmha.norms`: of queries and keys after their projection, with
               the parameters q_norm and k_norm, which are those of every head
    rotary     a table of `funcmha.rotary` that rotates queries and keys after that, or two, of T and of S positions;
               those of each sample are (B, 1, T)

    The dtype of the result is that of the inputs; float16 and bfloat16 are computed with in float32 and rounded once. A
    fully masked query gives out_proj's bias, and gradients 0. It has no effect, even if it is NaN; nor has a key that
    no query attends; nor a token of `self_attention` that is both. Raises KeyError for a missing or unexpected leaf,
    TypeError for wrong dtypes, ValueError for shapes that do not fit; each names the argument, before any arithmetic.
    Vaswani et al. 2017, section 3.2.2; appended keys as in `torch.nn.MultiheadAttention`.
    """
    axes, bias, x = _arguments.check_mha(params, query, key, value, bias, options)
    dtype, params, bias = query.dtype, tree.map(upcast, params), None if bias is None else bias.map(upcast)
    inputs = zero_inputs(query, key, value, x.mask, x.zero_attn or "bias_kv" in params)
    y, heads, out = 0.0, [], []
    for h in range(axes["H"]):
        one = slice(h, h + 1)
        o, head_cache = _head(one_head(params, h), *inputs, bias if bias is None else bias.heads(one), x.heads(one))
        y_h, out_cache = linear(o, leaf(params, "out_proj.w")[:, h, :], leaf(params, "out_proj.b") if h == 0 else None)
        y = y + y_h
        heads.append(head_cache)
        out.append(out_cache)
    return downcast(y, dtype), MhaCache(params, tuple(heads), tuple(out), bias)


def mha_vjp(
    cache: MhaCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `mha` from the bottom up
    from the cotangents of y and, where given, of the weights (..., H, T, S') and lse (..., H, T)

    per_sample   each leaf of dparams with the batch before it, (..., *leaf), for clipping and influence: its sum over
                 the batch is the gradient. The other gradients are what they are without

    A NaN in the dy of a fully masked query reaches out_proj, whose bias has the sum of dy, and nothing else.
    """
    _check.cache(cache, MhaCache, "mha")
    _check.flag("per_sample", per_sample)
    o, w, keys = cache.out[0].x, leaf(cache.params, "out_proj.w"), cache.heads[0].attention.k.shape[-2]
    _arguments.check_cotangents_of_mha(dy, dweights, dlse, o, w.shape[0], w.shape[1], keys)
    g, dweights, dlse = upcast(dy), upcast(dweights), upcast(dlse)
    batch_axes = o.ndim - 2 if per_sample else 0
    dheads, dquery, dkey, dvalue, dbiases = [], 0.0, 0.0, 0.0, []
    for h in reversed(range(len(cache.heads))):
        do, dw, db = linear_vjp(cache.out[h], g, batch_axes=batch_axes)
        dweights_h = dweights if dweights is None else dweights[..., h : h + 1, :, :]
        dlse_h = dlse if dlse is None else dlse[..., h : h + 1, :]
        dhead, dq, dk, dv, dbias = _head_vjp(cache.heads[h], do, dweights_h, dlse_h, batch_axes)
        dquery, dkey, dvalue = dquery + dq, dkey + dk, dvalue + dv
        dheads.append(drop_absent(dhead | {"out_proj": {"w": dw, "b": db}}))
        dbiases.append(dbias)
    dparams = in_order_of(cache.params, join_heads(dheads[::-1], leaf(cache.params, "k_proj.w").shape[0]))
    dbias = cache.bias if cache.bias is None else cache.bias.join(dbiases[::-1])
    return round_gradients((dparams, dquery, dkey, dvalue, dbias), dy.dtype)


# ── self-attention ───────────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionCache(NamedTuple):
    mha: MhaCache


@takes(HeadOptions)
def self_attention(
    params: Params, x: Array, bias: Any = None, /, **options: Unpack[HeadOptions]
) -> tuple[Array, SelfAttentionCache]:
    """y = mha(params, x, x, x, bias)      x (..., T, C)   →   y (..., T, O)

    Takes the options of `mha`, and raises what it raises.
    """
    _arguments.check_self_attention(params, x, bias, options)
    y, cache = mha(params, x, x, x, bias, **options)
    return y, SelfAttentionCache(cache)


def self_attention_vjp(
    cache: SelfAttentionCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dx, dbias      dx = dquery + dkey + dvalue; the rest as in `mha_vjp`"""
    _check.cache(cache, SelfAttentionCache, "self_attention")
    _check.one_dtype([("dy", dy)])
    dparams, dquery, dkey, dvalue, dbias = mha_vjp(
        cache.mha, upcast(dy), dweights=dweights, dlse=dlse, per_sample=per_sample
    )
    return round_gradients((dparams, dquery + dkey + dvalue, as_bias(dbias)), dy.dtype)


# ── the parts of a head ──────────────────────────────────────────────────────────────────────────────────────────


class PositionCache(NamedTuple):
    norm: Norm | None
    normalised: Any  # the cache of the norm, or None
    rotated: RotateCache | None


def position(x: Array, params: Params, norm: Norm | None, table: Any) -> tuple[Array, PositionCache]:
    """y = rotate(norm(x))     x (..., T, D)   w, b of the norm (D,) or absent   →   y (..., T, D)"""
    normalised = rotated = None
    if norm is not None:
        x, normalised = norm.apply(x, params)
    if table is not None:
        x, rotated = rotate(x, rotary=table)
    return x, PositionCache(norm, normalised, rotated)


def position_vjp(cache: PositionCache, dy: Array, batch_axes: int) -> tuple[Array, Params]:
    """dx, dparams of the norm"""
    norm, normalised, rotated = cache
    dparams: Params = {}
    if rotated is not None:
        (dy,) = rotate_vjp(rotated, dy)
    if norm is not None:
        dy, dparams = norm.apply_vjp(normalised, dy, batch_axes=batch_axes)
    return dy, dparams


def append_rows(x: Array, row: Array, zero: bool) -> Array:
    """y = [x; row; 0]     x (..., 1, S, D)   row (D,) or None   →   y (..., 1, S', D)"""
    xp, (*batch, _, D) = namespace(x), x.shape
    rows = [] if row is None else [xp.broadcast_to(row, (*batch, 1, D))]
    rows += [full((*batch, 1, D), 0.0, x)] if zero else []
    return xp.concat([x, *rows], axis=-2) if rows else x


def append_rows_vjp(S: int, row: Array, dy: Array, batch_axes: int) -> tuple[Array, Array]:
    """dx, drow"""
    if row is None:
        return dy[..., :S, :], None
    return dy[..., :S, :], sum_over_batch(dy[..., 0, S, :], 1, batch_axes)


def round_gradients(grads: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """Gradients of the parameters, the inputs and the bias, rounded to the dtype of the cotangent."""
    dparams, *dxs, dbias = grads
    dparams = tree.map(lambda g: downcast(g, dtype), dparams)
    return dparams, *(downcast(dx, dtype) for dx in dxs), round_bias(dbias, dtype)
