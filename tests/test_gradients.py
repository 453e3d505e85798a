"""Gradients of layers and functions against finite differences of their forward pass."""

import numpy as np
import pytest
from differences import central_differences
from norm_kinds import kinds

from cbn import functional, reference

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@TRAINING
@pytest.mark.parametrize(
    "kind",
    kinds(  # by row, by row with tails, by plane, by plane with a tail
        batches=[(7, 3), (2, 3, 5), (2, 2, 8, 16), (2, 3, 4, 2), (1, 2, 3, 5, 9), (2, 3, 2, 2, 2)],
        unbatched=[(2, 5, 6)],
        rows=[(3, 7), (2, 3, 5)],
        groups=[((2, 6, 3), 2), ((3, 4), 2)],
        instances=[(2, 3, 5)],
    ),
    ids=str,
)
def test_layer(rng, assert_close, kind, training):
    layer = kind.layer(eps=0.1, dtype="float64", **{kind.norm.affine: True}).train(training)
    if kind.norm.function == "batch_norm":
        layer.running_mean[...] = rng.uniform(-1, 1, kind.C)
        layer.running_var[...] = rng.uniform(0.5, 2, kind.C)
        layer.track_running_stats = False  # the loss is evaluated many times: it must not change
    arrays = {name: getattr(layer, name) for name in kind.norm.parameters}
    for array in arrays.values():
        array[...] = rng.uniform(-2, 2, kind.parameter_shape)
    x, grad_output = rng.normal(1, 2, kind.shape), rng.standard_normal(kind.shape)

    def loss():
        return (grad_output * layer(x)).sum()

    loss()
    grad_input = layer.backward(grad_output)
    gradients = {name: getattr(layer, f"{name}_grad") for name in arrays}
    assert_close("grad_input", grad_input, central_differences(loss, x), np.float64)
    for name, array in arrays.items():
        assert_close(name, gradients[name], central_differences(loss, array), np.float64)


@TRAINING
@pytest.mark.parametrize("kind", kinds([(5, 3, 4), (1, 2, 131)]), ids=str)
def test_batch_norm_backward(rng, assert_close, kind, training):
    x, grad_output = rng.normal(1, 2, kind.shape), rng.standard_normal(kind.shape)
    mean, var, weight, bias = rng.uniform(0.5, 2, (4, kind.C))
    options = {"training": training, "eps": 0.1, **kind.options}

    def loss():
        running = (None, None) if training else (mean, var)
        return (grad_output * functional.batch_norm(x, *running, weight, bias, **options)).sum()

    statistics = functional.batch_norm_stats(x, **kind.options)[:2] if training else (mean, var)
    gradients = functional.batch_norm_backward(grad_output, x, *statistics, weight, **options)
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, gradient, array in zip(names, gradients, (x, weight, bias), strict=True):
        assert_close(name, gradient, central_differences(loss, array), np.float64)


# More channels than a kernel has room for at once: of one sample, and of few that share parameters.
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((28, 579), 193), ((3000, 16), 8), ((40, 900), 300)], ids=str
)
def test_many_small_groups(rng, assert_close, shape, num_groups):
    x, grad_output = rng.standard_normal((2, *shape))
    weight = rng.uniform(0.5, 2, shape[1])
    arguments = grad_output, x, num_groups, weight
    gradients = functional.group_norm_backward(*arguments)
    expected = reference.group_norm_backward(*arguments)
    for name, gradient, exact in zip(
        ("grad_input", "grad_weight", "grad_bias"), gradients, expected, strict=True
    ):
        assert_close(name, gradient, exact, np.float64)


# What lies beyond the weights may be anything, and must not reach a gradient.
@pytest.mark.parametrize("shape", [(37, 4), (35, 5), (40, 11), (9, 30), (20, 67)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_beyond_the_weights_matters(rng, shape, dtype):
    x, grad_output = rng.standard_normal((2, *shape)).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[1:]).astype(dtype)
    for _ in range(20):
        # Memory that is free again, and that the next call may get.
        freed = [np.full(n, np.nan) for n in (10, 20, 50, 100, 200, 500, 1000) for _ in range(6)]
        del freed
        for gradient in functional.layer_norm_backward(grad_output, x, shape[1], weight):
            assert np.isfinite(gradient).all()
