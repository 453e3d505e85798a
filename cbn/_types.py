"""The types that all of cbn speaks of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Gradient = Any  # an Array, or None where it is not wanted
Shape = tuple[int, ...]
# Of state files: where they lie, what they say of a layer or a model, and the arrays in them.
Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Target = Path | IO[bytes]
Config = dict[str, Any]
Expected = Mapping[str, tuple[np.dtype[Any], Shape]]


class Axes(NamedTuple):
    """Where the channels of an array are."""

    of_rank: tuple[int, ...]  # their axis, for each number of axes; -1: not accepted
    channels: int | None  # how many there are; None: any number
    expected: str  # the accepted ranks in words
