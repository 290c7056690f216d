"""cuDNN's `sdpa` and `sdpa_backward` themselves, with 16-bit types on a GPU, against the adapter in float64.

Without a GPU the same calls are made of the front end over `cudnn_backend.py`, which rounds what the kernels round:
so the calls, the layouts and the bounds are known to be right, and what is left for a GPU is what its engines do.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cudnn_backend
import numpy as np
import pytest
import torch
from cudnn_graphs import Library, backward, forward
from test_interop_cudnn import Problem

from funcmha import attention_weights
from funcmha.interop.cudnn import sdpa, sdpa_vjp, stats

UNIT = {"HALF": 2.0**-11, "BFLOAT16": 2.0**-8}
SIZES = {"H": 4, "T": 64, "S": 128, "D": 64, "E": 64}
NAMES = "o", "stats", "dq", "dk", "dv", "dbias", "dsink_token"
CAUSAL = {"right": 0}
PROBLEMS = {
    "plain": {},
    "scaled": {"scale": 0.125},
    "grouped queries": {"Hk": 2, "Hv": 2},
    "one head of keys": {"scale": 0.125, "layout": "BSHD"},
    "wider values": {"scale": 0.125, "E": 128},
    "top left": {"scale": 0.125, **CAUSAL},
    "bottom right": {"scale": 0.125, "alignment": "bottom_right", **CAUSAL},
    "a band": {"scale": 0.125, "left": 20, **CAUSAL},
    "a band at the bottom right": {"scale": 0.125, "left": 20, "alignment": "bottom_right", **CAUSAL},
    "padding": {"scale": 0.125, "padding": True},
    "padding and bottom right": {"scale": 0.125, "padding": True, "alignment": "bottom_right", **CAUSAL},
    "bias": {"scale": 0.125, "bias": "1 H T S"},
    "alibi": {"scale": 0.125, "alibi": True, **CAUSAL},
    "sink": {"scale": 0.125, "sink": True},
    "dropout": {"scale": 0.125, "dropout": "numbers"},
}


def rounded(problem, io):
    """The problem's inputs and do, as float64 that `io` can hold; a sink in float32."""
    dtype = cudnn_backend.STORAGES[io]
    types = [dtype] * 4 + [torch.float32]
    inputs = [in_its_type(a, t) for a, t in zip(problem.inputs(), types, strict=True)]
    return inputs, in_its_type(problem.cotangents()[0], dtype)


def in_its_type(a, dtype):
    """a, rounded, in the same layout"""
    if a is None:
        return None
    x = torch.tensor(np.array(a)).to(dtype).double().numpy()
    return x if a.flags.c_contiguous else np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def of_cudnn(library, problem):
    """o, stats, dq, dk, dv, dbias and dsink_token, of the types that cuDNN stores, as float64"""
    inputs, do = rounded(problem, library.io)
    graph, _, o, lse = forward(library, inputs, problem.static())
    graph.run()
    o, lse = graph.get(o), graph.get(lse)
    if library.forward:  # the back end without kernels, which makes NaN of fully masked rows
        o, lse = np.nan_to_num(o), np.where(np.isnan(lse), -np.inf, lse)
    graph, outputs = backward(library, inputs, o, do, lse, problem.static())
    graph.run()
    return o, lse, *(graph.get(t) for t in outputs)


def of_groups(x, like):
    """Sums over the query heads of each head of `like`"""
    return x.reshape(*like.shape[:2], -1, *like.shape[2:]).sum(2)


def of_the_adapter(problem, io):
    """The same in float64, and a bound for each of what cuDNN's storage in 16 bits does to it.

    Rounded are p, before it meets v and do, its gradient ds, o and the gradients. δ = Σ do · o is of the rounded o, and
    p of stats in float32. Twice the bound, for sums in float32 and a fast exponential.
    """
    inputs, do = rounded(problem, io)
    u, tiny = UNIT[io], 2.0**-24  # of float16's subnormals, and of float32 for numbers about 1
    static = problem.static()
    q, k, v, bias, sink = inputs
    o, cache = sdpa(*inputs, **static)
    lse, grads = stats(cache), sdpa_vjp(cache, do)
    k, v = (np.repeat(x, problem.H // x.shape[1], 1) for x in (k, v))
    keep, scale = (1.0, 1.0) if problem.drop is None else problem.drop
    p, attn_scale = attention_weights(cache), 1.0 if problem.scale is None else abs(problem.scale)
    kept = np.abs(p * keep * scale)
    dp = np.einsum("bhtd,bhsd->bhts", do, v) * keep * scale
    delta = u * np.sum(np.abs(do * o), -1, keepdims=True)
    in_float32 = 16 * tiny * (1 + np.abs(np.where(np.isfinite(lse), lse, 0.0)))
    ds = u * np.abs(p * (dp - np.sum(do * o, -1, keepdims=True))) + p * (delta + in_float32 * (1 + np.abs(dp)))
    bounds = [
        u * np.einsum("bhts,bhsd->bhtd", kept, np.abs(v)),
        in_float32,
        attn_scale * np.einsum("bhts,bhsd->bhtd", ds, np.abs(k)),
        of_groups(attn_scale * np.einsum("bhts,bhtd->bhsd", ds, np.abs(q)), inputs[1]),
        of_groups(u * np.einsum("bhts,bhtd->bhsd", kept, np.abs(do)), inputs[2]),
        None if bias is None else ds.sum(0, keepdims=True),
        None if sink is None else (np.exp(sink - lse) * delta).sum((0, 2), keepdims=True),
    ]
    want = o, lse, *grads
    of_16_bits = (True, False, True, True, True, True, False)
    return want, [
        None if x is None else 2 * (b + (u * np.abs(x) if half else 0) + tiny)
        for x, b, half in zip(want, bounds, of_16_bits, strict=True)
    ]


def agree(got, problem, io):
    """Where the node writes, which beyond the lengths it need not do."""
    n_q, n_kv = problem.lengths if problem.padding else (np.full(problem.B, n) for n in (problem.T, problem.S))
    rows, cols = (
        np.arange(size)[:, None] < n[:, None, None, None] for size, n in ((problem.T, n_q), (problem.S, n_kv))
    )
    written = rows, rows, rows, cols, cols, True, True
    for name, g, w, bound, at in zip(NAMES, got, *of_the_adapter(problem, io), written, strict=True):
        if w is None:
            assert g is None, name
            continue
        with np.errstate(invalid="ignore"):
            off = np.where(at & (g != w), np.abs(g - w) / bound, 0.0)
        assert (off <= 1).all(), f"{name}: {off.max()} of its bound"


@pytest.mark.parametrize("io", UNIT)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_calls_and_the_bounds_without_a_gpu(name, io):
    if why := cudnn_backend.missing():
        pytest.skip(why)
    problem = Problem(**SIZES | PROBLEMS[name])
    library = cudnn_backend.rounding(cudnn_backend.install(), io)
    *got, dsink = of_cudnn(library, problem)
    agree((*got, None if dsink is None else -dsink), problem, io)  # a wrong sign, see test_interop_cudnn_graph.py


# ── with a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────


def on_the_gpu(problem, io):
    """`of_cudnn` over libcudnn, or why it refuses"""
    import cudnn

    handle = cudnn.create_handle()

    def run(graph, bound):
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        graph.execute({t.get_uid(): x.data_ptr() for t, x in bound.items()}, workspace.data_ptr(), handle)
        torch.cuda.synchronize()

    place = {name: {"dtype": dtype, "device": "cuda"} for name, dtype in cudnn_backend.STORAGES.items()}
    library = Library(cudnn, handle, run, place.__getitem__, {}, {}, io)
    try:
        return of_cudnn(library, problem)
    except cudnn.cudnnGraphNotSupportedError as error:
        return str(error)


@pytest.fixture(scope="module")
def other_process():
    """Which has no back end without kernels in it."""
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device for PyTorch")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.gpu
@pytest.mark.parametrize("io", UNIT)
@pytest.mark.parametrize("name", PROBLEMS)
def test_cudnn_itself(other_process, name, io):
    problem = Problem(**SIZES | PROBLEMS[name])
    got = other_process.submit(on_the_gpu, problem, io).result()
    if isinstance(got, str):
        pytest.skip(f"cuDNN has no kernel for it here: {got}")
    agree(got, problem, io)
