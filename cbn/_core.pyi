from typing import Any

import numpy as np

from cbn._types import Array, Shape

class View:
    """An array as a pass walks it; src/geometry.pxi says what the letters are."""

    B: int
    N: int
    C: int
    S: int
    parts: int
    period: int
    of_samples: bool
    parameter_shape: Shape
    values: int

class Saved:
    """What a backward pass needs of its forward pass."""

    x: Array | None  # None: overwritten, or not needed
    shape: Shape  # of x
    dtype: np.dtype[Any]
    view: View
    statistics: Array  # float64 (3, B * C): mean, what float64 rounds off it, var
    eps: float
    centred: bool
    frozen: bool  # whether the statistics do not depend on x
