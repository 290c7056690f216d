"""Forward mode of multi-head attention: `mha` of the tangents, group after group, line by line.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, O output width, Cq Ck Cv input widths; `...` is batch. Parameters: `funcmha.params.SPEC`.
"""

from functools import singledispatch
from typing import Any

from . import _check, tree
from ._bias import bias_as_head, bias_as_head_vjp, bias_of_heads, on_bias
from ._doors import blank_keys, blank_queries, values_of
from ._qk import ReadyCache, heads_first, heads_last
from ._tangents import check_bias_tangent, check_tangent, dtype_of, one_dtype
from ._xp import Array, namespace, narrow, widen
from .biases import RelativeBias
from .forward import attention_jvp
from .heads import (
    AttendCache,
    CombineCache,
    ProjectCache,
    concatenated,
    engine_of,
    extend,
    extend_scores,
    recall,
    stacked,
)
from .mha import GroupCache, HeadCache, MhaCache
from .ops import AttentionCache, seeing_queries
from .params import HEAD_SPEC, SPEC, Params, group_params, stack_head, unstack_head
from .rotary import rotate
from .tiled.attention import AttentionCache as TiledCache


def mha_jvp(
    cache: MhaCache,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    /,
) -> tuple[Array, Array]:
    """ẏ = Σₕ (ȯₕ woₕᵀ + oₕ ẇoₕᵀ) + ḃo     l̇se
    querẏ (..., T, Cq)   keẏ (..., S, Ck)   valuė (..., S, Cv)   →   ẏ (..., T, O)   l̇se (..., H, T)

    `params_dot` is a tree as the parameters are, or None. For `self_attention`, whose cache holds one of `mha`, it is
    mha_jvp(cache.mha, params_dot, x_dot, x_dot, x_dot, bias_dot).
    """
    given = check_mha_tangents(cache, params_dot, query_dot, key_dot, value_dot, bias_dot)
    dtype = dtype_of(cache.groups[0].out.o, *given)
    params_dot, query_dot, key_dot, value_dot, bias_dot = wide(params_dot, query_dot, key_dot, value_dot, bias_dot)
    y_dot, lse_dots = None, []
    for (heads, out), kv, h in head_ranges(cache):
        group_dot = None if params_dot is None else group_params(params_dot, *kv)
        bias_h = bias_of_heads(bias_dot, h)
        heads = recall(heads)
        o_dot, lse_dot = attend_jvp(heads, group_dot, *visible_inputs(heads, query_dot, key_dot, value_dot), bias_h)
        y_dot = combine_jvp(out, None if group_dot is None else group_dot["out_proj"], o_dot, onto=y_dot)
        lse_dots.append(lse_dot)
    return narrow(y_dot, dtype), narrow(namespace(y_dot).concat(lse_dots, axis=-2), dtype)


def head_jvp(
    cache: HeadCache,
    params_dot: Params | None = None,
    query_dot: Array = None,
    key_dot: Array = None,
    value_dot: Array = None,
    bias_dot: Array | RelativeBias = None,
    /,
) -> tuple[Array, Array]:
    """ȯ (..., T, E), l̇se (..., T) of the tangents of `head`'s inputs: as in `mha_jvp`, of one head

    `params_dot` is a tree as `head_params(params, h)` is, `bias_dot` as the bias: it broadcasts to (..., T, S).
    """
    _check.cache(cache, HeadCache, "head")
    (heads,) = cache
    stack = tree.unflatten({leaf: a for leaf, a in _attend_leaves(heads).items() if a is not None})
    shapes = {leaf: tuple(a.shape) for leaf, a in tree.flatten(unstack_head(stack)).items()}
    given = _check_tangents(
        heads, shapes, HEAD_SPEC, bias_as_head_vjp(heads.bias), params_dot, query_dot, key_dot, value_dot, bias_dot
    )
    dtype = dtype_of(heads.q.x, *given)
    params_dot, query_dot, key_dot, value_dot, bias_dot = wide(params_dot, query_dot, key_dot, value_dot, bias_dot)
    stack_dot, heads = None if params_dot is None else stack_head(params_dot), recall(heads)
    inputs_dot = visible_inputs(heads, query_dot, key_dot, value_dot)
    o_dot, lse_dot = attend_jvp(heads, stack_dot, *inputs_dot, bias_as_head(bias_dot))
    return narrow(o_dot[..., 0, :], dtype), narrow(lse_dot[..., 0, :], dtype)


def attend_jvp(
    cache: AttendCache, params_dot: Params | None, query_dot: Array, key_dot: Array, value_dot: Array, bias_dot: Any
) -> tuple[Array, Array]:
    """ȯ (..., T, H, E), l̇se (..., H, T): `attend` of the tangents, of a cache that was recalled"""
    q_dot, k_dot, v_dot = inner_tangents(cache, params_dot, query_dot, key_dot, value_dot)
    S, extra = cache.k.x.shape[-2], cache.attention.k.shape[-2] - cache.k.x.shape[-2]
    sink_dot = None if params_dot is None or "sink" not in params_dot else params_dot["sink"]["w"]
    bias_dot = extend_scores(bias_dot, S, extra, 0.0)
    o_dot, lse_dot = attention_jvp(cache.attention, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    return heads_last(o_dot), lse_dot


def inner_tangents(
    cache: AttendCache, params_dot: Params | None, query_dot: Array, key_dot: Array, value_dot: Array
) -> tuple[Array, Array, Array]:
    """q̇ (..., H, T, D), k̇ (..., K, S', D), v̇ (..., K, S', E) of a group of heads, each None where it is zero"""
    of = {} if params_dot is None else params_dot
    q_dot = project_jvp(cache.q, of.get("q_proj"), query_dot)
    k_dot = project_jvp(cache.k, of.get("k_proj"), key_dot)
    v_dot = project_jvp(cache.v, of.get("v_proj"), value_dot)
    q_dot, k_dot = (
        ready_jvp(ready, of.get(norm, {}), x)
        for ready, norm, x in ((cache.q_ready, "q_norm", q_dot), (cache.k_ready, "k_norm", k_dot))
    )
    rows = of.get("bias_kv", {"k": None, "v": None})
    k_dot, v_dot = (_extend_jvp(cache, leaf, x, rows[leaf]) for leaf, x in (("k", k_dot), ("v", v_dot)))
    return tuple(None if x is None else heads_first(x) for x in (q_dot, k_dot, v_dot))  # type: ignore[return-value]


def project_jvp(cache: ProjectCache, params_dot: Params | None, x_dot: Array) -> Array:
    """ẏₕ = ẋ wₕᵀ + x ẇₕᵀ + ḃₕ   (..., T, H, D), or None where it is zero"""
    if params_dot is None and x_dot is None:
        return None
    stack = stacked(cache._replace(w=cache.w if params_dot is None else params_dot["w"], b=(params_dot or {}).get("b")))
    y_dot, linear = None, engine_of(cache).linear
    if params_dot is not None:
        y_dot, _ = linear(*stack)
    if x_dot is not None:
        y_dot, _ = linear(x_dot, stacked(cache).w, onto=y_dot)
    return namespace(y_dot).reshape(y_dot, (*cache.x.shape[:-1], *cache.w.shape[:-1]))


def ready_jvp(cache: ReadyCache, params_dot: Params, x_dot: Array) -> Array:
    """ẏ = rotate(norm's ẏ): a rotation is linear, and is its own jvp"""
    if x_dot is None:
        return None
    if cache.norm is not None:
        _, normed = cache.norm.apply(cache.x, cache.w)
        x_dot = cache.norm.apply_jvp(normed, x_dot, params_dot)
    if cache.rotary is not None:
        x_dot, _ = rotate(heads_first(x_dot), rotary=cache.rotary.rotary)
        x_dot = heads_last(x_dot)
    return x_dot


def _extend_jvp(cache: AttendCache, leaf: str, x_dot: Array, row_dot: Array) -> Array:
    """[ẋ; ṙow; 0]"""
    row = cache.bias_kv[leaf]
    if x_dot is None:
        return None
    row_dot = namespace(row).zeros_like(row) if row is not None and row_dot is None else row_dot
    extra = cache.attention.k.shape[-2] - cache.k.x.shape[-2]
    return extend(x_dot, row_dot, zero=extra > (row is not None))


def combine_jvp(cache: CombineCache, params_dot: Params | None, o_dot: Array, *, onto: Array) -> Array:
    """ẏ = onto + Σₕ (ȯₕ wₕᵀ + oₕ ẇₕᵀ) + ḃ   (..., T, O)"""
    linear, (o, w, _) = engine_of(cache).linear, concatenated(cache)
    y_dot, _ = linear(namespace(o).reshape(o_dot, o.shape), w, onto=onto)
    if params_dot is not None:
        w_dot = namespace(o).reshape(params_dot["w"], w.shape)
        y_dot, _ = linear(o, w_dot, params_dot.get("b"), onto=y_dot)
    return y_dot


# ── the groups of a cache, and the door ──────────────────────────────────────────────────────────────────────────


def head_ranges(cache: MhaCache) -> list[tuple[Any, tuple[int, int], slice]]:
    """Each group, the key/value heads start … stop that it is, and which query heads read them."""
    found, kv, h = [], 0, 0
    for group in cache.groups:
        K, H = group.heads.k.w.shape[0], group.heads.q.w.shape[0]
        found.append((group, (kv, kv + K), slice(h, h + H)))
        kv, h = kv + K, h + H
    return found


def visible_inputs(
    cache: AttendCache, query_dot: Array, key_dot: Array, value_dot: Array
) -> tuple[Array, Array, Array]:
    """The tangents with 0 at the queries and keys that in no head of the group see or are seen, whatever is there."""
    seen, seeing = seen_and_seeing(cache.attention)
    if seen is None:
        return query_dot, key_dot, value_dot
    seen = seen[..., : cache.k.x.shape[-2]]

    def one_head(blank: Any, x: Array, some: Array) -> Array:
        return None if x is None else blank(x[..., None, :, :], some)[..., 0, :, :]

    return (
        one_head(blank_queries, query_dot, seeing),
        one_head(blank_keys, key_dot, seen),
        one_head(blank_keys, value_dot, seen),
    )


@singledispatch
def seen_and_seeing(cache: Any) -> tuple[Array, Array]:
    """Booleans (..., H or 1, ·, S') and (..., H or 1, T, ·)

    `any` over the rows of the former says which keys are seen, over the columns of the latter which queries see one;
    or None for all.
    """
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@seen_and_seeing.register
def _(cache: AttentionCache) -> tuple[Array, Array]:
    return cache.p != 0, seeing_queries(cache)


@seen_and_seeing.register
def _(cache: TiledCache) -> tuple[Array, Array]:
    mask, T, S = cache.mask, cache.q.shape[-2], cache.k.shape[-2]
    return (None, None) if mask is None else (mask.attended_keys(T, S), mask.attending_queries(T, S))


def wide(params_dot: Params | None, *dots: Any) -> tuple[Any, ...]:
    """The tangents in the dtype to compute in."""
    *arrays, bias_dot = dots
    params_dot = None if params_dot is None else tree.map(widen, params_dot)
    return params_dot, *map(widen, arrays), on_bias(widen, bias_dot)


def check_mha_tangents(
    cache: MhaCache, params_dot: Any, query_dot: Array, key_dot: Array, value_dot: Array, bias_dot: Any
) -> list[Any]:
    """The door of `mha_jvp`: all tangents that there are."""
    _check.cache(cache, MhaCache, "mha")
    shapes = leaf_shapes(cache)
    return _check_tangents(
        cache.groups[0].heads, shapes, SPEC, cache.bias, params_dot, query_dot, key_dot, value_dot, bias_dot
    )


def _check_tangents(
    heads: AttendCache,
    shapes: dict[str, tuple[int, ...]],
    spec: dict[str, str],
    bias: Any,
    params_dot: Any,
    query_dot: Array,
    key_dot: Array,
    value_dot: Array,
    bias_dot: Any,
) -> list[Any]:
    """All tangents that there are: of leaves of these shapes, and of the inputs of these heads."""
    if params_dot is not None and not isinstance(params_dot, dict):
        raise TypeError(f"params_dot must be a dict of dicts of arrays, or None, got {type(params_dot).__name__}")
    leaves = {} if params_dot is None else {f"params_dot.{leaf}": a for leaf, a in tree.flatten(params_dot).items()}
    inputs = {"query_dot": query_dot, "key_dot": key_dot, "value_dot": value_dot}
    one_dtype([*leaves.items(), *inputs.items(), ("bias_dot", values_of(bias_dot))])
    if params_dot is not None and leaves.keys() != {f"params_dot.{leaf}" for leaf in shapes}:
        raise KeyError(f"params_dot must have {', '.join(shapes)} as params have, got {', '.join(leaves)}")
    for name, x in leaves.items():
        leaf = name.removeprefix("params_dot.")
        check_tangent(name, x, shapes[leaf], heads.q.x, spec[leaf])
    for (name, x), of, letters in zip(
        inputs.items(), (heads.q, heads.k, heads.v), ("T Cq", "S Ck", "S Cv"), strict=True
    ):
        check_tangent(name, x, of.x.shape, heads.q.x, f"... {letters}")
    check_bias_tangent(bias_dot, bias, heads.q.x)
    return [*leaves.values(), *inputs.values(), bias_dot]


def leaf_shapes(cache: MhaCache) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, in the order of SPEC."""
    first, *others = [_group_shapes(group) for group in cache.groups]
    shapes = {}
    for leaf, shape in first.items():
        axis = next((i for i, letter in enumerate(SPEC[leaf].split()) if letter in "HK"), None)
        more = 0 if axis is None else sum(other[leaf][axis] for other in others)
        shapes[leaf] = tuple(n + more if i == axis else n for i, n in enumerate(shape))
    return shapes


def _group_shapes(group: GroupCache) -> dict[str, tuple[int, ...]]:
    heads, out = group
    leaves = _attend_leaves(heads) | {"out_proj.w": out.w, "out_proj.b": out.b}
    return {leaf: tuple(leaves[leaf].shape) for leaf in SPEC if leaves.get(leaf) is not None}


def _attend_leaves(heads: AttendCache) -> dict[str, Array]:
    """The parameters of some heads by name, None where there are none."""
    q, k, v, sink = heads.q, heads.k, heads.v, heads.attention.sink
    leaves = {"q_proj.w": q.w, "q_proj.b": q.b, "k_proj.w": k.w, "k_proj.b": k.b, "v_proj.w": v.w, "v_proj.b": v.b}
    leaves |= {"sink.w": sink} | {f"bias_kv.{leaf}": a for leaf, a in heads.bias_kv.items()}
    leaves |= {f"q_norm.{leaf}": a for leaf, a in heads.q_ready.w.items()}
    return leaves | {f"k_norm.{leaf}": a for leaf, a in heads.k_ready.w.items()}
