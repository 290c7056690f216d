"""funcmha.npz: what is saved comes back, and is what it should be.

Oracles: `numpy.load` and `numpy.savez`. Bad files are in test_npz_refused.py; how a file takes another's place is in
test_atomic.py.
"""

import hashlib
import tracemalloc
import zipfile
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcmha import init, npz, self_attention, tree

MiB = 2**20
FLOATS = ["float16", "float32", "float64"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.npz"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One path for all the examples of a property."""
    return tmp_path_factory.mktemp("npz") / "model.npz"


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def params():
    return {"q_proj": {"w": normal((2, 3, 5)), "b": normal((2, 3), "float64")}, "scale": normal((), "float16")}


def bits(params):
    """Of each leaf: dtype, but for the byte order, shape and bits."""
    return {
        key: (x.dtype.name, x.shape, x.astype(x.dtype.newbyteorder("=")).tobytes())
        for key, x in tree.flatten(params).items()
    }


def peak(f, *args):
    """How many bytes f(*args) held at most on its way."""
    tracemalloc.start()
    try:
        f(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LAYOUTS = {
    "as it is": lambda x: x,
    "Fortran order": np.asfortranarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian Fortran": lambda x: np.asfortranarray(x.astype(x.dtype.newbyteorder(">"))),
    "every second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "reversed": lambda x: x[::-1] if x.ndim else x,
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape) if x.size else x,
}


@st.composite
def arrays(draw):
    """Any bits, NaN of every kind among them, in any layout, read-only."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4)))
    n = dtype.itemsize * int(np.prod(shape))
    x = np.frombuffer(np.random.default_rng(draw(st.integers(0, 99))).bytes(n), dtype).reshape(shape)
    x = draw(st.sampled_from([*LAYOUTS.values()]))(x)
    x.flags.writeable = False
    return x


KEYS = st.sampled_from(["w", "b", "0", "q_proj", "npy", "file", "allow_pickle", "arr_0", "A_", "_" + "x" * 40])
TREES = st.recursive(
    st.dictionaries(KEYS, arrays(), max_size=3),
    lambda trees: st.dictionaries(KEYS, arrays() | trees.filter(bool), max_size=3),
    max_leaves=5,
)


@given(TREES)
def test_what_is_saved_comes_back(scratch, params):
    """In the same order: the keys that are drawn have one number at most."""
    npz.save(scratch, params)
    assert list(bits(npz.load(scratch)).items()) == list(bits(params).items())


@given(TREES)
def test_numpy_reads_what_is_saved(scratch, params):
    npz.save(scratch, params)
    with np.load(scratch, allow_pickle=False) as archive:
        assert bits(tree.unflatten(dict(archive))) == bits(params)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@given(params=TREES)
def test_what_numpy_saves_is_read(scratch, write, params):
    flat = {key: x for key, x in tree.flatten(params).items() if key not in ("file", "allow_pickle")}
    write(scratch, **flat)
    assert bits(npz.load(scratch)) == bits(tree.unflatten(flat))


@given(TREES)
def test_saving_what_was_loaded_gives_the_same_bytes(scratch, params):
    npz.save(scratch, params)
    before = scratch.read_bytes()
    npz.save(scratch, npz.load(scratch))
    assert scratch.read_bytes() == before


@given(TREES)
def test_loaded_arrays_are_ready_for_work(scratch, params):
    np.savez(scratch, **{f"x.{key}": x for key, x in tree.flatten(params).items()})
    for x in tree.flatten(npz.load(scratch)).values():
        assert x.dtype.isnative
        assert x.flags.c_contiguous
        assert x.flags.writeable
        assert x.flags.owndata
        assert x.flags.aligned


def levels(node):
    """The keys of a tree in its order."""
    return {key: levels(child) for key, child in node.items()} if isinstance(node, dict) else None


def in_order(node):
    """As text, which tells the order of dicts, where == does not."""
    return str(levels(node))


def test_a_loop_over_blocks_is_the_same_model(path):
    """Which 0, 1, 10, 11, 2, … is not."""
    params = {"blocks": {str(i): init(i, 16, 2) for i in range(12)}}
    want = h = normal((1, 5, 16))
    for layer in params["blocks"].values():
        want = want + self_attention(layer, want)[0]
    npz.save(path, params)
    for layer in npz.load(path)["blocks"].values():
        h = h + self_attention(layer, h)[0]
    np.testing.assert_array_equal(h, want)


NAMED = {"wte": None, "h": {str(i): {"mlp": None, "attn": None} for i in range(12)}, "ln_f": {"w": None, "b": None}}


@pytest.mark.parametrize("write", [npz.save, lambda path, t: np.savez(path, **tree.flatten(t))], ids=["save", "savez"])
def test_the_order_of_a_tree_comes_back(path, write):
    """Of layers by number, and of names as they are: a forward pass may be a loop over either."""
    write(path, tree.map(lambda _: normal(3), NAMED))
    assert in_order(npz.load(path)) == in_order(NAMED)
    assert in_order(tree.unflatten(npz.entries(path))) == in_order(NAMED)


def test_numbered_levels_of_sorted_files_go_up(path):
    """The first version sorted names, so that 10 came before 2. Numbers with gaps, and with a 0 in front."""
    flat = tree.flatten({"h": {str(i): normal(3) for i in range(12)}, "s": {"09": normal(3), "100": normal(3)}})
    np.savez(path, **dict(sorted(flat.items())))
    assert list(tree.flatten(npz.load(path))) == [*(f"h.{i}" for i in range(12)), "s.09", "s.100"]


def test_a_level_with_a_name_among_its_numbers_stays(path):
    t = {"10": normal(3), "norm": normal(3), "2": {"1": normal(3), "0": normal(3)}}
    npz.save(path, t)
    assert in_order(npz.load(path)) == str({"10": None, "norm": None, "2": {"0": None, "1": None}})


def test_the_order_of_like_is_that_of_what_comes(path):
    t = tree.map(lambda _: normal(3), NAMED)
    npz.save(path, t)
    like = {"ln_f": {"b": t["ln_f"]["b"], "w": t["ln_f"]["w"]}, "h": dict(reversed(t["h"].items())), "wte": t["wte"]}
    assert in_order(npz.load(path, like=like)) == in_order(like)


def test_members_between_those_of_a_branch_leave_it_whole(path):
    np.savez(path, **{"a.x": normal(3), "b": normal(3), "a.w": normal(3)})
    assert in_order(npz.load(path)) == str({"a": {"x": None, "w": None}, "b": None})


@pytest.mark.parametrize("saved", [NAMED, {"10": None, "2": None}, {"b": None, "a": {"1": None, "01": None}}])
def test_what_was_loaded_is_saved_to_the_same_bytes(path, saved):
    npz.save(path, tree.map(lambda _: normal(3), saved))
    before = path.read_bytes()
    npz.save(path, npz.load(path))
    assert path.read_bytes() == before


def test_bytes_are_the_same_everywhere(path):
    x = np.arange(15, dtype="float32").reshape(3, 5)
    npz.save(path, {"q_proj": {"b": x[0].astype(">f8"), "w": x}, "scale": np.float16(0.5)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "0bc03cf8cda9cf76f2b1d7a3a2f063d638e0f4291bf086c305201f1ce83902c0"


def test_zip64_is_written_where_numbers_are_large(path):
    with mock.patch.object(zipfile, "ZIP64_LIMIT", 100), mock.patch.object(zipfile, "ZIP_FILECOUNT_LIMIT", 2):
        npz.save(path, params())
    with np.load(path) as archive:
        assert bits(tree.unflatten(dict(archive))) == bits(params())
    assert bits(npz.load(path)) == bits(params())


def test_arrays_on_a_device_are_brought_to_the_host(path):
    class OnDevice:  # as cupy.ndarray has it
        shape, ndim, dtype = (2, 3, 5), 3, np.dtype("float32")

        def get(self):
            return normal((2, 3, 5))

        def __array__(self, *_, **__):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    npz.save(path, {"w": OnDevice()})
    assert bits(npz.load(path)) == bits({"w": normal((2, 3, 5))})


def test_what_wants_a_gradient_is_saved_without(path):
    w = torch.tensor(normal((3, 5)))
    for leaf in (torch.nn.Parameter(w), 2 * (w / 2).requires_grad_(), torch._neg_view(-w), w.T.contiguous().T):
        npz.save(path, {"w": leaf})
        assert bits(npz.load(path)) == bits({"w": normal((3, 5))})


def test_loading_costs_the_arrays_and_little_more(path):
    npz.save(path, {"w": normal((1031, 1033)), "v": normal((1031, 1033))})
    assert peak(npz.load, path) <= path.stat().st_size + MiB


def test_unpacking_costs_the_arrays_and_little_more(path):
    w = normal((257, 1033))
    np.savez_compressed(path, w=np.concatenate([w, np.zeros_like(w), w, np.zeros((3 * 257, 1033), "float32")]))
    assert (npz.load(path)["w"][2 * 257 : 3 * 257] == w).all()
    assert peak(npz.load, path) <= 6 * w.nbytes + MiB


def test_zeros_are_read_however_small_they_are_packed(path):
    """Moments before the first step: 64 MiB in 65 kB, a thousandth, which is the most that deflate can."""
    momentum = tree.map(np.zeros_like, init(0, 2048, 16))
    np.savez_compressed(path, **tree.flatten(momentum))
    nbytes = sum(a.nbytes for a in tree.flatten(momentum).values())
    assert nbytes > 1000 * path.stat().st_size
    assert peak(npz.load, path) <= nbytes + 2 * MiB
    assert bits(npz.load(path)) == bits(momentum)
    with pytest.raises(npz.ParameterFileError, match="must unpack to at most max_bytes=9 bytes"):
        npz.load(path, max_bytes=9)


def test_entries_cost_no_memory(path):
    npz.save(path, {"w": normal((1031, 1033))})
    assert peak(npz.entries, path) <= MiB / 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_check_finite_names_the_first_bad_number(path, bad, dtype):
    x = normal((3, 5), dtype)
    x[1, 2] = x[2, 0] = bad
    npz.save(path, {"q_proj": {"w": x}})
    assert bits(npz.load(path)) == bits({"q_proj": {"w": x}})
    with pytest.raises(npz.ParameterFileError, match=rf"q_proj.w must be finite, got {bad} at \(1, 2\) and 1 more"):
        npz.load(path, check_finite=True)


def test_names_that_differ_in_case_only_are_warned_of(path):
    with pytest.warns(UserWarning, match="Q.w and q.w differ in case only") as saved:
        npz.save(path, {"q": {"w": normal(3)}, "Q": {"w": normal(5)}})
    with pytest.warns(UserWarning, match="Q.w and q.w differ in case only") as loaded:
        npz.load(path)
    assert {saved[0].filename, loaded[0].filename} == {__file__}


@pytest.mark.parametrize("read", [npz.load, npz.entries])
def test_a_path_without_a_file_is_an_ordinary_error(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


UNSAVABLE = {
    "no tree": (normal((3, 5)), TypeError, "params must be a dict of dicts of arrays, got ndarray"),
    "None": ({"q": {"b": None}}, TypeError, "q.b must be an array, got None"),
    "number": ({"b": 1.0}, TypeError, "b must be an array, got 1.0"),
    "list": ({"b": [1.0]}, TypeError, "b must be an array"),
    "empty dict": ({"q": {}}, ValueError, "empty dict"),
    "int": ({"b": np.arange(3)}, TypeError, "b must be float16, float32 or float64, got int64"),
    "bool": ({"b": np.ones(3, bool)}, TypeError, "got bool"),
    "complex": ({"b": np.ones(3, complex)}, TypeError, "got complex128"),
    "longdouble": ({"b": np.ones(3, np.longdouble)}, TypeError, "got float128|got float96"),
    "object": ({"b": np.array([None])}, TypeError, "got object"),
    "bfloat16": ({"b": np.ones(3, ml_dtypes.bfloat16)}, TypeError, "b is bfloat16, .*: cast it to float32"),
    "no numbers": (
        {"b": torch.ones(3, device="meta")},
        TypeError,
        "b must be .* NumPy can read, got a PyTorch tensor: ",
    ),
    "few numbers": ({"b": torch.ones(3).to_sparse()}, TypeError, "b must be .*, got a PyTorch tensor: .*to_dense"),
    "33 dimensions": ({"b": np.ones((1,) * 33)}, ValueError, "at most 32 dimensions, got 33"),
    "number as key": ({0: normal(3)}, TypeError, "keys of a tree must be strings"),
    "hyphen": ({"q-proj": normal(3)}, ValueError, "'q-proj.npy' must be named in letters"),
    "path": ({"../q": normal(3)}, ValueError, "without dots"),
    "dunder": ({"q": {"__w__": normal(3)}}, ValueError, "nothing __like_this__"),
    "long": ({"q" * 252: normal(3)}, ValueError, "at most 255 bytes"),
}


@pytest.mark.parametrize(("bad", "error", "reason"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_cannot_be_loaded_is_not_saved(path, bad, error, reason):
    with mock.patch("funcmha.npz.files.replacing") as disk, pytest.raises(error, match=reason):
        npz.save(path, bad)
    assert not disk.called


def test_entries_tell_dtype_shape_and_bytes(path):
    npz.save(path, params())
    assert npz.entries(path) == {
        "q_proj.b": (np.dtype("float64"), (2, 3), 48),
        "q_proj.w": (np.dtype("float32"), (2, 3, 5), 120),
        "scale": (np.dtype("float16"), (), 2),
    }


def test_like_takes_arrays_of_any_byte_order_or_entries(path):
    npz.save(path, params())
    swapped = tree.map(lambda x: x.astype(x.dtype.newbyteorder(">")), params())
    for like in params(), swapped, tree.unflatten(npz.entries(path)):
        assert bits(npz.load(path, like=like)) == bits(params())


def test_like_says_in_which_library_and_where(path, xp):
    given = {"q": {"w": normal((2, 3)), "b": normal(3, "float64")}}
    npz.save(path, given)
    like = xp.tree(tree.map(np.zeros_like, given))
    for key, x in tree.flatten(npz.load(path, like=like)).items():
        zeros = tree.flatten(like)[key]
        assert (type(x), x.dtype, getattr(x, "device", None)) == (
            type(zeros),
            zeros.dtype,
            getattr(zeros, "device", None),
        )
        np.testing.assert_array_equal(xp.back(x), tree.flatten(given)[key])


@pytest.mark.parametrize("mmap", [False, True])
def test_like_may_be_of_torch_or_jax_or_tell_of_shapes_alone(path, mmap):
    npz.save(path, {"w": normal((2, 3))})
    for kind, like in (
        (torch.Tensor, torch.zeros(2, 3)),
        (jax.Array, jax.numpy.zeros((2, 3))),
        (np.ndarray, torch.zeros(2, 3, device="meta")),
        (np.ndarray, jax.ShapeDtypeStruct((2, 3), np.float32)),
    ):
        w = npz.load(path, like={"w": like}, mmap=mmap)["w"]
        assert isinstance(w, kind)
        np.testing.assert_array_equal(np.asarray(w), normal((2, 3)))
        with pytest.raises(ValueError, match=r"w must be float32 \(3, 2\) as in like, got float32 \(2, 3\)"):
            npz.load(path, like={"w": like.T if kind is not np.ndarray else np.zeros((3, 2), np.float32)})


def test_like_names_every_leaf_that_is_missing_or_too_many(path):
    npz.save(path, {"q": {"w": normal(3), "bias": normal(3)}})
    with pytest.raises(KeyError) as refusal:
        npz.load(path, like={"q": {"w": normal(3), "b": normal(3)}, "k": normal(3)})
    assert str(refusal.value) == f"{path} must have the leaves of like, but it misses q.b, misses k, has q.bias"


def test_like_names_eight_leaves_and_counts_the_rest(path):
    npz.save(path, {})
    with pytest.raises(npz.ParameterNameError, match="misses w7, and 3 more"):
        npz.load(path, like={f"w{i}": normal(3) for i in range(11)})


@pytest.mark.parametrize(("like", "expected"), [
    (normal((5, 3)), r"float32 \(5, 3\)"),
    (normal((3, 5, 1)), r"float32 \(3, 5, 1\)"),
    (normal((3, 5), "float64"), r"float64 \(3, 5\)"),
])  # fmt: skip
def test_like_tells_of_another_shape_or_dtype(path, like, expected):
    npz.save(path, {"q": {"w": normal((3, 5))}})
    with pytest.raises(ValueError, match=rf"q.w must be {expected} as in like, got float32 \(3, 5\)"):
        npz.load(path, like={"q": {"w": like}})


@pytest.mark.parametrize(("leaf", "got"), [
    (None, "None: leave it out"),
    (1.0, "1.0"),
    ("float32", "'float32'"),
    (np.float32, "<class 'numpy.float32'>"),
])  # fmt: skip
def test_like_says_which_leaf_says_nothing(path, leaf, got):
    """Before the file is opened"""
    with pytest.raises(TypeError, match=rf"q.w of like must be an array, or have its shape and dtype, got {got}"):
        npz.load(path, like={"q": {"w": leaf}})


@pytest.mark.parametrize("dtype", ["O", [("a", "f4")], ml_dtypes.bfloat16, "c8"])
def test_like_may_have_a_dtype_that_no_file_has(path, dtype):
    npz.save(path, {"w": normal(3)})
    with pytest.raises(
        ValueError, match=r"w must be (object|void32|bfloat16|complex64) \(3,\) as in like, got float32"
    ):
        npz.load(path, like={"w": np.zeros(3, dtype)})
