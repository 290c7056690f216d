"""The table of attentions: the type of a cache says whose vjp, weights and log-sum-exp are its own."""

from functools import singledispatch
from typing import Any

from funcmha import ops
from funcmha._arrays import Array, own, read_only

from . import batched, blocks, tiled

attention_vjp = ops.attention_vjp  # which is that of the specification for its own cache


@singledispatch
def attention_weights(cache: Any, /) -> Array:
    """p = softmax(z, sink)    (..., H, T, S), z the scores of `attention`, before dropout, from the cache of any op

    In the dtype computed with: float32 for float16 and bfloat16. Not to be written to: it may be the cache's own.
    """
    if isinstance(cache, tuple) and hasattr(cache, "attention"):
        return attention_weights(cache.attention)
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


@singledispatch
def log_sum_exp(cache: Any, /) -> Array:
    """lse = log (Σ exp(z) + exp(sink))    (..., H, T), natural, z the scores of `attention`, from the cache of any op

    −∞, or the sink, for a fully masked query. In the dtype computed with: float32 for float16 and bfloat16.
    """
    if isinstance(cache, tuple) and hasattr(cache, "attention"):
        return log_sum_exp(cache.attention)
    raise TypeError(f"cache must come from an attention of funcmha, got {type(cache).__name__}")


attention_vjp.register(batched.AttentionCache, batched.attention_vjp)
attention_vjp.register(blocks.AttentionCache, blocks.attention_vjp)
attention_vjp.register(tiled.AttentionCache, tiled.attention_vjp)

attention_weights.register(ops.AttentionCache, lambda cache: read_only(cache.p))
attention_weights.register(batched.AttentionCache, lambda cache: read_only(cache.rest.p))
attention_weights.register(blocks.AttentionCache, blocks.attention_weights)
attention_weights.register(tiled.AttentionCache, tiled.attention_weights)

log_sum_exp.register(ops.AttentionCache, lambda cache: own(cache.lse, cache.lse))
log_sum_exp.register(batched.AttentionCache, lambda cache: own(cache.rest.lse, cache.rest.lse))
log_sum_exp.register(blocks.AttentionCache, blocks.log_sum_exp)
log_sum_exp.register(tiled.AttentionCache, tiled.log_sum_exp)
