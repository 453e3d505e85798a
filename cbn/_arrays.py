"""Arrays given as arguments: read in any layout, held to a shape and a dtype, or written to.

What is of the wrong kind, an element type included, is a TypeError, what has the wrong shape or
lies in the wrong memory a ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn._dispatch import kernels
from cbn._types import Array, Shape

# All but the last of the ways in which NumPy reads an array, which is the buffer protocol.
_ARRAY_PROTOCOLS = ("dtype", "__array__", "__array_interface__", "__array_struct__")
_PLAIN_NUMBERS = frozenset((bool, int, float, complex))
# For numpy.shares_memory: an exact answer for any pair of slices, a bound on the time for the rest.
OVERLAP_WORK = 10_000
# The element types of parameters, and those of data, in words.
FLOATS = "float32 or float64"
STORAGES = "float32, float64, float16 or bfloat16"


# --------------------------------------------------------------------------------------- reading


def array(
    name: str, value: ArrayLike, like: np.dtype[Any] | None = None, of_layer: bool = False
) -> Array:
    """Data where the caller has them, in any layout: an array as it is, the rest as in data()."""
    return value if type(value) is np.ndarray else _held(name, value, like, of_layer)


def data(
    name: str, value: ArrayLike, like: np.dtype[Any] | None = None, of_layer: bool = False
) -> Array:
    """An array that a kernel can read: value itself where its layout allows, else a copy.

    It must be of an element type of data, in any byte order, and where like is given of that, or of
    one that a layer of that dtype takes; (nested) lists of Python's numbers are converted to it.
    """
    return readable(_held(name, value, like, of_layer))


def _held(name: str, value: ArrayLike, like: np.dtype[Any] | None, of_layer: bool) -> Array:
    """An array in any layout, held to an element type."""
    array = floats(name, value, like, halves=True)
    seen = array.dtype.newbyteorder("=")
    if like is None or (kernels.is_taken if of_layer else kernels.is_of)(seen, like):
        return array
    like = np.dtype(like)
    expected, other = str(like), f"{seen} throughout"
    if of_layer and not kernels.is_float(seen):
        other = f"a layer of float32, which takes {seen}"
    elif of_layer and like == np.float32:
        expected = "float32, float16 or bfloat16"
    raise TypeError(
        f"{name}: expected {expected}, got {seen}; "
        f"convert it with {_conversion(name, value, like.name)}, or use {other}"
    )


def floats(name: str, value: Any, like: np.dtype[Any] | None, halves: bool = False) -> Array:
    """An array of floats in any layout; what has no element type of its own takes that of like.

    halves: whether they are data, which may be of types that cbn does not compute in.
    """
    expected, accepts = (STORAGES, kernels.is_storage) if halves else (FLOATS, kernels.is_float)
    if value is None:
        raise TypeError(f"{name}: expected an array of {expected}, got None")
    unmasked(name, value)
    array = read(name, value)
    if array.dtype.kind in "fiu" and not _has_element_type(value):
        array = array.astype(like or np.float64)
    if not accepts(array.dtype.newbyteorder("=")):
        raise TypeError(
            f"{name}: expected {expected}, got {array.dtype}; "
            f"convert it first, for example with {_conversion(name, value, 'float32')}"
        )
    return array


def read(name: str, value: Any) -> Array:
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
    element = f"{'ml_dtypes' if dtype == 'bfloat16' else 'numpy'}.{dtype}"
    if hasattr(value, "astype"):
        return f"{name}.astype({element})"
    return f"numpy.asarray({name}, {element})"


def readable(array: Array) -> Array:
    """Array itself if it is C-contiguous, aligned and in native byte order, else a copy."""
    if type(array) is not np.ndarray:
        array = array.view(np.ndarray)
    if kernels.is_plain(array):
        return array
    # Not numpy.ascontiguousarray, which would keep a misaligned array as it is.
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C", subok=False)


def parameter(name: str, value: ArrayLike, shape: Shape, of_channels: bool = False) -> Array:
    """A weight, a bias or a statistic of this shape, for reading."""
    array = floats(name, value, None)
    if not kernels.has_shape(array, shape):
        each = ", one value per channel" if of_channels else ""
        raise ValueError(f"{name}: expected shape {shape}{each}, got {array.shape}")
    return readable(array)


def per_channel(name: str, value: ArrayLike, num_features: int) -> Array:
    return parameter(name, value, (num_features,), True)


def per_channel_or_none(name: str, value: ArrayLike | None, num_features: int) -> Array | None:
    return None if value is None else per_channel(name, value, num_features)


# --------------------------------------------------------------------------------------- writing


def writable(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray) or not value.flags.writeable:
        seen = "a read-only one" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected a writable array, got {seen}")


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


def _steps(array: Array) -> list[int]:
    """The strides that matter: an axis of length 1 may have any."""
    pairs = zip(array.strides, array.shape, strict=True)
    return [stride for stride, length in pairs if length > 1]


def may_overlap_itself(array: Array) -> bool:
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
