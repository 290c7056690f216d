"""Private training: the gradient of each sample is clipped before the sum (Abadi et al. 2016, algorithm 1).

    python examples/per_sample.py

A layer of attention learns to return the mean of the tokens that are similar to the first one. One sample in eight has
a wrong and huge target. Without clipping it dominates the gradient; with clipping each sample has bounded influence.
The norms of the gradients of single samples also identify the wrong samples.
"""

import numpy as np

from funcmha import init, self_attention, self_attention_vjp, tree

B, T, C, H = 32, 8, 16, 2
STEPS, RATE, CLIP, NOISE = 60, 0.5, 0.5, 0.02


def problem(rng):
    """x (B, T, C), the target, and which samples are wrong."""
    x = rng.standard_normal((B, T, C))
    like = x @ x[:, :1].mT > 0
    target = np.broadcast_to((x * like).sum(1, keepdims=True) / like.sum(1, keepdims=True), x.shape)
    wrong = np.arange(B) % 8 == 0
    return x, np.where(wrong[:, None, None], 30 * rng.standard_normal(x.shape), target), wrong


def gradients(params, x, target):
    """The mean squared error of each sample (B), and its gradient: a tree whose leaves start with the batch axis."""
    y, cache = self_attention(params, x)
    dy = (2 / (T * C)) * (y - target)
    dparams, *_ = self_attention_vjp(cache, dy, per_sample=True)
    return np.mean((y - target) ** 2, axis=(1, 2)), dparams


def norms(dparams):
    """‖g‖ over all leaves (B)"""
    return np.sqrt(sum((g.reshape(B, -1) ** 2).sum(1) for g in tree.flatten(dparams).values()))


def clipped_mean(dparams, clip):
    """Σ g · min(1, clip / ‖g‖) / B"""
    share = np.minimum(1.0, clip / norms(dparams))
    return tree.map(lambda g: np.tensordot(share, g, axes=1) / B, dparams)


def train(clip, noise, rng, x, target, good):
    """The loss of the good samples, at the start and at the end."""
    params = init(0, C, H, dtype=np.float64)
    losses = []
    for _ in range(STEPS):
        loss, dparams = gradients(params, x, target)
        losses.append(loss[good].mean())
        step = clipped_mean(dparams, clip)
        if noise:
            step = tree.map(lambda g: g + noise * clip / B * rng.standard_normal(g.shape), step)
        params = tree.map(lambda p, g: p - RATE * g, params, step)
    return losses[0], losses[-1]


def main():
    """Compare three ways of training, and show which samples have the largest gradients."""
    rng = np.random.default_rng(0)
    x, target, wrong = problem(rng)
    params = init(0, C, H, dtype=np.float64)
    _, dparams = gradients(params, x, target)

    y, cache = self_attention(params, x)
    whole, *_ = self_attention_vjp(cache, (2 / (T * C)) * (y - target))
    for g, w in zip(tree.flatten(dparams).values(), tree.flatten(whole).values(), strict=True):
        np.testing.assert_allclose(g.sum(0), w, rtol=0, atol=1e-12)  # their sum is the gradient

    size = norms(dparams)
    largest = np.argsort(-size)[: wrong.sum()]
    good, bad = np.median(size[~wrong]), np.median(size[wrong])
    print(f"median norm of a sample's gradient: {good:.2f} if its target is right, {bad:.1f} if it is wrong")
    found = set(largest) == set(np.flatnonzero(wrong))
    print(f"the {wrong.sum()} largest belong to the wrong samples: {found}\n")
    print(f"{'loss of the good samples':26} {'start':>8} {'end':>8}")
    ends = {}
    for name, clip, noise in (("plain", np.inf, 0), ("clipped", CLIP, 0), ("clipped, with noise", CLIP, NOISE)):
        start, ends[name] = train(clip, noise, rng, x, target, ~wrong)
        print(f"{name:26} {start:8.3f} {ends[name]:8.3f}")
    assert found
    assert ends["clipped"] < 0.8 * start < ends["plain"]
    assert ends["clipped, with noise"] < 0.8 * start


if __name__ == "__main__":
    main()
