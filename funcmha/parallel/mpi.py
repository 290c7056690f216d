"""MPI as a carrier, by mpi4py: NumPy arrays between processes, on one machine or many."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from funcmha._arrays import Array

from .comm import Comm, Wait

MESSAGE = 2**30  # bytes of one message at most: counts of MPI before 4.0 have 31 bits


class _Mpi(Comm):
    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self.mpi, self.comm = MPI, comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def shift(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> Wait:
        requests = [self.comm.Irecv([part, self.mpi.BYTE], source=r) for x, r in receives for part in _messages(x)]
        requests += [self.comm.Isend([part, self.mpi.BYTE], dest=r) for x, r in sends for part in _messages(x)]
        return lambda: self.mpi.Request.Waitall(requests)

    def all_gather(self, x: Array, out: Sequence[Array]) -> None:
        sizes = [a.nbytes for a in out]
        if sum(sizes) > MESSAGE:
            super().all_gather(x, out)
            return
        buffer, ends = np.empty(sum(sizes), np.uint8), np.cumsum([0, *sizes])
        self.comm.Allgatherv([_bytes(x), self.mpi.BYTE], [buffer, sizes, ends[:-1].tolist(), self.mpi.BYTE])
        for a, start, stop in zip(out, ends, ends[1:], strict=False):
            _bytes(a)[:] = buffer[start:stop]

    def group(self, ranks: Sequence[int]) -> Comm:
        if list(ranks) == list(range(self.size)):
            return self
        return _Mpi(self.comm.Create_group(self.comm.Get_group().Incl(list(ranks))))


def mpi(comm: Any = None) -> Comm:
    """The ranks of an MPI communicator, or of all processes that `mpiexec` has started, for NumPy arrays

    Numbers travel as bytes, so that every dtype does. The communicator is duplicated: messages of others on it do not
    mix with these. Every process of it calls this, once. Start processes by `mpiexec -n 4 python -m mpi4py script.py`:
    then an exception on one ends all. Raises ImportError where there is no mpi4py or no MPI.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        instead = "pip install 'funcmha[mpi]', or, where a cluster has an MPI, mpi4py alone beside it"
        raise ImportError(f"parallel.mpi needs mpi4py and an MPI ({error}): {instead}") from error
    comm = MPI.COMM_WORLD if comm is None else comm
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be a communicator of mpi4py, or None for all processes, got {type(comm).__name__}")
    return _Mpi(comm.Dup())


def _bytes(x: Array) -> Array:
    """The numbers of a contiguous array as bytes: a view"""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"MPI carries NumPy arrays, got {type(x).__module__}.{type(x).__name__}: use parallel.nccl")
    return x.reshape(-1).view(np.uint8)


def _messages(x: Array) -> list[Array]:
    """The bytes of an array in as many messages as it takes; one of an array without numbers"""
    whole = _bytes(x)
    return [whole[i : i + MESSAGE] for i in range(0, max(whole.size, 1), MESSAGE)]
