"""Trees: every path is kept, and no two trees are mixed up."""

from types import MappingProxyType
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcmha import masks, save, tree

KEYS = st.text("abc0_", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS, st.recursive(st.integers(), lambda node: st.dictionaries(KEYS, node, min_size=1, max_size=3)), max_size=3
)


class Named(NamedTuple):
    w: float


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(t):
    flat = tree.flatten(t)
    assert tree.unflatten(flat) == t
    assert not any(isinstance(leaf, dict) for leaf in flat.values())


@given(TREES)
def test_map_keeps_the_paths_and_their_order(t):
    doubled = tree.map(lambda a, b: a + b, t, t)
    assert list(tree.flatten(doubled).items()) == [(path, 2 * leaf) for path, leaf in tree.flatten(t).items()]


def test_an_optimiser_step_is_one_map():
    params, grads = {"a": {"w": 3.0}, "b": 5.0}, {"b": 1.0, "a": {"w": 2.0}}
    assert tree.map(lambda p, g: p - 0.5 * g, params, grads) == {"a": {"w": 2.0}, "b": 4.5}
    assert params == {"a": {"w": 3.0}, "b": 5.0}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"w": 1}}, r"trees differ at the root: keys \['a', 'b'\] and keys \['a'\]"),
        ({"a": {"w": 1}, "b": 2, "c": 3}, r"trees differ at the root: keys \['a', 'b'\] and keys \['a', 'b', 'c'\]"),
        ({"a": {"v": 1}, "b": 2}, r"trees differ at a: keys \['w'\] and keys \['v'\]"),
        ({"a": 1, "b": 2}, r"trees differ at a: keys \['w'\] and a leaf"),
        ({"a": {"w": {"x": 1}}, "b": 2}, r"trees differ at a.w: a leaf and keys \['x'\]"),
    ],
)
def test_map_refuses_trees_that_differ(other, message):
    with pytest.raises(KeyError, match=message):
        tree.map(lambda a, b: a, {"a": {"w": 1}, "b": 2}, other)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ({"a.b": 1}, ValueError, "without dots, got 'a.b'"),
        ({"": 1}, ValueError, "non-empty"),
        ({0: 1}, TypeError, "keys of a tree must be strings, got 0"),
        ({"a": {}}, ValueError, "may not hold an empty dict, as a is"),
        ({"a": {"b": {}}}, ValueError, "may not hold an empty dict, as a.b is"),
    ],
)
def test_flatten_refuses_what_no_path_can_name(t, error, message):
    with pytest.raises(error, match=message):
        tree.flatten(t)


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"a..b": 1}, {".a": 1}, {"": 1}])
def test_unflatten_refuses_paths_that_collide_or_are_empty(flat):
    with pytest.raises(ValueError, match=r"leaf|non-empty"):
        tree.unflatten(flat)


CONTAINERS = {
    "list": [{"w": 1.0}, {"w": 2.0}],
    "tuple": (1.0, 2.0),
    "empty list": [],
    "set": {1.0},
    "mappingproxy": MappingProxyType({"w": 1.0}),
}
FUNCTIONS = {
    "map": lambda t: tree.map(lambda a: 2 * a, t),
    "map, the second": lambda t: tree.map(lambda a, b: a, {"a": {"layers": 1.0}}, t),
    "flatten": tree.flatten,
    "unflatten": lambda t: tree.unflatten({"a.layers": t["a"]["layers"]}),
    "save": lambda t: save("/nowhere/model.npz", t),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_other_containers_are_refused_by_path(f, container):
    """`lambda a: 2 * a` would double the list, and not its arrays."""
    name = type(container).__name__
    with pytest.raises(TypeError, match=rf"^a.layers must be an array or a dict of them.*, got a {name}$"):
        f({"a": {"layers": container}})


def test_a_container_in_place_of_the_tree_is_refused():
    with pytest.raises(
        TypeError, match=r'^a tree must be an array or a dict of them, with the keys "0", .* got a list$'
    ):
        tree.map(lambda a: a, [1.0])


@pytest.mark.parametrize("leaf", [None, 0.5, "w", masks.causal(), Named(1.0)])
def test_values_that_are_no_containers_are_leaves(leaf):
    """A NamedTuple is one: masks are made so, and what `npz.entries` tells of a file."""
    assert tree.map(lambda x: x, {"a": leaf}) == tree.unflatten(tree.flatten({"a": leaf})) == {"a": leaf}
