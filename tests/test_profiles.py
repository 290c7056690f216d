"""What a kernel rounds on its way: with it declared a right kernel is within the bounds, and without it is not."""

import ml_dtypes
import numpy as np
import pytest
import torch
from planting import ROOT, table
from test_tolerance import arguments, double, run_attention, with_fault
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcmha import init, ops
from funcmha.testing.profiles import FLASH, STORED, STRICT, Profile
from funcmha.testing.strategies import AttentionProblem
from funcmha.testing.tolerance import attention_bounds, mha_bounds, worst_ratio

HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCALE = 0.3
PLAIN = Profile(recomputed=True, centred=False)  # stores nothing on its way


def normal(dtype, *, T=65, S=33, D=16, gain=1.0, offset=0.0, seed=0, batch=(2, 3)):
    """q, k, v, do in numbers that the dtype has, as float64"""
    rng = np.random.default_rng(seed)
    q, k, v, do = (rng.standard_normal((*batch, n, D)) for n in (T, S, S, T))
    return tuple(a.astype(dtype).astype(np.float64) for a in (gain * q, k, v + offset, do))


def exact(q, k, v, do, **options):
    o, cache = ops.attention(q, k, v, **options)
    return o, *ops.attention_vjp(cache, do)[:3]


def product(x, y, rounded):
    """x y, each term added to an accumulator that is rounded"""
    total = np.zeros((*x.shape[:-1], y.shape[-1]))
    for i in range(x.shape[-1]):
        total = rounded(total + x[..., i : i + 1] * y[..., i : i + 1, :])
    return total


def kernel(q, k, v, do, profile, dtype):
    """o, dq, dk, dv in float64, but for what the profile stores, and the results; key heads repeat for query heads"""

    def rounded(name, a):
        return a.astype(dtype).astype(np.float64) if name in profile.stored else a

    def times(x, y):
        return product(x, y, lambda a: rounded("sums", a)) if "sums" in profile.stored else x @ y

    def running(name, x, y):
        total, tile = 0.0, profile.tile or x.shape[-1]
        for at in range(0, x.shape[-1], tile):
            total = rounded(name, total + times(x[..., at : at + tile], y[..., at : at + tile, :]))
        return total.reshape(*k.shape[:-3], k.shape[-3], -1, *total.shape[-2:]).sum(-3)

    group = q.shape[-3] // k.shape[-3]
    kh, vh = np.repeat(k, group, -3), np.repeat(v, group, -3)
    z = SCALE * times(q, kh.mT)
    lse = rounded("lse", np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) + z.max(-1, keepdims=True))
    kept = np.exp(z - lse) / np.exp(z - lse).sum(-1, keepdims=True)
    o = times(rounded("p", kept), vh)
    p = np.exp(z - lse) if profile.recomputed else kept
    dp = times(do, vh.mT)
    delta = (do * rounded("o", o)).sum(-1, keepdims=True) if "o" in profile.stored else (p * dp).sum(-1, keepdims=True)
    ds = rounded("ds", p * (dp - delta))
    results = o, SCALE * times(ds, kh), running("dk", ds.mT, SCALE * q), running("dv", rounded("p", p).mT, do)
    return tuple(a.astype(dtype).astype(np.float64) for a in results)


def ratios(got, inputs, dtype, arithmetic, **options):
    want = exact(*inputs, **options)
    bounds = attention_bounds(*inputs[:3], None, inputs[3], dtype=dtype, arithmetic=arithmetic, **options)
    return [worst_ratio(g, w, getattr(bounds, n)) for n, g, w in zip(("o", "dq", "dk", "dv"), got, want, strict=True)]


# Of what each name says, the least profile that can be told from rounding once: dk and dv in parts of a group.
PROFILES = {name: Profile((name,), True, False, tile=8 if name in ("dk", "dv") else None) for name in STORED}
PROFILES |= {"flash": FLASH, "all of it": Profile(tuple(STORED), True, False, tile=16)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PROFILES)
def test_what_is_declared_is_within_and_no_more(name, dtype):
    """In float64 but for the roundings of the profile, so that these are all that is seen."""
    profile, found = PROFILES[name], []
    for gain, offset in ((1.0, 0.0), (4.0, 0.0), (1.0, 100.0)):
        q, k, v, do = normal(HALF[dtype], gain=gain, offset=offset)
        inputs = q, k[:, :1], v[:, :1], do
        got = kernel(*inputs, profile, HALF[dtype])
        assert max(ratios(got, inputs, dtype, profile, scale=SCALE)) <= 1
        found += ratios(got, inputs, dtype, PLAIN, scale=SCALE)
    assert max(found) > 2


def test_what_underflows_is_within():
    """Weights, gradients of scores and results below float16's least number come out as 0."""
    inputs = normal(np.float16, gain=8.0)
    inputs = *inputs[:3], (2.0**-20 * inputs[3]).astype(np.float16).astype(np.float64)
    got = kernel(*inputs, FLASH, np.float16)
    assert max(ratios(got, inputs, "float16", FLASH, scale=SCALE)) <= 1
    assert (got[1] == 0).any()
    least = attention_bounds(*inputs[:3], None, inputs[3], dtype="bfloat16", arithmetic=FLASH, scale=SCALE)
    assert worst_ratio(got[2], exact(*inputs, scale=SCALE)[2], least.dk) > 8  # no bound of bfloat16 allows it


@pytest.mark.parametrize("dtype", HALF)
def test_fused_torch_in_half_is_within_twice(dtype):
    """Sizes, gains and offsets as of tests/test_tolerance.py; dv has one rounding more, after each tile of queries."""
    worst = {"flash": [], "tiles": [], "strict": []}
    tiles = FLASH._replace(stored=(*FLASH.stored, "dk", "dv"), tile=32)
    sizes = (129, 97, 16, 1.0, 0.0), (65, 257, 32, 4.0, 100.0), (300, 65, 64, 0.01, 0.0)
    for seed, (T, S, D, gain, offset) in enumerate(sizes):
        inputs = normal(HALF[dtype], T=T, S=S, D=D, gain=gain, offset=offset, seed=seed, batch=(1, 2))
        q, k, v = (torch.tensor(a).to(getattr(torch, dtype)).requires_grad_() for a in inputs[:3])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            o.backward(torch.tensor(inputs[3]).to(o.dtype))
        got = [a.detach().double().numpy() for a in (o, q.grad, k.grad, v.grad)]
        for name, arithmetic in (("flash", FLASH), ("tiles", tiles), ("strict", "strict")):
            worst[name] += ratios(got, inputs, dtype, arithmetic)
    assert max(worst["flash"]) <= 2
    assert max(worst["tiles"]) <= 1
    assert max(worst["strict"]) > 50


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_torch_in_float32_is_within(backend):
    for seed, gain in enumerate((0.01, 1.0, 10.0)):
        inputs = normal(np.float32, T=97, S=129, D=32, gain=gain, offset=100.0 * (seed % 2), seed=seed, batch=(1, 2))
        q, k, v = (torch.tensor(a, dtype=torch.float32).requires_grad_() for a in inputs[:3])
        with sdpa_kernel(backend):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            o.backward(torch.tensor(inputs[3], dtype=torch.float32))
        got = [a.detach().double().numpy() for a in (o, q.grad, k.grad, v.grad)]
        assert max(ratios(got, inputs, "float32", "flash")) <= 1


# ── what is wrong is outside ─────────────────────────────────────────────────────────────────────────────────────

BELOW = {"scale off by 1e-4 in dq", "a sink's gradient off by 1e-3", "weights in half precision"}  # half's own rounding
FAULTS = [fault for fault in table(ROOT / "tests/nearly_right.txt") if fault.says not in BELOW]
PROBLEM = AttentionProblem(T=33, S=65, D=64, E=16, mask="dense", bias="... H T S", rate=0.3, sink=True, softcap=5.0)


@pytest.fixture(scope="module", params=HALF)
def half(request):
    """The inputs, what is right, and the bounds of a flash-style kernel in a half type"""
    inputs, static, cotangents = arguments(PROBLEM)
    static["scale"] = [0.1, 0.11, 0.12, 0.13, 0.14, 0.15]
    bounds = attention_bounds(*inputs, **static, **cotangents, dtype=request.param, arithmetic="flash")
    inputs, cotangents = tuple(double(a) for a in inputs), double(cotangents)
    return inputs, static, cotangents, run_attention(inputs, static, cotangents), bounds


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.says)
def test_a_fault_is_outside_in_half_precision(fault, half):
    inputs, static, cotangents, want, bounds = half
    got = run_attention(inputs, static, cotangents, ops=with_fault(fault))
    assert max(map(worst_ratio, got, want, bounds)) > 8


# ── what a profile may say ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arithmetic", "error", "message"),
    [
        ("fast", TypeError, "arithmetic must be one of 'strict', 'flash', or a Profile .*, got 'fast'"),
        (None, TypeError, "got None"),
        (Profile(("q",)), ValueError, "stored must be a tuple out of 'p', .*, got .'q',."),
        (Profile("p"), ValueError, "stored must be a tuple"),
        (Profile(("dv",), tile=0), ValueError, "tile must be a number of queries, at least 1, or None, got 0"),
        (Profile(("dv",), tile=True), ValueError, "tile must be"),
    ],
)
def test_a_profile_that_means_nothing_is_refused(arithmetic, error, message):
    with pytest.raises(error, match=message):
        attention_bounds(*normal(np.float32)[:3], None, normal(np.float32)[3], arithmetic=arithmetic, dtype="float32")


def test_nothing_is_stored_in_half_in_float32():
    inputs = normal(np.float32)
    stored = Profile(tuple(set(STORED) - {"o"}), tile=16)
    for ours, theirs in zip(
        *(attention_bounds(*inputs[:3], None, inputs[3], arithmetic=a, dtype="float32") for a in (stored, STRICT)),
        strict=True,
    ):
        assert np.array_equal(ours, theirs) if ours is not None else theirs is None


def test_mha_takes_a_profile():
    x, params = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float16), init(0, 8, 2, dtype=np.float16)
    strict, flash = (mha_bounds(params, x, x, x, None, x, dtype="float16", arithmetic=a) for a in ("strict", "flash"))
    assert (flash.dquery > strict.dquery).all()
