"""A file that takes another's place at once, when it is complete and on the disk, or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write: it becomes `path` when the block ends, and vanishes if the block raises.

    Where `path` is a symbolic link, the file it points to is replaced. A new file has the mode that the umask leaves, a
    replaced one's mode is kept. Raises IsADirectoryError, FileExistsError for a device or a pipe, and PermissionError
    for a file that may not be written, which a rename alone would not respect.

    While it is written the file has no name (O_TMPFILE, on Linux), so a process that is killed leaves nothing behind.
    No system call puts a nameless file in the place of another: it is linked under a name of its own, then renamed, and
    a kill between these two calls leaves it there, complete, as `.*.tmp`. Where there is no O_TMPFILE it has that name
    from the start.
    """
    target = os.path.realpath(path)
    mode = _mode(target)
    directory = os.path.dirname(target)
    temporary = os.path.join(directory, f".{secrets.token_hex(8)}.tmp")
    try:
        fd, nameless = _create(directory, temporary)
        with open(fd, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(fd, mode)
            os.fsync(fd)
            if nameless:
                # src_dir_fd means nothing to an absolute path, but with it Python calls linkat, which can follow.
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=fd, follow_symlinks=True)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(directory)


def _mode(target: str) -> int | None:
    """The permission bits of the file at `target`; None where there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", target)
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "Is not a regular file", target)
    if not os.access(target, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, "May not be written", target)
    return stat.S_IMODE(mode)


def _create(directory: str, name: str) -> tuple[int, bool]:
    """A new file in `directory`, and whether it is nameless; where that cannot be, it has the name `name`."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with suppress(OSError):  # not every file system has them; if something else is wrong, the next call will say it
            return os.open(directory, os.O_WRONLY | os.O_TMPFILE, 0o666), True
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), False


def _sync(directory: str) -> None:
    """Put the directory itself on the disk: until then the rename may be lost with the power."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
