"""Steps over a key/value cache against self-attention of all tokens, and one step against torch."""

from dataclasses import replace
from numbers import Number

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from pytrees import PYTREES
from test_ops import close

from funcmha import attention_weights, init, log_sum_exp, masks, self_attention, self_attention_vjp, tree
from funcmha.biases import RelativeBias
from funcmha.kv_cache import KVCache, empty, step, step_vjp
from funcmha.rotary import frequencies, table
from funcmha.testing import check_vjp
from funcmha.testing.strategies import MODERN, MODERN_MHA, RELATIVE, MhaProblem, mha_problems

C, P = 17, 13  # width of the input, positions of the whole context
SQUARE = {"Cq": C, "Ck": C, "Cv": C, "T": P, "S": P}
FULL = {"qk_norm": "layer", "sink": True, "softcap": 0.5, "scale": 0.5, "per_head": True, "rate": 0.3, "seeded": True}


def problems(**fields):
    """Problems of a whole context, with dropout from a seed or none."""
    square = {name: st.just(n) for name, n in SQUARE.items()}
    some = {"mask": st.just("none"), "seeded": st.just(True), "batch": st.sampled_from([(), (2,), (2, 3), (0,)])}
    size = {"D": st.sampled_from([4, 5, 8]), "gain": st.sampled_from([1e-3, 1.0, 10.0])}
    return mha_problems(**(MODERN | MODERN_MHA | {"bias_kv": st.just(False), "zero_attn": st.just(False)})
                        | square | some | size | {"bias": st.sampled_from(["none", *RELATIVE])} | fields)  # fmt: skip


def steps(most=9):
    return st.lists(st.integers(0, 4), max_size=6).filter(lambda steps: 0 < sum(steps) <= most)


lefts = st.none() | st.integers(0, 10)


def tables(problem, first, count):
    """Tables of positions first … first + count, or None."""
    if problem.rotary == "none":
        return None
    width = problem.D // 2 * 2 if "all" in problem.rotary else problem.D // 4 * 2
    pairs = "half" if "half" in problem.rotary else "interleaved"
    return table(np.arange(first, first + count), frequencies(width), pairs=pairs)


def drawn(problem, n):
    """params, x of n tokens, the bias of the context, the options, and a cotangent of y."""
    (params, x, _, _, bias), static = problem.inputs("float64"), problem.static()
    dy, *_ = problem.cotangents("float64")
    static = {name: static.get(name) for name in ("scale", "softcap", "qk_norm", "dropout")}
    return params, x[..., :n, :], bias, static, dy[..., :n, :]


def split(x, steps):
    return np.split(x, np.cumsum(steps)[:-1], axis=-2)


def chain(params, x, bias, steps, kv=None, **static):
    """The outputs, the last KVCache, and the caches."""
    ys, caches = [], []
    for x_t in split(x, steps):
        (y, kv), cache = step(params, x_t, kv, bias, **static)
        ys.append(y)
        caches.append(cache)
    return np.concatenate(ys, axis=-2), kv, caches


def back(caches, dys):
    """dparams, dx, dkv, dvalues of the bias: from the last step to the first."""
    dkv, total, dxs, dbias = None, None, [], 0.0
    for cache, dy in zip(reversed(caches), reversed(dys), strict=True):
        dparams, dx, dkv, dbias_t = step_vjp(cache, (dy, dkv))
        total = dparams if total is None else tree.map(np.add, total, dparams)
        dxs.append(dx)
        dbias = None if dbias_t is None else dbias + dbias_t.values
    return total, np.concatenate(dxs[::-1], axis=-2), dkv, dbias


IDS = np.array([0, 0, 0, 1, 1, 0, 2, 2, 2, 2, 3, 3, 3])
HANDED_ON = {  # masks of the whole context that a model may have been trained with
    "none": None,
    "causal": masks.causal(),
    "window": masks.window(3, 0),
    "lengths": masks.causal() & masks.lengths(4),
    "segments": masks.causal() & masks.segments(IDS, IDS),
    "chunks": masks.chunks(4),
    "sinks": masks.causal() & (masks.window(2, 0) | masks.first(1)),
    "array": masks.causal() & (np.arange(P * P).reshape(P, P) % 3 > 0),
    "padding": ~masks.padding(IDS == 1),
}

# ── steps are self-attention of all tokens ───────────────────────────────────────────────────────────────────────


@given(problems(), steps(), lefts, st.sampled_from([*HANDED_ON]))
@example(MhaProblem(**SQUARE, **FULL, D=8, rotary="half of all", bias="... H T+S-1"), [4, 1, 3, 1], 2, "none")
@example(MhaProblem(**SQUARE, **FULL, D=8, rotary="interleaved of some", bias="1 T+S-1"), [1, 1, 1, 4, 2], None, "none")
@example(MhaProblem(**SQUARE, qk_norm="rms", D=8, rotary="half of some", K=1, G=3), [3, 0, 2, 1], 0, "none")
@example(MhaProblem(**SQUARE), [4, 1, 3, 1], 2, "segments")
@example(MhaProblem(**SQUARE), [1, 2, 2], None, "causal")
def test_steps_equal_self_attention_of_all_tokens(engine, problem, steps, left, mask):
    """Output and every gradient, to 1e-11, whatever the chunks; of tables, biases and masks of a longer context."""
    n = sum(steps)
    params, x, bias, static, dy = drawn(problem, n)
    middle = None if bias is None else RelativeBias(bias.values[..., P - n : P + n - 1])
    mask = HANDED_ON[mask]
    allowed = None if mask is None else mask.dense(P, P)[..., :n]
    allowed = allowed if mask is None or len(allowed) == 1 else allowed[:n]
    causal = {"mask": masks.intersection(masks.window(left, 0), allowed), "rotary": tables(problem, 0, n)}
    static["engine"] = engine
    want, cache = self_attention(params, x, middle, **causal, **static)
    y, kv, caches = chain(params, x, bias, steps, left=left, rotary=tables(problem, 0, P), mask=mask, **static)
    close(y, want)
    assert kv.position == n

    dparams, dx, dkv, dbias = back(caches, split(dy, steps))
    want_params, want_dx, want_dbias = self_attention_vjp(cache, dy)
    assert dkv is None
    close(dx, want_dx)
    tree.map(close, dparams, want_params)
    if bias is not None:
        close(dbias[..., P - n : P + n - 1], want_dbias.values)
        assert not dbias[..., : P - n].any()
        assert not dbias[..., P + n - 1 :].any()


# ── one step against torch ────────────────────────────────────────────────────────────────────────────────────────────


def torch_step(params, x, keys, values, bias, *, left, mask, qk_norm, rotary, **static):
    """y, weights, lse, keys', values' of tensors, written out: all tokens of the past, or the last `left`."""
    T, kept = x.shape[-2], keys.shape[-2] if left is None else min(left, keys.shape[-2])
    q, k, v = (
        torch.einsum("...tc,hdc->...htd", x, p["w"]) + (p["b"][:, None, :] if "b" in p else 0.0)
        for p in (params["q_proj"], params["k_proj"], params["v_proj"])
    )
    q, k = (
        oracles.rotated(oracles.normalised(a, qk_norm, params.get(f"{n}_norm", {})), rotary)
        for a, n in ((q, "q"), (k, "k"))
    )
    keys, values = (torch.cat([a[..., a.shape[-2] - kept :, :], b], -2) for a, b in ((keys, k), (values, v)))
    at, j = np.arange(T)[:, None] + kept, np.arange(kept + T)
    own = (j <= at) & (at - j <= (P if left is None else left))
    sink = params["sink"]["w"] if "sink" in params else None
    o, p, lse = oracles.attention(q, keys, values, bias, sink, mask=own if mask is None else own & mask, **static)
    y = torch.einsum("...hte,ohe->...to", o, params["out_proj"]["w"])
    return (y + params["out_proj"]["b"] if "b" in params["out_proj"] else y), p, lse, keys, values


@given(problems(T=st.sampled_from([0, 1, 2, 5]), S=st.just(P)), st.integers(0, 7), lefts, st.data())
def test_one_step_matches_torch(engine, problem, N, left, data):
    """A step after any past, with masks, biases and dropout of its own, and cotangents of all that it gives."""
    T, held = problem.T, problem.T + (N if left is None else min(N, left))
    problem = replace(problem, S=held, bias=data.draw(st.sampled_from(["none", "... H T S", "1 S", "T 1"])),
                      mask=data.draw(st.sampled_from(["none", "heads", "padding"])), seeded=False)  # fmt: skip
    (params, x, _, _, bias), static = problem.inputs("float64"), problem.static()
    static = {name: static.get(name) for name in ("scale", "softcap", "qk_norm", "dropout", "mask")}
    dy, dweights, dlse = problem.cotangents("float64")
    rng, group = np.random.default_rng(problem.seed), (*problem.batch, problem.K)
    keys, values, dkeys, dvalues = (
        rng.standard_normal((*group, rows, width)) for rows in (N, held) for width in (problem.D, problem.E)
    )
    position = N if left is not None and left > N else N + 2  # and two are dropped
    kv, mask = KVCache(keys, values, position), static.pop("mask")
    if isinstance(mask, masks.Padding):  # of the whole context
        before = rng.random((*mask.keep.shape[:-1], position + T - held)) < 0.5
        mask = masks.padding(np.concatenate([before, mask.keep], axis=-1))
    (y, after), cache = step(
        params, x, kv, bias, left=left, rotary=tables(problem, 0, position + T + 1), engine=engine, mask=mask, **static
    )
    leaves = [oracles.tensors(params), *(oracles.tensor(a) for a in (x, keys, values, bias))]
    if isinstance(mask, masks.Padding):
        mask = mask.dense(1, position + T)[..., position + T - held :]
    static["mask"] = None if mask is None else np.array(mask)
    outputs = torch_step(*leaves, left=left, rotary=tables(problem, position, T), **static)
    got = (y, attention_weights(cache), log_sum_exp(cache), after.keys, after.values)
    for a, b in zip(got, outputs, strict=True):
        close(a, b.detach())
    assert after.position == position + T

    names = tree.flatten(leaves[0])
    outputs = [torch.where(torch.isinf(a), 0.0, a) for a in outputs]
    wanted = oracles.gradients(outputs, [dy, dweights, dlse, dkeys, dvalues], [*names.values(), *leaves[1:]])
    dparams, dx, dkv, dbias = step_vjp(cache, (dy, (dkeys, dvalues)), dweights=dweights, dlse=dlse)
    for a, b in zip((*(tree.flatten(dparams)[n] for n in names), dx, *dkv[:2], dbias), wanted, strict=True):
        close(a, b)
    assert dkv.position is None


# ── the rules of every pair ──────────────────────────────────────────────────────────────────────────────────────

MODERN_STEP = MhaProblem(**SQUARE | {"S": 2 * P - 1 - 3 + 1, "T": 3}, qk_norm="layer", sink=True, softcap=0.5, rate=0.3,
                         seeded=True, bias="... H T+S-1", D=8, rotary="half of some", G=2)  # fmt: skip


def one_step(dtype, N=5, left=4, **more):
    """Inputs of a step after N tokens, as arrays alone, and its options."""
    params, x, _, _, bias = MODERN_STEP.inputs(dtype)
    static = MODERN_STEP.static()
    static = {name: static[name] for name in ("scale", "softcap", "qk_norm", "dropout")} | {"left": left}
    rng, group = np.random.default_rng(1), (2, MODERN_STEP.K, N)
    keys, values = (rng.standard_normal((*group, n)).astype(dtype) for n in (MODERN_STEP.D, MODERN_STEP.E))
    return (params, x, keys, values, bias.values), static | {"rotary": tables(MODERN_STEP, 0, P)} | more


def f(params, x, keys, values, bias, **static):
    """The step as a function of arrays to one array."""
    kv = None if keys is None else KVCache(keys, values, 5)
    (y, after), cache = step(params, x, kv, None if bias is None else RelativeBias(bias), **static)
    return np.concatenate([a.ravel() for a in (y, after.keys, after.values)]), (cache, y, *after[:2])


def f_vjp(cache, dy):
    cache, *outputs = cache
    parts = np.split(dy, np.cumsum([a.size for a in outputs])[:-1])
    dy, dkeys, dvalues = (g.reshape(a.shape) for g, a in zip(parts, outputs, strict=True))
    dparams, dx, dkv, dbias = step_vjp(cache, (dy, (dkeys, dvalues)))
    dkeys, dvalues = (None, None) if dkv is None else dkv[:2]
    return dparams, dx, dkeys, dvalues, None if dbias is None else dbias.values


@pytest.mark.usefixtures("each_engine")
def test_the_step_keeps_the_protocol():
    """The complex numbers of the check go to an engine that takes them."""
    inputs, static = one_step("float64")
    check_vjp(f, f_vjp, inputs, static)
    params, x, *_ = inputs
    check_vjp(f, f_vjp, (params, x, None, None, None), static | {"left": None})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtype_in_is_dtype_out(dtype):
    inputs, static = one_step(dtype)
    y, cache = f(*inputs, **static)
    assert {a.dtype for a in jax.tree.leaves((y, f_vjp(cache, y)))} == {np.dtype(dtype)}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("past", [True, False])
def test_half_types_are_rounded_once(dtype, past):
    """T4: y is of the keys of this step before they are rounded, kv' and every gradient what float32 gives, rounded."""
    inputs, static = one_step(dtype)
    inputs = inputs if past else (*inputs[:2], None, None, inputs[4])
    upcast = jax.tree.map(lambda a: a.astype(np.float32), inputs)
    (y, cache), (y_32, cache_32) = f(*inputs, **static), f(*upcast, **static)
    assert np.array_equal(y, y_32.astype(dtype))
    got, want = f_vjp(cache, y), f_vjp(cache_32, y.astype(np.float32))
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(g, w.astype(dtype)), got, want)


@pytest.mark.parametrize("N", [0, 5])
def test_a_cotangent_that_is_none_is_zero(engine, N):
    (params, x, keys, values, bias), static = one_step("float64", N=N, engine=engine)
    (y, after), cache = step(params, x, KVCache(keys, values, N), RelativeBias(bias), **static)
    zero = np.zeros_like
    for some, all_of in (
        ((y, None), (y, tuple(map(zero, after[:2])))),
        ((None, after), (zero(y), after)),
        ((None, after[:2]), (zero(y), after)),
    ):
        got, want = (jax.tree.leaves(step_vjp(cache, dy_dkv)) for dy_dkv in (some, all_of))
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            close(g, w)


def test_no_past_is_an_empty_one():
    """None for kv, and for its gradient; else a gradient of no rows."""
    (params, x, keys, values, bias), static = one_step("float64", N=0)
    (y, after), cache = step(params, x, None, RelativeBias(bias), **static)
    nothing = empty(keys, values, capacity=8)
    (want, after_empty), cache_empty = step(params, x, nothing, RelativeBias(bias), **static)
    assert np.array_equal(y, want)
    jax.tree.map(np.testing.assert_array_equal, after, after_empty)
    dparams, dx, dkv, _ = step_vjp(cache, (y, after))
    want_params, want_dx, want_dkv, _ = step_vjp(cache_empty, (y, after))
    jax.tree.map(np.testing.assert_array_equal, (dparams, dx), (want_params, want_dx))
    assert dkv is None
    assert (want_dkv.keys.shape, want_dkv.values.shape, want_dkv.position) == (keys.shape, values.shape, None)


def test_every_array_library_gives_the_same(xp):
    (params, x, keys, values, bias), static = one_step("float64")
    results = []
    for to, back_ in ((np.array, np.asarray), (xp.to, xp.back)):
        inputs = tree.map(to, params), to(x), KVCache(to(keys), to(values), 5), RelativeBias(to(bias))
        (y, after), cache = step(*inputs, **static)
        dparams, dx, dkv, dbias = step_vjp(cache, (y, after))
        found = [y, *after[:2], *tree.flatten(dparams).values(), dx, *dkv[:2], dbias.values]
        assert {type(a) for a in found} == {type(inputs[1])}
        results.append([back_(a) for a in found])
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_the_cache_is_a_plain_pytree_named_after_its_op(engine):
    (params, x, keys, values, bias), static = one_step("float64", engine=engine)
    (y, after), cache = step(params, x, KVCache(keys, values, 5), RelativeBias(bias), **static)
    assert type(cache).__name__ == "StepCache"
    want = jax.tree.leaves(step_vjp(cache, (y, after)))
    for flatten, unflatten in PYTREES.values():
        leaves, spec = flatten(cache)
        assert all(leaf is None or isinstance(leaf, (np.ndarray, Number)) for leaf in leaves)
        got = jax.tree.leaves(step_vjp(unflatten(leaves, spec), (y, after)))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_jax_traces_the_step_and_where_it_stands():
    """Under jit `position` is a tracer: the rows of the table are taken all the same; gradients are JAX's own."""
    (params, x, keys, values, bias), static = one_step("float64", dropout=None)
    (y, after), cache = step(params, x, KVCache(keys, values, 5), RelativeBias(bias), **static)
    with jax.enable_x64(True):

        def loss(params, x, kv, bias):
            y, after = step(params, x, kv, RelativeBias(bias), **static)[0]
            return sum((a**2).sum() / 2 for a in (y, *after[:2])), (y, *after)

        every = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True))
        want, got = every(params, x, KVCache(keys, values, 5), bias)
        jax.tree.map(close, got, (y, *after))
        dparams, dx, dkv, dbias = step_vjp(cache, (y, after))
        jax.tree.map(close, (dparams, dx, *dkv[:2], dbias.values), (*want[:2], *want[2][:2], want[3]))


# ── what a step does not do ──────────────────────────────────────────────────────────────────────────────────────


def test_a_step_copies_no_past():
    """The keys that the attention took are those handed on, in the spare rows of the prompt; and all values stay."""
    (params, x, *_), static = one_step("float64", left=None)
    (_, first), _ = step(params, x, None, **static)
    kept = first.keys.copy()
    (_, second), cache = step(params, x[:, :1], first, **static)
    assert np.shares_memory(second.keys, first.keys)
    assert cache.attention.k is second.keys
    assert cache.attention.v is second.values
    (_, other), _ = step(params, x[:, 1:2], first, **static)
    assert not np.shares_memory(other.keys, second.keys)
    assert np.array_equal(first.keys, kept)


def test_prompts_of_different_lengths_equal_each_alone(engine):
    """Padded on the left to one length: a mask keeps out the padding, and each sample's table begins where it does."""
    (params, x, *_), static = one_step("float64", left=None, dropout=None, engine=engine)
    x = np.concatenate([x, x[:, ::-1]], axis=1)
    pads, places = np.array([0, 2]), np.arange(8) - np.array([[0], [2]])
    rotary = table(places[:, None], frequencies(4), pairs="half")
    kv, ys = None, []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        tokens = masks.padding(np.arange(stop) >= pads[:, None])
        (y, kv), _ = step(params, x[:, start:stop], kv, mask=tokens, **static | {"rotary": rotary})
        ys.append(y)
    y = np.concatenate(ys, axis=1)
    for b, pad in enumerate(pads):
        want, _, _ = chain(params, x[b, pad:], None, [6 - pad], **static)
        close(y[b, pad:], want)


# ── refusals, before any arithmetic ──────────────────────────────────────────────────────────────────────────────

(PARAMS, X, KEYS, VALUES, BIAS), STATIC = one_step("float64")
PAST = KVCache(KEYS, VALUES, 5)
EXTRA = PARAMS | {"bias_kv": {"k": np.ones((2, 8)), "v": np.ones((2, 13))}}


@pytest.mark.parametrize(
    ("args", "static", "error", "message"),
    [
        ((EXTRA, X), {}, ValueError, "params must have no bias_kv: its key comes from no token, and has no place"),
        ((PARAMS, X.tolist()), {}, TypeError, "x must be an array, got list"),
        ((PARAMS, X.astype("f4")), {}, TypeError, "x must have dtype float64 as q_proj.w has, got float32"),
        ((PARAMS, X[..., 1:]), {}, ValueError, r"x must be \(..., T, Cq\) with Cq=17 as in q_proj.w, got \(2, 3, 16\)"),
        ((PARAMS, X, PAST[:2]), {}, TypeError, "kv must be a KVCache of funcmha.kv_cache, got tuple"),
        ((PARAMS, X, PAST._replace(position=4)), {}, ValueError, "kv.position must be at least N=5 as in kv.keys"),
        ((PARAMS, X, PAST._replace(position=5.0)), {}, TypeError, "kv.position must be an int, got 5.0 of type float"),
        ((PARAMS, X, PAST._replace(keys=KEYS[..., 1:])), {}, ValueError, r"kv.keys must be .* D=8 as in q_proj.w, got"),
        ((PARAMS, X, PAST._replace(keys=KEYS[:1])), {}, ValueError, r"kv.keys must be .* ...=\(2,\) as in x"),
        ((PARAMS, X, PAST._replace(values=VALUES[:, :1])), {}, ValueError, "kv.values must be .* K=2 as in k_proj.w"),
        ((PARAMS, X, PAST._replace(values=VALUES[:, :, 1:])), {}, ValueError, "kv.values must be .* N=5 as in kv.keys"),
        ((PARAMS, X, PAST._replace(keys=KEYS.astype("f4"))), {}, TypeError, "kv.keys must have dtype float64 as x has"),
        ((PARAMS, X, PAST._replace(keys=KEYS.tolist())), {}, TypeError, "kv.keys must be an array, got list"),
        ((PARAMS, jax.numpy.ones((2, 3, 17)), PAST), {}, TypeError, "x must be a NumPy array as q_proj.w is, got a"),
        ((PARAMS, X, PAST._replace(position=9)), {"left": 6}, ValueError,
         "left must be at most N=5 as in kv.keys, as 4 tokens are dropped, got 6"),
        ((PARAMS, X, PAST), {"left": -1}, ValueError, "left must be at least 0, or None for no bound, got -1"),
        ((PARAMS, X, PAST), {"rotary": tables(MODERN_STEP, 5, 3)}, ValueError,
         "rotary must have positions 0, 1, … up to 8, as kv.position=5 and T=3, got 3"),
        ((PARAMS, X, PAST), {"rotary": (None, None)}, TypeError, "rotary must come from funcmha.rotary, got tuple"),
        ((PARAMS, X, PAST), {"rotary": table(np.arange(9), frequencies(10))}, ValueError, "rotary must rotate D=8"),
        ((PARAMS, X, PAST), {"mask": np.ones((3, 5), bool)}, ValueError, r"mask must .* = \(2, 4, 3, 7\), got"),
        ((PARAMS, X, PAST), {"mask": masks.padding(np.ones(7, bool))}, ValueError,
         r"mask.keep must be \(..., S\) with S=8 or more, got \(7,\)"),
        ((PARAMS, X, PAST, np.ones((3, 8))), {}, ValueError, r"bias must broadcast .* = \(2, 4, 3, 7\), got \(3, 8\)"),
        ((PARAMS, X, PAST, RelativeBias(BIAS[..., :9])), {}, ValueError, r"bias.values must be .* of P=7 positions"),
        ((PARAMS, X, PAST, RelativeBias(BIAS[..., 1:])), {}, ValueError, r"bias.values must be \(..., H or 1, 2P − 1"),
        ((PARAMS, X, PAST, RelativeBias(BIAS[:, :3])), {}, ValueError, "bias.values must broadcast"),
        ((PARAMS, X, PAST), {"qk_norm": None}, ValueError, "qk_norm must be one that takes q_norm.w"),
        ((PARAMS, X, PAST), {"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0"),
        ((PARAMS, X, PAST), {"dropout": 0.2}, TypeError, "dropout must be dropout.masked"),
    ],
)  # fmt: skip
def test_the_step_refuses(args, static, error, message):
    with pytest.raises(error, match=message):
        step(*args, **STATIC | static)


def test_the_vjp_refuses_cotangents_that_are_not_of_the_outputs():
    (y, after), cache = step(PARAMS, X, PAST, RelativeBias(BIAS), **STATIC)
    for dy_dkv, error, message in (
        (y, TypeError, r"dy_dkv must be \(dy, dkv\) as the output is, got ndarray"),
        ((None, None), TypeError, "dy_dkv must have dy or dkv, got None for both"),
        ((y[..., 1:], None), ValueError, r"dy must be \(..., T, O\) = \(2, 3, 29\) as the output is"),
        ((y, PAST), ValueError, r"dkeys must be \(..., K, N', D\) = \(2, 2, 7, 8\) as the output is"),
        ((y, (after.keys, after.keys)), ValueError, r"dvalues must be \(..., K, N', E\) = \(2, 2, 7, 13\)"),
        ((y, (after.keys, None)), TypeError, "dvalues must be an array, got NoneType"),
        ((y, after.keys), TypeError, "dkv must be a KVCache, or a pair of dkeys and dvalues, got ndarray"),
        ((y.astype("f4"), after), TypeError, "dy must have dtype float64 as the output has, got float32"),
    ):
        with pytest.raises(error, match=message):
            step_vjp(cache, dy_dkv)
    with pytest.raises(ValueError, match=r"dweights must be \(..., H, T, N'\) = \(2, 4, 3, 7\)"):
        step_vjp(cache, (y, None), dweights=y)
    with pytest.raises(ValueError, match=r"dlse must be \(..., H, T\) = \(2, 4, 3\)"):
        step_vjp(cache, (y, None), dlse=y)


def test_what_step_returns_is_no_kv_and_the_message_says_how_to_take_it_apart():
    params, x = init(0, 8, 2), np.ones((1, 3, 8), np.float32)
    out, cache = step(params, x)
    for wrong in (cache, out):
        with pytest.raises(TypeError, match=r"kv must be a KVCache .*: write \(y, kv\), cache = step\(params, x\)"):
            step(params, x, wrong)
    with pytest.raises(TypeError, match=r"kv must be a KVCache of funcmha.kv_cache, got tuple$"):
        step(params, x, (x, x))
    with pytest.raises(TypeError, match=r"casual= is no option, which are .*, engine"):
        step(params, x, casual=True)
