"""The curvature of a loss of multi-head attention, and Newton steps, by Hessian-vector products.

Self-attention learns to reverse a sequence: L(params) = ½ mean (y − target)² + ½ DECAY ‖params‖². The Hessian has as
many rows as there are parameters, and is never formed: its product with a direction is one call of forward mode and one
of second order. Power iteration finds the largest eigenvalue, and conjugate gradients, stopped at negative curvature, a
step of Newton's method.

    python examples/hessian.py
"""

import numpy as np

from funcmha import init, mha, mha_vjp, tree
from funcmha.derivatives import mha_jvp, mha_vjp_jvp

B, T, C, H = 4, 12, 16, 4
DECAY = 1e-2

rng = np.random.default_rng(0)
X = rng.standard_normal((B, T, C))
TARGET = X[:, ::-1]


def loss_of(params):
    """L, its gradient, and the function that maps a direction d to L″ d"""
    y, cache = mha(params, X, X, X)
    dy = (y - TARGET) / y.size
    gradient = plus(mha_vjp(cache, dy)[0], params, DECAY)

    def hessian(d):
        y_dot, _ = mha_jvp(cache, d)
        return plus(mha_vjp_jvp(cache, dy, y_dot / y.size, d)[0], d, DECAY)

    return 0.5 * np.mean((y - TARGET) ** 2) + 0.5 * DECAY * dot(params, params), gradient, hessian


def plus(a, b, t=1.0):
    """a + t b"""
    return tree.map(lambda x, y: x + t * y, a, b)


def times(t, a):
    """t a"""
    return tree.map(lambda x: t * x, a)


def dot(a, b):
    """⟨a, b⟩"""
    leaves = tree.flatten(b)
    return sum(float(np.vdot(x, leaves[path])) for path, x in tree.flatten(a).items())


def random_like(params):
    """A direction of length 1."""
    d = tree.map(lambda p: rng.standard_normal(p.shape), params)
    return times(dot(d, d) ** -0.5, d)


def largest_eigenvalue(hessian, d, steps=20):
    """λ and its eigenvector, by power iteration"""
    for _ in range(steps):
        h = hessian(d)
        d = times(dot(h, h) ** -0.5, h)
    return dot(d, hessian(d)), d


def newton_direction(hessian, gradient, steps=40):
    """About −L″⁻¹ gradient, by conjugate gradients, stopped where the curvature is not positive (Steihaug 1983)"""
    x, r = times(0.0, gradient), times(-1.0, gradient)
    d, rr = r, dot(r, r)
    stop = 1e-2 * rr
    for step in range(steps):
        h = hessian(d)
        curvature = dot(d, h)
        if curvature <= 0:
            return (d if step == 0 else x), step
        alpha = rr / curvature
        x, r = plus(x, d, alpha), plus(r, h, -alpha)
        rr, before = dot(r, r), rr
        if rr < stop:
            return x, step + 1
        d = plus(r, d, rr / before)
    return x, steps


def by_differences(params, d, h=1e-5):
    """L″ d from two gradients, with an error of about h²"""
    after, before = (loss_of(plus(params, d, t))[1] for t in (h, -h))
    return times(0.5 / h, plus(after, before, -1.0))


if __name__ == "__main__":
    params = init(0, C, H, dtype=np.float64)
    print("step       loss   |gradient|   largest eigenvalue   products   length of step")
    losses = []
    for step in range(6):
        loss, gradient, hessian = loss_of(params)
        top, _ = largest_eigenvalue(hessian, random_like(params))
        direction, products = newton_direction(hessian, gradient)
        t = 1.0
        while loss_of(plus(params, direction, t))[0] > loss + 1e-4 * t * dot(gradient, direction):  # Armijo
            t /= 2
        print(f"{step:4} {loss:10.6f} {dot(gradient, gradient) ** 0.5:12.2e} {top:20.4f} {products:10} {t:16.3f}")
        losses.append(loss)
        params = plus(params, direction, t)

    _, gradient, hessian = loss_of(params)
    d, e = random_like(params), random_like(params)
    want, got = by_differences(params, d), hessian(d)
    off = plus(got, want, -1.0)
    print(f"\nL″ d beside finite differences: {(dot(off, off) / dot(want, want)) ** 0.5:.1e} of its length apart")
    assert dot(off, off) <= 1e-14 * dot(want, want)
    assert abs(dot(e, got) - dot(d, hessian(e))) <= 1e-14
    top, d = largest_eigenvalue(hessian, d, steps=60)
    off = plus(by_differences(params, d), d, -top)
    assert dot(off, off) <= 1e-2 * top**2
    assert np.all(np.diff(losses) < 0)
