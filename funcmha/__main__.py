"""The command line.

python -m funcmha verify              funcmha against PyTorch, value by value
python -m funcmha inspect FILE.npz    what a parameter file holds
python -m funcmha conform TARGET      whether an implementation of attention is right, forward and every gradient

Exit status: 0 for success, 1 if a value does not agree, 2 for bad input, with one line that says why; of conform 3 if
nothing could be run.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite, prod
from typing import Any, NoReturn

import numpy as np

from . import __version__, npz
from .params import SPEC, Params, sizes


class BadInputError(Exception):
    """Bad input from the user: the message is printed without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInputError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit status."""
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInputError, npz.ParameterFileError, MemoryError, OSError) as error:
        file = getattr(error, "filename", None)
        message = f"{file}: {error.strerror}" if isinstance(error, OSError) and file else str(error)
        print(f"funcmha: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="funcmha", description="Multi-head attention with explicit gradients.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("verify", help="compare funcmha with torch.nn.MultiheadAttention, value by value")
    command.add_argument("--dtype", choices=("float32", "float64"), help="one precision only (default: both)")
    for name, least, default, text in (
        ("batch", 1, 16, "sequences, B"),
        ("length", 1, 256, "queries in each, T"),
        ("width", 1, 384, "embed_dim, C"),
        ("heads", 1, 6, "heads, H, which divide C"),
        ("seed", 0, 0, "of weights, inputs, cotangents"),
    ):
        kind, text = partial(_integer, least), f"{text} (default {default})"
        command.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_verify)

    command = commands.add_parser("conform", help="judge an implementation of attention, forward and every gradient")
    conform_arguments(command)
    command.set_defaults(run=_conform)

    command = commands.add_parser("inspect", help="list a parameter file")
    command.add_argument("file", metavar="FILE.npz")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_inspect)
    return parser


def conform_arguments(command: argparse.ArgumentParser) -> None:
    """Those of `conform`."""
    integer = partial(_integer, 0)
    command.add_argument(
        "target",
        nargs="+",
        metavar="TARGET",
        help="FILE.py:name, module:name, a ready-made name, or: diff TARGET TARGET",
    )
    command.add_argument("--dtype", action="append", help="one of the dtypes declared (may be repeated)")
    command.add_argument("--feature", action="append", help="one feature (may be repeated)")
    command.add_argument("--case", action="append", metavar="NAME", help="one case, by the name of the report")
    command.add_argument("--arithmetic", choices=("strict", "flash"), help="instead of what is declared")
    command.add_argument("--seed", type=integer, default=0, metavar="N", help="of all numbers (default 0)")
    command.add_argument("--seconds", type=integer, default=60, metavar="N", help="after which no case begins (60)")
    command.add_argument("--sizes", choices=("usual", "large"), default="usual", help="large: up to 16,384 keys")
    command.add_argument("--strict", action="store_true", help="fail on errors of 1 to 8 times the bound too")
    command.add_argument("--golden", metavar="FILE.npz", help="write the problems for an implementation outside Python")
    command.add_argument("--answers", metavar="FILE.npz", help="judge what it computed of them")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument("--junit", metavar="FILE.xml", help="write JUnit XML too")
    command.add_argument("--html", metavar="FILE.html", help="write a page with a picture of each failure too")


def _integer(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _verify(args: argparse.Namespace) -> int:
    if find_spec("torch") is None:
        raise BadInputError("verify compares with PyTorch, which is not installed: pip install 'funcmha[torch]'")
    if args.width % args.heads:
        raise BadInputError(f"argument --width: must be a multiple of --heads {args.heads}, got {args.width}")
    from .testing.verify import TOLERANCE, verify

    dtypes = (args.dtype,) if args.dtype else ("float32", "float64")
    sides = {name: getattr(args, name) for name in ("batch", "length", "width", "heads", "seed")}
    if not args.json:
        print(", ".join(f"{name} {number}" for name, number in _versions().items()))
        print("B, T, C, H = {batch}, {length}, {width}, {heads}, seed {seed}".format(**sides))
    rows = list(verify(**sides, dtypes=dtypes, progress=_progress))
    _progress("")
    failed = [row for row in rows if not row.ok]

    if args.json:
        listed = [{name: _finite(x) for name, x in row._asdict().items()} | {"ok": row.ok} for row in rows]
        print(json.dumps({"versions": _versions(), **sides, "ok": not failed, "rows": listed}, indent=2))
        return int(bool(failed))
    columns = ("quantity", "shape", ">worst error", ">error / tolerance", ">error / bound", "verdict")
    for problem, dtype in dict.fromkeys((row.problem, row.dtype) for row in rows):
        cells = [_cells(row) for row in rows if (row.problem, row.dtype) == (problem, dtype)]
        _print_table(f"{problem}, {dtype}: {TOLERANCE[dtype]}", columns, cells)
    count = f"{len(failed)} of {len(rows)} values do not" if failed else f"All {len(rows)} values"
    print(f"\n{count} agree with PyTorch.")
    return int(bool(failed))


def _cells(row: Any) -> tuple[str, ...]:
    numbers = f"{row.error:.1e}", f"{row.of_tolerance:.3f}", f"{row.of_bound:.3f}"
    failed = [name for name in ("tolerance", "bound") if not getattr(row, f"of_{name}") <= 1]
    return row.quantity, _shape(row.shape), *numbers, f"FAILS: {' and '.join(failed)}" if failed else "ok"


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


def _progress(text: str) -> None:
    """One line of progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text and text + ' …'}", end="", file=sys.stderr, flush=True)


# ── conform ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _conform(args: argparse.Namespace) -> int:
    from .testing.conform import DeclarationError
    from .testing.conform.command import run

    try:
        return run(args, _progress)
    except DeclarationError as error:
        raise BadInputError(str(error)) from None


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _inspect(args: argparse.Namespace) -> int:
    entries = npz.entries(args.file)
    trees = _attention_trees(entries)
    numbers, total = sum(prod(entry.shape) for entry in entries.values()), sum(e.nbytes for e in entries.values())
    if args.json:
        leaves = {
            name: {"axes": _axes(name), "shape": entry.shape, "dtype": str(entry.dtype), "bytes": entry.nbytes}
            for name, entry in entries.items()
        }
        totals = {"numbers": numbers, "bytes": total}
        print(json.dumps({"file": args.file, "leaves": leaves, "attention": trees} | totals, indent=2))
        return 0
    cells = [(name, _axes(name) or "", _shape(e.shape), str(e.dtype), f"{e.nbytes:,}") for name, e in entries.items()]
    _print_table(args.file, ("leaf", "axes", "shape", "dtype", ">bytes"), cells)
    print()
    for prefix, found in trees.items():
        text = found if isinstance(found, str) else "  ".join(f"{axis}={n}" for axis, n in found.items())
        print(f"{prefix or 'attention'}: {text}")
    print(f"{len(entries)} leaves, {numbers:,} numbers, {total:,} bytes")
    return 0


def _axes(name: str) -> str | None:
    """The axes of blocks.0.attn.q_proj.w are those of q_proj.w."""
    return SPEC.get(".".join(name.split(".")[-2:]))


def _attention_trees(entries: dict[str, npz.Entry]) -> dict[str, dict[str, int] | str]:
    """The sizes of every tree of SPEC in the file by the path to it, or why it has none."""
    found: dict[str, Params] = {}
    for name, entry in entries.items():
        if _axes(name):
            *prefix, group, leaf = name.split(".")
            params = found.setdefault(".".join(prefix), {})
            params.setdefault(group, {})[leaf] = np.broadcast_to(np.zeros((), entry.dtype), entry.shape)
    return {prefix: _sizes(params) for prefix, params in found.items()}


def _sizes(params: Params) -> dict[str, int] | str:
    try:
        return sizes(params)._asdict()
    except (KeyError, TypeError, ValueError) as error:
        return f"no attention: {error.args[0]}"


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich on a terminal, if it is installed; elsewhere in columns as wide as they need to be. > is to the right."""
    if sys.stdout.isatty() and find_spec("rich"):
        _print_rich(title, columns, rows)
        return
    from .testing.table import table

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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where the terminal has no ×
    sys.exit(main())
