"""PyTorch: its parameters, masks and functions, and funcmha's functions inside it.

module        the parameters and the masks of `torch.nn.MultiheadAttention`, and the masks' gradient
functional    `scaled_dot_product_attention` and its gradient, on arrays
multi_head    `multi_head_attention_forward` and its gradient, on arrays
autograd      `as_torch_function`: any pair of funcmha inside a PyTorch program; import it from there
"""

from .functional import scaled_dot_product_attention, scaled_dot_product_attention_vjp
from .module import from_module, from_state_dict, masks, merge_masks, merge_masks_vjp, to_state_dict
from .multi_head import multi_head_attention_forward, multi_head_attention_forward_vjp

__all__ = [
    "from_module",
    "from_state_dict",
    "masks",
    "merge_masks",
    "merge_masks_vjp",
    "multi_head_attention_forward",
    "multi_head_attention_forward_vjp",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_vjp",
    "to_state_dict",
]
