"""What the calls of flash-attention take: checked once, under its names, before any arithmetic.

Axes: B sequences, T queries, S keys, N tokens and M keys of all sequences, H query heads, K key/value heads, D
query/key width, E value width, R keys in a list.
"""

from typing import Any

import numpy as np

from funcmha import _check
from funcmha._doors import check_rate
from funcmha._xp import Array, outline, widen
from funcmha.dropout import Seeded
from funcmha.packing import check_cumulative

from .aligned import Scores


def asked(softmax_scale: Any, causal: Any, window_size: Any, attention_chunk: Any, softcap: Any) -> Scores:
    """What a call asks of the scores, in funcmha's words."""
    _check.flag("causal", causal)
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (_reach(x) for x in window_size)
    chunk = _check.integer("attention_chunk", attention_chunk, 0)
    scale = None if softmax_scale is None else _check.number("softmax_scale", softmax_scale)
    cap = _check.number("softcap", softcap, 0.0)
    return Scores(scale, left, 0 if causal else right, chunk, cap if cap > 0 else None)


def check_tokens(axes: _check.Axes, **arrays: tuple[Array, str]) -> None:
    """All of one dtype and of these shapes, with heads that divide; only qv may be None."""
    given = {name: x for name, x in arrays.items() if name != "qv" or x[0] is not None}
    _check.one_dtype((name, x) for name, (x, _) in given.items())
    for name, (x, symbols) in given.items():
        axes(name, x, symbols)
    _check.multiple(axes.owner["H"], axes["H"], axes.owner["K"], axes["K"])


def check_per_head(axes: _check.Axes, q: Array, alibi_slopes: Any, learnable_sink: Any = None) -> None:
    """Slopes (H,) or (B, H) and a sink (H,), or none

    In the dtype of q, or in the one that it is computed in: beside half types flash-attention wants slopes of float32.
    """
    own = "B H" if getattr(alibi_slopes, "ndim", 1) == 2 else "H"
    for name, x, symbols in (("alibi_slopes", alibi_slopes, own), ("learnable_sink", learnable_sink, "H")):
        if x is None:
            continue
        _check.one_dtype([(name, x)])
        axes(name, x, symbols)
        wanted = widen(outline(q)).dtype
        if widen(x).dtype != wanted:
            raise TypeError(f"{name} must have dtype {wanted}, in which q is computed, got {x.dtype}: cast it")


def check_dropout(axes: _check.Axes, keep: Any, dropout_p: Any) -> float:
    """Dropout is a mask and a probability, or a seed that has one, or neither; the probability as a Python float."""
    if not isinstance(keep, Seeded):
        _check.boolean("keep", keep, "True = keep")
        axes.broadcast("keep", _check.shape_of(keep), "B H T S")
    p = _check.number("dropout_p", dropout_p, 0.0, 1.0)
    return check_rate("dropout_p", p if p > 0 else None, keep)


def check_listed(axes: _check.Axes, gather_kv_indices: Any, symbols: str) -> np.ndarray | None:
    """The keys that each query sees, as int64; any number of them, and any number in place of none."""
    if gather_kv_indices is None:
        return None
    listed = _check.integers("gather_kv_indices", gather_kv_indices)
    axes("gather_kv_indices", listed, f"{symbols} R")
    return listed


def spans(
    axes: _check.Axes, side: str, cu_seqlens: Any, seqused: Any = None, *, total: int | None, each: int
) -> np.ndarray:
    """Start and stop of each sequence (B, 2), of which only the first `seqused` tokens count.

    side    "q", "k" or "k_new", as in cu_seqlens_q, which ends with `total`
    each    the tokens of each sequence, if there is no cu_seqlens
    """
    name, owner = f"cu_seqlens_{side}", side[0]
    if cu_seqlens is None:
        name, cu = owner, each * np.arange(axes["B"] + 1)
    else:
        cu = check_cumulative(name, cu_seqlens, total, owner)
        _check_count(axes, name, cu.size - 1)
    n = np.diff(cu)
    used = n if seqused is None else per_sequence(f"seqused_{side}", seqused, n.size)
    if np.any(used > n):
        raise ValueError(f"seqused_{side} must be at most the lengths {n.tolist()} of {name}, got {used.tolist()}")
    return np.stack([cu[:-1], cu[:-1] + used], axis=-1)


def longest(side: str, given: Any, of: np.ndarray, each: int) -> int:
    """How long a sequence may be: as was given, else as a padded one is, else as the longest."""
    n = int((of[:, 1] - of[:, 0]).max(initial=0))
    if given is None:
        return max(n, each)
    if _check.integer(f"max_seqlen_{side}", given) < n:
        raise ValueError(f"max_seqlen_{side} must be at least {n}, as the longest sequence is, got {given}")
    return int(given)


def per_sequence(name: str, x: Any, B: int, most: int = 2**63 - 1) -> np.ndarray:
    """A NumPy array (B,) of integers within 0 … `most`, as int64."""
    checked = _check.integers(name, x, 0, most)
    if checked.shape != (B,):
        raise ValueError(f"{name} must be (B,) with B={B}, got {checked.shape}")
    return checked


def _check_count(axes: _check.Axes, name: str, B: int) -> None:
    if axes.size.setdefault("B", B) != B:
        raise ValueError(f"{name} must be (B + 1,) with B={axes['B']} as in {axes.owner['B']}, got B={B}")
    axes.owner.setdefault("B", name)


def _reach(x: Any) -> int | None:
    """-1 is FA2's and FA3's word for no bound, None is FA4's."""
    reach = -1 if x is None else _check.integer("window_size", x, -1, or_else=", where -1 is no bound")
    return None if reach == -1 else reach
