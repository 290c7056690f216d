"""The stand-in says of CuPy what is true: its signatures, dtypes, attributes and views are those of the real package.

CuPy is imported without a driver, and makes arrays over the memory of the host, of which it takes views; no kernel is
run. What the suite calls on the stand-in is in its tables, as it refuses all else: so it is there in CuPy.
"""

import inspect
import re
import weakref

import fake_cupy
import fake_nccl
import numpy as np
import pytest

import funcmha
from funcmha import _arguments, _arrays, packing, tree

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: make contract")

TABLES = (fake_cupy.OF_AN_ARRAY, fake_cupy.OF_ARRAYS, fake_cupy.OF_A_SHAPE, fake_cupy.OWN)
SIGNATURES = {name: s for table in TABLES for name, s in fake_cupy.signatures(table).items()}


def over_host_memory(a):
    """A real array, which no kernel may touch."""
    memory = cupy.cuda.UnownedMemory(a.ctypes.data, a.nbytes, a, 0)
    return cupy.ndarray(a.shape, a.dtype, cupy.cuda.MemoryPointer(memory, 0), strides=a.strides)


def test_it_is_the_package_and_as_new_as_the_tables():
    assert cupy is not fake_cupy.MODULE
    assert tuple(map(int, cupy.__version__.split(".")[:2])) >= tuple(map(int, fake_cupy.VERSION.split(".")))


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_has_the_signature_of_the_tables(name):
    """Parameters by name, order, kind and default; what a newer CuPy has beyond them has a default."""
    real = [p.replace(annotation=p.empty) for p in inspect.signature(getattr(cupy, name)).parameters.values()]
    ours = list(SIGNATURES[name].parameters.values())
    assert [p for p in real if p.name in SIGNATURES[name].parameters] == ours
    assert all(p.default is not p.empty for p in real if p.name not in SIGNATURES[name].parameters)


@pytest.mark.parametrize("name", fake_cupy.LOOPS)
def test_a_ufunc_has_the_loops_of_the_tables(name):
    assert getattr(cupy, name).types == fake_cupy.LOOPS[name]


def test_where_has_no_loop_of_bfloat16():
    from cupy._sorting.search import _where_ufunc

    assert _where_ufunc.types == fake_cupy.WHERE


def test_other_names_are_there():
    assert all(getattr(cupy, alias) is getattr(cupy, name) for alias, name in fake_cupy.ALIASES.items())
    assert all(getattr(cupy, name) is getattr(np, name) for name in fake_cupy.DTYPES)
    assert all(hasattr(cupy, name) for name in vars(fake_cupy.MODULE) if not name.startswith("__"))
    assert all(hasattr(cupy.cuda, name) for name in vars(fake_cupy.MODULE.cuda))
    assert all(hasattr(cupy.cuda.runtime, name) for name in vars(fake_cupy.MODULE.cuda.runtime))
    pool = cupy.get_default_memory_pool()
    assert all(hasattr(pool, name) for name in ("used_bytes", "total_bytes", "free_all_blocks"))
    assert all(hasattr(cupy.cuda.Device, name) for name in ("__enter__", "__exit__", "__eq__", "id", "synchronize"))
    assert {"done", "record", "synchronize"} <= {*dir(cupy.cuda.Event)}
    assert cupy.finfo(np.float32).eps == np.finfo(np.float32).eps


def test_arrays_have_the_attributes_of_the_tables():
    dunder = [f"__{name}__" for name in (*fake_cupy.OPERATORS, *fake_cupy.COMPARISONS, *fake_cupy.SIGNS)]
    reflected = [f"__{r}{name}__" for r in "ri" for name in fake_cupy.OPERATORS if (r, name) != ("i", "matmul")]
    special = ["__array__", "__array_ufunc__", "__array_function__", "__bool__", "__complex__", "__float__", "__int__"]
    for name in (*fake_cupy.METHODS, *fake_cupy.PROPERTIES, *dunder, *reflected, *special):
        assert hasattr(cupy.ndarray, name), name
        assert hasattr(fake_cupy.ndarray, name), name
    own = {name for name in vars(fake_cupy.ndarray) if not name.startswith("_")}
    assert own == {*fake_cupy.METHODS, *fake_cupy.PROPERTIES}


@pytest.mark.parametrize("name", ["__array_namespace__", "__contains__", "__index__", "to_device"])
def test_arrays_lack_what_those_of_the_stand_in_lack(name):
    assert not hasattr(cupy.ndarray, name)
    assert not hasattr(fake_cupy.ndarray, name)


# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────

A = np.arange(2.0 * 3 * 5 * 4).reshape(2, 3, 5, 4)
VIEWS = {
    "ellipsis": lambda xp, x: x[..., 1:],
    "steps": lambda xp, x: x[..., 0:4:2, 1:3],
    "backwards": lambda xp, x: x[::-1, ..., ::-2],
    "new axes": lambda xp, x: x[..., None, 1, :, None],
    "a number": lambda xp, x: x[1, 0, 2, 3],
    "NumPy's integers": lambda xp, x: x[np.int64(1), np.int32(0)],
    "nothing": lambda xp, x: x[()],
    "a row": lambda xp, x: list(x)[1],
    "astype": lambda xp, x: xp.astype(x, x.dtype, copy=False),
    "broadcast_to of the same shape": lambda xp, x: xp.broadcast_to(x, x.shape),
    "broadcast_to": lambda xp, x: xp.broadcast_to(x[:, :1], (7, 2, 3, 5, 4)),
    "expand_dims": lambda xp, x: xp.expand_dims(x, -2),
    "flip": lambda xp, x: xp.flip(x, axis=-2),
    "matrix_transpose": lambda xp, x: xp.matrix_transpose(x),
    "mT": lambda xp, x: x.mT,
    "T": lambda xp, x: x.T,
    "moveaxis": lambda xp, x: xp.moveaxis(x, -2, -3),
    "permute_dims": lambda xp, x: xp.permute_dims(x, (2, 0, 3, 1)),
    "transpose": lambda xp, x: x.transpose(2, 0, 3, 1),
    "reshape": lambda xp, x: xp.reshape(x, (6, 5, 4)),
    "reshape, one size free": lambda xp, x: x.reshape(2, -1),
    "reshape of rows": lambda xp, x: xp.reshape(x[:, :, :1], (6, 4)),
    "ravel": lambda xp, x: x.ravel(),
    "squeeze": lambda xp, x: xp.squeeze(x[:, :1], axis=1),
    "swapaxes": lambda xp, x: xp.swapaxes(x, 0, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_that_of_the_stand_in(view):
    """Of the same shape and place, or the very array."""
    real, ours = over_host_memory(A), fake_cupy.MODULE.asarray(A)
    got, want = view(cupy, real), view(fake_cupy.MODULE, ours)
    assert (got is real) == (want is ours)
    assert got.shape == want.shape
    assert got.data.ptr - real.data.ptr == want._a.ctypes.data - ours._a.ctypes.data
    moves = [(g, w) for n, g, w in zip(got.shape, got.strides, want.strides, strict=True) if n > 1]
    assert all(g == w for g, w in moves)


def test_an_array_refuses_as_the_stand_in_does():
    for xp, x in ((cupy, over_host_memory(A)), (fake_cupy.MODULE, fake_cupy.MODULE.asarray(A))):
        for refused, error, message in (
            (lambda x=x: np.asarray(x), TypeError, "Implicit conversion to a NumPy array is not allowed"),
            (lambda x=x: np.array(list(x)), TypeError, "Implicit conversion to a NumPy array is not allowed"),
            (lambda x=x: bool(x), ValueError, "truth value of an array with more than one element is ambiguous"),
            (lambda x=x: hash(x), TypeError, "unhashable type"),
            (lambda x=x: range(x[0, 0, 0, 0]), TypeError, "cannot be interpreted as an integer"),
            (lambda x=x: setattr(x, "note", 1), AttributeError, "note"),
            (lambda x=x: x.flags.writeable, AttributeError, "writeable"),
            (lambda x=x, xp=xp: xp.where(True, x, x), AttributeError, "'bool' object has no attribute 'astype'"),
            (lambda x=x, xp=xp: xp.astype(A, np.float32), TypeError, r"numpy\.ndarray"),
            (lambda x=x, xp=xp: xp.sum(x, where=x), TypeError, "where"),
        ):
            with pytest.raises(error, match=message):
                refused()


# ── what of funcmha runs no kernel ───────────────────────────────────────────────────────────────────────────────


def test_real_arrays_are_known_as_arrays_of_cupy():
    x = over_host_memory(A)
    assert _arrays.namespace(x) is cupy
    assert _arrays.is_array(x)
    assert _arrays.holds_numbers(x)
    assert _arrays.dtype_name(x) == "float64"
    assert weakref.ref(x)() is x  # as the room of a key/value cache is kept
    assert x.device == cupy.cuda.Device(0)


def test_real_arrays_pass_the_argument_checks():
    x = over_host_memory(A)
    _, checked = _arguments.check_attention(x, x, x, None, None, {"mask": funcmha.masks.causal()})
    assert checked.scale == 0.5
    with pytest.raises(ValueError, match=r"k must be \(\.\.\., K, S, D\) with"):
        funcmha.attention(x, x[..., 1:], x)
    with pytest.raises(TypeError, match="engine 'tiled' takes real NumPy arrays, got a CuPy array of float64"):
        funcmha.attention(x, x, x, engine="tiled")


without_nccl = pytest.mark.filterwarnings("ignore:(?s).*nccl library could not be loaded")  # it is another package


@without_nccl
@pytest.mark.parametrize("name", fake_nccl.SIGNATURES)
def test_nccl_has_the_methods_of_the_stand_in(name):
    from cupyx.distributed import NCCLBackend

    assert str(inspect.signature(getattr(NCCLBackend, name))) == fake_nccl.SIGNATURES[name]


@without_nccl
def test_nccl_takes_bytes_and_says_which_rank_it_is():
    """The dtypes of the stand-in are those of the package, which has none where it finds no NCCL."""
    import cupyx.distributed._nccl_comm as real
    from cupyx.distributed._comm import _Backend

    assert {"self._n_devices = n_devices", "self.rank = rank"} <= {
        line.strip() for line in inspect.getsource(_Backend.__init__).splitlines()
    }
    known = inspect.getsource(real).partition("_nccl_dtypes = {")[2].partition("}")[0]
    assert "".join(re.findall(r"'(\w)':", known)) == fake_nccl.DTYPES
    assert "raise TypeError(f'Unknown dtype {array.dtype} for NCCL')" in inspect.getsource(real)


def test_streams_and_views_have_the_methods_of_the_stand_in():
    assert {"record", "wait_event"} <= {*dir(cupy.cuda.Stream)}
    assert callable(cupy.cuda.get_current_stream)
    x = over_host_memory(np.arange(3.0))
    assert x.view(np.uint8).shape == (24,)
    assert x.view(np.uint8).data.ptr == x.data.ptr


def test_real_parameters_are_measured_and_sliced():
    params = tree.map(over_host_memory, funcmha.init(0, 8, 4, num_kv_heads=2))
    assert funcmha.sizes(params) == funcmha.sizes(funcmha.init(0, 8, 4, num_kv_heads=2))
    one = funcmha.head_params(params, 3)
    assert one["k_proj"]["w"].data.ptr == params["k_proj"]["w"][1].data.ptr


def test_real_sequences_are_unpacked():
    x = over_host_memory(A)
    xs, _ = packing.unpack(x, cu_seqlens=packing.cumulative([2, 0, 3]))
    assert [part.shape[-2] for part in xs] == [2, 0, 3]
    assert xs[2].data.ptr == x[..., 2:, :].data.ptr
