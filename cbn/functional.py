"""The norms as functions, which keep no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbn import _arrays, _dispatch, _engine, _norms, _scalars
from cbn._docstrings import documented_by
from cbn._types import Array, Gradient

if TYPE_CHECKING:
    from cbn._core import Norm, Saved

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_stats",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
]


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
    activation: str | None = None,
    residual: ArrayLike | None = None,
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
        Data of at least two axes, in any layout: float32, float64, float16 or bfloat16 (of the
        library ml_dtypes). The last two are computed in float32. Never modified.
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
    activation : {None, "relu"}
        What is taken of the output in the same pass: ``max(y, 0)``, where a NaN stays one.
    residual : array_like, shape and dtype of x, optional
        What is added before that: ``y = activation(norm(x) + residual)``. The bits are those of
        one step after the other. It may be ``out``.
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` or ``residual`` itself, or memory
        apart from them. One that is not contiguous, or not in the order of ``x``, is written by
        way of a temporary.

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
    # One step for the ordinary call: a small one pays more for each of Python's than for its data.
    done: Array | None = _dispatch.kernels.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, _norms.BATCH,
        channel_axis, correction, out, activation, residual,
    )  # fmt: skip
    if done is not None:
        return done
    norm = _norms.batch_of_function(channel_axis)
    return _with_running(
        norm, norm, _scalars.flag("training", training), False, x, running_mean, running_var,
        weight, bias, momentum, eps, correction, out, activation, residual,
    )[0]  # fmt: skip


@documented_by(batch_norm)
def batch_norm_forward(
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
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do as :func:`batch_norm`, and return also what :func:`norm_backward` needs.

    Returns
    -------
    y : ndarray
        As :func:`batch_norm` returns it.
    saved : Saved
        Holds ``x`` itself, not a copy of it, and the statistics.

    Examples
    --------
    >>> from cbn.functional import batch_norm_forward, norm_backward
    >>> y, saved = batch_norm_forward([[1.0], [2.0], [3.0]], None, None, training=True, eps=0.0)
    >>> [grad.round(3).ravel().tolist() for grad in norm_backward([[1.0], [0.0], [0.0]], saved)]
    [[0.204, -0.408, 0.204], [-1.225], [1.0]]
    """
    norm = _norms.batch_of_function(channel_axis)
    return _with_running(
        norm, norm, _scalars.flag("training", training), True, x, running_mean, running_var,
        weight, bias, momentum, eps, correction, out, activation, residual,
    )  # fmt: skip


def _with_running(
    norm: Norm,
    given_norm: Norm,
    by_own: bool,
    keeps: bool,
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float,
    eps: float,
    correction: float,
    out: Array | None,
    activation: str | None,
    residual: ArrayLike | None,
) -> tuple[Array, Saved]:
    """Normalise by the statistics of x, which the running ones learn, or by those given."""
    if by_own:
        learning = running_mean, running_var, None, momentum, correction, "propagate"
        return _engine.forward(
            x, norm, None, weight, bias, eps, out, 2, *learning, keeps, activation, residual
        )
    _scalars.unused(momentum, correction)
    given = running_mean, running_var, weight, bias, eps, out, keeps, activation, residual
    return _engine.forward_given(x, given_norm, None, *given)


@documented_by(batch_norm)
def batch_norm_stats(
    x: ArrayLike, *, channel_axis: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return the mean, the biased variance and the number of values of each channel.

    ``mean = sum(x) / count`` and ``var = sum((x - mean)**2) / count`` over all axes but that of
    the channels. Two batches merge exactly from these three.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
    count : int
        An empty batch has count 0, mean 0 and var 0, which merges as nothing.

    Raises
    ------
    TypeError, ValueError
        If ``x`` or ``channel_axis`` is not as above.

    References
    ----------
    Chan, Golub and LeVeque (1983) for merging.

    Examples
    --------
    >>> from cbn.functional import batch_norm_stats
    >>> mean, var, count = batch_norm_stats([[1.0, 5.0], [3.0, 5.0]])
    >>> mean.tolist(), var.tolist(), count
    ([2.0, 5.0], [1.0, 0.0], 2)
    """
    saved = _engine.statistics(x, _norms.batch_of_function(channel_axis))
    return saved.statistics[0].copy(), saved.statistics[2].copy(), saved.view.values


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
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, Gradient, Gradient]:
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
        else the running statistics; ``var + eps`` must be above 0 in either mode.
    weight : array_like of shape (C,), optional
        Scale of the forward call; 1 where absent.
    training : bool
        Whether ``mean`` and ``var`` are the statistics of ``x``.
    out : ndarray, optional
        Array to write ``grad_input`` to: ``grad_output`` or ``x`` itself, or memory apart.
    wanted : {"all", "input", "parameters"}
        Which gradients to compute, and so what to read and write: "input" saves the sums that
        belong to the parameters, and ``x`` itself where its statistics do not depend on it;
        "parameters" writes nothing as large as ``x``.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
        None, as the next two, where it is not wanted.
    grad_weight, grad_bias : ndarray of shape (C,)
        Of float64 where ``x`` is, else of float32.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015), section 3, with the terms that cancel left
    out.

    Examples
    --------
    >>> from cbn.functional import batch_norm_backward, batch_norm_stats
    >>> x = [[1.0], [2.0], [3.0]]
    >>> mean, var, _ = batch_norm_stats(x)
    >>> grads = batch_norm_backward([[1.0], [0.0], [0.0]], x, mean, var, eps=0.0)
    >>> [grad.round(3).ravel().tolist() for grad in grads]
    [[0.204, -0.408, 0.204], [-1.225], [1.0]]
    """
    norm, x = _norms.batch_of_function(channel_axis), _arrays.array("x", x)
    saved = _engine.given_statistics(x, norm, mean, var, eps, training)
    return _engine.backward(saved, grad_output, weight, out, wanted, x)[:3]


@documented_by(batch_norm_backward)
def norm_backward(
    grad_output: ArrayLike,
    saved: Saved,
    weight: ArrayLike | None = None,
    *,
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, ...]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    They are those of the function of gradients of the same norm, which reads ``x`` once more. Where
    the forward call had an activation, ``grad_output`` counts where that let it through; where it
    had a residual, its gradient comes last.

    Parameters
    ----------
    saved : Saved
        Of the forward call, whose ``x`` must be as it was.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
        None, as the next two, where it is not wanted.
    grad_weight, grad_bias : ndarray of the shape of the parameters
        Of float64 where ``x`` is, else of float32. RMS norm has no bias; its gradient is that of
        one that would be added.
    grad_residual : ndarray, shape and dtype of x
        What the activation let through of ``grad_output``. Not there without a residual.

    Raises
    ------
    RuntimeError
        If ``x`` has been changed or written over.
    TypeError, ValueError
        If an argument is not as above.

    Examples
    --------
    >>> from cbn.functional import layer_norm_forward, norm_backward
    >>> y, saved = layer_norm_forward([[1.0, 2.0, 3.0]], 3, eps=0.0)
    >>> gradients = norm_backward([[1.0, 0.0, 0.0]], saved)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.204, -0.408, 0.204]], [-1.225, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    gradients = _engine.backward(saved, grad_output, weight, out, wanted)
    return gradients if saved.has_residual else gradients[:3]


@documented_by(batch_norm)
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise every group of channels of every sample.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance of
    C / num_groups channels at all positions of one sample, and a weight and a bias for each
    channel.

    A group of one value, as of num_groups=C on (N, C), has a variance of 0: with an eps
    above 0 its output is the bias, whatever the value; PyTorch does the same. Instance norm, whose
    channels are these groups, refuses it.

    Parameters
    ----------
    x : array_like
        Data, as for :func:`batch_norm`, of shape (N, C, ...) or (N, ..., C).
    num_groups : int
        A divisor of C.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Wu and He, "Group Normalization" (2018). Arguments follow ``torch.nn.functional.group_norm``.

    Examples
    --------
    >>> from cbn.functional import group_norm
    >>> group_norm([[1.0, 3.0, 10.0, 30.0]], num_groups=2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    norm = _norms.group_of_function(num_groups, channel_axis)
    return _engine.forward(
        x, norm, None, weight, bias, eps, out,
        keeps=False, activation=activation, residual=residual,
    )[0]  # fmt: skip


@documented_by(group_norm)
def group_norm_forward(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do as :func:`group_norm`, and return also what :func:`norm_backward` needs.

    Returns
    -------
    y : ndarray
        As :func:`group_norm` returns it.
    saved : Saved
        Holds ``x`` itself, not a copy of it, and statistics where they are worth it.

    Examples
    --------
    >>> from cbn.functional import group_norm_forward, norm_backward
    >>> y, saved = group_norm_forward([[1.0, 3.0, 10.0, 30.0]], num_groups=2, eps=0.0)
    >>> norm_backward([[1.0, 0.0, 0.0, 0.0]], saved, wanted="input")[0].round(3)
    array([[0., 0., 0., 0.]])
    """
    norm = _norms.group_of_function(num_groups, channel_axis)
    return _engine.forward(
        x, norm, None, weight, bias, eps, out, activation=activation, residual=residual
    )


@documented_by(batch_norm_backward, group_norm)
def group_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, Gradient, Gradient]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    With ``x_hat = (x - mean) / sqrt(var + eps)``, ``g = weight * grad_output``, means over the
    values of a group and sums over those of a channel in all samples::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    Parameters
    ----------
    x : array_like
        Input of the forward call, whose statistics are computed once more; a layer keeps them.

    References
    ----------
    Wu and He, "Group Normalization" (2018), differentiated.

    Examples
    --------
    >>> from cbn.functional import group_norm_backward
    >>> gradients = group_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], 1, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.204, -0.408, 0.204]], [-1.225, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    norm, x = _norms.group_of_function(num_groups, channel_axis), _arrays.array("x", x)
    saved = _engine.statistics(x, norm, eps)
    return _engine.backward(saved, grad_output, weight, out, wanted, x)[:3]


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
    activation: str | None = None,
    residual: ArrayLike | None = None,
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
        Data, as for :func:`batch_norm`, of shape (N, C, ...) or (N, ..., C), of at least three
        axes.
    running_mean, running_var : array_like of shape (C,) or None
        Statistics to normalise by, or, with ``use_input_stats``, arrays to update.
    use_input_stats : bool
        Whether to use the statistics of ``x``.
    momentum : float
        Weight of the new statistics, as in PyTorch.
    correction : float
        The running variance is divided by n - correction.

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
    >>> from cbn.functional import instance_norm
    >>> instance_norm([[[1.0, 3.0], [10.0, 30.0]]], eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return _with_running(
        *_norms.instance_of_function(channel_axis),
        _scalars.flag("use_input_stats", use_input_stats), False, x, running_mean, running_var,
        weight, bias, momentum, eps, correction, out, activation, residual,
    )[0]  # fmt: skip


@documented_by(instance_norm)
def instance_norm_forward(
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
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do as :func:`instance_norm`, and return also what :func:`norm_backward` needs.

    Returns
    -------
    y : ndarray
        As :func:`instance_norm` returns it.
    saved : Saved
        Holds ``x`` itself, not a copy of it, and statistics where they are worth it.

    Examples
    --------
    >>> from cbn.functional import instance_norm_forward, norm_backward
    >>> y, saved = instance_norm_forward([[[1.0, 2.0, 3.0]]], eps=0.0)
    >>> norm_backward([[[1.0, 0.0, 0.0]]], saved, wanted="input")[0].round(3)
    array([[[ 0.204, -0.408,  0.204]]])
    """
    return _with_running(
        *_norms.instance_of_function(channel_axis),
        _scalars.flag("use_input_stats", use_input_stats), True, x, running_mean, running_var,
        weight, bias, momentum, eps, correction, out, activation, residual,
    )  # fmt: skip


@documented_by(group_norm_backward)
def instance_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, Gradient, Gradient]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    Of a forward call that used the statistics of its input (with running statistics,
    :func:`batch_norm_backward` gives the same). With ``x_hat = (x - mean) / sqrt(var + eps)``,
    means over the n values of a channel of a sample and sums over the samples too::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = weight / sqrt(var + eps)
                     * (grad_output - mean(grad_output) - x_hat * mean(grad_output * x_hat))

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
    (norm, _), x = _norms.instance_of_function(channel_axis), _arrays.array("x", x)
    saved = _engine.statistics(x, norm, eps)
    return _engine.backward(saved, grad_output, weight, out, wanted, x)[:3]


@documented_by(group_norm)
def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Normalise x over its last axes.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance of
    the last axes, and a weight and a bias for each of their values.

    Parameters
    ----------
    x : array_like
        Data whose last axes are ``normalized_shape``, in any memory layout.
        Never modified.
    normalized_shape : int or sequence of int
        Lengths of the axes to normalise over.
    weight, bias : array_like of shape normalized_shape, optional
        Scale and shift of each value; 1 and 0 where absent.
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.
        One that is not contiguous is written by way of a temporary.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016). Arguments follow
    ``torch.nn.functional.layer_norm``.

    Examples
    --------
    >>> from cbn.functional import layer_norm
    >>> layer_norm([[1.0, 3.0], [10.0, 30.0]], 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    norm = _norms.layer_of_function(normalized_shape)
    return _engine.forward(x, norm, None, weight, bias, eps, out, keeps=False)[0]


@documented_by(layer_norm)
def layer_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do as :func:`layer_norm`, and return also what :func:`norm_backward` needs.

    Returns
    -------
    y : ndarray
        As :func:`layer_norm` returns it.
    saved : Saved
        Holds ``x`` itself, not a copy of it, and statistics where they are worth it.

    Examples
    --------
    >>> from cbn.functional import layer_norm_forward, norm_backward
    >>> y, saved = layer_norm_forward([[1.0, 2.0, 3.0]], 3, eps=0.0)
    >>> norm_backward([[1.0, 0.0, 0.0]], saved, wanted="input")[0].round(3)
    array([[ 0.204, -0.408,  0.204]])
    """
    norm = _norms.layer_of_function(normalized_shape)
    return _engine.forward(x, norm, None, weight, bias, eps, out)


@documented_by(group_norm_backward, layer_norm)
def layer_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, Gradient, Gradient]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    With ``x_hat = (x - mean) / sqrt(var + eps)``, ``g = weight * grad_output``, means over the
    normalised axes and sums over the others::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    Parameters
    ----------
    weight : array_like of shape normalized_shape, optional
        Scale of the forward call; 1 where absent.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight, grad_bias : ndarray of shape normalized_shape

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016), differentiated.

    Examples
    --------
    >>> from cbn.functional import layer_norm_backward
    >>> gradients = layer_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], 3, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.204, -0.408, 0.204]], [-1.225, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    norm, x = _norms.layer_of_function(normalized_shape), _arrays.array("x", x)
    saved = _engine.statistics(x, norm, eps)
    return _engine.backward(saved, grad_output, weight, out, wanted, x)[:3]


@documented_by(layer_norm)
def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """Divide x by the root mean square over its last axes.

    ``y = x / sqrt(mean(x**2) + eps) * weight``

    Parameters
    ----------
    weight : array_like of shape normalized_shape, optional
        Scale of each value; 1 where absent.
    eps : float or None
        Added to the mean square, >= 0. None: ``numpy.finfo(x.dtype).eps``, of
        half types that of float32.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Arguments follow
    ``torch.nn.functional.rms_norm``.

    Examples
    --------
    >>> from cbn.functional import rms_norm
    >>> rms_norm([[1.0, 7.0]], 2, eps=0.0)
    array([[0.2, 1.4]])
    """
    norm, x = _norms.layer_of_function(normalized_shape, centred=False), _arrays.array("x", x)
    eps = _norms.default_eps(x.dtype) if eps is None else eps
    return _engine.forward(x, norm, None, weight, None, eps, out, keeps=False)[0]


@documented_by(rms_norm)
def rms_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do as :func:`rms_norm`, and return also what :func:`norm_backward` needs.

    Returns
    -------
    y : ndarray
        As :func:`rms_norm` returns it.
    saved : Saved
        Holds ``x`` itself, not a copy of it, and statistics where they are worth it.

    Examples
    --------
    >>> from cbn.functional import norm_backward, rms_norm_forward
    >>> y, saved = rms_norm_forward([[3.0, 4.0]], 2, eps=0.0)
    >>> norm_backward([[1.0, 0.0]], saved, wanted="input")[0].round(3)
    array([[ 0.181, -0.136]])
    """
    norm, x = _norms.layer_of_function(normalized_shape, centred=False), _arrays.array("x", x)
    eps = _norms.default_eps(x.dtype) if eps is None else eps
    return _engine.forward(x, norm, None, weight, None, eps, out)


@documented_by(layer_norm_backward, rms_norm)
def rms_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
    wanted: str = "all",
) -> tuple[Gradient, Gradient]:
    """Return the gradients of a loss with respect to the input and the weight.

    With ``rms = sqrt(mean(x**2) + eps)``, ``x_hat = x / rms`` and ``g = weight * grad_output``::

        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - x_hat * mean(g * x_hat)) / rms

    Parameters
    ----------
    x : array_like
        Input of the forward call, whose mean squares are computed once more; a layer keeps them.
    eps : float or None
        Added to the mean square, >= 0. None: ``numpy.finfo(x.dtype).eps``, of
        half types that of float32.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight : ndarray of shape normalized_shape

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), differentiated.

    Examples
    --------
    >>> from cbn.functional import rms_norm_backward
    >>> gradients = rms_norm_backward([[1.0, 0.0]], [[1.0, 7.0]], 2, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.196, -0.028]], [0.2, 0.0]]
    """
    norm, x = _norms.layer_of_function(normalized_shape, centred=False), _arrays.array("x", x)
    eps = _norms.default_eps(x.dtype) if eps is None else eps
    saved = _engine.statistics(x, norm, eps)
    return _engine.backward(saved, grad_output, weight, out, wanted, x)[:2]
