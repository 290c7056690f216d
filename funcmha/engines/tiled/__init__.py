"""The engine for NumPy arrays: `attention` in tiles, in linear memory, and `linear` in blocks of rows, on all cores."""

from .attention import attend, attention, attention_vjp, attention_weights, log_sum_exp
from .cache import AttentionCache
from .linear import linear, linear_vjp, linears, linears_vjp

__all__ = [
    "AttentionCache",
    "attend",
    "attention",
    "attention_vjp",
    "attention_weights",
    "linear",
    "linear_vjp",
    "linears",
    "linears_vjp",
    "log_sum_exp",
]
