"""The two that need nothing but NumPy: cbn itself, and the formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from peers_base import Call, Peer, as_given, broadcasting, gradients, layer_of
from shapes import DTYPES, EPS, MOMENTUM, STEPS, Array, Case, Data

import cbn
from cbn import functional


class Cbn(Peer):
    """The library of this project."""

    name = "cbn"
    packages = ("cbn",)
    dtypes = tuple(DTYPES)
    steps = STEPS

    def set_num_threads(self, threads: int) -> bool:  # noqa: D102
        cbn.set_num_threads(threads)
        return True

    def call_of_batch_norm(self, case: Case, data: Data) -> Call:  # noqa: D102
        axis = case.channel_axis
        out = np.empty_like(data.x) if case.reuses_out else None
        if case.steps != "none" and case.pass_ != "inference":
            return self.call_with_steps(case, data, out)
        if case.pass_ == "backward":
            mean, var, _ = functional.batch_norm_stats(data.x, channel_axis=axis)
            return Call(
                lambda: functional.batch_norm_backward(
                    data.grad_output,
                    data.x,
                    mean,
                    var,
                    data.weight,
                    eps=EPS,
                    channel_axis=axis,
                    out=out,
                ),
                gradients,
            )
        running_mean, running_var = data.running_mean.copy(), data.running_var.copy()
        training = case.pass_ == "training"
        return Call(
            lambda: functional.batch_norm(
                data.x,
                running_mean,
                running_var,
                data.weight,
                data.bias,
                training,
                MOMENTUM,
                EPS,
                channel_axis=axis,
                out=out,
                **steps_of(case, data),
            ),
            lambda y: {"y": y, "running_mean": running_mean, "running_var": running_var},
        )

    def call_with_steps(self, case: Case, data: Data, out: Array | None) -> Call:
        """A pass of training, which keeps what ReLU lets through, or the one back through it."""
        axis: dict[str, Any] = {"channel_axis": case.channel_axis}
        running_mean, running_var = data.running_mean.copy(), data.running_var.copy()
        batch_norm = partial(functional.batch_norm_forward, **axis, **steps_of(case, data))
        forward = (data.x, running_mean, running_var, data.weight, data.bias, True, MOMENTUM, EPS)
        if case.pass_ == "training":
            return Call(lambda: batch_norm(*forward, out=out), lambda found: {"y": found[0]})
        _, saved = batch_norm(*forward)
        return Call(
            lambda: functional.norm_backward(data.grad_output, saved, data.weight, out=out),
            gradients,
        )

    def call_of_layer(self, case: Case, data: Data) -> Call:  # noqa: D102
        layout = {"channel_axis": -1} if case.layout == "NHWC" else {}
        layer = layer_of(case, cbn, **layout)
        names = list(layer.state_dict())  # weight and bias, or weight alone
        for name in names:
            getattr(layer, name)[...] = getattr(data, name)
        if case.pass_ == "forward":
            return Call(lambda: layer(data.x), lambda y: {"y": y})
        layer(data.x)
        return Call(
            lambda: layer.backward(data.grad_output),
            lambda grad: gradients((grad, *(getattr(layer, f"{name}_grad") for name in names))),
        )


def steps_of(case: Case, data: Data) -> dict[str, Any]:
    """What goes along, as cbn's functions take it."""
    return {
        "activation": None if case.steps == "none" else "relu",
        "residual": data.residual if case.has_residual else None,
    }


class NumPy(Peer):
    """The formulas in float32, with as few temporaries as they can do with. Always one thread."""

    name = "NumPy"
    packages = ("numpy",)

    def call_of_batch_norm(self, case: Case, data: Data) -> Call:  # noqa: D102
        shape, column, axes, _ = broadcasting(case)
        x, grad_output = data.x.reshape(shape), data.grad_output.reshape(shape)
        weight, bias, running_mean, running_var = (
            array.reshape(column).copy() for array in data.of_channels
        )
        count = case.values // case.channels
        out = np.empty_like(x) if case.reuses_out else None

        def inference() -> Array:
            y = np.subtract(x, running_mean, out=out)
            y *= weight / np.sqrt(running_var + np.float32(EPS))
            y += bias
            return y

        def training() -> Array:
            mean = x.mean(axis=axes, keepdims=True)
            y = np.subtract(x, mean, out=out)
            var = np.square(y).mean(axis=axes, keepdims=True)
            y *= weight / np.sqrt(var + np.float32(EPS))
            y += bias
            for running, batch in (
                (running_mean, mean),
                (running_var, var * (count / (count - 1))),
            ):
                running *= 1 - MOMENTUM
                running += MOMENTUM * batch
            return y

        mean = x.mean(axis=axes, keepdims=True)
        inv_std = 1 / np.sqrt(x.var(axis=axes, keepdims=True) + np.float32(EPS))

        def backward() -> tuple[Array, Array, Array]:
            x_hat = x - mean
            x_hat *= inv_std
            grad_bias = grad_output.sum(axis=axes, keepdims=True)
            grad_weight = (grad_output * x_hat).sum(axis=axes, keepdims=True)
            x_hat *= grad_weight / count
            grad_input = np.subtract(grad_output, grad_bias / count, out=out)
            grad_input -= x_hat
            grad_input *= weight * inv_std
            return grad_input, grad_weight, grad_bias

        if case.pass_ == "backward":
            return Call(backward, partial(as_given, case))
        forward = inference if case.pass_ == "inference" else training
        return Call(forward, lambda y: {"y": y.reshape(case.shape)})

    def call_of_layer(self, case: Case, data: Data) -> Call:  # noqa: D102
        shape, column, own, shared = broadcasting(case)
        x, grad_output = data.x.reshape(shape), data.grad_output.reshape(shape)
        weight, bias = data.weight.reshape(column), data.bias.reshape(column)
        centred = case.norm != "rms"

        def mean_of(x: Array) -> Any:
            return x.mean(axis=own, keepdims=True) if centred else np.float32(0)

        def scale_of(y: Array) -> Any:
            return 1 / np.sqrt(np.square(y).mean(axis=own, keepdims=True) + np.float32(EPS))

        def forward() -> Array:
            y: Array = x - mean_of(x)
            y *= scale_of(y)
            y *= weight
            if centred:
                y += bias
            return y

        mean = mean_of(x)
        scale = scale_of(x - mean)

        def backward() -> tuple[Array, ...]:
            x_hat = x - mean
            x_hat *= scale
            products = grad_output * x_hat
            parameters = [products.sum(axis=shared)]
            if centred:
                parameters.append(grad_output.sum(axis=shared))
            products *= weight
            x_hat *= products.mean(axis=own, keepdims=True)
            grad_input = grad_output * weight
            grad_input -= mean_of(grad_input)
            grad_input -= x_hat
            grad_input *= scale
            return grad_input, *parameters

        if case.pass_ == "backward":
            return Call(backward, partial(as_given, case))
        return Call(forward, lambda y: {"y": y.reshape(case.shape)})
