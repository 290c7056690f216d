"""Private training: every sample's gradient is clipped before they are added up (Abadi et al. 2016, algorithm 1).

    python examples/per_sample.py

A layer of attention learns to return the mean of the tokens that look like the first one. One sample in eight has a
wrong and huge target: without clipping it pulls the weights away, with it each sample has the same say. Beside it: who
pulled hardest, which the norms of the gradients of single samples tell.
"""

import numpy as np

from funcmha import init, self_attention, self_attention_vjp, tree

B, T, C, H = 32, 8, 16, 2
STEPS, RATE, CLIP, NOISE = 60, 0.5, 0.5, 0.02


def problem(rng):
    """x (B, T, C), what should come out, and which samples are wrong."""
    x = rng.standard_normal((B, T, C))
    like = x @ x[:, :1].mT > 0
    target = np.broadcast_to((x * like).sum(1, keepdims=True) / like.sum(1, keepdims=True), x.shape)
    wrong = np.arange(B) % 8 == 0
    return x, np.where(wrong[:, None, None], 30 * rng.standard_normal(x.shape), target), wrong


def gradients(params, x, target):
    """The mean square of each sample (B), and its gradient: a tree whose leaves begin with the batch."""
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
    """Compare the three, and show which samples pull hardest."""
    rng = np.random.default_rng(0)
    x, target, wrong = problem(rng)
    params = init(0, C, H, dtype=np.float64)
    _, dparams = gradients(params, x, target)

    y, cache = self_attention(params, x)
    whole, *_ = self_attention_vjp(cache, (2 / (T * C)) * (y - target))
    for g, w in zip(tree.flatten(dparams).values(), tree.flatten(whole).values(), strict=True):
        np.testing.assert_allclose(g.sum(0), w, rtol=0, atol=1e-12)  # their sum is the gradient

    size = norms(dparams)
    hardest = np.argsort(-size)[: wrong.sum()]
    print(
        f"norm of a sample's gradient: {np.median(size[~wrong]):.2f} of a good one, {np.median(size[wrong]):.1f} of a"
    )
    found = set(hardest) == set(np.flatnonzero(wrong))
    print(f"wrong one (medians); the {wrong.sum()} largest are the wrong ones: {found}\n")
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
