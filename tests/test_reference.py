"""The float64 reference against loops, finite differences and PyTorch."""

from functools import partial
from math import fsum

import numpy as np
import pytest
from differences import central_differences
from norm_kinds import Kind, kinds
from norms_table import INSTANCE, ROWS

from cbn import reference

SHAPES = [
    pytest.param((4, 3), 1, id="NC"),
    pytest.param((2, 3, 5), 1, id="NCL"),
    pytest.param((2, 5, 3), -1, id="NLC"),
    pytest.param((2, 3, 2, 4), 1, id="NCHW"),
    pytest.param((2, 2, 4, 3), -1, id="NHWC"),
    pytest.param((3, 2, 4), 0, id="CHW"),
]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
CHANNELS = 3


def channel(array, index, channel_axis):
    """The values of one channel, as a list."""
    return np.take(array, index, axis=channel_axis).ravel().tolist()


@pytest.fixture
def parameters(rng):
    return {
        "running_mean": rng.uniform(-1, 1, CHANNELS),
        "running_var": rng.uniform(0.5, 2, CHANNELS),
        "weight": rng.uniform(0.5, 2, CHANNELS),
        "bias": rng.uniform(-1, 1, CHANNELS),
    }


@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_statistics_are_those_of_a_loop(rng, assert_close, shape, channel_axis):
    x = rng.normal(2, 3, shape)
    mean, var, count = reference.batch_norm_stats(x, channel_axis=channel_axis)
    assert count == x.size // CHANNELS
    for index in range(CHANNELS):
        values = channel(x, index, channel_axis)
        expected_mean = fsum(values) / count
        expected_var = fsum((value - expected_mean) ** 2 for value in values) / count
        assert_close("mean", mean[index], expected_mean, np.float64)
        assert_close("var", var[index], expected_var, np.float64)


@TRAINING
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_output_is_that_of_a_loop(rng, assert_close, parameters, shape, channel_axis, training):
    x = rng.normal(2, 3, shape)
    y, _, _ = reference.batch_norm(
        x, **parameters, training=training, eps=0.1, channel_axis=channel_axis
    )
    for index in range(CHANNELS):
        values = channel(x, index, channel_axis)
        mean, var = parameters["running_mean"][index], parameters["running_var"][index]
        if training:
            mean = fsum(values) / len(values)
            var = fsum((value - mean) ** 2 for value in values) / len(values)
        weight, bias = parameters["weight"][index], parameters["bias"][index]
        expected = [(value - mean) / (var + 0.1) ** 0.5 * weight + bias for value in values]
        assert_close("y", channel(y, index, channel_axis), expected, np.float64)


@pytest.mark.parametrize("correction", [0, 1, 1.5])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_learn_the_batch(rng, assert_close, momentum, correction):
    x = rng.normal(2, 3, (7, 1))
    _, running_mean, running_var = reference.batch_norm(
        x, [5.0], [7.0], training=True, momentum=momentum, correction=correction
    )
    squares = fsum((value - x.mean()) ** 2 for value in x.ravel())
    expected_mean = 5.0 + momentum * (x.mean() - 5.0)
    expected_var = 7.0 + momentum * (squares / (7 - correction) - 7.0)
    assert_close("running_mean", running_mean, [expected_mean], np.float64)
    assert_close("running_var", running_var, [expected_var], np.float64)


def test_running_statistics_given_are_not_modified(rng):
    running_mean, running_var = np.zeros(3), np.ones(3)
    _, new_mean, new_var = reference.batch_norm(
        rng.normal(2, 3, (5, 3)), running_mean, running_var, training=True
    )
    assert not running_mean.any()
    assert (running_var == 1).all()
    assert (new_mean != 0).all()
    assert (new_var != 1).all()


def test_eval_returns_the_running_statistics_unchanged(rng):
    _, running_mean, running_var = reference.batch_norm(rng.normal(2, 3, (5, 1)), [3.0], [4.0])
    assert running_mean.tolist() == [3.0]
    assert running_var.tolist() == [4.0]


def test_eval_without_running_statistics_is_an_error():
    with pytest.raises(ValueError, match="expected arrays when not training"):
        reference.batch_norm(np.ones((2, 3)), None, None)


def test_an_empty_batch_has_no_statistics_and_moves_none():
    x = np.empty((0, 3, 4))
    mean, var, count = reference.batch_norm_stats(x)
    y, running_mean, running_var = reference.batch_norm(x, [1, 2, 3], [4, 5, 6], training=True)
    grad_input, grad_weight, grad_bias = reference.batch_norm_backward(x, x, mean, var)
    assert count == 0
    assert y.shape == grad_input.shape == x.shape
    assert running_mean.tolist() == [1, 2, 3]
    assert running_var.tolist() == [4, 5, 6]
    for quantity in (mean, var, grad_weight, grad_bias):
        assert quantity.tolist() == [0, 0, 0]


@TRAINING
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_gradients_are_finite_differences(
    rng, assert_close, parameters, shape, channel_axis, training
):
    x = rng.normal(2, 3, shape)
    grad_output = rng.normal(0, 1, shape)

    options = {"training": training, "eps": 0.1, "channel_axis": channel_axis}

    def loss():
        return (grad_output * reference.batch_norm(x, **parameters, **options)[0]).sum()

    mean, var = parameters["running_mean"], parameters["running_var"]
    if training:
        mean, var, _ = reference.batch_norm_stats(x, channel_axis=channel_axis)
    gradients = reference.batch_norm_backward(
        grad_output, x, mean, var, parameters["weight"], **options
    )
    arrays = {"x": x, "weight": parameters["weight"], "bias": parameters["bias"]}
    for (name, array), gradient in zip(arrays.items(), gradients, strict=True):
        expected = central_differences(loss, array)
        assert_close(f"gradient of {name}", gradient, expected, np.float64)


@TRAINING
@pytest.mark.parametrize("shape", [(9, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
def test_agrees_with_torch(torch, rng, assert_close, parameters, shape, training):
    x = rng.normal(2, 3, shape)
    grad_output = rng.normal(0, 1, shape)
    tensors = {name: torch.tensor(value) for name, value in parameters.items()}
    differentiable = [torch.tensor(x), tensors["weight"], tensors["bias"]]
    for tensor in differentiable:
        tensor.requires_grad_()
    expected = torch.nn.functional.batch_norm(
        differentiable[0], **tensors, training=training, momentum=0.3, eps=0.1
    )
    expected.backward(torch.tensor(grad_output))
    y, running_mean, running_var = reference.batch_norm(
        x, **parameters, training=training, momentum=0.3, eps=0.1
    )
    assert_close("y", y, expected.detach().numpy(), np.float64)
    assert_close("running_mean", running_mean, tensors["running_mean"].numpy(), np.float64)
    assert_close("running_var", running_var, tensors["running_var"].numpy(), np.float64)

    mean, var = parameters["running_mean"], parameters["running_var"]
    if training:
        mean, var, _ = reference.batch_norm_stats(x)
    gradients = reference.batch_norm_backward(
        grad_output, x, mean, var, parameters["weight"], training=training, eps=0.1
    )
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, gradient, tensor in zip(names, gradients, differentiable, strict=True):
        assert_close(name, gradient, tensor.grad.numpy(), np.float64)


# ------------------------------------------------------------------------- norms of single samples

OF_SAMPLES = pytest.mark.parametrize(
    "kind",
    [
        *kinds(
            rows=[(3, 2, 4)],
            groups=[((2, 6, 3), 2), ((2, 6, 3), 3), ((3, 4), 2)],
            instances=[(2, 3, 5)],
        ),
        Kind(INSTANCE[1], (2, 2, 4, 3), -1),
        Kind(ROWS[0], (4, 5), row=5),
        Kind(ROWS[1], (4, 5), row=[5]),
    ],
    ids=str,
)


@pytest.fixture
def scene(rng):
    def scene(kind):
        """An input, its weight and its bias; their output; a gradient of that, and theirs."""
        arrays = {"x": rng.normal(2, 3, kind.shape)}
        for name in kind.norm.parameters:
            arrays[name] = rng.uniform(0.5, 2, kind.parameter_shape)
        forward, backward = (partial(function, eps=0.1) for function in kind.functions(reference))
        grad_output = rng.normal(0, 1, kind.shape)
        gradients = backward(grad_output, arrays["x"], weight=arrays["weight"])
        return arrays, lambda: forward(**arrays), grad_output, gradients

    return scene


@OF_SAMPLES
def test_gradients_of_norms_are_finite_differences(assert_close, scene, kind):
    arrays, output, grad_output, gradients = scene(kind)

    def loss():
        return (grad_output * output()).sum()

    for (name, array), gradient in zip(arrays.items(), gradients, strict=True):
        expected = central_differences(loss, array)
        assert_close(f"gradient of {name}", gradient, expected, np.float64)


@OF_SAMPLES
def test_norms_agree_with_torch(torch, assert_close, scene, kind):
    arrays, output, _, _ = scene(kind)
    options = {"eps": 0.1, "dtype": torch.float64, kind.norm.affine: True}
    layer = kind.norm.torch_layer(torch, kind.C, kind.groups, kind.row, **options)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    x = tensors.pop("x").moveaxis(kind.axis, 1)
    layer.load_state_dict(tensors)
    expected = layer(x).detach().numpy()
    assert_close("y", np.moveaxis(output(), kind.axis, 1), expected, np.float64)


@OF_SAMPLES
def test_norms_of_no_samples(scene, kind):
    arrays, output, _, gradients = scene(kind._replace(shape=(0, *kind.shape[1:])))
    assert output().shape == arrays["x"].shape
    for array, gradient in zip(arrays.values(), gradients, strict=True):
        assert gradient.shape == array.shape
        assert not gradient.any()


@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_running_statistics_of_instance_norm(torch, rng, assert_close, correction, use_input_stats):
    x, mean, var = rng.normal(2, 3, (4, 3, 7)), rng.normal(size=3), rng.uniform(1, 2, 3)
    y, new_mean, new_var = reference.instance_norm(
        x, mean, var, use_input_stats=use_input_stats, momentum=0.3, correction=correction
    )
    torch_mean, torch_var = torch.tensor(mean), torch.tensor(var)
    expected = torch.nn.functional.instance_norm(
        torch.tensor(x), torch_mean, torch_var, None, None, use_input_stats, 0.3
    )
    assert_close("y", y, expected.numpy(), np.float64)
    assert_close("running_mean", new_mean, torch_mean.numpy(), np.float64)
    learnt = torch_var.numpy() - 0.7 * var  # 0.3 of the variance by n - 1
    if use_input_stats:
        assert_close("new_var", new_var, 0.7 * var + learnt * 6 / (7 - correction), np.float64)
    else:
        assert_close("new_var", new_var, var, np.float64)
