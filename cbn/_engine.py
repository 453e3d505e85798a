"""Every norm, forward and backward: look for the ordinary call, check, allocate, call a kernel.

Nothing here knows one norm from another but by its row of the table (cbn/_norms.py). Batch norm is
the norm whose running statistics may be learnt or given; instance norm learns the averages over its
samples. A pass forward returns, beside the output, what a pass backward needs of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from cbn import _checks, _dispatch, _threads
from cbn._norms import Norm, View
from cbn._types import Array, Shape


class Saved(Protocol):
    """What a backward pass needs of its forward pass; src/_core.pyx makes it."""

    x: Array | None  # None: overwritten, or not needed
    shape: Shape  # of x
    dtype: np.dtype[Any]
    view: View
    statistics: Array  # float64 (3, B * C): mean, what float64 rounds off it, var
    eps: float
    centred: bool
    frozen: bool  # whether the statistics do not depend on x


def forward(
    x: ArrayLike,
    norm: Norm,
    dtype: np.dtype[Any] | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
    least: int = 1,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    num_batches_tracked: Array | None = None,
    momentum: float | None = 0.0,
    correction: float = 0.0,
    nonfinite: str = "propagate",
) -> tuple[Array, Saved]:
    """Normalise x by its own statistics, and let the running statistics learn them.

    least: the values that each mean should be of. Fewer than two are refused where it is not 1;
    fewer than four are warned of where it is four, once all checks have passed and before anything
    is computed. With a counter of batches, momentum may be None: the average over all of them.
    nonfinite is that of a layer.
    """
    kernels = _dispatch.kernels
    done: tuple[Array, Saved] | None = kernels.express_forward(
        x,
        norm.views,
        dtype,
        weight,
        bias,
        eps,
        norm.centred,
        least,
        out,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        correction,
        nonfinite,
        _threads.threads_for,
    )
    if done is not None:
        return done

    if num_batches_tracked is not None:
        _checks.batch_to_count(num_batches_tracked)
    x = _checks.array("x", x, dtype)
    array = _checks.data("x", x, dtype)
    view = norm.view(array.shape)
    _checks.both_or_none(running_mean, running_var)
    running_mean = _checks.running_or_none("running_mean", running_mean, view.parameter_shape[0])
    running_var = _checks.running_or_none("running_var", running_var, view.parameter_shape[0])
    _checks.learnt_apart(running_mean, running_var, x)
    weight, bias = _parameter("weight", weight, view), _parameter("bias", bias, view)
    if momentum is not None or num_batches_tracked is None:
        momentum = _checks.momentum(momentum)
    eps = _checks.non_negative("eps", eps)
    correction = _checks.non_negative("correction", correction)
    nonfinite = _checks.nonfinite(nonfinite)
    if least > 1:
        needed = 0.0 if running_mean is None else correction
        _checks.enough_values(array.shape, view.values, needed, view.of_samples)
    overwrites_x = _overwrites(
        out,
        x,
        "x",
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    if 0 < view.values < least == _checks.SMALL_BATCH:
        _checks.warn_of_few_values(view.values, array.shape, view.of_samples)
    buffer, y = _allocate(out, array.shape, array.dtype)

    statistics = np.zeros((3, view.B * view.C))
    if array.size:
        threads = _threads.threads_for(2 * array.size)
        learning = running_mean, running_var, num_batches_tracked
        if nonfinite == "raise":
            # Nothing is written before the statistics have been looked at.
            kernels.statistics_of(array, view, eps, norm.centred, statistics, threads)
            learnt = _of_channels(statistics, view)
            _checks.finite_statistics(
                kernels.not_finite(learnt, running_mean, running_var, view.values, correction)
            )
            kernels.normalise_by(array, view, statistics, weight, bias, eps, buffer, threads)
        else:
            kernels.normalise_own(
                array, view, weight, bias, eps, norm.centred, statistics, buffer, threads
            )
        if running_mean is not None or num_batches_tracked is not None:
            learnt, skips = _of_channels(statistics, view), nonfinite == "skip"
            kernels.learn(*learning, learnt, momentum, view.values, correction, skips)
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x else array
    saved: Saved = kernels.Saved(
        kept, array.shape, array.dtype, view, statistics, eps, norm.centred, False
    )
    return y, saved


def forward_given(
    x: ArrayLike,
    norm: Norm,
    dtype: np.dtype[Any] | None,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
) -> tuple[Array, Saved]:
    """Normalise x by given statistics."""
    kernels = _dispatch.kernels
    done: tuple[Array, Saved] | None = kernels.express_inference(
        x,
        norm.views,
        dtype,
        mean,
        var,
        weight,
        bias,
        eps,
        out,
        _threads.threads_for,
    )
    if done is not None:
        return done

    x = _checks.array("x", x, dtype)
    array = _checks.data("x", x, dtype)
    view = norm.view(array.shape)
    mean = _checks.statistic("running_mean", mean, view.C)
    var = _checks.statistic("running_var", var, view.C)
    weight, bias = _parameter("weight", weight, view), _parameter("bias", bias, view)
    eps = _checks.non_negative("eps", eps)
    _checks.usable_variance("running_var", var, eps)
    overwrites_x = _overwrites(
        out, x, "x", running_mean=mean, running_var=var, weight=weight, bias=bias
    )
    buffer, y = _allocate(out, array.shape, array.dtype)

    if array.size:
        threads = _threads.threads_for(array.size)
        kernels.normalise(array, view, mean, var, weight, bias, eps, buffer, threads)
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x or weight is None else array
    statistics = kernels.given_statistics(mean, var)
    saved: Saved = kernels.Saved(kept, array.shape, array.dtype, view, statistics, eps, True, True)
    return y, saved


def statistics(x: ArrayLike, norm: Norm, eps: float = 0.0) -> Saved:
    """Return what a forward pass would have kept, for a backward pass without one."""
    array = _checks.data("x", x)
    view = norm.view(array.shape)
    eps = _checks.non_negative("eps", eps)
    found = np.zeros((3, view.B * view.C))
    if array.size:
        threads = _threads.threads_for(array.size)
        _dispatch.kernels.statistics_of(array, view, eps, norm.centred, found, threads)
    saved: Saved = _dispatch.kernels.Saved(
        array, array.shape, array.dtype, view, found, eps, norm.centred, False
    )
    return saved


def given_statistics(
    x: ArrayLike, norm: Norm, mean: ArrayLike, var: ArrayLike, eps: float, training: bool
) -> Saved:
    """Return the same of statistics that the caller has kept."""
    kernels = _dispatch.kernels
    done: Saved | None = kernels.express_saved(x, norm.views, mean, var, eps, training)
    if done is not None:
        return done

    array = _checks.data("x", x)
    view = norm.view(array.shape)
    mean = _checks.per_channel("mean", mean, view.C)
    var = _checks.per_channel("var", var, view.C)
    frozen = not _checks.flag("training", training)
    eps = _checks.non_negative("eps", eps)
    _checks.usable_variance("var", var, eps)
    found = kernels.given_statistics(mean, var)
    saved: Saved = kernels.Saved(array, array.shape, array.dtype, view, found, eps, True, frozen)
    return saved


def backward(
    saved: Saved,
    grad_output: ArrayLike,
    weight: ArrayLike | None,
    out: Array | None,
    given_x: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of input, weight and bias.

    given_x: the input of the forward pass as the caller has it, where that is another layout.
    """
    kernels = _dispatch.kernels
    done: tuple[Array, Array, Array] | None = kernels.express_backward(
        grad_output, saved, weight, out, _threads.threads_for
    )
    if done is not None:
        return done

    x, shape, dtype, view = saved.x, saved.shape, saved.dtype, saved.view
    grad_output = _checks.array("grad_output", grad_output, dtype)
    grad = _checks.data("grad_output", grad_output, dtype)
    _checks.same_shape("grad_output", grad.shape, shape, "the input of the forward call")
    weight = _parameter("weight", weight, view)
    if x is not None:
        _checks.input_intact(x, shape, dtype)
    elif not (saved.frozen and weight is None):
        _checks.input_overwritten()
    _overwrites(out, grad_output, "grad_output", weight=weight)
    overwrites_x = False
    if out is not None and x is not None:
        overwrites_x = _checks.overlaps(out, "x", x if given_x is None else given_x)
    buffer, grad_input = _allocate(out, shape, dtype)

    grad_weight, grad_bias = (np.zeros(view.parameter_shape, dtype) for _ in range(2))
    threads = _threads.threads_for(4 * grad.size)
    if grad.size and x is None:
        var = saved.statistics[2]
        kernels.normalise(grad, view, None, var, None, None, saved.eps, buffer, threads)
    elif grad.size:
        kernels.gradients(grad, saved, weight, buffer, grad_weight, grad_bias, threads)
    if grad_input is not buffer:
        grad_input[...] = buffer
    if overwrites_x:
        saved.x = None
    return grad_input, grad_weight, grad_bias


def _parameter(name: str, value: ArrayLike | None, view: View) -> Array | None:
    """A weight or a bias, for reading."""
    if value is None:
        return None
    return _checks.parameter(name, value, view.parameter_shape, not view.of_samples)


def _of_channels(statistics: Array, view: View) -> Array:
    """What running statistics learn: those of a batch, or the averages over its samples."""
    if not view.of_samples:
        return statistics
    averages: Array = _dispatch.kernels.averages(statistics, view.parameter_shape[0])
    return averages


def _overwrites(out: Array | None, like: Array, name: str, **others: Array | None) -> bool:
    """Check an output for an input where the caller has it, and for parameters and statistics."""
    if out is None:
        return False
    _checks.output(out, like.shape, like.dtype.newbyteorder("="))
    _checks.apart(out, **others)
    return _checks.overlaps(out, name, like)


def _allocate(out: Array | None, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The array that the kernel writes, and the one that the caller gets: out where it can be."""
    if out is None:
        new = np.empty(shape, dtype)
        return new, new
    if out.flags.c_contiguous and out.flags.aligned:
        return out, out
    return np.empty(shape, dtype), out
