"""The one form of error message: the argument, what it must be and who decided so, and what came.

k_proj.w must be (K, D, Ck) with D=64 as in q_proj.w, got (6, 32, 384)
"""

from collections.abc import Collection, Iterable
from functools import cache as remembered
from math import isfinite
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._arrays import HALF, Array, described, dtype_name, is_array, library

# complex128 is there for complex-step checks of a gradient: every op is holomorphic, and conjugates nothing.
Cache = TypeVar("Cache")

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex128")


def one_dtype(
    arrays: Iterable[tuple[str, Array]] = (), optional: Iterable[tuple[str, Array]] = (), first: Any = None
) -> None:
    """Raise TypeError unless all are arrays of one library, of one dtype out of DTYPES; an optional one may be None.

    `first`, a name and an array, is one that has been checked before.
    """
    for name, x in [*arrays, *((name, x) for name, x in optional if x is not None)]:
        if first is not None and type(x) is type(first[1]) is np.ndarray and x.dtype is first[1].dtype:
            continue  # as nearly all are
        if not is_array(x):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if dtype_name(x) not in DTYPES:
            native_order(name, x)
            instead = ": write mask=" if name == "bias" and dtype_name(x) == "bool" else ""
            raise TypeError(f"{name} must have a dtype of {', '.join(DTYPES)}, got {x.dtype}{instead}")
        owner, like = first = first or (name, x)
        one_library(name, x, owner, like)
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have dtype {like.dtype} as {owner} has, got {x.dtype}: cast one of them")


def one_library(name: str, x: Array, owner: str, like: Array, *, static: bool = False) -> None:
    """Raise TypeError unless `x` is of the library of `like` and on its device. What is `static` may be NumPy's too."""
    kind = type(x)
    if kind is type(like) is np.ndarray or (static and isinstance(x, np.ndarray)):
        return
    if kind is not type(like) and library(x) != library(like):
        raise _two_libraries(name, x, owner, like, static)
    here, there = getattr(x, "device", None), getattr(like, "device", None)  # which a tracer of JAX has not
    if here != there and library(x) != "jax.numpy":  # JAX says itself which devices go together
        raise TypeError(f"{name} must be on {there} as {owner} is, got it on {here}: move one of them")


def _two_libraries(name: str, x: Array, owner: str, like: Array, static: bool) -> TypeError:
    devices = [str(getattr(a, "device", "")) for a in (like, x)]
    told = all(devices) and not all("cpu" in device.lower() for device in devices)
    there, here = (f" on {device}" if told else "" for device in devices)
    or_numpy = ", or a NumPy array" if static and not isinstance(like, np.ndarray) else ""
    instead = _converted(name, x, like) + ("" if static or " " in owner else f" or {_converted(owner, like, x)}")
    wanted, got = f"{described(like)}{there} as {owner} is{or_numpy}", f"{described(x)}{here}"
    return TypeError(f"{name} must be {wanted}, got {got}: write {instead}")


def _converted(name: str, x: Array, like: Array) -> str:
    """What to write for the array of this name in the library of `like`."""
    if isinstance(like, np.ndarray):
        return f"{name}.get()" if library(x) == "cupy" else f"np.asarray({name})"
    return f"{library(like)}.asarray({name})"


def native_order(name: str, x: Array) -> None:
    """Raise TypeError for numbers in the byte order of another machine: no product takes them as they are."""
    if isinstance(x, np.ndarray) and not x.dtype.isnative and x.dtype.name in DTYPES:
        got = f"{'big' if x.dtype.byteorder == '>' else 'little'}-endian {x.dtype}"
        raise TypeError(f"{name} must be in native byte order, got {got}: write {name}.astype({x.dtype.name!r})")


def arrays(*given: tuple[str, Array, str], optional: Iterable[tuple[str, Array, str]] = ()) -> "Axes":
    """The axes of arrays of one dtype: a name, an array and its symbols each; None may stand for an optional one."""
    present = [*given, *(each for each in optional if each[1] is not None)]
    one_dtype([(name, x) for name, x, _ in present])
    axes = Axes()
    for name, x, symbols in present:
        axes(name, x, symbols)
    return axes


def boolean(name: str, x: Any, meaning: str) -> None:
    """Raise TypeError unless `x` is a boolean array (or None); `meaning` says what True stands for."""
    if x is None:
        return
    if not is_array(x):
        raise TypeError(f"{name} must be a boolean array, {meaning}, got {type(x).__name__}{no_booleans(name, x)}")
    if dtype_name(x) != "bool":
        raise TypeError(f"{name} must be boolean, {meaning}, got dtype {x.dtype}{no_booleans(name, x)}")


def no_booleans(name: str, x: Any) -> str:
    """The end of a message that refuses `x` as booleans: what to write instead, where that is known."""
    this = "it" if " " in name else name
    kind = dtype_name(x) if is_array(x) else type(x).__name__
    if kind in ("list", "tuple"):
        return f": write np.array({this})"
    if is_array(x) and (kind.startswith(("int", "uint")) or "keep" in name or "where" in name):
        return f": write {this} != 0"
    if kind.startswith(("float", "bfloat", "RelativeBias")):
        return f": pass it as the bias to add it to the scores, or write {this} != 0 if it is 0 and 1"
    return ""


def number(name: str, x: Any, low: float = -float("inf"), below: float = float("inf")) -> float:
    """`x` as a Python float, so that it never changes a dtype; ValueError unless low ≤ x < below and finite."""
    if not isinstance(x, Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a real number, got {x!r} of type {type(x).__name__}")
    try:
        value = float(x)
    except OverflowError:  # an integer of more than 1024 bits
        value = float("inf")
    if not (isfinite(value) and low <= value < below):
        bounds = "finite" if low == -float("inf") else f"at least {low:g} and below {below:g}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def integer(name: str, x: Any, low: int | None = None, below: int | None = 2**63, or_else: str = "") -> int:
    """`x` as a Python int; TypeError unless it is one, and not a boolean, ValueError unless low ≤ x < below."""
    if not isinstance(x, Integral) or isinstance(x, bool):
        raise TypeError(f"{name} must be an int{or_else}, got {x!r} of type {type(x).__name__}")
    n = int(x)
    if low is not None and n < low:
        raise ValueError(f"{name} must be at least {low}{or_else}, got {n}")
    if below is not None and n >= below:
        raise ValueError(f"{name} must be below 2**{below.bit_length() - 1}, got {n}")
    return n


def integers(name: str, x: Any, low: int | None = None, most: int = 2**63 - 1) -> NDArray[np.int64]:
    """`x` as int64; TypeError unless it is a NumPy array of integers, ValueError unless all are low … most."""
    if not (isinstance(x, np.ndarray) and is_array(x)) or x.dtype.kind not in "iu":
        other = is_array(x) and not isinstance(x, np.ndarray)
        got = f"{described(x)}: write np.asarray({name})" if other else getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} must be a NumPy array of integers, got {got}")
    if x.size and (x.max() > most or (low is not None and x.min() < low)):
        least = f"at least {low}" if x.max() <= most else "below 2**63"
        bounds = least if most == 2**63 - 1 else f"within {low} … {most}"
        raise ValueError(f"{name} must be {bounds}, got {x.tolist()}")
    return x.astype(np.int64)


def flag(name: str, x: Any) -> None:
    """Raise TypeError unless `x` is True or False: anything else that is true may have been meant as something else."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def function(name: str, x: Any) -> None:
    """Raise TypeError unless `x` can be called."""
    if not callable(x):
        raise TypeError(f"{name} must be a function, got {type(x).__name__}")


def cache(x: Any, kind: type[Cache], op: str) -> Cache:
    """`x`, the cache of `op`, else TypeError: another may have as many arrays, and mean others by them."""
    if not isinstance(x, kind):
        raise TypeError(f"cache must come from {op}, got {type(x).__name__}")
    return x


def multiple(query: str, heads: int, key: str, groups: int, letters: str = "H K") -> None:
    """Raise ValueError unless the query heads divide evenly among the key/value heads."""
    if heads != groups and (groups == 0 or heads % groups):
        H, K = letters.split()
        raise ValueError(f"{query} has {H}={heads} heads, which must be a multiple of {K}={groups} as in {key}")


def parts(name: str, x: Any, of: str) -> tuple[Any, ...]:
    """The cotangents of several outputs; TypeError unless `x` is a tuple of as many as the names in `of`."""
    n = len(of.split(", "))
    if not isinstance(x, tuple | list) or len(x) != n:
        got = f"{len(x)} of them" if isinstance(x, tuple | list) else type(x).__name__
        raise TypeError(f"{name} must be ({of}) as the output is, got {got}")
    return tuple(x)


def cotangent(
    name: str, x: Any, shape: tuple[int, ...], computed: Array, symbols: str, *, optional: bool = False
) -> None:
    """Raise unless `x` has this shape and the dtype of `computed`, or a half dtype that upcasts to it."""
    if x is None and optional:
        return
    if not is_array(x):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    _alike(name, x, shape, computed, symbols, "the output")


def batch_axes(n: Any, most: int) -> None:
    """Raise unless n is a number of leading axes, of which there are so many, whose sums are left out."""
    if not 0 <= integer("batch_axes", n) <= most:
        raise ValueError(f"batch_axes must be within 0 … {most}, the axes of the batch, got {n}")


def tangent(name: str, x: Array, shape: tuple[int, ...] | None, computed: Array, symbols: str = "") -> None:
    """Raise unless `x` is None, or has this shape and the dtype of `computed`, or a half dtype that upcasts to it.

    `shape` is that of what it is the tangent of, None if there is no such thing.
    """
    if x is None:
        return
    if not is_array(x):
        raise TypeError(f"{name} must be an array, or None for zero, got {type(x).__name__}")
    of = name.replace("_dot", "")
    if shape is None:
        raise ValueError(f"{name} must be None, as there is no {of}, got shape {tuple(x.shape)}")
    _alike(name, x, shape, computed, symbols, of)


def _alike(name: str, x: Array, shape: tuple[int, ...], computed: Array, symbols: str, of: str) -> None:
    if tuple(x.shape) != tuple(shape):
        spelt = f"({', '.join(symbols.split())}) = " if symbols else ""
        raise ValueError(f"{name} must be {spelt}{tuple(shape)} as {of} is, got {tuple(x.shape)}")
    one_library(name, x, of, computed)
    if x.dtype != computed.dtype and not (dtype_name(x) in HALF and dtype_name(computed) == "float32"):
        native_order(name, x)
        raise TypeError(f"{name} must have dtype {computed.dtype} as {of} has, got {x.dtype}")


def dtype_of(computed: Array, *tangents: Array) -> Any:
    """The dtype of the tangents, and so of what is made of them; without any, the one computed with."""
    return next((x.dtype for x in tangents if x is not None), computed.dtype)


def shape_of(x: Array) -> tuple[int, ...] | None:
    """The shape of an array, None for None."""
    return None if x is None else tuple(x.shape)


class Axes:
    """The sizes of the axis letters, each fixed by the first array that shows it, and the library, by the first of all.

    `axes("q", q, "... H T D")` checks `q` against what is known and learns the rest; `axes["D"]` reads a size.
    """

    def __init__(self) -> None:
        self.first: tuple[str, Array] | None = None
        self.size: dict[str, Any] = {}
        self.owner: dict[str, str] = {}

    def __getitem__(self, letter: str) -> Any:
        return self.size[letter]

    def __call__(self, name: str, x: Array, symbols: str) -> None:
        """Check the shape of `x` against `symbols`: axis letters, the first of which may be '...'."""
        self.first = self.first or (name, x)
        letters, shape = _letters(symbols), tuple(x.shape)
        if letters[:1] == ("...",):
            lead = len(shape) - len(letters) + 1  # the number of batch axes
            shape = (shape[:lead], *shape[lead:]) if lead >= 0 else ()
        size, fits = self.size, len(shape) == len(letters)
        for letter, n in zip(letters, shape, strict=False):
            fits = size.setdefault(letter, n) == n and fits
        if not fits:
            known = [f"{n}={size[n]} as in {self.owner[n]}" for n in letters if n in self.owner]
            spelt = f"({', '.join(letters)}){' with ' + ', '.join(known) if known else ''}"
            raise ValueError(f"{name} must be {spelt}, got {tuple(x.shape)}")
        for letter in letters:
            self.owner.setdefault(letter, name)

    def static(self, name: str, x: Array) -> None:
        """Check that a static array is of NumPy, or of the library of the arrays."""
        if self.first is not None:
            one_library(name, x, *self.first, static=True)

    def broadcast(self, name: str, got: tuple[int, ...] | None, symbols: str) -> None:
        """Check that an array of shape `got` (or None, for none) broadcasts to the known sizes of `symbols`."""
        if got is None:
            return
        want = self.shape(symbols)
        if len(got) > len(want) or any(n not in (1, m) for n, m in zip(got[::-1], want[::-1], strict=False)):
            spelt = ", ".join(symbols.split())
            raise ValueError(f"{name} must broadcast to ({spelt}) = {want}, got {got}")

    def shape(self, symbols: str) -> tuple[int, ...]:
        """The known sizes of `symbols`, the batch axes of '...' spelt out."""
        sizes: list[int] = []
        for letter in symbols.split():
            sizes += self.size[letter] if letter == "..." else (self.size[letter],)
        return tuple(sizes)


@remembered
def _letters(symbols: str) -> tuple[str, ...]:
    return tuple(symbols.split())


def keys(name: str, tree: Iterable[str], required: Collection[str], optional: Collection[str]) -> None:
    """Raise KeyError unless the dotted names of `tree` are all of `required` and some of `optional`."""
    for leaf in required:
        if leaf not in tree:
            raise KeyError(f"{name} must have {', '.join(required)}, and has no {leaf}")
    for leaf in tree:
        if leaf not in required and leaf not in optional:
            raise KeyError(f"{name} may have {', '.join(optional)}, and has {leaf}")
