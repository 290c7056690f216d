"""Attention on many ranks: processes of MPI, GPUs of NCCL, or threads of one process."""

from . import specification
from .attention import AttentionCache, attention, attention_vjp
from .comm import Comm
from .line import Layout, Line, grid
from .threads import threads

__all__ = [
    "AttentionCache",
    "Comm",
    "Layout",
    "Line",
    "attention",
    "attention_vjp",
    "grid",
    "specification",
    "threads",
]
