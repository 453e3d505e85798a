"""The promises of docs/numerics.md: how far from the exact result, on data that is hard."""

import numpy as np
import pytest
from hard import (
    MIXED,
    OUTLIERS,
    RATIOS,
    SCALES,
    Exact,
    Hard,
    all_kinds,
    centred,
    draw,
    errors,
    exact,
    wider,
)
from norm_kinds import kinds
from tolerances import LARGEST_ERROR

import cbn
from cbn import functional, reference

LONG_DOUBLE = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant
DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(not LONG_DOUBLE, reason="nothing wider to compare with"),
        ),
    ],
)
# By row, by plane and by plane with few values, in one piece and in several.
SHAPES = [
    pytest.param((4096, 16), 1, id="NC"),
    pytest.param((5, 9), 1, id="NC_small"),
    pytest.param((8, 8, 28, 28), 1, id="NCHW"),
    pytest.param((1, 8, 150, 150), 1, id="NCHW_one_sample"),
    pytest.param((1, 8, 9, 9), 1, id="NCHW_small"),
    pytest.param((8, 28, 28, 8), -1, id="NHWC"),
]


def train(x, grad_output, channel_axis, **options):
    layer = {2: cbn.BatchNorm1d, 4: cbn.BatchNorm2d}[x.ndim](
        x.shape[channel_axis], dtype=x.dtype, channel_axis=channel_axis, **options
    )
    rng = np.random.default_rng(1)
    layer.weight[...] = rng.uniform(0.5, 1.5, layer.num_features)
    layer.bias[...] = rng.standard_normal(layer.num_features)
    y = layer(x)
    return layer, y, layer.backward(grad_output)


@DTYPE
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_training_is_as_exact_as_promised(ratio, scale, shape, channel_axis, dtype):
    for outlier in OUTLIERS:
        for first in (True, False):
            kind = Hard(ratio, outlier, first, scale)
            x, grad_output = draw(kind, shape, channel_axis, dtype)
            layer, y, grad_input = train(x, grad_output, channel_axis, track_running_stats=False)
            right = exact(x, grad_output, layer.weight, layer.bias, channel_axis)
            for error in errors(right, y, grad_input):
                assert error <= LARGEST_ERROR[dtype], kind


@DTYPE
@pytest.mark.parametrize(
    "kind",
    kinds(
        rows=[(7, 16), (5, 768), (2, 3000)],
        groups=[((2, 24, 49), 8), ((2, 60, 10), 3)],
        instances=[(3, 8, 49), (2, 3, 700)],
    ),
    ids=str,
)
def test_norms_of_samples_are_as_exact_as_promised(rng, kind, dtype):
    weight, bias = rng.uniform(-2, 2, (2, *kind.parameter_shape)).astype(dtype)
    shift = {"bias": bias} if "bias" in kind.norm.parameters else {}
    groups = kind.by_group(np.empty(kind.shape)).shape
    for data in all_kinds(("1", "1e25")):  # the other scales go from channel to channel
        columns, gradients = draw(data, groups[::-1], -1, dtype)
        x, grad_output = kind.from_groups(columns.T), kind.from_groups(gradients.T)
        values, std = centred(columns.T, subtracts_mean=kind.norm.name != "RMSNorm")
        wide = kind.from_groups(values), grad_output.astype(wider(x.dtype))
        results = []
        for module, (array, grad) in ((reference, wide), (functional, (x, grad_output))):
            forward, backward = kind.functions(module)
            y = forward(array, weight=weight, eps=1e-5, **shift)
            results.append((y, backward(grad, array, weight=weight, eps=1e-5)[0]))
        right = Exact(*results[0], kind.from_groups(std))
        assert max(errors(right, *results[1])) <= LARGEST_ERROR[dtype], data


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
@pytest.mark.parametrize("value", [0.1, -1e4 / 3, 1e-40, 7e30])
def test_the_variance_of_equal_values_is_zero(value, shape, channel_axis, dtype):
    x = np.full(shape, value, dtype)
    x.flat[0] = np.nextafter(x.flat[0], x.dtype.type(np.inf))  # and of nearly equal ones, tiny
    _, var, count = functional.batch_norm_stats(x, channel_axis=channel_axis)
    assert (var[1:] == 0).all()
    largest = float(x.flat[0]) - float(x.flat[1])
    assert 0 <= var[0] <= largest**2 / count * (1 + 1e-6)


@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_subnormal_inputs(shape, channel_axis):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(shape) * 1e-39).astype(np.float32)
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    right = reference.batch_norm_stats(x, channel_axis=channel_axis)
    np.testing.assert_allclose(mean, right[0], rtol=1e-6, atol=1e-46)
    np.testing.assert_allclose(var, right[1], rtol=1e-6)
    # By statistics whose scale, 1e38, float32 can hold.
    statistics = (np.zeros_like(mean), np.full_like(mean, 1e-76))
    y = functional.batch_norm(x, *statistics, eps=0.0, channel_axis=channel_axis)
    expected, _, _ = reference.batch_norm(x, *statistics, eps=0.0, channel_axis=channel_axis)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("shape", [(1, 5, 700), (3, 5, 700), (1, 5, 150), (9, 5, 70), (200, 5, 3)])
def test_one_huge_value_anywhere_in_a_channel(shape, where):
    """Its square is beyond float32; the others, and the other channels, are as they would be."""
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    x[:, 1] *= np.float32(1e-12)
    before = functional.batch_norm_stats(x)
    x[(0, 2, 0) if where == "first" else (-1, 2, -1)] = 1e25
    found = functional.batch_norm_stats(x)
    expected = reference.batch_norm_stats(x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    for others, unchanged in zip(found[:2], before[:2], strict=True):
        assert np.delete(others, 2).tobytes() == np.delete(unchanged, 2).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1e-300, 0.0])
def test_tiny_eps(assert_close, eps, dtype):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((300, 5)) * np.array([1e-6, 1e-3, 1, 1e3, 1e6])).astype(dtype)
    mean, var = x.mean(0), x.var(0)
    for training in (True, False):
        y = functional.batch_norm(x, mean.copy(), var.copy(), training=training, eps=eps)
        right, _, _ = reference.batch_norm(x, mean, var, training=training, eps=eps)
        assert_close("y", y, right, dtype)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_sample_does_not_depend_on_its_batch_in_inference(channel_axis):
    for shape in ((9, 70, 7, 7), (40, 3, 33, 31), (2, 5, 200, 200)):
        shape = shape if channel_axis == 1 else (shape[0], *shape[2:], shape[1])
        x, _ = draw(Hard(1e2, 0, True, MIXED), shape, channel_axis, np.float32)
        bn = cbn.BatchNorm2d(x.shape[channel_axis], channel_axis=channel_axis)
        bn(x)
        bn.eval()
        together = bn(x)
        for index in range(len(x)):
            assert bn(x[index : index + 1]).tobytes() == together[index].tobytes()
