"""Greedy decoding with a key/value cache, beside the forward of the whole text again for each token.

A small decoder with rotary positions, grouped heads and random parameters. Each layer's keys and values are a `KV`. The
first call appends the prompt, the others one token each; then the same with a sliding window. The logits must be those
of the full forward, to rounding.

    python examples/decode.py
"""

from time import perf_counter

import numpy as np

from funcmha import attention, init, linear, masks
from funcmha.decode import append, empty, step_mask
from funcmha.norms import rms_norm
from funcmha.rotary import frequencies, rotary, rotate

VOCABULARY, C, H, K, LAYERS = 256, 96, 6, 2, 4
D = C // H
PROMPT, NEW = 200, 56
FREQUENCIES = frequencies(D)

LAYER_PARAMS = [init(seed, C, H, num_kv_heads=K, dtype=np.float64) for seed in range(LAYERS)]
EMBEDDING, UNEMBEDDING = np.random.default_rng(0).standard_normal((2, VOCABULARY, C)) / 10


def project(params, x, first):
    """q (H, T, D), k (K, T, D), v (K, T, D) of tokens x (T, C) that stand at first, first + 1, …"""
    x, _ = rms_norm(x, eps=1e-6)
    q, k, v = (
        np.moveaxis(linear(x, p["w"].reshape(-1, C), p["b"].ravel())[0].reshape(len(x), -1, D), 0, 1)
        for p in (params["q_proj"], params["k_proj"], params["v_proj"])
    )
    turn = rotary(first + np.arange(len(x)), FREQUENCIES)
    return rotate(q, rotary=turn)[0], rotate(k, rotary=turn)[0], v


def combine(params, o):
    """y (T, C) of what the heads have found, o (H, T, D)"""
    p = params["out_proj"]
    return linear(np.moveaxis(o, 0, 1).reshape(-1, H * D), p["w"].reshape(C, H * D), p["b"])[0]


def full_forward(tokens, left):
    """logits (T, VOCABULARY) of a whole text"""
    x = EMBEDDING[tokens]
    for params in LAYER_PARAMS:
        q, k, v = project(params, x, 0)
        o, _ = attention(q, k, v, mask=masks.window(left, 0))
        x = x + combine(params, o)
    return x @ UNEMBEDDING.T


def step(tokens, kvs, left):
    """logits (T, VOCABULARY) of the T tokens that follow those of kvs, and kvs with them: one KV for each layer"""
    x, T, after = EMBEDDING[tokens], len(tokens), []
    for params, kv in zip(LAYER_PARAMS, kvs, strict=True):
        q, k, v = project(params, x, kv.seen)
        kv, _ = append(kv, k, v, left=left)
        o, _ = attention(q, kv.keys, kv.values, mask=step_mask(kv, T, left=left))
        x = x + combine(params, o)
        after.append(kv)
    return x @ UNEMBEDDING.T, after


def timed(f, *args):
    """f(*args), milliseconds"""
    start = perf_counter()
    return f(*args), 1e3 * (perf_counter() - start)


def decode(left):
    """The largest difference between the logits of the two, as a part of the largest logit."""
    tokens = list(np.random.default_rng(1).integers(0, VOCABULARY, PROMPT))
    nothing = np.zeros((K, 0, D))
    kvs, new, worst = [empty(nothing, nothing)] * LAYERS, tokens, 0.0  # a value: all layers may begin with the same
    print(f"\n{'all tokens before' if left is None else f'itself and {left} tokens before'}")
    print("tokens   held   next   difference   ms a step   ms in full")
    while len(tokens) < PROMPT + NEW:
        (logits, kvs), ms = timed(step, new, kvs, left)
        want, ms_full = timed(full_forward, tokens, left)
        off = np.abs(logits - want[-len(new) :]).max() / np.abs(want).max()
        new, worst = [int(np.argmax(logits[-1]))], max(worst, off)
        if len(tokens) % 8 == 0:
            held = kvs[0].keys.shape[-2]
            print(f"{len(tokens):6} {held:6} {new[0]:6} {off:12.1e} {ms:11.2f} {ms_full:12.2f}")
        tokens = tokens + new
    return worst


if __name__ == "__main__":
    for left in (None, 63):
        assert decode(left) <= 1e-13
