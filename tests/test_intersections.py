"""Intersections of masks: which keys and queries take part, exactly."""

import numpy as np
import pytest

from funcmha import attention, init, masks, self_attention, self_attention_vjp, tree

RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 4, 310))
PAIRS = {  # T = 300 is more than one block of rows
    "causal, padded queries": (masks.causal(), (np.arange(300) < 270)[:, None]),
    "band, first keys": (masks.window(40, 3), (np.arange(310) < 5)[None]),
    "segments, causal": (
        masks.segments(np.sort(RNG.integers(0, 4, 300)), np.sort(RNG.integers(0, 4, 310))),
        masks.causal(),
    ),
    "per head, causal": (masks.causal(), RNG.random((2, 3, 300, 310)) > 0.99),
    "nothing": (masks.causal(), np.zeros((1, 310), bool)),
}


@pytest.mark.parametrize(("mask", "other"), PAIRS.values(), ids=PAIRS)
def test_an_intersection_knows_its_keys_and_queries_exactly(mask, other):
    """Against `any` over its booleans: what the parts say, taken together, may be more."""
    both = mask & other
    allowed = np.broadcast_to(both.dense(300, 310), (2, 3, 300, 310))
    for got, axis in ((both.attended_keys(300, 310), -2), (both.attending_queries(300, 310), -1)):
        want = allowed.any(axis=axis, keepdims=True)
        assert np.array_equal(np.broadcast_to(got, want.shape), want)


@pytest.mark.parametrize("engine", ["sequential", "batched", "tiled"])
def test_nan_of_a_key_forbidden_by_two_masks_together(engine):
    q, k, v = RNG.standard_normal((3, 1, 100, 4))
    k[:, 90:] = v[:, 90:] = np.nan
    o, _ = attention(q, k, v, mask=masks.causal() & (np.arange(100) < 90)[:, None], engine=engine)
    assert np.isfinite(o).all()
    params, x = init(0, 8, 2, dtype=np.float64), RNG.standard_normal((1, 100, 8))
    x[:, 90:] = np.nan
    y, cache = self_attention(params, x, mask=masks.causal() & (np.arange(100) < 90)[:, None], engine=engine)
    dparams, dx, _ = self_attention_vjp(cache, np.nan_to_num(y))
    assert all(np.isfinite(g).all() for g in tree.flatten(dparams).values())
    assert np.isfinite(dx).all()
