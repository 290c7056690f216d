"""Multi-head attention as pure functions with explicit gradients, for NumPy and CuPy arrays."""

from . import engines, masks, npz, ops, params, tree
from .engines import attention, attention_vjp
from .mha import head, head_vjp, mha, mha_vjp, self_attention, self_attention_vjp
from .npz import ParameterFileError, load, save
from .ops import (
    attention_weights,
    linear,
    linear_vjp,
    log_sum_exp,
    softmax,
    softmax_vjp,
)
from .params import head_params, init, sizes

__version__ = "0.1.0"

__all__ = [
    "ParameterFileError",
    "attention",
    "attention_vjp",
    "attention_weights",
    "engines",
    "head",
    "head_params",
    "head_vjp",
    "init",
    "linear",
    "linear_vjp",
    "load",
    "log_sum_exp",
    "masks",
    "mha",
    "mha_vjp",
    "npz",
    "ops",
    "params",
    "save",
    "self_attention",
    "self_attention_vjp",
    "sizes",
    "softmax",
    "softmax_vjp",
    "tree",
]
