"""Tables of plain text, that read the same on a terminal and in a file."""

from collections.abc import Sequence


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str] | tuple[str, str]]) -> None:
    """The first column to the left, the others to the right. A row of two is a name and a remark, across the rest."""
    whole = [columns, *(row for row in rows if len(row) == len(columns))]
    widths = [max(len(row[i]) for row in whole) for i in range(len(columns))]
    widths[0] = max([widths[0], *(len(row[0]) for row in rows)])
    print(f"\n{title}\n")
    for row in [columns, ["─" * width for width in widths], *rows]:
        rest = zip(row[1:], widths[1:], strict=True) if len(row) == len(columns) else [(row[1], 0)]
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in rest)]
        print("  ".join(cells).rstrip(), flush=True)


def seconds(s: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if s >= size or unit == "µs":
            return f"{_digits(s / size)} {unit}"
    raise AssertionError


def megabytes(n: float) -> str:
    return f"{_digits(n / 1e6)} MB"


def ratio(x: float, y: float | None) -> str:
    return "" if not y else f"{x / y:.2f}"


def _digits(x: float) -> str:
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}"
