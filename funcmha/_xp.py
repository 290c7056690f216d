"""The one file that knows array libraries: whose array this is, and in which precision to compute with it."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, cupy.ndarray, or any array of the array-API standard

# Of a function: what is too small for its dtype is 0 there, and nothing to stop at under np.errstate(all="raise").
quiet_underflow = np.errstate(under="ignore")

HALF = ("float16", "bfloat16")  # stored in 16 bits, computed with in float32


def namespace(x: Array) -> ModuleType:
    """The module whose functions take `x`: numpy for a NumPy array, cupy for a CuPy array, and so on."""
    xp: ModuleType
    if hasattr(x, "__array_namespace__"):
        xp = x.__array_namespace__()
    elif type(x).__module__.startswith("cupy"):  # cupy.ndarray has no __array_namespace__
        import cupy

        xp = cupy
    else:  # torch tensors, and older libraries
        import array_api_compat

        xp = array_api_compat.array_namespace(x)
    return xp


def is_array(x: Any) -> bool:
    """Whether `x` is an array of some library: a NumPy scalar, a list and a number are not.

    Nor is a masked array, whose mask nobody would read, or a matrix, which multiplies and indexes in its own way.
    """
    known = hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "ndim")
    return known and not isinstance(x, np.generic | np.ma.MaskedArray | np.matrix)


def dtype_name(x: Array) -> str:
    """'float32' for numpy.float32, torch.float32, array_api_strict.float32, …"""
    kind: Any = type(x.dtype)
    return _name(kind, x.dtype)


@cache
def _name(kind: Any, dtype: Any) -> str:
    """Remembered, as the string of a NumPy dtype takes 3 µs; by type first, as libraries may not compare theirs."""
    return str(dtype).rpartition(".")[2]


def widen(x: Array) -> Array:
    """`x` in the dtype to compute in: float16 and bfloat16 become float32, everything else is already there."""
    if x is None or dtype_name(x) not in HALF:
        return x
    xp = namespace(x)
    return xp.astype(x, xp.float32)


def narrow(x: Array, dtype: Any) -> Array:
    """`x` in `dtype`: the one rounding at the end of a computation that `widen` began."""
    return x if x is None or x.dtype == dtype else namespace(x).astype(x, dtype)


def from_host(a: np.ndarray, like: Array) -> Array:
    """The NumPy array `a` in the library and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return a
    xp = namespace(like)
    if xp.__name__ == "cupy" or not hasattr(like, "device"):  # cupy.asarray takes no device; a tracer of JAX has none
        return xp.asarray(a)
    return xp.asarray(a, device=like.device)


def or_zeros(x: Array, shape: tuple[int, ...], like: Array) -> Array:
    """A cotangent in the dtype to compute in, and for None 0 in the library, dtype and on the device of `like`."""
    return full(shape, 0.0, like) if x is None else widen(x)


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of `broadcast_to(x, g.shape)` for x of `shape`: the sum over every axis that was repeated."""
    xp = namespace(g)
    extra = g.ndim - len(shape)
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1]
    axes = (*range(extra), *repeated)
    return xp.reshape(xp.sum(g, axis=axes), shape) if axes else g


def of_heads(a: Array, h: slice, rank: int = 3) -> Array:
    """a (..., H or 1, and `rank` − 1 axes), or without a head axis, or None, as the heads `h` see it"""
    if a is None or a.ndim < rank or a.shape[-rank] == 1:
        return a
    return a[(..., h, *(slice(None),) * (rank - 1))]


def of_sample(a: Array, b: tuple[int, ...], rank: int = 3) -> Array:
    """a (..., and `rank` axes) at the element `b` of the batch, along which it may be broadcast; None stays None"""
    if a is None or a.ndim <= rank:
        return a
    batch = a.shape[: a.ndim - rank]
    own = b[len(b) - len(batch) :]
    return a[(*(0 if n == 1 else i for i, n in zip(own, batch, strict=True)), ...)]


def full(shape: tuple[int, ...], value: float | bool, like: Array) -> Array:
    """`value` everywhere, in the library, dtype and on the device of `like`."""
    return namespace(like).astype(from_host(np.full(shape, value), like), like.dtype)


def outline(x: Array) -> Array:
    """Of x nothing but its shape, library, dtype and device, for a cache: (*x.shape, 0). None stays None."""
    return None if x is None else full((*x.shape, 0), 0.0, x)
