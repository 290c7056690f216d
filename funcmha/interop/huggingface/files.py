"""safetensors files: one layer of a checkpoint, read and written without the rest of it in memory.

The `safetensors` library reads, and makes the bytes of each tensor. It silently writes wrong bytes for arrays that are
not contiguous, so it is given contiguous ones only.
"""

import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from shutil import copyfileobj
from types import ModuleType
from typing import Any

import numpy as np

from funcmha.npz.atomic import replacing

from .layer import Layer
from .state import from_state_dict, to_state_dict

Paths = str | os.PathLike[str]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_layer(path: Paths, n: int, config: Any = None, *, cross: bool = False, prefix: str | None = None) -> Layer:
    """Layer n of a checkpoint; nothing else is read

    path     the directory of a checkpoint, its tensors in one file or, with an index, in several; or a .safetensors
             file
    config   as in `from_state_dict`, and so cross and prefix; None is the config.json of the directory

    bfloat16 needs ml_dtypes. Raises ImportError without safetensors, FileNotFoundError for a directory without a
    checkpoint, and what `from_state_dict` raises.
    """
    tensors = Tensors(path)
    if config is None:
        config = json.loads((tensors.directory / "config.json").read_text(encoding="utf-8"))
    return from_state_dict(tensors, config, n, cross=cross, prefix=prefix)


def save_layer(path: Paths, layer: Layer) -> None:
    """Replace the parameters of a layer in the checkpoint at `path`, or write a new .safetensors file

    A file of a checkpoint is replaced when its new version is complete; only the bytes of this layer change. Raises
    KeyError for names that the checkpoint lacks, ValueError for another dtype or shape than in the file, TypeError for
    arrays that are not NumPy's.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer must be a Layer, as load_layer returns it, got {type(layer).__name__}")
    state = {name: _payload(name, x) for name, x in to_state_dict(layer.params, layer).items()}
    if not Path(path).exists():
        with replacing(path) as file:
            file.write(_library("safetensors.numpy").save(state, metadata={"format": "pt"}))
        return
    tensors = Tensors(path)
    by_file: dict[Path, list[str]] = {}
    for name, x in state.items():
        if name not in tensors.files:
            raise KeyError(f"path must be a checkpoint that has {name}, and {path} has not")
        tensors.check_like(name, x)
        by_file.setdefault(tensors.files[name], []).append(name)
    for source, names in by_file.items():
        _patch(source, {name: state[name] for name in names})


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint, each read from its file on access."""

    def __init__(self, path: Paths) -> None:
        self.open = _library("safetensors").safe_open
        path = Path(path)
        self.directory = path if path.is_dir() else path.parent
        if (self.directory / INDEX).exists() and path.is_dir():
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: path / _plain(file) for name, file in index.items()}
            return
        file = path / SINGLE if path.is_dir() else path
        if not file.exists():
            wanted = f"a directory with {SINGLE} or {INDEX}, or a .safetensors file"
            raise FileNotFoundError(f"path must be {wanted}, got {path}")
        try:
            with self.open(file, framework="np") as opened:
                self.files = dict.fromkeys(opened.keys(), file)
        except _library("safetensors").SafetensorError as error:
            raise ValueError(f"path must be a whole .safetensors file, and {file} is not: {error}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        with self.open(self.files[name], framework="np") as opened:
            if opened.get_slice(name).get_dtype() == "BF16":
                _ml_dtypes(name)
            x: np.ndarray = opened.get_tensor(name)
            return x

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def check_like(self, name: str, x: np.ndarray) -> None:
        """ValueError unless x has the shape and dtype of the tensor of that name."""
        old = self[name]
        if (old.shape, old.dtype) != (x.shape, x.dtype):
            raise ValueError(f"{name} must be {old.shape} of {old.dtype} as in the file, got {x.shape} of {x.dtype}")


def _patch(path: Path, state: dict[str, np.ndarray]) -> None:
    """Replace these tensors in the file; its header, with the offset of each, stays."""
    with open(path, "rb") as old:
        size = int.from_bytes(old.read(8), "little")
        header = json.loads(old.read(size))
        old.seek(0)
        with replacing(path) as new:
            copyfileobj(old, new)
            for name, x in state.items():
                new.seek(8 + size + header[name]["data_offsets"][0])
                new.write(_library("safetensors.numpy").save({name: x})[-x.nbytes :] if x.nbytes else b"")


def _plain(file: str) -> str:
    """The name of a file in the directory of the index."""
    if Path(file).name != file:
        raise ValueError(f"{INDEX} must name files in its directory, got {file!r}")
    return file


def _payload(name: str, x: Any) -> np.ndarray:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array to be saved, got {type(x).__name__}")
    return np.ascontiguousarray(x)


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError("safetensors files are read and written by the safetensors library: install it") from None


def _ml_dtypes(name: str) -> None:
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        raise ImportError(f"{name} is bfloat16, which NumPy knows through ml_dtypes only: install it") from None
