"""The parent's end of the pipe: start the process of a peer, send it commands, end it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .cases import Case, shortened
from .peers import KERNELS

ROOT = Path(__file__).parents[1]
SETTINGS = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FUNCMHA_NUM_THREADS")


TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class RefusedError(Exception):
    """The peer refused or failed; the message is the reason."""


class Process:
    def __init__(self, peer: str, threads: int) -> None:
        settings = SETTINGS | dict.fromkeys(THREADS, str(threads))
        if peer in KERNELS:
            settings["OPENBLAS_CORETYPE"] = KERNELS[peer]
        self.peer = peer
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", peer, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | settings,
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends the others
        )

    def __call__(self, do: str, **order: Any) -> Any:
        answer = {}
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do} | order), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline() or "{}")
        if "result" in answer:
            return answer["result"]
        if "skip" in answer:
            raise RefusedError(f"skipped: {answer['skip']}")
        raise RefusedError(f"failed: {answer['error']}" if "error" in answer else self._epitaph())

    def prepare(self, case: Case, dtype: str = "float32") -> None:
        self("prepare", case=list(case), dtype=dtype)

    def seconds_of_processors(self) -> float:
        """What it and its threads have taken, all cores together"""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def _epitaph(self) -> str:
        return f"failed: the process ended with status {self._process.wait()}"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def start(peers: list[str], threads: int) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        processes = []
        for peer in peers:
            processes.append(Process(peer, threads))
            stack.callback(processes[-1].end)
        yield processes


def peak_memory(peer: str, case: Case, threads: int) -> int:
    """Bytes above inputs and parameters of the case's last pass, in a process that has done nothing else."""
    with start([peer], threads) as (process,):
        process.prepare(shortened(case, 16))
        process("memory")
        process.prepare(case)
        return process("memory")
