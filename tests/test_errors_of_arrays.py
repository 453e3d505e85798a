"""Refusals of arrays: their shapes, element types, layouts and overlaps; that nothing changes."""

from functools import partial

import numpy as np
import pytest
from norms_table import NORMS
from numpy.lib.stride_tricks import as_strided
from refusals import (
    COPY,
    IN_PLACE,
    KINDS,
    LEARNERS,
    LEARNING,
    OF_DATA,
    OVERLAPS,
    SHAPE,
    C,
    Scene,
    check_refused,
    overlap_text,
    overlapping,
    read_only,
)

import cbn
from cbn import functional
from cbn.functional import batch_norm, batch_norm_stats, instance_norm

# ------------------------------------------------------------------------------ shape of the input

# The forms of input that layers take, for each of their channel axes.
FORMS = {
    ("BatchNorm1d", 1): "(N, C) or (N, C, L)",
    ("BatchNorm1d", -1): "(N, C) or (N, L, C)",
    ("BatchNorm2d", 1): "(N, C, H, W) or (C, H, W)",
    ("BatchNorm2d", -1): "(N, H, W, C) or (H, W, C)",
    ("BatchNorm3d", 1): "(N, C, D, H, W) or (C, D, H, W)",
    ("BatchNorm3d", -1): "(N, D, H, W, C) or (D, H, W, C)",
    ("InstanceNorm1d", 1): "(N, C, L) or (C, L)",
    ("InstanceNorm1d", -1): "(N, L, C) or (L, C)",
    ("InstanceNorm2d", 1): "(N, C, H, W) or (C, H, W)",
    ("InstanceNorm2d", -1): "(N, H, W, C) or (H, W, C)",
    ("InstanceNorm3d", 1): "(N, C, D, H, W) or (C, D, H, W)",
    ("InstanceNorm3d", -1): "(N, D, H, W, C) or (D, H, W, C)",
}
OF_GROUPS = {
    ("GroupNorm", 1): "(N, C) or (N, C, H, W)",
    ("GroupNorm", -1): "(N, C) or (N, H, W, C)",
}


@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize(
    ("tracking", "training"), [(True, False), (True, True), (False, True)], ids=str
)
@pytest.mark.parametrize(("name", "axis"), FORMS)
def test_rank(name, axis, tracking, training, ndim):
    accepted = FORMS[name, axis]
    shape = (4,) * ndim
    layer = NORMS[name].layer(C=4, channel_axis=axis, track_running_stats=tracking)
    layer.train(training)
    x = np.ones(shape, np.float32)
    if ndim in [form.count(",") + 1 for form in accepted.split(" or ")]:
        assert layer(x).shape == shape
    else:
        text = f"x: expected {accepted}, got {ndim} axes in shape {shape}"
        check_refused(partial(layer, x), ValueError, text)


@pytest.mark.parametrize("other", [3, 5])
@pytest.mark.parametrize(
    ("name", "channel_axis", "form"),
    [(*key, form) for key, forms in (FORMS | OF_GROUPS).items() for form in forms.split(" or ")],
)
def test_number_of_channels(name, channel_axis, form, other):
    axes = form.strip("()").split(", ")
    shape = tuple({"N": 3, "C": 4}.get(axis, other) for axis in axes)
    layer = NORMS[name].layer(C, channel_axis=channel_axis)
    text = f"x: expected 3 channels on axis {axes.index('C')}, got 4 in shape {shape}"
    if shape[-1] == C:
        text += "; if the channels are last, make the layer with channel_axis=-1"
    elif len(shape) > 2 and shape[1] == C:
        text += "; if the channels are first, make the layer with channel_axis=1"
    check_refused(partial(layer, np.ones(shape, np.float32)), ValueError, text)


LEAST_AXES = {"batch": 2, "batch-eval": 2, "group": 2, "instance": 3, "instance-eval": 3}


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize(
    ("kind", "ndim"), [(kind, ndim) for kind, least in LEAST_AXES.items() for ndim in range(least)]
)
def test_functions_need_enough_axes(kind, ndim, channel_axis):
    scene, x = Scene(kind), np.ones((3,) * ndim, np.float32)
    calls = [partial(scene.function, x)]
    if scene.gradients:
        calls += [partial(scene.gradients, x, x)]
    if kind == "batch":
        calls += [partial(batch_norm_stats, x)]
    unit = " axes" if kind.startswith("batch") else ""
    text = f"x: expected at least {LEAST_AXES[kind]} axes, got {ndim}{unit} in shape {x.shape}"
    for call in calls:
        check_refused(partial(call, channel_axis=channel_axis), ValueError, text)
    if kind == "group":
        layer = cbn.GroupNorm(1, C, channel_axis=channel_axis)
        check_refused(partial(layer, x), ValueError, text)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (2, 5), (5, 3), (4, 5, 3), (3, 5, 1)], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_last_axes(name, shape):
    x, norm = np.ones(shape, np.float32), NORMS[name]
    text = f"x: expected the last axes to be (3, 5), that is normalized_shape, got shape {shape}"
    for row in ((3, 5), [3, 5]):
        check_refused(partial(norm.layer(row=row), x), ValueError, text)
    check_refused(partial(getattr(functional, norm.function), x, (3, 5)), ValueError, text)
    gradients = getattr(functional, f"{norm.function}_backward")
    check_refused(partial(gradients, x, x, (3, 5)), ValueError, text)


# ---------------------------------------------------------------------------------- too few values

TOO_FEW = {
    "batch_norm": "x: expected more than {} per channel when training, got {} in shape {}; "
    "use a larger batch, or eval mode with running statistics",
    "instance_norm": "x: expected more than {} per channel of a sample, got {} in shape {}; "
    "use larger samples, or BatchNorm or LayerNorm",
}


@pytest.mark.parametrize(
    ("name", "samples", "positions", "correction", "needed"),
    [
        ("BatchNorm1d", (1,), (), 1, "1 value"),
        ("BatchNorm1d", (1,), (), 0, "1 value"),
        ("BatchNorm1d", (1,), (1,), 1, "1 value"),
        ("BatchNorm1d", (2,), (), 2, "2 values"),
        ("BatchNorm1d", (2,), (), 2.5, "2.5 values"),
        ("BatchNorm2d", (1,), (1, 1), 1, "1 value"),
        ("BatchNorm2d", (), (1, 1), 1, "1 value"),
        ("BatchNorm2d", (1,), (2, 2), 7, "7 values"),
        ("BatchNorm3d", (1,), (1, 1, 1), 1, "1 value"),
        # However many samples there are.
        ("InstanceNorm1d", (4,), (1,), 1, "1 value"),
        ("InstanceNorm1d", (4,), (1,), 0, "1 value"),
        ("InstanceNorm1d", (), (1,), 1, "1 value"),
        ("InstanceNorm1d", (9,), (2,), 2, "2 values"),
        ("InstanceNorm1d", (9,), (2,), 2.5, "2.5 values"),
        ("InstanceNorm2d", (4,), (1, 1), 1, "1 value"),
        ("InstanceNorm2d", (), (1, 1), 1, "1 value"),
        ("InstanceNorm2d", (9,), (2, 3), 7, "7 values"),
        ("InstanceNorm3d", (4,), (1, 1, 1), 1, "1 value"),
    ],
)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("through", ["layer", "function"])
def test_too_few_values_to_learn_from(
    through, channel_axis, name, samples, positions, correction, needed
):
    norm = NORMS[name]
    options = {"channel_axis": channel_axis, "correction": correction}
    if through == "function":
        samples = samples or (1,)  # it takes no single samples
    shape = (*samples, C, *positions) if channel_axis == 1 else (*samples, *positions, C)
    x = np.ones(shape, np.float32)
    if through == "layer":
        call = partial(norm.layer(track_running_stats=True, **options), x)
    elif norm.function == "batch_norm":
        call = partial(batch_norm, x, np.zeros(C), np.ones(C), training=True, **options)
    else:
        call = partial(instance_norm, x, np.zeros(C), np.ones(C), **options)
    of_one = positions if norm.function == "instance_norm" else (*samples, *positions)
    text = TOO_FEW[norm.function].format(needed, np.prod(of_one, dtype=int), shape)
    check_refused(call, ValueError, text)


def test_one_value_is_too_few_without_statistics_to_learn_too():
    x = np.ones((4, C, 1), np.float32)
    text = TOO_FEW["instance_norm"].format("1 value", 1, x.shape)
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
    "gradients-x": ("x", lambda s, value: partial(s.gradients, s.grad_output, value)),
    "statistics": ("x", lambda s, value: partial(batch_norm_stats, value)),
}
CONVERT = "; convert it first, for example with {name}.astype(numpy.float32)"
CONVERT_LIST = "; convert it first, for example with numpy.asarray({name}, numpy.float32)"
NOT_FLOATS = {
    "int": (np.ones(SHAPE, np.int32), "int32"),
    "bool": (np.ones(SHAPE, bool), "bool"),
    "complex": (np.ones(SHAPE, np.complex64), "complex64"),
    "long": (np.ones(SHAPE, np.longdouble), np.dtype(np.longdouble).name),
    "object": (np.ones(SHAPE, object), "object"),
    "string": (np.full(SHAPE, "1"), "<U1"),
    "list-of-bools": (np.ones(SHAPE, bool).tolist(), "bool"),
    "list-of-complex": (np.ones(SHAPE, complex).tolist(), "complex128"),
}


class Unreadable:
    """As a tensor of PyTorch is that NumPy cannot look at."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


UNREADABLE = "{name}: expected what NumPy can read, got Unreadable; convert it first "
MASKED = "expected an array without a mask, got a masked array; fill it first with "
part = np.ma.ones(SHAPE[2:], np.float32)
# The error, and its text for the name of an argument.
BAD_DATA = {
    "none": (None, TypeError, f"{{name}}: expected an array of {OF_DATA}, got None"),
    **{
        what: (
            value,
            TypeError,
            f"{{name}}: expected {OF_DATA}, got {dtype}"
            + (CONVERT_LIST if isinstance(value, list) else CONVERT),
        )
        for what, (value, dtype) in NOT_FLOATS.items()
    },
    "masked": (
        np.ma.ones(SHAPE, np.float32),
        TypeError,
        "{name}: " + MASKED + "{name}.filled(value)",
    ),
    "masked-in-a-list": (
        [[part.data], (part, part)],
        TypeError,
        "{name}[1][0]: " + MASKED + "{name}[1][0].filled(value)",
    ),
    "ragged": (
        [[1.0, 2.0], [3.0]],
        ValueError,
        "{name}: expected an array, got sequences of unequal lengths",
    ),
    "with-a-gradient": (
        Unreadable(RuntimeError("has a gradient")),
        TypeError,
        UNREADABLE + "(has a gradient)",
    ),
    "of-no-dtype": (
        Unreadable(TypeError("no such dtype")),
        TypeError,
        UNREADABLE + "(no such dtype)",
    ),
}


def kinds_and(calls):
    """Every kind with every call that it has."""
    return [
        (kind, call)
        for kind in KINDS
        for call in calls
        if not (call.startswith("gradients") and kind == "instance-eval")
        and not (call == "statistics" and kind != "batch")
    ]


@pytest.mark.parametrize(("kind", "call"), kinds_and(DATA_CALLS))
@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_is_no_array_of_floats(what, kind, call):
    value, error, text = BAD_DATA[what]
    name, prepare = DATA_CALLS[call]
    check_refused(prepare(Scene(kind), value), error, text.format(name=name))


@pytest.mark.parametrize(("kind", "call"), kinds_and(["layer", "layer-backward", "gradients"]))
def test_the_other_float(kind, call):
    name, prepare = DATA_CALLS[call]
    expected = "float32, float16 or bfloat16" if call == "layer" else "float32"
    text = (
        f"{name}: expected {expected}, got float64; "
        f"convert it with {name}.astype(numpy.float32), or use float64 throughout"
    )
    check_refused(prepare(Scene(kind), np.ones(SHAPE)), TypeError, text)


def test_parameters_of_torch(torch):
    parameter, bn = torch.nn.Linear(C, C).weight, cbn.BatchNorm1d(C).eval()
    bfloat = torch.ones(C, dtype=torch.bfloat16)
    for call, name, value in (
        (bn, "x", parameter),
        (partial(cbn.fold_linear, bias=None, bn=bn), "weight", parameter),
        (lambda value: bn.load_state_dict({"bias": value}, False), "state['bias']", parameter[0]),
        (lambda value: bn.load_state_dict({"bias": value}, False), "state['bias']", bfloat),
    ):
        with pytest.raises(TypeError) as caught:
            call(value)
        text = UNREADABLE.format(name=name).replace("Unreadable", type(value).__name__)
        assert str(caught.value).startswith(text + "(")


# ------------------------------------------------------------------------------------------ outputs

OUT_CALLS = {
    "layer": lambda s, out: partial(s.layer, s.x, out=out),
    "layer-backward": lambda s, out: partial(s.layer.backward, s.grad_output, out=out),
    "function": lambda s, out: partial(s.function, s.x, out=out),
    "gradients": lambda s, out: partial(s.gradients, s.grad_output, s.x, out=out),
}
BAD_OUTS = {
    "list": ([0.0], TypeError, "expected an array, got list"),
    "shape": (
        np.ones((4, C, 2, 1), np.float32),
        ValueError,
        "expected shape (4, 3, 2, 2), got (4, 3, 2, 1)",
    ),
    "dtype": (
        np.ones(SHAPE),
        TypeError,
        "expected float32, got float64 in an array of shape (4, 3, 2, 2)",
    ),
    "byte-order": (
        np.ones(SHAPE, ">f4"),
        TypeError,
        "expected float32, got >f4 in an array of shape (4, 3, 2, 2)",
    ),
    "read-only": (
        read_only(np.ones(SHAPE, np.float32)),
        ValueError,
        "expected a writable array, got a read-only one of shape (4, 3, 2, 2)",
    ),
    **{
        what: (
            as_strided(np.ones(48, np.float32), SHAPE, strides),
            ValueError,
            "expected an array that does not overlap itself, "
            f"got shape (4, 3, 2, 2) with strides {strides}",
        )
        for what, strides in (("broadcast", (0, 16, 8, 4)), ("windows", (32, 16, 8, 4)))
    },
}


@pytest.mark.parametrize(("kind", "call"), kinds_and(OUT_CALLS))
@pytest.mark.parametrize("what", BAD_OUTS)
def test_out(what, kind, call):
    out, error, text = BAD_OUTS[what]
    check_refused(OUT_CALLS[call](Scene(kind), out), error, f"out: {text}")


@pytest.mark.parametrize(
    ("kind", "call", "name"),
    [
        (kind, call, name)
        for kind, call in kinds_and(OUT_CALLS)
        for name in ("x", "grad_output")
        if name == "x" or call in ("layer-backward", "gradients")
    ],
)
@pytest.mark.parametrize("how", OVERLAPS)
def test_out_over_part_of_an_input(how, kind, call, name):
    scene = Scene(kind)
    array, out, strides = overlapping(how)
    setattr(scene, name, array)
    scene.layer(scene.x)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text(name, strides))


# --------------------------------------------------------------------------- parameters, statistics

PARAMETERS = [(kind, name) for kind, norm in KINDS.items() for name in norm.parameters]
RUNNING = [(kind, name) for kind in LEARNERS for name in ("running_mean", "running_var")]
THROUGH = pytest.mark.parametrize("through", ["layer", "function"])


def shape_of(kind):
    return KINDS[kind].shape_of_parameters()


@THROUGH
@pytest.mark.parametrize(("kind", "name"), PARAMETERS + RUNNING)
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_over_a_parameter_or_statistic(kind, name, order, through):
    out = np.ones(SHAPE, np.float32, order=order)
    inside = out.ravel("K")[: np.prod(shape_of(kind))].reshape(shape_of(kind))
    text = f"out: expected memory apart from {name}, got an overlap in an array of shape {SHAPE}"
    for call in Scene(kind).calls(through, **{name: inside}):
        check_refused(partial(call, out=out), ValueError, text)


@THROUGH
@pytest.mark.parametrize(("kind", "name"), PARAMETERS + RUNNING)
@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (4,), (1, C), (C, 1), (2, 1), (1, 2, 2)], ids=str
)
def test_shape_of_a_parameter_or_statistic(kind, name, shape, through):
    by_channel = kind in ("batch", "batch-eval", "instance-eval") or name.startswith("running")
    remark = ", one value per channel" if by_channel else ""
    text = f"{name}: expected shape {shape_of(kind)}{remark}, got {shape}"
    for call in Scene(kind).calls(through, **{name: np.ones(shape, np.float32)}):
        check_refused(call, ValueError, text)


@THROUGH
@pytest.mark.parametrize(("kind", "name"), PARAMETERS + RUNNING)
def test_dtype_of_a_parameter_or_statistic(kind, name, through):
    text = f"{name}: expected float32 or float64, got complex128" + CONVERT.format(name=name)
    for call in Scene(kind).calls(through, **{name: np.ones(shape_of(kind), complex)}):
        check_refused(call, TypeError, text)


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, C), (C, 1)], ids=str)
def test_statistics_to_differentiate_by(name, shape):
    scene = Scene("batch")
    call = partial(scene.gradients, scene.grad_output, scene.x)
    text = f"{name}: expected shape (3,), one value per channel, got {shape}"
    check_refused(partial(call, **{name: np.ones(shape, np.float32)}), ValueError, text)
    text = f"{name}: expected float32 or float64, got complex128" + CONVERT.format(name=name)
    check_refused(partial(call, **{name: np.ones(C, complex)}), TypeError, text)


# ------------------------------------------------------------------------------- running statistics

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
BOTH = pytest.mark.parametrize(
    ("name", "other"), [("running_mean", "running_var"), ("running_var", "running_mean")]
)


@THROUGH
@BOTH
@pytest.mark.parametrize("kind", ["batch-eval", "instance-eval"])
def test_running_arrays_to_normalise_by_are_needed(kind, name, other, through):
    text = f"{name}: expected an array of shape (3,) when not training, got None"
    for call in Scene(kind).calls(through, **{name: None}):
        check_refused(call, ValueError, text)


@THROUGH
@BOTH
@LEARNING
def test_one_running_array_to_update(kind, name, other, through):
    text = f"running_mean and running_var: expected both or neither, got {other} without {name}"
    for call in Scene(kind).calls(through, **{name: None}):
        check_refused(call, ValueError, text)


@THROUGH
@BOTH
@LEARNING
@pytest.mark.parametrize("what", BAD_RUNNING)
def test_running_arrays_to_update(what, kind, name, other, through):
    value, error, text = BAD_RUNNING[what]
    for call in Scene(kind).calls(through, **{name: value}):
        check_refused(call, error, f"{name}: {text}")


@THROUGH
@BOTH
@LEARNING
@pytest.mark.parametrize("order", ["C", "F"])
def test_running_arrays_within_the_input(kind, name, other, order, through):
    scene = Scene(kind)
    scene.x = np.asarray(scene.x, order=order)
    text = f"{name} and x: expected memory of their own, got an overlap"
    for call in scene.calls(through, **{name: scene.x.ravel("K")[:C]}):
        check_refused(call, ValueError, text)


@THROUGH
@LEARNING
def test_one_array_for_both_running_arrays(kind, through):
    both = np.ones(C)
    text = "running_mean and running_var: expected memory of their own, got an overlap"
    for call in Scene(kind).calls(through, running_mean=both, running_var=both):
        check_refused(call, ValueError, text)
