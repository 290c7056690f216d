"""What a fully masked query holds has no effect, nor its cotangents and tangents, whatever they are: to the bit.

The oracle is the same call with finite numbers in their place. Unattended keys are tested beside each op.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_derivatives_forward import numbers, other

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
    packing,
    self_attention,
    self_attention_vjp,
    tree,
)
from funcmha.derivatives import attention_jvp, attention_vjp_jvp, head_jvp, mha_jvp, mha_vjp_jvp
from funcmha.kv_cache import step, step_vjp
from funcmha.ops import scores, scores_vjp
from funcmha.testing.strategies import AttentionProblem, MhaProblem

T, S = 5, 7
SOME = np.array([True, True, False, True, False])
BY_HEAD = np.ones((6, T, S), bool)
BY_HEAD[1, 2], BY_HEAD[4, :3] = False, False
MASKS = {  # each masks some queries fully, of some heads or samples
    "rows": np.repeat(SOME[:, None], S, axis=1),
    "causal": masks.causal(-2),
    "causal & padding": masks.causal() & masks.padding(np.arange(S) >= 2),
    "lengths": masks.lengths(np.array([0, 4])),
    "offsets": masks.causal(np.array([-1, 2])),
    "segments": masks.segments(np.array([0, 0, 9, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1])),
    "segments & array": masks.segments(np.array([0, 0, 9, 1, 1]), np.arange(S) // 4) & SOME[:, None],
    "spans": packing.causal(packing.cumulative([2, 3]), packing.cumulative([1, 6]), offset=np.array([-1, 0])),
    "heads": BY_HEAD,
    "no keys": masks.padding(np.zeros(S, bool)),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
each_garbage = pytest.mark.parametrize("garbage", [np.nan, np.inf])
EVERYTHING = AttentionProblem(bias="... H T S", sink=True, softcap=0.5, seeded=True, rate=0.3)


def empty_rows(mask, heads=6):
    """Which queries are fully masked (2, heads, T, 1), from the booleans of the mask."""
    allowed = mask.dense(T, S) if isinstance(mask, masks.Mask) else mask
    return ~np.broadcast_to(allowed, (2, heads, T, S)).any(axis=-1, keepdims=True)


def in_no_head(mask):
    """Which queries are fully masked in every head (2, T, 1)."""
    return empty_rows(mask).all(axis=1)


def same(got, want):
    for a, b in zip(numbers(got), numbers(want), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(np.where(np.isneginf(a), 0, a)).all()  # −∞ is a log-sum-exp


def everything(engine, problem, mask, q, do):
    """What attention gives, and its gradients."""
    _, k, v, bias, sink = problem.inputs("float64")
    static, (_, dweights, dlse) = problem.static() | {"mask": mask}, problem.cotangents("float64")
    o, cache = attention(q, k, v, bias, sink, **static, engine=engine)
    return o, attention_weights(cache), log_sum_exp(cache), *attention_vjp(cache, do, dweights=dweights, dlse=dlse)


@each_mask
@each_garbage
@pytest.mark.parametrize("problem", [AttentionProblem(), EVERYTHING], ids=["plain", "everything"])
def test_a_fully_masked_query_has_no_effect(engine, problem, mask, garbage):
    (q, *_), (do, *_) = problem.inputs("float64"), problem.cotangents("float64")
    same(*(everything(engine, problem, mask, np.where(empty_rows(mask), x, q), do) for x in (garbage, 0.5)))


@each_mask
@each_garbage
@pytest.mark.parametrize("problem", [AttentionProblem(), EVERYTHING], ids=["plain", "everything"])
def test_the_cotangent_of_a_fully_masked_query_has_no_effect(engine, problem, mask, garbage):
    (q, *_), (do, *_) = problem.inputs("float64"), problem.cotangents("float64")
    same(*(everything(engine, problem, mask, q, np.where(empty_rows(mask), x, do)) for x in (garbage, 0.5)))


@each_mask
def test_a_fully_masked_query_has_gradient_zero(engine, mask):
    (q, k, v, *_), (do, *_) = AttentionProblem().inputs("float64"), AttentionProblem().cotangents("float64")
    empty = empty_rows(mask)
    _, cache = attention(np.where(empty, np.nan, q), k, v, mask=mask, engine=engine)
    dq, *_ = attention_vjp(cache, np.where(empty, np.nan, do))
    assert not np.where(empty, dq, 0).any()


def test_attention_without_a_head_axis_has_queries_too(engine):
    q, k, v, do = (np.random.default_rng(0).standard_normal(s) for s in ((5, 3), (7, 3), (7, 2), (5, 2)))
    masked = np.arange(5)[:, None] < 2

    def run(x):
        o, cache = attention(np.where(masked, x, q), k, v, mask=masks.causal(-2), engine=engine)
        return o, *attention_vjp(cache, np.where(masked, x, do))

    same(run(np.nan), run(0.5))


def test_the_cotangent_of_a_weight_that_is_zero_has_no_effect(engine):
    """−∞ is what the derivative of an entropy is there, and 0 · ∞ is NaN."""
    (q, k, v, *_), (do, dweights, _) = AttentionProblem().inputs("float64"), AttentionProblem().cotangents("float64")
    mask = masks.causal()
    _, cache = attention(q, k, v, mask=mask, engine=engine)
    same(*(attention_vjp(cache, do, dweights=np.where(mask.dense(T, S), dweights, x)) for x in (-np.inf, 0.5)))


@each_mask
@each_garbage
def test_a_fully_masked_query_has_no_effect_on_scores(mask, garbage):
    q, k, *_ = AttentionProblem().inputs("float64")
    dz = np.random.default_rng(1).standard_normal((2, 6, T, S))

    def run(x):
        z, cache = scores(np.where(empty_rows(mask), x, q), k, mask=mask)
        return z, *scores_vjp(cache, dz)

    same(run(garbage), run(0.5))


# ── tangents ─────────────────────────────────────────────────────────────────────────────────────────────────────


@each_mask
@each_garbage
@pytest.mark.parametrize("problem", [AttentionProblem(), EVERYTHING], ids=["plain", "everything"])
def test_a_tangent_of_a_fully_masked_query_has_no_effect(engine, problem, mask, garbage):
    _, cache = attention(*problem.inputs("float64"), **problem.static() | {"mask": mask}, engine=engine)
    q_dot, *dots = other(problem).inputs("float64")
    same(*(attention_jvp(cache, np.where(empty_rows(mask), x, q_dot), *dots) for x in (garbage, 0.5)))


@pytest.mark.slow
@each_mask
@each_garbage
@pytest.mark.parametrize("which", ["do", "do_dot", "q_dot"])
def test_nor_has_any_at_second_order(engine, which, mask, garbage):
    _, cache = attention(*EVERYTHING.inputs("float64"), **EVERYTHING.static() | {"mask": mask}, engine=engine)
    (do, *_), (do_dot, *_) = EVERYTHING.cotangents("float64"), other(EVERYTHING).cotangents("float64")
    q_dot, *dots = other(EVERYTHING).inputs("float64")
    given = {"do": do, "do_dot": do_dot, "q_dot": q_dot}

    def run(x):
        spoilt = given | {which: np.where(empty_rows(mask), x, given[which])}
        return attention_vjp_jvp(cache, *spoilt.values(), *dots)

    same(run(garbage), run(0.5))


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────────────


@each_mask
@each_garbage
@pytest.mark.parametrize(
    "problem", [MhaProblem(), MhaProblem(qk_norm="rms", sink=True)], ids=["plain", "norm and sink"]
)
def test_a_fully_masked_query_has_no_effect_on_mha(engine, problem, mask, garbage):
    params, query, *others = problem.inputs("float64")
    dy, dweights, dlse = problem.cotangents("float64")
    static = problem.static() | {"mask": mask}

    def run(x):
        y, cache = mha(params, np.where(in_no_head(mask), x, query), *others, **static, engine=engine)
        return y, log_sum_exp(cache), mha_vjp(cache, dy, dweights=dweights, dlse=dlse)

    same(run(garbage), run(0.5))


@pytest.mark.parametrize("mask", [mask for name, mask in MASKS.items() if name != "heads"])
def test_a_fully_masked_query_has_no_effect_on_a_head(engine, mask):
    params, query, *others = MhaProblem().inputs("float64")

    def run(x):
        o, cache = head(head_params(params, 0), np.where(in_no_head(mask), x, query), *others, mask=mask, engine=engine)
        return o, head_vjp(cache, np.ones_like(o))

    same(run(np.nan), run(0.5))


@pytest.mark.parametrize("mask", [mask for name, mask in MASKS.items() if name != "no keys"])
def test_a_cotangent_without_keys_reaches_out_proj_alone(engine, mask):
    params, *inputs = MhaProblem().inputs("float64")
    dy, *_ = MhaProblem().cotangents("float64")
    _, cache = mha(params, *inputs, mask=mask, engine=engine)
    (spoilt, *dxs), (want, *clean) = (mha_vjp(cache, np.where(in_no_head(mask), x, dy)) for x in (np.nan, 0.5))
    assert np.isnan(spoilt["out_proj"]["b"]).all() == in_no_head(mask).any()
    same((*(g for name, g in spoilt.items() if name != "out_proj"), *dxs), (
        *(g for name, g in want.items() if name != "out_proj"), *clean))  # fmt: skip


def test_with_an_appended_key_no_query_is_fully_masked(engine):
    params, query, *others = MhaProblem(bias_kv=True).inputs("float64")
    query = np.where(np.arange(T)[:, None] == 0, np.nan, query)
    y, _ = mha(params, query, *others, mask=masks.causal(-2), engine=engine)
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1:]).all()


# ── no queries, no keys ──────────────────────────────────────────────────────────────────────────────────────────

ALIKE = {  # each allows all that there is, and most by one row or column for all
    "none": lambda T, S: None,
    "one": lambda T, S: np.ones((1, 1), bool),
    "row": lambda T, S: np.ones((1, S), bool),
    "column": lambda T, S: np.ones((T, 1), bool),
    "heads": lambda T, S: np.ones((6, 1, 1), bool),
    "lengths": lambda T, S: masks.lengths(np.array([7, 9])),
    "padding": lambda T, S: masks.padding(np.ones(S, bool)),
    "window": lambda T, S: masks.window(9, 9),
    "and": lambda T, S: masks.lengths(9) & np.ones((1, 1), bool),
    "or": lambda T, S: masks.lengths(9) | masks.window(9, 9),
    "not": lambda T, S: ~masks.lengths(0),
}


@pytest.mark.parametrize("mask", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize(("T", "S"), [(0, 7), (5, 0)])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_nothing_is_attended_without_queries_or_keys(engine, mask, T, S, norm):
    """All of query, key and value is then garbage, and so are their tangents."""
    problem = MhaProblem(T=T, S=S, qk_norm=norm, sink=True)
    (params, *inputs, _), (dy, dweights, dlse) = problem.inputs("float64"), problem.cotangents("float64")
    params_dot, *dots, _ = other(problem).inputs("float64")

    def run(x):
        given, tangents = ([np.full_like(a, x) for a in arrays] for arrays in (inputs, dots))
        y, cache = mha(params, *given, **problem.static() | {"mask": mask(T, S)}, engine=engine)
        yield y, mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
        yield mha_jvp(cache, params_dot, *tangents), mha_vjp_jvp(cache, dy, dy, params_dot, *tangents)

    same(tuple(run(np.nan)), tuple(run(0.5)))


@pytest.mark.parametrize(("T", "S"), [(0, 7), (5, 0)])
@pytest.mark.parametrize("mask", [None, masks.lengths(9)], ids=["none", "lengths"])
def test_nor_is_anything_in_a_head_or_in_attention(engine, mask, T, S):
    params, *inputs, _ = MhaProblem(T=T, S=S).inputs("float64")
    q, k, v, *_ = AttentionProblem(T=T, S=S).inputs("float64")

    def run(x):
        for f, f_vjp, first, arrays in (
            (head, head_vjp, (head_params(params, 0),), inputs),
            (attention, attention_vjp, (), (q, k, v)),
        ):
            y, cache = f(*first, *(np.full_like(a, x) for a in arrays), mask=mask, engine=engine)
            yield y, f_vjp(cache, np.ones_like(y))

    same(tuple(run(np.nan)), tuple(run(0.5)))


@pytest.mark.parametrize("garbage", ["query", "key"])
def test_keys_are_appended_where_there_are_none(engine, garbage):
    """With bias_kv each query attends a key though S = 0, and none of those given though T = 0."""
    problem = MhaProblem(bias_kv=True, **({"S": 0} if garbage == "query" else {"T": 0}))
    (params, *inputs, _), (dy, *_) = problem.inputs("float64"), problem.cotangents("float64")

    def gradient(x):
        _, cache = mha(params, *(np.full_like(a, x) for a in inputs), engine=engine)
        return mha_vjp(cache, dy)

    if garbage == "query":
        assert np.isnan(gradient(np.nan)[0]["q_proj"]["w"]).all()
    else:
        same(gradient(np.nan), gradient(0.5))


SQUARE = replace(MhaProblem(), Cq=17, Ck=17, Cv=17, S=T)
IN_TURN = replace(SQUARE, D=64, E=64, K=4, G=1)  # whose projections go back in turn, not as one product


@each_garbage
@pytest.mark.parametrize("problem", [SQUARE, IN_TURN], ids=["one product", "in turn"])
def test_a_token_that_no_attention_reaches_has_no_effect(engine, problem, garbage):
    params, x, *_ = problem.inputs("float64")
    dy, *_ = problem.cotangents("float64")
    mask = masks.causal() & masks.padding(np.arange(T) >= 2)  # padded on the left

    def run(value):
        y, cache = self_attention(params, np.where(np.arange(T)[:, None] < 2, value, x), mask=mask, engine=engine)
        return y, self_attention_vjp(cache, dy)

    same(run(garbage), run(0.5))


@pytest.mark.parametrize("mask", [masks.causal(-1), masks.causal(1) & SOME[None], masks.causal(-1) & SOME[None]])
@pytest.mark.parametrize("problem", [SQUARE, IN_TURN], ids=["one product", "in turn"])
def test_a_token_attended_or_attending_keeps_its_gradients(engine, problem, mask):
    """Those of three inputs that are no longer one array: each is zeroed for itself."""
    params, x, *_ = problem.inputs("float64")
    dy, *_ = problem.cotangents("float64")
    _, cache = self_attention(params, x, mask=mask, engine=engine)
    _, apart = mha(params, x, x.copy(), x.copy(), mask=mask, engine=engine)
    dparams, dx, _ = self_attention_vjp(cache, dy)
    want, *dxs, _ = mha_vjp(apart, dy)
    tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), dparams, want)
    np.testing.assert_allclose(dx, sum(dxs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_a_padded_token_has_no_effect_on_a_chain_of_steps(engine, norm):
    problem = replace(SQUARE, qk_norm=norm)
    (params, x, *_), (dy, *_), static = problem.inputs("float64"), problem.cotangents("float64"), problem.static()
    padded = np.arange(T) < 2  # on the left

    def run(value):
        tokens, kv, caches, ys, grads, dkv = np.where(padded[:, None], value, x), None, [], [], [], None
        for t in (slice(0, 3), slice(3, 5)):
            mask = masks.padding(~padded[: t.stop])
            (y, kv), cache = step(params, tokens[:, t], kv, mask=mask, qk_norm=static.get("qk_norm"), engine=engine)
            ys.append(y)
            caches.append(cache)
        for t, cache in ((slice(3, 5), caches[1]), (slice(0, 3), caches[0])):
            dparams, dx, dkv, _ = step_vjp(cache, (dy[:, t], dkv))
            grads += [dparams, dx]
        return *ys, *grads

    same(run(np.nan), run(0.5))


@pytest.mark.slow
@each_mask
@each_garbage
def test_a_masked_query_s_tangent_has_no_effect_on_mha(engine, mask, garbage):
    problem = MhaProblem(qk_norm="layer", sink=True)
    _, cache = mha(*problem.inputs("float64"), **problem.static() | {"mask": mask}, engine=engine)
    params_dot, query_dot, *dots = other(problem).inputs("float64")
    (dy, *_), (dy_dot, *_) = problem.cotangents("float64"), other(problem).cotangents("float64")

    def run(x):
        spoilt = params_dot, np.where(in_no_head(mask), x, query_dot), *dots
        return mha_jvp(cache, *spoilt), mha_vjp_jvp(cache, dy, dy_dot, *spoilt)

    same(run(garbage), run(0.5))


def test_a_masked_query_s_tangent_has_no_effect_on_a_head(engine):
    params, *inputs, _ = MhaProblem().inputs("float64")
    _, cache = head(head_params(params, 0), *inputs, mask=masks.causal(-2), engine=engine)
    params_dot, query_dot, *dots, _ = other(MhaProblem()).inputs("float64")
    empty = np.arange(T)[:, None] < 2
    same(*(head_jvp(cache, head_params(params_dot, 0), np.where(empty, x, query_dot), *dots) for x in (np.nan, 0.5)))
