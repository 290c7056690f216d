"""What every test shares: hypothesis profiles, and the array libraries to run on."""

import ast
import gc
import importlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import array_api_strict
import fake_cupy
import hypothesis
import numpy as np
import pytest

from funcmha import engines, tree

# The same examples on every machine; CI draws more of them, and the night most: HYPOTHESIS_PROFILE=ci make test-all
hypothesis.settings.register_profile("dev", max_examples=10, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("dev"), max_examples=50)
# To see a fault caught, by the first example that fails: the least one can take minutes to find.
found = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
hypothesis.settings.register_profile("mutants", hypothesis.settings.get_profile("ci"), phases=found)
hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

if find_spec("torch"):
    importlib.import_module("torch").set_num_threads(1)  # the problems are small


HERE = Path(__file__).parent


# What `make matrix` does without: it has the core alone. A test that imports one of these is skipped there.
OPTIONAL = {"torch", "jax", "flax", "equinox", "keras", "onnx", "safetensors", "transformers", "rich", "matplotlib"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """Skip where the core has no library for the test."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in OPTIONAL or find_spec(name):
            raise
        pytest.skip(f"{name} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Any:
    """The same of fixtures."""
    return (yield from pytest_runtest_call())


@cache
def lacking(name: str) -> frozenset[str]:
    """What a file of tests, or one beside it, imports, and is not here."""
    found = set()
    body = ast.parse((HERE / name).read_text(encoding="utf-8")).body
    for node in [x for part in body for x in (part.body if isinstance(part, ast.With) else [part])]:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for module in {module.partition(".")[0] for module in modules}:
            beside = f"{module}.py"
            found |= lacking(beside) if (HERE / beside).exists() else set() if find_spec(module) else {module}
    return frozenset(found)


collect_ignore = [path.name for path in sorted(HERE.glob("test_*.py")) if lacking(path.name)]


def pytest_collection_finish() -> None:
    """What has been imported lives as long as the run: to look through it at every collection takes a tenth of that."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Which files are left out, and why: none where `make test` has set up what they need."""
    return [f"left out without {', '.join(sorted(lacking(name)))}: {name}" for name in collect_ignore]


class Library(NamedTuple):
    """An array library: how to make its arrays from NumPy's, and how to get them back."""

    name: str
    to: Any
    back: Any

    def tree(self, x: Any) -> Any:
        """A tree, a mask or None of NumPy arrays in this library."""
        return tree.map(lambda a: self.to(a) if isinstance(a, np.ndarray) else a, x)


def _read_only(a: np.ndarray) -> np.ndarray:
    view = a.view()
    view.flags.writeable = False
    return view


def _cupy() -> Library:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.is_available():
        pytest.skip("no CUDA device")
    return Library("cupy", cupy.asarray, cupy.asnumpy)


def _strict(device: str) -> Library:
    place = array_api_strict.Device(device)
    cpu = array_api_strict.Device("CPU_DEVICE")
    return Library(
        f"array_api_strict on {device}",
        lambda a: array_api_strict.asarray(np.array(a), device=place),
        lambda a: np.asarray(a.to_device(cpu)),
    )


_LIBRARIES = {
    "numpy": lambda: Library("numpy", np.array, np.asarray),
    "numpy-read-only": lambda: Library("read-only numpy", _read_only, np.asarray),
    "strict": lambda: _strict("CPU_DEVICE"),
    "strict-device1": lambda: _strict("device1"),
    "cupy": _cupy,
    "cupy-stand-in": lambda: Library("cupy", fake_cupy.MODULE.asarray, fake_cupy.MODULE.asnumpy),
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cupy" else ()) for n in _LIBRARIES])
def xp(request: pytest.FixtureRequest) -> Any:
    """Each library in turn. Of what a test calls with arrays of the stand-in, nothing may wait for a device."""
    if request.param != "cupy-stand-in":
        yield _LIBRARIES[request.param]()
        return
    with fake_cupy.installed(), fake_cupy.traffic() as seen:
        yield _LIBRARIES[request.param]()
    assert seen.waits == []


# Tiles so small that it takes many of them, heads one by one, and projections that the gradient makes again.
SMALL = engines.Plan(
    tile_rows=4,
    tile_cols=3,
    stack_numbers=24,
    many_heads=3,
    few_queries=2,
    few_block=3,
    kept_numbers=0,
    group_numbers=0,
    group_columns=0,
    whole_scores=20,
    joined_rows=8,
    linear_rows=5,
    weight_block=4,
)
BLOCKS = engines.BATCHED._replace(name="blocks", plan=SMALL._replace(score_bytes=0, numpy_bytes=0, block_side=3))
EACH = (engines.SEQUENTIAL, engines.BATCHED._replace(plan=SMALL), BLOCKS, engines.TILED._replace(plan=SMALL))
each = pytest.fixture(scope="module", params=EACH, ids=lambda engine: engine.name)


@each
def engine(request: pytest.FixtureRequest) -> engines.Engine:
    """The three engines, each tested with NumPy arrays; with small tiles and groups, and batched also by blocks."""
    return request.param


@each
def each_engine(request: pytest.FixtureRequest) -> Any:
    """The same as the default, while the fixture lasts: for adapters, which take no engine."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("engines", "kv_cache.step"):
            patch.setattr(importlib.import_module(f"funcmha.{module}"), "pick", _always(request.param))
        yield request.param


@pytest.fixture(params=[engines.Plan().few_queries, 0], ids=["few queries", "tiles"])
def few_queries(request: pytest.FixtureRequest) -> Any:
    """The tiled engine with the path of few queries, and without it."""
    return engines.TILED._replace(plan=engines.Plan(few_queries=request.param))


def _always(engine: engines.Engine) -> Any:
    def pick(given: Any, x: Any, *sizes: int) -> engines.Engine:
        if given is None and isinstance(x, np.ndarray) and x.dtype.kind != "c":
            return engine
        return engines_pick(given, x, *sizes)

    return pick


engines_pick = engines.pick
