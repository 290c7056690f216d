"""The door of forward mode: what the tangents of an attention must be, checked once, before any arithmetic.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from typing import Any, NamedTuple

from . import _check
from ._bias import on_bias
from ._doors import values_of
from ._xp import Array, widen
from .biases import RelativeBias

check_tangent = _check.tangent
INPUTS = ("q_dot", "k_dot", "v_dot", "bias_dot", "sink_dot")


class Tangents(NamedTuple):
    """Of the inputs of `attention`, in the dtype computed with; None is zero."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Array | RelativeBias  # as the bias
    sink: Array  # (H,), or () without a head axis


class Cotangents(NamedTuple):
    """Of the outputs of `attention`, and the tangents of these, in the dtype computed with; None is zero."""

    do: Array  # (..., H, T, E)
    do_dot: Array  # (..., H, T, E)
    dlse: Array  # (..., H, T)
    dlse_dot: Array  # (..., H, T)


def check_cotangents(
    cache: Any, do: Array, do_dot: Array, dlse: Array, dlse_dot: Array, *inputs_dot: Any
) -> Cotangents:
    """The cotangents of an attention with their tangents, wide, of the dtype that the tangents of the inputs have."""
    given = {"do": do, "do_dot": do_dot, "dlse": dlse, "dlse_dot": dlse_dot}
    _check.one_dtype([("do", do)], optional=[*given.items(), *zip(INPUTS, map(values_of, inputs_dot), strict=True)])
    q, v = cache.q, cache.v
    o, lse = (*q.shape[:-1], v.shape[-1]), tuple(q.shape[:-1])
    _check.cotangent("do", do, o, q, "... H T E")
    _check.cotangent("dlse", dlse, lse, q, "... H T", optional=True)
    check_tangent("do_dot", do_dot, o, q, "... H T E")
    check_tangent("dlse_dot", dlse_dot, lse, q, "... H T")
    return Cotangents(*map(widen, given.values()))


def check_tangents(cache: Any, q_dot: Array, k_dot: Array, v_dot: Array, bias_dot: Any, sink_dot: Array) -> Tangents:
    """The tangents of the inputs that an attention's cache holds, wide; each may be None."""
    one_dtype(list(zip(INPUTS, map(values_of, (q_dot, k_dot, v_dot, bias_dot, sink_dot)), strict=True)))
    q, k, v, bias, sink, *_ = cache
    head = q.ndim > 2
    check_tangent("q_dot", q_dot, q.shape, q, "... H T D" if head else "T D")
    check_tangent("k_dot", k_dot, k.shape, q, "... K S D" if head else "S D")
    check_tangent("v_dot", v_dot, v.shape, q, "... K S E" if head else "S E")
    check_bias_tangent(bias_dot, bias, q)
    check_tangent("sink_dot", sink_dot, _check.shape_of(sink), q, "H" if head else "")
    return Tangents(widen(q_dot), widen(k_dot), widen(v_dot), on_bias(widen, bias_dot), widen(sink_dot))


def check_bias_tangent(bias_dot: Any, bias: Any, computed: Array) -> None:
    """Raise unless the tangent of a bias is None, or what the bias is: an array, or a `RelativeBias`, of its shape."""
    if (
        bias_dot is not None
        and bias is not None
        and isinstance(bias_dot, RelativeBias) != isinstance(bias, RelativeBias)
    ):
        raise TypeError(f"bias_dot must be a {type(bias).__name__} as bias is, got {type(bias_dot).__name__}")
    name = "bias_dot.values" if isinstance(bias_dot, RelativeBias) else "bias_dot"
    check_tangent(name, values_of(bias_dot), _check.shape_of(values_of(bias)), computed)


def one_dtype(tangents: list[tuple[str, Array]]) -> None:
    """Raise TypeError unless all that are not None are arrays of one dtype."""
    _check.one_dtype([], optional=tangents)


def dtype_of(computed: Array, *tangents: Any) -> Any:
    """The dtype of the tangents, and so of what is made of them; without any, the one computed with."""
    return next((values_of(x).dtype for x in tangents if x is not None), computed.dtype)
