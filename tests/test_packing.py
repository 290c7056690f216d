"""Packed sequences: packed = padded = one after another, and masks that never look between sequences."""

from functools import partial

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given

import funcmha
from funcmha import attention_vjp, log_sum_exp, masks, packing
from funcmha.packing import (
    cumulative,
    pack,
    pack_vjp,
    pad,
    pad_vjp,
    positions,
    unpack,
    unpack_vjp,
    unpad,
    unpad_vjp,
)
from funcmha.testing import check_vjp

H, K, D, E = 6, 2, 5, 7
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 11]), max_size=5)
PAIRS = st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 3, 5, 11])] * 2), min_size=1, max_size=5)


def close(got, want):
    """Within 1e-11 of the largest value wanted, or of 1."""
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    size = max(1.0, np.abs(want[finite]).max(initial=0.0))
    assert np.abs(got[finite] - want[finite]).max(initial=0.0) <= 1e-11 * size


def normal(*shape, seed=0):
    a = np.random.default_rng([seed, *shape]).standard_normal(shape)
    a.flags.writeable = False
    return a


# ── cu_seqlens and positions ─────────────────────────────────────────────────────────────────────────────────────


@given(LENGTHS, st.integers(-3, 3), st.booleans())
def test_positions_count_from_the_offset_of_each_sequence(lengths, offset, each):
    cu = cumulative(lengths)
    offsets = [offset + 2 * b if each else offset for b in range(len(lengths))]
    want = [t + o for n, o in zip(lengths, offsets, strict=True) for t in range(n)]
    got = positions(cu.astype(np.int32), np.array(offsets, np.int32) if each else offset)
    assert got.tolist() == want
    assert got.dtype == np.int64


def test_cumulative_is_what_flash_attention_wants():
    cu = cumulative([3, 0, 5])
    assert cu.tolist() == [0, 3, 3, 8]
    assert cu.dtype == np.int64
    assert cumulative([]).tolist() == [0]
    assert cumulative(np.array([250, 250], np.uint8)).tolist() == [0, 250, 500]


# ── the masks ────────────────────────────────────────────────────────────────────────────────────────────────────


def loop(lengths_q, lengths_k, left, right, offset):
    """The definition, one query and one key at a time. Oracle of `mask`, `causal` and `window`."""
    of_q = [(b, t) for b, n in enumerate(lengths_q) for t in range(n)]
    of_k = [(b, t) for b, n in enumerate(lengths_k) for t in range(n)]
    allowed = np.zeros((len(of_q), len(of_k)), bool)
    for i, (b, t) in enumerate(of_q):
        for j, (c, s) in enumerate(of_k):
            at = t + offset[b]
            allowed[i, j] = b == c and (left is None or at - left <= s) and (right is None or s <= at + right)
    return allowed


@st.composite
def windows(draw):
    """lengths of queries and keys, left, right, offset of each sequence (None: not given)"""
    pairs = draw(PAIRS)
    reach = st.none() | st.integers(0, 12)
    offset = draw(st.none() | st.lists(st.integers(-6, 6), min_size=len(pairs), max_size=len(pairs)))
    return [q for q, _ in pairs], [k for _, k in pairs], draw(reach), draw(reach), offset


def built(problem):
    """The mask of the problem, and its booleans by the loop."""
    nq, nk, left, right, offset = problem
    given = {} if offset is None else {"offset": np.array(offset)}
    mask = packing.window(left, right, cumulative(nq), cumulative(nk), **given)
    return mask, loop(nq, nk, left, right, [0] * len(nq) if offset is None else offset)


@given(windows())
@example(([2, 5, 3], [5, 2, 3], None, 0, None))
def test_a_window_equals_its_definition(problem):
    mask, want = built(problem)
    T, S = want.shape
    np.testing.assert_array_equal(mask.dense(T, S), want)
    np.testing.assert_array_equal(mask.attended_keys(T, S), want.any(0)[None] if T else np.zeros((1, S), bool))
    np.testing.assert_array_equal(mask.attending_queries(T, S), want.any(1)[:, None])
    assert mask.at((3, 1)) is mask
    assert mask.shape(T, S) == (T, S)


@given(windows(), st.data())
def test_blocks_and_columns_of_a_window_are_exact(problem, data):
    mask, want = built(problem)
    T, S = want.shape
    (r0, r1), (c0, c1) = (sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in (T, S))
    block = want[r0:r1, c0:c1]
    said = "empty" if not block.any() else "full" if block.all() else "mixed"
    assert mask.block((r0, r1), (c0, c1)) == said
    np.testing.assert_array_equal(mask.tile((r0, r1), (c0, c1)), block)
    attended = np.flatnonzero(want[r0:r1].any(0))
    assert mask.columns((r0, r1), S) == ((attended[0], attended[-1] + 1) if attended.size else (0, 0))


@given(LENGTHS)
def test_of_equal_lengths_causal_is_the_mask_and_a_global_band(lengths):
    cu = cumulative(lengths)
    N = int(cu[-1])
    np.testing.assert_array_equal(packing.causal(cu).dense(N, N), (packing.mask(cu) & masks.causal()).dense(N, N))
    band = packing.mask(cu) & masks.window(2, 1)
    np.testing.assert_array_equal(packing.window(2, 1, cu).dense(N, N), band.dense(N, N))


@given(PAIRS)
def test_the_mask_equals_the_window_without_bounds(pairs):
    nq, nk = zip(*pairs, strict=True)
    cu_q, cu_k = cumulative(nq), cumulative(nk)
    T, S = int(cu_q[-1]), int(cu_k[-1])
    want = loop(nq, nk, None, None, [0] * len(pairs))
    np.testing.assert_array_equal(packing.mask(cu_q, cu_k).dense(T, S), want)
    np.testing.assert_array_equal(packing.window(None, None, cu_q, cu_k).dense(T, S), want)


def test_causal_is_aligned_as_masks_causal_is():
    """At the start of each sequence, and with the difference of lengths as an offset at its end"""
    cu_q, cu_k = cumulative([2, 3]), cumulative([4, 2])
    rows = ["".join("x" if attended else "." for attended in row) for row in packing.causal(cu_q, cu_k).dense(5, 6)]
    assert rows == ["x.....", "xx....", "....x.", "....xx", "....xx"]
    mask = packing.causal(cu_q, cu_k, np.diff(cu_k) - np.diff(cu_q))
    rows = ["".join("x" if attended else "." for attended in row) for row in mask.dense(5, 6)]
    assert rows == ["xxx...", "xxxx..", "......", "....x.", "....xx"]
    with_past = packing.causal(cumulative([1, 2]), cumulative([4, 2]), offset=np.array([3, 0]))
    rows = ["".join("x" if attended else "." for attended in row) for row in with_past.dense(3, 6)]
    assert rows == ["xxxx..", "....x.", "....xx"]


@pytest.mark.parametrize(
    "make",
    [lambda cu: packing.mask(cu), lambda cu: packing.causal(cu), lambda cu: packing.mask(cu) & masks.causal()],
    ids=["mask", "causal", "mask & causal()"],
)
def test_an_engine_is_never_sent_to_a_block_between_sequences(make):
    """Of 29 sequences in tiles of 16, every block that is not empty holds a token and a key of one sequence."""
    lengths = np.random.default_rng(0).integers(0, 48, 29)
    cu, size = cumulative(lengths), 16
    N = int(cu[-1])
    mask, ids = make(cu), np.repeat(np.arange(29), lengths)
    blocks = [(a, min(a + size, N)) for a in range(0, N, size)]
    allowed = mask.dense(N, N)
    visited = wanted = 0
    for rows in blocks:
        start, stop = mask.columns(rows, N)
        assert ids[start] >= ids[rows[0]]
        assert ids[stop - 1] <= ids[rows[1] - 1]
        for cols in blocks:
            empty = mask.block(rows, cols) == "empty"
            assert empty or np.isin(ids[slice(*rows)], ids[slice(*cols)]).any()
            visited += start < cols[1] and cols[0] < stop and not empty
            wanted += allowed[slice(*rows), slice(*cols)].any()
    assert visited == wanted < len(blocks) ** 2 / 8


def test_fully_masked_rows_add_no_columns():
    mask = packing.causal(cumulative([1, 2]), cumulative([5, 2]), offset=np.array([-9, 0]))
    assert mask.columns((0, 3), 7) == (5, 7)
    assert mask.columns((0, 1), 7) == (0, 0)


def test_a_mask_of_other_sizes_is_refused():
    mask = packing.causal(cumulative([2, 3]), cumulative([4, 2]))
    for T, S in ((5, 5), (6, 6), (6, 5)):
        with pytest.raises(ValueError, match=rf"mask must be \(T, S\) with T={T} as in q, S={S} as in k, got \(5, 6\)"):
            mask.dense(T, S)


def test_a_mask_is_in_the_library_of_the_arrays(xp):
    cu = cumulative([2, 3])
    mask = packing.causal(cu)
    want = mask.dense(5, 5)
    cu[1] = 4
    like = xp.to(np.zeros(2))
    got = mask.dense(5, 5, like)
    assert type(got) is type(like)
    np.testing.assert_array_equal(xp.back(got), want)
    assert type(mask.attended_keys(5, 5, like)) is type(mask.attending_queries(5, 5, like)) is type(like)
    for array in (mask.start, mask.stop):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# ── packed = padded = one after another ──────────────────────────────────────────────────────────────────────────


def run(engine, q, k, v, do, dlse, mask):
    """o, lse and the gradients of q, k, v."""
    o, cache = funcmha.attention(q, k, v, mask=mask, engine=engine)
    return o, log_sum_exp(cache), *attention_vjp(cache, do, dlse=dlse)[:3]


def with_width(f, x, **static):
    """f of rows without a width."""
    return f(x[..., None], **static)[0][..., 0]


@given(PAIRS, st.booleans())
@example([(3, 3), (1, 1), (11, 11)], True)
@example([(5, 2), (0, 3), (2, 0), (1, 11)], True)
@example([(7, 13)], False)
@example([(1, 1)] * 5, True)
def test_packed_equals_padded_equals_one_after_another(engine, pairs, is_causal):
    cu_q, cu_k = (cumulative(n) for n in zip(*pairs, strict=True))
    T, S = int(cu_q[-1]), int(cu_k[-1])
    q, k, v, do, dlse = normal(H, T, D), normal(K, S, D), normal(K, S, E), normal(H, T, E, seed=1), normal(H, T)
    mask = packing.causal(cu_q, cu_k) if is_causal else packing.mask(cu_q, cu_k)
    packed = run(engine, q, k, v, do, dlse, mask)

    # one after another
    parts = [unpack(x, cu_seqlens=cu)[0] for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k), (do, cu_q))]
    dlses = unpack(dlse[..., None], cu_seqlens=cu_q)[0]
    runs = [
        run(engine, *some, dl[..., 0], masks.causal() if is_causal else None)
        for *some, dl in zip(*parts, dlses, strict=True)
    ]
    for got, parts_of in zip(packed, zip(*runs, strict=True), strict=True):
        lse = got.ndim == 2
        want = pack(*(x[..., None] if lse else x for x in parts_of))[0]
        close(got, want[..., 0] if lse else want)

    # padded; the queries and keys of the padding are NaN or anything, and what they get is thrown away
    lengths = masks.lengths(np.diff(cu_k))
    padded = [pad(x, cu_seqlens=cu)[0] for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k), (do, cu_q))]
    in_rows = run(
        engine, *padded, with_width(pad, dlse, cu_seqlens=cu_q), lengths & masks.causal() if is_causal else lengths
    )
    for got, want, cu in zip(packed, in_rows, (cu_q, cu_q, cu_q, cu_k, cu_k), strict=True):
        close(got, with_width(unpad, want, cu_seqlens=cu) if want.ndim == 3 else unpad(want, cu_seqlens=cu)[0])


def test_tokens_of_another_sequence_have_no_effect(engine):
    cu = cumulative([3, 5, 2])
    q, k, v = normal(H, 10, D), normal(K, 10, D), normal(K, 10, E)
    bad = v.copy()
    bad[:, 3:8] = 1e30
    want, _ = funcmha.attention(q, k, v, mask=packing.causal(cu), engine=engine)
    got, _ = funcmha.attention(q, k, bad, mask=packing.causal(cu), engine=engine)
    np.testing.assert_array_equal(np.delete(got, np.s_[3:8], 1), np.delete(want, np.s_[3:8], 1))


# ── pack, unpack, pad, unpad ─────────────────────────────────────────────────────────────────────────────────────


def padded_loop(x, cu, T):
    y = np.zeros((len(cu) - 1, *x.shape[:-2], T, x.shape[-1]))
    for b in range(len(cu) - 1):
        for t in range(cu[b + 1] - cu[b]):
            y[b, ..., t, :] = x[..., cu[b] + t, :]
    return y


SHAPES = st.sampled_from([(), (3,), (2, 3), (0,)])


@given(LENGTHS, SHAPES, st.sampled_from([0, 1, 7]), st.sampled_from([None, 0, 2]))
@example([2, 5, 0, 3], (3,), 7, None)
def test_pad_and_unpad_are_the_loop(lengths, batch, C, extra):
    cu = cumulative(lengths)
    T = max(lengths, default=0) + (extra or 0)
    x = normal(*batch, cu[-1], C)
    y, cache = pad(x, cu_seqlens=cu, length=None if extra is None else T)
    want = padded_loop(x, cu, T)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(unpad(y, cu_seqlens=cu)[0], x)
    # each is the adjoint of the other, and what stands in the padding counts for nothing
    dy = normal(*y.shape, seed=1)
    inside = padded_loop(np.ones_like(x), cu, T) == 1
    (dx,) = pad_vjp(cache, np.where(inside, dy, np.nan))
    np.testing.assert_array_equal(padded_loop(dx, cu, T), np.where(inside, dy, 0.0))
    got, cache = unpad(np.where(inside, dy, np.nan), cu_seqlens=cu)
    np.testing.assert_array_equal(got, dx)
    np.testing.assert_array_equal(unpad_vjp(cache, x)[0], want)


@given(LENGTHS, SHAPES)
@example([2, 5, 0, 3], (3,))
def test_pack_and_unpack_undo_each_other_and_are_adjoint(lengths, batch):
    cu, C = cumulative(lengths), 7
    x = normal(*batch, cu[-1], C)
    xs, cache = unpack(x, cu_seqlens=cu)
    assert [a.shape for a in xs] == [(*batch, n, C) for n in lengths]
    for b, a in enumerate(xs):
        np.testing.assert_array_equal(a, x[..., cu[b] : cu[b + 1], :])
    np.testing.assert_array_equal(unpack_vjp(cache, xs)[0], x)
    if lengths:
        packed, cache = pack(*xs)
        np.testing.assert_array_equal(packed, x)
        for got, want in zip(pack_vjp(cache, 2 * x), xs, strict=True):
            np.testing.assert_array_equal(got, 2 * want)


def test_the_pairs_keep_the_protocol():
    cu = cumulative([2, 5, 0, 3])
    check_vjp(pad, pad_vjp, (normal(3, 10, 7),), {"cu_seqlens": cu})
    check_vjp(unpad, unpad_vjp, (normal(4, 3, 11, 7),), {"cu_seqlens": cu})
    check_vjp(pack, pack_vjp, (normal(3, 2, 7), normal(3, 0, 7), normal(3, 5, 7)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_rows_keep_their_dtype_and_bits(dtype):
    cu = cumulative([2, 5, 0, 3])
    x = normal(3, 10, 7).astype(dtype)
    y, cache = pad(x, cu_seqlens=cu)
    (dx,) = pad_vjp(cache, y)
    z, cache = unpad(y, cu_seqlens=cu)
    (dy,) = unpad_vjp(cache, z)
    xs, cache = unpack(x, cu_seqlens=cu)
    for got, want in ((dx, x), (z, x), (dy, y), (pack(*xs)[0], x), (unpack_vjp(cache, xs)[0], x)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_every_array_library_gives_the_same(xp):
    cu = cumulative([2, 5, 0, 3])
    x, y = normal(3, 10, 7), normal(4, 3, 5, 7)
    made, cache = pad(xp.to(x), cu_seqlens=cu)
    np.testing.assert_array_equal(xp.back(made), padded_loop(x, cu, 5))
    (dx,) = pad_vjp(cache, xp.to(y))
    packed, cache = unpad(xp.to(y), cu_seqlens=cu)
    np.testing.assert_array_equal(xp.back(packed), xp.back(dx))
    np.testing.assert_array_equal(xp.back(unpad_vjp(cache, xp.to(x))[0]), padded_loop(x, cu, 5))
    xs, cache = unpack(xp.to(x), cu_seqlens=cu)
    np.testing.assert_array_equal(xp.back(unpack_vjp(cache, xs)[0]), x)
    whole, cache = pack(*xs)
    np.testing.assert_array_equal(xp.back(whole), x)
    for got, want in zip(pack_vjp(cache, xp.to(x)), xs, strict=True):
        assert type(got) is type(xp.to(x))
        np.testing.assert_array_equal(xp.back(got), xp.back(want))


def test_jax_differentiates_them_under_jit():
    cu = cumulative([2, 5, 0, 3])
    with jax.enable_x64(True):
        x = jax.numpy.asarray(normal(3, 10, 7))
        y = jax.numpy.asarray(normal(4, 3, 5, 7))
        for f, f_vjp, arg in ((pad, pad_vjp, x), (unpad, unpad_vjp, y)):
            plain = partial(f, cu_seqlens=cu)
            ours = jax.custom_vjp(partial(first_of, plain))
            ours.defvjp(plain, f_vjp)
            got = jax.jit(jax.grad(partial(cubes, ours)))(arg)
            np.testing.assert_allclose(got, jax.grad(partial(cubes, partial(first_of, plain)))(arg), rtol=1e-12)


def first_of(f, x):
    return f(x)[0]


def cubes(f, x):
    return (f(x) ** 3).sum()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────

X, CU = np.ones((3, 10, 7)), np.array([0, 2, 7, 7, 10])


@pytest.mark.parametrize("left", [None, 0, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("right", [None, 1, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, -(10**30), np.array([2**63 - 1, -(2**63)]), np.uint64(2**64 - 1)])
def test_windows_of_any_integers_are_exact(left, right, offset):
    """By the definition, in Python's integers"""
    cu_q, cu_k = cumulative([2, 3]), cumulative([4, 1])
    of = [int(each) for each in np.broadcast_to(np.asarray(offset, object), (2,))]
    want = [
        [
            b == c and (left is None or t + of[b] - left <= u) and (right is None or u <= t + of[b] + right)
            for c, n in enumerate((4, 1))
            for u in range(n)
        ]
        for b, n in enumerate((2, 3))
        for t in range(n)
    ]
    np.testing.assert_array_equal(packing.window(left, right, cu_q, cu_k, offset).dense(5, 5), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unpack(X, cu_seqlens=[0, 10]), TypeError, "cu_seqlens must be a NumPy array of integers, got list"),
        (lambda: pad(X, cu_seqlens=CU / 1), TypeError, "cu_seqlens must be a NumPy array of integers, got float64"),
        (lambda: pad(X, cu_seqlens=CU[None]), ValueError, r"cu_seqlens must be \(B \+ 1,\), got \(1, 5\)"),
        (lambda: pad(X, cu_seqlens=CU[:0]), ValueError, r"cu_seqlens must be \(B \+ 1,\), got \(0,\)"),
        (lambda: pad(X, cu_seqlens=CU[1:]), ValueError, "cu_seqlens must begin with 0 and never fall, got"),
        (
            lambda: pad(X, cu_seqlens=np.array([0, 7, 2, 10], np.uint32)),
            ValueError,
            r"cu_seqlens must begin with 0 and never fall, got \[ 0  7  2 10\]",
        ),
        (lambda: unpack(X, cu_seqlens=CU[:-1]), ValueError, "cu_seqlens must end with N=10 as in x, got 7"),
        (lambda: unpack(X, cu_seqlens=CU + (CU > 9)), ValueError, "cu_seqlens must end with N=10 as in x, got 11"),
        (lambda: pad(X, cu_seqlens=CU, length=4), ValueError, "length must be at least 5 as in cu_seqlens, got 4"),
        (lambda: pad(X, cu_seqlens=CU, length=5.0), TypeError, "length must be an int or None, got 5.0 of type float"),
        (lambda: pad(X[0, 0], cu_seqlens=CU), ValueError, r"x must be \(..., N, C\), got \(7,\)"),
        (lambda: pad(X.astype(int), cu_seqlens=CU), TypeError, "x must have a dtype of .*, got int64"),
        (lambda: unpad(X, cu_seqlens=CU), ValueError, r"cu_seqlens must be \(B \+ 1,\) with B=3 as in y, got \(5,\)"),
        (lambda: unpad(X[:, 0], cu_seqlens=CU), ValueError, r"y must be \(B, ..., T, C\), got \(3, 7\)"),
        (
            lambda: unpad(X, cu_seqlens=np.array([0, 2, 13, 14])),
            ValueError,
            "cu_seqlens must have lengths of at most T=10 as in y, got 11",
        ),
        (lambda: pack(), ValueError, r"xs must be one or more arrays \(..., T_b, C\), got none"),
        (lambda: pack(X, X[:2]), ValueError, r"xs\[1\] must be \(..., T_1, C\) with ...=\(3,\) as in xs\[0\]"),
        (lambda: pack(X, X[..., :5]), ValueError, r"xs\[1\] must be .* C=7 as in xs\[0\], got \(3, 10, 5\)"),
        (lambda: pack(X, X.astype("f4")), TypeError, r"xs\[1\] must have dtype float64 as xs\[0\] has, got float32"),
        (lambda: positions(CU, 1.5), TypeError, "offset must be an int or .B,. of integers, got 1.5 of type float"),
        (lambda: positions(CU, np.arange(3)), ValueError, r"offset must be an int or \(B,\) with B=4 .*, got \(3,\)"),
        (lambda: positions(CU, 2**63), ValueError, r"offset must be within ±2\*\*62, got 9223372036854775808"),
        (lambda: positions(CU, True), TypeError, "offset must be an int or .B,. of integers, got True of type bool"),
        (lambda: packing.mask(CU, CU[[0, 4]]), ValueError, r"cu_k must be \(B \+ 1,\) with B=4 as in cu_q, got \(2,\)"),
        (lambda: packing.causal(CU[1:]), ValueError, "cu_q must begin with 0"),
        (lambda: packing.causal(CU, CU[1:]), ValueError, "cu_k must begin with 0"),
        (lambda: packing.window(-1, 0, CU), ValueError, "left must be at least 0, or None for no bound, got -1"),
        (lambda: cumulative([2, -1]), ValueError, "lengths must be at least 0, got -1"),
        (lambda: cumulative([2.0]), TypeError, r"lengths must be \(B,\) of integers, got float64 \(1,\)"),
        (lambda: cumulative([[2]]), TypeError, r"lengths must be \(B,\) of integers, got int64 \(1, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_the_vjps_refuse_cotangents_that_are_not_of_the_output():
    y, cache = pad(X, cu_seqlens=CU)
    with pytest.raises(ValueError, match=r"dy must be \(B, ..., T, C\) = \(4, 3, 5, 7\) as the output is, got"):
        pad_vjp(cache, y[1:])
    _, cache = unpad(y, cu_seqlens=CU)
    with pytest.raises(ValueError, match=r"dx must be \(..., N, C\) = \(3, 10, 7\) as the output is, got"):
        unpad_vjp(cache, X[:, 1:])
    _, cache = pack(X, X)
    with pytest.raises(ValueError, match=r"dx must be \(..., N, C\) = \(3, 20, 7\) as the output is, got"):
        pack_vjp(cache, X)
    xs, cache = unpack(X, cu_seqlens=CU)
    with pytest.raises(ValueError, match="dxs must be B=4 arrays as the output is, got 3"):
        unpack_vjp(cache, xs[1:])
    with pytest.raises(ValueError, match=r"dxs\[0\] must be \(..., T_0, C\) = \(3, 2, 7\) as the output is, got"):
        unpack_vjp(cache, xs[::-1])
