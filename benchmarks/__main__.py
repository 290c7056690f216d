"""python -m benchmarks [time] [memory] [accuracy] [scaling]: funcmha and other libraries, one table per question."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import accuracy, memory, scaling, timing
from .cases import CASES, Case, shortened
from .machine import cores, describe
from .peers import EAGER, PEERS

QUESTIONS = ("time", "memory", "accuracy", "scaling")
QUICK = 256  # the longest sequence of --quick
SMALL = ("seed", "gpt2")  # the cases of `accuracy`


def main() -> None:
    options = _parse()
    machine = describe(options.threads)
    for name, value in machine.items():
        print(f"{name:<12} {value}")
    if options.quick:
        print(f"\nQUICK: every length limited to {QUICK}: this checks that everything runs, and measures nothing")
    records = []
    for question in options.questions:
        records += _ask(question, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    if options.plot:
        _plot(records, options.plot, machine["machine"])


def _ask(question: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    peers, repeats, threads = options.peers, options.repeats, options.threads
    cases = [case for case in CASES if case.name in options.only]
    if question == "scaling":
        both = [peer for peer in (EAGER, "funcmha") if peer in peers]
        return scaling.run(2 * QUICK if options.quick else scaling.LENGTHS[-1], both, repeats, threads)
    if options.quick:
        cases = [shortened(case, QUICK) for case in cases]
    if question == "time":
        tries = 1 if options.quick else timing.TRIES
        return timing.run(cases, peers, repeats, options.processes, threads, tries)
    if question == "memory":
        return memory.run(cases, peers, threads)
    return accuracy.run([case for case in cases if case.name in SMALL], peers, threads)


def _plot(records: list[dict[str, Any]], folder: Path, header: str) -> None:
    try:
        paths = scaling.plot(records, folder, header)
    except ModuleNotFoundError as error:
        print(f"\nplot skipped: {error.name} is not installed")
        return
    print("\n" + "\n".join(map(str, paths)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "questions", nargs="*", metavar="question", help=f"{', '.join(QUESTIONS)}; the first three unless given"
    )
    parser.add_argument("--only", action="append", choices=_names(CASES), help="a case; may be repeated")
    parser.add_argument(
        "--peers", action="append", choices=list(PEERS), metavar="PEER", help=f"{', '.join(PEERS)}; may be repeated"
    )
    parser.add_argument(
        "--repeats", type=int, default=None, metavar="N", help="runs of each process: 5, or 3 with --quick"
    )
    parser.add_argument(
        "--processes", type=int, default=None, metavar="N", help="of each peer, one after another: 3, or 1 with --quick"
    )
    parser.add_argument(
        "--threads", type=int, default=cores(), metavar="N", help="threads of every library (default: all cores)"
    )
    parser.add_argument("--quick", action="store_true", help="short sequences, to check that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="plot `scaling` into FOLDER; adds this question")
    options = parser.parse_args()
    if unknown := set(options.questions) - set(QUESTIONS):
        parser.error(f"unknown question {', '.join(sorted(unknown))}: choose from {', '.join(QUESTIONS)}")
    options.questions = options.questions or list(QUESTIONS[:3])
    if options.plot and "scaling" not in options.questions:
        options.questions.append("scaling")
    options.only = options.only or _names(CASES)
    options.peers = options.peers or list(PEERS)
    options.repeats = options.repeats or (3 if options.quick else 5)
    options.processes = options.processes or (1 if options.quick else 3)
    return options


def _names(cases: tuple[Case, ...]) -> list[str]:
    return [case.name for case in cases]


if __name__ == "__main__":
    main()
