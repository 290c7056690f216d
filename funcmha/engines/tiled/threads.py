"""Many tasks on a few threads: one pool for all the work, and how many threads a call may have.

The pool works as long as the process does. Its threads are daemons that wait for work: a thread that outlives main has
them, and so has a function of `atexit`; a forked child makes its own; and where no thread can be started, or runs any
more, the caller does everything itself.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np

from funcmha._arrays import Array, quiet_underflow
from funcmha.engines.plan import Plan

from . import blas
from .blas import single_threaded_blas as single_threaded_blas
from .blas import with_single_threaded_blas as with_single_threaded_blas
from .quota import cpu_quota

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
UNASKED = ("VECLIB_MAXIMUM_THREADS",)  # of Accelerate, which does not tell how many it has
SECONDS = 1.0  # for which a quota is believed: reading it takes about as long as a small call


def num_threads() -> int:
    """How many threads a call may have now: FUNCMHA_NUM_THREADS, or else the least of

    the cores that this thread may use;
    the container's quota of them, rounded up;
    the threads that the user has left to NumPy's BLAS, by threadpoolctl or before it was loaded;
    OMP_NUM_THREADS, OPENBLAS_NUM_THREADS and MKL_NUM_THREADS, whichever BLAS it is.
    """
    given = os.environ.get("FUNCMHA_NUM_THREADS")
    if given is None:
        limit = blas.limit()
        heard = _least(VARIABLES + UNASKED) if limit is None else min(limit, _least(VARIABLES))
        return max(min(_cores(), heard), 1)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"FUNCMHA_NUM_THREADS must be an integer of at least 1, got {given!r}")
    return int(given)


def _least(variables: tuple[str, ...]) -> int:
    """The least that the user has set; of numbers for levels of nesting, the first."""
    given = [n.partition(",")[0].strip() for name in variables if (n := os.environ.get(name)) is not None]
    return min((int(n) for n in given if n.isdecimal() and int(n) > 0), default=sys.maxsize)


_quota: tuple[float, float] = -math.inf, math.inf  # until when it is believed, and what it is


def _cores() -> int:
    """As many as this thread may run on, within the quota."""
    global _quota
    until, quota = _quota
    if time.monotonic() > until:
        quota = cpu_quota()
        _quota = time.monotonic() + SECONDS, quota
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if quota >= cores else math.ceil(quota)


def workers(flops: float, plan: Plan) -> int:
    """How many threads share so much work: one for a few flops"""
    return num_threads() if flops > plan.thread_flops else 1


def run(work: Callable[[Any], Any], tasks: Sequence[Any], flops: float, plan: Plan) -> None:
    """work(task) for every task, in no order; the caller is one of the threads, and the only one for a few flops.

    When a task raises, or the caller is interrupted, the tasks that have not begun are dropped, those that have are
    waited for, and the exception is raised.
    """
    threads = min(workers(flops, plan), len(tasks))
    queue: Iterator[Any] = iter(tasks)  # whose next() is one step of the interpreter: no two get the same
    if threads < 2:
        _each(work, queue)
    else:
        _on_threads(work, queue, threads)


def _on_threads(work: Callable[[Any], Any], queue: Iterator[Any], threads: int) -> None:
    """work(task) for these, on so many threads"""
    stopped = threading.Event()

    def worker() -> None:
        try:
            _each(work, _until(stopped, queue))
        except BaseException:
            stopped.set()
            raise

    helpers: list[_Helper] = []
    try:
        _start(helpers, worker, threads - 1)
        worker()
        for helper in helpers:
            helper.join()
    except BaseException:  # only then: a helper may just have taken the last task, and must not drop it
        stopped.set()
        for helper in helpers:
            helper.join()
        raise
    for helper in helpers:
        if helper.error is not None:
            raise helper.error


@quiet_underflow
def _each(work: Callable[[Any], Any], tasks: Iterator[Any]) -> None:
    """work(task) for these, on this thread"""
    depth = _local.depth
    try:
        _local.depth = depth + 1
        for task in tasks:
            work(task)
    finally:
        _local.depth = depth


def _until(stopped: threading.Event, tasks: Iterator[Any]) -> Iterator[Any]:
    for task in tasks:
        if stopped.is_set():
            return
        yield task


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Helper:
    """The same work on one more thread: begun by a thread of the pool, or dropped by the caller if it comes first."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work
        self.error: BaseException | None = None
        self.owner: dict[str, str] = {}  # whose setdefault() is one step of the interpreter
        self.done = threading.Lock()
        self.done.acquire()

    def begin(self) -> None:
        """On a thread of the pool."""
        _running.add(self)
        if self.owner.setdefault("is", "pool") == "pool":
            try:
                self.work()  # type: ignore[misc]  # which only the caller drops, as the owner
            except BaseException as error:
                self.error = error
            finally:
                self.end()
        _running.discard(self)

    def end(self) -> None:
        self.work = None
        with suppress(RuntimeError):  # if a fork has ended it before
            self.done.release()

    def join(self) -> None:
        """On the caller's thread: wait for what has begun, which can be done again after an interruption."""
        if self.owner.setdefault("is", "caller") == "caller":
            self.work = None  # what is in the queue still keeps no arrays alive
        else:
            with self.done:
                pass


_lock = threading.RLock()
_jobs: SimpleQueue[_Helper] = SimpleQueue()
_workers = 0
_running: set[_Helper] = set()


def _start(helpers: list[_Helper], work: Callable[[], None], n: int) -> None:
    """Hand `work` to n threads of the pool, or to as many as there can be."""
    if n < 1:
        return
    _grow(n)
    for _ in range(min(n, _workers)):
        helpers.append(_Helper(work))
        _jobs.put(helpers[-1])


def _grow(n: int) -> None:
    """Threads for n helpers, unless the interpreter is ending or the system has no more."""
    global _workers
    with _lock, suppress(RuntimeError):
        while _workers < n and not sys.is_finalizing():
            threading.Thread(target=_serve, args=(_jobs,), name=f"funcmha_{_workers}", daemon=True).start()
            _workers += 1


def _serve(jobs: "SimpleQueue[_Helper]") -> None:
    blas.alone()
    while True:
        job = jobs.get()
        job.begin()
        del job  # and what it holds, while waiting for the next


def _after_fork() -> None:
    """A forked child has none of its parent's threads. A call that was forked in its middle, by a signal handler, has
    lost the tasks that they had begun.
    """
    global _jobs, _workers
    _lock.release()
    _jobs, _workers = SimpleQueue(), 0
    for helper in list(_running):
        if helper.owner.get("is") == "pool":
            helper.error = RuntimeError("forked in the middle of this call, whose other threads are the parent's")
            helper.end()
    _running.clear()


if hasattr(os, "register_at_fork"):  # the lock is held meanwhile: no other thread is half-way through starting one
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Scratch(threading.local):
    depth = 0  # calls whose tasks this thread is in: one may begin in the middle of another, in a signal handler

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, str, Any], Array] = {}


_local = _Scratch()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array that belongs to this thread and the call whose task it is in, until that asks for the same
    name again.
    """
    size, key = math.prod(shape), (_local.depth, name, dtype)
    buffer = _local.buffers.get(key)
    if buffer is None or buffer.size < size:
        buffer = _local.buffers[key] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)
