"""python -m benchmarks.blocks [LONGEST]: batched attention in one block and in many, time and memory by length.

Forward + backward of one sample, 8 heads of 64, causal, float32, NumPy, one thread. Time is the processor's, the median
of five runs in turn; memory is NumPy's at its peak, above inputs, output and gradients.
"""

import sys
import time
import tracemalloc
from statistics import median

import numpy as np

from funcmha import attention, attention_vjp, masks
from funcmha.engines import BATCHED, Engine

WHOLE = BATCHED._replace(plan=BATCHED.plan._replace(numpy_bytes=2**40))  # type: ignore[union-attr]
LONGEST_WHOLE = 4096  # whose scores take 0.5 GB, several times


def attend(engine: Engine, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Output and gradients"""
    *inputs, do = arrays
    o, cache = attention(*inputs, mask=masks.causal(), engine=engine)
    return [o, *attention_vjp(cache, do)[:3]]


def drawn(T: int) -> list[np.ndarray]:
    """q, k, v and do"""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 8, T, 64), dtype=np.float32) for _ in range(4)]


def seconds(engine: Engine, T: int) -> float:
    """Of one run."""
    arrays = drawn(T)
    start = time.process_time()
    attend(engine, arrays)
    return time.process_time() - start


def megabytes(engine: Engine, T: int) -> float:
    """At the peak of one run."""
    arrays = drawn(T)
    tracemalloc.start()
    results = attend(engine, arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - sum(a.nbytes for a in results)) / 1e6


def main() -> None:
    longest = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    print("| tokens | whole | blocks | | whole | blocks |\n|---|---|---|---|---|---|")
    for T in (256 * 2**n for n in range((longest // 256).bit_length())):
        engines = [WHOLE, BATCHED] if T <= LONGEST_WHOLE else [BATCHED]
        times = [[seconds(engine, T) for engine in engines] for _ in range(5 if T <= 8192 else 1)]
        middle = [median(column) for column in zip(*times, strict=True)]
        ratio = f"{middle[1] / middle[0]:.2f}" if len(middle) == 2 else ""
        columns = [f"{1e3 * t:.0f} ms" for t in middle], [f"{megabytes(engine, T):.0f} MB" for engine in engines]
        time_of, memory_of = (["" for _ in range(2 - len(engines))] + column for column in columns)
        print(f"| {T} | {' | '.join(time_of)} | {ratio} | {' | '.join(memory_of)} |", flush=True)


if __name__ == "__main__":
    main()
