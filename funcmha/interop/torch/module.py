"""`torch.nn.MultiheadAttention`: its parameters and masks in funcmha's form, and back.

    params = from_module(module)                                            # or from_state_dict(state_dict, num_heads)
    mask, bias = masks(attn_mask, key_padding_mask, module.num_heads)
    y, cache = mha(params, query, key, value, bias, mask=mask, zero_attn=module.add_zero_attn)
    dparams, *_ = mha_vjp(cache, dy)
    to_state_dict(dparams)                                                  # {"in_proj_weight": its .grad, …}

Differences from funcmha. A boolean mask of PyTorch is True where attention is *forbidden*. Inputs are (N, L, C),
`batch_first`, or unbatched (L, C). `attention_weights(cache)` are per head and before dropout; PyTorch's default is
`attention_weights(cache).mean(-3)`, and a cotangent dw (N, L, S) of that mean is `dweights = broadcast_to(dw[:, None] /
H, (N, H, L, S))`. A fully masked row is out_proj.bias here; in PyTorch it is NaN with `need_weights=True` and on the
inference fast path.

PyTorch is not imported: callers with tensors have imported it, and state dicts of NumPy arrays need none.

Axes: L = T queries, S keys, N batch, H heads, C = embed_dim = H·D, Ck = kdim, Cv = vdim.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from funcmha import _check, tree
from funcmha._arrays import Array, downcast, dtype_name, namespace, quiet_underflow, unbroadcast, upcast
from funcmha.interop._leaves import check_mapping
from funcmha.interop._tensors import to_array
from funcmha.params import PROJECTIONS, SPEC, Params, check

PACKED = {"in_proj_weight": "3C C"}
SEPARATE = {"q_proj_weight": "C C", "k_proj_weight": "C Ck", "v_proj_weight": "C Cv"}
BIASES = {"in_proj_bias": "3C", "out_proj.bias": "C"}
BIAS_KV = {"bias_k": "1 1 C", "bias_v": "1 1 C"}
OUT = {"out_proj.weight": "C C"}
SHAPES = PACKED | SEPARATE | BIASES | BIAS_KV | OUT


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


def from_module(module: Any, /) -> Params:
    """The parameters of a `torch.nn.MultiheadAttention`, as NumPy arrays that share its memory

    The caller passes on the rest: `zero_attn=module.add_zero_attn`, and `dropout=masked(keep, module.dropout)`.
    Raises TypeError for another kind of module, and what `from_state_dict`
    raises.
    """
    if not hasattr(module, "num_heads") or not hasattr(module, "state_dict"):
        raise TypeError(f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}")
    return from_state_dict(module.state_dict(), module.num_heads)


def from_state_dict(state_dict: Mapping[str, Any], num_heads: int) -> Params:
    """{"in_proj_weight": (3C, C), "out_proj.weight": (C, C), …}  →  {"q_proj": {"w": (H, D, C)}, …}

    Tensors on the CPU become NumPy arrays; arrays keep their library. Nothing is copied, unless strides cannot be split
    into heads: both share memory. bfloat16 tensors need ml_dtypes.

    Raises KeyError for a missing or unexpected name, ValueError for a shape that does not fit or an embed_dim that
    num_heads does not divide, TypeError for non-arrays, tensors on a GPU, or mixed dtypes.
    """
    check_mapping("state_dict", state_dict)
    arrays = {name: to_array(name, x) for name, x in state_dict.items()}
    _check_state_dict(arrays, num_heads)
    H, C = num_heads, arrays["out_proj.weight"].shape[0]
    D = C // H
    reshape = namespace(arrays["out_proj.weight"]).reshape

    flat = {}
    for i, name in enumerate(PROJECTIONS):
        third = slice(i * C, (i + 1) * C)
        w = arrays["in_proj_weight"][third, :] if "in_proj_weight" in arrays else arrays[f"{name}_weight"]
        flat[f"{name}.w"] = reshape(w, (H, D, w.shape[-1]))
        if "in_proj_bias" in arrays:
            flat[f"{name}.b"] = reshape(arrays["in_proj_bias"][third], (H, D))
    flat["out_proj.w"] = reshape(arrays["out_proj.weight"], (C, H, D))
    if "out_proj.bias" in arrays:
        flat["out_proj.b"] = arrays["out_proj.bias"]
    for name in BIAS_KV.keys() & arrays.keys():
        flat[f"bias_kv.{name[-1]}"] = reshape(arrays[name], (H, D))
    return tree.unflatten({leaf: flat[leaf] for leaf in SPEC if leaf in flat})


def to_state_dict(params: Params, /) -> dict[str, Array]:
    """{"q_proj": {"w": (H, D, C)}, …}  →  {"in_proj_weight": (3C, C), "out_proj.weight": (C, C), …}

    For parameters and for their gradients. PyTorch's own form: q, k and v packed into one matrix if Ck = Cv = C, and
    in three otherwise; in_proj_bias is always packed. Packing copies, unless q, k and v are contiguous in one
    buffer of NumPy's, as from `from_state_dict`. No other contiguous array is copied.

    Raises ValueError for a tree that PyTorch's module cannot express: K < H, E ≠ D, C ≠ H·D, O ≠ C, or biases on some
    projections only; KeyError for unknown leaves.
    """
    leaves = _check_expressible(params)
    q, k, v = (_rows(leaves[f"{name}.w"]) for name in PROJECTIONS)
    C = q.shape[-1]
    packed = k.shape[-1] == v.shape[-1] == C

    out = leaves["out_proj.w"]
    state = {"in_proj_weight": _pack(q, k, v)} if packed else dict(zip(SEPARATE, (q, k, v), strict=True))
    if "out_proj.b" in leaves:
        b = (namespace(q).reshape(leaves[f"{name}.b"], (C,)) for name in PROJECTIONS)
        state["in_proj_bias"] = _pack(*b)
    for name in BIAS_KV:
        if (leaf := f"bias_kv.{name[-1]}") in leaves:
            state[name] = namespace(q).reshape(leaves[leaf], (1, 1, C))
    state["out_proj.weight"] = namespace(q).reshape(out, (C, C))
    if "out_proj.b" in leaves:
        state["out_proj.bias"] = leaves["out_proj.b"]
    return state


def _rows(w: Array) -> Array:
    """(H, D, C)  →  (H·D, C)"""
    H, D, C = w.shape
    return namespace(w).reshape(w, (H * D, C))


def _pack(*parts: Array) -> Array:
    """(C, …), (C, …), (C, …)  →  (3C, …): a view where they are contiguous in one buffer, else a copy"""
    first = parts[0]
    if not all(_follows(b, a) for a, b in pairwise(parts)):
        return namespace(first).concat(parts)
    return as_strided(first, (sum(len(part) for part in parts), *first.shape[1:]))


def _follows(b: Array, a: Array) -> bool:
    """Whether `b` begins where `a` ends, in the memory of one array."""
    return (
        isinstance(a, np.ndarray)
        and isinstance(b, np.ndarray)
        and a.base is not None
        and a.base is b.base
        and a.flags.c_contiguous
        and b.flags.c_contiguous
        and a.ctypes.data + a.nbytes == b.ctypes.data
        and a.flags.writeable == b.flags.writeable
    )


def _check_state_dict(arrays: dict[str, Array], num_heads: int) -> None:
    """The argument checks of `from_state_dict`: names, dtypes, shapes, heads."""
    weights = SEPARATE if SEPARATE.keys() & arrays.keys() and "in_proj_weight" not in arrays else PACKED
    biases, bias_kv = (group if group.keys() & arrays.keys() else {} for group in (BIASES, BIAS_KV))
    names = [*weights, *OUT, *biases, *bias_kv]
    _check.keys("state_dict", arrays, names, names)
    _check.one_dtype(arrays.items())
    _check.integer("num_heads", num_heads, 1)

    C = arrays["out_proj.weight"].shape[-1] if arrays["out_proj.weight"].ndim else 0
    size = {"1": 1, "C": C, "3C": 3 * C}
    for name, x in arrays.items():
        letters = SHAPES[name].split()
        fits = x.ndim == len(letters) and all(size.get(a, n) == n for a, n in zip(letters, x.shape, strict=True))
        if not fits:
            spelt = ", ".join(letters) + "," * (len(letters) == 1)
            raise ValueError(f"{name} must be ({spelt}) with C={C} as in out_proj.weight, got {tuple(x.shape)}")
    if C % num_heads:
        raise ValueError(f"out_proj.weight must be (C, C) with C a multiple of num_heads={num_heads}, got C={C}")


def _check_expressible(params: Params) -> dict[str, Array]:
    """The argument checks of `to_state_dict`; the leaves of the tree."""
    axes, leaves = check(params, SPEC)
    C = axes["H"] * axes["D"]
    size = axes.size | {"K": axes["H"], "E": axes["D"], "Cq": C, "O": C}
    for leaf, x in leaves.items():
        want = tuple(size[letter] for letter in SPEC[leaf].split())
        if tuple(x.shape) != want:
            raise ValueError(
                f"{leaf} must be ({', '.join(SPEC[leaf].split())}) = {want} for torch.nn.MultiheadAttention, "
                f"which has K=H, E=D and Cq=O=H·D, got {tuple(x.shape)}"
            )
    biased = [leaf for leaf in leaves if leaf.endswith(".b")]
    if len(biased) not in (0, 4):
        raise ValueError(
            "params must have a bias on all four projections or on none for torch.nn.MultiheadAttention, "
            f"got {', '.join(biased)}"
        )
    return leaves


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def masks(attn_mask: Any, key_padding_mask: Any, num_heads: int) -> tuple[Array, Array]:
    """attn_mask (L, S) or (N·H, L, S) or None   key_padding_mask (S) or (N, S) or None   →   mask, bias or None

    Boolean ones (True = forbidden) join in `mask` (True = attend), floating ones add up in `bias`; both broadcast to
    (N, H, L, S). attn_mask becomes (L, S), (N, H, L, S), or (H, L, S) if N = 1, also for an unbatched query;
    key_padding_mask becomes (S) or (N, 1, 1, S). A floating −∞ stays in the bias, and means "do not attend".
    Tensors on the CPU become NumPy arrays. A floating mask alone is not copied.

    `merge_masks` is the same with a gradient.
    Raises TypeError for a mask that is neither boolean nor floating, ValueError for shapes that do not fit.
    """
    return merge_masks(attn_mask, key_padding_mask, num_heads=num_heads)[0]


class MergeMasksCache(NamedTuple):
    attn_mask: Array  # as given, None or an array
    key_padding_mask: Array  # as given, None or an array
    bias: Array  # broadcasts to (N, H, L, S), or None
    num_heads: int


def merge_masks(
    attn_mask: Any = None, key_padding_mask: Any = None, /, *, num_heads: int
) -> tuple[tuple[Array, Array], MergeMasksCache]:
    """mask, bias = ¬(attn_mask ∨ key_padding_mask), attn_mask + key_padding_mask     of boolean ones, of floating ones
    attn_mask (L, S) or (N·H, L, S) or None   key_padding_mask (S) or (N, S) or None   →   broadcast to (N, H, L, S)

        (mask, bias), merged = merge_masks(attn_mask, key_padding_mask, num_heads=H)
        y, cache = mha(params, query, key, value, bias, mask=mask)
        *_, dbias = mha_vjp(cache, dy)
        dattn_mask, dkey_padding_mask = merge_masks_vjp(merged, (None, dbias))       # in PyTorch's shapes

    What they are is said by `masks`, which returns mask and bias alone.
    """
    attn = None if attn_mask is None else _mask_array("attn_mask", attn_mask)
    padding = None if key_padding_mask is None else _mask_array("key_padding_mask", key_padding_mask)
    _check_masks(attn, padding, num_heads)
    mask, bias = joined(attn, padding, num_heads)
    return (mask, bias), MergeMasksCache(attn, padding, bias, num_heads)


@quiet_underflow
def merge_masks_vjp(cache: MergeMasksCache, dmasks: tuple[None, Array], /) -> tuple[Array, Array]:
    """dattn_mask, dkey_padding_mask     from dmasks = (None, dbias), with the `dbias` of `mha_vjp`

    Each in its own shape, summed over what it was repeated for; None for a boolean mask, or for one that was None.
    """
    _check.cache(cache, MergeMasksCache, "merge_masks")
    dmask, dbias = _check.parts("dmasks", dmasks, "dmask, dbias")
    if dmask is not None:
        raise TypeError(f"dmask must be None, as a boolean mask has no gradient, got {type(dmask).__name__}")
    if cache.bias is None:
        if dbias is not None:
            raise ValueError("dbias must be None, as bias is where no mask is floating")
        return None, None
    dbias = to_array("dbias", dbias)
    _check.cotangent("dbias", dbias, cache.bias.shape, cache.bias, "N H L S")
    return joined_vjp(cache.attn_mask, cache.key_padding_mask, dbias, cache.num_heads)


def joined(attn: Array, padding: Array, H: int) -> tuple[Array, Array]:
    """`masks` of checked arrays, in their library"""
    spread = [x for x in (per_head(attn, H), per_query(padding)) if x is not None]
    allowed = [~x for x in spread if dtype_name(x) == "bool"]
    added = [x for x in spread if dtype_name(x) != "bool"]
    with np.errstate(over="ignore"):  # twice the least number is −∞, as intended
        bias = added[0] + added[1] if len(added) == 2 else next(iter(added), None)
    return allowed[0] & allowed[1] if len(allowed) == 2 else next(iter(allowed), None), bias


def joined_vjp(attn: Array, padding: Array, dbias: Array, H: int) -> tuple[Array, Array]:
    """dattn, dpadding: None for a boolean one, or for None"""
    grads: list[Array] = []
    for mask, spread in ((attn, per_head(attn, H)), (padding, per_query(padding))):
        if mask is None or dtype_name(mask) == "bool":
            grads.append(None)
        else:
            dmask = unbroadcast(upcast(dbias), tuple(spread.shape))
            grads.append(downcast(namespace(dmask).reshape(dmask, tuple(mask.shape)), mask.dtype))
    return grads[0], grads[1]


def per_head(attn: Array, H: int) -> Array:
    """(N·H, L, S)  →  (N, H, L, S), or (H, L, S) if N = 1"""
    if attn is None or attn.ndim == 2 or attn.shape[0] == H:
        return attn
    return namespace(attn).reshape(attn, (attn.shape[0] // H, H, *attn.shape[1:]))


def per_query(padding: Array) -> Array:
    """(N, S)  →  (N, 1, 1, S)"""
    return padding if padding is None or padding.ndim == 1 else padding[:, None, None, :]


def _mask_array(name: str, x: Any) -> Array:
    x = to_array(name, x)
    if dtype_name(x) != "bool" and "float" not in dtype_name(x):
        raise TypeError(f"{name} must be boolean, True = forbidden, or floating, added to the scores, got {x.dtype}")
    return x


def _check_masks(attn: Array, padding: Array, num_heads: int) -> None:
    _check.integer("num_heads", num_heads, 1)
    if attn is not None and (attn.ndim not in (2, 3) or (attn.ndim == 3 and attn.shape[0] % num_heads)):
        raise ValueError(f"attn_mask must be (L, S) or (N·H, L, S) with H={num_heads}, got {tuple(attn.shape)}")
    if padding is None:
        return
    if padding.ndim not in (1, 2):
        raise ValueError(f"key_padding_mask must be (S) or (N, S), got {tuple(padding.shape)}")
    if attn is None:
        return
    if padding.shape[-1] != attn.shape[-1]:
        raise ValueError(
            f"key_padding_mask must be (N, S) with S={attn.shape[-1]} as in attn_mask, got {tuple(padding.shape)}"
        )
    N = 1 if padding.ndim == 1 else padding.shape[0]
    if attn.ndim == 3 and attn.shape[0] != N * num_heads:
        raise ValueError(
            f"attn_mask must be (N·H, L, S) with H={num_heads} and N={N} as in key_padding_mask, "
            f"got {tuple(attn.shape)}"
        )
