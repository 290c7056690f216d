"""What the calls of flash-attention take: checked once, under its names, before any arithmetic.

Axes: B sequences, T queries, S keys, N tokens and M keys of all sequences, H query heads, K key/value heads, D
query/key width, E value width.
"""

from numbers import Integral
from typing import Any

import numpy as np

from funcmha import _check
from funcmha._xp import Array, full, widen
from funcmha.dropout import Seeded
from funcmha.packing import check_cumulative

from .aligned import Scores


def asked(softmax_scale: Any, causal: Any, window_size: Any, attention_chunk: Any, softcap: Any) -> Scores:
    """What a call asks of the scores, in funcmha's words."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (_reach(x) for x in window_size)
    chunk = integer("attention_chunk", attention_chunk)
    scale = None if softmax_scale is None else _check.number("softmax_scale", softmax_scale)
    cap = _check.number("softcap", softcap, 0.0)
    return Scores(scale, left, 0 if causal else right, chunk, cap if cap > 0 else None)


def check_tokens(axes: _check.Axes, **arrays: tuple[Array, str]) -> None:
    """Queries, keys and all else of one dtype and of these shapes, with heads that divide."""
    _check.one_dtype((name, x) for name, (x, _) in arrays.items())
    for name, (x, symbols) in arrays.items():
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
        if widen(x).dtype != widen(q).dtype:
            wanted = widen(q).dtype
            raise TypeError(f"{name} must have dtype {wanted}, in which q is computed, got {x.dtype}: cast it")


def check_dropout(axes: _check.Axes, keep: Any, dropout_p: Any, symbols: str) -> float:
    """Dropout is a mask and a probability, or a seed that has one, or neither; the probability as a Python float."""
    p = _check.number("dropout_p", dropout_p, 0.0, 1.0)
    if isinstance(keep, Seeded):
        if p not in (0.0, keep.rate):
            raise ValueError(f"dropout_p must be left out, as keep has rate={keep.rate}, got {p}")
        return keep.rate
    _check.boolean("keep", keep, "True = keep")
    axes.broadcast("keep", _check.shape_of(keep), symbols)
    if p > 0 and keep is None:
        raise ValueError(f"keep must be given with dropout_p={p}: dropout takes its mask as an input")
    return p


def spans(name: str, cu_seqlens: Any, used_name: str, seqused: Any, total: int, owner: str) -> np.ndarray:
    """Start and stop of each sequence (B, 2), of which only the first `seqused` tokens count."""
    cu = check_cumulative(name, cu_seqlens, total, owner)
    n = np.diff(cu)
    used = n if seqused is None else integers(used_name, seqused, n.size)
    if np.any(used > n):
        raise ValueError(f"{used_name} must be at most the lengths {n.tolist()} of {name}, got {used.tolist()}")
    return np.stack([cu[:-1], cu[:-1] + used], axis=-1)


def longest(name: str, given: Any, of: np.ndarray, owner: str) -> int:
    """The length of the longest sequence, or what was given, which must be no less."""
    n = int((of[:, 1] - of[:, 0]).max(initial=0))
    if given is not None and integer(name, given) < n:
        raise ValueError(f"{name} must be at least {n} as in {owner}, got {given}")
    return n if given is None else int(given)


def integer(name: str, n: Any) -> int:
    """An int of 0 or more."""
    if not isinstance(n, Integral) or isinstance(n, bool):
        raise TypeError(f"{name} must be an int, got {n!r} of type {type(n).__name__}")
    if n < 0:
        raise ValueError(f"{name} must be at least 0, got {n}")
    return int(n)


def integers(name: str, x: Any, B: int, below: int | None = None) -> np.ndarray:
    """A NumPy array of integers (B,), 0 or more and below `below`, as int64."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a NumPy array (B,) of integers, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != (B,):
        raise ValueError(f"{name} must be (B,) with B={B}, got {x.shape}")
    if x.size and (x.min() < 0 or (below is not None and x.max() >= below)):
        wanted = "at least 0" if below is None else f"within 0 … {below - 1}"
        raise ValueError(f"{name} must be {wanted}, got {x.tolist()}")
    return x.astype(np.int64)


def cotangent(name: str, dx: Array, shape: tuple[int, ...], computed: Array, symbols: str) -> Array:
    """A cotangent of this shape, in the dtype computed with; 0 where there is None."""
    _check.cotangent(name, dx, shape, computed, symbols, optional=True)
    return full(shape, 0.0, computed) if dx is None else widen(dx)


def _reach(x: Any) -> int | None:
    """-1 is FA2's and FA3's word for no bound, None is FA4's."""
    if x is None:
        return None
    if not isinstance(x, Integral) or isinstance(x, bool):
        raise TypeError(f"window_size must be ints, or -1 or None for no bound, got {x!r} of type {type(x).__name__}")
    if x < -1:
        raise ValueError(f"window_size must be at least 0, or -1 or None for no bound, got {x}")
    return None if x == -1 else int(x)
