"""A tree written: the same bytes for the same parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from funcmha import tree
from funcmha._arrays import described, dtype_name, is_array, to_host

from . import archive, npy
from .files import File, written
from .names import keys

FLOATS = (np.float16, np.float32, np.float64)


def save(path: File, params: Mapping[str, tree.Tree]) -> None:
    """{"q_proj": {"w": x}, …}  →  the file `path` with the members q_proj.w.npy, …

    Leaves are float16, float32 or float64 arrays of NumPy, CuPy and PyTorch, on any device, or of any library that
    NumPy can read; a tensor that requires its gradient is saved without. The bytes depend on names and their order,
    dtypes, shapes and values alone: numbers are little-endian and in C order, the time is 1980. Members are
    in the order of `params`, but where all keys of a branch are numbers: these go up.

    The file at `path` is replaced at once, when the new one is complete and on the disk: whatever ends the process
    before, the old one stays as it was. See `funcmha.npz.atomic.replacing` for links, modes and kills, and for
    what file systems cannot: that a directory cannot be synced is no error. POSIX only.

    `path` may be a binary file object too, a pipe as well: it is written to from its position on, not gone back in, and
    neither flushed nor closed. What it holds after an error is half a file.

    Raises TypeError for a leaf that is no such array and ValueError for a name that `load` would refuse, before the
    disk is touched; OSError where the file cannot be written.
    """
    arrays = _arrays(params)
    with written(path) as file:
        archive.write(file, ((f"{key}.npy", _parts(a)) for key, a in arrays.items()))


def _arrays(params: Mapping[str, tree.Tree]) -> dict[str, np.ndarray]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of dicts of arrays, got {type(params).__name__}")
    arrays = {key: _host(key, leaf) for key, leaf in tree.flatten(params).items()}
    return {key: arrays[key] for key in keys(f"{key}.npy" for key in arrays)}


def _host(key: str, leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array."""
    if not is_array(leaf) and not isinstance(leaf, np.generic):  # which x − 0.1 is, for a 0-d array x
        raise TypeError(f"{key} must be an array, got {leaf!r:.60}")
    if dtype_name(leaf) == "bfloat16":
        raise TypeError(f"{key} is bfloat16, which npz cannot tell from raw bytes: cast it to float32")
    try:
        a = to_host(leaf)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise TypeError(f"{key} must be an array that NumPy can read, got {described(leaf)}: {error}") from error
    if a.dtype.type not in FLOATS:
        raise TypeError(f"{key} must be float16, float32 or float64, got {a.dtype}")
    if a.ndim > npy.NDIM:
        raise ValueError(f"{key} must have at most {npy.NDIM} dimensions, got {a.ndim}")
    return a


def _parts(a: np.ndarray) -> tuple[bytes, memoryview]:
    """The header and the numbers."""
    a = np.asarray(a, dtype=a.dtype.newbyteorder("<"), order="C")
    return npy.header(a.dtype, a.shape), a.reshape(-1).view(np.uint8).data
