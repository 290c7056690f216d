"""`funcmha inspect`: what a parameter file holds."""

import argparse
import json
from math import prod

import numpy as np

from funcmha import npz
from funcmha.params import SPEC, Params, sizes

from .terminal import print_table, shape_text


def run(args: argparse.Namespace) -> int:
    """Print what the file says; nothing of its numbers is read."""
    entries = npz.entries(args.file)
    trees = _attention_trees(entries)
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


def _axes(name: str) -> str | None:
    """The axes of blocks.0.attn.q_proj.w are those of q_proj.w."""
    return SPEC.get(".".join(name.split(".")[-2:]))


def _attention_trees(entries: dict[str, npz.Entry]) -> dict[str, dict[str, int] | str]:
    """The sizes of every tree of SPEC in the file by the path to it, or why it has none."""
    found: dict[str, Params] = {}
    for name, entry in entries.items():
        if _axes(name):
            *prefix, group, leaf = name.split(".")
            params = found.setdefault(".".join(prefix), {})
            params.setdefault(group, {})[leaf] = np.broadcast_to(np.zeros((), entry.dtype), entry.shape)
    return {prefix: _sizes(params) for prefix, params in found.items()}


def _sizes(params: Params) -> dict[str, int] | str:
    try:
        return sizes(params)._asdict()
    except (KeyError, TypeError, ValueError) as error:
        return f"no attention: {error.args[0]}"
