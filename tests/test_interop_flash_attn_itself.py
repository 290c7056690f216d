"""flash-attention's calls. The oracle is the reference in its own tests.

The wheel of flash-attn-4 has it in flash_attn/cute/testing.py, with the functions that pack and unpack sequences. It is
PyTorch alone, and runs in float64. Its version is 4.0.0b36. Two of its options are not tested: sink_token_length, which
no kernel takes, and the descale factors, which the adapter does not support.

tests/test_flash_attn_kernels.py runs the kernels.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interop_flash_attn import D, E, H, K, all_close, close, cu, gradients, leaf, logits, normal, size
from test_interop_flash_attn_options import known

from funcmha import attention_weights, log_sum_exp
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


class Wide:
    """torch, whose float32 is float64, and which has no "cuda".

    Beside a sink `attention_ref` rounds scores to float32 whatever its inputs, and listed keys it looks for on a GPU.
    """

    float32 = torch.float64

    def full(self, *args, device, **options):
        return torch.full(*args, **options)

    def __getattr__(self, name):
        return getattr(torch, name)


def installed(file):
    """A file of flash_attn/cute by its path: the package around it imports CUDA."""
    try:
        return importlib.metadata.distribution("flash-attn-4").locate_file(f"flash_attn/cute/{file}")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed: pip install --no-deps -r tests/side_by_side.txt")


@functools.cache
def library(*, wide=True):
    spec = importlib.util.spec_from_file_location("flash_attn_testing", installed("testing.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if wide:
        module.torch = Wide()
    return module


def theirs(q, k, v, slopes=None, sink=None, *, softmax_scale=None, alibi=None, wide=True, **options):
    """out, weights, lse of `attention_ref`, with the scale as a factor of q, and slopes as attn_bias"""
    if softmax_scale is not None:
        q = q * (softmax_scale * math.sqrt(q.shape[-1]))
    bias = None
    if slopes is not None:
        at = alibi or functools.partial(distances, q.shape[1], k.shape[1])
        bias = -(slopes if slopes.ndim == 2 else slopes[None])[:, :, None, None] * at()
        if bias.requires_grad:
            bias.register_hook(torch.nan_to_num)  # `test_fully_masked_rows_have_nan_in_the_reference`
    of_scores = {"attn_bias": bias, "learnable_sink": sink}
    reference = library(wide=wide).attention_ref
    return reference(q, k, v, upcast=False, return_lse=True, **of_scores, **options)


def distances(T, S, sq=None, sk=None, pad=0):
    """|i + sk − sq − (j − pad)|, as FA2's `attn_bias_from_alibi_slopes` has it where it is not causal"""
    sq, sk = T if sq is None else sq, S if sk is None else sk
    return (torch.arange(T)[:, None] + sk - sq - (torch.arange(S) - pad)).abs()


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────

bound = st.sampled_from([None, 0, 1, 2, 5])
GRADIENTS = "dq dk dv dalibi_slopes dlearnable_sink"


@st.composite
def options(draw):
    """Options of the scores that both take."""
    return {
        "softmax_scale": draw(st.sampled_from([None, 0.7, -1.3])),
        "causal": draw(st.booleans()),
        "window_size": (draw(bound), draw(bound)),
        "attention_chunk": draw(st.sampled_from([0, 0, 1, 2, 3])),
        "softcap": draw(st.sampled_from([0.0, 1.7])),
    }


@st.composite
def dropout(draw, *shape):
    """Our and their options for dropout, or for none."""
    if draw(st.booleans()):
        return {}, {}
    keep = np.random.default_rng(5).random(shape) > 0.4
    return {"keep": keep, "dropout_p": 0.4}, {"dropout_mask": torch.tensor(keep), "dropout_p": 0.4}


def tensor(a):
    return torch.tensor(np.array(a))


def masked(n, N):
    """(B, N), True for the first n[b]"""
    return torch.arange(N) < torch.tensor(n)[:, None]


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_combine"])
def test_every_parameter_of_fa4_is_known(name):
    body = ast.parse(installed("interface.py").read_text()).body
    (arguments,) = (node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    theirs = {node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)}
    assert {"return_lse"} <= theirs <= known(name)


# ── flash_attn_func ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.data(), st.sampled_from([1, 2]), size, size, options())
def test_dense_matches_the_reference(each_engine, data, B, T, S, static):
    inputs = [normal(B, T, H, D), normal(B, S, K, D, seed=1), normal(B, S, K, E, seed=2), *data.draw(logits(B))]
    drop, of_theirs = data.draw(dropout(B, H, T, S))
    out, cache = flash_attn_func(*inputs, **static, **drop)
    leaves = [leaf(x) for x in inputs]
    want = theirs(*leaves, **static, **of_theirs)
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)

    dout, dweights, dlse = normal(B, T, H, E, seed=5), normal(B, H, T, S, seed=6), normal(B, H, T, seed=7)
    *grads, _ = flash_attn_func_vjp(cache, dout, dweights=dweights, dlse=dlse)
    all_close(GRADIENTS, grads, gradients(want, [dout, dweights, dlse], leaves))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gathers", [False, True])
def test_qv_and_listed_keys_match_the_reference(each_engine, gathers, causal):
    """Each query attends to key 0: a fully masked row is NaN there."""
    inputs = normal(2, 3, H, D), normal(2, 5, K, D, seed=1), normal(2, 5, K, E, seed=2), normal(2, 3, H, E, seed=3)
    listed = np.random.default_rng(1).integers(-1, 6, (2, 3, 4)) * [0, 1, 1, 1] if gathers else None
    static = {"causal": causal, "softcap": 1.7}
    out, cache = flash_attn_func(*inputs[:3], None, None, inputs[3], gather_kv_indices=listed, **static)

    leaves = [leaf(x) for x in inputs]
    *rest, of_values = leaves
    of_keys = None if listed is None else torch.tensor(listed)
    want = theirs(*rest, qv=of_values, gather_kv_indices=of_keys, **static)
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)
    dy = [normal(*x.shape, seed=5) for x in want]
    dq, dk, dv, _, _, dqv = flash_attn_func_vjp(cache, dy[0], dweights=dy[1], dlse=dy[2])
    all_close("dq dk dv dqv", (dq, dk, dv, dqv), gradients(want, dy, leaves))


@pytest.mark.parametrize("which", ["qkv", "kv"])
def test_packed_inputs_match_the_reference(each_engine, which):
    n = 3 if which == "qkv" else 2
    packed, q, slopes, sink = normal(2, 5, n, H, D), normal(2, 5, H, D, seed=1), normal(2, H), normal(H)
    static, dout, dlse = {"causal": True, "softcap": 1.7}, normal(2, 5, H, D, seed=2), normal(2, H, 5)
    of_packed, names = ([packed], "dqkv") if which == "qkv" else ([q, packed], "dq dkv")
    inputs = [*of_packed, slopes, sink]
    leaves = [leaf(x) for x in inputs]
    parts = [*leaves[:-3], *leaves[-3].unbind(2)]
    out, _, lse = theirs(*parts, *leaves[-2:], **static)
    f, f_vjp = (
        (flash_attn_qkvpacked_func, flash_attn_qkvpacked_func_vjp)
        if which == "qkv"
        else (flash_attn_kvpacked_func, flash_attn_kvpacked_func_vjp)
    )
    got, cache = f(*inputs, **static)
    all_close("out lse", (got, log_sum_exp(cache)), (out, lse))
    grads = f_vjp(cache, dout, dlse=dlse)
    all_close(f"{names} dalibi_slopes dlearnable_sink", grads, gradients([out, lse], [dout, dlse], leaves))


# ── flash_attn_varlen_func, from padded sequences by their own `generate_qkv` ────────────────────────────────────


@st.composite
def padded(draw):
    """(T, S), and of each sequence how many queries and keys are used, and how many are there"""
    n = st.sampled_from([0, 1, 2, 3, 5])
    there = draw(st.lists(st.tuples(n, n), min_size=1, max_size=3))
    used = [tuple(draw(st.integers(0, n)) for n in pair) for pair in there] if draw(st.booleans()) else there
    return (5, 7), used, there


def packed_by(mask, x):
    """The tokens of `mask` (B, T), one sequence after another: x (B, T, …)   →   (N, …)"""
    return library().unpad_input(tensor(x), mask)[0].numpy()


@given(st.data(), padded(), options())
def test_varlen_matches_the_reference(each_engine, data, problem, static):
    (T, S), used, there = problem
    B, (uq, uk), (nq, nk) = len(used), zip(*used, strict=True), zip(*there, strict=True)
    batch = [normal(B, T, H, D), normal(B, S, K, D, seed=1), normal(B, S, K, E, seed=2)]
    slopes, sink = data.draw(logits(B))
    drop, of_theirs = data.draw(dropout(B, H, T, S))
    q_mask, k_mask = masked(uq, T), masked(uk, S)
    unused = {"query_unused_mask": masked(nq, T) ^ q_mask, "key_unused_mask": masked(nk, S) ^ k_mask}
    packing = library().generate_qkv(*map(tensor, batch), q_mask, k_mask, **unused)
    q, k, v, _, cu_q, cu_k, used_q, used_k, _, _, *leaves, _, pad_out, pad_dq, pad_dk = packing

    at = {"cu_seqlens_q": cu_q.numpy(), "cu_seqlens_k": cu_k.numpy(), "max_seqlen_q": T, "max_seqlen_k": S}
    at |= {"seqused_q": used_q.numpy(), "seqused_k": used_k.numpy()}
    packed = [x.detach().numpy() for x in (q, k, v)]
    out, cache = flash_attn_varlen_func(*packed, slopes, sink, **at, **static, **drop)

    leaves += [leaf(slopes), leaf(sink)]
    sq, sk = (torch.tensor(n)[:, None, None, None] for n in (uq, uk))
    static |= {"query_padding_mask": q_mask, "key_padding_mask": k_mask} | of_theirs
    want, weights, lse = theirs(*leaves, alibi=functools.partial(distances, T, S, sq, sk), **static)
    lse = lse.masked_fill(~q_mask[:, None], -math.inf)  # theirs of a query that does not count is of no use
    close(pad_out(tensor(out)).numpy(), want, "out")
    close(attention_weights(cache), weights, "weights")
    close(log_sum_exp(cache).T, packed_by(masked(nq, T), lse.detach().mT.numpy()), "lse")

    dout, dweights, dlse = (normal(*x.shape, seed=5) for x in (want, weights, lse))
    of_packed, of_lse = (packed_by(masked(nq, T), x) for x in (dout, dlse.swapaxes(1, 2)))
    dq, dk, dv, *of_heads, _ = flash_attn_varlen_func_vjp(cache, of_packed, dweights=dweights, dlse=of_lse.T)
    got = *(pad(tensor(dx)).numpy() for pad, dx in ((pad_dq, dq), (pad_dk, dk), (pad_dk, dv))), *of_heads
    all_close(GRADIENTS, got, gradients([want, weights, lse], [dout, dweights, dlse], leaves))


PACKED = {"causal": True, "window_size": (1, None)}


def test_packed_sequences_match_the_reference(each_engine):
    mask, sink, dout = masked([3, 5], 5), normal(H), normal(2, 5, H, D, seed=3)
    batch = (tensor(normal(2, 5, H, D, seed=seed)) for seed in range(3))
    qkv, lengths, longest, leaf_of, pad_out, pad_grad = library().generate_qkv(*batch, mask, mask, qkvpacked=True)
    at = {"cu_seqlens": lengths.numpy(), "max_seqlen": longest}
    out, cache = flash_attn_varlen_qkvpacked_func(qkv.detach().numpy(), None, sink, **at, **PACKED)

    leaves = leaf_of, leaf(sink)
    want, *_ = theirs(*leaf_of.unbind(2), None, leaves[1], query_padding_mask=mask, key_padding_mask=mask, **PACKED)
    close(pad_out(tensor(out)).numpy(), want)
    dqkv, _, dsink = flash_attn_varlen_qkvpacked_func_vjp(cache, packed_by(mask, dout))
    all_close("dqkv dsink", (pad_grad(tensor(dqkv)).numpy(), dsink), gradients([want], [dout], leaves))


def test_packed_keys_of_sequences_match_the_reference(each_engine):
    mask, of_keys, sink, dout = masked([3, 5], 5), masked([7, 2], 7), normal(H), normal(2, 5, H, D, seed=3)
    batch = (tensor(normal(2, n, heads, D, seed=seed)) for seed, (n, heads) in enumerate([(5, H), (7, K), (7, K)]))
    packing = library().generate_qkv(*batch, mask, of_keys, kvpacked=True)
    q, kv, cu_q, cu_k, _, _, *leaves, pad_out, pad_dq, pad_dkv = packing
    at = {"cu_seqlens_q": cu_q.numpy(), "cu_seqlens_k": cu_k.numpy()}
    packed = (x.detach().numpy() for x in (q, kv))
    out, cache = flash_attn_varlen_kvpacked_func(*packed, None, sink, **at, **PACKED)

    leaves += [leaf(sink)]
    q, kv, of_sink = leaves
    want, *_ = theirs(q, *kv.unbind(2), None, of_sink, query_padding_mask=mask, key_padding_mask=of_keys, **PACKED)
    close(pad_out(tensor(out)).numpy(), want)
    dq, dkv, _, dsink = flash_attn_varlen_kvpacked_func_vjp(cache, packed_by(mask, dout))
    got = pad_dq(tensor(dq)).numpy(), pad_dkv(tensor(dkv)).numpy(), dsink
    all_close("dq dkv dsink", got, gradients([want], [dout], leaves))


# ── flash_attn_with_kvcache, as their tests of it are written ────────────────────────────────────────────────────


@st.composite
def caches(draw):
    """Sizes, the pages of each sequence, and the options"""
    B, T, U = draw(st.sampled_from([1, 2])), draw(size), draw(st.sampled_from([None, 1, 2, 3]))
    kind = draw(st.sampled_from(["own", "picked", "paged"]))
    P, N, pages = (5, 3, 2) if kind == "paged" else (3, 7, 1)
    order = np.array(draw(st.permutations(range(P)))[: B * pages]).reshape(B, pages)
    table = np.arange(B)[:, None] if kind == "own" else order
    args = {"own": {}, "picked": {"cache_batch_idx": table[:, 0]}, "paged": {"block_table": table}}[kind]
    room = N * pages - (U or 0)
    seqlens = np.array([draw(st.integers(0, room)) for _ in range(B)], np.int32)
    args["cache_seqlens"] = seqlens
    if kind != "paged" and draw(st.booleans()):
        args["cache_leftpad"] = np.array([draw(st.integers(0, int(n))) for n in seqlens], np.int32)
    return (B, T, U, P, N), table, args


def theirs_with_kvcache(q, k_cache, v_cache, k, v, slopes, sink, *, table, seqlens, leftpad, **static):
    """out, k_cache', v_cache', lse: the new keys are written by a mask of the slots, and all others are padding"""
    table, seqlens = torch.tensor(table), torch.tensor(seqlens)[:, None]
    leftpad = torch.zeros_like(seqlens) if leftpad is None else torch.tensor(leftpad)[:, None]
    S, new = table.shape[1] * k_cache.shape[1], 0 if k is None else k.shape[1]
    slot = torch.arange(S)
    held = []
    for pages, x in ((k_cache, k), (v_cache, v)):
        slots = pages[table].flatten(1, 2)
        if x is not None:
            slots[(seqlens <= slot) & (slot < seqlens + new)] = x.flatten(0, 1)
        held.append(slots)
    mask = (slot < seqlens + new) & (slot >= leftpad)
    sk, pad = (x[:, None, None] for x in (seqlens + new - leftpad, leftpad))
    alibi = functools.partial(distances, q.shape[1], S, None, sk, pad)
    out, _, lse = theirs(
        q, *held, slopes, sink, key_padding_mask=mask, key_leftpad=leftpad[:, 0], alibi=alibi, **static
    )
    caches = [pages.clone() for pages in (k_cache, v_cache)]
    for pages, slots in zip(caches, held, strict=True):
        pages[table] = slots.unflatten(1, (table.shape[1], -1))
    return out, *caches, lse


@given(st.data(), caches(), options())
def test_kvcache_matches_the_reference(each_engine, data, problem, static):
    (B, T, U, P, N), table, args = problem
    new = [None, None] if U is None else [normal(B, U, K, D, seed=3), normal(B, U, K, E, seed=4)]
    held = [normal(P, N, K, D, seed=1), normal(P, N, K, E, seed=2)]
    inputs = [normal(B, T, H, D), *held, *new, *data.draw(logits(B))]
    y, cache = flash_attn_with_kvcache(*inputs, **args, **static)

    leaves = [leaf(x) for x in inputs]
    where = {"table": table, "seqlens": args["cache_seqlens"], "leftpad": args.get("cache_leftpad")}
    want = theirs_with_kvcache(*leaves, **where, **static)
    outputs = *y, log_sum_exp(cache)
    all_close("out k_cache v_cache lse", outputs, want)
    *dy, dlse = (normal(*x.shape, seed=5) for x in outputs)
    *grads, _ = flash_attn_with_kvcache_vjp(cache, tuple(dy), dlse=dlse)
    all_close("dq dk_cache dv_cache dk dv dalibi_slopes dlearnable_sink", grads, gradients(want, [*dy, dlse], leaves))


# ── both answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_with_a_sink_the_reference_rounds_to_float32(each_engine):
    """4.0.0b36 has scores.to(torch.float32) there, whatever upcast says. Without it, above, it is equal to 1e-11."""
    inputs = normal(2, 3, H, D), normal(2, 5, K, D, seed=1), normal(2, 5, K, E, seed=2), None, normal(H)
    out, _ = flash_attn_func(*inputs)
    leaves = [leaf(x) for x in inputs]
    rounded, *_ = theirs(*leaves, wide=False)
    off = np.abs(rounded.detach().numpy() - out).max()
    assert 1e-9 < off < 1e-6
    close(out, theirs(*leaves)[0])


def test_minus_one_is_a_bound_in_fa4_and_none_here(each_engine):
    """No bound is -1 in FA2 and FA3, None in FA4; in 4.0.0b36 a window of -1 ends before the diagonal."""
    q, k, v = normal(1, 3, H, D), normal(1, 3, K, D, seed=1), normal(1, 3, K, E, seed=2)
    tensors = [leaf(x) for x in (q, k, v)]
    _, before, _ = theirs(*tensors, window_size=(None, -1))
    assert (before[0, 0] > 0).int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    out, cache = flash_attn_func(q, k, v, window_size=(None, -1))
    assert np.all(attention_weights(cache) > 0)
    close(out, theirs(*tensors)[0])


def test_fully_masked_rows_have_nan_in_the_reference(each_engine):
    """4.0.0b36 sets their weights to 0 after a softmax that made them NaN; so does the gradient of a bias."""
    inputs = normal(1, 3, H, D), normal(1, 2, K, D, seed=1), normal(1, 2, K, E, seed=2), normal(1, H)
    dout = normal(1, 3, H, E)
    q, k, v, slopes = (leaf(x) for x in inputs)
    bias = -slopes[:, :, None, None] * distances(3, 2)
    bias.retain_grad()
    out, *_ = library().attention_ref(q, k, v, attn_bias=bias, causal=True, upcast=False)
    out.backward(tensor(dout))
    assert bias.grad[:, :, 0].isnan().all()
    assert slopes.grad.isnan().all()
    assert not q.grad[:, 0].any()

    got, cache = flash_attn_func(*inputs, causal=True)
    close(got, out)
    _, _, _, dslopes, *_ = flash_attn_func_vjp(cache, dout)
    close(dslopes, -(bias.grad * distances(3, 2))[:, :, 1:].sum((-2, -1)))


def test_unused_queries_have_an_lse_in_the_reference(each_engine):
    """4.0.0b36 makes its out 0, and leaves its lse that of a query behind the last one. Ours is −∞."""
    q, k, v = normal(3, H, D), normal(3, K, D, seed=1), normal(3, K, E, seed=2)
    at = {"cu_seqlens_q": cu([3]), "cu_seqlens_k": cu([3]), "seqused_q": np.array([2])}
    out, cache = flash_attn_varlen_func(q, k, v, **at)
    mask, tensors = masked([2], 3), [leaf(x[None]) for x in (q, k, v)]
    want, _, lse = theirs(*tensors, query_padding_mask=mask)
    close(out[None], want)
    assert not out[2].any()
    assert lse[0, :, 2].isfinite().all()
    assert np.all(log_sum_exp(cache)[:, 2] == -np.inf)
    close(log_sum_exp(cache)[:, :2], lse[0, :, :2])
