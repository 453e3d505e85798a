"""Results against the float64 formulas of cbn.reference, before anything is timed."""

from __future__ import annotations

import numpy as np
from peers_base import Results, gradients
from shapes import EPS, MOMENTUM, Array, Case, Data

from cbn import reference

# cbn is held to the tolerances of its tests, the others to what tells one formula from another.
CBN_RTOL = {"float32": 1.3e-6, "float16": 1e-3, "bfloat16": 1.6e-2}
CBN_ATOL = 1e-5
# What is left of a sum with a residual has the error of the norm, which was rounded before.
CBN_ATOL_OF_SUMS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
OTHERS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 0.1}  # of the largest value

# The reference is slow and needs float64 temporaries: of a large array for batch norm a few
# channels are checked, among them the first and the last. The others are normalised by the same
# code.
CHECKED_VALUES = 1 << 20


def expected(case: Case, data: Data) -> tuple[Array, Results]:
    """Return the channels to check and, for these, all that a pass may give."""
    if case.norm != "batch":
        return np.arange(case.channels), by_formulas(case, data)
    per_channel = case.values // case.channels
    number = min(case.channels, max(2, CHECKED_VALUES // per_channel))
    channels = np.unique(np.linspace(0, case.channels - 1, number).astype(int))
    axis = case.channel_axis
    x = data.x.take(channels, axis)
    weight, bias, running_mean, running_var = (array[channels] for array in data.of_channels)
    y, *running = reference.batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        case.pass_ != "inference",
        MOMENTUM,
        EPS,
        channel_axis=axis,
    )
    if case.has_residual:
        y = y + data.residual.take(channels, axis)
    if case.pass_ != "backward":
        results = (y if case.steps == "none" else np.maximum(y, 0), *running)
        return channels, dict(zip(("y", "running_mean", "running_var"), results, strict=True))
    mean, var, _ = reference.batch_norm_stats(x, channel_axis=axis)
    grad_output = data.grad_output.take(channels, axis)
    if case.steps != "none":
        grad_output = np.where(y > 0, grad_output, 0)
    grads = reference.batch_norm_backward(
        grad_output, x, mean, var, weight, eps=EPS, channel_axis=axis
    )
    return channels, gradients((*grads, grad_output))


def by_formulas(case: Case, data: Data) -> Results:
    """Return the output and the gradients of a norm that is not batch norm."""
    options = {
        "group": {"num_groups": case.groups, "channel_axis": case.channel_axis},
        "instance": {"channel_axis": case.channel_axis},
    }.get(case.norm, {"normalized_shape": case.channels})
    forward = getattr(reference, f"{case.norm}_norm")
    backward = getattr(reference, f"{case.norm}_norm_backward")
    bias = {} if case.norm == "rms" else {"bias": data.bias}
    y = forward(data.x, weight=data.weight, eps=EPS, **bias, **options)
    grads = backward(data.grad_output, data.x, weight=data.weight, eps=EPS, **options)
    return {"y": y[0] if case.norm == "instance" else y, **gradients(grads)}


def check(name: str, case: Case, results: Results, channels: Array, expected: Results) -> None:
    """Raise an AssertionError that names the library and the case if a result is wrong.

    Parameters
    ----------
    name : str
        The library.
    case : Case
        What it computed.
    results : dict of str to ndarray
        What it gave after its first call: all channels.
    channels : ndarray of int
        Those to look at.
    expected : dict of str to ndarray
        Values of these channels.
    """
    for quantity, result in results.items():
        if name != "cbn" and case.dtype == "bfloat16" and quantity in ("grad_weight", "grad_bias"):
            continue  # PyTorch adds up 16,384 rows in bfloat16: its sums are off by two thirds
        dtype = "float32" if result.ndim == 1 else case.dtype
        assert result.dtype.name == dtype, f"{name}, {case}, {quantity}: {result.dtype}"
        axis = case.channel_axis if result.ndim > 1 else 0
        right = expected[quantity].astype(np.float64)
        rtol, atol = CBN_RTOL[dtype], CBN_ATOL_OF_SUMS[dtype] if case.has_residual else CBN_ATOL
        if name != "cbn":
            rtol, atol = 0, OTHERS[case.dtype] * np.abs(right).max()
        np.testing.assert_allclose(
            result.take(channels, axis).astype(np.float64),
            right,
            err_msg=f"{name}, {case}, {quantity}",
            rtol=rtol,
            atol=atol,
        )
