"""From a part of the tokens of all heads to all tokens of a part of the heads, and back (Jacobs et al. 2023).

Ranks that have a part of the heads each are neighbours in a line. They exchange what each has of the other's heads.
What then goes on is the attention of a ring, or of one process. Where the heads are not cut nothing is done.

Axes: T tokens, H heads, D width; `...` is batch.
"""

from typing import Any

from funcmha._arguments import Bias, Options
from funcmha._arrays import Array, downcast, full, namespace, of_heads, unset

from .comm import contiguous
from .line import Line


def to_heads(
    line: Line, q: Array, k: Array, v: Array, bias: Bias, sink: Array, x: Options, T: int, S: int
) -> tuple[Any, ...]:
    """q, k and v of this rank's heads and all tokens of its part of the ring; bias, sink and options of these heads"""
    if line.layout.heads == 1:
        return q, k, v, bias, sink, x
    h = own_heads(line, q, k)
    q, k, v = _gather_tokens(line, q, T), _gather_tokens(line, k, S), _gather_tokens(line, v, S)
    return q, k, v, None if bias is None else bias.heads(h), None if sink is None else sink[h], x.heads(h)


def own_heads(line: Line, q: Array, k: Array) -> slice:
    """The query heads of this rank; all where there is no head axis"""
    return line.layout.query_heads(q.shape[-3], k.shape[-3], line.comm.rank) if q.ndim > 2 else slice(0, 1)


def from_heads(line: Line, o: Array, lse: Array, q: Array, T: int) -> tuple[Array, Array]:
    """o, in the dtype of q, and lse of all heads and this rank's tokens"""
    if line.layout.heads == 1:
        return o, lse
    H = q.shape[-3]
    return _gather_heads(line, downcast(o, q.dtype), H, T), _gather_heads(line, lse[..., None], H, T)[..., 0]


def cotangents_to_heads(line: Line, do: Array, dlse: Array, T: int) -> tuple[Array, Array]:
    """`from_heads` from the bottom up"""
    if line.layout.heads == 1:
        return do, dlse
    return _gather_tokens(line, do, T), None if dlse is None else _gather_tokens(line, dlse[..., None], T)[..., 0]


def gradients_from_heads(
    line: Line, grads: tuple[Array, ...], inputs: tuple[Array, ...], lengths: tuple[int, ...], dtype: Any
) -> tuple[Array, ...]:
    """dq, dk and dv, rounded: `to_heads` from the bottom up"""
    rounded = tuple(downcast(g, dtype) for g in grads)
    if line.layout.heads == 1:
        return rounded
    each = zip(rounded, inputs, lengths, strict=True)
    return tuple(_gather_heads(line, g, x.shape[-3], n) for g, x, n in each)


def of_all_heads(line: Line, g: Array, x: Array, rank: int, h: slice) -> Array:
    """The gradient of x, which every rank has, from those of each rank's heads h and tokens     as x"""
    if line.comm.size == 1:
        return g
    if line.layout.heads > 1:
        whole = full(tuple(x.shape), 0.0, g)
        own = of_heads(whole, h, rank)  # a view
        own += g
        g = whole
    return line.comm.all_reduce(contiguous(g))


def _gather_tokens(line: Line, x: Array, n: int) -> Array:
    """x (..., H, T of this rank, D)   →   (..., its heads, T of its part of the ring, D)     of n tokens"""
    layout, rank, H = line.layout, line.comm.rank, x.shape[-3]
    own = layout.query_heads(H, H, rank)
    first = rank - line.heads.rank
    out = [
        unset((*x.shape[:-3], own.stop - own.start, layout.num_tokens(n, first + r), x.shape[-1]), x)
        for r in range(layout.heads)
    ]
    parts = [contiguous(x[..., layout.query_heads(H, H, first + r), :, :]) for r in range(layout.heads)]
    line.heads.all_to_all(parts, out)
    return namespace(x).concat(out, axis=-2)


def _gather_heads(line: Line, x: Array, H: int, n: int) -> Array:
    """x (..., its heads, T of its part of the ring, D)   →   (..., H, T of this rank, D)"""
    layout, rank = line.layout, line.comm.rank
    first, start, parts, out = rank - line.heads.rank, 0, [], []
    for r in range(layout.heads):
        stop = start + layout.num_tokens(n, first + r)
        parts.append(contiguous(x[..., start:stop, :]))
        h = layout.query_heads(H, H, first + r)
        out.append(unset((*x.shape[:-3], h.stop - h.start, layout.num_tokens(n, rank), x.shape[-1]), x))
        start = stop
    line.heads.all_to_all(parts, out)
    return namespace(x).concat(out, axis=-3)
