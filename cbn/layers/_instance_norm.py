"""InstanceNorm1d, InstanceNorm2d and InstanceNorm3d."""

from __future__ import annotations

from typing import ClassVar

from numpy.typing import ArrayLike

from cbn import _engine, _norms
from cbn._types import Array
from cbn.layers._channel_norm import ChannelNorm


class _InstanceNorm(ChannelNorm, of_cbn=True):
    """Instance normalisation: every channel of every sample by its own statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    With ``track_running_stats`` eval mode uses running statistics instead, which learn the averages
    over the samples of each training batch.

    Parameters
    ----------
    momentum : float or None
        Weight of the NEW batch in the running statistics. None: the average over all batches
        (PyTorch does not count them here, and learns nothing then).
    track_running_stats : bool
        Whether to keep running statistics for eval mode. Can be switched on a live layer.
    correction : float
        The running variance is divided by n - correction, n the positions of a sample.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization" (2016). Arguments, modes and state
    follow ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d``.
    """

    _later: ClassVar = {**ChannelNorm._later, "nonfinite": "propagate"}
    _averages_samples = True

    def _set_norm(self) -> None:
        batch_rank = max(map(len, self._layouts))
        self._by_channel = _norms.batch(self._axes)
        self._norm = _norms.instance(self._axes, self._channel_axis, batch_rank)

    def __call__(
        self, x: ArrayLike, out: Array | None = None, *, residual: ArrayLike | None = None
    ) -> Array:
        """Normalise x; arguments, errors and notes are those of :meth:`BatchNorm2d.__call__`."""
        if not self.frozen and (self.training or not self._track_running_stats):
            return self._normalise_by_own(x, out, residual)
        y, self._forward = _engine.forward_given(
            x, self._by_channel, self.dtype, self.running_mean, self.running_var, self.weight,
            self.bias, self.eps, out, True, self.activation, residual,
        )  # fmt: skip
        return y

    _normalise = __call__


class InstanceNorm1d(_InstanceNorm, of_cbn=True):
    """Instance normalisation of (N, C, L) or (C, L) data; channels last (N, L, C) or (L, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.InstanceNorm1d(2)
    >>> norm(np.array([[[1, 1, 3, 3], [10, 10, 30, 30]]], dtype=np.float32)).round(3)
    array([[[-1., -1.,  1.,  1.],
            [-1., -1.,  1.,  1.]]], dtype=float32)
    """

    _layouts = ("NCL", "CL")


class InstanceNorm2d(_InstanceNorm, of_cbn=True):
    """Instance normalisation of (N, C, H, W) or (C, H, W); channels last (N, H, W, C), (H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.InstanceNorm2d(3)
    >>> norm(np.ones((2, 3, 4, 4), dtype=np.float32)).shape
    (2, 3, 4, 4)
    """

    _layouts = ("NCHW", "CHW")


class InstanceNorm3d(_InstanceNorm, of_cbn=True):
    """Instance normalisation of (N, C, D, H, W) or (C, D, H, W); channels last (N, D, H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.InstanceNorm3d(3, channel_axis=-1)
    >>> norm(np.ones((2, 4, 4, 4, 3), dtype=np.float32)).shape
    (2, 4, 4, 4, 3)
    """

    _layouts = ("NCDHW", "CDHW")
