"""Forward mode and second order of `head` and `mha`: over the heads of a cache, one after another, of any engine.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, Cq Ck Cv input widths; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from functools import singledispatch
from typing import Any, NamedTuple

from funcmha import _check, ops, tree
from funcmha._arguments import Bias, check_bias_tangent, check_params_tangent, name_of, values_of
from funcmha._arrays import Array, downcast, namespace, or_zeros, upcast
from funcmha.biases import as_bias
from funcmha.engines import batched, blocks, check_cache, heads, outputs, tiled
from funcmha.engines.table import attention_vjp
from funcmha.masks.zero import attended_and_attending, zero_masked_queries, zero_unattended_keys
from funcmha.mha import HeadCache, PositionCache, append_rows, append_rows_vjp, round_gradients
from funcmha.params import HEAD_SPEC, SPEC, Params, drop_absent, join_heads, leaf, one_head
from funcmha.rotary import rotate, rotate_vjp

from .attention import attention_jvp, attention_vjp_jvp, linear_jvp, linear_vjp_jvp


class Dots(NamedTuple):
    """The tangents of a head's inputs, in the dtype to compute in; {} and None are zero."""

    params: Params
    query: Array  # (..., T, Cq)
    key: Array  # (..., S, Ck)
    value: Array  # (..., S, Cv)
    bias: Bias

    def head(self, h: int) -> "Dots":
        """Those of head h"""
        bias = None if self.bias is None else self.bias.heads(slice(h, h + 1))
        return self._replace(params=one_head(self.params, h) if self.params else {}, bias=bias)


# ── head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def head_jvp(
    cache: Any,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Any = None,
    /,
) -> tuple[Array, Array]:
    """ȯ (..., T, E), l̇se (..., T) of the tangents of `head`'s inputs: as in `mha_jvp`, of one head

    `params_dot` is a tree as `head_params(params, h)` is, `bias_dot` as the bias: it broadcasts to (..., T, S).
    """
    check_cache(cache, "head")
    (one,) = heads(cache)
    bias = None if one.bias is None else one.bias.without_head_axis()
    x, dtype = _check_dots(one, one.params, HEAD_SPEC, bias, params_dot, query_dot, key_dot, value_dot, bias_dot)
    bias_dot = None if x.bias is None else x.bias.with_head_axis()
    o_dot, lse_dot = attention_jvp(one.attention, *_inner(one, x._replace(bias=bias_dot)).attention)
    return downcast(o_dot[..., 0, :, :], dtype), downcast(lse_dot[..., 0, :], dtype)


class _Inner(NamedTuple):
    """The tangents within a head."""

    q: Array  # (..., 1, T, D) as projected, or None
    k: Array  # (..., 1, S, D) as projected, or None
    query: Array  # of the inputs, 0 where the head's mask leaves nothing
    key: Array
    value: Array
    attention: tuple[Any, ...]  # of what its attention takes


def _inner(cache: HeadCache, x: Dots) -> _Inner:
    """From the tangents of a head's inputs, those of q, k, v, bias and sink"""
    query, key, value = _zeroed(cache, x.query, x.key, x.value)
    q, k, v = (
        _project_jvp(of, dot, leaf(x.params, f"{name}.w"), leaf(x.params, f"{name}.b"))
        for of, dot, name in (
            (cache.query, query, "q_proj"),
            (cache.key, key, "k_proj"),
            (cache.value, value, "v_proj"),
        )
    )
    S, keys = cache.key.x.shape[-2], cache.attention.k.shape[-2]
    q_dot = _position_jvp(cache.q_position, q, x.params.get("q_norm", {}))
    k_dot = _position_jvp(cache.k_position, k, x.params.get("k_norm", {}))
    k_dot = _append_rows_jvp(cache, "bias_kv.k", k_dot, x.params, keys - S)
    v_dot = _append_rows_jvp(cache, "bias_kv.v", v, x.params, keys - S)
    bias_dot, sink_dot = None if x.bias is None else x.bias.append_keys(S, keys - S), leaf(x.params, "sink.w")
    sink_dot = sink_dot if sink_dot is None else sink_dot[None]
    return _Inner(q, k, query, key, value, (q_dot, k_dot, v_dot, bias_dot, sink_dot))


def _project_jvp(cache: Any, x_dot: Array, w_dot: Array, b_dot: Array) -> Array:
    """ẏ (..., 1, T, D), or None where it is zero"""
    if x_dot is None and w_dot is None:
        return None
    return linear_jvp(cache, x_dot, w_dot, b_dot)[..., None, :, :]


def _position_jvp(cache: PositionCache, x_dot: Array, params_dot: Params) -> Array:
    """ẏ = rotate(norm's ẏ): a rotation is linear, and is its own jvp"""
    if x_dot is None:
        return None
    if cache.norm is not None:
        x_dot = cache.norm.apply_jvp(cache.normalised, x_dot, params_dot)
    if cache.rotated is not None:
        x_dot, _ = rotate(x_dot, rotary=cache.rotated.rotary)
    return x_dot


def _append_rows_jvp(cache: HeadCache, name: str, x_dot: Array, params_dot: Params, appended: int) -> Array:
    """[ẋ; ṙow; 0]"""
    if x_dot is None:
        return None
    row, row_dot = leaf(cache.params, name), leaf(params_dot, name)
    row_dot = namespace(row).zeros_like(row) if row is not None and row_dot is None else row_dot
    return append_rows(x_dot, row_dot, zero=appended > (row is not None))


def _zeroed(cache: HeadCache, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """The tangents of the inputs with 0 at fully masked queries and unattended keys of this head"""
    keys, queries = attended_of(cache.attention)
    if keys is None:
        return query, key, value
    keys = keys[..., : cache.key.x.shape[-2]]

    def one_head(zero: Any, x: Array, some: Array) -> Array:
        return None if x is None else zero(x[..., None, :, :], some)[..., 0, :, :]

    return (
        one_head(zero_masked_queries, query, queries),
        one_head(zero_unattended_keys, key, keys),
        one_head(zero_unattended_keys, value, keys),
    )


@singledispatch
def attended_of(cache: Any) -> tuple[Array, Array]:
    """Booleans (..., H or 1, ·, S') and (..., H or 1, T, ·), from an attention's cache

    `any` over the rows of the former says which keys are attended, over the columns of the latter which queries attend
    one; or None for all.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@attended_of.register
def _(cache: ops.AttentionCache) -> tuple[Array, Array]:
    return cache.p != 0, ops.attended_pairs(cache)


@attended_of.register
def _(cache: batched.AttentionCache) -> tuple[Array, Array]:
    return attended_of(cache.of_ops)


attended_of.register(blocks.AttentionCache, blocks.attended)


@attended_of.register
def _(cache: tiled.AttentionCache) -> tuple[Array, Array]:
    return attended_and_attending(cache.rest.mask, cache.q.shape[-2], cache.k.shape[-2])


def _head_vjp_jvp(
    cache: HeadCache, x: Dots, y: _Inner, do: Array, do_dot: Array, dlse: Array, dlse_dot: Array
) -> tuple[Params, Array, Array, Array, Bias]:
    """ḋparams, ḋquery, ḋkey, ḋvalue, ḋbias: the head's vjp and its tangents side by side"""
    S, do, do_dot = cache.key.x.shape[-2], do[..., None, :, :], do_dot[..., None, :, :]
    dq, dk, dv, *_ = attention_vjp(cache.attention, do, dlse=dlse)
    dq_dot, dk_dot, dv_dot, dbias_dot, dsink_dot = attention_vjp_jvp(
        cache.attention, do, do_dot, *y.attention, dlse=dlse, dlse_dot=dlse_dot
    )
    dbias_dot = None if dbias_dot is None else cache.bias.append_keys_vjp(S, as_bias(dbias_dot))
    dv, (dv_dot, dv_row) = dv[..., :S, :], append_rows_vjp(S, leaf(cache.params, "bias_kv.v"), dv_dot, 0)
    dk, (dk_dot, dk_row) = dk[..., :S, :], append_rows_vjp(S, leaf(cache.params, "bias_kv.k"), dk_dot, 0)
    dk, dk_dot, dk_norm = _position_vjp_jvp(cache.k_position, dk, dk_dot, y.k, x.params.get("k_norm", {}))
    dq, dq_dot, dq_norm = _position_vjp_jvp(cache.q_position, dq, dq_dot, y.q, x.params.get("q_norm", {}))
    dvalue, dv_proj = _project_vjp_jvp(cache.value, dv, dv_dot, y.value, leaf(x.params, "v_proj.w"))
    dkey, dk_proj = _project_vjp_jvp(cache.key, dk, dk_dot, y.key, leaf(x.params, "k_proj.w"))
    dquery, dq_proj = _project_vjp_jvp(cache.query, dq, dq_dot, y.query, leaf(x.params, "q_proj.w"))
    dparams = {
        "q_proj": dq_proj,
        "k_proj": dk_proj,
        "v_proj": dv_proj,
        "bias_kv": {"k": dk_row, "v": dv_row},
        "sink": {"w": None if dsink_dot is None else dsink_dot[0]},
        "q_norm": dq_norm,
        "k_norm": dk_norm,
    }
    return drop_absent(dparams), dquery, dkey, dvalue, dbias_dot


def _project_vjp_jvp(cache: Any, dy: Array, dy_dot: Array, x_dot: Array, w_dot: Array) -> tuple[Array, Params]:
    """ḋx, ḋparams     of dy (..., 1, T, D)"""
    dx_dot, dw_dot, db_dot = linear_vjp_jvp(cache, dy[..., 0, :, :], dy_dot[..., 0, :, :], x_dot, w_dot)
    return dx_dot, {"w": dw_dot, "b": db_dot}


def _position_vjp_jvp(
    cache: PositionCache, dy: Array, dy_dot: Array, x_dot: Array, params_dot: Params
) -> tuple[Array, Array, Params]:
    """dx, ḋx, ḋparams of the norm: a rotation is linear, a norm is not"""
    if cache.rotated is not None:
        (dy,), (dy_dot,) = rotate_vjp(cache.rotated, dy), rotate_vjp(cache.rotated, dy_dot)
    if cache.norm is None:
        return dy, dy_dot, {}
    dx, _ = cache.norm.apply_vjp(cache.normalised, dy)
    x_dot = namespace(dy).zeros_like(dy) if x_dot is None else x_dot
    dx_dot, dparams_dot = cache.norm.apply_vjp_jvp(cache.normalised, dy, dy_dot, x_dot, params_dot)
    return dx, dx_dot, dparams_dot


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mha_jvp(
    cache: Any,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Any = None,
    /,
) -> tuple[Array, Array]:
    """ẏ = Σₕ (ȯₕ woₕᵀ + oₕ ẇoₕᵀ) + ḃo     l̇se
    querẏ (..., T, Cq)   keẏ (..., S, Ck)   valuė (..., S, Cv)   →   ẏ (..., T, O)   l̇se (..., H, T)

    `params_dot` is a tree as the parameters are, any leaf of which may be None, or None. For `self_attention`, whose
    cache holds one of `mha`, it is mha_jvp(cache.mha, params_dot, x_dot, x_dot, x_dot, bias_dot).
    """
    x, dtype = _check_mha_dots(cache, params_dot, query_dot, key_dot, value_dot, bias_dot)
    y_dot, lse_dots = 0.0, []
    for h, (one, out) in enumerate(zip(heads(cache), outputs(cache), strict=True)):
        o_dot, lse_dot = attention_jvp(one.attention, *_inner(one, x.head(h)).attention)
        y_dot = y_dot + linear_jvp(out, o_dot[..., 0, :, :], *_out_dots(x, h))
        lse_dots.append(lse_dot)
    return downcast(y_dot, dtype), downcast(namespace(y_dot).concat(lse_dots, axis=-2), dtype)


def mha_vjp_jvp(
    cache: Any,
    dy: Array,
    dy_dot: Array = None,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Any = None,
    /,
    *,
    dlse: Array = None,
    dlse_dot: Array = None,
) -> tuple[Any, ...]:
    """ḋparams, ḋquery, ḋkey, ḋvalue, ḋbias: the tangents of `mha_vjp`
    from those of its inputs: of dy (..., T, O), the parameters, query, key, value, bias and, where given, of dlse
    (..., H, T)

    For the product of a loss's Hessian and a direction, dy_dot is the loss's own Hessian times `mha_jvp` of it.
    """
    x, dtype = _check_mha_dots(cache, params_dot, query_dot, key_dot, value_dot, bias_dot)
    tangents = any(a is not None for a in (params_dot, query_dot, key_dot, value_dot, bias_dot))
    _check_cotangents(cache, dy, dy_dot, dlse, dlse_dot, dtype if tangents else None)
    g, dlse, dlse_dot = upcast(dy), upcast(dlse), upcast(dlse_dot)
    g_dot = namespace(g).zeros_like(g) if dy_dot is None else upcast(dy_dot)
    dheads, dquery, dkey, dvalue, dbiases = [], 0.0, 0.0, 0.0, []
    for h, (one, out) in enumerate(zip(heads(cache), outputs(cache), strict=True)):
        y, lses = _inner(one, x.head(h)), (None if a is None else a[..., h : h + 1, :] for a in (dlse, dlse_dot))
        o_dot, _ = attention_jvp(one.attention, *y.attention)
        w_dot, b_dot = _out_dots(x, h)
        do_dot, dw_dot, db_dot = linear_vjp_jvp(out, g, g_dot, o_dot[..., 0, :, :], w_dot, b_dot)
        dhead, dq, dk, dv, dbias = _head_vjp_jvp(one, x.head(h), y, g @ out.w, do_dot, *lses)
        dquery, dkey, dvalue = dquery + dq, dkey + dk, dvalue + dv
        dheads.append(drop_absent(dhead | {"out_proj": {"w": dw_dot, "b": db_dot}}))
        dbiases.append(dbias)
    dbias = None if cache.bias is None else cache.bias.join(dbiases)
    K = leaf(cache.params, "k_proj.w").shape[0]
    return round_gradients((join_heads(dheads, K), dquery, dkey, dvalue, dbias), dy.dtype)


def _out_dots(x: Dots, h: int) -> tuple[Array, Array]:
    """ẇo of head h, and ḃo, which is added once, with the first"""
    w_dot = leaf(x.params, "out_proj.w")
    return None if w_dot is None else w_dot[:, h, :], leaf(x.params, "out_proj.b") if h == 0 else None


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_mha_dots(cache: Any, *dots: Any) -> tuple[Dots, Any]:
    check_cache(cache, "mha")
    return _check_dots(next(heads(cache)), cache.params, SPEC, cache.bias, *dots)


def _check_dots(
    one: HeadCache,
    params: Params,
    spec: dict[str, str],
    bias: Bias,
    params_dot: Any,
    query_dot: Array,
    key_dot: Array,
    value_dot: Array,
    bias_dot: Any,
) -> tuple[Dots, Any]:
    """The tangents of these parameters and of the inputs of this head, upcast, and the dtype that they came in"""
    computed, bias_dot = one.query.x, as_bias(bias_dot)
    named = check_params_tangent(params_dot, params, spec, computed)
    inputs = {"query_dot": query_dot, "key_dot": key_dot, "value_dot": value_dot}
    given = [*named.items(), *inputs.items(), (name_of(bias_dot).replace("bias", "bias_dot"), values_of(bias_dot))]
    _check.one_dtype([], optional=given)
    for (name, dot), of, letters in zip(
        inputs.items(), (one.query, one.key, one.value), ("T Cq", "S Ck", "S Cv"), strict=True
    ):
        _check.tangent(name, dot, of.x.shape, computed, f"... {letters}")
    check_bias_tangent(bias_dot, bias, computed)
    wide_bias = None if bias_dot is None else bias_dot.map(upcast)
    wide_params = {}
    if params_dot is not None:
        wide_params = tree.map(lambda dot, p: or_zeros(dot, tuple(p.shape), p), params_dot, params)
    dtype = next((x.dtype for _, x in given if x is not None), computed.dtype)
    return Dots(wide_params, upcast(query_dot), upcast(key_dot), upcast(value_dot), wide_bias), dtype


def _check_cotangents(cache: Any, dy: Array, dy_dot: Array, dlse: Array, dlse_dot: Array, tangents: Any) -> None:
    like, w = next(heads(cache)).query.x, leaf(cache.params, "out_proj.w")
    y, lse = (*like.shape[:-1], w.shape[0]), (*like.shape[:-2], w.shape[1], like.shape[-2])
    _check.one_dtype([("dy", dy)], optional=[("dy_dot", dy_dot), ("dlse", dlse), ("dlse_dot", dlse_dot)])
    if tangents is not None and tangents != dy.dtype:
        raise TypeError(f"the tangents of the inputs must have dtype {dy.dtype} as dy has, got {tangents}")
    _check.cotangent("dy", dy, y, like, "... T O")
    _check.cotangent("dlse", dlse, lse, like, "... H T", optional=True)
    _check.tangent("dy_dot", dy_dot, y, like, "... T O")
    _check.tangent("dlse_dot", dlse_dot, lse, like, "... H T")
