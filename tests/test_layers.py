"""What the layers do: construction, modes, tracking, copies, repr; the numbers are elsewhere."""

import copy
import inspect
import pickle

import numpy as np
import pytest

import cbn

LAYERS = (cbn.BatchNorm1d, cbn.BatchNorm2d, cbn.BatchNorm3d)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
C = 3


def statistics(bn):
    return [np.array(getattr(bn, name)).tolist() for name in STATISTICS]


@pytest.fixture
def x(rng):
    return rng.normal(2, 3, (4, C, 5, 2))


def double(**arguments):
    return cbn.BatchNorm2d(C, dtype=np.float64, **arguments)


# ---------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("layer", LAYERS)
def test_positional_order(layer):
    bn = layer(4, 1e-3, 0.2, False, False, "cpu", np.float64)
    assert bn.num_features == 4
    assert (bn.eps, bn.momentum) == (1e-3, 0.2)
    assert (bn.weight, bn.bias) == (None, None)
    assert bn.track_running_stats is False
    assert bn.dtype == np.float64
    with pytest.raises(TypeError, match="positional arguments"):
        layer(4, 1e-3, 0.2, False, False, "cpu", np.float64, True)


@pytest.mark.parametrize("layer", LAYERS)
def test_arguments_are_those_of_torch(layer, torch):
    ours = inspect.signature(layer).parameters
    theirs = inspect.signature(getattr(torch.nn, layer.__name__)).parameters
    assert [name for name in ours if name in theirs] == list(theirs)
    assert {name: ours[name].kind for name in theirs} == {
        name: parameter.kind for name, parameter in theirs.items()
    }
    assert {name: ours[name].default for name in theirs} == {
        name: parameter.default for name, parameter in theirs.items()
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_defaults(layer):
    bn = layer(C)
    assert bn.training is True
    assert (bn.eps, bn.momentum, bn.correction, bn.channel_axis) == (1e-5, 0.1, 1, 1)
    assert (bn.weight.tolist(), bn.bias.tolist()) == ([1, 1, 1], [0, 0, 0])
    assert statistics(bn) == [[0, 0, 0], [1, 1, 1], 0]
    assert bn.num_batches_tracked.dtype == np.int64
    assert (bn.weight_grad, bn.bias_grad) == (None, None)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, "float32"), (np.float32, "float32"), ("float64", "float64"), (float, "float64")],
)
def test_dtype(dtype, expected, x):
    bn = cbn.BatchNorm2d(C, dtype=dtype)
    arrays = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    assert [array.dtype for array in arrays] == [expected] * 4
    y = bn(x.astype(expected))
    assert y.dtype == expected
    assert bn.backward(y).dtype == expected
    assert [bn.weight_grad.dtype, bn.bias_grad.dtype] == [expected] * 2


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.array(2.0), [2, 2, 2]], ids=repr)
def test_statistics_to_start_with(value):
    bn = cbn.BatchNorm1d(C, running_mean=value, running_var=value)
    assert statistics(bn) == [[2, 2, 2], [2, 2, 2], 0]
    assert bn.running_mean.dtype == bn.running_var.dtype == np.float32


def test_statistics_to_start_with_are_copied():
    mean = np.array([1, 2, 3], np.float32)
    bn = cbn.BatchNorm1d(C, running_mean=mean)
    mean[:] = 9
    assert statistics(bn) == [[1, 2, 3], [1, 1, 1], 0]


def test_without_bias(x):
    full, bn = double(), double(bias=False)
    np.testing.assert_array_equal(bn(x), full(x))
    assert bn.bias is None
    np.testing.assert_array_equal(bn.backward(x), full.backward(x))
    np.testing.assert_array_equal(bn.weight_grad, full.weight_grad)
    assert bn.bias_grad is None


def test_without_affine(x):
    full, bn = double(), double(affine=False)
    np.testing.assert_array_equal(bn(x), full(x))
    assert (bn.weight, bn.bias) == (None, None)
    np.testing.assert_array_equal(bn.backward(x), full.backward(x))
    assert (bn.weight_grad, bn.bias_grad) == (None, None)


# ----------------------------------------------------------------------------------------- modes


def test_modes_return_the_layer():
    bn = double()
    assert bn.eval() is bn
    assert bn.training is False
    assert bn.train() is bn
    assert bn.training is True
    assert bn.train(False).training is False
    assert bn.train(True).training is True


def test_training_uses_the_batch_and_learns(x):
    bn = double(momentum=0.25)
    y = bn(x)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(bn.running_mean, 0.25 * mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, 0.75 + 0.25 * var, rtol=1e-12)
    assert bn.num_batches_tracked == 1


def test_eval_uses_the_running_statistics_and_learns_nothing(x):
    bn = double(eps=0, running_mean=1, running_var=4).eval()
    np.testing.assert_allclose(bn(x), (x - 1) / 2, rtol=1e-12)
    assert statistics(bn) == [[1, 1, 1], [4, 4, 4], 0]


def test_forward_is_call(x):
    np.testing.assert_array_equal(double().forward(x), double()(x))


def test_momentum_none_is_the_average_over_all_batches(rng):
    batches = rng.normal(size=(5, 4, C, 2, 2))
    bn = double(momentum=None, running_mean=100, running_var=100)
    for batch in batches:
        bn(batch)
    means = [batch.mean((0, 2, 3)) for batch in batches]
    variances = [batch.var((0, 2, 3), ddof=1) for batch in batches]
    np.testing.assert_allclose(bn.running_mean, np.mean(means, 0), atol=1e-12)
    np.testing.assert_allclose(bn.running_var, np.mean(variances, 0), rtol=1e-12)
    assert bn.num_batches_tracked == 5


def test_momentum_can_change_between_calls(x):
    bn = double(momentum=0.0)
    bn(x)
    assert statistics(bn) == [[0, 0, 0], [1, 1, 1], 1]
    bn.momentum = 1.0
    bn(x)
    np.testing.assert_allclose(bn.running_mean, x.mean((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_correction_is_of_the_running_variance_only(correction, x):
    bn = double(momentum=1.0, correction=correction)
    np.testing.assert_array_equal(bn(x), double()(x))
    n = x.size // C
    expected = x.var((0, 2, 3)) * n / (n - correction)
    np.testing.assert_allclose(bn.running_var, expected, rtol=1e-12)


# ------------------------------------------------------------------------- tracking, switched live


def test_tracking_switched_off_in_training(x):
    bn = double()
    bn(x)
    before = statistics(bn)
    bn.track_running_stats = False
    np.testing.assert_array_equal(bn(2 * x), double()(2 * x))
    assert statistics(bn) == before


def test_tracking_switched_off_in_eval_still_uses_the_statistics(x):
    bn = double(eps=0, running_mean=1, running_var=4).eval()
    bn.track_running_stats = False
    np.testing.assert_allclose(bn(x), (x - 1) / 2, rtol=1e-12)


def test_tracking_switched_off_and_on_keeps_the_statistics(x):
    bn = double()
    bn(x)
    before = statistics(bn)
    bn.track_running_stats = False
    bn.track_running_stats = True
    assert statistics(bn) == before


def test_tracking_switched_on_makes_statistics(x):
    bn = double(track_running_stats=False)
    assert [getattr(bn, name) for name in STATISTICS] == [None] * 3
    bn.track_running_stats = True
    assert statistics(bn) == [[0, 0, 0], [1, 1, 1], 0]
    bn(x)
    tracked = double()
    tracked(x)
    assert statistics(bn) == statistics(tracked)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_statistics_every_call_uses_the_batch(training, x):
    bn = double(track_running_stats=False).train(training)
    expected = double()
    np.testing.assert_array_equal(bn(x), expected(x))
    np.testing.assert_array_equal(bn.backward(x), expected.backward(x))
    assert [getattr(bn, name) for name in STATISTICS] == [None] * 3


# --------------------------------------------------------------------------------------- edits


def test_edits_in_place_take_effect(x):
    bn = double(eps=0).eval()
    y = bn(x)
    bn.running_mean[1] = 5
    bn.running_var[:] = 4
    bn.weight[:] = [1, 6, 2]
    bn.bias += 10
    scale, shift = np.array([0.5, 3, 1])[:, None, None], np.array([0, 5, 0])[:, None, None]
    np.testing.assert_allclose(bn(x), (x - shift) * scale + 10, rtol=1e-12)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(bn.backward(x), x * scale, rtol=1e-12)


def test_training_updates_the_very_arrays(x):
    bn = double()
    arrays = [getattr(bn, name) for name in STATISTICS]
    bn(x)
    assert all(getattr(bn, name) is array for name, array in zip(STATISTICS, arrays, strict=True))
    assert arrays[2] == 1


# -------------------------------------------------------------------------------- special shapes


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (cbn.BatchNorm1d, (0, C)),
        (cbn.BatchNorm1d, (4, C, 0)),
        (cbn.BatchNorm2d, (0, C, 2, 2)),
        (cbn.BatchNorm2d, (C, 0, 2)),
        (cbn.BatchNorm3d, (0, C, 2, 0, 2)),
    ],
    ids=lambda value: str(value) if type(value) is tuple else None,
)
def test_empty_batch(layer, shape, training, momentum):
    bn = layer(C, momentum=momentum, running_mean=1, running_var=2).train(training)
    x = np.ones(shape, np.float32)
    assert bn(x).shape == shape
    assert statistics(bn) == [[1, 1, 1], [2, 2, 2], 0]
    assert bn.backward(x).shape == shape
    assert (bn.weight_grad.tolist(), bn.bias_grad.tolist()) == ([0, 0, 0], [0, 0, 0])
    out = np.ones(shape, np.float32)
    assert bn(x, out=out) is out


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(cbn.BatchNorm2d, (C, 4, C)), (cbn.BatchNorm3d, (C, 4, 2, C))],
    ids=["2d", "3d"],
)
def test_unbatched_is_a_batch_of_one(layer, shape, channel_axis, training, rng):
    x, dy = rng.random((2, *shape), np.float32)
    one, batch = (layer(C, channel_axis=channel_axis).train(training) for _ in range(2))
    np.testing.assert_array_equal(one(x), batch(x[None])[0])
    np.testing.assert_array_equal(one.backward(dy), batch.backward(dy[None])[0])
    np.testing.assert_array_equal(one.weight_grad, batch.weight_grad)
    assert statistics(one) == statistics(batch)


# ------------------------------------------------------------------------------------- gradients


def test_backward_can_be_repeated_and_does_not_accumulate(x, rng):
    bn = double()
    bn(x)
    dy = rng.normal(size=x.shape)
    first, weight_grad, bias_grad = bn.backward(dy), bn.weight_grad, bn.bias_grad
    second = bn.backward(dy)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(bn.weight_grad, weight_grad)
    np.testing.assert_array_equal(bn.bias_grad, bias_grad)
    np.testing.assert_allclose(bias_grad, dy.sum((0, 2, 3)), rtol=1e-12)


def test_gradients_belong_to_the_last_backward(x):
    bn = double()
    bn(x)
    bn.backward(x)
    kept = bn.bias_grad
    before = kept.tolist()
    bn.backward(3 * x)
    np.testing.assert_allclose(bn.bias_grad, np.multiply(before, 3), rtol=1e-12)
    assert kept.tolist() == before


# ---------------------------------------------------------------------------------------- copies


def pickled(bn):
    return pickle.loads(pickle.dumps(bn))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}],
    ids=str,
)
def test_copy_is_equal_and_independent(duplicate, arguments, x):
    bn = double(**arguments)
    bn(x)
    bn.backward(x)
    twin = duplicate(bn.eval())
    assert repr(twin) == repr(bn)
    assert twin.training is False
    np.testing.assert_equal(twin.state_dict(), bn.state_dict())
    np.testing.assert_equal((twin.weight_grad, twin.bias_grad), (bn.weight_grad, bn.bias_grad))
    before = bn.state_dict()
    for name in twin.state_dict():
        getattr(twin, name)[...] = 77
    twin.train()(x)
    np.testing.assert_equal(bn.state_dict(), before)
    assert bn.training is False


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copy_leaves_the_last_input_behind(duplicate, x):
    bn = double()
    bn(x)
    twin = duplicate(bn)
    with pytest.raises(RuntimeError, match="expected a forward call before it"):
        twin.backward(x)
    assert bn.backward(x).shape == x.shape


def test_pickle_does_not_grow_with_the_input():
    bn = cbn.BatchNorm1d(C)
    before = len(pickle.dumps(bn))
    bn(np.ones((10_000, C), np.float32))
    assert len(pickle.dumps(bn)) == before


# ------------------------------------------------------------------------------------------ repr

AS_IN_TORCH = [
    {},
    {"eps": 1e-3, "momentum": 0.25},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("arguments", AS_IN_TORCH, ids=str)
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


# ----------------------------------------------------------------------------------------- reset


def moved(**arguments):
    bn = double(**arguments)
    for name in bn.state_dict():
        getattr(bn, name)[...] = 5
    return bn


def test_reset_running_stats():
    bn = moved()
    bn.reset_running_stats()
    assert statistics(bn) == [[0, 0, 0], [1, 1, 1], 0]
    assert (bn.weight.tolist(), bn.bias.tolist()) == ([5, 5, 5], [5, 5, 5])


def test_reset_parameters():
    bn = moved()
    bn.reset_parameters()
    np.testing.assert_equal(bn.state_dict(), double().state_dict())


@pytest.mark.parametrize(
    "arguments",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False}],
    ids=str,
)
def test_reset_of_what_is_absent(arguments):
    bn = moved(**arguments)
    bn.reset_parameters()
    np.testing.assert_equal(bn.state_dict(), double(**arguments).state_dict())
