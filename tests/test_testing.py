"""The testing kit: each check has a bad implementation that it alone catches, and problems are what they promise."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from funcmha import attention, attention_vjp, masks, params, tree
from funcmha.testing import check_vjp, strategies
from funcmha.testing.strategies import (
    BIASES,
    FAMILIES,
    GAINS,
    LAYOUTS,
    MASKS,
    AttentionProblem,
    MhaProblem,
    attention_problems,
    mha_problems,
)

# ── check_vjp ────────────────────────────────────────────────────────────────────────────────────────────────────


def affine(x, p, unused, /):
    """y = x wᵀ + b      x (N, I)   w (O, I)   b (O,)   unused None   →   y (N, O)"""
    return x @ p["w"].T + p["b"], (x.copy(), p["w"].copy())


def affine_vjp(cache, dy, /):
    x, w = cache
    return dy @ w, {"w": dy.T @ x, "b": dy.sum(0)}, None


def inputs(dtype="float64"):
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 3), (3, 3), (3,)))
    return x, {"w": w, "b": b}, None


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_a_good_pair_passes(dtype):
    problem = AttentionProblem(mask="intersection", bias="H T S", rate=0.3)
    check_vjp(attention, attention_vjp, problem.inputs(dtype), problem.static())


@given(st.integers(0, 2**32 - 1))
def test_a_good_pair_passes_with_every_seed(seed):
    check_vjp(affine, affine_vjp, inputs(), seed=seed)


def test_nothing_to_differentiate_passes():
    check_vjp(lambda x: (x, x), lambda cache, dy: (dy,), (np.zeros((0, 3)),))
    check_vjp(lambda x, y: (x, x), lambda cache, dy: (dy, None), (np.ones(3), None))


def dx(change):
    """`affine_vjp` with another gradient of x."""

    def vjp(cache, dy):
        good, *rest = affine_vjp(cache, dy)
        return change(good, dy, *cache), *rest

    return vjp


def dp(change):
    """`affine_vjp` with another gradient of w and b."""

    def vjp(cache, dy):
        good_dx, good, none = affine_vjp(cache, dy)
        return good_dx, change(good, dy, *cache), none

    return vjp


def then(spoil):
    """`affine_vjp` that spoils something when its work is done."""

    def vjp(cache, dy):
        grads = affine_vjp(cache, dy)
        spoil(dy, *cache)
        return grads

    return vjp


def counted(f, change):
    """`f`, whose second call comes out otherwise, and no other."""
    calls = iter([False, True])
    return lambda *args: change(f(*args)) if next(calls, False) else f(*args)


def next_bits(grads):
    return (np.nextafter(grads[0], np.inf), *grads[1:])


def add(a, b):
    a += b


def bad():
    """{fault: (f, f_vjp, inputs, what check_vjp says)}, made anew each time, as some of them count or spoil."""
    kept = inputs()[0]  # what an implementation that keeps its inputs somewhere else might write to
    return {
        "two gradients for three inputs": (
            affine,
            lambda cache, dy: affine_vjp(cache, dy)[:2],
            inputs(),
            "f_vjp must return 3 gradients, one per input, got 2",
        ),
        "a list": (affine, lambda cache, dy: list(affine_vjp(cache, dy)), inputs(), "must return a tuple, got list"),
        "a gradient alone": (lambda x: (x, x), lambda cache, dy: dy, (kept,), "f_vjp must return a tuple, got ndarray"),
        "shape": (
            affine,
            dx(lambda g, *_: g[None]),
            inputs(),
            r"gradient 0: must have shape \(5, 3\) as the input has, got \(1, 5, 3\)",
        ),
        "a broadcast that is not summed": (
            affine,
            dp(lambda g, dy, *_: g | {"b": dy}),
            inputs(),
            r"gradient 1: must have shape \(3,\) as the input has, got \(5, 3\)",
        ),
        "dtype": (
            affine,
            dx(lambda g, *_: g.astype("float64")),
            inputs("float32"),
            "gradient 0: must have dtype float32 as the input has, got float64",
        ),
        "a gradient for None": (
            affine,
            lambda cache, dy: (*affine_vjp(cache, dy)[:2], np.zeros(3)),
            inputs(),
            "gradient 2: must be None, as the input is",
        ),
        "None for an array": (affine, dx(lambda *_: None), inputs(), "gradient 0: is None, and the input is not"),
        "a missing key": (affine, dp(lambda g, *_: {"w": g["w"]}), inputs(), "gradient 1: .*trees differ at the root"),
        "a key too many": (
            affine,
            dp(lambda g, *_: g | {"c": g["b"]}),
            inputs(),
            "gradient 1: .*trees differ at the root",
        ),
        "f writes to an input": (
            lambda x, p, none: (x.__setitem__(0, 0.0), affine(x, p, none))[1],
            affine_vjp,
            inputs(),
            "f writes to its inputs",
        ),
        "f_vjp writes to an input": (
            affine,
            then(lambda *_: add(kept, 1.0)),
            (kept, *inputs()[1:]),
            "f_vjp writes to the inputs of f",
        ),
        "f_vjp writes to its cotangent": (
            affine,
            then(lambda dy, x, w: add(dy, 1.0)),
            inputs(),
            "f_vjp writes to its cotangent",
        ),
        "f_vjp writes to the cache": (
            affine,
            then(lambda dy, x, w: add(x, 1.0)),
            inputs(),
            "f_vjp writes to the cache",
        ),
        "f is not a function": (
            counted(affine, lambda result: (next_bits(result)[0], result[1])),
            affine_vjp,
            inputs(),
            "f gives other bits when called again",
        ),
        "f_vjp is not a function": (
            affine,
            counted(affine_vjp, next_bits),
            inputs(),
            "f_vjp gives other bits when called again",
        ),
        "not linear, in float32 only": (
            affine,
            dx(lambda g, dy, *_: g + 1e-6 * dy**2 if dy.dtype == "float32" else g),
            inputs("float32"),
            "f_vjp is not linear in its cotangent",
        ),
        "off by 1e-9": (affine, dx(lambda g, *_: g * (1 + 1e-9)), inputs(), "f_vjp is not the gradient: .* differ by"),
        "a product transposed": (
            affine,
            dx(lambda g, dy, x, w: dy @ w.T),
            inputs(),
            "f_vjp is not the gradient",
        ),
        "a gradient transposed": (affine, dp(lambda g, *_: g | {"w": g["w"].T}), inputs(), "f_vjp is not the gradient"),
        "a term left out": (affine, dp(lambda g, *_: g | {"b": 0 * g["b"]}), inputs(), "f_vjp is not the gradient"),
        "a mean for a sum": (affine, dp(lambda g, *_: g | {"b": g["b"] / 5}), inputs(), "f_vjp is not the gradient"),
        "NaN, in float64 only": (
            affine,
            dx(lambda g, dy, *_: g * np.nan if dy.dtype == "float64" else g),
            inputs("float32"),
            "f_vjp is not the gradient",
        ),
    }


@pytest.mark.parametrize("fault", bad())
def test_a_bad_pair_is_told_what_is_wrong(fault):
    f, f_vjp, args, message = bad()[fault]
    with pytest.raises(AssertionError, match=message):
        check_vjp(f, f_vjp, args)


def test_gradients_are_checked_in_float64():
    off = dx(lambda g, *_: g * g.dtype.type(1 + 1e-9))  # which is 1 in float32
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_vjp(affine, off, inputs("float32"))


def test_the_tolerance_is_of_the_sum_of_magnitudes():
    off = dx(lambda g, *_: g * (1 + 1e-9))
    check_vjp(affine, off, inputs(), tolerance=1e-8)
    with pytest.raises(AssertionError, match=r"of the sum of magnitudes .*, and 1e-11 is allowed"):
        check_vjp(affine, off, inputs(), tolerance=1e-11)


# ── strategies ───────────────────────────────────────────────────────────────────────────────────────────────────

PROBLEMS = st.one_of(attention_problems(), mha_problems())


def arrays(problem, dtype="float32"):
    """Every array of a problem by name."""
    found = {}
    for i, x in enumerate((*problem.inputs(dtype), *problem.cotangents(dtype))):
        found |= {f"{i}.{path}": a for path, a in tree.flatten(x if isinstance(x, dict) else {"a": x}).items()}
    found |= problem.static()
    return {name: a for name, a in found.items() if isinstance(a, np.ndarray)}


@given(PROBLEMS)
def test_the_repr_of_a_problem_is_the_problem(problem):
    assert eval(repr(problem), vars(strategies)) == problem


@given(PROBLEMS)
def test_every_array_is_read_only(problem):
    assert not any(a.flags.writeable for a in arrays(problem).values())


@given(PROBLEMS)
def test_one_problem_has_the_same_bits_every_time(problem):
    one, other = arrays(problem), arrays(eval(repr(problem), vars(strategies)))
    assert [(name, a.tobytes()) for name, a in one.items()] == [(name, a.tobytes()) for name, a in other.items()]


def test_an_array_does_not_depend_on_which_others_there_are():
    few, many = AttentionProblem(), AttentionProblem(mask="heads", bias="H T S", rate=0.3)
    for a, b in zip(few.inputs("float64")[:3], many.inputs("float64")[:3], strict=True):
        assert np.array_equal(a, b)
    drawn = [a.ravel()[:10].tobytes() for a in arrays(MhaProblem(bias="H T S")).values()]
    assert len(set(drawn)) == len(drawn)
    for a, b in zip(few.inputs("float64")[:3], AttentionProblem(seed=1).inputs("float64")[:3], strict=True):
        assert not np.array_equal(a, b)


@given(PROBLEMS)
def test_shapes_are_those_of_the_fields(problem):
    inputs, sink = problem.inputs("float32"), None
    if not isinstance(problem, MhaProblem):
        *inputs, sink = inputs
    *inputs, bias = inputs
    assert sink is None
    B, H, T, S, keys = problem.batch, problem.H, problem.T, problem.S, problem.keys
    y, dweights, dlse = problem.cotangents("float32")
    if isinstance(problem, MhaProblem):
        p, query, key, value = inputs
        sizes = {axis: getattr(problem, axis) for axis in params.Sizes._fields}
        assert params.sizes(p)._asdict() == sizes
        assert (query.shape, key.shape, value.shape) == ((*B, T, problem.Cq), (*B, S, problem.Ck), (*B, S, problem.Cv))
        assert y.shape == (*B, T, problem.O)
        assert keys == S + ("bias_kv" in p) + problem.static()["zero_attn"]
    else:
        q, k, v = inputs
        assert (q.shape, k.shape) == ((*B, H, T, problem.D), (*B, problem.K, S, problem.D))
        assert (v.shape, y.shape) == ((*B, problem.K, S, problem.E), (*B, H, T, problem.E))
    assert (dweights.shape, dlse.shape) == ((*B, H, T, keys), (*B, H, T))
    assert (bias is None) == (problem.bias == "none")
    dropped = problem.static()["dropout"]
    keep = None if dropped is None else dropped.dense((*B, H, T, keys))
    for a, last in ((bias, S), (masks.dense(problem.static()["mask"], T, S, y), S), (keep, keys)):
        assert a is None or np.broadcast_shapes(a.shape, (*B, H, T, last)) == (*B, H, T, last)


STRIDES = {  # of a C-contiguous array, and of the layout
    "contiguous": lambda a, b, c: (a, b, c),
    "fortran": lambda a, b, c: (4, 8, 24),
    "reversed": lambda a, b, c: (-a, -b, -c),
    "strided": lambda a, b, c: (2 * a, 2 * b, 2 * c),
    "repeated": lambda a, b, c: (0, b, c),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_strides_that_it_promises(layout):
    problem = MhaProblem(batch=(2,), T=3, Cq=5, layout=layout)
    _, query, *_ = problem.inputs("float32")
    assert query.strides == STRIDES[layout](60, 20, 4)
    _, plain, *_ = MhaProblem(batch=(2,), T=3, Cq=5).inputs("float32")
    assert np.array_equal(query, np.broadcast_to(plain[:1], plain.shape) if layout == "repeated" else plain)


@pytest.mark.parametrize(
    ("family", "holds"),
    [
        ("ties", lambda q, k, v: all((a == np.round(a)).all() for a in (q, k, v))),
        ("equal keys", lambda q, k, v: (k == k[..., :1, :]).all() and not (v == v[..., :1, :]).all()),
        ("one hot", lambda q, k, v: (q.sum(-1) == 1).all() and (k.sum(-1) == 1).all() and (k.max(-1) == 1).all()),
        ("offset values", lambda q, k, v: (v > 90).all() and (k < 90).all()),
        ("powers of two", lambda q, k, v: all((np.frexp(np.abs(a))[0] == 0.5).all() for a in (q, k, v))),
        ("tiny", lambda q, k, v: all(0 < np.abs(a).max() < 1e-18 for a in (q, k, v))),
        ("zeros", lambda q, k, v: not any(a.any() for a in (q, k, v))),
        ("normal", lambda q, k, v: all(np.unique(a).size == a.size for a in (q, k, v))),
    ],
)
def test_a_family_is_what_its_name_says(family, holds):
    assert holds(*AttentionProblem(family=family).inputs("float64")[:3])
    q, *_ = AttentionProblem(family=family, gain=1024.0).inputs("float64")
    assert np.array_equal(q, 1024 * AttentionProblem(family=family).inputs("float64")[0])


def facts(problem):
    """What may be said of a problem, as strings."""
    yield from (f"mask {problem.mask}", f"bias {problem.bias}", problem.family, problem.layout, f"gain {problem.gain}")
    yield f"T {'<' if problem.T < problem.S else '>' if problem.T > problem.S else '='} S"
    yield from (f"batch {problem.batch}", f"scale {problem.scale}", f"K {problem.K}", f"G {problem.G}")
    yield from (f"{axis} = 0" for axis in ("T", "S") if getattr(problem, axis) == 0)
    yield from (f"{axis} = 1" for axis in ("T", "S", "D", "E") if getattr(problem, axis) == 1)
    yield from (f"{axis} > 64" for axis in ("T", "S") if getattr(problem, axis) > 64)
    if problem.rate and not problem.static()["dropout"].keep.all():
        yield "something is dropped"
    mask = masks.dense(problem.static()["mask"], problem.T, problem.S, np.zeros(0))
    if mask is not None and mask.size:
        allowed = np.broadcast_to(mask, (*problem.batch, problem.H, problem.T, problem.S))
        rows = allowed.any(-1)
        if rows.any() and not rows.all():
            yield from ("an empty row among others", f"an empty row among others: {problem.mask}")
        if problem.H > 1 and (allowed[..., 0, :, :] != allowed[..., 1, :, :]).any():
            yield "heads with masks of their own"
        if problem.batch and problem.batch[0] > 1 and (allowed[0] != allowed[1]).any():
            yield "samples with masks of their own"
    if isinstance(problem, MhaProblem):
        yield from (f"{name} {getattr(problem, name)}" for name in ("biases", "bias_kv", "zero_attn"))
        yield "self-attention" if problem.Cq == problem.Ck == problem.Cv else "widths that differ"


WANTED = {
    *(f"mask {mask}" for mask in MASKS),
    *(f"bias {bias}" for bias in BIASES),
    *FAMILIES,
    *LAYOUTS,
    *(f"gain {gain}" for gain in GAINS),
    *("T < S", "T > S", "T = S", "T = 0", "S = 0", "T = 1", "S = 1", "D = 1", "E = 1", "T > 64", "S > 64"),
    *(f"batch {batch}" for batch in ((), (1,), (2,), (3,), (2, 3), (0,))),
    *(f"scale {scale}" for scale in (None, 1.0, 0.0, -0.5)),
    *(f"{axis} {n}" for axis in "KG" for n in (1, 2, 3)),
    *("something is dropped", "an empty row among others"),
    *("heads with masks of their own", "samples with masks of their own"),
    *(f"an empty row among others: {mask}" for mask in ("causal", "lengths", "empty rows", "intersection")),
}
WANTED_OF_MHA = WANTED | {
    *(f"{name} {flag}" for name in ("biases", "bias_kv", "zero_attn") for flag in (True, False)),
    *("self-attention", "widths that differ"),
}


@pytest.mark.parametrize(("problems", "wanted"), [(attention_problems(), WANTED), (mha_problems(), WANTED_OF_MHA)])
def test_a_thousand_problems_have_everything(problems, wanted):
    drawn = set()

    @settings(max_examples=1000, derandomize=True, database=None, deadline=None)
    @given(problems)
    def look(problem):
        drawn.update(facts(problem))

    look()
    assert wanted <= drawn, f"never drawn: {sorted(wanted - drawn)}"


def test_a_field_that_is_given_is_kept():
    @given(attention_problems(T=st.just(4), mask=st.just("causal")))
    def look(problem):
        assert (problem.T, problem.mask) == (4, "causal")

    look()
