"""State dicts: the tensors of a layer under transformers' names, as a tree of funcmha and back."""

from collections.abc import Iterable, Mapping
from typing import Any

from funcmha import _check, tree
from funcmha._xp import Array, namespace
from funcmha.interop._tensors import to_array
from funcmha.params import SPEC, Params

from . import families
from .layer import Form, Layer, static

NAMES = {  # leaf: its tensor, and that tensor's axes
    "q_proj.w": ("q_proj.weight", "H·D C"),
    "q_proj.b": ("q_proj.bias", "H·D"),
    "k_proj.w": ("k_proj.weight", "K·D C"),
    "k_proj.b": ("k_proj.bias", "K·D"),
    "v_proj.w": ("v_proj.weight", "K·D C"),
    "v_proj.b": ("v_proj.bias", "K·D"),
    "out_proj.w": ("o_proj.weight", "C H·D"),
    "out_proj.b": ("o_proj.bias", "C"),
    "q_norm.w": ("q_norm.weight", "D"),
    "k_norm.w": ("k_norm.weight", "D"),
    "sink.w": ("sinks", "H"),
}
FUSED = {  # GPT-2's tensors: inputs before outputs, and q, k and v side by side
    "c_attn.weight": "C 3·C",
    "c_attn.bias": "3·C",
    "c_proj.weight": "C C",
    "c_proj.bias": "C",
}
BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")  # constants that old checkpoints hold beside the parameters
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def from_state_dict(state_dict: Mapping[str, Any], config: Any, n: int, *, prefix: str | None = None) -> Layer:
    """{"model.layers.3.self_attn.q_proj.weight": (H·D, C), …}  →  layer 3, with {"q_proj": {"w": (H, D, C)}, …}

    state_dict   of a model, of one of its decoder layers, or of an attention module; of tensors on the CPU or of arrays
    config       of the model: a config of transformers, or the dict of its config.json
    prefix       what stands before "q_proj.weight" or "c_attn.weight", where it cannot be told from the names

    Nothing is copied: the parameters are views. Raises KeyError for a missing or unexpected name, ValueError for a
    shape that is not the config's or a config that is not understood, TypeError for mixed dtypes or a tensor on a GPU.
    """
    _check.mapping("state_dict", state_dict)
    c = families.read(config, n)
    fused = c["model_type"] == "gpt2"
    layer = static(c, n, _prefix(state_dict, n, fused) if prefix is None else prefix)
    form = layer.form
    want = {form.prefix + name: axes for name, axes in _tensors(form).items()}
    own = [name for name in state_dict if name.startswith(form.prefix)]
    _check.keys("state_dict", [name for name in own if name.removeprefix(form.prefix) not in BUFFERS], want, want)
    tensors = {name: to_array(name, state_dict[name]) for name in want}
    _check.one_dtype(tensors.items())
    for name, axes in want.items():
        _check_shape(name, tensors[name], axes, form)
    bare = {name.removeprefix(form.prefix): x for name, x in tensors.items()}
    bare = _split(bare, form) if fused else bare
    flat = {leaf: _reshaped(bare[NAMES[leaf][0]], _leaf_shape(leaf, form)) for leaf in SPEC if leaf in form.leaves}
    return layer._replace(params=tree.unflatten(flat))


def to_state_dict(params: Params, layer: Layer) -> dict[str, Array]:
    """{"q_proj": {"w": (H, D, C)}, …}  →  {"model.layers.3.self_attn.q_proj.weight": (H·D, C), …}

    For the parameters of `layer`, or any other tree like it, as its gradients are. Nothing is copied that
    `from_state_dict` made, but GPT-2's c_attn, where three become one. Raises KeyError and ValueError for a tree that
    is not like that of `layer`.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer must be a Layer, as from_state_dict gives it, got {type(layer).__name__}")
    form = layer.form
    leaves = tree.flatten(params)
    _check.keys("params", leaves, form.leaves, form.leaves)
    _check.one_dtype(leaves.items())
    for leaf, x in leaves.items():
        if tuple(x.shape) != (want := _leaf_shape(leaf, form)):
            spelt = ", ".join(SPEC[leaf].split())
            raise ValueError(f"{leaf} must be ({spelt}) = {want} as in the layer, got {tuple(x.shape)}")
    bare = {NAMES[leaf][0]: _reshaped(leaves[leaf], _shape(NAMES[leaf][1], form)) for leaf in form.leaves}
    bare = _joined(bare) if form.fused else bare
    return {form.prefix + name: bare[name] for name in _tensors(form)}


def _split(fused: dict[str, Array], form: Form) -> dict[str, Array]:
    """c_attn, c_proj  →  q_proj, k_proj, v_proj, o_proj, outputs before inputs"""
    C = form.sizes.C
    w, b = fused["c_attn.weight"].T, fused["c_attn.bias"]
    bare = {"o_proj.weight": fused["c_proj.weight"].T, "o_proj.bias": fused["c_proj.bias"]}
    for i, name in enumerate(PROJECTIONS):
        third = slice(i * C, (i + 1) * C)
        bare |= {f"{name}.weight": w[third, :], f"{name}.bias": b[third]}
    return bare


def _joined(bare: dict[str, Array]) -> dict[str, Array]:
    """`_split` from the bottom up"""
    concat = namespace(bare["o_proj.weight"]).concat
    return {
        "c_attn.weight": concat([bare[f"{name}.weight"].T for name in PROJECTIONS], axis=1),
        "c_attn.bias": concat([bare[f"{name}.bias"] for name in PROJECTIONS]),
        "c_proj.weight": bare["o_proj.weight"].T,
        "c_proj.bias": bare["o_proj.bias"],
    }


def _prefix(names: Iterable[str], n: int, fused: bool) -> str:
    """What stands before the names of layer n, of which there must be one in `names`."""
    anchor, module, stack = ("c_attn.weight", "attn", "h") if fused else ("o_proj.weight", "self_attn", "layers")
    found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    tail = f".{stack}.{n}.{module}."
    fits = [prefix for prefix in found if prefix in ("", module + ".") or f".{prefix}".endswith(tail)]
    if not fits:
        raise KeyError(f"state_dict must have {tail[1:]}{anchor}, after whatever prefix, and has no such name")
    if len(fits) > 1:
        raise KeyError(f"prefix must be given where state_dict has layer {n} more than once: {', '.join(fits)}")
    return fits[0]


def _tensors(form: Form) -> dict[str, str]:
    """The names of a layer's tensors, without prefix, and their axes."""
    return FUSED if form.fused else dict(NAMES[leaf] for leaf in form.leaves)


def _shape(axes: str, form: Form) -> tuple[int, ...]:
    """The sizes of axes that are products, as 3·C."""
    size = form.sizes._asdict() | {"3": 3, "1": 1}
    pairs = [(axis if "·" in axis else f"{axis}·1").split("·") for axis in axes.split()]
    return tuple(size[a] * size[b] for a, b in pairs)


def _leaf_shape(leaf: str, form: Form) -> tuple[int, ...]:
    H, K, D, C = form.sizes
    size = {"H": H, "K": K, "D": D, "E": D, "Cq": C, "Ck": C, "Cv": C, "O": C}
    return tuple(size[axis] for axis in SPEC[leaf].split())


def _check_shape(name: str, x: Array, axes: str, form: Form) -> None:
    if tuple(x.shape) != (want := _shape(axes, form)):
        known = ", ".join(f"{axis}={size}" for axis, size in form.sizes._asdict().items())
        raise ValueError(
            f"{name} must be ({', '.join(axes.split())}) = {want} with {known} as in the config, got {tuple(x.shape)}"
        )


def _reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    return namespace(x).reshape(x, shape)
