"""Attention of sequences in the layouts of flash-attention: packed or padded tokens, keys that are where they are.

Axes: B sequences, N tokens of all of them, M keys of all of them, T queries and S keys of one, P pages of L slots, H
query heads, K key/value heads, D query/key width, E value width. A padded batch of keys is one of B pages.
"""

from math import prod
from typing import NamedTuple

from funcmha import _check
from funcmha._xp import Array, namespace, narrow, outline, widen
from funcmha.dropout import Seeded
from funcmha.engines import log_sum_exp

from .aligned import Scores
from .ragged import RaggedCache, Sequences, ragged, ragged_vjp
from .rows import PickedCache, picked, picked_vjp


class AttendedCache(NamedTuple):
    q: Array  # (N, H, D, 0) or (B, T, H, D, 0): nothing but shapes, and the dtype that is computed in
    k: Array  # (M, K, D, 0) or (P, L, K, D, 0)
    v: Array  # (M, K, E, 0) or (P, L, K, E, 0)
    qv: Array  # (N, H, E, 0) or (B, T, H, E, 0), or None
    keys: PickedCache | None
    values: PickedCache | None
    attention: RaggedCache  # of one sequence after another


def attended(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array = None,
    sink: Array = None,
    qv: Array = None,
    /,
    *,
    at: Sequences,
    scores: Scores,
    keep: Array | Seeded = None,
    rate: float = 0.0,
) -> tuple[Array, AttendedCache]:
    """out = attention of each sequence over the keys that it sees, in the layout of q and rounded to its dtype
    q (N, H, D) or (B, T, H, D)   k (M, K, D) or (P, L, K, D)   v (M, K, E) or (P, L, K, E)   slopes (H,) or (B, H)
    sink (H,)   qv (N, H, E) or (B, T, H, E)   →   out (N, H, E) or (B, T, H, E)
    """
    keys, values, of_keys, of_values = flat(k), flat(v), None, None
    if at.rows is not None:
        keys, of_keys = picked(keys, rows=at.rows)
        values, of_values = picked(values, rows=at.rows)
    wide = (widen(x) for x in (flat(q), keys, values, slopes, sink, None if qv is None else flat(qv)))
    o, cache = ragged(*wide, at=at, scores=scores, keep=keep, rate=rate)
    out = namespace(o).reshape(narrow(o, q.dtype), (*q.shape[:-1], v.shape[-1]))
    of_q, of_k, of_v, of_qv = (widen(outline(x)) for x in (q, k, v, qv))
    return out, AttendedCache(of_q, of_k, of_v, of_qv, of_keys, of_values, cache)


def attended_vjp(
    cache: AttendedCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink, dqv, not yet rounded: `attended` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (H, N) or (B, H, T)
    """
    q, k, v, qv, of_keys, of_values, attention = cache
    do, dlse = flat(widen(dout)), _packed(widen(dlse))
    dq, dk, dv, dslopes, dsink, dqv = ragged_vjp(attention, do, dweights=widen(dweights), dlse=dlse)
    if of_keys is not None and of_values is not None:
        (dv,) = picked_vjp(of_values, dv)
        (dk,) = picked_vjp(of_keys, dk)
    reshape = namespace(dq).reshape
    dq, dk, dv = (reshape(dx, x.shape[:-1]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dslopes, dsink, None if qv is None else reshape(dqv, qv.shape[:-1])


@log_sum_exp.register
def _(cache: AttendedCache, /) -> Array:
    lse, tokens = log_sum_exp(cache.attention), cache.q.shape[:-3]
    xp = namespace(lse)
    return lse if len(tokens) == 1 else xp.moveaxis(xp.reshape(lse, (lse.shape[0], *tokens)), 0, 1)


def check_cotangents(
    cache: AttendedCache, dout: Array, dweights: Array, dlse: Array, *, optional: bool = False
) -> None:
    """The door of every gradient that goes through `attended_vjp`."""
    (*tokens, H, _, _), E, q = cache.q.shape, cache.v.shape[-2], cache.q
    letters, of_lse = ("N", "H N") if len(tokens) == 1 else ("B T", "B H T")
    _check.cotangent("dout", dout, (*tokens, H, E), q, f"{letters} H E", optional=optional)
    _check.cotangent("dweights", dweights, cache.attention.weights.shape[:-1], q, "B H T S", optional=True)
    _check.cotangent("dlse", dlse, (*tokens[:-1], H, tokens[-1]), q, of_lse, optional=True)


def flat(x: Array) -> Array:
    """(N, H, D) or (B, T, H, D)   →   (N, H, D)"""
    return x if x.ndim == 3 else namespace(x).reshape(x, (prod(x.shape[:-2]), *x.shape[-2:]))


def _packed(dlse: Array) -> Array:
    """(H, N) or (B, H, T), or None   →   (H, N)"""
    if dlse is None or dlse.ndim == 2:
        return dlse
    (B, H, T), xp = dlse.shape, namespace(dlse)
    return xp.reshape(xp.moveaxis(dlse, 0, 1), (H, B * T))
