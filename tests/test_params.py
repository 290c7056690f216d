"""Parameters: PyTorch's distributions, the same bits everywhere, sizes read off the arrays, heads as views."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch

from funcmha import head_params, init, sizes, tree
from funcmha.params import SPEC

ODD = {"num_kv_heads": 2, "head_dim": 5, "value_dim": 7, "kdim": 11, "vdim": 13, "out_dim": 17, "bias_kv": True}


def digest(params):
    return hashlib.sha256(
        b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in tree.flatten(params).values())
    ).hexdigest()[:16]


def test_sizes_are_those_of_the_arrays():
    params = init(0, 19, 6, **ODD)
    assert sizes(params)._asdict() == {"H": 6, "K": 2, "D": 5, "E": 7, "Cq": 19, "Ck": 11, "Cv": 13, "O": 17}
    for leaf, a in tree.flatten(params).items():
        assert a.shape == tuple(getattr(sizes(params), axis) for axis in SPEC[leaf].split())


def test_default_sizes_equal_torch():
    assert sizes(init(0, 12, 4)) == (4, 4, 3, 3, 12, 12, 12, 12)
    assert list(tree.flatten(init(0, 12, 4))) == [leaf for leaf in SPEC if "_proj." in leaf]
    assert list(tree.flatten(init(0, 12, 4, bias=False))) == [leaf for leaf in SPEC if leaf.endswith("_proj.w")]
    wanted = [leaf for leaf in SPEC if leaf not in ("q_norm.b", "k_norm.b")]
    everything = tree.flatten(init(0, 12, 4, bias_kv=True, sink=True, qk_norm=True))
    assert list(everything) == wanted
    assert not everything["sink.w"].any()
    assert (everything["q_norm.w"] == 1).all()


@pytest.mark.parametrize(("dtype", "bits"), [("float32", "3ad262210c18f624"), ("float64", "c8e44d740074c161")])
def test_a_seed_gives_the_same_bits_everywhere(dtype, bits):
    assert digest(init(42, 12, 4, bias_kv=True, dtype=dtype)) == bits


def test_a_leaf_does_not_depend_on_which_others_there_are():
    few, many = init(3, 12, 4, bias=False), init(3, 12, 4, bias_kv=True)
    for leaf, a in tree.flatten(few).items():
        assert np.array_equal(a, tree.flatten(many)[leaf])


def test_seeds_differ_and_so_do_leaves():
    flat = [a.ravel() for seed in (0, 1, 2**40) for a in tree.flatten(init(seed, 12, 4, bias=False)).values()]
    assert len({a.tobytes() for a in flat}) == len(flat)


def ks(sample, cdf):
    """The Kolmogorov–Smirnov statistic times √n: above 1.95 with probability 0.001."""
    x = np.sort(sample.ravel())
    steps = np.arange(x.size + 1) / x.size
    return np.sqrt(x.size) * max(np.abs(cdf(x) - steps[1:]).max(), np.abs(cdf(x) - steps[:-1]).max())


def uniform(bound):
    return lambda x: np.clip((x + bound) / (2 * bound), 0, 1)


@pytest.mark.parametrize("kdim", [None, 40])
def test_distributions_equal_torch(kdim):
    """Bounds from torch's own draws: the largest of 4096 uniform numbers is within 1 % of the bound."""
    C, H = 64, 4
    params = init(0, C, H, kdim=kdim, vdim=kdim, bias_kv=True, dtype="float64")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(C, H, kdim=kdim, vdim=kdim, add_bias_kv=True)
    theirs = {
        "q_proj.w": module.in_proj_weight if kdim is None else module.q_proj_weight,
        "out_proj.w": module.out_proj.weight,
    }
    theirs["k_proj.w"] = theirs["v_proj.w"] = module.in_proj_weight if kdim is None else module.k_proj_weight
    for leaf, weight in theirs.items():
        a = tree.flatten(params)[leaf]
        bound = weight.abs().max().item()
        assert np.abs(a).max() == pytest.approx(bound, rel=0.01)
        assert ks(a, uniform(1.005 * bound)) < 1.95
    assert not any(a.any() for leaf, a in tree.flatten(params).items() if leaf.endswith(".b"))


def test_learned_keys_are_normal_with_the_variance_of_xavier():
    big = init(5, 4096, 1, bias_kv=True, dtype="float64")["bias_kv"]
    erf = np.vectorize(__import__("math").erf)
    for a in big.values():  # nn.init.xavier_normal_ of (1, 1, C) has a standard deviation of C ** -0.5
        assert ks(a * 64, lambda x: 0.5 * (1 + erf(x / np.sqrt(2)))) < 1.95
    torch.manual_seed(0)
    assert big["k"].std() == pytest.approx(
        torch.nn.MultiheadAttention(4096, 1, add_bias_kv=True).bias_k.std().item(), rel=0.05
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes(dtype):
    params = init(0, 12, 4, dtype=dtype)
    assert {a.dtype for a in tree.flatten(params).values()} == {np.dtype(dtype)}
    in_64 = init(0, 12, 4, dtype=np.float64)
    assert np.array_equal(params["q_proj"]["w"], in_64["q_proj"]["w"].astype(dtype))


def test_head_params_are_views_of_the_stack():
    params = init(0, 19, 6, **ODD, sink=True, qk_norm=True)
    for h in range(6):
        one = head_params(params, h)
        assert list(tree.flatten(one)) == [leaf for leaf in tree.flatten(params) if not leaf.startswith("out_proj")]
        for leaf, a in tree.flatten(one).items():
            stack = tree.flatten(params)[leaf]
            assert np.shares_memory(a, stack)
            of_one = {"H": h, "K": h // 3}.get(SPEC[leaf].split()[0], slice(None))
            assert np.array_equal(a, stack[of_one])


@pytest.mark.parametrize("h", [-1, 6])
def test_head_params_refuses_a_head_that_is_not_there(h):
    with pytest.raises(IndexError, match=f"h must be in 0 … 5, as q_proj.w has H=6 heads, got {h}"):
        head_params(init(0, 12, 6), h)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((0, 12, 5), {}, ValueError, "embed_dim must be a multiple of num_heads=5 unless head_dim is given, got 12"),
        ((0, 12, 0), {}, ValueError, "num_heads must be an integer of at least 1, got 0"),
        ((0, 12.0, 4), {}, ValueError, "embed_dim must be an integer of at least 1, got 12.0"),
        ((0, 12, 4), {"num_kv_heads": 3}, ValueError, "num_heads has H=4 heads, .* multiple of K=3 as in num_kv_heads"),
        ((0, 12, 4), {"kdim": True}, ValueError, "kdim must be an integer of at least 1, got True"),
        ((-1, 12, 4), {}, ValueError, "seed must be an integer of at least 0, got -1"),
        ((None, 12, 4), {}, ValueError, "seed must be an integer of at least 0, got None"),
        ((0, 12, 4), {"dtype": int}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got int64"),
    ],
)
def test_init_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        init(*args, **kwargs)


def test_sizes_names_the_leaf_that_does_not_fit():
    params = init(0, 12, 4)
    params["v_proj"]["w"] = params["v_proj"]["w"][:2]
    with pytest.raises(ValueError, match=r"v_proj.w must be \(K, E, Cv\) with K=4 as in k_proj.w, got \(2, 3, 12\)"):
        sizes(params)


def test_sizes_refuses_mixed_dtypes():
    params = init(0, 12, 4)
    params["v_proj"]["b"] = params["v_proj"]["b"].astype("float64")
    with pytest.raises(TypeError, match=r"v_proj.b must have dtype float32 as q_proj.w has, got float64"):
        sizes(params)
