"""What a parameter file may be: a path, or a binary file object from its position on."""

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, BinaryIO

from .archive import Source
from .atomic import replacing

File = str | os.PathLike[str] | BinaryIO


def written(path: File) -> AbstractContextManager[BinaryIO]:
    """A file to write: one that takes the place of `path` when the block ends, or the file object that was given."""
    return replacing(path) if isinstance(path, str | os.PathLike) else nullcontext(_binary(path, "write"))


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
    return file  # type: ignore[no-any-return]


def _source(file: BinaryIO) -> Source:
    try:
        start = file.tell()
        file.seek(0, os.SEEK_END)
    except (AttributeError, OSError) as error:
        got = f"{type(file).__name__}: read it into an io.BytesIO"
        raise ValueError(f"path must be a file object with seek, got {got}") from error
    return Source(file, start, max(file.tell() - start, 0))
