"""What all formulas need of their arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

WideArray = NDArray[np.float64 | np.longdouble]


def wide(value: ArrayLike) -> WideArray:
    array = np.asarray(value)
    return array.astype(np.longdouble if array.dtype == np.longdouble else np.float64)


def column(value: WideArray, x: WideArray, channel_axis: int) -> WideArray:
    """One value per channel, shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return value.reshape(shape)
