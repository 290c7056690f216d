"""`parallel.plan` says what ranks do: its pairs, bytes and steps are those of a run, and of the formulae."""

import re
import sys
from itertools import pairwise
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import ranks
from hypothesis import example, given
from test_parallel import Recorded, bytes_sent

from funcmha import masks, parallel
from funcmha.parallel.pieces import Sums
from funcmha.testing.strategies import AttentionProblem, attention_problems

NONE = property(lambda sums: np.full_like(sums.key, -1))  # no row is saturated


@given(
    attention_problems(batch=st.sampled_from([(), (2,)]), K=st.just(4), bias=st.just("none")),
    st.sampled_from(["contiguous", "zigzag", "striped", (2, 1), (2, 2), (4, 2)]),
    st.integers(1, 6),
)
@example(AttentionProblem(batch=(), T=65, S=64, K=4, mask="window"), "contiguous", 6)
def test_bytes_and_pairs_are_those_of_a_run(problem, scheme, n):
    heads, ring = scheme if isinstance(scheme, tuple) else (1, n)
    log = []
    with patch.object(Sums, "dominant", NONE):
        ranks.run(problem, heads * ring, scheme, "float32", wrap=lambda comm: Recorded(comm, log))
    mask = problem.static()["mask"]
    cost = parallel.plan(
        B=problem.batch[0] if problem.batch else 1, T=problem.T, S=problem.S, H=problem.H, K=4, D=problem.D,
        E=problem.E, ranks=heads * ring, heads=heads, scheme="zigzag" if heads > 1 else scheme, mask=mask, itemsize=4,
    )  # fmt: skip
    extra = 0
    if heads > 1:  # dlse goes to heads as lse comes from them
        extra = problem.H // heads * cost.tokens * (problem.batch[0] if problem.batch else 1) * 4 * (heads - 1)
    sent = bytes_sent(log)
    np.testing.assert_array_equal([sent.get(rank, 0) for rank in range(heads * ring)], cost.sent + extra)
    T, S = problem.T, problem.S
    allowed = np.ones((T, S), bool) if mask is None else masks.dense(mask, T, S, np.zeros(0))
    allowed = np.broadcast_to(allowed.any(axis=tuple(range(allowed.ndim - 2))), (T, S))
    layout = cost.layout
    for rank in range(heads * ring):
        own = [i for piece in layout.ring_pieces(T, rank // heads) for i in piece]
        assert cost.pairs[rank] == allowed[own].sum()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_saturated_rows_take_one_round_more(n):
    """Each query has a key of its own, on any rank."""
    T, D, log = 30, 6, []
    own = np.eye(T)[np.arange(T) * 7 % T]
    k, q = np.eye(T), 40.0 * own

    def of_rank(comm):
        line = parallel.Line(Recorded(comm, log), "striped")
        i = line.positions(T)
        o, cache = parallel.attention(line, q[i], k[i], np.ones((len(i), D)), scale=1.0)
        parallel.attention_vjp(cache, o)

    parallel.threads(n).run(of_rank)
    wide = {"T": T, "H": 1, "D": T, "E": D, "ranks": n, "scheme": "striped", "itemsize": 8}
    cost = parallel.plan(**wide, saturated=True)
    sent = bytes_sent(log)
    # dk and dv are float64 here, which the plan takes for the dtype that travels
    np.testing.assert_array_equal([sent[rank] for rank in range(n)], cost.sent)
    np.testing.assert_allclose(cost.flops / parallel.plan(**wide).flops, 1 + (2 * T + 2 * D) / (8 * T + 6 * D))


@pytest.mark.parametrize(("mask", "pairs"), [(None, 2048**2), (masks.causal(), 2048 * 2049 // 2)])
def test_many_ranks_are_planned_by_the_formulae(mask, pairs):
    """128 parts of a ring and 8 of the heads: nobody has so many, and the schedule is that of the ranks."""
    T, H, K, D, n, u = 2048, 32, 8, 128, 128, 8
    cost = parallel.plan(T=T, H=H, K=K, D=D, ranks=n * u, heads=u, mask=mask, itemsize=2, flops=1e14, bandwidth=5e10)
    ring = (n - 1) * (T // n) * (K // u) * 2 * D * (2 * 2 + 4)
    to_heads = (u - 1) * (T // n // u) * (H + K) * 2 * D * 2 * 2 // u + (u - 1) * (T // n // u) * H * 4 // u
    np.testing.assert_array_equal(cost.sent, ring + to_heads)
    np.testing.assert_array_equal(cost.pairs, pairs // n)
    np.testing.assert_array_equal(cost.steps, n - 1)
    np.testing.assert_allclose(cost.flops, 14 * D * (H // u) * (pairs // n))
    assert cost.balance == 1
    assert cost.compute[0] == cost.flops[0] / 1e14
    assert cost.seconds == max(cost.compute[0], cost.transfer[0])


@pytest.mark.slow
def test_a_thousand_ranks_in_one_ring():
    cost = parallel.plan(T=4096, H=1, D=1, ranks=1024, mask=masks.window(3, 0), scheme="contiguous", itemsize=4)
    assert cost.steps.max() == 1
    assert cost.sent.max() == 3 * 4 * 2 * 4
    assert cost.pairs.sum() == 4 * 4096 - 6


@pytest.mark.parametrize(("scheme", "least"), [("zigzag", 0.98), ("striped", 0.97)])
def test_causal_masks_are_balanced(scheme, least):
    cost = parallel.plan(T=1000, H=1, D=8, ranks=6, mask=masks.causal(), scheme=scheme)
    assert least <= cost.balance <= 1
    assert parallel.plan(T=1000, H=1, D=8, ranks=6, mask=masks.causal(), scheme="contiguous").balance < 0.6


def test_memory_and_time_fall_with_the_ranks():
    costs = [parallel.plan(T=4096, H=4, D=8, ranks=n, mask=masks.causal()) for n in (2, 4, 8)]
    for one, two in pairwise(costs):
        assert two.memory.max() == one.memory.max() / 2
        np.testing.assert_allclose(two.compute.max(), one.compute.max() / 2, rtol=1e-3)


def test_it_prints_a_table():
    text = str(parallel.plan(T=4096, H=4, D=8, ranks=4, heads=2, mask=masks.causal()))
    assert text.startswith("ranks               4: 2 for heads, 2 in a ring, zigzag\nqueries of a rank   1024 … 1024\n")
    assert re.search(r"^balance +1.000$", text, re.MULTILINE)


def test_it_draws_the_seconds_of_each_rank():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'funcmha[plot]'")
    cost = parallel.plan(T=1000, H=4, D=8, ranks=6, mask=masks.causal(), scheme="contiguous", bandwidth=1e7)
    axes = cost.plot()
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], cost.compute)
    (ticks,) = (lines for lines in axes.collections)
    np.testing.assert_allclose([y for ((_, y), _) in ticks.get_segments()], cost.transfer)
    (line,) = axes.lines
    assert set(line.get_ydata()) == {cost.seconds}
    assert cost.plot(axes) is axes
    axes.figure.canvas.draw()


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib .*: pip install 'funcmha\[plot\]'"):
        parallel.plan(T=8, H=1, D=8, ranks=2).plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"heads": 3}, "heads must divide the number of ranks, 8, got 3"),
        (
            {"H": 28, "K": 4, "heads": 8},
            "H = 28, K = 4 cannot be cut for 8 ranks: use a ring, or grid(heads=4, ring=2)",
        ),
        ({"scheme": "heads"}, "scheme must be one of 'contiguous', 'zigzag', 'striped', got 'heads'"),
        ({"bandwidth": 0}, "bandwidth must be above 0, got 0.0"),
        ({"K": 3}, "q has H=4 heads, which must be a multiple of K=3"),
        ({"mask": np.ones((3, 3), bool)}, "mask must broadcast to (..., H, T, S)"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parallel.plan(**{"T": 64, "H": 4, "D": 8, "ranks": 8} | arguments)
