"""Freezing and resetting the running statistics of a whole model."""

import copy

import numpy as np
import pytest
from norms_table import filled, pickled, statistics
from refusals import refused

import cbn
from cbn.functional import batch_norm_backward

C = 3


def norm(**arguments):
    return cbn.BatchNorm1d(C, dtype=np.float64, running_mean=2, running_var=4, **arguments)


def instance_norm(**options):
    return filled(cbn.InstanceNorm1d(C, track_running_stats=True, dtype=np.float64, **options))


@pytest.fixture
def x(rng):
    return rng.normal(1, 3, (6, C))


# ---------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_a_frozen_layer_does_in_training_what_it_does_in_eval_mode(momentum, nonfinite, x):
    bn = cbn.freeze(norm(momentum=momentum, nonfinite=nonfinite)).train()
    before = statistics(bn)
    expected = norm().eval()
    np.testing.assert_array_equal(bn(x), expected(x))
    np.testing.assert_array_equal(bn.backward(x), expected.backward(x))
    np.testing.assert_array_equal(bn.weight_grad, expected.weight_grad)
    np.testing.assert_array_equal(bn.bias_grad, expected.bias_grad)
    assert bn.training is True
    assert statistics(bn) == before


def test_a_frozen_instance_norm_does_in_training_what_it_does_in_eval_mode(x):
    layer = instance_norm(affine=True)
    before, x = layer.state_dict(), x.T

    def results():
        return [layer(x), layer.backward(x), layer.weight_grad, layer.bias_grad]

    layer.eval()
    expected = results()
    cbn.freeze(layer.train())
    np.testing.assert_equal(results(), expected)
    np.testing.assert_equal(layer.state_dict(), before)
    cbn.unfreeze(layer)
    assert (layer(x) != expected[0]).any()
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def test_a_frozen_instance_norm_uses_statistics_that_it_no_longer_tracks(x):
    layer, x = instance_norm(), x.T
    expected = layer.eval()(x)
    layer.track_running_stats = False
    cbn.freeze(layer)
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(layer.train()(x), expected)


def test_backward_counts_the_frozen_statistics_as_constants(x, rng):
    bn, dy = cbn.freeze(norm()), rng.normal(size=x.shape)
    bn.weight[:] = [1, 2, 3]
    bn(x)
    expected = batch_norm_backward(
        dy, x, bn.running_mean, bn.running_var, bn.weight, training=False
    )
    actual = (bn.backward(dy), bn.weight_grad, bn.bias_grad)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_frozen_layer_takes_a_batch_of_one(x):
    assert cbn.freeze(norm())(x[:1]).shape == (1, C)


def test_unfrozen_it_learns_again(x):
    bn, expected = cbn.unfreeze(cbn.freeze(norm())), norm()
    np.testing.assert_array_equal(bn(x), expected(x))
    assert statistics(bn) == statistics(expected)


def test_freezing_keeps_the_mode_and_the_mode_keeps_it_frozen():
    bn = norm().eval()
    assert cbn.freeze(bn) is bn
    assert (bn.frozen, bn.training) == (True, False)
    assert bn.train().frozen
    assert cbn.unfreeze(bn) is bn
    assert (bn.frozen, bn.training) == (False, True)


def test_every_layer_with_statistics_is_frozen():
    model = {"a": [norm(), cbn.BatchNorm1d(C, track_running_stats=False)], "b": norm()}
    assert cbn.freeze(model) is model
    assert [bn.frozen for _, bn in cbn.named_norm_layers(model)] == [True, False, True]
    cbn.unfreeze(model)
    assert not any(bn.frozen for _, bn in cbn.named_norm_layers(model))


def test_a_kind_of_layer_that_never_has_statistics():
    without = norm()
    del without.running_mean
    model = [without, norm()]
    cbn.freeze(model)
    assert [bn.frozen for bn in model] == [False, True]


def test_frozen_without_statistics_uses_the_batch(x):
    """Whoever takes the statistics away afterwards has the layer that has none."""
    bn = cbn.freeze(norm())
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    expected = cbn.BatchNorm1d(C, dtype=np.float64, track_running_stats=False)
    np.testing.assert_array_equal(bn(x), expected(x))


def test_frozen_shows_in_the_repr():
    assert repr(cbn.freeze(cbn.BatchNorm1d(C))).endswith("track_running_stats=True, frozen=True)")
    assert "frozen" not in repr(cbn.BatchNorm1d(C))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_frozen(duplicate):
    assert duplicate(cbn.freeze(norm())).frozen
    assert not duplicate(norm()).frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_files_of_a_layer_have_it(frozen, tmp_path):
    bn = cbn.freeze(norm()) if frozen else norm()
    bn.save(tmp_path / "norm.npz")
    assert cbn.BatchNorm1d.load(tmp_path / "norm.npz").frozen is frozen


def test_state_dictionaries_do_not(x):
    bn = cbn.freeze(norm())
    assert list(bn.state_dict()) == list(norm().state_dict())
    bn.load_state_dict(cbn.BatchNorm1d(C).state_dict())
    assert bn.frozen
    assert statistics(bn) == [[0] * C, [1] * C, 0]


# --------------------------------------------------------------------------------------- resetting


def test_reset():
    model = [norm(), {"frozen": cbn.freeze(norm())}, norm(), cbn.BatchNorm1d(C, affine=False)]
    model[2].track_running_stats = False
    for _, bn in cbn.named_norm_layers(model):
        bn.num_batches_tracked[...] = 5
        if bn.affine:
            bn.weight[:] = 7
    assert cbn.reset_norm_stats(model) is None
    fresh, kept = [[0] * C, [1] * C, 0], [[2] * C, [4] * C, 5]
    found = cbn.named_norm_layers(model)
    assert [statistics(bn) for _, bn in found] == [fresh, kept, fresh, fresh]
    assert [bn.weight.tolist() for _, bn in found[:3]] == [[7] * C] * 3


def test_reset_is_all_or_nothing():
    model = {"a": norm(), "b": norm()}
    model["b"].running_var.flags.writeable = False
    text = "b.running_var: expected a writable array, got a read-only one"
    with refused(text):
        cbn.reset_norm_stats(model)
    assert statistics(model["a"]) == [[2] * C, [4] * C, 0]


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("function", [cbn.freeze, cbn.unfreeze, cbn.reset_norm_stats])
@pytest.mark.parametrize(
    ("model", "seen"),
    [
        ({}, "dict with none among 0"),
        ("model.npz", "str with none among 0"),
        ([cbn.BatchNorm1d(C, track_running_stats=False)] * 2, "list with none among 1"),
        (cbn.BatchNorm1d(C, track_running_stats=False), "BatchNorm1d with none among 1"),
    ],
    ids=["empty", "path", "model", "layer"],
)
def test_nothing_to_do_is_an_error(function, model, seen):
    text = (
        f"model: expected at least one norm layer with running statistics, got {seen}; "
        "layers are found in dicts, lists, tuples and attributes"
    )
    with refused(text):
        function(model)


def test_nothing_to_reset_but_frozen_layers():
    text = (
        "model: expected at least one norm layer that is not frozen, got list with none among 1; "
        "call cbn.unfreeze(model) first"
    )
    with refused(text):
        cbn.reset_norm_stats([cbn.freeze(norm())])
