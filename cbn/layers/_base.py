"""What every norm layer has: modes, state, and the gradients of its last call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cbn import _engine, _scalars, _schema
from cbn._arrays import writable
from cbn._docstrings import documented_by
from cbn._state_dict import IncompatibleKeys, load_arrays
from cbn._types import Array, Config, Expected, Gradient, Shape, Target

if TYPE_CHECKING:
    from cbn._core import Norm, Saved

# What a state holds, in PyTorch's order.
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What a layer's attributes of these names must be; they may have been changed since it was made.
OF_ATTRIBUTES: dict[str, Callable[[str, Any], Any]] = {
    "eps": _scalars.non_negative,
    "momentum": lambda name, value: _scalars.momentum_or_none(value),
    "correction": _scalars.non_negative,
    "nonfinite": lambda name, value: _scalars.nonfinite(value),
    "activation": lambda name, value: _scalars.activation(value),
}
# Attributes that a repr shows where they are not as usual, and how.
UNUSUAL: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "dtype": (np.float32, np.dtype),
    "channel_axis": (1, str),
    "correction": (1, "{:g}".format),
    "frozen": (False, str),
    "nonfinite": ("propagate", repr),
    "activation": (None, repr),
}


class _Forward:
    """The method ``forward`` of cbn's layers: a layer may be given another."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, layer: NormLayer | None, owner: type | None = None) -> Callable[..., Array]:
        if layer is None:
            return self._function
        given: Callable[..., Array] | None = vars(layer).get(GIVEN_FORWARD)
        return MethodType(self._function, layer) if given is None else given

    def __set__(self, layer: NormLayer, function: Callable[..., Array]) -> None:
        vars(layer)[GIVEN_FORWARD] = function
        type(layer)._call_by_forward()

    def __delete__(self, layer: NormLayer) -> None:
        del vars(layer)[GIVEN_FORWARD]


GIVEN_FORWARD = "_given_forward"


class NormLayer(ABC):
    """A layer that normalises: the base of all of cbn, for those who look for them.

    Parameters
    ----------
    eps : float
        Added to the variance, >= 0.
    affine : bool
        Whether to scale by ``weight`` and shift by ``bias``.
    device : None or "cpu"
        For code that comes from PyTorch.
    dtype : dtype, optional
        Float32 (None) or float64: of the layer's arrays, and of the data. A layer of float32 also
        takes data of float16 and bfloat16.
    bias : bool
        False keeps the scale and drops the shift.
    channel_axis : {1, -1}
        Channels first (N, C, ...) or last (N, ..., C).

    Attributes
    ----------
    weight, bias : ndarray of shape (C,) or normalized_shape, or None
        Parameters. Edits in place take effect at the next call.
    weight_grad, bias_grad : ndarray of the same shape, or None
        Gradients of the last ``backward``.
    training : bool
        The mode, which changes nothing without running statistics.
    eps
        As above.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.
    """

    dtype: np.dtype[Any]
    eps: float
    training: bool
    frozen = False  # whether running statistics are used and kept in training too
    weight: Array | None
    bias: Array | None
    running_mean: Array | None = None
    running_var: Array | None = None
    num_batches_tracked: Array | None = None
    weight_grad: Array | None
    bias_grad: Array | None
    residual_grad: Array | None = None
    _forward: Saved | None  # what the last call kept for backward; None: there was none
    _norm: Norm  # its row of the table

    def _set_up(
        self, shape: Shape, affine: bool, bias: bool, device: str | None, dtype: DTypeLike | None
    ) -> None:
        """What every constructor ends in; shape is that of the parameters."""
        _scalars.device(device)
        self.dtype = _scalars.dtype(dtype)
        self.training = True
        shifts = _scalars.flag("bias", bias) and affine
        self.weight = np.ones(shape, self.dtype) if affine else None
        self.bias = np.zeros(shape, self.dtype) if shifts else None
        self.weight_grad = self.bias_grad = None
        self._forward = None
        self._set_norm()

    # ------------------------------------------------------------------------------------ passes

    # Every norm has a __call__ that computes, which saves a small call the way through forward. A
    # class with another forward, its own or one set on a layer, is called by way of it instead.

    def __call__(self, *arguments: Any, **named: Any) -> Array:
        """Normalise x: call ``forward``, with the arguments that it has."""
        forward: Callable[..., Array] = self.forward
        if getattr(forward, "__func__", None) is type(self).__call__:  # that is: forward = __call__
            forward = self._normalise
        return forward(*arguments, **named)

    if TYPE_CHECKING:  # what is overridden may take less than all

        def forward(self, x: ArrayLike, out: Array | None = None) -> Array:
            raise NotImplementedError

    else:

        @_Forward
        def forward(self, x, out=None, **named):
            """Normalise x, as a call of the layer does.

            To be overridden, as in PyTorch: by a subclass, which reaches this one by
            ``super().forward(x, out)``, or by a function set on a layer.
            """
            return self._normalise(x, out, **named)

    def _normalise(self, x: ArrayLike, out: Array | None = None) -> Array:
        """Normalise x; arguments, errors and notes are those of :meth:`BatchNorm2d.__call__`."""
        # The __call__ of every norm without running statistics; the others have one of their own.
        y, self._forward = _engine.forward(
            x, self._norm, self.dtype, self.weight, self.bias, self.eps, out
        )
        return y

    def __init_subclass__(cls, of_cbn: bool = False, **arguments: Any) -> None:
        """Let calls reach a ``forward`` of its own; of_cbn is said by the classes of cbn alone."""
        super().__init_subclass__(**arguments)
        if of_cbn:
            cls._class_of_cbn = cls
            assert cls.__base__ is not None
            documented_by(cls.__base__)(cls)
        if cls.forward not in (NormLayer.forward, cls.__call__):
            cls._call_by_forward()

    @classmethod
    def _call_by_forward(cls) -> None:
        by_forward = NormLayer.__call__
        calls = [vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)]
        others = [call for call in calls if call not in (by_forward, cls._normalise)]
        cls.__call__ = others[0] if others else by_forward  # type: ignore[method-assign]
        if others:  # whose super().__call__ may be that of the norm
            norm = next(base for base in cls.__mro__ if "_normalise" in vars(base))
            norm.__call__ = by_forward  # type: ignore[method-assign]

    def backward(
        self, grad_output: ArrayLike, out: Array | None = None, *, wanted: str = "all"
    ) -> Gradient:
        """Return the gradient of the last forward call with respect to its input.

        Sets ``weight_grad``, ``bias_grad`` and ``residual_grad``. Running statistics that the call
        has normalised by count as constants.

        Parameters
        ----------
        grad_output : array_like
            Gradient of the loss with respect to the output, of its shape and dtype.
        out : ndarray, optional
            Array to write to: ``grad_output`` itself, the input of the forward call (which then
            cannot be differentiated again), or memory apart.
        wanted : {"all", "input", "parameters"}
            Which gradients to compute, that of a residual with that of the input; what is not
            wanted becomes None. A frozen layer that only passes gradients on takes "input", the
            first layer of a network "parameters".

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
            raise RuntimeError(
                "backward: expected a forward call before it, got none on this layer"
            )
        if wanted == "all" and self.weight is None and self.bias is None:
            wanted = "input"
        grad_input, weight_grad, bias_grad, self.residual_grad = _engine.backward(
            self._forward, grad_output, self.weight, out, wanted
        )
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
        self.training = _scalars.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode and return the layer."""
        return self.train(False)

    def reset_parameters(self) -> None:
        """Reset the weight to 1, the bias to 0, and the statistics where there are any."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0, weight=1, bias=0)

    def _reset(self, **values: int) -> None:
        state = {name: array for name, array in self._state().items() if name in values}
        for name, array in state.items():
            writable(name, array)
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
            As ``state_dict`` returns it, here or in PyTorch. Real numbers of any type are
            cast to the dtype of the layer. A variance that nothing can be normalised by
            (``running_var + eps`` is not above 0) loads; a call that would normalise by it is
            refused.
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
            If ``state`` is not a mapping or a value is not of real numbers, or masked.
        ValueError
            If a shape differs or, when strict, a key, or a value is beyond the dtype of the layer.
        """
        return load_arrays(self._state(), state, strict, "layer")

    def save(self, path: Target) -> None:
        """Write the layer to one .npz file, without pickle: configuration, mode and state.

        The file is written whole or not at all, under the very name given.

        Parameters
        ----------
        path : str, path or open binary file
            The file; one that exists is replaced. An open file is written to where it is.

        Raises
        ------
        TypeError, ValueError
            If an attribute has been given a value that no layer can be made with, or the layer is
            of a class with another constructor than that of cbn: use :func:`cbn.save` then.
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
        from cbn import _state_files  # here, because zipfile and json are half of cbn's import time

        _check_restorable(type(self), self._class_of_cbn)
        config, state = self._config(), self.state_dict()
        _schema.savable(state, self._expected_state(config))
        _state_files.save(path, config, state)

    @classmethod
    def load(cls, path: Target) -> Self:
        """Return a layer from a file that ``save`` wrote, in the mode it was saved in.

        Parameters
        ----------
        path : str, path or open binary file
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
        TypeError
            If this class has another constructor than that of cbn.
        """
        from cbn import _state_files  # here, as in save()

        _check_restorable(cls, cls._class_of_cbn)
        config, state = _state_files.load(path, cls._expected_state)
        layer = cls._from_config(config)
        with _state_files.damage_named(path):  # a counter below 0
            layer.load_state_dict(state)
        return layer

    _class_of_cbn: ClassVar[type[NormLayer]]  # that it is or is derived from
    _saved: ClassVar[tuple[str, ...]]  # the arguments that a state file keeps
    _smallest: ClassVar[dict[str, Any]]  # those that make the smallest layer
    _later: ClassVar[dict[str, Any]] = {}  # what older files do not tell, because nothing else was

    def _config(self) -> Config:
        """What a state file says of the layer, beside its arrays."""
        config = {name: getattr(self, name) for name in self._saved}
        for name, check in OF_ATTRIBUTES.items():
            if name in config:
                config[name] = check(name, config[name])
        for name in ("affine", "elementwise_affine"):
            if name in config:
                config[name] = self.weight is not None
        if "bias" in config:
            config["bias"] = self.bias is not None
        config["dtype"] = _scalars.dtype(self.dtype).name
        config["class"] = type(self).__name__
        config["training"] = _scalars.flag("training", self.training)
        return config

    @classmethod
    def _from_config(cls, config: Config) -> Self:
        """A new layer with such a configuration, in its mode."""
        config = cls._later | config
        layer = cls(**{name: config[name] for name in cls._saved})
        return layer.train(config["training"])

    @classmethod
    def _parameter_shape_of(cls, config: Config) -> Shape:
        """That of the weight of a layer with such a configuration."""
        return (_scalars.positive_integer("num_features", config["num_features"]),)

    @classmethod
    def _expected_state(cls, config: Config) -> Expected:
        """The arrays in a file with this configuration, by way of the smallest such layer.

        No memory is taken for what a file only promises.
        """
        _schema.same_class(config.get("class"), cls.__name__)
        _schema.config_keys(cls._later | config, cls(**cls._smallest)._config())
        shape = cls._parameter_shape_of(config)
        for name, check in OF_ATTRIBUTES.items():
            if name in config:
                check(name, config[name])
        small = cls._from_config(config | cls._smallest)
        return {
            name: (array.dtype, shape if name != "num_batches_tracked" else ())
            for name, array in small._state().items()
        }

    def _state(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}

    @abstractmethod
    def _set_norm(self) -> None:
        """Set ``_norm``, which holds functions that cannot be pickled."""

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all but what may be as large as the last input and is not state."""
        state = {**self.__dict__, "_forward": None}
        state.pop("residual_grad", None)
        del state["_norm"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other half of it."""
        self.__dict__.update(state)
        self._set_norm()
        if GIVEN_FORWARD in state:
            self._call_by_forward()

    _required: ClassVar[tuple[str, ...]]  # arguments that a repr shows by value alone
    _shown: ClassVar[tuple[str, ...]]  # those that it shows by name

    def __repr__(self) -> str:
        """The layer as a call with its arguments."""
        shown = {name: getattr(self, name) for name in self._shown}
        if "bias" in shown:
            shown["bias"] = self.bias is not None
        for name, (usual, text) in UNUSUAL.items():
            if (value := getattr(self, name, usual)) != usual:
                shown[name] = text(value)
        arguments = [str(getattr(self, name)) for name in self._required]
        arguments += [f"{name}={value}" for name, value in shown.items()]
        return f"{type(self).__name__}({', '.join(arguments)})"


NormLayer._class_of_cbn = NormLayer  # type: ignore[type-abstract]


def _check_restorable(cls: type, norm: type) -> None:
    """Whether a class derived from a norm is made with the arguments that its files keep."""
    ours = signature(norm)
    for base in cls.__mro__[: cls.__mro__.index(norm)]:
        if "__init__" not in vars(base):
            continue
        theirs = signature(vars(base)["__init__"])
        any_number = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
        named = [p.name for p in theirs.parameters.values() if p.kind not in any_number][1:]
        try:
            theirs.bind(None, **dict.fromkeys(ours.parameters))
            fits = set(named) <= ours.parameters.keys()
        except TypeError:
            fits = False
        if not fits:
            raise TypeError(
                f"class: expected one made with the arguments of {norm.__name__}, which a file "
                f"keeps, got {base.__name__}{theirs}; use cbn.save(layer, path), and "
                "cbn.load(layer, path) on a layer that the program has made"
            )
