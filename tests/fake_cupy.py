"""A strict stand-in for CuPy, for machines without a GPU: its interface over the numbers of NumPy, and no more of it.

    with fake_cupy.installed() as cupy, fake_cupy.traffic() as seen:
        x = cupy.asarray(a)
        y, cache = attention(x, x, x)
    assert seen.waits == []

It refuses what CuPy refuses: a NumPy array beside one of its own, in any operator or function; conversion that nobody
asked for; functions, keywords, dtypes and attributes that CuPy has not. Beyond that it refuses what CuPy allows and
nobody should do unawares: NumPy's functions of device arrays, and indexing by NumPy arrays, which are uploads.

It counts what a GPU makes dear: the places where the host waits for the device, and the bytes that it sends there. The
memory pool is that of CuPy, with the bytes that live arrays have.

The signatures and the loops below are those of CuPy 14.2; tests/test_cupy_contract.py compares them with the package.
What a stand-in cannot show: that a kernel compiles, what it computes, and how long it takes.
"""

import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

VERSION = "14.2"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# ── what CuPy has ────────────────────────────────────────────────────────────────────────────────────────────────

# Functions of the first argument, an array, that NumPy has by the same name. To use another, add its line here.
OF_AN_ARRAY = """
    all(a, axis=None, out=None, keepdims=False)
    any(a, axis=None, out=None, keepdims=False)
    ascontiguousarray(a, dtype=None)
    argmax(a, axis=None, dtype=None, out=None, keepdims=False)
    astype(x, dtype, /, *, copy=True)
    broadcast_to(array, shape)
    cumsum(a, axis=None, dtype=None, out=None)
    empty_like(prototype, dtype=None, order='K', subok=None, shape=None)
    expand_dims(a, axis)
    flip(a, axis=None)
    full_like(a, fill_value, dtype=None, order='K', subok=None, shape=None)
    matrix_transpose(x, /)
    max(a, axis=None, out=None, keepdims=False)
    mean(a, axis=None, dtype=None, out=None, keepdims=False)
    min(a, axis=None, out=None, keepdims=False)
    moveaxis(a, source, destination)
    ones_like(a, dtype=None, order='K', subok=None, shape=None)
    permute_dims(a, axes=None)
    repeat(a, repeats, axis=None)
    reshape(a, newshape, order='C', *, copy=None)
    squeeze(a, axis=None)
    sum(a, axis=None, dtype=None, out=None, keepdims=False)
    swapaxes(a, axis1, axis2)
    take(a, indices, axis=None, out=None)
    take_along_axis(a, indices, axis)
    tril(m, k=0)
    triu(m, k=0)
    zeros_like(a, dtype=None, order='K', subok=None, shape=None)
"""
OF_ARRAYS = """
    concat(tup, axis=0, out=None, *, dtype=None, casting='same_kind')
    concatenate(tup, axis=0, out=None, *, dtype=None, casting='same_kind')
    stack(tup, axis=0, out=None, *, dtype=None, casting='same_kind')
"""
OF_A_SHAPE = """
    arange(start, stop=None, step=1, dtype=None)
    empty(shape, dtype=float, order='C')
    full(shape, fill_value, dtype=None, order='C')
    ones(shape, dtype=float, order='C')
    zeros(shape, dtype=float, order='C')
"""
OWN = """
    array(obj, dtype=None, copy=True, order='K', subok=False, ndmin=0, *, blocking=False)
    asarray(a, dtype=None, order=None, *, copy=None, blocking=False)
    asnumpy(a, stream=None, order='C', out=None, *, blocking=True)
    where(condition, x=None, y=None)
"""
VIEWS = ("broadcast_to", "expand_dims", "flip", "matrix_transpose", "moveaxis", "permute_dims", "reshape", "squeeze",
         "swapaxes")  # fmt: skip

_INTEGERS, _REAL, _COMPLEX = "bBhHiIlLqQ", "eEfd", "FD"  # the characters of dtypes; E is bfloat16
_ALL = "?" + _INTEGERS + _REAL + _COMPLEX


def _each(chars: str, inputs: int, result: str = "") -> list[str]:
    return [f"{char * inputs}->{result or char}" for char in chars]


_INT64 = ["qq->?", "QQ->?", "qQ->?", "Qq->?"]
_EQUAL = ["??->?", *_INT64, *_each(_REAL + _COMPLEX, 2, "?"), "VV->?"]
_LESS = ["??->?", *_INT64, *_each(_REAL + _COMPLEX, 2, "?")]
LOOPS = {  # ufunc: the dtypes that it takes and gives
    **dict.fromkeys(("add", "subtract", "multiply", "maximum", "minimum"), _each(_ALL, 2)),
    "true_divide": ["qq->d", "qQ->d", "Qq->d", "QQ->d", *_each(_REAL + _COMPLEX, 2)],
    "floor_divide": _each(_INTEGERS + _REAL, 2),
    "remainder": _each(_INTEGERS + _REAL, 2),
    "power": ["??->b", *_each(_INTEGERS + _REAL + _COMPLEX, 2)],
    "negative": _each(_ALL, 1),
    "absolute": [*_each("?" + _INTEGERS + _REAL, 1), "F->f", "D->d"],
    **dict.fromkeys(("equal", "not_equal"), _EQUAL),
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal"), _LESS),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), _each("?" + _INTEGERS, 2)),
    "invert": _each("?" + _INTEGERS, 1),
    **dict.fromkeys(("left_shift", "right_shift"), _each(_INTEGERS, 2)),
    **dict.fromkeys(("cos", "exp", "expm1", "log", "log1p", "sin", "sqrt", "tanh"), _each(_REAL + _COMPLEX, 1)),
    "floor": _each("?" + _INTEGERS + _REAL, 1),
    **dict.fromkeys(("isfinite", "isnan"), _each(_REAL + _COMPLEX, 1, "?")),
}
WHERE = [f"?{2 * char}->{char}" for char in "?" + _INTEGERS + "efdFD"]  # without bfloat16
ALIASES = {"abs": "absolute", "divide": "true_divide"}
DTYPES = ("bool_", "int8", "uint8", "int32", "int64", "uint32", "uint64", "float16", "float32", "float64", "complex128")
METHODS = ("all", "any", "argmax", "astype", "copy", "get", "item", "max", "mean", "min", "nonzero", "ravel", "reshape",
           "sum", "tolist", "transpose", "view")  # fmt: skip
PROPERTIES = ("T", "device", "dtype", "flags", "itemsize", "mT", "nbytes", "ndim", "shape", "size", "strides")

# ── what is counted ──────────────────────────────────────────────────────────────────────────────────────────────


class Traffic:
    """Between host and device, while it is watched."""

    def __init__(self) -> None:
        self.waits: list[str] = []  # what makes the host wait for the device, and the line of funcmha that does it
        self.sent = 0  # bytes from the host
        self.copied: list[tuple[int, ...]] = []  # the shapes of what products copied, as it was not contiguous


_watching: list[Traffic] = []
_waits = 0  # so far, by whomever


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What happens in the block."""
    seen = Traffic()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def _wait(what: str) -> None:
    global _waits
    _waits += 1
    frame = sys._getframe(1) if _watching else None
    while frame is not None and not _is_of_funcmha(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    if frame is not None:  # else a test looks at a result
        for seen in _watching:
            seen.waits.append(f"{what} in {frame.f_globals['__name__']}, line {frame.f_lineno}")


def _is_of_funcmha(module: str) -> bool:
    """But for `tree.map`, which does what it is told."""
    return module.startswith("funcmha.") and module != "funcmha.tree"


class _Pool:
    """The bytes that live arrays have, and the most that they had since `free_all_blocks`: freed blocks stay there."""

    def __init__(self) -> None:
        self._live: dict[int, Any] = {}
        self._used = self._total = 0

    def used_bytes(self) -> int:
        return self._used

    def total_bytes(self) -> int:
        return self._total

    def free_all_blocks(self, stream: Any = None) -> None:
        self._total = self._used

    def holds(self, buffer: np.ndarray) -> None:
        while isinstance(buffer.base, np.ndarray):
            buffer = buffer.base
        key, size = id(buffer), buffer.nbytes
        if key not in self._live:
            self._live[key] = weakref.ref(buffer, lambda _: self._drop(key, size))
            self._used += size
            self._total = max(self._total, self._used)

    def _drop(self, key: int, size: int) -> None:
        del self._live[key]
        self._used -= size


_pool = _Pool()

# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

DEVICES = 2
_current = threading.local()


class Device:
    """One of two; those without peer access, so that arrays of both never meet."""

    def __init__(self, device: int | None = None) -> None:
        self.id = getattr(_current, "id", 0) if device is None else int(device)
        if not 0 <= self.id < DEVICES:
            raise ValueError(f"no device {self.id}")
        self._before: list[int] = []

    def __enter__(self) -> "Device":
        self._before.append(Device().id)
        _current.id = self.id
        return self

    def __exit__(self, *_: Any) -> None:
        _current.id = self._before.pop()

    def synchronize(self) -> None:
        _wait("Device.synchronize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class Event:
    """A clock, for the benchmark; what came before it is done as soon as anyone has waited."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._at, self._waits = 0.0, 0

    def record(self, stream: Any = None) -> None:
        self._at, self._waits = time.perf_counter(), _waits

    def synchronize(self) -> None:
        _wait("Event.synchronize")

    @property
    def done(self) -> bool:
        return _waits > self._waits


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    return 1000 * (end_event._at - start_event._at)


class Stream:
    """An order of work, which here is done at once."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.waited: list[Event] = []

    def record(self, event: Any = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


_current_stream = Stream()


def get_current_stream(device_id: int = -1) -> Stream:
    return _current_stream


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Flags(NamedTuple):
    """Without `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class ndarray:  # noqa: N801 — CuPy's name
    __module__ = "cupy"
    __slots__ = ("__weakref__", "_a", "device")
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("make arrays with cupy.asarray")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{func.__name__} of a CuPy array: use cupy.{func.__name__}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """An operator between NumPy's and this; a scalar of NumPy is taken, as CuPy does."""
        if method == "__call__" and not kwargs and any(isinstance(x, np.ndarray | np.generic) for x in inputs):
            name = {"divide": "true_divide"}.get(ufunc.__name__, ufunc.__name__)
            return (matmul if name == "matmul" else _ufuncs[name])(*inputs)
        raise TypeError(f"numpy.{ufunc.__name__} of a CuPy array: use cupy.{ufunc.__name__}")

    # ── to the host ──

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        return self._got("get")

    def item(self) -> Any:
        return self._got("item").item()

    def tolist(self) -> Any:
        return self._got("tolist").tolist()

    def nonzero(self) -> Any:
        return tuple(map(_new, self._got("nonzero").nonzero()))

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError("The truth value of an array with more than one element is ambiguous.")
        return bool(self._got("bool"))

    def __int__(self) -> int:
        return int(self._got("int"))

    def __float__(self) -> float:
        return float(self._got("float"))

    def __complex__(self) -> complex:
        return complex(self._got("complex"))

    def __repr__(self) -> str:
        return repr(self._got("repr"))

    def __format__(self, spec: str) -> str:
        return format(self._got("format"), spec)

    def __reduce__(self) -> Any:
        return array, (self._got("pickle"),)

    def _got(self, what: str) -> np.ndarray:
        _wait(what)
        return self._a.copy()

    # ── containers ──

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, key: Any) -> Any:
        index, copies = _index(key)
        if copies:
            _on_current(self)
        return (_new if copies else partial(_view, self))(self._a[index])

    def __setitem__(self, key: Any, value: Any) -> None:
        _on_current(*(x for x in (self, value) if isinstance(x, ndarray)))
        self._a[_index(key)[0]] = _operand(value)

    # ── properties and methods ──

    dtype = property(lambda self: self._a.dtype)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    ndim = property(lambda self: self._a.ndim)
    shape = property(lambda self: self._a.shape)
    size = property(lambda self: self._a.size)
    strides = property(lambda self: self._a.strides)
    T = property(lambda self: _view(self, self._a.T))
    mT = property(lambda self: _view(self, self._a.mT))  # noqa: N815

    @property
    def flags(self) -> "Flags":
        return Flags(self._a.flags.c_contiguous, self._a.flags.f_contiguous, self._a.flags.owndata)

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Any:
        return self if not copy and self.dtype == dtype else _call(np.astype, self, dtype)

    def copy(self, order: str = "C") -> Any:
        return _new(self._a.copy())

    def ravel(self, order: str = "C") -> Any:
        return MODULE.reshape(self, -1)

    def reshape(self, *shape: Any, order: str = "C") -> Any:
        return MODULE.reshape(self, *(shape if len(shape) == 1 else (shape,)))

    def view(self, dtype: Any = None, array_class: Any = None) -> Any:
        return _view(self, self._a.view(dtype))

    def transpose(self, *axes: int) -> Any:
        return MODULE.permute_dims(self, axes or None)


def _like(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return getattr(MODULE, name)(self, *args, **kwargs)

    return method


for _name in ("all", "any", "argmax", "max", "mean", "min", "sum"):
    setattr(ndarray, _name, _like(_name))


def _new(a: Any, device: Device | None = None) -> ndarray:
    """Memory of the current device; a number as an array without axes."""
    x = ndarray.__new__(ndarray)
    x._a, x.device = np.asarray(a), device or Device()
    _pool.holds(x._a)
    return x


def _view(of: ndarray, a: np.ndarray) -> ndarray:
    return of if a is of._a else _new(a, of.device)


def _operand(x: Any) -> Any:
    """What a kernel takes: an array of this library, or a number."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, bool | int | float | complex | np.generic):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _on_current(*arrays: ndarray) -> None:
    here = Device()
    for x in arrays:
        if x.device != here:
            raise ValueError(
                f"The device where the array resides ({x.device.id}) is different from the current device ({here.id})."
                " Peer access is unavailable between these devices."
            )


def _index(key: Any) -> tuple[tuple[Any, ...], bool]:
    """An index for NumPy, and whether it copies; the ellipsis at its end makes an array of a single number."""
    keys, found, copies = key if isinstance(key, tuple) else (key,), [], False
    for k in keys:
        if isinstance(k, ndarray):
            copies = True
            if k.dtype == bool:
                _wait("indexing by booleans")
            found.append(k._a)
        elif k is None or k is Ellipsis or (isinstance(k, slice | int | np.integer) and not isinstance(k, bool)):
            found.append(k)
        else:
            raise TypeError(f"indexing by {type(k)} is an upload: index by an array of CuPy")
    return (*found, *(() if any(k is Ellipsis for k in found) else (...,))), copies


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def _call(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A kernel: all arrays are of this library and on the current device. CuPy warns of no number."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, ndarray)]
    _on_current(*given)
    with np.errstate(all="ignore"):
        return _new(f(*map(_host, args), **{name: _host(x) for name, x in kwargs.items()}))


def _host(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple | list) and any(isinstance(n, ndarray | np.ndarray) for n in x):
        raise TypeError("'ndarray' object cannot be interpreted as an integer")
    return x._a if isinstance(x, ndarray) else x


def _ufunc(name: str, loops: list[str]) -> Callable[..., Any]:
    f = getattr(np, name)
    inputs = loops[0].index("->")

    def ufunc(*args: Any, out: Any = None) -> Any:
        if len(args) != inputs:
            raise TypeError(f"wrong number of arguments for cupy.{name}: {len(args)}")
        values = [_operand(x) for x in args]
        _on_current(*(x for x in (*args, out) if isinstance(x, ndarray)))
        with np.errstate(all="ignore"):
            result = np.asarray(f(*values))
        _check_loop(name, loops, np.result_type(*values), result.dtype)
        if out is None:
            return _new(result)
        if not np.can_cast(result.dtype, out.dtype, "same_kind"):
            raise TypeError(f"output (typecode {result.dtype.char}) could not be coerced to {out.dtype.char}")
        out._a[...] = result
        return out

    ufunc.__name__ = name
    return ufunc


def _check_loop(name: str, loops: list[str], common: np.dtype[Any], result: np.dtype[Any]) -> None:
    """The first loop that `common` fits into gives `result`, as NumPy gave."""
    for loop in loops:
        *_, last, gives = loop.replace("->", "")
        if last != "V" and np.can_cast(common, _dtype(last), "safe"):
            assert _dtype(gives) == result, f"cupy.{name} of {common} gives {gives}, NumPy gives {result}"
            return
    raise TypeError(f"Wrong type ({common}) of arguments for cupy_{name}")


def _dtype(char: str) -> np.dtype[Any]:
    return BFLOAT16 if char == "E" else np.dtype(char)


def signatures(table: str) -> dict[str, inspect.Signature]:
    """The functions of a table."""
    found = {}
    for line in table.strip().splitlines():
        scope: dict[str, Any] = {}
        exec(f"def {line.strip()}: ...", scope)
        name = line.strip().partition("(")[0]
        found[name] = inspect.signature(scope[name])
    return found


def _of_an_array(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    f = getattr(np, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        if not isinstance(args[0], ndarray):
            raise TypeError(f"Unsupported type {type(args[0])}")
        if name in VIEWS:
            return _viewed(args[0], f(*map(_host, args), **kwargs))
        return _special[name](*args, **kwargs) if name in _special else _call(f, *args, **kwargs)

    return function


def _viewed(x: ndarray, a: np.ndarray) -> ndarray:
    if a.size and not np.shares_memory(a, x._a):  # a reshape that copies
        _on_current(x)
    return _view(x, a)


def _of_arrays(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    f = getattr(np, name)

    def function(tup: Any, *args: Any, **kwargs: Any) -> Any:
        signature.bind(tup, *args, **kwargs)
        arrays = [_operand(x) for x in tup]
        if not all(isinstance(x, np.ndarray) for x in arrays):
            raise TypeError("Only cupy arrays can be concatenated")
        _on_current(*tup)
        return _new(f(arrays, *args, **kwargs))

    return function


def _of_a_shape(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return _call(getattr(np, name), *args, **kwargs)

    return function


def array(obj: Any, dtype: Any = None, copy: Any = True, order: Any = "K", **_: Any) -> ndarray:
    if isinstance(obj, ndarray):
        here = obj.device == Device()
        same = here and not copy and (dtype is None or obj.dtype == dtype)
        return obj if same else _new(np.array(obj._a, dtype, copy=True))
    a = np.array(obj, dtype)
    if a.dtype.kind not in "?biufc" and a.dtype != BFLOAT16:
        raise ValueError(f"Unsupported dtype {a.dtype}")
    for seen in _watching:
        seen.sent += a.nbytes
    return _new(a.astype(a.dtype.newbyteorder("="), copy=False))


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy)


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a._got("asnumpy") if isinstance(a, ndarray) else np.asarray(a)


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    condition.astype("?", copy=False)  # which a boolean of Python has not
    if x is None and y is None:
        return condition.nonzero()
    allowed, *values = map(_operand, (condition, x, y))
    _on_current(*(a for a in (condition, x, y) if isinstance(a, ndarray)))
    result = np.where(allowed.astype(bool), *values)
    _check_loop("where", WHERE, np.result_type(*values), result.dtype)
    return _new(result)


def matmul(a: Any, b: Any) -> ndarray:
    """As CuPy does it: of half types in float32; of more than two axes, of copies of what is not contiguous."""
    values = _operand(a), _operand(b)
    if not all(isinstance(x, np.ndarray) and x.ndim for x in values):
        raise ValueError("Scalar operands are not allowed, use '*' instead")
    _on_current(a, b)
    dtype, axes = np.result_type(*values), max(x.ndim for x in values)
    wide = np.dtype("float32") if dtype.char in "eE" else dtype
    for x in values if axes > 2 else ():
        if not x.flags.c_contiguous:
            for seen in _watching:
                seen.copied.append(x.shape)
    copied = [_new(np.ascontiguousarray(x, wide)) if axes > 2 or x.dtype != wide else _new(x) for x in values]
    with np.errstate(all="ignore"):
        result = _new(np.matmul(*(x._a for x in copied)))
    return result.astype(dtype, copy=False)


def _sum(a: ndarray, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
    """Of half types, accumulated in float32."""
    if a.dtype.char in "eE" and dtype is None:
        return _sum(a.astype(np.float32), axis, keepdims=keepdims).astype(a.dtype)
    return _call(np.sum, a, axis=axis, dtype=dtype, keepdims=keepdims)


def _astype(x: ndarray, dtype: Any, /, *, copy: bool = True) -> ndarray:
    return x.astype(dtype, copy=copy)


_special = {"sum": _sum, "astype": _astype}
_ufuncs = {name: _ufunc(name, loops) for name, loops in LOOPS.items()}

# ── operators ────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift", "matmul": "matmul",
}  # fmt: skip
COMPARISONS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
               "ge": "greater_equal"}  # fmt: skip
SIGNS = {"neg": "negative", "invert": "invert", "abs": "absolute"}


def _operator(name: str, kind: str = "") -> Callable[..., Any]:
    f = matmul if name == "matmul" else _ufuncs[name]

    def operator(self: ndarray, other: Any) -> Any:
        if getattr(other, "__array_ufunc__", self) is None:  # a mask of funcmha, whose own operator it is
            return NotImplemented
        if kind == "in place":
            return f(self, other, out=self)
        return f(other, self) if kind == "reflected" else f(self, other)

    return operator


for _name, _of in OPERATORS.items():
    setattr(ndarray, f"__{_name}__", _operator(_of))
    setattr(ndarray, f"__r{_name}__", _operator(_of, "reflected"))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _operator(_of, "in place"))
for _name, _of in COMPARISONS.items():
    setattr(ndarray, f"__{_name}__", _operator(_of))
for _name, _of in SIGNS.items():
    setattr(ndarray, f"__{_name}__", lambda self, f=_ufuncs[_of]: f(self))

# ── the module ───────────────────────────────────────────────────────────────────────────────────────────────────


def _module() -> ModuleType:
    made = ModuleType("cupy", __doc__)
    made.__version__ = VERSION  # type: ignore[attr-defined]
    made.__getattr__ = _lacks  # type: ignore[method-assign]
    parts: dict[str, Any] = {"ndarray": ndarray, "is_available": lambda: True, "matmul": matmul, "finfo": np.finfo}
    parts |= {"array": array, "asarray": asarray, "asnumpy": asnumpy, "where": where, "inf": np.inf, "nan": np.nan}
    parts |= {name: getattr(np, name) for name in DTYPES} | _ufuncs | {a: _ufuncs[f] for a, f in ALIASES.items()}
    for table, maker in ((OF_AN_ARRAY, _of_an_array), (OF_ARRAYS, _of_arrays), (OF_A_SHAPE, _of_a_shape)):
        parts |= {name: maker(name, signature) for name, signature in signatures(table).items()}
    properties = {"name": b"no device: a stand-in", "multiProcessorCount": 0}
    runtime = SimpleNamespace(getDeviceCount=lambda: DEVICES, getDeviceProperties=lambda device: properties)
    cuda = {
        "Device": Device,
        "Event": Event,
        "Stream": Stream,
        "get_current_stream": get_current_stream,
        "get_elapsed_time": get_elapsed_time,
        "runtime": runtime,
    }
    parts["cuda"] = SimpleNamespace(**cuda, is_available=lambda: True)
    parts["get_default_memory_pool"] = lambda: _pool
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def _lacks(name: str) -> Any:
    raise AttributeError(f"module 'cupy' has no attribute {name!r}, or tests/fake_cupy.py has not: add its line there")


MODULE = _module()


@contextmanager
def installed() -> Iterator[ModuleType]:
    """It is what `import cupy` finds while the block lasts."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = MODULE
    try:
        yield MODULE
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
