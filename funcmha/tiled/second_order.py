"""Second order in tiles: `funcmha.second.attention_vjp_jvp` in linear memory.

Forward mode first, for ȯ and l̇se of each row; with them δ = Σ do o and δ̇ = Σ ḋo o + do ȯ, and then every tile once
more, in the order of the backward. In a tile, with r = dlse − δ,

    dz = p (dp + r)     ḋz = dz (ż − l̇se) + p (ḋp + ṙ)     ṗ = p (ż − l̇se)

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
tile; `...` is batch.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._bias import Bias, on_bias
from funcmha._doors import blank_queries
from funcmha._tangents import Cotangents, check_cotangents, check_tangents
from funcmha._xp import Array, narrow
from funcmha.biases import RelativeBias

from . import threads
from .attention import AttentionCache, _total_sink, _Views, _with_head
from .forward_mode import attention_jvp, tangent_views
from .schedule import BiasGradient, RelativeGradient, steps
from .tiles import Head, Tile, of_sink


def attention_vjp_jvp(
    cache: AttentionCache,
    do: Array,
    do_dot: Array = None,
    q_dot: Array = None,
    k_dot: Array = None,
    v_dot: Array = None,
    bias_dot: Bias = None,
    sink_dot: Array = None,
    /,
    *,
    dlse: Array = None,
    dlse_dot: Array = None,
) -> tuple[Any, ...]:
    """ḋq, ḋk, ḋv, ḋbias, ḋsink: every tile twice more        as `funcmha.second.attention_vjp_jvp`"""
    y = check_cotangents(cache, do, do_dot, dlse, dlse_dot, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    if cache.mask is not None:
        seeing = cache.mask.attending_queries(cache.q.shape[-2], cache.k.shape[-2])
        y = y._replace(do=blank_queries(y.do, seeing), do_dot=blank_queries(y.do_dot, seeing))
    dot = check_tangents(cache, q_dot, k_dot, v_dot, bias_dot, sink_dot)
    x, bias = _Views.again(cache), cache.bias
    cache = cache._replace(total=x.total.reshape(cache.total.shape))
    dq_dot, dk_dot, dv_dot = (np.zeros_like(a) for a in cache[:3])
    of_bias = RelativeGradient if isinstance(bias, RelativeBias) else BiasGradient
    dbias = None if bias is None else of_bias(bias, (*cache.q.shape[:-1], cache.k.shape[-2]))
    rows = _Rows.of(cache, y, *attention_jvp(cache, *dot))
    views = tangent_views(cache, dot)
    work = _Second(x, views, rows, _with_head(dq_dot), _with_head(dk_dot), _with_head(dv_dot), dbias)
    with threads.single_threaded_blas():
        _run(work)
    dsink = None if cache.sink is None else narrow(_total_sink(_of_sink(work), cache.sink), do.dtype)
    total = None if dbias is None else on_bias(lambda g: narrow(g, do.dtype), dbias.total())
    dq_dot, dk_dot, dv_dot = (narrow(g, do.dtype) for g in (dq_dot, dk_dot, dv_dot))
    return dq_dot, dk_dot, dv_dot, total, dsink


class _Rows(NamedTuple):
    """What is known of each row before its tiles."""

    do: Array  # (..., H, T, E)
    do_dot: Array  # (..., H, T, E)
    inverse: Array  # (..., H, T), of the totals, 0 where no key is seen
    lse_dot: Array  # (..., H, T)
    r: Array  # (..., H, T), dlse − δ
    r_dot: Array  # (..., H, T)

    @staticmethod
    def of(cache: AttentionCache, y: Cotangents, o_dot: Array, lse_dot: Array) -> "_Rows":
        """δ = Σ do o     δ̇ = Σ ḋo o + do ȯ"""
        some = cache.total != 0
        inverse = np.where(some, 1 / np.where(some, cache.total, 1.0), 0.0)
        do_dot = np.zeros_like(y.do) if y.do_dot is None else y.do_dot
        r = -np.einsum("...e,...e->...", y.do, cache.o)
        r_dot = -np.einsum("...e,...e->...", do_dot, cache.o) - np.einsum("...e,...e->...", y.do, o_dot)
        r = r if y.dlse is None else r + np.where(some, y.dlse, 0.0)
        r_dot = r_dot if y.dlse_dot is None else r_dot + np.where(some, y.dlse_dot, 0.0)
        per_row = (_with_head(a, 1) for a in (inverse, lse_dot, r, r_dot))
        return _Rows(_with_head(y.do), _with_head(do_dot), *per_row)

    def at(self, at: tuple[Any, ...]) -> "_Rows":
        """Those of one tile, with an axis of keys."""
        return _Rows(self.do[at], self.do_dot[at], *(a[at][:, None] for a in self[2:]))


class _Second(NamedTuple):
    x: _Views
    x_dot: _Views
    of_rows: _Rows
    dq: Array  # (..., H, T, D)
    dk: Array  # (..., K, S, D)
    dv: Array  # (..., K, S, E)
    dbias: BiasGradient | RelativeGradient | None

    def tile(self, b: Any, h: int, tile: Tile) -> None:
        """Add the share of one tile."""
        head, head_dot, i, j = self.x.head(b, h), self.x_dot.head(b, h), slice(*tile.rows), slice(*tile.cols)
        at, of_key = (*b, h, i), (*b, h // (self.dq.shape[-3] // self.dk.shape[-3]), j)
        rows = self.of_rows.at(at)
        q, k, v = head.q[i], head.k[j], head.v[j]
        q_dot, k_dot, v_dot = head_dot.q[i], head_dot.k[j], head_dot.v[j]
        e = head.exponentials(head.unit * q, tile, None if self.x.shift is None else self.x.shift[at])
        p, u_dot = e * rows.inverse, head.scale * (q_dot @ k.T + q @ k_dot.T)
        slope, bend = _soft_cap(head, q, k, u_dot)
        change = _change(head_dot, tile, u_dot, slope) - rows.lse_dot
        dp, dp_dot = (rows.do @ v.T, rows.do_dot @ v.T + rows.do @ v_dot.T)
        a, a_dot, dp, dp_dot = _dropped(head, tile, p, p * change, dp, dp_dot)
        self.dv[of_key] += a_dot.T @ rows.do + a.T @ rows.do_dot
        dz = p * (dp + rows.r)
        dz_dot = dz * change + p * (dp_dot + rows.r_dot)
        if self.dbias is not None:
            self.dbias.add((*b, h), tile, dz_dot)
        du, du_dot = dz * slope, dz_dot * slope + dz * bend
        self.dq[at] += head.scale * (du_dot @ k + du @ k_dot)
        self.dk[of_key] += head.scale * (du_dot.T @ q + du.T @ q_dot)


def _soft_cap(head: Head, q: Array, k: Array, u_dot: Array) -> tuple[Any, Any]:
    """slope = 1 − tanh(u / softcap)²     slope˙ = −2 tanh(u / softcap) slope u̇ / softcap"""
    if head.softcap is None:
        return 1.0, 0.0
    t = np.tanh((head.unit * q) @ k.T)
    slope = 1 - t * t
    return slope, -2 * t * slope * (u_dot / head.softcap)


def _change(head_dot: Head, tile: Tile, u_dot: Array, slope: Any) -> Array:
    """ż = slope · u̇ + ḃias (R, N), 0 where not mask"""
    z_dot: Array = u_dot * slope
    if head_dot.bias is not None:
        z_dot = z_dot + head_dot.bias_of(tile)
    if tile.mixed:
        head_dot.hide(z_dot, tile, 0.0)
    return z_dot


def _dropped(head: Head, tile: Tile, *arrays: Array) -> Any:
    """Each after dropout, by booleans that are drawn once."""
    return arrays if head.keep is None else head.drop(np.stack(arrays), tile)


def _of_sink(y: _Second) -> Array:
    """ḋsink (..., H) = Σ p_sink ((dlse − δ) (ṡink − l̇se) + ṙ)"""
    x, rows = y.x, y.of_rows
    out = np.zeros(x.q.shape[:-2], x.q.dtype)
    for *b, h in np.ndindex(*out.shape):
        at, head, sink_dot = (*b, h), x.head(tuple(b), h), y.x_dot.head(tuple(b), h).sink
        p_sink = of_sink(head, None if x.shift is None else x.shift[at]) * rows.inverse[at]
        out[at] = np.sum(p_sink * (rows.r[at] * ((sink_dot or 0.0) - rows.lse_dot[at]) + rows.r_dot[at]))
    return out


def _run(y: _Second) -> None:
    """Every tile, on all threads, in the order of `steps`: no two at a time share rows or columns."""
    *batch, H, T, D = y.dq.shape
    S, E = y.dv.shape[-2:]
    samples = list(np.ndindex(*batch))
    together = [[b] for b in samples] if y.dbias is not None and y.dbias.sums_samples else [samples]
    schedule = [step for group in together for step in steps(y.x.head, group, T, S)]
    flops = 2.0 * prod(batch) * T * S * (7 * D + 5 * E)
    for h in range(H):
        for step in schedule:
            threads.run(partial(_add, y, h), step, flops / len(schedule))
            if y.dbias is not None:
                y.dbias.settle()


def _add(y: _Second, h: int, task: tuple[Any, list[Tile]]) -> None:
    """Add the share of a block of tiles, which may share rows and columns."""
    b, block = task
    for tile in block:
        y.tile(b, h, tile)
