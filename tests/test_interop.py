"""What all calls of other libraries have in common: the cache and the cotangents that their gradients take.

The oracle is the call itself; each library's own file compares it with that library.
"""

import numpy as np
import pytest

from funcmha import attention, attention_weights, log_sum_exp
from funcmha.interop import cudnn, equinox, flash_attn, flax, huggingface, keras, onnx, torch
from funcmha.interop import jax as jax_nn
from funcmha.ops import scores, scores_vjp


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape)


B, T, S, H, K, D = 2, 3, 5, 6, 2, 4
CU = {"cu_seqlens_q": np.array([0, 3]), "cu_seqlens_k": np.array([0, 5])}
HEADS_FIRST = normal(B, H, T, D), normal(B, K, S, D), normal(B, K, S, D)
TOKENS_FIRST = tuple(np.moveaxis(x, 1, 2) for x in HEADS_FIRST)
MHA = normal(T, B, H), normal(S, B, H), normal(S, B, H), normal(3 * H, H), None, None, None, normal(H, H), None
OF_MHA = {"embed_dim_to_check": H, "num_heads": K, "add_zero_attn": False, "dropout_p": 0.0}
CALLS = {  # name: module, inputs, options
    "scaled_dot_product_attention": (torch, HEADS_FIRST, {"enable_gqa": True}),
    "multi_head_attention_forward": (torch, MHA, OF_MHA),
    "dot_product_attention": (jax_nn, TOKENS_FIRST, {}),
    "flash_attn_func": (flash_attn, TOKENS_FIRST, {}),
    "flash_attn_qkvpacked_func": (flash_attn, (normal(B, T, 3, H, D),), {}),
    "flash_attn_kvpacked_func": (flash_attn, (TOKENS_FIRST[0], normal(B, S, 2, K, D)), {}),
    "flash_attn_varlen_func": (flash_attn, tuple(x[0] for x in TOKENS_FIRST), CU),
    "flash_attn_varlen_qkvpacked_func": (flash_attn, (normal(T, 3, H, D),), {"cu_seqlens": CU["cu_seqlens_q"]}),
    "flash_attn_varlen_kvpacked_func": (flash_attn, (TOKENS_FIRST[0][0], normal(S, 2, K, D)), CU),
    "flash_attn_with_kvcache": (flash_attn, TOKENS_FIRST, {}),
    "flash_attn_combine": (flash_attn, (normal(S, B, T, H, D), normal(S, B, T, H)), {}),
    "sdpa": (cudnn, HEADS_FIRST, {}),
    "attention": (onnx, HEADS_FIRST, {}),
    "from_ragged": (
        cudnn,
        (normal(T, H, D),),
        {"ragged_offset": np.array([0, 72]), "seq_len": np.array([3]), "s": 5},
    ),
    "to_ragged": (
        cudnn,
        (normal(1, H, T, D),),
        {"ragged_offset": np.array([0, 72]), "seq_len": np.array([3]), "n": 5},
    ),
}
TUPLES = [  # whose output is several arrays
    "multi_head_attention_forward",
    "flash_attn_with_kvcache",
    "flash_attn_combine",
    "attention",
]
MOVES = ["from_ragged", "to_ragged", "flash_attn_combine"]  # which attend to nothing
FLAGS = [
    ("scaled_dot_product_attention", "is_causal"),
    ("scaled_dot_product_attention", "enable_gqa"),
    *(("multi_head_attention_forward", name) for name in torch.multi_head.FLAGS),
    ("dot_product_attention", "is_causal"),
    ("flash_attn_func", "causal"),
    ("flash_attn_with_kvcache", "rotary_interleaved"),
    ("sdpa", "use_alibi_mask"),
    ("sdpa", "use_padding_mask"),
]


def called(name):
    """The call, its gradient, its output and its cache."""
    module, inputs, options = CALLS[name]
    f, f_vjp = getattr(module, name), getattr(module, f"{name}_vjp")
    return f, f_vjp, *f(*inputs, **options)


@pytest.mark.parametrize("name", CALLS)
def test_the_cache_of_another_call_is_refused(name):
    """Another cache may have as many fields, and mean others by them."""
    _, f_vjp, y, cache = called(name)
    f_vjp(cache, y)
    _, other = attention(*HEADS_FIRST)
    with pytest.raises(TypeError, match=f"cache must come from {name}.*, got {type(other).__name__}"):
        f_vjp(other, y)
    with pytest.raises(TypeError, match=f"cache must come from {name}.*, got tuple"):
        f_vjp(tuple(cache), y)


def test_scores_refuses_the_cache_of_another_call():
    _, cache = attention(*HEADS_FIRST)
    z, _ = scores(*HEADS_FIRST[:2])
    with pytest.raises(TypeError, match="cache must come from scores, got"):
        scores_vjp(cache, z)


@pytest.mark.parametrize("name", TUPLES)
def test_cotangents_of_several_outputs_come_in_as_many_parts(name):
    _, f_vjp, y, cache = called(name)
    for wrong, got in ((y[0], "ndarray"), (y[:-1], f"{len(y) - 1} of them"), ((*y, None), f"{len(y) + 1} of them")):
        with pytest.raises(TypeError, match=rf"dy must be \(d.*\) as the output is, got {got}"):
            f_vjp(cache, wrong)


@pytest.mark.parametrize("name", TUPLES)
def test_a_part_that_is_none_is_a_cotangent_of_zero(name):
    _, f_vjp, y, cache = called(name)
    for i in range(len(y)):
        some = [dy if i == j else None for j, dy in enumerate(y)]
        zero = [dy if i == j or dy is None else np.zeros_like(dy) for j, dy in enumerate(y)]
        for a, b in zip(f_vjp(cache, tuple(some)), f_vjp(cache, tuple(zero)), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in MOVES])
def test_weights_and_lse_are_read_from_any_cache(name):
    *_, cache = called(name)
    p, lse = attention_weights(cache), log_sum_exp(cache)
    close(p.sum(-1), np.ones(p.shape[:-1]))
    assert lse.size == p[..., 0].size


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_a_flag_is_true_or_false(name, flag):
    """What else is true may have been meant as something else, and the truth of an array is an error of NumPy's own."""
    module, inputs, options = CALLS[name]
    for wrong in (1, None, np.ones(2, bool), "False"):
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
            getattr(module, name)(*inputs, **options | {flag: wrong})


LLAMA = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 3}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("state", flax.from_state),
        ("state", lambda state: equinox.from_state(state, 3)),
        ("weights", keras.from_weights),
        ("state_dict", lambda state: torch.from_state_dict(state, 3)),
        ("state_dict", lambda state: huggingface.from_state_dict(state, LLAMA, 0)),
    ],
    ids=["flax", "equinox", "keras", "torch", "huggingface"],
)
def test_parameters_come_in_a_dict_by_their_names(name, call):
    for wrong, got in ((None, "NoneType"), ([1.0], "list"), ({3: np.ones(2)}, "the name 3")):
        with pytest.raises(TypeError, match=f"^{name} must be a dict of arrays by their names, got {got}"):
            call(wrong)
