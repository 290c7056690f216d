"""What a hostile user tries: each refused by name and with a reason, or done rightly; none silently ignored.

Beside the refusals that the tests of each file hold. What is here gave a plausible wrong number once, or an error of
NumPy's own, or is a view or a size that is easily overlooked.
"""

import re
from decimal import Decimal

import jax
import numpy as np
import pytest
import test_protocol
from test_ops import close

from funcmha import (
    attention,
    attention_vjp,
    attention_weights,
    biases,
    dropout,
    head,
    head_params,
    head_vjp,
    init,
    linear,
    linear_vjp,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    norms,
    packing,
    self_attention,
    self_attention_vjp,
    softmax,
    softmax_vjp,
    surgery,
    tree,
)
from funcmha.biases import RelativeBias
from funcmha.derivatives import linear_jvp, linear_vjp_jvp
from funcmha.engines import ENGINES, SEQUENTIAL
from funcmha.kv_cache import KVCache, append, append_vjp, step_mask, step_vjp
from funcmha.merge import merge_vjp
from funcmha.rotary import HalfPairs, frequencies, rotate, rotate_vjp, table
from funcmha.testing.strategies import MhaProblem

ones = np.ones
Q, K, V = ones((2, 6, 5, 4)), ones((2, 3, 7, 4)), ones((2, 3, 7, 9))
PARAMS, *INPUTS, _ = MhaProblem(D=8).inputs("float64")
Y, CACHE = mha(PARAMS, *INPUTS)
TABLE = table(np.arange(5), frequencies(8))
X = ones((2, 5, 8))
HELD = KVCache(ones((2, 3, 5, 4)), ones((2, 3, 5, 7)), 5)
KEEP = ones((5, 7), bool)
SEED = dropout.seeded(0, 0.1)


def rotated(cos, sin):
    """mha with such tables for its queries."""
    return lambda: mha(PARAMS, *INPUTS, rotary=(HalfPairs(cos, sin), None))


def masked(x):
    return np.ma.array(x, mask=x > 0)


ARRAYS = {
    "a masked array": (lambda: attention(masked(Q), K, V), TypeError, "q must be an array, got MaskedArray"),
    "a masked weight": (lambda: linear(X, masked(ones((3, 8)))), TypeError, "w must be an array, got MaskedArray"),
    "a masked mask": (lambda: attention(Q, K, V, mask=masked(KEEP)), TypeError, "mask must be a boolean array, True ="),
    "a matrix": (lambda: softmax(X[0].view(np.matrix)), TypeError, "x must be an array, got matrix"),
    "long doubles": (lambda: linear(X.astype("g"), ones((3, 8), "g")), TypeError, "x must have a dtype of float16, "),
    "the other endianness": (lambda: linear(X.astype(">f8"), ones((3, 8))), TypeError, "x must be in native byte ord"),
    "numbers of Python": (lambda: attention(Q, K, V, 0.0), TypeError, "bias must be an array, got float"),
    "complex beside real": (lambda: mha(PARAMS, INPUTS[0] + 0j, *INPUTS[1:]), TypeError,
                            "query must have dtype float64 as q_proj.w has, got complex128: cast one of them"),
    "the arrays of a list": (lambda: packing.pack([X, X]), TypeError, "xs[0] must be an array, got list"),
}  # fmt: skip

OPTIONS = {
    "dropout by a mask without a rate": (lambda: attention(Q, K, V, dropout=KEEP), TypeError,
                                         "dropout must be dropout.masked(keep, rate), dropout.seeded(seed, rate) or"),
    "dropout by a rate alone": (lambda: mha(PARAMS, *INPUTS, dropout=0.1), TypeError,
                                "dropout must be dropout.masked(keep, rate), dropout.seeded(seed, rate) or None, got"),
    "a seed that is a number": (lambda: mha(PARAMS, *INPUTS, dropout=(7, 0.1)), TypeError,
                                "dropout must be dropout.masked(keep, rate), dropout.seeded(seed, rate) or None, got"),
    "all dropped": (lambda: dropout.masked(KEEP, 1), ValueError, "rate must be at least 0 and below 1"),
    "a rate that is NaN": (lambda: dropout.masked(KEEP, np.nan), ValueError, "rate must be at least 0 a"),
    "no rate": (lambda: dropout.seeded(0, None), TypeError, "rate must be a real number, got None of type NoneType"),
    "scales that are words": (lambda: attention(Q, K, V, scale=["a"] * 6), TypeError,
                              "scale must be a real number, got 'a' of type str"),
    "scales that are ragged": (lambda: attention(Q, K, V, scale=[[1.0], [1.0, 2.0]]), TypeError,
                               "scale must be a real number, got [1.0] of type list"),
    "scales that are missing": (lambda: attention(Q, K, V, scale=[None] * 6), TypeError, "scale must be a real number"),
    "scales that are complex": (lambda: attention(Q, K, V, scale=[1j] * 6), TypeError, "scale must be a real number"),
    "scales that are complex arrays": (lambda: attention(Q, K, V, scale=np.full(6, 1j)), TypeError,
                                       "scale must be real numbers, got dtype complex128"),
    "scales that are booleans": (lambda: attention(Q, K, V, scale=[True] * 6), TypeError, "scale must be a real numbe"),
    "caps that are booleans": (lambda: attention(Q, K, V, softcap=ones(6, bool)), TypeError,
                               "softcap must be real numbers, got dtype bool"),
    "a scale beyond float64": (lambda: attention(Q, K, V, scale=10**400), ValueError, "scale must be finite, got inf"),
    "a decimal scale": (lambda: attention(Q, K, V, scale=Decimal(1)), TypeError, "scale must be a real number"),
    "scales for the keys' heads": (lambda: mha(PARAMS, *INPUTS, scale=ones(2)), ValueError,
                                   "scale must be a number, or (H,) with H=6 as in q, got shape (2,)"),
    "a mask that was not made": (lambda: mha(PARAMS, *INPUTS, mask=masks.causal), TypeError,
                                 "mask must be a boolean array, True = attend (a mask to be added to the scores is"),
    "a norm that was not made": (lambda: mha(PARAMS, *INPUTS, qk_norm=norms.RMSNorm), TypeError,
                                 "qk_norm must be RMSNorm, L2Norm or LayerNorm"),
    "an engine of no name": (lambda: attention(Q, K, V, engine="fast"), TypeError,
                             "engine must be one of 'sequential', 'batched', 'tiled', one of funcmha.engines"),
    "zero_attn as a number": (lambda: mha(PARAMS, *INPUTS, zero_attn=1), TypeError, "zero_attn must be True or False"),
    "per_sample as a word": (lambda: mha_vjp(CACHE, Y, per_sample="no"), TypeError,
                             "per_sample must be True or False, got 'no'"),
    "a sink as a number": (lambda: init(0, 12, 3, sink=2), TypeError, "sink must be True or False, got 2"),
    "biases as nothing": (lambda: init(0, 12, 3, bias=None), TypeError, "bias must be True or False, got None"),
    "both directions as a number": (lambda: biases.t5_buckets(biases.distances(3, 3), bidirectional=1), TypeError,
                                    "bidirectional must be True or False, got 1"),
}  # fmt: skip

TABLES = {
    "fewer sines": (rotated(TABLE.cos, TABLE.sin[:, :1]), ValueError,
                    "rotary must have cos and sin of one shape (..., T, N), got (5, 4) and (5, 1)"),
    "sines of one position": (rotated(TABLE.cos, TABLE.sin[:1]), ValueError, "rotary must have cos and sin of one sha"),
    "no positions": (rotated(ones(4), ones(4)), ValueError, "rotary must have cos and sin of one shape (..., T, N)"),
    "lists": (rotated(TABLE.cos.tolist(), TABLE.sin.tolist()), TypeError, "rotary.cos must be an array, got list"),
    "complex numbers": (rotated(TABLE.cos + 0j, TABLE.sin + 0j), TypeError, "rotary.cos must be real, got complex128"),
    "integers": (rotated(ones((5, 4), int), ones((5, 4), int)), TypeError, "rotary.cos must have a dtype of float16"),
    "two dtypes": (rotated(TABLE.cos, TABLE.sin.astype("f4")), TypeError, "rotary.sin must have dtype float64 as rota"),
    "another batch": (rotated(ones((3, 1, 5, 4)), ones((3, 1, 5, 4))), ValueError,
                      "rotary must broadcast to (..., 1, T) = (2, 1, 5), got (3, 1, 5)"),
    "more batch axes": (rotated(ones((1, 2, 1, 5, 4)), ones((1, 2, 1, 5, 4))), ValueError, "rotary must broadcast to"),
    "of rotate: fewer sines": (lambda: rotate(X, rotary=TABLE._replace(sin=TABLE.sin[:, :1])), ValueError,
                               "rotary must have cos and sin of one shape"),
    "of rotate: no sines": (lambda: rotate(X, rotary=TABLE._replace(sin=None)), TypeError,
                            "rotary.sin must be an array, got NoneType"),
    "pairs as a list": (lambda: table(np.arange(3), frequencies(4), pairs=[]), ValueError,
                        "pairs must be 'half' or 'interleaved', got []"),
}  # fmt: skip

CACHES = {
    "y and its cache swapped": (lambda: mha_vjp(Y, CACHE), "cache must come from mha, got ndarray"),
    "self-attention's": (lambda: self_attention_vjp(CACHE, Y), "cache must come from self_attention, got MhaCache"),
    "head's": (lambda: head_vjp(CACHE, Y), "cache must come from head, got MhaCache"),
    "a step's": (lambda: step_vjp(CACHE, (Y, None)), "cache must come from step, got Mh"),
    "linear's": (lambda: linear_vjp(CACHE, Y), "cache must come from linear, got MhaCache"),
    "linear's, by its jvp": (lambda: linear_jvp(CACHE, X), "cache must come from linear, got MhaCache"),
    "linear's, of as many arrays": (lambda: linear_jvp(norms.layer_norm(X, ones(8), ones(8), eps=0.0)[1], X),
                                    "cache must come from linear, got LayerNormCache"),
    "linear's, at second order": (lambda: linear_vjp_jvp(CACHE, X), "cache must come from linear, got MhaCache"),
    "softmax's": (lambda: softmax_vjp(CACHE, Y), "cache must come from softmax, got MhaCache"),
    "attention's": (lambda: attention_vjp(CACHE, Y), "cache must come from attention, got MhaCache"),
    "merge's": (lambda: merge_vjp(CACHE, Y), "cache must come from merge, got MhaCache"),
    "rotate's": (lambda: rotate_vjp(linear(X, X[0])[1], X), "cache must come from rotate, got LinearCache"),
    "a norm's, of as many arrays": (lambda: norms.l2_norm_vjp(norms.rms_norm(X, ones(8), eps=0.0)[1], X),
                                    "cache must come from l2_norm, got RmsNormCache"),
    "a bias's": (lambda: biases.alibi_vjp(softmax(X)[1], X), "cache must come from alibi, got SoftmaxCache"),
    "append's": (lambda: append_vjp(CACHE, HELD), "cache must come from append, got MhaCache"),
    "pack's": (lambda: packing.pack_vjp(softmax(X)[1], X), "cache must come from pack, got SoftmaxCache"),
    "what has logits": (lambda: surgery.max_logit(softmax(X)[1]), "cache must come from mha, self_attention or head,"),
}  # fmt: skip

OTHERS = {
    "a head by a fraction": (lambda: head_params(PARAMS, 1.0), TypeError, "h must be an int, got 1.0 of type float"),
    "a head by a word": (lambda: head_params(PARAMS, "0"), TypeError, "h must be an int, got '0' of type str"),
    "heads by fractions": (lambda: surgery.prune_heads(PARAMS, [0.5, 3.2]), TypeError, "keep must be a sequence of in"),
    "heads by a mask": (lambda: surgery.prune_heads(PARAMS, [True, False] * 3), TypeError, "keep must be a sequence o"),
    "heads by a word": (lambda: surgery.prune_heads(PARAMS, "03"), TypeError, "keep must be a sequence of ints, the"),
    "heads by nothing": (lambda: surgery.prune_heads(PARAMS, None), TypeError, "keep must be a sequence of ints, the"),
    "no heads": (lambda: mha(*MhaProblem(K=0).inputs("float64")), ValueError, "q_proj.w must have at least one head"),
    "half a key head": (lambda: surgery.merge_kv_heads(PARAMS, 0.5), TypeError, "num_kv_heads must be an int, got 0.5"),
    "key heads that do not divide": (lambda: surgery.merge_kv_heads(PARAMS, 4), ValueError,
                                     "num_kv_heads must divide K=2 as in k_proj.w, got 4"),
    "logits of another mask": (lambda: surgery.max_logit(CACHE, mask=ones((3, 3), bool)), ValueError,
                               "mask must broadcast to (..., H, T, S) = (2, 6, 5, 7), got (3, 3)"),
    "a part of a seed's mask": (lambda: SEED.dense((-1, 3)), ValueError, "shape must be (..., H, T, S) or"),
    "a fraction of a seed's mask": (lambda: SEED.dense((2.0, 3)), TypeError, "shape must be a tuple of ints"),
    "one axis of a seed's mask": (lambda: SEED.dense(3), TypeError, "shape must be a tuple of ints, got 3"),
    "two positions of one past": (lambda: append(HELD._replace(position=np.array([5, 4])), *HELD[:2]), TypeError,
                                  "kv.position must be an int, got array([5, 4]) of type ndarray"),
    "a fraction of a position": (lambda: append(HELD._replace(position=np.array(5.0)), *HELD[:2]), TypeError,
                                 "kv.position must be an int, got array(5.) of type ndarray"),
    "the mask of lists": (lambda: step_mask(KVCache([1], [1], 1), 1), TypeError, "kv.keys must be an array, got list"),
    "the mask of one axis": (lambda: step_mask(KVCache(ones(3), ones(3), 3), 1), ValueError,
                             "kv.keys must be (..., N, D)"),
    "one cotangent of two": (lambda: append_vjp(append(HELD, *HELD[:2])[1], HELD.keys), TypeError,
                             "dkv must be a KVCache, or a pair of dkeys and dvalues, got ndarray"),
    "lengths that are ragged": (lambda: packing.cumulative([[1], [2, 3]]), TypeError, "lengths must be (B,) of intege"),
    "no cotangents of sequences": (
        lambda: packing.unpack_vjp(packing.unpack(X, cu_seqlens=np.array([0, 2, 5]))[1], None), ValueError,
        "dxs must be B=2 arrays as the output is, got NoneType"),
}  # fmt: skip

EVERY = (
    ARRAYS | OPTIONS | TABLES | {name: (call, TypeError, message) for name, (call, message) in CACHES.items()} | OTHERS
)


@pytest.mark.parametrize(("call", "error", "message"), EVERY.values(), ids=EVERY)
def test_it_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_every_refusal_has_a_name_of_its_own():
    assert len(EVERY) == sum(map(len, (ARRAYS, OPTIONS, TABLES, CACHES, OTHERS)))


# ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────────

VIEWS = {
    "read-only": lambda a: np.require(a.copy(), requirements="C"),
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "transposed": lambda a: np.asfortranarray(a),
    "of stride 0": lambda a: np.broadcast_to(a[..., :1], a.shape) if a.ndim else a,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("pair", test_protocol.PAIRS.values(), ids=test_protocol.PAIRS)
def test_views_are_arrays_like_others(pair, view):
    """Inputs and cotangents that are read-only, reversed, strided or repeated: what their copies give."""

    def viewed(a):
        a = view(a)
        a.flags.writeable = False
        return a

    static = {name: x for name, x in pair.static.items() if name != "engine"}
    inputs = jax.tree.map(viewed, pair.inputs("float64"))
    copies = jax.tree.map(lambda a: np.array(a, order="C"), inputs)
    (y, cache), (want, want_cache) = pair.f(*inputs, **static), pair.f(*copies, **static)
    dy = jax.tree.map(viewed, want)
    got, want = (y, pair.f_vjp(cache, dy)), (want, pair.f_vjp(want_cache, jax.tree.map(np.array, dy)))
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [{"T": 0}, {"S": 0}, {"D": 0}, {"E": 0}, {"O": 0}, {"T": 0, "S": 0}])
def test_nothing_is_a_number_of_rows_and_features(size, engine):
    """No queries, keys, features: finite, and of the shapes that they must have; for each sample too."""
    problem = MhaProblem(
        **({"qk_norm": "rms", "sink": True, "softcap": 0.5, "bias": "... H T+S-1", "mask": "causal"} | size)
    )
    (params, *arrays), static = problem.inputs("float64"), problem.static() | {"engine": engine}
    y, cache = mha(params, *arrays, **static)
    assert y.shape == (2, problem.T, problem.O)
    dparams, *grads = mha_vjp(cache, np.ones_like(y))
    each, *_ = mha_vjp(cache, np.ones_like(y), per_sample=True)
    for got, like in zip(jax.tree.leaves((dparams, *grads)), jax.tree.leaves((params, *arrays)), strict=True):
        assert got.shape == like.shape
        assert np.isfinite(got).all()
    tree.map(lambda a, b: close(a.sum(0), b), each, dparams)
    if 0 in (problem.S, problem.E):
        close(y, np.broadcast_to(params["out_proj"]["b"], y.shape))


def test_a_mask_with_a_rate_of_0_is_not_scaled():
    """What is kept stays as it is."""
    half = np.arange(7) % 2 == 0
    o, _ = attention(Q, K, V, dropout=dropout.masked(half, 0.0), engine=SEQUENTIAL)
    close(o, np.full(o.shape, 4 / 7))


def test_no_batch_has_gradients_of_one_sample():
    params, x, *_ = MhaProblem(Ck=17, Cv=17, S=5, batch=()).inputs("float64")
    y, cache = self_attention(params, x)
    for got, want in zip(self_attention_vjp(cache, y, per_sample=True), self_attention_vjp(cache, y), strict=True):
        tree.map(close, got, want)


def test_a_relative_bias_may_be_a_view():
    """Reversed, as a table of distances behind would be: what its copy gives."""
    values = np.random.default_rng(0).standard_normal((6, 11))[:, ::-1]
    (o, cache), (want, want_cache) = (attention(Q, K, V, RelativeBias(a)) for a in (values, values.copy()))
    close(o, want)
    close(attention_vjp(cache, o)[3].values, attention_vjp(want_cache, want)[3].values)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("f", "f_vjp", "inputs", "names"),
    [
        (attention, attention_vjp, (Q, K, V), ("do", "H, T, E", "H, T, S", "H, T")),
        (head, head_vjp, (head_params(PARAMS, 0), *INPUTS), ("do", "T, E", "T, S'", "T")),
        (mha, mha_vjp, (PARAMS, *INPUTS), ("dy", "T, O", "H, T, S'", "H, T")),
    ],
    ids=["attention", "head", "mha"],
)
def test_cotangents_of_other_shapes(f, f_vjp, inputs, names, engine):
    """Each is named, with the shape of the output: one that broadcasts would give a plausible gradient."""
    y, cache = f(*inputs, engine=engine)
    weights, lse, (out, *axes) = attention_weights(cache), log_sum_exp(cache), names
    calls = [
        (out, y, lambda a: f_vjp(cache, a)),
        ("dweights", weights, lambda a: f_vjp(cache, y, dweights=a)),
        ("dlse", lse, lambda a: f_vjp(cache, y, dlse=a)),
    ]
    for (name, like, call), letters in zip(calls, axes, strict=True):
        with pytest.raises(
            ValueError, match=re.escape(f"{name} must be (..., {letters}) = {like.shape} as the output")
        ):
            call(like[..., :1])
