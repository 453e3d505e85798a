"""Arrays of any kind, layout and shape: the reference's results, or a refusal and nothing changed.

CBN_FUZZ_EXAMPLES=100000 draws as many examples for each test.
"""

import os
from math import prod
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbn
from cbn import functional, reference

EXAMPLES = int(os.environ.get("CBN_FUZZ_EXAMPLES", "250"))
fuzz = settings(max_examples=EXAMPLES)

# The axis of the channels, channels first, for each number of axes that a layer takes.
LAYERS = {
    "batch": {
        cbn.BatchNorm1d: {2: 1, 3: 1},
        cbn.BatchNorm2d: {3: 0, 4: 1},
        cbn.BatchNorm3d: {4: 0, 5: 1},
    },
    "instance": {
        cbn.InstanceNorm1d: {2: 0, 3: 1},
        cbn.InstanceNorm2d: {3: 0, 4: 1},
        cbn.InstanceNorm3d: {4: 0, 5: 1},
    },
}
OF_FUNCTIONS = {"batch": dict.fromkeys([2, 3, 4, 5], 1), "instance": dict.fromkeys([3, 4, 5], 1)}
OPTIONS = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-3, 0.5]),
        "momentum": st.sampled_from([0.1, 1.0, None]),
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
        "bias": st.booleans(),
        "channel_axis": st.sampled_from([1, -1]),
        "correction": st.sampled_from([1, 0, 2.5]),
        "nonfinite": st.sampled_from(["propagate", "raise", "skip"]),
    }
)
DTYPES = st.sampled_from([np.dtype("f4"), np.dtype("f8")])
HALVES = [np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)]
DATA_DTYPES = st.one_of(DTYPES, st.sampled_from(HALVES))
SEEDS = st.integers(0, 2**32 - 1)


def shapes(rank):
    lengths = [st.sampled_from([2, 3, 5, 1, 4, 2, 3, 17, 0])] * rank
    return st.tuples(*lengths).filter(lambda shape: prod(shape) <= 1500)


class Layout(NamedTuple):
    """Where the elements of an array lie in a memory, in bytes."""

    offset: int
    strides: tuple[int, ...]
    end: int

    def view(self, memory, shape, dtype):
        return np.ndarray(shape, dtype, memory, self.offset, self.strides)


@st.composite
def layouts(draw, shape, itemsize):
    """The axes in any order, with any step (0: broadcast), the start aligned or not."""
    order, steps, offset = range(len(shape)), st.just(1), 0
    if draw(st.booleans()):
        order = draw(st.permutations(order))
        steps = st.sampled_from([1, 1, 1, 2, -1, -2, 0])
        offset = draw(st.sampled_from([0, 0, itemsize, 1, itemsize - 1]))
    strides, reach = [0] * len(shape), itemsize
    for axis in reversed(order):
        step = draw(steps)
        strides[axis] = step * reach
        offset -= min(strides[axis], 0) * max(shape[axis] - 1, 0)
        reach *= max(1, abs(step) * shape[axis])
    return Layout(offset, tuple(strides), offset + reach)


@st.composite
def inputs_and_outs(draw, shape, dtype):
    """An input of any kind, and an out of any kind: over the input, over a part of it, or apart."""
    here, there = draw(layouts(shape, dtype.itemsize)), draw(layouts(shape, dtype.itemsize))
    memory = np.full(2 * max(here.end, there.end), 7, np.uint8)
    swapped = dtype.newbyteorder()

    kind = draw(st.sampled_from([*["plain"] * 4, "read-only", "byte-swapped", "list", "int"]))
    x = here.view(memory, shape, {"byte-swapped": swapped, "int": np.int16}.get(kind, dtype))
    x[...] = np.random.default_rng(draw(SEEDS)).normal(draw(st.sampled_from([0, 3])), 1, shape)
    x.flags.writeable = kind != "read-only"
    if kind == "list" and x.size:  # an empty list would have lost its shape
        x = x.tolist()

    apart = there.view(np.full_like(memory, 7), shape, dtype)
    shift = draw(st.sampled_from([0, dtype.itemsize, *map(abs, here.strides), here.end]))
    outs = {
        "none": None,
        "input": x,
        "shifted": here._replace(offset=here.offset + shift).view(memory, shape, dtype),
        "criss-cross": there.view(memory, shape, dtype),
        "apart": apart,
        "byte-swapped": apart.view(swapped),
        "read-only": np.broadcast_to(apart, shape),
        "int": np.ones(shape, np.int16),
        "other float": np.ones(shape, np.float32 if dtype == np.float64 else np.float64),
        "longer": np.ones((*shape[:-1], shape[-1] + 1), dtype),
        "list": apart.tolist(),
    }
    # Most of outs are refused; often one that may pass, so that the backward pass is reached.
    return x, outs[draw(st.sampled_from(["none", "input", "shifted", "apart"] * 4 + list(outs)))]


def lies_over_itself(array):
    steps = [np.arange(n) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return np.unique(sum(np.ix_(*steps))).size < array.size


def shares_memory(array, out):
    arrays = isinstance(array, np.ndarray) and isinstance(out, np.ndarray)
    return arrays and (out is array or np.shares_memory(out, array))


def place(array):
    """Where an array begins and what leads from one element to the next."""
    pairs = zip(array.shape, array.strides, strict=True)
    return array.ctypes.data, [stride for length, stride in pairs if length > 1]


def refusals(array, out, shape, dtype):
    """The errors that the documentation promises for an input with this out."""
    errors = []
    if isinstance(array, np.ndarray) and array.dtype.newbyteorder("=") != dtype:
        errors.append(TypeError)
    if out is None:
        return errors
    if not isinstance(out, np.ndarray):
        return [*errors, TypeError]
    if out.dtype != dtype:
        errors.append(TypeError)
    in_part = shares_memory(array, out) and place(array) != place(out)
    if out.shape != shape or not out.flags.writeable or lies_over_itself(out) or in_part:
        errors.append(ValueError)
    return errors


def memory_of(array):
    return array if array.base is None else memory_of(array.base)


def attempt(errors, call, out, inputs, learns=()):
    """Call: with an error it changes nothing, without one nothing but out and what it learns."""
    arrays = [array for array in (*inputs, out, *learns) if isinstance(array, np.ndarray)]
    expected = [memory_of(array).copy() for array in arrays]
    result = None
    if errors:
        with pytest.raises(tuple(errors), match=r"expected .* got"):
            call(out)
    else:
        result = call(out)
        for written in arrays[len(arrays) - len(learns) - (out is not None) :]:
            for array, copy in zip(arrays, expected, strict=True):
                if memory_of(array) is memory_of(written):
                    start = written.ctypes.data - memory_of(written).ctypes.data
                    like = written.shape, written.dtype, copy, start, written.strides
                    np.ndarray(*like)[...] = written
    for array, copy in zip(arrays, expected, strict=True):
        assert memory_of(array).tobytes() == copy.tobytes()
    return result


class DrawnNorm(NamedTuple):
    """A layer that takes data of this shape, and the functions that it is."""

    layer: object
    shape: tuple[int, ...]
    name: str
    options: dict  # of the functions
    channels: int | None  # their axis
    single: bool  # whether the axis of samples is missing, which functions do not know

    def call(self, module, x, **parameters):
        return getattr(module, f"{self.name}_norm")(x, **self.options, **parameters)

    def differentiate(self, module, grad_output, x, **parameters):
        """The gradients of input, weight and bias, None for what there is not."""
        function = getattr(module, f"{self.name}_norm_backward")
        return (*function(grad_output, x, **self.options, **parameters), None)[:3]

    def values_of_a_mean(self, shape):
        """Their number; none where there is nothing to normalise."""
        if self.name == "batch":
            return int(np.delete(shape, self.channels).prod())
        samples = 1 if self.single else shape[0]
        return prod(shape) // samples // shape[self.channels] if prod(shape) else 0


@st.composite
def norms(draw, name, dtype, functions):
    """A norm of this name and a shape that mostly fits it."""
    options = draw(OPTIONS)
    plain = {"eps": options["eps"], "dtype": dtype}
    if name in ("layer", "rms"):
        shape = draw(st.sampled_from([1, 2, 3, 4]).flatmap(shapes))
        last = tuple(max(n, 1) for n in shape[-draw(st.integers(1, len(shape))) :])
        plain["elementwise_affine"] = options["affine"]
        if name == "layer":
            plain["bias"] = options["bias"]
        layer = {"layer": cbn.LayerNorm, "rms": cbn.RMSNorm}[name](last, **plain)
        return DrawnNorm(layer, shape, name, {"normalized_shape": last}, None, False)

    ranks = dict.fromkeys([2, 3, 4, 5], 1)
    if name in LAYERS:
        kind = draw(st.sampled_from(list(LAYERS[name])))
        ranks = OF_FUNCTIONS[name] if functions else LAYERS[name][kind]
    shape = draw(st.sampled_from(list(ranks)).flatmap(shapes))
    first = ranks[len(shape)]  # the axis of the channels where they come first
    channels = first if options["channel_axis"] == 1 else -1
    C = max(shape[channels], 1)
    keywords = {"channel_axis": options["channel_axis"]}
    if name in LAYERS:
        layer = kind(C, dtype=dtype, **options)
        return DrawnNorm(layer, shape, name, keywords, channels, first == 0)
    keywords["num_groups"] = draw(st.sampled_from([n for n in range(1, C + 1) if C % n == 0]))
    for key in ("affine", "bias", "channel_axis"):
        plain[key] = options[key]
    layer = cbn.GroupNorm(keywords["num_groups"], C, **plain)
    return DrawnNorm(layer, shape, name, keywords, channels, False)


@pytest.mark.filterwarnings("ignore::cbn.SmallBatchWarning")  # any count is drawn
@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer", "rms"])
@fuzz
@given(data=st.data(), dtype=DATA_DTYPES, training=st.booleans(), functions=st.booleans())
def test_any_call(assert_close, name, data, dtype, training, functions):
    """Forward and backward, by a layer or by the functions on the arrays of that layer.

    With running statistics the gradient is that of batch norm.
    """
    kept = np.dtype("f4") if dtype in HALVES else dtype
    if functions:
        kept = data.draw(DTYPES)
    norm = data.draw(norms(name, kept, functions))
    layer, shape = norm.layer.train(training), norm.shape
    x, out = data.draw(inputs_and_outs(shape, dtype))
    if isinstance(x, list):
        dtype = np.dtype(float) if functions else kept
    state = [array for array in vars(layer).values() if isinstance(array, np.ndarray)]
    for array in state:
        array[...] = np.random.default_rng(data.draw(SEEDS)).uniform(1, 3, array.shape)
    old = layer.state_dict()
    tracks = name in LAYERS and layer.track_running_stats
    learns, by_running = tracks and training, tracks and not training
    weight = {"weight": layer.weight, "eps": layer.eps}
    parameters = dict(weight) if name == "rms" else {**weight, "bias": layer.bias}
    seen = old.get("num_batches_tracked", 0)
    if name in LAYERS:
        parameters["training" if name == "batch" else "use_input_stats"] = not by_running
        parameters["momentum"] = 1 / (seen + 1) if layer.momentum is None else layer.momentum
        parameters["correction"] = layer.correction

    def running(get):
        return {n: get(n) for n in ("running_mean", "running_var") if name in LAYERS}

    def forward(out):
        if not functions:
            return layer(x, out=out)
        given = running(lambda statistic: getattr(layer, statistic))
        return norm.call(functional, x, out=out, **parameters, **given)

    def lifted(values):
        return np.array(values, dtype)[np.newaxis] if norm.single else np.array(values, dtype)

    values = lifted(x)
    errors = refusals(x, out, shape, dtype)
    if norm.channels is None and shape[-len(layer.normalized_shape) :] != layer.normalized_shape:
        errors.append(ValueError)
    if norm.channels is not None and shape[norm.channels] == 0 and (state or not functions):
        errors.append(ValueError)  # they have one channel
    by_own = name in LAYERS and not by_running
    if by_own and 0 < norm.values_of_a_mean(shape) <= max(1, layer.correction * learns):
        errors.append(ValueError)
    attributes = dict(vars(layer))
    y = attempt(errors, forward, out, [x, *state], state[-3:] if learns else [])
    if errors:
        assert vars(layer) == attributes
        return
    assert y.dtype == dtype
    assert out is None or y is out
    expected = norm.call(reference, values, **parameters, **running(old.get))
    if name in LAYERS:
        expected, *learnt = expected
        assert_close("running_mean", layer.running_mean, learnt[0], kept)
        assert_close("running_var", layer.running_var, learnt[1], kept)
    assert_close("y", y[np.newaxis] if norm.single else y, expected, dtype)
    if learns:
        assert layer.num_batches_tracked == seen + (prod(shape) > 0 and not functions)

    if functions and (shares_memory(x, out) or (by_running and name == "instance")):
        return  # x is no longer what was normalised, or there is no such function
    grad, grad_out = data.draw(inputs_and_outs(shape, dtype))
    grad_out = data.draw(st.sampled_from([grad_out, grad_out, x, out]))
    grads = lifted(grad)
    errors = refusals(grad, grad_out, shape, dtype)
    if functions:  # a layer may have kept a copy of x, here the original is used
        errors += refusals(x, grad_out, shape, dtype)
    elif shares_memory(x, out) and not (by_running and layer.weight is None):
        errors.append(RuntimeError)
    if name == "batch" and not by_running:
        learnt = reference.batch_norm_stats(values, **norm.options)[:2]
    if name == "batch" or by_running:
        weight |= {"mean": learnt[0], "var": learnt[1], "training": not by_running}

    def backward(out):
        if functions:
            return norm.differentiate(functional, grad, x, **weight, out=out)
        return layer.backward(grad, out), layer.weight_grad, layer.bias_grad

    attributes = dict(vars(layer))
    actual = attempt(errors, backward, grad_out, [grad, x, *state])
    if errors:
        assert vars(layer) == attributes
        return
    assert grad_out is None or actual[0] is grad_out
    if by_running:
        norm = norm._replace(name="batch")
    expected = norm.differentiate(reference, grads, values, **weight)
    has = True, functions or layer.weight is not None, functions or layer.bias is not None
    grad_input = actual[0][np.newaxis] if norm.single else actual[0]
    for quantity, array, other, there in zip(
        "xwb", (grad_input, *actual[1:]), expected, has, strict=True
    ):
        assert_close(f"gradient of {quantity}", array, other if there else None, dtype)
