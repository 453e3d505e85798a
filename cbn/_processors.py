"""How many CPUs this process may use: by affinity, and by the quota of its control group."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath

from cbn._dispatch import kernels

PROC = Path("/proc/self")
# Of a line in mountinfo: what is mounted, where, as which version of control groups, and how.
MOUNT = re.compile(r"(?:[^ ]+ ){3}([^ ]+) ([^ ]+) .*- (cgroup2?) [^ ]* ([^ ]*)")


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
    groups = {}  # by version, as mountinfo calls it
    for line in _lines(proc / "cgroup"):
        match line.split(":", 2):
            case [_, "", path]:
                groups["cgroup2"] = PurePosixPath(path)
            case [_, controllers, path] if "cpu" in controllers.split(","):
                groups["cgroup"] = PurePosixPath(path)

    mounts: dict[str, list[tuple[str, str]]] = {}
    for line in _lines(proc / "mountinfo"):
        if found := MOUNT.fullmatch(line):
            root, mount, version, options = found.groups()
            if version == "cgroup2" or "cpu" in options.split(","):
                mounts.setdefault(version, []).append((_unescaped(root), _unescaped(mount)))

    folders = []
    for version, group in groups.items():
        mounted = mounts.get(version, [])
        around = [(root, mount) for root, mount in mounted if group.is_relative_to(root)]
        for root, mount in around:
            inside = group.relative_to(root)
            folders += [Path(mount, parent) for parent in (inside, *inside.parents)]
        if not around:  # in a container the group may lie outside of what is mounted
            folders += [Path(mount) for _, mount in mounted]
    return folders


def _unescaped(path: str) -> str:
    r"""A path in mountinfo, where a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


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
        # A path is any bytes, and what else Python takes for the end of a line may stand in it.
        return os.fsdecode(file.read_bytes()).split("\n")
    except OSError:
        return []


def available() -> tuple[int, str]:
    """The CPUs worth a thread each, and what limits them."""
    cpus, why = affinity(), "CPU affinity"
    limit = quota()
    if limit is not None and math.ceil(limit) < cpus:
        return math.ceil(limit), f"quota of {limit:g} CPUs"
    return cpus, why
