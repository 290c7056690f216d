"""Norms, largest scores, pruning and merging of heads."""

import numpy as np
import pytest
from test_mha import close_trees
from test_ops import close

from funcmha import head_params, init, masks, mha, self_attention, sizes, surgery, tree
from funcmha.engines import ENGINES
from funcmha.testing.strategies import MhaProblem

PARAMS = init(
    3,
    19,
    6,
    num_kv_heads=2,
    head_dim=5,
    value_dim=7,
    kdim=11,
    vdim=13,
    out_dim=17,
    bias_kv=True,
    sink=True,
    dtype=np.float64,
)


def test_head_norms_are_those_of_each_head():
    norms = surgery.head_norms(PARAMS)
    for h in range(6):
        one = head_params(PARAMS, h)
        close(norms["q_proj"][h], np.linalg.norm(one["q_proj"]["w"]))
        close(norms["k_proj"][h // 3], np.linalg.norm(one["k_proj"]["w"]))
        close(norms["v_proj"][h // 3], np.linalg.norm(one["v_proj"]["w"]))
        close(norms["out_proj"][h], np.linalg.norm(PARAMS["out_proj"]["w"][:, h]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", ["none", "causal", "heads", "lengths"])
@pytest.mark.parametrize("T", [5, 600])
def test_max_logit_is_the_largest_score(engine, mask, T):
    """600 queries are two blocks of rows."""
    problem = MhaProblem(T=T, mask=mask, scale=0.5, per_head=True, softcap=2.0, batch=(2,), bias="... H 1 S")
    (params, query, key, value, bias), static = problem.inputs("float64"), problem.static()
    _, cache = mha(params, query, key, value, bias, **static, engine=engine)
    allowed = None if static["mask"] is None else masks.dense(static["mask"], T, 7, query)
    for h in range(6):
        one = head_params(params, h)
        q = query @ one["q_proj"]["w"].T + one["q_proj"]["b"]
        k = key @ one["k_proj"]["w"].T + one["k_proj"]["b"]
        u = static["scale"][h] * np.einsum("btd,bsd->bts", q, k)
        attended = np.ones(u.shape, bool) if allowed is None else np.broadcast_to(allowed, (2, 6, T, 7))[:, h]
        close(surgery.max_logit(cache, mask=static["mask"])[:, h], np.where(attended, u, -np.inf).max(axis=(1, 2)))


def test_max_logit_of_nothing_and_of_self_attention():
    params = init(0, 12, 3)
    _, cache = self_attention(params, np.ones((2, 0, 12), np.float32))
    assert np.array_equal(surgery.max_logit(cache), np.full((2, 3), -np.inf, np.float32))


def test_pruned_heads_are_gone_and_the_rest_stays():
    """Oracle: the head's columns of the output projection set to 0."""
    problem = MhaProblem(K=2, G=3, batch=(2,), sink=True, qk_norm="rms", bias_kv=True)
    (params, *x), static = problem.inputs("float64"), problem.static()
    for keep in ([0, 1, 3, 5], [4], [5, 3, 2, 0], [0, 1, 2]):
        pruned = surgery.prune_heads(params, keep)
        assert len(keep) == sizes(pruned).H
        assert len({h // 3 for h in keep}) == sizes(pruned).K
        w = np.where(np.isin(np.arange(6), keep)[:, None], params["out_proj"]["w"], 0.0)
        want, _ = mha(params | {"out_proj": params["out_proj"] | {"w": w}}, *x, **static)
        y, _ = mha(pruned, *x, **static)
        close(y, want)
        assert not any(np.shares_memory(a, b) for a in tree.flatten(pruned).values() for b in
                       [params["q_proj"]["w"], params["k_proj"]["w"], params["sink"]["w"]])  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([], ValueError, "keep must name heads, each once"),
        ([0, 0], ValueError, "keep must name heads, each once"),
        ([6], IndexError, r"keep must be in 0 … 5, as q_proj.w has H=6 heads, got \[6\]"),
        ([-1], IndexError, "keep must be in 0 … 5"),
        ([0, 1, 3], ValueError, "as many query heads, side by side"),
        ([0, 3, 1, 4], ValueError, "as many query heads, side by side"),
    ],
)
def test_prune_heads_refuses(keep, error, message):
    with pytest.raises(error, match=message):
        surgery.prune_heads(PARAMS, keep)


def test_merged_key_heads_are_the_means():
    params = init(1, 12, 6)
    merged = surgery.merge_kv_heads(params, 2)
    assert sizes(merged)[:2] == (6, 2)
    close(merged["k_proj"]["w"][1], params["k_proj"]["w"][3:].mean(0))
    close_trees(merged["q_proj"], params["q_proj"])
    same = surgery.merge_kv_heads(surgery.merge_kv_heads(params, 3), 3)
    close_trees(same, surgery.merge_kv_heads(params, 3))
    twice = tree.map(lambda a: a, params) | {
        name: tree.map(lambda a: np.repeat(a[::2], 2, axis=0), params[name]) for name in ("k_proj", "v_proj")
    }
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    np.testing.assert_allclose(  # heads that are alike in pairs merge into what they were
        self_attention(surgery.merge_kv_heads(twice, 3), x)[0], self_attention(twice, x)[0], rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"num_kv_heads must divide K=6 as in k_proj.w, got 4"):
        surgery.merge_kv_heads(params, 4)
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1, got 0"):
        surgery.merge_kv_heads(params, 0)
