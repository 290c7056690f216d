"""What attention on many ranks is made of: who has what, pieces of masks and dropout, steps, carriers, checks."""

import re
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import ranks
from hypothesis import example, given

from funcmha import biases, dropout, masks, parallel
from funcmha._arrays import unset
from funcmha.parallel import schedule
from funcmha.parallel.agreement import agree
from funcmha.parallel.line import Layout, placed
from funcmha.testing.strategies import BIASES, RELATIVE, AttentionProblem, attention_problems

SCHEMES = ("contiguous", "zigzag", "striped")
layouts = st.builds(Layout, st.sampled_from(SCHEMES), st.integers(1, 9), st.integers(1, 3))


# ── who has what ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(layouts, st.integers(0, 40))
def test_every_token_is_on_one_rank(layout, T):
    """And the ranks of a part of the ring have its tokens one after another."""
    pieces = [[*map(list, layout.pieces(T, rank))] for rank in range(layout.ranks)]
    own = [[*chain(*some)] for some in pieces]
    assert sorted(chain(*own)) == [*range(T)]
    assert all(piece for some in pieces for piece in some)
    assert [len(some) for some in own] == [layout.num_tokens(T, rank) for rank in range(layout.ranks)]
    for ring in range(layout.ring):
        of_heads = own[ring * layout.heads : (ring + 1) * layout.heads]
        assert [*chain(*of_heads)] == [*chain(*layout.ring_pieces(T, ring))]
        assert sum(map(len, of_heads)) == layout.ring_count(T, ring)
    assert max(map(len, own)) - min(map(len, own)) <= 2 * (1 + (layout.scheme == "zigzag"))


def test_positions_are_those_of_the_schemes():
    def of(n, scheme, T):
        return parallel.threads(n).run(lambda comm: parallel.Line(comm, scheme).positions(T).tolist())

    assert of(2, "contiguous", 7) == [[0, 1, 2, 3], [4, 5, 6]]
    assert of(2, "zigzag", 8) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert of(3, "striped", 7) == [[0, 3, 6], [1, 4], [2, 5]]
    assert of(2, "heads", 7) == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("n", "H", "K", "heads"), [(8, 28, 4, 4), (6, 8, 8, 2), (5, 8, 8, 1), (4, 32, 8, 4), (6, 4, None, 2)]
)
def test_a_grid_chooses_itself(n, H, K, heads):
    (layout, *_) = parallel.threads(n).run(lambda comm: parallel.grid(comm, H=H, K=K).layout)
    assert layout == Layout("zigzag", n // heads, heads)


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 40))
def test_all_of_a_causal_mask_is_shared_evenly_by_zigzag(n, m, extra):
    """Of a multiple of 2n tokens each rank has as many pairs as any other; contiguous parts have 1/n to 2 of them."""
    T = 2 * n * m
    mask, layout = masks.causal(), Layout("zigzag", n)
    pairs = [
        sum(
            len(pair.rows) * len(pair.cols)
            if pair.mask is None
            else pair.mask.dense(len(pair.rows), len(pair.cols)).sum()
            for source in range(n)
            for pair in schedule.pairs(placed(layout.ring_pieces(T, rank)), layout, source, T, mask)
        )
        for rank in range(n)
    ]
    assert len(set(pairs)) == 1
    assert sum(pairs) == T * (T + 1) // 2


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(attention_problems(), st.integers(1, 5), st.data())
@example(AttentionProblem(T=13, S=17, mask="chunks"), 3, None)
def test_a_mask_of_every_nth_is_those_of_its_booleans(problem, n, data):
    T, S, mask = problem.T, problem.S, problem.static()["mask"]
    if mask is None or not T or not S:
        return
    mask = masks.as_mask(mask)
    draw = (lambda most: 1 % most) if data is None else (lambda most: data.draw(st.integers(0, most - 1)))
    rows, cols = range(draw(T), T, n), range(draw(S), S, n)
    got = mask.select(rows, cols)
    whole = np.broadcast_to(mask.dense(T, S), (*mask.shape(T, S)[:-2], T, S))
    want = whole[..., list(rows), :][..., list(cols)]
    np.testing.assert_array_equal(np.broadcast_to(got.dense(len(rows), len(cols)), want.shape), want)
    answer = "full" if want.all() else "mixed" if want.any() else "empty"
    assert not want.size or got.block((0, len(rows)), (0, len(cols))) == answer


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("left", [None, 0, 4])
@pytest.mark.parametrize("offset", [-3, 0, 5, np.array([-2, 3])], ids=str)
def test_a_band_of_every_nth_stays_a_band(n, left, offset):
    """Blocks and columns of which cost no more than before."""
    mask = masks.window(left, 1, offset)
    rows, cols = range(2, 40, n), range(1, 40, n)
    got = mask.select(rows, cols)
    assert all(isinstance(part, masks.Band | masks.Bands) for part in masks.operands(got))
    want = mask.dense(40, 40)[..., list(rows), :][..., list(cols)]
    np.testing.assert_array_equal(got.dense(len(rows), len(cols)), want)


@pytest.mark.parametrize("mask", [masks.Spans(np.array([0, 2, 5, 9]), np.array([3, 2, 11, 11]), 11)])
def test_spans_of_every_nth(mask):
    for n in (1, 2, 3):
        rows, cols = range(1, 4, n), range(2, 11, n)
        want = mask.dense(4, 11)[list(rows)][:, list(cols)]
        np.testing.assert_array_equal(mask.select(rows, cols).dense(*want.shape), want)


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 19))
def test_a_seed_of_every_nth_draws_those_of_the_whole(n, i, j, R, N):
    drop = dropout.seeded(3, 0.5, first_query=5, first_key=7)
    rows, cols = range(i, i + n * R, n), range(j, j + n * N, n)
    whole = drop.dense((2, 3, rows[-1] + 1, cols[-1] + 1))
    got = drop.select(rows, cols)
    np.testing.assert_array_equal(got.dense((2, 3, R, N)), whole[..., list(rows), :][..., list(cols)])
    part = got.part((1, R), (1, N)) if R > 1 and N > 1 else got
    first = 1 if part is not got else 0
    np.testing.assert_array_equal(
        part.tile(1, 2, (0, 1), (0, 1)), got.tile(1, 2, (first, first + 1), (first, first + 1))
    )


@pytest.mark.parametrize("name", [*BIASES[1:], *RELATIVE])
@pytest.mark.parametrize("step", [1, 3])
def test_a_piece_of_a_bias_is_that_of_its_array(name, step):
    problem = AttentionProblem(T=11, S=13, bias=name)
    bias = biases.as_bias(problem.inputs("float64")[3])
    rows, cols = range(2, 11, step), range(1, 13, step)
    part = bias.select(rows, cols, 11)
    whole = np.broadcast_to(bias.dense(11, 13), np.broadcast_shapes(np.shape(bias.dense(11, 13)), (11, 13)))
    got = np.broadcast_to(part.dense(len(rows), len(cols)), (*whole.shape[:-2], len(rows), len(cols)))
    np.testing.assert_array_equal(got, whole[..., list(rows), :][..., list(cols)])


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 7).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_parts_reach_all_that_need_them_and_gradients_come_home(needed):
    """A simulation of all ranks: what leaves one arrives at another in the same step."""
    needed = np.array(needed)
    n, ways = len(needed), schedule.Ways.of(needed)
    all_steps = [schedule.steps(rank, ways) for rank in range(n)]
    home = {s: set() for s in range(n)}
    gradient = {}
    for t in range(1, len(all_steps[0])):
        now = [own[t] for own in all_steps]
        for rank, step in enumerate(now):
            assert step.source == (rank - t) % n
            assert step.arrives == all_steps[(rank - 1) % n][t - 1].leaves
            assert step.gathered == (step.source in gradient)
        for rank, step in enumerate(now):
            if step.arrives and needed[rank, step.source]:
                gradient.setdefault(step.source, set()).add(rank)
            assert step.carries == (step.arrives and step.source in gradient)
        for step in now:
            if step.home:
                home[step.source] = gradient.pop(step.source)
        for rank, step in enumerate(now):
            assert (step.owner >= 0) == any(other.home and other.source == rank for other in now)
            assert step.owner < 0 or now[step.owner].source == rank
    assert not gradient
    for s in range(n):
        assert home[s] == {rank for rank in range(n) if needed[rank, s] and rank != s}


# ── carriers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 5])
def test_collectives_are_what_they_are_called(n):
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((3, 7)) for _ in range(n)]
    lists = [[rng.standard_normal((2 + to, 3)) for to in range(n)] for _ in range(n)]

    def of_rank(comm):
        r = comm.rank
        gathered, received = [np.empty((3, 7)) for _ in range(n)], [np.empty((2 + r, 3)) for _ in range(n)]
        comm.all_gather(xs[r], gathered)
        comm.all_to_all(lists[r], received)
        return gathered, received, comm.reduce_scatter(lists[r]), comm.all_reduce(xs[r])

    for r, (gathered, received, scattered, reduced) in enumerate(parallel.threads(n).run(of_rank)):
        np.testing.assert_array_equal(gathered, xs)
        np.testing.assert_array_equal(received, [some[r] for some in lists])
        in_order = lists[0][r]
        for some in lists[1:]:
            in_order = in_order + some[r]
        np.testing.assert_array_equal(scattered, in_order)  # to the bit: the order of the ranks
        np.testing.assert_array_equal(reduced, sum(xs[1:], xs[0]))


def test_a_group_is_its_ranks():
    def of_rank(comm):
        group = comm.group([1, 3]) if comm.rank in (1, 3) else comm.group([0, 2])
        return group.all_reduce(np.array([10.0**comm.rank]))[0]

    assert parallel.threads(4).run(of_rank) == [101.0, 1010.0, 101.0, 1010.0]


def test_what_one_rank_raises_ends_all():
    """At their next transfer, with its exception, and no thread is left."""
    before = threading.active_count()

    def of_rank(comm):
        if comm.rank == 1:
            raise LookupError("rank 1 has lost its data")
        out = unset((1,), np.zeros(1))
        comm.shift([], [(out, 1)])()

    start = time.monotonic()
    with pytest.raises(LookupError, match="rank 1 has lost its data"):
        parallel.threads(3).run(of_rank)
    assert time.monotonic() - start < 5
    assert threading.active_count() == before


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_number_of_threads_is_an_integer_of_at_least_one(n):
    with pytest.raises((TypeError, ValueError), match="n must be"):
        parallel.threads(n)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────

A = np.zeros((2, 4, 3, 5))  # (B, H, T, D) of each rank


def on_three(make, scheme="contiguous", q=lambda rank: A, **more):
    """The one message that every rank raises"""
    messages = []

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        static = {name: f(comm.rank) for name, f in more.items()}
        try:
            make(line, q(comm.rank), static)
        except (TypeError, ValueError, KeyError) as error:
            messages.append((type(error), str(error)))

    parallel.threads(3).run(of_rank)
    assert len(messages) == 3
    assert len({message for _, message in messages}) == 1
    assert len({kind for kind, _ in messages}) == 1
    return messages[0]


def attend(line, q, static):
    return parallel.attention(line, q, static.pop("k", q), static.pop("v", q), **static)


REFUSED = [
    ({"scale": lambda r: 0.5 + (r == 1)}, ValueError,
     "scale must be the same on all ranks, got 0.5 on ranks 0, 2 and 1.5 on rank 1"),
    ({"q": lambda r: A.astype("float32") if r == 2 else A}, ValueError,
     "q must be the same .* of float64 on ranks 0, 1 and .* of float32 on rank 2"),
    ({"dropout": lambda r: dropout.seeded(r // 2, 0.5)}, ValueError,
     "dropout must be the same .*seed=0.* on ranks 0, 1 and .*seed=1.* on rank 2"),
    ({"mask": lambda r: masks.causal(r)}, ValueError, r"mask must be the same .*offset=1.* on rank 1"),
    ({"mask": lambda r: np.arange(9) != r}, ValueError, "mask must be the same .* checksum"),
    ({"softcap": lambda r: -1.0 if r == 1 else 1.0}, ValueError, "rank 1: softcap must be above 0, got -1.0"),
    ({"causal": lambda r: True}, TypeError, "causal= is no option"),
    ({"q": lambda r: A.astype(complex)}, TypeError, "q must be real on many ranks, got complex128"),
    ({"q": lambda r: A[..., : 3 - r, :]}, ValueError,
     r"q must be q\[..., line.positions\(6\), :\], 2 of 6 tokens on rank 0, got 3"),
    ({"k": lambda r: A[:, :3], "v": lambda r: A[:, :3]}, ValueError,
     "q has H=4 heads, which must be a multiple of K=3"),
    ({"mask": lambda r: np.ones((5, 5), bool)}, ValueError, r"mask must broadcast to \(..., H, T, S\)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_every_rank_refuses_alike_before_anything_is_sent(arguments, kind, message):
    got, text = on_three(attend, **arguments)
    assert got is kind
    assert re.search(message, text), text


def test_what_is_missing_on_one_rank_is_named():
    got, text = on_three(
        lambda line, q, static: parallel.attention(line, q, q, q, static.pop("b"), **static),
        b=lambda r: None if r else np.zeros(9),
    )
    assert got is ValueError
    assert re.search(
        r"bias must be the same on all ranks, got \(9,\) of float64 .* on rank 0 and None on ranks 1, 2", text
    )


def test_cotangents_are_agreed_on():
    def backward(line, q, static):
        o, cache = parallel.attention(line, q, q, q)
        parallel.attention_vjp(cache, o, dlse=o[..., 0] if line.comm.rank else None)

    _, text = on_three(backward)
    assert text == "dlse must be the same on all ranks, got None on rank 0 and an array of float64 on ranks 1, 2"


def test_heads_that_cannot_be_cut_are_told_what_to_use():
    q, k = np.zeros((1, 28, 4, 5)), np.zeros((1, 4, 4, 5))
    errors = []

    def of_rank(comm):
        with pytest.raises(ValueError, match="cannot be cut") as error:
            parallel.attention(parallel.Line(comm, "heads"), q[..., :1, :], k[..., :1, :], k[..., :1, :])
        errors.append(str(error.value))

    parallel.threads(8).run(of_rank)
    assert set(errors) == {"H = 28, K = 4 cannot be cut for 8 ranks: use a ring, or grid(heads=4, ring=2)"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda comm: parallel.Line(comm, "ring"),
         "scheme must be one of 'contiguous', 'zigzag', 'striped', 'heads', got 'ring'"),
        (lambda comm: parallel.Line(object()), "comm must be one of parallel.mpi, parallel.nccl or parallel.threads"),
        (lambda comm: parallel.grid(comm, heads=2, ring=2),
         "heads · ring must be the number of ranks, 1, got heads=2 and ring=2"),
        (lambda comm: parallel.grid(comm),
         "grid must have heads= or ring=, or choose them by H= (and K=) heads, got heads=None, ring=None, H=None"),
        (lambda comm: parallel.grid(comm, K=4), "got heads=None, ring=None, H=None, K=4"),
        (lambda comm: parallel.grid(comm, heads=1, H=4), "got heads=1, ring=None, H=4, K=None"),
        (lambda comm: parallel.grid(comm, ring=1, K=4), "got heads=None, ring=1, H=None, K=4"),
        (lambda comm: parallel.grid(comm, H=4, K=3), "q has H=4 heads, which must be a multiple of K=3"),
        (lambda comm: parallel.grid(comm, heads=1, scheme="heads"), "scheme must be one of 'contiguous'"),
        (lambda comm: parallel.attention(comm, A, A, A), "line must be a Line of funcmha.parallel"),
        (lambda comm: parallel.Line(comm).positions(-1), "T must be at least 0"),
    ],
)  # fmt: skip
def test_wrong_lines_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        parallel.threads(1).run(make)


def test_an_error_keeps_its_kind_and_text():
    def of_rank(comm):
        def local():
            if comm.rank == 1:
                raise KeyError("params must have a name")
            return {}, ()

        with pytest.raises(KeyError, match="rank 1: params must have a name"):
            agree(comm, local)

    parallel.threads(2).run(of_rank)


def test_agreement_is_one_gather_of_a_few_words():
    """Where all agree: nothing but 128 bytes from each rank to each."""
    sent = []

    class Counted(parallel.Comm):
        def __init__(self, comm):
            self.comm, self.rank, self.size = comm, comm.rank, comm.size

        def shift(self, sends, receives):
            sent.extend(x.nbytes for x, _ in sends)
            return self.comm.shift(sends, receives)

    parallel.threads(3).run(lambda comm: agree(Counted(comm), lambda: ({"x": "1"}, (comm.rank,))))
    assert sent == [128] * 6


def test_it_is_loaded_when_it_is_asked_for():
    code = """
import sys, funcmha
assert "funcmha.parallel" not in sys.modules
try:
    funcmha.paralel
except AttributeError as error:
    assert str(error) == "module 'funcmha' has no attribute 'paralel'", error
assert funcmha.parallel.threads(1).run(lambda comm: comm.size) == [1]
assert funcmha.parallel is sys.modules["funcmha.parallel"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(parallel.__file__).parents[2])


def test_without_cupy_the_carrier_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    backend = SimpleNamespace(rank=0, _n_devices=1, send=None, recv=None)
    with pytest.raises(ImportError, match=r"parallel.nccl needs CuPy with NCCL .*: pip install 'funcmha\[cuda12\]' or"):
        parallel.nccl(backend)
