"""What carries arrays between ranks: one verb that begins transfers, and the collectives that follow from it.

A carrier has a rank, a size and `shift`. It may override a collective that its library has, where nothing is added up:
sums are made here, in the order of the ranks, so that every carrier gives the same bits, whatever arrives first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from funcmha._arrays import Array, namespace, unset

Wait = Callable[[], None]


class Comm(ABC):
    """Ranks 0 … size − 1, of which this is one. Every rank calls the same methods in the same order."""

    rank: int
    size: int

    @abstractmethod
    def shift(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> Wait:
        """Begin to send arrays to ranks, and to fill arrays from ranks; what it returns waits for all of them

        Arrays are contiguous. Between two ranks they arrive in the order in which they were sent. Until it has waited
        the caller writes to none of them.
        """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Room for an array that is to be received, where there is none like it"""
        if dtype == "bfloat16":
            import ml_dtypes

            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, dtype)

    def all_to_all(self, parts: Sequence[Array], out: Sequence[Array]) -> None:
        """out[r] of this rank = parts[this rank] of rank r"""
        others = [r for r in range(self.size) if r != self.rank]
        wait = self.shift([(parts[r], r) for r in others], [(out[r], r) for r in others])
        out[self.rank][...] = parts[self.rank]
        wait()

    def all_gather(self, x: Array, out: Sequence[Array]) -> None:
        """out[r] = x of rank r"""
        self.all_to_all([x] * self.size, out)

    def reduce_scatter(self, parts: Sequence[Array]) -> Array:
        """Σ parts[this rank] over the ranks, in their order"""
        own = parts[self.rank]
        out = [unset(tuple(own.shape), own) for _ in range(self.size)]
        self.all_to_all(parts, out)
        for other in out[1:]:
            out[0] += other
        return out[0]

    def all_reduce(self, x: Array) -> Array:
        """Σ x over the ranks, in their order: a piece of it on each rank, and the pieces to all"""
        flat = namespace(x).reshape(x, (-1,))
        pieces = [flat[slice(*bounds(flat.shape[0], self.size, r))] for r in range(self.size)]
        total = unset(tuple(flat.shape), flat)
        out = [total[slice(*bounds(flat.shape[0], self.size, r))] for r in range(self.size)]  # views
        self.all_gather(self.reduce_scatter(pieces), out)
        return namespace(x).reshape(total, tuple(x.shape))

    def group(self, ranks: Sequence[int]) -> "Comm":
        """Some of the ranks, this one among them, as ranks 0, 1, … of their own; each of them calls it alike"""
        return self if list(ranks) == list(range(self.size)) else _Group(self, tuple(ranks))


class _Group(Comm):
    def __init__(self, whole: Comm, ranks: tuple[int, ...]) -> None:
        self.whole, self.ranks = whole, ranks
        self.rank, self.size = ranks.index(whole.rank), len(ranks)

    def shift(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> Wait:
        return self.whole.shift(*([(x, self.ranks[r]) for x, r in some] for some in (sends, receives)))


def bounds(n: int, parts: int, i: int) -> tuple[int, int]:
    """Where part i of n things is, as `numpy.array_split` cuts them: the first n mod parts have one more"""
    size, more = divmod(n, parts)
    return i * size + min(i, more), (i + 1) * size + min(i + 1, more)


def contiguous(x: Array) -> Array:
    """x as a carrier takes it: itself where its numbers lie in a row, else a copy"""
    if isinstance(x, np.ndarray):
        return x if x.flags.c_contiguous else np.ascontiguousarray(x)  # which gives a number an axis
    return namespace(x).ascontiguousarray(x)
