"""State dicts: the tensors of a layer under transformers' names, as a tree of funcmha and back."""

from collections.abc import Iterable, Mapping
from typing import Any

from funcmha import _check, tree
from funcmha._arrays import Array, namespace
from funcmha.interop._leaves import check_mapping
from funcmha.interop._tensors import to_array
from funcmha.params import SPEC, Params

from . import families
from .layer import Layer, static
from .names import Form

BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")  # constants in old checkpoints


def from_state_dict(
    state_dict: Mapping[str, Any], config: Any, n: int, *, cross: bool = False, prefix: str | None = None
) -> Layer:
    """{"model.layers.3.self_attn.q_proj.weight": (H·D, C), …}  →  layer 3, with {"q_proj": {"w": (H, D, C)}, …}

    state_dict   of a model, of one of its decoder layers, or of an attention module; of tensors on the CPU or of arrays
    config       of the model: a config of transformers, or the dict of its config.json
    cross        the layer's attention over an encoder, which GPT-2 has with add_cross_attention
    prefix       the names before "q_proj.weight" or "c_attn.weight", where they are ambiguous

    Nothing is copied: the parameters are views. Raises KeyError for a missing or unexpected name, ValueError for a
    shape that is not the config's or an unsupported config, TypeError for mixed dtypes or a tensor on a GPU.
    """
    check_mapping("state_dict", state_dict)
    c = families.read(config, n, cross=cross)
    layer = static(c, n, _prefix(state_dict, n, c, cross) if prefix is None else prefix, cross=cross)
    form = layer.form
    want = {form.prefix + name: name for name in form.tensors}
    own = [name for name in state_dict if name.startswith(form.prefix)]
    _check.keys("state_dict", [name for name in own if name.removeprefix(form.prefix) not in BUFFERS], want, want)
    tensors = {name: to_array(name, state_dict[name]) for name in want}
    _check.one_dtype(tensors.items())
    flat: dict[str, Array] = {}
    for name, bare in want.items():
        _check_shape(name, tensors[name], bare, form)
        flat |= _split(tensors[name], bare, form)
    return layer._replace(params=tree.unflatten({leaf: flat[leaf] for leaf in form.leaves}))


def to_state_dict(params: Params, layer: Layer) -> dict[str, Array]:
    """{"q_proj": {"w": (H, D, C)}, …}  →  {"model.layers.3.self_attn.q_proj.weight": (H·D, C), …}

    For the parameters of `layer`, or any other tree of its form, such as gradients. Views from `from_state_dict` are
    not copied, unless several become one: c_attn of GPT-2, qkv_proj of Phi-3. Raises KeyError and ValueError for a tree
    of another form.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer must be a Layer, as from_state_dict returns it, got {type(layer).__name__}")
    form = layer.form
    leaves = tree.flatten(params)
    _check.keys("params", leaves, form.leaves, form.leaves)
    _check.one_dtype(leaves.items())
    for leaf, x in leaves.items():
        if tuple(x.shape) != (want := form.shape(leaf)):
            spelt = ", ".join(SPEC[leaf].split())
            raise ValueError(f"{leaf} must be ({spelt}) = {want} as in the layer, got {tuple(x.shape)}")
    return {form.prefix + name: _joined(leaves, name, form) for name in form.tensors}


def _split(x: Array, name: str, form: Form) -> dict[str, Array]:
    """A tensor  →  its leaves, which are rows of it, or columns where it is transposed"""
    x = x.T if form.transposed and x.ndim == 2 else x
    leaves, end = {}, 0
    for leaf in form.tensors[name]:
        start, end = end, end + form.flat(leaf)[0]
        leaves[leaf] = _reshaped(x[start:end, ...], form.shape(leaf))
    return leaves


def _joined(leaves: Mapping[str, Array], name: str, form: Form) -> Array:
    """`_split` from the bottom up"""
    parts = [_reshaped(leaves[leaf], form.flat(leaf)) for leaf in form.tensors[name]]
    x = parts[0] if len(parts) == 1 else namespace(parts[0]).concat(parts, axis=0)
    return x.T if form.transposed and x.ndim == 2 else x


def _prefix(names: Iterable[str], n: int, c: dict[str, Any], cross: bool) -> str:
    """The prefix of the names of layer n, which must be in `names` once."""
    anchor, module, stack = ("o_proj.weight", "self_attn", "layers")
    if c["model_type"] == "gpt2":
        anchor, module, stack = ("c_attn.weight", "crossattention" if cross else "attn", "h")
    found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    tail = f".{stack}.{n}.{module}."
    fits = [prefix for prefix in found if prefix in ("", module + ".") or f".{prefix}".endswith(tail)]
    if not fits:
        raise KeyError(f"state_dict must have {tail[1:]}{anchor}, after whatever prefix, and has no such name")
    if len(fits) > 1:
        raise KeyError(f"prefix must be given where state_dict has layer {n} more than once: {', '.join(fits)}")
    return fits[0]


def _check_shape(name: str, x: Array, bare: str, form: Form) -> None:
    axes, want = form.tensor(bare)
    if tuple(x.shape) != want:
        known = ", ".join(f"{axis}={size}" for axis, size in form.sizes._asdict().items())
        raise ValueError(f"{name} must be ({axes}) = {want} with {known} as in the config, got {tuple(x.shape)}")


def _reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    return namespace(x).reshape(x, shape)
