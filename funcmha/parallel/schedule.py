"""What a ring does, step by step: the same for the ranks that compute, and for `plan`, which computes nothing.

Keys and values of a part travel from rank to rank, to the next one each time, as far as a rank needs them; a mask may
end their way early, and what it empties is not computed. Their gradients travel along from the first rank that has some
of them, and from the last one home.

Axes: T queries, S keys.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from funcmha.masks import Mask

from .line import Layout, placed


class Pair(NamedTuple):
    """A piece of a rank's queries, and a piece of the keys of a part, of which some are attended."""

    rows: range  # tokens
    cols: range
    i: slice  # where they are among the tokens of the rank
    j: slice
    mask: Mask | None  # of these alone; None where all are attended


Queries = Sequence[tuple[range, slice]]  # tokens, and where they are among those of the rank


def pairs(queries: Queries, layout: Layout, source: int, S: int, mask: Mask | None) -> Iterator[Pair]:
    """Those of some queries and the keys of a rank of the ring"""
    for rows, i in queries:
        for cols, j in placed(layout.ring_pieces(S, source)):
            part = None if mask is None else mask.select(rows, cols)
            answer = "full" if part is None else part.block((0, len(rows)), (0, len(cols)))
            if answer != "empty":
                yield Pair(rows, cols, i, j, None if answer == "full" else part)


def needed(queries: Queries, layout: Layout, S: int, mask: Mask | None) -> np.ndarray:
    """Booleans (n,): whether these queries attend any key of each part"""
    some = (pairs(queries, layout, source, S, mask) for source in range(layout.ring))
    return np.array([next(each, None) is not None for each in some])


class Ways(NamedTuple):
    """How far each part travels, of n."""

    first: np.ndarray  # (n,) steps to the first rank that needs it; 0 if none but its own does
    last: np.ndarray  # (n,) and to the last one

    @staticmethod
    def of(all_needed: np.ndarray) -> "Ways":
        """From booleans (n, n): whether a rank needs a part"""
        n = len(all_needed)
        steps = (np.arange(n)[:, None] - np.arange(n)) % n
        some = all_needed & (steps > 0)
        last = np.where(some, steps, 0).max(axis=0, initial=0)
        return Ways(np.where(some, steps, n).min(axis=0, initial=n) * (last > 0), last)


class Step(NamedTuple):
    """Step t of one rank, which then has the part of the rank t before it."""

    t: int
    source: int  # whose part it is
    arrives: bool  # whether it comes at all
    leaves: bool  # whether it goes on, to the next rank
    gathered: bool  # whether its gradient comes along, from ranks before
    carries: bool  # whether its gradient leaves this rank
    home: bool  # and whether it goes home from here, or to the next rank
    owner: int  # from which rank the gradient of this rank's own part comes home now; −1 for none


def steps(rank: int, ways: Ways) -> list[Step]:
    """From that of a rank's own part, 0, to the last that anybody takes"""
    n, (first, last) = len(ways.first), ways
    found = []
    for t in range(int(last.max(initial=0)) + 1):
        s = (rank - t) % n
        there, has = t <= last[s], t > 0 and first[s] <= t <= last[s]
        owner = (rank + t) % n if 0 < t == last[rank] else -1
        gathered, home = has and first[s] < t, has and t == last[s]
        found.append(Step(t, s, bool(there), bool(t < last[s]), bool(gathered), bool(has), bool(home), owner))
    return found
