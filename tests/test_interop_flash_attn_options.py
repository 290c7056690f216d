"""Options of one version of flash-attention only: pages and padded tokens of varlen, packed ones with a cache, ….

The oracle is that of test_interop_flash_attn.py: loops over torch in float64, differentiated by autograd.
"""

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interop_flash_attn import (
    GRADIENTS,
    D,
    E,
    H,
    K,
    all_close,
    close,
    cu,
    gradients,
    kvcache_oracle,
    leaf,
    normal,
    options,
    same_in,
    varlen_oracle,
)

from funcmha import attention_weights, log_sum_exp
from funcmha.interop import flash_attn
from funcmha.interop.flash_attn import (
    flash_attn_combine,
    flash_attn_combine_vjp,
    flash_attn_func,
    flash_attn_func_vjp,
    flash_attn_qkvpacked_func,
    flash_attn_qkvpacked_func_vjp,
    flash_attn_varlen_func,
    flash_attn_varlen_func_vjp,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_vjp,
)
from funcmha.testing import check_vjp

lengths = st.sampled_from([0, 1, 2, 3, 5])


def tokens_of(start, used):
    return [list(range(a, a + n)) for a, n in zip(start, used, strict=True)]


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────

OF_SCORES = "softmax_scale causal window_size softcap"
FA2 = f"dropout_p {OF_SCORES} alibi_slopes deterministic return_attn_probs"
FA3 = f"{OF_SCORES} attention_chunk q_descale k_descale v_descale sm_margin"
OF_PAST = "q k_cache v_cache k v rotary_cos rotary_sin rotary_interleaved cache_seqlens cache_batch_idx cache_leftpad"
OF_PACKED = "cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens"
CU = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
PARAMETERS = [  # of FA2 and FA3 in 2.8.3; those of FA4 are read in test_interop_flash_attn_itself.py
    ("flash_attn_func", f"q k v {FA2}"),
    ("flash_attn_func", f"q k v qv num_splits pack_gqa deterministic {FA3}"),
    ("flash_attn_qkvpacked_func", f"qkv {FA2}"),
    ("flash_attn_qkvpacked_func", f"qkv num_heads_q deterministic {FA3}"),
    ("flash_attn_kvpacked_func", f"q kv {FA2}"),
    ("flash_attn_varlen_func", f"q k v {CU} block_table {FA2}"),
    ("flash_attn_varlen_func", f"q k v qv {CU} seqused_q seqused_k num_splits pack_gqa deterministic {FA3}"),
    ("flash_attn_varlen_qkvpacked_func", f"qkv cu_seqlens max_seqlen {FA2}"),
    ("flash_attn_varlen_kvpacked_func", f"q kv {CU} {FA2}"),
    ("flash_attn_with_kvcache", f"{OF_PAST} block_table {OF_SCORES} alibi_slopes num_splits return_softmax_lse"),
    ("flash_attn_with_kvcache", f"{OF_PAST} page_table qv {OF_PACKED} {FA3}"),
    ("flash_attn_with_kvcache", "scheduler_metadata num_splits pack_gqa return_softmax_lse"),
    ("flash_attn_combine", "out_partial lse_partial out out_dtype"),
]


def known(name):
    """The parameters that a call takes, and those that the package's docstring says are not supported."""
    taken = set(inspect.signature(getattr(flash_attn, name)).parameters)
    _, _, others = flash_attn.__doc__.partition("Not supported:")
    return taken | set(re.findall(r"\w+", others.partition("FA2's Triton")[0]))


@pytest.mark.parametrize(("name", "theirs"), PARAMETERS)
def test_every_parameter_of_fa2_and_fa3_is_known(name, theirs):
    assert set(theirs.split()) <= known(name)


# ── qv and listed keys ───────────────────────────────────────────────────────────────────────────────────────────


def test_qv_is_in_the_units_of_the_scores(each_engine):
    """By hand: q = 0 and D + E = 4, so the scores are v · qv / 2, and out their softmax's mean of v."""
    q, k = np.zeros((1, 1, 1, 2)), np.ones((1, 2, 1, 2))
    v, qv = np.array([[2.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 1, 2), np.array([np.log(3), 0.0]).reshape(1, 1, 1, 2)
    out, cache = flash_attn_func(q, k, v, None, None, qv)
    np.testing.assert_allclose(out.ravel(), [2 * 0.75, 2 * 0.25], rtol=1e-14)
    np.testing.assert_allclose(log_sum_exp(cache).item(), np.log(4), rtol=1e-14)


def test_keys_that_are_values_score_once(each_engine):
    """FA4 calls `flash_attn_func(qv, v, v)` what its kernel takes as qv alone, and the scale is that of one width."""
    qv, v = normal(2, 3, H, E), normal(2, 5, K, E, seed=1)
    nothing = np.zeros((2, 3, H, D)), np.zeros((2, 5, K, D))
    want, _ = flash_attn_func(*nothing, v, None, None, qv, softmax_scale=E**-0.5)
    got, _ = flash_attn_func(qv, v, v)
    close(got, want)


def test_a_key_listed_twice_counts_once(each_engine):
    def weights(*listed):
        q, k = np.ones((1, len(listed), 1, 1)), np.ones((1, 4, 1, 1))
        _, cache = flash_attn_func(q, k, k, gather_kv_indices=np.array(listed)[None], causal=True)
        return attention_weights(cache)[0, 0].tolist()

    assert weights([0, 2, 2], [3, -1, 9]) == [[0.5, 0, 0.5, 0], [0, 0, 0, 1]]
    assert weights([-1, -1], [4, 3]) == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert weights([0, 3], [0, 3]) == [[1, 0, 0, 0], [0.5, 0, 0, 0.5]]  # with causal both hold


# ── flash_attn_varlen_func ───────────────────────────────────────────────────────────────────────────────────────


@st.composite
def sides(draw, B):
    """FA4's layouts of the queries: shape, options, tokens of each, axes of keep."""
    if draw(st.booleans()):
        n = [draw(lengths) for _ in range(B)]
        return (sum(n),), {"cu_seqlens": cu(n)}, tokens_of(cu(n)[:-1].tolist(), n), max(n)
    n = draw(lengths)
    used = [draw(st.integers(0, n)) for _ in range(B)] if draw(st.booleans()) else [n] * B
    at = {} if used == [n] * B else {"seqused": np.array(used, np.int32)}
    return (B, n), at, tokens_of([b * n for b in range(B)], used), n


@given(st.data(), st.sampled_from([1, 2, 3]), options())
def test_varlen_tokens_may_be_padded(each_engine, data, B, static):
    (of_q, at_q, queries, T), (of_k, at_k, keys, S) = data.draw(sides(B)), data.draw(sides(B))
    at = {f"{name}_q": x for name, x in at_q.items()} | {f"{name}_k": x for name, x in at_k.items()}
    q, k, v, qv = normal(*of_q, H, D), normal(*of_k, K, D, seed=1), normal(*of_k, K, E, seed=2), normal(*of_q, H, E)
    listed = np.random.default_rng(3).integers(-1, 4, (*of_q, 3)) if data.draw(st.booleans()) else None
    inputs = q, k, v, normal(B, H, seed=3), normal(H, seed=4), data.draw(st.sampled_from([None, qv]))
    out, cache = flash_attn_varlen_func(*inputs, **at, **static, gather_kv_indices=listed)

    leaves = [leaf(x) for x in inputs]
    packed = [x if x is None or n in (3, 4) else x.reshape(-1, *x.shape[-2:]) for n, x in enumerate(leaves)]
    listed = None if listed is None else listed.reshape(-1, 3)
    o, p, lse = varlen_oracle(*packed, queries=queries, keys=keys, listed=listed, **static)
    weights = torch.zeros(B, H, T, S, dtype=torch.float64)
    weights[:, :, : p.shape[2], : p.shape[3]] = p
    lse = lse if len(of_q) == 1 else lse.reshape(H, *of_q).transpose(0, 1)
    want = o.reshape(*of_q, H, E), weights, lse
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)

    dy = [normal(*x.shape, seed=5) for x in want]
    grads = flash_attn_varlen_func_vjp(cache, dy[0], dweights=dy[1], dlse=dy[2])
    all_close(GRADIENTS, grads, gradients(want, dy, leaves))


def test_padded_varlen_is_the_dense_call(each_engine):
    inputs = normal(2, 3, H, D), normal(2, 5, K, D), normal(2, 5, K, E), normal(2, H), normal(H), normal(2, 3, H, E)
    want, dense = flash_attn_func(*inputs, causal=True)
    got, cache = flash_attn_varlen_func(*inputs, causal=True)
    close(got, want)
    close(log_sum_exp(cache), log_sum_exp(dense))
    close(attention_weights(cache), attention_weights(dense))
    for a, b in zip(flash_attn_varlen_func_vjp(cache, want), flash_attn_func_vjp(dense, want), strict=True):
        close(a, b)


TABLE = np.array([[3, 0, 9], [1, 3, -1]], np.int32)  # page 3 is read by both, the last column by none


@pytest.mark.parametrize("name", ["block_table", "page_table"])
@pytest.mark.parametrize(
    ("at", "n"),
    [
        ({"cu_seqlens_k": cu([5, 4])}, [5, 4]),  # FA2
        ({"seqused_k": np.array([2, 5])}, [2, 5]),  # FA4
        ({"cu_seqlens_k": cu([5, 4]), "seqused_k": np.array([0, 4])}, [0, 4]),
        ({"seqused_k": np.array([2, 5]), "max_seqlen_k": 7}, [2, 5]),
    ],
)
def test_keys_in_pages_match_torch(each_engine, name, at, n):
    inputs = normal(5, H, D), normal(4, 3, K, D, seed=1), normal(4, 3, K, E, seed=2), normal(H), None, normal(5, H, E)
    static = {"causal": True, "softcap": 1.7}
    out, cache = flash_attn_varlen_func(*inputs, cu_seqlens_q=cu([2, 3]), **{name: TABLE}, **at, **static)

    leaves = [leaf(x) for x in inputs]
    q, k, v, *rest = leaves
    rows = [[3 * int(TABLE[b, j // 3]) + j % 3 for j in range(n[b])] for b in range(2)]
    k, v = (x.reshape(12, K, x.shape[-1]) for x in (k, v))
    o, p, lse = varlen_oracle(q, k, v, *rest, queries=[[0, 1], [2, 3, 4]], keys=rows, **static)
    want = o, torch.nn.functional.pad(p, (0, at.get("max_seqlen_k", max(n)) - max(n))), lse
    all_close("out weights lse", (out, attention_weights(cache), log_sum_exp(cache)), want)
    dy = [normal(*x.shape, seed=5) for x in want]
    grads = flash_attn_varlen_func_vjp(cache, dy[0], dweights=dy[1], dlse=dy[2])
    all_close(GRADIENTS, grads, gradients(want, dy, leaves))


def test_without_lengths_all_slots_of_the_pages_are_keys(each_engine):
    q, k, v = normal(2, 3, H, D), normal(4, 3, K, D, seed=1), normal(4, 3, K, E, seed=2)
    got, _ = flash_attn_varlen_func(q, k, v, page_table=TABLE[:, :2], causal=True)
    keys, values = (x[TABLE[:, :2]].reshape(2, 6, K, -1) for x in (k, v))
    want, _ = flash_attn_func(q, keys, values, causal=True)
    close(got, want)


def test_what_no_page_holds_has_no_effect(each_engine):
    """Unused pages, and slots beyond the tokens of a sequence, even NaN. FA4 requires finite numbers."""
    q, k, v = (np.array(normal(*shape)) for shape in ((2, H, 5), (4, 3, K, 5), (4, 3, K, 5)))
    at = {"cu_seqlens_q": cu([1, 1]), "seqused_k": np.array([2, 4]), "block_table": np.array([[0, 2], [1, 3]])}
    want, _ = flash_attn_varlen_func(q, k, v, **at)
    for x in (k, v):
        x[2] = x[0, 2] = x[3, 1:] = np.nan
    got, cache = flash_attn_varlen_func(q, k, v, **at)
    assert np.array_equal(got, want)
    assert all(np.isfinite(g).all() for g in flash_attn_varlen_func_vjp(cache, want)[:3])


# ── flash_attn_with_kvcache, as FA3 has it ───────────────────────────────────────────────────────────────────────


@st.composite
def caches(draw):
    """Sequences of queries and of new keys, packed or padded, over pages of 3 slots or one of 7."""
    B, paged = 2, draw(st.booleans())
    nq, nk = ([draw(st.integers(0, 3)) for _ in range(B)] for _ in range(2))
    args = {"cu_seqlens_q": cu(nq), "cu_seqlens_k_new": cu(nk)}
    for n, name in ((nq, "cu_seqlens_q"), (nk, "cu_seqlens_k_new")):
        if draw(st.booleans()):
            n[:] = [n[0]] * B
            del args[name]
    rows = draw(st.permutations(range(3)))[:B]
    if paged:
        table = np.random.default_rng(1).permutation(9)[:6].reshape(3, 2).astype(np.int32)
        args |= {"page_table": table, "cache_batch_idx": np.array(rows)}
        places = [[(int(table[r, s // 3]), s % 3) for s in range(6)] for r in rows]
    else:
        args |= {"cache_batch_idx": np.array(rows)}
        places = [[(r, s) for s in range(7)] for r in rows]
    seqlens = [draw(st.integers(0, len(places[0]) - n)) for n in nk]
    leftpad = [draw(st.integers(0, n)) for n in seqlens]
    args |= {"cache_seqlens": np.array(seqlens, np.int32), "cache_leftpad": np.array(leftpad, np.int32)}
    return nq, nk, (9, 3) if paged else (3, 7), args, {"places": places, "seqlens": seqlens, "leftpad": leftpad}


def apart(x, n):
    """One tensor for each sequence, or None."""
    return x if x is None else list(x) if x.ndim == 4 else list(torch.split(x, n))


@given(st.data(), caches(), options(), st.sampled_from([None, True, False]))
def test_packed_kvcache_matches_torch(each_engine, data, problem, static, interleaved):
    nq, nk, held, args, where = problem
    of_q = (sum(nq),) if "cu_seqlens_q" in args else (2, nq[0])
    of_k = (sum(nk),) if "cu_seqlens_k_new" in args else (2, nk[0])
    qv = data.draw(st.sampled_from([None, normal(*of_q, H, E, seed=9)]))
    inputs = [normal(*of_q, H, D), normal(*held, K, D, seed=1), normal(*held, K, E, seed=2)]
    inputs += [normal(*of_k, K, D, seed=3), normal(*of_k, K, E, seed=4), normal(2, H), normal(H, seed=1), qv]
    if interleaved is not None:
        angle, first = normal(13, 2, seed=8), data.draw(st.sampled_from([None, [2, 0]]))
        static |= {"rotary_interleaved": interleaved}
        where |= {"cos": torch.tensor(np.cos(angle)), "sin": torch.tensor(np.sin(angle)), "starts": first}
        args |= {"rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
        args |= {} if first is None else {"rotary_seqlens": np.array(first, np.int32)}
    y, cache = flash_attn_with_kvcache(*inputs, **args, **static)

    leaves = [leaf(x) for x in inputs]
    q, *pages, k, v, slopes, sink, qv = leaves
    new = apart(k, nk), apart(v, nk)
    want = list(kvcache_oracle(apart(q, nq), *pages, *new, slopes, sink, apart(qv, nq), **where, **static))
    want[0] = want[0].reshape(y[0].shape)
    want[4] = want[4] if q.ndim == 3 else want[4].reshape(H, *of_q).transpose(0, 1)
    outputs = *y, attention_weights(cache), log_sum_exp(cache)
    all_close("out k_cache v_cache weights lse", outputs, want)

    *dy, dweights, dlse = (normal(*x.shape, seed=5) for x in outputs)
    grads = flash_attn_with_kvcache_vjp(cache, tuple(dy), dweights=dweights, dlse=dlse)
    names = "dq dk_cache dv_cache dk dv dalibi_slopes dlearnable_sink dqv"
    all_close(names, grads, gradients(want, [*dy, dweights, dlse], leaves))


def test_every_library_gives_the_same(xp):
    qv, pages = normal(5, H, E, seed=9), (normal(4, 3, K, D, seed=1), normal(4, 3, K, E, seed=2))
    new = normal(3, K, D, seed=3), normal(3, K, E, seed=4)
    packed = {"cu_seqlens_q": cu([2, 3]), "causal": True}
    of_pages = packed | {"seqused_k": np.array([2, 5]), "page_table": TABLE, "gather_kv_indices": np.ones((5, 2), int)}
    of_cache = packed | {"cu_seqlens_k_new": cu([1, 2]), "cache_seqlens": np.array([2, 0])}
    table = {"rotary_cos": normal(9, 2), "rotary_sin": normal(9, 2, seed=1)}
    out, lse = normal(3, 5, H, E), normal(3, 5, H)
    for f, f_vjp, inputs, static, arrays in (
        (flash_attn_varlen_func, flash_attn_varlen_func_vjp, (normal(5, H, D), *pages, None, None, qv), of_pages, {}),
        (
            flash_attn_with_kvcache,
            flash_attn_with_kvcache_vjp,
            (normal(5, H, D), *pages, *new, None, None, qv),
            of_cache,
            table,
        ),
        (flash_attn_combine, flash_attn_combine_vjp, (out, lse), {}, {}),
    ):
        same_in(xp, f, f_vjp, inputs, static, arrays)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_values_with_two_parts_are_rounded_once(each_engine, dtype):
    """dv is the sum of what v has as values and as keys of qv."""
    shapes = (2, 3, H, D), (2, 5, K, D), (2, 5, K, E), (2, 3, H, E)
    q, k, v, qv = (np.array(normal(*shape)).astype(dtype) for shape in shapes)
    wide = [x.astype(np.float32) for x in (q, k, v, qv)]
    want, of_wide = flash_attn_func(*wide[:3], None, None, wide[3])
    out, cache = flash_attn_func(q, k, v, None, None, qv)
    assert np.array_equal(out, want.astype(dtype))
    grads = flash_attn_func_vjp(of_wide, out.astype(np.float32))
    for got, g in zip(flash_attn_func_vjp(cache, out), grads, strict=True):
        assert (got is None) == (g is None)
        assert got is None or (got.dtype == dtype and np.array_equal(got, g.astype(dtype)))


# ── flash_attn_qkvpacked_func(num_heads_q=…) ─────────────────────────────────────────────────────────────────────


def test_heads_side_by_side_equal_their_parts(each_engine):
    q, k, v = normal(2, 5, H, D), normal(2, 5, K, D, seed=1), normal(2, 5, K, D, seed=2)
    want, apart = flash_attn_func(q, k, v, causal=True)
    qkv = np.concatenate([q, k, v], axis=2)
    got, cache = flash_attn_qkvpacked_func(qkv, num_heads_q=H, causal=True)
    assert np.array_equal(got, want)
    dqkv, *_ = flash_attn_qkvpacked_func_vjp(cache, want)
    assert np.array_equal(dqkv, np.concatenate(flash_attn_func_vjp(apart, want)[:3], axis=2))
    for wrong, heads, error, message in (
        (
            qkv,
            H + 1,
            ValueError,
            r"qkv must be \(B, T, H \+ K \+ K, D\) with H=7 as in num_heads_q, got \(2, 5, 10, 5\)",
        ),
        (qkv, 12, ValueError, "with H=12 as in num_heads_q"),
        (qkv, 10, ValueError, "with H=10 as in num_heads_q"),
        (qkv, 0, ValueError, "num_heads_q must be"),
        (qkv[:, :, None], H, ValueError, "with H=6 as in num_heads_q"),
        (qkv, 6.0, TypeError, "num_heads_q must be an int, got 6.0"),
    ):
        with pytest.raises(error, match=message):
            flash_attn_qkvpacked_func(wrong, num_heads_q=heads)


# ── flash_attn_combine ───────────────────────────────────────────────────────────────────────────────────────────


def combine_oracle(out, lse):
    """The sum over parts in one piece, as `attention_combine_ref` in hopper/test_flash_attn.py has it."""
    total = torch.logsumexp(lse, 0)
    share = torch.where(torch.isfinite(total) & torch.isfinite(lse), torch.exp(lse - total), 0.0)
    return (share[..., None] * out).sum(0), total


@pytest.mark.parametrize("tokens", [(2, 3), (5,)])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_combine_matches_torch(tokens, parts):
    out, lse = normal(parts, *tokens, H, E), np.array(normal(parts, *tokens, H))
    lse[0, ..., 0] = lse[..., 1] = -np.inf
    y, cache = flash_attn_combine(out, lse)
    leaves = leaf(out), leaf(lse)
    want = combine_oracle(*leaves)
    all_close("out lse", y, want)
    dy = tuple(normal(*x.shape, seed=5) for x in y)
    finite = torch.isfinite(want[1])
    total = (want[0] * torch.tensor(np.array(dy[0]))).sum() + (
        want[1][finite] * torch.tensor(np.array(dy[1]))[finite]
    ).sum()
    grads = torch.autograd.grad(total, leaves)
    all_close(
        "dout_partial dlse_partial", flash_attn_combine_vjp(cache, dy), [torch.nan_to_num(g, nan=0.0) for g in grads]
    )


def test_parts_of_the_keys_combine_to_the_whole(each_engine):
    """And its gradient: through the parts it is that of the whole."""
    q, k, v, dout = normal(2, 3, H, D), normal(2, 7, K, D), normal(2, 7, K, E), normal(2, 3, H, E)
    want, whole = flash_attn_func(q, k, v)
    parts = [flash_attn_func(q, k[:, at], v[:, at]) for at in (slice(0, 2), slice(2, 2), slice(2, 7))]
    lse = np.stack([log_sum_exp(cache).swapaxes(1, 2) for _, cache in parts])
    (out, of_all), cache = flash_attn_combine(np.stack([o for o, _ in parts]), lse)
    close(out, want)
    close(of_all.swapaxes(1, 2), log_sum_exp(whole))
    douts, dlses = flash_attn_combine_vjp(cache, (dout, None))
    grads = [
        flash_attn_func_vjp(c, do, dlse=dlse.swapaxes(1, 2))
        for (_, c), do, dlse in zip(parts, douts, dlses, strict=True)
    ]
    dq, dk, dv, *_ = flash_attn_func_vjp(whole, dout)
    close(sum(g[0] for g in grads), dq)
    close(np.concatenate([g[1] for g in grads], axis=1), dk)
    close(np.concatenate([g[2] for g in grads], axis=1), dv)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_combined_half_types_are_rounded_once(dtype):
    out, lse = np.array(normal(5, 2, 3, H, E)).astype(dtype), np.array(normal(5, 2, 3, H), np.float32)
    (wide, of_wide), _ = flash_attn_combine(out.astype(np.float32), lse)
    (got, total), cache = flash_attn_combine(out, lse)
    assert np.array_equal(got, wide.astype(dtype))
    assert np.array_equal(total, of_wide)
    douts, dlses = flash_attn_combine_vjp(cache, (got, None))
    assert douts.dtype == dtype
    assert dlses.dtype == np.float32


def test_combine_keeps_the_protocol():
    def f(*inputs):
        (out, lse), cache = flash_attn_combine(*inputs)
        return np.concatenate([out.ravel(), lse.ravel()]), (cache, out.shape)

    def f_vjp(cache, dy):
        cache, shape = cache
        n = int(np.prod(shape))
        return flash_attn_combine_vjp(cache, (dy[:n].reshape(shape), dy[n:].reshape(shape[:-1])))

    check_vjp(f, f_vjp, (np.array(normal(3, 5, H, E)), np.array(normal(3, 5, H))), {})


@pytest.mark.parametrize(
    ("out", "lse", "error", "message"),
    [
        ([1.0], np.ones((2, 5, 6)), TypeError, "out_partial must be an array, got list"),
        (np.ones((2, 5, 6, 7)), [1.0], TypeError, "lse_partial must be an array, got list"),
        (np.ones((5, 6, 7)), np.ones((5, 6)), ValueError, r"out_partial must be \(Z, B, T, H, E\), got \(5, 6, 7\)"),
        (
            np.ones((2, 5, 6, 7)),
            np.ones((2, 6, 5)),
            ValueError,
            r"lse_partial must be \(Z, N, H\) with .*N=5 as in out_",
        ),
        (np.ones((0, 5, 6, 7)), np.ones((0, 5, 6)), ValueError, "out_partial must have at least one part, got Z=0"),
        (np.ones((2, 5, 6, 7), "f2"), np.ones((2, 5, 6), "f2"), TypeError, "lse_partial must have dtype float32, in"),
    ],
)
def test_flash_attn_combine_refuses(out, lse, error, message):
    with pytest.raises(error, match=message):
        flash_attn_combine(out, lse)


def test_combine_refuses_cotangents_of_other_shapes():
    _, cache = flash_attn_combine(np.ones((2, 5, 6, 7)), np.ones((2, 5, 6)))
    with pytest.raises(ValueError, match=r"dout must be \(N, H, E\) = \(5, 6, 7\) as the output is, got \(6, 5, 7\)"):
        flash_attn_combine_vjp(cache, (np.ones((6, 5, 7)), None))
    with pytest.raises(ValueError, match=r"dlse must be \(N, H\) = \(5, 6\) as the output is, got \(6, 5\)"):
        flash_attn_combine_vjp(cache, (None, np.ones((6, 5))))
