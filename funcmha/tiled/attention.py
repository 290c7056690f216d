"""Attention in tiles: `funcmha.ops.attention` and its vjp in linear memory (Dao et al. 2022).

The heads come one after another; the work of a head is cut into tiles, and these are shared out among the threads. The
result does not depend on how many there are: what is added up is added in the order of the tiles.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Sequence
from math import frexp, inf, prod
from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._bias import bias_of_heads, bias_of_sample, on_bias
from funcmha._doors import blank_keys, blank_queries, check_attention
from funcmha._xp import Array, narrow, of_heads, of_sample, widen
from funcmha.biases import RelativeBias
from funcmha.dropout import Masked, Seeded
from funcmha.masks import Mask, Range
from funcmha.ops import attention_weights, cut_heads, cut_sample, log_sum_exp

from . import few, threads, tiles
from .schedule import BiasGradient, RelativeGradient, steps
from .tiles import LN2, Head, Rows, Tile, backward, blocks, forward, mean_cotangent, of_sink, sums


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at the queries that may see no key
    k: Array  # (..., K, S, D), 0 at the keys that nobody may see
    v: Array  # (..., K, S, E), 0 at the keys that nobody may see
    bias: Array | RelativeBias  # broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    o: Array  # (..., H, T, E)
    total: Array  # (..., H, T), Σ 2^(s − c) and the sink's share, 0 where no key is seen and there is no sink
    shift: Array  # (..., H, T), c, or None where nothing was shifted
    keep: Array | Seeded  # broadcasts to (..., H, T, S), or None
    mask: Mask | None
    scale: Array | float  # of every head, or (H,)
    softcap: Array | float | None  # of every head, or (H,)
    rate: float


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | RelativeBias = None,
    sink: Array = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
    dropout: Masked | Seeded | None = None,
) -> tuple[Array, AttentionCache]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     as `funcmha.ops.attention`

    Real NumPy arrays only, else TypeError. Memory O(H (T + S)) beside the inputs. o lies in memory as q does.
    """
    mask, scale, softcap = check_attention(q, k, v, bias, sink, mask, scale, softcap, dropout)
    if not isinstance(q, np.ndarray) or q.dtype.kind == "c":
        raise TypeError(f"q must be a real NumPy array for the tiled engine, got {type(q).__name__} of {q.dtype}")

    dtype = q.dtype
    q, k, v, bias, sink = widen(q), widen(k), widen(v), on_bias(_in_range, on_bias(widen, bias)), widen(sink)
    q, k, v = blanked(q, k, v, mask)
    k = _in_rows(k)
    keep, rate = (dropout.keep if isinstance(dropout, Masked) else dropout), 0.0 if dropout is None else dropout.rate
    o = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    total, shift = np.empty(q.shape[:-1], q.dtype), np.zeros(q.shape[:-1], q.dtype)
    cache = AttentionCache(q, k, v, bias, sink, o, total, shift, keep, mask, scale, softcap, rate)
    with threads.single_threaded_blas():
        shifted = _forward(_Views.of(cache))
    return narrow(o, dtype), cache if shifted else cache._replace(shift=None)


def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, ...]:
    """dq, dk, dv, dbias, dsink: every tile once more, five products each
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    q, k, v, *_ = cache
    _check.cotangent("do", do, (*q.shape[:-1], v.shape[-1]), q, "... H T E")
    _check.cotangent("dweights", dweights, (*q.shape[:-1], k.shape[-2]), q, "... H T S", optional=True)
    _check.cotangent("dlse", dlse, q.shape[:-1], q, "... H T", optional=True)
    unit = _unit(do, dweights, dlse)
    given = (None if a is None else widen(a) if unit == 1 else unit * widen(a) for a in (do, dweights, dlse))

    def rounded(dx: Array) -> Array:
        return narrow(dx if unit == 1 else dx / unit, do.dtype)

    return tuple(None if dx is None else on_bias(rounded, dx) for dx in _gradients(cache, *given))


def _unit(*cotangents: Array) -> float:
    """A power of two that brings the largest of them near 1, if it is far from that: all is linear in them, and a tiny
    one would vanish, divided by a sum of exponentials, which may be 2⁸⁰
    """
    given = [a for a in cotangents if a is not None]
    if any(2.0**-20 <= float(a.max(initial=0.0)) <= 2.0**20 for a in given):
        return 1.0
    largest = max(max(float(a.max(initial=0.0)), -float(a.min(initial=0.0))) for a in given)
    return 2.0 ** -max(min(frexp(largest)[1], 100), -100) if 0 < largest < inf else 1.0


def _gradients(cache: AttentionCache, do: Array, dweights: Array, dlse: Array) -> tuple[Array, ...]:
    """`attention_vjp` in the dtype to compute in"""
    q, k, v, bias, sink, *_ = cache
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias, x = None, _Views.again(cache)
    if bias is not None:
        of_bias = RelativeGradient if isinstance(bias, RelativeBias) else BiasGradient
        dbias = of_bias(bias, (*q.shape[:-1], k.shape[-2]))
    dsink = np.zeros(x.q.shape[:-2], q.dtype)
    inverse = np.where(x.total == 0, 0.0, 1 / np.where(x.total == 0, 1.0, x.total))[..., None]
    seeing = None if cache.mask is None else cache.mask.attending_queries(q.shape[-2], k.shape[-2])
    given = (_with_head(blank_queries(do, seeing)), _with_head(dweights), _with_head(dlse, 1))
    with threads.single_threaded_blas():
        _backward(_Backward(x, inverse, *given, _with_head(dq), _with_head(dk), _with_head(dv), dbias, dsink))
    return dq, dk, dv, None if dbias is None else dbias.total(), None if sink is None else _total_sink(dsink, sink)


def _in_range(bias: Array) -> Array:
    """The bias, where a finite number stays finite times log₂e: the least of its dtype, which many write for −∞"""
    least = 0.69 * np.finfo(bias.dtype).min
    if bias.min(initial=0.0) >= least:
        return bias
    return np.where((bias < least) & (bias != -np.inf), bias.dtype.type(least), bias)


def blanked(q: Array, k: Array, v: Array, mask: Mask | None) -> tuple[Array, Array, Array]:
    """q with 0 at the queries that may see no key, k and v at the keys that nobody may see"""
    if mask is None:
        return q, k, v
    T, S = q.shape[-2], k.shape[-2]
    seen = mask.attended_keys(T, S)
    return blank_queries(q, mask.attending_queries(T, S)), blank_keys(k, seen), blank_keys(v, seen)


def _in_rows(k: Array) -> Array:
    """The keys, where BLAS can take their rows as they lie; NumPy adds up others in an order that is no copy's, and the
    gradient, which takes a copy, must have the very scores of the forward
    """
    *_, row, number = k.strides
    return k if number == k.itemsize and row >= k.shape[-1] * number else np.ascontiguousarray(k)


def _total_sink(dsink: Array, sink: Array) -> Array:
    """dsink (..., H)   →   as sink"""
    return dsink.reshape(prod(dsink.shape[:-1]), dsink.shape[-1]).sum(axis=0).reshape(sink.shape)


@cut_heads.register
def _(cache: AttentionCache, h: slice, kv: slice, /) -> AttentionCache:
    return cache._replace(
        q=None if cache.q is None else cache.q[..., h, :, :],
        k=None if cache.k is None else cache.k[..., kv, :, :],
        v=None if cache.v is None else cache.v[..., kv, :, :],
        bias=bias_of_heads(cache.bias, h),
        sink=None if cache.sink is None else cache.sink[h],
        o=cache.o[..., h, :, :],
        total=cache.total[..., h, :],
        shift=None if cache.shift is None else cache.shift[..., h, :],
        keep=cache.keep.heads(h) if isinstance(cache.keep, Seeded) else of_heads(cache.keep, h),
        mask=None if cache.mask is None else cache.mask.heads(h.start, h.stop),
        scale=cache.scale[h] if isinstance(cache.scale, np.ndarray) else cache.scale,
        softcap=cache.softcap[h] if isinstance(cache.softcap, np.ndarray) else cache.softcap,
    )


@cut_sample.register
def _(cache: AttentionCache, b: tuple[int, ...], /) -> AttentionCache:
    sample = int(np.ravel_multi_index(b, cache.o.shape[: len(b)])) if b else 0
    return cache._replace(
        q=None if cache.q is None else cache.q[b],
        k=None if cache.k is None else cache.k[b],
        v=None if cache.v is None else cache.v[b],
        bias=bias_of_sample(cache.bias, b),
        o=cache.o[b],
        total=cache.total[b],
        shift=None if cache.shift is None else cache.shift[b],
        keep=cache.keep.sample(sample) if isinstance(cache.keep, Seeded) else of_sample(cache.keep, b),
        mask=None if cache.mask is None else cache.mask.at(b),
    )


class _Views(NamedTuple):
    """The arrays of a cache with a head axis and with the broadcast axes spelt out, by strides of 0."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Array  # (..., H, T, S), or (..., H, T + S − 1) of a `RelativeBias`, or None
    sink: Array  # (H,) or None
    o: Array  # (..., H, T, E)
    total: Array  # (..., H, T)
    shift: Array  # (..., H, T) or None
    keep: Array | Seeded  # (..., H, T, S) or None
    mask: Mask | None
    scale: Array  # (H,)
    softcap: Array  # (H,) or None
    rate: float

    @staticmethod
    def again(cache: AttentionCache) -> "_Views":
        """With the sums of the exponentials that tiles give: those of `few` are others, by rounding."""
        x = _Views.of(cache)
        if not _is_few(x):
            return x
        x, total = x._replace(k=np.ascontiguousarray(x.k)), np.empty_like(x.total)
        with threads.single_threaded_blas():  # whose threads would cut a product otherwise, with other bits
            for *b, h in np.ndindex(*total.shape[:-1]):
                at = (*b, h)
                total[at] = sums(x.head(tuple(b), h), None if x.shift is None else x.shift[at])
        return x._replace(total=total)

    @staticmethod
    def of(cache: AttentionCache) -> "_Views":
        q, k, v, o = (_with_head(a) for a in (cache.q, cache.k, cache.v, cache.o))
        scores, (*batch, H, _, _) = (*q.shape[:-1], k.shape[-2]), q.shape
        bias = cache.bias
        if isinstance(bias, RelativeBias):
            bias = np.broadcast_to(bias.values, (*batch, H, bias.values.shape[-1]))
        elif bias is not None:
            bias = np.broadcast_to(bias, scores)
        keep = (
            cache.keep if cache.keep is None or isinstance(cache.keep, Seeded) else np.broadcast_to(cache.keep, scores)
        )
        sink, scale, softcap = (
            None if a is None else np.broadcast_to(a, H) for a in (cache.sink, cache.scale, cache.softcap)
        )
        total, shift = _with_head(cache.total, 1), _with_head(cache.shift, 1)
        return _Views(q, k, v, bias, sink, o, total, shift, keep, cache.mask, scale, softcap, cache.rate)

    def head(self, b: tuple[int, ...], h: int) -> Head:
        """Head h of sample b."""
        kv, keep = h // (self.q.shape[-3] // self.k.shape[-3]), self.keep
        sink, softcap = (None if a is None else float(a[h]) for a in (self.sink, self.softcap))
        return Head(
            self.q[(*b, h)],
            self.k[(*b, kv)],
            self.v[(*b, kv)],
            None if self.bias is None else self.bias[(*b, h)],
            sink,
            None if self.mask is None else self.mask.at(b),
            int(np.ravel_multi_index(b, self.q.shape[:-3])) if b else 0,
            h,
            keep if keep is None or isinstance(keep, Seeded) else keep[(*b, h)],
            float(self.scale[h]),
            softcap,
            self.rate,
        )


def _with_head(a: Array, rank: int = 2) -> Array:
    """`a` with a head axis before its last `rank` axes, where it has no other."""
    return a if a is None or a.ndim > rank else a[None]


def _is_few(x: _Views) -> bool:
    (H, T, _), K = x.q.shape[-3:], x.k.shape[-3]
    return bool(H // max(K, 1) * T <= few.ROWS)


def _forward(x: _Views) -> bool:
    """Write o, total and shift; return whether anything was shifted, be it by 0."""
    return _few_queries(x) if _is_few(x) else _in_tiles(x)


def _few_queries(x: _Views) -> bool:
    (*batch, H, T, D), (K, S, E) = x.q.shape, x.v.shape[-3:]

    def work(task: tuple[Any, int]) -> None:
        b, kv = task
        h = range(kv * (H // K), (kv + 1) * (H // K))
        at = (*b, slice(h.start, h.stop))
        x.o[at], x.total[at], x.shift[at] = few.forward([x.head(b, i) for i in h])

    tasks = [(b, kv) for b in np.ndindex(*batch) for kv in range(K)]
    threads.run(work, tasks, flops=2.0 * prod(batch) * H * T * S * (D + E))
    return True


def _in_tiles(x: _Views) -> bool:
    (*batch, H, T, D), (K, S, E) = x.q.shape, x.v.shape[-3:]
    samples = list(np.ndindex(*batch))
    longest = np.empty((*batch, K), x.q.dtype)  # max |k|
    shifted: list[Any] = []

    def measure(b: Any) -> None:
        longest[b] = np.sqrt(np.einsum("ksd,ksd->ks", x.k[b], x.k[b]).max(axis=-1, initial=0.0))

    def work(task: tuple[int, Range, Any]) -> None:
        h, rows, b = task
        at = (*b, h, slice(*rows))
        x.o[at], x.total[at], shift = forward(x.head(b, h), rows, longest[(*b, h // (H // K))])
        if shift is not None:
            x.shift[at] = shift
            shifted.append(task)

    threads.run(measure, samples, flops=2 * x.k.size)
    # Head by head; where the mask is causal the last rows of a head take longest, and begin first.
    tasks = [(h, rows, b) for h in range(H) for rows in reversed(blocks(T, tiles.ROWS)) for b in samples]
    threads.run(work, tasks, flops=2.0 * prod(batch) * H * T * S * (D + E))
    return bool(shifted)


class _Prepared(NamedTuple):
    """What all tiles of one head of one sample need."""

    k: Array  # (S, D), row after row
    v1: Array  # (S, E + 1), [v, 1]
    r: Array  # (T), dlse − δ


class _Backward(NamedTuple):
    x: _Views
    inverse: Array  # (..., H, T, 1), of the totals, 0 where no key is seen
    do: Array  # (..., H, T, E)
    dweights: Array  # (..., H, T, S) or None
    dlse: Array  # (..., H, T) or None
    dq: Array  # (..., H, T, D)
    dk: Array  # (..., K, S, D)
    dv: Array  # (..., K, S, E)
    dbias: BiasGradient | RelativeGradient | None
    dsink: Array  # (..., H)

    def rows(self, at: tuple[Any, ...], head: Head, r: Array, rows: Range) -> Rows:
        i, E = slice(*rows), self.do.shape[-1]
        d = np.empty((rows[1] - rows[0], E + 1), self.do.dtype)
        d[:, :E], d[:, E] = self.do[at][i], r[i]
        np.multiply(d, self.inverse[at][i], out=d)
        return Rows(
            head.unit * head.q[i], None if self.x.shift is None else self.x.shift[at][i], self.inverse[at][i], d
        )

    def prepare(self, b: Any, h: int) -> _Prepared:
        """δ = Σ p dp = Σ do o + Σ p dweights"""
        at, head = (*b, h), self.x.head(b, h)
        delta = np.einsum("te,te->t", self.do[at], self.x.o[at])
        for rows in blocks(len(delta), tiles.ROWS) if self.dweights is not None else ():
            for tile in head.all_tiles(rows):
                i, j = slice(*tile.rows), slice(*tile.cols)
                delta[i] += mean_cotangent(head, tile, self.rows(at, head, delta, tile.rows), self.dweights[at][i, j])
        r = -delta if self.dlse is None else np.where(self.x.total[at] == 0, 0.0, self.dlse[at]) - delta
        if head.sink is not None:
            p_sink = of_sink(head, None if self.x.shift is None else self.x.shift[at]) * self.inverse[at][:, 0]
            self.dsink[at] = np.sum(p_sink * r)
        (S, E) = head.v.shape
        v1 = np.ones((S, E + 1), head.v.dtype)
        v1[:, :E] = head.v
        return _Prepared(np.ascontiguousarray(head.k), v1, r)

    def tiles(self, b: Any, h: int, p: _Prepared, block: list[Tile]) -> None:
        """Add the share of a block of tiles to dq, dk, dv and dbias."""
        for tile in block:
            self.tile(b, h, p, tile)

    def tile(self, b: Any, h: int, p: _Prepared, tile: Tile) -> None:
        """Add the share of one tile."""
        at, i, j = (*b, h), slice(*tile.rows), slice(*tile.cols)
        of_key = (*b, h // (self.dq.shape[-3] // self.dk.shape[-3]))
        cotangent = None if self.dweights is None else self.dweights[at][i, j]
        grads = self.dq[at][i], self.dk[of_key][j], self.dv[of_key][j]
        head = self.x.head(b, h)._replace(k=p.k)
        dz = backward(head, tile, self.rows(at, head, p.r, tile.rows), p.v1[j], cotangent, *grads)
        if self.dbias is not None:
            self.dbias.add(at, tile, dz)


def _backward(y: _Backward) -> None:
    """Every tile once. What a row or a column is added up from comes in the order of `steps`, on one thread or many."""
    *batch, H, T, D = y.dq.shape
    K, S, E = y.dv.shape[-3:]
    samples = list(np.ndindex(*batch)) if H else []
    flops = 6.0 * prod(batch) * T * S * (D + E)
    alone = [(kv, b) for kv in range(K) for b in samples]  # these share nothing: each has a thread to itself
    if y.dbias is None and _shared_out(len(alone)):
        threads.run(lambda task: _one_sample(y, *task), alone, flops * H)
        return

    together = [[b] for b in samples] if y.dbias is not None and y.dbias.sums_samples else [samples]
    schedule = [step for group in together for step in steps(y.x.head, group, T, S)]
    for h in range(H):
        _all_samples(y, h, samples, schedule, flops)


def _shared_out(tasks: int) -> bool:
    """Whether so many tasks keep all threads busy to the end, or nearly."""
    return tasks >= 4 * threads.num_threads() or (tasks > 0 and tasks % threads.num_threads() == 0)


def _one_sample(y: _Backward, kv: int, b: Any) -> None:
    """The heads that read key/value head kv of one sample, on this thread."""
    (H, T, _), (K, S, _) = y.dq.shape[-3:], y.dv.shape[-3:]
    schedule = steps(y.x.head, [b], T, S)
    for h in range(kv * H // K, (kv + 1) * H // K):
        p = y.prepare(b, h)
        for step in schedule:
            for _, block in step:
                y.tiles(b, h, p, block)


def _all_samples(y: _Backward, h: int, samples: list[Any], schedule: list[Any], flops: float) -> None:
    """One head of all samples, step after step on all threads."""
    prepared: dict[Any, _Prepared] = {}

    def prepare(b: Any) -> None:
        prepared[b] = y.prepare(b, h)

    threads.run(prepare, samples, flops / max(y.dv.shape[-2], 1))
    for step in schedule:
        threads.run(lambda task: y.tiles(task[0], h, prepared[task[0]], task[1]), step, flops / len(schedule))
        if y.dbias is not None:
            y.dbias.settle()


@log_sum_exp.register
def _(cache: AttentionCache, /) -> Array:
    some = cache.total != 0
    fraction, exponent = np.frexp(np.where(some, cache.total, 1.0))  # a shift is whole, so their sum is exact
    whole = exponent.astype(fraction.dtype) if cache.shift is None else exponent + cache.shift
    # np.log has the same bits wherever in an array a number stands, np.log2 not
    return np.where(some, np.log(fraction) + LN2 * whole, -np.inf).astype(fraction.dtype)


@attention_weights.register
def _(cache: AttentionCache, /) -> Array:
    x = _Views.again(cache)
    p = np.zeros((*x.q.shape[:-1], x.k.shape[-2]), x.q.dtype)
    total = np.where(x.total == 0, 1.0, x.total)[..., None]
    with threads.single_threaded_blas():
        for *b, h in np.ndindex(*p.shape[:-2]):
            head = x.head(tuple(b), h)
            for tile in (tile for rows in blocks(p.shape[-2], tiles.ROWS) for tile in head.all_tiles(rows)):
                at = (*b, h, slice(*tile.rows))
                q, shift = head.unit * head.q[at[-1]], None if x.shift is None else x.shift[at]
                p[(*at, slice(*tile.cols))] = head.exponentials(q, tile, shift) / total[at]
    return p.reshape(*cache.total.shape, p.shape[-1])
