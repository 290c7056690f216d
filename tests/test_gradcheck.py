"""What check_vjp says of pairs of every kind: right gradients pass, wrong ones do not, whatever f is made of."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_protocol import PAIRS, TILED_PAIRS, all_pairs

import funcmha
from funcmha import kv_cache, packing
from funcmha.biases import RelativeBias
from funcmha.kv_cache import step, step_vjp
from funcmha.merge import merge, merge_vjp
from funcmha.testing import check_vjp
from funcmha.testing.strategies import MhaProblem


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    x.flags.writeable = False
    return x


# ── no check is an assert ────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_gradient_is_found_under_python_O():  # noqa: N802 — the option's name
    code = (
        "import numpy as np; from funcmha.testing import check_vjp\n"
        "square, wrong = lambda x: (x * x, x), lambda x, dy: (dy * x,)\n"
        "try: check_vjp(square, wrong, (np.ones(3),))\n"
        "except AssertionError as error: print(__debug__, error)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False f_vjp is not the gradient")


@pytest.mark.parametrize("folder", ["testing", "interop"])
def test_no_check_is_an_assert(folder):
    for file in (Path(funcmha.__file__).parent / folder).rglob("*.py"):
        lines = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
        assert not lines, f"{file} lines {lines}"


# ── every pair of funcmha, as it is ──────────────────────────────────────────────────────────────────────────────

STEP = MhaProblem(Cq=16, Ck=16, Cv=16, S=3, T=3, sink=True)
OPTIONS = {name: x for name, x in STEP.static().items() if name == "scale"}


def step_inputs(past, seen):
    params, x, *_ = STEP.inputs("float64")
    keys, values = (normal(*x.shape[:-2], STEP.K, past, n) for n in (STEP.D, STEP.E))
    return params, x, kv_cache.KVCache(keys, values, seen), None


STRUCTURED = {
    "append": (
        kv_cache.append,
        kv_cache.append_vjp,
        (kv_cache.KVCache(normal(3, 5, 7), normal(3, 5, 2), 9), normal(3, 4, 7), normal(3, 4, 2)),
        {"left": 3},
    ),
    "pack": (packing.pack, packing.pack_vjp, (normal(3, 2, 7), normal(3, 0, 7), normal(3, 5, 7)), {}),
    "unpack": (packing.unpack, packing.unpack_vjp, (normal(3, 10, 7),), {"cu_seqlens": np.array([0, 2, 7, 7, 10])}),
    "pad": (packing.pad, packing.pad_vjp, (normal(3, 10, 7),), {"cu_seqlens": np.array([0, 2, 7, 7, 10])}),
    "unpad": (packing.unpad, packing.unpad_vjp, (normal(3, 2, 5, 7),), {"cu_seqlens": np.array([0, 2, 2, 7])}),
    "step": (step, step_vjp, step_inputs(5, 5), OPTIONS),
    "step of no past": (
        step,
        step_vjp,
        (*step_inputs(5, 5)[:2], None, None),
        OPTIONS,
    ),
}


@all_pairs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pair_agrees_by_complex_step(pair, dtype):
    """But the tiled engine, which takes no complex numbers, by differences."""
    found = check_vjp(pair.f, pair.f_vjp, pair.inputs(dtype), pair.static)
    assert found.by == ("differences" if pair in TILED_PAIRS else "complex step")
    assert found.error <= found.allowed


@pytest.mark.parametrize(("f", "f_vjp", "inputs", "static"), STRUCTURED.values(), ids=STRUCTURED)
def test_structures_agree_by_complex_step(f, f_vjp, inputs, static):
    """Tuples of outputs, trees, key/value caches with an integer, None."""
    assert check_vjp(f, f_vjp, inputs, static).by == "complex step"


def test_a_wrong_gradient_in_one_part_of_a_structure():
    f, f_vjp, inputs, static = STRUCTURED["step"]

    def off(change):
        def wrong(cache, dy):
            dparams, dx, dkv, dbias = f_vjp(cache, dy)
            return dparams, dx, change(dkv), dbias

        return wrong

    changes = {
        "is not the gradient": lambda dkv: dkv._replace(values=dkv.values * (1 + 1e-9)),
        r"gradient 2: must have shape \(.*\) as the input has": lambda dkv: dkv._replace(keys=dkv.keys[..., 1:, :]),
        "gradient 2: must be None or 0": lambda dkv: dkv._replace(position=1.0 * np.ones(2)),
        "gradient 2: trees differ at the root: KVCache of 3 parts and tuple of 2 parts": lambda dkv: dkv[:2],
        "gradient 2: trees differ": lambda dkv: None,
    }
    for message, change in changes.items():
        with pytest.raises(AssertionError, match=message):
            check_vjp(f, off(change), inputs, static)


def test_an_output_that_is_a_tuple_is_checked_whole():
    """Both parts: o alone is right, and lse has a gradient of its own."""
    inputs = PAIRS["merge"].inputs("float64")

    def both(*inputs):
        o, cache = merge(*inputs)
        return (o, cache.lse), cache

    check_vjp(both, lambda cache, dy: merge_vjp(cache, dy[0], dlse=dy[1]), inputs)
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(both, lambda cache, dy: merge_vjp(cache, dy[0]), inputs)


# ── numbers, lists, NamedTuples, dataclasses ─────────────────────────────────────────────────────────────────────


def scaled(x, s):
    return x * s, (x, s)


def scaled_vjp(cache, dy):
    return dy * cache[1], (dy * cache[0]).sum()


@pytest.mark.parametrize("s", [2.0, 2, np.float64(2.0), np.array(2.0)], ids=["float", "int", "scalar", "array"])
def test_a_number_has_a_gradient(s):
    check_vjp(scaled, scaled_vjp, (normal(3), s))
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(scaled, lambda cache, dy: (dy * cache[1], 2 * (dy * cache[0]).sum()), (normal(3), s))


def test_a_python_float_wants_a_number():
    with pytest.raises(AssertionError, match="gradient 1: must be a number as the input is, got None"):
        check_vjp(scaled, lambda cache, dy: (dy * cache[1], None), (normal(3), 2.0))
    with pytest.raises(AssertionError, match="gradient 1: must be a number as the input is, got array"):
        check_vjp(scaled, lambda cache, dy: (dy * cache[1], dy), (normal(3), 2.0))


def test_outputs_may_be_numbers():
    check_vjp(lambda x: (float(x.sum()), x), lambda x, dy: (np.full_like(x, dy),), (normal(3),))
    check_vjp(lambda a, b: (a * b, (a, b)), lambda c, dy: (c[1] * dy, c[0] * dy), (3.0, -1.5))


def test_integers_have_no_gradient():
    """None, or 0 of their shape in any dtype, as JAX's float0 is."""
    x, index = normal(5), np.array([3, 1, 1])

    def vjp(cache, dy):
        x, index = cache
        dx = np.zeros_like(x)
        np.add.at(dx, index, dy)
        return dx

    for none in (None, np.zeros(3), np.zeros(3, np.int64), np.zeros(3, [("float0", "V")])):
        check_vjp(lambda x, i: (x[i], (x, i)), lambda cache, dy, none=none: (vjp(cache, dy), none), (x, index))
    with pytest.raises(AssertionError, match="gradient 1: must be None or 0, as the input is not floating"):
        check_vjp(lambda x, i: (x[i], (x, i)), lambda cache, dy: (vjp(cache, dy), np.ones(3)), (x, index))


class Two(NamedTuple):
    a: object
    b: object


@dataclass(frozen=True)
class Data:
    a: object
    n: int


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda a, b: [a, b], list),
        (lambda a, b: (a, (b, None)), lambda x: (x[0], x[1][0])),
        (lambda a, b: {"a": a, "b": {"c": b}}, lambda x: (x["a"], x["b"]["c"])),
        (Two, tuple),
        (lambda a, b: (RelativeBias(a), Data(b, 3)), lambda x: (x[0].values, x[1].a)),
    ],
    ids=["list", "tuples", "dicts", "NamedTuple", "dataclass"],
)
def test_structures_of_every_kind(make, parts):
    """a ⊙ b and a + b in a structure, from a structure."""

    def f(x):
        a, b = parts(x)
        return make(a * b, a + b), (a, b)

    def f_vjp(cache, dy, wrong=1.0):
        a, b = cache
        d_product, d_sum = parts(dy)
        return (without_numbers(make(d_product * b + d_sum, wrong * (d_product * a + d_sum))),)

    def without_numbers(x):
        return (x[0], Data(x[1].a, None)) if isinstance(x, tuple) and isinstance(x[1], Data) else x

    x = make(normal(3, 2), normal(3, 2, seed=1))
    assert check_vjp(f, f_vjp, (x,)).by == "complex step"
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(f, lambda cache, dy: f_vjp(cache, dy, 1 + 1e-9), (x,))


# ── functions that are not holomorphic ───────────────────────────────────────────────────────────────────────────


def elementwise(f, slope):
    return lambda x: (f(x), x), lambda x, dy: ((dy * slope(x)).astype(x.dtype),)


def sort(x):
    return np.sort(x, axis=None), x


def sort_vjp(x, dy):
    dx = np.empty_like(x).ravel()
    dx[np.argsort(x, axis=None)] = dy
    return (dx.reshape(x.shape),)


ROUGH = {
    "abs": elementwise(np.abs, np.sign),
    "conj": elementwise(lambda x: 3 * np.conj(x), lambda x: 3.0),
    "x conj x": elementwise(lambda x: x * np.conj(x), lambda x: 2 * x),
    "vdot": elementwise(lambda x: np.vdot(x, x), lambda x: 2 * x),
    "maximum": elementwise(lambda x: np.maximum(x, 0.0), lambda x: x > 0),
    "where": elementwise(lambda x: np.where(x > 0, x, 0.1 * x), lambda x: np.where(x > 0, 1.0, 0.1)),
    "clip": elementwise(lambda x: np.clip(x, -2.0, 0.5), lambda x: (x > -2) & (x < 0.5)),
    "max": elementwise(np.max, lambda x: x == np.max(x)),
    "sort": (sort, sort_vjp),
    "sign": elementwise(lambda x: np.sign(x) * x**2, lambda x: 2 * np.abs(x)),
    "var": elementwise(np.var, lambda x: 2 * (x - x.mean()) / x.size),
    "std": elementwise(np.std, lambda x: (x - x.mean()) / (x.size * np.std(x))),
    "norm": elementwise(np.linalg.norm, lambda x: x / np.linalg.norm(x)),
    "log abs": elementwise(lambda x: np.log(np.abs(x)), lambda x: 1 / x),
    "cbrt": elementwise(np.cbrt, lambda x: np.cbrt(x) ** -2 / 3),
    "cast": elementwise(lambda x: x.astype(np.float32), lambda x: 1.0),
    "cast and back": elementwise(lambda x: np.sin(x.astype(np.float32)).astype(x.dtype), np.cos),
    "cast of a step": elementwise(lambda x: x.astype(np.float32) ** 2, lambda x: 2 * x.astype(np.float32)),
    "complex64": elementwise(lambda x: x.astype("F" if x.dtype == "D" else "f") ** 2, lambda x: 2 * x),
    "a buffer of reals": elementwise(lambda x: np.multiply(x.real, x.real, out=np.empty(x.shape)), lambda x: 2 * x),
    "real part": (
        lambda x: (np.real(x).sum() * np.real(x), x),
        lambda x, dy: ((dy * x.sum() + (dy * x).sum()).astype(x.dtype),),
    ),
}
INPUTS = {
    "normal": normal(3, 5),
    "one": np.array([1.3]),
    "many": normal(500),
    "large": 1e3 * normal(7),
    "small": 1e-3 * normal(7),
    "tiny": 1e-9 * normal(7),
}
DENSE = {("cast and back", "large"), ("log abs", "many"), ("cbrt", "many"), ("sort", "many")}  # corners, or waves
rough = pytest.mark.parametrize(("f", "f_vjp"), ROUGH.values(), ids=ROUGH)


@pytest.mark.parametrize("of", INPUTS)
@pytest.mark.parametrize("name", ROUGH)
def test_right_gradients_pass_and_wrong_ones_do_not(name, of):
    """The oracle is the derivative by hand; the wrong ones are it times 0, −1 and 1.1."""
    f, f_vjp = ROUGH[name]
    x = INPUTS[of]
    for seed in range(2):
        if x.size == 1 and name in ("var", "std"):
            return
        check_vjp(f, f_vjp, (x,), seed=seed)
        if (name, of) in DENSE or not np.any(f_vjp(x, np.ones_like(f(x)[0]))[0]):
            continue
        for factor in (0.0, -1.0, 1.1):
            with pytest.raises(AssertionError, match="is not the gradient"):
                check_vjp(f, lambda c, dy, k=factor: (f_vjp(c, dy)[0] * x.dtype.type(k),), (x,), seed=seed)


@rough
@pytest.mark.parametrize("x", [np.zeros((2, 3)), np.arange(-3.0, 4.0), np.full(4, 0.5)], ids=["0", "integers", "ties"])
def test_at_a_corner_a_gradient_is_not_wrong(f, f_vjp, x):
    """What the derivative by hand is at a corner is one of many."""
    with np.errstate(all="ignore"):
        if not np.isfinite(f_vjp(x, np.ones_like(f(x)[0]))[0]).all():
            return
    check_vjp(f, f_vjp, (x,))


def test_how_a_gradient_was_checked_is_said():
    assert check_vjp(*ROUGH["abs"], (normal(5),)).by == "differences"
    assert check_vjp(lambda x: (x**3, x), lambda x, dy: (3 * x**2 * dy,), (normal(5),)).by == "complex step"
    with pytest.raises(AssertionError, match="by differences, as f is not holomorphic or takes no complex numbers"):
        check_vjp(ROUGH["abs"][0], lambda x, dy: (dy,), (normal(5),))


def test_differences_of_a_smooth_function_know_ten_digits():
    f, f_vjp = ROUGH["norm"]
    assert check_vjp(f, f_vjp, (normal(3, 5),)).allowed < 1e-10
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(f, lambda x, dy: (f_vjp(x, dy)[0] * (1 + 1e-9),), (normal(3, 5),))


def test_what_is_zero_by_the_complex_step_alone_is_found():
    """|x|² has no complex derivative: 0 by the complex step, and so is the wrong gradient."""
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(ROUGH["vdot"][0], lambda x, dy: (np.zeros_like(x),), (normal(5),))


def test_a_function_of_steps_has_gradient_0():
    check_vjp(lambda x: (np.round(x), x), lambda x, dy: (np.zeros_like(x),), (normal(3, 5),))
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(lambda x: (np.round(x), x), lambda x, dy: (dy,), (normal(3, 5),))


@pytest.mark.parametrize("n", [1, 9, 150])
def test_half_precision_on_the_way_is_not_wrong(n):
    """One number stays where it is for small steps, and moves for large ones: either is the truth."""

    def f(x):
        return np.sin(x.astype(np.float16)).astype(x.dtype), x

    for seed in range(5):
        check_vjp(f, lambda x, dy: (np.cos(x) * dy,), (1.0 + normal(n),), seed=seed)


def test_a_cast_that_underflows_is_linear():
    """In float16, 2 dy is not twice dy below 6e-5."""

    def narrow_vjp(x, dy):
        return ((dy * 1e-4).astype(np.float16).astype(x.dtype) * 1e4,)

    check_vjp(lambda x: (x.astype(np.float16).astype(x.dtype), x), narrow_vjp, (normal(50),))


@pytest.mark.parametrize("term", [np.square, np.ones_like, np.tanh])
def test_what_is_not_linear_in_the_cotangent_is_found(term):
    x = normal(50).astype(np.float32)

    def f_vjp(x, dy):
        return (dy + (np.float32(1e-5) * term(dy) if dy.dtype == np.float32 else 0),)

    with pytest.raises(AssertionError, match="is not linear in its cotangent"):
        check_vjp(lambda x: (x + 0, x), f_vjp, (x,))


def test_overflow_of_a_half_type_is_linear():
    x = np.full(3, 2.0, np.float16)
    big = np.float16(6e4)
    with np.errstate(over="ignore"):
        check_vjp(lambda x: (x * big, x), lambda x, dy: (dy * big,), (x,))


def test_minus_infinity_stays_where_it_is():
    """A bias of −∞ has no direction to move in, nor an lse of −∞ a cotangent."""
    x = np.array([[0.3, -np.inf, 1.0], [-np.inf, -np.inf, -np.inf]])

    def f(x):
        with np.errstate(all="ignore"):
            return np.log(np.exp(x).sum(-1)), np.exp(x)

    def f_vjp(e, dy):
        total = e.sum(-1, keepdims=True)
        return (np.where(total == 0, 0, dy[:, None] * e / np.where(total == 0, 1, total)),)

    check_vjp(f, f_vjp, (x,))
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(f, lambda e, dy: (e * dy[:, None],), (x,))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def identity(x):
    return x, ()


def identity_vjp(cache, dy):
    return (dy,)


def test_what_cannot_be_checked_is_said():
    with pytest.raises(TypeError, match=r"inputs must be a tuple, one per positional input of f, got ndarray"):
        check_vjp(identity, identity_vjp, normal(3))
    with pytest.raises(TypeError, match=r"inputs\[0\] must be real, got complex128"):
        check_vjp(identity, identity_vjp, (normal(3) + 0j,))
    with pytest.raises(TypeError, match="f must give real outputs"):
        check_vjp(lambda x: (x + 0j, ()), identity_vjp, (normal(3),))
    with pytest.raises(AssertionError, match="f must return y and a cache, got ndarray"):
        check_vjp(lambda x: x, identity_vjp, (normal(3),))


def test_a_function_without_a_derivative_is_told():
    """Its digits are noise: no derivative, so no gradient of it is called right or wrong."""

    def noise(x):
        return np.sin(1e18 * x), x

    with pytest.raises(ValueError, match="f_vjp cannot be checked"):
        check_vjp(noise, lambda x, dy: (np.cos(x) * dy,), (normal(50),))


def test_another_library_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"inputs\[0\] must be of NumPy, got torch.Tensor"):
        check_vjp(identity, identity_vjp, (torch.ones(3),))
