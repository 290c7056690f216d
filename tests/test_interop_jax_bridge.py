"""NumPy's engine called by hand is the oracle of the same engine called by JAX: bit for bit, as nothing is rounded."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from funcmha import attention, attention_vjp, engines, init, masks, mha, mha_vjp, tree
from funcmha.biases import RelativeBias, alibi, alibi_vjp
from funcmha.dropout import masked
from funcmha.interop.jax import as_jax_function, dot_product_attention, dot_product_attention_vjp
from funcmha.interop.jax.bridge import _numpy

MASK = masks.causal() & masks.lengths(np.array([3, 7]))


def draw(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def problem(dtype="float32", bias=True):
    """q, k, v, bias, sink and do of grouped attention."""
    q, k, v, b, do = draw((2, 6, 5, 11), (2, 3, 7, 11), (2, 3, 7, 13), (6, 5, 7), (2, 6, 5, 13), dtype=dtype)
    return q, k, v, b if bias else None, None, do


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


def by_hand(f, f_vjp, inputs, dy, **static):
    y, cache = f(*inputs, **static)
    return y, *f_vjp(cache, dy)


# ── jit, grad, trees, dtypes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_values_and_gradients_match_numpy(dtype, transform):
    *inputs, do = problem(dtype)
    attend = as_jax_function(attention, attention_vjp, mask=MASK, softcap=3.0)
    with jax.enable_x64(dtype == np.float64):
        y, pull = jax.vjp(transform(attend), *inputs)
        got = y, *pull(jnp.asarray(do))
    same(got, by_hand(attention, attention_vjp, inputs, do, mask=MASK, softcap=3.0))


def test_the_gradient_of_a_tree_is_a_tree_under_jit_of_grad():
    params, x = init(0, 15, 3, bias_kv=True), draw((2, 5, 15))[0]
    layer = as_jax_function(mha, mha_vjp, mask=masks.causal())
    weights = draw((2, 5, 15), seed=1)[0]
    got = jax.jit(jax.grad(lambda p, x: (layer(p, x, x, x, None) * weights).sum(), argnums=(0, 1)))(params, x)
    _, dparams, dq, dk, dv, dbias = by_hand(mha, mha_vjp, (params, x, x, x), weights, mask=masks.causal())
    assert dbias is None
    same(got[0], dparams)
    np.testing.assert_allclose(got[1], dq + dk + dv, rtol=1e-6, atol=1e-6)


def test_inputs_and_outputs_are_trees_of_every_kind():
    """The values of ALiBi, a NamedTuple, from one function into the next."""
    slopes, q, k, v, do = draw((3,), (3, 5, 2), (3, 7, 2), (3, 7, 11), (3, 5, 11))
    slopes = np.abs(slopes)
    bias, attend = as_jax_function(alibi, alibi_vjp, T=5, S=7), as_jax_function(attention, attention_vjp)
    y, pull = jax.vjp(jax.jit(lambda m: attend(q, k, v, bias(m), None)), slopes)
    relative, cache = alibi(slopes, T=5, S=7)
    want, *_, dbias, _ = by_hand(attention, attention_vjp, (q, k, v, relative), do)
    assert isinstance(jax.jit(bias)(slopes), RelativeBias)
    same((y, pull(jnp.asarray(do))), (want, alibi_vjp(cache, dbias)))


def test_an_engine_may_be_named():
    *inputs, do = problem()
    for engine in engines.ENGINES:
        f = jax.jit(as_jax_function(engines.attention, engines.attention_vjp, engine=engine))
        y, pull = jax.vjp(f, *inputs)
        same((y, *pull(jnp.asarray(do))), by_hand(engines.attention, engines.attention_vjp, inputs, do, engine=engine))


def test_the_host_runs_numpy_s_engine():
    received = []

    def spy(*inputs, **static):
        received.append({type(x) for x in inputs if x is not None})
        return attention(*inputs, **static)

    *inputs, _ = problem()
    jax.block_until_ready(jax.jit(as_jax_function(spy, attention_vjp))(*inputs))
    assert received[-1] == {np.ndarray}


def test_an_adapter_may_be_bridged_too():
    q, k, v, do = draw((2, 5, 6, 11), (2, 7, 3, 11), (2, 7, 3, 11), (2, 5, 6, 11))
    static = {"is_causal": True, "query_seq_lengths": np.array([5, 3], "i4"), "local_window_size": (2, 0)}
    y, pull = jax.vjp(
        jax.jit(as_jax_function(dot_product_attention, dot_product_attention_vjp, **static)), q, k, v, None
    )
    same(
        (y, *pull(jnp.asarray(do))),
        by_hand(dot_product_attention, dot_product_attention_vjp, (q, k, v), do, **static),
    )


# ── vmap ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["sequential", "sequential_unrolled", "expand_dims", "broadcast_all"])
def test_vmap_is_one_element_after_another(method):
    q, k, v, do = draw((3, 2, 5, 11), (3, 2, 7, 11), (3, 2, 7, 13), (3, 2, 5, 13))
    attend = as_jax_function(attention, attention_vjp, vmap_method=method, mask=masks.causal())
    y, pull = jax.vjp(jax.jit(jax.vmap(lambda q, k, v: attend(q, k, v, None, None))), q, k, v)
    for i, got in enumerate(zip(y, *pull(jnp.asarray(do)), strict=True)):
        want = by_hand(attention, attention_vjp, (q[i], k[i], v[i]), do[i], mask=masks.causal())
        for a, b in zip(got, want[:4], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_vmap_of_grad_is_the_gradient_of_each_sample():
    params, x, weights = init(0, 15, 3), *draw((4, 5, 15), (5, 15))
    layer = as_jax_function(mha, mha_vjp, mask=masks.causal())

    def loss(params, x):
        return (layer(params, x, x, x, None) * weights).sum()

    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, x)
    total = jax.jit(jax.grad(lambda p: jax.vmap(loss, in_axes=(None, 0))(p, x).sum()))(params)
    want = [by_hand(mha, mha_vjp, (params, a, a, a), weights, mask=masks.causal())[1] for a in x]
    same(each, tree.map(lambda *gs: np.stack(gs), *want))
    tree.map(lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-5, atol=1e-5), total, each)


def test_a_jacobian_calls_the_gradient_with_many_cotangents():
    """Under vmap, only the cotangent has the new axis: a cache that were passed on would serve many times."""
    q, k, v = draw((5, 2), (7, 2), (7, 3), dtype="float64")
    with jax.enable_x64(True):
        attend = as_jax_function(attention, attention_vjp)
        got = jax.jit(jax.jacrev(lambda q: attend(q, k, v, None, None)))(q)
    _, cache = attention(q, k, v)
    for i, e in np.ndindex(5, 3):
        do = np.zeros((5, 3))
        do[i, e] = 1
        np.testing.assert_array_equal(got[i, e], attention_vjp(cache, do)[0])


def test_scan_and_checkpoint_take_it():
    *inputs, _ = problem(bias=False)
    attend = as_jax_function(attention, attention_vjp)

    def deep(q):
        return jax.lax.scan(
            lambda q, _: (jax.checkpoint(lambda q: attend(q, *inputs[1:])[..., :11])(q), None), q, length=3
        )[0]

    got = jax.jit(jax.grad(lambda q: deep(q).sum()))(inputs[0])
    q, caches = inputs[0], []
    for _ in range(3):
        y, cache = attention(q, *inputs[1:])
        q, caches = y[..., :11], [*caches, cache]
    dq = np.ones_like(q)
    for cache in reversed(caches):
        dq = attention_vjp(cache, np.concatenate([dq, np.zeros_like(y[..., 11:])], axis=-1))[0]
    np.testing.assert_array_equal(got, dq)


# ── pickle ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_pickled_by_the_names_of_its_functions():
    *inputs, do = problem()
    again = pickle.loads(pickle.dumps(as_jax_function(attention, attention_vjp, mask=MASK, softcap=3.0)))
    y, pull = jax.vjp(jax.jit(again), *inputs)
    same((y, *pull(jnp.asarray(do))), by_hand(attention, attention_vjp, inputs, do, mask=MASK, softcap=3.0))
    assert copy.deepcopy(again) is again


def test_a_lambda_is_not_pickled():
    with pytest.raises(pickle.PicklingError, match=r"as_jax_function\(.*<lambda>, …\) cannot be pickled: f must be"):
        pickle.dumps(as_jax_function(lambda x: (x, x), attention_vjp))


# ── memory and refusals ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_an_array_of_jax_is_read_without_a_copy(dtype):
    x = jnp.asarray(draw((5, 7), dtype=dtype)[0])
    got = _numpy({"x": x, "none": None})
    assert got["none"] is None
    assert (got["x"].ctypes.data, got["x"].dtype) == (x.unsafe_buffer_pointer(), x.dtype)


def test_errors_of_f_are_raised_while_jax_traces():
    attend = as_jax_function(attention, attention_vjp, mask=np.ones((5, 6), bool))
    *inputs, _ = problem()
    with pytest.raises(ValueError, match=r"mask must broadcast to \(\.\.\., H, T, S\) = \(2, 6, 5, 7\), got \(5, 6\)"):
        jax.jit(attend)(*inputs)


def test_forward_mode_is_refused_by_jax():
    *inputs, _ = problem()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(as_jax_function(attention, attention_vjp), inputs, inputs)


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match="f must be a function, got NoneType"):
        as_jax_function(None, attention_vjp)
    with pytest.raises(TypeError, match="f_vjp must be a function, got tuple"):
        as_jax_function(attention, ())
    with pytest.raises(ValueError, match=r"vmap_method must be one of sequential, .*, got 'fast'"):
        as_jax_function(attention, attention_vjp, vmap_method="fast")
    with pytest.raises(TypeError, match="mask must be of NumPy, as f is called with NumPy arrays, got an array of JAX"):
        as_jax_function(attention, attention_vjp, mask=jnp.ones((3, 3), bool))
    with pytest.raises(TypeError, match="dropout must be of NumPy, as f is called with NumPy arrays, got an array"):
        as_jax_function(attention, attention_vjp, dropout=masked(jnp.ones((3, 3), bool), 0.1))
