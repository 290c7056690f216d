"""One peer in its own process: reads commands from stdin, one JSON object per line, and answers on stdout.

    {"do": "prepare", "case": […], "dtype": "float32"}      make inputs and parameters
    {"do": "time", "direction": "forward", "calls": 3}      seconds of one call, the mean of so many; calls = 0: warm
                                                            up, and return how many calls fill `ENOUGH` seconds
    {"do": "memory"}                                        peak bytes of one call, above those before the call
    {"do": "save", "path": "…"}                             output and gradients as npz

Answers are {"result": …}, {"skip": reason} or {"error": message}.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ENOUGH = 0.1  # seconds of one run, which is many calls if need be


class Worker:
    def __init__(self, peer: str) -> None:
        from .peers import load

        self._make = load(peer)

    def prepare(self, case: list[Any], dtype: str) -> None:
        from .cases import Case, draw

        self.call = None  # free the last case first
        self.case = Case(*case)
        self.call = self._make(self.case, draw(self.case).astype(dtype))

    def time(self, direction: str, calls: int) -> float:
        call = self.call.of(direction)
        if calls == 0:
            call()  # compiles, if the peer does
            return max(1, round(ENOUGH / _seconds(call, 1)))
        if calls > 1:
            call()  # warm the processor's caches, which the other peers have used; negligible for one long call
        return _seconds(call, calls)

    def memory(self) -> int:
        """The peak of `VmHWM` over the `VmRSS` before the call, output and gradients included.

        Before, the peer has done the same at a tiny size (`processes.peak_memory`), so one-time allocations of a
        library do not count; it has compiled, if it does; and freed memory was returned to the system, and the
        high-water mark reset. Nothing of this size was allocated before, so no memory pool can conceal it; except for a
        peer that must run to compile, whose pools are those of that run.
        """
        self.call.warm()
        _release()
        before = _status("VmRSS")
        result = self.call.of(self.case.passes[-1])()
        peak = _status("VmHWM")
        del result
        return peak - before

    def save(self, path: str) -> None:
        import numpy as np

        np.savez(path, **self.call.named())


def _seconds(call: Callable[[], Any], calls: int) -> float:
    """The mean over so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _release() -> None:
    """Return freed memory to the system, and reset the high-water mark (Linux, glibc)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def serve(peer: str, threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of a library must not reach the pipe
    if hasattr(os, "sched_setaffinity"):  # before any library is imported, so that all of them respect it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from .peers import SkipError

    worker: Worker | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            worker = worker or Worker(peer)
            answer = {"result": getattr(worker, order.pop("do"))(**order)}
        except SkipError as reason:
            answer = {"skip": str(reason)}
        except Exception as error:
            first, *_ = [*str(error).splitlines(), ""]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
