"""Forward functions that return what norm_backward needs: the bits of a layer's two passes."""

from functools import partial

import numpy as np
import pytest
from norm_kinds import kinds
from norms_table import GROUP, ROWS
from refusals import refused

from cbn import functional

KINDS = pytest.mark.parametrize(
    "kind",
    kinds(  # rows of fewer values keep no statistics
        batches=[(30, 64), (4, 6, 5, 5)],
        rows=[(37, 5), (2, 3, 700)],
        groups=[((3, 16, 7, 7), 4)],
        instances=[(2, 3, 50)],
    ),
    ids=str,
)


def forward_of(kind):
    options = dict(kind.options)
    if kind.norm.function == "batch_norm":
        options |= {"running_mean": None, "running_var": None, "training": True}
    if kind.norm is GROUP:
        options["num_groups"] = kind.groups
    if kind.norm in ROWS:
        options["normalized_shape"] = kind.row
    return partial(getattr(functional, f"{kind.norm.function}_forward"), **options)


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_passes_of_a_layer(rng, kind, dtype):
    layer = kind.layer(dtype=dtype, **{kind.norm.affine: True})
    layer.weight[...] = rng.uniform(0.5, 2, layer.weight.shape)
    x, grad_output = rng.normal(1, 2, (2, *kind.shape)).astype(dtype)
    y, saved = forward_of(kind)(x, weight=layer.weight, eps=layer.eps)
    assert y.tobytes() == layer(x).tobytes()
    grad_input, grad_weight, _ = functional.norm_backward(grad_output, saved, layer.weight)
    assert grad_input.tobytes() == layer.backward(grad_output).tobytes()
    assert grad_weight.tobytes() == layer.weight_grad.tobytes()


def test_given_statistics(rng):
    x, grad_output = rng.standard_normal((2, 5, 3), np.float32)
    mean, var, weight = rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    y, saved = functional.batch_norm_forward(x, mean, var, weight)
    assert y.tobytes() == functional.batch_norm(x, mean, var, weight).tobytes()
    var[...] = 7  # the caller's own, of which a copy was kept
    right = functional.batch_norm_backward(grad_output, x, mean, saved.statistics[2], weight, False)
    for one, other in zip(functional.norm_backward(grad_output, saved, weight), right, strict=True):
        assert one.tobytes() == other.tobytes()


def test_input_that_was_written_over(rng):
    x = rng.standard_normal((5, 8), np.float32)
    _, saved = functional.layer_norm_forward(x, 8, out=x)
    with refused(
        "backward: expected the input of the last forward call to be intact, "
        "got one that an out= wrote over; give that call another out",
        RuntimeError,
    ):
        functional.norm_backward(x, saved)


def test_short_rows_keep_no_statistics(rng):
    """Which would be more than a tenth of them, and are found again with the same bits."""
    for length, kept in ((59, False), (60, True)):
        x = rng.standard_normal((100, length), np.float32)
        _, saved = functional.layer_norm_forward(x, length)
        assert (saved.statistics is not None) == kept
