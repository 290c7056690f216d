"""The references in the tests of FA2 and FA3, of flash-attn 2.8.3.post2, beside funcmha in float64: `make kernels`.

They are in its source and in no package, as are FA2's way to make a bias of slopes and its rotary positions in PyTorch.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("flash-attention 2's source has a process of its own: make kernels", allow_module_level=True)

import numpy as np
import torch
from flash_attn_on_cpu import apply_rotary_emb_torch, reference
from hypothesis import given
from hypothesis import strategies as st
from test_interop_flash_attn import all_close, close, gradients, leaf, normal

from funcmha import attention_weights
from funcmha.interop.flash_attn import (
    flash_attn_func,
    flash_attn_func_vjp,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_vjp,
)

K, H, D = 2, 6, 6
FA2 = reference("tests/test_flash_attn.py")
FA3 = reference("hopper/test_util.py")
both = pytest.mark.parametrize("library", [FA2, FA3], ids=["FA2", "FA3"])


def sample(*shape, seed=0):
    return np.array(normal(*shape, seed=seed))


size = st.sampled_from([1, 2, 3, 5])
bound = st.sampled_from([0, 1, 2, 5])
windows = st.one_of(st.tuples(st.just(-1), bound), st.tuples(bound, bound), st.just((-1, -1)))


@both
@given(st.data(), size, size, windows, st.booleans(), st.sampled_from([0.0, 1.7]))
def test_dense_matches_both_references(each_engine, library, data, T, S, window, causal, softcap):
    """With slopes by FA2's `attn_bias_from_alibi_slopes`, which if causal is slope · (j − S + 1): the same weights."""
    B, of_rows = 2, causal or window != (-1, -1)
    slopes = sample(B, H, seed=3) if data.draw(st.booleans()) else None
    static = {"causal": causal, "window_size": window, "softcap": softcap}
    chunk = data.draw(st.sampled_from([0, 2, 3])) if library is FA3 else 0
    keep = np.random.default_rng(5).random((B, H, T, S)) > 0.4
    inputs = sample(B, T, H, D), sample(B, S, K, D, seed=1), sample(B, S, K, D, seed=2), slopes
    out, cache = flash_attn_func(*inputs, **static, attention_chunk=chunk, keep=keep, dropout_p=0.4)

    leaves = [leaf(x) for x in inputs]
    bias = None if slopes is None else FA2.attn_bias_from_alibi_slopes(leaves[3], T, S, causal=causal)
    if bias is not None:
        bias = bias.expand(B, H, T, S).clone() if bias.shape[2] == 1 else bias * 1
        bias.register_hook(torch.nan_to_num)  # NaN in fully masked rows
    options = static | ({"attention_chunk": chunk} if chunk else {})
    drop = {"dropout_p": 0.4, "dropout_mask": torch.tensor(keep)}
    want = library.attention_ref(*leaves[:3], attn_bias=bias, upcast=False, **drop, **options)
    all_close("out weights", (out, attention_weights(cache)), want)
    assert of_rows or chunk or (attention_weights(cache) > 0).all()

    dout, dweights = sample(B, T, H, D, seed=5), sample(B, H, T, S, seed=6)
    grads = flash_attn_func_vjp(cache, dout, dweights=dweights)
    all_close("dq dk dv dalibi_slopes", grads[:4], gradients(want, [dout, dweights], leaves))


@both
def test_minus_one_is_a_right_bound_in_the_references(each_engine, library):
    """They take the -1 of (1, -1) for a bound, where the docstrings of both and the kernels say that it is none.

    csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp: with a left bound, a right one below 0 becomes seqlen_k.
    """
    inputs = sample(1, 3, H, D), sample(1, 3, K, D), sample(1, 3, K, D)
    _, weights = library.attention_ref(*(leaf(x) for x in inputs), window_size=(1, -1), upcast=False)
    assert (weights[0, 0] > 0).int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    _, cache = flash_attn_func(*inputs, window_size=(1, -1))
    assert (attention_weights(cache)[0, 0] > 0).astype(int).tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotated_steps_match_the_reference(each_engine, causal, interleaved):
    """As `test_flash_attn_kvcache` in tests/test_flash_attn.py, with its rotary positions in PyTorch."""
    B, T, U, N, seqlens = 2, 3, 2, 11, np.array([4, 0])
    inputs = [sample(B, n, heads, D, seed=seed) for seed, (n, heads) in enumerate([(T, H), (N, K), (N, K)])]
    inputs += [sample(B, U, K, D, seed=3), sample(B, U, K, D, seed=4)]
    angle = sample(N, 2, seed=5)
    cos, sin = np.cos(angle), np.sin(angle)
    static = {"causal": causal, "rotary_interleaved": interleaved}
    y, cache = flash_attn_with_kvcache(*inputs, rotary_cos=cos, rotary_sin=sin, cache_seqlens=seqlens, **static)

    leaves = q, k_cache, v_cache, k, v = [leaf(x) for x in inputs]
    first, slot = torch.tensor(seqlens)[:, None], torch.arange(N)

    def rotated(x, rows):
        return apply_rotary_emb_torch(x, *(torch.tensor(table)[rows] for table in (cos, sin)), interleaved)

    written = (first <= slot) & (slot < first + U)
    keys, values = k_cache.clone(), v_cache.clone()
    keys[written], values[written] = rotated(k, first + torch.arange(U)).flatten(0, 1), v.flatten(0, 1)
    q = rotated(q, first + torch.arange(T) if causal else first.expand(B, T))
    mask = slot < first + U
    out, _ = FA2.attention_ref(q, keys, values, None, mask, causal=causal, upcast=False)
    want = out, keys, values
    all_close("out k_cache v_cache", y, want)
    dy = tuple(sample(*x.shape, seed=6) for x in y)
    grads = flash_attn_with_kvcache_vjp(cache, dy)[:5]
    all_close("dq dk_cache dv_cache dk dv", grads, gradients(want, dy, leaves))
    close(y[2][0, 4:6], inputs[4][0])
