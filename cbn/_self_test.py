"""Every way that the kernels of this installation can go, against :mod:`cbn.reference`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from cbn import _dispatch, _threads, functional, reference
from cbn._checks import Array

# (N, C, S): by row and by plane, of few values and many, in one piece and in several.
SHAPES = [(9, 5, 1), (3000, 33, 1), (40, 70, 49), (1, 64, 49), (3, 5, 600), (2, 3, 40_000)]
RESULTS = ("y", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
# Those of torch.testing.assert_close.
TOLERANCE = {"float32": (1.3e-6, 1e-5), "float64": (1e-7, 1e-7)}


def self_test() -> Iterator[tuple[str, list[str]]]:
    """Yield each instruction set that runs here, with what is wrong with it."""
    usual = _dispatch.kernels
    try:
        for isa in _dispatch.supported():
            _dispatch.kernels = _dispatch.load(isa)
            yield isa, list(_faults())
    finally:
        _dispatch.kernels = usual


def _faults() -> Iterator[str]:
    kinds = product(SHAPES, (1, -1), TOLERANCE, (1, 3), (True, False))
    for shape, axis, dtype, threads, training in kinds:
        rng = np.random.default_rng(0)
        x = _arranged(rng.normal(1, 2, shape), axis).astype(dtype)
        grad_output = _arranged(rng.standard_normal(shape), axis).astype(dtype)
        weight, bias, mean, var = rng.uniform(0.5, 2, (4, shape[1]))
        running_mean, running_var = mean.copy(), var.copy()
        right = reference.batch_norm(x, mean, var, weight, bias, training, channel_axis=axis)
        if training:
            mean, var, _ = reference.batch_norm_stats(x, channel_axis=axis)
        backward = (grad_output, x, mean, var, weight, training)
        right_gradients = reference.batch_norm_backward(*backward, channel_axis=axis)
        with _threads.num_threads(threads):
            y = functional.batch_norm(
                x, running_mean, running_var, weight, bias, training, channel_axis=axis
            )
            gradients = functional.batch_norm_backward(*backward, channel_axis=axis)
        pairs = zip(
            RESULTS,
            (y, running_mean, running_var, *gradients),
            (*right, *right_gradients),
            strict=True,
        )
        for name, actual, expected in pairs:
            if expected is not None and not np.allclose(actual, expected, *TOLERANCE[dtype]):
                yield f"{name} of {shape}, {axis=}, {dtype}, {threads=}, {training=}"


def _arranged(array: Array, axis: int) -> Array:
    return np.ascontiguousarray(np.moveaxis(array, 1, axis))
