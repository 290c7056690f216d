"""Attention by blocks beyond what every engine is tested for: memory, masks, tracers, values that nobody looks at."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from conftest import BLOCKS

from funcmha import attention, attention_vjp, attention_weights, log_sum_exp, masks
from funcmha._arguments import values_of
from funcmha._arrays import Sum
from funcmha.biases import RelativeBias, as_bias
from funcmha.derivatives import attention_jvp, attention_vjp_jvp
from funcmha.dropout import masked, seeded
from funcmha.engines import BATCHED, BATCHED_HALF, SEQUENTIAL, batched, blocks
from funcmha.testing.strategies import AttentionProblem
from funcmha.testing.tolerance import attention_bounds, worst_ratio

PROBLEM = AttentionProblem(
    T=13, S=17, mask="window", bias="... H T+S-1", sink=True, softcap=0.5, per_head=True, scale=0.5, rate=0.3,
    seeded=True,
)  # fmt: skip


def everything(arrays, dots, cotangents, static):
    """o, p, lse, all gradients, forward mode and second order"""
    o, cache = attention(*arrays, **static)
    do, dweights, dlse = cotangents
    second = attention_vjp_jvp(cache, do, None, *dots, dlse=dlse)
    first = attention_vjp(cache, do, dweights=dweights, dlse=dlse)
    return [o, attention_weights(cache), log_sum_exp(cache), *first, *attention_jvp(cache, *dots), *second]


def inputs(problem, to=lambda a: a, dtype="float64"):
    def moved(a):
        return a.map(to) if isinstance(a, RelativeBias) else None if a is None else to(a)

    arrays, dots = (
        tuple(map(moved, p.inputs(dtype))) for p in (problem, problem.__class__(**vars(problem) | {"seed": 1}))
    )
    return arrays, dots, tuple(map(moved, problem.cotangents(dtype)))


def close(got, want, tolerance=1e-11):
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
        else:
            np.testing.assert_allclose(np.asarray(values_of(a)), values_of(b), rtol=tolerance, atol=tolerance)


# ── when ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("T", "kind"), [(256, batched.AttentionCache), (257, blocks.AttentionCache)], ids=["what fits", "one query more"]
)
def test_scores_that_fit_are_held_at_once(T, kind):
    x = np.zeros((1, 8, T, 1), np.float32)
    assert type(attention(x, x, x, engine="batched")[1]) is kind


def test_of_other_libraries_more_scores_fit():
    x = torch.zeros((1, 8, 700, 1))
    assert type(attention(x, x, x, engine="batched")[1]) is batched.AttentionCache
    x = torch.zeros((1, 8, 800, 1))
    assert type(attention(x, x, x, engine="batched")[1]) is blocks.AttentionCache


def test_short_sequences_are_one_block_whatever_the_batch():
    x = np.zeros((64, 12, 128, 1), np.float32)
    assert type(attention(x, x, x, engine="batched")[1]) is batched.AttentionCache


@pytest.mark.parametrize("T", [1, 7, 100, 1000, 10**5])
@pytest.mark.parametrize("S", [1, 7, 100, 1000, 10**5])
@pytest.mark.parametrize("number", [1, 48, 4096])
def test_a_block_holds_no_more_than_the_plan_says(T, S, number):
    plan = BATCHED.plan
    rows, cols = plan.block(number, T, S, numpy=True)
    assert 1 <= rows <= T
    assert 1 <= cols <= S
    assert number * rows * cols <= max(plan.numpy_bytes, number * plan.block_side**2)


def test_memory_is_linear():
    """Of forward, vjp, forward mode and second order: three times the tokens take about three times the memory."""
    peaks = []
    for T in (1024, 3072):
        x = np.random.default_rng(0).standard_normal((1, 1, T, 16), dtype=np.float32)
        tracemalloc.start()
        o, cache = attention(x, x, x, mask=masks.causal(), engine="batched")
        assert type(cache) is blocks.AttentionCache
        attention_vjp(cache, o)
        attention_jvp(cache, x)
        attention_vjp_jvp(cache, o, None, x)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 40 * x.nbytes  # an array of all scores is 192 times x


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Asked(masks.Band):
    """A band that notes the blocks of which booleans were made."""

    __slots__ = ()
    tiles: list

    def tile(self, rows, cols, like=None):
        self.tiles.append((rows, cols))
        return super().tile(rows, cols, like)


def test_only_mixed_blocks_have_booleans():
    Asked.tiles = []
    x = np.random.default_rng(0).standard_normal((1, 12, 4))
    o, cache = attention(x, x, x, mask=Asked(None, 0, 0), engine=BLOCKS)
    attention_vjp(cache, o)
    diagonal = {((i, i + 3), (i, i + 3)) for i in range(0, 12, 3)}
    assert set(Asked.tiles) == diagonal


@pytest.mark.parametrize("outside", ["array", "and", "or", "not"])
def test_a_mask_outside_numpy_is_joined_with_one_of_numpy(xp, outside):
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 2, 7, 5))
    allowed = rng.random((2, 7, 7)) < 0.7
    band, dense = masks.window(4, 0), masks.Dense(xp.to(allowed))
    mask, want = {
        "array": (xp.to(allowed), allowed),
        "and": (band & dense, band.dense(7, 7) & allowed),
        "or": (band | dense, band.dense(7, 7) | allowed),
        "not": (~dense & band, ~allowed & band.dense(7, 7)),
    }[outside]
    o, cache = attention(*map(xp.to, (q, k, v)), mask=mask, engine=BLOCKS)
    want_o, want_cache = attention(q, k, v, mask=want, engine=SEQUENTIAL)
    close([xp.back(o)], [want_o])
    grads = [None if g is None else xp.back(g) for g in attention_vjp(cache, xp.to(do))]
    close(grads, attention_vjp(want_cache, do))


# ── what is cut into parts ───────────────────────────────────────────────────────────────────────────────────────

ROWS, COLS = (2, 5), (3, 7)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (1, 7), (3, 5, 7), (2, 3, 1, 7), (2, 1, 5, 1)])
def test_parts_of_arrays_are_slices_of_what_they_stand_for(shape):
    rng = np.random.default_rng(0)
    a, keep = np.asarray(rng.standard_normal(shape)), np.asarray(rng.random(shape) < 0.5)
    whole = np.broadcast_to(a, (2, 3, 5, 7))[..., slice(*ROWS), slice(*COLS)]
    part = as_bias(a).part(ROWS, COLS, 5)
    assert np.array_equal(np.broadcast_to(part.values, whole.shape), whole)
    kept = masked(keep, 0.5).part(ROWS, COLS).dense(whole.shape)
    assert np.array_equal(
        np.broadcast_to(kept, whole.shape), np.broadcast_to(keep, (2, 3, 5, 7))[..., slice(*ROWS), slice(*COLS)]
    )


def test_part_of_a_relative_bias_has_its_diagonals():
    bias = RelativeBias(np.random.default_rng(0).standard_normal((3, 11)))
    part = bias.part(ROWS, COLS, 5)
    assert np.array_equal(part.dense(3, 4), bias.dense(5, 7)[:, slice(*ROWS), slice(*COLS)])


@pytest.mark.parametrize("first", [{}, {"first_query": 4, "first_key": 6}])
def test_part_of_a_seed_draws_what_the_whole_does(first):
    drop = seeded(7, 0.4, **first)
    want = drop.dense((2, 3, 5, 7))[..., slice(*ROWS), slice(*COLS)]
    assert np.array_equal(drop.part(ROWS, COLS).dense((2, 3, 3, 4)), want)


@pytest.mark.parametrize("bias", [np.ones(()), np.ones((3, 5, 7)), np.ones((1, 7)), RelativeBias(np.ones((3, 11)))])
def test_part_vjp_is_the_adjoint_of_part(bias):
    rng, bias = np.random.default_rng(0), as_bias(bias)
    x = bias.map(lambda a: rng.standard_normal(a.shape))
    part = x.part(ROWS, COLS, 5)
    y = part.map(lambda a: rng.standard_normal(a.shape))
    dx = bias.part_vjp(ROWS, COLS, 5, y)
    np.testing.assert_allclose(np.sum(dx.values * x.values), np.sum(part.values * y.values), rtol=1e-14)


@pytest.mark.parametrize(
    "places",
    [
        [],
        [((0, 2), (0, 3)), ((4, 5), (1, 3)), ((0, 2), (5, 7))],  # with gaps
        [((0, 3), (0, 7)), ((2, 5), (0, 7)), ((1, 4), (2, 4))],  # that overlap
        [((0, 5), (0, 7)), ((0, 5), (0, 7))],
    ],
)
def test_a_sum_of_parts_is_what_assignment_gives(xp, places):
    rng, want = np.random.default_rng(0), np.zeros((2, 5, 7))
    total = Sum((2, 5, 7), xp.to(want))
    for rows, cols in places:
        part = rng.standard_normal((2, rows[1] - rows[0], cols[1] - cols[0]))
        want[:, slice(*rows), slice(*cols)] += part
        total.add((rows, cols), xp.to(part.copy()))
    np.testing.assert_allclose(xp.back(total.total()), want, rtol=1e-15, atol=1e-15)


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sink", [None, -5.0])
def test_a_row_of_one_key_leaves_nothing(dtype, sink):
    """Values far from 0: the difference of two numbers of 1000 each is not 0, nor is it far less than the sink's."""
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, 16, 8)).astype(dtype)
    sink = None if sink is None else np.full(1, sink - 1e4, dtype)
    _, cache = attention(100 * q, k, v + 100, None, sink, mask=masks.window(0, 0), engine=BLOCKS)
    dq, dk, *_ = attention_vjp(cache, do)
    assert not dq.any()
    assert not dk.any()
    assert not attention_jvp(cache, q, k)[0].any()


@pytest.mark.parametrize("order", [1, -1])
def test_saturated_rows_keep_their_digits(order):
    """The largest key comes first, or last: then what was summed before it is moved. Oracle: float64."""
    rng = np.random.default_rng(0)
    q, k, v, do = (a.astype(np.float32) for a in rng.standard_normal((4, 2, 17, 8)))
    k, v = k[:, ::order] * 30, v + 30
    gradients = []
    for dtype, engine in (np.float32, BLOCKS), (np.float64, SEQUENTIAL):
        _, cache = attention(*(a.astype(dtype) for a in (q, k, v)), engine=engine)
        gradients.append(attention_vjp(cache, do.astype(dtype)))
    assert np.mean(attention_weights(cache).max(-1) > 0.999) > 0.2
    for got, want in zip(gradients[0][:2], gradients[1][:2], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_weights_after_dropout_are_those_of_the_specification():
    q, k, *_ = PROBLEM.inputs("float64")
    v = np.broadcast_to(np.eye(17), (*k.shape[:-1], 17))
    drop = seeded(5, 0.4, first_query=3, first_key=2)
    kept = [attention(q, k, v, dropout=drop, engine=engine)[0] != 0 for engine in (BLOCKS, SEQUENTIAL)]
    assert np.array_equal(*kept)


# ── products of half types ───────────────────────────────────────────────────────────────────────────────────────

HALVES = BATCHED_HALF._replace(plan=BLOCKS.plan._replace(half_products=True, block_side=13))
FLOATS = HALVES._replace(plan=HALVES.plan._replace(half_products=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_half_types_are_those_of_flash(dtype):
    """Within its bounds, and outside those of what is rounded once. Oracle: float64."""
    arrays, cotangents, static = PROBLEM.inputs(dtype), PROBLEM.cotangents(dtype)[::2], PROBLEM.static()
    exact, exact_cotangents = jax.tree.map(lambda a: a.astype(np.float64), (arrays, cotangents))
    wanted = results(exact, exact_cotangents, static | {"engine": SEQUENTIAL})
    got = jax.jit(lambda *args: results(*args, static | {"engine": HALVES}))(arrays, cotangents)
    (*exact, sink), (do, dlse), worst = exact, exact_cotangents, {}
    for arithmetic in ("strict", "flash"):
        bounds = attention_bounds(*exact, do, sink=sink, dlse=dlse, dtype=dtype, arithmetic=arithmetic, **static)
        each = zip(got, wanted, bounds, strict=True)
        worst[arithmetic] = max(worst_ratio(*map(values_of, some)) for some in each)
    assert worst["flash"] < 1
    assert worst["strict"] > 10


def results(arrays, cotangents, static):
    """o, p, lse and the gradients"""
    (o, cache), (do, dlse) = attention(*arrays, **static), cotangents
    return [o, attention_weights(cache), log_sum_exp(cache), *attention_vjp(cache, do, dlse=dlse)]


def factors_of(engine, dtype, do_dtype=None):
    """The dtypes of every product of forward and vjp, (left, right, result)"""
    q, k, v, do = (jnp.zeros((2, 9, 4), dtype) for _ in range(4))

    def both(q, k, v, do):
        o, cache = attention(q, k, v, engine=engine)
        return o, attention_vjp(cache, do)

    traced = jax.make_jaxpr(both)(q, k, v, do if do_dtype is None else do.astype(do_dtype))
    dots = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
    return [tuple(x.aval.dtype.name for x in (*e.invars, *e.outvars)) for e in dots]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_products_take_half_types_and_give_float32(dtype):
    """Two of the forward, five of the gradient, and two that center it."""
    assert factors_of(HALVES, dtype) == 9 * [(dtype, dtype, "float32")]


@pytest.mark.parametrize(
    ("engine", "dtype", "do"),
    [(FLOATS, "bfloat16", None), (HALVES, "float32", None), (HALVES, "bfloat16", "float32")],
    ids=["by default", "float32", "a cotangent in float32"],
)
def test_other_products_are_those_of_float32(engine, dtype, do):
    halves = [factors for factors in factors_of(engine, dtype, do) if "bfloat16" in factors]
    assert len(halves) == (0 if do is None else 2)  # the forward knows of no cotangent


def test_weights_of_half_types_are_normalised_below_the_least_number():
    """There log Σ exp is nothing beside a score, and exp(z − lse) is no weight."""
    q, k, v, do = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 3, 4)), "bfloat16")
    bias, grads = jnp.full((3, 3), jnp.finfo("bfloat16").min), []
    for engine in (HALVES, FLOATS):
        _, cache = attention(q, k, v, bias, engine=engine)
        grads.append([np.asarray(g, np.float32) for g in attention_vjp(cache, do)[:3]])
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02)


@pytest.mark.parametrize("to", [np.array, torch.tensor], ids=["NumPy", "PyTorch"])
def test_libraries_without_such_products_take_float32(to):
    x = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float16)
    want, got = (results((to(x),) * 3, (to(x), None), {"engine": engine}) for engine in (FLOATS, HALVES))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(want[:-2], got[:-2], strict=True))


# ── arrays that are not NumPy's ──────────────────────────────────────────────────────────────────────────────────


def test_torch_tensors_have_all_derivatives():
    static = PROBLEM.static()
    want = everything(*inputs(PROBLEM), static | {"engine": SEQUENTIAL})
    got = everything(*inputs(PROBLEM, lambda a: torch.tensor(np.array(a))), static | {"engine": BLOCKS})
    assert all(x is None or isinstance(values_of(x), torch.Tensor) for x in got)
    close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["window", "dense"])
def test_nothing_depends_on_values(mask):
    """To look at a traced array is an error: forward, vjp, forward mode and second order are traced, not run."""
    problem = AttentionProblem(**vars(PROBLEM) | {"mask": mask, "T": 5, "S": 4})
    static = problem.static() | {"engine": BLOCKS}
    if mask == "dense":
        static["mask"] = jnp.asarray(static["mask"])
    shapes = jax.eval_shape(lambda *args: everything(*args, static), *inputs(problem, jnp.asarray, "float32"))
    assert shapes[0].shape == (2, 6, 5, 13)


@pytest.mark.parametrize("mask", ["window", "dense of jax"])
def test_jax_compiles_once_for_a_shape_and_leaks_nothing(mask):
    traced = []
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 2, 4, 7, 5)).astype(np.float32)
    allowed = masks.window(3, 0) if mask == "window" else jnp.asarray(np.tri(7, dtype=bool))
    engine = BLOCKS._replace(plan=BLOCKS.plan._replace(block_side=4))
    options = {"mask": allowed, "dropout": seeded(3, 0.25), "softcap": [1.0, 2.0, 3.0, 4.0], "engine": engine}
    f = jax.custom_vjp(lambda *args: attention(*args, **options)[0])
    f.defvjp(lambda *args: attention(*args, **options), lambda cache, g: attention_vjp(cache, g)[:3])

    def loss(*args):
        traced.append(1)
        return jnp.sum(f(*args) * do)

    with jax.checking_leaks():
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        gradient(v, q, k)
        got = gradient(q, k, v)
    assert len(traced) == 1
    options["mask"] = np.asarray(allowed) if mask != "window" else allowed
    _, cache = attention(q, k, v, **options | {"engine": SEQUENTIAL})
    close(got, attention_vjp(cache, do)[:3], 1e-5)


def test_a_cache_outside_numpy_has_arrays_and_rates_as_leaves():
    """What a `jit` must not trace, masks and seeds and the plan, is in the structure."""
    problem = AttentionProblem(**vars(PROBLEM) | {"T": 5, "S": 4})
    arrays, *_ = inputs(problem, jnp.asarray, "float32")
    _, cache = attention(*arrays, **PROBLEM.static(), engine=BLOCKS)
    leaves, structure = jax.tree.flatten(cache)
    assert all(isinstance(leaf, jax.Array | float) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert again.rest.known.mask is cache.rest.known.mask
    assert oracles.on_keep(None, again.rest.known.dropout) == PROBLEM.static()["dropout"]
