"""Parameters in an .npz file: written whole, the same bytes for the same parameters, and read with distrust.

    save("model.npz", params)
    params = load("model.npz", like=params)

The file is what `numpy.savez` would write, so `numpy.load` reads it: a zip archive with one .npy member per leaf, named
by the leaf's dotted path. `load` also takes what `savez` and `savez_compressed` write, and refuses all that
`numpy.load` would take, allocate or guess at beyond that: the guarantees of safetensors, for npz.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

from funcmha import tree
from funcmha._xp import dtype_name, is_array

from . import archive as zips
from . import npy
from .atomic import replacing

Path = str | os.PathLike[str]

MAX_BYTES = 8 * 2**30
MAX_RATIO = 1000  # deflate reaches 1032, on constant data only

FLOATS = (np.float16, np.float32, np.float64)
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.npy")


class ParameterFileError(ValueError):
    """The file holds no parameters, or is damaged: the message names file and member, what must be, and what came."""


class ParameterNameError(KeyError):
    """The file has other leaves than `like`. Prints as its message, where a KeyError prints the message's repr."""

    __str__ = Exception.__str__


class Entry(NamedTuple):
    """What the file says of one leaf."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int


class _Leaf(NamedTuple):
    member: zips.Member
    header: npy.Header

    @property
    def entry(self) -> Entry:
        return Entry(np.dtype(self.header.dtype.type), self.header.shape, self.header.nbytes)


def save(path: Path, params: Mapping[str, tree.Tree]) -> None:
    """{"q_proj": {"w": x}, …}  →  the file `path` with the members q_proj.w.npy, …

    Leaves are float16, float32 or float64 arrays of NumPy, CuPy, or any library that NumPy can read. The bytes depend
    on names, dtypes, shapes and values alone: keys are sorted, numbers little-endian and in C order, the time is 1980.

    The file at `path` is replaced at once, when the new one is complete and on the disk: whatever ends the process
    before, the old one stays as it was. See `funcmha.npz.atomic.replacing` for links, modes and kills. POSIX only.

    Raises TypeError for a leaf that is no such array and ValueError for a name that `load` would refuse, before the
    disk is touched; OSError where the file cannot be written.
    """
    arrays = _arrays(params)
    with replacing(path) as file, ZipFile(file, "w") as archive:
        for key, a in arrays.items():
            _write(archive, f"{key}.npy", a)


def load(
    path: Path, *, like: tree.Tree | None = None, max_bytes: int = MAX_BYTES, check_finite: bool = False
) -> dict[str, tree.Tree]:
    """The file with the members q_proj.w.npy, …  →  {"q_proj": {"w": x}, …}

    Arrays are NumPy's, in native byte order and C order, writable, and own their memory. Nothing is allocated before
    names, dtypes, shapes and sizes are known to be sound and to agree with the file's length.

    like: a tree of arrays (or of anything with `shape` and `dtype`) with the names, shapes and dtypes that must come.
    max_bytes: the most that the file may unpack to; and never to more than 1000 times its own length.
    check_finite: whether NaN and infinities are refused.

    Raises ParameterFileError for a bad file, ParameterNameError (a KeyError) for a leaf that the file or `like` lacks,
    ValueError for one of another shape or dtype than in `like`, OSError where the file cannot be read. Warns of names
    that differ in case only. Source of the rules: `validate` of safetensors, CVE-2019-6446, numpy #20033.
    """
    name = os.fspath(path)
    flat: dict[str, np.ndarray] = {}
    with open(name, "rb") as file:
        leaves = _leaves(file, name, max_bytes)
        if like is not None:
            _check_like(name, leaves, like)
        for key, leaf in leaves.items():
            with _refusing(name):
                flat[key] = _array(file, leaf)
                if check_finite:
                    _check_finite(key, flat[key])
    return tree.unflatten(flat)


def entries(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Entry]:
    """The file with the members q_proj.w.npy, …  →  {"q_proj.w": Entry(dtype, shape, nbytes), …}

    Makes every check of `load` but one, the checksum of stored members, and reads their headers only. (Deflated members
    are unpacked, to see how long they are, but not kept.) Raises as `load` does.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        return {key: leaf.entry for key, leaf in _leaves(file, name, max_bytes).items()}


def _arrays(params: Mapping[str, tree.Tree]) -> dict[str, np.ndarray]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of dicts of arrays, got {type(params).__name__}")
    arrays = {key: _host(key, leaf) for key, leaf in sorted(tree.flatten(params).items())}
    _keys(f"{key}.npy" for key in arrays)
    return arrays


def _host(key: str, leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array."""
    if not is_array(leaf) and not isinstance(leaf, np.generic):  # which x − 0.1 is, for a 0-d array x
        raise TypeError(f"{key} must be an array, got {leaf!r:.60}")
    if dtype_name(leaf) == "bfloat16":
        raise TypeError(f"{key} is bfloat16, which npz cannot tell from raw bytes: cast it to float32")
    a = np.asarray(leaf.get() if hasattr(leaf, "get") else leaf)
    if a.dtype.type not in FLOATS:
        raise TypeError(f"{key} must be float16, float32 or float64, got {a.dtype}")
    if a.ndim > npy.NDIM:
        raise ValueError(f"{key} must have at most {npy.NDIM} dimensions, got {a.ndim}")
    return a


def _write(archive: ZipFile, name: str, a: np.ndarray) -> None:
    a = np.asarray(a, dtype=a.dtype.newbyteorder("<"), order="C")
    header = npy.header(a.dtype, a.shape)
    info = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16  # as on Unix, everywhere
    info.file_size = len(header) + a.nbytes
    with archive.open(info, "w") as member:
        member.write(header)
        member.write(a.reshape(-1).view(np.uint8).data)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except (BadZipFile, ValueError) as error:
        raise ParameterFileError(f"{name}: {error}") from error


def _leaves(file: BinaryIO, name: str, max_bytes: int) -> dict[str, _Leaf]:
    """Every leaf by its key, with nothing left to check but the bytes of its numbers."""
    with _refusing(name):
        members = zips.members(file)
        keys = _keys(member.name for member in members)
        unpacked, length = sum(member.size for member in members), file.seek(0, os.SEEK_END)
        if unpacked > max_bytes:
            raise ValueError(f"must unpack to at most max_bytes={max_bytes} bytes, got {unpacked}")
        if unpacked > MAX_RATIO * length:
            raise ValueError(f"must unpack to at most {MAX_RATIO} times its own {length} bytes, got {unpacked}")
        return {key: _Leaf(member, _header(file, member)) for key, member in zip(keys, members, strict=True)}


def _keys(names: Iterable[str]) -> list[str]:
    """The members' names less .npy; ValueError for one that is not allowed, comes twice, or runs through another."""
    keys: dict[str, None] = {}
    folded: dict[str, str] = {}
    for name in names:
        if len(name) > 255 or not NAME.fullmatch(name) or any(re.fullmatch("__.*__", part) for part in name.split(".")):
            raise ValueError(
                f"{name[:300]!r} must be named in letters, digits and _, with dots between, nothing __like_this__, "
                "at the end .npy, in at most 255 bytes"
            )
        key = name.removesuffix(".npy")
        if key in keys:
            raise ValueError(f"{key} must be there once, got it twice")
        if folded.setdefault(key.lower(), key) != key:
            warnings.warn(f"{folded[key.lower()]} and {key} differ in case only", stacklevel=4)
        keys[key] = None
    tree.unflatten(keys)
    return list(keys)


def _header(file: BinaryIO, member: zips.Member) -> npy.Header:
    try:
        return npy.parse(zips.head(file, member, npy.HEAD), member.size)
    except ValueError as error:
        raise ValueError(f"{member.name} {error}") from error


def _array(file: BinaryIO, leaf: _Leaf) -> np.ndarray:
    dtype, shape, fortran, start, _ = leaf.header
    a = np.empty(shape[::-1] if fortran else shape, dtype)
    flat, at = a.reshape(-1).view(np.uint8).data, 0
    for piece in zips.contents(file, leaf.member, skip=start):
        flat[at : at + len(piece)] = piece
        at += len(piece)
    return np.require(a.T if fortran else a, leaf.entry.dtype, ["C", "ALIGNED", "WRITEABLE", "OWNDATA"])


def _check_finite(key: str, a: np.ndarray) -> None:
    bad = ~np.isfinite(a)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), a.shape))
        raise ValueError(f"{key} must be finite, got {a[first]} at {first} and {bad.sum() - 1} more")


def _check_like(name: str, leaves: Mapping[str, _Leaf], like: tree.Tree) -> None:
    want = tree.flatten(like)
    odd = [f"misses {key}" for key in want if key not in leaves] + [f"has {key}" for key in leaves if key not in want]
    if odd:
        more = f", and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise ParameterNameError(f"{name} must have the leaves of like, but it {', '.join(odd[:8])}{more}")
    for key, leaf in want.items():
        dtype, shape = np.dtype(leaf.dtype).newbyteorder("="), tuple(leaf.shape)
        got = leaves[key].entry
        if (got.dtype, got.shape) != (dtype, shape):
            raise ValueError(f"{name}: {key} must be {dtype} {shape} as in like, got {got.dtype} {got.shape}")
