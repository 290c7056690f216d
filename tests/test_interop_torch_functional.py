"""PyTorch's two calls, side by side with PyTorch itself in float64: outputs and every gradient, over all options."""

import ast
import importlib
import inspect
import warnings
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcmha import attention_weights, log_sum_exp
from funcmha.dropout import seeded
from funcmha.interop.torch import (
    multi_head_attention_forward,
    multi_head_attention_forward_vjp,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from funcmha.interop.torch.multi_head import Inputs
from funcmha.testing import check_vjp

F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("each_engine")


def read_only(a):
    if a is not None:
        a.flags.writeable = False
    return a


def strided(rng, shape):
    """Normal numbers whose last two axes lie in memory the other way round, read-only."""
    return read_only(rng.standard_normal((*shape[:-2], *shape[:-3:-1])).swapaxes(-1, -2))


def leaf(a):
    """A tensor of an array, that wants a gradient if it is floating."""
    return None if a is None else torch.tensor(np.array(a, order="C")).requires_grad_(a.dtype != bool)


def close(got, want, tolerance=1e-11):
    if want is None:
        assert got is None
        return
    want = want.detach().numpy()
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1, np.abs(want).max(initial=0))


def gradients(outputs, cotangents, leaves):
    """By autograd; None for what is absent or boolean, 0 for what was not used."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    pairs = [(y, torch.tensor(np.array(g))) for y, g in zip(outputs, cotangents, strict=True) if g is not None]
    total = sum(((y * g).sum() for y, g in pairs), start=torch.zeros((), dtype=torch.float64))
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted))
    grads = [None if x is None or not x.requires_grad else (x, next(found)) for x in leaves]
    return [None if g is None else (torch.zeros_like(g[0]) if g[1] is None else g[1]) for g in grads]


@pytest.mark.parametrize("f", [scaled_dot_product_attention, multi_head_attention_forward])
def test_signatures_say_what_is_differentiable(f):
    module = importlib.import_module(f.__module__)
    names = [node.name for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]
    assert names[names.index(f.__name__) + 1] == f"{f.__name__}_vjp"
    kinds = {p.kind for p in inspect.signature(f).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY}


# ── scaled_dot_product_attention ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sdpa:
    """Arguments of `scaled_dot_product_attention`. `query`, `key` and `value` are the axes before L and S."""

    query: tuple[int, ...] = (2, 3)
    key: tuple[int, ...] = (2, 3)
    value: tuple[int, ...] = (2, 3)
    L: int = 5
    S: int = 7
    D: int = 4
    Dv: int = 6
    attn: str | None = None
    mask: tuple[int, ...] | None = None  # the shape of attn_mask
    causal: bool = False
    scale: float | None = None
    gqa: bool = False
    dropout: float | None = None
    seed: int = 0

    def inputs(self):
        rng = np.random.default_rng(self.seed)
        q = strided(rng, (*self.query, self.L, self.D))
        k = strided(rng, (*self.key, self.S, self.D))
        v = strided(rng, (*self.value, self.S, self.Dv))
        if self.attn is None:
            return q, k, v, None
        allowed = rng.random(self.mask) > 0.4  # and now and then an empty row
        return (
            q,
            k,
            v,
            read_only(allowed if self.attn == "bool" else np.where(allowed, rng.normal(size=self.mask), -np.inf)),
        )

    def static(self):
        static = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": self.gqa}
        if self.dropout is None:
            return static
        free = 2 + self.gqa
        batch = np.broadcast_shapes(*(x[: len(x) + 2 - free] for x in (self.query, self.key, self.value)))
        heads = self.query[-1:] if self.gqa else ()
        keep = np.random.default_rng(self.seed + 1).random((*batch, *heads, self.L, self.S)) >= self.dropout
        return static | {"keep": read_only(keep), "dropout_p": self.dropout}


@st.composite
def sdpa_problems(draw):
    gqa, flag = draw(st.booleans()), st.booleans()
    size = st.sampled_from([1, 2, 3, 5, 7])
    L, S = draw(size), draw(size)
    batch = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3)))
    spread = [tuple(1 if draw(st.integers(0, 4)) == 0 else n for n in batch) for _ in range(3)]
    spread = [x[draw(st.integers(0, len(x))) :] if draw(flag) else x for x in spread]
    if gqa:
        spread = [
            (*x, h) for x, h in zip(spread, [6, *draw(st.sampled_from([(1, 1), (2, 2), (3, 2), (6, 6)]))], strict=True)
        ]
    attn = draw(st.sampled_from([None, "bool", "float"]))
    batch = np.broadcast_shapes(*(x[: len(x) - gqa] for x in spread[:2]))  # of the scores: PyTorch adds in place
    scores = (*batch, *(spread[0][-1:] if gqa else ()), L, S)
    mask = tuple(1 if draw(st.integers(0, 3)) == 0 else n for n in scores)
    return Sdpa(
        *spread,
        L=L,
        S=S,
        D=draw(size),
        Dv=draw(size),
        attn=attn,
        mask=mask[draw(st.integers(0, len(mask) - 1)) :] if draw(flag) else mask,
        causal=attn is None and draw(flag),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0, 2])),
        gqa=gqa,
        dropout=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**31)),
    )


def torch_sdpa(q, k, v, attn_mask, *, is_causal, scale, enable_gqa, keep=None, dropout_p=0.0):
    """PyTorch's own, by the path that takes a dropout mask (True = keep) where there is one."""
    if keep is None:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # this one takes booleans for numbers
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    o, _ = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, torch.tensor(np.array(keep)), scale=scale, enable_gqa=enable_gqa
    )
    return o


@settings(max_examples=2 * settings().max_examples)
@given(sdpa_problems())
@example(Sdpa(attn="bool", mask=(7,)))
@example(Sdpa(S=0))  # only so: without keys PyTorch does not broadcast
@example(Sdpa(query=(), key=(), value=(), causal=True))
@example(Sdpa(query=(2, 3), key=(), value=(2, 1), attn="float", mask=(3, 1, 7)))
@example(Sdpa(query=(2, 6), key=(1, 3), value=(2, 2), gqa=True, attn="float", mask=(2, 1, 5, 1), dropout=0.3))
def test_sdpa_matches_torch(problem):
    inputs, static = problem.inputs(), problem.static()
    y, cache = scaled_dot_product_attention(*inputs, **static)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    leaves = [leaf(a) for a in inputs]
    want = torch_sdpa(*leaves, **static)
    close(y, want)
    for got, g in zip(scaled_dot_product_attention_vjp(cache, dy), gradients([want], [dy], leaves), strict=True):
        close(got, g)


def test_sdpa_keeps_the_protocol():
    """Purity, structure, a cache that serves twice, and the gradient by complex step."""
    problem = Sdpa(query=(2, 6), key=(1, 3), value=(2, 2), gqa=True, attn="float", mask=(2, 1, 5, 1), dropout=0.3)
    q, k, v, mask = problem.inputs()
    inputs = q, k, v, np.where(np.isinf(mask), 0.0, mask)
    check_vjp(scaled_dot_product_attention, scaled_dot_product_attention_vjp, inputs, problem.static())


def test_tensors_in_are_tensors_out():
    """Of both calls, by the batched engine, as of all arrays that are not NumPy's."""
    q, k, v, mask = (None if a is None else torch.tensor(np.array(a)) for a in Sdpa(attn="float", mask=(5, 7)).inputs())
    y, cache = scaled_dot_product_attention(q, k, v, mask)
    close(y.numpy(), F.scaled_dot_product_attention(q, k, v, mask))
    assert all(isinstance(g, torch.Tensor) for g in scaled_dot_product_attention_vjp(cache, y))
    problem = Mha(attn="float", padding="bool", per_head=True, static_k=True, zero=True)
    x = Inputs(*(None if a is None else torch.tensor(np.array(a)) for a in problem.inputs()))
    outputs, cache = multi_head_attention_forward(*x, **problem.static())
    for got, want in zip(outputs, torch_mha(x, **problem.static()), strict=True):
        close(got.numpy(), want)
    grads = multi_head_attention_forward_vjp(cache, outputs)
    assert [isinstance(g, torch.Tensor) for g in grads] == [a is not None and a.dtype != torch.bool for a in x]


def test_the_default_path_of_torch_gives_the_same():
    problem = Sdpa(attn="float", mask=(2, 1, 5, 7))
    inputs = problem.inputs()
    leaves = [leaf(a) for a in inputs]
    want = F.scaled_dot_product_attention(*leaves)
    y, cache = scaled_dot_product_attention(*inputs)
    close(y, want)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    for got, g in zip(scaled_dot_product_attention_vjp(cache, dy), gradients([want], [dy], leaves), strict=True):
        close(got, g)


def test_causal_is_top_left():
    q, k, v, _ = Sdpa(L=3, S=7).inputs()
    _, cache = scaled_dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_array_equal(attention_weights(cache)[0, 0] > 0, np.tri(3, 7, dtype=bool))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_an_empty_row_is_zero_with_zero_gradients(kind):
    """PyTorch agrees."""
    q, k, v, _ = Sdpa().inputs()
    allowed = np.ones((5, 7), dtype=bool)
    allowed[3] = False
    attn_mask = allowed if kind == "bool" else np.where(allowed, 0.0, -np.inf)
    y, cache = scaled_dot_product_attention(q, k, v, attn_mask)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dq, _, _, dmask = scaled_dot_product_attention_vjp(cache, dy)
    leaves = [leaf(a) for a in (q, k, v, attn_mask)]
    want = F.scaled_dot_product_attention(*leaves)
    assert not y[..., 3, :].any()
    assert not want[..., 3, :].any()
    assert not dq[..., 3, :].any()
    assert dmask is None or not dmask[3].any()
    assert np.isneginf(log_sum_exp(cache)[..., 3]).all()
    close(dq, gradients([want], [dy], leaves)[0])


def test_a_row_of_the_least_number_is_the_mean_of_the_values():
    """PyTorch 2.13: the fused path on the CPU makes dvalue S times too large, and its own plain path does not."""
    q, k, v, _ = Sdpa(Dv=4).inputs()
    attn_mask = np.full((5, 7), np.finfo(np.float64).min)
    y, cache = scaled_dot_product_attention(q, k, v, attn_mask)
    np.testing.assert_allclose(y, np.broadcast_to(v.mean(-2, keepdims=True), y.shape), rtol=1e-14)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dv = scaled_dot_product_attention_vjp(cache, dy)[2]
    leaves = [leaf(a) for a in (q, k, v)]
    mask = torch.tensor(attn_mask)
    close(dv, gradients([torch_sdpa(*leaves, mask, is_causal=False, scale=None, enable_gqa=False)], [dy], leaves)[2])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        wrong = gradients([F.scaled_dot_product_attention(*leaves, mask)], [dy], leaves)[2]
    close(7 * dv, wrong)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_take_a_mask_in_float32_as_torch_does(dtype):
    """Rounded once, at the end: bit for bit the float32 answer rounded. The mask's gradient stays float32."""
    q, k, v, mask = (a.astype(np.float32) for a in Sdpa(attn="float", mask=(3, 1, 7)).inputs())
    half = [a.astype(dtype) for a in (q, k, v)]
    y, cache = scaled_dot_product_attention(*half, mask)
    wide, wide_cache = scaled_dot_product_attention(*(a.astype(np.float32) for a in half), mask)
    grads = scaled_dot_product_attention_vjp(cache, y)
    wide_grads = scaled_dot_product_attention_vjp(wide_cache, y.astype(np.float32))
    assert [g.dtype for g in grads] == [dtype, dtype, dtype, np.float32]
    for got, want in zip((y, *grads), (wide, *wide_grads), strict=True):
        np.testing.assert_array_equal(got, want.astype(got.dtype))


def test_float64_takes_a_mask_in_float32_as_torch_does():
    q, k, v, mask = Sdpa(attn="float", mask=(3, 1, 7)).inputs()
    mask = mask.astype(np.float32)
    leaves = [leaf(a) for a in (q, k, v, mask)]
    want = torch_sdpa(*leaves, is_causal=False, scale=None, enable_gqa=False)
    y, cache = scaled_dot_product_attention(q, k, v, mask)
    close(y, want)
    dmask = scaled_dot_product_attention_vjp(cache, np.ones_like(y))[3]
    close(dmask, gradients([want], [np.ones_like(y)], leaves)[3], 1e-6)


def test_dropout_of_everything_is_zero_as_in_torch():
    q, k, v, _ = Sdpa().inputs()
    y, cache = scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert not y.any()
    assert not F.scaled_dot_product_attention(*map(leaf, (q, k, v)), dropout_p=1.0).any()
    assert not any(g.any() for g in scaled_dot_product_attention_vjp(cache, y + 1)[:3])


def test_three_axes_of_keep_are_heads_as_those_of_a_mask_are():
    """Of as many samples as heads too: PyTorch broadcasts from the right."""
    q, k, v = (np.random.default_rng(i).standard_normal((2, 2, n, 3)) for i, n in enumerate((5, 7, 7)))
    keep = np.random.default_rng(3).random((2, 5, 7)) < 0.7
    (y, _), (want, _) = (
        scaled_dot_product_attention(q, k, v, keep=some, dropout_p=0.3) for some in (keep, np.stack([keep, keep]))
    )
    np.testing.assert_array_equal(y, want)


def test_a_seed_is_its_mask():
    q, k, v, _ = Sdpa().inputs()
    keep = seeded(2024, 0.3)
    y, _ = scaled_dot_product_attention(q, k, v, keep=keep, dropout_p=0.3)
    want, _ = scaled_dot_product_attention(q, k, v, keep=keep.dense((2, 3, 5, 7)), dropout_p=0.3)
    np.testing.assert_allclose(y, want, rtol=1e-13)


def zeros(*shape, dtype=np.float64):
    return np.zeros(shape, dtype)


def sdpa_zeros(q=(5, 4), k=(7, 4), v=(7, 3), *attn_mask, dtype=np.float64):
    return [*(zeros(*shape, dtype=dtype) for shape in (q, k, v)), *attn_mask]


def masked(attn_mask):
    return sdpa_zeros((5, 4), (7, 4), (7, 3), attn_mask)


GROUPS = sdpa_zeros((6, 5, 4), (4, 7, 4), (4, 7, 4))
MIXED = [zeros(5, 4), zeros(7, 4, dtype=np.float32), zeros(7, 4)]
SINGLE = sdpa_zeros((5, 4), (7, 4), (7, 4), zeros(5, 7), dtype=np.float32)


@pytest.mark.parametrize(
    ("error", "message", "inputs", "static"),
    [
        (ValueError, "attn_mask must be None with is_c", masked(zeros(5, 7)), {"is_causal": True}),
        (ValueError, "fewer heads require enable_gqa=True", GROUPS, {}),
        (ValueError, "query has H=6 .* multiple of K=4 as in key", GROUPS, {"enable_gqa": True}),
        (ValueError, "key must be .* heads, length", sdpa_zeros((6, 5, 4)), {"enable_gqa": True}),
        (ValueError, "query must be", sdpa_zeros((4,)), {}),
        (ValueError, "key must be .* with D=4 as in query", sdpa_zeros((5, 4), (7, 3)), {}),
        (ValueError, "value must be .* with S=7 as in key", sdpa_zeros((5, 4), (7, 4), (5, 4)), {}),
        (ValueError, "query, key and value must broadcast", sdpa_zeros((2, 3, 5, 4), (4, 3, 7, 4)), {}),
        (TypeError, "key must have dtype float64", MIXED, {}),
        (TypeError, "as query has, or float32, added to", masked(zeros(5, 7, dtype=int)), {}),
        (TypeError, "attn_mask must be boolean", SINGLE, {}),
        (TypeError, "attn_mask must be an array", masked(True), {}),
        (ValueError, "attn_mask must broadcast to", masked(zeros(2, 5, 7)), {}),
        (ValueError, "keep must be given with dropout_p=0.3", sdpa_zeros(), {"dropout_p": 0.3}),
        (ValueError, "dropout_p must be given with keep", sdpa_zeros(), {"keep": zeros(5, 7, dtype=bool)}),
        (ValueError, "dropout_p must be at least 0", sdpa_zeros(), {"dropout_p": 1.5}),
        (ValueError, "scale must be finite", sdpa_zeros(), {"scale": float("nan")}),
    ],
)  # fmt: skip
def test_sdpa_refuses(error, message, inputs, static):
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*inputs, **static)


def test_sdpa_vjp_refuses_a_cotangent_of_another_shape():
    y, cache = scaled_dot_product_attention(*Sdpa().inputs())
    with pytest.raises(ValueError, match="dy must be"):
        scaled_dot_product_attention_vjp(cache, y[0])


# ── multi_head_attention_forward ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Mha:
    """Arguments of `multi_head_attention_forward`."""

    N: int | None = 2  # None: unbatched
    L: int = 5
    S: int = 7
    H: int = 3
    D: int = 2
    widths: tuple[int, int] | None = None  # Ek and Ev: then the projections are three
    O: int = 11
    in_bias: bool = True
    out_bias: bool = True
    bias_kv: bool = False
    zero: bool = False
    attn: str | None = None
    per_head: bool = False  # attn_mask (N·H, L, S) instead of (L, S)
    padding: str | None = None
    static_k: bool = False
    static_v: bool = False
    longer: int = 0  # so many keys more has a static key: where static_v is too, key and value do not count
    need_weights: bool = True
    average: bool = True
    training: bool = True
    dropout: float | None = None
    seed: int = 0

    def inputs(self):
        """The first key is never forbidden: without one, PyTorch gives NaN with need_weights."""
        rng, E, (Ek, Ev) = np.random.default_rng(self.seed), self.H * self.D, self.widths or (self.H * self.D,) * 2
        n, NH, S = () if self.N is None else (self.N,), (self.N or 1) * self.H, self.S + self.longer
        packed = self.widths is None

        def normal(*shape, given=True):
            return read_only(rng.standard_normal(shape)) if given else None

        def mask(kind, *shape):
            allowed = rng.random(shape) > 0.4
            allowed[..., 0] = True
            if kind is None:
                return None
            return read_only(~allowed if kind == "bool" else np.where(allowed, rng.standard_normal(shape), -np.inf))

        return Inputs(
            query=normal(self.L, *n, E),
            key=normal(self.S, *n, Ek),
            value=normal(self.S, *n, Ev),
            in_proj_weight=normal(3 * E, E, given=packed),
            in_proj_bias=normal(3 * E, given=self.in_bias),
            bias_k=normal(1, 1, E, given=self.bias_kv),
            bias_v=normal(1, 1, E, given=self.bias_kv),
            out_proj_weight=strided(rng, (self.O, E)),
            out_proj_bias=normal(self.O, given=self.out_bias),
            key_padding_mask=mask(self.padding, *n, S),
            attn_mask=mask(self.attn, *((NH,) if self.per_head else ()), self.L, S),
            q_proj_weight=normal(E, E, given=not packed),
            k_proj_weight=normal(E, Ek, given=not packed),
            v_proj_weight=normal(E, Ev, given=not packed),
            static_k=normal(NH, S, self.D, given=self.static_k),
            static_v=normal(NH, S, self.D, given=self.static_v),
        )

    def static(self):
        static = {
            "embed_dim_to_check": self.H * self.D,
            "num_heads": self.H,
            "add_zero_attn": self.zero,
            "dropout_p": self.dropout or 0.0,
            "training": self.training,
            "need_weights": self.need_weights,
            "use_separate_proj_weight": self.widths is not None,
            "average_attn_weights": self.average,
        }
        if self.dropout is None or not self.training:
            return static
        scores = (self.N or 1, self.H, self.L, self.S + self.longer + self.bias_kv + self.zero)
        keep = np.random.default_rng(self.seed + 1).random(scores if self.N else scores[1:]) >= self.dropout
        return static | {"keep": read_only(keep)}


@st.composite
def mha_problems(draw):
    size, flag, kind = st.sampled_from([1, 2, 3, 5]), st.booleans(), st.sampled_from([None, "bool", "float"])
    static_k, static_v, attn = draw(flag) and draw(flag), draw(flag) and draw(flag), draw(kind)
    return Mha(
        N=draw(st.sampled_from([None, 1, 2, 3])),
        L=draw(size),
        S=draw(size),
        H=draw(st.sampled_from([1, 2, 3])),
        D=draw(size),
        widths=draw(st.none() | st.tuples(size, size)),
        O=draw(size),
        in_bias=draw(flag),
        out_bias=draw(flag),
        bias_kv=not (static_k or static_v) and draw(flag),
        zero=draw(flag),
        attn=attn,
        per_head=attn is not None and draw(flag),
        padding=draw(kind),
        static_k=static_k,
        static_v=static_v,
        need_weights=draw(flag),
        average=draw(flag),
        training=draw(st.integers(0, 3)) > 0,
        dropout=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**31)),
    )


def torch_mha(x, keep=None, **static):
    """PyTorch's own, and where it would draw a dropout mask, this one."""

    def dropout(a, p):
        return a * torch.tensor(np.array(keep)).reshape(a.shape) / (1 - p)

    def sdpa(q, k, v, attn_mask, p, is_causal):
        return torch_sdpa(q, k, v, attn_mask, is_causal=is_causal, scale=None, enable_gqa=False, keep=keep, dropout_p=p)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask and attn_mask")
        if keep is not None:
            keep = np.array(keep) if keep.ndim == 4 else keep[None]
            patch.setattr(F, "dropout", dropout)
            patch.setattr(F, "scaled_dot_product_attention", sdpa)
        return F.multi_head_attention_forward(**x._asdict(), **static)


def cotangents(y, weights):
    rng = np.random.default_rng(1)
    return rng.standard_normal(y.shape), None if weights is None else rng.standard_normal(weights.shape)


@settings(max_examples=4 * settings().max_examples)
@given(mha_problems())
@example(Mha(static_k=True, static_v=True, longer=4, padding="float"))
@example(Mha(static_k=True, widths=(5, 11), zero=True, need_weights=False))
@example(Mha(N=None, static_v=True, in_bias=False, attn="bool", per_head=True))
@example(Mha(attn="float", per_head=True, padding="float", bias_kv=True, zero=True, dropout=0.3, average=False))
@example(Mha(attn="float", padding="bool", widths=(5, 13), bias_kv=True, dropout=0.3, need_weights=False))
def test_mha_matches_torch(problem):
    x, static = problem.inputs(), problem.static()
    outputs, cache = multi_head_attention_forward(*x, **static)
    dy = cotangents(*outputs)
    leaves = Inputs(*map(leaf, x))
    want = torch_mha(leaves, **static)
    for got, y in zip(outputs, want, strict=True):
        close(got, y)
    grads = multi_head_attention_forward_vjp(cache, dy)
    assert type(grads) is tuple
    for got, g in zip(grads, gradients(want, dy, leaves), strict=True):
        close(got, g)


@pytest.mark.parametrize("N", [2, None])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6)])
def test_appended_keys_in_every_shape_that_torch_takes(shape, N):
    """PyTorch repeats what it is given; its gradient has the shape of what it was given."""
    problem = Mha(N=N, attn="float", padding="float", bias_kv=True)
    x, static = problem.inputs(), problem.static()
    x = x._replace(bias_k=x.bias_k.reshape(shape), bias_v=x.bias_v.reshape(shape[-1:]))
    outputs, cache = multi_head_attention_forward(*x, **static)
    dy = cotangents(*outputs)
    leaves = Inputs(*map(leaf, x))
    want = torch_mha(leaves, **static)
    for got, y in zip(outputs, want, strict=True):
        close(got, y)
    for got, g in zip(multi_head_attention_forward_vjp(cache, dy), gradients(want, dy, leaves), strict=True):
        close(got, g)


def test_either_cotangent_may_be_none_for_zero():
    x, static = Mha(attn="float").inputs(), Mha().static()
    outputs, cache = multi_head_attention_forward(*x, **static)
    dy, dweights = cotangents(*outputs)
    both = multi_head_attention_forward_vjp(cache, (dy, dweights))
    one, other = (multi_head_attention_forward_vjp(cache, pair) for pair in ((dy, None), (None, dweights)))
    for a, b, c in zip(both, one, other, strict=True):
        assert a is b is c is None or np.abs(a - b - c).max() < 1e-13


def test_an_empty_row_is_the_output_bias_where_torch_says_nan():
    """PyTorch 2.13: NaN with need_weights, and without it what funcmha gives in both cases."""
    x, static = Mha().inputs(), Mha().static()
    forbidden = np.zeros((5, 7), dtype=bool)
    forbidden[3] = True
    x = x._replace(attn_mask=forbidden)
    (y, weights), cache = multi_head_attention_forward(*x, **static)
    np.testing.assert_array_equal(y[3], np.broadcast_to(x.out_proj_bias, (2, 11)))
    assert not weights[:, 3].any()
    leaves = Inputs(*map(leaf, x))
    nan, _ = torch_mha(leaves, **static)
    assert nan[3].isnan().all()
    without, _ = torch_mha(leaves, **static | {"need_weights": False})
    close(y, without)
    dy, _ = cotangents(y, weights)
    for got, g in zip(
        multi_head_attention_forward_vjp(cache, (dy, None)), gradients([without], [dy], leaves), strict=True
    ):
        close(got, g)


def test_two_masks_of_the_least_number_add_to_minus_infinity():
    x, static = Mha().inputs(), Mha().static()
    least = np.finfo(np.float64).min
    attn_mask, padding = np.zeros((5, 7)), np.zeros((2, 7))
    attn_mask[:, 3:] = padding[1, 2:] = least
    x = x._replace(attn_mask=attn_mask, key_padding_mask=padding)
    outputs, _ = multi_head_attention_forward(*x, **static)
    for got, want in zip(outputs, torch_mha(Inputs(*map(leaf, x)), **static), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("S", [4, 5, 7])
def test_a_causal_promise_that_holds_changes_nothing(kind, need_weights, S):
    """PyTorch agrees, and only overlooks the gradient of a mask that it does not look at."""
    problem = Mha(S=S, need_weights=need_weights)
    forbidden = np.tri(5, S) == 0
    x = problem.inputs()._replace(attn_mask=forbidden if kind == "bool" else np.where(forbidden, -np.inf, 0.0))
    outputs, cache = multi_head_attention_forward(*x, **problem.static(), is_causal=True)
    dy = cotangents(*outputs)
    leaves = Inputs(*map(leaf, x))
    want = torch_mha(leaves, **problem.static(), is_causal=True)
    for got, y in zip(outputs, want, strict=True):
        close(got, y)
    grads = multi_head_attention_forward_vjp(cache, dy)
    for name, got, g in zip(Inputs._fields, grads, gradients(want, dy, leaves), strict=True):
        if name != "attn_mask":
            close(got, g)
        elif kind == "float":
            assert got.any()
            assert bool(g.any()) == need_weights


@pytest.mark.parametrize("appended", [{"bias_kv": True}, {"zero": True}])
def test_a_causal_promise_does_not_lose_appended_keys(appended):
    """PyTorch 2.13 forbids them with is_causal=True and need_weights=False, which is a bug: the hint changes y."""
    problem = Mha(need_weights=False, S=5, **appended)
    x = problem.inputs()._replace(attn_mask=np.tri(5, 5) == 0)
    (y, _), _ = multi_head_attention_forward(*x, **problem.static(), is_causal=True)
    leaves = Inputs(*map(leaf, x))
    close(y, torch_mha(leaves, **problem.static())[0])
    hinted, _ = torch_mha(leaves, **problem.static(), is_causal=True)
    assert np.abs(y - hinted.detach().numpy()).max() > 0.1


def test_a_causal_promise_that_does_not_hold_is_refused():
    x, static = Mha(attn="bool").inputs(), Mha().static() | {"is_causal": True}
    leaves = Inputs(*map(leaf, x))
    with_weights, without = (torch_mha(leaves, **static | {"need_weights": flag})[0] for flag in (True, False))
    assert (with_weights - without).abs().max() > 0.1
    with pytest.raises(ValueError, match="attn_mask must forbid j > i and nothing else"):
        multi_head_attention_forward(*x, **static)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        multi_head_attention_forward(*x._replace(attn_mask=None), **static)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        torch_mha(leaves._replace(attn_mask=None), **static)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtype_in_is_dtype_out(dtype):
    problem = Mha(attn="float", padding="bool", static_k=True, zero=True)
    x = Inputs(*(a if a is None or a.dtype == bool else a.astype(dtype) for a in problem.inputs()))
    outputs, cache = multi_head_attention_forward(*x, **problem.static())
    grads = multi_head_attention_forward_vjp(cache, outputs)
    assert {a.dtype for a in (*outputs, *grads) if a is not None} == {np.dtype(dtype)}
    assert [g is None for g in grads] == [a is None or a.dtype == bool for a in x]


def test_a_seed_of_dropout_is_its_mask():
    x, static = Mha().inputs(), Mha(dropout=0.3, average=False).static()
    keep = seeded(2024, 0.3)
    seed, seed_cache = multi_head_attention_forward(*x, **static | {"keep": keep})
    mask, mask_cache = multi_head_attention_forward(*x, **static | {"keep": keep.dense((2, 3, 5, 7))})
    grads = (multi_head_attention_forward_vjp(cache, mask) for cache in (seed_cache, mask_cache))
    for a, b in zip((*seed, *next(grads)), (*mask, *next(grads)), strict=True):
        assert a is b is None or np.abs(a - b).max() < 1e-12


def test_the_caches_tell_weights_before_dropout_and_lse():
    problem = Mha(dropout=0.3, average=False)
    x, static = problem.inputs(), problem.static()
    (_, weights), cache = multi_head_attention_forward(*x, **static)
    p = attention_weights(cache)
    np.testing.assert_allclose(p.sum(-1), 1)
    np.testing.assert_allclose(weights, np.where(static["keep"], p, 0) / 0.7)
    assert log_sum_exp(cache).shape == (2, 3, 5)


KEEP = zeros(5, 7, dtype=bool)
BIAS_KV = {"bias_k": zeros(1, 1, 6), "bias_v": zeros(1, 1, 6)}


@pytest.mark.parametrize(
    ("message", "changed", "static"),
    [
        ("query must be .* with E=8 as embed_dim_to_check", {}, {"embed_dim_to_check": 8}),
        ("query must be .* multiple of num_heads=4", {}, {"num_heads": 4}),
        ("num_heads must be at least 1, got 0", {}, {"num_heads": 0}),
        ("key must be .* with .*N=2 as in query", {"key": zeros(7, 3, 6)}, {}),
        ("value must be .* with S=7 as in key", {"value": zeros(5, 2, 6)}, {}),
        ("key must be", {"key": zeros(7, 6)}, {}),
        ("in_proj_weight must be .* 3E=18", {"in_proj_weight": zeros(12, 6)}, {}),
        ("in_proj_weight must be given", {"in_proj_weight": None}, {}),
        ("in_proj_weight must be None with", {}, {"use_separate_proj_weight": True}),
        ("in_proj_weight must be given, and they None", {"q_proj_weight": zeros(6, 6)}, {}),
        ("bias_k and bias_v must be given both", {"bias_k": zeros(1, 1, 6)}, {}),
        ("bias_k and bias_v must be None with static_k", BIAS_KV | {"static_k": zeros(6, 7, 2)}, {}),
        ("bias_k must be .1, 1, E., .1, E. or .E,.", BIAS_KV | {"bias_k": zeros(1, 2, 6)}, {}),
        ("bias_v must be .* with E=6", BIAS_KV | {"bias_v": zeros(2, 6)}, {}),
        ("static_k must be .* N·H=6", {"static_k": zeros(2, 7, 2)}, {}),
        ("static_v must be .* S=7 as in", {"static_v": zeros(6, 5, 2)}, {}),
        ("key_padding_mask must be .* N=2", {"key_padding_mask": zeros(1, 7, dtype=bool)}, {}),
        ("attn_mask must be .*N·H, L, S.", {"attn_mask": zeros(3, 5, 7, dtype=bool)}, {}),
        ("attn_mask must be .*L, S.", {"attn_mask": zeros(5, 1, dtype=bool)}, {}),
        ("keep must be given with dropout_p=0.3", {}, {"dropout_p": 0.3}),
        ("keep must be None with training=False", {}, {"dropout_p": 0.3, "training": False, "keep": KEEP}),
    ],
)  # fmt: skip
def test_mha_refuses(message, changed, static):
    with pytest.raises(ValueError, match=message):
        multi_head_attention_forward(*Mha().inputs()._replace(**changed), **Mha().static() | static)


def test_mha_refuses_masks_of_other_dtypes():
    for name, shape in (("attn_mask", (5, 7)), ("key_padding_mask", (2, 7))):
        for dtype in (np.int64, np.float32):
            x = Mha().inputs()._replace(**{name: zeros(*shape, dtype=dtype)})
            with pytest.raises(TypeError, match=f"{name} must have"):
                multi_head_attention_forward(*x, **Mha().static())


def test_mha_vjp_refuses_cotangents_that_are_not_of_the_output():
    (y, weights), cache = multi_head_attention_forward(*Mha().inputs(), **Mha().static())
    with pytest.raises(
        TypeError, match=r"dy must be \(dattn_output, dattn_output_weights\) as the output is, got ndarray"
    ):
        multi_head_attention_forward_vjp(cache, y)
    with pytest.raises(ValueError, match="dattn_output must be"):
        multi_head_attention_forward_vjp(cache, (y[0], None))
    with pytest.raises(ValueError, match="dattn_output_weights must be"):
        multi_head_attention_forward_vjp(cache, (y, weights[0]))
    _, cache = multi_head_attention_forward(*Mha().inputs(), **Mha(need_weights=False).static())
    with pytest.raises(ValueError, match="dattn_output_weights must be None"):
        multi_head_attention_forward_vjp(cache, (y, weights))
