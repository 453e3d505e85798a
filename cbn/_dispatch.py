"""The one place that decides which build of the micro-kernels runs.

Code built for a newer instruction set must not even be imported on an older CPU, so what there is
is looked up without importing it, and the one that fits is imported without a safety net: a build
that does not load is an error, not a slower path.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# Newest first, with the x86-64 level that each needs.
LEVELS = {"x86_64_v4": 4, "x86_64_v3": 3, "baseline": 0}
VARIABLE = "CBN_ISA"


def built() -> list[str]:
    """The instruction sets that this installation has kernels for, newest first."""
    return [isa for isa in LEVELS if find_spec(f"cbn._micro_{isa}")]


def supported_by_cpu() -> list[str]:
    """Those that this CPU and operating system run, newest first."""
    level = kernels.x86_64_level()
    return [isa for isa in LEVELS if LEVELS[isa] <= level]


def supported() -> list[str]:
    """Those of them that were built."""
    return [isa for isa in supported_by_cpu() if isa in built()]


def use(isa: str) -> None:
    """Let the kernels run on an instruction set."""
    kernels.use(import_module(f"cbn._micro_{isa}").table)


def check_isa(
    variable: str, isa: str, known: list[str], built: list[str], supported: list[str]
) -> None:
    for choices, of_what in (
        (known, "an instruction set"),
        (built, "an instruction set that this installation was built for"),
        (supported, "an instruction set of this CPU and operating system"),
    ):
        if isa not in choices:
            raise ValueError(
                f"environment variable {variable}: expected {of_what} ({', '.join(choices)}), "
                f"got {isa!r}; correct it or unset it"
            )


if not (find_spec("cbn._core") and built()):
    raise ImportError(
        f"cbn: expected extensions built for this Python in {Path(__file__).parent}, got none; "
        "build them with 'pip install -e .' in the checkout, "
        "or start Python elsewhere to import an installed cbn"
    )
kernels: ModuleType = import_module("cbn._core")  # the same on every processor
forced = os.environ.get(VARIABLE)
if forced is not None:
    check_isa(VARIABLE, forced, list(LEVELS), built(), supported())
active = forced or supported()[0]
use(active)
