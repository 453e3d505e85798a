"""Group norm: every group of channels of every sample by its own statistics."""

from __future__ import annotations

from functools import lru_cache, partial
from math import prod

from numpy.typing import ArrayLike

from cbn import _checks
from cbn._types import Array, Shape
from cbn.functional import _groups


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
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
        Float32 or float64 data of shape (N, C, ...) or (N, ..., C), in any memory layout. Never
        modified.
    num_groups : int
        A divisor of C.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each channel; 1 and 0 where absent.
    eps : float
        Added to the variance, >= 0.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.

    Returns
    -------
    ndarray
        The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Wu and He, "Group Normalization" (2018). Arguments follow ``torch.nn.functional.group_norm``.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import group_norm
    >>> group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    grouping = groups_of(
        _checks.positive_integer("num_groups", num_groups), _checks.channel_axis(channel_axis)
    )
    x = _checks.array("x", x)
    channels = _checks.channels_of("x", x.shape, channel_axis, 2)
    return _groups.forward(x, grouping, None, (channels,), weight, bias, eps, True, out)[0]


def group_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    With ``x_hat = (x - mean) / sqrt(var + eps)``, ``g = weight * grad_output``, means over the
    values of a group and sums over those of a channel in all samples::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    Parameters
    ----------
    grad_output : array_like, shape and dtype of x
        Gradient with respect to the output. Never modified.
    x : array_like
        Input of the forward call, whose statistics are computed once more; a layer keeps them.
    num_groups, weight, eps, channel_axis
        As for :func:`group_norm`.
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
    Wu and He, "Group Normalization" (2018), differentiated.

    Examples
    --------
    >>> from cbn.functional import group_norm_backward
    >>> gradients = group_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], 1, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.204, -0.408, 0.204]], [-1.225, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    grouping = groups_of(
        _checks.positive_integer("num_groups", num_groups), _checks.channel_axis(channel_axis)
    )
    x = _checks.array("x", x)
    shape = (_checks.channels_of("x", x.shape, channel_axis, 2),)
    forward = _groups.of_input(x, grouping, shape, eps, True)
    return _groups.backward(forward, grad_output, weight, out, x)[:3]


@lru_cache
def groups_of(
    num_groups: int, channel_axis: int, num_channels: int | None = None
) -> _groups.GroupingOf:
    """The grouping of an array by samples and groups of channels."""
    return lru_cache(partial(_groups_of_channels, num_groups, channel_axis, num_channels))


def _groups_of_channels(
    num_groups: int, channel_axis: int, num_channels: int | None, shape: Shape
) -> _groups.Grouping:
    _checks.grouped("x", shape, num_groups, channel_axis, num_channels)
    N = shape[0]
    if channel_axis == 1:
        each = shape[1] // num_groups
        return 1, 1, N * num_groups, each * prod(shape[2:]), each, num_groups
    each = shape[-1] // num_groups
    return N, prod(shape[1:-1]), num_groups, each, each, num_groups
