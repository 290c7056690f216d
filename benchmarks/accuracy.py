"""How far from float64? Output and gradients of every peer in float32, against PyTorch in float64 on the same numbers.

For the output, and for the worst gradient, the largest error relative to the largest entry. Then the worst error of any
entry relative to its bound (`funcmha.testing.tolerance`), which is at most 1 for a correct implementation. Last the
largest error of a quantity relative to PyTorch's error of that quantity, for the worst quantity, which is named.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from funcmha import tree
from funcmha.testing.tolerance import mha_bounds, worst_ratio

from . import table
from .cases import Case, draw, scores_bytes
from .machine import memory_available
from .peers import EAGER
from .processes import RefusedError, start

Values = dict[str, np.ndarray]
COLUMNS = ("peer", "output", "worst gradient", "of bound", "worst quantity", "to PyTorch")
ZERO = 1e-9  # the gradient of k_proj.b is 0 in exact arithmetic, and has no relative error
COPIES = 2 * 14  # float64 arrays of all scores that the bounds hold at once


def run(cases: list[Case], peers: list[str], threads: int) -> Iterator[dict[str, Any]]:
    """A record for each case and peer; a table for each case that is small enough."""
    for case in cases:
        if case.kind != "self" or COPIES * scores_bytes(case) > memory_available() / 2:
            print(
                f"\n{case.name}: accuracy skipped: the bounds are for self-attention that fits in memory {COPIES} times"
            )
            continue
        exact, bound = _values(EAGER, case, threads, "float64"), _bounds(case)
        if isinstance(exact, str):
            print(f"\n{case.name}: accuracy skipped: PyTorch in float64 {exact}")
            continue
        records = [_record(case, peer, exact, bound, threads) for peer in peers]
        _show(case, records)
        yield from records


def _values(peer: str, case: Case, threads: int, dtype: str = "float32") -> Values | str:
    """By name; or the reason why there are none."""
    with start([peer], threads) as (process,), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.npz"
        try:
            process.prepare(case, dtype)
            process("save", path=str(path))
        except RefusedError as reason:
            return str(reason)
        with np.load(path) as npz:
            return dict(npz)


def _bounds(case: Case) -> Values:
    """By name. The gradient of x is a sum of three, so its bound is too."""
    params, (x,), dy = draw(case)
    b = mha_bounds(params, x, x, x, None, dy, mask=case.mask(), dtype="float32")
    return {"y": b.y, "x": b.dquery + b.dkey + b.dvalue} | tree.flatten(b.dparams)


def _record(case: Case, peer: str, exact: Values, bound: Values, threads: int) -> dict[str, Any]:
    record = {"question": "accuracy", "case": case.name, "sizes": case._asdict(), "peer": peer}
    got = _values(peer, case, threads)
    if isinstance(got, str):
        return record | {"refused": got}
    return record | {
        "errors": {name: float(np.abs(got[name] - want).max()) for name, want in exact.items()},
        "largest": {name: float(np.abs(want).max()) for name, want in exact.items()},
        "of_bound": {name: worst_ratio(got[name], want, bound[name]) for name, want in exact.items()},
    }


def _show(case: Case, records: list[dict[str, Any]]) -> None:
    torch_errors = next((r["errors"] for r in records if r["peer"] == EAGER and "errors" in r), None)
    rows = []
    for r in records:
        if "refused" in r:
            rows.append((r["peer"], r["refused"]))
            continue
        relative = {name: r["errors"][name] / size for name, size in r["largest"].items() if size > ZERO}
        output, gradient = relative.pop("y"), max(relative.values())
        row = [r["peer"], f"{output:.1e}", f"{gradient:.1e}", f"{max(r['of_bound'].values()):.2f}"]
        if torch_errors is None:
            rows.append((*row, "", ""))
            continue
        ratios = {name: error / torch_errors[name] for name, error in r["errors"].items()}
        worst = max(ratios, key=ratios.get)
        rows.append((*row, worst, f"{ratios[worst]:.2f}"))
    table.show(f"{case}\nforward + backward, errors in float32 against float64", COLUMNS, rows)
