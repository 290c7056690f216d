"""See the tests catch faults in the package, one at a time: `make mutants`.

    python tests/mutants.py                             the faults of tests/faults.txt, then a sample of the mutants
    python tests/mutants.py planted [WORD]              those of tests/faults.txt with the word in their function
    python tests/mutants.py sample [SIZE [SEED]]        300 of all mutants, and another 300 with another seed
    python tests/mutants.py places ops._softmax "α / β → α"    where an operation applies, and what it does

A mutant that survives shows a hole in the tests, or changes nothing: then it belongs into tests/equivalent.txt.
funcmha/x.py has the tests of tests/test_x.py, funcmha/a/b.py those of tests/test_a_b.py or else of tests/test_a.py, and
both have those of MORE.
"""

import ast
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import array_api_strict  # noqa: F401 — these for the tests, see `start`
import hypothesis.extra.numpy  # noqa: F401
import ml_dtypes  # noqa: F401
import mpmath  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
from planting import ROOT, Fault, everywhere, scope, sites, table

WORKERS = 2
SECONDS = 600  # for the tests of one fault
PLANTED = table(ROOT / "tests/faults.txt")
ELSE = ["test_protocol.py", "test_mha.py", "test_properties.py"]  # of what has no tests of its name
MORE = {  # tests beside those of the same name, of all files whose path begins so
    "ops.py": ["test_modern.py", "test_garbage.py", "test_scores.py"],
    "mha.py": ["test_modern.py"],
    "params.py": ["test_mha.py", "test_modern.py"],
    "biases.py": ["test_bias.py", "test_parallel_parts.py"],
    "norms.py": ["test_norm_derivatives.py"],
    "masks/": ["test_parallel_parts.py"],
    "masks/kinds.py": ["test_packing.py"],
    "masks/zero.py": ["test_garbage.py"],
    "_arrays.py": ["test_blocks.py", *ELSE],
    "dropout.py": ["test_blocks.py", "test_parallel_parts.py"],
    "parallel/": ["test_parallel.py", "test_parallel_mha.py", "test_parallel_plan.py"],
    "engines/blocks/": ["test_blocks.py", "test_ops.py", "test_garbage.py"],
    "engines/blocks/derivatives.py": ["test_derivatives_forward.py", "test_derivatives_second.py"],
    "engines/tiled/dominant.py": ["test_saturated.py"],
    "engines/tiled/backward.py": ["test_saturated.py", "test_parallel.py"],
    "engines/tiled/forward_mode.py": ["test_derivatives_forward.py", "test_saturated.py"],
    "engines/tiled/second_order.py": ["test_derivatives_second.py", "test_saturated.py"],
    "engines/": ["test_mha.py", "test_modern.py", "test_tiled.py", "test_saturated.py"],
    "derivatives/": ["test_derivatives_forward.py", "test_derivatives_second.py"],
    "engines/tiled/threads.py": ["test_threads.py"],
    "engines/tiled/blas.py": ["test_threads.py"],
    "engines/tiled/quota.py": ["test_threads.py"],
    "npz/atomic.py": ["test_atomic.py"],
    "npz/": ["test_npz_refused.py", "test_npz_files.py", "test_npz_mmap.py"],
    "testing/": ["test_testing.py", "test_gradcheck.py"],
    "testing/rounding": ["test_tolerance.py", "test_saturated.py"],
    "testing/tolerance.py": ["test_tolerance.py"],
}


def catching(path: Path) -> list[str]:
    """The files of tests/ that should catch a fault in this file of funcmha/, in the order in which they run."""
    parts = [part.strip("_") for part in path.with_suffix("").parts if part != "__init__"]
    named = ["_".join(["test", *parts[:n]]) + ".py" for n in range(len(parts), 0, -1)]
    own = [name for name in named if (ROOT / "tests" / name).exists()][:1]
    more = [test for begin, tests in MORE.items() if str(path).startswith(begin) for test in tests]
    return list(dict.fromkeys(own + more)) or ELSE


def copied(where: Path) -> Path:
    """A copy of the package and its tests."""
    for name in ("funcmha", "tests"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", where)
    return where


def start(where: Path, tests: Iterable[str], seconds: int = SECONDS) -> int:
    """The id of a new process that runs these tests in the copy at `where`; its exit status is pytest's.

    A fork, so that what the tests import besides funcmha is imported once: that takes longer than most of them.
    """
    if pid := os.fork():
        return pid
    signal.alarm(seconds)
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
    """Each fault and what became of it, in the order in which they end; in each copy there is one at a time.

    Caught is what its tests run with and fail: an error on import does not count, nor does a test that takes too long.
    """
    running: dict[int, tuple[Fault, Path, str]] = {}
    waiting = iter(faults)
    while True:
        while copies and (fault := next(waiting, None)):
            copy = copies.pop()
            source = (copy / "funcmha" / fault.path).read_text()
            (copy / "funcmha" / fault.path).write_text(fault.plant(source))
            running[start(copy, catching(fault.path))] = fault, copy, source
        if not running:
            return
        pid, status = os.wait()
        fault, copy, source = running.pop(pid)
        (copy / "funcmha" / fault.path).write_text(source)
        copies.append(copy)
        yield fault, {0: "SURVIVED", 1: "caught"}.get(os.waitstatus_to_exitcode(status), "DID NOT RUN")


def planted(word: str = "") -> bool:
    """Whether each fault of the table whose function has the word is caught."""
    chosen = [fault for fault in PLANTED if word in fault.function]
    with tempfile.TemporaryDirectory() as temporary:
        copies = [copied(Path(temporary) / str(n)) for n in range(WORKERS)]
        tests = dict.fromkeys(test for fault in chosen for test in catching(fault.path))
        _, status = os.waitpid(start(copies[0], tests, seconds=3600), 0)
        if status:
            print("Without any fault, the tests of these faults must pass, and do not.")
            return False
        caught = 0
        for fault, result in verdicts(chosen, copies):
            caught += result == "caught"
            print(f"{result:<12} {fault.function:<44} {fault.operation:<50} {fault.says}", flush=True)
    print(f"{caught} of {len(chosen)} planted faults were caught")
    return caught == len(chosen)


def sample(size: str = "300", seed: str = "0") -> bool:
    """Whether each of so many mutants, of all that there are, is caught, or known to be no fault."""
    paths = [path.relative_to(ROOT / "funcmha") for path in sorted((ROOT / "funcmha").rglob("*.py"))]
    known = {fault[:3] for fault in (*PLANTED, *table(ROOT / "tests/equivalent.txt"))}
    mutants = [fault for path in paths for fault in everywhere(path) if fault[:3] not in known]
    chosen = random.Random(seed).sample(mutants, min(int(size), len(mutants)))
    with tempfile.TemporaryDirectory() as temporary:
        copies = [copied(Path(temporary) / str(n)) for n in range(WORKERS)]
        survived = []
        for fault, result in verdicts(chosen, copies):
            if result == "SURVIVED":
                survived.append(fault)
                print(f"{result:<12} {fault.function:<44} {fault.operation}  {fault.place}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants, of {len(mutants)}, were caught")
    return not survived


def places(function: str, *operations: str) -> bool:
    """What each operation would do to the function, place by place."""
    fault = Fault(function, "", "", "")
    source = (ROOT / "funcmha" / fault.path).read_text()
    for operation in operations:
        found = list(sites(scope(ast.parse(source), fault.name), operation))
        for k, (node, new) in enumerate(found, 1):
            print(f"{k}/{len(found)}  {ast.unparse(node)}   →   {new}")
    return True


def main(*words: str) -> int:
    doing = {"planted": planted, "sample": sample, "places": places}
    if words:
        return 0 if doing[words[0]](*words[1:]) else 1
    return 0 if all([planted(), sample()]) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
