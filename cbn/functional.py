"""Batch normalisation as functions: check, allocate, call a kernel.

The public functions keep no state. The layers call the three below them, which also return, or
take, what a backward pass needs of its forward pass.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbn import _checks, _threads
from cbn._checks import Array, Shape
from cbn._dispatch import kernels

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_stats"]


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
        If a shape or value is wrong, a batch has too few values to train on, or ``out`` is not
        writable or overlaps ``x`` in part.

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
    axis = _checks.channel_axis(channel_axis)
    training = _checks.flag("training", training)
    array = _checks.data("x", x)
    _checks.at_least_two_axes("x", array.shape)
    if axis < 0:
        axis += array.ndim
    if training:
        y, _ = forward_training(
            array, x, axis, running_mean, running_var, weight, bias, momentum, eps, correction, out
        )
    else:
        _checks.momentum(momentum)
        _checks.non_negative("correction", correction)
        y, _ = forward_inference(array, x, axis, running_mean, running_var, weight, bias, eps, out)
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
    axis = _checks.channel_axis(channel_axis)
    x = _checks.data("x", x)
    _checks.at_least_two_axes("x", x.shape)
    view = N, C, S = _view(x.shape, axis if axis > 0 else axis + x.ndim)
    mean, mean_low, var = np.zeros(C), np.zeros(C), np.zeros(C)
    if x.size:
        kernels.batch_statistics(x, *view, mean, mean_low, var, _threads.threads_for(x.size))
    return mean, var, N * S


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
        As for :func:`batch_norm`.

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
    axis = _checks.channel_axis(channel_axis)
    array = _checks.data("x", x)
    _checks.at_least_two_axes("x", array.shape)
    axis = axis if axis > 0 else axis + array.ndim
    C = array.shape[axis]
    forward = Forward(
        x=array,
        shape=array.shape,
        dtype=array.dtype,
        axis=axis,
        mean=_checks.per_channel("mean", mean, C),
        mean_low=None,
        var=_checks.per_channel("var", var, C),
        eps=_checks.non_negative("eps", eps),
        frozen=not _checks.flag("training", training),
    )
    gradients = backward(forward, grad_output, weight, out, x)
    return gradients.input, gradients.weight, gradients.bias


# ------------------------------------------------------------------- what the layers are made of


class Forward(NamedTuple):
    """What a backward pass needs of its forward pass."""

    x: Array | None  # None: overwritten, or not needed
    shape: Shape
    dtype: np.dtype[Any]
    axis: int
    mean: Array
    mean_low: Array | None
    var: Array
    eps: float
    frozen: bool  # the statistics do not depend on x


class Gradients(NamedTuple):
    input: Array
    weight: Array
    bias: Array
    overwrote_x: bool


def forward_training(
    x: Array,
    given_x: ArrayLike,
    axis: int,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float,
    eps: float,
    correction: float,
    out: Array | None,
) -> tuple[Array, Forward]:
    """Normalise by the statistics of x (given_x as a kernel can read it), and learn them."""
    view = N, C, S = _view(x.shape, axis)
    count = N * S
    _checks.both_or_none(running_mean, running_var)
    if running_mean is not None:
        running_mean = _checks.running("running_mean", running_mean, C)
        running_var = _checks.running("running_var", running_var, C)
    weight = _checks.per_channel_or_none("weight", weight, C)
    bias = _checks.per_channel_or_none("bias", bias, C)
    momentum = _checks.momentum(momentum)
    eps = _checks.non_negative("eps", eps)
    correction = _checks.non_negative("correction", correction)
    _checks.enough_values("x", x.shape, count, correction)
    overwrites_x = out is not None and _checks.overlaps(
        _checks.output(out, x.shape, x.dtype), "x", given_x
    )
    buffer, y = _allocate(out, x.shape, x.dtype)

    mean, mean_low, var = np.zeros(C), np.zeros(C), np.zeros(C)
    if x.size:
        kernels.normalise_batch(
            x, *view, weight, bias, eps, mean, mean_low, var, buffer, _threads.threads_for(x.size)
        )
        if running_mean is not None:
            kernels.update_running(running_mean, mean, momentum, 1.0)
            kernels.update_running(running_var, var, momentum, count / (count - correction))
    if y is not buffer:
        y[...] = buffer
    kept = None if overwrites_x else x
    return y, Forward(kept, x.shape, x.dtype, axis, mean, mean_low, var, eps, frozen=False)


def forward_inference(
    x: Array,
    given_x: ArrayLike,
    axis: int,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
) -> tuple[Array, Forward]:
    """Normalise x (given_x as a kernel can read it) by given statistics."""
    view = _, C, _ = _view(x.shape, axis)
    mean = _checks.statistic("running_mean", running_mean, C)
    var = _checks.statistic("running_var", running_var, C)
    weight = _checks.per_channel_or_none("weight", weight, C)
    bias = _checks.per_channel_or_none("bias", bias, C)
    eps = _checks.non_negative("eps", eps)
    overwrites_x = out is not None and _checks.overlaps(
        _checks.output(out, x.shape, x.dtype), "x", given_x
    )
    buffer, y = _allocate(out, x.shape, x.dtype)

    if x.size:
        kernels.normalise(
            x, *view, mean, var, weight, bias, eps, buffer, _threads.threads_for(x.size)
        )
    if y is not buffer:
        y[...] = buffer
    # Without a weight no gradient depends on x, which is then not kept alive for nothing.
    kept = None if overwrites_x or weight is None else x
    return y, Forward(kept, x.shape, x.dtype, axis, mean, None, var, eps, frozen=True)


def backward(
    forward: Forward,
    grad_output: ArrayLike,
    weight: ArrayLike | None,
    out: Array | None,
    given_x: ArrayLike | None = None,
) -> Gradients:
    """Return the gradients of a forward pass."""
    view = _, C, _ = _view(forward.shape, forward.axis)
    x, shape, dtype = forward.x, forward.shape, forward.dtype
    grad = _checks.data("grad_output", grad_output, dtype)
    _checks.same_shape("grad_output", grad.shape, shape, "the input of the forward call")
    weight = _checks.per_channel_or_none("weight", weight, C)
    if x is None and not (forward.frozen and weight is None):
        _checks.input_overwritten()
    overwrote_x = False
    if out is not None:
        _checks.output(out, shape, dtype)
        _checks.overlaps(out, "grad_output", grad_output)
        overwrote_x = _checks.overlaps(out, "x", x if given_x is None else given_x)
    buffer, grad_input = _allocate(out, shape, dtype)

    grad_weight, grad_bias = np.zeros(C, dtype), np.zeros(C, dtype)
    threads = _threads.threads_for(grad.size)
    if grad.size and x is None:
        kernels.normalise(grad, *view, None, forward.var, None, None, forward.eps, buffer, threads)
    elif grad.size:
        kernels.gradients(
            grad,
            x,
            *view,
            forward.mean,
            forward.mean_low,
            forward.var,
            weight,
            forward.eps,
            forward.frozen,
            buffer,
            grad_weight,
            grad_bias,
            threads,
        )
    if grad_input is not buffer:
        grad_input[...] = buffer
    return Gradients(grad_input, grad_weight, grad_bias, overwrote_x)


def _view(shape: Shape, axis: int) -> tuple[int, int, int]:
    """The shape as (N, C, S): before the channels, the channels, after them."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


def _allocate(out: Array | None, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The array that the kernel writes, and the one that the caller gets: out where it can be."""
    if out is None:
        new = np.empty(shape, dtype)
        return new, new
    if out.flags.c_contiguous and out.flags.aligned:
        return out, out
    return np.empty(shape, dtype), out
