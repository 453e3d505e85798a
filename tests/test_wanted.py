"""Gradients on request: what is wanted has the bits that it has among all, the rest is not made."""

import numpy as np
import pytest
from norm_kinds import kinds
from refusals import refused

import cbn
from cbn import functional

KINDS = pytest.mark.parametrize(
    "kind",
    kinds(  # by row, by plane, short planes; rows in spans and in pieces
        batches=[(30, 64), (4, 6, 5, 5), (2, 3, 40, 40)],
        rows=[(37, 5), (2, 3, 700), (2, 70000)],
        groups=[((3, 16, 7, 7), 4)],
        instances=[(2, 3, 50)],
    ),
    ids=str,
)
THREADS = pytest.mark.parametrize("threads", [1, 2])


@KINDS
@THREADS
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer(rng, kind, threads, training, dtype):
    layer = kind.layer(dtype=dtype, **{kind.norm.affine: True}).train(training)
    layer.weight[...] = rng.uniform(0.5, 2, layer.weight.shape)
    x, grad_output = rng.normal(1, 2, (2, *kind.shape)).astype(dtype)
    with cbn.num_threads(threads):
        layer(x)
        whole = layer.backward(grad_output)
        parameters = layer.weight_grad, layer.bias_grad
        assert layer.backward(grad_output, wanted="input").tobytes() == whole.tobytes()
        assert layer.weight_grad is None
        assert layer.bias_grad is None
        assert layer.backward(grad_output, wanted="parameters") is None
    for name, before in zip(("weight_grad", "bias_grad"), parameters, strict=True):
        after = getattr(layer, name)
        assert (after is None) == (before is None)
        assert after is None or after.tobytes() == before.tobytes()


@KINDS
def test_function(rng, kind):
    x, grad_output = rng.normal(1, 2, (2, *kind.shape)).astype(np.float32)
    _, backward = kind.functions()
    everything = backward(grad_output, x)
    of_input, *of_parameters = backward(grad_output, x, wanted="input")
    assert of_input.tobytes() == everything[0].tobytes()
    assert set(of_parameters) == {None}
    of_input, *of_parameters = backward(grad_output, x, wanted="parameters")
    assert of_input is None
    for one, other in zip(of_parameters, everything[1:], strict=True):
        assert one.tobytes() == other.tobytes()


def test_layer_without_parameters_makes_no_gradients_of_them(rng):
    layer = cbn.BatchNorm2d(3, affine=False)
    x = rng.standard_normal((2, 3, 4, 4), np.float32)
    layer(x)
    with_them = cbn.BatchNorm2d(3)
    with_them(x)
    assert layer.backward(x).tobytes() == with_them.backward(x).tobytes()
    assert layer.weight_grad is layer.bias_grad is None


def test_frozen_statistics_need_no_input(rng):
    """An output that wrote over the input spoils the gradients of parameters alone."""
    x = rng.standard_normal((5, 3), np.float32)
    grad_output = rng.standard_normal((5, 3), np.float32)
    layer = cbn.BatchNorm1d(3).eval()
    layer(x.copy())
    right = layer.backward(grad_output)
    layer(x, out=x)
    assert layer.backward(grad_output, wanted="input").tobytes() == right.tobytes()
    with pytest.raises(RuntimeError, match="an out= wrote over"):
        layer.backward(grad_output)


@pytest.mark.parametrize("value", ["weight", None, True])
def test_unknown(value):
    text = f"wanted: expected one of ('all', 'input', 'parameters'), got {value!r}"
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    layer = cbn.BatchNorm1d(2)
    layer(x)
    with refused(text):
        layer.backward(x, wanted=value)
    with refused(text):
        functional.layer_norm_backward(x, x, 2, wanted=value)


def test_output_for_nothing():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    out = np.full_like(x, 7)
    with refused(
        "out: expected None with wanted='parameters', which writes no gradient of the input, "
        "got an array"
    ):
        functional.layer_norm_backward(x, x, 2, out=out, wanted="parameters")
    assert (out == 7).all()


def test_gradients_of_parameters_that_the_forward_call_had_not(rng):
    """By given statistics they are those that the function of gradients finds."""
    x, grad_output = rng.standard_normal((2, 5, 3), np.float32)
    mean, var = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    _, saved = functional.batch_norm_forward(x, mean, var)
    found = functional.norm_backward(grad_output, saved)
    right = functional.batch_norm_backward(grad_output, x, mean, var, training=False)
    for one, other in zip(found, right, strict=True):
        assert one.tobytes() == other.tobytes()
    np.testing.assert_allclose(found[2], grad_output.sum(0), rtol=1e-5)
