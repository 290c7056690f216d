"""What attention asks of a bias, an array or a `RelativeBias`, against the array that each stands for."""

import numpy as np
import pytest
import torch
from pytrees import PYTREES

from funcmha import _check
from funcmha.biases import ArrayBias, RelativeBias, as_bias, dense

B, H, T, S = 2, 6, 5, 7
L = T + S - 1
ARRAYS = [(B, H, T, S), (B, 1, T, S), (H, T, S), (1, T, S), (B, H, 1, S), (H, T, 1), (T, S), (1, S), (T, 1), (S,), ()]
RELATIVE = [(B, H, L), (B, 1, L), (H, L), (1, L), (L,)]
BIASES = {f"array {shape}": (ArrayBias, shape) for shape in ARRAYS} | {
    f"relative {shape}": (RelativeBias, shape) for shape in RELATIVE
}
every_bias = pytest.mark.parametrize(("kind", "shape"), BIASES.values(), ids=BIASES)
GROUPS = (slice(0, 2), slice(2, 3), slice(3, 6))


def read_only(*shape, seed=0):
    a = np.random.default_rng([seed, *shape]).standard_normal(shape)
    a.flags.writeable = False
    return a


def whole(bias):
    """All scores' biases (B, H, T, S), by an index that broadcasts. The oracle."""
    if isinstance(bias, RelativeBias):
        a = bias.values[..., np.arange(S) - np.arange(T)[:, None] + T - 1]
    else:
        a = bias.values
    return np.broadcast_to(a, (B, H, T, S))


def torch_gradient(bias, dz):
    """dvalues of Σ dz · whole(values), by PyTorch."""
    values = torch.tensor(np.array(bias.values), requires_grad=True)
    a = values
    if isinstance(bias, RelativeBias):
        a = values[..., torch.arange(S) - torch.arange(T)[:, None] + T - 1]
    (grad,) = torch.autograd.grad((a.expand(B, H, T, S) * torch.tensor(np.array(dz))).sum(), values)
    return grad.numpy()


def close(got, want):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


# ── what is given ────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_bias_takes_what_attention_takes():
    """None, an array, a `RelativeBias`, and what it made itself; `given` is the way back."""
    array, relative = read_only(T, S), RelativeBias(read_only(L))
    assert as_bias(None) is None
    assert as_bias(relative) is relative
    assert relative.given is relative
    bias = as_bias(array)
    assert type(bias) is ArrayBias
    assert bias.given is array
    assert as_bias(bias) is bias


@pytest.mark.parametrize(("x", "got"), [(0.0, "float"), ([[1.0]], "list"), (np.float64(1), "float64"), ((), "tuple")])
def test_as_bias_refuses(x, got):
    with pytest.raises(TypeError, match=f"^bias must be an array, got {got}$"):
        as_bias(x)


@every_bias
@pytest.mark.parametrize("library", PYTREES)
def test_a_bias_is_a_plain_pytree(kind, shape, library):
    """By the pytrees of three libraries: one leaf, the array, and the type comes back."""
    flatten, unflatten = PYTREES[library]
    bias = kind(read_only(*shape))
    leaves, spec = flatten(bias)
    assert len(leaves) == 1
    assert leaves[0] is bias.values
    assert type(unflatten(leaves, spec)) is kind


# ── dense, and its gradient ──────────────────────────────────────────────────────────────────────────────────────


@every_bias
def test_dense_is_the_array_that_it_stands_for(kind, shape):
    """Oracle: an index of differences."""
    bias = kind(read_only(*shape))
    assert np.array_equal(np.broadcast_to(bias.dense(T, S), (B, H, T, S)), whole(bias))


@every_bias
def test_dense_vjp_matches_torch(kind, shape):
    """Summed over the axes that were broadcast, and along diagonals. Oracle: PyTorch's gradient."""
    bias, dz = kind(read_only(*shape)), read_only(B, H, T, S, seed=1)
    dbias = bias.dense_vjp(dz)
    assert type(dbias) is kind
    close(dbias.values, torch_gradient(bias, dz))


@every_bias
def test_map_keeps_the_kind(kind, shape):
    bias = kind(read_only(*shape)).map(lambda a: 2 * a)
    assert type(bias) is kind
    assert np.array_equal(bias.values, 2 * read_only(*shape))


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_bias
@pytest.mark.parametrize("h", GROUPS, ids=str)
def test_heads_are_the_heads_of_dense(kind, shape, h):
    """Oracle: the same heads of the whole array."""
    bias = kind(read_only(*shape))
    part = bias.heads(h)
    assert type(part) is kind
    got = np.broadcast_to(part.dense(T, S), (B, h.stop - h.start, T, S))
    assert np.array_equal(got, whole(bias)[:, h])


@every_bias
def test_join_is_the_gradient_of_all_heads(kind, shape):
    """From the gradients of groups of heads. Oracle: the gradient of all heads at once."""
    bias, dz = kind(read_only(*shape)), read_only(B, H, T, S, seed=1)
    joined = bias.join([bias.heads(h).dense_vjp(dz[:, h]) for h in GROUPS])
    assert type(joined) is kind
    close(joined.values, bias.dense_vjp(dz).values)
    assert bias.join([joined]) is joined


@pytest.mark.parametrize(
    "bias",
    [
        ArrayBias(read_only(B, T, S)),
        ArrayBias(read_only(B, 3, 1, S)),
        ArrayBias(read_only(T, S)),
        ArrayBias(read_only(S)),
        RelativeBias(read_only(B, L)),
        RelativeBias(read_only(L)),
    ],
    ids=lambda bias: f"{type(bias).__name__} {bias.values.shape}",
)
def test_a_head_axis_is_put_in_and_taken_out(bias):
    """One head: (..., T, S) broadcasts as (..., 1, T, S), and back it is as it was."""
    more = bias.with_head_axis()
    got = np.broadcast_to(more.dense(T, S), np.broadcast_shapes((1, T, S), more.dense(T, S).shape))
    want = np.broadcast_to(bias.dense(T, S), np.broadcast_shapes((T, S), bias.dense(T, S).shape))
    assert np.array_equal(got[..., 0, :, :], want)
    assert np.array_equal(more.without_head_axis().values, bias.values)


# ── appended keys ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ARRAYS, ids=str)
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_appended_keys_have_bias_0(shape, extra):
    """The columns of S keys, then zeros; the gradient of the former alone. Oracle: NumPy's pad, and dense_vjp."""
    bias, dz = ArrayBias(read_only(*shape)), read_only(B, H, T, S + extra, seed=1)
    more = bias.append_keys(S, extra)
    want = np.pad(whole(bias), [(0, 0)] * 3 + [(0, extra)])
    assert np.array_equal(np.broadcast_to(more.dense(T, S + extra), want.shape), want)
    close(bias.append_keys_vjp(S, more.dense_vjp(dz)).values, bias.dense_vjp(dz[..., :S]).values)


def test_appended_keys_have_no_relative_bias():
    bias = RelativeBias(read_only(L))
    assert bias.append_keys(S, 0) is bias
    assert bias.append_keys_vjp(S, bias) is bias
    with pytest.raises(
        ValueError, match=r"^bias must be an array with bias_kv or zero_attn: an appended key has no pos"
    ):
        bias.append_keys(S, 1)


# ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sizes():
    axes = _check.Axes()
    axes("q", np.zeros((B, H, T, 3)), "... H T D")
    axes("k", np.zeros((S, 3)), "S D")
    return axes


@every_bias
def test_what_broadcasts_to_the_scores_is_taken(kind, shape):
    kind(np.zeros(shape)).check(sizes(), "... H T S")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (ArrayBias(np.zeros((T, 6))), r"bias must broadcast to \(..., H, T, S\) = \(2, 6, 5, 7\), got \(5, 6\)"),
        (ArrayBias(np.zeros((3, B, H, T, S))), r"bias must broadcast to \(..., H, T, S\) = \(2, 6, 5, 7\), got"),
        (RelativeBias(np.zeros((H, 12))), r"bias.values must be \(..., H or 1, T \+ S − 1\) with T=5 and S=7, got"),
        (RelativeBias(np.zeros((3, L))), r"bias.values must broadcast to \(..., H, T\+S-1\) = \(2, 6, 11\), got \(3,"),
        (RelativeBias(np.zeros(())), r"bias.values must be \(..., H or 1, T \+ S − 1\) with T=5 and S=7, got \(\)"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused(bias, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bias.check(sizes(), "... H T S")
    assert bias.name == ("bias" if isinstance(bias, ArrayBias) else "bias.values")


def test_a_relative_bias_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"^bias.values must be .* with T=5 and S=6, got \(11,\)"):
        RelativeBias(np.zeros(L)).dense(T, 6)
    with pytest.raises(ValueError, match=r"^relative.values must be .* with T=5 and S=6, got \(11,\)"):
        dense(RelativeBias(np.zeros(L)), T, 6)
