"""`parallel.mha` on many ranks equals `mha` in one process; parameters and arrays come back from their parts."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import oracles
import pytest
import ranks
import torch
from hypothesis import example, given
from test_ops import close

from funcmha import (
    attention_weights,
    biases,
    init,
    log_sum_exp,
    masks,
    mha,
    mha_vjp,
    norms,
    parallel,
    rotary,
    self_attention,
    self_attention_vjp,
    tree,
)
from funcmha.testing.strategies import MODERN, MODERN_MHA, MhaProblem, mha_problems

LINES = ["zigzag", "striped", "heads", (2, 2), (2, 3), (4, 2), (3, 1)]
FAIR = {"gain": st.sampled_from([0.1, 1.0])}  # less makes rounding errors of torch large, by the norms


def ranks_of(scheme, n):
    return scheme[0] * scheme[1] if isinstance(scheme, tuple) else n


def of_tokens(table, i):
    return None if table is None else table._replace(cos=table.cos[..., i, :], sin=table.sin[..., i, :])


def run(problem, n, scheme, dtype, **rest):
    """y, weights, lse, dquery, dkey, dvalue of all tokens; dparams of all heads and dbias as each rank has them"""
    params, query, key, value, bias = problem.inputs(dtype)
    static, cotangents = problem.static(), problem.cotangents(dtype)
    tables = static.pop("rotary", None) or (None, None)

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        i, j = line.positions(problem.T), line.positions(problem.S)
        options = static | {"rotary": (of_tokens(tables[0], i), of_tokens(tables[1], j))}
        inputs = [np.take(a, at, axis=-2) for a, at in ((query, i), (key, j), (value, j))]
        y, cache = parallel.mha(line, parallel.shard(params, line), *inputs, bias, **options)
        told = attention_weights(cache), log_sum_exp(cache)[..., None]
        dy, dweights, dlse = (np.take(a, i, axis=axis) for a, axis in zip(cotangents, (-2, -2, -1), strict=True))
        dparams, *dxs, dbias = parallel.mha_vjp(cache, dy, dweights=dweights, dlse=dlse, **rest)
        return (i, i, i, i, j, j), (y, *told, *dxs), parallel.unshard(dparams, line), dbias

    places, arrays, dparams, dbiases = zip(*parallel.threads(n).run(of_rank), strict=True)
    each = zip(zip(*arrays, strict=True), zip(*places, strict=True), strict=True)
    sizes = (problem.T,) * 4 + (problem.S,) * 2
    y, p, lse, *dxs = (ranks.put_together(a, at, size) for (a, at), size in zip(each, sizes, strict=True))
    return y, p, lse[..., 0], *dxs, dparams, dbiases


def by_torch(problem):
    """The same by torch's autograd, in float64"""
    params, *inputs, bias = problem.inputs("float64")
    leaves, of_params, of_bias = [*map(oracles.tensor, inputs)], oracles.tensors(params), oracles.tensor(bias)
    y, p, lse = oracles.mha(of_params, *leaves, of_bias, **problem.static())
    flat = tree.flatten(of_params)
    results = [y, p, torch.where(torch.isinf(lse), 0.0, lse)]
    grads = oracles.gradients(results, [*problem.cotangents("float64")], [*leaves, of_bias, *flat.values()])
    *dxs, dbias = grads[:4]
    of_rows = (a.detach().numpy() for a in (y, p, lse))
    return *of_rows, *dxs, dict(zip(flat, grads[4:], strict=True)), dbias


@given(mha_problems(**MODERN | MODERN_MHA | FAIR), st.integers(1, 5), st.sampled_from(LINES))
@example(MhaProblem(T=13, S=17, K=3, G=2, mask="causal", bias="... H T+S-1", sink=True, qk_norm="layer"), 1, (2, 2))
@example(MhaProblem(T=13, S=17, K=1, G=2, qk_norm="rms", rotary="half of some", rate=0.3, seeded=True), 1, (2, 2))
@example(MhaProblem(T=13, S=17, K=2, mask="empty rows", bias="T 1", bias_kv=True), 4, "striped")
@example(MhaProblem(T=13, S=2, K=3, mask="causal", bias_kv=True, zero_attn=True, rate=0.3, seeded=True), 1, (2, 2))
@example(MhaProblem(T=2, S=3, K=2, zero_attn=True, bias="... H T S", sink=True, rate=0.3), 5, "zigzag")
def test_heads_and_tokens_on_many_ranks_match_torch(problem, n, scheme):
    """Ranks without a head or a token among them, and appended keys, which are on all."""
    *got, dparams, dbiases = run(problem, ranks_of(scheme, n), scheme, "float64")
    *want, want_params, want_bias = by_torch(problem)
    names = "y", "weights", "lse", "dquery", "dkey", "dvalue"
    for name, a, b in zip(names, got, want, strict=True):
        close(a, b, name)
    for of_rank, dbias in zip(dparams, dbiases, strict=True):
        close(ranks.values(dbias), want_bias, "dbias")
        for name, a in tree.flatten(of_rank).items():
            close(a, want_params[name], name)


@pytest.mark.parametrize("scheme", ["zigzag", "heads", (2, 2), (3, 1)])
@pytest.mark.parametrize("appended", [False, True])
def test_gradients_of_single_samples_match_one_process(scheme, appended):
    problem = MhaProblem(
        batch=(2, 3), T=5, S=7, K=2, G=2, sink=True, qk_norm="rms", mask="causal", bias_kv=appended, zero_attn=appended
    )
    params, *inputs, bias = problem.inputs("float64")
    dy, dweights, dlse = problem.cotangents("float64")
    _, cache = mha(params, *inputs, bias, **problem.static())
    want, *_ = mha_vjp(cache, dy, dweights=dweights, dlse=dlse, per_sample=True)
    *_, dparams, _ = run(problem, ranks_of(scheme, 2), scheme, "float64", per_sample=True)
    for of_rank in dparams:
        assert list(tree.flatten(of_rank)) == list(tree.flatten(want))
        tree.map(close, of_rank, want)


@pytest.mark.parametrize("scheme", ["zigzag", "heads", (2, 2)])
def test_self_attention_matches_one_process(scheme):
    params = init(0, 12, 4, num_kv_heads=2, sink=True, qk_norm=True, dtype=np.float64)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 11, 12))
    bias, _ = biases.alibi(biases.alibi_slopes(4), T=11, S=11)
    options = {"mask": masks.causal(), "qk_norm": norms.RMSNorm()}

    def table(positions):
        return rotary.table(positions, rotary.frequencies(2))

    y, cache = self_attention(params, x, bias, rotary=table(np.arange(11)), **options)
    dparams, dx, dbias = self_attention_vjp(cache, dy)

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        i = line.positions(11)
        mine = parallel.shard(params, line)
        y, cache = parallel.self_attention(line, mine, x[:, i], bias, rotary=table(i), **options)
        dmine, dx, dbias = parallel.self_attention_vjp(cache, dy[:, i])
        return i, y, dx, parallel.unshard(dmine, line), dbias

    for i, own_y, own_dx, own_dparams, own_dbias in parallel.threads(4).run(of_rank):
        close(own_y, y[:, i])
        close(own_dx, dx[:, i])
        close(own_dbias.values, dbias.values)
        assert list(tree.flatten(own_dparams)) == list(tree.flatten(dparams))
        tree.map(close, own_dparams, dparams)


def test_one_rank_has_the_bits_of_mha():
    problem = MhaProblem(batch=(2,), T=13, S=17, mask="causal", bias="... H T S", sink=True, bias_kv=True)
    params, *inputs, bias = problem.inputs("float32")
    dy, dweights, dlse = problem.cotangents("float32")
    y, cache = mha(params, *inputs, bias, **problem.static())
    want = mha_vjp(cache, dy, dweights=dweights, dlse=dlse)
    *got, dparams, dbiases = run(problem, 1, "heads", "float32")
    told = attention_weights(cache), log_sum_exp(cache)
    for a, b in zip((*got, dbiases[0]), (y, *told, *want[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    tree.map(np.testing.assert_array_equal, dparams[0], want[0])


@pytest.mark.parametrize("scheme", ["zigzag", "heads"])
def test_a_token_that_nobody_attends_has_no_effect(scheme):
    """NaN in a token that neither attends nor is attended, on whichever rank."""
    params, mask = init(0, 8, 2, dtype=np.float64), np.ones((9, 9), bool)
    mask[4], mask[:, 4] = False, False
    x = np.random.default_rng(0).standard_normal((9, 8))
    y, cache = self_attention(params, x, mask=mask)
    want, *_ = self_attention_vjp(cache, y)
    x[4] = np.nan

    def of_rank(comm):
        line = parallel.Line(comm, scheme)
        i = line.positions(9)
        own, cache = parallel.self_attention(line, parallel.shard(params, line), x[i], mask=mask)
        close(own, y[i])
        return parallel.unshard(parallel.self_attention_vjp(cache, y[i])[0], line)

    for dparams in parallel.threads(2).run(of_rank):
        tree.map(close, dparams, want)


# ── trees and arrays ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("u", [1, 2, 3, 5])
def test_what_is_sharded_comes_back(u):
    """Of 3 key/value heads some ranks have none."""
    params = init(0, 12, 6, num_kv_heads=3, sink=True, qk_norm=True)

    def of_rank(comm):
        line = parallel.Line(comm, "heads")
        mine = parallel.shard(params, line)
        return mine["k_proj"]["w"].shape[0], mine["q_proj"]["w"].shape[0], parallel.unshard(mine, line)

    results = parallel.threads(u).run(of_rank)
    assert [kv for kv, _, _ in results] == [len(part) for part in np.array_split(np.arange(3), u)]
    assert [h for _, h, _ in results] == [2 * kv for kv, _, _ in results]
    for _, _, whole in results:
        assert list(tree.flatten(whole)) == list(tree.flatten(params))
        tree.map(np.testing.assert_array_equal, whole, params)


def test_a_sum_over_ranks_is_in_their_order_and_rounded_once():
    rng = np.random.default_rng(0)
    trees = [
        {
            "a": {"w": rng.standard_normal((3, 5))},
            "b": (1e3 * rng.random(7)).astype("float16"),
            "c": rng.random(2, np.float32),
        }
        for _ in range(4)
    ]
    messages = []

    class Counted(parallel.Comm):
        def __init__(self, comm):
            self.comm, self.rank, self.size = comm, comm.rank, comm.size

        def shift(self, sends, receives):
            messages.extend(str(x.dtype) for x, _ in sends if x.dtype.kind == "f" and self.rank == 0)
            return self.comm.shift(sends, receives)

    def of_rank(comm):
        return parallel.all_reduce(parallel.Line(Counted(comm)), trees[comm.rank])

    for got in parallel.threads(4).run(of_rank):
        a, b, c, d = (t["a"]["w"] for t in trees)
        np.testing.assert_array_equal(got["a"]["w"], a + b + c + d)
        half = sum(t["b"].astype("float32") for t in trees[1:]) + trees[0]["b"].astype("float32")
        np.testing.assert_allclose(got["b"].astype("float32"), half, rtol=2.0**-11)
        assert got["b"].dtype == np.float16
        assert got["c"].dtype == np.float32
    assert sorted(messages) == ["float32"] * 12 + ["float64"] * 6  # to each other rank, there and back


@pytest.mark.parametrize("scheme", ["zigzag", "striped", (2, 2)])
@pytest.mark.parametrize("dtype", ["float64", ml_dtypes.bfloat16], ids=str)
def test_an_array_is_scattered_and_gathered(scheme, dtype):
    x = np.random.default_rng(0).standard_normal((2, 11, 3)).astype(dtype)

    def of_rank(comm):
        line = ranks.line_of(scheme)(comm)
        part = parallel.scatter(line, x if comm.rank == 0 else None)
        np.testing.assert_array_equal(part, x[:, line.positions(11)])
        return parallel.gather(line, part)

    first, *others = parallel.threads(4).run(of_rank)
    np.testing.assert_array_equal(first, x)
    assert first.dtype == x.dtype
    assert others == [None] * 3


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────

PARAMS = init(0, 8, 2)
X = np.zeros((6, 8), np.float32)


def unsharded(line, i):
    return parallel.mha(line, PARAMS, X[i], X[i], X[i])


def no_flag(line, i):
    return parallel.self_attention(line, parallel.shard(PARAMS, line), X[i], zero_attn=1)


def other_zero(line, i):
    return parallel.self_attention(line, parallel.shard(PARAMS, line), X[i], zero_attn=line.comm.rank == 1)


def no_position(line, i):
    bias, _ = biases.alibi(np.ones(2, np.float32), T=6, S=6)
    return parallel.self_attention(line, parallel.shard(PARAMS, line), X[i], bias, zero_attn=True)


def other_gradients(line, i):
    y, cache = parallel.self_attention(line, parallel.shard(PARAMS, line), X[i])
    return parallel.self_attention_vjp(cache, y, per_sample=line.comm.rank == 1)


def narrow_weights(line, i):
    y, cache = parallel.self_attention(line, parallel.shard(PARAMS, line), X[i], zero_attn=True)
    return parallel.self_attention_vjp(cache, y, dweights=np.zeros((2, 3, 6), np.float32))


def whole_table(line, i):
    table = rotary.table(np.arange(6, dtype=np.float32), rotary.frequencies(4))
    return parallel.self_attention(line, parallel.shard(PARAMS, line), X[i], rotary=table)


def uneven(line, i):
    params = init(line.comm.rank, 8, 1 if line.comm.rank else 3, head_dim=4)
    return parallel.self_attention(line, params, X[i])


def other_norm(line, i):
    return parallel.self_attention(
        line, parallel.shard(PARAMS, line), X[i], qk_norm=norms.L2Norm(1e-3 * line.comm.rank)
    )


def wrong_cotangent(line, i):
    y, cache = parallel.self_attention(line, parallel.shard(PARAMS, line), X[i])
    return parallel.self_attention_vjp(cache, y[:, 1:] if line.comm.rank else y)


def other_trees(line, i):
    return parallel.all_reduce(line, {"w": np.zeros(3 + line.comm.rank)})


def nothing_to_scatter(line, i):
    return parallel.scatter(line)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (unsharded, "params must be shard.params, line., got on rank 1 the heads of a rank before it"),
        (no_flag, "zero_attn must be True or False, got 1"),
        (other_zero, "zero_attn must be the same on all ranks, got False on rank 0 and True on rank 1"),
        (no_position, "bias must be an array with bias_kv or zero_attn: an appended key has no position"),
        (other_gradients, "per_sample must be the same on all ranks, got False on rank 0 and True on rank 1"),
        (narrow_weights, r"rank 0: dweights must be .* got \(2, 3, 6\)"),
        (whole_table, "rank 0: rotary must have T=3 positions for the queries, got 6"),
        (uneven, r"params must be shard.params, line., H=2 and K=2 of 4 and 4 heads on rank 0, got H=3 and K=3"),
        (other_norm, "qk_norm must be the same on all ranks, got .* on rank 0 and .*0.001.* on rank 1"),
        (wrong_cotangent, "rank 1: dy must be .* got"),
        (other_trees, r"w must be the same on all ranks, got \(3,\) of float64 on rank 0 and \(4,\) .* on rank 1"),
        (nothing_to_scatter, "rank 0: x must be an array, got NoneType"),
    ],
)  # fmt: skip
def test_every_rank_refuses_alike(call, message):
    seen = []

    def of_rank(comm):
        line = parallel.Line(comm, "heads")
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call(line, line.positions(6))
        seen.append(str(error.value))

    parallel.threads(2).run(of_rank)
    assert len(set(seen)) == 1
