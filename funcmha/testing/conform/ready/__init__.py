"""Implementations that are ready to be judged, by name: `torch:sdpa-flash`, `jax:nn`, `funcmha:tiled`, …

One module for each library, which imports it; one function for each name: `ready("torch:sdpa-flash")` is
`torch.sdpa_flash()` of the module beside this one.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from funcmha.testing.conform.implementation import DeclarationError, Implementation
from funcmha.testing.profiles import Profile

READY = (
    *("funcmha:sequential", "funcmha:batched", "funcmha:blocks", "funcmha:tiled", "funcmha:mha"),
    *("torch:sdpa-math", "torch:sdpa-flash", "torch:mha", "torch:mha-is-causal", "torch:flex"),
    *("jax:nn", "jax:pallas-gpu"),
    *("keras:ops", "keras:mha"),
    *("onnx:reference", "onnxruntime:attention", "openvino:sdpa"),
    *("mlx:sdpa", "tinygrad:sdpa", "paddle:sdpa"),
    *("flash-attn:func", "fla:parallel-attn"),
)
UNCENTRED = Profile(centred=False)  # no kernel of another library keeps the digits of saturated rows


def ready(name: str) -> Implementation:
    """The implementation of this name; DeclarationError with all names for any other"""
    if name not in READY:
        raise DeclarationError(f"there is no ready-made {name!r}: there are {', '.join(READY)}")
    module, _, function = name.replace("-", "_").partition(":")
    make: Callable[[], Implementation] = getattr(import_module(f"{__name__}.{module}"), function)
    return make()


def one_mask(mask: Any, bias: Any, where: Callable[[Any, Any, float], Any]) -> Any:
    """A mask and a bias in the one argument that a library has for both: the bias, and −∞ where the mask is False"""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return where(mask, bias, -float("inf"))
