"""Multi-head attention as pure functions with explicit gradients, for NumPy and CuPy arrays."""

from . import biases, decode, dropout, engines, masks, norms, npz, ops, packing, params, rotary, surgery, tree
from .dropout import seeded
from .engines import attention, attention_vjp
from .forward import attention_jvp, linear_jvp, norm_jvp
from .forward_mha import head_jvp, mha_jvp
from .merge import merge, merge_vjp
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
from .scores import scores, scores_vjp
from .second import attention_vjp_jvp
from .second_mha import mha_vjp_jvp
from .step import self_attention_step, self_attention_step_vjp

__version__ = "0.1.0"

__all__ = [
    "ParameterFileError",
    "attention",
    "attention_jvp",
    "attention_vjp",
    "attention_vjp_jvp",
    "attention_weights",
    "biases",
    "decode",
    "dropout",
    "engines",
    "head",
    "head_jvp",
    "head_params",
    "head_vjp",
    "init",
    "linear",
    "linear_jvp",
    "linear_vjp",
    "load",
    "log_sum_exp",
    "masks",
    "merge",
    "merge_vjp",
    "mha",
    "mha_jvp",
    "mha_vjp",
    "mha_vjp_jvp",
    "norm_jvp",
    "norms",
    "npz",
    "ops",
    "packing",
    "params",
    "rotary",
    "save",
    "scores",
    "scores_vjp",
    "seeded",
    "self_attention",
    "self_attention_step",
    "self_attention_step_vjp",
    "self_attention_vjp",
    "sizes",
    "softmax",
    "softmax_vjp",
    "surgery",
    "tree",
]
