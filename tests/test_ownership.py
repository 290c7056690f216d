"""What is returned belongs to the caller: editing it in place changes no gradient, nor what is read off a cache."""

import jax
import numpy as np
import pytest
import test_protocol

from funcmha import attention, attention_vjp, attention_weights, log_sum_exp, mha, mha_vjp, self_attention
from funcmha.engines import ENGINES
from funcmha.testing.strategies import AttentionProblem, MhaProblem

MORE = {
    "rms_norm without w": test_protocol.PAIRS["rms_norm"]._replace(inputs=test_protocol.normal((2, 5, 3))),
    "layer_norm without w": test_protocol.PAIRS["layer_norm"]._replace(inputs=test_protocol.normal((2, 5, 3))),
    "softmax of one": test_protocol.PAIRS["softmax"]._replace(inputs=test_protocol.normal((5, 1))),
    "merge of nothing": test_protocol.PAIRS["merge"]._replace(inputs=test_protocol.normal((0, 3), (0,), (0, 3), (0,))),
}
PAIRS = test_protocol.PAIRS | MORE
all_pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_engine = pytest.mark.parametrize("engine", ENGINES)
each_length = pytest.mark.parametrize("T", [80, 81])  # the default engine changes between them


def spoil(node):
    """Write NaN into every array of a tree, a tuple or a bias that can be written to."""
    for a in jax.tree.leaves(node):
        if isinstance(a, np.ndarray) and a.flags.writeable:
            a[...] = np.nan


def copied(node):
    return jax.tree.map(np.array, node)


@all_pairs
def test_outputs_and_gradients_belong_to_the_caller(pair):
    """Of every op, by every engine: the vjp after its output was spoilt, and again after its gradients were."""
    y, cache = pair.f(*pair.inputs("float64"), **pair.static)
    dy = copied(y)
    want = copied(pair.f_vjp(cache, dy))
    spoil(y)
    grads = pair.f_vjp(cache, dy)
    jax.tree.map(np.testing.assert_array_equal, grads, want)
    spoil(grads)
    jax.tree.map(np.testing.assert_array_equal, pair.f_vjp(cache, dy), want)


@all_pairs
def test_gradients_share_no_memory_with_cotangents(pair):
    y, cache = pair.f(*pair.inputs("float64"), **pair.static)
    dy = copied(y)
    for grad in jax.tree.leaves(pair.f_vjp(cache, dy)):
        assert not any(np.shares_memory(grad, a) for a in jax.tree.leaves(dy))


@each_length
@pytest.mark.parametrize("engine", [None, *ENGINES])
@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("shape", [{}, {"batch": (), "K": 1, "G": 1}])
def test_the_output_of_attention_belongs_to_the_caller(engine, T, mask, shape):
    problem = AttentionProblem(T=T, S=T, mask=mask, **shape)
    (q, k, v, *_), static = problem.inputs("float64"), problem.static()
    o, cache = attention(q, k, v, **static, engine=engine)
    do = o.copy()
    want, weights, lse = attention_vjp(cache, do), attention_weights(cache).copy(), log_sum_exp(cache).copy()
    o[...] = np.nan
    for got, ref in zip(attention_vjp(cache, do), want, strict=True):
        assert got is ref is None or np.array_equal(got, ref)
    assert np.array_equal(attention_weights(cache), weights)
    assert np.array_equal(log_sum_exp(cache), lse)


@each_length
@every_engine
@pytest.mark.parametrize("call", ["attention", "mha", "self_attention"])
def test_weights_and_lse_of_a_cache_are_read_only_or_the_callers(engine, T, call):
    params, x, *_ = MhaProblem(T=T, S=T, Ck=17, Cv=17).inputs("float64")
    q = np.random.default_rng(0).standard_normal((6, T, 4))
    _, cache = {
        "attention": lambda: attention(q, q, q, engine=engine),
        "mha": lambda: mha(params, x, x, x, engine=engine),
        "self_attention": lambda: self_attention(params, x, engine=engine),
    }[call]()
    for read in (attention_weights, log_sum_exp):
        want = read(cache).copy()
        spoil(read(cache))
        assert np.array_equal(read(cache), want)


@every_engine
@pytest.mark.parametrize("T", [5, 81])
def test_weights_of_mha_that_are_edited_change_no_gradient(engine, T):
    params, *arrays = MhaProblem(T=T, S=T).inputs("float64")
    y, cache = mha(params, *arrays, engine=engine)
    want = mha_vjp(cache, y)
    spoil((attention_weights(cache), log_sum_exp(cache)))
    jax.tree.map(np.testing.assert_array_equal, mha_vjp(cache, y), want)
