"""Passes that are given no statistics keep none, and give the same bits, forward and backward."""

import numpy as np
import pytest

from cbn import _core

VIEWS = {
    "layer": (1, 1, 70, 48, 48, 1, True, (48,)),
    "layer, rows of 2": (1, 1, 1001, 2, 2, 1, True, (2,)),
    "layer, rows in rows of 64": (1, 1, 21, 1500, 1500, 1, True, (1500,)),
    "layer, rows of two pieces": (1, 1, 9, 6300, 6300, 1, True, (6300,)),
    "group of (N, C)": (1, 1, 40 * 6, 8, 8, 6, True, (48,)),
    "group, channels last": (3, 5, 4, 600, 600, 4, True, (2400,)),
    "group, channels first": (1, 1, 12, 75, 3, 4, True, (12,)),
    "batch": (1, 9, 7, 30, 1, 7, False, (7,)),
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", VIEWS)
def test_no_bit_depends_on_whether_statistics_are_kept(rng, name, dtype, centred):
    view = _core.View(*VIEWS[name])
    shape, eps = VIEWS[name][:4], 1e-5
    x, grad_output = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(view.parameter_shape).astype(dtype) for _ in range(2))
    statistics = np.empty((3, view.B * view.C))
    results = []
    for kept in (statistics, None):
        y, grad_input = np.empty_like(x), np.empty_like(x)
        grad_weight, grad_bias = np.empty_like(weight), np.empty_like(bias)
        _core.normalise(x, view, weight, bias, eps, centred, kept, y, None)
        saved = _core.new_saved(x, x.dtype, view, kept, eps, centred, False, None)
        _core.gradients(grad_output, saved, weight, grad_input, grad_weight, grad_bias, None)
        results.append((y, grad_input, grad_weight, grad_bias))
    found = np.empty_like(statistics)
    _core.statistics_of(x, view, eps, centred, found)
    np.testing.assert_array_equal(found, statistics)
    for with_them, without in zip(*results, strict=True):
        assert with_them.tobytes() == without.tobytes()
