"""What every library that is compared looks like to the rest."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from shapes import Array, Case, Data

Results = dict[str, Array]


class Call(NamedTuple):
    """What is timed, and how to read what it returned: y, running_mean, grad_input, ..."""

    run: Callable[[], Any]
    results: Callable[[Any], Results]


class Peer:
    """A library. ``packages`` are those that it needs."""

    name = ""
    packages: tuple[str, ...] = ()
    threads = 1

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that are not installed."""
        return [package for package in cls.packages if not find_spec(package)]

    @property
    def version(self) -> str:
        """Version of the library."""
        return version(self.packages[0])

    def set_num_threads(self, threads: int) -> bool:
        """Use this number of threads from now on. False: impossible."""
        self.threads = threads
        return True

    def call(self, case: Case, data: Data) -> Call | None:
        """Return the call of a case, or None where the library has none."""
        raise NotImplementedError


def gradients(arrays: tuple[Array, ...]) -> Results:
    """Name the three results of a backward pass."""
    return dict(zip(("grad_input", "grad_weight", "grad_bias"), arrays, strict=True))


def broadcasting(case: Case) -> tuple[tuple[int, ...], list[int]]:
    """Return the axes to sum over, and the shape of one value per channel."""
    ndim = len(case.shape)
    column = [1] * ndim
    column[case.channel_axis] = -1
    return tuple(axis for axis in range(ndim) if column[axis] == 1), column
