"""funcmha.npz.load with mmap: the arrays of the file where they are in the file. Oracle: load without."""

import io
import os

import numpy as np
import pytest
from hypothesis import given
from test_npz import TREES, bits, in_order, normal, peak

from funcmha import init, npz, self_attention, self_attention_vjp, tree

MiB = 2**20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.npz"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One path for all the examples of a property."""
    return tmp_path_factory.mktemp("npz") / "model.npz"


@given(TREES)
def test_mapped_arrays_are_the_loaded_ones(scratch, params):
    npz.save(scratch, params)
    got, want = npz.load(scratch, mmap=True), npz.load(scratch)
    assert list(bits(got).items()) == list(bits(want).items())
    for x in tree.flatten(got).values():
        assert isinstance(x, np.memmap) or not x.size
        assert not x.flags.writeable
        assert x.dtype.isnative


def test_a_mapped_layer_is_the_layer(path):
    """To rounding: its numbers begin anywhere, so that a product of them is another one for BLAS."""
    npz.save(path, init(0, 48, 6, dtype="float64"))
    x, results = normal((2, 11, 48), "float64"), []
    for mmap in (False, True):
        y, cache = self_attention(npz.load(path, mmap=mmap), x)
        dparams, dx, _ = self_attention_vjp(cache, y)
        results.append(tree.flatten({"y": y, "dx": dx} | dparams))
    for key, want in results[0].items():
        np.testing.assert_allclose(results[1][key], want, rtol=1e-11, atol=1e-11)


def test_nothing_can_be_written_to_a_mapped_array(path):
    npz.save(path, {"w": normal(3)})
    with pytest.raises(ValueError, match="read-only"):
        npz.load(path, mmap=True)["w"][0] = 1.0


def test_mapping_costs_no_memory_whatever_max_bytes_is(path):
    npz.save(path, {"w": normal((1031, 1033))})
    assert peak(lambda: npz.load(path, mmap=True, max_bytes=9)) <= MiB / 4


def test_many_mapped_arrays_take_one_open_file(path):
    npz.save(path, {f"w{i}": normal(3) for i in range(64)})
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else pytest.skip("no /proc here")
    params = npz.load(path, mmap=True)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    del params
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_replaced_stays_as_it_was_mapped(path):
    npz.save(path, {"w": normal(3, seed=0)})
    params = npz.load(path, mmap=True)
    npz.save(path, {"w": normal(3, seed=1)})
    np.testing.assert_array_equal(params["w"], normal(3, seed=0))


def test_a_mapped_file_may_be_saved_over_itself(path):
    npz.save(path, {"w": normal(3), "b": normal((2, 5))})
    before = path.read_bytes()
    npz.save(path, npz.load(path, mmap=True))
    assert path.read_bytes() == before


def test_fortran_order_is_mapped_as_it_is(path):
    np.savez(path, w=np.asfortranarray(normal((3, 5, 7))))
    w = npz.load(path, mmap=True)["w"]
    assert w.flags.f_contiguous
    np.testing.assert_array_equal(w, normal((3, 5, 7)))


def test_like_and_check_finite_are_heard(path):
    npz.save(path, {"v": normal(3), "w": np.array([1.0, np.nan])})
    like = {"w": np.ones(2), "v": normal(3)}
    assert in_order(npz.load(path, like=like, mmap=True)) == in_order(like)
    with pytest.raises(npz.ParameterFileError, match=r"w must be finite, got nan at \(1,\)"):
        npz.load(path, mmap=True, check_finite=True)
    with pytest.raises(KeyError, match="misses u"):
        npz.load(path, mmap=True, like={"u": normal(3)})


@pytest.mark.parametrize(("write", "reason"), [
    (lambda path: np.savez_compressed(path, w=normal(3)), "w.npy must be stored to be mapped, and is deflated"),
    (lambda path: np.savez(path, w=normal(3).astype(">f4")), "w.npy must be in native byte order to be mapped"),
    (lambda path: path.write_bytes(b"not an archive, but longer than an end record"), "it starts with 'not an a'"),
])  # fmt: skip
def test_what_cannot_be_mapped_is_refused(path, write, reason):
    write(path)
    with pytest.raises(npz.ParameterFileError, match=f"^{path}: .*{reason}"):
        npz.load(path, mmap=True)


def test_a_file_object_is_not_mapped(path):
    npz.save(file := io.BytesIO(), {"w": normal(3)})
    with pytest.raises(ValueError, match="mmap needs a path, got BytesIO"):
        npz.load(file, mmap=True)
