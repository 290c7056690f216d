"""Attention of a piece of the queries and a piece of the keys, and its gradient within the whole.

The forward of a piece is an engine's. Its sums are kept with a shift that is a whole power of two, so that pieces are
joined, and exponentials made again, without a rounding of large scores:

    o = Σ 2^(s − shift) v / total      total = Σ 2^(s − shift)      s = log₂e · score

The gradient takes p = 2^(s − shift) / total and δ = Σ p dp of all keys: for NumPy arrays by the tiled engine, for
others in blocks by the scores of the specification. Where one key has more than half of the weight of a row, its dz is
known before: it is what all others leave.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Iterator
from math import e as euler
from math import log, log2, prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arguments import Bias, Options, values_of
from funcmha._arrays import Array, Sum, arange, full, namespace
from funcmha.engines import BATCHED, TILED, attention_weights, pick_for
from funcmha.engines.tiled.attention import in_range, plan_of, row_sums, some_keys_vjp
from funcmha.engines.tiled.cache import AttentionCache, Rest
from funcmha.engines.tiled.tiles import BOUND
from funcmha.masks import Range, dense
from funcmha.masks.zero import zero_masked_queries, zero_unattended, zero_unattended_keys
from funcmha.ops import drop, per_key_head, per_query_head, scores, scores_vjp

LOG2E, LN2 = log2(euler), log(2)
INF = float("inf")
PLAN = TILED.plan._replace(few_queries=0)  # type: ignore[union-attr]  # whose sums tiles make again, to the bit


# ── sums over keys ───────────────────────────────────────────────────────────────────────────────────────────────


class Sums(NamedTuple):
    o: Array  # (..., H, T, E)
    total: Array  # (..., H, T), 0 where no key is attended
    shift: Array  # (..., H, T)
    key: Array  # (..., H, T), integers: the only key that may have more than half of the weight, −1 for none
    share: Array  # (..., H, T), and its weight at most

    @property
    def lse(self) -> Array:
        """log Σ exp(score), rounded once"""
        xp, some = namespace(self.total), self.total != 0
        wide = LN2 * xp.astype(self.shift, xp.float64) + xp.log(xp.astype(xp.where(some, self.total, 1.0), xp.float64))
        return xp.astype(xp.where(some, wide, -INF), self.total.dtype)

    @property
    def dominant(self) -> Array:
        """The keys with more than half of the weight, −1 for none: some with less, but over a quarter, among them"""
        return namespace(self.key).where(self.share > 0.5, self.key, -1)

    def rows(self, i: slice) -> "Sums":
        """Of these queries, as views"""
        return Sums(self.o[..., i, :], *(a[..., i] for a in self[1:]))

    def become(self, new: "Sums") -> None:
        """Overwrite what these are views of"""
        for mine, other in zip(self, new, strict=True):
            mine[...] = other

    def with_keys(self, tokens: range) -> "Sums":
        """The same, whose keys are 0, 1, … of these"""
        xp = namespace(self.key)
        return self._replace(key=xp.where(self.key < 0, -1, tokens.start + tokens.step * self.key))


def nothing(q: Array, E: int) -> Sums:
    """Of no keys, for queries like q"""
    rows = tuple(q.shape[:-1])
    return weightless(full((*rows, E), 0.0, q), full(rows, 0.0, q), full(rows, 0.0, q))


def weightless(o: Array, total: Array, shift: Array) -> Sums:
    """Sums of which no key has more than half"""
    xp, none = namespace(o), full(tuple(total.shape), 0.0, o)
    return Sums(o, total, shift, xp.astype(none - 1.0, xp.int64), none)


def joined(a: Sums, b: Sums) -> Sums:
    """Of two disjoint sets of keys"""
    xp = namespace(a.o)
    shift = xp.maximum(xp.where(a.total == 0, b.shift, a.shift), xp.where(b.total == 0, a.shift, b.shift))
    of_a, of_b = (x.total * 2.0 ** xp.where(x.total == 0, 0.0, x.shift - shift) for x in (a, b))
    total = of_a + of_b
    some = xp.where(total == 0, 1.0, total)
    of_a, of_b, more = of_a / some, of_b / some, of_b > of_a  # which of them may have a key with more than half of all
    key, share = xp.where(more, b.key, a.key), xp.where(more, of_b * b.share, of_a * a.share)
    return Sums(of_a[..., None] * a.o + of_b[..., None] * b.o, total, shift, key, share)


def of_log(x: Array) -> tuple[Array, Array]:
    """total and shift of exp(x), which may be 0"""
    xp = namespace(x)
    twos = LOG2E * xp.where(x == -INF, 0.0, x)
    shift = xp.floor(twos)
    return xp.where(x == -INF, 0.0, 2.0 ** (twos - shift)), shift


# ── a piece ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Piece(NamedTuple):
    """Queries and keys in the dtype computed with, and what is theirs of the bias and the options."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Bias
    options: Options

    @property
    def in_tiles(self) -> bool:
        """Whether the tiled engine is the fastest for them"""
        return pick_for(self.q, self.k).name == TILED.name

    def in_range(self) -> "Piece":
        """With a bias that stays finite times log₂e"""
        return self if self.bias is None else self._replace(bias=self.bias.map(in_range))


class Cotangents(NamedTuple):
    """What the gradient of some queries takes beside a piece of their keys."""

    all_keys: Sums
    do: Array  # (..., H, T, E), 0 at fully masked queries
    r: Array  # (..., H, T), dlse − δ
    dweights: Array = None  # (..., H, T, S), of the keys of the piece
    dominant: Array = (
        None  # (..., H, T), the dominant key, counted among those of the piece, −1 for none; None in no row
    )
    dz: Array = None  # (..., H, T), what it gets


def select(bias: Bias, x: Options, rows: range, cols: range, mask: Any, T: int) -> tuple[Bias, Options]:
    """The bias and the options for these of the T queries and these keys, whose mask this is"""
    bias = None if bias is None else bias.select(rows, cols, T)
    return bias, x._replace(mask=mask, dropout=None if x.dropout is None else x.dropout.select(rows, cols))


def attend(piece: Piece) -> Sums:
    """The sums of its keys"""
    piece = piece.in_range()
    if not piece.in_tiles:
        return _attend_in_blocks(piece)
    o, cache = TILED.attend(*piece[:4], None, piece.options, PLAN)
    key = cache.rest.dominant.astype(np.int64)
    return Sums(o, cache.rest.row_sum, cache.rest.row_max, key, (key >= 0).astype(o.dtype))


def attend_vjp(piece: Piece, y: Cotangents) -> tuple[Array, Array, Array, Bias]:
    """dq, dk, dv, dbias of its keys"""
    piece = piece.in_range()
    if not piece.in_tiles:
        return _attend_in_blocks_vjp(piece, y)
    dz = np.zeros_like(y.r) if y.dz is None else y.dz
    dq, dk, dv, dbias = some_keys_vjp(_tiles(piece, y.all_keys, y.dominant), y.do, y.dweights, y.r, dz)
    return dq, dk, dv, dbias


def sum_dz(piece: Piece, y: Cotangents) -> Array:
    """Σ dz (..., H, T) over its keys but the dominant ones"""
    piece = piece.in_range()
    if not piece.in_tiles:
        return _sum_dz_in_blocks(piece, y)
    return row_sums(_tiles(piece, y.all_keys, y.dominant), y.do, y.dweights, y.r)


def weights(piece: Piece, all_keys: Sums) -> Array:
    """p (..., H, T, S) of its keys"""
    piece = piece.in_range()
    if not piece.in_tiles:
        return _weights_in_blocks(piece, all_keys)
    return attention_weights(_tiles(piece, all_keys, None))


def _tiles(piece: Piece, all_keys: Sums, dominant: Array) -> AttentionCache:
    """The cache of the tiled engine, with the sums of all keys; of its o, of which it takes δ, nothing but the shape"""
    (q, k, v, bias, x), (o, total, shift, *_) = piece, all_keys
    q, k, v = zero_unattended(q, k, v, x.mask)
    no_o = np.broadcast_to(o.dtype.type(0), o.shape)
    dominant = np.broadcast_to(np.int64(-1), total.shape) if dominant is None else dominant
    options = x.mask, x.dropout, x.scale, x.softcap
    shifted = bool(shift.any()) or not _small(q, k, bias, x)
    rest = Rest(bias, None, no_o, total, shift, dominant, shifted, *options, k.shape[-2], plan_of(PLAN, q, k, x.mask))
    return rest.with_qkv(q, np.ascontiguousarray(k), v)


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
    piece: Piece  # of these, with values of 0 at unattended keys
    mask: Array  # booleans, or None

    def scores(self) -> tuple[Array, Any]:
        """z (..., H, R, N), and the cache of them"""
        q, k, _, bias, x = self.piece
        options = {name: getattr(x, name) for name in ("mask", "scale", "softcap")}
        return scores(q, k, None if bias is None else bias.given, **options)

    def drop(self, p: Array) -> Array:
        """p ⊙ keep / (1 − rate)"""
        dropout = self.piece.options.dropout
        return p if dropout is None else drop(p, dropout.dense(tuple(p.shape), self.piece.q), dropout.rate)

    def weights(self, all_keys: Sums) -> tuple[Array, Any]:
        """p = 2^(s − shift) / total (..., H, R, N), and the cache of the scores"""
        z, cache = self.scores()
        xp, (_, total, shift, *_) = namespace(z), all_keys.rows(slice(*self.rows))
        return xp.exp(z - (LN2 * shift)[..., None]) / xp.where(total == 0, 1.0, total)[..., None], cache

    def cotangents(self, p: Array, y: Cotangents) -> tuple[Array, Array]:
        """do (..., H, R, E), and dz = p (dp − δ + dlse) (..., H, R, N), that of dominant keys as well"""
        i, j, xp, v = slice(*self.rows), slice(*self.cols), namespace(p), self.piece.v
        do = zero_masked_queries(y.do[..., i, :], self.mask)
        dp = self.drop(do @ xp.matrix_transpose(per_query_head(v, do)))
        dp = dp if y.dweights is None else dp + xp.where(p == 0, 0.0, y.dweights[..., i, j])
        return do, xp.where(p == 0, 0.0, p * (dp + y.r[..., i, None]))

    def with_dominant(self, dz: Array, y: Cotangents, value: Any) -> Array:
        """dz with `value` (..., H, R, 1) at the dominant keys"""
        if y.dominant is None:
            return dz
        cols = arange(dz.shape[-1], dz) + self.cols[0]
        return namespace(dz).where(cols == y.dominant[..., slice(*self.rows), None], value, dz)


def _blocks(piece: Piece) -> Iterator[_Block]:
    q, k, v, bias, x = piece
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
            yield _Block(rows, cols, Piece(q[..., slice(*rows), :], *of_keys, part, own), allowed)


def _attend_in_blocks(piece: Piece) -> Sums:
    """`attend` for any array library, a block of scores at a time"""
    q, all_keys, xp = piece.q, nothing(piece.q, piece.v.shape[-1]), namespace(piece.q)
    for block in _blocks(piece):
        z, _ = block.scores()
        largest = xp.argmax(z, axis=-1, keepdims=True)
        top = xp.take_along_axis(z, largest, axis=-1)
        shift = xp.floor(LOG2E * xp.where(top == -INF, 0.0, top))
        e = xp.exp(z - LN2 * shift)
        total = xp.sum(e, axis=-1)
        some = xp.where(total == 0, 1.0, total)
        o = block.drop(e) @ per_query_head(block.piece.v, q) / some[..., None]
        share = xp.take_along_axis(e, largest, axis=-1)[..., 0] / some
        key = xp.where(share > 0.5, xp.astype(largest[..., 0], xp.int64) + block.cols[0], -1)
        rows = all_keys.rows(slice(*block.rows))
        rows.become(joined(rows, Sums(o, total, shift[..., 0], key, share)))
    return all_keys


def _attend_in_blocks_vjp(piece: Piece, y: Cotangents) -> tuple[Array, Array, Array, Bias]:
    """`_attend_in_blocks` from the bottom up"""
    bias, (dq, dk, dv) = piece.bias, (Sum(tuple(a.shape), a) for a in piece[:3])
    dbias = None if bias is None else Sum(tuple(bias.values.shape), bias.values)
    for block in _blocks(piece):
        p, cache = block.weights(y.all_keys)
        do, dz = block.cotangents(p, y)
        dz = block.with_dominant(dz, y, None if y.dz is None else y.dz[..., slice(*block.rows), None])
        part_q, part_k, part_bias = scores_vjp(cache, dz)
        part_v = per_key_head(namespace(p).matrix_transpose(block.drop(p)) @ do, block.piece.v)
        for total, some, grad in ((dq, block.rows, part_q), (dk, block.cols, part_k), (dv, block.cols, part_v)):
            total.add((some, (0, grad.shape[-1])), grad)
        if dbias is not None:
            dbias.add(bias.place(block.rows, block.cols, piece.q.shape[-2]), values_of(part_bias))
    return dq.total(), dk.total(), dv.total(), None if dbias is None else bias._replace(values=dbias.total())


def _sum_dz_in_blocks(piece: Piece, y: Cotangents) -> Array:
    total = full(tuple(y.r.shape), 0.0, y.r)
    for block in _blocks(piece):
        _, dz = block.cotangents(block.weights(y.all_keys)[0], y)
        rows = total[..., slice(*block.rows)]  # a view
        rows += namespace(dz).sum(block.with_dominant(dz, y, 0.0), axis=-1)
    return total


def _weights_in_blocks(piece: Piece, all_keys: Sums) -> Array:
    p = Sum((*piece.q.shape[:-1], piece.k.shape[-2]), piece.q)
    for block in _blocks(piece):
        p.add((block.rows, block.cols), block.weights(all_keys)[0])
    return p.total()
