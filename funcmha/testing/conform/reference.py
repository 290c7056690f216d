"""What is right, in float64 by the specification, and how far a right implementation may be from it.

`expected` gives one answer or, where a row has nothing but the least number of the dtype for its bias, two: such a bias
absorbs the scores, or is a constant that changes nothing.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import ops
from funcmha._arrays import HALF, Array
from funcmha.testing.profiles import Profile
from funcmha.testing.rounding import U, name_of
from funcmha.testing.tolerance import attention_bounds

from .implementation import Implementation
from .problems import Numbers, Problem

OF_ATTENTION = ("o", "lse", "weights", "dq", "dk", "dv", "dbias", "dsink")
QUANTITIES = (*OF_ATTENTION, "dbias_k", "dbias_v")
Values = dict[str, Array]


class Answer(NamedTuple):
    values: Values  # by quantity
    bounds: Values  # |got − value| ≤ bound; ∞ where nothing is asked


def allowed(impl: Implementation, problem: Problem, x: Numbers) -> Array:
    """What may be attended, (B or 1, H or 1, T, S), by all that the problem says; None for everything"""
    T, S = x.q.shape[-2], x.k.shape[-2]
    distance = np.arange(S) - np.arange(T)[:, None] - (S - T if impl.causal == "bottom-right" else 0)
    parts = [] if x.mask is None else [x.mask]
    if problem.causal:
        parts.append(distance[None, None] <= 0)
    if problem.window is not None:
        before, after = problem.window
        parts.append(((-before <= distance) & (distance <= after))[None, None])
    return None if not parts else np.logical_and.reduce(np.broadcast_arrays(*parts))


def without_cotangents(impl: Implementation, x: Numbers, mask: Array) -> Numbers:
    """The problem with cotangents of 0 in empty rows, unless 0 is what the implementation declares for them"""
    if mask is None or (impl.empty_row == "zero" and x.dlse is None):
        return x
    some = np.broadcast_to(mask.any(-1), x.q.shape[:-1])
    cut: dict[str, Any] = {"dlse": None if x.dlse is None else np.where(some, x.dlse, 0.0)}
    if impl.empty_row != "zero":
        cut["do"] = None if x.do is None else np.where(some[..., None], x.do, 0.0)
        cut["dweights"] = None if x.dweights is None else np.where(some[..., None], x.dweights, 0.0)
    return x._replace(**cut)


def expected(impl: Implementation, problem: Problem, x: Numbers, dtype: str, profile: Profile) -> list[Answer]:
    """The answers that are right, for an implementation of this profile that follows the declared conventions"""
    mask = allowed(impl, problem, x)
    options: dict[str, Any] = {"mask": mask, "softcap": problem.softcap, "scale": _scale(impl, problem, x)}
    if problem.lowest and dtype != "float16":  # whose least number leaves float32 three digits of a score
        return _of_lowest(x, options, dtype, profile)
    if x.sink is None or impl.lse_includes_sink or "lse" not in impl.returned:
        answer = _answer(x, options, dtype, profile)
    else:
        answer = _with_lse_of_scores(x, options, dtype, profile)
    return [_with_empty_rows(answer, impl, x, mask if x.k.shape[-2] else np.zeros((1, 1, 1, 0), bool), dtype)]


def _scale(impl: Implementation, problem: Problem, x: Numbers) -> float:
    return (
        problem.scale if problem.scale is not None else (x.q.shape[-1] ** -0.5 if impl.scale_default != "one" else 1.0)
    )


def _answer(x: Numbers, options: dict[str, Any], dtype: str, profile: Profile) -> Answer:
    if x.bias_k is not None:
        return _with_appended_key(x, options, dtype, profile)
    do = np.zeros((*x.q.shape[:-1], x.v.shape[-1])) if x.do is None else x.do
    cotangents: dict[str, Any] = {"dlse": x.dlse, "dweights": x.dweights}
    with np.errstate(all="ignore"):
        o, cache = ops.attention(x.q, x.k, x.v, x.bias, x.sink, **options)
        values = o, cache.lse, cache.p, *ops.attention_vjp(cache, do, **cotangents)
        b = attention_bounds(
            x.q, x.k, x.v, x.bias, do, sink=x.sink, **options, **cotangents, dtype=dtype, arithmetic=profile
        )
    bounds = b.o, _half(b.lse, cache.lse, dtype), _half(b.weights, cache.p, dtype), *b[3:]
    named = dict(zip(OF_ATTENTION, values, strict=True)), dict(zip(OF_ATTENTION, bounds, strict=True))
    return Answer(*({name: a for name, a in some.items() if a is not None} for some in named))


def _half(bound: Array, value: Array, dtype: str) -> Array:
    """lse and weights may be returned in half"""
    with np.errstate(invalid="ignore"):
        return bound + (U[name_of(dtype)] * np.nan_to_num(np.abs(value), posinf=0.0) if dtype in HALF else 0.0)


def _with_appended_key(x: Numbers, options: dict[str, Any], dtype: str, profile: Profile) -> Answer:
    """One key and value more, after the others: every query of every sample attends them"""
    B = x.k.shape[0]
    k, v = (
        np.concatenate([a, np.broadcast_to(row[:, None], (B, len(row), 1, a.shape[-1]))], axis=-2)
        for a, row in ((x.k, x.bias_k), (x.v, x.bias_v))
    )
    mask = options["mask"]
    mask = None if mask is None else np.pad(mask, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    x = x._replace(k=k, v=v, bias_k=None, bias_v=None)
    values, bounds = (dict(part) for part in _answer(x, options | {"mask": mask}, dtype, profile))
    for name in ("k", "v"):
        rows, allowed_off = values[f"d{name}"][..., -1, :], bounds[f"d{name}"][..., -1, :]
        values[f"dbias_{name}"] = rows.sum(0)
        bounds[f"dbias_{name}"] = allowed_off.sum(0) + U[dtype] * B * np.abs(rows).sum(0)  # the sum over samples
        for part in (values, bounds):
            part[f"d{name}"] = part[f"d{name}"][..., :-1, :]
    return Answer(values, bounds)


def _with_lse_of_scores(x: Numbers, options: dict[str, Any], dtype: str, profile: Profile) -> Answer:
    """The log-sum-exp of the scores alone, with its part of the gradients, beside a sink that is in the softmax"""
    outer = _answer(x._replace(dlse=None), options, dtype, profile)
    inner = _answer(x._replace(sink=None, do=None, dweights=None), options, dtype, profile)
    both = []
    for one, other in zip(outer, inner, strict=True):
        grads = (
            {n: one[n] + other[n] if n in other else one[n] for n in one if n.startswith("d")}
            if x.dlse is not None
            else {}
        )
        both.append(one | grads | {"lse": other["lse"]})
    return Answer(*both)


def _with_empty_rows(answer: Answer, impl: Implementation, x: Numbers, mask: Array, dtype: str) -> Answer:
    """The rows that attend nothing as the implementation declares them; their log-sum-exp is not asked for"""
    if mask is None or mask.any(-1).all() or x.sink is not None:
        return answer
    empty = ~np.broadcast_to(mask.any(-1), x.q.shape[:-1])
    values, bounds = dict(answer.values), dict(answer.bounds)
    bounds["lse"] = np.where(empty, np.inf, bounds["lse"])
    if impl.empty_row != "zero":
        bounds["weights"] = np.where(empty[..., None], np.inf, bounds["weights"])
        values["o"], bounds["o"] = _output_of_empty_rows(answer, impl, x, empty[..., None], dtype)
    return Answer(values, bounds)


def _output_of_empty_rows(answer: Answer, impl: Implementation, x: Numbers, empty: Array, dtype: str) -> Any:
    if impl.empty_row == "mean" and x.v.shape[-2]:
        S, v = x.v.shape[-2], np.repeat(x.v, x.q.shape[1] // x.v.shape[1], axis=1)
        mean, size = v.mean(-2, keepdims=True), np.abs(v).mean(-2, keepdims=True)
        bound = (4 + S**0.5) * U["float32" if dtype in HALF else dtype] * size + 2 * U[dtype] * (dtype in HALF) * size
        return np.where(empty, mean, answer.values["o"]), np.where(empty, bound, answer.bounds["o"])
    return np.where(empty, np.nan, answer.values["o"]), np.where(empty, np.inf, answer.bounds["o"])


def _of_lowest(x: Numbers, options: dict[str, Any], dtype: str, profile: Profile) -> list[Answer]:
    """Rows whose bias is the least number: with scores that it leaves, and with scores that it absorbs"""
    bias = np.broadcast_to(x.bias, (*x.q.shape[:-1], x.k.shape[-2]))
    kh = np.repeat(x.k, x.q.shape[1] // x.k.shape[1], axis=1)
    absorbed = np.where(bias < -1e4, -options["scale"] * (x.q @ kh.mT), 0.0)
    answers = []
    for other in (np.zeros_like(bias), absorbed):
        answer = _answer(x._replace(bias=other), options, dtype, profile)
        for part in answer:
            part.pop("dbias", None)
        answer.bounds["lse"] = np.full_like(answer.bounds["lse"], np.inf)
        answers.append(answer)
    return answers
