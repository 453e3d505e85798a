"""The pools of threads in this process: every OpenMP runtime and every BLAS that is loaded.

Their names, and the functions that tell their sizes, are those that threadpoolctl knows.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

MAPS = Path("/proc/self/maps")


class Kind(NamedTuple):
    """What is known of a library with threads."""

    user_api: str
    library: str
    files: str  # how the names of its files begin
    functions: tuple[str, ...]  # one of which returns the number of its threads


_OPENMP = ("omp_get_max_threads",)
_OPENBLAS = tuple(
    f"{prefix}openblas_get_num_threads{suffix}"
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
)
KINDS = (
    Kind("OpenMP", "GNU", r"libgomp[-.]", _OPENMP),
    Kind("OpenMP", "LLVM", r"libomp[-.\d]", _OPENMP),
    Kind("OpenMP", "Intel", r"libiomp5[-.]", _OPENMP),
    Kind("BLAS", "OpenBLAS", r"lib\w*openblas", _OPENBLAS),
    Kind("BLAS", "MKL", r"libmkl_rt[-.]", ("MKL_Get_Max_Threads",)),
    Kind("BLAS", "BLIS", r"libblis[-.]", ("bli_thread_get_num_threads",)),
    Kind("BLAS", "FlexiBLAS", r"libflexiblas[-.]", ("flexiblas_get_num_threads",)),
)
# The two are one in origin. Where both are loaded, the second to be used may end the process.
RIVALS = {"LLVM", "Intel"}

# How long the threads of a runtime spin while they wait: the variables that tell it, the first
# before the second, and what it does without them.
_BY_KMP = ("KMP_BLOCKTIME", "OMP_WAIT_POLICY"), "they spin for 200 ms, then sleep"
WAITING = {
    "GNU": (("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), "they spin for some milliseconds, then sleep"),
    "LLVM": _BY_KMP,
    "Intel": _BY_KMP,
}
# A runtime reads its environment once, when it is loaded, which has just happened or was before.
_environment = {
    name: value
    for variables, _ in WAITING.values()
    for name in variables
    if (value := os.environ.get(name, "").strip())
}


class Pool(NamedTuple):
    """A library with threads that is loaded."""

    user_api: str
    library: str
    num_threads: int | None  # that a call from this thread may use; None: it does not say


def loaded() -> dict[str, Pool]:
    """The pools of this process by the files of their libraries; none where there is no /proc."""
    kinds = {file: kind for file in sorted(_files()) if (kind := kind_of(file))}
    rivals = RIVALS.issubset(kind.library for kind in kinds.values())
    return {
        file: Pool(
            kind.user_api,
            kind.library,
            # Asking is a use.
            None if rivals and kind.library in RIVALS else _num_threads(file, kind.functions),
        )
        for file, kind in kinds.items()
    }


def kind_of(file: str) -> Kind | None:
    """What a library is, by the name of its file."""
    name = os.path.basename(file)
    return next((kind for kind in KINDS if re.match(kind.files, name)), None)


def waiting(file: str) -> str:
    """How the waiting threads of an OpenMP runtime were told to spin."""
    kind = kind_of(file)
    if kind is None or kind.library not in WAITING:
        return "unknown"
    variables, default = WAITING[kind.library]
    told = [f"{name}={_environment[name]}" for name in variables if name in _environment]
    return told[0] if told else f"{default} (the runtime's default)"


def _files() -> set[str]:
    try:
        # A path is any bytes, and may have spaces.
        lines = os.fsdecode(MAPS.read_bytes()).split("\n")
    except OSError:
        return set()
    return {words[5] for line in lines if len(words := line.split(maxsplit=5)) == 6}


def _num_threads(file: str, functions: tuple[str, ...]) -> int | None:
    try:
        library = ctypes.CDLL(file, os.RTLD_LAZY | os.RTLD_NOLOAD)
    except OSError:  # the file is mapped and not loaded, or has been deleted
        return None
    function = next((name for name in functions if hasattr(library, name)), None)
    # BLIS returns -1 while nobody has set a number, and then uses one.
    return None if function is None else max(int(library[function]()), 1)
