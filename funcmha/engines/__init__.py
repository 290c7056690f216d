"""Engines: who computes `attention`, `head`, `mha` and `self_attention`, and the choice among them.

An engine overrides whole functions of the specification, by its protocol and with its results, to rounding. There are
three: SEQUENTIAL is the specification, for any array library, the heads one after another; BATCHED takes all heads and
samples at once, for any array library; TILED takes tiles of the scores, for NumPy arrays, on all cores and in linear
memory. TILED_LEAN is TILED with less of it, BATCHED_HALF is BATCHED with products of half types. The choice is made
here, once for each call; the type of a cache says whose vjp it is for.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import cleandoc
from typing import Any, NamedTuple, Unpack

import numpy as np

from funcmha import ops
from funcmha._arguments import AttentionOptions, HeadOptions, check_names, takes
from funcmha._arrays import Array, described, is_array, namespace
from funcmha.params import Params

from . import batched, grouped, sequential, tiled
from .grouped import Kernel
from .plan import FEW_SCORES, FEW_SHARED_KEYS, LEAN, Plan
from .table import attention_vjp, attention_weights, log_sum_exp

__all__ = [
    "BATCHED",
    "BATCHED_HALF",
    "ENGINES",
    "SEQUENTIAL",
    "TILED",
    "TILED_LEAN",
    "Engine",
    "Plan",
    "attention",
    "attention_vjp",
    "attention_weights",
    "head",
    "head_vjp",
    "heads",
    "log_sum_exp",
    "mha",
    "mha_vjp",
    "outputs",
    "pick",
    "self_attention",
    "self_attention_vjp",
]

Pair = tuple[Callable[..., Any], Callable[..., Any]]


class Engine(NamedTuple):
    name: str
    attention: Pair
    head: Pair
    mha: Pair
    self_attention: Pair
    attend: Callable[..., Any]  # attention of checked and upcast arguments, whose o may alias the cache
    plan: Plan | None = None  # None: there is nothing to plan
    numpy_only: bool = False

    def call(self, op: str) -> Callable[..., Any]:
        """The forward of a pair, with the plan bound"""
        f: Callable[..., Any] = getattr(self, op)[0]
        if self.plan is None:
            return f
        return partial(f, plan=self.plan) if op == "attention" else partial(f, kernel=Kernel(self.attend, self.plan))


SEQUENTIAL = Engine(
    "sequential",
    attention=(ops.attention, ops.attention_vjp),
    head=(sequential.head, sequential.head_vjp),
    mha=(sequential.mha, sequential.mha_vjp),
    self_attention=(sequential.self_attention, sequential.self_attention_vjp),
    attend=lambda *checked: ops.attend(*checked[:-1]),
)
TILED = Engine(
    "tiled",
    attention=(tiled.attention, tiled.attention_vjp),
    head=(grouped.head, grouped.head_vjp),
    mha=(grouped.mha, grouped.mha_vjp),
    self_attention=(grouped.self_attention, grouped.self_attention_vjp),
    attend=tiled.attend,
    plan=Plan(),
    numpy_only=True,
)
BATCHED = TILED._replace(
    name="batched",
    attention=(batched.attention, batched.attention_vjp),
    attend=batched.attend,
    plan=Plan(),
    numpy_only=False,
)
TILED_LEAN = TILED._replace(plan=LEAN)
BATCHED_HALF = BATCHED._replace(plan=Plan(half_products=True))
ENGINES = {engine.name: engine for engine in (SEQUENTIAL, BATCHED, TILED)}


class AttentionCall(AttentionOptions, total=False):
    """The options of `attention`, and who computes it."""

    engine: Engine | str | None


class HeadCall(HeadOptions, total=False):
    """The options of `head`, `mha` and `self_attention`, and who computes it."""

    engine: Engine | str | None


def pick(engine: Engine | str | None, x: Array, H: int, K: int, T: int, S: int) -> Engine:
    """The engine given, or of this name; else the fastest for arrays like x and for these sizes of a sample: for real
    NumPy arrays TILED, or BATCHED where there are few scores; BATCHED for all others
    """
    real = isinstance(x, np.ndarray) and x.dtype.kind != "c"
    if engine is None:
        few = H * T * S <= FEW_SCORES and (H == K or S <= FEW_SHARED_KEYS)
        return TILED if real and not few else BATCHED
    chosen = ENGINES.get(engine) if isinstance(engine, str) else engine
    if not isinstance(chosen, Engine):
        wanted = f"{', '.join(map(repr, ENGINES))}, one of funcmha.engines, or None for the fastest"
        raise TypeError(f"engine must be one of {wanted}, got {engine!r}")
    if chosen.plan is not None:
        chosen.plan.check()
    elif chosen.name != SEQUENTIAL.name:
        raise TypeError(f"engine {chosen.name!r} must have a plan, got None")
    if chosen.numpy_only and not real and is_array(x):
        got = f"{described(x)} of {x.dtype}"
        raise TypeError(f"engine {chosen.name!r} takes real NumPy arrays, got {got}: write engine='batched'")
    return chosen


def pick_for(q: Array, k: Array) -> Engine:
    """The fastest for these queries (..., H, T, D) and keys (..., K, S, D), or both without head axis"""
    return pick(None, q, *_sizes_of(q, k))


def _call(op: str, kind: type, inputs: tuple[Any, ...], tokens: tuple[Any, ...], options: Any) -> tuple[Array, Any]:
    """f(*inputs, **options) of the engine for arrays with so many tokens"""
    check_names(options, kind)
    chosen = pick(options.get("engine"), tokens[0], *_sizes(op, inputs, tokens, options))
    rest = {name: value for name, value in options.items() if name != "engine"}
    result: tuple[Array, Any] = chosen.call(op)(*inputs, **rest)
    return result


def _sizes(op: str, inputs: tuple[Any, ...], tokens: tuple[Any, ...], options: Any) -> tuple[int, int, int, int]:
    """H, K, T and S of arguments that are not checked yet: 1 where they show none"""
    H, K, T, S = _sizes_of(tokens[0], tokens[-1])
    if op == "attention":
        return H, K, T, S
    params = inputs[0] if isinstance(inputs[0], dict) else {}
    S += ("bias_kv" in params) + (options.get("zero_attn") is True)
    H, K = (1, 1) if op == "head" else (_size(_weight(params, name), -3) for name in ("q_proj", "k_proj"))
    return H, K, T, S


def _sizes_of(q: Array, k: Array) -> tuple[int, int, int, int]:
    """H, K, T and S"""
    return _size(q, -3), _size(k, -3), _size(q, -2), _size(k, -2)


def _weight(params: Params, projection: str) -> Any:
    branch = params.get(projection)
    return branch.get("w") if isinstance(branch, dict) else None


def _size(x: Any, axis: int) -> int:
    """Of an axis, counted from the end"""
    shape = getattr(x, "shape", ())
    return int(shape[axis]) if len(shape) >= -axis else 1


def _public(f: Callable[..., Any], kind: type) -> Callable[[Any], Any]:
    """The docstring of the specification, with that of the engine; and a signature that spells out all options"""

    def dress(g: Any) -> Any:
        g.__doc__ = cleandoc(f.__doc__ or "") + _ENGINE  # which Python has done itself from 3.13 on
        return takes(kind)(g)

    return dress


_ENGINE = """

engine     who computes it: "sequential", "batched", "tiled", an `Engine` of `funcmha.engines`, or None for the fastest.
           The results are the same, to rounding
"""


# ── the public functions ─────────────────────────────────────────────────────────────────────────────────────────


@_public(ops.attention, AttentionCall)
def attention(
    q: Array, k: Array, v: Array, bias: Any = None, sink: Array = None, /, **options: Unpack[AttentionCall]
) -> tuple[Array, Any]:
    """`funcmha.ops.attention`, by an engine"""
    return _call("attention", AttentionCall, (q, k, v, bias, sink), (q, k), options)


@_public(sequential.head, HeadCall)
def head(
    params: Params, query: Array, key: Array, value: Array, bias: Any = None, /, **options: Unpack[HeadCall]
) -> tuple[Array, Any]:
    """`funcmha.mha.head`, by an engine"""
    return _call("head", HeadCall, (params, query, key, value, bias), (query, key), options)


def head_vjp(
    cache: Any, do: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """`funcmha.mha.head_vjp`, by the engine that the cache is from"""
    return _vjp("head", cache, do, dweights=dweights, dlse=dlse, per_sample=per_sample)


@_public(sequential.mha, HeadCall)
def mha(
    params: Params, query: Array, key: Array, value: Array, bias: Any = None, /, **options: Unpack[HeadCall]
) -> tuple[Array, Any]:
    """`funcmha.mha.mha`, by an engine"""
    return _call("mha", HeadCall, (params, query, key, value, bias), (query, key), options)


def mha_vjp(
    cache: Any, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """`funcmha.mha.mha_vjp`, by the engine that the cache is from"""
    return _vjp("mha", cache, dy, dweights=dweights, dlse=dlse, per_sample=per_sample)


@_public(sequential.self_attention, HeadCall)
def self_attention(params: Params, x: Array, bias: Any = None, /, **options: Unpack[HeadCall]) -> tuple[Array, Any]:
    """`funcmha.mha.self_attention`, by an engine"""
    return _call("self_attention", HeadCall, (params, x, bias), (x,), options)


def self_attention_vjp(
    cache: Any, dy: Array, /, *, dweights: Array = None, dlse: Array = None, per_sample: bool = False
) -> tuple[Any, ...]:
    """`funcmha.mha.self_attention_vjp`, by the engine that the cache is from"""
    return _vjp("self_attention", cache, dy, dweights=dweights, dlse=dlse, per_sample=per_sample)


for _own in (head_vjp, mha_vjp, self_attention_vjp):
    _own.__doc__ = getattr(sequential, _own.__name__).__doc__


# ── caches ───────────────────────────────────────────────────────────────────────────────────────────────────────

VJPS: dict[str, dict[type, Callable[..., Any]]] = {
    "head": {sequential.HeadCache: sequential.head_vjp, grouped.HeadCache: grouped.head_vjp},
    "mha": {sequential.MhaCache: sequential.mha_vjp, grouped.MhaCache: grouped.mha_vjp},
    "self_attention": {
        sequential.SelfAttentionCache: sequential.self_attention_vjp,
        grouped.SelfAttentionCache: grouped.self_attention_vjp,
    },
}


def check_cache(cache: Any, op: str) -> None:
    """Raise TypeError unless the cache is that of `op`, by any engine."""
    if type(cache) not in VJPS[op]:
        instead = ", which has it second: pass that" if type(cache) is tuple and len(cache) == 2 else ""
        raise TypeError(f"cache must come from {op}, got {type(cache).__name__}{instead}")


def _vjp(op: str, cache: Any, dy: Array, **cotangents: Any) -> tuple[Any, ...]:
    check_cache(cache, op)
    grads: tuple[Any, ...] = VJPS[op][type(cache)](cache, dy, **cotangents)
    return grads


def heads(cache: Any, /) -> Iterator[sequential.HeadCache]:
    """The `HeadCache` of each head, from the first to the last, from the cache of `mha`, `self_attention` or `head`

    Every field is filled: arrays are views, or recomputed where the engine dropped them. `attention` is the engine's
    own cache, of one head with an axis for it. `head_vjp` takes each.
    """
    if isinstance(cache, grouped.HeadCache | grouped.MhaCache | grouped.SelfAttentionCache):
        return grouped.heads(cache)
    if isinstance(cache, sequential.HeadCache):
        return iter((cache,))
    if isinstance(cache, sequential.SelfAttentionCache):
        cache = cache.mha
    if isinstance(cache, sequential.MhaCache):
        return iter(cache.heads)
    raise TypeError(f"cache must come from mha, self_attention or head, got {type(cache).__name__}")


def outputs(cache: Any, /) -> Iterator[ops.LinearCache]:
    """The cache of the output projection of each head, from the cache of `mha`; the bias goes with the first"""
    check_cache(cache, "mha")
    if isinstance(cache, sequential.MhaCache):
        yield from cache.out
        return
    for start, out in enumerate(cache.out):
        for i in range(out.o.shape[-2]):
            first = start == i == 0
            yield ops.LinearCache(out.o[..., i, :], out.w[:, i, :], out.b if first else None)


def _of_one_head(read: Callable[..., Array], rank: int) -> Callable[[Any], Array]:
    return lambda cache: read(next(heads(cache)).attention)[(..., 0, *(slice(None),) * rank)]


def _of_all_heads(read: Callable[..., Array], rank: int) -> Callable[[Any], Array]:
    def joined(cache: Any) -> Array:
        parts = [read(one.attention) for one in heads(cache)]
        return namespace(parts[0]).concat(parts, axis=-1 - rank)

    return joined


for _read, _rank in ((attention_weights, 2), (log_sum_exp, 1)):
    for _kind in VJPS["head"]:
        _read.register(_kind, _of_one_head(_read, _rank))
    for _kind in (*VJPS["mha"], *VJPS["self_attention"]):
        _read.register(_kind, _of_all_heads(_read, _rank))
