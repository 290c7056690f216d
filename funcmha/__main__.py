"""The command line.

funcmha verify              funcmha against PyTorch, value by value
funcmha inspect FILE.npz    what a parameter file holds
funcmha conform TARGET      whether an implementation of attention is right, forward and every gradient
funcmha info                what a report of a fault should say of the machine

`python -m funcmha` is the same.

Exit status: 0 for success, 1 if a value does not agree, 2 for bad input, with one line that says why; of conform 3 if
nothing could be run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from . import __version__, npz
from .commands import BadInputError, info, inspect, verify
from .commands.terminal import show_progress
from .engines import ENGINES


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
    parser.add_argument("--version", action="version", version=f"funcmha {__version__}")
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
    command.add_argument("--engine", choices=tuple(ENGINES), help="who computes funcmha's side (default: the fastest)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--html", metavar="FILE.html", help="write a page with a picture of all errors too")
    command.set_defaults(run=verify.run)

    command = commands.add_parser("conform", help="judge an implementation of attention, forward and every gradient")
    conform_arguments(command)
    command.set_defaults(run=_conform)

    command = commands.add_parser("inspect", help="list a parameter file")
    command.add_argument("file", metavar="FILE.npz")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--plot", metavar="FILE.png", help="draw the norms and the numbers of each head too")
    command.set_defaults(run=inspect.run)

    command = commands.add_parser("info", help="versions, BLAS, threads, engines, GPU: what a report of a fault needs")
    command.add_argument("--json", action="store_true", help="print JSON instead of lines")
    command.set_defaults(run=info.run)
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


def _integer(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


def _conform(args: argparse.Namespace) -> int:
    from .testing.conform import DeclarationError
    from .testing.conform.command import run

    try:
        return run(args, show_progress)
    except DeclarationError as error:
        raise BadInputError(str(error)) from None


def command() -> int:
    """The console script."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where the terminal has no ×
    return main()


if __name__ == "__main__":
    sys.exit(command())
