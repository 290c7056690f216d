"""`funcmha verify`: funcmha against PyTorch, value by value."""

import argparse
import json
import platform
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from funcmha import __version__

from . import BadInputError
from .terminal import print_table, shape_text, show_progress


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return 1 where a value does not agree."""
    if find_spec("torch") is None:
        raise BadInputError("verify compares with PyTorch, which is not installed: pip install 'funcmha[torch]'")
    if args.width % args.heads:
        raise BadInputError(f"argument --width: must be a multiple of --heads {args.heads}, got {args.width}")
    from funcmha.testing.verify import TOLERANCE, verify

    if args.html:
        _check_html(args.html)

    dtypes = (args.dtype,) if args.dtype else ("float32", "float64")
    sides = {name: getattr(args, name) for name in ("batch", "length", "width", "heads", "seed")}
    if not args.json:
        print(", ".join(f"{name} {number}" for name, number in _versions().items()))
        engine = f", engine {args.engine}" if args.engine else ""
        print("B, T, C, H = {batch}, {length}, {width}, {heads}, seed {seed}".format(**sides) + engine)
    rows = list(verify(**sides, dtypes=dtypes, engine=args.engine, progress=show_progress))
    show_progress("")
    failed = [row for row in rows if not row.ok]
    if args.html:
        _write_html(args, rows, sides)

    if args.json:
        listed = [{name: _finite(x) for name, x in row._asdict().items()} | {"ok": row.ok} for row in rows]
        print(
            json.dumps(
                {"versions": _versions(), **sides, "engine": args.engine, "ok": not failed, "rows": listed}, indent=2
            )
        )
        return int(bool(failed))
    columns = ("quantity", "shape", ">worst error", ">error / tolerance", ">error / bound", "verdict")
    for problem, dtype in dict.fromkeys((row.problem, row.dtype) for row in rows):
        cells = [_cells(row) for row in rows if (row.problem, row.dtype) == (problem, dtype)]
        print_table(f"{problem}, {dtype}: {TOLERANCE[dtype]}", columns, cells)
    count = f"{len(failed)} of {len(rows)} values do not" if failed else f"All {len(rows)} values"
    print(f"\n{count} agree with PyTorch.")
    return int(bool(failed))


def _check_html(path: str) -> None:
    """Before the work: OSError for a file that cannot be written, BadInputError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise BadInputError("--html draws by matplotlib, which is not installed: pip install 'funcmha[plot]'")
    with open(path, "a"):
        pass


def _write_html(args: argparse.Namespace, rows: list[Any], sides: dict[str, int]) -> None:
    """The page: what was run, and on what, the picture and the table"""
    from funcmha.testing.pictures import errors_html

    failed = sum(not row.ok for row in rows)
    lines = (
        ", ".join(f"{name} {number}" for name, number in _versions().items()),
        "B, T, C, H = {batch}, {length}, {width}, {heads}, seed {seed}".format(**sides),
        f"Engine: {args.engine or 'the fastest'}",
        f"{failed} of {len(rows)} values do not agree." if failed else f"All {len(rows)} values agree with PyTorch.",
    )
    page = errors_html(rows, title="funcmha against PyTorch", lines=lines)
    Path(args.html).write_text(page, encoding="utf-8")


def _cells(row: Any) -> tuple[str, ...]:
    numbers = f"{row.error:.1e}", f"{row.of_tolerance:.3f}", f"{row.of_bound:.3f}"
    failed = [name for name in ("tolerance", "bound") if not getattr(row, f"of_{name}") <= 1]
    return row.quantity, shape_text(row.shape), *numbers, f"FAILS: {' and '.join(failed)}" if failed else "ok"


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(x, float) and not isfinite(x) else x


def _versions() -> dict[str, str]:
    """What the numbers depend on."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "funcmha": __version__,
        "PyTorch": version("torch"),
        "NumPy": np.__version__,
        blas["name"]: blas["version"],
        "Python": platform.python_version(),
        platform.system(): platform.machine(),
    }
