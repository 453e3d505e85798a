"""Three that compile a graph first: ONNX Runtime, OpenVINO and JAX."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from peers_base import Call, Peer, as_given, broadcasting
from shapes import EPS, MOMENTUM, Case, Data

INPUTS = ("x", "weight", "bias", "mean", "var")  # of the operator of batch norm


class OnnxRuntime(Peer):
    """The operator of a norm, batch norm also in training; channels first, no gradients."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    def __init__(self) -> None:
        self.runtime = import_module("onnxruntime")
        self.helper = import_module("onnx.helper")

    def call(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.layout == "NHWC" or case.pass_ == "backward":
            return None
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        if os.environ.get("OMP_WAIT_POLICY") == "passive":  # then nobody spins
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names = INPUTS[: {"batch": 5, "rms": 2}.get(case.norm, 3)]
        session = self.runtime.InferenceSession(
            self.model(case, names), options, providers=["CPUExecutionProvider"]
        )
        inputs = dict(zip(names, (data.x, *data.of_channels), strict=False))
        if not case.reuses_out:
            return Call(lambda: session.run(["y"], inputs), lambda outputs: {"y": outputs[0]})
        value = self.runtime.OrtValue.ortvalue_from_numpy
        bound = {name: value(array) for name, array in inputs.items()}
        y = value(np.empty_like(data.x))
        binding = session.io_binding()
        for name, array in bound.items():
            binding.bind_ortvalue_input(name, array)
        binding.bind_ortvalue_output("y", y)

        def run() -> None:
            _ = bound  # which the binding only borrows
            session.run_with_iobinding(binding)

        return Call(run, lambda _: {"y": y.numpy()})

    def model(self, case: Case, names: tuple[str, ...]) -> bytes:
        """A model of one operator with these inputs."""
        helper, training = self.helper, case.pass_ == "training"
        outputs = ["y", "running_mean", "running_var"] if training else ["y"]
        operators: dict[str, tuple[str, dict[str, Any]]] = {
            "batch": (
                "BatchNormalization",
                {"momentum": 1 - MOMENTUM, "training_mode": int(training)},
            ),
            "layer": ("LayerNormalization", {"axis": -1}),
            "rms": ("RMSNormalization", {"axis": -1}),
            "group": ("GroupNormalization", {"num_groups": case.groups}),
            "instance": ("InstanceNormalization", {}),
        }
        operator, attributes = operators[case.norm]

        def value(name: str) -> Any:
            shape = case.shape if name in ("x", "y") else (case.channels,)
            return helper.make_tensor_value_info(name, 1, shape)  # 1: float32

        node = helper.make_node(operator, names, outputs, epsilon=EPS, **attributes)
        graph = helper.make_graph([node], "g", [*map(value, names)], [*map(value, outputs)])
        opsets = [helper.make_opsetid("", 23)]  # the first with RMS norm
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        return bytes(model.SerializeToString())


class OpenVino(Peer):
    """A norm with given parameters in float32; channels first, no training, no gradients.

    Input and output are shared with NumPy, and the output is the same memory at every call.
    """

    name = "OpenVINO"
    packages = ("openvino",)

    def __init__(self) -> None:
        self.openvino = import_module("openvino")
        self.ops = import_module("openvino.opset13")

    def call(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.layout == "NHWC" or case.pass_ not in ("inference", "forward"):
            return None
        x = self.ops.parameter(case.shape, np.float32)
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",  # or it computes in bfloat16 where there is AMX
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = self.openvino.Model([self.norm(case, data, x)], [x])
        request = self.openvino.compile_model(model, "CPU", options).create_infer_request()
        inputs = {0: data.x}
        return Call(
            lambda: request.infer(inputs, share_inputs=True, share_outputs=True),
            lambda outputs: {"y": outputs[0]},
        )

    def norm(self, case: Case, data: Data, x: Any) -> Any:
        """The norm of x, an operator of its own where there is one."""
        ops = self.ops
        if case.norm == "batch":
            return ops.batch_norm_inference(x, *data.of_channels, EPS)
        if case.norm == "group":
            return ops.group_normalization(x, data.weight, data.bias, case.groups, EPS)
        if case.norm == "rms":
            mean_square = ops.reduce_mean(ops.multiply(x, x), [-1], keep_dims=True)
            root = ops.sqrt(ops.add(mean_square, np.float32(EPS)))
            return ops.multiply(ops.divide(x, root), data.weight)
        column = (-1, 1, 1) if case.norm == "instance" else (-1,)
        axes = range(2, len(case.shape)) if case.norm == "instance" else (1,)
        y = ops.mvn(x, list(axes), True, EPS, "inside_sqrt")
        return ops.add(ops.multiply(y, data.weight.reshape(column)), data.bias.reshape(column))


class Jax(Peer):
    """The formulas, compiled by XLA. Its thread pool is as large as NPROC says when it starts."""

    name = "JAX"
    packages = ("jax",)

    def __init__(self) -> None:
        self.jax = import_module("jax")
        self.jax.config.update("jax_platforms", "cpu")

    def set_num_threads(self, threads: int) -> bool:  # noqa: D102
        return threads == int(os.environ.get("NPROC", os.cpu_count() or 1))

    def call(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.reuses_out:
            return None
        jax, jnp = self.jax, self.jax.numpy
        shape, column, own, shared = broadcasting(case)
        x, grad_output = (jnp.asarray(array.reshape(shape)) for array in data[:2])
        weight, bias, running_mean, running_var = (
            jnp.asarray(array.reshape(column)) for array in data.of_channels
        )
        count = case.values // case.channels
        centred = case.norm != "rms"

        def mean_of(x: Any) -> Any:
            return x.mean(own, keepdims=True) if centred else 0.0

        def normalise(x: Any, mean: Any, var: Any) -> Any:
            y = (x - mean) * (weight * jax.lax.rsqrt(var + EPS))
            return y + bias if centred else y

        def statistics(x: Any) -> tuple[Any, Any]:
            mean = mean_of(x)
            return mean, jnp.square(x - mean).mean(own, keepdims=True)

        def inference(x: Any) -> Any:
            return (normalise(x, running_mean, running_var),)

        def training(x: Any) -> Any:
            mean, var = statistics(x)
            new_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
            new_var = (1 - MOMENTUM) * running_var + MOMENTUM * var * (count / (count - 1))
            return normalise(x, mean, var), new_mean, new_var

        def forward(x: Any) -> Any:
            return (normalise(x, *statistics(x)),)

        def backward(grad_output: Any, x: Any, mean: Any, inv_std: Any) -> Any:
            x_hat = (x - mean) * inv_std
            grad_weight = (grad_output * x_hat).sum(shared, keepdims=True)
            grad_bias = grad_output.sum(shared, keepdims=True)
            if case.norm == "batch":  # then the same sums serve the input
                centred_grad = grad_output - grad_bias / count - x_hat * (grad_weight / count)
                return weight * inv_std * centred_grad, grad_weight, grad_bias
            grad = grad_output * weight
            along_x = x_hat * (grad * x_hat).mean(own, keepdims=True)
            grad_input = inv_std * (grad - mean_of(grad) - along_x)
            return grad_input, grad_weight, *([grad_bias] if centred else [])

        wait = jax.block_until_ready
        if case.pass_ == "backward":
            mean, var = statistics(x)
            inv_std, back = jax.lax.rsqrt(var + EPS), jax.jit(backward)
            return Call(lambda: wait(back(grad_output, x, mean, inv_std)), partial(as_given, case))
        passes = {"inference": inference, "training": training, "forward": forward}
        compiled = jax.jit(passes[case.pass_])
        return Call(
            lambda: wait(compiled(x)), lambda y: {"y": np.asarray(y[0]).reshape(case.shape)}
        )
