"""python -m benchmarks.parallel [T]: attention on 1, 2 and 4 ranks, forward + backward, one thread each.

One causal sample of T = 16384 tokens, 8 heads of 64, float32. Ranks are threads of one process, and their time is that
of their own processor: computation and copies are counted, waiting is not, and so a busy machine does not matter.

    python -m benchmarks.parallel            # strong scaling, balance, and what a step of the ring costs
    mpiexec -n 2 python -m mpi4py -m benchmarks.parallel --mpi      # the same by the clock, between processes
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "FUNCMHA_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy is loaded

import numpy as np  # noqa: E402

from funcmha import masks, parallel  # noqa: E402

H, D = 8, 64


def attend(comm: parallel.Comm, T: int, clock: Callable[[], float]) -> float:
    """Seconds of forward and backward of this rank."""
    line = parallel.Line(comm)
    n = len(line.positions(T))
    rng = np.random.default_rng(comm.rank)
    q, k, v, do = (rng.standard_normal((1, H, n, D), dtype=np.float32) for _ in range(4))
    start = clock()
    _, cache = parallel.attention(line, q, k, v, mask=masks.causal())
    parallel.attention_vjp(cache, do)
    return clock() - start


def of_threads(n: int, T: int, repeats: int) -> list[float]:
    """Seconds of the processor of each rank, the median of some runs."""
    runs = [parallel.threads(n).run(lambda comm: attend(comm, T, time.thread_time)) for _ in range(repeats)]
    return [median(times) for times in zip(*runs, strict=True)]


def scaling(T: int, repeats: int) -> None:
    print(f"{T} tokens, {H} heads of {D}, causal, forward + backward, seconds of the processor\n")
    print("| ranks | slowest rank | all ranks | of ideal | balance | sent by a rank |\n|---|---|---|---|---|---|")
    of_one = 0.0
    for n in (1, 2, 4):
        times = of_threads(n, T, repeats)
        of_one = of_one or times[0]
        cost = parallel.plan(T=T, H=H, D=D, ranks=n, mask=masks.causal(), itemsize=4)
        share = of_one / (n * max(times))
        sent = f"{cost.sent.max() / 1e6:.0f} MB"
        print(f"| {n} | {max(times):.2f} | {sum(times):.2f} | {share:.2f} | {cost.balance:.3f} | {sent} |", flush=True)


def step(n: int = 8, T: int = 16) -> None:
    """What a step of the ring costs beside its products: of two tokens on each rank."""
    times = of_threads(n, T, 20)
    print(f"\n{1e6 * max(times) / (2 * n):.0f} µs a step of the ring, of {T // n} tokens on each of {n} ranks")


def of_processes(T: int, repeats: int) -> None:
    """By the clock, on the ranks that mpiexec has started."""
    comm = parallel.mpi()
    times = [attend(comm, T, time.perf_counter) for _ in range(repeats)]
    slowest: list[Any] = [np.empty(repeats) for _ in range(comm.size)]
    comm.all_gather(np.array(times), slowest)
    if comm.rank == 0:
        print(f"{comm.size} processes: {median(np.max(slowest, axis=0)):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("T", nargs="?", type=int, default=16384, help="tokens")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, of which the median is told")
    parser.add_argument("--mpi", action="store_true", help="time the processes that mpiexec has started")
    options = parser.parse_args()
    if options.mpi:
        of_processes(options.T, options.repeats)
        return
    scaling(options.T, options.repeats)
    step()


if __name__ == "__main__":
    main()
