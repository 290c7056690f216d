"""The ops and their gradients against torch's autograd in float64, and at the edges of their domain."""

import hypothesis.strategies as st
import ml_dtypes
import mpmath
import numpy as np
import oracles
import pytest
import torch
from conftest import BLOCKS
from hypothesis import example, given

from funcmha import (
    attention,
    attention_vjp,
    attention_weights,
    linear,
    linear_vjp,
    log_sum_exp,
    masks,
    softmax,
    softmax_vjp,
)
from funcmha.biases import RelativeBias
from funcmha.dropout import Masked
from funcmha.engines import BATCHED, SEQUENTIAL, TILED, Plan
from funcmha.testing.strategies import MODERN, AttentionProblem, attention_problems

MODERATE = {"gain": st.sampled_from([1e-8, 1e-3, 1.0, 10.0])}  # where 1e-11 is a fair bar
PATHS = {
    "sequential": SEQUENTIAL,
    "batched": BATCHED,
    "blocks": BLOCKS,
    "few queries": TILED._replace(plan=Plan(tile_rows=4, tile_cols=3, whole_scores=0)),
    "tiles": TILED._replace(plan=Plan(tile_rows=4, tile_cols=3, whole_scores=0, few_queries=0)),
}
each_path = pytest.mark.parametrize("engine", PATHS.values(), ids=PATHS)


def portable(engine):
    """The engine, or the default in its place where it takes NumPy arrays alone."""
    return None if engine.numpy_only else engine


def close(got, want, what=""):
    """T3: within 1e-11 of the largest value wanted, or of 1; −∞ where −∞ is wanted, None where None."""
    if got is want is None:
        return
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), what
    size = max(1.0, np.abs(want[finite]).max(initial=0.0))
    assert np.abs(got[finite] - want[finite]).max(initial=0.0) <= 1e-11 * size, what


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(0, 99))
@example([7], 3, 2, True, 0)  # 7 rows are three blocks of 2 and one of 1
def test_linear_matches_torch(batch, n_in, n_out, bias, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((*batch, n_in)), rng.standard_normal((n_out, n_in))
    b = rng.standard_normal(n_out) if bias else None
    dy = rng.standard_normal((*batch, n_out))
    y, cache = linear(x, w, b)
    leaves = [oracles.tensor(a) for a in (x, w, b)]
    want = torch.einsum("...i,oi->...o", leaves[0], leaves[1])
    want = want if b is None else want + leaves[2]
    close(y, want.detach())
    for got, grad in zip(linear_vjp(cache, dy), oracles.gradients([want], [dy], leaves), strict=True):
        assert (got is None) == (grad is None)
        if grad is not None:
            close(got, grad)


@given(attention_problems(**(MODERN | MODERATE)))
@example(AttentionProblem(mask="empty rows", rate=0.3, bias="... H T S"))
@example(AttentionProblem(T=7, S=7))  # where a transpose that is missing changes no shape
@example(AttentionProblem(S=0))
@example(AttentionProblem(T=0, bias="1 T+S-1"))
@example(
    AttentionProblem(T=13, S=17, bias="... H T+S-1", sink=True, softcap=0.5, per_head=True, scale=0.5, mask="causal")
)
@example(AttentionProblem(mask="empty rows", sink=True, rate=0.3, seeded=True))
@example(AttentionProblem(S=0, sink=True, softcap=30.0))
def test_attention_matches_torch(engine, problem):
    arrays, static = problem.inputs("float64"), problem.static()
    do, dweights, dlse = problem.cotangents("float64")
    o, cache = attention(*arrays, **static, engine=engine)
    leaves = [oracles.tensor(a) for a in arrays]
    outputs = oracles.attention(*leaves, **static)
    for what, got, want in zip("opl", (o, attention_weights(cache), log_sum_exp(cache)), outputs, strict=True):
        close(got, want.detach(), what)
    lse = torch.where(torch.isinf(outputs[2]), 0.0, outputs[2])
    wanted = oracles.gradients([outputs[0], outputs[1], lse], [do, dweights, dlse], leaves)
    for what, got, want in zip("qkvbs", attention_vjp(cache, do, dweights=dweights, dlse=dlse), wanted, strict=True):
        got = got.values if isinstance(got, RelativeBias) else got
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want, "d" + what)


@given(
    attention_problems(batch=st.just(()), K=st.just(1), G=st.just(1), mask=st.sampled_from(["none", "causal", "dense"]))
)
def test_attention_without_head_axis_is_one_head(engine, problem):
    q, k, v, *_ = problem.inputs("float64")
    mask = masks.dense(problem.static()["mask"], problem.T, problem.S, q)
    mask = mask if mask is None or mask.ndim < 3 else mask[0]
    do, *_ = problem.cotangents("float64")
    o, cache = attention(q[0], k[0], v[0], mask=mask, engine=engine)
    o_head, cache_head = attention(q, k, v, mask=mask, engine=engine)
    assert np.array_equal(o, o_head[0])
    for got, want in zip(attention_vjp(cache, do[0])[:3], attention_vjp(cache_head, do)[:3], strict=True):
        assert np.array_equal(got, want[0])


def test_every_array_library_gives_the_same(engine, xp):
    problem = AttentionProblem(mask="intersection", bias="... H 1 S", rate=0.3, sink=True, softcap=0.5, per_head=True)
    arrays, static = problem.inputs("float64"), problem.static()
    cotangents = problem.cotangents("float64")
    o, cache = attention(*arrays, **static, engine=engine)
    do, dweights, dlse = cotangents
    want = (o, attention_weights(cache), log_sum_exp(cache), *attention_vjp(cache, do, dweights=dweights, dlse=dlse))

    static["dropout"] = oracles.on_keep(xp.to, static["dropout"])
    o, cache = attention(*map(xp.to, arrays), **static, engine=portable(engine))
    do, dweights, dlse = map(xp.to, cotangents)
    got = (o, attention_weights(cache), log_sum_exp(cache), *attention_vjp(cache, do, dweights=dweights, dlse=dlse))
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


# ── softmax ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("spread", "offset"), [(10, 100), (30, 0), (30, 100), (100, 1)])
def test_softmax_gradient_keeps_its_digits_in_saturated_rows(spread, offset):
    """dx = p (dp − Σ p dp) cancels where p is almost 1: uncentred, not one digit is left at spread 30."""
    rng = np.random.default_rng(7)
    x, dp = spread * rng.standard_normal((5, 7)), offset + rng.standard_normal((5, 7))
    _, cache = softmax(x)
    (dx,) = softmax_vjp(cache, dp)
    with mpmath.workdps(400):
        for row, ct, got in zip(x, dp, dx, strict=True):
            e = [mpmath.exp(mpmath.mpf(float(z))) for z in row]
            weights = [z / sum(e) for z in e]
            mean = sum(w * mpmath.mpf(float(c)) for w, c in zip(weights, ct, strict=True))
            for w, c, g in zip(weights, ct, got, strict=True):
                want = w * (mpmath.mpf(float(c)) - mean)
                # The exponential of x − max carries |x − max| roundings of its argument, so it loses that many ulps.
                assert abs(want - float(g)) <= 1e-13 * (1 + spread) * abs(want)


def test_softmax_keeps_gradients_less_than_an_ulp_apart():
    p, cache = softmax(np.array([0.0, -37.0]))  # p[1] is 8.5e-17, below the spacing of numbers around p[0]
    (dx,) = softmax_vjp(cache, np.array([1.0, 0.0]))
    assert dx[0] == pytest.approx(p[1], rel=1e-15)
    assert dx[1] == pytest.approx(-p[1], rel=1e-15)


def test_softmax_ignores_what_is_not_allowed():
    x = np.array([[1.0, 2.0, np.nan], [np.inf, 2.0, 3.0], [np.nan, np.inf, -np.inf]])
    allowed = np.array([[True, True, False], [False, True, True], [False, False, False]])
    p, cache = softmax(x, where=allowed)
    (dx,) = softmax_vjp(cache, np.where(allowed, 1.5, np.nan))
    want, _ = softmax(np.array([[1.0, 2.0], [2.0, 3.0]]))
    assert np.array_equal(p[0, :2], want[0])
    assert np.array_equal(p[1, 1:], want[1])
    assert not p[~allowed].any()
    assert not dx[~allowed].any()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("shift", [-1e5, 0.0, 700.0, 1e5, 1e300])
def test_softmax_neither_overflows_nor_underflows(shift):
    p, _ = softmax(np.full((3, 5), shift))
    assert np.array_equal(p, np.full((3, 5), 0.2))


def test_softmax_of_a_number_far_above_the_others_is_one():
    p, _ = softmax(np.array([[0.0, 1e5, -1e5], [1e300, 0.0, -1e300], [-1e5, -1e5, -2e5]]))
    assert np.array_equal(p, [[0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]])


# ── attention at its edges ───────────────────────────────────────────────────────────────────────────────────────


def run(engine, problem, mask, *, value=np.nan):
    """Everything that attention computes with `value` in the keys and values that `mask` (S,) keeps out."""
    q, k, v, *_ = problem.inputs("float64")
    k, v = (np.where(mask[:, None], x, value) for x in (k, v))
    do, dweights, dlse = problem.cotangents("float64")
    o, cache = attention(q, k, v, mask=np.broadcast_to(mask, (problem.T, problem.S)), engine=engine)
    return o, attention_weights(cache), log_sum_exp(cache), *attention_vjp(cache, do, dweights=dweights, dlse=dlse)[:3]


@pytest.mark.parametrize("garbage", [1e30, -np.inf, np.inf, np.nan])
@pytest.mark.parametrize("G", [1, 3])
def test_an_unattended_key_has_no_effect(engine, garbage, G):
    problem, mask = AttentionProblem(G=G), np.array([True, False, True, True, False, False, True])
    for a, b in zip(run(engine, problem, mask, value=garbage), run(engine, problem, mask, value=0.5), strict=True):
        assert np.array_equal(a, b)


def test_nan_in_a_key_of_another_group_stays_there(engine):
    q, k, v, *_ = AttentionProblem().inputs("float64")
    mask = np.ones((2, 6, 5, 7), bool)
    mask[:, :3, :, 4] = False  # the first group may not attend key 4
    v = v.copy()
    v[:, 0, 4] = np.nan
    o, _ = attention(q, k, v, mask=mask, engine=engine)
    assert np.isfinite(o).all()


def test_a_key_that_one_head_of_a_group_attends_is_there(engine):
    q, k, v, *_ = AttentionProblem().inputs("float64")
    mask = np.ones((1, 6, 1, 7), bool)
    mask[:, 0, :, 4] = False  # of the three heads of the first group, two may attend key 4
    close(attention(q, k, v, mask=mask, engine=engine)[0][:, 1:], attention(q, k, v, engine=engine)[0][:, 1:])


def test_an_empty_row_is_zero_with_zero_gradients(engine):
    q, k, v, *_ = AttentionProblem().inputs("float64")
    mask = np.ones((5, 7), bool)
    mask[2] = False
    o, cache = attention(q, k, v, mask=mask, engine=engine)
    assert not o[..., 2, :].any()
    assert not attention_weights(cache)[..., 2, :].any()
    assert (log_sum_exp(cache)[..., 2] == -np.inf).all()
    do, dweights, dlse = AttentionProblem().cotangents("float64")
    grads = attention_vjp(cache, do, dweights=dweights, dlse=np.where(mask.any(1), dlse, np.nan))
    others = np.where(mask.any(1)[:, None], do, 0)
    assert not grads[0][..., 2, :].any()
    for got, want in zip(
        grads[:3], attention_vjp(cache, others, dweights=dweights, dlse=np.where(mask.any(1), dlse, 0))[:3], strict=True
    ):
        assert np.array_equal(got, want)


def test_minus_infinity_in_the_bias_is_a_mask(engine):
    q, k, v, bias, _ = AttentionProblem(bias="... H T S").inputs("float64")
    mask = AttentionProblem(mask="heads").static()["mask"]
    do, *_ = AttentionProblem().cotangents("float64")
    mask = mask & (np.arange(5) != 2)[:, None]  # and a row of nothing but −∞
    o, cache = attention(q, k, v, bias, mask=mask, engine=engine)
    o_bias, cache_bias = attention(q, k, v, np.where(mask, bias, -np.inf), engine=engine)
    assert not o_bias[..., 2, :].any()
    assert not attention_weights(cache_bias)[~mask].any()
    close(o, o_bias)
    for a, b in zip(attention_vjp(cache, do), attention_vjp(cache_bias, do), strict=True):
        close(a, b)


@pytest.mark.parametrize("gain", [1.0, 15.0, 1e3])  # where the tiled engine shifts no scores, some, and by the maximum
@pytest.mark.parametrize("sink", [False, True])
@each_path
def test_a_bias_of_infinity_makes_its_row_nan_and_no_other(engine, gain, sink):
    """∞ / ∞: the weights of the row are NaN, and never a finite answer."""
    problem = AttentionProblem(bias="... H T S", sink=sink, gain=gain)
    q, k, v, bias, sinks = problem.inputs("float64")
    do, *_ = problem.cotangents("float64")
    lost = np.zeros((2, 6, 5), bool)
    lost[0, 1, 3] = lost[1, 4, 0] = True
    infinite = np.where(lost[..., None] & (np.arange(7) == 2), np.inf, bias)
    with np.errstate(invalid="ignore"):
        o, cache = attention(q, k, v, infinite, sinks, engine=engine)
        dq, dk, dv, dbias, _ = attention_vjp(cache, do)
        got = o, attention_weights(cache), log_sum_exp(cache)[..., None], dq, dbias
    want, clean = attention(q, k, v, bias, sinks, engine=engine)
    dq, _, _, dbias, _ = attention_vjp(clean, do)
    for a, b in zip(got, (want, attention_weights(clean), log_sum_exp(clean)[..., None], dq, dbias), strict=True):
        assert np.isnan(a[lost]).all()
        close(a[~lost], b[~lost])
    for a in (dk, dv):  # to which the lost rows of two heads add
        assert np.isnan(a).all(axis=(-1, -2)).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_masked_bias_of_infinity_has_no_effect(engine, rows):
    q, k, v, bias, sink = AttentionProblem(bias="... H T S", sink=True).inputs("float64")
    do, *_ = AttentionProblem().cotangents("float64")
    mask = masks.causal(-1)  # the first query attends nothing but the sink
    masked = ~mask.dense(5, 7) & (np.arange(5) < rows)[:, None]
    (o, cache), (want, clean) = (
        attention(q, k, v, np.where(masked, x, bias), sink, mask=mask, engine=engine) for x in (np.inf, 0.5)
    )
    close(o, want)
    close(log_sum_exp(cache), log_sum_exp(clean))
    for a, b in zip(attention_vjp(cache, do), attention_vjp(clean, do), strict=True):
        close(a, b)


def test_a_score_that_overflows_makes_its_row_nan(engine):
    q, k = np.full((5, 3), 1.0), np.full((7, 3), 1.0)
    q[1], k[2] = 1e200, 1e200
    with np.errstate(over="ignore", invalid="ignore"):
        o, cache = attention(q, k, np.eye(7), engine=engine)
    assert np.isnan(o[1]).all()
    assert np.isnan(log_sum_exp(cache)[1])
    assert np.isfinite(np.delete(o, 1, axis=0)).all()


def test_minus_infinity_is_a_mask_beside_a_row_of_nan(engine):
    q, k, v, *_ = (np.array(a) for a in AttentionProblem().inputs("float64")[:3])
    q[..., 0, :] = np.nan
    bias = np.zeros((5, 7))
    bias[1] = -np.inf
    o, cache = attention(q, k, v, bias, engine=engine)
    assert np.isnan(o[..., 0, :]).all()
    assert not o[..., 1, :].any()
    assert (log_sum_exp(cache)[..., 1] == -np.inf).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_least_number_in_the_bias_is_a_number(engine, dtype):
    """Many libraries write it for −∞: a row of nothing else is the mean of the values, in torch too."""
    q, k, v, *_ = AttentionProblem(G=1).inputs(dtype)
    bias = np.zeros((5, 7), dtype)
    bias[:, 3:] = np.finfo(dtype).min
    bias[2] = np.finfo(dtype).min
    o, cache = attention(q, k, v, bias, engine=engine)
    do = np.ones_like(o)
    do[..., :2, :] = do[..., 3:, :] = 0
    np.testing.assert_allclose(o[..., 2, :], v.mean(-2), rtol=1e-5)
    assert not attention_weights(cache)[..., [0, 1, 3, 4], 3:].any()
    np.testing.assert_allclose(attention_vjp(cache, do)[2], np.full(v.shape, 1 / 7), rtol=1e-5)


@pytest.mark.parametrize("logit", [-1e5, 1e5, -1e30])
def test_rows_of_large_logits_are_rows_like_others(engine, logit):
    q, k, v = np.ones((1, 3, 1)), np.full((1, 5, 1), logit), np.arange(5.0).reshape(1, 5, 1)
    o, _ = attention(q, k, v, engine=engine)
    np.testing.assert_array_max_ulp(o, np.full((1, 3, 1), 2.0), 2)


def test_scale_zero_is_uniform_and_not_the_default(engine):
    q, k, v, *_ = AttentionProblem(G=1).inputs("float64")
    o, _ = attention(q, k, v, scale=0, engine=engine)
    close(o, np.broadcast_to(v.mean(-2, keepdims=True), o.shape))


def test_a_sink_without_keys_has_all_the_weight(engine):
    q, k, v, _, sink = AttentionProblem(S=0, sink=True).inputs("float64")
    o, cache = attention(q, k, v, None, sink, engine=engine)
    assert not o.any()
    close(log_sum_exp(cache), np.broadcast_to(sink[:, None], o.shape[:-1]))
    assert not attention_vjp(cache, np.ones_like(o))[4].any()
    close(attention_vjp(cache, o, dlse=np.ones(o.shape[:-1]))[4], np.full(6, 2.0 * 5))  # of 2 samples, 5 queries


def test_width_zero_is_uniform(engine):
    o, cache = attention(np.zeros((2, 3, 0)), np.zeros((2, 5, 0)), np.ones((2, 5, 4)), engine=engine)
    close(o, np.ones((2, 3, 4)))
    assert attention_vjp(cache, o)[0].shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_rounded_once(engine, dtype):
    """T4: the float32 result, rounded. A second rounding on the way would show in about every other value."""
    arrays = AttentionProblem(bias="H T S", sink=True, softcap=0.5).inputs(dtype)
    do, *_ = AttentionProblem().cotangents(dtype)
    o, cache = attention(*arrays, engine=engine)
    o_32, cache_32 = attention(*(a.astype(np.float32) for a in arrays), engine=engine)
    assert o.dtype == dtype
    assert np.array_equal(o, o_32.astype(dtype))
    for got, want in zip(attention_vjp(cache, do), attention_vjp(cache_32, do.astype(np.float32)), strict=True):
        assert got.dtype == dtype
        assert np.array_equal(got, want.astype(dtype))


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

Q, K, V = (np.ones(s) for s in ((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 9)))
KEEP = np.ones((5, 7), bool)


@pytest.mark.parametrize(
    ("args", "static", "error", "message"),
    [
        ((Q.tolist(), K, V), {}, TypeError, "q must be an array, got list"),
        ((Q, K.astype(int), V), {}, TypeError, "k must have a dtype of .*, got int64"),
        ((Q, K, V.astype(np.float32)), {}, TypeError, "v must have dtype float64 as q has, got float32"),
        ((Q[0, 0, 0], K, V), {}, ValueError, r"q must be \(T, D\), got \(4,\)"),
        ((Q, K[..., :3], V), {}, ValueError, r"k must be \(..., K, S, D\) with ...=\(2,\) as in q, D=4 as in q, got"),
        ((Q, K, V[:, :, :6]), {}, ValueError, r"v must be .* S=7 as in k, got \(2, 3, 6, 9\)"),
        ((Q, K[:1], V[:1]), {}, ValueError, r"k must be .* ...=\(2,\) as in q.*, got \(1, 3, 7, 4\)"),
        (
            (Q, K, V[:1]),
            {},
            ValueError,
            r"v must be .* ...=\(2,\) as in q, K=3 as in k, S=7 as in k, got \(1, 3, 7, 9\)",
        ),
        ((Q, K, V, np.ones((1, 2, 6, 5, 7))), {}, ValueError, r"bias must broadcast to .*, got \(1, 2, 6, 5, 7\)"),
        ((Q, K[:, :, None], V), {}, ValueError, "k must be"),
        ((Q[:, :5], K, V), {}, ValueError, "q has H=5 heads, which must be a multiple of K=3 as in k"),
        ((Q, K[:, :0], V[:, :0]), {}, ValueError, "q has H=6 heads, which must be a multiple of K=0"),
        (
            (Q, K, V, np.ones((6, 5, 6))),
            {},
            ValueError,
            r"bias must broadcast to \(..., H, T, S\) = \(2, 6, 5, 7\), got",
        ),
        (
            (Q, K, V),
            {"mask": np.ones((5, 7), int)},
            TypeError,
            "mask must be boolean, True = attend .*, got dtype int64",
        ),
        ((Q, K, V), {"mask": np.zeros((5, 7))}, TypeError, "mask must be boolean, .* is a bias.*, got dtype float64"),
        ((Q, K, V), {"mask": [[True]]}, TypeError, "mask must be a boolean array, .*, got list"),
        (
            (Q, K, V),
            {"mask": np.ones((7, 5), bool)},
            ValueError,
            r"mask must broadcast to .* = \(2, 6, 5, 7\), got \(7, 5\)",
        ),
        ((Q, K, V), {"mask": np.ones((2, 5, 7), bool)}, ValueError, r"mask must broadcast to .*, got \(2, 5, 7\)"),
        ((Q, K, V), {"mask": masks.lengths(np.array([1, 2, 3]))}, ValueError, "mask"),
        ((Q, K, V), {"dropout": Masked(np.ones((5, 7)), 0.5)}, TypeError, "dropout.keep must be boolean, True = keep"),
        ((Q, K, V), {"dropout": Masked(KEEP[:, :6], 0.5)}, ValueError, "dropout.keep must broadcast to"),
        (
            (Q, K, V),
            {"dropout": 0.5},
            TypeError,
            r"dropout must be dropout.masked\(keep, rate\), .*, got builtins.float",
        ),
        (
            (Q, K, V),
            {"dropout": KEEP},
            TypeError,
            r"dropout must be dropout.masked\(keep, rate\), .*, got numpy.ndarray",
        ),
        ((Q, K, V), {"dropout": Masked(KEEP, 1.0)}, ValueError, "dropout.rate must be at least 0 and below 1, got 1.0"),
        ((Q, K, V), {"dropout": Masked(KEEP, -0.1)}, ValueError, "dropout.rate must be at least 0"),
        ((Q, K, V), {"scale": np.nan}, ValueError, "scale must be finite, got nan"),
        ((Q, K, V), {"scale": "1"}, TypeError, "scale must be a real number, got '1' of type str"),
        ((Q, K, V), {"scale": True}, TypeError, "scale must be a real number, got True"),
    ],
)
def test_attention_refuses(engine, args, static, error, message):
    with pytest.raises(error, match=message):
        attention(*args, **static, engine=engine)


def test_vjps_refuse_cotangents_that_are_not_of_the_output(engine):
    o, cache = attention(Q, K, V, engine=engine)
    with pytest.raises(
        ValueError, match=r"do must be \(..., H, T, E\) = \(2, 6, 5, 9\) as the output is, got \(2, 6, 5, 8\)"
    ):
        attention_vjp(cache, o[..., :8])
    with pytest.raises(TypeError, match="do must have dtype float64 as the output has, got float32"):
        attention_vjp(cache, o.astype(np.float32))
    with pytest.raises(ValueError, match="dweights must be"):
        attention_vjp(cache, o, dweights=o)
    with pytest.raises(ValueError, match="dlse must be"):
        attention_vjp(cache, o, dlse=o)
    with pytest.raises(TypeError, match="do must be an array, got NoneType"):
        attention_vjp(cache, None)
    with pytest.raises(TypeError, match="cache must come from an attention of funcmha, got tuple"):
        attention_weights(())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.ones(()), np.ones((2, 3))), r"x must be \(..., I\), got \(\)"),
        ((np.ones((4, 3)), np.ones((2, 4))), r"w must be \(O, I\) with I=3 as in x, got \(2, 4\)"),
        ((np.ones((4, 3)), np.ones((1, 2, 3))), r"w must be \(O, I\) with I=3 as in x, got \(1, 2, 3\)"),
        ((np.ones((4, 3)), np.ones((2, 3)), np.ones(3)), r"b must be \(O\) with O=2 as in w, got \(3,\)"),
    ],
)
def test_linear_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        linear(*args)


def test_softmax_refuses():
    with pytest.raises(TypeError, match="where must be boolean, True = allowed, got dtype int64"):
        softmax(np.ones(3), where=np.ones(3, int))
    with pytest.raises(ValueError, match="where must broadcast to"):
        softmax(np.ones((2, 3)), where=np.ones(2, bool))
