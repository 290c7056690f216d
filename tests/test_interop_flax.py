"""`flax.nnx.MultiHeadAttention` is the oracle, in float64, on the path that keeps float64: with `sow_weights=True`."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from funcmha import init, kv_cache, masks, mha, mha_vjp, norms, tree
from funcmha.dropout import masked
from funcmha.interop.flax import from_module, from_state, to_state

# flax deprecates sow_weights for reading the weights; here it is what keeps float64.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

FLAGS = {
    "all defaults": {},
    "no bias": {"use_bias": False},
    "norms": {"normalize_qk": True},
    "widths": {"qkv_features": 6, "out_features": 11, "in_kv_features": 5},
    "grouped, all": {
        "num_kv_heads": 1,
        "qkv_features": 6,
        "out_features": 7,
        "in_kv_features": 5,
        "normalize_qk": True,
    },
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def module_of(flags):
    """A module of 3 heads and width 9, all of it drawn by NumPy, which compiles nothing."""
    module = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(3, 9, decode=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **flags)
    )
    rng = np.random.default_rng(1)
    draw = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), nnx.state(module, nnx.Param))
    nnx.update(module, draw)
    return module


@nnx.jit(static_argnames=("is_causal",))
def call(module, *inputs, mask, is_causal=False):
    return module(*inputs, mask=mask, is_causal=is_causal, sow_weights=True)


def inputs_of(module):
    rng = np.random.default_rng(2)
    return [rng.standard_normal((2, *shape)) for shape in ((5, 9), *[(7, module.in_kv_features)] * 2)]


def close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def pure(state):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(state))


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no bias", "widths", "grouped, all"])
def test_values_and_gradients_match_flax(name, each_engine):
    module = module_of(FLAGS[name])
    inputs = inputs_of(module)
    mask = np.random.default_rng(3).random((2, 3, 5, 7)) < 0.5
    mask[..., 0] = True
    dy = np.random.default_rng(4).standard_normal((2, 5, module.out_features))

    def loss(module, *inputs):
        y = module(*inputs, mask=mask, sow_weights=True)
        return (y * dy).sum(), y

    pull = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, want), (dstate, *dinputs) = pull(module, *inputs)
    norm = norms.LayerNorm(1e-6) if module.normalize_qk else None
    y, cache = mha(from_module(module), *inputs, mask=mask, qk_norm=norm)
    dparams, *dxs, _ = mha_vjp(cache, dy)
    close(y, want)
    for got, dx in zip(dxs, dinputs, strict=True):
        close(got, dx)
    jax.tree.map(close, to_state(dparams), pure(dstate))


def test_causal_is_top_left():
    module = module_of({})
    inputs = inputs_of(module)
    want = call(module, *inputs, is_causal=True, mask=np.ones((2, 1, 5, 7), bool))
    close(mha(from_module(module), *inputs, mask=masks.causal())[0], want)


def test_a_fully_masked_row_is_the_mean_in_flax_the_bias_here():
    """flax 0.12.8 fills with the least float32 or float64."""
    module = module_of({})
    inputs, mask = inputs_of(module), np.ones((5, 7), bool)
    mask[2] = False
    want = call(module, *inputs, mask=mask)
    params = from_module(module)
    y, _ = mha(params, *inputs, mask=mask)
    value = np.einsum("bsc,hdc->bshd", inputs[2], params["v_proj"]["w"]) + params["v_proj"]["b"]
    mean = np.einsum("bhd,ohd->bo", value.mean(1), params["out_proj"]["w"]) + params["out_proj"]["b"]
    close(mean, want[:, 2])
    close(y[:, 2], np.broadcast_to(params["out_proj"]["b"], (2, 9)))
    rest = [0, 1, 3, 4]
    close(y[:, rest], want[:, rest])


@pytest.mark.slow
@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_masked_by_its_draw_matches_flax(broadcast):
    """`bernoulli(rngs.dropout(), 1 - rate, …)` of (1, 1, T, S), or with broadcast_dropout=False of (B, H, T, S)."""
    module = module_of({"dropout_rate": 0.25, "broadcast_dropout": broadcast, "keep_rngs": False})
    inputs = inputs_of(module)

    @nnx.jit
    def dropped(module, *inputs):
        return module(*inputs, deterministic=False, rngs=nnx.Rngs(dropout=5), sow_weights=True)

    want = dropped(module, *inputs)
    shape = (1, 1, 5, 7) if broadcast else (2, 3, 5, 7)
    keep = np.asarray(jax.random.bernoulli(nnx.Rngs(dropout=5).dropout(), 0.75, shape))
    y, _ = mha(from_module(module), *inputs, dropout=masked(keep, 0.25))
    close(y, np.asarray(want))
    assert not keep.all()


def test_decoding_matches_kv_cache_step():
    module, x = module_of({"num_kv_heads": 1}), np.random.default_rng(2).standard_normal((2, 4, 9))
    module.init_cache((2, 4, 9), dtype=jnp.float64)
    params, kv = from_module(module), None
    for t in range(3):
        want = module(x[:, t : t + 1], decode=True, sow_weights=True)
        (y, kv), _ = kv_cache.step(params, x[:, t : t + 1], kv)
        close(y, np.asarray(want))


OPTIONS = {
    "supported": "num_heads num_kv_heads in_features in_kv_features qkv_features out_features use_bias normalize_qk",
    "read off the arrays": "param_dtype",
    "of the call": "broadcast_dropout dropout_rate deterministic decode rngs keep_rngs",
    "refused": "attention_fn qkv_dot_general out_dot_general qkv_dot_general_cls out_dot_general_cls",
    "the dtype computed with": "dtype precision qkv_promote_dtype out_promote_dtype ln_promote_dtype",
    "of the beginning": "kernel_init out_kernel_init bias_init out_bias_init",
}


def test_every_option_of_flax_is_supported_or_refused():
    """flax 0.12.8. What is left are metadata, which no number depends on."""
    options = inspect.signature(nnx.MultiHeadAttention.__init__).parameters.keys() - {"self"}
    known = {name for names in OPTIONS.values() for name in names.split()}
    assert known <= options
    assert {name for name in options - known if not name.endswith("_metadata")} == set()


@pytest.mark.parametrize("option", OPTIONS["refused"].split())
def test_from_module_refuses_arithmetic_that_is_not_flax_s(option):
    module = module_of({})
    setattr(module, option, jax.lax.dot_general)
    with pytest.raises(ValueError, match=f"{option} must be"):
        from_module(module)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types_come_back_bit_for_bit(dtype):
    state = jax.tree.map(lambda a: a.astype(dtype), pure(nnx.state(module_of(FLAGS["grouped, all"]), nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, to_state(from_state(state)), state)
    assert {a.dtype for a in jax.tree.leaves(to_state(from_state(state)))} == {np.dtype(dtype)}


def test_flax_has_float32_s_digits_without_sow_weights():
    """flax 0.12.8, whose default path is `jax.nn.dot_product_attention`."""
    module = module_of({})
    inputs = inputs_of(module)
    fast = nnx.jit(lambda module, *inputs: module(*inputs))(module, *inputs)
    y, _ = mha(from_module(module), *inputs)
    assert 1e-10 < np.abs(y - fast).max() < 1e-5


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────────


@every_flag
def test_a_state_comes_back_as_it_was_without_a_copy(flags):
    state = pure(nnx.state(module_of(flags), nnx.Param))
    params = from_state(state)
    back = to_state(params)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    for got, x in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert (got.ctypes.data, got.strides) == (x.ctypes.data, x.strides)
    assert list(tree.flatten(from_state(back))) == list(tree.flatten(params))


@every_flag
def test_a_module_lends_its_memory_and_takes_parameters_back(flags):
    module = module_of(flags)
    params = from_module(module)
    kernel = module.query.kernel[...]
    assert params["q_proj"]["w"].ctypes.data == kernel.unsafe_buffer_pointer()
    other = module_of(flags)
    nnx.update(other, to_state(tree.map(lambda a: 2 * a, params)))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, 2 * b), *(pure(nnx.state(m, nnx.Param)) for m in (other, module))
    )
    tree.map(np.testing.assert_array_equal, from_state(nnx.state(module, nnx.Param)), params)


def test_axes_of_a_kernel():
    state = pure(nnx.state(module_of(FLAGS["grouped, all"]), nnx.Param))
    params = from_state(state)
    for h, d, c in np.ndindex(3, 2, 9):
        assert params["q_proj"]["w"][h, d, c] == state["query"]["kernel"][c, h, d]
    for o, h, d in np.ndindex(7, 3, 2):
        assert params["out_proj"]["w"][o, h, d] == state["out"]["kernel"][h, d, o]
    np.testing.assert_array_equal(params["k_norm"]["w"], state["key_ln"]["scale"])


def test_parameters_of_linen_have_the_same_names():
    module = linen.MultiHeadDotProductAttention(3, param_dtype=jnp.float64, normalize_qk=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.ones((2, 5, 9)))["params"]
    state = jax.tree.map(lambda a: np.random.default_rng(0).standard_normal(a.shape), shapes)
    jax.tree.map(np.testing.assert_array_equal, to_state(from_state(state)), state)


def test_jax_differentiates_through_from_state():
    state = nnx.to_pure_dict(nnx.state(module_of({}), nnx.Param))
    x = jnp.asarray(inputs_of(module_of({}))[0])
    got = jax.jit(jax.grad(lambda s: mha(from_state(s), x, x, x)[0].sum()))(state)
    params = from_state(jax.tree.map(np.asarray, state))
    y, cache = mha(params, *[np.asarray(x)] * 3)
    jax.tree.map(close, jax.tree.map(np.asarray, got), to_state(mha_vjp(cache, np.ones_like(y))[0]))


def test_flax_is_not_imported():
    code = """
import sys
from funcmha import init
from funcmha.interop.flax import from_state, to_state
from_state(to_state(init(0, 6, 3)))
assert not {"flax", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def a_state(**changes):
    """A state of H = 3, D = 2, C = 9, with changes: None takes a name out."""
    state = {f"{name}.kernel": np.ones((9, 3, 2)) for name in ("query", "key", "value")}
    state |= {f"{name}.bias": np.ones((3, 2)) for name in ("query", "key", "value")}
    state |= {"out.kernel": np.ones((3, 2, 7)), "out.bias": np.ones(7)} | {
        k.replace("_x_", "."): v for k, v in changes.items()
    }
    return tree.unflatten({name: x for name, x in state.items() if x is not None})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_x_kernel": None}, KeyError, "state must have .* and has no query.kernel"),
        ({"cache_index": np.ones(())}, KeyError, "state may have .* and has cache_index"),
        (
            {"key_x_bias": None},
            KeyError,
            "state must have all of query.bias, .* and has query.bias, value.bias, out.bias",
        ),
        ({"query_ln_x_scale": np.ones(2)}, KeyError, "state must have all of query_ln.scale, key_ln.scale, or none"),
        (
            {"key_x_kernel": np.ones((9, 3, 5))},
            ValueError,
            r"key.kernel must be \(Ckv, K, D\) with D=2 .* got \(9, 3, 5\)",
        ),
        (
            {"value_x_kernel": np.ones((5, 3, 2))},
            ValueError,
            r"value.kernel must be .* Ckv=9 as in key.kernel, .* got \(5, 3, 2\)",
        ),
        (
            {"out_x_kernel": np.ones((7, 3, 2))},
            ValueError,
            r"out.kernel must be \(H, D, O\) with H=3 .* got \(7, 3, 2\)",
        ),
        ({"out_x_bias": np.ones(3)}, ValueError, r"out.bias must be \(O\) with O=7 as in out.kernel, got \(3,\)"),
        ({"out_x_bias": np.ones(7, "f4")}, TypeError, "out.bias must have dtype float64 as query.kernel has"),
        ({"out_x_bias": 1.0}, TypeError, "out.bias must be an array, got float"),
    ],
)
def test_from_state_refuses(changes, error, message):
    changes = {"cache_index": None} | changes
    with pytest.raises(error, match=message):
        from_state(a_state(**changes))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            init(0, 9, 3, value_dim=5),
            ValueError,
            r"v_proj.w must be \(K, D, Ckv\) with .* D=3 as in q_proj.w, .* got \(3, 5, 9\)",
        ),
        (init(0, 9, 3, vdim=5), ValueError, r"v_proj.w must be .* Ckv=9 as in k_proj.w, got \(3, 3, 5\)"),
        (init(0, 9, 3, sink=True), KeyError, "params may have .* and has sink.w"),
        (
            init(0, 9, 3) | {"k_proj": {"w": np.ones((3, 3, 9), "f4")}},
            KeyError,
            "params must have all of q_proj.b, .* or none",
        ),
    ],
)
def test_to_state_refuses_what_flax_cannot_express(params, error, message):
    with pytest.raises(error, match=message):
        to_state(params)


def test_from_module_refuses_other_modules():
    with pytest.raises(TypeError, match=r"module must be a flax.nnx.MultiHeadAttention, got Linear"):
        from_module(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
