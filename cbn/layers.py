"""BatchNorm1d, BatchNorm2d and BatchNorm3d: parameters, statistics, modes and state.

No arithmetic on data happens here: a layer checks what only it can know (its rank, its number of
channels), decides which statistics to use, and calls :mod:`cbn.functional`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cbn import _checks, functional
from cbn._checks import Array

if TYPE_CHECKING:
    from cbn import _state

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "IncompatibleKeys"]

# What a state holds, in PyTorch's order.
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(state, strict=False)`` passed over, as in PyTorch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _BatchNorm:
    """Batch normalisation over every axis but that of the channels.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    In training ``mean`` and ``var`` are the statistics of the batch, and the running statistics
    learn from them; in eval mode they are the running statistics.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float
        Added to the variance, >= 0.
    momentum : float or None
        Weight of the NEW batch, as in PyTorch: ``running = (1 - momentum) * running + momentum *
        batch``. Keras and ONNX count the other way round, ``running = momentum * running +
        (1 - momentum) * batch``: their 0.9 is 0.1 here. None: the average over all batches.
    affine : bool
        Whether to scale by ``weight`` and shift by ``bias``.
    track_running_stats : bool
        Whether to keep running statistics; without them eval mode uses those of the batch. Can be
        switched on a live layer.
    device : None or "cpu"
        For code that comes from PyTorch.
    dtype : dtype, optional
        Float32 (None) or float64: of the parameters, the statistics and the data.
    bias : bool
        False keeps the scale and drops the shift.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).
    correction : float
        The running variance is divided by n - correction (1: PyTorch; 0: Keras, Flax, ONNX).
    running_mean, running_var : float or array_like of shape (C,), optional
        Statistics to start with instead of 0 and 1.
    nonfinite : {"propagate", "raise", "skip"}
        What training does with a batch that gives a channel a mean or a variance that is NaN,
        infinite, or beyond the dtype of the running statistics: let it into them, as in PyTorch;
        refuse it with a FloatingPointError that names the channels; or leave the running
        statistics of these channels as they were and count the batch.

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
    training : bool
        The mode; set by ``train`` and ``eval``.
    eps, momentum, correction, track_running_stats, nonfinite
        As above.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015). Arguments, modes and state follow
    ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``.
    """

    _layouts: ClassVar[tuple[str, ...]]  # the axes of what it accepts, channels first
    _warned = False  # of a small batch

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
    ) -> None:
        self.num_features = _checks.positive_integer("num_features", num_features)
        self.eps = _checks.non_negative("eps", eps)
        self.momentum = _checks.momentum_or_none(momentum)
        self.affine = _checks.flag("affine", affine)
        _checks.device(device)
        self.dtype = _checks.dtype(dtype)
        self._channel_axis = _checks.channel_axis(channel_axis)
        self._axes = self._axes_of(self.num_features, self._channel_axis)
        self.correction = _checks.non_negative("correction", correction)
        self.nonfinite = _checks.nonfinite(nonfinite)
        self.training = True

        shift = _checks.flag("bias", bias) and self.affine
        self.weight = np.ones(self.num_features, self.dtype) if self.affine else None
        self.bias = np.zeros(self.num_features, self.dtype) if shift else None
        self.weight_grad: Array | None = None
        self.bias_grad: Array | None = None

        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked: Array | None = None
        self.track_running_stats = _checks.flag("track_running_stats", track_running_stats)
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            if value is not None:
                _checks.tracked(name, self.track_running_stats)
                setattr(
                    self,
                    name,
                    _checks.initial_statistic(name, value, self.num_features, self.dtype),
                )

        self._forward: functional.Forward | None = None

    @property
    def track_running_stats(self) -> bool:
        """Whether training updates the running statistics; switching it on makes absent ones."""
        return self._track_running_stats

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        self._track_running_stats = _checks.flag("track_running_stats", value)
        if value and self.running_mean is None:
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = np.array(0)

    @property
    def channel_axis(self) -> int:
        """1: channels first; -1: channels last."""
        return self._channel_axis

    @classmethod
    def _axes_of(cls, num_features: int, channel_axis: int) -> _checks.Axes:
        layouts = cls._layouts
        if channel_axis < 0:
            layouts = tuple(layout.replace("C", "") + "C" for layout in layouts)
        axis_of_rank = {len(layout): layout.index("C") for layout in layouts}
        return _checks.Axes(
            tuple(axis_of_rank.get(rank, -1) for rank in range(max(axis_of_rank) + 1)),
            num_features,
            " or ".join(f"({', '.join(layout)})" for layout in layouts),
        )

    # ------------------------------------------------------------------------------------ passes

    def __call__(self, x: ArrayLike, out: Array | None = None) -> Array:
        """Normalise x.

        Parameters
        ----------
        x : array_like
            Data of the layer's rank and dtype, in any memory layout. Never modified, unless it is
            ``out``.
        out : ndarray, optional
            Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from
            it. One that is not contiguous is written by way of a temporary.

        Returns
        -------
        ndarray
            The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

        Raises
        ------
        TypeError
            If ``x`` or ``out`` is of the wrong element type.
        ValueError
            If a shape is wrong, there are too few values per channel to train on, or ``out`` is
            not writable or overlaps ``x`` in part. A refused call changes nothing.
        FloatingPointError
            In training with ``nonfinite="raise"``.

        Warns
        -----
        SmallBatchWarning
            In training, once per layer, when there are fewer than 4 values per channel. Where a
            filter makes it an error, the batch has been learnt all the same.

        Notes
        -----
        The layer keeps a reference to ``x`` for :meth:`backward`: do not modify it in between.
        """
        if self.training or (self.running_mean is None and self.running_var is None):
            return self._normalise_by_batch(x, out)
        y, self._forward = functional.forward_inference(
            x,
            self._axes,
            self.dtype,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            out,
        )
        return y

    def _normalise_by_batch(self, x: ArrayLike, out: Array | None) -> Array:
        updates = self.training and self._track_running_stats
        if updates and self.num_batches_tracked is None:
            _checks.batch_count(None)
        y, forward = functional.forward_training(
            x,
            self._axes,
            self.dtype,
            self.running_mean if updates else None,
            self.running_var if updates else None,
            self.num_batches_tracked if updates else None,
            self.weight,
            self.bias,
            self.momentum if updates else 0.0,
            self.eps,
            self.correction,
            self.nonfinite if self.training else "propagate",
            out,
        )
        self._forward = forward
        N, _, S = forward[3]
        if 0 < N * S < _checks.SMALL_BATCH and self.training and not self._warned:
            self._warned = True
            _checks.warn_of_small_batch(N * S, forward[1])
        return y

    forward = __call__

    def backward(self, grad_output: ArrayLike, out: Array | None = None) -> Array:
        """Return the gradient of the last forward call with respect to its input.

        Sets ``weight_grad`` and ``bias_grad``. After a call in eval mode the running statistics
        count as constants.

        Parameters
        ----------
        grad_output : array_like
            Gradient of the loss with respect to the output, of its shape and dtype.
        out : ndarray, optional
            Array to write to: ``grad_output`` itself, the input of the forward call (which then
            cannot be differentiated again), or memory apart.

        Returns
        -------
        ndarray
            The gradient with respect to the input; ``out`` if that was given.

        Raises
        ------
        RuntimeError
            If there was no forward call, or its input has been written over.
        TypeError, ValueError
            If ``grad_output`` or ``out`` is of the wrong dtype or shape, or they overlap in part.
        """
        if self._forward is None:
            _checks.no_forward()
        grad_input, weight_grad, bias_grad, overwrote_x = functional.backward(
            self._forward, grad_output, self.weight, out
        )
        if overwrote_x:
            self._forward = (None, *self._forward[1:])
        self.weight_grad = None if self.weight is None else weight_grad
        self.bias_grad = None if self.bias is None else bias_grad
        return grad_input

    # ------------------------------------------------------------------------------------- modes

    def train(self, mode: bool = True) -> Self:
        """Switch to training or eval mode and return the layer.

        Parameters
        ----------
        mode : bool
            True: training; False: eval.
        """
        self.training = _checks.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode and return the layer."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1, after no batch."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Reset the statistics, the weight to 1 and the bias to 0."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0, weight=1, bias=0)

    def _reset(self, **values: int) -> None:
        state = {name: array for name, array in self._state().items() if name in values}
        for name, array in state.items():
            _checks.writable(name, array)
        for name, array in state.items():
            array[...] = values[name]

    # ------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of the parameters and statistics, under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            Those of weight, bias, running_mean, running_var and num_batches_tracked that the
            layer has.

        Examples
        --------
        >>> import cbn
        >>> list(cbn.BatchNorm1d(3, bias=False).state_dict())
        ['weight', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        return {name: np.array(value) for name, value in self._state().items()}

    def load_state_dict(
        self, state: Mapping[str, ArrayLike], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy parameters and statistics into the layer: all of them, or none and an error.

        Parameters
        ----------
        state : mapping of str to array_like
            As ``state_dict`` returns it, here or in PyTorch. Values are cast to the dtype of the
            layer.
        strict : bool
            Whether the keys must be exactly those of the layer. Otherwise what is missing keeps
            its value, and what is unexpected is passed over.

        Returns
        -------
        IncompatibleKeys
            The tuple ``(missing_keys, unexpected_keys)``.

        Raises
        ------
        TypeError
            If ``state`` is not a mapping or a value is not of numbers.
        ValueError
            If a shape differs or, when strict, a key.
        """
        _checks.state_mapping(state)
        current = self._state()
        keys = IncompatibleKeys(
            [key for key in current if key not in state],
            [key for key in state if key not in current],
        )
        if _checks.flag("strict", strict):
            _checks.state_keys(*keys)
        new = {
            key: _checks.state_value(key, state[key], array)
            for key, array in current.items()
            if key in state
        }
        for key, value in new.items():
            current[key][...] = value
        return keys

    def save(self, path: _state.Path) -> None:
        """Write the layer to one .npz file, without pickle: configuration, mode and state.

        The file is written whole or not at all, under the very name given.

        Parameters
        ----------
        path : str or path
            The file; one that exists is replaced.

        Raises
        ------
        TypeError, ValueError
            If an attribute has been given a value that no layer can be made with.
        OSError
            If it cannot be written; what was there stays.

        Examples
        --------
        >>> import tempfile, pathlib, cbn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "norm.npz")
        ...     cbn.BatchNorm2d(3, eps=0.001).eval().save(path)
        ...     bn = cbn.BatchNorm2d.load(path)
        >>> bn.eps, bn.training
        (0.001, False)
        """
        from cbn import _state  # here, because zipfile and json are half of cbn's import time

        config, state = self._config(), self.state_dict()
        _checks.savable(state, self._expected_state(config))
        _state.save(path, config, state)

    @classmethod
    def load(cls, path: _state.Path) -> Self:
        """Return a layer from a file that ``save`` wrote, in the mode it was saved in.

        Parameters
        ----------
        path : str or path
            The file. Nothing in it is trusted: it is read without pickle, and sizes are checked
            before memory is taken.

        Returns
        -------
        layer
            Of this class.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        StateFileError
            If the file is damaged, foreign, or of another class. A kind of ValueError.
        """
        from cbn import _state

        config, state = _state.load(path, cls._expected_state)
        layer = cls._from_config(config, config["num_features"])
        with _state.damage_named(path):  # a counter below 0
            layer.load_state_dict(state)
        return layer

    def _config(self) -> _state.Config:
        return {
            "class": type(self).__name__,
            "num_features": self.num_features,
            "eps": _checks.non_negative("eps", self.eps),
            "momentum": _checks.momentum_or_none(self.momentum),
            "affine": self.weight is not None,
            "track_running_stats": self.track_running_stats,
            "dtype": self.dtype.name,
            "bias": self.bias is not None,
            "channel_axis": self.channel_axis,
            "correction": _checks.non_negative("correction", self.correction),
            "nonfinite": _checks.nonfinite(self.nonfinite),
            "training": _checks.flag("training", self.training),
            # Tracking may have been switched off on a layer that has them.
            "has_running_stats": self.running_mean is not None,
        }

    @classmethod
    def _from_config(cls, config: _state.Config, num_features: int) -> Self:
        names = ("eps", "momentum", "affine", "dtype", "bias", "channel_axis", "correction",
                 "nonfinite")  # fmt: skip
        layer = cls(
            num_features,
            track_running_stats=config["has_running_stats"],
            **{name: config[name] for name in names},
        )
        layer.track_running_stats = config["track_running_stats"]
        return layer.train(config["training"])

    @classmethod
    def _expected_state(cls, config: _state.Config) -> _state.Expected:
        """The arrays in a file with this configuration, by way of a layer of one channel."""
        _checks.same_class(config.get("class"), cls.__name__)
        _checks.config_keys(config, cls(1)._config())
        shape = (_checks.positive_integer("num_features", config["num_features"]),)
        one = cls._from_config(config, 1)
        return {
            name: (array.dtype, shape if array.ndim else ()) for name, array in one._state().items()
        }

    def _state(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all but the last input, which may be large and is not state."""
        return {**self.__dict__, "_forward": None}

    def __repr__(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )
        if self.dtype != np.float32:
            text += f", dtype={self.dtype}"
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        if self.correction != 1:
            text += f", correction={self.correction:g}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite!r}"
        return f"{type(self).__name__}({text})"


Layer = TypeVar("Layer", bound=type[_BatchNorm])


def _documented(cls: Layer) -> Layer:
    """Insert the sections that the layers share before the example of the class."""
    if cls.__doc__ and _BatchNorm.__doc__:  # python -OO has neither
        summary, heading, example = cls.__doc__.partition("    Examples\n")
        shared = _BatchNorm.__doc__.partition("\n\n")[2]
        cls.__doc__ = summary + shared.rstrip() + "\n\n" + heading + example
    return cls


@_documented
class BatchNorm1d(_BatchNorm):
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


@_documented
class BatchNorm2d(_BatchNorm):
    """Batch normalisation of (N, C, H, W) or (C, H, W) data; channels last (N, H, W, C), (H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm2d(3).eval()
    >>> bn(np.ones((2, 3, 4, 4), dtype=np.float32)).shape
    (2, 3, 4, 4)
    """

    _layouts = ("NCHW", "CHW")


@_documented
class BatchNorm3d(_BatchNorm):
    """Batch normalisation of (N, C, D, H, W) or (C, D, H, W) data; channels last (N, D, H, W, C).

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm3d(3, channel_axis=-1)
    >>> bn(np.random.default_rng(0).random((2, 4, 4, 4, 3), dtype=np.float32)).shape
    (2, 4, 4, 4, 3)
    """

    _layouts = ("NCDHW", "CDHW")
