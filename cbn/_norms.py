"""The norms as a table: how each of them sees an array, and what it subtracts.

This is the only place that derives anything from a shape. Every norm is a view (B, N, C, S) of the
array (docs/architecture.md has all of them side by side), and a way in which the affine parameters
lie over it (src/geometry.pxi). RMS norm is layer norm with a mean of 0 and the mean square for a
variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from cbn import _scalars
from cbn._dispatch import kernels
from cbn._types import Axes, Shape

if TYPE_CHECKING:
    from cbn._core import Norm, View

MOST_AXES: int = kernels.MOST_AXES


# ----------------------------------------------------------------------------------- the rows


def _batch(axes: Axes, least_axes: int, turned: bool, shape: Shape) -> View:
    """turned: the shape is that of the transpose of an array."""
    axis = _axis_of_channels(shape[::-1] if turned else shape, axes, least_axes)
    if turned:
        axis = len(shape) - 1 - axis
    N, C, S = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    view: View = kernels.View(1, N, C, S, 1, C, False, (C,), turned)
    return view


def _instance(
    axes: Axes, least_axes: int, channel_axis: int, batch_rank: int | None, shape: Shape
) -> View:
    axis = _axis_of_channels(shape, axes, least_axes)
    C = shape[axis]
    if channel_axis == 1:
        view = 1, 1, prod(shape[:axis]) * C, prod(shape[axis + 1 :])
    elif batch_rank in (None, len(shape)):
        view = shape[0], prod(shape[1:-1]), C, 1
    else:
        view = 1, prod(shape[:-1]), C, 1
    return _of_samples(*view, 1, C, (C,))


def _group(num_groups: int, channel_axis: int, num_channels: int | None, shape: Shape) -> View:
    _check_axes(shape, 2)
    _check_channels(shape, channel_axis % len(shape), num_channels)
    check_group_count(num_groups, shape[channel_axis])
    N, C = shape[0], shape[channel_axis]
    each = C // num_groups
    if channel_axis == 1:
        view = 1, 1, N * num_groups, each * prod(shape[2:])
    else:
        view = N, prod(shape[1:-1]), num_groups, each
    return _of_samples(*view, each, num_groups, (C,))


def _layer(normalized_shape: Shape, shape: Shape) -> View:
    if shape[-len(normalized_shape) :] != normalized_shape:
        raise ValueError(
            f"x: expected the last axes to be {normalized_shape}, that is normalized_shape, "
            f"got shape {shape}"
        )
    rows = prod(shape[: len(shape) - len(normalized_shape)])
    length = prod(normalized_shape)
    return _of_samples(1, 1, rows, length, length, 1, normalized_shape)


def _of_samples(
    B: int, N: int, C: int, S: int, parts: int, period: int, parameter_shape: Shape
) -> View:
    view: View = kernels.View(B, N, C, S, parts, period, True, parameter_shape)
    return view


# ---------------------------------------------------------------------------------- the checks


def _check_axes(shape: Shape, least: int) -> None:
    if len(shape) < least:
        raise ValueError(f"x: expected at least {least} axes, got {len(shape)} in shape {shape}")


def _check_channels(shape: Shape, axis: int, channels: int | None) -> None:
    """Refuse another number of channels; where the other layout would fit, that is the remedy."""
    if channels in (None, shape[axis]):
        return
    last, remedy = len(shape) - 1, ""
    if axis != last and shape[last] == channels:
        remedy = "; if the channels are last, make the layer with channel_axis=-1"
    elif axis == last > 1 and shape[1] == channels:
        remedy = "; if the channels are first, make the layer with channel_axis=1"
    raise ValueError(
        f"x: expected {channels} channels on axis {axis}, got {shape[axis]} in shape {shape}"
        f"{remedy}"
    )


def _axis_of_channels(shape: Shape, axes: Axes, least_axes: int) -> int:
    _check_axes(shape, least_axes)
    rank = len(shape)
    axis = axes.of_rank[rank] if rank < len(axes.of_rank) else -1
    if axis < 0:
        raise ValueError(f"x: expected {axes.expected}, got {rank} axes in shape {shape}")
    _check_channels(shape, axis, axes.channels)
    return axis


def check_group_count(num_groups: int, num_channels: int) -> None:
    if num_channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {num_channels} channels, got {num_groups}"
        )


def lengths_of(value: Any) -> Shape:
    """The lengths of the last axes, also from an integer for one."""
    several = isinstance(value, (Sequence, np.ndarray)) and getattr(value, "ndim", 1) > 0
    if isinstance(value, (str, bytes)) or not several:
        return (_scalars.positive_integer("normalized_shape", value),)
    shape = tuple(_scalars.positive_integer("normalized_shape", length) for length in value)
    if not shape:
        raise ValueError("normalized_shape: expected at least one length, got none")
    if len(shape) > MOST_AXES:
        raise ValueError(
            f"normalized_shape: expected at most {MOST_AXES} lengths, as many as NumPy's arrays "
            f"have axes, got {len(shape)}"
        )
    return shape


# ----------------------------------------------------------------------------------- the table


def _norm(
    make_view: Callable[[Shape], View], centred: bool = True, turned: Norm | None = None
) -> Norm:
    norm: Norm = kernels.Norm(make_view, centred, turned)
    return norm


@lru_cache
def batch(axes: Axes, least_axes: int = 0) -> Norm:
    """Batch norm, and any norm by given statistics of the channels."""
    turned = _norm(partial(_batch, axes, least_axes, True))
    return _norm(partial(_batch, axes, least_axes, False), turned=turned)


@lru_cache
def instance(
    axes: Axes, channel_axis: int, batch_rank: int | None = None, least_axes: int = 0
) -> Norm:
    """Instance norm; where a batch has batch_rank axes, an array of fewer is one sample."""
    return _norm(partial(_instance, axes, least_axes, channel_axis, batch_rank))


@lru_cache
def group(num_groups: int, channel_axis: int, num_channels: int | None = None) -> Norm:
    """Group norm; of any number of channels where none is given."""
    return _norm(partial(_group, num_groups, channel_axis, num_channels))


@lru_cache
def layer(normalized_shape: Shape, centred: bool = True) -> Norm:
    """Layer norm, or, where not centred, RMS norm."""
    return _norm(partial(_layer, normalized_shape), centred)


# Of the functions, which take any number of axes and of channels.
_AXES = {
    1: Axes((-1, -1, *[1] * (MOST_AXES - 1)), None, "at least 2 axes"),
    -1: Axes((-1, -1, *range(1, MOST_AXES)), None, "at least 2 axes"),
}
BATCH = {axis: batch(axes) for axis, axes in _AXES.items()}


def batch_of_function(channel_axis: int) -> Norm:
    """Batch norm of an array of at least two axes."""
    return BATCH[_scalars.channel_axis(channel_axis)]


def instance_of_function(channel_axis: int) -> tuple[Norm, Norm]:
    """Instance norm of an array of at least three axes, and the norm by given statistics of it."""
    axis = _scalars.channel_axis(channel_axis)
    return instance(_AXES[axis], axis, None, 3), batch(_AXES[axis], 3)


def group_of_function(num_groups: int, channel_axis: int) -> Norm:
    """Group norm of an array of at least two axes."""
    groups = _scalars.positive_integer("num_groups", num_groups)
    return group(groups, _scalars.channel_axis(channel_axis))


def layer_of_function(normalized_shape: int | Sequence[int], centred: bool = True) -> Norm:
    """Layer norm, or RMS norm, over the last axes."""
    return layer(lengths_of(normalized_shape), centred)


def default_eps(dtype: np.dtype[Any]) -> float:
    """That of RMS norm, PyTorch's: the spacing at 1 of numbers of the type that it computes in."""
    single = dtype.itemsize <= 4  # in any byte order
    return float(np.finfo(np.float32 if single else np.float64).eps)
