"""tinygrad's attention."""

from importlib.metadata import version
from typing import Any

from funcmha.testing.conform.implementation import Implementation

from . import UNCENTRED, one_mask


def sdpa() -> Implementation:
    def forward(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False) -> Any:
        given = one_mask(mask, bias, lambda mask, bias, other: mask.where(bias, other))
        return q.scaled_dot_product_attention(k, v, given, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return Implementation(
        name="tinygrad.Tensor.scaled_dot_product_attention",
        forward=forward,
        library="tinygrad",
        empty_row="nan",
        arithmetic=UNCENTRED,
        limits={"B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"tinygrad": version("tinygrad")},
    )
