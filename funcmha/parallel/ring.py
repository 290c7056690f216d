"""Ring attention: each rank keeps its queries, and keys and values go round (Liu, Zaharia and Abbeel 2023).

Nothing is kept of a part once it has gone by. The forward joins the sums of its pieces. In the gradient the keys and
values go round once more, p is made again from the sums of all keys, and dk and dv travel along and then home, in the
dtype computed with. Each transfer begins before the computation that hides it.

Axes: T queries and S keys of all ranks, H query heads, K key/value heads, D query/key width, E value width; `...` is
batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias, Options
from funcmha._arrays import Array, full, namespace, own, quiet_underflow, unset, upcast
from funcmha.biases import as_bias
from funcmha.engines import attention_vjp as engines_attention_vjp
from funcmha.engines import pick
from funcmha.engines.tiled.threads import with_single_threaded_blas

from . import pieces
from .comm import Comm, Wait, contiguous
from .line import Layout
from .pieces import Sums, joined, nothing, of_log
from .schedule import Step, Ways, needed, pairs, steps


class RingCache(NamedTuple):
    q: Array  # (..., H, T of this rank, D), as it came, as are k and v
    k: Array  # (..., K, S of this rank, D)
    v: Array  # (..., K, S of this rank, E)
    bias: Bias  # of all ranks, broadcasts to (..., H, T, S), or None
    sink: Array  # (H,), or () without a head axis, or None
    sums: Sums  # of all keys, and the sink
    attending: Array  # booleans (..., H, T of this rank), whether any key is attended, the sink not counted
    options: Options  # of all ranks
    T: int
    S: int
    ways: Ways
    layout: Layout
    comm: Comm


def _add_keys(cache: RingCache, step: Step, kv: tuple[Array, ...]) -> None:
    """Add those of a part to the sums"""
    k, v = kv
    for pair in pairs(cache.layout, cache.comm.rank, step.source, cache.T, cache.S, cache.options.mask):
        bias, x = pieces.of_piece(cache.bias, cache.options, pair.rows, pair.cols, pair.mask, cache.T)
        rows = cache.sums.rows(pair.i)
        own_q, own_k, own_v = map(upcast, (cache.q[..., pair.i, :], k[..., pair.j, :], v[..., pair.j, :]))
        rows.become(joined(rows, pieces.attend(own_q, own_k, own_v, bias, x)))


@with_single_threaded_blas
@quiet_underflow
def attend(
    comm: Comm, layout: Layout, q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options, T: int, S: int
) -> tuple[Array, Any]:
    """o (..., H, T of this rank, E) in the dtype computed with, of checked arguments; bias and sink are upcast"""
    if comm.size == 1:
        engine = pick(None, q, max(T, S))
        o, cache = engine.attend(upcast(q), upcast(k), upcast(v), bias, sink, x, engine.plan)
        return own(o, getattr(getattr(cache, "rest", None), "o", None)), cache
    ways, none = _ways(comm, layout, T, S, x), nothing(upcast(q), v.shape[-1])
    kv = contiguous(k), contiguous(v)
    cache = RingCache(q, *kv, bias, sink, none, none.total != 0, x, T, S, ways, layout, comm)
    for step, kv in _travelling(cache):
        if kv:
            _add_keys(cache, step, kv)
        del kv  # or a third part would be alive while the next one comes
    cache = cache._replace(attending=cache.sums.total != 0)
    if sink is not None:
        total, shift = (namespace(q).broadcast_to(a[..., None], tuple(q.shape[:-1])) for a in of_log(sink))
        no_o = nothing(upcast(q), v.shape[-1]).o
        cache = cache._replace(sums=joined(cache.sums, Sums(no_o, total, shift)))
    return own(cache.sums.o, cache.sums.o), cache


@with_single_threaded_blas
@quiet_underflow
def attend_vjp(cache: Any, do: Array, dlse: Array) -> tuple[Any, ...]:
    """dq, dk, dv in the dtype computed with; and, of this rank's queries alone, dbias as a `Bias` and dsink"""
    if not isinstance(cache, RingCache):
        dq, dk, dv, dbias, dsink = engines_attention_vjp(cache, do, dlse=dlse)
        return dq, dk, dv, as_bias(dbias), dsink
    xp, sums, like = namespace(cache.q), cache.sums, cache.sums.o
    do = xp.where(cache.attending[..., None], do, 0.0)
    r = -xp.sum(do * sums.o, axis=-1)
    r = r if dlse is None else r + xp.where(sums.total == 0, 0.0, dlse)
    dq, dk, dv = (full(tuple(a.shape), 0.0, like) for a in (cache.q, cache.k, cache.v))
    dbias = None if cache.bias is None else full(tuple(cache.bias.values.shape), 0.0, like)
    travel = _Gradients(cache, dk, dv)
    for step, kv in _travelling(cache):
        dkv = travel.of(step)
        if kv and dkv:
            _add_gradients(cache, step, kv, (do, r), (dq, *dkv), dbias)
        travel.send(step, dkv)
        del kv, dkv
    travel.end()
    dsink = None if cache.sink is None else _of_sink(cache.sink, sums, r)
    return dq, dk, dv, None if dbias is None else cache.bias._replace(values=dbias), dsink


def _add_gradients(
    cache: RingCache,
    step: Step,
    kv: tuple[Array, ...],
    row_cotangents: tuple[Array, ...],
    totals: tuple[Array, ...],
    dbias: Array,
) -> None:
    """Add those of a part's keys"""
    (k, v), (do, r), (dq, dk, dv) = kv, row_cotangents, totals
    for pair in pairs(cache.layout, cache.comm.rank, step.source, cache.T, cache.S, cache.options.mask):
        i, j = pair.i, pair.j
        bias, x = pieces.of_piece(cache.bias, cache.options, pair.rows, pair.cols, pair.mask, cache.T)
        own_q, own_k, own_v = map(upcast, (cache.q[..., i, :], k[..., j, :], v[..., j, :]))
        grads = pieces.attend_vjp(own_q, own_k, own_v, bias, x, cache.sums.rows(i), do[..., i, :], r[..., i])
        for total, grad in zip((dq[..., i, :], dk[..., j, :], dv[..., j, :]), grads, strict=False):  # views
            total += grad
        if dbias is not None:
            dbias[pieces.bias_place(cache.bias, pair.rows, pair.cols, cache.T)] += grads[3].values


def _of_sink(sink: Array, sums: Sums, r: Array) -> Array:
    """dsink = Σ p_sink (dlse − δ)     as sink"""
    xp = namespace(r)
    total, shift = of_log(sink)
    share = total[..., None] * 2.0 ** (shift[..., None] - sums.shift) / xp.where(sums.total == 0, 1.0, sums.total)
    drows = xp.sum(xp.where(total[..., None] == 0, 0.0, share * r), axis=-1)
    return xp.sum(drows, axis=tuple(range(drows.ndim - sink.ndim)))


# ── on the way ───────────────────────────────────────────────────────────────────────────────────────────────────


def _ways(comm: Comm, layout: Layout, T: int, S: int, x: Options) -> Ways:
    """Each rank looks at the mask for itself, and tells the others."""
    own = needed(layout, comm.rank, T, S, x.mask).astype(np.uint8)
    out = np.empty((comm.size, comm.size), np.uint8)
    comm.all_gather(own, list(out))
    return Ways.of(out != 0)


def _travelling(cache: RingCache) -> Iterator[tuple[Step, tuple[Array, ...]]]:
    """The keys and values of this rank, and those that come by; the next are on their way meanwhile. () for none"""
    comm, all_steps, here = cache.comm, steps(cache.comm.rank, cache.ways), (cache.k, cache.v)
    before, after = _neighbours(comm)
    for step, following in zip(all_steps, [*all_steps[1:], None], strict=True):
        coming: tuple[Array, ...] = ()
        if following is not None and following.arrives:
            n = cache.layout.ring_count(cache.S, following.source)
            coming = tuple(_rows_like(a, n) for a in (cache.k, cache.v))
        wait = comm.shift([(a, after) for a in here if step.leaves], [(a, before) for a in coming])
        yield step, here
        wait()
        del wait  # which keeps what was sent
        here = coming


class _Gradients:
    """dk and dv on their way: with the part that they belong to, and home from the last rank that needs it"""

    def __init__(self, cache: RingCache, dk: Array, dv: Array) -> None:
        self.cache, self.own = cache, (dk, dv)
        self.steps = steps(cache.comm.rank, cache.ways)
        self.wait: Wait = lambda: None
        self.coming: tuple[Array, ...] = ()  # of the part that comes by next
        self.homecoming: tuple[Array, ...] = ()  # of this rank's own

    def of(self, step: Step) -> tuple[Array, ...]:
        """Where to add those of this rank's queries"""
        if step.t == 0 or not step.carries:
            return self.own if step.t == 0 else ()
        n = self.cache.layout.ring_count(self.cache.S, step.source)
        return tuple(full((*a.shape[:-2], n, a.shape[-1]), 0.0, a) for a in self.own)

    def send(self, step: Step, dkv: tuple[Array, ...]) -> None:
        """Add what came along, and begin to send it on"""
        self.end()
        if step.t == 0:
            return
        for total, grad in zip(dkv, self.coming, strict=False):
            total += grad
        before, after = _neighbours(self.cache.comm)
        following = self.steps[step.t + 1] if step.t + 1 < len(self.steps) else None
        self.coming = ()
        if following is not None and following.gathered:
            n = self.cache.layout.ring_count(self.cache.S, following.source)
            self.coming = tuple(_rows_like(a, n) for a in self.own)
        if step.owner >= 0:
            self.homecoming = tuple(_rows_like(a, a.shape[-2]) for a in self.own)
        sends = [(a, step.source if step.home else after) for a in dkv if step.carries]
        receives = [(a, before) for a in self.coming] + [(a, step.owner) for a in self.homecoming]
        self.wait = self.cache.comm.shift(sends, receives)

    def end(self) -> None:
        """Wait for what is on its way, and add what came home"""
        self.wait()
        self.wait = lambda: None
        for total, grad in zip(self.own, self.homecoming, strict=False):
            total += grad
        self.homecoming = ()


def _neighbours(comm: Comm) -> tuple[int, int]:
    """The ranks before and after"""
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


def _rows_like(a: Array, n: int) -> Array:
    """Room for n rows, else like a (..., rows, width)"""
    return unset((*a.shape[:-2], n, a.shape[-1]), a)
