"""flash-attention 2.8.3.post2 on a CPU: its Triton kernels in Triton's interpreter, behind its public functions.

    TRITON_INTERPRET=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE        before Python starts: `make kernels`

To import this is to change torch for good, so that it wants a process of its own. What is changed is where things may
run, and of what is computed, nothing.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch

from funcmha.testing.conform.ready.flash_attn import without_a_gpu

with without_a_gpu():
    import flash_attn
    from flash_attn.flash_attn_triton_amd import interface_fa, utils
    from flash_attn.layers.rotary import apply_rotary_emb_torch

__all__ = ["apply_rotary_emb_torch", "flash_attn", "interface_fa", "reference"]


def _need_alibi(self, slopes, batch, heads):
    """As the original, but for the slopes being on a GPU."""
    assert slopes.shape == (batch, heads)
    self.alibi_slopes = slopes


utils.MetaData.need_alibi = _need_alibi
torch.cuda.device = lambda index: contextlib.nullcontext()  # within which the rotary kernel is launched, …
torch.library.wrap_triton = lambda kernel: kernel  # … wrapped by this, which refuses a kernel that is interpreted


def reference(path):
    """A module of its tests, by its path in the source: they ask for the GPU's model when they are imported."""
    file = Path(flash_attn.__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(f"flash_attn_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    beside = mock.patch.object(sys, "path", [str(file.parent), *sys.path])
    with beside, mock.patch.object(torch.cuda, "get_device_capability", return_value=(0, 0)):
        spec.loader.exec_module(module)
    return module
