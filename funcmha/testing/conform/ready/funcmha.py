"""The engines of funcmha, the batched one in small blocks, and all of `mha`."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from funcmha import engines, masks
from funcmha.engines import BATCHED, Engine, Plan
from funcmha.testing.conform.implementation import Implementation
from funcmha.testing.profiles import STRICT, Profile

DTYPES = ("float64", "float32", "float16", *(("bfloat16",) if find_spec("ml_dtypes") else ()))
RECOMPUTED = Profile(recomputed=True, base2=True)


def sequential() -> Implementation:
    return _by(engines.SEQUENTIAL, STRICT)


def batched() -> Implementation:
    return _by(BATCHED, STRICT)


def blocks() -> Implementation:
    return _by(BATCHED._replace(name="blocks", plan=Plan(score_bytes=0, numpy_bytes=0, block_side=16)), RECOMPUTED)


def tiled() -> Implementation:
    return _by(engines.TILED, RECOMPUTED)


def mha() -> Implementation:
    """All of `mha`, with projections of 1, by the engine that it chooses"""

    def forward(
        q: Any, k: Any, v: Any, *, bias: Any = None, mask: Any = None, sink: Any = None, bias_k: Any = None,
        bias_v: Any = None, causal: bool = False, window: Any = None, scale: Any = None, softcap: Any = None,
    ) -> Any:  # fmt: skip
        x = [_tokens(a) for a in (q, k, v)]
        projections = {"q_proj": q, "k_proj": k, "v_proj": v}
        params = {name: {"w": _eye(a.shape[1], a.shape[-1], q.dtype)} for name, a in projections.items()}
        out = np.moveaxis(_eye(q.shape[1], v.shape[-1], q.dtype), -1, 0)
        params |= {"out_proj": {"w": out}} | ({} if sink is None else {"sink": {"w": sink}})
        params |= {} if bias_k is None else {"bias_kv": {"k": bias_k, "v": bias_v}}
        y, cache = engines.mha(params, *x, bias, mask=_mask(mask, causal, window), scale=scale, softcap=softcap)
        outputs = _of_heads(y, q.shape[1]), engines.log_sum_exp(cache), engines.attention_weights(cache)
        return outputs, (cache, q.shape[1], k.shape[1])

    def backward(saved: Any, do: Any, **cotangents: Any) -> Any:
        cache, H, K = saved
        dparams, dq, dk, dv, dbias = engines.mha_vjp(cache, _tokens(do), **cotangents)
        dsink, row = dparams.get("sink", {}).get("w"), dparams.get("bias_kv", {})
        dx = (_of_heads(g, heads) for g, heads in ((dq, H), (dk, K), (dv, K)))
        return *dx, dbias, dsink, row.get("k"), row.get("v")

    return Implementation(
        name="funcmha.mha, projections of 1",
        forward=forward,
        backward=backward,
        outputs=("o", "lse", "weights"),
        dtypes=DTYPES,
        arithmetic=RECOMPUTED,
    )


def _tokens(a: Any) -> Any:
    """(B, H, T, D) → (B, T, H D)"""
    B, H, T, D = a.shape
    return a.swapaxes(1, 2).reshape(B, T, H * D)


def _of_heads(a: Any, H: int) -> Any:
    """(B, T, H D) → (B, H, T, D)"""
    return a.reshape(*a.shape[:2], H, a.shape[-1] // H).swapaxes(1, 2)


def _eye(H: int, D: int, dtype: Any) -> Any:
    return np.eye(H * D).reshape(H, D, H * D).astype(dtype)


def _mask(mask: Any, causal: bool, window: Any) -> Any:
    for more in (masks.causal() if causal else None, None if window is None else masks.window(*window)):
        mask = more if mask is None else mask if more is None else more & masks.as_mask(mask)
    return mask


def _by(engine: Engine, arithmetic: Profile) -> Implementation:
    def forward(
        q: Any, k: Any, v: Any, *, bias: Any = None, mask: Any = None, sink: Any = None, causal: bool = False,
        window: Any = None, scale: Any = None, softcap: Any = None,
    ) -> Any:  # fmt: skip
        options = {"mask": _mask(mask, causal, window), "scale": scale, "softcap": softcap, "engine": engine}
        o, cache = engines.attention(q, k, v, bias, sink, **options)
        return (o, engines.log_sum_exp(cache), engines.attention_weights(cache)), cache

    return Implementation(
        name=f"funcmha.attention, engine={engine.name!r}",
        forward=forward,
        backward=engines.attention_vjp,
        outputs=("o", "lse", "weights"),
        dtypes=DTYPES,
        arithmetic=arithmetic,
    )
