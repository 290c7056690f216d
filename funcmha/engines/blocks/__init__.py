"""Attention by blocks of queries and keys, of all heads and samples at once, for arrays of any library: linear memory.

What the engine "batched" does where the scores would not fit. A block of queries meets its keys block by block. The
forward keeps the largest score of each row and the sum of its exponentials so far (Milakov and Gimelshein 2018), and
scales what it has where a larger score comes (Dao et al. 2022). The derivatives make the exponentials of a block again,
with the row maxima and the row sums of the forward.

Nothing here depends on what an array of q's library holds: to look is to wait for a device, and an error under JAX's
`jit`. Masks are asked, whose data is NumPy's.
"""

from .attention import attend, attention_vjp, attention_weights, log_sum_exp
from .cache import AttentionCache, attended
from .cut import block_sizes
from .derivatives import attention_jvp, attention_vjp_jvp

__all__ = [
    "AttentionCache",
    "attend",
    "attended",
    "attention_jvp",
    "attention_vjp",
    "attention_vjp_jvp",
    "attention_weights",
    "block_sizes",
    "log_sum_exp",
]
