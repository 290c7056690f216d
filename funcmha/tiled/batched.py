"""Attention of short sequences: that of `funcmha.ops`, of all heads of all samples at once, on one BLAS thread.

There are as many products as heads, each so small that OpenBLAS takes longer to wake its threads than to do it alone.
"""

from typing import Any

from funcmha import ops

from . import threads


def attention(*inputs: Any, **static: Any) -> tuple[Any, ops.AttentionCache]:
    """As `funcmha.ops.attention`."""
    with threads.single_threaded_blas():
        return ops.attention(*inputs, **static)


def attention_vjp(cache: ops.AttentionCache, do: Any, /, **cotangents: Any) -> tuple[Any, ...]:
    """As `funcmha.ops.attention_vjp`."""
    with threads.single_threaded_blas():
        return ops.attention_vjp(cache, do, **cotangents)
