"""Laws of attention that need no oracle: each relates one call to another. Exact ones compare bits."""

import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
from hypothesis import example, given
from test_ops import close, portable

from funcmha import (
    attention,
    attention_vjp,
    attention_weights,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    self_attention,
    self_attention_vjp,
    tree,
)
from funcmha.engines import SEQUENTIAL
from funcmha.testing.strategies import AttentionProblem, MhaProblem, attention_problems, mha_problems

FAIR = {"gain": st.sampled_from([1e-3, 1.0, 10.0])}
IN_ORDER = {"layout": st.just("contiguous")}  # BLAS may sum in another order where the layout is another
SOME = {"T": st.integers(1, 13), "S": st.integers(1, 13), "batch": st.sampled_from([(), (2,), (2, 3)])}
PLAIN = {"bias": st.just("none"), "mask": st.just("none"), "rate": st.just(0.0)}


def everything(engine, q, k, v, bias=None, sink=None, *, cotangents, **static):
    """Outputs and gradients of attention: o, weights, lse, dq, dk, dv, dbias, dsink."""
    do, dweights, dlse = cotangents
    o, cache = attention(q, k, v, bias, sink, **static, engine=engine)
    grads = attention_vjp(cache, do, dweights=dweights, dlse=dlse)
    return [o, attention_weights(cache), log_sum_exp(cache), *grads]


def of(engine, problem):
    return everything(engine, *problem.inputs("float64"), cotangents=problem.cotangents("float64"), **problem.static())


def equal(got, want):
    for g, w in zip(got, want, strict=True):
        assert g is w is None or np.array_equal(g, w)


# ── symmetries of heads and batch, exact ─────────────────────────────────────────────────────────────────────────


@given(
    attention_problems(
        batch=st.just((3,)), bias=st.sampled_from(["... H T S", "... H 1 S"]), mask=st.just("heads"), **IN_ORDER
    )
)
@example(AttentionProblem(batch=(3,), T=1, S=1, K=2, G=3, D=1, E=1, mask="heads", bias="... H T S", gain=10.0))
def test_a_batch_equals_its_samples_bit_for_bit(engine, problem):
    q, k, v, bias, _ = problem.inputs("float32")
    static, cotangents = problem.static(), problem.cotangents("float32")
    whole = everything(engine, q, k, v, bias, cotangents=cotangents, **static)
    for b in range(3):
        one = slice(b, b + 1)
        part_of = {name: a[one] if isinstance(a, np.ndarray) else a for name, a in static.items()}
        part_of["dropout"] = oracles.on_keep(lambda keep, one=one: keep[one], part_of["dropout"])
        part = everything(engine, q[one], k[one], v[one], bias[one], cotangents=[c[one] for c in cotangents], **part_of)
        equal(part, [None if a is None else a[one] for a in whole])


@given(attention_problems(bias=st.just("H T S"), mask=st.just("heads"), **IN_ORDER), st.randoms(use_true_random=False))
def test_permuting_key_heads_permutes_everything(engine, problem, random):
    q, k, v, bias, _ = problem.inputs("float64")
    static, cotangents = problem.static(), problem.cotangents("float64")
    order = random.sample(range(problem.K), problem.K)
    query_order = [kv * problem.G + g for kv in order for g in range(problem.G)]
    whole = everything(engine, q, k, v, bias, cotangents=cotangents, **static)

    def of_queries(a, axis=-3):
        return a if a is None else np.take(a, query_order, axis=axis)

    def of_keys(a):
        return np.take(a, order, axis=-3)

    static["mask"], static["dropout"] = of_queries(static["mask"]), oracles.on_keep(of_queries, static["dropout"])
    do, dweights, dlse = cotangents
    moved = (of_queries(do), of_queries(dweights), of_queries(dlse, -2))
    got = everything(engine, of_queries(q), of_keys(k), of_keys(v), of_queries(bias), cotangents=moved, **static)
    o, p, lse, dq, dk, dv, dbias, _ = whole
    want = [of_queries(o), of_queries(p), of_queries(lse, -2), of_queries(dq), of_keys(dk), of_keys(dv)]
    equal(got[:6], want)
    close(got[6], of_queries(dbias))


@given(attention_problems(**FAIR))
def test_grouped_heads_are_repeated_keys_and_values(engine, problem):
    q, k, v, bias, _ = problem.inputs("float64")
    static, cotangents = problem.static(), problem.cotangents("float64")
    o, p, lse, dq, dk, dv, *_ = everything(engine, q, k, v, bias, cotangents=cotangents, **static)
    repeated = (np.repeat(a, problem.G, axis=-3) for a in (k, v))
    got = everything(engine, q, *repeated, bias, cotangents=cotangents, **static)
    for g, w in zip(got[:4], (o, p, lse, dq), strict=True):
        close(g, w)
    groups = (*problem.batch, problem.K, problem.G, problem.S)
    close(dk, got[4].reshape(*groups, problem.D).sum(-3))
    close(dv, got[5].reshape(*groups, problem.E).sum(-3))


# ── symmetries of queries and keys ───────────────────────────────────────────────────────────────────────────────


@given(
    attention_problems(**FAIR | SOME, bias=st.just("... H T S"), mask=st.just("heads")),
    st.randoms(use_true_random=False),
)
def test_permuting_keys_permutes_their_gradients(engine, problem, random):
    order = random.sample(range(problem.S), problem.S)
    q, k, v, bias, _ = problem.inputs("float64")
    static, (do, dweights, dlse) = problem.static(), problem.cotangents("float64")
    want = everything(engine, q, k, v, bias, cotangents=(do, dweights, dlse), **static)
    static["mask"] = static["mask"][..., order]
    static["dropout"] = oracles.on_keep(lambda keep: keep[..., order], static["dropout"])
    cotangents = (do, dweights[..., order], dlse)
    o, p, lse, dq, dk, dv, dbias, _ = everything(
        engine, q, k[..., order, :], v[..., order, :], bias[..., order], cotangents=cotangents, **static
    )
    back = np.argsort(order)
    got = [o, p[..., back], lse, dq, dk[..., back, :], dv[..., back, :], dbias[..., back]]
    for g, w in zip(got, want[:7], strict=True):
        close(g, w)


@given(attention_problems(**FAIR | SOME, bias=st.just("... H T S"), mask=st.just("heads"), rate=st.just(0.0)))
def test_one_query_equals_its_row(engine, problem):
    q, k, v, bias, _ = problem.inputs("float64")
    mask, (do, dweights, dlse) = problem.static()["mask"], problem.cotangents("float64")
    whole = everything(engine, q, k, v, bias, cotangents=(do, dweights, dlse), mask=mask)
    rows = [slice(i, i + 1) for i in range(problem.T)]
    parts = [
        everything(
            engine,
            q[..., i, :],
            k,
            v,
            bias[..., i, :],
            cotangents=(do[..., i, :], dweights[..., i, :], dlse[..., i]),
            mask=mask[..., i, :],
        )
        for i in rows
    ]
    for n, axis in enumerate((-2, -2, -1, -2)):  # o, weights, lse, dq: row by row
        close(np.concatenate([part[n] for part in parts], axis=axis), whole[n])
    for n in (4, 5):  # dk, dv: every query adds its own
        close(sum(part[n] for part in parts), whole[n])


@given(attention_problems(**FAIR | SOME))
def test_a_padded_key_is_a_key_that_is_not_there(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    do, dweights, dlse = problem.cotangents("float64")
    n = problem.S // 2
    o, p, lse, dq, dk, dv, *_ = everything(engine, q, k, v, cotangents=(do, dweights, dlse), mask=masks.lengths(n))
    got = everything(engine, q, k[..., :n, :], v[..., :n, :], cotangents=(do, dweights[..., :n], dlse))
    for g, w in zip(got[:6], (o, p[..., :n], lse, dq, dk[..., :n, :], dv[..., :n, :]), strict=True):
        close(g, w)
    assert not p[..., n:].any()
    assert not dk[..., n:, :].any()
    assert not dv[..., n:, :].any()


@given(attention_problems(**SOME | IN_ORDER), st.integers(-2, 2))
def test_the_future_has_no_effect_and_no_gradient(problem, offset):
    """Causal: the first query that attends key j is j − offset. Exact: its weight is 0, and 0 times a number is 0."""
    q, k, v, *_ = problem.inputs("float64")
    do, *_ = problem.cotangents("float64")
    mask = masks.causal(offset)
    n = problem.S // 2
    k2, v2 = k.copy(), v.copy()
    k2[..., n:, :] += 1
    v2[..., n:, :] -= 1
    past = slice(0, min(max(n - offset, 0), problem.T))
    (o, cache), (o2, _) = (attention(q, *kv, mask=mask, engine=SEQUENTIAL) for kv in ((k, v), (k2, v2)))
    assert np.array_equal(o[..., past, :], o2[..., past, :])
    do = do.copy()
    do[..., past.stop :, :] = 0
    _, dk, dv, *_ = attention_vjp(cache, do)
    assert not dk[..., n:, :].any()
    assert not dv[..., n:, :].any()


def test_the_first_causal_query_returns_the_first_value(engine):
    q, k, v, *_ = AttentionProblem(G=1).inputs("float32")
    o, _ = attention(q, k, v, mask=masks.causal(), engine=engine)
    np.testing.assert_array_max_ulp(o[..., 0, :], v[..., 0, :], 2)
    o, _ = attention(q, k, v, mask=masks.causal(), engine=SEQUENTIAL)
    assert np.array_equal(o[..., 0, :], v[..., 0, :])


# ── algebra of scores and values ─────────────────────────────────────────────────────────────────────────────────


@given(attention_problems(**SOME | IN_ORDER), st.integers(-3, 3))
def test_powers_of_two_pass_through_exactly(engine, problem, n):
    q, k, v, bias, _ = problem.inputs("float64")
    static = problem.static() | {"scale": 0.25}
    o, cache = attention(q, k, v, bias, **static, engine=engine)
    twice, _ = attention(q, k, v * 2.0**n, bias, **static, engine=engine)
    assert np.array_equal(twice, o * 2.0**n)
    moved, moved_cache = attention(q * 2.0**n, k, v, bias, **static | {"scale": 0.25 * 2.0**-n}, engine=engine)
    assert np.array_equal(moved, o)
    assert np.array_equal(log_sum_exp(moved_cache), log_sum_exp(cache))


@given(attention_problems(**FAIR | SOME))
def test_a_shift_of_a_row_moves_the_log_sum_exp_alone(engine, problem):
    q, k, v, bias, _ = problem.inputs("float64")
    static = problem.static()
    o, cache = attention(q, k, v, bias, **static, engine=engine)
    shift = np.linspace(-7.0, 11.0, problem.T)[:, None]
    o2, cache2 = attention(q, k, v, shift if bias is None else bias + shift, **static, engine=engine)
    close(o2, o)
    close(attention_weights(cache2), attention_weights(cache))
    close(log_sum_exp(cache2), log_sum_exp(cache) + shift[:, 0])


@given(attention_problems(**FAIR))
def test_the_gradient_of_the_log_sum_exp_is_the_weights(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    mask = problem.static()["mask"]
    zero = np.zeros((*problem.batch, problem.H, problem.T, problem.S))
    o, cache = attention(q, k, v, zero, mask=mask, engine=engine)
    *_, dbias, _ = attention_vjp(cache, np.zeros_like(o), dlse=np.ones(o.shape[:-1]))
    close(dbias, attention_weights(cache))


@given(attention_problems(**FAIR, bias=st.just("... H T S")))
def test_score_gradients_of_a_row_sum_to_zero(engine, problem):
    _, p, _, _, _, _, dbias, _ = everything(
        engine, *problem.inputs("float64"), cotangents=(*problem.cotangents("float64")[:2], None), **problem.static()
    )
    close(dbias.sum(-1), np.zeros(dbias.shape[:-1]))
    assert not dbias[p == 0].any()


@given(attention_problems(**FAIR, **PLAIN))
def test_equal_values_are_returned_and_give_no_gradient(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    v = np.broadcast_to(v[..., :1, :], v.shape) if problem.S else v
    do, *_ = problem.cotangents("float64")
    o, cache = attention(q, k, v, engine=engine)
    dq, dk, *_ = attention_vjp(cache, do)
    if problem.S:
        close(o, np.repeat(v[..., :1, :], problem.G, axis=-3) + np.zeros_like(o))
    size = 1 + np.abs(v).max(initial=0)  # what cancels has the size of v
    close(dq / size / problem.gain, 0 * dq)
    close(dk / size / problem.gain, 0 * dk)


@given(attention_problems(**FAIR | SOME))
def test_values_stay_in_their_convex_hull(engine, problem):
    q, k, v, bias, _ = problem.inputs("float64")
    o, cache = attention(q, k, v, bias, mask=problem.static()["mask"], engine=engine)
    v = np.repeat(v, problem.G, axis=-3)
    attends = np.isfinite(log_sum_exp(cache))[..., None]
    ulps = 1e-13 * np.abs(v).max(initial=1)
    assert (~attends | (o <= v.max(-2, keepdims=True) + ulps)).all()
    assert (~attends | (o >= v.min(-2, keepdims=True) - ulps)).all()


@given(attention_problems(**FAIR | SOME))
def test_keys_given_twice_count_once(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    o, cache = attention(q, k, v, engine=engine)
    o2, cache2 = attention(q, np.concatenate([k, k], -2), np.concatenate([v, v], -2), engine=engine)
    close(o2, o)
    close(log_sum_exp(cache2), log_sum_exp(cache) + np.log(2))


@given(attention_problems(**FAIR | SOME | PLAIN))
def test_rotated_queries_and_keys_have_rotated_gradients(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    rotation = np.linalg.qr(np.random.default_rng(problem.seed).standard_normal((problem.D, problem.D)))[0]
    cotangents = problem.cotangents("float64")
    o, p, lse, dq, dk, dv, *_ = everything(engine, q, k, v, cotangents=cotangents)
    got = everything(engine, q @ rotation, k @ rotation, v, cotangents=cotangents)
    for g, w in zip(got[:6], (o, p, lse, dq @ rotation, dk @ rotation, dv), strict=True):
        close(g, w)


@given(attention_problems(**FAIR))
def test_queries_and_keys_have_equal_shares_of_the_gradient(engine, problem):
    """Euler: the scores are bilinear, so ⟨q, dq⟩ = ⟨k, dk⟩."""
    q, k, v, bias, _ = problem.inputs("float64")
    cotangents = problem.cotangents("float64")
    *_, dq, dk, _, _, _ = everything(engine, q, k, v, bias, cotangents=cotangents, **problem.static())
    size = 1 + np.abs(q * dq).sum() + np.abs(k * dk).sum()
    assert abs((q * dq).sum() - (k * dk).sum()) <= 1e-13 * size


@given(attention_problems(**FAIR))
def test_a_zero_cotangent_gives_zero_gradients(engine, problem):
    arrays = problem.inputs("float64")
    o, cache = attention(*arrays, **problem.static(), engine=engine)
    for grad in attention_vjp(cache, np.zeros_like(o)):
        assert grad is None or not grad.any()


@given(attention_problems(**FAIR, T=st.integers(1, 3), S=st.integers(1, 5), batch=st.just(()), mask=st.just("heads")))
def test_the_hessian_is_symmetric(engine, problem):
    """⟨u, H w⟩ = ⟨w, H u⟩, where H w is the vjp along w, by a complex step."""
    arrays = [a for a in problem.inputs("float64") if a is not None]
    rng = np.random.default_rng(problem.seed)
    do, *_ = problem.cotangents("complex128")
    u, w = ([rng.standard_normal(a.shape) for a in arrays] for _ in range(2))

    def hessian(d):
        moved = (a + 1e-30j * step for a, step in zip(arrays, d, strict=True))
        _, cache = attention(*moved, **problem.static(), engine=portable(engine))
        return [g.imag / 1e-30 for g in attention_vjp(cache, do) if g is not None]

    one = [(a * h).sum() for a, h in zip(u, hessian(w), strict=True)]
    other = [(a * h).sum() for a, h in zip(w, hessian(u), strict=True)]
    assert abs(sum(one) - sum(other)) <= 1e-12 * (1 + np.abs(one).sum() + np.abs(other).sum())


@given(attention_problems(**FAIR))
def test_the_layout_in_memory_does_not_matter(engine, problem):
    arrays, static = problem.inputs("float64"), problem.static()
    dense = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    results = (everything(engine, *x, cotangents=problem.cotangents("float64"), **static) for x in (arrays, dense))
    for g, w in zip(*results, strict=True):
        assert g is w is None or close(g, w) is None


# ── multi-head attention ─────────────────────────────────────────────────────────────────────────────────────────


def mha_everything(engine, params, *arrays, cotangents, **static):
    dy, dweights, dlse = cotangents
    y, cache = mha(params, *arrays, **static, engine=engine)
    return y, *mha_vjp(cache, dy, dweights=dweights, dlse=dlse)


@given(mha_problems(**FAIR, biases=st.just(True), bias_kv=st.just(False), zero_attn=st.just(False)))
def test_a_bias_of_the_keys_has_no_effect_and_no_gradient(engine, problem):
    """It adds the same number to every score of a row. Only appended keys, which do not have it, can tell."""
    params, *arrays = problem.inputs("float64")
    static, (dy, dweights, _) = problem.static(), problem.cotangents("float64")
    y, dparams, *_ = mha_everything(engine, params, *arrays, cotangents=(dy, dweights, None), **static)
    params["k_proj"]["b"] = params["k_proj"]["b"] + 1
    y2, *_ = mha_everything(engine, params, *arrays, cotangents=(dy, dweights, None), **static)
    close(y2, y)
    size = problem.gain * (1 + np.abs(arrays[2]).max(initial=0)) * (1 + np.abs(arrays[0]).max(initial=0)) * 100
    close(dparams["k_proj"]["b"] / size, 0 * dparams["k_proj"]["b"])


@given(mha_problems(**FAIR))
def test_twice_the_query_and_half_the_key_weights_are_the_same(engine, problem):
    params, *arrays = problem.inputs("float64")
    y, _ = mha(params, *arrays, **problem.static(), engine=engine)
    for name, factor in (("q_proj", 2.0), ("k_proj", 0.5), ("bias_kv", 0.5)):
        if name in params:
            params[name] = {leaf: a if leaf == "v" else a * factor for leaf, a in params[name].items()}
    assert np.array_equal(mha(params, *arrays, **problem.static(), engine=engine)[0], y)


@given(
    mha_problems(
        K=st.just(1), G=st.just(3), mask=st.sampled_from(["none", "dense"]), bias=st.just("none"), rate=st.just(0.0)
    )
)
def test_permuting_heads_permutes_their_gradients(engine, problem):
    params, *arrays = problem.inputs("float64")
    static, (dy, *_) = problem.static(), problem.cotangents("float64")
    y, cache = mha(params, *arrays, **static, engine=engine)
    dparams, *dinputs = mha_vjp(cache, dy)
    order = [2, 0, 1]

    def permuted(t):
        out = t["out_proj"] | {"w": t["out_proj"]["w"][:, order]}
        return t | {"q_proj": tree.map(lambda a: a[order], t["q_proj"]), "out_proj": out}

    y2, cache2 = mha(permuted(params), *arrays, **static, engine=engine)
    dparams2, *dinputs2 = mha_vjp(cache2, dy)
    scale = 1 + np.abs(y).max(initial=0)
    close(y2 / scale, y / scale)
    tree.map(
        lambda a, b: close(a / (1 + np.abs(b).max(initial=0)), b / (1 + np.abs(b).max(initial=0))),
        dparams2,
        permuted(dparams),
    )
    close(dinputs2[0], dinputs[0])


@given(mha_problems(**FAIR, batch=st.just((3,)), bias=st.just("none"), mask=st.just("dense"), rate=st.just(0.0)))
def test_a_batch_of_mha_equals_its_samples(engine, problem):
    params, query, key, value, _ = problem.inputs("float64")
    mask, zero = problem.static()["mask"], problem.zero_attn
    dy, *_ = problem.cotangents("float64")
    y, cache = mha(params, query, key, value, mask=mask, zero_attn=zero, engine=engine)
    dparams, *dinputs = mha_vjp(cache, dy)
    parts = []
    for b in range(3):
        y_b, cache_b = mha(params, query[b], key[b], value[b], mask=mask[b], zero_attn=zero, engine=engine)
        close(y_b, y[b])
        parts.append(mha_vjp(cache_b, dy[b]))
    close(dinputs[0], np.stack([part[1] for part in parts]))
    tree.map(lambda whole, *each: close(whole, sum(each)), dparams, *[part[0] for part in parts])


@given(mha_problems(**FAIR, zero_attn=st.just(True), bias_kv=st.just(False), biases=st.just(False), rate=st.just(0.0)))
def test_zero_attn_is_one_more_key_of_zeros(engine, problem):
    """With no biases, an input of zeros projects to a key and value of zeros."""
    params, query, key, value, _ = problem.inputs("float64")
    dy, dweights, dlse = problem.cotangents("float64")
    mask = masks.dense(problem.static()["mask"], problem.T, problem.S, query)
    y, cache = mha(params, query, key, value, mask=mask, zero_attn=True, engine=engine)
    padded = [np.concatenate([a, np.zeros_like(a, shape=(*problem.batch, 1, a.shape[-1]))], -2) for a in (key, value)]
    if mask is not None:
        mask = np.broadcast_to(mask, (*mask.shape[:-1], problem.S))
        mask = np.concatenate([mask, np.ones((*mask.shape[:-1], 1), bool)], -1)
    y2, cache2 = mha(params, query, *padded, mask=mask, engine=engine)
    close(y2, y)
    close(attention_weights(cache2), attention_weights(cache))
    got, want = (mha_vjp(c, dy, dweights=dweights, dlse=dlse) for c in (cache2, cache))
    tree.map(close, got[0], want[0])
    close(got[2][..., : problem.S, :], want[2])


@pytest.mark.parametrize("need", ["weights asked for", "not asked for"])
def test_an_empty_row_gives_the_output_bias_and_finite_gradients(engine, need):
    """PyTorch gives NaN or the bias, depending on whether weights are asked for."""
    params, x, *_ = MhaProblem(Ck=17, Cv=17, S=5).inputs("float64")
    mask = np.ones((2, 1, 5, 5), bool)
    mask[0, :, 3] = False
    y, cache = self_attention(params, x, mask=mask, engine=engine)
    if need == "weights asked for":
        assert not attention_weights(cache)[0, :, 3].any()
    assert np.array_equal(y[0, 3], params["out_proj"]["b"])
    dparams, dx, _ = self_attention_vjp(cache, y)
    assert all(np.isfinite(a).all() for a in [dx, *tree.flatten(dparams).values()])
