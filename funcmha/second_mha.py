"""Second order of multi-head attention: `mha_vjp` differentiated forwards, group after group, line by line.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, C input width; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from typing import Any, NamedTuple

from . import _check
from ._bias import Bias, bias_of_heads, join_biases
from ._doors import values_of
from ._qk import ReadyCache, heads_first, heads_last, ready_vjp
from ._tangents import check_tangent, one_dtype
from ._xp import Array, namespace, widen
from .biases import RelativeBias
from .forward import attention_jvp
from .forward_mha import check_mha_tangents, head_ranges, inner_tangents, project_jvp, visible_inputs, wide
from .heads import (
    AttendCache,
    CombineCache,
    ProjectCache,
    combine_vjp,
    engine_of,
    extend_scores,
    extend_scores_vjp,
    extend_vjp,
    recall,
    stacked,
    w_and_b,
)
from .mha import MhaCache, narrow_all
from .params import Params, group_params, join_groups
from .rotary import rotate_vjp
from .second import attention_vjp_jvp


def mha_vjp_jvp(
    cache: MhaCache,
    dy: Array,
    dy_dot: Array = None,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
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
    given = check_mha_tangents(cache, params_dot, query_dot, key_dot, value_dot, bias_dot)
    _check_cotangents(cache, dy, dy_dot, dlse, dlse_dot, given)
    params_dot, *inputs_dot, bias_dot = wide(params_dot, query_dot, key_dot, value_dot, bias_dot)
    g, dlse, dlse_dot = widen(dy), widen(dlse), widen(dlse_dot)
    g_dot = namespace(g).zeros_like(g) if dy_dot is None else widen(dy_dot)
    groups, inputs, biases = [], [], []
    for (heads, out), kv, h in head_ranges(cache):
        group_dot = None if params_dot is None else group_params(params_dot, *kv)
        lses = (None if a is None else a[..., h, :] for a in (dlse, dlse_dot))
        x = _Moves.of(recall(heads), group_dot, inputs_dot, bias_of_heads(bias_dot, h), *lses)
        dout_dot, do, do_dot = combine_vjp_jvp(out, g, g_dot, None if group_dot is None else group_dot["out_proj"], x)
        dgroup_dot, dxs_dot, dbias_dot = attend_vjp_jvp(x, do, do_dot)
        groups.append(dgroup_dot | {"out_proj": dout_dot})
        inputs.append(dxs_dot)
        biases.append(dbias_dot)
    dxs = (sum(parts[1:], parts[0]) for parts in zip(*inputs, strict=True))
    return narrow_all((join_groups(groups), *dxs, join_biases(cache.bias, biases)), dy)


class _Moves(NamedTuple):
    """A group of heads with the tangents of all that goes into it, 0 at the keys that none of the group sees."""

    cache: AttendCache  # recalled
    params: Params  # of this group; empty where they do not move
    query: Array  # (..., T, Cq) or None
    key: Array  # (..., S, Ck) or None
    value: Array  # (..., S, Cv) or None
    q: Array  # (..., H, T, D) or None, of what the attention takes
    k: Array  # (..., K, S', D) or None
    v: Array  # (..., K, S', E) or None
    bias: Bias
    sink: Array  # (H,) or None
    dlse: Array  # (..., H, T) or None
    dlse_dot: Array  # (..., H, T) or None

    @staticmethod
    def of(
        cache: AttendCache, params: Params | None, inputs: list[Array], bias: Bias, dlse: Array, dlse_dot: Array
    ) -> "_Moves":
        S, (query, key, value) = cache.k.x.shape[-2], visible_inputs(cache, *inputs)
        inner = inner_tangents(cache, params, query, key, value)
        bias = extend_scores(bias, S, cache.attention.k.shape[-2] - S, 0.0)
        sink = None if params is None or "sink" not in params else params["sink"]["w"]
        return _Moves(cache, params or {}, query, key, value, *inner, bias, sink, dlse, dlse_dot)

    @property
    def inner(self) -> tuple[Any, ...]:
        """The tangents of what the attention takes."""
        return self.q, self.k, self.v, self.bias, self.sink


# ── from the bottom up ───────────────────────────────────────────────────────────────────────────────────────────


def combine_vjp_jvp(
    cache: CombineCache, dy: Array, dy_dot: Array, params_dot: Params | None, x: _Moves
) -> tuple[Params, Array, Array]:
    """ḋw = Σ ḋy oᵀ + dy ȯᵀ     ḋb = Σ ḋy        and do, ḋo = ḋy w + dy ẇ"""
    _, do = combine_vjp(cache, dy)
    dparams, do_dot = combine_vjp(cache, dy_dot)
    o_dot, _ = attention_jvp(x.cache.attention, *x.inner)
    w_dot = namespace(dy).zeros_like(cache.w) if params_dot is None else params_dot["w"]
    more, do_more = combine_vjp(cache._replace(o=heads_last(o_dot), w=w_dot, b=None), dy)  # it is linear in o and in w
    return w_and_b(dparams["w"] + more["w"], dparams.get("b")), do, do_dot + do_more


def attend_vjp_jvp(x: _Moves, do: Array, do_dot: Array) -> tuple[Params, tuple[Array, ...], Bias]:
    """ḋparams, (ḋquery, ḋkey, ḋvalue), ḋbias: `attend_vjp` and its tangents side by side"""
    cache, S = x.cache, x.cache.k.x.shape[-2]
    do, do_dot = heads_first(do), heads_first(do_dot)
    dq, dk, dv, _, _ = engine_of(cache).attention_vjp(cache.attention, do, dlse=x.dlse)
    *dots, dbias_dot, dsink_dot = attention_vjp_jvp(
        cache.attention, do, do_dot, *x.inner, dlse=x.dlse, dlse_dot=x.dlse_dot
    )
    dq, dk, dv, dq_dot, dk_dot, dv_dot = map(heads_last, (dq, dk, dv, *dots))
    dbias_dot = extend_scores_vjp(S, dk.shape[-3] - S, cache.bias, dbias_dot)
    (dk, _), (dv, _) = (extend_vjp(S, None, a) for a in (dk, dv))
    dk_dot, drow_k = extend_vjp(S, cache.bias_kv["k"], dk_dot)
    dv_dot, drow_v = extend_vjp(S, cache.bias_kv["v"], dv_dot)
    dparams: Params = {}
    dq, dq_dot, dq_norm = _ready(cache.q, cache.q_ready, dq, dq_dot, x.params, "q", x.query)
    dk, dk_dot, dk_norm = _ready(cache.k, cache.k_ready, dk, dk_dot, x.params, "k", x.key)
    dparams["q_proj"], dquery_dot = project_vjp_jvp(cache.q, dq, dq_dot, x.params.get("q_proj"), x.query)
    dparams["k_proj"], dkey_dot = project_vjp_jvp(cache.k, dk, dk_dot, x.params.get("k_proj"), x.key)
    dparams["v_proj"], dvalue_dot = project_vjp_jvp(cache.v, dv, dv_dot, x.params.get("v_proj"), x.value)
    if drow_k is not None:
        dparams["bias_kv"] = {"k": drow_k, "v": drow_v}
    if dsink_dot is not None:
        dparams["sink"] = {"w": dsink_dot}
    dparams |= {name: g for name, g in (("q_norm", dq_norm), ("k_norm", dk_norm)) if g}
    return dparams, (dquery_dot, dkey_dot, dvalue_dot), dbias_dot


def project_vjp_jvp(
    cache: ProjectCache, dy: Array, dy_dot: Array, params_dot: Params | None, x_dot: Array
) -> tuple[Params, Array]:
    """ḋw = Σ ḋy xᵀ + dy ẋᵀ     ḋb = Σ ḋy        and ḋx = ḋy w + dy ẇ"""
    reshape, zeros = namespace(dy).reshape, namespace(dy).zeros_like
    flat = (*dy.shape[:-2], dy.shape[-2] * dy.shape[-1])
    w_dot = zeros(cache.w) if params_dot is None else params_dot["w"]
    moved = cache._replace(x=zeros(cache.x) if x_dot is None else x_dot, w=w_dot, b=None)
    dx, dw, db = engine_of(cache).linear_vjp(stacked(cache), reshape(dy_dot, flat))
    dx_more, dw_more, _ = engine_of(cache).linear_vjp(stacked(moved), reshape(dy, flat))
    db = None if db is None else reshape(db, cache.b.shape)
    return w_and_b(reshape(dw + dw_more, cache.w.shape), db), dx + dx_more


def _ready(
    projected: ProjectCache, cache: ReadyCache, dy: Array, dy_dot: Array, params: Params, which: str, x_dot: Array
) -> tuple[Array, Array, Params]:
    """dx, ḋx, ḋparams of what is done between projection and attention: a rotation is linear, a norm is not"""
    dx, _ = ready_vjp(cache, dy)
    if cache.rotary is not None:
        (dy,), (dy_dot,) = (rotate_vjp(cache.rotary, heads_first(g)) for g in (dy, dy_dot))
        dy, dy_dot = heads_last(dy), heads_last(dy_dot)
    if cache.norm is None:
        return dx, dy_dot, {}
    x_dot = project_jvp(projected, params.get(f"{which}_proj"), x_dot)
    x_dot = namespace(dy).zeros_like(dy) if x_dot is None else x_dot
    _, normed = cache.norm.apply(cache.x, cache.w)
    return dx, *cache.norm.apply_vjp_jvp(normed, dy, dy_dot, x_dot, params.get(f"{which}_norm", {}))


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_cotangents(
    cache: MhaCache, dy: Array, dy_dot: Array, dlse: Array, dlse_dot: Array, given: list[Any]
) -> None:
    out = cache.groups[0].out
    like, (*batch, T, _, _) = out.o, out.o.shape
    H = sum(group.out.o.shape[-2] for group in cache.groups)
    y, lse = (*batch, T, out.w.shape[0]), (*batch, H, T)
    _check.one_dtype([("dy", dy)])
    one_dtype([("dy", dy), ("dy_dot", dy_dot), ("dlse", dlse), ("dlse_dot", dlse_dot)])
    one_dtype([("dy", dy), *(("the tangents of the inputs", values_of(x)) for x in given)])
    _check.cotangent("dy", dy, y, like, "... T O")
    _check.cotangent("dlse", dlse, lse, like, "... H T", optional=True)
    check_tangent("dy_dot", dy_dot, y, like, "... T O")
    check_tangent("dlse_dot", dlse_dot, lse, like, "... H T")
