"""flash-attention: `flash_attn_func` and its relatives, with their names and conventions, and with gradients.

    out, cache = flash_attn_func(q, k, v, causal=True)                          # q, k, v (batch, tokens, heads, width)
    lse = log_sum_exp(cache)                                                    # softmax_lse, (batch, heads, tokens)
    dq, dk, dv, dalibi_slopes, dlearnable_sink, dqv = flash_attn_func_vjp(cache, dout)

One function stands for those of the same name in FA2 (`flash_attn`), FA3 (`hopper`) and FA4 (`flash_attn.cute`), and
takes the options of all three. Differentiable inputs are positional, all others are keywords, cu_seqlens too.

    flash_attn_func, flash_attn_varlen_func                                     FA2  FA3  FA4
    flash_attn_qkvpacked_func, flash_attn_with_kvcache                          FA2  FA3
    flash_attn_kvpacked_func, and both packed ones of varlen                    FA2
    flash_attn_combine                                                               FA3  FA4
    softmax_scale, causal, window_size, softcap; a table of pages of a cache    FA2  FA3  FA4
    alibi_slopes, dropout_p; a table of pages with cu_seqlens_k                 FA2
    qv, seqused_q, seqused_k                                                         FA3  FA4
    attention_chunk, num_heads_q; cu_seqlens and rotary_seqlens of a cache           FA3
    learnable_sink, gather_kv_indices, padded tokens and pages of varlen                  FA4

Differences from funcmha. Tokens come before heads. The last query is aligned with the last key in causal masks,
windows, chunks and ALiBi's distances, so that the first T − S of T > S queries are fully masked. -1 and None are no
bound of a window, and softcap = 0.0 is none. lse is (B, H, T), of packed sequences (H, N).

Differences between the originals, and from them:

- A fully masked row has lse −∞ here, as in the reference of their tests and in FA3's source. FA2's source writes +∞,
  unless it splits the keys, and its Triton backend 0 if causal.
- ALiBi is −slope · |i + S − T − j| here, as documented. FA2's source adds slope · j instead if causal without a window:
  the same weights, and an lse that is larger by slope · (i + S − T).
- FA2's source treats a window bound of S or more as none. Where T > S that is not the documented window; here it is.
- FA4's windows may be negative, and end before the diagonal. Here only -1 is accepted, and is no bound.
- With a qv, FA4 has lse with heads last. Here lse is as without qv; only `flash_attn_combine` has heads last.
- A key that gather_kv_indices lists twice counts once here, as in FA4's reference; its kernel reads it twice.
- FA4's source leaves out q and k where there is a qv and k is v, of width 512. Here q · k always counts.
- FA2 refuses softcap with dropout. FA3 has no gradient with attention_chunk or of qv, FA2 and FA3 have none of lse, and
  none of them has gradients of alibi_slopes, of pages or of a key/value cache. Here all have one. (FA4 has those of
  lse and the sink since #2706.)

Not supported:

- options that change how a result is computed, and not the result: num_splits, pack_gqa, deterministic, sm_margin,
  scheduler_metadata, disable_scheduler_metadata, seqlen_k_per_split, min_seqlen_k, gather_bwd_recompute_p,
  gather_bwd_token_chunk;
- options for more outputs: instead of return_attn_probs, return_softmax_lse and return_lse, call `log_sum_exp(cache)`
  and `attention_weights(cache)`;
- q_descale, k_descale, v_descale: FA3 reads them for FP8 only, which is no dtype here;
- score_mod, score_mod_bwd, mask_mod and their aux_tensors and aux_scalars, block_sparse_tensors and
  block_sparse_tensors_bwd: GPU code. See the mask and the bias of `funcmha.attention`;
- of flash_attn_combine: out and out_dtype, where to write; cu_seqlens, seqused and virtual_batch_idx, which rows.

FA2's Triton kernels and the references of all three were compared with this on a CPU (docs/decisions/0028), their CUDA
kernels only read. Signatures are those of 2.8.3 (FA2, FA3) and 4.0.0b36 (FA4). Docstrings and references are in
Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py (00530025), hopper/flash_attn_interface.py (01afd16d),
hopper/test_util.py (1076c675), flash_attn/cute/interface.py (004b1a2e) and testing.py (03146294). "Source" is
csrc/flash_attn/flash_api.cpp and src/softmax.h, src/mask.h, src/flash_fwd_kernel.h, hopper/flash_api.cpp and
softmax.h, flash_attn/cute/interface.py and topk_gather_kv.py.
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
