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
    turned: bool  # whether it is of the transpose of the caller's array
    shape: Shape | None  # of the array; None in a view that no Norm has made
    parameter_shape: Shape
    values: int

class Norm:
    """A row of the table of norms (cbn/_norms.py), for one choice of its arguments."""

    centred: bool
    turned: Norm | None  # for the transposes of (N, C) in Fortran order
    views: dict[Shape, View]

    def view(self, shape: Shape) -> View:
        """Return the view of an array of this shape, or refuse it."""

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
    has_residual: bool
