"""What batch and instance norm share: channels, their parameters and running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cbn import _engine, _scalars, _statistics
from cbn._types import Array, Axes, Config
from cbn.exceptions import warn_caller
from cbn.layers._base import NormLayer

if TYPE_CHECKING:
    from cbn._core import Norm, Saved


class ChannelNorm(NormLayer, of_cbn=True):
    """A layer with a weight, a bias and running statistics for each channel.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    nonfinite : {"propagate", "raise", "skip"}
        What training does with a batch that gives a channel, in instance norm of any sample, a mean
        or a variance that is NaN, infinite, or, when it is learnt, beyond the dtype of the running
        statistics: let it into them, as in PyTorch; refuse it with a FloatingPointError that names
        the channels; or leave the running statistics of these channels as they were and count the
        batch.
    activation : {None, "relu"}
        What a call takes of its output in the same pass: ``max(y, 0)``, where a NaN stays one.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,) or None
        Parameters. Edits in place take effect at the next call, as with the statistics.
    running_mean, running_var : ndarray of shape (C,) or None
        Running statistics.
    num_batches_tracked : ndarray of int64, shape (), or None
        Number of batches they have seen.
    weight_grad, bias_grad : ndarray of shape (C,) or None
        Gradients of the last ``backward``.
    residual_grad : ndarray of the shape of the data, or None
        That of the residual of the call before it.
    training : bool
        The mode; set by ``train`` and ``eval``.
    frozen : bool
        Whether training, too, uses the running statistics and keeps them; set by
        :func:`cbn.freeze` and :func:`cbn.unfreeze`.
    eps, momentum, correction, track_running_stats, nonfinite, activation
        As above.

    Warns
    -----
    UserWarning
        If ``momentum`` is outside 0 to 1.
    """

    _layouts: ClassVar[tuple[str, ...]]  # the axes of what it accepts, channels first
    _saved: ClassVar[tuple[str, ...]] = (
        "num_features",
        "eps",
        "momentum",
        "affine",
        "channel_axis",
        "correction",
        "track_running_stats",
        "dtype",
        "bias",
        "nonfinite",
        "activation",
    )
    _later: ClassVar[dict[str, Any]] = {"activation": None}
    _smallest: ClassVar[dict[str, Any]] = {"num_features": 1, "momentum": None}
    _required = ("num_features",)
    _shown = ("eps", "momentum", "affine", "bias", "track_running_stats")
    nonfinite = "propagate"  # of pickles that are older than this attribute, as the next
    activation: str | None = None
    _warned = False  # of a small batch
    _averages_samples: ClassVar[bool] = False  # whether that is what the running statistics learn
    _by_channel: Norm  # that by given statistics

    # The defaults are those of instance norm; batch norm has its own.
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        correction: float = 1,
        nonfinite: str = "propagate",
        activation: str | None = None,
    ) -> None:
        self._num_features = _scalars.positive_integer("num_features", num_features)
        self.eps = _scalars.non_negative("eps", eps)
        self.momentum = _scalars.momentum_or_none(momentum)
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            # PyTorch takes any number without a word; the average leaves the range of the data.
            warn_caller(
                f"momentum: expected a number from 0 to 1, the weight of the new batch, got "
                f"{self.momentum:g}; momentum=0.1 is what Keras and ONNX call 0.9",
                UserWarning,
            )
        self.affine = _scalars.flag("affine", affine)
        self._channel_axis = _scalars.channel_axis(channel_axis)
        self._axes = self._axes_of(self._num_features, self._channel_axis)
        self.correction = _scalars.non_negative("correction", correction)
        self.nonfinite = _scalars.nonfinite(nonfinite)
        self.activation = _scalars.activation(activation)
        self.frozen = False
        self._set_up((self._num_features,), self.affine, bias, device, dtype)
        self.track_running_stats = _scalars.flag("track_running_stats", track_running_stats)
        # Who gets the statistics of each batch in training, in place of the running statistics.
        self._observer: Callable[[Saved], None] | None = None

    @property
    def num_features(self) -> int:
        """Number of channels C."""
        return self._num_features

    @property
    def track_running_stats(self) -> bool:
        """Whether training updates the running statistics; switching it on makes absent ones."""
        return self._track_running_stats

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        self._track_running_stats = _scalars.flag("track_running_stats", value)
        if value and self.running_mean is None:
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = np.array(0)

    @property
    def channel_axis(self) -> int:
        """1: channels first; -1: channels last."""
        return self._channel_axis

    @classmethod
    def _axes_of(cls, num_features: int, channel_axis: int) -> Axes:
        layouts = cls._layouts
        if channel_axis < 0:
            layouts = tuple(layout.replace("C", "") + "C" for layout in layouts)
        axis_of_rank = {len(layout): layout.index("C") for layout in layouts}
        return Axes(
            tuple(axis_of_rank.get(rank, -1) for rank in range(max(axis_of_rank) + 1)),
            num_features,
            " or ".join(f"({', '.join(layout)})" for layout in layouts),
        )

    # ------------------------------------------------------------------------------------ passes

    def _normalise_by_own(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> Array:
        """Normalise by the statistics of x; in training the running statistics learn them."""
        observer = self._observer
        updates = (
            self.training and not self.frozen and observer is None and self._track_running_stats
        )
        if updates and self.num_batches_tracked is None:
            _statistics.batch_count(None)
        warns = self.training and observer is None and not self._warned
        least = _statistics.SMALL_BATCH if warns else 2
        if observer is not None and not self._averages_samples:
            least = 1  # it merges the statistics of all batches
        y, saved = _engine.forward(
            x, self._norm, self.dtype, self.weight, self.bias, self.eps, out, least,
            self.running_mean if updates else None,
            self.running_var if updates else None,
            self.num_batches_tracked if updates else None,
            self.momentum if updates else 0.0,
            self.correction,
            self.nonfinite if self.training else "propagate",
            True, self.activation, residual,
        )  # fmt: skip
        self._forward = saved
        if warns and 0 < saved.view.values < _statistics.SMALL_BATCH:
            self._warned = True
        if observer is not None:
            observer(saved)
        return y

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1, after no batch."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0)

    def _config(self) -> Config:
        # Tracking may have been switched off on a layer that has statistics.
        return {
            **super()._config(),
            "has_running_stats": self.running_mean is not None,
            "frozen": _scalars.flag("frozen", self.frozen),
        }

    @classmethod
    def _from_config(cls, config: Config) -> Self:
        has, tracks = config["has_running_stats"], config["track_running_stats"]
        layer = super()._from_config(config | {"track_running_stats": has})
        layer.track_running_stats = tracks
        layer.frozen = _scalars.flag("frozen", config["frozen"])
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: not who looks on either."""
        state = {**super().__getstate__(), "_observer": None}
        del state["_by_channel"]
        return state
