"""Two that compile a graph first: ONNX Runtime and JAX."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np
from peer import Call, Peer, gradients
from shapes import EPS, MOMENTUM, Case, Data


class OnnxRuntime(Peer):
    """The BatchNormalization operator: inference and training, channels first."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    def __init__(self) -> None:
        self.runtime = import_module("onnxruntime")
        self.helper = import_module("onnx.helper")

    def call_of_batch_norm(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.layout == "NHWC" or case.pass_ == "backward":
            return None
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        if os.environ.get("OMP_WAIT_POLICY") == "passive":  # then nobody spins
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.runtime.InferenceSession(
            self.model(case), options, providers=["CPUExecutionProvider"]
        )
        names = ("x", "weight", "bias", "mean", "var")
        inputs = dict(zip(names, (data.x, *data[2:]), strict=True))
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

    def model(self, case: Case) -> bytes:
        """A model of one operator."""
        helper, training = self.helper, case.pass_ == "training"
        names = ["x", "weight", "bias", "mean", "var"]
        outputs = ["y", "running_mean", "running_var"] if training else ["y"]

        def value(name: str) -> Any:
            shape = case.shape if name in ("x", "y") else (case.channels,)
            return helper.make_tensor_value_info(name, 1, shape)  # 1: float32

        node = helper.make_node(
            "BatchNormalization",
            names,
            outputs,
            epsilon=EPS,
            momentum=1 - MOMENTUM,
            training_mode=int(training),
        )
        graph = helper.make_graph([node], "g", [*map(value, names)], [*map(value, outputs)])
        opsets = [helper.make_opsetid("", 15)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return bytes(model.SerializeToString())


class Jax(Peer):
    """The formulas, compiled by XLA. Its thread pool is as large as NPROC says when it starts."""

    name = "JAX"
    packages = ("jax",)

    def __init__(self) -> None:
        self.jax = import_module("jax")
        self.jax.config.update("jax_platforms", "cpu")

    def set_num_threads(self, threads: int) -> bool:  # noqa: D102
        return threads == int(os.environ.get("NPROC", os.cpu_count() or 1))

    def call_of_batch_norm(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.reuses_out:
            return None
        jax, jnp = self.jax, self.jax.numpy
        axes = tuple(
            axis for axis in range(len(case.shape)) if axis != case.channel_axis % len(case.shape)
        )
        column = [1] * len(case.shape)
        column[case.channel_axis] = -1
        x, grad_output = jnp.asarray(data.x), jnp.asarray(data.grad_output)
        weight, bias, running_mean, running_var = (
            jnp.asarray(array.reshape(column)) for array in data[2:]
        )
        count = case.values // case.channels

        def normalise(x: Any, mean: Any, var: Any) -> Any:
            return (x - mean) * (weight * jax.lax.rsqrt(var + EPS)) + bias

        def inference(x: Any) -> Any:
            return normalise(x, running_mean, running_var)

        def training(x: Any) -> Any:
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            new_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
            new_var = (1 - MOMENTUM) * running_var + MOMENTUM * var * (count / (count - 1))
            return normalise(x, mean, var), new_mean, new_var

        def backward(grad_output: Any, x: Any, mean: Any, inv_std: Any) -> Any:
            x_hat = (x - mean) * inv_std
            grad_bias = grad_output.sum(axes, keepdims=True)
            grad_weight = (grad_output * x_hat).sum(axes, keepdims=True)
            centred = grad_output - grad_bias / count - x_hat * (grad_weight / count)
            return weight * inv_std * centred, grad_weight.ravel(), grad_bias.ravel()

        wait = jax.block_until_ready
        if case.pass_ == "inference":
            infer = jax.jit(inference)
            return Call(lambda: wait(infer(x)), lambda y: {"y": np.asarray(y)})
        if case.pass_ == "training":
            train = jax.jit(training)
            return Call(lambda: wait(train(x)), lambda y: {"y": np.asarray(y[0])})
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        inv_std, back = jax.lax.rsqrt(var + EPS), jax.jit(backward)
        return Call(
            lambda: wait(back(grad_output, x, mean, inv_std)),
            lambda grads: gradients(tuple(map(np.asarray, grads))),
        )
