"""Every layer and mode against PyTorch itself, and states exchanged with it."""

import numpy as np
import pytest

import cbn
from cbn import functional

LAYERS = [
    pytest.param("BatchNorm1d", (16, 5), id="BatchNorm1d_NC"),
    pytest.param("BatchNorm1d", (8, 5, 130), id="BatchNorm1d_NCL"),
    pytest.param("BatchNorm2d", (4, 5, 7, 7), id="BatchNorm2d_by_row"),
    pytest.param("BatchNorm2d", (4, 5, 16, 17), id="BatchNorm2d_by_plane"),
    pytest.param("BatchNorm3d", (2, 5, 4, 6, 7), id="BatchNorm3d"),
]
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7},
        {"eps": 0.5},
    ],
    ids=lambda options: "_".join(f"{name}_{value}" for name, value in options.items()) or "default",
)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


def make_torch_layer(torch, rng, name, dtype, **options):
    """A layer of PyTorch with random parameters and statistics."""
    layer = getattr(torch.nn, name)(5, dtype=getattr(torch, dtype), **options)
    for key, tensor in layer.state_dict().items():
        if key != "num_batches_tracked":
            low = 0.5 if key == "running_var" else -2
            tensor[...] = torch.tensor(rng.uniform(low, 2, 5))
    return layer


def to_numpy(tensor):
    return None if tensor is None else tensor.detach().numpy()


@pytest.fixture
def assert_same_state(assert_close):
    def assert_same_state(layer, torch_layer):
        state = layer.state_dict()
        expected = torch_layer.state_dict()
        assert list(state) == list(expected)
        for key, tensor in expected.items():
            assert_close(key, state[key], tensor.numpy(), layer.dtype)

    return assert_same_state


@pytest.fixture
def assert_same_step(torch, assert_close, assert_same_state):
    def assert_same_step(layer, torch_layer, x, grad_output):
        """Run both layers forward and backward, and compare every number they give.

        PyTorch computes in float64 on the same numbers: what it loses to summing in float32, two
        units of the fifth decimal of weight_grad here, is not to be held against cbn.
        """
        torch_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        torch_layer.zero_grad()
        torch_y = torch_layer(torch_x)
        torch_y.backward(torch.tensor(grad_output, dtype=torch.float64))

        assert_close("y", layer(x), to_numpy(torch_y), x.dtype)
        assert_close("grad_input", layer.backward(grad_output), to_numpy(torch_x.grad), x.dtype)
        for name in ("weight", "bias"):
            parameter = getattr(torch_layer, name)
            gradient = None if parameter is None else to_numpy(parameter.grad)
            assert_close(f"{name}_grad", getattr(layer, f"{name}_grad"), gradient, x.dtype)
        assert_same_state(layer, torch_layer)

    return assert_same_step


@OPTIONS
@DTYPE
@pytest.mark.parametrize(("name", "shape"), LAYERS)
def test_layer(torch, rng, assert_same_step, name, shape, dtype, options):
    torch_layer = make_torch_layer(torch, rng, name, "float64", **options)
    layer = getattr(cbn, name)(5, dtype=dtype, **options)
    layer.load_state_dict(torch_layer.state_dict())
    for batch_size in (shape[0], 2 * shape[0]):
        x = rng.normal(1, 2, (batch_size, *shape[1:])).astype(dtype)
        grad_output = rng.standard_normal(x.shape).astype(dtype)
        assert_same_step(layer, torch_layer, x, grad_output)
    assert_same_step(layer.eval(), torch_layer.eval(), x, grad_output)


@TRAINING
@DTYPE
def test_tracking_switched_off_on_a_live_layer(torch, rng, assert_same_step, dtype, training):
    torch_layer = make_torch_layer(torch, rng, "BatchNorm2d", "float64").train(training)
    layer = cbn.BatchNorm2d(5, dtype=dtype).train(training)
    layer.load_state_dict(torch_layer.state_dict())
    layer.track_running_stats = torch_layer.track_running_stats = False
    x = rng.normal(1, 2, (4, 5, 7, 7)).astype(dtype)
    assert_same_step(layer, torch_layer, x, rng.standard_normal(x.shape).astype(dtype))


@TRAINING
@DTYPE
@pytest.mark.parametrize(
    ("name", "memory_format", "shape"),
    [
        pytest.param("BatchNorm2d", "channels_last", (4, 5, 7, 8), id="NHWC"),
        pytest.param("BatchNorm3d", "channels_last_3d", (2, 5, 3, 7, 8), id="NDHWC"),
    ],
)
def test_channels_last(torch, rng, assert_close, name, memory_format, shape, dtype, training):
    x = rng.normal(1, 2, shape).astype(dtype)
    torch_layer = make_torch_layer(torch, rng, name, dtype).train(training)
    layer = getattr(cbn, name)(5, dtype=dtype, channel_axis=-1).train(training)
    layer.load_state_dict(torch_layer.state_dict())
    torch_x = torch.tensor(x).contiguous(memory_format=getattr(torch, memory_format))
    expected = to_numpy(torch_layer(torch_x))
    y = layer(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    assert_close("y", np.moveaxis(y, -1, 1), expected, dtype)


@TRAINING
@DTYPE
def test_functional_batch_norm(torch, rng, assert_close, dtype, training):
    x = rng.normal(1, 2, (6, 5, 40)).astype(dtype)
    arguments = [rng.uniform(0.5, 2, 5).astype(dtype) for _ in range(4)]
    torch_arguments = [torch.tensor(argument) for argument in arguments]
    expected = torch.nn.functional.batch_norm(
        torch.tensor(x), *torch_arguments, training, 0.3, 0.01
    )
    y = functional.batch_norm(x, *arguments, training, 0.3, 0.01)
    assert_close("y", y, to_numpy(expected), dtype)
    assert_close("running_mean", arguments[0], to_numpy(torch_arguments[0]), dtype)
    assert_close("running_var", arguments[1], to_numpy(torch_arguments[1]), dtype)


@OPTIONS
@DTYPE
def test_state_from_torch(torch, rng, dtype, options):
    torch_layer = make_torch_layer(torch, rng, "BatchNorm2d", dtype, **options)
    torch_layer(torch.ones(2, 5, 3, 3, dtype=getattr(torch, dtype)))
    layer = cbn.BatchNorm2d(5, dtype=dtype, **options)
    assert layer.load_state_dict(torch_layer.state_dict()) == ([], [])
    for key, tensor in torch_layer.state_dict().items():
        np.testing.assert_array_equal(getattr(layer, key), tensor.numpy(), err_msg=key)


@OPTIONS
@DTYPE
def test_state_to_torch(torch, rng, dtype, options):
    layer = cbn.BatchNorm2d(5, dtype=dtype, **options)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter[...] = rng.uniform(-2, 2, 5)
    layer(rng.normal(1, 2, (2, 5, 3, 3)).astype(dtype))
    torch_layer = torch.nn.BatchNorm2d(5, dtype=getattr(torch, dtype), **options)
    state = {key: torch.from_numpy(value) for key, value in layer.state_dict().items()}
    result = torch_layer.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for key, tensor in torch_layer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), getattr(layer, key), err_msg=key)


@OPTIONS
@DTYPE
def test_state_of_a_fresh_layer_is_that_of_a_fresh_torch_layer(torch, dtype, options):
    state = cbn.BatchNorm2d(5, dtype=dtype, **options).state_dict()
    torch_layer = torch.nn.BatchNorm2d(5, dtype=getattr(torch, dtype), **options)
    expected = {key: tensor.numpy() for key, tensor in torch_layer.state_dict().items()}
    assert list(state) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value, err_msg=key, strict=True)
