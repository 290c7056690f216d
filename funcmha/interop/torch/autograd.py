"""A pair of funcmha as a differentiable function of PyTorch.

    attend = as_torch_function(attention, attention_vjp, mask=masks.causal())
    o = attend(q, k, v)                             # tensors, with a gradient
    layer = as_torch_function(mha, mha_vjp)
    y = layer(params, x, x, x, mask=keep)           # params a dict of dicts of tensors

It works with autograd, `torch.func.grad`, `jacrev` and `vmap`, and `torch.compile(fullgraph=True)`, on the CPU. Tensors
become NumPy arrays of the same memory, and what comes back becomes tensors of the same memory. What it cannot do:
forward mode (`jvp`, `jacfwd`, `hessian`), a second derivative, and under a compiler the gradients of `torch.func`, but
those of `torch.autograd`.

There are two paths. In eager mode autograd's graph holds the cache of the forward for the vjp. A compiler knows tensors
only, and may repeat and drop operators: for it there are two operators, the forward, and the vjp, which runs the
forward again. The results are the same, to the bit.
"""

import itertools
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import torch

from funcmha import _check
from funcmha._arrays import Array, dtype_name
from funcmha.interop._named import check_named
from funcmha.interop._tensors import bfloat16, to_array

Tensor = Any  # torch.Tensor
Structure = Any  # nested tuples and dicts of numbers, places in a list of tensors, and of None


def as_torch_function(f: Callable[..., Any], f_vjp: Callable[..., Any], /, **static: Any) -> Callable[..., Any]:
    """g with g(*inputs, **options) = y     where y, cache = f(*inputs, **options, **static), differentiable by f_vjp

    f, f_vjp  a pair by funcmha's protocol, whose cache is made of tuples, dicts and arrays
    inputs    tensors on the CPU, None, or dicts and tuples of them; floating ones have gradients
    options   the same, without gradients: keywords that change from call to call, such as masks. For a mask of dropout
              give an f of its own: `lambda *x, keep: attention(*x, dropout=masked(keep, 0.1))`
    static    all other keywords of f, the same for all calls

    y is a tensor, or dicts and tuples of tensors and None as f returns them. Where f returns memory of an input, or
    read-only memory, y is a copy. The gradient has no gradient of its own, and raises NotImplementedError. Writing to
    an input in place before the backward is PyTorch's RuntimeError, and so is writing to y where the cache holds it.

    `torch.vmap` calls f for one element after another, and so `torch.func.jacrev` calls f_vjp, with one cache, for one
    row after another. g is pickled by the names of f and f_vjp, which must be those of functions of a module, and with
    what is static. Under `torch.compile`, f is run on zeros while the compiler asks for the shape of y: it must take
    them. Raises TypeError for what is no tensor, or one that is not on the CPU.
    """
    _check.function("f", f)
    _check.function("f_vjp", f_vjp)
    return _Function(_Pair(f, f_vjp, {name: _given_once(name, x) for name, x in static.items()}))


class _Function:
    """What `as_torch_function` makes of a pair: it holds it, so that operators find it."""

    def __init__(self, pair: "_Pair") -> None:
        self.pair = pair
        self.__name__, self.__doc__ = getattr(pair.f, "__name__", "g"), pair.f.__doc__

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """y"""
        pair = self.pair
        tensors: list[Tensor] = []
        places = _spell(inputs, tensors, "inputs")
        n = len(tensors)
        structure = f"({places}, {_spell(options, tensors, 'options')})"
        if any(x.requires_grad for x in tensors[n:]):
            raise TypeError(f"options have no gradient, and one of {', '.join(options)} requires one: use .detach()")
        if torch.compiler.is_compiling():
            ys = _apply(pair.name, structure, tensors)
            return _filled(_structure_of_output(pair.name, structure), ys)
        kept, *ys = _AsItRuns.apply(pair, structure, *tensors)  # type: ignore[no-untyped-call]
        return _filled(literal_eval(kept.output), ys)

    def __reduce__(self) -> tuple[Any, ...]:
        """By the names of f and f_vjp, which pickle looks up."""
        f, f_vjp, static = self.pair.f, self.pair.f_vjp, self.pair.static
        check_named("as_torch_function", f=f, f_vjp=f_vjp)
        return _again, (f, f_vjp, static)

    def __copy__(self) -> "_Function":
        return self

    def __deepcopy__(self, _: Any) -> "_Function":
        return self  # as of any function; nobody writes to it


def _again(f: Callable[..., Any], f_vjp: Callable[..., Any], static: dict[str, Any]) -> Callable[..., Any]:
    """What was pickled"""
    return as_torch_function(f, f_vjp, **static)


def _given_once(name: str, x: Any) -> Any:
    """A static argument, with arrays for tensors."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):  # such as dropout by a mask
        return type(x)(*(_given_once(f"{name}.{field}", part) for field, part in zip(x._fields, x, strict=True)))
    if not isinstance(x, torch.Tensor):
        return x
    if x.requires_grad:
        raise TypeError(f"{name} has no gradient where it is given once, and requires one: use .detach(), or an input")
    return to_array(name, x)


class _Pair:
    """A function, its vjp and its static arguments; operators find it by name while it is referenced."""

    def __init__(self, f: Callable[..., Any], f_vjp: Callable[..., Any], static: dict[str, Any]) -> None:
        self.f, self.f_vjp, self.static = f, f_vjp, static
        self.name = f"{getattr(f, '__name__', 'f')} {next(_NUMBERS)} of {_PROCESS}"
        self.output: dict[str, str] = {}  # the structure of the output, by that of the inputs
        self.shapes: dict[Any, Any] = {}  # of the outputs, by structure, shapes and dtypes of the inputs
        _PAIRS[self.name] = self

    def forward(self, structure: str, arrays: list[Array]) -> tuple[list[Array], str, Any]:
        """The arrays of y, its structure, the cache"""
        inputs, options = _filled(literal_eval(structure), arrays)
        y, cache = self.f(*inputs, **options, **self.static)
        ys: list[Array] = []
        self.output[structure] = _spell(y, ys, "output")
        return ys, self.output[structure], cache

    def backward(self, structure: str, output: str, cache: Any, dys: list[Array]) -> dict[int, Array]:
        """The gradient of each input that has one, by its place"""
        grads = self.f_vjp(cache, _filled(literal_eval(output), dys))
        return {i: g for i, g in _placed(literal_eval(structure)[0], grads) if g is not None}


_NUMBERS = itertools.count()
_PROCESS = uuid4().hex  # a compiler may cache a name on disk, for a process where it is another pair
_PAIRS: WeakValueDictionary[str, _Pair] = WeakValueDictionary()


# ── trees as lists of leaves and a string, the arguments of an operator ──────────────────────────────────────────


def _spell(node: Any, leaves: list[Any], path: str) -> str:
    """The structure of `node` as a Python literal: each leaf is appended to `leaves`, and spelt as its index."""
    if node is None:
        return "None"
    if isinstance(node, dict):
        return "{" + "".join(f"{key!r}: {_spell(x, leaves, f'{path}.{key}')}, " for key, x in node.items()) + "}"
    if isinstance(node, tuple | list) and not (path.startswith("options") and hasattr(node, "_fields")):
        return "(" + "".join(f"{_spell(x, leaves, f'{path}.{i}')}, " for i, x in enumerate(node)) + ")"
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


def _filled(structure: Structure, leaves: list[Any]) -> Any:
    """The tree of this structure."""
    if isinstance(structure, dict):
        return {key: _filled(x, leaves) for key, x in structure.items()}
    if isinstance(structure, tuple):
        return tuple(_filled(x, leaves) for x in structure)
    return None if structure is None else leaves[structure]


def _placed(structure: Structure, tree: Any) -> Iterator[tuple[int, Any]]:
    """Each index in the structure, with the node of `tree` there."""
    if isinstance(structure, int):
        yield structure, tree
    elif structure is not None and tree is not None:
        for key in structure if isinstance(structure, dict) else range(len(structure)):
            yield from _placed(structure[key], tree[key])


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _to_arrays(tensors: Any) -> list[Array]:
    """NumPy's arrays of the same memory."""
    if any(map(torch._C._functorch.is_legacy_batchedtensor, tensors)):
        raise NotImplementedError(
            "a funcmha pair takes no batch of cotangents of torch.autograd, as with is_grads_batched=True and of "
            "jacobian(vectorize=True): use torch.func.jacrev, or torch.vmap of what torch.func.vjp returns"
        )
    return [to_array("tensor", x) for x in tensors]


def _to_tensors(arrays: list[Array], others: list[Array], contiguous: bool = False) -> list[Tensor]:
    """Tensors of the same memory, but copies where it is read-only or shared with `others` or another of `arrays`."""
    found, held = [], list(others)
    for a in map(np.asarray, arrays):
        own = a.flags.writeable and min(a.strides, default=0) >= 0 and not _shares(a, held)
        a = a if own and (a.flags.c_contiguous or not contiguous) else a.copy()
        held.append(a)
        half = dtype_name(a) == "bfloat16"
        found.append(torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(a))
    return found


def _shares(a: Array, others: Any) -> bool:
    """Whether `a` may have memory in common with one of the arrays."""
    return any(np.may_share_memory(a, b) for b in others)


def _arrays_of(cache: Any) -> Iterator[Array]:
    """The arrays of a cache."""
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, dict | tuple | list):
        for x in cache.values() if isinstance(cache, dict) else cache:
            yield from _arrays_of(x)


# ── eager mode: the graph holds the cache ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)  # and no tuple, which torch.func would flatten
class _Kept:
    pair: _Pair
    structure: str  # of the inputs
    output: str  # its structure
    held: list[int]  # the places of the outputs of which the cache holds the memory
    cache: list[Any]  # which the first backward takes out
    each: list["_Kept"] = field(default_factory=list)  # under vmap, of each element
    again: bool = False  # whether several backwards have one cache, as under `torch.func.jacrev`

    def of(self, i: int) -> "_Kept":
        """That of an element."""
        return replace(self.each[i], again=self.again)

    def taken(self, arrays: list[Array]) -> Any:
        """The cache, made again if it is gone."""
        cache = self.cache.pop() if self.cache else self.pair.forward(self.structure, arrays)[2]
        if self.again:
            self.cache.append(cache)
        return cache


class _AsItRuns(torch.autograd.Function):
    """y by f, and its gradient by f_vjp with the cache of f."""

    @staticmethod
    def forward(pair: _Pair, structure: str, *tensors: Tensor) -> tuple[Any, ...]:
        arrays = _to_arrays(tensors)
        ys, output, cache = pair.forward(structure, arrays)
        found = _to_tensors(ys, arrays)
        held = [i for i, y in enumerate(_to_arrays(found)) if _shares(y, _arrays_of(cache))]
        return _Kept(pair, structure, output, held, [cache]), *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        (_, _, *tensors), (ctx.kept, *ys) = inputs, output
        ctx.save_for_backward(*tensors, *(ys[i] for i in ctx.kept.held))  # so that PyTorch refuses writes to them

    @staticmethod
    def backward(ctx: Any, _: None, *dys: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors[: len(ctx.needs_input_grad) - 2]
        return None, None, *_Gradient.apply(ctx.kept, len(dys), *dys, *tensors)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], pair: _Pair, structure: str, *tensors: Tensor) -> Any:
        """One element after another"""
        found = [
            _AsItRuns.apply(pair, structure, *_element(i, in_dims[2:], tensors))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        each = [kept for kept, *_ in found]
        ys = [torch.stack(y) for y in zip(*(ys for _, *ys in found), strict=True)]
        return (_Kept(pair, structure, each[0].output, [], [], each), *ys), (None, *(0 for _ in ys))


class _Gradient(torch.autograd.Function):
    """The gradient; it has no gradient itself."""

    @staticmethod
    def forward(kept: _Kept, n: int, *tensors: Tensor) -> tuple[Any, ...]:
        dys, arrays = _to_arrays(tensors[:n]), _to_arrays(tensors[n:])
        grads = kept.pair.backward(kept.structure, kept.output, kept.taken(arrays), dys)
        found = dict(zip(grads, _to_tensors(list(grads.values()), [*dys, *arrays]), strict=True))
        return tuple(found.get(i) for i in range(len(arrays)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return _no_second_order(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kept: _Kept, n: int, *tensors: Tensor) -> Any:
        """One element after another, each with its cache; or all with one cache, where cotangents alone are many"""
        dims = in_dims[2:]
        own = any(dim is not None for dim in dims[n:])
        shared = replace(kept, again=True)
        found = [
            _Gradient.apply(kept.of(i) if own else shared, n, *_element(i, dims, tensors))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        grads = tuple(None if g[0] is None else torch.stack(g) for g in zip(*found, strict=True))
        return grads, tuple(None if g is None else 0 for g in grads)


def _element(i: int, dims: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Element i of each tensor along its mapped axis; itself where it has none"""
    return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]


_NO_FORWARD_MODE = (
    "as_torch_function has no forward mode, and so none of jvp, jacfwd and hessian: take jacrev, or attention_jvp and "
    "mha_jvp of funcmha"
)


def _no_second_order(ctx: Any, *_: Any) -> Any:
    """The gradient of the gradient."""
    raise NotImplementedError(
        "the gradient of a funcmha pair has no gradient: as_torch_function is for first order; for "
        "second order see attention_vjp_jvp and mha_vjp_jvp of funcmha.derivatives"
    )


# ── under a compiler: two operators ──────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op(
    "funcmha::apply",
    mutates_args=(),
    device_types="cpu",
    schema="(str pair, str structure, Tensor[] tensors) -> Tensor[]",
)
def _apply(pair: str, structure: str, tensors: list[Tensor]) -> list[Tensor]:
    """y = f(*inputs)"""
    arrays = _to_arrays(tensors)
    ys, _, _ = _named(pair).forward(structure, arrays)
    return _to_tensors(ys, arrays, contiguous=True)


@torch.library.custom_op(
    "funcmha::apply_vjp",
    mutates_args=(),
    device_types="cpu",
    schema="(str pair, str structure, Tensor[] tensors, Tensor[] dys) -> Tensor[]",
)
def _apply_vjp(pair: str, structure: str, tensors: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """The gradient of each floating input, from the inputs and the cotangents"""
    arrays, cotangents = _to_arrays(tensors), _to_arrays(dys)
    _, output, cache = _named(pair).forward(structure, arrays)
    grads = _named(pair).backward(structure, output, cache, cotangents)
    places = _differentiable(structure, tensors)
    found = [grads[i] if i in grads else np.zeros_like(arrays[i]) for i in places]
    return _to_tensors(found, [*arrays, *cotangents], contiguous=True)


@_apply.register_fake
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


@_apply_vjp.register_fake
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
    found = _apply_vjp(ctx.pair.name, ctx.structure, tensors, dys)
    grads = dict(zip(_differentiable(ctx.structure, tensors), found, strict=True))
    return None, None, [grads.get(i) for i in range(len(tensors))]


@_apply.register_vmap
def _(info: Any, in_dims: Any, pair: str, structure: str, tensors: list[Tensor]) -> Any:
    found = [_apply(pair, structure, _element(i, in_dims[2], tensors)) for i in range(info.batch_size)]
    ys = [torch.stack(y) for y in zip(*found, strict=True)]
    return ys, [0] * len(ys)


@_apply_vjp.register_vmap
def _(info: Any, in_dims: Any, pair: str, structure: str, tensors: list[Tensor], dys: list[Tensor]) -> Any:
    found = [
        _apply_vjp(pair, structure, _element(i, in_dims[2], tensors), _element(i, in_dims[3], dys))
        for i in range(info.batch_size)
    ]
    grads = [torch.stack(g) for g in zip(*found, strict=True)]
    return grads, [0] * len(grads)


_apply.register_autograd(_back, setup_context=_keep)
_apply_vjp.register_autograd(_no_second_order)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _structure_of_output(pair: str, structure: str) -> Structure:
    """As the compiler's own call of `funcmha::apply` has just stored it."""
    return literal_eval(_named(pair).output[structure])


def _differentiable(structure: str, tensors: list[Tensor]) -> list[int]:
    """The places of the floating tensors among the inputs."""
    inputs = literal_eval(structure)[0]
    return [i for i, _ in _placed(inputs, inputs) if tensors[i].is_floating_point()]


def _named(pair: str) -> _Pair:
    """The pair of this name."""
    found = _PAIRS.get(pair)
    if found is None:
        raise RuntimeError(f"the function of {pair} is gone: keep it while its compiled code is in use")
    return found
