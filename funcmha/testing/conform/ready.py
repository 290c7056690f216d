"""Implementations that are ready to be judged, by name: `torch:sdpa-flash`, `jax:nn`, `funcmha:tiled`, …"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from funcmha.testing.profiles import STRICT, Profile

from .implementation import DeclarationError, Implementation

UNCENTRED = Profile(centred=False)  # no kernel of another library keeps the digits of saturated rows


def ready(name: str) -> Implementation:
    """The implementation of this name; DeclarationError with all names for any other"""
    if name not in READY:
        raise DeclarationError(f"there is no ready-made {name!r}: there are {', '.join(READY)}")
    return READY[name]()


# ── funcmha ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _funcmha(engine: str) -> Callable[[], Implementation]:
    def make() -> Implementation:
        from funcmha import engines, masks

        def forward(
            q: Any, k: Any, v: Any, *, bias: Any = None, mask: Any = None, sink: Any = None, causal: bool = False,
            window: Any = None, scale: Any = None, softcap: Any = None,
        ) -> Any:  # fmt: skip
            for more in (masks.causal() if causal else None, None if window is None else masks.window(*window)):
                mask = more if mask is None else mask if more is None else more & masks.as_mask(mask)
            o, cache = engines.attention(q, k, v, bias, sink, mask=mask, scale=scale, softcap=softcap, engine=engine)
            return (o, engines.log_sum_exp(cache), engines.attention_weights(cache)), cache

        return Implementation(
            name=f"funcmha.attention, engine={engine!r}",
            forward=forward,
            backward=engines.attention_vjp,
            outputs=("o", "lse", "weights"),
            dtypes=("float64", "float32", "float16", *(("bfloat16",) if find_spec("ml_dtypes") else ())),
            arithmetic=Profile(recomputed=True, base2=True) if engine == "tiled" else STRICT,
        )

    return make


# ── PyTorch ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_sdpa(backend: str) -> Callable[[], Implementation]:
    def make() -> Implementation:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        kernel = SDPBackend.MATH if backend == "math" else SDPBackend.FLASH_ATTENTION

        def forward(
            q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False, scale: Any = None
        ) -> Any:
            if bias is not None:
                mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            if causal and mask is not None:  # which takes one or the other
                below = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
                mask, causal = (
                    (mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -torch.inf)),
                    False,
                )
            with sdpa_kernel(kernel):
                return sdpa(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[-3] != k.shape[-3])

        math = backend == "math"
        return Implementation(
            name=f"torch.nn.functional.scaled_dot_product_attention, {backend}",
            forward=forward,
            library="torch",
            dtypes=("float64", "float32", "float16", "bfloat16"),
            arithmetic=UNCENTRED if math else "flash",
            gradients=None if math else ("q", "k", "v"),  # the fused kernels have none of the mask
            limits={} if math else {"E": "D"},
            versions={"torch": torch.__version__},
        )

    return make


def _torch_mha() -> Implementation:
    import torch

    whole: Any = torch.nn.functional.multi_head_attention_forward

    def forward(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None) -> Any:
        B, H, T, D = q.shape
        S = k.shape[-2]
        x = [a.permute(2, 0, 1, 3).reshape(a.shape[2], B, H * D) for a in (q, k, v)]
        eye = torch.eye(H * D, dtype=q.dtype)
        allowed = None if mask is None else mask.expand(B, H, T, S).reshape(B * H, T, S)
        added = None if bias is None else bias.expand(B, H, T, S).reshape(B * H, T, S)
        if allowed is not None:
            added = ~allowed if added is None else added.masked_fill(~allowed, -torch.inf)
        y, weights = whole(
            *x, H * D, H, torch.cat([eye] * 3), None, None, None, False, 0.0, eye, None,
            attn_mask=added, average_attn_weights=False,
        )  # fmt: skip
        return y.reshape(T, B, H, D).permute(1, 2, 0, 3), weights

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
        versions={"torch": torch.__version__},
    )


def _torch_flex() -> Implementation:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def forward(
        q: Any, k: Any, v: Any, *, causal: bool = False, mask: Any = None, bias: Any = None, scale: Any = None
    ) -> Any:
        sizes = (*q.shape[:-1], k.shape[-2])
        whole = [None if a is None else a.expand(sizes) for a in (mask, bias)]

        def may(b: Any, h: Any, i: Any, j: Any) -> Any:
            keep = j <= i if causal else j >= 0
            return keep if whole[0] is None else keep & whole[0][b, h, i, j]

        def add(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s if whole[1] is None else s + whole[1][b, h, i, j]

        B, H, T, S = sizes
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
        versions={"torch": torch.__version__},
    )


# ── JAX ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _jax_nn() -> Implementation:
    import jax

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
        versions={"jax": jax.__version__},
    )


def _jax_pallas_gpu() -> Implementation:
    import jax
    from jax.experimental.pallas.ops.gpu import attention as pallas

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
        versions={"jax": jax.__version__},
    )


# ── MLX and tinygrad ─────────────────────────────────────────────────────────────────────────────────────────────


def _mlx() -> Implementation:
    from importlib.metadata import version

    import mlx.core as mx

    def forward(
        q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, sink: Any = None, causal: bool = False,
        scale: Any = None,
    ) -> Any:  # fmt: skip
        T, S = q.shape[-2], k.shape[-2]
        if causal and (mask is not None or bias is not None):  # which takes one or the other
            below = mx.tri(T, S, S - T) > 0
            mask, causal = below if mask is None else mask & below, False
        given = bias if mask is None else mask if bias is None else mx.where(mask, bias, -float("inf"))
        given = "causal" if causal else given
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=given, sinks=sink)

    return Implementation(
        name="mlx.core.fast.scaled_dot_product_attention",
        forward=forward,
        library="mlx.core",
        dtypes=("float32", "float64"),
        causal="bottom-right",
        empty_row="mean",
        arithmetic=UNCENTRED,
        limits={"B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"mlx": version("mlx")},
    )


def _tinygrad() -> Implementation:
    from importlib.metadata import version

    def forward(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, causal: bool = False) -> Any:
        given = bias if mask is None else mask if bias is None else mask.where(bias, -float("inf"))
        return q.scaled_dot_product_attention(k, v, given, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return Implementation(
        name="tinygrad.Tensor.scaled_dot_product_attention",
        forward=forward,
        library="tinygrad",
        empty_row="nan",
        arithmetic=UNCENTRED,
        limits={"B": (1, 2**31), "T": (1, 2**31), "S": (1, 2**31)},
        versions={"tinygrad": version("tinygrad")},
    )


READY: dict[str, Callable[[], Implementation]] = {
    **{f"funcmha:{engine}": _funcmha(engine) for engine in ("sequential", "batched", "tiled")},
    "torch:sdpa-math": _torch_sdpa("math"),
    "torch:sdpa-flash": _torch_sdpa("flash"),
    "torch:mha": _torch_mha,
    "torch:flex": _torch_flex,
    "jax:nn": _jax_nn,
    "jax:pallas-gpu": _jax_pallas_gpu,
    "mlx:sdpa": _mlx,
    "tinygrad:sdpa": _tinygrad,
}
