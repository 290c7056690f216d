"""Problems and answers in an npz file, for implementations that no Python calls: computed elsewhere, judged here.

For each case the file has `NAME/q`, `NAME/k`, …, and `NAME/options`: JSON of the options, the dtype and what is due.
All is in the layout and the conventions declared, in float64 (of numbers that the dtype has) or boolean. Answers come
as `NAME/o`, `NAME/dq`, … in any floating dtype; a case of which there is nothing was not run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from funcmha._arrays import Array

from .calling import OptionsOf, canonical
from .cases import Case, cases
from .checking import Report, report_of
from .implementation import DIFFERENTIABLE, DeclarationError, Implementation
from .problems import Numbers, numbers
from .reference import allowed, without_cotangents
from .verdicts import OK, Judged, judge_values


def write(impl: Implementation, path: str | Path, **chosen: Any) -> int:
    """The problems of every case that the declaration takes; how many there are. The forward is not called."""
    arrays: dict[str, Array] = {}
    listed = list(_problems(impl, **chosen))
    for case, x in listed:
        given = OptionsOf(impl, case.problem, x)
        arrays |= {f"{case.name}/{name}": a for name, a in given.arrays.items()}
        told = {"dtype": case.dtype, "due": _due(impl, given), **given.static}
        arrays[f"{case.name}/options"] = np.array(json.dumps(told))
    with open(path, "wb") as file:  # np.savez adds .npz to a path that ends in something else
        np.savez(file, **arrays)
    return len(listed)


def judge(impl: Implementation, path: str | Path, **chosen: Any) -> Report:
    """The report on what came back; raises DeclarationError for an answer that no case is due"""
    try:
        with np.load(path, allow_pickle=False) as file:
            answers = {name: file[name] for name in file.files}
    except ValueError as error:
        raise DeclarationError(f"{path} must be an npz file of numbers: {error}") from None
    judged: dict[tuple[str, str], list[list[Judged]]] = {}
    left_out = 0
    for case, x in _problems(impl, **chosen):
        given = OptionsOf(impl, case.problem, x)
        got = {name: answers.pop(f"{case.name}/{name}", None) for name in _due(impl, given)}
        if all(a is None for a in got.values()):
            left_out += 1
            continue
        values = {n: None if a is None else canonical(impl, given.order, n, a) for n, a in got.items()}
        rows = [_or_missing(row, values) for row in judge_values(impl, case, x, values)]
        judged.setdefault((case.feature, case.dtype), []).append(rows)
    unknown = next((n for n in answers if n.rpartition("/")[2] not in (*_INPUTS, "options")), None)
    if unknown is not None:
        raise DeclarationError(f"{path} has {unknown!r}, which no case is due: --golden says what is, under options")
    return report_of(impl, judged, left_out=left_out)


def _or_missing(row: Judged, values: dict[str, Array]) -> Judged:
    if row.verdict == OK or values[row.quantity] is not None:
        return row
    why, named = f"there is no {row.case.name}/{row.quantity}", "what has a gradient, say so by gradients=(…)"
    return row._replace(why=why, diagnosis=f"if it is not among {named}" if row.quantity[0] == "d" else "")


_INPUTS = (*DIFFERENTIABLE, "mask", "do", "dlse", "dweights")


def _problems(impl: Implementation, **chosen: Any) -> Iterator[tuple[Case, Numbers]]:
    select = chosen.pop("select", lambda case: True)
    for case, refused in cases(impl, **chosen):
        if refused is None and select(case):
            x = numbers(case.problem, case.dtype)
            yield case, without_cotangents(impl, x, allowed(impl, case.problem, x))


def _due(impl: Implementation, given: OptionsOf) -> list[str]:
    grads = impl.gradients if impl.gradients is not None else DIFFERENTIABLE
    return [*impl.returned, *(f"d{n}" for n in grads if n in given.arrays)]
