"""What a parameter file may be: a path, or a binary file object from its position on."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from .archive import Source
from .atomic import replacing

Path = str | os.PathLike[str]
File = Path | BinaryIO


@contextmanager
def written(path: File) -> Iterator[BinaryIO]:
    """A file to write: one that takes the place of `path` when the block ends, or the file object that was given."""
    if isinstance(path, str | os.PathLike):
        with replacing(path) as file:
            yield file
    else:
        yield _binary(path, "write")


@contextmanager
def read(path: File) -> Iterator[tuple[str, Source]]:
    """The name of a file for messages, and its bytes. A file object is left at its end."""
    if isinstance(path, str | os.PathLike):
        with open(path, "rb") as file:
            yield os.fspath(path), _source(file)
    else:
        source = _source(_binary(path, "read"))
        yield str(getattr(path, "name", type(path).__name__)), source
        source.file.seek(source.start + source.length)


def _binary(file: Any, method: str) -> BinaryIO:
    if isinstance(file, io.TextIOBase) or not hasattr(file, method):
        raise TypeError(f"path must be a path or a binary file object that has {method}, got {type(file).__name__}")
    binary: BinaryIO = file
    return binary


def _source(file: BinaryIO) -> Source:
    try:
        start = file.tell()
        file.seek(0, os.SEEK_END)
    except (AttributeError, OSError) as error:
        kind = type(file).__name__
        raise ValueError(f"path must be a file object with seek, got {kind}: read it into an io.BytesIO") from error
    return Source(file, start, max(file.tell() - start, 0))
