"""MLX's attention."""

from importlib.metadata import version
from typing import Any

import mlx.core as mx

from funcmha.testing.conform.implementation import Implementation

from . import UNCENTRED, one_mask


def sdpa() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, sink: Any = None, causal: bool = False,
        scale: Any = None,
    ) -> Any:  # fmt: skip
        T, S = q.shape[-2], k.shape[-2]
        if causal and not (mask is None and bias is None):  # which takes one or the other
            below = mx.tri(T, S, S - T) > 0
            mask, causal = below if mask is None else mask & below, False
        given = "causal" if causal else one_mask(mask, bias, mx.where)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=given, sinks=sink)

    return Implementation(
        name="mlx.core.fast.scaled_dot_product_attention",
        forward=forward,
        library="mlx.core",
        dtypes=("float32", "float64"),
        causal="bottom-right",
        empty_row="mean",
        arithmetic=UNCENTRED,
        limits={"B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"mlx": version("mlx")},
    )
