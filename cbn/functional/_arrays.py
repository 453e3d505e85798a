"""What every function does with its arrays beside checking them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cbn import _checks
from cbn._types import Array, Shape


def overwrites(out: Array | None, like: Array, name: str, **others: Array | None) -> bool:
    """Check an output for an input where the caller has it, and for parameters and statistics."""
    if out is None:
        return False
    _checks.output(out, like.shape, like.dtype.newbyteorder("="))
    _checks.apart(out, **others)
    return _checks.overlaps(out, name, like)


def allocate(out: Array | None, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The array that the kernel writes, and the one that the caller gets: out where it can be."""
    if out is None:
        new = np.empty(shape, dtype)
        return new, new
    if out.flags.c_contiguous and out.flags.aligned:
        return out, out
    return np.empty(shape, dtype), out
