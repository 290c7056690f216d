"""The carrier of CuPy arrays, on a stand-in for cupyx.distributed: the results of NumPy's ranks. No GPU was used."""

import fake_cupy
import fake_nccl
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import ranks
from hypothesis import example, given
from test_ops import close

from funcmha import attention_weights, init, log_sum_exp, masks, parallel, tree
from funcmha.testing.strategies import MODERN, AttentionProblem, attention_problems

cp = fake_cupy.MODULE


@pytest.fixture(autouse=True)
def installed():
    with fake_nccl.installed():
        yield


def run(problem, n, scheme, dtype):
    """As `ranks.run`, of CuPy arrays and NCCL's ranks"""
    q, k, v, bias, sink = problem.inputs(dtype)
    do, _, dlse = problem.cotangents(dtype)
    dlse, static = dlse if dtype in ("float32", "float64") else dlse.astype("float32"), problem.static()
    moved = fake_nccl.on_device
    bias = bias.map(moved) if hasattr(bias, "map") else moved(bias)

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        i, j = line.positions(problem.T), line.positions(problem.S)
        of_q, of_k, of_v, of_do = (moved(np.take(a, at, axis=-2)) for a, at in ((q, i), (k, j), (v, j), (do, i)))
        o, cache = parallel.attention(line, of_q, of_k, of_v, bias, moved(sink), **static)
        grads = parallel.attention_vjp(cache, of_do, dlse=moved(np.take(dlse, i, axis=-1)))
        back = [None if a is None else ranks.values(a).get() for a in (o, *grads)]
        return (i, j), back

    places, results = zip(*fake_nccl.run(of_rank, n), strict=True)
    rows, keys = zip(*places, strict=True)
    o, dq, dk, dv, dbias, dsink = zip(*results, strict=True)
    put, T, S = ranks.put_together, problem.T, problem.S
    return put(o, rows, T), put(dq, rows, T), put(dk, keys, S), put(dv, keys, S), dbias[0], dsink[0]


@given(
    attention_problems(**MODERN, gain=st.sampled_from([1e-3, 1.0, 10.0]), K=st.just(2)),
    st.integers(1, 5),
    st.sampled_from(["zigzag", "striped", "contiguous", (2, 2)]),
)
@example(
    AttentionProblem(T=13, S=17, K=2, mask="causal", bias="... H T+S-1", sink=True, rate=0.3, seeded=True), 3, "striped"
)
def test_ranks_of_nccl_match_those_of_numpy(problem, n, scheme):
    n = 4 if isinstance(scheme, tuple) else n
    o, _, *grads, dbias, dsink = ranks.run(problem, n, scheme, "float64")
    want = o, *grads, ranks.values(dbias[0]), dsink[0]
    for got, wanted in zip(run(problem, n, scheme, "float64"), want, strict=True):
        close(got, wanted)


def test_long_pieces_are_taken_in_blocks():
    """Of more scores than are held at once: in as many blocks, forward and backward."""
    problem = AttentionProblem(batch=(), T=700, S=800, K=2, G=2, D=4, E=4, mask="causal", bias="T+S-1")
    o, _, *grads, dbias, _ = ranks.run(problem, 2, "contiguous", "float64")
    for got, wanted in zip(run(problem, 2, "contiguous", "float64"), (o, *grads, dbias[0].values), strict=False):
        close(got, wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16, bool, "int64"], ids=str)
def test_every_dtype_travels(dtype):
    """bfloat16 and booleans too, which NCCL does not know."""

    def of_rank(comm):
        xs = [cp.asarray((np.arange(3) + r).astype(dtype)) for r in range(3)]
        out = [cp.empty((3,), xs[0].dtype) for _ in range(3)]
        comm.all_gather(xs[comm.rank], out)
        return [a.get() for a in out]

    for got in fake_nccl.run(of_rank, 3):
        np.testing.assert_array_equal(got, [(np.arange(3) + r).astype(dtype) for r in range(3)])


def test_a_layer_and_its_gradient_match_those_of_numpy():
    """With appended keys, gradients of single samples, and cotangents of weights and of lse."""
    params = init(0, 12, 4, num_kv_heads=2, sink=True, bias_kv=True, dtype=np.float64)
    rng = np.random.default_rng(0)
    x, dweights, dlse = rng.standard_normal((2, 11, 12)), rng.standard_normal((2, 4, 11, 13)), rng.random((2, 4, 11))

    def of_rank(comm, moved=lambda a: a):
        line = parallel.grid(comm, heads=2, ring=2)
        mine = tree.map(moved, parallel.shard(params, line))
        part = parallel.scatter(line, moved(x) if comm.rank == 0 else None)
        y, cache = parallel.self_attention(line, mine, part, mask=masks.causal(), zero_attn=True)
        i = line.positions(11)
        more = {"dweights": moved(dweights[:, :, i]), "dlse": moved(dlse[:, :, i]), "per_sample": True}
        dmine, dx, _ = parallel.self_attention_vjp(cache, y, **more)
        whole = parallel.gather(line, y)
        total = parallel.all_reduce(line, dmine["out_proj"])
        grads = tree.flatten(parallel.unshard(dmine, line)).values()
        return [dx, attention_weights(cache), log_sum_exp(cache), *grads, *total.values()], whole

    want = parallel.threads(4).run(of_rank)
    got = fake_nccl.run(lambda comm: of_rank(comm, fake_nccl.on_device), 4)
    for (arrays, whole), (wanted, wanted_whole) in zip(got, want, strict=True):
        for a, b in zip(arrays, wanted, strict=True):
            close(a.get(), b)
        assert (whole is None) == (wanted_whole is None)
        if whole is not None:
            close(whole.get(), wanted_whole)


def test_the_host_waits_for_the_comparison_of_arguments_alone():
    """Two gathers forward, two backward, and which rows are saturated: nothing else of a ring is looked at."""
    x = cp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)))

    def of_rank(comm):
        line = parallel.Line(comm)
        o, cache = parallel.attention(line, x, x, x, mask=masks.causal())
        parallel.attention_vjp(cache, o)

    with fake_cupy.traffic() as seen:
        fake_nccl.run(of_rank, 2)
    assert len(seen.waits) == 2 * 5
    assert all(wait.startswith("get") for wait in seen.waits)


def test_saturated_rows_keep_their_digits():
    """One key for each query, queries times 100 and values 100 from 0: dq and dk are 0."""
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, 24, 8), dtype=np.float32)

    def of_rank(comm):
        line = parallel.Line(comm)
        i = line.positions(24)
        parts = (fake_nccl.on_device(a[:, i]) for a in (100 * q, k, 100 + v))
        _, cache = parallel.attention(line, *parts, mask=masks.segments(np.arange(24), 23 - np.arange(24)))
        return parallel.attention_vjp(cache, fake_nccl.on_device(do[:, i]))

    for dq, dk, dv, *_ in fake_nccl.run(of_rank, 3):
        assert not dq.get().any()
        assert not dk.get().any()
        assert dv.get().all()


def test_a_transfer_waits_for_what_it_sends_and_the_stream_for_it():
    """An event of the current stream before the transfer, and one of its stream before the arrays are used."""

    def of_rank(comm):
        x, out = cp.asarray(np.zeros(3)), cp.empty((3,), np.float64)
        before = len(comm.stream.waited)
        wait = comm.shift([(x, 1 - comm.rank)], [(out, 1 - comm.rank)])
        begun = len(comm.stream.waited) - before
        current = fake_cupy.get_current_stream()
        there = len(current.waited)
        wait()
        return begun, len(current.waited) > there

    assert fake_nccl.run(of_rank, 2) == [(1, True)] * 2


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match=r"backend must be what .* returns, got int"):
        parallel.nccl(3)
