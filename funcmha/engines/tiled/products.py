"""Products in partial sums: a long sum of float32 numbers loses more digits than several short ones.

OpenBLAS adds up to 448 terms one after another, MKL 192. With 192 too the output and the gradients at the seed and
GPT-2's sizes are as close to float64 as PyTorch's (docs/decisions/0027-digits-and-memory.md).
"""

import numpy as np

from funcmha._arrays import Array, quiet_underflow

from . import threads


@quiet_underflow
def product(a: Array, b: Array, /, *, out: Array, terms: int, add: bool = False) -> Array:
    """out = a b, or out += a b      a (..., R, I)   b (..., I, N)   →   out (..., R, N)     in sums of so many terms"""
    for i in range(0, max(b.shape[-2], 1), terms):
        left, right = a[..., i : i + terms], b[..., i : i + terms, :]
        if i or add:
            np.add(out, np.matmul(left, right, out=threads.scratch("product", out.shape, out.dtype)), out=out)
        else:
            np.matmul(left, right, out=out)
    return out
