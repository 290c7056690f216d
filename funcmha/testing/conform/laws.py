"""Laws that need no reference and no tolerance: what must be 0 is 0, and what must be equal is equal, to the bit.

Two laws compare the implementation with itself where the order of its sums may differ, within the bounds of both.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import Array

from .calling import Results, run
from .cases import Case
from .implementation import Implementation
from .problems import Numbers
from .reference import allowed, expected

Broken = tuple[str, str]  # the quantity, and the law


class _Tried(NamedTuple):
    """A case with its numbers, and what came of it."""

    impl: Implementation
    case: Case
    x: Numbers
    got: Results

    def again(self, x: Numbers, **changes: object) -> Results:
        """The same with other numbers."""
        return run(self.impl, replace(self.case.problem, **changes), x, self.case.dtype)  # type: ignore[arg-type]

    def bounds(self, x: Numbers) -> dict[str, Array]:
        """The bounds of the same with other numbers."""
        return expected(self.impl, self.case.problem, x, self.case.dtype, self.impl.profile)[0].bounds


def broken(impl: Implementation, case: Case, x: Numbers, got: Results) -> Iterator[Broken]:
    """The laws that a case breaks"""
    tried = _Tried(impl, case, x, got)
    for name in got.written:
        yield name, f"the call writes to its input {name}"
    for law in LAWS.get(case.feature, ()):
        yield from law(tried)


# ── to the bit ───────────────────────────────────────────────────────────────────────────────────────────────────


def repeats(t: _Tried) -> Iterator[Broken]:
    """A second call gives the same bits, after another call between."""
    if not t.impl.deterministic:
        return
    t.again(Numbers(*(None if a is None else a[::1] * 1 if a.dtype == bool else a * 0.5 for a in t.x)))
    for name, again in t.again(t.x).values.items():
        if not _same(again, t.got.values[name]):
            yield name, "a second call gives other bits"


def zero_cotangents(t: _Tried) -> Iterator[Broken]:
    """A cotangent of 0 gives gradients of exactly 0."""
    nothing = t.x._replace(**{n: a * 0.0 for n in ("do", "dlse", "dweights") if (a := getattr(t.x, n)) is not None})
    for name, g in _gradients(t.again(nothing)):
        if g is not None and (np.isnan(g).any() or g.any()):
            yield name, "a cotangent of 0 gives a gradient that is not 0"


def is_linear(t: _Tried) -> Iterator[Broken]:
    """Twice the cotangents give twice the gradients, to the bit; of float16, which underflows, not asked."""
    if t.case.dtype == "float16" or not t.impl.deterministic:
        return
    twice = t.again(
        t.x._replace(**{n: 2 * a for n in ("do", "dlse", "dweights") if (a := getattr(t.x, n)) is not None})
    )
    for name, g in _gradients(t.got):
        other = twice.values.get(name)
        if g is not None and other is not None and not _same(other, 2 * g):
            yield name, "twice the cotangent does not give twice the gradient, to the bit"


def masked_keys(t: _Tried) -> Iterator[Broken]:
    """A key that no query attends has gradients of exactly 0, and no effect."""
    mask = allowed(t.impl, t.case.problem, t.x)
    if mask is None or t.x.k.shape[2] == 0:
        return
    group = t.x.q.shape[1] // t.x.k.shape[1]
    attended: Array = np.broadcast_to(mask, (*t.x.q.shape[:-1], t.x.k.shape[2])).any(-2)
    attended = attended.reshape(t.x.k.shape[0], t.x.k.shape[1], group, -1).any(2)
    if attended.all():
        return
    for name in ("dk", "dv"):
        g = t.got.values.get(name)
        if g is not None and g.shape[:3] == attended.shape and (g[~attended] != 0).any():
            yield name, "a key that no query attends has a gradient"
    moved = t.x._replace(k=np.where(attended[..., None], t.x.k, 2 * t.x.k), v=np.where(attended[..., None], t.x.v, 3.0))
    other = t.again(moved)
    some = np.broadcast_to(mask.any(-1), t.x.q.shape[:-1])  # an empty row may be the mean of all values
    if t.impl.deterministic and not _same(other.values["o"][some], t.got.values["o"][some]):
        yield "o", "a key that no query attends has an effect"


def future_cotangents(t: _Tried) -> Iterator[Broken]:
    """The cotangent of a query reaches no key that it does not attend."""
    if t.x.do is None or t.x.q.shape[2] < 2:
        return
    row = t.x.q.shape[2] // 2
    mask = allowed(t.impl, t.case.problem, t.x)
    if mask is None:
        return
    one = np.zeros_like(t.x.do)
    one[:, :, row] = t.x.do[:, :, row]
    group = t.x.q.shape[1] // t.x.k.shape[1]
    reached: Array = np.broadcast_to(mask, (*t.x.q.shape[:-1], t.x.k.shape[2]))[:, :, row]
    reached = reached.reshape(t.x.k.shape[0], t.x.k.shape[1], group, -1).any(2)
    got = t.again(t.x._replace(do=one, dlse=None, dweights=None))
    for name in ("dk", "dv"):
        g = got.values.get(name)
        if g is not None and g.shape[:3] == reached.shape and (g[~reached] != 0).any():
            yield name, "the cotangent of one query reaches keys that it does not attend"
    g = got.values.get("dq")
    if g is not None and g.shape == t.x.q.shape and np.delete(g, row, axis=2).any():
        yield "dq", "the cotangent of one query reaches other queries"


# ── against itself ───────────────────────────────────────────────────────────────────────────────────────────────


def batch_is_its_samples(t: _Tried) -> Iterator[Broken]:
    """The last sample of a batch gives what it gives alone, within the bounds of both."""
    alone = Numbers(*(a if a is None or a.ndim < 3 or a.shape[0] == 1 else a[-1:] for a in t.x))
    got, bounds = t.again(alone, B=1), t.bounds(alone)
    for name in ("o", "lse", "dq", "dk", "dv"):
        yield from _alike(name, got.values, t.got.values, 2 * bounds[name], "a sample of a batch", lambda a: a[-1:])


def groups_are_repeated(t: _Tried) -> Iterator[Broken]:
    """Grouped heads give what repeated keys and values give, summed over each group, within the bounds of both."""
    H, K = t.x.q.shape[1], t.x.k.shape[1]
    if t.impl.refuses(**replace(t.case.problem, K=H).sizes()) is not None:
        return
    x = t.x._replace(k=np.repeat(t.x.k, H // K, 1), v=np.repeat(t.x.v, H // K, 1))
    got, bounds, grouped = t.again(x, K=H).values, t.bounds(x), t.bounds(t.x)

    def of_group(a: Array) -> Array:
        return a if a is None else a.reshape(a.shape[0], K, H // K, *a.shape[2:]).sum(2)

    for name in ("o", "lse", "dq", "dk", "dv"):
        summed = name in ("dk", "dv")
        one = {name: of_group(got.get(name)) if summed else got.get(name)}
        bound = grouped[name] + (of_group(bounds[name]) if summed else bounds[name])
        yield from _alike(name, one, t.got.values, bound, "a group of heads", lambda a: a)


def last_query_alone(t: _Tried) -> Iterator[Broken]:
    """The last query alone gives the last row of all: decoding is the row of a prefill."""
    if t.impl.causal == "top-left" and t.case.problem.causal:
        return
    x = t.x._replace(**{n: a[:, :, -1:] for n in ("q", "do", "dlse", "dweights") if (a := getattr(t.x, n)) is not None})
    if t.impl.refuses(**replace(t.case.problem, T=1).sizes()) is not None:
        return
    got, bounds = t.again(x, T=1).values, t.bounds(x)
    for name in ("o", "lse", "dq"):
        yield from _alike(name, got, t.got.values, 2 * bounds[name], "the last query", lambda a: a[:, :, -1:])


def _alike(name: str, one: Any, all_: Any, bound: Array, of: str, part: Callable[[Any], Any]) -> Iterator[Broken]:
    a, b = one.get(name), all_.get(name)
    if a is None or b is None or a.shape != part(b).shape:
        return
    with np.errstate(invalid="ignore"):
        off = (np.abs(a - part(b)) > bound) | (np.isnan(a) != np.isnan(part(b)))
    if (off & ~(a == part(b))).any():
        yield name, f"{of} alone gives another result than together with the rest"


def _gradients(got: Results) -> list[tuple[str, Array]]:
    return [(name, g) for name, g in got.values.items() if name.startswith("d")]


def _same(a: object, b: object) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(a, b, equal_nan=True))  # type: ignore[arg-type]


# What is asked of each feature
LAWS: dict[str, tuple[Callable[[_Tried], Iterator[Broken]], ...]] = {
    "plain": (repeats, zero_cotangents, is_linear, last_query_alone),
    "causal": (zero_cotangents, future_cotangents, is_linear),
    "window": (future_cotangents,),
    "mask": (masked_keys, future_cotangents),
    "mask and causal": (masked_keys, future_cotangents),
    "empty rows": (zero_cotangents, masked_keys),
    "grouped heads": (groups_are_repeated,),
    "bias": (zero_cotangents,),
    "sink": (zero_cotangents, last_query_alone),
    "appended key": (zero_cotangents, future_cotangents),
    "lse": (zero_cotangents,),
    "batch": (batch_is_its_samples, repeats),
    "widths": (repeats,),
}
