"""Gradients of layers and functions against finite differences of their forward pass."""

import numpy as np
import pytest

import cbn
from cbn import functional

# By row, by row with tails, by plane, by plane with a tail.
LAYERS = [
    pytest.param("BatchNorm1d", (7, 3), 1, id="BatchNorm1d_NC"),
    pytest.param("BatchNorm1d", (2, 3, 5), 1, id="BatchNorm1d_NCL"),
    pytest.param("BatchNorm1d", (2, 5, 3), -1, id="BatchNorm1d_NLC"),
    pytest.param("BatchNorm2d", (2, 2, 8, 16), 1, id="BatchNorm2d_NCHW"),
    pytest.param("BatchNorm2d", (2, 3, 4, 2), -1, id="BatchNorm2d_NHWC"),
    pytest.param("BatchNorm2d", (2, 5, 6), 1, id="BatchNorm2d_CHW"),
    pytest.param("BatchNorm3d", (1, 2, 3, 5, 9), 1, id="BatchNorm3d_NCDHW"),
    pytest.param("BatchNorm3d", (2, 3, 2, 2, 2), -1, id="BatchNorm3d_NDHWC"),
]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def finite_differences(loss, array, step=1e-5):
    """The gradient of loss() with respect to an array, by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = loss()
        array[index] = value - step
        below = loss()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient


@TRAINING
@pytest.mark.parametrize(("name", "shape", "channel_axis"), LAYERS)
def test_layer(rng, assert_close, name, shape, channel_axis, training):
    unbatched = name == "BatchNorm2d" and len(shape) == 3
    num_features = shape[0 if unbatched else channel_axis]
    layer = getattr(cbn, name)(
        num_features,
        eps=0.1,
        dtype="float64",
        channel_axis=channel_axis,
        running_mean=rng.uniform(-1, 1, num_features),
        running_var=rng.uniform(0.5, 2, num_features),
    ).train(training)
    layer.track_running_stats = False  # the loss is evaluated many times and must stay the same
    layer.weight[...] = rng.uniform(-2, 2, num_features)
    layer.bias[...] = rng.uniform(-2, 2, num_features)
    x = rng.normal(1, 2, shape)
    grad_output = rng.standard_normal(shape)

    def loss():
        return (grad_output * layer(x)).sum()

    loss()
    grad_input = layer.backward(grad_output)
    for quantity, gradient, array in (
        ("grad_input", grad_input, x),
        ("weight_grad", layer.weight_grad, layer.weight),
        ("bias_grad", layer.bias_grad, layer.bias),
    ):
        assert_close(quantity, gradient, finite_differences(loss, array), np.float64)


@TRAINING
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        pytest.param((5, 3, 4), 1, id="by_row"),
        pytest.param((1, 2, 131), 1, id="by_plane"),
        pytest.param((5, 4, 3), -1, id="channels_last"),
    ],
)
def test_function(rng, assert_close, shape, channel_axis, training):
    x = rng.normal(1, 2, shape)
    grad_output = rng.standard_normal(shape)
    num_features = shape[channel_axis]
    mean, var = rng.uniform(-1, 1, num_features), rng.uniform(0.5, 2, num_features)
    weight, bias = rng.uniform(-2, 2, num_features), rng.uniform(-2, 2, num_features)

    def loss():
        running = (None, None) if training else (mean, var)
        y = functional.batch_norm(
            x, *running, weight, bias, training, eps=0.1, channel_axis=channel_axis
        )
        return (grad_output * y).sum()

    statistics = (mean, var)
    if training:
        statistics = functional.batch_norm_stats(x, channel_axis=channel_axis)[:2]
    gradients = functional.batch_norm_backward(
        grad_output, x, *statistics, weight, training, eps=0.1, channel_axis=channel_axis
    )
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, gradient, array in zip(names, gradients, (x, weight, bias), strict=True):
        assert_close(name, gradient, finite_differences(loss, array), np.float64)
