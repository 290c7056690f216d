"""A whole implementation: its conventions, then every case; the report, by feature."""

from collections.abc import Callable, Iterator
from time import monotonic
from typing import NamedTuple

from .calling import try_a_call
from .cases import FEATURES, LARGE, Case, cases
from .conventions import Mismatch, fitted, mismatches
from .implementation import Implementation
from .problems import Problem
from .verdicts import LOOSE, OK, WRONG, Judged, judge

EXPECTED, UNEXPECTED = "expected", "unexpected pass"
EXIT = {"right": 0, "wrong": 1, "declaration": 2, "nothing": 3}


class Feature(NamedTuple):
    """What came of one feature in one dtype."""

    name: str
    dtype: str
    cases: int
    worst: dict[str, float]  # by quantity: the largest error over its bound
    verdict: str  # ok, loose, wrong, expected, or unexpected pass
    failures: tuple[Judged, ...]  # loose and wrong ones, the worst of each quantity and law


class Report(NamedTuple):
    implementation: Implementation
    mismatches: tuple[Mismatch, ...]
    features: tuple[Feature, ...]
    refused: tuple[tuple[Case, str], ...]  # cases outside of the declared limits
    unmet: tuple[str, ...]  # names in `expected` that no case has
    left_out: int  # cases for which there was no time
    strict: bool = False

    @property
    def ok(self) -> bool:
        """Whether all is right; with `strict`, to the bound."""
        return self.status == "right"

    @property
    def status(self) -> str:
        """One of EXIT: "right", "wrong", "declaration", "nothing"."""
        if self.mismatches or self.unmet:
            return "declaration"
        bad = {WRONG, UNEXPECTED, *([LOOSE] if self.strict else [])}
        if any(feature.verdict in bad for feature in self.features):
            return "wrong"
        return "right" if self.features else "nothing"


def check(
    impl: Implementation,
    *,
    seed: int = 0,
    large: bool = False,
    strict: bool = False,
    seconds: float = 60.0,
    select: Callable[[Case], bool] = lambda case: True,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Whether an implementation of attention is right, forward and every gradient, feature by feature

    Its conventions are measured first, and nothing is judged where they are not as declared. `select` says which cases
    are run, `progress` is called with what is being done. After so many seconds no further case begins: the first case
    of every feature comes before the second of any. `strict` fails on errors of up to 8 times the bound too, which are
    called loose.
    """
    if not isinstance(impl, Implementation):
        raise TypeError(f"impl must be an Implementation, got {type(impl).__name__}")
    end = monotonic() + seconds
    progress("conventions")
    plain = fitted(impl, Problem())
    if plain is not None:
        try_a_call(impl, plain)
    wrong = tuple(mismatches(impl))
    if wrong:
        return Report(impl, wrong, (), (), (), 0, strict)
    listed = [(case, why) for case, why in cases(impl, seed=seed, large=large) if select(case)]
    found: dict[tuple[str, str], list[list[Judged]]] = {}
    left_out = 0
    for case, _ in (each for each in listed if each[1] is None):
        if monotonic() > end:
            left_out += 1
            continue
        progress(f"{case.feature}, {case.dtype}")
        found.setdefault((case.feature, case.dtype), []).append(judge(impl, case))
    refused = tuple((case, why) for case, why in listed if why is not None)
    return report_of(impl, found, refused=refused, left_out=left_out, strict=strict)


def report_of(
    impl: Implementation,
    found: dict[tuple[str, str], list[list[Judged]]],
    *,
    refused: tuple[tuple[Case, str], ...] = (),
    left_out: int = 0,
    strict: bool = False,
) -> Report:
    """The report on what was judged, by feature and dtype"""
    order = [(feature, dtype) for dtype in impl.dtypes for feature in FEATURES | LARGE]
    features = tuple(_feature(impl, *of, found[of]) for of in order if of in found)
    return Report(impl, (), features, refused, _unmet(impl, features), left_out, strict)


def assert_conforms(
    impl: Implementation, *, seed: int = 0, large: bool = False, strict: bool = False, seconds: float = 60.0
) -> None:
    """Raise AssertionError, with the report as text, unless `check` finds all right."""
    report = check(impl, seed=seed, large=large, strict=strict, seconds=seconds)
    if not report.ok:
        from .text import told

        raise AssertionError(told(report))


def _unmet(impl: Implementation, features: tuple[Feature, ...]) -> tuple[str, ...]:
    """The names in `expected` of features that there are not at all, or not with such a quantity"""
    known = {*FEATURES, *LARGE} - {feature.name for feature in features}
    known |= {f"{feature.name}{of}" for feature in features for of in ("", *(f"/{name}" for name in feature.worst))}
    return tuple(name for name in impl.expected if name not in known and name.partition("/")[0] not in known)


def _feature(impl: Implementation, name: str, dtype: str, judged: list[list[Judged]]) -> Feature:
    rows = [row for each in judged for row in each]
    worst: dict[str, float] = {}
    for row in rows:
        worst[row.quantity] = max(worst.get(row.quantity, 0.0), row.ratio)
    failures = tuple(_worst_of_each(row for row in rows if row.verdict != OK))
    return Feature(name, dtype, len(judged), worst, _verdict(impl, name, rows), failures)


def _worst_of_each(rows: Iterator[Judged]) -> Iterator[Judged]:
    """The worst of each quantity, and each law that it breaks."""
    by: dict[tuple[str, str, str], Judged] = {}
    for row in rows:
        key = row.quantity, row.verdict, row.why if row.law else ""
        if key not in by or row.ratio > by[key].ratio:
            by[key] = row
    return iter(by.values())


def _verdict(impl: Implementation, name: str, rows: list[Judged]) -> str:
    """The worst of all rows but those that are expected to fail, which must fail"""
    expected = {
        key for key in (f"{name}/{row.quantity}" for row in rows) if key in impl.expected or name in impl.expected
    }
    failing = {row.key for row in rows if row.verdict == WRONG}
    if name in impl.expected:
        return EXPECTED if failing else UNEXPECTED
    if expected - failing:
        return UNEXPECTED
    rest = [row.verdict for row in rows if row.key not in expected]
    worst = next((v for v in (WRONG, LOOSE) if v in rest), OK)
    return EXPECTED if worst == OK and expected else worst
