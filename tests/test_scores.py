"""Scores as outputs: what attention takes the softmax of, and their gradients against torch's autograd in float64."""

import jax
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_ops import close

from funcmha import attention, attention_weights, log_sum_exp, masks
from funcmha.biases import RelativeBias
from funcmha.ops import scores, scores_vjp
from funcmha.testing import check_vjp
from funcmha.testing.strategies import MODERN, AttentionProblem, attention_problems

MODERN_SCORES = AttentionProblem(mask="window", bias="... H T+S-1", softcap=0.5, per_head=True, scale=0.5)


def arguments(problem, dtype="float64"):
    """q, k, bias   and   mask, scale, softcap   of an attention problem"""
    q, k, _, bias, _ = problem.inputs(dtype)
    return (q, k, bias), {name: x for name, x in problem.static().items() if name in ("mask", "scale", "softcap")}


def numbers(bias):
    return bias.values if isinstance(bias, RelativeBias) else bias


def by_torch(q, k, bias, *, mask, scale, softcap=None):
    """The scores of tensors, by the formula, with −∞ chosen and not added."""
    T, S = q.shape[-2], k.shape[-2]
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    z = torch.einsum("...td,...sd->...ts", q, k) * (q.shape[-1] ** -0.5 if scale is None else oracles.each_head(scale))
    z = z if softcap is None else oracles.each_head(softcap) * torch.tanh(z / oracles.each_head(softcap))
    if isinstance(bias, RelativeBias):
        bias = bias.values[..., torch.arange(S)[None, :] - torch.arange(T)[:, None] + T - 1]
    z = z if bias is None else z + bias
    allowed = torch.tensor(np.array(masks.dense(mask, T, S, np.zeros(0)))) if mask is not None else torch.tensor(True)
    return torch.where(allowed, z, -torch.inf)


@given(attention_problems(**MODERN))
@example(MODERN_SCORES)
def test_scores_match_torch(problem):
    inputs, static = arguments(problem)
    z, cache = scores(*inputs, **static)
    tensors = [oracles.tensor(x) for x in inputs]
    want = by_torch(*tensors, **static)
    close(z, want.detach())

    _, dz, _ = problem.cotangents("float64")
    finite = torch.where(torch.isneginf(want), 0.0, want)  # −∞ times a cotangent has no sum
    for got, grad in zip(scores_vjp(cache, dz), oracles.gradients([finite], [dz], tensors), strict=True):
        assert (got is None) == (grad is None)
        if grad is not None:
            close(numbers(got), grad)


@given(attention_problems(**MODERN, gain=st.just(1.0), T=st.sampled_from([0, 1, 5]), S=st.sampled_from([0, 1, 7])))
def test_the_weights_are_the_exponentials_of_the_scores(engine, problem):
    """One pipeline, whoever computes it: weights = exp(z − lse)."""
    inputs, static = arguments(problem)
    _, cache = attention(*problem.inputs("float64"), **problem.static(), engine=engine)
    lse = log_sum_exp(cache)[..., None]
    close(np.exp(scores(*inputs, **static)[0] - np.where(np.isneginf(lse), 0, lse)), attention_weights(cache))


def test_nothing_is_done_that_was_not_asked_for():
    q, k = (np.random.default_rng(0).standard_normal(s) for s in ((2, 6, 5, 11), (2, 2, 7, 11)))
    close(scores(q, k)[0], 11**-0.5 * (q @ np.repeat(k, 3, axis=1).mT))


def test_an_unattended_key_has_no_effect_even_if_nan():
    (q, k, _), _ = arguments(AttentionProblem())
    poisoned = k.copy()
    poisoned[..., 5:, :] = np.nan
    dz = np.random.default_rng(1).standard_normal((2, 6, 5, 7))
    (z, cache), (want, clean) = (scores(q, x, mask=masks.lengths(5)) for x in (poisoned, k))
    np.testing.assert_array_equal(z, want)
    assert np.all(np.isneginf(z[..., 5:]))
    for got, grad in zip(scores_vjp(cache, dz)[:2], scores_vjp(clean, dz)[:2], strict=True):
        np.testing.assert_array_equal(got, grad)


def test_a_cotangent_of_a_forbidden_score_has_no_effect():
    (q, k, _), _ = arguments(AttentionProblem())
    bias = np.zeros((5, 7))
    bias[1, 3] = -np.inf
    _, cache = scores(q, k, bias, mask=masks.causal(1))
    dz = np.random.default_rng(2).standard_normal((2, 6, 5, 7))
    spoilt = np.where(masks.causal(1).dense(5, 7) & np.isfinite(bias), dz, np.nan)
    for got, want in zip(scores_vjp(cache, spoilt), scores_vjp(cache, dz), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bias", ["none", "... H 1 S", "T S"])
def test_the_pair_keeps_the_protocol(bias):
    inputs, static = arguments(AttentionProblem(bias=bias, softcap=0.5, per_head=True, scale=-0.5))
    check_vjp(scores, scores_vjp, inputs, static)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_float32_rounded_once(dtype):
    inputs, static = arguments(AttentionProblem(mask="window", bias="... H 1 S", softcap=0.5), dtype)
    z, cache = scores(*inputs, **static)
    z_32, of_32 = scores(*(x.astype(np.float32) for x in inputs), **static)
    dz = np.random.default_rng(3).standard_normal(z.shape).astype(dtype)
    got, want = (z, *scores_vjp(cache, dz)), (z_32, *scores_vjp(of_32, dz.astype(np.float32)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


def test_every_array_library_gives_the_same(xp):
    inputs, static = arguments(AttentionProblem(mask="window", bias="... H 1 S", softcap=0.5))
    dz = np.random.default_rng(4).standard_normal((2, 6, 5, 7))
    z, cache = scores(*(xp.to(x) for x in inputs), **static)
    want, of_numpy = scores(*inputs, **static)
    np.testing.assert_allclose(xp.back(z), want, rtol=1e-12)
    for got, grad in zip(scores_vjp(cache, xp.to(dz)), scores_vjp(of_numpy, dz), strict=True):
        np.testing.assert_allclose(xp.back(got), grad, rtol=1e-12, atol=1e-12)


def test_jax_takes_the_pair_as_it_is():
    inputs, static = arguments(AttentionProblem(bias="... H 1 S", softcap=0.5))
    with jax.enable_x64(True):
        ours = jax.custom_vjp(lambda *a: scores(*a, **static)[0])
        ours.defvjp(lambda *a: scores(*a, **static), scores_vjp)
        f = [jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 3).sum(), (0, 1, 2))) for f in (ours, ours.__wrapped__)]
        for got, want in zip(f[0](*inputs), f[1](*inputs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": np.zeros((2, 2, 7, 3))}, ValueError, r"k must be \(\.\.\., K, S, D\) with .*D=11 as in q"),
        ({"k": np.zeros((2, 4, 7, 11))}, ValueError, "multiple of K=4"),
        ({"k": np.zeros((2, 2, 7, 11), "float32")}, TypeError, "k must have dtype float64 as q has"),
        ({"bias": np.zeros((4, 7))}, ValueError, "bias must broadcast"),
        ({"mask": np.zeros((5, 7))}, TypeError, "mask must be boolean"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, error, words):
    (q, k, _), _ = arguments(AttentionProblem())
    given = {"k": k, "bias": None} | change
    with pytest.raises(error, match=words):
        scores(q, given.pop("k"), given.pop("bias"), **given)


def test_a_wrong_cotangent_is_refused_by_name():
    (q, k, _), _ = arguments(AttentionProblem())
    with pytest.raises(ValueError, match=r"dz must be \(\.\.\., H, T, S\) = \(2, 6, 5, 7\)"):
        scores_vjp(scores(q, k)[1], np.zeros((2, 6, 5, 1)))
