"""A file that takes another's place at once, when it is complete and on the disk, or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # what a file system has not
NO_LINK = {errno.EPERM, errno.EACCES, errno.EXDEV, errno.ENOENT, errno.EMLINK}
CHUNK = 1 << 20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write: it becomes `path` when the block ends, and vanishes if the block raises.

    Where `path` is a symbolic link, the file it points to is replaced. A new file has the mode that the umask leaves, a
    replaced one's mode is kept. Raises IsADirectoryError, FileExistsError for a device or a pipe, and PermissionError
    for a file that may not be written, which a rename alone would not respect.

    While it is written the file has no name (O_TMPFILE, on Linux), so a process that is killed leaves nothing behind.
    No system call puts a nameless file in the place of another: it is linked under a name of its own, then renamed, and
    a kill between these two calls leaves it there, complete, as `.*.tmp`. Where there is no O_TMPFILE it has that name
    from the start. Where there are no links (as on some network file systems) it is copied to it at the end.

    The file is on the disk (fsync) before it takes its place, and the directory after, as far as the file system can:
    CIFS and some FUSE mounts cannot sync a directory, one of mode 0300 cannot be opened for it, and some cannot sync a
    file. That is no error. What is not sure then is what a loss of power leaves: of the directory, the old file or the
    new one, either whole; of the file, perhaps neither. A process that ends, however it does, leaves one of them. An
    OSError is raised with the new file in its place in one case: EIO, a disk that fails as the directory is written.
    """
    target = os.path.realpath(path)
    mode = _mode(target)
    directory = os.path.dirname(target)
    temporary = os.path.join(directory, f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            fd, nameless = _create(directory, temporary)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "No such directory", directory) from None
        with open(fd, "wb") as file:
            yield file
            file.flush()
            _settle(fd, mode)
            if nameless:
                _name(fd, temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):  # that it is not there, or what went wrong already
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
            return os.open(directory, os.O_RDWR | os.O_TMPFILE, 0o666), True
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), False


def _settle(fd: int, mode: int | None) -> None:
    """The file's mode, and its bytes on the disk, where the file system can."""
    if mode is not None:
        try:
            os.fchmod(fd, mode)
        except OSError:  # FAT and CIFS have modes of their own
            if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
                raise
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _name(fd: int, name: str, mode: int | None) -> None:
    """The nameless file by a name; or a copy of it, where the file system has no links."""
    try:
        # src_dir_fd means nothing to an absolute path, but with it Python calls linkat, which can follow.
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
    except OSError as error:
        if error.errno not in UNSUPPORTED | NO_LINK:
            raise
        with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as copy:
            for at in range(0, os.fstat(fd).st_size, CHUNK):
                copy.write(os.pread(fd, CHUNK, at))
            copy.flush()
            _settle(copy.fileno(), mode)


def _sync(directory: str) -> None:
    """Put the directory itself on the disk, if it can be: until then the rename may be lost with the power."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno == errno.EIO:
            raise
    finally:
        os.close(fd)
