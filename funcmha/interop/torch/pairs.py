"""A pair, and its inputs and outputs as lists of leaves and a string, for `as_torch_function`."""

import itertools
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import torch

from funcmha._arrays import Array, dtype_name
from funcmha.interop._tensors import to_array

Tensor = Any  # torch.Tensor
Structure = Any  # nested tuples and dicts of numbers, places in a list of tensors, and of None


class Pair:
    """A function, its vjp and its static arguments; operators find it by name while it is referenced."""

    def __init__(self, f: Callable[..., Any], f_vjp: Callable[..., Any], static: dict[str, Any]) -> None:
        self.f, self.f_vjp, self.static = f, f_vjp, static
        self.name = f"{getattr(f, '__name__', 'f')} {next(_NUMBERS)} of {_PROCESS}"
        self.output: dict[str, str] = {}  # the structure of the output, by that of the inputs
        self.shapes: dict[Any, Any] = {}  # of the outputs, by structure, shapes and dtypes of the inputs
        PAIRS[self.name] = self

    def forward(self, structure: str, arrays: list[Array]) -> tuple[list[Array], str, Any]:
        """The arrays of y, its structure, the cache"""
        inputs, options = filled(literal_eval(structure), arrays)
        y, cache = self.f(*inputs, **options, **self.static)
        ys: list[Array] = []
        self.output[structure] = spell(y, ys, "output")
        return ys, self.output[structure], cache

    def backward(self, structure: str, output: str, cache: Any, dys: list[Array]) -> dict[int, Array]:
        """The gradient of each input that has one, by its place"""
        grads = self.f_vjp(cache, filled(literal_eval(output), dys))
        return {i: g for i, g in placed(literal_eval(structure)[0], grads) if g is not None}


_NUMBERS = itertools.count()
_PROCESS = uuid4().hex  # a compiler may cache a name on disk, for a process where it is another pair
PAIRS: WeakValueDictionary[str, Pair] = WeakValueDictionary()


# ── trees as lists of leaves and a string, the arguments of an operator ──────────────────────────────────────────


def spell(node: Any, leaves: list[Any], path: str) -> str:
    """The structure of `node` as a Python literal: each leaf is appended to `leaves`, and spelt as its index."""
    if node is None:
        return "None"
    if isinstance(node, dict):
        return "{" + "".join(f"{key!r}: {spell(x, leaves, f'{path}.{key}')}, " for key, x in node.items()) + "}"
    if isinstance(node, tuple | list) and not (path.startswith("options") and hasattr(node, "_fields")):
        return "(" + "".join(f"{spell(x, leaves, f'{path}.{i}')}, " for i, x in enumerate(node)) + ")"
    _check_leaf(node, path)
    leaves.append(node)
    return f"{len(leaves) - 1}"


def _check_leaf(x: Any, path: str) -> None:
    """An array in the output, a tensor on the CPU elsewhere."""
    if path.startswith("output"):
        if not isinstance(x, np.ndarray | np.generic) or "float" not in dtype_name(x):
            got = f"{type(x).__name__} of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(f"{path} must be a floating array, None, or dicts and tuples of them, got {got}")
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{path} must be a tensor, None, or dicts and tuples of them, got {type(x).__name__}: "
            "other arguments are given once, to as_torch_function"
        )
    if x.device.type != "cpu":
        raise TypeError(f"{path} must be on the CPU, where NumPy works, got a tensor on {x.device}: use .cpu()")
    if x.is_complex():
        raise TypeError(f"{path} must be real, as PyTorch's gradients are conjugate and funcmha's are not")


def filled(structure: Structure, leaves: list[Any]) -> Any:
    """The tree of this structure."""
    if isinstance(structure, dict):
        return {key: filled(x, leaves) for key, x in structure.items()}
    if isinstance(structure, tuple):
        return tuple(filled(x, leaves) for x in structure)
    return None if structure is None else leaves[structure]


def placed(structure: Structure, tree: Any) -> Iterator[tuple[int, Any]]:
    """Each index in the structure, with the node of `tree` there."""
    if isinstance(structure, int):
        yield structure, tree
    elif structure is not None and tree is not None:
        for key in structure if isinstance(structure, dict) else range(len(structure)):
            yield from placed(structure[key], tree[key])


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def to_arrays(tensors: Any) -> list[Array]:
    """NumPy's arrays of the same memory."""
    if any(map(torch._C._functorch.is_legacy_batchedtensor, tensors)):
        raise NotImplementedError(
            "a funcmha pair takes no batch of cotangents of torch.autograd, as with is_grads_batched=True and of "
            "jacobian(vectorize=True): use torch.func.jacrev, or torch.vmap of the function that torch.func.vjp returns"
        )
    return [to_array("tensor", x) for x in tensors]


def to_tensors(arrays: list[Array], others: list[Array], contiguous: bool = False) -> list[Tensor]:
    """Tensors of the same memory, but copies where it is read-only or shared with `others` or another of `arrays`."""
    found, held = [], list(others)
    for a in map(np.asarray, arrays):
        own = a.flags.writeable and min(a.strides, default=0) >= 0 and not shares(a, held)
        a = a if own and (a.flags.c_contiguous or not contiguous) else a.copy()
        held.append(a)
        half = dtype_name(a) == "bfloat16"
        found.append(torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(a))
    return found


def shares(a: Array, others: Any) -> bool:
    """Whether `a` may have memory in common with one of the arrays."""
    return any(np.may_share_memory(a, b) for b in others)


def arrays_of(cache: Any) -> Iterator[Array]:
    """The arrays of a cache."""
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, dict | tuple | list):
        for x in cache.values() if isinstance(cache, dict) else cache:
            yield from arrays_of(x)


def element(i: int, dims: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Element i of each tensor along its mapped axis; itself where it has none"""
    return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]


def no_second_order(ctx: Any, *_: Any) -> Any:
    """The gradient of the gradient."""
    raise NotImplementedError(
        "the gradient of a funcmha pair has no gradient: as_torch_function is for first order; for "
        "second order see attention_vjp_jvp and mha_vjp_jvp of funcmha.derivatives"
    )
