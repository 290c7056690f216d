"""How do time and memory grow with the length? Causal self-attention of 8 heads of 64, forward + backward."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import memory, table, timing
from .cases import Case, of_length
from .peers import EAGER, PRODUCT
from .processes import start

LENGTHS = tuple(256 * 2**i for i in range(9))  # 256 … 65536
COLUMNS = ("T", "peer", "median", "of matrix product", "peak", "time to PyTorch", "peak to PyTorch")
LONG = 16384  # beyond this there is one run, which takes a minute


def run(longest: int, peers: list[str], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """A record of time and one of memory for each length and peer; one table for all."""
    records = []
    for T in LENGTHS[: LENGTHS.index(longest) + 1]:
        print(f"T={T}", file=sys.stderr)
        records += _measure(of_length(T), peers, 1 if T > LONG else repeats, threads)
    table.show("forward + backward against the length", COLUMNS, list(_rows(records, peers)))
    yield from records


def _measure(case: Case, peers: list[str], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    with start([PRODUCT, *peers], threads) as processes:
        times = list(timing.measure(case, case.passes[-1], processes, repeats))
    for record in [*times, *(memory.measure(case, peer, threads) for peer in peers)]:
        yield record | {"of": "scaling"}


def _rows(records: list[dict[str, Any]], peers: list[str]) -> Iterator[tuple[str, ...]]:
    times, shares, peaks = (_series(records, value) for value in ("median", "of_product", "bytes"))
    reasons = _series(records, "refused")
    for T in sorted({r["sizes"]["T"] for r in records}):
        for peer in peers:
            if T in reasons.get(peer, {}):
                yield (str(T), f"{peer} {reasons[peer][T]}")
                continue
            to_torch = (table.ratio(x[peer][T], x.get(EAGER, {}).get(T)) for x in (times, peaks))
            share = f"{100 * shares[peer][T]:.0f} %"
            yield (str(T), peer, table.seconds(times[peer][T]), share, table.megabytes(peaks[peer][T]), *to_torch)


def _series(records: list[dict[str, Any]], value: str) -> dict[str, dict[int, Any]]:
    """peer: {T: value}"""
    found: dict[str, dict[int, Any]] = {}
    for r in records:
        if value in r:
            found.setdefault(r["peer"], {})[r["sizes"]["T"]] = r[value]
    return found


def plot(records: list[dict[str, Any]], folder: Path, header: str) -> list[Path]:
    """performance-time.png and performance-memory.png, or an ImportError where matplotlib is not installed"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if r.get("of") == "scaling"]
    paths = []
    for what, value, unit, size in (("time", "median", "seconds", 1), ("memory", "bytes", "MB", 1e6)):
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for peer, points in _series(records, value).items():
            if peer != PRODUCT:
                axes.plot(list(points), [y / size for y in points.values()], marker="o", label=peer)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="length T", ylabel=unit)
        axes.set_title(f"{what}, forward + backward, 8 causal heads of 64\n{header}", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"performance-{what}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths
