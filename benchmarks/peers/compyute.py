"""The algorithm of Compyute's multi-head self-attention in plain NumPy, in the three variants of its author.

    sequential   each head has projections of its own, and the heads come one after another
    semi         one projection each for the queries, keys and values of all heads; the heads one after another
    parallel     one projection for all, and all heads in one batched product

The mask is a dense (T, T) array that is added to the scores, and the weights are kept for the backward. It differs from
Compyute (0.1.8) in two things: what the forward keeps is returned and not put on a stack, and gradients of weights are
products of BLAS, where Compyute's einsum would loop.

Axes: B batch, T length, C width, H heads, D = C / H. A pair is a weight and its bias or None, or their gradients.
"""

from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from benchmarks.cases import Case, Problem
from benchmarks.peers import Call, SkipError, check_memory

Array = Any
Pair = tuple[Array, Array]
COPIES = 5  # of all scores, in `parallel`: weights, their gradient, and three temporaries of the softmax's
INPUTS = ("q_proj", "k_proj", "v_proj")


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    if case.kind != "self":
        raise SkipError("Compyute has self-attention only")
    check_memory(case, COPIES if variant == "parallel" else 2)
    pairs = {name: (p["w"].reshape(case.width, case.width), _flat(p.get("b"))) for name, p in problem.params.items()}
    if variant == "parallel":
        pairs = {"in_proj": _merge([pairs[name] for name in INPUTS]), "out_proj": pairs["out_proj"]}
    layer, layer_vjp = VARIANTS[variant]
    forward = partial(layer, pairs, case.H, problem.inputs[0], _additive(case))

    def both() -> Any:
        y, cache = forward()
        return y, *layer_vjp(cache, problem.dy)

    def named() -> dict[str, Array]:
        y, dx, grads = both()
        if variant == "parallel":
            grads |= zip(INPUTS, _split(grads["in_proj"], 3), strict=True)
        leaves = [(name, leaf, a.shape) for name, p in problem.params.items() for leaf, a in p.items()]
        dparams = {f"{name}.{leaf}": grads[name]["wb".index(leaf)].reshape(shape) for name, leaf, shape in leaves}
        return {"y": y, "x": dx} | dparams

    return Call(forward, both, named)


def _additive(case: Case) -> Array:
    mask = case.mask()
    return None if mask is None else np.where(mask.dense(case.T, case.S), np.float32(0), np.float32(-np.inf))


# ── the parts that all three share ───────────────────────────────────────────────────────────────────────────────


def linear(x: Array, pair: Pair) -> Array:
    w, b = pair
    y = x @ w.T
    return y if b is None else y + b


def linear_vjp(x: Array, pair: Pair, dy: Array) -> tuple[Array, Pair]:
    w, b = pair
    rows = dy.reshape(-1, dy.shape[-1])
    return dy @ w, (rows.T @ x.reshape(-1, x.shape[-1]), None if b is None else rows.sum(0))


def sdp(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    z = q @ k.mT / sqrt(q.shape[-1])
    if mask is not None:
        z += mask
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p @ v, (q, k, v, p)


def sdp_vjp(cache: tuple[Array, ...], do: Array) -> tuple[Array, Array, Array]:
    q, k, v, p = cache
    dp = do @ v.mT
    dz = p * (dp - (dp * p).sum(-1, keepdims=True))
    dz /= sqrt(q.shape[-1])
    return dz @ k, dz.mT @ q, p.mT @ do


def _split(pair: Pair, n: int) -> list[Pair]:
    """The rows of w and b in n equal parts."""
    w, b = pair
    return list(zip(np.split(w, n), [None] * n if b is None else np.split(b, n), strict=True))


def _merge(pairs: list[Pair]) -> Pair:
    ws, bs = zip(*pairs, strict=True)
    return np.concatenate(ws), None if bs[0] is None else np.concatenate(bs)


def _flat(b: Array) -> Array:
    return None if b is None else b.reshape(-1)


# ── sequential ───────────────────────────────────────────────────────────────────────────────────────────────────


def sequential(pairs: dict[str, Pair], H: int, x: Array, mask: Array) -> tuple[Array, Any]:
    heads = list(zip(*(_split(pairs[name], H) for name in INPUTS), strict=True))
    os, caches = zip(*(sdp(*(linear(x, pair) for pair in head), mask) for head in heads), strict=True)
    o = np.concatenate(os, -1)
    return linear(o, pairs["out_proj"]), (pairs, heads, x, o, caches)


def sequential_vjp(cache: Any, dy: Array) -> tuple[Array, dict[str, Pair]]:
    pairs, heads, x, o, caches = cache
    do, dout = linear_vjp(o, pairs["out_proj"], dy)
    dx, dheads = 0, []
    for head, kept, dhead in zip(heads, caches, np.split(do, len(heads), -1), strict=True):
        dxs, dpairs = zip(*map(linear_vjp, 3 * [x], head, sdp_vjp(kept, dhead)), strict=True)
        dx = dx + sum(dxs)
        dheads.append(dpairs)
    merged = [_merge(of_heads) for of_heads in zip(*dheads, strict=True)]
    return dx, dict(zip(INPUTS, merged, strict=True)) | {"out_proj": dout}


# ── semi-parallel ────────────────────────────────────────────────────────────────────────────────────────────────


def semi(pairs: dict[str, Pair], H: int, x: Array, mask: Array) -> tuple[Array, Any]:
    heads = zip(*(np.split(linear(x, pairs[name]), H, -1) for name in INPUTS), strict=True)
    os, caches = zip(*(sdp(q, k, v, mask) for q, k, v in heads), strict=True)
    o = np.concatenate(os, -1)
    return linear(o, pairs["out_proj"]), (pairs, x, o, caches)


def semi_vjp(cache: Any, dy: Array) -> tuple[Array, dict[str, Pair]]:
    pairs, x, o, caches = cache
    do, dout = linear_vjp(o, pairs["out_proj"], dy)
    dheads = [sdp_vjp(kept, d) for kept, d in zip(caches, np.split(do, len(caches), -1), strict=True)]
    merged = [np.concatenate(of_heads, -1) for of_heads in zip(*dheads, strict=True)]
    dxs, dpairs = zip(*map(linear_vjp, 3 * [x], [pairs[name] for name in INPUTS], merged), strict=True)
    return sum(dxs), dict(zip(INPUTS, dpairs, strict=True)) | {"out_proj": dout}


# ── fully parallel ───────────────────────────────────────────────────────────────────────────────────────────────


def parallel(pairs: dict[str, Pair], H: int, x: Array, mask: Array) -> tuple[Array, Any]:
    q, k, v = (_to_heads(part, H) for part in np.split(linear(x, pairs["in_proj"]), 3, -1))
    o, kept = sdp(q, k, v, mask)
    o = _from_heads(o)
    return linear(o, pairs["out_proj"]), (pairs, x, o, kept)


def parallel_vjp(cache: Any, dy: Array) -> tuple[Array, dict[str, Pair]]:
    pairs, x, o, kept = cache
    do, dout = linear_vjp(o, pairs["out_proj"], dy)
    dqkv = sdp_vjp(kept, _to_heads(do, kept[0].shape[1]))
    dx, din = linear_vjp(x, pairs["in_proj"], np.concatenate([_from_heads(d) for d in dqkv], -1))
    return dx, {"in_proj": din, "out_proj": dout}


def _to_heads(x: Array, H: int) -> Array:
    """(B, T, C)  →  (B, H, T, D)"""
    return np.ascontiguousarray(x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2))


def _from_heads(x: Array) -> Array:
    """(B, H, T, D)  →  (B, T, C)"""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


VARIANTS = {
    "sequential": (sequential, sequential_vjp),
    "semi": (semi, semi_vjp),
    "parallel": (parallel, parallel_vjp),
}
