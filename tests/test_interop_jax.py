"""JAX is the oracle of its own call, to float32: its softmax is float32 whatever the inputs.

In float64 the oracle is the same formula with the same fill, written out and differentiated by torch.
"""

import inspect
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from funcmha import attention_weights, log_sum_exp
from funcmha.interop.jax import dot_product_attention, dot_product_attention_vjp
from funcmha.interop.jax.functional import CHUNK, FILL
from funcmha.testing import check_vjp

each = pytest.mark.usefixtures("each_engine")


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    """The arguments of `jax.nn.dot_product_attention`, read-only."""

    B: int | None = 2  # None: without a batch
    T: int = 5
    S: int = 7
    N: int = 6
    K: int = 3
    H: int = 11
    bias: str | None = None  # its axes; "1" is one that it lacks
    mask: str | None = None
    scale: float | None = None
    is_causal: bool = False
    window: int | tuple[int, int] | None = None
    query_lengths: bool = False
    key_lengths: bool = False
    strided: bool = False
    seed: int = 0

    def inputs(self, dtype="float64"):
        """query, key, value, bias, and dy."""
        rng = np.random.default_rng(self.seed)
        batch = () if self.B is None else (self.B,)
        query, key = (*batch, self.T, self.N, self.H), (*batch, self.S, self.K, self.H)
        shapes = [query, key, key, None if self.bias is None else self.shape(self.bias), query]
        return [None if shape is None else self.array(rng, shape, dtype) for shape in shapes]

    def array(self, rng, shape, dtype):
        a = rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::2]
        a = a if self.strided else np.ascontiguousarray(a)
        a.flags.writeable = False
        return a

    def shape(self, axes):
        sizes = {"B": self.B or 1, "N": self.N, "T": self.T, "S": self.S, "1": 1}
        return tuple(sizes[axis] for axis in axes)

    def static(self):
        rng, B = np.random.default_rng(self.seed + 1), self.B or 1
        return {
            "mask": None if self.mask is None else rng.random(self.shape(self.mask)) < 0.4,
            "scale": self.scale,
            "is_causal": self.is_causal,
            "query_seq_lengths": rng.integers(0, self.T + 2, B).astype("i4") if self.query_lengths else None,
            "key_value_seq_lengths": rng.integers(0, self.S + 2, B).astype("i4") if self.key_lengths else None,
            "local_window_size": self.window,
        }

    def without_keys(self):
        """The queries (B, N, T) that attend no key, padding or not, by plain loops; and those that are padding."""
        static, B = self.static(), self.B or 1
        shape = (B, self.N, self.T, self.S)
        mask = np.broadcast_to(True if static["mask"] is None else static["mask"], shape).copy()
        padding = np.zeros(shape[:3], bool)
        left, right = self.window if isinstance(self.window, tuple) else (self.window, self.window)
        for b, n, i, j in np.ndindex(shape):
            past = static["query_seq_lengths"] is not None and i >= static["query_seq_lengths"][b]
            padding[b, n, i] = past
            mask[b, n, i, j] &= not (
                past
                or (self.is_causal and j > i)
                or (left is not None and not i - left <= j <= i + right)
                or (static["key_value_seq_lengths"] is not None and j >= static["key_value_seq_lengths"][b])
            )
        return mask, padding


AXES = st.none() | st.sampled_from(["BNTS", "1NTS", "B1TS", "B11S", "BNT1", "111S", "NTS", "TS", "S", "1NT1"])


@st.composite
def problems(draw):
    flag, reach, K = st.booleans(), st.integers(0, 3), draw(st.sampled_from([1, 2, 3]))
    return Problem(
        B=draw(st.sampled_from([None, 1, 2])),
        T=draw(st.sampled_from([1, 5, 13])),
        S=draw(st.sampled_from([0, 1, 7, 11])),
        N=K * draw(st.sampled_from([1, 2])),
        K=K,
        H=draw(st.sampled_from([1, 17])),
        bias=draw(AXES),
        mask=draw(AXES),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        is_causal=draw(flag),
        window=draw(st.none() | reach | st.tuples(reach, reach)),
        query_lengths=draw(flag),
        key_lengths=draw(flag),
        strided=draw(flag),
        seed=draw(st.integers(0, 2**31)),
    )


def run(problem, dtype="float64", dlse=False):
    """y, the gradients, and the residual, by funcmha; with `dlse` dy's first numbers are that of the residual."""
    *inputs, dy = problem.inputs(dtype)
    y, cache = dot_product_attention(*inputs, **problem.static())
    return y, *dot_product_attention_vjp(cache, dy, dlse=dy[..., 0] if dlse else None), log_sum_exp(cache)


@cache
def run_jax(problem, dtype="float64"):
    """The same by JAX, once for all engines."""
    *inputs, dy = problem.inputs(dtype)
    given, static = [i for i, x in enumerate(inputs) if x is not None], problem.static()

    def attend(*args):
        filled = [args[given.index(i)] if i in given else None for i in range(4)]
        return jax.nn.dot_product_attention(*filled, return_residual=True, **static)

    def back_and_forth(dy, *args):
        y, pull, lse = jax.vjp(attend, *args, has_aux=True)
        return y, pull(dy), lse

    if dtype != np.float16:  # of which jax 0.10.2 compiles no product on a CPU, see below
        back_and_forth = jax.jit(back_and_forth)
    with jax.enable_x64(dtype == "float64"):
        y, grads, lse = back_and_forth(dy, *(inputs[i] for i in given))
        grads = dict(zip(given, grads, strict=True))
        return [x if x is None else np.asarray(x) for x in (y, *(grads.get(i) for i in range(4)), lse)]


def run_torch(problem, dlse=False):
    """The same by the formula, with JAX's fill, in float64."""
    *inputs, dy = (None if x is None else torch.tensor(np.array(x)) for x in problem.inputs())
    given = [x.requires_grad_() for x in inputs if x is not None]
    q, k, v = (x if problem.B else x[None] for x in inputs[:3])
    k, v = (x.repeat_interleave(problem.N // problem.K, dim=2) for x in (k, v))
    z = torch.einsum("btnh,bsnh->bnts", q, k) * (problem.H**-0.5 if problem.scale is None else problem.scale)
    z = z if inputs[3] is None else z + inputs[3]
    mask, padding = problem.without_keys()
    z = torch.where(torch.tensor(mask), z, -0.7 * torch.finfo(torch.float32).max)
    y = torch.einsum("bnts,bsnh->btnh", z.softmax(-1), v)
    y = y * torch.tensor(~padding).double().transpose(1, 2)[..., None]
    y, lse = (x if problem.B else x[0] for x in (y, z.logsumexp(-1).transpose(1, 2)))
    outputs, cotangents = ((y, lse), (dy, dy[..., 0])) if dlse else ((y,), (dy,))
    grads = iter(torch.autograd.grad(outputs, given, cotangents, allow_unused=True))
    grads = [x if x is None else next(grads) for x in inputs]
    grads = [x if g is None and x is not None else g for x, g in zip([None] * 4, grads, strict=True)]
    return [x if x is None else x.detach().numpy() for x in (y, *grads, lse)]


def check(got, want, tolerance):
    """Each to `tolerance` of its largest entry, but for the fill."""
    names = ("y", "dquery", "dkey", "dvalue", "dbias", "residual")
    assert [x is None for x in got] == [x is None for x in want]
    for name, a, b in [entry for entry in zip(names, got, want, strict=False) if entry[1] is not None]:
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        a, b = a.astype("f8"), b.astype("f8")
        largest = np.abs(b).max(initial=1, where=b > FILL / 2)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest, err_msg=name)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@each
@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_values_and_gradients_match_the_formula_in_float64(problem):
    check(run(problem), run_torch(problem), 1e-11)


@each
@given(problems())
def test_gradients_through_the_residual_match_the_formula(problem):
    check(run(problem, dlse=True), run_torch(problem, dlse=True), 1e-11)


# Most of them of one shape: JAX compiles every operation anew for each.
CASES = {
    "one key/value head, S > T, without a batch": Problem(
        B=None, K=1, S=17, is_causal=True, key_lengths=True, bias="NTS"
    ),
    "grouped and causal, S < T": Problem(T=13, is_causal=True, query_lengths=True),
    "rows without keys": Problem(T=13, window=(1, 3), mask="B1TS", key_lengths=True, bias="BNTS"),
    "all": Problem(T=13, bias="BNTS", mask="BNTS", scale=0.3, is_causal=True, window=5, query_lengths=True),
}


@each
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_values_gradients_and_residual_match_jax(problem):
    check(run(problem, "float32"), run_jax(problem, "float32"), 5e-6)


@each
def test_jax_has_float32_s_digits_in_float64_too():
    """Not more than float32's in its softmax (jax 0.10.2), where funcmha has those of float64."""
    got, want = run(Problem()), run_jax(Problem())
    check(got, want, 5e-6)
    check(got, run_torch(Problem()), 1e-14)
    assert np.abs(got[0] - want[0]).max() > 1e-9


HALF = {"float16": (np.float16, 2.0**-11), "bfloat16": (ml_dtypes.bfloat16, 2.0**-8)}
U32 = 2.0**-24
HALF_CASES = ["one key/value head, S > T, without a batch", "all"]


def sizes_of_the_terms(problem, dtype):
    """Of y and of each gradient the exact numbers, and the sizes of what JAX rounds to the half type on the way there.

    JAX (0.10.2, jax/_src/nn/functions.py) multiplies half types with float32 sums, and rounds: the weights; y; dp, as a
    gradient of the weights; ds, as it goes into a product with half types; and each result.
    """
    wide = [None if x is None else x.astype("f8") for x in problem.inputs(dtype)]
    *inputs, dy = [x if x is None or problem.B or i == 3 else x[None] for i, x in enumerate(wide)]
    query, key, value, bias = inputs
    y, cache = dot_product_attention(*inputs, **problem.static())
    exact = (y, *dot_product_attention_vjp(cache, dy))
    group, scale = problem.N // problem.K, problem.H**-0.5 if problem.scale is None else abs(problem.scale)
    p = attention_weights(cache)
    q, k, v, d = (abs(x) for x in (query, key.repeat(group, axis=2), value.repeat(group, axis=2), dy))
    dp = np.einsum("btnh,bsnh->bnts", d, v)
    ds = p * (dp + (p * dp).sum(-1, keepdims=True))
    if cache.masked is not None:
        ds = np.where(cache.masked[..., None], 0.0, ds)
    grouped = [
        np.einsum("bnts,btnh->bsnh", w, x).reshape(*key.shape[:3], group, -1).sum(3) for w, x in ((ds, q), (p, d))
    ]
    terms = [
        np.einsum("bnts,bsnh->btnh", p, v),
        scale * np.einsum("bnts,bsnh->btnh", ds, k),
        scale * grouped[0],
        grouped[1],
    ]
    if bias is not None:
        terms.append(
            ds.sum(tuple(i for i, n in enumerate((1,) * (4 - bias.ndim) + bias.shape) if n == 1), keepdims=True)
        )
    return exact, terms


@pytest.mark.slow
@each
@pytest.mark.parametrize(("name", "half"), [("all", "float16"), *((name, "bfloat16") for name in HALF_CASES)])
def test_half_types_match_jax_within_the_roundings_of_both(name, half):
    """Here there is one rounding, at the end; there, up to three of U on the way of each term, and that of float32."""
    problem, (dtype, U) = CASES[name], HALF[half]
    *got, lse = run(problem, dtype)
    *want, rounded = run_jax(problem, dtype)
    exact, terms = sizes_of_the_terms(problem, dtype)
    for what, ours, theirs, y, of in zip(
        ("y", "dquery", "dkey", "dvalue", "dbias"), got, want, exact, terms, strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
        ours, theirs, y, of = (x.astype("f8").reshape(y.shape) for x in (ours, theirs, y, of))
        slack = 8 * (problem.H + problem.S + problem.T) * U32 * of + (2.0**-24 if half == "float16" else 0.0)
        assert np.all(np.abs(ours - y) <= U * np.abs(y) + slack), what
        assert np.all(np.abs(ours - theirs) <= 3 * U * of + 2 * U * np.abs(y) + slack), what
    assert lse.dtype == np.float32
    lse = np.where(lse == FILL, -np.inf if half == "float16" else FILL, lse)  # the fill in float16, there
    np.testing.assert_allclose(rounded.astype("f8"), lse.astype("f8"), rtol=2 * U, atol=U)


def test_jax_compiles_no_float16_on_a_cpu():
    """jax 0.10.2, where F16_F16_F32 is asked for and refused only once it is compiled. Here there is an answer."""
    query, key, value, *_ = Problem().inputs("float16")
    there = jax.device_put((query, key, value), jax.devices("cpu")[0])
    with pytest.raises(ValueError, match="F16_F16_F32"):
        jax.jit(jax.nn.dot_product_attention)(*there)
    assert dot_product_attention(query, key, value)[0].dtype == np.float16


def test_every_argument_of_jax_is_supported_but_two():
    """Which implementation runs is not asked, and the residual is read from the cache."""
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert [name for name in theirs if name not in ours] == ["implementation", "return_residual"]
    assert {name: x.default for name, x in ours.items()} == {name: theirs[name].default for name in ours}


@each
@pytest.mark.parametrize(("bias", "mask"), [("N11", "BN11"), ("B1T1", "NTS"), ("S", "B1T1"), ("1", "111S")])
def test_bias_and_mask_broadcast_as_in_jax(bias, mask):
    problem = Problem(bias=bias, mask=mask, N=4, K=2)
    check(run(problem, "float32"), run_jax(problem, "float32"), 5e-6)


@each
def test_a_float32_bias_of_half_types_is_added_in_float32():
    query, key, value, bias, dy = Problem(bias="1NTS", mask="TS").inputs(ml_dtypes.bfloat16)
    fine = bias.astype("f4") + np.float32(1 / 3)
    mask = Problem(mask="TS").static()["mask"]
    y, cache = dot_product_attention(query, key, value, fine, mask=mask)
    grads = dot_product_attention_vjp(cache, dy)
    wide = [x.astype("f4") for x in (query, key, value)]
    y_wide, cache_wide = dot_product_attention(*wide, fine, mask=mask)
    grads_wide = dot_product_attention_vjp(cache_wide, dy.astype("f4"))
    assert [x.dtype for x in (y, *grads)] == [*[np.dtype(ml_dtypes.bfloat16)] * 4, np.dtype("f4")]
    for x, x_wide in zip((y, *grads), (y_wide, *grads_wide), strict=True):
        np.testing.assert_array_equal(x, x_wide.astype(x.dtype))


@each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_pair_keeps_the_protocol(dtype):
    for problem in CASES.values():
        *inputs, _ = problem.inputs(dtype)
        check_vjp(dot_product_attention, dot_product_attention_vjp, tuple(inputs), problem.static())


def test_every_array_library_gives_the_same(xp):
    *inputs, dy = Problem(bias="BNTS").inputs()
    lengths = {"query_seq_lengths": np.array([4, 9]), "key_value_seq_lengths": np.array([2, 7])}
    static = lengths | {
        "local_window_size": (1, 3),
        "mask": np.ones((5, 7), bool),
    }  # query 3 of sample 0 attends no key
    y, cache = dot_product_attention(*map(xp.to, inputs), **static)
    got = [xp.back(x) for x in (y, *dot_product_attention_vjp(cache, xp.to(dy)), log_sum_exp(cache))]
    y, cache = dot_product_attention(*inputs, **static)
    check(got, [y, *dot_product_attention_vjp(cache, dy), log_sum_exp(cache)], 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        "B is None and mask and bias",
        "N > K > 1 and T > 1 and S > 1",
        "is_causal and S > T > 1",
        "is_causal and T > S > 1",
        "isinstance(window, tuple) and window[0] != window[1] and T > 1 and S > 1",
        "window == 0 and isinstance(window, int) and T > S",
        "query_lengths and key_lengths and mask and is_causal and window and bias",
        "S == 0 and query_lengths and is_causal",
        "strided and T > 1",
    ],
)
def test_the_problems_are_not_vacuous(flag):
    assert find(problems(), lambda problem: eval(flag, dict(vars(problem))), settings=settings(max_examples=5000))


# ── rows without keys ────────────────────────────────────────────────────────────────────────────────────────────


@each
def test_a_masked_query_gives_the_mean_and_a_padded_one_0():
    query, key, value, bias, dy = Problem(bias="1111").inputs()
    mask = np.ones((2, 1, 5, 7), bool)
    mask[0, :, 2], mask[1, :, 4] = False, False
    y, cache = dot_product_attention(query, key, value, bias, mask=mask, query_seq_lengths=np.array([5, 4]))
    dquery, dkey, dvalue, dbias = dot_product_attention_vjp(cache, dy)
    np.testing.assert_allclose(y[0, 2], value[0].mean(0).repeat(2, axis=0), rtol=1e-14, atol=1e-15)
    assert not y[1, 4].any()
    assert not dquery[0, 2].any()
    assert not dquery[1, 4].any()
    p, lse = attention_weights(cache), log_sum_exp(cache)
    assert p.shape == (2, 6, 5, 7)
    np.testing.assert_array_equal(p[0, :, 2], 1 / 7)
    np.testing.assert_array_equal(p[1, :, 4], 0)
    np.testing.assert_array_equal(lse[[0, 1], [2, 4]], FILL)
    assert (lse == FILL).sum() == 2 * 6

    dy = np.where(np.arange(5)[:, None, None] == 2, dy, 0.0) * np.array([1.0, 0.0])[:, None, None, None]
    dquery, dkey, dvalue, dbias = dot_product_attention_vjp(cache, dy)
    assert not any(x.any() for x in (dquery, dkey, dbias, dvalue[1]))
    want = np.broadcast_to(dy[0, 2].reshape(3, 2, 11).sum(1) / 7, (7, 3, 11))
    np.testing.assert_allclose(dvalue[0], want, rtol=1e-14)


@each
def test_jax_attends_masked_keys_if_a_bias_is_below_the_fill():
    """jax 0.10.2: −2.4e38, the fill of the forbidden keys, is then the greatest score. Here they stay forbidden."""
    query, key, value, _, dy = Problem(K=6).inputs("float32")
    bias, mask = np.zeros((1, 1, 5, 7), "f4"), np.ones((1, 1, 5, 7), bool)
    bias[..., 2, :3], mask[..., 3:] = -np.inf, False
    theirs = jax.jit(jax.nn.dot_product_attention)(query, key, value, bias, mask)
    np.testing.assert_allclose(theirs[:, 2], value[:, 3:].mean(1), rtol=1e-5, atol=1e-6)
    y, cache = dot_product_attention(query, key, value, bias, mask=mask)
    assert not y[:, 2].any()
    assert not dot_product_attention_vjp(cache, dy)[2][:, 3:].any()


@each
def test_a_row_of_minus_infinity_is_nan_in_jax_and_0_here():
    """jax 0.10.2."""
    query, key, value, _, dy = Problem().inputs("float32")
    bias = np.zeros((1, 1, 5, 7), "f4")
    bias[..., 2, :] = -np.inf
    assert np.isnan(jax.jit(jax.nn.dot_product_attention)(query, key, value, bias)[:, 2]).all()
    y, cache = dot_product_attention(query, key, value, bias)
    assert not y[:, 2].any()
    assert not dot_product_attention_vjp(cache, dy)[0][:, 2].any()
    assert all(np.isfinite(dx).all() for dx in dot_product_attention_vjp(cache, dy))


@each
def test_a_key_that_no_query_attends_may_be_nan():
    query, key, value, _, dy = Problem().inputs()
    mask = np.arange(7) < 4
    dirty = [np.where(mask[:, None, None], x, np.nan) for x in (key, value)]
    clean, bad = (dot_product_attention(query, *kv, mask=mask) for kv in ((key, value), dirty))
    np.testing.assert_array_equal(clean[0], bad[0])
    for a, b in zip(*(dot_product_attention_vjp(kept, dy) for _, kept in (clean, bad)), strict=True):
        np.testing.assert_array_equal(a, b)


@each
def test_rows_of_a_mask_are_read_in_chunks():
    """Three chunks, the last of them short, against the formula; in each are fully masked rows."""
    problem = Problem(B=1, T=2 * CHUNK + 9, S=3, N=1, K=1, H=2, mask="B1TS")
    masked = ~problem.static()["mask"].any(-1).ravel()
    assert all(rows.any() and not rows.all() for rows in np.split(masked, [CHUNK, 2 * CHUNK]))
    check(run(problem), run_torch(problem), 1e-11)


# ── arrays of JAX, and refusals ──────────────────────────────────────────────────────────────────────────────────


def test_jax_takes_the_pair_as_it_is_with_its_own_arrays():
    problem = CASES["all"]
    *inputs, dy = problem.inputs("float32")
    static = problem.static()
    ours = jax.custom_vjp(lambda *args: dot_product_attention(*args, **static)[0])
    ours.defvjp(lambda *args: dot_product_attention(*args, **static), dot_product_attention_vjp)
    y, *grads = jax.jit(lambda dy, *args: (ours(*args), *jax.vjp(ours, *args)[1](dy)))(dy, *inputs)
    check([np.asarray(x) for x in (y, *grads)], run(problem, "float32")[:-1], 5e-6)


def test_jax_is_not_imported():
    code = """
import sys, numpy as np
from funcmha.interop.jax import dot_product_attention, dot_product_attention_vjp
x = np.ones((2, 3, 5))
y, cache = dot_product_attention(x, x, x, is_causal=True, query_seq_lengths=np.array([1]))
dot_product_attention_vjp(cache, y)
import funcmha.interop.jax.bridge
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


X = np.ones((2, 5, 6, 11))
Y = np.ones((2, 7, 3, 11))


@pytest.mark.parametrize(
    ("inputs", "static", "error", "message"),
    [
        ((X[0, 0], Y, Y), {}, ValueError, r"query must be \(B, T, N, H\), got \(6, 11\)"),
        ((X, Y[0], Y), {}, ValueError, r"key must be \(B, S, K, H\) with B=2 as in query, H=11 .* got \(7, 3, 11\)"),
        (
            (X, Y, Y[:, :5]),
            {},
            ValueError,
            r"value must be \(B, S, K, H\) with .* S=7 as in key, .* got \(2, 5, 3, 11\)",
        ),
        ((X, Y, Y[..., :5]), {}, ValueError, r"value must be .* H=11 as in query, got \(2, 7, 3, 5\)"),
        ((X[:, :, :5], Y, Y), {}, ValueError, "query has N=5 heads, which must be a multiple of K=3 as in key"),
        ((X, Y, Y.astype("f4")), {}, TypeError, "value must have dtype float64 as query has, got float32"),
        ((X, Y, Y, np.ones((7,), "f4")), {}, TypeError, "bias must have dtype float64 as query has, got float32"),
        ((X, Y, Y, np.ones((3, 5, 7))), {}, ValueError, r"bias must broadcast to \(B, N, T, S\) = \(2, 6, 5, 7\), got"),
        ((X, Y, Y), {"mask": np.ones((5, 7))}, TypeError, "mask must be boolean, True = attend .* got dtype float64"),
        ((X, Y, Y), {"mask": np.ones((7, 5), bool)}, ValueError, r"mask must broadcast to .* got \(7, 5\)"),
        ((X, Y, Y), {"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
        ((X, Y, Y), {"scale": np.ones(6)}, TypeError, "scale must be a real number"),
        (
            (X, Y, Y),
            {"local_window_size": -1},
            ValueError,
            "local_window_size must be at least 0 or a pair of them, got -1",
        ),
        ((X, Y, Y), {"local_window_size": (1, 2, 3)}, ValueError, "local_window_size must be"),
        (
            (X, Y, Y),
            {"local_window_size": True},
            TypeError,
            "local_window_size must be an int or a pair of them, got True",
        ),
        (
            (X, Y, Y),
            {"query_seq_lengths": [5, 5]},
            TypeError,
            "query_seq_lengths must be a NumPy array of integers, got list",
        ),
        ((X, Y, Y), {"key_value_seq_lengths": np.ones(2)}, TypeError, "key_value_seq_lengths .* got float64"),
        ((X, Y, Y), {"key_value_seq_lengths": np.ones(3, int)}, ValueError, r"must be \(B,\) with B=2 .* got \(3,\)"),
        (
            (X, Y, Y),
            {"query_seq_lengths": np.array([1, -2])},
            ValueError,
            r"query_seq_lengths must be at least 0, got \[1, -2\]",
        ),
    ],
)
def test_refused_by_name(inputs, static, error, message):
    with pytest.raises(error, match=message):
        dot_product_attention(*inputs, **static)


@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (np.ones((2, 6, 5, 11)), ValueError, r"dy must be \(B, T, N, H\) = \(2, 5, 6, 11\) as the output is, got"),
        (X.astype("f4"), TypeError, "dy must have dtype float64 as the output has, got float32"),
    ],
)
def test_a_wrong_cotangent_is_refused(dy, error, message):
    _, cache = dot_product_attention(X, Y, Y)
    with pytest.raises(error, match=message):
        dot_product_attention_vjp(cache, dy)
