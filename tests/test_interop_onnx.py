"""ONNX's own node tests, definition and reference implementation in float64, torch's autograd, and onnxruntime."""

import ast
import inspect
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace

import jax
import ml_dtypes
import numpy as np
import onnx
import onnx.backend.test.case.node as node_tests
import onnx.backend.test.case.node.attention  # which generates the node tests of Attention, with seeds of its own
import onnxruntime
import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from test_ops import close

import funcmha.interop.onnx as module
from funcmha import attention_weights, log_sum_exp, masks
from funcmha.interop.onnx import attention, attention_vjp
from funcmha.testing import check_vjp

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16  # onnx.TensorProto.DataType

every_engine = pytest.mark.usefixtures("each_engine")


# ── ONNX's own tests ─────────────────────────────────────────────────────────────────────────────────────────────

CASES = {case.name: case for case in node_tests._NodeTestCases if case.name.startswith("test_attention")}
NODES = {name: case for name, case in CASES.items() if "_expanded" not in name}


def test_all_node_tests_are_here():
    """Those of onnx 1.23.2. Each comes once more, expanded into simpler operators, with the same data."""
    assert len(NODES) == 93
    assert {case.model.graph.node[0].op_type for case in NODES.values()} == {"Attention"}
    for name, case in CASES.items():
        ((given_, want),) = case.data_sets
        ((inputs, outputs),) = NODES[name.partition("_expanded")[0]].data_sets
        for a, b in zip((*given_, *want), (*inputs, *outputs), strict=True):
            np.testing.assert_array_equal(a, b)


@every_engine
@pytest.mark.parametrize("case", NODES.values(), ids=NODES)
def test_node_tests_of_onnx(case):
    """At ONNX's tolerance, of which the one for bfloat16 is in its onnx/backend/test/runner/__init__.py."""
    (node,), ((inputs, outputs),) = case.model.graph.node, case.data_sets
    x = dict(zip((name for name in node.input if name), inputs, strict=True))
    want = dict(zip((name for name in node.output if name), outputs, strict=True))
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    (opset,) = case.model.opset_import
    ys, _ = attention(*map(x.get, INPUTS[:6]), nonpad_kv_seqlen=x.get(INPUTS[6]), **attributes, opset=opset.version)
    for name, y in zip(OUTPUTS, ys, strict=True):
        if name in want:
            assert y.shape == want[name].shape
            assert y.dtype == want[name].dtype
            rtol = max(case.rtol, 2**-6) if y.dtype == ml_dtypes.bfloat16 else case.rtol
            np.testing.assert_allclose(*(a.astype(np.float64) for a in (y, want[name])), rtol=rtol, atol=case.atol)


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    """Inputs and attributes of one node."""

    B: int = 2
    T: int = 5
    L: int = 7  # new keys
    P: int | None = None  # past keys
    K: int = 2
    G: int = 3
    D: int = 11
    E: int = 13
    packed: bool = False  # Q (B, T, H·D)
    mask: str | None = None  # bool or float
    axes: str = "T S"  # of the mask
    short: int = 0  # keys that the mask does not reach
    nonpad: bool = False
    is_causal: int = 0
    left: int = -1
    right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    mode: int | None = 0
    softmax_precision: int | None = None
    opset: int = 25
    seed: int = 0

    @property
    def S(self):  # noqa: N802 — an axis
        return self.L + (self.P or 0)

    @property
    def H(self):  # noqa: N802 — an axis
        return self.K * self.G

    def inputs(self, dtype=np.float64):
        """Q, K, V, attn_mask, past_key, past_value: read-only, and of odd strides where nothing is packed"""
        B, T, L, P, K, D, E = self.B, self.T, self.L, self.P, self.K, self.D, self.E
        shapes = [(B, self.H, T, D), (B, K, L, D), (B, K, L, E)]
        if self.packed:
            shapes = [(b, n, h * d) for b, h, n, d in shapes]
        rng = np.random.default_rng([self.seed, 1])
        q, k, v = (rng.standard_normal((2, *shape))[1].astype(dtype) for shape in shapes)
        past = [None if P is None else rng.standard_normal((B, K, P, d)).astype(dtype) for d in (D, E)]
        return tuple(frozen(x) for x in (q, k, v, self.attn_mask(dtype), *past))

    def attn_mask(self, dtype):
        """A third of it is forbidden, by False or by −∞, and with luck a row is empty."""
        if self.mask is None:
            return None
        size = {"B": self.B, "H": self.H, "T": self.T, "S": max(self.S - self.short, 0), "1": 1}
        rng, shape = np.random.default_rng([self.seed, 2]), tuple(size[axis] for axis in self.axes.split())
        allowed = rng.random(shape) < 0.7
        return allowed if self.mask == "bool" else np.where(allowed, rng.standard_normal(shape), -np.inf).astype(dtype)

    def static(self):
        heads = {"q_num_heads": self.H, "kv_num_heads": self.K} if self.packed else {}
        window = {"left_window_size": self.left, "right_window_size": self.right} if self.opset > 24 else {}
        optional = {"scale": self.scale, "softmax_precision": self.softmax_precision}
        return {
            "is_causal": self.is_causal,
            "softcap": self.softcap,
            "qk_matmul_output_mode": self.mode,
            **heads,
            **window,
            **{name: x for name, x in optional.items() if x is not None},
        }

    def nonpad_kv_seqlen(self):
        reach = self.S - (self.short if self.mask else 0)
        return np.random.default_rng([self.seed, 3]).integers(0, reach + 1, self.B) if self.nonpad else None

    def run(self, dtype=np.float64):
        inputs, nonpad = self.inputs(dtype), self.nonpad_kv_seqlen()
        return attention(*inputs, nonpad_kv_seqlen=nonpad, **self.static(), opset=self.opset)

    def cotangents(self, ys):
        rng = np.random.default_rng([self.seed, 4])
        return tuple(None if y is None else frozen(rng.standard_normal(y.shape).astype(y.dtype)) for y in ys)


def frozen(x):
    if x is not None:
        x = np.repeat(x, 2, axis=0)[::2]
        x.flags.writeable = False
    return x


@st.composite
def problems(draw, **fields):
    size, flag = st.sampled_from([0, 1, 2, 3, 5, 7]), st.booleans()
    opset, cache = draw(st.sampled_from([23, 24, 25])), draw(st.sampled_from(["none", "past", "external"]))
    mask = draw(st.sampled_from([None, "bool", "float"]))
    problem = Problem(
        B=draw(st.sampled_from([1, 2, 3])),
        T=draw(size),
        L=draw(size),
        P=draw(size) if cache == "past" else None,
        K=draw(st.sampled_from([1, 2])),
        G=draw(st.sampled_from([1, 3])),
        D=draw(st.sampled_from([1, 2, 5])),
        E=draw(st.sampled_from([1, 3])),
        packed=draw(flag),
        mask=mask,
        axes=draw(st.sampled_from(["S", "T S", "1 S", "H T S", "B H T S", "B 1 T S", "1 H 1 S"])),
        nonpad=cache == "external" and opset > 23,
        is_causal=draw(st.sampled_from([0, 1])),
        left=draw(st.sampled_from([-1, 0, 2])) if opset > 24 else -1,
        right=draw(st.sampled_from([-1, 0, 1])) if opset > 24 else -1,
        scale=draw(st.sampled_from([None, 0.0, 0.25, 4.0])),  # ONNX takes their square roots in float32
        softcap=draw(st.sampled_from([0.0, 0.5, 4.0])),
        mode=draw(st.sampled_from([0, 1, 2, 3])),
        opset=opset,
        seed=draw(st.integers(0, 2**31)),
    )
    short = draw(st.integers(0, problem.S)) if opset > 23 else 0
    return replace(problem, short=short, **fields)


EVERYTHING = Problem(
    P=3, packed=True, mask="float", axes="B 1 T S", short=2, is_causal=1, left=3, scale=0.25, softcap=0.5, mode=2
)
EXTERNAL = Problem(nonpad=True, mask="bool", axes="H T S", left=2, right=1, softcap=2.0, mode=3)
EMPTY_ROWS = Problem(T=7, L=3, nonpad=True, is_causal=1, mode=3)


def node_of(problem, dtype=np.float64, rows=False):
    """The model of one node, and what to feed it; with a row of the mask for each query if `rows`."""
    x = dict(zip(INPUTS, (*problem.inputs(dtype), problem.nonpad_kv_seqlen()), strict=True))
    present = {name: a for name, a in x.items() if a is not None}
    if rows and "attn_mask" in present:
        mask = present["attn_mask"]
        present["attn_mask"] = np.broadcast_to(mask, (*mask.shape[:-2], problem.T, mask.shape[-1]))
    names = [name if name in present else "" for name in INPUTS[: 6 + problem.nonpad]]
    outputs = [OUTPUTS[0], "", "", OUTPUTS[3]] if problem.nonpad else list(OUTPUTS)
    node = helper.make_node("Attention", names, outputs, **problem.static())
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in present.items()}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kinds[name], a.shape) for name, a in present.items()],
        [helper.make_tensor_value_info(name, kinds["Q"], None) for name in outputs if name],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", problem.opset)]), present


def evaluated(model, x):
    """The four outputs by onnx's evaluator, None for those that the model has not."""
    with np.errstate(invalid="ignore"):  # it repairs the NaN of −∞ − −∞ afterwards
        ys = ReferenceEvaluator(model).run(None, x)
    found = dict(zip((o.name for o in model.graph.output), ys, strict=True))
    return [found.get(name) for name in OUTPUTS]


def definition_of(model):
    """The body that the operator is defined by, a graph of simpler operators."""
    (node,), types = deepcopy(model.graph.node), {i.name: i.type for i in model.graph.input}
    kinds = [types.get(name, onnx.TypeProto()) for name in node.input]
    ((nodes, _),), _ = node_tests.function_testcase_helper(node, kinds, "body", model.opset_import)  # writes to node
    graph = helper.make_graph(nodes, "body", model.graph.input, model.graph.output)
    return helper.make_model(graph, opset_imports=model.opset_import)


def by_definition(problem):
    """The outputs of the operator's definition."""
    model, x = node_of(problem)
    return evaluated(definition_of(model), x)


def by_reference(problem, rows=True):
    """The outputs of onnx's reference implementation in NumPy."""
    return evaluated(*node_of(problem, rows=rows))


def by_torch(problem, q, k, v, attn_mask, past_key, past_value):
    """The outputs from tensors with an axis of heads: the operator written out, with −∞ chosen and not added."""
    k, v = (x if past is None else torch.cat([past, x], 2) for x, past in ((k, past_key), (v, past_value)))
    keys, values = k, v
    k, v = (x.repeat_interleave(problem.G, dim=1) for x in (k, v))
    T, S = problem.T, problem.S
    raw = q @ k.mT * (problem.D**-0.5 if problem.scale is None else problem.scale)
    capped = problem.softcap * torch.tanh(raw / problem.softcap) if problem.softcap else raw

    n = problem.nonpad_kv_seqlen()
    offset = torch.tensor([problem.P or 0] if n is None else n - T)[:, None, None, None]
    i, j = torch.arange(T)[:, None] + offset, torch.arange(S)
    allowed = (j <= i) if problem.is_causal else torch.ones(1, 1, T, S, dtype=torch.bool)
    allowed = allowed if problem.left < 0 else allowed & (j >= i - problem.left)
    allowed = allowed if problem.right < 0 else allowed & (j <= i + problem.right)
    allowed = allowed if n is None else allowed & (j < torch.tensor(n)[:, None, None, None])
    z = capped
    if problem.mask == "bool":
        rest = torch.zeros(*attn_mask.shape[:-1], S - attn_mask.shape[-1], dtype=torch.bool)
        allowed = allowed & torch.cat([attn_mask, rest], -1)
    elif problem.mask == "float":
        rest = torch.full((*attn_mask.shape[:-1], S - attn_mask.shape[-1]), -torch.inf)
        z = capped + torch.cat([attn_mask, rest], -1)
    allowed = allowed & ~torch.isneginf(z)
    z = torch.where(allowed, z, -torch.inf)
    e = torch.where(allowed, torch.exp(torch.where(allowed, z, 0.0)), 0.0)
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total == 0, 1.0, total)
    y = p @ v
    y = y.transpose(1, 2).flatten(2) if problem.packed else y
    return y, keys, values, {0: raw, 1: capped, 2: z, 3: p}[problem.mode]


def heads_of(problem, x, n):
    return x.unflatten(2, (n, x.shape[-1] // n)).transpose(1, 2) if problem.packed else x


def all_by_torch(problem, dys):
    """Outputs and gradients, of the additive attn_mask too."""
    inputs = problem.inputs()
    leaves = [None if x is None or x.dtype == bool else oracles.tensor(x) for x in inputs]
    q, k, v, attn_mask, *past = leaves
    if problem.mask == "bool":
        attn_mask = torch.tensor(np.array(inputs[3]))
    heads = [heads_of(problem, x, n) for x, n in ((q, problem.H), (k, problem.K), (v, problem.K))]
    ys = by_torch(problem, *heads, attn_mask, *past)
    finite = [torch.where(torch.isneginf(y), 0.0, y) for y in ys]  # −∞ times a cotangent has no sum
    return [y.detach() for y in ys], oracles.gradients(finite, list(dys), leaves)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────

sized = problems().filter(lambda problem: problem.L and problem.T)  # ONNX's own code wants a query and a key


@every_engine
@given(sized)
@example(EVERYTHING)
@example(EXTERNAL)
@example(EMPTY_ROWS)
def test_outputs_match_the_operators_definition(problem):
    problem = replace(problem, scale=0.25) if problem.scale is None else problem  # it computes D ** -0.5 in float32
    for name, y, want in zip(OUTPUTS, problem.run()[0], by_definition(problem), strict=True):
        if want is not None:
            close(y, want, name)


@every_engine
@given(sized)
@example(EVERYTHING)
@example(EXTERNAL)
@example(EMPTY_ROWS)
def test_outputs_match_the_reference_implementation(problem):
    """But for what the tests after this one are about."""
    want = by_reference(problem)
    if problem.mode == 0 and problem.softcap:
        want[3] = by_reference(replace(problem, softcap=0.0))[3]
    for name, y, reference in zip(OUTPUTS, problem.run()[0], want, strict=True):
        if reference is not None:
            close(y, reference, name)


def test_raw_scores_are_raw_with_a_softcap_too():
    """The reference implementation of onnx 1.23.2 gives those after the softcap in mode 0, against the definition."""
    problem = Problem(softcap=0.5, scale=0.25, mode=0)
    raw = problem.run()[0][3]
    close(raw, by_definition(problem)[3])
    close(0.5 * np.tanh(raw / 0.5), by_reference(problem)[3])
    assert np.abs(raw).max() > 0.5


def test_a_mask_of_one_row_is_broadcast_if_causal_too():
    """The reference implementation of onnx 1.23.2 takes T from the mask: all queries attend the first one's keys."""
    problem = Problem(mask="bool", axes="1 S", is_causal=1, scale=0.25, mode=3, seed=1)
    weights = problem.run()[0][3]
    close(weights, by_definition(problem)[3])
    assert np.count_nonzero(weights[0, 0, 4]) > 1
    assert np.all(by_reference(problem, rows=False)[3][..., 1:] == 0)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        by_reference(replace(problem, axes="S"), rows=False)


def test_an_axis_of_one_is_broadcast_in_opset_23_only():
    """By the definitions; the reference implementation of onnx 1.23.2 makes no difference."""
    short = Problem(mask="bool", axes="T S", short=6, scale=0.25, mode=3, seed=6)
    assert short.inputs()[3][:2, 0].tolist() == [False, True]
    for opset in (23, 24, 25):
        problem = replace(short, opset=opset)
        weights = problem.run()[0][3]
        close(weights, by_definition(problem)[3])
        assert np.count_nonzero(weights[0, 0, 0]) == 0
        assert np.count_nonzero(weights[0, 0, 1]) == (7 if opset == 23 else 1)
        assert np.count_nonzero(by_reference(problem)[3][0, 0, 1]) == 1


@every_engine
@given(problems())
@example(EVERYTHING)
@example(EXTERNAL)
@example(EMPTY_ROWS)
def test_outputs_and_gradients_match_torch(problem):
    ys, cache = problem.run()
    dys = problem.cotangents(ys)
    want, gradients = all_by_torch(problem, dys)
    for name, got, reference in zip(OUTPUTS, ys, want, strict=True):
        close(got, reference, name)
    for name, got, reference in zip(INPUTS, attention_vjp(cache, dys), gradients, strict=False):
        close(got, reference, name)


@pytest.mark.parametrize("mode", [0, 1, 3])
@pytest.mark.parametrize("output", range(4), ids=OUTPUTS)
def test_the_pair_keeps_the_protocol_in_every_output(output, mode):
    """Purity, dtypes, a cache that serves twice, and the gradient by a complex step."""
    problem = replace(EVERYTHING, mode=mode)

    def f(*inputs):
        ys, cache = attention(*inputs, **problem.static())
        return ys[output], cache

    def f_vjp(cache, dy):
        return attention_vjp(cache, tuple(dy if i == output else None for i in range(4)))

    inputs = list(problem.inputs())
    inputs[3] = np.random.default_rng(0).standard_normal(inputs[3].shape)  # −∞ has no complex step
    check_vjp(f, f_vjp, tuple(inputs))


def test_a_cotangent_of_none_is_one_of_zeros():
    ys, cache = EVERYTHING.run()
    dys = EVERYTHING.cotangents(ys)
    for keep in range(5):  # which one is there; 4 is none of them
        given_ = tuple(dy if i == keep else None for i, dy in enumerate(dys))
        zeros = tuple(dy if i == keep else np.zeros_like(dy) for i, dy in enumerate(dys))
        for got, want in zip(attention_vjp(cache, given_), attention_vjp(cache, zeros), strict=True):
            np.testing.assert_array_equal(got, want)


# ── onnxruntime ──────────────────────────────────────────────────────────────────────────────────────────────────


def by_onnxruntime(problem):
    """The outputs of onnxruntime's CPU provider in float32: kernels of its own up to opset 24, then the definition."""
    model, x = node_of(problem, np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1  # errors alone
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip((o.name for o in model.graph.output), session.run(None, x), strict=True))
    return [found.get(name) for name in OUTPUTS]


def close_in_float32(problem, wanted=OUTPUTS):
    for name, y, want in zip(OUTPUTS, problem.run(np.float32)[0], by_onnxruntime(problem), strict=True):
        if want is not None and name in wanted:
            assert y.dtype == want.dtype
            assert y.shape == want.shape
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(),
        Problem(packed=True, softcap=0.5, mode=0),
        Problem(P=3, is_causal=1, scale=0.3, mode=3),
        Problem(P=3, packed=True, mask="float", axes="B 1 T S", softcap=0.5, mode=1),
        Problem(mask="bool", axes="H T S", is_causal=1, softcap=2.0, mode=3),
        Problem(mask="float", axes="B H T S", is_causal=1),
    ],
    ids=str,
)
def test_outputs_match_onnxruntime(problem, opset):
    close_in_float32(replace(problem, opset=opset))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(nonpad=True, is_causal=1, packed=True, mode=3, opset=24),
        EMPTY_ROWS,
        EXTERNAL,
        replace(EVERYTHING, axes="T S"),
        replace(EVERYTHING, axes="S"),
    ],
    ids=str,
)
def test_caches_and_windows_match_onnxruntime(problem):
    close_in_float32(problem)


@pytest.mark.parametrize("opset", [23, 24])
def test_onnxruntime_writes_the_lowest_number_for_minus_infinity(opset):
    """In mode 2, against the definition; onnxruntime 1.32."""
    problem = Problem(is_causal=1, mode=2, scale=0.25, opset=opset)
    z, want = problem.run(np.float32)[0][3], by_onnxruntime(problem)[3]
    np.testing.assert_array_equal(np.isneginf(z), np.isneginf(by_definition(problem)[3]))
    assert np.all(want[np.isneginf(z)] == np.finfo(np.float32).min)
    np.testing.assert_allclose(z[np.isfinite(z)], want[np.isfinite(z)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [23, 24])
def test_onnxruntime_is_not_causal_with_one_query(opset):
    """With a past and several new keys: the query stands at the first of them, and attends none after it."""
    problem = Problem(T=1, L=7, P=3, is_causal=1, mode=3, scale=0.25, opset=opset)
    weights = problem.run()[0][3]
    close(weights, by_definition(problem)[3])
    assert np.all(weights[..., 4:] == 0)
    assert np.all(by_onnxruntime(problem)[3][..., 4:] > 0)
    close_in_float32(replace(problem, is_causal=0))


# ── the past ─────────────────────────────────────────────────────────────────────────────────────────────────────


@every_engine
def test_token_by_token_equals_all_at_once():
    """Outputs, and the gradients through every present; and the present grows where its past lies."""
    N, problem = 5, Problem(T=5, L=5, is_causal=1, mode=3)
    Q, K, V, *_ = problem.inputs()
    ys, cache = problem.run()
    dY = problem.cotangents(ys)[0]
    steps, past = [], (K[:, :, :0], V[:, :, :0])
    for i in range(N):
        at = (..., slice(i, i + 1), slice(None))
        (Y, *present, weights), step = attention(Q[at], K[at], V[at], None, *past, is_causal=1, qk_matmul_output_mode=3)
        close(Y, ys[0][at])
        close(weights, ys[3][at][..., : i + 1])
        grown = [np.shares_memory(a, b) for a, b in zip(past, present, strict=True)]
        steps.append(step)
        past = present
    assert grown == [True, True]

    dpast, want = (None, None), attention_vjp(cache, (dY, None, None, None))
    for i in reversed(range(N)):
        at = (..., slice(i, i + 1), slice(None))
        dQ, dK, dV, _, *dpast = attention_vjp(steps[i], (dY[at], *dpast, None))
        for got, all_at_once in zip((dQ, dK, dV), want, strict=False):
            close(got, all_at_once[at])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_nonpad_kv_seqlen_may_be_of_any_integers(dtype):
    inputs, n = EMPTY_ROWS.inputs(), np.array([2, 3])
    static = EMPTY_ROWS.static()
    got, want = (attention(*inputs, nonpad_kv_seqlen=x, **static)[0] for x in (n.astype(dtype), n))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@every_engine
def test_what_is_not_there_has_no_effect_even_if_it_is_nan():
    problem = replace(EXTERNAL, mask=None, is_causal=1, mode=None)
    Q, K, V, *_ = problem.inputs()
    nonpad = np.array([4, 6])
    gone = ~masks.lengths(nonpad).dense(5, 7)[..., 0, :, None]
    given_ = problem.static() | {"nonpad_kv_seqlen": nonpad}
    (Y, *_), cache = attention(Q, np.where(gone, np.nan, K), np.where(gone, np.nan, V), **given_)
    (want, *_), clean = attention(Q, K, V, **given_)
    np.testing.assert_array_equal(Y, want)
    for got, grad in zip(*(attention_vjp(c, (Y, None, None, None))[:3] for c in (cache, clean)), strict=True):
        np.testing.assert_array_equal(got, grad)


def test_a_fully_masked_row_gives_0_with_gradients_0():
    ys, cache = replace(EMPTY_ROWS, B=1).run()
    empty = 7 - int(replace(EMPTY_ROWS, B=1).nonpad_kv_seqlen()[0])
    assert 0 < empty < 7
    dQ, *_ = attention_vjp(cache, tuple(np.ones_like(y) for y in ys))
    for x in (ys[0], ys[3], dQ):
        assert np.all(x[:, :, :empty] == 0)
        assert np.all(np.any(x[:, :, empty + 1 :] != 0, axis=-1))  # the first that attends one key has dQ = 0


# ── layout and precision ─────────────────────────────────────────────────────────────────────────────────────────


@every_engine
def test_three_axes_equal_four_bit_for_bit():
    problem = replace(EVERYTHING, mode=3)
    Q, K, V, *others = problem.inputs()
    ys, cache = problem.run()
    dys = problem.cotangents(ys)

    def split(x, n):
        return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)

    static = {name: x for name, x in problem.static().items() if "num_heads" not in name}
    (Y, *rest), apart = attention(split(Q, 6), split(K, 2), split(V, 2), *others, **static)
    grads = attention_vjp(apart, (split(dys[0], 6), *dys[1:]))
    got = (split(ys[0], 6), *ys[1:], *(split(g, n) for g, n in zip(attention_vjp(cache, dys), (6, 2, 2), strict=False)))
    for a, b in zip(got, (Y, *rest, *grads[:3]), strict=True):
        np.testing.assert_array_equal(a, b)


@every_engine
@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("precision", [None, FLOAT, FLOAT16, BFLOAT16])
def test_half_types_are_float32_rounded_once(dtype, mode, precision):
    problem = replace(EVERYTHING, mode=mode, softmax_precision=precision)
    ys, cache = problem.run(dtype)
    dys = problem.cotangents(ys)
    wide, of_wide = attention(
        *(x.astype(np.float32) for x in problem.inputs(dtype)), **EVERYTHING.static() | {"qk_matmul_output_mode": mode}
    )
    grads = attention_vjp(of_wide, tuple(dy.astype(np.float32) for dy in dys))
    for got, want in zip((*ys, *attention_vjp(cache, dys)), (*wide, *grads), strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want.astype(dtype))


@every_engine
@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_softmax_in_double_is_float64_rounded_once(dtype, mode):
    problem = replace(EVERYTHING, mode=mode, softmax_precision=DOUBLE)
    ys, cache = problem.run(dtype)
    dys = problem.cotangents(ys)
    wide, of_wide = attention(*(x.astype(np.float64) for x in problem.inputs(dtype)), **problem.static())
    grads = attention_vjp(of_wide, tuple(dy.astype(np.float64) for dy in dys))
    for got, want in zip((*ys, *attention_vjp(cache, dys)), (*wide, *grads), strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want.astype(dtype))


@pytest.mark.parametrize("problem", [EVERYTHING, replace(EXTERNAL, short=1)], ids=["everything", "external"])
def test_every_array_library_gives_the_same(xp, problem):
    static = problem.static() | {"nonpad_kv_seqlen": problem.nonpad_kv_seqlen()}
    ys, cache = problem.run()
    dys = problem.cotangents(ys)
    inputs = [None if x is None else xp.to(x) for x in problem.inputs()]
    ys2, cache2 = attention(*inputs, **static)
    grads = attention_vjp(cache2, tuple(map(xp.to, dys)))
    for got, want in zip((*ys2, *grads), (*ys, *attention_vjp(cache, dys)), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(xp.back(got), want)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0, 1, 3])
def test_jax_takes_the_pair_as_it_is(mode):
    """jax.custom_vjp(f).defvjp(f, f_vjp) under jit equals JAX's own differentiation of the same."""
    problem = replace(EVERYTHING, mode=mode)

    def f(*inputs):
        return attention(*inputs, **problem.static())

    def loss(f):
        return lambda *inputs: sum((y**3).sum() for y in f(*inputs))

    with jax.enable_x64(True):
        ours = jax.custom_vjp(lambda *inputs: f(*inputs)[0])
        ours.defvjp(f, attention_vjp)
        inputs = [jax.numpy.asarray(x) for x in problem.inputs()]
        grads = (jax.jit(jax.grad(loss(g), tuple(range(6))))(*inputs) for g in (ours, lambda *x: f(*x)[0]))
        for got, want in zip(*grads, strict=True):
            close(got, want)


@every_engine
def test_weights_and_lse_are_read_from_the_cache():
    (*_, weights), cache = replace(EXTERNAL, mode=3).run()
    (*_, z), _ = replace(EXTERNAL, mode=2).run()
    np.testing.assert_array_equal(attention_weights(cache), weights)
    with np.errstate(divide="ignore"):
        close(log_sum_exp(cache), np.log(np.exp(z).sum(-1)))


def test_without_a_mode_the_scores_are_left_out():
    ys, cache = replace(EVERYTHING, mode=None).run()
    want, of_mode = EVERYTHING.run()
    assert ys[3] is None
    dys = (*EVERYTHING.cotangents(ys)[:3], None)
    for got, y in zip((*ys[:3], *attention_vjp(cache, dys)), (*want[:3], *attention_vjp(of_mode, dys)), strict=True):
        np.testing.assert_array_equal(got, y)
    with pytest.raises(ValueError, match="dqk_matmul_output must be None"):
        attention_vjp(cache, (*dys[:3], np.zeros_like(want[3])))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def given_arguments(problem, **changes):
    named = dict(zip(INPUTS, (*problem.inputs(), problem.nonpad_kv_seqlen()), strict=True))
    named |= problem.static() | changes
    return [named.pop(name) for name in INPUTS[:6]], named


PLAIN, PACKED, PAST = Problem(), Problem(packed=True), Problem(P=3)


@pytest.mark.parametrize(
    ("problem", "changes", "error", "words"),
    [
        (PLAIN, {"opset": 22}, ValueError, r"opset must be one of 23, 24, 25 \(25 serves .*\), got 22"),
        (Problem(nonpad=True), {"opset": 23}, ValueError, "nonpad_kv_seqlen must be left out before opset 24"),
        (PLAIN, {"opset": 24, "left_window_size": 2}, ValueError, "left_window_size must be left out before opset 25"),
        (
            PLAIN,
            {"opset": 24, "right_window_size": 0},
            ValueError,
            "right_window_size must be left out before opset 25",
        ),
        (
            PLAIN,
            {"left_window_size": -2},
            ValueError,
            "left_window_size must be at least -1, where -1 is no bound, got -2",
        ),
        (
            PLAIN,
            {"right_window_size": None},
            TypeError,
            "right_window_size must be an int, where -1 is no bound, got None",
        ),
        (PLAIN, {"is_causal": 2}, ValueError, "is_causal must be one of 0, 1"),
        (PLAIN, {"scale": -1.0}, ValueError, "scale must be at least 0, as ONNX .* square root, got -1"),
        (PLAIN, {"softcap": -1.0}, ValueError, "softcap must be above 0, or 0 for none, got -1"),
        (PLAIN, {"qk_matmul_output_mode": 4}, ValueError, "qk_matmul_output_mode must be one of 0, 1, 2, 3, None"),
        (PLAIN, {"softmax_precision": 2}, ValueError, "softmax_precision must be one of 1, 10, 11, 16"),
        (
            PLAIN,
            {"softmax_precision": FLOAT},
            ValueError,
            "softmax_precision must not have fewer bits than float64 as Q has",
        ),
        (PLAIN, {"Q": np.zeros((5, 11))}, ValueError, r"Q must be \(B, H, T, D\) or \(B, T, H·D\), got \(5, 11\)"),
        (PLAIN, {"K": np.zeros((2, 7, 22))}, ValueError, r"K must have 4 axes as Q has, got \(2, 7, 22\)"),
        (PLAIN, {"V": np.zeros((2, 2, 6, 13))}, ValueError, r"V must be \(B, K, L, E\) with .*L=7 as in K"),
        (PLAIN, {"K": np.zeros((2, 4, 7, 11)), "V": np.zeros((2, 4, 7, 13))}, ValueError, "multiple of K=4 as in K"),
        (PLAIN, {"V": np.zeros((2, 2, 7, 13), "float32")}, TypeError, "V must have dtype float64 as Q has"),
        (PLAIN, {"q_num_heads": 6}, ValueError, r"q_num_heads must be left out where Q is \(B, H, T, D\)"),
        (PACKED, {"kv_num_heads": None}, TypeError, "kv_num_heads must be an int where Q is .B, T, H·D., got None"),
        (
            PACKED,
            {"q_num_heads": 5},
            ValueError,
            r"Q must have a last axis that q_num_heads=5 divides, got \(2, 5, 66\)",
        ),
        (PAST, {"past_value": None}, ValueError, "past_key and past_value must come together"),
        (
            PAST,
            {"past_key": np.zeros((2, 2, 3, 4))},
            ValueError,
            r"past_key must be \(B, K, P, D\) with .*D=11 as in Q",
        ),
        (PAST, {"past_value": np.zeros((2, 2, 4, 13))}, ValueError, r"past_value must be .*P=3 as in past_key"),
        (PAST, {"nonpad_kv_seqlen": np.array([1, 2])}, ValueError, "nonpad_kv_seqlen must be left out with past_key"),
        (
            PLAIN,
            {"nonpad_kv_seqlen": [1, 2]},
            TypeError,
            "nonpad_kv_seqlen must be a NumPy array of integers, got list",
        ),
        (PLAIN, {"nonpad_kv_seqlen": np.array([1.0, 2])}, TypeError, "integers, got float64"),
        (PLAIN, {"nonpad_kv_seqlen": np.array([1])}, ValueError, r"nonpad_kv_seqlen must be \(B\) with B=2 as in Q"),
        (PLAIN, {"nonpad_kv_seqlen": np.array([1, 8])}, ValueError, "from 0 to the 7 keys of K"),
        (
            PLAIN,
            {"nonpad_kv_seqlen": np.array([1, 5]), "attn_mask": np.ones((5, 4), bool)},
            ValueError,
            "from 0 to the 4 keys of attn_mask",
        ),
        (PLAIN, {"attn_mask": [True]}, TypeError, "attn_mask must be an array, got list"),
        (
            PLAIN,
            {"attn_mask": np.ones((5, 7), int)},
            TypeError,
            "attn_mask must be boolean, True = attend, or of dtype",
        ),
        (PLAIN, {"attn_mask": np.ones((5, 7), "float32")}, TypeError, "of dtype float64 as Q has"),
        (PLAIN, {"attn_mask": np.array(True)}, ValueError, "attn_mask must have an axis of keys"),
        (PLAIN, {"attn_mask": np.ones((2, 5, 7), bool)}, ValueError, r"attn_mask must broadcast to \(B, H, T, S\)"),
        (PLAIN, {"attn_mask": np.ones((5, 8), bool)}, ValueError, r"attn_mask must broadcast .* got \(5, 8\)"),
        (PLAIN, {"attn_mask": np.ones((5, 6), bool), "opset": 23}, ValueError, r"broadcast .* got \(5, 6\)"),
    ],
)
def test_what_the_operator_does_not_have_is_refused_by_name(problem, changes, error, words):
    inputs, named = given_arguments(problem, **changes)
    with pytest.raises(error, match=words):
        attention(*inputs, **named)


def test_the_definition_cannot_multiply_values_of_another_dtype():
    """The schema has a type for V alone; this is why it is refused."""
    model, _ = node_of(Problem(scale=0.25))
    del model.graph.node[0].output[1:], model.graph.output[1:]
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(DOUBLE, (2, 6, 5, 13)))
    onnx.checker.check_model(definition_of(model), full_check=True)
    model.graph.input[2].type.tensor_type.elem_type = FLOAT
    onnx.checker.check_model(model, full_check=True)
    with pytest.raises(onnx.shape_inference.InferenceError, match=r"MatMul.*inconsistent type"):
        onnx.checker.check_model(definition_of(model), full_check=True)


@pytest.mark.parametrize(
    ("output", "wrong", "words"),
    [
        (0, np.zeros((2, 5, 6)), r"dY must be \(B, T, H·E\) = \(2, 5, 78\)"),
        (1, np.zeros((2, 2, 7, 11)), r"dpresent_key must be \(B, K, S, D\) = \(2, 2, 10, 11\)"),
        (2, np.zeros((2, 2, 7, 13)), r"dpresent_value must be \(B, K, S, E\) = \(2, 2, 10, 13\)"),
        (3, np.zeros((2, 6, 5, 7)), r"dqk_matmul_output must be \(B, H, T, S\) = \(2, 6, 5, 10\)"),
    ],
)
def test_wrong_cotangents_are_refused_by_name(output, wrong, words):
    _, cache = EVERYTHING.run()
    with pytest.raises(ValueError, match=words):
        attention_vjp(cache, tuple(wrong if i == output else None for i in range(4)))
    with pytest.raises(
        TypeError,
        match=r"dy must be \(dY, dpresent_key, dpresent_value, dqk_matmul_output\) as the output is, got ndarray",
    ):
        attention_vjp(cache, wrong)


# ── signature and imports ────────────────────────────────────────────────────────────────────────────────────────


def test_the_vjp_is_the_next_function_and_inputs_are_positional():
    names = [node.name for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]
    assert names[names.index("attention") + 1] == "attention_vjp"
    parameters = inspect.signature(attention).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY] == list(INPUTS[:6])
    assert all(p.kind in (p.POSITIONAL_ONLY, p.KEYWORD_ONLY) for p in parameters)


def test_attributes_and_their_defaults_match_onnx():
    schema = onnx.defs.get_schema("Attention", 25, "")
    defaults = {
        n: helper.get_attribute_value(a.default_value) for n, a in schema.attributes.items() if a.default_value.name
    }
    ours = {p.name: p.default for p in inspect.signature(attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert {*schema.attributes, "nonpad_kv_seqlen", "opset"} == set(ours)
    assert {name: ours[name] for name in schema.attributes} == {n: defaults.get(n) for n in schema.attributes}
    assert schema.since_version == ours["opset"]
    assert [i.name for i in schema.inputs] == list(INPUTS)
    assert [o.name for o in schema.outputs] == list(OUTPUTS)


def test_neither_onnx_nor_a_runtime_is_imported():
    code = "import sys, funcmha.interop.onnx; assert not {'onnx', 'onnxruntime', 'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
