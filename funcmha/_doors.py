"""The doors of the ops: what their arguments must be, checked once, before any arithmetic.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, I in, O out; `...` is
batch.
"""

from typing import Any

import numpy as np

from . import _check
from ._xp import Array, namespace
from .biases import RelativeBias, check_relative
from .dropout import Masked, Seeded
from .masks import Mask, as_mask


def check_linear(x: Array, w: Array, b: Array) -> None:
    """The door of `linear`."""
    _check.one_dtype([("x", x), ("w", w)], optional=[("b", b)])
    axes = _check.Axes()
    axes("x", x, "... I")
    axes("w", w, "O I")
    if b is not None:
        axes("b", b, "O")


def check_attention(
    q: Array, k: Array, v: Array, bias: Any, sink: Array, mask: Any, scale: Any, softcap: Any, dropout: Any
) -> tuple[Mask | None, Any, Any]:
    """The door of `attention`: the mask as a `Mask` or None, scale and softcap as floats or (H,) of NumPy."""
    _check.one_dtype([("q", q), ("k", k), ("v", v)], optional=[("bias", values_of(bias)), ("sink", sink)])
    axes = _check.Axes()
    head, group, scores = ("... H ", "... K ", "... H T S") if q.ndim > 2 else ("", "", "T S")
    axes("q", q, head + "T D")
    axes("k", k, group + "S D")
    axes("v", v, group + "S E")
    if head:
        _check.multiple("q", axes["H"], "k", axes["K"])
    check_bias(axes, bias, scores)
    if sink is not None:
        axes("sink", sink, "H") if head else axes("sink", sink, "")
    mask = check_mask(axes, mask, scores)
    check_dropout(axes, dropout, scores)
    scale = check_per_head(axes, "scale", scale)
    softcap = check_per_head(axes, "softcap", softcap, positive=True)
    return mask, max(axes["D"], 1) ** -0.5 if scale is None else scale, softcap


def check_bias(axes: _check.Axes, bias: Any, scores: str) -> None:
    """An array that broadcasts to the scores, or the numbers of a `RelativeBias` for T + S − 1 differences."""
    if not isinstance(bias, RelativeBias):
        axes.broadcast("bias", _check.shape_of(bias), scores)
        return
    check_relative("bias", bias, axes["T"], axes["S"])
    axes.size["T+S-1"] = bias.values.shape[-1]
    axes.broadcast("bias.values", tuple(bias.values.shape), scores.replace("T S", "T+S-1"))


def values_of(bias: Any) -> Array:
    """The differentiable array of a bias."""
    return bias.values if isinstance(bias, RelativeBias) else bias


def check_per_head(axes: _check.Axes, name: str, x: Any, positive: bool = False) -> Any:
    """A number as a float, one number for each head as a NumPy array (H,), or None."""
    if not isinstance(x, tuple | list | np.ndarray):
        value = None if x is None else _check.number(name, x)
        if positive and value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
        return value
    if isinstance(x, np.ndarray) and x.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got dtype {x.dtype}")
    numbers = np.array(x if isinstance(x, np.ndarray) else [_check.number(name, n) for n in x], dtype=np.float64)
    if "H" not in axes.size or numbers.shape != (axes["H"],):
        wanted = f"or (H,) with H={axes['H']} as in q" if "H" in axes.size else "as there is no head axis"
        raise ValueError(f"{name} must be a number, {wanted}, got shape {numbers.shape}")
    if not np.all(np.isfinite(numbers)) or (positive and not np.all(numbers > 0)):
        raise ValueError(f"{name} must be finite{' and above 0' if positive else ''}, got {numbers}")
    return numbers


def check_mask(axes: _check.Axes, mask: Any, scores: str) -> Mask | None:
    """The mask as a `Mask` that broadcasts to `scores`, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        _check.boolean("mask", mask, "True = attend (a mask to be added to the scores is a bias)")
        axes.broadcast("mask", mask.shape, scores)
    checked = as_mask(mask)
    axes.broadcast("mask", checked.shape(axes["T"], axes["S"]), scores)
    return checked


def check_dropout(axes: _check.Axes, dropout: Any, scores: str) -> None:
    """Dropout is a mask with its rate, or a seed with its rate, or None."""
    if dropout is None:
        return
    if not isinstance(dropout, Masked | Seeded):
        got = f"{type(dropout).__module__}.{type(dropout).__name__}"
        raise TypeError(f"dropout must be dropout.masked(keep, rate), dropout.seeded(seed, rate) or None, got {got}")
    _check.number("dropout.rate", dropout.rate, 0.0, 1.0)
    if isinstance(dropout, Masked):
        _check.boolean("dropout.keep", dropout.keep, "True = keep")
        axes.broadcast("dropout.keep", _check.shape_of(dropout.keep), scores)


def check_rate(name: str, rate: float | None, keep: Any) -> float:
    """The rate under its name, and whether there is a mask or a seed for it."""
    if isinstance(keep, Seeded):
        if rate is not None and _check.number(name, rate) not in (0.0, keep.rate):
            raise ValueError(f"{name} must be left out, as keep has rate={keep.rate}, got {rate}")
        return keep.rate
    if rate is None:
        if keep is not None:
            raise ValueError(f"{name} must be given with keep: what is kept is divided by 1 − {name}")
        return 0.0
    if _check.number(name, rate, 0.0, 1.0) > 0 and keep is None:
        raise ValueError(f"keep must be given with {name}={rate}: dropout takes its mask as an input")
    return float(rate)


def blank_keys(x: Array, mask: Array) -> Array:
    """x (..., K, S, ·) with 0 at each key that no query of its heads may see, so that 0 · NaN cannot arise there."""
    return x if mask is None or x is None else _blank(x, namespace(x).any(mask, axis=-2))


def blank_queries(x: Array, mask: Array) -> Array:
    """x (..., H, T, ·) with 0 at each query that may see no key, for the same reason."""
    return x if mask is None or x is None else _blank(x, namespace(x).any(mask, axis=-1))


def _blank(x: Array, some: Array) -> Array:
    """x (..., K, n, ·) with 0 where nothing is seen     some (..., H or 1, n or 1)"""
    if isinstance(some, np.ndarray) and some.all():
        return x
    xp = namespace(x)
    if some.ndim > 1 and some.shape[-2] not in (1, x.shape[-3]):
        *batch, heads, n = some.shape
        some = xp.any(xp.reshape(some, (*batch, x.shape[-3], heads // x.shape[-3], n)), axis=-2)
    return xp.where(some[..., None], x, 0.0)
