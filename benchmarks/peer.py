"""What every library that is compared looks like to the rest."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from shapes import EPS, GROUPS, Array, Case, Data

Results = dict[str, Array]
# How to make a layer with parameters, for so many channels, of cbn or of torch.nn.
LAYERS: dict[str, Callable[..., Any]] = {
    "layer": lambda library, C: library.LayerNorm(C),
    "rms": lambda library, C: library.RMSNorm(C, eps=EPS),
    "group": lambda library, C, **layout: library.GroupNorm(GROUPS, C, **layout),
    "instance": lambda library, C, **layout: library.InstanceNorm2d(C, affine=True, **layout),
}


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
        if case.norm == "batch":
            return self.call_of_batch_norm(case, data)
        return self.call_of_layer(case, data)

    def call_of_batch_norm(self, case: Case, data: Data) -> Call | None:
        """The function, by given arrays."""
        raise NotImplementedError

    def call_of_layer(self, case: Case, data: Data) -> Call | None:
        """A layer of another norm."""
        return None


def gradients(arrays: tuple[Array, ...]) -> Results:
    """Name the results of a backward pass; the last is left out where there is no bias."""
    return dict(zip(("grad_input", "grad_weight", "grad_bias"), arrays, strict=False))


def broadcasting(case: Case) -> tuple[tuple[int, ...], list[int]]:
    """Return the axes to sum over, and the shape of one value per channel."""
    ndim = len(case.shape)
    column = [1] * ndim
    column[case.channel_axis] = -1
    return tuple(axis for axis in range(ndim) if column[axis] == 1), column
