"""`funcmha info`: what a report of a fault should say of the machine and of what is installed."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from funcmha import __version__, engines
from funcmha.engines.plan import FEW_SCORES, FEW_SHARED_KEYS
from funcmha.engines.tiled.quota import cpu_quota
from funcmha.engines.tiled.threads import UNASKED, VARIABLES, num_threads

LIBRARIES = (
    *("cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "ml_dtypes", "safetensors", "transformers", "mpi4py"),
    *("array-api-compat", "hypothesis", "matplotlib", "rich"),
)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    found = info()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found))
    print("\n".join(f"{name.ljust(width)}  {text}" for name, text in found.items()))
    return 0


def info() -> dict[str, str]:
    """Each line by its name"""
    return {
        "funcmha": f"{__version__}, {Path(engines.__file__).parents[1]}",
        "Python": f"{platform.python_version()}, {platform.python_implementation()}",
        "system": f"{platform.platform()}, {platform.machine()}",
        "NumPy": np.__version__,
        "BLAS": _blas(),
        "cores": _cores(),
        "threads": _threads(),
        "engines": ", ".join(engines.ENGINES),
        "default engine": _default_engine(),
        "GPU": _gpu(),
        "libraries": _libraries(),
    }


def _blas() -> str:
    """Of each library that is loaded, its version and kernels"""
    found = [
        f"{library['internal_api']} {library['version']}, kernels for {library.get('architecture', 'unknown')}, "
        f"{library['num_threads']} threads"
        for library in threadpool_info()
        if library["user_api"] == "blas"
    ]
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # threadpoolctl does not know Accelerate
    return "; ".join(found) or f"{built['name']} {built['version']}, kernels unknown"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return f"{usable} of {os.cpu_count()}" + ("" if quota == float("inf") else f", of which a quota of {quota:g}")


def _threads() -> str:
    """Of the tiled engine, and the variables that bear on them"""
    given = [f"{n}={os.environ[n]}" for n in ("FUNCMHA_NUM_THREADS", *VARIABLES, *UNASKED) if n in os.environ]
    try:
        return ", ".join([str(num_threads()), *given])
    except ValueError as error:
        return str(error)


def _default_engine() -> str:
    """As `pick` says"""
    few, many = (engines.pick(None, np.zeros(1), 1, 1, 1, n).name for n in (FEW_SCORES, FEW_SCORES + 1))
    other = engines.pick(None, None, 1, 1, 1, FEW_SCORES + 1).name
    shared = f" (and {FEW_SHARED_KEYS} keys that heads share)"
    return f"of NumPy arrays {few} up to {FEW_SCORES} scores of a sample{shared}, {many} beyond; of all others {other}"


def _gpu() -> str:
    """Each device, or why there is none"""
    if find_spec("cupy") is None:
        return "none: CuPy is not installed"
    import cupy

    if not cupy.is_available():
        return f"none: CuPy {cupy.__version__} finds no CUDA device"
    runtime = cupy.cuda.runtime
    devices = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    names = [f"{device['name'].decode()}, sm_{device['major']}{device['minor']}" for device in devices]
    return "; ".join([*names, f"CUDA {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"])


def _libraries() -> str:
    found = {name: _version(name) for name in LIBRARIES}
    return ", ".join(f"{name} {number}" for name, number in found.items() if number) or "none"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
