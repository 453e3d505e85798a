"""PyTorch as it is, as its compiler makes it, and oneDNN, which is part of it."""

from __future__ import annotations

import shutil
from importlib import import_module
from typing import Any

import numpy as np
from peers_base import Call, Peer, gradients, layer_of
from shapes import DTYPES, EPS, MOMENTUM, STEPS, Array, Case, Data


class PyTorch(Peer):
    """PyTorch's own kernels. Channels last is its memory format of that name."""

    name = "PyTorch"
    packages = ("torch",)
    dtypes = tuple(DTYPES)
    steps = STEPS

    def __init__(self) -> None:
        self.torch = import_module("torch")
        self.torch.set_grad_enabled(False)

    def set_num_threads(self, threads: int) -> bool:  # noqa: D102
        self.torch.set_num_threads(threads)
        return True

    def compiled(self, function: Any) -> Any:
        """What is called in place of a function or a layer."""
        return function

    def tensor(self, array: Array, case: Case) -> Any:
        """An array as PyTorch sees it: channels first in shape, the same memory."""
        if case.dtype == "bfloat16":  # which has no tensor of an array
            tensor = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(array)
        return tensor.movedim(-1, 1) if case.layout == "NHWC" else tensor

    def array(self, tensor: Any, case: Case) -> Array:
        """The other way round."""
        tensor = tensor.movedim(1, -1) if case.layout == "NHWC" else tensor
        if case.dtype == "bfloat16":
            tensor = tensor.view(self.torch.int16)
        array: Array = tensor.numpy().view(DTYPES[case.dtype])
        return array

    def call_of_batch_norm(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        torch = self.torch
        x, grad_output = self.tensor(data.x, case), self.tensor(data.grad_output, case)
        weight, bias, running_mean, running_var = (
            torch.from_numpy(a.copy()) for a in data.of_channels
        )
        forward = (x, weight, bias, running_mean, running_var, case.pass_ != "inference")
        if case.steps != "none" and case.reuses_out:
            return None
        if case.pass_ == "backward":
            y, mean, inv_std = torch.native_batch_norm(*forward, MOMENTUM, EPS)
            backward = self.compiled(torch.ops.aten.native_batch_norm_backward)
            statistics = (running_mean, running_var, mean, inv_std)
            arguments = (x, weight, *statistics, True, EPS, [True] * 3)
            if case.steps != "none":
                return self.call_back_through_steps(case, data, y, arguments)
            arguments = (grad_output, *arguments)
            out = {}
            if case.reuses_out:
                if x.layout is not torch.strided:
                    return None
                backward = backward.out
                out = {
                    f"out{k}": torch.empty_like(like) for k, like in enumerate((x, weight, bias))
                }
            return Call(
                lambda: backward(*arguments, **out),
                lambda grads: gradients((self.array(grads[0], case), *map(dense, grads[1:]))),
            )
        if case.reuses_out:
            if x.layout is not torch.strided:
                return None
            saved = [torch.empty(case.channels if forward[-1] else 0) for _ in range(2)]
            outs = (torch.empty_like(x), *saved)
            return Call(
                lambda: torch.native_batch_norm(*forward, MOMENTUM, EPS, out=outs),
                lambda y: {"y": self.array(y[0], case)},
            )
        residual = self.tensor(data.residual, case) if case.has_residual else None

        def norm_and_steps(*arguments: Any) -> Any:
            y = torch.nn.functional.batch_norm(*arguments)
            if residual is not None:
                y = y.add_(residual)
            return y if case.steps == "none" else y.relu_()

        batch_norm = self.compiled(norm_and_steps)
        training = case.pass_ == "training"
        return Call(
            lambda: batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS),
            lambda y: {"y": self.array(y, case)},
        )

    def call_back_through_steps(
        self, case: Case, data: Data, y: Any, arguments: tuple[Any, ...]
    ) -> Call:
        """The gradients of a norm, given its output, behind a ReLU, and that of a residual."""
        grad_output = self.tensor(data.grad_output, case)
        if case.has_residual:
            y = y + self.tensor(data.residual, case)
        y = y.relu_()

        def both(grad_output: Any, y: Any) -> Any:
            through = self.torch.ops.aten.threshold_backward(grad_output, y, 0)
            grads = self.torch.ops.aten.native_batch_norm_backward(through, *arguments)
            return (*grads, through)[: 4 if case.has_residual else 3]

        backward = self.compiled(both)
        return Call(
            lambda: backward(grad_output, y),
            lambda grads: gradients(
                (
                    self.array(grads[0], case),
                    *map(dense, grads[1:3]),
                    *(self.array(grad, case) for grad in grads[3:]),
                )
            ),
        )

    def call_of_layer(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        torch = self.torch
        layer = layer_of(case, torch.nn)
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(getattr(data, name)))
        norm = self.compiled(layer)
        x, grad_output = self.tensor(data.x, case), self.tensor(data.grad_output, case)
        if case.pass_ == "forward":
            return Call(lambda: norm(x), lambda y: {"y": self.array(y, case)})
        inputs = [x.requires_grad_(), *layer.parameters()]
        with torch.enable_grad():
            y = norm(x)
        return Call(
            lambda: torch.autograd.grad(y, inputs, grad_output, retain_graph=True),
            lambda grads: gradients((self.array(grads[0], case), *map(dense, grads[1:]))),
        )


class TorchCompile(PyTorch):
    """torch.compile by its default, inductor: C++ for each case and number of threads."""

    name = "torch.compile"
    dtypes = ("float32",)

    def __init__(self) -> None:
        super().__init__()
        # No processes of its own beside those that are timed.
        inductor: Any = import_module("torch._inductor.config")
        inductor.compile_threads = 1
        # The graph of a backward pass is kept.
        functorch: Any = import_module("torch._functorch.config")
        functorch.donated_buffer = False

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that are not installed, or the compiler of C++."""
        return super().missing() or [name for name in ("g++",) if not shutil.which(name)]

    def compiled(self, function: Any) -> Any:  # noqa: D102
        return self.torch.compile(lambda *arguments: function(*arguments), dynamic=False)

    def call(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        if case.reuses_out:
            return None
        self.torch.compiler.reset()  # of one function it compiles eight variants at most
        return super().call(case, data)


class OneDNN(PyTorch):
    """oneDNN by way of PyTorch's mkldnn tensors, which are always channels first."""

    name = "oneDNN"
    dtypes = ("float32",)
    steps = ("none",)

    @property
    def version(self) -> str:
        """Version of PyTorch, which contains the library."""
        return f"in PyTorch {super().version}"

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that are not installed, or a build of PyTorch without oneDNN."""
        missing = super().missing()
        if not missing and not import_module("torch").backends.mkldnn.is_available():
            return ["oneDNN in torch"]
        return missing

    def tensor(self, array: Array, case: Case) -> Any:  # noqa: D102
        shape = array.shape if array.ndim == 4 else (*array.shape, 1, 1)
        return self.torch.from_numpy(array.reshape(shape)).to_mkldnn()

    def array(self, tensor: Any, case: Case) -> Array:  # noqa: D102
        return dense(tensor).reshape(case.shape)

    def call_of_batch_norm(self, case: Case, data: Data) -> Call | None:  # noqa: D102
        return None if case.layout == "NHWC" else super().call_of_batch_norm(case, data)

    def call_of_layer(self, case: Case, data: Data) -> None:  # noqa: D102
        return None


def dense(tensor: Any) -> Array:
    """A tensor that may be one of oneDNN's, as an array."""
    array: Array = (tensor.to_dense() if tensor.is_mkldnn else tensor).numpy()
    return array
