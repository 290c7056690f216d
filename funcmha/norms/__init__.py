"""Norms over the last axis, for queries and keys before their scores: `rms_norm`, `l2_norm`, `layer_norm`.

    y, cache = rms_norm(x, w, eps=1e-6)
    dx, dw   = rms_norm_vjp(cache, dy)                               and so the jvp, and the tangents of the vjp
    y, cache = mha(params, x, x, x, qk_norm=RMSNorm(eps=1e-6))       a norm as a static value, for `mha`

Rows of any size are rows like others: each is divided by a power of two near its largest magnitude, which is exact,
before anything is squared. Where eps = 0 leaves nothing to divide by, a row of zeros (for `layer_norm` of one number
D times) is normalised to 0, and its x has gradient 0, whatever the finite cotangent; the formula has neither value nor
derivative there, and PyTorch gives NaN. An eps too small for the dtype of x counts as 0. A row with an infinity or a
NaN has a NaN.

The Jacobian of each, without its parameters, is symmetric: (I − n nᵀ / D) / root for `rms_norm`. So a jvp multiplies
by what the vjp multiplies by.

Axes: D the width that is normalised over; `...` is batch. Each norm is a file; what they share is in `rows`.
"""

from .l2 import L2Norm, L2NormCache, l2_norm, l2_norm_jvp, l2_norm_vjp, l2_norm_vjp_jvp
from .layer import LayerNorm, LayerNormCache, layer_norm, layer_norm_jvp, layer_norm_vjp, layer_norm_vjp_jvp
from .rms import RMSNorm, RmsNormCache, rms_norm, rms_norm_jvp, rms_norm_vjp, rms_norm_vjp_jvp

Norm = RMSNorm | L2Norm | LayerNorm

__all__ = [
    "L2Norm",
    "L2NormCache",
    "LayerNorm",
    "LayerNormCache",
    "Norm",
    "RMSNorm",
    "RmsNormCache",
    "l2_norm",
    "l2_norm_jvp",
    "l2_norm_vjp",
    "l2_norm_vjp_jvp",
    "layer_norm",
    "layer_norm_jvp",
    "layer_norm_vjp",
    "layer_norm_vjp_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "rms_norm_vjp",
    "rms_norm_vjp_jvp",
]
