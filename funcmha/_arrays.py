"""The one file that knows array libraries: whose array this is, and in which precision to compute with it."""

from collections.abc import Callable
from functools import cache
from math import isqrt
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, cupy.ndarray, or any array of the array-API standard

NO_ARRAYS = (np.generic, np.ma.MaskedArray, np.matrix)
quiet_underflow = np.errstate(under="ignore")  # a decorator: what is too small to be a number is 0, and no error

HALF = ("float16", "bfloat16")  # stored in 16 bits, computed with in float32


def namespace(x: Array) -> ModuleType:
    """The module whose functions take `x`: numpy for a NumPy array, cupy for a CuPy array, and so on."""
    if isinstance(x, np.ndarray):
        return np  # as its __array_namespace__ says, which imports, as nothing can when the interpreter ends
    xp: ModuleType
    if hasattr(x, "__array_namespace__"):
        xp = x.__array_namespace__()
    elif type(x).__module__.startswith("cupy"):  # cupy.ndarray has no __array_namespace__
        import cupy

        xp = cupy
    else:  # torch tensors, and older libraries
        try:
            import array_api_compat
        except ModuleNotFoundError as error:
            name = type(x).__module__.partition(".")[0]
            raise ModuleNotFoundError(
                f"arrays of {name} need array-api-compat: pip install array-api-compat", name=error.name
            ) from None

        xp = array_api_compat.array_namespace(x)
    return xp


NAMES = {"numpy": "a NumPy array", "cupy": "a CuPy array", "torch": "a PyTorch tensor", "jax": "a JAX array"}


def library(x: Array) -> str:
    """The library of `x` as its user imports it: 'numpy', 'torch', 'jax.numpy', …"""
    try:
        return namespace(x).__name__.removeprefix("array_api_compat.")
    except (TypeError, ImportError):  # of no library of arrays, as a pandas.Series is
        return type(x).__module__.partition(".")[0]


def described(x: Array) -> str:
    """'a NumPy array', 'a PyTorch tensor', 'an array of dask', …"""
    root = library(x).partition(".")[0]
    return NAMES.get(root, f"an array of {root}")


def is_array(x: Any) -> bool:
    """Whether `x` is an array of some library: a NumPy scalar, a list and a number are not.

    Nor is a masked array, whose mask nobody would read, or a matrix, which multiplies and indexes in its own way.
    """
    known = hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "ndim")
    return known and not isinstance(x, NO_ARRAYS)


def holds_numbers(x: Any) -> bool:
    """Whether `x` is an array of some library, and has a place: no shape and dtype alone, as JAX and PyTorch have."""
    if not is_array(x) or str(getattr(x, "device", "")) == "meta":
        return False
    try:
        namespace(x)
    except (TypeError, ImportError):  # of no library, as jax.ShapeDtypeStruct
        return False
    return True


def dtype_name(x: Array) -> str:
    """'float32' for numpy.float32, torch.float32, array_api_strict.float32, …"""
    kind: Any = type(x.dtype)
    return _name(kind, x.dtype)


@cache
def _name(kind: Any, dtype: Any) -> str:
    """Remembered, as the string of a NumPy dtype takes 3 µs; by type first, as libraries may not compare theirs."""
    return str(dtype).rpartition(".")[2]


def native(a: np.ndarray) -> np.ndarray:
    """The numbers in the byte order of this machine."""
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def upcast(x: Array) -> Array:
    """`x` in the dtype to compute in: float16 and bfloat16 become float32, everything else is already there."""
    if x is None or dtype_name(x) not in HALF:
        return x
    xp = namespace(x)
    return xp.astype(x, xp.float32)


def downcast(x: Array, dtype: Any) -> Array:
    """`x` in `dtype`: the one rounding at the end of a computation that `upcast` began."""
    if isinstance(x, np.generic):  # NumPy's arithmetic makes scalars of arrays without axes
        x = np.asarray(x)
    return x if x is None or x.dtype == dtype else namespace(x).astype(x, dtype)


def own(y: Array, kept: Array) -> Array:
    """y, copied where it is the very array that a cache keeps: what is returned belongs to the caller."""
    return namespace(y).astype(y, y.dtype, copy=True) if y is kept else y


def read_only(x: Array) -> Array:
    """A view that cannot be written to; a copy where the library has no such thing."""
    if not isinstance(x, np.ndarray):
        return own(x, x)
    view = x.view()
    view.flags.writeable = False
    return view


def from_host(a: np.ndarray, like: Array = None) -> Array:
    """The NumPy array `a` in the library and on the device of `like`; as it is for None."""
    if like is None or isinstance(like, np.ndarray):
        return a
    # Copied, as PyTorch would share its memory, and takes none that is reversed or read-only.
    return _on_device(like, namespace(like).asarray, np.array(a))


def to_host(x: Array) -> np.ndarray:
    """The numbers of `x` as a NumPy array, which may share its memory: CuPy's and PyTorch's on any device

    Raises TypeError, NotImplementedError or RuntimeError, as the library does, for what NumPy cannot read.
    """
    if hasattr(x, "get"):  # cupy.ndarray
        return np.asarray(x.get())
    return np.asarray(x.numpy(force=True) if library(x) == "torch" else x)  # force: what wants a gradient, too


def in_library_of(a: Array, like: Array) -> Array:
    """A static array, of NumPy or of the library of `like`, in that library"""
    return from_host(a, like) if isinstance(a, np.ndarray) else a


def or_zeros(x: Array, shape: tuple[int, ...], like: Array) -> Array:
    """A cotangent in the dtype to compute in, and for None 0 in the library, dtype and on the device of `like`."""
    return full(shape, 0.0, like) if x is None else upcast(x)


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of `broadcast_to(x, g.shape)` for x of `shape`: the sum over every axis that was repeated."""
    xp = namespace(g)
    extra = g.ndim - len(shape)
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1]
    axes = (*range(extra), *repeated)
    return xp.reshape(xp.sum(g, axis=axes), shape) if axes else g


def sum_over_batch(g: Array, rank: int, batch_axes: int) -> Array:
    """g (b₁, …, bₙ, ..., and `rank` axes)   →   (b₁, …, bₙ, and `rank` axes), summed over all between"""
    axes = tuple(range(batch_axes, g.ndim - rank))
    return namespace(g).sum(g, axis=axes) if axes else g


def row_blocks(n: int) -> list[slice]:
    """About √n blocks of n rows: a sum of partial sums of √n terms loses √n ulps at worst, one long sum n."""
    size = max(isqrt(n), 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def of_heads(a: Array, h: slice, rank: int = 3) -> Array:
    """a (..., H or 1, and `rank` − 1 axes), or without a head axis, or None, as the heads `h` see it"""
    if a is None or a.ndim < rank or a.shape[-rank] == 1:
        return a
    return a[(..., h, *(slice(None),) * (rank - 1))]


def of_sample(a: Array, b: tuple[int | slice, ...], rank: int = 3) -> Array:
    """a (..., and `rank` axes) at the element `b` of the batch, along which it may be broadcast; None stays None"""
    if a is None or a.ndim <= rank:
        return a
    batch = a.shape[: a.ndim - rank]
    own = b[len(b) - len(batch) :]
    return a[(*(0 if n == 1 else i for i, n in zip(own, batch, strict=True)), ...)]


def heads_first(x: Array) -> Array:
    """x (..., T, H, D)   →   (..., H, T, D)"""
    return _swapped(x)


def heads_last(x: Array) -> Array:
    """x (..., H, T, D)   →   (..., T, H, D)"""
    return _swapped(x)


def _swapped(x: Array) -> Array:
    return x.swapaxes(-2, -3) if isinstance(x, np.ndarray) else namespace(x).moveaxis(x, -2, -3)  # a tenth of the time


def words(like: Array) -> Any:
    """NumPy's type of the words that the library of `like`, another than NumPy, draws with, or None

    JAX may not have 64 bits, and PyTorch shifts no unsigned number.
    """
    known = {"cupy": np.uint64, "jax.numpy": np.uint32}
    return None if like is None or isinstance(like, np.ndarray) else known.get(namespace(like).__name__)


def repeat(n: int, f: Callable[..., Any], x: tuple[Array, ...]) -> tuple[Array, ...]:
    """x = f(i, *x) for i of 0 … n − 1, as a loop that JAX compiles once"""
    if namespace(x[0]).__name__ == "jax.numpy":
        from jax.lax import fori_loop

        return fori_loop(0, n, lambda i, x: f(i, *x), x)  # type: ignore[no-any-return]
    for i in range(n):
        x = f(i, *x)
    return x


def full(shape: tuple[int, ...], value: float | bool, like: Array) -> Array:
    """`value` everywhere, in the library, dtype and on the device of `like`, where it is made."""
    return _on_device(like, namespace(like).full, shape, value, dtype=like.dtype)


def unset(shape: tuple[int, ...], like: Array) -> Array:
    """Any numbers, in the library, dtype and on the device of `like`, where there is room for them."""
    return _on_device(like, namespace(like).empty, shape, dtype=like.dtype)


def arange(n: int, like: Array) -> Array:
    """0, 1, … n − 1 in the library and on the device of `like`, where it is made."""
    return _on_device(like, namespace(like).arange, n)


def _on_device(like: Array, make: Callable[..., Array], *args: Any, **options: Any) -> Array:
    """make(*args, **options), on the device of `like`"""
    if isinstance(like, np.ndarray) or not hasattr(like, "device"):  # a tracer of JAX has none
        return make(*args, **options)
    if namespace(like).__name__ == "cupy":  # whose functions take no device, and work on the current one
        with like.device:
            return make(*args, **options)
    return make(*args, **options, device=like.device)


def writes(x: Array) -> bool:
    """Whether arrays like x may be written to: those of JAX may not, and others take no `out=`"""
    return isinstance(x, np.ndarray) or type(x).__module__.startswith("cupy")


def into(own: Array, f: Any, *args: Any) -> Array:
    """f(*args), in the memory of `own` where the library can; whoever calls needs `own` no longer"""
    return f(*args, out=own) if writes(own) else f(*args)


def row_maxima(x: Array) -> Array:
    """max x (..., R, 1) over the last axis"""
    xp = namespace(x)
    if not isinstance(x, np.ndarray):
        return xp.max(x, axis=-1, keepdims=True)
    return np.take_along_axis(x, x.argmax(axis=-1, keepdims=True), axis=-1)  # takes NumPy a third of the time of max


def replaced(own: Array, where: Array, value: float) -> Array:
    """`value` where not `where`, in the memory of `own` where the library can"""
    if not isinstance(own, np.ndarray):
        return namespace(own).where(where, own, value)
    np.copyto(own, value, where=~where)
    return own


def half_of_factors(x: Array) -> str | None:
    """The half type of x, where its library sums products of that type in float32, and gives them so; else None

    JAX does. CuPy's product of more than two axes converts its factors to float32 first, PyTorch's rounds what it sums.
    """
    name = dtype_name(x)
    return name if name in HALF and namespace(x).__name__ == "jax.numpy" else None


def product(a: Array, b: Array, half: str | None = None) -> Array:
    """a b, or of both rounded to a half type, summed in float32"""
    if half is None:
        return a @ b
    xp = namespace(a)
    return xp.matmul(a.astype(half), b.astype(half), preferred_element_type=xp.float32)


def product_of_transposed(a: Array, b: Array, half: str | None = None) -> Array:
    """aᵀ b     a (..., R, N)   b (..., R, D)   →   (..., N, D)     as `product`"""
    xp = namespace(a)
    if xp.__name__ == "cupy":  # whose product copies what is transposed: b, and not a
        return xp.matrix_transpose(xp.matrix_transpose(b) @ a)
    return product(xp.matrix_transpose(a), b, half)


def outline(x: Array) -> Array:
    """Of x nothing but its shape, library, dtype and device, for a cache: (*x.shape, 0). None stays None."""
    return None if x is None else full((*x.shape, 0), 0.0, x)


# ── a whole, part by part ────────────────────────────────────────────────────────────────────────────────────────

Place = tuple[tuple[int, ...], ...]  # start, stop, and a step that is not 1, along each of the last axes


def rows_and_columns(a: Array, rows: tuple[int, ...], cols: tuple[int, ...]) -> Place:
    """Where those are in a (..., T or 1, S or 1), of which one axis or both may be absent"""
    n = min(a.ndim, 2)
    sizes = a.shape[a.ndim - n :]
    return tuple((0, 1) if size == 1 else some for some, size in zip((rows, cols)[2 - n :], sizes, strict=True))


def cut(a: Array, place: Place) -> Array:
    """What is there"""
    return a[(..., *(slice(*some) for some in place))]


class Sum:
    """Σ of arrays, each added at its place in an array of `shape` that is 0 elsewhere

    A place with a step is for libraries that can write.
    """

    def __init__(self, shape: tuple[int, ...], like: Array) -> None:
        self.shape, self.like = shape, like
        self.array = full(shape, 0.0, like) if writes(like) else None
        self.parts: dict[Place, Array] = {}

    def add(self, place: Place, part: Array) -> None:
        """whole[..., place] += part, where the library can; else the part is kept"""
        if self.array is not None:
            own = cut(self.array, place)  # a view
            own += part
        else:
            self.parts[place] = self.parts[place] + part if place in self.parts else part

    def total(self) -> Array:
        """The array"""
        return joined(self.parts, self.shape, self.like) if self.array is None else self.array


def joined(parts: dict[Place, Array], shape: tuple[int, ...], like: Array) -> Array:
    """Σ of the parts at their places, which may overlap, in an array of `shape`"""
    if not parts:
        return full(shape, 0.0, like)
    if () in parts:
        return parts[()]
    rows: dict[tuple[int, ...], dict[Place, Array]] = {}
    for (some, *others), part in parts.items():
        rows.setdefault(some, {})[tuple(others)] = part
    axis = len(shape) - len(next(iter(parts)))
    layers: list[list[Array]] = []  # one after another along the axis, with 0 between
    ends: list[int] = []
    for start, stop in sorted(rows):
        n = next((n for n, end in enumerate(ends) if end <= start), len(ends))
        if n == len(ends):
            layers.append([])
            ends.append(0)
        own = (*shape[:axis], stop - start, *shape[axis + 1 :])
        layers[n] += [*_gap(own, axis, start - ends[n], like), joined(rows[start, stop], own, like)]
        ends[n] = stop
    for n, end in enumerate(ends):
        layers[n] += _gap(shape, axis, shape[axis] - end, like)
    sums = [layer[0] if len(layer) == 1 else namespace(like).concat(layer, axis=axis) for layer in layers]
    return sum(sums[1:], sums[0])


def _gap(shape: tuple[int, ...], axis: int, n: int, like: Array) -> list[Array]:
    """[0 …] of `shape` with n along the axis, if there are any"""
    return [full((*shape[:axis], n, *shape[axis + 1 :]), 0.0, like)] if n else []
