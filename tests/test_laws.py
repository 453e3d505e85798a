"""Laws of the norms, for shapes, layouts and data that hypothesis chooses."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from norm_kinds import Kind, channels_last
from norms_table import BATCH, GROUP, INSTANCE, ROWS
from tolerances import LARGEST_ERROR, SLACK

from cbn import functional

# They hold for two values too.
pytestmark = pytest.mark.filterwarnings("ignore::cbn.SmallBatchWarning")

law = settings(max_examples=350)
law_of_few = settings(max_examples=150)

BATCH_NORM, INSTANCE_NORM, (LAYER_NORM, RMS_NORM) = BATCH[0], INSTANCE[0], ROWS
OF_SAMPLES = [INSTANCE_NORM, GROUP, LAYER_NORM, RMS_NORM]
ALL = [BATCH_NORM] * 3 + OF_SAMPLES  # drawn as often: its batches are cut in the most ways
CENTRED = ALL[:-1]

SEEDS = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    """An input, a norm of it, and what else that takes."""

    x: np.ndarray
    kind: Kind
    weight: np.ndarray
    bias: np.ndarray
    grad_output: np.ndarray

    def forward(self, x, **more):
        return self.kind.functions()[0](x, **{"weight": self.weight, **more})

    def backward(self, x, grad_output=None, eps=1e-5):
        """The gradients, from a layer: that keeps the mean of a batch in two numbers."""
        layer = self.kind.layer(eps=eps, dtype=x.dtype, **{self.kind.norm.affine: True})
        layer.weight[...] = self.weight
        layer(x)
        grad_input = layer.backward(self.grad_output if grad_output is None else grad_output)
        of_bias = [] if layer.bias_grad is None else [layer.bias_grad]
        return grad_input, layer.weight_grad, *of_bias

    @property
    def large_eps(self):
        """One that keeps the size of gradients where a group's values are nearly the same."""
        return 0.1 * float(np.var(self.x, dtype=float))

    def results(self, eps):
        """The output and the gradients."""
        return self.forward(self.x, bias=self.bias, eps=eps), *self.backward(self.x, eps=eps)

    def stats(self, x):
        return functional.batch_norm_stats(x, **self.kind.options)

    def by_group(self, array):
        """Float64 of shape (groups, values)."""
        # Each group in one piece: NumPy sums those by pairs, but others one value after the other.
        return self.kind.by_group(array).astype(np.float64, order="C")

    def of_groups(self, parameter):
        """The parameter of each group, or the largest where a group has several."""
        alone = self.kind.norm in (BATCH_NORM, INSTANCE_NORM)
        return np.resize(parameter if alone else parameter.max(), len(self.by_group(self.x)))

    @property
    def slack(self):
        return SLACK[self.x.dtype.name]


def fitting(sizes, least, most):
    return st.sampled_from([size for size in sizes if least <= size <= most])


@st.composite
def arrays(draw, least_N=1, least=2, most=50_000):
    """An array (N, C, S) of at most so many values."""
    N = draw(fitting([1, 2, 3, 7, 9, 40, 70, 1100], least_N, most))
    C = [1, 2, 3, 6, 10, 17, 40, 64, 70, 120, 160, 320, 1030, 1280]
    C = draw(fitting(C, 1, most / (N * least)))
    S = draw(fitting([1, 2, 7, 9, 49, 64, 130, 600, 5000, 20_000], least, most / (N * C)))
    x = np.random.default_rng(draw(SEEDS)).standard_normal((N, C, S))
    x = (x + draw(st.sampled_from([0, 1, 1e3]))) * 10.0 ** draw(st.integers(-4, 4))
    return x.astype(draw(st.sampled_from(["float32", "float64"])))


@st.composite
def cases(draw, norms=ALL, least=2):
    norm = draw(st.sampled_from(norms))
    if norm is BATCH_NORM:  # the values of a channel may be one of each sample
        x = draw(arrays(1, least, 300_000) | arrays(least, 1, 300_000))
    else:
        x = draw(arrays(1, least))
    _, C, S = x.shape
    groups = draw(st.sampled_from([number for number in (1, 2, 3, 8, 32, C) if C % number == 0]))
    kind = Kind(norm, x.shape, groups=groups, row=(S,) if norm is LAYER_NORM else (C, S))
    if norm not in ROWS and draw(st.booleans()):
        kind = channels_last(kind)
        x = np.moveaxis(x, 1, -1).copy()
    return Case(x, kind, *parameters(draw(SEEDS), x, kind.parameter_shape))


def parameters(seed, x, shape):
    """A weight and a bias of this shape, and a gradient of the output."""
    rng = np.random.default_rng(seed)
    arrays = rng.uniform(0.5, 2, shape), rng.uniform(-2, 2, shape), rng.standard_normal(x.shape)
    return [array.astype(x.dtype) for array in arrays]


def assert_same(actual, expected, slack):
    """That what a law makes equal is so: an output, then gradients, beside their largest values.

    Parameters' gradients are sums, of n values: as large as sqrt(n), unless they happen to cancel.
    """
    for one, other in zip(actual, expected, strict=True):
        n = actual[0].size / other.size
        size = max(np.abs(other).max(), np.sqrt(n) if n > 1 else 0)
        np.testing.assert_allclose(one, other, rtol=0, atol=slack * size)


def assert_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def integers(case):
    """The input, rounded so that adding and multiplying other integers is exact."""
    x = np.round(1000 * (case.x / np.abs(case.x).max()))
    assume((case.by_group(x).std(1) > 0).all())
    return x


# ---------------------------------------------------------------------------------- of every norm


@law
@given(cases(CENTRED), st.sampled_from([0.0, 1e-5, 1e-2, 1.0]))
def test_the_output_has_the_mean_and_variance_of_the_parameters(case, eps):
    weight, bias = case.of_groups(case.weight), case.of_groups(case.bias)
    if case.kind.norm in (GROUP, LAYER_NORM):  # whose groups have a parameter for every value
        case.weight[...], case.bias[...] = weight[0], bias[0]
    y = case.by_group(case.forward(case.x, bias=case.bias, eps=eps))
    var = case.by_group(case.x).var(1)
    np.testing.assert_allclose(y.mean(1), bias, rtol=0, atol=4 * case.slack)
    expected = weight**2 * var / (var + eps)
    np.testing.assert_allclose(y.var(1), expected, rtol=4 * case.slack, atol=case.slack)


@law_of_few
@given(cases([RMS_NORM]), st.sampled_from([0.0, 1e-5, 1.0]))
def test_the_output_has_the_mean_square_that_eps_leaves(case, eps):
    y = case.by_group(case.forward(case.x, weight=None, eps=eps))
    square = np.mean(case.by_group(case.x) ** 2, axis=1)
    np.testing.assert_allclose(np.mean(y**2, axis=1), square / (square + eps), rtol=4 * case.slack)


@law
@given(cases(CENTRED, least=7), st.integers(-(2**20), 2**20))
def test_shifting_the_input_shifts_nothing(case, shift):
    x = integers(case)
    expected = case.forward(x), case.backward(x)[0]
    moved = x + x.dtype.type(shift)
    assert (moved - x.dtype.type(shift) == x).all()
    assert_same((case.forward(moved), case.backward(moved)[0]), expected, case.slack / 2)
    if case.kind.norm is BATCH_NORM:
        var = case.by_group(x).var(1)
        np.testing.assert_allclose(case.stats(moved)[1], var, rtol=LARGEST_ERROR[x.dtype.name])


@law
@given(cases(least=7), st.integers(1, 100))
def test_scaling_the_input_scales_nothing(case, factor):
    x = integers(case)
    y, grad_input, *parameters = case.forward(x, eps=0.0), *case.backward(x, eps=0.0)
    scaled = x * factor
    actual = case.forward(scaled, eps=0.0), *case.backward(scaled, eps=0.0)
    assert_same(actual, (y, grad_input / factor, *parameters), case.slack)


@law
@given(cases(), st.integers(-80, 80))
def test_another_unit_gives_the_same_bits(case, exponent):
    """Of the output and the parameters' gradients; squares of float32 leave its range."""
    x, scaled = case.x, np.ldexp(case.x, exponent)
    values = case.by_group(x)
    assume((values.std(1) > 0.01 * np.ptp(values, axis=1)).all() and np.ptp(values, axis=1).all())
    y, grad_input, *parameters = case.forward(x, eps=0.0), *case.backward(x, eps=0.0)
    actual = case.forward(scaled, eps=0.0), *case.backward(scaled, eps=0.0)
    assert_same_bits(actual, (y, np.ldexp(grad_input, -exponent), *parameters))
    if case.kind.norm is BATCH_NORM:
        mean, var, count = case.stats(x)
        expected = np.ldexp(mean, exponent), np.ldexp(var, 2 * exponent), count
        assert_same_bits(case.stats(scaled), expected)


@law
@given(cases(), st.sampled_from([-490, 490]))
def test_another_unit_of_float64_gives_the_same_bits(case, exponent):
    """Up to the limits of docs/numerics.md: beyond them the variance itself is no float64."""
    case = case._replace(x=case.x.astype(float), grad_output=case.grad_output.astype(float))
    test_another_unit_gives_the_same_bits.hypothesis.inner_test(case, exponent)


@law
@given(cases())
def test_the_opposite_input_has_the_opposite_output(case):
    np.testing.assert_array_equal(case.forward(-case.x), -case.forward(case.x))
    opposite = case.backward(-case.x, -case.grad_output)[0]
    np.testing.assert_array_equal(opposite, -case.backward(case.x)[0])


@law
@given(cases(least=7), st.booleans())
def test_the_input_gradient_is_orthogonal_to_one_and_to_the_output(case, affine):
    """For RMS norm to the output alone: the gradient is along the sphere that it maps to."""
    norm = case.kind.norm
    layer = case.kind.layer(eps=0.0, dtype=case.x.dtype, **{norm.affine: affine})
    if affine:
        layer.weight[...] = case.weight
    layer(case.x)
    grad = case.by_group(layer.backward(case.grad_output))
    x = case.by_group(case.x)
    centred = x if norm is RMS_NORM else x - x.mean(1, keepdims=True)
    std = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    x_hat = centred / std
    # The terms that cancel are as large as those of the gradient before its parts are subtracted.
    size = case.by_group(np.abs(case.grad_output)).sum(1) / std[:, 0]
    size *= case.of_groups(case.weight) if affine else 1
    if norm is not RMS_NORM:
        assert (np.abs(grad.sum(1)) <= case.slack * size).all()
    assert (np.abs((grad * x_hat).sum(1)) <= case.slack * size * np.abs(x_hat).max(1)).all()


@law
@given(cases(), SEEDS)
def test_gradients_are_linear_in_that_of_the_output(case, seed):
    other = np.random.default_rng(seed).integers(-4, 5, case.x.shape).astype(case.x.dtype)
    grad_output = np.round(4 * case.grad_output)  # the sum is exact
    parts = [case.backward(case.x, array, case.large_eps) for array in (grad_output, other)]
    whole = case.backward(case.x, grad_output + other, case.large_eps)
    for one, first, second in zip(whole, *parts, strict=True):
        size = max(np.abs(first).max(), np.abs(second).max())
        np.testing.assert_allclose(one, first + second, rtol=0, atol=2 * case.slack * size)


# ----------------------------------------------------------------------- of samples and of batches


@law
@given(cases(OF_SAMPLES), SEEDS)
def test_permuting_samples_permutes_the_output_bit_for_bit(case, seed):
    order = np.random.default_rng(seed).permutation(len(case.x))
    permuted = case.x[order]
    assert_same_bits([case.forward(permuted)], [case.forward(case.x)[order]])
    grad_input = case.backward(permuted, case.grad_output[order])[0]
    assert_same_bits([grad_input], [case.backward(case.x)[0][order]])


@law_of_few
@given(cases([BATCH_NORM]), SEEDS)
def test_permuting_the_samples_of_a_batch_permutes_the_output(case, seed):
    order = np.random.default_rng(seed).permutation(len(case.x))
    y, permuted = (case.forward(x, weight=None) for x in (case.x, case.x[order]))
    assert_same([permuted], [y[order]], case.slack)
    mean, var, _ = case.stats(case.x)
    fixed, permuted = (
        functional.batch_norm(x, mean, var, **case.kind.options) for x in (case.x, case.x[order])
    )
    assert_same_bits([permuted], [fixed[order]])


@law_of_few
@given(cases([BATCH_NORM, INSTANCE_NORM]), SEEDS)
def test_permuting_channels_permutes_every_result(case, seed):
    rng = np.random.default_rng(seed)
    axis, order = case.kind.axis, rng.permutation(case.kind.C)
    # Values whose squares leave float32, each alone in its channel, so that units differ within it.
    case.x[tuple(rng.integers(0, size) for size in case.x.shape)] *= case.x.dtype.type(1e25)
    found = []
    for channels in (np.arange(len(order)), order):
        x, grad_output = (array.take(channels, axis) for array in (case.x, case.grad_output))
        taken = Case(x, case.kind, case.weight[channels], case.bias[channels], grad_output)
        gradients = case.kind.functions()[1](grad_output, x, weight=taken.weight)
        found.append((*taken.results(1e-5), *gradients, *case.stats(x)[:2]))
    for array, permuted in zip(*found, strict=True):
        assert_same_bits([permuted], [array.take(order, axis if array.ndim > 1 else 0)])


@law_of_few
@given(cases([BATCH_NORM]), st.floats(0, 1))
def test_a_batch_in_two_parts_has_the_statistics_of_the_whole(case, share):
    cut = round(share * len(case.x))
    (mean_a, var_a, a), (mean_b, var_b, b) = map(case.stats, (case.x[:cut], case.x[cut:]))
    mean, var, count = case.stats(case.x)
    assert count == a + b
    delta = mean_b - mean_a
    merged = (a * var_a + b * var_b + delta**2 * (a * b / count)) / count
    slack = case.slack / 2
    tolerance = slack * np.sqrt(var) + 1e-15 * np.abs(mean)
    assert (np.abs((a * mean_a + b * mean_b) / count - mean) <= tolerance).all()
    # What float64 rounds off the means is squared in the last term; only a large mean has any.
    np.testing.assert_allclose(merged, var, rtol=4 * slack + 1e-12, atol=1e-14 * np.max(mean**2))


# ------------------------------------------------------------------------ of one norm and another


@law_of_few
@given(arrays(), SEEDS)
def test_group_norm_with_one_group_is_layer_norm_of_samples(x, seed):
    weight, bias, grad_output = parameters(seed, x, x.shape[1])
    by_value = [np.broadcast_to(array[:, None], x.shape[1:]) for array in (weight, bias)]
    of_rows = Case(x, Kind(LAYER_NORM, x.shape, row=x.shape[1:]), *by_value, grad_output)
    y, grad_input, *of_values = of_rows.results(of_rows.large_eps)
    expected = y, grad_input, *(array.sum(1, dtype=np.float64) for array in of_values)
    of_samples = of_rows._replace(kind=Kind(GROUP, x.shape), weight=weight, bias=bias)
    assert_same(of_samples.results(of_rows.large_eps), expected, of_rows.slack)


@law_of_few
@given(cases([INSTANCE_NORM]))
def test_group_norm_of_single_channels_is_instance_norm(case):
    of_groups = case._replace(kind=case.kind._replace(norm=GROUP, groups=case.kind.C))
    eps = case.large_eps
    assert_same(of_groups.results(eps), case.results(eps), case.slack)


@law_of_few
@given(cases([INSTANCE_NORM], least=7))
def test_instance_norm_of_one_sample_is_batch_norm_in_training(case):
    case = case._replace(x=case.x[:1], grad_output=case.grad_output[:1])
    of_batch = case._replace(kind=case.kind._replace(norm=BATCH_NORM))
    assert_same(case.results(0.1), of_batch.results(0.1), case.slack)
    running, expected = np.ones((2, 2, case.kind.C), case.x.dtype)
    functional.instance_norm(case.x, *running, **case.kind.options)
    functional.batch_norm(case.x, *expected, training=True, **case.kind.options)
    assert_same(running, expected, case.slack)


@law
@given(cases([BATCH_NORM, INSTANCE_NORM, GROUP]))
def test_channels_last_is_channels_first_transposed(case):
    axis = case.kind.axis
    x, grad_output = (
        np.moveaxis(array, axis, -axis).copy() for array in (case.x, case.grad_output)
    )
    kind = case.kind._replace(channel_axis=-axis, shape=x.shape)
    y, grad_input, *rest = Case(x, kind, case.weight, case.bias, grad_output).results(
        case.large_eps
    )
    actual = np.moveaxis(y, -axis, axis), np.moveaxis(grad_input, -axis, axis), *rest
    assert_same(actual, case.results(case.large_eps), case.slack)


@law_of_few
@given(arrays(), SEEDS)
def test_layer_norm_is_rms_norm_of_what_has_mean_0(x, seed):
    x = np.concatenate([x, -x], axis=-1)  # whose mean is 0 exactly
    weight, _, grad_output = parameters(seed, x, x.shape[-1])
    keywords = {"normalized_shape": x.shape[-1], "weight": weight, "eps": 0.1}
    slack = SLACK[x.dtype.name]
    expected = functional.layer_norm(x, **keywords)
    assert_same([functional.rms_norm(x, **keywords)], [expected], slack)
    # The mean of a gradient is what centring takes off it.
    std = np.sqrt(x.astype(float).var(-1, keepdims=True) + 0.1)
    mean = np.mean(weight.astype(float) * grad_output, axis=-1, keepdims=True) / std
    grad_input, grad_weight, _ = functional.layer_norm_backward(grad_output, x, **keywords)
    actual, actual_weight = functional.rms_norm_backward(grad_output, x, **keywords)
    assert_same((actual - mean, actual_weight), (grad_input, grad_weight), slack)
