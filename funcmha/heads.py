"""All heads: project the inputs, attend head by head, put the heads together; each with its gradient.

`funcmha.mha` composes these. Nothing is checked here: the doors are there.

Axes: T queries, S keys, S' keys with those that `extend` appends, H query heads, K key/value heads, D query/key width,
E value width, O output width, C input width; `...` is batch.
"""

from typing import Any, NamedTuple

from ._xp import Array, full, namespace, unbroadcast
from .engines import REFERENCE, Engine
from .masks import Mask, as_mask, dense
from .ops import LinearCache
from .params import Params

# ── project: one product for all heads ───────────────────────────────────────────────────────────────────────────


class ProjectCache(NamedTuple):
    x: Array  # (..., T, C)
    w: Array  # (H, D, C)
    b: Array  # (H, D) or None
    engine: Engine | None  # None for the reference, so that the cache holds nothing but arrays


def project(params: Params, x: Array, /, *, engine: Engine) -> tuple[Array, ProjectCache]:
    """yₕ = x wₕᵀ + bₕ     x (..., T, C)   w (H, D, C)   b (H, D) or absent   →   y (..., T, H, D)"""
    cache = ProjectCache(x, params["w"], params.get("b"), _remembered(engine))
    y, _ = engine.linear(*_stacked(cache))
    return namespace(x).reshape(y, (*x.shape[:-1], *cache.w.shape[:-1])), cache


def project_vjp(cache: ProjectCache, dy: Array, /) -> tuple[Params, Array]:
    """dparams, dx"""
    reshape, (*batch, H, D) = namespace(dy).reshape, dy.shape
    dx, dw, db = _engine(cache).linear_vjp(_stacked(cache), reshape(dy, (*batch, H * D)))
    return _group(reshape(dw, cache.w.shape), None if db is None else reshape(db, (H, D))), dx


def _stacked(cache: ProjectCache) -> LinearCache:
    """The heads as the rows of one matrix (H·D, C)."""
    x, w, b, _ = cache
    H, D, C = w.shape
    reshape = namespace(x).reshape
    return LinearCache(x, reshape(w, (H * D, C)), None if b is None else reshape(b, (H * D,)))


def _group(w: Array, b: Array) -> Params:
    return {"w": w} if b is None else {"w": w, "b": b}


def _remembered(engine: Engine) -> Engine | None:
    return None if engine is REFERENCE else engine


def _engine(cache: Any) -> Engine:
    return REFERENCE if cache.engine is None else cache.engine


# ── extend: keys and values that come from no input ──────────────────────────────────────────────────────────────


def extend(x: Array, row: Array, zero: bool) -> Array:
    """y = [x; row; 0]     x (..., S, K, D)   row (K, D) or None   →   y (..., S', K, D)"""
    xp, (*batch, _, K, D) = namespace(x), x.shape
    rows = [] if row is None else [xp.broadcast_to(row, (*batch, 1, K, D))]
    rows += [full((*batch, 1, K, D), 0.0, x)] if zero else []
    return xp.concat([x, *rows], axis=-3) if rows else x


def extend_vjp(S: int, row: Array, dy: Array) -> tuple[Array, Array]:
    """dx, drow"""
    return dy[..., :S, :, :], None if row is None else unbroadcast(dy[..., S, :, :], row.shape)


def extend_scores(a: Array, S: int, extra: int, fill: float | bool) -> Array:
    """a (..., S or 1) or None   →   (..., S'): what a mask or a bias says of the keys that `extend` appends"""
    if a is None or extra == 0:
        return a
    xp = namespace(a)
    return xp.concat([xp.broadcast_to(a, (*a.shape[:-1], S)), full((*a.shape[:-1], extra), fill, a)], axis=-1)


def extend_scores_vjp(S: int, extra: int, a: Array, da: Array) -> Array:
    """da of the keys that were there before, summed where `a` was the same for all of them"""
    return da if da is None or extra == 0 else unbroadcast(da[..., :S], a.shape)


# ── combine: the output projection ───────────────────────────────────────────────────────────────────────────────


class CombineCache(NamedTuple):
    o: Array  # (..., T, H, E)
    w: Array  # (O, H, E)
    b: Array  # (O,) or None
    engine: Engine | None  # None for the reference


def combine(params: Params, o: Array, /, *, engine: Engine) -> tuple[Array, CombineCache]:
    """y = Σₕ oₕ wₕᵀ + b     o (..., T, H, E)   w (O, H, E)   b (O,) or absent   →   y (..., T, O)"""
    cache = CombineCache(o, params["w"], params.get("b"), _remembered(engine))
    y, _ = engine.linear(*_concatenated(cache))
    return y, cache


def combine_vjp(cache: CombineCache, dy: Array, /) -> tuple[Params, Array]:
    """dparams, do"""
    reshape = namespace(dy).reshape
    do, dw, db = _engine(cache).linear_vjp(_concatenated(cache), dy)
    return _group(reshape(dw, cache.w.shape), db), reshape(do, cache.o.shape)


def _concatenated(cache: CombineCache) -> LinearCache:
    """The heads side by side, as the columns of one matrix (O, H·E)."""
    o, w, b, _ = cache
    O, H, E = w.shape
    reshape = namespace(o).reshape
    return LinearCache(reshape(o, (*o.shape[:-2], H * E)), reshape(w, (O, H * E)), b)


# ── attend: what the engine does with the heads ──────────────────────────────────────────────────────────────────


class HeadsCache(NamedTuple):
    q: ProjectCache
    k: ProjectCache
    v: ProjectCache
    bias_kv: Params  # k (K, D) and v (K, E), or both None
    bias: Array  # broadcasts to (..., H, T, S), or None
    attention: Any  # what the engine keeps: its k is (..., K, S', D)
    engine: Engine | None  # None for the reference


def attend(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    *,
    mask: Mask | None,
    scale: float | None,
    zero_attn: bool,
    keep: Array,
    rate: float,
    engine: Engine,
) -> tuple[Array, HeadsCache]:
    """o = attention(project(query), extend(project(key)), extend(project(value)))     →   o (..., T, H, E)"""
    q, q_cache = project(params["q_proj"], query, engine=engine)
    k, k_cache = project(params["k_proj"], key, engine=engine)
    v, v_cache = project(params["v_proj"], value, engine=engine)
    bias_kv = params.get("bias_kv", {"k": None, "v": None})
    k, v = extend(k, bias_kv["k"], zero_attn), extend(v, bias_kv["v"], zero_attn)
    S, extra = key.shape[-2], k.shape[-3] - key.shape[-2]
    all_bias = extend_scores(bias, S, extra, 0.0)
    if mask is not None and extra:
        mask = as_mask(extend_scores(dense(mask, q.shape[-3], S, q), S, extra, True))
    o, cache = engine.attention(
        _heads_first(q), _heads_first(k), _heads_first(v), all_bias, mask=mask, scale=scale, keep=keep, rate=rate
    )
    return _heads_last(o), HeadsCache(q_cache, k_cache, v_cache, bias_kv, bias, cache, _remembered(engine))


def attend_vjp(
    cache: HeadsCache, do: Array, /, *, dweights: Array, dlse: Array
) -> tuple[Params, Array, Array, Array, Array]:
    """dparams, dquery, dkey, dvalue, dbias: `attend` from the bottom up"""
    S = cache.k.x.shape[-2]
    dq, dk, dv, dbias = _engine(cache).attention_vjp(cache.attention, _heads_first(do), dweights=dweights, dlse=dlse)
    dbias = extend_scores_vjp(S, dk.shape[-2] - S, cache.bias, dbias)
    dk, drow_k = extend_vjp(S, cache.bias_kv["k"], _heads_last(dk))
    dv, drow_v = extend_vjp(S, cache.bias_kv["v"], _heads_last(dv))
    dv_proj, dvalue = project_vjp(cache.v, dv)
    dk_proj, dkey = project_vjp(cache.k, dk)
    dq_proj, dquery = project_vjp(cache.q, _heads_last(dq))
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj}
    if drow_k is not None:
        dparams["bias_kv"] = {"k": drow_k, "v": drow_v}
    return dparams, dquery, dkey, dvalue, dbias


def _heads_first(x: Array) -> Array:
    """x (..., T, H, D)   →   (..., H, T, D)"""
    return namespace(x).moveaxis(x, -2, -3)


def _heads_last(x: Array) -> Array:
    """x (..., H, T, D)   →   (..., T, H, D)"""
    return namespace(x).moveaxis(x, -3, -2)
