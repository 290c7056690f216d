"""`equinox.nn.MultiheadAttention` is the oracle, in float64, which it keeps."""

import inspect
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcmha import init, mha, mha_vjp, rotary, tree
from funcmha.dropout import masked
from funcmha.interop.equinox import from_module, from_state, to_module, to_state

BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
FLAGS = {
    "all defaults": {},
    "biases": BIASES,
    "widths": {"key_size": 5, "value_size": 7, "qk_size": 2, "vo_size": 11, "output_size": 13},
    **{f"{name} alone": {name: True} for name in BIASES},
    "all": BIASES | {"key_size": 5, "value_size": 7, "qk_size": 2, "vo_size": 11, "output_size": 13},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def module_of(flags):
    """A module of 3 heads and width 9, drawn by NumPy, which compiles nothing."""
    module = eqx.filter_eval_shape(lambda: eqx.nn.MultiheadAttention(3, 9, key=jax.random.key(0), **flags))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape)) if isinstance(a, jax.ShapeDtypeStruct) else a, module
    )


def inputs_of(module):
    rng = np.random.default_rng(2)
    return [rng.standard_normal(shape) for shape in ((5, 9), (7, module.key_size), (7, module.value_size))]


def close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("flags", [FLAGS["all"], {}], ids=["all", "all defaults"])
def test_values_and_gradients_match_equinox(flags, per_head, each_engine):
    module = module_of(flags)
    inputs = inputs_of(module)
    mask = np.random.default_rng(3).random((3, 5, 7) if per_head else (5, 7)) < 0.5
    mask[..., 0] = True
    dy = np.random.default_rng(4).standard_normal((5, module.output_size))

    def loss(module, inputs):
        y = module(*inputs, mask=jnp.asarray(mask))
        return (y * dy).sum(), y

    pull = eqx.filter_jit(eqx.filter_value_and_grad(lambda both: loss(*both), has_aux=True))
    (_, want), (dmodule, dinputs) = pull((module, [jnp.asarray(x) for x in inputs]))
    y, cache = mha(from_module(module), *inputs, mask=mask)
    dparams, *dxs, _ = mha_vjp(cache, dy)
    close(y, want)
    for got, dx in zip(dxs, dinputs, strict=True):
        close(got, dx)
    arrays = eqx.filter(to_module(dparams, module), lambda x: isinstance(x, np.ndarray))
    jax.tree.map(close, arrays, eqx.filter(dmodule, eqx.is_array))
    tree.map(close, dparams, from_module(dmodule))


def test_a_fully_masked_row_is_the_mean_in_equinox_the_bias_here():
    """equinox 0.13.8 fills with the least number of the dtype."""
    module = module_of(BIASES)
    inputs, mask = inputs_of(module), np.ones((5, 7), bool)
    mask[2] = False
    want = eqx.filter_jit(module)(*map(jnp.asarray, inputs), mask=jnp.asarray(mask))
    params = from_module(module)
    y, _ = mha(params, *inputs, mask=mask)
    value = np.einsum("sc,hdc->shd", inputs[2], params["v_proj"]["w"]) + params["v_proj"]["b"]
    close(np.einsum("hd,ohd->o", value.mean(0), params["out_proj"]["w"]) + params["out_proj"]["b"], want[2])
    close(y[2], params["out_proj"]["b"])
    close(y[[0, 1, 3, 4]], want[np.array([0, 1, 3, 4])])


def test_dropout_masked_by_its_draw_matches_equinox():
    """One key for each head; `bernoulli(key, 1 - p, (T, S))`."""
    module = module_of({"dropout_p": 0.25})
    inputs, key = inputs_of(module), jax.random.key(5)
    want = eqx.filter_jit(module)(*map(jnp.asarray, inputs), key=key)
    keep = np.stack([np.asarray(jax.random.bernoulli(k, 0.75, (5, 7))) for k in jax.random.split(key, 3)])
    close(mha(from_module(module), *inputs, dropout=masked(keep, 0.25))[0], np.asarray(want))
    assert not keep.all()


def test_heads_processed_by_rotary_positions_are_rotary():
    module = module_of({"qk_size": 4})
    x = np.random.default_rng(2).standard_normal((5, 9))
    embedding = eqx.nn.RotaryPositionalEmbedding(4, 1009.0)
    rotate = jax.vmap(embedding, in_axes=1, out_axes=1)
    want = module(*[jnp.asarray(x)] * 3, process_heads=lambda q, k, v: (rotate(q), rotate(k), v))
    table = rotary.table(np.arange(5), rotary.frequencies(4, base=1009.0))
    close(mha(from_module(module), x, x, x, rotary=table)[0], np.asarray(want))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types_come_back_bit_for_bit(dtype):
    module = jax.tree.map(lambda a: a.astype(dtype) if eqx.is_array(a) else a, module_of(FLAGS["all"]))
    params = from_module(module)
    assert params["out_proj"]["b"].dtype == np.dtype(dtype)
    arrays = eqx.filter(to_module(params, module), lambda x: isinstance(x, np.ndarray))
    jax.tree.map(np.testing.assert_array_equal, arrays, eqx.filter(module, eqx.is_array))


def test_every_option_of_equinox_is_supported():
    """equinox 0.13.8: what there are tests for, by hand, so that a new one is noticed."""
    supported = [
        "num_heads",
        "query_size",
        "key_size",
        "value_size",
        "output_size",
        "qk_size",
        "vo_size",
        "dropout_p",
        "dtype",
    ]
    options = inspect.signature(eqx.nn.MultiheadAttention.__init__).parameters.keys()
    assert options - {"self", "key", "inference"} == {*supported, *BIASES}
    options = inspect.signature(eqx.nn.MultiheadAttention.__call__).parameters.keys() - {"self"}
    assert options == {"query", "key_", "value", "mask", "key", "inference", "deterministic", "process_heads"}


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────────


@every_flag
def test_parameters_come_back_as_they_were_without_a_copy(flags):
    module = module_of(flags)
    params = from_module(module)
    assert params["q_proj"]["w"].ctypes.data == module.query_proj.weight.unsafe_buffer_pointer()
    back = tree.flatten(to_state(params))
    for name, x in back.items():
        layer, leaf = name.split(".")
        want = getattr(getattr(module, layer), leaf)
        np.testing.assert_array_equal(x, want)
        assert x.ctypes.data == want.unsafe_buffer_pointer()
    assert len(back) == 4 + sum(name in flags for name in BIASES)
    for state in (to_state(params), back):
        tree.map(np.testing.assert_array_equal, from_state(state, 3), params)


@every_flag
def test_a_module_takes_parameters_and_the_old_one_stays(flags):
    module = module_of(flags)
    before = from_module(module)
    doubled = to_module(tree.map(lambda a: 2 * a, before), module)
    assert type(doubled) is type(module)
    tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), from_module(doubled), before)
    tree.map(np.testing.assert_array_equal, from_module(module), before)


def test_heads_are_rows_of_a_weight_and_columns_of_the_output_s():
    module = module_of(FLAGS["all"])
    params = from_module(module)
    for h in range(3):
        np.testing.assert_array_equal(params["q_proj"]["w"][h], module.query_proj.weight[2 * h : 2 * h + 2])
        np.testing.assert_array_equal(params["v_proj"]["b"][h], module.value_proj.bias[11 * h : 11 * h + 11])
        np.testing.assert_array_equal(params["out_proj"]["w"][:, h], module.output_proj.weight[:, 11 * h : 11 * h + 11])


def test_equinox_is_not_imported_for_arrays():
    code = """
import sys
from funcmha import init
from funcmha.interop.equinox import from_state, to_state
from_state(to_state(init(0, 6, 3)), 3)
assert not {"equinox", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def a_state(**changes):
    """A state of H = 3, D = 2, E = 5, C = 9, with changes: None takes a name out."""
    state = {"query_proj.weight": np.ones((6, 9)), "query_proj.bias": np.ones(6)}
    state |= {"key_proj.weight": np.ones((6, 9)), "value_proj.weight": np.ones((15, 9))}
    state |= {"output_proj.weight": np.ones((7, 15)), "output_proj.bias": np.ones(7)}
    state |= {name.replace("_x_", "."): x for name, x in changes.items()}
    return {name: x for name, x in state.items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "heads", "error", "message"),
    [
        ({"key_proj_x_weight": None}, 3, KeyError, "state must have .* and has no key_proj.weight"),
        ({"dropout_x_p": np.ones(())}, 3, KeyError, "state may have .* and has dropout.p"),
        ({}, 4, ValueError, r"query_proj.weight must be \(H·D, Cq\) with H·D a multiple of num_heads=4, got \(6, 9\)"),
        ({"query_proj_x_bias": np.ones(9)}, 3, ValueError, r"query_proj.bias must be \(H·D\) with H·D=6 .* got \(9,\)"),
        ({"key_proj_x_weight": np.ones((15, 9))}, 3, ValueError, r"key_proj.weight must be .* H·D=6 .* got \(15, 9\)"),
        (
            {"output_proj_x_weight": np.ones((7, 6))},
            3,
            ValueError,
            r"output_proj.weight must be \(O, H·E\) with H·E=15 .*",
        ),
        ({"output_proj_x_bias": np.ones(7, "f4")}, 3, TypeError, "output_proj.bias must have dtype float64"),
        ({}, True, TypeError, "num_heads must be an int, got True"),
        ({}, 0, ValueError, "num_heads must be at least 1, got 0"),
    ],
)
def test_from_state_refuses(changes, heads, error, message):
    with pytest.raises(error, match=message):
        from_state(a_state(**changes), heads)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            init(0, 12, 6, num_kv_heads=2),
            ValueError,
            r"k_proj.w must be \(H, D, Ck\) with H=6 as in q_proj.w, .* got \(2, 2, 12\)",
        ),
        (init(0, 12, 6, qk_norm=True), KeyError, "params may have .* and has q_norm.w"),
    ],
)
def test_to_state_refuses_what_equinox_cannot_express(params, error, message):
    with pytest.raises(error, match=message):
        to_state(params)


def test_to_module_refuses_another_module_s_parameters():
    module = module_of({})
    with pytest.raises(
        KeyError, match=r"params must have the leaves of module, query_proj.weight, .* and have .*_proj.bias"
    ):
        to_module(init(0, 9, 3, dtype="f8"), module)
    with pytest.raises(ValueError, match=r"output_proj.weight must be \(9, 9\) as in module, got \(7, 9\)"):
        to_module(init(0, 9, 3, out_dim=7, bias=False, dtype="f8"), module)


def test_from_module_refuses_other_modules():
    with pytest.raises(TypeError, match=r"module must be an equinox.nn.MultiheadAttention, got Linear"):
        from_module(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
