"""What a CuPy user gets, on the stand-in: no function waits for the device, and no gradient sends anything to it.

Results are compared in the tests of each function, among whose libraries, the fixture `xp`, is the stand-in.
"""

import inspect
import re

import fake_cupy
import jax
import numpy as np
import oracles
import pytest
import test_protocol
from conftest import BLOCKS
from hypothesis import example, given
from test_derivatives_forward import other
from test_ops import MODERATE, close

import funcmha
from funcmha import attention, derivatives, dropout, kv_cache, masks, mha, norms, packing, rotary, surgery, tree
from funcmha._arrays import arange, full, outline
from funcmha.engines import ENGINES
from funcmha.merge import merge
from funcmha.testing.strategies import (
    MODERN,
    MODERN_MHA,
    AttentionProblem,
    MhaProblem,
    attention_problems,
    mha_problems,
)

cp = fake_cupy.MODULE
portable_engines = pytest.mark.parametrize("engine", [e.name for e in ENGINES.values() if not e.numpy_only])
with_blocks = pytest.mark.parametrize(
    "engine", ["sequential", "batched", BLOCKS], ids=["sequential", "batched", "blocks"]
)
A = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def installed():
    with fake_cupy.installed():
        yield


def moved(node):
    """A tree with its NumPy arrays on the device."""
    return jax.tree.map(lambda a: cp.asarray(a) if isinstance(a, np.ndarray) else a, node)


def options(static):
    """The mask and the tables as they are; the booleans of dropout on the device."""
    return static | {"dropout": oracles.on_keep(cp.asarray, static["dropout"])} if static.get("dropout") else static


def quiet(call):
    """call(), which neither waits nor sends."""
    with fake_cupy.traffic() as seen:
        result = call()
    assert (seen.waits, seen.sent) == ([], 0), inspect.getsource(call)
    return result


# ── no public function waits, and no gradient sends ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@test_protocol.portable_pairs
def test_no_op_waits_and_no_gradient_sends(pair, dtype):
    """But for masks and dropout and numbers per head that are made again, block by block, and some of them twice."""
    if pair.f is merge and dtype == "float16":
        pytest.skip("its log-sum-exps are float32 then")
    inputs, static = moved(pair.inputs(dtype)), options(pair.static)
    with fake_cupy.traffic() as forward:
        y, cache = pair.f(*inputs, **static)
    with fake_cupy.traffic() as backward:
        grads = pair.f_vjp(cache, y)
    assert (forward.waits, backward.waits) == ([], [])
    again = "blocks" in getattr(static.get("engine"), "name", "")
    assert backward.sent <= (2 * forward.sent if again else 0)
    assert {(type(a), a.dtype.name) for a in jax.tree.leaves((y, grads))} == {(cp.ndarray, dtype)}


ATTENTION = AttentionProblem(mask="window", bias="... H 1 S", rate=0.3, sink=True, softcap=0.5)
MHA = MhaProblem(
    mask="window", bias="... H T+S-1", qk_norm="layer", rotary="half of some", sink=True, softcap=0.5, rate=0.3
)


def of_attention(engine):
    do, dweights, dlse = moved(ATTENTION.cotangents("float32"))
    _, cache = attention(*moved(ATTENTION.inputs("float32")), **options(ATTENTION.static()), engine=engine)
    dots = moved(other(ATTENTION).inputs("float32"))
    yield lambda: derivatives.attention_jvp(cache, *dots)
    yield lambda: derivatives.attention_jvp(cache, dots[0])
    yield lambda: derivatives.attention_vjp_jvp(cache, do, do, *dots, dlse=dlse, dlse_dot=dlse)
    yield lambda: derivatives.attention_vjp_jvp(cache, do)
    yield lambda: funcmha.attention_vjp(cache, do, dweights=dweights, dlse=dlse, batch_axes=1)
    yield lambda: (funcmha.attention_weights(cache), funcmha.log_sum_exp(cache))


def of_mha(engine):
    dy, dweights, dlse = moved(MHA.cotangents("float32"))
    _, cache = mha(*moved(MHA.inputs("float32")), **options(MHA.static()), engine=engine)
    dots = moved(other(MHA).inputs("float32"))
    yield lambda: derivatives.mha_jvp(cache, *dots)
    yield lambda: derivatives.mha_vjp_jvp(cache, dy, dy, *dots, dlse=dlse, dlse_dot=dlse)
    yield lambda: derivatives.mha_vjp_jvp(cache, dy)
    yield lambda: funcmha.mha_vjp(cache, dy, dweights=dweights, dlse=dlse, per_sample=True)
    yield lambda: (funcmha.attention_weights(cache), funcmha.log_sum_exp(cache), surgery.max_logit(cache))


def of_a_head(engine):
    *inputs, _ = moved(test_protocol.one_head_inputs("float32"))
    y, cache = quiet(lambda: funcmha.head(*inputs, zero_attn=True, engine=engine))
    yield lambda: derivatives.head_jvp(cache, *inputs)
    yield lambda: funcmha.head_vjp(cache, y, per_sample=True)


def of_norms(engine):
    x, w = moved((A, A[0, 0, 0]))
    for norm in (norms.RMSNorm(), norms.L2Norm(), norms.LayerNorm()):
        params = dict.fromkeys(norm.leaves, w)
        y, cache = quiet(lambda norm=norm, params=params: norm.apply(x, params))
        yield lambda norm=norm, cache=cache, params=params: norm.apply_jvp(cache, x, params)
        yield lambda norm=norm, cache=cache, params=params, y=y: norm.apply_vjp_jvp(cache, y, y, x, params)
        yield lambda norm=norm, cache=cache, y=y: norm.apply_vjp(cache, y, batch_axes=1)


def of_linear(engine):
    x, w, b = moved((A, A[0, 0], A[0, 0, :, 0]))
    y, cache = quiet(lambda: funcmha.linear(x, w, b))
    yield lambda: derivatives.linear_jvp(cache, x, w, b)
    yield lambda: derivatives.linear_vjp_jvp(cache, y, y, x, w, b)
    yield lambda: derivatives.linear_vjp_jvp(cache, y)
    yield lambda: funcmha.linear_vjp(cache, y, batch_axes=2)


def of_packed_sequences(engine):
    cu = packing.cumulative([2, 0, 3])
    x, padded = moved((A, A[:1, :, :3].repeat(3, 0)))
    xs, of_unpack = quiet(lambda: packing.unpack(x, cu_seqlens=cu))
    yield lambda: packing.unpack_vjp(of_unpack, xs)
    whole, of_pack = quiet(lambda: packing.pack(*xs))
    yield lambda: packing.pack_vjp(of_pack, whole)
    made, of_pad = packing.pad(x, cu_seqlens=cu)  # where the rows go is sent
    yield lambda: packing.pad_vjp(of_pad, made)
    rows, of_unpad = packing.unpad(padded, cu_seqlens=cu)
    yield lambda: packing.unpad_vjp(of_unpad, rows)


def of_a_key_value_cache(engine):
    x = cp.asarray(A)
    kv = quiet(lambda: kv_cache.empty(x, x, capacity=8))
    for left in (None, 3):
        kv, cache = quiet(lambda kv=kv, left=left: kv_cache.append(kv, x, x, left=left))
        yield lambda cache=cache, kv=kv: kv_cache.append_vjp(cache, kv[:2])


def of_steps(engine):
    params = moved(funcmha.init(0, 8, 4, num_kv_heads=2, sink=True, qk_norm=True))
    x, kv = cp.asarray(A[:, 0, :, :].repeat(2, -1)), None
    for left in (None, None, 7):
        with fake_cupy.traffic() as seen:  # which sends the mask
            (y, kv), cache = kv_cache.step(params, x, kv, left=left, qk_norm=norms.RMSNorm(), engine=engine)
        assert seen.waits == []
        yield lambda cache=cache, y=y, kv=kv: kv_cache.step_vjp(cache, (y, kv))
        yield lambda cache=cache, kv=kv: kv_cache.step_vjp(cache, (None, kv))


def of_parameters(engine):
    params = moved(funcmha.init(0, 8, 4, num_kv_heads=2, sink=True))
    yield lambda: (funcmha.head_params(params, 1), funcmha.sizes(params))
    yield lambda: surgery.head_norms(params)
    yield lambda: surgery.prune_heads(params, keep=[0, 1])
    yield lambda: surgery.merge_kv_heads(params, 1)


GROUPS = (of_attention, of_mha, of_a_head, of_norms, of_linear, of_packed_sequences, of_a_key_value_cache, of_steps,
          of_parameters)  # fmt: skip


@pytest.mark.parametrize("calls", [of_attention, of_mha], ids=lambda calls: calls.__name__)
def test_no_derivative_by_blocks_waits(calls):
    """Masks and numbers per head are made again, block by block, and sent where they are not made on the device."""
    for call in calls(BLOCKS):
        with fake_cupy.traffic() as seen:
            call()
        assert seen.waits == []


def test_no_product_copies_scores():
    """CuPy copies a factor that is transposed: of blocks of 8 × 8 that is q, k, v or do, 2 or 3 wide."""
    q, k, v, do = (cp.asarray(np.zeros((1, 4, 16, n), np.float32)) for n in (2, 2, 3, 3))
    engine = BLOCKS._replace(plan=BLOCKS.plan._replace(block_side=8))
    with fake_cupy.traffic() as seen:
        _, cache = attention(q, k, v, engine=engine)
        funcmha.attention_vjp(cache, do)
        derivatives.attention_jvp(cache, q, k, v)
        derivatives.attention_vjp_jvp(cache, do, do, q, k, v)
    assert seen.copied
    assert all(min(shape[-2:]) <= 3 for shape in seen.copied)


@portable_engines
@pytest.mark.parametrize("calls", GROUPS, ids=lambda calls: calls.__name__)
def test_no_derivative_waits_or_sends(calls, engine):
    for call in calls(engine):
        quiet(call)


def test_every_derivative_is_among_those():
    """Every public function whose name ends in _vjp or _jvp is a pair of test_protocol.py, or called above."""
    modules = [node for node in map(vars(funcmha).get, funcmha.__all__) if inspect.ismodule(node)]
    public = {
        name for module in (funcmha, *modules) for name in vars(module) if re.fullmatch(r"[a-z].*_(vjp|jvp)", name)
    }
    public -= {"softmax_with_sink_vjp"}  # a formula that ops and derivatives share
    called = {pair.f_vjp.__name__ for pair in test_protocol.PAIRS.values()}
    called |= {f.__name__ for norm in (norms.RMSNorm, norms.L2Norm, norms.LayerNorm) for f in norm.functions}
    called |= {name for calls in GROUPS for name in re.findall(r"\w+_jvp|\w+_vjp", inspect.getsource(calls))}
    assert public <= called


@pytest.mark.parametrize("mask", [masks.causal(2), masks.window(2, 1), masks.causal() & masks.window(3, None, -1)])
def test_bands_are_made_on_the_device(mask):
    x = cp.asarray(A)
    with fake_cupy.traffic() as seen:
        tile = mask.tile((1, 4), (2, 5), x)
        whole = mask.dense(5, 7, x)
    assert (seen.waits, seen.sent) == ([], 0)
    np.testing.assert_array_equal(tile.get(), mask.tile((1, 4), (2, 5)))
    np.testing.assert_array_equal(whole.get(), mask.dense(5, 7))


def same_as_numpy(f, f_vjp, problem, engine):
    """The output and the gradients of a problem, on the stand-in, without waiting, and of NumPy."""
    inputs, static, cotangents = problem.inputs("float64"), problem.static(), problem.cotangents("float64")
    found = []
    for to, own in ((moved, options(static)), (lambda x: x, static)):
        dy, dweights, dlse = to(cotangents)
        with fake_cupy.traffic() as seen:
            y, cache = f(*to(inputs), **own, engine=engine)
            grads = f_vjp(cache, dy, dweights=dweights, dlse=dlse)
            found.append((y, funcmha.attention_weights(cache), funcmha.log_sum_exp(cache), *grads))
        assert seen.waits == []
    jax.tree.map(lambda got, want: close(got.get(), want), *found)


@with_blocks
@given(attention_problems(**(MODERN | MODERATE)))
@example(AttentionProblem(S=0, sink=True))
@example(AttentionProblem(T=0))
@example(AttentionProblem(batch=(0,)))
def test_no_attention_waits_whatever_its_sizes(engine, problem):
    same_as_numpy(attention, funcmha.attention_vjp, problem, engine)


@with_blocks
@given(mha_problems(**(MODERN | MODERN_MHA | MODERATE)))
def test_no_heads_wait_whatever_their_sizes(engine, problem):
    same_as_numpy(mha, funcmha.mha_vjp, problem, engine)


@pytest.mark.parametrize("shape", [(2, 3, 5, 11), (3, 5, 4), (5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)], ids=str)
@pytest.mark.parametrize("at_once", [dropout.AT_ONCE, 40])
def test_seeded_dropout_is_drawn_on_the_device(monkeypatch, shape, at_once):
    """The bits of NumPy, of parts too, some queries after others where all would be too many numbers at once."""
    monkeypatch.setattr(dropout, "AT_ONCE", at_once)
    first = {"first_sample": 1, "first_head": 2, "first_query": 3, "first_key": 2**33 - 1}
    x, drop = cp.asarray(A), dropout.seeded(2**40 + 7, 0.4, **first)
    dense = quiet(lambda: drop.dense(shape, x))
    np.testing.assert_array_equal(dense.get(), drop.dense(shape))
    tile = quiet(lambda: drop.tile(1, 2, (3, 5), (2, 9), x))
    np.testing.assert_array_equal(tile.get(), drop.tile(1, 2, (3, 5), (2, 9)))


def test_places_beyond_a_counter_are_refused_on_the_device():
    drop = dropout.seeded(0, 0.5, first_head=2**32 - 1)
    for draw in (lambda like: drop.dense((2, 1, 1), like), lambda like: drop.tile(0, 1, (0, 1), (0, 1), like)):
        with pytest.raises(ValueError, match="head must be within 0 … 1, got"):
            draw(cp.asarray(A))


def test_tables_of_positions_on_the_device_are_made_there():
    positions, x = moved((np.arange(5), A))
    with fake_cupy.traffic() as seen:
        table = rotary.table(positions, rotary.frequencies(4))
    assert (seen.waits, seen.sent) == ([], 16)  # two frequencies
    y, cache = quiet(lambda: rotary.rotate(x, rotary=table))
    quiet(lambda: rotary.rotate_vjp(cache, y))


# ── two libraries, two devices ───────────────────────────────────────────────────────────────────────────────────


def elsewhere(node):
    """A tree with its NumPy arrays on the other device."""
    with cp.cuda.Device(1):
        return moved(node)


@pytest.mark.parametrize("where", [lambda node: node, elsewhere], ids=["NumPy", "device 1"])
@test_protocol.portable_pairs
def test_an_input_from_elsewhere_is_named(pair, where):
    """By funcmha, with what it is beside: CuPy's own message names neither argument."""
    inputs = pair.inputs("float64")
    for i, x in enumerate(inputs):
        if x is not None and len(inputs) > 1:
            mixed = [where(y) if i == j else moved(y) for j, y in enumerate(inputs)]
            with pytest.raises(TypeError, match=r"must be (a CuPy|a NumPy|on <CUDA).* as .+ is, got"):
                pair.f(*mixed, **options(pair.static))


@pytest.mark.parametrize("where", [lambda node: node, elsewhere], ids=["NumPy", "device 1"])
@test_protocol.portable_pairs
def test_a_cotangent_from_elsewhere_is_named(pair, where):
    y, cache = pair.f(*moved(pair.inputs("float64")), **options(pair.static))
    dy = jax.tree.map(lambda a: where(a.get()), y)
    with pytest.raises(TypeError, match=r"d\S* must be (a CuPy array|on <CUDA Device 0>).* as .+ is, got"):
        pair.f_vjp(cache, dy)


@test_protocol.portable_pairs
def test_all_is_on_the_device_of_the_inputs(pair):
    with cp.cuda.Device(1):
        y, cache = pair.f(*moved(pair.inputs("float64")), **options(pair.static))
        grads = pair.f_vjp(cache, y)
    arrays = [a for a in jax.tree.leaves((y, cache, grads)) if isinstance(a, cp.ndarray)]
    assert {a.device.id for a in arrays} == {1}


def test_what_is_made_for_an_array_is_on_its_device():
    """Whatever device is the current one: zeros, masks, dropout, tables."""
    x = elsewhere(A)
    made = [
        full((2, 3), 0.5, x),
        arange(3, x),
        outline(x),
        masks.lengths(np.array([1, 2])).dense(3, 3, x),
        *kv_cache.empty(x, x)[:2],
    ]
    assert {a.device.id for a in made} == {1}
    assert cp.cuda.Device().id == 0


# ── from init to a saved file and back ───────────────────────────────────────────────────────────────────────────


def test_a_model_is_moved_trained_saved_and_loaded(tmp_path):
    """The lines of the README, on the second device; all results against NumPy's."""
    x, host = A[:, 0].repeat(2, -1), funcmha.init(0, 8, 4, num_kv_heads=2, sink=True)
    with cp.cuda.Device(1):
        params = tree.map(cp.asarray, host)
        with fake_cupy.traffic() as seen:
            y, cache = funcmha.self_attention(params, cp.asarray(x))
            grads, _, _ = funcmha.self_attention_vjp(cache, y)
            params = tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        assert (seen.waits, seen.sent) == ([], x.nbytes)
    with fake_cupy.traffic() as seen:
        funcmha.save(tmp_path / "model.npz", params)
    assert [wait.partition(" in ")[0] for wait in seen.waits] == ["get"] * len(tree.flatten(params))

    again = funcmha.load(tmp_path / "model.npz", like=params)
    y, cache = funcmha.self_attention(host, x)
    host = tree.map(lambda p, g: p - 1e-3 * g, host, funcmha.self_attention_vjp(cache, y)[0])
    for name, w in tree.flatten(again).items():
        assert (type(w), w.device.id, w.dtype) == (cp.ndarray, 1, np.float32)
        np.testing.assert_array_equal(w.get(), tree.flatten(params)[name].get())
        np.testing.assert_allclose(w.get(), tree.flatten(host)[name], rtol=0, atol=1e-6)
