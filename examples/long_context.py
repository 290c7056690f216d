"""Attention over a sequence that is cut among ranks, forward and backward, compared with one process.

Each rank has a part of the tokens, and keys and values go round. A layer with rotary positions and grouped heads
attends a window and the first tokens. The output, the gradient of the input and that of every parameter must equal
those of one process, to rounding. At the end: what a million tokens would cost, planned and not run.

    python examples/long_context.py                             # 2 ranks, threads of this process
    mpiexec -n 2 python -m mpi4py examples/long_context.py      # processes, on one machine or many
"""

from importlib.util import find_spec

import numpy as np

from funcmha import init, masks, parallel, self_attention, self_attention_vjp, tree
from funcmha.rotary import frequencies, table

T, C, H, K = 1536, 96, 6, 2
PARAMS = init(0, C, H, num_kv_heads=K, dtype=np.float64)
MASK = masks.window(511, 0) | (masks.first(4) & masks.causal())


def rotary(positions):
    """The table of some tokens"""
    return table(positions, frequencies(C // H))


def one_process(x, dy):
    """y, dx, dparams"""
    y, cache = self_attention(PARAMS, x, mask=MASK, rotary=rotary(np.arange(T)))
    dparams, dx, _ = self_attention_vjp(cache, dy)
    return y, dx, dparams


def on_ranks(line, x, dy):
    """The same of this rank's tokens; rank 0 alone has x and dy of all"""
    x, dy = parallel.scatter(line, x), parallel.scatter(line, dy)
    i = line.positions(T)
    y, cache = parallel.self_attention(line, parallel.shard(PARAMS, line), x, mask=MASK, rotary=rotary(i))
    dparams, dx, _ = parallel.self_attention_vjp(cache, dy)
    return parallel.gather(line, y), parallel.gather(line, dx), parallel.unshard(dparams, line)


def off(got, want):
    """The largest difference, relative to the largest number"""
    return np.abs(got - want).max() / np.abs(want).max()


def main(comm):
    """Three ways to cut the sequence, each beside one process"""
    x, dy = np.random.default_rng(0).standard_normal((2, T, C)) if comm.rank == 0 else (None, None)
    lines = {
        "zigzag": parallel.Line(comm),
        "striped": parallel.Line(comm, "striped"),
        "grid": parallel.grid(comm, H=H, K=K),
    }
    worst = 0.0
    for name, line in lines.items():
        y, dx, dparams = on_ranks(line, x, dy)
        if comm.rank == 0:
            want_y, want_dx, want = one_process(x, dy)
            largest = max(off(y, want_y), off(dx, want_dx), *tree.flatten(tree.map(off, dparams, want)).values())
            print(f"{name:8} {len(line.positions(T)):5} of {T} tokens on rank 0, off by {largest:.0e}")
            worst = max(worst, largest)
    if comm.rank == 0:
        print(f"\n1 048 576 tokens on 256 ranks, 32 heads of 128, 8 for keys and values, causal:\n{million()}")
        assert worst <= 1e-12


def million():
    """What a million tokens will cost, at 400 Tflop/s and 50 GB/s a rank"""
    return parallel.plan(T=2**20, H=32, K=8, D=128, ranks=256, heads=8, mask=masks.causal(), flops=4e14, bandwidth=5e10)


if __name__ == "__main__":
    comm = parallel.mpi() if find_spec("mpi4py") else None
    if comm is not None and comm.size > 1:
        main(comm)
    else:
        parallel.threads(2).run(main)
