"""The types that all of cbn speaks of."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]


class Axes(NamedTuple):
    """Where the channels of an array are."""

    of_rank: tuple[int, ...]  # their axis, for each number of axes; -1: not accepted
    channels: int | None  # how many there are; None: any number
    expected: str  # the accepted ranks in words
