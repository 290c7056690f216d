"""The small GPT of gpt.py, trained on the samples of two ranks: the same losses as on one.

Each rank has its own samples. Their gradients are added up over the ranks in one message, in the order of the ranks, so
that every rank takes the same step, and parameters never travel.

    python examples/data_parallel.py                            # 2 ranks, threads of this process
    mpiexec -n 2 python -m mpi4py examples/data_parallel.py     # processes, on one machine or many
"""

from importlib.util import find_spec
from pathlib import Path

import gpt
import numpy as np

from funcmha import parallel, tree

SAMPLES, STEPS = 4, 25


def text_and_characters():
    """The samples, and how many characters there are"""
    characters, text = np.unique(list(Path(__file__).with_name("text.txt").read_text()), return_inverse=True)
    return np.array_split(text, SAMPLES), len(characters)


def losses(line):
    """The mean loss of all samples, after each step"""
    samples, V = text_and_characters()
    mine = np.array_split(np.arange(SAMPLES), line.comm.size)[line.comm.rank]
    params, found = gpt.init_gpt(0, V, np.float64), []
    moments = gpt.Moments(*(tree.map(np.zeros_like, params) for _ in range(2)))
    for step in range(1, STEPS + 1):
        results = [gpt.loss_and_gradient(params, samples[n]) for n in mine]
        total = tree.map(lambda *grads: sum(grads), *(grads for _, _, grads in results))
        grads = parallel.all_reduce(line, total | {"loss": np.array(sum(loss for loss, _, _ in results))})
        found.append(float(grads.pop("loss")) / SAMPLES)
        params, moments = gpt.adamw(params, tree.map(lambda g: g / SAMPLES, grads), moments, step)
    return found


def main(comm):
    """The losses of all ranks beside those of one"""
    got = losses(parallel.Line(comm))
    (want,) = parallel.threads(1).run(lambda one: losses(parallel.Line(one)))
    off = np.abs(np.array(got) / want - 1).max()
    if comm.rank == 0:
        print(f"{comm.size} ranks, loss {got[0]:.4f} → {got[-1]:.4f} in {STEPS} steps, off those of one by {off:.0e}")
    assert off <= 1e-9


if __name__ == "__main__":
    comm = parallel.mpi() if find_spec("mpi4py") else None
    if comm is not None and comm.size > 1:
        main(comm)
    else:
        parallel.threads(2).run(main)
