"""Where the tokens of a sequence are in a key/value cache, as row numbers of its P · N slots.

A cache that is not paged is one of which each sequence has one page: a block table of one column.

Axes: B sequences, G pages of each, P pages of N slots in all, U new tokens of each sequence.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._xp import Array
from funcmha.packing import cumulative, positions

from .doors import per_sequence


class Slots(NamedTuple):
    pages: np.ndarray  # (B, G) integers
    size: int  # N
    first: np.ndarray  # (B,) integers: the first slot that is seen
    taken: np.ndarray  # (B,) integers: how many are taken, those before the first included
    new: int  # U

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all that each sequence sees, and where among them it starts and stops, (B, 2)"""
        stop = self.taken + self.new
        cu = cumulative(stop - self.first)
        return self.rows(self.first, stop), np.stack([cu[:-1], cu[1:]], axis=-1)

    def written(self) -> np.ndarray:
        """The rows of the new tokens, (B · U,)"""
        return self.rows(self.taken, self.taken + self.new)

    def rows(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The rows of slots start[b] … stop[b] of each sequence, one sequence after another"""
        n = stop - start
        b, slot = np.repeat(np.arange(n.size), n), positions(cumulative(n), start)
        rows: np.ndarray = self.pages[b, slot // self.size] * self.size + slot % self.size
        return rows


def slots(
    axes: _check.Axes, k: Array, cache_seqlens: Any, cache_batch_idx: Any, cache_leftpad: Any, block_table: Any
) -> Slots:
    """The slots of a call with B, P, N and, where there are new keys, U among its axes; or the error."""
    B, P, N, U = axes["B"], axes["P"], axes["N"], 0 if k is None else axes["U"]
    if block_table is not None and not (cache_batch_idx is None and cache_leftpad is None):
        other = "cache_leftpad" if cache_batch_idx is None else "cache_batch_idx"
        raise ValueError(f"{other} must be left out with a block_table, as in the original")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k, which is written behind them")
    pages = _single(cache_batch_idx, B, P) if block_table is None else _table(block_table, B)
    room = pages.shape[1] * N
    taken = per_sequence("cache_seqlens", _filled(cache_seqlens, B, room), B)
    if np.any(taken + U > room):
        raise ValueError(f"cache_seqlens must leave room for U={U} in {room} slots, got {taken.tolist()}")
    first = np.zeros(B, np.int64) if cache_leftpad is None else per_sequence("cache_leftpad", cache_leftpad, B)
    if np.any(first > taken):
        raise ValueError(f"cache_leftpad must be at most cache_seqlens={taken.tolist()}, got {first.tolist()}")
    found = Slots(pages, N, first, taken, U)
    _check_pages("cache_batch_idx" if block_table is None else "block_table", found, P)
    return found


def _single(cache_batch_idx: Any, B: int, P: int) -> np.ndarray:
    if cache_batch_idx is not None:
        return per_sequence("cache_batch_idx", cache_batch_idx, B, P - 1)[:, None]
    if B > P:
        raise ValueError(f"k_cache must have a sequence for each of B={B} as in q, got {P}")
    return np.arange(B)[:, None]


def _table(block_table: Any, B: int) -> np.ndarray:
    pages = _check.integers("block_table", block_table)
    if pages.ndim != 2 or len(pages) != B:
        raise ValueError(f"block_table must be (B, …) with B={B} as in q, got {pages.shape}")
    return pages


def _filled(cache_seqlens: Any, B: int, room: int) -> np.ndarray:
    if isinstance(cache_seqlens, np.ndarray):
        return cache_seqlens
    return np.full(B, room if cache_seqlens is None else _check.integer("cache_seqlens", cache_seqlens, 0))


def _check_pages(name: str, found: Slots, P: int) -> None:
    """All that is read is there, and all that is written is written once."""
    rows, _ = found.read()
    if rows.size and not 0 <= rows.min() <= rows.max() < P * found.size:
        raise ValueError(f"{name} must be within 0 … {P - 1} for the slots in use, got {found.pages.tolist()}")
    if np.unique(new := found.written()).size != new.size:
        raise ValueError(f"{name} must give each new key a slot of its own, got {found.pages.tolist()}")
