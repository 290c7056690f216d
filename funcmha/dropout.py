"""Dropout of the weights: by a mask, or by a seed, from which any tile of a mask can be drawn again, by anyone.

    drop = seeded(2024, 0.1)                                     # a value: nothing is drawn, nothing is stored
    o, cache = attention(q, k, v, dropout=drop)
    keep = drop.dense((B, H, T, S))                              # booleans, True = keep
    o, cache = attention(q, k, v, dropout=masked(keep, 0.1))     # the same o
    drop.tile(b, h, (256, 512), (0, 128))                        # keep[b, h, 256:512, 0:128], at the cost of the tile

The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011), a function of a counter and a key. The key is the
seed, and the counter says which element is meant: a boolean depends on the seed and its own place and on nothing else,
not on the tile, the order, the engine, the split of the batch or the number of processes. Take another seed for each
layer and each step.

Axes: T queries, S keys, H heads; `...` is batch, whose elements are the samples.
"""

from math import prod
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._arrays import Array, arange, cut, from_host, in_library_of, namespace, of_heads, repeat, rows_and_columns, words
from .masks import Range

__all__ = ["Masked", "Seeded", "masked", "philox", "seeded"]

LOW = 2**32 - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # the golden ratio and √3 − 1, in 32 bits
AT_ONCE = 2**22  # booleans drawn at a time on a device, from 60 MiB of words
COUNTERS = 4096  # at a time: 32 KiB a word, which the cache holds (256 × 256: 0.54 ms so, 0.62 ms all at once)


def philox(counter: tuple[Array | int, ...], key: tuple[int, int], /) -> tuple[Array, Array, Array, Array]:
    """r = Philox 4x32-10(counter, key)     counter 4 words that broadcast   key 2 words   →   r 4 words of 32 bits

    Words are in [0, 2³²): Python integers, or arrays of uint64 of any library with the operators of the array API, at
    least one of them an array. Bit for bit `philox4x32` with 10 rounds of Random123.
    """
    a, b, c, d = counter
    k0, k1 = key
    for n in range(10):
        p, r = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, c = r >> 32, p >> 32
        if n < 3:  # the words still broadcast; after three rounds each depends on all four
            a, c = a ^ (b ^ k0), c ^ (d ^ k1)
        else:  # in place, which takes half the time
            a ^= b
            a ^= k0
            c ^= d
            c ^= k1
        r &= LOW
        p &= LOW
        b, d = r, p
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return a, b, c, d


def philox_of_halves(counter: tuple[Array, ...], key: tuple[int, int], /) -> tuple[Array, Array, Array, Array]:
    """`philox` of arrays of uint32, which no number here exceeds, and of one shape: products go by halves of 16 bits"""
    keys = np.array([[(k + n * step) & LOW for k, step in zip(key, WEYL, strict=True)] for n in range(10)], np.uint32)
    rounds = from_host(keys, counter[0])

    def again(n: Any, a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
        (p_high, p), (r_high, r) = _product(a, MULTIPLIERS[0]), _product(c, MULTIPLIERS[1])
        return r_high ^ b ^ rounds[n, 0], r, p_high ^ d ^ rounds[n, 1], p

    return repeat(10, again, counter)


def _product(a: Array, m: int) -> tuple[Array, Array]:
    """The high and the low word of a m"""
    low, high, m_low, m_high = a & 0xFFFF, a >> 16, m & 0xFFFF, m >> 16
    first = low * m_low
    second = high * m_low + (first >> 16)
    third = low * m_high + (second & 0xFFFF)
    return high * m_high + (second >> 16) + (third >> 16), (third & 0xFFFF) << 16 | (first & 0xFFFF)


class Masked(NamedTuple):
    """a = p ⊙ keep / (1 − rate): which weights to keep, by a mask. Made by `masked`, which checks what it is given."""

    keep: Array  # booleans, True = keep, that broadcast to (..., H, T, S)
    rate: float

    def dense(self, shape: tuple[int, ...], like: Array = None) -> Array:
        """The booleans, which broadcast to `shape`: of NumPy in the library of `like`, others as they are."""
        return in_library_of(self.keep, like)

    def heads(self, h: slice) -> "Masked":
        """Of the heads `h`, where it has a head axis."""
        return Masked(of_heads(self.keep, h), self.rate)

    def part(self, rows: Range, cols: Range) -> "Masked":
        """Of these queries and keys alone."""
        return Masked(cut(self.keep, rows_and_columns(self.keep, rows, cols)), self.rate)

    def select(self, rows: range, cols: range) -> "Masked":
        """Of the queries and keys in two ranges of one step, neither empty."""
        part = self.part((rows.start, rows[-1] + 1), (cols.start, cols[-1] + 1))
        return Masked(part.keep[(..., *(slice(None, None, rows.step),) * min(part.keep.ndim, 2))], self.rate)


def masked(keep: Array, rate: float) -> Masked:
    """a = p ⊙ keep / (1 − rate)        keep booleans, True = keep   rate 0 ≤ … < 1   →   `Masked`

    `keep` broadcasts to the weights, (..., H, T, S), and whoever drew it kept each with probability 1 − rate.
    """
    if keep is None:
        raise TypeError("keep must be a boolean array, True = keep, got None")
    _check.boolean("keep", keep, "True = keep")
    return Masked(keep, _check.number("rate", rate, 0.0, 1.0))


class Seeded(NamedTuple):
    """Which weights to keep, by a seed: booleans (..., H, T, S), True = keep, none of which is stored.

    Key j of query i in head h of sample b is kept where

        word j mod 4 of philox((j // 4, i, h, b), (seed mod 2³², seed // 2³²))  ≥  ⌊2³² rate⌋,

    with the first sample, head, query and key added to b, h, i and j, where i and j were multiplied by the step. As the
    word is any of 2³² numbers, P(keep) = 1 − ⌊2³² rate⌋ / 2³²: 1 − rate, or more by less than 2⁻³².

    Made by `seeded`, which checks what it is given.
    """

    seed: int
    rate: float
    first_sample: int = 0
    first_head: int = 0
    first_query: int = 0
    first_key: int = 0
    step: int = 1  # from one query, or key, to the next

    def tile(self, sample: int, head: int, rows: Range, cols: Range, like: Array = None) -> Array:
        """Queries `rows` and keys `cols`, (start, stop) each, of one head   →   booleans (R, N), True = keep

        In the library and on the device of `like`, or of NumPy. `sample` counts the batch flattened in C order. Raises
        ValueError for what does not fit into a counter, which is 2³² samples, heads or queries, and 2³⁴ keys.
        """
        return self.tiles((sample, sample + 1), (head, head + 1), rows, cols, like)[0, 0, ...]

    def tiles(self, samples: Range, heads: Range, rows: Range, cols: Range, like: Array = None) -> Array:
        """`tile` of several samples and heads, (start, stop) each   →   booleans (B, H, R, N)"""
        b = range(*_place("sample", self.first_sample, samples, 2**32))
        h = range(*_place("head", self.first_head, heads, 2**32))
        i = range(*_place("rows", self.first_query, self._apart(rows), 2**32), self.step)
        j = range(*_place("cols", self.first_key, self._apart(cols), 2**34), self.step)
        if words(like) and all(map(len, (b, h, i, j))):
            return _draw_there(self, b, h, i, j, like)
        return from_host(_draw(self, b, h, i, j), like)

    def _apart(self, some: Range) -> Range:
        """Those queries or keys, counted without the step."""
        start, stop = some
        return self.step * start, self.step * stop - (self.step - 1 if start < stop else 0)

    def dense(self, shape: tuple[int, ...], like: Array = None) -> Array:
        """All of it: shape (..., H, T, S), or (T, S) for one head   →   booleans of this shape, True = keep"""
        if not isinstance(shape, tuple | list) or not all(isinstance(n, Integral) for n in shape):
            raise TypeError(f"shape must be a tuple of ints, got {shape!r}")
        if len(shape) < 2 or min(shape) < 0:
            raise ValueError(f"shape must be (..., H, T, S) or (T, S), got {shape}")
        *outer, T, S = shape
        B, H = prod(outer[:-1]), outer[-1] if outer else 1
        keep = self.tiles((0, B), (0, H), (0, T), (0, S), like)
        return namespace(keep).reshape(keep, tuple(shape))

    def heads(self, h: slice) -> "Seeded":
        """Of the heads `h`: the same from its first head on."""
        return self._replace(first_head=self.first_head + (h.start or 0))

    def part(self, rows: Range, cols: Range) -> "Seeded":
        """Of these queries and keys alone: the same from the first of them on."""
        i, j = self.first_query + self.step * rows[0], self.first_key + self.step * cols[0]
        return self._replace(first_query=i, first_key=j)

    def select(self, rows: range, cols: range) -> "Seeded":
        """Of the queries and keys in two ranges of one step, neither empty: every one of them so far apart."""
        return self.part((rows.start, rows[-1] + 1), (cols.start, cols[-1] + 1))._replace(step=self.step * rows.step)

    def sample(self, n: int) -> "Seeded":
        """The same from sample `n` on."""
        return self._replace(first_sample=self.first_sample + n)


def seeded(
    seed: int, rate: float, *, first_sample: int = 0, first_head: int = 0, first_query: int = 0, first_key: int = 0
) -> Seeded:
    """keep = Philox(seed; sample, head, query, key) ≥ rate        seed 0 ≤ … < 2⁶⁴   rate 0 ≤ … < 1   →   `Seeded`

    A process that holds a part of the samples, heads, queries or keys says where its part begins, and draws what the
    whole would have there. The samples of a part must be in a row in the batch flattened in C order.
    """
    first = {"sample": first_sample, "head": first_head, "query": first_query, "key": first_key}
    places = (_check.integer(f"first_{name}", n, 0, 2**34 if name == "key" else 2**32) for name, n in first.items())
    return Seeded(_check.integer("seed", seed, 0, 2**64), _check.number("rate", rate, 0.0, 1.0), *places)


def _place(name: str, first: int, of: Range, size: int) -> Range:
    """The range in the coordinates of the whole."""
    if not 0 <= of[0] <= of[1] <= size - first:
        raise ValueError(f"{name} must be within 0 … {size - first}, got {of[0]} … {of[1]}")
    return of[0] + first, of[1] + first


def _draw(drop: Seeded, samples: range, heads: range, rows: range, cols: range) -> np.ndarray:
    """The tiles, in four columns a counter: the ones on their edges are drawn whole and cut."""
    blocks = np.array(_counters(cols), dtype=np.uint64)
    keep = np.empty((len(samples) * len(heads) * len(rows), blocks.size, 4), bool)
    places = _places(rows, heads, samples)
    step, threshold = max(COUNTERS // max(blocks.size, 1), 1), _threshold(drop.rate)
    for start in range(0, len(keep), step):
        some = slice(start, start + step)
        counter = (blocks, *(x if len(x) == 1 else x[some] for x in places))
        words = philox(counter, (drop.seed & LOW, drop.seed >> 32))
        for n, word in enumerate(words):
            np.greater_equal(word, threshold, out=keep[some, :, n])
    return keep.reshape(len(samples), len(heads), len(rows), 4 * blocks.size)[..., _words(cols)]


def _places(*ranges: range) -> tuple[np.ndarray, ...]:
    """The element of each range, (n, 1), at all places of all of them, the first fastest; (1, 1) where it has one"""
    rest, places = np.arange(prod(map(len, ranges)), dtype=np.uint64)[:, None], []
    for some in ranges:
        rest, place = (rest, np.zeros((1, 1), np.uint64)) if len(some) == 1 else np.divmod(rest, max(len(some), 1))
        places.append(place * some.step + some.start)
    return tuple(places)


def _counters(cols: range) -> range | list[int]:
    """The counters that have these columns"""
    if cols.step == 1:
        return range(cols.start // 4, -(-cols.stop // 4))
    return sorted({j // 4 for j in cols})


def _words(cols: range) -> slice | list[int]:
    """Where these columns are among the words of their counters"""
    begin = cols.start % 4
    if cols.step == 1:
        return slice(begin, begin + len(cols))
    place = {counter: 4 * n for n, counter in enumerate(_counters(cols))}
    return [place[j // 4] + j % 4 for j in cols]


# ── on a device ──────────────────────────────────────────────────────────────────────────────────────────────────


def _draw_there(drop: Seeded, samples: range, heads: range, rows: range, cols: range, like: Array) -> Array:
    """`_draw` by the library of `like`: nothing is sent, and as many queries at once as leave room"""
    xp, (B, H) = namespace(like), (len(samples), len(heads))
    n, size = arange(B * H, like)[:, None, None], max(AT_ONCE // (B * H * len(cols)), 1)
    sample, head = _in_words(n // H, samples.start), _in_words(n % H, heads.start)
    some = (rows[i : i + size] for i in range(0, len(rows), size))
    keep = xp.concat([_of_queries(drop, sample, head, queries, cols, like) for queries in some], axis=-2)
    return xp.reshape(keep, (B, H, len(rows), len(cols)))


def _of_queries(drop: Seeded, sample: Array, head: Array, rows: range, cols: range, like: Array) -> Array:
    """Booleans (n, R, N)     sample, head (n, 1, 1)"""
    xp, word, first = namespace(like), words(like), cols.start // 4
    n = -(-cols.stop // 4) - first  # every one between, of which a step leaves out some afterwards
    queries = _in_words(arange(len(rows), like), rows.start, rows.step)[:, None]
    counter, key = (_in_words(arange(n, like), first), queries, head, sample), (drop.seed & LOW, drop.seed >> 32)
    drawn = philox(counter, key) if word is np.uint64 else philox_of_halves(tuple(xp.broadcast_arrays(*counter)), key)
    keep = xp.stack([x >= word(_threshold(drop.rate)) for x in drawn], axis=-1)
    begin = cols.start % 4
    return xp.reshape(keep, (*keep.shape[:-2], 4 * n))[..., begin : begin + cols.stop - cols.start : cols.step]


def _in_words(n: Array, first: int, step: int = 1) -> Array:
    """first + step n"""
    word = words(n)
    return namespace(n).astype(n, word) * word(step) + word(first)


def _threshold(rate: float) -> int:
    """⌊2³² rate⌋"""
    return int(rate * 2.0**32)
