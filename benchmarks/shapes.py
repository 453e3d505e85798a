"""What is measured: the cases, made of the shape tables in shapes/, and their data.

resnet_50, densenet_121 and googlenet_v2 hold the batch normalisation layers of these networks,
features holds (N, C) data, small holds calls so short that the arithmetic hardly matters. The rows
of layer and RMS norm are those of transformers, and many short ones. feature_maps is for the norms
that have channels, with many short planes, counts of channels that no vector divides, and an array
beyond the cache; images is for instance norm.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from cbn import functional

Array = NDArray[Any]

DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in ("float32", "float16", bfloat16)}
TABLES = Path(__file__).with_name("shapes")
NETWORKS = ("resnet_50", "densenet_121", "googlenet_v2")
FAMILIES = (*NETWORKS, "features", "small", "rows", "feature_maps", "images")
LAYOUTS = ("NCHW", "NHWC", "NC")
EPS = 1e-5
MOMENTUM = 0.1
MOST_GROUPS = 32  # of group norm

# What goes along with a batch norm: nothing, relu(norm(x)), or relu(norm(x) + residual).
STEPS = ("none", "relu", "add-relu")
# Outputs that are nearer to 0 may be rounded to either side, where ReLU lets them through or not.
NEAR_ZERO = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.1}

# Arrays read and written by each pass when nothing is read twice: the least that it can move. A
# residual, or its gradient, is one more.
TRAFFIC = {"training": 2, "inference": 2, "forward": 2, "backward": 3}
PASSES = tuple(TRAFFIC)

# Inputs, copies of them for oneDNN and JAX, outputs and temporaries: with all libraries a backward
# pass was seen to take 14 arrays. Shapes too large for that lose samples.
LARGEST_CASE_BYTES = 2e9
ARRAYS_ALIVE = 15


class Norm(NamedTuple):
    """A norm: its passes, the tables of its shapes, and those shapes that are for a quick look."""

    passes: tuple[str, ...]
    families: tuple[str, ...]
    quick: set[tuple[int, ...]]


BOTH = ("forward", "backward")  # of a norm that has no other statistics than those of its input
NORMS = {
    "batch": Norm(
        ("training", "inference", "backward"),
        (*NETWORKS, "features", "small", "feature_maps"),
        {(32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7), (1, 64, 7, 7), (4096, 256)},
    ),
    "layer": Norm(BOTH, ("rows",), {(128, 1024), (16384, 48)}),
    "rms": Norm(BOTH, ("rows",), {(128, 1024), (16384, 48)}),
    "group": Norm(BOTH, ("feature_maps",), {(8, 128, 28, 28), (64, 64, 7, 7)}),
    "instance": Norm(BOTH, ("images", "feature_maps"), {(8, 64, 32, 32), (64, 64, 7, 7)}),
}


@dataclass(frozen=True)
class Case:
    """One measurement: a pass over one array.

    ``shape`` is in the order of ``layout``; ``reuses_out`` is whether the output is allocated
    once, before the calls, or by every call. ``dtype`` is that of the data; parameters and
    statistics are of float32. ``steps`` is one of STEPS.
    """

    norm: str
    family: str
    pass_: str
    layout: str
    shape: tuple[int, ...]
    reuses_out: bool = False
    dtype: str = "float32"
    steps: str = "none"

    @property
    def has_residual(self) -> bool:
        """Whether something is added to what the norm makes."""
        return self.steps == "add-relu"

    @property
    def channel_axis(self) -> int:
        """1 or -1, as cbn has it."""
        return -1 if self.layout == "NHWC" else 1

    @property
    def channels(self) -> int:
        """The length of the channel axis."""
        return self.shape[self.channel_axis]

    @property
    def groups(self) -> int:
        """How many groups of channels group norm makes: 32, or as many as divide them."""
        return max(k for k in range(1, MOST_GROUPS + 1) if self.channels % k == 0)

    @property
    def values(self) -> int:
        """The number of values in one array."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """The least number of bytes that the pass moves."""
        arrays = TRAFFIC[self.pass_] + self.has_residual
        return arrays * self.values * DTYPES[self.dtype].itemsize

    @property
    def group(self) -> str:
        """What is summarised together."""
        norm = "" if self.norm == "batch" else f"{self.norm} "
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        steps = "" if self.steps == "none" else f" {self.steps}"
        out = " out=" if self.reuses_out else ""
        return f"{norm}{self.pass_} {self.layout}{dtype}{steps}{out}"

    def __str__(self) -> str:
        return f"{self.group} " + "x".join(map(str, self.shape))


class Data(NamedTuple):
    """The arrays of a case: three of data, and others of float32."""

    x: Array
    grad_output: Array
    residual: Array
    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array

    @property
    def of_channels(self) -> tuple[Array, Array, Array, Array]:
        """The arrays of float32."""
        return self.weight, self.bias, self.running_mean, self.running_var


def all_cases(
    families: Sequence[str] = FAMILIES,
    passes: Sequence[str] = PASSES,
    layouts: Sequence[str] = LAYOUTS,
    quick: bool = False,
    norms: Sequence[str] = tuple(NORMS),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    steps: Sequence[str] = ("none",),
) -> list[Case]:
    """Return the cases of some families, passes, layouts and norms, each once.

    Parameters
    ----------
    families, passes, layouts, norms : sequence of str
        Those to take.
    quick : bool
        Whether to take a handful of shapes only.
    shapes : sequence of str
        The only ones to take, if any, channels first: "32x64x56x56".
    dtypes : sequence of str
        Element types of the data.
    steps : sequence of str
        What goes along, of batch norm alone.

    Returns
    -------
    list of Case
        In the order of the tables. What two families share is counted with the first.
    """
    family_of: dict[tuple[str, str, tuple[int, ...]], str] = {}
    for norm, family in product(norms, families):
        for layout, shape in _shapes(family) if family in NORMS[norm].families else ():
            listed = _channels_first(layout, shape)
            if quick and listed not in NORMS[norm].quick:
                continue
            if not shapes or "x".join(map(str, listed)) in shapes:
                family_of.setdefault((norm, layout, shape), family)
    return [
        Case(norm, family, pass_, layout, shape, reuses_out, dtype, step)
        for (norm, layout, shape), family in family_of.items()
        for pass_ in passes
        for dtype in dtypes
        for step in (steps if norm == "batch" else ("none",))
        for reuses_out in ((False, True) if family == "small" else (False,))
        if layout in layouts and pass_ in NORMS[norm].passes
    ]


def make_data(case: Case) -> Data:
    """Return the arrays of a case, the same at every call."""
    x, grad_output = (
        np.resize(values.astype(DTYPES[case.dtype]), case.shape) for values in _random()
    )
    residual = np.roll(grad_output, 1)
    channel = np.arange(case.channels, dtype=np.float32) / case.channels
    data = Data(
        x,
        grad_output,
        residual,
        weight=0.5 + channel,
        bias=channel - 0.5,
        running_mean=2 + channel,
        running_var=3 + channel,
    )
    if case.steps != "none" and case.pass_ == "backward":
        grad_output[is_near_zero(case, data)] = 0
    return data


def is_near_zero(case: Case, data: Data) -> Array:
    """Where nobody can tell whether ReLU lets an output through."""
    y: Any = functional.batch_norm(
        data.x, None, None, data.weight, data.bias, True, eps=EPS, channel_axis=case.channel_axis
    )
    y = y.astype(np.float32)
    if case.has_residual:
        y += data.residual.astype(np.float32)
    return np.abs(y) < NEAR_ZERO[case.dtype]


def _shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The layouts and shapes of a table: as listed and, for a network, also at N = 1 and 32."""
    with (TABLES / f"{family}.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            N, C, H, W = (int(row[axis]) for axis in "NCHW")
            if H * W == 1:
                yield "NC", (N, C)
                continue
            most = int(LARGEST_CASE_BYTES / (ARRAYS_ALIVE * 4 * C * H * W))
            for samples in (1, 32, N) if family in NETWORKS else (N,):
                samples = min(samples, most)
                yield "NCHW", (samples, C, H, W)
                yield "NHWC", (samples, H, W, C)


def _channels_first(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1]) if layout == "NHWC" else shape


@lru_cache
def _random() -> tuple[Array, Array]:
    """Input and gradient: few numbers, to be repeated, and therefore of a prime number.

    The gradient grows with the input, as it does where a network still learns. Its sums over a
    channel would otherwise be nothing but what is left of terms that cancel.
    """
    x, noise = np.random.default_rng(0).standard_normal((2, 1_000_003), dtype=np.float32)
    return 2 + 2 * x, 1 + x + noise
