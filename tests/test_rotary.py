"""Rotary tables against plain loops, the rotation against complex multiplication and torch, and the laws of both."""

import math

import hypothesis.strategies as st
import ml_dtypes
import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given

from funcmha.rotary import (
    HalfPairs,
    InterleavedPairs,
    RotateCache,
    frequencies,
    llama3_frequencies,
    ntk_base,
    rotate,
    rotate_vjp,
    table,
    yarn_frequencies,
)
from funcmha.testing import check_vjp

KINDS = ["half", "interleaved"]
both = pytest.mark.parametrize("pairs", KINDS)
U32, U64 = 2.0**-24, 2.0**-53


def complex_rotation(x, positions, freqs, pairs):
    """y = x e^{iθ}, pair by pair: the oracle, in loops."""
    y, n = np.array(x), len(freqs)
    for index in np.ndindex(x.shape[:-1]):
        position = float(np.broadcast_to(positions, x.shape[:-1])[index])
        for i in range(n):
            at = (i, i + n) if pairs == "half" else (2 * i, 2 * i + 1)
            angle = position * float(freqs[i])
            z = complex(x[index][at[0]], x[index][at[1]]) * complex(math.cos(angle), math.sin(angle))
            y[index][at[0]], y[index][at[1]] = z.real, z.imag
    return y


def torch_rotation(x, positions, freqs, pairs):
    """The rotation of tensors as model code writes it, with the pairs taken and put back by index."""
    n = len(freqs)
    first = torch.arange(n) if pairs == "half" else 2 * torch.arange(n)
    second = first + n if pairs == "half" else first + 1
    angle = torch.tensor(np.array(positions, np.float64))[..., None] * torch.tensor(np.array(freqs))
    a, b = x[..., first], x[..., second]
    y = x.clone()
    y[..., first] = a * angle.cos() - b * angle.sin()
    y[..., second] = b * angle.cos() + a * angle.sin()
    return y


@st.composite
def problems(draw):
    batch = draw(st.lists(st.integers(0, 3), max_size=2))
    T, n, rest = draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shared = [1 if draw(st.booleans()) else size for size in batch[draw(st.integers(0, len(batch))) :]]
    positions = rng.integers(-50, 5000, (*shared, T))
    positions = positions if draw(st.booleans()) else positions / 4
    x, dy = rng.standard_normal((2, *batch, T, 2 * n + rest))
    return (
        x,
        dy,
        positions,
        frequencies(2 * n, base=draw(st.sampled_from([1.0, 1e4, 5e5]))),
        draw(st.sampled_from(KINDS)),
    )


@given(problems())
def test_rotate_is_complex_multiplication(problem):
    x, _, positions, freqs, pairs = problem
    y, _ = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    np.testing.assert_allclose(y, complex_rotation(x, positions, freqs, pairs), rtol=0, atol=1e-11)


@given(problems())
def test_rotate_and_its_gradient_match_torch(problem):
    x, dy, positions, freqs, pairs = problem
    y, cache = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    leaf = oracles.tensor(x)
    want = torch_rotation(leaf, positions, freqs, pairs)
    (dx,) = rotate_vjp(cache, dy)
    np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(dx, oracles.gradients([want], [dy], [leaf])[0], rtol=0, atol=1e-11)


@given(problems())
def test_rotate_keeps_the_protocol(problem):
    x, _, positions, freqs, pairs = problem
    check_vjp(rotate, rotate_vjp, (x,), {"rotary": table(positions, freqs, pairs=pairs)})


@both
@pytest.mark.parametrize("position", [3, 1000, 10**6])
def test_float32_is_off_by_three_roundings_of_each_product(pairs, position):
    """u for the table, u for the product, u for the sum; the angles are those of float64 at any position."""
    rng = np.random.default_rng(0)
    positions, freqs = position + np.arange(7), frequencies(22, base=5e5)
    x = rng.standard_normal((5, 7, 23)).astype(np.float32)
    rotary = table(positions, freqs, pairs=pairs)
    y, cache = rotate(x, rotary=rotary)
    (dx,) = rotate_vjp(cache, y)
    assert y.dtype == dx.dtype == cache.rotary.cos.dtype == np.float32
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    assert (np.abs(y - complex_rotation(x.astype(float), positions, freqs, pairs)) <= 3.01 * U32 * size).all()
    assert (np.abs(dx - x) <= 2 * 3.01 * U32 * size).all()


def test_angles_are_those_of_float64():
    positions, freqs = np.array([0, 1, 4097, 10**6]), frequencies(14)
    rotary = table(positions, freqs)
    with mpmath.workdps(50):
        for t, position in enumerate(positions):
            for i in range(7):
                theta = mpmath.mpf(10000) ** (-mpmath.mpf(2 * i) / 14) * int(position)
                for got, want in ((rotary.cos[t, i], mpmath.cos(theta)), (rotary.sin[t, i], mpmath.sin(theta))):
                    assert abs(float(got) - want) <= U64 * (4 * theta + 2)


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(problems())
def test_the_vjp_undoes_the_rotation(problem):
    x, _, positions, freqs, pairs = problem
    y, cache = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    np.testing.assert_allclose(rotate_vjp(cache, y)[0], x, rtol=0, atol=1e-14)


@given(problems())
def test_negative_positions_rotate_as_the_vjp_does(problem):
    x, dy, positions, freqs, pairs = problem
    _, cache = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    back, _ = rotate(dy, rotary=table(-positions, freqs, pairs=pairs))
    assert np.array_equal(rotate_vjp(cache, dy)[0], back)


@given(problems())
def test_the_norm_of_each_pair_stays_and_the_rest_passes(problem):
    x, _, positions, freqs, pairs = problem
    y, _ = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    n = len(freqs)

    def norms(a):
        a = a[..., : 2 * n].reshape(*a.shape[:-1], *((2, n) if pairs == "half" else (n, 2)))
        return np.linalg.norm(a, axis=-2 if pairs == "half" else -1)

    np.testing.assert_allclose(norms(y), norms(x), rtol=1e-15 * 8)
    assert np.array_equal(y[..., 2 * n :], x[..., 2 * n :])


@both
@pytest.mark.parametrize("shift", [-7, 1, 4096])
def test_scores_depend_on_the_difference_of_positions_alone(pairs, shift):
    rng = np.random.default_rng(1)
    q, k, freqs = rng.standard_normal((3, 5, 11)), rng.standard_normal((3, 7, 11)), frequencies(10)

    def scores(offset):
        qt, _ = rotate(q, rotary=table(offset + np.arange(5), freqs, pairs=pairs))
        kt, _ = rotate(k, rotary=table(offset + np.arange(7), freqs, pairs=pairs))
        return qt @ kt.mT

    np.testing.assert_allclose(scores(shift), scores(0), rtol=0, atol=1e-11)
    assert np.abs(scores(0) - q @ k.mT).max() > 0.1  # and do depend on it


def test_position_zero_is_the_identity():
    x = np.random.default_rng(2).standard_normal((3, 1, 7))
    assert np.array_equal(rotate(x, rotary=table(np.array([0]), frequencies(6)))[0], x)


def test_an_offset_is_a_shifted_range():
    x = np.random.default_rng(2).standard_normal((3, 7, 10))
    whole, _ = rotate(x, rotary=table(np.arange(7), frequencies(10)))
    rest, _ = rotate(x[:, 4:], rotary=table(4 + np.arange(3), frequencies(10)))
    assert np.array_equal(rest, whole[:, 4:])


def test_interleaved_is_half_with_the_features_in_another_order():
    x = np.random.default_rng(3).standard_normal((2, 5, 14))
    order = np.arange(14).reshape(2, 7).T.ravel()  # 0 7 1 8 …
    half, _ = rotate(x, rotary=table(np.arange(5), frequencies(14), pairs="half"))
    interleaved, _ = rotate(x[..., order], rotary=table(np.arange(5), frequencies(14), pairs="interleaved"))
    assert np.array_equal(interleaved, half[..., order])


def test_positions_of_each_sample():
    x = np.random.default_rng(4).standard_normal((2, 3, 5, 6))  # (B, H, T, D)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 2, 2, 0]])
    y, _ = rotate(x, rotary=table(positions[:, None], frequencies(6)))
    for sample in range(2):
        alone, _ = rotate(x[sample], rotary=table(positions[sample], frequencies(6)))
        assert np.array_equal(y[sample], alone)


# ── frequencies ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 67), st.sampled_from([1.0, 1e4, 5e5, 1e6]))
def test_frequencies_are_their_formula(n, base):
    got = frequencies(2 * n, base=base)
    want = [1.0 / math.exp(math.log(base) * (2 * i) / (2 * n)) for i in range(n)]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.array(want), rtol=1e-14)


@given(st.integers(2, 67), st.sampled_from([1.0, 2.5, 8.0]), st.sampled_from([1e4, 5e5]))
def test_the_ntk_base_divides_the_last_frequency_alone(n, factor, base):
    plain, long = frequencies(2 * n, base=base), frequencies(2 * n, base=ntk_base(2 * n, factor, base=base))
    assert long[0] == plain[0] == 1
    assert long[-1] == pytest.approx(plain[-1] / factor, rel=1e-13)
    np.testing.assert_allclose(plain / long, [factor ** (i / (n - 1)) for i in range(n)], rtol=1e-13)


def llama3_loop(freqs, factor, context, low, high):
    """As `transformers` computes it (modeling_rope_utils, the kind "llama3"), by wavelengths and one at a time."""
    out = []
    for f in freqs:
        wavelength = 2 * math.pi / f
        if wavelength < context / high:
            out.append(f)
        elif wavelength > context / low:
            out.append(f / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.array(out)


@given(
    st.sampled_from([8.0, 32.0]),
    st.sampled_from([8192, 1021]),
    st.sampled_from([(1.0, 4.0), (0.5, 7.0)]),
    st.integers(1, 67),
)
@example(8.0, 8192, (1.0, 4.0), 64)
def test_llama3_frequencies_are_those_of_transformers(factor, context, rotations, n):
    freqs = frequencies(2 * n, base=5e5)
    got = llama3_frequencies(freqs, factor=factor, context=context, low=rotations[0], high=rotations[1])
    np.testing.assert_allclose(got, llama3_loop(freqs, factor, context, *rotations), rtol=1e-13)


def test_llama3_frequencies_have_the_defaults_of_llama_3_1():
    freqs = frequencies(128, base=5e5)
    got = llama3_frequencies(freqs)
    assert np.array_equal(got, llama3_frequencies(freqs, factor=8, context=8192, low=1, high=4))
    assert np.array_equal(got[:29], freqs[:29])
    assert ((freqs[29:35] / 8 < got[29:35]) & (got[29:35] < freqs[29:35])).all()
    assert np.array_equal(got[35:], freqs[35:] / 8)


def yarn_loop(width, factor, context, base, fast, slow, truncate):
    """As `transformers` computes it (modeling_rope_utils, the kind "yarn"), one pair at a time."""
    low = width * math.log(context / (fast * 2 * math.pi)) / (2 * math.log(base))
    high = width * math.log(context / (slow * 2 * math.pi)) / (2 * math.log(base))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    out = []
    for i in range(width // 2):
        extrapolated = 1 / base ** (2 * i / width)
        keep = 1 - min(max((i - low) / (high - low), 0), 1)
        out.append(extrapolated / factor * (1 - keep) + extrapolated * keep)
    return np.array(out)


@given(
    st.integers(1, 67),
    st.sampled_from([1.0, 8.0, 32.0]),
    st.sampled_from([47, 1021, 4096]),
    st.sampled_from([1e4, 150000.0]),
    st.sampled_from([(32.0, 1.0), (7.0, 0.5)]),
    st.booleans(),
)
@example(32, 32.0, 4096, 150000.0, (32.0, 1.0), False)  # GPT-OSS
@example(1, 8.0, 4, 1e4, (7.0, 0.5), True)  # low = high = 0
@example(2, 8.0, 4096, 1e4, (32.0, 1.0), False)  # high = 1.4, beyond the last pair
def test_yarn_frequencies_are_those_of_transformers(n, factor, context, base, rotations, truncate):
    fast, slow = rotations
    got = yarn_frequencies(2 * n, factor=factor, context=context, base=base, fast=fast, slow=slow, truncate=truncate)
    np.testing.assert_allclose(got, yarn_loop(2 * n, factor, context, base, fast, slow, truncate), rtol=1e-13)


def test_yarn_keeps_fast_frequencies_and_interpolates_slow():
    plain = frequencies(64, base=150000.0)
    got = yarn_frequencies(64, factor=32.0, context=4096, base=150000.0)
    rotations = 4096 * plain / (2 * math.pi)
    assert np.array_equal(got[rotations > 40], plain[rotations > 40])
    np.testing.assert_allclose(got[rotations < 0.8], plain[rotations < 0.8] / 32, rtol=1e-15)
    between = (rotations > 1) & (rotations < 32)
    assert ((plain[between] / 32 < got[between]) & (got[between] < plain[between])).all()


@both
def test_a_gain_multiplies_what_rotates_and_its_gradient(pairs):
    rng = np.random.default_rng(3)
    x, dy, positions, freqs = rng.standard_normal((3, 7, 11)), rng.standard_normal((3, 7, 11)), np.arange(7), F
    y, cache = rotate(x, rotary=table(positions, freqs, pairs=pairs, gain=1.25))
    want, cache_want = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    gain = np.where(np.arange(11) < 6, 1.25, 1.0)
    np.testing.assert_allclose(y, gain * want, rtol=0, atol=1e-15 * 8)
    np.testing.assert_allclose(rotate_vjp(cache, dy)[0], gain * rotate_vjp(cache_want, dy)[0], rtol=0, atol=1e-15 * 8)
    check_vjp(rotate, rotate_vjp, (x,), {"rotary": table(positions, freqs, pairs=pairs, gain=1.25)})


def test_interpolation_divides_the_positions():
    positions, freqs = np.arange(7), frequencies(10)
    for got, want in zip(table(positions / 4, freqs), table(positions, freqs / 4), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)


# ── libraries and dtypes ─────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("placed", ["beside x", "NumPy"])
def test_every_array_library_gives_the_same(xp, pairs, placed):
    x, dy = np.random.default_rng(5).standard_normal((2, 2, 3, 5, 13))
    positions, freqs = np.array([[[0, 1, 2, 3, 4]], [[9, 2, 7, 7, 1]]]), frequencies(10)
    y, cache = rotate(x, rotary=table(positions, freqs, pairs=pairs))
    rotary = table(xp.to(positions) if placed == "beside x" else positions, freqs, pairs=pairs)
    got, cache_got = rotate(xp.to(x), rotary=rotary)
    (dx,) = rotate_vjp(cache_got, xp.to(dy))
    assert type(got) is type(dx) is type(xp.to(x))
    np.testing.assert_allclose(xp.back(got), y, rtol=0, atol=1e-14)
    np.testing.assert_allclose(xp.back(dx), rotate_vjp(cache, dy)[0], rtol=0, atol=1e-14)


@both
def test_strided_views_are_arrays_like_others(pairs):
    x = np.random.default_rng(6).standard_normal((14, 5, 3, 2))
    rotary = table(np.arange(5), frequencies(10), pairs=pairs)
    view = x.transpose(3, 2, 1, 0)[..., ::-1]
    y, cache = rotate(view, rotary=rotary)
    same, cache_same = rotate(view.copy(), rotary=rotary)
    assert np.array_equal(y, same)
    assert np.array_equal(rotate_vjp(cache, view)[0], rotate_vjp(cache_same, view.copy())[0])


@both
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_float32_rounded_once(pairs, dtype):
    x, dy = np.random.default_rng(7).standard_normal((2, 3, 5, 11)).astype(dtype)
    rotary = table(100 + np.arange(5), frequencies(10), pairs=pairs)
    y, cache = rotate(x, rotary=rotary)
    y_32, cache_32 = rotate(x.astype(np.float32), rotary=rotary)
    (dx,), (dx_wide,) = rotate_vjp(cache, dy), rotate_vjp(cache_32, dy.astype(np.float32))
    assert y.dtype == dx.dtype == dtype
    assert cache.rotary.cos.dtype == np.float32
    assert np.array_equal(y, y_32.astype(dtype))
    assert np.array_equal(dx, dx_wide.astype(dtype))


def test_torch_tensors_rotate_too():
    x = np.random.default_rng(8).standard_normal((3, 5, 11))
    rotary = table(np.arange(5), frequencies(10), pairs="interleaved")
    y, cache = rotate(torch.tensor(x), rotary=rotary)
    assert isinstance(rotate_vjp(cache, y)[0], torch.Tensor)
    np.testing.assert_allclose(y.numpy(), rotate(x, rotary=rotary)[0], rtol=0, atol=1e-15)


@both
def test_jax_takes_the_pair_with_the_table_as_an_argument(pairs):
    import jax

    x = np.random.default_rng(9).standard_normal((3, 5, 11))
    with jax.enable_x64(True):
        rotary = table(jax.numpy.arange(5), frequencies(10), pairs=pairs)
        assert type(jax.tree.map(lambda a: a, rotary)) is type(rotary)
        ours = jax.custom_vjp(lambda x, rotary: rotate(x, rotary=rotary)[0])
        ours.defvjp(lambda x, rotary: rotate(x, rotary=rotary), lambda cache, dy: (*rotate_vjp(cache, dy), None))
        got = jax.jit(jax.grad(lambda x, rotary: (ours(x, rotary) ** 3).sum()))(x, rotary)
        want = jax.grad(lambda x: (rotate(x, rotary=rotary)[0] ** 3).sum())(jax.numpy.asarray(x))
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_cache_holds_nothing_of_the_size_of_x():
    rotary = table(np.arange(5), frequencies(6))
    _, cache = rotate(np.ones((3, 5, 7)), rotary=rotary)
    assert isinstance(cache, RotateCache)
    assert cache.rotary.cos is rotary.cos
    assert cache.like.shape == (3, 5, 7, 0)


def test_the_type_says_the_pairs():
    assert type(table(np.arange(3), frequencies(4))) is HalfPairs
    assert type(table(np.arange(3), frequencies(4), pairs="interleaved")) is InterleavedPairs


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

X, F = np.ones((2, 3, 5, 7)), frequencies(6)
TABLE = table(np.arange(5), F)


@pytest.mark.parametrize(
    ("x", "rotary", "error", "message"),
    [
        (X.tolist(), TABLE, TypeError, "x must be an array, got list"),
        (X.astype(int), TABLE, TypeError, "x must have a dtype of .*, got int64"),
        (X[0, 0, 0], TABLE, ValueError, r"x must be \(..., T, D\), got \(7,\)"),
        (X, (TABLE.cos, TABLE.sin), TypeError, "rotary must come from funcmha.rotary, got tuple"),
        (X, None, TypeError, "rotary must come from funcmha.rotary, got NoneType"),
        (
            X,
            HalfPairs(*map(torch.tensor, TABLE)),
            TypeError,
            "rotary must be a NumPy array as x is, got a PyTorch tensor",
        ),
        (X, table(np.arange(4), F), ValueError, "rotary must have T=5 positions as x has, got 4"),
        (X, table(np.arange(1), F), ValueError, "rotary must have T=5 positions as x has, got 1"),
        (X, table(np.arange(5), frequencies(8)), ValueError, "rotary must rotate at most D=7 features as in x, got 8"),
        (
            X,
            table(np.zeros((2, 5)), F),
            ValueError,
            r"rotary must broadcast to \(..., T\) = \(2, 3, 5\), got \(2, 5\)",
        ),
        (X[0], table(np.zeros((2, 1, 5)), F), ValueError, r"rotary must broadcast to .*, got \(2, 1, 5\)"),
        (X[:1], table(np.zeros((2, 1, 5)), F), ValueError, r"rotary must broadcast to .*, got \(2, 1, 5\)"),
    ],
)
def test_rotate_refuses(x, rotary, error, message):
    with pytest.raises(error, match=message):
        rotate(x, rotary=rotary)


@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (X.tolist(), TypeError, "dy must be an array, got list"),
        (X[0], ValueError, r"dy must be \(..., T, D\) = \(2, 3, 5, 7\) as the output is, got \(3, 5, 7\)"),
        (X[..., :6], ValueError, "dy must be"),
        (X.astype(np.float32), TypeError, "dy must have dtype float64 as the output has, got float32"),
    ],
)
def test_rotate_vjp_refuses(dy, error, message):
    _, cache = rotate(X, rotary=TABLE)
    with pytest.raises(error, match=message):
        rotate_vjp(cache, dy)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: table([0, 1], F), TypeError, "positions must be an array, got list"),
        (lambda: table(np.array(3), F), ValueError, r"positions must be \(..., T\), got \(\)"),
        (
            lambda: table(np.ones(3, bool), F),
            TypeError,
            "positions must be integers, float32 or float64, got dtype bool",
        ),
        (lambda: table(np.ones(3, complex), F), TypeError, "positions must be integers, .*, got dtype complex128"),
        (lambda: table(np.ones(3, np.float16), F), TypeError, "positions must be integers, .*, got dtype float16"),
        (lambda: table(np.ones(3, ml_dtypes.bfloat16), F), TypeError, "positions must be .*, got dtype bfloat16"),
        (lambda: table(np.arange(3), 64), TypeError, "frequencies must be a NumPy array of float64, got int"),
        (lambda: table(np.arange(3), F.astype("f4")), TypeError, "frequencies must be .* float64, got float32"),
        (lambda: table(np.arange(3), F[None]), ValueError, r"frequencies must be \(N,\), got \(1, 3\)"),
        (lambda: table(np.arange(3), F * np.inf), ValueError, "frequencies must be finite"),
        (
            lambda: table(np.arange(3), F, pairs="neox"),
            ValueError,
            "pairs must be 'half' or 'interleaved', got 'neox'",
        ),
        (lambda: frequencies(7), ValueError, "width must be even and not negative, .*, got 7"),
        (lambda: frequencies(-2), ValueError, "width must be even and not negative, .*, got -2"),
        (lambda: frequencies(8.0), TypeError, "width must be an int, got 8.0 of type float"),
        (lambda: frequencies(8, base=0.5), ValueError, "base must be at least 1 and below inf, got 0.5"),
        (lambda: ntk_base(2, 4.0), ValueError, "width must be 4 or more, .*, got 2"),
        (lambda: ntk_base(8, 0.5), ValueError, "factor must be at least 1 and below inf, got 0.5"),
        (lambda: llama3_frequencies(F, factor=0), ValueError, "factor must be at least 1"),
        (lambda: llama3_frequencies(F, low=4, high=4), ValueError, "low must be below high, got low=4.0 and high=4.0"),
        (lambda: table(np.arange(3), F, gain=None), TypeError, "gain must be a real number, got None"),
        (lambda: yarn_frequencies(7, factor=2, context=8), ValueError, "width must be even and not negative"),
        (lambda: yarn_frequencies(8, factor=0.5, context=8), ValueError, "factor must be at least 1 and"),
        (
            lambda: yarn_frequencies(8, factor=2, context=8, slow=3, fast=2),
            ValueError,
            "slow must be above 0 and below fast, and base above 1, got slow=3.0, fast=2.0, base=10000.0",
        ),
        (lambda: yarn_frequencies(8, factor=2, context=8, base=1), ValueError, "base above 1, got .*base=1"),
        (lambda: llama3_frequencies(F.tolist()), TypeError, "frequencies must be a NumPy array of float64, got list"),
    ],
)
def test_tables_refuse(call, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        call()
