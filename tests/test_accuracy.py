"""Every number that layers and functions give, against the float64 reference."""

import copy
from itertools import product

import numpy as np
import pytest
from norm_kinds import Kind, kinds
from norms_table import BATCH, NORMS
from tolerances import LARGEST_SUM_ERROR

import cbn
from cbn import _dispatch, functional, reference

# Two and three values per channel are computed like any other number.
TINY = pytest.mark.filterwarnings("ignore::cbn.SmallBatchWarning")
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def of_kinds(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=str)


# Sizes lie around those at which the kernels change how they walk: by row or by plane, in rows of
# 16 or 64, in strips of at most 1024 columns, in pieces of 16384 to 65536 values.
# test_shapes_are_walked_as_is_meant holds them to it.
BATCHES = [(5, 1), (2, 3), (9, 1023), (9, 1024), (9, 1025), (4, 2049)]
BATCHES += [(500, 1100), (1029, 64), (70_001, 1)]  # in pieces
BATCHES += [(6, 5, 1), (7, 11, 13), (1, 3, 50), (3, 5, 15), (3, 5, 16), (7, 5, 17), (8, 5, 17)]
BATCHES += [(3, 5, 63), (3, 5, 64), (3, 5, 65), (7, 5, 255), (7, 5, 256), (7, 5, 257)]
BATCHES += [(1, 2, 191), (4, 2, 255), (4, 2, 257), (9, 3, 511), (9, 3, 512), (9, 3, 513)]
BATCHES += [(2, 1, 6209), (2, 2, 16384), (3, 2, 65537), (2, 1, 131_135), (401, 2, 600)]
BATCHES += [(4, 7, 1, 1), (5, 65, 7, 7), (2, 3, 17, 19), (2, 3, 3, 4, 5), (3, 4, 5, 6, 7)]
# By row and by plane, both in pieces and with tails, and by plane with few values.
WALKS = [(1400, 3, 50), (110, 3, 700), (1, 3, 230)]
# (N, C, S) with the way, the strips and the pieces that are meant.
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
# Rows and their lengths: of one piece and of several, by row and by plane, few and many.
ROW_SIZES = [(1, 1), (1, 5), (3, 7), (7, 16), (5, 17), (64, 64), (33, 100), (17, 768), (9, 1024)]
ROW_SIZES += [(3, 5000), (200, 31), (2, 70_001), (40, 4096), (130, 1500), (8, 300_000)]
# (N, C, S), and the number of groups.
GROUPED = [((2, 4, 3), 2), ((3, 6, 1), 3), ((5, 8, 16), 4), ((4, 32, 49), 8), ((2, 64, 196), 32)]
GROUPED += [((9, 64, 1), 32), ((2, 6, 5000), 1), ((70, 12, 1), 3), ((1, 8, 30_000), 2)]
GROUPED += [((33, 128, 4), 2), ((3, 10, 7), 10), ((2, 4, 600), 4), ((2, 2048, 3), 1)]
GROUPED += [((3, 1200, 2), 2), ((2, 120, 5), 3), ((4, 10, 3), 2), ((2, 600, 100), 1)]
GROUPED += [((5, 1024, 300), 1), ((1, 6, 70_001), 3)]
# (N, C, S) of instance norm.
INSTANCES = [(2, 3, 5), (4, 64, 49), (2, 16, 700), (3, 5, 3000), (20, 7, 20), (2, 2000, 9)]
INSTANCES += [(1, 2, 70_001)]

OF_BATCH = kinds(BATCHES, unbatched=[(3, 10, 11), (1, 13, 11), (3, 5, 6, 7)])
OF_SAMPLES = kinds(rows=ROW_SIZES, groups=GROUPED, instances=INSTANCES)
OF_WALKS = kinds(WALKS)
# One or two of each way.
SOME = OF_WALKS + kinds(
    rows=[(7, 16), (64, 64), (17, 768), (2, 20_001), (130, 301), (4, 3, 50)],
    groups=[((3, 6, 1), 3), ((4, 32, 49), 8), ((2, 2048, 3), 1), ((2, 120, 50), 3)],
    instances=[(4, 64, 49), (2, 16, 700), (20, 7, 20)],
)


def draw(rng, kind, dtype="float32"):
    """Data whose channels have means and standard deviations of their own, and a gradient."""
    x, grad_output = rng.standard_normal((2, *kind.shape))
    by_channel = np.moveaxis(x, kind.axis, -1)
    by_channel *= rng.uniform(0.5, 3, kind.C)
    by_channel += rng.uniform(-3, 3, kind.C)
    return x.astype(dtype), grad_output.astype(dtype)


def make_layer(rng, kind, **options):
    """A layer with random parameters and statistics."""
    layer = kind.layer(**{kind.norm.affine: True, **options})
    for name, array in layer.state_dict().items():
        if name != "num_batches_tracked":
            low = 0.5 if name == "running_var" else -2
            getattr(layer, name)[...] = rng.uniform(low, 2, array.shape)
    return layer


RESULTS = ("y", "grad_input", "weight_grad", "bias_grad", "running_mean", "running_var")


def step(layer, x, grad_output):
    """Every number that a layer gives, forward and backward."""
    found = {"y": layer(x), "grad_input": layer.backward(grad_output)}
    return found | {name: getattr(layer, name, None) for name in RESULTS[2:]}


def compute(module, kind, x, grad_output, weight=None, bias=None, eps=1e-5):
    """What functions give that normalise by the statistics of x."""
    forward, backward = kind.functions(module)
    shift = {"bias": bias} if "bias" in kind.norm.parameters else {}
    y = forward(x, weight=weight, eps=eps, **shift)
    gradients = backward(grad_output, x, weight=weight, eps=eps)
    return dict(zip(RESULTS, (y, *gradients), strict=False))


def by_formulas(kind, layer, x, grad_output):
    """What a step of the layer must give, from the state that it has now."""
    if kind.norm in BATCH:
        results = batch_norm_by_formulas(layer, kind.axis, x, grad_output)
    else:
        arguments = layer.weight, getattr(layer, "bias", None), layer.eps
        results = compute(reference, kind, x, grad_output, *arguments)
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is None:
            results[f"{name}_grad"] = None
    return dict.fromkeys(RESULTS) | results


def batch_norm_by_formulas(layer, axis, x, grad_output):
    by_batch = layer.training or layer.running_mean is None
    momentum = 0.0
    if layer.training and layer.track_running_stats:
        cumulative = 1 / (layer.num_batches_tracked + 1)
        momentum = cumulative if layer.momentum is None else layer.momentum
    statistics = layer.running_mean, layer.running_var
    parameters = layer.weight, layer.bias, by_batch, momentum, layer.eps
    y, *running = reference.batch_norm(
        x, *statistics, *parameters, channel_axis=axis, correction=layer.correction
    )
    if by_batch:
        statistics = reference.batch_norm_stats(x, channel_axis=axis)[:2]
    gradients = reference.batch_norm_backward(
        grad_output, x, *statistics, layer.weight, by_batch, layer.eps, channel_axis=axis
    )
    return dict(zip(RESULTS, (y, *gradients, *running), strict=True))


def slack_of_sums(kind, grad_output, dtype):
    """What the gradients of parameters may be off by."""
    # The terms are those of grad_output, for weights times normalised values, whose mean square is
    # 1: so this is the sum of their magnitudes, or somewhat more.
    terms = kind.by_parameter(grad_output.astype("float64"))
    magnitude = np.sqrt(len(terms) * (terms**2).sum(axis=0)).max()
    return LARGEST_SUM_ERROR[np.dtype(dtype).name] * magnitude


@pytest.fixture
def assert_all_close(assert_close):
    def assert_all_close(actual, expected, dtype, kind, grad_output):
        assert actual.keys() == expected.keys()
        for quantity, value in expected.items():
            more = slack_of_sums(kind, grad_output, dtype) if "_grad" in quantity else 0
            assert_close(quantity, actual[quantity], value, dtype, more)
        assert actual["y"].dtype == actual["grad_input"].dtype == dtype

    return assert_all_close


@pytest.fixture
def assert_step_agrees(assert_all_close):
    def assert_step_agrees(kind, layer, x, grad_output):
        """Run a layer forward and backward, and compare every number it gives."""
        expected = by_formulas(kind, layer, x, grad_output)
        assert_all_close(step(layer, x, grad_output), expected, x.dtype, kind, grad_output)

    return assert_step_agrees


# ----------------------------------------------------------------------------- shapes and options


@TINY
@DTYPE
@pytest.mark.parametrize(
    ("kind", "mode"),
    [*product(OF_BATCH, ("training", "eval")), *product(OF_SAMPLES, ("training",))],
    ids=str,
)
def test_layer_of_any_shape(rng, assert_step_agrees, kind, dtype, mode):
    # A sample's group may have two values that are nearly the same. Then eps says how large the
    # gradient is, and this one makes it of the size that tolerances are meant for.
    eps = 1e-5 if kind.norm in BATCH else 0.1
    layer = make_layer(rng, kind, dtype=dtype, eps=eps).train(mode == "training")
    assert_step_agrees(kind, layer, *draw(rng, kind, dtype))


@DTYPE
@of_kinds(OF_SAMPLES)
def test_functions_give_the_bits_of_layers(rng, kind, dtype):
    layer = make_layer(rng, kind, dtype=dtype)
    x, grad_output = draw(rng, kind, dtype)
    parameters = layer.weight, getattr(layer, "bias", None), layer.eps
    expected = step(layer, x, grad_output)
    for name, array in compute(functional, kind, x, grad_output, *parameters).items():
        assert array.dtype == dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize(("shape", "walk"), MEANT, ids=str)
def test_shapes_are_walked_as_is_meant(shape, walk):
    assert _dispatch.kernels.walk(*shape) == walk


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
@of_kinds(kinds([(11, 6), (4, 6, 131), (3, 6, 5, 7), (2, 6, 5, 6, 7)]))
def test_batch_norm_layer_with_options(rng, assert_step_agrees, kind, dtype, options):
    layer = make_layer(rng, kind, dtype=dtype, **options)
    for batch_size in (kind.shape[0], 4, kind.shape[0] + 1):
        batch = draw(rng, kind._replace(shape=(batch_size, *kind.shape[1:])), dtype)
        assert_step_agrees(kind, layer, *batch)
    assert_step_agrees(kind, layer.eval(), *batch)


@DTYPE
def test_cumulative_average_is_the_mean_over_batches(rng, assert_close, dtype):
    layer = cbn.BatchNorm1d(4, momentum=None, dtype=dtype)
    batches = [rng.normal(1, 2, (batch_size, 4)).astype(dtype) for batch_size in (4, 5, 8)]
    for batch in batches:
        layer(batch)
    mean = np.mean([batch.mean(axis=0, dtype="float64") for batch in batches], axis=0)
    var = np.mean([batch.var(axis=0, ddof=1, dtype="float64") for batch in batches], axis=0)
    assert_close("running_mean", layer.running_mean, mean, dtype)
    assert_close("running_var", layer.running_var, var, dtype)
    assert layer.num_batches_tracked == 3


@TRAINING
def test_tracking_switched_off_keeps_the_statistics(rng, assert_step_agrees, training):
    kind = Kind(NORMS["BatchNorm2d"], (3, 6, 5, 7))
    layer = make_layer(rng, kind).train(training)
    before = layer.state_dict()
    layer.track_running_stats = False
    assert_step_agrees(kind, layer, *draw(rng, kind))
    np.testing.assert_equal(layer.state_dict(), before)


@TRAINING
@DTYPE
@of_kinds(kinds([(0, 3), (2, 3, 0), (0, 3, 4, 5), (2, 3, 4, 0, 5)]))
def test_an_empty_batch_moves_nothing(rng, kind, dtype, training):
    layer = make_layer(rng, kind, dtype=dtype).train(training)
    before = layer.state_dict()
    x = np.empty(kind.shape, dtype)
    assert layer(x).shape == x.shape
    assert layer.backward(x).shape == x.shape
    assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0, 0, 0]
    np.testing.assert_equal(layer.state_dict(), before)


# -------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("given", ["weight_and_bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("parameter_dtype", ["float32", "float64"])
@DTYPE
@of_kinds(SOME + kinds([(9, 4, 23)]))
def test_any_parameters_of_any_type(rng, assert_all_close, kind, dtype, parameter_dtype, given):
    x, grad_output = draw(rng, kind, dtype)
    parameters = {
        name: rng.uniform(-2, 2, kind.parameter_shape).astype(parameter_dtype)
        for name in ("weight", "bias")
        if name in given
    }
    actual, expected = (
        compute(module, kind, x, grad_output, eps=0.1, **parameters)
        for module in (functional, reference)
    )
    assert_all_close(actual, expected, dtype, kind, grad_output)
    assert {array.dtype for array in actual.values()} == {np.dtype(dtype)}


@DTYPE
@of_kinds(SOME)
def test_the_same_bits_for_any_threads_and_instruction_set(rng, use_threads, use_isa, kind, dtype):
    x, grad_output = draw(rng, kind, dtype)
    weight, bias = rng.uniform(-2, 2, (2, *kind.parameter_shape)).astype(dtype)
    x.flat[0] = 1e4
    if dtype == "float32":
        x.flat[-1] = 1e25  # whose square is read again in another unit
    seen = set()
    for isa, threads in product(_dispatch.supported(), (1, 2, 3, 7)):
        use_isa(isa)
        # As many as that, also where there is too little work for them.
        use_threads(threads)
        results = compute(functional, kind, x, grad_output, weight, bias)
        seen.add(b"".join(array.tobytes() for array in results.values()))
    assert len(seen) == 1


@DTYPE
@of_kinds(OF_WALKS)
def test_batch_norm_stats(rng, assert_close, kind, dtype):
    x, _ = draw(rng, kind, dtype)
    mean, var, count = functional.batch_norm_stats(x, **kind.options)
    expected_mean, expected_var, expected_count = reference.batch_norm_stats(x, **kind.options)
    assert_close("mean", mean, expected_mean, dtype)
    assert_close("var", var, expected_var, dtype)
    assert count == expected_count == x.size // 3


@pytest.mark.parametrize("given", ["weight_and_bias", "weight", "bias", "neither"])
@TRAINING
@DTYPE
@pytest.mark.parametrize("statistics_dtype", ["float32", "float64"])
@of_kinds(kinds([(9, 4, 23)]))
def test_batch_norm(rng, assert_close, kind, statistics_dtype, dtype, training, given):
    x, _ = draw(rng, kind, dtype)
    running_mean, running_var, *parameters = rng.uniform(0.5, 2, (4, 4)).astype(statistics_dtype)
    for index, name in enumerate(("weight", "bias")):
        parameters[index] = -parameters[index] if name in given else None
    arguments = *parameters, training, 0.3, 0.01
    options = {"correction": 2, **kind.options}
    expected = reference.batch_norm(x, running_mean, running_var, *arguments, **options)
    y = functional.batch_norm(x, running_mean, running_var, *arguments, **options)
    assert_close("y", y, expected[0], dtype)
    # The numbers are no better than the less precise of the two types.
    less_precise = min(dtype, statistics_dtype)
    assert_close("running_mean", running_mean, expected[1], less_precise)
    assert_close("running_var", running_var, expected[2], less_precise)


@TRAINING
@DTYPE
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
@of_kinds(OF_WALKS)
def test_batch_norm_backward(rng, assert_close, kind, has_weight, dtype, training):
    x, grad_output = draw(rng, kind, dtype)
    mean, var = rng.uniform(-2, 2, 3), rng.uniform(0.5, 2, 3)
    if training:
        mean, var, _ = functional.batch_norm_stats(x, **kind.options)
    weight = rng.uniform(-2, 2, 3) if has_weight else None
    arguments = (grad_output, x, mean, var, weight, training, 0.01)
    gradients = functional.batch_norm_backward(*arguments, **kind.options)
    expected = reference.batch_norm_backward(*arguments, **kind.options)
    for name, gradient, value in zip(RESULTS[1:4], gradients, expected, strict=True):
        more = slack_of_sums(kind, grad_output, dtype) if "_grad" in name else 0
        assert_close(name, gradient, value, dtype, more)


# -------------------------------------------------------------------------------- data that is hard


@pytest.mark.parametrize(
    ("dtype", "offset"), [("float32", 1e4), ("float64", 1e12)], ids=["float32", "float64"]
)
@of_kinds(OF_WALKS)
def test_mean_much_larger_than_std(rng, assert_all_close, kind, dtype, offset):
    x, grad_output = draw(rng, kind, dtype)
    x = x / 3 + np.array(offset, dtype)
    centred = x - np.array(offset, dtype)  # exact, and normalised it is the same
    layer = make_layer(rng, kind, dtype=dtype, track_running_stats=False)
    expected = by_formulas(kind, layer, centred, grad_output)
    assert_all_close(step(layer, x, grad_output), expected, dtype, kind, grad_output)


@of_kinds(OF_WALKS)
def test_large_running_mean_of_float64_with_data_of_float32(rng, assert_close, kind):
    x = draw(rng, kind)[0] + np.float32(1e4)
    statistics = np.array([1e4 + 1 / 3, 1e4 - 1 / 7, 1e4 + 1e-4]), np.ones(3)  # no float32
    y = functional.batch_norm(x, *statistics, **kind.options)
    expected, _, _ = reference.batch_norm(x, *statistics, **kind.options)
    assert_close("y", y, expected, np.float32)


@DTYPE
@of_kinds(OF_WALKS)
def test_first_value_is_an_outlier(rng, assert_close, assert_step_agrees, kind, dtype):
    x, grad_output = draw(rng, kind, dtype)
    np.moveaxis(x, kind.axis, 0)[:, 0, 0] = [1e6, -1e6, 1e5]
    mean, var, _ = functional.batch_norm_stats(x, **kind.options)
    expected = reference.batch_norm_stats(x, **kind.options)
    assert_close("mean", mean, expected[0], dtype)
    assert_close("var", var, expected[1], dtype)
    assert_step_agrees(kind, make_layer(rng, kind, dtype=dtype), x, grad_output)


@pytest.mark.parametrize("scale", [1e25, 1e-25], ids=["overflow", "underflow"])
@of_kinds(OF_WALKS)
def test_squares_leave_the_range_of_float32(rng, assert_step_agrees, kind, scale):
    x, grad_output = draw(rng, kind)
    layer = make_layer(rng, kind, eps=0.0, track_running_stats=False)
    scale = np.float32(scale)  # of both, so that grad_input has the size tolerances are meant for
    assert_step_agrees(kind, layer, x * scale, grad_output * scale)


@DTYPE
@pytest.mark.parametrize("rows", range(2, 120))
@TINY
def test_any_number_of_equal_values_has_their_mean(rows, dtype):
    x = np.full((rows, 128), np.array(-1e4 / 3, dtype))
    mean, var, _ = functional.batch_norm_stats(x)
    assert (mean == x[0]).all()
    assert (var == 0).all()
    assert (cbn.BatchNorm1d(128, dtype=dtype)(x) == 0).all()


def constant_groups(kind, values):
    """An input of which each group has one of the values throughout."""
    groups = kind.by_group(np.empty(kind.shape))
    return kind.from_groups(np.broadcast_to(np.resize(values, (len(groups), 1)), groups.shape))


@DTYPE
@of_kinds([kind for kind in SOME if kind.norm.name != "RMSNorm"])
def test_constant_groups_give_exactly_the_bias(rng, kind, dtype):
    layer = make_layer(rng, kind, dtype=dtype)
    y = layer(constant_groups(kind, np.array([0.1, -1e4 / 3, 0.0, 2e4 / 7], dtype)))
    assert (kind.by_parameter(y) == layer.bias).all()


@DTYPE
@of_kinds(OF_WALKS)
def test_constant_channels_have_exactly_their_mean(kind, dtype):
    values = np.array([0.1, -1e4 / 3, 0.0], dtype)
    mean, var, _ = functional.batch_norm_stats(constant_groups(kind, values), **kind.options)
    assert mean.tolist() == values.tolist()
    assert var.tolist() == [0, 0, 0]


NOT_FINITE = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)


@NOT_FINITE
@pytest.mark.parametrize("place", [3, -1])
@pytest.mark.parametrize("where", ["x", "grad_output"])
@DTYPE
@of_kinds(SOME)
def test_what_is_not_finite_stays_in_its_group(rng, kind, dtype, where, place, value):
    data = dict(zip(("x", "grad_output"), draw(rng, kind, dtype), strict=True))
    layer = make_layer(rng, kind, dtype=dtype)
    spoiled = copy.deepcopy(layer)
    expected = step(layer, **data)
    groups = kind.by_group(np.arange(data["x"].size).reshape(kind.shape))
    group = groups[len(groups) // 2]
    data[where].flat[group[min(place, len(group) - 1)]] = value
    actual = step(spoiled, **data)

    own = np.isin(np.arange(data["x"].size), group).reshape(kind.shape)
    # Parameters have gradients from every group that they belong to.
    touched = kind.by_parameter(own).any(axis=0)
    never_finite = ["grad_input"]
    if where == "x" and kind.norm.name != "RMSNorm":  # that divides the others by infinity
        never_finite += ["y", "weight_grad", "running_mean", "running_var"]
    never_changed = ["y", "running_mean", "running_var"] if where == "grad_output" else []
    for name, array in expected.items():
        if array is None:
            continue
        mask = own if name in ("y", "grad_input") else touched
        unchanged = ~mask | (name in never_changed)
        assert actual[name][unchanged].tobytes() == array[unchanged].tobytes(), name
        if name in never_finite:
            assert not np.isfinite(actual[name][mask]).any(), name


@NOT_FINITE
@DTYPE
@of_kinds(OF_WALKS)
def test_eval_keeps_what_is_not_finite_in_its_place(rng, kind, dtype, value):
    x, _ = draw(rng, kind, dtype)
    layer = make_layer(rng, kind, dtype=dtype).eval()
    layer.weight[1] = 2
    expected = layer(x)
    for array in (x, expected):
        np.moveaxis(array, kind.axis, 0)[1, -1, 3] = value
    np.testing.assert_array_equal(layer(x), expected)


@DTYPE
@of_kinds(OF_WALKS)
def test_eval_by_a_running_mean_that_is_not_finite(rng, assert_close, kind, dtype):
    x, _ = draw(rng, kind, dtype)
    statistics = np.array([np.inf, 1.0, np.nan], dtype), np.ones(3, dtype)
    y = functional.batch_norm(x, *statistics, **kind.options)
    expected, _, _ = reference.batch_norm(x, *statistics, **kind.options)
    assert_close("y", y, expected, dtype)


# ------------------------------------------------------------------------------------ large arrays


@DTYPE
@of_kinds(
    [
        Kind(NORMS["BatchNorm2d"], (1801, 67, 7, 10)),  # by row
        Kind(NORMS["BatchNorm2d"], (9, 19, 223, 227)),  # by plane
        Kind(NORMS["BatchNorm2d"], (9, 221, 67, 67), -1),
        Kind(NORMS["LayerNorm"], (9001, 1000), row=(1000,)),
        Kind(NORMS["RMSNorm"], (13_001, 7, 100), row=(7, 100)),
        Kind(NORMS["GroupNorm"], (9, 127, 127, 62), -1, groups=2),
        Kind(NORMS["InstanceNorm2d"], (9, 62, 127, 127)),
        Kind(NORMS["InstanceNorm2d"], (9, 127, 127, 62), -1),
    ]
)
def test_large_outputs_are_those_written_in_place(rng, kind, dtype):
    """Outputs beyond the cache are written past it, unless they overwrite an input."""
    x = rng.standard_normal(kind.shape, dtype)
    grad_output = x[::-1].copy()
    assert x.nbytes >= 2**25
    layer = make_layer(rng, kind, dtype=dtype)
    y = layer(x)
    grad_input = layer.backward(grad_output)
    layer.backward(grad_output, out=grad_output)
    layer(x, out=x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(grad_input, grad_output)
