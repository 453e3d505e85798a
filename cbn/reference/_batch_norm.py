"""Batch norm."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cbn.reference._arrays import WideArray, column, wide


def batch_norm_stats(x: ArrayLike, *, channel_axis: int = 1) -> tuple[WideArray, WideArray, int]:
    """Return the mean, the biased variance and the number of values of each channel.

    Parameters
    ----------
    x : array_like
        Data with at least two axes.
    channel_axis : int
        The axis that counts channels.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
        ``var`` is divided by ``count``. Both are 0 where there is no value.
    count : int
        Values per channel.

    Examples
    --------
    >>> from cbn import reference
    >>> mean, var, count = reference.batch_norm_stats([[1.0, 5.0], [3.0, 5.0]])
    >>> mean.tolist(), var.tolist(), count
    ([2.0, 5.0], [1.0, 0.0], 2)
    """
    x = wide(x)
    axes, count = _other_axes(x, channel_axis)
    if count == 0:
        channels = x.shape[channel_axis]
        return np.zeros(channels), np.zeros(channels), 0
    mean = x.mean(axis=axes)
    var = np.mean((x - column(mean, x, channel_axis)) ** 2, axis=axes)
    return mean, var, count


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
) -> tuple[WideArray, WideArray | None, WideArray | None]:
    """Return the normalised data and the new running statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the statistics of the batch in
    training and the running statistics otherwise.

    Parameters
    ----------
    x : array_like
        Data with at least two axes.
    running_mean, running_var : array_like of shape (C,) or None
        Statistics so far. They are not modified.
    weight, bias : array_like of shape (C,) or None
        Scale (None: 1) and shift (None: 0).
    training : bool
        Whether to normalise by, and learn, the statistics of ``x``.
    momentum : float
        Weight of this batch: ``running = (1 - momentum) * running + momentum * batch``.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis that counts channels.
    correction : float
        The running variance learns ``sum((x - mean)**2) / (count - correction)``.

    Returns
    -------
    y : ndarray of float64, shape of x
    running_mean, running_var : ndarray of float64, shape (C,), or None
        The statistics after the call.

    Examples
    --------
    >>> from cbn import reference
    >>> y, mean, var = reference.batch_norm([[1.0], [3.0]], [0.0], [1.0], training=True, eps=0.0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[-1.0], [1.0]], [0.2], [1.1])
    """
    x = wide(x)
    running_mean = None if running_mean is None else wide(running_mean)
    running_var = None if running_var is None else wide(running_var)
    if training:
        mean, var, count = batch_norm_stats(x, channel_axis=channel_axis)
        if running_mean is not None and running_var is not None and count:
            unbiased = var * count / (count - correction)
            running_mean = (1 - momentum) * running_mean + momentum * mean
            running_var = (1 - momentum) * running_var + momentum * unbiased
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var: expected arrays when not training")
    else:
        mean, var = running_mean, running_var
    x_hat = _normalise(x, mean, var, eps, channel_axis)
    y = x_hat * column(_or(weight, 1.0, mean), x, channel_axis)
    y = y + column(_or(bias, 0.0, mean), x, channel_axis)
    return y, running_mean, running_var


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
) -> tuple[WideArray, WideArray, WideArray]:
    """Return the gradients with respect to the input, the weight and the bias.

    With frozen statistics (``training=False``) the mean and the variance are constants, and two
    terms of the paper's input gradient are missing.

    Parameters
    ----------
    grad_output : array_like, shape of x
        Gradient of the loss with respect to the output.
    x : array_like
        Input of the forward call.
    mean, var : array_like of shape (C,)
        The statistics it was normalised by: those of the batch, biased, or the running ones.
    weight : array_like of shape (C,) or None
        Scale of the forward call (None: 1).
    training : bool
        Whether ``mean`` and ``var`` are functions of ``x``.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis that counts channels.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight, grad_bias : ndarray of float64, shape (C,)

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.batch_norm_backward([[1.0], [0.0]], [[1.0], [3.0]], [2.0], [1.0])
    >>> [gradient.shape for gradient in gradients]
    [(2, 1), (1,), (1,)]
    """
    grad_output = wide(grad_output)
    x = wide(x)
    mean = wide(mean)
    var = wide(var)
    axes, count = _other_axes(x, channel_axis)
    x_hat = _normalise(x, mean, var, eps, channel_axis)
    grad_bias = grad_output.sum(axis=axes)
    grad_weight = (grad_output * x_hat).sum(axis=axes)

    std = np.sqrt(column(var, x, channel_axis) + eps)
    grad_x_hat = grad_output * column(_or(weight, 1.0, mean), x, channel_axis)
    if not training or count == 0:
        return grad_x_hat / std, grad_weight, grad_bias
    centred = x - column(mean, x, channel_axis)
    grad_var = (grad_x_hat * centred * -0.5 * std**-3).sum(axis=axes, keepdims=True)
    grad_mean = (grad_x_hat * -1 / std).sum(axis=axes, keepdims=True)
    grad_mean = grad_mean + grad_var * (-2 * centred).mean(axis=axes, keepdims=True)
    grad_input = grad_x_hat / std + grad_var * 2 * centred / count + grad_mean / count
    return grad_input, grad_weight, grad_bias


def _normalise(
    x: WideArray, mean: WideArray, var: WideArray, eps: float, channel_axis: int
) -> WideArray:
    centred = x - column(mean, x, channel_axis)
    normalised: WideArray = centred / np.sqrt(column(var, x, channel_axis) + eps)
    return normalised


def _other_axes(x: WideArray, channel_axis: int) -> tuple[tuple[int, ...], int]:
    axes = tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)
    return axes, int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64))


def _or(value: ArrayLike | None, default: float, like: WideArray) -> WideArray:
    return np.full_like(like, default) if value is None else wide(value)
