"""`funcmha inspect`: what a parameter file holds."""

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from funcmha import npz, tree
from funcmha.params import SPEC, Params, sizes

from . import BadInputError, error_of_picture
from .terminal import print_table, shape_text


def run(args: argparse.Namespace) -> int:
    """Print what the file says; its numbers are read for a picture alone."""
    entries = npz.entries(args.file)
    if args.plot:
        _plot(args.file, Path(args.plot))
    shapes = {name: np.broadcast_to(np.zeros((), entry.dtype), entry.shape) for name, entry in entries.items()}
    trees = {prefix: _sizes(params) for prefix, params in _attentions(shapes).items()}
    numbers, total = sum(prod(entry.shape) for entry in entries.values()), sum(e.nbytes for e in entries.values())
    if args.json:
        leaves = {
            name: {"axes": _axes(name), "shape": entry.shape, "dtype": str(entry.dtype), "bytes": entry.nbytes}
            for name, entry in entries.items()
        }
        totals = {"numbers": numbers, "bytes": total}
        print(json.dumps({"file": args.file, "leaves": leaves, "attention": trees} | totals, indent=2))
        return 0
    cells = [
        (name, _axes(name) or "", shape_text(e.shape), str(e.dtype), f"{e.nbytes:,}") for name, e in entries.items()
    ]
    print_table(args.file, ("leaf", "axes", "shape", "dtype", ">bytes"), cells)
    print()
    for prefix, found in trees.items():
        text = found if isinstance(found, str) else "  ".join(f"{axis}={n}" for axis, n in found.items())
        print(f"{prefix or 'attention'}: {text}")
    print(f"{len(entries)} leaves, {numbers:,} numbers, {total:,} bytes")
    return 0


def _plot(file: str, target: Path) -> None:
    """A picture of each attention in the file: at `target`, or where there are several, with its path in the name"""
    from funcmha.testing import pictures

    every = _attentions(tree.flatten(npz.load(file)))
    found = {prefix: params for prefix, params in every.items() if isinstance(_sizes(params), dict)}
    if not found:
        raise BadInputError(f"{file}: nothing to plot, it holds no parameters of attention")
    for prefix, params in found.items():
        path = target if len(found) == 1 else target.with_name(f"{target.stem}.{prefix}{target.suffix}")
        with error_of_picture():
            pictures.parameters(params, title=f"{file}: {prefix or 'attention'}").savefig(path)


def _axes(name: str) -> str | None:
    """The axes of blocks.0.attn.q_proj.w are those of q_proj.w."""
    return SPEC.get(".".join(name.split(".")[-2:]))


def _attentions(leaves: dict[str, Any]) -> dict[str, Params]:
    """The leaves that SPEC knows, in a tree for each path to them"""
    found: dict[str, Params] = {}
    for name, leaf in leaves.items():
        if _axes(name):
            *prefix, group, last = name.split(".")
            found.setdefault(".".join(prefix), {}).setdefault(group, {})[last] = leaf
    return found


def _sizes(params: Params) -> dict[str, int] | str:
    """Those of a tree, or why it is none of attention"""
    try:
        return sizes(params)._asdict()
    except (KeyError, TypeError, ValueError) as error:
        return f"no attention: {error.args[0]}"
