"""How many CPUs this process may use: by affinity, and by the quota of its control group."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

from cbn._dispatch import kernels

PROC = Path("/proc/self")


def affinity() -> int:
    """The CPUs that the scheduler may put this process on."""
    # Not the affinity of this thread: where a variable such as OMP_PROC_BIND is set, OpenMP has
    # bound it to a single CPU and will bind each of its other threads to another.
    if num_procs := int(kernels.num_procs()):
        return num_procs
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(proc: Path = PROC) -> float | None:
    """The CPUs that the control group of this process may use on average; None: no limit.

    Read from cpu.max (cgroup v2) or cpu.cfs_quota_us (v1), of the group and of every group that it
    is in: the least counts. What is not there or cannot be read sets no limit.
    """
    limits = [limit for folder in _folders(proc) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(proc: Path) -> list[Path]:
    """The folders of the groups that may limit this process, from its own upwards."""
    groups = {}  # by version
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            groups[1] = PurePosixPath(path)

    folders = []
    for line in _lines(proc / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        root, mount = fields.split()[3:5]
        name, _, options = kind.split(" ", 2)
        version = {"cgroup2": 2, "cgroup": 1}.get(name)
        if version not in groups or (version == 1 and "cpu" not in options.split(",")):
            continue
        # In a container the group may lie outside of what is mounted: then its root is the group.
        group = groups[version]
        inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        folders += [Path(mount, parent) for parent in (inside, *inside.parents)]
    return folders


def _limit(folder: Path) -> float | None:
    for text in _lines(folder / "cpu.max"):
        allowed, _, period = text.partition(" ")
        return _ratio(allowed, period)
    for allowed in _lines(folder / "cpu.cfs_quota_us"):
        for period in _lines(folder / "cpu.cfs_period_us"):
            return _ratio(allowed, period)
    return None


def _ratio(allowed: str, period: str) -> float | None:
    """Microseconds of each period; "max" and -1 mean all."""
    try:
        ratio = int(allowed) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return ratio if ratio > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def available() -> tuple[int, str]:
    """The CPUs worth a thread each, and what limits them."""
    cpus, why = affinity(), "CPU affinity"
    limit = quota()
    if limit is not None and math.ceil(limit) < cpus:
        return math.ceil(limit), f"quota of {limit:g} CPUs"
    return cpus, why
