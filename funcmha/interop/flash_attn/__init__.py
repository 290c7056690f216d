"""flash-attention: `flash_attn_func` and its relatives, in their words, with gradients.

    out, cache = flash_attn_func(q, k, v, causal=True)                          # q, k, v (batch, tokens, heads, width)
    lse = log_sum_exp(cache)                                                    # softmax_lse, (batch, heads, tokens)
    dq, dk, dv, dalibi_slopes, dlearnable_sink = flash_attn_func_vjp(cache, dout)

One function stands for those of one name in FA2 (`flash_attn`), FA3 (`hopper`) and FA4 (`flash_attn.cute`), and takes
what any of them takes, all of it with a gradient. What has none is by keyword, cu_seqlens and dropout_p too.

What differs from funcmha. Tokens come before heads. The last query is aligned with the last key, in causal masks and
windows, chunks and ALiBi's distances, so that of T > S queries the first T − S see nothing. -1, or None, is no bound of
a window, and softcap = 0.0 is none. lse is (B, H, T), of packed sequences (H, N).

What differs among the originals, and from them:

- A query that sees no key has lse −∞ here, as in their tests' reference and in FA3's source; FA2's source writes +∞,
  unless it splits the keys.
- ALiBi is −slope · |i + S − T − j| here, as documented. FA2's source adds slope · j instead if causal without a window:
  the same weights, and an lse that is larger by slope · (i + S − T).
- FA2's source takes a reach of S or more for no bound. Where T > S that is not the documented window; here it is.
- FA4's windows may be negative, and end before the diagonal. Here only -1 is taken, and is no bound.
- FA2 refuses softcap with dropout. FA3 has no gradient with attention_chunk, FA2 and FA3 have none of lse, and nobody
  has that of alibi_slopes or of a key/value cache. Here there are all. (FA4 has those of lse and the sink since #2706.)

Not spoken: qv, the descale factors of FP8, score_mod, mask_mod and block sparsity; num_heads_q of packed inputs, a
block_table of `flash_attn_varlen_func`, cu_seqlens_q and rotary_seqlens of `flash_attn_with_kvcache`; and what changes
no result, as do deterministic, num_splits, pack_gqa and sm_margin. What return_attn_probs, return_softmax_lse and
return_lse ask for is `log_sum_exp(cache)` and `attention_weights(cache)`.

No kernel of flash-attention runs on a CPU, so none was run: what is said of them was read. Docstrings and references in
Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py (00530025), hopper/flash_attn_interface.py (01afd16d),
hopper/test_util.py (1076c675), flash_attn/cute/interface.py (004b1a2e) and testing.py (03146294). "Source" is
csrc/flash_attn/flash_api.cpp and src/softmax.h, src/mask.h, src/flash_fwd_kernel.h, hopper/softmax.h.
"""

from .combine import flash_attn_combine, flash_attn_combine_vjp
from .dense import flash_attn_func, flash_attn_func_vjp
from .kvcache import flash_attn_with_kvcache, flash_attn_with_kvcache_vjp
from .packed import (
    flash_attn_kvpacked_func,
    flash_attn_kvpacked_func_vjp,
    flash_attn_qkvpacked_func,
    flash_attn_qkvpacked_func_vjp,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_kvpacked_func_vjp,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_varlen_qkvpacked_func_vjp,
)
from .varlen import flash_attn_varlen_func, flash_attn_varlen_func_vjp

__all__ = [
    "flash_attn_combine",
    "flash_attn_combine_vjp",
    "flash_attn_func",
    "flash_attn_func_vjp",
    "flash_attn_kvpacked_func",
    "flash_attn_kvpacked_func_vjp",
    "flash_attn_qkvpacked_func",
    "flash_attn_qkvpacked_func_vjp",
    "flash_attn_varlen_func",
    "flash_attn_varlen_func_vjp",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_kvpacked_func_vjp",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_qkvpacked_func_vjp",
    "flash_attn_with_kvcache",
    "flash_attn_with_kvcache_vjp",
]
