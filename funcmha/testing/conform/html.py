"""The report as one HTML file that needs nothing else: a table, and for each failure where it is, why, and a script."""

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from .checking import EXPECTED, UNEXPECTED, Feature, Report
from .heatmap import LEGEND, Map, maps
from .implementation import Implementation
from .reference import QUANTITIES
from .reproduction import reproduction
from .shrink import SECONDS, shrink
from .text import head, number, summary
from .verdicts import LOOSE, OK, WRONG, Judged, errors

MARKS = {OK: "✓ ok", LOOSE: "≈ loose", WRONG: "✗ wrong", EXPECTED: "✗ as expected", UNEXPECTED: "✓ unexpectedly"}


class Shown(NamedTuple):
    """A failure, and what is drawn of it."""

    row: Judged
    maps: list[Map]
    script: str


def as_html(report: Report, target: str, *, again: bool = True, seconds: float = 4 * SECONDS) -> str:
    """The page; `again` runs each failing case for its picture, and makes it small, in so many seconds for all"""
    rows = [row for feature in report.features for row in feature.failures]
    impl = report.implementation
    shown = [_shown(impl, row, target, seconds / len(rows)) if again else Shown(row, [], "") for row in rows]
    return _PAGE.format(
        title=escape(f"conform: {impl.name}"),
        style=_STYLE,
        head=escape(head(report)),
        status=escape(report.status),
        summary=escape(summary(report)),
        mismatches="".join(f"<p class=wrong>{escape(str(m))}</p>" for m in report.mismatches),
        conventions=", ".join(f"{escape(n)}: {escape(str(v))}" for n, v in impl.declared().items()),
        table=_table(report, {id(each.row): i for i, each in enumerate(shown)}),
        legend="".join(f'<li><i style="background:{colour}"></i>{told}</li>' for _, colour, told in LEGEND),
        failures="".join(_failure(i, each) for i, each in enumerate(shown)) or "<p>None.</p>",
        refused="".join(_refused(report)),
    )


def _shown(impl: Implementation, row: Judged, target: str, seconds: float) -> Shown:
    if row.verdict != WRONG:
        return Shown(row, _drawn(impl, row), "")
    small = shrink(impl, row, seconds=min(seconds, SECONDS))
    return Shown(row, _drawn(impl, row), reproduction(impl, small, target))


def _drawn(impl: Implementation, row: Judged) -> list[Map]:
    if row.law or row.quantity == "call":
        return []
    try:
        return maps(row.quantity, errors(impl, row.case)[row.quantity])
    except Exception:  # it raises now and then
        return []


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(report: Report, places: dict[int, int]) -> str:
    columns = [q for q in (*QUANTITIES, "call") if any(q in f.worst for f in report.features)]
    if not report.features:
        return "<p>Nothing was judged.</p>"
    names = "".join(f'<th scope="col">{name}</th>' for name in ("feature", "dtype", "verdict", "cases", *columns))
    rows = "".join(_line(feature, columns, places) for feature in report.features)
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>"


def _line(feature: Feature, columns: list[str], places: dict[int, int]) -> str:
    by = {row.quantity: row for row in sorted(feature.failures, key=lambda row: (row.verdict == WRONG, row.ratio))}
    cells = "".join(_cell(feature.worst.get(name), by.get(name), places) for name in columns)
    kind = "ok" if feature.verdict in (OK, EXPECTED) else LOOSE if feature.verdict == LOOSE else WRONG
    begin = f'<th scope="row">{escape(feature.name)}</th><td>{feature.dtype}</td>'
    verdict = f"<td class={kind}>{MARKS[feature.verdict]}</td>"
    return f"<tr>{begin}{verdict}<td>{feature.cases}</td>{cells}</tr>"


def _cell(ratio: float | None, failure: Judged | None, places: dict[int, int]) -> str:
    if ratio is None:
        return "<td>–</td>"
    if failure is None:
        return f"<td>{number(ratio)}</td>"
    link = f'<a href="#failure-{places[id(failure)]}">{MARKS[failure.verdict][0]} {number(ratio)}</a>'
    return f"<td class={failure.verdict}>{link}</td>"


def _refused(report: Report) -> Iterator[str]:
    refused = dict.fromkeys(f"{case.feature} ({why})" for case, why in report.refused)
    if refused:
        yield f"<h2>Refused, as declared</h2><p>{escape(', '.join(refused))}</p>"
    if report.left_out:
        yield f"<h2>Not run</h2><p>{report.left_out} cases, for which there was no time, or no answer</p>"


# ── a failure ────────────────────────────────────────────────────────────────────────────────────────────────────


def _failure(i: int, shown: Shown) -> str:
    row = shown.row
    ratio = "" if row.law or row.quantity == "call" else f", {number(row.ratio)} times the bound"
    title = f"{MARKS[row.verdict][0]} {row.case.feature}, {row.case.dtype}: {row.quantity}{ratio}"
    lines = [f"<section id=failure-{i}><h3>{escape(title)}</h3><p>{escape(row.why)}</p>"]
    lines += [f"<p><b>Perhaps:</b> {escape(row.diagnosis)}</p>"] if row.diagnosis else []
    if shown.maps:
        drawn = "".join(_figure(row.quantity, each) for each in shown.maps)
        lines.append(f"<div class=maps>{drawn}</div>")
    lines.append(f"<p><code>{escape(row.case.told())}</code><br><code>{escape(row.case.replay)}</code></p>")
    if shown.script:
        lines.append(f"<details><summary>made small</summary><pre>{escape(shown.script)}</pre></details>")
    return "".join([*lines, "</section>"])


def _figure(quantity: str, drawn: Map) -> str:
    n, m = drawn.shape
    side = max(3, min(14, 420 // max(n, m)))
    alt = f"|error| / bound of {quantity}: {drawn.down or 'one row'} down, {drawn.across} across"
    image = f'<img src="{drawn.source}" width={m * side} height={n * side} alt="{escape(alt)}">'
    axes = f"→ {escape(drawn.across)}" + (f"<br>↓ {escape(drawn.down)}" if drawn.down else "")
    title = f"<b>{escape(quantity)}, {escape(drawn.says or 'all')}</b>"
    return f"<figure>{title}{image}<figcaption>{axes}</figcaption></figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
<p>{head}</p>
<p class={status}><b>{summary}</b></p>
{mismatches}
<details><summary>conventions</summary><p>{conventions}</p></details>
<h2>Features</h2>
<p>The largest |error| / bound of each quantity: up to 1 ok, up to 8 loose, above wrong. The bounds follow from the
roundings that the implementation declares.</p>
{table}
<h2>Failures</h2>
<p>The pictures are |error| / bound, entry by entry, the largest where there are more than pixels:</p>
<ul class=legend>{legend}</ul>
{failures}
{refused}
</main></body></html>
"""
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2433; --quiet: #5a6375; --line: #d5dae3; --code: #f2f4f8;
  --ok: #e3f0fb; --loose: #fdeeb5; --wrong: #fbd5c0; --link: #0b57a4 }
@media (prefers-color-scheme: dark) { :root { --back: #14171e; --text: #e4e8f0; --quiet: #9aa4b8; --line: #343b4a;
  --code: #1e232d; --ok: #16324a; --loose: #4d3f0c; --wrong: #5c2a12; --link: #8ec1f5 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.35rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem }
h3 { font-size: 1rem; margin: 0 0 .5rem } a { color: var(--link) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
tr:last-child > * { border-bottom: 0 } th:first-child, td:nth-child(2) { text-align: left; font-weight: 600 }
td:nth-child(2), td:nth-child(3), th:nth-child(2), th:nth-child(3) { text-align: left; font-weight: normal }
thead th { color: var(--quiet); font-weight: normal }
.ok, .right { background: var(--ok) } .loose { background: var(--loose) }
.wrong, .declaration, .nothing { background: var(--wrong) }
p.right, p.wrong, p.declaration, p.nothing { padding: .4rem .7rem; border-radius: 6px }
section { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 1rem 0 }
section p { overflow-wrap: anywhere } code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: var(--code); padding: .7rem; border-radius: 6px; overflow-x: auto }
summary { cursor: pointer; color: var(--link) }
.maps { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start }
figure { margin: 0; max-width: 100% }
figcaption { font-size: 13px; color: var(--quiet) }
img { display: block; margin: .2rem 0; image-rendering: pixelated; max-width: 100%; height: auto;
  border: 1px solid var(--line) }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.12em;
  border: 1px solid var(--line) }
"""
