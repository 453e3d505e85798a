"""Folding batch normalisation into the layer before it.

In inference a BatchNorm scales and shifts each channel by constants. So does the layer before it,
if its weight and bias take these constants in, and the BatchNorm can go.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cbn import _arrays, _scalars, _statistics
from cbn._docstrings import documented_by
from cbn._types import Array, Shape
from cbn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["fold_conv", "fold_linear"]

BatchNorm = BatchNorm1d | BatchNorm2d | BatchNorm3d
_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def fold_conv(
    weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm, transposed: bool = False
) -> tuple[Array, Array]:
    """Return the weight and the bias of a convolution that does what it and its BatchNorm did.

    With ``scale = bn.weight / sqrt(bn.running_var + bn.eps)``, of the output channel::

        new_weight = weight * scale
        new_bias = (bias - bn.running_mean) * scale + bn.bias

    Parameters
    ----------
    weight : array_like of shape (out, in / groups, ...)
        Weight of the convolution, float32 or float64; of a transposed one, of shape
        (in, out / groups, ...). Never modified. Any number of kernel axes, from 1.
    bias : array_like of shape (out,) or None
        Its bias, float32 or float64.
    bn : BatchNorm1d, BatchNorm2d or BatchNorm3d
        The layer behind it, in eval mode and with running statistics.
    transposed : bool
        Whether the convolution is a transposed one. The number of its groups follows from the
        shapes: ``groups = bn.num_features / weight.shape[1]``; the inputs ``i`` of group ``g``,
        ``g = i // (in / groups)``, make the output channels from ``g * out / groups``.

    Returns
    -------
    new_weight : ndarray, shape and dtype of weight
    new_bias : ndarray of shape (out,), dtype of weight
        Also where there was no bias. Computed in float64 and rounded once.

    Raises
    ------
    TypeError
        If ``bn`` is not a BatchNorm, or an array is not of float32 or float64.
    ValueError
        If ``bn`` is in training mode, frozen or not, has an activation, no running statistics or
        another number of channels than the convolution, a shape is wrong, ``bn.running_var +
        bn.eps`` is not above 0, or the result would not be finite.

    References
    ----------
    Jacob et al., "Quantization and Training of Neural Networks" (2018), section 3.2. Arguments
    and shapes follow ``torch.nn.utils.fusion.fuse_conv_bn_weights``, which knows no groups in
    transposed convolutions.

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm2d(2, eps=0, running_mean=[1, 2], running_var=[4, 1]).eval()
    >>> weight, bias = cbn.fold_conv(np.ones((2, 3, 1, 1)), None, bn)
    >>> weight[:, 0, 0, 0], bias
    (array([0.5, 1. ]), array([-0.5, -2. ]))
    """
    _check_foldable(bn)
    array = _arrays.readable(_arrays.floats("weight", weight, None))
    C, kernel = bn.num_features, (1,) * (array.ndim - 2)
    if _scalars.flag("transposed", transposed):
        groups = _groups_of(array.shape, C)
        # One row for each input, which is that of its group.
        rows = np.repeat(np.arange(C).reshape(groups, -1), array.shape[0] // groups, axis=0)
        channels = rows.reshape(*rows.shape, *kernel)
    else:
        _check_conv_weight(array.shape, C)
        channels = np.arange(C).reshape(C, 1, *kernel)
    return _folded(array, channels, bias, bn)


@documented_by(fold_conv)
def fold_linear(weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm) -> tuple[Array, Array]:
    """Return the weight and the bias of a linear layer that does what it and its BatchNorm did.

    As :func:`fold_conv`, with ``new_weight = weight * scale[:, None]``.

    Parameters
    ----------
    weight : array_like of shape (out, in)
        Weight of the linear layer ``x @ weight.T + bias``, float32 or float64. Never modified.
    bn : BatchNorm1d, BatchNorm2d or BatchNorm3d
        The layer behind it, in eval mode and with running statistics. Its channels are the outputs
        of the linear layer: data (N, out), or channels last.

    References
    ----------
    As for :func:`fold_conv`; ``torch.nn.utils.fusion.fuse_linear_bn_weights``.

    Examples
    --------
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(1, eps=0, running_mean=3, running_var=4).eval()
    >>> weight, bias = cbn.fold_linear([[2.0, 4.0]], [5.0], bn)
    >>> weight.tolist(), bias.tolist()
    ([[1.0, 2.0]], [1.0])
    """
    _check_foldable(bn)
    array = _arrays.readable(_arrays.floats("weight", weight, None))
    _check_linear_weight(array.shape, bn.num_features)
    return _folded(array, np.arange(bn.num_features)[:, np.newaxis], bias, bn)


def _folded(
    weight: Array, channels: Array, bias: ArrayLike | None, bn: BatchNorm
) -> tuple[Array, Array]:
    """The new weight and bias; channels, broadcast over weight, are the outputs it is part of."""
    C = bn.num_features
    mean = _statistics.statistic("running_mean", bn.running_mean, C).astype(np.float64)
    var = _statistics.statistic("running_var", bn.running_var, C).astype(np.float64)
    eps = _scalars.non_negative("eps", bn.eps)
    _statistics.usable_variance("bn.running_var", var, eps)
    gamma = _arrays.per_channel_or_none("bn.weight", bn.weight, C)
    beta = _arrays.per_channel_or_none("bn.bias", bn.bias, C)
    old_bias = _arrays.per_channel_or_none("bias", bias, C)

    with np.errstate(all="ignore"):  # the check below has the channels
        scale = (1 if gamma is None else gamma) / np.sqrt(var + eps)
        centred = (0 if old_bias is None else old_bias) - mean
        new_bias = (centred * scale + (0 if beta is None else beta)).astype(weight.dtype)
        new_weight = (weight * scale[channels]).astype(weight.dtype)
    finite = np.isfinite(scale) & np.isfinite(new_bias)
    finite[np.broadcast_to(channels, weight.shape)[~np.isfinite(new_weight)]] = False
    if not finite.all():
        which = _statistics.listed(np.flatnonzero(~finite).tolist())
        raise ValueError(
            f"bn: expected a finite weight and bias of every channel after folding, got NaN, "
            f"infinity or more than the dtype of weight can hold in {which}; "
            f"all arrays must be finite, and the scale and shift of bn within that dtype"
        )
    return new_weight, new_bias


# ---------------------------------------------------------------------------------- the checks


def _check_foldable(bn: BatchNorm) -> None:
    if not issubclass(type(bn), _BATCH_NORMS):
        expected = ", ".join(kind.__name__ for kind in _BATCH_NORMS)
        raise TypeError(f"bn: expected one of {expected}, got {type(bn).__name__}")
    if bn.training:
        raise ValueError(
            "bn: expected a layer in eval mode, whose statistics are constants, got one in "
            "training mode; call bn.eval() first"
        )
    if bn.activation is not None:
        raise ValueError(
            f"bn: expected a layer without an activation, which no weight can take in, got "
            f"activation={bn.activation!r}; set bn.activation to None, and apply it to the output "
            f"of the folded layer: numpy.maximum(y, 0, out=y)"
        )
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "bn: expected a layer with running statistics, got one that normalises by the "
            "statistics of each batch, which no weight can take in"
        )


def _check_conv_weight(shape: Shape, num_features: int) -> None:
    if len(shape) < 3:
        raise ValueError(f"weight: expected shape (out, in / groups, *kernel), got {shape}")
    remedies = []
    if shape[-1] == num_features:
        remedies.append(
            "if it is (*kernel, in, out), as in Keras and Flax, give "
            "numpy.moveaxis(weight, (-1, -2), (0, 1))"
        )
    _check_channels(shape, num_features, remedies)


def _check_linear_weight(shape: Shape, num_features: int) -> None:
    if len(shape) != 2:
        raise ValueError(f"weight: expected shape (out, in), got {shape}")
    remedies = []
    if shape[1] == num_features:
        remedies.append("if it is (in, out), as in Keras and Flax, transpose it: give weight.T")
    if num_features == 1:
        remedies.append(
            f"if its one channel is meant for all outputs, repeat the norm: give one of {shape[0]} "
            f"channels with the arrays of bn repeated"
        )
    _check_channels(shape, num_features, remedies)


def _groups_of(shape: Shape, num_features: int) -> int:
    """The number of groups, which must make all channels and divide the inputs."""
    if len(shape) < 3:
        raise ValueError(f"weight: expected shape (in, out / groups, *kernel), got {shape}")
    groups, left = divmod(num_features, shape[1]) if shape[1] else (0, 0)
    if left or not groups or shape[0] % groups:
        raise ValueError(
            f"weight: expected a number of groups that makes the {num_features} channels of bn of "
            f"{shape[1]} outputs each and divides the {shape[0]} inputs, got none for shape {shape}"
        )
    return groups


def _check_channels(shape: Shape, num_features: int, remedies: list[str]) -> None:
    if shape[0] != num_features:
        expected = f"{num_features} output channel{'s' if num_features > 1 else ''}, as bn has"
        text = f"weight: expected {expected}, got {shape[0]} in shape {shape}"
        raise ValueError("; ".join([text, *remedies]))
