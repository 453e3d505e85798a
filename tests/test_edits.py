"""What a caller may do to arrays and attributes around a call: nothing is corrupted by it."""

from functools import partial

import numpy as np
import pytest

import cbn
from cbn.functional import batch_norm, instance_norm

SHAPE = (16, 3, 5, 5)


@pytest.fixture
def x(rng):
    return rng.standard_normal(SHAPE, np.float32)


class Tensor:
    """An array under another name, which it shares its memory with."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_statistics_changed_before_backward(rng, x):
    grad_output = rng.standard_normal(SHAPE, np.float32)
    bn = cbn.BatchNorm2d(3, running_var=4.0).eval()
    bn(x)
    expected = bn.backward(grad_output)
    bn.reset_running_stats()
    np.testing.assert_array_equal(bn.backward(grad_output), expected)
    bn.running_var.resize((1,), refcheck=False)
    np.testing.assert_array_equal(bn.backward(grad_output), expected)


def test_out_over_a_tensor_is_noticed(x):
    bn = cbn.BatchNorm2d(3)
    bn(Tensor(x), out=x)
    with pytest.raises(RuntimeError, match="an out= wrote over"):
        bn.backward(np.ones_like(x))


def test_out_over_part_of_a_tensor_is_refused():
    memory = np.ones(2 * 48, np.float32)
    x, out = memory[:48].reshape(16, 3), memory[24:72].reshape(16, 3)
    with pytest.raises(ValueError, match="got a partial overlap"):
        cbn.BatchNorm1d(3)(Tensor(x), out=out)


@pytest.mark.parametrize("norm", [partial(batch_norm, training=True), instance_norm])
def test_running_statistics_within_a_tensor_are_refused(norm):
    memory = np.arange(24.0)
    before, x = memory.copy(), memory.reshape(4, 3, 2)
    with pytest.raises(ValueError, match="running_var and x: expected memory of their own"):
        norm(Tensor(x), np.zeros(3), memory[:3])
    np.testing.assert_array_equal(memory, before)


def test_strides_of_axes_of_length_one_do_not_matter(rng):
    x = rng.standard_normal((8, 1), np.float32)
    expected = cbn.BatchNorm1d(1)(x)
    np.testing.assert_array_equal(cbn.BatchNorm1d(1)(x, out=x.reshape(8)[:, None]), expected)


def test_correction_matters_only_to_running_statistics():
    x = np.array([[1.0], [3.0]])
    np.testing.assert_array_equal(
        batch_norm(x, None, None, training=True, correction=5, eps=0.0), [[-1], [1]]
    )


@pytest.mark.parametrize("order", ["C", "F"])  # the ordinary call, and the one that is looked at
def test_a_batch_counts_without_statistics_to_learn(order, x):
    bn = cbn.BatchNorm2d(3)
    bn.running_mean = bn.running_var = None
    bn(np.asarray(x, order=order))
    assert bn.num_batches_tracked == 1
