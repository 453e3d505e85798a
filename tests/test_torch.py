"""Every layer, mode and function against PyTorch itself, and states exchanged with it."""

from itertools import product

import numpy as np
import pytest
from norms_table import NORMS

import cbn
from cbn import functional

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])

BATCH_OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.7},
    {"eps": 0.5},
]
BATCHES = [
    ("BatchNorm1d", [(16, 5), (32, 5)]),
    ("BatchNorm1d", [(8, 5, 130), (16, 5, 130)]),
    ("BatchNorm2d", [(4, 5, 7, 7), (8, 5, 7, 7)]),  # by row
    ("BatchNorm2d", [(4, 5, 16, 17), (8, 5, 16, 17)]),  # by plane
    ("BatchNorm3d", [(2, 5, 4, 6, 7), (4, 5, 4, 6, 7)]),
]
TRACKING = [
    {"track_running_stats": True},
    {"track_running_stats": True, "affine": True},
    {"track_running_stats": True, "momentum": 0.7},
    {"track_running_stats": True, "momentum": 1.0, "affine": True, "eps": 0.5},
]
INSTANCES = [
    ("InstanceNorm1d", [(4, 5, 20), (1, 5, 7), (5, 9)]),
    ("InstanceNorm2d", [(4, 5, 7, 7), (9, 5, 3, 2), (5, 8, 8)]),
    ("InstanceNorm3d", [(2, 5, 3, 4, 5), (5, 2, 2, 2)]),
]
# The name of a layer, its arguments, its options, and the shapes of its inputs, in turn.
LAYERS = [
    *((name, (5,), options, shapes) for (name, shapes), options in product(BATCHES, BATCH_OPTIONS)),
    *((name, (5,), options, shapes) for (name, shapes), options in product(INSTANCES, TRACKING)),
    ("InstanceNorm1d", (5,), {}, [(4, 5, 130), (5, 9)]),
    ("InstanceNorm1d", (5,), {"affine": True}, [(4, 5, 7)]),
    ("InstanceNorm1d", (5,), {"affine": True, "bias": False}, [(4, 5, 7)]),
    ("InstanceNorm2d", (5,), {"affine": True}, [(4, 5, 7, 7), (5, 7, 6)]),
    ("InstanceNorm2d", (5,), {"eps": 0.5}, [(4, 5, 16, 17)]),
    ("InstanceNorm3d", (5,), {"affine": True}, [(2, 5, 3, 4, 5)]),
    ("InstanceNorm3d", (5,), {}, [(5, 3, 4, 5)]),
    ("GroupNorm", (2, 6), {}, [(4, 6), (4, 6, 7, 7)]),
    ("GroupNorm", (3, 6), {}, [(4, 6, 13)]),
    ("GroupNorm", (1, 6), {"affine": False}, [(2, 6, 3, 4, 5)]),
    ("GroupNorm", (6, 6), {"bias": False}, [(4, 6, 20)]),
    ("GroupNorm", (2, 6), {"eps": 0.5}, [(4, 6, 20)]),
    ("LayerNorm", (11,), {}, [(7, 11), (11,)]),
    ("LayerNorm", ((3, 11),), {}, [(2, 5, 3, 11)]),
    ("LayerNorm", ([11],), {"bias": False}, [(7, 11)]),
    ("LayerNorm", (11,), {"elementwise_affine": False}, [(7, 11)]),
    ("LayerNorm", (768,), {"eps": 0.5}, [(3, 4, 768)]),
    ("RMSNorm", (11,), {"eps": 1e-6}, [(7, 11)]),
    ("RMSNorm", ((3, 11),), {"eps": 0.5}, [(2, 5, 3, 11)]),
    ("RMSNorm", (768,), {"eps": 1e-6, "elementwise_affine": False}, [(7, 768)]),
]
STATES = pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        *(("BatchNorm2d", (5,), options) for options in BATCH_OPTIONS),
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
    ],
    ids=str,
)


def make_pair(torch, name, arguments, options, dtype, torch_dtype=None, **layout):
    """A layer of cbn, and one of PyTorch."""
    torch_dtype = getattr(torch, torch_dtype or dtype)
    torch_layer = getattr(torch.nn, name)(*arguments, dtype=torch_dtype, **options)
    return getattr(cbn, name)(*arguments, dtype=dtype, **options, **layout), torch_layer


def fill(rng, torch_layer):
    """Give a layer of PyTorch a random state."""
    for key, tensor in torch_layer.state_dict().items():
        if key != "num_batches_tracked":
            tensor.numpy()[...] = rng.uniform(0.5 if key == "running_var" else -2, 2, tensor.shape)


def to_numpy(tensor):
    return None if tensor is None else tensor.detach().numpy()


@pytest.fixture
def make_same_pair(torch, rng):
    def make_same_pair(*what, **layout):
        """A layer of cbn, and one of PyTorch in float64, in the same random state."""
        layer, torch_layer = make_pair(torch, *what, torch_dtype="float64", **layout)
        fill(rng, torch_layer)
        assert layer.load_state_dict(torch_layer.state_dict()) == ([], [])
        return layer, torch_layer

    return make_same_pair


@pytest.fixture
def assert_same_step(torch, rng, assert_close):
    def assert_same_step(layer, torch_layer, shape):
        """Run both layers forward and backward, and compare every number they give.

        PyTorch computes in float64 on the same numbers: what it loses to summing in float32, two
        units of the fifth decimal of weight_grad here, is not to be held against cbn.
        """
        x = rng.normal(1, 2, shape).astype(layer.dtype)
        grad_output = rng.standard_normal(shape).astype(layer.dtype)
        torch_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        torch_layer.zero_grad()
        torch_y = torch_layer(torch_x)
        torch_y.backward(torch.tensor(grad_output, dtype=torch.float64))

        expected = to_numpy(torch_y), to_numpy(torch_x.grad)
        if getattr(layer, "channel_axis", 1) == -1:
            axis = 1 if len(shape) in NORMS[type(layer).__name__].axes else 0
            x, grad_output, *expected = (
                np.moveaxis(array, axis, -1).copy() for array in (x, grad_output, *expected)
            )
        assert_close("y", layer(x), expected[0], x.dtype)
        assert_close("grad_input", layer.backward(grad_output), expected[1], x.dtype)
        for name in ("weight", "bias"):
            parameter = getattr(torch_layer, name, None)
            gradient = None if parameter is None else to_numpy(parameter.grad)
            assert_close(f"{name}_grad", getattr(layer, f"{name}_grad"), gradient, x.dtype)
        state, expected_state = layer.state_dict(), torch_layer.state_dict()
        assert list(state) == list(expected_state)
        for key, tensor in expected_state.items():
            if key != "num_batches_tracked" or "Batch" in type(layer).__name__:
                assert_close(key, state[key], tensor.numpy(), x.dtype)

    return assert_same_step


@TRAINING
@DTYPE
@pytest.mark.parametrize(
    ("name", "arguments", "options", "shapes", "layout"),
    [
        (*row, layout)
        for row in LAYERS
        for layout in ({}, {"channel_axis": -1})
        if not layout or -1 in NORMS[row[0]].channel_axes
    ],
    ids=str,
)
def test_layer(
    make_same_pair, assert_same_step, name, arguments, options, shapes, layout, dtype, training
):
    pair = make_same_pair(name, arguments, options, dtype, **layout)
    for mode in (True, False) if training else (False,):
        for shape in shapes:
            assert_same_step(*(layer.train(mode) for layer in pair), shape)


@TRAINING
@DTYPE
def test_tracking_switched_off_on_a_live_layer(make_same_pair, assert_same_step, dtype, training):
    pair = make_same_pair("BatchNorm2d", (5,), {}, dtype)
    for layer in pair:
        layer.train(training).track_running_stats = False
    assert_same_step(*pair, (4, 5, 7, 7))


@TRAINING
def test_tracking_switched_off_on_a_live_instance_norm(
    torch, rng, make_same_pair, assert_close, training
):
    """Both use the statistics of the input; PyTorch goes on to learn them, cbn does not."""
    pair = make_same_pair("InstanceNorm2d", (5,), {"track_running_stats": True}, "float64")
    for layer in pair:
        layer.train(training).track_running_stats = False
    layer, torch_layer = pair
    before = layer.state_dict()
    x = rng.normal(1, 2, (4, 5, 7, 6))
    assert_close("y", layer(x), torch_layer(torch.tensor(x)).numpy(), "float64")
    np.testing.assert_equal(layer.state_dict(), before)


def test_instance_norm_counts_batches_and_that_of_torch_does_not(torch, make_same_pair):
    layer, torch_layer = make_same_pair("InstanceNorm1d", (5,), TRACKING[0], "float32")
    for mode in (True, False):
        for _ in range(3):
            layer.train(mode)(np.ones((4, 5, 20), "float32"))
            torch_layer.train(mode)(torch.ones(4, 5, 20, dtype=torch.float64))
        assert layer.num_batches_tracked == 3
        assert torch_layer.num_batches_tracked == 0


def test_momentum_none_is_the_average_over_batches(rng, assert_close):
    layer = cbn.InstanceNorm1d(3, momentum=None, track_running_stats=True, dtype="float64")
    batches = rng.normal(1, 2, (5, 4, 3, 20))
    for batch in batches:
        layer(batch)
    assert_close("running_mean", layer.running_mean, batches.mean((0, 1, 3)), "float64")
    var = batches.var(axis=3, ddof=1).mean((0, 1))
    assert_close("running_var", layer.running_var, var, "float64")
    assert layer.num_batches_tracked == 5


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


@DTYPE
@pytest.mark.parametrize(
    ("name", "shape", "size", "arguments"),
    [  # in PyTorch's order; an array of this size for each ellipsis
        ("batch_norm", (6, 5, 40), 5, (..., ..., ..., ..., True, 0.3, 0.01)),
        ("batch_norm", (6, 5, 40), 5, (..., ..., ..., ..., False, 0.3, 0.01)),
        ("instance_norm", (6, 5, 40), 5, (..., ..., ..., ..., True, 0.3, 0.01)),
        ("instance_norm", (6, 5, 40), 5, (..., ..., ..., ..., False, 0.3, 0.01)),
        ("group_norm", (4, 6, 9), 6, (3, ..., ..., 0.01)),
        ("layer_norm", (4, 6, 9), (6, 9), ((6, 9), ..., ..., 0.01)),
        ("rms_norm", (4, 6, 9), (6, 9), ((6, 9), ..., 0.01)),
    ],
    ids=str,
)
def test_function(torch, rng, assert_close, name, shape, size, arguments, dtype):
    x = rng.normal(1, 2, shape).astype(dtype)
    ours = [rng.uniform(0.5, 2, size).astype(dtype) if a is ... else a for a in arguments]
    theirs = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in ours]
    expected = getattr(torch.nn.functional, name)(torch.tensor(x), *theirs)
    assert_close("y", getattr(functional, name)(x, *ours), expected.numpy(), dtype)
    for index, (array, tensor) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(array, np.ndarray):  # the running statistics have changed
            assert_close(f"argument {index}", array, tensor.numpy(), dtype)


# ------------------------------------------------------------------------------------------ states


@DTYPE
@STATES
def test_state_from_torch(torch, rng, name, arguments, options, dtype):
    layer, torch_layer = make_pair(torch, name, arguments, options, dtype)
    for tensor in torch_layer.state_dict().values():
        tensor.numpy()[...] = rng.integers(1, 9, tensor.shape)
    assert layer.load_state_dict(torch_layer.state_dict()) == ([], [])
    for key, tensor in torch_layer.state_dict().items():
        np.testing.assert_array_equal(getattr(layer, key), tensor.numpy(), err_msg=key)


@DTYPE
@STATES
def test_state_to_torch(torch, rng, name, arguments, options, dtype):
    layer, torch_layer = make_pair(torch, name, arguments, options, dtype)
    for key, array in layer.state_dict().items():
        getattr(layer, key)[...] = rng.integers(1, 9, array.shape)
    state = {key: torch.from_numpy(value) for key, value in layer.state_dict().items()}
    result = torch_layer.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for key, tensor in torch_layer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), getattr(layer, key), err_msg=key)


@DTYPE
@STATES
def test_state_of_a_fresh_layer_is_that_of_a_fresh_torch_layer(
    torch, name, arguments, options, dtype
):
    layer, torch_layer = make_pair(torch, name, arguments, options, dtype)
    state, expected = layer.state_dict(), torch_layer.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(state[key], tensor.numpy(), err_msg=key, strict=True)


@STATES
def test_repr_is_that_of_torch(torch, name, arguments, options):
    options = {**options, "eps": 0.5}  # a RMSNorm of cbn says the eps that it has found
    ours = repr(getattr(cbn, name)(*arguments, **options))
    assert ours == repr(getattr(torch.nn, name)(*arguments, **options))
