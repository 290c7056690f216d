"""How do time and memory grow with the length? Causal self-attention of 8 heads of 64, forward + backward."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import memory, table, timing
from .cases import of_length
from .peers import EAGER

LENGTHS = tuple(256 * 2**i for i in range(9))  # 256 … 65536
COLUMNS = ("T", "peer", "median", "of matrix product", "peak", "time to PyTorch", "peak to PyTorch")
LONG = 16384  # from here on one run tells enough: it takes seconds


def run(longest: int, peers: list[str], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """A record of time and one of memory for each length and peer, each told in a table of its own, and one for all."""
    everything = []
    for case in map(of_length, LENGTHS[: LENGTHS.index(longest) + 1]):
        runs = 1 if case.T > LONG else repeats
        records = [r for r in timing.run([case], peers, runs, threads) if r["pass"] == case.passes[-1]]
        records += memory.run([case], peers, threads)
        everything += records
        yield from ({**r, "of": "scaling"} for r in records)
    table.show("forward + backward against the length", COLUMNS, list(_rows(everything, peers)))


def _rows(records: list[dict[str, Any]], peers: list[str]) -> Iterator[tuple[str, ...]]:
    times, peaks = _series(records, "time", "median"), _series(records, "memory", "bytes")
    shares = _series(records, "time", "of_product")
    for T in sorted({T for series in times.values() for T in series}):
        for peer in peers:
            t, m = times.get(peer, {}).get(T), peaks.get(peer, {}).get(T)
            if t is None or m is None:
                continue
            share = f"{100 * shares[peer][T]:.0f} %"
            to_torch = (table.ratio(x, s.get(EAGER, {}).get(T)) for x, s in ((t, times), (m, peaks)))
            yield (str(T), peer, table.seconds(t), share, table.megabytes(m), *to_torch)


def _series(records: list[dict[str, Any]], question: str, value: str) -> dict[str, dict[int, float]]:
    """peer: {T: value}"""
    found: dict[str, dict[int, float]] = {}
    for r in records:
        if r["question"] == question and value in r:
            found.setdefault(r["peer"], {})[r["sizes"]["T"]] = r[value]
    return found


def plot(records: list[dict[str, Any]], folder: Path, header: str) -> list[Path]:
    """performance-time.png and performance-memory.png, or an ImportError where matplotlib is not installed"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if r.get("of") == "scaling"]
    paths = []
    for question, value, unit, size in (("time", "median", "seconds", 1), ("memory", "bytes", "MB", 1e6)):
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for peer, points in _series(records, question, value).items():
            if peer != "product":
                axes.plot(list(points), [y / size for y in points.values()], marker="o", label=peer)
        axes.set(xscale="log", yscale="log", xlabel="length T", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_title(f"{question}, forward + backward, 8 causal heads of 64\n{header}", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"performance-{question}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths
