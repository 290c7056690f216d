"""NCCL as a carrier, by cupyx.distributed: CuPy arrays between GPUs, one process each.

It has not been run on GPUs, but on a stand-in that has the methods of cupyx.distributed and refuses what they refuse.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from funcmha._arrays import Array

from .comm import Comm, Wait


class _Nccl(Comm):
    def __init__(self, backend: Any) -> None:
        try:
            import cupy
            from cupy.cuda import nccl as library
        except ImportError as error:
            instead = "pip install 'funcmha[cuda12]' or 'funcmha[cuda13]'"
            raise ImportError(f"parallel.nccl needs CuPy with NCCL ({error}): {instead}") from error

        self.cupy, self.library, self.backend = cupy, library, backend
        self.rank, self.size = backend.rank, backend._n_devices
        self.stream = cupy.cuda.Stream(non_blocking=True)  # on which arrays travel while others are computed

    def shift(self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]) -> Wait:
        on_device = [(self._on_device(x), r) for x, r in sends]
        to_fill = [(x if self._is_there(x) else self.cupy.empty(x.shape, x.dtype), r) for x, r in receives]
        self.stream.wait_event(self.cupy.cuda.get_current_stream().record())  # until what is sent has been computed
        self.library.groupStart()  # or each rank would wait for the other to receive first
        for x, r in on_device:
            if x.size:
                self.backend.send(self._bytes(x), r, self.stream)
        for x, r in to_fill:
            if x.size:
                self.backend.recv(self._bytes(x), r, self.stream)
        self.library.groupEnd()
        arrived = self.stream.record()

        def wait() -> None:
            self.cupy.cuda.get_current_stream().wait_event(arrived)  # the device waits, the host does not
            for (x, _), (filled, _) in zip(receives, to_fill, strict=True):
                if x is not filled:
                    x[...] = filled.get()
            on_device.clear()  # till here they are kept: their memory belongs to another stream

        return wait

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self.cupy.empty(shape, super().empty((0,), dtype).dtype)

    def _is_there(self, x: Array) -> bool:
        return not isinstance(x, np.ndarray)

    def _on_device(self, x: Array) -> Array:
        return x if self._is_there(x) else self.cupy.asarray(x)

    def _bytes(self, x: Array) -> Array:
        """The numbers of a contiguous array as bytes, a view: NCCL knows neither bfloat16 nor booleans"""
        return self.cupy.reshape(x, (-1,)).view(self.cupy.uint8)


def nccl(backend: Any) -> Comm:
    """The ranks of `cupyx.distributed.init_process_group(n, rank)`, for CuPy arrays on the current device

    Numbers travel as bytes, so that every dtype does; they are added up by funcmha, in the order of the ranks. The host
    waits where arguments are compared, and where ranks tell what a mask needs, and nowhere else. Raises ImportError
    where there is no CuPy with NCCL.
    """
    if not all(hasattr(backend, name) for name in ("rank", "_n_devices", "send", "recv")):
        wanted = "what cupyx.distributed.init_process_group returns"
        raise TypeError(f"backend must be {wanted}, got {type(backend).__name__}")
    return _Nccl(backend)
