"""Heads, one after another: project the inputs, attend head by head, put the heads together; each with its gradient.

`funcmha.mha` composes these. Nothing is checked here: the doors are there.

Axes: T queries, S keys, S' keys with those that `extend` appends, H query heads, K key/value heads, D query/key width,
E value width, O output width, C input width; `...` is batch.
"""

from typing import NamedTuple

from ._xp import Array, full, namespace, unbroadcast
from .ops import AttentionCache, LinearCache, attention, attention_vjp, linear, linear_vjp
from .params import Params

# ── project: one product for all heads ───────────────────────────────────────────────────────────────────────────


class ProjectCache(NamedTuple):
    x: Array  # (..., T, C)
    w: Array  # (H, D, C)
    b: Array  # (H, D) or None


def project(params: Params, x: Array, /) -> tuple[Array, ProjectCache]:
    """yₕ = x wₕᵀ + bₕ     x (..., T, C)   w (H, D, C)   b (H, D) or absent   →   y (..., T, H, D)"""
    cache = ProjectCache(x, params["w"], params.get("b"))
    y, _ = linear(*_stacked(cache))
    return namespace(x).reshape(y, (*x.shape[:-1], *cache.w.shape[:-1])), cache


def project_vjp(cache: ProjectCache, dy: Array, /) -> tuple[Params, Array]:
    """dparams, dx"""
    reshape, (*batch, H, D) = namespace(dy).reshape, dy.shape
    dx, dw, db = linear_vjp(_stacked(cache), reshape(dy, (*batch, H * D)))
    return _group(reshape(dw, cache.w.shape), None if db is None else reshape(db, (H, D))), dx


def _stacked(cache: ProjectCache) -> LinearCache:
    """The heads as the rows of one matrix (H·D, C)."""
    x, w, b = cache
    H, D, C = w.shape
    reshape = namespace(x).reshape
    return LinearCache(x, reshape(w, (H * D, C)), None if b is None else reshape(b, (H * D,)))


def _group(w: Array, b: Array) -> Params:
    return {"w": w} if b is None else {"w": w, "b": b}


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


def extend_scores_vjp(S: int, extra: int, da: Array) -> Array:
    """da of the keys that were there before"""
    return da if da is None or extra == 0 else da[..., :S]


# ── combine: the output projection ───────────────────────────────────────────────────────────────────────────────


class CombineCache(NamedTuple):
    o: Array  # (..., T, H, E)
    w: Array  # (O, H, E)
    b: Array  # (O,) or None


def combine(params: Params, o: Array, /) -> tuple[Array, CombineCache]:
    """y = Σₕ oₕ wₕᵀ + b     o (..., T, H, E)   w (O, H, E)   b (O,) or absent   →   y (..., T, O)"""
    cache = CombineCache(o, params["w"], params.get("b"))
    y, _ = linear(*_concatenated(cache))
    return y, cache


def combine_vjp(cache: CombineCache, dy: Array, /) -> tuple[Params, Array]:
    """dparams, do"""
    reshape = namespace(dy).reshape
    do, dw, db = linear_vjp(_concatenated(cache), dy)
    return _group(reshape(dw, cache.w.shape), db), reshape(do, cache.o.shape)


def _concatenated(cache: CombineCache) -> LinearCache:
    """The heads side by side, as the columns of one matrix (O, H·E)."""
    o, w, b = cache
    O, H, E = w.shape
    reshape = namespace(o).reshape
    return LinearCache(reshape(o, (*o.shape[:-2], H * E)), reshape(w, (O, H * E)), b)


# ── heads: one after another ─────────────────────────────────────────────────────────────────────────────────────


class HeadsCache(NamedTuple):
    q: ProjectCache
    k: ProjectCache
    v: ProjectCache
    bias_kv: Params  # k (K, D) and v (K, E), or both None
    bias: Array  # broadcasts to (..., H, T, S), or None
    heads: tuple[AttentionCache, ...]  # H


def attend(
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    *,
    mask: Array,
    scale: float | None,
    zero_attn: bool,
    keep: Array,
    rate: float,
) -> tuple[Array, HeadsCache]:
    """oₕ = attention(project(query)ₕ, extend(project(key))ₕ, extend(project(value))ₕ)     →   o (..., T, H, E)"""
    q, q_cache = project(params["q_proj"], query)
    k, k_cache = project(params["k_proj"], key)
    v, v_cache = project(params["v_proj"], value)
    bias_kv = params.get("bias_kv", {"k": None, "v": None})
    k, v = extend(k, bias_kv["k"], zero_attn), extend(v, bias_kv["v"], zero_attn)
    S, extra = key.shape[-2], k.shape[-3] - key.shape[-2]
    all_mask, all_bias = extend_scores(mask, S, extra, True), extend_scores(bias, S, extra, 0.0)

    os, caches = [], []
    H, K = q.shape[-2], k.shape[-2]
    for h in range(H):
        kv = h // (H // K)
        o, cache = attention(
            q[..., h, :],
            k[..., kv, :],
            v[..., kv, :],
            head_of(all_bias, h),
            mask=head_of(all_mask, h),
            scale=scale,
            keep=head_of(keep, h),
            rate=rate,
        )
        os.append(o)
        caches.append(cache)
    return namespace(q).stack(os, axis=-2), HeadsCache(q_cache, k_cache, v_cache, bias_kv, bias, tuple(caches))


def attend_vjp(
    cache: HeadsCache, do: Array, /, *, dweights: Array, dlse: Array
) -> tuple[Params, Array, Array, Array, Array]:
    """dparams, dquery, dkey, dvalue, dbias: `attend` from the bottom up"""
    xp, S, K = namespace(do), cache.k.x.shape[-2], cache.k.w.shape[0]
    grads = [
        attention_vjp(
            head,
            do[..., h, :],
            dweights=None if dweights is None else dweights[..., h, :, :],
            dlse=None if dlse is None else dlse[..., h, :],
        )
        for h, head in enumerate(cache.heads)
    ]
    dqs, dks, dvs, dbiases = zip(*grads, strict=True)

    extra = cache.heads[0].p.shape[-1] - S
    dbias = _all_heads([extend_scores_vjp(S, extra, d) for d in dbiases], cache.bias)
    dk, drow_k = extend_vjp(S, cache.bias_kv["k"], _per_key_head(dks, K))
    dv, drow_v = extend_vjp(S, cache.bias_kv["v"], _per_key_head(dvs, K))
    dv_proj, dvalue = project_vjp(cache.v, dv)
    dk_proj, dkey = project_vjp(cache.k, dk)
    dq_proj, dquery = project_vjp(cache.q, xp.stack(dqs, axis=-2))
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj}
    if drow_k is not None:
        dparams["bias_kv"] = {"k": drow_k, "v": drow_v}
    return dparams, dquery, dkey, dvalue, dbias


def head_of(a: Array, h: int) -> Array:
    """a (..., H or 1, T, S) as head h sees it: (..., T, S). An array without head axis serves every head."""
    if a is None or a.ndim < 3:
        return a
    return a[..., h if a.shape[-3] > 1 else 0, :, :]


def _all_heads(das: list[Array], a: Array) -> Array:
    """The gradient of `a` from those of `head_of(a, h)`: stacked where each head had its own, else summed."""
    if a is None:
        return None
    da = namespace(a).stack(das, axis=-3 if a.ndim >= 3 else 0)
    return unbroadcast(da, a.shape)


def _per_key_head(dxs: tuple[Array, ...], K: int) -> Array:
    """H gradients (..., S', D)   →   (..., S', K, D): the heads of a group share keys and values, so theirs add"""
    group = len(dxs) // K
    return namespace(dxs[0]).stack(
        [sum(dxs[g * group + 1 : (g + 1) * group], dxs[g * group]) for g in range(K)], axis=-2
    )
