"""cuDNN's `sdpa` against its documentation and Python reference, written out densely in float64 PyTorch.

The oracle here has all that `sdpa` does, also what cuDNN refuses for want of a kernel. The definition in cuDNN's own
front end is that of `test_interop_cudnn_graph.py`, and its kernels that of `test_interop_cudnn_gpu.py`.
"""

import enum
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from oracles import gradients, tensor

from funcmha import attention, attention_weights, log_sum_exp, masks
from funcmha.interop.cudnn import from_ragged, from_ragged_vjp, sdpa, sdpa_vjp, stats, to_ragged, to_ragged_vjp
from funcmha.testing import check_vjp

LAYOUTS = ("BHSD", "BSHD", "reversed", "read-only")
BIASES = ("none", "B H T S", "1 H T S", "B 1 T S", "1 1 T S", "1 H 1 S", "B 1 T 1")


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    B: int = 2
    Hk: int = 1
    Hv: int = 1
    H: int = 3
    T: int = 5
    S: int = 7
    D: int = 11
    E: int = 13
    scale: float | None = None
    bias: str = "none"
    sink: bool = False
    alibi: bool = False
    padding: bool = False
    alignment: str = "top_left"
    left: int | None = None
    right: int | None = None
    dropout: str = "none"
    layout: str = "BHSD"
    seed: int = 0

    @property
    def rng(self):
        return np.random.default_rng(self.seed)

    def _shape(self, axes):
        return tuple({"1": 1, "B": self.B, "H": self.H, "T": self.T, "S": self.S}[a] for a in axes.split())

    def inputs(self):
        """q, k, v, bias or None, sink_token or None"""
        rng = self.rng
        sizes = (self.H, self.T, self.D), (self.Hk, self.S, self.D), (self.Hv, self.S, self.E)
        q, k, v = (laid(rng.standard_normal((self.B, *n)), self.layout) for n in sizes)
        bias = None if self.bias == "none" else rng.standard_normal(self._shape(self.bias))
        return q, k, v, bias, rng.standard_normal((1, self.H, 1, 1)) if self.sink else None

    def cotangents(self):
        """do, dstats"""
        rows = (self.B, self.H, self.T)
        rng = np.random.default_rng(self.seed + 1)
        return laid(rng.standard_normal((*rows, self.E)), self.layout), rng.standard_normal((*rows, 1))

    @property
    def lengths(self):
        """seq_len_q, seq_len_kv (B,), or None"""
        rng = np.random.default_rng(self.seed + 2)
        n = rng.integers(0, self.T + 1, self.B), rng.integers(0, self.S + 1, self.B)
        return n if self.padding else (None, None)

    @property
    def drop(self):
        """(mask, scale) or None"""
        rng = np.random.default_rng(self.seed + 3)
        mask = rng.random((1 if self.dropout == "for all" else self.B, self.H, self.T, self.S)) >= 0.25
        mask = mask if self.dropout == "booleans" else mask.astype(float)
        return None if self.dropout == "none" else (mask, 1 / (1 - 0.25))

    def static(self):
        n_q, n_kv = self.lengths
        return {
            "attn_scale": self.scale,
            "use_alibi_mask": self.alibi,
            "use_padding_mask": self.padding,
            "seq_len_q": None if n_q is None else n_q.reshape(-1, 1, 1, 1).astype(np.int32),
            "seq_len_kv": n_kv,
            "diagonal_alignment": self.alignment,
            "diagonal_band_left_bound": self.left,
            "diagonal_band_right_bound": self.right,
            "dropout": self.drop,
        }


def laid(a, layout):
    """The same numbers, another way in memory: cuDNN takes any strides."""
    if layout == "BSHD":
        return np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "reversed":
        return np.ascontiguousarray(a[:, ::-1, ::-1])[:, ::-1, ::-1]
    a.flags.writeable = layout != "read-only"
    return a


@st.composite
def problems(draw):
    size = st.sampled_from([1, 2, 3, 5, 7])
    Hk, Hv = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (6, 2), (2, 4)]))
    alibi = draw(st.booleans())
    right = draw(st.none() | st.integers(0, 4))
    return Problem(
        B=draw(st.sampled_from([1, 2, 3])),
        Hk=Hk,
        Hv=Hv,
        H=int(np.lcm(Hk, Hv)) * draw(st.sampled_from([1, 2])),
        T=draw(size),
        S=draw(size),
        D=draw(st.sampled_from([1, 2, 11])),
        E=draw(st.sampled_from([1, 3, 13])),
        scale=draw(st.sampled_from([None, 0.3, 0.0, -0.5])),
        bias=draw(st.sampled_from(BIASES)),
        sink=draw(st.booleans()),
        alibi=alibi,
        padding=draw(st.booleans()),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        left=draw(st.none() | st.integers(1, 5)),
        right=0 if alibi else right,
        dropout=draw(st.sampled_from(["none", "booleans", "numbers", "for all"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**31)),
    )


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────


def slopes(H):
    """As many as the greatest power of two have a geometric sequence, and what is left the odd members of another."""
    n = 2 ** int(np.floor(np.log2(H)))
    return [2.0 ** (-8 / n * (h + 1)) for h in range(n)] + [2.0 ** (-4 / n * (2 * h + 1)) for h in range(H - n)]


def forbidden(problem):
    """(B, 1, T, S), as the documentation and the reference have it"""
    T, S = problem.T, problem.S
    i, j = torch.arange(T)[:, None], torch.arange(S)[None, :]
    n_q, n_kv = problem.lengths if problem.padding else ([T] * problem.B, [S] * problem.B)
    found = []
    for a, b in zip(n_q, n_kv, strict=True):
        diagonal = int(b) - int(a) if problem.alignment == "bottom_right" else 0
        no = (i >= int(a)) | (j >= int(b))
        no = no if problem.right is None else no | (j - i > diagonal + problem.right)
        no = no if problem.left is None else no | (j - i <= diagonal - problem.left)
        found.append(no)
    return torch.stack(found)[:, None]


def reference(problem, q, k, v, bias, sink):
    """o, stats, weights"""
    no = forbidden(problem)
    k, v = (x.repeat_interleave(problem.H // x.shape[1], dim=1) for x in (k, v))
    s = torch.einsum("bhtd,bhsd->bhts", q, k)
    s = s if problem.scale is None else problem.scale * s
    s = s if bias is None else s + bias
    if problem.alibi:
        distance = torch.arange(problem.S)[None, :] - torch.arange(problem.T)[:, None]
        s = s + torch.tensor(slopes(problem.H), dtype=torch.float64)[:, None, None] * distance
    s = s.masked_fill(no, -torch.inf)
    z = s if sink is None else torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)
    empty = (z == -torch.inf).all(-1, keepdim=True)
    z = z.masked_fill(empty, 0.0)
    lse = z.logsumexp(-1, keepdim=True)
    p = torch.exp(z - lse)[..., : problem.S].masked_fill(empty, 0.0)
    a = p if problem.drop is None else p * torch.tensor(np.array(problem.drop[0])) * problem.drop[1]
    return a @ v, lse.masked_fill(empty, -torch.inf), p


def close(got, want):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    if want is None or got is None:
        assert got is want
        return
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    with np.errstate(invalid="ignore"):
        off = np.where(got == want, 0.0, np.abs(got - want))
    assert off.max(initial=0) <= 1e-11 * max(1, np.abs(np.where(np.isfinite(want), want, 0)).max(initial=0))


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=3 * settings().max_examples)
@given(problems())
def test_values_and_gradients(each_engine, problem):
    inputs, (do, dstats) = problem.inputs(), problem.cotangents()
    leaves = [tensor(x) for x in inputs]
    o, lse, p = reference(problem, *leaves)
    want = gradients([o, torch.where(lse == -torch.inf, 0.0, lse)], [do, dstats], leaves)

    got, cache = sdpa(*inputs, **problem.static())
    close(got, o)
    close(stats(cache), lse)
    close(log_sum_exp(cache), lse[..., 0])
    close(stats(cache, log2=True), lse / np.log(2))
    close(attention_weights(cache), p)
    for dx, g in zip(sdpa_vjp(cache, do, dstats=dstats), want, strict=True):
        close(dx, g)


@settings(max_examples=20)
@given(problems())
def test_the_pair_keeps_the_protocol(problem):
    check_vjp(sdpa, sdpa_vjp, problem.inputs(), problem.static())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        "H > Hk > Hv > 1",
        "H > Hv > Hk > 1",
        "alibi and bias == 'none'",
        "alibi and bias == 'B 1 T 1' and B > 1 and T > 1",
        "padding and alignment == 'bottom_right' and right is not None and left is None and B > 1 and T != S",
        "padding and alignment == 'bottom_right' and left is not None and right and sink and dropout != 'none'",
        "not padding and alignment == 'bottom_right' and T > S and right == 0 and not sink",
        "left == 1 and right is None and S > T > 1",
        "dropout == 'for all' and B > 1",
    ],
)
def test_the_problems_are_not_vacuous(flag):
    assert find(problems(), lambda problem: eval(flag, dict(vars(problem))), settings=settings(max_examples=5000))


# ── attended keys ───────────────────────────────────────────────────────────────────────────────────────────────


def pictures(T, S, **static):
    """For each sample, the keys that each query attends to."""
    B = len(static.get("seq_len_q", [0]))
    q, k = np.zeros((B, 1, T, 2)), np.zeros((B, 1, S, 2))
    _, cache = sdpa(q, k, k, **static)
    return ["/".join("".join("x" if w else "." for w in row) for row in p[0]) for p in attention_weights(cache)]


@pytest.mark.parametrize(
    ("alignment", "left", "right", "drawn"),
    [
        ("top_left", None, None, "xxxxx/xxxxx/xxxxx"),
        ("top_left", None, 0, "x..../xx.../xxx.."),
        ("top_left", None, 1, "xx.../xxx../xxxx."),
        ("top_left", 1, None, "xxxxx/.xxxx/..xxx"),
        ("top_left", 2, None, "xxxxx/xxxxx/.xxxx"),
        ("top_left", 1, 0, "x..../.x.../..x.."),
        ("top_left", 2, 0, "x..../xx.../.xx.."),
        ("top_left", 2, 1, "xx.../xxx../.xxx."),
        ("top_left", 0, None, ".xxxx/..xxx/...xx"),
        ("top_left", 0, 2, ".xx../..xx./...xx"),
        ("top_left", -1, 2, "..x../...x./....x"),
        ("bottom_right", None, None, "xxxxx/xxxxx/xxxxx"),
        ("bottom_right", None, 0, "xxx../xxxx./xxxxx"),
        ("bottom_right", None, 1, "xxxx./xxxxx/xxxxx"),
        ("bottom_right", 1, None, "..xxx/...xx/....x"),
        ("bottom_right", 1, 0, "..x../...x./....x"),
        ("bottom_right", 2, 0, ".xx../..xx./...xx"),
        ("bottom_right", 3, 1, "xxxx./.xxxx/..xxx"),
    ],
)
def test_bands_look_as_documented(alignment, left, right, drawn):
    """3 queries and 5 keys: the left bound is exclusive, the right one is not."""
    static = {"diagonal_alignment": alignment, "diagonal_band_left_bound": left, "diagonal_band_right_bound": right}
    assert pictures(3, 5, **static) == [drawn]


def test_bands_of_more_queries_than_keys():
    """Which cuDNN refuses with the bottom-right diagonal and with a left bound."""
    assert pictures(4, 2, diagonal_band_right_bound=0, diagonal_alignment="bottom_right") == ["../../x./xx"]
    assert pictures(4, 2, diagonal_band_left_bound=2) == ["xx/xx/.x/.."]


@pytest.mark.parametrize(
    ("older", "drawn"),
    [
        ({"use_causal_mask": True}, "x..../xx.../xxx.."),
        ({"use_causal_mask_bottom_right": True}, "xxx../xxxx./xxxxx"),
        ({"sliding_window_length": 2}, "xxxxx/xxxxx/.xxxx"),
        ({"sliding_window_length": 2, "use_causal_mask_bottom_right": True}, ".xx../..xx./...xx"),
    ],
)
def test_bands_by_their_older_names(older, drawn):
    assert pictures(3, 5, **older) == [drawn]


@pytest.mark.parametrize(
    ("alignment", "drawn"),
    [
        ("top_left", ["x..../xx.../xxx../.....", "x..../xx.../...../....."]),
        ("bottom_right", ["xx.../xxx../xxxx./.....", "xxxx./xxxxx/...../....."]),
    ],
)
def test_the_bottom_right_of_a_padded_sequence_is_its_own(alignment, drawn):
    """Of 4 queries and 5 keys one sample has 3 and 4, the other 2 and 5."""
    lengths = {"seq_len_q": np.array([3, 2]), "seq_len_kv": np.array([4, 5])}
    band = {"diagonal_alignment": alignment, "diagonal_band_right_bound": 0}
    assert pictures(4, 5, use_padding_mask=True, **lengths, **band) == drawn


def test_a_diagonal_alignment_is_a_string_or_a_member():
    library = enum.Enum("diagonal_alignment", ["TOP_LEFT", "BOTTOM_RIGHT"])
    band = {"diagonal_band_right_bound": 0, "diagonal_alignment": library.BOTTOM_RIGHT}
    assert pictures(2, 3, **band) == ["xx./xxx"]


OF_16_HEADS = 0.7071067811865476, 0.3535533905932738, 0.1767766952966369, 0.08838834764831845  # 2^−½, 2^−1½, …


@pytest.mark.parametrize(
    ("H", "expected"),
    [
        (4, [0.25, 0.0625, 0.015625, 0.00390625]),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (12, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, *OF_16_HEADS]),
    ],
)
def test_alibi_slopes(H, expected):
    """A key one further back weighs e^slope times less; stats tell slope · (j − i) from slope · j."""
    q = np.zeros((1, H, 3, 2))
    _, cache = sdpa(q, q, q, use_alibi_mask=True, diagonal_band_right_bound=0)
    p = attention_weights(cache)[0]
    close(np.log(p[:, 2, 1:] / p[:, 2, :-1]), np.repeat(np.array(expected)[:, None], 2, 1))
    close(stats(cache)[0, :, 1, 0], np.log1p(np.exp(-np.array(expected))))


# ── where cuDNN and funcmha differ ────────────────────────────────────────────────────────────────────────────────


def test_no_scale_is_a_scale_of_one():
    q, k, v, *_ = Problem(Hk=3, Hv=3).inputs()
    np.testing.assert_array_equal(sdpa(q, k, v)[0], attention(q, k, v, scale=1.0)[0])
    np.testing.assert_array_equal(sdpa(q, k, v, attn_scale=11**-0.5)[0], attention(q, k, v)[0])


def test_a_left_bound_of_one_keeps_the_diagonal_only():
    q, k, v, *_ = Problem(Hk=3, Hv=3).inputs()
    want, _ = attention(q, k, v, scale=1.0, mask=masks.window(0, 0))
    np.testing.assert_array_equal(sdpa(q, k, v, diagonal_band_left_bound=1, diagonal_band_right_bound=0)[0], want)


@pytest.mark.parametrize("sink", [False, True])
def test_tokens_beyond_the_lengths_have_no_effect(each_engine, sink):
    """Not even NaN, in an input or a cotangent. There o is 0, stats −∞ or the sink, and every gradient 0."""
    problem = Problem(Hv=3, H=3, padding=True, sink=sink, bias="B 1 T S", alibi=True, right=0, seed=5)
    q, k, v, bias, sink_token = problem.inputs()
    do, dstats = problem.cotangents()
    n_q, n_kv = problem.lengths
    assert n_q.min() < 5
    assert n_kv.min() < 7
    rows, cols = (np.arange(m) >= n[:, None, None] for m, n in ((5, n_q), (7, n_kv)))
    dstats = np.where(rows[..., None], 0.0, dstats)
    results = []
    for hole in np.nan, 0.0:
        args = [np.where(x[..., None], hole, a) for x, a in ((rows, q), (cols, k), (cols, v))]
        o, cache = sdpa(*args, bias, sink_token, **problem.static())
        results += [(o, stats(cache), *sdpa_vjp(cache, np.where(rows[..., None], hole, do), dstats=dstats))]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    o, lse, dq, dk, dv, *_ = results[0]
    beyond = np.broadcast_to(rows, (2, 3, 5))
    assert not o[beyond].any()
    assert not dq[beyond].any()
    close(lse[beyond], np.broadcast_to(sink_token if sink else -np.inf, lse.shape)[beyond])
    assert not dk[np.broadcast_to(cols, (2, 1, 7))].any()
    assert not dv[np.broadcast_to(cols, (2, 3, 7))].any()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(name):
    """A sink is float32 with them, as in cuDNN, and so is its gradient."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = np.dtype(getattr(ml_dtypes, name, name))
    problem = Problem(H=6, Hk=2, Hv=3, bias="1 1 T S", alibi=True, right=0, padding=True, sink=True)
    q, k, v, bias, sink = problem.inputs()
    q, k, v, bias, do = (a.astype(half) for a in (q, k, v, bias, problem.cotangents()[0]))
    sink = sink.astype(np.float32)
    o, cache = sdpa(q, k, v, bias, sink, **problem.static())
    wide = (a.astype(np.float32) for a in (q, k, v, bias))
    o32, cache32 = sdpa(*wide, sink, **problem.static())
    np.testing.assert_array_equal(o, o32.astype(half))
    np.testing.assert_array_equal(stats(cache), stats(cache32))
    grads, grads32 = sdpa_vjp(cache, do), sdpa_vjp(cache32, do.astype(np.float32))
    for g, g32, dtype in zip(grads, grads32, [half] * 4 + [np.dtype("f4")], strict=True):
        assert g.dtype == dtype
        np.testing.assert_array_equal(g, g32.astype(dtype))


def test_every_array_library_gives_the_same(xp):
    problem = Problem(
        H=6, Hk=2, Hv=3, bias="1 H T S", alibi=True, right=0, padding=True, sink=True, alignment="bottom_right"
    )
    inputs, (do, dstats), static = problem.inputs(), problem.cotangents(), problem.static()
    keep = np.random.default_rng(0).random((2, 6, 5, 7)) < 0.7
    want, cache = sdpa(*inputs, **(static | {"dropout": (keep, 1.5)}))
    want = want, stats(cache, log2=True), *sdpa_vjp(cache, do, dstats=dstats)
    got, cache = sdpa(*(xp.to(a) for a in inputs), **(static | {"dropout": (xp.to(keep), 1.5)}))
    got = got, stats(cache, log2=True), *sdpa_vjp(cache, xp.to(do), dstats=xp.to(dstats))
    for a, b in zip(got, want, strict=True):
        close(xp.back(a), b)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────

Q, K = np.zeros((2, 6, 3, 5)), np.zeros((2, 2, 7, 5))
LENGTHS = {"seq_len_q": np.array([3, 1]), "seq_len_kv": np.array([7, 0])}


@pytest.mark.parametrize(
    ("inputs", "static", "error", "message"),
    [
        (
            (Q, K, np.zeros((2, 4, 7, 5))),
            {},
            ValueError,
            "q has H_q=6 heads, which must be a multiple of H_v=4 as in v",
        ),
        (
            (Q, np.zeros((2, 5, 7, 5)), K),
            {},
            ValueError,
            "q has H_q=6 heads, which must be a multiple of H_k=5 as in k",
        ),
        (
            (Q, K, np.zeros((2, 2, 3, 5))),
            {},
            ValueError,
            "v must be (B, H_v, S_kv, D_v) with B=2 as in q, S_kv=7 as in k",
        ),
        ((Q[0], K, K), {}, ValueError, "q must be (B, H_q, S_q, D_qk), got (6, 3, 5)"),
        ((Q, K, K.astype("f4")), {}, TypeError, "v must have dtype float64 as q has"),
        ((Q, K, K, np.zeros((3, 7))), {}, ValueError, "bias must have four axes that broadcast to (B, H_q, S_q, S_kv)"),
        (
            (Q, K, K, np.zeros((2, 2, 3, 7))),
            {},
            ValueError,
            "bias must broadcast to (B, H_q, S_q, S_kv) = (2, 6, 3, 7)",
        ),
        ((Q, K, K, np.zeros((1, 1, 3, 7), bool)), {}, TypeError, "bias must have a dtype of "),
        (
            (Q, K, K, None, np.zeros(6)),
            {},
            ValueError,
            "sink_token must be (1, H_q, 1, 1) with H_q=6 as in q, got (6,)",
        ),
        ((Q, K, K, None, np.zeros((1, 6, 1, 1), "f4")), {}, TypeError, "sink_token must have dtype float64 as q has"),
        ((Q, K, K), {"attn_scale": "1"}, TypeError, "attn_scale must be a real number"),
        (
            (Q, K, K),
            {"use_alibi_mask": True},
            ValueError,
            "diagonal_band_right_bound must be 0 with use_alibi_mask, got None",
        ),
        (
            (Q, K, K),
            {"use_alibi_mask": True, "diagonal_band_right_bound": 1},
            ValueError,
            "diagonal_band_right_bound must be 0 with use_alibi_mask, got 1",
        ),
        (
            (Q, K, K),
            {"use_padding_mask": True},
            ValueError,
            "seq_len_q must be given with use_padding_mask, and only then",
        ),
        ((Q, K, K), LENGTHS, ValueError, "seq_len_q must be given with use_padding_mask, and only then"),
        (
            (Q, K, K),
            LENGTHS | {"use_padding_mask": True, "seq_len_kv": None},
            ValueError,
            "seq_len_kv must be given with use_padding_mask, and only then, got None",
        ),
        (
            (Q, K, K),
            LENGTHS | {"use_padding_mask": True, "seq_len_q": np.array([4, 1])},
            ValueError,
            "seq_len_q must be within 0 … 3, got [4, 1]",
        ),
        (
            (Q, K, K),
            LENGTHS | {"use_padding_mask": True, "seq_len_q": np.array([1])},
            ValueError,
            "seq_len_q must be (B, 1, 1, 1) or (B,) with B=2 as in q, got (1,)",
        ),
        (
            (Q, K, K),
            LENGTHS | {"use_padding_mask": True, "seq_len_q": [3, 1]},
            TypeError,
            "seq_len_q must be a NumPy array of integers, got list",
        ),
        (
            (Q, K, K),
            {"diagonal_alignment": "top"},
            ValueError,
            "diagonal_alignment must be one of top_left, bottom_right, got 'top'",
        ),
        (
            (Q, K, K),
            {"diagonal_band_left_bound": 1.0},
            TypeError,
            "diagonal_band_left_bound must be an int or None, got 1.0",
        ),
        (
            (Q, K, K),
            {"use_causal_mask": True, "use_causal_mask_bottom_right": True},
            ValueError,
            "use_causal_mask and use_causal_mask_bottom_right must be given without the other one, diagonal_alignment ",
        ),
        (
            (Q, K, K),
            {"use_causal_mask": True, "diagonal_band_right_bound": 0},
            ValueError,
            "use_causal_mask and use_causal_mask_bottom_right must be given without",
        ),
        (
            (Q, K, K),
            {"use_causal_mask": True, "diagonal_alignment": "bottom_right"},
            ValueError,
            "use_causal_mask and use_causal_mask_bottom_right must be given without",
        ),
        ((Q, K, K), {"use_causal_mask": 1}, TypeError, "use_causal_mask must be True or False, got 1"),
        (
            (Q, K, K),
            {"use_causal_mask_bottom_right": None},
            TypeError,
            "use_causal_mask_bottom_right must be True or False, got None",
        ),
        (
            (Q, K, K),
            {"sliding_window_length": 2, "diagonal_band_left_bound": 2},
            ValueError,
            "sliding_window_length must be None with diagonal_band_left_bound, got 2",
        ),
        (
            (Q, K, K),
            {"sliding_window_length": 0},
            ValueError,
            "sliding_window_length must be at least 1 or None, got 0",
        ),
        ((Q, K, K), {"diagonal_band_right_bound": True}, TypeError, "diagonal_band_right_bound must be an int or None"),
        ((Q, K, K), {"diagonal_band_right_bound": -1}, ValueError, "diagonal_band_right_bound must be at least 0"),
        (
            (Q, K, K),
            {"diagonal_band_left_bound": -2, "diagonal_band_right_bound": 2},
            ValueError,
            "diagonal_band_left_bound must be above -2, else no key is allowed, got -2",
        ),
        (
            (Q, K, K),
            {"dropout": (0.1, 123, 456)},
            TypeError,
            "dropout must be (mask, scale): only cuDNN can draw the mask of (probability, seed, offset)",
        ),
        (
            (Q, K, K),
            {"dropout": (0.1, 1.0)},
            TypeError,
            "dropout[0] must be an array of booleans, or of 0 and 1, got float",
        ),
        ((Q, K, K), {"dropout": (np.ones((3, 7), bool), 1.0)}, ValueError, "dropout[0] must have four axes"),
        (
            (Q, K, K),
            {"dropout": (np.full((1, 1, 3, 7), 0.5), 1.0)},
            ValueError,
            "dropout[0] must be booleans, or numbers 0",
        ),
        (
            (Q, K, K),
            {"dropout": (np.ones((1, 1, 3, 7)), 0.5)},
            ValueError,
            "dropout[1] must be 1 / (1 − p) and so at least 1",
        ),
    ],
)
def test_sdpa_refuses(inputs, static, error, message):
    with pytest.raises(error) as raised:
        sdpa(*inputs, **static)
    assert str(raised.value).startswith(message)


def test_the_gradient_refuses_another_shape():
    _, cache = sdpa(Q, K, K)
    with pytest.raises(ValueError, match=r"^do must be \(B, H_q, S_q, D_v\) = \(2, 6, 3, 5\) as the output is, got"):
        sdpa_vjp(cache, K)
    with pytest.raises(ValueError, match=r"^dstats must be \(B, H_q, S_q, 1\) = \(2, 6, 3, 1\) as the output is, got"):
        sdpa_vjp(cache, Q, dstats=Q[..., 0])
    with pytest.raises(TypeError, match="log2 must be True or False, got 'y'"):
        stats(cache, log2="y")


# ── packed tensors ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Packed:
    """Sequences that lie one after another, with gaps before, between and after them."""

    lengths: tuple[int, ...] = (2, 3)
    gaps: tuple[int, ...] = (0, 2, 1)  # before each sequence, and at the end
    N: int = 8

    def starts(self):
        return np.cumsum(self.gaps[:-1]) + np.cumsum((0, *self.lengths[:-1]))

    def offset(self, stride):
        """In elements, int32 (B + 1, 1, 1, 1) as cuDNN's; the last one is the end."""
        return (np.array([*self.starts(), self.N]) * stride).astype(np.int32).reshape(-1, 1, 1, 1)


@st.composite
def packed(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    gaps = draw(st.lists(st.integers(0, 2), min_size=len(lengths) + 1, max_size=len(lengths) + 1))
    return Packed(tuple(lengths), tuple(gaps), sum(lengths) + sum(gaps))


@given(packed(), st.integers(0, 2))
def test_a_ragged_tensor_equals_its_sequences(problem, more):
    H, D, S = 3, 2, max(problem.lengths, default=0) + more
    x = np.random.default_rng(0).standard_normal((problem.N, H, D))
    static = {"ragged_offset": problem.offset(H * D), "seq_len": np.array(problem.lengths, int)}
    y, _ = from_ragged(x, **static, s=S)
    assert y.shape == (len(problem.lengths), H, S, D)
    back = np.zeros_like(x)
    for b, (start, n) in enumerate(zip(problem.starts(), problem.lengths, strict=True)):
        for i in range(S):
            np.testing.assert_array_equal(y[b, :, i], x[start + i] if i < n else 0)
        back[start : start + n] = x[start : start + n]
    np.testing.assert_array_equal(to_ragged(y, **static, n=problem.N)[0], back)
    check_vjp(from_ragged, from_ragged_vjp, (x,), static | {"s": S})
    check_vjp(to_ragged, to_ragged_vjp, (y,), static | {"n": problem.N})


def test_the_ragged_tensors_of_the_documentation():
    """ "aa" and "bbb", packed wholly, and packed with gaps: H · D = 64, and S = 8."""
    a, b = np.full((2, 1, 64), 1.0), np.full((3, 1, 64), 2.0)
    zero, n = np.zeros((1, 1, 64)), np.array([2, 3])
    whole, _ = from_ragged(np.concatenate([a, b]), ragged_offset=np.array([0, 128, 320]), seq_len=n, s=8)
    apart = np.concatenate([a, zero, zero, b, zero])
    with_gaps, _ = from_ragged(apart, ragged_offset=np.array([0, 256, 448]), seq_len=n, s=8)
    np.testing.assert_array_equal(whole[:, 0, :, 0], [[1, 1, 0, 0, 0, 0, 0, 0], [2, 2, 2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(with_gaps, whole)


def test_interleaved_tensors_have_offsets_of_all_three():
    qkv = np.random.default_rng(0).standard_normal((5, 3, 2, 4))
    offset, n = np.array([0, 2, 5]) * 3 * 2 * 4, np.array([2, 3])
    for x in qkv.swapaxes(0, 1):
        y, _ = from_ragged(x, ragged_offset=offset, seq_len=n, s=3, stride=24)
        np.testing.assert_array_equal(y[1], x[2:5].swapaxes(0, 1))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_packed_attention_equals_its_sequences(alignment):
    rng, n_q, n_kv = np.random.default_rng(0), np.array([3, 1, 4]), np.array([2, 5, 4])
    band = {"diagonal_alignment": alignment, "diagonal_band_right_bound": 0, "diagonal_band_left_bound": 3}
    q, do = rng.standard_normal((2, 8, 6, 2))
    k, v = rng.standard_normal((2, 11, 3, 2))
    of_q = {"ragged_offset": np.array([0, 3, 4, 8]) * 12, "seq_len": n_q}
    of_k = {"ragged_offset": np.array([0, 2, 7, 11]) * 6, "seq_len": n_kv}
    (qp, q_cache), (kp, k_cache), (vp, v_cache) = (
        from_ragged(x, **f, s=5) for x, f in ((q, of_q), (k, of_k), (v, of_k))
    )
    o, cache = sdpa(qp, kp, vp, use_padding_mask=True, seq_len_q=n_q, seq_len_kv=n_kv, **band)
    o, o_cache = to_ragged(o, **of_q, n=8)
    dq, dk, dv, *_ = sdpa_vjp(cache, *to_ragged_vjp(o_cache, do))
    got = o, *from_ragged_vjp(q_cache, dq), *from_ragged_vjp(k_cache, dk), *from_ragged_vjp(v_cache, dv)

    for b in range(3):
        rows, cols = slice(n_q[:b].sum(), n_q[: b + 1].sum()), slice(n_kv[:b].sum(), n_kv[: b + 1].sum())
        one = (x[None, s].swapaxes(1, 2) for x, s in ((q, rows), (k, cols), (v, cols)))
        alone, cache = sdpa(*one, **band)
        want = alone, *sdpa_vjp(cache, do[None, rows].swapaxes(1, 2))[:3]
        for g, w, s in zip(got, want, (rows, rows, cols, cols), strict=True):
            close(g[s], w[0].swapaxes(0, 1))


@pytest.mark.parametrize(
    ("static", "message"),
    [
        ({"ragged_offset": np.array([0, 2])}, "ragged_offset must be (B + 1,) with B=2 as in seq_len, got (2,)"),
        ({"ragged_offset": np.array([0, 2, 5])}, "ragged_offset must count elements, 6 from a token to the next"),
        (
            {"ragged_offset": np.array([0, 6, 30])},
            "ragged_offset and seq_len must be sequences of at most s=3 tokens that do not overlap",
        ),
        (
            {"ragged_offset": np.array([0, 18, 30])},
            "ragged_offset and seq_len must be sequences of at most s=3 tokens that do not overlap",
        ),
        (
            {"ragged_offset": np.array([-6, 12, 30])},
            "ragged_offset must be at least 0, got [-6, 12, 30]",
        ),
        ({"seq_len": np.array([[2, 3]])}, "seq_len must be (B, 1, 1, 1) or (B,)"),
        (
            {"s": 2},
            "ragged_offset and seq_len must be sequences of at most s=2 tokens that do not overlap within N=5",
        ),
        ({"s": -1}, "s must be at least 0, got -1"),
        ({"seq_len": np.array([2, -3])}, "seq_len must be at least 0, got [2, -3]"),
        ({"stride": 10**400}, "stride must be below 2**63, got 1000"),
    ],
)
def test_from_ragged_refuses(static, message):
    static = {"ragged_offset": np.array([0, 12, 30]), "seq_len": np.array([2, 3]), "s": 3} | static
    with pytest.raises(ValueError) as raised:  # noqa: PT011 — the message is compared below
        from_ragged(np.zeros((5, 3, 2)), **static)
    assert str(raised.value).startswith(message)
