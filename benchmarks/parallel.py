"""python -m benchmarks.parallel [T]: attention on 1, 2 and 4 ranks, forward + backward, one thread each.

One causal sample of T = 16384 tokens, 8 heads of 64, float32. Ranks are threads of one process, and their time is that
of their own processor: computation and copies are counted, waiting is not, and so a busy machine does not matter.

    python -m benchmarks.parallel                   # strong scaling, balance, and what a step of the ring costs
    python -m benchmarks.parallel --mpi mpiexec     # the same on 1 and 2 processes, by the clock and by the processor
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "FUNCMHA_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy is loaded

import numpy as np  # noqa: E402

from funcmha import masks, parallel  # noqa: E402

H, D = 8, 64
STEPS = 50  # runs of few tokens


def attend(comm: parallel.Comm, T: int) -> tuple[float, float]:
    """Seconds of forward and backward of this rank, by the clock and by its processor."""
    line = parallel.Line(comm)
    n = len(line.positions(T))
    rng = np.random.default_rng(comm.rank)
    q, k, v, do = (rng.standard_normal((1, H, n, D), dtype=np.float32) for _ in range(4))
    comm.all_reduce(np.zeros(1))  # all begin together
    start, used = time.perf_counter(), time.thread_time()
    _, cache = parallel.attention(line, q, k, v, mask=masks.causal())
    parallel.attention_vjp(cache, do)
    return time.perf_counter() - start, time.thread_time() - used


def of_threads(n: int, T: int, repeats: int) -> list[float]:
    """Seconds of the processor of each rank, the median of some runs."""
    runs = [parallel.threads(n).run(lambda comm: attend(comm, T)[1]) for _ in range(repeats)]
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


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────


def worker(T: int, repeats: int) -> None:
    """A process of `mpiexec`: the first tells of all the clock and the processor, of each run; and of small ones."""
    comm = parallel.mpi()
    attend(comm, min(T, 1024))
    told = []
    for tokens, n in ((T, repeats), (2 * comm.size, STEPS)):
        own = np.array([attend(comm, tokens) for _ in range(n)])
        all_ranks: list[Any] = [np.empty_like(own) for _ in range(comm.size)]
        comm.all_gather(own, all_ranks)
        told.append(np.median(all_ranks, axis=1).tolist())
    if comm.rank == 0:
        print(json.dumps(told))


def of_processes(mpiexec: str, T: int, repeats: int) -> None:
    """1 and 2 processes."""
    print(f"{T} tokens, {H} heads of {D}, causal, forward + backward, seconds; {mpiexec}\n")
    print("| processes | clock | of ideal | processor, the slowest | of ideal | balance | a step |")
    print("|---|---|---|---|---|---|---|")
    of_one: tuple[float, float] | None = None
    for n in (1, 2):
        command = [*mpiexec.split(), "-n", str(n), sys.executable, "-m", "mpi4py", "-m", "benchmarks.parallel"]
        done = subprocess.run([*command, str(T), "--repeats", str(repeats), "--worker"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        times, steps = (np.max(a, axis=0) for a in json.loads(done.stdout.splitlines()[-1]))  # of the slowest rank
        of_one = of_one or tuple(times)
        clock, used = (f"{t:.3g} | {one / (n * t):.2f}" for t, one in zip(times, of_one, strict=True))
        balance = parallel.plan(T=T, H=H, D=D, ranks=n, mask=masks.causal(), itemsize=4).balance
        step = "" if n == 1 else f"{1e6 * steps[0] / (2 * n):.0f} µs"
        print(f"| {n} | {clock} | {used} | {balance:.3f} | {step} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("T", nargs="?", type=int, default=16384, help="tokens")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, of which the median is told")
    parser.add_argument("--mpi", metavar="MPIEXEC", help="time processes that this command starts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.T, options.repeats)
    elif options.mpi:
        of_processes(options.mpi, options.T, options.repeats)
    else:
        scaling(options.T, options.repeats)
        step()


if __name__ == "__main__":
    main()
