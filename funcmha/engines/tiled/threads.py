"""Many tasks on a few threads: one pool for all the work, and BLAS held at one thread meanwhile.

OpenBLAS's own threads spin for a while after each product, and so take the cores from a pool beside them. A pool that
does every product itself, each on one BLAS thread, has no such neighbour. (docs/decisions/0016-tiled.md)
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from funcmha._arrays import Array
from funcmha.engines.plan import Plan


def num_threads() -> int:
    """FUNCMHA_NUM_THREADS, or the cores that this process may use."""
    given = os.environ.get("FUNCMHA_NUM_THREADS")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"FUNCMHA_NUM_THREADS must be an integer of at least 1, got {given!r}")
    return int(given)


def run(work: Callable[[Any], Any], tasks: Sequence[Any], flops: float, plan: Plan) -> None:
    """work(task) for every task, in no order; the caller is one of the threads, and the only one for a few flops.

    When a task raises, or the caller is interrupted, the tasks that have not begun are dropped, those that have are
    waited for, and the exception is raised.
    """
    threads = min(num_threads(), len(tasks)) if flops > plan.thread_flops else 1
    queue: Iterator[Any] = iter(tasks)  # whose next() is one step of the interpreter: no two get the same
    stopped = threading.Event()

    def worker() -> None:
        try:
            for task in queue:
                if stopped.is_set():
                    return
                work(task)
        except BaseException:
            stopped.set()
            raise

    helpers: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            helpers.append(_pool().submit(worker))
        worker()
    except BaseException:  # only then: a helper may just have taken the last task, and must not drop it
        stopped.set()
        raise
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()


_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    n = max(num_threads() - 1, 1)
    with _lock:
        if n not in _pools:
            _pools[n] = ThreadPoolExecutor(n, thread_name_prefix="funcmha")
        return _pools[n]


_libraries: list[Any] | None = None
_users = 0
_before: list[int] = []


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold every BLAS library at one thread; the last to leave puts back what the first one found.

    Those that the process had loaded at the first call, NumPy's among them: one that comes later is nothing to NumPy.
    """
    global _libraries, _users, _before
    with _lock:
        if _libraries is None:
            _libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        if _users == 0:
            _before = [library.get_num_threads() for library in _libraries]
            _set(_libraries, [1] * len(_libraries))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_libraries, _before)


def _set(libraries: list[Any], numbers: list[int]) -> None:
    """The threads of each. From 3.8 on threadpoolctl lets one thread set them, and does nothing for all others."""
    for library, n in zip(libraries, numbers, strict=True):
        release = getattr(library, "clear_controlling_thread", lambda force: None)
        release(force=True)
        library.set_num_threads(n)
        release(force=True)


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and a lock that one of them may have held."""
    global _lock, _users
    _lock, _users = threading.Lock(), 0
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, Any], Array] = {}


_local = _Scratch()


def scratch(name: str, shape: tuple[int, int], dtype: Any) -> Array:
    """An uninitialised array that belongs to this thread until it asks for the same name again."""
    size = shape[0] * shape[1]
    buffer = _local.buffers.get((name, dtype))
    if buffer is None or buffer.size < size:
        buffer = _local.buffers[name, dtype] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)
