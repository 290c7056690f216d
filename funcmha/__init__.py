"""Multi-head attention as pure functions with explicit gradients, for NumPy and CuPy arrays."""

from typing import TYPE_CHECKING

from . import (
    biases,
    derivatives,
    dropout,
    engines,
    kv_cache,
    masks,
    merge,
    norms,
    npz,
    ops,
    packing,
    params,
    rotary,
    surgery,
    tree,
)
from .engines import (
    attention,
    attention_vjp,
    attention_weights,
    head,
    head_vjp,
    log_sum_exp,
    mha,
    mha_vjp,
    self_attention,
    self_attention_vjp,
)
from .npz import ParameterFileError, load, save
from .ops import linear, linear_vjp, softmax, softmax_vjp
from .params import head_params, init, sizes

if TYPE_CHECKING:
    from . import parallel
else:

    def __getattr__(name):
        """`funcmha.parallel`, imported when it is first asked for: what one process does not need"""
        if name != "parallel":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.parallel")


__version__ = "0.2.0"

__all__ = [
    "ParameterFileError",
    "attention",
    "attention_vjp",
    "attention_weights",
    "biases",
    "derivatives",
    "dropout",
    "engines",
    "head",
    "head_params",
    "head_vjp",
    "init",
    "kv_cache",
    "linear",
    "linear_vjp",
    "load",
    "log_sum_exp",
    "masks",
    "merge",
    "mha",
    "mha_vjp",
    "norms",
    "npz",
    "ops",
    "packing",
    "parallel",
    "params",
    "rotary",
    "save",
    "self_attention",
    "self_attention_vjp",
    "sizes",
    "softmax",
    "softmax_vjp",
    "surgery",
    "tree",
]
