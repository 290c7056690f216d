"""Ring attention: each rank keeps its queries, and keys and values go round (Liu, Zaharia and Abbeel 2023).

Nothing is kept of a part once it has gone by. The forward joins the sums of its pieces. In the gradient the keys and
values go round once more, p is made again from the sums of all keys, and dk and dv travel along and then home, in the
dtype computed with. Each transfer begins before the computation that hides it.

Where one key has more than half of the weight of a row, keys and values go round before that, as far as such rows
attend them, for the dz of all other keys: the heavy one gets what they leave. So they do for a cotangent of the
weights, whose mean is a part of δ.

Axes: T queries and S keys of all ranks, H query heads, K key/value heads, D query/key width, E value width, A appended
keys; `...` is batch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from funcmha import engines
from funcmha._arguments import Bias, Options
from funcmha._arrays import Array, Sum, full, namespace, own, quiet_underflow, sum_over_batch, to_host, upcast
from funcmha.biases import as_bias, spelt
from funcmha.engines.tiled.threads import with_single_threaded_blas
from funcmha.engines.tiled.tiles import blocks
from funcmha.masks import append_keys

from . import pieces, travel
from .comm import Comm, contiguous
from .line import Layout, placed
from .pieces import Cotangents, Piece, Sums, joined, nothing, of_log, weightless
from .schedule import Pair, Queries, Step, Ways, needed, pairs
from .travel import KV, agreed_ways


class Problem(NamedTuple):
    """What is attended: arrays are of this rank, checked; bias and sink are upcast."""

    q: Array  # (..., H, T of this rank, D), as it came, as are k and v
    k: Array  # (..., K, S of this rank, D)
    v: Array  # (..., K, S of this rank, E)
    bias: Bias  # of all ranks, broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    options: Options  # of all ranks
    T: int  # of all ranks
    S: int
    appended: KV = ()  # (..., K, A, D) and (..., K, A, E), the same on every rank, which every query attends


class RingCache(NamedTuple):
    problem: Problem
    sums: Sums  # of all keys, and the sink
    attending: Array  # booleans (..., H, T of this rank), whether any key is attended, the sink not counted
    ways: Ways
    layout: Layout
    comm: Comm

    @property
    def queries(self) -> Queries:
        """Those of this rank"""
        return placed(self.layout.ring_pieces(self.problem.T, self.comm.rank))

    def travelling(self, ways: Ways) -> Iterator[tuple[Step, KV]]:
        """The keys and values of this rank, and those that come by"""
        return travel.travelling(self.comm, self.layout, self.problem[1:3], self.problem.S, ways)


class OneRankCache(NamedTuple):
    attention: Any  # the engine's cache, of all keys
    bias: Bias  # without appended keys
    S: int  # which come first


@with_single_threaded_blas
@quiet_underflow
def attend(comm: Comm, layout: Layout, problem: Problem) -> tuple[Array, Any]:
    """o (..., H, T of this rank, E) in the dtype computed with"""
    if comm.size == 1:
        return _on_one_rank(problem)
    q, k, v, _, sink, x, T, S, _ = problem
    problem = problem._replace(k=contiguous(k), v=contiguous(v))
    sums, queries = nothing(upcast(q), v.shape[-1]), placed(layout.ring_pieces(T, comm.rank))
    ways = agreed_ways(comm, needed(queries, layout, S, x.mask))
    cache = RingCache(problem, sums, sums.total != 0, ways, layout, comm)

    def add(pair: Pair, piece: Piece) -> None:
        rows = sums.rows(pair.i)
        rows.become(joined(rows, pieces.attend(piece).with_keys(pair.cols)))

    _over_keys(cache, add)
    cache = cache._replace(attending=sums.total != 0)
    if sink is not None:
        total, shift = (namespace(q).broadcast_to(a[..., None], tuple(q.shape[:-1])) for a in of_log(sink))
        sums = joined(sums, weightless(full(tuple(sums.o.shape), 0.0, sums.o), total, shift))
    return own(sums.o, sums.o), cache._replace(sums=sums)


@with_single_threaded_blas
@quiet_underflow
def attend_vjp(
    cache: Any, do: Array, /, *, dweights: Array = None, dlse: Array = None, batch_axes: int = 0
) -> tuple[Any, ...]:
    """dq, dk, dv in the dtype computed with; of this rank's queries alone dbias as a `Bias`, dsink, and those of
    `appended`     from the cotangents of o, of the weights (..., H, T of this rank, S + A), and of lse
    """
    if not isinstance(cache, RingCache):
        return _on_one_rank_vjp(cache, do, dweights=dweights, dlse=dlse, batch_axes=batch_axes)
    (q, k, v, bias, sink, *_), like, xp = cache.problem, cache.sums.o, namespace(cache.problem.q)
    y, p_sink = _cotangents(cache, xp.where(cache.attending[..., None], do, 0.0), dweights, dlse)
    dq, dk, dv = (full(tuple(a.shape), 0.0, like) for a in (q, k, v))
    dappended = tuple(full(tuple(a.shape), 0.0, like) for a in cache.problem.appended)
    dbias = None if bias is None else Sum(tuple(bias.values.shape), like)
    on_their_way = travel.Gradients(cache.comm, cache.layout, (dk, dv), cache.problem.S, cache.ways)
    for step, kv in cache.travelling(cache.ways):
        dkv = on_their_way.of(step)
        if kv and dkv:
            _add_gradients(cache, _pieces(cache, step.source, kv, cache.queries), y, dq, dkv, dbias)
        on_their_way.send(step, dkv)
        del kv, dkv
    on_their_way.end()
    _add_gradients(cache, _appended(cache, cache.queries), y, dq, dappended, None)
    dsink = None if sink is None else sum_over_batch(xp.sum(p_sink * y.r, axis=-1), sink.ndim, batch_axes)
    return dq, dk, dv, None if dbias is None else bias._replace(values=dbias.total()), dsink, dappended


def _add_gradients(
    cache: RingCache, of_part: Iterator[tuple[Pair, Piece]], y: Cotangents, dq: Array, dkv: KV, dbias: Sum | None
) -> None:
    """Add those of the keys of a part."""
    for pair, piece in of_part:
        i, j = pair.i, pair.j
        *grads, dpart = pieces.attend_vjp(piece, _of_pair(y, pair))
        for total, grad in zip((dq[..., i, :], *(a[..., j, :] for a in dkv)), grads, strict=True):  # views
            total += grad
        if dbias is not None:
            dbias.add(cache.problem.bias.place(spelt(pair.rows), spelt(pair.cols), cache.problem.T), dpart.values)


# ── what the gradient needs of all keys ──────────────────────────────────────────────────────────────────────────


def _cotangents(cache: RingCache, do: Array, dweights: Array, dlse: Array) -> tuple[Cotangents, Array]:
    """r = dlse − δ, and dz of the dominant keys, of all queries of this rank; and the share of the sink, or None"""
    sums, sink, xp = cache.sums, cache.problem.sink, namespace(do)
    no = full(tuple(sums.total.shape), 0.0, do)
    y = Cotangents(sums, do, no, dweights)
    delta = xp.sum(do * sums.o, axis=-1) if dweights is None else _sum_dz(cache, y, cache.ways, cache.queries)
    dlse = no if dlse is None else xp.where(sums.total == 0, 0.0, dlse)
    y = y._replace(r=dlse - delta)
    p_sink = None if sink is None else _share_of_sink(sink, sums)
    dominant = sums.dominant
    some = _with_dominant(cache, dominant)
    ways = agreed_ways(cache.comm, needed(some, cache.layout, cache.problem.S, cache.problem.options.mask))
    if not some and not ways.last.any():
        return y, p_sink
    of_keys = y._replace(dominant=dominant)
    left = dlse if p_sink is None else dlse - p_sink * y.r
    dz = left - _sum_dz(cache, of_keys, ways, some)
    return of_keys._replace(dz=dz) if some else y, p_sink


def _with_dominant(cache: RingCache, dominant: Array) -> Queries:
    """The queries of this rank that have a dominant key in any head: of each block from the first to the last"""
    in_any_head, found = np.any(to_host(dominant >= 0), axis=tuple(range(dominant.ndim - 1))), []
    for tokens, i in cache.queries:
        for first, last in blocks(len(tokens), pieces.PLAN.tile_rows):
            some = first + np.flatnonzero(in_any_head[i][first:last])
            if some.size:
                start, stop = int(some[0]), int(some[-1]) + 1
                found.append((tokens[start:stop], slice(i.start + start, i.start + stop)))
    return found


def _sum_dz(cache: RingCache, y: Cotangents, ways: Ways, queries: Queries) -> Array:
    """Σ dz of these queries over all keys but the dominant ones, 0 of others (..., H, T of this rank)"""
    total = full(tuple(y.r.shape), 0.0, y.r)

    def add(pair: Pair, piece: Piece) -> None:
        rows = total[..., pair.i]  # a view
        rows += pieces.sum_dz(piece, _of_pair(y, pair))

    _over_keys(cache, add, ways, queries)
    return total


def _share_of_sink(sink: Array, sums: Sums) -> Array:
    """exp(sink − lse) (..., H, T)"""
    xp, (total, shift) = namespace(sums.o), of_log(sink)
    share = total[..., None] * 2.0 ** (shift[..., None] - sums.shift) / xp.where(sums.total == 0, 1.0, sums.total)
    return xp.where(total[..., None] == 0, 0.0, share)


def _of_pair(y: Cotangents, pair: Pair) -> Cotangents:
    """Those of its queries, for its keys"""
    i, xp = pair.i, namespace(y.do)
    dweights = None if y.dweights is None else y.dweights[..., i, slice(*spelt(pair.cols))]
    all_keys, do, r = y.all_keys.rows(i), y.do[..., i, :], y.r[..., i]
    if y.dominant is None:
        return Cotangents(all_keys, do, r, dweights)
    steps, dz = y.dominant[..., i] - pair.cols.start, None if y.dz is None else y.dz[..., i]
    key, n = steps // pair.cols.step, len(pair.cols)
    here = (steps >= 0) & (key < n) & (key * pair.cols.step == steps)
    return Cotangents(all_keys, do, r, dweights, xp.where(here, key, -1), dz)


# ── what the cache can tell ──────────────────────────────────────────────────────────────────────────────────────


def log_sum_exp(cache: Any) -> Array:
    """lse (..., H, T of this rank)"""
    return cache.sums.lse if isinstance(cache, RingCache) else engines.log_sum_exp(cache.attention)


@with_single_threaded_blas
@quiet_underflow
def attention_weights(cache: Any) -> Array:
    """p (..., H, T of this rank, S + A), for which keys go round once more"""
    if not isinstance(cache, RingCache):
        return engines.attention_weights(cache.attention)
    problem, like = cache.problem, cache.sums.o
    A = problem.appended[0].shape[-2] if problem.appended else 0
    p = full((*problem.q.shape[:-1], problem.S + A), 0.0, like)

    def write(pair: Pair, piece: Piece) -> None:
        p[..., pair.i, slice(*spelt(pair.cols))] = pieces.weights(piece, cache.sums.rows(pair.i))

    _over_keys(cache, write)
    return p


# ── one rank ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _on_one_rank(problem: Problem) -> tuple[Array, OneRankCache]:
    q, k, v, bias, sink, x, T, S, appended = problem
    k, v, given, A = upcast(k), upcast(v), bias, 0
    if appended:
        A = appended[0].shape[-2]
        k, v = (namespace(a).concat([a, more], axis=-2) for a, more in zip((k, v), appended, strict=True))
    bias, x = None if bias is None else bias.append_keys(S, A), x._replace(mask=append_keys(x.mask, T, S, A, q))
    engine = engines.pick_for(q, k)
    o, cache = engine.attend(upcast(q), k, v, bias, sink, x, engine.plan)
    return own(o, getattr(getattr(cache, "rest", None), "o", None)), OneRankCache(cache, given, S)


def _on_one_rank_vjp(cache: OneRankCache, do: Array, **cotangents: Any) -> tuple[Any, ...]:
    dq, dk, dv, dbias, dsink = engines.attention_vjp(cache.attention, do, **cotangents)
    dbias = None if dbias is None else cache.bias.append_keys_vjp(cache.S, as_bias(dbias))
    (dk, dk_more), (dv, dv_more) = ((a[..., : cache.S, :], a[..., cache.S :, :]) for a in (dk, dv))
    return dq, dk, dv, dbias, dsink, (dk_more, dv_more)


# ── piece by piece ───────────────────────────────────────────────────────────────────────────────────────────────


def _over_keys(
    cache: RingCache, f: Callable[[Pair, Piece], None], ways: Ways | None = None, queries: Queries | None = None
) -> None:
    """f of each piece of these queries and the keys that they attend, which go round; of all queries for None"""
    queries = cache.queries if queries is None else queries
    for step, kv in cache.travelling(cache.ways if ways is None else ways):
        if kv:
            _each(f, _pieces(cache, step.source, kv, queries))
        del kv  # or a third part would be alive while the next one comes
    _each(f, _appended(cache, queries))


def _each(f: Callable[[Pair, Piece], None], some: Iterator[tuple[Pair, Piece]]) -> None:
    for pair, piece in some:
        f(pair, piece)


def _pieces(cache: RingCache, source: int, kv: KV, queries: Queries) -> Iterator[tuple[Pair, Piece]]:
    """Those of some queries and the keys of a part"""
    q, _, _, bias, _, x, T, S, _ = cache.problem
    for pair in pairs(queries, cache.layout, source, S, x.mask):
        own_q, own_k, own_v = map(upcast, (q[..., pair.i, :], *(a[..., pair.j, :] for a in kv)))
        own = pieces.select(bias, x, pair.rows, pair.cols, pair.mask, T)
        yield pair, Piece(own_q, own_k, own_v, *own)


def _appended(cache: RingCache, queries: Queries) -> Iterator[tuple[Pair, Piece]]:
    """Those of some queries and the appended keys, which have neither mask nor bias"""
    q, *_, x, T, S, appended = cache.problem
    for rows, i in queries if appended else ():
        k, v = appended
        pair = Pair(rows, range(S, S + k.shape[-2]), i, slice(0, k.shape[-2]), None)
        yield pair, Piece(upcast(q[..., i, :]), k, v, *pieces.select(None, x, rows, pair.cols, None, T))
