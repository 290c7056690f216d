"""Attention on many ranks: processes of MPI, GPUs of NCCL, or threads of one process.

    line = parallel.Line(parallel.mpi(), "zigzag")             # which tokens and heads each rank has
    i = line.positions(T)                                      # this rank's
    y, cache = parallel.self_attention(line, parallel.shard(params, line), x[..., i, :], mask=masks.causal())
    dparams, dx, _ = parallel.self_attention_vjp(cache, dy[..., i, :])

Functions are those of one process, with a `Line` before their arguments; arrays are each rank's part, and everything
else is of all tokens. All ranks call the same functions in the same order.
"""

from . import specification
from .attention import AttentionCache, attention, attention_vjp
from .comm import Comm
from .line import Layout, Line, grid
from .mha import MhaCache, SelfAttentionCache, mha, mha_vjp, self_attention, self_attention_vjp
from .mpi import mpi
from .nccl import nccl
from .planning import Cost, plan
from .threads import threads
from .trees import all_reduce, gather, scatter, shard, unshard

__all__ = [
    "AttentionCache",
    "Comm",
    "Cost",
    "Layout",
    "Line",
    "MhaCache",
    "SelfAttentionCache",
    "all_reduce",
    "attention",
    "attention_vjp",
    "gather",
    "grid",
    "mha",
    "mha_vjp",
    "mpi",
    "nccl",
    "plan",
    "scatter",
    "self_attention",
    "self_attention_vjp",
    "shard",
    "specification",
    "threads",
    "unshard",
]
