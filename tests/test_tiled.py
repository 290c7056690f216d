"""The tiled engine beyond what every engine is tested for: threads, BLAS, memory, large scores, interruption."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from test_ops import close
from threadpoolctl import threadpool_info, threadpool_limits

from funcmha import (
    attention,
    attention_vjp,
    attention_weights,
    init,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    ops,
    self_attention,
    self_attention_vjp,
    tree,
)
from funcmha._arguments import values_of
from funcmha.biases import as_bias
from funcmha.derivatives import attention_jvp, attention_vjp_jvp
from funcmha.engines import ENGINES, SEQUENTIAL, TILED, Plan, batched, heads
from funcmha.engines.tiled import linear, linear_vjp, threads
from funcmha.engines.tiled.cache import Views
from funcmha.engines.tiled.products import product
from funcmha.masks import as_mask
from funcmha.testing.strategies import LAYOUTS, MODERN, AttentionProblem, attention_problems
from funcmha.testing.tolerance import assert_within, attention_bounds

PLAN = Plan()
IN_TILES = TILED._replace(plan=Plan(few_queries=0))  # also where there are few queries


def blas_threads():
    """Of NumPy's: other tests may have imported libraries that load one of their own."""
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return [library["num_threads"] for library in libraries if "scipy.libs" not in library["filepath"]]


def large(T=700, dtype="float32", batch=(2,), **fields):
    return AttentionProblem(batch=batch, T=T, S=T + 13, K=2, G=2, D=16, E=24, **fields), dtype


def both(problem, dtype, engine):
    do, _, dlse = problem.cotangents(dtype)
    o, cache = attention(*problem.inputs(dtype), **problem.static(), engine=engine)
    return [o, log_sum_exp(cache), *attention_vjp(cache, do, dlse=dlse)]


@given(attention_problems(**MODERN, mask=st.sampled_from(["none", "causal", "intersection"]), rate=st.just(0.0)))
def test_float32_stays_within_the_bound(problem):
    """T1 at every gain, where the shift is none, a guess, or the maximum; twice the bound, as hypothesis searches."""
    arrays, static = problem.inputs("float32"), problem.static()
    do, _, dlse = problem.cotangents("float32")
    exact = [None if a is None else as_bias(a).map(lambda x: x.astype("float64")).given for a in arrays]
    want_o, want = attention(*exact, **static, engine=SEQUENTIAL)
    want_grads = attention_vjp(want, do.astype("float64"), dlse=dlse.astype("float64"))
    bounds = attention_bounds(*arrays[:4], do, sink=arrays[4], **static, dlse=dlse, dtype="float32")
    o, cache = attention(*arrays, **static, engine=TILED)
    assert_within(o, want_o, bounds.o, factor=2, name="o")
    assert_within(log_sum_exp(cache), log_sum_exp(want), bounds.lse, factor=2, name="lse")
    names = ("dq", "dk", "dv", "dbias", "dsink")
    for name, got, ref in zip(names, attention_vjp(cache, do, dlse=dlse), want_grads, strict=True):
        if ref is not None:
            got, ref, bound = map(values_of, (got, ref, getattr(bounds, name)))
            assert_within(got, ref, bound, factor=2, name=name)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "padding", "segments", "heads"])
def test_many_tiles_match_the_specification(mask):
    problem, dtype = large(dtype="float64", mask=mask, bias="... H 1 S")
    for got, want in zip(both(problem, dtype, TILED), both(problem, dtype, SEQUENTIAL), strict=True):
        close(got, want)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "padding", "heads", "empty rows"])
def test_a_few_queries_match_the_specification(mask, seeded):
    """Of several heads that read each key, with keys in four blocks of 3 and a rest, and in tiles for the gradient."""
    engine = TILED._replace(plan=Plan(few_block=3, tile_rows=4, tile_cols=3, whole_scores=0))
    options = {"softcap": 0.5, "scale": 0.5, "per_head": True, "rate": 0.3, "seeded": seeded}
    problem = AttentionProblem(T=3, S=13, mask=mask, bias="... H T S", sink=mask != "empty rows", **options)
    assert PLAN.few_queries >= problem.G * problem.T
    for got, want in zip(both(problem, "float64", engine), both(problem, "float64", SEQUENTIAL), strict=True):
        close(got, want)


def sums_of_weights(arrays, tangents, zero, one):
    """What sums to 1 in each row: the weights, and dbias, its tangent and l̇se where these are weights, or of them"""
    _, cache = attention(*arrays, engine=TILED)
    yield attention_weights(cache).sum(-1)
    yield attention_vjp(cache, zero, dlse=one)[3].sum(-1)
    yield attention_jvp(cache, None, None, None, tangents)[1]
    yield attention_vjp_jvp(cache, zero, zero, dlse_dot=one)[3].sum(-1)


@pytest.mark.parametrize("layout", ["contiguous", "fortran"])
@pytest.mark.parametrize("which", range(4))
def test_weights_of_few_queries_sum_to_one_at_large_scores(which, layout):
    """Exponentials of scores around 1e4 that another product made would differ in the fourth digit."""
    problem = AttentionProblem(batch=(), T=3, S=211, D=64, bias="H T S", gain=1000.0, layout=layout)
    q, k, v, bias, _ = problem.inputs("float32")
    zero, one = np.zeros((6, 3, 13), "float32"), np.ones((6, 3), "float32")
    *_, got = itertools.islice(sums_of_weights((q, k, v, bias), np.ones_like(bias), zero, one), which + 1)
    np.testing.assert_allclose(got, one, rtol=211 * 2.0**-24)


def test_masked_scores_may_be_far_above_the_others():
    """2 to the power of what they are above the maximum of the others would overflow, with a warning."""
    q, k, v = np.ones((3, 1)), np.array([[-2000.0], [0.0], [2000.0]]), np.eye(3)
    o, _ = attention(q, k, v, mask=masks.causal(), engine=IN_TILES)
    np.testing.assert_array_equal(o, np.eye(3))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(("T", "S"), [(131, 151), (521, 541), (16, 2003)])
def test_weights_sum_to_one_however_large_the_scores(T, S, which):
    """Of rows that were made again, of tiles that BLAS would share out to its threads, and of a few long rows."""
    rng, bias = np.random.default_rng(0), np.zeros((2, 1, T, S), "float32")
    q, k = (30 * rng.standard_normal((2, 1, n, 64), dtype="float32") for n in (T, S))
    v, one = np.zeros((2, 1, S, 2), "float32"), np.ones((2, 1, T), "float32")
    arrays, zero = (q, k, v, bias), np.zeros((2, 1, T, 2), "float32")
    with threadpool_limits(2, "blas"):
        *_, got = itertools.islice(sums_of_weights(arrays, np.ones_like(bias), zero, one), which + 1)
    np.testing.assert_allclose(got, one, rtol=S * 2.0**-24)


@pytest.mark.parametrize("size", [1e-30, -1e-30, 1e-15, 1e15])
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_gradients_are_as_large_as_their_cotangents(gain, size):
    """Sums of exponentials are far from 1 here, to both sides. A power of two goes in and comes out."""
    rng, unit = np.random.default_rng(0), float(np.frexp(size)[0])
    q, k, v = (gain * rng.standard_normal((2, n, 16), dtype="float32") for n in (131, 151, 151))
    do, dlse = (unit * np.abs(rng.standard_normal(s, dtype="float32")) for s in ((2, 131, 16), (2, 131)))
    bias, power = rng.standard_normal((131, 151), dtype="float32"), size / unit
    _, cache = attention(q, k, v, bias, engine=TILED)
    want = attention_vjp(cache, do, dlse=dlse)
    for got, ref in zip(attention_vjp(cache, power * do, dlse=power * dlse)[:4], want, strict=False):
        np.testing.assert_allclose(got / power, ref, rtol=1e-6, atol=1e-9 * np.abs(ref).max())


@pytest.mark.parametrize("size", [1e25, 1e37])
@pytest.mark.parametrize("gain", [1.0, 3.0, 10.0])
def test_large_values_overflow_in_no_sum(gain, size):
    rng = np.random.default_rng(0)
    q, k = (gain * rng.standard_normal((2, n, 17), dtype="float32") for n in (131, 151))
    v = size * rng.random((2, 151, 3), dtype="float32")
    want, _ = attention(*(a.astype("float64") for a in (q, k, v)), engine=SEQUENTIAL)
    np.testing.assert_allclose(attention(q, k, v, engine=TILED)[0], want, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1.0, 9.0, 30.0])
@pytest.mark.parametrize("mask", [None, masks.causal(-1)], ids=["none", "causal"])
def test_scores_of_any_size_are_shifted_as_they_must(few_queries, mask, sign, size):
    """All near the bound |q| max |k|, where a shift is needed, or near its opposite, where the guess is too much."""
    rng = np.random.default_rng(0)
    q, k = size + 0.1 * rng.random((2, 3, 7, 1)), sign * (size + 0.1 * rng.random((2, 3, 11, 1)))
    v, do = rng.standard_normal((2, 3, 11, 5)), rng.standard_normal((2, 3, 7, 5))
    for dtype in ("float32", "float64"):
        arrays = [a.astype(dtype) for a in (q, k, v)]
        want_o, want = attention(*(a.astype("float64") for a in arrays), mask=mask, engine=SEQUENTIAL)
        o, cache = attention(*arrays, mask=mask, engine=few_queries)
        bounds = attention_bounds(*arrays, None, do.astype(dtype), mask=mask, dtype=dtype)
        assert_within(o, want_o, bounds.o, factor=2)
        assert_within(log_sum_exp(cache), log_sum_exp(want), bounds.lse, factor=2)
        for i, name in enumerate(("dq", "dk", "dv")):
            got, ref = (
                attention_vjp(cache, do.astype(dtype))[i],
                attention_vjp(want, do.astype(dtype).astype("float64"))[i],
            )
            assert_within(got, ref, getattr(bounds, name), factor=2, name=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [-14.0, 14.0])
def test_a_guess_from_the_first_keys_may_be_far_off(first, masked):
    """They have the least scores of a row, or the largest, attended by it or not; other rows need no shift."""
    rng = np.random.default_rng(0)
    q, k = np.repeat([14.0, 0.1, -14.0, 0.2, 14.0], 5)[:, None], np.full((101, 1), -first)
    k[:41] = first
    k += 0.1 * rng.random(k.shape)
    v, do, mask = rng.standard_normal((101, 5)), rng.standard_normal((25, 5)), np.arange(101) >= 41 * masked
    arrays = [a.astype("float32") for a in (q, k, v)]
    bounds = attention_bounds(*arrays, None, do.astype("float32"), mask=mask, dtype="float32")
    want_o, want = attention(*(a.astype("float64") for a in arrays), mask=mask, engine=SEQUENTIAL)
    o, cache = attention(*arrays, mask=mask, engine=TILED)
    grads, want_grads = attention_vjp(cache, do.astype("float32")), attention_vjp(want, do)
    assert_within(log_sum_exp(cache), log_sum_exp(want), bounds.lse, factor=2)
    for got, ref, bound in zip(
        (o, *grads), (want_o, *want_grads), (bounds.o, bounds.dq, bounds.dk, bounds.dv), strict=False
    ):
        assert_within(got, ref, bound, factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_scores_of_the_forward(layout):
    """A single key has the weight 1, so dq is dlse · k · scale; scores are in the hundreds."""
    problem = AttentionProblem(batch=(), T=23, S=1, K=1, G=2, D=8, E=1, gain=10.0, layout=layout)
    q, k, v, *_ = problem.inputs("float32")
    do, _, dlse = problem.cotangents("float32")
    _, cache = attention(q, k, v, engine=TILED)
    dq, *_ = attention_vjp(cache, np.zeros_like(do), dlse=dlse)
    np.testing.assert_allclose(dq, dlse[..., None] * k * problem.D**-0.5, rtol=1e-6)


@pytest.mark.parametrize(("batch", "T"), [(2, 700), (1, 500)])
@pytest.mark.parametrize("bias", ["none", "T S", "1 S", "T 1", "... 1 1 S"])
def test_the_number_of_threads_changes_no_bit(monkeypatch, bias, batch, T):
    problem, dtype = large(T, batch=(batch,), mask="causal", bias=bias)
    results = []
    for n in ("1", "2", "3"):
        monkeypatch.setenv("FUNCMHA_NUM_THREADS", n)
        results.append(both(problem, dtype, TILED))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or np.array_equal(a, b)


@pytest.mark.parametrize("bias", ["none", "T S", "H T S"])
@pytest.mark.parametrize(("K", "G"), [(5, 1), (1, 3), (2, 2)])
def test_how_many_heads_go_together_changes_no_bit(K, G, bias):
    """Of outputs, and of gradients where each head has its own; heads that share one add to it in another order."""
    fields = {"mask": "causal", "bias": bias, "sink": True, "rate": 0.2, "seeded": True}
    problem = AttentionProblem(batch=(2,), T=131, S=144, K=K, G=G, D=16, E=24, **fields)
    one, some, all_ = (both(problem, "float32", TILED._replace(plan=Plan(stack_numbers=n))) for n in (1, 40000, 2**60))
    shared = ["dk", "dv"] * (G > 1) + ["dbias"] * (bias == "T S")
    for name, *parts in zip(("o", "lse", "dq", "dk", "dv", "dbias", "dsink"), one, some, all_, strict=True):
        for a, b in itertools.pairwise(map(values_of, parts)):
            same = np.allclose(a, b, rtol=1e-4, atol=1e-5) if name in shared else a is b or np.array_equal(a, b)
            assert same, name


@pytest.mark.parametrize("mask", ["none", "causal", "heads", "padding", "segments"])
@pytest.mark.parametrize("side", [32, 16])  # one tile, or four
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("K", "G", "fields"),
    [
        (3, 1, {}),
        (2, 2, {"sink": True, "rate": 0.2, "seeded": True}),
        (3, 1, {"bias": "... H T S", "softcap": 0.5, "per_head": True, "rate": 0.2, "seeded": False}),
        (2, 2, {"gain": 20.0}),  # rows with a dominant key, and such whose maximum is looked for
        (3, 1, {"gain": 20.0, "softcap": 2.0, "sink": True}),
    ],
)
def test_how_many_samples_go_together_changes_no_bit(monkeypatch, K, G, fields, whole, side, mask):
    """Those of one mask, or all where it cuts nothing off: also where only some have a dominant key, and one a NaN."""
    problem = AttentionProblem(batch=(2, 5), T=23, S=29, K=K, G=G, D=16, E=24, mask=mask, **fields)
    (q, *others), static = problem.inputs("float32"), problem.static()
    if mask == "heads":
        static["mask"] = np.asarray(static["mask"])[0, 0]
    q = np.copy(q)
    q[0, 1:3] *= 0.01
    q[1, 2, 0, 20, 0] = np.nan
    do, dweights, dlse = problem.cotangents("float32")
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "1")
    results, sizes = [], set[int]()
    plan = Plan(stack_numbers=2**60, tile_rows=side, tile_cols=side, whole_scores=1000 * whole)
    for n in (0, 2 * K * G * min(side, 23) * min(side, 29), 2**60):
        engine = TILED._replace(plan=plan._replace(sample_numbers=n))
        o, cache = attention(q, *others, **static, engine=engine)
        sizes.add(len(Views.of(cache).samples_of_keys([[slice(0, K * G)]])))
        grads = attention_vjp(cache, do, dweights=dweights, dlse=dlse)
        results.append([o, log_sum_exp(cache), *map(values_of, grads)])
    assert sizes == ({10, 6, 2} if whole or mask not in ("padding", "segments") else {10})
    assert np.isfinite(results[0][0][0]).all()
    assert not np.isfinite(results[0][0][1, 2]).all()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("mask", ["none", "causal", "heads", "padding"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_how_many_of_few_queries_go_together_changes_no_bit(monkeypatch, rate, mask):
    fields = {"rate": rate, "seeded": True, "sink": True, "bias": "... H T S", "gain": 5.0, "mask": mask}
    problem = AttentionProblem(batch=(2, 3), T=3, S=300, K=4, G=2, D=16, E=24, **fields)
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "1")
    results, sizes = [], set[int]()
    for n in (1, 2 * 6 * 300, 24 * 300, 2**60):
        plan = Plan(stack_numbers=n, sample_numbers=2 * n)
        _, cache = attention(*problem.inputs("float32"), **problem.static(), engine=TILED._replace(plan=plan))
        sizes.add(len(Views.of(cache).stacks_of_few_queries()))
        results.append(both(problem, "float32", TILED._replace(plan=plan))[:2])
    assert sizes == ({24, 12, 6} if mask in ("padding", "heads") else {24, 12, 6, 2})
    for other in results[1:]:
        assert all(map(np.array_equal, results[0], other))


@pytest.mark.parametrize("T", [1, 513])
@pytest.mark.parametrize(("K", "G"), [(1, 2), (2, 2), (1, 4)])
def test_threads_change_no_bit_of_one_row_in_forward_mode(monkeypatch, K, G, T):
    """A tile of one row is a product of a vector, whose bits depend on how the keys lie in memory."""
    problem = AttentionProblem(batch=(), T=T, S=T + 4, K=K, G=G, D=16, E=24)
    (q, k, v, *_), do = problem.inputs("float32"), problem.cotangents("float32")[0]
    results = []
    for n in ("1", "2", "3"):
        monkeypatch.setenv("FUNCMHA_NUM_THREADS", n)
        _, cache = attention(q, k, v, engine=IN_TILES)
        results.append([*attention_jvp(cache, q[::-1], k, v), *attention_vjp_jvp(cache, do, do, q, k, v)[:3]])
    for other in results[1:]:
        assert all(map(np.array_equal, results[0], other))


@pytest.mark.parametrize("seed", range(100, 110))
def test_sums_of_few_queries_are_those_of_tiles(seed):
    """Also where tiles have fewer rows: the weight of a single key is 1."""
    rng = np.random.default_rng(seed)
    q, k = ((100 * rng.standard_normal((1, n, 3))).astype(np.float32) for n in (3, 1))
    o, cache = attention(q, k, v := np.ones((1, 1, 1), np.float32), engine=TILED._replace(plan=Plan(tile_rows=2)))
    assert np.array_equal(attention_weights(cache), np.ones((1, 3, 1)))
    assert np.array_equal(attention_vjp(cache, np.ones_like(o))[2], 3 * v)


def test_a_tile_of_one_score_is_not_halved():
    q = np.random.default_rng(0).standard_normal((2, 2, 4))
    mask = np.array([[[1, 1], [1, 1]], [[0, 1], [1, 1]]], bool)
    plan = Plan(tile_rows=1, tile_cols=1, whole_scores=0, few_queries=0)
    o, _ = attention(q, q, q, mask=mask, engine=TILED._replace(plan=plan))
    close(o, attention(q, q, q, mask=mask, engine=SEQUENTIAL)[0])


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 600), st.integers(1, 600), st.integers(1, 5))
def test_stacks_are_all_heads_in_order(K, readers, T, S, least):
    plan = Plan(stack_numbers=1000)
    stacks = plan.stacks(K * readers, K, T, S, least)
    assert [h for some in stacks for one in some for h in range(one.start, one.stop)] == list(range(K * readers))
    for some in stacks:
        assert len({h.start // readers for h in some} | {(h.stop - 1) // readers for h in some}) == 1 or readers == 1
        for h in some:
            assert h.stop - h.start == 1 or (h.stop - h.start) * T * S <= plan.stack_numbers
    assert sum(map(len, stacks)) >= min(least, K * readers)


KINDS = ("none", "causal", "bands", "lengths", "padding", "segments", "dense", "heads", "intersection", "prefix")


@pytest.mark.parametrize("mask", [*KINDS, "complement"])
@pytest.mark.parametrize("fields", [{"K": 3}, {"K": 2, "G": 2, "gain": 9.0}])
def test_short_samples_that_go_together_equal_each_alone_bit_for_bit(monkeypatch, fields, mask):
    """Whatever their masks."""
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "1")
    problem = AttentionProblem(batch=(5,), T=23, S=29, D=16, E=24, mask="none" if mask == "bands" else mask, **fields)
    (q, k, v, *_), static = problem.inputs("float32"), problem.static()
    do, _, dlse = problem.cotangents("float32")
    if mask == "bands":
        static["mask"] = masks.causal(np.arange(-2, 3))
    o, cache = attention(q, k, v, **static, engine=TILED)
    whole = [o, log_sum_exp(cache), *attention_vjp(cache, do, dlse=dlse)[:3]]
    allowed = None if mask == "none" else as_mask(static["mask"])
    for b in range(5):
        static["mask"] = None if allowed is None else allowed.at((b,))
        o, cache = attention(q[b], k[b], v[b], **static, engine=TILED)
        alone = [o, log_sum_exp(cache), *attention_vjp(cache, do[b], dlse=dlse[b])[:3]]
        assert all(np.array_equal(a, got[b]) for a, got in zip(alone, whole, strict=True))


@pytest.mark.parametrize("T", [131, 521])
def test_a_batch_of_tiles_equals_its_samples_bit_for_bit(T):
    (problem, dtype) = large(T, batch=(2,), mask="causal")
    whole, (q, k, v, *_) = both(problem, dtype, TILED), problem.inputs(dtype)
    do, _, dlse = problem.cotangents(dtype)
    for b in range(2):
        o, cache = attention(q[b], k[b], v[b], **problem.static(), engine=TILED)
        for got, want in zip(
            [o, log_sum_exp(cache), *attention_vjp(cache, do[b], dlse=dlse[b])[:3]], whole, strict=False
        ):
            assert np.array_equal(got, want[b])


@pytest.mark.parametrize("name", ["attend", "attention_vjp"])
def test_batched_holds_blas_at_one_thread(monkeypatch, name):
    """Through `mha` with the engine that it picks, and through `attention`, whose vjp knows the cache alone."""
    used, f = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *inputs, **static: used.append(blas_threads()) or f(*inputs, **static))
    x = np.ones((2, 5, 4), np.float32)
    with threadpool_limits(2, "blas"):
        y, cache = self_attention(init(0, 4, 2), x)
        self_attention_vjp(cache, y)
        o, cache = attention(x, x, x)
        attention_vjp(cache, o)
    assert len(used) == 2
    assert all(set(n) == {1} for n in used)


@pytest.mark.parametrize("T", [7, 81])
def test_complex_arrays_are_batched(T):
    params, x = init(0, 4, 2, dtype="float64"), np.zeros((2, T, 4))
    params = tree.map(lambda a: a.astype(complex), params)
    (one, *_) = heads(self_attention(params, x + 0j)[1])
    assert type(one.attention) is batched.AttentionCache


@pytest.mark.parametrize("given_", ["0", "-1", "two", ""])
def test_a_bad_number_of_threads_is_refused(monkeypatch, given_):
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", given_)
    with pytest.raises(ValueError, match=f"FUNCMHA_NUM_THREADS must be an integer of at least 1, got '{given_}'"):
        threads.num_threads()


def test_blas_has_its_threads_back_after_calls_and_errors():
    before = blas_threads()
    with threadpool_limits(2, "blas"):
        problem, dtype = large()
        both(problem, dtype, TILED)
        assert set(blas_threads()) == {2}
        with pytest.raises(ZeroDivisionError), threads.single_threaded_blas():
            raise ZeroDivisionError if set(blas_threads()) == {1} else AssertionError
        assert set(blas_threads()) == {2}
    assert blas_threads() == before


def held(limit):
    """The threads of BLAS inside."""
    with limit():
        return set(blas_threads())


def test_blas_is_held_from_any_thread():
    """threadpoolctl 3.8 silently ignores all but the first thread that sets a number."""

    with threadpool_limits(2, "blas"), ThreadPoolExecutor(1) as other:
        with threads.single_threaded_blas():
            pass
        assert other.submit(held, threads.single_threaded_blas).result() == {1}
        assert held(lambda: threadpool_limits(1, "blas")) == {1}
        assert set(blas_threads()) == {2}


def test_two_threads_of_a_program_may_call_at_once():
    problem, dtype = large()
    want, got = both(problem, dtype, TILED), {}
    before = blas_threads()

    def call(i):
        got[i] = both(problem, dtype, TILED)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert blas_threads() == before
    for result in got.values():
        for a, b in zip(result, want, strict=True):
            assert a is b is None or np.array_equal(a, b)


@pytest.mark.parametrize("of_caller", [True, False])
def test_an_error_in_a_task_stops_the_others_and_is_raised(monkeypatch, of_caller):
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "3")
    done, caller = [], threading.current_thread()

    def work(i):
        if i >= 5 and (threading.current_thread() is caller) == of_caller:
            raise KeyError(i)
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(KeyError):
        threads.run(work, range(1000), flops=1e9, plan=PLAN)
    assert len(done) < 500


def test_the_last_task_is_done_by_whoever_took_it(monkeypatch):
    """The caller is done while a helper holds the last task and has not begun it."""
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "2")
    done, caller = [], threading.current_thread()

    taken = threading.Event()

    class Queue:
        """Gives its only task to the helper, which then sleeps before it looks whether to stop."""

        def __len__(self):
            return 2

        def __iter__(self):
            return self

        def __next__(self):
            if threading.current_thread() is caller:
                taken.wait(10)
                raise StopIteration
            if taken.is_set():
                raise StopIteration
            taken.set()
            time.sleep(0.1)
            return "last"

    threads.run(done.append, Queue(), flops=1e9, plan=PLAN)
    assert done == ["last"]


@pytest.mark.parametrize(
    "mask",
    [
        lambda T: masks.causal(),
        lambda T: masks.causal() & (masks.window(200, 0) | masks.first(4)),
        lambda T: ~masks.segments(np.arange(T) // 100, np.arange(T) // 100),
    ],
    ids=["causal", "sinks beside a window", "other segments"],
)
def test_memory_is_linear(mask):
    """Four times the tokens take four times the memory, and the scores of one head alone would take sixteen times."""
    peaks = []
    for T in (1024, 4096):
        x = np.random.default_rng(0).standard_normal((1, 2, T, 16), dtype=np.float32)
        tracemalloc.start()
        o, cache = attention(x, x, x, mask=mask(T), engine=TILED)
        attention_vjp(cache, o)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 4 * 4096 * 4096


def test_ctrl_c_comes_back_promptly():
    code = """
import numpy as np, signal, time
from funcmha import attention
from funcmha.engines import TILED
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so their children
x = np.ones((1, 8, 65536, 64), np.float32)
print("begin", flush=True)
try:
    attention(x, x, x, engine=TILED)
except KeyboardInterrupt:
    begin = time.process_time()
    time.sleep(0.3)
    print("idle" if time.process_time() - begin < 0.1 else "busy", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begin\n"
    time.sleep(1)
    begin = time.perf_counter()
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "idle\n"
    assert time.perf_counter() - begin < 20  # the tasks that had begun, on a busy machine
    assert child.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os, threading, numpy as np
from funcmha import attention
from funcmha.engines import TILED
x = np.ones((4, 2, 512, 32), np.float32)
attention(x, x, x, engine=TILED)
pid = os.fork()
attention(x, x, x, engine=TILED)
other = threading.Thread(target=attention, args=(x, x, x), kwargs={"engine": TILED}, daemon=True)
other.start()
other.join(20)
if other.is_alive():
    os._exit(1)
if pid:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    warn = ["-W", "ignore::DeprecationWarning"]  # of forking with threads, which is what is tried
    assert subprocess.run([sys.executable, *warn, "-c", code], timeout=60, check=False).returncode == 0


def test_only_numpy_arrays_and_real_ones():
    q = np.ones((2, 3, 4))
    with pytest.raises(
        TypeError,
        match="engine 'tiled' takes real NumPy arrays, got a NumPy array of complex128: write engine='batched'",
    ):
        attention(q + 0j, q + 0j, q + 0j, engine=TILED)


def test_an_engine_may_be_named():
    q = np.ones((2, 3, 4))
    assert type(attention(q, q, q, engine="tiled")[1]) is type(attention(q, q, q, engine=TILED)[1])
    with pytest.raises(TypeError, match=r"engine must be one of 'sequential', 'batched', 'tiled', .*, got 'fast'"):
        attention(q, q, q, engine="fast")


def test_an_engine_of_ones_own_is_used():
    used, (f, f_vjp) = [], TILED.attention
    own = TILED._replace(name="own", attention=(lambda *args, **static: used.append(1) or f(*args, **static), f_vjp))
    q = np.ones((2, 3, 4))
    attention(q, q, q, engine=own)
    assert used == [1]


def test_a_group_of_small_keys_beside_one_of_large_keys():
    """The bound on the scores is that of the keys and queries that meet; of any others it would be too small."""
    problem, dtype = large(dtype="float64")
    q, k, v, *_ = problem.inputs(dtype)
    q, k = q.copy(), k.copy()
    q[:, :, :3] *= 1e-4
    q[:, :, 3:] *= 100.0
    k[:, 1] *= 100.0
    (o, cache), (want_o, want) = (attention(q, k, v, engine=engine) for engine in (TILED, SEQUENTIAL))
    np.testing.assert_allclose(o, want_o, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_sum_exp(cache), log_sum_exp(want), rtol=1e-12)


def test_a_sink_does_not_hide_that_all_keys_were_lost():
    """Scores of −99 in powers of two, at the opposite of their bound: shifted by the guess, 39, they are subnormal."""
    q, k = np.full((2, 3, 2), 9, "f4"), np.full((2, 5, 2), -5.39, "f4")
    v, sink = 1 + np.arange(10, dtype="f4").reshape(2, 5, 1), np.zeros(2, "f4")
    o, _ = attention(q, k, v, None, sink, engine=IN_TILES)
    want, _ = attention(*(a.astype("f8") for a in (q, k, v)), None, sink.astype("f8"), engine=SEQUENTIAL)
    assert want.all()
    np.testing.assert_allclose(o, want, rtol=2e-5)


def test_a_masked_score_far_above_all_others_has_no_effect():
    q, k = np.full((1, 17, 1), 15, "f4"), np.full((1, 5, 1), -15, "f4")
    k[:, 2] = 15
    v, mask = np.arange(5, dtype="f4").reshape(1, 5, 1), np.arange(5) != 2
    (o, cache), (want_o, want) = (attention(q, k, v, mask=mask, engine=engine) for engine in (TILED, SEQUENTIAL))
    np.testing.assert_allclose(o, want_o, rtol=1e-5)
    np.testing.assert_allclose(log_sum_exp(cache), log_sum_exp(want), rtol=1e-5)


def test_a_product_of_no_terms_is_zero_or_what_it_is_added_to():
    a, b = np.ones((3, 0)), np.ones((0, 5))
    assert (product(a, b, out=np.full((3, 5), 7.0), plan=PLAN) == 0).all()
    assert (product(a, b, out=np.full((3, 5), 7.0), add=True, plan=PLAN) == 7).all()


@pytest.mark.parametrize("rows", [(3, 701), (2, 263), (101,), (7,), ()])
@pytest.mark.parametrize(("n_in", "n_out"), [(389, 197), (197, 389)])
def test_linear_in_many_blocks(n_in, n_out, rows):
    """Rows, columns and terms of each product come in blocks, the last of which are not whole. And of few rows."""
    rng = np.random.default_rng(0)
    x, w, b, dy = (rng.standard_normal(s) for s in ((*rows, n_in), (n_out, n_in), n_out, (*rows, n_out)))
    y, (want_y, want) = linear(x, w, b, plan=PLAN), ops.linear(x, w, b)
    close(y, want_y)
    for got, ref in zip(linear_vjp(want, dy, plan=PLAN), ops.linear_vjp(want, dy), strict=True):
        close(got, ref)


@pytest.mark.parametrize("rows", [(2, 263), (7,)])
@pytest.mark.parametrize("widths", [(64, 64, 64), (197, 83, 211)])
def test_linear_of_dy_in_parts(widths, rows):
    """dy may come in arrays that stand side by side, whose borders are not those of the blocks."""
    rng = np.random.default_rng(0)
    x, w, add_to, *parts = (
        rng.standard_normal(s) for s in ((*rows, 23), (sum(widths), 23), (*rows, 23), *((*rows, n) for n in widths))
    )
    cache = ops.LinearCache(x, w, None)
    dx, dw, _ = linear_vjp(cache, tuple(parts), add_to=add_to.copy(), plan=PLAN)
    dy = np.concatenate(parts, axis=-1)
    close(dx, add_to + dy @ w)
    close(dw, dy.reshape(-1, sum(widths)).T @ x.reshape(-1, 23))


@pytest.mark.parametrize("head_dim", [5, 53])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_three_gradients_of_one_input_are_added_up(engine, head_dim):
    """Short projections are one product, long ones come in turn."""
    params = init(0, 11, 5, head_dim=head_dim, dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 13, 11))
    y, cache = self_attention(params, x, engine=engine)
    dparams, dx, _ = self_attention_vjp(cache, y)
    want_dparams, *want_dx, _ = mha_vjp(mha(params, x, x, x, engine=engine)[1], y)
    close(dx, sum(want_dx))
    for leaf, want in tree.flatten(want_dparams).items():
        close(tree.flatten(dparams)[leaf], want)


def test_weights_are_recomputed_from_the_cache():
    problem, dtype = large(T=300, dtype="float64", mask="window", bias="H T S")
    arrays, static = problem.inputs(dtype), problem.static()
    got, want = (attention_weights(attention(*arrays, **static, engine=e)[1]) for e in (TILED, SEQUENTIAL))
    close(got, want)


def test_mha_by_every_engine():
    params = init(0, 48, 6, num_kv_heads=2, bias_kv=True, dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 300, 48))
    results = []
    for engine in ENGINES:
        y, cache = self_attention(params, x, mask=masks.causal(), zero_attn=True, engine=engine)
        dparams, dx, _ = self_attention_vjp(cache, y)
        results.append([y, dx, dparams["q_proj"]["w"], dparams["out_proj"]["b"], dparams["bias_kv"]["v"]])
    want, *others = results
    for got in others:
        for a, b in zip(got, want, strict=True):
            close(a, b)


MASKED = [masks.causal(), masks.lengths(np.array([3])), np.zeros((5, 7), bool)]


@pytest.mark.parametrize(
    ("T", "S", "K", "mask"),
    [(5, 7, 4, None), (0, 7, 4, None), (5, 0, 4, None), (5, 7, 2, None), (600, 7, 4, None), (5, 70000, 4, None)]
    + [(5, 7, 4, mask) for mask in MASKED],
)
def test_no_gradient_is_left_unwritten(monkeypatch, T, S, K, mask):
    """Heads of one tile write their gradients into fresh memory, which here is full of NaN."""
    q, k, v = (np.ones((1, heads, n, 3), "f4") for heads, n in ((4, T), (K, S), (K, S)))
    do, cache = attention(q, k, v, mask=mask, engine=TILED)
    empty_like = np.empty_like
    monkeypatch.setattr(np, "empty_like", lambda *args, **options: np.full_like(empty_like(*args, **options), np.nan))
    assert all(np.isfinite(dx).all() for dx in attention_vjp(cache, do)[:3])


@pytest.mark.parametrize(
    ("R", "I", "N"), [(2, 2000, 100), (1, 4096, 512), (512, 4096, 1), (300, 4096, 64), (16, 1000, 16)]
)
def test_no_sum_of_a_product_is_long(R, I, N):
    """A 1 added to 2²⁴ in float32 is lost, so what is missing tells how many terms were added up one after another."""
    a, b = np.ones((R, I), "f4"), np.ones((I, N), "f4")
    a[:, 0] = 2.0**24
    got = product(a, b, out=np.empty((R, N), "f4"), plan=PLAN).astype("f8")
    assert (2.0**24 + I - got <= 512).all()
