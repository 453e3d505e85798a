"""BatchNorm1d, BatchNorm2d and BatchNorm3d.

A layer decides which statistics to use, and calls the engine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cbn import _arrays, _engine, _norms, _statistics
from cbn._types import Array
from cbn.layers._channel_norm import ChannelNorm


class _BatchNorm(ChannelNorm, of_cbn=True):
    """Batch normalisation over every axis but that of the channels.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    In training ``mean`` and ``var`` are the statistics of the batch, and the running statistics
    learn from them; in eval mode they are the running statistics.

    Parameters
    ----------
    momentum : float or None
        Weight of the NEW batch, as in PyTorch: ``running = (1 - momentum) * running + momentum *
        batch``. Keras and ONNX count the other way round, ``running = momentum * running +
        (1 - momentum) * batch``: their 0.9 is 0.1 here. None: the average over all batches.
    track_running_stats : bool
        Whether to keep running statistics; without them eval mode uses those of the batch. Can be
        switched on a live layer.
    correction : float
        The running variance is divided by n - correction (1: PyTorch; 0: Keras, Flax, ONNX).
    running_mean, running_var : float or array_like of shape (C,), optional
        Statistics to start with instead of 0 and 1; ``running_var + eps`` must be above 0.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015). Arguments, modes and state follow
    ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        correction: float = 1,
        running_mean: ArrayLike | None = None,
        running_var: ArrayLike | None = None,
        nonfinite: str = "propagate",
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, channel_axis=channel_axis, correction=correction, nonfinite=nonfinite,
            activation=activation,
        )  # fmt: skip
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            if value is not None:
                setattr(self, name, self._initial(name, value))

    def _initial(self, name: str, value: ArrayLike) -> Array:
        """The statistic to start with, from a scalar or one value per channel."""
        if not self.track_running_stats:
            raise ValueError(
                f"{name}: expected None with track_running_stats=False, got a value that nothing "
                f"would use"
            )
        C = self.num_features
        array = _arrays.floats(name, value, self.dtype)
        if array.shape not in ((), (C,)):
            raise ValueError(f"{name}: expected a scalar or shape ({C},), got shape {array.shape}")
        initial = np.full(C, array, dtype=self.dtype)
        if name == "running_var":
            _statistics.usable_variance(name, initial, self.eps, nan=False)
        return initial

    def _set_norm(self) -> None:
        self._norm = self._by_channel = _norms.batch(self._axes)

    # ------------------------------------------------------------------------------------ passes

    def __call__(
        self, x: ArrayLike, out: Array | None = None, *, residual: ArrayLike | None = None
    ) -> Array:
        """Normalise x.

        ``y = activation(norm(x) + residual)``, in one pass, with the bits of one step after the
        other.

        Parameters
        ----------
        x : array_like
            Data of the layer's rank and dtype, in any memory layout. Never modified, unless it is
            ``out``.
        out : ndarray, optional
            Array of the shape and dtype of ``x`` to write to: ``x`` or ``residual`` itself or
            memory apart from them. One that is not contiguous, or not in the order of ``x``, is
            written by way of a temporary.
        residual : array_like, shape and dtype of x, optional
            What is added to the output before the activation. ``backward`` leaves its gradient in
            ``residual_grad``.

        Returns
        -------
        ndarray
            The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

        Raises
        ------
        TypeError
            If ``x``, ``out`` or ``residual`` is of the wrong element type.
        ValueError
            If a shape is wrong, there are too few values per channel to train on,
            ``running_var + eps`` is not above 0 where it is to normalise by, or ``out`` is not
            writable or overlaps ``x`` in part. A refused call changes nothing.
        FloatingPointError
            In training with ``nonfinite="raise"``.

        Warns
        -----
        SmallBatchWarning
            In training, once per layer, when there are fewer than 4 values per channel. Where a
            filter makes it an error, the call is refused.

        Notes
        -----
        The layer keeps a reference to ``x`` for :meth:`backward`: do not modify it in between.
        """
        by_batch = self.training and not self.frozen
        if by_batch or (self.running_mean is None and self.running_var is None):
            return self._normalise_by_own(x, out, residual)
        y, self._forward = _engine.forward_given(
            x, self._by_channel, self.dtype, self.running_mean, self.running_var, self.weight,
            self.bias, self.eps, out, True, self.activation, residual,
        )  # fmt: skip
        return y

    _normalise = __call__


class BatchNorm1d(_BatchNorm, of_cbn=True):
    """Batch normalisation of (N, C) or (N, C, L) data; channels last (N, C) or (N, L, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm1d(2)
    >>> bn(np.array([[1, 10], [2, 20], [3, 30], [4, 40]], dtype=np.float32)).round(3)
    array([[-1.342, -1.342],
           [-0.447, -0.447],
           [ 0.447,  0.447],
           [ 1.342,  1.342]], dtype=float32)
    >>> bn.running_mean
    array([0.25, 2.5 ], dtype=float32)
    """

    _layouts = ("NC", "NCL")


class BatchNorm2d(_BatchNorm, of_cbn=True):
    """Batch normalisation of (N, C, H, W) or (C, H, W) data; channels last (N, H, W, C), (H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm2d(3).eval()
    >>> bn(np.ones((2, 3, 4, 4), dtype=np.float32)).shape
    (2, 3, 4, 4)
    """

    _layouts = ("NCHW", "CHW")


class BatchNorm3d(_BatchNorm, of_cbn=True):
    """Batch normalisation of (N, C, D, H, W) or (C, D, H, W) data; channels last (N, D, H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm3d(3, channel_axis=-1)
    >>> bn(np.random.default_rng(0).random((2, 4, 4, 4, 3), dtype=np.float32)).shape
    (2, 4, 4, 4, 3)
    """

    _layouts = ("NCDHW", "CDHW")
