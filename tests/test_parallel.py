"""Attention on many ranks equals attention in one process: values, gradients, bits, bytes, memory, failures.

The oracles are torch's autograd in float64, and one process. Ranks are threads.
"""

import threading
import time
import tracemalloc
import weakref

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import ranks
import torch
from hypothesis import example, given
from test_ops import close

from funcmha import attention, attention_vjp, attention_weights, biases, dropout, log_sum_exp, masks, parallel
from funcmha._arguments import check_attention
from funcmha.parallel import pieces, travel
from funcmha.testing.strategies import MODERN, AttentionProblem, attention_problems
from funcmha.testing.tolerance import assert_within, attention_bounds

RING = ("contiguous", "zigzag", "striped")
NAMES = ("o", "lse", "dq", "dk", "dv")
FAIR = {"gain": st.sampled_from([1e-3, 1.0, 10.0])}
every_scheme = pytest.mark.parametrize("scheme", RING)


def one_process(problem, dtype, arrays=None):
    """o, lse, dq, dk, dv, dbias, dsink"""
    do, _, dlse = problem.cotangents(dtype)
    o, cache = attention(*(arrays or problem.inputs(dtype)), **problem.static())
    return o, log_sum_exp(cache), *attention_vjp(cache, do, dlse=dlse)


def by_torch(problem):
    """The same by torch's autograd, in float64"""
    *inputs, do, _, dlse = *problem.inputs("float64"), *problem.cotangents("float64")
    leaves = [oracles.tensor(a) for a in inputs]
    o, _, lse = oracles.attention(*leaves, **problem.static())
    grads = oracles.gradients([o, torch.where(torch.isinf(lse), 0.0, lse)], [do, dlse], leaves)
    return o.detach().numpy(), lse.detach().numpy(), *grads


def compare(got, want, same):
    """Every result, and dbias and dsink of every rank, by same(got, want, name)"""
    for name, a, b in zip(NAMES, got, want, strict=False):
        same(a, b, name)
    for name, of_ranks, b in zip(("dbias", "dsink"), got[5:], want[5:], strict=True):
        for a in of_ranks:
            same(ranks.values(a), ranks.values(b), name)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@given(attention_problems(**MODERN | FAIR), st.integers(1, 9), st.sampled_from(RING))
@example(AttentionProblem(T=13, S=17, mask="causal", sink=True, rate=0.3, seeded=True), 3, "striped")
@example(AttentionProblem(T=13, S=17, mask="window", bias="... H T+S-1"), 5, "striped")
@example(AttentionProblem(T=13, S=17, mask="chunks", bias="T+S-1"), 4, "zigzag")
@example(AttentionProblem(T=2, S=1, mask="empty rows", bias="T 1"), 9, "zigzag")
def test_a_ring_matches_torch(problem, n, scheme):
    compare(ranks.run(problem, n, scheme, "float64"), by_torch(problem), close)


@given(attention_problems(**MODERN), st.integers(2, 9), st.sampled_from(RING))
@example(AttentionProblem(T=64, S=65, mask="causal", gain=1e4, sink=True), 4, "zigzag")
def test_a_ring_in_float32_is_within(problem, n, scheme):
    """The bounds of one process, saturated rows too; twice them, for the sums of the parts."""
    q, k, v, bias, sink = problem.inputs("float32")
    do, _, dlse = problem.cotangents("float32")
    options = problem.static() | {"sink": sink, "dlse": dlse, "dtype": "float32"}
    bounds = attention_bounds(q, k, v, bias, do, **options)
    wide = [
        None if a is None else a.map(np.float64) if hasattr(a, "map") else a.astype("float64")
        for a in (q, k, v, bias, sink)
    ]
    o, cache = attention(*wide, **problem.static(), engine="sequential")
    want = o, log_sum_exp(cache), *attention_vjp(cache, do.astype("float64"), dlse=dlse.astype("float64"))

    def same(got, want, name):
        if want is not None:
            assert got.dtype == np.float32
            assert_within(got, want, ranks.values(getattr(bounds, name)), factor=2, name=name)

    compare(ranks.run(problem, n, scheme, "float32"), want, same)


@pytest.mark.parametrize("scheme", RING)
@pytest.mark.parametrize("n", [2, 3])
def test_one_key_for_each_query_has_no_gradient(n, scheme):
    """Queries times 100 and values 100 from 0: 1e-4 and 1e-2, where p (dp − δ) was taken as it stands."""
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, 128, 64), dtype=np.float32)

    def of_rank(comm):
        line = parallel.Line(comm, scheme)
        i = line.positions(128)
        parts = (100 * q[:, i], k[:, i], 100 + v[:, i])
        _, cache = parallel.attention(line, *parts, mask=masks.window(0, 0))
        return parallel.attention_vjp(cache, do[:, i])

    for dq, dk, dv, *_ in parallel.threads(n).run(of_rank):
        assert not dq.any()
        assert not dk.any()
        assert dv.any()


@given(attention_problems(**MODERN | FAIR), st.integers(1, 9), st.sampled_from([*RING, (2, 2), (4, 2)]))
@example(AttentionProblem(T=13, S=17, K=4, mask="causal", sink=True, rate=0.3, seeded=True), 1, (4, 2))
@example(AttentionProblem(T=13, S=17, mask="window", bias="... H T+S-1", gain=10.0), 5, "striped")
def test_weights_and_their_cotangent_match_torch(problem, n, scheme):
    """Of this rank's queries, over all keys in their order."""
    if isinstance(scheme, tuple):
        n, scheme = (scheme[0] * scheme[1], scheme) if problem.K == 4 else (n, "zigzag")
    inputs, do, dweights, dlse = problem.inputs("float64"), *problem.cotangents("float64")
    leaves = [oracles.tensor(a) for a in inputs]
    o, p, lse = oracles.attention(*leaves, **problem.static())
    finite = torch.where(torch.isinf(lse), 0.0, lse)
    want = oracles.gradients([o, p, finite], [do, dweights, dlse], leaves)

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        i, j = line.positions(problem.T), line.positions(problem.S)
        q, k, v, bias, sink = inputs
        parts = (np.take(a, at, axis=-2) for a, at in ((q, i), (k, j), (v, j)))
        _, cache = parallel.attention(line, *parts, bias, sink, **problem.static())
        close(attention_weights(cache), np.take(p.detach().numpy(), i, axis=-2), "weights")
        cotangents = {"dweights": np.take(dweights, i, axis=-2), "dlse": np.take(dlse, i, axis=-1)}
        dq, dk, dv, dbias, dsink = parallel.attention_vjp(cache, np.take(do, i, axis=-2), **cotangents)
        for got, whole, at in ((dq, want[0], i), (dk, want[1], j), (dv, want[2], j)):
            close(got, np.take(whole, at, axis=-2))
        close(ranks.values(dbias), ranks.values(want[3]), "dbias")
        close(dsink, want[4], "dsink")

    parallel.threads(n).run(of_rank)


@pytest.mark.parametrize("scheme", ["zigzag", "heads"])
def test_the_gradient_of_the_sink_keeps_axes_of_the_batch(scheme):
    problem = AttentionProblem(batch=(2, 3), T=5, S=7, K=2, G=1, sink=True)
    q, k, v, _, sink = problem.inputs("float64")
    do, *_ = problem.cotangents("float64")
    *_, want = attention_vjp(attention(q, k, v, None, sink)[1], do, batch_axes=1)

    def of_rank(comm):
        line = parallel.Line(comm, scheme)
        i, j = line.positions(5), line.positions(7)
        _, cache = parallel.attention(
            line, *(np.take(a, at, axis=-2) for a, at in ((q, i), (k, j), (v, j))), None, sink
        )
        return parallel.attention_vjp(cache, np.take(do, i, axis=-2), batch_axes=1)[4]

    for dsink in parallel.threads(2).run(of_rank):
        close(dsink, want)


@given(
    attention_problems(**MODERN | FAIR, K=st.just(4), batch=st.sampled_from([(), (2,)])),
    st.sampled_from([(2, 1), (4, 1), (2, 2), (2, 3), (1, 3), (4, 2)]),
)
@example(
    AttentionProblem(T=13, S=17, K=4, G=2, mask="heads", bias="... H T S", sink=True, per_head=True, scale=1.0), (4, 2)
)
def test_heads_and_grids_match_torch(problem, scheme):
    compare(ranks.run(problem, scheme[0] * scheme[1], scheme, "float64"), by_torch(problem), close)


@pytest.mark.slow
@every_scheme
@pytest.mark.parametrize("n", [2, 3])
def test_tiles_of_long_pieces_match_one_process(n, scheme):
    """Of more queries than the engine's tiles have, with everything that they take."""
    problem = AttentionProblem(
        batch=(2,), T=1201, S=1303, K=1, G=2, mask="intersection", bias="... H T+S-1", sink=True, rate=0.3,
        seeded=True, softcap=5.0, scale=1.0, per_head=True,
    )  # fmt: skip
    compare(ranks.run(problem, n, scheme, "float64"), one_process(problem, "float64"), close)


@pytest.mark.parametrize("bias", ["none", "... H T S", "... H T+S-1"])
def test_tiles_and_blocks_of_a_piece_agree(bias):
    problem = AttentionProblem(batch=(2,), T=97, S=101, mask="window", bias=bias, softcap=5.0, rate=0.3, seeded=True)
    q, k, v, given_bias, _ = problem.inputs("float64")
    do, dweights, dlse = problem.cotangents("float64")
    _, x = pieces_options(problem)
    piece = pieces.Piece(5.0 * q, k, v, biases.as_bias(given_bias), x)
    in_tiles, in_blocks = pieces.attend(piece), pieces._attend_in_blocks(piece)
    close(in_tiles.o, in_blocks.o)
    close(in_tiles.lse, in_blocks.lse)
    np.testing.assert_array_equal(in_tiles.dominant, in_blocks.dominant)
    assert (in_tiles.dominant >= 0).sum() > 100
    dominant = np.where(in_tiles.dominant % 2, in_tiles.dominant, -1)
    for sums in (in_tiles, in_blocks):
        y = pieces.Cotangents(sums, do, dlse, dweights, dominant, dlse)
        close(pieces.sum_dz(piece, y), pieces._sum_dz_in_blocks(piece, y))
        close(pieces.weights(piece, sums), pieces._weights_in_blocks(piece, sums))
        for a, b in zip(pieces.attend_vjp(piece, y), pieces._attend_in_blocks_vjp(piece, y), strict=True):
            close(*(getattr(g, "values", g) for g in (a, b)))


def pieces_options(problem):
    q, k, v, bias, sink = problem.inputs("float64")
    return check_attention(q, k, v, bias, sink, problem.static())


@every_scheme
@given(attention_problems(**MODERN | FAIR), st.integers(1, 5))
@example(AttentionProblem(T=13, S=17, mask="causal", bias="T+S-1", sink=True, rate=0.3), 4)
def test_the_specification_matches_torch(scheme, problem, n):
    compare(ranks.run(problem, n, scheme, "float64", pair=parallel.specification), by_torch(problem), close)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["zigzag", (2, 2)])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype, scheme):
    """One unit in the last place of one process, whose inputs are upcast: partial results are not rounded."""
    problem = AttentionProblem(T=29, S=31, K=4, G=2, mask="causal", bias="T+S-1", sink=True)
    arrays = problem.inputs(dtype)
    wide = [a.map(lambda x: x.astype("float32")) if hasattr(a, "map") else a.astype("float32") for a in arrays]
    do, _, dlse = problem.cotangents(dtype)
    o, cache = attention(*wide, **problem.static())
    want = o, log_sum_exp(cache), *attention_vjp(cache, do.astype("float32"), dlse=dlse.astype("float32"))
    one_unit = float(ml_dtypes.finfo(dtype).eps)

    def same(got, want, name):
        assert got.dtype == (np.float32 if name == "lse" else dtype)
        np.testing.assert_allclose(got.astype("float32"), want, rtol=one_unit, atol=1e-5)

    compare(ranks.run(problem, 4, scheme, dtype), want, same)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_does_not_grow_with_the_ranks(dtype):
    """ring-flash-attention #42: partial results in 16 bits drift. Here up to 64 ranks have the error of one."""
    problem = AttentionProblem(batch=(), T=128, S=128, K=1, G=1, D=8, E=8, mask="causal")
    want = one_process(problem, "float64")[:5]

    def error(n):
        got = ranks.run(problem, n, "zigzag", dtype)[:5]
        return [np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(got, want, strict=True)]

    of_one = error(1)
    for n in (4, 16, 64):
        assert np.all(np.array(error(n)) <= 1.5 * np.array(of_one) + 1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_rows_of_the_least_number_share_their_keys(n):
    """A bias of the least number of its dtype, in the place of −∞ in all of a row: each key has the same weight."""
    problem = AttentionProblem(batch=(), T=6, S=7, K=1, G=1)
    q, k, v, *_ = problem.inputs("float32")
    bias = np.full((1, 6, 7), np.finfo(np.float32).min)
    got = ranks.run(problem, n, "zigzag", "float32", arrays=(q, k, v, bias, None))
    want = one_process(problem, "float32", (q, k, v, bias, None))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[4], want[4], rtol=1e-5, atol=1e-6)


@every_scheme
@pytest.mark.parametrize("sink", [None, np.linspace(-1, 1, 6)], ids=["no sink", "sink"])
def test_what_no_query_attends_has_no_effect(scheme, sink):
    """NaN in a fully masked query, its cotangent, and in a key that no query of any rank attends."""
    problem = AttentionProblem(T=13, S=13, mask="causal")
    q, k, v, *_ = (np.array(a) if a is not None else None for a in problem.inputs("float64"))
    do, _, _ = problem.cotangents("float64")
    do = np.array(do)
    mask = masks.causal() & masks.padding(np.arange(13) > 4)
    want, cache = attention(q, k, v, None, sink, mask=mask)
    want_grads = attention_vjp(cache, do)
    for a, places in ((q, [0, 3]), (do, [0, 3]), (k, [4, 0]), (v, [4, 0])):
        a[..., places, :] = np.nan

    def of_rank(comm):
        line = parallel.Line(comm, scheme)
        i = line.positions(13)
        o, own = parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :], None, sink, mask=mask)
        dq, dk, dv, _, dsink = parallel.attention_vjp(own, do[..., i, :])
        close(dsink, want_grads[4])
        return i, (o, dq, dk, dv)

    for i, results in parallel.threads(3).run(of_rank):
        for got, whole in zip(results, (want, *want_grads[:3]), strict=True):
            close(got, whole[..., i, :])


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    attention_problems(**MODERN, layout=st.just("contiguous")),
    st.sampled_from([*RING, "heads"]),
    st.sampled_from(["float32", "float64"]),
)
@example(AttentionProblem(T=65, S=130, K=2, G=2, mask="causal", sink=True), "zigzag", "float32")
def test_one_rank_has_the_bits_of_one_process(problem, scheme, dtype):
    scheme = "zigzag" if scheme == "heads" and not problem.K else scheme

    def same(got, want, name):
        assert got is want is None or np.array_equal(got, want, equal_nan=True), name

    compare(ranks.run(problem, 1, scheme, dtype), one_process(problem, dtype), same)


class Slow(parallel.Comm):
    """A carrier whose transfers take their time: each wait a different one."""

    def __init__(self, comm, seed):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.rng = np.random.default_rng([seed, comm.rank])

    def shift(self, sends, receives):
        wait, late = self.comm.shift(sends, receives), self.rng.random() * 3e-3

        def slowly():
            time.sleep(late)
            wait()

        return slowly


@pytest.mark.parametrize("scheme", [*RING, (2, 2)])
def test_the_order_of_arrival_changes_no_bit(scheme):
    problem = AttentionProblem(
        T=37, S=41, K=2, G=2, mask="causal", bias="... H T+S-1", sink=True, rate=0.3, seeded=True
    )
    first = ranks.run(problem, 4, scheme, "float32")
    for seed in range(3):
        again = ranks.run(problem, 4, scheme, "float32", wrap=lambda comm, seed=seed: Slow(comm, seed))
        compare(
            again, (*first[:5], first[5][0], first[6][0]), lambda a, b, name: np.testing.assert_array_equal(a, b, name)
        )


def test_a_seed_drops_the_same_weights_on_any_number_of_ranks():
    """Values that tell which keys were kept: o of one query is Σ of its powers of two."""
    T = 12
    q, k = np.zeros((2, 1, T, 1)), np.zeros((2, 1, T, 1))
    v = np.broadcast_to(2.0 ** np.arange(T)[:, None], (2, 1, T, 1))
    drop = dropout.seeded(7, 0.5)
    keep = drop.dense((2, 1, T, T))
    want = (keep @ v) / T * 2
    for n, scheme in ((1, "zigzag"), (2, "striped"), (5, "striped"), (3, "contiguous"), (7, "zigzag")):

        def of_rank(comm, scheme=scheme):
            line = parallel.Line(comm, scheme)
            i = line.positions(T)
            return i, parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :], dropout=drop)[0]

        for i, o in parallel.threads(n).run(of_rank):
            np.testing.assert_allclose(o, want[..., i, :], rtol=1e-14)


# ── bugs that others had ─────────────────────────────────────────────────────────────────────────────────────────


def own_statistics(attend_vjp):
    """tt-metal #53205: δ of the part's own output, of which the whole is a mean."""

    def wrong(piece, y):
        part, all_keys = pieces.attend(piece), y.all_keys
        share = (part.total * 2.0 ** (part.shift - all_keys.shift) / all_keys.total)[..., None]
        return attend_vjp(piece, y._replace(r=y.r + np.sum(y.do * (all_keys.o - share * part.o), axis=-1)))

    return wrong


def own_mean(attend_vjp):
    """picotron #37: δ summed over the keys of the part alone."""

    def wrong(piece, y):
        part = pieces.attend(piece)
        return attend_vjp(piece, y._replace(r=y.r + np.sum(y.do * (y.all_keys.o - part.o), axis=-1)))

    return wrong


def stale(travelling):
    """diffusers #14265: the gradient takes this rank's own keys and values every time."""

    def wrong(comm, layout, kv, S, ways):
        for step, here in travelling(comm, layout, kv, S, ways):
            yield step, here and tuple(own[..., : a.shape[-2], :] for own, a in zip(kv, here, strict=True))

    return wrong


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(pieces, "attend_vjp", own_statistics), (pieces, "attend_vjp", own_mean), (travel, "travelling", stale)],
    ids=["tt-metal 53205", "picotron 37", "diffusers 14265"],
)
def test_a_published_bug_is_seen(monkeypatch, where, name, fault):
    """In dq and dk, at least; none of them changes dv alone."""
    problem = AttentionProblem(T=12, S=12, mask="causal")
    want = by_torch(problem)
    forward = ranks.run(problem, 3, "zigzag", "float64")
    monkeypatch.setattr(where, name, fault(getattr(where, name)))
    got = ranks.run(problem, 3, "zigzag", "float64")
    close(forward[2], want[2])
    for i in (2, 3):
        assert np.abs(got[i] - want[i]).max() > 1e-3


# ── what moves, and when ─────────────────────────────────────────────────────────────────────────────────────────


class Recorded(parallel.Comm):
    """A carrier that notes what is sent and when."""

    def __init__(self, comm, log):
        self.comm, self.rank, self.size, self.log = comm, comm.rank, comm.size, log

    def shift(self, sends, receives):
        self.log.append(("begin", self.rank, [(to, x.nbytes, x.dtype) for x, to in sends]))
        wait = self.comm.shift(sends, receives)

        def waited():
            self.log.append(("wait", self.rank, None))
            wait()

        return waited


def bytes_sent(log, dtype=None):
    """Of arrays of floats, by rank"""
    sent = {}
    for kind, rank, what in log:
        for _, size, of in what if kind == "begin" else ():
            if of.kind == "f" and (dtype is None or of == dtype):
                sent[rank] = sent.get(rank, 0) + size
    return sent


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_ring_sends_what_the_formula_says(n):
    """(n − 1)/n · T · K (D + E) numbers from each rank; backward those again, and dk and dv, which are float32"""
    problem = AttentionProblem(batch=(), T=30, S=30, K=2, G=3, D=5, E=7, gain=1e-3)
    log = []
    q, k, v, *_ = problem.inputs("float16")

    def of_rank(comm):
        line = parallel.Line(Recorded(comm, log), "contiguous")
        i = line.positions(30)
        o, cache = parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :])
        forward = [*log]
        parallel.attention_vjp(cache, o)
        return forward

    parallel.threads(n).run(of_rank)
    numbers = (n - 1) * (30 // n) * 2 * (5 + 7)
    assert bytes_sent(log, np.float16) == dict.fromkeys(range(n), 2 * numbers * 2)
    assert bytes_sent(log, np.float32) == dict.fromkeys(range(n), 4 * numbers)


def test_heads_send_what_the_formula_says():
    """(n − 1)/n² · T · (H + K)(D + E) numbers from each rank, and lse"""
    n, T, H, K, D, E = 4, 32, 8, 4, 5, 7
    problem = AttentionProblem(batch=(), T=T, S=T, K=K, G=H // K, D=D, E=E)
    log = []
    q, k, v, *_ = problem.inputs("float64")

    def of_rank(comm):
        line = parallel.Line(Recorded(comm, log), "heads")
        i = line.positions(T)
        return parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :])[0]

    parallel.threads(n).run(of_rank)
    numbers = (n - 1) * T * (H * D + K * (D + E) + H * E + H) // n**2
    assert bytes_sent(log) == dict.fromkeys(range(n), 8 * numbers)


def test_parts_that_a_mask_empties_are_not_sent():
    """A window that reaches one part back: each part goes one step, and none comes round to the first rank."""
    problem = AttentionProblem(batch=(), T=60, S=60, K=1, G=1, D=4, E=4, gain=1e-3)
    log = []
    q, k, v, *_ = problem.inputs("float64")

    def of_rank(comm):
        line = parallel.Line(Recorded(comm, log), "contiguous")
        i = line.positions(60)
        o, cache = parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :], mask=masks.window(9, 0))
        parallel.attention_vjp(cache, o)

    parallel.threads(6).run(of_rank)
    part = 8 * 10 * (4 + 4)
    assert bytes_sent(log) == {0: 2 * part, **dict.fromkeys(range(1, 5), 3 * part), 5: part}


def test_transfers_begin_before_the_computation_that_hides_them(monkeypatch):
    """Forward and backward: while a rank computes with one part, the next one is on its way."""
    problem, log, this = AttentionProblem(T=12, S=12, gain=1e-3), [], threading.local()
    q, k, v, *_ = problem.inputs("float64")
    for name in ("attend", "attend_vjp"):
        f = getattr(pieces, name)
        monkeypatch.setattr(pieces, name, lambda *args, f=f: (log.append(("compute", this.rank, None)), f(*args))[1])

    def of_rank(comm):
        this.rank = comm.rank
        line = parallel.Line(Recorded(comm, log), "contiguous")
        i = line.positions(12)
        o, cache = parallel.attention(line, q[..., i, :], k[..., i, :], v[..., i, :])
        parallel.attention_vjp(cache, o)

    parallel.threads(3).run(of_rank)
    for rank in range(3):
        own = [(kind, len(what or ())) for kind, of, what in log if of == rank]
        forward = [("begin", 2), ("compute", 0), ("wait", 0)] * 2 + [("begin", 0), ("compute", 0), ("wait", 0)]
        backward = [("begin", 2), ("compute", 0), ("wait", 0), ("begin", 2), ("compute", 0)]  # then dk and dv leave
        backward += [("begin", 2), ("wait", 0), ("begin", 0), ("compute", 0), ("wait", 0), ("begin", 2)]
        assert own[4:] == [*forward, *own[13:17], *backward, ("wait", 0), ("wait", 0)]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Counted(parallel.Comm):
    """A carrier that notes how many bytes of what it has received are still alive, whenever more begins to come."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.received, self.most = [], 0

    def shift(self, sends, receives):
        self.received = [(ref, size) for ref, size in self.received if ref() is not None]
        self.received += [(weakref.ref(x), x.nbytes) for x, _ in receives if x.dtype.kind == "f"]
        self.most = max(self.most, sum(size for _, size in self.received))
        return self.comm.shift(sends, receives)


@pytest.mark.parametrize("n", [4, 8])
def test_no_part_of_another_rank_is_kept(n):
    """Two at a time, the one that is computed and the one that comes, and as many of their gradients: O(1 / n)."""
    problem = AttentionProblem(batch=(), T=64, S=64, K=2, G=1, D=8, E=8)
    q, k, v, *_ = problem.inputs("float64")

    def of_rank(comm):
        counted = Counted(comm)
        line = parallel.Line(counted)
        i = line.positions(64)
        o, cache = parallel.attention(line, *(np.take(a, i, axis=-2) for a in (q, k, v)))
        forward = counted.most
        parallel.attention_vjp(cache, o)
        return forward, counted.most

    part = 8 * 2 * (64 // n) * (8 + 8)
    for forward, most in parallel.threads(n).run(of_rank):
        assert forward == 2 * part
        assert most <= 4 * part


def test_memory_of_a_rank_falls_with_the_ranks():
    """All ranks together, at their peak: 8 take little more than 2, though each receives the keys of all."""
    T, H, D = 2048, 2, 256
    problem = AttentionProblem(batch=(), T=T, S=T, K=H, G=1, D=D, E=D)
    q, k, v, *_ = problem.inputs("float32")
    do, *_ = problem.cotangents("float32")

    def peak(n):
        places = [[i for piece in parallel.Layout("zigzag", n).pieces(T, rank) for i in piece] for rank in range(n)]
        parts = [[np.take(a, i, axis=-2) for a in (q, k, v, do)] for i in places]

        def of_rank(comm):
            *qkv, own_do = parts[comm.rank]
            _, cache = parallel.attention(parallel.Line(comm), *qkv, mask=masks.causal())
            return parallel.attention_vjp(cache, own_do)[:3]

        tracemalloc.start()
        parallel.threads(n).run(of_rank)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / n

    assert peak(8) < 0.6 * peak(2)


# ── failing well ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_that_has_returned_is_not_waited_for():
    q = np.ones((1, 4, 8))

    def of_rank(comm):
        return None if comm.rank else parallel.attention(parallel.Line(comm), q, q, q)

    with pytest.raises(RuntimeError, match="rank 0 waits for rank 1, which has returned"):
        parallel.threads(2).run(of_rank)


@pytest.mark.parametrize("n", [1, 2])
def test_a_bias_of_one_number_has_a_gradient_of_one(n):
    q, bias = np.random.default_rng(0).standard_normal((2, 8, 4)), np.array(0.5)

    def of_rank(comm):
        line = parallel.Line(comm)
        part = q[:, line.positions(8)]
        o, cache = parallel.attention(line, part, part, part, bias)
        return parallel.attention_vjp(cache, o)[3]

    for dbias in parallel.threads(n).run(of_rank):
        assert dbias.shape == ()
        assert abs(dbias) < 1e-12
