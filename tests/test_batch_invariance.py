"""A sample has the same bits alone and in any batch, forward and in the gradient of the input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_kinds import Kind, channels_last
from norms_table import GROUP, INSTANCE, ROWS

import cbn

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


INSTANCE_NORM, (LAYER_NORM, RMS_NORM) = INSTANCE[0], ROWS
# Groups of few values, of one piece and of many, by plane and by row, alone and beside others.
KINDS = {
    "instance, of few values": Kind(INSTANCE_NORM, (1, 70, 9)),
    "instance, of a piece": Kind(INSTANCE_NORM, (1, 9, 5000)),
    "instance, of two pieces": Kind(INSTANCE_NORM, (1, 5, 17_001)),
    "instance, of many pieces": Kind(INSTANCE_NORM, (1, 1, 140_003)),
    "instance, last, few positions": Kind(INSTANCE_NORM, (1, 4, 600), -1),
    "instance, last, in pieces": Kind(INSTANCE_NORM, (1, 1500, 40), -1),
    "instance, last, of one channel": Kind(INSTANCE_NORM, (1, 140_003, 1), -1),
    "group, of a piece": Kind(GROUP, (1, 6, 1000), groups=2),
    "group, of two pieces": Kind(GROUP, (1, 4, 20_001), groups=1),
    "group, of many pieces": Kind(GROUP, (1, 30, 4800), groups=1),
    "group, last, by row": Kind(GROUP, (1, 1200, 64), -1, groups=16),
    "group, last, few positions": Kind(GROUP, (1, 5, 96), -1, groups=3),
    "group, last, one position": Kind(GROUP, (1, 1, 10_240), -1, groups=2),
    "group, last, by plane": Kind(GROUP, (1, 70, 1200), -1, groups=2),
    "group, last, of many pieces": Kind(GROUP, (1, 140, 1030), -1, groups=1),
    "layer, short rows": Kind(LAYER_NORM, (1, 7, 10), row=(10,)),
    "layer, rows": Kind(LAYER_NORM, (1, 3, 768), row=(768,)),
    "layer, long rows": Kind(LAYER_NORM, (1, 2, 8195), row=(8195,)),
    "layer, of two pieces": Kind(LAYER_NORM, (1, 1, 20_001), row=(20_001,)),
    "layer, of many pieces": Kind(LAYER_NORM, (1, 2, 70_001), row=(2, 70_001)),
    "rms, rows": Kind(RMS_NORM, (1, 3, 768), row=(768,)),
    "rms, of two pieces": Kind(RMS_NORM, (1, 3, 6667), row=(3, 6667)),
    "rms, of many pieces": Kind(RMS_NORM, (1, 1, 140_003), row=(140_003,)),
}


SIZES = {1: range(1, 18), 2: range(1, 18, 4), 3: range(1, 18, 4)}  # by the number of threads


def assert_alone_as_in_batch(step, x, grad_output, batch_sizes):
    """That a sample has the same bits alone and in batches of these sizes, by numbers of threads.

    A batch is the last samples, so that each of them has another place in every batch.
    """

    def results(first, end):
        """Of each of these samples the bits of its output and of its gradient."""
        y, grad_input = step(x[first:end], grad_output[first:end])
        return [(one.tobytes(), other.tobytes()) for one, other in zip(y, grad_input, strict=True)]

    largest = len(x)
    with cbn.num_threads(1):
        alone = [results(i, i + 1)[0] for i in range(largest)]
    for threads, sizes in batch_sizes.items():
        with cbn.num_threads(threads):
            for size in sizes:
                assert results(largest - size, largest) == alone[largest - size :], (size, threads)


def assert_a_sample_knows_no_other(kind, dtype, largest, batch_sizes):
    rng = np.random.default_rng(7)
    x, grad_output = rng.standard_normal((2, largest, *kind.shape[1:])).astype(dtype)
    weight = rng.uniform(0.5, 2, kind.parameter_shape).astype(dtype)
    norm, gradients = kind.functions()

    def step(x, grad_output):
        return norm(x, weight=weight), gradients(grad_output, x, weight=weight)[0]

    assert_alone_as_in_batch(step, x + 1, grad_output, batch_sizes)


@DTYPE
@pytest.mark.parametrize("name", KINDS)
def test_statistics_of_a_sample_know_no_other(name, dtype):
    assert_a_sample_knows_no_other(KINDS[name], dtype, 17, SIZES)


@st.composite
def any_kind(draw):
    norm = draw(st.sampled_from([INSTANCE_NORM, GROUP, LAYER_NORM, RMS_NORM]))
    # Lengths of every size, not mostly large ones.
    C, S = (draw(st.integers(1, 2 ** draw(st.integers(1, most)))) for most in (11, 17))
    S = max(2, min(S, 200_000 // C))
    groups = draw(st.sampled_from([k for k in range(1, C + 1) if C % k == 0]))
    kind = Kind(norm, (1, C, S), groups=groups, row=draw(st.sampled_from([(S,), (C, S)])))
    return channels_last(kind) if norm not in ROWS and draw(st.booleans()) else kind


@settings(max_examples=100)
@given(any_kind(), st.sampled_from(["float32", "float64"]), st.integers(2, 17), st.integers(1, 3))
def test_a_sample_of_any_shape_knows_no_other(kind, dtype, size, threads):
    size = min(size, max(2, 1_000_000 // int(np.prod(kind.shape))))
    assert_a_sample_knows_no_other(kind, dtype, size, {threads: [size]})


# So many samples that what they share of gradients is added up some at a time, and by how many.
SHARING = {
    "instance": (Kind(INSTANCE_NORM, (1, 64, 3)), 1400),
    "instance, wide": (Kind(INSTANCE_NORM, (1, 1500, 2)), 50),
    "instance, in strips of a part of a sample": (Kind(INSTANCE_NORM, (1, 20_001, 2)), 9),
    "instance, last": (Kind(INSTANCE_NORM, (1, 3, 64), -1), 1400),
    "group": (Kind(GROUP, (1, 64, 3), groups=8), 1400),
    "group, last": (Kind(GROUP, (1, 3, 64), -1, groups=8), 1400),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SHARING)
def test_gradients_of_parameters_are_added_in_the_order_of_the_samples(name, threads, rng):
    kind, size = SHARING[name]
    x, grad_output = rng.standard_normal((2, size, *kind.shape[1:]))
    weight = rng.uniform(0.5, 2, kind.parameter_shape)
    gradients = kind.functions()[1]
    total = np.zeros((2, *kind.parameter_shape))
    for i in range(size):
        total += gradients(grad_output[i : i + 1], x[i : i + 1], weight=weight)[1:]
    with cbn.num_threads(threads):
        grad_input, *of_parameters = gradients(grad_output, x, weight=weight)
        alone = gradients(grad_output, x, weight=weight, wanted="input")[0]
    np.testing.assert_array_equal(of_parameters, total)
    np.testing.assert_array_equal(alone, grad_input)


# Layers whose statistics are given: those of inference, and of training once they are frozen.
GIVEN = {
    "batch, eval": lambda C, **options: cbn.BatchNorm1d(C, **options).eval(),
    "batch, frozen": lambda C, **options: cbn.freeze(cbn.BatchNorm1d(C, **options)),
    "instance, eval": lambda C, **options: cbn.InstanceNorm1d(
        C, affine=True, track_running_stats=True, **options
    ).eval(),
}


@DTYPE
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize(("C", "S"), [(3, 5), (70, 49), (2, 70_001), (1100, 17)])
@pytest.mark.parametrize("name", GIVEN)
def test_given_statistics_know_no_sample(name, C, S, channel_axis, dtype, rng):
    layer = GIVEN[name](C, channel_axis=channel_axis, dtype=dtype)
    for array in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
        array[...] = rng.uniform(0.5, 2, C)
    shape = (17, C, S) if channel_axis == 1 else (17, S, C)
    x, grad_output = rng.standard_normal((2, *shape)).astype(dtype)

    def step(x, grad_output):
        return layer(x), layer.backward(grad_output)

    every_size = dict.fromkeys((1, 2, 3), range(1, 18))
    assert_alone_as_in_batch(step, x, grad_output, every_size)
