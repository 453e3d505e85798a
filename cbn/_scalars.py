"""Numbers, flags and names given as arguments: each is returned in the form that cbn works with.

What is of the wrong kind is a TypeError, what has the wrong value a ValueError.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cbn._dispatch import kernels

# Tuples, because a union is put together anew each time that it is looked at.
BOOLS = (bool, np.bool)
INTEGERS = (int, np.integer)


def positive_integer(name: str, value: Any) -> int:
    if isinstance(value, BOOLS):
        raise TypeError(f"{name}: expected a positive integer, got {value!r}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a positive integer, got {value!r}") from None
    if integer < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return integer


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, BOOLS):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _number(name: str, value: Any, expected: str) -> float:
    # A string, a truth value or an array of one converts to float too, but hardly on purpose.
    if isinstance(value, (str, bytes, *BOOLS)) or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got an integer beyond floats") from None


def non_negative(name: str, value: Any) -> float:
    """Eps or correction."""
    expected = "a finite number >= 0"
    number = value if type(value) is float else _number(name, value, expected)
    if not kernels.is_non_negative(number):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def momentum(value: Any, or_none: str = "") -> float:
    expected = f"a finite number{or_none}"
    number = value if type(value) is float else _number("momentum", value, expected)
    if not kernels.is_finite(number):
        raise ValueError(f"momentum: expected {expected}, got {value!r}")
    return number


def momentum_or_none(value: Any) -> float | None:
    return None if value is None else momentum(value, ", or None for the cumulative average")


def unused(momentum_of_call: Any, correction: Any) -> None:
    """Of a function that learns nothing this time: they must be valid all the same."""
    momentum(momentum_of_call)
    non_negative("correction", correction)


def nonfinite(value: Any) -> str:
    return _one_of("nonfinite", value, kernels.NONFINITE)


def wanted(value: Any) -> str:
    return _one_of("wanted", value, kernels.WANTED)


def activation(value: Any) -> str | None:
    return None if value is None else _one_of("activation", value, kernels.ACTIVATIONS)


def _one_of(name: str, value: Any, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: expected one of {names}, got {value!r}")
    return names[names.index(value)]


def device(value: Any) -> None:
    if value is not None and str(value) != "cpu":
        raise ValueError(
            f"device: expected None or 'cpu', got {str(value)!r}; cbn runs on the CPU only"
        )


def dtype(value: DTypeLike | None) -> np.dtype[Any]:
    try:
        result = np.dtype(np.float32 if value is None else value)
    except TypeError:
        raise TypeError(f"dtype: expected NumPy's float32 or float64, got {value!r}") from None
    if not kernels.is_float(result):
        raise TypeError(f"dtype: expected NumPy's float32 or float64, got {result}")
    return result


def channel_axis(value: Any) -> int:
    if isinstance(value, BOOLS) or not isinstance(value, INTEGERS) or value not in (1, -1):
        raise ValueError(
            f"channel_axis: expected 1 (channels first) or -1 (channels last), got {value!r}"
        )
    return int(value)
