"""Errors of attention and its gradient, in the arithmetic of `funcmha.testing.rounding`.

  * Softmax turns an absolute error of a score into a relative error of its weight. Adding a constant to a row changes
    nothing, so a weight over 1/2 serves as the reference of its row and has no error itself: a saturated row is exact.
    (After Blanchard, Higham and Higham, IMA J. Numer. Anal. 41(4), 2021, Theorem 4.3, with errors in the scores.)
  * The gradient of such a score is what the others leave of a known sum: its error is theirs, and as small as they are.
    A backward that computes p (dp − δ) there, the difference of two large numbers, is outside.
  * A sink is one more key, with an exact score and value 0, that all queries attend. Where dp is centred at m, that of
    the largest weight, the error of the sink's weight enters δ times m.
  * tanh has slopes up to 1, which grow towards 0: an error of a score moves its soft cap by at most itself times the
    largest slope on its way. An error of a query changes the slopes of all its keys, and adds plainly in dq.
  * What a `Profile` stores in half is off by its rounding besides: the weights where they meet values and cotangents,
    the gradient of the scores where it meets keys and queries, and the output in δ = Σ do ⊙ o, which is one for a row.
  * The gradient of a `RelativeBias` consists of sums along diagonals, to which each row contributes once.

Axes: T queries, S keys, H query heads, D query/key width, E value width; `...` is batch.
"""

from math import prod
from typing import Any

import numpy as np

from funcmha._arrays import Array, unbroadcast
from funcmha.biases import ArrayBias, RelativeBias, diagonal_sums
from funcmha.masks import Mask, append_keys, as_mask

from .rounding import EXP, Arithmetic, Maybe, Rounded, alike, each, exact, host, tie, total, transpose

Bias = ArrayBias | RelativeBias | None
OPTIONS = ("mask", "scale", "softcap", "dropout", "dweights", "dlse")


def soft_cap(fl: Arithmetic, z: Rounded, softcap: Array | float) -> tuple[Rounded, Rounded]:
    """The soft cap of `ops._scores`: softcap · tanh(z / softcap), and its slope 1 − tanh²"""
    a, roundings = z.value / softcap, 1 + fl.constant(softcap)
    t = np.tanh(a)

    def moved(by: Array) -> Array:  # how far tanh may move with a: it is steepest nearest to 0
        return np.minimum(by * (1 - np.tanh(np.maximum(np.abs(a) - by, 0.0)) ** 2), 1 + np.abs(t))

    t_error = moved(z.error / softcap + roundings * fl.rounding(np.abs(a))) + EXP * fl.rounding(np.abs(t))
    c_error = softcap * t_error + roundings * fl.rounding(np.abs(softcap * t))
    slope_error = (2 * np.abs(t) + t_error) * t_error + fl.u
    of_rows = [moved(np.abs(row) / softcap) for row in z.rows]
    c = Rounded(softcap * t, c_error, tuple(softcap * by for by in of_rows))
    return c, Rounded(1 - t * t, slope_error, tuple((2 * np.abs(t) + by) * by for by in of_rows))


def softmax(fl: Arithmetic, z: Rounded, allowed: Array) -> tuple[Rounded, Rounded, Rounded]:
    """`ops.softmax_with_sink`: p, p recomputed from lse, and lse"""
    u, n = fl.u, z.value.shape[-1] ** 0.5
    x = np.where(allowed, z.value, -np.inf)
    top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
    empty = np.isneginf(top)
    top = np.where(empty, 0.0, top)
    e = np.exp(x - top)
    row_sum = np.where(empty, 1.0, total(e))
    p, log_sum = e / row_sum, np.log(row_sum)
    lse = np.where(empty, -np.inf, top + log_sum)

    below = np.where(allowed, top - x, 0.0)
    score = np.where(allowed, z.error, 0.0)
    heavy = p > 0.5  # no row has two
    light = np.where(heavy, 0.0, p)

    def of_heavy(error: Array) -> Array:
        return total(error * heavy)

    def apart(error: Array) -> Array:
        return np.where(heavy, 0.0, error + of_heavy(error))

    e_error = score + u * (below + EXP)  # relative
    common = np.sqrt(total((light * e_error) ** 2)) + u * (2 + n) + total(light) * of_heavy(e_error)
    for row in z.rows:
        common += total(p * apart(np.abs(row)))
    size = total(p * (below + EXP)) + 1 + n + EXP * log_sum + np.abs(lse)
    from_scores = np.log1p(total(p * np.expm1(np.minimum(score, 700.0))))
    size = size + (3 * np.abs(lse) if fl.profile.base2 else 0.0)  # times ln 2
    lse_error = np.where(empty, 0.0, from_scores + u * size)

    least = fl.tiny * (1 + fl.profile.base2)  # a row maximum rounded up to a whole number halves the weights

    def weights(own: Array, common: Array) -> Rounded:
        # p grows to at most p exp(r), and to 1; first order does not suffice where scores are off by more than 1
        r = own + common
        error = np.exp(np.minimum(r - below - log_sum, 0.0)) * -np.expm1(-r) + least
        return Rounded(p, np.where(allowed, error, 0.0), (p * np.minimum(common, 1.0),))

    recomputed = weights(e_error, lse_error)  # exp(x − lse)
    return weights(apart(e_error), common), recomputed, Rounded(lse[..., 0], lse_error[..., 0])


def softmax_vjp(
    fl: Arithmetic, p: Rounded, dp: Rounded, dlse: Array | float, p_sink: Maybe, of_delta: Array | float = 0.0
) -> tuple[Rounded, Maybe]:
    """`ops.softmax_with_sink_vjp`, or p (dp − δ + dlse) as it stands; δ is off by `of_delta` besides"""
    delta = fl.matmul(each(lambda a: a[..., None, :], p), each(lambda a: a[..., None], dp))
    delta = each(lambda a: a[..., 0], delta)
    delta = delta._replace(error=delta.error + of_delta)
    size, common, m = np.abs(dp.value) + np.abs(delta.value), delta.error, np.zeros(())
    if p.value.shape[-1]:
        largest = np.argmax(p.value, axis=-1, keepdims=True)
        m = np.take_along_axis(dp.value, largest, axis=-1)  # dp is centred there: g of a saturated row has its digits
    g = dp.value - m + dlse - total(p.value * (dp.value - m))
    if p_sink is not None:
        g, common = g + m * p_sink.value, common + np.abs(m) * p_sink.error
    error = (p.value + p.error) * (dp.error + common + 2 * fl.rounding(size)) + p.error * np.abs(g)
    error += fl.rounding(np.abs(p.value * g))
    dz, drows = Rounded(p.value * g, error, (p.value * common,)), None
    if p_sink is not None:
        along = dlse - delta.value  # not centred: Σ p dp is as small as the weights are together
        along = Rounded(along, delta.error + 2 * fl.rounding(np.abs(delta.value) + np.abs(along)), (delta.error,))
        drows = fl.multiply(along, p_sink)
    own = dp.error + 2 * fl.rounding(size)
    return (left_by_others(fl, p, own, common, g, dlse, dz, drows) if fl.profile.centred else dz), drows


def left_by_others(
    fl: Arithmetic,
    p: Rounded,
    own: Array,
    common: Array,
    g: Array,
    dlse: Array | float,
    dz: Rounded,
    drows: Maybe,
) -> Rounded:
    """dz, where that of a weight over 1/2 is dlse less that of the sink and of the other keys: g = dz / p

    Its own dp is what the others are compared with. So an error there is shared by all of them, as that of δ is.
    """
    heavy = p.value > 0.5
    light = np.where(heavy, 0.0, p.value + p.error)
    of_sink = Rounded(np.zeros(()), np.zeros(()), (np.zeros(()),)) if drows is None else drows
    size = total(light * np.abs(g - dlse)) + np.abs(of_sink.value) + 3 * np.abs(dlse)  # also in p (dp − δ) and p_sink
    error = total(light) * (common + total(heavy * own)) + np.sqrt(total((light * own) ** 2))
    error += total(p.error * np.abs(g)) + of_sink.error + fl.rounding(size, g.shape[-1])
    rest = total(np.where(heavy, 0.0, dz.rows[0])) + of_sink.rows[0]
    return Rounded(
        dz.value, np.where(heavy, np.minimum(error, dz.error), dz.error), (np.where(heavy, -rest, dz.rows[0]),)
    )


def attention(
    fl: Arithmetic, q: Rounded, k: Rounded, v: Rounded, bias: Bias, sink: Maybe, do: Rounded, S: int, given: Any
) -> tuple[Any, ...]:
    """`ops.attention` and `ops.attention_vjp` of S keys and those appended: o, p, lse, dq, dk, dv, dbias, dsink

    Of p and lse the errors alone. given: the options and the other cotangents.
    """
    mask, scale, softcap, dropout, dweights, dlse = map(given.get, OPTIONS)
    scale, softcap = (np.array(x, float)[:, None, None] if np.ndim(x) else x for x in (scale, softcap))  # (H, 1, 1)
    scale = max(q.value.shape[-1], 1) ** -0.5 if scale is None else scale
    shape = *q.value.shape[:-1], k.value.shape[-2]
    kept = 1.0 if dropout is None else host(dropout.dense(shape)) / (1 - dropout.rate)
    allowed, added = mask_and_bias(mask, bias, shape, S)
    group = 1 if q.value.ndim < 3 else q.value.shape[-3] // max(k.value.shape[-3], 1)
    attended = np.any(allowed, axis=-2)[..., None]
    kh, vh = (each(lambda a: np.where(attended, a if group == 1 else np.repeat(a, group, -3), 0.0), a) for a in (k, v))

    qs, kt = fl.times(q, scale), transpose(kh)
    z = fl.matmul(qs, kt)
    z = z._replace(rows=(*z.rows, np.sqrt(qs.error**2 @ kt.value**2)))  # an error of a query is shared by its keys
    z, slope = (z, None) if softcap is None else soft_cap(fl, z, softcap)
    z = z if added is None else fl.add(z, added)
    z = z._replace(error=z.error + 2 * fl.rounding(np.abs(z.value))) if fl.profile.base2 else z  # times log₂ e
    p, p_recomputed, p_sink, lse = softmax_with_sink(fl, z, sink, allowed)
    of_p, of_lse = fl.stored("p", p.value * kept), fl.stored("lse", np.nan_to_num(lse.value, neginf=0.0))
    o = fl.product(fl.times(p, kept), vh, of_p)
    p, grown = p_recomputed if fl.profile.recomputed else p, np.expm1(np.minimum(of_lse, 700.0))[..., None]

    a = transpose(alike(fl.times(p, kept)))
    dv = fl.product(a, do, np.swapaxes(of_p + p.value * kept * grown, -1, -2))
    dv = dv._replace(error=dv.error + fl.partial("dv", a, do), cols=(np.sqrt(a.value**2 @ tie(do).error ** 2),))
    dp = fl.times(fl.matmul(do, transpose(vh)), kept)
    dp = dp if dweights is None else fl.add(dp, exact(dweights))
    dz, drows = softmax_vjp(
        fl, p, dp, 0.0 if dlse is None else host(dlse)[..., None], p_sink, of_delta(fl, o, do, grown)
    )
    dq, dk = scores_vjp(fl, q, qs, kh, scale, slope, dz, grown)
    dk, dv = per_key_head(fl, dk, group), per_key_head(fl, dv, group)
    dz = dz._replace(error=dz.error + fl.stored("ds", dz.value) + np.abs(dz.value) * grown)
    dbias = bias_vjp(fl, bias, each(lambda a: a[..., :S], dz))
    dsink = None if drows is None else over_rows(fl, drows, np.abs(drows.value) * grown)
    return o, p.error, lse.error + of_lse, dq, dk, dv, dbias, dsink


def of_delta(fl: Arithmetic, o: Rounded, do: Rounded, grown: Array) -> Array:
    """The error of δ = Σ do ⊙ o, made from the stored output; or of Σ p dp, which has grown with the weights"""
    if "o" not in fl.profile.stored:
        return np.abs(total(do.value * o.value)) * grown
    error = np.abs(do.value) * (o.error + fl.stored("o", o.value))
    return total(error) + fl.rounding(total(np.abs(do.value * o.value)), o.value.shape[-1])


def scores_vjp(
    fl: Arithmetic, q: Rounded, qs: Rounded, kh: Rounded, scale: Any, slope: Maybe, dz: Rounded, grown: Array
) -> tuple[Rounded, Rounded]:
    """dq and dk: the gradient of the scores, grown with the weights, may be stored with the scale or without"""
    du = dz if slope is None else fl.multiply(dz, slope)
    dt, with_scale, without = transpose(alike(du)), fl.stored("ds", scale * du.value), fl.stored("ds", du.value)
    stored = np.maximum(with_scale, np.abs(scale) * without) + np.abs(scale * du.value) * grown
    dq, dk = fl.times(fl.matmul(du, kh), scale), fl.matmul(dt, qs)
    dq_error = dq.error + stored @ np.abs(kh.value)
    dk_error = dk.error + np.swapaxes(stored, -1, -2) @ np.abs(q.value) + fl.partial("dk", dt, qs)
    if slope is not None:  # an error of a query changes the slopes of all its keys
        dq_error = dq_error + np.abs(scale) * ((np.abs(dz.value) * sum(slope.rows)) @ np.abs(kh.value))
    return dq._replace(error=dq_error), dk._replace(error=dk_error)


def mask_and_bias(mask: Any, bias: Bias, shape: tuple[int, ...], S: int) -> tuple[Array, Maybe]:
    """What may be attended, (..., H, T, S'), and what is added to its scores: a bias of −∞ is a mask"""
    *_, T, keys = shape
    mask = append_keys(mask if mask is None or isinstance(mask, Mask) else as_mask(host(mask)), T, S, keys - S, None)
    allowed = np.broadcast_to(True if mask is None else host(mask.dense(T, keys)), shape)
    if bias is None:
        return allowed, None
    added = ArrayBias(bias.map(host).dense(T, S)).append_keys(S, keys - S).values
    return allowed & (added > -np.inf), exact(np.where(np.isneginf(added), 0.0, added))


def bias_vjp(fl: Arithmetic, bias: Bias, dz: Rounded) -> Bias:
    """`dense_vjp` of a bias, with values that are `Rounded`: sums over broadcast axes, or along diagonals"""
    if not isinstance(bias, RelativeBias):
        return None if bias is None else ArrayBias(fl.unbroadcast(dz, tuple(bias.values.shape)))
    shape = tuple(bias.values.shape)
    value, size, square = (diagonal_sums(a) for a in (dz.value, np.abs(dz.value), dz.error**2))
    n = diagonal_sums(np.ones(dz.value.shape[-2:])) * (size.size / max(prod(shape), 1))
    error = fl.rounding(unbroadcast(size, shape), n) + np.sqrt(unbroadcast(square, shape))
    return RelativeBias(Rounded(unbroadcast(value, shape), error))


def softmax_with_sink(fl: Arithmetic, z: Rounded, sink: Maybe, allowed: Array) -> tuple[Any, ...]:
    """`softmax` with the sink as one more key: p, p recomputed from lse, the sink's (..., H, T, 1), and lse"""
    if sink is None:
        p, recomputed, lse = softmax(fl, z, allowed)
        return p, recomputed, None, lse
    S, shape = z.value.shape[-1], (*z.value.shape[:-1], 1)

    def with_column(a: Array, last: Array) -> Array:
        return np.concatenate([a, np.broadcast_to(last, shape)], axis=-1)

    z = each(lambda a: with_column(a, np.zeros(())), z)._replace(
        value=with_column(z.value, sink.value[..., None, None])
    )
    p, recomputed, lse = softmax(fl, z, with_column(allowed, np.ones((), bool)))
    p_sink = Rounded(recomputed.value[..., S:], recomputed.error[..., S:])
    return each(lambda a: a[..., :S], p), each(lambda a: a[..., :S], recomputed), p_sink, lse


def over_rows(fl: Arithmetic, drows: Rounded, plainly: Array) -> Rounded:
    """Σ over the queries and the batch: (..., H, T, 1)   →   (H,), or (T, 1)   →   (); off by Σ `plainly` besides"""
    heads = drows.value.shape[-3:-2]
    rows = each(lambda a: (np.moveaxis(a, -3, 0) if heads else a).reshape(prod(heads), -1, 1), drows)
    summed = each(lambda a: a.reshape(heads), fl.sum_rows(rows))
    return summed._replace(error=summed.error + unbroadcast(plainly[..., 0], (*heads, 1)).reshape(heads))


def per_key_head(fl: Arithmetic, g: Rounded, group: int) -> Rounded:
    """`ops.per_key_head`"""
    if group == 1:
        return g
    *batch, H, S, D = g.value.shape
    g = fl.unbroadcast(each(lambda a: a.reshape(*batch, H // group, group, S, D), g), (*batch, H // group, 1, S, D))
    return each(lambda a: a[..., 0, :, :], g)
