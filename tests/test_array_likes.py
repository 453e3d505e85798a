"""What is no ndarray but has an element type keeps it, and is held to it; only numbers of Python's
own, in lists or alone, take that of the layer."""

import array
import ctypes
from functools import partial

import numpy as np
import pytest
from norms_table import BATCH, GROUP, INSTANCE, ROWS
from refusals import OF_DATA, check_refused, overlap_text, overlapping

import cbn
from cbn import functional

C = 3


class Frame:
    """As pandas' DataFrame: no dtype of its own."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype, copy=copy)


class Interface:
    """As an image of Pillow's."""

    def __init__(self, values):
        self.values = values  # which own the memory

    @property
    def __array_interface__(self):
        return self.values.__array_interface__


class Structure(Interface):
    """As arrays of C libraries."""

    __array_interface__ = None

    @property
    def __array_struct__(self):
        return self.values.__array_struct__


def scalars(values):
    return [scalars(value) for value in values] if values.ndim > 1 else list(values)


# Each holds the values of an array.
LIKES = {
    "frame": Frame,
    "interface": Interface,
    "structure": Structure,
    "memoryview": memoryview,
    "ctypes": np.ctypeslib.as_ctypes,
    "list-of-arrays": list,
    "tuple-of-frames": lambda values: tuple(map(Frame, values)),
    "lists-of-scalars": scalars,
}
# Those of one axis.
FLAT = {**LIKES, "array": lambda values: array.array(values.dtype.char, values)}
del FLAT["list-of-arrays"], FLAT["tuple-of-frames"]

OF_LIKES = pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
OF_FLAT = pytest.mark.parametrize("like", FLAT.values(), ids=FLAT)

STATISTICS = np.array([0.5, 0, -0.5]), np.array([1.5, 1, 2])
KINDS = {norm.function: norm for norm in (BATCH[0], INSTANCE[0], GROUP, *ROWS)}
LAYERS = {name: partial(norm.layer, row=(4,)) for name, norm in KINDS.items()}
LAYERS |= {
    f"{name}-eval": lambda norm=norm: norm.layer(track_running_stats=True).eval()
    for name, norm in KINDS.items()
    if norm.learns
}


def draw(rng, dtype="float32"):
    return rng.standard_normal((2, 5, C, 4), np.dtype(dtype).type)


def assert_bits(actual, expected):
    assert (actual.dtype, actual.tobytes()) == (expected.dtype, expected.tobytes())


@OF_LIKES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", KINDS)
def test_functions_keep_the_element_type(norm, dtype, like, rng):
    x, dy = draw(rng, dtype)
    function, gradients = KINDS[norm].functions(row=(4,))
    assert_bits(function(like(x)), function(x))
    for given in ((like(dy), x), (dy, like(x)), (like(dy), like(x))):
        for one, other in zip(gradients(*given), gradients(dy, x), strict=True):
            assert_bits(one, other)


@OF_LIKES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_see_the_element_type(dtype, like, rng):
    x, _ = draw(rng, dtype)
    found = functional.batch_norm_stats(like(x))
    for one, other in zip(found[:2], functional.batch_norm_stats(x)[:2], strict=True):
        assert_bits(one, other)


@OF_LIKES
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_take_their_own_element_type(kind, like, rng):
    x, dy = draw(rng)
    layer, expected = LAYERS[kind](), LAYERS[kind]()
    assert_bits(layer(like(x)), expected(x))
    assert_bits(layer.backward(like(dy)), expected.backward(dy))


def other_float(name):
    expected = "float32, float16 or bfloat16" if name == "x" else "float32"
    remedy = f"numpy.asarray({name}, numpy.float32)"
    return (
        f"{name}: expected {expected}, got float64; convert it with {remedy}, or use float64 "
        f"throughout"
    )


@OF_LIKES
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_refuse_another(kind, like, rng):
    """16777217 would become 16777216 in a float32 layer."""
    (x, dy), layer = draw(rng), LAYERS[kind]()
    value = like(x.astype(float))
    check_refused(partial(layer, value), TypeError, other_float("x"))
    layer(x)
    value = like(dy.astype(float))
    check_refused(partial(layer.backward, value), TypeError, other_float("grad_output"))


@OF_LIKES
@pytest.mark.parametrize("norm", KINDS)
def test_gradients_refuse_another_than_that_of_x(norm, like, rng):
    (x, dy), (_, gradients) = draw(rng), KINDS[norm].functions(row=(4,))
    value = like(dy.astype(float))
    text = other_float("grad_output")
    check_refused(partial(gradients, value, x), TypeError, text)
    check_refused(partial(gradients, value, like(x)), TypeError, text)


def test_a_frame_that_can_convert_itself_is_told_to():
    class Converting(Frame):
        def astype(self, dtype):
            return self.values.astype(dtype)

    text = (
        "x: expected float32, float16 or bfloat16, got float64; convert it with "
        "x.astype(numpy.float32), or use float64 throughout"
    )
    check_refused(partial(cbn.BatchNorm1d(C), Converting(np.ones((4, C)))), TypeError, text)


# What takes one value per channel, by the name in its errors.
PER_CHANNEL = {
    "running_mean": lambda value, x: functional.batch_norm(x, value, STATISTICS[1]),
    "running_var": lambda value, x: functional.batch_norm(x, STATISTICS[0], value),
    "weight": lambda value, x: functional.batch_norm(x, *STATISTICS, value),
    "bias": lambda value, x: functional.batch_norm(x, *STATISTICS, None, value),
    "mean": lambda value, x: functional.batch_norm_backward(x, x, value, STATISTICS[1])[0],
    "var": lambda value, x: functional.batch_norm_backward(x, x, STATISTICS[0], value)[0],
}
PARAMETERS = {
    "weight": lambda value, x: functional.layer_norm(x, C, value),
    "bias": lambda value, x: functional.group_norm(x.T.copy(), 1, None, value),
}
STARTS = {
    name: lambda value, x, name=name: getattr(cbn.BatchNorm1d(C, **{name: value}), name)
    for name in ("running_mean", "running_var")
}
FOLDS = {"bias": lambda value, x: cbn.fold_linear(x, value, cbn.BatchNorm1d(C).eval())[1]}
TAKERS = [*PER_CHANNEL.items(), *PARAMETERS.items(), *STARTS.items(), *FOLDS.items()]


@OF_FLAT
@pytest.mark.parametrize(("name", "call"), TAKERS, ids=[name for name, _ in TAKERS])
def test_parameters_and_statistics(name, call, like, rng):
    """They may be of either float, and of no other type."""
    x = rng.standard_normal((C, C))
    for dtype in ("float32", "float64"):
        value = rng.uniform(1, 2, C).astype(dtype)
        assert_bits(call(like(value), x), call(value, x))
    text = (
        f"{name}: expected float32 or float64, got int32; convert it first, for example with "
        f"numpy.asarray({name}, numpy.float32)"
    )
    check_refused(partial(call, like(np.ones(C, np.int32)), x), TypeError, text)


@OF_LIKES
@pytest.mark.parametrize("fold", [cbn.fold_conv, cbn.fold_linear])
def test_the_weight_of_a_folding(fold, like, rng):
    weight = rng.random((C, 2, 2)[: 3 if fold is cbn.fold_conv else 2], np.float32)
    bn = cbn.BatchNorm1d(C).eval()
    for one, other in zip(fold(like(weight), None, bn), fold(weight, None, bn), strict=True):
        assert_bits(one, other)


def test_bytes_of_whole_numbers_are_no_floats():
    text = (
        f"x: expected {OF_DATA}, got uint8; convert it first, for example with "
        "numpy.asarray(x, numpy.float32)"
    )
    for value in (bytearray(4), array.array("B", bytes(4)), (ctypes.c_uint8 * 4)()):
        check_refused(partial(functional.layer_norm, value, 4), TypeError, text)


@pytest.mark.parametrize("norm", ["batch_norm-eval", "instance_norm", "group_norm", "layer_norm"])
def test_out_over_part_of_the_memory(norm):
    """Also where a kernel reads a copy of it."""
    x, out, strides = overlapping("reversed")
    layer = {
        "batch_norm-eval": cbn.BatchNorm2d(C).eval(),
        "instance_norm": cbn.InstanceNorm2d(C),
        "group_norm": cbn.GroupNorm(1, C),
        "layer_norm": cbn.LayerNorm((C, 2, 2)),
    }[norm]
    text = overlap_text("x", x.strides).replace(
        f"over strides {x.strides}", f"over strides {strides}"
    )
    check_refused(partial(layer, memoryview(out), out=x), ValueError, text)
    layer(x.copy())
    text = text.replace("x, or x", "grad_output, or grad_output")
    check_refused(partial(layer.backward, memoryview(out), out=x), ValueError, text)


def test_statistics_in_the_memory_of_the_input():
    """Also where a kernel reads a copy of it, which training would leave as it was."""
    memory = np.ones((4, 2 * C))
    x, mean = Interface(memory[:, ::2]), memory[0, :C]
    text = "running_mean and x: expected memory of their own, got an overlap"
    for function, flag in (("batch_norm", "training"), ("instance_norm", "use_input_stats")):
        given = Interface(x.values[:, :, np.newaxis]) if function == "instance_norm" else x
        call = partial(getattr(functional, function), given, mean, np.ones(C), **{flag: True})
        check_refused(call, ValueError, text)


@pytest.mark.parametrize("numbers", [[1, 2, 4], (1.0, 2.0, 4.0)], ids=str)
def test_numbers_of_python_take_the_type_of_the_layer(numbers, rng):
    x = [numbers, tuple(numbers)] * 2
    assert cbn.BatchNorm1d(C)(x).dtype == np.float32
    assert cbn.LayerNorm(C, dtype=float)(x).dtype == np.float64
    assert functional.rms_norm(x, C).dtype == np.float64
    bn = cbn.BatchNorm1d(C)
    bn(rng.random((4, C), np.float32))
    assert bn.backward(x).dtype == np.float32
