"""cuDNN's `sdpa` and `sdpa_backward` against cuDNN's own definition of them, run on a CPU in float64.

The oracle is the front end of cuDNN itself, `nvidia-cudnn-frontend`, over the back end of `cudnn_backend.py`, which
computes the operations that the front end takes attention apart into. The engines of libcudnn, which need a GPU, are
held to by `test_interop_cudnn_gpu.py`.
"""

import dataclasses
import inspect
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from test_interop_cudnn import Problem, close

import cudnn_backend
from funcmha import attention, attention_vjp
from funcmha.interop.cudnn import sdpa, sdpa_vjp, stats
from funcmha.interop.cudnn_ragged import from_ragged, from_ragged_vjp, to_ragged, to_ragged_vjp

BIASES = ("none", "B H T S", "1 H T S", "B 1 T S", "1 1 T S")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for cudnn_backend.c")
    return cudnn_backend.install(tmp_path_factory.mktemp("cudnn"))


# ── a graph, and the storages of its tensors ─────────────────────────────────────────────────────────────────────


class Graph:
    """A graph of cuDNN's with tensors that are bound to float64, whatever type it believes them to have."""

    def __init__(self, library):
        self.library, self.types, self.bound = library, library.cudnn.data_type, {}
        self.graph = library.cudnn.pygraph(
            io_data_type=self.types.HALF,
            intermediate_data_type=self.types.FLOAT,
            compute_data_type=self.types.FLOAT,
            handle=library.handle,
            sm_version=90,
        )

    def tensor(self, a, wants_gradient=False):
        """An input in the layout of a, or None of None."""
        if a is None:
            return None
        integers = a.dtype.kind in "iu"
        strides = dense(a.shape) if a.flags.c_contiguous else tokens_first(a.shape)
        storage = torch.empty(a.size, dtype=DTYPES[integers])
        storage.as_strided(a.shape, strides).copy_(torch.tensor(np.array(a)))
        storage.requires_grad_(wants_gradient)
        dtype = self.types.INT32 if integers else self.types.HALF
        t = self.graph.tensor(dim=list(a.shape), stride=strides, data_type=dtype)
        self.bound[t] = storage
        return t

    def like(self, a, dtype=None):
        """An output argument that the node writes to, or None of None."""
        if a is None:
            return None
        t = self.graph.tensor(dim=list(a.shape), stride=dense(a.shape), data_type=dtype or self.types.HALF)
        return self.output(t, a)

    def output(self, t, a, dtype=None):
        """An output with the shape of a, and dense: its storage is all NaN before."""
        t.set_output(True).set_dim(list(a.shape)).set_stride(dense(a.shape))
        if dtype is not None:
            t.set_data_type(dtype)
        self.bound[t] = torch.full((a.size,), torch.nan, dtype=torch.float64)
        return t

    def run(self):
        self.memory = self.library.run(self.graph, self.bound)

    def get(self, t):
        return None if t is None else self.bound[t].as_strided(t.get_dim(), t.get_stride()).detach().numpy()

    def value(self, t):
        """With its history, for PyTorch's autograd."""
        return self.memory.values[t.get_uid()]


DTYPES = {True: torch.int64, False: torch.float64}


def dense(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def tokens_first(shape):
    """The strides of (B, H, T, D) in memory that is (B, T, H, D)."""
    _, H, T, D = shape
    return [T * H * D, D, H * D, 1]


def options(library, graph, static, scales):
    """The adapter's options as the node takes them: dropout has one scale in the forward, and its inverse later."""
    alignments = library.cudnn.diagonal_alignment
    found = dict(static)
    for name in "seq_len_q", "seq_len_kv":
        n = found.get(name)
        found[name] = None if n is None else graph.tensor(np.reshape(n, (-1, 1, 1, 1)).astype(np.int32))
    if "diagonal_alignment" in found:
        found["diagonal_alignment"] = getattr(alignments, found["diagonal_alignment"].upper())
    if found.get("dropout") is not None:
        mask, scale = found["dropout"]
        scales = [np.full((1, 1, 1, 1), x) for x in (scale, 1 / scale)[:scales]]
        found["dropout"] = tuple(graph.tensor(x) for x in (np.asarray(mask, float), *scales))
    return found


def forward(library, inputs, static, wants_gradient=False, **more):
    """graph, the tensors of its inputs, o and stats: seen through as far as the end of the node"""
    graph = Graph(library)
    q, k, v, bias, sink = tensors = [graph.tensor(a, wants_gradient) for a in inputs]
    found = options(library, graph, static, 1)
    whole = library.cudnn.attention_implementation.COMPOSITE  # the other one is a single operation for the engines
    o, lse = graph.graph.sdpa(
        q=q, k=k, v=v, bias=bias, sink_token=sink, generate_stats=True, implementation=whole, **found, **more
    )
    rows = inputs[0].shape[:3]
    graph.output(o, np.empty((*rows, inputs[2].shape[3])))
    graph.output(lse, np.empty((*rows, 1)), graph.types.FLOAT)
    return graph, tensors, o, lse


def backward(library, inputs, o, do, lse, static, **more):
    """dq, dk, dv, dbias, dsink_token, as cuDNN has the last"""
    graph = Graph(library)
    q, k, v, bias, sink = (graph.tensor(a) for a in inputs)
    dbias, dsink = graph.like(inputs[3]), graph.like(inputs[4], graph.types.FLOAT)
    found = graph.graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=graph.tensor(o),
        dO=graph.tensor(do),
        stats=graph.tensor(lse),
        bias=bias,
        dBias=dbias,
        sink_token=sink,
        dSink_token=dsink,
        **options(library, graph, static, 2),
        **more,
    )
    outputs = [*(graph.output(t, a) for t, a in zip(found, inputs[:3], strict=True)), dbias, dsink]
    graph.run()
    return [graph.get(t) for t in outputs]


# ── problems that the front end takes ────────────────────────────────────────────────────────────────────────────


@st.composite
def problems(draw):
    """Everything that it takes together, which is less than `sdpa` does."""
    Hk, Hv, H = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (2, 2, 6), (1, 3, 3), (3, 1, 6), (2, 3, 6), (4, 2, 4)]))
    alibi, padding, sink = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    alignment = draw(st.sampled_from(["top_left", "bottom_right"]))
    left, right = draw(st.none() | st.integers(1, 5)), draw(st.none() | st.integers(0, 4))
    right = 0 if alibi else right
    ends = alignment == "bottom_right" and right is not None
    alibi = alibi and not ends
    T, S = draw(st.sampled_from([2 if sink else 1, 3, 5, 7])), draw(st.sampled_from([2, 3, 5, 7, 11]))
    if not padding and (ends or left is not None):
        T, S = sorted((T, S))
        T = max(T, 2)
    return Problem(
        B=draw(st.sampled_from([1, 2, 3])),
        Hk=Hk,
        Hv=Hv,
        H=H,
        T=T,
        S=S,
        D=draw(st.sampled_from([8, 24])),
        E=draw(st.sampled_from([8, 16])),
        scale=draw(st.sampled_from([None, 0.25, 0.0, -0.5])),
        bias="none" if ends else draw(st.sampled_from(BIASES)),
        sink=sink,
        alibi=alibi,
        padding=padding,
        alignment=alignment,
        left=left,
        right=right,
        dropout="none" if ends else draw(st.sampled_from(["none", "booleans", "numbers"])),
        layout=draw(st.sampled_from(["BHSD", "BSHD"])),
        seed=draw(st.integers(0, 2**31)),
    )


# ── the laws ─────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_o_and_stats_are_those_of_cudnns_graph(library, each_engine, problem):
    """But for a query that sees no key, of which the operations make NaN, and the engines 0 and −∞ as `sdpa` does."""
    inputs, static = problem.inputs(), problem.static()
    graph, _, o, lse = forward(library, inputs, static)
    graph.run()
    o, lse = graph.get(o), graph.get(lse)

    got, cache = sdpa(*inputs, **static)
    nothing = np.isnan(lse)
    np.testing.assert_array_equal(np.isneginf(stats(cache)), nothing)
    close(np.where(nothing, 0.0, stats(cache)), np.where(nothing, 0.0, lse))
    close(got, np.where(nothing, 0.0, o))


@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_gradients_are_those_of_cudnns_graph(library, each_engine, problem):
    """From o and stats of `sdpa`. The gradient of a sink has the other sign in the graph: see below."""
    inputs, static, (do, _) = problem.inputs(), problem.static(), problem.cotangents()
    o, cache = sdpa(*inputs, **static)
    *want, dsink = backward(library, inputs, o, do, stats(cache), static)
    *got, dsink_token = sdpa_vjp(cache, do)
    for dx, g in zip(got, want, strict=True):
        close(dx, g)
    close(dsink_token, None if dsink is None else -dsink)


@given(problems())
def test_gradients_are_those_of_autograd_through_cudnns_forward_graph(library, problem):
    """Those of stats too, and of a sink with its own sign; where each query sees a key, as NaN has no gradient."""
    inputs, static, (do, dstats) = problem.inputs(), problem.static(), problem.cotangents()
    graph, tensors, o, lse = forward(library, inputs, static, wants_gradient=True)
    graph.run()
    if np.isnan(graph.get(lse)).any():
        return
    leaves = [graph.bound[t] for t in tensors if t is not None]
    loss = (graph.value(o) * torch.tensor(np.array(do))).sum() + (graph.value(lse) * torch.tensor(dstats)).sum()
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    _, cache = sdpa(*inputs, **static)
    for dx, t in zip(sdpa_vjp(cache, do, dstats=dstats), tensors, strict=True):
        g = None if t is None else next(found)
        close(dx, None if t is None else g.as_strided(t.get_dim(), t.get_stride()))
