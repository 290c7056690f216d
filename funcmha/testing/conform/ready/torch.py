"""PyTorch's attentions."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from funcmha.testing.conform.implementation import Implementation

from . import UNCENTRED, one_mask

VERSIONS = {"torch": torch.__version__}


def sdpa_math() -> Implementation:
    return Implementation(
        name="torch.nn.functional.scaled_dot_product_attention, math",
        forward=_sdpa(SDPBackend.MATH),
        library="torch",
        dtypes=("float64", "float32", "float16", "bfloat16"),
        arithmetic=UNCENTRED,
        versions=VERSIONS,
    )


def sdpa_flash() -> Implementation:
    return Implementation(
        name="torch.nn.functional.scaled_dot_product_attention, flash",
        forward=_sdpa(SDPBackend.FLASH_ATTENTION),
        library="torch",
        dtypes=("float64", "float32", "float16", "bfloat16"),
        gradients=("q", "k", "v"),  # the fused kernels have none of the mask
        limits={"E": "D"},
        versions=VERSIONS,
    )


def _sdpa(kernel: SDPBackend) -> Any:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None
    ) -> Any:
        if causal and not (mask is None and bias is None):  # which takes one or the other
            below, causal = _below(q, k), False
            mask = below if mask is None else mask & below
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q, k, v, one_mask(mask, bias, torch.where), is_causal=causal, scale=scale,
                enable_gqa=q.shape[-3] != k.shape[-3],
            )  # fmt: skip

    return forward


def _below(q: Any, k: Any) -> Any:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


# ── whole layers, with projections of 1 ──────────────────────────────────────────────────────────────────────────


def mha() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, bias_k: Any = None, bias_v: Any = None,
        causal: bool = False,
    ) -> Any:  # fmt: skip
        if causal:
            mask = _below(q, k) if mask is None else mask & _below(q, k)
        return _layer(q, k, v, _additive(q, k, mask, bias), bias_k, bias_v, average_attn_weights=False)

    return Implementation(
        name="torch.nn.MultiheadAttention, projections of 1",
        forward=forward,
        outputs=("o", "weights"),
        library="torch",
        dtypes=("float64", "float32"),
        empty_row="nan",
        gqa=None,
        arithmetic=UNCENTRED,
        limits={"E": "D"},
        versions=VERSIONS,
    )


def mha_is_causal() -> Implementation:
    """Without weights: then `is_causal` stands for the mask beside it"""

    def forward(q: Any, k: Any, v: Any, *, causal: bool = False, bias_k: Any = None, bias_v: Any = None) -> Any:
        mask = _additive(q, k, _below(q, k), None) if causal else None
        return _layer(q, k, v, mask, bias_k, bias_v, is_causal=causal, need_weights=False)[0]

    return Implementation(
        name="torch.nn.MultiheadAttention, projections of 1, is_causal=True, need_weights=False",
        forward=forward,
        library="torch",
        dtypes=("float64", "float32"),
        gqa=None,
        limits={"E": "D"},
        versions=VERSIONS,
    )


def _additive(q: Any, k: Any, mask: Any, bias: Any) -> Any:
    """(B H, T, S), of booleans True where it is forbidden"""
    B, H, T, _ = q.shape
    given = one_mask(mask, bias, torch.where)
    if given is None:
        return None
    given = ~given if given.dtype == torch.bool else given
    return given.expand(B, H, T, k.shape[-2]).reshape(B * H, T, k.shape[-2])


def _layer(q: Any, k: Any, v: Any, mask: Any, bias_k: Any, bias_v: Any, **options: Any) -> tuple[Any, Any]:
    B, H, T, D = q.shape
    x = [a.permute(2, 0, 1, 3).reshape(a.shape[2], B, H * D) for a in (q, k, v)]
    rows = [None if a is None else a.reshape(1, 1, H * D) for a in (bias_k, bias_v)]
    eye = torch.eye(H * D, dtype=q.dtype)
    whole: Any = torch.nn.functional.multi_head_attention_forward
    y, weights = whole(
        *x, H * D, H, torch.cat([eye] * 3), None, *rows, False, 0.0, eye, None, attn_mask=mask, **options
    )
    return y.reshape(T, B, H, D).permute(1, 2, 0, 3), weights


# ── flex ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def flex() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, causal: bool = False, mask: Any = None, bias: Any = None, scale: Any = None
    ) -> Any:
        B, H, T, S = sizes = (*q.shape[:-1], k.shape[-2])
        whole = [None if a is None else a.expand(sizes) for a in (mask, bias)]

        def may(b: Any, h: Any, i: Any, j: Any) -> Any:
            keep = j <= i if causal else j >= 0
            return keep if whole[0] is None else keep & whole[0][b, h, i, j]

        def add(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s if whole[1] is None else s + whole[1][b, h, i, j]

        blocks = create_block_mask(may, B, H, T, S, device=q.device) if causal or mask is not None else None
        return flex_attention(
            q, k, v, score_mod=None if bias is None else add, block_mask=blocks, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return Implementation(
        name="torch.nn.attention.flex_attention, eager",
        forward=forward,
        library="torch",
        gradients=(),  # NotImplementedError on the CPU
        versions=VERSIONS,
    )
