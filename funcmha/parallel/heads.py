"""From a part of the tokens of all heads to all tokens of a part of the heads, and back (Jacobs et al. 2023).

Ranks that have a part of the heads each are neighbours in a line. They exchange what each has of the other's heads.
What then goes on is the attention of a ring, or of one process. Where the heads are not cut nothing is done.

Axes: T tokens, H query heads, K key/value heads, D width; `...` is batch.
"""

from funcmha._arrays import Array, full, namespace, of_heads, unset

from .comm import contiguous
from .line import Line
from .ring import Problem


def to_heads(line: Line, problem: Problem) -> Problem:
    """That of this rank's heads and all tokens of its part of the ring"""
    if line.layout.heads == 1:
        return problem
    q, k, v, bias, sink, x, T, S, _ = problem
    H, K = num_heads(q, k)
    h = line.layout.query_heads(H, K, line.comm.rank)
    return problem._replace(
        q=gather_tokens(line, q, K, T),
        k=gather_tokens(line, k, K, S),
        v=gather_tokens(line, v, K, S),
        bias=None if bias is None else bias.heads(h),
        sink=None if sink is None else sink[h],
        options=x.heads(h),
    )


def num_heads(q: Array, k: Array) -> tuple[int, int]:
    """H and K; 1 where there is no head axis"""
    return (q.shape[-3], k.shape[-3]) if q.ndim > 2 else (1, 1)


def of_all_heads(line: Line, g: Array, x: Array, rank: int, h: slice) -> Array:
    """The gradient of x, which every rank has, from those of each rank's heads h and tokens     as x, or with more axes
    before it
    """
    if line.comm.size == 1:
        return g
    if line.layout.heads > 1:
        whole = full((*g.shape[: g.ndim - x.ndim], *x.shape), 0.0, g)
        own = of_heads(whole, h, rank)  # a view
        own += g
        g = whole
    return line.comm.all_reduce(contiguous(g))


def gather_tokens(line: Line, x: Array, K: int, n: int) -> Array:
    """x (..., H, T of this rank, D), or None   →   (..., its heads, T of its part of the ring, D)     of n tokens"""
    if x is None or line.layout.heads == 1:
        return x
    layout, rank, H = line.layout, line.comm.rank, x.shape[-3]
    own = layout.query_heads(H, K, rank)
    first = rank - line.heads.rank
    out = [
        unset((*x.shape[:-3], own.stop - own.start, layout.num_tokens(n, first + r), x.shape[-1]), x)
        for r in range(layout.heads)
    ]
    parts = [contiguous(x[..., layout.query_heads(H, K, first + r), :, :]) for r in range(layout.heads)]
    line.heads.all_to_all(parts, out)
    return namespace(x).concat(out, axis=-2)


def gather_heads(line: Line, x: Array, H: int, K: int, n: int) -> Array:
    """x (..., its heads, T of its part of the ring, D)   →   (..., H, T of this rank, D): inverse and adjoint of it"""
    if line.layout.heads == 1:
        return x
    layout, rank = line.layout, line.comm.rank
    first, start, parts, out = rank - line.heads.rank, 0, [], []
    for r in range(layout.heads):
        stop = start + layout.num_tokens(n, first + r)
        parts.append(contiguous(x[..., start:stop, :]))
        h = layout.query_heads(H, K, first + r)
        out.append(unset((*x.shape[:-3], h.stop - h.start, layout.num_tokens(n, rank), x.shape[-1]), x))
        start = stop
    line.heads.all_to_all(parts, out)
    return namespace(x).concat(out, axis=-3)
