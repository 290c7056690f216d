"""The verdict on one case: every output and gradient against its bound, and what explains one that is outside."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from funcmha._arrays import HALF, Array
from funcmha.testing.profiles import FLASH, STORED, Profile

from .calling import Results, run
from .cases import Case
from .diagnosis import diagnosis
from .implementation import Implementation
from .laws import broken
from .problems import Numbers, numbers
from .reference import Answer, allowed, expected, without_cotangents

OK, LOOSE, WRONG = "ok", "loose", "wrong"
LIMITS = {OK: 1.0, LOOSE: 8.0}


class Judged(NamedTuple):
    """One quantity of one case."""

    case: Case
    quantity: str
    ratio: float  # the largest |got − want| / bound
    verdict: str
    why: str = ""  # the worst entry, the law that is broken, or the rounding that would explain it
    diagnosis: str = ""  # what may have gone wrong
    law: bool = False  # whether it is a law that is broken

    @property
    def key(self) -> str:
        """As `expected` of a declaration names it."""
        return f"{self.case.feature}/{self.quantity}"


def judge(impl: Implementation, case: Case) -> list[Judged]:
    """Every quantity of a case; one row for the call where it raises or does not return what it declares"""
    return judge_numbers(impl, case, numbers(case.problem, case.dtype))


def judge_numbers(impl: Implementation, case: Case, x: Numbers, *, laws: bool = True) -> list[Judged]:
    """`judge`, of these numbers"""
    problem, dtype = case.problem, case.dtype
    x = without_cotangents(impl, x, allowed(impl, problem, x))
    try:
        got = run(impl, problem, x, dtype)
    except Exception as error:  # any library's own
        return [_raised(case, error)]
    rows = list(_compared(impl, case, x, got))
    if laws and not any(row.verdict == WRONG and " are NaN" in row.why for row in rows):
        try:
            for quantity, why in broken(impl, case, x, got):
                rows.append(Judged(case, quantity, np.inf, WRONG, why, law=True))
        except Exception as error:  # of the same function with a batch of one, or one query
            rows.append(_raised(case, error))
    return rows


def _raised(case: Case, error: Exception) -> Judged:
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Judged(case, "call", np.inf, WRONG, why, DECLARE.get(case.feature, ""))


DECLARE = {  # what says that a feature is refused on purpose
    "grouped heads": "if it takes as many key/value heads as query heads alone, declare gqa=None",
    "widths": 'if it refuses them on purpose, declare limits={"E": "D"}, or which D it takes',
    "size 0": 'if it refuses them on purpose, declare limits={"T": (1, 2**31)}, and so on',
    "causal, fewer keys": 'if it takes as many queries as keys alone, declare limits={"S": "T"}',
}


def judge_values(impl: Implementation, case: Case, x: Numbers, values: dict[str, Array]) -> list[Judged]:
    """What was computed elsewhere, in the form of funcmha"""
    present = {name: np.asarray(a, np.float64) for name, a in values.items() if a is not None}
    return list(_compared(impl, case, x, Results({**values, **present}, {})))


def _compared(impl: Implementation, case: Case, x: Numbers, got: Results) -> Iterator[Judged]:
    answer, all_ratios = _against_the_best(impl, case, x, got)
    wrong = {name for name, r in all_ratios.items() if np.max(r, initial=0.0) > LIMITS[LOOSE]}
    guess = diagnosis(impl, case, x, got, answer, wrong) if wrong else ""
    for name, r in all_ratios.items():
        kind = got.dtypes.get(name, case.dtype)
        ratio = float(np.max(r, initial=0.0))
        if name in ("o", "dq", "dk", "dv") and kind != case.dtype:
            yield Judged(case, name, ratio, WRONG, f"{case.dtype} in, {kind} out")
        elif ratio <= LIMITS[OK]:
            yield Judged(case, name, ratio, OK)
        elif ratio <= LIMITS[LOOSE]:
            why = _explained(impl, case, x, got, name) or "no rounding of one intermediate explains it"
            yield Judged(case, name, ratio, LOOSE, why)
        else:
            rounding = _explained(impl, case, x, got, name) if case.dtype in HALF and np.isfinite(ratio) else ""
            yield Judged(case, name, ratio, WRONG, _worst(got, answer, name, r), rounding or guess)


def errors(impl: Implementation, case: Case) -> dict[str, Array]:
    """|got − want| / bound of every quantity of a case, entry by entry"""
    x = numbers(case.problem, case.dtype)
    x = without_cotangents(impl, x, allowed(impl, case.problem, x))
    return _against_the_best(impl, case, x, run(impl, case.problem, x, case.dtype))[1]


def _against_the_best(impl: Implementation, case: Case, x: Numbers, got: Results) -> tuple[Answer, dict[str, Array]]:
    """The answer that fits best, one for all quantities, and the ratios under it"""
    answers = expected(impl, case.problem, x, case.dtype, impl.profile)
    names = [name for name in answers[0].values if name in got.values]
    each = [{name: ratios(got.values[name], answer, name) for name in names} for answer in answers]
    worst = [max((float(np.max(r, initial=0.0)) for r in of.values()), default=0.0) for of in each]
    best = int(np.argmin(worst))
    return answers[best], each[best]


def ratios(got: Array, answer: Answer, name: str) -> Array:
    """|got − want| / bound, entry by entry; ∞ for what is missing, NaN, of another shape, or not exactly 0"""
    want, bound = answer.values[name], answer.bounds[name]
    if got is None:
        return np.zeros(()) if not want.any() else np.full((), np.inf)
    if got.shape != want.shape:
        return np.full((), np.inf)
    with np.errstate(all="ignore"):
        r = np.abs(got - want) / bound
    return np.where((got == want) | np.isposinf(bound), 0.0, np.where(np.isfinite(r), r, np.inf))


def _worst(got: Results, answer: Answer, name: str, r: Array) -> str:
    """Where it is wrong: the first entry and the worst, or what is missing"""
    value, want = got.values[name], answer.values[name]
    if value is None:
        return "no gradient came: the library does not see the output depend on it"
    if value.shape != want.shape:
        return f"must have shape {want.shape}, got {value.shape}"
    outside = np.argwhere(r > LIMITS[OK])
    first, worst = tuple(outside[0]), np.unravel_index(np.argmax(r), r.shape)
    count = f"{len(outside)} of {r.size} entries are outside, the first {_at(name, first)}"
    if np.isnan(value).any():
        first = np.argwhere(np.isnan(value))[0]
        return f"{np.isnan(value).sum()} of {value.size} entries are NaN, the first {_at(name, first)}"
    if not value.any():
        return f"all of it is 0, and {_at(name, worst)} must be {want[worst]:.6g}"
    must = f"{_at(name, worst)} must be {want[worst]:.6g} within {answer.bounds[name][worst]:.2g}"
    return f"{must}, got {value[worst]:.6g}; {count}"


def _at(name: str, index: Any) -> str:
    return f"{name}[{', '.join(map(str, index))}]"


def _explained(impl: Implementation, case: Case, x: Numbers, got: Results, name: str) -> str:
    """The rounding on the way that would explain an error, if there is one"""
    for told, profile in _more(impl.profile):
        for answer in expected(impl, case.problem, x, case.dtype, profile):
            if float(np.max(ratios(got.values[name], answer, name), initial=0.0)) <= LIMITS[OK]:
                return f"as if {told}"
    return ""


FORMULAS = {
    "recomputed": 'the gradient recomputed the weights from the log-sum-exp (arithmetic="flash")',
    "centred": "the gradient were p (dp − δ) as it stands (centred=False)",
    "base2": "scores were multiplied by log₂ e (base2=True)",
}


def _more(profile: Profile) -> Iterator[tuple[str, Profile]]:
    for field, told in FORMULAS.items():
        if getattr(profile, field) == getattr(Profile(), field):
            changes: dict[str, Any] = {field: not getattr(profile, field)}
            yield told, profile._replace(**changes)
    for name, told in STORED.items():
        if name in ("dk", "dv"):
            with_tiles = profile._replace(stored=(*profile.stored, name), tile=profile.tile or 32)
            yield (
                f"{name} were stored after each tile of {with_tiles.tile} queries ({name}, tile={with_tiles.tile})",
                with_tiles,
            )
        elif name not in profile.stored:
            yield f"stored in half: {told} ({name})", profile._replace(stored=(*profile.stored, name))
    tile = profile.tile or 32
    both = profile._replace(stored=(*profile.stored, "dk", "dv"), tile=tile)
    yield f"dk and dv were stored after each tile of {tile} queries (dk, dv, tile={tile})", both
    if not {*FLASH.stored} <= {*profile.stored}:
        yield "it computed in the manner of FlashAttention (arithmetic='flash')", FLASH
