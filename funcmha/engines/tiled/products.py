"""Products in partial sums: a long sum of float32 numbers loses more digits than several short ones.

OpenBLAS makes partial sums of at most 512 terms by itself, but not in small products
(docs/decisions/0042-fewer-calls.md).
"""

import numpy as np

from funcmha._arrays import Array
from funcmha.engines.plan import Plan

from . import blas, threads


def product(a: Array, b: Array, /, *, out: Array, plan: Plan, add: bool = False) -> Array:
    """out = a b, or out += a b      a (..., R, I)   b (..., I, N)   →   out (..., R, N)"""
    (R, N), I = out.shape[-2:], max(b.shape[-2], 1)
    by_itself = blas.is_openblas() and min(R, N) > 1 and plan.small_product < R * N * I
    terms = I if by_itself else plan.terms
    for i in range(0, I, terms):
        left, right = a[..., i : i + terms], b[..., i : i + terms, :]
        if i or add:
            np.add(out, np.matmul(left, right, out=threads.scratch("product", out.shape, out.dtype)), out=out)
        else:
            np.matmul(left, right, out=out)
    return out
