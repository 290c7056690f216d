"""How large? The peak of a process above its inputs and parameters, outputs and gradients included.

Each peer and case in a fresh process; `worker.Worker.memory` describes how it is measured.
"""

from collections.abc import Iterator
from typing import Any

from . import table
from .cases import Case, scores_bytes
from .peers import EAGER
from .processes import RefusedError, peak_memory

COLUMNS = ("peer", "peak", "of all scores", "to PyTorch")


def run(cases: list[Case], peers: list[str], threads: int) -> Iterator[dict[str, Any]]:
    """A record for each case and peer; a table for each case."""
    for case in cases:
        records = [measure(case, peer, threads) for peer in peers]
        peaks = {r["peer"]: r["bytes"] for r in records if "bytes" in r}
        rows = []
        for r in records:
            if "refused" in r:
                rows.append((r["peer"], r["refused"]))
                continue
            of_scores = f"{r['bytes'] / scores_bytes(case):.2f}"
            rows.append((r["peer"], table.megabytes(r["bytes"]), of_scores, table.ratio(r["bytes"], peaks.get(EAGER))))
        scores = table.megabytes(scores_bytes(case))
        title = f"{case}\n{case.passes[-1]}, peak memory above inputs and parameters; all scores would be {scores}"
        table.show(title, COLUMNS, rows)
        yield from records


def measure(case: Case, peer: str, threads: int) -> dict[str, Any]:
    record = {"question": "memory", "case": case.name, "sizes": case._asdict(), "pass": case.passes[-1], "peer": peer}
    try:
        return record | {"bytes": peak_memory(peer, case, threads)}
    except RefusedError as reason:
        return record | {"refused": str(reason)}
