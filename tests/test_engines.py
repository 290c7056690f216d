"""What the engines share: their caches, the order of what they return, and what a plan must be."""

import numpy as np
import pytest

from funcmha import attention, attention_vjp, engines, head_params, head_vjp, init, mha, mha_vjp, tree
from funcmha.engines import ENGINES, TILED, Plan
from funcmha.norms import RMSNorm

every_engine = pytest.mark.parametrize("engine", ENGINES)
PARAMS = init(0, 8, 2, sink=True, qk_norm=True, dtype=np.float64)
X = np.random.default_rng(0).standard_normal((3, 5, 8))
Q = np.random.default_rng(1).standard_normal((2, 3, 4))


@every_engine
def test_head_vjp_takes_the_heads_of_every_engine(engine):
    """The gradients of Σ head · cotangent, against those of `mha` with the output projection taken out."""
    y, cache = mha(PARAMS, X, X, X, engine=engine, qk_norm=RMSNorm())
    want, dquery, *_ = mha_vjp(cache, y)
    w, dqueries = PARAMS["out_proj"]["w"], []
    for h, head_cache in enumerate(engines.heads(cache)):
        dhead, dq, *_ = head_vjp(head_cache, y @ w[:, h, :])
        np.testing.assert_allclose(dhead["q_proj"]["w"], want["q_proj"]["w"][h], rtol=0, atol=1e-12)
        assert tree.flatten(dhead).keys() == tree.flatten(head_params(PARAMS, h)).keys()
        dqueries.append(dq)
    np.testing.assert_allclose(sum(dqueries), dquery, rtol=0, atol=1e-12)


@every_engine
def test_gradients_have_the_order_of_the_parameters(engine):
    backwards = {name: dict(reversed(branch.items())) for name, branch in reversed(PARAMS.items())}
    y, cache = mha(backwards, X, X, X, engine=engine, qk_norm=RMSNorm())
    assert list(tree.flatten(mha_vjp(cache, y)[0])) == list(tree.flatten(backwards))


@every_engine
@pytest.mark.parametrize("zero_attn", [False, True])
def test_a_bias_without_axes_has_a_gradient_that_is_an_array(engine, zero_attn):
    bias = np.array(0.5)
    y, cache = mha(PARAMS, X, X, X, bias, engine=engine, qk_norm=RMSNorm(), zero_attn=zero_attn)
    dbias = mha_vjp(cache, y)[4]
    assert type(dbias) is np.ndarray
    assert dbias.shape == ()
    y, cache = mha(PARAMS, X, X, X, np.full((2, 5, 5), 0.5), engine=engine, qk_norm=RMSNorm(), zero_attn=zero_attn)
    np.testing.assert_allclose(dbias, mha_vjp(cache, y)[4].sum(), rtol=0, atol=1e-12)


@every_engine
def test_a_sink_of_minus_infinity_beside_an_empty_row_is_none(engine):
    mask, sink = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1]], bool), np.array([-np.inf, 0.0])
    o, cache = attention(Q, Q, Q, None, sink, mask=mask, engine=engine)
    dsink = attention_vjp(cache, np.ones_like(o))[4]
    assert dsink[0] == 0
    assert np.isfinite(dsink[1])


@every_engine
@pytest.mark.parametrize("n", [-1, 1])
def test_batch_axes_beyond_the_batch_are_refused(engine, n):
    o, cache = attention(Q, Q, Q, engine=engine)
    with pytest.raises(ValueError, match="batch_axes must be within 0 … 0"):
        attention_vjp(cache, o, batch_axes=n)


@pytest.mark.parametrize("name", Plan._fields)
def test_a_plan_of_negative_sizes_is_refused(name):
    with pytest.raises(ValueError, match=f"plan.{name} must be at least"):
        attention(Q, Q, Q, engine=TILED._replace(plan=Plan()._replace(**{name: -1})))


@pytest.mark.parametrize("name", Plan._fields)
def test_a_plan_of_what_is_no_number_is_refused(name):
    with pytest.raises(TypeError, match=f"plan.{name} must be a number, got 'many'"):
        attention(Q, Q, Q, engine=TILED._replace(plan=Plan()._replace(**{name: "many"})))


def test_an_engine_without_its_plan_is_refused():
    with pytest.raises(TypeError, match="engine 'tiled' must have a plan, got None"):
        mha(PARAMS, X, X, X, engine=TILED._replace(plan=None))


@pytest.mark.parametrize("name", ["appended", "plan", "method", "op", "kind"])
def test_names_within_the_engines_are_no_options(name):
    with pytest.raises(TypeError, match=f"{name}= is no option"):
        attention(Q, Q, Q, **{name: 1})
    with pytest.raises(TypeError, match=f"{name}= is no option"):
        mha(PARAMS, X, X, X, **{name: 1})


def test_a_pair_of_output_and_cache_is_no_cache():
    with pytest.raises(TypeError, match="cache must come from mha, got tuple, which has it second: pass that"):
        mha_vjp(mha(PARAMS, X, X, X, qk_norm=RMSNorm()), X)
    with pytest.raises(TypeError, match="cache must come from mha, self_attention or head, got int"):
        engines.heads(3)
