"""What was built, what runs, and why."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any, Literal, overload

import numpy as np

from cbn import _checks, _cpu, _dispatch, _threads
from cbn._version import __version__

Config = dict[str, dict[str, Any]]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> Config: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> Config | None:
    """Print which kernels were built and which run, the OpenMP runtime and the thread count.

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
    ['instruction set', 'threads', 'versions']
    """
    _checks.config_mode(mode)
    config = _config()
    if mode == "dicts":
        return config
    for title, entries in config.items():
        print(title)
        for name, value in entries.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name:<16}{text}")
    return None


def _config() -> Config:
    openmp = _dispatch.kernels.openmp()
    threads, origin = _threads.process_wide()
    level = _cpu.x86_64_level()
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
            "openmp": "none: built without OpenMP"
            if openmp is None
            else f"{openmp[0]} ({openmp[1]})",
            "number": threads,
            "because": origin,
            "serial below": f"{_threads.SERIAL_BELOW} values",
        },
    }
