"""What each process of `mpiexec` runs: python -m mpi4py tests/on_ranks.py agree | raise | wait

The bits of the same ranks as threads are the oracle. NumPy and mpi4py alone: no test framework.
"""

import sys
import time

import numpy as np

from funcmha import attention_weights, biases, init, log_sum_exp, masks, parallel, tree
from funcmha.dropout import seeded

T, S, H, K = 37, 41, 4, 2


def results(comm):
    """Every array that this rank gets, from all that there is"""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((2, n, t, 8)).astype("float32") for n, t in ((H, T), (K, S), (K, S), (H, T)))
    bias, _ = biases.alibi(np.asarray(biases.alibi_slopes(H), np.float32), T=T, S=S)
    sink, mask = np.linspace(-1, 1, H, dtype=np.float32), masks.causal() & masks.window(20, 0)
    schemes = ["zigzag", "striped", "contiguous"]
    found = []
    for scheme in schemes:
        line = parallel.Line(comm, scheme)
        found += attention(line, (q, k, v, do), bias, sink, {"mask": mask, "dropout": seeded(7, 0.2)})
        found += attention(line, (20 * q, k, v, do), bias, sink, {"mask": mask})  # rows with one heavy key
    found += layer(parallel.Line(comm), rng)
    if comm.size > 1:
        line = parallel.grid(comm, H=H, K=K)
        found += attention(line, (q, k, v, do), bias, sink, {"mask": mask})
        found += layer(line, rng)
    found += half(comm, (q, k, v))
    return found


def attention(line, arrays, bias, sink, options):
    i, j = line.positions(T), line.positions(S)
    q, k, v, do = (np.take(a, at, axis=-2) for a, at in zip(arrays, (i, j, j, i), strict=True))
    o, cache = parallel.attention(line, q, k, v, bias, sink, **options)
    dq, dk, dv, dbias, dsink = parallel.attention_vjp(cache, do)
    return [o, dq, dk, dv, dbias.values, dsink]


def layer(line, rng):
    params = init(0, 16, H, num_kv_heads=K, sink=True, bias_kv=True)
    whole = np.random.default_rng(1).standard_normal((2, T, 16)).astype("float32")
    x = parallel.scatter(line, whole if line.comm.rank == 0 else None)
    y, cache = parallel.self_attention(line, parallel.shard(params, line), x, mask=masks.causal(), zero_attn=True)
    p, lse = attention_weights(cache), log_sum_exp(cache)
    dparams, dx, _ = parallel.self_attention_vjp(cache, y, dweights=p, dlse=lse, per_sample=True)
    back = parallel.gather(line, x)
    assert (back is None) == (line.comm.rank > 0)
    assert back is None or np.array_equal(back, whole)
    total = parallel.all_reduce(line, tree.map(lambda a: a * (1 + line.comm.rank), params))
    return [y, p, lse, dx, *tree.flatten(parallel.unshard(dparams, line)).values(), *tree.flatten(total).values()]


def half(comm, arrays):
    line = parallel.Line(comm)
    import ml_dtypes

    n = min(T, S)
    i = line.positions(n)
    q, k, v = (np.take(a, i, axis=-2).astype(ml_dtypes.bfloat16) for a in arrays)
    o, cache = parallel.attention(line, q, k, v)
    return [o, *parallel.attention_vjp(cache, o)[:3]]


def agree():
    comm = parallel.mpi()
    want = parallel.threads(comm.size).run(results)[comm.rank]
    got = results(comm)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    disagree(comm)
    print(f"rank {comm.rank} of {comm.size}: {len(got)} arrays have the bits of threads", flush=True)


def disagree(comm):
    """Wrong arguments on one rank are an error on all, and the next call works"""
    line = parallel.Line(comm)
    x = np.zeros((2, 3, 4))
    try:
        parallel.attention(line, x, x, x, scale=0.5 + (comm.rank == comm.size - 1))
    except ValueError as error:
        assert "scale must be the same on all ranks, got 0.5 on rank" in str(error)  # noqa: PT017
        assert comm.size > 1
    else:
        assert comm.size == 1
    parallel.attention(line, x, x, x)


def fail():
    comm = parallel.mpi()
    results(comm)
    if comm.rank == 1:
        raise LookupError("rank 1 has lost its data")
    results(comm)


def wait():
    comm = parallel.mpi()
    results(comm)
    print(f"rank {comm.rank} waits", flush=True)
    while True:
        time.sleep(0.05)
        results(comm)


if __name__ == "__main__":
    {"agree": agree, "raise": fail, "wait": wait}[sys.argv[1]]()
