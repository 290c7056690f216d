"""What may have gone wrong, by which results are off and how: said as a guess, beside the verdict."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from funcmha._arrays import Array

from .calling import Results
from .cases import Case
from .implementation import Implementation
from .problems import Numbers, Problem
from .reference import Answer, expected

FACTORS = {
    float(np.log2(np.e)): "log₂ e: a log-sum-exp or an exponential in the other base",
    float(np.log(2)): "ln 2: a log-sum-exp or an exponential in the other base",
    2.0: "2: counted twice",
    0.5: "1/2: half of it is missing",
}


def diagnosis(impl: Implementation, case: Case, x: Numbers, got: Results, answer: Answer, wrong: set[str]) -> str:
    """One line, or none where the signature is not known; `wrong` are the quantities that are"""
    guesses = (
        *_left_out(impl, case, x, got, wrong),
        *_detached(got, answer, wrong),
        *_by_factor(case, x, got, answer, wrong),
        *_by_signature(wrong, answer),
    )
    return next(iter(guesses), "")


LEFT_OUT = {  # fields of Numbers, then of Problem
    "dlse": "the cotangent of lse",
    "dweights": "the cotangent of the weights",
    "sink": "the sink",
    "bias": "the bias",
    "mask": "the mask",
    "causal": "the causal mask",
    "window": "the window",
    "softcap": "the soft cap",
    "scale": "the scale that is given",
}
CHOSEN = ("causal", "window", "softcap", "scale")


def _left_out(impl: Implementation, case: Case, x: Numbers, got: Results, wrong: set[str]) -> Iterator[str]:
    """What is wrong is right of a problem in which something is left out"""
    usual, kind = Problem(), "gradients" if all(name.startswith("d") for name in wrong) else "results"
    for field, told in LEFT_OUT.items():
        if getattr(x, field, None) is not None:
            problem = replace(case.problem, lowest=False) if field == "bias" else case.problem
            other = x._replace(**dict[str, Any]({field: None}))
        elif field in CHOSEN and getattr(case.problem, field) != getattr(usual, field):
            problem, other = replace(case.problem, **dict[str, Any]({field: getattr(usual, field)})), x
        else:
            continue
        answer = expected(impl, problem, other, case.dtype, impl.profile)[0]
        names = wrong & {*answer.values}
        if names and all(_within(got.values[name], answer, name) for name in names):
            yield f"the {kind} are those without {told}: it is {'dropped' if kind == 'gradients' else 'ignored'}"


def _within(value: Array, answer: Answer, name: str) -> bool:
    want = answer.values[name]
    if value is None or value.shape != want.shape:
        return False
    with np.errstate(invalid="ignore"):
        return bool(np.all(np.abs(value - want) <= 8 * answer.bounds[name] + 1e-300))


PATHS = {  # by the gradients of q, k and v that are 0: what none of it comes through
    ("dk", "dq"): "the scores, or the weights after them: they are detached",
    ("dv",): "the values: they are detached",
    ("dk",): "the keys: they are detached",
    ("dq",): "the queries: they are detached",
    ("dk", "dv"): "keys and values: they are detached",
    ("dk", "dq", "dv"): "the output: it is detached",
}


def _detached(got: Results, answer: Answer, wrong: set[str]) -> Iterator[str]:
    """Of some gradients there is nothing, and no result but gradients is wrong"""
    nothing = {n for n in wrong if n in answer.values and (got.values[n] is None or not got.values[n].any())}
    path = PATHS.get(tuple(sorted(nothing & {"dq", "dk", "dv"})))
    if path is not None and nothing == wrong and all(name.startswith("d") for name in wrong):
        yield f"no gradient comes through {path}"


def _by_factor(case: Case, x: Numbers, got: Results, answer: Answer, wrong: set[str]) -> Iterator[str]:
    """Each wrong result is the right one times one number"""
    found = {}
    for name in wrong:
        value, want = got.values.get(name), answer.values.get(name)
        if value is None or want is None or value.shape != want.shape or not np.isfinite(value * want).all():
            return
        size = float(np.vdot(want, want))
        if not size:
            return
        factor = float(np.vdot(want, value)) / size
        near = 0.05 * abs(factor - 1) * np.abs(want).max()  # of what it is off by
        if factor == 0 or not np.allclose(value, factor * want, rtol=0, atol=near):
            return
        found[name] = factor
    if found:
        listed = ", ".join(f"{name} by {factor:.4g}" for name, factor in sorted(found.items()))
        known = FACTORS | {
            x.q.shape[-1] ** 0.5: "√D: the scale is missing",
            x.q.shape[-1] ** -0.5: "1/√D: the scale twice",
        }
        group = x.q.shape[1] // max(x.k.shape[1], 1)
        if group > 1 and {*found} <= {"dk", "dv"}:
            known |= {1 / group: f"1/{group}: a mean over the heads of a group, not their sum"}
        names = {told for value, told in known.items() if all(abs(f / value - 1) < 1e-3 for f in found.values())}
        yield f"off by one factor: {listed}" + (f"; {names.pop()}" if names else "")


def _by_signature(wrong: set[str], answer: Answer) -> Iterator[str]:
    grads = {"dq", "dk", "dv"} & {*answer.values}
    if wrong & {"o", "lse", "weights"} or len(grads) < 3 or not wrong & grads:
        return
    off = wrong & grads
    if off == {"dq", "dk"}:
        yield "dv is right, so the weights are: δ = Σ do ⊙ o, or the gradient of the scores"
    elif off == {"dk", "dv"}:
        yield "dq is right: the sum over a group of heads, or a tile of keys"
    elif off == {"dv"}:
        yield "dq and dk are right: the product of the weights with the cotangent"
    elif off == {"dq"}:
        yield "dk and dv are right: the sum over keys in dq, or its scale"
    elif off == {"dk"}:
        yield "dq and dv are right: the sum over queries in dk, or its scale"
