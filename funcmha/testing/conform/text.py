"""The report as text, JSON and JUnit XML."""

import json
from math import isfinite, isinf
from typing import Any
from xml.etree import ElementTree

from funcmha.testing.table import table

from .checking import EXPECTED, Feature, Report
from .reference import QUANTITIES
from .verdicts import LOOSE, OK, WRONG, Judged


def told(report: Report, small: str = "") -> str:
    """One line a feature, then what is wrong, a small case of it, what was refused and what there was no time for."""
    impl = report.implementation
    lines = [head(report), f"conventions: {' · '.join(f'{n} {v}' for n, v in _conventions(report).items())}"]
    if report.mismatches:
        return "\n".join([*lines, "", *(str(m) for m in report.mismatches), "", "nothing was judged"])
    shown = [q for q in (*QUANTITIES, "call") if any(q in f.worst for f in report.features)]
    columns = ("feature", "dtype", ">cases", *(f">{q}" for q in shown), "verdict")
    rows = [(f.name, f.dtype, str(f.cases), *(_cell(f, q) for q in shown), f.verdict) for f in report.features]
    lines += ["", *(table(columns, rows) if rows else [_why_nothing(report)])]
    for feature in report.features:
        lines += [line for row in feature.failures for line in failure(row)]
    lines += [
        "",
        "the first of these, made small:",
        "",
        *(f"    {line}".rstrip() for line in small.splitlines()),
    ] * bool(small)
    lines += _rest(report)
    return "\n".join([*lines, "", f"{impl.name}: {summary(report)}"])


def _why_nothing(report: Report) -> str:
    impl = report.implementation
    options = ", ".join(impl.options) or "no options"
    return f"nothing could be run: forward takes {options}, and returns {', '.join(impl.returned)}"


def head(report: Report) -> str:
    """The name, the versions, the device and the arithmetic"""
    impl = report.implementation
    versions = ", ".join(f"{name} {version}" for name, version in impl.versions.items())
    profile = impl.arithmetic if isinstance(impl.arithmetic, str) else impl.profile
    return " · ".join(
        part for part in (impl.name, versions, impl.device or "", f"arithmetic {_profile(profile)}") if part
    )


def _profile(profile: Any) -> str:
    if isinstance(profile, str):
        return profile
    usual = type(profile)()
    differ = {n: v for n, v in profile._asdict().items() if v != getattr(usual, n)}
    return f"({', '.join(f'{n}={v!r}' for n, v in differ.items())})" if differ else "strict"


def _conventions(report: Report) -> dict[str, str]:
    """Those that matter for what the forward takes and returns."""
    impl, options = report.implementation, report.implementation.options
    shown = {"layout": impl.layout, "empty row": impl.empty_row, "gqa": impl.gqa or "none"}
    shown |= {n: getattr(impl, n) for n in ("mask", "causal", "window") if n in options}
    if "lse" in impl.returned:
        shown["lse"] = f"{impl.lse_layout}, base {impl.lse_base}"
    return shown


def _cell(feature: Feature, quantity: str) -> str:
    ratio = feature.worst.get(quantity)
    return "–" if ratio is None else number(ratio)


def number(ratio: float) -> str:
    """An error over its bound"""
    return "wrong" if isinf(ratio) else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"


def failure(row: Judged) -> list[str]:
    """What is wrong, and how to see it again"""
    ratio = "" if isinf(row.ratio) else f", {number(row.ratio)} times the bound"
    lines = ["", f"{row.verdict.upper()}  {row.case.feature}, {row.case.dtype}: {row.quantity}{ratio}", f"  {row.why}"]
    lines += [f"  {row.diagnosis}"] if row.diagnosis else []
    return [*lines, f"  {row.case.told()}", f"  replay: {row.case.replay}"]


def _rest(report: Report) -> list[str]:
    lines = [""]
    if report.refused:
        refused = dict.fromkeys(f"{case.feature} ({why})" for case, why in report.refused)
        lines.append(f"refused, as declared: {', '.join(refused)}")
    if report.left_out:
        lines.append(f"not run: {report.left_out} cases, for which there was no time, or no answer")
    for feature in report.features:
        if feature.verdict == EXPECTED:
            reasons = {v for n, v in report.implementation.expected.items() if n.partition("/")[0] == feature.name}
            lines.append(f"fails as expected: {feature.name}, {feature.dtype}: {'; '.join(sorted(reasons))}")
    lines += [f"expected names {name!r}, which no feature has" for name in report.unmet]
    return lines if len(lines) > 1 else []


def summary(report: Report) -> str:
    """The status, and how many features have which verdict"""
    counts = {
        v: sum(f.verdict == v for f in report.features) for v in dict.fromkeys(f.verdict for f in report.features)
    }
    listed = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return f"{report.status} ({listed})" if listed else report.status


def nearer(one: Report, other: Report) -> str:
    """Of two implementations, the worst error over its bound of each, and whose is smaller, by feature and quantity"""
    judged = {(f.name, f.dtype): f.worst for f in other.features}
    rows, wins = [], [0, 0]
    for feature in one.features:
        for quantity, a in feature.worst.items():
            b = judged.get((feature.name, feature.dtype), {}).get(quantity)
            if b is None:
                continue
            alike = a == b or abs(a - b) <= 0.05 * max(a, b)
            wins[0] += not alike and a < b
            wins[1] += not alike and b < a
            cells = number(a), number(b), "alike" if alike else "first" if a < b else "second"
            rows.append((feature.name, feature.dtype, quantity, *cells))
    names = [report.implementation.name for report in (one, other)]
    if not rows:
        return "\n".join(told(report) for report in (one, other))
    columns = ("feature", "dtype", "quantity", ">first", ">second", "nearer")
    head = [f"first: {names[0]} ({one.status})", f"second: {names[1]} ({other.status})", ""]
    return "\n".join([*head, *table(columns, rows), "", f"nearer: first {wins[0]}, second {wins[1]} of {len(rows)}"])


# ── for machines ─────────────────────────────────────────────────────────────────────────────────────────────────


def as_json(report: Report) -> str:
    """Everything that the text has; null for an infinite ratio."""
    impl = report.implementation
    return json.dumps(
        {
            "implementation": impl.name,
            "versions": dict(impl.versions),
            "library": impl.library,
            "device": impl.device,
            "arithmetic": impl.profile._asdict(),
            "conventions": impl.declared(),
            "status": report.status,
            "mismatches": [m._asdict() for m in report.mismatches],
            "features": [_plain(f) for f in report.features],
            "refused": [{"case": case.name, "why": why} for case, why in report.refused],
            "left_out": report.left_out,
            "unmet": list(report.unmet),
        },
        indent=2,
    )


def _plain(feature: Feature) -> dict[str, Any]:
    rows = [
        {
            "quantity": row.quantity,
            "verdict": row.verdict,
            "ratio": row.ratio if isfinite(row.ratio) else None,
            "why": row.why,
            "diagnosis": row.diagnosis,
            "case": row.case.name,
            "problem": row.case.told(),
        }
        for row in feature.failures
    ]
    worst = {name: ratio if isfinite(ratio) else None for name, ratio in feature.worst.items()}
    return feature._asdict() | {"worst": worst, "failures": rows}


def as_junit(report: Report) -> str:
    """One test case for each feature, dtype and quantity; loose is a failure with --strict alone."""
    bad = {WRONG} | ({LOOSE} if report.strict else set())
    suite = ElementTree.Element("testsuite", name=f"conform {report.implementation.name}")
    for mismatch in report.mismatches:
        _element(suite, "conventions", mismatch.field, str(mismatch))
    for feature in report.features:
        names = dict.fromkeys([*feature.worst, *(row.quantity for row in feature.failures)])
        for name in names:
            rows = [row for row in feature.failures if row.quantity == name and row.verdict in bad]
            known = feature.verdict == EXPECTED
            text = "\n".join(f"{row.why}\n{row.case.told()}\n{row.case.replay}" for row in rows)
            _element(suite, f"{feature.name}.{feature.dtype}", name, None if known or not rows else text)
        if feature.verdict not in (OK, LOOSE, WRONG, EXPECTED):
            _element(suite, f"{feature.name}.{feature.dtype}", "expected", feature.verdict)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(len(case) for case in suite)))
    return ElementTree.tostring(suite, encoding="unicode")


def _element(suite: ElementTree.Element, feature: str, name: str, failure: str | None) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=feature, name=name)
    if failure is not None:
        ElementTree.SubElement(case, "failure", message=failure.splitlines()[0] if failure else "").text = failure
