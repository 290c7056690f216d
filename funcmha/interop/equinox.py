"""`equinox.nn.MultiheadAttention`: its parameters in funcmha's layout, and back.

    params = from_module(module)
    y, cache = mha(params, query, key_, value, mask=mask)
    dparams, *_ = mha_vjp(cache, dy)
    to_module(dparams, module)                          # what eqx.filter_grad returns: a module that holds gradients

Differences from funcmha. Equinox has no batch axis and uses `jax.vmap`; here (..., T, C) is one call. Weights are
(H·D, C) and (O, H·E), head after head: reshapes, without a copy. Each of the four biases is optional, and off by
default. Dropout and `process_heads` are options of the call here: `dropout=`, and `rotary=` with pairs "half" for
`RotaryPositionalEmbedding`.

A mask is True = attend, (T, S) or (H, T, S), as here. A fully masked row is the mean of the values in Equinox, and
output_proj's bias here.

Only `to_module` imports Equinox.

Axes: H = num_heads, D = qk_size, E = vo_size, O = output_size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from funcmha import _check
from funcmha.params import Params
from funcmha.tree import unflatten

from ._leaves import Leaf, check_mapping, flatten, from_leaves, to_leaves

__all__ = ["from_module", "from_state", "to_module", "to_state"]

TABLE = {
    "q_proj.w": Leaf("query_proj.weight", "H·D Cq", "H D Cq"),
    "q_proj.b": Leaf("query_proj.bias", "H·D", "H D"),
    "k_proj.w": Leaf("key_proj.weight", "H·D Ck", "H D Ck"),
    "k_proj.b": Leaf("key_proj.bias", "H·D", "H D"),
    "v_proj.w": Leaf("value_proj.weight", "H·E Cv", "H E Cv"),
    "v_proj.b": Leaf("value_proj.bias", "H·E", "H E"),
    "out_proj.w": Leaf("output_proj.weight", "O H·E", "O H E"),
    "out_proj.b": Leaf("output_proj.bias", "O", "O"),
}


def from_module(module: Any, /) -> Params:
    """The parameters of an `equinox.nn.MultiheadAttention`, or of a gradient in its form, as NumPy arrays

    Read-only, and of the same memory where it is the CPU's. Raises TypeError for another kind of module, and what
    `from_state` raises.
    """
    if not all(hasattr(module, name) for name in ("query_proj", "output_proj", "num_heads")):
        raise TypeError(f"module must be an equinox.nn.MultiheadAttention, got {type(module).__name__}")
    arrays = zip((name for name, _, _ in TABLE.values()), _leaves(module, TABLE.values()), strict=True)
    return from_state({name: np.asarray(x) for name, x in arrays if x is not None}, module.num_heads)


def from_state(state: Mapping[str, Any], num_heads: int) -> Params:
    """{"query_proj": {"weight": (H·D, Cq)}, …}  →  {"q_proj": {"w": (H, D, Cq)}, …}

    Also with dotted names in one dict. Arrays keep their library; in NumPy nothing is copied, unless strides cannot be
    split into heads. Raises KeyError for a missing or unexpected name, ValueError for a shape that does not fit or
    that num_heads does not divide, TypeError for mixed dtypes; each names the leaf.
    """
    check_mapping("state", state)
    return from_leaves("state", flatten(state), TABLE, (), _check.integer("num_heads", num_heads, 1))


def to_state(params: Params, /) -> dict[str, Any]:
    """{"q_proj": {"w": (H, D, Cq)}, …}  →  {"query_proj": {"weight": (H·D, Cq)}, …}

    For parameters and for their gradients. Raises ValueError for K < H, which Equinox's module does not have; KeyError
    for leaves that it does not know.
    """
    return unflatten(to_leaves(params, TABLE, ()))


def to_module(params: Params, module: Any, /) -> Any:
    """A new module with the arrays of `params` for all its leaves

    Raises KeyError where only one of the two has a bias, ValueError where shapes differ.
    """
    import equinox

    arrays = to_leaves(params, TABLE, ())
    theirs = zip(TABLE.values(), _leaves(module, TABLE.values()), strict=True)
    shapes = {leaf.name: tuple(x.shape) for leaf, x in theirs if x is not None}
    if arrays.keys() != shapes.keys():
        raise KeyError(f"params must have the leaves of module, {', '.join(shapes)}, and have {', '.join(arrays)}")
    for name, x in arrays.items():
        if tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]} as in module, got {tuple(x.shape)}")
    present = [leaf for leaf in TABLE.values() if leaf.name in arrays]
    return equinox.tree_at(lambda module: _leaves(module, present), module, list(arrays.values()))


def _leaves(module: Any, leaves: Iterable[Leaf]) -> list[Any]:
    """The arrays of the module, None for a bias that it lacks."""
    names = (leaf.name.split(".") for leaf in leaves)
    return [getattr(getattr(module, layer), name) for layer, name in names]
