"""JAX's attentions."""

from typing import Any

import jax
from jax.experimental.pallas.ops.gpu import attention as pallas

from funcmha.testing.conform.implementation import Implementation
from funcmha.testing.profiles import Profile

VERSIONS = {"jax": jax.__version__}


def nn() -> Implementation:
    static = ("is_causal", "local_window_size", "scale", "return_residual")
    attend = jax.jit(jax.nn.dot_product_attention, static_argnames=static)  # compiled once for each shape

    def forward(
        q: Any, k: Any, v: Any, *, bias: Any = None, mask: Any = None, causal: bool = False, window: Any = None,
        scale: Any = None,
    ) -> Any:  # fmt: skip
        options = {"is_causal": causal, "local_window_size": window, "scale": scale, "return_residual": True}
        return attend(q, k, v, bias, mask, **options)

    return Implementation(
        name="jax.nn.dot_product_attention",
        forward=forward,
        outputs=("o", "lse"),
        library="jax",
        dtypes=("float32", "bfloat16"),
        layout="B T H D",
        lse_layout="B T H",
        empty_row="mean",
        arithmetic=Profile(("p", "ds"), centred=False),
        limits={"E": "D"},
        versions=VERSIONS,
    )


def pallas_gpu() -> Implementation:
    """Interpreted: kernels for GPUs, on any device"""

    def forward(q: Any, k: Any, v: Any, *, causal: bool = False, scale: Any = None) -> Any:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return pallas.mha(q, k, v, None, sm_scale=scale, causal=causal, interpret=True)

    return Implementation(
        name="jax.experimental.pallas.ops.gpu.attention.mha, interpreted",
        forward=forward,
        library="jax",
        layout="B T H D",
        gqa=None,
        limits={"E": "D", "D": (16, 128, 16), "T": "S"},
        versions=VERSIONS,
    )
