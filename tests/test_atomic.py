"""funcmha.npz.atomic and save: whatever happens on the way, the old file or the new one is there, whole."""

import errno
import io
import itertools
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from funcmha import npz
from funcmha.npz import atomic

STEPS = ["open", "fchmod", "fsync", "link", "replace"]  # of os, besides the writes


def params(seed, n=31):
    return {"w": np.random.default_rng(seed).standard_normal((n, 37)), "b": np.full(n, seed, "float32")}


@pytest.fixture
def path(tmp_path):
    """Where a model is, in a directory of its own."""
    path = tmp_path / "model.npz"
    npz.save(path, params(seed=0))
    return path


@pytest.fixture(params=["nameless", "named"])
def temporary(request, path, monkeypatch):
    """The two ways of `atomic` to write a file that is not there yet."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not nameless(path.parent):
        pytest.skip("no O_TMPFILE on this file system")


def nameless(directory):
    fd, nameless = atomic._create(directory, directory / "probe")
    os.close(fd)
    if not nameless:
        (directory / "probe").unlink()
    return nameless


class Faults:
    """Raises `error` before or after the n-th step towards the disk: a write, or a call of os."""

    def __init__(self, n, error, after):
        self.n, self.error, self.after = n, error, after
        self.steps, self.done = [], []  # as called, and as carried out

    def __call__(self, name, f, *args, **kwargs):
        self.steps.append(name)
        now = len(self.steps) == self.n
        if now and not self.after:
            raise self.error
        result = f(*args, **kwargs)
        self.done.append(name)
        if now:
            raise self.error
        return result

    @contextmanager
    def planted(self):
        faults = self

        class File(io.BufferedWriter):
            def write(self, data):
                return faults("write", super().write, data)

        def step(name, f):
            return lambda *args, **kwargs: self(name, f, *args, **kwargs)

        steps = {name: step(name, getattr(os, name)) for name in STEPS}
        opened = mock.patch.object(atomic, "open", lambda fd, mode: File(io.FileIO(fd, mode)), create=True)
        with mock.patch.multiple(os, **steps), opened:
            yield


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"]
)
@pytest.mark.usefixtures("temporary")
def test_a_fault_at_any_step_leaves_the_old_file_or_the_new_one(path, tmp_path_factory, error, after):
    old = path.read_bytes()
    npz.save(other := tmp_path_factory.mktemp("new") / "new.npz", params(seed=1))
    new = other.read_bytes()
    for n in itertools.count(1):
        path.write_bytes(old)
        faults = Faults(n, error, after)
        with faults.planted(), suppress(type(error)):
            npz.save(path, params(seed=1))
        assert path.read_bytes() == (new if "replace" in faults.done else old), faults.steps
        assert os.listdir(path.parent) == [path.name], faults.steps
        if n > len(faults.steps):
            break
    assert {*STEPS, "write"} - {"link"} <= {*faults.done}
    assert faults.done.count("write") > 6  # three or more for each of two arrays


def test_a_full_disk_leaves_the_old_file(path):
    """A real one: the kernel refuses the write, at a limit to the size of files."""
    import resource

    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for n in range(0, len(old), 257):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                npz.save(path, params(seed=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == old
        assert os.listdir(path.parent) == [path.name]


def test_file_and_then_directory_are_synced_around_the_rename(path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd)))
    monkeypatch.setattr(os, "replace", lambda *args: [replace(*args), events.append("replace")])
    with atomic.replacing(path) as file:
        file.write(b"whole")
    file, what, directory = events
    assert (file.st_ino, file.st_size) == (path.stat().st_ino, path.stat().st_size)
    assert what == "replace"
    assert directory.st_ino == path.parent.stat().st_ino


@pytest.mark.usefixtures("temporary")
@contextmanager
def failing(name, error, directory):
    """os.<name> fails with this error, for directories or for all else."""
    real = getattr(os, name)

    def f(what, *args, **kwargs):
        here = stat.S_ISDIR(os.fstat(what).st_mode) if isinstance(what, int) else os.path.isdir(what)
        if here == directory and not (args and args[0] & getattr(os, "O_TMPFILE", 0) and name == "open"):
            raise OSError(error, os.strerror(error))
        return real(what, *args, **kwargs)

    with mock.patch.object(os, name, f):
        yield


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EACCES, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_directory_that_cannot_be_synced_is_no_error(path, name, error):
    """As CIFS, VirtualBox and some FUSE mounts answer. The file is new, whole, and alone."""
    with failing(name, error, directory=True):
        npz.save(path, params(seed=1))
    assert npz.load(path)["b"][0] == 1
    assert os.listdir(path.parent) == [path.name]


def test_no_descriptor_left_for_the_directory_is_no_error(path):
    with failing("open", errno.EMFILE, directory=True):
        npz.save(path, params(seed=1))
    assert npz.load(path)["b"][0] == 1


def test_a_disk_that_fails_under_the_directory_is_an_error(path):
    with failing("fsync", errno.EIO, directory=True), pytest.raises(OSError, match="Input/output error"):
        npz.save(path, params(seed=1))
    assert npz.load(path)["b"][0] == 1


@pytest.mark.usefixtures("temporary")
def test_a_file_system_that_syncs_nothing_is_no_error(path):
    with failing("fsync", errno.EINVAL, directory=False), failing("fsync", errno.EINVAL, directory=True):
        npz.save(path, params(seed=1))
    assert npz.load(path)["b"][0] == 1


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_does_not_reach_the_disk_is_an_error(path, error):
    old = path.read_bytes()
    with failing("fsync", error, directory=False), pytest.raises(OSError, match=os.strerror(error)):
        npz.save(path, params(seed=1))
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOENT])
def test_a_file_system_without_links_gets_a_copy(path, error):
    if not nameless(path.parent):
        pytest.skip("no O_TMPFILE on this file system")
    path.chmod(0o640)
    with mock.patch.object(os, "link", side_effect=OSError(error, os.strerror(error))):
        npz.save(path, params(seed=1, n=9001))
        assert (npz.load(path)["w"] == params(seed=1, n=9001)["w"]).all()
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert os.listdir(path.parent) == [path.name]
        full = mock.patch.object(os, "pread", side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with full, pytest.raises(OSError, match="No space left"):
            npz.save(path, params(seed=2))
    assert npz.load(path)["b"][0] == 1
    assert os.listdir(path.parent) == [path.name]


def test_right_modes_that_cannot_be_set_are_no_error(path):
    refused = mock.patch.object(os, "fchmod", side_effect=PermissionError(errno.EPERM, "Operation not permitted"))
    before = os.umask(0o022)
    try:
        path.chmod(0o644)
        with refused:
            npz.save(path, params(seed=1))
        path.chmod(0o600)
        with refused, pytest.raises(PermissionError):
            npz.save(path, params(seed=2))
    finally:
        os.umask(before)
    assert npz.load(path)["b"][0] == 1


@pytest.mark.usefixtures("temporary")
def test_a_directory_that_may_not_be_read_is_no_error(writable):
    npz.save(writable, params(seed=1))
    assert npz.load(writable)["b"][0] == 1


def test_the_file_is_beside_the_one_it_replaces(path):
    """Elsewhere could be another disk, from which nothing can be renamed at once."""
    with mock.patch.object(os, "replace", wraps=os.replace) as replace:
        npz.save(path, params(seed=1))
    assert os.path.dirname(replace.call_args.args[0]) == str(path.parent)


def test_a_file_has_no_name_until_it_is_complete(path):
    if not nameless(path.parent):
        pytest.skip("no O_TMPFILE on this file system")
    with atomic.replacing(path) as file:
        file.write(b"half")
        assert os.listdir(path.parent) == [path.name]


@pytest.mark.usefixtures("temporary")
def test_of_two_writers_at_once_the_one_that_ends_last_stays(path):
    with atomic.replacing(path) as last:
        last.write(b"last")
        with atomic.replacing(path) as first:
            first.write(b"first")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"last"


def test_readers_see_whole_files_while_two_write(path):
    want = {seed: params(seed, n=997) for seed in (1, 2)}

    def write(seed):
        for _ in range(20):
            npz.save(path, want[seed])

    writers = [threading.Thread(target=write, args=(seed,)) for seed in want]
    npz.save(path, want[1])
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        got = npz.load(path)
        assert (got["w"] == want[int(got["b"][0])]["w"]).all()
    assert os.listdir(path.parent) == [path.name]


CHILD = """
    import itertools, sys
    import numpy as np
    from funcmha import npz
    print("ready", flush=True)
    for seed in itertools.count():
        npz.save(sys.argv[1], {"w": np.full((499, 503), seed % 7, "float64"), "b": np.full(7, seed % 7, "float32")})
"""


def test_a_kill_leaves_a_whole_file(path):
    for delay in np.linspace(0.0, 0.02, 6):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        ) as child:
            child.stdout.readline()
            threading.Event().wait(delay)
            child.kill()
        assert child.returncode == -signal.SIGKILL
        got = npz.load(path)
        assert "w" in got
        assert got["w"].shape == (31, 37) or (got["w"] == got["b"][0]).all()


def test_a_symbolic_link_stays_and_its_target_is_replaced(path, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "latest.npz"
    link.symlink_to(path)
    npz.save(link, params(seed=1))
    assert link.is_symlink()
    assert npz.load(path)["b"][0] == 1
    assert os.listdir(link.parent) == [link.name]


def test_a_dangling_link_gets_its_target(tmp_path):
    (tmp_path / "latest.npz").symlink_to("model.npz")
    npz.save(tmp_path / "latest.npz", params(seed=1))
    assert npz.load(tmp_path / "model.npz")["b"][0] == 1


def test_a_path_in_the_working_directory_needs_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz.save("model.npz", params(seed=1))
    assert os.listdir() == ["model.npz"]


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_the_umask(path, umask):
    path.unlink()
    before = os.umask(umask)
    try:
        npz.save(path, params(seed=1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(path, mode):
    path.chmod(mode)
    npz.save(path, params(seed=1))
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.fixture
def readable():
    """A directory that we may read but not write, with a model in it that we may read but not write."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.npz"
        npz.save(model, params(seed=0))
        model.chmod(0o444)
        Path(directory).chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            yield model
        finally:
            if root:
                os.seteuid(0)
            Path(directory).chmod(0o755)


@pytest.fixture
def writable(readable):
    """The same model, which we may write now, in a directory that we may write but not read."""
    root = os.geteuid() != os.getuid()
    if root:
        os.seteuid(0)
        os.chown(readable.parent, 65534, -1)
        os.chown(readable, 65534, -1)
    readable.chmod(0o644)
    readable.parent.chmod(0o300)
    if root:
        os.seteuid(65534)
    return readable


def test_a_read_only_directory_is_an_ordinary_error(readable):
    with pytest.raises(PermissionError, match=str(readable.parent)):
        npz.save(readable.parent / "new.npz", params(seed=1))


def test_a_read_only_file_is_not_replaced(readable):
    with pytest.raises(PermissionError, match=f"May not be written: '{readable}'"):
        npz.save(readable, params(seed=1))


@pytest.mark.parametrize(("make", "error"), [(Path.mkdir, IsADirectoryError), (os.mkfifo, FileExistsError)])
def test_what_is_no_file_is_not_replaced(tmp_path, make, error):
    make(tmp_path / "model")
    with pytest.raises(error, match=str(tmp_path / "model")):
        npz.save(tmp_path / "model", params(seed=1))
    assert os.listdir(tmp_path) == ["model"]


def test_a_missing_directory_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        npz.save(tmp_path / "none" / "model.npz", params(seed=1))


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such directory: .*nowhere'"):
        npz.save(tmp_path / "nowhere" / "a.npz", {"w": np.zeros(2)})
