"""What is printed where a person may be looking: tables, and a line of progress."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def shape_text(shape: tuple[int, ...]) -> str:
    """(2, 3)  →  2 × 3"""
    return " × ".join(map(str, shape)) or "scalar"


def show_progress(text: str) -> None:
    """One line, of what is being done now, on a terminal only; nothing is left of it after ''"""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text and text + ' …'}", end="", file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich on a terminal, if it is installed; elsewhere in columns as wide as they need to be. > is to the right."""
    if sys.stdout.isatty() and find_spec("rich"):
        _print_rich(title, columns, rows)
        return
    from funcmha.testing.table import table

    print(f"\n{title}\n", *table(columns, rows), sep="\n")


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[-1].startswith("FAILS") else None)
    Console().print(table)
