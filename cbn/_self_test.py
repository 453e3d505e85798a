"""Every way that the kernels of this installation can go, against :mod:`cbn.reference`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np

from cbn import _dispatch, _threads, functional, reference
from cbn._types import Array, Shape

# (N, C, S): by row and by plane, of few values and many, in one piece and in several.
SHAPES = [(9, 5, 1), (3000, 33, 1), (40, 70, 49), (1, 64, 49), (3, 5, 600), (2, 3, 40_000)]
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
# The other norms, each with the shape of its weight: parameters of values, of parts of a group and
# of a channel, all of them by row and by plane.
OTHERS: list[tuple[str, dict[str, Any], Shape, Shape]] = [
    ("layer_norm", {"normalized_shape": 768}, (40, 768), (768,)),
    ("layer_norm", {"normalized_shape": (3, 2)}, (300, 3, 2), (3, 2)),
    ("rms_norm", {"normalized_shape": 40_000}, (5, 40_000), (40_000,)),
    ("group_norm", {"num_groups": 32}, (2, 64, 49), (64,)),
    ("group_norm", {"num_groups": 2}, (3, 6, 3000), (6,)),
    ("group_norm", {"num_groups": 8, "channel_axis": -1}, (3, 90, 24), (24,)),
    ("instance_norm", {}, (4, 20, 49), (20,)),
    ("instance_norm", {"channel_axis": -1}, (2, 900, 24), (24,)),
]
# Those of torch.testing.assert_close.
TOLERANCE = {
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-7, 1e-7),
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
}


def self_test() -> Iterator[tuple[str, list[str]]]:
    """Yield each instruction set that runs here, with what is wrong with it."""
    try:
        for isa in _dispatch.supported():
            _dispatch.use(isa)
            yield isa, [*_faults_of_batch_norm(), *_faults_of_others(), *_faults_of_steps()]
    finally:
        _dispatch.use(_dispatch.active)


def _types_of_data() -> list[np.dtype[Any]]:
    """Those that data can be of here: bfloat16 is another library's."""
    types = [np.dtype(name) for name in TOLERANCE if name != "bfloat16"]
    if find_spec("ml_dtypes"):
        types.append(np.dtype(import_module("ml_dtypes").bfloat16))
    return types


def _faults_of_batch_norm() -> Iterator[str]:
    kinds = product(SHAPES, (1, -1), _types_of_data(), (1, 3), (True, False))
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
        for name in _wrong(
            ("y", "running_mean", "running_var", *GRADIENTS),
            (y, running_mean, running_var, *gradients),
            (*right, *right_gradients),
            dtype,
        ):
            yield f"{name} of {shape}, {axis=}, {dtype}, {threads=}, {training=}"


def _faults_of_steps() -> Iterator[str]:
    """A ReLU and a residual in the pass, against the steps one by one."""
    for shape, axis, dtype, threads in product(SHAPES, (1, -1), _types_of_data(), (1, 3)):
        rng = np.random.default_rng(0)
        x, residual, grad_output = (
            _arranged(rng.standard_normal(shape), axis).astype(dtype) for _ in range(3)
        )
        given: Any = {"running_mean": None, "running_var": None, "training": True}
        given["channel_axis"] = axis
        with _threads.num_threads(threads):
            y, saved = functional.batch_norm_forward(x, **given)
            found, with_steps = functional.batch_norm_forward(
                x, **given, activation="relu", residual=residual
            )
            y = y + residual
            let_through = np.where(y <= 0, 0, grad_output).astype(dtype)
            right = (np.maximum(y, 0), *functional.norm_backward(let_through, saved), let_through)
            results = (found, *functional.norm_backward(grad_output, with_steps))
        names = "y", *GRADIENTS, "grad_residual"
        for name, one, other in zip(names, results, right, strict=True):
            if one.tobytes() != other.tobytes():
                yield f"{name} of steps of {shape}, {axis=}, {dtype}, {threads=}"


def _faults_of_others() -> Iterator[str]:
    for (norm, options, shape, parameter_shape), dtype in product(OTHERS, _types_of_data()):
        rng = np.random.default_rng(0)
        x = rng.normal(1, 2, shape).astype(dtype)
        grad_output = rng.standard_normal(shape).astype(dtype)
        parameters = dict(zip(("weight", "bias"), rng.random((2, *parameter_shape)), strict=True))
        if norm == "rms_norm":
            del parameters["bias"]
        backward_options = {**options, "weight": parameters["weight"]}
        right = getattr(reference, norm)(x, **options, **parameters)
        right = right[0] if norm == "instance_norm" else right  # with its running statistics
        right_gradients = getattr(reference, f"{norm}_backward")(grad_output, x, **backward_options)
        for threads in (1, 3):
            with _threads.num_threads(threads):
                y = getattr(functional, norm)(x, **options, **parameters)
                gradients = getattr(functional, f"{norm}_backward")(
                    grad_output, x, **backward_options
                )
            names = ("y", *GRADIENTS)[: 1 + len(gradients)]
            for name in _wrong(names, (y, *gradients), (right, *right_gradients), dtype):
                yield f"{name} of {norm}, {shape}, {options}, {dtype}, {threads=}"


def _wrong(
    names: Iterable[str],
    actual: Iterable[Array],
    right: Iterable[Array | None],
    dtype: np.dtype[Any],
) -> Iterator[str]:
    computed_in = "float64" if dtype == np.float64 else "float32"
    for name, one, other in zip(names, actual, right, strict=True):
        rtol, atol = TOLERANCE[dtype.name if one.dtype == dtype else computed_in]
        if name in GRADIENTS[1:]:
            atol *= 10  # sums whose terms may cancel
        if other is None:
            continue
        if not np.allclose(one.astype(np.float64), other.astype(np.float64), rtol, atol):
            yield name


def _arranged(array: Array, axis: int) -> Array:
    return np.ascontiguousarray(np.moveaxis(array, 1, axis))
