"""cuDNN's graph node `sdpa` and its `sdpa_backward`, as functions of arrays with cuDNN's names and conventions.

    o, cache = sdpa(q, k, v, attn_scale=D_qk**-0.5, diagonal_band_right_bound=0)       # causal
    dq, dk, dv, dbias, dsink_token = sdpa_vjp(cache, do)
    stats(cache)                                                     # (B, H_q, S_q, 1), the node's second output

Packed tensors, which have a ragged offset, are padded before `sdpa` and packed after it:

    q, q_cache = from_ragged(tokens, ragged_offset=offset, seq_len=n, s=S)      # (N, H, D)  →  (B, H, S, D)
    o, cache = sdpa(q, k, v, use_padding_mask=True, seq_len_q=n, seq_len_kv=n)
    packed, o_cache = to_ragged(o, ragged_offset=offset, seq_len=n, n=N)        # (B, H, S, D)  →  (N, H, D)

Differences from funcmha:

  * `attn_scale=None` is a scale of 1, not D_qk ** -0.5.
  * H_k may differ from H_v. Both divide H_q, and query head h reads key head h // (H_q // H_k).
  * The left bound is exclusive: query i attends to keys from i − left + 1 on, so 1 keeps the query's own key only. The
    right bound is inclusive. With "bottom_right" the diagonal ends in the last query and key, of each sequence where
    there are lengths. The older options for both are supported, but not together with the newer: one would win
    silently.
  * Queries, keys and values beyond `seq_len_q` and `seq_len_kv` count as 0, and so does `do`: even a NaN there has no
    effect. Such a query has o = 0, stats −∞ (or its sink) and gradient 0, as any fully masked row.
  * ALiBi is + slope · (j − i), not − slope · |j − i|: the same under a top-left causal mask, the only one with which
    cuDNN has it. Its slopes are `biases.alibi_slopes`.
  * A sink is (1, H_q, 1, 1), and float32 with 16-bit inputs. Stats include it.

The order is scale, bias, ALiBi, padding, band, sink, dropout. Not supported are a soft cap, which cuDNN has in a
`score_mod`, and block masks and paged keys, of which it has no gradient. The lengths are differences of `cu_seq_len_q`.
Combinations for which cuDNN has no kernel are supported: any width and dtype, left bounds and the bottom-right diagonal
with bias, ALiBi, dropout, and more queries than keys. Those that cuDNN calls invalid are refused.

Sources: the documentation and the Python reference of cudnn-frontend, `docs/operations/Attention.md` at commit 0512390,
for cuDNN up to 9.29, `test/python/sdpa/fp16_ref.py` at 0b648e4 and, for what is refused,
`include/cudnn_frontend/node/sdpa_support_surface.h` at 05067ca. Compared in float64 with the operations into which
cudnn-frontend 1.28 and 1.32 expand both nodes for cuDNN 9.20; not with its kernels, which need a GPU.
"""

from .attention import sdpa, sdpa_vjp, stats
from .ragged import from_ragged, from_ragged_vjp, to_ragged, to_ragged_vjp

__all__ = ["from_ragged", "from_ragged_vjp", "sdpa", "sdpa_vjp", "stats", "to_ragged", "to_ragged_vjp"]
