"""Structured masks against a loop over every query and key, and their blocks against their booleans."""

import math
import pickle
import tracemalloc
from functools import partial, reduce
from operator import and_, or_

import array_api_strict
import fake_cupy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pytrees import PYTREES

from funcmha import attention, init
from funcmha.kv_cache import step
from funcmha.masks import (
    Band,
    Bands,
    Chunks,
    Complement,
    Dense,
    Intersection,
    Lengths,
    Mask,
    Padding,
    Segments,
    Spans,
    Union,
    as_mask,
    causal,
    chunks,
    dense,
    first,
    lengths,
    padding,
    prefix,
    segments,
    window,
)

H = 3
SIZES = [(7, 11), (11, 7), (7, 7), (1, 13), (13, 1), (1, 1), (0, 7), (7, 0), (0, 0)]  # (T, S)
BATCHES = [(), (2,), (2, 5), (0,)]
KINDS = (Band, Bands, Lengths, Padding, Segments, Chunks, Dense)
JOINED = (Intersection, Union, Complement)


# ---------------------------------------------------------------------------------------------------------- strategies


@st.composite
def sub_batches(draw, batch):
    """A shape that broadcasts to `batch`: some of its last axes, some of them of size 1."""
    kept = batch[draw(st.integers(0, len(batch))) :]
    return tuple(draw(st.sampled_from((1, n))) for n in kept)


@st.composite
def bands(draw, T, S):
    reach = st.none() | st.integers(0, T + S)
    return window(draw(reach), draw(reach), draw(st.integers(-T - 2, S + 2)))


@st.composite
def band_masks(draw, T, S, batch):
    reach, offset = st.none() | st.integers(0, T + S), st.integers(-T - 2, S + 2)
    return window(draw(reach), draw(reach), draw(hnp.arrays(np.int32, draw(sub_batches(batch)), elements=offset)))


@st.composite
def length_masks(draw, S, batch):
    n = st.integers(0, S + 2)
    return lengths(draw(n | hnp.arrays(np.int32, draw(sub_batches(batch)), elements=n)))


@st.composite
def padding_masks(draw, S, batch):
    return padding(draw(hnp.arrays(bool, (*draw(sub_batches(batch)), S))))


@st.composite
def segment_masks(draw, T, S, batch):
    """Packed sequences (ids in ascending runs), or ids in any order."""
    ids = st.integers(-1, 3)
    q_ids, k_ids = (draw(hnp.arrays(np.int64, (*draw(sub_batches(batch)), n), elements=ids)) for n in (T, S))
    return segments(np.sort(q_ids), np.sort(k_ids)) if draw(st.booleans()) else segments(q_ids, k_ids)


@st.composite
def chunk_masks(draw, T, S):
    return chunks(draw(st.integers(1, 8)), draw(st.integers(-T - 2, S + 2)))


@st.composite
def dense_masks(draw, T, S, batch, heads):
    leading = draw(sub_batches((*batch, heads)))
    axes = draw(st.sampled_from([(T, S), (1, S), (T, 1), (1, 1)]))
    return as_mask(draw(hnp.arrays(bool, leading + axes)))


def single_masks(T, S, batch=(), heads=1):
    """Masks that broadcast to (*batch, heads, T, S), of every kind but those joined."""
    return st.one_of(
        bands(T, S),
        band_masks(T, S, batch),
        length_masks(S, batch),
        padding_masks(S, batch),
        segment_masks(T, S, batch),
        chunk_masks(T, S),
        dense_masks(T, S, batch, heads),
    )


def masks(T, S, batch=(), heads=1):
    """Masks that broadcast to (*batch, heads, T, S), of every kind."""
    single = single_masks(T, S, batch, heads)
    return single | joined(single | joined(single))


def joined(some):
    """Masks joined with one operator."""
    several = st.lists(some, min_size=2, max_size=3)
    return st.one_of(several.map(partial(reduce, and_)), several.map(partial(reduce, or_)), some.map(lambda m: ~m))


def ranges(n):
    """(start, stop) with 0 ≤ start ≤ stop ≤ n"""
    return st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda ends: (min(ends), max(ends)))


@st.composite
def problems(draw, kind=masks):
    """mask, its full shape (*batch, H, T, S), and a range of rows and of columns."""
    T, S = draw(st.sampled_from(SIZES))
    batch = draw(st.sampled_from(BATCHES))
    mask = draw(kind(T, S, batch, H))
    return mask, (*batch, H, T, S), draw(ranges(T)), draw(ranges(S))


# -------------------------------------------------------------------------------------------------------------- oracle


def attends(mask, batch, b, h, i, j):
    """Whether query i attends key j in head h of element b of the batch: the definitions, one line each."""
    match mask:
        case Band(left, right, offset):
            position = i + offset
            return (left is None or position - left <= j) and (right is None or j <= position + right)
        case Bands(left, right, offset):
            return attends(Band(left, right, np.broadcast_to(offset, batch)[b]), batch, b, h, i, j)
        case Lengths(n):
            return j < np.broadcast_to(n, batch)[b]
        case Padding(keep):
            return np.broadcast_to(keep, (*batch, keep.shape[-1]))[(*b, j)]
        case Segments(q, k):
            q, k = np.broadcast_to(q, (*batch, q.shape[-1])), np.broadcast_to(k, (*batch, k.shape[-1]))
            return q[(*b, i)] == k[(*b, j)]
        case Chunks(size, query, key):
            return math.floor((i + query) / size) == math.floor((j + key) / size)


def loop(mask, shape):
    """Every boolean of the mask, one by one. Oracle of `dense`."""
    *batch, heads, T, S = shape
    match mask:
        case Dense(array):
            return np.broadcast_to(array, shape)
        case Intersection(parts):
            return np.all([loop(part, shape) for part in parts], axis=0)
        case Union(parts):
            return np.any([loop(part, shape) for part in parts], axis=0)
        case Complement(forbidden):
            return ~loop(forbidden, shape)
    allowed = np.zeros(shape, dtype=bool)
    for *b, h, i, j in np.ndindex(*batch, heads, T, S):
        allowed[(*b, h, i, j)] = attends(mask, tuple(batch), tuple(b), h, i, j)
    return allowed


def full(mask, shape):
    """`dense` with every axis spelt out. Oracle of `block`, `tile`, `columns` and `at`."""
    return np.broadcast_to(mask.dense(*shape[-2:]), shape)


def own(mask, T, S):
    """Every query and key spelt out, but no more batch and heads than the mask has itself."""
    allowed = mask.dense(T, S)
    return np.broadcast_to(allowed, (*allowed.shape[:-2], T, S))


def answer(allowed):
    """What `block` should say of these booleans."""
    if not allowed.any():
        return "empty"
    return "full" if allowed.all() else "mixed"


def picture(mask, T, S):
    return ["".join("x" if attended else "." for attended in row) for row in mask.dense(T, S)]


# --------------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (causal(), ["x....", "xx..."]),  # top-left: PyTorch's is_causal, JAX
        (causal(offset=3), ["xxxx.", "xxxxx"]),  # bottom-right, S − T: flash-attention
        (causal(offset=-1), [".....", "x...."]),  # the first query is fully masked
        (window(1, 0, offset=2), [".xx..", "..xx."]),  # left = 1 attends itself and one before
        (window(0, 2), ["xxx..", ".xxx."]),
        (window(0, None, offset=1), [".xxxx", "..xxx"]),
        (window(None, None), ["xxxxx", "xxxxx"]),
        (window(0, 0, offset=5), [".....", "....."]),
        (segments(np.array([4, 2]), np.array([2, 4, 4, 2, 9])), [".xx..", "x..x."]),
        (causal(2) & np.array([[True, False, True, True, True]]), ["x.x..", "x.xx."]),
        (window(0, 0, 2) | first(1), ["x.x..", "x..x."]),
        (prefix(2), ["xx...", "xx..."]),
        (prefix(2, offset=2), ["xxx..", "xxxx."]),
        (chunks(2), ["xx...", "xx..."]),
        (chunks(2, offset=1), ["xx...", "..xx."]),
        (chunks(3, offset=-1), [".....", "xxx.."]),
        (~window(0, 1, 1), ["x..xx", "xx..x"]),
        (~causal(), [".xxxx", "..xxx"]),
        (~(causal() | chunks(2)), ["..xxx", "..xxx"]),
        (~window(None, None), [".....", "....."]),
    ],
)
def test_small_masks_look_as_defined(mask, rows):
    assert picture(mask, 2, 5) == rows


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        (lengths(3), "xxx.."),
        (lengths(0), "....."),
        (lengths(8), "xxxxx"),
        (padding(np.array([False, True, True, False, True])), ".xx.x"),
    ],
)
def test_masks_of_keys_have_one_row_for_all_queries(mask, row):
    assert picture(mask, 2, 5) == [row]


@given(problems())
def test_dense_equals_the_loop_over_queries_and_keys(problem):
    mask, shape, *_ = problem
    np.testing.assert_array_equal(full(mask, shape), loop(mask, shape))


@given(problems())
def test_shape_is_the_shape_of_dense(problem):
    mask, (*_, T, S), *_ = problem
    assert mask.shape(T, S) == mask.dense(T, S).shape


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (causal(), (7, 11)),
        (lengths(5), (1, 11)),
        (lengths(np.full((2, 5), 3)), (2, 5, 1, 1, 11)),
        (padding(np.ones(11, dtype=bool)), (1, 11)),
        (padding(np.ones((2, 11), dtype=bool)), (2, 1, 1, 11)),
        (segments(np.zeros(7, dtype=int), np.zeros((2, 11), dtype=int)), (2, 1, 7, 11)),
        (as_mask(np.ones((2, 3, 7, 1), dtype=bool)), (2, 3, 7, 1)),
        (as_mask(np.ones(11, dtype=bool)), (1, 11)),
        (as_mask(np.array(True)), (1, 1)),
        (causal() & lengths(np.array([3, 4])), (2, 1, 7, 11)),
    ],
)
def test_a_batch_brings_a_head_axis(mask, shape):
    assert mask.dense(7, 11).shape == shape


def test_an_offset_beyond_64_bits_is_an_offset():
    assert picture(causal(10**30) & window(10**31, None, -(10**30)), 2, 5) == ["xxxxx", "xxxxx"]


@pytest.mark.parametrize("size", [1, 4, 2**62, 2**63 - 1])
@pytest.mark.parametrize("offset", [2**62 - 1, 2**62 - 5, -(2**62), 2**61])
def test_chunks_are_exact_as_far_as_their_offset_may_be(size, offset):
    mask = chunks(size, offset)
    want = np.array([[(i + offset) // size == j // size for j in range(7)] for i in range(5)])
    np.testing.assert_array_equal(mask.dense(5, 7), want)
    np.testing.assert_array_equal(mask.part((1, 5), (2, 7)).dense(4, 5), want[1:, 2:])
    np.testing.assert_array_equal(mask.attended_keys(5, 7), want.any(0)[None])
    np.testing.assert_array_equal(mask.attending_queries(5, 7), want.any(1)[:, None])


def test_offsets_at_the_ends_of_64_bits_are_offsets():
    """As sentinels for all and nothing; their booleans, blocks and queries agree."""
    mask = causal(np.array([2**63 - 1, -(2**63)]))
    assert mask.dense(3, 3)[0].all()
    assert not mask.dense(3, 3)[1].any()
    assert [mask.at((b,)).block((0, 3), (0, 3)) for b in range(2)] == ["full", "empty"]
    assert mask.attending_queries(3, 3)[:, 0, :, 0].tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("build", [padding, lengths, causal, lambda a: segments(a, a)])
def test_a_masked_array_is_refused(build):
    """Its own mask would be read over."""
    kind = bool if build is padding else int
    with pytest.raises(TypeError, match=r"must be a NumPy array .* got numpy\.ma\S*MaskedArray"):
        build(np.ma.array([1, 0, 1], mask=[0, 1, 0], dtype=kind))


def test_numpy_integers_of_few_bits_do_not_overflow():
    assert picture(window(np.int8(2), np.int8(1), 1000), 1, 1003) == ["." * 998 + "xxxx" + "."]


# -------------------------------------------------------------------------------------------------------------- blocks


@settings(max_examples=500)
@given(problems())
def test_blocks_are_answered_exactly(problem):
    mask, (*batch, _, T, S), rows, cols = problem
    assume(0 not in batch)  # of which every answer is right
    assert mask.block(rows, cols) == answer(own(mask, T, S)[..., slice(*rows), slice(*cols)])


@given(problems())
def test_a_tile_is_a_slice_of_dense(problem):
    mask, shape, rows, cols = problem
    expected = full(mask, shape)[..., slice(*rows), slice(*cols)]
    np.testing.assert_array_equal(np.broadcast_to(mask.tile(rows, cols), expected.shape), expected)


@given(problems())
def test_a_part_is_the_mask_of_its_rows_and_columns(problem):
    mask, shape, rows, cols = problem
    expected = full(mask, shape)[..., slice(*rows), slice(*cols)]
    part = mask.part(rows, cols)
    np.testing.assert_array_equal(full(part, expected.shape), expected)
    assert part.block((0, rows[1] - rows[0]), (0, cols[1] - cols[0])) == mask.block(rows, cols)


@given(problems())
def test_nothing_is_attended_to_outside_the_columns(problem):
    mask, shape, rows, _ = problem
    start, stop = mask.columns(rows, shape[-1])
    attended = full(mask, shape)[..., slice(*rows), :]
    assert 0 <= start <= stop <= shape[-1]
    assert not attended[..., :start].any()
    assert not attended[..., stop:].any()


@given(problems(single_masks).filter(lambda problem: not isinstance(problem[0], Dense)))
def test_the_columns_of_single_masks_are_the_least_range(problem):
    mask, (*_, T, S), rows, _ = problem
    attended = [j for j in range(S) if own(mask, T, S)[..., slice(*rows), j].any()]
    assert mask.columns(rows, S) == ((attended[0], attended[-1] + 1) if attended else (0, 0))


@given(problems())
def test_at_leaves_one_element_of_the_batch(problem):
    mask, shape, *_ = problem
    batch, one = shape[:-3], shape[-3:]
    for index in np.ndindex(batch):
        sample = mask.at(index)
        assert len(sample.shape(*shape[-2:])) <= 3
        np.testing.assert_array_equal(full(sample, one), full(mask, shape)[index])


def queries_with_a_key(mask, shape):
    """Whether each query attends to any key (*batch, H, T, 1), from the loop. Oracle of `attending_queries`."""
    return loop(mask, shape).any(axis=-1, keepdims=True)


@given(problems())
def test_attending_queries_are_those_of_the_loop(problem):
    mask, shape, *_ = problem
    attending = mask.attending_queries(*shape[-2:])
    assert attending.shape == (*mask.shape(*shape[-2:])[:-1], 1)
    np.testing.assert_array_equal(np.broadcast_to(attending, (*shape[:-1], 1)), queries_with_a_key(mask, shape))


@pytest.mark.parametrize(
    ("mask", "drawn"),
    [
        (causal(-2), "..xx"),
        (window(0, None, offset=3), "xx.."),
        (window(1, 0, offset=3), "xxx."),
        (causal(np.array([-2, -1])), "..xx .xxx"),
        (window(0, None, np.array([3, 1])), "xx.. xxxx"),
        (segments(np.array([[4, 2, 7, 9], [1, 4, 4, 1]]), np.array([2, 4, 4, 2, 9])), "xx.x .xx."),
        (lengths(np.array([0, 3])), ".... xxxx"),
        (padding(np.array([[False, True, False, False, False], [False] * 5])), "xxxx ...."),
        (as_mask(np.arange(20).reshape(4, 5) == 13), "..x."),
        (causal(-1) & padding(np.array([False, True, True, True, True])), "..xx"),
    ],
)
def test_small_masks_attended_keys_and_attending_queries(mask, drawn):
    rows = np.broadcast_to(mask.attending_queries(4, 5), (*mask.shape(4, 5)[:-2], 4, 1)).reshape(-1, 4)
    assert " ".join("".join("x" if some else "." for some in row) for row in rows) == drawn


@pytest.fixture(scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funcmha.masks.search.ROWS", 3)
        patch.setattr("funcmha.masks.search.COLS", 1)
        patch.setattr("funcmha.masks.search.STRIP", 2)
        yield


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=200)
@given(problems(lambda *sizes: joined(masks(*sizes))))
def test_keys_and_queries_of_joined_masks_are_exact(problem):
    mask, shape, *_ = problem
    np.testing.assert_array_equal(
        np.broadcast_to(mask.attending_queries(*shape[-2:]), (*shape[:-1], 1)), queries_with_a_key(mask, shape)
    )
    assert_keys_are_exact(mask, *shape[-2:])


def assert_keys_are_exact(mask, T, S):
    """The rows of the booleans joined by or, each of those that one row stands for."""
    keys, attended = own(mask, T, S).any(axis=-2, keepdims=True), mask.attended_keys(T, S)
    np.testing.assert_array_equal(np.broadcast_to(attended, keys.shape), keys)


@given(problems())
def test_attended_keys_are_those_of_the_booleans(problem):
    mask, shape, *_ = problem
    assert_keys_are_exact(mask, *shape[-2:])


ALL = as_mask(np.ones((1, 1), bool))


@pytest.mark.parametrize(
    "mask", [ALL, as_mask(np.ones((1, 5), bool)), lengths(3), padding(np.ones(5, bool)), ~lengths(0), causal(9) | ALL]
)
def test_without_queries_no_key_is_attended(mask):
    """One row that stands for all of them stands for none."""
    assert mask.attended_keys(0, 5).tolist() == [[False] * mask.shape(0, 5)[-1]]


@pytest.mark.parametrize("mask", [ALL, as_mask(np.ones((4, 1), bool)), causal(9), chunks(7), ~lengths(0), ALL & ALL])
def test_without_keys_no_query_attends(mask):
    assert mask.attending_queries(4, 0).tolist() == [[False]] * mask.shape(4, 0)[-2]


def test_left_padding_leaves_causal_queries_without_a_key():
    """Each part has a key for every query, and the first two have none that both allow."""
    mask = causal() & padding(np.array([False, False, True, True, True]))
    assert mask.attending_queries(5, 5)[:, 0].tolist() == [False, False, True, True, True]


def test_attending_queries_need_no_square():
    n = 2**14
    mask = causal() & padding(np.arange(n) >= 1000)
    tracemalloc.start()
    attending = mask.attending_queries(n, n)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert attending.sum() == n - 1000
    assert peak < 2**22


FROM_BITS = {  # each makes a mask with the batch axes of its argument (..., 7)
    "Lengths": lambda bits: lengths(bits.argmax(axis=-1)),
    "Padding": padding,
    "Segments": lambda bits: segments(bits[..., :3] + 0, bits + 0),
    "Dense": lambda bits: as_mask(bits[..., None, None, :]),
    "Intersection": lambda bits: lengths(4) & padding(bits),
}


@pytest.mark.parametrize("build", FROM_BITS.values(), ids=FROM_BITS)
@pytest.mark.parametrize("batch", [(5,), (1, 5), (2, 1), (1,), (2, 5)])
def test_a_mask_with_fewer_batch_axes_reads_the_last_ones(build, batch):
    bits = np.random.default_rng(0).random((*batch, 7)) < 0.5
    mask = build(bits)
    allowed = np.broadcast_to(mask.dense(3, 7), (2, 5, 1, 3, 7))
    for index in np.ndindex(2, 5):
        np.testing.assert_array_equal(np.broadcast_to(mask.at(index).dense(3, 7), (1, 3, 7)), allowed[index])


@pytest.mark.parametrize("mask", [causal(), as_mask(np.ones((3, 7, 11), dtype=bool))])
def test_a_mask_without_batch_equals_its_own_sample(mask):
    assert mask.at((1, 4)) is mask


EVERY_ANSWER = {
    Band: window(2, 1, 1),
    Bands: window(2, 1, np.array([2, -1])),
    Lengths: lengths(np.array([3, 5])),
    Padding: padding(np.array([[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1, 0]], dtype=bool)),
    Segments: segments(np.array([[8, 8, 2, 2, 9], [8, 8, 2, 2, 5]]), np.array([2, 2, 8, 8, 9, 6, 2])),
    Dense: as_mask(np.array([[[1], [1], [0], [0], [1]], [[1], [1], [0], [0], [0]]], dtype=bool)),
    Chunks: chunks(2, 1),
    Intersection: window(2, 1, 1) & lengths(4),
    Union: window(1, 0, 1) | lengths(2) | (np.arange(5) > 3)[:, None],
    Complement: ~segments(np.array([[8, 8, 2, 2, 9], [8, 8, 2, 2, 5]]), np.array([2, 2, 8, 8, 9, 6, 2])),
}


@pytest.mark.parametrize("kind", EVERY_ANSWER)
def test_every_kind_gives_every_answer(kind):
    mask, T, S = EVERY_ANSWER[kind], 5, 7
    blocks = [
        ((r0, r1), (c0, c1)) for r1 in range(T + 1) for r0 in range(r1) for c1 in range(S + 1) for c0 in range(c1)
    ]
    allowed = np.broadcast_to(mask.dense(T, S), (2, 2, T, S))
    for rows, cols in blocks:
        assert mask.block(rows, cols) == answer(allowed[..., slice(*rows), slice(*cols)])
    assert isinstance(mask, kind)
    assert {mask.block(rows, cols) for rows, cols in blocks} == {"empty", "full", "mixed"}


def test_the_columns_of_an_intersection_are_common_to_its_parts():
    assert window(2, 1, 1).columns((2, 5), 7) == (1, 7)
    assert (window(2, 1, 1) & lengths(4)).columns((2, 5), 7) == (1, 4)


ONE_ROW = as_mask(np.array([[0, 0, 1, 1, 0, 1, 0]], dtype=bool))


@pytest.mark.parametrize(
    "mask", [*EVERY_ANSWER.values(), ONE_ROW], ids=[*(k.__name__ for k in EVERY_ANSWER), "one row"]
)
def test_every_tile_part_and_sample_of_a_small_mask(mask):
    """All of them, where the properties above draw some: a tile that begins in the middle is not drawn often."""
    T, S = 5, 7
    allowed = np.broadcast_to(mask.dense(T, S), (2, 2, T, S))
    for rows in [(r0, r1) for r1 in range(T + 1) for r0 in range(r1)]:
        start, stop = mask.columns(rows, S)
        outside = np.r_[:start, stop:S]
        assert not allowed[..., slice(*rows), outside].any()
        for cols in [(c0, c1) for c1 in range(S + 1) for c0 in range(c1)]:
            expected = allowed[..., slice(*rows), slice(*cols)]
            np.testing.assert_array_equal(np.broadcast_to(mask.tile(rows, cols), expected.shape), expected)
            part = mask.part(rows, cols).dense(rows[1] - rows[0], cols[1] - cols[0])
            np.testing.assert_array_equal(np.broadcast_to(part, expected.shape), expected)
    for b in range(2):
        np.testing.assert_array_equal(np.broadcast_to(mask.at((b,)).dense(T, S), (2, T, S)), allowed[b])


@pytest.mark.parametrize("mask", EVERY_ANSWER.values(), ids=lambda mask: type(mask).__name__)
@pytest.mark.parametrize(("rows", "cols"), [((3, 3), (0, 7)), ((0, 5), (2, 2)), ((0, 0), (0, 0))])
def test_a_block_without_rows_or_columns_is_empty(mask, rows, cols):
    assert mask.block(rows, cols) == "empty"
    assert mask.columns(rows, 7) == ((0, 0) if rows[0] == rows[1] else mask.columns((0, 5), 7))


@pytest.mark.parametrize("kind", [Band, Bands, Lengths, Padding, Segments, Chunks])
def test_columns_reach_from_the_first_attended_key_to_the_last(kind):
    mask = EVERY_ANSWER[kind]
    for rows in [(r0, r1) for r1 in range(6) for r0 in range(r1)]:
        attended = [j for j in range(7) if own(mask, 5, 7)[..., slice(*rows), j].any()]
        assert mask.columns(rows, 7) == ((attended[0], attended[-1] + 1) if attended else (0, 0))


@pytest.mark.parametrize("mask", [window(0, 0, 5), window(0, 0, 9), causal(-3), window(0, 0) & window(0, 0, 2)])
def test_the_columns_of_fully_masked_rows_are_none(mask):
    assert mask.columns((0, 2), 5) == (0, 0)


def test_a_band_for_each_sample():
    """As bottom-right causal masks of padded sequences are, and windows after caches of different lengths."""
    mask = window(1, 0, np.array([3, -1]))
    pictures = [["..xx...", "...xx.."], [".......", "x......"]]
    for b, drawn in enumerate(pictures):
        assert picture(mask.at((b,)), 2, 7) == drawn
        assert ["".join(".x"[int(attended)] for attended in row) for row in mask.dense(2, 7)[b, 0]] == drawn
    assert mask.columns((0, 1), 7) == (2, 4)  # of the sample that attends any
    assert mask.columns((1, 2), 7) == (0, 5)
    assert mask.shape(2, 7) == (2, 1, 2, 7)


@pytest.mark.slow
def test_the_strategy_draws_every_kind_and_every_answer():
    drawn = set()

    @settings(max_examples=2000, derandomize=True, database=None)
    @given(problems())
    def collect(problem):
        mask, _, rows, cols = problem
        drawn.add((type(mask), mask.block(rows, cols)))

    collect()
    assert drawn == {(kind, said) for kind in (*KINDS, *JOINED) for said in ("empty", "full", "mixed")}


def test_two_mixed_parts_may_be_empty_or_full_together():
    split = padding(np.array([True, False])), padding(np.array([False, True]))
    assert (split[0] & split[1]).block((0, 1), (0, 2)) == "empty"
    assert (split[0] | split[1]).block((0, 1), (0, 2)) == "full"
    assert ((split[0] & split[1]) | causal()).block((0, 2), (0, 2)) == "mixed"


def test_a_long_band_is_answered_without_its_array():
    n, tile = 65_536, 256
    mask = causal() & window(4 * tile - 1, None)
    blocks = [(start, start + tile) for start in range(0, n, tile)]
    counts = {"empty": 0, "full": 0, "mixed": 0}
    tracemalloc.start()
    for rows in blocks:
        assert mask.columns(rows, n) == (max(0, rows[0] - 4 * tile + 1), rows[1])
        for cols in blocks:
            counts[mask.block(rows, cols)] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Per block-diagonal of 256 − d blocks: d = 0 and d = 4 meet an edge of the band, d = 1, 2, 3 lie inside it.
    assert counts == {"mixed": 256 + 252, "full": 255 + 254 + 253, "empty": 256**2 - 5 * 256 + 10}
    assert peak < 2**20


def test_blocks_of_long_packed_sequences_need_no_square():
    ids = np.repeat(np.arange(64), 1024)
    mask = segments(ids, ids) & padding(ids < 63)
    blocks = [((r, r + 1024), (c, c + 1024)) for r in range(512, 65_536 - 1024, 8192) for c in range(512, 64_000, 8192)]
    tracemalloc.start()
    answers = [mask.block(*block) for block in blocks]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answers == ["mixed" if rows == cols else "empty" for rows, cols in blocks]
    assert peak < 2**20


# --------------------------------------------------------------------------------------------------------- composition


@st.composite
def pairs(draw):
    T, S = draw(st.sampled_from(SIZES))
    batch = draw(st.sampled_from(BATCHES))
    return draw(masks(T, S, batch, H)), draw(masks(T, S, batch, H)), T, S


@given(pairs())
def test_and_commutes(pair):
    a, b, T, S = pair
    np.testing.assert_array_equal((a & b).dense(T, S), (b & a).dense(T, S))


@given(pairs())
def test_and_is_the_and_of_the_booleans(pair):
    a, b, T, S = pair
    np.testing.assert_array_equal((a & b).dense(T, S), a.dense(T, S) & b.dense(T, S))


@given(problems())
def test_and_and_or_are_idempotent(problem):
    mask, shape, rows, cols = problem
    for twice in (mask & mask, mask | mask, ~~mask):
        np.testing.assert_array_equal(full(twice, shape), full(mask, shape))
        assert twice.block(rows, cols) == mask.block(rows, cols)


@given(pairs())
def test_the_algebra_is_boolean(pair):
    """Against the booleans: or, not, De Morgan, absorption, and the excluded middle"""
    a, b, T, S = pair
    x, y = a.dense(T, S), b.dense(T, S)
    np.testing.assert_array_equal((a | b).dense(T, S), x | y)
    np.testing.assert_array_equal((~a).dense(T, S), ~x)
    np.testing.assert_array_equal((~(a & b)).dense(T, S), (~a | ~b).dense(T, S))
    np.testing.assert_array_equal((a & (a | b)).dense(T, S), np.broadcast_to(x, (x | y).shape))
    assert (a | ~a).dense(T, S).all()
    assert not (a & ~a).dense(T, S).any()


@pytest.mark.parametrize("join", [and_, or_])
def test_joined_masks_are_flat_and_keep_their_order(join):
    a, b, c, d = causal(), lengths(3), window(2, 1), padding(np.ones(5, dtype=bool))
    assert join(join(a, b), join(c, d)).parts == join(a, join(b, join(c, d))).parts == (a, b, c, d)


def test_what_a_band_forbids_is_a_band_again():
    """Which knows its columns and keys, as no complement does."""
    assert isinstance(~causal(2), Band)
    assert isinstance(~causal(np.array([2])), Bands)
    assert (~causal(2)).columns((1, 3), 9) == (4, 9)
    assert all(isinstance(part, Band) for part in (~window(2, 1)).parts)


@given(problems())
def test_arrays_join_on_either_side(problem):
    mask, shape, *_ = problem
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 0
    np.testing.assert_array_equal((mask & array).dense(*shape[-2:]), full(mask, shape) & array)
    np.testing.assert_array_equal((array & mask).dense(*shape[-2:]), full(mask, shape) & array)
    np.testing.assert_array_equal((mask | array).dense(*shape[-2:]), full(mask, shape) | array)
    np.testing.assert_array_equal((array | mask).dense(*shape[-2:]), full(mask, shape) | array)


# ----------------------------------------------------------------------------------------------------- array libraries

LIKES = {
    "numpy": np.zeros(2),
    "strict": array_api_strict.zeros(2),
    "strict device1": array_api_strict.zeros(2, device=array_api_strict.Device("device1")),
    "jax": jnp.zeros(2),
    "cupy": fake_cupy.MODULE.zeros(2),
}
PARTS = {
    "Band": causal(3),
    "Bands": causal(np.array([3, 1])),
    "Lengths": lengths(np.array([3, 4])),
    "Padding": padding(np.arange(14).reshape(2, 7) % 3 > 0),
    "Segments": segments(np.arange(5) // 2, np.arange(7) // 3),
    "Chunks": chunks(4, 1),
    "Dense": as_mask(np.arange(70).reshape(2, 1, 5, 7) % 4 > 0),
}
EVERY = PARTS | {
    "Spans": Spans(np.array([0, 0, 2, 2, 7]), np.array([2, 2, 7, 7, 7]), 7),
    "Intersection": reduce(and_, PARTS.values()),
    "Union": reduce(or_, PARTS.values()),
    "Complement": ~reduce(or_, PARTS.values()),
}


def host(x):
    if isinstance(x, type(LIKES["strict"])):
        x = x.to_device(array_api_strict.Device("CPU_DEVICE"))
    return fake_cupy.MODULE.asnumpy(x)


@pytest.fixture(autouse=True, scope="module")
def cupy():
    with fake_cupy.installed():
        yield


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("mask", EVERY.values(), ids=EVERY)
def test_dense_is_in_the_library_and_on_the_device_of_like(mask, like):
    made = dense(mask, 5, 7, like)
    assert type(made) is type(like)
    assert made.device == like.device
    np.testing.assert_array_equal(host(made), mask.dense(5, 7))


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("mask", EVERY.values(), ids=EVERY)
def test_attending_queries_are_in_the_library_of_like(mask, like):
    made = mask.attending_queries(5, 7, like)
    assert type(made) is type(like)
    assert made.device == like.device
    np.testing.assert_array_equal(host(made), mask.attending_queries(5, 7))


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
def test_an_array_of_any_library_joins_a_mask(like):
    booleans = np.arange(70).reshape(2, 1, 5, 7) % 4 > 0
    mask = causal(3) & dense(as_mask(booleans), 5, 7, like) & lengths(np.array([3, 4]))
    expected = (causal(3) & booleans & lengths(np.array([3, 4]))).dense(5, 7)
    np.testing.assert_array_equal(host(dense(mask, 5, 7, like)), expected)
    np.testing.assert_array_equal(host(mask.tile((1, 4), (2, 7), like)), expected[..., 1:4, 2:7])
    np.testing.assert_array_equal(host(mask.at((1,)).dense(5, 7, like)), expected[1])
    np.testing.assert_array_equal(host(mask.attending_queries(5, 7, like)), expected.any(axis=-1, keepdims=True))
    assert mask.block((0, 2), (5, 7)) == "empty"
    assert mask.block((0, 5), (0, 7)) == "mixed"


def test_an_array_outside_numpy_is_not_looked_at():
    assert as_mask(jnp.ones((5, 7), dtype=bool)).block((0, 5), (0, 7)) == "mixed"


@pytest.mark.parametrize("like", [None, LIKES["numpy"], LIKES["strict"]], ids=["none", "numpy", "strict"])
def test_an_array_of_another_library_is_refused(like):
    mask = causal() & jnp.ones((5, 7), dtype=bool)
    with pytest.raises(TypeError, match=r"^mask must be an? .*NumPy array, got a JAX array$"):
        mask.dense(5, 7, like)


def test_dense_passes_none_and_arrays_through():
    array = jnp.ones((5, 7), dtype=bool)
    assert dense(None, 5, 7, np.zeros(2)) is None
    assert dense(array, 5, 7, array) is array


# --------------------------------------------------------------------------------------------------- values and errors


def test_later_changes_of_its_arguments_do_not_change_a_mask():
    n, keep, ids, offset = np.array([3, 4]), np.ones(7, dtype=bool), np.zeros(7, dtype=int), np.array([2, 0])
    mask = lengths(n) & padding(keep) & segments(ids, ids) & causal(offset)
    before = mask.dense(7, 7)
    n[:], keep[:], ids[3:], offset[:] = 0, False, 1, -9
    np.testing.assert_array_equal(mask.dense(7, 7), before)


@pytest.mark.parametrize("name", ["Bands", "Lengths", "Padding", "Segments"])
def test_the_arrays_of_a_mask_are_read_only(name):
    for array in (x for x in PARTS[name] if isinstance(x, np.ndarray)):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_a_mask_cannot_be_changed():
    with pytest.raises(AttributeError):
        causal().offset = 1
    with pytest.raises(AttributeError):
        causal().more = 1


BUILT = {  # twice each, and then another of the kind
    "Band": lambda n: window(3, 0, n),
    "Bands": lambda n: causal(np.array([3, n])),
    "Lengths": lambda n: lengths(np.array([3, n], np.int32)),
    "Padding": lambda n: padding(np.arange(7) < n),
    "Segments": lambda n: segments(np.arange(5) // 2, np.arange(7) // n),
    "Spans": lambda n: Spans(np.array([0, n]), np.array([7, 7]), 7),
    "Chunks": lambda n: chunks(n),
    "Intersection": lambda n: causal() & lengths(n),
    "Union": lambda n: causal() | padding(np.arange(7) < n),
    "Complement": lambda n: ~lengths(n),
}


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_masks_that_hold_the_same_are_equal(build):
    assert build(2) == build(2)
    assert (build(2) != build(2)) is False
    assert hash(build(2)) == hash(build(2))
    assert len({build(2), build(2), build(4)}) == 2
    assert build(2) != build(4)
    assert pickle.loads(pickle.dumps(build(2))) == build(2)


def test_masks_of_other_kinds_and_shapes_differ():
    assert Lengths(np.array(3)) != Lengths(np.array([3]))
    assert Lengths(np.array(3)) != (np.array(3),)
    assert causal() & lengths(3) != causal() | lengths(3)
    assert (causal() == None) is False  # noqa: E711 — what is compared


def test_arrays_as_masks_are_equal_only_if_they_are_one():
    """They are the caller's, who may write to them."""
    mask, same = PARTS["Dense"], as_mask(PARTS["Dense"].array)
    assert mask == mask
    assert mask != same
    assert causal() & mask == causal() & mask
    assert len({mask, mask, same}) == 2


def test_a_mask_is_a_static_argument_of_jit():
    """And traced once, whichever object it is."""
    traced = []

    @partial(jax.jit, static_argnames="mask")
    def f(q, mask):
        traced.append(mask)
        return attention(q, q, q, mask=mask)[0]

    q = np.random.default_rng(0).standard_normal((2, 3, 5, 8), dtype=np.float32)
    for build in (causal, lambda: padding(np.arange(5) < 3), causal):
        want, _ = attention(q, q, q, mask=build())
        np.testing.assert_allclose(f(q, mask=build()), want, rtol=1e-5, atol=1e-5)
    assert len(traced) == 2


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"Dense"}))
def test_a_mask_that_jax_traces_is_refused(name):
    q, k = jnp.ones((2, 3, 5, 8)), jnp.ones((2, 3, 7, 8))
    with pytest.raises(
        TypeError, match=r"got a \w+ of a JAX array: under jax\.jit name it in static_argnames, or build"
    ):
        jax.jit(lambda mask: attention(q, k, k, mask=mask)[0])(EVERY[name])


@pytest.mark.parametrize("mask", [causal(), lengths(3), ~lengths(3)])
def test_so_it_is_in_a_step(mask):
    params, x = init(0, 16, 2), jnp.ones((2, 5, 16), jnp.float32)
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(TypeError, match=r"under jax\.jit name it in static_argnames"):
        jax.jit(lambda mask: step(params, x, mask=mask)[0][0])(mask)


@pytest.mark.parametrize("library", PYTREES)
@pytest.mark.parametrize("mask", EVERY.values(), ids=EVERY)
def test_a_mask_is_a_plain_pytree(mask, library):
    """By the pytrees of three libraries: its leaves are arrays and numbers, and it comes back with its type."""
    flatten, unflatten = PYTREES[library]
    leaves, spec = flatten(mask)
    assert all(leaf is None or isinstance(leaf, np.ndarray | int) for leaf in leaves)
    again = unflatten(leaves, spec)
    assert type(again) is type(mask)
    np.testing.assert_array_equal(again.dense(5, 7), mask.dense(5, 7))
    assert again.block((1, 3), (2, 5)) == mask.block((1, 3), (2, 5))


def test_jax_maps_over_the_arrays_of_a_mask():
    """`jax.tree.map` of a mask is the mask of what it holds, of JAX's arrays too."""
    mask = reduce(and_, PARTS.values())
    moved = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), mask)
    np.testing.assert_array_equal(moved.dense(5, 7), mask.dense(5, 7))


def test_a_boolean_array_is_not_copied():
    array = np.ones((7, 11), dtype=bool)
    assert as_mask(array).dense(7, 11) is not None
    assert np.shares_memory(as_mask(array).dense(7, 11), array)


def test_a_mask_can_be_sent_to_another_process():
    mask = reduce(and_, PARTS.values())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mask)).dense(5, 7), mask.dense(5, 7))


@pytest.mark.parametrize(
    ("operand", "got"),
    [
        (None, "NoneType"),
        (1, "int"),
        (True, "bool"),
        ([[True]], r"list: write np.array\(it\)"),
        (np.int64(3), "int64"),
        (np.ones((7, 7), dtype=np.int8), "dtype int8: write it != 0"),
        (np.ones((7, 7)), "dtype float64: pass it as the bias .*"),
        (jnp.ones((7, 7)), "dtype float32: pass it as the bias .*"),
    ],
)
def test_operators_refuse_what_is_no_mask(operand, got):
    for name, join in (("&", and_), (r"\|", or_)):
        message = f"^an operand of {name} must be a boolean array, True = attend, or a structured mask, got {got}$"
        with pytest.raises(TypeError, match=message):
            join(causal(), operand)
        with pytest.raises(TypeError, match=message):
            join(operand, causal())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: window(-1, 0), ValueError, "left must be at least 0, or None for no bound, got -1"),
        (lambda: window(0, -2), ValueError, "right must be at least 0, or None for no bound, got -2"),
        (lambda: window(1.0, 0), TypeError, "left must be an int, or None for no bound, got 1.0 of type float"),
        (lambda: window(0, False), TypeError, "right must be an int, or None for no bound, got False of type bool"),
        (
            lambda: causal(None),
            TypeError,
            "offset must be an int or a NumPy array of integers, got None of type NoneTy",
        ),
        (lambda: causal(True), TypeError, "offset must be an int or a NumPy array of integers, got True of type bool"),
        (lambda: causal([1]), TypeError, "offset must be an int or a NumPy array of integers, got [1] of type list"),
        (lambda: causal(np.array([1.0])), TypeError, "offset must be (...) of integers, got dtype float64"),
        (lambda: lengths(-1), ValueError, "n must be at least 0, got -1"),
        (lambda: lengths(np.array([3, -2])), ValueError, "n must be at least 0, got -2"),
        (lambda: lengths(2.0), TypeError, "n must be an int or a NumPy array of integers, got 2.0 of type float"),
        (lambda: lengths([3]), TypeError, "n must be an int or a NumPy array of integers, got [3] of type list"),
        (lambda: lengths(np.array([3.0])), TypeError, "n must be (...) of integers, got dtype float64"),
        (lambda: lengths(np.array([True])), TypeError, "n must be (...) of integers, got dtype bool"),
        (lambda: padding([True]), TypeError, "keep must be a NumPy array (..., S) of booleans, got builtins.list"),
        (lambda: padding(np.array([1, 0])), TypeError, "keep must be (..., S) of booleans, got dtype int64"),
        (lambda: padding(np.array(True)), ValueError, "keep must be (..., S), got ()"),
        (
            lambda: segments(np.zeros(3), np.zeros(5, dtype=int)),
            TypeError,
            "q_ids must be (..., T) of integers, got dtype float64",
        ),
        (
            lambda: segments(np.zeros(3, dtype=int), np.zeros(5, dtype=np.uint64)),
            TypeError,
            "k_ids must be (..., S) of integers, got dtype uint64",
        ),
        (
            lambda: segments(np.zeros((2, 7), dtype=int), np.zeros((3, 11), dtype=int)),
            ValueError,
            "k_ids must be (..., S) with ...=(2,) as in q_ids, got (3, 11)",
        ),
        (lambda: bool(causal()), TypeError, "a mask is neither true nor false: join masks with &, | and ~, and test "),
        (lambda: causal() + first(1), TypeError, "masks are joined with & (what both allow) or | (what either does)"),
        (lambda: first(np.array([3])), TypeError, "n must be an int, got array([3]) of type ndarray"),
        (lambda: chunks(0), ValueError, "n must be at least 1, got 0"),
        (lambda: chunks(2, 1.0), TypeError, "offset must be an int, got 1.0 of type float"),
        (lambda: chunks(2**63), ValueError, "n must be below 2**63, got 9223372036854775808"),
        (lambda: chunks(4, 2**63), ValueError, "offset must be below 2**62, got 9223372036854775808"),
        (lambda: chunks(4, -(2**62) - 1), ValueError, "offset must be at least -4611686018427387904, got -46116860184"),
        (lambda: first(2**64), ValueError, "n must be below 2**63, got 18446744073709551616"),
        (lambda: prefix(3.0), TypeError, "n must be an int or a NumPy array of integers, got 3.0 of type float"),
        (
            lambda: padding(np.ones(5, dtype=bool)).part((0, 1), (2, 7)),
            ValueError,
            "mask.keep must be (..., S) with S=7 or more, got (5,)",
        ),
        (
            lambda: segments(np.zeros(3, int), np.zeros(9, int)).part((2, 5), (2, 7)),
            ValueError,
            "mask.q_ids must be (..., T) with T=5 or more, got (3,)",
        ),
        (
            lambda: as_mask(np.ones((3, 9), dtype=bool)).part((2, 5), (2, 7)),
            ValueError,
            "mask must have 5 queries and 7 keys, or 1, got (3, 9)",
        ),
        (
            lambda: Spans(np.zeros(9, int), np.zeros(9, int), 5).part((2, 5), (2, 7)),
            ValueError,
            "mask must have 7 keys or more, got 5",
        ),
        (
            lambda: as_mask([True]),
            TypeError,
            "mask must be a boolean array, True = attend, or a structured mask, got list",
        ),
        (
            lambda: dense(np.ones((7, 11)), 7, 11, np.zeros(2)),
            TypeError,
            "mask must be a boolean array, True = attend, or a structured mask, got dtype float64",
        ),
    ],
)
def test_what_cannot_be_a_mask_is_refused(build, error, message):
    with pytest.raises(error) as raised:
        build()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (padding(np.ones((2, 5), dtype=bool)), "mask.keep must be (..., S) with S=11 as in k, got (2, 5)"),
        (padding(np.ones(1, dtype=bool)), "mask.keep must be (..., S) with S=11 as in k, got (1,)"),
        (
            segments(np.zeros(5, dtype=int), np.zeros(11, dtype=int)),
            "mask.q_ids must be (..., T) with T=7 as in q, got (5,)",
        ),
        (
            segments(np.zeros(7, dtype=int), np.zeros((2, 7), dtype=int)),
            "mask.k_ids must be (..., S) with S=11 as in k, got (2, 7)",
        ),
        (
            causal() & np.ones((11, 7), dtype=bool),
            "mask must broadcast to (..., H, T, S) with T=7 as in q, S=11 as in k, got (11, 7)",
        ),
        (
            causal() & np.ones((2, 11, 11), dtype=bool),
            "mask must broadcast to (..., H, T, S) with T=7 as in q, S=11 as in k, got (2, 11, 11)",
        ),
        (
            lengths(np.array([3, 4])) & lengths(np.array([3, 4, 5])),
            "mask must have parts that broadcast to one (..., H, T, S), got [(2, 1, 1, 11), (3, 1, 1, 11)]",
        ),
    ],
)
def test_a_mask_for_other_sizes_is_refused(mask, message):
    for ask in (lambda: dense(mask, 7, 11, np.zeros(2)), lambda: mask.dense(7, 11), lambda: mask.shape(7, 11)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 — the whole message is compared below
            ask()
        assert str(raised.value) == message


def test_masks_are_masks():
    assert all(isinstance(mask, Mask) for mask in EVERY_ANSWER.values())
