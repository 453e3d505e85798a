"""Instance norm: every channel of every sample by its own statistics."""

from __future__ import annotations

from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn import _checks, _dispatch
from cbn._types import Array, Axes, Shape
from cbn.functional import _batch_norm, _groups


def instance_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    correction: float = 1,
    out: Array | None = None,
) -> Array:
    """Normalise every channel of every sample, by its own statistics or by running ones.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    With ``use_input_stats`` the mean and the biased variance are those of one channel of one
    sample, and the running arrays, where given, are updated in place by the averages over the
    samples, of n values each::

        running_mean = (1 - momentum) * running_mean + momentum * mean(mean)
        running_var = (1 - momentum) * running_var + momentum * mean(var) * n / (n - correction)

    Parameters
    ----------
    x : array_like
        Float32 or float64 data of shape (N, C, ...) or (N, ..., C) with at least three axes, in any
        memory layout. Never modified.
    running_mean, running_var : array_like of shape (C,) or None
        Statistics to normalise by, or, with ``use_input_stats``, arrays to update.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; 1 and 0 where absent.
    use_input_stats : bool
        Whether to use the statistics of ``x``.
    momentum : float
        Weight of the new statistics, as in PyTorch.
    eps : float
        Added to the variance, >= 0.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).
    correction : float
        The running variance is divided by n - correction.
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.

    Returns
    -------
    ndarray
        The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above, with ``use_input_stats`` a channel of a sample has only one
        value, or without it ``running_var + eps`` is not above 0.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization" (2016). Arguments follow
    ``torch.nn.functional.instance_norm``.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import instance_norm
    >>> instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    channel_axis = _checks.channel_axis(channel_axis)
    x = _checks.array("x", x)
    channels = _checks.channels_of("x", x.shape, channel_axis, 3)
    if not _checks.flag("use_input_stats", use_input_stats):
        axes = _batch_norm.AXES[channel_axis]
        _checks.momentum(momentum)
        _checks.non_negative("correction", correction)
        return _batch_norm.forward_inference(
            x, axes, None, running_mean, running_var, weight, bias, eps, out
        )[0]
    y, _ = forward(
        x,
        instances_of(_batch_norm.AXES[channel_axis], channel_axis),
        None,
        channels,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        momentum,
        eps,
        correction,
        out,
    )
    return y


def instance_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    Of a forward call that used the statistics of its input (with running statistics,
    :func:`batch_norm_backward` gives the same). With ``x_hat = (x - mean) / sqrt(var + eps)``,
    means over the n values of a channel of a sample and sums over the samples too::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = weight / sqrt(var + eps)
                     * (grad_output - mean(grad_output) - x_hat * mean(grad_output * x_hat))

    Parameters
    ----------
    grad_output : array_like, shape and dtype of x
        Gradient with respect to the output. Never modified.
    x : array_like
        Input of the forward call, whose statistics are computed once more; a layer keeps them.
    weight, eps, channel_axis
        As for :func:`instance_norm`.
    out : ndarray, optional
        Array to write ``grad_input`` to: ``grad_output`` or ``x`` itself, or memory apart.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight, grad_bias : ndarray of shape (C,), dtype of x

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization" (2016), differentiated.

    Examples
    --------
    >>> from cbn.functional import instance_norm_backward
    >>> gradients = instance_norm_backward([[[1.0, 0.0, 0.0]]], [[[1.0, 2.0, 3.0]]], eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[[0.204, -0.408, 0.204]]], [-1.225], [1.0]]
    """
    channel_axis = _checks.channel_axis(channel_axis)
    x = _checks.array("x", x)
    shape = (_checks.channels_of("x", x.shape, channel_axis, 3),)
    grouping = instances_of(_batch_norm.AXES[channel_axis], channel_axis)
    forward = _groups.of_input(x, grouping, shape, eps, True)
    return _groups.backward(forward, grad_output, weight, out, x)[:3]


def forward(
    x: ArrayLike,
    grouping_of: _groups.GroupingOf,
    dtype: np.dtype[Any] | None,
    channels: int,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    num_batches_tracked: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float | None,
    eps: float,
    correction: float,
    out: Array | None,
    warns: bool = False,
) -> tuple[Array, _groups.Forward]:
    """Normalise by the statistics of x, and learn their averages over the samples.

    With a counter of batches, momentum may be None: the average over all of them. warns: whether to
    warn of few values, before anything is computed.
    """
    if num_batches_tracked is not None:
        _checks.batch_to_count(num_batches_tracked)
    _checks.both_or_none(running_mean, running_var)
    running_mean = _checks.running_or_none("running_mean", running_mean, channels)
    running_var = _checks.running_or_none("running_var", running_var, channels)
    x = _checks.array("x", x, dtype)
    _checks.learnt_apart(running_mean, running_var, x)
    if out is not None and isinstance(out, np.ndarray):
        _checks.apart(out, running_mean=running_mean, running_var=running_var)
    if momentum is not None or num_batches_tracked is None:
        momentum = _checks.momentum(momentum)
    correction = _checks.non_negative("correction", correction)
    learns = running_mean is not None
    shape = x.shape
    B, N, C, S, *_ = grouping_of(shape)
    _checks.enough_values_of_samples(shape, N * S if B * C else 0, correction if learns else 0)
    if warns and N * S < _checks.SMALL_BATCH and _checks.data("x", x, dtype).size:
        _checks.warn_of_small_samples(N * S, shape)

    y, kept = _groups.forward(x, grouping_of, dtype, (channels,), weight, bias, eps, True, out)
    if y.size and (learns or num_batches_tracked is not None):
        # Axis 0 holds samples: their sums are in order, whatever the number of threads.
        statistics = kept[4].reshape(3, -1, channels).mean(axis=1)
        learning = running_mean, running_var, num_batches_tracked
        _dispatch.kernels.learn(*learning, statistics, momentum, N * S, correction, False)
    return y, kept


@lru_cache
def instances_of(
    axes: Axes, channel_axis: int, batch_rank: int | None = None
) -> _groups.GroupingOf:
    """The grouping of an array by samples and channels; of other ranks it is one sample."""
    return lru_cache(partial(_instances, axes, channel_axis, batch_rank))


def _instances(
    axes: Axes, channel_axis: int, batch_rank: int | None, shape: Shape
) -> _groups.Grouping:
    axis = _checks.axis_of_channels("x", shape, axes)
    C = shape[axis]
    if channel_axis == 1:
        return 1, 1, prod(shape[:axis]) * C, prod(shape[axis + 1 :]), 1, C
    if batch_rank in (None, len(shape)):
        return shape[0], prod(shape[1:-1]), C, 1, 1, C
    return 1, prod(shape[:-1]), C, 1, 1, C
