"""Plant one fault at a time in a copy of the package, and see the test-suite catch it: `make mutants`.

    python tests/mutants.py              every fault
    python tests/mutants.py dropout      those that have the word in their file, their tests, their name or their code

The faults of `funcmha/tiled/tiles.py` are in `tests/faults/tiled/tiles.txt`, and so for every file. It reads: `#` the
tests of which one must fail, for all faults until the next such lines; then for each fault its name, what it takes out
(`-`, once in the file) and what it puts in (`+`). A fault is caught if its tests run and one of them fails: an error on
import does not count, nor does a test that takes longer than `SECONDS`.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import array_api_strict  # noqa: F401 — these for the tests, see `start`
import hypothesis.extra.numpy  # noqa: F401
import ml_dtypes  # noqa: F401
import mpmath  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
SECONDS = 300  # for the tests of one fault, of which each takes a second or a few


class Fault(NamedTuple):
    file: str  # in funcmha/
    tests: tuple[str, ...]  # in tests/
    name: str
    old: str
    new: str

    def plant(self, source: str) -> str:
        """The source with the fault in it; ValueError unless there is exactly one place for it."""
        if (n := source.count(self.old)) != 1:
            raise ValueError(f"{self.file} must have this once, not {n} times: {self.old}")
        return source.replace(self.old, self.new)


def faults() -> list[Fault]:
    """All of `tests/faults`, file by file."""
    folder = ROOT / "tests/faults"
    paths = sorted(folder.rglob("*.txt"))
    return [
        fault for path in paths for fault in parse(f"{path.relative_to(folder).with_suffix('.py')}", path.read_text())
    ]


def parse(file: str, text: str) -> list[Fault]:
    found, tests = [], ()
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].startswith("#"):
            tests = tuple(line[2:] for line in lines)
        else:
            old, new = ("\n".join(line[2:] for line in lines[1:] if line[0] == sign) for sign in "-+")
            found.append(Fault(file, tests, lines[0], old, new))
    return found


def copied(where: Path) -> Path:
    """A copy of the package and its tests."""
    for name in ("funcmha", "tests"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", where)
    return where


def start(where: Path, tests: Iterable[str]) -> int:
    """The id of a new process that runs these tests in the copy at `where`; its exit status is pytest's.

    A fork, so that what the tests import besides funcmha is imported once: that takes longer than most of them.
    """
    if pid := os.fork():
        return pid
    signal.alarm(SECONDS)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(where)
    sys.path[:] = [str(where), *(path for path in sys.path if path != str(ROOT / "tests"))]
    os.environ |= {"PYTHONPATH": str(where), "HYPOTHESIS_PROFILE": "mutants"}
    # No bytecode, which Python would take for that of another file of the same size, written in the same second.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = 2
    try:
        status = pytest.main([*flags, *(f"tests/{test}" for test in tests)])
    finally:
        os._exit(status)


def verdicts(faults: Iterable[Fault], copies: list[Path]) -> Iterator[tuple[Fault, str]]:
    """Each fault and what became of it, in the order in which they end; in each copy there is one at a time."""
    running: dict[int, tuple[Fault, Path, str]] = {}
    waiting = iter(faults)
    while True:
        while copies and (fault := next(waiting, None)):
            source = (copies[-1] / "funcmha" / fault.file).read_text()
            try:
                (copies[-1] / "funcmha" / fault.file).write_text(fault.plant(source))
            except ValueError:
                yield fault, "DOES NOT APPLY"
                continue
            copy = copies.pop()
            running[start(copy, fault.tests)] = fault, copy, source
        if not running:
            return
        pid, status = os.wait()
        fault, copy, source = running.pop(pid)
        (copy / "funcmha" / fault.file).write_text(source)
        copies.append(copy)
        yield fault, {0: "SURVIVED", 1: "caught"}.get(os.waitstatus_to_exitcode(status), "DID NOT RUN")


def main(word: str = "") -> int:
    chosen = [fault for fault in faults() if word in "\n".join((*fault[:1], *fault[1], *fault[2:]))]
    if not chosen:
        print(f"No fault has the word {word!r} in its file, its tests, its name or its code.")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        copies = [copied(Path(temporary) / str(n)) for n in range(WORKERS)]
        _, status = os.waitpid(start(copies[0], dict.fromkeys(test for fault in chosen for test in fault.tests)), 0)
        if status:
            print("Without any fault, the tests of these faults must pass, and do not.")
            return 1
        caught = 0
        for fault, result in verdicts(chosen, copies):
            caught += result == "caught"
            print(f"{result:<15} {fault.file:<22} {fault.name:<90} {' '.join(fault.tests)}", flush=True)
    print(f"{caught} of {len(chosen)} planted faults were caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
