"""A pair under PyTorch's compiler: two operators, the forward, and the vjp with the forward before it."""

from ast import literal_eval
from typing import Any

import numpy as np
import torch

from funcmha._arrays import Array, dtype_name
from funcmha.interop._tensors import bfloat16

from .pairs import PAIRS, Pair, Structure, Tensor, element, no_second_order, placed, to_arrays, to_tensors


@torch.library.custom_op(
    "funcmha::apply",
    mutates_args=(),
    device_types="cpu",
    schema="(str pair, str structure, Tensor[] tensors) -> Tensor[]",
)
def apply(pair: str, structure: str, tensors: list[Tensor]) -> list[Tensor]:
    """y = f(*inputs)"""
    arrays = to_arrays(tensors)
    ys, _, _ = _named(pair).forward(structure, arrays)
    return to_tensors(ys, arrays, contiguous=True)


@torch.library.custom_op(
    "funcmha::apply_vjp",
    mutates_args=(),
    device_types="cpu",
    schema="(str pair, str structure, Tensor[] tensors, Tensor[] dys) -> Tensor[]",
)
def apply_vjp(pair: str, structure: str, tensors: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """The gradient of each floating input, from the inputs and the cotangents"""
    arrays, cotangents = to_arrays(tensors), to_arrays(dys)
    _, output, cache = _named(pair).forward(structure, arrays)
    grads = _named(pair).backward(structure, output, cache, cotangents)
    places = _differentiable(structure, tensors)
    found = [grads[i] if i in grads else np.zeros_like(arrays[i]) for i in places]
    return to_tensors(found, [*arrays, *cotangents], contiguous=True)


@apply.register_fake
def _(pair: str, structure: str, tensors: list[Tensor]) -> list[Tensor]:
    key: Any = structure, *((dtype_name(x), tuple(int(n) for n in x.shape)) for x in tensors)
    known = _named(pair).shapes
    if key not in known:
        ys, _, _ = _named(pair).forward(structure, [_zeros(*x) for x in key[1:]])
        known[key] = [(y.shape, getattr(torch, dtype_name(y))) for y in ys]
    return [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in known[key]]


def _zeros(dtype: str, shape: tuple[int, ...]) -> Array:
    """Zeros that take the memory of one number."""
    one: Any = bfloat16("a tensor") if dtype == "bfloat16" else dtype
    return np.broadcast_to(np.zeros((), one), shape)


@apply_vjp.register_fake
def _(pair: str, structure: str, tensors: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device="cpu") for i in _differentiable(structure, tensors)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save the inputs, and the pair, so that it outlives its function."""
    name, ctx.structure, tensors = inputs
    ctx.pair = _named(name)
    ctx.save_for_backward(*tensors)


def _back(ctx: Any, dys: list[Tensor]) -> tuple[None, None, list[Tensor | None]]:
    """The gradients of the inputs of `funcmha::apply`."""
    tensors = list(ctx.saved_tensors)
    found = apply_vjp(ctx.pair.name, ctx.structure, tensors, dys)
    grads = dict(zip(_differentiable(ctx.structure, tensors), found, strict=True))
    return None, None, [grads.get(i) for i in range(len(tensors))]


@apply.register_vmap
def _(info: Any, in_dims: Any, pair: str, structure: str, tensors: list[Tensor]) -> Any:
    found = [apply(pair, structure, element(i, in_dims[2], tensors)) for i in range(info.batch_size)]
    ys = [torch.stack(y) for y in zip(*found, strict=True)]
    return ys, [0] * len(ys)


@apply_vjp.register_vmap
def _(info: Any, in_dims: Any, pair: str, structure: str, tensors: list[Tensor], dys: list[Tensor]) -> Any:
    found = [
        apply_vjp(pair, structure, element(i, in_dims[2], tensors), element(i, in_dims[3], dys))
        for i in range(info.batch_size)
    ]
    grads = [torch.stack(g) for g in zip(*found, strict=True)]
    return grads, [0] * len(grads)


apply.register_autograd(_back, setup_context=_keep)
apply_vjp.register_autograd(no_second_order)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def structure_of_output(pair: str, structure: str) -> Structure:
    """As the compiler's own call of `funcmha::apply` has just stored it."""
    return literal_eval(_named(pair).output[structure])


def _differentiable(structure: str, tensors: list[Tensor]) -> list[int]:
    """The places of the floating tensors among the inputs."""
    inputs = literal_eval(structure)[0]
    return [i for i, _ in placed(inputs, inputs) if tensors[i].is_floating_point()]


def _named(pair: str) -> Pair:
    """The pair of this name."""
    found = PAIRS.get(pair)
    if found is None:
        raise RuntimeError(f"the function of {pair} is gone: keep it while its compiled code is in use")
    return found
