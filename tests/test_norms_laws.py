"""Laws of instance, group, layer and RMS norm, for shapes and data that hypothesis chooses."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cbn
from cbn import functional

# The same examples at every run: what fails here fails everywhere.
law = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # by the clock
)

# The table of tolerances: docs/numerics.md promises 1e-6 and 1e-14 of a result, beside the largest
# value that it is made of, and two results that a law makes equal may each be off by that.
SLACK = {"float32": 2e-6, "float64": 2e-14}

AXIS = st.sampled_from([1, -1])
SEEDS = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    """An input, a norm, and what it normalises by."""

    x: np.ndarray
    kind: str
    options: dict[str, Any]
    groups: int  # of values that share their statistics
    weight: np.ndarray
    grad_output: np.ndarray

    def forward(self, x, **more):
        norm = getattr(functional, f"{self.kind}_norm")
        return norm(x, **{"weight": self.weight, **self.options, **more})

    def backward(self, x, grad_output=None, **more):
        gradients = getattr(functional, f"{self.kind}_norm_backward")
        grad_output = self.grad_output if grad_output is None else grad_output
        return gradients(grad_output, x, **{"weight": self.weight, **self.options, **more})

    def by_group(self, array):
        """Float64 of shape (groups, values)."""
        axis = self.options.get("channel_axis", 1)
        return np.moveaxis(array, axis, 1).reshape(self.groups, -1).astype(np.float64)

    @property
    def slack(self):
        return SLACK[self.x.dtype.name]


@st.composite
def samples(draw, least=2):
    """An array (N, C, S), and a number of groups that divides its channels."""
    N = draw(st.sampled_from([1, 2, 3, 9, 70]))
    groups = draw(st.sampled_from([1, 2, 3, 8, 32]))
    C = groups * draw(st.sampled_from([1, 2, 5, 40]))
    S = draw(st.sampled_from([2, 7, 49, 130, 600, 5000]))
    assume(least <= S and N * C * S <= 50_000)
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.standard_normal((N, C, S)) + draw(st.sampled_from([0, 1, 1e3]))
    return x.astype(draw(st.sampled_from(["float32", "float64"]))), groups


@st.composite
def cases(draw, kinds=("instance", "group", "layer", "rms"), least=2):
    x, num_groups = draw(samples(least))
    N, C, S = x.shape
    kind = draw(st.sampled_from(kinds))
    options, groups, parameters = {
        "instance": ({}, N * C, (C,)),
        "group": ({"num_groups": num_groups}, N * num_groups, (C,)),
        "layer": ({"normalized_shape": S}, N * C, (S,)),
        "rms": ({"normalized_shape": (C, S)}, N, (C, S)),
    }[kind]
    if kind in ("instance", "group"):
        options["channel_axis"] = draw(AXIS)
        x = np.moveaxis(x, 1, options["channel_axis"]).copy()
    rng = np.random.default_rng(draw(SEEDS))
    weight, grad_output = rng.uniform(0.5, 2, parameters), rng.standard_normal(x.shape)
    return Case(x, kind, options, groups, weight.astype(x.dtype), grad_output.astype(x.dtype))


def assert_same(actual, expected, slack):
    """That what a law makes equal is so: an output, then gradients, beside their largest values.

    Parameters' gradients are sums, of n values: as large as sqrt(n), unless they happen to cancel.
    """
    for one, other in zip(actual, expected, strict=True):
        n = actual[0].size / other.size
        size = max(np.abs(other).max(), np.sqrt(n) if n > 1 else 0)
        np.testing.assert_allclose(one, other, rtol=0, atol=slack * size)


def integers(case):
    """The input, rounded so that adding and multiplying other integers is exact."""
    x = np.round(100 * case.x)
    assume((case.by_group(x).std(1) > 0).all())
    return x


# ------------------------------------------------------------------------------ of one norm alone


@law
@given(cases(kinds=("instance", "group", "layer")), st.sampled_from([0.0, 1e-5, 1.0]))
def test_the_output_has_mean_0_and_the_variance_that_eps_leaves(case, eps):
    y = case.by_group(case.forward(case.x, weight=None, eps=eps))
    var = case.by_group(case.x).var(1)
    np.testing.assert_allclose(y.mean(1), 0, atol=2 * case.slack)
    np.testing.assert_allclose(y.var(1), var / (var + eps), rtol=4 * case.slack, atol=case.slack)


@law
@given(cases(kinds=("rms",)), st.sampled_from([0.0, 1e-5, 1.0]))
def test_the_output_has_the_mean_square_that_eps_leaves(case, eps):
    y = case.by_group(case.forward(case.x, weight=None, eps=eps))
    square = np.mean(case.by_group(case.x) ** 2, axis=1)
    np.testing.assert_allclose(np.mean(y**2, axis=1), square / (square + eps), rtol=4 * case.slack)


@law
@given(cases(kinds=("instance", "group", "layer"), least=7), st.integers(-(2**20), 2**20))
def test_shifting_the_input_shifts_nothing(case, shift):
    x = integers(case)
    expected = case.forward(x), case.backward(x)[0]
    actual = case.forward(x + shift), case.backward(x + shift)[0]
    assert_same(actual, expected, case.slack)


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
    """Of the output; the gradient is that for the old unit, in the new one."""
    scaled = np.ldexp(case.x, exponent)
    assume((case.by_group(case.x).std(1) > 0.01).all())
    y = case.forward(case.x, eps=0.0)
    assert case.forward(scaled, eps=0.0).tobytes() == y.tobytes()
    grad_input, *parameters = case.backward(case.x, eps=0.0)
    scaled_grad_input, *scaled_parameters = case.backward(scaled, eps=0.0)
    assert scaled_grad_input.tobytes() == np.ldexp(grad_input, -exponent).tobytes()
    for one, other in zip(scaled_parameters, parameters, strict=True):
        assert one.tobytes() == other.tobytes()


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
    np.testing.assert_array_equal(
        case.backward(-case.x, -case.grad_output)[0], -case.backward(case.x)[0]
    )


@law
@given(cases(), SEEDS)
def test_permuting_samples_permutes_the_output_bit_for_bit(case, seed):
    order = np.random.default_rng(seed).permutation(len(case.x))
    permuted = case.x[order]
    assert case.forward(permuted).tobytes() == case.forward(case.x)[order].tobytes()
    grad_input = case.backward(permuted, case.grad_output[order])[0]
    assert grad_input.tobytes() == case.backward(case.x)[0][order].tobytes()


@law
@given(cases(least=7))
def test_the_input_gradient_is_orthogonal_to_one_and_to_the_output(case):
    """For RMS norm to the output alone: the gradient is along the sphere that it maps to."""
    x, grad = (case.by_group(array) for array in (case.x, case.backward(case.x, eps=0.0)[0]))
    centred = x if case.kind == "rms" else x - x.mean(1, keepdims=True)
    std = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    x_hat = centred / std
    # The terms that cancel are as large as those of the gradient before its parts are subtracted.
    size = case.by_group(np.abs(case.grad_output)).sum(1) / std[:, 0] * case.weight.max()
    if case.kind != "rms":
        assert (np.abs(grad.sum(1)) <= case.slack * size).all()
    assert (np.abs((grad * x_hat).sum(1)) <= case.slack * size * np.abs(x_hat).max(1)).all()


@law
@given(cases(), SEEDS)
def test_gradients_are_linear_in_that_of_the_output(case, seed):
    other = np.random.default_rng(seed).integers(-4, 5, case.x.shape).astype(case.x.dtype)
    grad_output = np.round(4 * case.grad_output)  # the sum is exact
    parts = [case.backward(case.x, each, eps=0.1) for each in (grad_output, other)]
    whole = case.backward(case.x, grad_output + other, eps=0.1)
    for one, first, second in zip(whole, *parts, strict=True):
        size = max(np.abs(first).max(), np.abs(second).max())
        np.testing.assert_allclose(one, first + second, rtol=0, atol=2 * case.slack * size)


# ------------------------------------------------------------------------ of one norm and another


def parameters(seed, x):
    """A weight and a bias for each channel of (N, C, S), and a gradient of the output."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.uniform(0.5, 2, x.shape[1]), rng.uniform(-2, 2, x.shape[1])
    return [array.astype(x.dtype) for array in (weight, bias, rng.standard_normal(x.shape))]


def results(norm, gradients, x, grad_output, weight, bias):
    """The output and the three gradients, with an eps that keeps the size of the latter."""
    return (
        norm(x, weight=weight, bias=bias, eps=0.1),
        *gradients(grad_output, x, weight=weight, eps=0.1),
    )


def both(name, **options):
    """A norm and its gradients."""
    return [
        partial(getattr(functional, function), **options) for function in (name, f"{name}_backward")
    ]


instance_norm, group_norm, layer_norm = (
    partial(both, f"{name}_norm") for name in ("instance", "group", "layer")
)


@law
@given(samples(), SEEDS)
def test_group_norm_with_one_group_is_layer_norm_of_samples(data, seed):
    x, _ = data
    weight, bias, grad_output = parameters(seed, x)
    by_value = [np.broadcast_to(array[:, None], x.shape[1:]) for array in (weight, bias)]
    norm = layer_norm(normalized_shape=x.shape[1:])
    y, grad_input, *of_values = results(*norm, x, grad_output, *by_value)
    expected = y, grad_input, *(array.sum(1, dtype=np.float64) for array in of_values)
    actual = results(*group_norm(num_groups=1), x, grad_output, weight, bias)
    assert_same(actual, expected, SLACK[x.dtype.name])


@law
@given(samples(), SEEDS, AXIS)
def test_group_norm_of_single_channels_is_instance_norm(data, seed, axis):
    x, _ = data
    weight, bias, grad_output = parameters(seed, x)
    x, grad_output = (np.moveaxis(array, 1, axis).copy() for array in (x, grad_output))
    arguments = x, grad_output, weight, bias
    actual = results(*group_norm(num_groups=len(weight), channel_axis=axis), *arguments)
    expected = results(*instance_norm(channel_axis=axis), *arguments)
    assert_same(actual, expected, SLACK[x.dtype.name])


@law
@given(samples(least=7), SEEDS, AXIS)
def test_instance_norm_of_one_sample_is_batch_norm_in_training(data, seed, axis):
    x = data[0][:1]
    weight, bias, grad_output = parameters(seed, x)
    x, grad_output = (np.moveaxis(array, 1, axis).copy() for array in (x, grad_output))
    y, *gradients = results(*instance_norm(channel_axis=axis), x, grad_output, weight, bias)
    running = np.ones((2, len(weight)), x.dtype)
    functional.instance_norm(x, *running, channel_axis=axis)

    layer = cbn.BatchNorm1d(len(weight), eps=0.1, dtype=x.dtype, channel_axis=axis, running_mean=1)
    layer.weight[...], layer.bias[...] = weight, bias
    expected = layer(x), layer.backward(grad_output), layer.weight_grad, layer.bias_grad
    learnt = layer.running_mean, layer.running_var
    assert_same((y, *gradients, *running), (*expected, *learnt), SLACK[x.dtype.name])


@law
@given(samples(), SEEDS, st.booleans())
def test_channels_last_is_channels_first_transposed(data, seed, grouped):
    x, groups = data
    weight, bias, grad_output = parameters(seed, x)
    norm = partial(group_norm, num_groups=groups) if grouped else instance_norm
    last = [np.moveaxis(array, 1, -1).copy() for array in (x, grad_output)]
    y, grad_input, *rest = results(*norm(channel_axis=-1), *last, weight, bias)
    actual = np.moveaxis(y, -1, 1), np.moveaxis(grad_input, -1, 1), *rest
    expected = results(*norm(channel_axis=1), x, grad_output, weight, bias)
    assert_same(actual, expected, SLACK[x.dtype.name])


@law
@given(samples(), SEEDS)
def test_layer_norm_is_rms_norm_of_what_has_mean_0(data, seed):
    x = np.concatenate([data[0], -data[0]], axis=-1)  # whose mean is 0 exactly
    rng = np.random.default_rng(seed)
    weight, grad_output = rng.uniform(0.5, 2, x.shape[-1]), rng.standard_normal(x.shape)
    weight, grad_output = weight.astype(x.dtype), grad_output.astype(x.dtype)
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
