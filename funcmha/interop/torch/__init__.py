"""PyTorch's words in funcmha's and back, one file for each of its doors.

module    the parameters and the masks of `torch.nn.MultiheadAttention`
"""

from .module import from_module, from_state_dict, masks, to_state_dict

__all__ = ["from_module", "from_state_dict", "masks", "to_state_dict"]
