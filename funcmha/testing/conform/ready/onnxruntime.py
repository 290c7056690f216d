"""onnxruntime's Attention on a CPU: forward alone."""

from functools import cache
from typing import Any

import onnxruntime

from funcmha.testing.conform.implementation import Implementation

from .onnx import attention as of_onnx


def attention() -> Implementation:
    return of_onnx(
        "onnxruntime, CPUExecutionProvider", _run, {"onnxruntime": onnxruntime.__version__}, empty_row="zero"
    )


@cache
def _session(serialised: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])


def _run(serialised: bytes, inputs: dict[str, Any]) -> Any:
    return _session(serialised).run(None, inputs)
