"""A mask (B, T, S) of as many samples as heads: per head by broadcasting, and per sample in other libraries."""

import numpy as np
import pytest
from test_ops import close

from funcmha import attention, head, head_params, init, masks, mha, self_attention
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


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[:, :1], masks.causal() & MASK, masks.lengths(np.array([3, 4])) | MASK, ~masks.as_mask(MASK)],
    ids=["array", "keys", "and", "beside lengths", "not"],
)
def test_a_mask_that_may_mean_either_is_refused(call, mask):
    with pytest.raises(ValueError, match=r"B=H=2, got \(2, [15], 5\), .* mask\[:, None\] .* sample, mask\[None\] "):
        call(mask)


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
