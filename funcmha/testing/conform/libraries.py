"""Arrays of NumPy in the library of an implementation and back, and that library's autodiff."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from funcmha._arrays import Array
from funcmha.testing.rounding import host

Outputs = Sequence[Any]


def given(a: Array, library: str, dtype: str, device: str | None = None) -> Any:
    """`a`, whose numbers `dtype` has, as an array of the library in memory of its own; booleans stay booleans"""
    if a is None:
        return None
    name = "bool" if a.dtype == bool else dtype
    return _GIVEN.get(library, _by_asarray(library))(a, name, device)


def taken(x: Any, library: str) -> Array:
    """An array of the library as NumPy's, in float64"""
    if library in ("mlx.core", "tinygrad") and dtype_of(x) != "float64":  # no NumPy has bfloat16
        x = x.astype(importlib.import_module(library).float32) if library == "mlx.core" else x.float()
    a: np.ndarray = host(x.numpy() if library in ("tinygrad", "paddle") else x)
    return a


def dtype_of(x: Any) -> str:
    """'float32' for float32 of any library"""
    name = str(getattr(x, "dtype", type(x).__name__)).rpartition(".")[2]
    return {"float": "float32", "double": "float64", "half": "float16"}.get(name, name)


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_numpy(a: Array, dtype: str, device: str | None) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes

        return a.astype(ml_dtypes.bfloat16)
    return a.astype(dtype)


def _in_torch(a: Array, dtype: str, device: str | None) -> Any:
    import torch

    return (
        torch.utils.dlpack.from_dlpack(np.array(a, order="C")).to(getattr(torch, dtype), copy=True).to(device or "cpu")
    )


def _in_jax(a: Array, dtype: str, device: str | None) -> Any:
    import jax

    placed = jax.numpy.asarray(a if a.dtype == bool else a.astype("float32" if dtype != "float64" else dtype), dtype)
    return placed if device is None else jax.device_put(placed, jax.devices(device)[0])


def _in_mlx(a: Array, dtype: str, device: str | None) -> Any:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)  # no GPU of MLX has float64
    if a.dtype == bool or dtype == "float64":
        return mx.array(a, dtype=mx.bool_ if a.dtype == bool else mx.float64)
    return mx.array(a.astype("float32")).astype(getattr(mx, dtype))


def _in_tinygrad(a: Array, dtype: str, device: str | None) -> Any:
    from tinygrad import Tensor, dtypes

    return Tensor(a if a.dtype == bool else a.astype("float32")).cast(getattr(dtypes, dtype)).realize()


def _in_paddle(a: Array, dtype: str, device: str | None) -> Any:
    import paddle

    return paddle.to_tensor(np.array(a, order="C"), place=device).astype(dtype)


def _by_asarray(library: str) -> Callable[..., Any]:
    def place(a: Array, dtype: str, device: str | None) -> Any:
        xp = importlib.import_module(library)
        extra = {} if device is None else {"device": device}
        return xp.asarray(_in_numpy(a, dtype, None) if a.dtype != bool else a, dtype=getattr(xp, dtype), **extra)

    return place


_GIVEN: dict[str, Callable[..., Any]] = {
    "numpy": _in_numpy,
    "torch": _in_torch,
    "jax": _in_jax,
    "mlx.core": _in_mlx,
    "tinygrad": _in_tinygrad,
    "paddle": _in_paddle,
}


# ── autodiff ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_vjp(f: Callable[..., Outputs], inputs: Sequence[Any], cotangents: Callable[[Outputs], Outputs]) -> Any:
    import torch

    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*leaves)
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents(outputs), strict=True) if dy is not None]
    attached = [(y, dy) for y, dy in pairs if y.requires_grad]
    if not attached or not leaves:
        return outputs, [None] * len(leaves)
    grads = torch.autograd.grad([y for y, _ in attached], leaves, [dy for _, dy in attached], allow_unused=True)
    return outputs, list(grads)


def _jax_vjp(f: Callable[..., Outputs], inputs: Sequence[Any], cotangents: Callable[[Outputs], Outputs]) -> Any:
    import jax

    outputs, pull = jax.vjp(lambda *x: list(f(*x)), *inputs)
    dys = [jax.numpy.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, cotangents(outputs), strict=True)]
    return outputs, list(pull(dys))


def _mlx_vjp(f: Callable[..., Outputs], inputs: Sequence[Any], cotangents: Callable[[Outputs], Outputs]) -> Any:
    import mlx.core as mx

    outputs = list(f(*inputs))
    dys = [mx.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, cotangents(outputs), strict=True)]
    outputs, grads = mx.vjp(lambda *x: list(f(*x)), list(inputs), dys)
    return outputs, grads


def _tinygrad_vjp(f: Callable[..., Outputs], inputs: Sequence[Any], cotangents: Callable[[Outputs], Outputs]) -> Any:
    outputs = f(*inputs)
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents(outputs), strict=True) if dy is not None]
    loss = sum((y * dy).sum() for y, dy in pairs)
    return outputs, loss.gradient(*inputs)


def _paddle_vjp(f: Callable[..., Outputs], inputs: Sequence[Any], cotangents: Callable[[Outputs], Outputs]) -> Any:
    import paddle

    for x in inputs:
        x.stop_gradient = False
    outputs = f(*inputs)
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents(outputs), strict=True) if dy is not None]
    attached = [(y, dy) for y, dy in pairs if not y.stop_gradient]
    if not attached:
        return outputs, [None] * len(inputs)
    return outputs, paddle.grad([y for y, _ in attached], list(inputs), [dy for _, dy in attached], allow_unused=True)


# f(*inputs) → outputs; cotangents(outputs), None where there is none   →   outputs, gradients, None where there is none
AUTODIFF: dict[str, Callable[..., Any]] = {
    "torch": _torch_vjp,
    "jax": _jax_vjp,
    "mlx.core": _mlx_vjp,
    "tinygrad": _tinygrad_vjp,
    "paddle": _paddle_vjp,
}
