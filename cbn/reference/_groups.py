"""The norms of one sample: instance, group, layer and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cbn.reference._arrays import WideArray, column, wide
from cbn.reference._batch_norm import batch_norm

Axes = tuple[int, ...]
Gradients = tuple[WideArray, WideArray, WideArray]


# ----------------------------------------------------------------------------------- one formula


def _standardise(
    x: WideArray, axes: Axes, eps: float, centred: bool = True
) -> tuple[WideArray, WideArray]:
    """x_hat = (x - mean) / std over these axes, and std = sqrt(var + eps)."""
    if x.size == 0:
        return x, np.ones(())
    mean = x.mean(axis=axes, keepdims=True) if centred else np.zeros_like(x)
    std: WideArray = np.sqrt(np.mean((x - mean) ** 2, axis=axes, keepdims=True) + eps)
    return (x - mean) / std, std


def _through(
    grad_x_hat: WideArray, x_hat: WideArray, std: WideArray, axes: Axes, centred: bool = True
) -> WideArray:
    """The gradient of x from that of x_hat: every value has moved its group's mean and std."""
    if x_hat.size == 0:
        return x_hat
    grad = grad_x_hat - x_hat * np.mean(grad_x_hat * x_hat, axis=axes, keepdims=True)
    if centred:
        grad = grad - grad_x_hat.mean(axis=axes, keepdims=True)
    grad_x: WideArray = grad / std
    return grad_x


def _gradients(
    grad_output: WideArray,
    x_hat: WideArray,
    weight: WideArray | float,
    parameter_axes: Axes,
) -> Gradients:
    """Those of x_hat, weight and bias; the parameters lie along the parameter axes."""
    others = tuple(axis for axis in range(x_hat.ndim) if axis not in parameter_axes)
    grad_weight, grad_bias = (grad_output * x_hat).sum(others), grad_output.sum(others)
    return grad_output * weight, grad_weight, grad_bias


# ---------------------------------------------------------------------------------- instance norm


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
) -> tuple[WideArray, WideArray | None, WideArray | None]:
    """Return every channel of every sample normalised, and the new running statistics.

    As :func:`cbn.functional.instance_norm`; the running statistics are not modified.

    Parameters
    ----------
    x : array_like
        Data of at least three axes, the first of which counts samples.
    running_mean, running_var, weight, bias : array_like of shape (C,) or None
        Statistics so far, scale and shift.
    use_input_stats, momentum, eps, channel_axis, correction
        As there.

    Returns
    -------
    y : ndarray of float64, shape of x
    running_mean, running_var : ndarray of float64, shape (C,), or None
        The statistics after the call.

    Examples
    --------
    >>> from cbn import reference
    >>> y, mean, var = reference.instance_norm([[[1.0, 3.0]]], [0.0], [1.0], eps=0.0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[[-1.0, 1.0]]], [0.2], [1.1])
    """
    x = wide(x)
    if not use_input_stats:
        return batch_norm(
            x, running_mean, running_var, weight, bias, eps=eps, channel_axis=channel_axis
        )
    axes = _positions(x, channel_axis)
    x_hat, _ = _standardise(x, axes, eps)
    y = _affine(x_hat, weight, bias, channel_axis)
    new_mean = None if running_mean is None else wide(running_mean)
    new_var = None if running_var is None else wide(running_var)
    if new_mean is not None and new_var is not None and x.size:
        count = np.prod([x.shape[axis] for axis in axes])
        mean = x.mean(axis=axes).mean(axis=0)
        var = x.var(axis=axes).mean(axis=0) * count / (count - correction)
        new_mean = (1 - momentum) * new_mean + momentum * mean
        new_var = (1 - momentum) * new_var + momentum * var
    return y, new_mean, new_var


def instance_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Gradients:
    """Return the gradients of instance norm by the statistics of the input.

    Parameters
    ----------
    grad_output, x, weight, eps, channel_axis
        As for :func:`cbn.functional.instance_norm_backward`.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight, grad_bias : ndarray of float64, shape (C,)

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.instance_norm_backward([[[1.0, 0.0]]], [[[1.0, 3.0]]], eps=0.0)
    >>> [gradient.tolist() for gradient in gradients]
    [[[[0.0, 0.0]]], [-1.0], [1.0]]
    """
    x = wide(x)
    axes = _positions(x, channel_axis)
    x_hat, std = _standardise(x, axes, eps)
    scale = 1.0 if weight is None else column(wide(weight), x, channel_axis)
    channels = (channel_axis % x.ndim,)
    grad_x_hat, grad_weight, grad_bias = _gradients(wide(grad_output), x_hat, scale, channels)
    return _through(grad_x_hat, x_hat, std, axes), grad_weight, grad_bias


# ------------------------------------------------------------------------------------- group norm


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> WideArray:
    """Return every group of channels of every sample normalised.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, channel_axis
        As for :func:`cbn.functional.group_norm`.

    Returns
    -------
    ndarray of float64, shape of x

    Examples
    --------
    >>> from cbn import reference
    >>> reference.group_norm([[1.0, 3.0, 10.0, 30.0]], 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    x = wide(x)
    grouped = _split(x, num_groups, channel_axis)
    x_hat, _ = _standardise(grouped, _all_but_two(grouped), eps)
    return _affine(_join(x_hat, x, channel_axis), weight, bias, channel_axis)


def group_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Gradients:
    """Return the gradients of group norm.

    Parameters
    ----------
    grad_output, x, num_groups, weight, eps, channel_axis
        As for :func:`cbn.functional.group_norm_backward`.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight, grad_bias : ndarray of float64, shape (C,)

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.group_norm_backward([[1.0, 0.0]], [[1.0, 3.0]], 1, eps=0.0)
    >>> [gradient.tolist() for gradient in gradients]
    [[[0.0, 0.0]], [-1.0, 0.0], [1.0, 0.0]]
    """
    x = wide(x)
    grouped = _split(x, num_groups, channel_axis)
    axes = _all_but_two(grouped)
    x_hat, std = _standardise(grouped, axes, eps)
    scale = 1.0 if weight is None else column(wide(weight), x, channel_axis)
    grad_x_hat, grad_weight, grad_bias = _gradients(
        wide(grad_output), _join(x_hat, x, channel_axis), scale, (channel_axis % x.ndim,)
    )
    grad = _through(_split(grad_x_hat, num_groups, channel_axis), x_hat, std, axes)
    return _join(grad, x, channel_axis), grad_weight, grad_bias


# --------------------------------------------------------------------------- layer norm, RMS norm


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> WideArray:
    """Return x normalised over its last axes.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps
        As for :func:`cbn.functional.layer_norm`.

    Returns
    -------
    ndarray of float64, shape of x

    Examples
    --------
    >>> from cbn import reference
    >>> reference.layer_norm([[1.0, 3.0], [10.0, 30.0]], 2, bias=[0.0, 5.0], eps=0.0)
    array([[-1.,  6.],
           [-1.,  6.]])
    """
    x = wide(x)
    x_hat, _ = _standardise(x, _last_axes(x, normalized_shape), eps)
    y = x_hat if weight is None else x_hat * wide(weight)
    return y if bias is None else y + wide(bias)


def layer_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """Return the gradients of layer norm.

    Parameters
    ----------
    grad_output, x, normalized_shape, weight, eps
        As for :func:`cbn.functional.layer_norm_backward`.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight, grad_bias : ndarray of float64, shape normalized_shape

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.layer_norm_backward([[1.0, 0.0]], [[1.0, 3.0]], 2, eps=0.0)
    >>> [gradient.tolist() for gradient in gradients]
    [[[0.0, 0.0]], [-1.0, 0.0], [1.0, 0.0]]
    """
    return _row_gradients(grad_output, x, normalized_shape, weight, eps, centred=True)


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 0.0,
) -> WideArray:
    """Return x divided by the root mean square over its last axes.

    Parameters
    ----------
    x, normalized_shape, weight
        As for :func:`cbn.functional.rms_norm`.
    eps : float
        Added to the mean square. The default there depends on the element type.

    Returns
    -------
    ndarray of float64, shape of x

    Examples
    --------
    >>> from cbn import reference
    >>> reference.rms_norm([[1.0, 7.0]], 2)
    array([[0.2, 1.4]])
    """
    x = wide(x)
    x_hat, _ = _standardise(x, _last_axes(x, normalized_shape), eps, centred=False)
    return x_hat if weight is None else x_hat * wide(weight)


def rms_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 0.0,
) -> tuple[WideArray, WideArray]:
    """Return the gradients of RMS norm.

    Parameters
    ----------
    grad_output, x, normalized_shape, weight, eps
        As for :func:`rms_norm` and :func:`cbn.functional.rms_norm_backward`.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight : ndarray of float64, shape normalized_shape

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.rms_norm_backward([[1.0, 0.0]], [[1.0, 7.0]], 2)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.196, -0.028]], [0.2, 0.0]]
    """
    return _row_gradients(grad_output, x, normalized_shape, weight, eps, centred=False)[:2]


def _row_gradients(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None,
    eps: float,
    centred: bool,
) -> Gradients:
    x = wide(x)
    axes = _last_axes(x, normalized_shape)
    x_hat, std = _standardise(x, axes, eps, centred)
    scale = 1.0 if weight is None else wide(weight)
    grad_x_hat, grad_weight, grad_bias = _gradients(wide(grad_output), x_hat, scale, axes)
    return _through(grad_x_hat, x_hat, std, axes, centred), grad_weight, grad_bias


# ------------------------------------------------------------------------------------------- axes


def _positions(x: WideArray, channel_axis: int) -> Axes:
    """All axes but those of samples and channels."""
    return tuple(axis for axis in range(1, x.ndim) if axis != channel_axis % x.ndim)


def _last_axes(x: WideArray, normalized_shape: int | Sequence[int]) -> Axes:
    return tuple(range(x.ndim - np.size(normalized_shape), x.ndim))


def _split(x: WideArray, num_groups: int, channel_axis: int) -> WideArray:
    """(N, groups, C / groups, ...)."""
    first = np.moveaxis(x, channel_axis, 1)
    N, C, *positions = first.shape
    return first.reshape(N, num_groups, C // num_groups, *positions)


def _join(grouped: WideArray, x: WideArray, channel_axis: int) -> WideArray:
    """The shape of x again."""
    N, groups, each, *positions = grouped.shape
    return np.moveaxis(grouped.reshape(N, groups * each, *positions), 1, channel_axis)


def _all_but_two(grouped: WideArray) -> Axes:
    return tuple(range(2, grouped.ndim))


def _affine(
    x_hat: WideArray, weight: ArrayLike | None, bias: ArrayLike | None, channel_axis: int
) -> WideArray:
    """A weight and a bias for each channel."""
    y = x_hat if weight is None else x_hat * column(wide(weight), x_hat, channel_axis)
    return y if bias is None else y + column(wide(bias), x_hat, channel_axis)
