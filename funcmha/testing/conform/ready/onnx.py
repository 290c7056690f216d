"""ONNX's Attention by the reference implementation of the onnx package: forward alone."""

from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from funcmha.testing.conform.implementation import Implementation

from . import one_mask

OPSET = 24


def reference() -> Implementation:
    return attention("onnx.reference.ReferenceEvaluator", _by_reference, {"onnx": onnx.__version__}, empty_row="zero")


def attention(name: str, run: Any, versions: dict[str, str], **declared: Any) -> Implementation:
    """An Attention of ONNX that `run` runs: (serialised model, inputs by name) → outputs"""

    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None,
        softcap: Any = None,
    ) -> Any:  # fmt: skip
        given = one_mask(mask, bias, np.where)
        inputs = {"Q": q, "K": k, "V": v}
        if given is not None:  # by the definition a last axis that is shorter is filled up with −∞, not broadcast
            given = np.broadcast_to(given, (*given.shape[:-1], k.shape[-2]))
            inputs["attn_mask"] = np.ascontiguousarray(given)
        options = {"is_causal": int(causal), "scale": scale, "softcap": softcap}
        kinds = tuple((n, a.dtype.name, a.ndim) for n, a in inputs.items())
        set_ = tuple((n, value) for n, value in options.items() if value is not None)
        return tuple(run(model(kinds, set_), inputs))

    return Implementation(
        name=f"{name}, Attention of opset {OPSET}",
        forward=forward,
        outputs=("o", "weights"),
        versions=versions,
        **declared,
    )


@cache
def model(kinds: tuple[tuple[str, str, int], ...], options: tuple[tuple[str, Any], ...]) -> bytes:
    """Of any sizes: Y, and the weights, which is mode 3 of its fourth output"""

    def value(name: str, kind: str, ndim: int) -> Any:
        number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        return onnx.helper.make_tensor_value_info(name, number, [f"{name}{i}" for i in range(ndim)])

    names = [name for name, _, _ in kinds]
    node = onnx.helper.make_node("Attention", names, ["Y", "", "", "weights"], qk_matmul_output_mode=3, **dict(options))
    outputs = [value("Y", kinds[0][1], 4), value("weights", kinds[0][1], 4)]
    graph = onnx.helper.make_graph([node], "attention", [value(*kind) for kind in kinds], outputs)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    made: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return made


def _by_reference(serialised: bytes, inputs: dict[str, Any]) -> Any:
    return ReferenceEvaluator(onnx.load_from_string(serialised)).run(None, inputs)
