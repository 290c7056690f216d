"""A plugin of pytest: `pytest -p funcmha.testing.pytest --conform=FILE.py:impl`

One test for each feature, dtype and quantity, `conform[grouped-heads-bfloat16-dk]`, and one for the conventions. What a
declaration expects to fail is a strict xfail.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from .conform.cases import cases, slug
from .conform.checking import EXPECTED, Feature, Report, check
from .conform.command import load
from .conform.implementation import DeclarationError, Implementation
from .conform.text import failure
from .conform.verdicts import OK, WRONG


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the plugin."""
    group = parser.getgroup("funcmha")
    group.addoption("--conform", action="append", default=[], metavar="TARGET", help="an Implementation to judge")
    group.addoption("--conform-seconds", type=float, default=60.0, help="for each feature in one dtype")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of every target, after those of files."""
    for target in config.getoption("--conform"):
        judged = _Judged(load(target), config.getoption("--conform-seconds"))
        for feature, dtype, quantity in judged.listed():
            name = f"conform[{'-'.join(filter(None, (slug(feature), dtype, quantity)))}]"
            items.append(ConformItem.from_parent(session, name=name, judged=judged, of=(feature, dtype, quantity)))


class _Judged:
    """An implementation, and what was found of the features that were asked for"""

    def __init__(self, impl: Implementation, seconds: float) -> None:
        self.impl, self.seconds = impl, seconds
        self.found: dict[tuple[str, str], Report] = {}

    def listed(self) -> Iterator[tuple[str, str, str]]:
        yield "conventions", "", ""
        names: dict[tuple[str, str], dict[str, None]] = {}
        for case, refused in cases(self.impl):
            if refused is None:
                taken = {"bias": case.problem.bias, "sink": case.problem.sink}
                due = [n for n in self.impl.differentiates if taken.get(n, True) is not None]
                grads = [f"d{n}" for n in due if case.problem.only in (None, n) or self.impl.backward is not None]
                names.setdefault((case.feature, case.dtype), {}).update(dict.fromkeys([*self.impl.returned, *grads]))
        for (feature, dtype), quantities in names.items():
            yield from ((feature, dtype, quantity) for quantity in quantities)

    def report(self, feature: str, dtype: str) -> Report:
        if (feature, dtype) not in self.found:
            self.found[feature, dtype] = check(
                self.impl, seconds=self.seconds, select=lambda case: (case.feature, case.dtype) == (feature, dtype)
            )
        return self.found[feature, dtype]


class ConformItem(pytest.Item):
    """One quantity of one feature in one dtype"""

    def __init__(self, *, judged: _Judged, of: tuple[str, str, str], **rest: Any) -> None:
        super().__init__(**rest)
        self.judged, self.of = judged, of

    def runtest(self) -> None:
        """Fail with what the report says."""
        name, dtype, quantity = self.of
        try:
            report = self.judged.report(name, dtype)
        except DeclarationError as error:
            pytest.fail(str(error), pytrace=False)
        if report.mismatches:
            pytest.fail("\n".join(map(str, report.mismatches)), pytrace=False)
        if not report.features:
            if name != "conventions":
                pytest.skip("there was no time")
            return
        self._judge(report.features[0], quantity)

    def _judge(self, feature: Feature, quantity: str) -> None:
        expected = self.judged.impl.expected
        why = expected.get(f"{feature.name}/{quantity}", expected.get(feature.name))
        rows = [row for row in feature.failures if row.quantity in (quantity, "call") and row.verdict == WRONG]
        if rows and why is not None:
            pytest.xfail(why)
        if rows:
            pytest.fail("\n".join(line for row in rows for line in failure(row)), pytrace=False)
        if why is not None and feature.verdict not in (EXPECTED, OK):
            pytest.fail(f"expected to fail and does not: {why}", pytrace=False)

    def reportinfo(self) -> tuple[Any, None, str]:
        """Where it is said to be."""
        return self.path, None, self.name
