"""Greedy decoding with a key/value cache, compared with a forward pass over the whole text for each token.

A small decoder with rotary positions, grouped heads and random parameters. Each layer has its own `KVCache`. The first
call appends the prompt, the others one token each; then the same with a sliding window. The logits must equal those of
the full forward, to rounding.

    python examples/decode.py
"""

from time import perf_counter

import numpy as np

from funcmha import init, kv_cache, masks, self_attention
from funcmha.norms import rms_norm
from funcmha.rotary import frequencies, table

VOCABULARY, C, H, K, LAYERS = 256, 96, 6, 2, 4
PROMPT, NEW = 200, 56

LAYER_PARAMS = [init(seed, C, H, num_kv_heads=K, dtype=np.float64) for seed in range(LAYERS)]
EMBEDDING, UNEMBEDDING = np.random.default_rng(0).standard_normal((2, VOCABULARY, C)) / 10
TABLE = table(np.arange(PROMPT + NEW), frequencies(C // H))  # rotary positions of the whole context


def full_forward(tokens, left):
    """logits (T, VOCABULARY) of a whole text"""
    x, T = EMBEDDING[tokens], len(tokens)
    rotary = TABLE._replace(cos=TABLE.cos[:T], sin=TABLE.sin[:T])
    for params in LAYER_PARAMS:
        y, _ = self_attention(params, rms_norm(x, eps=1e-6)[0], mask=masks.window(left, 0), rotary=rotary)
        x = x + y
    return x @ UNEMBEDDING.T


def step(tokens, kvs, left):
    """logits (T, VOCABULARY) of T new tokens, and the caches with these tokens: one `KVCache` for each layer"""
    x, after = EMBEDDING[tokens], []
    for params, kv in zip(LAYER_PARAMS, kvs, strict=True):
        (y, kv), _ = kv_cache.step(params, rms_norm(x, eps=1e-6)[0], kv, left=left, rotary=TABLE)
        x = x + y
        after.append(kv)
    return x @ UNEMBEDDING.T, after


def timed(f, *args):
    """f(*args), milliseconds"""
    start = perf_counter()
    return f(*args), 1e3 * (perf_counter() - start)


def decode(left):
    """The largest difference between the logits of the two, relative to the largest logit."""
    tokens = list(np.random.default_rng(1).integers(0, VOCABULARY, PROMPT))
    kvs, new, worst = [None] * LAYERS, tokens, 0.0
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
