"""Where the tokens of a sequence are in pages, as row numbers of their P · L slots.

A key/value cache that is not paged is one of which each sequence has one page: a table of one column.

Axes: B sequences, G pages of each, P pages of L slots in all.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha.packing import cumulative, positions

from .doors import per_sequence, spans


class Slots(NamedTuple):
    pages: np.ndarray  # (B, G) integers
    size: int  # L
    first: np.ndarray  # (B,) integers: the first slot that is seen
    taken: np.ndarray  # (B,) integers: how many are taken, those before the first included
    new: np.ndarray  # (B,) integers: how many are written behind those

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all that each sequence sees, and where among them it starts and stops, (B, 2)"""
        stop = self.taken + self.new
        cu = cumulative(stop - self.first)
        return self.rows(self.first, stop), np.stack([cu[:-1], cu[1:]], axis=-1)

    def written(self) -> np.ndarray:
        """The rows of the new tokens, one sequence after another"""
        return self.rows(self.taken, self.taken + self.new)

    def rows(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The rows of slots start[b] … stop[b] of each sequence, one sequence after another"""
        n = stop - start
        b, slot = np.repeat(np.arange(n.size), n), positions(cumulative(n), start)
        rows: np.ndarray = self.pages[b, slot // self.size] * self.size + slot % self.size
        return rows


Table = tuple[str, Any]  # its name and what was given


def table_of(block_table: Any, page_table: Any) -> Table | None:
    """The one table that was given."""
    if block_table is not None and page_table is not None:
        raise ValueError("page_table must be left out with block_table, which is FA2's word for it")
    given = ("block_table", block_table) if page_table is None else ("page_table", page_table)
    return None if given[1] is None else given


def paged(axes: _check.Axes, table: Table, cu_seqlens_k: Any, seqused_k: Any) -> Slots:
    """The slots of packed sequences of these lengths with B, P and L among its axes; or the error."""
    name, pages = _pages(axes, table, None)
    room = pages.shape[1] * axes["L"]
    of = spans(axes, "k", cu_seqlens_k, seqused_k, total=None, each=room)
    taken = of[:, 1] - of[:, 0]
    if np.any(taken > room):
        raise ValueError(f"{name} must have slots for the lengths {taken.tolist()} of cu_seqlens_k, got {room}")
    none = np.zeros_like(taken)
    return _checked(name, Slots(pages, axes["L"], none, taken, none), axes["P"])


def slots(
    axes: _check.Axes,
    table: Table | None,
    new: np.ndarray | None,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
) -> Slots:
    """The slots of a cache with B, P and L among its axes, where `new` tokens are written, if any; or the error."""
    if new is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k, which is written behind them")
    B, (name, pages) = axes["B"], _pages(axes, table, cache_batch_idx)
    room, new = pages.shape[1] * axes["L"], np.zeros(B, np.int64) if new is None else new
    taken = per_sequence("cache_seqlens", _filled(cache_seqlens, B, room), B)
    if np.any(taken + new > room):
        raise ValueError(f"cache_seqlens must leave room for {new.tolist()} in {room} slots, got {taken.tolist()}")
    first = np.zeros(B, np.int64) if cache_leftpad is None else per_sequence("cache_leftpad", cache_leftpad, B)
    if np.any(first > taken):
        raise ValueError(f"cache_leftpad must be at most cache_seqlens={taken.tolist()}, got {first.tolist()}")
    return _checked(name, Slots(pages, axes["L"], first, taken, new), axes["P"])


def _pages(axes: _check.Axes, table: Table | None, cache_batch_idx: Any) -> Table:
    """The pages of each sequence (B, G), and the name of the argument that says so."""
    B, P = axes["B"], axes["P"]
    if table is None and cache_batch_idx is None:
        if B > P:
            raise ValueError(f"k_cache must have a sequence for each of B={B} as in {axes.owner['B']}, got {P}")
        return "k_cache", np.arange(B)[:, None]
    name, rows = ("cache_batch_idx", np.arange(P)[:, None]) if table is None else _table(*table)
    if cache_batch_idx is not None:
        rows = rows[per_sequence("cache_batch_idx", cache_batch_idx, B, len(rows) - 1)]
    if len(rows) != B:
        raise ValueError(f"{name} must be (B, …) with B={B} as in {axes.owner['B']}, got {rows.shape}")
    return name, rows


def _table(name: str, x: Any) -> Table:
    pages = _check.integers(name, x)
    if pages.ndim != 2:
        raise ValueError(f"{name} must be (B, …), got {pages.shape}")
    return name, pages


def _filled(cache_seqlens: Any, B: int, room: int) -> np.ndarray:
    if isinstance(cache_seqlens, np.ndarray):
        return cache_seqlens
    return np.full(B, room if cache_seqlens is None else _check.integer("cache_seqlens", cache_seqlens, 0))


def _checked(name: str, found: Slots, P: int) -> Slots:
    """All that is read is there, and all that is written is written once."""
    rows, _ = found.read()
    if rows.size and not 0 <= rows.min() <= rows.max() < P * found.size:
        raise ValueError(f"{name} must be within 0 … {P - 1} for the slots in use, got {found.pages.tolist()}")
    if np.unique(new := found.written()).size != new.size:
        raise ValueError(f"{name} must give each new key a slot of its own, got {found.pages.tolist()}")
    return found
