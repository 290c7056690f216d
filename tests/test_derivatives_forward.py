"""Forward mode: against torch.func.jvp in float64, the complex step, and the vjp from the other side."""

import warnings
from dataclasses import replace

import hypothesis.strategies as st
import ml_dtypes
import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from test_ops import MODERATE, portable

from funcmha import (
    attention,
    attention_vjp,
    head,
    head_params,
    linear,
    linear_vjp,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    ops,
    self_attention,
    tree,
)
from funcmha.biases import RelativeBias
from funcmha.derivatives import attention_jvp, head_jvp, linear_jvp, mha_jvp, mha_vjp_jvp
from funcmha.engines import TILED, Plan
from funcmha.testing.strategies import (
    MODERN,
    MODERN_MHA,
    AttentionProblem,
    MhaProblem,
    attention_problems,
    mha_problems,
)

STEP = 1e-30
ON_THREADS = TILED._replace(plan=Plan(tile_rows=16, tile_cols=8, whole_scores=0, thread_flops=0))

EVERYTHING = AttentionProblem(
    T=13, S=17, bias="... H T+S-1", sink=True, softcap=0.5, per_head=True, scale=0.5, mask="intersection", rate=0.3
)
EDGES = (
    EVERYTHING,
    replace(EVERYTHING, seeded=True, bias="... 1 1 S"),
    AttentionProblem(T=7, S=7),
    AttentionProblem(S=0),
    AttentionProblem(S=0, sink=True),
    AttentionProblem(T=0, bias="1 T+S-1"),
    AttentionProblem(mask="empty rows", bias="H T S"),
    AttentionProblem(mask="empty rows", sink=True),
)


def on_edges(test):
    for problem in EDGES:
        test = example(problem)(test)
    return test


def other(problem):
    """The same problem with other numbers, of size 1: what its inputs are tangents of."""
    return replace(problem, seed=problem.seed + 1, family="normal", gain=1.0)


def numbers(x):
    """The arrays of inputs, gradients or tangents, in order."""
    if isinstance(x, dict):
        return [a for child in x.values() for a in numbers(child)]
    if isinstance(x, tuple) and not isinstance(x, RelativeBias):
        return [a for child in x for a in numbers(child)]
    return [] if x is None else [x.values if isinstance(x, RelativeBias) else x]


def like(template, arrays):
    """The arrays of `numbers` in the place of those of a template."""
    if isinstance(template, RelativeBias):
        return RelativeBias(next(arrays))
    if isinstance(template, dict):
        return {key: like(child, arrays) for key, child in template.items()}
    if isinstance(template, tuple):
        return tuple(like(child, arrays) for child in template)
    return None if template is None else next(arrays)


def close(got, want, what="", bar=1e-11):
    """T3: within 1e-11 of the largest value wanted, or of 1."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    assert np.abs(got - want).max(initial=0.0) <= bar * max(1.0, np.abs(want).max(initial=0.0)), what


def same_inner_product(outputs, inputs, bar=1e-13):
    """Σ ⟨dy, ẏ⟩ = Σ ⟨dx, ẋ⟩, to rounding of the sums, or of 1."""
    left, right = (np.concatenate([np.zeros(0)] + [np.ravel(a * b) for a, b in pairs]) for pairs in (outputs, inputs))
    assert abs(left.sum() - right.sum()) <= bar * max(1.0, np.abs(left).sum() + np.abs(right).sum())


def torch_jvp(f, inputs, dots):
    """The tangents of o and lse, by torch's forward mode."""

    def flat(*leaves):
        o, _, lse = f(*like(inputs, iter(leaves)))
        return o, torch.where(torch.isinf(lse), 0.0, lse)

    leaves, tangents = ([torch.tensor(np.array(a, np.float64)) for a in numbers(x)] for x in (inputs, dots))
    with warnings.catch_warnings():  # of torch's own: it compiles scripts when it differentiates forwards at first
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.jvp(flat, tuple(leaves), tuple(tangents))[1]


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_attention_jvp_matches_torch(engine, problem):
    arrays, static, dots = problem.inputs("float64"), problem.static(), other(problem).inputs("float64")
    _, cache = attention(*arrays, **static, engine=engine)
    want = torch_jvp(lambda *x: oracles.attention(*x, **static), arrays, dots)
    for what, a, b in zip(("o", "lse"), attention_jvp(cache, *dots), want, strict=True):
        close(a, b, what)


@given(attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_jvp_and_vjp_are_each_other_s_adjoint(engine, problem):
    arrays, dots = problem.inputs("float64"), other(problem).inputs("float64")
    do, _, dlse = problem.cotangents("float64")
    _, cache = attention(*arrays, **problem.static(), engine=engine)
    o_dot, lse_dot = attention_jvp(cache, *dots)
    grads = attention_vjp(cache, do, dlse=dlse)
    same_inner_product([(do, o_dot), (dlse, lse_dot)], list(zip(numbers(grads), numbers(dots), strict=True)), bar=1e-13)


@given(attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_jvp_is_the_complex_step(engine, problem):
    arrays, dots = problem.inputs("float64"), other(problem).inputs("float64")
    moved = like(arrays, (a + 1j * STEP * d for a, d in zip(numbers(arrays), numbers(dots), strict=True)))
    o, cache = ops.attention(*moved, **problem.static())
    _, real = attention(*arrays, **problem.static(), engine=engine)
    o_dot, lse_dot = attention_jvp(real, *dots)
    close(o_dot, np.imag(o) / STEP)
    close(lse_dot, np.imag(log_sum_exp(cache)) / STEP)


@given(attention_problems(**MODERN), st.lists(st.booleans(), min_size=5, max_size=5))
def test_no_tangent_is_a_tangent_of_zeros(engine, problem, given_):
    dots = other(problem).inputs("float64")
    some = tuple(x if keep else None for x, keep in zip(dots, given_, strict=True))
    zeros = like(dots, iter([a if any(a is b for b in numbers(some)) else np.zeros_like(a) for a in numbers(dots)]))
    _, cache = attention(*problem.inputs("float64"), **problem.static(), engine=engine)
    for got, want in zip(attention_jvp(cache, *some), attention_jvp(cache, *zeros), strict=True):
        close(got, want)


def test_jvp_of_every_array_library_is_the_same(engine, xp):
    problem = replace(EVERYTHING, bias="... H 1 S")
    arrays, static, dots = problem.inputs("float64"), problem.static(), other(problem).inputs("float64")
    _, cache = attention(*arrays, **static, engine=engine)
    want = attention_jvp(cache, *dots)
    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    _, cache = attention(*map(xp.to, arrays), **static, engine=portable(engine))
    for a, b in zip(attention_jvp(cache, *map(xp.to, dots)), want, strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_a_tangent_of_what_is_masked_has_no_effect(engine, garbage):
    problem, attended = AttentionProblem(bias="... H T S"), np.array([True, False, True, True, False, False, True])
    mask = np.broadcast_to(attended, (problem.T, problem.S))
    dots = other(problem).inputs("float64")
    spoilt = (
        dots[0],
        *(np.where(attended[:, None], x, garbage) for x in dots[1:3]),
        np.where(mask, dots[3], garbage),
        None,
    )
    _, cache = attention(*problem.inputs("float64"), mask=mask, engine=engine)
    for a, b in zip(attention_jvp(cache, *spoilt), attention_jvp(cache, *dots), strict=True):
        close(a, b)


def test_an_empty_row_does_not_change(engine):
    problem, mask = AttentionProblem(), np.ones((5, 7), bool)
    mask[2] = False
    _, cache = attention(*problem.inputs("float64"), mask=mask, engine=engine)
    q_dot, k_dot, v_dot, *_ = other(problem).inputs("float64")
    q_dot = np.where(mask.any(1)[:, None], q_dot, np.nan)
    for x_dot in attention_jvp(cache, q_dot, k_dot, v_dot):
        assert not x_dot[:, :, 2].any()
        assert np.isfinite(x_dot).all()


def test_jvp_without_a_head_axis_equals_one_head(engine):
    problem = AttentionProblem(batch=(), K=1, G=1, sink=True)
    arrays, dots = problem.inputs("float64"), other(problem).inputs("float64")
    _, cache = attention(*arrays, mask=masks.causal(2), engine=engine)
    _, alone = attention(*(None if a is None else a[0, ...] for a in arrays), mask=masks.causal(2), engine=engine)
    got = attention_jvp(alone, *(None if d is None else d[0, ...] for d in dots))
    for a, b in zip(got, attention_jvp(cache, *dots), strict=True):
        close(a, b[0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_jvp_of_half_types_is_rounded_once(engine, dtype):
    problem = AttentionProblem(bias="... H T+S-1", sink=True, mask="causal")
    arrays, dots = problem.inputs(dtype), other(problem).inputs(dtype)
    _, cache = attention(*arrays, **problem.static(), engine=engine)
    arrays, dots_32 = (like(x, (a.astype(np.float32) for a in numbers(x))) for x in (arrays, dots))
    _, cache_32 = attention(*arrays, **problem.static(), engine=engine)
    for got, want in zip(attention_jvp(cache, *dots), attention_jvp(cache_32, *dots_32), strict=True):
        assert got.dtype == dtype
        assert want.dtype == np.float32
        assert np.array_equal(got, want.astype(dtype))


def test_jvp_keeps_the_digits_of_saturated_rows():
    """ṗ = p (ż − Σ p ż) cancels where p is almost 1: with spread 30, not one digit is left of the plain form."""
    rng = np.random.default_rng(7)
    bias, bias_dot = 30 * rng.standard_normal((5, 7)), 100 + rng.standard_normal((5, 7))
    _, cache = ops.attention(np.zeros((5, 1)), np.zeros((7, 1)), np.eye(7), bias)
    p_dot, _ = attention_jvp(cache, None, None, None, bias_dot)
    with mpmath.workdps(100):
        for row, tangent, got in zip(bias, bias_dot, p_dot, strict=True):
            e = [mpmath.exp(mpmath.mpf(float(z))) for z in row]
            weights = [z / sum(e) for z in e]
            mean = sum(w * mpmath.mpf(float(t)) for w, t in zip(weights, tangent, strict=True))
            for w, t, g in zip(weights, tangent, got, strict=True):
                want = w * (mpmath.mpf(float(t)) - mean)
                assert abs(want - float(g)) <= 1e-13 * 31 * abs(want)


def test_jvp_gives_the_same_bits_on_many_threads(monkeypatch):
    problem = replace(EVERYTHING, T=64, S=65)
    _, cache = attention(*problem.inputs("float32"), **problem.static(), engine=ON_THREADS)
    dots = other(problem).inputs("float32")
    want = attention_jvp(cache, *dots)
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "3")
    for a, b in zip(attention_jvp(cache, *dots), want, strict=True):
        assert np.array_equal(a, b)


# ── linear ─────────────────────────────────────────────────────────────────────────────────────────────


def some(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("shapes", [[(2, 5, 3), (7, 3), (7,)], [(5, 3), (7, 3)], [(0, 3), (7, 3), (7,)]])
def test_linear_jvp_is_the_adjoint_of_its_vjp(shapes):
    inputs, dots = some(0, *shapes), some(1, *shapes)
    y, cache = linear(*inputs)
    (dy,) = some(2, y.shape)
    grads = [g for g in linear_vjp(cache, dy) if g is not None]
    same_inner_product([(dy, linear_jvp(cache, *dots))], list(zip(grads, dots, strict=True)))
    assert not linear_jvp(cache).any()


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────

EVERYTHING_MHA = MhaProblem(
    T=5, S=5, mask="heads", bias="... H 1 S", sink=True, softcap=0.5, rate=0.3, qk_norm="layer", rotary="half of all"
)
MHA_EDGES = (
    EVERYTHING_MHA,
    replace(EVERYTHING_MHA, bias_kv=True, zero_attn=True, qk_norm="rms", rotary="interleaved of some", Ck=17, Cv=17),
    replace(EVERYTHING_MHA, qk_norm="l2", bias="1 T+S-1", biases=False),
    replace(EVERYTHING_MHA, T=32, S=33, Cq=2, Ck=1, Cv=2),  # where q, k and v are recomputed
    MhaProblem(K=3, G=2, mask="empty rows", zero_attn=True),
)


def on_mha_edges(test):
    for problem in MHA_EDGES:
        test = example(problem)(test)
    return test


@given(mha_problems(**(MODERN | MODERN_MHA | {"gain": st.just(1.0), "family": st.sampled_from(["normal", "ties"])})))
@on_mha_edges
def test_mha_jvp_and_vjp_are_each_other_s_adjoint(engine, problem):
    inputs, dots = problem.inputs("float64"), other(problem).inputs("float64")
    dy, _, dlse = problem.cotangents("float64")
    _, cache = mha(*inputs, **problem.static(), engine=engine)
    y_dot, lse_dot = mha_jvp(cache, *dots)
    grads = mha_vjp(cache, dy, dlse=dlse)
    flat = tree.flatten(dots[0])
    params = [(g, flat[leaf]) for leaf, g in tree.flatten(grads[0]).items()]
    pairs = params + list(zip(numbers(grads[1:]), numbers(dots[1:]), strict=True))
    same_inner_product([(dy, y_dot), (dlse, lse_dot)], pairs, bar=1e-13)


@pytest.mark.parametrize("problem", MHA_EDGES)
def test_mha_jvp_matches_torch(engine, problem):
    inputs, static, dots = problem.inputs("float64"), problem.static(), other(problem).inputs("float64")
    _, cache = mha(*inputs, **static, engine=engine)
    want = torch_jvp(lambda *x: oracles.mha(*x, **static), inputs, dots)
    for a, b in zip(mha_jvp(cache, *dots), want, strict=True):
        close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("given_", [(0,), (1,), (2, 3), (4,), ()])
def test_no_tangent_of_mha_is_a_tangent_of_zeros(engine, given_):
    for problem in MHA_EDGES:
        inputs, dots = problem.inputs("float64"), other(problem).inputs("float64")
        _, cache = mha(*inputs, **problem.static(), engine=engine)
        some = tuple(x if i in given_ else None for i, x in enumerate(dots))
        zeros = tuple(x if i in given_ else like(x, map(np.zeros_like, numbers(x))) for i, x in enumerate(dots))
        for got, want in zip(mha_jvp(cache, *some), mha_jvp(cache, *zeros), strict=True):
            close(got, want)


@pytest.mark.parametrize(
    "absent", ["all", "q_proj.w k_proj.w", "q_proj.b out_proj.b q_norm.w k_norm.b bias_kv.v sink.w"]
)
def test_no_tangent_of_a_leaf_is_a_tangent_of_zeros(engine, absent):
    problem = MhaProblem(qk_norm="layer", sink=True, bias_kv=True)
    (params_dot, *dots), (dy, *_) = other(problem).inputs("float64"), problem.cotangents("float64")
    _, cache = mha(*problem.inputs("float64"), **problem.static(), engine=engine)
    leaves = tree.flatten(params_dot)
    without = set(leaves) if absent == "all" else set(absent.split())
    some = tree.unflatten({name: None if name in without else x for name, x in leaves.items()})
    zeros = tree.unflatten({name: 0 * x if name in without else x for name, x in leaves.items()})
    for f in (mha_jvp, lambda cache, *dots: mha_vjp_jvp(cache, dy, None, *dots)):
        for got, want in zip(numbers(f(cache, some, *dots)), numbers(f(cache, zeros, *dots)), strict=True):
            close(got, want)


def test_no_tangent_of_a_leaf_of_a_head_is_one_of_zeros(engine):
    problem = MhaProblem()
    (params, *inputs, _), (params_dot, *_) = problem.inputs("float64"), other(problem).inputs("float64")
    _, cache = head(head_params(params, 0), *inputs, engine=engine)
    own = head_params(params_dot, 0)
    some, zeros = (own | {"q_proj": {"w": w, "b": own["q_proj"]["b"]}} for w in (None, 0 * own["q_proj"]["w"]))
    for got, want in zip(head_jvp(cache, some), head_jvp(cache, zeros), strict=True):
        close(got, want)


def test_mha_jvp_of_every_array_library_is_the_same(engine, xp):
    problem = replace(EVERYTHING_MHA, bias_kv=True, zero_attn=True)
    inputs, static, dots = problem.inputs("float64"), problem.static(), other(problem).inputs("float64")
    want = mha_jvp(mha(*inputs, **static, engine=engine)[1], *dots)
    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    _, cache = mha(*map(xp.tree, inputs), **static, engine=portable(engine))
    for a, b in zip(mha_jvp(cache, *map(xp.tree, dots)), want, strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


def test_half_types_of_mha_are_rounded_once_forwards(engine):
    problem = MHA_EDGES[1]
    inputs, dots = problem.inputs(np.float16), other(problem).inputs(np.float16)
    upcast = [like(x, (a.astype(np.float32) for a in numbers(x))) for x in (inputs, dots)]
    _, cache = mha(*inputs, **problem.static(), engine=engine)
    _, cache_32 = mha(*upcast[0], **problem.static(), engine=engine)
    for got, want in zip(mha_jvp(cache, *dots), mha_jvp(cache_32, *upcast[1]), strict=True):
        assert got.dtype == np.float16
        assert np.array_equal(got, want.astype(np.float16))


HEADS = {
    "bias of each sample": (replace(EVERYTHING_MHA, mask="lengths", bias="none", rate=0.0, K=1, G=1), (2, 5, 5)),
    "bias of all": (MhaProblem(K=1, G=1, bias_kv=True, zero_attn=True, qk_norm="rms", rate=0.3, seeded=True), (1, 7)),
    "relative bias of each sample": (MhaProblem(K=1, G=1, mask="causal"), (2, 11)),
    "recomputed": (replace(MHA_EDGES[3], mask="causal", bias="none", rate=0.0, K=1, G=1), None),
}


@pytest.mark.parametrize(("problem", "shape"), HEADS.values(), ids=HEADS)
def test_head_jvp_is_the_complex_step(engine, problem, shape):
    (params, *arrays, _), (params_dot, *dots, _) = (p.inputs("float64") for p in (problem, other(problem)))
    params, params_dot = head_params(params, 0), head_params(params_dot, 0)
    bias, bias_dot = (None,) * 2 if shape is None else some(5, shape, shape)
    if shape == (2, 11):
        bias, bias_dot = RelativeBias(bias), RelativeBias(bias_dot)
    inputs, dots = (params, *arrays, bias), (params_dot, *dots, bias_dot)
    _, cache = head(*inputs, **problem.static(), engine=engine)
    moved = [like(x, (np.asarray(a + 1j * STEP * d) for a, d in zip(numbers(x), numbers(dot), strict=True)))
             for x, dot in zip(inputs, dots, strict=True)]  # fmt: skip
    o, complex_cache = head(*moved, **problem.static())
    o_dot, lse_dot = head_jvp(cache, *dots)
    close(o_dot, np.imag(o) / STEP)
    close(lse_dot, np.imag(log_sum_exp(complex_cache)) / STEP)
    for i in range(len(dots)):
        alone = tuple(x if i == j else None for j, x in enumerate(dots))
        zeros = tuple(x if i == j else like(x, map(np.zeros_like, numbers(x))) for j, x in enumerate(dots))
        for got, want in zip(head_jvp(cache, *alone), head_jvp(cache, *zeros), strict=True):
            close(got, want)


def test_refusals_of_head_jvp(engine):
    params, *arrays, _ = MhaProblem().inputs("float64")
    o, cache = head(head_params(params, 0), *arrays, np.ones((2, 5, 7)), engine=engine)
    with pytest.raises(TypeError, match="cache must come from head, got MhaCache"):
        head_jvp(mha(params, *arrays, engine=engine)[1])
    with pytest.raises(KeyError, match=r"params_dot must have q_proj.w, q_proj.b, .* as params have, got"):
        head_jvp(cache, params)
    with pytest.raises(ValueError, match=r"bias_dot must be \(2, 5, 7\) as bias is, got \(2, 1, 5, 7\)"):
        head_jvp(cache, None, None, None, None, np.ones((2, 1, 5, 7)))
    with pytest.raises(ValueError, match=r"query_dot must be \(..., T, Cq\) = \(2, 5, 17\) as query is"):
        head_jvp(cache, None, o)


def test_self_attention_forwards_is_mha_of_one_input(engine):
    problem = MhaProblem(S=5, Ck=17, Cv=17)
    params, x, *_ = problem.inputs("float64")
    params_dot, x_dot, *_ = other(problem).inputs("float64")
    _, cache = self_attention(params, x, engine=engine)
    moved = tree.map(lambda a, d: a + 1j * STEP * d, params, params_dot), x + 1j * STEP * x_dot
    y, _ = self_attention(*moved)
    close(mha_jvp(cache.mha, params_dot, x_dot, x_dot, x_dot)[0], np.imag(y) / STEP)


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (0, lambda x: x.tolist(), TypeError, "q_dot must be an array, got list"),
        (0, lambda x: x[..., :3], ValueError, r"q_dot must be \(..., H, T, D\) = \(2, 6, 5, 11\) as q is, got"),
        (1, lambda x: x[0], ValueError, r"k_dot must be \(..., K, S, D\) = .* as k is, got \(2, 7, 11\)"),
        (2, lambda x: x.astype(np.float32), TypeError, "v_dot must have dtype float64 as q_dot has, got float32"),
        (3, RelativeBias, TypeError, "bias_dot must be a ndarray as bias is, got RelativeBias"),
        (3, lambda x: x[0], ValueError, r"bias_dot must be \(2, 6, 5, 7\) as bias is, got \(6, 5, 7\)"),
        (4, lambda x: x[:1], ValueError, r"sink_dot must be \(H\) = \(6,\) as sink is, got \(1,\)"),
    ],
)
def test_refusals(engine, name, change, error, message):
    problem = AttentionProblem(bias="... H T S", sink=True)
    _, cache = attention(*problem.inputs("float64"), engine=engine)
    dots = list(other(problem).inputs("float64"))
    dots[name] = change(dots[name])
    with pytest.raises(error, match=message):
        attention_jvp(cache, *dots)


def test_a_tangent_of_nothing_is_refused(engine):
    problem = AttentionProblem(bias="... H T S", sink=True)
    q, k, v, bias, sink = problem.inputs("float64")
    _, cache = attention(q, k, v, engine=engine)
    with pytest.raises(ValueError, match="bias_dot must be None, as there is no bias, got shape"):
        attention_jvp(cache, q, k, v, bias)
    with pytest.raises(ValueError, match="sink_dot must be None, as there is no sink, got shape"):
        attention_jvp(cache, q, k, v, None, sink)
    with pytest.raises(TypeError, match="q_dot must have dtype float64 as q has, got float32"):
        attention_jvp(cache, q.astype(np.float32))
    with pytest.raises(TypeError, match="cache must come from an attention of funcmha, got int"):
        attention_jvp(3, q)


def test_refusals_of_mha_jvp(engine):
    problem = MhaProblem()
    params, query, key, value, _ = problem.inputs("float64")
    _, cache = mha(params, query, key, value, engine=engine)
    with pytest.raises(KeyError, match=r"params_dot must have q_proj.w, .* as params have"):
        mha_jvp(cache, {"q_proj": params["q_proj"]})
    with pytest.raises(
        ValueError, match=r"params_dot.q_proj.w must be \(H, D, Cq\) = \(6, 11, 17\) as params.q_proj.w"
    ):
        mha_jvp(cache, params | {"q_proj": {"w": params["q_proj"]["w"][:1], "b": params["q_proj"]["b"]}})
    with pytest.raises(ValueError, match=r"query_dot must be \(..., T, Cq\) = \(2, 5, 17\) as query is, got \(5, 17\)"):
        mha_jvp(cache, params, query[0])
    with pytest.raises(ValueError, match="bias_dot must be None"):
        mha_jvp(cache, params, query, key, value, query)
    with pytest.raises(TypeError, match="params_dot must be a dict"):
        mha_jvp(cache, query)
    with pytest.raises(TypeError, match="cache must come from mha, got tuple"):
        mha_jvp((), params)
