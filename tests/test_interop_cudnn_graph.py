"""cuDNN's `sdpa` and `sdpa_backward` against cuDNN's own definition of them, run on a CPU in float64.

The oracle is the front end of cuDNN itself, `nvidia-cudnn-frontend`, over the back end of `cudnn_backend.py`, which
computes the operations that the front end takes attention apart into. The engines of libcudnn, which need a GPU, are
held to by `test_interop_cudnn_gpu.py`.
"""

import inspect
import re
from typing import NamedTuple

import cudnn_backend
import numpy as np
import pytest
import torch
from cudnn_graphs import Graph, arguments, backward, forward
from hypothesis import find, given, settings
from hypothesis import strategies as st
from test_interop_cudnn import Problem, close

from funcmha import attention, attention_vjp, log_sum_exp
from funcmha.biases import alibi_slopes
from funcmha.interop.cudnn import from_ragged, from_ragged_vjp, sdpa, sdpa_vjp, stats, to_ragged, to_ragged_vjp

BIASES = ("none", "B H T S", "1 H T S", "B 1 T S", "1 1 T S")


@pytest.fixture(scope="module")
def library():
    if why := cudnn_backend.missing():
        pytest.skip(why)
    return cudnn_backend.install()


# ── problems that the front end takes ────────────────────────────────────────────────────────────────────────────


@st.composite
def problems(draw):
    """Everything that it takes together, which is less than `sdpa` does."""
    Hk, Hv, H = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (2, 2, 6), (1, 3, 3), (3, 1, 6), (2, 3, 6), (4, 2, 8)]))
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


def o_and_stats(library, inputs, static, more=lambda graph: {}):
    graph, _, o, lse = forward(library, inputs, static, more)
    graph.run()
    return graph.get(o), graph.get(lse)


def gradients(library, inputs, o, do, lse, static, more=lambda graph: {}):
    graph, outputs = backward(library, inputs, o, do, lse, static, more)
    graph.run()
    return [graph.get(t) for t in outputs]


def check(library, problem, static, of_graph):
    """The adapter with `static` against the graph with `of_graph`, values and gradients."""
    inputs, (do, _) = problem.inputs(), problem.cotangents()
    got, cache = sdpa(*inputs, **static)
    o, lse = o_and_stats(library, inputs, of_graph)
    close(got, o)
    close(stats(cache), lse)
    *want, dsink = gradients(library, inputs, got, do, stats(cache), of_graph)
    for dx, g in zip(sdpa_vjp(cache, do), (*want, None if dsink is None else -dsink), strict=True):
        close(dx, g)


@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_o_and_stats_match_cudnns_graph(library, each_engine, problem):
    """Except fully masked rows: there the operations make NaN, the engines 0 and −∞ as `sdpa` does."""
    inputs, static = problem.inputs(), problem.static()
    o, lse = o_and_stats(library, inputs, static)
    got, cache = sdpa(*inputs, **static)
    nothing = np.isnan(lse)
    np.testing.assert_array_equal(np.isneginf(stats(cache)), nothing)
    close(np.where(nothing, 0.0, stats(cache)), np.where(nothing, 0.0, lse))
    close(got, np.where(nothing, 0.0, o))


@settings(max_examples=2 * settings().max_examples)
@given(problems())
def test_gradients_match_cudnns_graph(library, each_engine, problem):
    """From o and stats of `sdpa`. The gradient of a sink has the other sign in the graph: see below."""
    inputs, static, (do, _) = problem.inputs(), problem.static(), problem.cotangents()
    o, cache = sdpa(*inputs, **static)
    *want, dsink = gradients(library, inputs, o, do, stats(cache), static)
    *got, dsink_token = sdpa_vjp(cache, do)
    for dx, g in zip(got, want, strict=True):
        close(dx, g)
    close(dsink_token, None if dsink is None else -dsink)


@given(problems())
def test_gradients_match_autograd_of_the_forward_graph(library, problem):
    """Those of stats too, and of a sink with its own sign; where no row is fully masked, as NaN has no gradient."""
    inputs, static, (do, dstats) = problem.inputs(), problem.static(), problem.cotangents()
    graph, tensors, o, lse = forward(library, inputs, static, wants_gradient=True)
    graph.run()
    if np.isnan(graph.get(lse)).any():
        return
    leaves = [graph.bound[t] for t in tensors if t is not None]
    o, lse = (graph.memory.values[t.get_uid()] for t in (o, lse))
    loss = (o * torch.tensor(np.array(do))).sum() + (lse * torch.tensor(dstats)).sum()
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    _, cache = sdpa(*inputs, **static)
    for dx, t in zip(sdpa_vjp(cache, do, dstats=dstats), tensors, strict=True):
        g = None if t is None else next(found)
        close(dx, None if t is None else g.as_strided(t.get_dim(), t.get_stride()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        "H > Hv > Hk > 1",
        "alibi and bias == 'B 1 T S' and B > 1 and T > 1",
        "padding and alignment == 'bottom_right' and right and left and B > 1 and T > S",
        "not padding and alignment == 'bottom_right' and T < S and right and sink",
        "padding and sink and alibi and left and dropout != 'none' and layout == 'BSHD'",
    ],
)
def test_the_problems_are_not_vacuous(flag):
    assert find(problems(), lambda problem: eval(flag, dict(vars(problem))), settings=settings(max_examples=5000))


# ── one thing at a time ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_gradient_of_a_sink_has_the_wrong_sign_in_the_graph(library):
    """Its operations are Σ exp(sink − stats) · δ without a minus, up to 1.32 of the front end.

    The derivative of the forward graph has it, and so has the reference that the front end's tests hold the engines to:
    these must know better.
    """
    problem = Problem(D=8, E=8, sink=True)
    inputs, (do, _) = problem.inputs(), problem.cotangents()
    o, cache = sdpa(*inputs)
    dsink_token = sdpa_vjp(cache, do)[-1]
    graph, tensors, out, _ = forward(library, inputs, {}, wants_gradient=True)
    graph.run()
    loss = (graph.memory.values[out.get_uid()] * torch.tensor(np.array(do))).sum()
    (right,) = torch.autograd.grad(loss, [graph.bound[tensors[-1]]])
    close(dsink_token.ravel(), right)
    close(dsink_token, -gradients(library, inputs, o, do, stats(cache), {})[-1])


@pytest.mark.parametrize(
    "older",
    [
        {"use_causal_mask": True},
        {"use_causal_mask_bottom_right": True},
        {"sliding_window_length": 2},
        {"use_causal_mask": True, "sliding_window_length": 3},
        {"use_causal_mask_bottom_right": True, "sliding_window_length": 2},
        {"sliding_window_length": 2, "diagonal_alignment": "bottom_right"},
        {"sliding_window_length": 2, "diagonal_band_right_bound": 1},
        {"use_causal_mask": True, "diagonal_band_left_bound": 2},
        {"use_causal_mask": True, "use_alibi_mask": True},
    ],
)
def test_the_older_options_match_cudnns_graph(library, older):
    check(library, Problem(D=8, E=8), older, older)


@pytest.mark.parametrize(("left", "right"), [(0, None), (-1, 3), (0, 2)])
def test_left_bounds_below_one_match_cudnns_graph(library, left, right):
    """Which the documentation does not tell of, and `sdpa_backward` refuses."""
    static = {"diagonal_band_left_bound": left, "diagonal_band_right_bound": right}
    inputs = Problem(D=8, E=8, S=11).inputs()
    o, lse = o_and_stats(library, inputs, static)
    got, cache = sdpa(*inputs, **static)
    close(got, o)
    close(stats(cache), lse)


@pytest.mark.parametrize("right", [0, 2])
def test_bottom_right_diagonals_equal_shifted_top_left_ones(library, right):
    """It is the top-left one, further right by S_kv − S_q, of which there is a graph with bias, sink and dropout."""
    problem = Problem(B=2, H=6, Hk=2, Hv=3, D=8, E=16, bias="B H T S", sink=True, dropout="booleans")
    static = {"dropout": problem.drop, "diagonal_band_right_bound": right, "diagonal_alignment": "bottom_right"}
    of_graph = {"dropout": problem.drop, "diagonal_band_right_bound": right + problem.S - problem.T}
    check(library, problem, static, of_graph)


@pytest.mark.parametrize("H", [2, 3, 5, 6, 7, 8, 12, 13, 16, 24, 40, 71])
def test_alibi_slopes_are_the_front_ends_table(library, H):
    inputs = Problem(B=1, H=H, T=2, S=3, D=8, E=8).inputs()
    graph, *_ = forward(library, inputs, {"use_alibi_mask": True, "diagonal_band_right_bound": 0})
    graph.run()
    (table,) = {a.tobytes(): a for a in graph.memory.given if a.size == H and a.shape == (1, H, 1, 1)}.values()
    np.testing.assert_array_max_ulp(table.ravel(), alibi_slopes(H).astype(np.float32), maxulp=2)


@pytest.mark.parametrize("p", [0.5, 0.75])
def test_dropout_of_cudnn_is_its_rng_dump_and_a_scale(library, p):
    """The other form is (probability, seed, offset): the mask is what it dumps, and the scale 1 / (1 − probability)."""
    problem, dumps = Problem(D=8, E=8), []
    inputs, (do, _) = problem.inputs(), problem.cotangents()

    def drawn(graph):
        dump = graph.argument(np.empty((problem.B, problem.H, problem.T, problem.S)))
        dumps.append((graph, dump))
        seed, offset = (graph.tensor(np.full((1, 1, 1, 1), x)) for x in (3, 5))
        return {"dropout": (p, seed, offset), "rng_dump": dump}

    o, lse = o_and_stats(library, inputs, {}, drawn)
    keep = dumps[0][0].get(dumps[0][1])
    assert 0 < keep.mean() < 1
    got, cache = sdpa(*inputs, dropout=(keep, 1 / (1 - p)))
    close(got, o)
    close(stats(cache), lse)
    for dx, g in zip(sdpa_vjp(cache, do), gradients(library, inputs, o, do, lse, {}, drawn), strict=True):
        close(dx, g)


def test_a_soft_cap_in_a_score_mod_matches_softcap(library):
    """`sdpa` has no cap, which cuDNN writes as operations on the scores; `funcmha.attention` has it at that place."""
    problem, softcap = Problem(Hk=3, Hv=3, D=8, E=16, scale=0.5), 1.5
    inputs, (do, _) = problem.inputs(), problem.cotangents()
    static = {"attn_scale": problem.scale}

    def capped(graph):
        number, saved = graph.tensor(np.full((1, 1, 1, 1), softcap), "FLOAT"), []

        def score_mod(inner, score):
            saved.append(inner.div(score, number))
            return inner.mul(inner.tanh(saved[0]), number)

        def score_mod_bprop(inner, dscore):
            return inner.div(inner.tanh_backward(inner.mul(dscore, number), saved[0]), number)

        return {"score_mod": score_mod, "score_mod_bprop": score_mod_bprop}

    def only_forward(graph):
        return {"score_mod": capped(graph)["score_mod"]}

    o, lse = o_and_stats(library, inputs, static, only_forward)
    got, cache = attention(*inputs[:3], scale=problem.scale, softcap=softcap)
    close(got, o)
    close(log_sum_exp(cache)[..., None], lse)
    want = gradients(library, inputs, o, do, lse, static, capped)
    for dx, g in zip(attention_vjp(cache, do)[:3], want, strict=False):
        close(dx, g)


# ── what is refused, and what is not ─────────────────────────────────────────────────────────────────────────────

PADDED = {"use_padding_mask": True, "seq_len_q": np.array([3, 1]), "seq_len_kv": np.array([7, 0])}
CAUSAL = {"diagonal_band_right_bound": 0}


@pytest.mark.parametrize(
    ("sizes", "static"),
    [
        ({}, {"use_padding_mask": True}),
        ({}, PADDED | {"use_padding_mask": False}),
        ({}, PADDED | {"seq_len_kv": None}),
        ({}, {"diagonal_band_right_bound": -1}),
        ({}, {"use_alibi_mask": True}),
        ({}, {"use_alibi_mask": True, "diagonal_band_right_bound": 1}),
        ({"H": 3, "Hk": 2}, {}),
        ({"H": 4, "Hv": 3}, {}),
    ],
)
def test_contradictions_there_are_refused_here(library, sizes, static):
    inputs = Problem(D=8, E=8, **sizes).inputs()
    with pytest.raises((ValueError, RuntimeError, library.cudnn.cudnnGraphNotSupportedError)):
        o_and_stats(library, inputs, static)
    with pytest.raises(ValueError, match=r" must "):
        sdpa(*inputs, **static)


@pytest.mark.parametrize(
    ("sizes", "static"),
    [
        ({"D": 12}, {}),
        ({"E": 13}, {}),
        ({"T": 1, "sink": True}, {}),
        ({"T": 7, "S": 5}, {"diagonal_band_left_bound": 2}),
        ({"T": 7, "S": 5}, CAUSAL | {"diagonal_alignment": "bottom_right"}),
        ({"bias": "1 1 T S"}, CAUSAL | {"diagonal_alignment": "bottom_right"}),
        ({}, CAUSAL | {"diagonal_alignment": "bottom_right", "use_alibi_mask": True}),
        ({}, CAUSAL | {"diagonal_alignment": "bottom_right", "dropout": (np.ones((1, 3, 5, 7)), 1.0)}),
    ],
)
def test_what_has_no_kernel_there_is_supported_here(library, sizes, static):
    inputs = Problem(**{"D": 8, "E": 8} | sizes).inputs()
    with pytest.raises(library.cudnn.cudnnGraphNotSupportedError):
        o_and_stats(library, inputs, static)
    o, _ = sdpa(*inputs, **static)
    assert np.isfinite(o).all()


NOT_SUPPORTED = {
    "is_inference": "`stats` reads stats",
    "generate_stats": "`stats` reads stats",
    "stats_use_log2": "`stats(log2=True)`",
    "score_max": "stats are score_max + log(score_sum_exp)",
    "score_sum_exp": "stats are score_max + log(score_sum_exp)",
    "rng_dump": "no random numbers are drawn",
    "block_mask": "has no gradient in cuDNN; masks of blocks are funcmha.masks'",
    "paged_attention_k_table": "has no gradient in cuDNN",
    "paged_attention_v_table": "has no gradient in cuDNN",
    "paged_attention_max_seq_len_kv": "has no gradient in cuDNN",
    "score_mod": "is a graph of cuDNN's; a soft cap is `softcap` of funcmha.attention",
    "cu_seq_len_q": "seq_len_q is its differences",
    "cu_seq_len_kv": "seq_len_kv is its differences",
    "max_total_seq_len_q": "bounds the workspace",
    "max_total_seq_len_kv": "bounds the workspace",
    "compute_data_type": "float32 or the type of the inputs",
    "implementation": "changes no result",
    "unfuse_fma": "changes roundings",
    "name": "changes no result",
    "score_mod_bprop": "as score_mod",
    "use_deterministic_algorithm": "`sdpa_vjp` is",
}
OF_THE_GRADIENT = {"o", "dO", "stats", "dBias", "dSink_token"}  # what `sdpa_vjp` takes and returns


@pytest.mark.parametrize("node", ["sdpa", "sdpa_backward"])
def test_every_argument_of_the_node_is_known(library, node):
    signature = getattr(library.cudnn._pybind_module.backend_graph, node).__doc__.split("\n")[0]
    there = dict(re.findall(r"(\w+): [^=()]*?(?: = ([^,)]+))?(?=, \w+:|\) ->)", signature))
    assert there.keys() >= {"q", "use_alibi_mask", "diagonal_alignment"}
    here = inspect.signature(sdpa).parameters
    assert there.keys() - {"self"} - OF_THE_GRADIENT <= here.keys() | NOT_SUPPORTED.keys()
    assert here.keys() <= there.keys()
    for name, parameter in here.items():
        if there[name] and parameter.default is not inspect.Parameter.empty:
            assert str(parameter.default).lower() in there[name].lower(), name


# ── packed tensors ───────────────────────────────────────────────────────────────────────────────────────────────


class Side(NamedTuple):
    """Where three sequences are in N tokens: of the queries, or of the keys and values."""

    N: int
    s: int  # what they are padded to
    seq_len: np.ndarray
    start: np.ndarray  # in tokens

    def where(self, x):
        return {"ragged_offset": self.start * x[0].size, "seq_len": self.seq_len}

    def offset(self, graph, x):
        return graph.tensor(self.where(x)["ragged_offset"].astype(np.int32).reshape(-1, 1, 1, 1))

    def tensor(self, graph, x):
        return graph.ragged(x, self.offset(graph, x), 3, self.s)

    def output(self, graph, t, x):
        graph.output(t, (3, x.shape[1], self.s, x.shape[2]), offset=self.offset(graph, x), N=self.N)


QUERIES = Side(9, 5, np.array([3, 1, 4]), np.array([1, 4, 5, 9]))  # with a gap before the first
KEYS = Side(11, 6, np.array([2, 5, 4]), np.array([0, 2, 7, 11]))


def packed_forward(library, inputs, like, static):
    """o (N, H, D) of the graph"""
    graph = Graph(library)
    tensors = [side.tensor(graph, x) for side, x in zip((QUERIES, KEYS, KEYS), inputs, strict=True)]
    out, lse = graph.graph.sdpa(*tensors, generate_stats=True, **library.forward, **arguments(graph, static, 1))
    QUERIES.output(graph, out, like)
    graph.output(lse, (3, like.shape[1], QUERIES.s, 1), "FLOAT")
    graph.run()
    return graph.flat(out).reshape(like.shape).numpy()


def packed_backward(library, inputs, o, do, lse, static):
    """dq, dk and dv (N, H, D) of the graph"""
    graph, sides = Graph(library), (QUERIES, KEYS, KEYS)
    tensors = [side.tensor(graph, x) for side, x in zip((*sides, QUERIES, QUERIES), (*inputs, o, do), strict=True)]
    lse = graph.tensor(np.ascontiguousarray(lse), "FLOAT")
    found = graph.graph.sdpa_backward(*tensors, lse, **arguments(graph, static, 2))
    for side, t, x in zip(sides, found, inputs, strict=True):
        side.output(graph, t, x)
    graph.run()
    return [graph.flat(t).reshape(x.shape).numpy() for t, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_packed_tensors_match_cudnns_graph(library, alignment):
    """In a gap `to_ragged` has 0, and cuDNN what was there."""
    rng = np.random.default_rng(0)
    q, do = rng.standard_normal((QUERIES.N, 6, 8)), rng.standard_normal((QUERIES.N, 6, 16))
    inputs = q, rng.standard_normal((KEYS.N, 3, 8)), rng.standard_normal((KEYS.N, 2, 16))
    static = {"use_padding_mask": True, "seq_len_q": QUERIES.seq_len, "seq_len_kv": KEYS.seq_len}
    static |= {"diagonal_alignment": alignment, "diagonal_band_right_bound": 1, "diagonal_band_left_bound": 3}
    moves = [from_ragged(x, **side.where(x), s=side.s) for side, x in zip((QUERIES, KEYS, KEYS), inputs, strict=True)]
    o, cache = sdpa(*(x for x, _ in moves), **static)
    y, y_cache = to_ragged(o, **QUERIES.where(do), n=QUERIES.N)
    written = packed_forward(library, inputs, do, static)
    np.testing.assert_array_equal(np.isnan(written).all((1, 2)), np.arange(QUERIES.N) == 0)
    close(y[1:], written[1:])

    grads = sdpa_vjp(cache, *to_ragged_vjp(y_cache, do))
    want = packed_backward(library, inputs, y, do, stats(cache), static)
    for (_, move), side, dx, g in zip(moves, (QUERIES, KEYS, KEYS), grads, want, strict=False):
        close(from_ragged_vjp(move, dx)[0][side.start[0] :], g[side.start[0] :])
