"""Tables of text."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in columns as wide as they need to be; a column whose name begins with > is to the right"""
    names = [name.lstrip(">") for name in columns]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(n) if name[0] == ">" else c.ljust(n) for c, n, name in zip(row, widths, columns, strict=True))
        return "  ".join(cells).rstrip()

    return [line(row) for row in (names, ["─" * n for n in widths], *rows)]
