"""funcmha.npz with file objects: what a path gives, they give.

Oracles: the same call with a path; `zipfile`, `numpy.load` and `numpy.savez`.
"""

import gzip
import io
import mmap
import os
import socket
import tempfile
import threading
import zipfile
from unittest import mock

import numpy as np
import pytest

from funcmha import init, npz, tree

PARAMS = init(0, 16, 2)


class Write:
    """A file that has nothing but `write`, which returns nothing."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += data


class Few(io.RawIOBase):
    """A raw file that takes, and gives, at most 7 bytes at a time."""

    def __init__(self, data=b""):
        self.data = io.BytesIO(data)

    def writable(self):
        return True

    def write(self, data):
        return self.data.write(data[:7])

    def readinto(self, buffer):
        return self.data.readinto(memoryview(buffer)[:7])

    def seek(self, *where):
        return self.data.seek(*where)

    def tell(self):
        return self.data.tell()


@pytest.fixture
def data(tmp_path):
    """The bytes of a saved file."""
    npz.save(tmp_path / "model.npz", PARAMS)
    return (tmp_path / "model.npz").read_bytes()


def same(got, want=PARAMS):
    return all(tree.flatten(tree.map(np.array_equal, got, want)).values())


def test_a_file_object_gets_the_bytes_of_a_path(data):
    memory, bare, raw = io.BytesIO(), Write(), Few()
    for file in (memory, bare, raw):
        npz.save(file, PARAMS)
    assert data == memory.getvalue() == bare.data == raw.data.getvalue()


def test_the_bytes_are_those_of_zipfile(data):
    """Of large numbers too, of which zipfile has its own idea what is large."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    sizes = {"ZIP64_LIMIT": (100, 400, 700, 900, 2**31 - 1), "ZIP_FILECOUNT_LIMIT": (2, 2**16 - 1)}
    for limit in sizes["ZIP64_LIMIT"]:
        for count in sizes["ZIP_FILECOUNT_LIMIT"]:
            with mock.patch.multiple(zipfile, ZIP64_LIMIT=limit, ZIP_FILECOUNT_LIMIT=count):
                npz.save(got := io.BytesIO(), tree.unflatten(arrays))
                assert got.getvalue() == by_zipfile(arrays), (limit, count)
                got.seek(0)
            assert same(npz.load(got))


def by_zipfile(arrays):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for key, a in arrays.items():
            np.save(member := io.BytesIO(), a)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, len(member.getvalue())
            with archive.open(info, "w") as opened:
                opened.write(member.getvalue())
    return file.getvalue()


def test_numpy_reads_what_a_file_object_got():
    npz.save(file := io.BytesIO(), PARAMS)
    file.seek(0)
    with np.load(file) as archive:
        assert same(tree.unflatten(dict(archive)))


@pytest.mark.parametrize("read", [npz.load, lambda file: npz.entries(file) and npz.load(io.BytesIO(file.getvalue()))])
def test_a_file_object_is_read(data, read):
    assert same(read(io.BytesIO(data)))


def test_what_numpy_saves_to_a_file_object_is_read():
    np.savez(file := io.BytesIO(), **tree.flatten(PARAMS))
    file.seek(0)
    assert same(npz.load(file))


def test_files_of_any_kind_are_read(data, tmp_path):
    with gzip.open(tmp_path / "model.gz", "wb") as packed:
        npz.save(packed, PARAMS)
    (tmp_path / "model.npz").write_bytes(data)
    with (
        gzip.open(tmp_path / "model.gz") as packed,
        open(tmp_path / "model.npz", "rb", buffering=0) as raw,
        tempfile.SpooledTemporaryFile() as spooled,
        open(tmp_path / "model.npz", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        spooled.write(data)
        spooled.seek(0)
        for each in (packed, raw, spooled, mapped, Few(data)):
            assert same(npz.load(each)), each


def test_a_pipe_takes_what_a_file_takes(data):
    """Which cannot be gone back in, to say how long a member was and what its checksum is."""
    ours, other = socket.socketpair()
    received = []
    with ours, other:
        reader = threading.Thread(target=lambda: received.extend(iter(lambda: other.recv(1 << 16), b"")))
        reader.start()
        with ours.makefile("wb") as file:
            npz.save(file, PARAMS)
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    assert b"".join(received) == data


def test_a_file_object_is_read_from_its_position_to_its_end(data):
    """As numpy.load does: somebody else's bytes may stand before. It is left at its end."""
    file = io.BytesIO()
    file.write(b"a header of 27 bytes, theirs")
    npz.save(file, PARAMS)
    assert file.tell() == 28 + len(data)
    file.seek(28)
    assert same(npz.load(file))
    assert file.tell() == 28 + len(data)
    file.seek(0)
    with pytest.raises(npz.ParameterFileError, match="no npz file: it starts with 'a header'"):
        npz.load(file)


@pytest.mark.parametrize("at", [0, 1])
def test_a_file_at_its_end_is_told_where_it_stands(data, at):
    npz.save(file := io.BytesIO(), PARAMS)
    file.seek(at, os.SEEK_END)
    end = len(data) + at
    with pytest.raises(npz.ParameterFileError, match=f"BytesIO: no npz file: it is empty after its position {end}$"):
        npz.load(file)


def test_a_file_object_without_bytes_is_a_bad_file():
    with pytest.raises(npz.ParameterFileError, match=r"^BytesIO: no npz file: it is empty$"):
        npz.load(io.BytesIO(b""))


@pytest.mark.parametrize("read", [npz.load, npz.entries])
def test_a_bad_file_is_told_by_its_name(tmp_path, read):
    (tmp_path / "bad.npz").write_bytes(b"not an archive, but longer than an end record")
    with open(tmp_path / "bad.npz", "rb") as file, pytest.raises(npz.ParameterFileError, match=f"^{file.name}: "):
        read(file)


@pytest.mark.parametrize("file", [io.StringIO(), 3, None, b"model.npz", Write])
def test_what_is_no_binary_file_is_refused(file):
    kind = type(file).__name__
    if file is not Write:
        with pytest.raises(TypeError, match=f"path must be a path or a binary file .* has write, got {kind}"):
            npz.save(file, PARAMS)
    with pytest.raises(TypeError, match=f"path must be a path or a binary file object that has read, got {kind}"):
        npz.load(file)


def test_a_pipe_to_read_from_is_refused(data):
    reading, writing = os.pipe()
    refused = pytest.raises(ValueError, match="path must be a file object with seek, got BufferedReader: read it into")
    with open(reading, "rb") as file, open(writing, "wb"), refused:
        npz.load(file)
    with pytest.raises(ValueError, match="with seek, got Read: read it into"):
        npz.load(type("Read", (), {"read": io.BytesIO(data).read})())


def test_a_file_that_may_not_be_read_is_an_ordinary_error(tmp_path):
    with open(tmp_path / "model.npz", "wb") as file:
        npz.save(file, PARAMS)
        file.seek(0)
        with pytest.raises(OSError, match="read"):
            npz.load(file)


def test_a_file_that_takes_no_more_is_an_error():
    class Full(Write):
        def write(self, data):
            return 0

    with pytest.raises(OSError, match=r"Full takes no more, with \d+ bytes left"):
        npz.save(Full(), PARAMS)


def test_what_cannot_be_loaded_is_written_to_no_file_object():
    with pytest.raises(TypeError, match="b must be float16"):
        npz.save(file := io.BytesIO(), {"w": np.ones(3), "b": np.arange(3)})
    assert not file.getvalue()


def test_saving_to_a_file_object_costs_no_second_copy():
    """Beside the file itself, which a device without memory is."""
    import tracemalloc

    params = {"w": np.ones((1031, 1033)), "v": np.ones((1031, 1033))}
    with open(os.devnull, "wb", buffering=0) as file:
        tracemalloc.start()
        npz.save(file, params)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**18
