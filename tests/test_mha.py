"""Multi-head attention against torch's autograd, against its own heads, and its refusals."""

from dataclasses import replace

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from test_ops import MODERATE, close, portable

from funcmha import (
    attention_weights,
    head,
    head_params,
    head_vjp,
    init,
    linear,
    linear_vjp,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    self_attention,
    self_attention_vjp,
    sizes,
    tree,
)
from funcmha._arrays import unbroadcast
from funcmha.biases import RelativeBias, dense, diagonal_sums
from funcmha.dropout import masked
from funcmha.norms import LayerNorm
from funcmha.rotary import frequencies, table
from funcmha.testing.strategies import MODERN, MODERN_MHA, MhaProblem, mha_problems

# A norm's gradient divides by the length of its input: of a gradient of exactly zero, a gain of 1e-8 leaves 1e-8 of
# rounding, in PyTorch as here.
NORMED = {"gain": st.sampled_from([1e-3, 1.0, 10.0])}


def close_trees(got, want):
    tree.map(lambda g, w: close(g, w) if w is not None else g is None or pytest.fail("must be None"), got, want)


@given(mha_problems(**MODERATE))
@example(MhaProblem(mask="heads", bias="... H 1 S", bias_kv=True, zero_attn=True, rate=0.3))
@example(MhaProblem(mask="empty rows", bias="S", bias_kv=True))
@example(MhaProblem(S=0, zero_attn=True, bias="1 S"))
def test_mha_matches_torch(engine, problem):
    compare_with_torch(engine, problem)


@given(mha_problems(**(MODERN | MODERN_MHA | NORMED), D=st.sampled_from([3, 8, 11])))
@example(
    MhaProblem(qk_norm="rms", rotary="half of all", softcap=30.0, sink=True, bias="... H T+S-1", rate=0.3, seeded=True)
)
@example(MhaProblem(qk_norm="layer", rotary="interleaved of some", softcap=0.5, per_head=True, scale=0.5, mask="heads"))
@example(MhaProblem(qk_norm="l2", bias_kv=True, zero_attn=True, sink=True, scale=10.0, bias="... H T S"))
def test_mha_with_modern_options_matches_torch(engine, problem):
    compare_with_torch(engine, problem)


def compare_with_torch(engine, problem):
    (params, *arrays), static = problem.inputs("float64"), problem.static()
    dy, dweights, dlse = problem.cotangents("float64")
    y, cache = mha(params, *arrays, **static, engine=engine)
    tensors, leaves = oracles.tensors(params), [oracles.tensor(a) for a in arrays]
    outputs = oracles.mha(tensors, *leaves, **static)
    for got, want in zip((y, attention_weights(cache), log_sum_exp(cache)), outputs, strict=True):
        close(got, want.detach())

    names = tree.flatten(tensors)
    lse = torch.where(torch.isinf(outputs[2]), 0.0, outputs[2])
    cotangents = [dy, dweights, dlse]
    wanted = oracles.gradients([*outputs[:2], lse], cotangents, [*names.values(), *leaves])
    dparams, *grads = mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
    close_trees(dparams, tree.unflatten(dict(zip(names, wanted, strict=False))))
    for got, want in zip(grads, wanted[len(names) :], strict=True):
        close_trees(got.values if isinstance(got, RelativeBias) else got, want)


@given(mha_problems(**MODERATE))
def test_mha_equals_its_heads_side_by_side(engine, problem):
    """Forward and backward: what `mha` does in one product for all heads, `head` does with one head's parameters."""
    (params, query, key, value, bias), static = problem.inputs("float64"), problem.static()
    dy, dweights, dlse = problem.cotangents("float64")
    y, cache = mha(params, query, key, value, bias, **static, engine=engine)
    dparams, *dinputs = mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
    H, K, *_ = sizes(params)
    scores = (*problem.batch, H, problem.T, problem.S)
    mask = masks.dense(static.pop("mask"), problem.T, problem.S, query)
    mask = None if mask is None else np.broadcast_to(mask, scores)
    whole_bias = None if bias is None else np.broadcast_to(bias, scores)
    dropout = static.pop("dropout")

    def one(h):
        return head(
            head_params(params, h),
            query,
            key,
            value,
            None if bias is None else whole_bias[..., h, :, :],
            mask=None if mask is None else mask[..., h, :, :],
            dropout=oracles.on_keep(lambda keep: keep[..., h, :, :], dropout),
            **static,
            engine=engine,
        )

    heads = [one(h) for h in range(H)]
    w, b = params["out_proj"]["w"], params["out_proj"].get("b")
    together, out = linear(np.concatenate([o for o, _ in heads], axis=-1), w.reshape(problem.O, -1), b)
    close(y, together)

    do, dw, _ = linear_vjp(out, dy)
    do = np.split(do, H, axis=-1)
    grads = [
        head_vjp(c, do[h], dweights=dweights[..., h, :, :], dlse=dlse[..., h, :]) for h, (_, c) in enumerate(heads)
    ]
    close(dparams["out_proj"]["w"], dw.reshape(w.shape))
    for i, got in enumerate(dinputs[:3]):
        close(got, sum(g[i + 1] for g in grads))
    for h in range(H):
        close_trees(tree.map(lambda a, h=h: a[h], {"q_proj": dparams["q_proj"]}), {"q_proj": grads[h][0]["q_proj"]})
    for kv in range(K):
        group = [grads[h][0] for h in range(kv * H // K, (kv + 1) * H // K)]
        for name in dparams.keys() - {"q_proj", "out_proj"}:
            close_trees(
                tree.map(lambda a, kv=kv: a[kv], dparams[name]), tree.map(lambda *a: sum(a), *[g[name] for g in group])
            )
    if bias is not None:
        close(dinputs[3], unbroadcast(np.stack([g[4] for g in grads], axis=-3), bias.shape))


@pytest.mark.parametrize("mask", [masks.causal(), masks.lengths(np.array([3, 5])), np.ones((2, 5, 5), bool), None])
def test_head_takes_the_masks_of_mha(engine, mask):
    params, x, *_ = MhaProblem(Ck=17, Cv=17, S=5, K=1, G=1).inputs("float64")
    y, cache = head(head_params(params, 0), x, x, x, mask=mask, engine=engine)
    whole = mask[:, None] if isinstance(mask, np.ndarray) else mask
    want, whole_cache = mha(params, x, x, x, mask=whole, engine=engine)
    close(y @ params["out_proj"]["w"][:, 0].T + params["out_proj"]["b"], want)
    assert np.array_equal(attention_weights(cache), attention_weights(whole_cache)[:, 0])
    assert np.array_equal(log_sum_exp(cache), log_sum_exp(whole_cache)[:, 0])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_head_takes_a_relative_bias_of_each_sample(engine, batch, shared):
    """(..., T + S − 1), as its other biases are (..., T, S), with the gradient of the array that it stands for."""
    params, *arrays, _ = MhaProblem(batch=batch).inputs("float64")
    values = np.random.default_rng(0).standard_normal((11,) if shared else (*batch, 11))
    o, cache = head(head_params(params, 1), *arrays, RelativeBias(values), engine=engine)
    want, dense_cache = head(head_params(params, 1), *arrays, dense(RelativeBias(values), 5, 7), engine=engine)
    close(o, want)
    *grads, dbias = head_vjp(cache, o)
    *want_grads, want_dbias = head_vjp(dense_cache, o)
    for got, wanted in zip(grads, want_grads, strict=True):
        close_trees(got, wanted)
    close(dbias.values, unbroadcast(diagonal_sums(want_dbias), values.shape))


@given(mha_problems(Ck=st.just(7), Cq=st.just(7), Cv=st.just(7), **MODERATE))
def test_self_attention_sums_the_three_gradients(engine, problem):
    params, x, _, _, bias = MhaProblem(**{**vars(problem), "S": problem.T}).inputs("float64")
    static = MhaProblem(**{**vars(problem), "S": problem.T}).static()
    y, cache = self_attention(params, x, bias, **static, engine=engine)
    want, mha_cache = mha(params, x, x, x, bias, **static, engine=engine)
    assert np.array_equal(y, want)
    assert np.array_equal(attention_weights(cache), attention_weights(mha_cache))
    assert np.array_equal(log_sum_exp(cache), log_sum_exp(mha_cache))
    dparams, dx, dbias = self_attention_vjp(cache, y)
    want_params, dq, dk, dv, want_bias = mha_vjp(mha_cache, y)
    close_trees(dx, dq + dk + dv)  # added up in another order
    close_trees(dparams, want_params)
    close_trees(dbias, want_bias)


def test_every_array_library_gives_the_same(engine, xp):
    problem = MhaProblem(mask="intersection", bias="... H 1 S", rate=0.3, bias_kv=True, zero_attn=True)
    inputs, static = problem.inputs("float64"), problem.static()
    dy, dweights, dlse = problem.cotangents("float64")
    y, cache = mha(*inputs, **static, engine=engine)
    want = (y, attention_weights(cache), log_sum_exp(cache), *mha_vjp(cache, dy, dweights=dweights, dlse=dlse))

    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    y, cache = mha(*map(xp.tree, inputs), **static, engine=portable(engine))
    dy, dweights, dlse = map(xp.to, (dy, dweights, dlse))
    got = (y, attention_weights(cache), log_sum_exp(cache), *mha_vjp(cache, dy, dweights=dweights, dlse=dlse))
    for a, b in zip(got, want, strict=True):
        tree.map(lambda g, w: close(xp.back(g), w), a, b)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_rounded_once(engine, dtype):
    """T4: what float32 gives, rounded; nothing between the projections is rounded to the half type."""
    problem = MhaProblem(bias="H T S", bias_kv=True, zero_attn=True, Ck=17, Cv=17, S=5)
    params, x, _, _, bias = problem.inputs(dtype)
    params_32 = tree.map(lambda a: a.astype(np.float32), params)
    y, cache = self_attention(params, x, bias, zero_attn=True, engine=engine)
    y_32, cache_32 = self_attention(
        params_32, x.astype(np.float32), bias.astype(np.float32), zero_attn=True, engine=engine
    )
    assert y.dtype == dtype
    assert np.array_equal(y, y_32.astype(dtype))
    grads, grads_32 = self_attention_vjp(cache, y), self_attention_vjp(cache_32, y.astype(np.float32))
    for got, want in zip(grads, grads_32, strict=True):
        tree.map(
            lambda g, w: (g.dtype == dtype and np.array_equal(g, w.astype(dtype))) or pytest.fail("differs"), got, want
        )


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("heads", ["all", "one"])
def test_an_unattended_key_has_no_effect(garbage, heads):
    """Not on the gradients of the projections either: 0 · NaN in Σ dk xᵀ would be NaN."""
    params, query, key, value, _ = MhaProblem(bias_kv=True).inputs("float64")
    f, f_vjp = (mha, mha_vjp) if heads == "all" else (head, head_vjp)
    params = params if heads == "all" else head_params(params, 0)

    def run(x):
        padded = [np.concatenate([a[:, :4], np.full_like(a[:, 4:], x)], axis=1) for a in (key, value)]
        y, cache = f(params, query, *padded, mask=masks.lengths(4))
        return {"y": y} | dict(zip("pqkv", f_vjp(cache, y), strict=False))

    tree.map(lambda a, b: np.testing.assert_array_equal(a, b), run(garbage), run(0.5))


def test_weights_and_lse_are_read_from_the_cache_without_a_trace(engine):
    params, *arrays = MhaProblem().inputs("float64")
    y, cache = mha(params, *arrays, engine=engine)
    before = mha_vjp(cache, y)
    p = attention_weights(cache)
    assert p.shape == (2, 6, 5, 7)
    assert np.allclose(p.sum(-1), 1, rtol=1e-15)
    assert log_sum_exp(cache).shape == (2, 6, 5)
    for a, b in zip(mha_vjp(cache, y), before, strict=True):
        tree.map(lambda g, w: g is w or np.array_equal(g, w) or pytest.fail("differs"), a, b)


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

PARAMS, QUERY, KEY, VALUE, _ = MhaProblem(bias_kv=True).inputs("float64")


def without(leaf):
    flat = tree.flatten(PARAMS)
    del flat[leaf]
    return tree.unflatten(flat)


def changed(leaf, a):
    return tree.unflatten(tree.flatten(PARAMS) | {leaf: a})


@pytest.mark.parametrize(
    ("args", "static", "error", "message"),
    [
        ((None, QUERY, KEY, VALUE), {}, TypeError, "params must be a dict of dicts of arrays, got NoneType"),
        ((without("k_proj.w"), QUERY, KEY, VALUE), {}, KeyError, "params must have q_proj.w, .*, and has no k_proj.w"),
        ((changed("slope.w", QUERY), QUERY, KEY, VALUE), {}, KeyError, "params may have .*, and has slope.w"),
        ((without("bias_kv.v"), QUERY, KEY, VALUE), {}, KeyError, "params must have both bias_kv.k and bias_kv.v"),
        (
            (changed("k_proj.w", np.ones((2, 10, 19))), QUERY, KEY, VALUE),
            {},
            ValueError,
            r"k_proj.w must be \(K, D, Ck\) with D=11 as in q_proj.w, got \(2, 10, 19\)",
        ),
        (
            (changed("k_proj.b", np.ones((1, 11))), QUERY, KEY, VALUE),
            {},
            ValueError,
            "k_proj.b must be .* K=2 as in k_proj.w",
        ),
        (
            (changed("out_proj.w", np.ones((29, 6, 12))), QUERY, KEY, VALUE),
            {},
            ValueError,
            "out_proj.w must be .* E=13",
        ),
        (
            (tree.map(lambda a: a, changed("q_proj.w", np.ones((5, 11, 17)))), QUERY, KEY, VALUE),
            {},
            ValueError,
            r"q_proj.b must be \(H, D\) with H=5 as in q_proj.w",
        ),
        (
            (changed("q_proj.b", np.ones((6, 11), "f4")), QUERY, KEY, VALUE),
            {},
            TypeError,
            "q_proj.b must have dtype float64",
        ),
        ((PARAMS, QUERY.tolist(), KEY, VALUE), {}, TypeError, "query must be an array, got list"),
        ((PARAMS, QUERY.astype("f4"), KEY, VALUE), {}, TypeError, "query must have dtype float64 as q_proj.w has"),
        (
            (PARAMS, KEY, KEY, VALUE),
            {},
            ValueError,
            r"query must be \(..., T, Cq\) with Cq=17 as in q_proj.w, got \(2, 7, 19\)",
        ),
        ((PARAMS, QUERY, KEY[0], VALUE), {}, ValueError, r"key must be \(..., S, Ck\) with ...=\(2,\) as in query"),
        ((PARAMS, QUERY, KEY, VALUE[:, :6]), {}, ValueError, r"value must be .* S=7 as in key.*, got \(2, 6, 23\)"),
        ((PARAMS, QUERY, KEY, VALUE, np.ones((2, 5, 7))), {}, ValueError, r"bias must broadcast to \(..., H, T, S\)"),
        ((PARAMS, QUERY, KEY, VALUE), {"mask": np.ones((2, 5, 7), bool)}, ValueError, r"mask .* = \(2, 6, 5, 7\), got"),
        ((PARAMS, QUERY, KEY, VALUE), {"mask": np.ones((5, 8), bool)}, ValueError, "mask must broadcast"),
        (
            (PARAMS, QUERY, KEY, VALUE),
            {"mask": np.ones((5, 7), "u1")},
            TypeError,
            "mask must be boolean, True = attend",
        ),
        ((PARAMS, QUERY, KEY, VALUE), {"mask": masks.padding(np.ones((3, 7), bool))}, ValueError, "mask must"),
        (
            (PARAMS, QUERY, KEY, VALUE),
            {"dropout": masked(np.ones((5, 7), bool), 0.1)},
            ValueError,
            r"dropout.keep must broadcast to .*S'.*8\), got",
        ),
        ((PARAMS, QUERY, KEY, VALUE), {"dropout": 0.1}, TypeError, "dropout must be dropout.masked"),
        ((PARAMS, QUERY, KEY, VALUE), {"scale": float("inf")}, ValueError, "scale must be finite"),
        ((PARAMS, QUERY, KEY, VALUE), {"zero_attn": 1}, TypeError, "zero_attn must be True or False, got 1"),
    ],
)
def test_mha_refuses(engine, args, static, error, message):
    with pytest.raises(error, match=message):
        mha(*args, **static, engine=engine)


def test_heads_that_do_not_divide_are_refused(engine):
    params, *arrays = MhaProblem(K=3, G=1, biases=False).inputs("float64")
    params["k_proj"]["w"] = np.ones((2, 11, 19))
    params["v_proj"]["w"] = np.ones((2, 13, 23))
    with pytest.raises(ValueError, match=r"q_proj.w has H=3 heads, which must be a multiple of K=2 as in k_proj.w"):
        mha(params, *arrays, engine=engine)


def test_self_attention_refuses_widths_that_differ(engine):
    with pytest.raises(ValueError, match=r"x must be \(..., T, Ck\) with .*Ck=19 as in k_proj.w, got \(2, 5, 17\)"):
        self_attention(PARAMS, QUERY, engine=engine)


def test_head_refuses_the_parameters_of_all_heads(engine):
    with pytest.raises(KeyError, match=r"params may have q_proj.w, .*, and has out_proj.w"):
        head(PARAMS, QUERY, KEY, VALUE, engine=engine)
    params = {name: group for name, group in PARAMS.items() if name != "out_proj"}
    with pytest.raises(ValueError, match=r"q_proj.w must be \(D, Cq\), got \(6, 11, 17\)"):
        head(params, QUERY, KEY, VALUE, engine=engine)


def test_vjps_refuse_cotangents_that_are_not_of_the_output(engine):
    y, cache = mha(PARAMS, QUERY, KEY, VALUE, engine=engine)
    with pytest.raises(ValueError, match=r"dy must be \(..., T, O\) = \(2, 5, 29\) as the output is, got \(2, 5, 28\)"):
        mha_vjp(cache, y[..., 1:])
    with pytest.raises(ValueError, match=r"dweights must be \(..., H, T, S'\) = \(2, 6, 5, 8\)"):
        mha_vjp(cache, y, dweights=np.ones((2, 6, 5, 7)))
    with pytest.raises(ValueError, match=r"dlse must be \(..., H, T\) = \(2, 6, 5\)"):
        mha_vjp(cache, y, dlse=np.ones((2, 5)))
    o, one = head(head_params(PARAMS, 0), QUERY, KEY, VALUE, engine=engine)
    with pytest.raises(ValueError, match=r"do must be \(..., T, E\) = \(2, 5, 13\)"):
        head_vjp(one, y)
    with pytest.raises(ValueError, match=r"dweights must be \(..., T, S'\) = \(2, 5, 8\)"):
        head_vjp(one, o, dweights=np.ones((2, 5, 7)))
    with pytest.raises(ValueError, match=r"dlse must be \(..., T\) = \(2, 5\)"):
        head_vjp(one, o, dlse=np.ones((2, 6, 5)))


# ── a gradient for each sample ───────────────────────────────────────────────────────────────────────────────────


@given(mha_problems(**(MODERN | MODERN_MHA | NORMED), D=st.sampled_from([3, 8]), batch=st.sampled_from([(3,), (2, 3)])))
@example(MhaProblem(batch=(2, 3), bias="... H T+S-1", rate=0.3, seeded=True, rotary="half of all", qk_norm="rms"))
@example(MhaProblem(batch=(3,), bias="... 1 1 S", mask="heads", rate=0.3, bias_kv=True, sink=True, softcap=0.5))
def test_per_sample_gradients_equal_each_sample_alone(engine, problem):
    """Oracle: the ordinary gradient where every other sample's cotangents are 0; and their sum is the ordinary one."""
    (params, *arrays), static = problem.inputs("float64"), problem.static()
    dy, dweights, dlse = problem.cotangents("float64")
    _, cache = mha(params, *arrays, **static, engine=engine)
    whole = mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
    got = mha_vjp(cache, dy, dweights=dweights, dlse=dlse, per_sample=True)
    for g, w in zip(got[1:], whole[1:], strict=True):
        assert type(g) is type(w)
        close_trees(*(x.values if isinstance(x, RelativeBias) else x for x in (g, w)))
    axes = tuple(range(len(problem.batch)))
    close_trees(tree.map(lambda a: a.sum(axis=axes), got[0]), whole[0])
    b = tuple(n - 1 for n in problem.batch)

    def alone(a):
        one = np.zeros_like(a)
        one[b] = a[b]
        return one

    dparams, *_ = mha_vjp(cache, alone(dy), dweights=alone(dweights), dlse=alone(dlse))
    close_trees(tree.map(lambda a: a[b], got[0]), dparams)


LOOPED = {
    "rms, sink, appended keys": {"qk_norm": "rms", "sink": True, "bias_kv": True, "zero_attn": True, "bias": "H T S"},
    "layer, relative bias": {"qk_norm": "layer", "bias": "1 T+S-1", "softcap": 0.5, "rotary": "half of all"},
    "l2, multi-query": {"qk_norm": "l2", "K": 1, "G": 4, "sink": True, "mask": "causal"},
    "no biases, all heads": {"biases": False, "K": 4, "G": 1, "bias": "T S", "mask": "causal"},
}


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("options", LOOPED.values(), ids=LOOPED)
def test_per_sample_gradients_equal_the_loop_over_samples(engine, options, batch):
    """Oracle: `mha` of one sample after another, each with its ordinary gradient."""
    problem = MhaProblem(D=8, batch=batch, **options)
    (params, *arrays, bias), static = problem.inputs("float64"), problem.static() | {"engine": engine}
    dy, dweights, dlse = problem.cotangents("float64")
    each, *_ = mha_vjp(mha(params, *arrays, bias, **static)[1], dy, dweights=dweights, dlse=dlse, per_sample=True)
    tree.map(lambda a, p: a.shape == (*batch, *p.shape) or pytest.fail("must have the batch before it"), each, params)
    for b in np.ndindex(*batch):
        _, cache = mha(params, *(a[b] for a in arrays), bias, **static)
        dparams, *_ = mha_vjp(cache, dy[b], dweights=dweights[b], dlse=dlse[b])
        close_trees(tree.map(lambda a, b=b: a[b], each), dparams)


HEAD = MhaProblem(K=1, G=1, D=8, batch=(2, 3), sink=True, qk_norm="layer", softcap=0.5, bias_kv=True)
HEAD_BIASES = {"of each sample": (2, 3, 5, 7), "of some": (3, 1, 7), "of all": (7,), "none": None}


@pytest.mark.parametrize("shape", HEAD_BIASES.values(), ids=HEAD_BIASES)
@pytest.mark.parametrize("relative", [True, False])
def test_per_sample_gradients_of_a_head_equal_each_alone(engine, shape, relative):
    """Oracle: the head of one sample and then of another; the other gradients are what they are without."""
    params, *arrays, _ = (replace(HEAD, bias_kv=False) if relative else HEAD).inputs("float64")
    bias = None if shape is None else np.random.default_rng(0).standard_normal(shape)
    bias = RelativeBias(np.random.default_rng(0).standard_normal((2, 3, 11))) if relative and shape else bias
    params, keys = head_params(params, 0), np.random.default_rng(1).integers(1, 8, (2, 3))
    places = np.random.default_rng(2).uniform(0, 30, (2, 3, 1, 5))
    o, cache = head(params, *arrays, bias, **head_options(keys, places), engine=engine)
    do, (_, dweights, dlse) = np.random.default_rng(3).standard_normal(o.shape), HEAD.cotangents("float64")
    dweights, dlse = dweights[..., 0, :, : 7 + (not relative)], dlse[..., 0, :]
    each, *got = head_vjp(cache, do, dweights=dweights, dlse=dlse, per_sample=True)
    tree.map(lambda a, p: a.shape == (2, 3, *p.shape) or pytest.fail("must have the batch before it"), each, params)
    _, *want = head_vjp(cache, do, dweights=dweights, dlse=dlse)
    for g, w in zip(got, want, strict=True):
        close_trees(*(x.values if isinstance(x, RelativeBias) else x for x in (g, w)))
    for b in np.ndindex(2, 3):
        own = RelativeBias(bias.values[b]) if isinstance(bias, RelativeBias) else bias
        own = (
            own
            if own is None or isinstance(own, RelativeBias) or own.ndim < 3
            else np.broadcast_to(own, (2, 3, 5, 7))[b]
        )
        _, one = head(params, *(a[b] for a in arrays), own, **head_options(keys[b], places[b]), engine=engine)
        dparams, *_ = head_vjp(one, do[b], dweights=dweights[b], dlse=dlse[b])
        close_trees(tree.map(lambda a, b=b: a[b], each), dparams)


def head_options(keys, places):
    rotary = table(places, frequencies(6))
    return {"mask": masks.lengths(keys), "qk_norm": LayerNorm(), "softcap": 0.5, "rotary": (rotary, None)}


def test_per_sample_of_self_attention(engine):
    params, x, *_ = MhaProblem(Ck=17, Cv=17, S=5, batch=(3,)).inputs("float64")
    y, cache = self_attention(params, x, mask=masks.lengths(np.array([5, 2, 3])), engine=engine)
    dparams, dx, _ = self_attention_vjp(cache, y, per_sample=True)
    want, want_dx, _ = self_attention_vjp(cache, y)
    close(dx, want_dx)
    close_trees(tree.map(lambda a: a.sum(0), dparams), want)
    assert dparams["q_proj"]["w"].shape == (3, *params["q_proj"]["w"].shape)


def test_self_attention_takes_a_relative_bias(engine):
    problem = MhaProblem(Ck=17, Cv=17, S=5, bias="... H T+S-1")
    params, x, _, _, bias = problem.inputs("float64")
    y, cache = self_attention(params, x, bias, engine=engine)
    want, mha_cache = mha(params, x, x, x, bias, engine=engine)
    assert np.array_equal(y, want)
    close(self_attention_vjp(cache, y)[2].values, mha_vjp(mha_cache, y)[4].values)


def test_per_sample_gradients_of_no_samples_are_empty(engine):
    params, *x = MhaProblem(batch=(0,)).inputs("float64")
    y, cache = mha(params, *x, engine=engine)
    dparams, *_ = mha_vjp(cache, y, per_sample=True)
    tree.map(lambda g, p: close(g, np.zeros((0, *p.shape))), dparams, params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_one_masked_half_input_is_three(dtype):
    """Fully masked queries and unattended keys are zeroed in one array, whatever the width of the projections."""
    params = tree.map(lambda a: a.astype(dtype), init(0, 6, 3, num_kv_heads=1))
    x = np.random.default_rng(0).standard_normal((2, 9, 6)).astype(dtype)
    mask = np.tri(9, 9, -2, dtype=bool)
    y, cache = self_attention(params, x, mask=mask)
    dparams, dx, _ = self_attention_vjp(cache, y)
    p64, x64 = tree.map(lambda a: a.astype(np.float64), params), x.astype(np.float64)
    _, cache = mha(p64, x64, x64, x64, mask=mask, engine="sequential")
    dwant, *dxs, _ = mha_vjp(cache, y.astype(np.float64))
    largest = max(np.abs(g).max() for g in tree.flatten(dwant).values())
    atol = largest * (2.0**-8 if dtype == np.float16 else 2.0**-5)  # four roundings to the half type
    tree.map(lambda g, w: np.testing.assert_allclose(g.astype(np.float64), w, rtol=0, atol=atol), dparams, dwant)
    np.testing.assert_allclose(dx.astype(np.float64), sum(dxs), rtol=0, atol=atol)
