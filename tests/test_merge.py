"""Merging: equal to attention over all keys, outputs and gradients, whatever the split; and its algebra."""

from functools import reduce
from itertools import pairwise

import hypothesis.strategies as st
import ml_dtypes
import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given

from funcmha import attention, attention_vjp, log_sum_exp, masks
from funcmha.merge import merge, merge_vjp
from funcmha.testing import check_vjp
from funcmha.testing.strategies import AttentionProblem, attention_problems

INF = float("inf")
BATCH, T, E = (2, 3), 5, 7


def close(got, want, what="", bar=1e-11):
    """Within 1e-11 of the largest value wanted, or of 1; −∞ where −∞ is wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), what
    size = max(1.0, np.abs(want[finite]).max(initial=0.0))
    assert np.abs(got[finite] - want[finite]).max(initial=0.0) <= bar * size, what


def same(got, want):
    """The same bits."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def frozen(a):
    a.flags.writeable = False
    return a


def parts(n, seed=0, empty=0.0, spread=3.0):
    """n parts (o (*BATCH, T, E), lse (*BATCH, T)), a share of whose rows is empty."""
    rng = np.random.default_rng([7, seed])
    made = []
    for _ in range(n):
        gone = rng.random((*BATCH, T)) < empty
        o, lse = rng.standard_normal((*BATCH, T, E)), spread * rng.standard_normal((*BATCH, T))
        made.append((frozen(np.where(gone[..., None], 0.0, o)), frozen(np.where(gone, -INF, lse))))
    return made


def cotangents(seed=0, dtype="float64"):
    rng = np.random.default_rng([8, seed])
    return rng.standard_normal((*BATCH, T, E)).astype(dtype), rng.standard_normal((*BATCH, T)).astype(dtype)


def joined(a, b):
    """(o, lse) of two parts."""
    o, cache = merge(*a, *b)
    return o, log_sum_exp(cache)


# ── attention over parts of the keys ─────────────────────────────────────────────────────────────────────────────


def keys(x, a, b, S):
    """x with the keys a … b alone, where it has all of them."""
    return x if x is None or x.shape[-1] != S else x[..., a:b]


@given(
    attention_problems(gain=st.sampled_from([1e-3, 1.0, 10.0])).flatmap(
        lambda p: st.tuples(st.just(p), st.integers(0, p.S), st.integers(0, p.S))
    )
)
@example((AttentionProblem(mask="empty rows", bias="... H T S"), 3, 5))
@example((AttentionProblem(mask="causal", T=7, S=5, batch=()), 4, 4))
@example((AttentionProblem(mask="heads", rate=0.3), 0, 7))
def test_merged_parts_are_attention_over_all_keys(problem_and_ends):
    problem, *inner = problem_and_ends
    (q, k, v, bias, _), static = problem.inputs("float64"), problem.static()
    do, _, dlse = problem.cotangents("float64")
    S, mask, dropout = problem.S, static.pop("mask"), static.pop("dropout")
    scores = (*q.shape[:-1], S)
    mask = None if mask is None else np.broadcast_to(masks.dense(mask, problem.T, S, q), scores)
    bias = None if bias is None else np.broadcast_to(bias, scores)

    # three parts, the first two merged first
    ends = [0, *sorted(inner), S]
    spans = pairwise(ends)
    runs = [
        attention(
            *(q, k[..., a:b, :], v[..., a:b, :], None if bias is None else bias[..., a:b]),
            mask=None if mask is None else mask[..., a:b],
            dropout=oracles.on_keep(lambda keep, a=a, b=b: keep[..., a:b], dropout),
            **static,
        )
        for a, b in spans
    ]
    (o1, c1), (o2, c2), (o3, c3) = runs
    o12, c12 = merge(o1, log_sum_exp(c1), o2, log_sum_exp(c2))
    o, cache = merge(o12, log_sum_exp(c12), o3, log_sum_exp(c3))
    do12, dlse12, do3, dlse3 = merge_vjp(cache, do, dlse=dlse)
    do1, dlse1, do2, dlse2 = merge_vjp(c12, do12, dlse=dlse12)
    grads = [attention_vjp(c, d, dlse=dl) for c, d, dl in ((c1, do1, dlse1), (c2, do2, dlse2), (c3, do3, dlse3))]
    dqs, dks, dvs, dbiases, _ = zip(*grads, strict=True)

    leaves = [oracles.tensor(a) for a in (q, k, v, bias)]
    want_o, _, want_lse = oracles.attention(*leaves, mask=mask, dropout=dropout, **static)
    close(o, want_o.detach(), "o")
    close(log_sum_exp(cache), want_lse.detach(), "lse")
    want = oracles.gradients([want_o, torch.where(torch.isinf(want_lse), 0.0, want_lse)], [do, dlse], leaves)
    got = (sum(dqs), np.concatenate(dks, axis=-2), np.concatenate(dvs, axis=-2))
    for what, a, b in zip("qkv", got, want, strict=False):
        close(a, b, "d" + what)
    if bias is not None:
        close(np.concatenate(dbiases, axis=-1), want[3], "dbias")


# ── against other derivations ────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 99), st.sampled_from([0.1, 3.0, 30.0]), st.booleans())
def test_merge_is_the_formula_differentiated_by_torch(seed, spread, with_dlse):
    (o1, l1), (o2, l2) = parts(2, seed, spread=spread)
    do, dlse = cotangents(seed)
    o, cache = merge(o1, l1, o2, l2)
    leaves = [oracles.tensor(a) for a in (o1, l1, o2, l2)]
    lse = torch.logaddexp(leaves[1], leaves[3])
    want = (leaves[1] - lse).exp()[..., None] * leaves[0] + (leaves[3] - lse).exp()[..., None] * leaves[2]
    close(o, want.detach())
    close(log_sum_exp(cache), lse.detach())
    wanted = oracles.gradients([want, lse], [do, dlse if with_dlse else 0 * dlse], leaves)
    for got, grad in zip(merge_vjp(cache, do, dlse=dlse if with_dlse else None), wanted, strict=True):
        close(got, grad)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_pair_keeps_the_protocol(dtype):
    (o1, l1), (o2, l2) = parts(2, empty=0.2)
    inputs = tuple(a.astype(dtype) for a in (o1, np.maximum(l1, -9.0), o2, np.maximum(l2, -9.0)))
    check_vjp(merge, merge_vjp, inputs)


def test_every_array_library_gives_the_same(xp):
    inputs = [a for part in parts(2, empty=0.3) for a in part]
    do, dlse = cotangents()
    o, cache = merge(*inputs)
    want = (o, log_sum_exp(cache), *merge_vjp(cache, do, dlse=dlse))
    o, cache = merge(*map(xp.to, inputs))
    got = (o, log_sum_exp(cache), *merge_vjp(cache, xp.to(do), dlse=xp.to(dlse)))
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b)


# ── algebra ──────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_merge_commutes_to_the_bit(seed, empty):
    a, b = parts(2, seed, empty)
    do, dlse = cotangents(seed)
    same(joined(a, b), joined(b, a))
    da, dla, db, dlb = merge_vjp(merge(*a, *b)[1], do, dlse=dlse)
    same(merge_vjp(merge(*b, *a)[1], do, dlse=dlse), (db, dlb, da, dla))


@given(st.integers(0, 99), st.sampled_from([0.0, 0.3]), st.permutations(range(5)))
def test_parts_join_in_any_order_and_grouping(seed, empty, order):
    made = parts(5, seed, empty)
    left = reduce(joined, made)
    a, b, c, d, e = (made[i] for i in order)
    right = joined(joined(a, b), joined(c, joined(d, e)))
    for got, want in zip(right, left, strict=True):
        close(got, want, bar=1e-14)


@given(st.integers(0, 99), st.booleans())
def test_an_empty_part_is_neutral_to_the_bit(seed, first):
    (o, lse), *_ = parts(1, seed, 0.3)
    do, dlse = cotangents(seed)
    nothing = (np.full_like(o, np.nan), np.full_like(lse, -INF))
    pair = (nothing, (o, lse)) if first else ((o, lse), nothing)
    same(joined(*pair), (o, lse))
    grads = merge_vjp(merge(*pair[0], *pair[1])[1], do, dlse=dlse)
    of_part, of_nothing = (grads[2:], grads[:2]) if first else (grads[:2], grads[2:])
    some = np.isfinite(lse)
    same(of_part, (np.where(some[..., None], do, 0.0), np.where(some, dlse, 0.0)))
    assert not any(g.any() for g in of_nothing)


def test_two_empty_parts_are_an_empty_row_without_gradient():
    nothing = (np.full((*BATCH, T, E), np.nan), np.full((*BATCH, T), -INF))
    with np.errstate(all="raise"):
        o, cache = merge(*nothing, *nothing)
        grads = merge_vjp(cache, np.full_like(o, np.nan), dlse=np.full((*BATCH, T), np.nan))
    assert not o.any()
    assert (log_sum_exp(cache) == -INF).all()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("shift", [-1e5, 700.0, 1e5, 2.0**60])
def test_a_shift_of_both_moves_lse_alone(shift):
    o1, o2 = np.full((3, 2), 4.0), np.full((3, 2), 8.0)
    l1, l2 = np.zeros(3), np.full(3, 1.0)
    o, cache = merge(o1, l1 + shift, o2, l1 + shift)
    same((o, log_sum_exp(cache)), (np.full((3, 2), 6.0), shift + np.full(3, np.log(2))))
    if abs(shift) < 2**50:  # else a difference of 1 is lost in lse itself
        close(merge(o1, l1 + shift, o2, l2 + shift)[0], merge(o1, l1, o2, l2)[0])


@pytest.mark.parametrize("gap", [800.0, 1e5, 1e300])
def test_a_part_far_below_the_other_is_nothing(gap):
    (o1, l1), (o2, _) = parts(2)
    do, dlse = cotangents()
    with np.errstate(all="raise", under="ignore"):
        o, cache = merge(o1, l1, o2, l1 - gap)
        grads = merge_vjp(cache, do, dlse=dlse)
    same((o, log_sum_exp(cache)), (o1, l1))
    same(grads, (do, dlse, np.zeros_like(do), np.zeros_like(dlse)))


@pytest.mark.parametrize("bad", [INF, np.nan])
@pytest.mark.parametrize("other", [0.0, -INF, INF])
def test_an_lse_of_infinity_or_nan_makes_its_row_nan_alone(bad, other):
    """A row that flash-attention calls empty must not take all the weight, and no error may be swallowed."""
    (o1, l1), (o2, l2) = parts(2)
    l1, l2 = l1.copy(), l2.copy()
    want, cache = merge(o1, l1, o2, l2)
    l1[0, 1, 2], l2[0, 1, 2] = bad, other
    with np.errstate(invalid="ignore"):
        for got, got_cache in (merge(o1, l1, o2, l2), merge(o2, l2, o1, l1)):
            lost = np.zeros(l1.shape, bool)
            lost[0, 1, 2] = True
            assert np.isnan(got[lost]).all()
            assert np.isnan(log_sum_exp(got_cache)[lost]).all()
            same((got[~lost], log_sum_exp(got_cache)[~lost]), (want[~lost], log_sum_exp(cache)[~lost]))


def test_nan_of_a_part_that_has_a_share_comes_through():
    (o1, l1), (o2, l2) = parts(2)
    o1 = o1.copy()
    o1[0, 1, 2, 3] = np.nan
    o, _ = merge(o1, np.full_like(l1, -800.0), o2, np.abs(l2))  # though the share underflows
    assert np.isnan(o[0, 1, 2, 3])
    assert np.isnan(o).sum() == 1


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────────────────────


def exact(l1, l2, o1, o2):
    """o, lse and the gradient of o with respect to lse1, in 60 digits."""
    with mpmath.workdps(60):
        l1, l2, o1, o2 = (mpmath.mpf(float(x)) for x in (l1, l2, o1, o2))
        w1, w2 = 1 / (1 + mpmath.exp(l2 - l1)), 1 / (1 + mpmath.exp(l1 - l2))
        return w1 * o1 + w2 * o2, l1 + mpmath.log1p(mpmath.exp(l2 - l1)), w1 * w2 * (o1 - o2)


@pytest.mark.parametrize("gap", [0.0, 1e-8, 1.0, 36.0, 40.0, 200.0, 700.0])
@pytest.mark.parametrize("level", [0.0, 1.0, -50.0])
def test_lse_and_gradients_keep_their_digits_at_any_gap(gap, level):
    """Near lse = 0 a log of 1 + e has no digit left at gap 40, nor has ⟨do, o1⟩ − ⟨do, o⟩."""
    l1, l2, o1, o2 = level, level - gap, 1.5, -0.75
    o, cache = merge(*(np.full(s, x) for x, s in ((o1, (1, 1)), (l1, 1), (o2, (1, 1)), (l2, 1))))
    want_o, want_lse, want_dl1 = exact(l1, l2, o1, o2)
    do1, dl1, do2, dl2 = merge_vjp(cache, np.ones((1, 1)))
    assert float(o[0, 0]) == pytest.approx(float(want_o), rel=1e-15)
    assert float(cache.lse[0]) == pytest.approx(float(want_lse), rel=4e-16 * (1 + gap), abs=0)
    bar = 4e-16 * (2 + gap)  # exp carries the rounding of its argument, and of its own
    assert dl1[0] == pytest.approx(float(want_dl1), rel=bar, abs=0)
    assert dl2[0] == -dl1[0]
    assert do1[0, 0] + do2[0, 0] == pytest.approx(1.0, rel=4e-16)
    assert do2[0, 0] == pytest.approx(float(1 / (1 + mpmath.exp(gap))), rel=bar, abs=0)


@given(st.integers(0, 999), st.sampled_from([0.1, 3.0, 30.0, 1e4]))
def test_float32_is_within_the_bound(seed, spread):
    """With d = lse1 − lse2, rounded once: e^−|d| is off by (|d| + 2) u, a weight by that times the other, and 3 u."""
    u = 2.0**-24
    (o1, l1), (o2, l2) = (tuple(a.astype(np.float32) for a in part) for part in parts(2, seed, spread=spread))
    o, cache = merge(o1, l1, o2, l2)
    exact = [a.astype(np.float64) for a in (o1, l1, o2, l2)]
    want, exact_cache = merge(*exact)
    w1, w2, gap = exact_cache.w1, exact_cache.w2, np.abs(exact[1] - exact[3])
    moved = ((gap + 4) * w1 * w2)[..., None] * np.abs(exact[0] - exact[2])
    size = w1[..., None] * np.abs(exact[0]) + w2[..., None] * np.abs(exact[2])
    assert (np.abs(o - want) <= u * (moved + 6 * size) + 2.0**-126).all()
    lse = log_sum_exp(exact_cache)
    assert (np.abs(log_sum_exp(cache) - lse) <= u * (np.abs(lse) + 6 + gap * np.minimum(w1, w2)) + 2.0**-126).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_rounded_once(dtype):
    """The float32 result, rounded; lse and its gradients stay float32."""
    (o1, l1), (o2, l2) = parts(2, empty=0.2)
    l1, l2 = l1.astype(np.float32), l2.astype(np.float32)
    o1, o2 = o1.astype(dtype), o2.astype(dtype)
    do, dlse = (a.astype(t) for a, t in zip(cotangents(), (dtype, np.float32), strict=True))
    o, cache = merge(o1, l1, o2, l2)
    o_wide, exact_cache = merge(o1.astype(np.float32), l1, o2.astype(np.float32), l2)
    assert {a.dtype for a in cache} == {np.dtype(np.float32)}
    same((o, log_sum_exp(cache)), (o_wide.astype(dtype), log_sum_exp(exact_cache)))
    d1, e1, d2, e2 = merge_vjp(exact_cache, do.astype(np.float32), dlse=dlse)
    same(merge_vjp(cache, do, dlse=dlse), (d1.astype(dtype), e1, d2.astype(dtype), e2))


def test_no_rows_and_no_width_are_fine():
    with np.errstate(all="raise"):
        for shape in [(0, 7), (5, 0), (0, 3, 7)]:
            o, cache = merge(np.ones(shape), np.ones(shape[:-1]), np.ones(shape), np.ones(shape[:-1]))
            assert o.shape == shape
            assert [g.shape for g in merge_vjp(cache, o)] == [shape, shape[:-1], shape, shape[:-1]]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────

O, L = np.ones((2, 5, 7)), np.ones((2, 5))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((O.tolist(), L, O, L), TypeError, "o1 must be an array, got list"),
        ((O, None, O, L), TypeError, "lse1 must be an array, got NoneType"),
        ((O, L, O.astype(np.float32), L), TypeError, "o2 must have dtype float64 as o1 has, got float32"),
        ((O, L, O, L.astype(np.float32)), TypeError, "lse2 must have dtype float64 as lse1 has, got float32"),
        (
            (O.astype(np.float16), L.astype(np.float16), O.astype(np.float16), L.astype(np.float16)),
            TypeError,
            "lse1 must have dtype float32, in which o1 of float16 is computed, got float16",
        ),
        (
            (O.astype(np.float32), L, O.astype(np.float32), L),
            TypeError,
            "lse1 must have dtype float32, in which o1 of float32 is computed, got float64",
        ),
        ((O, O, O, L), ValueError, r"lse1 must be \(..., T\) with ...=\(2,\) as in o1, T=5 as in o1, got \(2, 5, 7\)"),
        ((O, L, O[:1], L), ValueError, r"o2 must be \(..., T, E\) with ...=\(2,\) as in o1, .*, got \(1, 5, 7\)"),
        ((O, L, O[..., :3], L), ValueError, r"o2 must be .* E=7 as in o1, got \(2, 5, 3\)"),
        ((O, L, O, L[:, :4]), ValueError, r"lse2 must be .*T=5 as in o1, got \(2, 4\)"),
        ((O, L[..., :1], O, L), ValueError, r"lse1 must be .*, got \(2, 1\)"),
    ],
)
def test_merge_refuses(args, error, message):
    with pytest.raises(error, match=message):
        merge(*args)


def test_the_vjp_refuses_cotangents_that_are_not_of_the_outputs():
    _, cache = merge(O, L, O, L)
    with pytest.raises(ValueError, match=r"do must be \(..., T, E\) = \(2, 5, 7\) as the output is, got \(2, 5\)"):
        merge_vjp(cache, L)
    with pytest.raises(ValueError, match=r"dlse must be \(..., T\) = \(2, 5\) as the output is, got \(2, 5, 7\)"):
        merge_vjp(cache, O, dlse=O)
    with pytest.raises(TypeError, match="dlse must have dtype float64 as the output has, got float32"):
        merge_vjp(cache, O, dlse=L.astype(np.float32))
