"""Multi-head attention of tokens, and of heads, that are on many ranks.

A rank has a part of the tokens, and in `params` those of its heads (`shard`). Ranks that have a part of the heads each
gather the tokens that they share, attend, and each gets the sum over all heads of its own tokens (as in Megatron-LM's
sequence parallelism: Korthikanti et al. 2022). Between those groups keys and values go round.

    gather tokens → project → normalise and rotate → ring attention → output projection → sum over heads, scattered

Every rank has the keys that `bias_kv` and `zero_attn` append, of its heads: they go nowhere.

Axes: T queries and S keys of this rank, H query heads and K key/value heads of this rank, D query/key width, E value
width, O output width, Cq Ck Cv input widths, A appended keys; `...` is batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

from funcmha import _check, tree
from funcmha import engines as one_process
from funcmha._arguments import Bias, HeadOptions, Options, takes
from funcmha._arrays import (
    Array,
    downcast,
    full,
    heads_first,
    heads_last,
    quiet_underflow,
    sum_over_batch,
    upcast,
)
from funcmha.biases import as_bias
from funcmha.engines import Plan, attention_weights, log_sum_exp
from funcmha.engines.grouped import Position, append_rows, append_rows_vjp, positioned, positioned_vjp
from funcmha.engines.projections import CombineCache, ProjectCache, combine, combine_vjp, project, project_vjp
from funcmha.mha import round_gradients
from funcmha.params import Params, drop_absent, in_order_of, leaf

from . import ring
from .agreement import Facts, agree
from .attention import check_line, facts_of
from .heads import gather_heads, gather_tokens, of_all_heads
from .line import Line
from .mha_checks import agreed
from .tokens import gathered, gathered_inputs, gathered_table, scattered, zeroed
from .trees import heads_axis, total

PLAN = Plan()


class Projected(NamedTuple):
    project: ProjectCache
    position: Position
    before: Array  # (..., T, H, D), what is normalised, or None


class Heads(NamedTuple):
    """What the gradient of this rank's heads needs."""

    q: Projected
    k: Projected
    v: Projected
    attention: Any  # the cache of the ring
    out: CombineCache
    bias_kv: Params  # k (K, D) and v (K, E), or {}


class MhaCache(NamedTuple):
    params: Params  # of this rank's heads
    heads: Heads | None  # None on a rank without
    bias: Bias  # of all heads and tokens, broadcasts to (..., all H, all T, all S), or None
    query: Array  # (..., T, Cq, 0), of the inputs of this rank nothing but their shape, as are key and value
    key: Array
    value: Array
    T: int  # of all ranks
    S: int
    A: int
    H: int  # of all ranks
    K: int
    line: Line

    @property
    def h(self) -> slice:
        """Which of all query heads this rank has"""
        return self.line.layout.query_heads(self.H, self.K, self.line.comm.rank)


@takes(HeadOptions)
@quiet_underflow
def mha(
    line: Line, params: Params, query: Array, key: Array, value: Array, bias: Any = None, /,
    **options: Unpack[HeadOptions],
) -> tuple[Array, Any]:  # fmt: skip
    """y = Σₕ head(paramsₕ, query, key, value, biasₕ) woₕᵀ + bo     over the heads and keys of all ranks
    query (..., T, Cq)   key (..., S, Ck)   value (..., S, Cv)   →   y (..., T, O)     of this rank's tokens

    query, key and value are this rank's part, x[..., line.positions(n), :] of what one process would have; `params` is
    `shard(params, line)`; tables of `rotary` are those of `line.positions(n)`. Everything else is of all tokens and
    heads, and the same on every rank. Options are those of `funcmha.mha`.

    On one rank the bits are those of `funcmha.mha`. Raises as `parallel.attention` does, on every rank. Parameters are
    compared by their shapes alone. `log_sum_exp(cache)` (..., all H, T) and `attention_weights(cache)` (..., all H, T,
    all S + A) are of this rank's tokens; all ranks ask for them.
    """
    T, S, H, K, x = agreed(line, params, query, key, value, bias, options)
    if line.comm.size == 1:
        whole: tuple[Array, Any] = one_process.mha(params, query, key, value, bias, **options)
        return whole
    dtype, outline = query.dtype, [_outline(a) for a in (query, key, value)]
    params, given = tree.map(upcast, params), as_bias(bias)
    wide = None if given is None else given.map(upcast)
    A, h = ("bias_kv" in params) + x.zero_attn, line.layout.query_heads(H, K, line.comm.rank)
    inputs = gathered_inputs(line, zeroed(line, query, key, value, x, T, S, bool(A)), T, S)
    tables = tuple(gathered_table(line, table, n) for table, n in zip(x.rotary, (T, S), strict=True))
    y, heads = _no_heads(inputs[0], params), None
    if h.stop > h.start:
        own = None if wide is None else wide.heads(h)
        y, heads = _attend(line, params, inputs, own, x.heads(h)._replace(rotary=tables), T, S)
    y, b = scattered(line, y, T), leaf(params, "out_proj.b")
    y = y if b is None else y + b
    query, key, value = outline
    return downcast(y, dtype), MhaCache(params, heads, wide, query, key, value, T, S, A, H, K, line)


def mha_vjp(
    cache: Any, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dquery, dkey, dvalue, dbias: `mha` from the bottom up, on all ranks together
    from the cotangents of y and, where given, of the weights (..., all H, T, all S + A) and lse (..., all H, T),
    of this rank's tokens

    dquery, dkey and dvalue are of this rank's tokens, dparams of its heads and all tokens, dbias of all.

    per_sample   each leaf of dparams with the batch before it, as in `funcmha.mha_vjp`
    """
    if not isinstance(cache, MhaCache):
        return one_process.mha_vjp(cache, dy, dweights=dweights, dlse=dlse, per_sample=per_sample)
    dparams, dxs, dbias = _mha_vjp(cache, dy, dweights, dlse, per_sample)
    lengths = cache.T, cache.S, cache.S
    dxs = tuple(scattered(cache.line, dx, n) for dx, n in zip(dxs, lengths, strict=True))
    return round_gradients((dparams, *dxs, dbias), dy.dtype)


@quiet_underflow
def _mha_vjp(
    cache: MhaCache, dy: Array, dweights: Array, dlse: Array, per_sample: bool
) -> tuple[Params, tuple[Array, ...], Bias]:
    """dparams; dquery, dkey and dvalue of all tokens of its part of the ring, from its heads alone; dbias"""
    line, params, T, K = cache.line, cache.params, cache.T, cache.K
    _agree_on_cotangents(cache, dy, dweights, dlse, per_sample)
    g, batch = upcast(dy), tuple(dy.shape[:-2]) if per_sample else ()
    dparams: Params = tree.map(lambda a: full((*batch, *a.shape), 0.0, a), params)
    if "b" in params["out_proj"]:
        dparams["out_proj"]["b"] = sum_over_batch(g, 1, len(batch))
    dweights = gather_tokens(line, upcast(dweights), K, T)
    dlse = None if dlse is None else gather_tokens(line, upcast(dlse)[..., None], K, T)[..., 0]
    g, dbias = gathered(line, g, T), None
    if cache.heads is None:
        inputs = (cache.query, cache.T), (cache.key, cache.S), (cache.value, cache.S)
        dxs = tuple(_zeros_of(line, outline, n) for outline, n in inputs)
    else:
        dheads, dxs, dbias = _attend_vjp(cache.heads, g, dweights, dlse, len(batch))
        dparams = {name: branch | dheads.get(name, {}) for name, branch in dparams.items()}
    if cache.bias is not None:
        own = full(tuple(cache.bias.heads(cache.h).values.shape), 0.0, g) if dbias is None else dbias.values
        whole = of_all_heads(line, own, cache.bias.values, cache.bias.rank, cache.h)
        dbias = cache.bias._replace(values=whole)
    return in_order_of(params, _reduced(line, dparams)), dxs, dbias


def _attend(
    line: Line, params: Params, inputs: tuple[Array, ...], bias: Bias, x: Options, T: int, S: int
) -> tuple[Array, Heads]:
    """y (..., T of its part of the ring, O) of this rank's heads, without the bias of the output"""
    q, of_q = _projected(params, "q", inputs[0], x.qk_norm, x.rotary[0])
    k, of_k = _projected(params, "k", inputs[1], x.qk_norm, x.rotary[1])
    v, of_v = _projected(params, "v", inputs[2], None, None)
    rows, appended = params.get("bias_kv", {}), ()
    if rows or x.zero_attn:
        appended = tuple(
            heads_first(append_rows(heads_last(a[..., :0, :]), rows.get(name), x.zero_attn))
            for a, name in ((k, "k"), (v, "v"))
        )
    x = x._replace(rotary=(None, None), qk_norm=None)
    problem = ring.Problem(q, k, v, bias, leaf(params, "sink.w"), x, T, S, appended)
    o, cache = ring.attend(line.ring, line.layout, problem)
    y, out = combine({"w": leaf(params, "out_proj.w")}, heads_last(o), plan=PLAN)
    return y, Heads(of_q, of_k, of_v, cache, out, rows)


def _attend_vjp(
    heads: Heads, dy: Array, dweights: Array, dlse: Array, batch_axes: int
) -> tuple[Params, tuple[Array, ...], Bias]:
    """dparams, dquery, dkey and dvalue, dbias: `_attend` from the bottom up"""
    dout, do = combine_vjp(heads.out, dy, batch_axes=batch_axes, plan=PLAN)
    dq, dk, dv, dbias, dsink, dappended = ring.attend_vjp(
        heads.attention, heads_first(do), dweights=dweights, dlse=dlse, batch_axes=batch_axes
    )
    drows = {
        name: append_rows_vjp(0, heads.bias_kv.get(name), heads_last(a), batch_axes)[1]
        for name, a in zip("kv", dappended, strict=False)  # none, where nothing is appended
    }
    (dv_proj, dvalue, _), (dk_proj, dkey, dk_norm), (dq_proj, dquery, dq_norm) = (
        _projected_vjp(heads.v, heads_last(dv), batch_axes),
        _projected_vjp(heads.k, heads_last(dk), batch_axes),
        _projected_vjp(heads.q, heads_last(dq), batch_axes),
    )
    dparams = {"q_proj": dq_proj, "k_proj": dk_proj, "v_proj": dv_proj, "out_proj": dout, "bias_kv": drows}
    dparams |= {"sink": {"w": dsink}, "q_norm": dq_norm, "k_norm": dk_norm}
    return drop_absent(dparams), (dquery, dkey, dvalue), dbias


def _agree_on_cotangents(cache: MhaCache, dy: Array, dweights: Array, dlse: Array, per_sample: bool) -> None:
    """Raise on all ranks unless the cotangents fit on all."""
    rows, like = tuple(cache.query.shape[:-2]), leaf(cache.params, "out_proj.w")
    of_heads = (*rows[:-1], cache.H, rows[-1])

    def local() -> tuple[Facts, tuple[int, ...]]:
        _check.flag("per_sample", per_sample)
        _check.cotangent("dy", dy, (*rows, like.shape[0]), like, "... T O")
        _check.cotangent("dweights", dweights, (*of_heads, cache.S + cache.A), like, "... H T S'", optional=True)
        _check.cotangent("dlse", dlse, of_heads, like, "... H T", optional=True)
        return facts_of(dy=dy, dweights=dweights, dlse=dlse) | {"per_sample": str(per_sample)}, ()

    agree(cache.line.comm, local)


# ── what the cache can tell ──────────────────────────────────────────────────────────────────────────────────────


@log_sum_exp.register
def _(cache: MhaCache, /) -> Array:
    return _of_all_heads(cache, lambda of_ring: ring.log_sum_exp(of_ring)[..., None], 1)[..., 0]


@attention_weights.register
def _(cache: MhaCache, /) -> Array:
    return _of_all_heads(cache, ring.attention_weights, cache.S + cache.A)


def _of_all_heads(cache: MhaCache, read: Callable[[Any], Array], width: int) -> Array:
    """Of all heads and this rank's tokens (..., all H, T, width), from what each rank reads of its heads"""
    line, (*batch, _, _, _) = cache.line, cache.query.shape
    if cache.heads is None:
        own = full((*batch, 0, line.layout.ring_count(cache.T, line.ring.rank), width), 0.0, cache.query)
    else:
        own = read(cache.heads.attention)
    return gather_heads(line, own, cache.H, cache.K, cache.T)


# ── self-attention ───────────────────────────────────────────────────────────────────────────────────────────────


class SelfAttentionCache(NamedTuple):
    mha: MhaCache


for _read in (log_sum_exp, attention_weights):
    _read.register(SelfAttentionCache, lambda cache, read=_read: read(cache.mha))


@takes(HeadOptions)
def self_attention(
    line: Line, params: Params, x: Array, bias: Any = None, /, **options: Unpack[HeadOptions]
) -> tuple[Array, Any]:
    """y = mha(line, params, x, x, x, bias)      x (..., T, C)   →   y (..., T, O)     of this rank's tokens

    Takes the options of `parallel.mha`, and raises what it raises.
    """
    check_line(line)
    if line.comm.size == 1:
        whole: tuple[Array, Any] = one_process.self_attention(params, x, bias, **options)
        return whole
    y, cache = mha(line, params, x, x, x, bias, **options)
    return y, SelfAttentionCache(cache)


def self_attention_vjp(
    cache: Any, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """dparams, dx, dbias      dx = dquery + dkey + dvalue; the rest as in `parallel.mha_vjp`"""
    if not isinstance(cache, SelfAttentionCache):
        return one_process.self_attention_vjp(cache, dy, dweights=dweights, dlse=dlse, per_sample=per_sample)
    dparams, dxs, dbias = _mha_vjp(cache.mha, dy, dweights, dlse, per_sample)
    dx = scattered(cache.mha.line, sum(dxs[1:], dxs[0]), cache.mha.T)
    return round_gradients((dparams, dx, dbias), dy.dtype)


# ── the parts of it ──────────────────────────────────────────────────────────────────────────────────────────────


def _projected(params: Params, name: str, x: Array, norm: Any, table: Any) -> tuple[Array, Projected]:
    """q, k or v (..., H, T, D)"""
    before, cache = project(params[f"{name}_proj"], x, plan=PLAN)
    y, position = positioned(before, params.get(f"{name}_norm", {}), norm, table)
    return heads_first(y), Projected(cache, position, None if norm is None else before)


def _projected_vjp(p: Projected, dy: Array, batch_axes: int) -> tuple[Params, Array, Params]:
    """dparams, dx, dparams of the norm     of dy (..., T, H, D)"""
    dy, dnorm = positioned_vjp(p.position, p.before, dy, batch_axes)
    dparams, dx = project_vjp(p.project, dy, batch_axes=batch_axes, plan=PLAN)
    return dparams, dx, dnorm


def _reduced(line: Line, dparams: Params) -> Params:
    """The sums over the ranks that have the same heads; of leaves without heads, over all ranks"""
    leaves = tree.flatten(dparams)
    of_heads = {name: a for name, a in leaves.items() if heads_axis(name) is not None}
    of_all = {name: a for name, a in leaves.items() if name not in of_heads}
    sums = total(line.ring, of_heads) | (total(line.comm, of_all) if of_all else {})
    return tree.unflatten({name: sums[name] for name in leaves})


def _outline(x: Array) -> Array:
    return full((*x.shape, 0), 0.0, upcast(x[..., :0, :]))


def _no_heads(x: Array, params: Params) -> Array:
    """The output of a rank without heads (..., T of its part of the ring, O)"""
    return full((*x.shape[:-1], leaf(params, "out_proj.w").shape[0]), 0.0, x)


def _zeros_of(line: Line, outline: Array, n: int) -> Array:
    """And its gradient of an input"""
    *batch, _, C, _ = outline.shape
    return full((*batch, line.layout.ring_count(n, line.ring.rank), C), 0.0, outline)
