"""Arrays in and out: every layout gives the bits of the contiguous one, and nothing else moves.

Batch norm reads (N, C) in Fortran order where it lies, as (C, N): this has the bits of such planes.
"""

import tempfile
import tracemalloc
from functools import partial
from itertools import product

import numpy as np
import pytest
from norms_table import NORMS, filled
from refusals import read_only

import cbn
from cbn.functional import batch_norm, batch_norm_backward, batch_norm_stats

C = 3
NCHW = ("BatchNorm2d", 1, (4, C, 5, 6))
CASES = {
    "NC": ("BatchNorm1d", 1, (5, C)),
    "NCL": ("BatchNorm1d", 1, (5, C, 7)),
    "NCHW": NCHW,
    "NHWC": ("BatchNorm2d", -1, (4, 5, 6, C)),
    "NCDHW": ("BatchNorm3d", 1, (2, C, 3, 2, 4)),
    "instance": ("InstanceNorm1d", 1, (5, C, 7)),
    "instance-last": ("InstanceNorm2d", -1, (4, 5, 6, C)),
    "group": ("GroupNorm", 1, (5, C, 7)),
    "layer": ("LayerNorm", 1, (5, C, 7)),
    "rms": ("RMSNorm", 1, (5, C, 7)),
}


class Tagged(np.ndarray):
    """A subclass that a kernel must not be handed, nor a caller get back."""


def fill(empty, array):
    empty[...] = array
    return empty


def within(array, pad, step):
    """The values of array on part of a larger array of ones."""
    memory = np.ones([step * n + 2 * pad for n in array.shape], array.dtype)
    return fill(memory[tuple(slice(pad, pad + step * n, step) for n in array.shape)], array)


def misaligned(array):
    memory = bytearray(array.nbytes + 1)
    view = np.frombuffer(memory, array.dtype, array.size, offset=1).reshape(array.shape)
    assert not view.flags.aligned
    return fill(view, array)


def on_disk(array):
    with tempfile.TemporaryFile() as file:
        return fill(np.memmap(file, array.dtype, "w+", shape=array.shape), array)


# Each makes an array of equal values in another layout.
WRITABLE = {
    "contiguous": np.copy,
    "fortran": partial(np.array, order="F"),
    "reversed": lambda a: fill(np.empty_like(a)[::-1], a),
    "all-reversed": lambda a: fill(np.flip(np.empty_like(a)), a),
    "sliced": partial(within, pad=2, step=1),
    "stepped": partial(within, pad=0, step=2),
    "strided": lambda a: fill(np.ones((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2], a),
    "transposed": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0),
    "misaligned": misaligned,
    "subclass": lambda a: a.copy().view(Tagged),
    "memmap": on_disk,
}
READABLE = {
    **WRITABLE,
    "read-only": lambda a: read_only(a.copy()),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "lists": np.ndarray.tolist,
}


def make(case, dtype, training=True):
    name, channel_axis, shape = case
    options = {NORMS[name].affine: True, "dtype": dtype}
    if NORMS[name].learns:
        options |= {"track_running_stats": True, "channel_axis": channel_axis}
    return filled(NORMS[name].layer(C, row=shape[1:], **options)).train(training)


def draw(rng, case, dtype):
    return rng.standard_normal((2, *case[2]), np.dtype(dtype).type)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


# In both modes, where these differ.
SETTINGS = {
    f"{mode}-{name}": (case, mode == "train")
    for name, case in CASES.items()
    for mode in ("train", "eval")
    if mode == "train" or NORMS[case[0]].learns
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture
def layers(setting, dtype):
    """Two that are equal, one of which is to see arrays in other layouts."""
    case, training = setting
    return [make(case, dtype, training) for _ in range(2)]


@pytest.fixture
def arrays(rng, setting, dtype):
    return draw(rng, setting[0], dtype)


@pytest.fixture
def x(arrays):
    return arrays[0]


@pytest.fixture
def dy(arrays):
    return arrays[1]


def assert_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_same_state(layer, expected):
    """Parameters and statistics, and gradients where there are any."""
    for name, value in expected.state_dict().items():
        assert_bits(getattr(layer, name), value)
    for name in ("weight_grad", "bias_grad"):
        if getattr(expected, name) is not None:
            assert_bits(getattr(layer, name), getattr(expected, name))


class Planes:
    """A layer of (N, C), given the same values as (1, C, N)."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x.T[np.newaxis])[0].T

    def backward(self, dy):
        return self.layer.backward(dy.T[np.newaxis])[0].T


def lies_by_column(array):
    return isinstance(array, np.ndarray) and array.ndim == 2 and array.flags.fnc


def as_it_lies(layer, given):
    """What a layer is held to that is given this input."""
    return Planes(layer) if lies_by_column(given) else layer


# ---------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", READABLE)
def test_input_in_any_layout(layout, layers, dtype, x, dy):
    layer, expected = layers
    given = READABLE[layout](x)
    held_to = as_it_lies(expected, given)
    y = layer(given)
    assert type(y) is np.ndarray
    assert y.flags.fnc if lies_by_column(given) else y.flags.c_contiguous
    assert_bits(y, held_to(x))
    assert_bits(layer.backward(dy), held_to.backward(dy))
    assert_same_state(layer, expected)
    assert_bits(np.array(given, dtype), x)


@pytest.mark.parametrize("layout", READABLE)
def test_grad_output_in_any_layout(layout, layers, dtype, x, dy):
    layer, expected = layers
    given = READABLE[layout](dy)
    layer(x)
    expected(x)
    dx = layer.backward(given)
    assert type(dx) is np.ndarray
    assert_bits(dx, expected.backward(dy))
    assert_same_state(layer, expected)
    assert_bits(np.array(given, dtype), dy)


def test_table_by_column(rng):
    """As many rows as columns, so that what is turned, or is not, has the same shape."""
    x, dy, residual = rng.standard_normal((3, 5, 5))
    layer, planes = (cbn.BatchNorm1d(5, activation="relu", dtype=float) for _ in range(2))
    y = planes(x.T[np.newaxis], residual=residual.T[np.newaxis])[0].T
    dx = planes.backward(dy.T[np.newaxis])[0].T
    for orders in product("CF", repeat=3):
        given, out, grad = (
            np.array(array, order=order)
            for array, order in zip((residual, x, dy), orders, strict=True)
        )
        assert layer(np.asfortranarray(x), out, residual=given) is out
        assert_bits(out, y)
        assert_bits(layer.backward(grad), dx)
        assert_bits(layer.residual_grad, planes.residual_grad[0].T)
        assert_bits(layer.weight_grad, planes.weight_grad)


def test_table_by_column_is_refused_by_its_own_shape():
    x = np.asfortranarray(np.ones((5, C), np.float32))
    bn = cbn.BatchNorm1d(C)
    with pytest.raises(ValueError, match=r"^x: expected 3 channels on axis 1, got 5 in shape"):
        bn(np.asfortranarray(np.ones((6, 5), np.float32)))
    with pytest.raises(ValueError, match=r"^out: expected shape \(5, 3\), got \(3, 5\)$"):
        bn(x, x.T)
    with pytest.raises(ValueError, match=r"^residual: expected shape \(5, 3\).*got \(3, 5\)$"):
        bn(x, residual=x.T)
    spread = np.lib.stride_tricks.as_strided(np.ones(5, np.float32), (5, C), (4, 0))
    with pytest.raises(
        ValueError, match=r"overlap itself, got shape \(5, 3\) with strides \(4, 0\)$"
    ):
        bn(x, spread)
    with pytest.raises(TypeError, match=r"^x: expected float32"):
        bn(x.astype(int, order="K"), residual=[[1.0] * C] * 5)
    bn(x)
    with pytest.raises(ValueError, match=r"^grad_output: expected shape \(5, 3\).*got \(3, 5\)$"):
        bn.backward(x.T)


def test_broadcast_input(rng):
    x = np.broadcast_to(rng.standard_normal((1, C, 5, 1)), (4, C, 5, 6))
    bn, expected = make(NCHW, float), make(NCHW, float)
    assert_bits(bn(x), expected(x.copy()))
    assert_bits(bn.backward(x), expected.backward(x.copy()))


@pytest.mark.parametrize("layout", READABLE)
def test_per_channel_arguments_in_any_layout(layout, rng):
    x, dy = draw(rng, NCHW, "float32")
    arrays = rng.random((4, C))
    given = [READABLE[layout](array) for array in arrays]
    assert_bits(batch_norm(x, *given), batch_norm(x, *arrays))
    actual = batch_norm_backward(dy, x, *given[:3])
    for one, other in zip(actual, batch_norm_backward(dy, x, *arrays[:3]), strict=True):
        assert_bits(one, other)


def test_lists_are_of_the_dtype_of_the_layer_or_float64():
    lists = [[1, 2, 3], [4, 6, 8]] * 2
    assert cbn.BatchNorm1d(C)(lists).dtype == np.float32
    assert cbn.BatchNorm1d(C, dtype=float)(lists).dtype == np.float64
    assert batch_norm(lists, None, None, training=True).dtype == np.float64
    mean, var, count = batch_norm_stats(lists)
    assert (mean.tolist(), var.tolist(), count) == ([2.5, 4, 5.5], [2.25, 4, 6.25], 4)


# --------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("layout", WRITABLE)
def test_out_in_any_layout(layout, layers, x, dy):
    layer, expected = layers
    out, grad = WRITABLE[layout](np.zeros_like(x)), WRITABLE[layout](np.zeros_like(x))
    assert layer(x, out=out) is out
    assert_bits(out, expected(x))
    assert layer.backward(dy, out=grad) is grad
    assert_bits(grad, expected.backward(dy))
    assert_same_state(layer, expected)


def test_table_of_one_column_is_in_both_orders(rng):
    x = rng.standard_normal((7, 1), np.float32)
    expected = cbn.BatchNorm1d(1)(x)
    assert_bits(cbn.BatchNorm1d(1)(x.view(Tagged)), expected)
    assert_bits(cbn.BatchNorm1d(1)(x.tolist()), expected)


@pytest.mark.parametrize(
    ("layer", "shape", "order"),
    [(cbn.BatchNorm2d, (4, C, 200, 200), "C"), (cbn.BatchNorm1d, (160000, C), "F")],
    ids=["NCHW", "table by column"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_they_are_neither_copied_nor_written_by_way_of_a_temporary(
    training, layer, shape, order, rng
):
    x, dy, out = (np.array(a, order=order) for a in rng.random((3, *shape), np.float32))
    bn = layer(C).train(training)
    tracemalloc.start()
    try:
        bn(x, out=out)
        bn.backward(dy, out=dy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 10


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_out_leaves_what_is_between_its_elements(step, pad, rng):
    x, dy = draw(rng, NCHW, "float32")
    out = within(np.ones_like(x), pad, step)
    bn = make(NCHW, "float32")
    for write in (partial(bn, x), partial(bn.backward, dy)):
        write(out=out)
        assert (out != 1).all()
        out[...] = 1
        assert (out.base == 1).all()


OVERWRITTEN = pytest.raises(RuntimeError, match="got one that an out= wrote over")


@pytest.mark.parametrize("layout", WRITABLE)
def test_in_place(layout, layers, x, dy):
    layer, expected = layers
    given = WRITABLE[layout](x)
    assert layer(given, out=given) is given
    assert_bits(given, as_it_lies(expected, given)(x))
    assert_same_state(layer, expected)
    with OVERWRITTEN:
        layer.backward(dy)


@pytest.mark.parametrize("layout", WRITABLE)
def test_backward_over_grad_output(layout, layers, x, dy):
    layer, expected = layers
    given = WRITABLE[layout](dy)
    layer(x)
    expected(x)
    assert layer.backward(given, out=given) is given
    assert_bits(given, expected.backward(dy))
    assert_same_state(layer, expected)
    assert_bits(layer.backward(dy), expected.backward(dy))


@pytest.mark.parametrize("layout", WRITABLE)
def test_backward_over_x(layout, layers, x, dy):
    layer, expected = layers
    given = WRITABLE[layout](x)
    held_to = as_it_lies(expected, given)
    layer(given)
    held_to(x)
    dx = layer.backward(dy, out=given)
    assert dx is given
    assert_bits(dx, held_to.backward(dy))
    assert_same_state(layer, expected)


@pytest.mark.parametrize("layout", ["contiguous", "subclass", "memmap"])
def test_second_backward_after_one_over_x_is_refused(layout, layers, x, dy):
    layer, x = layers[0], WRITABLE[layout](x)
    layer(x)
    dx = layer.backward(dy, out=x)
    before = dx.tobytes()
    with OVERWRITTEN:
        layer.backward(dy)
    assert dx.tobytes() == before


@pytest.mark.parametrize("view", [np.ndarray.view, lambda a: a[:], lambda a: a.reshape(a.shape)])
def test_another_view_of_the_very_input_is_in_place(view, rng):
    x, _ = draw(rng, NCHW, "float32")
    expected = make(NCHW, "float32")(x)
    bn = make(NCHW, "float32")
    bn(x, out=view(x))
    assert_bits(x, expected)
    with OVERWRITTEN:
        bn.backward(expected)


INTERLEAVED = {
    "rows": (np.s_[::2], np.s_[1::2]),
    "columns": (np.s_[..., ::2], np.s_[..., 1::2]),
    "halves": (np.s_[:4], np.s_[4:]),
}


@pytest.mark.parametrize("how", INTERLEAVED)
def test_out_may_share_a_buffer_with_the_input_but_no_element(how, rng):
    memory = rng.standard_normal((8, C, 4, 6))
    before, after = (memory[part] for part in INTERLEAVED[how])
    x = before.copy()
    bn, expected = make(NCHW, float), make(NCHW, float)
    assert bn(before, out=after) is after
    assert_bits(after, expected(x))
    assert_bits(before, x)


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_out_of_functions(layout, training, rng):
    x, dy = draw(rng, NCHW, "float32")
    mean, var, weight = np.full((3, C), [1.0, 2.0, 3.0])
    expected = batch_norm(x, mean.copy(), var.copy(), weight, training=training)
    out = WRITABLE[layout](x)
    y = batch_norm(out, mean.copy(), var.copy(), weight, training=training, out=out)
    assert y is out
    assert_bits(out, expected)

    gradients = batch_norm_backward(dy, x, mean, var, weight, training)
    for over in ("grad_output", "x"):
        given = {"grad_output": dy, "x": x}
        out = given[over] = WRITABLE[layout](given[over])
        actual = batch_norm_backward(
            **given, mean=mean, var=var, weight=weight, training=training, out=out
        )
        assert actual[0] is out
        for one, other in zip(actual, gradients, strict=True):
            assert_bits(one, other)


@pytest.mark.parametrize("shape", [(300, 40), (50, 7, 3), (2, 5, 700), (1, 9, 49)], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 7, 15])
def test_out_anywhere_within_a_cache_line(rng, offset, shape):
    x = rng.normal(size=shape).astype(np.float32)
    layer = cbn.BatchNorm1d(shape[1])
    expected = layer(x), layer.backward(x)
    memory = np.empty(x.size + 64, np.float32)
    first = -(memory.ctypes.data // 4) % 16 + offset
    out = memory[first : first + x.size].reshape(shape)
    for call, y in zip((layer, layer.backward), expected, strict=True):
        memory[...] = 7
        assert call(x, out=out).tobytes() == y.tobytes()
        assert (memory[:first] == 7).all()
        assert (memory[first + x.size :] == 7).all()
