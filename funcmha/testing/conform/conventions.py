"""The conventions of an implementation, measured: what it does with probe inputs, against every way to do it.

Values are one-hot where they fit, so that an output is its row of weights; queries are 0 where the scores do not
matter, so that a row has equal weights on what it attends.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array

from .calling import run
from .implementation import CHOICES, Implementation, span
from .problems import Numbers, Problem, numbers
from .reference import expected

MOST_SCORES = 2**24  # of a problem that is made to fit limits: 128 MiB in float64
CLOSE = 0.02  # of the largest: a probe tells conventions apart, and judges no rounding


class Mismatch(NamedTuple):
    field: str
    declared: Any
    measured: Any
    evidence: str

    def __str__(self) -> str:
        return f"you declare {self.field}={self.declared!r}, the kernel is {self.measured!r}: {self.evidence}"


@dataclass(frozen=True)
class Probe:
    field: str
    problem: Problem
    needs: tuple[str, ...] = ()  # options of the forward
    reads: str = "o"


PROBES = (
    Probe("layout", Problem(B=2, H=4, K=4, T=5, S=5, gain=0.0)),
    Probe("scale_default", Problem(T=5, S=5)),
    Probe("mask", Problem(T=5, S=8, gain=0.0, mask="dense"), ("mask",)),
    Probe("causal", Problem(T=5, S=8, gain=0.0, causal=True), ("causal",)),
    Probe("window", Problem(T=8, S=8, gain=0.0, window=(2, 1)), ("window",)),
    Probe("gqa", Problem(H=4, K=2, T=5, S=5, gain=0.0)),
    Probe("empty_row", Problem(T=5, S=8, gain=0.0, mask="some rows"), ("mask",)),
    Probe("cap_order", Problem(T=5, S=8, gain=4.0, softcap=1.0, bias="B H T S"), ("softcap", "bias")),
    Probe("lse_layout", Problem(B=2, H=2, K=2, T=2, S=3), reads="lse"),
    Probe("lse_base", Problem(T=5, S=8), reads="lse"),
    Probe("lse_includes_sink", Problem(T=5, S=8, sink=2.0), ("sink",), reads="lse"),
)


def mismatches(impl: Implementation) -> Iterator[Mismatch]:
    """The conventions that are other than declared. Where no choice fits, it is for the cases to say what is wrong."""
    dtype = "float32" if "float32" in impl.dtypes else impl.dtypes[0]
    for probe in PROBES:
        problem = fitted(impl, probe.problem)
        taken = {*probe.needs} <= {*impl.options} and probe.reads in impl.returned
        taken = taken or (probe.field == "causal" and impl.always_causal)
        if problem is None or not taken or (probe.field == "gqa" and (impl.gqa is None or problem.H == problem.K)):
            continue
        declared = getattr(impl, probe.field)
        if declared == "undefined":
            continue
        found = _measured(impl, probe, problem, dtype)
        if found is not None and found[0] != declared:
            yield Mismatch(probe.field, declared, *found)
            if probe.field == "layout":
                return  # nothing else can be read


def fitted(impl: Implementation, problem: Problem) -> Problem | None:
    """The problem with sizes that the limits allow, as near as they come; None if there are none"""
    sizes = {letter: getattr(problem, letter) for letter in "BHKTSDE"}
    group = sizes["H"] // sizes["K"]
    for letter, limit in impl.limits.items():
        if isinstance(limit, int | tuple) and letter in sizes:
            low, high, multiple = span(limit)
            n = max(low, min(sizes[letter], high))
            sizes[letter] = min(-(-n // multiple) * multiple, high // multiple * multiple)
    if "B" not in impl.layout.split():
        sizes["B"] = 1
    if impl.gqa is None or "G" in impl.limits:
        limit = impl.limits.get("G", 1)
        group = limit if isinstance(limit, int) else max(limit[0], min(group, limit[1])) if impl.gqa else 1
    sizes["H"] = sizes["K"] * group
    for letter, limit in impl.limits.items():
        if isinstance(limit, str) and letter in sizes:
            sizes[letter] = sizes[limit]
    found = replace(problem, **sizes, causal=problem.causal or impl.always_causal)
    too_large = prod(max(n, 1) for n in (found.B, found.H, found.T, found.S)) > MOST_SCORES
    return None if too_large or impl.refuses(**found.sizes()) else found


# ── what fits ────────────────────────────────────────────────────────────────────────────────────────────────────


def _measured(impl: Implementation, probe: Probe, problem: Problem, dtype: str) -> tuple[Any, str] | None:
    """The first choice, the declared one before others, under which the output is as expected, and how one sees it"""
    declared = getattr(impl, probe.field)
    choices: tuple[Any, ...] = CHOICES.get(probe.field, (True, False))
    x = _inputs(problem, dtype)
    for choice in (declared, *(c for c in choices if c not in (declared, "undefined"))):
        variant = replace(impl, **{probe.field: choice})
        try:
            got = run(variant, problem, x, dtype, gradients=False).values[probe.reads]
        except Exception:  # a wrong layout has other shapes, and every library errors of its own
            continue
        want = _expected(variant, probe, problem, x, dtype)
        if _close(got, want, asks_nan=choice == "nan"):
            return choice, _evidence(impl, probe, problem, x, np.asarray(got))
    return None


def _inputs(problem: Problem, dtype: str) -> Numbers:
    """Of the problem, with values that are one-hot where they fit and heads do not matter"""
    x = numbers(problem, dtype)
    S, E = x.v.shape[-2:]
    if problem.mask == "none" and not (problem.causal or problem.window):
        return x
    return x._replace(v=np.broadcast_to(np.eye(S, E), x.v.shape).copy()) if S <= E else x


def _expected(impl: Implementation, probe: Probe, problem: Problem, x: Numbers, dtype: str) -> Array:
    if probe.field == "cap_order" and impl.cap_order == "scale bias cap mask":
        kh = np.repeat(x.k, x.q.shape[1] // x.k.shape[1], axis=1)
        scale = x.q.shape[-1] ** -0.5 if impl.scale_default == "rsqrt(D)" else 1.0
        z = np.exp(problem.softcap * np.tanh((scale * (x.q @ kh.mT) + x.bias) / problem.softcap))
        return z / z.sum(-1, keepdims=True) @ np.repeat(x.v, x.q.shape[1] // x.v.shape[1], axis=1)
    (answer,) = expected(impl, problem, x, dtype, impl.profile)
    return answer.values[probe.reads]


def _close(got: Any, want: Array, *, asks_nan: bool) -> bool:
    if got is None or got.shape != want.shape:
        return False
    if not asks_nan and np.isnan(got).any():
        return False
    size = np.nanmax(np.abs(want), initial=1e-3, where=np.isfinite(want))
    return bool(np.allclose(got, want, rtol=0, atol=CLOSE * size, equal_nan=True))


# ── how one sees it ──────────────────────────────────────────────────────────────────────────────────────────────


def _evidence(impl: Implementation, probe: Probe, problem: Problem, x: Numbers, got: Array) -> str:
    seen: dict[str, Callable[[], str]] = {
        "mask": lambda: _attended(got, problem, 0),
        "causal": lambda: _attended(got, problem, 0),
        "window": lambda: _attended(got, problem, problem.T // 2),
        "gqa": lambda: f"with H={problem.H} and K={problem.K}",
        "empty_row": lambda: f"query 1, which may attend nothing, has output {_numbers(got[0, 0, 1])}",
        "layout": lambda: f"of equal weights the output is the mean over keys along {impl.layout!r} alone",
        "scale_default": lambda: f"with D={problem.D} and no scale given",
        "cap_order": lambda: "by the output with a cap of 1 and a bias",
    }
    return seen.get(probe.field, lambda: f"lse[0, 0, 0] is {got.flat[0]:.4g} of {problem.S} keys")()


def _attended(got: Array, problem: Problem, query: int) -> str:
    """Which keys a query attends, read off its output of one-hot values"""
    if problem.S > problem.E:
        return "by the output of a probe"
    keys = np.flatnonzero(got[0, 0, query] > 1e-3)
    listed = ", ".join(map(str, keys)) if len(keys) else "no key"
    return f"with T={problem.T} and S={problem.S} query {query} attends {'keys ' if len(keys) else ''}{listed}"


def _numbers(a: Array) -> str:
    return f"[{', '.join(f'{n:.3g}' for n in a[:3])}{', …' if len(a) > 3 else ''}]"
