"""Multi-head attention by several heads at once: what makes the engines' composition fast.

The heads of the specification, in groups. A group is some key/value heads and the query heads that read them: their
projections are one product, their attention is one call, and each group adds to the sum of those before it. The
gradient goes group by group from the last, in smaller ones, and projects again what was not worth keeping.

Axes: T queries, S keys, S' keys with appended ones, H query heads and K key/value heads of the group, D query/key
width, E value width, O output width, C input width; `...` is batch.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

from funcmha import _check, tree
from funcmha._arguments import (
    Bias,
    Options,
    check_cotangents_of_head,
    check_cotangents_of_mha,
    check_head,
    check_mha,
    check_self_attention,
)
from funcmha._arrays import Array, downcast, full, heads_first, heads_last, namespace, own, sum_over_batch, upcast
from funcmha._check import Axes
from funcmha.biases import as_bias
from funcmha.masks import append_keys
from funcmha.masks.zero import zero_inputs
from funcmha.mha import HeadCache as OneHeadCache
from funcmha.mha import PositionCache, round_gradients
from funcmha.norms import Norm
from funcmha.ops import LinearCache
from funcmha.params import Params, group_params, in_order_of, join_groups, join_heads, leaf, one_head
from funcmha.rotary import RotateCache, rotate, rotate_vjp

from .plan import Plan
from .projections import CombineCache, ProjectCache, combine, combine_vjp, project, project_qkv, project_qkv_vjp
from .table import attention_vjp
from .tiled.threads import with_single_threaded_blas

# ── q, k and v: kept, or projected again ─────────────────────────────────────────────────────────────────────────


class Position(NamedTuple):
    """What is done to a projection before attention: normalise and rotate."""

    params: Params  # of the norm: w (D,), b (D,), either of which may be absent
    norm: Norm | None
    rotated: RotateCache | None


class Kept(NamedTuple):
    project: ProjectCache
    position: Position
    projected: Array  # (..., T, H, D), or None where nothing is normalised
    y: Array  # (..., H, T, D), or (..., K, S', D), as attention takes it


class Recomputed(NamedTuple):
    """`Kept`, but for the arrays that one more projection gives."""

    project: ProjectCache
    position: Position


def positioned(x: Array, params: Params, norm: Norm | None, table: Any) -> tuple[Array, Position]:
    """y = rotate(norm(x))     x (..., T, H, D)   →   y (..., T, H, D)"""
    rotated = None
    if norm is not None:
        x, _ = norm.apply(x, params)
    if table is not None:
        x, rotated = rotate(heads_first(x), rotary=table)
        x = heads_last(x)
    return x, Position(params, norm, rotated)


def positioned_vjp(position: Position, projected: Array, dy: Array, batch_axes: int) -> tuple[Array, Params]:
    """dx, dparams of the norm     of dy (..., T, H, D)"""
    if position.rotated is not None:
        (dy,) = rotate_vjp(position.rotated, heads_first(dy))
        dy = heads_last(dy)
    if position.norm is None:
        return dy, {}
    _, cache = position.norm.apply(projected, position.params)
    return position.norm.apply_vjp(cache, dy, batch_axes=batch_axes)


def kept(x: Kept | Recomputed, plan: Plan) -> Kept:
    """q, k or v, projected again where it was not kept"""
    if isinstance(x, Kept):
        return x
    p, position = x.project, x.position
    projected, _ = project({"w": p.w} if p.b is None else {"w": p.w, "b": p.b}, p.x, plan=plan)
    table = None if position.rotated is None else position.rotated.rotary
    y, position = positioned(projected, position.params, position.norm, table)
    return Kept(p, position, None if position.norm is None else projected, heads_first(y))


def _slice(x: Kept | Recomputed, h: slice) -> Any:
    """The same of some heads, as views"""
    project = x.project._replace(w=x.project.w[h, ...], b=None if x.project.b is None else x.project.b[h, ...])
    rotated = x.position.rotated
    if rotated is not None:
        rotated = rotated._replace(like=rotated.like[..., h, :, :, :])
    position = x.position._replace(rotated=rotated)
    if isinstance(x, Recomputed):
        return Recomputed(project, position)
    return Kept(project, position, None if x.projected is None else x.projected[..., h, :], x.y[..., h, :, :])


# ── a group of heads ─────────────────────────────────────────────────────────────────────────────────────────────


class GroupCache(NamedTuple):
    params: Params  # of the group, without out_proj
    q: Kept | Recomputed
    k: Kept | Recomputed
    v: Kept | Recomputed
    bias: Bias  # broadcasts to (..., H, T, S), or None
    rest: Any  # what the engine's attention keeps beside q, k and v

    @property
    def plan(self) -> Plan:
        """That of the engine"""
        plan: Plan | None = self.rest.plan
        return Plan() if plan is None else plan


class Kernel(NamedTuple):
    """What an engine attends with."""

    attend: Callable[..., Any]  # of arguments that are checked and upcast; its o may be the cache's own
    plan: Plan


def _attend(
    params: Params, query: Array, key: Array, value: Array, bias: Bias, x: Options, kernel: Kernel
) -> tuple[Array, GroupCache]:
    """o (..., T, H, E) of a group of heads"""
    plan = kernel.plan
    (q, q_project), (k, k_project), (v, v_project) = project_qkv(params, (query, key, value), plan=plan)
    q_projected, k_projected = (None, None) if x.qk_norm is None else (q, k)
    q, q_position = positioned(q, params.get("q_norm", {}), x.qk_norm, x.rotary[0])
    k, k_position = positioned(k, params.get("k_norm", {}), x.qk_norm, x.rotary[1])
    k = append_rows(k, leaf(params, "bias_kv.k"), x.zero_attn)
    v = append_rows(v, leaf(params, "bias_kv.v"), x.zero_attn)
    S, appended = key.shape[-2], k.shape[-3] - key.shape[-2]
    o, cache = kernel.attend(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        None if bias is None else bias.append_keys(S, appended),
        leaf(params, "sink.w"),
        x._replace(mask=append_keys(x.mask, query.shape[-2], S, appended, query)),
        plan,
    )
    group = GroupCache(
        params,
        Kept(q_project, q_position, q_projected, cache.q),
        Kept(k_project, k_position, k_projected, cache.k),
        Kept(v_project, Position({}, None, None), None, cache.v),
        bias,
        cache.rest,
    )
    keeps = appended or plan.keeps(prod(o.shape), query.shape[-2], S, _width(group))
    return heads_last(o), group if keeps else _without(group, plan)


def _attend_vjp(
    group: GroupCache, do: Array, dweights: Array, dlse: Array, add_to: tuple[Array, ...], batch_axes: int
) -> tuple[Params, tuple[Array, ...], Bias]:
    """dparams, add_to + (dquery, dkey, dvalue), dbias: `_attend` from the bottom up

    Where `add_to` is one array, query, key and value are one input, and their gradients are added up.
    """
    q, k, v = (kept(x, group.plan) for x in (group.q, group.k, group.v))
    S, params, cache = group.k.project.x.shape[-2], group.params, group.rest.with_qkv(q.y, k.y, v.y)
    dq, dk, dv, dbias, dsink = attention_vjp(
        cache, heads_first(do), dweights=dweights, dlse=dlse, batch_axes=batch_axes
    )
    dbias = None if dbias is None else group.bias.append_keys_vjp(S, as_bias(dbias))
    dk, dk_row = append_rows_vjp(S, leaf(params, "bias_kv.k"), heads_last(dk), batch_axes)
    dv, dv_row = append_rows_vjp(S, leaf(params, "bias_kv.v"), heads_last(dv), batch_axes)
    dk, dk_norm = positioned_vjp(k.position, k.projected, dk, batch_axes)
    dq, dq_norm = positioned_vjp(q.position, q.projected, heads_last(dq), batch_axes)
    dparams, dxs = project_qkv_vjp(
        (q.project, k.project, v.project), (dq, dk, dv), add_to=add_to, batch_axes=batch_axes, plan=group.plan
    )
    if dk_row is not None:
        dparams["bias_kv"] = {"k": dk_row, "v": dv_row}
    if dsink is not None:
        dparams["sink"] = {"w": dsink}
    return dparams | {name: g for name, g in (("q_norm", dq_norm), ("k_norm", dk_norm)) if g}, dxs, dbias


def _without(group: GroupCache, plan: Plan) -> GroupCache:
    """The cache without those of q, k and v whose memory is worth more than the time to project them again"""
    T, S, C = group.q.project.x.shape[-2], group.k.project.x.shape[-2], _width(group)
    names = ("q", "k", "v")[: plan.recomputed(T, S, C)]
    recomputed: dict[str, Any] = {name: Recomputed(*getattr(group, name)[:2]) for name in names}
    return group._replace(**recomputed)


def _width(group: GroupCache) -> int:
    """The largest of the input widths"""
    return max(int(x.project.x.shape[-1]) for x in (group.q, group.k, group.v))


def _slice_group(group: GroupCache, kv: slice) -> GroupCache:
    """The cache of key/value heads kv and of the query heads that read them, as views"""
    readers = group.q.project.w.shape[0] // group.k.project.w.shape[0]
    h = slice(kv.start * readers, kv.stop * readers)
    return GroupCache(
        group_params(group.params, kv),
        _slice(group.q, h),
        _slice(group.k, kv),
        _slice(group.v, kv),
        None if group.bias is None else group.bias.heads(h),
        group.rest.heads(h),
    )


def append_rows(x: Array, row: Array, zero: bool) -> Array:
    """y = [x; row; 0]     x (..., S, K, D)   row (K, D) or None   →   y (..., S', K, D)"""
    xp, (*batch, _, K, D) = namespace(x), x.shape
    rows = [] if row is None else [xp.broadcast_to(row, (*batch, 1, K, D))]
    rows += [full((*batch, 1, K, D), 0.0, x)] if zero else []
    return xp.concat([x, *rows], axis=-3) if rows else x


def append_rows_vjp(S: int, row: Array, dy: Array, batch_axes: int) -> tuple[Array, Array]:
    """dx, drow"""
    if row is None:
        return dy[..., :S, :, :], None
    return dy[..., :S, :, :], sum_over_batch(dy[..., S, :, :], 2, batch_axes)


# ── head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HeadCache(NamedTuple):
    group: GroupCache  # of one head


@with_single_threaded_blas
def head(
    params: Params, query: Array, key: Array, value: Array, bias: Any, /, *, kernel: Kernel, **options: Any
) -> tuple[Array, HeadCache]:
    """o = attention(query wqᵀ + bq, key wkᵀ + bk, value wvᵀ + bv)     as `funcmha.mha.head`"""
    _, bias, x = check_head(params, query, key, value, bias, options)
    dtype, params, bias = (
        query.dtype,
        join_heads([tree.map(upcast, params)], 1),
        None if bias is None else bias.map(upcast),
    )
    inputs = zero_inputs(query, key, value, x.mask, x.zero_attn or "bias_kv" in params)
    o, group = _attend(params, *inputs, bias, x, kernel)
    o = o[..., 0, :]
    return own(downcast(o, dtype), o), HeadCache(group)


@with_single_threaded_blas
def head_vjp(
    cache: HeadCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias     as `funcmha.mha.head_vjp`"""
    _check.flag("per_sample", per_sample)
    (group,), x = cache, cache.group.q.project.x
    check_cotangents_of_head(do, dweights, dlse, x, group.v.project.w.shape[-2], group.rest.num_keys)
    dweights = None if dweights is None else upcast(dweights)[..., None, :, :]
    dlse = None if dlse is None else upcast(dlse)[..., None, :]
    batch_axes, nothing = x.ndim - 2 if per_sample else 0, (None, None, None)
    dgroup, dxs, dbias = _attend_vjp(group, upcast(do)[..., None, :], dweights, dlse, nothing, batch_axes)
    dbias = None if dbias is None else dbias.without_head_axis()
    return round_gradients((in_order_of(one_head(group.params, 0), one_head(dgroup, 0)), *dxs, dbias), do.dtype)


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class MhaCache(NamedTuple):
    params: Params  # of `SPEC`
    groups: tuple[GroupCache, ...]  # as the gradient takes them, in order
    out: tuple[CombineCache, ...]  # of each
    bias: Bias  # broadcasts to (..., H, T, S), or None


def mha(
    params: Params, query: Array, key: Array, value: Array, bias: Any, /, *, kernel: Kernel, **options: Any
) -> tuple[Array, MhaCache]:
    """y = Σₕ head(paramsₕ, query, key, value, biasₕ) woₕᵀ + bo     as `funcmha.mha.mha`"""
    axes, bias, x = check_mha(params, query, key, value, bias, options)
    return _mha(params, query, key, value, bias, axes, x, kernel)


def mha_vjp(
    cache: MhaCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias     as `funcmha.mha.mha_vjp`"""
    return _mha_vjp(cache, dy, dweights, dlse, per_sample, (None, None, None))


@with_single_threaded_blas
def _mha(
    params: Params, query: Array, key: Array, value: Array, bias: Bias, axes: Axes, x: Options, kernel: Kernel
) -> tuple[Array, MhaCache]:
    """`mha`, of arguments that are checked"""
    dtype, params, bias = query.dtype, tree.map(upcast, params), None if bias is None else bias.map(upcast)
    inputs = zero_inputs(query, key, value, x.mask, x.zero_attn or "bias_kv" in params)
    y, groups, outs, readers, plan = None, [], [], axes["H"] // axes["K"], kernel.plan
    batch, T, S, C = axes["..."], axes["T"], axes["S"], max(axes["Cq"], axes["Ck"], axes["Cv"])
    for kv in plan.forward_ranges(batch, T, S, axes["H"], axes["K"], axes["D"], axes["E"], C):
        h, of_group = slice(kv.start * readers, kv.stop * readers), group_params(params, kv)
        out_proj = of_group.pop("out_proj")
        o, group = _attend(of_group, *inputs, None if bias is None else bias.heads(h), x.heads(h), kernel)
        y, out = combine(out_proj, o, add_to=y, plan=plan)
        for piece, of_piece in _pieces(group, out, plan):
            groups.append(piece)
            outs.append(of_piece)
    return downcast(y, dtype), MhaCache(params, tuple(groups), tuple(outs), bias)


@with_single_threaded_blas
def _mha_vjp(
    cache: MhaCache, dy: Array, dweights: Array, dlse: Array, per_sample: bool, dxs: tuple[Array, ...]
) -> tuple[Any, ...]:
    """dparams, one gradient for each of dxs, dbias: the groups from the last to the first"""
    _check.flag("per_sample", per_sample)
    w, o, like = leaf(cache.params, "out_proj.w"), cache.out[0].o, cache.out[0].o[..., 0, :]
    check_cotangents_of_mha(dy, dweights, dlse, like, w.shape[0], w.shape[1], cache.groups[0].rest.num_keys)
    g, dweights, dlse = upcast(dy), upcast(dweights), upcast(dlse)
    batch_axes, stop = o.ndim - 3 if per_sample else 0, w.shape[1]
    dgroups, dbiases = [], []
    for group, out in zip(reversed(cache.groups), reversed(cache.out), strict=True):
        h, stop = slice(stop - out.o.shape[-2], stop), stop - out.o.shape[-2]
        dout, do = combine_vjp(out, g, batch_axes=batch_axes, plan=group.plan)
        dweights_h = None if dweights is None else dweights[..., h, :, :]
        dlse_h = None if dlse is None else dlse[..., h, :]
        dgroup, dxs, dbias = _attend_vjp(group, do, dweights_h, dlse_h, dxs, batch_axes)
        dgroups.append(dgroup | {"out_proj": dout})
        dbiases.append(dbias)
    dbias = None if cache.bias is None else cache.bias.join(dbiases[::-1])
    return round_gradients((in_order_of(cache.params, join_groups(dgroups[::-1])), *dxs, dbias), dy.dtype)


def _pieces(group: GroupCache, out: CombineCache, plan: Plan) -> Iterator[tuple[GroupCache, CombineCache]]:
    """The group in the smaller ones that the gradient takes, as views"""
    *batch, T, H, E = out.o.shape
    K, D = group.k.project.w.shape[:2]
    for kv in plan.backward_ranges(tuple(batch), T, group.rest.num_keys, H, K, D, E, _width(group)):
        h = slice(kv.start * (H // K), kv.stop * (H // K))
        whole = h == slice(0, H)
        b = out.b if h.start == 0 else None  # is added once
        yield (group, out) if whole else (_slice_group(group, kv), CombineCache(out.o[..., h, :], out.w[:, h, :], b))


# ── self-attention ───────────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionCache(NamedTuple):
    mha: MhaCache


def self_attention(
    params: Params, x: Array, bias: Any, /, *, kernel: Kernel, **options: Any
) -> tuple[Array, SelfAttentionCache]:
    """y = mha(params, x, x, x, bias)     as `funcmha.mha.self_attention`"""
    axes, bias, checked = check_self_attention(params, x, bias, options)
    y, cache = _mha(params, x, x, x, bias, axes, checked, kernel)
    return y, SelfAttentionCache(cache)


def self_attention_vjp(
    cache: SelfAttentionCache, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dx, dbias     with dx added up in one array"""
    return _mha_vjp(cache.mha, dy, dweights, dlse, per_sample, (None,))


# ── one head after another ───────────────────────────────────────────────────────────────────────────────────────


def heads(cache: MhaCache | HeadCache | SelfAttentionCache) -> Iterator[OneHeadCache]:
    """The caches of the specification's heads, as views, with q, k and v projected again where they were not kept"""
    if isinstance(cache, SelfAttentionCache):
        cache = cache.mha
    for group in (cache.group,) if isinstance(cache, HeadCache) else cache.groups:
        q, k, v = (kept(x, group.plan) for x in (group.q, group.k, group.v))
        H, K = q.project.w.shape[0], k.project.w.shape[0]
        for h in range(H):
            one, kv = slice(h, h + 1), slice(h // (H // K), h // (H // K) + 1)
            q_h, k_h, v_h = _slice(q, one), _slice(k, kv), _slice(v, kv)
            yield OneHeadCache(
                one_head(group.params, h),
                _project_of_one(q_h),
                _project_of_one(k_h),
                _project_of_one(v_h),
                _position_of_one(q_h),
                _position_of_one(k_h),
                None if group.bias is None else group.bias.heads(one),
                group.rest.heads(one).with_qkv(q_h.y, k_h.y, v_h.y),
            )


def _project_of_one(x: Kept) -> LinearCache:
    project = x.project
    return LinearCache(project.x, project.w[0, ...], None if project.b is None else project.b[0, ...])


def _position_of_one(x: Kept) -> PositionCache:
    """The specification's cache of one head, which has the head axis first"""
    params, norm, rotated = x.position
    return PositionCache(norm, None if norm is None else norm.apply(heads_first(x.projected), params)[1], rotated)
