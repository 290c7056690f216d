"""Rows in which one key has nearly all of the weight keep their digits: backward, forward mode and second order.

The oracle is arithmetic of 300 digits, which differences the loss and knows no gradient.
"""

import functools
from dataclasses import replace

import mpmath as mp
import numpy as np
import pytest
from conftest import BLOCKS

from funcmha import attention, attention_vjp, attention_weights, masks, ops
from funcmha._arguments import values_of
from funcmha.derivatives import attention_jvp, attention_vjp_jvp
from funcmha.dropout import masked
from funcmha.engines import BATCHED, ENGINES, SEQUENTIAL, TILED, Plan
from funcmha.engines.tiled.dominant import Dominant
from funcmha.testing.strategies import AttentionProblem
from funcmha.testing.tolerance import assert_within, attention_bounds, worst_ratio

SMALL = TILED._replace(plan=Plan(tile_rows=16, tile_cols=16, whole_scores=0, few_queries=0, thread_flops=0))
EVERY = [*ENGINES, BLOCKS, SMALL]
NAMES = ("dq", "dk", "dv", "dbias", "dsink")
OPTIONS = {
    "plain": {},
    "sink": {"sink": True},
    "cap": {"softcap": 60.0},
    "dropout": {"rate": 0.3},
    "mask": {"mask": "causal"},
    "relative": {"bias": "... H T+S-1"},
    "broadcast": {"bias": "... H 1 S", "sink": True},
    "all": {"bias": "... H T S", "sink": True, "softcap": 60.0, "rate": 0.3, "mask": "dense", "seeded": True},
}


def problem(gain, **options):
    return AttentionProblem(T=37, S=67, K=2, G=2, D=16, E=11, gain=gain, **options)


def gradients(problem, dtype, engine, cotangents=("dlse", "dweights")):
    do, dweights, dlse = problem.cotangents("float32")
    given = {"dweights": dweights, "dlse": 1e-3 * dlse}
    given = {name: given[name].astype(dtype) for name in cotangents}
    arrays = tuple(None if a is None else values_like(a, dtype) for a in problem.inputs("float32"))
    _, cache = attention(*arrays, **problem.static(), engine=engine)
    return cache, attention_vjp(cache, do.astype(dtype), **given), given


def values_like(a, dtype):
    return a.astype(dtype) if isinstance(a, np.ndarray) else a.map(lambda x: x.astype(dtype))


def within(problem, dtype, engine, cotangents):
    """The worst of each gradient, in units of its bound"""
    _, want, _ = gradients(problem, "float64", SEQUENTIAL, cotangents)
    cache, got, given = gradients(problem, dtype, engine, cotangents)
    q, k, v, bias, sink = problem.inputs("float32")
    do, options = problem.cotangents("float32")[0], problem.static()
    bounds = attention_bounds(q, k, v, bias, do, sink=sink, **options, **given, dtype=dtype)
    found = zip(NAMES, got, want, strict=True)
    return cache, {
        name: worst_ratio(*map(values_of, (g, w, getattr(bounds, name)))) for name, g, w in found if g is not None
    }


@pytest.mark.parametrize("engine", EVERY, ids=["sequential", "batched", "tiled", "blocks", "small tiles"])
@pytest.mark.parametrize("gain", [5.0, 10.0, 30.0])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cotangents", [(), ("dlse", "dweights")], ids=["o", "o, lse and weights"])
def test_gradients_in_float32_are_within(engine, gain, options, cotangents):
    cache, ratios = within(problem(gain, **OPTIONS[options]), "float32", engine, cotangents)
    assert np.mean(attention_weights(cache).max(-1) > 0.99) > 0.03  # there are saturated rows
    assert max(ratios.values()) <= 1, ratios


FOUND = [  # by random search: other weights of 1e-35, which a sum of exponentials far below 1 lost; slopes of 1e-8
    AttentionProblem((), 41, 56, 1, 1, 43, 17, mask="window", softcap=300.0, gain=48.626121506364214, seed=259),
    AttentionProblem((), 48, 70, 2, 2, 46, 14, "window", "... H T S", 0.3, softcap=30.0, gain=1915.0, family="ties"),
]


@pytest.mark.parametrize("engine", EVERY, ids=["sequential", "batched", "tiled", "blocks", "small tiles"])
@pytest.mark.parametrize("found", FOUND, ids=range(len(FOUND)))
def test_what_was_found_is_within(engine, found):
    _, ratios = within(found, "float32", engine, ("dweights",))
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("gain", [10.0, 30.0])
@pytest.mark.parametrize("family", ["normal", "offset values"])
def test_a_backward_that_takes_the_difference_is_outside(monkeypatch, gain, family):
    """p (dp − δ) at every key, as in other tiled backwards; of the bound it was up to 1500 times."""
    monkeypatch.setattr(Dominant, "of", lambda *args: None)
    _, ratios = within(problem(gain, family=family), "float32", SMALL, ())
    assert ratios["dq"] > 2
    assert ratios["dk"] > (2 if gain == 30 else 0)


def test_a_specification_that_is_not_centred_is_outside(monkeypatch):
    def plain(p, dp, dlse=None, p_sink=None):
        return p * (dp - np.sum(p * dp, axis=-1, keepdims=True)), None

    monkeypatch.setattr(ops, "softmax_with_sink_vjp", plain)
    _, want, _ = gradients(problem(30.0), "float64", TILED, ())
    _, got, _ = gradients(problem(30.0), "float32", SEQUENTIAL, ())
    q, k, v, bias, _ = problem(30.0).inputs("float32")
    do = problem(30.0).cotangents("float32")[0]
    bounds = attention_bounds(q, k, v, bias, do, dtype="float32")
    assert worst_ratio(got[0], want[0], bounds.dq) > 2
    for_kernels = attention_bounds(q, k, v, bias, do, arithmetic="flash", dtype="float32")  # which all do that
    assert_within(got[0], want[0], for_kernels.dq)


@pytest.mark.parametrize("engine", EVERY, ids=["sequential", "batched", "tiled", "blocks", "small tiles"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_single_key_leaves_nothing(engine, dtype):
    """Values far from 0: the difference of two numbers of 1000 each is not 0."""
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 1, 128, 64)).astype(dtype)
    _, cache = attention(100 * q, k, v + 100, mask=masks.window(0, 0), engine=engine)
    dq, dk, *_ = attention_vjp(cache, do)
    assert not dq.any()
    assert not dk.any()
    o_dot, _ = attention_jvp(cache, q, k)
    assert not o_dot.any()


@pytest.mark.parametrize("engine", EVERY, ids=["sequential", "batched", "tiled", "blocks", "small tiles"])
def test_a_nan_of_the_cotangent_stays(engine):
    """Of a single key, whose gradient is 0 whatever else the cotangent is."""
    q, do, (k, v) = np.ones((5, 3)), np.ones((5, 3)), np.ones((2, 1, 3))
    do[2] = np.nan
    _, cache = attention(q, k, v, engine=engine)
    dq, *_ = attention_vjp(cache, do)
    assert np.isnan(dq[2]).all()
    assert not dq[[0, 1, 3, 4]].any()


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def everything(problem, engine, at=...):
    """The gradients, forward mode and second order, of all samples or of one"""

    def part(a):
        return None if a is None else values_of(a)[at]

    arrays, dots = (tuple(map(part, replace(problem, seed=s).inputs("float32"))) for s in (0, 1))
    (do, _, dlse), (do_dot, _, dlse_dot) = (
        tuple(map(part, replace(problem, seed=s).cotangents("float32"))) for s in (0, 1)
    )
    _, cache = attention(*arrays, **problem.static(), engine=engine)
    second = attention_vjp_jvp(cache, do, do_dot, *dots, dlse=dlse, dlse_dot=dlse_dot)
    return [*attention_vjp(cache, do, dlse=dlse), *attention_jvp(cache, *dots), *second]


@pytest.mark.parametrize("options", ["plain", "mask", "all", "broadcast"])
def test_saturated_rows_have_the_same_bits_on_many_threads(monkeypatch, options):
    results = []
    for n in ("1", "2", "3"):
        monkeypatch.setenv("FUNCMHA_NUM_THREADS", n)
        results.append(everything(problem(30.0, batch=(3,), **OPTIONS[options]), SMALL))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or np.array_equal(values_of(a), values_of(b))


def test_saturated_rows_of_a_batch_have_the_bits_of_its_samples():
    many = problem(30.0, batch=(3,), mask="causal")
    whole = everything(many, SMALL)
    for b in range(3):
        for got, want in zip(everything(many, SMALL, b), whole, strict=True):
            assert got is want is None or np.array_equal(got, want[b])


# ── against 300 digits ───────────────────────────────────────────────────────────────────────────────────────────

T, S, D, E = 3, 5, 2, 2
STEP = mp.mpf(10) ** -80


class Loss:
    """⟨do, o⟩ + ⟨dlse, lse⟩ of one head as a function of one list: q, k, v, bias, sink, do, dlse"""

    shapes = ((T, D), (S, D), (S, E), (T, S), (), (T, E), (T,))

    def __init__(self, softcap, keep, rate):
        self.softcap, self.keep, self.rate = softcap, keep, rate

    def parts(self, x):
        found, start = [], 0
        for shape in self.shapes:
            n = int(np.prod(shape))
            found.append(np.array(x[start : start + n], object).reshape(shape))
            start += n
        return found

    def outputs(self, x):
        q, k, v, bias, sink, *_ = self.parts(x)
        u = q @ k.T * mp.sqrt(mp.mpf(1) / D)
        c = np.vectorize(lambda a: self.softcap * mp.tanh(a / self.softcap), otypes=[object])(u)
        e = np.vectorize(mp.exp, otypes=[object])(c + bias)
        total = e.sum(-1) + mp.exp(sink.item())
        a = e / total[:, None] * np.where(self.keep, 1 / (1 - mp.mpf(self.rate)), 0)
        return a @ v, np.array([mp.log(t) for t in total], object)

    def __call__(self, x):
        *_, do, dlse = self.parts(x)
        o, lse = self.outputs(x)
        return (do * o).sum() + (dlse * lse).sum()


def moved(x, dots, by):
    return [a + by * d for a, d in zip(x, dots, strict=True)]


def slope(f, x, dots):
    return (f(moved(x, dots, STEP)) - f(moved(x, dots, -STEP))) / (2 * STEP)


def numbers(arrays):
    return [mp.mpf(float(a)) for array in arrays for a in np.ravel(array)]


def oracles(loss, arrays, dots):
    """The gradients of the inputs, the tangents of o and lse, and those of the gradients"""
    x, x_dot = numbers(arrays), numbers(dots)
    units = [[mp.mpf(int(i == j)) for j in range(len(x))] for i in range(len(x) - T * E - T)]
    grads = [slope(loss, x, unit) for unit in units]
    dots_of_grads = [slope(lambda y, unit=unit: slope(loss, y, unit), x, x_dot) for unit in units]
    plus, minus = loss.outputs(moved(x, x_dot, STEP)), loss.outputs(moved(x, x_dot, -STEP))
    of_outputs = [((a - b) / (2 * STEP)).astype(float) for a, b in zip(plus, minus, strict=True)]
    pad = [mp.mpf(0)] * (T * E + T)
    first, second = ([a.astype(float) for a in loss.parts(g + pad)[:5]] for g in (grads, dots_of_grads))
    return first, of_outputs, second


@functools.cache
def drawn(softcap, rate, seed, sink=None):
    """Inputs and cotangents, their tangents, keep, every derivative, and the largest score

    A key has nearly all of the weight of each row, or a sink of this size, where what there is of dlse would hide the
    rest.
    """
    rng = np.random.default_rng(seed)
    arrays, dots = ([rng.standard_normal(s).astype("float32") for s in Loss.shapes] for _ in range(2))
    arrays[0] *= 30 if sink is None else 1
    arrays[2] += 10
    arrays[6] *= np.float32(1e-3 if sink is None else 0)
    dots[6] *= np.float32(1 if sink is None else 0)
    arrays[4] = arrays[4] if sink is None else np.array(sink, "float32")
    keep = rng.random((T, S)) < 0.8 if rate else np.ones((T, S), bool)
    with mp.workdps(300):
        want = [a for some in oracles(Loss(softcap, keep, rate), arrays, dots) for a in some]
    score = np.abs(arrays[0] @ arrays[1].T).max() * D**-0.5
    return arrays, dots, keep, want, max(score, sink or 0.0)


@pytest.mark.parametrize(
    "engine", [SEQUENTIAL, BATCHED, BLOCKS, SMALL], ids=["sequential", "batched", "blocks", "tiled"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("softcap", "rate"), [(1e3, 0.0), (200.0, 0.25)])
@pytest.mark.parametrize("seed", [0, 2, 5])
def test_every_derivative_equals_300_digits(engine, dtype, softcap, rate, seed):
    """Relative to each row: an ulp of a score costs the weights a score's own size, and values are 10 from 0."""
    cache = compare(drawn(softcap, rate, seed), dtype, softcap, rate, engine)
    assert attention_weights(cache).max() > 0.999


@pytest.mark.parametrize("engine", EVERY, ids=["sequential", "batched", "tiled", "blocks", "small tiles"])
@pytest.mark.parametrize(
    ("dtype", "sink"), [("float32", 12.0), ("float32", 25.0), ("float64", 25.0), ("float64", 60.0)]
)
@pytest.mark.parametrize(("softcap", "rate"), [(1e3, 0.0), (200.0, 0.25)])
def test_a_sink_with_nearly_all_of_the_weight(engine, dtype, sink, softcap, rate):
    """1 − p_sink has no digits then, and what the sink gets is as small as the weights of the keys."""
    cache = compare(drawn(softcap, rate, 1, sink), dtype, softcap, rate, engine)
    assert attention_weights(cache).sum(-1).max() < 1e-3


def compare(problem, dtype, softcap, rate, engine):
    """Every derivative of the problem, relative to each row"""
    arrays, dots, keep, want, score = problem
    (*x, do, dlse), (*x_dot, do_dot, dlse_dot) = (tuple(a.astype(dtype) for a in some) for some in (arrays, dots))
    _, cache = attention(*x, softcap=softcap, dropout=masked(keep, rate), engine=engine)
    got = [
        *attention_vjp(cache, do, dlse=dlse),
        *attention_jvp(cache, *x_dot),
        *attention_vjp_jvp(cache, do, do_dot, *x_dot, dlse=dlse, dlse_dot=dlse_dot),
    ]
    for g, w in zip(got, want, strict=True):
        error, size = (np.sqrt(np.sum(np.atleast_1d(a) ** 2, axis=-1)) for a in (g - w, w))
        assert np.all(error <= 32 * (1 + score) * np.finfo(dtype).eps / 2 * size)
    return cache
