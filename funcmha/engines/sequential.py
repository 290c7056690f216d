"""The specification as an engine, for any array library: the heads one after another."""

from funcmha.mha import (
    HeadCache,
    MhaCache,
    SelfAttentionCache,
    head,
    head_vjp,
    mha,
    mha_vjp,
    self_attention,
    self_attention_vjp,
)
from funcmha.ops import AttentionCache, attention, attention_vjp

__all__ = [
    "AttentionCache",
    "HeadCache",
    "MhaCache",
    "SelfAttentionCache",
    "attention",
    "attention_vjp",
    "head",
    "head_vjp",
    "mha",
    "mha_vjp",
    "self_attention",
    "self_attention_vjp",
]
