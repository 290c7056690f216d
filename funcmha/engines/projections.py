"""Projections of several heads as one product, accumulated into one array: `linear` with `add_to`.

Axes: T queries, H heads, D width of a head, O output width, C input width; `...` is batch.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np

from funcmha import ops
from funcmha._arrays import Array, full, namespace
from funcmha.ops import LinearCache
from funcmha.params import PROJECTIONS, Params

from . import tiled
from .plan import Plan

# ── linear, of any array library ─────────────────────────────────────────────────────────────────────────────────


def linear(x: Array, w: Array, b: Array = None, /, *, add_to: Array = None, plan: Plan) -> Array:
    """y = add_to + x wᵀ + b     x (..., I)   w (O, I)   b (O,) or None   →   y (..., O), maybe `add_to` itself"""
    if _is_for_threads(x):
        return tiled.linear(x, w, b, add_to=add_to, plan=plan)
    y, _ = ops.linear(x, w, b)
    return y if add_to is None else add_to + y


def linear_vjp(
    cache: LinearCache, dy: Array | tuple[Array, ...], /, *, add_to: Array = None, batch_axes: int = 0, plan: Plan
) -> tuple[Array, Array, Array]:
    """add_to + dx, dw, db     of dy, or of several arrays side by side"""
    if _is_for_threads(cache.x):
        return tiled.linear_vjp(cache, dy, add_to=add_to, batch_axes=batch_axes, plan=plan)
    dy = namespace(dy[0]).concat(dy, axis=-1) if isinstance(dy, tuple) else dy
    dx, dw, db = ops.linear_vjp(cache, dy, batch_axes=batch_axes)
    return dx if add_to is None else add_to + dx, dw, db


def linears(caches: Sequence[LinearCache], /, *, plan: Plan) -> list[Array]:
    """`linear` of each, of NumPy's arrays in one queue"""
    if all(_is_for_threads(cache.x) for cache in caches):
        return tiled.linears(caches, plan=plan)
    return [linear(*cache, plan=plan) for cache in caches]


def linears_vjp(
    caches: Sequence[LinearCache],
    dys: Sequence[Array],
    /,
    *,
    add_to: Sequence[Array],
    batch_axes: int = 0,
    plan: Plan,
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """`linear_vjp` of each: a dx for each of `add_to`, and all (dw, db); where `add_to` is one, they are of one x"""
    if all(_is_for_threads(cache.x) for cache in caches):
        return tiled.linears_vjp(caches, dys, add_to=add_to, batch_axes=batch_axes, plan=plan)
    dxs, dws = list(add_to), list[tuple[Array, Array]]()
    for i, (cache, dy) in enumerate(zip(caches, dys, strict=True)):
        at = i % len(dxs)
        dxs[at], *of_w = linear_vjp(cache, dy, add_to=dxs[at], batch_axes=batch_axes, plan=plan)
        dws.append(tuple(of_w))
    return dxs, dws


def _is_for_threads(x: Array) -> bool:
    """Whether it is a real NumPy array"""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# ── project: the heads as rows of one matrix ─────────────────────────────────────────────────────────────────────


class ProjectCache(NamedTuple):
    x: Array  # (..., T, C)
    w: Array  # (H, D, C)
    b: Array  # (H, D) or None

    @property
    def columns(self) -> int:
        """H · D"""
        return int(self.w.shape[0] * self.w.shape[1])


def project(params: Params, x: Array, /, *, plan: Plan) -> tuple[Array, ProjectCache]:
    """yₕ = x wₕᵀ + bₕ     x (..., T, C)   w (H, D, C)   b (H, D) or absent   →   y (..., T, H, D)"""
    cache = ProjectCache(x, params["w"], params.get("b"))
    return _by_heads(cache, linear(*stacked(cache), plan=plan)), cache


def project_vjp(
    cache: ProjectCache, dy: Array, /, *, add_to: Array = None, batch_axes: int = 0, plan: Plan
) -> tuple[Params, Array]:
    """dparams, add_to + dx"""
    dx, dw, db = linear_vjp(stacked(cache), _side_by_side(dy), add_to=add_to, batch_axes=batch_axes, plan=plan)
    return _params_by_heads(cache, dw, db), dx


def project_qkv(params: Params, inputs: tuple[Array, ...], /, *, plan: Plan) -> tuple[tuple[Array, ProjectCache], ...]:
    """q, k and v (..., T, H, D) of query, key and value: those of one input as one product, where narrow and long"""
    caches = tuple(
        ProjectCache(x, params[n]["w"], params[n].get("b")) for n, x in zip(PROJECTIONS, inputs, strict=True)
    )
    one_input, rows = all(x is inputs[0] for x in inputs), prod(inputs[0].shape[:-1])
    if one_input and max(cache.columns for cache in caches) <= plan.joined and rows >= plan.joined_rows:
        ys = _as_one(caches, plan)
    else:
        ys = linears([stacked(cache) for cache in caches], plan=plan)
    return tuple((_by_heads(cache, y), cache) for cache, y in zip(caches, ys, strict=True))


def project_qkv_vjp(
    caches: tuple[ProjectCache, ...],
    dys: tuple[Array, ...],
    /,
    *,
    add_to: tuple[Array, ...],
    batch_axes: int,
    plan: Plan,
) -> tuple[Params, tuple[Array, ...]]:
    """dparams, add_to + (dquery, dkey, dvalue)

    Where `add_to` is one array, the three are one input, and their gradients are added up: of wide projections in turn,
    of narrow ones as one product.
    """
    flat = tuple(_side_by_side(dy) for dy in dys)
    if len(add_to) == 1 and min(dy.shape[-1] for dy in flat) < plan.wide:
        dparams, dx = _as_one_vjp(caches, flat, add_to=add_to[0], batch_axes=batch_axes, plan=plan)
        return dict(zip(PROJECTIONS, dparams, strict=True)), (dx,)
    of_all = [stacked(cache) for cache in caches]
    dxs, dws = linears_vjp(of_all, flat, add_to=add_to, batch_axes=batch_axes, plan=plan)
    dparams = [_params_by_heads(cache, *of_one) for cache, of_one in zip(caches, dws, strict=True)]
    return dict(zip(PROJECTIONS, dparams, strict=True)), tuple(dxs)


def _as_one(caches: tuple[ProjectCache, ...], plan: Plan) -> list[Array]:
    """y (..., T, H·D) of each: of the projection whose rows are those of all"""
    y = linear(*_of_all(caches), plan=plan)
    stops = accumulate(cache.columns for cache in caches)
    return [y[..., stop - cache.columns : stop] for cache, stop in zip(caches, stops, strict=True)]


def _as_one_vjp(
    caches: tuple[ProjectCache, ...], dys: tuple[Array, ...], /, *, add_to: Array, batch_axes: int, plan: Plan
) -> tuple[list[Params], Array]:
    """dparams of each, add_to + dx: of the projection whose rows are those of all"""
    dx, dw, db = linear_vjp(_of_all(caches), dys, add_to=add_to, batch_axes=batch_axes, plan=plan)
    dparams = []
    for cache, stop in zip(caches, accumulate(cache.columns for cache in caches), strict=True):
        rows = slice(stop - cache.columns, stop)
        dparams.append(_params_by_heads(cache, dw[..., rows, :], None if cache.b is None else db[..., rows]))
    return dparams, dx


def _of_all(caches: tuple[ProjectCache, ...]) -> LinearCache:
    """The projection of one input whose rows are those of all"""
    xp, parts, b = namespace(caches[0].w), [stacked(cache) for cache in caches], None
    if any(part.b is not None for part in parts):
        b = xp.concat([full(part.w.shape[:1], 0.0, part.w) if part.b is None else part.b for part in parts])
    return LinearCache(parts[0].x, xp.concat([part.w for part in parts]), b)


def _by_heads(cache: ProjectCache, y: Array) -> Array:
    """y (..., T, H·D)   →   (..., T, H, D)"""
    return namespace(y).reshape(y, (*y.shape[:-1], *cache.w.shape[:-1]))


def _side_by_side(dy: Array) -> Array:
    """dy (..., T, H, D)   →   (..., T, H·D)"""
    *outer, H, D = dy.shape
    return namespace(dy).reshape(dy, (*outer, H * D))


def _params_by_heads(cache: ProjectCache, dw: Array, db: Array) -> Params:
    """dw (..., H·D, C)   db (..., H·D) or None   →   w (..., H, D, C)   b (..., H, D) or absent"""
    reshape, lead = namespace(dw).reshape, dw.shape[:-2]
    return w_and_b(reshape(dw, (*lead, *cache.w.shape)), None if db is None else reshape(db, (*lead, *cache.b.shape)))


def stacked(cache: ProjectCache) -> LinearCache:
    """The heads as the rows of one matrix (H·D, C)"""
    x, w, b = cache
    H, D, C = w.shape
    reshape = namespace(x).reshape
    return LinearCache(x, reshape(w, (H * D, C)), None if b is None else reshape(b, (H * D,)))


# ── combine: the output projection, the heads side by side ───────────────────────────────────────────────────────


class CombineCache(NamedTuple):
    o: Array  # (..., T, H, E)
    w: Array  # (O, H, E)
    b: Array  # (O,) or None


def combine(params: Params, o: Array, /, *, add_to: Array = None, plan: Plan) -> tuple[Array, CombineCache]:
    """y = add_to + Σₕ oₕ wₕᵀ + b     o (..., T, H, E)   w (O, H, E)   b (O,) or absent   →   y (..., T, O)"""
    cache = CombineCache(o, params["w"], params.get("b"))
    return linear(*concatenated(cache), add_to=add_to, plan=plan), cache


def combine_vjp(cache: CombineCache, dy: Array, /, *, batch_axes: int = 0, plan: Plan) -> tuple[Params, Array]:
    """dparams, do"""
    reshape = namespace(dy).reshape
    do, dw, db = linear_vjp(concatenated(cache), dy, batch_axes=batch_axes, plan=plan)
    return w_and_b(reshape(dw, (*dw.shape[:-2], *cache.w.shape)), db), reshape(do, cache.o.shape)


def concatenated(cache: CombineCache) -> LinearCache:
    """The heads side by side, as the columns of one matrix (O, H·E)"""
    o, w, b = cache
    O, H, E = w.shape
    reshape = namespace(o).reshape
    return LinearCache(reshape(o, (*o.shape[:-2], H * E)), reshape(w, (O, H * E)), b)


def w_and_b(w: Array, b: Array) -> Params:
    """The branch of one projection, without what is None"""
    return {"w": w} if b is None else {"w": w, "b": b}
