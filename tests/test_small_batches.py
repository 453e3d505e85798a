"""The warning of a layer that is trained on very few values per channel."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cbn
from cbn import functional

TEXT = (
    "x: expected at least 4 values per channel when training, got 2 in shape (2, 3); "
    "use a larger batch, or GroupNorm or LayerNorm, which do not depend on the batch, or "
    "cbn.recalibrate(model, batches, forward) after training"
)
# Two samples of three channels, whose statistics are a guess.
X = np.array([[1, 2, 3], [4, 6, 8]], np.float32)


def warnings_of(function, *arguments, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **keywords)
    return caught


def test_once_per_layer_at_the_line_that_calls():
    bn = cbn.BatchNorm1d(3)
    with pytest.warns(cbn.SmallBatchWarning) as caught:
        bn(X)
    assert [str(warning.message) for warning in caught] == [TEXT]
    assert caught[0].filename == __file__
    assert Path(__file__).read_text().splitlines()[caught[0].lineno - 1].strip() == "bn(X)"
    assert warnings_of(bn, X) == []
    assert len(warnings_of(cbn.BatchNorm1d(3), X)) == 1


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
    ],
)
def test_values_per_channel(layer, axis, shape, warns):
    x = np.random.default_rng(0).random(shape, np.float32)
    assert len(warnings_of(layer(3, channel_axis=axis), x)) == warns


@pytest.mark.parametrize("x", [X.tolist(), np.asfortranarray(X)], ids=["list", "copied"])
def test_what_is_converted_first(x):
    assert [str(warning.message) for warning in warnings_of(cbn.BatchNorm1d(3), x)] == [TEXT]


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_eval_mode_does_not_warn(track_running_stats):
    bn = cbn.BatchNorm1d(3, track_running_stats=track_running_stats)
    assert warnings_of(bn.eval(), X) == []
    assert len(warnings_of(bn.train(), X)) == 1


def test_functions_do_not_warn():
    assert warnings_of(functional.batch_norm, X, None, None, training=True) == []


def test_the_result_is_that_of_any_batch():
    bn = cbn.BatchNorm1d(3, eps=0, momentum=1)
    with pytest.warns(cbn.SmallBatchWarning):
        y = bn(X)
    np.testing.assert_array_equal(y, [[-1, -1, -1], [1, 1, 1]])
    assert bn.running_mean.tolist() == [2.5, 4, 5.5]
    assert bn.num_batches_tracked == 1


def test_as_an_error_it_leaves_a_layer_that_works():
    bn = cbn.BatchNorm1d(3)
    with pytest.raises(cbn.SmallBatchWarning):  # pytest makes warnings errors
        bn(X)
    assert bn.num_batches_tracked == 1
    assert bn(X).shape == bn.backward(X).shape == X.shape


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_a_copy_of_a_layer_that_has_warned_does_not(duplicate):
    bn = cbn.BatchNorm1d(3)
    assert len(warnings_of(duplicate(bn), X)) == 1
    assert len(warnings_of(bn, X)) == 1
    assert warnings_of(duplicate(bn), X) == []


def test_a_user_sees_it_and_can_switch_it_off():
    code = "import cbn\ncbn.BatchNorm1d(1)([[1.0], [2.0]])"
    off = "import warnings, cbn\nwarnings.simplefilter('ignore', cbn.SmallBatchWarning)\n"
    seen, silent = (
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        for text in (code, off + code)
    )
    assert seen.stderr.startswith("<string>:2: SmallBatchWarning: x: expected at least 4 values")
    assert silent.stderr == ""
