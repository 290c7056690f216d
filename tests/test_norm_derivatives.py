"""Forward mode and second order of the norms by the complex step, gradients per sample by a loop over samples."""

import ml_dtypes
import numpy as np
import pytest
from pytrees import PYTREES

from funcmha.norms import (
    L2Norm,
    LayerNorm,
    RMSNorm,
    l2_norm,
    l2_norm_jvp,
    l2_norm_vjp_jvp,
    layer_norm,
    layer_norm_jvp,
    layer_norm_vjp,
    layer_norm_vjp_jvp,
    rms_norm,
    rms_norm_jvp,
    rms_norm_vjp,
    rms_norm_vjp_jvp,
)

STEP = 1e-30
B, T, D = 3, 5, 7
KINDS = {
    "rms": (RMSNorm(1e-3), ("w",)),
    "rms without w": (RMSNorm(1e-3), ()),
    "rms with an offset": (RMSNorm(1e-3, 1.0), ("w",)),
    "l2": (L2Norm(1e-6), ()),
    "l2 below its floor": (L2Norm(2.5), ()),
    "layer": (LayerNorm(1e-3), ("w", "b")),
    "layer with w alone": (LayerNorm(1e-3), ("w",)),
    "layer without w": (LayerNorm(1e-3), ()),
}
every_norm = pytest.mark.parametrize(("norm", "leaves"), KINDS.values(), ids=KINDS)


def drawn(seed, leaves, dtype=np.float64):
    """x or its tangent (B, T, D), the parameters or theirs, and a cotangent, read-only."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((B, T, D)).astype(dtype) for _ in range(2))
    params = {leaf: rng.standard_normal(D).astype(dtype) for leaf in leaves}
    for a in (x, dy, *params.values()):
        a.flags.writeable = False
    return x, params, dy


def close(got, want, bar=1e-12):
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0.0) <= bar * max(1.0, np.abs(want).max(initial=0.0))


def moved(norm, leaves):
    """The norm where everything moves by an imaginary step: y, dx, dparams, whose imaginary parts are the tangents."""
    (x, params, dy), (x_dot, params_dot, dy_dot) = drawn(0, leaves), drawn(1, leaves)
    y, cache = norm.apply(x + 1j * STEP * x_dot, {leaf: params[leaf] + 1j * STEP * params_dot[leaf] for leaf in leaves})
    return y, *norm.apply_vjp(cache, dy + 1j * STEP * dy_dot)


# ── forward mode, second order ───────────────────────────────────────────────────────────────────────────────────


@every_norm
def test_jvp_is_the_complex_step(norm, leaves):
    (x, params, _), (x_dot, params_dot, _) = drawn(0, leaves), drawn(1, leaves)
    _, cache = norm.apply(x, params)
    y, *_ = moved(norm, leaves)
    close(norm.apply_jvp(cache, x_dot, params_dot), np.imag(y) / STEP)


@every_norm
def test_vjp_jvp_is_the_complex_step_of_the_vjp(norm, leaves):
    (x, params, dy), (x_dot, params_dot, dy_dot) = drawn(0, leaves), drawn(1, leaves)
    _, cache = norm.apply(x, params)
    dx_dot, dparams_dot = norm.apply_vjp_jvp(cache, dy, dy_dot, x_dot, params_dot)
    _, dx, dparams = moved(norm, leaves)
    close(dx_dot, np.imag(dx) / STEP)
    assert set(dparams_dot) == set(leaves)
    for leaf in leaves:
        close(dparams_dot[leaf], np.imag(dparams[leaf]) / STEP)


@every_norm
def test_a_tangent_that_is_none_is_zero(norm, leaves):
    """Oracle: arrays of zeros."""
    (x, params, dy), zeros = drawn(0, leaves), {leaf: np.zeros(D) for leaf in leaves}
    _, cache = norm.apply(x, params)
    nothing = np.zeros((B, T, D))
    assert np.array_equal(norm.apply_jvp(cache, None, {}), norm.apply_jvp(cache, nothing, zeros))
    got = norm.apply_vjp_jvp(cache, dy, None, None, {})
    want = norm.apply_vjp_jvp(cache, dy, nothing, nothing, zeros)
    assert np.array_equal(got[0], want[0])
    for leaf in leaves:
        assert np.array_equal(got[1][leaf], want[1][leaf])


@every_norm
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
def test_derivatives_are_computed_in_float32_and_rounded_once(norm, leaves, dtype):
    """Oracle: the same in float32, rounded."""
    (x, params, dy), (x_dot, params_dot, dy_dot) = drawn(0, leaves, dtype), drawn(1, leaves, dtype)

    def in_32(a):
        return {leaf: in_32(p) for leaf, p in a.items()} if isinstance(a, dict) else a.astype(np.float32)

    cache, cache_32 = norm.apply(x, params)[1], norm.apply(in_32(x), in_32(params))[1]
    y_dot = norm.apply_jvp(cache, x_dot, params_dot)
    assert np.array_equal(y_dot, norm.apply_jvp(cache_32, in_32(x_dot), in_32(params_dot)).astype(dtype))
    assert y_dot.dtype == dtype
    dx_dot, dparams_dot = norm.apply_vjp_jvp(cache, dy, dy_dot, x_dot, params_dot)
    want, wants = norm.apply_vjp_jvp(cache_32, in_32(dy), in_32(dy_dot), in_32(x_dot), in_32(params_dot))
    assert np.array_equal(dx_dot, want.astype(dtype))
    assert {dx_dot.dtype, *(g.dtype for g in dparams_dot.values())} == {np.dtype(dtype)}
    assert all(np.array_equal(dparams_dot[leaf], wants[leaf].astype(dtype)) for leaf in leaves)


def test_derivatives_of_every_array_library_are_the_same(xp):
    for norm, leaves in KINDS.values():
        (x, params, dy), (x_dot, params_dot, dy_dot) = drawn(0, leaves), drawn(1, leaves)
        cache, moved_cache = norm.apply(x, params)[1], norm.apply(xp.to(x), xp.tree(params))[1]
        got = norm.apply_jvp(moved_cache, xp.to(x_dot), xp.tree(params_dot))
        close(xp.back(got), norm.apply_jvp(cache, x_dot, params_dot))
        got, gots = norm.apply_vjp_jvp(moved_cache, *map(xp.to, (dy, dy_dot, x_dot)), xp.tree(params_dot))
        want, wants = norm.apply_vjp_jvp(cache, dy, dy_dot, x_dot, params_dot)
        close(xp.back(got), want)
        for leaf in leaves:
            close(xp.back(gots[leaf]), wants[leaf])


# ── gradients of some axes of the batch ──────────────────────────────────────────────────────────────────────────


@every_norm
@pytest.mark.parametrize("batch_axes", [0, 1, 2])
def test_batch_axes_are_a_loop_over_samples(norm, leaves, batch_axes):
    """dw and db with the first axes of x before them. Oracle: the vjp of one element of these axes at a time."""
    x, params, dy = drawn(0, leaves)
    dx, dparams = norm.apply_vjp(norm.apply(x, params)[1], dy, batch_axes=batch_axes)
    batch = x.shape[:batch_axes]
    assert set(dparams) == set(leaves)
    assert all(dparams[leaf].shape == (*batch, D) for leaf in leaves)
    for b in np.ndindex(batch):
        dx_b, dparams_b = norm.apply_vjp(norm.apply(x[b], params)[1], dy[b])
        close(dx[b], dx_b)
        for leaf in leaves:
            close(dparams[leaf][b], dparams_b[leaf])


@every_norm
@pytest.mark.parametrize("shape", [(0, T, D), (B, 0, D), (B, T, 0)], ids=str)
def test_batch_axes_of_nothing(norm, leaves, shape):
    """No samples have no gradients, and samples of no rows have gradient 0."""
    params = {leaf: np.ones(shape[-1]) for leaf in leaves}
    _, cache = norm.apply(np.ones(shape), params)
    dx, dparams = norm.apply_vjp(cache, np.ones(shape), batch_axes=1)
    assert dx.shape == shape
    for leaf in leaves:
        assert dparams[leaf].shape == (shape[0], shape[-1])
        assert not dparams[leaf].any()


def test_batch_axes_in_every_array_library(xp):
    x, params, dy = drawn(0, ("w", "b"))
    _, want = LayerNorm().apply_vjp(LayerNorm().apply(x, params)[1], dy, batch_axes=1)
    _, got = LayerNorm().apply_vjp(LayerNorm().apply(xp.to(x), xp.tree(params))[1], xp.to(dy), batch_axes=1)
    for leaf in want:
        assert type(got[leaf]) is type(xp.to(x))
        close(xp.back(got[leaf]), want[leaf])


# ── values, refusals ─────────────────────────────────────────────────────────────────────────────────────────────


@every_norm
@pytest.mark.parametrize("library", PYTREES)
def test_a_norm_and_its_cache_are_plain_pytrees(norm, leaves, library):
    flatten, unflatten = PYTREES[library]
    x, params, dy = drawn(0, leaves)
    _, cache = norm.apply(x, params)
    numbers, spec = flatten(norm)
    assert all(type(n) is float for n in numbers)
    assert unflatten(numbers, spec) == norm
    again = unflatten(*flatten(cache))
    assert type(again) is type(cache)
    assert np.array_equal(norm.apply_vjp(again, dy)[0], norm.apply_vjp(cache, dy)[0])


X, W = np.ones((B, T, D)), np.ones(D)
RMS, L2, LAYER = rms_norm(X, W, eps=0.1)[1], l2_norm(X, eps=0.1)[1], layer_norm(X, W, W, eps=0.1)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm_vjp(RMS, X, batch_axes=3), ValueError, r"batch_axes must be at most 2, as x is \(3, 5, 7"),
        (lambda: layer_norm_vjp(LAYER, X, batch_axes=-1), ValueError, "batch_axes must be at least 0, got -1"),
        (lambda: L2Norm().apply_vjp(L2, X, batch_axes=True), TypeError, "batch_axes must be an int, got True"),
        (lambda: rms_norm_jvp(L2, X), TypeError, "cache must come from rms_norm, got L2NormCache"),
        (lambda: rms_norm_jvp(RMS, X[1:]), ValueError, r"x_dot must be \(..., D\) = \(3, 5, 7\) as x is, got \(2,"),
        (lambda: rms_norm_jvp(RMS._replace(w=None), X, W), ValueError, "w_dot must be None, as there is no w, got"),
        (lambda: layer_norm_jvp(LAYER, X, W, W[1:]), ValueError, r"b_dot must be \(D\) = \(7,\) as b is, got"),
        (lambda: l2_norm_jvp(L2, X.astype("f4")), TypeError, "x_dot must have dtype float64 as x has, got float32"),
        (lambda: layer_norm_jvp(LAYER, X, W.astype("f4")), TypeError, "w_dot must have dtype float64 as x_dot has"),
        (lambda: l2_norm_vjp_jvp(RMS, X), TypeError, "cache must come from l2_norm, got RmsNormCache"),
        (lambda: rms_norm_vjp_jvp(RMS, X[1:]), ValueError, r"dy must be \(..., D\) = \(3, 5, 7\) as the output is"),
        (lambda: layer_norm_vjp_jvp(LAYER, X, X[1:]), ValueError, r"dy_dot must be \(..., D\) = .* as dy is, got"),
        (lambda: rms_norm_vjp_jvp(RMS, X, X, None, W.astype("f4")), TypeError, "w_dot must have dtype float64 as dy"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
