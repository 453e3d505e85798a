"""Instance, group, layer and RMS norm against PyTorch itself, and states exchanged with it."""

import inspect

import numpy as np
import pytest

import cbn
from cbn import functional

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
# The name of the layer, its arguments, its options, and the shape of an input.
LAYERS = [
    pytest.param("InstanceNorm1d", (5,), {}, (4, 5, 130), id="InstanceNorm1d"),
    pytest.param("InstanceNorm1d", (5,), {}, (5, 9), id="InstanceNorm1d_unbatched"),
    pytest.param("InstanceNorm1d", (5,), {"affine": True}, (4, 5, 7), id="InstanceNorm1d_affine"),
    pytest.param(
        "InstanceNorm1d", (5,), {"affine": True, "bias": False}, (4, 5, 7), id="InstanceNorm1d_bias"
    ),
    pytest.param("InstanceNorm2d", (5,), {"affine": True}, (4, 5, 7, 7), id="InstanceNorm2d"),
    pytest.param(
        "InstanceNorm2d", (5,), {"affine": True}, (5, 7, 6), id="InstanceNorm2d_unbatched"
    ),
    pytest.param("InstanceNorm2d", (5,), {"eps": 0.5}, (4, 5, 16, 17), id="InstanceNorm2d_eps"),
    pytest.param("InstanceNorm3d", (5,), {"affine": True}, (2, 5, 3, 4, 5), id="InstanceNorm3d"),
    pytest.param("InstanceNorm3d", (5,), {}, (5, 3, 4, 5), id="InstanceNorm3d_unbatched"),
    pytest.param("GroupNorm", (2, 6), {}, (4, 6), id="GroupNorm_NC"),
    pytest.param("GroupNorm", (3, 6), {}, (4, 6, 13), id="GroupNorm_NCL"),
    pytest.param("GroupNorm", (2, 6), {}, (4, 6, 7, 7), id="GroupNorm_NCHW"),
    pytest.param("GroupNorm", (1, 6), {"affine": False}, (2, 6, 3, 4, 5), id="GroupNorm_plain"),
    pytest.param("GroupNorm", (6, 6), {"bias": False}, (4, 6, 20), id="GroupNorm_bias"),
    pytest.param("GroupNorm", (2, 6), {"eps": 0.5}, (4, 6, 20), id="GroupNorm_eps"),
    pytest.param("LayerNorm", (11,), {}, (7, 11), id="LayerNorm"),
    pytest.param("LayerNorm", ((3, 11),), {}, (2, 5, 3, 11), id="LayerNorm_2_axes"),
    pytest.param("LayerNorm", ([11],), {"bias": False}, (7, 11), id="LayerNorm_bias"),
    pytest.param("LayerNorm", (11,), {"elementwise_affine": False}, (7, 11), id="LayerNorm_plain"),
    pytest.param("LayerNorm", (768,), {"eps": 0.5}, (3, 4, 768), id="LayerNorm_eps"),
    pytest.param("LayerNorm", (11,), {}, (11,), id="LayerNorm_one_row"),
    pytest.param("RMSNorm", (11,), {"eps": 1e-6}, (7, 11), id="RMSNorm"),
    pytest.param("RMSNorm", ((3, 11),), {"eps": 0.5}, (2, 5, 3, 11), id="RMSNorm_2_axes"),
    pytest.param(
        "RMSNorm", (768,), {"eps": 1e-6, "elementwise_affine": False}, (7, 768), id="RMSNorm_plain"
    ),
]
TRACKING = [
    {"track_running_stats": True},
    {"track_running_stats": True, "affine": True},
    {"track_running_stats": True, "momentum": 0.7},
    {"track_running_stats": True, "momentum": 1.0, "affine": True, "eps": 0.5},
]


def make_pair(torch, rng, name, arguments, options, dtype):
    """A layer of PyTorch in float64, and one of cbn in dtype, of the same random state."""
    torch_layer = getattr(torch.nn, name)(*arguments, dtype=torch.float64, **options)
    for key, tensor in torch_layer.state_dict().items():
        if key != "num_batches_tracked":
            low = 0.5 if key == "running_var" else -2
            tensor[...] = torch.tensor(rng.uniform(low, 2, tuple(tensor.shape)))
    layer = getattr(cbn, name)(*arguments, dtype=dtype, **options)
    assert layer.load_state_dict(torch_layer.state_dict()) == ([], [])
    return layer, torch_layer


@pytest.fixture
def assert_same_step(torch, rng, assert_close):
    def assert_same_step(layer, torch_layer, shape):
        """Run both layers forward and backward, and compare every number they give.

        PyTorch computes in float64 on the same numbers.
        """
        x = rng.normal(1, 2, shape).astype(layer.dtype)
        grad_output = rng.standard_normal(shape).astype(layer.dtype)
        torch_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        torch_layer.zero_grad()
        torch_y = torch_layer(torch_x)
        torch_y.backward(torch.tensor(grad_output, dtype=torch.float64))

        assert_close("y", layer(x), torch_y.detach().numpy(), x.dtype)
        assert_close("grad_input", layer.backward(grad_output), torch_x.grad.numpy(), x.dtype)
        for name in ("weight", "bias"):
            parameter = getattr(torch_layer, name, None)
            gradient = None if parameter is None else parameter.grad.numpy()
            assert_close(f"{name}_grad", getattr(layer, f"{name}_grad"), gradient, x.dtype)
        for name in ("running_mean", "running_var"):
            expected = getattr(torch_layer, name, None)
            expected = None if expected is None else expected.numpy()
            assert_close(name, getattr(layer, name), expected, x.dtype)

    return assert_same_step


@TRAINING
@DTYPE
@pytest.mark.parametrize(("name", "arguments", "options", "shape"), LAYERS)
def test_layer(torch, rng, assert_same_step, name, arguments, options, shape, dtype, training):
    layer, torch_layer = make_pair(torch, rng, name, arguments, options, dtype)
    assert_same_step(layer.train(training), torch_layer.train(training), shape)


@DTYPE
def test_default_eps_of_rms_norm(torch, assert_close, dtype):
    """It counts where the mean square is as small."""
    x = np.array([[3e-4, 4e-4], [1e-9, 2e-9]], dtype)
    torch_layer = torch.nn.RMSNorm(2, dtype=getattr(torch, dtype))
    expected = torch_layer(torch.tensor(x)).detach().numpy()
    assert_close("layer", cbn.RMSNorm(2, dtype=dtype)(x), expected, dtype)
    assert_close("function", functional.rms_norm(x, 2), expected, dtype)
    swapped = x.astype(x.dtype.newbyteorder())
    assert_close("byte-swapped", functional.rms_norm(swapped, 2), expected, dtype)


# ----------------------------------------------------------------------------- running statistics


@DTYPE
@pytest.mark.parametrize("options", TRACKING, ids=str)
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("InstanceNorm1d", [(4, 5, 20), (1, 5, 7), (5, 9)]),
        ("InstanceNorm2d", [(4, 5, 7, 7), (9, 5, 3, 2), (5, 8, 8)]),
        ("InstanceNorm3d", [(2, 5, 3, 4, 5), (5, 2, 2, 2)]),
    ],
)
def test_tracking(torch, rng, assert_same_step, name, shapes, options, dtype):
    layer, torch_layer = make_pair(torch, rng, name, (5,), options, dtype)
    for shape in shapes:
        assert_same_step(layer, torch_layer, shape)
    # PyTorch has the counter and does not count.
    assert layer.num_batches_tracked == len(shapes)
    assert torch_layer.num_batches_tracked == 0
    for shape in shapes:
        assert_same_step(layer.eval(), torch_layer.eval(), shape)
    assert layer.num_batches_tracked == len(shapes)


@TRAINING
def test_tracking_switched_off_on_a_live_layer(torch, rng, assert_close, training):
    """Both use the statistics of the input; PyTorch goes on to learn them, cbn does not."""
    pair = make_pair(torch, rng, "InstanceNorm2d", (5,), {"track_running_stats": True}, "float64")
    for layer in pair:
        layer.train(training).track_running_stats = False
    layer, torch_layer = pair
    before = layer.state_dict()
    x = rng.normal(1, 2, (4, 5, 7, 6))
    assert_close("y", layer(x), torch_layer(torch.tensor(x)).numpy(), "float64")
    np.testing.assert_equal(layer.state_dict(), before)


def test_momentum_none_is_the_average_over_batches(rng, assert_close):
    layer = cbn.InstanceNorm1d(3, momentum=None, track_running_stats=True, dtype="float64")
    batches = rng.normal(1, 2, (5, 4, 3, 20))
    for batch in batches:
        layer(batch)
    assert_close("running_mean", layer.running_mean, batches.mean((0, 1, 3)), "float64")
    var = batches.var(axis=3, ddof=1).mean((0, 1))
    assert_close("running_var", layer.running_var, var, "float64")
    assert layer.num_batches_tracked == 5


# ------------------------------------------------------------------------------------ channels last


@TRAINING
@DTYPE
@pytest.mark.parametrize(
    ("name", "arguments", "options", "shape"),
    [
        ("InstanceNorm1d", (5,), {"affine": True}, (3, 5, 9)),
        ("InstanceNorm1d", (5,), {"track_running_stats": True}, (3, 5, 9)),
        ("InstanceNorm2d", (5,), {"affine": True}, (3, 5, 7, 8)),
        ("InstanceNorm3d", (5,), {"affine": True, "track_running_stats": True}, (2, 5, 3, 7, 8)),
        ("GroupNorm", (2, 6), {}, (3, 6)),
        ("GroupNorm", (2, 6), {}, (3, 6, 5, 7)),
        ("GroupNorm", (3, 6), {"affine": False}, (3, 6, 5, 4, 3)),
    ],
)
def test_channels_last(torch, rng, assert_close, name, arguments, options, shape, dtype, training):
    first, _ = make_pair(torch, rng, name, arguments, options, dtype)
    last = getattr(cbn, name)(*arguments, dtype=dtype, channel_axis=-1, **options)
    last.load_state_dict(first.state_dict())
    first.train(training), last.train(training)
    x, grad_output = rng.normal(1, 2, (2, *shape)).astype(dtype)
    y = last(np.moveaxis(x, 1, -1).copy())
    assert_close("y", np.moveaxis(y, -1, 1), first(x), dtype)
    grad_input = last.backward(np.moveaxis(grad_output, 1, -1).copy())
    assert_close("grad_input", np.moveaxis(grad_input, -1, 1), first.backward(grad_output), dtype)
    for key in ("weight_grad", "bias_grad", "running_mean", "running_var"):
        assert_close(key, getattr(last, key), getattr(first, key), dtype)


# --------------------------------------------------------------------------------------- functions


@DTYPE
@pytest.mark.parametrize("use_input_stats", [True, False])
def test_functional_instance_norm(torch, rng, assert_close, dtype, use_input_stats):
    x = rng.normal(1, 2, (6, 5, 40)).astype(dtype)
    arguments = [rng.uniform(0.5, 2, 5).astype(dtype) for _ in range(4)]
    torch_arguments = [torch.tensor(argument) for argument in arguments]
    rest = use_input_stats, 0.3, 0.01
    expected = torch.nn.functional.instance_norm(torch.tensor(x), *torch_arguments, *rest)
    y = functional.instance_norm(x, *arguments, *rest)
    assert_close("y", y, expected.numpy(), dtype)
    assert_close("running_mean", arguments[0], torch_arguments[0].numpy(), dtype)
    assert_close("running_var", arguments[1], torch_arguments[1].numpy(), dtype)


@DTYPE
def test_functional_group_norm(torch, rng, assert_close, dtype):
    x = rng.normal(1, 2, (4, 6, 9)).astype(dtype)
    weight, bias = rng.uniform(0.5, 2, (2, 6)).astype(dtype)
    expected = torch.nn.functional.group_norm(
        torch.tensor(x), 3, torch.tensor(weight), torch.tensor(bias), 0.01
    )
    assert_close("y", functional.group_norm(x, 3, weight, bias, 0.01), expected.numpy(), dtype)


@DTYPE
def test_functional_layer_norm_and_rms_norm(torch, rng, assert_close, dtype):
    x = rng.normal(1, 2, (4, 6, 9)).astype(dtype)
    weight, bias = rng.uniform(0.5, 2, (2, 6, 9)).astype(dtype)
    tensors = torch.tensor(x), [6, 9], torch.tensor(weight)
    expected = torch.nn.functional.layer_norm(*tensors, torch.tensor(bias), 0.01)
    y = functional.layer_norm(x, (6, 9), weight, bias, 0.01)
    assert_close("layer_norm", y, expected.numpy(), dtype)
    expected = torch.nn.functional.rms_norm(*tensors, 0.01)
    assert_close("rms_norm", functional.rms_norm(x, (6, 9), weight, 0.01), expected.numpy(), dtype)


# ------------------------------------------------------------------------------------------ states

STATES = [
    ("InstanceNorm1d", (5,), {}),
    ("InstanceNorm2d", (5,), {"affine": True}),
    ("InstanceNorm2d", (5,), {"affine": True, "bias": False}),
    ("InstanceNorm3d", (5,), {"track_running_stats": True}),
    ("InstanceNorm3d", (5,), {"affine": True, "track_running_stats": True}),
    ("GroupNorm", (2, 6), {}),
    ("GroupNorm", (2, 6), {"bias": False}),
    ("GroupNorm", (2, 6), {"affine": False}),
    ("LayerNorm", ((2, 3),), {}),
    ("LayerNorm", (3,), {"bias": False}),
    ("LayerNorm", (3,), {"elementwise_affine": False}),
    ("RMSNorm", ((2, 3),), {}),
    ("RMSNorm", (3,), {"elementwise_affine": False}),
]


@DTYPE
@pytest.mark.parametrize(("name", "arguments", "options"), STATES)
def test_states_are_those_of_torch(torch, rng, name, arguments, options, dtype):
    layer = getattr(cbn, name)(*arguments, dtype=dtype, **options)
    torch_layer = getattr(torch.nn, name)(*arguments, dtype=getattr(torch, dtype), **options)
    # Fresh, in PyTorch's order; then filled, there and back.
    assert list(layer.state_dict()) == list(torch_layer.state_dict())
    for key, tensor in torch_layer.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[key], tensor.numpy(), key, strict=True)
        getattr(layer, key)[...] = rng.integers(1, 9, tuple(tensor.shape))
    state = {key: torch.from_numpy(value) for key, value in layer.state_dict().items()}
    result = torch_layer.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    again = getattr(cbn, name)(*arguments, dtype=dtype, **options)
    assert again.load_state_dict(torch_layer.state_dict()) == ([], [])
    np.testing.assert_equal(again.state_dict(), layer.state_dict())


NAMES = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm", "RMSNorm"]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_torch(torch, name):
    ours = inspect.signature(getattr(cbn, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    assert [name for name in ours if name in theirs] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default), key


@pytest.mark.parametrize(("name", "arguments", "options"), STATES)
def test_repr_is_that_of_torch(torch, name, arguments, options):
    options = {**options, "eps": 0.5}  # a RMSNorm of cbn says the eps that it has found
    ours = repr(getattr(cbn, name)(*arguments, **options))
    assert ours == repr(getattr(torch.nn, name)(*arguments, **options))
