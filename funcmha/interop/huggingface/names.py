"""The tensors of a layer under transformers' names: the leaves of funcmha's tree in each of them, and their layout."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from funcmha.params import SPEC

from .families import Sizes, leaves, sizes

Tensors = Mapping[str, tuple[str, ...]]  # a tensor's name: its leaves, one after the other along their outputs

FLAT = {  # leaf: its axes in a tensor, outputs before inputs
    "q_proj.w": "H·D C",
    "q_proj.b": "H·D",
    "k_proj.w": "K·D C",
    "k_proj.b": "K·D",
    "v_proj.w": "K·D C",
    "v_proj.b": "K·D",
    "out_proj.w": "C H·D",
    "out_proj.b": "C",
    "q_norm.w": "D",
    "k_norm.w": "D",
    "sink.w": "H",
}
PLAIN: Tensors = {
    "q_proj.weight": ("q_proj.w",),
    "q_proj.bias": ("q_proj.b",),
    "k_proj.weight": ("k_proj.w",),
    "k_proj.bias": ("k_proj.b",),
    "v_proj.weight": ("v_proj.w",),
    "v_proj.bias": ("v_proj.b",),
    "o_proj.weight": ("out_proj.w",),
    "o_proj.bias": ("out_proj.b",),
    "q_norm.weight": ("q_norm.w",),
    "k_norm.weight": ("k_norm.w",),
    "sinks": ("sink.w",),
}
GPT2: Tensors = {
    "c_attn.weight": ("q_proj.w", "k_proj.w", "v_proj.w"),
    "c_attn.bias": ("q_proj.b", "k_proj.b", "v_proj.b"),
    "c_proj.weight": ("out_proj.w",),
    "c_proj.bias": ("out_proj.b",),
}
GPT2_CROSS: Tensors = {
    "c_attn.weight": ("k_proj.w", "v_proj.w"),
    "c_attn.bias": ("k_proj.b", "v_proj.b"),
    "q_attn.weight": ("q_proj.w",),
    "q_attn.bias": ("q_proj.b",),
    "c_proj.weight": ("out_proj.w",),
    "c_proj.bias": ("out_proj.b",),
}
PHI3: Tensors = {
    "o_proj.weight": ("out_proj.w",),
    "qkv_proj.weight": ("q_proj.w", "k_proj.w", "v_proj.w"),
}


class Form(NamedTuple):
    """The names and shapes that the tensors of a layer have in a state dict."""

    prefix: str  # "model.layers.3.self_attn."
    sizes: Sizes
    tensors: Tensors
    transposed: bool  # inputs before outputs: GPT-2

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves of all tensors, in the order of `SPEC`."""
        held = {*chain(*self.tensors.values())}
        return tuple(leaf for leaf in SPEC if leaf in held)

    def flat(self, leaf: str) -> tuple[int, ...]:
        """The shape of a leaf in a tensor, outputs before inputs."""
        size = self.sizes._asdict() | {"1": 1}
        pairs = [(axis if "·" in axis else f"{axis}·1").split("·") for axis in FLAT[leaf].split()]
        return tuple(size[a] * size[b] for a, b in pairs)

    def shape(self, leaf: str) -> tuple[int, ...]:
        """The shape of a leaf in funcmha's tree."""
        H, K, D, C = self.sizes
        size = {"H": H, "K": K, "D": D, "E": D, "Cq": C, "Ck": C, "Cv": C, "O": C}
        return tuple(size[axis] for axis in SPEC[leaf].split())

    def tensor(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The axes of a tensor, spelt, and its shape."""
        held = self.tensors[name]
        axes = [" + ".join(FLAT[leaf].split()[0] for leaf in held), *FLAT[held[0]].split()[1:]]
        shape = (sum(self.flat(leaf)[0] for leaf in held), *self.flat(held[0])[1:])
        step = -1 if self.transposed else 1
        return ", ".join(axes[::step]), shape[::step]


def form(c: dict[str, Any], prefix: str, *, cross: bool = False) -> Form:
    """The form of a layer of this config."""
    kind, own = c["model_type"], leaves(c)
    plain = {name: held for name, held in PLAIN.items() if held[0] in own}
    tensors = {"gpt2": GPT2_CROSS if cross else GPT2, "phi3": PHI3}.get(kind, plain)
    return Form(prefix, sizes(c), tensors, kind == "gpt2")
