"""Every refusal of the public API: its kind, its exact words, and that it changes nothing."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
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
    unusable,
)

import cbn
from cbn.functional import batch_norm, batch_norm_backward, batch_norm_stats

LAYERS = (cbn.BatchNorm1d, cbn.BatchNorm2d, cbn.BatchNorm3d)


class Scene:
    """A layer after a training call and its backward pass, and arrays that fit it."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal(SHAPE, np.float32)
        self.dy = rng.standard_normal(SHAPE, np.float32)
        self.mean = rng.random(C, np.float32)
        self.var = rng.random(C, np.float32)
        self.bn = cbn.BatchNorm2d(C)
        self.bn(self.x)
        self.bn.backward(self.dy)

    def with_(self, **attributes):
        for name, value in attributes.items():
            setattr(self.bn, name, value)
        return self.bn


# ---------------------------------------------------------------------------------- constructors

POLICY = "nonfinite: expected one of ('propagate', 'raise', 'skip'), got "
UNTRACKED = "expected None with track_running_stats=False, got a value that nothing would use"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    by_arguments(
        [
            *bad_plain_values("num_features", "eps", "momentum", "affine", "track_running_stats"),
            *bad_plain_values("device", "dtype", "bias", "channel_axis", "correction"),
            ({"nonfinite": "stop"}, ValueError, POLICY + "'stop'"),
            ({"nonfinite": None}, ValueError, POLICY + "None"),
            (
                {"running_mean": [1.0, 2.0]},
                ValueError,
                "running_mean: expected a scalar or shape (3,), got shape (2,)",
            ),
            (
                {"running_mean": np.ones(C, np.int32)},
                TypeError,
                "running_mean: expected float32 or float64, got int32; "
                "convert it first, for example with running_mean.astype(numpy.float32)",
            ),
            (
                {"running_var": np.ones((C, 1))},
                ValueError,
                "running_var: expected a scalar or shape (3,), got shape (3, 1)",
            ),
            ({"running_var": -1}, ValueError, unusable("-1", channel="0 and 2 more")),
            ({"running_var": [1, 2, float("nan")]}, ValueError, unusable("nan")),
            ({"running_var": [1, 0, 0], "eps": 0}, ValueError, unusable("0", 0, "1 and 1 more")),
            ({"running_var": [1, 2, -1e-5], "dtype": float}, ValueError, unusable("-1e-05")),
            (
                {"track_running_stats": False, "running_mean": 0.0},
                ValueError,
                f"running_mean: {UNTRACKED}",
            ),
            (
                {"track_running_stats": False, "running_var": 1.0},
                ValueError,
                f"running_var: {UNTRACKED}",
            ),
        ]
    ),
)
def test_constructor(layer, arguments, error, text):
    check_refused(partial(layer, **{"num_features": C, **arguments}), error, text)


# --------------------------------------------------------------------------- shape of the input

RANKS = {
    (cbn.BatchNorm1d, 1): "(N, C) or (N, C, L)",
    (cbn.BatchNorm1d, -1): "(N, C) or (N, L, C)",
    (cbn.BatchNorm2d, 1): "(N, C, H, W) or (C, H, W)",
    (cbn.BatchNorm2d, -1): "(N, H, W, C) or (H, W, C)",
    (cbn.BatchNorm3d, 1): "(N, C, D, H, W) or (C, D, H, W)",
    (cbn.BatchNorm3d, -1): "(N, D, H, W, C) or (D, H, W, C)",
}


@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layer", "axis"), RANKS)
def test_rank(layer, axis, training, ndim):
    accepted = RANKS[layer, axis]
    shape = (4,) * ndim
    bn = layer(4, channel_axis=axis).train(training)
    x = np.ones(shape, np.float32)
    if ndim in [part.count(",") + 1 for part in accepted.split(" or ")]:
        assert bn(x).shape == shape
    else:
        text = f"x: expected {accepted}, got {ndim} axes in shape {shape}"
        check_refused(partial(bn, x), ValueError, text)


@pytest.mark.parametrize(
    ("layer", "channel_axis", "shape", "axis"),
    [
        (cbn.BatchNorm1d, 1, (3, 4), 1),
        (cbn.BatchNorm1d, 1, (3, 4, 3), 1),
        (cbn.BatchNorm1d, -1, (3, 4), 1),
        (cbn.BatchNorm1d, -1, (3, 3, 4), 2),
        (cbn.BatchNorm2d, 1, (3, 4, 3, 3), 1),
        (cbn.BatchNorm2d, 1, (3, 4, 3, 5), 1),
        (cbn.BatchNorm2d, -1, (3, 5, 3, 4), 3),
        (cbn.BatchNorm2d, 1, (4, 3, 3), 0),
        (cbn.BatchNorm2d, -1, (3, 3, 3, 4), 3),
        (cbn.BatchNorm2d, -1, (3, 3, 4), 2),
        (cbn.BatchNorm3d, 1, (3, 4, 3, 3, 3), 1),
        (cbn.BatchNorm3d, 1, (4, 3, 3, 3), 0),
        (cbn.BatchNorm3d, -1, (3, 3, 3, 3, 4), 4),
        (cbn.BatchNorm3d, -1, (3, 3, 3, 4), 3),
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


@pytest.mark.parametrize("function", [batch_norm_stats, batch_norm, batch_norm_backward])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_functions_need_two_axes(function, shape):
    arguments = {batch_norm: [None, None], batch_norm_backward: [np.ones(3), np.ones(3)]}
    x = np.ones(shape)
    first = [x, x] if function is batch_norm_backward else [x]
    text = f"x: expected at least 2 axes, got {len(shape)} axes in shape {shape}"
    check_refused(partial(function, *first, *arguments.get(function, [])), ValueError, text)


REMEDY = "use a larger batch, or eval mode with running statistics"


@pytest.mark.parametrize(
    ("layer", "shape", "correction", "needed"),
    [
        (cbn.BatchNorm1d, (1, C), 1, "1 value"),
        (cbn.BatchNorm1d, (1, C), 0, "1 value"),
        (cbn.BatchNorm1d, (1, C, 1), 1, "1 value"),
        (cbn.BatchNorm1d, (2, C), 2, "2 values"),
        (cbn.BatchNorm1d, (2, C), 2.5, "2.5 values"),
        (cbn.BatchNorm2d, (1, C, 1, 1), 1, "1 value"),
        (cbn.BatchNorm2d, (C, 1, 1), 1, "1 value"),
        (cbn.BatchNorm2d, (1, C, 2, 2), 7, "7 values"),
        (cbn.BatchNorm3d, (1, C, 1, 1, 1), 1, "1 value"),
    ],
    ids=lambda value: str(value) if type(value) is tuple else None,
)
@pytest.mark.parametrize("through", ["layer", "function"])
def test_too_few_values_to_train_on(layer, shape, correction, needed, through):
    x = np.ones(shape, np.float32)
    if through == "layer":
        call = partial(layer(C, correction=correction), x)
    else:
        x = x.reshape(1, *shape) if shape[0] == C else x
        call = partial(batch_norm, x, np.zeros(C), np.ones(C), training=True, correction=correction)
    text = (
        f"x: expected more than {needed} per channel when training, "
        f"got {x.size // C} in shape {x.shape}; {REMEDY}"
    )
    check_refused(call, ValueError, text)


# ---------------------------------------------------------------------- element type of the data

DATA_CALLS = {
    "layer": ("x", lambda s, value: partial(s.bn, value)),
    "layer-eval": ("x", lambda s, value: partial(s.bn.eval(), value)),
    "layer-backward": ("grad_output", lambda s, value: partial(s.bn.backward, value)),
    "function": ("x", lambda s, value: partial(batch_norm, value, s.mean, s.var)),
    "function-stats": ("x", lambda s, value: partial(batch_norm_stats, value)),
    "function-backward": (
        "grad_output",
        lambda s, value: partial(batch_norm_backward, value, s.x, s.mean, s.var),
    ),
    "function-backward-x": (
        "x",
        lambda s, value: partial(batch_norm_backward, s.dy, value, s.mean, s.var),
    ),
}


@pytest.mark.parametrize("call", DATA_CALLS)
def test_none_for_data(call):
    name, prepare = DATA_CALLS[call]
    text = f"{name}: expected an array of float32 or float64, got None"
    check_refused(prepare(Scene(), None), TypeError, text)


@pytest.mark.parametrize("call", DATA_CALLS)
@pytest.mark.parametrize("kind", NOT_FLOATS)
def test_not_floats(kind, call):
    value, dtype = NOT_FLOATS[kind]
    name, prepare = DATA_CALLS[call]
    remedy = CONVERT_LIST if isinstance(value, list) else CONVERT
    text = f"{name}: expected float32 or float64, got {dtype}" + remedy.format(name=name)
    check_refused(prepare(Scene(), value), TypeError, text)


@pytest.mark.parametrize("call", DATA_CALLS)
def test_masked_array(call):
    name, prepare = DATA_CALLS[call]
    text = (
        f"{name}: expected an array without a mask, got a masked array; "
        f"fill it first with {name}.filled(value)"
    )
    check_refused(prepare(Scene(), np.ma.ones(SHAPE, np.float32)), TypeError, text)


@pytest.mark.parametrize("call", DATA_CALLS)
def test_masked_array_in_a_list(call):
    name, prepare = DATA_CALLS[call]
    text = (
        f"{name}[1][0]: expected an array without a mask, got a masked array; "
        f"fill it first with {name}[1][0].filled(value)"
    )
    masked = np.ma.ones(SHAPE[2:], np.float32)
    check_refused(prepare(Scene(), [[masked.data], (masked, masked)]), TypeError, text)


@pytest.mark.parametrize("call", DATA_CALLS)
def test_ragged_lists(call):
    name, prepare = DATA_CALLS[call]
    text = f"{name}: expected an array, got sequences of unequal lengths"
    check_refused(prepare(Scene(), [[1.0, 2.0], [3.0]]), ValueError, text)


class Unreadable:
    """As a tensor of PyTorch is that NumPy cannot look at."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


UNREADABLE = "{}: expected what NumPy can read, got {}; convert it first ({})"


@pytest.mark.parametrize("call", DATA_CALLS)
@pytest.mark.parametrize("error", [RuntimeError("has a gradient"), TypeError("no such dtype")])
def test_what_numpy_cannot_read(call, error):
    name, prepare = DATA_CALLS[call]
    text = UNREADABLE.format(name, "Unreadable", error)
    check_refused(prepare(Scene(), Unreadable(error)), TypeError, text)


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
        text = UNREADABLE.format(name, type(value).__name__, "")
        assert str(caught.value).startswith(text[:-1])


@pytest.mark.parametrize("call", ["layer", "layer-eval", "layer-backward", "function-backward"])
def test_the_other_float(call):
    name, prepare = DATA_CALLS[call]
    text = (
        f"{name}: expected float32, got float64; "
        f"convert it with {name}.astype(numpy.float32), or use float64 throughout"
    )
    check_refused(prepare(Scene(), np.ones(SHAPE)), TypeError, text)


# --------------------------------------------------------------------------------------- outputs

OUT_CALLS = {
    "train": lambda s, out: partial(s.bn, s.x, out=out),
    "eval": lambda s, out: partial(s.bn.eval(), s.x, out=out),
    "backward": lambda s, out: partial(s.bn.backward, s.dy, out=out),
    "function-train": lambda s, out: partial(
        batch_norm, s.x, s.mean, s.var, training=True, out=out
    ),
    "function-eval": lambda s, out: partial(batch_norm, s.x, s.mean, s.var, out=out),
    "function-backward": lambda s, out: partial(
        batch_norm_backward, s.dy, s.x, s.mean, s.var, out=out
    ),
}


@pytest.mark.parametrize("call", OUT_CALLS)
@pytest.mark.parametrize("kind", BAD_OUTS)
def test_out(kind, call):
    out, error, text = BAD_OUTS[kind]
    check_refused(OUT_CALLS[call](Scene(), out), error, text)


@pytest.mark.parametrize("how", OVERLAPS)
@pytest.mark.parametrize("call", [c for c in OUT_CALLS if "backward" not in c])
def test_out_over_part_of_x(call, how):
    scene = Scene()
    scene.x, out, strides = overlapping(how)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("x", strides))


@pytest.mark.parametrize("how", OVERLAPS)
@pytest.mark.parametrize("call", ["backward", "function-backward"])
def test_out_over_part_of_grad_output(call, how):
    scene = Scene()
    scene.dy, out, strides = overlapping(how)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("grad_output", strides))


@pytest.mark.parametrize("how", OVERLAPS)
@pytest.mark.parametrize("call", ["backward", "function-backward"])
def test_out_of_backward_over_part_of_x(call, how):
    scene = Scene()
    scene.x, out, strides = overlapping(how)
    scene.bn(scene.x)
    check_refused(OUT_CALLS[call](scene, out), ValueError, overlap_text("x", strides))


# --------------------------------------------------------- parameters and statistics of functions

PER_CHANNEL = {
    "running_mean": lambda s, value: partial(batch_norm, s.x, value, s.var),
    "running_var": lambda s, value: partial(batch_norm, s.x, s.mean, value),
    "weight": lambda s, value: partial(batch_norm, s.x, s.mean, s.var, weight=value),
    "bias": lambda s, value: partial(batch_norm, s.x, s.mean, s.var, bias=value),
    "mean": lambda s, value: partial(batch_norm_backward, s.dy, s.x, value, s.var),
    "var": lambda s, value: partial(batch_norm_backward, s.dy, s.x, s.mean, value),
}

IN_TRAINING = {
    "running_mean": lambda s, value: partial(batch_norm, s.x, value, s.var, training=True),
    "running_var": lambda s, value: partial(batch_norm, s.x, s.mean, value, training=True),
    "weight": lambda s, value: partial(batch_norm, s.x, s.mean, s.var, value, training=True),
    "bias": lambda s, value: partial(batch_norm, s.x, s.mean, s.var, None, value, training=True),
}


@pytest.mark.parametrize(
    ("name", "prepare"),
    [*PER_CHANNEL.items(), *IN_TRAINING.items()],
    ids=[*PER_CHANNEL, *(f"{name}-train" for name in IN_TRAINING)],
)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, C), (C, 1)], ids=str)
def test_shape_per_channel(name, prepare, shape):
    text = f"{name}: expected shape (3,), one value per channel, got {shape}"
    check_refused(prepare(Scene(), np.ones(shape, np.float32)), ValueError, text)


@pytest.mark.parametrize(
    ("name", "prepare"),
    [*PER_CHANNEL.items(), *IN_TRAINING.items()],
    ids=[*PER_CHANNEL, *(f"{name}-train" for name in IN_TRAINING)],
)
def test_dtype_per_channel(name, prepare):
    text = f"{name}: expected float32 or float64, got complex128" + CONVERT.format(name=name)
    check_refused(prepare(Scene(), np.ones(C, complex)), TypeError, text)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_arrays_to_normalise_by_are_needed(name):
    text = f"{name}: expected an array of shape (3,) when not training, got None"
    check_refused(PER_CHANNEL[name](Scene(), None), ValueError, text)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("kind", BAD_RUNNING)
def test_running_arrays_to_update(kind, name):
    value, error, text = BAD_RUNNING[kind]
    check_refused(IN_TRAINING[name](Scene(), value), error, f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "other"), [("running_mean", "running_var"), ("running_var", "running_mean")]
)
def test_one_running_array_in_training(name, other):
    text = f"running_mean and running_var: expected both or neither, got {other} without {name}"
    check_refused(IN_TRAINING[name](Scene(), None), ValueError, text)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    by_arguments(
        [
            ({"channel_axis": 2}, ValueError, AXIS + "2"),
            ({"channel_axis": False}, ValueError, AXIS + "False"),
            ({"eps": -1.0}, ValueError, NON_NEGATIVE + "-1.0"),
            ({"eps": "0"}, TypeError, NON_NEGATIVE + "'0'"),
            ({"momentum": None}, TypeError, "momentum: expected a finite number, got None"),
            (
                {"momentum": float("nan")},
                ValueError,
                "momentum: expected a finite number, got nan",
            ),
            ({"momentum": "0.1"}, TypeError, "momentum: expected a finite number, got '0.1'"),
            (
                {"correction": -1.0},
                ValueError,
                "correction: expected a finite number >= 0, got -1.0",
            ),
        ]
    ),
)
def test_plain_values_of_batch_norm(arguments, error, text, training):
    scene = Scene()
    call = partial(batch_norm, scene.x, scene.mean, scene.var, training=training, **arguments)
    check_refused(call, error, text)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"channel_axis": 2}, ValueError, AXIS + "2"),
        ({"eps": float("nan")}, ValueError, NON_NEGATIVE + "nan"),
        ({"training": 1}, TypeError, "training: expected True or False, got 1"),
    ],
    ids=["channel_axis", "eps", "training"],
)
def test_plain_values_of_batch_norm_backward(arguments, error, text):
    scene = Scene()
    call = partial(batch_norm_backward, scene.dy, scene.x, scene.mean, scene.var, **arguments)
    check_refused(call, error, text)


def test_other_plain_values():
    x = np.ones((2, C))
    check_refused(partial(batch_norm_stats, x, channel_axis=0), ValueError, AXIS + "0")
    text = "training: expected True or False, got 'yes'"
    check_refused(partial(batch_norm, x, None, None, training="yes"), TypeError, text)


# ----------------------------------------------------------- live layers, and the order of calls


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"eps": -1.0}, NON_NEGATIVE + "-1.0"),
        ({"momentum": float("nan")}, "momentum: expected a finite number, got nan"),
        ({"correction": -1}, "correction: expected a finite number >= 0, got -1"),
        ({"weight": np.ones(2)}, "weight: expected shape (3,), one value per channel, got (2,)"),
        ({"bias": np.ones(4)}, "bias: expected shape (3,), one value per channel, got (4,)"),
        (
            {"running_var": read_only(np.ones(C))},
            "running_var: expected a writable array, which training updates in place, "
            f"got a read-only one of shape (3,); {COPY}",
        ),
        (
            {"num_batches_tracked": read_only(np.array(0))},
            "num_batches_tracked: expected a writable array, which training updates in place, "
            f"got a read-only one of shape (); {COPY}",
        ),
        (
            {"running_mean": None},
            "running_mean and running_var: expected both or neither, "
            "got running_var without running_mean",
        ),
    ],
    ids=[
        "eps",
        "momentum",
        "correction",
        "weight",
        "bias",
        "read-only",
        "counter",
        "one-statistic",
    ],
)
def test_layer_with_a_bad_attribute(attributes, text):
    scene = Scene()
    check_refused(partial(scene.with_(**attributes), scene.x), ValueError, text)


@pytest.mark.parametrize("dtype", [np.float64, float, "float64"])
def test_an_element_type_set_on_a_layer_is_named(dtype, tmp_path):
    bn = cbn.BatchNorm2d(C)
    bn.dtype = dtype
    text = (
        "x: expected float64, got float32; convert it with x.astype(numpy.float64), or use "
        "float32 throughout"
    )
    check_refused(partial(bn, Scene().x), TypeError, text)
    assert "dtype=float64" in repr(bn)
    with pytest.raises(ValueError, match=r"expected float64 of shape \(3,\) to save, got float32"):
        bn.save(tmp_path / "file")


def test_a_layer_with_read_only_statistics_is_saved(tmp_path):
    bn = Scene().bn
    for array in bn._state().values():
        array.flags.writeable = False
    bn.save(tmp_path / "file")
    np.testing.assert_equal(cbn.BatchNorm2d.load(tmp_path / "file").state_dict(), bn.state_dict())


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (cbn.BatchNorm2d.train, "mode: expected True or False, got 1"),
        (
            cbn.BatchNorm2d.track_running_stats.fset,
            "track_running_stats: expected True or False, got 1",
        ),
    ],
    ids=["train", "track_running_stats"],
)
def test_switches(method, text):
    check_refused(partial(method, Scene().bn, 1), TypeError, text)


def test_backward_before_forward():
    check_refused(partial(cbn.BatchNorm2d(C).backward, Scene().dy), RuntimeError, NO_FORWARD)


@pytest.mark.parametrize("shape", [(4, C, 2), (4, C, 2, 1), (3, C, 2, 2), (1, 4, C, 2, 2)], ids=str)
def test_backward_of_another_shape(shape):
    scene = Scene()
    grad_output = np.ones(shape, np.float32)
    text = (
        f"grad_output: expected shape (4, 3, 2, 2), that of the input of the forward call, "
        f"got {shape}"
    )
    check_refused(partial(scene.bn.backward, grad_output), ValueError, text)
    call = partial(batch_norm_backward, grad_output, scene.x, scene.mean, scene.var)
    check_refused(call, ValueError, text)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_after_a_call_in_place(training):
    scene = Scene()
    scene.bn.train(training)(scene.x, out=scene.x)
    check_refused(partial(scene.bn.backward, scene.dy), RuntimeError, OVERWRITTEN)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_after_a_backward_over_x(training):
    scene = Scene()
    scene.bn.train(training)(scene.x)
    scene.bn.backward(scene.dy, out=scene.x)
    check_refused(partial(scene.bn.backward, scene.dy), RuntimeError, OVERWRITTEN)


REFUSED_FORWARDS = {
    "rank": lambda s: s.bn(s.x[0, 0]),
    "channels": lambda s: s.bn(s.x[:, :2]),
    "dtype": lambda s: s.bn(s.x.astype(float)),
    "one-value": lambda s: s.bn(s.x[:1, :, :1, :1]),
    "out-shape": lambda s: s.bn(s.x, out=s.x[0]),
    "out-overlap": lambda s: s.bn(s.x, out=s.x[::-1]),
    "eps": lambda s: s.with_(eps=-1.0)(s.x),
}


@pytest.mark.parametrize("refused", REFUSED_FORWARDS)
def test_backward_after_a_refused_call_is_that_of_the_last_good_call(refused):
    scene = Scene()
    expected = scene.bn.backward(scene.dy)
    with pytest.raises((TypeError, ValueError)):
        REFUSED_FORWARDS[refused](scene)
    np.testing.assert_array_equal(scene.bn.backward(scene.dy), expected)


# ---------------------------------------------------------------------------------------- states


def changed(**values):
    """The state of a layer with other values; None drops one."""
    state = {**cbn.BatchNorm2d(C).state_dict(), **values}
    return {key: value for key, value in state.items() if value is not None}


BAD_STATES = {
    "list": ([], TypeError, "state: expected a mapping from names to arrays, got list"),
    "missing": (
        changed(bias=None, running_var=None),
        ValueError,
        "state: expected exactly the keys of this layer, got missing keys ['bias', 'running_var'] "
        "and unexpected keys []; pass strict=False to load what fits",
    ),
    "unexpected": (
        changed(gamma=np.ones(C)),
        ValueError,
        "state: expected exactly the keys of this layer, got missing keys [] "
        "and unexpected keys ['gamma']; pass strict=False to load what fits",
    ),
    "shape": (
        changed(running_var=np.ones(4)),
        ValueError,
        "state['running_var']: expected shape (3,), got (4,)",
    ),
    "counter-shape": (
        changed(num_batches_tracked=np.array([1])),
        ValueError,
        "state['num_batches_tracked']: expected shape (), got (1,)",
    ),
    **{
        f"{key}-{kind}": (
            changed(**{key: np.full(np.shape(changed()[key]), value)}),
            TypeError,
            f"state[{key!r}]: expected real numbers, got {seen}; convert them first",
        )
        for key in changed()
        for kind, value, seen in (
            ("complex", 1j, "complex128"),
            ("bool", True, "bool"),
            ("text", "1", "<U1"),
            ("none", None, "NoneType"),
            ("void", np.void(b"1234"), "|V4"),
            ("complex-objects", np.array(1j, object), "complex"),
            ("bool-objects", np.array(True, object), "bool"),
        )
    },
    **{
        f"{key}-masked": (
            changed(**{key: np.ma.ones(np.shape(changed()[key]))}),
            TypeError,
            f"state[{key!r}]: expected an array without a mask, got a masked array; "
            f"fill it first with state[{key!r}].filled(value)",
        )
        for key in changed()
    },
    "masked-in-a-list": (
        changed(bias=[0.0, np.ma.masked, 1.0]),
        TypeError,
        "state['bias'][1]: expected an array without a mask, got a masked array; "
        "fill it first with state['bias'][1].filled(value)",
    ),
    **{
        f"beyond-{kind}": (
            changed(bias=[0, 1, value]),
            ValueError,
            f"state['bias']: expected numbers that float32 can hold, got {seen}; rescale the "
            "layer's input, or use float64 throughout",
        )
        for kind, value, seen in (
            ("float", 1e300, "1e+300"),
            ("integer", 10**300, "1e+300"),
            ("long-integer", 10**5000, "an integer beyond floats"),
            ("decimal", Decimal("-1e999"), "-1E+999"),
        )
    },
    **{
        f"counter-{value}": (
            changed(num_batches_tracked=value),
            ValueError,
            f"state['num_batches_tracked']: expected an integer from 0 to 2**63 - 1, got {seen}",
        )
        for value, seen in (
            (1.5, "1.5; round an averaged counter first"),
            (Fraction(7, 2), "7/2; round an averaged counter first"),
            (-1.0, "-1.0"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (2**63, str(2**63)),
        )
    },
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_load_state_dict(kind):
    state, error, text = BAD_STATES[kind]
    check_refused(partial(Scene().bn.load_state_dict, state), error, text)


def test_load_state_dict_strict_is_a_flag():
    text = "strict: expected True or False, got 1"
    check_refused(partial(Scene().bn.load_state_dict, changed(), strict=1), TypeError, text)


@pytest.mark.parametrize(
    ("value", "seen"),
    [(read_only(np.ones(C, np.float32)), "a read-only one"), ([1.0, 1.0, 1.0], "list")],
    ids=["read-only", "list"],
)
def test_load_state_dict_into_what_cannot_be_written(value, seen):
    bn = Scene().with_(running_var=value)
    text = f"running_var: expected a writable array, got {seen}"
    check_refused(partial(bn.load_state_dict, changed(weight=np.full(C, 5.0))), ValueError, text)


# --------------------------------------------------------------------- threads and instruction sets


@pytest.mark.parametrize(
    "function",
    [cbn.set_num_threads, lambda n: cbn.num_threads(n).__enter__()],
    ids=["set_num_threads", "num_threads"],
)
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("2", TypeError)],
)
def test_number_of_threads(function, value, error):
    before = cbn.get_num_threads()
    text = f"num_threads: expected a positive integer, got {value!r}"
    check_refused(partial(function, value), error, text)
    assert cbn.get_num_threads() == before


def test_too_many_threads():
    text = "num_threads: expected at most 4096 threads, got 4097"
    check_refused(partial(cbn.set_num_threads, 4097), ValueError, text)


POSITIVE_NUMBER = "expected a positive integer up to 4096"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CBN_NUM_THREADS", "", POSITIVE_NUMBER),
        ("CBN_NUM_THREADS", "0", POSITIVE_NUMBER),
        ("CBN_NUM_THREADS", "-1", POSITIVE_NUMBER),
        ("CBN_NUM_THREADS", "2.5", POSITIVE_NUMBER),
        ("CBN_NUM_THREADS", "all", POSITIVE_NUMBER),
        (
            "CBN_ISA",
            "avx2",
            "expected an instruction set (x86_64_v4, x86_64_v3, baseline)",
        ),
    ],
)
def test_environment(variable, value, expected, monkeypatch):
    monkeypatch.setenv(variable, value)
    run = subprocess.run([sys.executable, "-c", "import cbn"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"ValueError: environment variable {variable}: {expected}, "
        f"got {value!r}; correct it or unset it"
    )


def test_mode_of_show_config():
    text = "mode: expected 'stdout' or 'dicts', got 'json'"
    check_refused(partial(cbn.show_config, "json"), ValueError, text)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_over_a_parameter_or_statistic(name, training, order):
    scene = Scene()
    out = np.empty(SHAPE, np.float32, order=order)
    bn = scene.with_(**{name: out.ravel("K")[:C]}).train(training)
    text = f"out: expected memory apart from {name}, got an overlap in an array of shape {SHAPE}"
    check_refused(partial(bn, scene.x, out=out), ValueError, text)


def test_integer_beyond_floats():
    text = "eps: expected a finite number >= 0, got an integer beyond floats"
    check_refused(partial(cbn.BatchNorm1d, 3, eps=10**400), ValueError, text)


def test_channel_axis_of_another_kind():
    text = "channel_axis: expected 1 (channels first) or -1 (channels last), got [1]"
    check_refused(partial(cbn.BatchNorm1d, 3, channel_axis=[1]), ValueError, text)
