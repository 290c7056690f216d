"""Second order in tiles: `funcmha.derivatives.attention_vjp_jvp` in linear memory.

Forward mode first, for ȯ and l̇se of each row; with them δ = Σ do o and δ̇ = Σ ḋo o + do ȯ, and then every tile once
more, in the order of the backward. In a tile, with r = dlse − δ,

    dz = p (dp + r)     ḋz = dz (ż − l̇se) + p (ḋp + ṙ)     ṗ = p (ż − l̇se)

A row of each sums to something known. At a key with more than half of its weight all three are left out, and set to
what the others leave of that at the end.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; R rows and N columns of a
tile; `...` is batch.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Cotangents, check_cotangents, check_tangents
from funcmha._arrays import Array, downcast, quiet_underflow
from funcmha.biases import RelativeBias
from funcmha.masks.zero import zero_masked_queries
from funcmha.ops import round_bias

from . import threads
from .attention import total_of_sink
from .cache import AttentionCache, Views, with_head_axis
from .dominant import Dominant, add_to_keys
from .forward import recomputed
from .forward_mode import attention_jvp, tangent_views
from .schedule import BiasGradient, RelativeBiasGradient, wavefronts
from .tiles import Head, Tile, of_sink


@quiet_underflow
def attention_vjp_jvp(cache: AttentionCache, cotangents: Cotangents, dots: tuple[Any, ...]) -> tuple[Any, ...]:
    """ḋq, ḋk, ḋv, ḋbias, ḋsink: every tile twice more        as `funcmha.derivatives.attention_vjp_jvp`"""
    (q, k, v, rest), dtype = cache, cotangents.do.dtype
    y = check_cotangents(q, v, cotangents, dots)
    if rest.mask is not None:
        attending = rest.mask.attending_queries(q.shape[-2], k.shape[-2])
        y = y._replace(do=zero_masked_queries(y.do, attending), do_dot=zero_masked_queries(y.do_dot, attending))
    dot, _ = check_tangents(q, k, v, rest.bias, rest.sink, dots)
    x, bias = recomputed(Views.of(cache)), rest.bias
    cache = rest._replace(row_sum=x.row_sum.reshape(rest.row_sum.shape)).with_qkv(q, k, v)
    dq_dot, dk_dot, dv_dot = (np.zeros_like(a) for a in (q, k, v))
    of_bias = RelativeBiasGradient if isinstance(bias, RelativeBias) else BiasGradient
    dbias = None if bias is None else of_bias(bias.values, (*q.shape[:-1], k.shape[-2]))
    rows = _Rows.of(cache, y, *attention_jvp(cache, tuple(dot)))
    views = tangent_views(cache, dot)
    work = _Second(x, views, rows, with_head_axis(dq_dot), with_head_axis(dk_dot), with_head_axis(dv_dot), dbias)
    with threads.single_threaded_blas():
        _run(work)
    dsink = None if rest.sink is None else downcast(total_of_sink(_of_sink(work), rest.sink, 0), dtype)
    dbias_dot = None if dbias is None else round_bias(bias._replace(values=dbias.total()), dtype)
    dq_dot, dk_dot, dv_dot = (downcast(g, dtype) for g in (dq_dot, dk_dot, dv_dot))
    return dq_dot, dk_dot, dv_dot, dbias_dot, dsink


class _Rows(NamedTuple):
    """What is known of each row before its tiles."""

    do: Array  # (..., H, T, E)
    do_dot: Array  # (..., H, T, E)
    inverse: Array  # (..., H, T), of the row sums, 0 where no key is attended
    lse_dot: Array  # (..., H, T)
    dlse: Array  # (..., H, T)
    dlse_dot: Array  # (..., H, T)
    r: Array  # (..., H, T), dlse − δ
    r_dot: Array  # (..., H, T)

    @staticmethod
    def of(cache: AttentionCache, y: Cotangents, o_dot: Array, lse_dot: Array) -> "_Rows":
        """δ = Σ do o     δ̇ = Σ ḋo o + do ȯ"""
        row_sum, o = cache.rest.row_sum, cache.rest.o
        some = row_sum != 0
        inverse = np.where(some, 1 / np.where(some, row_sum, 1.0), 0.0)
        do_dot = np.zeros_like(y.do) if y.do_dot is None else y.do_dot
        dlse, dlse_dot = (inverse.dtype.type(0) if d is None else d for d in (y.dlse, y.dlse_dot))
        dlse, dlse_dot = np.where(some, dlse, 0.0), np.where(some, dlse_dot, 0.0)
        r = -np.einsum("...e,...e->...", y.do, o)
        r_dot = -np.einsum("...e,...e->...", do_dot, o) - np.einsum("...e,...e->...", y.do, o_dot)
        per_row = (with_head_axis(a, 1) for a in (inverse, lse_dot, dlse, dlse_dot, r + dlse, r_dot + dlse_dot))
        return _Rows(with_head_axis(y.do), with_head_axis(do_dot), *per_row)

    def at(self, at: tuple[Any, ...]) -> "_Rows":
        """Those of one tile, with an axis of keys."""
        return _Rows(self.do[at], self.do_dot[at], *(a[at][:, None] for a in self[2:]))


class _Second(NamedTuple):
    x: Views
    x_dot: Views
    of_rows: _Rows
    dq: Array  # (..., H, T, D)
    dk: Array  # (..., K, S, D)
    dv: Array  # (..., K, S, E)
    dbias: BiasGradient | RelativeBiasGradient | None

    def tile(self, b: Any, h: int, tile: Tile, dominant: Dominant | None) -> None:
        """Add the share of one tile."""
        head, head_dot, i, j = self.x.head(b, h), self.x_dot.head(b, h), slice(*tile.rows), slice(*tile.cols)
        at, of_key = (*b, h, i), (*self.x.key_head(b, h), j)
        rows = self.of_rows.at(at)
        q, k, v = head.q[i], head.k[j], head.v[j]
        q_dot, k_dot, v_dot = head_dot.q[i], head_dot.k[j], head_dot.v[j]
        e = head.exponentials(head.score_scale * q, tile, None if self.x.row_max is None else self.x.row_max[at])
        p, u_dot = e * rows.inverse, head.scale * (q_dot @ k.T + q @ k_dot.T)
        slope, bend = _soft_cap(head, q, k, u_dot)
        change = _change(head_dot, tile, u_dot, slope) - rows.lse_dot
        dp, dp_dot = (rows.do @ v.T, rows.do_dot @ v.T + rows.do @ v_dot.T)
        p_dot = p * change
        a, a_dot, dp, dp_dot = _dropped(head, tile, p, p_dot, dp, dp_dot)
        dz = p * (dp + rows.r)
        dz_dot = dz * change + p * (dp_dot + rows.r_dot)
        if dominant is not None:
            dominant.leave_out(tile.rows, tile.cols, (dz, dz_dot, p_dot, a_dot), (slope, bend, p, a))
        self.dv[of_key] += a_dot.T @ rows.do + a.T @ rows.do_dot
        if self.dbias is not None:
            self.dbias.add((*b, h), tile, dz_dot)
        du, du_dot = dz * slope, dz_dot * slope + dz * bend
        self.dq[at] += head.scale * (du_dot @ k + du @ k_dot)
        self.dk[of_key] += head.scale * (du_dot.T @ q + du.T @ q_dot)

    def dominant_keys(self, b: Any, h: int, dominant: Dominant | None) -> None:
        """Add what was left out: each is the sum of its row less that of the other keys"""
        if dominant is None:
            return
        i, head, head_dot = dominant.found(), self.x.head(b, h), self.x_dot.head(b, h)
        j, at, of_key = dominant.key[i], (*b, h), self.x.key_head(b, h)
        slope, bend, p, a = (x[i] for x in dominant.others)
        totals = self.of_rows.dlse[at], self.of_rows.dlse_dot[at], np.zeros_like(dominant.rest[0])
        parts = zip(totals, self.of_sink(b, h), dominant.rest[:3], strict=True)
        dz, dz_dot, p_dot = ((total - of_sink - rest)[i] for total, of_sink, rest in parts)
        du, du_dot = (head.scale * x[:, None] for x in (dz * slope, dz_dot * slope + dz * bend))
        self.dq[at][i] += du_dot * head.k[j] + du * head_dot.k[j]
        add_to_keys(self.dk[of_key], j, du_dot * head.q[i] + du * head_dot.q[i])
        add_to_keys(self.dv[of_key], j, (p_dot * (a / p))[:, None] * self.of_rows.do[at][i])
        if self.dbias is not None:
            self.dbias.add_at(at, i, j, dz_dot)

    def of_sink(self, b: Any, h: int) -> tuple[Array, Array, Array]:
        """dz, ḋz and ṗ of the sink (T): p_sink (dlse − δ), p_sink ((dlse − δ) (ṡink − l̇se) + ṙ), p_sink (ṡink − l̇se)"""
        at, head, sink_dot = (*b, h), self.x.head(b, h), self.x_dot.head(b, h).sink
        r, r_dot, change = self.of_rows.r[at], self.of_rows.r_dot[at], (sink_dot or 0.0) - self.of_rows.lse_dot[at]
        if head.sink is None:
            return np.zeros_like(r), np.zeros_like(r), np.zeros_like(r)
        p_sink = of_sink(head, None if self.x.row_max is None else self.x.row_max[at]) * self.of_rows.inverse[at]
        return p_sink * r, p_sink * (r * change + r_dot), p_sink * change


def _soft_cap(head: Head, q: Array, k: Array, u_dot: Array) -> tuple[Any, Any]:
    """slope = 1 − tanh(u / softcap)²     slope˙ = −2 tanh(u / softcap) slope u̇ / softcap"""
    if head.softcap is None:
        return 1.0, 0.0
    t = np.tanh((head.score_scale * q) @ k.T)
    slope = 1 - t * t
    return slope, -2 * t * slope * (u_dot / head.softcap)


def _change(head_dot: Head, tile: Tile, u_dot: Array, slope: Any) -> Array:
    """ż = slope · u̇ + ḃias (R, N), 0 where not mask"""
    z_dot: Array = u_dot * slope
    if head_dot.bias is not None:
        z_dot = z_dot + head_dot.bias_of(tile)
    if tile.mixed:
        head_dot.forbid(z_dot, tile, 0.0)
    return z_dot


def _dropped(head: Head, tile: Tile, *arrays: Array) -> Any:
    """Each after dropout, by booleans that are drawn once."""
    return arrays if head.keep is None else head.drop(np.stack(arrays), tile)


def _of_sink(y: _Second) -> Array:
    """ḋsink (..., H)"""
    out = np.zeros(y.x.q.shape[:-2], y.x.q.dtype)
    for *b, h in np.ndindex(*out.shape):
        _, dz_dot, _ = y.of_sink(tuple(b), h)
        out[(*b, h)] = np.sum(dz_dot)
    return out


def _run(y: _Second) -> None:
    """Every tile, on all threads, in the order of `wavefronts`: no two at a time share rows or columns."""
    *batch, H, T, D = y.dq.shape
    S, E = y.dv.shape[-2:]
    samples = list(np.ndindex(*batch))
    together = [[b] for b in samples] if y.dbias is not None and y.dbias.sums_samples else [samples]
    schedule = [step for group in together for step in wavefronts(y.x.head, group, T, S)]
    flops = 2.0 * prod(batch) * T * S * (7 * D + 5 * E)
    for h in range(H):
        dominant = {b: Dominant.of(y.x.dominant[(*b, h)], y.x.q.dtype, 4, 4) for b in samples}
        for step in schedule:
            threads.run(partial(_add, y, h, dominant), step, flops / len(schedule), plan=y.x.plan)
            if y.dbias is not None:
                y.dbias.flush()
        for b in samples:
            y.dominant_keys(b, h, dominant[b])


def _add(y: _Second, h: int, dominant: dict[Any, Dominant | None], task: tuple[Any, list[Tile]]) -> None:
    """Add the share of a block of tiles, which may share rows and columns."""
    b, block = task
    for tile in block:
        y.tile(b, h, tile, dominant[b])
