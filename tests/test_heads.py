"""One head after another: the order of the specification, and what `heads` gives of the cache of every engine."""

import importlib

import jax
import numpy as np
import oracles
import pytest
from test_ops import close

from funcmha import (
    attention_weights,
    head,
    head_params,
    log_sum_exp,
    mha,
    mha_vjp,
    norms,
    self_attention,
    surgery,
    tree,
)
from funcmha.biases import RelativeBias
from funcmha.engines import SEQUENTIAL, heads
from funcmha.testing.strategies import MhaProblem

SPECIFICATION = importlib.import_module("funcmha.mha")  # as funcmha.mha is the function
PROBLEMS = {
    "plain": MhaProblem(),
    "modern": MhaProblem(
        D=8, qk_norm="layer", rotary="half of some", sink=True, softcap=0.5, scale=0.5, per_head=True, mask="heads",
        bias="... H T+S-1", rate=0.3, seeded=True,
    ),
    "appended keys": MhaProblem(bias_kv=True, zero_attn=True, bias="... H 1 S", mask="intersection", rate=0.3),
    "without biases": MhaProblem(K=3, G=1, biases=False, qk_norm="rms", bias="1 T+S-1", mask="causal"),
    "long": MhaProblem(T=32, S=33, Cq=2, Ck=1, Cv=2, qk_norm="l2", mask="dense", bias="T S"),
}  # fmt: skip
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


# ── the order of the specification ───────────────────────────────────────────────────────────────────────────────


def test_the_forward_visits_the_heads_from_first_to_last(monkeypatch):
    params, *arrays = PROBLEMS["modern"].inputs("float64")
    visited, f = [], SPECIFICATION._head
    monkeypatch.setattr(SPECIFICATION, "_head", lambda one, *rest: visited.append(one["q_proj"]["w"]) or f(one, *rest))
    mha(params, *arrays, **PROBLEMS["modern"].static(), engine=SEQUENTIAL)
    assert len(visited) == PROBLEMS["modern"].H
    for h, w in enumerate(visited):
        assert np.array_equal(w, params["q_proj"]["w"][h])


def test_the_backward_visits_the_heads_from_last_to_first(monkeypatch):
    y, cache = mha(*PROBLEMS["modern"].inputs("float64"), **PROBLEMS["modern"].static(), engine=SEQUENTIAL)
    visited, f = [], SPECIFICATION._head_vjp
    monkeypatch.setattr(SPECIFICATION, "_head_vjp", lambda one, *rest: visited.append(one) or f(one, *rest))
    mha_vjp(cache, y)
    assert len(visited) == len(cache.heads) == PROBLEMS["modern"].H
    assert all(one is other for one, other in zip(visited, reversed(cache.heads), strict=True))


# ── heads(cache) ─────────────────────────────────────────────────────────────────────────────────────────────────


def opened(one):
    """Every leaf of a head's cache by its path, but those of its attention, which are the engine's own."""
    paths, _ = jax.tree_util.tree_flatten_with_path(one._replace(attention=None))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


@each_problem
def test_heads_equal_those_of_the_specification(engine, problem):
    """Their projections, norms, rotations, biases, keys and values, weights and lse; and there are H of them."""
    inputs, static = problem.inputs("float64"), problem.static()
    got = list(heads(mha(*inputs, **static, engine=engine)[1]))
    want = list(heads(mha(*inputs, **static, engine=SEQUENTIAL)[1]))
    assert len(got) == len(want) == problem.H
    for one, ref in zip(got, want, strict=True):
        assert type(one) is type(ref)
        assert jax.tree.structure(one._replace(attention=None)) == jax.tree.structure(ref._replace(attention=None))
        of_one, of_ref = opened(one), opened(ref)
        for path, leaf in of_ref.items():
            close(of_one[path] * 1.0, leaf * 1.0, path)
        p = attention_weights(ref.attention)
        close(attention_weights(one.attention), p)
        close(one.attention.q, ref.attention.q)
        attended = p.any(axis=-2)[..., None]  # a head may keep what another of its group attends
        close(np.where(attended, one.attention.k, 0), np.where(attended, ref.attention.k, 0))
        close(np.where(attended, one.attention.v, 0), np.where(attended, ref.attention.v, 0))
        close(log_sum_exp(one.attention), log_sum_exp(ref.attention))


@each_problem
def test_heads_equal_head_with_its_parameters(engine, problem):
    (params, query, key, value, bias), static = problem.inputs("float64"), problem.static()
    if isinstance(bias, RelativeBias) or problem.per_head or problem.mask in ("heads", "intersection", "dense"):
        bias, static = None, {name: static[name] for name in ("qk_norm", "rotary", "zero_attn") if name in static}
    _, cache = mha(params, query, key, value, None, **static, engine=engine)
    for h, one in enumerate(heads(cache)):
        _, alone = head(head_params(params, h), query, key, value, **static, engine=engine)
        close(attention_weights(one.attention)[..., 0, :, :], attention_weights(alone))
        tree.map(np.testing.assert_array_equal, one.params, head_params(tree.map(np.asarray, params), h))


@each_problem
def test_what_is_read_off_a_cache_is_read_off_its_heads(engine, problem):
    """Oracle for the weights and lse: torch."""
    (params, *arrays), static = problem.inputs("float64"), problem.static()
    _, cache = mha(params, *arrays, **static, engine=engine)
    _, weights, lse = oracles.mha(oracles.tensors(params), *map(oracles.tensor, arrays), **static)
    close(attention_weights(cache), weights.detach())
    close(log_sum_exp(cache), lse.detach())
    of_heads = [attention_weights(one.attention) for one in heads(cache)]
    assert np.array_equal(attention_weights(cache), np.concatenate(of_heads, axis=-3))


def test_the_largest_logits_are_those_of_the_heads(engine):
    params, *arrays = PROBLEMS["plain"].inputs("float64")
    _, cache = mha(params, *arrays, engine=engine)
    scores = [one.attention.q @ one.attention.k.swapaxes(-1, -2) * 11**-0.5 for one in heads(cache)]
    close(surgery.max_logit(cache), np.stack([s[:, 0].max(axis=(-1, -2)) for s in scores], axis=-1))


def test_heads_of_self_attention_and_of_one_head(engine):
    params, x, *_ = MhaProblem(Ck=17, Cv=17, S=5).inputs("float64")
    _, cache = self_attention(params, x, qk_norm=norms.L2Norm(), engine=engine)
    assert len(list(heads(cache))) == 6
    _, one = head(head_params(params, 2), x, x, x, qk_norm=norms.L2Norm(), engine=engine)
    (alone,) = heads(one)
    close(attention_weights(alone.attention)[..., 0, :, :], attention_weights(cache)[..., 2, :, :])


def test_heads_of_no_cache_are_refused():
    with pytest.raises(TypeError, match="cache must come from mha, self_attention or head, got int"):
        next(heads(3))
