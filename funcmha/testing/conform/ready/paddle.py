"""PaddlePaddle's attention."""

from typing import Any

import paddle

from funcmha.testing.conform.implementation import Implementation

from . import UNCENTRED, one_mask


def sdpa() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None
    ) -> Any:
        if causal and not (mask is None and bias is None):  # documented: a mask beside is_causal is ignored
            below = paddle.ones([q.shape[1], k.shape[1]]).tril().astype("bool")
            mask, causal = below if mask is None else paddle.logical_and(mask, below), False
        given = one_mask(mask, bias, paddle.where)
        return paddle.nn.functional.scaled_dot_product_attention(q, k, v, given, is_causal=causal, scale=scale)

    return Implementation(
        name="paddle.nn.functional.scaled_dot_product_attention",
        forward=forward,
        library="paddle",
        dtypes=("float64", "float32"),
        layout="B T H D",
        empty_row="mean",
        arithmetic=UNCENTRED,
        versions={"paddle": paddle.__version__},
    )
