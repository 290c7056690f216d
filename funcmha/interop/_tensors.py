"""Tensors of PyTorch on the CPU as NumPy arrays of the same memory.

PyTorch is not imported here: the caller has imported it.
"""

import sys
from typing import Any

import numpy as np

from funcmha._arrays import Array, dtype_name, is_array


def to_array(name: str, x: Any) -> Array:
    """A tensor as the NumPy array of the same memory, and an array as it is."""
    if not is_array(x):
        raise TypeError(f"{name} must be a tensor or an array, got {type(x).__name__}")
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return x
    if x.device.type != "cpu":
        raise TypeError(f"{name} must be on the CPU, got a tensor on {x.device}: use .cpu()")
    x = x.detach()
    return x.view(torch.int16).numpy().view(bfloat16(name)) if dtype_name(x) == "bfloat16" else x.numpy()


def bfloat16(name: str) -> np.dtype[Any]:
    """NumPy's bfloat16, for the tensor `name`."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} is bfloat16, which NumPy knows through ml_dtypes only: install it, or use .float()"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
