"""What layers do: construction, modes, tracking, outputs, copies; the numbers are elsewhere."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from norms_table import BATCH, NORMS, OPTIONS, STATISTICS, WITH_OPTIONS, filled, pickled, statistics

import cbn

C = 4
SHAPE = (3, C, 6)
SIZE = {"C": C, "groups": 2, "row": SHAPE[1:]}

EACH = pytest.mark.parametrize("name", OPTIONS)
LEARNERS = ("BatchNorm1d", "InstanceNorm1d")
LEARNER = pytest.mark.parametrize("name", LEARNERS)
BATCH_NORM = pytest.mark.parametrize("layer", [getattr(cbn, norm.name) for norm in BATCH])
EACH_OPTION = pytest.mark.parametrize(("name", "options"), WITH_OPTIONS, ids=str)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def fresh(name, **options):
    """A layer for data of SHAPE."""
    return NORMS[name].layer(**SIZE, **options)


def make(name, **options):
    """A layer whose every array differs from its default."""
    return filled(fresh(name, **options))


def affine(name):
    return {NORMS[name].affine: True}


def learner(name, **options):
    """A layer of float64 that learns."""
    return fresh(name, track_running_stats=True, dtype="float64", **affine(name), **options)


def double(**options):
    """A batch norm of float64."""
    return learner("BatchNorm1d", **options)


def arrays(layer):
    return [getattr(layer, name) for name in layer.state_dict()]


@pytest.fixture
def x(rng):
    return rng.normal(2, 3, SHAPE).astype(np.float32)


@pytest.fixture
def wide(rng):
    return rng.normal(2, 3, SHAPE)


@pytest.fixture
def grad_output(rng):
    return rng.standard_normal(SHAPE, np.float32)


def results(layer, x, grad_output):
    return [layer(x), layer.backward(grad_output), layer.weight_grad, layer.bias_grad]


# ------------------------------------------------------------------------------------ construction


@BATCH_NORM
def test_positional_order(layer):
    bn = layer(4, 1e-3, 0.2, False, False, "cpu", np.float64)
    assert bn.num_features == 4
    assert (bn.eps, bn.momentum) == (1e-3, 0.2)
    assert (bn.weight, bn.bias) == (None, None)
    assert bn.track_running_stats is False
    assert bn.dtype == np.float64
    with pytest.raises(TypeError, match="positional arguments"):
        layer(4, 1e-3, 0.2, False, False, "cpu", np.float64, True)


@pytest.mark.parametrize("name", NORMS)
def test_arguments_are_those_of_torch(name, torch):
    ours = inspect.signature(getattr(cbn, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    assert [argument for argument in ours if argument in theirs] == list(theirs)
    for argument, parameter in theirs.items():
        same = ours[argument].kind, ours[argument].default
        assert same == (parameter.kind, parameter.default), argument


@BATCH_NORM
def test_defaults(layer):
    bn = layer(3)
    assert bn.training is True
    assert (bn.eps, bn.momentum, bn.correction, bn.channel_axis) == (1e-5, 0.1, 1, 1)
    assert (bn.weight.tolist(), bn.bias.tolist()) == ([1, 1, 1], [0, 0, 0])
    assert statistics(bn) == [[0, 0, 0], [1, 1, 1], 0]
    assert bn.num_batches_tracked.dtype == np.int64
    assert (bn.weight_grad, bn.bias_grad) == (None, None)


@EACH
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, "float32"), (np.float32, "float32"), ("float64", "float64"), (float, "float64")],
)
def test_dtype(name, dtype, expected, wide):
    layer = fresh(name, dtype=dtype, **affine(name))
    made = [array for array in arrays(layer) if array.ndim]
    computed = results(layer, wide.astype(expected), wide.astype(expected))
    assert {array.dtype.name for array in made + computed if array is not None} == {expected}


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.array(2.0), [2] * C], ids=repr)
def test_statistics_to_start_with(value):
    bn = cbn.BatchNorm1d(C, running_mean=value, running_var=value)
    assert statistics(bn) == [[2] * C, [2] * C, 0]
    assert bn.running_mean.dtype == bn.running_var.dtype == np.float32


def test_statistics_to_start_with_are_copied():
    mean = np.array([1, 2, 3, 4], np.float32)
    bn = cbn.BatchNorm1d(C, running_mean=mean)
    mean[:] = 9
    assert statistics(bn) == [[1, 2, 3, 4], [1] * C, 0]


@pytest.mark.parametrize("name", [name for name in OPTIONS if "bias" in NORMS[name].parameters])
def test_without_bias(name, x, grad_output):
    layer = fresh(name, **affine(name), bias=False)
    *expected, _ = results(fresh(name, **affine(name)), x, grad_output)
    np.testing.assert_equal(results(layer, x, grad_output), [*expected, None])
    assert layer.bias is None


@EACH
def test_without_affine(name, x, grad_output):
    layer = fresh(name, **{NORMS[name].affine: False})
    y, grad_input, *_ = results(fresh(name, **affine(name)), x, grad_output)
    np.testing.assert_equal(results(layer, x, grad_output), [y, grad_input, None, None])
    assert (layer.weight, layer.bias) == (None, None)


@pytest.mark.parametrize("make_norm", [cbn.LayerNorm, cbn.RMSNorm])
def test_as_many_axes_as_numpy_has(make_norm):
    assert make_norm([1] * 64).weight.ndim == 64


@pytest.mark.parametrize(
    ("name", "attribute"),
    [(name, size) for name in OPTIONS for size in NORMS[name].size],
)
def test_the_shape_of_a_layer_stays(name, attribute):
    """Kernels write as many gradients as it says."""
    with pytest.raises(AttributeError):
        setattr(make(name), attribute, 1)


# ------------------------------------------------------------------------------------------- modes


@EACH
def test_modes_return_the_layer(name):
    layer = fresh(name)
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False).training is False
    assert layer.train(True).training is True


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in LEARNERS])
def test_the_mode_changes_nothing(name, x, grad_output):
    layer = make(name)
    expected = results(layer, x, grad_output)
    np.testing.assert_equal(results(layer.eval(), x, grad_output), expected)


@EACH
def test_a_layer_gives_what_its_functions_give(name, x, grad_output):
    layer, norm = make(name, **affine(name)), NORMS[name]
    forward, backward = norm.functions(2, SIZE["row"])
    y = forward(x, **{name: getattr(layer, name) for name in norm.parameters})
    gradients = backward(grad_output, x, weight=layer.weight)
    actual = results(layer, x, grad_output)
    np.testing.assert_equal(actual[: 1 + len(gradients)], [y, *gradients])
    np.testing.assert_array_equal(layer.forward(x), y)


@EACH
def test_shapes_may_alternate(name, x, grad_output):
    """Every call sees the shape of its own input, and backward that of its forward call."""
    layer = make(name)
    halves = [(x, grad_output), (x[:1].copy(), grad_output[:1].copy())]
    expected = []
    for part, grad in halves:
        fresh = make(name)
        expected.append([fresh(part).tobytes(), fresh.backward(grad).tobytes()])
    for turn in (0, 1, 0, 1, 1, 0):
        part, grad = halves[turn]
        y = layer(part)
        assert y.shape == part.shape
        assert [y.tobytes(), layer.backward(grad).tobytes()] == expected[turn]


def test_training_uses_the_batch_and_learns(wide):
    bn = double(momentum=0.25)
    y = bn(wide)
    mean, var = wide.mean((0, 2)), wide.var((0, 2), ddof=1)
    np.testing.assert_allclose(y.mean((0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(bn.running_mean, 0.25 * mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, 0.75 + 0.25 * var, rtol=1e-12)
    assert bn.num_batches_tracked == 1


def test_eval_uses_the_running_statistics_and_learns_nothing(wide):
    bn = double(eps=0, running_mean=1, running_var=4).eval()
    np.testing.assert_allclose(bn(wide), (wide - 1) / 2, rtol=1e-12)
    assert statistics(bn) == [[1] * C, [4] * C, 0]


def test_momentum_none_is_the_average_over_all_batches(rng):
    batches = rng.normal(size=(5, *SHAPE))
    bn = double(momentum=None, running_mean=100, running_var=100)
    for batch in batches:
        bn(batch)
    variances = [batch.var((0, 2), ddof=1) for batch in batches]
    np.testing.assert_allclose(bn.running_mean, batches.mean((0, 1, 3)), atol=1e-12)
    np.testing.assert_allclose(bn.running_var, np.mean(variances, 0), rtol=1e-12)
    assert bn.num_batches_tracked == 5


def test_momentum_can_change_between_calls(wide):
    bn = double(momentum=0.0)
    bn(wide)
    assert statistics(bn) == [[0] * C, [1] * C, 1]
    bn.momentum = 1.0
    bn(wide)
    np.testing.assert_allclose(bn.running_mean, wide.mean((0, 2)), rtol=1e-12)


@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_correction_is_of_the_running_variance_only(correction, wide):
    bn = double(momentum=1.0, correction=correction)
    np.testing.assert_array_equal(bn(wide), double()(wide))
    n = wide.size // C
    expected = wide.var((0, 2)) * n / (n - correction)
    np.testing.assert_allclose(bn.running_var, expected, rtol=1e-12)


# ------------------------------------------------------------------------- tracking, switched live


@LEARNER
def test_tracking_switched_off_in_training(name, wide):
    layer = learner(name)
    layer(wide)
    before = statistics(layer)
    layer.track_running_stats = False
    np.testing.assert_array_equal(layer(2 * wide), learner(name)(2 * wide))
    assert statistics(layer) == before


def test_tracking_switched_off_in_eval_still_uses_the_statistics(wide):
    bn = double(eps=0, running_mean=1, running_var=4).eval()
    bn.track_running_stats = False
    np.testing.assert_allclose(bn(wide), (wide - 1) / 2, rtol=1e-12)


@LEARNER
def test_tracking_switched_off_and_on_keeps_the_statistics(name, wide):
    layer = learner(name)
    layer(wide)
    before = statistics(layer)
    layer.track_running_stats = False
    layer.track_running_stats = True
    assert statistics(layer) == before


@LEARNER
def test_tracking_switched_on_makes_statistics(name, wide):
    layer = fresh(name, track_running_stats=False, dtype="float64")
    assert [getattr(layer, name) for name in STATISTICS] == [None] * 3
    layer.track_running_stats = True
    assert statistics(layer) == [[0] * C, [1] * C, 0]
    tracked = learner(name)
    np.testing.assert_array_equal(layer(wide), tracked(wide))
    assert statistics(layer) == statistics(tracked)
    assert layer.num_batches_tracked == 1


@LEARNER
@TRAINING
def test_without_statistics_every_call_uses_the_batch(name, training, x, grad_output):
    layer = fresh(name, track_running_stats=False, **affine(name)).train(training)
    expected = results(fresh(name, **affine(name)), x, grad_output)
    np.testing.assert_equal(results(layer, x, grad_output), expected)
    assert [getattr(layer, name) for name in STATISTICS] == [None] * 3


# ------------------------------------------------------------------------------------------- edits


def test_edits_in_place_take_effect(wide):
    bn = double(eps=0).eval()
    y = bn(wide)
    bn.running_mean[1] = 5
    bn.running_var[:] = 4
    bn.weight[:] = [1, 6, 2, 2]
    bn.bias += 10
    scale, shift = np.array([0.5, 3, 1, 1])[:, None], np.array([0, 5, 0, 0])[:, None]
    np.testing.assert_allclose(bn(wide), (wide - shift) * scale + 10, rtol=1e-12)
    np.testing.assert_array_equal(y, wide)
    np.testing.assert_allclose(bn.backward(wide), wide * scale, rtol=1e-12)


@LEARNER
def test_training_updates_the_very_arrays(name, wide):
    layer = learner(name)
    before = arrays(layer)
    layer(wide)
    assert all(one is other for one, other in zip(arrays(layer), before, strict=True))
    assert layer.num_batches_tracked == 1


# ---------------------------------------------------------------------------------- special shapes


@TRAINING
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        *(
            (name, shape, {"track_running_stats": True, "momentum": momentum})
            for name, shape in [
                ("BatchNorm1d", (0, C)),
                ("BatchNorm1d", (0, C, 6)),
                ("BatchNorm1d", (4, C, 0)),
                ("BatchNorm2d", (0, C, 2, 2)),
                ("BatchNorm2d", (C, 0, 2)),
                ("BatchNorm3d", (0, C, 2, 0, 2)),
                ("InstanceNorm1d", (0, C, 6)),
                ("InstanceNorm1d", (3, C, 0)),
                ("InstanceNorm1d", (C, 0)),
            ]
            for momentum in (0.1, None)
        ),
        *(
            (name, (0, C, 6), {})
            for name in ("InstanceNorm1d", "GroupNorm", "LayerNorm", "RMSNorm")
        ),
    ],
    ids=str,
)
def test_empty_batch(name, shape, options, training):
    layer = make(name, **affine(name), **options).train(training)
    before = layer.state_dict()
    x = np.ones(shape, np.float32)
    y, grad_input, *gradients = results(layer, x, x)
    assert y.shape == grad_input.shape == shape
    zeros = [np.zeros_like(getattr(layer, name)) for name in NORMS[name].parameters]
    np.testing.assert_equal([array for array in gradients if array is not None], zeros)
    assert layer(x, out=y) is y
    np.testing.assert_equal(layer.state_dict(), before)


@TRAINING
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BatchNorm2d", (C, 3, C)),
        ("BatchNorm3d", (C, 3, 2, C)),
        ("InstanceNorm1d", (C, C)),
        ("InstanceNorm2d", (C, 3, C)),
        ("InstanceNorm3d", (C, 3, 2, C)),
    ],
)
def test_unbatched_is_a_batch_of_one(name, shape, channel_axis, training, rng):
    x, dy = rng.random((2, *shape), np.float32)
    options = {"channel_axis": channel_axis, "track_running_stats": True}
    one, batch = (fresh(name, **options).train(training) for _ in range(2))
    y, grad_input, *gradients = results(batch, x[None], dy[None])
    np.testing.assert_equal(results(one, x, dy), [y[0], grad_input[0], *gradients])
    assert statistics(one) == statistics(batch)


# --------------------------------------------------------------------------------------- gradients


@EACH
def test_backward_can_be_repeated_and_does_not_accumulate(name, wide, rng):
    layer, grad_output = make(name, dtype="float64", **affine(name)), rng.normal(size=SHAPE)
    _, *first = results(layer, wide, grad_output)
    again = [layer.backward(grad_output), layer.weight_grad, layer.bias_grad]
    np.testing.assert_equal(again, first)
    if layer.bias is not None:
        expected = grad_output.sum((0, 2) if layer.bias.shape == (C,) else 0)
        np.testing.assert_allclose(layer.bias_grad, expected, rtol=1e-12)


@EACH
def test_gradients_belong_to_the_last_backward(name, x, grad_output):
    layer = make(name, **affine(name))
    *_, kept, _ = results(layer, x, grad_output)
    before = kept.copy()
    layer.backward(2 * grad_output)
    np.testing.assert_array_equal(layer.weight_grad, 2 * before)
    np.testing.assert_array_equal(kept, before)


# ------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
@EACH_OPTION
def test_copies_work(name, options, duplicate, x, grad_output):
    layer = make(name, **options)
    x, grad_output = (array.astype(layer.dtype) for array in (x, grad_output))
    if options.get("channel_axis") == -1:
        x, grad_output = (np.moveaxis(array, 1, -1).copy() for array in (x, grad_output))
    results(layer, x, grad_output)
    twin = duplicate(layer.eval())
    assert repr(twin) == repr(layer)
    assert twin.training is False
    np.testing.assert_equal(twin.state_dict(), layer.state_dict())
    np.testing.assert_equal(
        (twin.weight_grad, twin.bias_grad), (layer.weight_grad, layer.bias_grad)
    )
    with pytest.raises(RuntimeError, match="expected a forward call before it"):
        twin.backward(x)
    assert layer.backward(x).shape == x.shape
    np.testing.assert_equal(results(twin, x, grad_output), results(layer, x, grad_output))
    if duplicate is not copy.copy:
        before = layer.state_dict()
        for array in arrays(twin):
            array[...] = 77
        twin.train()(x)
        np.testing.assert_equal(layer.state_dict(), before)
    assert layer.training is False


@EACH
def test_pickle_does_not_grow_with_the_input(name):
    layer = fresh(name)
    before = len(pickle.dumps(layer))
    layer(np.ones((10_000, C, 6), np.float32))
    assert len(pickle.dumps(layer)) == before


# -------------------------------------------------------------------------------------------- repr


@BATCH_NORM
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eps": 1e-3, "momentum": 0.25},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_repr_is_that_of_torch(layer, arguments, torch):
    assert repr(layer(7, **arguments)) == repr(getattr(torch.nn, layer.__name__)(7, **arguments))


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ({}, ""),
        ({"dtype": np.float32, "channel_axis": 1, "correction": 1.0}, ""),
        ({"dtype": np.float64}, ", dtype=float64"),
        ({"channel_axis": -1}, ", channel_axis=-1"),
        ({"correction": 0}, ", correction=0"),
        ({"correction": 1.5}, ", correction=1.5"),
        ({"nonfinite": "skip"}, ", nonfinite='skip'"),
        (
            {"correction": 0, "channel_axis": -1, "dtype": "float64"},
            ", dtype=float64, channel_axis=-1, correction=0",
        ),
    ],
    ids=str,
)
def test_repr_of_what_torch_has_not(arguments, extra):
    assert repr(cbn.BatchNorm1d(7, **arguments)) == (
        "BatchNorm1d(7, eps=1e-05, momentum=0.1, affine=True, bias=True, "
        f"track_running_stats=True{extra})"
    )


@EACH_OPTION
def test_repr_evaluates_to_the_layer(name, options):
    layer = fresh(name, **options)
    again = eval(repr(layer), {**vars(cbn), "float64": np.float64})
    assert repr(again) == repr(layer)
    for attribute in inspect.signature(type(layer)).parameters:
        if hasattr(layer, attribute):
            np.testing.assert_equal(getattr(again, attribute), getattr(layer, attribute))


# ------------------------------------------------------------------------------------------- reset


@EACH_OPTION
def test_reset_parameters(name, options):
    layer = make(name, **options)
    layer.reset_parameters()
    np.testing.assert_equal(layer.state_dict(), fresh(name, **options).state_dict())


@EACH
def test_reset_running_stats(name):
    if name not in LEARNERS:
        assert not hasattr(fresh(name), "reset_running_stats")
        return
    layer = filled(learner(name))
    parameters = {key: value for key, value in layer.state_dict().items() if key not in STATISTICS}
    layer.reset_running_stats()
    np.testing.assert_equal(layer.state_dict(), learner(name).state_dict() | parameters)
