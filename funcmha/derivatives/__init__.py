"""Forward mode and second order, from the caches that the vjps take.

    y, cache  = f(*inputs, **static)
    y_dot     = f_jvp(cache, *inputs_dot)                    # ẏ = J ẋ, and ⟨dy, J ẋ⟩ = ⟨Jᵀ dy, ẋ⟩
    grads_dot = f_vjp_jvp(cache, dy, dy_dot, *inputs_dot)    # the tangents of f_vjp(cache, dy), a tuple as it is

A tangent has the shape and tree of what it is the tangent of, or is None, which is zero and costs nothing. The result
has the dtype of the tangents; float16 and bfloat16 are computed with in float32 and rounded once. A tangent is written
`q_dot`, for q̇: `dq` is a gradient.

For a loss L(y) with gradient dy and Hessian L″, the Hessian of the loss times a direction of the inputs is one call of
`f_vjp_jvp`, with dy_dot = L″ ẏ and ẏ = f_jvp(cache, *inputs_dot). As the second derivatives of ⟨dy, f⟩ are symmetric,
the same two functions are the vjp of the vjp, for frameworks that ask for it: with cotangents c of the gradients, the
inputs get f_vjp_jvp(cache, dy, None, *c), and dy gets f_jvp(cache, *c).
"""

from .attention import attention_jvp, attention_vjp_jvp, linear_jvp, linear_vjp_jvp
from .mha import head_jvp, mha_jvp, mha_vjp_jvp

__all__ = ["attention_jvp", "attention_vjp_jvp", "head_jvp", "linear_jvp", "linear_vjp_jvp", "mha_jvp", "mha_vjp_jvp"]
