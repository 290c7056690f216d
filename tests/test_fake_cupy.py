"""The stand-in for CuPy: it refuses what CuPy refuses, and counts what a GPU makes dear."""

import copy
import operator
import pickle
import sys

import fake_cupy
import ml_dtypes
import numpy as np
import pytest

from funcmha import tree

A = np.random.default_rng(0).standard_normal((2, 3, 5, 4))


@pytest.fixture
def cupy():
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def x(cupy):
    return cupy.asarray(A)


# ── the stand-in refuses what CuPy refuses ───────────────────────────────────────────────────────────────────────

NUMPYS = r"Unsupported type <class 'numpy\.ndarray'>"
IMPLICIT = "Implicit conversion to a NumPy array is not allowed"


def test_nothing_becomes_a_numpy_array_unasked(x):
    for convert in (np.asarray, np.array, lambda x: np.array(list(x)), lambda x: np.array([x[0], x[1]])):
        with pytest.raises(TypeError, match=IMPLICIT):
            convert(x)


@pytest.mark.parametrize("name", sorted({*fake_cupy.OPERATORS} - {"lshift", "rshift", "and", "or", "xor"}))
@pytest.mark.parametrize("flip", [False, True])
def test_operators_refuse_a_numpy_array(x, name, flip):
    other = A.mT if name == "matmul" else A
    with pytest.raises(TypeError, match=NUMPYS):
        getattr(operator, name)(*((other, x) if flip else (x, other)))


BOTH = {
    "concat": lambda cp, x: cp.concat([x, A]),
    "stack": lambda cp, x: cp.stack([x, A]),
    "where y": lambda cp, x: cp.where(x > 0, x, A),
    "where condition": lambda cp, x: cp.where(A > 0, x, x),
    "maximum": lambda cp, x: cp.maximum(x, A),
    "exp": lambda cp, x: cp.exp(A),
    "sum": lambda cp, x: cp.sum(A),
    "take": lambda cp, x: cp.take(x, np.array([0]), axis=0),
    "matmul": lambda cp, x: cp.matmul(x, A.mT),
    "index": lambda cp, x: x[np.array([0])],
    "assignment": lambda cp, x: operator.setitem(x, ..., A),
    "numpy exp": lambda cp, x: np.exp(x),
    "numpy sum": lambda cp, x: np.sum(x),
    "numpy concatenate": lambda cp, x: np.concatenate([x, x]),
}


@pytest.mark.parametrize("call", BOTH.values(), ids=BOTH)
def test_functions_refuse_arrays_of_two_libraries(cupy, x, call):
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>|is an upload|of a CuPy array"):
        call(cupy, x)


def test_scalars_are_taken_as_numpy_takes_them(cupy, x):
    half = x.astype(cupy.float16)
    for scalar in (2, 2.5, True, np.float32(2.5), np.float64(2.5), np.int64(3)):
        for got, want in ((half * scalar, half.get() * scalar), (scalar * half, scalar * half.get())):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got.get(), want)
    with pytest.raises(TypeError, match="Unsupported type <class 'str'>"):
        half * "2"


def test_a_number_is_an_array_without_axes(cupy, x):
    for y in (cupy.sum(x), x[0, 0, 0, 0], cupy.max(x), x.sum(), cupy.sum(x) + 1):
        assert type(y) is cupy.ndarray
        assert y.shape == ()


@pytest.mark.parametrize("name", ["vecdot", "unstack", "__array_namespace__", "linalg", "asanyarray"])
def test_it_lacks_what_is_not_listed(cupy, x, name):
    with pytest.raises(AttributeError):
        getattr(cupy, name)
    assert not hasattr(x, name)


def test_it_takes_the_arguments_of_cupy_alone(cupy, x):
    for call in (
        lambda: cupy.sum(x, where=x > 0),
        lambda: cupy.max(x, initial=0.0),
        lambda: cupy.asarray(A, device=x.device),
        lambda: cupy.zeros((2,), device=x.device),
        lambda: cupy.exp(x, where=x > 0),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(AttributeError, match="'bool' object has no attribute 'astype'"):
        cupy.where(True, x, x)
    with pytest.raises(AttributeError):
        x.flags.writeable = False
    with pytest.raises(AttributeError):
        x.note = 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        range(cupy.sum(x > 0))
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        cupy.zeros((cupy.sum(x > 0), 2))
    with pytest.raises(ValueError, match="Scalar operands are not allowed"):
        x[0, 0, 0, 0] @ x
    with pytest.raises(AssertionError, match=r"cupy\.where of bfloat16 gives f, NumPy gives bfloat16"):
        cupy.where(x > 0, y := x.astype(ml_dtypes.bfloat16), y)


def test_kernels_warn_of_nothing(cupy, x):
    assert not cupy.isfinite(cupy.log(0 * x)).get().any()
    assert cupy.isnan((0 * x) / 0).get().all()


def test_memory_is_of_the_device(cupy):
    own = A.copy()
    x = cupy.asarray(own)
    view, other = x[0, ..., 1:], x.copy()
    own[...] = 0
    x[...] = 1.5
    assert (view.get() == 1.5).all()
    np.testing.assert_array_equal(other.get(), A)
    assert x.astype(x.dtype, copy=False) is cupy.asarray(x) is x


def test_devices_do_not_meet(cupy, x):
    with cupy.cuda.Device(1):
        y = cupy.asarray(A)
        assert y.device == cupy.cuda.Device(1) == (y + y).device == y[0].device == y.mT.device
        assert cupy.asarray(x).device == cupy.cuda.Device(1)
    assert cupy.cuda.Device().id == 0
    for call in (lambda: x + y, lambda: cupy.concat([x, y]), lambda: y + 1, lambda: cupy.sum(y), lambda: y @ y.mT):
        with pytest.raises(ValueError, match=r"resides \(1\) is different from the current device \(0\)"):
            call()


def test_the_pool_has_what_lives(cupy):
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    x = cupy.zeros((3, 5))
    view = x.mT[1:]
    del x
    assert pool.used_bytes() == before + 120
    del view
    assert pool.used_bytes() == before
    assert pool.total_bytes() >= before + 120
    pool.free_all_blocks()
    assert pool.total_bytes() == before


@pytest.mark.parametrize(("transposed", "copies"), [(False, 0), (True, 1)])
def test_a_product_copies_what_is_not_contiguous(cupy, transposed, copies):
    x, pool = cupy.ones((7, 5, 5)), cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    y = x @ (x.mT if transposed else x)
    assert pool.total_bytes() - before == y.nbytes + copies * x.nbytes
    assert (y.get() == 5).all()


def test_half_types_are_summed_in_float32(cupy):
    ones = cupy.full((1, 4096), 1.0, dtype=cupy.float16)
    assert float(cupy.sum(ones)) == float((ones @ ones.mT)[0, 0]) == 4096
    assert cupy.sum(ones).dtype == (ones @ ones.mT).dtype == np.float16


def test_it_is_installed_for_one_block_alone():
    before = sys.modules.get("cupy")
    with fake_cupy.installed() as module:
        assert sys.modules["cupy"] is module
    assert sys.modules.get("cupy") is before


# ── what is counted ──────────────────────────────────────────────────────────────────────────────────────────────

WAITS = {
    "bool": lambda x: bool(x[0]),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "complex": lambda x: complex(x[0]),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "get": lambda x: x.get(),
    "asnumpy": lambda x: fake_cupy.MODULE.asnumpy(x),
    "indexing by booleans": lambda x: x[x > 0],
    "nonzero": lambda x: fake_cupy.MODULE.where(x > 0),
    "repr": repr,
    "format": lambda x: f"{x}",
    "pickle": pickle.dumps,
    "Device.synchronize": lambda x: x.device.synchronize(),
}


def in_funcmha(f, x):
    """f(x), called by a function of funcmha."""
    scope = {"__name__": "funcmha.planted"}
    exec("def call(f, x):\n    return f(x)", scope)
    return scope["call"](f, x)


@pytest.mark.parametrize("what", WAITS)
def test_what_makes_the_host_wait_is_counted(cupy, what):
    x = cupy.asarray(np.arange(3.0))
    with fake_cupy.traffic() as seen:
        in_funcmha(WAITS[what], x)
    assert seen.waits == [f"{what} in funcmha.planted, line 2"]


def test_a_search_waits_for_each_number(cupy):
    with fake_cupy.traffic() as seen:
        assert in_funcmha(lambda x: 2.0 in x, cupy.asarray(np.arange(3.0)))
    assert len(seen.waits) == 3


def test_what_does_not_wait_is_not_counted(cupy, x):
    with fake_cupy.traffic() as seen:
        in_funcmha(lambda x: (x > 0).any() & (x[0] == 1).all() | cupy.isnan(cupy.sum(x)), x)
        in_funcmha(lambda x: (len(x), x.shape, x.dtype, x.size, list(x), copy.copy(x.shape)), x)
        x.get()  # by a test
        tree.map(cupy.asnumpy, {"x": x})
    assert seen.waits == []
    assert seen.sent == 0


def test_what_is_sent_is_counted(cupy):
    with fake_cupy.traffic() as seen:
        cupy.zeros((7, 5))
        cupy.asarray(cupy.asarray(A))
    assert seen.sent == A.nbytes


def test_what_products_copy_is_noted(cupy):
    """Of more than two axes what is not contiguous, as a transposed array is."""
    x, y = cupy.asarray(np.zeros((2, 3, 5))), cupy.asarray(np.zeros((2, 5, 3)))
    with fake_cupy.traffic() as seen:
        cupy.matmul(x, y)
        cupy.matmul(y.mT, y)
        cupy.matmul(x, x[:, :2].mT)
        cupy.matmul(x[0], x[0].mT)
    assert seen.copied == [(2, 3, 5), (2, 5, 2)]
