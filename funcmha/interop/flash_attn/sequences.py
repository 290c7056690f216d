"""Which tokens belong to which sequence: packed or padded tokens as spans, pages as row numbers. Integers only.

A key/value cache without a table of pages has one page for each sequence: a table of one column.

Axes: B sequences, N query tokens and M key tokens of all of them, G pages of each, P pages of L slots in all, R listed
keys.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha import _check
from funcmha._arrays import is_array
from funcmha.packing import check_cumulative, cumulative, positions


class Sequences(NamedTuple):
    queries: np.ndarray  # (B, 2) integers: start and stop, which rise; a token of no sequence has out 0
    keys: np.ndarray  # (B, 2) integers
    longest: tuple[int, int]  # T and S of the weights, of which each sequence has the upper left
    rows: np.ndarray | None = None  # (M,) where the keys are, unless they are in order
    listed: np.ndarray | None = None  # (N, R) or (B, T, R): the only keys of a query, numbered within its sequence

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each sequence"""
        for (start, stop), (first, last) in zip(self.queries.tolist(), self.keys.tolist(), strict=True):
            yield slice(start, stop), slice(first, last)

    def listed_by(self, queries: slice) -> np.ndarray | None:
        """(T, R) of these queries, or None"""
        listed = self.listed
        return None if listed is None else listed.reshape(prod(listed.shape[:-1]), listed.shape[-1])[queries]


# ── spans ────────────────────────────────────────────────────────────────────────────────────────────────────────


LETTERS = {"q": "N T", "k": "M S", "k_new": "M U"}  # the tokens of all sequences, and of each


def spans(axes: _check.Axes, side: str, cu_seqlens: Any, seqused: Any = None, *, each: int | None = None) -> np.ndarray:
    """Start and stop of each sequence (B, 2), of which only the first `seqused` tokens count

    side    "q", "k" or "k_new", as in cu_seqlens_q
    each    the length of all, where there is no cu_seqlens: that of the padded array unless given
    """
    total, padded = (axes.size.get(letter) for letter in LETTERS[side].split())
    name, owner = f"cu_seqlens_{side}", side[0]
    if cu_seqlens is None:
        name, cu = owner, (padded if each is None else each) * np.arange(axes["B"] + 1)
    else:
        cu = check_cumulative(name, cu_seqlens, total, owner)
        _check_count(axes, name, cu.size - 1)
    n = np.diff(cu)
    used = n if seqused is None else per_sequence(f"seqused_{side}", seqused, n.size)
    if np.any(used > n):
        raise ValueError(f"seqused_{side} must be at most the lengths {n.tolist()} of {name}, got {used.tolist()}")
    return np.stack([cu[:-1], cu[:-1] + used], axis=-1)


def longest(axes: _check.Axes, side: str, given: Any, of: np.ndarray) -> int:
    """T or S: as given, or that of the padded array, or the longest of the spans `of`"""
    n, letter = int((of[:, 1] - of[:, 0]).max(initial=0)), LETTERS[side][-1]
    if given is not None and _check.integer(f"max_seqlen_{side}", given) < n:
        raise ValueError(f"max_seqlen_{side} must be at least {n}, as the longest sequence is, got {given}")
    axes.size[letter] = max(n, axes.size.get(letter, 0)) if given is None else int(given)
    return int(axes.size[letter])


def per_sequence(name: str, x: Any, B: int, most: int = 2**63 - 1) -> np.ndarray:
    """A NumPy array (B,) of integers within 0 … `most`, as int64"""
    checked = _check.integers(name, x, 0, most)
    if checked.shape != (B,):
        raise ValueError(f"{name} must be (B,) with B={B}, got {checked.shape}")
    return checked


def _check_count(axes: _check.Axes, name: str, B: int) -> None:
    if axes.size.setdefault("B", B) != B:
        raise ValueError(f"{name} must be (B + 1,) with B={axes['B']} as in {axes.owner['B']}, got B={B}")
    axes.owner.setdefault("B", name)


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Slots(NamedTuple):
    """The slots of each sequence: the first `taken` are in use, of these `skipped` are skipped; `new` ones follow"""

    pages: np.ndarray  # (B, G) integers
    size: int  # L
    taken: np.ndarray  # (B,) integers
    new: np.ndarray  # (B,) integers
    skipped: np.ndarray  # (B,) integers

    def attended(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all keys of each sequence, and start and stop of each sequence among them (B, 2)"""
        stop = self.taken + self.new
        cu = cumulative(stop - self.skipped)
        return self._rows(self.skipped, stop), np.stack([cu[:-1], cu[1:]], axis=-1)

    def written(self) -> np.ndarray:
        """The rows of the new tokens, one sequence after another"""
        return self._rows(self.taken, self.taken + self.new)

    def _rows(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        n = stop - start
        b, slot = np.repeat(np.arange(n.size), n), positions(cumulative(n), start)
        rows: np.ndarray = self.pages[b, slot // self.size] * self.size + slot % self.size
        return rows


Table = tuple[str, Any]  # the name of an argument, and its value


def table_of(block_table: Any, page_table: Any) -> Table | None:
    """The table of pages under the name it was given by."""
    if block_table is not None and page_table is not None:
        raise ValueError("page_table must be left out with block_table, which is FA2's name for it, got both")
    given = ("block_table", block_table) if page_table is None else ("page_table", page_table)
    return None if given[1] is None else given


def paged(axes: _check.Axes, table: Table, cu_seqlens_k: Any, seqused_k: Any) -> Slots:
    """The slots of sequences of these lengths; B, P and L are known axes."""
    name, pages = _pages(axes, table, None)
    room = pages.shape[1] * axes["L"]
    of = spans(axes, "k", cu_seqlens_k, seqused_k, each=room)
    taken = of[:, 1] - of[:, 0]
    if np.any(taken > room):
        raise ValueError(f"{name} must have slots for the lengths {taken.tolist()} of cu_seqlens_k, got {room}")
    none = np.zeros_like(taken)
    return _checked(name, Slots(pages, axes["L"], taken, none, none), axes["P"])


def slots(
    axes: _check.Axes,
    table: Table | None,
    new: np.ndarray | None,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
) -> Slots:
    """The slots of a cache to which `new` tokens are appended, if any; B, P and L are known axes."""
    if new is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k, which is written behind them, got None")
    B, (name, pages) = axes["B"], _pages(axes, table, cache_batch_idx)
    room, new = pages.shape[1] * axes["L"], np.zeros(B, np.int64) if new is None else new
    if not is_array(cache_seqlens):
        or_else = " or a NumPy array (B,) of integers"
        n = room if cache_seqlens is None else _check.integer("cache_seqlens", cache_seqlens, 0, or_else=or_else)
        cache_seqlens = np.full(B, n)
    taken = per_sequence("cache_seqlens", cache_seqlens, B)
    if np.any(taken + new > room):
        raise ValueError(f"cache_seqlens must leave room for {new.tolist()} in {room} slots, got {taken.tolist()}")
    skipped = np.zeros(B, np.int64) if cache_leftpad is None else per_sequence("cache_leftpad", cache_leftpad, B)
    if np.any(skipped > taken):
        raise ValueError(f"cache_leftpad must be at most cache_seqlens={taken.tolist()}, got {skipped.tolist()}")
    return _checked(name, Slots(pages, axes["L"], taken, new, skipped), axes["P"])


def _pages(axes: _check.Axes, table: Table | None, cache_batch_idx: Any) -> Table:
    """The pages of each sequence (B, G), and the name of the argument that decides them."""
    B, P = axes["B"], axes["P"]
    if table is None and cache_batch_idx is None:
        if B > P:
            raise ValueError(f"k_cache must have a sequence for each of B={B} as in {axes.owner['B']}, got {P}")
        return "k_cache", np.arange(B)[:, None]
    name, rows = ("cache_batch_idx", np.arange(P)[:, None]) if table is None else table
    rows = _check.integers(name, rows)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be (B, …), got {rows.shape}")
    if cache_batch_idx is not None:
        rows = rows[per_sequence("cache_batch_idx", cache_batch_idx, B, len(rows) - 1)]
    if len(rows) != B:
        raise ValueError(f"{name} must be (B, …) with B={B} as in {axes.owner['B']}, got {rows.shape}")
    return name, rows


def _checked(name: str, found: Slots, P: int) -> Slots:
    """Every row exists, and no row is written twice."""
    rows, _ = found.attended()
    if rows.size and not 0 <= rows.min() <= rows.max() < P * found.size:
        raise ValueError(f"{name} must be within 0 … {P - 1} for the slots in use, got {found.pages.tolist()}")
    if np.unique(new := found.written()).size != new.size:
        raise ValueError(f"{name} must give each new key a slot of its own, got {found.pages.tolist()}")
    return found
