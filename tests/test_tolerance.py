"""The bounds hold for what is right (funcmha, PyTorch, mpmath), and not for what is nearly right."""

import re
import types
from pathlib import Path

import ml_dtypes
import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from planting import ROOT, table

from funcmha import attention_weights, linear, linear_vjp, log_sum_exp, mha, mha_vjp, norms, ops, rotary, tree
from funcmha._arguments import values_of
from funcmha.biases import RelativeBias
from funcmha.dropout import masked
from funcmha.engines import SEQUENTIAL
from funcmha.testing.profiles import Profile
from funcmha.testing.rounding import Arithmetic, exact
from funcmha.testing.rounding_position import position, position_vjp, rotate
from funcmha.testing.strategies import (
    MODERN,
    MODERN_MHA,
    AttentionProblem,
    MhaProblem,
    attention_problems,
    mha_problems,
)
from funcmha.testing.tolerance import (
    AttentionBounds,
    MhaBounds,
    assert_within,
    attention_bounds,
    linear_bounds,
    mha_bounds,
    unit_roundoff,
    worst_ratio,
)

# ---------------------------------------------------------------------------------------------------------------- runs


def double(x):
    """In float64, as it is."""
    return tree.map(_double, x)


def _double(a):
    if isinstance(a, RelativeBias):
        return a.map(_double)
    return a.astype(np.float64) if isinstance(a, np.ndarray) and a.dtype != bool else a


def arguments(problem, dtype="float32"):
    """Inputs with the cotangent of the output, the static arguments and the sink, the other cotangents."""
    do, dweights, dlse = problem.cotangents(dtype)
    inputs, static = problem.inputs(dtype), problem.static()
    if not isinstance(problem, MhaProblem):
        *inputs, static["sink"] = inputs
    return (*inputs, do), static, {"dweights": dweights, "dlse": dlse}


def run_attention(inputs, static, cotangents, ops=ops):
    *x, do = inputs
    sink = {"sink": None, **static}["sink"]
    static = {name: a for name, a in static.items() if name != "sink"}
    with np.errstate(under="ignore"):
        o, cache = ops.attention(*x, None if sink is None else sink.astype(do.dtype), **static)
        return AttentionBounds(o, cache.p, cache.lse, *ops.attention_vjp(cache, do, **cotangents))


def run_mha(inputs, static, cotangents):
    *x, dy = inputs
    with np.errstate(under="ignore"):
        y, cache = mha(*x, **static, engine=SEQUENTIAL)
        return MhaBounds(y, attention_weights(cache), log_sum_exp(cache), *mha_vjp(cache, dy, **cotangents))


def results(run, bounds, problem, dtype="float32"):
    """name → got in `dtype`, want in float64 from the same inputs, bound"""
    inputs, static, cotangents = arguments(problem, dtype)
    got = run(inputs, static, cotangents)
    want = run(tuple(double(a) for a in inputs), static, double(cotangents))
    bound = bounds(*inputs, **static, **cotangents, dtype=dtype)
    leaves = [tree.flatten(r._asdict()) for r in (got, want, bound)]
    found = {name: tuple(leaf[name] for leaf in leaves) for name in leaves[0] if leaves[0][name] is not None}
    return {name: tuple(map(values_of, three)) for name, three in found.items()}


def attention_results(problem, dtype="float32"):
    return results(run_attention, attention_bounds, problem, dtype)


def mha_results(problem, dtype="float32"):
    return results(run_mha, mha_bounds, problem, dtype)


# ---------------------------------------------------------------------------------------------- what is right is within

ATTENTION = [
    AttentionProblem(),
    AttentionProblem(batch=(), T=64, S=513, K=1, G=2, D=128, E=3, mask="causal", bias="S"),
    AttentionProblem(T=65, S=100, D=64, E=64, mask="dense", rate=0.3, family="offset values", bias="... H T S"),
    AttentionProblem(T=13, S=65, D=1, E=1, mask="heads", bias="... H T 1", gain=30.0),
    AttentionProblem(T=64, S=64, mask="empty rows", bias="T S", gain=1e4, rate=0.3),
    AttentionProblem(T=65, S=17, D=64, gain=1e-8, bias="... 1 1 S", scale=-0.5, mask="padding"),
    AttentionProblem(T=5, S=1, family="tiny"),
    AttentionProblem(T=65, S=100, D=64, mask="causal", sink=True, softcap=30.0, bias="T+S-1", gain=10.0),
    AttentionProblem(
        T=64, S=65, mask="empty rows", sink=True, softcap=0.5, per_head=True, scale=0.3, rate=0.3, seeded=True
    ),
    AttentionProblem(T=33, S=17, sink=True, family="offset values", bias="... H T+S-1", gain=1e4, softcap=30.0, seed=3),
    AttentionProblem(
        T=64, S=64, sink=True, softcap=0.5, family="equal keys", layout="repeated", bias="1 T+S-1", seed=1
    ),
    AttentionProblem(batch=(), T=1, S=65, D=64, sink=True, family="offset values"),
]
MHA = [
    MhaProblem(),
    MhaProblem(T=64, S=65, D=64, E=32, Cq=128, Ck=65, Cv=100, O=64, mask="causal", rate=0.3, bias="... H T S"),
    MhaProblem(T=65, S=2, D=1, E=1, Cq=1, Ck=1, Cv=1, O=1, bias_kv=True, zero_attn=True, bias="S", gain=1e4),
    MhaProblem(T=64, S=64, gain=1e-3, family="offset values", mask="lengths", bias_kv=True, bias="... H 1 S"),
    MhaProblem(T=64, S=64, gain=10.0, family="equal keys", biases=False, mask="dense", zero_attn=True),
    MhaProblem(T=64, S=64, family="ties", layout="repeated", mask="intersection"),
    MhaProblem(
        (),
        65,
        7,
        1,
        1,
        1,
        13,
        bias="1 T S",
        rate=0.3,
        gain=1e4,
        family="ties",
        layout="repeated",
        seed=1,
        Cq=2,
        Ck=3,
        Cv=5,
        O=2,
    ),
    MhaProblem(
        (3,),
        1,
        65,
        3,
        3,
        2,
        8,
        "empty rows",
        "1 S",
        scale=-0.5,
        gain=10.0,
        family="equal keys",
        layout="repeated",
        seed=3,
        Cq=1,
        Ck=3,
        Cv=1,
        O=2,
        bias_kv=True,
        zero_attn=True,
    ),
    MhaProblem(
        T=64, S=65, D=64, mask="causal", qk_norm="rms", rotary="half of all", sink=True, softcap=30.0, bias="T+S-1"
    ),
    MhaProblem(
        T=33, S=64, D=11, qk_norm="layer", rotary="interleaved of some", bias_kv=True, rate=0.3, seeded=True, gain=1e4
    ),
    MhaProblem(
        T=65, S=17, D=2, qk_norm="l2", scale=10.0, per_head=True, softcap=0.5, zero_attn=True, sink=True, gain=1e-3
    ),
    MhaProblem(
        T=64, S=64, D=64, qk_norm="layer", family="equal keys", layout="repeated", biases=False, sink=True, seed=2
    ),
]


@pytest.mark.parametrize("problem", ATTENTION, ids=range(len(ATTENTION)))
def test_attention_in_float32_is_within(problem):
    for name, (got, want, bound) in attention_results(problem).items():
        assert_within(got, want, bound, name=name)


@pytest.mark.parametrize("problem", MHA, ids=range(len(MHA)))
def test_mha_in_float32_is_within(problem):
    for name, (got, want, bound) in mha_results(problem).items():
        assert_within(got, want, bound, name=name)


# Fixed problems are held to the bound itself. Of 24,000 drawn ones the worst was at 1.02 times it; of 2,400 with caps,
# sinks, norms and rotary positions at 1.04 times, one in which 65 queries are equal.


@settings(max_examples=100)
@given(attention_problems(**MODERN))
def test_any_attention_in_float32_is_within(problem):
    for name, (got, want, bound) in attention_results(problem).items():
        assert_within(got, want, bound, factor=2, name=name)


@settings(max_examples=100)
@given(mha_problems(**MODERN, **MODERN_MHA))
def test_any_mha_in_float32_is_within(problem):
    for name, (got, want, bound) in mha_results(problem).items():
        assert_within(got, want, bound, factor=2, name=name)


@pytest.mark.parametrize(("H", "T", "gain", "seed"), [(2, 64, 1.0, 0), (2, 512, 0.1, 2), (4, 512, 0.003, 6)])
def test_a_constant_cotangent_is_within(H, T, gain, seed):
    # dy = 1 is the gradient of a sum. Rows that are equal, or nearly, are rounded alike: nothing averages out.
    rng = np.random.default_rng(seed)
    sizes = {"q_proj": (H, 8, 16), "k_proj": (2, 8, 16), "v_proj": (2, 8, 16)}
    params = {name: {"w": rng.standard_normal(s) / 4, "b": rng.standard_normal(s[:2])} for name, s in sizes.items()}
    params["out_proj"] = {"w": rng.standard_normal((16, H, 8)) / 4, "b": rng.standard_normal(16)}
    x = (gain * rng.standard_normal((1, T, 16))).astype(np.float32)
    inputs = tree.map(np.float32, params), x, x, x, None, np.ones((1, T, 16), np.float32)
    check(run_mha, mha_bounds, inputs, {})


def test_uniform_weights_under_a_constant_cotangent_are_within():
    # All scores are 0 to 1e-8, each weight is off from 1/17 by the same, and dv is the sum of 129 of them.
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s) for s in [(129, 8), (17, 8), (17, 3)])
    inputs = *(a.astype(np.float32) for a in (1e-8 * q, k, v)), None, np.ones((129, 3), np.float32)
    check(run_attention, attention_bounds, inputs, {})


def test_an_error_of_a_query_is_one_for_all_its_keys():
    # The largest of the weights is off by what all others are off by together. q is a long sum, k is exact.
    rng = np.random.default_rng(5)
    T, S, C = 512, 513, 256
    one = np.ones((1, 1, 1), np.float32)
    params = {"q_proj": {"w": rng.random((1, 1, C), np.float32)}}
    params |= {name: {"w": one} for name in ("k_proj", "v_proj", "out_proj")}
    key = np.full((S, 1), -6.0 / 64, np.float32)
    key[7] = 0
    inputs = params, rng.random((T, C), np.float32), key, rng.standard_normal((S, 1)).astype(np.float32), None
    inputs = *inputs, np.ones((T, 1), np.float32)
    check(run_mha, mha_bounds, inputs, {"scale": 1.0})


def test_a_heavy_key_of_value_0_is_within():
    # An attention sink: where its weight is off, those of all other keys are, in the same direction.
    rng = np.random.default_rng(5)
    T, S, D = 64, 1025, 64
    q = (2 * rng.random((T, D))).astype(np.float32)
    k = np.repeat(2 * rng.random((2, D)), [1, S - 1], axis=0).astype(np.float32)
    v = np.ones((S, 3), np.float32)
    v[0] = 0
    z = double(q) @ double(k).T
    bias = np.zeros((T, S), np.float32)
    bias[:, 0] = z[:, 1] - z[:, 0] + np.log(S - 1)  # half of the weight each
    check(run_attention, attention_bounds, (q, k, v, bias, np.ones((T, 3), np.float32)), {"scale": 1.0})


def check(run, bounds, inputs, static):
    got, want = (tree.flatten(run(a, static, {})._asdict()) for a in (inputs, tuple(double(a) for a in inputs)))
    bound = tree.flatten(bounds(*inputs, **static, dtype="float32")._asdict())
    for name in got:
        if got[name] is not None:
            assert_within(got[name], want[name], bound[name], name=name)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_within(dtype, bias):
    rng = np.random.default_rng(7)
    x, w, b, dy = (rng.standard_normal(s).astype(dtype) for s in [(3, 5, 101), (7, 101), (7,), (3, 5, 7)])
    b = b if bias else None
    bounds = linear_bounds(x, w, b, dy, dtype=dtype)

    def run(x, w, b, dy):
        y, cache = linear(x, w, b)
        return y, *linear_vjp(cache, dy)

    for name, got, want, bound in zip(
        bounds._fields, run(x, w, b, dy), run(*double(dict(enumerate((x, w, b, dy)))).values()), bounds, strict=True
    ):
        if got is not None:
            assert_within(got, want, bound, name=name)
            assert worst_ratio(got, want, bound) > 0.03


@pytest.mark.parametrize(
    "norm", [norms.RMSNorm(), norms.L2Norm(), norms.LayerNorm(), norms.RMSNorm(0.0, offset=1.0)], ids=str
)
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (1e-20, 0.0), (1.0, 300.0)])
def test_a_norm_is_within(norm, size, offset):
    """Of rows far from 0, `layer_norm` is exact in what they differ by, and the others in what they share."""
    rng = np.random.default_rng(3)
    x, w, b, dy = (rng.standard_normal(s, dtype="f4") for s in [(2, 33, 3, 64), 64, 64, (2, 33, 3, 64)])
    x = np.float32(size) * x + np.float32(offset)
    params = {leaf: {"w": w, "b": b}[leaf] for leaf in norm.leaves}
    fl, p = Arithmetic.of("float32"), tree.map(exact, params)
    y, cache = position(fl, exact(x), p, norm, None)
    dx, dparams = position_vjp(fl, cache, p, norm, None, exact(dy))

    def run(x, params, dy):
        y, cache = norm.apply(x, params)
        dx, dparams = norm.apply_vjp(cache, dy)
        return {"y": y, "dx": dx} | dparams

    bounds = {"y": y, "dx": dx} | dparams
    got, want = run(x, params, dy), run(double(x), double(params), double(dy))
    for name, bound in bounds.items():
        np.testing.assert_allclose(bound.value, want[name], rtol=1e-9, atol=1e-12 * np.abs(want[name]).max())
        assert_within(got[name], want[name], bound.error, name=name)
    if size == 1.0:
        assert worst_ratio(got["y"], want["y"], y.error) > 0.1
        assert worst_ratio(got["dx"], want["dx"], dx.error) > (0.1 if offset == 0 else 0.001)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rotation_is_within(pairs):
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 2, 3, 33, 64), dtype="f4")
    table = rotary.table(np.arange(33), rotary.frequencies(48), pairs=pairs)
    fl = Arithmetic.of("float32")

    def run(x, dy):
        y, cache = rotary.rotate(x, rotary=table)
        return y, *rotary.rotate_vjp(cache, dy)

    bounds = rotate(fl, exact(x), table, 1), rotate(fl, exact(dy), table, -1)
    for got, want, bound in zip(run(x, dy), run(double(x), double(dy)), bounds, strict=True):
        np.testing.assert_allclose(bound.value, want, rtol=1e-12, atol=1e-12)
        assert_within(got, want, bound.error)
        assert worst_ratio(got, want, bound.error) > 0.2
        assert not bound.error[..., 48:].any()


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_half_types_are_within_a_unit_in_the_last_place(dtype):
    # bfloat16 has no exponent bits to spare over float32's, float16 has: 1e-6 is subnormal there
    for gain in (1.0, 1e-6):
        found = attention_results(AttentionProblem(T=17, S=65, mask="dense", bias="S", rate=0.3, gain=gain), dtype)
        found |= mha_results(MhaProblem(T=17, S=65, mask="dense", bias_kv=True), dtype)
        newer = {"qk_norm": "rms", "rotary": "half of some", "sink": True, "softcap": 5.0}
        found |= {f"newer {name}": r for name, r in mha_results(MhaProblem(T=17, S=65, **newer), dtype).items()}
        for name, (got, want, bound) in found.items():
            assert_within(got, want, bound, name=name)
            if name in ("o", "y", "dv", "dvalue"):  # rounding to nearest: half a unit
                assert 0.4 < worst_ratio(got, want, bound) < 0.6


def test_weights_that_are_recomputed_from_lse_are_within():
    # PyTorch's fused kernel does so for the gradient, and loses |lse| u: lse is in the hundreds here.
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 1, n, 32)).astype(np.float32) for n in (64, 65, 65))
    inputs = 8 * q, 8 * k, v, None, np.ones_like(q)
    tensors = [torch.tensor(a, requires_grad=True) for a in inputs[:3]]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        o = torch.nn.functional.scaled_dot_product_attention(*tensors)
    o.backward(torch.ones_like(o))
    want = run_attention(tuple(double(a) for a in inputs), {}, {})
    bounds = attention_bounds(*inputs, arithmetic="flash", dtype="float32")
    for name, got in zip(("o", "dq", "dk", "dv"), (o, *(t.grad for t in tensors)), strict=True):
        assert_within(got, getattr(want, name), getattr(bounds, name), name=name)
    kept = attention_bounds(*inputs, dtype="float32")
    recomputed = attention_bounds(*inputs, arithmetic=Profile(recomputed=True, centred=False), dtype="float32")
    assert np.array_equal(kept.o, recomputed.o)
    assert worst_ratio(tensors[2].grad, want.dv, kept.dv) > 2


def test_a_constant_value_is_within_in_torch():
    # The gradient of the scores is 0, but for the error of Σ p dp, which is one for all keys; k is far from 0.
    rng = np.random.default_rng(1)
    q, k = (a.astype(np.float32) for a in (rng.standard_normal((64, 8)), 5 + rng.standard_normal((2049, 8))))
    v, do = np.full((2049, 1), 3.3, np.float32), np.ones((64, 1), np.float32)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    weights = torch.softmax(tensors[0] @ tensors[1].T * 8**-0.5, dim=-1)
    (weights @ tensors[2]).backward(torch.tensor(do))
    want = run_attention(tuple(double(a) for a in (q, k, v, None, do)), {}, {})
    bounds = attention_bounds(q, k, v, None, do, dtype="float32")
    for name, tensor in zip(("dq", "dk", "dv"), tensors, strict=True):
        assert_within(tensor.grad, getattr(want, name), getattr(bounds, name), name=name)


@pytest.mark.parametrize("seed", range(3))
def test_torch_attention_in_float32_is_within(seed):
    problem = AttentionProblem(T=33, S=101, G=1, D=64, E=31, bias="... H T S", seed=seed)
    (q, k, v, bias, do), _, _ = arguments(problem)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v, bias)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = torch.nn.functional.scaled_dot_product_attention(*tensors[:3], attn_mask=tensors[3])
    o.backward(torch.tensor(do))
    want = run_attention(tuple(double(a) for a in (q, k, v, bias, do)), {}, {})
    bounds = attention_bounds(q, k, v, bias, do, dtype=torch.float32)
    for name, got in zip(("o", "dq", "dk", "dv", "dbias"), (o, *(t.grad for t in tensors)), strict=True):
        assert_within(got, getattr(want, name), getattr(bounds, name), name=name)


# ------------------------------------------------------------------------------------------- float64 (T0)


def mp_attention(q, k, v, bias, sink, do, dweights, dlse, allowed, keep, rate, scale, softcap):
    """One head with mpmath: o, p, lse, dq, dk, dv, dz, dsink, from the formulas with all sums written out."""
    (T, D), (S, E) = q.shape, v.shape
    q, k, v, bias, do, dweights, dlse = (
        [[mp.mpf(float(a)) for a in row] for row in np.atleast_2d(x)] for x in (q, k, v, bias, do, dweights, dlse)
    )
    a = [[mp.mpf(1) / (1 - mp.mpf(rate)) if keep[i, j] else mp.mpf(0) for j in range(S)] for i in range(T)]
    o, p, lse, dq, dk, dv, dz = (
        np.full(s, mp.mpf(0), object) for s in [(T, E), (T, S), (T,), (T, D), (S, D), (S, E), (T, S)]
    )
    e_sink, dsink = (mp.mpf(0) if sink is None else mp.exp(mp.mpf(float(sink)))), mp.mpf(0)
    for i in range(T):
        keys = [j for j in range(S) if allowed[i, j]]
        u = {j: scale * mp.fdot(q[i], k[j]) for j in keys}
        t = {j: mp.tanh(u[j] / softcap) if softcap else mp.mpf(0) for j in keys}
        e = {j: mp.exp((softcap * t[j] if softcap else u[j]) + bias[i][j]) for j in keys}
        total = mp.fsum(e.values()) + e_sink
        lse[i] = mp.log(total) if total else mp.mpf("-inf")
        for j in keys:
            p[i, j] = e[j] / total
        o[i] = [mp.fsum(p[i, j] * a[i][j] * v[j][m] for j in keys) for m in range(E)]
        dp = {j: mp.fdot(do[i], v[j]) * a[i][j] + dweights[i][j] for j in keys}
        delta = mp.fsum(p[i, j] * dp[j] for j in keys)
        dsink += e_sink / total * (dlse[0][i] - delta) if total else 0
        for j in keys:
            dz[i, j] = p[i, j] * (dp[j] - delta + dlse[0][i])
            du = dz[i, j] * (1 - t[j] ** 2)
            dv[j] += p[i, j] * a[i][j] * np.array(do[i])
            dk[j] += du * scale * np.array(q[i])
            dq[i] += du * scale * np.array(k[j])
    return o, p, lse, dq, dk, dv, dz, np.array(dsink)


@pytest.mark.parametrize("gain", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "with a cap and a sink"])
def test_float64_equals_mpmath(gain, rate, softcap):
    problem = AttentionProblem(
        batch=(), T=5, S=7, K=1, G=2, D=3, E=2, bias="T S", rate=rate, gain=gain, sink=softcap is not None
    )
    (q, k, v, bias, do), static, cotangents = arguments(problem, "float64")
    allowed = np.random.default_rng(1).random((5, 7)) < 0.7
    allowed[2], allowed[3] = False, np.arange(7) == 4
    keep = np.ones((2, 5, 7), bool) if rate == 0 else static["dropout"].keep
    dropout = masked(keep, 0.25 if rate else 0.0)
    static |= {"mask": allowed, "scale": 0.75, "softcap": softcap, "dropout": dropout}

    got = run_attention((q, k, v, bias, do), static, cotangents)
    dweights, dlse = cotangents.values()
    sink = (None, None) if static["sink"] is None else static["sink"]
    options = dropout.rate, 0.75, softcap
    with mp.workdps(50):
        heads = [
            mp_attention(q[h], k[0], v[0], bias, sink[h], do[h], dweights[h], dlse[h], allowed, keep[h], *options)
            for h in range(2)
        ]
        o, p, lse, dq, dk, dv, dz, dsink = (np.stack(x) for x in zip(*heads, strict=True))
        want = (o, p, lse, dq, dk.sum(0, keepdims=True), dv.sum(0, keepdims=True), dz.sum(0), dsink)
        want = AttentionBounds(*(x.astype(np.float64) for x in want))
    bounds = attention_bounds(q, k, v, bias, do, **static, **cotangents, dtype="float64")
    for name, bound in bounds._asdict().items():
        if bound is not None:
            assert_within(getattr(got, name), getattr(want, name), bound, name=name)


# -------------------------------------------------------------------------------------- what is nearly right is outside

FAULTS = table(ROOT / "tests/nearly_right.txt")


def with_fault(fault):
    module = types.ModuleType("funcmha.ops")
    module.__package__ = "funcmha"
    exec(compile(fault.plant(Path(ops.__file__).read_text()), "ops.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.says)
def test_a_fault_is_outside(fault):
    # in float64, so that all of the difference is the fault's: a hundred times what float32 may differ by
    problem = AttentionProblem(T=33, S=65, D=64, E=16, mask="dense", bias="... H T S", rate=0.3, sink=True, softcap=5.0)
    inputs, static, cotangents = arguments(problem)
    static["scale"] = [0.1, 0.11, 0.12, 0.13, 0.14, 0.15]
    bounds = attention_bounds(*inputs, **static, **cotangents, dtype="float32")
    inputs, cotangents = tuple(double(a) for a in inputs), double(cotangents)
    want = run_attention(inputs, static, cotangents)
    got = run_attention(inputs, static, cotangents, ops=with_fault(fault))
    assert max(map(worst_ratio, got, want, bounds)) > 5


@pytest.mark.parametrize("name", ["dsink", "dq", "dk", "dv"])
def test_a_gradient_that_is_off_by_a_thousandth_is_outside(name):
    problem = AttentionProblem(T=33, S=65, D=64, E=16, mask="causal", sink=True, softcap=5.0, bias="T+S-1")
    _, want, bound = attention_results(problem)[name]
    assert worst_ratio(want, want, bound) == 0
    assert worst_ratio(1.001 * want, want, bound) > 5


def test_the_bounds_are_not_far_off():
    found = attention_results(AttentionProblem(T=65, S=65, D=64, E=64, bias="... H T S"))
    ratios = {name: worst_ratio(*r) for name, r in found.items()}
    assert min(ratios.values()) > 0.05, ratios
    found = mha_results(MhaProblem(T=17, S=17, D=11, E=13, Cq=17, O=29, bias="... H T S"))
    ratios = {name: worst_ratio(*r) for name, r in found.items()}
    assert min(ratios.values()) > 0.005, ratios


def test_the_bounds_of_newer_layers_are_not_far_off():
    found = attention_results(AttentionProblem(T=65, S=65, D=64, E=64, bias="H T+S-1", sink=True, softcap=5.0))
    ratios = {name: worst_ratio(*r) for name, r in found.items()}
    assert min(ratios.values()) > 0.02, ratios  # of dsink there are six entries, each a sum of many errors
    for norm in ("rms", "l2", "layer"):  # the biases of keys move whole rows, and nothing but the cap feels it
        found = mha_results(
            MhaProblem(T=17, S=17, D=11, E=13, qk_norm=norm, rotary="half of all", sink=True, softcap=5.0)
        )
        ratios = {name: worst_ratio(*r) for name, r in found.items()}
        assert min(ratios.values()) > 0.003, ratios


def test_a_saturated_row_is_exact():
    # Scores of 1e6 are off by 1 in float32. One key is far above the others, and that is what the weights say.
    q, k = np.array([[1e3]], np.float32), np.array([[1e3], [0.0], [-1e3]], np.float32)
    v, do = np.array([[3.0], [5.0], [7.0]], np.float32), np.ones((1, 1), np.float32)
    bounds = attention_bounds(q, k, v, None, do, dtype="float32")
    assert bounds.o[0, 0] < 1e-5
    assert np.all(bounds.weights < 1e-6)


def test_a_weight_is_off_by_1_at_most():
    # two scores of 1e7, which are off by 1, and nearer than that
    q, k = np.array([[1e3]], np.float32), np.array([[1e4], [np.nextafter(np.float32(1e4), 0)]], np.float32)
    v, do = np.array([[3.0], [5.0]], np.float32), np.ones((1, 1), np.float32)
    weights = attention_bounds(q, k, v, None, do, dtype="float32").weights
    assert np.all((weights > 0.1) & (weights < 1.0001))


def test_what_is_masked_must_be_0():
    mask = np.array([[True, False, True], [False, False, False]])
    rng = np.random.default_rng(3)
    q, k, v, do = (rng.standard_normal(s) for s in [(2, 5), (3, 5), (3, 7), (2, 7)])
    k[1], v[1] = np.nan, np.inf
    bounds = attention_bounds(q, k, v, None, do, mask=mask, dtype="float32")
    assert np.all((bounds.weights > 0) == mask)
    for zero in (bounds.o[1], bounds.dq[1], bounds.dk[1], bounds.dv[1], bounds.lse[1]):
        assert np.all(zero == 0)
    for some in (bounds.o[0], bounds.dq[0], bounds.dk[0], bounds.dv[2], bounds.lse[0]):
        assert np.all((some > 0) & (some < 1e-4))


def test_a_bias_of_minus_infinity_is_a_mask():
    rng = np.random.default_rng(3)
    mask = rng.random((5, 7)) < 0.6
    q, k, v, do = (rng.standard_normal(s) for s in [(5, 3), (7, 3), (7, 2), (5, 2)])
    with_bias = attention_bounds(q, k, v, np.where(mask, 0.0, -np.inf), do, dtype="float32")
    with_mask = attention_bounds(q, k, v, np.zeros((5, 7)), do, mask=mask, dtype="float32")
    for got, want in zip(with_bias, with_mask, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arguments_may_come_from_any_library_in_any_dtype(dtype):
    problem = MhaProblem(
        bias="T S", mask="dense", sink=True, qk_norm="layer", rotary="half of all", softcap=5.0, per_head=True
    )
    inputs, static, cotangents = arguments(problem, dtype)
    want = mha_bounds(*inputs, **static, **cotangents, dtype="float32")
    params, *rest = inputs
    tensors = [tree.map(torch.tensor, params), *(torch.tensor(a) for a in rest)]
    cotangents = {name: torch.tensor(a) for name, a in cotangents.items()}
    static["mask"] = torch.tensor(static["mask"])
    static["rotary"] = tuple(type(table)(*map(torch.tensor, table)) for table in static["rotary"])
    got = mha_bounds(*tensors, **static, **cotangents, dtype=torch.float32)
    for name, leaf in tree.flatten(got._asdict()).items():
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.float64
        np.testing.assert_array_equal(leaf, tree.flatten(want._asdict())[name])


# ------------------------------------------------------------------------------------------------------- the comparison

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("got", "want", "bound", "ratio"),
    [
        ([1.0, 2.5], [1.0, 2.0], [0.1, 0.25], 2.0),
        ([0.0], [0.0], [0.0], 0.0),
        ([1e-30], [0.0], [0.0], INF),
        ([NAN], [1.0], [1.0], INF),
        ([1.0], [NAN], [1.0], INF),
        ([NAN], [NAN], [1.0], INF),
        ([1.0], [2.0], [NAN], INF),
        ([1.0], [2.0], [INF], INF),
        ([INF], [1.0], [1.0], INF),
        ([-INF], [-INF], [0.0], 0.0),
        ([-1e30], [-INF], [1.0], INF),
        ([-INF], [INF], [1.0], INF),
        ([], [], [], 0.0),
        (3.0, 1.0, 4.0, 0.5),
    ],
)
def test_worst_ratio(got, want, bound, ratio):
    got, want, bound = (np.array(a) for a in (got, want, bound))
    assert worst_ratio(got, want, bound) == ratio
    if ratio <= 2:
        assert_within(got, want, bound, factor=2)
    else:
        with pytest.raises(AssertionError):
            assert_within(got, want, bound, factor=1e300)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=re.escape("must have one shape, got (2,), (1, 2) and (2,)")):
        worst_ratio(np.zeros(2), np.zeros((1, 2)), np.zeros(2))


def test_the_message_shows_the_worst_entry():
    got = np.array([[1.0, 2.0], [3.5, 4.0]], np.float32)
    want = np.array([[1.0, 1.9], [3.0, 4.0]])
    message = "dq[1, 0] must be 3 within 2 × 0.1, got 3.5, off by 5 × the bound; 1 of 4 entries of float32 fail"
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_within(got, want, np.full((2, 2), 0.1), factor=2, name="dq")
    with pytest.raises(AssertionError, match=re.escape("2 of 4 entries")):
        assert_within(got, want, np.full((2, 2), 0.01))


@pytest.mark.parametrize(
    ("dtype", "u"),
    [
        ("float16", 2.0**-11),
        (np.float16, 2.0**-11),
        (np.dtype(ml_dtypes.bfloat16), 2.0**-8),
        (ml_dtypes.bfloat16, 2.0**-8),
        (torch.bfloat16, 2.0**-8),
        (np.dtype("float32"), 2.0**-24),
        (torch.float64, 2.0**-53),
        ("complex128", 2.0**-53),
    ],
    ids=range(8),
)
def test_unit_roundoff(dtype, u):
    assert unit_roundoff(dtype) == u


@pytest.mark.parametrize("dtype", ["int8", float, np.int64, None])
def test_unit_roundoff_refuses(dtype):
    with pytest.raises(TypeError, match="dtype must be one of float16"):
        unit_roundoff(dtype)
