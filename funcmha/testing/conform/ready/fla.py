"""flash-linear-attention's softmax attention, in Triton: on a GPU, or on a CPU by Triton's interpreter."""

import os
from importlib.metadata import version
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before its kernels are compiled

from fla.ops.attn.parallel import parallel_attn as attend

from funcmha.testing.conform.implementation import Implementation


def parallel_attn() -> Implementation:
    def forward(q: Any, k: Any, v: Any, *, sink: Any = None, window: Any = None, scale: Any = None) -> Any:
        before = None if window is None else window[0] + 1
        return attend(q, k, v, scale=scale, window_size=before, sink_bias=sink)

    gpu = torch.cuda.is_available()
    return Implementation(
        name=f"fla.ops.attn.parallel.parallel_attn{'' if gpu else ', interpreted'}",
        forward=forward,
        library="torch",
        device="cuda" if gpu else "cpu",
        dtypes=("float32", "bfloat16") if gpu else ("float32",),
        layout="B T H D",
        limits={"causal": True, "S": "T", "D": (1, 256)},
        versions={"fla-core": version("fla-core"), "triton": version("triton"), "torch": torch.__version__},
    )
