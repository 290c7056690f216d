"""Arrays that a call cannot take as they are: of two libraries, of another byte order, numbers for booleans.

Each is refused at the public function, by name, with what to write instead; or it is read, and gives the same bits.
"""

import re
import sys
import types

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import EACH
from test_protocol import PAIRS

from funcmha import (
    attention,
    attention_vjp,
    biases,
    dropout,
    head,
    head_params,
    init,
    linear,
    masks,
    mha,
    mha_vjp,
    norms,
    ops,
    packing,
    rotary,
    softmax,
    surgery,
    tree,
)
from funcmha.interop import cudnn, flash_attn, onnx
from funcmha.interop.jax import dot_product_attention
from funcmha.interop.torch import multi_head_attention_forward, scaled_dot_product_attention
from funcmha.kv_cache import KVCache, append, append_vjp, empty, step, step_vjp
from funcmha.masks import as_mask
from funcmha.merge import merge
from funcmha.testing.strategies import MhaProblem

LIBRARIES = {
    "a PyTorch tensor": torch.tensor,
    "a JAX array": jnp.asarray,
    "an array of array_api_strict": array_api_strict.asarray,
}
Q, K, V = np.ones((2, 6, 5, 4)), np.ones((2, 3, 7, 4)), np.ones((2, 3, 7, 9))
X = np.ones((2, 5, 8))
PARAMS, *INPUTS, _ = MhaProblem(D=8).inputs("float64")
SQUARE, ONE_INPUT, *_ = MhaProblem(Ck=17, Cv=17, S=5).inputs("float64")
MASK = np.arange(35).reshape(5, 7) % 3 > 0
TABLE = rotary.table(np.arange(5), rotary.frequencies(8))
HELD = KVCache(np.ones((2, 3, 5, 4)), np.ones((2, 3, 5, 7)), 5)
CU = np.array([0, 2, 5])


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def one_other(node, to):
    """The tree, once for each of its arrays, with `to` of that one."""
    leaves, structure = jax.tree.flatten(node)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, np.ndarray):
            yield structure.unflatten([*leaves[:i], to(leaf), *leaves[i + 1 :]])


# ── two libraries ────────────────────────────────────────────────────────────────────────────────────────────────


def parts(call):
    """f and f_vjp of a pair or of a call that is not among them, its inputs, and a cotangent."""
    f, f_vjp, inputs, static = call
    y, cache = f(*inputs, **static)
    dy = tuple(y[:2]) if isinstance(y, KVCache) else (y[0], tuple(y[1][:2])) if f is step else y
    return (lambda args: f(*args, **static)), inputs, (lambda g: f_vjp(cache, g)), dy


CALLS = {name: (pair.f, pair.f_vjp, pair.inputs("float64"), pair.static) for name, pair in PAIRS.items()} | {
    "append": (append, append_vjp, (HELD, *HELD[:2]), {}),
    "step": (step, step_vjp, (SQUARE, ONE_INPUT, step(SQUARE, ONE_INPUT)[0][1]), {}),
    "pack": (packing.pack, packing.pack_vjp, (X, X), {}),
    "unpack": (packing.unpack, packing.unpack_vjp, (X,), {"cu_seqlens": CU}),
    "pad": (packing.pad, packing.pad_vjp, (X,), {"cu_seqlens": CU}),
    "unpad": (packing.unpad, packing.unpad_vjp, (X,), {"cu_seqlens": np.array([0, 2, 5])}),
    "empty": (lambda *kv: (empty(*kv), None), None, (Q, Q), {}),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.mark.parametrize(("name", "to"), LIBRARIES.items(), ids=LIBRARIES)
@every_call
def test_arrays_of_two_libraries_are_refused(call, name, to):
    """Any one of the inputs beside the others, and any one of the cotangents beside the cache."""
    f, inputs, f_vjp, dy = parts(call)
    given = [(f, inputs)] * (len(jax.tree.leaves(inputs)) > 1) + [(f_vjp, dy)] * (call[1] is not None)
    for g, arrays in given:
        for mixed in one_other(arrays, to):
            with pytest.raises(TypeError) as refusal:
                g(mixed)
            words = str(refusal.value)
            if words.startswith("engine 'tiled' takes real NumPy arrays"):
                continue  # which q is not
            assert re.fullmatch(r"[\w.\[\]]+ must be an? .* (as .* is|as the output is), got an? .*: write \w.*", words)
            assert {name, "a NumPy array"} == {words.partition(" must be ")[2].partition(" as ")[0],
                                               words.partition(" got ")[2].partition(": ")[0]}  # fmt: skip


FORBIDDEN = ~MASK[:, :5]


def torch_mha(attn_mask=None, key_padding_mask=None, to=np.asarray, **static):
    """PyTorch's functional attention of 5 tokens of 6 features, with masks of any library."""
    x, w, out = np.ones((5, 6)), np.ones((18, 6)), np.ones((6, 6))
    query, w, out = (to(a) for a in (x, w, out))
    static = {"embed_dim_to_check": 6, "num_heads": 2, "add_zero_attn": False, "dropout_p": 0.0} | static
    masks = key_padding_mask, attn_mask
    return multi_head_attention_forward(query, query, query, w, None, None, None, out, None, *masks, **static)


def of_cache(cache_seqlens):
    held = np.ones((2, 7, 3, 4))
    return flash_attn.flash_attn_with_kvcache(np.ones((2, 1, 6, 4)), held, held, cache_seqlens=cache_seqlens)


MESSAGES = {
    "NumPy beside PyTorch": (lambda: attention(torch.tensor(Q), K, torch.tensor(V)),
                             "k must be a PyTorch tensor as q is, got a NumPy array: write torch.asarray(k) or "
                             "np.asarray(q)"),
    "JAX beside a tree of NumPy": (lambda: mha(PARAMS, *map(jnp.asarray, INPUTS)),
                                   "query must be a NumPy array as q_proj.w is, got a JAX array: write "
                                   "np.asarray(query) or jax.numpy.asarray(q_proj.w)"),
    "a cotangent": (lambda: mha_vjp(mha(PARAMS, *INPUTS)[1], jnp.asarray(mha(PARAMS, *INPUTS)[0])),
                    "dy must be a NumPy array as the output is, got a JAX array: write np.asarray(dy)"),
    "a log-sum-exp": (lambda: merge(torch.tensor(X), X[..., 0], torch.tensor(X), X[..., 0]),
                      "lse1 must be a PyTorch tensor as o1 is, got a NumPy array"),
    "a mask": (lambda: attention(Q, K, V, mask=torch.tensor(MASK)),
               "mask must be a NumPy array as q is, got a PyTorch tensor: write np.asarray(mask)"),
    "a mask in a mask": (lambda: mha(PARAMS, *INPUTS, mask=masks.causal() & jnp.asarray(MASK)),
                         "mask must be a NumPy array as q_proj.w is, got a JAX array: write np.asarray(mask)"),
    "a mask in a complement": (lambda: mha(PARAMS, *INPUTS, mask=~(masks.causal() | ~as_mask(jnp.asarray(MASK)))),
                               "mask must be a NumPy array as q_proj.w is, got a JAX array: write np.asarray(mask)"),
    "a mask of a third library": (lambda: attention(*map(torch.tensor, (Q, K, V)), mask=jnp.asarray(MASK)),
                                  "mask must be a PyTorch tensor as q is, or a NumPy array, got a JAX array: write "
                                  "torch.asarray(mask)"),
    "a mask of the largest logit": (lambda: surgery.max_logit(mha(PARAMS, *INPUTS)[1], mask=torch.tensor(MASK)),
                                    "mask must be a NumPy array as params is, got a PyTorch tensor"),
    "a keep": (lambda: attention(Q, K, V, dropout=dropout.masked(torch.tensor(MASK), 0.1)),
               "dropout.keep must be a NumPy array as q is, got a PyTorch tensor: write np.asarray(dropout.keep)"),
    "a keep of heads": (lambda: head(head_params(PARAMS, 0), *INPUTS, dropout=dropout.masked(jnp.asarray(MASK), 0.1)),
                        "dropout.keep must be a NumPy array as q_proj.w is, got a JAX array"),
    "PyTorch's mask": (lambda: torch_mha(attn_mask=torch.tensor(FORBIDDEN)),
                       "attn_mask must be a NumPy array as query is, got a PyTorch tensor: write np.asarray(attn_m"),
    "PyTorch's padding": (lambda: torch_mha(FORBIDDEN[0], torch.tensor(FORBIDDEN[0])),
                          "key_padding_mask must be a NumPy array as query is, got a PyTorch tensor: write np.as"),
    "PyTorch's masks of JAX": (lambda: torch_mha(jnp.asarray(FORBIDDEN), torch.tensor(FORBIDDEN[0]), to=jnp.asarray),
                               "key_padding_mask must be a JAX array as query is, or a NumPy array, got a PyTorch"),
    "PyTorch's keep": (lambda: torch_mha(keep=jnp.asarray(~FORBIDDEN), dropout_p=0.5),
                       "keep must be a NumPy array as query is, got a JAX array: write np.asarray(keep)"),
    "PyTorch's other keep": (lambda: scaled_dot_product_attention(Q, Q, Q, keep=torch.tensor(MASK), dropout_p=0.5),
                             "keep must be a NumPy array as query is, got a PyTorch tensor: write np.asarray(keep)"),
    "JAX's mask": (lambda: dot_product_attention(Q, Q, Q, mask=torch.tensor(np.array([[True]]))),
                   "mask must be a NumPy array as query is, got a PyTorch tensor: write np.asarray(mask)"),
    "lengths of a cache": (lambda: of_cache(torch.tensor([3, 2])),
                           "cache_seqlens must be a NumPy array of integers, got a PyTorch tensor: write np.asarray("),
    "a length of a cache": (lambda: of_cache(jnp.asarray(3)),
                            "cache_seqlens must be a NumPy array of integers, got a JAX array: write np.asarray(cach"),
    "lengths in a list": (lambda: of_cache([3, 2]),
                          "cache_seqlens must be an int or a NumPy array (B,) of integers, got [3, 2] of type list"),
    "an engine": (lambda: attention(*map(jnp.asarray, (Q, K, V)), engine="tiled"),
                  "engine 'tiled' takes real NumPy arrays, got a JAX array of float"),
    "a where": (lambda: softmax(Q, where=torch.tensor(Q > 0)),
                "where must be a NumPy array as x is, got a PyTorch tensor: write np.asarray(where)"),
    "a table": (lambda: rotary.rotate(X, rotary=TABLE._replace(cos=jnp.asarray(TABLE.cos), sin=jnp.asarray(TABLE.sin))),
                "rotary must be a NumPy array as x is, got a JAX array: write np.asarray(rotary)"),
    "a table of mha": (lambda: mha(PARAMS, *INPUTS, rotary=(type(TABLE)(*map(jnp.asarray, TABLE)), None)),
                       "rotary must be a NumPy array as q_proj.w is, got a JAX array"),
    "half a table": (lambda: rotary.rotate(X, rotary=TABLE._replace(cos=jnp.asarray(TABLE.cos))),
                     "rotary.sin must be a JAX array as rotary.cos is, got a NumPy array"),
    "numbers of heads": (lambda: attention(Q, K, V, scale=torch.tensor(Q[0, :, 0, 0])),
                         "scale must be a number, or (H,) of NumPy or a list, got a PyTorch tensor"),
    "two devices of one library": (lambda: linear(torch.tensor(X), torch.tensor(X[0], device="meta")),
                                   "w must be on cpu as x is, got it on meta: move one of them"),
    "two devices of two libraries": (lambda: linear(X, torch.tensor(X[0], device="meta")),
                                     "w must be a NumPy array on cpu as x is, got a PyTorch tensor on meta: write "),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), MESSAGES.values(), ids=MESSAGES)
def test_both_arrays_and_what_to_write_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_masks_of_pytorch_may_be_of_numpy_beside_its_tensors():
    """One of each, too"""
    some, want = (
        torch_mha(FORBIDDEN, padding, to=torch.tensor) for padding in (torch.tensor(FORBIDDEN[0]), FORBIDDEN[0])
    )
    assert torch.equal(some[0][0], want[0][0])


def test_what_to_write_is_right():
    """Each of the two that a message says gives what NumPy gives alone."""
    arrays = {"q": torch.tensor(Q), "k": K, "v": torch.tensor(V)}
    with pytest.raises(TypeError) as refusal:
        attention(*arrays.values())
    known = {"torch": torch, "np": np} | arrays
    for written in str(refusal.value).partition("write ")[2].split(" or "):
        got = eval(written, known)
        assert type(got) is not type(eval(written.partition("(")[2].rstrip(")"), known))


def test_cupy_is_told_by_its_name(monkeypatch):
    """With its device. Nothing but `get` brings its arrays to NumPy."""
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    fields = {"shape": (2, 3, 7, 4), "ndim": 4, "dtype": np.dtype("float64"), "device": "<CUDA Device 0>"}
    k = type("ndarray", (), fields | {"__module__": "cupy"})()
    words = (
        "k must be a NumPy array on cpu as q is, got a CuPy array on <CUDA Device 0>: write k.get() or cupy.asarray(q)"
    )
    with pytest.raises(TypeError, match=re.escape(words)):
        attention(Q, k, V)
    with pytest.raises(TypeError, match=re.escape("k must be a CuPy array on <CUDA Device 0> as q is, got a NumPy ar")):
        attention(k, K, V)


def test_an_array_of_no_library_is_told_by_its_module():
    sink = type("Series", (), {"shape": (6,), "ndim": 1, "dtype": np.dtype("float64"), "__module__": "pandas.core"})()
    with pytest.raises(TypeError, match=re.escape("sink must be a NumPy array as q is, got an array of pandas: write")):
        attention(Q, K, V, None, sink)


def test_devices_of_array_api_strict_are_told():
    there = array_api_strict.asarray(K, device=array_api_strict.Device("device1"))
    with pytest.raises(
        TypeError, match=r"k must be on .*CPU_DEVICE.* as q is, got it on .*device1.*: move one of them"
    ):
        attention(array_api_strict.asarray(Q), there, there)


@pytest.mark.parametrize("to", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_static_arrays_of_numpy_go_beside_any_library(to, engine):
    """Masks, what dropout keeps, and tables: the numbers are those of NumPy alone."""
    static = {"mask": MASK, "dropout": dropout.masked(MASK[:, ::-1], 0.1), "rotary": (TABLE, None), "engine": engine}
    want, _ = mha(PARAMS, *INPUTS, **static)
    got, _ = mha(tree.map(to, PARAMS), *map(to, INPUTS), **static)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12)
    where = X.cumsum(-1) > 2
    np.testing.assert_allclose(np.asarray(softmax(to(X), where=where)[0]), softmax(X, where=where)[0], rtol=1e-15)


F, EACH_HEAD = np.ones((2, 1, 5, 7)), np.ones(6)
TOKENS = np.ones((2, 5, 6, 4)), np.ones((2, 7, 3, 4)), np.ones((2, 7, 3, 4))
ADAPTERS = {
    "PyTorch's attn_mask": (lambda to: scaled_dot_product_attention(Q, Q, Q, to(F[..., :5])), "attn_mask", "query"),
    "JAX's bias": (lambda to: dot_product_attention(*TOKENS, to(F)), "bias", "query"),
    "slopes": (lambda to: flash_attn.flash_attn_func(*TOKENS, to(EACH_HEAD)), "alibi_slopes", "q"),
    "a sink": (lambda to: flash_attn.flash_attn_func(*TOKENS, None, to(EACH_HEAD)), "learnable_sink", "q"),
    "parts": (lambda to: flash_attn.flash_attn_combine(np.ones((3, 2, 5, 6, 4)), to(np.ones((3, 2, 5, 6)))),
              "lse_partial", "out_partial"),
    "ONNX's attn_mask": (lambda to: onnx.attention(Q, K, V, to(F)), "attn_mask", "Q"),
    "ONNX's past": (lambda to: onnx.attention(Q, K, K, None, to(K), to(K)), "past_key", "Q"),
    "cuDNN's bias": (lambda to: cudnn.sdpa(Q, K, V, to(F)), "bias", "q"),
    "cuDNN's sink": (lambda to: cudnn.sdpa(Q, K, V, None, to(EACH_HEAD[None, :, None, None])), "sink_token", "q"),
}  # fmt: skip
every_adapter = pytest.mark.parametrize(("call", "name", "owner"), ADAPTERS.values(), ids=ADAPTERS)


@pytest.mark.parametrize(("library", "to"), LIBRARIES.items(), ids=LIBRARIES)
@every_adapter
def test_adapters_name_their_own_arguments(call, name, owner, library, to):
    with pytest.raises(
        TypeError, match=f"^{name} must be a NumPy array as {owner} is, got {library}: write np.asarray"
    ):
        call(to)


@every_adapter
def test_adapters_name_the_byte_order(call, name, owner):
    call(lambda a: a)
    with pytest.raises(TypeError, match=f"^{name} must be in native byte order, got "):
        call(swapped)


@pytest.mark.parametrize("to", LIBRARIES.values(), ids=LIBRARIES)
def test_integers_of_another_library_are_led_to_numpy(to):
    with pytest.raises(
        TypeError, match=r"cu_seqlens must be a NumPy array of integers, got an? .*: write np.asarray\(cu"
    ):
        packing.pad(X, cu_seqlens=to(CU))


# ── byte order ───────────────────────────────────────────────────────────────────────────────────────────────────


def swapped(a):
    return a.astype(a.dtype.newbyteorder(">" if sys.byteorder == "little" else "<"))


SWAPPED = r"^([\w.\[\]]+) must be in native byte order, got \w+-endian [<>]f8: write \1.astype\('float64'\)$"


@every_call
def test_the_byte_order_of_another_machine_is_named(call):
    """Of any input or cotangent, alone and all together."""
    f, inputs, f_vjp, dy = parts(call)
    given = [(f, inputs)] + [(f_vjp, dy)] * (call[1] is not None)
    for g, arrays in given:
        everything = jax.tree.map(lambda a: swapped(a) if isinstance(a, np.ndarray) else a, arrays)
        for other in [*one_other(arrays, swapped), everything]:
            with pytest.raises(TypeError, match=SWAPPED):
                g(other)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c16"])
def test_every_dtype_of_another_byte_order_is_named(dtype):
    x = swapped(X.astype(dtype))
    name = np.dtype(dtype).name
    with pytest.raises(TypeError, match=re.escape(f": write x.astype('{name}')")):
        softmax(x)
    softmax(x.astype(name))


READ = {
    "offsets": lambda to: masks.window(2, 1, to(np.array([1, 3]))),
    "lengths": lambda to: masks.lengths(to(np.array([7, 4], "i2"))),
    "segments": lambda to: masks.segments(to(np.array([0, 0, 1, 1, 2])), to(np.array([0, 0, 1, 1, 2, 2, 2], "i4"))),
    "packed": lambda to: packing.causal(to(CU), to(np.array([0, 3, 7])), to(np.array([1, 2]))),
    "cumulative": lambda to: packing.cumulative(to(np.array([1, 300]))),
    "positions": lambda to: packing.positions(to(CU), to(np.array([3, 500]))),
    "a table": lambda to: rotary.table(to(np.arange(5)), to(rotary.frequencies(8))),
    "a table of floats": lambda to: rotary.table(to(np.arange(5.0)), to(rotary.frequencies(8))),
    "frequencies": lambda to: rotary.llama3_frequencies(to(rotary.frequencies(8)), context=5),
    "an index": lambda to: biases.lookup(X[0], index=to(np.array([0, 1, 4]))),
    "buckets": lambda to: biases.t5_buckets(to(biases.distances(5, 7)), bidirectional=True),
    "distances": lambda to: biases.clipped(to(biases.distances(5, 7)), 2),
    "unpacked": lambda to: packing.unpack(X, cu_seqlens=to(CU)),
    "padded": lambda to: packing.pad(X, cu_seqlens=to(CU)),
}  # fmt: skip


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_what_is_read_may_have_any_byte_order(read):
    """And is held in that of this machine, so that it may go to any library."""
    got, want = (jax.tree.leaves(read(to)) for to in (swapped, lambda a: a))
    for a, b in zip(got, want, strict=True):
        assert np.asarray(a).dtype.isnative
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("engine", EACH, ids=lambda engine: engine.name)
def test_options_may_have_any_byte_order(engine):
    def call(to):
        mask = masks.lengths(to(np.array([7, 4]))) & masks.window(3, 3, to(np.array([1, 2])))
        return attention(
            Q, K, V, mask=mask, scale=to(np.linspace(0.1, 1, 6)), softcap=to(np.arange(1, 7)), engine=engine
        )

    (o, cache), (want, want_cache) = call(swapped), call(lambda a: a)
    np.testing.assert_array_equal(o, want)
    jax.tree.map(np.testing.assert_array_equal, attention_vjp(cache, o), attention_vjp(want_cache, want))


def test_parameters_are_drawn_in_native_byte_order():
    got, want = init(0, 16, 2, dtype=np.dtype("f4").newbyteorder(">")), init(0, 16, 2, dtype="f4")
    assert all(a.dtype.isnative for a in tree.flatten(got).values())
    tree.map(np.testing.assert_array_equal, got, want)


# ── numbers for booleans, booleans for numbers ───────────────────────────────────────────────────────────────────

BIAS = "pass it as the bias to add it to the scores, or write mask != 0 if it is 0 and 1"
LEADS = {
    "a mask of floats": (lambda: attention(Q, K, V, mask=np.zeros((5, 7))), f"got dtype float64: {BIAS}"),
    "of half precision": (lambda: mha(PARAMS, *INPUTS, mask=np.zeros((5, 7), "f2")), f"got dtype float16: {BIAS}"),
    "of PyTorch": (lambda: attention(*map(torch.tensor, (Q, K, V)), mask=torch.zeros(5, 7)), f"torch.float32: {BIAS}"),
    "a number": (lambda: attention(Q, K, V, mask=0.0), f"got float: {BIAS}"),
    "a relative bias": (lambda: attention(Q, K, V, mask=biases.alibi(Q[0, :, 0, 0], T=5, S=7)[0]),
                        f"got RelativeBias: {BIAS}"),
    "of the scores": (lambda: ops.scores(Q, K, mask=np.zeros((5, 7))), f"got dtype float64: {BIAS}"),
    "of a step": (lambda: step(SQUARE, ONE_INPUT, mask=np.zeros((5, 5))), f"got dtype float64: {BIAS}"),
    "joined": (lambda: masks.causal() & np.zeros((5, 7)), "got dtype float64: pass it as the bias to add it to the"),
    "integers": (lambda: attention(Q, K, V, mask=np.ones((5, 7), int)), "got dtype int64: write mask != 0"),
    "a list": (lambda: attention(Q, K, V, mask=[[True] * 7] * 5), "got list: write np.array(mask)"),
    "padding of integers": (lambda: masks.padding(np.ones((2, 7), int)), "got dtype int64: write keep != 0"),
    "padding of a list": (lambda: masks.padding([[True]]), "got builtins.list: write np.asarray(keep)"),
    "lengths of floats": (lambda: masks.lengths(np.ones(2)), "got dtype float64: write n.astype(np.int64)"),
    "a keep of floats": (lambda: dropout.masked(np.ones((5, 7)), 0.1), "got dtype float64: write keep != 0"),
    "a where of integers": (lambda: softmax(X, where=np.ones(8, int)), "got dtype int64: write where != 0"),
    "a bias of booleans": (lambda: attention(Q, K, V, MASK), "got bool: write mask="),
    "a bias that is a mask": (lambda: attention(Q, K, V, masks.causal()), "got Band: write mask="),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), LEADS.values(), ids=LEADS)
def test_the_message_leads_to_what_was_meant(call, message):
    with pytest.raises(TypeError, match=f"{re.escape(message)}"):
        call()


def test_an_int_that_is_no_mask_is_refused_without_advice():
    with pytest.raises(TypeError, match=r"got int$"):
        attention(Q, K, V, mask=1)


def test_the_class_of_a_norm_is_to_be_called():
    x = np.ones((1, 3, 8), np.float32)
    with pytest.raises(TypeError, match=r"qk_norm must be .*: write RMSNorm\(\)"):
        mha(init(0, 8, 2, qk_norm=True), x, x, x, qk_norm=norms.RMSNorm)
    with pytest.raises(TypeError, match=r"qk_norm must be .* got array"):
        mha(init(0, 8, 2, qk_norm=True), x, x, x, qk_norm=np.ones(2))
