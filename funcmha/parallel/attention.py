"""Attention of tokens that are on many ranks, and its gradient: `funcmha.attention` whose arrays are each rank's part.

Axes: T queries and S keys of this rank, H query heads, K key/value heads, D query/key width, E value width; `...` is
batch.
"""

from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import _check
from funcmha._arguments import (
    AttentionOptions,
    Bias,
    Options,
    check_attention,
    check_names,
    name_of,
    takes,
    values_of,
)
from funcmha._arrays import Array, downcast, dtype_name, full, namespace, own, upcast
from funcmha.biases import as_bias
from funcmha.engines import attention_weights, log_sum_exp
from funcmha.ops import round_bias

from . import ring
from .agreement import Facts, agree, described
from .comm import Comm
from .heads import gather_heads, gather_tokens, num_heads, of_all_heads, to_heads
from .line import Line, check_heads


class AttentionCache(NamedTuple):
    q: Array  # (..., H, T, D) of this rank, as it came
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Bias  # of all ranks, broadcasts to (..., H, all T, all S), or None
    sink: Array  # (H,), or () without a head axis, or None
    lse: Array  # (..., H, T) of this rank
    of_heads: Any  # the cache of this rank's heads
    T: int  # of all ranks
    S: int
    line: Line


@takes(AttentionOptions)
def attention(
    line: Line, q: Array, k: Array, v: Array, bias: Any = None, sink: Array = None, /,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, AttentionCache]:  # fmt: skip
    """o = dropout(softmax(softcap · tanh(scale · q kᵀ / softcap) + bias, sink)) v     over the keys of all ranks
    q (..., H, T, D)   k (..., K, S, D)   v (..., K, S, E)   →   o (..., H, T, E)     of this rank's tokens

    q, k and v are this rank's part, x[..., line.positions(n), :] of what one process would have. Everything else is of
    all tokens, and the same on every rank: `bias` broadcasts to all queries and keys, masks and `dropout.seeded` go by
    the positions of tokens, and draw the same bits on any number of ranks. Options are those of `funcmha.attention`.

    A ring keeps O(H T) numbers beside its part, and receives those parts of keys and values that its mask needs. On one
    rank the bits are those of `funcmha.attention`. Half types travel as they are; sums, and the gradients of keys and
    values on their way, are float32. `attention_weights(cache)` is (..., H, T, S of all ranks), for which keys go round
    once more: all ranks ask for it.

    Raises on every rank what `funcmha.attention` would raise on any, and ValueError where arguments differ between
    ranks, before any array is sent. Liu, Zaharia and Abbeel 2023; Jacobs et al. 2023 for parts of the heads.
    """
    T, S, x = agreed(line, q, k, v, bias, sink, options)
    bias, dtype = as_bias(bias), q.dtype
    bias = None if bias is None else bias.map(upcast)
    problem = to_heads(line, ring.Problem(q, k, v, bias, upcast(sink), x, T, S))
    own_o, of_heads = ring.attend(line.ring, line.layout, problem)
    o = gather_heads(line, downcast(own_o, dtype), *num_heads(q, k), T)
    lse = gather_heads(line, ring.log_sum_exp(of_heads)[..., None], *num_heads(q, k), T)[..., 0]
    return o, AttentionCache(q, k, v, bias, sink, lse, of_heads, T, S, line)


def attention_vjp(
    cache: AttentionCache, do: Array, /, *, dweights: Array = None, dlse: Array = None, batch_axes: int = 0
) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink: `attention` from the bottom up, on all ranks together
    from the cotangents of o (..., H, T, E) and, where given, of the weights (..., H, T, S of all ranks) and lse
    (..., H, T), of this rank's tokens

    dq, dk and dv are of this rank's part; dbias and dsink are those of all tokens, and the same on every rank. dsink is
    (H,), or with batch_axes=n it keeps the first n axes of the batch before it. Keys and values go round once; once
    more before that for a cotangent of weights, and where a row has a key with more than half of its weight.
    """
    _check.cache(cache, AttentionCache, "parallel.attention")
    q, k, v, bias, sink, _, of_heads, T, S, line = cache
    agree_on_cotangents(line.comm, do, dweights, dlse, batch_axes, q, (*q.shape[:-1], v.shape[-1]), S)
    H, K = num_heads(q, k)
    own_do, own_dweights = (upcast(gather_tokens(line, a, K, T)) for a in (do, dweights))
    own_dlse = None if dlse is None else upcast(gather_tokens(line, dlse[..., None], K, T)[..., 0])
    dq, dk, dv, dbias, dsink, _ = ring.attend_vjp(
        of_heads, own_do, dweights=own_dweights, dlse=own_dlse, batch_axes=batch_axes
    )
    lengths, h = ((dq, H, T), (dk, K, S), (dv, K, S)), line.layout.query_heads(H, K, line.comm.rank)
    dq, dk, dv = (gather_heads(line, downcast(g, do.dtype), heads, K, n) for g, heads, n in lengths)
    dbias = None if bias is None else bias._replace(values=of_all_heads(line, dbias.values, bias.values, bias.rank, h))
    dsink = None if sink is None else of_all_heads(line, dsink, sink, 1, h)
    return dq, dk, dv, round_bias(dbias, do.dtype), downcast(dsink, do.dtype)


@log_sum_exp.register
def _(cache: AttentionCache, /) -> Array:
    return own(cache.lse, cache.lse)


@attention_weights.register
def _(cache: AttentionCache, /) -> Array:
    p = ring.attention_weights(cache.of_heads)
    return gather_heads(cache.line, p, *num_heads(cache.q, cache.k), cache.T)


def agreed(line: Line, q: Array, k: Array, v: Array, bias: Any, sink: Array, options: Any) -> tuple[int, int, Options]:
    """The tokens of all ranks, and the options, checked on all of them"""
    check_line(line)

    def local() -> tuple[Facts, tuple[int, int]]:
        check_names(options, AttentionOptions)
        check_attention(q, k, v, None, sink, {name: options.get(name) for name in ("scale", "softcap")})
        check_real("q", q)
        arrays = {"q": q, "k": k, "v": v}
        facts = {name: _of_any_length(x) for name, x in arrays.items()}
        given = as_bias(bias)
        facts |= {"line": str(line.layout), name_of(given): described(values_of(given)), "sink": described(sink)}
        return facts | {name: described(x) for name, x in options.items()}, (q.shape[-2], k.shape[-2])

    lengths = agree(line.comm, local)
    T, S = check_lengths(line, lengths, ("q", "k"))
    _, x = check_attention(whole_of(q, T), whole_of(k, S), whole_of(v, S), bias, sink, options)
    if line.layout.heads > 1:
        if q.ndim < 3:
            raise ValueError(f"q must be (..., H, T, D) for ranks that have a part of the heads, got {tuple(q.shape)}")
        check_heads(line.layout, q.shape[-3], k.shape[-3])
    return T, S, x


def agree_on_cotangents(
    comm: Comm, do: Array, dweights: Array, dlse: Array, batch_axes: int, q: Array, o: tuple[int, ...], S: int
) -> None:
    """Raise on all ranks unless the cotangents fit on all."""

    def local() -> tuple[Facts, tuple[int, ...]]:
        like = upcast(q[..., :0])
        _check.cotangent("do", do, o, like, "... H T E")
        _check.cotangent("dweights", dweights, (*o[:-1], S), like, "... H T S", optional=True)
        _check.cotangent("dlse", dlse, o[:-1], like, "... H T", optional=True)
        _check.batch_axes(batch_axes, max(len(o) - 3, 0))
        return facts_of(do=do, dweights=dweights, dlse=dlse) | {"batch_axes": str(batch_axes)}, ()

    agree(comm, local)


def facts_of(**cotangents: Array) -> Facts:
    """What must be the same of cotangents, whose numbers are of each rank"""
    return {name: "None" if a is None else f"an array of {a.dtype}" for name, a in cotangents.items()}


def check_line(line: Any) -> None:
    """Raise TypeError unless it is a `Line`."""
    if not isinstance(line, Line):
        raise TypeError(f"line must be a Line of funcmha.parallel, got {type(line).__name__}")


def check_real(name: str, x: Array) -> None:
    """Raise TypeError for complex numbers, which are for checks in one process."""
    if "complex" in dtype_name(x):
        raise TypeError(f"{name} must be real on many ranks, got {x.dtype}")


def check_lengths(line: Line, lengths: np.ndarray, names: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens of all ranks; ValueError unless each has those that the line gives it"""
    totals = tuple(int(n) for n in lengths.sum(axis=0))
    for name, total, of_ranks in zip(names, totals, lengths.T, strict=True):
        for rank, n in enumerate(of_ranks):
            wanted = line.layout.num_tokens(total, rank)
            if n != wanted:
                raise ValueError(
                    f"{name} must be {name}[..., line.positions({total}), :], {wanted} of {total} tokens on "
                    f"rank {rank}, got {n}"
                )
    return totals


def whole_of(x: Array, n: int) -> Array:
    """An array that stands for x of all ranks in checks, n tokens of it: no memory"""
    return namespace(x).broadcast_to(full((1,), 0.0, x), (*x.shape[:-2], n, x.shape[-1]))


def _of_any_length(x: Array) -> str:
    shape = [str(n) for n in x.shape]
    return f"({', '.join([*shape[:-2], 'any', shape[-1]])}) of {x.dtype}"
