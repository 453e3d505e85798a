"""What every function does with its arrays beside checking them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn import _checks
from cbn._checks import Array, Shape


def memory_of(given: ArrayLike | None, readable: Array | None) -> Any:
    """An input where the caller has it; what is not an array may still share its memory."""
    return given if isinstance(given, np.ndarray) else readable


def overwrites(
    out: Array | None, like: Array, name: str, given: ArrayLike, **others: Array | None
) -> bool:
    """Check an output for an input (given, or like in the form that kernels read)."""
    if out is None:
        return False
    _checks.output(out, like.shape, like.dtype)
    _checks.apart(out, **others)
    return _checks.overlaps(out, name, memory_of(given, like))


def allocate(out: Array | None, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The array that the kernel writes, and the one that the caller gets: out where it can be."""
    if out is None:
        new = np.empty(shape, dtype)
        return new, new
    if out.flags.c_contiguous and out.flags.aligned:
        return out, out
    return np.empty(shape, dtype), out
