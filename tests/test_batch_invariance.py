"""A sample has the same bits alone and in any batch, forward and in the gradient of the input."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cbn
from cbn import functional

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


class Case(NamedTuple):
    """A norm, its options, its number of parameters, and the shape of a sample."""

    kind: str
    options: dict[str, Any]
    parameters: tuple[int, ...]
    shape: tuple[int, ...]


def by_channel(kind, C, S, channel_axis=1, **options):
    shape = (C, S) if channel_axis == 1 else (S, C)
    return Case(kind, {"channel_axis": channel_axis, **options}, (C,), shape)


def by_value(kind, axes, shape):
    return Case(kind, {"normalized_shape": shape[-axes:]}, shape[-axes:], shape)


# Groups of few values, of one piece and of many, by plane and by row, alone and beside others.
CASES = {
    "instance, of few values": by_channel("instance", 70, 9),
    "instance, of a piece": by_channel("instance", 9, 5000),
    "instance, of two pieces": by_channel("instance", 5, 17_001),
    "instance, of many pieces": by_channel("instance", 1, 140_003),
    "instance, last, few positions": by_channel("instance", 600, 4, -1),
    "instance, last, in pieces": by_channel("instance", 40, 1500, -1),
    "instance, last, of one channel": by_channel("instance", 1, 140_003, -1),
    "group, of a piece": by_channel("group", 6, 1000, num_groups=2),
    "group, of two pieces": by_channel("group", 4, 20_001, num_groups=1),
    "group, of many pieces": by_channel("group", 30, 4800, num_groups=1),
    "group, last, by row": by_channel("group", 64, 1200, -1, num_groups=16),
    "group, last, few positions": by_channel("group", 96, 5, -1, num_groups=3),
    "group, last, one position": by_channel("group", 10_240, 1, -1, num_groups=2),
    "group, last, by plane": by_channel("group", 1200, 70, -1, num_groups=2),
    "group, last, of many pieces": by_channel("group", 1030, 140, -1, num_groups=1),
    "layer, short rows": by_value("layer", 1, (7, 10)),
    "layer, rows": by_value("layer", 1, (3, 768)),
    "layer, long rows": by_value("layer", 1, (2, 8195)),
    "layer, of two pieces": by_value("layer", 1, (1, 20_001)),
    "layer, of many pieces": by_value("layer", 2, (2, 70_001)),
    "rms, rows": by_value("rms", 1, (3, 768)),
    "rms, of two pieces": by_value("rms", 2, (3, 6667)),
    "rms, of many pieces": by_value("rms", 1, (1, 140_003)),
}


def assert_alone_as_in_batch(case, dtype, batch_sizes, threads, seed=7):
    rng = np.random.default_rng(seed)
    largest = max(batch_sizes)
    x, grad_output = (
        rng.standard_normal((largest, *case.shape)).astype(dtype) + shift for shift in (1, 0)
    )
    weight = rng.uniform(0.5, 2, case.parameters).astype(dtype)
    norm = getattr(functional, f"{case.kind}_norm")
    gradients = getattr(functional, f"{case.kind}_norm_backward")

    def results(first, end):
        """Of each of these samples the bits of its output and of its gradient."""
        here = slice(first, end)
        y = norm(x[here], weight=weight, **case.options)
        grad_input = gradients(grad_output[here], x[here], weight=weight, **case.options)[0]
        return [(one.tobytes(), other.tobytes()) for one, other in zip(y, grad_input, strict=True)]

    with cbn.num_threads(1):
        alone = [results(i, i + 1)[0] for i in range(largest)]
    for number in threads:
        with cbn.num_threads(number):
            for size in batch_sizes if number == 1 else batch_sizes[::4]:
                # The last ones, so that a sample has another place in every batch.
                assert results(largest - size, largest) == alone[largest - size :], (size, number)


@DTYPE
@pytest.mark.parametrize("name", CASES)
def test_statistics_of_a_sample_know_no_other(name, dtype):
    assert_alone_as_in_batch(CASES[name], dtype, range(1, 18), (1, 2, 3))


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["instance", "group", "layer", "rms"]))
    # Lengths of every size, not mostly large ones.
    C, S = (draw(st.integers(1, 2 ** draw(st.integers(1, most)))) for most in (11, 17))
    S = max(2, min(S, 200_000 // C))
    if kind in ("layer", "rms"):
        return by_value(kind, draw(st.integers(1, 2)), (C, S))
    channel_axis = draw(st.sampled_from([1, -1]))
    if kind == "instance":
        return by_channel(kind, C, S, channel_axis)
    groups = draw(st.sampled_from([k for k in range(1, C + 1) if C % k == 0]))
    return by_channel(kind, C, S, channel_axis, num_groups=groups)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # by the clock
)
@given(cases(), st.sampled_from(["float32", "float64"]), st.integers(2, 17), st.integers(1, 3))
def test_a_sample_of_any_shape_knows_no_other(case, dtype, size, threads):
    most = max(2, 1_000_000 // int(np.prod(case.shape)))
    assert_alone_as_in_batch(case, dtype, [min(size, most)], [threads])


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

    def results(first, end):
        y = layer(x[first:end])
        grad_input = layer.backward(grad_output[first:end])
        return [(one.tobytes(), other.tobytes()) for one, other in zip(y, grad_input, strict=True)]

    alone = [results(i, i + 1)[0] for i in range(17)]
    for threads in (1, 2, 3):
        with cbn.num_threads(threads):
            for size in range(1, 18):
                assert results(17 - size, 17) == alone[17 - size :], (size, threads)
