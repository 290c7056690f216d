"""Attention of a piece of the queries and a piece of the keys, and its gradient within the whole.

The forward of a piece is an engine's. Its sums are kept with a shift that is a whole power of two, so that pieces are
joined, and exponentials made again, without a rounding of large scores:

    o = Σ 2^(s − shift) v / total      total = Σ 2^(s − shift)      s = log₂e · score

The gradient takes p = 2^(s − shift) / total and δ = Σ do · o of all keys: for NumPy arrays by the tiled engine, for
others in blocks by the scores of the specification.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Iterator
from math import e as euler
from math import log, log2, prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias, Options, values_of
from funcmha._arrays import Array, Sum, full, namespace
from funcmha.biases import RelativeBias, as_bias
from funcmha.engines import BATCHED, TILED, pick
from funcmha.engines.tiled.attention import attention_vjp as tiled_attention_vjp
from funcmha.engines.tiled.attention import in_range
from funcmha.engines.tiled.cache import Rest
from funcmha.engines.tiled.tiles import BOUND
from funcmha.masks import Range, dense
from funcmha.masks.zero import zero_masked_queries, zero_unattended, zero_unattended_keys
from funcmha.ops import drop, per_key_head, per_query_head, scores, scores_vjp

LOG2E, LN2 = log2(euler), log(2)
INF = float("inf")
PLAN = TILED.plan._replace(few_queries=0)  # type: ignore[union-attr]  # whose sums tiles make again, to the bit


class Sums(NamedTuple):
    o: Array  # (..., H, T, E)
    total: Array  # (..., H, T), 0 where no key is attended
    shift: Array  # (..., H, T)

    @property
    def lse(self) -> Array:
        """log Σ exp(score), rounded once"""
        xp, some = namespace(self.total), self.total != 0
        wide = LN2 * xp.astype(self.shift, xp.float64) + xp.log(xp.astype(xp.where(some, self.total, 1.0), xp.float64))
        return xp.astype(xp.where(some, wide, -INF), self.total.dtype)

    def rows(self, i: slice) -> "Sums":
        """Of these queries, as views"""
        return Sums(self.o[..., i, :], self.total[..., i], self.shift[..., i])

    def become(self, new: "Sums") -> None:
        """Overwrite what these are views of"""
        for mine, other in zip(self, new, strict=True):
            mine[...] = other


def nothing(q: Array, E: int) -> Sums:
    """Of no keys, for queries like q"""
    rows = tuple(q.shape[:-1])
    return Sums(full((*rows, E), 0.0, q), full(rows, 0.0, q), full(rows, 0.0, q))


def joined(a: Sums, b: Sums) -> Sums:
    """Of two disjoint sets of keys"""
    xp = namespace(a.o)
    shift = xp.maximum(xp.where(a.total == 0, b.shift, a.shift), xp.where(b.total == 0, a.shift, b.shift))
    of_a, of_b = (x.total * 2.0 ** xp.where(x.total == 0, 0.0, x.shift - shift) for x in (a, b))
    total = of_a + of_b
    some = xp.where(total == 0, 1.0, total)
    return Sums((of_a / some)[..., None] * a.o + (of_b / some)[..., None] * b.o, total, shift)


def of_log(x: Array) -> tuple[Array, Array]:
    """total and shift of exp(x), which may be 0"""
    xp = namespace(x)
    twos = LOG2E * xp.where(x == -INF, 0.0, x)
    shift = xp.floor(twos)
    return xp.where(x == -INF, 0.0, 2.0 ** (twos - shift)), shift


# ── a piece of a problem ─────────────────────────────────────────────────────────────────────────────────────────


def bias_place(bias: Any, rows: range, cols: range, T: int) -> tuple[Any, ...]:
    """Where in the values of a bias those of these of the T queries and keys are"""
    if isinstance(bias, RelativeBias):
        first = cols[0] - rows[-1] + T - 1
        return (..., slice(first, cols[-1] - rows[0] + T, rows.step))
    n = min(bias.values.ndim, 2)
    sizes = tuple(bias.values.shape)[bias.values.ndim - n :]
    some = ((rows, cols)[2 - n + axis] for axis in range(n))
    return (..., *(slice(None) if size == 1 else _slice(a) for a, size in zip(some, sizes, strict=True)))


def of_piece(bias: Bias, x: Options, rows: range, cols: range, mask: Any, T: int) -> tuple[Bias, Options]:
    """The bias and the options for these queries and keys"""
    bias = None if bias is None else type(bias)(bias.values[bias_place(bias, rows, cols, T)])
    return bias, x._replace(mask=mask, dropout=None if x.dropout is None else x.dropout.select(rows, cols))


def _slice(a: range) -> slice:
    return slice(a.start, a[-1] + 1, a.step)


# ── its attention ────────────────────────────────────────────────────────────────────────────────────────────────


def attend(q: Array, k: Array, v: Array, bias: Bias, x: Options) -> Sums:
    """The sums of these keys, of arguments that are checked and upcast"""
    bias = None if bias is None else bias.map(in_range)
    if not _in_tiles(q, k):
        return _attend_in_blocks(q, k, v, bias, x)
    o, cache = TILED.attend(q, k, v, bias, None, x, PLAN)
    return Sums(o, cache.rest.row_sum, cache.rest.row_max)


def attend_vjp(
    q: Array, k: Array, v: Array, bias: Bias, x: Options, all_keys: Sums, do: Array, r: Array
) -> tuple[Array, Array, Array, Bias]:
    """dq, dk, dv, dbias of these keys, from the sums of all keys and r = dlse − δ (..., H, T)"""
    bias = None if bias is None else bias.map(in_range)
    vjp = _tiles_vjp if _in_tiles(q, k) else _attend_in_blocks_vjp
    return vjp(q, k, v, bias, x, all_keys, do, r)


def _in_tiles(q: Array, k: Array) -> bool:
    """Whether the tiled engine is the fastest for them"""
    return pick(None, q, max(q.shape[-2], k.shape[-2])).name == TILED.name


def _tiles_vjp(
    q: Array, k: Array, v: Array, bias: Bias, x: Options, all_keys: Sums, do: Array, r: Array
) -> tuple[Array, Array, Array, Bias]:
    """By the tiled engine, whose cache says what the sums are: it takes δ from o, here 0, and adds dlse, here r"""
    q, k, v = zero_unattended(q, k, v, x.mask)
    o, total, shift = all_keys
    no_o, no_key = np.broadcast_to(o.dtype.type(0), o.shape), np.broadcast_to(np.int32(-1), total.shape)
    options = x.mask, x.dropout, x.scale, x.softcap
    shifted = bool(shift.any()) or not _small(q, k, bias, x)
    rest = Rest(bias, None, no_o, total, shift, no_key, shifted, *options, k.shape[-2], PLAN)
    dq, dk, dv, dbias, _ = tiled_attention_vjp(rest.with_qkv(q, np.ascontiguousarray(k), v), do, dlse=r)
    return dq, dk, dv, as_bias(dbias)


def _small(q: Array, k: Array, bias: Bias, x: Options) -> bool:
    """Whether no score needs a shift, one that the mask forbids neither: |s| ≤ |q| |k| scale log₂e ≤ BOUND"""
    if bias is not None or x.softcap is not None:
        return False
    longest = (np.einsum("...d,...d->...", a, a).max(initial=0.0) ** 0.5 for a in (q, k))
    return bool(prod(longest) * np.abs(x.scale).max() * LOG2E <= BOUND)


# ── by blocks, for any array library ─────────────────────────────────────────────────────────────────────────────


class _Block(NamedTuple):
    rows: Range
    cols: Range
    q: Array  # (..., H, R, D)
    k: Array  # (..., K, N, D)
    v: Array  # (..., K, N, E), 0 at unattended keys
    bias: Bias
    options: Options
    mask: Array  # booleans, or None

    def scores(self) -> tuple[Array, Any]:
        """z (..., H, R, N), and the cache of them"""
        bias = None if self.bias is None else self.bias.given
        return scores(
            self.q, self.k, bias, **{name: getattr(self.options, name) for name in ("mask", "scale", "softcap")}
        )

    def drop(self, p: Array) -> Array:
        """p ⊙ keep / (1 − rate)"""
        dropout = self.options.dropout
        return p if dropout is None else drop(p, dropout.dense(tuple(p.shape), self.q), dropout.rate)


def _blocks(q: Array, k: Array, v: Array, bias: Bias, x: Options) -> Iterator[_Block]:
    (T, S), number = (q.shape[-2], k.shape[-2]), q.dtype.itemsize * prod(q.shape[:-2])
    height, width = BATCHED.plan.block(number, T, S, isinstance(q, np.ndarray))  # type: ignore[union-attr]
    for i in range(0, T, max(height, 1)):
        for j in range(0, S, max(width, 1)):
            rows, cols = (i, min(i + height, T)), (j, min(j + width, S))
            part = None if bias is None else bias.part(rows, cols, T)
            mask = None if x.mask is None else x.mask.part(rows, cols)
            own = x._replace(mask=mask, dropout=None if x.dropout is None else x.dropout.part(rows, cols))
            allowed = dense(mask, rows[1] - i, cols[1] - j, q)
            of_keys = k[..., slice(*cols), :], zero_unattended_keys(v[..., slice(*cols), :], allowed)
            yield _Block(rows, cols, q[..., slice(*rows), :], *of_keys, part, own, allowed)


def _attend_in_blocks(q: Array, k: Array, v: Array, bias: Bias, x: Options) -> Sums:
    """`attend` for any array library, a block of scores at a time"""
    all_keys, xp = nothing(q, v.shape[-1]), namespace(q)
    for block in _blocks(q, k, v, bias, x):
        z, _ = block.scores()
        top = xp.max(z, axis=-1)
        shift = xp.floor(LOG2E * xp.where(top == -INF, 0.0, top))
        e = xp.exp(z - (LN2 * shift)[..., None])
        total = xp.sum(e, axis=-1)
        o = block.drop(e) @ per_query_head(block.v, q) / xp.where(total == 0, 1.0, total)[..., None]
        rows = all_keys.rows(slice(*block.rows))
        rows.become(joined(rows, Sums(o, total, shift)))
    return all_keys


def _attend_in_blocks_vjp(
    q: Array, k: Array, v: Array, bias: Bias, x: Options, all_keys: Sums, do: Array, r: Array
) -> tuple[Array, Array, Array, Bias]:
    """`_attend_in_blocks` from the bottom up"""
    dq, dk, dv = (Sum(tuple(a.shape), a) for a in (q, k, v))
    dbias = None if bias is None else Sum(tuple(bias.values.shape), bias.values)
    for block in _blocks(q, k, v, bias, x):
        i = slice(*block.rows)
        *grads, dpart = _block_vjp(block, all_keys.rows(i), do[..., i, :], r[..., i])
        for total, some, grad in zip((dq, dk, dv), (block.rows, block.cols, block.cols), grads, strict=True):
            total.add((some, (0, grad.shape[-1])), grad)
        if dbias is not None:
            dbias.add(bias.place(block.rows, block.cols, q.shape[-2]), values_of(dpart))
    return dq.total(), dk.total(), dv.total(), None if dbias is None else bias._replace(values=dbias.total())


def _block_vjp(block: _Block, all_keys: Sums, do: Array, r: Array) -> tuple[Array, Array, Array, Any]:
    """dq, dk, dv, dbias of o = dropout(p) v   with   p = 2^(s − shift) / total"""
    xp = namespace(do)
    total = xp.where(all_keys.total == 0, 1.0, all_keys.total)
    z, cache = block.scores()
    p = xp.exp(z - (LN2 * all_keys.shift)[..., None]) / total[..., None]
    do = zero_masked_queries(do, block.mask)
    dv = per_key_head(xp.matrix_transpose(block.drop(p)) @ do, block.v)
    dp = block.drop(do @ xp.matrix_transpose(per_query_head(block.v, do)))
    dq, dk, dbias = scores_vjp(cache, xp.where(p == 0, 0.0, p * (dp + r[..., None])))
    return dq, dk, dv, dbias
