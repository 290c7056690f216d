"""Keys and values on their way round a ring, and their gradients on theirs.

Axes: S keys of all ranks; `...` is batch and heads.
"""

from collections.abc import Iterator

import numpy as np

from funcmha._arrays import Array, full, unset

from .comm import Comm, Wait
from .line import Layout
from .schedule import Step, Ways, steps

KV = tuple[Array, ...]  # keys and values (..., S, width); () for none


def agreed_ways(comm: Comm, own: np.ndarray) -> Ways:
    """Each rank tells the others which parts it needs."""
    out = np.empty((comm.size, comm.size), np.uint8)
    comm.all_gather(own.astype(np.uint8), list(out))
    return Ways.of(out != 0)


def travelling(comm: Comm, layout: Layout, kv: KV, S: int, ways: Ways) -> Iterator[tuple[Step, KV]]:
    """The keys and values of this rank, and those that come by; the next are on their way meanwhile. () for none"""
    all_steps, here = steps(comm.rank, ways), kv
    before, after = _neighbours(comm)
    for step, following in zip(all_steps, [*all_steps[1:], None], strict=True):
        coming: KV = ()
        if following is not None and following.arrives:
            coming = tuple(_rows_like(a, layout.ring_count(S, following.source)) for a in kv)
        wait = comm.shift([(a, after) for a in here if step.leaves], [(a, before) for a in coming])
        yield step, here
        wait()
        del wait  # which keeps what was sent
        here = coming


class Gradients:
    """dk and dv on their way: with the part that they belong to, and home from the last rank that needs it"""

    def __init__(self, comm: Comm, layout: Layout, dkv: KV, S: int, ways: Ways) -> None:
        self.comm, self.layout, self.own, self.S = comm, layout, dkv, S
        self.steps = steps(comm.rank, ways)
        self.wait: Wait = lambda: None
        self.coming: KV = ()  # of the part that comes by next
        self.homecoming: KV = ()  # of this rank's own

    def of(self, step: Step) -> KV:
        """Where to add those of this rank's queries"""
        if step.t == 0 or not step.carries:
            return self.own if step.t == 0 else ()
        n = self.layout.ring_count(self.S, step.source)
        return tuple(full((*a.shape[:-2], n, a.shape[-1]), 0.0, a) for a in self.own)

    def send(self, step: Step, dkv: KV) -> None:
        """Add what came along, and begin to send it on"""
        self.end()
        if step.t == 0:
            return
        for total, grad in zip(dkv, self.coming, strict=False):
            total += grad
        before, after = _neighbours(self.comm)
        following = self.steps[step.t + 1] if step.t + 1 < len(self.steps) else None
        self.coming = ()
        if following is not None and following.gathered:
            n = self.layout.ring_count(self.S, following.source)
            self.coming = tuple(_rows_like(a, n) for a in self.own)
        if step.owner >= 0:
            self.homecoming = tuple(_rows_like(a, a.shape[-2]) for a in self.own)
        sends = [(a, step.source if step.home else after) for a in dkv if step.carries]
        receives = [(a, before) for a in self.coming] + [(a, step.owner) for a in self.homecoming]
        self.wait = self.comm.shift(sends, receives)

    def end(self) -> None:
        """Wait for what is on its way, and add what came home"""
        self.wait()
        self.wait = lambda: None
        for total, grad in zip(self.own, self.homecoming, strict=False):
            total += grad
        self.homecoming = ()


def _neighbours(comm: Comm) -> tuple[int, int]:
    """The ranks before and after"""
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


def _rows_like(a: Array, n: int) -> Array:
    """Room for n rows, else like a (..., rows, width)"""
    return unset((*a.shape[:-2], n, a.shape[-1]), a)
