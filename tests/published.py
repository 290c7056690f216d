"""Bugs that were published of attention kernels, planted in copies of tests/plain_attention.py, in our own words.

Each is one replacement in its source, and the feature of `funcmha.testing.conform` that must find it, or the convention
that is measured to be another than the implementation declares.
"""

import types
from pathlib import Path
from typing import NamedTuple

from funcmha.testing.conform import Implementation
from funcmha.testing.profiles import Profile

PLAIN = Path(__file__).with_name("plain_attention.py").read_text()
ARITHMETIC = Profile(("o",), centred=False)  # of the plain implementation: δ = Σ do ⊙ o


class Fault(NamedTuple):
    bug: str  # where it was published
    says: str
    feature: str
    old: str
    new: str


class Variant(NamedTuple):
    says: str
    changes: tuple[tuple[str, str], ...]
    arithmetic: Profile = ARITHMETIC


def implementation(*changes: tuple[str, str], arithmetic: Profile = ARITHMETIC, **declared: object) -> Implementation:
    """The plain implementation after some replacements, each of which has one place"""
    source = PLAIN
    for old, new in changes:
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    module = types.ModuleType("plain_attention")
    exec(compile(source, "plain_attention.py", "exec"), module.__dict__)
    usual = {"outputs": ("o", "lse", "weights"), "dtypes": ("float32",), "arithmetic": arithmetic}
    return Implementation("plain", module.forward, module.backward, **{**usual, **declared})


UNCHANGED = "    do = do.astype(q.dtype)\n"
TILES = "for start in range(0, kh.shape[2], TILE):"
LAST = "    return dq, dk, dv, dbias, dsink, dbias_k, dbias_v\n"
EXP = "        p = np.exp(scores[..., tile] - top) / total\n"
DP = "        dp = do @ vh[:, :, tile].mT\n"
TOTAL = "    total = e.sum(-1, keepdims=True) + e_sink\n"
GROUPS = "    dk, dv = (a.reshape(a.shape[0], a.shape[1] // group, group, *a.shape[2:]).sum(2) for a in (dk, dv))\n"
DBIAS = "    dbias = None if bias is None else unbroadcast(dz, bias.shape)\n"

FAULTS = (
    Fault("flash-attention 2424", "the backward drops the mask", "mask", ", sink, scores, top, total, lse, c, o, scale, softcap, group, appended)\n\n", ", sink, z + 0 * scores.astype(bool), top, total, lse, c, o, scale, softcap, group, appended)\n\n"),
    Fault("flash-attention 2623", "a mask of blocks walks its tiles backwards in the gradient", "mask", "        dv[:, :, tile] = p.mT @ do\n", "        dv[:, :, tile] = (p[..., ::-1] if np.isneginf(scores).any() else p).mT @ do\n"),
    Fault("flash-attention 2481", "δ is that of the call before", "plain", "    along = -delta\n", "    stale = globals().get('stale')\n    globals()['stale'] = delta\n    delta = stale if stale is not None and stale.shape == delta.shape else delta\n    along = -delta\n"),
    Fault("flash-attention 443", "0 / 0 in a row that attends nothing", "empty_row", "    total = np.where(empty, q.dtype.type(1), total)\n", "    total = total\n"),
    Fault("flash-attention 2568", "a maximum of no keys", "size 0", "scores.max(-1, keepdims=True, initial=-np.inf)", "scores.max(-1, keepdims=True)"),
    Fault("cudnn-frontend 676", "−∞ − −∞ in a row that attends nothing", "empty rows", EXP, "        p = np.exp(scores[..., tile] - lse[..., None])\n"),
    Fault("mindone 1438", "the backward takes a cotangent of ones", "plain", UNCHANGED, UNCHANGED + "    do = np.ones_like(do)\n"),
    Fault("cudnn-frontend 421", "the sink is not in the denominator of the backward", "sink", EXP, "        p = np.exp(scores[..., tile] - top) / (total if sink is None else total - np.exp(sink[:, None, None] - top))\n"),
    Fault("cudnn-frontend 421, second", "the gradient of the sink is never written", "sink", "        dsink = (np", "        dsink = 0 * (np"),
    Fault("flashinfer 4267", "the running maximum starts at −50,000", "deep scores", "scores.max(-1, keepdims=True, initial=-np.inf)", "scores.max(-1, keepdims=True, initial=-5e4)"),
    Fault("torchtitan 4796", "the cotangent of the log-sum-exp is dropped", "lse", "        along = along + dlse[..., None]\n", "        along = along\n"),
    Fault("flash-attention 141", "the cotangent of the log-sum-exp has the other sign", "lse", "along + dlse[..., None]", "along - dlse[..., None]"),
    Fault("TransformerEngine 3216", "at D = 256 the second sample reads keys of the first", "widths", DP, DP + "        if q.shape[-1] == 256 and q.shape[0] > 1:\n            dp[1:] = do[1:] @ vh[:-1, :, tile].mT\n"),
    Fault("TransformerEngine 2541", "the sink is 0, whatever it is", "sink", "    e_sink = np.zeros_like(top) if sink is None else np.exp(sink[:, None, None] - top)\n", "    e_sink = np.zeros_like(top) if sink is None else np.exp(-top)\n"),
    Fault("FastVideo 925", "keys that fill up a tile count", "sizes", TOTAL, TOTAL + "    total = total + (-k.shape[2] % 16) * np.exp(-top)\n"),
    Fault("pytorch 153799", "the gradient has no last tile, if that is not whole", "sizes", TILES, "for start in range(0, kh.shape[2] // TILE * TILE, TILE):"),
    Fault("pytorch 188302", "a bias alone gets no gradient", "bias", DBIAS, "    dbias = None\n"),
    Fault("torch, fused on the CPU", "weights from a log-sum-exp that absorbed the sum", "lowest bias", EXP, "        p = np.exp(scores[..., tile] - np.where(np.isneginf(lse), 0, lse)[..., None])\n"),
    Fault("triton 5660", "the backward is causal, always", "plain", EXP, EXP + "        p = p * (np.arange(start, start + p.shape[-1]) <= np.arange(p.shape[-2])[:, None])\n"),
    Fault("native-sparse-attention-triton 27", "query heads read key heads in turn", "grouped heads", GROUPS, "    dk, dv = (a.reshape(a.shape[0], group, a.shape[1] // group, *a.shape[2:]).sum(1) for a in (dk, dv))\n"),
    Fault("native-sparse-attention-triton 27, second", "dp masks the width of values by that of keys", "widths", DP, "        n = q.shape[-1]\n        dp = do[..., :n] @ vh[:, :, tile, :n].mT\n"),
    Fault("levanter 449", "no sum over a group", "grouped heads", GROUPS, "    dk, dv = dk[:, ::group], dv[:, ::group]\n"),
    Fault("fla, parallel_bwd", "over 64 the width of values is split, and one part is kept", "widths", DP, "        dp = do[..., :64] @ vh[:, :, tile, :64].mT\n"),
    Fault("mlx 2909", "the gradient of a bias is 0", "bias", DBIAS, "    dbias = None if bias is None else np.zeros_like(bias)\n"),
    Fault("mlx 3452", "one query alone has no sink", "sink", TOTAL, "    total = e.sum(-1, keepdims=True) + (e_sink if q.shape[2] > 1 else 0)\n"),
    Fault("xformers 854", "the gradient of a broadcast bias is not reduced over the batch", "bias", DBIAS, "    dbias = None if bias is None else unbroadcast(dz if bias.shape[0] > 1 else dz[:1], bias.shape)\n"),
    Fault("aprender 2203", "dq does not come", "plain", LAST, "    return None, dk, dv, dbias, dsink, dbias_k, dbias_v\n"),
    Fault("diffusers 12761", "a gradient too few", "plain", LAST, "    return dq, dk, dv\n"),
    Fault("jax-flash-attn2 1", "a cotangent of 0 has a gradient", "plain", UNCHANGED, UNCHANGED + "    do = np.where(do == 0, do.dtype.type(1e-6), do)\n"),
    Fault("KernelBench 82", "the call writes to its input", "plain", "    s = (scale * q) @ kh.mT\n", "    s = (scale * q) @ kh.mT\n    v *= q.dtype.type(1.0000002)\n"),
    Fault("gemma 2 ports", "the cap has a slope of 1", "soft cap", "            ds = ds * (1 - (c[..., tile] / softcap) ** 2)\n", "            ds = ds\n"),
    Fault("EasyContext 14", "the exponential overflows", "saturated", "    top = np.where(np.isneginf(top), q.dtype.type(0), top)\n", "    top = np.zeros_like(top)\n"),
    Fault("pytorch 105190", "a negative scale by its root", "scale", "    s = (scale * q) @ kh.mT\n", "    s = (np.sqrt(scale) * q) @ (np.sqrt(scale) * kh).mT\n"),
    Fault("timm ports", "a scale of 0 is the default", "scale", "if scale is None else scale)", "if not scale else scale)"),
    Fault("TransformerEngine, masks", "all heads have the mask of the first", "mask", "        allowed = allowed & mask\n", "        allowed = allowed & mask[:, :1]\n"),
    Fault("nested tensors", "all samples have the mask of the first", "mask", "        allowed = allowed & mask\n", "        allowed = allowed & mask[:1]\n"),
    Fault("flash-attention, local", "the window of the gradient has one key too few", "window", "    o = p @ vh\n", "    o = p @ vh\n    if window is not None:\n        scores = np.where(distance == -window[0], -np.inf, scores)\n"),
    Fault("torch, is_causal beside bias_kv", "the causal mask hides the appended key", "appended key", "        allowed = allowed | (np.arange(k.shape[2]) == k.shape[2] - 1)\n", "        allowed = allowed\n"),
    Fault("cudnn-frontend 385", "the gradient of the weights is dropped", "weights", "            dp = dp + dweights[..., tile]\n", "            dp = dp\n"),
)  # fmt: skip

EINSUM = (
    "        dq += scale * (ds @ kh[:, :, tile])\n",
    "        dq += scale * np.einsum('bhts,bhsd->bhtd', ds, kh[:, :, tile])\n",
)
RIGHT = (
    Variant("tiles of 8 keys", (("TILE = 32", "TILE = 8"),)),
    Variant("one tile", (("TILE = 32", "TILE = 4096"),)),
    Variant("tiles from the last to the first", ((TILES, "for start in reversed(range(0, kh.shape[2], TILE)):"),)),
    Variant("float64 inside", ((UNCHANGED, "    q, kh, vh, do, scores, top, total, o = (np.float64(a) for a in (q, kh, vh, do, scores, top, total, o))\n"), (LAST, "    return [None if a is None else np.float32(a) for a in (dq, dk, dv, dbias, dsink, dbias_k, dbias_v)]\n"))),
    Variant("sums by einsum, in another order", (EINSUM,)),
    Variant("weights from the log-sum-exp", ((EXP, "        p = np.exp(scores[..., tile] - top - np.log(total))\n"),), Profile(("o",), True, False)),
    Variant("powers of two", ((EXP, "        two = q.dtype.type(np.log2(np.e))\n        p = np.exp2((scores[..., tile] - top) * two) / total\n"),), Profile(("o",), True, False, True)),
    Variant("scale after the product", (("    s = (scale * q) @ kh.mT\n", "    s = scale * (q @ kh.mT)\n"), ("        dk[:, :, tile] = ds.mT @ (scale * q)\n", "        dk[:, :, tile] = (scale * ds).mT @ q\n"))),
    Variant("keys that nobody attends left out", (("    dk, dv = (a.resh", "    dv = np.where(np.isneginf(scores).all(-2)[..., None], 0, dv)\n    dk, dv = (a.resh"),)),
    Variant("δ of weights and dp", (("    delta = (do * o).sum(-1, keepdims=True)\n", "    delta = (np.exp(scores - top) / total * (do @ vh.mT)).sum(-1, keepdims=True)\n"),), Profile(centred=False)),
    Variant("divided after the product with the values", (("    o = p @ vh\n", "    o = e @ vh / total\n"),)),
)  # fmt: skip
