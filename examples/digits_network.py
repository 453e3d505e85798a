"""A small convolutional network for 8x8 digits: NumPy, with the norm layers of cbn.

Shapes are written with the field's letters: N images in a batch, C channels, H rows, W columns.
Layers carry PyTorch's names, and so do the keys of a saved network (``conv1.weight``).
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import cbn

Array = NDArray[np.float32]
State = dict[str, NDArray[Any]]


class Layer:
    """The part that layers share: parameters, which ReLU and pooling simply lack."""

    weight: Array | None = None
    bias: Array | None = None

    def state_dict(self) -> State:
        """Return the parameters by name."""
        named = {"weight": self.weight, "bias": self.bias}
        return {name: array for name, array in named.items() if array is not None}

    def load_state_dict(self, state: State) -> None:
        """Copy the parameters from `state`, which must hold them in the same shapes."""
        for name, parameter in self.state_dict().items():
            # Assignment alone would broadcast an array of the wrong shape without a word.
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name}: expected {parameter.shape}, got {state[name].shape}")
            parameter[...] = state[name]


def unfold(x: Array) -> Array:
    """Gather the 3x3 neighbourhood of every pixel: (N, C, H, W) to (C * 9, N * H * W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(1, 4, 5, 0, 2, 3).reshape(x.shape[1] * 9, -1)


def convolve(weight: Array, columns: Array, shape: tuple[int, ...]) -> Array:
    """Apply the kernels to all neighbourhoods of an image batch of this shape."""
    N, _, H, W = shape
    # One large product keeps the processor far busier than one small product per image,
    # and is worth the copy that puts the images first again.
    y = weight.reshape(len(weight), -1) @ columns
    return np.ascontiguousarray(y.reshape(-1, N, H, W).swapaxes(0, 1))


class Conv2d(Layer):
    """Convolution with 3x3 kernels, stride 1 and padding 1, so that H and W stay as they are."""

    weight: Array

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool, generator: np.random.Generator
    ) -> None:
        self.weight = he_normal((out_channels, in_channels, 3, 3), generator)
        self.bias = np.zeros(out_channels, np.float32) if bias else None

    def __call__(self, x: Array) -> Array:
        """Convolve (N, C, H, W) to (N, out_channels, H, W)."""
        # Kept for backward, but not read back here: another thread may be in this layer as well.
        self.columns = columns = unfold(x)
        y = convolve(self.weight, columns, x.shape)
        return y if self.bias is None else y + self.bias[:, np.newaxis, np.newaxis]

    def backward(self, grad_output: Array) -> Array:
        """Set the gradients of the parameters and return that of `x`."""
        by_channel = grad_output.swapaxes(0, 1).reshape(len(self.weight), -1)
        self.weight_grad = (by_channel @ self.columns.T).reshape(self.weight.shape)
        if self.bias is not None:
            self.bias_grad = by_channel.sum(axis=1)
        # A pixel gets its gradient back from the neighbours that saw it: the same convolution,
        # with each kernel turned by 180 degrees and input and output channels exchanged.
        turned = self.weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return convolve(turned, unfold(grad_output), grad_output.shape)


class ReLU(Layer):
    """Rectifier: negative values become zero."""

    def __call__(self, x: Array) -> Array:
        """Return max(x, 0)."""
        self.positive = x > 0
        return np.maximum(x, 0)

    def backward(self, grad_output: Array) -> Array:
        """Return the gradient of `x`: nothing passes where the output was zero."""
        return grad_output * self.positive


class GlobalAveragePool2d(Layer):
    """Mean of every channel: (N, C, H, W) to (N, C)."""

    def __call__(self, x: Array) -> Array:
        """Return the means."""
        self.shape = x.shape
        return x.mean(axis=(2, 3))

    def backward(self, grad_output: Array) -> Array:
        """Return the gradient of `x`: each pixel has an equal share."""
        _, _, H, W = self.shape
        share = grad_output[:, :, np.newaxis, np.newaxis] / (H * W)
        return np.broadcast_to(share, self.shape)


class Linear(Layer):
    """Fully connected layer."""

    weight: Array
    bias: Array

    def __init__(
        self, in_features: int, out_features: int, *, generator: np.random.Generator
    ) -> None:
        self.weight = he_normal((out_features, in_features), generator)
        self.bias = np.zeros(out_features, np.float32)

    def __call__(self, x: Array) -> Array:
        """Map (N, in_features) to (N, out_features)."""
        self.x = x
        return x @ self.weight.T + self.bias

    def backward(self, grad_output: Array) -> Array:
        """Set the gradients of the parameters and return that of `x`."""
        self.weight_grad = grad_output.T @ self.x
        self.bias_grad = grad_output.sum(axis=0)
        return grad_output @ self.weight


def he_normal(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Draw weights whose scale keeps the variance through a ReLU (He et al., 2015)."""
    fan_in = math.prod(shape[1:])
    return generator.standard_normal(shape, np.float32) * math.sqrt(2 / fan_in)


class DigitsNetwork:
    """Three convolutions, each with ReLU and perhaps batch normalisation; ten logits.

    Parameters
    ----------
    normalised : bool
        Whether a `cbn.BatchNorm2d` follows each convolution.
    seed : int
        Seed of the initial weights; they do not depend on `normalised`.

    Attributes
    ----------
    layers : dict
        The layers by name, in the order in which data pass through them.
    """

    def __init__(self, normalised: bool = True, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.layers: dict[str, Any] = {}
        channels = (1, 16, 32, 32)
        for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
            # Batch norm subtracts each channel's mean, and with it whatever constant a bias of
            # the convolution had added; the norm's own bias takes that part.
            self.layers[f"conv{number}"] = Conv2d(
                inputs, outputs, bias=not normalised, generator=generator
            )
            if normalised:
                self.layers[f"norm{number}"] = cbn.BatchNorm2d(outputs, activation="relu")
            else:
                self.layers[f"relu{number}"] = ReLU()
        self.layers["pool"] = GlobalAveragePool2d()
        self.layers["linear"] = Linear(channels[-1], 10, generator=generator)

    def train(self, mode: bool = True) -> "DigitsNetwork":
        """Let the norm layers use the statistics of the batch, or else those they have learnt."""
        for layer in self.layers.values():
            if isinstance(layer, cbn.BatchNorm2d):
                layer.train(mode)
        return self

    def eval(self) -> "DigitsNetwork":
        """Switch to inference: an image's result no longer depends on the rest of its batch."""
        return self.train(False)

    def forward(self, images: Array) -> Array:
        """Compute logits.

        Parameters
        ----------
        images : ndarray of float32, shape (N, 1, H, W)
            Grey values in [0, 1], bright on dark.

        Returns
        -------
        ndarray of float32, shape (N, 10)
            One logit for each digit.
        """
        x = images
        for layer in self.layers.values():
            x = layer(x)
        return x

    def backward(self, grad_output: Array) -> None:
        """Set every layer's ``weight_grad`` and ``bias_grad`` from the gradient of the logits."""
        for layer in reversed(self.layers.values()):
            grad_output = layer.backward(grad_output)

    def predict(self, images: Array) -> NDArray[np.intp]:
        """Switch to inference and return the most likely digit of each image, shape (N,)."""
        return self.eval().forward(images).argmax(axis=1)

    def parameters(self) -> Iterator[Array]:
        """Yield each parameter: the array itself, to be changed in place."""
        for layer in self.layers.values():
            yield from (array for array in (layer.weight, layer.bias) if array is not None)

    def gradients(self) -> Iterator[Array]:
        """Yield the gradients of the last `backward`, in the order of `parameters`."""
        for layer in self.layers.values():
            if layer.weight is not None:
                yield layer.weight_grad
            if layer.bias is not None:
                yield layer.bias_grad

    def state_dict(self) -> State:
        """Return parameters and running statistics under PyTorch's names (``norm1.weight``)."""
        return {
            f"{name}.{key}": array
            for name, layer in self.layers.items()
            for key, array in layer.state_dict().items()
        }

    def load_state_dict(self, state: State) -> None:
        """Copy parameters and running statistics from `state`, which must hold exactly these."""
        if different := state.keys() ^ self.state_dict().keys():
            raise ValueError(f"missing or unexpected in the state: {', '.join(sorted(different))}")
        for name, layer in self.layers.items():
            layer.load_state_dict({key: state[f"{name}.{key}"] for key in layer.state_dict()})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to one ``.npz`` file of plain arrays."""
        np.savez(path, **self.state_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "DigitsNetwork":
        """Read a network written by `save`; it comes back ready for inference."""
        # Without pickle a file can only hold numbers: a foreign one cannot run code.
        with np.load(path, allow_pickle=False) as file:
            state = dict(file)
        network = cls(normalised="norm1.weight" in state)
        network.load_state_dict(state)
        return network.eval()
