"""Check that a function and its vjp follow the protocol, and that the gradient is correct."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from funcmha import tree
from funcmha._arrays import Array

from .rounding import TINY

STEP = 1e-30  # of the complex step: nothing is subtracted, so it may be this small


def check_vjp(
    f: Callable[..., tuple[Array, Any]],
    f_vjp: Callable[..., tuple[Any, ...]],
    inputs: tuple[Any, ...],
    static: Mapping[str, Any] | None = None,
    /,
    *,
    seed: int = 0,
    tolerance: float = 1e-13,
) -> None:
    """|⟨dy, J d⟩ − ⟨Jᵀ dy, d⟩| ≤ tolerance · Σ |Jᵀ dy| |d|      for a random cotangent dy and a random direction d

    `y, cache = f(*inputs, **static)` and `grads = f_vjp(cache, dy)`, where each input is a NumPy array, a dict of
    dicts of them, or None. Raises AssertionError, with the reason, unless

    - the gradients are a tuple, one per input, with the tree, the shapes and the dtypes of the inputs, None for None;
    - neither function writes to the inputs, and the vjp leaves its cotangent and the cache as they were;
    - a second call gives the same bits, and twice the cotangent exactly twice the gradients, except for underflow;
    - in float64 the gradient passes the inequality above, with J d by a complex step (Squire and Trapp 1998), which is
      exact to rounding: `f` must therefore take complex128 arrays, and be holomorphic as every op of funcmha is.
    """
    static = dict(static or {})
    rng = np.random.default_rng(seed)
    _check_protocol(f, f_vjp, inputs, static, rng)
    _check_gradient(f, f_vjp, tuple(tree.map(_double, x) for x in inputs), static, rng, tolerance)


def _check_protocol(f: Any, f_vjp: Any, inputs: tuple[Any, ...], static: dict[str, Any], rng: Any) -> None:
    before = _snapshot(inputs)
    y, cache = f(*inputs, **static)
    again, _ = f(*inputs, **static)
    assert _same(y, again), "f gives other bits when called again"
    assert _same(_snapshot(inputs), before), "f writes to its inputs"

    dy = rng.standard_normal(y.shape).astype(y.dtype)
    cached, cotangent = _snapshot(cache), dy.copy()
    grads = f_vjp(cache, dy)
    assert _same(_snapshot(inputs), before), "f_vjp writes to the inputs of f"
    assert _same(_snapshot(cache), cached), "f_vjp writes to the cache"
    assert _same(dy, cotangent), "f_vjp writes to its cotangent"
    _check_structure(grads, inputs)
    assert _same(f_vjp(cache, dy), grads), "f_vjp gives other bits when called again"
    twice = _leaves(lambda g2, g: np.abs(g2 - 2 * g) <= 4 * TINY[g.dtype.name], f_vjp(cache, 2 * dy), grads)
    assert all(np.all(exact) for exact in _flat(twice)), "f_vjp is not linear in its cotangent"


def _check_structure(grads: Any, inputs: tuple[Any, ...]) -> None:
    assert isinstance(grads, tuple), f"f_vjp must return a tuple, got {type(grads).__name__}"
    assert len(grads) == len(inputs), f"f_vjp must return {len(inputs)} gradients, one per input, got {len(grads)}"
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        try:
            tree.map(_check_leaf, grad, x)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"gradient {i}: {error}") from None


def _check_leaf(grad: Any, x: Any) -> None:
    if x is None:
        assert grad is None, "must be None, as the input is"
    else:
        assert grad is not None, "is None, and the input is not"
        assert grad.shape == x.shape, f"must have shape {x.shape} as the input has, got {grad.shape}"
        assert grad.dtype == x.dtype, f"must have dtype {x.dtype} as the input has, got {grad.dtype}"


def _check_gradient(f: Any, f_vjp: Any, inputs: tuple[Any, ...], static: Any, rng: Any, tolerance: float) -> None:
    directions = [tree.map(lambda a: None if a is None else rng.standard_normal(a.shape), x) for x in inputs]
    moved = [
        tree.map(lambda a, d: None if a is None else a + 1j * STEP * d, *pair)
        for pair in zip(inputs, directions, strict=True)
    ]
    y, cache = f(*inputs, **static)
    dy = rng.standard_normal(y.shape)
    forward = np.sum(dy * np.imag(f(*moved, **static)[0]) / STEP)
    terms = _leaves(lambda g, d: g * d, f_vjp(cache, dy), tuple(directions))
    flat = np.concatenate([np.zeros(0)] + [np.ravel(t) for t in _flat(terms)])
    error, size = abs(forward - flat.sum()), np.abs(flat).sum()
    assert error <= tolerance * size, (
        f"f_vjp is not the gradient: ⟨dy, J d⟩ = {forward:.17g} and ⟨Jᵀ dy, d⟩ = {flat.sum():.17g} differ by "
        f"{error / size if size else error:.2g} of the sum of magnitudes {size:.3g}, and {tolerance:.0e} is allowed"
    )


def _double(a: Any) -> Any:
    return None if a is None else np.asarray(a, np.float64)


def _leaves(f: Any, *trees: tuple[Any, ...]) -> tuple[Any, ...]:
    """f at every array of tuples of trees."""
    return tuple(tree.map(lambda *a: None if a[0] is None else f(*a), *parts) for parts in zip(*trees, strict=True))


def _flat(node: Any) -> list[Any]:
    """Every leaf of dicts and tuples, in order."""
    if isinstance(node, dict):
        node = tuple(node.values())
    if isinstance(node, tuple):
        return [leaf for child in node for leaf in _flat(child)]
    return [] if node is None else [node]


def _snapshot(node: Any) -> list[Any]:
    return [np.array(leaf) for leaf in _flat(node)]


def _same(a: Any, b: Any) -> bool:
    """Whether two structures hold the same bits, so that NaN is itself."""
    a, b = _snapshot(tuple(a) if isinstance(a, list) else a), _snapshot(tuple(b) if isinstance(b, list) else b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )
