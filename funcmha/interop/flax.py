"""`flax.nnx.MultiHeadAttention`: its parameters, in funcmha's words and back.

    params = from_module(module)                                   # or from_state(nnx.state(module, nnx.Param))
    y, cache = mha(params, inputs_q, inputs_k, inputs_v, mask=mask, qk_norm=LayerNorm(1e-6))
    dparams, *_ = mha_vjp(cache, dy)
    to_state(dparams)                                              # {"query": {"kernel": …}, …}: what nnx.grad returns
    nnx.update(module, to_state(params))

What differs. A kernel of flax is (C, H, D), and that of the output (H, D, O): transposes, which are views in NumPy.
With `normalize_qk` there are q_norm.w and k_norm.w, and `qk_norm=LayerNorm(1e-6)` is to be passed, as funcmha's own eps
is another; without it, neither. What `decode` and dropout keep in the module are no parameters, so the state is to be
`nnx.state(module, nnx.Param)`; a call with `decode=True` is `self_attention_step`, of one token. `dtype`, which flax
computes with whatever the parameters are, is theirs here. The parameters of `flax.linen` have the same names.

Masks are True = attend and broadcast to (..., H, T, S), as here; `is_causal=True` is `masks.causal()`. A query that may
see no key has the mean of the values in flax, and here out's bias. flax's default path has a softmax of float32 even in
float64; with `sow_weights=True` it keeps the dtype. Its dropout has one mask for all of the batch and heads, and so
takes a mask (T, S) here, `dropout=masked(keep, rate)`; with `broadcast_dropout=False`, (B, H, T, S).

flax is not imported.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from funcmha import _check
from funcmha._xp import is_array
from funcmha.params import Params
from funcmha.tree import unflatten

from ._leaves import Leaf, flatten, from_leaves, to_leaves

TABLE = {
    "q_proj.w": Leaf("query.kernel", "Cq H D", "H D Cq"),
    "q_proj.b": Leaf("query.bias", "H D", "H D"),
    "k_proj.w": Leaf("key.kernel", "Ckv K D", "K D Ckv"),
    "k_proj.b": Leaf("key.bias", "K D", "K D"),
    "v_proj.w": Leaf("value.kernel", "Ckv K D", "K D Ckv"),
    "v_proj.b": Leaf("value.bias", "K D", "K D"),
    "out_proj.w": Leaf("out.kernel", "H D O", "O H D"),
    "out_proj.b": Leaf("out.bias", "O", "O"),
    "q_norm.w": Leaf("query_ln.scale", "D", "D"),
    "k_norm.w": Leaf("key_ln.scale", "D", "D"),
}
TOGETHER = ("q_proj.b", "k_proj.b", "v_proj.b", "out_proj.b"), ("q_norm.w", "k_norm.w")


def from_module(module: Any, /) -> Params:
    """The parameters of a `flax.nnx.MultiHeadAttention`, as NumPy arrays

    Read-only, and of the same memory where it is the CPU's. Raises TypeError for another kind of module, ValueError for
    one whose products or attention are a function of yours, and what `from_state` raises.
    """
    if not all(hasattr(module, name) for name in ("query", "key", "value", "out")):
        raise TypeError(f"module must be a flax.nnx.MultiHeadAttention, got {type(module).__name__}")
    _check_own(module)
    arrays = {}
    for name, _, _ in TABLE.values():
        layer, _, leaf = name.partition(".")
        variable = getattr(getattr(module, layer, None), leaf, None)
        if variable is not None:
            arrays[name] = np.asarray(variable[...])
    return from_leaves("module", arrays, TABLE, TOGETHER)


def from_state(state: Mapping[str, Any], /) -> Params:
    """{"query": {"kernel": (Cq, H, D), "bias": (H, D)}, …}  →  {"q_proj": {"w": (H, D, Cq), "b": (H, D)}, …}

    An `nnx.State`, or a dict of dicts of arrays, which stay arrays of their library: views in NumPy, copies in JAX,
    where this can be differentiated. Raises KeyError for a missing or unexpected name, ValueError for a shape that does
    not fit, TypeError for mixed dtypes; each names the leaf.
    """
    _check.mapping("state", state)
    arrays = {name: leaf[...] if is_array(leaf) else leaf for name, leaf in flatten(state).items()}  # of a variable too
    return from_leaves("state", arrays, TABLE, TOGETHER)


def to_state(params: Params, /) -> dict[str, Any]:
    """{"q_proj": {"w": (H, D, Cq)}, …}  →  {"query": {"kernel": (Cq, H, D)}, …}

    For parameters and for their gradients. Raises ValueError for what flax's module cannot have, E ≠ D or Ck ≠ Cv;
    KeyError for leaves that it does not know, and for biases, or norms, on some only.
    """
    return unflatten(to_leaves(params, TABLE, TOGETHER))


def _check_own(module: Any) -> None:
    """What the caller puts in the place of flax's own attention or products may be anything."""
    flax = sys.modules.get("flax.nnx.nn.attention")  # of which a module is; not imported here
    attend = getattr(module, "attention_fn", None)
    if attend is not None and attend is not getattr(flax, "dot_product_attention", attend):
        raise ValueError(f"attention_fn must be flax's own dot_product_attention, got {attend}")
    for part in ("qkv", "out"):
        for name in (f"{part}_dot_general", f"{part}_dot_general_cls"):
            if getattr(module, name, None) is not None:
                raise ValueError(f"{name} must be None, as funcmha multiplies itself, got {getattr(module, name)}")
