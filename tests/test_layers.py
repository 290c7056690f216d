"""Arrows point one way: each module imports from the layers below its own and from its own, and from no other."""

import ast
import re
from pathlib import Path

import pytest

import funcmha

PACKAGE = Path(funcmha.__file__).parent
LAYERS = (  # a module is found by its own name, or by that of the folder that it is in
    ("_arrays", "_check", "tree"),
    ("masks", "biases", "dropout", "norms", "rotary", "params"),
    ("_arguments",),
    ("ops",),
    ("mha",),
    ("engines",),
    ("derivatives", "kv_cache", "surgery", "merge", "packing", "npz"),
    ("interop", "parallel"),
    ("testing",),
    ("commands",),
    ("__main__",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")  # which imports them all


def module_of(path):
    """Its parts below the package, without the last where it is an `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path, text):
    """The parts, below the package, of each module that a file imports, inside functions too."""
    *folder, _ = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")[1:]) for name in node.names if name.name.split(".")[0] == "funcmha")
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else None
            source = [*above, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            if node.level == 0 and source.pop(0) != "funcmha":
                continue
            source = tuple(part for part in source if part)
            for name in node.names:
                whole = PACKAGE.joinpath(*source, name.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").exists()
                yield (*source, name.name) if is_module else source


def upward(path, text):
    """The imports of a file from a layer above its own, or from the package as a whole, which is above all."""
    own, top = LEVELS[module_of(path)[0]], len(LAYERS) - 1
    above = (parts for parts in imported(path, text) if (LEVELS[parts[0]] if parts else top) > own)
    return {".".join(("funcmha", *parts)) for parts in above}


def test_every_module_has_a_layer():
    assert {module_of(path)[0] for path in FILES} == LEVELS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_no_import_runs_upwards(path):
    assert upward(path, path.read_text()) == set()


PLANTED = {
    "from . import engines": {"funcmha.engines"},
    "from .engines import pick": {"funcmha.engines"},
    "from funcmha.engines.tiled import threads": {"funcmha.engines.tiled.threads"},
    "import funcmha.kv_cache": {"funcmha.kv_cache"},
    "def f():\n    from funcmha import mha": {"funcmha.mha"},
    "import funcmha": {"funcmha"},
    "from . import _check, tree\nimport numpy\nfrom .masks import dense": set(),
}


@pytest.mark.parametrize(("text", "found"), PLANTED.items())
def test_a_planted_import_is_found(text, found):
    assert upward(PACKAGE / "ops.py", text) == found


# ── the specification ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["ops.py", "mha.py"])
def test_the_specification_knows_no_engine(name):
    """Nor plans, threads, tiles and groups: the one word of these is that for heads that share keys and values."""
    text = (PACKAGE / name).read_text().lower().replace("grouped-query", "")
    assert re.findall("engine|plan|thread|tile|group", text) == []


def test_the_specification_of_mha_is_read_in_five_minutes():
    assert len((PACKAGE / "mha.py").read_text().splitlines()) <= 300
