"""A stand-in for `cupyx.distributed` with NCCL, between threads: its methods and no more of them.

It refuses what they refuse: arrays of NumPy, arrays that are not contiguous, dtypes that NCCL has not. Transfers happen
where the outermost group ends, as those of NCCL do, and arrive in the order in which they were begun. Signatures,
dtypes and messages are those of CuPy 14.2; tests/test_cupy_contract.py compares them with the package.
"""

import sys
import threading
from collections import deque
from contextlib import contextmanager
from types import ModuleType

import fake_cupy
import numpy as np

from funcmha import parallel

DTYPES = "bBiIlLqQefdFD"  # the characters of those that NCCL takes
SIGNATURES = {"send": "(self, array, peer, stream=None)", "recv": "(self, out_array, peer, stream=None)"}

_local = threading.local()


def groupStart():  # noqa: N802 — NCCL's name
    _local.depth = getattr(_local, "depth", 0) + 1


def groupEnd():  # noqa: N802
    _local.depth -= 1
    if _local.depth == 0:
        pending, _local.pending = getattr(_local, "pending", []), []
        for transfer in (*(t for t in pending if t[0] == "send"), *(t for t in pending if t[0] == "recv")):
            _do(*transfer)


def _do(kind, backend, array, peer):
    if kind == "send":
        backend.world.put((backend.rank, peer), array._a.copy())
        return
    arrived = backend.world.take((peer, backend.rank))
    if arrived.shape != array.shape or arrived.dtype != array.dtype:
        raise RuntimeError(f"rank {backend.rank} expects {array.shape} of {array.dtype}, got {arrived.shape}")
    array._a[...] = arrived


class Backend:
    """NCCLBackend, as far as a carrier needs it"""

    def __init__(self, world, n_devices, rank):
        self.world, self._n_devices, self.rank = world, n_devices, rank

    def send(self, array, peer, stream=None):
        self._begin("send", array, peer, stream)

    def recv(self, out_array, peer, stream=None):
        self._begin("recv", out_array, peer, stream)

    def _begin(self, kind, array, peer, stream):
        if not isinstance(array, fake_cupy.ndarray):
            raise AttributeError(f"{type(array).__name__!r} object has no attribute 'data.ptr'")
        if not array.flags.c_contiguous and not array.flags.f_contiguous:
            raise RuntimeError("NCCL requires arrays to be either c- or f-contiguous")
        if array.dtype.char not in DTYPES:
            raise TypeError(f"Unknown dtype {array.dtype} for NCCL")
        if not 0 <= peer < self._n_devices or peer == self.rank:
            raise RuntimeError(f"peer {peer}")
        if stream is not None and not isinstance(stream, fake_cupy.Stream):
            raise AttributeError("stream has no ptr")
        if getattr(_local, "depth", 0):
            _local.pending = [*getattr(_local, "pending", []), (kind, self, array, peer)]
        else:
            _do(kind, self, array, peer)


class World:
    """What is on its way between two ranks."""

    def __init__(self):
        self.changed, self.boxes = threading.Condition(), {}

    def put(self, box, a):
        with self.changed:
            self.boxes.setdefault(box, deque()).append(a)
            self.changed.notify_all()

    def take(self, box):
        with self.changed:
            if not self.changed.wait_for(lambda: self.boxes.get(box), timeout=20):
                raise RuntimeError(f"nothing came from rank {box[0]} to rank {box[1]}")
            return self.boxes[box].popleft()


@contextmanager
def installed():
    """The stand-ins are what `import cupy` and `from cupy.cuda import nccl` find while the block lasts."""
    library, cuda = ModuleType("cupy.cuda.nccl"), ModuleType("cupy.cuda")
    library.groupStart, library.groupEnd = groupStart, groupEnd
    cuda.nccl = library
    with fake_cupy.installed() as cupy:
        before = {name: sys.modules.get(name) for name in ("cupy.cuda", "cupy.cuda.nccl")}
        sys.modules |= {"cupy.cuda": cuda, "cupy.cuda.nccl": library}
        try:
            yield cupy
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module


def run(f, n):
    """[f(comm) of each rank], whose carrier is NCCL's"""
    world = World()
    return parallel.threads(n).run(lambda comm: f(parallel.nccl(Backend(world, n, comm.rank))))


def on_device(x):
    """A tree, a tuple or an array of NumPy in the stand-in"""
    return fake_cupy.MODULE.asarray(np.asarray(x)) if isinstance(x, np.ndarray) else x
