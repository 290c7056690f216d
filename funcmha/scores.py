"""The scores of attention as outputs of their own, for whoever wants to see them or to differentiate through them.

    z, cache = scores(q, k, bias, mask=mask)        # what attention(q, k, v, bias, mask=mask) takes the softmax of
    dq, dk, dbias = scores_vjp(cache, dz)

Attention itself never holds them in linear memory; here they are the result, whatever the engine.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width; `...` is batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

from . import _check
from ._bias import on_bias
from ._doors import blank_keys, blank_queries, check_attention
from ._xp import Array, namespace, narrow, widen
from .biases import RelativeBias
from .masks import Mask, dense
from .ops import _per_head, _scores, _scores_vjp

INF = float("inf")


class ScoresCache(NamedTuple):
    q: Array  # (..., H, T, D), 0 at the queries that may see no key
    k: Array  # (..., K, S, D), 0 at the keys that nobody may see
    bias: Array | RelativeBias  # broadcasts to (..., H, T, S), or None
    slope: Array  # (..., H, T, S), dc/du of the soft cap, or None
    z: Array  # (..., H, T, S)
    scale: Array | float  # of every head, or (H, 1, 1)


def scores(
    q: Array,
    k: Array,
    bias: Array | RelativeBias = None,
    /,
    *,
    mask: Array | Mask = None,
    scale: float | Sequence[float] | None = None,
    softcap: float | Sequence[float] | None = None,
) -> tuple[Array, ScoresCache]:
    """z = softcap · tanh(scale · q kᵀ / softcap) + bias, and −∞ where not mask
    q (..., H, T, D)   k (..., K, S, D)   →   z (..., H, T, S)     or both without head axis

    Arguments as in `funcmha.ops.attention`, whose weights are exp(z − lse). What is left out is not done: without a
    mask these are the scores of all keys, without bias and softcap they are scale · q kᵀ. A key that no query may see
    has z = −∞ and no effect, even if it is NaN, and so has a query that may see no key. Time and memory O(H T S).
    """
    mask, scale, softcap = check_attention(q, k, k, bias, None, mask, scale, softcap, None)  # no values, no dropout
    mask = dense(mask, q.shape[-2], k.shape[-2], q)

    dtype = q.dtype
    q, k, bias = blank_queries(widen(q), mask), blank_keys(widen(k), mask), on_bias(widen, bias)
    xp, scale, softcap = namespace(q), _per_head(scale, q), _per_head(softcap, q)
    z, slope = _scores(q, k, bias, scale, softcap)
    z = z if mask is None else xp.where(mask, z, -INF)
    return narrow(z, dtype), ScoresCache(q, k, bias, slope, z, scale)


def scores_vjp(cache: ScoresCache, dz: Array, /) -> tuple[Array, Array, Array | RelativeBias]:
    """dq, dk, dbias: `scores` from the bottom up

    A score of −∞ stays what it is however little an input moves: its cotangent has no effect.
    """
    _check.cache(cache, ScoresCache, "scores")
    q, k, bias, slope, z, scale = cache
    _check.cotangent("dz", dz, z.shape, z, "... H T S")
    dtype, xp = dz.dtype, namespace(q)
    g = xp.where(z == -INF, 0.0, widen(dz))
    dq, dk, dbias = _scores_vjp(q, k, bias, scale, slope, g)
    return narrow(dq, dtype), narrow(dk, dtype), on_bias(lambda dx: narrow(dx, dtype), dbias)
