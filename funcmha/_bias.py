"""A bias is an array or a `RelativeBias`: what is done alike with both.

Axes: T queries, S keys, H heads; `...` is batch.
"""

from collections.abc import Callable
from typing import Any

from . import biases
from ._xp import Array, namespace, of_heads, of_sample, unbroadcast
from .biases import RelativeBias

Bias = Any  # an array that broadcasts to (..., H, T, S), a RelativeBias, or None


def on_bias(f: Callable[[Array], Array], bias: Bias) -> Bias:
    """The bias with f of its numbers: of the array, or of the values of a `RelativeBias`."""
    if bias is None:
        return None
    return RelativeBias(f(bias.values)) if isinstance(bias, RelativeBias) else f(bias)


def dense_bias(bias: Bias, T: int, S: int) -> Array:
    """An array that broadcasts to (..., H, T, S)"""
    return biases.dense(bias, T, S) if isinstance(bias, RelativeBias) else bias


def dense_bias_vjp(bias: Bias, dz: Array) -> Bias:
    """The gradient of a bias from that of the scores, (..., H, T, S): summed where the bias is the same"""
    if isinstance(bias, RelativeBias):
        return RelativeBias(unbroadcast(biases.diagonal_sums(dz), tuple(bias.values.shape)))
    return unbroadcast(dz, tuple(bias.shape))


def bias_of_heads(bias: Bias, h: slice) -> Bias:
    """A bias with a head axis, as the heads `h` see it; one without as it is"""
    return RelativeBias(of_heads(bias.values, h, 2)) if isinstance(bias, RelativeBias) else of_heads(bias, h)


def bias_of_sample(bias: Bias, b: tuple[int, ...]) -> Bias:
    """A bias with batch axes, as the element `b` of the batch sees it; one without as it is"""
    return RelativeBias(of_sample(bias.values, b, 2)) if isinstance(bias, RelativeBias) else of_sample(bias, b)


def join_samples(bias: Bias, dbiases: dict[tuple[int, ...], Bias]) -> Bias:
    """The gradient of a bias from those of the elements of the batch, which each had their own or one with others."""
    if bias is None:
        return None
    relative = isinstance(bias, RelativeBias)
    numbers, rank = (bias.values, 2) if relative else (bias, 3)
    xp, batch = namespace(numbers), tuple(numbers.shape[: max(numbers.ndim - rank, 0)])
    sums: dict[tuple[int, ...], Array] = {}
    for b, dbias in dbiases.items():
        own = b[len(b) - len(batch) :] if batch else ()
        place = tuple(0 if n == 1 else i for i, n in zip(own, batch, strict=True))
        part = dbias.values if relative else dbias
        sums[place] = sums[place] + part if place in sums else part
    joined = xp.reshape(xp.stack([sums[place] for place in sorted(sums)]), tuple(numbers.shape))
    return RelativeBias(joined) if relative else joined


def join_biases(bias: Bias, dbiases: list[Bias]) -> Bias:
    """The gradient of a bias from those of groups of heads, which each had their heads of it or all of it."""
    if bias is None or len(dbiases) == 1:
        return dbiases[0]
    relative = isinstance(bias, RelativeBias)
    numbers, axis = (bias.values, -2) if relative else (bias, -3)
    parts = [dbias.values if relative else dbias for dbias in dbiases]
    own = numbers.ndim >= -axis and numbers.shape[axis] > 1
    joined = namespace(numbers).concat(parts, axis=axis) if own else sum(parts[1:], parts[0])
    return RelativeBias(joined) if relative else joined


def as_head(a: Array) -> Array:
    """a (..., T, S)   →   (..., 1, T, S); with no batch axes there is nothing to tell apart"""
    return a if a is None or a.ndim < 3 else a[..., None, :, :]


def bias_as_head(bias: Bias) -> Bias:
    """The same of a bias: the values of a `RelativeBias` are (..., T + S − 1)"""
    if not isinstance(bias, RelativeBias):
        return as_head(bias)
    return bias if bias.values.ndim < 2 else RelativeBias(bias.values[..., None, :])


def bias_as_head_vjp(dbias: Bias) -> Bias:
    """Without that axis again"""
    if not isinstance(dbias, RelativeBias):
        return dbias if dbias is None or dbias.ndim < 4 else dbias[..., 0, :, :]
    return dbias if dbias.values.ndim < 2 else RelativeBias(dbias.values[..., 0, :])
