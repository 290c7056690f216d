"""The layers of Keras are the oracle, with PyTorch for their backend: in float64, as they return the scores too.

Without, they take the fused path, which is float32.
"""

import inspect
import os
import subprocess
import sys
import warnings

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported; no other test imports it
with warnings.catch_warnings():  # what Keras imports uses names that are deprecated where they come from
    warnings.simplefilter("ignore")
    import keras

import numpy as np
import pytest
import torch

from funcmha import init, mha, mha_vjp, tree
from funcmha.dropout import masked
from funcmha.interop.keras import from_layer, from_weights, masks, to_weights

# Keras's own way from a variable to NumPy, which `get_weights` takes, is not that of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LAYERS = {
    "all defaults": lambda: keras.layers.MultiHeadAttention(3, 2, dtype="float64"),
    "no bias": lambda: keras.layers.MultiHeadAttention(3, 2, use_bias=False, dtype="float64"),
    "widths": lambda: keras.layers.MultiHeadAttention(3, 2, value_dim=11, output_shape=13, dtype="float64"),
    "grouped": lambda: keras.layers.GroupQueryAttention(2, 6, 3, dtype="float64"),
    "grouped, no bias": lambda: keras.layers.GroupQueryAttention(2, 6, 3, use_bias=False, dtype="float64"),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
B, T, S = 2, 5, 7


def layer_of(name, seed=0):
    """A built layer, of biases that are not 0, with inputs: query, key and value, in funcmha's order."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((B, *shape)) for shape in ((T, 9), (S, 17), (S, 19)))
    layer = LAYERS[name]()
    layer.build(query.shape, value.shape, key.shape)
    layer.set_weights([rng.standard_normal(w.shape) for w in layer.weights])
    return layer, (query, key, value)


def some_mask(seed=3):
    mask = np.random.default_rng(seed).random((B, T, S)) < 0.5
    mask[..., 0] = True
    return mask


def call(layer, query, key, value, **options):
    """y, as Keras takes its inputs: the value before the key."""
    return layer(query, value, key, return_attention_scores=True, **options)[0].detach().numpy()


def close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@every_layer
def test_values_and_gradients_match_keras(name, each_engine):
    layer, arrays = layer_of(name)
    query, key, value = (torch.tensor(x, requires_grad=True) for x in arrays)
    mask = some_mask()
    want, _ = layer(query, value, key, attention_mask=torch.tensor(mask), return_attention_scores=True)
    dy = np.random.default_rng(4).standard_normal(want.shape)
    leaves = [query, key, value, *(w.value for w in layer.weights)]
    grads = [g.numpy() for g in torch.autograd.grad(want, leaves, torch.tensor(dy))]

    y, cache = mha(from_layer(layer), *arrays, mask=masks(attention_mask=mask))
    dparams, *dxs, _ = mha_vjp(cache, dy)
    close(y, want.detach().numpy())
    for got, dx in zip([*dxs, *to_weights(dparams).values()], grads, strict=True):
        close(got, dx)


def test_a_fully_masked_row_has_two_values_in_keras():
    """keras 3.15.1: 0 where it returns the scores, the mean of the values where it does not; then the output's bias."""
    layer, (query, key, value) = layer_of("all defaults")
    mask = some_mask()
    mask[0, 2] = False
    params = from_layer(layer)
    y, _ = mha(params, query, key, value, mask=masks(attention_mask=mask))
    close(y, call(layer, query, key, value, attention_mask=mask))
    close(y[0, 2], params["out_proj"]["b"])
    fused = layer(query, value, key, attention_mask=mask).detach().numpy()
    v = np.einsum("sc,hdc->shd", value[0], params["v_proj"]["w"]) + params["v_proj"]["b"]
    mean = np.einsum("hd,ohd->o", v.mean(0), params["out_proj"]["w"]) + params["out_proj"]["b"]
    np.testing.assert_allclose(fused[0, 2], mean, rtol=1e-4, atol=1e-4)


def test_the_fused_path_of_keras_is_float32():
    """keras 3.15.1 with PyTorch's backend, in a layer of float64."""
    layer, (query, key, value) = layer_of("all defaults")
    y, _ = mha(from_layer(layer), query, key, value)
    close(y, call(layer, query, key, value))
    fused = layer(query, value, key).detach().numpy()
    assert fused.dtype == np.float64
    assert 1e-9 < np.abs(fused - y).max() < 1e-4


def test_inputs_of_more_axes_are_one_sequence_in_keras():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((B, 3, T, 9))
    for axes, shape in ((None, (B, 3 * T, 9)), ((1, 2), (B, 3 * T, 9)), (2, (B, 3, T, 9))):
        layer = keras.layers.MultiHeadAttention(3, 2, attention_axes=axes, dtype="float64")
        layer.build(x.shape, x.shape)
        layer.set_weights([rng.standard_normal(w.shape) for w in layer.weights])
        flat = x.reshape(shape)
        close(mha(from_layer(layer), flat, flat, flat)[0].reshape(x.shape), call(layer, x, x, x))


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GroupQueryAttention"])
def test_dropout_masked_by_its_draw_matches_keras(kind):
    """A layer of the same seed draws the same: what its dropout leaves of ones is the mask."""
    sizes = (6, 2) if kind == "MultiHeadAttention" else (2, 6, 3)
    layer, twin = (getattr(keras.layers, kind)(*sizes, dropout=0.25, seed=7, dtype="float64") for _ in range(2))
    inputs = [np.random.default_rng(8).standard_normal((B, n, 9)) for n in (T, S, S)]
    for one in (layer, twin):
        one.build(inputs[0].shape, inputs[2].shape, inputs[1].shape)
    keep = twin._dropout_layer(torch.ones((B, 6, T, S), dtype=torch.float64), training=True).numpy() > 0
    want = call(layer, *inputs, training=True)
    close(mha(from_layer(layer), *inputs, dropout=masked(keep, 0.25))[0], want)
    assert not keep.all()


OPTIONS = {
    "MultiHeadAttention": "num_heads key_dim value_dim output_shape attention_axes",
    "GroupQueryAttention": "head_dim num_query_heads num_key_value_heads",
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_of_keras_is_supported_or_refused(kind):
    """keras 3.15.1. What is left are initialisers, regularisers and constraints."""
    both = "dropout use_bias sliding_window flash_attention use_gate seed"
    options = inspect.signature(getattr(keras.layers, kind).__init__).parameters.keys() - {"self", "kwargs"}
    known = {*OPTIONS[kind].split(), *both.split()}
    assert known <= options
    training = ("_initializer", "_regularizer", "_constraint")
    assert {name for name in options - known if not name.endswith(training)} == set()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_gate": True}, KeyError, "weights may have .* and has gate/kernel"),
        ({"output_shape": (3, 5)}, ValueError, r"attention_output/kernel must be \(H, E, O\) .* got \(3, 2, 3, 5\)"),
    ],
)
def test_a_layer_that_funcmha_cannot_be_is_refused(options, error, message):
    layer = keras.layers.MultiHeadAttention(3, 2, **options)
    layer.build((B, T, 9), (B, S, 9))
    with pytest.raises(error, match=message):
        from_layer(layer)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_come_back_bit_for_bit(dtype):
    layer = keras.layers.GroupQueryAttention(2, 6, 3, dtype=dtype)
    layer.build((B, T, 9), (B, S, 9))
    for x, weight in zip(to_weights(from_layer(layer)).values(), layer.weights, strict=True):
        assert x.dtype.name == dtype
        assert np.array_equal(x.view(np.int16), weight.value.detach().view(torch.int16).numpy())


JAX = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import warnings
warnings.simplefilter("ignore")
import jax, keras, numpy as np
from funcmha import mha, mha_vjp
from funcmha.interop.keras import from_layer, masks, to_weights

jax.config.update("jax_enable_x64", True)
assert keras.backend.backend() == "jax"
rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((2, *shape)) for shape in ((5, 9), (7, 17), (7, 19)))
mask = rng.random((2, 5, 7)) < 0.5
mask[..., 0] = True
layers = [
    keras.layers.MultiHeadAttention(3, 2, value_dim=11, output_shape=13, dtype="float64"),
    keras.layers.GroupQueryAttention(2, 6, 3, dtype="float64"),
]
for layer, width in zip(layers, (13, 9)):
    layer.build(query.shape, value.shape, key.shape)
    layer.set_weights([rng.standard_normal(w.shape) for w in layer.weights])
    params, dy = from_layer(layer), rng.standard_normal((2, 5, width))

    def f(query, key, value, *weights):
        options = dict(attention_mask=mask, use_causal_mask=True, return_attention_scores=True)
        return layer.stateless_call(weights, [], query, value, key, **options)[0][0]

    arrays = query, key, value, *(w.value for w in layer.trainable_variables)
    want, grads = jax.jit(lambda dy, *arrays: (f(*arrays), jax.vjp(f, *arrays)[1](dy)))(dy, *arrays)
    y, cache = mha(params, query, key, value, mask=masks(attention_mask=mask, use_causal_mask=True))
    dparams, *dxs, _ = mha_vjp(cache, dy)
    for got, x in zip([y, *dxs, *to_weights(dparams).values()], [want, *grads], strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-11, atol=1e-11)
    assert all(np.shares_memory(a, w.value) for a, w in zip(to_weights(params).values(), layer.weights))
"""


@pytest.mark.slow
def test_values_and_gradients_with_the_jax_backend():
    """In a process of its own: a backend is chosen before Keras is imported."""
    out = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────

PADDING = np.arange(S) < np.array([[4], [7]])
MASKS = {
    "attention_mask": {"attention_mask": some_mask()},
    "one for all": {"attention_mask": some_mask()[:1]},
    "value_mask and key_mask": {"value_mask": PADDING, "key_mask": np.arange(S) > np.array([[-1], [0]])},
    "causal": {"use_causal_mask": True},
    "all": {"attention_mask": some_mask() | (np.arange(S) == 3), "value_mask": PADDING, "use_causal_mask": False},
}


@pytest.mark.parametrize("name", ["all defaults", "grouped"])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_masks_match_keras(name, options):
    layer, inputs = layer_of(name)
    want = call(layer, *inputs, **options)
    close(mha(from_layer(layer), *inputs, mask=masks(**options))[0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sliding_window_counts_the_query_and_has_two_sides(causal):
    layer, inputs = layer_of("all defaults")
    layer._sliding_window = 3
    mask = masks(use_causal_mask=causal, sliding_window=3)
    close(mha(from_layer(layer), *inputs, mask=mask)[0], call(layer, *inputs, use_causal_mask=causal))
    allowed = mask.dense(T, S)
    np.testing.assert_array_equal(np.flatnonzero(allowed[2]), [0, 1, 2] if causal else [0, 1, 2, 3, 4])


def test_a_query_mask_forbids_all_to_its_queries():
    """As Keras documents. MultiHeadAttention of keras 3.15.1 overlooks the argument; GroupQueryAttention does not."""
    query_mask = np.arange(T) < np.array([[3], [5]])
    for name, obeyed in (("all defaults", False), ("grouped", True)):
        layer, inputs = layer_of(name)
        ours = mha(from_layer(layer), *inputs, mask=masks(query_mask=query_mask))[0]
        close(call(layer, *inputs, query_mask=query_mask), ours if obeyed else call(layer, *inputs))
        close(ours[0, 3:], np.broadcast_to(layer.get_weights()[-1], (2, 9)))


def test_without_masks_there_is_none():
    assert masks() is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": np.ones((B, 3, T, S), bool)}, ValueError, r"attention_mask must be \(B, T, S\), got"),
        ({"attention_mask": np.ones((B, T, S))}, TypeError, "attention_mask must be boolean, True = attend, got dtype"),
        ({"value_mask": PADDING, "key_mask": PADDING[:, :5]}, ValueError, r"key_mask must be \(B, S\) with .* S=7"),
        (
            {"query_mask": np.ones((B, 4), bool), "attention_mask": some_mask()},
            ValueError,
            "attention_mask .* T=4 as in",
        ),
        ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1 or None, got 0"),
        ({"sliding_window": True}, TypeError, "sliding_window must be an int or None, got True"),
    ],
)
def test_masks_refuses(options, error, message):
    with pytest.raises(error, match=message):
        masks(**options)


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────────


@every_layer
def test_weights_come_back_as_they_were_without_a_copy(name):
    layer, _ = layer_of(name)
    back = to_weights(from_layer(layer))
    for (path, x), weight in zip(back.items(), layer.weights, strict=True):
        assert weight.path.endswith(path)
        np.testing.assert_array_equal(x, weight.numpy())
        assert (x.ctypes.data, x.shape) == (weight.value.data_ptr(), tuple(weight.shape))
    tree.map(np.testing.assert_array_equal, from_weights(back), from_layer(layer))


@every_layer
def test_a_layer_takes_parameters(name):
    layer, other = layer_of(name)[0], layer_of(name, seed=5)[0]
    doubled = tree.map(lambda a: 2 * a, from_layer(layer))
    other.set_weights(list(to_weights(doubled).values()))
    tree.map(np.testing.assert_array_equal, from_layer(other), doubled)


def test_axes_of_a_kernel():
    layer, _ = layer_of("grouped")
    params, weights = (
        from_layer(layer),
        dict(zip(("q", "qb", "k", "kb", "v", "vb", "o"), layer.get_weights(), strict=False)),
    )
    for k, d, c in np.ndindex(3, 2, 17):
        assert params["k_proj"]["w"][k, d, c] == weights["k"][c, k, d]
    for o, h, d in np.ndindex(9, 6, 2):
        assert params["out_proj"]["w"][o, h, d] == weights["o"][h, d, o]


def test_keras_is_not_imported():
    code = """
import sys
import numpy as np
from funcmha import init
from funcmha.interop.keras import from_weights, masks, to_weights
from_weights(to_weights(init(0, 6, 3)))
masks(query_mask=np.ones((2, 3), bool))
assert not {"keras", "jax", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def some_weights(**changes):
    """Weights of H = 6, K = 3, D = 2, C = 9, with changes: None takes a name out."""
    weights = {"query/kernel": np.ones((9, 6, 2)), "query/bias": np.ones((6, 2))}
    for name in ("key", "value"):
        weights |= {f"{name}/kernel": np.ones((9, 3, 2)), f"{name}/bias": np.ones((3, 2))}
    weights |= {"attention_output/kernel": np.ones((6, 2, 9)), "attention_output/bias": np.ones(9)}
    weights |= {name.replace("_x_", "/"): x for name, x in changes.items()}
    return {f"model/layer/{name}": x for name, x in weights.items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value_x_kernel": None}, KeyError, "weights must have .* and has no value/kernel"),
        ({"gate_x_kernel": np.ones((9, 6, 2))}, KeyError, "weights may have .* and has gate/kernel"),
        ({"key_x_bias": None}, KeyError, "weights must have all of query/bias, .*, or none"),
        (
            {"key_x_kernel": np.ones((9, 3, 5))},
            ValueError,
            r"key/kernel must be \(Ck, K, D\) with D=2 .* got \(9, 3, 5\)",
        ),
        ({"value_x_kernel": np.ones((9, 3, 5))}, ValueError, r"value/kernel must be \(Cv, K, D\) .* got \(9, 3, 5\)"),
        (
            {"attention_output_x_kernel": np.ones((6, 2, 3, 3))},
            ValueError,
            r"attention_output/kernel .* got \(6, 2, 3, 3\)",
        ),
        ({"attention_output_x_bias": np.ones(9, "f4")}, TypeError, "attention_output/bias must have dtype float64"),
        ({"query_x_kernel": [1.0]}, TypeError, "query/kernel must be an array, got list"),
    ],
)
def test_from_weights_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        from_weights(some_weights(**changes))


def test_from_weights_refuses_two_layers_at_once():
    both = some_weights() | {f"other/{path}": x for path, x in some_weights().items()}
    with pytest.raises(KeyError, match="weights must be those of one layer, got model/layer/query/kernel"):
        from_weights(both)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (init(0, 12, 6, num_kv_heads=3, value_dim=5), ValueError, r"v_proj.w must be \(K, D, Cv\) .* got \(3, 5, 12\)"),
        (init(0, 12, 6, num_kv_heads=3, out_dim=5), ValueError, r"out_proj.w must be \(Cq, H, D\) .* got \(5, 6, 2\)"),
        (init(0, 12, 6, bias_kv=True), KeyError, "params may have .* and has bias_kv.k"),
    ],
)
def test_to_weights_refuses_what_keras_cannot_express(params, error, message):
    with pytest.raises(error, match=message):
        to_weights(params)


def test_from_layer_refuses_what_is_no_layer():
    with pytest.raises(TypeError, match=r"layer must be a keras.layers.MultiHeadAttention or .*, got dict"):
        from_layer({})
    with pytest.raises(ValueError, match=r"layer must have been built, by layer.build or a first call"):
        from_layer(keras.layers.MultiHeadAttention(3, 2))
