"""JAX: its attention on arrays of any library, and funcmha's functions inside JAX.

functional    `dot_product_attention` and its gradient, on arrays of any library
bridge        `as_jax_function`: any pair of funcmha inside a JAX program, on NumPy's engine

Only a call of `as_jax_function` imports JAX.
"""

from .bridge import as_jax_function
from .functional import dot_product_attention, dot_product_attention_vjp

__all__ = ["as_jax_function", "dot_product_attention", "dot_product_attention_vjp"]
