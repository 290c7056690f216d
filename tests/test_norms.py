"""The norms against torch and its autograd in float64, against mpmath where torch overflows, and their laws."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import ml_dtypes
import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from torch.nn import functional

from funcmha import init, self_attention, self_attention_vjp, tree
from funcmha.derivatives import mha_jvp, mha_vjp_jvp
from funcmha.norms import (
    RMSNorm,
    _leading_bit,
    l2_norm,
    l2_norm_vjp,
    layer_norm,
    layer_norm_vjp,
    rms_norm,
    rms_norm_vjp,
)
from funcmha.testing import check_vjp

U32 = 2.0**-24


class Norm(NamedTuple):
    f: object
    f_vjp: object
    torch: object  # (inputs, eps) → y
    params: int  # how many of w and b it takes


NORMS = {
    "rms_norm": Norm(rms_norm, rms_norm_vjp, lambda x, w, eps: functional.rms_norm(x, x.shape[-1:], w, eps), 1),
    "l2_norm": Norm(l2_norm, l2_norm_vjp, lambda x, eps: functional.normalize(x, dim=-1, eps=eps), 0),
    "layer_norm": Norm(
        layer_norm, layer_norm_vjp, lambda x, w, b, eps: functional.layer_norm(x, x.shape[-1:], w, b, eps), 2
    ),
}
every = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
EPS = [0.0, 1e-12, 1e-5, 0.3]


def inputs(norm, shape, seed=0, *, given=(True, True), gain=1.0):
    """x with a mean, the parameters that are given, and a cotangent."""
    rng = np.random.default_rng(seed)
    x = gain * (0.3 + rng.standard_normal(shape))
    params = [1 + rng.standard_normal(shape[-1]) if given[i] else None for i in range(norm.params)]
    return [x, *params], rng.standard_normal(shape)


def close(got, want, what="", bar=1e-11):
    size = max(1.0, np.abs(want).max(initial=0.0))
    assert got.shape == want.shape, what
    assert np.abs(got - want).max(initial=0.0) <= bar * size, what


@every
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    D=st.integers(1, 11),
    present=st.tuples(st.booleans(), st.booleans()),
    gain=st.sampled_from([1e-3, 1.0, 10.0]),
    eps=st.sampled_from(EPS),
    seed=st.integers(0, 99),
)
@example(batch=[7], D=7, present=(True, True), gain=1.0, eps=1e-5, seed=0)  # 7 rows are blocks of 2, 2, 2 and 1
def test_norms_match_torch(norm, batch, D, present, gain, eps, seed):
    eps = eps if D > 2 else 0.3  # below, torch itself is off by 1e-8: its dx is rounding alone, where n is ±1
    args, dy = inputs(norm, (*batch, D), seed, given=present, gain=gain)
    y, cache = norm.f(*args, eps=eps)
    leaves = [oracles.tensor(a) for a in args]
    want = norm.torch(*leaves, eps)
    close(y, want.detach().numpy(), "y")
    grads = norm.f_vjp(cache, dy)
    for what, got, grad in zip("xwb", grads, oracles.gradients([want], [dy], leaves), strict=False):
        assert (got is None) == (grad is None)
        if grad is not None:
            close(got, grad, "d" + what)


@every
@given(
    D=st.integers(0, 11),
    batch=st.lists(st.integers(0, 3), max_size=2),
    eps=st.sampled_from(EPS),
    present=st.tuples(st.booleans(), st.booleans()),
)
def test_norms_keep_the_protocol(norm, D, batch, eps, present):
    # Where D is 1, or 2 and centred, n is ±1 whatever x is, and of the gradient eps / x² is left after cancellation.
    args, _ = inputs(norm, (*batch, D), given=present)
    check_vjp(norm.f, norm.f_vjp, tuple(args), {"eps": eps if D > 2 else 0.3})


@every
def test_every_array_library_gives_the_same(xp, norm):
    args, dy = inputs(norm, (2, 5, 7))
    y, cache = norm.f(*args, eps=1e-5)
    got, cache_got = norm.f(*map(xp.to, args), eps=1e-5)
    assert type(got) is type(xp.to(y))
    close(xp.back(got), y, bar=1e-14)
    for a, b in zip(norm.f_vjp(cache_got, xp.to(dy)), norm.f_vjp(cache, dy), strict=True):
        assert type(a) is type(xp.to(b))
        close(xp.back(a), b, bar=1e-14)


@every
def test_strided_views_are_arrays_like_others(norm):
    args, dy = inputs(norm, (7, 5, 3))
    views = [args[0].T[::-1], *(np.repeat(p, 2)[1::2] for p in inputs(norm, (7,))[0][1:])]
    y, cache = norm.f(*views, eps=1e-5)
    want, cache_want = norm.f(*(v.copy() for v in views), eps=1e-5)
    close(y, want, bar=1e-15)
    for a, b in zip(norm.f_vjp(cache, dy.T), norm.f_vjp(cache_want, dy.T.copy()), strict=True):
        close(a, b, bar=1e-14)


@every
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_float32_rounded_once(norm, dtype):
    args, dy = inputs(norm, (3, 5, 7))
    args, dy = [a.astype(dtype) for a in args], dy.astype(dtype)
    y, cache = norm.f(*args, eps=1e-5)
    y_32, cache_32 = norm.f(*(a.astype(np.float32) for a in args), eps=1e-5)
    assert y.dtype == dtype
    assert np.array_equal(y, y_32.astype(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} <= {np.dtype(np.float32), np.dtype(bool)}
    for a, b in zip(norm.f_vjp(cache, dy), norm.f_vjp(cache_32, dy.astype(np.float32)), strict=True):
        assert a.dtype == dtype
        assert np.array_equal(a, b.astype(dtype))


# ── an offset of the weight ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offset", [1.0, -0.3])
def test_rms_norm_with_an_offset_matches_torch(offset):
    (x, w), dy = inputs(NORMS["rms_norm"], (2, 5, 7))
    y, cache = rms_norm(x, w, eps=1e-5, offset=offset)
    leaves = [oracles.tensor(a) for a in (x, w)]
    want = functional.rms_norm(leaves[0], (7,), offset + leaves[1], 1e-5)
    close(y, want.detach().numpy())
    for got, grad in zip(rms_norm_vjp(cache, dy), oracles.gradients([want], [dy], leaves), strict=True):
        close(got, grad)
    check_vjp(rms_norm, rms_norm_vjp, (x, w), {"eps": 1e-5, "offset": offset})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_an_offset_is_added_before_any_rounding(dtype):
    """Gemma's 1 + w: with a w that bfloat16 holds, and 1 + w that it does not."""
    (x, _), _ = inputs(NORMS["rms_norm"], (5, 7))
    x, w = x.astype(dtype), np.linspace(0.001, 0.003, 7).astype(dtype)
    y_32, _ = rms_norm(x.astype(np.float32), 1 + w.astype(np.float32), eps=1e-5)
    assert np.array_equal(rms_norm(x, w, eps=1e-5, offset=1.0)[0], y_32.astype(dtype))


def test_an_offset_in_mha_is_that_much_more_weight():
    """In the output, the gradients, forward mode and second order: all of them bit for bit."""
    params = init(0, 11, 2, head_dim=4, qk_norm=True, dtype=np.float64)
    rng = np.random.default_rng(0)
    params["q_norm"]["w"], params["k_norm"]["w"] = rng.standard_normal((2, 4))
    more = params | {name: {"w": params[name]["w"] + 1.0} for name in ("q_norm", "k_norm")}
    x, dy = rng.standard_normal((2, 5, 11)), rng.standard_normal((2, 5, 11))
    dots = tree.map(lambda a: rng.standard_normal(a.shape), params)

    def everything(params, norm):
        y, cache = self_attention(params, x, qk_norm=norm)
        forward = mha_jvp(cache.mha, dots, x, x, x)
        return y, self_attention_vjp(cache, dy), forward, mha_vjp_jvp(cache.mha, dy, dy, dots, x, x, x)

    got, want = everything(params, RMSNorm(offset=1.0)), everything(more, RMSNorm())
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.parametrize(
    ("args", "offset", "error", "message"),
    [
        ((), 1.0, ValueError, "offset must be 0 where there is no w that it could be added to, got 1.0"),
        ((np.ones(7),), np.nan, ValueError, "offset must be finite, got nan"),
        ((np.ones(7),), None, TypeError, "offset must be a real number, got None of type NoneType"),
    ],
)
def test_rms_norm_refuses_an_offset(args, offset, error, message):
    with pytest.raises(error, match=message):
        rms_norm(X, *args, eps=1e-5, offset=offset)


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────────────────────


def float32_bounds(norm, args, dy, eps):
    """Worst-case error of y and of each gradient in float32, in units of u and to first order (Higham 2002, chapter 3).

    A sum of D products is off by D u Σ |terms|. So a root of such a sum is off, relatively, by half of D and of the 4
    of its division, its addition and the terms of eps, and by 1 of its own; n by 1 more for its division.
    """
    x, params = args[0], args[1:]
    D = x.shape[-1]

    def mean(a):
        return a.mean(-1, keepdims=True)

    def total(a):
        return a.sum(tuple(range(a.ndim - 1)))

    c, dc = x, np.zeros_like(x)
    if norm.f is layer_norm:
        c, d = x - mean(x), np.abs(x - x[..., :1])
        dc = d + (D + 2) * mean(d) + np.abs(c)
    root = np.sqrt(mean(c * c) + eps)
    if norm.f is l2_norm:
        root = np.maximum(np.sqrt((c * c).sum(-1, keepdims=True)), eps)
    n = c / root
    droot = np.sqrt(mean(dc * dc)) / root + D / 2 + 3
    dn = dc / root + np.abs(n) * (droot + 1)
    w = params[0] if params else 1.0
    y = n * w + (params[1] if len(params) > 1 else 0.0)
    bounds = [dn * np.abs(w) + np.abs(n * w) + np.abs(y)]

    g, dg = w * dy, np.abs(w * dy)
    if norm.f is layer_norm:
        dg = dg + np.abs(g - mean(g)) + (D + 1) * mean(np.abs(g)) + mean(dg)
        g = g - mean(g)
    over = 1.0 if norm.f is not l2_norm else D
    t, dt = over * mean(n * g), over * mean(np.abs(n) * dg + dn * np.abs(g) + (D + 1) * np.abs(n * g))
    h = g - n * t
    dh = dg + np.abs(n) * (dt + np.abs(t)) + dn * np.abs(t) + np.abs(h)
    bounds.append((dh + np.abs(h) * (droot + 1)) / root)
    rows = dy[..., 0].size
    bounds += [total(dn * np.abs(dy)) + (rows + 1) * total(np.abs(n * dy)), rows * total(np.abs(dy))][: norm.params]
    return [U32 * b for b in bounds]


@every
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize(("D", "offset"), [(3, 0.0), (61, 0.0), (257, 0.0), (61, 1000.0)])
def test_float32_is_within_the_derived_bound(norm, eps, D, offset):
    args, dy = inputs(norm, (5, 7, D))
    args[0] = args[0] + offset
    args, dy = [a.astype(np.float32) for a in args], dy.astype(np.float32)
    y, cache = norm.f(*args, eps=eps)
    got = [y, *norm.f_vjp(cache, dy)]
    assert {a.dtype for a in got} == {np.dtype(np.float32)}
    args, dy = [a.astype(np.float64) for a in args], dy.astype(np.float64)
    want, cache = norm.f(*args, eps=eps)
    for a, b, bound in zip(got, [want, *norm.f_vjp(cache, dy)], float32_bounds(norm, args, dy, eps), strict=True):
        assert (np.abs(a - b) <= 1.01 * bound).all()


def mp_norm(norm, x, dy, eps):
    """y and dx of one row, without parameters, in 60 digits."""
    x, dy, eps = [mpmath.mpf(float(v)) for v in x], [mpmath.mpf(float(v)) for v in dy], mpmath.mpf(eps)
    D = len(x)
    if norm.f is layer_norm:
        x = [v - sum(x) / D for v in x]
        dy = [v - sum(dy) / D for v in dy]
    squares = sum(v * v for v in x)
    root = max(mpmath.sqrt(squares), eps) if norm.f is l2_norm else mpmath.sqrt(squares / D + eps)
    free = norm.f is l2_norm and mpmath.sqrt(squares) < eps
    along = 0 if free else sum(v * g for v, g in zip(x, dy, strict=True)) / root**2 / (1 if norm.f is l2_norm else D)
    return [v / root for v in x], [(g - v * along) / root for v, g in zip(x, dy, strict=True)]


ROWS = {
    np.float64: {
        "largest": [1.7e308, -1.7e308, 1.7e308, 1.7e308, -3e307],
        "huge": [1e200, -2e200, 1e-200, 3.0, 5e199],
        "tiny": [1e-200, -3e-200, 2e-205, 0.0, 5e-201],
        "subnormal": [5e-324, 1.5e-323, -5e-324, 4e-323, 0.0],
        "far from 0": [1e15 + 1, 1e15 + 2, 1e15 + 3, 1e15 + 5, 1e15],
        "far from 0, first": [1e15, 1.0, 2.0, 3.0, 5.0],
        "huge and constant": [1e300] * 5,
        "constant": [0.1] * 5,
        "zero": [0.0] * 5,
    },
    np.float32: {
        "largest": [3.4e38, -3.4e38, 3.4e38, 3.4e38, -3e37],
        "huge": [1e25, -2e25, 1e-20, 3.0, 5e24],
        "tiny": [1e-25, -3e-25, 2e-30, 0.0, 5e-26],
        "subnormal": [1e-45, 3e-45, -1e-45, 1e-44, 0.0],
        "huge and constant": [3e38] * 5,
        "constant": [0.1] * 5,
        "zero": [0.0] * 5,
    },
}


@every
@pytest.mark.parametrize("eps", [0.0, 1e-60, 1e-5])
@pytest.mark.parametrize(("dtype", "row"), [(dtype, row) for dtype in ROWS for row in ROWS[dtype]])
def test_rows_of_any_size_are_rows_like_others(norm, eps, dtype, row):
    x = np.array([ROWS[dtype][row], [1.0, 2.0, -3.0, 5.0, 7.0]], dtype)  # beside one that is ordinary
    dy = np.array([[1.0, -2.0, 0.5, 3.0, 0.25]] * 2, dtype)
    with np.errstate(over="ignore", under="ignore", divide="raise", invalid="raise"):
        y, cache = norm.f(x, eps=eps)
        dx = norm.f_vjp(cache, dy)[0]
    bar, largest = 64 * np.finfo(dtype).eps, float(np.finfo(dtype).max)
    least = 4 * float(np.finfo(dtype).smallest_subnormal)
    eps = float(dtype(eps)) if norm.f is l2_norm else eps
    with mpmath.workdps(700):
        for i in range(2):
            if eps == 0 and np.all(x[i] == (x[i, 0] if norm.f is layer_norm else 0)):
                assert not y[i].any()
                assert not dx[i].any()
                continue
            want_y, want_dx = mp_norm(norm, x[i], dy[i], eps)
            size = max(map(abs, want_y))
            assert all(abs(float(a) - b) <= bar * size + least for a, b in zip(y[i], want_y, strict=True))
            size = max(map(abs, want_dx))
            for a, b in zip(dx[i], want_dx, strict=True):
                if abs(b) < largest:  # and otherwise nothing but ∞ is right
                    assert abs(float(a) - b) <= bar * size + least
                else:
                    assert np.isinf(a)


@given(st.floats(0, allow_nan=False, allow_infinity=False), st.sampled_from([np.float32, np.float64]))
@example(np.finfo(np.float64).max, np.float64)
@example(np.finfo(np.float32).max, np.float32)
@example(5e-324, np.float64)
@example(2.0**-149, np.float32)
@example(1.0, np.float32)
@example(np.nextafter(1.0, 0), np.float64)
@example(np.nextafter(2.0**1023, 0), np.float64)
def test_the_unit_is_the_leading_bit(size, dtype):
    with np.errstate(over="ignore", under="ignore"):
        x = np.array([[0.0, -size]]).astype(dtype)
    want = np.ldexp(dtype(0.5), np.frexp(x[0, 1])[1]) if np.isfinite(x).all() and x[0, 1] else 1.0
    with np.errstate(all="raise", under="ignore"):
        unit = _leading_bit(x, 0.0)
    assert unit.dtype == dtype
    assert unit[0, 0] == want


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@every
@pytest.mark.parametrize("k", [-900, -64, 0, 63, 900])
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_a_power_of_two_changes_no_bit(norm, k, eps):
    """f(2ᵏ x) = f(x) where eps is scaled along, and its gradient is 2⁻ᵏ times as large."""
    args, dy = inputs(norm, (5, 7))
    exponent = k if norm.f is l2_norm else 2 * k
    if eps and abs(exponent) > 1000:
        pytest.skip("eps itself would overflow")
    y, cache = norm.f(*args, eps=eps)
    args[0] = args[0] * 2.0**k
    again, cache_again = norm.f(*args, eps=eps * 2.0 ** (exponent if eps else 0))
    assert np.array_equal(again, y)
    dx, *dparams = norm.f_vjp(cache, dy)
    dx_again, *dparams_again = norm.f_vjp(cache_again, dy)
    assert np.array_equal(dx_again, dx * 2.0**-k)
    assert all(np.array_equal(a, b) for a, b in zip(dparams_again, dparams, strict=True))


@every
def test_a_small_cotangent_keeps_its_digits(norm):
    """In float32 a gradient of 1e-30 is an ordinary one: no step may take it below 1e-38."""
    args, dy = inputs(norm, (5, 7), gain=0.5)
    args, dy = [a.astype(np.float32) for a in args], dy.astype(np.float32)
    _, cache = norm.f(*args, eps=1e-6)
    for a, b in zip(norm.f_vjp(cache, dy * np.float32(2.0**-100)), norm.f_vjp(cache, dy), strict=True):
        assert np.array_equal(a, b * np.float32(2.0**-100))


@every
def test_without_eps_the_gradient_is_at_right_angles_to_the_row(norm):
    """f(x + t x) = f(x): ⟨dx, x⟩ = 0; and layer_norm is blind to a shift: Σ dx = 0."""
    args, dy = inputs(norm, (5, 7))
    dx = norm.f_vjp(norm.f(*args, eps=0.0)[1], dy)[0]
    np.testing.assert_allclose((dx * args[0]).sum(-1), 0, atol=1e-14)
    if norm.f is layer_norm:
        np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-14)


def test_what_each_norm_makes_one():
    (x,), _ = inputs(NORMS["l2_norm"], (5, 7))
    np.testing.assert_allclose(np.linalg.norm(l2_norm(x, eps=1e-12)[0], axis=-1), 1, rtol=1e-14)
    np.testing.assert_allclose((rms_norm(x, eps=0.0)[0] ** 2).mean(-1), 1, rtol=1e-14)
    y, _ = layer_norm(x, eps=0.0)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-15)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-14)


def test_layer_norm_is_rms_norm_of_what_is_centred():
    (x, w, b), dy = inputs(NORMS["layer_norm"], (5, 7))
    y, cache = layer_norm(x, w, b, eps=1e-3)
    centred, cache_centred = rms_norm(x - x.mean(-1, keepdims=True), w, eps=1e-3)
    close(y, centred + b, bar=1e-14)
    dx, dw, _ = layer_norm_vjp(cache, dy)
    dc, dw_centred = rms_norm_vjp(cache_centred, dy)
    close(dx, dc - dc.mean(-1, keepdims=True), bar=1e-14)
    close(dw, dw_centred, bar=1e-14)


def test_l2_norm_of_short_rows_is_linear():
    """A norm below eps is replaced; one that equals it is not, as in torch's clamp."""
    x, dy = np.array([[3.0, 4.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    y, cache = l2_norm(x[:1], eps=5.5)
    assert np.array_equal(y, x[:1] / 5.5)
    assert np.array_equal(l2_norm_vjp(cache, dy[:1])[0], dy[:1] / 5.5)
    _, cache = l2_norm(x[1:], eps=5.0)
    leaf = oracles.tensor(x[1:])
    close(l2_norm_vjp(cache, dy[1:])[0], oracles.gradients([functional.normalize(leaf, eps=5.0)], [dy[1:]], [leaf])[0])


@every
def test_without_eps_a_row_of_zeros_leaves_the_others_alone(norm):
    args, dy = inputs(norm, (5, 7))
    x = args[0].copy()
    x[2] = 0.1 if norm.f is layer_norm else 0.0
    with np.errstate(all="raise", under="ignore"):
        y, cache = norm.f(x, *args[1:], eps=0.0)
        dx, *_ = norm.f_vjp(cache, dy)
    others = np.arange(5) != 2
    want, cache = norm.f(x[others], *args[1:], eps=0.0)
    b = args[2] if norm.params == 2 else np.zeros(7)
    assert np.array_equal(y[2], b)
    assert not dx[2].any()
    assert np.array_equal(y[others], want)
    assert np.array_equal(dx[others], norm.f_vjp(cache, dy[others])[0])


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(norm, bad):
    (x, *params), _ = inputs(norm, (5, 7))
    x = x.copy()
    x[2, 3] = bad
    with np.errstate(invalid="ignore"):
        y, _ = norm.f(x, *params, eps=1e-5)
    assert np.isnan(y[2, 3])
    assert np.isfinite(y[np.arange(5) != 2]).all()


@every
def test_torch_tensors_go_through(norm):
    args, dy = inputs(norm, (5, 7))
    y, cache = norm.f(*map(torch.tensor, args), eps=1e-5)
    want, cache_want = norm.f(*args, eps=1e-5)
    close(y.numpy(), want, bar=1e-14)
    for a, b in zip(norm.f_vjp(cache, torch.tensor(dy)), norm.f_vjp(cache_want, dy), strict=True):
        close(a.numpy(), b, bar=1e-13)


@every
def test_jax_takes_the_pair_as_it_is(norm):
    args, _ = inputs(norm, (5, 7))
    with jax.enable_x64(True):
        args = [jax.numpy.asarray(a) for a in args]
        which = tuple(range(len(args)))
        ours = jax.custom_vjp(lambda *a: norm.f(*a, eps=1e-5)[0])
        ours.defvjp(lambda *a: norm.f(*a, eps=1e-5), lambda cache, dy: norm.f_vjp(cache, dy)[: len(args)])
        got = jax.jit(jax.grad(lambda *a: (ours(*a) ** 3).sum(), argnums=which))(*args)
        want = jax.jit(jax.grad(lambda *a: (norm.f(*a, eps=1e-5)[0] ** 3).sum(), argnums=which))(*args)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

X, W = np.ones((2, 5, 7)), np.ones(7)


@every
@pytest.mark.parametrize(
    ("args", "eps", "error", "message"),
    [
        ((X.tolist(),), 0.0, TypeError, "x must be an array, got list"),
        ((X.astype(int),), 0.0, TypeError, "x must have a dtype of .*, got int64"),
        ((np.array(1.0),), 0.0, ValueError, r"x must be \(..., D\), got \(\)"),
        ((X,), -1e-5, ValueError, "eps must be at least 0 and below inf, got -1e-05"),
        ((X,), np.nan, ValueError, "eps must be at least 0 and below inf, got nan"),
        ((X,), None, TypeError, "eps must be a real number, got None of type NoneType"),
        ((X, W.astype("f4")), 0.0, TypeError, "w must have dtype float64 as x has, got float32"),
        ((X, W[:5]), 0.0, ValueError, r"w must be \(D\) with D=7 as in x, got \(5,\)"),
        ((X, W[None]), 0.0, ValueError, r"w must be \(D\) with D=7 as in x, got \(1, 7\)"),
        ((X, None, W[:5]), 0.0, ValueError, r"b must be \(D\) with D=7 as in x, got \(5,\)"),
        ((X, W, W.tolist()), 0.0, TypeError, "b must be an array, got list"),
    ],
)
def test_norms_refuse(norm, args, eps, error, message):
    if len(args) > 1 + norm.params:
        pytest.skip("takes fewer parameters")
    with pytest.raises(error, match=message):
        norm.f(*args, eps=eps)


@every
@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (X.tolist(), TypeError, "dy must be an array, got list"),
        (X[0], ValueError, r"dy must be \(..., D\) = \(2, 5, 7\) as the output is, got \(5, 7\)"),
        (X.astype("f4"), TypeError, "dy must have dtype float64 as the output has, got float32"),
    ],
)
def test_vjps_refuse(norm, dy, error, message):
    _, cache = norm.f(X, eps=1e-5)
    with pytest.raises(error, match=message):
        norm.f_vjp(cache, dy)
