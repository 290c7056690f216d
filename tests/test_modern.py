"""What modern attention adds where it meets the rest: heads in groups, projections recomputed, extremes, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from test_mha import compare_with_torch
from test_ops import close, each_path

from funcmha import (
    attention,
    attention_vjp,
    attention_weights,
    head,
    head_params,
    head_vjp,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    self_attention,
    self_attention_vjp,
    tree,
)
from funcmha.biases import RelativeBias, dense, diagonal_sums
from funcmha.dropout import Seeded
from funcmha.engines import BATCHED, ENGINES, SEQUENTIAL, TILED, Plan
from funcmha.engines.grouped import Kept, Recomputed
from funcmha.norms import L2Norm, RMSNorm
from funcmha.rotary import frequencies, table
from funcmha.testing.strategies import AttentionProblem, MhaProblem

every_engine = pytest.mark.parametrize("engine", ENGINES)
grouped_engines = pytest.mark.parametrize("engine", [BATCHED, TILED], ids=lambda engine: engine.name)


def arrays_of(result):
    """Every array of trees, biases and tuples, in order."""
    if isinstance(result, dict):
        return [a for name in sorted(result) for a in arrays_of(result[name])]
    if isinstance(result, tuple | list) and not isinstance(result, RelativeBias):
        return [a for x in result for a in arrays_of(x)]
    return [result.values if isinstance(result, RelativeBias) else result]


def all_close(got, want):
    for a, b in zip(arrays_of(got), arrays_of(want), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


def planned(engine, **plan):
    return engine._replace(plan=Plan(**plan)) if plan else engine


def all_of(problem, engine, **plan):
    """The cache, and y, the weights, lse and every gradient, by an engine with this plan."""
    dy, dweights, dlse = problem.cotangents("float64")
    y, cache = mha(*problem.inputs("float64"), **problem.static(), engine=planned(engine, **plan))
    grads = mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
    return cache, [y, attention_weights(cache), log_sum_exp(cache), *grads]


# ── groups of heads ──────────────────────────────────────────────────────────────────────────────────────────────

LONG = {"T": 33, "S": 35, "K": 3, "G": 2, "D": 4, "E": 5, "Cq": 2, "Ck": 2, "Cv": 2}  # as T and S are 16 · C and more
GROUPED = {
    "all per head": MhaProblem(
        **LONG,
        qk_norm="layer",
        rotary="half of all",
        sink=True,
        softcap=0.5,
        scale=0.5,
        per_head=True,
        bias="... H T+S-1",
        mask="heads",
        rate=0.3,
        seeded=True,
    ),
    "appended keys": MhaProblem(
        **LONG, qk_norm="rms", bias_kv=True, zero_attn=True, bias="... H 1 S", mask="intersection", rate=0.3
    ),
    "all shared": MhaProblem(**LONG, qk_norm="l2", bias="1 T+S-1", mask="causal", rotary="interleaved of some"),
    "mask and bias of each sample": MhaProblem(**LONG, mask="dense", bias="... 1 T S", sink=True),
    "no biases": MhaProblem(**LONG, biases=False, bias="T S"),
}


@grouped_engines
@pytest.mark.parametrize("problem", GROUPED.values(), ids=GROUPED)
def test_groups_of_one_head_equal_all_at_once(engine, problem):
    together, want = all_of(problem, engine, group_numbers=2**60)
    apart, got = all_of(problem, engine, group_numbers=0, group_columns=0)
    assert (len(together.groups), len(apart.groups)) == (1, problem.K)
    all_close(got, want)


@grouped_engines
@pytest.mark.parametrize("problem", GROUPED.values(), ids=GROUPED)
def test_groups_equal_the_specification(engine, problem):
    _, got = all_of(problem, engine, group_numbers=0, group_columns=0, kept_numbers=0, kept_long=0)
    _, want = all_of(problem, SEQUENTIAL)
    all_close(got, want)


@grouped_engines
@pytest.mark.parametrize("recomputed", [False, True])
def test_heads_together_forward_and_apart_backward(engine, recomputed):
    """T and S are below 16 · C: the forward takes all heads at once, the gradient one after another."""
    problem = replace(GROUPED["all per head"], T=31)
    kept = dict.fromkeys(("kept_numbers", "kept_long"), 0 if recomputed else 2**60)
    cache, got = all_of(problem, engine, group_numbers=0, group_columns=0, **kept)
    _, want = all_of(problem, engine, group_numbers=2**60, **kept)
    assert len(cache.groups) == problem.K
    assert all(np.shares_memory(a.q.project.w, cache.params["q_proj"]["w"]) for a in cache.groups)
    all_close(got, want)


@grouped_engines
def test_per_sample_gradients_where_projections_are_recomputed(engine):
    problem = GROUPED["all per head"]
    engine = engine._replace(plan=Plan(kept_numbers=0, kept_long=0))
    y, cache = mha(*problem.inputs("float64"), **problem.static(), engine=engine)
    dparams, *want = mha_vjp(cache, y)
    each, *got = mha_vjp(cache, y, per_sample=True)
    all_close(tree.map(lambda g: g.sum(0), each), dparams)
    all_close(got, want)


def test_a_table_of_each_head_is_refused():
    """(H, T) positions could as well be meant as (B, T)."""
    problem = MhaProblem(**LONG)
    of_heads = table(np.zeros((problem.H, 33)), frequencies(4))
    with pytest.raises(ValueError, match=r"rotary must have the positions of all heads, \(T,\) or \(..., 1, T\), got"):
        mha(*problem.inputs("float64"), **problem.static() | {"rotary": (of_heads, None)})


@every_engine
def test_positions_of_each_sample_equal_the_sample_alone(engine):
    problem = MhaProblem(**(LONG | {"batch": (2,)}))
    (params, query, key, value, bias), static = problem.inputs("float64"), problem.static() | {"engine": engine}
    places = np.random.default_rng(0).uniform(0, 30, (2, 1, 33))
    y, cache = mha(params, query, key, value, bias, **static | {"rotary": (table(places, frequencies(4)), None)})
    each, *_ = mha_vjp(cache, y, per_sample=True)
    for b in range(2):
        of_one = table(places[b, 0], frequencies(4))
        want, one = mha(params, query[b], key[b], value[b], bias, **static | {"rotary": (of_one, None)})
        all_close(y[b], want)
        all_close(tree.map(lambda a, b=b: a[b], each), mha_vjp(one, want)[0])


@grouped_engines
@pytest.mark.parametrize(("C", "n"), [(2, 3), (40, 2), (200, 1)])
@pytest.mark.parametrize("name", ["all per head", "all shared", "appended keys"])
def test_projections_recomputed_equal_those_kept(engine, name, C, n):
    """The wider the input, the fewer are recomputed: three, two or one; none where keys are appended."""
    problem = replace(GROUPED[name], Cq=C, Ck=C, Cv=C)
    kept, want = all_of(problem, engine, kept_numbers=2**60, kept_long=2**60)
    again, got = all_of(problem, engine, kept_numbers=0, kept_long=0)
    n = 0 if name == "appended keys" else n
    for group in again.groups:
        assert [type(x) for x in (group.q, group.k, group.v)] == [Recomputed] * n + [Kept] * (3 - n)
    for group in kept.groups:
        assert [type(x) for x in (group.q, group.k, group.v)] == [Kept] * 3
    all_close(got, want)


def test_projections_are_recomputed_up_to_a_seventh_of_the_time():
    """To project a head once is 2 C a row, all projections and their vjp are 24 C, and to attend with and back 14 T."""
    for T, S, C in [(256, 256, 384), (1024, 1024, 768), (1, 4096, 512), (4096, 7, 512), (16384, 16384, 512), (3, 5, 0)]:
        n = Plan().recomputed(T, S, C)
        share = [7 * 2 * C * i / max(24 * C + 14 * min(T, S), 1) for i in range(5)]
        assert share[n] <= 1
        assert n == 3 or share[n + 1] > 1
    assert Plan().recomputed(256, 256, 384) == 2


@pytest.mark.parametrize("numbers", [0, 2**60])
def test_what_is_small_is_kept(numbers):
    cache, _ = all_of(MhaProblem(**LONG), TILED, kept_numbers=numbers, kept_long=numbers)
    assert type(cache.groups[0].q) is (Kept if numbers else Recomputed)


@pytest.mark.parametrize(("T", "S", "apart"), [(32, 32, True), (31, 32, False), (32, 31, False)])
def test_long_sequences_go_head_by_head_forward(T, S, apart):
    """Where attention costs twenty times what the projections cost, k and v of all heads are never there at once."""
    cache, _ = all_of(
        MhaProblem(**(LONG | {"T": T, "S": S})),
        TILED,
        group_numbers=0,
        group_columns=0,
        kept_numbers=2**60,
        kept_long=2**60,
    )
    bases = {id(np.asarray(group.q.y.base)) for group in cache.groups}
    assert len(cache.groups) == 3
    assert len(bases) == (3 if apart else 1)


@every_engine
@pytest.mark.parametrize("name", ["all per head", "all shared"])
def test_one_head_takes_what_mha_takes(engine, name):
    problem = MhaProblem(**(LONG | {"K": 1, "G": 1}), qk_norm="layer", rotary="half of all", sink=True, softcap=0.5)
    params, *arrays = problem.inputs("float64")
    dy, dweights, dlse = problem.cotangents("float64")
    static = problem.static() | {"engine": engine}
    _, cache = mha(params, *arrays, **static)
    dparams, *want, _ = mha_vjp(cache, np.zeros_like(dy), dweights=dweights, dlse=dlse)
    o, one = head(head_params(params, 0), *arrays, **static)
    close(attention_weights(one), attention_weights(cache)[:, 0])
    close(log_sum_exp(one), log_sum_exp(cache)[:, 0])
    dhead, *got, _ = head_vjp(one, np.zeros_like(o), dweights=dweights[:, 0], dlse=dlse[:, 0])
    all_close(got, want)
    all_close(dhead, head_params(dparams, 0))


@every_engine
def test_learned_keys_are_not_learned_values(engine):
    compare_with_torch(engine, MhaProblem(D=8, E=8, bias_kv=True))


@every_engine
def test_biases_of_some_projections_of_one_input(engine):
    problem = MhaProblem(Ck=17, Cv=17, S=5)
    params, x, *_ = problem.inputs("float64")
    leaves = tree.flatten(params)
    some = tree.unflatten({leaf: a for leaf, a in leaves.items() if leaf not in ("k_proj.b", "v_proj.b")})
    zero = tree.unflatten(leaves | {leaf: 0 * leaves[leaf] for leaf in ("k_proj.b", "v_proj.b")})
    (y, cache), (want, whole) = (self_attention(p, x, engine=engine) for p in (some, zero))
    close(y, want)
    got, want = tree.flatten(self_attention_vjp(cache, y)[0]), tree.flatten(self_attention_vjp(whole, y)[0])
    for leaf, grad in got.items():
        close(grad, want[leaf])


# ── extremes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@each_path
@pytest.mark.parametrize("bias", ["none", "T S"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sink_far_above_all_scores_takes_all(engine, dtype, bias):
    problem = AttentionProblem(bias=bias)
    q, k, v, bias, _ = problem.inputs(dtype)
    sink = np.full(6, 1000.0, dtype)
    do, _, dlse = problem.cotangents(dtype)
    with np.errstate(over="raise", invalid="raise"):
        o, cache = attention(q, k, v, bias, sink, engine=engine)
        dq, dk, dv, _, dsink = attention_vjp(cache, do, dlse=dlse)
    assert (log_sum_exp(cache) == 1000).all()
    assert not any(a.any() for a in (o, attention_weights(cache), dq, dk, dv))
    np.testing.assert_allclose(dsink, dlse.sum(axis=(0, 2)), rtol=1e-5)


@each_path
def test_a_sink_far_above_scores_far_below_their_bound(engine):
    q, k, v = np.full((6, 5, 1), 32, "f4"), np.full((6, 7, 1), -32, "f4"), np.ones((6, 7, 2), "f4")
    with np.errstate(over="raise", invalid="raise"):
        o, cache = attention(q, k, v, None, np.full(6, -700, "f4"), engine=engine)
    assert np.allclose(log_sum_exp(cache), -700)
    assert not o.any()


@each_path
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("softcap", [1.0, 1000.0, 1e5])
def test_large_scores_under_a_softcap(engine, sign, softcap):
    rng = np.random.default_rng(0)
    q, k = 20 + 0.1 * rng.random((2, 3, 7, 4)), sign * (20 + 0.1 * rng.random((2, 3, 11, 4)))
    v, do = rng.standard_normal((2, 3, 11, 5)), rng.standard_normal((2, 3, 7, 5))
    results = []
    for each in (engine, SEQUENTIAL):
        o, cache = attention(q, k, v, softcap=softcap, scale=1.0, engine=each)
        results.append([o, log_sum_exp(cache), *attention_vjp(cache, do)[:3]])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@each_path
@pytest.mark.parametrize("per_head", [True, False])
def test_options_change_no_dtype(engine, per_head):
    problem = AttentionProblem(sink=True, softcap=0.5, scale=0.5, per_head=per_head, bias="... H T+S-1")
    o, cache = attention(*problem.inputs("float32"), **problem.static(), engine=engine)
    do, *_ = problem.cotangents("float32")
    found = [o, attention_weights(cache), log_sum_exp(cache), *arrays_of(attention_vjp(cache, do))]
    assert {a.dtype for a in found} == {np.dtype("float32")}


@each_path
def test_a_relative_bias_of_heads_without_a_batch(engine):
    problem = AttentionProblem(K=2, G=2)
    q, k, v, *_ = problem.inputs("float64")
    do, dweights, dlse = problem.cotangents("float64")
    bias = RelativeBias(np.random.default_rng(0).standard_normal((4, 11)))
    o, cache = attention(q, k, v, bias, engine=engine)
    want_o, want = attention(q, k, v, dense(bias, 5, 7), engine=SEQUENTIAL)
    close(o, want_o)
    *grads, dbias, _ = attention_vjp(cache, do, dweights=dweights, dlse=dlse)
    *want_grads, want_dbias, _ = attention_vjp(want, do, dweights=dweights, dlse=dlse)
    all_close(grads, want_grads)
    close(dbias.values, diagonal_sums(want_dbias))


def test_threads_change_no_bit_of_a_relative_bias_gradient(monkeypatch):
    problem = AttentionProblem(batch=(2,), T=700, S=713, K=2, G=2, D=16, E=24, mask="causal", bias="1 T+S-1")
    do, *_ = problem.cotangents("float32")
    results = []
    for n in ("1", "2", "3"):
        monkeypatch.setenv("FUNCMHA_NUM_THREADS", n)
        _, cache = attention(*problem.inputs("float32"), **problem.static(), engine=TILED)
        results.append(arrays_of(attention_vjp(cache, do)))
    for other in results[1:]:
        assert all(a is b is None or np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


# ── masks of some heads ──────────────────────────────────────────────────────────────────────────────────────────

OF_HEADS = {
    "heads": masks.as_mask(np.random.default_rng(0).random((2, 6, 5, 7)) < 0.5),
    "heads without a batch": masks.as_mask(np.random.default_rng(1).random((6, 5, 7)) < 0.5),
    "batch": masks.as_mask(np.random.default_rng(2).random((2, 1, 5, 7)) < 0.5),
    "neither": masks.as_mask(np.random.default_rng(3).random((5, 7)) < 0.5),
    "causal": masks.causal(2),
    "lengths": masks.lengths(np.array([3, 5])),
    "intersection": masks.as_mask(np.random.default_rng(4).random((6, 1, 7)) < 0.5) & masks.lengths(np.array([3, 6])),
}


@pytest.mark.parametrize("mask", OF_HEADS.values(), ids=OF_HEADS)
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 4), (5, 6)])
def test_a_mask_of_some_heads(mask, start, stop):
    whole = np.broadcast_to(mask.dense(5, 7), (2, 6, 5, 7))
    some = np.broadcast_to(mask.heads(start, stop).dense(5, 7), (2, stop - start, 5, 7))
    np.testing.assert_array_equal(some, whole[:, start:stop])


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

Q, K, V = (np.ones(s) for s in ((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 9)))


@pytest.mark.parametrize(
    ("args", "static", "error", "message"),
    [
        ((), {"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0"),
        ((), {"softcap": -1.0}, ValueError, "softcap must be above 0, got -1.0"),
        ((), {"softcap": np.inf}, ValueError, "softcap must be finite"),
        ((), {"softcap": "1"}, TypeError, "softcap must be a real number, got '1'"),
        (
            (),
            {"softcap": [1.0, 2.0]},
            ValueError,
            r"softcap must be a number, or \(H,\) with H=6 as in q, got shape \(2,\)",
        ),
        ((), {"softcap": (1.0,) * 5 + (0.0,)}, ValueError, "softcap must be finite and above 0, got"),
        (
            (),
            {"scale": np.ones(3)},
            ValueError,
            r"scale must be a number, or \(H,\) with H=6 as in q, got shape \(3,\)",
        ),
        ((), {"scale": (1.0,) * 5 + (np.nan,)}, ValueError, "scale must be finite, got"),
        ((), {"scale": np.array([1.0] * 5 + [np.nan])}, ValueError, r"scale must be finite, got \["),
        ((), {"dropout": Seeded(0, 1.0)}, ValueError, "dropout.rate must be at least 0 and below 1, got 1.0"),
        ((None, np.ones(3)), {}, ValueError, r"sink must be \(H\) with H=6 as in q, got \(3,\)"),
        ((None, np.ones((2, 6))), {}, ValueError, r"sink must be \(H\) with H=6 as in q, got \(2, 6\)"),
        ((None, np.ones(6, "f4")), {}, TypeError, "sink must have dtype float64 as q has, got float32"),
        ((RelativeBias(np.ones(12)),), {}, ValueError, r"bias.values must be .* with T=5 and S=7, got \(12,\)"),
        ((RelativeBias(np.ones((3, 11))),), {}, ValueError, r"bias.values must broadcast to \(..., H, T\+S-1\) = "),
        (
            (RelativeBias(np.ones(11, "f4")),),
            {},
            TypeError,
            "bias.values must have dtype float64 as q has, got float32",
        ),
    ],
)
@every_engine
def test_attention_refuses_options_by_name(args, static, error, message, engine):
    with pytest.raises(error, match=message):
        attention(Q, K, V, *args, **static, engine=engine)


def test_without_a_head_axis_there_is_one_number():
    q, k, v = Q[0, 0], K[0, 0], V[0, 0]
    with pytest.raises(ValueError, match=r"scale must be a number, as there is no head axis, got shape \(1,\)"):
        attention(q, k, v, scale=[1.0])
    with pytest.raises(ValueError, match=r"sink must be \(\), got \(1,\)"):
        attention(q, k, v, None, np.ones(1))


PLAIN = MhaProblem(D=8)
NORMED = MhaProblem(D=8, qk_norm="layer").inputs("float64")[0]


def positions(n, width=8):
    return table(np.arange(n), frequencies(width), pairs="half")


@pytest.mark.parametrize(
    ("params", "static", "error", "message"),
    [
        (NORMED, {}, ValueError, "qk_norm must be one that takes q_norm.w, as params have it, got None"),
        (
            NORMED,
            {"qk_norm": L2Norm()},
            ValueError,
            "qk_norm must be one that takes q_norm.w, as params have it, got L2Norm",
        ),
        (
            NORMED,
            {"qk_norm": RMSNorm()},
            ValueError,
            "qk_norm must be one that takes q_norm.b, as params have it, got RMSNorm",
        ),
        (
            None,
            {"qk_norm": "rms"},
            TypeError,
            "qk_norm must be RMSNorm, L2Norm or LayerNorm of funcmha.norms, or None, got 'rms'",
        ),
        (None, {"rotary": positions(5)}, ValueError, "rotary must have S=7 positions for the keys, got 5"),
        (None, {"rotary": (positions(7), None)}, ValueError, "rotary must have T=5 positions for the queries, got 7"),
        (None, {"rotary": (positions(5, 10), None)}, ValueError, "rotary must rotate D=8 features or fewer, got 10"),
        (
            None,
            {"rotary": (positions(5), positions(7), None)},
            TypeError,
            "rotary must be a table .*, or two, .*, got 3",
        ),
        (None, {"rotary": np.ones((5, 4))}, TypeError, "rotary must be a table of funcmha.rotary, or two, got ndarray"),
        (None, {"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0"),
        (None, {"softcap": [1.0]}, ValueError, r"softcap must be a number, or \(H,\) with H=6 .*, got shape \(1,\)"),
        (None, {"dropout": Seeded(0, 1.0)}, ValueError, "dropout.rate must be at least 0 and below 1, got 1.0"),
        (
            None,
            {"bias": RelativeBias(np.ones(11)), "zero_attn": True},
            ValueError,
            "bias must be an array with .*zero_attn",
        ),
        (
            None,
            {"bias": np.ones((2, 5, 7)), "zero_attn": True},
            ValueError,
            r"bias must broadcast to \(..., H, T, S\) = \(2, 6, 5, 7\), got \(2, 5, 7\)",
        ),
        (None, {"bias": RelativeBias(np.ones((2, 11)))}, ValueError, "bias.values must broadcast"),
    ],
)
@every_engine
def test_mha_refuses_options_by_name(params, static, error, message, engine):
    plain, *arrays = PLAIN.inputs("float64")
    arrays[3] = static.get("bias")
    static = {name: x for name, x in static.items() if name != "bias"}
    with pytest.raises(error, match=message):
        mha(params or plain, *arrays, **static, engine=engine)


def test_a_sink_is_one_number_for_each_head():
    params, *arrays = MhaProblem(sink=True).inputs("float64")
    params["sink"]["w"] = np.ones(2)
    with pytest.raises(ValueError, match=r"sink.w must be \(H\) with H=6 as in q_proj.w, got \(2,\)"):
        mha(params, *arrays)
