"""`flax.nnx.MultiHeadAttention`: its parameters in funcmha's layout, and back.

    params = from_module(module)                                   # or from_state(nnx.state(module, nnx.Param))
    y, cache = mha(params, inputs_q, inputs_k, inputs_v, mask=mask, qk_norm=LayerNorm(1e-6))
    dparams, *_ = mha_vjp(cache, dy)
    to_state(dparams)                                              # {"query": {"kernel": …}, …}: what nnx.grad returns
    nnx.update(module, to_state(params))

Differences from funcmha. Kernels of flax are (C, H, D) and (H, D, O): transposes, which are views in NumPy. With
`normalize_qk` there are q_norm.w and k_norm.w: pass `qk_norm=LayerNorm(1e-6)`, as funcmha's own eps differs. The module
also holds state of `decode` and dropout, so take `nnx.state(module, nnx.Param)`; a call with `decode=True` is
`kv_cache.step` of one token. flax computes in `dtype`, funcmha in the dtype of the parameters. Parameters of
`flax.linen` have the same names.

Masks are True = attend and broadcast to (..., H, T, S), as here; `is_causal=True` is `masks.causal()`. A fully masked
row is the mean of the values in flax, and out's bias here. On its default path flax has a softmax of float32 even in
float64; with `sow_weights=True` it keeps the dtype. Its dropout has one mask for all of the batch and heads: here
`dropout=masked(keep, rate)` with keep (T, S), or (B, H, T, S) for `broadcast_dropout=False`.

flax is not imported.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from funcmha._arrays import is_array
from funcmha.params import Params
from funcmha.tree import unflatten

from ._leaves import Leaf, check_mapping, flatten, from_leaves, to_leaves

__all__ = ["from_module", "from_state", "to_state"]

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
    one with custom products or attention, and what `from_state` raises.
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

    An `nnx.State`, or a dict of dicts of arrays, which keep their library: views in NumPy, differentiable copies in
    JAX. Raises KeyError for a missing or unexpected name, ValueError for a shape that does
    not fit, TypeError for mixed dtypes; each names the leaf.
    """
    check_mapping("state", state)
    arrays = {name: leaf[...] if is_array(leaf) else leaf for name, leaf in flatten(state).items()}  # of a variable too
    return from_leaves("state", arrays, TABLE, TOGETHER)


def to_state(params: Params, /) -> dict[str, Any]:
    """{"q_proj": {"w": (H, D, Cq)}, …}  →  {"query": {"kernel": (Cq, H, D)}, …}

    For parameters and for their gradients. Raises ValueError for E ≠ D or Ck ≠ Cv, which flax does not
    support; KeyError for unknown leaves, and for biases or norms on some projections only.
    """
    return unflatten(to_leaves(params, TABLE, TOGETHER))


def _check_own(module: Any) -> None:
    """Only flax's own attention and products are supported."""
    flax = sys.modules.get("flax.nnx.nn.attention")  # of which a module is; not imported here
    attend = getattr(module, "attention_fn", None)
    if attend is not None and attend is not getattr(flax, "dot_product_attention", attend):
        raise ValueError(f"attention_fn must be flax's own dot_product_attention, got {attend}")
    for part in ("qkv", "out"):
        for name in (f"{part}_dot_general", f"{part}_dot_general_cls"):
            if getattr(module, name, None) is not None:
                raise ValueError(f"{name} must be None, as funcmha multiplies itself, got {getattr(module, name)}")
