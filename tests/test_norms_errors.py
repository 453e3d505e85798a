"""Every refusal of instance, group, layer and RMS norm: its kind, its exact words, no change."""

import re
from functools import partial

import numpy as np
import pytest
from refusals import (
    AXIS,
    BAD_OUTS,
    BAD_RUNNING,
    CONVERT,
    CONVERT_LIST,
    COPY,
    NO_FORWARD,
    NON_NEGATIVE,
    NOT_FLOATS,
    OVERLAPS,
    OVERWRITTEN,
    SHAPE,
    C,
    bad_plain_values,
    by_arguments,
    check_refused,
    overlap_text,
    overlapping,
    read_only,
)

import cbn
from cbn.functional import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)

LAST = (2, 2)  # axes of SHAPE
KINDS = ("instance", "instance-eval", "group", "layer", "rms")
PARAMETERS = dict.fromkeys(KINDS, ("weight", "bias")) | {"rms": ("weight",)}


class Scene:
    """A layer after a call and its backward pass, the functions of its kind, and their arrays.

    In training instance norm learns running statistics, by which it normalises in eval mode.
    """

    def __init__(self, kind):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal(SHAPE, np.float32)
        self.dy = rng.standard_normal(SHAPE, np.float32)
        running = {name: rng.random(C, np.float32) for name in ("running_mean", "running_var")}
        by_running = {**running, "use_input_stats": False}
        self.parameter_shape = LAST if kind in ("layer", "rms") else (C,)
        self.layer, self.function, self.gradients = {
            "instance": lambda: (
                cbn.InstanceNorm2d(C, affine=True, track_running_stats=True),
                partial(instance_norm, **running),
                instance_norm_backward,
            ),
            "instance-eval": lambda: (
                cbn.InstanceNorm2d(C, affine=True, track_running_stats=True).eval(),
                partial(instance_norm, **by_running),
                None,
            ),
            "group": lambda: (
                cbn.GroupNorm(1, C),
                partial(group_norm, num_groups=1),
                partial(group_norm_backward, num_groups=1),
            ),
            "layer": lambda: (
                cbn.LayerNorm(LAST),
                partial(layer_norm, normalized_shape=LAST),
                partial(layer_norm_backward, normalized_shape=LAST),
            ),
            "rms": lambda: (
                cbn.RMSNorm(LAST),
                partial(rms_norm, normalized_shape=LAST),
                partial(rms_norm_backward, normalized_shape=LAST),
            ),
        }[kind]()
        self.layer(self.x)
        self.layer.backward(self.dy)

    def with_(self, **attributes):
        for name, value in attributes.items():
            setattr(self.layer, name, value)
        return self.layer


def each_kind(calls):
    """Every kind with every call that it has."""
    return pytest.mark.parametrize(
        ("kind", "call"),
        [
            (kind, call)
            for kind in KINDS
            for call in calls
            if not (kind == "instance-eval" and call.startswith("gradients"))
        ],
    )


EACH = pytest.mark.parametrize("kind", KINDS)

# ------------------------------------------------------------------------------------ constructors

LENGTH = "normalized_shape: expected a positive integer, got "
BAD_NORMALIZED_SHAPES = [
    (0, ValueError, LENGTH + "0"),
    (-4, ValueError, LENGTH + "-4"),
    (2.5, TypeError, LENGTH + "2.5"),
    (True, TypeError, LENGTH + "True"),
    (None, TypeError, LENGTH + "None"),
    ("4", TypeError, LENGTH + "'4'"),
    (b"4", TypeError, LENGTH + "b'4'"),
    ({4: 6}, TypeError, LENGTH + "{4: 6}"),
    ({4, 6}, TypeError, LENGTH + "{4, 6}"),
    ((4, 0), ValueError, LENGTH + "0"),
    ([4, -6], ValueError, LENGTH + "-6"),
    ((4, 6.0), TypeError, LENGTH + "6.0"),
    ((4, "6"), TypeError, LENGTH + "'6'"),
    ([True], TypeError, LENGTH + "True"),
    ([[4, 6]], TypeError, LENGTH + "[4, 6]"),
    (np.array(2.0), TypeError, LENGTH + "array(2.)"),
    (np.array([4, 0]), ValueError, LENGTH + repr(np.array([4, 0])[1])),
    (np.array([2.0]), TypeError, LENGTH + repr(np.array([2.0])[0])),
    ((), ValueError, "normalized_shape: expected at least one length, got none"),
    (np.array([], int), ValueError, "normalized_shape: expected at least one length, got none"),
]

INSTANCE_NORMS = (cbn.InstanceNorm1d, cbn.InstanceNorm2d, cbn.InstanceNorm3d)
CHANNEL_ARGUMENTS = ("eps", "affine", "device", "dtype", "bias", "channel_axis")
ROW_ARGUMENTS = ("eps", "elementwise_affine", "device", "dtype")
# What is needed to make a layer, and the plain arguments that it takes.
CONSTRUCTORS = {
    **dict.fromkeys(
        INSTANCE_NORMS,
        (
            {"num_features": C},
            (
                *("num_features", "momentum", "track_running_stats", "correction"),
                *CHANNEL_ARGUMENTS,
            ),
        ),
    ),
    cbn.GroupNorm: (
        {"num_groups": 2, "num_channels": 4},
        ("num_groups", "num_channels", *CHANNEL_ARGUMENTS),
    ),
    cbn.LayerNorm: ({"normalized_shape": LAST}, ("bias", *ROW_ARGUMENTS)),
    cbn.RMSNorm: ({"normalized_shape": LAST}, ROW_ARGUMENTS),
}


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "text"),
    [
        pytest.param(layer, *row, id=f"{layer.__name__}-{name}={value}")
        for layer, (_, names) in CONSTRUCTORS.items()
        for row in bad_plain_values(*names)
        for name, value in row[0].items()
        if (layer, name, value) != (cbn.RMSNorm, "eps", None)  # which is its default
    ],
)
def test_constructor(layer, arguments, error, text):
    needed, _ = CONSTRUCTORS[layer]
    check_refused(partial(layer, **{**needed, **arguments}), error, text)


@pytest.mark.parametrize("make", [cbn.LayerNorm, cbn.RMSNorm, layer_norm, rms_norm])
@pytest.mark.parametrize(("value", "error", "text"), BAD_NORMALIZED_SHAPES, ids=str)
def test_normalized_shape(make, value, error, text):
    x = [] if isinstance(make, type) else [np.ones((3, 4, 6))]
    check_refused(partial(make, *x, value), error, text)


@pytest.mark.parametrize("function", [layer_norm_backward, rms_norm_backward])
@pytest.mark.parametrize(("value", "error", "text"), BAD_NORMALIZED_SHAPES, ids=str)
def test_normalized_shape_of_gradients(function, value, error, text):
    x = np.ones((3, 4, 6))
    check_refused(partial(function, x, x, value), error, text)


@pytest.mark.parametrize(("groups", "channels"), [(3, 4), (4, 6), (8, 4)])
def test_groups_of_unequal_size(groups, channels):
    text = f"num_groups: expected a divisor of the {channels} channels, got {groups}"
    check_refused(partial(cbn.GroupNorm, groups, channels), ValueError, text)
    x = np.ones((2, channels, 5))
    check_refused(partial(group_norm, x, groups), ValueError, text)
    check_refused(partial(group_norm_backward, x, x, groups), ValueError, text)
    last = np.moveaxis(x, 1, -1)
    check_refused(partial(group_norm, last, groups, channel_axis=-1), ValueError, text)


# ------------------------------------------------------------------------------ shape of the input

RANKS = {
    (cbn.InstanceNorm1d, 1): "(N, C, L) or (C, L)",
    (cbn.InstanceNorm1d, -1): "(N, L, C) or (L, C)",
    (cbn.InstanceNorm2d, 1): "(N, C, H, W) or (C, H, W)",
    (cbn.InstanceNorm2d, -1): "(N, H, W, C) or (H, W, C)",
    (cbn.InstanceNorm3d, 1): "(N, C, D, H, W) or (C, D, H, W)",
    (cbn.InstanceNorm3d, -1): "(N, D, H, W, C) or (D, H, W, C)",
}


@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize("tracking", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize(("layer", "axis"), RANKS)
def test_rank_of_instance_norm(layer, axis, tracking, ndim):
    accepted = RANKS[layer, axis]
    shape = (4,) * ndim
    norm = layer(4, channel_axis=axis, track_running_stats=tracking).train(not tracking)
    x = np.ones(shape, np.float32)
    if ndim in [part.count(",") + 1 for part in accepted.split(" or ")]:
        assert norm(x).shape == shape
    else:
        text = f"x: expected {accepted}, got {ndim} axes in shape {shape}"
        check_refused(partial(norm, x), ValueError, text)


@pytest.mark.parametrize(
    ("layer", "channel_axis", "shape", "axis"),
    [
        (cbn.InstanceNorm1d, 1, (3, 4, 3), 1),
        (cbn.InstanceNorm1d, 1, (4, 3), 0),
        (cbn.InstanceNorm1d, -1, (3, 3, 4), 2),
        (cbn.InstanceNorm1d, -1, (3, 4), 1),
        (cbn.InstanceNorm2d, 1, (3, 4, 3, 3), 1),
        (cbn.InstanceNorm2d, 1, (4, 3, 3), 0),
        (cbn.InstanceNorm2d, -1, (3, 3, 3, 4), 3),
        (cbn.InstanceNorm3d, 1, (3, 4, 3, 3, 3), 1),
        (cbn.InstanceNorm3d, -1, (3, 3, 3, 4), 3),
        (partial(cbn.GroupNorm, 3), 1, (3, 4), 1),
        (partial(cbn.GroupNorm, 3), 1, (3, 4, 3, 3), 1),
        (partial(cbn.GroupNorm, 3), 1, (3, 4, 3, 5), 1),
        (partial(cbn.GroupNorm, 3), -1, (3, 5, 3, 4), 3),
        (partial(cbn.GroupNorm, 3), -1, (3, 4), 1),
        (partial(cbn.GroupNorm, 3), -1, (3, 3, 3, 4), 3),
    ],
    ids=lambda value: str(value) if type(value) is tuple else None,
)
def test_number_of_channels(layer, channel_axis, shape, axis):
    call = partial(layer(C, channel_axis=channel_axis), np.ones(shape, np.float32))
    text = f"x: expected 3 channels on axis {axis}, got 4 in shape {shape}"
    if shape[-1] == C:
        text += "; if the channels are last, make the layer with channel_axis=-1"
    elif len(shape) > 2 and shape[1] == C:
        text += "; if the channels are first, make the layer with channel_axis=1"
    check_refused(call, ValueError, text)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_group_norm_needs_two_axes(shape, channel_axis):
    x = np.ones(shape, np.float32)
    text = f"x: expected at least 2 axes, got {len(shape)} in shape {shape}"
    for call in (
        partial(cbn.GroupNorm(1, C, channel_axis=channel_axis), x),
        partial(group_norm, x, 1, channel_axis=channel_axis),
        partial(group_norm_backward, x, x, 1, channel_axis=channel_axis),
    ):
        check_refused(call, ValueError, text)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_functional_instance_norm_needs_three_axes(shape, channel_axis):
    x, mean, var = np.ones(shape, np.float32), np.zeros(C), np.ones(C)
    text = f"x: expected at least 3 axes, got {len(shape)} in shape {shape}"
    for call in (
        partial(instance_norm, x, channel_axis=channel_axis),
        partial(instance_norm, x, mean, var, None, None, False, channel_axis=channel_axis),
        partial(instance_norm_backward, x, x, channel_axis=channel_axis),
    ):
        check_refused(call, ValueError, text)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (2, 5), (5, 3), (4, 5, 3), (3, 5, 1)], ids=str)
def test_last_axes(shape):
    x = np.ones(shape, np.float32)
    text = f"x: expected the last axes to be (3, 5), that is normalized_shape, got shape {shape}"
    for layer in (cbn.LayerNorm((3, 5)), cbn.RMSNorm([3, 5])):
        check_refused(partial(layer, x), ValueError, text)
    for function in (layer_norm, rms_norm):
        check_refused(partial(function, x, (3, 5)), ValueError, text)
    for function in (layer_norm_backward, rms_norm_backward):
        check_refused(partial(function, x, x, (3, 5)), ValueError, text)


@pytest.mark.parametrize(
    ("layer", "samples", "positions", "correction", "needed"),
    [
        (cbn.InstanceNorm1d, (4,), (1,), 1, "1 value"),
        (cbn.InstanceNorm1d, (4,), (1,), 0, "1 value"),
        (cbn.InstanceNorm1d, (), (1,), 1, "1 value"),
        (cbn.InstanceNorm1d, (9,), (2,), 2, "2 values"),
        (cbn.InstanceNorm1d, (9,), (2,), 2.5, "2.5 values"),
        (cbn.InstanceNorm2d, (4,), (1, 1), 1, "1 value"),
        (cbn.InstanceNorm2d, (), (1, 1), 1, "1 value"),
        (cbn.InstanceNorm2d, (9,), (2, 3), 7, "7 values"),
        (cbn.InstanceNorm3d, (4,), (1, 1, 1), 1, "1 value"),
    ],
    ids=lambda value: str(value) if type(value) is tuple else None,
)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("through", ["layer", "function"])
def test_too_few_values_in_a_sample(
    through, channel_axis, layer, samples, positions, correction, needed
):
    """However many samples there are."""
    options = {"channel_axis": channel_axis, "correction": correction}
    if through == "function":
        samples = samples or (1,)  # it takes no single samples
    shape = (*samples, C, *positions) if channel_axis == 1 else (*samples, *positions, C)
    x = np.ones(shape, np.float32)
    if through == "layer":
        call = partial(layer(C, track_running_stats=True, **options), x)
    else:
        call = partial(instance_norm, x, np.zeros(C), np.ones(C), **options)
    text = (
        f"x: expected more than {needed} per channel of a sample, got {np.prod(positions)} in "
        f"shape {shape}; use larger samples, or BatchNorm or LayerNorm"
    )
    check_refused(call, ValueError, text)


def test_one_value_is_too_few_without_statistics_to_learn_too():
    x = np.ones((4, C, 1), np.float32)
    text = (
        "x: expected more than 1 value per channel of a sample, got 1 in shape (4, 3, 1); "
        "use larger samples, or BatchNorm or LayerNorm"
    )
    for call in (
        partial(cbn.InstanceNorm1d(C), x),
        partial(cbn.InstanceNorm1d(C).eval(), x),
        partial(instance_norm, x, correction=9),
    ):
        check_refused(call, ValueError, text)


# ------------------------------------------------------------------------- element type of the data

DATA_CALLS = {
    "layer": ("x", lambda s, value: partial(s.layer, value)),
    "layer-backward": ("grad_output", lambda s, value: partial(s.layer.backward, value)),
    "function": ("x", lambda s, value: partial(s.function, value)),
    "gradients": ("grad_output", lambda s, value: partial(s.gradients, value, s.x)),
    "gradients-x": ("x", lambda s, value: partial(s.gradients, s.dy, value)),
}


@each_kind(DATA_CALLS)
def test_none_for_data(kind, call):
    name, prepare = DATA_CALLS[call]
    text = f"{name}: expected an array of float32 or float64, got None"
    check_refused(prepare(Scene(kind), None), TypeError, text)


@each_kind(DATA_CALLS)
@pytest.mark.parametrize("what", NOT_FLOATS)
def test_not_floats(what, kind, call):
    value, dtype = NOT_FLOATS[what]
    name, prepare = DATA_CALLS[call]
    remedy = CONVERT_LIST if isinstance(value, list) else CONVERT
    text = f"{name}: expected float32 or float64, got {dtype}" + remedy.format(name=name)
    check_refused(prepare(Scene(kind), value), TypeError, text)


@each_kind(DATA_CALLS)
def test_masked_array(kind, call):
    name, prepare = DATA_CALLS[call]
    text = (
        f"{name}: expected an array without a mask, got a masked array; "
        f"fill it first with {name}.filled(value)"
    )
    check_refused(prepare(Scene(kind), np.ma.ones(SHAPE, np.float32)), TypeError, text)


@each_kind(DATA_CALLS)
def test_ragged_lists(kind, call):
    name, prepare = DATA_CALLS[call]
    text = f"{name}: expected an array, got sequences of unequal lengths"
    check_refused(prepare(Scene(kind), [[1.0, 2.0], [3.0]]), ValueError, text)


@each_kind(["layer", "layer-backward", "gradients"])
def test_the_other_float(kind, call):
    name, prepare = DATA_CALLS[call]
    text = (
        f"{name}: expected float32, got float64; "
        f"convert it with {name}.astype(numpy.float32), or use float64 throughout"
    )
    check_refused(prepare(Scene(kind), np.ones(SHAPE)), TypeError, text)


# ------------------------------------------------------------------------------------------ outputs

OUT_CALLS = {
    "layer": lambda s, out: partial(s.layer, s.x, out=out),
    "layer-backward": lambda s, out: partial(s.layer.backward, s.dy, out=out),
    "function": lambda s, out: partial(s.function, s.x, out=out),
    "gradients": lambda s, out: partial(s.gradients, s.dy, s.x, out=out),
}
FORWARD = ("layer", "function")
BACKWARD = ("layer-backward", "gradients")


@each_kind(OUT_CALLS)
@pytest.mark.parametrize("what", BAD_OUTS)
def test_out(what, kind, call):
    out, error, text = BAD_OUTS[what]
    check_refused(OUT_CALLS[call](Scene(kind), out), error, text)


@each_kind(FORWARD)
@pytest.mark.parametrize("how", OVERLAPS)
def test_out_over_part_of_x(how, kind, call):
    scene = Scene(kind)
    scene.x, out, strides = overlapping(how)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("x", strides))


@each_kind(BACKWARD)
@pytest.mark.parametrize("how", OVERLAPS)
def test_out_over_part_of_grad_output(how, kind, call):
    scene = Scene(kind)
    scene.dy, out, strides = overlapping(how)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("grad_output", strides))


@each_kind(BACKWARD)
@pytest.mark.parametrize("how", OVERLAPS)
def test_out_of_backward_over_part_of_x(how, kind, call):
    scene = Scene(kind)
    scene.x, out, strides = overlapping(how)
    scene.layer(scene.x)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("x", strides))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in PARAMETERS[kind]]
    + [(kind, name) for kind in KINDS[:2] for name in ("running_mean", "running_var")],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_over_a_parameter_or_statistic(kind, name, order):
    scene = Scene(kind)
    out = np.ones(SHAPE, np.float32, order=order)
    shape = scene.parameter_shape
    inside = {name: out.ravel("K")[: np.prod(shape)].reshape(shape)}
    text = f"out: expected memory apart from {name}, got an overlap in an array of shape {SHAPE}"
    check_refused(partial(scene.function, scene.x, **inside, out=out), ValueError, text)
    if name == "weight" and scene.gradients:
        call = partial(scene.gradients, scene.dy, scene.x, **inside, out=out)
        check_refused(call, ValueError, text)
    check_refused(partial(scene.with_(**inside), scene.x, out=out), ValueError, text)
    if name == "weight":
        check_refused(partial(scene.layer.backward, scene.dy, out=out), ValueError, text)


# -------------------------------------------------------------------------- parameters of functions


def shape_text(kind, name, shape, got):
    remark = ", one value per channel" if kind == "instance-eval" else ""
    return f"{name}: expected shape {shape}{remark}, got {got}"


PARAMETER = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in PARAMETERS[kind]]
)


@PARAMETER
@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (4,), (1, C), (C, 1), (2, 1), (1, 2, 2)], ids=str
)
@pytest.mark.parametrize("through", ["layer", "function"])
def test_shape_of_a_parameter(through, kind, name, shape):
    scene = Scene(kind)
    value = np.ones(shape, np.float32)
    text = shape_text(kind, name, scene.parameter_shape, shape)
    if through == "layer":
        call = partial(scene.with_(**{name: value}), scene.x)
        gradients = partial(scene.layer.backward, scene.dy)
    else:
        call = partial(scene.function, scene.x, **{name: value})
        gradients = scene.gradients and partial(scene.gradients, scene.dy, scene.x, weight=value)
    check_refused(call, ValueError, text)
    if name == "weight" and gradients:
        check_refused(gradients, ValueError, text)


@PARAMETER
@pytest.mark.parametrize("through", ["layer", "function"])
def test_dtype_of_a_parameter(through, kind, name):
    scene = Scene(kind)
    value = np.ones(scene.parameter_shape, complex)
    text = f"{name}: expected float32 or float64, got complex128" + CONVERT.format(name=name)
    if through == "layer":
        call = partial(scene.with_(**{name: value}), scene.x)
        gradients = partial(scene.layer.backward, scene.dy)
    else:
        call = partial(scene.function, scene.x, **{name: value})
        gradients = scene.gradients and partial(scene.gradients, scene.dy, scene.x, weight=value)
    check_refused(call, TypeError, text)
    if name == "weight" and gradients:
        check_refused(gradients, TypeError, text)


# ------------------------------------------------------------------ running arrays of instance norm

RUNNING = pytest.mark.parametrize(
    ("name", "other"), [("running_mean", "running_var"), ("running_var", "running_mean")]
)


@RUNNING
@pytest.mark.parametrize("kind", ["instance", "instance-eval"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, C), (C, 1)], ids=str)
def test_shape_of_a_running_array(kind, name, other, shape):
    scene = Scene(kind)
    text = f"{name}: expected shape (3,), one value per channel, got {shape}"
    value = np.ones(shape, np.float32)
    check_refused(partial(scene.function, scene.x, **{name: value}), ValueError, text)
    check_refused(partial(scene.with_(**{name: value}), scene.x), ValueError, text)


@RUNNING
@pytest.mark.parametrize("kind", ["instance", "instance-eval"])
def test_dtype_of_a_running_array(kind, name, other):
    scene = Scene(kind)
    text = f"{name}: expected float32 or float64, got complex128" + CONVERT.format(name=name)
    value = np.ones(C, complex)
    check_refused(partial(scene.function, scene.x, **{name: value}), TypeError, text)
    check_refused(partial(scene.with_(**{name: value}), scene.x), TypeError, text)


@RUNNING
def test_running_arrays_to_normalise_by_are_needed(name, other):
    scene = Scene("instance-eval")
    text = f"{name}: expected an array of shape (3,) when not training, got None"
    check_refused(partial(scene.function, scene.x, **{name: None}), ValueError, text)
    check_refused(partial(scene.with_(**{name: None}), scene.x), ValueError, text)


@RUNNING
def test_one_running_array_to_update(name, other):
    scene = Scene("instance")
    text = f"running_mean and running_var: expected both or neither, got {other} without {name}"
    check_refused(partial(scene.function, scene.x, **{name: None}), ValueError, text)
    check_refused(partial(scene.with_(**{name: None}), scene.x), ValueError, text)


@RUNNING
@pytest.mark.parametrize("what", BAD_RUNNING)
def test_running_arrays_to_update(what, name, other):
    scene = Scene("instance")
    value, error, text = BAD_RUNNING[what]
    check_refused(partial(scene.function, scene.x, **{name: value}), error, f"{name}: {text}")
    check_refused(partial(scene.with_(**{name: value}), scene.x), error, f"{name}: {text}")


@RUNNING
@pytest.mark.parametrize("order", ["C", "F"])
def test_running_arrays_within_the_input(name, other, order):
    scene = Scene("instance")
    x = np.asarray(scene.x, order=order)
    inside = x.ravel("K")[:C]
    text = f"{name} and x: expected memory of their own, got an overlap"
    check_refused(partial(scene.function, x, **{name: inside}), ValueError, text)
    check_refused(partial(scene.with_(**{name: inside}), x), ValueError, text)


def test_one_array_for_both_running_arrays():
    scene = Scene("instance")
    both = {"running_mean": np.ones(C), "running_var": None}
    both["running_var"] = both["running_mean"]
    text = "running_mean and running_var: expected memory of their own, got an overlap"
    check_refused(partial(scene.function, scene.x, **both), ValueError, text)
    check_refused(partial(scene.with_(**both), scene.x), ValueError, text)


# ------------------------------------------------------------------------ plain values of functions

NOT_A_NUMBER = "momentum: expected a finite number, got "
PLAIN_VALUES = {
    "channel_axis": [(2, ValueError, AXIS + "2"), (False, ValueError, AXIS + "False")],
    "eps": [(-1.0, ValueError, NON_NEGATIVE + "-1.0"), ("0", TypeError, NON_NEGATIVE + "'0'")],
    "use_input_stats": [(1, TypeError, "use_input_stats: expected True or False, got 1")],
    "momentum": [
        (None, TypeError, NOT_A_NUMBER + "None"),
        (float("nan"), ValueError, NOT_A_NUMBER + "nan"),
        ("0.1", TypeError, NOT_A_NUMBER + "'0.1'"),
    ],
    "correction": [
        (-1.0, ValueError, "correction: expected a finite number >= 0, got -1.0"),
        (None, TypeError, "correction: expected a finite number >= 0, got None"),
    ],
    "num_groups": [
        (0, ValueError, "num_groups: expected a positive integer, got 0"),
        (1.0, TypeError, "num_groups: expected a positive integer, got 1.0"),
        (True, TypeError, "num_groups: expected a positive integer, got True"),
        (2, ValueError, "num_groups: expected a divisor of the 3 channels, got 2"),
    ],
}
OF_FUNCTIONS = {
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
        for value, error, text in PLAIN_VALUES[name]
    ],
)
def test_plain_values_of_functions(kind, arguments, error, text):
    scene = Scene(kind)
    check_refused(partial(scene.function, scene.x, **arguments), error, text)
    if scene.gradients and arguments.keys() <= {"channel_axis", "eps", "num_groups"}:
        check_refused(partial(scene.gradients, scene.dy, scene.x, **arguments), error, text)


# -------------------------------------------------------------- live layers, and the order of calls


@EACH
@pytest.mark.parametrize(
    ("eps", "error"), [(-1.0, ValueError), (float("nan"), ValueError), (None, TypeError)]
)
def test_eps_of_a_layer(kind, eps, error):
    scene = Scene(kind)
    check_refused(partial(scene.with_(eps=eps), scene.x), error, f"{NON_NEGATIVE}{eps}")


COUNTER = (
    "num_batches_tracked: expected a writable array of shape () with an integer >= 0, got {!r}"
)


@pytest.mark.parametrize(
    ("attributes", "text"),
    by_arguments(
        [
            ({"momentum": float("nan")}, "momentum: expected a finite number, got nan"),
            ({"correction": -1}, "correction: expected a finite number >= 0, got -1"),
            ({"num_batches_tracked": None}, COUNTER.format(None)),
            ({"num_batches_tracked": 3}, COUNTER.format(3)),
            ({"num_batches_tracked": np.array(-1)}, COUNTER.format(np.array(-1))),
            ({"num_batches_tracked": np.array([1])}, COUNTER.format(np.array([1]))),
            (
                {"num_batches_tracked": read_only(np.array(3))},
                "num_batches_tracked: expected a writable array, which training updates in place, "
                f"got a read-only one of shape (); {COPY}",
            ),
        ]
    ),
)
def test_instance_norm_with_a_bad_attribute(attributes, text):
    scene = Scene("instance")
    check_refused(partial(scene.with_(**attributes), scene.x), ValueError, text)


@EACH
def test_mode_is_a_flag(kind):
    text = "mode: expected True or False, got 1"
    check_refused(partial(Scene(kind).layer.train, 1), TypeError, text)


def test_tracking_is_a_flag():
    text = "track_running_stats: expected True or False, got 1"
    call = partial(cbn.InstanceNorm2d.track_running_stats.fset, Scene("instance").layer, 1)
    check_refused(call, TypeError, text)


@pytest.mark.parametrize(
    "make",
    [
        lambda needed=needed, layer=layer: layer(**needed)
        for layer, (needed, _) in CONSTRUCTORS.items()
    ],
    ids=[layer.__name__ for layer in CONSTRUCTORS],
)
def test_backward_before_forward(make):
    check_refused(partial(make().backward, np.ones(SHAPE, np.float32)), RuntimeError, NO_FORWARD)


@EACH
@pytest.mark.parametrize(
    "shape", [(), (4, C, 2), (4, C, 2, 1), (3, C, 2, 2), (1, 4, C, 2, 2)], ids=str
)
def test_backward_of_another_shape(kind, shape):
    scene = Scene(kind)
    grad_output = np.ones(shape, np.float32)
    text = (
        f"grad_output: expected shape (4, 3, 2, 2), that of the input of the forward call, "
        f"got {shape}"
    )
    check_refused(partial(scene.layer.backward, grad_output), ValueError, text)
    if scene.gradients:
        check_refused(partial(scene.gradients, grad_output, scene.x), ValueError, text)


@EACH
def test_backward_after_a_call_in_place(kind):
    scene = Scene(kind)
    scene.layer(scene.x, out=scene.x)
    check_refused(partial(scene.layer.backward, scene.dy), RuntimeError, OVERWRITTEN)


@EACH
def test_backward_after_a_backward_over_x(kind):
    scene = Scene(kind)
    scene.layer.backward(scene.dy, out=scene.x)
    check_refused(partial(scene.layer.backward, scene.dy), RuntimeError, OVERWRITTEN)


def as_float64(array):
    array.dtype = np.float64


def cut_short(array):
    array.resize((2, C, 2, 2), refcheck=False)


def reshape(array):
    array.shape = (4, C, 4)


@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (as_float64, "float64 of shape (4, 3, 2, 1)"),
        (cut_short, "float32 of shape (2, 3, 2, 2)"),
        (reshape, "float32 of shape (4, 3, 4)"),
    ],
)
@EACH
def test_backward_after_x_has_become_another(kind, change, seen):
    scene = Scene(kind)
    change(scene.x)
    text = (
        "backward: expected the input of the last forward call as it was, float32 of shape "
        f"(4, 3, 2, 2), got {seen}; do not change it in between"
    )
    check_refused(partial(scene.layer.backward, scene.dy), RuntimeError, text)


REFUSED_FORWARDS = {
    "rank": lambda s: s.layer(s.x[0, 0, 0]),
    "dtype": lambda s: s.layer(s.x.astype(float)),
    "out-shape": lambda s: s.layer(s.x, out=s.x[0]),
    "out-overlap": lambda s: s.layer(s.x, out=s.x[::-1]),
    "eps": lambda s: s.with_(eps=-1.0)(s.x),
    "weight": lambda s: s.with_(weight=np.ones(9))(s.x),
}


@EACH
@pytest.mark.parametrize("refused", REFUSED_FORWARDS)
def test_backward_after_a_refused_call_is_that_of_the_last_good_call(kind, refused):
    scene = Scene(kind)
    expected = scene.layer.backward(scene.dy)
    weight = scene.layer.weight
    with pytest.raises((TypeError, ValueError)):
        REFUSED_FORWARDS[refused](scene)
    scene.layer.weight = weight
    np.testing.assert_array_equal(scene.layer.backward(scene.dy), expected)


def test_a_call_refused_in_the_other_mode_does_not_change_how_to_differentiate():
    scene = Scene("instance")
    expected = scene.layer.backward(scene.dy)
    with pytest.raises(ValueError, match="expected 3 channels"):
        scene.layer.eval()(scene.x[:, :2])
    np.testing.assert_array_equal(scene.layer.backward(scene.dy), expected)


# ------------------------------------------------------------------------------------------- states


@EACH
def test_load_state_dict(kind):
    layer = Scene(kind).layer
    state = layer.state_dict()
    shape = layer.weight.shape
    last = list(state)[-1]
    keys = "state: expected exactly the keys of this layer, got missing keys {} and unexpected "
    keys += "keys {}; pass strict=False to load what fits"
    without = {key: value for key, value in state.items() if key != last}
    for bad, error, text in [
        ([], TypeError, "state: expected a mapping from names to arrays, got list"),
        (without, ValueError, keys.format([last], [])),
        (state | {"gamma": np.ones(C)}, ValueError, keys.format([], ["gamma"])),
        (
            state | {"weight": np.ones((2, *shape))},
            ValueError,
            f"state['weight']: expected shape {shape}, got {(2, *shape)}",
        ),
        (
            state | {"weight": np.ones(shape, complex)},
            TypeError,
            "state['weight']: expected real numbers, got complex128; convert them first",
        ),
    ]:
        check_refused(partial(layer.load_state_dict, bad), error, text)
    text = "strict: expected True or False, got 1"
    check_refused(partial(layer.load_state_dict, state, strict=1), TypeError, text)


@EACH
def test_what_cannot_be_written_is_neither_loaded_nor_reset(kind):
    layer = Scene(kind).layer
    last = list(layer.state_dict())[-1]
    getattr(layer, last).flags.writeable = False
    state = {key: value + 1 for key, value in layer.state_dict().items()}
    text = f"{last}: expected a writable array, got a read-only one"
    check_refused(partial(layer.load_state_dict, state), ValueError, text)
    check_refused(partial(layer.reset_parameters), ValueError, text)
    if kind.startswith("instance"):
        check_refused(partial(layer.reset_running_stats), ValueError, text)


@EACH
def test_what_no_file_could_give_back_is_not_saved(kind, tmp_path):
    path = tmp_path / "layer.npz"
    layer = Scene(kind).layer
    shape, layer.weight = layer.weight.shape, np.ones(5)
    text = f"weight: expected float32 of shape {shape} to save, got float64 of shape (5,)"
    check_refused(partial(layer.save, path), ValueError, text)
    layer.eps = -1.0
    check_refused(partial(layer.save, path), ValueError, NON_NEGATIVE + "-1.0")
    assert not path.exists()


# -------------------------------------------------------------------- what only batch norm can do


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: cbn.InstanceNorm2d(C), "set layer.track_running_stats = True"),
        (lambda: cbn.GroupNorm(1, C), "this kind never has any"),
        (lambda: cbn.LayerNorm(LAST), "this kind never has any"),
        (lambda: cbn.RMSNorm(LAST), "this kind never has any"),
    ],
    ids=["instance", "group", "layer", "rms"],
)
def test_statistics_of_a_layer_without_any(make, reason):
    layer, x = make(), np.ones(SHAPE, np.float32)
    text = f"layer: expected one with running statistics, got {layer!r}; {reason}"
    check_refused(partial(cbn.reinitialize_norm_stats, layer, x), ValueError, text)


@EACH
def test_folding(kind):
    layer = Scene(kind).layer.eval()
    text = (
        "bn: expected one of BatchNorm1d, BatchNorm2d, BatchNorm3d, "
        f"got {re.sub(r'[(].*', '', repr(layer))}"
    )
    weight = np.ones((C, C))
    check_refused(partial(cbn.fold_linear, weight, None, layer), TypeError, text)
    kernel = np.ones((C, C, 3, 3))
    check_refused(partial(cbn.fold_conv, kernel, None, layer), TypeError, text)
