"""Trees of parameters: dicts of dicts of leaves, named by the dotted path to each leaf.

An optimiser step is three lines:

    y, cache = mha(params, x, x, x)
    grads, *_ = mha_vjp(cache, dy)
    params = tree.map(lambda p, g: p - 1e-3 * g, params, grads)

A leaf is anything but a container: an array, a number, None, a NamedTuple. Lists, tuples, sets and mappings other than
dicts are neither leaves nor branches: every function here raises TypeError, with the path to the first one.
"""

from collections.abc import Callable, Mapping
from typing import Any

Tree = Any  # a dict of trees, or a leaf: anything but a container


CONTAINERS = (list, tuple, set, frozenset, Mapping)


def map(f: Callable[..., Any], tree: Tree, /, *rest: Tree) -> Tree:  # noqa: A001 — it is `tree.map` where it is used
    """f at every leaf:  {"w": f(tree["w"], rest["w"], …), …}

    Keys keep the order of `tree`. Raises KeyError, with the path, where another tree has other keys.
    """
    return _map(f, (tree, *rest), "")


def _map(f: Callable[..., Any], trees: tuple[Tree, ...], path: str) -> Tree:
    first = trees[0]
    for each in trees:
        _check(each, path)
    for other in trees[1:]:
        if isinstance(first, dict) != isinstance(other, dict) or (
            isinstance(first, dict) and first.keys() != other.keys()
        ):
            raise KeyError(f"trees differ at {path or 'the root'}: {_kind(first)} and {_kind(other)}")
    if not isinstance(first, dict):
        return f(*trees)
    return {key: _map(f, tuple([t[key] for t in trees]), f"{path}.{key}" if path else key) for key in first}


def _kind(tree: Tree) -> str:
    return f"keys {sorted(tree)}" if isinstance(tree, dict) else "a leaf"


def _check(node: Any, path: str) -> None:
    """Raise TypeError for anything but a dict or a leaf: f would get it whole, and 2 * [w] is [w, w]."""
    if isinstance(node, dict) or hasattr(node, "dtype") or not isinstance(node, CONTAINERS):
        return
    if not hasattr(node, "_fields"):  # a NamedTuple is a value, such as a mask
        keys = "" if isinstance(node, Mapping) else ', with the keys "0", "1", … for layers in a row'
        raise TypeError(f"{path or 'a tree'} must be an array or a dict of them{keys}, got a {type(node).__name__}")


def flatten(tree: Mapping[str, Tree], /) -> dict[str, Any]:
    """{"a": {"b": x}, "c": y}  →  {"a.b": x, "c": y}, in the order of `tree`

    Raises TypeError for a key that is not a string, ValueError for one that is empty or contains a dot, and for an
    empty dict below the root, which no path could name.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"a tree must be a dict of dicts of arrays, got {type(tree).__name__}")
    return _flatten(tree, "")


def _flatten(tree: Mapping[str, Tree], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"keys of a tree must be strings, got {key!r}")
        if not key or "." in key:
            raise ValueError(f"keys of a tree must be non-empty and without dots, got {key!r}")
        path = prefix + key
        _check(node, path)
        if not isinstance(node, dict):
            flat[path] = node
        elif not node:
            raise ValueError(f"a tree may not hold an empty dict, as {path} is")
        else:
            flat |= _flatten(node, f"{path}.")
    return flat


def unflatten(flat: Mapping[str, Any], /) -> dict[str, Tree]:
    """{"a.b": x, "c": y}  →  {"a": {"b": x}, "c": y}, the inverse of `flatten`

    Raises ValueError where one path runs through another's leaf ("a" and "a.b") or has an empty part.
    """
    tree: dict[str, Tree] = {}
    for path, leaf in flat.items():
        _check(leaf, path)
        *parents, last = path.split(".")
        if not all((*parents, last)):
            raise ValueError(f"the parts of a path must be non-empty, got {path!r}")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path} runs through a leaf")
        if last in node:
            raise ValueError(f"{path} is both a leaf and a branch")
        node[last] = leaf
    return tree
