"""The engine for NumPy arrays: the ops of `funcmha.ops`, faster and in linear memory, on all cores."""

from . import batched
from .attention import AttentionCache, attention, attention_vjp
from .linear import linear, linear_vjp

__all__ = ["AttentionCache", "attention", "attention_vjp", "batched", "linear", "linear_vjp"]
