"""A group of heads: project the inputs, attend, put the heads together; each with its gradient.

A group is some key/value heads and the query heads that read them. `funcmha.mha` composes group after group. Nothing is
checked here: the doors are there.

Axes: T queries, S keys, S' keys with those that `extend` appends, H query heads and K key/value heads of the group,
D query/key width, E value width, O output width, C input width; `...` is batch.
"""

from math import prod
from typing import Any, NamedTuple

from ._bias import bias_of_heads, bias_of_sample
from ._qk import ReadyCache, heads_first, heads_last, ready, ready_vjp
from ._xp import Array, full, namespace, unbroadcast
from .biases import RelativeBias
from .dropout import Masked, Seeded
from .engines import REFERENCE, Engine
from .masks import as_mask, dense
from .norms import Norm
from .ops import LinearCache, cut_heads, cut_sample
from .params import Params
from .rotary import cut_turned, cut_turned_sample

SMALL = 2**18  # numbers of o, 1 MiB of float32: with fewer, queries and keys are kept, whose memory is worth no time
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WIDE = 256  # of a projection: a product this wide gains nothing from being a part of one that is wider

# ── project: one product for all heads ───────────────────────────────────────────────────────────────────────────


class ProjectCache(NamedTuple):
    x: Array  # (..., T, C)
    w: Array  # (H, D, C)
    b: Array  # (H, D) or None
    engine: Engine | None  # None for the reference, so that the cache holds nothing but arrays


def project(params: Params, x: Array, /, *, engine: Engine) -> tuple[Array, ProjectCache]:
    """yₕ = x wₕᵀ + bₕ     x (..., T, C)   w (H, D, C)   b (H, D) or absent   →   y (..., T, H, D)"""
    cache = ProjectCache(x, params["w"], params.get("b"), _remembered(engine))
    return _projected(cache), cache


def project_vjp(cache: ProjectCache, dy: Array, /, *, onto: Array) -> tuple[Params, Array]:
    """dparams, onto + dx"""
    reshape, (*batch, H, D) = namespace(dy).reshape, dy.shape
    dx, dw, db = engine_of(cache).linear_vjp(stacked(cache), reshape(dy, (*batch, H * D)), onto=onto)
    return w_and_b(reshape(dw, cache.w.shape), None if db is None else reshape(db, (H, D))), dx


def project_qkv(
    params: Params, inputs: tuple[Array, Array, Array], /, *, engine: Engine
) -> tuple[tuple[Array, ...], tuple[ProjectCache, ...]]:
    """q, k, v of query, key and value, each (..., T, H, D)"""
    found = [project(params[name], x, engine=engine) for name, x in zip(PROJECTIONS, inputs, strict=True)]
    return tuple(y for y, _ in found), tuple(cache for _, cache in found)


def project_qkv_vjp(
    caches: tuple[ProjectCache, ...], dys: tuple[Array, ...], /, *, onto: tuple[Array, ...]
) -> tuple[Params, tuple[Array, ...]]:
    """dparams, onto + (dquery, dkey, dvalue)

    Where `onto` is one array, the three are one input, and their gradients are added up: of wide projections in turn,
    of narrow ones as one product.
    """
    dparams: list[Params] = []
    dxs, n = list(onto), len(onto)
    if n == 1 and min(dy.shape[-2] * dy.shape[-1] for dy in dys) < WIDE:
        dparams, dxs[0] = _back_as_one(caches, dys, onto=dxs[0])
    else:
        for i, (cache, dy) in enumerate(zip(caches, dys, strict=True)):
            of_one, dxs[i % n] = project_vjp(cache, dy, onto=dxs[i % n])
            dparams.append(of_one)
    return dict(zip(PROJECTIONS, dparams, strict=True)), tuple(dxs)


def _back_as_one(
    caches: tuple[ProjectCache, ...], dys: tuple[Array, ...], /, *, onto: Array
) -> tuple[list[Params], Array]:
    """dparams of each, onto + dx: of the projection whose rows are those of all"""
    xp, engine, parts = namespace(dys[0]), engine_of(caches[0]), [stacked(cache) for cache in caches]
    w = xp.concat([part.w for part in parts])
    b = None
    if any(part.b is not None for part in parts):
        b = xp.concat([full(part.w.shape[:1], 0.0, part.w) if part.b is None else part.b for part in parts])
    flat = tuple(xp.reshape(dy, (*dy.shape[:-2], dy.shape[-2] * dy.shape[-1])) for dy in dys)
    dx, dw, db = engine.linear_vjp(LinearCache(parts[0].x, w, b), flat, onto=onto)
    dparams, stop = [], 0
    for cache, part in zip(caches, parts, strict=True):
        rows = slice(stop, stop + part.w.shape[0])
        dbias = None if part.b is None else xp.reshape(db[rows], cache.b.shape)
        dparams.append(w_and_b(xp.reshape(dw[rows, :], cache.w.shape), dbias))
        stop = rows.stop
    return dparams, dx


def _projected(cache: ProjectCache) -> Array:
    y, _ = engine_of(cache).linear(*stacked(cache))
    return namespace(y).reshape(y, (*cache.x.shape[:-1], *cache.w.shape[:-1]))


def stacked(cache: ProjectCache) -> LinearCache:
    """The heads as the rows of one matrix (H·D, C)."""
    x, w, b, _ = cache
    H, D, C = w.shape
    reshape = namespace(x).reshape
    return LinearCache(x, reshape(w, (H * D, C)), None if b is None else reshape(b, (H * D,)))


def w_and_b(w: Array, b: Array) -> Params:
    """The group of one projection, without what is None."""
    return {"w": w} if b is None else {"w": w, "b": b}


def _remembered(engine: Engine) -> Engine | None:
    return None if engine is REFERENCE else engine


def engine_of(cache: Any) -> Engine:
    """The engine that a cache remembers."""
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


def extend_scores(a: Any, S: int, extra: int, fill: float | bool) -> Any:
    """a (..., S or 1) or None   →   (..., S'): what a mask or a bias says of the keys that `extend` appends"""
    if a is None or extra == 0:
        return a
    assert not isinstance(a, RelativeBias)  # refused at the door: an appended key has no position
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


def combine(params: Params, o: Array, /, *, engine: Engine, onto: Array) -> tuple[Array, CombineCache]:
    """y = onto + Σₕ oₕ wₕᵀ + b     o (..., T, H, E)   w (O, H, E)   b (O,) or absent   →   y (..., T, O)"""
    cache = CombineCache(o, params["w"], params.get("b"), _remembered(engine))
    y, _ = engine.linear(*concatenated(cache), onto=onto)
    return y, cache


def combine_vjp(cache: CombineCache, dy: Array, /) -> tuple[Params, Array]:
    """dparams, do"""
    reshape = namespace(dy).reshape
    do, dw, db = engine_of(cache).linear_vjp(concatenated(cache), dy)
    return w_and_b(reshape(dw, cache.w.shape), db), reshape(do, cache.o.shape)


def cut_combined(cache: CombineCache, h: slice) -> CombineCache:
    """The cache of the query heads `h`, as views. The bias, which is added once, goes with the first of them."""
    o, w, b, engine = cache
    return CombineCache(o[..., h, :], w[:, h, :], b if h.start == 0 else None, engine)


def concatenated(cache: CombineCache) -> LinearCache:
    """The heads side by side, as the columns of one matrix (O, H·E)."""
    o, w, b, _ = cache
    O, H, E = w.shape
    reshape = namespace(o).reshape
    return LinearCache(reshape(o, (*o.shape[:-2], H * E)), reshape(w, (O, H * E)), b)


# ── attend: from the inputs to what the heads have found ─────────────────────────────────────────────────────────


class Options(NamedTuple):
    """What is not differentiable of an attention of several heads: here as the doors leave it, who take it as given."""

    mask: Any  # a Mask, or None
    scale: Any  # of every head, or (H,), or None
    softcap: Any  # of every head, or (H,), or None
    zero_attn: bool
    qk_norm: Norm | None
    rotary: Any  # two tables, of queries and of keys, each of them or None
    dropout: Masked | Seeded | None
    engine: Any  # an Engine


class AttendCache(NamedTuple):
    q: ProjectCache
    k: ProjectCache
    v: ProjectCache
    q_ready: ReadyCache
    k_ready: ReadyCache
    bias_kv: Params  # k (K, D) and v (K, E), or both None
    bias: Array | RelativeBias  # broadcasts to (..., H, T, S), or None
    attention: Any  # what the engine keeps, without q, k and v where these are cheap
    engine: Engine | None  # None for the reference


def attend(
    params: Params, query: Array, key: Array, value: Array, bias: Array | RelativeBias, x: Options
) -> tuple[Array, AttendCache]:
    """o = attention(ready(project(query)), extend(ready(project(key))), extend(project(value)))   →   (..., T, H, E)"""
    (q, k, v), (q_cache, k_cache, v_cache) = project_qkv(params, (query, key, value), engine=x.engine)
    q, q_ready = ready(q, params.get("q_norm", {}), norm=x.qk_norm, rotary=x.rotary[0])
    k, k_ready = ready(k, params.get("k_norm", {}), norm=x.qk_norm, rotary=x.rotary[1])
    bias_kv = params.get("bias_kv", {"k": None, "v": None})
    k, v = extend(k, bias_kv["k"], x.zero_attn), extend(v, bias_kv["v"], x.zero_attn)
    S, extra, mask = key.shape[-2], k.shape[-3] - key.shape[-2], x.mask
    all_bias = extend_scores(bias, S, extra, 0.0)
    if mask is not None and extra:
        mask = as_mask(extend_scores(dense(mask, q.shape[-3], S, q), S, extra, True))
    o, cache = x.engine.attention(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        all_bias,
        params["sink"]["w"] if "sink" in params else None,
        mask=mask,
        scale=x.scale,
        softcap=x.softcap,
        dropout=x.dropout,
    )
    whole = AttendCache(q_cache, k_cache, v_cache, q_ready, k_ready, bias_kv, bias, cache, _remembered(x.engine))
    return heads_last(o), whole if extra else _forget(whole, o)


def attend_vjp(
    cache: AttendCache, do: Array, /, *, dweights: Array, dlse: Array, onto: tuple[Array, ...]
) -> tuple[Params, tuple[Array, ...], Array | RelativeBias]:
    """dparams, onto + (dquery, dkey, dvalue), dbias: `attend` from the bottom up

    Where `onto` is one array, query, key and value are one input, and their gradients are added up.
    """
    S, engine, cache = cache.k.x.shape[-2], engine_of(cache), recall(cache)
    dq, dk, dv, dbias, dsink = engine.attention_vjp(cache.attention, heads_first(do), dweights=dweights, dlse=dlse)
    dbias = extend_scores_vjp(S, dk.shape[-2] - S, cache.bias, dbias)
    dk, drow_k = extend_vjp(S, cache.bias_kv["k"], heads_last(dk))
    dv, drow_v = extend_vjp(S, cache.bias_kv["v"], heads_last(dv))
    dk, dk_norm = ready_vjp(cache.k_ready, dk)
    dq, dq_norm = ready_vjp(cache.q_ready, heads_last(dq))
    dparams, dxs = project_qkv_vjp((cache.q, cache.k, cache.v), (dq, dk, dv), onto=onto)
    if drow_k is not None:
        dparams["bias_kv"] = {"k": drow_k, "v": drow_v}
    if dsink is not None:
        dparams["sink"] = {"w": dsink}
    return dparams | {name: g for name, g in (("q_norm", dq_norm), ("k_norm", dk_norm)) if g}, dxs, dbias


def cut(cache: AttendCache, start: int, stop: int) -> AttendCache:
    """The cache of key/value heads start … stop and of the query heads that read them, as views."""
    per_key_head = cache.q.w.shape[0] // max(cache.k.w.shape[0], 1)
    h, kv = slice(start * per_key_head, stop * per_key_head), slice(start, stop)
    return AttendCache(
        _cut_projection(cache.q, h),
        _cut_projection(cache.k, kv),
        _cut_projection(cache.v, kv),
        _cut_ready(cache.q_ready, h),
        _cut_ready(cache.k_ready, kv),
        {leaf: None if a is None else a[kv, ...] for leaf, a in cache.bias_kv.items()},
        bias_of_heads(cache.bias, h),
        cut_heads(cache.attention, h, kv),
        cache.engine,
    )


def cut_attended(cache: AttendCache, b: tuple[int, ...]) -> AttendCache:
    """The cache of one element of the batch, as views."""
    q, k, v = (projected._replace(x=projected.x[b]) for projected in (cache.q, cache.k, cache.v))
    bias, attention = bias_of_sample(cache.bias, b), cut_sample(cache.attention, b)
    q_ready, k_ready = _ready_of_sample(cache.q_ready, b), _ready_of_sample(cache.k_ready, b)
    return AttendCache(q, k, v, q_ready, k_ready, cache.bias_kv, bias, attention, cache.engine)


def _ready_of_sample(cache: ReadyCache, b: tuple[int, ...]) -> ReadyCache:
    turned = None if cache.rotary is None else cut_turned_sample(cache.rotary, b)
    return cache._replace(x=None if cache.x is None else cache.x[b], rotary=turned)


def _cut_ready(cache: ReadyCache, heads: slice) -> ReadyCache:
    cache = cache if cache.x is None else cache._replace(x=cache.x[..., heads, :])
    return cache if cache.rotary is None else cache._replace(rotary=cut_turned(cache.rotary, heads))


def _cut_projection(cache: ProjectCache, heads: slice) -> ProjectCache:
    return cache._replace(w=cache.w[heads, ...], b=None if cache.b is None else cache.b[heads, ...])


def num_keys(cache: AttendCache) -> int:
    """S'"""
    return int(cache.k.x.shape[-2] if cache.attention.k is None else cache.attention.k.shape[-2])


def _forget(cache: AttendCache, o: Array) -> AttendCache:
    """The cache without those of q, k and v whose memory is worth more than the time to project them again."""
    if prod(o.shape) <= SMALL:
        return cache
    width = max(x.shape[-1] for x in (cache.q.x, cache.k.x, cache.v.x))
    gone = ("q", "k", "v")[: forgettable(cache.q.x.shape[-2], cache.k.x.shape[-2], width)]
    q_ready, k_ready = cache.q_ready, cache.k_ready
    return cache._replace(
        q_ready=q_ready._replace(x=None) if "q" in gone else q_ready,
        k_ready=k_ready._replace(x=None) if "k" in gone else k_ready,
        attention=cache.attention._replace(**dict.fromkeys(gone)),
    )


def recall(cache: AttendCache) -> AttendCache:
    """The cache with q, k and v, projected again where they were not kept."""
    kept, q_ready, k_ready = cache.attention, cache.q_ready, cache.k_ready
    if kept.q is None:
        q, q_ready = _ready_again(_projected(cache.q), q_ready)
        kept = kept._replace(q=heads_first(q))
    if kept.k is None:
        k, k_ready = _ready_again(_projected(cache.k), k_ready)
        kept = kept._replace(k=heads_first(k))
    if kept.v is None:
        kept = kept._replace(v=heads_first(_projected(cache.v)))
    return cache._replace(q_ready=q_ready, k_ready=k_ready, attention=kept)


def _ready_again(x: Array, cache: ReadyCache) -> tuple[Array, ReadyCache]:
    rotary = None if cache.rotary is None else cache.rotary.rotary
    return ready(x, cache.w, norm=cache.norm, rotary=rotary)


def forgettable(T: int, S: int, width: int) -> int:
    """How many projections can be done again in a seventh of the time that all takes, forward and back.

    For a row of a head, in units of D: to project once is 2 C, all projections and their vjp are 24 C, and to attend
    with and back is 14 min(T, S), or half of that if causal.
    """
    return min((24 * width + 14 * min(T, S)) // max(14 * width, 1), 3)


def cheap(T: int, S: int, width: int) -> bool:
    """Whether all three take a twentieth or so: then forward too a few heads go at a time, never all."""
    return min(T, S) >= 16 * width
