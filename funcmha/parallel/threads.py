"""Ranks that are threads of one process: for tests, and to try what will run on many machines."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from funcmha import _check
from funcmha._arrays import Array

from .comm import Comm, Wait

R = TypeVar("R")


class Threads:
    """n ranks in this process; see `threads`."""

    def __init__(self, n: int) -> None:
        self.size = n

    def run(self, f: Callable[[Comm], R]) -> list[R]:
        """[f(comm) of rank 0, of rank 1, …], each on a thread of its own

        Where one raises, the others end at their next transfer, and its exception is raised here.
        """
        world = _World(self.size)
        workers = [threading.Thread(target=world.work, args=(f, rank), daemon=True) for rank in range(self.size)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException:  # Ctrl-C
            world.stop()
            raise
        for error in world.errors:
            raise error
        return [world.results[rank] for rank in range(self.size)]


def threads(n: int) -> Threads:
    """n ranks as threads of this process: `threads(4).run(lambda comm: …)` gives what each returned

    NumPy arrays and those of other libraries that can be written to. They share the cores: nothing becomes faster.
    """
    return Threads(_check.integer("n", n, 1))


class _StoppedError(Exception):
    """Another rank has raised."""


class _World:
    """What the ranks share: the arrays on their way, of each pair of ranks in the order in which they were sent."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int], deque[_Message]] = {}
        self.stopped = False
        self.returned: set[int] = set()
        self.errors: list[BaseException] = []
        self.results: dict[int, Any] = {}

    def work(self, f: Callable[[Comm], Any], rank: int) -> None:
        try:
            self.results[rank] = f(_Rank(self, rank))
            with self.changed:
                self.returned.add(rank)
                self.changed.notify_all()
        except _StoppedError:
            pass
        except BaseException as error:
            self.errors.append(error)
            self.stop()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def until(self, ready: Callable[[], Any]) -> None:
        """Wait, with the lock held."""
        self.changed.wait_for(lambda: self.stopped or ready())
        if self.stopped:
            raise _StoppedError


class _Message:
    def __init__(self, x: Array) -> None:
        self.x, self.taken = x, False


class _Rank(Comm):
    def __init__(self, world: _World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def shift(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> Wait:
        world, messages = self.world, [_Message(x) for x, _ in sends]
        with world.changed:
            for message, (_, to) in zip(messages, sends, strict=True):
                world.sent.setdefault((self.rank, to), deque()).append(message)
            world.changed.notify_all()

        def wait() -> None:
            for out, source in receives:
                box = (source, self.rank)
                with world.changed:
                    world.until(lambda box=box: world.sent.get(box) or box[0] in world.returned)  # type: ignore[misc]
                    self._check(bool(world.sent.get(box)), source)
                    message = world.sent[box].popleft()
                if tuple(message.x.shape) != tuple(out.shape) or message.x.dtype != out.dtype:
                    got, wanted = f"{tuple(message.x.shape)} of {message.x.dtype}", f"{tuple(out.shape)} of {out.dtype}"
                    raise RuntimeError(f"rank {self.rank} expects {wanted} of rank {source}, got {got}")
                out[...] = message.x
                with world.changed:
                    message.x, message.taken = None, True
                    world.changed.notify_all()
            with world.changed:
                for message, (_, to) in zip(messages, sends, strict=True):
                    world.until(lambda message=message, to=to: message.taken or to in world.returned)  # type: ignore[misc]
                    self._check(message.taken, to)

        return wait

    def _check(self, there: bool, other: int) -> None:
        if not there:
            raise RuntimeError(
                f"rank {self.rank} waits for rank {other}, which has returned: all call the same functions"
            )
