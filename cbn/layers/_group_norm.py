"""GroupNorm."""

from __future__ import annotations

from typing import Any, ClassVar

from numpy.typing import ArrayLike, DTypeLike

from cbn import _engine, _norms, _scalars
from cbn._types import Array, Config, Shape
from cbn.layers._base import NormLayer


class GroupNorm(NormLayer, of_cbn=True):
    """Group normalisation of (N, C, ...) data: every group of channels of every sample.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance of
    num_channels / num_groups channels at all positions of one sample, in training and in eval mode.

    Of a group of one value, as of GroupNorm(C, C) on (N, C), the output is the bias:
    :func:`cbn.functional.group_norm` tells why.

    Parameters
    ----------
    num_groups : int
        A divisor of ``num_channels``.
    num_channels : int
        Number of channels C.
    activation : {None, "relu"}
        What a call takes of its output in the same pass: ``max(y, 0)``, where a NaN stays one.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,) or None
        Parameters. Edits in place take effect at the next call.
    weight_grad, bias_grad : ndarray of shape (C,) or None
        Gradients of the last ``backward``.
    residual_grad : ndarray of the shape of the data, or None
        That of the residual of the call before it.
    training : bool
        The mode, which changes nothing here.
    eps, activation
        As above.

    References
    ----------
    Wu and He, "Group Normalization" (2018). Arguments and state follow ``torch.nn.GroupNorm``.

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.GroupNorm(2, 4)
    >>> norm(np.array([[1, 3, 10, 30]], dtype=np.float32)).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    _saved = (
        "num_groups",
        "num_channels",
        "eps",
        "affine",
        "channel_axis",
        "dtype",
        "bias",
        "activation",
    )
    _later: ClassVar[dict[str, Any]] = {"activation": None}
    activation: str | None = None  # of older pickles
    _smallest: ClassVar[dict[str, Any]] = {"num_groups": 1, "num_channels": 1}
    _required = ("num_groups", "num_channels")
    _shown = ("eps", "affine", "bias")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
    ) -> None:
        self._num_groups = _scalars.positive_integer("num_groups", num_groups)
        self._num_channels = _scalars.positive_integer("num_channels", num_channels)
        _norms.check_group_count(num_groups, num_channels)
        self.eps = _scalars.non_negative("eps", eps)
        self.affine = _scalars.flag("affine", affine)
        self._channel_axis = _scalars.channel_axis(channel_axis)
        self.activation = _scalars.activation(activation)
        self._set_up((self._num_channels,), self.affine, bias, device, dtype)

    def _set_norm(self) -> None:
        self._norm = _norms.group(self._num_groups, self._channel_axis, self._num_channels)

    @property
    def num_groups(self) -> int:
        """Number of groups that the channels are in."""
        return self._num_groups

    @property
    def num_channels(self) -> int:
        """Number of channels C."""
        return self._num_channels

    @property
    def channel_axis(self) -> int:
        """1: channels first; -1: channels last."""
        return self._channel_axis

    def __call__(
        self, x: ArrayLike, out: Array | None = None, *, residual: ArrayLike | None = None
    ) -> Array:
        """Normalise x; arguments, errors and notes are those of :meth:`BatchNorm2d.__call__`."""
        y, self._forward = _engine.forward(
            x, self._norm, self.dtype, self.weight, self.bias, self.eps, out,
            activation=self.activation, residual=residual,
        )  # fmt: skip
        return y

    _normalise = __call__

    @classmethod
    def _parameter_shape_of(cls, config: Config) -> Shape:
        groups = _scalars.positive_integer("num_groups", config["num_groups"])
        channels = _scalars.positive_integer("num_channels", config["num_channels"])
        _norms.check_group_count(groups, channels)
        return (channels,)
