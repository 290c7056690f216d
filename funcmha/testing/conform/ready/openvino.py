"""OpenVINO's attention on a CPU: forward alone."""

from functools import cache
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from funcmha.testing.conform.implementation import Implementation

from . import one_mask


def sdpa() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None
    ) -> Any:
        if causal and not (mask is None and bias is None):  # documented: a mask beside causal is ignored
            below = np.tri(q.shape[-2], k.shape[-2], dtype=bool)[None, None]
            mask, causal = below if mask is None else mask & below, False
        given = one_mask(mask, bias, np.where)
        arrays = [q, k, v] if given is None else [q, k, v, given]
        return _compiled(arrays[-1].dtype if given is not None else None, causal, scale)(arrays)[0]

    return Implementation(
        name="openvino.opset13.scaled_dot_product_attention, CPU, INFERENCE_PRECISION_HINT=f32",
        forward=forward,
        empty_row="nan",
        gqa=None,
        limits={"B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"openvino": openvino.__version__},
    )


@cache
def _compiled(mask: Any, causal: bool, scale: float | None) -> Any:
    """A model of any sizes; by the dtype of its mask, or None"""
    kinds = [np.float32] * 3 + ([] if mask is None else [mask])
    inputs = [opset13.parameter([-1] * 4, kind) for kind in kinds]
    given = dict(zip(("query", "key", "value", "attention_mask"), inputs, strict=False))
    if scale is not None:
        if mask is None:
            given["attention_mask"] = np.zeros((1, 1), np.float32)  # which must be given before a scale
        given["scale"] = np.float32(scale)
    attention = opset13.scaled_dot_product_attention(**given, causal=causal)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(openvino.Model([attention], inputs), "CPU", hint)
