"""Every check of an argument, and the text of every error.

A check returns the argument in the form that the rest of cbn works with, or raises: TypeError for
the wrong kind of thing (an element type included), ValueError for the wrong value or shape,
RuntimeError for a call out of order. Nothing is changed before all checks of a call have passed.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from inspect import Parameter, signature
from io import TextIOBase
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cbn._types import Array, Axes, Shape
from cbn.exceptions import SmallBatchWarning, StateFileError

# Tuples, because a union is put together anew each time that it is looked at.
BOOLS = (bool, np.bool)
INTEGERS = (int, np.integer)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
NONFINITE = ("propagate", "raise", "skip")
# For numpy.shares_memory: an exact answer for any pair of slices, a bound on the time for the rest.
OVERLAP_WORK = 10_000
MOST_AXES = 64  # of NumPy's arrays
# OpenMP ends the process when it cannot start a thread; no machine has more cores than this.
MOST_THREADS = 4096


# ---------------------------------------------------------------------------------- plain values


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


def thread_count(name: str, value: Any) -> int:
    count = positive_integer(name, value)
    if count > MOST_THREADS:
        raise ValueError(f"{name}: expected at most {MOST_THREADS} threads, got {value!r}")
    return count


def thread_variable(name: str, text: str) -> int:
    # Python converts no more than some thousand digits.
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 100 else 0
    if not 0 < count <= MOST_THREADS:
        raise ValueError(
            f"environment variable {name}: expected a positive integer up to {MOST_THREADS}, "
            f"got {text!r}; correct it or unset it"
        )
    return count


def extensions_built(folder: Path, built: bool) -> None:
    if not built:
        raise ImportError(
            f"cbn: expected extensions built for this Python in {folder}, got none; "
            "build them with 'pip install -e .' in the checkout, "
            "or start Python elsewhere to import an installed cbn"
        )


def instruction_set(
    variable: str, isa: str, known: list[str], built: list[str], supported: list[str]
) -> None:
    for choices, of_what in (
        (known, "an instruction set"),
        (built, "an instruction set that this installation was built for"),
        (supported, "an instruction set of this CPU and operating system"),
    ):
        if isa not in choices:
            raise ValueError(
                f"environment variable {variable}: expected {of_what} ({', '.join(choices)}), "
                f"got {isa!r}; correct it or unset it"
            )


def config_mode(mode: Any) -> None:
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {mode!r}")


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
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def momentum(value: Any, or_none: str = "") -> float:
    expected = f"a finite number{or_none}"
    number = value if type(value) is float else _number("momentum", value, expected)
    if not math.isfinite(number):
        raise ValueError(f"momentum: expected {expected}, got {value!r}")
    return number


def unused(momentum_of_call: Any, correction: Any) -> None:
    """Of a function that learns nothing this time: they must be valid all the same."""
    momentum(momentum_of_call)
    non_negative("correction", correction)


def momentum_or_none(value: Any) -> float | None:
    return None if value is None else momentum(value, ", or None for the cumulative average")


def warn_of_momentum(value: float | None) -> None:
    """PyTorch takes any number without a word; the average leaves the range of the data."""
    if value is not None and not 0 <= value <= 1:
        _warn(
            f"momentum: expected a number from 0 to 1, the weight of the new batch, got {value:g}; "
            "momentum=0.1 is what Keras and ONNX call 0.9",
            UserWarning,
        )


def nonfinite(value: Any) -> str:
    if not isinstance(value, str) or value not in NONFINITE:
        raise ValueError(f"nonfinite: expected one of {NONFINITE}, got {value!r}")
    return str(value)


def finite_statistics(channels: list[int]) -> None:
    """Refuse a batch whose statistics are not finite, or too large to keep, in these channels."""
    if channels:
        raise FloatingPointError(
            f"x: expected a finite mean and variance of every channel, got NaN, infinity or more "
            f"than the running statistics can hold in {_count_of(channels)}; nothing "
            "has been changed. nonfinite='skip' keeps the running statistics of such channels as "
            "they are; those of dtype float64 can hold more"
        )


def _count_of(channels: list[int]) -> str:
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    return f"{len(channels)} of them ({shown})"


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
    if result not in FLOATS:
        raise TypeError(f"dtype: expected NumPy's float32 or float64, got {result}")
    return result


def channel_axis(value: Any) -> int:
    if isinstance(value, BOOLS) or not isinstance(value, INTEGERS) or value not in (1, -1):
        raise ValueError(
            f"channel_axis: expected 1 (channels first) or -1 (channels last), got {value!r}"
        )
    return int(value)


# What a layer's attributes of these names must be; they may have been changed since it was made.
OF_ATTRIBUTES: dict[str, Callable[[str, Any], Any]] = {
    "eps": non_negative,
    "momentum": lambda name, value: momentum_or_none(value),
    "correction": non_negative,
    "nonfinite": lambda name, value: nonfinite(value),
}


# ---------------------------------------------------------------------------------------- arrays


def _read(name: str, value: Any) -> Array:
    """What NumPy makes of a value."""
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected an array, got sequences of unequal lengths") from None
    except (RuntimeError, TypeError) as error:  # PyTorch's, of what has a gradient, or of bfloat16
        raise TypeError(
            f"{name}: expected what NumPy can read, got {type(value).__name__}; "
            f"convert it first ({error})"
        ) from error


def unmasked(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)) and not _PLAIN_NUMBERS.issuperset(map(type, value)):
        for i, item in enumerate(value):
            if isinstance(item, (list, tuple, np.ma.MaskedArray)):
                unmasked(f"{name}[{i}]", item)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, got a masked array; "
            f"fill it first with {name}.filled(value)"
        )


def _as_array(name: str, value: Any, like: np.dtype[Any] | None) -> Array:
    """An array of floats in any layout; what has no element type of its own takes that of like."""
    if value is None:
        raise TypeError(f"{name}: expected an array of float32 or float64, got None")
    unmasked(name, value)
    array = _read(name, value)
    if array.dtype.kind in "fiu" and not _has_element_type(value):
        array = array.astype(like or np.float64)
    if array.dtype.newbyteorder("=") not in FLOATS:
        raise TypeError(
            f"{name}: expected float32 or float64, got {array.dtype}; "
            f"convert it first, for example with {_conversion(name, value, 'float32')}"
        )
    return array


# All but the last of the ways in which NumPy reads an array, which is the buffer protocol.
_ARRAY_PROTOCOLS = ("dtype", "__array__", "__array_interface__", "__array_struct__")
_PLAIN_NUMBERS = frozenset((bool, int, float, complex))


def _has_element_type(value: Any) -> bool:
    """Whether a value says itself what its elements are; a list does where one of its items does.

    Lists, tuples and Python's numbers do not.
    """
    if any(hasattr(value, protocol) for protocol in _ARRAY_PROTOCOLS):
        return True
    if isinstance(value, (list, tuple)):
        # By the types of all items at once: a long list of floats is one step.
        return not _PLAIN_NUMBERS.issuperset(map(type, value)) and any(
            map(_has_element_type, value)
        )
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _conversion(name: str, value: Any, dtype: str) -> str:
    """What to type to convert a value."""
    if hasattr(value, "astype"):
        return f"{name}.astype(numpy.{dtype})"
    return f"numpy.asarray({name}, numpy.{dtype})"


def data(name: str, value: ArrayLike, like: np.dtype[Any] | None = None) -> Array:
    """An array that a kernel can read: value itself where its layout allows, else a copy.

    Parameters
    ----------
    name : str
        For the error.
    value : array_like
        Of float32 or float64, in any layout and byte order; or (nested) lists of numbers.
    like : dtype, optional
        The element type it must have; lists of Python's numbers are converted to it.
    """
    return readable(_held(name, value, like))


def array(name: str, value: ArrayLike, like: np.dtype[Any] | None = None) -> Array:
    """Data where the caller has them, in any layout: an array as it is, the rest as in data()."""
    return value if type(value) is np.ndarray else _held(name, value, like)


def _held(name: str, value: ArrayLike, like: np.dtype[Any] | None) -> Array:
    """An array in any layout, held to an element type."""
    array = _as_array(name, value, like)
    seen = array.dtype.newbyteorder("=")
    if like is not None and seen != like:
        raise TypeError(
            f"{name}: expected {np.dtype(like)}, got {seen}; "
            f"convert it with {_conversion(name, value, np.dtype(like).name)}, "
            f"or use {seen} throughout"
        )
    return array


def readable(array: Array) -> Array:
    """Array itself if it is C-contiguous, aligned and in native byte order, else a copy."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array.view(np.ndarray) if type(array) is not np.ndarray else array
    # Not numpy.ascontiguousarray, which would keep a misaligned array as it is.
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C", subok=False)


def axis_of_channels(name: str, shape: Shape, axes: Axes) -> int:
    rank = len(shape)
    axis = axes.of_rank[rank] if rank < len(axes.of_rank) else -1
    if axis < 0:
        raise ValueError(f"{name}: expected {axes.expected}, got {rank} axes in shape {shape}")
    if axes.channels not in (None, shape[axis]):
        raise ValueError(
            f"{name}: expected {axes.channels} channels on axis {axis}, got {shape[axis]} in shape "
            f"{shape}{_other_channel_axis(shape, axis, axes.channels)}"
        )
    return axis


def _other_channel_axis(shape: Shape, axis: int, channels: int | None) -> str:
    """The remedy of a layer for the other layout, where that would fit."""
    last = len(shape) - 1
    if axis != last and shape[last] == channels:
        return "; if the channels are last, make the layer with channel_axis=-1"
    if axis == last > 1 and shape[1] == channels:
        return "; if the channels are first, make the layer with channel_axis=1"
    return ""


def normalized_shape(value: Any) -> Shape:
    """The lengths of the last axes, also from an integer for one."""
    several = isinstance(value, (Sequence, np.ndarray)) and getattr(value, "ndim", 1) > 0
    if isinstance(value, (str, bytes)) or not several:
        return (positive_integer("normalized_shape", value),)
    shape = tuple(positive_integer("normalized_shape", length) for length in value)
    if not shape:
        raise ValueError("normalized_shape: expected at least one length, got none")
    if len(shape) > MOST_AXES:
        raise ValueError(
            f"normalized_shape: expected at most {MOST_AXES} lengths, as many as NumPy's arrays "
            f"have axes, got {len(shape)}"
        )
    return shape


def last_axes(name: str, shape: Shape, normalized_shape: Shape) -> None:
    if shape[-len(normalized_shape) :] != normalized_shape:
        raise ValueError(
            f"{name}: expected the last axes to be {normalized_shape}, that is normalized_shape, "
            f"got shape {shape}"
        )


def least_axes(name: str, shape: Shape, least: int) -> None:
    if len(shape) < least:
        raise ValueError(
            f"{name}: expected at least {least} axes, got {len(shape)} in shape {shape}"
        )


def group_count(num_groups: int, num_channels: int) -> None:
    if num_channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {num_channels} channels, got {num_groups}"
        )


def grouped(
    name: str, shape: Shape, num_groups: int, channel_axis: int, num_channels: int | None
) -> None:
    """Refuse what is not (N, C, ...) or (N, ..., C) with channels that make so many groups."""
    least_axes(name, shape, 2)
    if num_channels not in (None, shape[channel_axis]):
        axis = channel_axis % len(shape)
        raise ValueError(
            f"{name}: expected {num_channels} channels on axis {axis}, got {shape[axis]} in shape "
            f"{shape}{_other_channel_axis(shape, axis, num_channels)}"
        )
    group_count(num_groups, shape[channel_axis])


def enough_values(shape: Shape, count: int, correction: float, of_samples: bool) -> None:
    """An empty batch passes; a mean must be of so many that they give an unbiased variance."""
    needed = max(1.0, correction)
    if 0 < count <= needed:
        where, remedy = "when training", "a larger batch, or eval mode with running statistics"
        if of_samples:
            where, remedy = "of a sample", "larger samples, or BatchNorm or LayerNorm"
        raise ValueError(
            f"x: expected more than {needed:g} value{'s' if needed > 1 else ''} per channel "
            f"{where}, got {count} in shape {shape}; use {remedy}"
        )


# Statistics of fewer values per channel than this say more of the batch than of the data: the
# normalised values of two are -1 and 1, whatever they were.
SMALL_BATCH = 4


def _warn(text: str, category: type[Warning]) -> None:
    """Warn the line that called cbn, however many frames above it is."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def warn_of_few_values(count: int, shape: Shape, of_samples: bool) -> None:
    whose, remedy = (
        "",
        (
            "a larger batch, or GroupNorm or LayerNorm, which do not depend on the batch, "
            "or cbn.recalibrate(model, batches, forward) after training"
        ),
    )
    if of_samples:
        whose, remedy = (
            " of a sample",
            ("larger samples, or GroupNorm or LayerNorm, whose statistics are of several channels"),
        )
    _warn(
        f"x: expected at least {SMALL_BATCH} values per channel{whose} when training, got {count} "
        f"in shape {shape}; use {remedy}",
        SmallBatchWarning,
    )


def same_shape(name: str, shape: Shape, expected: Shape, whose: str) -> None:
    if shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, that of {whose}, got {shape}")


def parameter(name: str, value: ArrayLike, shape: Shape, of_channels: bool = False) -> Array:
    """A weight, a bias or a statistic of this shape, for reading."""
    array = _as_array(name, value, None)
    if array.shape != shape:
        each = ", one value per channel" if of_channels else ""
        raise ValueError(f"{name}: expected shape {shape}{each}, got {array.shape}")
    return readable(array)


def per_channel(name: str, value: ArrayLike, num_features: int) -> Array:
    return parameter(name, value, (num_features,), True)


def per_channel_or_none(name: str, value: ArrayLike | None, num_features: int) -> Array | None:
    return None if value is None else per_channel(name, value, num_features)


READ_ONLY_REMEDY = "train a copy (copy.deepcopy), or use eval mode"


def running_or_none(name: str, value: Any, num_features: int) -> Array | None:
    """One value per channel, to be updated in place."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected an array, which training updates in place, "
            f"got {type(value).__name__}"
        )
    array = per_channel(name, value, num_features)
    if not value.flags.writeable:
        raise ValueError(
            f"{name}: expected a writable array, which training updates in place, "
            f"got a read-only one of shape {value.shape}; {READ_ONLY_REMEDY}"
        )
    if array.size and not np.may_share_memory(array, value):
        raise ValueError(
            f"{name}: expected a contiguous, aligned array in native byte order, which training "
            f"updates in place, got strides {value.strides} and dtype {value.dtype.str}"
        )
    return array


def both_or_none(running_mean: Any, running_var: Any) -> None:
    if (running_mean is None) != (running_var is None):
        given, missing = "running_mean", "running_var"
        if running_mean is None:
            given, missing = missing, given
        raise ValueError(
            f"running_mean and running_var: expected both or neither, got {given} without {missing}"
        )


def statistic(name: str, value: ArrayLike | None, num_features: int) -> Array:
    """One value per channel, to normalise by."""
    if value is None:
        raise ValueError(
            f"{name}: expected an array of shape ({num_features},) when not training, got None"
        )
    return per_channel(name, value, num_features)


def initial_statistic(
    name: str, value: ArrayLike, num_features: int, element: np.dtype[Any]
) -> Array:
    """A scalar, or one value per channel, as a new array."""
    array = _as_array(name, value, element)
    if array.shape not in ((), (num_features,)):
        raise ValueError(
            f"{name}: expected a scalar or shape ({num_features},), got shape {array.shape}"
        )
    return np.full(num_features, array, dtype=element)


def usable_variance(name: str, var: Array, eps: float, nan: bool = True) -> None:
    """Refuse what cannot be normalised by: var + eps must be above 0, as the kernels add them.

    nan: whether a NaN passes, and makes its channel NaN.
    """
    total = var.astype(np.float64) + eps
    unusable = np.flatnonzero(total <= 0 if nan else ~(total > 0))
    if len(unusable):
        first, more = unusable[0], len(unusable) - 1
        raise ValueError(
            f"{name}: expected {name} + eps above 0 in every channel, got {var[first]:g} with "
            f"eps={eps:g} in channel {first}{f' and {more} more' if more else ''}; a variance is "
            f"at least 0, and one of 0 needs an eps above 0"
        )


def tracked(name: str, track_running_stats: bool) -> None:
    if not track_running_stats:
        raise ValueError(
            f"{name}: expected None with track_running_stats=False, got a value that nothing "
            f"would use"
        )


# --------------------------------------------------------------------------------------- outputs


def output(out: Any, shape: Shape, element: np.dtype[Any]) -> Array:
    """An array to write to, in any layout in which no two elements share memory."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out: expected an array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if out.dtype != element:
        raise TypeError(f"out: expected {element}, got {out.dtype} in an array of shape {shape}")
    if not out.flags.writeable:
        raise ValueError(f"out: expected a writable array, got a read-only one of shape {shape}")
    if not out.flags.c_contiguous and _may_overlap_itself(out):
        raise ValueError(
            f"out: expected an array that does not overlap itself, "
            f"got shape {shape} with strides {out.strides}"
        )
    return out


def overlaps(out: Array, name: str, array: Any) -> bool:
    """Whether out is the very memory of an input; a partial overlap is an error."""
    if out is array:
        return True
    if not np.may_share_memory(out, array):
        return False
    same_place = out.__array_interface__["data"][0] == array.__array_interface__["data"][0]
    if same_place and out.shape == array.shape and _steps(out) == _steps(array):
        return True
    try:
        # NumPy's stub knows only the two named limits, its documentation any number.
        shared = np.shares_memory(out, array, max_work=OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        shared = True
    if shared:
        raise ValueError(
            f"out: expected memory apart from {name}, or {name} itself, got a partial overlap "
            f"(shape {out.shape}, strides {out.strides} over strides {array.strides})"
        )
    return False


def learnt_apart(running_mean: Array | None, running_var: Array | None, x: Array) -> None:
    """Refuse running statistics whose update would change the input, or each other."""
    if running_mean is None or running_var is None:
        return
    for name, one, other in (
        ("running_mean and running_var", running_mean, running_var),
        ("running_mean and x", running_mean, x),
        ("running_var and x", running_var, x),
    ):
        if np.may_share_memory(one, other):
            raise ValueError(f"{name}: expected memory of their own, got an overlap")


def apart(out: Array, **arrays: Array | None) -> None:
    """Refuse an output that lies over a parameter or a statistic."""
    for name, array in arrays.items():
        if array is not None and np.may_share_memory(out, array):
            raise ValueError(
                f"out: expected memory apart from {name}, got an overlap in an array of shape "
                f"{out.shape}"
            )


def _steps(array: Array) -> list[int]:
    """The strides that matter: an axis of length 1 may have any."""
    pairs = zip(array.strides, array.shape, strict=True)
    return [stride for stride, length in pairs if length > 1]


def _may_overlap_itself(array: Array) -> bool:
    """Whether a stride is too short for what the smaller strides reach over.

    Exact for everything that slicing, transposing and broadcasting make.
    """
    if array.size == 0:
        return False
    reach = array.itemsize
    for stride, length in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if length > 1:
            if stride < reach:
                return True
            reach += stride * (length - 1)
    return False


# ----------------------------------------------------------------------------- order of the calls


def no_forward() -> NoReturn:
    raise RuntimeError("backward: expected a forward call before it, got none on this layer")


def input_intact(x: Array, shape: Shape, dtype: np.dtype[Any]) -> None:
    if x.shape != shape or x.dtype != dtype or not x.flags.c_contiguous:
        raise RuntimeError(
            f"backward: expected the input of the last forward call as it was, {dtype} of shape "
            f"{shape}, got {x.dtype} of shape {x.shape}; do not change it in between"
        )


def input_overwritten() -> NoReturn:
    raise RuntimeError(
        "backward: expected the input of the last forward call to be intact, "
        "got one that an out= wrote over; give that call another out"
    )


# ----------------------------------------------------------------------------------------- states


def batch_to_count(num_batches_tracked: Any) -> None:
    """Refuse a counter that cannot count another batch."""
    batch_count(num_batches_tracked)
    if not num_batches_tracked.flags.writeable:
        raise ValueError(
            "num_batches_tracked: expected a writable array, which training updates in place, "
            f"got a read-only one of shape (); {READ_ONLY_REMEDY}"
        )


def batch_count(num_batches_tracked: Any, prefix: str = "") -> int:
    """How many batches the running statistics have seen."""
    count = num_batches_tracked
    if (
        not isinstance(count, np.ndarray)
        or count.shape != ()
        or count.dtype.kind not in "iu"
        or count < 0
    ):
        raise ValueError(
            f"{prefix}num_batches_tracked: expected a writable array of shape () with an integer "
            f">= 0, got {count!r}"
        )
    return int(count)


def state_keys(missing: list[str], unexpected: list[str], whose: str) -> None:
    if missing or unexpected:
        raise ValueError(
            f"state: expected exactly the keys of this {whose}, "
            f"got missing keys {missing} and unexpected keys {unexpected}; "
            f"pass strict=False to load what fits"
        )


def state_mapping(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state: expected a mapping from names to arrays, got {type(state).__name__}"
        )


def writable(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray) or not value.flags.writeable:
        seen = "a read-only one" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected a writable array, got {seen}")


def state_value(key: str, value: Any, current: Any) -> Array:
    """A copy of the value, of the shape and dtype of the array that it can replace."""
    writable(key, current)
    name = f"state[{key!r}]"
    unmasked(name, value)
    array = _read(name, value)
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
        others = [each for each in array.flat if isinstance(each, BOOLS) or not _is_real(each)]
        if not others:
            return
        seen = type(others[0]).__name__
    raise TypeError(f"{name}: expected real numbers, got {seen}; convert them first")


def _is_real(value: Any) -> bool:
    return isinstance(value, (Real, Decimal))


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


def savable(
    state: Mapping[str, Array],
    expected: Mapping[str, tuple[np.dtype[Any], Shape]],
    prefix: str = "",
) -> None:
    """Whether load() would take what save() is about to write."""
    for name in state.keys() | expected.keys():
        wanted = "no array" if name not in expected else "{} of shape {}".format(*expected[name])
        seen = "none" if name not in state else f"{state[name].dtype} of shape {state[name].shape}"
        if wanted != seen:
            raise ValueError(f"{prefix}{name}: expected {wanted} to save, got {seen}")
    if "num_batches_tracked" in state:
        batch_count(state["num_batches_tracked"], prefix)


class OfAnotherModel(ValueError):
    """What a file says of its layers may be right, but not for this model."""


class OfAnotherClass(ValueError):
    """A file may be good where another is expected; the message is whole but for the path."""


def is_path(value: Any, method: str) -> bool:
    """Whether it is a path; else it is a file that has this method."""
    if isinstance(value, (str, bytes, os.PathLike)):
        return True
    if isinstance(value, TextIOBase) or not callable(getattr(value, method, None)):
        raise TypeError(f"path: expected a path or an open binary file, got {type(value).__name__}")
    return False


def content(read: Any) -> bytes:
    """What has been read of an open file."""
    if not isinstance(read, bytes):
        raise TypeError(
            f"path: expected a path or an open binary file, got one that reads "
            f"{type(read).__name__}"
        )
    return read


def unfit_file(path: str, error: Exception) -> NoReturn:
    if isinstance(error, OfAnotherClass):
        raise StateFileError(f"{path}: {error}") from error
    expected = "a state file of cbn, got one that is damaged or foreign"
    if isinstance(error, OfAnotherModel):
        expected = "a state file of this model, got one of another"
    raise StateFileError(
        f"{path}: expected {expected}: {str(error) or type(error).__name__}"
    ) from error


# What the file of a model stands under where that of a layer has the name of its class.
MODEL = "model"


def same_class(saved: Any, expected: str) -> None:
    if saved == expected:
        return
    if not isinstance(saved, str) or not saved.isidentifier():
        raise ValueError(f"class: expected {expected!r}, got {str(saved)[:40]!r}")
    if saved == MODEL:
        whose, remedy = "a model", "cbn.load(model, path)"
    else:
        whose, remedy = saved[:40], f"{saved[:40]}.load(path)"
    this = "a model" if expected == MODEL else expected
    raise OfAnotherClass(f"expected a state file of {this}, got one of {whose}; use {remedy}")


def restorable(cls: type, norm: type) -> None:
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


def config_keys(
    config: Mapping[str, Any], expected: Mapping[str, Any], name: str = "config"
) -> None:
    missing, unexpected = expected.keys() - config.keys(), config.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{name}: expected the keys {sorted(expected)}, got missing keys {sorted(missing)} and "
            f"unexpected keys {sorted(unexpected)[:8]}"
        )


# Names of members in an archive: a NUL would end one, and zipfile has two bytes for its length.
LONGEST_NAME = 60_000


def member_name(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half of a character
        size = LONGEST_NAME + 1
    if "\0" in name or size > LONGEST_NAME:
        raise ValueError(
            f"model: expected names of text without NUL and of at most {LONGEST_NAME} bytes to "
            f"save, got {name[:40]!r}; rename the key"
        )


def same_layers(
    saved: Any,
    expected: Mapping[str, Mapping[str, Any]],
    later: Mapping[str, Mapping[str, Any]],
    modes: tuple[str, ...],
) -> None:
    """Whether a file has the layers of a model, with their configurations.

    later: what an older file does not tell of each layer.
    """
    if not isinstance(saved, dict) or not all(isinstance(each, dict) for each in saved.values()):
        raise ValueError(f"layers: expected an object of objects, got {str(saved)[:40]}")
    missing = [name for name in expected if name not in saved]
    unexpected = [name for name in saved if name not in expected]
    if missing or unexpected:
        raise OfAnotherModel(
            f"layers: expected those of this model, got missing layers {missing[:8]} and "
            f"unexpected layers {unexpected[:8]}"
        )
    for name, config in expected.items():
        layer, seen = name or "model", {**later[name], **saved[name]}
        if seen.get("class") == config["class"]:  # another has other keys
            config_keys(seen, config, layer)
        for key in ("class", *config):
            if key not in modes and seen.get(key) != config[key]:
                raise OfAnotherModel(
                    f"{layer}: expected {key}={config[key]!r}, as in this model, got "
                    f"{repr(seen.get(key))[:40]}"
                )


# ------------------------------------------------------------------------------------------ models


@contextmanager
def of_layer(prefix: str) -> Iterator[None]:
    """Name the layer of a model before its attribute."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}") from error


def distinct_names(names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"model: expected a name of its own for every norm layer, got {twice!r} for two; "
            f"rename a key (dots in keys, 1 beside '1', and a key beside an attribute of the same "
            f"name make names that are the same)"
        )


def some_layers(
    which: str,
    count: int,
    of: int,
    model: Any,
    remedy: str = "layers are found in dicts, lists, tuples and attributes",
) -> None:
    if count == 0:
        raise ValueError(
            f"model: expected at least one norm layer {which}, got {type(model).__name__} with "
            f"none among {of}; {remedy}"
        )


def norm_layer(layer: Any, kind: type) -> None:
    if not isinstance(layer, kind):
        raise TypeError(f"layer: expected a norm layer of cbn, got {type(layer).__name__}")


def learning_layer(layer: Any, has_statistics: bool, frozen: bool) -> None:
    if not has_statistics:
        can = hasattr(layer, "track_running_stats")
        raise ValueError(
            f"layer: expected one with running statistics, got {layer!r}; "
            + ("set layer.track_running_stats = True" if can else "this kind never has any")
        )
    if frozen:
        raise ValueError(
            f"layer: expected one that is not frozen, got {layer!r}; call cbn.unfreeze(layer) first"
        )


def iterable(name: str, value: Any) -> None:
    # What "for" takes: by __iter__, or as a sequence of items. Not by a call of iter(), which may
    # start the workers of a loader.
    if not isinstance(value, Iterable) and not hasattr(type(value), "__getitem__"):
        raise TypeError(f"{name}: expected an iterable of batches, got {type(value).__name__}")


def function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function of one batch, got {type(value).__name__}")


def data_reach_layers(source: str, count: int) -> None:
    if count == 0 and source == "batch":
        raise ValueError("batch: expected at least one value per channel, got an empty batch")
    if count == 0:
        raise ValueError(
            f"{source}: expected data that reach a norm layer in training mode, got none; a "
            f"generator gives its batches only once, and forward must not switch to eval mode"
        )


def still_measured(name: str, training: bool, frozen: bool) -> None:
    if not training or frozen:
        raise ValueError(
            f"{name or 'layer'}: expected to stay in training mode and not frozen until the last "
            f"batch, got {'frozen' if frozen else 'eval mode'} after a call of forward; switch "
            f"after recalibrate"
        )


def enough_in_all(name: str, counts: Array, correction: float) -> None:
    """All batches together must be able to give an unbiased variance."""
    needed = max(1.0, correction)
    if counts.size and counts.min() <= needed:
        raise ValueError(
            f"{name or 'layer'}: expected more than {needed:g} value{'s' if needed > 1 else ''} "
            f"per channel in all, got {counts.min():g}; give more data"
        )


def no_tqdm(error: ImportError) -> NoReturn:
    raise ImportError(
        "progress: expected tqdm to be installed for progress=True, got none; "
        "install it with: pip install tqdm"
    ) from error


# ----------------------------------------------------------------------------------------- folding


def foldable(bn: Any, kinds: tuple[type, ...]) -> None:
    if not issubclass(type(bn), kinds):
        expected = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"bn: expected one of {expected}, got {type(bn).__name__}")
    if bn.training:
        raise ValueError(
            "bn: expected a layer in eval mode, whose statistics are constants, got one in "
            "training mode; call bn.eval() first"
        )
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "bn: expected a layer with running statistics, got one that normalises by the "
            "statistics of each batch, which no weight can take in"
        )


def conv_weight(shape: Shape, num_features: int) -> None:
    if len(shape) < 3:
        raise ValueError(f"weight: expected shape (out, in / groups, *kernel), got {shape}")
    remedies = []
    if shape[-1] == num_features:
        remedies.append(
            "if it is (*kernel, in, out), as in Keras and Flax, give "
            "numpy.moveaxis(weight, (-1, -2), (0, 1))"
        )
    _same_channels(shape, num_features, remedies)


def linear_weight(shape: Shape, num_features: int) -> None:
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
    _same_channels(shape, num_features, remedies)


def _same_channels(shape: Shape, num_features: int, remedies: list[str]) -> None:
    if shape[0] != num_features:
        expected = f"{num_features} output channel{'s' if num_features > 1 else ''}, as bn has"
        text = f"weight: expected {expected}, got {shape[0]} in shape {shape}"
        raise ValueError("; ".join([text, *remedies]))


def transposed_conv_weight(shape: Shape, num_features: int) -> int:
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


def finite_folding(channels: list[int]) -> None:
    """Refuse a new weight or bias that is not finite in these channels."""
    if channels:
        raise ValueError(
            f"bn: expected a finite weight and bias of every channel after folding, got NaN, "
            f"infinity or more than the dtype of weight can hold in {_count_of(channels)}; "
            f"all arrays must be finite, and the scale and shift of bn within that dtype"
        )
