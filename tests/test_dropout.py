"""Dropout by seed: Philox against its published answers and plain integers, masks that no tile changes."""

import pickle
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pytrees import PYTREES

from funcmha import attention, attention_vjp
from funcmha.dropout import Masked, Seeded, masked, philox, seeded

ANSWERS = [  # Random123, tests/kat_vectors: philox4x32 10 <counter> <key> <answer>
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORDS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
SEEDS = st.integers(0, 2**64 - 1)


def words(text):
    return tuple(int(word, 16) for word in text.split())


def scalar(counter, key):
    """Philox 4x32-10 of Python integers, from the paper's figure: mulhi, mullo, swap, and bump the key. An oracle."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [right[0] ^ c[1] ^ k[0], right[1], left[0] ^ c[3] ^ k[1], left[1]]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def kept(seed, rate, b, h, i, j):
    """Whether one element is kept: the definition, in Python integers."""
    word = scalar((j // 4, i, h, b), (seed % 2**32, seed // 2**32))[j % 4]
    return word >= int(rate * 2**32)


# ── the generator ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer, xp):
    arrays = [xp.to(np.full((2, 3), word, np.uint64)) for word in words(counter)]
    got = philox(tuple(arrays), words(key))
    assert [set(xp.back(word).ravel().tolist()) for word in got] == [{word} for word in words(answer)]
    assert scalar(words(counter), words(key)) == words(answer)


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS), st.sets(st.integers(0, 3), min_size=1))
def test_philox_is_the_one_of_integers_wherever_the_arrays_stand(counter, key, arrays):
    """A word may be an integer, or an array on an axis of its own: all are mixed after three rounds, and not before."""
    given_words, shape = list(counter), [1] * 4
    for n in arrays:
        shape[n] = 2
        axis = [2 if m == n else 1 for m in range(4)]
        given_words[n] = np.array([counter[n], counter[n] ^ 1], np.uint64).reshape(axis)
        given_words[n].flags.writeable = False
    got = np.broadcast_arrays(*philox(tuple(given_words), key))
    for index in np.ndindex(*shape):
        own = tuple(word ^ i for word, i in zip(counter, index, strict=True))
        assert tuple(int(word[index]) for word in got) == scalar(own, key)


# ── the mask ─────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def tiles(draw):
    """sample, head, rows, cols: anywhere, the ends of what a counter can say among them."""
    start = st.integers(0, 40) | st.just(2**32 - 7)
    r0, c0 = draw(start), draw(start | st.just(2**34 - 13))
    rows, cols = (r0, r0 + draw(st.integers(0, 7))), (c0, c0 + draw(st.integers(0, 13)))
    place = st.integers(0, 9) | st.just(2**32 - 1)
    return draw(place), draw(place), rows, cols


@given(SEEDS, st.floats(0, 1, exclude_max=True), tiles())
@example(2**32 + 5, 0.5, (3, 2, (5, 12), (2, 15)))
@example(0, 1 - 2.0**-53, (0, 0, (0, 7), (0, 13)))
@example(0, 0.0, (0, 0, (0, 7), (0, 13)))
def test_a_tile_equals_its_definition(seed, rate, tile):
    b, h, rows, cols = tile
    got = seeded(seed, rate).tile(b, h, rows, cols)
    want = [[kept(seed, rate, b, h, i, j) for j in range(*cols)] for i in range(*rows)]
    assert got.dtype == bool
    np.testing.assert_array_equal(got, np.array(want, bool).reshape(rows[1] - rows[0], cols[1] - cols[0]))


@pytest.mark.parametrize("shape", [(2, 3, 5, 29), (2, 3, 5, 3, 7), (3, 5, 11), (5, 13), (2, 0, 5, 7), (2, 3, 5, 0)])
def test_dense_equals_its_tiles(shape):
    drop = seeded(2**40 + 7, 0.3)
    *batch, H, T, S = shape if len(shape) > 2 else (1, *shape)
    whole = drop.dense(shape)
    assert whole.shape == shape
    B, *starts = int(np.prod(batch)), *(min(n, 1) for n in (H, T, S))
    some = drop.tiles((0, B), *zip(starts, (H, T, S), strict=True))
    np.testing.assert_array_equal(some, whole.reshape(B, H, T, S)[:, starts[0] :, starts[1] :, starts[2] :])
    heads = whole.reshape(int(np.prod(batch)) * H, T, S)
    for n, (*b, h) in enumerate(np.ndindex(*batch, H)):
        sample = int(np.ravel_multi_index(b, batch)) if b else 0
        for rows in [(0, T), (1, T - 1)]:
            for cols in [(a, c) for a in range(0, S, 3) for c in range(a, S + 1, 5)]:
                got = drop.tile(sample, h, rows, cols)
                np.testing.assert_array_equal(got, heads[n, slice(*rows), slice(*cols)])


def test_large_tiles_are_drawn_in_pieces_and_are_the_same():
    drop = seeded(5, 0.5)
    whole = drop.tile(1, 2, (3, 260), (1, 515))
    pieces = [drop.tile(1, 2, (r, r + 1), (1, 515)) for r in range(3, 260)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    long = drop.tile(0, 0, (0, 2), (0, 40_000))
    np.testing.assert_array_equal(long[:, 39_000:], drop.tile(0, 0, (0, 2), (39_000, 40_000)))


@pytest.mark.parametrize(
    ("first", "part"),
    [
        ({"first_sample": 3}, np.s_[3:]),
        ({"first_head": 2}, np.s_[:, 2:]),
        ({"first_query": 3}, np.s_[:, :, 3:]),
        ({"first_key": 6}, np.s_[..., 6:]),
        ({"first_sample": 1, "first_head": 1, "first_query": 1, "first_key": 1}, np.s_[1:, 1:, 1:, 1:]),
    ],
    ids=str,
)
def test_who_holds_a_part_draws_its_part(first, part):
    whole = seeded(7, 0.4).dense((5, 3, 7, 11))
    np.testing.assert_array_equal(seeded(7, 0.4, **first).dense(whole[part].shape), whole[part])


def test_a_mask_is_in_the_library_of_like(xp):
    drop, like = seeded(7, 0.4), xp.to(np.zeros(2))
    for got, want in (
        (drop.dense((2, 5, 7), like), drop.dense((2, 5, 7))),
        (drop.tile(1, 2, (3, 5), (2, 9), like), drop.tile(1, 2, (3, 5), (2, 9))),
    ):
        assert type(got) is type(like)
        np.testing.assert_array_equal(xp.back(got), want)


def test_a_mask_is_one_of_jax():
    got = seeded(7, 0.4).dense((2, 5, 7), jnp.zeros(2))
    assert isinstance(got, jnp.ndarray)
    np.testing.assert_array_equal(np.asarray(got), seeded(7, 0.4).dense((2, 5, 7)))


@pytest.mark.parametrize("shape", [(2, 3, 5, 11), (3, 5, 4), (5, 7), (2, 3, 0, 7)], ids=str)
def test_jax_draws_the_same_bits(shape):
    """From words of 32 bits, at the ends of what a counter holds too. Oracle: NumPy's words of 64."""
    first = {"first_sample": 1, "first_head": 2**32 - 3, "first_query": 2**32 - 6, "first_key": 2**34 - 13}
    drop = seeded(2**64 - 2**33 + 7, 0.6, **first)
    like = jnp.zeros(1)
    np.testing.assert_array_equal(drop.dense(shape, like), drop.dense(shape))
    np.testing.assert_array_equal(drop.tile(1, 2, (3, 5), (2, 9), like), drop.tile(1, 2, (3, 5), (2, 9)))
    apart = drop.part((0, 5), (0, 9))._replace(step=2, first_query=1, first_key=3)
    np.testing.assert_array_equal(apart.tile(1, 2, (3, 5), (2, 9), like), apart.tile(1, 2, (3, 5), (2, 9)))


def test_a_traced_seed_puts_no_booleans_into_the_program():
    """Nor does the program grow with the rounds, which are a loop."""
    drop = seeded(7, 0.5)
    traced = jax.make_jaxpr(lambda x: drop.dense((2, 3, 64, 64), x))(jnp.zeros(1))
    assert sum(np.asarray(a).nbytes for a in traced.consts) < 100
    assert len(traced.jaxpr.eqns) < 60


def test_a_seeded_mask_is_a_value():
    drop = seeded(np.int64(7), 0.25, first_head=np.int32(2))
    assert drop == Seeded(7, 0.25, 0, 2, 0, 0) == pickle.loads(pickle.dumps(drop))
    assert hash(drop) == hash(Seeded(7, 0.25, 0, 2))
    assert drop != seeded(8, 0.25, first_head=2)
    assert {type(x) for x in (drop.seed, drop.first_head)} == {int}
    assert drop.tile(0, 0, (0, 9), (0, 9)).tolist() == drop.tile(0, 0, (0, 9), (0, 9)).tolist()


def test_attention_drops_by_tiles_as_by_the_whole():
    """Two halves of the batch with their own offsets: the outputs and gradients of the whole."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal(s) for s in ((4, 3, 5, 2), (4, 3, 7, 2), (4, 3, 7, 2), (4, 3, 5, 2)))
    drop = seeded(3, 0.4)
    o, cache = attention(q, k, v, dropout=masked(drop.dense((4, 3, 5, 7)), drop.rate))
    grads = attention_vjp(cache, do)
    for n in (0, 2):
        part = np.s_[n : n + 2]
        keep = seeded(3, 0.4, first_sample=n).dense((2, 3, 5, 7))
        o_part, cache = attention(q[part], k[part], v[part], dropout=masked(keep, drop.rate))
        np.testing.assert_allclose(o_part, o[part], rtol=1e-12, atol=1e-12)
        for got, want in zip(attention_vjp(cache, do[part])[:3], grads, strict=False):
            np.testing.assert_allclose(got, want[part], rtol=1e-12, atol=1e-12)


# ── a mask with its rate ─────────────────────────────────────────────────────────────────────────────────────────

KEEP = np.random.default_rng(0).random((2, 3, 5, 7)) < 0.6


def test_dropout_by_a_seed_is_dropout_by_its_mask():
    """Outputs and gradients, bit for bit. Oracle: the mask that the seed stands for, made whole."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal(s) for s in ((2, 3, 5, 2), (2, 3, 7, 2), (2, 3, 7, 2), (2, 3, 5, 2)))
    drop = seeded(3, 0.4)
    (o, cache), (want, cache_want) = (
        attention(q, k, v, dropout=d) for d in (drop, masked(drop.dense((2, 3, 5, 7)), drop.rate))
    )
    assert np.array_equal(o, want)
    for a, b in zip(attention_vjp(cache, do)[:3], attention_vjp(cache_want, do)[:3], strict=True):
        assert np.array_equal(a, b)


def test_a_mask_is_taken_as_it_is():
    """No copy, no other shape: what broadcasts stays small."""
    drop = masked(KEEP[0, :1], np.float32(0.5))
    assert drop.keep.base is not None
    assert np.shares_memory(drop.dense((2, 3, 5, 7)), KEEP)
    assert drop.dense((2, 3, 5, 7)).shape == (1, 5, 7)
    assert type(drop.rate) is float
    assert drop.rate == 0.5


@pytest.mark.parametrize(
    ("keep", "want"),
    [(KEEP, KEEP[:, 1:3]), (KEEP[0], KEEP[0, 1:3]), (KEEP[:, :1], KEEP[:, :1]), (KEEP[0, 0], KEEP[0, 0])],
    ids=["batch", "heads", "broadcast", "no heads"],
)
def test_heads_of_a_mask(keep, want):
    """Those heads where there is a head axis; the mask as it is where all heads share it."""
    part = masked(keep, 0.5).heads(slice(1, 3))
    assert type(part) is Masked
    assert np.array_equal(part.keep, want)
    assert part.rate == 0.5


def test_heads_of_a_seed():
    """Oracle: the same heads of the whole."""
    whole = seeded(7, 0.4).dense((2, 5, 3, 7))
    assert np.array_equal(seeded(7, 0.4).heads(slice(2, 4)).dense((2, 2, 3, 7)), whole[:, 2:4])
    assert seeded(7, 0.4).heads(slice(None)) == seeded(7, 0.4)


@pytest.mark.parametrize("library", PYTREES)
@pytest.mark.parametrize("drop", [masked(KEEP, 0.3), seeded(2024, 0.3, first_head=2)], ids=["mask", "seed"])
def test_dropout_is_a_plain_pytree(drop, library):
    """By the pytrees of three libraries: arrays and numbers, and the type comes back."""
    flatten, unflatten = PYTREES[library]
    leaves, spec = flatten(drop)
    assert all(isinstance(leaf, np.ndarray | int | float) for leaf in leaves)
    again = unflatten(leaves, spec)
    assert type(again) is type(drop)
    assert np.array_equal(again.dense((2, 3, 5, 7)), drop.dense((2, 3, 5, 7)))
    assert again.rate == drop.rate


# ── statistics, at fixed seeds ───────────────────────────────────────────────────────────────────────────────────

N = 512


def assert_binomial(hits, p):
    """The number of hits among independent trials is within 5 standard deviations of what is expected."""
    n = hits.size
    assert abs(np.count_nonzero(hits) - n * p) <= 5 * sqrt(n * p * (1 - p))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_one_minus_the_rate(rate):
    keep = seeded(11, rate).dense((N, N))
    assert_binomial(keep, 1 - rate)
    for n in range(4):  # each of the four words on its own
        assert_binomial(keep[:, n::4], 1 - rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    """Along keys (within a counter and from one to the next), queries, heads, samples, and from seed to seed."""
    drop = seeded(11, rate)
    here = drop.tile(0, 0, (0, N), (0, N))
    others = {
        **{f"key + {n}": drop.tile(0, 0, (0, N), (n, N + n)) for n in (1, 2, 3, 4, 5, 8)},
        **{f"query + {n}": drop.tile(0, 0, (n, N + n), (0, N)) for n in (1, 2)},
        "head": drop.tile(0, 1, (0, N), (0, N)),
        "sample": drop.tile(1, 0, (0, N), (0, N)),
        "seed": seeded(12, rate).tile(0, 0, (0, N), (0, N)),
        "high half of the seed": seeded(11 + 2**32, rate).tile(0, 0, (0, N), (0, N)),
        "the transpose": here.T,
    }
    for name, there in others.items():
        strict_upper = np.triu(np.ones((N, N), bool), 1) if name == "the transpose" else np.ones((N, N), bool)
        same = here[strict_upper] == there[strict_upper]
        assert_binomial(same, rate**2 + (1 - rate) ** 2)


@pytest.mark.parametrize("j", range(4))
def test_the_rate_is_met_to_two_to_the_minus_32(j):
    """A word equal to the threshold is kept, one below it is not."""
    word = scalar((0, 0, 0, 0), (0, 0))[j]
    for step, keep in ((0, True), (1, False), (0.5, True)):
        assert seeded(0, (word + step) / 2**32).tile(0, 0, (0, 1), (j, j + 1))[0, 0] == keep


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: seeded(-1, 0.1), ValueError, r"seed must be at least 0, got -1"),
        (
            lambda: seeded(2**64, 0.1),
            ValueError,
            r"seed must be below 2\*\*64, got 18446744073709551616",
        ),
        (lambda: seeded(1.0, 0.1), TypeError, "seed must be an int, got 1.0 of type float"),
        (lambda: seeded(True, 0.1), TypeError, "seed must be an int, got True of type bool"),
        (lambda: seeded(1, 1.0), ValueError, "rate must be at least 0 and below 1, got 1.0"),
        (lambda: seeded(1, -0.1), ValueError, "rate must be at least 0 and below 1, got -0.1"),
        (lambda: seeded(1, float("nan")), ValueError, "rate must be at least 0 and below 1, got nan"),
        (lambda: seeded(1, "0.1"), TypeError, "rate must be a real number, got '0.1' of type str"),
        (lambda: masked(None, 0.1), TypeError, "keep must be a boolean array, True = keep, got None"),
        (lambda: masked(True, 0.1), TypeError, "keep must be a boolean array, True = keep, got bool"),
        (lambda: masked([True], 0.1), TypeError, "keep must be a boolean array, True = keep, got list"),
        (lambda: masked(np.ones(7), 0.1), TypeError, "keep must be boolean, True = keep, got dtype float64"),
        (lambda: masked(KEEP, 1.5), ValueError, "rate must be at least 0 and below 1, got 1.5"),
        (lambda: masked(KEEP, -0.5), ValueError, "rate must be at least 0 and below 1, got -0.5"),
        (lambda: masked(KEEP, None), TypeError, "rate must be a real number, got None of type NoneType"),
        (lambda: masked(KEEP, KEEP), TypeError, "rate must be a real number, got"),
        (lambda: seeded(1, 0.1, first_head=-1), ValueError, r"first_head must be at least 0, got -1"),
        (lambda: seeded(1, 0.1, first_key=2**34), ValueError, r"first_key must be below 2\*\*34, got"),
        (lambda: seeded(1, 0.1).dense((5,)), ValueError, r"shape must be \(..., H, T, S\) or \(T, S\), got \(5,\)"),
        (
            lambda: seeded(1, 0.1, first_sample=5).tile(2**32 - 5, 0, (0, 1), (0, 1)),
            ValueError,
            "sample must be within 0 … 4294967291, got 4294967291 … 4294967292",
        ),
        (lambda: seeded(1, 0.1).tile(0, -1, (0, 1), (0, 1)), ValueError, "head must be within 0 … 4294967296, got -1"),
        (lambda: seeded(1, 0.1).tile(0, 0, (3, 1), (0, 1)), ValueError, "rows must be within 0 … 4294967296, got 3"),
        (
            lambda: seeded(1, 0.1).tile(0, 0, (0, 1), (2**34 - 1, 2**34 + 1)),
            ValueError,
            "cols must be within 0 … 17179869184, got 17179869183 … 17179869185",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
