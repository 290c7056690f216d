"""Second order: against torch's own second derivatives in float64, and as a symmetric matrix."""

from dataclasses import replace

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from test_derivatives_forward import (
    EVERYTHING,
    EVERYTHING_MHA,
    MHA_EDGES,
    MODERATE,
    ON_THREADS,
    close,
    like,
    numbers,
    on_edges,
    on_mha_edges,
    other,
    portable,
    same_inner_product,
)

from funcmha import attention, attention_vjp, mha, mha_vjp, tree
from funcmha.derivatives import attention_jvp, attention_vjp_jvp, mha_jvp, mha_vjp_jvp
from funcmha.testing.strategies import (
    MODERN,
    MODERN_MHA,
    AttentionProblem,
    MhaProblem,
    attention_problems,
    mha_problems,
)


def double(problem, engine):
    """cache, (do, do_dot), (dlse, dlse_dot), tangents of the inputs"""
    arrays, static = problem.inputs("float64"), problem.static()
    (do, _, dlse), (do_dot, _, dlse_dot) = problem.cotangents("float64"), other(problem).cotangents("float64")
    return (
        attention(*arrays, **static, engine=engine)[1],
        (do, do_dot),
        (dlse, dlse_dot),
        other(problem).inputs("float64"),
    )


def torch_second(f, inputs, dots, cotangents, cotangents_dot):
    """The tangents of all gradients G of Σ ⟨output, cotangent⟩, by reverse mode thrice.

    The gradient of ⟨c, G⟩ is Jᵀ c, for probes c; and of ⟨Jᵀ c, tangents⟩, which is linear in c, J times the tangents.
    """
    leaves, tangents = ([torch.tensor(np.array(a, np.float64)) for a in numbers(x)] for x in (inputs, dots))
    dys, dys_dot = ([torch.tensor(np.array(a, np.float64)) for a in x] for x in (cotangents, cotangents_dot))
    variables = [a.requires_grad_() for a in (*leaves, *dys)]
    outputs = f(*like(inputs, iter(leaves)))
    loss = sum((o * dy).sum() for o, dy in zip(outputs, dys, strict=True))
    grads = filled(torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True), leaves)
    probes = [torch.zeros_like(g, requires_grad=True) for g in grads]
    inner = sum((g * c).sum() for g, c in zip(grads, probes, strict=True))
    backs = filled(torch.autograd.grad(inner, variables, create_graph=True, allow_unused=True), variables)
    total = sum((b * d).sum() for b, d in zip(backs, (*tangents, *dys_dot), strict=True))
    return [g.detach() for g in filled(torch.autograd.grad(total, probes, allow_unused=True), probes)]


def filled(grads, leaves):
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


def finite_lse(outputs):
    o, _, lse = outputs
    return o, torch.where(torch.isinf(lse), 0.0, lse)


@given(problem=attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_attention_vjp_jvp_matches_torch(engine, problem):
    cache, (do, do_dot), (dlse, dlse_dot), dots = double(problem, engine)
    got = attention_vjp_jvp(cache, do, do_dot, *dots, dlse=dlse, dlse_dot=dlse_dot)
    static = problem.static()
    want = torch_second(
        lambda *x: finite_lse(oracles.attention(*x, **static)),
        problem.inputs("float64"),
        dots,
        (do, dlse),
        (do_dot, dlse_dot),
    )
    for a, b in zip(numbers(got), want, strict=True):
        close(a, b)


@given(problem=attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_the_hessian_is_symmetric(engine, problem):
    """Of ⟨do, o⟩ + ⟨dlse, lse⟩."""
    cache, (do, _), (dlse, _), u = double(problem, engine)
    v = other(other(problem)).inputs("float64")
    hu, hv = (attention_vjp_jvp(cache, do, None, *x, dlse=dlse) for x in (u, v))
    same_inner_product(zip(numbers(u), numbers(hv), strict=True), zip(numbers(v), numbers(hu), strict=True), bar=1e-12)


@given(problem=attention_problems(**(MODERN | MODERATE)))
@on_edges
def test_with_forward_mode_it_is_the_vjp_of_the_vjp(engine, problem):
    """⟨c, d(grads)⟩ for any change of the inputs and of do and dlse, where c are cotangents of the gradients."""
    cache, (do, do_dot), (dlse, dlse_dot), dots = double(problem, engine)
    c = other(other(problem)).inputs("float64")
    changes = attention_vjp_jvp(cache, do, do_dot, *dots, dlse=dlse, dlse_dot=dlse_dot)
    of_inputs, (of_do, of_dlse) = attention_vjp_jvp(cache, do, None, *c, dlse=dlse), attention_jvp(cache, *c)
    back = list(zip(numbers(of_inputs), numbers(dots), strict=True))
    same_inner_product(
        zip(numbers(c), numbers(changes), strict=True), [*back, (of_do, do_dot), (of_dlse, dlse_dot)], bar=1e-12
    )


def test_no_tangent_is_a_tangent_of_zeros_at_second_order(engine):
    problem = EVERYTHING
    cache, (do, do_dot), (dlse, _), dots = double(problem, engine)
    zeros = like(dots, map(np.zeros_like, numbers(dots)))
    for n in range(6):
        some = [do_dot if n == 5 else None, *(d if i == n else None for i, d in enumerate(dots))]
        full = [
            do_dot if n == 5 else 0 * do,
            *(d if i == n else z for i, (d, z) in enumerate(zip(dots, zeros, strict=True))),
        ]
        got = attention_vjp_jvp(cache, do, *some)
        want = attention_vjp_jvp(cache, do, *full, dlse=0 * dlse, dlse_dot=0 * dlse)
        for a, b in zip(numbers(got), numbers(want), strict=True):
            close(a, b)
    plain = attention_vjp_jvp(cache, do, do_dot)
    for a, b in zip(numbers(plain), numbers(attention_vjp(cache, do_dot)), strict=True):
        close(a, b)  # linear in the cotangent


def test_second_order_of_every_array_library_is_the_same(engine, xp):
    problem = replace(EVERYTHING, bias="... H 1 S")
    arrays, static, dots = problem.inputs("float64"), problem.static(), other(problem).inputs("float64")
    cache, (do, do_dot), (dlse, dlse_dot), dots = double(problem, engine)
    want = attention_vjp_jvp(cache, do, do_dot, *dots, dlse=dlse, dlse_dot=dlse_dot)
    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    _, cache = attention(*map(xp.to, arrays), **static, engine=portable(engine))
    do, do_dot, dlse, dlse_dot = map(xp.to, (do, do_dot, dlse, dlse_dot))
    got = attention_vjp_jvp(cache, do, do_dot, *map(xp.to, dots), dlse=dlse, dlse_dot=dlse_dot)
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_a_tangent_of_an_unattended_key_has_no_effect(engine, garbage):
    problem, attended = AttentionProblem(), np.array([True, False, True, True, False, False, True])
    do, *_ = problem.cotangents("float64")
    q_dot, *dots = other(problem).inputs("float64")[:3]
    spoilt = (np.where(attended[:, None], x, garbage) for x in dots)
    _, cache = attention(
        *problem.inputs("float64"), mask=np.broadcast_to(attended, (problem.T, problem.S)), engine=engine
    )
    got, want = attention_vjp_jvp(cache, do, do, q_dot, *spoilt), attention_vjp_jvp(cache, do, do, q_dot, *dots)
    for a, b in zip(numbers(got), numbers(want), strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_rounded_once_at_second_order(engine, dtype):
    problem = AttentionProblem(bias="... H T+S-1", sink=True, mask="causal")
    groups = problem.inputs(dtype), other(problem).inputs(dtype), problem.cotangents(dtype)[:1]
    upcast = [like(x, (a.astype(np.float32) for a in numbers(x))) for x in groups]
    got, want = (
        attention_vjp_jvp(attention(*arrays, **problem.static(), engine=engine)[1], do, do, *dots)
        for arrays, dots, (do,) in (groups, upcast)
    )
    for a, b in zip(numbers(got), numbers(want), strict=True):
        assert a.dtype == dtype
        assert np.array_equal(a, b.astype(dtype))


@pytest.mark.parametrize("bias", ["... H T+S-1", "1 S"])
def test_second_order_gives_the_same_bits_on_many_threads(monkeypatch, bias):
    problem = replace(EVERYTHING, T=64, S=65, bias=bias)
    cache, (do, do_dot), _, dots = double(problem, engine=ON_THREADS)
    want = attention_vjp_jvp(cache, do, do_dot, *dots)
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "3")
    for a, b in zip(numbers(attention_vjp_jvp(cache, do, do_dot, *dots)), numbers(want), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"do": lambda x: x[0]}, ValueError, r"do must be \(..., H, T, E\) = \(2, 6, 5, 13\) as the output is, got"),
        ({"do_dot": lambda x: x[0]}, ValueError, r"do_dot must be \(..., H, T, E\) = \(2, 6, 5, 13\) as do is, got"),
        ({"q_dot": lambda x: x.astype(np.float32)}, TypeError, "q_dot must have dtype float64 as do has, got float32"),
        ({"q_dot": lambda x: x[0]}, ValueError, "q_dot must be"),
        ({"dlse_dot": lambda x: x[0]}, ValueError, r"dlse_dot must be \(..., H, T\) = \(2, 6, 5\) as dlse is, got"),
        ({"dlse": lambda x: x[0]}, ValueError, r"dlse must be \(..., H, T\)"),
    ],
)
def test_refusals_at_second_order(engine, change, error, message):
    cache, (do, do_dot), (dlse, dlse_dot), (q_dot, *_) = double(AttentionProblem(), engine)
    given_ = {"do": do, "do_dot": do_dot, "q_dot": q_dot, "dlse": dlse, "dlse_dot": dlse_dot}
    given_ |= {name: f(given_[name]) for name, f in change.items()}
    keywords = {name: given_.pop(name) for name in ("dlse", "dlse_dot")}
    with pytest.raises(error, match=message):
        attention_vjp_jvp(cache, *given_.values(), **keywords)
    with pytest.raises(TypeError, match="cache must come from an attention of funcmha, got int"):
        attention_vjp_jvp(3, do)


# ── mha ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def double_mha(engine, problem):
    """The problem, and what `double` gives of it"""
    (dy, _, dlse), (dy_dot, _, dlse_dot) = problem.cotangents("float64"), other(problem).cotangents("float64")
    _, cache = mha(*problem.inputs("float64"), **problem.static(), engine=engine)
    return problem, cache, (dy, dy_dot), (dlse, dlse_dot), other(problem).inputs("float64")


def sorted_numbers(x):
    """`numbers` with the leaves of a tree in the order of their names."""
    params, *others = x
    flat = tree.flatten(params)
    return [flat[leaf] for leaf in sorted(flat)] + numbers(tuple(others))


def sorted_tree(x):
    params, *others = x
    flat = tree.flatten(params)
    return tree.unflatten({leaf: flat[leaf] for leaf in sorted(flat)}), *others


@pytest.mark.parametrize("problem", MHA_EDGES)
def test_mha_vjp_jvp_matches_torch(engine, problem):
    problem, cache, (dy, dy_dot), (dlse, dlse_dot), dots = double_mha(engine, problem)
    got, static = mha_vjp_jvp(cache, dy, dy_dot, *dots, dlse=dlse, dlse_dot=dlse_dot), problem.static()
    want = torch_second(
        lambda *x: finite_lse(oracles.mha(*x, **static)),
        sorted_tree(problem.inputs("float64")),
        sorted_tree(dots),
        (dy, dlse),
        (dy_dot, dlse_dot),
    )
    for a, b in zip(sorted_numbers(got), want, strict=True):
        close(a, b)


@pytest.mark.slow
@given(problem=mha_problems(**(MODERN | MODERN_MHA | {"gain": st.just(1.0), "family": st.just("normal")})))
@on_mha_edges
def test_the_hessian_of_mha_is_symmetric(engine, problem):
    problem, cache, (dy, _), (dlse, _), u = double_mha(engine, problem)
    v = other(other(problem)).inputs("float64")
    hu, hv = (mha_vjp_jvp(cache, dy, None, *x, dlse=dlse) for x in (u, v))
    pairs = ((sorted_numbers(a), sorted_numbers(b)) for a, b in ((u, hv), (v, hu)))
    same_inner_product(*(list(zip(*pair, strict=True)) for pair in pairs), bar=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("given_", [(0,), (1,), (2, 3), (4,), ()])
def test_no_tangent_of_mha_is_one_of_zeros_at_second_order(engine, given_):
    for problem in MHA_EDGES[:3]:
        problem, cache, (dy, dy_dot), _, dots = double_mha(engine, problem)
        some = [x if i in given_ else None for i, x in enumerate(dots)]
        zeros = [x if i in given_ else like(x, map(np.zeros_like, numbers(x))) for i, x in enumerate(dots)]
        got, want = mha_vjp_jvp(cache, dy, None, *some), mha_vjp_jvp(cache, dy, 0 * dy, *zeros)
        for a, b in zip(sorted_numbers(got), sorted_numbers(want), strict=True):
            close(a, b)
        plain = sorted_numbers(mha_vjp_jvp(cache, dy, dy_dot))
        for a, b in zip(plain, sorted_numbers(mha_vjp(cache, dy_dot)), strict=True):
            close(a, b)


@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_a_tangent_of_an_unattended_input_has_no_effect(engine, garbage):
    problem, attended = MhaProblem(qk_norm="rms", rotary="half of all"), np.array([1, 0, 1, 1, 0, 0, 1], bool)
    params_dot, query_dot, *dots, _ = other(problem).inputs("float64")
    dy, *_ = problem.cotangents("float64")
    _, cache = mha(
        *problem.inputs("float64"), **problem.static() | {"mask": np.broadcast_to(attended, (5, 7))}, engine=engine
    )
    zeroed, spoilt = ([np.where(attended[:, None], x, value) for x in dots] for value in (0.0, garbage))
    got, want = (mha_vjp_jvp(cache, dy, dy, params_dot, query_dot, *x) for x in (spoilt, zeroed))
    for a, b in zip(sorted_numbers(got), sorted_numbers(want), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(*(mha_jvp(cache, params_dot, query_dot, *x) for x in (spoilt, zeroed)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_second_order_of_mha_in_every_array_library_is_the_same(engine, xp):
    problem = replace(EVERYTHING_MHA, bias_kv=True, zero_attn=True)
    problem, cache, (dy, dy_dot), _, dots = double_mha(engine, problem)
    want, static = mha_vjp_jvp(cache, dy, dy_dot, *dots), problem.static()
    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    _, cache = mha(*map(xp.tree, problem.inputs("float64")), **static, engine=portable(engine))
    got = mha_vjp_jvp(cache, xp.to(dy), xp.to(dy_dot), *map(xp.tree, dots))
    for a, b in zip(sorted_numbers(got), sorted_numbers(want), strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


def test_half_types_of_mha_are_rounded_once_at_second_order(engine):
    problem = replace(MHA_EDGES[1], softcap=None)
    groups = (problem.inputs(np.float16), other(problem).inputs(np.float16), problem.cotangents(np.float16)[:1])
    upcast = [like(x, (a.astype(np.float32) for a in numbers(x))) for x in groups]
    got, want = (
        mha_vjp_jvp(mha(*inputs, **problem.static(), engine=engine)[1], dy, dy, *dots)
        for inputs, dots, (dy,) in (groups, upcast)
    )
    for a, b in zip(sorted_numbers(got), sorted_numbers(want), strict=True):
        assert a.dtype == np.float16
        assert np.array_equal(a, b.astype(np.float16))


def test_refusals_of_mha_at_second_order(engine):
    (params, *inputs, _), (dy, _, dlse) = MhaProblem().inputs("float64"), MhaProblem().cotangents("float64")
    _, cache = mha(params, *inputs, engine=engine)
    with pytest.raises(ValueError, match=r"dy must be \(..., T, O\)"):
        mha_vjp_jvp(cache, dy[0])
    with pytest.raises(ValueError, match=r"dy_dot must be \(..., T, O\) = \(2, 5, 29\) as dy is, got \(5, 29\)"):
        mha_vjp_jvp(cache, dy, dy[0])
    with pytest.raises(ValueError, match=r"dlse_dot must be \(..., H, T\)"):
        mha_vjp_jvp(cache, dy, dy, dlse_dot=dlse[0])
    with pytest.raises(ValueError, match=r"dlse must be \(..., H, T\)"):
        mha_vjp_jvp(cache, dy, dy, dlse=dlse[0])
    with pytest.raises(TypeError, match="the tangents of the inputs must have dtype float32 as dy has, got float64"):
        mha_vjp_jvp(cache, dy.astype(np.float32), None, params)
    with pytest.raises(ValueError, match="query_dot must be"):
        mha_vjp_jvp(cache, dy, dy, params, inputs[0][0])
    with pytest.raises(TypeError, match="cache must come from mha, got tuple"):
        mha_vjp_jvp((), dy)
