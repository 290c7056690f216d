"""flash-attention's calls. The oracle is flash-attention's own kernels: `make kernels` installs and runs them.

flash-attn 2.8.3.post2 has a Triton backend behind its public functions, forward and backward, and Triton has an
interpreter: the kernels compute in float32 on the CPU, block by block. funcmha computes from the same float32 inputs in
float64. All statements here are about this version and backend. Windows, softcap, left padding and pages exist in its
CUDA kernels only: this backend accepts and ignores them, which is tested too.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("flash-attention's kernels have a process of their own: make kernels", allow_module_level=True)

import numpy as np
import torch
from flash_attn_on_cpu import flash_attn, interface_fa
from test_interop_flash_attn import cu, normal

from funcmha import log_sum_exp
from funcmha.interop import flash_attn as ours

# In fully masked rows the kernels compute −∞ − (−∞), and put it right later. NumPy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

K, H, D = 2, 6, 11  # key/value heads, query heads, width: the kernels pad it to 16
ULPS = 64  # of the largest entry: at most 12 were measured; a wrong mask is off by more than 10⁵


def near(got, want, name="", dtype=torch.float32):
    """float32 beside float64, or float16 beside itself; an lse of −∞ is not compared"""
    got, finite = got.detach().double().numpy(), want != -np.inf
    atol = ULPS * torch.finfo(dtype).eps / 2 * np.abs(want[finite]).max(initial=1.0)
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=atol, err_msg=name)


def all_near(names, got, want):
    for name, a, b in zip(names.split(), got, want, strict=True):
        near(a, b, name)


def float32(*shape, seed=0):
    return torch.tensor(np.ascontiguousarray(normal(*shape, seed=seed)), dtype=torch.float32)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def wide(*tensors):
    return [None if x is None else x.detach().double().numpy().copy() for x in tensors]


def slopes_of(B):
    return float32(B, H, seed=8).abs() / 3


@pytest.fixture(params=[False, True], ids=["all", "causal"])
def causal(request):
    return request.param


# ── flash_attn_func: blocks of 64 × 64, and sizes with one of them, more, and a rest ─────────────────────────────


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize(("T", "S"), [(13, 17), (17, 13), (64, 64), (70, 131), (131, 70)])
def test_dense_matches_the_kernels(causal, alibi, T, S):
    q, k, v = leaves(float32(2, T, H, D), float32(2, S, K, D, seed=1), float32(2, S, K, D, seed=2))
    slopes, dout = slopes_of(2) if alibi else None, float32(2, T, H, D, seed=3)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes, causal=causal, return_attn_probs=True)
    want, cache = ours.flash_attn_func(*wide(q, k, v, slopes), causal=causal)
    all_near("out lse", (out, lse), (want, log_sum_exp(cache)))
    grads = torch.autograd.grad(out, (q, k, v), dout)
    all_near("dq dk dv", grads, ours.flash_attn_func_vjp(cache, *wide(dout))[:3])


def test_a_scale_matches_the_kernels(causal):
    q, k, v = leaves(float32(2, 13, H, D), float32(2, 17, K, D, seed=1), float32(2, 17, K, D, seed=2))
    out = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.7, causal=causal)
    want, cache = ours.flash_attn_func(*wide(q, k, v), softmax_scale=0.7, causal=causal)
    near(out, want)
    dout = float32(2, 13, H, D, seed=3)
    all_near("dq dk dv", torch.autograd.grad(out, (q, k, v), dout), ours.flash_attn_func_vjp(cache, *wide(dout))[:3])


def test_dropout_matches_the_kernels(causal):
    """They draw the mask, and return the weights with the sign flipped where dropped."""
    q, k, v = leaves(float32(2, 13, H, D), float32(2, 70, K, D, seed=1), float32(2, 70, K, D, seed=2))
    out, lse, drawn = flash_attn.flash_attn_func(q, k, v, dropout_p=0.3, causal=causal, return_attn_probs=True)
    keep = (drawn >= 0).numpy()
    assert 0.6 < keep.mean() < (0.9 if causal else 0.8)
    want, cache = ours.flash_attn_func(*wide(q, k, v), causal=causal, keep=keep, dropout_p=0.3)
    all_near("out lse", (out, lse), (want, log_sum_exp(cache)))
    dout = float32(2, 13, H, D, seed=3)
    all_near("dq dk dv", torch.autograd.grad(out, (q, k, v), dout), ours.flash_attn_func_vjp(cache, *wide(dout))[:3])


def test_float16_matches_the_kernels(causal):
    q, k, v = leaves(float32(2, 13, H, D), float32(2, 17, K, D, seed=1), float32(2, 17, K, D, seed=2))
    half = [x.half() for x in (q, k, v)]
    out = flash_attn.flash_attn_func(*half, causal=causal)
    want, cache = ours.flash_attn_func(*(x.detach().numpy() for x in half), causal=causal)
    assert out.dtype == torch.float16
    near(out, want.astype(float), dtype=torch.float16)
    dout = float32(2, 13, H, D, seed=3).half()
    grads = torch.autograd.grad(out, half, dout)
    for a, b in zip(grads, ours.flash_attn_func_vjp(cache, dout.numpy()), strict=False):
        near(a, b.astype(float), dtype=torch.float16)


@pytest.mark.parametrize("mode", ["fused", "jingning"])
@pytest.mark.parametrize(("T", "S"), [(13, 17), (17, 13), (70, 131)])
def test_gradients_match_the_other_backward_kernels(monkeypatch, causal, mode, T, S):
    """What BWD_MODE picks. With alibi_slopes both are wrong, as neither adds them to the scores again."""
    monkeypatch.setattr(interface_fa, "BWD_MODE", mode)
    q, k, v = leaves(float32(2, T, H, D), float32(2, S, K, D, seed=1), float32(2, S, K, D, seed=2))
    dout = float32(2, T, H, D, seed=3)
    grads = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v, causal=causal), (q, k, v), dout)
    _, cache = ours.flash_attn_func(*wide(q, k, v), causal=causal)
    all_near("dq dk dv", grads, ours.flash_attn_func_vjp(cache, *wide(dout))[:3])


# ── packed inputs and sequences ──────────────────────────────────────────────────────────────────────────────────


def test_packed_inputs_match_the_kernels(causal):
    q, qkv, kv = leaves(float32(2, 13, H, D), float32(2, 13, 3, H, D, seed=1), float32(2, 17, 2, K, D, seed=2))
    dout = float32(2, 13, H, D, seed=3)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=causal)
    want, cache = ours.flash_attn_qkvpacked_func(*wide(qkv), causal=causal)
    near(out, want)
    near(*torch.autograd.grad(out, qkv, dout), ours.flash_attn_qkvpacked_func_vjp(cache, *wide(dout))[0])
    out = flash_attn.flash_attn_kvpacked_func(q, kv, causal=causal)
    want, cache = ours.flash_attn_kvpacked_func(*wide(q, kv), causal=causal)
    near(out, want)
    grads = torch.autograd.grad(out, (q, kv), dout)
    all_near("dq dkv", grads, ours.flash_attn_kvpacked_func_vjp(cache, *wide(dout))[:2])


@pytest.mark.parametrize(
    ("nq", "nk"), [((3, 5), (7, 2)), ((3, 70), (70, 131)), ((3, 0, 5), (2, 4, 7)), ((3, 2, 5), (2, 0, 7))], ids=str
)
def test_sequences_match_the_kernels(causal, nq, nk):
    """Their lse is (N, H) in this backend, and (H, N) in the documentation and in ours."""
    q, k, v = leaves(float32(sum(nq), H, D), float32(sum(nk), K, D, seed=1), float32(sum(nk), K, D, seed=2))
    slopes, dout, lengths = slopes_of(len(nq)), float32(sum(nq), H, D, seed=3), (cu(nq), cu(nk))
    of_theirs = *map(torch.tensor, lengths), max(nq), max(nk)
    options = {"alibi_slopes": slopes, "causal": causal, "return_attn_probs": True}
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *of_theirs, **options)
    at = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
    want, cache = ours.flash_attn_varlen_func(*wide(q, k, v, slopes), **at, causal=causal)
    all_near("out lse", (out, lse.T), (want, log_sum_exp(cache)))
    grads = torch.autograd.grad(out, (q, k, v), dout)
    all_near("dq dk dv", grads, ours.flash_attn_varlen_func_vjp(cache, *wide(dout))[:3])


def test_packed_sequences_match_the_kernels(causal):
    q, qkv, kv = leaves(float32(8, H, D), float32(8, 3, H, D, seed=1), float32(9, 2, K, D, seed=2))
    dout, own, of_keys = float32(8, H, D, seed=3), cu([3, 5]), cu([7, 2])
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, torch.tensor(own), 5, causal=causal)
    want, cache = ours.flash_attn_varlen_qkvpacked_func(*wide(qkv), cu_seqlens=own, causal=causal)
    near(out, want)
    near(*torch.autograd.grad(out, qkv, dout), ours.flash_attn_varlen_qkvpacked_func_vjp(cache, *wide(dout))[0])
    lengths = torch.tensor(own), torch.tensor(of_keys), 5, 7
    out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, causal=causal)
    at = {"cu_seqlens_q": own, "cu_seqlens_k": of_keys}
    want, cache = ours.flash_attn_varlen_kvpacked_func(*wide(q, kv), **at, causal=causal)
    near(out, want)
    grads = torch.autograd.grad(out, (q, kv), dout)
    all_near("dq dkv", grads, ours.flash_attn_varlen_kvpacked_func_vjp(cache, *wide(dout))[:2])


# ── flash_attn_with_kvcache ──────────────────────────────────────────────────────────────────────────────────────


def both_with_kvcache(T=3, U=2, N=17, seqlens=(3, 9), pages=None, slopes=None, table=None, theirs=None, **options):
    """(out, k_cache', v_cache', lse) of the kernels, which write into the caches, and of ours, without what is `theirs`

    A page for each sequence, an unused one, and options of both.
    """
    B = len(seqlens)
    q, *held = float32(B, T, H, D), float32(B + 1, N, K, D, seed=1), float32(B + 1, N, K, D, seed=2)
    new = [None, None] if U is None else [float32(B, U, K, D, seed=3), float32(B, U, K, D, seed=4)]
    n, index = np.array(seqlens, np.int32), {} if pages is None else {"cache_batch_idx": np.array(pages, np.int32)}
    cos_sin = [] if table is None else [table.cos(), table.sin()]
    names = ["rotary_cos", "rotary_sin"][: len(cos_sin)]
    want, cache = ours.flash_attn_with_kvcache(
        *wide(q, *held, *new, slopes),
        cache_seqlens=n,
        **index,
        **dict(zip(names, wide(*cos_sin), strict=True)),
        **options,
    )
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        *held,
        *new,
        cache_seqlens=torch.tensor(n),
        alibi_slopes=slopes,
        return_softmax_lse=True,
        **{name: torch.tensor(x) for name, x in index.items()},
        **dict(zip(names, cos_sin, strict=True)),
        **options,
        **(theirs or {}),
    )
    return (out, *held, lse.reshape(B, H, T)), (*want, log_sum_exp(cache))


STEPS = {
    "nothing new": {"U": None},
    "one token": {"T": 1, "U": 1},
    "fully masked rows, if causal": {"T": 5, "U": 1, "seqlens": (2, 9)},
    "many tokens": {"T": 70, "U": 70, "N": 300, "seqlens": (70, 131)},
    "a long cache, in splits": {"N": 300, "seqlens": (3, 131)},
    "pages": {"pages": (2, 0)},
    "pages, nothing new": {"pages": (2, 0), "U": None},
    "alibi": {"slopes": slopes_of(2)},
    "scale": {"softmax_scale": 0.7},
    "rotated, interleaved": {"table": float32(17, 4), "rotary_interleaved": True},
    "rotated, by halves": {"table": float32(17, 4), "rotary_interleaved": False},
    "one token, rotated": {"table": float32(17, 5), "rotary_interleaved": True, "T": 1, "U": 1},
}


@pytest.mark.parametrize("problem", STEPS.values(), ids=STEPS)
def test_a_decoding_step_matches_the_kernels(causal, problem):
    """With the caches that come of it, and the kernel for rotary positions where there is a table."""
    got, want = both_with_kvcache(causal=causal, **problem)
    all_near("out k_cache v_cache lse", got, want)


# ── both answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_fully_masked_rows_have_lse_0_in_the_causal_kernel():
    """fwd_prefill.py stores 0.0 for such rows if causal, and −∞ if not, as fwd_decode.py always does."""
    q, k, v = float32(1, 5, H, D), float32(1, 2, K, D), float32(1, 2, K, D)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    want, cache = ours.flash_attn_func(*wide(q, k, v), causal=True)
    assert not out[:, :3].any()
    assert not lse[:, :, :3].any()
    assert not want[:, :3].any()
    assert np.all(log_sum_exp(cache)[:, :, :3] == -np.inf)

    none = torch.tensor([0, 0], dtype=torch.int32)
    at = torch.tensor([0, 5], dtype=torch.int32), none, 5, 1
    _, lse, _ = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *at, return_attn_probs=True)
    assert (lse == -np.inf).all()
    (_, _, _, lse), (_, _, _, of_ours) = both_with_kvcache(T=5, U=1, seqlens=(2, 9), causal=True)
    assert (lse[0, :, :2] == -np.inf).all()
    assert np.all(of_ours[0, :, :2] == -np.inf)


@pytest.mark.parametrize("option", [{"window_size": (3, 0)}, {"softcap": 1.3}], ids=lambda option: next(iter(option)))
def test_windows_and_softcap_have_no_effect_in_the_backend(causal, option):
    q, k, v = float32(2, 13, H, D), float32(2, 17, K, D, seed=1), float32(2, 17, K, D, seed=2)
    out = flash_attn.flash_attn_func(q, k, v, causal=causal, **option)
    without, _ = ours.flash_attn_func(*wide(q, k, v), causal=causal)
    near(out, without)
    want, _ = ours.flash_attn_func(*wide(q, k, v), causal=causal, **option)
    assert np.abs(want - without).max() > 0.1


@pytest.mark.parametrize(
    "option",
    [
        {"window_size": (3, 0)},
        {"softcap": 1.3},
        {"cache_leftpad": torch.tensor([1, 2], dtype=torch.int32)},
        {"block_table": torch.tensor([[1], [0]], dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_a_cache_have_no_effect_in_the_backend(causal, option):
    got, want = both_with_kvcache(N=256, causal=causal, theirs=option)
    all_near("out k_cache v_cache lse", got, want)


@pytest.mark.parametrize("mode", ["fused", "jingning"])
def test_the_other_backward_kernels_are_wrong_with_alibi(monkeypatch, mode):
    """They compute exp(score − lse) without the slopes that lse is of. BWD_MODE is "split" unless asked, and right."""
    monkeypatch.setattr(interface_fa, "BWD_MODE", mode)
    q, k, v = leaves(float32(2, 13, H, D), float32(2, 17, K, D, seed=1), float32(2, 17, K, D, seed=2))
    slopes, dout = slopes_of(2), float32(2, 13, H, D, seed=3)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True)
    _, _, dv = torch.autograd.grad(out, (q, k, v), dout)
    want, cache = ours.flash_attn_func(*wide(q, k, v, slopes))
    all_near("out lse", (out, lse), (want, log_sum_exp(cache)))

    scores = torch.einsum("bthd,bshd->bhts", q * D**-0.5, k.repeat_interleave(H // K, 2))
    weights = torch.exp(scores - lse[..., None])
    wrong = torch.einsum("bhts,bthd->bshd", weights, dout).unflatten(2, (K, H // K)).sum(3)
    near(dv, *wide(wrong))
    assert np.abs(ours.flash_attn_func_vjp(cache, *wide(dout))[2] - dv.numpy()).max() > 0.1


def test_the_backend_refuses_values_of_another_width():
    q, k, v = float32(2, 13, H, D), float32(2, 17, K, D), float32(2, 17, K, 7)
    with pytest.raises(AssertionError):
        flash_attn.flash_attn_func(q, k, v)
    out, _ = ours.flash_attn_func(*wide(q, k, v))
    assert out.shape == (2, 13, H, 7)
