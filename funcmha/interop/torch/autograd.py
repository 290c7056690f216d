"""A pair of funcmha as a differentiable function of PyTorch.

    attend = as_torch_function(attention, attention_vjp, mask=masks.causal())
    o = attend(q, k, v)                             # tensors, with a gradient
    layer = as_torch_function(mha, mha_vjp)
    y = layer(params, x, x, x, mask=keep)           # params a dict of dicts of tensors

It works with autograd, `torch.func.grad`, `jacrev`, `torch.vmap` and `torch.compile(fullgraph=True)`, on the CPU.
Tensors become NumPy arrays of the same memory, and results become tensors of the same memory. Not supported: forward
mode (`jvp`, `jacfwd`, `hessian`), second derivatives, and under a compiler the gradients of `torch.func` (those of
`torch.autograd` are).

There are two paths. In eager mode autograd's graph holds the cache of the forward for the vjp. A compiler knows tensors
only, and may repeat and drop operators: for it there are two operators, the forward, and the vjp, which runs the
forward again. The results are the same, to the bit.
"""

from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from funcmha import _check
from funcmha._arrays import Array
from funcmha.interop._named import check_named
from funcmha.interop._tensors import to_array

from .operators import apply, structure_of_output
from .pairs import Pair, Tensor, arrays_of, element, filled, no_second_order, shares, spell, to_arrays, to_tensors

__all__ = ["as_torch_function"]


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

    `torch.vmap` calls f for one element after another; `torch.func.jacrev` calls f_vjp, with one cache, for one row
    after another. g is pickled by the names of f and f_vjp, which must be functions of a module, with the static
    arguments. Under `torch.compile` the compiler asks for the shape of y, and f is run on zeros. Raises TypeError for
    an input that is not a tensor, or not on the CPU.
    """
    _check.function("f", f)
    _check.function("f_vjp", f_vjp)
    return _Function(Pair(f, f_vjp, {name: _given_once(name, x) for name, x in static.items()}))


class _Function:
    """The function that `as_torch_function` returns. It holds its pair, so that operators find it."""

    def __init__(self, pair: "Pair") -> None:
        self.pair = pair
        self.__name__, self.__doc__ = getattr(pair.f, "__name__", "g"), pair.f.__doc__

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """y"""
        pair = self.pair
        tensors: list[Tensor] = []
        places = spell(inputs, tensors, "inputs")
        n = len(tensors)
        structure = f"({places}, {spell(options, tensors, 'options')})"
        if any(x.requires_grad for x in tensors[n:]):
            raise TypeError(f"options have no gradient, and one of {', '.join(options)} requires one: use .detach()")
        if torch.compiler.is_compiling():
            ys = apply(pair.name, structure, tensors)
            return filled(structure_of_output(pair.name, structure), ys)
        kept, *ys = _AsItRuns.apply(pair, structure, *tensors)  # type: ignore[no-untyped-call]
        return filled(literal_eval(kept.output), ys)

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


# ── eager mode: the graph holds the cache ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)  # and no tuple, which torch.func would flatten
class _Kept:
    pair: Pair
    structure: str  # of the inputs
    output: str  # its structure
    held: list[int]  # the outputs whose memory the cache holds
    cache: list[Any]  # emptied by the first backward
    each: list["_Kept"] = field(default_factory=list)  # under vmap, of each element
    again: bool = False  # whether several backwards share the cache, as under `torch.func.jacrev`

    def of(self, i: int) -> "_Kept":
        """That of element i"""
        return replace(self.each[i], again=self.again)

    def taken(self, arrays: list[Array]) -> Any:
        """The cache; recomputed if it is gone"""
        cache = self.cache.pop() if self.cache else self.pair.forward(self.structure, arrays)[2]
        if self.again:
            self.cache.append(cache)
        return cache


class _AsItRuns(torch.autograd.Function):
    """y by f, and its gradient by f_vjp with the cache of f."""

    @staticmethod
    def forward(pair: Pair, structure: str, *tensors: Tensor) -> tuple[Any, ...]:
        arrays = to_arrays(tensors)
        ys, output, cache = pair.forward(structure, arrays)
        found = to_tensors(ys, arrays)
        held = [i for i, y in enumerate(to_arrays(found)) if shares(y, arrays_of(cache))]
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
    def vmap(info: Any, in_dims: tuple[Any, ...], pair: Pair, structure: str, *tensors: Tensor) -> Any:
        """One element after another"""
        found = [
            _AsItRuns.apply(pair, structure, *element(i, in_dims[2:], tensors))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        each = [kept for kept, *_ in found]
        ys = [torch.stack(y) for y in zip(*(ys for _, *ys in found), strict=True)]
        return (_Kept(pair, structure, each[0].output, [], [], each), *ys), (None, *(0 for _ in ys))


class _Gradient(torch.autograd.Function):
    """The gradient; it has no gradient itself."""

    @staticmethod
    def forward(kept: _Kept, n: int, *tensors: Tensor) -> tuple[Any, ...]:
        dys, arrays = to_arrays(tensors[:n]), to_arrays(tensors[n:])
        grads = kept.pair.backward(kept.structure, kept.output, kept.taken(arrays), dys)
        found = dict(zip(grads, to_tensors(list(grads.values()), [*dys, *arrays]), strict=True))
        return tuple(found.get(i) for i in range(len(arrays)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return no_second_order(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kept: _Kept, n: int, *tensors: Tensor) -> Any:
        """One element after another, each with its cache; or all with one cache, where cotangents alone are many"""
        dims = in_dims[2:]
        own = any(dim is not None for dim in dims[n:])
        shared = replace(kept, again=True)
        found = [
            _Gradient.apply(kept.of(i) if own else shared, n, *element(i, dims, tensors))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        grads = tuple(None if g[0] is None else torch.stack(g) for g in zip(*found, strict=True))
        return grads, tuple(None if g is None else 0 for g in grads)


_NO_FORWARD_MODE = (
    "as_torch_function has no forward mode, and so no jvp, jacfwd and hessian: use jacrev, or attention_jvp and "
    "mha_jvp of funcmha.derivatives"
)
