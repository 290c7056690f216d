"""A failing case made small: first the problem, then its numbers, while the verdict stays."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from time import monotonic
from typing import Any, NamedTuple

import numpy as np

from .cases import Case
from .implementation import DIFFERENTIABLE, Implementation
from .problems import Numbers, Problem, numbers, rounded
from .verdicts import WRONG, Judged, judge_numbers

SECONDS = 10.0  # for all of it


class Small(NamedTuple):
    """A small case that fails as the large one does."""

    case: Case
    x: Numbers
    row: Judged


def shrink(impl: Implementation, row: Judged, *, seconds: float = SECONDS) -> Small:
    """The smallest case found in so many seconds in which this quantity is wrong, or this law is broken"""
    end = monotonic() + seconds

    def failing(case: Case, x: Numbers) -> Judged | None:
        if monotonic() > end or impl.refuses(**case.problem.sizes()) is not None:
            return None
        try:
            rows = judge_numbers(impl, case, x, laws=row.law)
        except Exception:  # a problem that makes no sense
            return None
        same = (r for r in rows if (r.quantity, r.law) == (row.quantity, row.law) and r.verdict == WRONG)
        return next((r for r in same if not row.law or r.why == row.why), None)

    case = _least(row.case, lambda case: failing(case, numbers(case.problem, case.dtype)), _smaller)
    found = numbers(case.problem, case.dtype)
    if failing(case, found) is None:  # there was no time, or it is random
        return Small(case, found, row)
    x = _least(found, lambda x: failing(_sized(case, x), x), lambda x: _simpler(case, x))
    return Small(_sized(case, x), x, failing(_sized(case, x), x) or row)


def _least(start: Any, fails: Callable[[Any], Judged | None], smaller: Callable[[Any], Iterator[Any]]) -> Any:
    """The first that fails of what is smaller, and again from there"""
    while (found := next((other for other in smaller(start) if fails(other) is not None), None)) is not None:
        start = found
    return start


# ── the problem ──────────────────────────────────────────────────────────────────────────────────────────────────


def _smaller(case: Case) -> Iterator[Case]:
    usual, problem = Problem(), case.problem
    for letter in "BTSDE":
        n = getattr(problem, letter)
        for fewer in sorted({1, 2, n // 2, n - 1} & {*range(1, n)}):
            changes = {letter: fewer} | ({"E": fewer} if letter == "D" and problem.D == problem.E else {})
            yield replace(case, problem=replace(problem, **changes))
    group = problem.H // max(problem.K, 1)
    for K in range(1, problem.K):
        yield replace(case, problem=replace(problem, H=K * group, K=K))
    for g in range(1, group):
        yield replace(case, problem=replace(problem, H=problem.K * g))
    for f in fields(Problem):
        value = getattr(usual, f.name)
        if f.name not in "BHKTSDE" and f.name != "seed" and getattr(problem, f.name) != value:
            yield replace(case, problem=replace(problem, **{f.name: value}))
    if len(problem.cotangents) > 1:
        for name in problem.cotangents:
            yield replace(case, problem=replace(problem, cotangents=(name,)))


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


def _sized(case: Case, x: Numbers) -> Case:
    """The case with the sizes of these numbers."""
    (B, H, T, D), (_, K, S, _), E = x.q.shape, x.k.shape, x.v.shape[-1]
    return replace(case, problem=replace(case.problem, B=B, H=H, K=K, T=T, S=S, D=D, E=E))


def _simpler(case: Case, x: Numbers) -> Iterator[Numbers]:
    problem = case.problem
    if not (problem.causal or problem.window):  # which depend on where rows and keys are
        yield from (_without_row(x, i) for i in range(x.q.shape[2]) if x.q.shape[2] > 1)
        yield from (_without_key(x, j) for j in range(x.k.shape[2]) if x.k.shape[2] > 1)
    for name in ("do", "dlse", "dweights", *DIFFERENTIABLE):
        a = getattr(x, name)
        if a is None or not a.size:
            continue
        if name[0] == "d":
            yield from (x._replace(**{name: other}) for other in _with_zeros(a))
        short = rounded(np.round(a, 1), case.dtype)
        if np.abs(a).max() < 1e4 and not np.array_equal(short, a):
            yield x._replace(**{name: short})


def _with_zeros(a: np.ndarray) -> Iterator[np.ndarray]:
    """One entry alone; else whole slices along each axis set to 0"""
    if np.count_nonzero(a) <= 1:
        return
    for index in [np.unravel_index(np.argmax(np.abs(a)), a.shape), *np.argwhere(a)[:4]]:
        alone = np.zeros_like(a)
        alone[tuple(index)] = a[tuple(index)]
        yield alone
    for axis, n in enumerate(a.shape):
        for i in range(n if n > 1 else 0):
            at: Any = (*(slice(None),) * axis, i)
            if a[at].any():
                cut = a.copy()
                cut[at] = 0
                yield cut


def _without_row(x: Numbers, i: int) -> Numbers:
    axes = {"q": -2, "bias": -2, "mask": -2, "do": -2, "dlse": -1, "dweights": -2}
    return _without(x, axes, i, x.q.shape[2])


def _without_key(x: Numbers, j: int) -> Numbers:
    axes = {"k": -2, "v": -2, "bias": -1, "mask": -1, "dweights": -1}
    return _without(x, axes, j, x.k.shape[2])


def _without(x: Numbers, axes: dict[str, int], i: int, n: int) -> Numbers:
    changes: dict[str, Any] = {}
    for name, axis in axes.items():
        a = getattr(x, name)
        if a is not None and a.shape[axis] == n:
            changes[name] = np.delete(a, i, axis=axis)
    return x._replace(**changes)
