"""BLAS at one thread while funcmha works, and how many threads its user has left to it.

OpenBLAS's own threads spin for a while after each product, and so take the cores from a pool beside them. A pool that
does every product itself, each on one BLAS thread, has no such neighbour. (docs/decisions/0016-tiled.md)
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

F = TypeVar("F", bound=Callable[..., Any])

# A call may begin in the middle of another one on the same thread: in a signal handler, or when something is collected.
_lock = threading.RLock()
_holders: set[object] = set()
_before: list[int] | None = None  # what the user had set, while BLAS is held


class _Libraries:
    """The BLAS libraries that the process has loaded now: one that comes later is nothing to NumPy."""

    def __init__(self) -> None:
        found = ThreadpoolController().select(user_api="blas").lib_controllers
        every = [library for library in found if isinstance(library.get_num_threads(), int)]
        # OpenBLAS on OpenMP has a number for each thread, all others have one for the process.
        self.shared = [library for library in every if getattr(library, "threading_layer", "") != "openmp"]
        self.each = [library for library in every if library not in self.shared]
        self.ones = [1] * len(self.shared)
        home = os.path.dirname(os.path.realpath(np.__file__))
        numpys = [x for x in every if os.path.realpath(x.filepath).startswith((f"{home}.libs", f"{home}{os.sep}"))]
        # Of each, shared ones first: whether it is NumPy's, where PyTorch's or SciPy's may have a limit of their own.
        self.is_openblas = any(x.internal_api == "openblas" for x in numpys)
        self.counts = [not numpys or library in numpys for library in (*self.shared, *self.each)]


_found: _Libraries | None = None


class _Thread(threading.local):
    depth = 0  # calls that this thread is in, one in the other
    holds = False  # whether one of them holds BLAS
    before: Sequence[int] = ()  # what `each` had in it before the first of these


_here = _Thread()


def single_threaded_blas() -> AbstractContextManager[None]:
    """Hold every BLAS library at one thread; the last to leave puts back what the first one found.

    What is set to something else in the meantime is what the user wants: it is left so, or put back so if another call
    has begun since. (That somebody has set it to one thread cannot be known while it is held.)
    """
    return nullcontext() if _here.holds else _holding()


@contextmanager
def _holding() -> Iterator[None]:
    token, depth, before = object(), _here.depth, _here.before
    try:
        _here.depth = depth + 1
        _hold(token)
        _here.holds = True
        yield
    finally:
        _here.holds = False
        _release(token)
        if depth == 0 and _here.before:
            _set(_libraries().each, _here.before)
        _here.depth, _here.before = depth, before


def with_single_threaded_blas(f: F) -> F:
    """f, with BLAS held at one thread once for all that it calls, if it is given NumPy arrays."""

    @wraps(f)
    def held(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, np.ndarray) for x in args):
            return f(*args, **kwargs)
        with single_threaded_blas():
            return f(*args, **kwargs)

    return held  # type: ignore[return-value]


def limit() -> int | None:
    """How many threads the user has left to NumPy's BLAS, whether it is held now or not; None if it cannot be asked."""
    with _lock:
        libraries = _libraries()
        shared = _numbers(libraries.shared) if _before is None else _before
        each = _here.before or _numbers(libraries.each)
    numbers = zip((*shared, *each), libraries.counts, strict=True)
    return min((n for n, counts in numbers if counts), default=None)


def is_openblas() -> bool:
    """Whether NumPy's products are made by OpenBLAS"""
    return _libraries().is_openblas


def alone() -> None:
    """For a thread of the pool, as long as it lives: one thread of BLAS where each thread has a number of its own."""
    each = _libraries().each
    _set(each, [1] * len(each))


def _libraries() -> _Libraries:
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _Libraries()
    return _found


def _hold(token: object) -> None:
    global _before
    with _lock:
        _holders.add(token)
        libraries = _libraries()
        now = _numbers(libraries.shared)
        if now != libraries.ones:
            _before = now if _before is None else _unless_one(now, _before)
            _set(libraries.shared, libraries.ones)
        elif _before is None:
            _before = now
    if libraries.each and _here.depth == 1:
        _here.before = _numbers(libraries.each)
        alone()


def _release(token: object) -> None:
    global _before
    with _lock:
        _holders.discard(token)
        before = _before
        if not _holders and before is not None:
            _put_back(before)
            _before = None


def _put_back(before: list[int]) -> None:
    """What the user had, but where somebody has set something else in the meantime."""
    shared = _libraries().shared
    now = _numbers(shared)
    if (numbers := _unless_one(now, before)) != now:
        _set(shared, numbers)


def _unless_one(now: list[int], before: list[int]) -> list[int]:
    return [b if n == 1 else n for n, b in zip(now, before, strict=True)]


def _numbers(libraries: list[Any]) -> list[int]:
    return [library.get_num_threads() for library in libraries]


def _set(libraries: list[Any], numbers: Sequence[int]) -> None:
    """The threads of each. From 3.8 on, set_num_threads of threadpoolctl heeds one thread alone, and waits for a lock
    that a fork may have left behind; what it calls then does neither.
    """
    for library, n in zip(libraries, numbers, strict=True):
        getattr(library, "_real_set_num_threads", library.set_num_threads)(n)


def _after_fork() -> None:
    """A forked child is in none of its parent's calls: it has the BLAS that the user had set."""
    global _before
    _lock.release()
    _here.holds = False
    _holders.clear()
    if _before is not None:
        _put_back(_before)
        _before = None


if hasattr(os, "register_at_fork"):  # the lock is held meanwhile: no other thread is half-way through setting numbers
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)
