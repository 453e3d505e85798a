"""The warning of a layer that is trained on very few values per channel."""

import copy
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from norms_table import pickled
from processes import run_python

import cbn
from cbn import functional

TEXT = (
    "x: expected at least 4 values per channel when training, got 2 in shape (2, 3); "
    "use a larger batch, or GroupNorm or LayerNorm, which do not depend on the batch, or "
    "cbn.recalibrate(model, batches, forward) after training"
)
TEXT_OF_SAMPLES = (
    "x: expected at least 4 values per channel of a sample when training, got 3 in shape "
    "(5, 2, 3); use larger samples, or GroupNorm or LayerNorm, whose statistics are of several "
    "channels"
)
# Two samples of three channels, whose statistics are a guess.
X = np.array([[1, 2, 3], [4, 6, 8]], np.float32)


def warnings_of(function, *arguments, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **keywords)
    return caught


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (partial(cbn.BatchNorm1d, 3), X, TEXT),
        (partial(cbn.InstanceNorm1d, 2), np.ones((5, 2, 3), np.float32), TEXT_OF_SAMPLES),
    ],
    ids=["batch", "instance"],
)
def test_once_per_layer_at_the_line_that_calls(layer, x, text):
    norm = layer()
    with pytest.warns(cbn.SmallBatchWarning) as caught:
        norm(x)
    assert [str(warning.message) for warning in caught] == [text]
    assert caught[0].filename == __file__
    assert Path(__file__).read_text().splitlines()[caught[0].lineno - 1].strip() == "norm(x)"
    assert warnings_of(norm, x) == []
    assert len(warnings_of(layer(), x)) == 1


@pytest.mark.parametrize(
    ("layer", "axis", "shape", "warns"),
    [
        (cbn.BatchNorm1d, 1, (3, 3), True),
        (cbn.BatchNorm1d, 1, (4, 3), False),
        (cbn.BatchNorm1d, 1, (1, 3, 3), True),
        (cbn.BatchNorm1d, 1, (1, 3, 4), False),
        (cbn.BatchNorm1d, -1, (1, 4, 3), False),
        (cbn.BatchNorm2d, 1, (3, 1, 2), True),
        (cbn.BatchNorm2d, -1, (2, 2, 3), False),
        (cbn.BatchNorm3d, 1, (1, 3, 1, 1, 2), True),
        (cbn.BatchNorm1d, 1, (0, 3), False),  # nothing is learnt
        # Of a sample, however many there are.
        (cbn.InstanceNorm1d, 1, (9, 3, 3), True),
        (cbn.InstanceNorm1d, 1, (9, 3, 4), False),
        (cbn.InstanceNorm1d, 1, (3, 2), True),
        (cbn.InstanceNorm1d, -1, (9, 3, 3), True),
        (cbn.InstanceNorm2d, 1, (9, 3, 1, 2), True),
        (cbn.InstanceNorm2d, -1, (9, 2, 2, 3), False),
        (cbn.InstanceNorm2d, -1, (2, 1, 3), True),
        (cbn.InstanceNorm3d, 1, (3, 1, 1, 3), True),
        (cbn.InstanceNorm3d, 1, (0, 3, 1, 1, 3), False),
    ],
)
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_values_per_channel(layer, axis, shape, warns, track_running_stats):
    x = np.random.default_rng(0).random(shape, np.float32)
    norm = layer(3, channel_axis=axis, track_running_stats=track_running_stats)
    assert warnings_of(norm.eval(), x) == []
    assert len(warnings_of(norm.train(), x)) == warns
    assert warnings_of(norm, x) == []
    assert warnings_of(cbn.freeze(layer(3, channel_axis=axis, track_running_stats=True)), x) == []


@pytest.mark.parametrize(
    "x",
    [X[:1], X.astype(int), X.astype(float), X[:, :2], X[0], np.ma.array(X)],
    ids=["one", "integers", "dtype", "channels", "axes", "mask"],
)
def test_what_is_refused_is_not_warned_of(x):
    bn = cbn.BatchNorm1d(3)
    with pytest.raises((TypeError, ValueError), match=r"^x: expected "):
        bn(x)
    with pytest.raises(ValueError, match=r"^out: expected shape "):
        bn(X, out=X[:1])
    assert len(warnings_of(bn, X)) == 1


def test_a_large_list():
    assert warnings_of(cbn.BatchNorm1d(3), X.tolist() * 2) == []


@pytest.mark.parametrize("x", [X.tolist(), np.asfortranarray(X)], ids=["list", "copied"])
def test_what_is_converted_first(x):
    assert [str(warning.message) for warning in warnings_of(cbn.BatchNorm1d(3), x)] == [TEXT]


def test_functions_do_not_warn():
    assert warnings_of(functional.batch_norm, X, None, None, training=True) == []


def test_the_result_is_that_of_any_batch():
    bn = cbn.BatchNorm1d(3, eps=0, momentum=1)
    with pytest.warns(cbn.SmallBatchWarning):
        y = bn(X)
    np.testing.assert_array_equal(y, [[-1, -1, -1], [1, 1, 1]])
    assert bn.running_mean.tolist() == [2.5, 4, 5.5]
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (cbn.BatchNorm1d(3), X),
        (cbn.BatchNorm1d(3, nonfinite="raise"), X),
        (cbn.InstanceNorm1d(2, track_running_stats=True), np.ones((5, 2, 3), np.float32)),
    ],
    ids=["batch", "raise", "instance"],
)
def test_as_an_error_it_refuses_the_call_every_time(norm, x):
    expected, before = x.copy(), norm.state_dict()
    for _ in range(2):
        with pytest.raises(cbn.SmallBatchWarning):  # pytest makes warnings errors
            norm(x, out=x)
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_equal(norm.state_dict(), before)
    with pytest.raises(RuntimeError, match=r"^backward: expected a forward call before it"):
        norm.backward(x)
    assert len(warnings_of(norm, x)) == 1
    assert norm.num_batches_tracked == 1


def test_a_layer_that_is_recalibrated_does_not_warn():
    bn, norm = cbn.BatchNorm1d(3), cbn.InstanceNorm1d(3, track_running_stats=True)
    x = np.ones((1, 3, 2), np.float32)
    assert warnings_of(cbn.recalibrate, [bn, norm], [x], lambda x: norm(bn(x))) == []
    assert len(warnings_of(bn, x)) == len(warnings_of(norm, x)) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_of_a_layer_that_has_warned_does_not(duplicate):
    bn = cbn.BatchNorm1d(3)
    assert len(warnings_of(duplicate(bn), X)) == 1
    assert len(warnings_of(bn, X)) == 1
    assert warnings_of(duplicate(bn), X) == []


def test_a_user_sees_it_and_can_switch_it_off():
    code = "import cbn\ncbn.BatchNorm1d(1)([[1.0], [2.0]])"
    off = "import warnings, cbn\nwarnings.simplefilter('ignore', cbn.SmallBatchWarning)\n"
    seen, silent = (run_python("-c", text) for text in (code, off + code))
    assert seen.returncode == silent.returncode == 0
    assert seen.stderr.startswith("<string>:2: SmallBatchWarning: x: expected at least 4 values")
    assert silent.stderr == ""
