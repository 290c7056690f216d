"""Which tokens and which heads each rank has.

Of n ranks and T tokens, cut as `numpy.array_split` cuts them, so that T need not be a multiple of anything:

    contiguous    rank r has the part r of n
    zigzag        the parts r and 2n − 1 − r of 2n: under a causal mask all have as many pairs of query and key
    striped       tokens r, r + n, r + 2n, …: the same, for masks that cut close as well
    heads         the part r of n; attention takes all tokens of a part of the heads

Axes: T tokens, H query heads, K key/value heads.
"""

from itertools import chain
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from funcmha import _check

from .comm import Comm, bounds

Pieces = tuple[range, ...]  # tokens in a row, or every n-th
RING = ("contiguous", "zigzag", "striped")
SCHEMES = (*RING, "heads")


def placed(pieces: Pieces) -> list[tuple[range, slice]]:
    """Some tokens, and where each piece of them is among all"""
    stops = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return [(piece, slice(stop - len(piece), stop)) for piece, stop in zip(pieces, stops, strict=True)]


class Layout(NamedTuple):
    """Who has what, of ranks that need not exist: rank = ring · heads + head, so heads are cut within a machine."""

    scheme: str  # of RING
    ring: int  # parts of the tokens
    heads: int = 1  # parts of the heads; its ranks share one part of the tokens

    @property
    def ranks(self) -> int:
        """How many"""
        return self.ring * self.heads

    def ring_pieces(self, T: int, ring: int) -> Pieces:
        """The tokens of a part of the ring, in its order, none of the pieces empty"""
        if self.scheme == "striped":
            found: Pieces = (range(ring, T, self.ring),)
        elif self.scheme == "zigzag":
            found = tuple(range(*bounds(T, 2 * self.ring, i)) for i in (ring, 2 * self.ring - 1 - ring))
        else:
            found = (range(*bounds(T, self.ring, ring)),)
        return tuple(piece for piece in found if piece)

    def pieces(self, T: int, rank: int) -> Pieces:
        """The tokens of a rank, in its order: of its part of the ring, the part of its heads"""
        ring, head = divmod(rank, self.heads)
        whole = self.ring_pieces(T, ring)
        start, stop = bounds(sum(map(len, whole)), self.heads, head)
        found, first = [], 0
        for piece in whole:
            found.append(piece[max(start - first, 0) : max(stop - first, 0)])
            first += len(piece)
        return tuple(piece for piece in found if piece)

    def num_tokens(self, T: int, rank: int) -> int:
        """How many tokens a rank has"""
        return sum(map(len, self.pieces(T, rank)))

    def ring_count(self, T: int, ring: int) -> int:
        """How many tokens a part of the ring has"""
        return sum(map(len, self.ring_pieces(T, ring)))

    def kv_heads(self, K: int, rank: int) -> slice:
        """The key/value heads of a rank; query heads go with the one that they read"""
        return slice(*bounds(K, self.heads, rank % self.heads))

    def query_heads(self, H: int, K: int, rank: int) -> slice:
        """The query heads of a rank"""
        kv, readers = self.kv_heads(K, rank), H // max(K, 1)
        return slice(kv.start * readers, kv.stop * readers)


class Line:
    """The ranks of a `Comm`, and which tokens and heads each of them has

    scheme   "zigzag", "striped" or "contiguous": each rank has a part of the tokens, and keys and values go round;
             or "heads". Both at once is `grid`
    """

    def __init__(self, comm: Comm, scheme: str = "zigzag") -> None:
        _check_comm(comm)
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
        self.comm = comm
        self.layout = Layout("contiguous", 1, comm.size) if scheme == "heads" else Layout(scheme, comm.size)
        self._groups()

    def _groups(self) -> None:
        """The ranks that share my tokens, and those that have my heads"""
        rank, u = self.comm.rank, self.layout.heads
        first = rank - rank % u
        self.heads = self.comm.group(range(first, first + u))
        self.ring = self.comm.group(range(rank % u, self.comm.size, u))

    def positions(self, T: int) -> np.ndarray:
        """The tokens that this rank has of T, in its order   →   integers (T of this rank,)

        For rotary tables, `rotary.table(line.positions(T), …)`, and to take a part, `x[..., line.positions(T), :]`.
        """
        pieces = self.layout.pieces(_check.integer("T", T, 0), self.comm.rank)
        return np.array([*chain(*pieces)], dtype=np.int64)

    def __repr__(self) -> str:
        return f"<rank {self.comm.rank} of {self.layout}>"


def grid(
    comm: Comm, *, heads: int | None = None, ring: int | None = None, H: int | None = None, K: int | None = None,
    scheme: str = "zigzag",
) -> Line:  # fmt: skip
    """A line of heads · ring ranks: heads are cut among neighbours, tokens between the groups that these form

    heads, ring   whose product is the number of ranks. One may be left out. Where both are, H query heads and K
                  key/value heads, H of them unless given, decide: as many parts of the heads as divide K and the ranks,
                  the ring for the rest
    scheme        of the ring
    """
    _check_comm(comm)
    if scheme not in RING:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, RING))}, got {scheme!r}")
    n = comm.size
    if (H is None) == (heads is None and ring is None) or (H is None and K is not None):
        got = ", ".join(f"{name}={x}" for name, x in zip(("heads", "ring", "H", "K"), (heads, ring, H, K), strict=True))
        raise ValueError(f"grid must have heads= or ring=, or choose them by H= (and K=) heads, got {got}")
    if H is not None:
        H, K = _check.integer("H", H, 1), _check.integer("K", H if K is None else K, 1)
        _check.multiple("q", H, "k", K)
        heads = gcd(K, n)
    if heads is None:
        heads = n // max(_check.integer("ring", ring, 1), 1)
    heads = _check.integer("heads", heads, 1)
    ring = n // heads if ring is None else _check.integer("ring", ring, 1)
    if heads * ring != n:
        raise ValueError(f"heads · ring must be the number of ranks, {n}, got heads={heads} and ring={ring}")
    line: Any = Line.__new__(Line)
    line.comm, line.layout = comm, Layout(scheme, ring, heads)
    line._groups()
    return line  # type: ignore[no-any-return]


def check_heads(layout: Layout, H: int, K: int) -> None:
    """Raise ValueError unless the key/value heads divide evenly among the ranks that cut them."""
    u = layout.heads
    if K % u:
        n, best = layout.ranks, gcd(H, K, layout.ranks)
        what = f"H = {H}" if H == K else f"H = {H}, K = {K}"
        instead = f"use a ring, or grid(heads={best}, ring={n // best})" if best > 1 else "use a ring"
        raise ValueError(f"{what} cannot be cut for {u} ranks: {instead}")


def _check_comm(comm: Any) -> None:
    if not isinstance(comm, Comm):
        instead = ": write parallel.mpi(comm)" if hasattr(comm, "Get_rank") else ""
        raise TypeError(f"comm must be one of parallel.mpi, parallel.nccl or parallel.threads, got {comm!r}{instead}")
