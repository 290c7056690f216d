"""`flash_attn_func`: batches of sequences of equal lengths, and the options and checks that all calls share.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, D query/key width, E value width, R listed keys;
`...` is batch, or nothing for one sequence.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

import numpy as np

from funcmha import _check, masks
from funcmha._arrays import Array, downcast, heads_first, heads_last, namespace, outline, upcast
from funcmha.biases import AlibiCache, alibi, alibi_vjp
from funcmha.dropout import Masked, Seeded
from funcmha.engines import attention, attention_vjp
from funcmha.masks import Mask

# ── the options of the scores ────────────────────────────────────────────────────────────────────────────────────


class ScoreOptions(TypedDict, total=False):
    """What every call takes, with the defaults of `score_options`."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None]
    attention_chunk: int
    softcap: float


class Scores(NamedTuple):
    """The options of the scores, checked and in funcmha's conventions."""

    scale: float | None
    left: int | None  # None is no bound
    right: int | None  # 0 where causal
    chunk: int  # 0 is none
    softcap: float | None

    @property
    def positional(self) -> bool:
        """Whether the position of a query matters."""
        return (self.left, self.right, self.chunk) != (None, None, 0)

    def mask(self, T: int, S: int, listed: np.ndarray | None = None) -> Mask | None:
        """Query i is at key position i + S − T; before the first key it is in a chunk without keys."""
        parts: list[Any] = [] if listed is None else [_listed_mask(listed, S)]
        if (self.left, self.right) != (None, None):
            parts.append(masks.window(self.left, self.right, S - T))
        if self.chunk:
            parts.append(masks.segments((np.arange(T) + S - T) // self.chunk, np.arange(S) // self.chunk))
        return masks.intersection(*parts)


def score_options(
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> Scores:
    """The options of the scores, checked."""
    _check.flag("causal", causal)
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (_bound(x) for x in window_size)
    chunk = _check.integer("attention_chunk", attention_chunk, 0)
    scale = None if softmax_scale is None else _check.number("softmax_scale", softmax_scale)
    softcap = _check.number("softcap", softcap, 0.0)
    return Scores(scale, left, 0 if causal else right, chunk, softcap if softcap > 0 else None)


F = TypeVar("F", bound=Callable[..., Any])


def takes_options_of(g: Callable[..., Any]) -> Callable[[F], F]:
    """Spell out in the signature of f, for `help`, what it takes as `**options`: the keywords of g."""

    def spell_out(f: F) -> F:
        signature = inspect.signature(f)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [p for p in inspect.signature(g).parameters.values() if p.kind is p.KEYWORD_ONLY]
        f.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return f

    return spell_out


def _bound(x: Any) -> int | None:
    """No bound is -1 in FA2 and FA3, None in FA4."""
    bound = -1 if x is None else _check.integer("window_size", x, -1, or_else=", where -1 is no bound")
    return None if bound == -1 else bound


def _listed_mask(listed: np.ndarray, S: int) -> np.ndarray:
    """(..., T, R)   →   (..., 1, T, S), True where the key is in the list; numbers that are no key are left out"""
    mask = np.zeros((*listed.shape[:-1], S + 1), bool)
    np.put_along_axis(mask, np.where((listed < 0) | (listed >= S), S, listed), True, axis=-1)
    return mask[..., None, :, :S]


# ── flash_attn_func ──────────────────────────────────────────────────────────────────────────────────────────────


class FlashAttnFuncCache(NamedTuple):
    alibi_slopes: Array  # (H,) or (..., H), or None
    learnable_sink: Array  # (H,) or None
    alibi: AlibiCache | None
    attention: Any  # of an engine: heads before tokens, and rows [q, qv] and [k, v] where there is a qv
    out: Array  # (..., T, H, E, 0): only the shape, and the dtype that is computed in
    width: int | None  # D where there is a qv


@takes_options_of(score_options)
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array = None,
    learnable_sink: Array = None,
    qv: Array = None,
    /,
    *,
    gather_kv_indices: np.ndarray | None = None,
    dropout_p: float = 0.0,
    keep: Array | Seeded = None,
    **options: Unpack[ScoreOptions],
) -> tuple[Array, FlashAttnFuncCache]:
    """out = dropout(softmax(softcap · tanh(softmax_scale · u / softcap) − alibi_slopes |i + S − T − j|, sink)) v
    where u = q kᵀ + qv vᵀ
    q (B, T, H, D)   k (B, S, K, D)   v (B, S, K, E)   qv (B, T, H, E)   →   out (B, T, H, E)

    alibi_slopes       (H,) or (B, H), differentiable. FA2's
    learnable_sink     (H,): a logit of the denominator and of lse. FA4's
    qv                 0 unless given. FA3's and FA4's
    gather_kv_indices  (B, T, R): each query attends to these keys only; a number outside 0 … S − 1, as -1, is no key,
                       and a key that is listed twice counts once. Masks apply as well. FA4's
    dropout_p          with `keep`, which FA2 draws itself: boolean, True = keep, broadcasts to (B, H, T, S); or a
                       `Seeded` of `funcmha.dropout`, which has a rate of its own. FA2's
    softmax_scale      D ** -0.5 unless given, with qv (D + E) ** -0.5
    causal             j ≤ i + S − T: the last query is aligned with the last key. A window applies as well
    window_size        i + S − T − left ≤ j ≤ i + S − T + right, inclusive; -1 (FA2, FA3) and None (FA4) are no bound
    attention_chunk    keys in a chunk: query i attends to chunk ⌊(i + S − T) / attention_chunk⌋ only; 0 is none. FA3's
    softcap            0.0 is none

    A fully masked row has out 0, and lse −∞ or the sink. `log_sum_exp(cache)` is (B, H, T). Raises TypeError and
    ValueError, under these names.
    """
    scores, axes = score_options(**options), _check.Axes()
    check_tokens(axes, {"q": (q, "B T H D"), "k": (k, "B S K D"), "v": (v, "B S K E"), "qv": (qv, "B T H E")})
    listed = check_listed(axes, gather_kv_indices, "B T")
    check_per_head(axes, q, alibi_slopes, learnable_sink)
    inputs, dropout = (q, k, v, alibi_slopes, learnable_sink, qv), check_dropout(axes, keep, dropout_p)
    out, cache = attend(*inputs, scores=scores, listed=listed, dropout=dropout)
    return downcast(out, q.dtype), cache


def flash_attn_func_vjp(
    cache: FlashAttnFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dalibi_slopes, dlearnable_sink, dqv: `flash_attn_func` from the bottom up
    from the cotangents of out and, where given, of the weights (B, H, T, S) and lse (B, H, T)
    """
    _check.cache(cache, FlashAttnFuncCache, "flash_attn_func")
    _check.cotangent("dout", dout, cache.out.shape[:-1], cache.out, "B T H E")
    dq, dk, dv, dslopes, dsink, dqv = attend_vjp(cache, upcast(dout), dweights=dweights, dlse=dlse)
    dq, dk, dv, dqv = (downcast(dx, dout.dtype) for dx in (dq, dk, dv, dqv))
    return dq, dk, dv, rounded(dslopes, cache.alibi_slopes), rounded(dsink, cache.learnable_sink), dqv


def attend(
    q: Array, k: Array, v: Array, slopes: Array, sink: Array, qv: Array, /, *, scores: Scores, listed: Any, dropout: Any
) -> tuple[Array, FlashAttnFuncCache]:
    """out = attention([q, qv], [k, v], v, −slopes |i + S − T − j|, sink), unchecked and not yet rounded
    q (..., T, H, D)   k (..., S, K, D)   v (..., S, K, E)   slopes (H,) or (..., H)   sink (H,)   qv (..., T, H, E)
      →   out (..., T, H, E)

    q · k + qv · v is one product of rows of D + E, which is also the width of the scale.
    """
    T, S, D = q.shape[-3], k.shape[-3], None if qv is None else q.shape[-1]
    bias, of_slopes = (None, None) if slopes is None else alibi(upcast(slopes), T=T, S=S, offset=S - T)
    rows, keys, values = (heads_first(upcast(x)) for x in (q, k, v))
    if qv is not None:
        xp = namespace(rows)
        rows, keys = xp.concat([rows, heads_first(upcast(qv))], axis=-1), xp.concat([keys, values], axis=-1)
    mask, scale, softcap = scores.mask(T, S, listed), scores.scale, scores.softcap
    inputs = rows, keys, values, bias, upcast(sink)
    o, cache = attention(*inputs, mask=mask, scale=scale, softcap=softcap, dropout=dropout)
    out = heads_last(o)
    return out, FlashAttnFuncCache(slopes, sink, of_slopes, cache, outline(out), D)


def attend_vjp(
    cache: FlashAttnFuncCache, dout: Array, /, *, dweights: Array = None, dlse: Array = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dq, dk, dv, dslopes, dsink, dqv: `attend` from the bottom up; dv is the sum over both uses of v"""
    D, dslopes, dqv = cache.width, None, None
    dq, dk, dv, dbias, dsink = attention_vjp(cache.attention, heads_first(dout), dweights=dweights, dlse=dlse)
    if D is not None:
        dk, dv = dk[..., :D], dv + dk[..., D:]
        dq, dqv = dq[..., :D], heads_last(dq[..., D:])
    if cache.alibi is not None:
        (dslopes,) = alibi_vjp(cache.alibi, dbias)
    return heads_last(dq), heads_last(dk), heads_last(dv), dslopes, dsink, dqv


def rounded(dx: Array, x: Array) -> Array:
    """The gradient of slopes or of a sink, which have a dtype of their own."""
    return None if x is None else downcast(dx, x.dtype)


# ── argument checks ──────────────────────────────────────────────────────────────────────────────────────────────


def check_tokens(axes: _check.Axes, arrays: dict[str, tuple[Array, str]], *optional: str) -> None:
    """One dtype, these shapes, and H a multiple of K; qv and those of `optional` may be None."""
    given = {name: x for name, x in arrays.items() if x[0] is not None or name not in ("qv", *optional)}
    _check.one_dtype((name, x) for name, (x, _) in given.items())
    for name, (x, symbols) in given.items():
        axes(name, x, symbols)
    _check.multiple(axes.owner["H"], axes["H"], axes.owner["K"], axes["K"])


def check_per_head(axes: _check.Axes, q: Array, alibi_slopes: Any, learnable_sink: Any) -> None:
    """Slopes (H,) or (B, H) and a sink (H,), in the dtype of q or in float32 with half types, as in FA2."""
    own = "B H" if getattr(alibi_slopes, "ndim", 1) == 2 else "H"
    for name, x, symbols in (("alibi_slopes", alibi_slopes, own), ("learnable_sink", learnable_sink, "H")):
        if x is None:
            continue
        _check.one_dtype([(name, x)])
        _check.one_library(name, x, "q", q)
        axes(name, x, symbols)
        wanted = upcast(outline(q)).dtype
        if upcast(x).dtype != wanted:
            raise TypeError(f"{name} must have dtype {wanted}, in which q is computed, got {x.dtype}: cast it")


def check_listed(axes: _check.Axes, gather_kv_indices: Any, symbols: str) -> np.ndarray | None:
    """(B, T, R) or (N, R) as int64: any number of keys, and any number that is no key."""
    if gather_kv_indices is None:
        return None
    listed = _check.integers("gather_kv_indices", gather_kv_indices)
    axes("gather_kv_indices", listed, f"{symbols} R")
    return listed


def check_dropout(axes: _check.Axes, keep: Any, dropout_p: Any) -> Masked | Seeded | None:
    """A mask with its probability, a seed, which has its own, or neither."""
    p = _check.number("dropout_p", dropout_p, 0.0, 1.0)
    if isinstance(keep, Seeded):
        if p not in (0.0, keep.rate):
            raise ValueError(f"dropout_p must be left out, as keep has rate={keep.rate}, got {p}")
        return keep
    _check.boolean("keep", keep, "True = keep")
    axes.broadcast("keep", _check.shape_of(keep), "B H T S")
    if keep is None and p > 0:
        raise ValueError(f"keep must be given with dropout_p={p}, as dropout takes its mask as an input, got None")
    if keep is not None and p == 0:
        raise ValueError("dropout_p must be given with keep, as what is kept is divided by 1 − dropout_p, got 0")
    return None if keep is None else Masked(keep, p)
