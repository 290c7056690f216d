"""funcmha's functions on NumPy's engine, inside a JAX program: under `jit`, `grad` and `vmap`.

    attend = as_jax_function(attention, attention_vjp, mask=masks.causal())        # attend(q, k, v, bias, sink)
    loss = jax.jit(jax.grad(lambda q: attend(q, k, v).sum()))
    layer = as_jax_function(mha, mha_vjp, mask=masks.causal())                     # layer(params, query, key, value)

The sequential and the batched engine need no bridge: they are written in the array-API subset, so that
`jax.custom_vjp(f).defvjp(f, f_vjp)` traces them, compiles them and runs them on JAX's own device, but they hold the
scores. The bridge calls back to the host instead, where the tiled engine works in linear memory, on all cores.

JAX copies the arguments and the results of the callback, once each way, also on a CPU (measured with jax 0.10.2);
funcmha makes no other copy. JAX refuses forward mode through the bridge, and so second derivatives. The backward pass
calls `f` again: see `docs/decisions/0021-jax-bridge.md`.

The call imports JAX.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from funcmha import _check
from funcmha.interop._named import check_named

VMAP_METHODS = ("sequential", "sequential_unrolled", "expand_dims", "broadcast_all")  # of jax.pure_callback


def as_jax_function(
    f: Callable[..., Any], f_vjp: Callable[..., Any], /, *, vmap_method: str = "sequential", **static: Any
) -> Callable[..., Any]:
    """y = f(*inputs, **static)[0]     with f_vjp for its gradient     as a function of JAX arrays

    f, f_vjp     a pair of funcmha: its inputs are arrays of JAX, trees of them, or None
    static       keyword arguments of f, the same for all calls: NumPy arrays, masks, numbers; no arrays of JAX
    vmap_method  "sequential" calls f for one element after another, and is correct for every f. "broadcast_all" calls
                 it once, with the new axis before all axes of all inputs: correct where f treats that as a batch, as
                 `attention` does without a sink; not for parameters. Or another of `jax.pure_callback`

    Errors of f are raised when JAX traces the call. A gradient has its input's dtype and shape. The returned function
    is pickled by the names of f and f_vjp, which must be functions of a module.
    """
    _check.function("f", f)
    _check.function("f_vjp", f_vjp)
    if vmap_method not in VMAP_METHODS:
        raise ValueError(f"vmap_method must be one of {', '.join(VMAP_METHODS)}, got {vmap_method!r}")
    import jax

    for name, x in static.items():
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
            raise TypeError(f"{name} must be of NumPy, as f is called with NumPy arrays, got an array of JAX")

    return _Function(f, f_vjp, vmap_method, static)


class _Function:
    """The function that `as_jax_function` returns."""

    def __init__(self, f: Callable[..., Any], f_vjp: Callable[..., Any], vmap_method: str, static: dict[str, Any]):
        self.made_of = f, f_vjp, vmap_method, static
        self.function = _differentiable(*self.made_of)
        self.__name__, self.__doc__ = getattr(f, "__name__", "f"), f.__doc__

    def __call__(self, *inputs: Any) -> Any:
        """y"""
        return self.function(*inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """By the names of f and f_vjp, which pickle looks up."""
        check_named("as_jax_function", f=self.made_of[0], f_vjp=self.made_of[1])
        return _Function, self.made_of

    def __copy__(self) -> "_Function":
        return self

    def __deepcopy__(self, _: Any) -> "_Function":
        return self  # as of any function; nobody writes to it


def _differentiable(
    f: Callable[..., Any], f_vjp: Callable[..., Any], vmap_method: str, static: dict[str, Any]
) -> Callable[..., Any]:
    """f with f_vjp for its gradient, both called back on the host"""
    import jax

    def host(*inputs: Any) -> Any:
        y, _ = f(*_numpy(inputs), **static)
        return y

    def host_vjp(inputs: Any, dy: Any) -> Any:
        _, cache = f(*_numpy(inputs), **static)
        return f_vjp(cache, _numpy(dy))

    def call(*inputs: Any) -> Any:
        # The shapes of y are those of f on tracers, which the tiled engine refuses and the default takes.
        traced = static | {"engine": None} if "engine" in static else static
        like = jax.eval_shape(lambda *xs: f(*xs, **traced)[0], *inputs)
        return jax.pure_callback(host, like, *inputs, vmap_method=vmap_method)

    def backward(inputs: Any, dy: Any) -> Any:
        like = jax.eval_shape(lambda: inputs)
        return jax.pure_callback(host_vjp, like, inputs, dy, vmap_method=vmap_method)

    function: Any = jax.custom_vjp(call)
    function.defvjp(lambda *inputs: (call(*inputs), inputs), backward)
    return function  # type: ignore[no-any-return]


def _numpy(tree: Any) -> Any:
    """JAX's arrays on the host as NumPy's, of the same memory."""
    import jax

    return jax.tree.map(np.asarray, tree)
