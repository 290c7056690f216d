"""The speed of the machine: one float32 matrix product of NumPy, large enough for full speed."""

import numpy as np

from benchmarks.cases import Case, Problem
from benchmarks.peers import Call

N = 2048
OPERATIONS = 2 * N**3


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    a, b = np.random.default_rng(0).standard_normal((2, N, N), dtype=np.float32)
    out = np.empty((N, N), np.float32)
    return Call(lambda: np.matmul(a, b, out=out), None, lambda: {"y": out})
