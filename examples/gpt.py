"""A small GPT that memorises a text: every gradient by hand, each block's backward its forward upside down.

It predicts the next character: an embedding, blocks of attention and MLP with norms and residuals, and the embedding
again as the output matrix. Its gradient is checked against a difference quotient. AdamW trains it on `text.txt` (the
opening of A Tale of Two Cities, Charles Dickens, 1859), and it then generates the text greedily, with parameters that
were saved and loaded.

    python examples/gpt.py
"""

from math import cos, pi, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from funcmha import init, linear, linear_vjp, load, masks, save, self_attention, self_attention_vjp, tree
from funcmha.mha import SelfAttentionCache
from funcmha.norms import RmsNormCache, rms_norm, rms_norm_vjp
from funcmha.ops import LinearCache
from funcmha.rotary import frequencies, table

C, M, H, BLOCKS = 64, 128, 4, 2
EPS = 1e-6
FREQUENCIES = frequencies(C // H)
STEPS, RATE, WARMUP, DECAY, BETA1, BETA2 = 100, 8e-3, 10, 0.01, 0.9, 0.98
PROMPT = len("It was")

# Axes: T tokens, V characters of the vocabulary, C width, M width inside the MLP; `...` is batch. Parameters and
# activations come before the / and have a gradient, constants come after the * and have none.

# ── embedding ────────────────────────────────────────────────────────────────────────────────────────────────────


class EmbedCache(NamedTuple):
    w: np.ndarray  # (V, C)
    tokens: np.ndarray  # (T,)


def embed(w, /, *, tokens):
    """x = w[tokens]        w (V, C)   tokens (T,)   →   x (T, C)"""
    return w[tokens], EmbedCache(w, tokens)


def embed_vjp(cache, dx, /):
    """dw[v] = Σ dx over the tokens that are v"""
    w, tokens = cache
    dw = np.zeros_like(w)
    np.add.at(dw, tokens, dx)  # dw[tokens] += dx would count a character once, however often it comes
    return (dw,)


# ── gelu ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class GeluCache(NamedTuple):
    x: np.ndarray  # (..., M)
    t: np.ndarray  # (..., M)


def gelu(x, /):
    """y = x (1 + t) / 2    where t = tanh(a (x + b x³))        Hendrycks and Gimpel 2016, section 2"""
    t = np.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x))
    return x * (1 + t) / 2, GeluCache(x, t)


def gelu_vjp(cache, dy, /):
    """dx = dy ((1 + t) / 2 + x t' / 2)    where t' = (1 − t²) a (1 + 3 b x²)"""
    x, t = cache
    slope = (1 - t * t) * (sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x))
    return (dy * (1 + t + x * slope) / 2,)


# ── mlp ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class MlpCache(NamedTuple):
    up: LinearCache
    gelu: GeluCache
    down: LinearCache


def mlp(params, x, /):
    """y = gelu(x upᵀ) downᵀ        x (..., C)   up (M, C)   down (C, M)   →   y (..., C)"""
    h, up = linear(x, params["up"])
    a, act = gelu(h)
    y, down = linear(a, params["down"])
    return y, MlpCache(up, act, down)


def mlp_vjp(cache, dy, /):
    """dparams, dx"""
    up, act, down = cache
    da, ddown, _ = linear_vjp(down, dy)
    (dh,) = gelu_vjp(act, da)
    dx, dup, _ = linear_vjp(up, dh)
    return {"up": dup, "down": ddown}, dx


# ── block ────────────────────────────────────────────────────────────────────────────────────────────────────────


class BlockCache(NamedTuple):
    norm1: RmsNormCache
    attention: SelfAttentionCache
    norm2: RmsNormCache
    mlp: MlpCache


def block(params, x, /, *, rotary):
    """x = x + attention(norm(x)),   then   x = x + mlp(norm(x))        x (..., T, C)   →   (..., T, C)"""
    n, norm1 = rms_norm(x, params["norm1"], eps=EPS)
    y, attention = self_attention(params["attention"], n, mask=masks.causal(), rotary=rotary)
    x = x + y
    n, norm2 = rms_norm(x, params["norm2"], eps=EPS)
    y, mlp_cache = mlp(params["mlp"], n)
    x = x + y
    return x, BlockCache(norm1, attention, norm2, mlp_cache)


def block_vjp(cache, dx, /):
    """dparams, dx        y = x + f(x) has the gradient dx = dy + f'(x)ᵀ dy"""
    norm1, attention, norm2, mlp_cache = cache
    dmlp, dn = mlp_vjp(mlp_cache, dx)
    dbranch, dnorm2 = rms_norm_vjp(norm2, dn)
    dx = dx + dbranch
    dattention, dn, _ = self_attention_vjp(attention, dx)
    dbranch, dnorm1 = rms_norm_vjp(norm1, dn)
    dx = dx + dbranch
    return {"norm1": dnorm1, "attention": dattention, "norm2": dnorm2, "mlp": dmlp}, dx


# ── gpt ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class GptCache(NamedTuple):
    embed: EmbedCache
    blocks: dict[str, BlockCache]
    norm: RmsNormCache
    output: LinearCache


def gpt(params, /, *, tokens):
    """logits (T, V) of the character after each of the tokens (T,)"""
    rotary, caches = table(np.arange(len(tokens)), FREQUENCIES), {}
    x, lookup = embed(params["embedding"], tokens=tokens)
    for name, each in params["blocks"].items():
        x, caches[name] = block(each, x, rotary=rotary)
    n, norm = rms_norm(x, params["norm"], eps=EPS)
    logits, output = linear(n, params["embedding"])
    return logits, GptCache(lookup, caches, norm, output)


def gpt_vjp(cache, dlogits, /):
    """dparams        the embedding is used twice, so its gradient is a sum"""
    lookup, caches, norm, output = cache
    dn, doutput, _ = linear_vjp(output, dlogits)
    dx, dnorm = rms_norm_vjp(norm, dn)
    dblocks = {}
    for name in reversed(caches):
        dblocks[name], dx = block_vjp(caches[name], dx)
    (dinput,) = embed_vjp(lookup, dx)
    return ({"embedding": dinput + doutput, "blocks": dblocks, "norm": dnorm},)


def init_gpt(seed, V, dtype):
    """A tree of parameters; matrices that write to the residual stream start smaller, as in GPT-2."""
    rng = np.random.default_rng(seed)

    def normal(*shape, std):
        return (std * rng.standard_normal(shape)).astype(dtype)

    def one_block(i):
        return {
            "norm1": np.ones(C, dtype),
            "attention": init(seed + i, C, H, bias=False, dtype=dtype),
            "norm2": np.ones(C, dtype),
            "mlp": {"up": normal(M, C, std=C**-0.5), "down": normal(C, M, std=(2 * BLOCKS * M) ** -0.5)},
        }

    blocks = {str(i): one_block(i) for i in range(BLOCKS)}
    return {"embedding": normal(V, C, std=C**-0.5), "blocks": blocks, "norm": np.ones(C, dtype)}


# ── cross entropy ────────────────────────────────────────────────────────────────────────────────────────────────


class CrossEntropyCache(NamedTuple):
    p: np.ndarray  # (T, V)
    targets: np.ndarray  # (T,)


def cross_entropy(logits, /, *, targets):
    """loss = mean (lse(logits) − logits[target])        logits (T, V)   targets (T,)   →   ()"""
    z = logits - logits.max(axis=-1, keepdims=True)
    z = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -z[np.arange(len(targets)), targets].mean(), CrossEntropyCache(np.exp(z), targets)


def cross_entropy_vjp(cache, dloss, /):
    """dlogits = dloss (p − onehot(target)) / T"""
    p, targets = cache
    dlogits = p.copy()
    dlogits[np.arange(len(targets)), targets] -= 1
    return (dlogits * (dloss / len(targets)),)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_and_gradient(params, text):
    """The mean loss per character, the accuracy of the most likely one, and dloss/dparams."""
    tokens, targets = text[:-1], text[1:]
    logits, cache = gpt(params, tokens=tokens)
    loss, entropy = cross_entropy(logits, targets=targets)
    (dlogits,) = cross_entropy_vjp(entropy, 1.0)
    (grads,) = gpt_vjp(cache, dlogits)
    return float(loss), float((logits.argmax(axis=-1) == targets).mean()), grads


def check_gradient(params, text, h=1e-6):
    """⟨gradient, v⟩ is (loss(params + h v) − loss(params − h v)) / 2h for a random direction v, to O(h²)."""
    rng = np.random.default_rng(1)
    v = tree.map(lambda p: rng.standard_normal(p.shape), params)
    _, _, grads = loss_and_gradient(params, text)
    slope = sum(tree.flatten(tree.map(lambda g, d: (g * d).sum(), grads, v)).values())
    ahead, _, _ = loss_and_gradient(tree.map(lambda p, d: p + h * d, params, v), text)
    behind, _, _ = loss_and_gradient(tree.map(lambda p, d: p - h * d, params, v), text)
    quotient = (ahead - behind) / (2 * h)
    off = abs(slope - quotient) / abs(quotient)
    print(f"slope along a random direction: {slope:.9f} by hand, {quotient:.9f} by difference, off by {off:.0e}")
    assert off <= 1e-6


class Moments(NamedTuple):
    m: Any  # mean gradient, a tree as the parameters are
    v: Any  # mean of its square


def adamw(params, grads, moments, step):
    """params, moments after a step, which is 1, 2, …        Loshchilov and Hutter 2019, algorithm 2"""
    rate = RATE * min(step / WARMUP, (1 + cos(pi * step / STEPS)) / 2)
    m = tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments.m, grads)
    v = tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, moments.v, grads)

    def moved(p, m, v):
        m, v = m / (1 - BETA1**step), v / (1 - BETA2**step)  # as both began at 0
        return p - rate * (m / (np.sqrt(v) + 1e-8) + DECAY * p)

    return tree.map(moved, params, m, v), Moments(m, v)


def train(params, text):
    """The parameters after STEPS steps on the whole text."""
    moments = Moments(tree.map(np.zeros_like, params), tree.map(np.zeros_like, params))
    start = perf_counter()
    print("\nstep     loss   accuracy   seconds")
    for step in range(1, STEPS + 1):
        loss, accuracy, grads = loss_and_gradient(params, text)
        params, moments = adamw(params, grads, moments, step)
        if step == 1 or step % 20 == 0:
            print(f"{step:4} {loss:8.4f} {accuracy:10.4f} {perf_counter() - start:9.1f}")
    return params


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────


def through_a_file(params):
    """The parameters, saved and loaded, with the same bits."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "gpt.npz"
        save(path, params)
        loaded = load(path, like=params)
    same = tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), params, loaded)
    assert all(tree.flatten(same).values())
    return loaded


def generate(params, tokens, length):
    """The tokens, continued greedily up to `length`."""
    while len(tokens) < length:
        logits, _ = gpt(params, tokens=tokens)
        tokens = np.append(tokens, logits[-1].argmax())
    return tokens


if __name__ == "__main__":
    characters, text = np.unique(list(Path(__file__).with_name("text.txt").read_text()), return_inverse=True)
    check_gradient(init_gpt(0, len(characters), np.float64), text[:64])
    params = through_a_file(train(init_gpt(0, len(characters), np.float32), text))
    generated = generate(params, text[:PROMPT], len(text))
    print(f"\n{''.join(characters[generated])}")
    assert (generated == text)[PROMPT:].mean() >= 0.99
