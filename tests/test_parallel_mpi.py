"""Processes of mpiexec have the bits of threads, on two MPIs; and they end together, whatever ends one of them.

MPICH and Open MPI are those of the package index, in environments of their own: make mpi.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from funcmha import parallel

ROOT = Path(__file__).parents[1]
NAMES = ("mpich", "openmpi")
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "FUNCMHA_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.fixture(params=NAMES)
def binaries(request):
    """The folder of an MPI's commands, and of a Python that has it."""
    folder = ROOT / ".mpi" / request.param / "bin"
    if not (folder / "mpiexec").exists():
        pytest.skip(f"{request.param} is not installed: make mpi")
    return folder


@pytest.fixture
def mpi(binaries):
    """A command that starts n processes with a script of tests/, and a token that is in the command line of each."""

    def start(n, *arguments, script="tests/on_ranks.py"):
        python = [str(binaries / "python"), "-W", "error", "-m", "mpi4py", script]
        return subprocess.Popen(
            [str(binaries / "mpiexec"), "-n", str(n), *python, *arguments],
            cwd=ROOT, env=os.environ | SETTINGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def running(token):
    """The Python processes whose command line has the token."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if token in words and "python" in Path(words[0]).name:
            found.append(int(path.parent.name))
    return found


def none_left(token, seconds=20):
    end = time.monotonic() + seconds
    while running(token) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(token)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_processes_have_the_bits_of_threads(mpi, n):
    out, err = (process := mpi(n, "agree")).communicate(timeout=170)
    assert process.returncode == 0, err
    told = re.findall(r"rank (\d) of (\d): \d+ arrays have the bits of threads", out)  # two may be on one line
    assert sorted(told) == [(str(rank), str(n)) for rank in range(n)]


@pytest.mark.parametrize("script", ["long_context.py", "data_parallel.py"])
def test_an_example_runs_on_two_processes(mpi, script):
    process = mpi(2, script=f"examples/{script}")
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert out.strip()


def test_the_benchmark_times_processes(binaries):
    command = [str(binaries / "python"), "-m", "benchmarks.parallel", "96", "--repeats", "1"]
    command += ["--mpi", str(binaries / "mpiexec")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == ["1", "2"]
    assert [row[5] for row in rows] == ["1.000", "1.000"]
    assert rows[0][2] == rows[0][4] == "1.00"
    assert all(float(number) > 0 for row in rows for number in row[1:5])
    assert re.fullmatch(r"\d+ µs", rows[1][6])


def test_a_rank_that_raises_ends_all(mpi):
    """With its message and a status that is not 0. The time counts from when the interpreter tells of it."""
    process = mpi(3, "raise")
    told = None
    for line in process.stderr:
        if "rank 1 has lost its data" in line:
            told = time.monotonic()
            break
    assert told is not None
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - told < 5


@pytest.mark.parametrize("how", ["a rank is killed", "ctrl-c"])
def test_no_process_is_left(mpi, how):
    token = uuid4().hex
    process = mpi(2, "wait", token)
    try:
        waiting = 0
        while waiting < 2:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            waiting += line.count("waits")
        if how == "ctrl-c":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(running(token)[-1], signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert none_left(token)
    finally:
        process.kill()
        for pid in running(token):
            os.kill(pid, signal.SIGKILL)


def test_a_message_is_cut_where_counts_end(monkeypatch):
    carrier = importlib.import_module("funcmha.parallel.mpi")
    monkeypatch.setattr(carrier, "MESSAGE", 16)
    x = np.arange(9.0)
    assert [part.size for part in carrier._messages(x)] == [16, 16, 16, 16, 8]
    assert np.array_equal(np.concatenate(carrier._messages(x)).view(np.float64), x)
    assert [part.size for part in carrier._messages(x[:0])] == [0]


def test_without_mpi4py_the_carrier_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"parallel.mpi needs mpi4py and an MPI .*: pip install 'funcmha\[mpi\]', or"):
        parallel.mpi()
