"""How many processors' time a container has: cgroup v2's cpu.max, v1's cpu.cfs_quota_us.

A process in a container sees every processor of its host, and is stopped for the rest of a period when its threads have
used up the quota: more threads than that take longer than as many. Formats: Documentation/admin-guide/cgroup-v2.rst and
Documentation/scheduler/sched-bwc.rst of Linux.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

Limit = Callable[[str], float]


def cpu_quota(own: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    """The least quota / period of this process's group and of all above it, ∞ where there is none"""
    limits = [math.inf]
    for mount, group, limit in _groups(own, root):
        while True:
            with suppress(OSError, ValueError, ZeroDivisionError):  # not there, and so no limit
                limits.append(limit(mount + group))
            if group in ("", "/"):  # in a container often the only one that is there: it is mounted as the root
                break
            group = os.path.dirname(group)
    return min(limits)


def _groups(own: str, root: str) -> Iterator[tuple[str, str, Limit]]:
    """Where groups may be mounted, which is this process's, and how its limit is read."""
    try:
        lines = _text(own).splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from ((root, group, _v2), (f"{root}/unified", group, _v2))
        elif "cpu" in controllers.split(","):
            yield from ((f"{root}/{controllers}", group, _v1), (f"{root}/cpu", group, _v1))


def _v2(folder: str) -> float:
    quota, period = _text(f"{folder}/cpu.max").split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _v1(folder: str) -> float:
    quota = int(_text(f"{folder}/cpu.cfs_quota_us"))
    return math.inf if quota < 0 else quota / int(_text(f"{folder}/cpu.cfs_period_us"))


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
