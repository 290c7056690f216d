"""Relative biases against loops over i and j, their gradients against torch's, buckets against exact fractions."""

import math
from fractions import Fraction
from itertools import product

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given

from funcmha.biases import (
    AlibiCache,
    LookupCache,
    RelativeBias,
    alibi,
    alibi_slopes,
    alibi_vjp,
    clipped,
    dense,
    diagonal_sums,
    diagonals,
    distances,
    lookup,
    lookup_vjp,
    t5_buckets,
    toeplitz,
)
from funcmha.testing import check_vjp

U32 = 2.0**-24
SIZES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (5, 7), (7, 5), (11, 11)]
each_size = pytest.mark.parametrize(("T", "S"), SIZES)


def dense_loop(values, T, S):
    """bias[..., i, j] = values[..., j − i + T − 1], one at a time: the oracle of tiles."""
    out = np.empty((*values.shape[:-1], T, S), values.dtype)
    for i in range(T):
        for j in range(S):
            out[..., i, j] = values[..., j - i + T - 1]
    return out


def sums_loop(dz):
    """Its adjoint, one at a time and in float64."""
    *batch, R, N = dz.shape
    out = np.zeros((*batch, max(R + N - 1, 0)), np.result_type(dz.dtype, np.float64))
    for i in range(R):
        for j in range(N):
            out[..., j - i + R - 1] += dz[..., i, j]
    return out


def torch_dense(values, T, S):
    """The bias of a tensor of values, by an index."""
    return values[..., torch.arange(S) - torch.arange(T)[:, None] + T - 1]


@st.composite
def relatives(draw):
    batch = draw(st.lists(st.integers(0, 3), max_size=2))
    T, S = draw(st.integers(0, 13)), draw(st.integers(0, 13))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return RelativeBias(rng.standard_normal((*batch, max(T + S - 1, 0)))), T, S


# ── tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(relatives())
def test_dense_is_the_loop(problem):
    relative, T, S = problem
    assert np.array_equal(dense(relative, T, S), dense_loop(relative.values, T, S))


@each_size
def test_a_tile_is_a_part_of_the_whole(T, S):
    """Every tile, and those without rows or columns."""
    values = np.random.default_rng(0).standard_normal((2, max(T + S - 1, 0)))
    whole = dense_loop(values, T, S)
    for i, j, k, l in product(range(T + 1), range(T + 1), range(S + 1), range(S + 1)):
        if i <= j and k <= l:
            assert np.array_equal(toeplitz(values, (i, j), (k, l), T), whole[:, i:j, k:l])


def test_a_tile_is_a_view_that_cannot_be_written_to():
    values = np.arange(2.0 * 11).reshape(2, 11)
    tile = toeplitz(values, (1, 4), (2, 6), 5)
    assert np.shares_memory(tile, values)
    assert not tile.flags.writeable
    assert values.flags.writeable
    values[:] = 0
    assert not tile.any()


def test_tiles_of_strided_and_broadcast_values():
    values = np.random.default_rng(0).standard_normal((11, 3)).T[:, ::-1]
    assert np.array_equal(dense(RelativeBias(values), 5, 7), dense_loop(values, 5, 7))
    spread = np.broadcast_to(values[:1], (4, 11))
    assert np.array_equal(dense(RelativeBias(spread), 5, 7), dense_loop(spread, 5, 7))


@given(relatives())
@example((RelativeBias(np.zeros((2, 401))), 131, 271))
@example((RelativeBias(np.zeros((2, 260))), 257, 4))
def test_diagonal_sums_are_the_adjoint_of_dense(problem):
    relative, T, S = problem
    rng = np.random.default_rng(1)
    values, dz = rng.standard_normal(relative.values.shape), rng.standard_normal((*relative.values.shape[:-1], T, S))
    terms = dz * dense(RelativeBias(values), T, S)
    assert abs(terms.sum() - (diagonal_sums(dz) * values).sum()) <= 1e-13 * max(np.abs(terms).sum(), 1)


@pytest.mark.parametrize("R", [0, 1, 2, 3, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("N", [0, 1, 2, 7, 131])
def test_diagonal_sums_are_the_loop(R, N):
    dz = np.random.default_rng(2).standard_normal((2, R, N))
    got = diagonal_sums(dz)
    np.testing.assert_allclose(got, sums_loop(dz), rtol=0, atol=1e-11)
    dz32 = dz.astype(np.float32)
    bound = 2 * U32 * min(R, N) * sums_loop(np.abs(dz32))
    assert diagonal_sums(dz32).dtype == np.float32
    assert (np.abs(diagonal_sums(dz32) - sums_loop(dz32)) <= bound).all()


def test_diagonal_sums_keep_what_is_not_finite_to_its_diagonal():
    dz = np.random.default_rng(3).standard_normal((131, 7))
    dz[130, 2], dz[3, 5] = np.nan, np.inf
    assert np.array_equal(np.isfinite(diagonal_sums(dz)), np.isfinite(sums_loop(dz)))


@given(relatives(), st.integers(1, 5), st.integers(1, 5))
def test_the_gradient_of_the_whole_is_added_up_from_tiles(problem, height, width):
    relative, T, S = problem
    dz = np.random.default_rng(4).standard_normal((*relative.values.shape[:-1], T, S))
    whole = np.zeros_like(relative.values)
    for i in range(0, T, height):
        for j in range(0, S, width):
            rows, cols = (i, min(i + height, T)), (j, min(j + width, S))
            whole[..., diagonals(rows, cols, T)] += diagonal_sums(dz[..., slice(*rows), slice(*cols)])
    np.testing.assert_allclose(whole, sums_loop(dz), rtol=0, atol=1e-12)


@given(relatives())
def test_dense_and_diagonal_sums_match_torch(problem):
    relative, T, S = problem
    dz = np.random.default_rng(5).standard_normal((*relative.values.shape[:-1], T, S))
    leaf = oracles.tensor(relative.values)
    want = torch_dense(leaf, T, S)
    assert np.array_equal(dense(relative, T, S), want.detach())
    (dvalues,) = oracles.gradients([want], [dz], [leaf])
    np.testing.assert_allclose(diagonal_sums(dz), dvalues, rtol=0, atol=1e-11)


@each_size
def test_tiles_of_every_array_library(xp, T, S):
    values = np.random.default_rng(6).standard_normal((3, max(T + S - 1, 0)))
    dz = np.random.default_rng(7).standard_normal((3, T, S))
    tile, sums = dense(RelativeBias(xp.to(values)), T, S), diagonal_sums(xp.to(dz))
    assert type(tile) is type(sums) is type(xp.to(values))
    assert np.array_equal(xp.back(tile), dense_loop(values, T, S))
    np.testing.assert_allclose(xp.back(sums), sums_loop(dz), rtol=0, atol=1e-13)


def test_torch_and_jax_take_tiles():
    import jax

    values, dz = np.random.default_rng(8).standard_normal(11), np.random.default_rng(9).standard_normal((5, 7))
    assert np.array_equal(toeplitz(torch.tensor(values), (1, 4), (2, 7), 5), dense_loop(values, 5, 7)[1:4, 2:7])
    np.testing.assert_allclose(diagonal_sums(torch.tensor(dz)), sums_loop(dz), rtol=0, atol=1e-13)
    with jax.enable_x64(True):
        pull = jax.jit(jax.grad(lambda v: (dense(RelativeBias(v), 5, 7) * dz).sum()))
        np.testing.assert_allclose(pull(jax.numpy.asarray(values)), sums_loop(dz), rtol=0, atol=1e-13)
        np.testing.assert_allclose(jax.jit(diagonal_sums)(dz), sums_loop(dz), rtol=0, atol=1e-13)
        assert jax.tree.leaves(jax.tree.map(np.asarray, RelativeBias(values)))[0] is not None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sums_of_half_types_are_float32_rounded_once(dtype):
    dz = np.random.default_rng(10).standard_normal((131, 7)).astype(dtype)
    got = diagonal_sums(dz)
    assert got.dtype == dtype
    assert np.array_equal(got, diagonal_sums(dz.astype(np.float32)).astype(dtype))
    assert np.array_equal(dense(RelativeBias(dz[0]), 3, 5), dense_loop(dz[0], 3, 5))


# ── alibi ────────────────────────────────────────────────────────────────────────────────────────────────────────


def alibi_loop(slopes, T, S, offset):
    return np.array([[[-m * abs(j - i - offset) for j in range(S)] for i in range(T)] for m in slopes.tolist()])


def slopes_of_the_paper(n):
    """`get_slopes` of the published code (ofirpress/attention_with_linear_biases), as published."""

    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + slopes_of_the_paper(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("H", [*range(1, 20), 31, 32, 33, 40, 112])
def test_slopes_are_those_of_the_paper(H):
    got = alibi_slopes(H)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, slopes_of_the_paper(H), rtol=1e-13)


def test_slopes_of_eight_heads_are_halves_and_of_none_are_none():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(0).shape == (0,)


@pytest.mark.parametrize("offset", [0, 3, -2, 4096])
@each_size
def test_alibi_and_its_gradient_match_torch(T, S, offset):
    rng = np.random.default_rng(11)
    slopes, dz = rng.standard_normal(3), rng.standard_normal((3, T, S))
    bias, cache = alibi(slopes, T=T, S=S, offset=offset)
    assert bias.values.shape == (3, max(T + S - 1, 0))
    got = dense(bias, T, S)
    np.testing.assert_allclose(got, alibi_loop(slopes, T, S, offset).reshape(3, T, S), rtol=0, atol=1e-11)

    leaf = oracles.tensor(slopes)
    want = -leaf[:, None, None] * (torch.arange(S) - torch.arange(T)[:, None] - offset).abs()
    np.testing.assert_allclose(got, want.detach(), rtol=0, atol=1e-11)
    (dslopes,) = alibi_vjp(cache, RelativeBias(diagonal_sums(dz)))
    np.testing.assert_allclose(dslopes, *oracles.gradients([want], [dz], [leaf]), rtol=1e-13, atol=1e-11)


def test_slopes_of_each_sample_are_those_of_one_after_another():
    rng = np.random.default_rng(12)
    slopes, dvalues = rng.standard_normal((2, 3)), rng.standard_normal((2, 3, 11))
    bias, cache = alibi(slopes, T=5, S=7, offset=2)
    (dslopes,) = alibi_vjp(cache, RelativeBias(dvalues))
    for b in range(2):
        one, of_one = alibi(slopes[b], T=5, S=7, offset=2)
        assert np.array_equal(bias.values[b], one.values)
        np.testing.assert_allclose(dslopes[b], *alibi_vjp(of_one, RelativeBias(dvalues[b])), rtol=0, atol=1e-11)


def test_an_offset_is_a_later_row():
    slopes = alibi_slopes(3)
    whole = dense(alibi(slopes, T=9, S=9)[0], 9, 9)
    assert np.array_equal(dense(alibi(slopes, T=2, S=9, offset=7)[0], 2, 9), whole[:, 7:])


def test_alibi_in_float32_is_off_by_two_roundings():
    slopes = alibi_slopes(7).astype(np.float32)
    for offset in (0, 2**24, 2**31):
        bias, cache = alibi(slopes, T=101, S=103, offset=offset)
        d = np.abs(distances(101, 103, offset)).astype(np.longdouble)
        want = -slopes.astype(np.longdouble)[:, None] * d
        assert bias.values.dtype == cache.distance.dtype == np.float32
        assert (np.abs(bias.values - want) <= (1 if offset == 0 else 2) * 1.01 * U32 * np.abs(want)).all()
        dvalues = np.random.default_rng(12).standard_normal(bias.values.shape).astype(np.float32)
        (dslopes,) = alibi_vjp(cache, RelativeBias(dvalues))
        terms = dvalues.astype(np.longdouble) * d
        bound = U32 * (3 + math.sqrt(203)) * np.abs(terms).sum(axis=1)
        assert (np.abs(dslopes + terms.sum(axis=1)) <= bound).all()


# ── lookup ───────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def tables(draw):
    B, H, L = draw(st.integers(1, 7)), draw(st.integers(0, 3)), draw(st.integers(0, 23))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    index = rng.integers(0, B, L)
    index = np.sort(index) if draw(st.booleans()) else index
    return rng.standard_normal((B, H)), index, rng.standard_normal((H, L))


@given(tables())
@example((np.zeros((0, 2)), np.zeros(0, int), np.zeros((2, 0))))
def test_lookup_and_its_gradient_match_torch(problem):
    table, index, dvalues = problem
    bias, cache = lookup(table, index=index)
    leaf = oracles.tensor(table)
    want = torch.nn.functional.embedding(torch.tensor(index), leaf).T if len(table) else leaf.T[:, :0]
    assert np.array_equal(bias.values, want.detach())
    assert bias.values.flags.c_contiguous
    (dtable,) = lookup_vjp(cache, RelativeBias(dvalues))
    np.testing.assert_allclose(dtable, *oracles.gradients([want], [dvalues], [leaf]), rtol=0, atol=1e-11)


def test_the_gradient_of_a_long_run_loses_few_digits():
    """20,000 equal terms, one after another in float32, would be off by 1e-4 relative."""
    index = np.zeros(20_000, int)
    _, cache = lookup(np.zeros((1, 1), np.float32), index=index)
    third = np.float32(1 / 3)
    (dtable,) = lookup_vjp(cache, RelativeBias(np.full((1, 20_000), third)))
    assert abs(dtable[0, 0] - 20_000 * float(third)) <= 15 * U32 * 20_000 * float(third)


def test_what_is_not_finite_stays_in_its_row():
    index = np.array([0, 2, 2, 0, 4, 1, 2])
    dvalues = np.ones((1, 7))
    dvalues[0, 4], dvalues[0, 1] = np.nan, np.inf
    (dtable,) = lookup_vjp(lookup(np.zeros((6, 1)), index=index)[1], RelativeBias(dvalues))
    assert np.array_equal(dtable[:, 0], [2, 1, np.inf, 0, np.nan, 0], equal_nan=True)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_an_index_of_any_integers(dtype):
    table, index = np.random.default_rng(13).standard_normal((300, 2)), np.array([3, 0, 3, 7])
    want, cache = lookup(table, index=index)
    got, same = lookup(table, index=index.astype(dtype))
    assert np.array_equal(got.values, want.values)
    assert all(np.array_equal(a, b) for a, b in zip(same, cache, strict=True))


# ── what to look up ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offset", [0, 3, -2])
@each_size
def test_distances_are_key_minus_query(T, S, offset):
    got = distances(T, S, offset)
    assert got.dtype == np.int64
    assert got.shape == (max(T + S - 1, 0),)
    want = [[j - (i + offset) for j in range(S)] for i in range(T)]
    assert dense_loop(got, T, S).tolist() == want


def test_clipped_are_the_rows_of_shaw():
    assert clipped(np.arange(-5, 6), 3).tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert clipped(np.arange(-5, 6, dtype=np.int8), 300).tolist() == list(range(295, 306))
    assert clipped(np.arange(-2, 3), 0).tolist() == [0] * 5


def t5_loop(d, bidirectional, num_buckets, max_distance):
    """The formula of Raffel et al. for one distance, by comparing fractions."""
    bucket, n = 0, num_buckets
    if bidirectional:
        n //= 2
        bucket = n if d > 0 else 0
        d = abs(d)
    else:
        d = max(-d, 0)
    m = n // 2
    if d < m:
        return bucket + d
    k = 0  # the greatest with log(d / m) / log(max / m) ≥ k / (n − m)
    while k < n - 1 - m and Fraction(d, m) ** (n - m) >= Fraction(max_distance, m) ** (k + 1):
        k += 1
    return bucket + m + k


def t5_of_transformers(relative_position, bidirectional, num_buckets, max_distance):
    """`_relative_position_bucket` of `T5Attention` in `transformers`, as published: logarithms in float32."""
    relative_buckets = 0
    if bidirectional:
        num_buckets //= 2
        relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
        relative_position = torch.abs(relative_position)
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = num_buckets // 2
    is_small = relative_position < max_exact
    relative_position_if_large = max_exact + (
        torch.log(relative_position.float() / max_exact)
        / math.log(max_distance / max_exact)
        * (num_buckets - max_exact)
    ).to(torch.long)
    relative_position_if_large = torch.min(
        relative_position_if_large, torch.full_like(relative_position_if_large, num_buckets - 1)
    )
    return relative_buckets + torch.where(is_small, relative_position, relative_position_if_large)


T5 = [(32, 128), (32, 129), (16, 64), (64, 1000), (33, 128), (40, 40), (128, 4096)]  # buckets, max distance


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [*T5, (4, 7), (5, 3), (9, 5)])
def test_t5_buckets_are_the_formula(bidirectional, buckets, furthest):
    d = np.arange(-1500, 1501)
    got = t5_buckets(d, bidirectional=bidirectional, num_buckets=buckets, max_distance=furthest)
    assert got.dtype == np.int64
    assert got.tolist() == [t5_loop(int(x), bidirectional, buckets, furthest) for x in d]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), T5)
def test_t5_buckets_are_those_of_transformers(bidirectional, buckets, furthest):
    d = np.arange(-9001, 9002)
    got = t5_buckets(d, bidirectional=bidirectional, num_buckets=buckets, max_distance=furthest)
    assert np.array_equal(got, t5_of_transformers(torch.tensor(d), bidirectional, buckets, furthest))


def test_the_defaults_of_t5():
    d = np.arange(-300, 300)
    assert np.array_equal(
        t5_buckets(d, bidirectional=True), t5_buckets(d, bidirectional=True, num_buckets=32, max_distance=128)
    )


def test_a_distance_just_below_its_bound_stays_below():
    """(796 / 41)^42 < (1000 / 41)^39, by less than the logarithms of float32 can tell."""
    assert Fraction(796, 41) ** 42 < Fraction(1000, 41) ** 39 < Fraction(797, 41) ** 42
    got = t5_buckets(-np.array([795, 796, 797]), bidirectional=False, num_buckets=83, max_distance=1000)
    assert got.tolist() == [79, 79, 80]


def test_powers_are_at_the_bound_in_exact_arithmetic():
    """max / m = 16 and n − m = 8: every other bound is a power of two times m."""
    d = -np.array([7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 10**9])
    got = t5_buckets(d, bidirectional=False, num_buckets=16, max_distance=128)
    assert got.tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15]


def test_bounds_of_distances_beyond_float64():
    d = -np.array([0, 2, 2**20, 2**40 - 1, 2**40, 2**60 - 1, 2**60])
    got = t5_buckets(d, bidirectional=False, num_buckets=4, max_distance=2**61)
    assert got.tolist() == [t5_loop(int(x), False, 4, 2**61) for x in d]


# ── both ops ─────────────────────────────────────────────────────────────────────────────────────────────────────

INDEX = clipped(distances(3, 5), 2)
OPS = {
    "alibi": (alibi, alibi_vjp, (5,), {"T": 3, "S": 5, "offset": 1}),
    "lookup": (lookup, lookup_vjp, (6, 3), {"index": INDEX}),
}
each_op = pytest.mark.parametrize(("f", "f_vjp", "shape", "static"), OPS.values(), ids=OPS)


@each_op
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ops_keep_the_protocol(f, f_vjp, shape, static, dtype):
    def on_values(x, /, **static):
        bias, cache = f(x, **static)
        assert isinstance(bias, RelativeBias)
        return bias.values, cache

    x = np.random.default_rng(14).standard_normal(shape).astype(dtype)
    check_vjp(on_values, lambda cache, dy: f_vjp(cache, RelativeBias(dy)), (x,), static)


@each_op
def test_ops_of_every_array_library(xp, f, f_vjp, shape, static):
    x = np.random.default_rng(15).standard_normal(shape)
    bias, cache = f(x, **static)
    dvalues = np.random.default_rng(16).standard_normal(bias.values.shape)
    got, cache_got = f(xp.to(x), **static)
    (dx,) = f_vjp(cache_got, RelativeBias(xp.to(dvalues)))
    assert type(got.values) is type(dx) is type(xp.to(x))
    np.testing.assert_allclose(xp.back(got.values), bias.values, rtol=0, atol=1e-14)
    np.testing.assert_allclose(xp.back(dx), f_vjp(cache, RelativeBias(dvalues))[0], rtol=0, atol=1e-13)


@each_op
def test_ops_of_torch_and_jax(f, f_vjp, shape, static):
    import jax

    x = np.random.default_rng(17).standard_normal(shape)
    bias, cache = f(x, **static)
    dvalues = np.random.default_rng(18).standard_normal(bias.values.shape)
    (want,) = f_vjp(cache, RelativeBias(dvalues))
    got, cache_got = f(torch.tensor(x), **static)
    np.testing.assert_allclose(got.values, bias.values, rtol=0, atol=1e-14)
    np.testing.assert_allclose(f_vjp(cache_got, RelativeBias(torch.tensor(dvalues)))[0], want, rtol=0, atol=1e-13)
    with jax.enable_x64(True):
        ours = jax.custom_vjp(lambda x: f(x, **static)[0])
        ours.defvjp(lambda x: f(x, **static), f_vjp)
        pull = jax.jit(jax.grad(lambda x: (ours(x).values * dvalues).sum()))
        np.testing.assert_allclose(pull(jax.numpy.asarray(x)), want, rtol=0, atol=1e-13)


@each_op
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_float32_rounded_once(f, f_vjp, shape, static, dtype):
    static = static | ({"offset": 4099} if f is alibi else {})  # which no half type holds
    x = np.random.default_rng(19).standard_normal(shape).astype(dtype)
    bias, cache = f(x, **static)
    in_32, cache_32 = f(x.astype(np.float32), **static)
    dvalues = np.random.default_rng(20).standard_normal(bias.values.shape).astype(dtype)
    (dx,) = f_vjp(cache, RelativeBias(dvalues))
    (dx_wide,) = f_vjp(cache_32, RelativeBias(dvalues.astype(np.float32)))
    assert bias.values.dtype == dx.dtype == dtype
    assert dx_wide.dtype == np.float32
    assert np.array_equal(bias.values, in_32.values.astype(dtype))
    assert np.array_equal(dx, dx_wide.astype(dtype))


def test_a_float32_cotangent_of_a_half_input_stays_float32():
    x = np.ones((6, 3), np.float16)
    _, cache = lookup(x, index=INDEX)
    assert lookup_vjp(cache, RelativeBias(np.ones((3, 7), np.float32)))[0].dtype == np.float32


def test_caches_are_small():
    _, cache = alibi(np.ones(3), T=5, S=7)
    assert isinstance(cache, AlibiCache)
    assert [a.shape for a in cache] == [(3,), (11,)]
    _, cache = lookup(np.ones((6, 3)), index=INDEX)
    assert isinstance(cache, LookupCache)
    assert [a.shape for a in cache] == [(7,), (7,), (6,), (6, 3, 0)]


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

X, D = np.ones((6, 3)), distances(3, 5)
ALIBI, LOOKUP = alibi(X[0], T=3, S=5)[1], lookup(X, index=INDEX)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dense(X, 3, 4), TypeError, "relative must be a RelativeBias, got ndarray"),
        (lambda: dense(RelativeBias([1.0]), 1, 1), TypeError, "relative.values must be an array, got list"),
        (lambda: dense(RelativeBias(D), 3, 5), TypeError, "relative.values must have a dtype of .*, got int64"),
        (
            lambda: dense(RelativeBias(X), 3, 2),
            ValueError,
            r"relative.values must be \(..., H or 1, T \+ S − 1\) with T=3 and S=2, got \(6, 3\)",
        ),
        (lambda: dense(RelativeBias(X), 0, 0), ValueError, r"with T=0 and S=0, got \(6, 3\)"),
        (lambda: dense(RelativeBias(np.array(1.0)), 1, 1), ValueError, r"with T=1 and S=1, got \(\)"),
        (
            lambda: toeplitz(X[0], (0, 2), (0, 3), 2),
            ValueError,
            r"values must reach rows \(0, 2\) and columns \(0, 3\) with T=2, got \(3,\)",
        ),
        (lambda: toeplitz(X[0], (1, 4), (0, 1), 2), ValueError, r"values must reach rows \(1, 4\)"),
        (lambda: alibi([1.0], T=3, S=5), TypeError, "slopes must be an array, got list"),
        (lambda: alibi(np.arange(3), T=3, S=5), TypeError, "slopes must have a dtype of .*, got int64"),
        (lambda: alibi(X.sum(), T=3, S=5), TypeError, "slopes must be an array, got float64"),
        (lambda: alibi(np.array(1.0), T=3, S=5), ValueError, r"slopes must be \(..., H\), got \(\)"),
        (lambda: alibi(X[0], T=-1, S=5), ValueError, "T must be at least 0, got -1"),
        (lambda: alibi(X[0], T=3, S=5.0), TypeError, "S must be an int, got 5.0 of type float"),
        (lambda: alibi(X[0], T=3, S=5, offset=True), TypeError, "offset must be an int, got True"),
        (lambda: alibi_slopes(-1), ValueError, "H must be at least 0, got -1"),
        (lambda: alibi_vjp(ALIBI, np.ones((3, 7))), TypeError, "dbias must be a RelativeBias, got ndarray"),
        (
            lambda: alibi_vjp(ALIBI, RelativeBias(np.ones((2, 7)))),
            ValueError,
            r"dbias.values must be \(..., H, L\) = \(3, 7\) as the output is, got \(2, 7\)",
        ),
        (
            lambda: alibi_vjp(ALIBI, RelativeBias(np.ones((3, 7), "f4"))),
            TypeError,
            "dbias.values must have dtype float64",
        ),
        (lambda: lookup([1.0], index=INDEX), TypeError, "table must be an array, got list"),
        (lambda: lookup(X[0], index=INDEX), ValueError, r"table must be \(B, H\), got \(3,\)"),
        (lambda: lookup(X, index=INDEX.tolist()), TypeError, "index must be a NumPy array of integers, got list"),
        (lambda: lookup(X, index=INDEX / 1), TypeError, "index must be a NumPy array of integers, got float64"),
        (lambda: lookup(X, index=INDEX > 2), TypeError, "index must be a NumPy array of integers, got bool"),
        (
            lambda: lookup(X, index=torch.tensor(INDEX)),
            TypeError,
            "index must be a NumPy array of integers, got a PyTorch tensor",
        ),
        (lambda: lookup(X, index=INDEX[None]), ValueError, r"index must be \(T \+ S − 1,\), got \(1, 7\)"),
        (lambda: lookup(X, index=INDEX + 2), ValueError, "index must be within the B=6 rows of table, got 2 … 6"),
        (lambda: lookup(X, index=INDEX - 1), ValueError, "index must be within the B=6 rows of table, got -1 … 3"),
        (lambda: lookup_vjp(LOOKUP, [X]), TypeError, "dbias must be a RelativeBias, got list"),
        (
            lambda: lookup_vjp(LOOKUP, RelativeBias(np.ones((3, 6)))),
            ValueError,
            r"\(..., H, L\) = \(3, 7\) .*, got \(3, 6\)",
        ),
        (lambda: clipped(D / 1, 3), TypeError, "distance must be a NumPy array of integers, got float64"),
        (lambda: clipped(D, -1), ValueError, "reach must be at least 0, got -1"),
        (lambda: t5_buckets(3, bidirectional=True), TypeError, "distance must be a NumPy array of integers, got int"),
        (lambda: t5_buckets(D, bidirectional=1), TypeError, "bidirectional must be True or False, got 1"),
        (lambda: t5_buckets(D, bidirectional=True, num_buckets=3), ValueError, "num_buckets must be at least 4, got 3"),
        (
            lambda: t5_buckets(D, bidirectional=False, num_buckets=1),
            ValueError,
            "num_buckets must be at least 2, got 1",
        ),
        (lambda: t5_buckets(D, bidirectional=False, max_distance=16), ValueError, "max_distance must be at least 17"),
        (lambda: t5_buckets(D, bidirectional=True, max_distance=8), ValueError, "max_distance must be at least 9"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
