"""Every argument check of attention, of its heads and of their derivatives; and the options, spelled once.

A check runs at the public function, once, before any arithmetic.

Axes: T queries, S keys, S' keys with those of `bias_kv` and `zero_attn`, H query heads, K key/value heads, D query/key
width, E value width, Cq Ck Cv input widths; `...` is batch.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np

from . import _check, tree
from ._arrays import Array, described, is_array, upcast
from .biases import ArrayBias, RelativeBias, as_bias
from .dropout import Masked, Seeded
from .masks import Dense, Mask, as_mask, operands
from .norms import L2Norm, LayerNorm, RMSNorm
from .params import HEAD_SPEC, SPEC, Params, check
from .rotary import Rotary, check_table

Bias = Any  # an ArrayBias, a RelativeBias, or None

# ── the options ──────────────────────────────────────────────────────────────────────────────────────────────────


class ScoresOptions(TypedDict, total=False):
    """What `scores` takes beside its differentiable inputs."""

    mask: Array | Mask | None
    scale: float | Sequence[float] | None
    softcap: float | Sequence[float] | None


class AttentionOptions(ScoresOptions, total=False):
    """What `attention` takes beside its differentiable inputs."""

    dropout: Masked | Seeded | None


class HeadOptions(AttentionOptions, total=False):
    """What `head`, `mha` and `self_attention` take beside their differentiable inputs."""

    zero_attn: bool
    qk_norm: RMSNorm | L2Norm | LayerNorm | None
    rotary: Rotary | tuple[Rotary | None, Rotary | None] | None


class Options(NamedTuple):
    """The options, checked: None is none."""

    mask: Mask | None = None
    scale: Any = 1.0  # of every head, or (H,) of NumPy
    softcap: Any = None  # of every head, or (H,) of NumPy
    dropout: Masked | Seeded | None = None
    zero_attn: bool = False
    qk_norm: RMSNorm | L2Norm | LayerNorm | None = None
    rotary: Any = (None, None)  # the tables of queries and of keys

    def heads(self, h: slice) -> "Options":
        """Those of the query heads h."""
        scale, softcap = (a[h] if isinstance(a, np.ndarray) else a for a in (self.scale, self.softcap))
        mask = None if self.mask is None else self.mask.heads(h.start, h.stop)
        dropout = None if self.dropout is None else self.dropout.heads(h)
        return self._replace(mask=mask, scale=scale, softcap=softcap, dropout=dropout)


NAMES_ELSEWHERE = {  # what to write instead of what other libraries call it, and funcmha 0.1
    "mask=masks.causal()": "causal is_causal use_causal_mask",
    "mask= for booleans, True = attend, or for numbers a bias, by its place": "attn_mask attention_mask",
    "mask=masks.padding(valid), True = attend": "key_padding_mask",
    "mask=masks.lengths(…)": "lengths seqlens",
    "mask=masks.window(left, right)": "window window_size sliding_window left",
    "it by its place, without the name": "bias sink",
    "a bias, biases.alibi(slopes, T=…, S=…)[0]": "alibi_slopes",
    "dropout=dropout.seeded(seed, rate)": "dropout_p dropout_rate rate",
    "dropout=dropout.masked(keep, rate)": "keep dropout_mask",
    "softcap=": "cap soft_cap logit_cap logits_soft_cap",
    "scale=": "softmax_scale sm_scale",
    "qk_norm=": "norm",
    "rotary=": "rope",
    "nothing: fewer heads of keys and values are grouped-query attention": "enable_gqa is_gqa num_heads",
    "attention_weights(cache)": "need_weights return_weights return_attention_scores average_attn_weights",
    "log_sum_exp(cache)": "return_lse",
    "engine=": "implementation backend",
}
INSTEAD = {name: instead for instead, names in NAMES_ELSEWHERE.items() for name in names.split()}

F = TypeVar("F", bound=Callable[..., Any])


def takes(kind: type) -> Callable[[F], F]:
    """Spell out in a function's signature, for `help` and completion, the options that it takes as `**options`."""

    def spell_out(f: F) -> F:
        signature = inspect.signature(f)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None if name != "zero_attn" else False)
            for name in kind.__annotations__
            if name not in signature.parameters
        ]
        f.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return f

    return spell_out


def check_names(options: Any, kind: type) -> None:
    """Raise TypeError for an option that there is not, with what to write instead."""
    names = kind.__annotations__
    for name in options:
        if name not in names:
            instead = f": write {INSTEAD[name]}" if name in INSTEAD else ""
            raise TypeError(f"{name}= is no option, which are {', '.join(names)}{instead}")


# ── the ops ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_linear(x: Array, w: Array, b: Array) -> None:
    """The arguments of `linear`."""
    _check.arrays(("x", x, "... I"), ("w", w, "O I"), optional=[("b", b, "O")])


def check_attention(
    q: Array, k: Array, v: Array, bias: Any, sink: Array, options: Any, kind: type = AttentionOptions
) -> tuple[Bias, Options]:
    """The arguments of `attention`: the bias as an `ArrayBias` or a `RelativeBias`, and the options, checked."""
    check_names(options, kind)
    bias = as_bias(bias)
    _check.one_dtype([("q", q), ("k", k), ("v", v)], optional=[(name_of(bias), values_of(bias)), ("sink", sink)])
    axes = _check.Axes()
    head, group, scores = ("... H ", "... K ", "... H T S") if q.ndim > 2 else ("", "", "T S")
    axes("q", q, head + "T D")
    axes("k", k, group + "S D")
    axes("v", v, group + "S E")
    if head:
        _check.multiple("q", axes["H"], "k", axes["K"])
    if bias is not None:
        bias.check(axes, scores)
    if sink is not None:
        axes("sink", sink, "H") if head else axes("sink", sink, "")
    return bias, Options(
        check_mask(axes, options.get("mask"), scores),
        check_scale(axes, options.get("scale")),
        check_per_head(axes, "softcap", options.get("softcap"), positive=True),
        check_dropout(axes, options.get("dropout"), scores),
    )


def check_cotangents_of_attention(
    do: Array, dweights: Array, dlse: Array, q: Array, k: Array, v: Array, batch_axes: int
) -> None:
    """The cotangents of `attention`, and how many axes of the batch its gradients keep."""
    rows = q.shape[:-1]
    _check.cotangent("do", do, (*rows, v.shape[-1]), q, "... H T E")
    _check.cotangent("dweights", dweights, (*rows, k.shape[-2]), q, "... H T S", optional=True)
    _check.cotangent("dlse", dlse, rows, q, "... H T", optional=True)
    _check.batch_axes(batch_axes, max(q.ndim - 3, 0))


def name_of(bias: Bias) -> str:
    """What a message calls the numbers of a bias."""
    return "bias" if bias is None else bias.name


def values_of(bias: Any) -> Array:
    """The differentiable numbers of a bias, as it was given or checked."""
    return bias.values if isinstance(bias, ArrayBias | RelativeBias) else bias


def check_scale(axes: _check.Axes, scale: Any) -> Any:
    """The scale, D ** -0.5 unless it is given."""
    scale = check_per_head(axes, "scale", scale)
    return max(axes["D"], 1) ** -0.5 if scale is None else scale


def check_per_head(axes: _check.Axes, name: str, x: Any, positive: bool = False) -> Any:
    """A number as a float, one number for each head as a NumPy array (H,), or None."""
    if is_array(x) and not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a number, or (H,) of NumPy or a list, got {described(x)}")
    if not isinstance(x, tuple | list | np.ndarray):
        value = None if x is None else _check.number(name, x)
        if positive and value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
        return value
    if isinstance(x, np.ndarray) and x.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got dtype {x.dtype}")
    numbers = np.array(x if isinstance(x, np.ndarray) else [_check.number(name, n) for n in x], dtype=np.float64)
    if "H" not in axes.size or numbers.shape != (axes["H"],):
        wanted = f"or (H,) with H={axes['H']} as in q" if "H" in axes.size else "as there is no head axis"
        raise ValueError(f"{name} must be a number, {wanted}, got shape {numbers.shape}")
    if not np.all(np.isfinite(numbers)) or (positive and not np.all(numbers > 0)):
        raise ValueError(f"{name} must be finite{' and above 0' if positive else ''}, got {numbers}")
    return numbers


def check_mask(axes: _check.Axes, mask: Any, scores: str) -> Mask | None:
    """The mask as a `Mask` that broadcasts to `scores`, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        _check.boolean("mask", mask, "True = attend (a mask to be added to the scores is a bias)")
        axes.broadcast("mask", mask.shape, scores)
    checked = as_mask(mask)
    check_known(checked)
    arrays = [part.array for part in operands(checked) if isinstance(part, Dense)]
    for array in arrays:
        axes.static("mask", array)
    axes.broadcast("mask", checked.shape(axes["T"], axes["S"]), scores)
    for array in arrays:
        _check_which_axis(axes, "mask", array, scores)
    return checked


KNOWN = (int, np.integer, np.ndarray, type(None))  # what can be looked at while JAX traces


def check_known(mask: Mask) -> None:
    """Raise TypeError for a structured mask of what JAX traces, or of another library: it has to be looked at."""
    for part in operands(mask):
        held: Any = () if isinstance(part, Dense) else part
        for x in held:
            if not isinstance(x, KNOWN):
                got = described(x) if is_array(x) else type(x).__name__
                raise TypeError(
                    f"mask must hold integers and NumPy arrays, got a {type(part).__name__} of {got}: under jax.jit"
                    " name it in static_argnames, or build it within the function"
                )


def _check_which_axis(axes: _check.Axes, name: str, x: Array, scores: str) -> None:
    """Of as many samples as heads, (H, T, S) is per head by broadcasting, and (B, T, S) one per sample elsewhere."""
    if x.ndim != 3 or not scores.startswith("... H"):
        return
    H = axes["H"]
    if axes.shape("...") == (H,) == tuple(x.shape[:1]) != (1,):
        it = name.rpartition(".")[2]
        raise ValueError(
            f"{name} must have 2 or 4 axes where B=H={H}, got {tuple(x.shape)}, which may mean either: write"
            f" {it}[:, None] for one per sample, {it}[None] for one per head"
        )


def check_dropout(axes: _check.Axes, dropout: Any, scores: str) -> Masked | Seeded | None:
    """A `Masked` whose booleans broadcast to `scores`, a `Seeded`, or None."""
    if dropout is None:
        return None
    if not isinstance(dropout, Masked | Seeded):
        got = f"{type(dropout).__module__}.{type(dropout).__name__}"
        raise TypeError(f"dropout must be dropout.masked(keep, rate), dropout.seeded(seed, rate) or None, got {got}")
    _check.number("dropout.rate", dropout.rate, 0.0, 1.0)
    if isinstance(dropout, Masked):
        _check.boolean("dropout.keep", dropout.keep, "True = keep")
        axes.static("dropout.keep", dropout.keep)
        axes.broadcast("dropout.keep", _check.shape_of(dropout.keep), scores)
        _check_which_axis(axes, "dropout.keep", dropout.keep, scores)
    return dropout


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_mha(
    params: Params, query: Array, key: Array, value: Array, bias: Any, options: Any
) -> tuple[_check.Axes, Bias, Options]:
    """The arguments of `mha`: the sizes, the bias as a `Bias` and the options, checked."""
    axes, leaves = check(params, SPEC)
    return check_inputs(axes, leaves, {"query": query, "key": key, "value": value}, bias, options)


def check_self_attention(params: Params, x: Array, bias: Any, options: Any) -> tuple[_check.Axes, Bias, Options]:
    """The arguments of `self_attention`: those of `mha`, whose query, key and value are called x."""
    axes, leaves = check(params, SPEC)
    return check_inputs(axes, leaves, {"x": x}, bias, options)


def check_head(
    params: Params, query: Array, key: Array, value: Array, bias: Any, options: Any
) -> tuple[_check.Axes, Bias, Options]:
    """The arguments of `head`: as those of `mha`; bias, mask and dropout get a head axis of 1."""
    axes, leaves = check(params, HEAD_SPEC)
    return check_inputs(axes, leaves, {"query": query, "key": key, "value": value}, bias, options)


def check_cotangents_of_head(do: Array, dweights: Array, dlse: Array, query: Array, E: int, keys: int) -> None:
    """The cotangents of `head`, of a query (..., T, Cq) and so many keys."""
    rows = query.shape[:-1]
    _check.cotangent("do", do, (*rows, E), query, "... T E")
    _check.cotangent("dweights", dweights, (*rows, keys), query, "... T S'", optional=True)
    _check.cotangent("dlse", dlse, rows, query, "... T", optional=True)


def check_cotangents_of_mha(dy: Array, dweights: Array, dlse: Array, o: Array, O: int, H: int, keys: int) -> None:
    """The cotangents of `mha`, whose heads gave arrays like o (..., T, E)."""
    *batch, T, _ = o.shape
    _check.cotangent("dy", dy, (*batch, T, O), o, "... T O")
    _check.cotangent("dweights", dweights, (*batch, H, T, keys), o, "... H T S'", optional=True)
    _check.cotangent("dlse", dlse, (*batch, H, T), o, "... H T", optional=True)


def check_inputs(
    axes: _check.Axes, leaves: dict[str, Array], inputs: dict[str, Array], bias: Any, options: Any
) -> tuple[_check.Axes, Bias, Options]:
    """The inputs beside the parameters, of which `axes` knows the sizes: query, key and value, or x for all three."""
    bias = as_bias(bias)
    _check.one_dtype(inputs.items(), optional=[(name_of(bias), values_of(bias))], first=axes.first)
    if "x" in inputs:
        for symbols in ("... T Cq", "... T Ck", "... T Cv"):
            axes("x", inputs["x"], symbols)
        axes.size["S"] = axes["T"]
    else:
        for (name, x), symbols in zip(inputs.items(), ("... T Cq", "... S Ck", "... S Cv"), strict=True):
            axes(name, x, symbols)
    return axes, *check_options(axes, leaves, bias, options)


def check_options(axes: _check.Axes, leaves: dict[str, Array], bias: Bias, options: Any) -> tuple[Bias, Options]:
    """The bias and the options of heads whose sizes `axes` knows."""
    check_names(options, HeadOptions)
    zero_attn, one_head = options.get("zero_attn", False), "H" not in axes.size
    lead = "... " if one_head else "... H "
    if bias is not None:
        bias.check(axes, lead + "T S")
    mask = _check_mask_of_heads(axes, options.get("mask"), lead, one_head)
    _check.flag("zero_attn", zero_attn)
    appended = ("bias_kv.k" in leaves) + zero_attn
    if appended and isinstance(bias, RelativeBias):
        raise ValueError("bias must be an array with bias_kv or zero_attn: an appended key has no position")
    axes.size["S'"] = axes["S"] + appended
    dropout = check_dropout(axes, options.get("dropout"), lead + "T S'")
    if one_head:
        bias = None if bias is None else bias.with_head_axis()
        dropout = dropout._replace(keep=_with_head_axis(dropout.keep)) if isinstance(dropout, Masked) else dropout
    scale = check_scale(axes, options.get("scale"))
    softcap = check_per_head(axes, "softcap", options.get("softcap"), positive=True)
    norm = _check_norm(options.get("qk_norm"), leaves)
    rotary = _check_rotary(axes, options.get("rotary"))
    return bias, Options(mask, scale, softcap, dropout, zero_attn, norm, rotary)


def _check_mask_of_heads(axes: _check.Axes, mask: Any, lead: str, one_head: bool) -> Mask | None:
    """The mask; of one head, an array gets a head axis of 1, which structured masks have."""
    if not one_head:
        return check_mask(axes, mask, lead + "T S")
    if isinstance(mask, Mask):
        _check_head_axes(mask)
        axes.size["1"] = 1
        return check_mask(axes, mask, "... 1 T S")
    checked = check_mask(axes, mask, lead + "T S")
    return as_mask(_with_head_axis(checked.array)) if isinstance(checked, Dense) else checked


def _check_head_axes(mask: Mask) -> None:
    """Raise ValueError for an array in a structured mask of one head that has samples where its head axis should be."""
    for part in operands(mask):
        if isinstance(part, Dense) and part.array.ndim > 2 and part.array.shape[-3] != 1:
            raise ValueError(
                "mask must hold arrays (..., 1, T, S), with an axis for the head, where it is more than an array, got"
                f" {tuple(part.array.shape)}: write array[..., None, :, :]"
            )


def _with_head_axis(a: Array) -> Array:
    """a (..., T, S)   →   (..., 1, T, S); without batch axes there is nothing to tell apart"""
    return a if a.ndim < 3 else a[..., None, :, :]


NORMS = (RMSNorm, L2Norm, LayerNorm)


def _check_norm(norm: Any, leaves: dict[str, Array]) -> Any:
    """A norm or None, and no parameters that it would leave unused."""
    if norm is not None and not isinstance(norm, NORMS):
        instead = f": write {norm.__name__}()" if isinstance(norm, type) and issubclass(norm, NORMS) else ""
        raise TypeError(
            f"qk_norm must be RMSNorm, L2Norm or LayerNorm of funcmha.norms, or None, got {norm!r}{instead}"
        )
    used = () if norm is None else norm.leaves
    for leaf in leaves:
        group, _, name = leaf.partition(".")
        if group in ("q_norm", "k_norm") and name not in used:
            raise ValueError(f"qk_norm must be one that takes {leaf}, as params have it, got {norm!r}")
    return norm


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
    if not isinstance(table, Rotary):
        raise TypeError(f"rotary must be a table of funcmha.rotary, or two, got {type(table).__name__}")
    check_table(table)
    axes.static("rotary", table.cos)
    *batch, n, pairs = table.cos.shape
    if n != axes[letter]:
        raise ValueError(f"rotary must have {letter}={axes[letter]} positions for the {name}, got {n}")
    if batch and batch[-1] != 1:
        got = (*batch, n)
        raise ValueError(f"rotary must have the positions of all heads, ({letter},) or (..., 1, {letter}), got {got}")
    axes.size["1"] = 1
    axes.broadcast("rotary", (*batch, n), f"... 1 {letter}")
    if 2 * pairs > axes["D"]:
        raise ValueError(f"rotary must rotate D={axes['D']} features or fewer, got {2 * pairs}")


# ── derivatives ──────────────────────────────────────────────────────────────────────────────────────────────────

TANGENTS = ("q_dot", "k_dot", "v_dot", "bias_dot", "sink_dot")


class Tangents(NamedTuple):
    """Of the inputs of `attention`, in the dtype computed with; None is zero."""

    q: Array  # (..., H, T, D)
    k: Array  # (..., K, S, D)
    v: Array  # (..., K, S, E)
    bias: Bias  # as the bias
    sink: Array  # (H,), or () without a head axis


class Cotangents(NamedTuple):
    """Of the outputs of `attention`, and the tangents of these, in the dtype computed with; None is zero."""

    do: Array  # (..., H, T, E)
    do_dot: Array  # (..., H, T, E)
    dlse: Array  # (..., H, T)
    dlse_dot: Array  # (..., H, T)


def check_tangents(
    q: Array, k: Array, v: Array, bias: Bias, sink: Array, dots: tuple[Any, ...]
) -> tuple[Tangents, Any]:
    """The tangents of an attention's inputs, upcast, and the dtype that they came in; each may be None."""
    q_dot, k_dot, v_dot, bias_dot, sink_dot = dots
    tangents, bias_dot = list(zip(TANGENTS, map(values_of, dots), strict=True)), as_bias(bias_dot)
    _check.one_dtype([], optional=tangents)
    head = q.ndim > 2
    _check.tangent("q_dot", q_dot, q.shape, q, "... H T D" if head else "T D")
    _check.tangent("k_dot", k_dot, k.shape, q, "... K S D" if head else "S D")
    _check.tangent("v_dot", v_dot, v.shape, q, "... K S E" if head else "S E")
    check_bias_tangent(bias_dot, bias, q)
    _check.tangent("sink_dot", sink_dot, _check.shape_of(sink), q, "H" if head else "")
    dtype = next((x.dtype for _, x in tangents if x is not None), q.dtype)
    wide_bias = None if bias_dot is None else bias_dot.map(upcast)
    return Tangents(upcast(q_dot), upcast(k_dot), upcast(v_dot), wide_bias, upcast(sink_dot)), dtype


def check_cotangents(q: Array, v: Array, cotangents: Cotangents, dots: tuple[Any, ...]) -> Cotangents:
    """The cotangents of an attention and their tangents, upcast, of the dtype that the tangents of the inputs have."""
    given = cotangents._asdict()
    do, do_dot, dlse, dlse_dot = cotangents
    _check.one_dtype([("do", do)], optional=[*given.items(), *zip(TANGENTS, map(values_of, dots), strict=True)])
    o, lse = (*q.shape[:-1], v.shape[-1]), tuple(q.shape[:-1])
    _check.cotangent("do", do, o, q, "... H T E")
    _check.cotangent("dlse", dlse, lse, q, "... H T", optional=True)
    _check.tangent("do_dot", do_dot, o, q, "... H T E")
    _check.tangent("dlse_dot", dlse_dot, lse, q, "... H T")
    return Cotangents(*map(upcast, given.values()))


def check_bias_tangent(bias_dot: Bias, bias: Bias, computed: Array) -> None:
    """Raise unless the tangent of a bias is None, or what the bias is, an array or a `RelativeBias`, of its shape."""
    if bias_dot is not None and bias is not None and type(bias_dot) is not type(bias):
        wanted, got = type(bias.given).__name__, type(bias_dot.given).__name__
        raise TypeError(f"bias_dot must be a {wanted} as bias is, got {got}")
    name = "bias_dot" if bias_dot is None else bias_dot.name.replace("bias", "bias_dot")
    _check.tangent(name, values_of(bias_dot), _check.shape_of(values_of(bias)), computed)


def check_params_tangent(params_dot: Any, params: Params, spec: dict[str, str], computed: Array) -> dict[str, Array]:
    """The leaves of the tangent of a tree of parameters, by name; {} for None, which is zero."""
    if params_dot is None:
        return {}
    if not isinstance(params_dot, dict):
        raise TypeError(f"params_dot must be a dict of dicts of arrays, or None, got {type(params_dot).__name__}")
    dots, leaves = tree.flatten(params_dot), tree.flatten(params)
    if dots.keys() != leaves.keys():
        got = ", ".join(f"params_dot.{leaf}" for leaf in dots)
        raise KeyError(f"params_dot must have {', '.join(leaves)} as params have, got {got}")
    named = {f"params_dot.{leaf}": x for leaf, x in dots.items()}
    _check.one_dtype([], optional=named.items())
    for leaf, x in dots.items():
        _check.tangent(f"params_dot.{leaf}", x, leaves[leaf].shape, computed, spec[leaf])
    return named
