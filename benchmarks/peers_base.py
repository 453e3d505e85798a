"""What every library that is compared looks like to the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from shapes import EPS, Array, Case, Data

Results = dict[str, Array]


class Call(NamedTuple):
    """What is timed, and how to read what it returned: y, running_mean, grad_input, ..."""

    run: Callable[[], Any]
    results: Callable[[Any], Results]


class Peer:
    """A library. ``packages`` are those that it needs."""

    name = ""
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)  # of data that it takes
    steps: tuple[str, ...] = ("none",)  # that it takes along with a norm
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

    def takes(self, case: Case) -> bool:
        """Whether the library has such data and such steps at all."""
        return case.dtype in self.dtypes and case.steps in self.steps

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


def layer_of(case: Case, library: Any, **layout: int) -> Any:
    """The layer of a case, with parameters, of cbn or of torch.nn."""
    C = case.channels
    if case.norm == "layer":
        return library.LayerNorm(C)
    if case.norm == "rms":
        return library.RMSNorm(C, eps=EPS)
    if case.norm == "group":
        return library.GroupNorm(case.groups, C, **layout)
    return library.InstanceNorm2d(C, affine=True, **layout)


def gradients(arrays: Iterable[Array]) -> Results:
    """Name the results of a backward pass; the last are left out where there are none."""
    names = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    return dict(zip(names, arrays, strict=False))


def as_given(case: Case, arrays: Iterable[Any]) -> Results:
    """Gradients in the shapes of what they are of, as NumPy arrays."""
    grad_input, *others = map(np.asarray, arrays)
    return gradients([grad_input.reshape(case.shape), *(array.ravel() for array in others)])


class Broadcasting(NamedTuple):
    """How formulas see the arrays of a case."""

    shape: tuple[int, ...]  # of an input
    column: tuple[int, ...]  # of a weight
    own: tuple[int, ...]  # the axes of the values that have one mean
    shared: tuple[int, ...]  # the axes of the values that have one weight


def broadcasting(case: Case) -> Broadcasting:
    """See samples, positions, groups of channels and channels of a group as an axis each.

    Those of length 1 are left out: JAX takes five times as long with them.
    """
    N, C = case.shape[0], case.channels
    groups = {"layer": 1, "rms": 1, "group": case.groups}.get(case.norm, C)
    lengths = {"sample": N, "group": groups, "channel": C // groups}
    lengths["position"] = case.values // (N * C)
    channels = ("group", "channel")
    order = (
        ("sample", "position", *channels)
        if case.layout == "NHWC"
        else ("sample", *channels, "position")
    )
    axes = [axis for axis in order if lengths[axis] > 1]
    own = ("channel", "position", "sample" if case.norm == "batch" else "")
    shared = ("sample", "position")
    return Broadcasting(
        tuple(lengths[axis] for axis in axes),
        tuple(1 if axis in shared else lengths[axis] for axis in axes),
        tuple(k for k, axis in enumerate(axes) if axis in own),
        tuple(k for k, axis in enumerate(axes) if axis in shared),
    )
