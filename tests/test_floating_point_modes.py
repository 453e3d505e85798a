"""Rounding and subnormal numbers: every thread computes as the caller would, and forgets it."""

import ctypes
import platform

import numpy as np
import pytest
from processes import printed_by

import cbn
from cbn import functional

NEAREST = 0x1F80  # MXCSR when a process starts: round to nearest, subnormal numbers, no traps
CONTROL = 0xFFC0  # the others are exceptions seen
MODES = {
    "subnormals_off": NEAREST | 0x8040,
    "flush_to_zero": NEAREST | 0x8000,
    "upwards": NEAREST | 0x4000,
    "towards_zero": NEAREST | 0x6000,
}
TEAM = 3

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="sets MXCSR"),
]


@pytest.fixture
def other(other_library):
    other = ctypes.CDLL(other_library)
    yield other
    other.set_modes(NEAREST)
    other.set_modes_of_team(TEAM, NEAREST)


def modes_of_team(other):
    modes = (ctypes.c_uint * TEAM)()
    other.get_modes_of_team(TEAM, modes)
    return [value & CONTROL for value in modes]


def passes(shape, threads):
    """Every pass, on data whose results are subnormal or depend on how they are rounded."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape).astype(np.float32)
    tiny, ones = x * np.float32(1e-39), np.ones(shape[1])
    with cbn.num_threads(threads):
        mean, var, _ = functional.batch_norm_stats(x)
        results = [
            functional.batch_norm(tiny, 0 * ones, ones, eps=0.0),
            functional.batch_norm(x, None, None, ones / 3, ones / 7, training=True),
            *functional.batch_norm_backward(x[::-1].copy(), x, mean, var, ones / 3),
            *functional.batch_norm_backward(tiny, x, 0 * ones, ones, training=False),
            mean,
            var,
        ]
    return [result.tobytes() for result in results]


# Strip by strip; tile by tile, by row and by plane.
SHAPES = [(40, 96, 30), (3000, 64), (9, 2, 12000)]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_modes_of_the_caller_hold_in_all_threads(other, shape, modes):
    usual = passes(shape, TEAM)
    other.set_modes(MODES[modes])
    alone, together = passes(shape, 1), passes(shape, TEAM)
    other.set_modes(NEAREST)
    assert alone == together
    assert alone != usual


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_modes_of_the_pool_do_not_matter_and_are_given_back(other, shape, modes):
    usual = passes(shape, 1)
    other.set_modes_of_team(TEAM, MODES[modes])
    assert modes_of_team(other) == [NEAREST] + [MODES[modes]] * (TEAM - 1)
    assert passes(shape, TEAM) == usual
    assert modes_of_team(other) == [NEAREST] + [MODES[modes]] * (TEAM - 1)


@pytest.mark.parametrize("modes", [NEAREST, MODES["subnormals_off"] | 0x4000])
def test_import_and_calls_leave_the_modes_of_the_caller(other_library, modes):
    code = f"""
import ctypes, numpy
other = ctypes.CDLL({other_library!r})
other.set_modes({modes})
import cbn
assert other.get_modes() & {CONTROL} == {modes}, "import"
bn = cbn.BatchNorm2d(64)
x = numpy.random.default_rng(0).random((8, 64, 30, 30), dtype=numpy.float32)
for threads in 1, 2, 3:
    with cbn.num_threads(threads):
        bn.backward(bn(x))
    assert other.get_modes() & {CONTROL} == {modes}, threads
"""
    printed_by(code)
