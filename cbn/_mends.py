"""What is done about an argument that breaks a rule of a call.

src/calls.pxi holds every argument against its rule, and names the first that is broken. A method of
this name replaces the argument by one that keeps the rule, finds out what the rule leaves open
(whether two arrays that reach into each other share an element), or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from cbn import _arrays, _scalars, _statistics
from cbn._dispatch import kernels
from cbn._types import Array, Shape


def mended(function: Callable[..., Any], given: tuple[Any, ...], amiss: str | list[int]) -> Any:
    """Make a call of cbn._core once more, as often as it takes, and return what was asked for."""
    return _Call(function, given).complete(amiss)


@cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Those of its arguments."""
    return tuple(signature(function).parameters)


class _Call:
    """A call that is not ordinary: its function, and its arguments by name."""

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self._function = function
        self._given = SimpleNamespace(**dict(zip(_names(function), given, strict=False)))
        self._returned: Array | None = None  # an out of a class of its own, or turned
        self._turned = False  # whether all arrays of the input's shape are transposes

    def complete(self, amiss: str | list[int]) -> Any:
        """Mend what is amiss, and what comes to light then."""
        before, result = None, amiss
        while isinstance(result, (str, list)):
            if result == before:
                raise RuntimeError(f"cbn: expected {result} to be mended, got it a second time")
            if isinstance(result, list):
                _statistics.finite_statistics(result)
            else:
                rule, _, name = result.partition(":")
                getattr(self, rule)(name)
            before, result = result, self._function(**vars(self._given))
        if self._turned and isinstance(result, tuple):  # but for what is of a channel each
            result = tuple(item.T if isinstance(item, np.ndarray) else item for item in result)
        return result if self._returned is None else (self._returned, *result[1:])

    # ------------------------------------------------------------------------------------ input

    def data(self, name: str) -> None:
        given, of_layer = self._given, name == "x"
        dtype = getattr(given, "dtype", None) if of_layer else given.saved.dtype
        array = _arrays.array(name, getattr(given, name), dtype, of_layer)
        norm = given.norm if of_layer else None
        if norm is None:
            self._turned = given.saved.view.turned
        elif norm.turned is not None and array.ndim == 2 and not array.flags.c_contiguous:
            self._turned = kernels.is_plain(array.T)
        array = self._turn(array)
        given.data = _arrays.data(name, array, dtype, of_layer)
        setattr(given, name, array)
        if self._turned:
            if norm is not None:
                given.norm = norm.turned
            self._turn_others()

    def _turn(self, array: Array) -> Array:
        """An array of the caller as the call has it, or the other way round."""
        return array.T if self._turned else array

    def _turn_others(self) -> None:
        """Read the other arrays of the input's shape, and let them be transposes too."""
        given = self._given
        if getattr(given, "given_x", None) is not None:
            given.given_x = given.given_x.T
        if getattr(given, "residual", None) is not None:
            given.residual = _arrays.array("residual", given.residual, given.data.dtype).T
        if getattr(given, "out", None) is not None:
            self.out()
            given.out = given.out.T

    def enough_values(self, _: str) -> None:
        given, view = self._given, self._view()
        correction = 0.0 if given.running_mean is None else given.correction
        _statistics.enough_values(self._shape(), view.values, correction, view.of_samples)

    def few_values(self, _: str) -> None:
        view = self._view()
        _statistics.warn_of_few_values(view.values, self._shape(), view.of_samples)
        self._given.least = 1  # it has been said

    def _data(self) -> Array:
        """The input as a kernel can read it."""
        given = self._given
        data = getattr(given, "data", None)
        if data is None:
            data = given.x if hasattr(given, "x") else given.grad_output
        array: Array = data
        return array

    def _shape(self, array: Any = None) -> Shape:
        """That of the input, or of another array, as the caller has it."""
        shape: Shape = (self._data() if array is None else array).shape
        return shape[::-1] if self._turned else shape

    def _view(self) -> Any:
        given = self._given
        return given.saved.view if hasattr(given, "saved") else given.norm.view(self._data().shape)

    # ------------------------------------------------------------------- parameters, statistics

    def parameter(self, name: str) -> None:
        given, view = self._given, self._view()
        value = getattr(given, name)
        array = _arrays.parameter(name, value, view.parameter_shape, not view.of_samples)
        setattr(given, name, array)

    def statistic(self, name: str) -> None:
        given = self._given
        setattr(given, name, _statistics.statistic(name, getattr(given, name), self._view().C))

    def running_statistic(self, name: str) -> None:
        given = self._given
        value, C = getattr(given, name), self._view().parameter_shape[0]
        setattr(given, name, _statistics.running_statistic(name, value, C))

    def usable(self, name: str) -> None:
        _statistics.usable_variance(name, getattr(self._given, name), self._given.eps)

    def both_or_none(self, _: str) -> NoReturn:
        there, missing = "running_mean", "running_var"
        if self._given.running_mean is None:
            there, missing = missing, there
        raise ValueError(
            f"running_mean and running_var: expected both or neither, got {there} without {missing}"
        )

    def apart(self, names: str) -> NoReturn:
        raise ValueError(f"{names}: expected memory of their own, got an overlap")

    def count(self, _: str) -> None:
        _statistics.batch_count(self._given.num_batches_tracked)

    def read_only(self, name: str) -> NoReturn:
        shape = getattr(self._given, name).shape
        raise ValueError(
            f"{name}: expected a writable array, which training updates in place, "
            f"got a read-only one of shape {shape}; {_statistics.READ_ONLY_REMEDY}"
        )

    def layout(self, name: str) -> NoReturn:
        value = getattr(self._given, name)
        raise ValueError(
            f"{name}: expected a contiguous, aligned array in native byte order, which training "
            f"updates in place, got strides {value.strides} and dtype {value.dtype.str}"
        )

    # ---------------------------------------------------------------------------------- scalars

    def momentum(self, _: str) -> None:
        self._given.momentum = _scalars.momentum(self._given.momentum)

    def non_negative(self, name: str) -> None:
        setattr(self._given, name, _scalars.non_negative(name, getattr(self._given, name)))

    def nonfinite(self, _: str) -> None:
        self._given.nonfinite = _scalars.nonfinite(self._given.nonfinite)

    def flag(self, name: str) -> None:
        setattr(self._given, name, _scalars.flag(name, getattr(self._given, name)))

    # ------------------------------------------------------------------------ steps after a norm

    def activation(self, _: str) -> None:
        self._given.activation = _scalars.activation(self._given.activation)

    def residual(self, _: str) -> None:
        given, dtype = self._given, self._data().dtype
        array = _arrays.array("residual", given.residual, dtype)
        if given.out is not None:  # which may be the array of the caller
            given.over_residual = self._is_over("residual", array)
        given.residual = _arrays.data("residual", array, dtype)

    def residual_shape(self, _: str) -> NoReturn:
        raise ValueError(
            f"residual: expected shape {self._shape()}, that of x, got "
            f"{self._shape(self._given.residual)}"
        )

    def over_residual(self, _: str) -> None:
        self._given.over_residual = self._is_over("residual", self._given.residual)

    # ---------------------------------------------------------------------------------- backward

    def grad_shape(self, _: str) -> NoReturn:
        given = self._given
        raise ValueError(
            f"grad_output: expected shape {self._shape(given.saved)}, that of the input of the "
            f"forward call, got {self._shape(given.grad_output)}"
        )

    def input_gone(self, _: str) -> NoReturn:
        raise RuntimeError(
            "backward: expected the input of the last forward call to be intact, "
            "got one that an out= wrote over; give that call another out"
        )

    def input_changed(self, _: str) -> NoReturn:
        saved = self._given.saved
        raise RuntimeError(
            f"backward: expected the input of the last forward call as it was, {saved.dtype} of "
            f"shape {saved.shape}, got {saved.x.dtype} of shape {saved.x.shape}; "
            "do not change it in between"
        )

    def wanted(self, _: str) -> None:
        self._given.wanted = _scalars.wanted(self._given.wanted)

    def unwanted_out(self, _: str) -> NoReturn:
        raise ValueError(
            "out: expected None with wanted='parameters', which writes no gradient of the input, "
            "got an array"
        )

    # ------------------------------------------------------------------------------------ output

    def out(self, _: str = "") -> None:
        out = self._given.out
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"out: expected an array, got {type(out).__name__}")
        self._returned, self._given.out = out, np.ndarray.view(out, np.ndarray)

    def out_shape(self, _: str) -> NoReturn:
        out = self._given.out
        raise ValueError(f"out: expected shape {self._shape()}, got {self._shape(out)}")

    def out_dtype(self, _: str) -> NoReturn:
        out = self._given.out
        raise TypeError(
            f"out: expected {self._data().dtype}, got {out.dtype} in an array of shape "
            f"{self._shape(out)}"
        )

    def out_read_only(self, _: str) -> NoReturn:
        shape = self._shape(self._given.out)
        raise ValueError(f"out: expected a writable array, got a read-only one of shape {shape}")

    def out_layout(self, _: str) -> None:
        out = self._turn(self._given.out)
        if _arrays.may_overlap_itself(out):
            raise ValueError(
                f"out: expected an array that does not overlap itself, "
                f"got shape {out.shape} with strides {out.strides}"
            )
        self._given.spread = True

    def out_apart(self, name: str) -> NoReturn:
        raise ValueError(
            f"out: expected memory apart from {name}, got an overlap in an array of shape "
            f"{self._shape(self._given.out)}"
        )

    def over_x(self, _: str) -> None:
        given = self._given
        x = given.x if hasattr(given, "x") else given.given_x
        if x is None:
            x = given.saved.x
        given.over_x = self._is_over("x", x)

    def over_grad(self, _: str) -> None:
        self._given.over_grad = self._is_over("grad_output", self._given.grad_output)

    def _is_over(self, name: str, array: Array) -> bool:
        """Whether out is the very memory of an input, both as the caller has them."""
        out = self._given.out
        return _arrays.overlaps(self._turn(out), name, self._turn(array))
