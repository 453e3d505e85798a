"""How a refused call is checked, and what every norm refuses: for the tests of errors."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from cbn.layers import NormLayer


def check_refused(call, error, text):
    """Call is a partial: it must raise this very error, and change no array and no layer."""
    before = snapshot(call)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text
    assert snapshot(call) == before


def snapshot(call):
    """All arrays that a call can reach: its arguments, and what a layer among them holds."""
    values = [getattr(call.func, "__self__", call.func), *call.args, *call.keywords.values()]
    for value in list(values):
        if isinstance(value, NormLayer):
            values += vars(value).values()
    return [
        (id(value), value.tobytes() if isinstance(value, np.ndarray) else None) for value in values
    ]


def by_arguments(rows):
    """Rows of a table whose first column is the keyword arguments, which make its id."""
    return [
        pytest.param(*row, id=",".join(f"{name}={value}" for name, value in row[0].items()))
        for row in rows
    ]


def read_only(array):
    array.flags.writeable = False
    return array


# ----------------------------------------------------------------- plain arguments of constructors

NON_NEGATIVE = "eps: expected a finite number >= 0, got "
AXIS = "channel_axis: expected 1 (channels first) or -1 (channels last), got "
MOMENTUM = "momentum: expected a finite number, or None for the cumulative average, got "
FLOAT = "dtype: expected NumPy's float32 or float64, got "


def no_positive_integer(name):
    text = f"{name}: expected a positive integer, got "
    values = (0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)
    values += ("3", TypeError), (None, TypeError)
    return [(value, error, f"{text}{value!r}") for value, error in values]


def no_flag(name):
    text = f"{name}: expected True or False, got "
    return [(value, TypeError, f"{text}{value!r}") for value in (1, "no", None)]


BAD_PLAIN_VALUES = {
    "num_features": no_positive_integer("num_features"),
    "num_groups": no_positive_integer("num_groups"),
    "num_channels": no_positive_integer("num_channels"),
    "eps": [
        (-1e-5, ValueError, NON_NEGATIVE + "-1e-05"),
        (float("nan"), ValueError, NON_NEGATIVE + "nan"),
        (float("inf"), ValueError, NON_NEGATIVE + "inf"),
        ("1e-5", TypeError, NON_NEGATIVE + "'1e-5'"),
        (None, TypeError, NON_NEGATIVE + "None"),
        (True, TypeError, NON_NEGATIVE + "True"),
        ([1e-5], TypeError, NON_NEGATIVE + "[1e-05]"),
        (1j, TypeError, NON_NEGATIVE + "1j"),
    ],
    "momentum": [
        (float("nan"), ValueError, MOMENTUM + "nan"),
        (float("-inf"), ValueError, MOMENTUM + "-inf"),
        ("0.1", TypeError, MOMENTUM + "'0.1'"),
    ],
    "affine": no_flag("affine"),
    "elementwise_affine": no_flag("elementwise_affine"),
    "track_running_stats": no_flag("track_running_stats"),
    "device": [
        (
            "cuda",
            ValueError,
            "device: expected None or 'cpu', got 'cuda'; cbn runs on the CPU only",
        )
    ],
    "dtype": [
        (np.int32, TypeError, FLOAT + "int32"),
        ("float16", TypeError, FLOAT + "float16"),
        (">f4", TypeError, FLOAT + ">f4"),
        ("single-ish", TypeError, FLOAT + "'single-ish'"),
    ],
    "bias": no_flag("bias"),
    "channel_axis": [
        (2, ValueError, AXIS + "2"),
        (0, ValueError, AXIS + "0"),
        (True, ValueError, AXIS + "True"),
        ("last", ValueError, AXIS + "'last'"),
    ],
    "correction": [
        (-1, ValueError, "correction: expected a finite number >= 0, got -1"),
        ("1", TypeError, "correction: expected a finite number >= 0, got '1'"),
    ],
}


def bad_plain_values(*names):
    """Rows for by_arguments."""
    return [
        ({name: value}, error, text)
        for name in names
        for value, error, text in BAD_PLAIN_VALUES[name]
    ]


# ------------------------------------------------ arrays in place of a float32 one of this shape

C = 3
SHAPE = (4, C, 2, 2)
STRIDES = (48, 16, 8, 4)

CONVERT = "; convert it first, for example with {name}.astype(numpy.float32)"
CONVERT_LIST = "; convert it first, for example with numpy.asarray({name}, numpy.float32)"

NOT_FLOATS = {
    "int": (np.ones(SHAPE, np.int32), "int32"),
    "bool": (np.ones(SHAPE, bool), "bool"),
    "complex": (np.ones(SHAPE, np.complex64), "complex64"),
    "half": (np.ones(SHAPE, np.float16), "float16"),
    "object": (np.ones(SHAPE, object), "object"),
    "string": (np.full(SHAPE, "1"), "<U1"),
    "list-of-bools": (np.ones(SHAPE, bool).tolist(), "bool"),
    "list-of-complex": (np.ones(SHAPE, complex).tolist(), "complex128"),
}

BAD_OUTS = {
    "list": ([0.0], TypeError, "out: expected an array, got list"),
    "shape": (
        np.ones((4, C, 2, 1), np.float32),
        ValueError,
        "out: expected shape (4, 3, 2, 2), got (4, 3, 2, 1)",
    ),
    "dtype": (
        np.ones(SHAPE),
        TypeError,
        "out: expected float32, got float64 in an array of shape (4, 3, 2, 2)",
    ),
    "byte-order": (
        np.ones(SHAPE, ">f4"),
        TypeError,
        "out: expected float32, got >f4 in an array of shape (4, 3, 2, 2)",
    ),
    "read-only": (
        read_only(np.ones(SHAPE, np.float32)),
        ValueError,
        "out: expected a writable array, got a read-only one of shape (4, 3, 2, 2)",
    ),
    "broadcast": (
        as_strided(np.ones(48, np.float32), SHAPE, (0, 16, 8, 4)),
        ValueError,
        "out: expected an array that does not overlap itself, "
        "got shape (4, 3, 2, 2) with strides (0, 16, 8, 4)",
    ),
    "windows": (
        as_strided(np.ones(48, np.float32), SHAPE, (32, 16, 8, 4)),
        ValueError,
        "out: expected an array that does not overlap itself, "
        "got shape (4, 3, 2, 2) with strides (32, 16, 8, 4)",
    ),
}


OVERLAPS = ("shifted", "reversed", "transposed")


def overlapping(how):
    """Two arrays of the usual shape that share some of their memory, and the strides of each."""
    memory = np.random.default_rng(1).standard_normal((5, C, 2, 2), np.float32)
    first = memory[:4]
    if how == "shifted":
        return first, memory[1:], STRIDES
    if how == "reversed":
        return first, first[::-1], (-48, 16, 8, 4)
    assert how == "transposed"
    return first, first.swapaxes(2, 3), (48, 16, 4, 8)


def overlap_text(name, strides):
    return (
        f"out: expected memory apart from {name}, or {name} itself, got a partial overlap "
        f"(shape (4, 3, 2, 2), strides {strides} over strides {STRIDES})"
    )


def unusable(seen, eps=1e-5, channel="2", name="running_var"):
    """Of a variance that nothing can be normalised by."""
    return (
        f"{name}: expected {name} + eps above 0 in every channel, got {seen} with eps={eps:g} in "
        f"channel {channel}; a variance is at least 0, and one of 0 needs an eps above 0"
    )


COPY = "train a copy (copy.deepcopy), or use eval mode"
IN_PLACE = "which training updates in place"
BAD_RUNNING = {
    "list": ([0.0, 1.0, 2.0], TypeError, f"expected an array, {IN_PLACE}, got list"),
    "scalar": (1.0, TypeError, f"expected an array, {IN_PLACE}, got float"),
    "read-only": (
        read_only(np.ones(C)),
        ValueError,
        f"expected a writable array, {IN_PLACE}, got a read-only one of shape (3,); {COPY}",
    ),
    "strided": (
        np.ones((C, 2))[:, 0],
        ValueError,
        f"expected a contiguous, aligned array in native byte order, {IN_PLACE}, "
        f"got strides (16,) and dtype {np.dtype(float).str}",
    ),
    "byte-order": (
        np.ones(C, np.dtype(float).newbyteorder()),
        ValueError,
        f"expected a contiguous, aligned array in native byte order, {IN_PLACE}, "
        f"got strides (8,) and dtype {np.dtype(float).newbyteorder().str}",
    ),
}


# -------------------------------------------------------------------------- the order of the calls

NO_FORWARD = "backward: expected a forward call before it, got none on this layer"
OVERWRITTEN = (
    "backward: expected the input of the last forward call to be intact, "
    "got one that an out= wrote over; give that call another out"
)
