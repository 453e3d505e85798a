"""Batch normalisation: check, allocate, call a kernel.

The public functions keep no state. The layers call the three below them, which also return, or
take, what a backward pass needs of its forward pass.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbn import _checks, _dispatch, _threads
from cbn._types import Array, Axes, Shape
from cbn.functional import _arrays


def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    correction: float = 1,
    out: Array | None = None,
) -> Array:
    """Normalise every channel, by running statistics or by those of the batch.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    In training ``mean`` and ``var`` are those of the batch (``var`` divided by the number of
    values), and the running arrays, where given, are updated in place::

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * n / (n - correction)

    Parameters
    ----------
    x : array_like
        Float32 or float64 data of at least two axes, in any layout. Never modified.
    running_mean, running_var : array_like of shape (C,) or None
        Statistics to normalise by, or, in training, arrays to update (None: no update).
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; 1 and 0 where absent.
    training : bool
        Whether to use and learn the statistics of the batch.
    momentum : float
        Weight of the new batch, as in PyTorch. Keras and ONNX give the weight of the old value:
        their momentum is 1 minus this one.
    eps : float
        Added to the variance, >= 0.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).
    correction : float
        The running variance is divided by n - correction (1: PyTorch; 0: Keras, Flax, ONNX).
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.
        One that is not contiguous is written by way of a temporary.

    Returns
    -------
    ndarray
        The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or element type.
    ValueError
        If a shape or value is wrong, a batch has too few values to train on, ``running_var + eps``
        is not above 0 where it is to normalise by, or ``out`` is not writable or overlaps ``x`` in
        part.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1. Arguments follow
    ``torch.nn.functional.batch_norm``; ``correction`` is the word of the array API standard.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import batch_norm
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> x = np.array([[1.0, 0.0], [3.0, 4.0]])
    >>> batch_norm(x, mean, var, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean, var
    (array([0.2, 0.2]), array([1.1, 1.7]))
    """
    done: Array | None = _dispatch.kernels.express_batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        AXES,
        channel_axis,
        correction,
        out,
        _threads.threads_for,
    )
    if done is not None:
        return done

    axes = AXES[_checks.channel_axis(channel_axis)]
    if _checks.flag("training", training):
        y, _ = forward_training(
            x,
            axes,
            None,
            running_mean,
            running_var,
            None,
            weight,
            bias,
            momentum,
            eps,
            correction,
            "propagate",
            out,
        )
    else:
        _checks.momentum(momentum)
        _checks.non_negative("correction", correction)
        y, _ = forward_inference(x, axes, None, running_mean, running_var, weight, bias, eps, out)
    return y


def batch_norm_stats(
    x: ArrayLike, *, channel_axis: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return the mean, the biased variance and the number of values of each channel.

    ``mean = sum(x) / count`` and ``var = sum((x - mean)**2) / count`` over all axes but that of
    the channels. Two batches merge exactly from these three (Chan, Golub and LeVeque 1983).

    Parameters
    ----------
    x : array_like
        Float32 or float64 data of at least two axes, in any layout. Never modified.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
    count : int
        An empty batch has count 0, mean 0 and var 0, which merges as nothing.

    Raises
    ------
    TypeError, ValueError
        If ``x`` or ``channel_axis`` is not as above.

    Examples
    --------
    >>> from cbn.functional import batch_norm_stats
    >>> mean, var, count = batch_norm_stats([[1.0, 5.0], [3.0, 5.0]])
    >>> mean.tolist(), var.tolist(), count
    ([2.0, 5.0], [1.0, 0.0], 2)
    """
    axes = AXES[_checks.channel_axis(channel_axis)]
    x = _checks.data("x", x)
    view = N, C, S = _view(x.shape, _checks.axis_of_channels("x", x.shape, axes))
    statistics = np.zeros((3, C))
    if x.size:
        _dispatch.kernels.batch_statistics(x, *view, 0.0, statistics, _threads.threads_for(x.size))
    return statistics[0].copy(), statistics[2].copy(), N * S


def batch_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    training: bool = True,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    With n values per channel and ``x_hat = (x - mean) / sqrt(var + eps)``::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = weight / sqrt(var + eps)
                     * (grad_output - grad_bias / n - x_hat * grad_weight / n)

    Statistics that do not depend on ``x`` (``training=False``) leave ``grad_input = weight /
    sqrt(var + eps) * grad_output``.

    Parameters
    ----------
    grad_output : array_like, shape and dtype of x
        Gradient with respect to the output. Never modified.
    x : array_like
        Input of the forward call. Never modified.
    mean, var : array_like of shape (C,)
        What it was normalised by: in training ``mean`` and ``var`` of :func:`batch_norm_stats`,
        else the running statistics.
    weight : array_like of shape (C,), optional
        Scale of the forward call; 1 where absent.
    training : bool
        Whether ``mean`` and ``var`` are the statistics of ``x``.
    eps : float
        Added to the variance, >= 0.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).
    out : ndarray, optional
        Array to write ``grad_input`` to: ``grad_output`` or ``x`` itself, or memory apart.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight, grad_bias : ndarray of shape (C,), dtype of x

    Raises
    ------
    TypeError, ValueError
        As for :func:`batch_norm`; ``var + eps`` must be above 0 in either mode.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015), section 3, with the terms that cancel left
    out.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import batch_norm_backward, batch_norm_stats
    >>> x = np.array([[1.0], [2.0], [3.0]])
    >>> mean, var, _ = batch_norm_stats(x)
    >>> grads = batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, mean, var, eps=0.0)
    >>> [grad.round(3).ravel().tolist() for grad in grads]
    [[0.204, -0.408, 0.204], [-1.225], [1.0]]
    """
    axes = AXES[_checks.channel_axis(channel_axis)]
    forward: Forward | None = _dispatch.kernels.express_forward(x, axes, mean, var, eps, training)
    if forward is not None:
        return backward(forward, grad_output, weight, out)[:3]

    x = _checks.array("x", x)
    array = _checks.data("x", x)
    view = _view(array.shape, _checks.axis_of_channels("x", array.shape, axes))
    mean = _checks.per_channel("mean", mean, view[1])
    var = _checks.per_channel("var", var, view[1])
    frozen = not _checks.flag("training", training)
    eps = _checks.non_negative("eps", eps)
    _checks.usable_variance("var", var, eps)
    statistics = _dispatch.kernels.given_statistics(mean, var)
    forward = (array, array.shape, array.dtype, view, statistics, eps, frozen)
    return backward(forward, grad_output, weight, out, x)[:3]


# ------------------------------------------------------------------- what the layers are made of


# Any array of at least two axes.
AXES = {
    1: Axes((-1, -1, *[1] * (_checks.MOST_AXES - 1)), None, "at least 2 axes"),
    -1: Axes((-1, -1, *range(1, _checks.MOST_AXES)), None, "at least 2 axes"),
}

View = tuple[int, int, int]


# What a backward pass needs of its forward pass. Plain tuples, because a named one costs as much as
# a small kernel:
#   x           or None: overwritten, or not needed
#   shape, dtype of x
#   view        of x, as (N, C, S)
#   statistics  float64 (3, C): mean, what float64 rounds off it, var
#   eps
#   frozen      whether the statistics do not depend on x
Forward = tuple[Array | None, Shape, np.dtype[Any], View, Array, float, bool]

# The gradients of input, weight and bias, and whether the input of the forward pass is overwritten.
Gradients = tuple[Array, Array, Array, bool]


def forward_training(
    x: ArrayLike,
    axes: Axes,
    dtype: np.dtype[Any] | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    num_batches_tracked: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float | None,
    eps: float,
    correction: float,
    nonfinite: str,
    out: Array | None,
    of_one: bool = False,
    warns: bool = False,
) -> tuple[Array, Forward]:
    """Normalise by the statistics of x, and learn them.

    With a counter of batches, momentum may be None: the average over all of them. nonfinite is a
    layer's. of_one: whether one value per channel will do, whose variance is 0. warns: whether to
    warn of few values, once all checks have passed and before anything is computed.
    """
    if not warns:
        done: tuple[Array, Forward] | None = _dispatch.kernels.express_training(
            x,
            axes,
            dtype,
            running_mean,
            running_var,
            num_batches_tracked,
            weight,
            bias,
            momentum,
            eps,
            correction,
            nonfinite,
            out,
            _threads.threads_for,
        )
        if done is not None:
            return done

    if num_batches_tracked is not None:
        _checks.batch_to_count(num_batches_tracked)
    x = _checks.array("x", x, dtype)
    array = _checks.data("x", x, dtype)
    view = N, C, S = _view(array.shape, _checks.axis_of_channels("x", array.shape, axes))
    count = N * S
    _checks.both_or_none(running_mean, running_var)
    running_mean = _checks.running_or_none("running_mean", running_mean, C)
    running_var = _checks.running_or_none("running_var", running_var, C)
    _checks.learnt_apart(running_mean, running_var, x)
    weight = _checks.per_channel_or_none("weight", weight, C)
    bias = _checks.per_channel_or_none("bias", bias, C)
    if momentum is not None or num_batches_tracked is None:
        momentum = _checks.momentum(momentum)
    eps = _checks.non_negative("eps", eps)
    correction = _checks.non_negative("correction", correction)
    nonfinite = _checks.nonfinite(nonfinite)
    if not of_one:
        _checks.enough_values("x", array.shape, count, 0 if running_mean is None else correction)
    overwrites_x = _arrays.overwrites(
        out,
        x,
        "x",
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    if warns and 0 < count < _checks.SMALL_BATCH:
        _checks.warn_of_small_batch(count, array.shape)
    buffer, y = _arrays.allocate(out, array.shape, array.dtype)

    statistics = np.zeros((3, C))
    if array.size:
        threads = _threads.threads_for(2 * array.size)
        if nonfinite == "raise":
            # Nothing is written before the statistics have been looked at.
            _dispatch.kernels.batch_statistics(array, *view, eps, statistics, threads)
            _checks.finite_statistics(
                _dispatch.kernels.not_finite(
                    statistics, running_mean, running_var, count, correction
                )
            )
            _dispatch.kernels.normalise_by(
                array, *view, statistics, weight, bias, eps, buffer, threads
            )
        else:
            _dispatch.kernels.normalise_batch(
                array, *view, weight, bias, eps, statistics, buffer, threads
            )
        learning = running_mean, running_var, num_batches_tracked
        skips = nonfinite == "skip"
        _dispatch.kernels.learn(*learning, statistics, momentum, count, correction, skips)
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x else array
    return y, (kept, array.shape, array.dtype, view, statistics, eps, False)


def forward_inference(
    x: ArrayLike,
    axes: Axes,
    dtype: np.dtype[Any] | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
) -> tuple[Array, Forward]:
    """Normalise x by given statistics."""
    done: tuple[Array, Forward] | None = _dispatch.kernels.express_inference(
        x,
        axes,
        dtype,
        running_mean,
        running_var,
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
    view = _, C, _ = _view(array.shape, _checks.axis_of_channels("x", array.shape, axes))
    mean = _checks.statistic("running_mean", running_mean, C)
    var = _checks.statistic("running_var", running_var, C)
    weight = _checks.per_channel_or_none("weight", weight, C)
    bias = _checks.per_channel_or_none("bias", bias, C)
    eps = _checks.non_negative("eps", eps)
    _checks.usable_variance("running_var", var, eps)
    overwrites_x = _arrays.overwrites(
        out, x, "x", running_mean=mean, running_var=var, weight=weight, bias=bias
    )
    buffer, y = _arrays.allocate(out, array.shape, array.dtype)

    if array.size:
        threads = _threads.threads_for(array.size)
        _dispatch.kernels.normalise(array, *view, mean, var, weight, bias, eps, buffer, threads)
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x or weight is None else array
    statistics = _dispatch.kernels.given_statistics(mean, var)
    return y, (kept, array.shape, array.dtype, view, statistics, eps, True)


def backward(
    forward: Forward,
    grad_output: ArrayLike,
    weight: ArrayLike | None,
    out: Array | None,
    given_x: Array | None = None,
) -> Gradients:
    """Return the gradients of a forward pass, whose input the caller may have in another layout."""
    done: Gradients | None = _dispatch.kernels.express_backward(
        grad_output, forward, weight, out, _threads.threads_for
    )
    if done is not None:
        return done

    x, shape, dtype, view, statistics, eps, frozen = forward
    C = view[1]
    grad_output = _checks.array("grad_output", grad_output, dtype)
    grad = _checks.data("grad_output", grad_output, dtype)
    _checks.same_shape("grad_output", grad.shape, shape, "the input of the forward call")
    weight = _checks.per_channel_or_none("weight", weight, C)
    if x is None and not (frozen and weight is None):
        _checks.input_overwritten()
    if x is not None:
        _checks.input_intact(x, shape, dtype)
    _arrays.overwrites(out, grad_output, "grad_output", weight=weight)
    overwrote_x = False
    if out is not None and x is not None:
        overwrote_x = _checks.overlaps(out, "x", x if given_x is None else given_x)
    buffer, grad_input = _arrays.allocate(out, shape, dtype)

    grad_weight, grad_bias = np.zeros(C, dtype), np.zeros(C, dtype)
    threads = _threads.threads_for(4 * grad.size)
    if grad.size and x is None:
        _dispatch.kernels.normalise(
            grad, *view, None, statistics[2], None, None, eps, buffer, threads
        )
    elif grad.size:
        _dispatch.kernels.gradients(
            grad, x, *view, statistics, weight, eps, frozen,
            buffer, grad_weight, grad_bias, threads,
        )  # fmt: skip
    if grad_input is not buffer:
        grad_input[...] = buffer
    return grad_input, grad_weight, grad_bias, overwrote_x


def _view(shape: Shape, axis: int) -> View:
    """The shape as (N, C, S): before the channels, the channels, after them."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
