"""Refusals of what is no array: arguments of constructors, functions and settings.

Their kinds, their exact words, and that they change nothing.
"""

from functools import partial
from inspect import signature

import numpy as np
import pytest
from norms_table import NORMS
from processes import run_python
from refusals import AXIS, NON_NEGATIVE, C, Scene, by_arguments, check_refused, unusable

import cbn
from cbn import functional
from cbn.functional import batch_norm_stats, group_norm, group_norm_backward

NAN, INFINITY = float("nan"), float("inf")


def bad(text, values=(), types=()):
    """Rows of what is refused, and of the error, whose text ends in what it has got."""
    return [
        *((value, ValueError, f"{text}{value!r}") for value in values),
        *((value, TypeError, f"{text}{value!r}") for value in types),
    ]


# ------------------------------------------------------------------------------------ constructors

POSITIVE = "expected a positive integer, got "
FLAG = "expected True or False, got "
MOMENTUM = "momentum: expected a finite number, or None for the cumulative average, got "
CORRECTION = "correction: expected a finite number >= 0, got "
DTYPE = "dtype: expected NumPy's float32 or float64, got "
LENGTH = f"normalized_shape: {POSITIVE}"
NO_LENGTH = "normalized_shape: expected at least one length, got none"

BAD_ARGUMENTS = {
    **{
        name: bad(f"{name}: {POSITIVE}", [0, -1], [2.5, True, "3", None])
        for name in ("num_features", "num_groups", "num_channels")
    },
    "normalized_shape": [
        *bad(LENGTH, [0, -4], [2.5, True, None, "4", b"4", {4: 6}, {4, 6}, np.array(2.0)]),
        ((4, 0), ValueError, LENGTH + "0"),
        ([4, -6], ValueError, LENGTH + "-6"),
        ((4, 6.0), TypeError, LENGTH + "6.0"),
        ((4, "6"), TypeError, LENGTH + "'6'"),
        ([True], TypeError, LENGTH + "True"),
        ([[4, 6]], TypeError, LENGTH + "[4, 6]"),
        (np.array([4, 0]), ValueError, LENGTH + repr(np.array([4, 0])[1])),
        (np.array([2.0]), TypeError, LENGTH + repr(np.array([2.0])[0])),
        ((), ValueError, NO_LENGTH),
        (np.array([], int), ValueError, NO_LENGTH),
        (
            [1] * 70,
            ValueError,
            "normalized_shape: expected at most 64 lengths, as many as NumPy's arrays have axes, "
            "got 70",
        ),
    ],
    "eps": [
        *bad(NON_NEGATIVE, [-1e-5, NAN, INFINITY], ["1e-5", None, True, [1e-5], 1j]),
        (10**400, ValueError, NON_NEGATIVE + "an integer beyond floats"),
    ],
    "momentum": bad(MOMENTUM, [NAN, -INFINITY], ["0.1"]),
    **{
        name: bad(f"{name}: {FLAG}", types=[1, "no", None])
        for name in ("affine", "elementwise_affine", "track_running_stats", "bias")
    },
    "device": [
        (
            "cuda",
            ValueError,
            "device: expected None or 'cpu', got 'cuda'; cbn runs on the CPU only",
        )
    ],
    "dtype": [
        (np.int32, TypeError, DTYPE + "int32"),
        ("float16", TypeError, DTYPE + "float16"),
        (">f4", TypeError, DTYPE + ">f4"),
        ("single-ish", TypeError, DTYPE + "'single-ish'"),
    ],
    "channel_axis": bad(AXIS, [2, 0, True, "last", [1]]),
    "correction": bad(CORRECTION, [-1], ["1"]),
    "nonfinite": bad(
        "nonfinite: expected one of ('propagate', 'raise', 'skip'), got ", ["stop", None]
    ),
    "activation": bad(
        "activation: expected one of (None, 'relu'), got ", ["gelu", True, np.maximum]
    ),
    "running_mean": [
        (
            [1.0, 2.0],
            ValueError,
            "running_mean: expected a scalar or shape (3,), got shape (2,)",
        ),
        (
            np.ones(C, np.int32),
            TypeError,
            "running_mean: expected float32 or float64, got int32; "
            "convert it first, for example with running_mean.astype(numpy.float32)",
        ),
    ],
    "running_var": [
        (
            np.ones((C, 1)),
            ValueError,
            "running_var: expected a scalar or shape (3,), got shape (3, 1)",
        ),
        (-1, ValueError, unusable("-1", channel="0 and 2 more")),
        ([1, 2, NAN], ValueError, unusable("nan")),
    ],
}
NOT_BAD = {("RMSNorm", "eps", None)}  # which is its default


@pytest.mark.parametrize(
    ("norm", "arguments", "error", "text"),
    [
        pytest.param(norm, {name: value}, error, text, id=f"{norm.name}-{name}={value}")
        for norm in NORMS.values()
        for name in signature(getattr(cbn, norm.name)).parameters
        for value, error, text in BAD_ARGUMENTS[name]
        if value.__hash__ is None or (norm.name, name, value) not in NOT_BAD
    ],
)
def test_every_argument_of_a_constructor(norm, arguments, error, text):
    call = partial(getattr(cbn, norm.name), **{**norm.arguments(C), **arguments})
    check_refused(call, error, text)


UNTRACKED = "expected None with track_running_stats=False, got a value that nothing would use"


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    by_arguments(
        [
            ({"running_var": [1, 0, 0], "eps": 0}, unusable("0", 0, "1 and 1 more")),
            ({"running_var": [1, 2, -1e-5], "dtype": float}, unusable("-1e-05")),
            ({"track_running_stats": False, "running_mean": 0.0}, f"running_mean: {UNTRACKED}"),
            ({"track_running_stats": False, "running_var": 1.0}, f"running_var: {UNTRACKED}"),
        ]
    ),
)
def test_statistics_to_start_with_that_do_not_fit_other_arguments(name, arguments, text):
    check_refused(partial(getattr(cbn, name), C, **arguments), ValueError, text)


# -------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    "function", ["layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward"]
)
@pytest.mark.parametrize(("value", "error", "text"), BAD_ARGUMENTS["normalized_shape"], ids=str)
def test_normalized_shape_of_a_function(function, value, error, text):
    arrays = [np.ones((3, 4, 6))] * (2 if function.endswith("backward") else 1)
    check_refused(partial(getattr(functional, function), *arrays, value), error, text)


@pytest.mark.parametrize(("groups", "channels"), [(3, 4), (4, 6), (8, 4)])
def test_groups_of_unequal_size(groups, channels):
    x = np.ones((2, channels, 5))
    text = f"num_groups: expected a divisor of the {channels} channels, got {groups}"
    for call in (
        partial(cbn.GroupNorm, groups, channels),
        partial(group_norm, x, groups),
        partial(group_norm, np.moveaxis(x, 1, -1), groups, channel_axis=-1),
        partial(group_norm_backward, x, x, groups),
    ):
        check_refused(call, ValueError, text)


BAD_OPTIONS = {
    "channel_axis": bad(AXIS, [2, False]),
    "eps": bad(NON_NEGATIVE, [-1.0, NAN], ["0"]),
    "training": bad(f"training: {FLAG}", types=[1, "yes"]),
    "use_input_stats": bad(f"use_input_stats: {FLAG}", types=[1]),
    "momentum": bad("momentum: expected a finite number, got ", [NAN], [None, "0.1"]),
    "correction": bad(CORRECTION, [-1.0], [None]),
    "num_groups": [
        *bad(f"num_groups: {POSITIVE}", [0], [1.0, True]),
        (2, ValueError, "num_groups: expected a divisor of the 3 channels, got 2"),
    ],
}
OF_GRADIENTS = {"channel_axis", "eps", "training", "num_groups"}
OF_FUNCTIONS = {
    "batch": ("channel_axis", "eps", "training", "momentum", "correction"),
    "batch-eval": ("channel_axis", "eps", "momentum", "correction"),
    "instance": ("channel_axis", "eps", "use_input_stats", "momentum", "correction"),
    "instance-eval": ("channel_axis", "eps", "momentum", "correction"),
    "group": ("channel_axis", "eps", "num_groups"),
    "layer": ("eps",),
    "rms": ("eps",),
}


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "text"),
    [
        pytest.param(kind, {name: value}, error, text, id=f"{kind}-{name}={value}")
        for kind, names in OF_FUNCTIONS.items()
        for name in names
        for value, error, text in BAD_OPTIONS[name]
    ],
)
def test_options_of_functions(kind, arguments, error, text):
    scene = Scene(kind)
    check_refused(partial(scene.function, scene.x, **arguments), error, text)
    if scene.gradients and arguments.keys() <= OF_GRADIENTS:
        check_refused(
            partial(scene.gradients, scene.grad_output, scene.x, **arguments), error, text
        )


def test_channel_axis_of_statistics():
    call = partial(batch_norm_stats, np.ones((2, C)), channel_axis=0)
    check_refused(call, ValueError, AXIS + "0")


# ------------------------------------------------------------------- threads and instruction sets


@pytest.mark.parametrize(
    "function",
    [cbn.set_num_threads, lambda n: cbn.num_threads(n).__enter__()],
    ids=["set_num_threads", "num_threads"],
)
@pytest.mark.parametrize(
    ("value", "error", "text"),
    bad(
        f"num_threads: {POSITIVE}",
        [0, -1, np.int64(0)],
        [1.0, 2.5, True, np.bool(True), "2", None],
    ),
)
def test_number_of_threads(function, value, error, text):
    before = cbn.get_num_threads()
    check_refused(partial(function, value), error, text)
    assert cbn.get_num_threads() == before


def test_too_many_threads():
    text = "num_threads: expected at most 4096 threads, got 4097"
    check_refused(partial(cbn.set_num_threads, 4097), ValueError, text)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        *(
            ("CBN_NUM_THREADS", value, "expected a positive integer up to 4096")
            for value in ("", "0", "-1", "1.5", "2.5", " 2", "two", "all", "²")
        ),
        ("CBN_ISA", "avx2", "expected an instruction set (x86_64_v4, x86_64_v3, baseline)"),
    ],
)
def test_environment(variable, value, expected):
    run = run_python("-c", "import cbn", **{variable: value})
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == (
        f"ValueError: environment variable {variable}: {expected}, "
        f"got {value!r}; correct it or unset it"
    )


def test_mode_of_show_config():
    text = "mode: expected 'stdout' or 'dicts', got 'json'"
    check_refused(partial(cbn.show_config, "json"), ValueError, text)
