"""Parameters under another library's names and in its layouts, converted both ways by one table.

    TABLE = {
        "q_proj.w": Leaf("query/kernel", "Cq H D", "H D Cq"),        # the leaf of SPEC: its name, its axes, ours
        "out_proj.w": Leaf("output_proj/weight", "O H·E", "O H E"),  # H·E: one axis, head after head
    }

One letter is one size: the letters of a table also show what its library cannot express.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from math import prod
from typing import Any, NamedTuple

from funcmha import _check, tree
from funcmha._arrays import Array, namespace
from funcmha.params import REQUIRED, SPEC, Params, check


class Leaf(NamedTuple):
    name: str  # there
    theirs: str  # axes, of which H·D is one
    ours: str  # the same, in the order of `SPEC`


Table = Mapping[str, Leaf]


def check_mapping(name: str, x: Any) -> None:
    """Raise TypeError unless `x` is a mapping whose keys are strings."""
    if not isinstance(x, Mapping):
        raise TypeError(f"{name} must be a dict of arrays by their names, got {type(x).__name__}")
    for key in x:
        if not isinstance(key, str):
            raise TypeError(f"{name} must be a dict of arrays by their names, got the name {key!r}")


def from_leaves(
    what: str, arrays: Mapping[str, Array], table: Table, together: Sequence[Sequence[str]], heads: int = 1
) -> Params:
    """The arrays by their names there  →  a tree of `SPEC`, by transposes and splits, which are views where possible

    together   groups of leaves, each present as a whole or not at all
    heads      H, for a table with H·D

    Raises KeyError for a missing or unexpected name, TypeError for mixed dtypes, ValueError for shapes that do not fit.
    """
    _check.keys(what, arrays, [table[leaf].name for leaf in REQUIRED], [leaf.name for leaf in table.values()])
    _check_together(what, arrays, [[table[leaf].name for leaf in group] for group in together])
    _check.one_dtype(arrays.items())
    axes = _check.Axes()
    for name, theirs, _ in table.values():
        if name in arrays:
            axes(name, arrays[name], theirs)
            _check_heads(name, tuple(arrays[name].shape), theirs, heads)
    flat = {
        leaf: _permuted(_split(arrays[name], theirs, heads), theirs.replace("·", " "), ours)
        for leaf, (name, theirs, ours) in table.items()
        if name in arrays
    }
    return tree.unflatten({leaf: flat[leaf] for leaf in SPEC if leaf in flat})


def to_leaves(params: Params, table: Table, together: Sequence[Sequence[str]]) -> dict[str, Array]:
    """A tree of `SPEC`  →  the arrays by their names there, in the order of the table, as views where possible

    Raises KeyError for a leaf that is not in the table, ValueError for sizes that the table's letters do not allow.
    """
    _, leaves = check(params, SPEC)
    _check.keys("params", leaves, REQUIRED, table)
    _check_together("params", leaves, together)
    axes = _check.Axes()
    for leaf, (_, _, ours) in table.items():
        if leaf in leaves:
            axes(leaf, leaves[leaf], ours)
    return {
        name: _joined(_permuted(leaves[leaf], ours, theirs.replace("·", " ")), theirs)
        for leaf, (name, theirs, ours) in table.items()
        if leaf in leaves
    }


def flatten(state: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"query": {"kernel": x}}  →  {"query.kernel": x}, of mappings of any kind"""
    flat: dict[str, Any] = {}
    for key, node in state.items():
        flat |= flatten(node, f"{path}{key}.") if isinstance(node, Mapping) else {f"{path}{key}": node}
    return flat


def _permuted(x: Array, axes: str, order: str) -> Array:
    if axes == order:
        return x
    return namespace(x).permute_dims(x, tuple(axes.split().index(axis) for axis in order.split()))


def _split(x: Array, axes: str, heads: int) -> Array:
    """H·D  →  H, D"""
    if "·" not in axes:
        return x
    pairs = [(heads, n // heads) if "·" in axis else (n,) for axis, n in zip(axes.split(), x.shape, strict=True)]
    return namespace(x).reshape(x, tuple(chain(*pairs)))


def _joined(x: Array, axes: str) -> Array:
    """H, D  →  H·D"""
    if "·" not in axes:
        return x
    left = iter(x.shape)
    return namespace(x).reshape(x, tuple(prod(islice(left, axis.count("·") + 1)) for axis in axes.split()))


def _check_heads(name: str, shape: tuple[int, ...], axes: str, heads: int) -> None:
    for axis, n in zip(axes.split(), shape, strict=True):
        if "·" in axis and n % heads:
            spelt = ", ".join(axes.split()) + "," * (len(shape) == 1)
            raise ValueError(f"{name} must be ({spelt}) with {axis} a multiple of num_heads={heads}, got {shape}")


def _check_together(what: str, names: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> None:
    for group in groups:
        there = [name for name in group if name in names]
        if len(there) not in (0, len(group)):
            raise KeyError(f"{what} must have all of {', '.join(group)}, or none, and has {', '.join(there)}")
