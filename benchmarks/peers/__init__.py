"""The peers. A peer is `prepare(case, problem, variant)` in the file of its library: it returns a `Call`, or raises
`SkipError`. No library is imported here: each has its own process, where `load` imports it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from benchmarks.cases import Case, Problem, scores_bytes
from benchmarks.machine import memory_available

PEERS = {  # name: file, variant
    "PyTorch": ("torch", "eager"),
    "PyTorch SDPA": ("torch", "sdpa"),
    "PyTorch weights": ("torch", "weights"),
    "PyTorch compiled": ("torch", "compiled"),
    "JAX": ("jax", ""),
    "ONNX Runtime": ("onnxruntime", ""),
    "funcmha": ("funcmha", "default"),
    "funcmha AVX2": ("funcmha", "default"),
    "funcmha lean": ("funcmha", "lean"),
    "funcmha sequential": ("funcmha", "sequential"),
    "Compyute sequential": ("compyute", "sequential"),
    "Compyute semi": ("compyute", "semi"),
    "Compyute parallel": ("compyute", "parallel"),
}
EAGER = "PyTorch"  # what the others are divided by
PRODUCT, PRODUCT_AVX2 = "product", "product AVX2"  # not peers: the speed of the machine, by either kind of kernels
KERNELS = dict.fromkeys(("funcmha AVX2", PRODUCT_AVX2), "Haswell")  # OPENBLAS_CORETYPE of their processes


class Call(NamedTuple):
    """The timed functions of one case. Inputs and parameters are converted for the library before the clock starts.

    `both` returns the output and the gradients of every input and parameter; `named` returns them as NumPy arrays, by
    name, in the shapes of `funcmha.params.SPEC`, or of a peer without a backward the output alone. `warm` does the rest
    of a first call with these shapes: it compiles.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any] | None  # None: the case, or the peer, has no backward
    named: Callable[[], dict[str, np.ndarray]]
    warm: Callable[[], Any] = lambda: None

    def of(self, direction: str) -> Callable[[], Any]:
        if direction != "forward" and self.both is None:
            raise SkipError("has no backward")
        return self.forward if direction == "forward" else self.both


class SkipError(Exception):
    """This peer cannot do this case; the message is shown in its row."""


def load(name: str) -> Callable[[Case, Problem], Call]:
    """`prepare` of a peer, with its variant; imports its library."""
    if name in KERNELS and not {x.get("architecture") for x in threadpool_info()} & {KERNELS[name]}:
        raise SkipError(f"the BLAS of NumPy has no {KERNELS[name]} kernels")
    file, variant = ("product", "") if name in (PRODUCT, PRODUCT_AVX2) else PEERS[name]
    try:
        module = importlib.import_module(f"{__name__}.{file}")
    except ModuleNotFoundError as error:
        raise SkipError(f"{error.name} is not installed") from None
    return lambda case, problem: module.prepare(case, problem, variant)


def check_memory(case: Case, copies: float) -> None:
    """Raise SkipError if `copies` arrays of all scores would need more than half of the memory that is free."""
    need, limit = copies * scores_bytes(case), memory_available() / 2
    if need > limit:
        raise SkipError(f"about {need / 1e9:.0f} GB of scores; {limit / 1e9:.0f} GB allowed, half of what is free")
