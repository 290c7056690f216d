"""A file read with distrust: all that can be known of it is known before its numbers take memory."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile

import numpy as np

from funcmha import tree
from funcmha._arrays import dtype_name, from_host, holds_numbers

from . import archive, npy
from .files import File, read
from .names import keys

MAX_BYTES = 8 * 2**30


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


_Leaf = tuple[archive.Member, npy.Header]


def load(
    path: File, *, like: tree.Tree = None, max_bytes: int = MAX_BYTES, check_finite: bool = False, mmap: bool = False
) -> dict[str, tree.Tree]:
    """The file with the members q_proj.w.npy, …  →  {"q_proj": {"w": x}, …}

    The tree that was saved, in its order: that of the members in the file, or of `like`; but where all keys of a branch
    are numbers, and `like` is not given, they go up. (The first version of `save` sorted names: of its files `like`
    alone can tell another order.)

    Arrays are NumPy's, in native byte order and C order, writable, and own their memory. Nothing is allocated before
    names, dtypes, shapes and sizes are known to be sound and to agree with the file's length.

    `path` may be a binary file object too, one with `seek`, which is read from its position to its end.

    like: a tree of arrays (or of anything with `shape` and `dtype`) with the names, shapes and dtypes that must come,
        in its order. Where one is an array of CuPy, PyTorch, JAX or another library, its leaf comes as an array of that
        library, on that device.
    max_bytes: the most that the file may unpack to. Of a deflated file that may be 1032 times its own length, as of
        zeros: give less where a stranger's file may not cost as much. Each member is unpacked twice, the first time
        to see that it holds what its header says, byte for byte, and to keep nothing.
    check_finite: whether NaN and infinities are refused.
    mmap: whether arrays stay in the file, as `numpy.memmap` that may not be written to. `path` must be a path then, and
        the file, of any size, stored and in native byte order, as `save` and `numpy.savez` write it. Checksums are not
        looked at, Fortran order stays, and numbers need not be aligned: NumPy copies what it computes with, and a
        result may differ in its last bit. A file that `save` replaces stays as it was for the arrays; one that is
        written into changes them, and one that is truncated ends the process (SIGBUS).

    Raises ParameterFileError for a bad file, ParameterNameError (a KeyError) for a leaf that the file or `like` lacks,
    ValueError for one of another shape or dtype than in `like` and for a file object without `seek` or with `mmap`,
    TypeError for a leaf of `like` that says neither, as None, OSError where the file cannot be read.
    Warns of names that differ in case only. Source of the rules: `validate` of safetensors, CVE-2019-6446, numpy
    #20033.
    """
    flat: dict[str, Any] = {}
    wanted = {} if like is None else _wanted(like)
    if mmap and not isinstance(path, str | os.PathLike):
        raise ValueError(f"mmap needs a path, got {type(path).__name__}")
    with read(path) as (name, source):
        leaves = _leaves(source, name, None if mmap else max_bytes)
        whole = np.memmap(source.file, np.uint8, "r") if mmap else None
        if like is not None:
            leaves = _alike(name, leaves, wanted)
        for key, leaf in leaves.items():
            with _refusing(f"{name}: "):
                flat[key] = _array(source, *leaf) if whole is None else _mapped(whole, *leaf)
                if check_finite:
                    _check_finite(key, flat[key])
            flat[key] = _in_library_of(flat[key], wanted.get(key))
    return tree.unflatten(flat)


def entries(path: File, *, max_bytes: int = MAX_BYTES) -> dict[str, Entry]:
    """The file with the members q_proj.w.npy, …  →  {"q_proj.w": Entry(dtype, shape, nbytes), …}

    Makes every check of `load` but one, the checksum of stored members, and reads their headers only. (Deflated members
    are unpacked, to see how long they are, but not kept.) Raises as `load` does.
    """
    with read(path) as (name, source):
        return {key: _entry(header) for key, (_, header) in _leaves(source, name, max_bytes).items()}


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """ParameterFileError for what is wrong with the file or the member."""
    try:
        yield
    except OSError:  # of which io.UnsupportedOperation is a ValueError too
        raise
    except (BadZipFile, ValueError) as error:
        raise ParameterFileError(f"{what}{error}") from error


def _leaves(source: archive.Source, name: str, max_bytes: int | None) -> dict[str, _Leaf]:
    """Every leaf by its key, with nothing left to check but its numbers. max_bytes is None where these are mapped."""
    with _refusing(f"{name}: "):
        members = archive.members(source)
        names = keys(member.name for member in members)
        unpacked = sum(member.size for member in members)
        deflated = [member.name for member in members if member.method != ZIP_STORED]
        if max_bytes is None and deflated:
            raise ValueError(f"{deflated[0]} must be stored to be mapped, and is deflated: load it without mmap")
        if max_bytes is not None and unpacked > max_bytes:
            raise ValueError(f"must unpack to at most max_bytes={max_bytes} bytes, got {unpacked}")
        headers = []
        for member in members:
            head = archive.head(source, member, npy.HEAD)
            with _refusing(f"{member.name} "):
                headers.append(npy.parse(head, member.size))
        return {key: (members[i], headers[i]) for key, i in names.items()}


def _entry(header: npy.Header) -> Entry:
    return Entry(np.dtype(header.dtype.type), header.shape, header.nbytes)


def _array(source: archive.Source, member: archive.Member, header: npy.Header) -> np.ndarray:
    dtype, shape, fortran, start, _ = header
    a = np.empty(shape[::-1] if fortran else shape, dtype)
    flat, at = a.reshape(-1).view(np.uint8).data, 0
    for piece in archive.contents(source, member, skip=start):
        flat[at : at + len(piece)] = piece
        at += len(piece)
    return np.require(a.T if fortran else a, dtype.type, ["C", "ALIGNED", "WRITEABLE", "OWNDATA"])


def _mapped(whole: np.ndarray, member: archive.Member, header: npy.Header) -> np.ndarray:
    """The leaf as a view of the file."""
    dtype, shape, fortran, start, nbytes = header
    if not dtype.isnative:
        raise ValueError(f"{member.name} must be in native byte order to be mapped: load it without mmap")
    at = member.start + start
    return whole[at : at + nbytes].view(dtype).reshape(shape, order="F" if fortran else "C")


def _check_finite(key: str, a: np.ndarray) -> None:
    bad = ~np.isfinite(a)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), a.shape))
        raise ValueError(f"{key} must be finite, got {a[first]} at {first} and {bad.sum() - 1} more")


def _wanted(like: tree.Tree) -> dict[str, Any]:
    """The leaves of `like` by their names; TypeError for one that says no shape and dtype."""
    leaves = tree.flatten(like)
    for key, leaf in leaves.items():
        if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            instead = ": leave it out where the file has no such leaf" if leaf is None else ""
            raise TypeError(f"{key} of like must be an array, or have its shape and dtype, got {leaf!r:.60}{instead}")
    return leaves


def _alike(name: str, leaves: Mapping[str, _Leaf], want: Mapping[str, Any]) -> dict[str, _Leaf]:
    """The leaves in the order of `like`; raises unless they have its names, shapes and dtypes."""
    odd = [f"misses {key}" for key in want if key not in leaves] + [f"has {key}" for key in leaves if key not in want]
    if odd:
        more = f", and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise ParameterNameError(f"{name} must have the leaves of like, but it {', '.join(odd[:8])}{more}")
    for key, leaf in want.items():
        dtype = leaf.dtype.name if isinstance(leaf.dtype, np.dtype) else dtype_name(leaf)  # of either byte order
        shape, got = tuple(leaf.shape), _entry(leaves[key][1])
        if (got.dtype.name, got.shape) != (dtype, shape):
            raise ValueError(f"{name}: {key} must be {dtype} {shape} as in like, got {got.dtype} {got.shape}")
    return {key: leaves[key] for key in want}


def _in_library_of(a: np.ndarray, like: Any) -> Any:
    """The leaf in the library and on the device of `like`"""
    return from_host(a, like) if holds_numbers(like) else a
