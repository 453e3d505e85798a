"""Every number that layers and functions give, against the float64 reference."""

import numpy as np
import pytest

import cbn
from cbn import _dispatch, functional, reference

# Two and three values per channel are computed like any other number.
TINY = pytest.mark.filterwarnings("ignore::cbn.SmallBatchWarning")
# Channels first. Sizes lie around those at which the kernels change how they walk: by row or by
# plane, in rows of 16 or 64, in strips of at most 1024 columns, in pieces of
# 16384 to 65536 values. test_shapes_are_walked_as_their_names_say holds them to it.
SHAPES = [
    pytest.param("BatchNorm1d", (5, 1), id="one_channel"),
    pytest.param("BatchNorm1d", (2, 3), id="two_values", marks=TINY),
    pytest.param("BatchNorm1d", (9, 1023), id="width_1023"),
    pytest.param("BatchNorm1d", (9, 1024), id="width_1024"),
    pytest.param("BatchNorm1d", (9, 1025), id="width_1025"),
    pytest.param("BatchNorm1d", (4, 2049), id="three_strips"),
    pytest.param("BatchNorm1d", (500, 1100), id="strips_in_pieces"),
    pytest.param("BatchNorm1d", (1029, 64), id="repeated_rows_in_pieces"),
    pytest.param("BatchNorm1d", (70001, 1), id="one_channel_in_pieces"),
    pytest.param("BatchNorm1d", (6, 5, 1), id="run_1"),
    pytest.param("BatchNorm1d", (7, 11, 13), id="primes"),
    pytest.param("BatchNorm1d", (1, 3, 50), id="one_sample"),
    pytest.param("BatchNorm1d", (3, 5, 15), id="run_15"),
    pytest.param("BatchNorm1d", (3, 5, 16), id="run_16"),
    pytest.param("BatchNorm1d", (7, 5, 17), id="seven_samples_run_17"),
    pytest.param("BatchNorm1d", (8, 5, 17), id="eight_samples_run_17"),
    pytest.param("BatchNorm1d", (3, 5, 63), id="run_63"),
    pytest.param("BatchNorm1d", (3, 5, 64), id="run_64"),
    pytest.param("BatchNorm1d", (3, 5, 65), id="run_65"),
    pytest.param("BatchNorm1d", (7, 5, 255), id="seven_samples_run_255"),
    pytest.param("BatchNorm1d", (7, 5, 256), id="seven_samples_run_256"),
    pytest.param("BatchNorm1d", (7, 5, 257), id="seven_samples_run_257"),
    pytest.param("BatchNorm1d", (1, 2, 191), id="one_sample_run_191"),
    pytest.param("BatchNorm1d", (4, 2, 255), id="run_255"),
    pytest.param("BatchNorm1d", (4, 2, 257), id="run_257"),
    pytest.param("BatchNorm1d", (2, 1, 6209), id="run_longer_than_a_block"),
    pytest.param("BatchNorm1d", (2, 2, 16384), id="run_of_one_piece"),
    pytest.param("BatchNorm1d", (3, 2, 65537), id="run_of_pieces"),
    pytest.param("BatchNorm1d", (2, 1, 131135), id="one_channel_run_of_pieces"),
    pytest.param("BatchNorm1d", (401, 2, 600), id="runs_in_pieces"),
    pytest.param("BatchNorm1d", (9, 3, 511), id="nine_samples_run_511"),
    pytest.param("BatchNorm1d", (9, 3, 512), id="nine_samples_run_512"),
    pytest.param("BatchNorm1d", (9, 3, 513), id="nine_samples_run_513"),
    pytest.param("BatchNorm2d", (4, 7, 1, 1), id="plane_1x1"),
    pytest.param("BatchNorm2d", (5, 65, 7, 7), id="plane_7x7"),
    pytest.param("BatchNorm2d", (2, 3, 17, 19), id="plane_17x19"),
    pytest.param("BatchNorm2d", (3, 10, 11), id="unbatched_plane"),
    pytest.param("BatchNorm2d", (1, 13, 11), id="unbatched_one_channel"),
    pytest.param("BatchNorm3d", (2, 3, 3, 4, 5), id="volume_3x4x5"),
    pytest.param("BatchNorm3d", (3, 4, 5, 6, 7), id="volume_5x6x7"),
    pytest.param("BatchNorm3d", (3, 5, 6, 7), id="unbatched_volume"),
]
# (N, C, S) as in SHAPES and WALKS, with the way, the strips and the pieces that are meant.
MEANT = [
    ((9, 1024, 1), ("by row", 1, 1)),
    ((9, 1025, 1), ("by row", 2, 1)),
    ((4, 2049, 1), ("by row", 3, 1)),
    ((500, 1100, 1), ("by row", 2, 2)),
    ((1029, 64, 1), ("by row", 1, 2)),
    ((70001, 1, 1), ("by row", 1, 2)),
    ((3, 5, 65), ("few values", 1, 1)),
    ((7, 5, 255), ("by plane", 2, 1)),
    ((2, 1, 6209), ("by plane", 1, 1)),
    ((3, 2, 65537), ("by plane", 2, 6)),
    ((401, 2, 600), ("by plane", 2, 4)),
    ((9, 3, 511), ("by row", 2, 1)),
    ((9, 3, 512), ("by plane", 3, 1)),
    ((1400, 3, 50), ("by row", 1, 7)),
    ((110, 3, 700), ("by plane", 3, 3)),
    ((1, 3, 230), ("few values", 1, 1)),
]
LAYERS = [
    pytest.param("BatchNorm1d", (11, 6), id="BatchNorm1d_NC"),
    pytest.param("BatchNorm1d", (4, 6, 131), id="BatchNorm1d_NCL"),
    pytest.param("BatchNorm2d", (3, 6, 5, 7), id="BatchNorm2d"),
    pytest.param("BatchNorm3d", (2, 6, 5, 6, 7), id="BatchNorm3d"),
]
# By row and by plane, both in pieces and with tails, and by plane with few values.
WALKS = [
    pytest.param((1400, 3, 50), id="by_row"),
    pytest.param((110, 3, 700), id="by_plane"),
    pytest.param((1, 3, 230), id="few_values"),
]
LAYOUT = pytest.mark.parametrize("channel_axis", [1, -1], ids=["first", "last"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


def arrange(array, channel_axis, position=1):
    """An array whose channels are at position, with the channels first or last."""
    return array if channel_axis == 1 else np.ascontiguousarray(np.moveaxis(array, position, -1))


def draw(rng, shape, channel_axis=1, position=1, dtype="float32"):
    """Data whose channels have means and standard deviations of their own, and a gradient."""
    per_channel = [-1 if axis == position else 1 for axis in range(len(shape))]
    mean = rng.uniform(-3, 3, shape[position]).reshape(per_channel)
    std = rng.uniform(0.5, 3, shape[position]).reshape(per_channel)
    x = arrange(rng.normal(mean, std, shape), channel_axis, position)
    grad_output = arrange(rng.standard_normal(shape), channel_axis, position)
    return x.astype(dtype), grad_output.astype(dtype)


def make_layer(rng, name, num_features, **options):
    """A layer with random parameters and statistics."""
    layer = getattr(cbn, name)(num_features, **options)
    for array in (layer.weight, layer.bias, layer.running_mean):
        if array is not None:
            array[...] = rng.uniform(-2, 2, num_features)
    if layer.running_var is not None:
        layer.running_var[...] = rng.uniform(0.5, 2, num_features)
    return layer


@pytest.fixture
def assert_step_agrees(assert_close):
    def assert_step_agrees(layer, x, grad_output, axis):
        """Run a layer forward and backward, and compare every number it gives."""
        by_batch = layer.training or layer.running_mean is None
        learns = layer.training and layer.track_running_stats
        momentum = layer.momentum
        if momentum is None:
            momentum = 1 / (layer.num_batches_tracked + 1) if learns else 0.0
        y, running_mean, running_var = reference.batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            training=by_batch,
            momentum=momentum if learns else 0.0,
            eps=layer.eps,
            channel_axis=axis,
            correction=layer.correction,
        )
        mean, var = layer.running_mean, layer.running_var
        if by_batch:
            mean, var, _ = reference.batch_norm_stats(x, channel_axis=axis)
        grad_input, grad_weight, grad_bias = reference.batch_norm_backward(
            grad_output, x, mean, var, layer.weight, by_batch, layer.eps, channel_axis=axis
        )
        expected = {
            "y": y,
            "running_mean": running_mean,
            "running_var": running_var,
            "grad_input": grad_input,
            "weight_grad": None if layer.weight is None else grad_weight,
            "bias_grad": None if layer.bias is None else grad_bias,
        }

        actual = {"y": layer(x), "grad_input": layer.backward(grad_output)}
        for quantity, value in expected.items():
            value_of_layer = actual.get(quantity, getattr(layer, quantity, None))
            assert_close(quantity, value_of_layer, value, x.dtype)
        assert actual["y"].dtype == actual["grad_input"].dtype == x.dtype

    return assert_step_agrees


# ----------------------------------------------------------------------------- shapes and options


@TRAINING
@DTYPE
@LAYOUT
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_layer_of_any_shape(rng, assert_step_agrees, name, shape, channel_axis, dtype, training):
    unbatched = len(shape) == {"BatchNorm2d": 3, "BatchNorm3d": 4}.get(name)
    position = 0 if unbatched else 1
    layer = make_layer(rng, name, shape[position], dtype=dtype, channel_axis=channel_axis)
    x, grad_output = draw(rng, shape, channel_axis, position, dtype)
    axis = position if channel_axis == 1 else -1
    assert_step_agrees(layer.train(training), x, grad_output, axis)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 0.7},
        {"momentum": 1.0},
        {"correction": 0},
        {"correction": 2.5},
        {"eps": 0.0},
        {"eps": 0.5},
    ],
    ids=lambda options: "_".join(f"{name}_{value}" for name, value in options.items()),
)
@DTYPE
@LAYOUT
@pytest.mark.parametrize(("name", "shape"), LAYERS)
def test_layer_with_options(rng, assert_step_agrees, name, shape, channel_axis, dtype, options):
    layer = make_layer(rng, name, shape[1], dtype=dtype, channel_axis=channel_axis, **options)
    for batch_size in (shape[0], 4, shape[0] + 1):
        x, grad_output = draw(rng, (batch_size, *shape[1:]), channel_axis, dtype=dtype)
        assert_step_agrees(layer, x, grad_output, channel_axis)
    assert_step_agrees(layer.eval(), x, grad_output, channel_axis)


@DTYPE
def test_cumulative_average_is_the_mean_over_batches(rng, assert_close, dtype):
    layer = cbn.BatchNorm1d(4, momentum=None, dtype=dtype)
    batches = [draw(rng, (batch_size, 4), dtype=dtype)[0] for batch_size in (4, 5, 8)]
    for batch in batches:
        layer(batch)
    mean = np.mean([batch.mean(axis=0, dtype="float64") for batch in batches], axis=0)
    var = np.mean([batch.var(axis=0, ddof=1, dtype="float64") for batch in batches], axis=0)
    assert_close("running_mean", layer.running_mean, mean, dtype)
    assert_close("running_var", layer.running_var, var, dtype)
    assert layer.num_batches_tracked == 3


@TRAINING
def test_tracking_switched_off_keeps_the_statistics(rng, assert_step_agrees, training):
    layer = make_layer(rng, "BatchNorm2d", 6).train(training)
    before = layer.running_mean.copy(), layer.running_var.copy()
    layer.track_running_stats = False
    assert_step_agrees(layer, *draw(rng, (3, 6, 5, 7)), 1)
    assert (layer.running_mean == before[0]).all()
    assert (layer.running_var == before[1]).all()
    assert layer.num_batches_tracked == 0


@TRAINING
@DTYPE
@LAYOUT
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("BatchNorm1d", (0, 3), id="NC"),
        pytest.param("BatchNorm1d", (2, 3, 0), id="NCL"),
        pytest.param("BatchNorm2d", (0, 3, 4, 5), id="NCHW"),
        pytest.param("BatchNorm3d", (2, 3, 4, 0, 5), id="NCDHW"),
    ],
)
def test_an_empty_batch_moves_nothing(rng, name, shape, channel_axis, dtype, training):
    layer = make_layer(rng, name, 3, dtype=dtype, channel_axis=channel_axis).train(training)
    before = layer.state_dict()
    x = arrange(np.empty(shape, dtype), channel_axis)
    assert layer(x).shape == x.shape
    assert layer.backward(x).shape == x.shape
    assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0, 0, 0]
    for key, value in layer.state_dict().items():
        assert (value == before[key]).all(), key


# -------------------------------------------------------------------------------------- functions


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_batch_norm_stats(rng, assert_close, shape, channel_axis, dtype):
    x, _ = draw(rng, shape, channel_axis, dtype=dtype)
    mean, var, count = functional.batch_norm_stats(x, channel_axis=channel_axis)
    expected_mean, expected_var, expected_count = reference.batch_norm_stats(
        x, channel_axis=channel_axis
    )
    assert_close("mean", mean, expected_mean, dtype)
    assert_close("var", var, expected_var, dtype)
    assert count == expected_count == x.size // 3


@pytest.mark.parametrize("given", ["weight_and_bias", "weight", "bias", "neither"])
@TRAINING
@DTYPE
@pytest.mark.parametrize("statistics_dtype", ["float32", "float64"])
@LAYOUT
def test_batch_norm(rng, assert_close, channel_axis, statistics_dtype, dtype, training, given):
    x, _ = draw(rng, (9, 4, 23), channel_axis, dtype=dtype)
    running_mean = rng.uniform(-2, 2, 4).astype(statistics_dtype)
    running_var = rng.uniform(0.5, 2, 4).astype(statistics_dtype)
    parameters = {
        "weight": rng.uniform(-2, 2, 4).astype(statistics_dtype) if "weight" in given else None,
        "bias": rng.uniform(-2, 2, 4).astype(statistics_dtype) if "bias" in given else None,
        "training": training,
        "momentum": 0.3,
        "eps": 0.01,
        "channel_axis": channel_axis,
        "correction": 2,
    }
    expected = reference.batch_norm(x, running_mean, running_var, **parameters)
    y = functional.batch_norm(x, running_mean, running_var, **parameters)
    assert_close("y", y, expected[0], dtype)
    # The numbers are no better than the less precise of the two types.
    less_precise = min(dtype, statistics_dtype)
    assert_close("running_mean", running_mean, expected[1], less_precise)
    assert_close("running_var", running_var, expected[2], less_precise)


@DTYPE
@LAYOUT
def test_batch_norm_without_running_statistics(rng, assert_close, channel_axis, dtype):
    x, _ = draw(rng, (9, 4, 23), channel_axis, dtype=dtype)
    y = functional.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
    expected, _, _ = reference.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
    assert_close("y", y, expected, dtype)


@TRAINING
@DTYPE
@LAYOUT
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("shape", WALKS)
def test_batch_norm_backward(rng, assert_close, shape, has_weight, channel_axis, dtype, training):
    x, grad_output = draw(rng, shape, channel_axis, dtype=dtype)
    mean, var = rng.uniform(-2, 2, 3), rng.uniform(0.5, 2, 3)
    if training:
        mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    weight = rng.uniform(-2, 2, 3) if has_weight else None
    arguments = (grad_output, x, mean, var, weight, training, 0.01)
    gradients = functional.batch_norm_backward(*arguments, channel_axis=channel_axis)
    expected = reference.batch_norm_backward(*arguments, channel_axis=channel_axis)
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, gradient, value in zip(names, gradients, expected, strict=True):
        assert_close(name, gradient, value, dtype)


# -------------------------------------------------------------------------------- data that is hard


@pytest.mark.parametrize(
    ("dtype", "offset"), [("float32", 1e4), ("float64", 1e12)], ids=["float32", "float64"]
)
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_mean_much_larger_than_std(rng, assert_close, shape, channel_axis, dtype, offset):
    x, grad_output = draw(rng, shape, channel_axis, dtype=dtype)
    x = x / 3 + np.array(offset, dtype)
    centred = x - np.array(offset, dtype)  # exact, and normalised it is the same
    layer = make_layer(rng, "BatchNorm1d", 3, dtype=dtype, channel_axis=channel_axis)
    mean, var, _ = reference.batch_norm_stats(centred, channel_axis=channel_axis)
    expected, _, _ = reference.batch_norm(
        centred, None, None, layer.weight, layer.bias, training=True, channel_axis=channel_axis
    )
    expected_gradients = reference.batch_norm_backward(
        grad_output, centred, mean, var, layer.weight, channel_axis=channel_axis
    )
    assert_close("y", layer(x), expected, dtype)
    assert_close("grad_input", layer.backward(grad_output), expected_gradients[0], dtype)
    assert_close("weight_grad", layer.weight_grad, expected_gradients[1], dtype)
    assert_close("bias_grad", layer.bias_grad, expected_gradients[2], dtype)


@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_large_running_mean_of_float64_with_data_of_float32(rng, assert_close, shape, channel_axis):
    x = draw(rng, shape, channel_axis)[0] + np.float32(1e4)
    running_mean = np.array([1e4 + 1 / 3, 1e4 - 1 / 7, 1e4 + 1e-4])  # no float32
    running_var = np.ones(3)
    y = functional.batch_norm(x, running_mean, running_var, channel_axis=channel_axis)
    expected, _, _ = reference.batch_norm(x, running_mean, running_var, channel_axis=channel_axis)
    assert_close("y", y, expected, np.float32)


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_first_value_is_an_outlier(
    rng, assert_close, assert_step_agrees, shape, channel_axis, dtype
):
    x, grad_output = draw(rng, shape, channel_axis, dtype=dtype)
    first = np.moveaxis(x, channel_axis, 0)[(slice(None), 0, 0)]
    first[...] = [1e6, -1e6, 1e5]
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    expected = reference.batch_norm_stats(x, channel_axis=channel_axis)
    assert_close("mean", mean, expected[0], dtype)
    assert_close("var", var, expected[1], dtype)
    layer = make_layer(rng, "BatchNorm1d", 3, dtype=dtype, channel_axis=channel_axis)
    assert_step_agrees(layer, x, grad_output, channel_axis)


@pytest.mark.parametrize(("shape", "walk"), MEANT, ids=str)
def test_shapes_are_walked_as_their_names_say(shape, walk):
    assert _dispatch.kernels.walk(*shape) == walk


@DTYPE
@pytest.mark.parametrize("rows", range(2, 120))
@TINY
def test_any_number_of_equal_values_has_their_mean(rows, dtype):
    x = np.full((rows, 128), np.array(-1e4 / 3, dtype))
    mean, var, _ = functional.batch_norm_stats(x)
    assert (mean == x[0]).all()
    assert (var == 0).all()
    assert (cbn.BatchNorm1d(128, dtype=dtype)(x) == 0).all()


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_constant_channels_give_exactly_the_bias(shape, channel_axis, dtype):
    values = np.array([0.1, -1e4 / 3, 0.0], dtype)
    x = arrange(np.broadcast_to(values[:, None], shape).copy(), channel_axis)
    layer = cbn.BatchNorm1d(3, dtype=dtype, channel_axis=channel_axis)
    layer.bias[...] = [0.3, 0.0, -2.0]
    y = np.moveaxis(layer(x), channel_axis, 0)
    for channel, bias in zip(y, layer.bias, strict=True):
        assert (channel == bias).all()
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    assert mean.tolist() == values.tolist()
    assert var.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e25, 1e-25], ids=["overflow", "underflow"])
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_squares_leave_the_range_of_float32(rng, assert_step_agrees, shape, channel_axis, scale):
    x, grad_output = draw(rng, shape, channel_axis)
    layer = make_layer(
        rng, "BatchNorm1d", 3, eps=0.0, track_running_stats=False, channel_axis=channel_axis
    )
    scale = np.float32(scale)  # of both, so that grad_input has the size tolerances are meant for
    assert_step_agrees(layer, x * scale, grad_output * scale, channel_axis)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus_inf"])
@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
@pytest.mark.parametrize("sample", [0, -1])
def test_what_is_not_finite_stays_in_its_channel(rng, sample, shape, channel_axis, dtype, value):
    x, grad_output = draw(rng, shape, channel_axis, dtype=dtype)
    bad_x = x.copy()
    np.moveaxis(bad_x, channel_axis, 0)[1, sample, 3] = value
    clean = make_layer(rng, "BatchNorm1d", 3, dtype=dtype, channel_axis=channel_axis)
    layer = cbn.BatchNorm1d(3, dtype=dtype, channel_axis=channel_axis)
    layer.load_state_dict(clean.state_dict())
    expected = {"y": clean(x), "grad_input": clean.backward(grad_output)}
    actual = {"y": layer(bad_x), "grad_input": layer.backward(grad_output)}
    for name in ("running_mean", "running_var", "weight_grad"):
        expected[name], actual[name] = getattr(clean, name), getattr(layer, name)
    for name in expected:
        axis = 0 if expected[name].ndim == 1 else channel_axis
        expected_channels = np.moveaxis(expected[name], axis, 0)
        channels = np.moveaxis(actual[name], axis, 0)
        np.testing.assert_array_equal(channels[[0, 2]], expected_channels[[0, 2]], name)
        assert not np.isfinite(channels[1]).any(), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus_inf"])
@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_eval_keeps_what_is_not_finite_in_its_place(rng, shape, channel_axis, dtype, value):
    x, _ = draw(rng, shape, channel_axis, dtype=dtype)
    layer = make_layer(rng, "BatchNorm1d", 3, dtype=dtype, channel_axis=channel_axis).eval()
    layer.weight[1] = 2
    expected = layer(x)
    np.moveaxis(x, channel_axis, 0)[1, -1, 3] = value
    np.moveaxis(expected, channel_axis, 0)[1, -1, 3] = value
    np.testing.assert_array_equal(layer(x), expected)


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS)
def test_eval_by_a_running_mean_that_is_not_finite(rng, assert_close, shape, channel_axis, dtype):
    x, _ = draw(rng, shape, channel_axis, dtype=dtype)
    running_mean, running_var = np.array([np.inf, 1.0, np.nan], dtype), np.ones(3, dtype)
    y = functional.batch_norm(x, running_mean, running_var, channel_axis=channel_axis)
    expected, _, _ = reference.batch_norm(x, running_mean, running_var, channel_axis=channel_axis)
    assert_close("y", y, expected, dtype)


# Outputs beyond the cache are written past it, unless they overwrite an input.
@DTYPE
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        pytest.param((1801, 67, 7, 10), 1, id="by_row"),
        pytest.param((9, 19, 223, 227), 1, id="by_plane"),
        pytest.param((9, 221, 67, 67), -1, id="channels_last"),
    ],
)
def test_large_outputs_are_those_written_in_place(rng, shape, channel_axis, dtype):
    x = rng.standard_normal(shape, dtype)
    grad_output = x[::-1].copy()
    assert x.nbytes >= 2**25
    num_features = shape[channel_axis]
    layer = make_layer(rng, "BatchNorm2d", num_features, dtype=dtype, channel_axis=channel_axis)
    y = layer(x)
    grad_input = layer.backward(grad_output)
    layer.backward(grad_output, out=grad_output)
    layer(x, out=x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(grad_input, grad_output)
