"""Statistics of channels: what they may be of, be learnt into, and be used for.

What cannot be is a ValueError; statistics that are not finite are a FloatingPointError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn._arrays import per_channel
from cbn._dispatch import kernels
from cbn._types import Array, Shape
from cbn.exceptions import SmallBatchWarning, warn_caller

# Statistics of fewer values per channel than this say more of the batch than of the data: the
# normalised values of two are -1 and 1, whatever they were.
SMALL_BATCH = 4
READ_ONLY_REMEDY = "train a copy (copy.deepcopy), or use eval mode"


# ------------------------------------------------------------------------------------- of a batch


def enough_values(shape: Shape, count: int, correction: float, of_samples: bool) -> None:
    """An empty batch passes; a mean must be of so many that they give an unbiased variance."""
    if not kernels.are_enough(count, correction):
        needed = max(1.0, correction)
        where, remedy = "when training", "a larger batch, or eval mode with running statistics"
        if of_samples:
            where, remedy = "of a sample", "larger samples, or BatchNorm or LayerNorm"
        raise ValueError(
            f"x: expected more than {needed:g} value{'s' if needed > 1 else ''} per channel "
            f"{where}, got {count} in shape {shape}; use {remedy}"
        )


def warn_of_few_values(count: int, shape: Shape, of_samples: bool) -> None:
    whose, remedy = (
        "",
        "a larger batch, or GroupNorm or LayerNorm, which do not depend on the batch, ",
    )
    remedy += "or cbn.recalibrate(model, batches, forward) after training"
    if of_samples:
        whose, remedy = " of a sample", "larger samples, or GroupNorm or LayerNorm, "
        remedy += "whose statistics are of several channels"
    warn_caller(
        f"x: expected at least {SMALL_BATCH} values per channel{whose} when training, got {count} "
        f"in shape {shape}; use {remedy}",
        SmallBatchWarning,
    )


def finite_statistics(channels: list[int]) -> None:
    """Refuse a batch whose statistics are not finite, or too large to keep, in these channels."""
    if channels:
        raise FloatingPointError(
            f"x: expected a finite mean and variance of every channel, got NaN, infinity or more "
            f"than the running statistics can hold in {listed(channels)}; nothing "
            "has been changed. nonfinite='skip' keeps the running statistics of such channels as "
            "they are; those of dtype float64 can hold more"
        )


def listed(channels: list[int]) -> str:
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    return f"{len(channels)} of them ({shown})"


# --------------------------------------------------------------------------------------- running


def running_statistic(name: str, value: Any, num_features: int) -> Array:
    """One value per channel, to be updated in place."""
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected an array, which training updates in place, "
            f"got {type(value).__name__}"
        )
    per_channel(name, value, num_features)
    return np.ndarray.view(value, np.ndarray)


def batch_count(num_batches_tracked: Any, prefix: str = "") -> int:
    """How many batches the running statistics have seen."""
    count = num_batches_tracked
    if not kernels.is_count(count):
        raise ValueError(
            f"{prefix}num_batches_tracked: expected a writable array of shape () with an integer "
            f">= 0, got {count!r}"
        )
    return int(count)


# ---------------------------------------------------------------------------------- to normalise by


def statistic(name: str, value: ArrayLike | None, num_features: int) -> Array:
    """One value per channel, to normalise by."""
    if value is None:
        raise ValueError(
            f"{name}: expected an array of shape ({num_features},) when not training, got None"
        )
    return per_channel(name, value, num_features)


def usable_variance(name: str, var: Array, eps: float, nan: bool = True) -> None:
    """Refuse what cannot be normalised by: var + eps must be above 0, as the kernels add them.

    nan: whether a NaN passes, and makes its channel NaN.
    """
    if kernels.are_usable(var, eps) and (nan or not np.isnan(var).any()):
        return
    total = var.astype(np.float64) + eps
    unusable = np.flatnonzero(total <= 0 if nan else ~(total > 0))
    first, more = unusable[0], len(unusable) - 1
    raise ValueError(
        f"{name}: expected {name} + eps above 0 in every channel, got {var[first]:g} with "
        f"eps={eps:g} in channel {first}{f' and {more} more' if more else ''}; a variance is "
        f"at least 0, and one of 0 needs an eps above 0"
    )
