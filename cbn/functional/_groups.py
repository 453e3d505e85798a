"""What instance, group, layer and RMS norm are made of: every group of values is a channel.

Each of them is a way to see an array as (B, N, C, S), and how the affine parameters lie over it
(src/geometry.pxi). A Grouping says both; whoever knows an array's shape makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn import _checks, _dispatch, _threads
from cbn._types import Array, Shape
from cbn.functional import _arrays

# B, N, C, S: batches that are normalised apart, values before the channel axis, channels, values
# after it; parts: weights of a channel; period: channels after which the weights repeat.
Grouping = tuple[int, int, int, int, int, int]

# From the shape of x. It refuses a shape that does not fit.
GroupingOf = Callable[[Shape], Grouping]

# What a backward pass needs of its forward pass:
#   x           or None: overwritten
#   shape, dtype of x
#   grouping
#   statistics  float64 (3, B * C): mean, what float64 rounds off it, var
#   eps
#   centred     whether the mean is subtracted; if not, mean is 0 and var the mean square
#   shape of the weight
Forward = tuple[Array | None, Shape, np.dtype[Any], Grouping, Array, float, bool, Shape]

# The gradients of input, weight and bias, and whether the input of the forward pass is overwritten.
Gradients = tuple[Array, Array, Array, bool]


def forward(
    x: ArrayLike,
    grouping_of: GroupingOf,
    dtype: np.dtype[Any] | None,
    parameter_shape: Shape,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    centred: bool,
    out: Array | None,
) -> tuple[Array, Forward]:
    """Normalise every group of x by its own statistics."""
    if type(x) is np.ndarray and x.size:
        grouping = grouping_of(x.shape)
        done: tuple[Array, Forward] | None = _dispatch.kernels.express_groups(
            x,
            dtype,
            grouping,
            parameter_shape,
            weight,
            bias,
            eps,
            centred,
            out,
            _threads.threads_for,
        )
        if done is not None:
            return done

    x = _checks.array("x", x, dtype)
    array = _checks.data("x", x, dtype)
    grouping = grouping_of(array.shape)
    B, _, C, *_ = grouping
    weight = _checks.parameter_or_none("weight", weight, parameter_shape)
    bias = _checks.parameter_or_none("bias", bias, parameter_shape)
    eps = _checks.non_negative("eps", eps)
    overwrites_x = _arrays.overwrites(out, x, "x", weight=weight, bias=bias)
    buffer, y = _arrays.allocate(out, array.shape, array.dtype)

    statistics = np.zeros((3, B * C))
    if array.size:
        threads = _threads.threads_for(2 * array.size)
        _dispatch.kernels.normalise_groups(
            array, grouping, weight, bias, eps, centred, statistics, buffer, threads
        )
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x else array
    return y, (
        kept, array.shape, array.dtype, grouping, statistics, eps, centred, parameter_shape
    )  # fmt: skip


def is_forward(kept: tuple[Any, ...]) -> bool:
    """Whether what a layer has kept is of here, and not of batch norm."""
    return len(kept[3]) == len(("B", "N", "C", "S", "parts", "period"))


def backward(
    forward: Forward,
    grad_output: ArrayLike,
    weight: ArrayLike | None,
    out: Array | None,
    given_x: Array | None = None,
) -> Gradients:
    """Return the gradients of a forward pass, whose input the caller may have in another layout."""
    done: Gradients | None = _dispatch.kernels.express_group_gradients(
        grad_output, forward, weight, out, _threads.threads_for
    )
    if done is not None:
        return done

    x, shape, dtype, grouping, statistics, eps, centred, parameter_shape = forward
    grad_output = _checks.array("grad_output", grad_output, dtype)
    grad = _checks.data("grad_output", grad_output, dtype)
    _checks.same_shape("grad_output", grad.shape, shape, "the input of the forward call")
    weight = _checks.parameter_or_none("weight", weight, parameter_shape)
    if x is None:
        _checks.input_overwritten()
    _checks.input_intact(x, shape, dtype)
    _arrays.overwrites(out, grad_output, "grad_output", weight=weight)
    overwrote_x = out is not None and _checks.overlaps(out, "x", x if given_x is None else given_x)
    buffer, grad_input = _arrays.allocate(out, shape, dtype)

    grad_weight, grad_bias = np.zeros((2, *parameter_shape), dtype)
    if grad.size:
        _dispatch.kernels.group_gradients(
            grad, x, grouping, statistics, weight, eps, centred,
            buffer, grad_weight, grad_bias, _threads.threads_for(4 * grad.size),
        )  # fmt: skip
    if grad_input is not buffer:
        grad_input[...] = buffer
    return grad_input, grad_weight, grad_bias, overwrote_x


def of_input(
    x: ArrayLike, grouping_of: GroupingOf, parameter_shape: Shape, eps: float, centred: bool
) -> Forward:
    """What a forward pass would have kept, for a backward pass without one."""
    array = _checks.data("x", x)
    grouping = grouping_of(array.shape)
    eps = _checks.non_negative("eps", eps)
    statistics = np.zeros((3, grouping[0] * grouping[2]))
    if array.size:
        _dispatch.kernels.group_statistics(
            array, grouping, eps, centred, statistics, _threads.threads_for(2 * array.size)
        )
    return array, array.shape, array.dtype, grouping, statistics, eps, centred, parameter_shape
