"""Data of float16 and bfloat16: what float32 gives for the same values, rounded once."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from norm_kinds import kinds
from norms_table import NORMS
from processes import printed_by
from refusals import KINDS, SHAPE, C, Scene, check_refused
from tolerances import CLOSE

import cbn
from cbn import _dispatch, _threads, functional, reference

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
HALF = pytest.mark.parametrize("half", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
ISA = pytest.mark.parametrize("isa", _dispatch.supported())

# By row and by plane, of few values and of many, in one piece and in several.
EVERY_KIND = kinds(
    batches=[(40, 3), (33, 2100), (20, 11, 49), (3, 5, 700), (1, 2, 40_000), (9, 5, 14, 14)],
    rows=[(7, 33), (300, 3, 2), (40, 768), (3, 20_000)],
    groups=[((2, 64, 49), 32), ((3, 6, 3000), 2), ((4, 24), 8)],
    instances=[(4, 20, 49), (2, 3, 900)],
)


def of_type(half, values):
    """Values of a half type, without a word about what is beyond it."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(half)


def drawn(rng, shape, half):
    return of_type(half, rng.normal(1, 2, shape)), of_type(half, rng.standard_normal(shape))


def trained(kind, x, grad_output):
    """All that a layer of float32 gives for these data, of the type of the data and of its own."""
    layer = kind.layer()
    rng = np.random.default_rng(1)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter[...] = rng.uniform(0.5, 2, parameter.shape)
    of_data, own = {}, {}
    for training in (True, False):
        of_data[f"y, {training=}"] = layer.train(training)(x)
        of_data[f"grad_input, {training=}"] = layer.backward(grad_output)
        own[f"weight_grad, {training=}"] = layer.weight_grad
        own[f"bias_grad, {training=}"] = layer.bias_grad
    return of_data, own | layer.state_dict()


def assert_rounded_once(results, results_of_float32, half):
    """Results are (those of the type of the data, those of float32)."""
    (of_data, own), (single, own_single) = results, results_of_float32
    for name, array in of_data.items():
        assert array.dtype == half, name
        assert array.tobytes() == of_type(half, single[name]).tobytes(), name
    for name, array in own.items():
        if array is not None:
            assert array.dtype == own_single[name].dtype, name
            assert array.tobytes() == own_single[name].tobytes(), name


@ISA
@HALF
@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_float32_rounded_once(kind, half, isa, rng, use_isa):
    x, grad_output = drawn(rng, kind.shape, half)
    use_isa(isa)
    single = trained(kind, x.astype(np.float32), grad_output.astype(np.float32))
    for threads in (1, 3):
        with _threads.num_threads(threads):
            assert_rounded_once(trained(kind, x, grad_output), single, half)


@ISA
@HALF
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_every_tail(channel_axis, half, isa, rng, use_isa):
    use_isa(isa)
    options = {"channel_axis": channel_axis}
    for length in range(1, 131):
        shape = (2, 3, length) if channel_axis == 1 else (2, 3, length)[::-1]
        x, grad_output = drawn(rng, shape, half)
        results = []
        for to in (half, np.float32):
            one, grad = x.astype(to), grad_output.astype(to)
            y, saved = functional.batch_norm_forward(one, None, None, training=True, **options)
            dx, *gradients = functional.norm_backward(grad, saved)
            y_of_rows, saved_of_rows = functional.layer_norm_forward(one, shape[-1])
            dx_of_rows, *gradients_of_rows = functional.norm_backward(grad, saved_of_rows)
            of_data = y, dx, y_of_rows, dx_of_rows
            own = *gradients, *gradients_of_rows, saved.statistics
            results.append((dict(enumerate(of_data)), dict(enumerate(own))))
        assert_rounded_once(*results, half)


@HALF
@pytest.mark.parametrize("shape", [(9, 1001, 31, 31), (18, 31, 130, 130)], ids=str)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_written_past_the_cache(channel_axis, shape, half, use_isa):
    rng = np.random.default_rng(8)
    shape = shape if channel_axis == 1 else (shape[0], *shape[2:], shape[1])
    C = shape[channel_axis]
    single = np.resize(rng.normal(size=10_007).astype(half).astype(np.float32), shape)
    x = single.astype(half)
    assert 2 * x.nbytes >= 1 << 24
    mean, var = np.linspace(-1, 1, C), np.linspace(1, 2, C)
    normalise = partial(functional.batch_norm, running_mean=mean, running_var=var)
    expected = of_type(half, normalise(single, channel_axis=channel_axis))
    for isa in _dispatch.supported():
        use_isa(isa)
        for offset in (0, 3):
            memory = np.empty(x.size + 64, half)
            out = memory[offset : offset + x.size].reshape(shape)
            assert normalise(x, channel_axis=channel_axis, out=out) is out
            assert out.tobytes() == expected.tobytes(), (isa, offset)


@ISA
@HALF
@pytest.mark.parametrize(
    "shape", [(-1, 1), (1, 1, -1), (1, 1 << 10, 1 << 6), (1 << 6, 1 << 10)], ids=str
)
def test_every_value_is_loaded_and_stored(shape, half, isa, use_isa):
    """All that a half type can hold, and multiples of it: of two as near it is the even one."""
    use_isa(isa)
    x = np.arange(1 << 16, dtype=np.uint16).view(half).reshape(shape)
    ones, zeros = np.ones(x.shape[1]), np.zeros(x.shape[1])
    y = functional.batch_norm(x, zeros, ones, eps=0.0)
    assert np.array_equal(y.astype(np.float32), x.astype(np.float32), equal_nan=True)

    for factor in (0.5, 1.5, 1 + 2**-9, 1 + 2**-12, 1 - 2**-12, 1 / 3, 1e-3, 100):
        weight = np.full(x.shape[1], factor, np.float32)
        y = functional.batch_norm(x, zeros, ones, weight, eps=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = of_type(half, x.astype(np.float32) * weight[0])
        y, expected = y.astype(np.float32), expected.astype(np.float32)
        assert np.array_equal(y, expected, equal_nan=True), factor


@ISA
@HALF
@pytest.mark.parametrize("shape", [(2, 3, 49), (2, 3, 300), (40, 70)], ids=str)
@pytest.mark.parametrize("of", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("double", [False, True])
def test_a_parameter_that_is_not_a_number_makes_none(double, of, shape, half, isa, rng, use_isa):
    """All bits of it are set: rounded up as a number is, it would be zero."""
    use_isa(isa)
    x, grad_output = drawn(rng, shape, half)
    names = "running_mean", "running_var", "weight", "bias"
    values = {name: np.ones(shape[1], np.float64 if double else np.float32) for name in names}
    values[of].view(np.int64 if double else np.int32)[1] = -1
    y, saved = functional.batch_norm_forward(x, **values)
    dx, *_ = functional.norm_backward(grad_output, saved, values["weight"])
    expected = np.zeros(shape, bool)
    expected[:, 1] = True
    assert np.array_equal(np.isnan(y.astype(np.float32)), expected)
    if of in ("running_var", "weight"):
        assert np.array_equal(np.isnan(dx.astype(np.float32)), expected)

    parameters = {name: values[name] for name in ("weight", "bias")}
    rows = x if x.ndim == 2 else np.ascontiguousarray(np.swapaxes(x, 1, 2))
    y, saved = functional.layer_norm_forward(rows, shape[1], **parameters)
    dx, *_ = functional.norm_backward(rows, saved, values["weight"])
    if of in parameters:
        assert np.array_equal(
            np.isnan(y.astype(np.float32)).nonzero()[-1], np.full(y.size // shape[1], 1)
        )
    if of == "weight":
        assert np.isnan(dx.astype(np.float32)).all()


@ISA
@HALF
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_what_is_not_finite_stays_in_its_channel(channel_axis, value, half, isa, rng, use_isa):
    use_isa(isa)
    x = drawn(rng, (4, 3, 50) if channel_axis == 1 else (4, 50, 3), half)[0]
    clean = functional.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
    np.moveaxis(x, channel_axis, 0)[1, 2, 7] = value
    y = functional.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
    clean, y = (np.moveaxis(array, channel_axis, 0).astype(np.float32) for array in (clean, y))
    assert np.isnan(y[1]).all()
    assert np.array_equal(y[::2], clean[::2])


# -------------------------------------------------------------------------------------- reference


@HALF
@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_the_reference(kind, half, rng, assert_close):
    """It rounds once too, of float64: near a middle, it may be to the other neighbour."""
    x, grad_output = drawn(rng, kind.shape, half)
    (forward, backward), (right, right_backward) = kind.functions(), kind.functions(reference)
    y, expected = forward(x), right(x, **eps_of(kind))
    assert expected.dtype == half
    assert_close("y", y, expected, half)
    gradients, expected = backward(grad_output, x), right_backward(grad_output, x, **eps_of(kind))
    assert gradients[0].dtype == expected[0].dtype == half
    assert_close("grad_input", gradients[0].astype(float), expected[0].astype(float), half)
    for one, other in zip(gradients[1:], expected[1:], strict=True):
        assert one.dtype == np.float32
        assert_close("gradient", one, other, np.float32, more=1e-7 * abs(grad_output).sum())


def eps_of(kind):
    return {"eps": float(np.finfo(np.float32).eps)} if kind.norm.name == "RMSNorm" else {}


def test_the_reference_rounds_once():
    """Not by way of float32, in which these lie in the middle of two, and go to the even one."""
    above, below = 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40
    x = np.array([[1.0], [-1.0]], BFLOAT16)
    for value, expected in ((above, 1 + 2**-7), (below, 1 + 2**-7)):
        y, *_ = reference.batch_norm(x, [0.0], [1.0], [value], eps=0.0)
        assert y.astype(float).ravel().tolist() == [expected, -expected]


# ------------------------------------------------------------------------------ arguments, outputs


@HALF
def test_in_place_and_into_out(half, rng):
    x, grad_output = drawn(rng, (4, 5, 90), half)
    expected = cbn.BatchNorm1d(5)
    y, dx = expected(x), expected.backward(grad_output)
    layer, copy = cbn.BatchNorm1d(5), x.copy()
    assert layer(x, out=copy).tobytes() == y.tobytes()
    assert layer.backward(grad_output, out=grad_output) is grad_output
    assert grad_output.tobytes() == dx.tobytes()
    assert layer(copy := x.copy(), out=copy) is copy
    assert copy.tobytes() == y.tobytes()


@HALF
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
        lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
        lambda x: x.astype(x.dtype.newbyteorder()),
    ],
    ids=["fortran", "strided", "misaligned", "byte-swapped"],
)
def test_any_layout(laid_out, half, rng):
    x, grad_output = drawn(rng, (4, 5, 9), half)
    layer, expected = cbn.BatchNorm1d(5), cbn.BatchNorm1d(5)
    y = layer(laid_out(x))
    assert y.dtype == half
    assert y.tobytes() == expected(x).tobytes()
    dx = layer.backward(laid_out(grad_output))
    assert dx.tobytes() == expected.backward(grad_output).tobytes()
    out = np.empty((4, 9, 5), half).transpose(0, 2, 1)
    assert layer(x, out=out) is out
    assert out.tobytes() == y.tobytes()


@HALF
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_of_functions_are_of_either_float(dtype, half, rng):
    x = drawn(rng, (8, 3), half)[0]
    mean, var, weight, bias = rng.uniform(0.5, 2, (4, 3)).astype(dtype)
    expected = of_type(half, functional.batch_norm(x.astype("f4"), mean, var, weight, bias))
    assert functional.batch_norm(x, mean, var, weight, bias).tobytes() == expected.tobytes()
    functional.batch_norm(x, mean, var, training=True)
    assert mean.dtype == var.dtype == dtype


@HALF
def test_numbers_of_python_take_the_type_of_the_layer(half, rng):
    layer, x = cbn.BatchNorm1d(2), drawn(rng, (4, 2), half)[0]
    assert layer(x.astype(float).tolist()).dtype == np.float32
    y = layer(list(x))  # a list of arrays has an element type
    assert y.dtype == half
    assert layer.backward(y.astype(float).tolist()).dtype == half


@HALF
def test_recalibrating(half, rng):
    batches = [drawn(rng, (30, 4), half)[0] for _ in range(3)]
    layer, single = cbn.BatchNorm1d(4), cbn.BatchNorm1d(4)
    cbn.recalibrate(layer, batches, layer)
    cbn.recalibrate(single, [batch.astype(np.float32) for batch in batches], single)
    for name, array in single.state_dict().items():
        assert getattr(layer, name).tobytes() == array.tobytes(), name


@HALF
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_float64_takes_no_half(kind, half):
    layer = KINDS[kind].layer(C, dtype="float64").train(not kind.endswith("eval"))
    text = (
        f"x: expected float64, got {half}; convert it with x.astype(numpy.float64), "
        f"or use a layer of float32, which takes {half}"
    )
    check_refused(partial(layer, np.ones(SHAPE, half)), TypeError, text)


@HALF
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_of_the_type_of_x(kind, half):
    layer, name = Scene(kind).layer, "ml_dtypes" if half == BFLOAT16 else "numpy"
    for x, grad, to in (
        (half, np.dtype("f4"), f"{name}.{half}"),
        (np.dtype("f4"), half, "numpy.float32"),
    ):
        layer(np.ones(SHAPE, x))
        text = (
            f"grad_output: expected {x}, got {grad}; "
            f"convert it with grad_output.astype({to}), or use {grad} throughout"
        )
        check_refused(partial(layer.backward, np.ones(SHAPE, grad)), TypeError, text)


@HALF
def test_outputs_are_of_the_type_of_x(half):
    layer = Scene("batch").layer
    text = f"out: expected {half}, got float32 in an array of shape {SHAPE}"
    call = partial(layer, np.ones(SHAPE, half), out=np.ones(SHAPE, np.float32))
    check_refused(call, TypeError, text)
    text = f"out: expected float32, got {half} in an array of shape {SHAPE}"
    call = partial(layer, np.ones(SHAPE, np.float32), out=np.ones(SHAPE, half))
    check_refused(call, TypeError, text)


@HALF
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_parameters_and_statistics_are_of_no_half(name, half):
    text = (
        f"{name}: expected float32 or float64, got {half}; "
        f"convert it first, for example with {name}.astype(numpy.float32)"
    )
    for kind in ("batch", "batch-eval"):
        for through in ("layer", "functions"):
            for call in Scene(kind).calls(through, **{name: np.ones(C, half)}):
                check_refused(call, TypeError, text)


@HALF
def test_layers_are_of_no_half(half):
    text = f"dtype: expected NumPy's float32 or float64, got {half}"
    check_refused(partial(cbn.BatchNorm1d, C, dtype=half), TypeError, text)


# ------------------------------------------------------------------------------- other libraries


def test_cbn_imports_no_other_library():
    code = (
        "import sys, numpy as np, cbn; cbn.BatchNorm1d(3)(np.ones((5, 3), np.float16)); "
        "print('ml_dtypes' in sys.modules)"
    )
    assert printed_by(code).strip() == "False"


def test_another_element_type_of_a_library_is_refused():
    other = np.dtype(ml_dtypes.float8_e5m2)
    for seen in ([], [np.ones((5, 3), BFLOAT16)]):  # before and after one is known
        for x in seen:
            functional.batch_norm(x, None, None, training=True)
        text = (
            f"x: expected float32, float64, float16 or bfloat16, got {other}; "
            "convert it first, for example with x.astype(numpy.float32)"
        )
        call = partial(functional.layer_norm, np.ones((5, 3), other), 3)
        check_refused(call, TypeError, text)


@HALF
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d", "GroupNorm", "LayerNorm"])
def test_pytorch(name, training, half, torch, rng, assert_close):
    """PyTorch's layers of float32 compute on the same values; its own rounding is left out."""
    norm = NORMS[name]
    layer = norm.layer(6, 2, (40,)).train(training)
    torch_layer = norm.torch_layer(torch, 6, 2, (40,)).train(training)
    x, grad_output = drawn(rng, (20, 6, 40), half)
    torch_x = torch.tensor(x.astype(np.float32), requires_grad=True)
    torch_y = torch_layer(torch_x)
    torch_y.backward(torch.tensor(grad_output.astype(np.float32)))
    assert_close("y", layer(x), torch_y.detach().numpy(), half)
    assert_close("grad_input", layer.backward(grad_output), torch_x.grad.numpy(), half)


def test_pytorch_in_bfloat16(torch, rng):
    """It rounds its coefficients too: so it is compared at its own tolerance for bfloat16."""
    x = drawn(rng, (20, 6, 40), BFLOAT16)[0]
    torch_x = torch.tensor(x.astype(np.float32)).bfloat16()
    expected = torch.nn.functional.layer_norm(torch_x, (40,)).float().numpy()
    y = functional.layer_norm(x, 40).astype(np.float32)
    np.testing.assert_allclose(y, expected, **CLOSE["bfloat16"])
