"""Keras's attentions, in the backend of KERAS_BACKEND, torch or jax: PyTorch where it is not set."""

import os
from functools import cache
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

from funcmha.testing.conform.implementation import DeclarationError, Implementation

from . import one_mask


def ops() -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None,
        softcap: Any = None,
    ) -> Any:  # fmt: skip
        if bias is not None:  # which takes one or the other
            mask, bias = None, one_mask(mask, bias, keras.ops.where)
        return keras.ops.dot_product_attention(
            q, k, v, bias, mask, scale, is_causal=causal, attn_logits_soft_cap=softcap
        )

    return _implementation("keras.ops.dot_product_attention", forward, limits={"E": "D"}, empty_row="mean")


def mha() -> Implementation:
    """The layer with projections of 1, which returns its weights: then it computes them itself"""

    def forward(q: Any, k: Any, v: Any, *, mask: Any = None, causal: bool = False) -> Any:
        (B, T, H, D), S, E = q.shape, k.shape[1], v.shape[-1]
        x = [keras.ops.reshape(a, (B, a.shape[1], H * a.shape[-1])) for a in (q, v, k)]
        layer = _layer(H, D, E, keras.backend.standardize_dtype(q.dtype))
        o, weights = layer(*x, attention_mask=mask, use_causal_mask=causal, return_attention_scores=True)
        return keras.ops.reshape(o, (B, T, H, E)), keras.ops.reshape(weights, (B, H, T, S))

    return _implementation("keras.layers.MultiHeadAttention", forward, outputs=("o", "weights"), gqa=None)


@cache
def _layer(H: int, D: int, E: int, dtype: str) -> Any:
    layer = keras.layers.MultiHeadAttention(H, D, E, use_bias=False, output_shape=H * E, dtype=dtype)
    layer.build((1, 1, H * D), (1, 1, H * E), (1, 1, H * D))
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense):
        dense.kernel.assign(
            keras.ops.reshape(keras.ops.eye(H * (D if dense.kernel.shape[-1] == D else E)), dense.kernel.shape)
        )
    return layer


def _implementation(name: str, forward: Any, **declared: Any) -> Implementation:
    backend = keras.backend.backend()
    if backend not in ("torch", "jax"):
        raise DeclarationError(f"KERAS_BACKEND must be torch or jax, of which there is autodiff here, got {backend!r}")
    return Implementation(
        name=f"{name}, backend {backend}",
        forward=forward,
        library=backend,
        layout="B T H D",
        versions={"keras": keras.__version__},
        **declared,
    )
