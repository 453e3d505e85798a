"""Data that is hard to normalise, and how far a result is from the right one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from shapes import EPS, Array

from cbn import reference

RATIOS = (0.0, 1e2, 1e4, 1e6)
OUTLIERS = (0.0, 3e3, 1e5)
SCALES = ("1", "1e-6", "1e6", "1e25", "1e-6 to 1e6")
MIXED = "1e-6 to 1e6"


class Hard(NamedTuple):
    """A kind of data: standard normal, shifted, with an outlier, then scaled."""

    ratio: float  # mean / standard deviation, the outlier left out
    outlier: float  # in standard deviations
    first: bool  # whether it is the first value of each channel or one in the middle
    scale: str  # of all channels, or from the first channel to the last


def all_kinds(scales: tuple[str, ...] = SCALES) -> Iterator[Hard]:
    """Every combination."""
    for ratio, outlier, first, scale in product(RATIOS, OUTLIERS, (True, False), scales):
        if outlier or first:
            yield Hard(ratio, outlier, first, scale)


def draw(kind: Hard, shape: tuple[int, ...], channel_axis: int, dtype: Any) -> tuple[Array, Array]:
    """Return an input and a gradient, the same at every call."""
    rng = np.random.default_rng(0)
    values, channels = rng.standard_normal(shape), shape[channel_axis]
    by_channel = np.moveaxis(values, channel_axis, -1)
    by_channel += kind.ratio
    samples = by_channel.shape[:-1]
    by_channel[tuple(0 if kind.first else size // 2 for size in samples)] += kind.outlier
    by_channel *= np.logspace(-6, 6, channels) if kind.scale == MIXED else float(kind.scale)
    return values.astype(dtype), rng.standard_normal(shape).astype(dtype)


class Exact(NamedTuple):
    """What the formulas give in a wider type, from the same inputs."""

    y: Array
    grad_input: Array
    std: Array


def exact(
    x: Array, grad_output: Array, weight: Array | None, bias: Array | None, channel_axis: int
) -> Exact:
    """Return the output and the input gradient in training.

    The first value of each channel is subtracted from all, which changes neither. It is exact
    unless their exponents differ by more than the wider type has additional digits; and
    there are no digits left that a large mean could take from the wider type.
    """
    wide = wider(x.dtype)
    first = np.moveaxis(x, channel_axis, -1)[(0,) * (x.ndim - 1)]
    column = [-1 if axis == channel_axis % x.ndim else 1 for axis in range(x.ndim)]
    centred = x.astype(wide)
    centred -= first.astype(wide).reshape(column)
    axis: dict[str, Any] = {"channel_axis": channel_axis}
    mean, var, _ = reference.batch_norm_stats(centred, **axis)
    y, _, _ = reference.batch_norm(centred, mean, var, weight, bias, eps=EPS, **axis)
    grad_input, _, _ = reference.batch_norm_backward(
        grad_output, centred, mean, var, weight, eps=EPS, **axis
    )
    return Exact(y, grad_input, np.sqrt(var + EPS).reshape(column))


def centred(groups: Array, subtracts_mean: bool = True) -> tuple[Array, Array]:
    """Return groups of values, one a row, in a wider type, and the standard deviation of each.

    The first value of each group is subtracted from all, as in exact; but where a norm subtracts
    no mean, nothing is, and the deviation is the root mean square.
    """
    wide = groups.astype(wider(groups.dtype))
    if subtracts_mean:
        wide -= wide[:, :1].copy()
    mean = wide.mean(axis=1, keepdims=True) if subtracts_mean else 0
    var = np.mean((wide - mean) ** 2, axis=1, keepdims=True)
    return wide, np.broadcast_to(np.sqrt(var + EPS), wide.shape)


def wider(dtype: Any) -> type[np.floating]:
    """The type to compute the right result in."""
    return np.longdouble if dtype == np.float64 else np.float64


def errors(right: Exact, y: Array, grad_input: Array) -> tuple[float, float]:
    """Return the largest error of y and that of the input gradient; NaN counts as infinite.

    They are relative to max(1, |y|), and to 3 max(1, |y|) / std.
    """
    size = np.maximum(1, np.abs(right.y))
    of_y = np.abs(y - right.y) / size
    of_grad_input = np.abs(grad_input - right.grad_input) * right.std / (3 * size)
    largest = (float(np.nan_to_num(error, nan=np.inf).max()) for error in (of_y, of_grad_input))
    return next(largest), next(largest)
