"""Structures of inputs, outputs and gradients: dicts, lists, tuples, NamedTuples and dataclasses, down to their leaves.

`funcmha.tree` is for parameters, which are dicts of dicts. A pair may take or give any of these: a key/value cache, a
bias by diagonals, a tuple of outputs.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from funcmha._arrays import dtype_name

Node = Any  # a structure or a leaf: None, an array, a number, anything else


def children(node: Node) -> dict[Any, Node] | None:
    """The parts of a structure by key, index or field; None for a leaf."""
    if isinstance(node, dict):
        return dict(node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if isinstance(node, tuple | list):
        return dict(enumerate(node))
    if is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in fields(node)}
    return None


def leaves(node: Node) -> Iterator[Any]:
    """Every leaf, in order."""
    parts = children(node)
    if parts is None:
        yield node
    else:
        for part in parts.values():
            yield from leaves(part)


def map_leaves(f: Callable[..., Any], node: Node, /, *others: Node) -> Node:
    """f(leaf, the others' leaf, …) at every leaf of `node`, in its structure

    Raises KeyError, with the path, where another has another structure.
    """
    return _map(f, (node, *others), "")


def _map(f: Callable[..., Any], nodes: tuple[Node, ...], path: str) -> Node:
    first, *others = nodes
    parts = children(first)
    if parts is None:
        return f(*nodes)
    found: list[dict[Any, Node]] = [parts]
    for other in others:
        theirs = children(other)
        if theirs is None or theirs.keys() != parts.keys() or _kind(other) != _kind(first):
            raise KeyError(f"trees differ at {path or 'the root'}: {_told(first)} and {_told(other)}")
        found.append(theirs)
    return _rebuilt(first, {key: _map(f, tuple(x[key] for x in found), f"{path}.{key}".lstrip(".")) for key in parts})


def _kind(node: Node) -> Any:
    return dict if isinstance(node, dict) else type(node)


def _rebuilt(node: Node, parts: dict[Any, Node]) -> Node:
    if isinstance(node, dict):
        return parts
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*parts.values())
    if isinstance(node, tuple | list):
        return type(node)(parts.values())
    found = copy.copy(node)
    for name, part in parts.items():
        object.__setattr__(found, name, part)  # of a frozen dataclass, too
    return found


def _told(node: Node) -> str:
    parts = children(node)
    if parts is None:
        return f"a leaf, {type(node).__name__}"
    name = "" if isinstance(node, dict) else f"{type(node).__name__} of "
    return f"{name}keys {sorted(parts, key=str)}" if isinstance(node, dict) else f"{name}{len(parts)} parts"


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────────────────────


def is_numpy(x: Any) -> bool:
    """Whether x is an array or a scalar of NumPy."""
    return isinstance(x, np.ndarray | np.generic)


def is_floating(x: Any) -> bool:
    """Whether x has a gradient by its kind: an array or a scalar of floating numbers, or a Python float."""
    return isinstance(x, float) or (is_numpy(x) and x.dtype.names is None and "float" in dtype_name(x))


def is_complex(x: Any) -> bool:
    """Whether x is an array or a number that is complex."""
    return isinstance(x, complex) or (is_numpy(x) and x.dtype.kind == "c")


def is_int(x: Any) -> bool:
    """Whether x is a Python int, which may stand for a real number."""
    return type(x) is int


def copied(node: Node) -> list[Any]:
    """What `same` compares, taken now: the bytes of each array, and every other leaf as it is."""
    return [_frozen(leaf) for leaf in leaves(node)]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two of `copied` are alike to the bit, so that NaN equals itself."""
    return len(a) == len(b) and all(x is y or (type(x) is type(y) and bool(x == y)) for x, y in zip(a, b, strict=True))


def _frozen(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
        return leaf
    a = np.asarray(leaf)
    return str(a.dtype), a.shape, a.tobytes()


def cast(x: Any, dtype: Any, like: Any) -> Any:
    """x in a dtype; an array if `like` is one."""
    a = np.asarray(x, dtype)
    return a if isinstance(like, np.ndarray) else a[()]


def normal(y: Any, rng: Any) -> Any:
    """A random cotangent of an output, None for one that has none"""
    if not is_floating(y):
        return None
    return cast(rng.standard_normal(np.shape(y)), y.dtype, y) if is_numpy(y) else float(rng.standard_normal())


def aligned(inputs: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients in the order of the inputs' leaves; one that is None for a structure, at each of its leaves"""
    pairs = zip(inputs, grads, strict=True)
    return tuple(map_leaves(lambda _: None, x) if g is None else map_leaves(lambda _, g: g, x, g) for x, g in pairs)


def require(holds: Any, message: str) -> None:
    """What `assert` would do, which `python -O` leaves out."""
    if not holds:
        raise AssertionError(message)
