"""The norms as a table: how each of them sees an array, and what it subtracts.

This is the only place that derives anything from a shape. Every norm is a view (B, N, C, S) of the
array, and a way in which the affine parameters lie over it (src/geometry.pxi):

========= ==================================== ======================= ================
norm      channels first (n, c, s)             channels last (n, s, c) parameters
========= ==================================== ======================= ================
batch     (1, n, c, s)                         (1, n * s, c, 1)        (c,)
instance  (1, 1, n * c, s)                     (n, s, c, 1)            (c,)
group     (1, 1, n * groups, c / groups * s)   (n, s, groups, c/groups) (c,)
layer     (1, 1, rows, values)                                         normalized_shape
========= ==================================== ======================= ================

RMS norm is layer norm with a mean of 0 and the mean square for a variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cbn import _checks
from cbn._types import Axes, Shape

# Shapes whose views a norm remembers. Serving text, a layer may see one for every length.
MOST_VIEWS = 1024


class View(NamedTuple):
    """An array as the kernels walk it; src/_core.pyx reads it by position."""

    B: int  # batches that are normalised apart
    N: int  # values before the channel axis
    C: int  # channels: whatever has a mean and a variance of its own
    S: int  # values after it
    parts: int  # weights of a channel, each for the next S // parts of its values
    period: int  # channels after which the weights repeat
    of_samples: bool  # whether each channel is of one sample
    parameter_shape: Shape  # of weight, bias, and running statistics
    values: int  # that a mean is of


class Norm:
    """A row of the table, for one choice of its arguments."""

    __slots__ = ("_view_of", "centred", "views")

    def __init__(self, view_of: Callable[[Shape], View], centred: bool = True) -> None:
        self._view_of = view_of
        self.centred = centred  # whether the mean is subtracted
        self.views: dict[Shape, View] = {}

    def view(self, shape: Shape) -> View:
        """Return the view of an array of this shape, or refuse it."""
        view = self.views.get(shape)
        if view is None:
            view = self._view_of(shape)
            if len(self.views) >= MOST_VIEWS:
                self.views.clear()
            self.views[shape] = view
        return view


# ----------------------------------------------------------------------------------- the rows


def _batch(axes: Axes, least_axes: int, shape: Shape) -> View:
    _checks.least_axes("x", shape, least_axes)
    axis = _checks.axis_of_channels("x", shape, axes)
    N, C, S = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    return View(1, N, C, S, 1, C, False, (C,), N * S)


def _instance(
    axes: Axes, least_axes: int, channel_axis: int, batch_rank: int | None, shape: Shape
) -> View:
    _checks.least_axes("x", shape, least_axes)
    axis = _checks.axis_of_channels("x", shape, axes)
    C = shape[axis]
    if channel_axis == 1:
        view = 1, 1, prod(shape[:axis]) * C, prod(shape[axis + 1 :])
    elif batch_rank in (None, len(shape)):
        view = shape[0], prod(shape[1:-1]), C, 1
    else:
        view = 1, prod(shape[:-1]), C, 1
    return _of_samples(*view, 1, C, (C,))


def _group(num_groups: int, channel_axis: int, num_channels: int | None, shape: Shape) -> View:
    _checks.grouped("x", shape, num_groups, channel_axis, num_channels)
    N, C = shape[0], shape[channel_axis]
    each = C // num_groups
    if channel_axis == 1:
        view = 1, 1, N * num_groups, each * prod(shape[2:])
    else:
        view = N, prod(shape[1:-1]), num_groups, each
    return _of_samples(*view, each, num_groups, (C,))


def _layer(normalized_shape: Shape, shape: Shape) -> View:
    _checks.last_axes("x", shape, normalized_shape)
    rows = prod(shape[: len(shape) - len(normalized_shape)])
    length = prod(normalized_shape)
    return _of_samples(1, 1, rows, length, length, 1, normalized_shape)


def _of_samples(
    B: int, N: int, C: int, S: int, parts: int, period: int, parameter_shape: Shape
) -> View:
    values = N * S if B * C else 0  # no sample, no values
    return View(B, N, C, S, parts, period, True, parameter_shape, values)


# ----------------------------------------------------------------------------------- the table


@lru_cache
def batch(axes: Axes, least_axes: int = 0) -> Norm:
    """Batch norm, and any norm by given statistics of the channels."""
    return Norm(partial(_batch, axes, least_axes))


@lru_cache
def instance(
    axes: Axes, channel_axis: int, batch_rank: int | None = None, least_axes: int = 0
) -> Norm:
    """Instance norm; where a batch has batch_rank axes, an array of fewer is one sample."""
    return Norm(partial(_instance, axes, least_axes, channel_axis, batch_rank))


@lru_cache
def group(num_groups: int, channel_axis: int, num_channels: int | None = None) -> Norm:
    """Group norm; of any number of channels where none is given."""
    return Norm(partial(_group, num_groups, channel_axis, num_channels))


@lru_cache
def layer(normalized_shape: Shape, centred: bool = True) -> Norm:
    """Layer norm, or, where not centred, RMS norm."""
    return Norm(partial(_layer, normalized_shape), centred)


# Of the functions, which take any number of axes and of channels.
_AXES = {
    1: Axes((-1, -1, *[1] * (_checks.MOST_AXES - 1)), None, "at least 2 axes"),
    -1: Axes((-1, -1, *range(1, _checks.MOST_AXES)), None, "at least 2 axes"),
}
_BATCH = {axis: batch(axes) for axis, axes in _AXES.items()}
BATCH_VIEWS = {axis: norm.views for axis, norm in _BATCH.items()}


def any_batch(channel_axis: int) -> Norm:
    """Batch norm of an array of at least two axes."""
    return _BATCH[_checks.channel_axis(channel_axis)]


def any_instance(channel_axis: int) -> tuple[Norm, Norm]:
    """Instance norm of an array of at least three axes, and the norm by given statistics of it."""
    axis = _checks.channel_axis(channel_axis)
    return instance(_AXES[axis], axis, None, 3), batch(_AXES[axis], 3)


def any_group(num_groups: int, channel_axis: int) -> Norm:
    """Group norm of an array of at least two axes."""
    groups = _checks.positive_integer("num_groups", num_groups)
    return group(groups, _checks.channel_axis(channel_axis))


def any_layer(normalized_shape: int | Sequence[int], centred: bool = True) -> Norm:
    """Layer norm, or RMS norm, over the last axes."""
    return layer(_checks.normalized_shape(normalized_shape), centred)


def default_eps(dtype: np.dtype[Any]) -> float:
    """That of RMS norm, PyTorch's: the spacing of numbers of the element type at 1."""
    single = dtype.itemsize == 4  # in any byte order
    return float(np.finfo(np.float32 if single else np.float64).eps)
