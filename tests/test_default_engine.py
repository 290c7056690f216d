"""Which engine is the default, by the sizes of a sample."""

import numpy as np
import pytest

from funcmha import attention, head, head_params, init, kv_cache, mha, self_attention
from funcmha.engines import BATCHED, TILED, pick
from funcmha.engines.plan import FEW_SCORES, FEW_SHARED_KEYS

C, H = 8, 4
EDGE = int((FEW_SCORES / H) ** 0.5)  # tokens whose scores in H heads are few, and of one more are not


def name_of(cache):
    """The engine that a cache is from: that of its attention"""
    cache = getattr(cache, "mha", cache)
    cache = cache.groups[0] if hasattr(cache, "groups") else getattr(cache, "group", cache)
    return type(getattr(cache, "rest", cache)).__module__.split(".")[2]


@pytest.mark.parametrize(("more", "name"), [(0, "batched"), (1, "tiled")])
def test_few_scores_of_all_heads_are_batched(more, name):
    n, params = EDGE + more, init(0, C, H)
    x, q = np.ones((2, n, C), np.float32), np.ones((2, H, n, 2), np.float32)
    assert name_of(attention(q, q, q)[1]) == name
    assert name_of(self_attention(params, x)[1]) == name
    assert name_of(mha(params, x, x, x)[1]) == name
    one = np.ones((int(FEW_SCORES**0.5) + more, C), np.float32)
    assert name_of(head(head_params(params, 0), one, one, one)[1]) == name


def test_appended_keys_count():
    x, key = np.ones((1, 10, C), np.float32), np.ones((1, FEW_SCORES // (10 * H), C), np.float32)
    assert name_of(mha(init(0, C, H), x, key, key)[1]) == "batched"
    assert name_of(mha(init(0, C, H), x, key, key, zero_attn=True)[1]) == "tiled"
    assert name_of(mha(init(0, C, H, bias_kv=True), x, key, key)[1]) == "tiled"


@pytest.mark.parametrize(("keys", "name"), [(FEW_SCORES // H, "batched"), (FEW_SCORES // H + 1, "tiled")])
def test_a_token_of_a_decoder_is_batched(keys, name):
    params, x = init(0, C, H), np.ones((2, 1, C), np.float32)
    (_, kv), _ = kv_cache.step(params, np.ones((2, keys - 1, C), np.float32))
    _, cache = kv_cache.step(params, x, kv)
    assert type(cache.attention).__module__.split(".")[2] == name


@pytest.mark.parametrize(("keys", "engine"), [(FEW_SHARED_KEYS, BATCHED), (FEW_SHARED_KEYS + 1, TILED)])
def test_keys_that_heads_share_are_copied_and_must_be_few(keys, engine):
    x = np.zeros(1)
    assert pick(None, x, 8, 2, 1, keys) == engine
    assert pick(None, x, 8, 8, 1, keys) == BATCHED


def test_the_number_of_samples_does_not_count():
    """So a batch is its samples, bit for bit."""
    one, many = (np.ones((B, H, EDGE, 2), np.float32) for B in (1, 50))
    assert name_of(attention(one, one, one)[1]) == name_of(attention(many, many, many)[1]) == "batched"


@pytest.mark.parametrize("x", [np.zeros(1, np.complex128), None])
def test_what_is_no_real_numpy_array_is_batched(x):
    assert pick(None, x, 8, 8, 4096, 4096) == BATCHED
