"""transformers 5.24 is the oracle: each layer as the whole model of its family calls it, eagerly, with random weights.

Its modeling files compute some things in float32 whatever the dtype: angles (every `RotaryEmbedding`), the softmax
(`dtype=torch.float32` in `eager_attention_forward`, but for GPT-2 and GPT-OSS) and the norms of queries and keys
(`.float()`, `.to(torch.float32)`). `in_float64` makes float64 of every float32 that they name, so that their own code
is a float64 oracle; `test_in_float32_...` and `test_float64_there_...` are of the library as it is.
"""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from funcmha import mha, mha_vjp, self_attention, self_attention_vjp, tree
from funcmha.interop.huggingface import from_state_dict, load_layer, to_state_dict
from funcmha.interop.huggingface.defaults import DEFAULTS
from funcmha.interop.huggingface.families import ALL_LAYERS, read
from funcmha.interop.huggingface.layer import static
from funcmha.masks import dense

os.environ["HF_HUB_OFFLINE"] = "1"

N, T, OFFSET, WINDOW = 2, 11, 37, 4
U32 = 2.0**-24

FAMILIES = {  # model_type: the folder and the class names of its modeling file
    "gpt2": ("gpt2", "GPT2", "GPT2Model"),
    "llama": ("llama", "Llama", "LlamaModel"),
    "gemma": ("gemma", "Gemma", "GemmaModel"),
    "gemma2": ("gemma2", "Gemma2", "Gemma2Model"),
    "gemma3_text": ("gemma3", "Gemma3", "Gemma3TextModel"),
    "qwen2": ("qwen2", "Qwen2", "Qwen2Model"),
    "qwen2_moe": ("qwen2_moe", "Qwen2Moe", "Qwen2MoeModel"),
    "qwen3": ("qwen3", "Qwen3", "Qwen3Model"),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe", "Qwen3MoeModel"),
    "gpt_oss": ("gpt_oss", "GptOss", "GptOssModel"),
    "mistral": ("mistral", "Mistral", "MistralModel"),
    "mixtral": ("mixtral", "Mixtral", "MixtralModel"),
    "phi3": ("phi3", "Phi3", "Phi3Model"),
    "smollm3": ("smollm3", "SmolLM3", "SmolLM3Model"),
    "granite": ("granite", "Granite", "GraniteModel"),
    "olmo": ("olmo", "Olmo", "OlmoModel"),
    "starcoder2": ("starcoder2", "Starcoder2", "Starcoder2Model"),
    "cohere": ("cohere", "Cohere", "CohereModel"),
    "cohere2": ("cohere2", "Cohere2", "Cohere2Model"),
    "glm4": ("glm4", "Glm4", "Glm4Model"),
    "stablelm": ("stablelm", "StableLm", "StableLmModel"),
}
WIDTH_OF_A_HEAD = (  # is hidden_size // num_attention_heads: these have no field for it
    *("qwen2", "qwen2_moe", "phi3", "smollm3", "granite", "olmo", "starcoder2", "cohere", "cohere2", "stablelm"),
)
SMALL = {
    "hidden_size": 30,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "num_hidden_layers": 2,
    "intermediate_size": 7,
    "vocab_size": 5,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 30, "n_head": 5, "n_layer": 2, "n_inner": 7, "vocab_size": 5, "bos_token_id": 1, "eos_token_id": 2}
SLIDES = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
GEMMA_3 = {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 23}
OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 7}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(7)], "long_factor": [2.0 + i**2 for i in range(7)]}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 1009.0, **parameters}}


class Case(NamedTuple):
    """Layer n of a model with this config."""

    kind: str
    n: int
    config: dict


CASES = {
    "GPT-2": Case("gpt2", 0, {}),
    "GPT-2, scaled by its layer": Case(
        "gpt2", 1, {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
    ),
    "GPT-2, reordered and upcast": Case("gpt2", 1, {"reorder_and_upcast_attn": True}),
    "Llama": Case("llama", 1, {}),
    "Llama with biases, linear": Case("llama", 0, {"attention_bias": True} | rope(rope_type="linear", factor=4.0)),
    "Llama 3.1": Case(
        "llama",
        0,
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "Llama, yarn": Case(
        "llama", 0, rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=6.0)
    ),
    "Llama, dynamic, in its context": Case("llama", 0, rope(rope_type="dynamic", factor=3.0)),
    "Llama, dynamic, beyond its context": Case(
        "llama", 0, rope(rope_type="dynamic", factor=3.0) | {"max_position_embeddings": 29}
    ),
    "Llama, longrope, short": Case(
        "llama", 0, rope(rope_type="longrope", factor=8.0, original_max_position_embeddings=48, **FACTORS)
    ),
    "Llama, longrope, long": Case(
        "llama", 0, rope(rope_type="longrope", original_max_position_embeddings=47, **FACTORS)
    ),
    "Llama, proportional": Case("llama", 0, rope(rope_type="proportional", partial_rotary_factor=0.45, factor=2.0)),
    "Gemma": Case("gemma", 0, {"head_dim": 16, "attention_bias": True}),
    "Gemma 2, sliding": Case(
        "gemma2", 0, {"sliding_window": WINDOW, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 23}
    ),
    "Gemma 2, full": Case("gemma2", 1, {"sliding_window": WINDOW, "attn_logit_softcapping": 1.5}),
    "Gemma 3, local": Case("gemma3_text", 0, GEMMA_3),
    "Gemma 3, global": Case("gemma3_text", 1, GEMMA_3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Gemma 3, local, both ways": Case("gemma3_text", 0, GEMMA_3 | {"use_bidirectional_attention": True}),
    "Gemma 3, global, both ways": Case("gemma3_text", 1, GEMMA_3 | {"use_bidirectional_attention": True}),
    "Qwen 2": Case("qwen2", 0, SLIDES),
    "Qwen 2, sliding": Case("qwen2", 1, SLIDES),
    "Qwen 3": Case("qwen3", 0, SLIDES),
    "Qwen 3, sliding": Case("qwen3", 1, SLIDES | {"attention_bias": True}),
    "GPT-OSS, sliding": Case("gpt_oss", 0, OSS),
    "GPT-OSS, full": Case(
        "gpt_oss",
        1,
        OSS | rope(rope_type="yarn", factor=32.0, beta_fast=6.0, truncate=False, original_max_position_embeddings=64),
    ),
    "Qwen 2 MoE, sliding": Case("qwen2_moe", 0, MOE | SLIDES),
    "Qwen 2 MoE, full, without biases": Case("qwen2_moe", 1, MOE | SLIDES | {"qkv_bias": False}),
    "Qwen 3 MoE": Case("qwen3_moe", 0, MOE),
    "Qwen 3 MoE, sliding": Case("qwen3_moe", 1, MOE | SLIDES),
    "Mistral": Case("mistral", 0, {"sliding_window": WINDOW}),
    "Mistral without a window": Case("mistral", 1, {"sliding_window": None}),
    "Mixtral": Case("mixtral", 0, OSS),
    "Phi-3": Case("phi3", 0, {"sliding_window": WINDOW}),
    "Phi-4, a part of the features, long": Case(
        "phi3",
        1,
        {"original_max_position_embeddings": 47}
        | rope(
            rope_type="longrope",
            partial_rotary_factor=0.43,
            **{key: factors[:3] for key, factors in FACTORS.items()},
        ),
    ),
    "SmolLM 3": Case("smollm3", 0, {"no_rope_layer_interval": 2}),
    "SmolLM 3, without positions": Case(
        "smollm3", 1, {"no_rope_layer_interval": 2, "sliding_window": WINDOW, "use_sliding_window": True}
    ),
    "Granite": Case("granite", 0, {"attention_multiplier": 0.37}),
    "OLMo": Case("olmo", 0, {"attention_bias": True}),
    "StarCoder 2": Case("starcoder2", 0, {"sliding_window": WINDOW}),
    "StarCoder 2 without biases": Case("starcoder2", 1, {"use_bias": False}),
    "Cohere": Case("cohere", 0, {}),
    "Cohere 2, sliding": Case("cohere2", 0, {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "Cohere 2, full": Case("cohere2", 1, {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "GLM-4": Case("glm4", 0, {"head_dim": 12}),
    "GLM-4, linear": Case(
        "glm4", 1, {"head_dim": 16} | rope(rope_type="linear", factor=4.0, partial_rotary_factor=0.25)
    ),
    "StableLM": Case("stablelm", 0, {"hidden_size": 6 * 16, "use_qkv_bias": True}),
}
every = pytest.mark.parametrize("name", CASES)


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def in_float64():
    """What transformers does in float32 whatever the dtype, it does in float64; also what a tensor of integers gives
    when it is divided, as the length of a text is for "dynamic" positions."""
    usual = torch.get_default_dtype()
    with (
        patch.object(torch, "float32", torch.float64),
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def modeling(kind):
    folder, stem, model = FAMILIES[kind]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    configs = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    return (
        module,
        getattr(configs, stem + ("TextConfig" if kind == "gemma3_text" else "Config")),
        getattr(module, model),
    )


def config_of(name, **other):
    kind, _, more = CASES[name]
    _, make, _ = modeling(kind)
    small = GPT2 if kind == "gpt2" else SMALL
    if kind in WIDTH_OF_A_HEAD:
        small = small | {"hidden_size": 6 * 14}
        small.pop("head_dim")
    config = make(**(small | more | other))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # of GPT-OSS; beside the attention, and with widths that kernels refuse
    return config


def model_of(name, dtype=torch.float64, half=None, **other):
    """The model, its attention modules filled with random numbers, and the module of the layer."""
    kind, n, _ = CASES[name]
    model = modeling(kind)[2](config_of(name, **other)).to(dtype).eval()
    attention = model.h[n].attn if kind == "gpt2" else model.layers[n].self_attn
    rng = np.random.default_rng(0)
    for p in attention.parameters():
        p.data = torch.tensor(0.4 * rng.standard_normal(tuple(p.shape))).to(half or dtype).to(dtype)
    return model, attention


class Run(NamedTuple):
    """What went through a layer in a run of its model."""

    config: object
    state: dict  # of the whole model, tensors
    prefix: str
    x: np.ndarray
    y: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    grads: dict  # of the attention module, under its own names


def run(name, attention_mask, dtype=torch.float64, dy=None, half=None, **other):
    """The layer as the model calls it: its input, its output, and what autograd says of both for a random cotangent.

    half    a dtype that has all numbers which go in: weights, x and dy
    other   what else its config says
    """
    model, attention = model_of(name, dtype, half, **other)
    passed = {}

    def before(module, args, kwargs):
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        passed["x"] = given.detach().to(half or dtype).to(dtype, copy=True).requires_grad_()
        return ((), kwargs | {"hidden_states": passed["x"]}) if not args else ((passed["x"], *args[1:]), kwargs)

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(lambda module, args, output: passed.update(y=output[0]))
    rng = np.random.default_rng(1)
    embedded = torch.tensor(rng.standard_normal((N, T, model.config.hidden_size)), dtype=dtype)
    positions = torch.arange(OFFSET, OFFSET + T)[None]
    keep = None if attention_mask is None else torch.tensor(attention_mask)
    model(inputs_embeds=embedded, attention_mask=keep, position_ids=positions)
    y = passed["y"]
    dy = torch.tensor(rng.standard_normal(tuple(y.shape)) if dy is None else dy).to(half or dtype).to(dtype)
    named = dict(attention.named_parameters())
    dx, *grads = torch.autograd.grad(y, [passed["x"], *named.values()], dy)
    grads = {key: g.numpy() for key, g in zip(named, grads, strict=True)}
    prefix = next(key for key, module in model.named_modules() if module is attention) + "."
    x, y = passed["x"].detach().numpy(), y.detach().numpy()
    return Run(model.config, model.state_dict(), prefix, x, y, dy.numpy(), dx.numpy(), grads)


PADDED = np.array([[1] * T, [1] * (T - 2) + [0] * 2])  # text first: every query attends a key


@cache
def oracle(name, padded):
    with in_float64():
        return run(name, PADDED if padded else None)


def layer_of(name, theirs):
    return from_state_dict(theirs.state, theirs.config, CASES[name].n)


def close(got, want, bar=1e-11, what=""):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    assert np.abs(got - want).max(initial=0.0) <= bar * max(1.0, np.abs(want).max(initial=0.0)), what


def close_gradients(cache, dy, layer, theirs, bar=1e-11):
    """dx, and the gradient of each parameter under its name."""
    dparams, dx, _ = self_attention_vjp(cache, dy)
    grads = to_state_dict(dparams, layer)
    assert grads.keys() == {theirs.prefix + key for key in theirs.grads}
    close(dx, theirs.dx, bar, "dx")
    for key, want in theirs.grads.items():
        close(grads[theirs.prefix + key], want, bar, key)


def roundings(layer):
    """What a chain of sums may be off by in float32, of the size of its result: n U32 for a sum of n terms

    C terms in the projections, D in the scores, T in the values, H·D in the output; in ours and in theirs.
    """
    H, _, D, C = layer.form.sizes
    return 2 * (C + D + T + H * D) * U32


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@every
@pytest.mark.parametrize("padded", [False, True])
def test_output_and_gradients_match_transformers(name, padded, each_engine):
    """modeling_*.py, at an offset of positions."""
    theirs = oracle(name, padded)
    layer = layer_of(name, theirs)
    options = layer.options(T, OFFSET, attention_mask=PADDED if padded else None)
    y, cache = self_attention(layer.params, theirs.x, **options, engine=each_engine)
    close(y, theirs.y, what="y")
    close_gradients(cache, theirs.dy, layer, theirs)
    assert all(np.abs(want).max() > 1e-4 for want in theirs.grads.values())


@pytest.mark.parametrize("name", [name for name in CASES if "both ways" not in name])  # where no later key is attended
def test_the_last_queries_alone_equal_the_end_of_the_whole(name):
    theirs = oracle(name, padded=True)
    layer = layer_of(name, theirs)
    past = [(0, 0), (OFFSET, 0)]  # tokens at the positions before, which are padding
    x, keep = np.pad(theirs.x, [*past, (0, 0)]), np.pad(PADDED, past)
    last = slice(T - 3, T)
    options = layer.options(3, OFFSET + T - 3, S=OFFSET + T, attention_mask=keep)
    y, _ = mha(layer.params, theirs.x[:, last], x, x, **options)
    close(y, theirs.y[:, last])


def test_the_window_counts_the_query_itself():
    """masking_utils.sliding_window_overlay: kv_idx > q_idx − sliding_window."""
    layer = layer_of("Qwen 3, sliding", oracle("Qwen 3, sliding", padded=False))
    allowed = dense(layer.options(T)["mask"], T, T, np.zeros(1))
    assert (layer.left, layer.right) == (WINDOW - 1, 0)
    assert np.array_equal(np.reshape(allowed, (-1, T, T))[0].sum(-1), np.minimum(1 + np.arange(T), WINDOW))


LEFT = np.array([[1] * T, [0] * 3 + [1] * (T - 3)])


@pytest.mark.parametrize("name", ["Llama", "Qwen 3, sliding", "Gemma 3, global", "GPT-2", "GPT-OSS, full"])
def test_only_queries_of_padding_differ_from_transformers(name):
    """5.24, modeling_*.py: eager attention adds finfo.min where no key may be attended. A fully masked query gets the
    mean of all values there, or 0 where a sink joins (modeling_gpt_oss); here, as everywhere, the output's bias."""
    dy = np.random.default_rng(2).standard_normal((N, T, 30)) * LEFT[..., None]
    with in_float64():
        theirs = run(name, LEFT, dy=dy)
    layer = layer_of(name, theirs)
    y, cache = self_attention(layer.params, theirs.x, **layer.options(T, OFFSET, attention_mask=LEFT))
    text = LEFT.astype(bool)
    close(y[text], theirs.y[text])
    close_gradients(cache, dy, layer, theirs)

    bias = layer.params["out_proj"].get("b", np.zeros(30))
    assert np.array_equal(y[~text], np.tile(bias, (3, 1)))
    if name.startswith("GPT-OSS"):
        close(theirs.y[~text], y[~text])
        return
    of_all, _ = self_attention(layer.params, theirs.x, scale=0.0, qk_norm=layer.qk_norm)  # scores of 0
    close(theirs.y[~text], of_all[~text])
    assert np.abs(theirs.y[~text] - y[~text]).max() > 0.1


LONG = [OFFSET + T - 1, OFFSET + T, OFFSET + T + 1]  # contexts one shorter than the text, as long, one longer


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("context", LONG)
def test_frequencies_may_depend_on_the_length_of_the_text(kind, context):
    """modeling_rope_utils.dynamic_rope_update: the length is that of the largest position, of queries and keys."""
    said = {"dynamic": {"factor": 3.0}, "longrope": {**FACTORS, "original_max_position_embeddings": context}}[kind]
    other = {"max_position_embeddings": context} | rope(rope_type=kind, **said)
    with in_float64():
        theirs = run("Llama", None, **other)
    layer = layer_of("Llama", theirs)
    y, cache = self_attention(layer.params, theirs.x, **layer.options(T, OFFSET))
    close(y, theirs.y)
    close(self_attention_vjp(cache, theirs.dy)[1], theirs.dx)
    short, long = layer.rope.frequencies(context)[0], layer.rope.frequencies(context + 1)[0]
    assert np.array_equal(layer.rope.frequencies(1)[0], short)
    assert not np.array_equal(short, long)


def test_dynamic_rope_depends_on_no_earlier_text():
    """5.24, dynamic_frequency_update: a shorter text after a longer one has the frequencies of the longer, until one is
    shorter than the context."""
    module, make, _ = modeling("llama")
    config = make(**(SMALL | {"max_position_embeddings": 29} | rope(rope_type="dynamic", factor=3.0)))
    rotary, ours = module.LlamaRotaryEmbedding(config), statics(config, 0).rope
    for length, kept in ((53, 53), (41, 53), (28, 28), (41, 41)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        np.testing.assert_allclose(rotary.inv_freq.numpy(), ours.frequencies(kept)[0], rtol=2e-6)
    assert not np.allclose(ours.frequencies(41)[0], ours.frequencies(53)[0], rtol=1e-3)


MASKS = {
    "no padding": None,
    "padding on the right": PADDED,
    "padding on the left": np.array([[1] * T, [0] * 2 + [1] * (T - 2)]),
    "text with a hole": np.array([[1] * T, [1] * 5 + [0] * 3 + [1] * (T - 8)]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("W", [1, 2, T - 1, T, T + 1, 3 * T])
@pytest.mark.parametrize(
    "name", ["Mistral", "Gemma 2, sliding", "Gemma 3, local, both ways", "Qwen 3, sliding", "GPT-OSS, sliding"]
)
def test_windows_of_any_size_with_padding_on_either_side(name, W, mask):
    """`attention_mask` (N, S) as a tokenizer makes it. Of rows that are padding nothing is asked: they
    are those of `test_only_queries_of_padding_…`."""
    keep = MASKS[mask]
    text = np.ones((N, T), bool) if keep is None else keep.astype(bool)
    dy = np.random.default_rng(2).standard_normal((N, T, 30)) * text[..., None]
    with in_float64():
        theirs = run(name, keep, dy=dy, sliding_window=W)
    layer = layer_of(name, theirs)
    y, cache = self_attention(layer.params, theirs.x, **layer.options(T, OFFSET, attention_mask=keep))
    close(y[text], theirs.y[text])
    close_gradients(cache, dy, layer, theirs)


@every
def test_in_float32_both_are_within_the_roundings_of_their_sums(name):
    """The library as it is."""
    theirs = run(name, PADDED, torch.float32)
    layer = layer_of(name, theirs)
    y, cache = self_attention(layer.params, theirs.x, **layer.options(T, OFFSET, attention_mask=PADDED))
    assert y.dtype == theirs.dy.dtype == np.float32
    close(y, theirs.y, roundings(layer), "y")
    close_gradients(cache, theirs.dy, layer, theirs, roundings(layer))


HALF = {"bfloat16": (torch.bfloat16, ml_dtypes.bfloat16, 2.0**-8), "float16": (torch.float16, np.float16, 2.0**-11)}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(
    "name", ["Llama 3.1", "GPT-2", "Gemma 2, sliding", "Gemma 3, local", "Qwen 3", "GPT-OSS, full", "Phi-3", "Cohere"]
)
def test_half_precision_is_the_float64_layer_rounded_once(name, half, tmp_path):
    """A checkpoint of half precision, from a safetensors file, against transformers' float64 layer of the same numbers:
    what is computed in float32 is off by the roundings of its sums, as above, and then by U of the result, rounded."""
    torch_dtype, dtype, U = HALF[half]
    with in_float64():
        theirs = run(name, PADDED, half=torch_dtype)
    save_file(
        {key: x.to(torch_dtype) for key, x in theirs.state.items() if theirs.prefix in key},
        tmp_path / "one.safetensors",
    )
    layer = load_layer(tmp_path / "one.safetensors", CASES[name].n, theirs.config)
    x, dy = theirs.x.astype(dtype), theirs.dy.astype(dtype)
    y, cache = self_attention(layer.params, x, **layer.options(T, OFFSET, attention_mask=PADDED))
    dparams, dx, _ = self_attention_vjp(cache, dy)
    grads = to_state_dict(dparams, layer)
    bar = roundings(layer)
    for got, want in [
        (y, theirs.y),
        (dx, theirs.dx),
        *((grads[theirs.prefix + key], g) for key, g in theirs.grads.items()),
    ]:
        assert got.dtype == dtype
        error = np.abs(got.astype(np.float64) - want)
        assert np.all(error <= U * np.abs(want) + bar * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("name", ["Llama", "Gemma 3, local"])
def test_float64_there_is_float32_in_part(name):
    """The library as it is: float64 inputs give float32 accuracy, which is why the other tests upcast what it names."""
    as_it_is = run(name, None)
    layer = layer_of(name, as_it_is)
    y, _ = self_attention(layer.params, as_it_is.x, **layer.options(T, OFFSET))
    assert 1e-9 < np.abs(y - as_it_is.y).max() / np.abs(y).max() < 1e-5


# ── what a config says ───────────────────────────────────────────────────────────────────────────────────────────

HUB = {  # the parts of real config.json files that matter here, as they are on the Hub
    "Llama 3.1 8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Gemma 2 27B": {
        "model_type": "gemma2",
        "hidden_size": 4608,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "num_hidden_layers": 46,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    },
    "Gemma 3 4B": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "Gemma 3, of embeddings": {
        "model_type": "gemma3_text",
        "use_bidirectional_attention": True,
        "sliding_window": 512,
        "num_hidden_layers": 24,
    },
    "Qwen 2.5": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "Qwen 3, yarn": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "Qwen 3, sliding": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "max_window_layers": 3,
        "use_sliding_window": True,
    },
    "Qwen 3, told not to slide": {"model_type": "qwen3", "max_window_layers": 3, "use_sliding_window": False},
    "GPT-OSS 20B": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
    },
    "Mistral 7B": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Phi-3 mini 128k, of old": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "original_max_position_embeddings": 4096,  # without which 5.24 refuses "su", though it stands beside it
            "short_factor": [1.0 + i / 16 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
        "sliding_window": 262144,
    },
    "Phi-4 mini": {
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
    },
    "Qwen 3 MoE": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 48,
        "max_window_layers": 48,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "SmolLM 3": {
        "model_type": "smollm3",
        "num_hidden_layers": 36,
        "no_rope_layers": [1, 0, 1, 1, 1, 1],
        "rope_theta": 5000000.0,
        "layer_types": ["full_attention"] * 36,
    },
    "SmolLM 3, sliding": {
        "model_type": "smollm3",
        "num_hidden_layers": 6,
        "no_rope_layer_interval": 2,
        "sliding_window": 512,
        "use_sliding_window": True,
    },
    "Qwen 2 MoE, sliding": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "max_window_layers": 3,
        "use_sliding_window": True,
    },
    "Phi-3, silent of its context": {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
    },
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "longrope with a gain of its own": {
        "model_type": "llama",
        "head_dim": 6,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1, 2, 3],
            "long_factor": [4, 5, 6],
            "attention_factor": 1.25,
        },
    },
    "yarn with a gain of its own": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    },
    "yarn with mscale": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    **{f"{kind}, by its defaults": {"model_type": kind} for kind in DEFAULTS},
}


def statics(config, n):
    return static(read(config, n), n, "")


def same_static(a, b):
    assert a._replace(rope=None) == b._replace(rope=None)
    assert (a.rope is None) == (b.rope is None)
    for length in (1, 10**5, 10**6) if a.rope else ():
        (ours, gain), (theirs, same_gain) = a.rope.frequencies(length), b.rope.frequencies(length)
        assert np.array_equal(ours, theirs)
        assert (gain, a.rope.pairs) == (same_gain, b.rope.pairs)


@pytest.mark.parametrize("config", HUB.values(), ids=HUB)
def test_a_config_json_of_any_version_reads_as_its_config(config):
    _, make, _ = modeling(config["model_type"])
    for n in (0, 1, 5):
        same_static(statics(config, n), statics(make.from_dict(json.loads(json.dumps(config))), n))


@pytest.mark.parametrize("name", [name for name in HUB if not name.startswith("gpt2")])
def test_frequencies_and_gain_match_transformers(name):
    """`RotaryEmbedding` of modeling_*.py, in float32; and the window and scale of the attention module itself."""
    config = HUB[name]
    kind = config["model_type"]
    module, make, _ = modeling(kind)
    made = make.from_dict(json.loads(json.dumps(config)))
    rotary = getattr(module, FAMILIES[kind][1] + "RotaryEmbedding")(made)
    for n in (0, 1, 5):
        ours = statics(config, n)
        with torch.device("meta"):
            theirs = getattr(module, FAMILIES[kind][1] + "Attention")(made, layer_idx=n)
        if ours.rope is not None:
            frequencies, gain = ours.rope.frequencies()
            prefix = f"{made.layer_types[n]}_" if kind == "gemma3_text" else ""
            np.testing.assert_allclose(frequencies, getattr(rotary, prefix + "inv_freq").numpy(), rtol=2e-6)
            assert gain == pytest.approx(getattr(rotary, prefix + "attention_scaling"), rel=1e-14)
        assert ours.scale == theirs.scaling
        window = getattr(
            theirs, "sliding_window", getattr(made, "sliding_window", None) if kind in ALL_LAYERS else None
        )
        assert ours.left == (None if window is None else window - 1)
        assert {ours.form.prefix + key for key in dict(theirs.named_parameters())} == set(_names(ours))


def _names(layer):
    empty = {leaf: np.zeros(layer.form.shape(leaf)) for leaf in layer.form.leaves}
    return to_state_dict(tree.unflatten(empty), layer)


def test_a_model_of_text_and_images_has_its_text_config():
    configs = importlib.import_module("transformers.models.gemma3.configuration_gemma3")
    whole = configs.Gemma3Config(text_config=HUB["Gemma 3 4B"])
    for n in (0, 5):
        same_static(statics(whole, n), statics(HUB["Gemma 3 4B"], n))
        same_static(statics({"model_type": "gemma3", "text_config": HUB["Gemma 3 4B"]}, n), statics(whole, n))


@pytest.mark.parametrize(
    ("name", "types"),
    [("Llama, longrope, short", ["sliding_attention"] * 2), ("Mistral", ["full_attention"] * 2)],
)
def test_layer_types_that_transformers_ignores_are_refused(name, types):
    """5.24: LlamaModel and MistralModel have one mask for all layers. Theirs is the answer without, ours to refuse."""
    with in_float64():
        plain, theirs = run(name, None), run(name, None, layer_types=types, sliding_window=WINDOW)
    assert np.array_equal(theirs.y, plain.y)
    with pytest.raises(ValueError, match=r"layer_types must have .*, as .* does not read it"):
        layer_of(name, theirs)


def test_a_soft_cap_that_transformers_ignores_is_refused():
    """5.24: `Gemma3Attention.forward` passes no softcap on. Their answer is that without; ours is to refuse."""
    with in_float64():
        plain = run("Gemma 3, local", None)
        capped = Case("gemma3_text", 0, GEMMA_3 | {"attn_logit_softcapping": 0.5})
        with patch.dict(CASES, {"capped": capped}):
            theirs = run("capped", None)
            assert np.array_equal(theirs.y, plain.y)
            with pytest.raises(ValueError, match="attn_logit_softcapping must be None for gemma3_text"):
                layer_of("capped", theirs)


TINY = {"model_type": "llama", **SMALL}


@pytest.mark.parametrize(
    ("config", "n", "error", "message"),
    [
        (7, 0, TypeError, "config must be a config of transformers or a dict, got int"),
        ({}, 0, ValueError, "config must have a model_type of gpt2, llama, .*, got None"),
        ({"model_type": "mamba"}, 0, ValueError, "config must have a model_type of .*, got 'mamba'"),
        (TINY, 2, IndexError, r"n must be in 0 … 1, as in the config, got 2"),
        (TINY, -1, IndexError, "n must be in 0 … 1"),
        ({"model_type": "gemma2"}, -1, IndexError, "n must be in 0 or more, got -1"),
        (TINY, True, TypeError, "n must be the number of a layer, got True"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"]}, 0, ValueError, "layer_types .* 'chunked_att"),
        ({"model_type": "gemma2", "sliding_window": None}, 0, ValueError, "sliding_window must be 1 or more, as layer"),
        (TINY | rope(rope_type="axial", factor=2.0), 0, ValueError, "rope_type must be default, .*, got 'axial'"),
        (TINY | rope(rope_type="dynamic"), 0, KeyError, "must have factor where rope_type is dynamic"),
        (
            TINY | rope(rope_type="longrope", **FACTORS | {"long_factor": [1.0]}),
            0,
            ValueError,
            r"long_factor must be 7 num.*, got \(1,\)",
        ),
        (
            {"model_type": "phi3"} | rope(rope_type="linear", factor=2.0),
            0,
            ValueError,
            "rope_type must be default, longrope, .* for phi3, got 'linear'",
        ),
        (
            {"model_type": "phi3"} | rope(partial_rotary_factor=0.41),
            0,
            ValueError,
            "partial_rotary_factor must make an even part of head_dim=96, got 0.41",
        ),
        (
            {"model_type": "glm4", "partial_rotary_factor": 1.5},
            0,
            ValueError,
            "partial_rotary_factor must make an even part",
        ),
        (
            TINY | {"layer_types": ["full_attention", "sliding_attention"]},
            1,
            ValueError,
            "layer_types must have full_attention for layer 1, as llama does not read it, got 'sliding_attention'",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            0,
            ValueError,
            "layer_types must have sliding_attention for layer 0",
        ),
        ({"model_type": "olmo", "clip_qkv": 8.0}, 0, ValueError, "clip_qkv must be None, as .*, got 8.0"),
        ({"model_type": "cohere", "use_qk_norm": True}, 0, ValueError, "use_qk_norm must be off"),
        ({"model_type": "stablelm", "qk_layernorm": True}, 0, ValueError, "qk_layernorm must be off"),
        (
            {"model_type": "gpt2", "n_embd": 31, "n_head": 5},
            0,
            ValueError,
            "n_embd must be a multiple of n_head=5, got 31",
        ),
        (
            {"model_type": "granite", "attention_multiplier": None},
            0,
            TypeError,
            "attention_multiplier must be a real number",
        ),
        (TINY | rope(rope_type="linear"), 0, KeyError, "must have factor where rope_type is linear"),
        (TINY | rope(partial_rotary_factor=0.5), 0, ValueError, "partial_rotary_factor must be 1, .*, got 0.5"),
        (TINY | {"partial_rotary_factor": 0.5}, 0, ValueError, "partial_rotary_factor must be 1, .*, got 0.5"),
        (
            {
                "model_type": "gemma3_text",
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False},
            },
            5,
            ValueError,
            "truncate must be left out for gemma3_text",
        ),
        ({"model_type": "gemma3_text"} | rope(), 0, ValueError, "rope_parameters must be those of each layer type"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, 0, ValueError, "use_bidirectional_attention"),
        (TINY | {"attn_logit_softcapping": 30.0}, 0, ValueError, "attn_logit_softcapping must be None for llama"),
    ],
)
def test_an_unsupported_config_is_refused(config, n, error, message):
    with pytest.raises(error, match=message):
        statics(config, n)


# ── over an encoder ──────────────────────────────────────────────────────────────────────────────────────────────

S = 7
CROSS = {"add_cross_attention": True, "scale_attn_by_inverse_layer_idx": True}


def cross_run(keep):
    """Layer 1 of a GPT-2 over an encoder: state, x, what the encoder gave, y, dy, dx, d of the encoder's, gradients."""
    model, _ = model_of("GPT-2", **CROSS)
    attention, passed = model.h[1].crossattention, {}
    rng = np.random.default_rng(3)
    for p in attention.parameters():
        p.data = torch.tensor(0.4 * rng.standard_normal(tuple(p.shape)))

    def before(module, args, kwargs):
        passed["x"] = args[0].detach().clone().requires_grad_()
        return (passed["x"], *args[1:]), kwargs

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(lambda module, args, output: passed.update(y=output[0]))
    encoder = torch.tensor(rng.standard_normal((N, S, 30)), requires_grad=True)
    embedded = torch.tensor(rng.standard_normal((N, T, 30)))
    keep = None if keep is None else torch.tensor(keep)
    model(inputs_embeds=embedded, encoder_hidden_states=encoder, encoder_attention_mask=keep)
    dy = torch.tensor(rng.standard_normal((N, T, 30)))
    named = {f"h.1.crossattention.{key}": p for key, p in attention.named_parameters()}
    found = torch.autograd.grad(passed["y"], [passed["x"], encoder, *named.values()], dy)
    dx, dencoder, *grads = (g.numpy() for g in found)
    arrays = (a.detach().numpy() for a in (passed["x"], encoder, passed["y"], dy))
    return model, *arrays, dx, dencoder, dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("keep", [None, np.array([[1] * S, [0] * 2 + [1] * (S - 3) + [0]])], ids=["all", "padded"])
def test_gpt_2_over_an_encoder(keep):
    """modeling_gpt2, is_cross_attention: queries of q_attn, keys and values of a c_attn of two."""
    model, x, encoder, y, dy, dx, dencoder, grads = cross_run(keep)
    layer = from_state_dict(model.state_dict(), model.config, 1, cross=True)
    got, cache = mha(layer.params, x, encoder, encoder, **layer.options(T, S=S, attention_mask=keep))
    close(got, y)
    dparams, dquery, dkey, dvalue, _ = mha_vjp(cache, dy)
    close(dquery, dx)
    close(dkey + dvalue, dencoder)
    found = to_state_dict(dparams, layer)
    assert found.keys() == grads.keys()
    for key, want in grads.items():
        assert np.abs(want).max() > 1e-4 or "bias" in key  # nothing comes to a bias of the keys
        close(found[key], want, what=key)
    assert layer_of_both(model) == {"h.1.attn.", "h.1.crossattention."}


def layer_of_both(model):
    """The prefixes of both attentions of layer 1, whose tensors come back as they were."""
    layers = [from_state_dict(model.state_dict(), model.config, 1, cross=cross) for cross in (False, True)]
    for layer in layers:
        for key, x in to_state_dict(layer.params, layer).items():
            assert np.array_equal(x, model.state_dict()[key].numpy())
    return {layer.form.prefix for layer in layers}


@pytest.mark.parametrize(
    ("config", "cross", "error", "message"),
    [
        ({"model_type": "gpt2"}, True, ValueError, "cross must be False but for gpt2 with add_cross_attention"),
        (TINY, True, ValueError, "cross must be False but for gpt2 .*, got llama"),
        (TINY, 1, TypeError, "cross must be True or False, got 1"),
    ],
)
def test_cross_attention_is_refused_where_there_is_none(config, cross, error, message):
    with pytest.raises(error, match=message):
        from_state_dict({}, config, 0, cross=cross)


# ── state dicts ──────────────────────────────────────────────────────────────────────────────────────────────────


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_dict_comes_back_as_it_was(name, dtype):
    """Bit for bit, and without a copy, but for GPT-2's c_attn and Phi-3's qkv_proj, which are put together."""
    model, attention = model_of(name, dtype)
    state, n = model.state_dict(), CASES[name].n
    layer = from_state_dict(state, model.config, n)
    back = to_state_dict(layer.params, layer)
    assert {layer.form.prefix + key for key in dict(attention.named_parameters())} == back.keys()
    for key, x in back.items():
        want = state[key].view(torch.int16).numpy() if dtype == torch.bfloat16 else state[key].numpy()
        assert x.shape == tuple(want.shape)
        assert x.dtype == {torch.bfloat16: ml_dtypes.bfloat16, torch.float32: "f4", torch.float64: "f8"}[dtype]
        assert np.ascontiguousarray(x).tobytes() == want.tobytes()
        assert np.shares_memory(x, want) or "c_attn" in key or "qkv_proj" in key
    buffers = [x.view(torch.uint8).numpy() for x in state.values()]
    for leaf, x in tree.flatten(layer.params).items():
        assert any(np.shares_memory(x, buffer) for buffer in buffers), leaf


def small_state(name="Llama", **more):
    """A state dict of NumPy arrays, of layer 0 alone, and its config as a dict."""
    case = CASES[name]
    model, attention = model_of(name)
    prefix = "transformer.h.0.attn." if case.kind == "gpt2" else "model.layers.0.self_attn."
    state = {prefix + key: p.detach().numpy() for key, p in attention.named_parameters()}
    return state | more, model.config.to_dict() | {"model_type": case.kind}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.0.self_attn.",
        "layers.0.self_attn.",
        "model.language_model.layers.0.self_attn.",
        "language_model.model.layers.0.self_attn.",
        "self_attn.",
        "",
    ],
)
def test_the_layer_is_found_whatever_stands_before_it(prefix):
    state, config = small_state()
    renamed = {prefix + key.removeprefix("model.layers.0.self_attn."): x for key, x in state.items()}
    others = {}
    if "layers" in prefix:  # other layers and other towers, whose names end alike
        others = {key.replace(".0.", ".10."): x for key, x in renamed.items()}
        others |= {
            "vision_tower.encoder.layers.0.self_attn.out_proj.weight": np.zeros(3),
            "lm_head.weight": np.zeros(3),
        }
    layer = from_state_dict(others | renamed, config, 0)
    assert layer.form.prefix == prefix
    assert to_state_dict(layer.params, layer).keys() == renamed.keys()


def test_constants_beside_the_parameters_are_left_alone():
    """GPT-2's mask and Llama's frequencies, in old checkpoints."""
    prefix = "model.layers.0.self_attn."
    state, config = small_state(**{prefix + "rotary_emb.inv_freq": np.ones(7, np.float32)})
    layer = from_state_dict(state, config, 0)
    assert prefix + "rotary_emb.inv_freq" not in to_state_dict(layer.params, layer)
    prefix = "transformer.h.0.attn."
    state, config = small_state(
        "GPT-2", **{prefix + "bias": np.ones((1, 1, 5, 5), bool), prefix + "masked_bias": np.float32(-1e4)}
    )
    from_state_dict(state, config, 0)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_read_only_and_strided_arrays_are_arrays_like_others(name):
    state, config = small_state(name)
    want = to_state_dict((layer := from_state_dict(state, config, 0)).params, layer)
    odd = {key: np.repeat(x, 2, axis=-1)[..., ::2] for key, x in state.items()}
    for x in odd.values():
        x.flags.writeable = False
    layer = from_state_dict(odd, config, 0)
    assert not layer.params["q_proj"]["w"].flags.writeable
    for key, x in to_state_dict(layer.params, layer).items():
        assert np.array_equal(x, want[key])
        assert np.array_equal(x, state[key])


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({Q: None}, KeyError, f"state_dict must have {Q}, .*, and has no {Q}"),
        ({Q[:-6] + "weight_scale": np.ones(3)}, KeyError, "state_dict may have .*, and has .*q_proj.weight_scale"),
        (
            {Q: np.ones((84, 31))},
            ValueError,
            rf"{Q} must be \(H·D, C\) = \(84, 30\) with H=6, K=2, D=14, C=30 .*, got \(84, 31\)",
        ),
        ({Q: np.ones((84, 30), "f4")}, TypeError, "must have dtype float32 as .* has, got float64"),
        ({Q: "weights"}, TypeError, f"{Q} must be a tensor or an array, got str"),
        (
            {Q.replace("q_proj", "o_proj"): None},
            KeyError,
            "state_dict must have layers.0.self_attn.o_proj.weight, after",
        ),
        (
            {"other.layers.0.self_attn.o_proj.weight": np.ones(3)},
            KeyError,
            "prefix must be given where state_dict has layer 0 more than once: model.* other",
        ),
    ],
)
def test_from_state_dict_refuses(change, error, message):
    state, config = small_state()
    state = {key: x for key, x in (state | change).items() if x is not None}
    with pytest.raises(error, match=message):
        from_state_dict(state, config, 0)


def test_a_module_is_no_state_dict():
    _, config = small_state()
    with pytest.raises(TypeError, match="state_dict must be a dict of arrays by their names, got Linear"):
        from_state_dict(torch.nn.Linear(2, 3), config, 0)


def test_a_prefix_that_is_given_is_taken():
    state, config = small_state()
    state |= {key.replace("model.", "other."): 2 * x for key, x in state.items()}
    layer = from_state_dict(state, config, 0, prefix="other.layers.0.self_attn.")
    assert np.array_equal(layer.params["q_proj"]["w"].ravel(), 2 * state[Q].ravel())


@pytest.mark.parametrize(
    ("leaf", "x", "error", "message"),
    [
        (
            "k_proj.w",
            np.ones((3, 14, 30)),
            ValueError,
            r"k_proj.w must be \(K, D, Ck\) = \(2, 14, 30\) as in the layer, got \(3, 14, 30\)",
        ),
        ("sink.w", np.ones(6), KeyError, "params may have q_proj.w, .*, and has sink.w"),
        ("v_proj.w", None, KeyError, "params must have .*, and has no v_proj.w"),
    ],
)
def test_to_state_dict_refuses_a_tree_that_is_not_like_the_layer(leaf, x, error, message):
    state, config = small_state()
    layer = from_state_dict(state, config, 0)
    leaves = {key: a for key, a in (tree.flatten(layer.params) | {leaf: x}).items() if a is not None}
    with pytest.raises(error, match=message):
        to_state_dict(tree.unflatten(leaves), layer)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            np.ones((N, T)),
            TypeError,
            r"attention_mask must be \(N, S\) of integers or booleans, 1 for text, got float64",
        ),
        (np.full((N, T), 2), ValueError, r"attention_mask must be 0 and 1 only, got \[2\]"),
        ([[1, 1]], TypeError, "attention_mask must be a tensor or an array, got list"),
    ],
)
def test_options_refuse_a_mask(mask, error, message):
    state, config = small_state()
    with pytest.raises(error, match=message):
        from_state_dict(state, config, 0).options(T, attention_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"T": 3.0}, TypeError, "T must be an int, got 3.0"),
        ({"T": -1}, ValueError, "T must be at least 0, got -1"),
        ({"offset": np.arange(2)}, TypeError, "offset must be an int, got array"),
        ({"offset": -1}, ValueError, "offset must be at least 0, got -1"),
        ({"S": "7"}, TypeError, "S must be an int, got '7'"),
    ],
)
def test_options_refuse_what_is_no_number_of_tokens(arguments, error, message):
    state, config = small_state()
    with pytest.raises(error, match=message):
        from_state_dict(state, config, 0).options(**{"T": T} | arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": None}, TypeError, "hidden_size must be an int, got None"),
        ({"num_attention_heads": 0}, ValueError, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 2.0}, TypeError, "num_key_value_heads must be an int, got 2.0"),
        ({"head_dim": -3}, ValueError, "head_dim must be at least 1, got -3"),
        ({"num_hidden_layers": [2]}, TypeError, r"num_hidden_layers must be an int, got \[2\]"),
        ({"model_type": ["llama"]}, ValueError, r"config must have a model_type of .*, got \['llama'\]"),
    ],
)
def test_a_config_of_other_sizes_is_refused_by_name(change, error, message):
    state, config = small_state()
    with pytest.raises(error, match=message):
        from_state_dict(state, {**config, "layer_types": None, **change}, 0)


def test_to_state_dict_refuses_what_is_no_layer_or_tree():
    state, config = small_state()
    layer = from_state_dict(state, config, 0)
    with pytest.raises(TypeError, match="layer must be a Layer, as from_state_dict returns it, got dict"):
        to_state_dict(layer.params, layer._asdict())
    with pytest.raises(TypeError, match="a tree must be a dict of dicts of arrays, got NoneType"):
        to_state_dict(None, layer)


def test_a_mask_may_be_a_tensor_or_booleans():
    state, config = small_state()
    layer = from_state_dict(state, config, 0)
    for mask in (torch.tensor(PADDED), PADDED.astype(bool)):
        got = layer.options(T, attention_mask=mask)["mask"]
        want = layer.options(T, attention_mask=PADDED)["mask"]
        assert np.array_equal(dense(got, T, T, np.zeros(1)), dense(want, T, T, np.zeros(1)))


def test_no_foreign_library_is_imported():
    foreign = "{'torch', 'transformers', 'safetensors', 'ml_dtypes'}"
    code = f"import sys, funcmha.interop.huggingface; print(*{foreign} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
