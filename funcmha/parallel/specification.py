"""The specification of attention on many ranks: parts of the keys one after another, merged, and the same backwards.

Every rank gathers the keys and values of all, attends each part with `funcmha.attention`, and merges what comes out
with `funcmha.merge`. It keeps the cache of every part: memory O(S). `parallel.attention` computes the same, and is
compared with this. A row that one key dominates keeps its digits here.

Axes: T queries and S keys of this rank, H query heads, K key/value heads, D query/key width, E value width; `...` is
batch.
"""

from typing import Any, NamedTuple, Unpack

from funcmha import _check, merge
from funcmha._arguments import AttentionOptions, Bias, Options, takes, values_of
from funcmha._arrays import Array, Sum, downcast, full, namespace, own, unset, upcast
from funcmha.biases import as_bias, spelt
from funcmha.engines import attention as engines_attention
from funcmha.engines import attention_vjp as engines_attention_vjp
from funcmha.engines import log_sum_exp
from funcmha.ops import round_bias

from .attention import agree_on_cotangents, agreed
from .comm import Comm, contiguous
from .line import Line, placed
from .pieces import select

INF = float("inf")


class Part(NamedTuple):
    """A piece of this rank's queries and a piece of a rank's keys."""

    rows: range  # tokens
    cols: range
    i: slice  # where the queries are among those of this rank
    rank: int  # whose keys
    j: slice  # where they are among those of that rank
    attention: Any  # its cache
    merge: merge.MergeCache  # of the parts before, and this one


class AttentionCache(NamedTuple):
    parts: tuple[Part, ...]
    of_sink: Any  # the cache of the last merge, or None
    lse: Array  # (..., H, T)
    q: Array  # (..., H, T, D)
    all_k: tuple[Array, ...]  # (..., K, S, D) of each rank
    all_v: tuple[Array, ...]  # (..., K, S, E)
    bias: Bias
    sink: Array
    T: int  # of all ranks
    comm: Comm


@takes(AttentionOptions)
def attention(
    line: Line, q: Array, k: Array, v: Array, bias: Any = None, sink: Array = None, /,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, AttentionCache]:  # fmt: skip
    """o of parts of the keys, merged one after another     as `parallel.attention`"""
    T, S, x = agreed(line, q, k, v, bias, sink, options)
    dtype, bias, q, sink, comm = q.dtype, as_bias(bias), upcast(q), upcast(sink), line.comm
    bias = None if bias is None else bias.map(upcast)
    all_k, all_v = (tuple(map(upcast, _gathered(line, a, S))) for a in (k, v))
    o, lse, parts = full((*q.shape[:-1], v.shape[-1]), 0.0, q), full(tuple(q.shape[:-1]), -INF, q), []
    for rows, i in placed(line.layout.pieces(T, comm.rank)):
        for rank in range(comm.size):
            for cols, j in placed(line.layout.pieces(S, rank)):
                own_bias, own_x = select(bias, x, rows, cols, None if x.mask is None else x.mask.select(rows, cols), T)
                of_part = q[..., i, :], all_k[rank][..., j, :], all_v[rank][..., j, :]
                o_part, cache = engines_attention(
                    *of_part, None if own_bias is None else own_bias.given, **_named(own_x)
                )
                before = o[..., i, :] * 1.0, lse[..., i] * 1.0  # copies: the cache of the merge keeps them
                o[..., i, :], joined = merge.merge(*before, o_part, log_sum_exp(cache))
                lse[..., i] = log_sum_exp(joined)
                parts.append(Part(rows, cols, i, rank, j, cache, joined))
    of_sink = None
    if sink is not None:
        o, of_sink = merge.merge(o, lse, o * 0.0, namespace(q).broadcast_to(sink[..., None], lse.shape))
        lse = log_sum_exp(of_sink)
    return downcast(o, dtype), AttentionCache(tuple(parts), of_sink, lse, q, all_k, all_v, bias, sink, T, comm)


def attention_vjp(cache: AttentionCache, do: Array, /, *, dlse: Array = None) -> tuple[Any, ...]:
    """dq, dk, dv, dbias, dsink: `attention` from the bottom up     as `parallel.attention_vjp`"""
    _check.cache(cache, AttentionCache, "parallel.specification.attention")
    parts, of_sink, lse, q, all_k, all_v, bias, sink, T, comm = cache
    agree_on_cotangents(comm, do, None, dlse, 0, q, (*q.shape[:-1], all_v[comm.rank].shape[-1]), 0)
    dtype, do, xp = do.dtype, own(upcast(do), do), namespace(q)
    dlse, dsink = full(tuple(lse.shape), 0.0, q) if dlse is None else own(upcast(dlse), dlse), None
    if sink is not None:
        do, dlse, _, drows = merge.merge_vjp(of_sink, do, dlse=dlse)
        dsink = comm.all_reduce(xp.sum(drows, axis=(*range(drows.ndim - 1 - sink.ndim), -1)))
    dq, all_dk, all_dv = full(tuple(q.shape), 0.0, q), _zeros(all_k), _zeros(all_v)
    of_bias = None if bias is None else Sum(tuple(bias.values.shape), q)
    for rows, cols, i, rank, j, of_part, joined in reversed(parts):
        do[..., i, :], dlse[..., i], do_part, dlse_part = merge.merge_vjp(joined, do[..., i, :], dlse=dlse[..., i])
        dq_part, dk, dv, dbias_part, _ = engines_attention_vjp(of_part, do_part, dlse=dlse_part)
        for total, part in ((dq[..., i, :], dq_part), (all_dk[rank][..., j, :], dk), (all_dv[rank][..., j, :], dv)):
            total += part
        if of_bias is not None:
            of_bias.add(bias.place(spelt(rows), spelt(cols), T), values_of(dbias_part))
    dk, dv = comm.reduce_scatter(all_dk), comm.reduce_scatter(all_dv)
    dbias = None if of_bias is None else bias._replace(values=comm.all_reduce(of_bias.total()))
    dq, dk, dv, dsink = (downcast(a, dtype) for a in (dq, dk, dv, dsink))
    return dq, dk, dv, round_bias(dbias, dtype), dsink


@log_sum_exp.register
def _(cache: AttentionCache, /) -> Array:
    return own(cache.lse, cache.lse)


def _gathered(line: Line, x: Array, n: int) -> list[Array]:
    """x of every rank"""
    out = [unset((*x.shape[:-2], line.layout.num_tokens(n, r), x.shape[-1]), x) for r in range(line.comm.size)]
    line.comm.all_gather(contiguous(x), out)
    return out


def _zeros(arrays: tuple[Array, ...]) -> list[Array]:
    return [full(tuple(a.shape), 0.0, a) for a in arrays]


def _named(x: Options) -> dict[str, Any]:
    return {name: getattr(x, name) for name in ("mask", "scale", "softcap", "dropout")}
