"""`torch.nn.functional.multi_head_attention_forward` on arrays, with its gradient: torch's arguments and layouts.

    (y, weights), cache = multi_head_attention_forward(
        query, key, value, in_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias,
        key_padding_mask, attn_mask, embed_dim_to_check=64, num_heads=4, add_zero_attn=False, dropout_p=0.0)
    dquery, dkey, dvalue, din_proj_weight, *_ = multi_head_attention_forward_vjp(cache, (dy, dweights))

Differences from funcmha: positions come before the batch, boolean masks are True where attention is *forbidden*, the
projections of q, k and v are one matrix, and the weights are those after dropout. Differences from PyTorch: the
differentiable inputs come first and by position, in the order of `Inputs`, the rest by name; dropout takes its mask,
`keep`, as an input, as PyTorch's cannot be drawn again; fully masked rows never give NaN.

Axes: L queries, S keys, S' keys with those of bias_k and add_zero_attn, N batch, H heads, D width of a head, E =
embed_dim = H·D, Ek and Ev the widths of key and value, O output.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import (
    Array,
    downcast,
    dtype_name,
    from_host,
    full,
    heads_first,
    heads_last,
    in_library_of,
    is_array,
    namespace,
    quiet_underflow,
    upcast,
)
from funcmha.dropout import Masked, Seeded
from funcmha.engines import attention_weights, log_sum_exp, mha, mha_vjp
from funcmha.engines import heads as heads_of
from funcmha.ops import INF, drop
from funcmha.params import PROJECTIONS, Params

from .functional import kept
from .module import BIAS_KV, SEPARATE, joined, joined_vjp

FLAGS = (
    "add_zero_attn",
    "training",
    "need_weights",
    "use_separate_proj_weight",
    "average_attn_weights",
    "is_causal",
)


class Inputs(NamedTuple):
    """The differentiable inputs of `multi_head_attention_forward`, or their gradients."""

    query: Array  # (L, N, E), or all without N
    key: Array  # (S, N, Ek)
    value: Array  # (S, N, Ev)
    in_proj_weight: Array  # (3E, E), or None with the three of q, k and v
    in_proj_bias: Array  # (3E,) or None
    bias_k: Array  # (1, 1, E), (1, E) or (E,), or None
    bias_v: Array  # (1, 1, E), (1, E) or (E,), or None
    out_proj_weight: Array  # (O, E)
    out_proj_bias: Array  # (O,) or None
    key_padding_mask: Array  # (N, S) or None
    attn_mask: Array  # (L, S) or (N·H, L, S) or None
    q_proj_weight: Array  # (E, E) or None
    k_proj_weight: Array  # (E, Ek) or None
    v_proj_weight: Array  # (E, Ev) or None
    static_k: Array  # (N·H, S, D) or None
    static_v: Array  # (N·H, S, D) or None


class MultiHeadAttentionForwardCache(NamedTuple):
    mha: Any
    inputs: Inputs  # as given
    dropout: Masked | Seeded | None  # broadcasts to (N, H, L, S')
    num_heads: int
    need_weights: bool
    average_attn_weights: bool


@quiet_underflow
def multi_head_attention_forward(
    query: Array,
    key: Array,
    value: Array,
    in_proj_weight: Array,
    in_proj_bias: Array,
    bias_k: Array,
    bias_v: Array,
    out_proj_weight: Array,
    out_proj_bias: Array,
    key_padding_mask: Array = None,
    attn_mask: Array = None,
    q_proj_weight: Array = None,
    k_proj_weight: Array = None,
    v_proj_weight: Array = None,
    static_k: Array = None,
    static_v: Array = None,
    /,
    *,
    embed_dim_to_check: int,
    num_heads: int,
    add_zero_attn: bool,
    dropout_p: float,
    keep: Array | Seeded = None,
    training: bool = True,
    need_weights: bool = True,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[tuple[Array, Array], MultiHeadAttentionForwardCache]:
    """y, weights = Σₕ aₕ (value wvₕᵀ + bvₕ) woₕᵀ + bo, a     a = dropout(softmax(D ** -0.5 · q kᵀ + masks))
    query (L, N, E)   key (S, N, Ek)   value (S, N, Ev)   →   y (L, N, O), weights (N, L, S') or (N, H, L, S') or None

    The inputs are those of `Inputs`, in its order. Boolean masks are True where attention is forbidden, and have no
    gradient; floating ones are added, and each has a gradient. `weights` are None without need_weights; they are those
    after dropout, and their mean over the heads with average_attn_weights. keep broadcasts to (N, H, L, S').

    A fully masked row gives out_proj_bias and weights 0. PyTorch gives NaN with need_weights.

    static_k, static_v replace the projected keys and values, at the cost of a product with the identity; the inputs
    that they replace have gradient 0. is_causal states that attn_mask is the causal one: PyTorch may then ignore
    attn_mask, and with it the keys of bias_k and add_zero_attn. Here attn_mask always counts, and must be causal.
    """
    x = Inputs(
        query, key, value, in_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias,
        key_padding_mask, attn_mask, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
    )  # fmt: skip
    flags = add_zero_attn, training, need_weights, use_separate_proj_weight, average_attn_weights, is_causal
    for name, flag in zip(FLAGS, flags, strict=True):
        _check.flag(name, flag)
    _check_mha(x, embed_dim_to_check, num_heads, use_separate_proj_weight, is_causal)
    if keep is not None and not training:
        raise ValueError("keep must be None with training=False, where nothing is dropped")
    dropout = kept(dropout_p if training else 0.0, keep, query)
    mask, bias = joined(in_library_of(attn_mask, query), in_library_of(key_padding_mask, query), num_heads)
    inputs = _batch_first(query), _keys(key, static_k, query), _keys(value, static_v, query)
    y, cache = mha(_params(x, num_heads), *inputs, bias, mask=mask, zero_attn=add_zero_attn, dropout=dropout)
    weights = _weights(attention_weights(cache), dropout, average_attn_weights) if need_weights else None
    ours = MultiHeadAttentionForwardCache(cache, x, dropout, num_heads, need_weights, average_attn_weights)
    return (_batch_first(y), downcast(weights, query.dtype)), ours


@quiet_underflow
def multi_head_attention_forward_vjp(
    cache: MultiHeadAttentionForwardCache, dy: tuple[Array, Array], /
) -> tuple[Array, ...]:
    """dquery, dkey, …, dstatic_v, in the order of `Inputs`     from dy = (dattn_output, dattn_output_weights)

    Either of the two may be None, for 0. None for an input that was None, and for a boolean mask.
    """
    _check.cache(cache, MultiHeadAttentionForwardCache, "multi_head_attention_forward")
    x = cache.inputs
    g, dweights = _check_cotangents(cache, dy)
    dparams, dquery, dkey, dvalue, dbias = mha_vjp(cache.mha, _batch_first(g), dweights=_weights_vjp(cache, dweights))
    dkey, dstatic_k = _keys_vjp(x.key, x.static_k, dkey)
    dvalue, dstatic_v = _keys_vjp(x.value, x.static_v, dvalue)
    grads = {"query": _batch_first(dquery), "key": dkey, "value": dvalue, "static_k": dstatic_k, "static_v": dstatic_v}
    dattn, dpadding = joined_vjp(x.attn_mask, x.key_padding_mask, dbias, cache.num_heads)
    grads |= _params_vjp(x, dparams) | {"attn_mask": dattn, "key_padding_mask": dpadding}
    return tuple(grads.get(name) for name in Inputs._fields)


def _batch_first(x: Array) -> Array:
    """x (L, N, E)   →   (N, L, E), and back; (L, E) as it is"""
    return x if x.ndim == 2 else namespace(x).moveaxis(x, 0, 1)


def _keys(x: Array, static: Array, query: Array) -> Array:
    """x (S, N, Ek)   →   (N, S, Ek), or instead static (N·H, S, D), its heads side by side   →   (N, S, E)"""
    if static is None:
        return _batch_first(x)
    reshape, (_, S, D), (*batch, E) = namespace(static).reshape, static.shape, query.shape[1:]
    return reshape(heads_last(reshape(static, (*batch, E // D, S, D))), (*batch, S, E))


def _keys_vjp(x: Array, static: Array, dx: Array) -> tuple[Array, Array]:
    """dx, dstatic"""
    if static is None:
        return _batch_first(dx), None
    reshape, D = namespace(dx).reshape, static.shape[-1]
    dstatic = heads_first(reshape(dx, (*dx.shape[:-1], dx.shape[-1] // D, D)))
    return full(x.shape, 0.0, dx), reshape(dstatic, static.shape)


def _params(x: Inputs, H: int) -> Params:
    """The tree of `mha`. Static keys or values are projected by the identity."""
    E = x.query.shape[-1]
    reshape = namespace(x.query).reshape
    params: Params = {}
    for i, (name, static) in enumerate(zip(PROJECTIONS, (None, x.static_k, x.static_v), strict=True)):
        third, separate = slice(i * E, (i + 1) * E), (x.q_proj_weight, x.k_proj_weight, x.v_proj_weight)[i]
        if static is not None:
            params[name] = {"w": downcast(from_host(np.eye(E).reshape(H, E // H, E), x.query), x.query.dtype)}
            continue
        w = x.in_proj_weight[third, :] if separate is None else separate
        params[name] = {"w": reshape(w, (H, E // H, w.shape[-1]))}
        if x.in_proj_bias is not None:
            params[name]["b"] = reshape(x.in_proj_bias[third], (H, E // H))
    params["out_proj"] = {"w": reshape(x.out_proj_weight, (x.out_proj_weight.shape[0], H, E // H))}
    if x.out_proj_bias is not None:
        params["out_proj"]["b"] = x.out_proj_bias
    if x.bias_k is not None:
        params["bias_kv"] = {"k": reshape(x.bias_k, (H, E // H)), "v": reshape(x.bias_v, (H, E // H))}
    return params


def _params_vjp(x: Inputs, dparams: Params) -> dict[str, Array]:
    """The gradients of the parameters, by their names in `Inputs`."""
    E, dout, dbias_kv = x.query.shape[-1], dparams["out_proj"], dparams.get("bias_kv")
    xp = namespace(dout["w"])
    dws, dbs = [], []
    for name, of, static in zip(PROJECTIONS, x[:3], (None, x.static_k, x.static_v), strict=True):
        used = static is None
        dws.append(
            xp.reshape(dparams[name]["w"], (E, of.shape[-1])) if used else full((E, of.shape[-1]), 0.0, dout["w"])
        )
        if x.in_proj_bias is not None:
            dbs.append(xp.reshape(dparams[name]["b"], (E,)) if used else full((E,), 0.0, dout["w"]))
    packed = x.in_proj_weight is not None
    return {
        **({"in_proj_weight": xp.concat(dws)} if packed else dict(zip(SEPARATE, dws, strict=True))),
        "in_proj_bias": xp.concat(dbs) if dbs else None,
        **{name: xp.reshape(dbias_kv[name[-1]], getattr(x, name).shape) for name in BIAS_KV if dbias_kv is not None},
        "out_proj_weight": xp.reshape(dout["w"], x.out_proj_weight.shape),
        "out_proj_bias": dout.get("b"),
    }


def _weights(p: Array, dropout: Masked | Seeded | None, average: bool) -> Array:
    """The weights after dropout, (N, H, L, S') or their mean over the heads, (N, L, S')"""
    a = _dropped(p, dropout)
    return namespace(a).mean(a, axis=-3) if average else a


def _weights_vjp(cache: MultiHeadAttentionForwardCache, dweights: Array) -> Array:
    """dp, from the bottom up: the mean, then dropout, which is its own adjoint"""
    if dweights is None:
        return None
    g, H = upcast(dweights), cache.num_heads
    if cache.average_attn_weights:
        *batch, L, S = g.shape
        g = namespace(g).broadcast_to(g[..., None, :, :] / H, (*batch, H, L, S))
    return _dropped(g, cache.dropout)


def _dropped(p: Array, dropout: Masked | Seeded | None) -> Array:
    """a = p ⊙ keep / (1 − rate)"""
    return p if dropout is None else drop(p, dropout.dense(tuple(p.shape), p), dropout.rate)


def _check_cotangents(cache: MultiHeadAttentionForwardCache, dy: Any) -> tuple[Array, Array]:
    """The cotangent of the output, zeros for None, and that of the weights, or None."""
    g, dweights = _check.parts("dy", dy, "dattn_output, dattn_output_weights")
    x, computed = cache.inputs, upcast(cache.inputs.query)
    shape = (*x.query.shape[:-1], x.out_proj_weight.shape[0])
    g = full(shape, 0.0, x.query) if g is None else g
    _check.cotangent("dattn_output", g, shape, computed, "L N O" if len(shape) == 3 else "L O")
    if dweights is not None and not cache.need_weights:
        raise ValueError("dattn_output_weights must be None, as the weights are with need_weights=False")
    heads = () if cache.average_attn_weights else (cache.num_heads,)
    keys = next(heads_of(cache.mha)).attention.k.shape[-2] if dweights is not None else 0
    shape = (*x.query.shape[1:-1], *heads, x.query.shape[0], keys)
    spelt = "N " * (x.query.ndim == 3) + "H " * len(heads) + "L S'"
    _check.cotangent("dattn_output_weights", dweights, shape, computed, spelt, optional=True)
    return g, dweights


def _check_mha(x: Inputs, embed_dim_to_check: int, num_heads: int, separate: bool, is_causal: bool) -> None:
    """The argument checks of `multi_head_attention_forward`."""
    given = x._asdict().items()
    masks = {name: mask for name, mask in given if name.endswith("mask") and mask is not None}
    _check.one_dtype(
        [(name, a) for name, a in given if name in ("query", "key", "value", "out_proj_weight")],
        [(name, a) for name, a in given if not (is_array(a) and name in masks and dtype_name(a) == "bool")],
    )
    for name, mask in masks.items():
        _check.one_library(name, mask, "query", x.query, static=dtype_name(mask) == "bool")
    _check.integer("num_heads", num_heads, 1)
    _check.integer("embed_dim_to_check", embed_dim_to_check, 0)
    if x.query.ndim not in (2, 3) or x.query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise ValueError(
            f"query must be (L, N, E) or (L, E) with E={embed_dim_to_check} as embed_dim_to_check is, a multiple of "
            f"num_heads={num_heads}, got {tuple(x.query.shape)}"
        )
    _check_weights_given(x, separate)
    _check_shapes(x, num_heads)
    if is_causal:
        _check_causal(x.attn_mask)


def _check_weights_given(x: Inputs, separate: bool) -> None:
    """The weights and biases that must be given together."""
    packed = x.in_proj_weight is not None
    names = [name for name in SEPARATE if getattr(x, name) is not None]
    if packed == separate or len(names) != 3 * separate:
        wanted = "None with q_proj_weight, k_proj_weight and v_proj_weight" if separate else "given, and they None,"
        got = ", ".join(names + ["in_proj_weight"] * packed) or "none of them"
        raise ValueError(f"in_proj_weight must be {wanted} with use_separate_proj_weight={separate}, got {got}")
    if (x.bias_k is None) != (x.bias_v is None):
        raise ValueError("bias_k and bias_v must be given both, or neither")
    if x.bias_k is None:
        return
    if not (x.static_k is None and x.static_v is None):
        raise ValueError("bias_k and bias_v must be None with static_k or static_v, to which PyTorch appends nothing")
    for name in BIAS_KV:
        shape, E = tuple(getattr(x, name).shape), x.query.shape[-1]
        if shape not in ((1, 1, E), (1, E), (E,)):
            raise ValueError(f"{name} must be (1, 1, E), (1, E) or (E,) with E={E} as in query, got {shape}")


def _check_shapes(x: Inputs, H: int) -> None:
    axes, E, n = _check.Axes(), x.query.shape[-1], "N " * (x.query.ndim == 3)
    axes("query", x.query, f"L {n}E")
    known = {"3E": 3 * E, "D": E // H, "N·H": H * (axes["N"] if n else 1)}
    axes.size |= known
    axes.owner |= dict.fromkeys(known, "query")
    s = "S" if x.static_k is None or x.static_v is None else "Sk"  # where both are static, those of key are ignored
    width_k, width_v = ("E", "E") if x.in_proj_weight is not None else ("Ek", "Ev")
    letters = {
        "key": f"{s} {n}{width_k}", "value": f"{s} {n}{width_v}", "static_k": "N·H S D", "static_v": "N·H S D",
        "in_proj_weight": "3E E", "q_proj_weight": "E E", "k_proj_weight": "E Ek", "v_proj_weight": "E Ev",
        "in_proj_bias": "3E", "out_proj_weight": "O E", "out_proj_bias": "O",
        "key_padding_mask": f"{n}S", "attn_mask": "L S",
    }  # fmt: skip
    if x.attn_mask is not None and x.attn_mask.ndim != 2:
        letters["attn_mask"] = "N·H L S"
    for name, symbols in letters.items():
        if (a := getattr(x, name)) is not None:
            axes(name, a, symbols)


def _check_causal(attn_mask: Array) -> None:
    if attn_mask is None:
        raise ValueError("attn_mask must be given with is_causal=True, which states that it is the causal mask")
    xp = namespace(attn_mask)
    forbidden = from_host(np.tri(*attn_mask.shape[-2:]) == 0, attn_mask)
    want = forbidden if dtype_name(attn_mask) == "bool" else xp.where(forbidden, -INF, 0.0)
    if not bool(xp.all(attn_mask == want)):
        raise ValueError("attn_mask must forbid j > i and nothing else with is_causal=True")


@attention_weights.register
def _(cache: MultiHeadAttentionForwardCache, /) -> Array:
    return attention_weights(cache.mha)


@log_sum_exp.register
def _(cache: MultiHeadAttentionForwardCache, /) -> Array:
    return log_sum_exp(cache.mha)
