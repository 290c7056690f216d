"""Check that a function and its vjp follow the protocol, and that the gradient is correct."""

from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np

from funcmha._arrays import dtype_name, is_array

from .gradient import Agreement, Pair, check_gradient, double
from .rounding import TINY
from .structure import (
    aligned,
    cast,
    children,
    copied,
    is_complex,
    is_floating,
    is_int,
    is_numpy,
    leaves,
    map_leaves,
    normal,
    require,
    same,
)


def check_vjp(
    f: Callable[..., tuple[Any, Any]],
    f_vjp: Callable[..., tuple[Any, ...]],
    inputs: tuple[Any, ...],
    static: Mapping[str, Any] | None = None,
    /,
    *,
    seed: int = 0,
    tolerance: float = 1e-13,
) -> Agreement:
    """|⟨dy, J d⟩ − ⟨Jᵀ dy, d⟩| ≤ tolerance · Σ |Jᵀ dy| |d|      for a random cotangent dy and a random direction d

    `y, cache = f(*inputs, **static)` and `grads = f_vjp(cache, dy)`, where inputs and y are NumPy arrays, Python
    numbers, None, or dicts, tuples, lists, NamedTuples and dataclasses of them. What is not floating (integers, masks)
    has no gradient: None, or 0. A Python int has one where f_vjp returns a float. Raises AssertionError with the
    reason, also under `python -O`, unless

    - the gradients are a tuple, one per input, with the tree, the shapes and the dtypes of the inputs, None for None;
    - neither function writes to the inputs, and the vjp leaves its cotangent and the cache as they were;
    - a second call gives the same bits, and twice the cotangent exactly twice the gradients, except for underflow;
    - in float64 the gradient passes the inequality above.

    J d comes from a complex step (Squire and Trapp 1998), which is exact to rounding, where f takes complex128 arrays
    and is holomorphic, as every op of funcmha is; differences confirm this. Where f is not holomorphic (abs, norm, var,
    conj, casts to real types), J d comes from differences, and the inequality holds within their estimated error: about
    1e-11 for a smooth f, about 1e-4 for one that rounds to float32 on its way. The result says which method was used.
    At a corner of f, such as that of |x| at 0, any value in between is a gradient: a nearby point is checked instead.

    Raises ValueError where float64 cannot resolve a derivative of f, TypeError for inputs or outputs that are complex
    or of another library.
    """
    static = dict(static or {})
    _check_inputs(inputs)
    rng = np.random.default_rng(seed)
    grads = _check_protocol(f, f_vjp, inputs, static, rng)
    wide = tuple(map_leaves(double, x, g) for x, g in zip(inputs, aligned(inputs, grads), strict=True))
    return check_gradient(Pair(f, f_vjp, static, tolerance), wide, rng)


# ── the protocol ─────────────────────────────────────────────────────────────────────────────────────────────────


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, tuple | list):
        raise TypeError(f"inputs must be a tuple, one per positional input of f, got {type(inputs).__name__}")
    for i, x in enumerate(inputs):
        for leaf in leaves(x):
            if is_complex(leaf):
                raise TypeError(f"inputs[{i}] must be real, got {np.asarray(leaf).dtype}")
            if is_array(leaf) and not is_numpy(leaf):
                raise TypeError(f"inputs[{i}] must be of NumPy, got {type(leaf).__module__}.{type(leaf).__name__}")


def _check_protocol(f: Any, f_vjp: Any, inputs: tuple[Any, ...], static: dict[str, Any], rng: Any) -> tuple[Any, ...]:
    """All but the numbers; the gradients."""
    before = copied(inputs)
    y, cache = _called(f, inputs, static)
    again, _ = _called(f, inputs, static)
    require(same(copied(y), copied(again)), "f gives other bits when called again")
    require(same(copied(inputs), before), "f writes to its inputs")

    dy = map_leaves(lambda a: normal(a, rng), y)
    cached, cotangent = copied(cache), copied(dy)
    grads: tuple[Any, ...] = f_vjp(cache, dy)
    require(same(copied(inputs), before), "f_vjp writes to the inputs of f")
    require(same(copied(cache), cached), "f_vjp writes to the cache")
    require(same(copied(dy), cotangent), "f_vjp writes to its cotangent")
    _check_structure(grads, inputs)
    require(same(copied(f_vjp(cache, dy)), copied(grads)), "f_vjp gives other bits when called again")
    require(_is_linear(lambda c: f_vjp(cache, map_leaves(lambda g: _times(c, g), dy))), _NOT_LINEAR)
    return grads


_NOT_LINEAR = "f_vjp is not linear in its cotangent"


def _called(f: Any, inputs: tuple[Any, ...], static: dict[str, Any]) -> tuple[Any, Any]:
    """y and the cache; a Python int, alone, is a number."""
    result = f(*inputs, **static)
    require(isinstance(result, tuple) and len(result) == 2, f"f must return y and a cache, got {_told(result)}")
    y, cache = result
    if any(is_complex(leaf) for leaf in leaves(y)):
        raise TypeError("f must give real outputs for real inputs, got complex ones")
    return float(y) if is_int(y) else y, cache


def _told(x: Any) -> str:
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__


def _times(c: float, g: Any) -> Any:
    if g is None or isinstance(g, float):
        return None if g is None else c * g
    return cast(g.dtype.type(c) * g, g.dtype, g)


def _check_structure(grads: Any, inputs: tuple[Any, ...]) -> None:
    require(isinstance(grads, tuple), f"f_vjp must return a tuple, got {type(grads).__name__}")
    n = len(inputs)
    require(len(grads) == n, f"f_vjp must return {n} gradients, one per input, got {len(grads)}")
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        if grad is None and children(x) is not None and not any(map(is_floating, leaves(x))):
            continue  # None for a structure in which nothing has a gradient
        try:
            map_leaves(_check_leaf, x, grad)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"gradient {i}: {error.args[0]}") from None


def _check_leaf(x: Any, grad: Any) -> None:
    if x is None:
        require(grad is None, "must be None, as the input is")
    elif isinstance(x, float):
        require(_is_number(grad), f"must be a number as the input is, got {grad!r}")
    elif not is_floating(x):
        real = is_int(x) and _is_number(grad)
        require(grad is None or real or _is_zero(x, grad), f"must be None or 0, as the input is not floating: {x!r}")
    else:
        require(grad is not None, "is None, and the input is not")
        require(hasattr(grad, "shape"), f"must be an array as the input is, got {type(grad).__name__}")
        require(grad.shape == x.shape, f"must have shape {x.shape} as the input has, got {grad.shape}")
        require(grad.dtype == x.dtype, f"must have dtype {x.dtype} as the input has, got {grad.dtype}")


def _is_number(x: Any) -> bool:
    """Whether x is one real number: of Python, or of an array without axes."""
    return (isinstance(x, Real) and not isinstance(x, bool)) or (is_floating(x) and x.shape == ())


def _is_zero(x: Any, grad: Any) -> bool:
    """Whether the gradient of integers is 0 of their shape, in any dtype: JAX has float0, which takes no room."""
    return np.shape(grad) == np.shape(x) and (np.asarray(grad).dtype.itemsize == 0 or not np.any(grad))


def _is_linear(vjp: Callable[[float], Any]) -> bool:
    """vjp(2) = 2 vjp(1) to the bit, but for underflow

    What underflows in a type that is narrower than the gradient's is off by as much at any scale, or more at a smaller
    one, where a term of another power is not; and a constant is there at 0 too.
    """
    off = [g for g in _off(vjp(2.0), vjp(1.0)) if g != 0]
    if not off:
        return True
    if any(np.any(g) for g in leaves(vjp(0.0)) if g is not None):
        return False
    smaller = [g for g in _off(vjp(2.0**-6), vjp(2.0**-7)) if g != 0]
    return bool(np.isfinite(off).all() and smaller and max(smaller) >= max(off) / 4)


def _off(twice: Any, once: Any) -> Iterator[float]:
    """max |g2 − 2 g|, beyond what underflows, of every leaf"""
    with np.errstate(all="ignore"):
        for g2, g in zip(leaves(twice), leaves(once), strict=True):
            if not (is_floating(g) or is_int(g)):
                continue
            a, b = np.asarray(g2), np.asarray(g)
            wanted = b * b.dtype.type(2)
            alike = (a == wanted) | (np.isnan(a) & np.isnan(wanted))
            off = np.where(alike, 0.0, np.abs(a - wanted).astype(np.float64))
            worst = float(np.max(off, initial=0.0))
            yield worst if not worst <= 4 * TINY.get(dtype_name(b), 0.0) else 0.0
