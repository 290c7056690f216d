"""How fast? Every peer in its own process, all alive at the same time, with alternated runs: A B C A B C …

So other load on the machine affects all of them equally. One run is as many calls as fill a tenth of a second, at least
one. A pause before each run lets the threads of the previous peer fall asleep: those of OpenBLAS and OpenMP spin for a
while. A run during which anything else took a tenth of the processors counts only if it is so again and again.

All this so many times, in fresh processes: where their memory lies makes one process slower than its twin. The table
shows the median of all runs, and the least and the largest of the processes' own medians.

The matrix product of the machine is one of the alternated runs, by the kernels that NumPy's OpenBLAS picks and by those
for AVX2. "Of matrix product" is the share of the speed that a peer's own kernels have there, for the operations of a
tiled attention (`cases.products`). This count is the same for every peer: one that keeps all weights does fewer in its
backward, and one that cannot skip masked tiles does more.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from . import table
from .cases import Case, products
from .machine import busy, cores
from .peers import EAGER, KERNELS, PRODUCT, PRODUCT_AVX2
from .peers.product import OPERATIONS
from .processes import Process, RefusedError, start

PAUSE = 0.1  # seconds
OTHERS = 0.1  # of the processors' time, that others may have taken in a run
TICK = 0.02  # seconds, which the system counts in steps of half of that
TRIES = 5
COLUMNS = ("peer", "median", "processes", "of matrix product", "to PyTorch")

Runs = dict[str, list[list[float]]]  # by peer, of each of its processes


def run(
    cases: list[Case], peers: list[str], repeats: int, processes: int, threads: int, tries: int = TRIES
) -> Iterator[dict[str, Any]]:
    """A record for each case, pass and peer; a table for each case and pass."""
    for case in cases:
        found: dict[str, tuple[Runs, dict[str, str]]] = {direction: ({}, {}) for direction in case.passes}
        for _ in range(processes):
            with start([PRODUCT, PRODUCT_AVX2, *peers], threads) as alive:
                unfit = prepare(case, alive)
                for direction, (runs, refused) in found.items():
                    fit = [process for process in alive if process.peer not in unfit]
                    some, more = _alternate(fit, direction, repeats, tries)
                    refused |= unfit | more
                    for peer, seconds in some.items():
                        runs.setdefault(peer, []).append(seconds)
        for direction, (runs, refused) in found.items():
            records = list(_records(case, direction, runs, refused))
            _show(case, direction, records, f"{processes} processes of {repeats} alternated runs")
            yield from records


def prepare(case: Case, processes: list[Process]) -> dict[str, str]:
    """Send the next case to all; the reasons of those that refuse."""
    refused = {}
    for process in processes:
        try:
            process.prepare(case)
        except RefusedError as reason:
            refused[process.peer] = str(reason)
    return refused


def measure(case: Case, direction: str, processes: list[Process], repeats: int) -> Iterator[dict[str, Any]]:
    """A record for each peer of these processes, also for those that refuse, and for `product`."""
    unfit = prepare(case, processes)
    runs, refused = _alternate([p for p in processes if p.peer not in unfit], direction, repeats)
    yield from _records(case, direction, {peer: [seconds] for peer, seconds in runs.items()}, unfit | refused)


def _alternate(
    processes: list[Process], direction: str, repeats: int, tries: int = TRIES
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every run, by peer; and the reasons of those that failed."""
    calls, runs, refused = {}, {}, {}
    for repeat in range(repeats + 1):
        for process in processes:
            peer = process.peer
            if peer in refused:
                continue
            what = "forward" if peer in (PRODUCT, PRODUCT_AVX2) else direction
            try:
                answer = _undisturbed(process, what, calls.get(peer, 0), tries)
            except RefusedError as reason:
                refused[peer] = str(reason)
                continue
            if repeat == 0:
                calls[peer] = answer
            else:
                runs.setdefault(peer, []).append(answer)
    return {peer: r for peer, r in runs.items() if peer not in refused}, refused


def _undisturbed(process: Process, direction: str, calls: int, tries: int) -> float:
    """A run during which nothing else took much of the machine, or the last of so many tries"""
    for _ in range(tries):
        time.sleep(PAUSE)
        began, others = time.perf_counter(), busy() - process.seconds_of_processors()
        answer: float = process("time", direction=direction, calls=calls)
        others, lasted = busy() - process.seconds_of_processors() - others, time.perf_counter() - began
        if others <= OTHERS * lasted * cores() + TICK:
            break
    return answer


def _records(case: Case, direction: str, runs: Runs, refused: dict[str, str]) -> Iterator[dict[str, Any]]:
    speeds = {peer: OPERATIONS / median(_all(runs[peer])) for peer in (PRODUCT, PRODUCT_AVX2) if peer in runs}
    for peer in [*runs, *refused]:
        record = {"question": "time", "case": case.name, "sizes": case._asdict(), "pass": direction, "peer": peer}
        if peer in refused:
            yield record | {"refused": refused[peer]}
            continue
        seconds = _all(runs[peer])
        record |= {"seconds": seconds, "median": median(seconds), "processes": [median(own) for own in runs[peer]]}
        if peer in speeds:
            yield record | {"flops_per_second": speeds[peer]}
            continue
        speed = speeds[PRODUCT_AVX2 if peer in KERNELS else PRODUCT]
        yield record | {"of_product": products(case, direction) / median(seconds) / speed}


def _show(case: Case, direction: str, records: list[dict[str, Any]], runs: str) -> None:
    medians, rows, speeds = {r["peer"]: r["median"] for r in records if "median" in r}, [], []
    for r in records:
        if "flops_per_second" in r:
            kernels = "" if r["peer"] == PRODUCT else " by AVX2 kernels"
            speeds.append(f"{r['flops_per_second'] / 1e9:.0f}{kernels}")
        elif "refused" not in r:
            spread = f"{table.seconds(min(r['processes']))} … {table.seconds(max(r['processes']))}"
            share = f"{100 * r['of_product']:.0f} %"
            to_torch = table.ratio(r["median"], medians.get(EAGER))
            rows.append((r["peer"], table.seconds(r["median"]), spread, share, to_torch))
        elif r["peer"] != PRODUCT_AVX2:
            rows.append((r["peer"], r["refused"]))
    about = f"{runs}; float32 matrix product {', '.join(speeds)} GFLOP/s"
    table.show(f"{case}\n{direction}, {about}", COLUMNS, rows)


def _all(processes: list[list[float]]) -> list[float]:
    return [seconds for own in processes for seconds in own]
