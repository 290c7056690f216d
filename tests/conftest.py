"""What every test shares: hypothesis profiles, and the array libraries to run on."""

import importlib
from typing import Any, NamedTuple

import array_api_strict
import hypothesis
import numpy as np
import pytest
import torch

from funcmha import engines, tree
from funcmha.engines.tiled import few, tiles

# The same examples on every machine, and more of them when asked: HYPOTHESIS_PROFILE=nightly make test
hypothesis.settings.register_profile("dev", max_examples=50, deadline=None, derandomize=True, database=None)
# To see a fault caught, by the first example that fails: the least one can take minutes to find.
found = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
hypothesis.settings.register_profile("mutants", hypothesis.settings.get_profile("dev"), phases=found)
hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(__import__("os").environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.set_num_threads(1)  # the problems are small


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
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cupy" else ()) for n in _LIBRARIES])
def xp(request: pytest.FixtureRequest) -> Library:
    return _LIBRARIES[request.param]()


@pytest.fixture(scope="module", params=engines.ENGINES, ids=lambda engine: engine.name)
def each_engine(request: pytest.FixtureRequest) -> Any:
    """What is tested of NumPy arrays is tested of every engine, in tiles so small that it takes many of them.

    And with projections that the gradient makes again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", 4)
        patch.setattr(tiles, "COLS", 3)
        patch.setattr(importlib.import_module("funcmha.heads"), "SMALL", 0)
        patch.setattr(few, "ROWS", 2)
        patch.setattr(few, "BLOCK", 3)
        if request.param is engines.TILED:  # and the gradient head by head, where the other takes all at once
            patch.setattr(importlib.import_module("funcmha.mha"), "GROUP", 0)
        for module in ("engines", "_doors_of_heads"):
            patch.setattr(importlib.import_module(f"funcmha.{module}"), "pick", _always(request.param))
        yield request.param


@pytest.fixture(params=[few.ROWS, 0], ids=["as few", "in tiles"])
def few_queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested of a few queries, which the tiled engine does not cut into tiles, is tested of tiles too."""
    monkeypatch.setattr(few, "ROWS", request.param)


def _always(engine: engines.Engine) -> Any:
    def pick(given: engines.Engine | None, x: Any, longest: int) -> engines.Engine:
        if given is None and isinstance(x, np.ndarray) and x.dtype.kind != "c":
            return engine
        return engines.SEQUENTIAL if given is None else given

    return pick
