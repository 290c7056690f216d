"""The door of `head`, `mha` and a step of them: what is said beside the parameters, checked before any arithmetic.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, D query/key width, Cq Ck Cv
input widths; `...` is batch.
"""

from typing import Any

from . import _check
from ._bias import as_head
from ._doors import blank_keys, check_bias, check_dropout, check_mask, check_per_head, values_of
from ._xp import Array, namespace, widen
from .biases import RelativeBias
from .dropout import Masked
from .engines import pick
from .heads import Options
from .masks import Dense, Mask, as_mask
from .norms import Norm
from .rotary import HalfPairs, InterleavedPairs, check_table


def check_inputs(
    axes: _check.Axes, leaves: dict[str, Array], query: Array, key: Array, value: Array, bias: Any, given: Options
) -> Options:
    """The door of `head` and `mha`."""
    inputs = [("query", query), ("key", key), ("value", value)]
    _check.one_dtype([*leaves.items(), *inputs], optional=[("bias", values_of(bias))])
    axes("query", query, "... T Cq")
    axes("key", key, "... S Ck")
    axes("value", value, "... S Cv")
    return check_options(axes, leaves, query, bias, given)


def check_options(axes: _check.Axes, leaves: dict[str, Array], like: Array, bias: Any, given: Options) -> Options:
    """What is said beside the inputs, whose sizes `axes` knows, for arrays like `like`."""
    mask, scale, softcap, zero_attn, qk_norm, rotary, dropout, engine = given
    one_head = "H" not in axes.size
    lead = "... " if one_head else "... H "
    check_bias(axes, bias, lead + "T S")
    if one_head and isinstance(mask, Mask):
        axes.size["1"] = 1
        mask = check_mask(axes, mask, "... 1 T S")
    else:
        mask = check_mask(axes, mask, lead + "T S")
        mask = as_mask(as_head(mask.array)) if one_head and isinstance(mask, Dense) else mask
    _check.flag("zero_attn", zero_attn)
    extra = ("bias_kv.k" in leaves) + zero_attn
    if extra and isinstance(bias, RelativeBias):
        raise ValueError("bias must be an array with bias_kv or zero_attn: an appended key has no position")
    axes.size["S'"] = axes["S"] + extra
    check_dropout(axes, dropout, lead + "T S'")
    if one_head and isinstance(dropout, Masked):
        dropout = dropout._replace(keep=as_head(dropout.keep))
    scale, softcap = check_per_head(axes, "scale", scale), check_per_head(axes, "softcap", softcap, positive=True)
    check_norm(qk_norm, leaves)
    engine = pick(engine, like, max(axes["T"], axes["S'"]))
    return Options(mask, scale, softcap, zero_attn, qk_norm, _check_rotary(axes, rotary), dropout, engine)


def visible(query: Array, key: Array, value: Array, mask: Mask | None, appended: bool) -> tuple[Array, Array, Array]:
    """The inputs, wide, with 0 at queries that see no key in any head, and at keys that no query sees

    A NaN there would reach Σ dq xᵀ and Σ dk xᵀ as 0 · NaN. Where all three are one array they stay one, as the gradient
    of `self_attention` takes it: with 0 at tokens that neither see nor are seen. What is appended every query sees.
    """
    if mask is None:
        return widen(query), widen(key), widen(value)
    T, S, xp = query.shape[-2], key.shape[-2], namespace(query)
    seen, seeing = (
        mask.attended_keys(T, S, query),
        None if appended else xp.matrix_transpose(mask.attending_queries(T, S, query)),
    )
    if query is key and key is value:
        x = _blank(widen(query), None if seeing is None else seen | seeing)
        return x, x, x
    return _blank(widen(query), seeing), _blank(widen(key), seen), _blank(widen(value), seen)


def _blank(x: Array, some: Array) -> Array:
    """x (..., n, C) with 0 where not some (..., H or 1, 1, n or 1), in no head"""
    return blank_keys(x[..., None, :, :], some)[..., 0, :, :]


def check_norm(norm: Any, leaves: dict[str, Array]) -> None:
    """A `Norm` or None, and no parameters that it would leave unused."""
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f"qk_norm must be RMSNorm, L2Norm or LayerNorm of funcmha.norms, or None, got {norm!r}")
    used = () if norm is None else norm.leaves
    for leaf in leaves:
        group, _, name = leaf.partition(".")
        if group in ("q_norm", "k_norm") and name not in used:
            raise ValueError(f"qk_norm must be one that takes {leaf}, as params have it, got {norm!r}")


def _check_rotary(axes: _check.Axes, rotary: Any) -> tuple[Any, Any]:
    """The tables of queries and of keys, of as many positions; one table serves both."""
    pair: tuple[Any, ...] = rotary if type(rotary) is tuple else (rotary, rotary)
    if len(pair) != 2:
        raise TypeError(f"rotary must be a table of funcmha.rotary, or two, of queries and of keys, got {len(pair)}")
    for table, letter, name in zip(pair, "TS", ("queries", "keys"), strict=True):
        if table is not None:
            _check_table(axes, table, letter, name)
    return pair[0], pair[1]


def _check_table(axes: _check.Axes, table: Any, letter: str, name: str) -> None:
    """One table, of as many positions as there are queries, or keys."""
    if not isinstance(table, HalfPairs | InterleavedPairs):
        raise TypeError(f"rotary must be a table of funcmha.rotary, or two, got {type(table).__name__}")
    check_table(table)
    *batch, n, pairs = table.cos.shape
    if n != axes[letter]:
        raise ValueError(f"rotary must have {letter}={axes[letter]} positions for the {name}, got {n}")
    if batch and batch[-1] != 1:
        got = (*batch, n)
        raise ValueError(f"rotary must have the positions of all heads, ({letter},) or (..., 1, {letter}), got {got}")
    axes.size["1"] = 1
    axes.broadcast("rotary", (*batch, n), f"... 1 {letter}")
    if 2 * pairs > axes["D"]:
        raise ValueError(f"rotary must turn D={axes['D']} features or fewer, got {2 * pairs}")
