"""Copying a state into the arrays of a layer or a model: all of it, or none and an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from cbn._arrays import read, unmasked, writable
from cbn._scalars import BOOLS, flag
from cbn._types import Array

REAL = (Real, Decimal)  # beside the types of NumPy


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(state, strict=False)`` passed over, as in PyTorch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


IncompatibleKeys.__module__ = "cbn.layers"  # where users find it, and pickles


def load_arrays(
    current: Mapping[str, Array], state: Mapping[str, ArrayLike], strict: bool, whose: str
) -> IncompatibleKeys:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state: expected a mapping from names to arrays, got {type(state).__name__}"
        )
    missing = [key for key in current if key not in state]
    unexpected = [key for key in state if key not in current]
    if flag("strict", strict) and (missing or unexpected):
        raise ValueError(
            f"state: expected exactly the keys of this {whose}, "
            f"got missing keys {missing} and unexpected keys {unexpected}; "
            f"pass strict=False to load what fits"
        )
    new = {key: _value(key, state[key], array) for key, array in current.items() if key in state}
    for key, value in new.items():
        current[key][...] = value
    return IncompatibleKeys(missing, unexpected)


def _value(key: str, value: Any, current: Any) -> Array:
    """A copy of the value, of the shape and dtype of the array that it can replace."""
    writable(key, current)
    name = f"state[{key!r}]"
    unmasked(name, value)
    array = read(name, value)
    _real_numbers(name, array)
    if array.shape != current.shape:
        raise ValueError(f"{name}: expected shape {current.shape}, got {array.shape}")
    if key.rpartition(".")[2] == "num_batches_tracked":
        return np.array(_count(name, array, current.dtype), dtype=current.dtype)
    return _as_held(name, array, current.dtype)


def _real_numbers(name: str, array: Array) -> None:
    """Refuse what is not of real numbers: of any type, those of ml_dtypes and Python included."""
    kind = array.dtype.kind
    # A type of somebody else's (2) says itself whether float64 holds its values.
    if kind in "iuf" or (array.dtype.isbuiltin == 2 and np.can_cast(array.dtype, np.float64)):
        return
    seen = str(array.dtype)
    if kind == "O":
        others = [v for v in array.flat if isinstance(v, BOOLS) or not isinstance(v, REAL)]
        if not others:
            return
        seen = type(others[0]).__name__
    raise TypeError(f"{name}: expected real numbers, got {seen}; convert them first")


def _count(name: str, array: Array, element: np.dtype[Any]) -> int:
    """A number of batches that an integer type can hold."""
    number = array.item() if array.dtype.kind in "iuO" else float(array)
    largest = int(np.iinfo(element if element.kind in "iu" else np.int64).max)
    expected = f"an integer from 0 to 2**{largest.bit_length()} - 1"
    if not 0 <= number <= largest:
        raise ValueError(f"{name}: expected {expected}, got {_shown(number)}")
    if number != int(number):
        raise ValueError(
            f"{name}: expected {expected}, got {number}; round an averaged counter first"
        )
    return int(number)


def _as_held(name: str, array: Array, element: np.dtype[Any]) -> Array:
    """A copy of real numbers in an element type that can hold them; infinities stay."""
    numbers = array
    if array.dtype.kind == "O":
        values = [_as_float(name, number, element) for number in array.flat]
        numbers = np.array(values, np.float64).reshape(array.shape)
    elif array.dtype.isbuiltin == 2:
        numbers = array.astype(np.float64)
    with np.errstate(all="ignore"):
        new = np.array(numbers, dtype=element)
    if numbers.dtype != element:
        lost = np.isinf(new) & ~np.isinf(numbers)
        if lost.any():
            _beyond(name, numbers[lost][0], element)
    return new


def _as_float(name: str, number: Any, element: np.dtype[Any]) -> float:
    try:
        converted = float(number)
    except OverflowError:
        converted = math.inf
    if math.isinf(converted) and number != converted:
        _beyond(name, number, element)
    return converted


def _beyond(name: str, number: Any, element: np.dtype[Any]) -> NoReturn:
    raise ValueError(
        f"{name}: expected numbers that {element} can hold, got {_shown(number)}; rescale the "
        "layer's input, or use float64 throughout"
    )


def _shown(number: Any) -> str:
    # Python converts no more than some thousand digits.
    beyond = isinstance(number, int) and not -(10**400) < number < 10**400
    return "an integer beyond floats" if beyond else str(number)
