"""np.errstate(all="raise") around a right call raises nothing: what is too small to be a number is 0."""

import numpy as np
import pytest

from funcmha import init, masks, packing, tree
from funcmha.biases import RelativeBias, alibi, alibi_slopes, alibi_vjp, distances, lookup, lookup_vjp, t5_buckets
from funcmha.dropout import seeded
from funcmha.interop.torch import (
    merge_masks,
    merge_masks_vjp,
    multi_head_attention_forward,
    multi_head_attention_forward_vjp,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from funcmha.merge import merge, merge_vjp
from funcmha.norms import l2_norm, l2_norm_vjp, layer_norm, layer_norm_vjp, rms_norm, rms_norm_vjp
from funcmha.rotary import frequencies, llama3_frequencies, ntk_base, rotate, rotate_vjp, table, yarn_frequencies
from funcmha.testing.strategies import AttentionProblem, MhaProblem
from funcmha.testing.tolerance import attention_bounds, linear_bounds, mha_bounds, worst_ratio


@pytest.fixture(autouse=True)
def _all_raise():
    with np.errstate(all="raise"):
        yield


def normal(*shape, dtype="float32", scale=1.0):
    """Numbers of any size, small ones without a word of their own."""
    with np.errstate(under="ignore"):
        return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


TURN = table(np.arange(5) + 10**6, frequencies(8))
VECTOR = normal(8)
OPS = {
    "rms_norm": (rms_norm, rms_norm_vjp, lambda x: (x, VECTOR.astype(x.dtype)), {"eps": 1e-6}),
    "l2_norm": (l2_norm, l2_norm_vjp, lambda x: (x,), {"eps": 1e-3}),
    "layer_norm": (layer_norm, layer_norm_vjp, lambda x: (x, *2 * [VECTOR.astype(x.dtype)]), {"eps": 1e-5}),
    "rotate": (rotate, rotate_vjp, lambda x: (x,), {"rotary": TURN}),
    "alibi": (alibi, alibi_vjp, lambda x: (x[0, 0],), {"T": 5, "S": 7}),
    "lookup": (lookup, lookup_vjp, lambda x: (x[0],), {"index": np.arange(11) % 5}),
    "pack": (packing.pack, packing.pack_vjp, lambda x: (x, x), {}),
    "pad": (packing.pad, packing.pad_vjp, lambda x: (x,), {"cu_seqlens": np.array([0, 2, 5])}),
}


@pytest.mark.parametrize(("f", "f_vjp", "inputs", "static"), OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", ["1", "a millionth", "the smallest"])
def test_ops_of_numbers_of_every_size(f, f_vjp, inputs, static, dtype, size):
    """And of cotangents as small: they are 0, or what is left of them."""
    scale = {"1": 1.0, "a millionth": 1e-6, "the smallest": float(np.finfo(dtype).tiny)}[size]
    y, cache = f(*inputs(normal(2, 5, 8, dtype=dtype, scale=scale)), **static)
    for small in (1.0, float(np.finfo(dtype).tiny)):
        dy = normal(*(y.values if isinstance(y, RelativeBias) else y).shape, dtype=dtype, scale=small)
        f_vjp(cache, RelativeBias(dy) if isinstance(y, RelativeBias) else dy)


@pytest.mark.parametrize("lse1", [0.0, 60.0, 90.0, 1e4, -1e4, -np.inf])
@pytest.mark.parametrize("lse2", [0.0, -60.0, -np.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-38])
def test_merge_of_parts_of_any_weight(lse1, lse2, scale):
    o1, o2 = normal(2, 5, 3, scale=scale), normal(2, 5, 3)
    o, cache = merge(o1, np.full((2, 5), lse1, "f"), o2, np.full((2, 5), lse2, "f"))
    merge_vjp(cache, normal(*o.shape, scale=1e-38), dlse=normal(2, 5, scale=1e-38))


def test_what_is_made_of_integers_and_seeds():
    tree.map(np.asarray, init(0, 64, 4, dtype=np.float16, bias_kv=True))
    for seed in (0, 2**63, 2**64 - 1):
        seeded(seed, 0.3).dense((2, 3, 50, 70), normal(1))
    cu = np.array([0, 2, 5])
    for mask in (
        masks.causal() & masks.lengths(np.array([0, 5])),
        masks.window(3, 2, np.array([1, 2])) & masks.padding(np.ones((2, 5), bool)),
        masks.segments(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 2])),
        packing.causal(cu, cu),
    ):
        mask.dense(5, 5)
        mask.block((0, 3), (2, 5))
    for f in (frequencies(64), llama3_frequencies(frequencies(64)), frequencies(64, base=ntk_base(64, 8.0))):
        table(np.arange(5) + 10**9, f)
    table(np.arange(5), yarn_frequencies(64, factor=4.0, context=4096))
    alibi_slopes(2000)
    t5_buckets(distances(50, 70), bidirectional=True, num_buckets=32, max_distance=128)


def test_masks_of_the_least_number_and_their_gradient():
    least, tiny = np.finfo("f").min, np.finfo("f").tiny
    (_, bias), cache = merge_masks(np.full((5, 7), least), np.full((2, 7), least), num_heads=3)
    assert (bias == -np.inf).all()
    merge_masks_vjp(cache, (None, normal(*bias.shape, scale=tiny)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("gain", [1e-4, 1.0, 30.0])
def test_calls_of_torch(dtype, gain):
    """With scores so large that most weights are 0, and cotangents of the smallest numbers."""
    tiny = float(np.finfo(dtype).tiny)
    q = normal(2, 3, 5, 4, dtype=dtype, scale=gain)
    for attn_mask in (None, np.tri(5) > 0, np.where(np.tri(5) > 0, 0, np.finfo(dtype).min).astype(dtype)):
        y, cache = scaled_dot_product_attention(q, q, q, attn_mask)
        scaled_dot_product_attention_vjp(cache, normal(*y.shape, dtype=dtype, scale=tiny))
    x, w = normal(5, 2, 6, dtype=dtype, scale=gain), normal(18, 6, dtype=dtype)
    (y, weights), cache = multi_head_attention_forward(
        *(x, x, x, w, w[:, 0], None, None, w[:6], w[:6, 0]),
        embed_dim_to_check=6, num_heads=3, add_zero_attn=True, dropout_p=0.3, keep=normal(2, 3, 5, 6) > -0.5,
    )  # fmt: skip
    dy, dweights = (normal(*a.shape, dtype=dtype, scale=tiny) for a in (y, weights))
    multi_head_attention_forward_vjp(cache, (dy, dweights))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("gain", [1.0, 1024.0])
def test_bounds(dtype, gain):
    problem = AttentionProblem(mask="empty rows", gain=gain)
    q, k, v, bias, _ = problem.inputs("float64")
    attention_bounds(q, k, v, bias, problem.cotangents("float64")[0], mask=problem.static()["mask"], dtype=dtype)
    problem = MhaProblem(mask="intersection", gain=gain, qk_norm="layer", rotary="half of some")
    mha_bounds(*problem.inputs("float64"), problem.cotangents("float64")[0], **problem.static(), dtype=dtype)
    linear_bounds(
        normal(2, 3, dtype="f8", scale=1e-200),
        normal(4, 3, dtype="f8", scale=1e-200),
        None,
        np.ones((2, 4)),
        dtype=dtype,
    )
    assert worst_ratio(np.array([1.0, np.inf]), np.array([1.0, np.inf]), np.array([0.0, 1e-320])) == 0
