"""How fast? Every peer in its own process, all alive at the same time, with alternated runs: A B C A B C …

So other load on the machine affects all of them equally. One run is as many calls as fill a tenth of a second, at least
one; the table shows the median and the quartiles of the runs. A pause before each run lets the threads of the previous
peer fall asleep: those of OpenBLAS and OpenMP spin for a while.

The matrix product of the machine is one of the alternated runs. "Of matrix product" is the share of its speed, for the
operations of a tiled attention (`cases.products`). This count is the same for every peer: one that keeps all weights
does fewer in its backward, and one that cannot skip masked tiles does more.
"""

import time
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

from . import table
from .cases import Case, products
from .peers import EAGER, PRODUCT
from .peers.product import OPERATIONS
from .processes import Process, RefusedError, start

PAUSE = 0.1  # seconds
COLUMNS = ("peer", "median", "quartiles", "of matrix product", "to PyTorch")


def run(cases: list[Case], peers: list[str], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """A record for each case, pass and peer; a table for each case and pass."""
    with start([PRODUCT, *peers], threads) as processes:
        for case in cases:
            refused = prepare(case, processes)
            for direction in case.passes:
                records = list(measure(case, direction, processes, refused, repeats))
                _show(case, direction, records, repeats)
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


def measure(
    case: Case, direction: str, processes: list[Process], refused: dict[str, str], repeats: int
) -> Iterator[dict[str, Any]]:
    """A record for each peer, also for those that refused, and for `product`."""
    runs, more = _alternate([p for p in processes if p.peer not in refused], direction, repeats)
    yield from _records(case, direction, runs, refused | more)


def _alternate(processes: list[Process], direction: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every run, by peer; and the reasons of those that failed."""
    calls, runs, refused = {}, {}, {}
    for repeat in range(repeats + 1):
        for process in processes:
            peer = process.peer
            if peer in refused:
                continue
            time.sleep(PAUSE)
            what = "forward" if peer == PRODUCT else direction
            try:
                answer = process("time", direction=what, calls=calls.get(peer, 0))
            except RefusedError as reason:
                refused[peer] = str(reason)
                continue
            if repeat == 0:
                calls[peer] = answer
            else:
                runs.setdefault(peer, []).append(answer)
    return {peer: r for peer, r in runs.items() if peer not in refused}, refused


def _records(
    case: Case, direction: str, runs: dict[str, list[float]], refused: dict[str, str]
) -> Iterator[dict[str, Any]]:
    speed = OPERATIONS / median(runs[PRODUCT])
    for peer in [*runs, *refused]:
        record = {"question": "time", "case": case.name, "sizes": case._asdict(), "pass": direction, "peer": peer}
        if peer in refused:
            yield record | {"refused": refused[peer]}
            continue
        middle = median(runs[peer])
        record |= {"seconds": runs[peer], "median": middle}
        if peer == PRODUCT:
            yield record | {"flops_per_second": speed}
            continue
        yield record | {"of_product": products(case, direction) / middle / speed}


def _show(case: Case, direction: str, records: list[dict[str, Any]], repeats: int) -> None:
    medians = {r["peer"]: r["median"] for r in records if "median" in r}
    rows = []
    for r in records:
        if "refused" in r:
            rows.append((r["peer"], r["refused"]))
        elif r["peer"] != PRODUCT:
            low, high = _quartiles(r["seconds"])
            spread = f"{table.seconds(low)} … {table.seconds(high)}"
            share = f"{100 * r['of_product']:.0f} %"
            to_torch = table.ratio(r["median"], medians.get(EAGER))
            rows.append((r["peer"], table.seconds(r["median"]), spread, share, to_torch))
    speed = next(r["flops_per_second"] for r in records if r["peer"] == PRODUCT)
    about = f"{repeats} alternated runs; float32 matrix product {speed / 1e9:.0f} GFLOP/s"
    table.show(f"{case}\n{direction}, {about}", COLUMNS, rows)


def _quartiles(x: list[float]) -> tuple[float, float]:
    if len(x) == 1:
        return x[0], x[0]
    low, _, high = quantiles(x, n=4, method="inclusive")
    return low, high
