"""The norms as formulas, in NumPy float64: the specification of :mod:`cbn.functional`.

Nothing here is fast and nothing is clever. Every function computes in float64 whatever it is
given (in long double if it is given that), returns what it computed in, and reads as the equations
of its paper. Where ``x`` is of float16 or bfloat16, the output and the gradient of the input are
rounded to that, once. Batch norm: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep
Network Training by Reducing Internal Covariate Shift" (2015), algorithm 1 for the forward pass,
section 3 for the gradients. The others, whose papers are named in :mod:`cbn.functional`, are one
formula over other axes. The tests hold the kernels to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbn._docstrings import documented_by
from cbn._types import Array

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_stats",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

WideArray = NDArray[np.float64 | np.longdouble]
Gradients = tuple[Array, WideArray, WideArray]


# ------------------------------------------------------------------------------------- batch norm


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
) -> tuple[Array, WideArray | None, WideArray | None]:
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
    given, x = x, _wide(x)
    running_mean = None if running_mean is None else _wide(running_mean)
    running_var = None if running_var is None else _wide(running_var)
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
    x_hat = (x - _column(mean, x, channel_axis)) / np.sqrt(_column(var, x, channel_axis) + eps)
    y = _affine(x_hat, weight, bias, channel_axis)
    return _rounded(y, given), running_mean, running_var


@documented_by(batch_norm)
def batch_norm_stats(x: ArrayLike, *, channel_axis: int = 1) -> tuple[WideArray, WideArray, int]:
    """Return the mean, the biased variance and the number of values of each channel.

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
    x = _wide(x)
    axes, count = _other_axes(x, channel_axis)
    if count == 0:
        channels = x.shape[channel_axis]
        return np.zeros(channels), np.zeros(channels), 0
    mean = x.mean(axis=axes)
    var = np.mean((x - _column(mean, x, channel_axis)) ** 2, axis=axes)
    return mean, var, count


@documented_by(batch_norm)
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
) -> Gradients:
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
    given = x
    grad_output, x, mean, var = _wide(grad_output), _wide(x), _wide(mean), _wide(var)
    axes, count = _other_axes(x, channel_axis)
    centred = x - _column(mean, x, channel_axis)
    std = np.sqrt(_column(var, x, channel_axis) + eps)
    x_hat = centred / std
    grad_bias = grad_output.sum(axis=axes)
    grad_weight = (grad_output * x_hat).sum(axis=axes)

    grad_x_hat = grad_output * _scale(weight, x, channel_axis)
    if not training or count == 0:
        return _rounded(grad_x_hat / std, given), grad_weight, grad_bias
    grad_var = (grad_x_hat * centred * -0.5 * std**-3).sum(axis=axes, keepdims=True)
    grad_mean = (grad_x_hat * -1 / std).sum(axis=axes, keepdims=True)
    grad_mean = grad_mean + grad_var * (-2 * centred).mean(axis=axes, keepdims=True)
    grad_input = grad_x_hat / std + grad_var * 2 * centred / count + grad_mean / count
    return _rounded(grad_input, given), grad_weight, grad_bias


# ----------------------------------------------------------------------- one formula for the others


def _standardise(
    x: WideArray, axes: tuple[int, ...], eps: float, centred: bool = True
) -> tuple[WideArray, WideArray]:
    """x_hat = (x - mean) / std over these axes, and std = sqrt(var + eps)."""
    if x.size == 0:
        return x, np.ones(())
    mean = x.mean(axis=axes, keepdims=True) if centred else np.zeros_like(x)
    std: WideArray = np.sqrt(np.mean((x - mean) ** 2, axis=axes, keepdims=True) + eps)
    return (x - mean) / std, std


def _through(
    grad_x_hat: WideArray,
    x_hat: WideArray,
    std: WideArray,
    axes: tuple[int, ...],
    centred: bool = True,
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
    grad_output: WideArray, x_hat: WideArray, weight: WideArray | float, axes: tuple[int, ...]
) -> tuple[WideArray, WideArray, WideArray]:
    """Those of x_hat, weight and bias; the parameters lie along these axes."""
    others = tuple(axis for axis in range(x_hat.ndim) if axis not in axes)
    grad_weight, grad_bias = (grad_output * x_hat).sum(others), grad_output.sum(others)
    return grad_output * weight, grad_weight, grad_bias


# ------------------------------------------------------------------------------------ instance norm


@documented_by(batch_norm)
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
) -> tuple[Array, WideArray | None, WideArray | None]:
    """Return every channel of every sample normalised, and the new running statistics.

    Parameters
    ----------
    x : array_like
        Data of at least three axes, the first of which counts samples.
    use_input_stats : bool
        Whether to normalise by, and learn, the statistics of ``x``.

    Examples
    --------
    >>> from cbn import reference
    >>> y, mean, var = reference.instance_norm([[[1.0, 3.0]]], [0.0], [1.0], eps=0.0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[[-1.0, 1.0]]], [0.2], [1.1])
    """
    if not use_input_stats:
        return batch_norm(
            x, running_mean, running_var, weight, bias, eps=eps, channel_axis=channel_axis
        )
    # Every channel is a group of its own.
    y = group_norm(x, np.shape(x)[channel_axis], weight, bias, eps, channel_axis=channel_axis)
    x = _wide(x)
    new_mean = None if running_mean is None else _wide(running_mean)
    new_var = None if running_var is None else _wide(running_var)
    if new_mean is not None and new_var is not None and x.size:
        axes = _other_axes(x, channel_axis)[0][1:]  # nor that of the samples
        count = np.prod([x.shape[axis] for axis in axes])
        mean = x.mean(axis=axes).mean(axis=0)
        var = x.var(axis=axes).mean(axis=0) * count / (count - correction)
        new_mean = (1 - momentum) * new_mean + momentum * mean
        new_var = (1 - momentum) * new_var + momentum * var
    return y, new_mean, new_var


@documented_by(batch_norm_backward)
def instance_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Gradients:
    """Return the gradients of instance norm by the statistics of the input.

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.instance_norm_backward([[[1.0, 0.0]]], [[[1.0, 3.0]]], eps=0.0)
    >>> [gradient.tolist() for gradient in gradients]
    [[[[0.0, 0.0]]], [-1.0], [1.0]]
    """
    groups = np.shape(x)[channel_axis]
    return group_norm_backward(grad_output, x, groups, weight, eps, channel_axis=channel_axis)


# --------------------------------------------------------------------------------------- group norm


@documented_by(batch_norm)
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Array:
    """Return every group of channels of every sample normalised.

    Parameters
    ----------
    num_groups : int
        A divisor of C, the number of channels.

    Returns
    -------
    ndarray of float64, shape of x

    Examples
    --------
    >>> from cbn import reference
    >>> reference.group_norm([[1.0, 3.0, 10.0, 30.0]], 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    given, x = x, _wide(x)
    grouped = _split(x, num_groups, channel_axis)
    x_hat, _ = _standardise(grouped, tuple(range(2, grouped.ndim)), eps)
    return _rounded(_affine(_join(x_hat, x, channel_axis), weight, bias, channel_axis), given)


@documented_by(batch_norm_backward, group_norm)
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

    Examples
    --------
    >>> from cbn import reference
    >>> gradients = reference.group_norm_backward([[1.0, 0.0]], [[1.0, 3.0]], 1, eps=0.0)
    >>> [gradient.tolist() for gradient in gradients]
    [[[0.0, 0.0]], [-1.0, 0.0], [1.0, 0.0]]
    """
    given, x = x, _wide(x)
    grouped = _split(x, num_groups, channel_axis)
    axes = tuple(range(2, grouped.ndim))
    x_hat, std = _standardise(grouped, axes, eps)
    scale = _scale(weight, x, channel_axis)
    grad_x_hat, grad_weight, grad_bias = _gradients(
        _wide(grad_output), _join(x_hat, x, channel_axis), scale, (channel_axis % x.ndim,)
    )
    grad = _through(_split(grad_x_hat, num_groups, channel_axis), x_hat, std, axes)
    return _rounded(_join(grad, x, channel_axis), given), grad_weight, grad_bias


# ----------------------------------------------------------------------------- layer norm, RMS norm


@documented_by(group_norm)
def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Array:
    """Return x normalised over its last axes.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps
        As for :func:`cbn.functional.layer_norm`.

    Examples
    --------
    >>> from cbn import reference
    >>> reference.layer_norm([[1.0, 3.0], [10.0, 30.0]], 2, bias=[0.0, 5.0], eps=0.0)
    array([[-1.,  6.],
           [-1.,  6.]])
    """
    given, x = x, _wide(x)
    x_hat, _ = _standardise(x, _last_axes(x, normalized_shape), eps)
    y = x_hat if weight is None else x_hat * _wide(weight)
    return _rounded(y if bias is None else y + _wide(bias), given)


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


@documented_by(group_norm)
def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 0.0,
) -> Array:
    """Return x divided by the root mean square over its last axes.

    Parameters
    ----------
    x, normalized_shape, weight
        As for :func:`cbn.functional.rms_norm`.
    eps : float
        Added to the mean square. The default there depends on the element type.

    Examples
    --------
    >>> from cbn import reference
    >>> reference.rms_norm([[1.0, 7.0]], 2)
    array([[0.2, 1.4]])
    """
    given, x = x, _wide(x)
    x_hat, _ = _standardise(x, _last_axes(x, normalized_shape), eps, centred=False)
    return _rounded(x_hat if weight is None else x_hat * _wide(weight), given)


def rms_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 0.0,
) -> tuple[Array, WideArray]:
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
    given, x = x, _wide(x)
    axes = _last_axes(x, normalized_shape)
    x_hat, std = _standardise(x, axes, eps, centred)
    scale = 1.0 if weight is None else _wide(weight)
    grad_x_hat, grad_weight, grad_bias = _gradients(_wide(grad_output), x_hat, scale, axes)
    grad_input = _through(grad_x_hat, x_hat, std, axes, centred)
    return _rounded(grad_input, given), grad_weight, grad_bias


# ---------------------------------------------------------------------------------- arrays and axes


def _wide(value: ArrayLike) -> WideArray:
    array = np.asarray(value)
    return array.astype(np.longdouble if array.dtype == np.longdouble else np.float64)


def _rounded(value: WideArray, x: ArrayLike) -> Array:
    """The value as it is; as elements of the type of x where that is float16 or bfloat16."""
    element = np.asarray(x).dtype.newbyteorder("=")
    if element.name not in ("float16", "bfloat16"):
        return value
    with np.errstate(over="ignore", under="ignore"):
        if element.name == "float16":
            return value.astype(element)
        # A cast to bfloat16 goes by way of float32, and would round twice. So this is the float32
        # towards 0, whose last bit says whether something is missing (rounding to odd).
        single = value.astype(np.float32)
        single = np.where(abs(single) > abs(value), np.nextafter(single, np.float32(0)), single)
        bits = single.view(np.uint32) | (single != value)
        nearest: Array = bits.view(np.float32).astype(element)
        return nearest


def _column(value: WideArray, x: WideArray, channel_axis: int) -> WideArray:
    """One value per channel, shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return value.reshape(shape)


def _scale(weight: ArrayLike | None, x: WideArray, channel_axis: int) -> WideArray | float:
    return 1.0 if weight is None else _column(_wide(weight), x, channel_axis)


def _affine(
    x_hat: WideArray, weight: ArrayLike | None, bias: ArrayLike | None, channel_axis: int
) -> WideArray:
    """A weight and a bias for each channel."""
    y = x_hat * _scale(weight, x_hat, channel_axis)
    return y if bias is None else y + _column(_wide(bias), x_hat, channel_axis)


def _other_axes(x: WideArray, channel_axis: int) -> tuple[tuple[int, ...], int]:
    axes = tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)
    return axes, int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64))


def _last_axes(x: WideArray, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(range(x.ndim - np.size(normalized_shape), x.ndim))


def _split(x: WideArray, num_groups: int, channel_axis: int) -> WideArray:
    """(N, groups, C / groups, ...)."""
    first = np.moveaxis(x, channel_axis, 1)
    N, C, *positions = first.shape
    each = C // num_groups if C else 0  # of no channels there is no group
    return first.reshape(N, num_groups, each, *positions)


def _join(grouped: WideArray, x: WideArray, channel_axis: int) -> WideArray:
    """The shape of x again."""
    N, groups, each, *positions = grouped.shape
    return np.moveaxis(grouped.reshape(N, groups * each, *positions), 1, channel_axis)
