"""Every norm, forward and backward: look for the ordinary call, check, allocate, call a kernel.

Nothing here knows one norm from another but by its row of the table (cbn/_norms.py). Batch norm is
the norm whose running statistics may be learnt or given; instance norm learns the averages over its
samples. A pass forward returns, beside the output, what a pass backward needs of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cbn import _arrays, _dispatch, _scalars, _statistics, _threads
from cbn._norms import Norm
from cbn._types import Array, Shape

if TYPE_CHECKING:
    from cbn._core import Saved, View


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
        x, norm.views, dtype, weight, bias, eps, norm.centred, least, out, running_mean,
        running_var, num_batches_tracked, momentum, correction, nonfinite, _threads.threads_for,
    )  # fmt: skip
    if done is not None:
        return done

    if num_batches_tracked is not None:
        _statistics.batch_to_count(num_batches_tracked)
    x, array, view = _read(x, norm, dtype)
    _statistics.both_or_none(running_mean, running_var)
    channels = view.parameter_shape[0]
    running_mean = _statistics.running_or_none("running_mean", running_mean, channels)
    running_var = _statistics.running_or_none("running_var", running_var, channels)
    _statistics.learnt_apart(running_mean, running_var, x)
    weight, bias = _parameter("weight", weight, view), _parameter("bias", bias, view)
    if momentum is not None or num_batches_tracked is None:
        momentum = _scalars.momentum(momentum)
    eps = _scalars.non_negative("eps", eps)
    correction = _scalars.non_negative("correction", correction)
    nonfinite = _scalars.nonfinite(nonfinite)
    if least > 1:
        needed = 0.0 if running_mean is None else correction
        _statistics.enough_values(array.shape, view.values, needed, view.of_samples)
    running = {"running_mean": running_mean, "running_var": running_var}
    overwrites_x = _overwrites(out, x, "x", **running, weight=weight, bias=bias)
    if 0 < view.values < least == _statistics.SMALL_BATCH:
        _statistics.warn_of_few_values(view.values, array.shape, view.of_samples)
    buffer, y = _allocate(out, array.shape, array.dtype)

    statistics = np.zeros((3, view.B * view.C))
    if array.size:
        learning = running_mean, running_var, num_batches_tracked
        if nonfinite == "raise":
            # Nothing is written before the statistics have been looked at.
            kernels.statistics_of(array, view, eps, norm.centred, statistics, _threads.threads_for)
            learnt = _of_channels(statistics, view)
            lost = kernels.not_finite(learnt, running_mean, running_var, view.values, correction)
            _statistics.finite_statistics(lost)
            kernels.normalise_by(
                array, view, statistics, weight, bias, eps, buffer, _threads.threads_for
            )
        else:
            kernels.normalise(
                array,
                view,
                weight,
                bias,
                eps,
                norm.centred,
                statistics,
                buffer,
                _threads.threads_for,
            )
        if running_mean is not None or num_batches_tracked is not None:
            learnt, skips = _of_channels(statistics, view), nonfinite == "skip"
            kernels.learn(*learning, learnt, momentum, view.values, correction, skips)
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x else array
    return y, _saved(kept, array, view, statistics, eps, norm.centred)


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
        x, norm.views, dtype, mean, var, weight, bias, eps, out, _threads.threads_for
    )
    if done is not None:
        return done

    x, array, view = _read(x, norm, dtype)
    mean = _statistics.statistic("running_mean", mean, view.C)
    var = _statistics.statistic("running_var", var, view.C)
    weight, bias = _parameter("weight", weight, view), _parameter("bias", bias, view)
    eps = _scalars.non_negative("eps", eps)
    _statistics.usable_variance("running_var", var, eps)
    overwrites_x = _overwrites(
        out, x, "x", running_mean=mean, running_var=var, weight=weight, bias=bias
    )
    buffer, y = _allocate(out, array.shape, array.dtype)

    if array.size:
        kernels.normalise_given(
            array, view, mean, var, weight, bias, eps, buffer, _threads.threads_for
        )
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x or weight is None else array
    return y, _saved(kept, array, view, kernels.given_statistics(mean, var), eps, frozen=True)


def statistics(x: ArrayLike, norm: Norm, eps: float = 0.0) -> Saved:
    """Return what a forward pass would have kept, for a backward pass without one."""
    array = _arrays.data("x", x)
    view = norm.view(array.shape)
    eps = _scalars.non_negative("eps", eps)
    found = np.zeros((3, view.B * view.C))
    if array.size:
        _dispatch.kernels.statistics_of(array, view, eps, norm.centred, found, _threads.threads_for)
    saved: Saved = _dispatch.kernels.Saved(  # not by _saved, which a small call would feel
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

    _, array, view = _read(x, norm, None)
    mean = _arrays.per_channel("mean", mean, view.C)
    var = _arrays.per_channel("var", var, view.C)
    frozen = not _scalars.flag("training", training)
    eps = _scalars.non_negative("eps", eps)
    _statistics.usable_variance("var", var, eps)
    return _saved(array, array, view, kernels.given_statistics(mean, var), eps, frozen=frozen)


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
    grad_output = _arrays.array("grad_output", grad_output, dtype)
    grad = _arrays.data("grad_output", grad_output, dtype)
    if grad.shape != shape:
        raise ValueError(
            f"grad_output: expected shape {shape}, that of the input of the forward call, "
            f"got {grad.shape}"
        )
    weight = _parameter("weight", weight, view)
    if x is None and not (saved.frozen and weight is None):
        raise RuntimeError(
            "backward: expected the input of the last forward call to be intact, "
            "got one that an out= wrote over; give that call another out"
        )
    if x is not None and (x.shape != shape or x.dtype != dtype or not x.flags.c_contiguous):
        raise RuntimeError(
            f"backward: expected the input of the last forward call as it was, {dtype} of shape "
            f"{shape}, got {x.dtype} of shape {x.shape}; do not change it in between"
        )
    _overwrites(out, grad_output, "grad_output", weight=weight)
    overwrites_x = False
    if out is not None and x is not None:
        overwrites_x = _arrays.overlaps(out, "x", x if given_x is None else given_x)
    buffer, grad_input = _allocate(out, shape, dtype)

    grad_weight, grad_bias = (np.zeros(view.parameter_shape, dtype) for _ in range(2))
    if grad.size and x is None:
        var = saved.statistics[2]
        kernels.normalise_given(
            grad, view, None, var, None, None, saved.eps, buffer, _threads.threads_for
        )
    elif grad.size:
        kernels.gradients(grad, saved, weight, buffer, grad_weight, grad_bias, _threads.threads_for)
    if grad_input is not buffer:
        grad_input[...] = buffer
    if overwrites_x:
        saved.x = None
    return grad_input, grad_weight, grad_bias


def _read(x: ArrayLike, norm: Norm, dtype: np.dtype[Any] | None) -> tuple[Array, Array, View]:
    """The input as the caller has it and as a kernel can read it, and how the norm sees it."""
    x = _arrays.array("x", x, dtype)
    array = _arrays.data("x", x, dtype)
    return x, array, norm.view(array.shape)


def _saved(
    x: Array | None,
    like: Array,
    view: View,
    statistics: Array,
    eps: float,
    centred: bool = True,
    frozen: bool = False,
) -> Saved:
    """What a pass backward needs; like is x even where that has been overwritten."""
    saved: Saved = _dispatch.kernels.Saved(
        x, like.shape, like.dtype, view, statistics, eps, centred, frozen
    )
    return saved


def _parameter(name: str, value: ArrayLike | None, view: View) -> Array | None:
    """A weight or a bias, for reading."""
    if value is None:
        return None
    return _arrays.parameter(name, value, view.parameter_shape, not view.of_samples)


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
    _arrays.output(out, like.shape, like.dtype.newbyteorder("="))
    _arrays.apart(out, **others)
    return _arrays.overlaps(out, name, like)


def _allocate(out: Array | None, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The array that the kernel writes, and the one that the caller gets: out where it can be."""
    if out is None:
        new = np.empty(shape, dtype)
        return new, new
    if out.flags.c_contiguous and out.flags.aligned:
        return out, out
    return np.empty(shape, dtype), out
