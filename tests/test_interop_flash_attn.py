"""flash-attention's calls. The oracle is their docstrings, written out in loops over torch.

The loops go over samples, heads, queries and keys in float64, without funcmha, differentiated by torch's autograd.
flash-attention itself is the oracle in tests/test_interop_flash_attn_itself.py and in `make kernels`.
"""

import ast
import functools
import importlib
import inspect
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from funcmha import attention_weights, log_sum_exp
from funcmha.dropout import seeded
from funcmha.interop.flash_attn import (
    flash_attn_func,
    flash_attn_func_vjp,
    flash_attn_kvpacked_func,
    flash_attn_kvpacked_func_vjp,
    flash_attn_qkvpacked_func,
    flash_attn_qkvpacked_func_vjp,
    flash_attn_varlen_func,
    flash_attn_varlen_func_vjp,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_kvpacked_func_vjp,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_varlen_qkvpacked_func_vjp,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_vjp,
)
from funcmha.testing import check_vjp

K, G, D, E = 2, 3, 5, 7  # key/value heads, query heads of each, widths
H = K * G
F64 = torch.float64

# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────


def attends(i, j, T, S, causal, window, chunk):
    at = i + S - T
    left, right = window
    return (
        (not causal or j <= at)
        and (left in (-1, None) or at - left <= j)
        and (right in (-1, None) or j <= at + right)
        and (chunk == 0 or j // chunk == math.floor(at / chunk))
    )


def one_row(z, values, sink, keep, p):
    """out (E,), lse, weights (n,) of a query from its scores (n,), values (n, E), n = 0 too, and what is kept (n,)"""
    if not len(z):
        return torch.zeros(values.shape[-1], dtype=F64), torch.tensor(-math.inf, dtype=F64) if sink is None else sink, z
    lse = torch.logsumexp(z if sink is None else torch.cat([z, sink[None]]), 0)
    weights = torch.exp(z - lse)
    return (weights * keep / (1 - p)) @ values, lse, weights


def one_sequence(
    q,
    k,
    v,
    slopes=None,
    sink=None,
    qv=None,
    *,
    listed=None,
    keep=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
):
    """q (T, H, D)  k (S, K, D)  v (S, K, E)  slopes (H,)  sink (H,)  qv (T, H, E)  listed (T, R)  keep (H, T, S)

    out (T, H, E), weights (H, T, S), lse (H, T)
    """
    T, S, heads = len(q), len(k), q.shape[1]
    scale = 1 / math.sqrt(D + (0 if qv is None else E)) if softmax_scale is None else softmax_scale
    out, weights, lse = (
        torch.zeros(shape, dtype=F64) for shape in ((T, heads, v.shape[-1]), (heads, T, S), (heads, T))
    )
    for h, i in np.ndindex(heads, T):
        of_key = h // (heads // k.shape[1])
        js = [j for j in range(S) if attends(i, j, T, S, causal, window_size, attention_chunk)]
        js = [j for j in js if listed is None or j in listed[i]]
        z = scale * (k[js, of_key] @ q[i, h] + (0 if qv is None else v[js, of_key] @ qv[i, h]))
        z = softcap * torch.tanh(z / softcap) if softcap else z
        if slopes is not None:
            z = z - slopes[h] * torch.tensor([abs(i + S - T - j) for j in js])
        kept = torch.tensor([1.0 if keep is None else float(keep[h, i, j]) for j in js])
        of_sink = None if sink is None else sink[h]
        out[i, h], lse[h, i], weights[h, i, js] = one_row(z, v[js, of_key], of_sink, kept, dropout_p)
    return out, weights, lse


def of_each(slopes, b):
    return slopes if slopes is None or slopes.ndim == 1 else slopes[b]


def at(x, b):
    return None if x is None else x[b]


def dense_oracle(q, k, v, slopes=None, sink=None, qv=None, *, listed=None, keep=None, **static):
    """out (B, T, H, E), weights (B, H, T, S), lse (B, H, T)"""
    found = [
        one_sequence(
            q[b], k[b], v[b], of_each(slopes, b), sink, at(qv, b), listed=at(listed, b), keep=at(keep, b), **static
        )
        for b in range(len(q))
    ]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def varlen_oracle(q, k, v, slopes=None, sink=None, qv=None, *, queries, keys, listed=None, keep=None, **static):
    """out (N, H, E), weights (B, H, T, S), lse (H, N) for sequences that are lists of token numbers"""
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=F64)
    weights = torch.zeros(len(queries), q.shape[1], *(max(map(len, tokens)) for tokens in (queries, keys)), dtype=F64)
    lse = torch.full((q.shape[1], len(q)), -math.inf, dtype=F64)
    for b, (i, j) in enumerate(zip(queries, keys, strict=True)):
        own = {"listed": at(listed, i), "keep": at(keep, b)}
        found = one_sequence(q[i], k[j], v[j], of_each(slopes, b), sink, at(qv, i), **own, **static)
        out[i], weights[b, :, : len(i), : len(j)], lse[:, i] = found
    return out, weights, lse


def rotated(x, cos, sin, interleaved):
    """x (H, D) by one row of the tables, as complex numbers."""
    n = len(cos)
    a, b = (x[:, 0 : 2 * n : 2], x[:, 1 : 2 * n : 2]) if interleaved else (x[:, :n], x[:, n : 2 * n])
    z = torch.complex(a, b) * torch.complex(cos, sin)
    y = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    return torch.cat([y, x[:, 2 * n :]], -1)


def kvcache_oracle(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    slopes=None,
    sink=None,
    qv=None,
    *,
    places,
    seqlens,
    leftpad,
    starts=None,
    cos=None,
    sin=None,
    **static,
):
    """out, k_cache', v_cache', weights, lse; places[b][slot] is the page and the slot in it

    q, k, v, qv: sequences of the same length in one tensor, or of any in a list; out and lse: as q is
    """
    interleaved = static.pop("rotary_interleaved", True)
    windowed = any(x not in (-1, None) for x in static.get("window_size", ()))
    moves = int(static.get("causal", False) or windowed or static.get("attention_chunk", 0) > 0)
    new = [0 if k is None else len(k[b]) for b in range(len(q))]
    together, q, k = torch.is_tensor(q), [x.clone() for x in q], k if k is None else [x.clone() for x in k]
    if cos is not None:
        for b, first in enumerate(seqlens if starts is None else starts):
            for t in range(len(q[b])):
                q[b][t] = rotated(q[b][t].clone(), cos[first + t * moves], sin[first + t * moves], interleaved)
            for u in range(new[b]):
                k[b][u] = rotated(k[b][u].clone(), cos[first + u], sin[first + u], interleaved)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for b in range(len(q)):
        for u in range(new[b]):
            k_cache[places[b][seqlens[b] + u]] = k[b][u]
            v_cache[places[b][seqlens[b] + u]] = v[b][u]
    longest = max(n + u - pad for n, u, pad in zip(seqlens, new, leftpad, strict=True))
    weights = torch.zeros(len(q), q[0].shape[1], max(map(len, q)), longest, dtype=F64)
    outs, lses = [], []
    for b in range(len(q)):
        slots = [places[b][slot] for slot in range(leftpad[b], seqlens[b] + new[b])]
        keys, values = (
            torch.stack([c[place] for place in slots]) if slots else c[:0].reshape(0, *c.shape[2:])
            for c in (k_cache, v_cache)
        )
        out, p, lse = one_sequence(q[b], keys, values, of_each(slopes, b), sink, at(qv, b), **static)
        weights[b, :, : len(q[b]), : len(slots)] = p
        outs.append(out)
        lses.append(lse)
    out, lse = (torch.stack(outs), torch.stack(lses)) if together else (torch.cat(outs), torch.cat(lses, 1))
    return out, k_cache, v_cache, weights, lse


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


def normal(*shape, seed=0):
    """Read-only, and strided: every other number of a larger array, its axes the other way round."""
    a = np.random.default_rng([seed, *shape]).standard_normal((*shape[::-1], 2))[..., 0].T
    a.flags.writeable = False
    return a


ANGLES = np.arange(14.0).reshape(7, 2)  # positions, pairs


def cu(lengths):
    return np.cumsum([0, *lengths]).astype(np.int32)


def leaf(a):
    return None if a is None else torch.tensor(np.array(a), requires_grad=True)


def gradients(outputs, cotangents, leaves):
    """As NumPy arrays; an lse of −∞ is no number to differentiate."""
    total = torch.zeros((), dtype=F64)
    for y, dy in zip(outputs, cotangents, strict=True):
        finite = torch.isfinite(y)
        total = total + (y[finite] * torch.tensor(np.array(dy))[finite]).sum()
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    found = iter([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)])
    return [None if x is None else next(found).numpy() for x in leaves]


def close(got, want, name=""):
    if want is None:
        assert got is None, name
        return
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    assert got.shape == want.shape, name
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11, err_msg=name)


def all_close(names, got, want):
    for name, a, b in zip(names.split(), got, want, strict=True):
        close(a, b, name)


GRADIENTS = "dq dk dv dalibi_slopes dlearnable_sink dqv"
bound = st.sampled_from([-1, None, 0, 1, 2, 5])


@st.composite
def options(draw):
    """Options of the scores."""
    return {
        "softmax_scale": draw(st.sampled_from([None, 0.7, 0.0, -1.3])),
        "causal": draw(st.booleans()),
        "window_size": (draw(bound), draw(bound)) if draw(st.booleans()) else (-1, -1),
        "attention_chunk": draw(st.sampled_from([0, 0, 1, 2, 3])),
        "softcap": draw(st.sampled_from([0.0, 1.7])),
    }


@st.composite
def logits(draw, B):
    """alibi_slopes and learnable_sink, or None."""
    slopes = draw(st.sampled_from([None, (H,), (B, H)]))
    return None if slopes is None else normal(*slopes, seed=3), draw(st.sampled_from([None, normal(H, seed=4)]))


def of_values(*tokens):
    """qv, or None."""
    return st.sampled_from([None, normal(*tokens, H, E, seed=9)])


@st.composite
def listed_keys(draw, *tokens):
    """gather_kv_indices, some of them twice and some of no key, or none."""
    R = draw(st.sampled_from([None, 0, 1, 4]))
    return {} if R is None else {"gather_kv_indices": np.random.default_rng(R).integers(-1, 6, (*tokens, R))}


@st.composite
def dropout(draw, *shape):
    """keep as an array for the oracle and as an argument, and dropout_p."""
    kind = draw(st.sampled_from(["none", "array", "heads alike", "of keys", "seed"]))
    if kind == "none":
        return None, {}
    if kind == "seed":
        drop = seeded(7, 0.4)
        return drop.dense(shape), {"keep": drop}
    B, heads, T, S = shape
    keep = np.random.default_rng(5).random((B, 1 if kind == "heads alike" else heads, T, S)) > 0.4
    keep = keep[0, 0, :1].reshape(S) if kind == "of keys" and T else keep
    return np.broadcast_to(keep, shape), {"keep": keep, "dropout_p": 0.4}


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_is_linear():
    """The scores of 2 × 4,096 tokens are 128 MiB in float32."""
    x, slopes = np.ones((8192, 1, 4), np.float32), np.ones((2, 1), np.float32)
    at = {"cu_seqlens_q": cu([4096, 4096]), "cu_seqlens_k": cu([4096, 4096]), "causal": True, "window_size": (700, 0)}
    tracemalloc.start()
    out, cache = flash_attn_varlen_func(x, x, x, slopes, **at)
    flash_attn_varlen_func_vjp(cache, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


# ── flash_attn_func ──────────────────────────────────────────────────────────────────────────────────────────────

size = st.sampled_from([1, 2, 3, 5])


@given(st.data(), st.sampled_from([1, 2]), size, size, options())
def test_dense_matches_torch(each_engine, data, B, T, S, static):
    inputs = [normal(B, T, H, D), normal(B, S, K, D, seed=1), normal(B, S, K, E, seed=2), *data.draw(logits(B))]
    inputs.append(data.draw(of_values(B, T)))
    (keep, drop), gather = data.draw(dropout(B, H, T, S)), data.draw(listed_keys(B, T))
    out, cache = flash_attn_func(*inputs, **static, **drop, **gather)
    leaves = [leaf(x) for x in inputs]
    listed = gather.get("gather_kv_indices")
    want = dense_oracle(*leaves, **static, listed=listed, keep=keep, dropout_p=0.0 if keep is None else 0.4)
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)

    dout, dweights, dlse = normal(B, T, H, E, seed=5), normal(B, H, T, S, seed=6), normal(B, H, T, seed=7)
    grads = flash_attn_func_vjp(cache, dout, dweights=dweights, dlse=dlse)
    all_close(GRADIENTS, grads, gradients(want, [dout, dweights, dlse], leaves))


@pytest.mark.parametrize(("T", "S"), [(3, 5), (5, 5), (1, 7)])
def test_causal_is_lower_right_of_torch(each_engine, T, S):
    """The oracle is PyTorch itself, which has a mask with the alignment of flash-attention."""
    inputs = normal(2, T, H, D), normal(2, S, K, D, seed=1), normal(2, S, K, E, seed=2)
    leaves = [leaf(x) for x in inputs]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = causal_lower_right(T, S)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    out, cache = flash_attn_func(*inputs, causal=True)
    close(out, want)
    dout = normal(2, T, H, E, seed=3)
    all_close("dq dk dv", flash_attn_func_vjp(cache, dout)[:3], gradients([want], [dout], leaves))


def attended(T, S, **static):
    """1 where a query attends to a key, 0 where not"""
    _, cache = flash_attn_func(np.ones((1, T, 1, 1)), np.ones((1, S, 1, 1)), np.ones((1, S, 1, 1)), **static)
    return (attention_weights(cache)[0, 0] > 0).astype(int).tolist()


def test_the_causal_masks_of_the_docstring(each_engine):
    """`flash_attn_func` in flash_attn/flash_attn_interface.py: 1 = keep, 0 = masked out."""
    assert attended(2, 5, causal=True) == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert attended(5, 2, causal=True) == [
        [0, 0],
        [0, 0],
        [0, 0],
        [1, 0],
        [1, 1],
    ]


def test_the_window_of_the_docstring(each_engine):
    """Keys between i + seqlen_k − seqlen_q − window_size[0] and i + seqlen_k − seqlen_q + window_size[1] inclusive."""
    assert attended(2, 5, window_size=(1, 0)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert attended(2, 5, window_size=(0, 1)) == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert attended(2, 5, window_size=(2, -1)) == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert attended(2, 5, window_size=(None, 0)) == attended(2, 5, causal=True)
    assert attended(2, 5, window_size=(1, 1), causal=True) == attended(2, 5, window_size=(1, 0))
    assert attended(5, 2, window_size=(0, 0)) == [[0, 0], [0, 0], [0, 0], [1, 0], [0, 1]]


def test_chunks_begin_with_the_first_key(each_engine):
    assert attended(2, 5, attention_chunk=2) == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert attended(3, 3, attention_chunk=2, causal=True) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert attended(5, 2, attention_chunk=3) == [[0, 0], [0, 0], [0, 0], [1, 1], [1, 1]]


def test_the_heads_of_the_docstring(each_engine):
    """If Q has 6 heads and K, V have 2, heads 0, 1, 2 of Q attend to head 0 of K and V, heads 3, 4, 5 to head 1."""
    v = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    out, _ = flash_attn_func(normal(1, 1, 6, 1), normal(1, 1, 2, 1), v)
    assert out.ravel().tolist() == [10.0, 10.0, 10.0, 20.0, 20.0, 20.0]


def test_figures_by_hand(each_engine):
    """q = 0: a slope of log 2 halves a weight with each step away, and a sink of 0 is one more key without a value."""
    q, k, v = np.zeros((1, 1, 1, 1)), np.ones((1, 3, 1, 1)), np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    out, cache = flash_attn_func(q, k, v, np.array([math.log(2)]))
    np.testing.assert_allclose(out.item(), (0.25 * 1 + 0.5 * 10 + 100) / 1.75, rtol=1e-14)
    np.testing.assert_allclose(log_sum_exp(cache).item(), math.log(1.75), rtol=1e-14)
    out, cache = flash_attn_func(q, k, v, None, np.array([0.0]))
    np.testing.assert_allclose(out.item(), 111 / 4, rtol=1e-14)
    np.testing.assert_allclose(log_sum_exp(cache).item(), math.log(4), rtol=1e-14)
    (dsink,) = flash_attn_func_vjp(cache, np.ones((1, 1, 1, 1)))[4]
    np.testing.assert_allclose(dsink, -111 / 16, rtol=1e-14)


def test_fully_masked_rows_have_out_zero_and_lse_of_the_sink(each_engine):
    q, k, v, sink = normal(1, 5, H, D), normal(1, 2, K, D), normal(1, 2, K, E), np.full(H, 20.0)
    out, cache = flash_attn_func(q, k, v, causal=True)
    assert not out[0, :3].any()
    assert np.all(log_sum_exp(cache)[:, :, :3] == -np.inf)
    dq, *_ = flash_attn_func_vjp(cache, np.ones_like(out), dlse=np.ones((1, H, 5)))
    assert not dq[0, :3].any()
    out, cache = flash_attn_func(q, k, v, None, sink, causal=True)
    assert not out[0, :3].any()
    assert np.all(log_sum_exp(cache)[:, :, :3] == 20.0)


# ── packed inputs ────────────────────────────────────────────────────────────────────────────────────────────────


def test_packed_inputs_equal_their_parts(each_engine):
    qkv, slopes, sink = normal(2, 5, 3, H, D), normal(2, H), normal(H)
    static, dout, dlse = {"causal": True, "softcap": 1.7}, normal(2, 5, H, D, seed=1), normal(2, H, 5)
    out, cache = flash_attn_func(*np.moveaxis(qkv, 2, 0), slopes, sink, **static)
    dq, dk, dv, dslopes, dsink, _ = flash_attn_func_vjp(cache, dout, dlse=dlse)

    got, packed = flash_attn_qkvpacked_func(qkv, slopes, sink, **static)
    want = np.stack([dq, dk, dv], axis=2), dslopes, dsink
    assert np.array_equal(got, out)
    assert np.array_equal(log_sum_exp(packed), log_sum_exp(cache))
    assert np.array_equal(attention_weights(packed), attention_weights(cache))
    for a, b in zip(flash_attn_qkvpacked_func_vjp(packed, dout, dlse=dlse), want, strict=True):
        assert np.array_equal(a, b)

    got, packed = flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], slopes, sink, **static)
    want = dq, np.stack([dk, dv], axis=2), dslopes, dsink
    assert np.array_equal(got, out)
    assert np.array_equal(log_sum_exp(packed), log_sum_exp(cache))
    for a, b in zip(flash_attn_kvpacked_func_vjp(packed, dout, dlse=dlse), want, strict=True):
        assert np.array_equal(a, b)


def test_packed_sequences_match_torch(each_engine):
    """Sequences of 3 and 2 tokens, and where keys are apart of 2 and 5, by the loop over sequences."""
    own, of_keys, static = [[0, 1, 2], [3, 4]], [[0, 1], [2, 3, 4, 5, 6]], {"causal": True, "softcap": 1.7}
    qkv, q, kv, logits = normal(5, 3, H, D), normal(5, H, D), normal(7, 2, K, D, seed=1), (normal(2, H), normal(H))
    for inputs, keys, split, f, f_vjp, names in (
        (
            (qkv, *logits),
            own,
            lambda qkv: qkv.unbind(1),
            functools.partial(flash_attn_varlen_qkvpacked_func, cu_seqlens=cu([3, 2])),
            flash_attn_varlen_qkvpacked_func_vjp,
            "dqkv dalibi_slopes dlearnable_sink",
        ),
        (
            (q, kv, *logits),
            of_keys,
            lambda q, kv: (q, *kv.unbind(1)),
            functools.partial(flash_attn_varlen_kvpacked_func, cu_seqlens_q=cu([3, 2]), cu_seqlens_k=cu([2, 5])),
            flash_attn_varlen_kvpacked_func_vjp,
            "dq dkv dalibi_slopes dlearnable_sink",
        ),
    ):
        leaves = [leaf(x) for x in inputs]
        out, cache = f(*inputs, **static)
        outputs = out, attention_weights(cache), log_sum_exp(cache)
        want = varlen_oracle(*split(*leaves[:-2]), *leaves[-2:], queries=own, keys=keys, **static)
        all_close("out weights lse", outputs, want)
        dout, dweights, dlse = (normal(*x.shape, seed=5) for x in outputs)
        grads = f_vjp(cache, dout, dweights=dweights, dlse=dlse)
        all_close(names, grads, gradients(want, [dout, dweights, dlse], leaves))


# ── flash_attn_varlen_func ───────────────────────────────────────────────────────────────────────────────────────


@st.composite
def lengths(draw):
    """(queries, keys) of each sequence, and how many of them are used."""
    n = st.sampled_from([0, 1, 2, 3, 5])
    pairs = draw(st.lists(st.tuples(n, n), min_size=1, max_size=3))
    used = [tuple(draw(st.integers(0, n)) for n in pair) for pair in pairs]
    return pairs, used if draw(st.booleans()) else None


@given(st.data(), lengths(), options())
def test_varlen_matches_torch(each_engine, data, problem, static):
    pairs, used = problem
    (nq, nk), B = zip(*pairs, strict=True), len(pairs)
    uq, uk = zip(*(pairs if used is None else used), strict=True)
    N, M = sum(nq), sum(nk)
    inputs = [normal(N, H, D), normal(M, K, D, seed=1), normal(M, K, E, seed=2), *data.draw(logits(B))]
    inputs.append(data.draw(of_values(N)))
    (keep, drop), gather = data.draw(dropout(B, H, max(uq), max(uk))), data.draw(listed_keys(N))
    args = static | drop | gather | {"cu_seqlens_q": cu(nq), "cu_seqlens_k": cu(nk)}
    args |= {} if used is None else {"seqused_q": np.array(uq, np.int32), "seqused_k": np.array(uk, np.int32)}
    out, cache = flash_attn_varlen_func(*inputs, **args)

    leaves = [leaf(x) for x in inputs]
    tokens = [
        [list(range(int(a), int(a) + n)) for a, n in zip(cu(ns), us, strict=False)] for ns, us in ((nq, uq), (nk, uk))
    ]
    p = 0.0 if keep is None else 0.4
    own = {"listed": gather.get("gather_kv_indices"), "keep": keep, "dropout_p": p}
    want = varlen_oracle(*leaves, queries=tokens[0], keys=tokens[1], **own, **static)
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)

    dout, dweights, dlse = normal(N, H, E, seed=5), normal(*want[1].shape, seed=6), normal(H, N, seed=7)
    grads = flash_attn_varlen_func_vjp(cache, dout, dweights=dweights, dlse=dlse)
    all_close(GRADIENTS, grads, gradients(want, [dout, dweights, dlse], leaves))


def test_a_seed_drops_by_sequence(each_engine):
    q, k, v, drop = normal(5, H, D), normal(7, K, D, seed=1), normal(7, K, E, seed=2), seeded(7, 0.4)
    at = {"cu_seqlens_q": cu([3, 2]), "cu_seqlens_k": cu([2, 5])}
    got, _ = flash_attn_varlen_func(q, k, v, **at, keep=drop)
    want, _ = flash_attn_varlen_func(q, k, v, **at, keep=drop.dense((2, H, 3, 5)), dropout_p=0.4)
    close(got, want)


def test_varlen_without_sequences(each_engine):
    none = np.zeros(1, np.int32)
    q, k, v, slopes, sink = normal(0, H, D), normal(0, K, D), normal(0, K, E), normal(H), normal(H)
    out, cache = flash_attn_varlen_func(q, k, v, slopes, sink, cu_seqlens_q=none, cu_seqlens_k=none)
    assert out.shape == (0, H, E)
    assert log_sum_exp(cache).shape == (H, 0)
    assert attention_weights(cache).shape == (0, H, 0, 0)
    dq, dk, dv, dslopes, dsink, _ = flash_attn_varlen_func_vjp(cache, out)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert not dslopes.any()
    assert not dsink.any()


def test_sequences_are_independent(each_engine):
    """Other sequences have no effect, even NaN, to the bit."""
    q, k, v = (np.array(normal(8, H, 5, seed=n)) for n in range(3))
    static = {"cu_seqlens_q": cu([3, 5]), "cu_seqlens_k": cu([3, 5]), "causal": True}
    k, v = k[:, :K], v[:, :K]
    out, cache = flash_attn_varlen_func(q, k, v, **static)
    dout = np.array(normal(8, H, 5, seed=4))
    want = flash_attn_varlen_func_vjp(cache, dout)
    for x in (q, k, v, dout):
        x[3:] = np.nan
    got, cache = flash_attn_varlen_func(q, k, v, **static)
    assert np.array_equal(got[:3], out[:3])
    for a, b in zip(flash_attn_varlen_func_vjp(cache, dout)[:3], want, strict=False):
        assert np.array_equal(a[:3], b[:3])


# ── flash_attn_with_kvcache ──────────────────────────────────────────────────────────────────────────────────────


@st.composite
def caches(draw):
    """Sizes, and where everything is."""
    B, T, U, N = draw(st.sampled_from([1, 2])), draw(size), draw(st.sampled_from([None, 0, 1, 2, 3])), 7
    P, paged = draw(st.sampled_from([2, 3])), draw(st.booleans())
    args = {}
    if paged:  # of 3 slots, two pages of 4 or 5 each
        P, N = 5, 3
        pages = draw(st.permutations(range(5)))
        table = np.array(pages[: 2 * B], np.int32).reshape(B, 2)
        args["block_table"] = table
        places = [[(int(table[b, s // 3]), s % 3) for s in range(6)] for b in range(B)]
    else:
        own = draw(st.permutations(range(P)))[:B] if draw(st.booleans()) else None
        if own is not None:
            args["cache_batch_idx"] = np.array(own)
        places = [[(b if own is None else own[b], s) for s in range(N)] for b in range(B)]
    room = len(places[0])
    seqlens = [draw(st.integers(0, room - (U or 0))) for _ in range(B)]
    leftpad = [0] * B
    if not paged and draw(st.booleans()):
        leftpad = [draw(st.integers(0, n)) for n in seqlens]
        args["cache_leftpad"] = np.array(leftpad, np.int32)
    kind = draw(st.sampled_from(["array", "int", "all"]))
    if kind == "int":
        seqlens = [min(seqlens)] * B
        assume(all(pad <= n for pad, n in zip(leftpad, seqlens, strict=True)))
    if kind == "all" and U is None:
        seqlens = [room] * B
    else:
        args["cache_seqlens"] = seqlens[0] if kind == "int" else np.array(seqlens, np.int32)
    return (B, T, U, P, N), args, {"places": places, "seqlens": seqlens, "leftpad": leftpad}


@given(st.data(), caches(), options(), st.sampled_from([None, True, False]))
def test_kvcache_matches_torch(each_engine, data, problem, static, interleaved):
    (B, T, U, P, N), args, where = problem
    slopes, sink = data.draw(logits(B))
    new = [None, None] if U is None else [normal(B, U, K, D, seed=3), normal(B, U, K, E, seed=4)]
    inputs = [normal(B, T, H, D), normal(P, N, K, D, seed=1), normal(P, N, K, E, seed=2), *new, slopes, sink]
    inputs.append(data.draw(of_values(B, T)))
    if U is not None and interleaved is not None:
        static |= {"rotary_interleaved": interleaved}
        angle = normal(13, 2, seed=8)
        where |= {"cos": torch.tensor(np.cos(angle)), "sin": torch.tensor(np.sin(angle))}
        args |= {"rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
    y, cache = flash_attn_with_kvcache(*inputs, **args, **static)
    leaves = [leaf(x) for x in inputs]
    want = kvcache_oracle(*leaves, **where, **static)
    outputs = *y, attention_weights(cache), log_sum_exp(cache)
    all_close("out k_cache v_cache weights lse", outputs, want)

    *dy, dweights, dlse = (normal(*x.shape, seed=5) for x in outputs)
    grads = flash_attn_with_kvcache_vjp(cache, tuple(dy), dweights=dweights, dlse=dlse)
    all_close(
        "dq dk_cache dv_cache dk dv dalibi_slopes dlearnable_sink dqv",
        grads,
        gradients(want, [*dy, dweights, dlse], leaves),
    )


def test_sequences_may_share_pages(each_engine):
    """Two sequences with a prefix in common: the gradient of the prefix is the sum of both, by torch."""
    q, k_cache, v_cache = normal(2, 1, H, D), normal(3, 3, K, D, seed=1), normal(3, 3, K, E, seed=2)
    new = normal(2, 1, K, D, seed=3), normal(2, 1, K, E, seed=4)
    table, seqlens = np.array([[1, 0], [1, 2]]), [3, 5]
    places = [[(int(table[b, s // 3]), s % 3) for s in range(6)] for b in range(2)]
    inputs = q, k_cache, v_cache, *new
    y, cache = flash_attn_with_kvcache(*inputs, cache_seqlens=np.array(seqlens), block_table=table, causal=True)
    leaves = [leaf(x) for x in inputs]
    *want, _, _ = kvcache_oracle(*leaves, places=places, seqlens=seqlens, leftpad=[0, 0], causal=True)
    dy = tuple(normal(*x.shape, seed=5) for x in y)
    for got, w in zip(y, want, strict=True):
        close(got, w)
    for got, w in zip(flash_attn_with_kvcache_vjp(cache, dy), gradients(want, dy, leaves), strict=False):
        close(got, w)


def test_pages_beyond_the_slots_in_use_are_ignored(each_engine):
    q, k_cache, v_cache = normal(1, 1, H, D), normal(2, 3, K, D), normal(2, 3, K, E)
    (out, *_), _ = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=2, block_table=np.array([[1, -1]]))
    want, _ = flash_attn_func(q, k_cache[1:, :2], v_cache[1:, :2])
    close(out, want)


def test_without_lengths_all_slots_are_attended(each_engine):
    q, k_cache, v_cache = normal(2, 3, H, D), normal(2, 7, K, D, seed=1), normal(2, 7, K, E, seed=2)
    (out, *held), _ = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True)
    want, _ = flash_attn_func(q, k_cache, v_cache, causal=True)
    close(out, want)
    assert held[0] is k_cache
    assert held[1] is v_cache


def test_none_is_a_cotangent_of_zero(each_engine):
    q, k_cache, v_cache = normal(2, 3, H, D), normal(2, 7, K, D, seed=1), normal(2, 7, K, E, seed=2)
    k, v = normal(2, 2, K, D, seed=3), normal(2, 2, K, E, seed=4)
    y, cache = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4)
    zeros = [np.zeros_like(x) for x in y]
    for n, x in enumerate(y):
        some, rest = [None] * 3, list(zeros)
        some[n] = rest[n] = np.array(normal(*x.shape))
        got, want = (flash_attn_with_kvcache_vjp(cache, tuple(dy)) for dy in (some, rest))
        for a, b in zip(got[:5], want, strict=False):
            assert np.array_equal(a, b)
    assert all(not g.any() for g in flash_attn_with_kvcache_vjp(cache, (None, None, None))[:5])


def test_decoding_steps_equal_one_causal_call(each_engine):
    """Decoding by 2, 1 and 4 tokens is `flash_attn_func` of all 7, causal, and its gradient that of all."""
    q, k, v, dout = (
        normal(2, 7, H, D),
        normal(2, 7, K, D, seed=1),
        normal(2, 7, K, E, seed=2),
        normal(2, 7, H, E, seed=3),
    )
    want, whole = flash_attn_func(q, k, v, causal=True)
    held, done, at = [np.zeros((2, 7, K, D)), np.zeros((2, 7, K, E))], [], 0
    for n in (2, 1, 4):
        now = slice(at, at + n)
        (out, *held), cache = flash_attn_with_kvcache(
            q[:, now], *held, k[:, now], v[:, now], cache_seqlens=at, causal=True
        )
        close(out, want[:, now])
        done.append((now, cache))
        at += n
    dheld, parts = [None, None], []
    for now, cache in reversed(done):
        dq, *dheld, dk, dv, _, _, _ = flash_attn_with_kvcache_vjp(cache, (dout[:, now], *dheld))
        parts.append((dq, dk, dv))
    for got, g in zip(zip(*parts[::-1], strict=True), flash_attn_func_vjp(whole, dout), strict=False):
        close(np.concatenate(got, axis=1), g)


def test_queries_without_positions_are_rotated_alike(each_engine):
    """Not causal and not local: the queries are "considered to be at position cache_seqlens", and need no other row."""
    q = np.broadcast_to(normal(1, 1, H, 4), (1, 3, H, 4))
    held, new = (normal(1, 7, K, 4), normal(1, 7, K, 4)), (normal(1, 2, K, 4), normal(1, 2, K, 4))
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    static = {"cache_seqlens": 4, "rotary_interleaved": False}
    (out, *_), _ = flash_attn_with_kvcache(q, *held, *new, rotary_cos=cos[:6], rotary_sin=sin[:6], **static)
    assert np.array_equal(out[:, 0], out[:, 1])
    (out, *_), _ = flash_attn_with_kvcache(q, *held, *new, rotary_cos=cos, rotary_sin=sin, **static, window_size=(7, 7))
    assert not np.allclose(out[:, 0], out[:, 1])


# ── the protocol ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_dense_keeps_the_protocol(each_engine):
    inputs = normal(2, 3, H, D), normal(2, 5, K, D), normal(2, 5, K, E), normal(2, H), normal(H), normal(2, 3, H, E)
    inputs = tuple(np.array(a) for a in inputs)
    check_vjp(flash_attn_func, flash_attn_func_vjp, inputs, {"causal": True, "window_size": (2, -1), "softcap": 1.3})


def test_varlen_keeps_the_protocol(each_engine):
    inputs = normal(5, H, D), normal(7, K, D), normal(7, K, E), normal(2, H), normal(H), normal(5, H, E)
    inputs = tuple(np.array(a) for a in inputs)
    static = {"cu_seqlens_q": cu([3, 2]), "cu_seqlens_k": cu([2, 5]), "causal": True}
    check_vjp(flash_attn_varlen_func, flash_attn_varlen_func_vjp, inputs, static)


def test_kvcache_keeps_the_protocol(each_engine):
    inputs = tuple(
        np.array(a)
        for a in (
            normal(2, 3, H, D),
            normal(2, 7, K, D),
            normal(2, 7, K, E),
            normal(2, 2, K, D),
            normal(2, 2, K, E),
            normal(H),
            normal(H, seed=1),
            normal(2, 3, H, E),
        )
    )

    def f(*inputs, **static):
        y, cache = flash_attn_with_kvcache(*inputs, **static)
        return np.concatenate([x.ravel() for x in y]), (cache, [x.shape for x in y])

    def f_vjp(cache, dy):
        cache, shapes = cache
        parts = np.split(dy, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
        return flash_attn_with_kvcache_vjp(
            cache, tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        )

    table = {"rotary_cos": normal(9, 2), "rotary_sin": normal(9, 2, seed=1)}
    check_vjp(f, f_vjp, inputs, {"cache_seqlens": np.array([5, 1]), "causal": True} | table)


# ── dtypes and libraries ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_half_types_are_rounded_once(each_engine, dtype):
    """flash-attention wants slopes of float32 beside half types, and FA4 a sink of any."""
    q, k, v = (np.array(x).astype(dtype) for x in (normal(2, 3, H, D), normal(2, 5, K, D), normal(2, 5, K, E)))
    slopes, sink = np.array(normal(H), np.float32), np.array(normal(H)).astype(dtype)
    wide = [np.array(x, np.float32) for x in (q, k, v, slopes, sink)]
    want, of_wide = flash_attn_func(*wide, causal=True)
    out, cache = flash_attn_func(q, k, v, slopes, sink, causal=True)
    assert out.dtype == q.dtype
    assert np.array_equal(out, want.astype(dtype))
    assert log_sum_exp(cache).dtype == np.float32

    dout = np.array(normal(2, 3, H, E)).astype(dtype)
    grads = flash_attn_func_vjp(cache, dout)
    for got, g, x in zip(
        grads, flash_attn_func_vjp(of_wide, dout.astype(np.float32)), (q, k, v, slopes, sink), strict=False
    ):
        assert got.dtype == x.dtype
        assert np.array_equal(got, g.astype(x.dtype))


def test_shared_gradients_are_summed_before_rounding(each_engine):
    q, k, v = (np.array(normal(12, n, D)).astype("f2") for n in (H, K, K))
    slopes, at = np.array(normal(H)).astype("f2"), {"cu_seqlens_q": cu([4] * 3), "cu_seqlens_k": cu([4] * 3)}
    out, cache = flash_attn_varlen_func(q, k, v, slopes, **at)
    wide = [x.astype("f4") for x in (q, k, v, slopes)]
    want, of_wide = flash_attn_varlen_func(*wide, **at)
    assert np.array_equal(out, want.astype("f2"))
    grads = flash_attn_varlen_func_vjp(of_wide, out.astype("f4"))
    for got, g in zip(flash_attn_varlen_func_vjp(cache, out)[:4], grads, strict=False):
        assert got.dtype == np.float16
        assert np.array_equal(got, g.astype("f2"))


def test_keys_are_attended_as_stored_in_the_cache(each_engine):
    """In half types rotated keys and queries are rounded before they are used."""
    q, k, v = (np.array(normal(1, 1, h, 4, seed=h)).astype("f2") for h in (K, K, K))
    empty, table = np.zeros((1, 3, K, 4), "f2"), {"rotary_cos": np.cos(ANGLES), "rotary_sin": np.sin(ANGLES)}
    (_, rotated_q, _), _ = flash_attn_with_kvcache(q, empty, empty, q, v, cache_seqlens=1, **table)
    (out, k_cache, v_cache), _ = flash_attn_with_kvcache(q, empty, empty, k, v, cache_seqlens=1, **table)
    assert k_cache.dtype == np.float16
    want, _ = flash_attn_func(rotated_q[:, 1:2], k_cache[:, :2], v_cache[:, :2])
    assert np.array_equal(out, want)


def test_every_library_gives_the_same(xp):
    dense = normal(2, 3, H, D), normal(2, 5, K, D), normal(2, 5, K, E), normal(2, H), normal(H)
    packed = normal(5, H, D), normal(7, K, D), normal(7, K, E), normal(H), normal(H)
    cached = normal(2, 1, H, D), normal(3, 7, K, D), normal(3, 7, K, E), normal(2, 1, K, D), normal(2, 1, K, E)
    table = {"rotary_cos": normal(9, 2), "rotary_sin": normal(9, 2, seed=1)}
    of_packed = {"cu_seqlens_q": cu([3, 2]), "cu_seqlens_k": cu([2, 5]), "seqused_k": np.array([1, 5])}
    of_cached = {"cache_seqlens": np.array([5, 1]), "cache_batch_idx": np.array([2, 0])}
    static = {"causal": True, "attention_chunk": 4}
    for f, f_vjp, inputs, own, arrays in (
        (flash_attn_func, flash_attn_func_vjp, dense, {}, {}),
        (flash_attn_varlen_func, flash_attn_varlen_func_vjp, packed, of_packed, {}),
        (flash_attn_with_kvcache, flash_attn_with_kvcache_vjp, cached, of_cached, table),
    ):
        cache_of_theirs, cache = same_in(xp, f, f_vjp, inputs, static | own, arrays)
        close(xp.back(log_sum_exp(cache_of_theirs)), log_sum_exp(cache))


def same_in(xp, f, f_vjp, inputs, static, arrays):
    """Both caches, of another library's arrays and of NumPy's, from which outputs and gradients are the same."""
    want, cache = f(*inputs, **static, **arrays)
    theirs = {name: xp.to(a) for name, a in arrays.items()}
    got, cache_of_theirs = f(*(None if x is None else xp.to(x) for x in inputs), **static, **theirs)
    for a, b in zip(f_vjp(cache_of_theirs, got), f_vjp(cache, want), strict=True):
        close(None if a is None else xp.back(a), b)
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
        close(xp.back(a), b)
    return cache_of_theirs, cache


def test_gradients_follow_their_functions():
    for module in ("dense", "varlen", "packed", "kvcache", "combine"):
        source = inspect.getsource(importlib.import_module(f"funcmha.interop.flash_attn.{module}"))
        names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        vjps = [name for name in names if name.endswith("_vjp")]
        assert vjps
        assert all(names[names.index(name) - 1] == name.removesuffix("_vjp") for name in vjps)


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

DENSE = {
    "q": np.ones((2, 3, 6, 5)),
    "k": np.ones((2, 7, 2, 5)),
    "v": np.ones((2, 7, 2, 4)),
    "slopes": None,
    "sink": None,
    "qv": None,
}
VARLEN = {"q": np.ones((5, 6, 5)), "k": np.ones((7, 2, 5)), "v": np.ones((7, 2, 4)), "slopes": None, "sink": None}
VARLEN |= {"qv": None}
TABLE = np.array([[0, 1], [1, 2]])
PAGES = {"k": np.ones((3, 3, 2, 5)), "v": np.ones((3, 3, 2, 4)), "page_table": TABLE}
AT = {"cu_seqlens_q": cu([2, 3]), "cu_seqlens_k": cu([3, 4])}
CACHED = {"q": DENSE["q"], "k_cache": np.ones((3, 7, 2, 5)), "v_cache": np.ones((3, 7, 2, 4))}
CACHED |= {"k": np.ones((2, 1, 2, 5)), "v": np.ones((2, 1, 2, 4)), "slopes": None, "sink": None, "qv": None}


def call(f, inputs, changes):
    """f with some of its inputs and options changed"""
    positional = {name: changes.get(name, x) for name, x in inputs.items()}
    return f(*positional.values(), **{name: x for name, x in changes.items() if name not in inputs})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be an array, got list"),
        ({"v": np.ones((2, 7, 2, 4), int)}, TypeError, "v must have a dtype of .*, got int64"),
        ({"k": np.ones((2, 7, 2, 5), "f4")}, TypeError, "k must have dtype float64 as q has, got float32"),
        ({"q": np.ones((3, 6, 5))}, ValueError, r"q must be \(B, T, H, D\), got \(3, 6, 5\)"),
        ({"k": np.ones((3, 7, 2, 5))}, ValueError, r"k must be \(B, S, K, D\) with B=2 as in q, D=5 as in q, got"),
        (
            {"v": np.ones((2, 5, 2, 4))},
            ValueError,
            r"v must be \(B, S, K, E\) with .*S=7 as in k.*, got \(2, 5, 2, 4\)",
        ),
        ({"q": np.ones((2, 3, 5, 5))}, ValueError, "q has H=5 heads, which must be a multiple of K=2 as in k"),
        ({"slopes": [1.0] * 6}, TypeError, "alibi_slopes must be an array, got list"),
        ({"slopes": np.ones(5)}, ValueError, r"alibi_slopes must be \(H\) with H=6 as in q, got \(5,\)"),
        ({"slopes": np.ones((3, 6))}, ValueError, r"alibi_slopes must be \(B, H\) with B=2 as in q, H=6 as in q, got"),
        ({"slopes": np.ones(6, "f4")}, TypeError, "alibi_slopes must have dtype float64, in which q is computed"),
        ({"sink": np.ones((2, 6))}, ValueError, r"learnable_sink must be \(H\) with H=6 as in q, got \(2, 6\)"),
        ({"sink": np.ones(6, int)}, TypeError, "learnable_sink must have a dtype of"),
        (
            {"qv": np.ones((2, 3, 6, 5))},
            ValueError,
            r"qv must be \(B, T, H, E\) with .*E=4 as in v, got \(2, 3, 6, 5\)",
        ),
        ({"qv": [1.0]}, TypeError, "qv must be an array, got list"),
        ({"gather_kv_indices": [[0]]}, TypeError, "gather_kv_indices must be a NumPy array of integers, got list"),
        (
            {"gather_kv_indices": np.zeros((2, 7, 1), int)},
            ValueError,
            r"gather_kv_indices must be \(B, T, R\) with B=2 as in q, T=3 as in q, got \(2, 7, 1\)",
        ),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"window_size": 3}, TypeError, r"window_size must be a pair \(left, right\), got 3"),
        ({"window_size": (3,)}, TypeError, "window_size must be a pair"),
        ({"window_size": (-2, 0)}, ValueError, "window_size must be at least -1, where -1 is no bound, got -2"),
        ({"window_size": (0, 1.0)}, TypeError, "window_size must be an int, .* got 1.0 of type float"),
        ({"window_size": (True, 1)}, TypeError, "window_size must be an int, .* got True"),
        ({"attention_chunk": -1}, ValueError, "attention_chunk must be at least 0, got -1"),
        ({"attention_chunk": 2.0}, TypeError, "attention_chunk must be an int, got 2.0"),
        ({"attention_chunk": 2**63}, ValueError, r"attention_chunk must be below 2\*\*63, got 9223372036854775808"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0 and below inf, got -1.0"),
        ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be finite, got inf"),
        ({"dropout_p": 0.1}, ValueError, "keep must be given with dropout_p=0.1"),
        ({"keep": np.ones((3, 7), bool)}, ValueError, "dropout_p must be given with keep"),
        ({"dropout_p": 1.0, "keep": np.ones((3, 7), bool)}, ValueError, "dropout_p must be at least 0 and below 1"),
        ({"keep": np.ones((3, 7))}, TypeError, "keep must be boolean, True = keep"),
        ({"keep": np.ones((7, 3), bool)}, ValueError, r"keep must broadcast to \(B, H, T, S\) = \(2, 6, 3, 7\), got"),
        ({"keep": seeded(1, 0.3), "dropout_p": 0.1}, ValueError, "dropout_p must be left out, as keep has rate=0.3"),
    ],
)
def test_flash_attn_func_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(flash_attn_func, DENSE, changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": np.ones((1, 5, 6, 5))}, ValueError, r"q must be \(N, H, D\), got \(1, 5, 6, 5\)"),
        ({"cu_seqlens_q": [0, 2, 5]}, TypeError, r"cu_seqlens_q must be a NumPy array of integers, got"),
        (
            {"cu_seqlens_q": np.array([0.0, 5.0])},
            TypeError,
            r"cu_seqlens_q must be a NumPy array of integers, got float64",
        ),
        ({"cu_seqlens_q": np.array([1, 2, 5])}, ValueError, r"cu_seqlens_q must begin with 0 and never fall"),
        ({"cu_seqlens_k": np.array([0, 8, 7])}, ValueError, r"cu_seqlens_k must begin with 0 and never fall"),
        ({"cu_seqlens_k": np.array([0, 2, 6])}, ValueError, r"cu_seqlens_k must end with N=7 as in k, got 6"),
        (
            {"cu_seqlens_k": np.array([0, 7])},
            ValueError,
            r"cu_seqlens_k must be .* with B=2 as in cu_seqlens_q, got B=1",
        ),
        (
            {"seqused_k": np.array([3, 5])},
            ValueError,
            r"seqused_k must be at most the lengths \[3, 4\] of cu_seqlens_k",
        ),
        ({"seqused_q": np.array([2])}, ValueError, r"seqused_q must be \(B,\) with B=2, got \(1,\)"),
        (
            {"seqused_q": np.array([2, 2**64 - 1], np.uint64)},
            ValueError,
            r"seqused_q must be below 2\*\*63, got \[2, 18446744073709551615\]",
        ),
        ({"seqused_q": [2, 2]}, TypeError, "seqused_q must be a NumPy array of integers, got list"),
        ({"seqused_q": np.array([-1, 2])}, ValueError, r"seqused_q must be at least 0, got \[-1, 2\]"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least 3, as the longest sequence is, got 2"),
        ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be an int, got 4.0"),
        ({"cu_seqlens_k": None}, ValueError, r"k must be \(B, S, K, D\) with D=5 as in q, got"),
        ({"block_table": TABLE}, ValueError, r"k must be \(P, L, K, D\) with D=5 as in q, got"),
        ({"block_table": TABLE, "page_table": TABLE}, ValueError, "page_table must be left out with block_table"),
        (
            PAGES | {"page_table": None, "block_table": TABLE[:1]},
            ValueError,
            r"block_table must be \(B, …\) with B=2 as in cu_seqlens_q, got",
        ),
        (
            PAGES | {"page_table": None, "block_table": TABLE[0]},
            ValueError,
            r"block_table must be \(B, …\), got \(2,\)",
        ),
        (PAGES | {"cu_seqlens_k": cu([3, 7])}, ValueError, r"page_table must have slots for the lengths \[3, 7\] of"),
        (PAGES | {"page_table": TABLE + 2}, ValueError, "page_table must be within 0 … 2 for the slots in use, got"),
        (PAGES | {"seqused_k": np.array([3, 5])}, ValueError, r"seqused_k must be at most the lengths \[3, 4\] of"),
        (
            {"gather_kv_indices": np.zeros((4, 1), int)},
            ValueError,
            r"gather_kv_indices must be \(N, R\) with N=5 as in q",
        ),
        ({"slopes": np.ones((3, 6))}, ValueError, r"alibi_slopes must be \(B, H\) with B=2 as in cu_seqlens_q"),
        ({"keep": np.ones((2, 6, 3, 3), bool)}, ValueError, r"keep must broadcast to \(B, H, T, S\) = \(2, 6, 3, 4\)"),
    ],
)
def test_flash_attn_varlen_func_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(flash_attn_varlen_func, VARLEN, AT | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": None}, ValueError, "k and v must both be given or neither, got no v"),
        ({"k_cache": np.ones((3, 7, 2, 3))}, ValueError, r"k_cache must be \(P, L, K, D\) with D=5 as in q, got"),
        ({"v_cache": np.ones((2, 7, 2, 4))}, ValueError, r"v_cache must be \(P, L, K, E\) with P=3 as in k_cache"),
        ({"k": np.ones((1, 1, 2, 5))}, ValueError, r"k must be \(B, U, K, D\) with B=2 as in q"),
        ({"k_cache": np.ones((3, 7, 4, 5))}, ValueError, r"v_cache must be .* K=4 as in k_cache"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k"),
        ({"cache_seqlens": 7}, ValueError, r"cache_seqlens must leave room for \[1, 1\] in 7 slots, got"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be at least 0 .*got -1"),
        ({"cache_seqlens": 1.0}, TypeError, "cache_seqlens must be an int or a NumPy array .*got 1.0"),
        ({"cache_seqlens": np.array([1])}, ValueError, r"cache_seqlens must be \(B,\) with B=2, got \(1,\)"),
        ({"cache_batch_idx": np.array([0, 3])}, ValueError, r"cache_batch_idx must be within 0 … 2, got \[0, 3\]"),
        ({"cache_batch_idx": np.array([1, 1])}, ValueError, "cache_batch_idx must give each new key a slot of its own"),
        ({"cache_batch_idx": [1, 0]}, TypeError, "cache_batch_idx must be a NumPy array"),
        ({"cache_leftpad": np.array([0, 5])}, ValueError, r"cache_leftpad must be at most cache_seqlens=\[4, 4\], got"),
        ({"block_table": TABLE, "page_table": TABLE}, ValueError, "page_table must be left out with block_table"),
        (
            {"block_table": TABLE, "cache_batch_idx": np.array([0, 2])},
            ValueError,
            "cache_batch_idx must be within 0 … 1",
        ),
        (
            {"cu_seqlens_k_new": cu([1, 1]), "k": None, "v": None},
            ValueError,
            "cu_seqlens_k_new must be left out without",
        ),
        ({"cu_seqlens_q": cu([2, 1])}, ValueError, r"q must be \(N, H, D\), got \(2, 3, 6, 5\)"),
        (
            {"q": np.ones((5, 6, 5)), "cu_seqlens_q": cu([2, 2, 1])},
            ValueError,
            "cu_seqlens_q must be .* B=2 as in k, got",
        ),
        (
            {"k": np.ones((3, 2, 5)), "v": np.ones((3, 2, 4)), "cu_seqlens_k_new": cu([4])},
            ValueError,
            "must end with N=3",
        ),
        ({"rotary_seqlens": np.array([1, 2])}, ValueError, "rotary_seqlens must be left out without rotary_cos"),
        ({"qv": np.ones((2, 3, 6, 5))}, ValueError, r"qv must be \(B, T, H, E\) with .*E=4 as in v_cache, got"),
        ({"block_table": TABLE / 1}, TypeError, "block_table must be a NumPy array of integers, got float64"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table must be \(B, …\) with B=2 as in q, got \(1, 2\)"),
        ({"block_table": np.array([[0], [3]])}, ValueError, "block_table must be within 0 … 2 for the slots in use"),
        ({"block_table": np.array([[0], [-1]])}, ValueError, "block_table must be within 0 … 2 for the slots in use"),
        ({"block_table": np.array([[1], [1]])}, ValueError, "block_table must give each new key a slot of its own"),
        (
            {"rotary_cos": np.ones((9, 2))},
            ValueError,
            "rotary_cos and rotary_sin must both be given or neither, got no sin",
        ),
        (
            {"rotary_cos": np.ones((9, 2)), "rotary_sin": np.ones((9, 2)), "k": None, "v": None},
            ValueError,
            "rotary_cos must be left out without k",
        ),
        (
            {"rotary_cos": np.ones((9, 2)), "rotary_sin": np.ones((9, 1))},
            ValueError,
            r"rotary_sin must be \(W, F\) with",
        ),
        (
            {"rotary_cos": np.ones((6, 2)), "rotary_sin": np.ones((6, 2)), "causal": True},
            ValueError,
            "rotary_cos must have W=7 positions",
        ),
        (
            {"rotary_cos": np.ones((9, 3)), "rotary_sin": np.ones((9, 3))},
            ValueError,
            "rotary_cos must rotate at most D=5",
        ),
        (
            {"q": np.ones((4, 3, 6, 5)), "k": None, "v": None},
            ValueError,
            "k_cache must have a sequence for each of B=4",
        ),
        ({"slopes": np.ones(5)}, ValueError, r"alibi_slopes must be \(H\) with H=6 as in q"),
    ],
)
def test_flash_attn_with_kvcache_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(flash_attn_with_kvcache, CACHED, {"cache_seqlens": 4} | changes)


def test_packed_inputs_and_cotangents_are_checked():
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, 3, H, D\), got \(2, 5, 2, 6, 5\)"):
        flash_attn_qkvpacked_func(np.ones((2, 5, 2, 6, 5)))
    with pytest.raises(ValueError, match=r"kv must be \(B, S, 2, K, D\), got \(5, 2, 6, 5\)"):
        flash_attn_kvpacked_func(DENSE["q"], np.ones((5, 2, 6, 5)))
    with pytest.raises(ValueError, match=r"qkv must be \(N, 3, H, D\), got \(5, 2, 6, 5\)"):
        flash_attn_varlen_qkvpacked_func(np.ones((5, 2, 6, 5)), cu_seqlens=cu([5]))
    with pytest.raises(ValueError, match="cu_seqlens must end with N=5 as in qkv, got 4"):
        flash_attn_varlen_qkvpacked_func(np.ones((5, 3, 6, 5)), cu_seqlens=cu([4]))
    with pytest.raises(ValueError, match=r"kv must be \(M, 2, K, D\), got \(2, 5, 2, 2, 5\)"):
        flash_attn_varlen_kvpacked_func(
            np.ones((5, 6, 5)), np.ones((2, 5, 2, 2, 5)), cu_seqlens_q=cu([5]), cu_seqlens_k=cu([5])
        )
    _, cache = call(flash_attn_func, DENSE, {})
    with pytest.raises(
        ValueError, match=r"dout must be \(B, T, H, E\) = \(2, 3, 6, 4\) as the output is, got \(2, 6, 3, 4\)"
    ):
        flash_attn_func_vjp(cache, np.ones((2, 6, 3, 4)))
    _, cache = call(flash_attn_varlen_func, VARLEN, AT)
    with pytest.raises(ValueError, match=r"dlse must be \(H, N\) = \(6, 5\) as the output is, got \(5, 6\)"):
        flash_attn_varlen_func_vjp(cache, np.ones((5, 6, 4)), dlse=np.ones((5, 6)))
    _, cache = call(flash_attn_with_kvcache, CACHED, {"cache_seqlens": 4})
    with pytest.raises(TypeError, match=r"dy must be \(dout, dk_cache, dv_cache\) as the output is, got ndarray"):
        flash_attn_with_kvcache_vjp(cache, np.ones((2, 3, 6, 4)))
    with pytest.raises(ValueError, match=r"dk_cache must be \(P, L, K, D\) = \(3, 7, 2, 5\) as the output is"):
        flash_attn_with_kvcache_vjp(cache, (None, np.ones((3, 7, 2, 4)), None))
