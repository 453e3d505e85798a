"""What was built, what runs, and why."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any, Literal, overload

import numpy as np

from cbn import _dispatch, _pools, _threads
from cbn._version import __version__

Config = dict[str, dict[str, Any]]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> Config: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> Config | None:
    """Print which kernels run, on how many threads, how calls ran, and what else has threads here.

    The calls of this process are counted by what became of them: a team of threads; one thread,
    because they were small, were told to, or met others in flight; one thread because of
    contention, where a team has lost time to other threads. The pools are the OpenMP runtimes and
    BLAS libraries that are loaded, where the system lists them in ``/proc``.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print, or to return nested dictionaries, as ``numpy.show_config`` has it.

    Returns
    -------
    dict or None
        Nothing when it prints.

    Raises
    ------
    ValueError
        If ``mode`` is another.

    Examples
    --------
    >>> import cbn
    >>> sorted(cbn.show_config(mode="dicts"))
    ['calls', 'instruction set', 'pools', 'threads', 'versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {mode!r}")
    config = _config()
    if mode == "dicts":
        return config
    for title, entries in config.items():
        print(title)
        for name, value in entries.items():
            print(f"  {name:<15} {_text(value)}")
    return None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name} {item}" for name, item in value.items() if item is not None]
    return ", ".join(value) if isinstance(value, list) else str(value)


def _config() -> Config:
    openmp = _dispatch.kernels.openmp()
    threads, origin = _threads.process_wide()
    calls = _dispatch.kernels.calls()
    level = _dispatch.kernels.x86_64_level()
    return {
        "versions": {
            "cbn": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": f"{sys.platform} {platform.machine()}",
        },
        "instruction set": {
            "built": _dispatch.built(),
            "supported here": _dispatch.supported(),
            "cpu": f"x86-64 level {level}" if level else platform.machine(),
            "active": _dispatch.active,
            "because": (
                f"{_dispatch.VARIABLE}={os.environ[_dispatch.VARIABLE]}"
                if _dispatch.forced
                else "newest that is built and supported"
            ),
        },
        "threads": {
            "openmp": "{} ({})".format(*openmp) if openmp else "none: built without OpenMP",
            "waiting": "none waits" if openmp is None else _pools.waiting(openmp[0]),
            "number": threads,
            "because": origin,
            "serial below": f"{_threads.SERIAL_BELOW} values",
        },
        "calls": {
            "team": calls.team_calls,
            "one thread": calls.single_calls,
            "contention": calls.contended_calls,
            "now": _now(calls),
        },
        "pools": {
            file: {"api": pool.user_api, "library": pool.library, "threads": pool.num_threads}
            for file, pool in _pools.loaded().items()
        },
    }


def _now(calls: Any) -> str:
    """What becomes of a call that is large enough for a team (src/contention.pxi)."""
    if not (calls.pausing and calls.judges):
        return "a team where it pays"
    if calls.pause == 0:
        return "a team once the machine has CPUs to spare"
    return f"one thread for {calls.pause:g} s or more, because of contention"
