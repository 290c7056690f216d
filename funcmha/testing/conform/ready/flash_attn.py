"""flash-attention: on a GPU, or without one its Triton kernels for AMD in Triton's interpreter.

For the interpreter its source must be on the path, as `make kernels` has it: its wheels are for CUDA.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from funcmha.testing.conform.implementation import Implementation

GPU = torch.cuda.is_available()


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """While it is imported: what is changed is where things may run, and of what is computed, nothing"""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    import triton

    tune, custom_op = triton.autotune, torch.library.custom_op

    def by_arguments(configs: Any, key: Any, *, use_cuda_graph: bool = False) -> Callable[..., Any]:
        """Triton 3.9 refuses keys that are no arguments of the kernel, which there are, and warns of a graph."""
        return lambda kernel: tune(configs, [name for name in key if name in kernel.arg_names])(kernel)

    def everywhere(*name: Any, device_types: Any = None, **options: Any) -> Any:
        """Its ops are registered for CUDA alone."""
        return custom_op(*name, **options)

    with mock.patch.object(triton, "autotune", by_arguments), mock.patch.object(torch.library, "custom_op", everywhere):
        yield


with nullcontext() if GPU else without_a_gpu():
    import flash_attn


def func() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, causal: bool = False, window: Any = None, scale: Any = None, softcap: float = 0.0
    ) -> Any:
        window = (-1, -1) if window is None else window
        o, lse, _ = flash_attn.flash_attn_func(q, k, v, 0.0, scale, causal, window, softcap, return_attn_probs=True)
        return o, lse

    return Implementation(
        name=f"flash_attn.flash_attn_func{'' if GPU else ', Triton kernels for AMD, interpreted'}",
        forward=forward,
        outputs=("o", "lse"),
        library="torch",
        device="cuda" if GPU else "cpu",
        dtypes=("float16", "bfloat16") if GPU else ("float32",),
        layout="B T H D",
        causal="bottom-right",
        limits={"E": "D", "D": (8, 256, 8), "B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"flash-attn": flash_attn.__version__, "torch": torch.__version__},
    )
