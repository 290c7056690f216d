"""Decoding over a key/value cache: `empty`, `append` and `step`, each with its gradient to the past."""

from .append import AppendCache, KVCache, append, append_vjp, empty, step_mask
from .step import StepCache, step, step_vjp

__all__ = ["AppendCache", "KVCache", "StepCache", "append", "append_vjp", "empty", "step", "step_mask", "step_vjp"]
