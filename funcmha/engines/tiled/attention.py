"""Attention in tiles: `funcmha.ops.attention` and its vjp in linear memory (Dao et al. 2022).

The work of some heads of a sample is cut into tiles, and these are shared out among the threads. The result does not
depend on how many there are: what is added up is added in the order of the tiles.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from math import frexp, inf, prod
from typing import Any, Unpack

import numpy as np

from funcmha._arguments import AttentionOptions, Bias, Options, check_attention, check_cotangents_of_attention
from funcmha._arrays import Array, downcast, namespace, own, quiet_underflow, upcast
from funcmha.biases import RelativeBias
from funcmha.engines.plan import Plan
from funcmha.masks.zero import zero_masked_queries, zero_unattended
from funcmha.ops import round_bias

from . import threads
from .backward import Backward
from .cache import AttentionCache, Rest, Views, with_head_axis
from .forward import forward, recomputed
from .schedule import BiasGradient, RelativeBiasGradient
from .tiles import LN2, inverse_of


@quiet_underflow
def attend(
    q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options, plan: Plan
) -> tuple[Array, AttentionCache]:
    """`attention`, of arguments that are checked and upcast; o is that of the cache, not to be written to"""
    bias = None if bias is None else bias.map(in_range)
    q, k, v = zero_unattended(q, k, v, x.mask)
    k = _in_rows(k)
    plan = plan_of(plan, q, k, x.mask)
    o = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    row_sum, row_max = np.empty(q.shape[:-1], q.dtype), np.zeros(q.shape[:-1], q.dtype)
    dominant = np.full(q.shape[:-1], -1, np.int32)
    rest = Rest(
        bias, sink, o, row_sum, row_max, dominant, True, x.mask, x.dropout, x.scale, x.softcap, k.shape[-2], plan
    )
    with threads.single_threaded_blas():
        shifted = forward(Views.of(rest.with_qkv(q, k, v)))
    if not shifted:
        rest = rest._replace(row_max=np.broadcast_to(row_max.dtype.type(0), row_max.shape), shifted=False)  # no memory
    return o, rest.with_qkv(q, k, v)


def attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Any = None,
    sink: Array = None,
    /,
    *,
    plan: Plan,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, AttentionCache]:
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     as `funcmha.ops.attention`

    Real NumPy arrays only, else TypeError. Memory O(H (T + S)) beside the inputs. o lies in memory as q does.
    """
    bias, x = check_attention(q, k, v, bias, sink, options)
    if not isinstance(q, np.ndarray) or q.dtype.kind == "c":
        raise TypeError(f"q must be a real NumPy array for the engine 'tiled', got {type(q).__name__} of {q.dtype}")
    bias = None if bias is None else bias.map(upcast)
    o, cache = attend(upcast(q), upcast(k), upcast(v), bias, upcast(sink), x, plan)
    return own(downcast(o, q.dtype), cache.rest.o), cache


@quiet_underflow
def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, batch_axes: int = 0
) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink: every tile once more, five products each
    from the cotangents of o and, where given, of the weights (..., H, T, S) and lse (..., H, T)
    """
    q, k, v, rest = cache
    check_cotangents_of_attention(do, dweights, dlse, q, k, v, batch_axes)
    *grads, dbias, dsink = _gradients(cache, upcast(do), upcast(dweights), upcast(dlse))
    dsink = None if dsink is None else total_of_sink(dsink, rest.sink, batch_axes)
    dq, dk, dv, dsink = (downcast(dx, do.dtype) for dx in (*grads, dsink))
    return dq, dk, dv, round_bias(dbias, do.dtype), dsink


@quiet_underflow
def some_keys_vjp(cache: AttentionCache, do: Array, dweights: Array, r: Array, dz: Array) -> tuple[Any, ...]:
    """dq, dk, dv, dbias as a bias, of some of the keys of a softmax, where the sums of the cache are those of all

    r (..., H, T) is dlse − δ of all keys, and dz (..., H, T) what the dominant keys get: see `row_sums`.
    """
    return _gradients(cache, do, dweights, r, dz)[:-1]


@quiet_underflow
def row_sums(cache: AttentionCache, do: Array, dweights: Array, r: Array) -> Array:
    """Σ dz (..., H, T) over such keys but the dominant ones"""
    factor = _factor(do, dweights, r)
    work, *_ = _backward(cache, *_times(factor, do, dweights, r, r))
    with threads.single_threaded_blas():
        total = work.row_sums().reshape(r.shape)
    return _times(1 / factor, total)[0]


def _factor(*cotangents: Array) -> float:
    """A power of two that brings the largest of them near 1, if it is far from that: all is linear in them, and a tiny
    one would vanish, divided by a sum of exponentials, which may be 2⁸⁰
    """
    some = [a for a in cotangents if a is not None]
    if any(2.0**-20 <= float(a.max(initial=0.0)) <= 2.0**20 for a in some):
        return 1.0
    largest = max(max(float(a.max(initial=0.0)), -float(a.min(initial=0.0))) for a in some)
    return 2.0 ** -max(min(frexp(largest)[1], 100), -100) if 0 < largest < inf else 1.0


def _times(factor: float, *arrays: Array) -> tuple[Array, ...]:
    return arrays if factor == 1 else tuple(None if a is None else factor * a for a in arrays)


def _gradients(cache: AttentionCache, do: Array, dweights: Array, dlse: Array, known: Array = None) -> tuple[Any, ...]:
    """dq, dk, dv, dbias as a bias, dsink as the sink of each sample (..., H), in the dtype to compute in"""
    factor = _factor(do, dweights, dlse)
    work, *grads = _backward(cache, *_times(factor, do, dweights, dlse, known))
    with threads.single_threaded_blas():
        work.run()
    dsink, dbias = None if cache.rest.sink is None else work.dsink, work.dbias
    *grads, dsink, dvalues = _times(1 / factor, *grads, dsink, None if dbias is None else dbias.total())
    return *grads, None if dbias is None else cache.rest.bias._replace(values=dvalues), dsink


def _backward(
    cache: AttentionCache, do: Array, dweights: Array, dlse: Array, known: Array
) -> tuple[Backward, Array, Array, Array]:
    """The backward of a cache, and dq, dk and dv, which it fills"""
    q, k, v, rest = cache
    dbias, x = None, recomputed(Views.of(cache))
    like = np.empty_like if x.has_one_tile else np.zeros_like
    dq, dk, dv = like(q), like(k), like(v)
    if rest.bias is not None:
        of_bias = RelativeBiasGradient if isinstance(rest.bias, RelativeBias) else BiasGradient
        dbias = of_bias(rest.bias.values, (*q.shape[:-1], k.shape[-2]))
    dsink = np.zeros(x.q.shape[:-2], q.dtype)
    inverse = inverse_of(x.row_sum)[..., None]
    attending = None if rest.mask is None else rest.mask.attending_queries(q.shape[-2], k.shape[-2])
    cotangents = with_head_axis(zero_masked_queries(do, attending)), with_head_axis(dweights), with_head_axis(dlse, 1)
    grads = with_head_axis(dq), with_head_axis(dk), with_head_axis(dv)
    return Backward(x, inverse, *cotangents, *grads, dbias, dsink, with_head_axis(known, 1)), dq, dk, dv


def total_of_sink(dsink: Array, sink: Array, batch_axes: int) -> Array:
    """dsink (..., H)   →   as sink, after the first axes of the batch"""
    *batch, H = dsink.shape
    rest = prod(batch[batch_axes:])
    summed = dsink.reshape((*batch[:batch_axes], rest, H)).sum(axis=-2)
    return summed.reshape((*batch[:batch_axes], *sink.shape))


def plan_of(plan: Plan, q: Array, k: Array, mask: Any) -> Plan:
    """The plan by which the tiles of these are made, forward and back"""
    return plan if mask is None or q.ndim < 3 else plan.of_masked(q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2])


def in_range(bias: Array) -> Array:
    """The bias of any library, where a finite number stays finite times log₂e: the least of its dtype, which many write
    for −∞
    """
    xp = namespace(bias)
    least = 0.69 * xp.finfo(bias.dtype).min
    if isinstance(bias, np.ndarray) and bias.min(initial=0.0) >= least:
        return bias
    return xp.where((bias < least) & (bias != -inf), least, bias)


def _in_rows(k: Array) -> Array:
    """The keys, where BLAS can take their rows as they lie; NumPy adds up others in an order that is no copy's, and the
    gradient, which takes a copy, must have the very scores of the forward
    """
    *_, row, number = k.strides
    return k if number == k.itemsize and row >= k.shape[-1] * number else np.ascontiguousarray(k)


# ── what the cache can tell ──────────────────────────────────────────────────────────────────────────────────────


def log_sum_exp(cache: AttentionCache, /) -> Array:
    """lse (..., H, T)"""
    rest = cache.rest
    some = rest.row_sum != 0
    fraction, exponent = np.frexp(np.where(some, rest.row_sum, 1.0))  # c is whole, so their sum is exact
    whole = exponent + rest.row_max  # in float64, where c is 0 everywhere too: a batch rounds as its samples do
    # np.log has the same bits wherever in an array a number stands, np.log2 not
    return np.where(some, np.log(fraction) + LN2 * whole, -np.inf).astype(fraction.dtype)


@quiet_underflow
def attention_weights(cache: AttentionCache, /) -> Array:
    """p (..., H, T, S), the weights before dropout"""
    x = recomputed(Views.of(cache))
    p = np.zeros((*x.q.shape[:-1], x.k.shape[-2]), x.q.dtype)
    row_sum = np.where(x.row_sum == 0, 1.0, x.row_sum)[..., None]
    with threads.single_threaded_blas():
        for b, h in x.stacks_of_samples():
            heads = x.heads(b, h)
            for tile in heads.of_all_rows():
                at = (*b, h, slice(*tile.rows))
                row_max = None if x.row_max is None else x.row_max[at]
                p[(*at, slice(*tile.cols))] = heads.exponentials(heads.scaled_q(tile.rows), tile, row_max) / row_sum[at]
    return p.reshape(*cache.rest.row_sum.shape, p.shape[-1])
