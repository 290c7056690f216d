"""`torch.nn.MultiheadAttention` is the oracle: values, every gradient, parameters and masks, in float64."""

import subprocess
import sys
import warnings
from dataclasses import dataclass

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from funcmha import attention_weights, init, mha, mha_vjp, tree
from funcmha.interop.torch import from_module, from_state_dict, masks, merge_masks, merge_masks_vjp, to_state_dict
from funcmha.masks import causal
from funcmha.testing import check_vjp

KINDS = (None, "bool", "float")  # of a mask


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    """A `torch.nn.MultiheadAttention`, in training mode (its inference has a path of its own), inputs and masks."""

    N: int | None = 2  # None: unbatched
    L: int = 5
    S: int = 7
    H: int = 3
    D: int = 2
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    bias_kv: bool = False
    zero_attn: bool = False
    batch_first: bool = True
    same: bool = False  # self-attention: one tensor for query, key and value
    attn: str | None = None
    per_head: bool = False  # attn_mask (N·H, L, S) instead of (L, S)
    causal: int | None = None  # attn_mask forbids what lies after this diagonal
    padding: str | None = None
    need_weights: bool = True
    average: bool = False
    seed: int = 0

    def module(self, dtype=torch.float64):
        torch.manual_seed(self.seed)
        module = torch.nn.MultiheadAttention(
            self.H * self.D,
            self.H,
            bias=self.bias,
            add_bias_kv=self.bias_kv,
            add_zero_attn=self.zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            dtype=dtype,
        )
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith("bias"):  # zero at first
                    p.copy_(torch.randn_like(p))
        return module

    def inputs(self, dtype=torch.float64):
        """query, key, value in the module's layout; three times the same tensor for self-attention."""
        C = self.H * self.D
        batch = () if self.N is None else (self.N,)
        sizes = [(self.L, C)] if self.same else [(self.L, C), (self.S, self.kdim or C), (self.S, self.vdim or C)]
        xs = [torch.randn(*batch, n, c, dtype=dtype) for n, c in sizes]
        xs = [x if self.batch_first or self.N is None else x.transpose(0, 1).contiguous() for x in xs]
        xs = [x.requires_grad_() for x in xs]
        return xs * 3 if self.same else xs

    def masks(self, dtype=torch.float64):
        """attn_mask and key_padding_mask; no row is empty, as the first key is never forbidden."""
        leading = ((self.N or 1) * self.H,) if self.per_head else ()
        keys = (self.S,) if self.N is None else (self.N, self.S)
        attn = self._mask(self.attn, (*leading, self.L, self.S), dtype, self.causal)
        return attn, self._mask(self.padding, keys, dtype)

    def _mask(self, kind, shape, dtype, causal=None):
        if kind is None:
            return None
        forbidden = torch.rand(shape) < 0.3
        if causal is not None:
            forbidden |= torch.ones(self.L, self.S, dtype=torch.bool).triu(causal + 1)
        forbidden[..., 0] = False
        if kind == "bool":
            return forbidden
        return torch.where(forbidden, -torch.inf, torch.randn(shape, dtype=dtype)).requires_grad_()


@st.composite
def problems(draw):
    size, width = st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([None, 1, 5, 11])
    flag, kind = st.booleans(), st.sampled_from(KINDS)
    same, attn, L = draw(flag), draw(kind), draw(size)
    return Problem(
        N=draw(st.sampled_from([None, 1, 2, 3])),
        L=L,
        S=L if same else draw(size),
        H=draw(st.sampled_from([1, 2, 3])),
        D=draw(st.sampled_from([1, 2, 5])),
        kdim=None if same else draw(width),
        vdim=None if same else draw(width),
        bias=draw(flag),
        bias_kv=draw(flag),
        zero_attn=draw(flag),
        batch_first=draw(flag),
        same=same,
        attn=attn,
        per_head=attn is not None and draw(flag),
        causal=draw(st.none() | st.integers(0, 7)) if attn else None,
        padding=draw(kind),
        need_weights=draw(flag),
        average=draw(flag),
        seed=draw(st.integers(0, 2**31)),
    )


def run_torch(problem, module, inputs, attn_mask, key_padding_mask):
    """y and the weights or None; never with is_causal, which drops the keys that bias_kv and zero_attn append."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask and attn_mask")
        return module(
            *inputs,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=problem.need_weights,
            average_attn_weights=problem.average,
        )


def ours(problem, x):
    """A tensor of the module's layout in funcmha's: batch first."""
    a = x.detach().numpy()
    return a if problem.batch_first or problem.N is None else a.swapaxes(0, 1)


def close(got, want, tolerance=1e-11):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1, np.abs(want).max(initial=0))


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


def check_against_torch(problem, dtype=torch.float64, tolerance=1e-11):
    """y, weights, and the gradients of the inputs, of every parameter and of floating masks."""
    module, inputs = problem.module(dtype), problem.inputs(dtype)
    attn_mask, padding = problem.masks(dtype)
    y, weights = run_torch(problem, module, inputs, attn_mask, padding)
    dy, dw = torch.randn_like(y), None if weights is None else torch.randn_like(weights)
    torch.autograd.backward([y] if weights is None else [y, weights], [dy] if weights is None else [dy, dw])

    (mask, bias), merged = merge_masks(attn_mask, padding, num_heads=problem.H)
    query, key, value = (ours(problem, x) for x in inputs)
    got, cache = mha(from_module(module), query, key, value, bias, mask=mask, zero_attn=problem.zero_attn)
    p = attention_weights(cache)
    if weights is not None:
        close(p.mean(-3) if problem.average else p, weights, tolerance)
        dw = np.broadcast_to(dw.numpy()[..., None, :, :] / problem.H, p.shape) if problem.average else dw.numpy()
    dparams, *dinputs, dbias = mha_vjp(cache, ours(problem, dy), dweights=dw)

    close(got, ours(problem, y), tolerance)
    dinputs = [sum(dinputs)] if problem.same else dinputs
    for dx, x in zip(dinputs, inputs, strict=not problem.same):
        close(dx, ours(problem, x.grad), tolerance)
    state = to_state_dict(dparams)
    assert list(state) == list(module.state_dict())
    for name, parameter in module.named_parameters():
        close(state[name], parameter.grad, tolerance)
    for x, dx in zip((attn_mask, padding), merge_masks_vjp(merged, (None, dbias)), strict=True):
        if x is not None and x.requires_grad:
            close(dx, x.grad, tolerance)
        else:
            assert dx is None


@settings(max_examples=6 * settings().max_examples)
@given(problems())
def test_values_and_gradients(problem):
    check_against_torch(problem)


@pytest.mark.parametrize("S", [4, 7, 11], ids=["S<T", "S=T", "S>T"])
@pytest.mark.parametrize("offset", ["top-left", "bottom-right"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal(S, offset, kind):
    offset = 0 if offset == "top-left" else max(S - 7, 0)
    check_against_torch(Problem(L=7, S=S, attn=kind, causal=offset, zero_attn=True))


def test_causal_masks_of_torch_are_masks_causal():
    float_mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    _, bias = masks(float_mask, None, 2)
    mask, _ = masks(torch.ones(5, 5, dtype=torch.bool).triu(1), None, 2)
    np.testing.assert_array_equal(mask, causal().dense(5, 5))
    np.testing.assert_array_equal(bias == 0, mask)
    np.testing.assert_array_equal(bias == -np.inf, ~mask)


def test_float32_at_the_default_sizes_of_a_small_model():
    check_against_torch(Problem(N=4, L=64, H=6, D=64, same=True, need_weights=False), torch.float32, 1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_an_empty_row_is_the_output_bias_and_has_no_gradient(kind):
    """PyTorch agrees without weights, and gives NaN with them."""
    module = Problem().module()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    attn_mask = torch.zeros(5, 5, dtype=torch.bool)
    attn_mask[3] = True
    if kind == "float":
        attn_mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(attn_mask, -torch.inf)
    y, _ = module(x, x, x, attn_mask=attn_mask, need_weights=False)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert module(x, x, x, attn_mask=attn_mask)[0][:, 3].isnan().all()

    params, (mask, bias) = from_module(module), masks(attn_mask, None, 3)
    a = x.detach().numpy()
    got, cache = mha(params, a, a, a, bias, mask=mask)
    dparams, *dinputs, _ = mha_vjp(cache, dy.numpy())
    close(got, y)
    close(got[:, 3], np.broadcast_to(params["out_proj"]["b"], (2, 6)))
    assert not attention_weights(cache)[..., 3, :].any()
    assert not dinputs[0][:, 3].any()
    close(sum(dinputs), x.grad)
    for name, g in to_state_dict(dparams).items():
        close(g, module.get_parameter(name).grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        *(f"{name} is {value}" for name in ("bias", "bias_kv", "zero_attn", "same") for value in (True, False)),
        *(f"{name} is {value}" for name in ("batch_first", "need_weights", "average") for value in (True, False)),
        *(f"attn == {a!r} and padding == {b!r}" for a in KINDS for b in KINDS),
        "per_head and N is not None and N > 1 and N != H and H > 1",
        "per_head and N is None and H > 1",
        "N is None and padding == 'float' and attn == 'float'",
        "kdim is None and vdim is not None",
        "kdim is not None and vdim is None",
        "kdim and vdim and kdim != vdim and bias_kv and zero_attn",
        "L < S",
        "L > S",
        "L == S and not same",
        "causal is not None and L > 1 and S > 1 and causal < S - 1",
        "D > 1 and H > 1 and need_weights and not average and bias_kv and zero_attn and per_head and padding",
    ],
)
def test_the_problems_are_not_vacuous(flag):
    assert find(problems(), lambda problem: eval(flag, dict(vars(problem))), settings=settings(max_examples=5000))


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────

FLAGS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 5},
    {"vdim": 7, "bias": False},
    {"kdim": 5, "vdim": 7, "add_bias_kv": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_state_dict_comes_back_as_it_was_without_a_copy(flags, dtype):
    state = torch.nn.MultiheadAttention(6, 3, dtype=dtype, **flags).state_dict()
    params = from_state_dict(state, 3)
    back = to_state_dict(params)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].ctypes.data == tensor.data_ptr()
        assert back[name].shape == tuple(tensor.shape)
        assert str(tensor.dtype) == f"torch.{back[name].dtype}"
        np.testing.assert_array_equal(back[name].astype("f8"), tensor.double().numpy())
    again = from_state_dict(back, 3)
    assert list(tree.flatten(again)) == list(tree.flatten(params))
    tree.map(np.testing.assert_array_equal, again, params)
    assert all(np.shares_memory(a, b) for a, b in zip(*map(leaves, (again, params)), strict=True))


def leaves(params):
    return tree.flatten(params).values()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_torch_loads_parameters_and_gradients(flags):
    module = torch.nn.MultiheadAttention(6, 3, batch_first=True, **flags)
    widths = {
        "kdim": module.kdim,
        "vdim": module.vdim,
        "bias": "bias" not in flags,
        "bias_kv": module.bias_k is not None,
    }
    params = init(0, 6, 3, **widths)
    state = {name: torch.tensor(a) for name, a in to_state_dict(params).items()}
    module.load_state_dict(state)
    tree.map(np.testing.assert_array_equal, from_module(module), params)

    q, k, v = (np.random.default_rng(1).standard_normal((2, 5, n), dtype="f4") for n in (6, module.kdim, module.vdim))
    y, cache = mha(params, q, k, v)
    dparams, *_ = mha_vjp(cache, y)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    for name, g in to_state_dict(dparams).items():
        module.get_parameter(name).grad = torch.from_numpy(g)
    optimiser.step()
    stepped = tree.map(lambda p, g: p - np.float32(0.5) * g, params, dparams)
    tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), from_module(module), stepped)


def test_the_heads_are_rows_of_in_proj_and_columns_of_out_proj():
    state = torch.nn.MultiheadAttention(6, 3, add_bias_kv=True).state_dict()
    state["in_proj_bias"] = torch.arange(18.0)
    params = from_state_dict(state, 3)
    for h in range(3):
        rows = slice(2 * h, 2 * h + 2)
        np.testing.assert_array_equal(params["q_proj"]["w"][h], state["in_proj_weight"][:6][rows])
        np.testing.assert_array_equal(params["k_proj"]["w"][h], state["in_proj_weight"][6:12][rows])
        np.testing.assert_array_equal(params["v_proj"]["w"][h], state["in_proj_weight"][12:][rows])
        np.testing.assert_array_equal(params["v_proj"]["b"][h], state["in_proj_bias"][12:][rows])
        np.testing.assert_array_equal(params["out_proj"]["w"][:, h], state["out_proj.weight"][:, rows])
        np.testing.assert_array_equal(params["bias_kv"]["k"][h], state["bias_k"][0, 0, rows])


def test_parameters_that_lie_apart_are_packed_by_a_copy():
    params = init(0, 6, 3)
    packed = to_state_dict(params)["in_proj_weight"]
    np.testing.assert_array_equal(packed, np.concatenate([params[n]["w"].reshape(6, 6) for n in ORDER]))
    assert not any(np.shares_memory(packed, params[n]["w"]) for n in ORDER)


ORDER = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (0, 0, 0), (0, 1, 1)])
def test_parameters_in_another_order_are_packed_by_a_copy(order):
    buffer = np.random.default_rng(0).standard_normal((3, 3, 2, 6))
    params = {name: {"w": buffer[i]} for name, i in zip(ORDER, order, strict=True)}
    params["out_proj"] = {"w": np.ones((6, 3, 2))}
    np.testing.assert_array_equal(to_state_dict(params)["in_proj_weight"], buffer[list(order)].reshape(18, 6))


def test_a_view_of_read_only_parameters_is_read_only():
    state = {"in_proj_weight": np.ones((18, 6)), "out_proj.weight": np.ones((6, 6))}
    state["in_proj_weight"].flags.writeable = False
    back = to_state_dict(from_state_dict(state, 3))["in_proj_weight"]
    assert np.shares_memory(back, state["in_proj_weight"])
    assert not back.flags.writeable


def test_no_writable_view_holds_read_only_parameters():
    params = from_state_dict({"in_proj_weight": np.ones((18, 6)), "out_proj.weight": np.ones((6, 6))}, 3)
    params["k_proj"]["w"].flags.writeable = False
    packed = to_state_dict(params)["in_proj_weight"]
    assert not (packed.flags.writeable and np.shares_memory(packed, params["k_proj"]["w"]))


def test_parameters_of_other_libraries_stay_there():
    params = tree.map(array_api_strict.asarray, init(0, 6, 3, bias_kv=True))
    back = from_state_dict(to_state_dict(params), 3)
    assert all(type(a) is type(b) for a, b in zip(*map(leaves, (params, back)), strict=True))
    tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), back, params)


def test_numpy_state_dicts_need_no_torch():
    code = """
import sys, numpy as np
from funcmha.interop.torch import from_state_dict, masks, to_state_dict
state = {"in_proj_weight": np.ones((6, 2)), "out_proj.weight": np.ones((2, 2))}
assert to_state_dict(from_state_dict(state, 1)).keys() == state.keys()
masks(np.zeros((3, 3), bool), np.zeros(3), 1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    state = torch.nn.MultiheadAttention(6, 3, dtype=torch.bfloat16).state_dict()
    with pytest.raises(
        TypeError, match=r"in_proj_weight is bfloat16, .* ml_dtypes only: install it, or use \.float\(\)"
    ):
        from_state_dict(state, 3)


# ── refusals of parameters ───────────────────────────────────────────────────────────────────────────────────────


def a_state(**changes):
    """A packed state dict of C = 6, with `changes`: None takes a name out."""
    state = {
        "in_proj_weight": np.ones((18, 6)),
        "in_proj_bias": np.ones(18),
        "bias_k": np.ones((1, 1, 6)),
        "bias_v": np.ones((1, 1, 6)),
        "out_proj.weight": np.ones((6, 6)),
        "out_proj.bias": np.ones(6),
    }
    return {name: x for name, x in (state | changes).items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_proj_weight": None}, KeyError, "has no in_proj_weight"),
        ({"out_proj.weight": None}, KeyError, "has no out_proj.weight"),
        ({"out_proj.bias": None}, KeyError, "has no out_proj.bias"),
        ({"in_proj_bias": None}, KeyError, "has no in_proj_bias"),
        ({"bias_v": None}, KeyError, "has no bias_v"),
        ({"gamma": np.ones(6)}, KeyError, "has gamma"),
        ({"q_proj_weight": np.ones((6, 6))}, KeyError, "has q_proj_weight"),
        ({"in_proj_weight": None, "q_proj_weight": np.ones((6, 6))}, KeyError, "has no k_proj_weight"),
        (
            {"in_proj_weight": np.ones((6, 18))},
            ValueError,
            r"in_proj_weight must be \(3C, C\) with C=6 .* got \(6, 18\)",
        ),
        ({"in_proj_bias": np.ones(6)}, ValueError, r"in_proj_bias must be \(3C,\) with C=6 .* got \(6,\)"),
        ({"out_proj.weight": np.ones((6, 3))}, ValueError, r"in_proj_weight must be \(3C, C\) with C=3"),
        (
            {"out_proj.weight": np.ones((3, 6))},
            ValueError,
            r"out_proj.weight must be \(C, C\) with C=6 .* got \(3, 6\)",
        ),
        ({"out_proj.weight": np.ones(())}, ValueError, r"must be"),
        ({"bias_k": np.ones((1, 6))}, ValueError, r"bias_k must be \(1, 1, C\) with C=6 .* got \(1, 6\)"),
        ({"bias_k": np.ones((1, 2, 6))}, ValueError, r"bias_k must be \(1, 1, C\) with C=6 .* got \(1, 2, 6\)"),
        ({"bias_k": np.ones((1, 1, 6), "f4")}, TypeError, "bias_k must have dtype float64 as in_proj_weight has"),
        ({"bias_k": [1.0] * 6}, TypeError, "bias_k must be a tensor or an array, got list"),
        ({"bias_k": torch.ones(1, 1, 6, device="meta")}, TypeError, "bias_k must be on the CPU, got a tensor on meta"),
    ],
)
def test_from_state_dict_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        from_state_dict(a_state(**changes), 3)


@pytest.mark.parametrize("heads", [4, 0, -3, True, 3.0, None])
def test_from_state_dict_refuses_heads(heads):
    with pytest.raises((TypeError, ValueError), match="num_heads"):
        from_state_dict(a_state(), heads)


def test_from_module_refuses_other_modules():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.MultiheadAttention, got Linear"):
        from_module(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_kv_heads": 2}, r"k_proj.w must be \(K, D, Ck\) = \(4, 3, 12\) .* got \(2, 3, 12\)"),
        ({"value_dim": 5}, r"v_proj.w must be \(K, E, Cv\) = \(4, 3, 12\) .* got \(4, 5, 12\)"),
        ({"out_dim": 7}, r"out_proj.w must be \(O, H, E\) = \(12, 4, 3\) .* got \(7, 4, 3\)"),
        ({"head_dim": 5}, r"q_proj.w must be \(H, D, Cq\) = \(4, 5, 20\) .* got \(4, 5, 12\)"),
    ],
)
def test_to_state_dict_refuses_what_torch_cannot_express(sizes, message):
    with pytest.raises(ValueError, match=message):
        to_state_dict(init(0, 12, 4, **sizes))


def test_to_state_dict_refuses_biases_on_some_projections():
    params = init(0, 12, 4)
    del params["k_proj"]["b"]
    with pytest.raises(ValueError, match=r"on all four projections or on none .* got q_proj.b, v_proj.b, out_proj.b"):
        to_state_dict(params)


def test_to_state_dict_refuses_unknown_leaves():
    with pytest.raises(KeyError, match=r"has mystery\.w"):
        to_state_dict(init(0, 12, 4) | {"mystery": {"w": np.ones(4)}})


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────

N, H, L, S = 2, 3, 5, 7


@pytest.mark.parametrize(
    ("attn", "padding", "mask", "bias"),
    [
        (None, None, None, None),
        ((bool, L, S), None, (L, S), None),
        ((float, L, S), None, None, (L, S)),
        ((bool, N * H, L, S), None, (N, H, L, S), None),
        ((bool, H, L, S), None, (H, L, S), None),
        ((bool, H, L, S), (bool, 1, S), (1, H, L, S), None),
        ((bool, H, L, S), (bool, S), (H, L, S), None),
        (None, (bool, N, S), (N, 1, 1, S), None),
        (None, (float, N, S), None, (N, 1, 1, S)),
        (None, (bool, S), (S,), None),
        ((bool, L, S), (bool, N, S), (N, 1, L, S), None),
        ((bool, L, S), (float, N, S), (L, S), (N, 1, 1, S)),
        ((float, N * H, L, S), (bool, N, S), (N, 1, 1, S), (N, H, L, S)),
        ((float, N * H, L, S), (float, N, S), None, (N, H, L, S)),
    ],
)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_masks_have_the_shapes_that_funcmha_takes(attn, padding, mask, bias, library):
    def a_mask(kind):
        array = None if kind is None else np.zeros(kind[1:], kind[0])
        return torch.from_numpy(array) if library == "torch" and kind else array

    got = masks(a_mask(attn), a_mask(padding), H)
    assert tuple(None if x is None else x.shape for x in got) == (mask, bias)
    assert got[0] is None or (got[0].dtype == bool and got[0].all())
    assert got[1] is None or (got[1].dtype == float and not got[1].any())


def test_true_of_torch_is_false_of_funcmha():
    attn = np.array([[True, False, False], [False, False, True]])
    mask, _ = masks(attn, np.array([[False, True, False]]), 1)
    np.testing.assert_array_equal(mask, [[[[False, False, True], [True, False, False]]]])


def test_floating_masks_add_up():
    attn, padding = np.array([[1.0, 2.0], [-np.inf, 4.0]]), np.array([[10.0, -np.inf]])
    np.testing.assert_array_equal(masks(attn, padding, 1)[1], [[[[11.0, -np.inf], [-np.inf, -np.inf]]]])


@pytest.mark.parametrize("padding", [None, (N, S), (S,)], ids=["alone", "N S", "S"])
@pytest.mark.parametrize("attn", [None, (L, S), (N * H, L, S), (H, L, S)], ids=["alone", "L S", "N·H L S", "H L S"])
def test_merge_masks_keeps_the_protocol(attn, padding):
    """Of floating masks in each of PyTorch's shapes; the oracle is the complex step."""
    if attn and attn[0] == N * H and padding == (S,):
        padding = (N, S)
    if attn and attn[0] == H and padding == (N, S):
        padding = (1, S)
    rng = np.random.default_rng(0)
    inputs = tuple(None if shape is None else rng.standard_normal(shape) for shape in (attn, padding))
    check_vjp(merge_masks, merge_masks_vjp, inputs, {"num_heads": H})


def test_only_the_floating_one_of_two_masks_has_a_gradient():
    attn, padding = np.zeros((L, S), bool), np.ones((N, S), np.float32)
    (mask, bias), cache = merge_masks(torch.from_numpy(attn), torch.from_numpy(padding), num_heads=H)
    dattn, dpadding = merge_masks_vjp(cache, (None, np.full(bias.shape, 2.0, np.float32)))
    assert mask.all()
    assert dattn is None
    np.testing.assert_array_equal(dpadding, np.full((N, S), 2.0, np.float32))
    assert merge_masks_vjp(merge_masks(attn, None, num_heads=H)[1], (None, None)) == (None, None)


@pytest.mark.parametrize(
    ("attn", "dmasks", "error", "message"),
    [
        (
            np.zeros((L, S)),
            np.zeros((L, S)),
            TypeError,
            r"dmasks must be \(dmask, dbias\) as the output is, got ndarray",
        ),
        (np.zeros((L, S)), (np.zeros(1), None), TypeError, "dmask must be None, as a boolean mask has no gradient"),
        (np.zeros((L, S)), (None, None), TypeError, "dbias must be a tensor or an array, got NoneType"),
        (np.zeros((L, S)), (None, np.zeros((S, L))), ValueError, r"dbias must be .* = \(5, 7\) as the output is"),
        (np.zeros((L, S), bool), (None, np.zeros(1)), ValueError, "dbias must be None, as bias is"),
    ],
)
def test_merge_masks_vjp_refuses(attn, dmasks, error, message):
    _, cache = merge_masks(attn, None, num_heads=H)
    with pytest.raises(error, match=message):
        merge_masks_vjp(cache, dmasks)
    with pytest.raises(TypeError, match="cache must come from merge_masks"):
        merge_masks_vjp((), dmasks)


def test_a_floating_mask_alone_is_not_copied():
    tensor = torch.randn(N * H, L, S, requires_grad=True)
    assert masks(tensor, None, H)[1].ctypes.data == tensor.data_ptr()


def test_masks_are_not_written():
    attn, padding = np.zeros((L, S), bool), np.zeros((N, S))
    attn.flags.writeable = padding.flags.writeable = False
    masks(attn, padding, H)
    masks(attn, attn[:N], H)
    masks(padding, padding, H)


@pytest.mark.parametrize(
    ("attn", "padding", "error", "message"),
    [
        (np.zeros((L, S), int), None, TypeError, "attn_mask must be boolean, .* or floating, .* got int64"),
        (torch.zeros(L, S, dtype=torch.uint8), None, TypeError, "attn_mask must be boolean, .* got uint8"),
        (None, np.zeros((N, S), "u1"), TypeError, "key_padding_mask must be boolean, .* got uint8"),
        (None, [[True]], TypeError, "key_padding_mask must be a tensor or an array, got list"),
        (np.zeros((4, L, S), bool), None, ValueError, r"attn_mask must be .* with H=3, got \(4, 5, 7\)"),
        (np.zeros((N, H, L, S), bool), None, ValueError, r"attn_mask must be .* got \(2, 3, 5, 7\)"),
        (np.zeros(S, bool), None, ValueError, r"attn_mask must be .* got \(7,\)"),
        (None, np.zeros((N, 1, S), bool), ValueError, r"key_padding_mask must be \(S\) or \(N, S\), got \(2, 1, 7\)"),
        (np.zeros((L, S), bool), np.zeros((N, L)), ValueError, r"with S=7 as in attn_mask, got \(2, 5\)"),
        (
            np.zeros((9, L, S)),
            np.zeros((N, S)),
            ValueError,
            r"with H=3 and N=2 as in key_padding_mask, got \(9, 5, 7\)",
        ),
        (np.zeros((6, L, S)), np.zeros(S), ValueError, r"with H=3 and N=1 as in key_padding_mask, got \(6, 5, 7\)"),
    ],
)
def test_masks_refuses(attn, padding, error, message):
    with pytest.raises(error, match=message):
        masks(attn, padding, 3)


@pytest.mark.parametrize("heads", [0, True, 2.0])
def test_masks_refuses_heads(heads):
    with pytest.raises((TypeError, ValueError), match=r"num_heads must be (an int|at least 1)"):
        masks(None, None, heads)
