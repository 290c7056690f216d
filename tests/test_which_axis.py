"""Booleans (B, T, S) of as many samples as heads: per head by broadcasting, and per sample in other libraries."""

import numpy as np
import pytest
from test_ops import close

from funcmha import attention, dropout, head, head_params, init, masks, mha, self_attention
from funcmha.kv_cache import step

PARAMS, X = init(0, 16, 2, dtype=np.float64), np.random.default_rng(0).standard_normal((2, 5, 16))
Q = np.random.default_rng(1).standard_normal((2, 2, 5, 8))
MASK = np.stack([np.tril(np.ones((5, 5), bool)), np.ones((5, 5), bool)])
CALLS = {
    "attention": lambda mask: attention(Q, Q, Q, mask=mask)[0],
    "mha": lambda mask: mha(PARAMS, X, X, X, mask=mask)[0],
    "self_attention": lambda mask: self_attention(PARAMS, X, mask=mask)[0],
    "step": lambda mask: step(PARAMS, X, mask=mask)[0][0],
}
DROPS = {
    "attention": lambda keep: attention(Q, Q, Q, dropout=dropout.masked(keep, 0.5))[0],
    "mha": lambda keep: mha(PARAMS, X, X, X, dropout=dropout.masked(keep, 0.5))[0],
    "zero_attn": lambda keep: mha(PARAMS, X, X, X, dropout=dropout.masked(keep, 0.5), zero_attn=True)[0],
    "self_attention": lambda keep: self_attention(PARAMS, X, dropout=dropout.masked(keep, 0.5))[0],
    "step": lambda keep: step(PARAMS, X, dropout=dropout.masked(keep, 0.5))[0][0],
}
each_drop = pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[:, :1], masks.causal() & MASK, masks.lengths(np.array([3, 4])) | MASK, ~masks.as_mask(MASK)],
    ids=["array", "keys", "and", "beside lengths", "not"],
)
def test_a_mask_that_may_mean_either_is_refused(call, mask):
    with pytest.raises(ValueError, match=r"B=H=2, got \(2, [15], 5\), .* mask\[:, None\] .* sample, mask\[None\] "):
        call(mask)


@each_drop
def test_so_are_booleans_of_dropout(drop):
    keep = np.ones((2, 1, 1), bool)
    with pytest.raises(
        ValueError, match=r"dropout.keep .* B=H=2, got \(2, 1, 1\), .* keep\[:, None\] .*, keep\[None\] "
    ):
        drop(keep)


@each_drop
def test_both_spellings_of_dropout_are_taken(drop):
    """Nothing of sample 0 is kept in the first, and nothing of head 0 in the second."""
    keep = np.array([False, True])[:, None, None]
    samples, heads, neither = drop(keep[:, None]), drop(keep[None]), drop(np.zeros((1, 1), bool))
    close(samples[0], neither[0])
    assert not np.allclose(samples[1], neither[1])
    assert not np.allclose(heads, samples)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_both_spellings_are_taken(call):
    """Sample 0 is causal in the first, head 0 in the second."""
    samples = [call(mask) for mask in (MASK[:, None], masks.causal() & np.ones((5, 5), bool), MASK[1:])]
    close(samples[0][0], samples[1][0])
    if call is not CALLS["step"]:  # which is causal
        close(samples[0][1], samples[2][1])
        assert not np.allclose(call(MASK[None]), samples[0])


def test_nothing_else_may_mean_either():
    """No batch axis, two of them, other numbers of samples, one head, or one head and one sample"""
    many = init(0, 16, 4, dtype=np.float64)
    mha(PARAMS, X[0], X[0], X[0], mask=MASK)
    mha(PARAMS, X[None], X[None], X[None], mask=MASK)
    mha(PARAMS, X[:1], X[:1], X[:1], mask=MASK)
    mha(init(0, 16, 1, dtype=np.float64), X[:1], X[:1], X[:1], mask=MASK[:1])
    with pytest.raises(ValueError, match="mask must broadcast to"):
        mha(many, X, X, X, mask=MASK)
    samples = head(head_params(PARAMS, 0), X, X, X, mask=MASK)[0]  # of a head, which has no axis of heads
    close(samples[0], head(head_params(PARAMS, 0), X[0], X[0], X[0], mask=MASK[0])[0])


@pytest.mark.parametrize("mask", [masks.causal() & MASK, masks.as_mask(MASK), ~masks.as_mask(MASK)])
def test_an_array_within_a_mask_of_a_head_has_its_axis(mask):
    with pytest.raises(ValueError, match=r"arrays \(\.\.\., 1, T, S\), .* got \(2, 5, 5\): write array\[\.\.\., None"):
        head(head_params(PARAMS, 0), X, X, X, mask=mask)


def test_a_mask_of_a_head_is_per_sample_with_its_axis():
    one = head_params(PARAMS, 0)
    samples, _ = head(one, X, X, X, mask=masks.lengths(4) & MASK[:, None])
    for b in range(2):
        close(samples[b], head(one, X[b], X[b], X[b], mask=masks.lengths(4) & MASK[b])[0])
    head(one, X[0], X[0], X[0], mask=MASK[0])


def test_booleans_of_dropout_of_a_head_are_per_sample():
    one, keep = head_params(PARAMS, 0), MASK[::-1]
    samples, _ = head(one, X, X, X, dropout=dropout.masked(keep, 0.5))
    for b in range(2):
        close(samples[b], head(one, X[b], X[b], X[b], dropout=dropout.masked(keep[b], 0.5))[0])
