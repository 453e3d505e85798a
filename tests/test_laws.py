"""Laws of batch normalisation, for shapes, layouts and data that hypothesis chooses."""

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cbn
from cbn import functional

# The same examples at every run: what fails here fails everywhere.
law = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # by the clock
)

# What rounding may take of a normalised value or of a sum of them, relative to the largest value or
# to the sum of magnitudes: a few units in the last place, for a few operations each.
SLACK = {"float32": 2e-6, "float64": 1e-14}


@st.composite
def batches(draw, least=2, dtypes=("float32", "float64"), scales=(-4, 4)):
    """An array (N, C, S), seen with its channels first or last, and the axis of the channels."""
    N = draw(st.sampled_from([1, 2, 3, 7, 9, 40, 1100]))
    C = draw(st.sampled_from([1, 2, 3, 17, 70, 1030]))
    S = draw(st.sampled_from([1, 2, 9, 49, 64, 130, 600, 20_000]))
    assume(least <= N * S and N * C * S <= 300_000)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean = draw(st.sampled_from([0, 1, 1e3]))
    x = (rng.standard_normal((N, C, S)) + mean) * 10.0 ** draw(st.integers(*scales))
    axis = draw(st.sampled_from([1, -1]))
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis)).astype(draw(st.sampled_from(dtypes)))
    return x, axis


def by_channel(array, axis):
    """Float64 of shape (C, values)."""
    # Each channel in one piece: NumPy sums those by pairs, but others one value after the other.
    values = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return values.astype(np.float64, order="C")


def parameters(seed, channels, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.5, 2, channels).astype(dtype), rng.uniform(-2, 2, channels).astype(dtype)


def normalise(x, axis, **options):
    return functional.batch_norm(x, None, None, training=True, channel_axis=axis, **options)


@law
@given(batches(), st.sampled_from([0.0, 1e-5, 1e-2, 1.0]))
def test_the_output_has_the_mean_and_variance_of_the_parameters(batch, eps):
    x, axis = batch
    weight, bias = parameters(0, x.shape[axis])
    y = by_channel(normalise(x, axis, weight=weight, bias=bias, eps=eps), axis)
    _, var, _ = functional.batch_norm_stats(x, channel_axis=axis)
    slack = SLACK[x.dtype.name]
    np.testing.assert_allclose(y.mean(1), bias, rtol=0, atol=4 * slack)
    np.testing.assert_allclose(y.var(1), weight**2 * var / (var + eps), rtol=4 * slack, atol=slack)


@law
@given(batches(dtypes=("float32",)), st.integers(-(2**20), 2**20))
def test_shifting_the_input_shifts_nothing(batch, shift):
    x, axis = batch
    x = np.round(x / np.abs(x).max() * 1000).astype(np.float32)
    # Integers, to which adding another is exact.
    assume((by_channel(x, axis).var(1) > 0).all())
    moved = x + np.float32(shift)
    assert (moved - np.float32(shift) == x).all()
    y, expected = normalise(moved, axis), normalise(x, axis)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    _, var, _ = functional.batch_norm_stats(moved, channel_axis=axis)
    np.testing.assert_allclose(var, by_channel(x, axis).var(1), rtol=1e-6)


@law
@given(batches(scales=(-3, 3)), st.integers(-80, 80))
def test_another_unit_gives_the_same_bits(batch, exponent):
    """Squares of float32 overflow at 2^64 and underflow at 2^-63: that must not show."""
    x, axis = batch
    scaled = np.ldexp(x, exponent)
    weight, bias = parameters(1, x.shape[axis])
    options = {"weight": weight, "bias": bias, "eps": 0.0}
    y = normalise(x, axis, **options)
    assert normalise(scaled, axis, **options).tobytes() == y.tobytes()
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=axis)
    scaled_mean, scaled_var, _ = functional.batch_norm_stats(scaled, channel_axis=axis)
    assert scaled_mean.tolist() == np.ldexp(mean, exponent).tolist()
    assert scaled_var.tolist() == np.ldexp(var, 2 * exponent).tolist()


@law
@given(batches(scales=(-3, 3)), st.sampled_from([-490, 490]))
def test_another_unit_of_float64_gives_the_same_bits(batch, exponent):
    """Up to the limits of docs/numerics.md: beyond them the variance itself is no float64."""
    x, axis = batch
    test_another_unit_gives_the_same_bits.hypothesis.inner_test((x.astype(float), axis), exponent)


@law
@given(batches(), st.integers(0, 2**32 - 1))
def test_permuting_channels_permutes_every_result(batch, seed):
    x, axis = batch
    rng = np.random.default_rng(seed)
    order = rng.permutation(x.shape[axis])
    # Values whose squares leave float32, each alone in its channel, so that units differ within it.
    x[tuple(rng.integers(0, size) for size in x.shape)] *= x.dtype.type(1e25)
    grad_output = np.random.default_rng(seed + 1).standard_normal(x.shape).astype(x.dtype)
    found = []
    for channels in (np.arange(len(order)), order):
        taken, grad = x.take(channels, axis), grad_output.take(channels, axis)
        weight, bias = (array[channels] for array in parameters(2, len(order)))
        mean, var, _ = functional.batch_norm_stats(taken, channel_axis=axis)
        grads = functional.batch_norm_backward(grad, taken, mean, var, weight, channel_axis=axis)
        y = normalise(taken, axis, weight=weight, bias=bias)
        found.append((y, mean, var, *grads))
    for array, permuted in zip(*found, strict=True):
        expected = array.take(order, axis if array.ndim > 1 else 0)
        assert permuted.tobytes() == expected.tobytes()


@law
@given(batches(), st.integers(0, 2**32 - 1))
def test_permuting_samples_permutes_the_output(batch, seed):
    x, axis = batch
    order = np.random.default_rng(seed).permutation(len(x))
    y, permuted = normalise(x, axis), normalise(x[order], axis)
    slack = SLACK[x.dtype.name] * np.abs(y).max()
    np.testing.assert_allclose(permuted, y[order], rtol=0, atol=slack)
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=axis)
    fixed = [
        functional.batch_norm(samples, mean, var, channel_axis=axis) for samples in (x, x[order])
    ]
    assert fixed[1].tobytes() == fixed[0][order].tobytes()


@law
@given(batches(), st.floats(0, 1))
def test_a_batch_in_two_parts_has_the_statistics_of_the_whole(batch, share):
    x, axis = batch
    cut = round(share * len(x))
    (mean_a, var_a, a), (mean_b, var_b, b) = (
        functional.batch_norm_stats(part, channel_axis=axis) for part in (x[:cut], x[cut:])
    )
    mean, var, count = functional.batch_norm_stats(x, channel_axis=axis)
    assert count == a + b
    delta = mean_b - mean_a
    merged = (a * var_a + b * var_b + delta**2 * (a * b / count)) / count
    slack = {"float32": 1e-6, "float64": 1e-13}[x.dtype.name]
    tolerance = slack * np.sqrt(var) + 1e-15 * np.abs(mean)
    assert (np.abs((a * mean_a + b * mean_b) / count - mean) <= tolerance).all()
    # What float64 rounds off the means is squared in the last term; only a large mean has any.
    np.testing.assert_allclose(merged, var, rtol=4 * slack + 1e-12, atol=1e-14 * np.max(mean**2))


@law
@given(batches(least=4), st.integers(0, 2**32 - 1), st.booleans())
def test_the_input_gradient_is_orthogonal_to_one_and_to_the_output(batch, seed, affine):
    x, axis = batch
    layer = cbn.BatchNorm1d(x.shape[axis], eps=0.0, dtype=x.dtype, channel_axis=axis, affine=affine)
    y = by_channel(layer(x), axis)
    if layer.weight is not None:
        layer.weight[...] = parameters(3, x.shape[axis])[0]
    grad_output = np.random.default_rng(seed).standard_normal(x.shape).astype(x.dtype)
    grad_input = by_channel(layer.backward(grad_output), axis)
    slack = SLACK[x.dtype.name]
    # The terms that cancel are as large as those of the gradient before its parts are subtracted.
    std = by_channel(x, axis).std(1)
    size = by_channel(np.abs(grad_output), axis).sum(1) / std
    weight = 1 if layer.weight is None else layer.weight
    assert (np.abs(grad_input.sum(1)) <= slack * weight * size).all()
    assert (np.abs((grad_input * y).sum(1)) <= slack * weight * size * np.abs(y).max(1)).all()
