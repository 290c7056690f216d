"""cuDNN's `sdpa` against its documentation and Python reference, written out densely in float64 PyTorch.

cuDNN runs on NVIDIA GPUs alone, so the library itself is no oracle here.
"""

import enum
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from oracles import gradients, tensor

from funcmha import attention_weights, log_sum_exp
from funcmha.interop.cudnn import sdpa, sdpa_vjp, stats

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
