"""Second order in tiles: `funcmha.derivatives.attention_vjp_jvp` in linear memory.

Forward mode first, for ȯ and l̇se of each row; with them δ = Σ do o and δ̇ = Σ ḋo o + do ȯ, and then every tile once
more, in the order of the backward. In a tile, with r = dlse − δ,

    dz = p (dp + r)     ḋz = dz (ż − l̇se) + p (ḋp + ṙ)     ṗ = p (ż − l̇se)

A row of each sums to something known. At a key with more than half of its weight all three are left out, and set to
what the others leave of that at the end.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; G heads, R rows and N
columns of a tile; `...` is batch.
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
from .tiles import Heads, Tile, add_heads, inverse_of, of_sink


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
        inverse = inverse_of(row_sum)
        do_dot = np.zeros_like(y.do) if y.do_dot is None else y.do_dot
        dlse, dlse_dot = (inverse.dtype.type(0) if d is None else d for d in (y.dlse, y.dlse_dot))
        dlse, dlse_dot = np.where(some, dlse, 0.0), np.where(some, dlse_dot, 0.0)
        r = -np.einsum("...e,...e->...", y.do, o)
        r_dot = -np.einsum("...e,...e->...", do_dot, o) - np.einsum("...e,...e->...", y.do, o_dot)
        per_row = (with_head_axis(a, 1) for a in (inverse, lse_dot, dlse, dlse_dot, r + dlse, r_dot + dlse_dot))
        return _Rows(with_head_axis(y.do), with_head_axis(do_dot), *per_row)

    def at(self, at: tuple[Any, ...]) -> "_Rows":
        """Those of one tile, with an axis of keys."""
        return _Rows(self.do[at], self.do_dot[at], *(a[at][..., None] for a in self[2:]))


class _Second(NamedTuple):
    x: Views
    x_dot: Views
    of_rows: _Rows
    dq: Array  # (..., H, T, D)
    dk: Array  # (..., K, S, D)
    dv: Array  # (..., K, S, E)
    dbias: BiasGradient | RelativeBiasGradient | None

    def tile(self, b: Any, h: slice, tile: Tile, dominant: Dominant | None) -> None:
        """Add the share of one tile."""
        heads, heads_dot, i, j = self.x.heads(b, h), self.x_dot.heads(b, h), slice(*tile.rows), slice(*tile.cols)
        at, of_keys, scale = (*b, h, i), (*self.x.key_heads(b, h), j), heads.rounded(heads.scale)
        rows = self.of_rows.at(at)
        q, k, v = heads.q[:, i], heads.k[:, j], heads.v[:, j]
        q_dot, k_dot, v_dot = heads_dot.q[:, i], heads_dot.k[:, j], heads_dot.v[:, j]
        e = heads.exponentials(heads.score_scale * q, tile, None if self.x.row_max is None else self.x.row_max[at])
        p, u_dot = e * rows.inverse, scale * (q_dot @ _t(k) + q @ _t(k_dot))
        slope, bend = _soft_cap(heads, q, k, u_dot)
        change = _change(heads_dot, tile, u_dot, slope) - rows.lse_dot
        dp, dp_dot = rows.do @ _t(v), rows.do_dot @ _t(v) + rows.do @ _t(v_dot)
        p_dot = p * change
        a, a_dot, dp, dp_dot = _dropped(heads, tile, p, p_dot, dp, dp_dot)
        dz = p * (dp + rows.r)
        dz_dot = dz * change + p * (dp_dot + rows.r_dot)
        if dominant is not None:
            dominant.leave_out(tile.rows, tile.cols, (dz, dz_dot, p_dot, a_dot), (slope, bend, p, a))
        add_heads(self.dv[of_keys], _t(a_dot) @ rows.do + _t(a) @ rows.do_dot)
        if self.dbias is not None:
            self.dbias.add(b, h, tile, dz_dot)
        du, du_dot = dz * slope, dz_dot * slope + dz * bend
        self.dq[at] += scale * (du_dot @ k + du @ k_dot)
        add_heads(self.dk[of_keys], scale * (_t(du_dot) @ q + _t(du) @ q_dot))

    def dominant_keys(self, b: Any, h: slice, dominant: Dominant | None) -> None:
        """Add what was left out: each is the sum of its row less that of the other keys"""
        if dominant is None:
            return
        (g, i), heads, heads_dot = dominant.found(), self.x.heads(b, h), self.x_dot.heads(b, h)
        j, at, of_keys = dominant.key[g, i], (*b, h), self.x.key_heads(b, h)
        slope, bend, p, a = (x[g, i] for x in dominant.others)
        totals = self.of_rows.dlse[at], self.of_rows.dlse_dot[at], np.zeros_like(dominant.rest[0])
        parts = zip(totals, self.of_sink(b, h), dominant.rest[:3], strict=True)
        dz, dz_dot, p_dot = ((total - of_sink - rest)[g, i] for total, of_sink, rest in parts)
        scale = heads.rounded(heads.scale[g, 0, 0])
        du, du_dot = ((scale * x)[:, None] for x in (dz * slope, dz_dot * slope + dz * bend))
        self.dq[at][g, i] += du_dot * heads.k[g, j] + du * heads_dot.k[g, j]
        add_to_keys(self.dk[of_keys], (g,), j, du_dot * heads.q[g, i] + du * heads_dot.q[g, i])
        add_to_keys(self.dv[of_keys], (g,), j, (p_dot * (a / p))[:, None] * self.of_rows.do[at][g, i])
        if self.dbias is not None:
            self.dbias.add_at(b, h, (g, i, j), dz_dot)

    def of_sink(self, b: Any, h: slice) -> tuple[Array, Array, Array]:
        """dz, ḋz and ṗ of the sink (G, T)
        p_sink (dlse − δ), p_sink ((dlse − δ) (ṡink − l̇se) + ṙ), p_sink (ṡink − l̇se)
        """
        at, heads, sink_dot = (*b, h), self.x.heads(b, h), self.x_dot.heads(b, h).sink
        r, r_dot = self.of_rows.r[at], self.of_rows.r_dot[at]
        change = (0.0 if sink_dot is None else heads.rounded(sink_dot)) - self.of_rows.lse_dot[at]
        if heads.sink is None:
            return np.zeros_like(r), np.zeros_like(r), np.zeros_like(r)
        p_sink = of_sink(heads, None if self.x.row_max is None else self.x.row_max[at]) * self.of_rows.inverse[at]
        return p_sink * r, p_sink * (r * change + r_dot), p_sink * change


def _t(x: Array) -> Array:
    """xᵀ of each head"""
    return x.swapaxes(1, 2)


def _soft_cap(heads: Heads, q: Array, k: Array, u_dot: Array) -> tuple[Any, Any]:
    """slope = 1 − tanh(u / softcap)²     slope˙ = −2 tanh(u / softcap) slope u̇ / softcap"""
    if heads.softcap is None:
        return 1.0, 0.0
    t = np.tanh((heads.score_scale * q) @ _t(k))
    slope = 1 - t * t
    return slope, -2 * t * slope * (u_dot / heads.rounded(heads.softcap))


def _change(heads_dot: Heads, tile: Tile, u_dot: Array, slope: Any) -> Array:
    """ż = slope · u̇ + ḃias (G, R, N), 0 where not mask"""
    z_dot: Array = u_dot * slope
    if heads_dot.bias is not None:
        z_dot = z_dot + heads_dot.bias_of(tile)
    if tile.mixed:
        heads_dot.forbid(z_dot, tile, 0.0)
    return z_dot


def _dropped(heads: Heads, tile: Tile, *arrays: Array) -> Any:
    """Each after dropout, by booleans that are drawn once."""
    return arrays if heads.keep is None else heads.drop(np.stack(arrays), tile)


def _of_sink(y: _Second) -> Array:
    """ḋsink (..., H)"""
    out = np.zeros(y.x.q.shape[:-2], y.x.q.dtype)
    for b, h in y.x.stacks_of_samples():
        _, dz_dot, _ = y.of_sink(b, h)
        out[(*b, h)] = np.sum(dz_dot, axis=-1)
    return out


def _run(y: _Second) -> None:
    """Every tile, on all threads, in the order of `wavefronts`: no two at a time share rows or columns."""
    *batch, H, T, D = y.dq.shape
    S, E = y.dv.shape[-2:]
    samples = list(np.ndindex(*batch))
    together = [[b] for b in samples] if y.dbias is not None and y.dbias.sums_samples else [samples]
    schedule = [step for group in together for step in wavefronts(y.x.heads, group, T, S)] if H else []
    flops = 2.0 * prod(batch) * T * S * (7 * D + 5 * E)  # of a head
    for h in (h for some in y.x.stacks_of_keys() for h in some):
        dominant = {b: Dominant.of(y.x.dominant[(*b, h)], y.x.q.dtype, 4, 4) for b in samples}
        for step in schedule:
            of_step = flops * (h.stop - h.start) / len(schedule)
            threads.run(partial(_add, y, h, dominant), step, of_step, plan=y.x.plan)
            if y.dbias is not None:
                y.dbias.flush()
        for b in samples:
            y.dominant_keys(b, h, dominant[b])


def _add(y: _Second, h: slice, dominant: dict[Any, Dominant | None], task: tuple[Any, list[Tile]]) -> None:
    """Add the share of a block of tiles, which may share rows and columns."""
    b, block = task
    for tile in block:
        y.tile(b, h, tile, dominant[b])
