"""The machine and the versions, for the lines above every table; and the free memory."""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import funcmha

LIBRARIES = ("numpy", "torch", "jax", "jaxlib", "onnxruntime")


def describe(threads: int) -> dict[str, str]:
    found = {"machine": f"{_processor()}, {cores()} cores, {_memory('MemTotal') / 2**30:.0f} GiB, {platform.system()}"}
    found["threads"] = str(threads)
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.1f}"
    found["python"] = platform.python_version()
    found["funcmha"] = funcmha.__version__
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    found["numpy"] += f" with {blas['name']} {blas['version']}{_kernels()}"
    return found


def _kernels() -> str:
    """Which of its kernels a BLAS has chosen: OPENBLAS_CORETYPE can make it choose slower ones than the machine has."""
    chosen = (x.get("architecture") for x in threadpool_info() if x["user_api"] == "blas")
    return "".join(f", {name} kernels" for name in chosen if name)


def cores() -> int:
    """The number that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> float:
    """Seconds of all cores that were not idle since the machine began; 0 if unknown."""
    with suppress(OSError):
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory_available() -> float:
    """Bytes; 4 GiB if unknown."""
    return _memory("MemAvailable") or 4 * 2**30


def _memory(field: str) -> float:
    return _field("/proc/meminfo", field, 0.0, lambda text: float(text.split()[0]) * 1024)


def _processor() -> str:
    return _field("/proc/cpuinfo", "model name", platform.processor() or platform.machine(), str)


def _field(path: str, name: str, default: Any, read: Callable[[str], Any]) -> Any:
    """`name: value` in a file of Linux, or the default."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return read(value.strip())
    return default
