"""`keras.layers.MultiHeadAttention` and `GroupQueryAttention`: parameters and masks in funcmha's form, and back.

    params = from_layer(layer)                                     # or from_weights({"query/kernel": …, …})
    mask = masks(attention_mask=attention_mask, use_causal_mask=True)
    y, cache = mha(params, query, key, value, mask=mask)           # Keras: layer(query, value, key)
    dparams, *_ = mha_vjp(cache, dy)
    layer.set_weights(list(to_weights(params).values()))

Differences from funcmha. **Keras takes the value before the key.** Kernels are (C, H, D) and (H, E, O): transposes,
which are views in NumPy. Gates (`use_gate`) and outputs of several axes are not supported. For inputs (B, X, T, C)
Keras attends over X and T together, here one axis X·T; with `attention_axes=2` X is batch, as here. Dropout is an
option of the call, `dropout=`; `flash_attention` gives the same numbers.

Masks are True = attend, but (B, T, S), where funcmha reads three axes as (H, T, S): `masks` inserts the axis of heads.
`sliding_window` counts the query itself: 3 allows two keys before it *and* two after it, unless causal. A fully masked
row is attention_output's bias here, and in Keras with `return_attention_scores=True`. On its fused path Keras gives the
mean of the values, and computes in float32 whatever the dtype (with PyTorch's backend).

Keras is not imported, whichever its backend.

Axes: B batch, T queries, S keys, H = num_heads or num_query_heads, K = num_key_value_heads, D = key_dim, E = value_dim.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from funcmha import _check
from funcmha import masks as structured
from funcmha._arrays import Array, is_array
from funcmha.masks import Mask
from funcmha.params import Params, sizes

from ._leaves import Leaf, check_mapping, from_leaves, to_leaves
from ._tensors import to_array

__all__ = ["from_layer", "from_weights", "masks", "to_weights"]

# One key/value head for each query head, with widths of its own.
MULTI_HEAD = {
    "q_proj.w": Leaf("query/kernel", "Cq H D", "H D Cq"),
    "q_proj.b": Leaf("query/bias", "H D", "H D"),
    "k_proj.w": Leaf("key/kernel", "Ck H D", "H D Ck"),
    "k_proj.b": Leaf("key/bias", "H D", "H D"),
    "v_proj.w": Leaf("value/kernel", "Cv H E", "H E Cv"),
    "v_proj.b": Leaf("value/bias", "H E", "H E"),
    "out_proj.w": Leaf("attention_output/kernel", "H E O", "O H E"),
    "out_proj.b": Leaf("attention_output/bias", "O", "O"),
}
# Fewer of them, one width for all heads, and one for input and output.
GROUPED = MULTI_HEAD | {
    "k_proj.w": Leaf("key/kernel", "Ck K D", "K D Ck"),
    "k_proj.b": Leaf("key/bias", "K D", "K D"),
    "v_proj.w": Leaf("value/kernel", "Cv K D", "K D Cv"),
    "v_proj.b": Leaf("value/bias", "K D", "K D"),
    "out_proj.w": Leaf("attention_output/kernel", "H D Cq", "Cq H D"),
    "out_proj.b": Leaf("attention_output/bias", "Cq", "Cq"),
}
TOGETHER = (("q_proj.b", "k_proj.b", "v_proj.b", "out_proj.b"),)


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


def from_layer(layer: Any, /) -> Params:
    """The parameters of a built `MultiHeadAttention` or `GroupQueryAttention`, as NumPy arrays

    Views of the same memory where Keras's backend allows it: PyTorch's on the CPU, and JAX's, read-only. Raises
    TypeError for another kind of object, ValueError for a layer that is not built, and what `from_weights` raises.
    """
    if not hasattr(layer, "weights") or not hasattr(layer, "set_weights"):
        raise TypeError(
            f"layer must be a keras.layers.MultiHeadAttention or GroupQueryAttention, got {type(layer).__name__}"
        )
    if not getattr(layer, "built", True):
        raise ValueError("layer must have been built, by layer.build or a first call, got one without weights")
    # weight.numpy() would copy
    return from_weights({weight.path: np.asarray(to_array(weight.path, weight.value)) for weight in layer.weights})


def from_weights(weights: Mapping[str, Array], /) -> Params:
    """{"…/query/kernel": (Cq, H, D), "…/query/bias": (H, D), …}  →  {"q_proj": {"w": (H, D, Cq), "b": (H, D)}, …}

    The last two parts of the paths that Keras gives its variables are read. Arrays keep their library, and are
    transposed as views in NumPy. Raises KeyError for a missing or unexpected name, ValueError for a shape that does not
    fit, TypeError for mixed dtypes; each names the weight.
    """
    check_mapping("weights", weights)
    arrays = {"/".join(path.split("/")[-2:]): x for path, x in weights.items()}
    if len(arrays) < len(weights):
        raise KeyError(f"weights must be those of one layer, got {', '.join(weights)}")
    kernels = [arrays[name] for name in ("query/kernel", "key/kernel") if name in arrays]
    heads = {tuple(x.shape)[1:2] for x in kernels if is_array(x)}
    table = GROUPED if len(heads) == 2 else MULTI_HEAD
    return from_leaves("weights", arrays, table, TOGETHER)


def to_weights(params: Params, /) -> dict[str, Array]:
    """{"q_proj": {"w": (H, D, Cq)}, …}  →  {"query/kernel": (Cq, H, D), …}, in the order of `layer.weights`

    For parameters and for their gradients. Raises ValueError for K < H with E ≠ D or O ≠ Cq, which neither layer
    supports; KeyError for unknown leaves, and for biases on some projections only.
    """
    H, K, *_ = sizes(params)
    return to_leaves(params, MULTI_HEAD if H == K else GROUPED, TOGETHER)


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def masks(
    *,
    query_mask: Array = None,
    value_mask: Array = None,
    key_mask: Array = None,
    attention_mask: Array = None,
    use_causal_mask: bool = False,
    sliding_window: int | None = None,
) -> Mask | None:
    """The intersection, for `mask=`: query_mask (B, T)   value_mask, key_mask (B, S)   attention_mask (B, T, S)

    Boolean, True = attend; None for everything. attention_mask may be (T, S) too. Raises TypeError for what is not
    boolean, ValueError for another number of axes or a window without the query itself.
    """
    wanted = {"query_mask": "B T", "value_mask": "B S", "key_mask": "B S", "attention_mask": "B T S"}
    given = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask, "attention_mask": attention_mask}
    given = {name: x for name, x in given.items() if x is not None}
    axes = _check.Axes()
    for name, x in given.items():
        _check.boolean(name, x, "True = attend")
        axes(name, x, "T S" if name == "attention_mask" and x.ndim == 2 else wanted[name])
    _check.flag("use_causal_mask", use_causal_mask)
    return structured.intersection(
        *(_with_heads(name, x) for name, x in given.items()),
        structured.causal() if use_causal_mask else None,
        _sliding(sliding_window),
    )


def _with_heads(name: str, x: Array) -> Array:
    """(B, T) → (B, 1, T, 1)     (B, S) → (B, 1, 1, S)     (B, T, S) → (B, 1, T, S)     (T, S) as it is"""
    if name == "query_mask":
        return x[:, None, :, None]
    if name == "attention_mask":
        return x if x.ndim == 2 else x[:, None, :, :]
    return x[:, None, None, :]


def _sliding(window: Any) -> Mask | None:
    """|i − j| < window"""
    if window is None:
        return None
    each = _check.integer("sliding_window", window, 1, or_else=" or None") - 1
    return structured.window(each, each)
