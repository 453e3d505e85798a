"""The norms in one table, for the tests of what all of them do.

A row makes a layer for data of a given size, and the functions that do what this layer does in
training. A size is C channels, so many groups of them (GroupNorm alone asks), and the lengths of
the row that LayerNorm and RMSNorm normalise.
"""

import pickle
from functools import partial
from typing import NamedTuple

import numpy as np

import cbn
from cbn import functional


class Norm(NamedTuple):
    name: str  # of the layer, in cbn and in torch.nn
    function: str  # in cbn.functional and cbn.reference; that of its gradients ends in _backward
    axes: tuple[int, ...]  # how many an input has; where one may be a single sample, of batches
    size: tuple[str, ...]  # the arguments that a layer cannot be made without
    parameters: tuple[str, ...] = ("weight", "bias")
    learns: bool = False  # whether it can have running statistics
    affine: str = "affine"  # the name of the switch of its parameters

    def arguments(self, C=3, groups=1, row=(2, 2)):
        """What a layer for data of this size cannot be made without."""
        size = {"num_features": C, "num_groups": groups, "num_channels": C, "normalized_shape": row}
        return {name: size[name] for name in self.size}

    def layer(self, C=3, groups=1, row=(2, 2), **options):
        return getattr(cbn, self.name)(**self.arguments(C, groups, row), **options)

    def torch_layer(self, torch, C=3, groups=1, row=(2, 2), **options):
        return getattr(torch.nn, self.name)(**self.arguments(C, groups, row), **options)

    def functions(self, groups=1, row=(2, 2), module=functional):
        """Two functions: x to y, and (grad_output, x) to the gradients; with keyword options.

        They normalise by the statistics of x. The module may be cbn.reference.
        """
        if self.function == "batch_norm":
            return partial(batch_norm, module), partial(batch_norm_backward, module)
        size = self.arguments(0, groups, row).items()
        own = {name: value for name, value in size if name in ("num_groups", "normalized_shape")}
        forward, backward = (
            partial(getattr(module, name), **own)
            for name in (self.function, f"{self.function}_backward")
        )
        return partial(output_of, forward), backward

    @property
    def channel_axes(self):
        """Where its channels may lie; it is 1 alone where there is no such choice."""
        return (1,) if self.size == ("normalized_shape",) else (1, -1)

    def shape_of_parameters(self, C=3, row=(2, 2)):
        return row if self.size == ("normalized_shape",) else (C,)


def output_of(forward, x, **options):
    """The output alone: the reference returns statistics with it."""
    y = forward(x, **options)
    return y[0] if isinstance(y, tuple) else y


def batch_norm(module, x, **options):
    return output_of(
        module.batch_norm, x, running_mean=None, running_var=None, training=True, **options
    )


def batch_norm_backward(module, grad_output, x, channel_axis=1, **options):
    mean, var, _ = module.batch_norm_stats(x, channel_axis=channel_axis)
    return module.batch_norm_backward(
        grad_output, x, mean, var, channel_axis=channel_axis, **options
    )


def filled(layer, seed=0):
    """The layer, with every array of it other than it starts with."""
    rng = np.random.default_rng(seed)
    for name in layer.state_dict():
        array = getattr(layer, name)
        array[...] = 7 if name == "num_batches_tracked" else rng.uniform(0.5, 2, array.shape)
    return layer


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(*layers):
    """As lists and numbers."""
    return [np.array(getattr(layer, name)).tolist() for layer in layers for name in STATISTICS]


BATCH = [
    Norm(f"BatchNorm{d}d", "batch_norm", axes, ("num_features",), learns=True)
    for d, axes in ((1, (2, 3)), (2, (4,)), (3, (5,)))
]
INSTANCE = [
    Norm(f"InstanceNorm{d}d", "instance_norm", (d + 2,), ("num_features",), learns=True)
    for d in (1, 2, 3)
]
GROUP = Norm("GroupNorm", "group_norm", (2, 3, 4, 5), ("num_groups", "num_channels"))
ROWS = [
    Norm(
        name,
        name.replace("Norm", "_norm").lower(),
        (1, 2, 3, 4, 5),
        ("normalized_shape",),
        parameters,
        affine="elementwise_affine",
    )
    for name, parameters in (("LayerNorm", ("weight", "bias")), ("RMSNorm", ("weight",)))
]
NORMS = {norm.name: norm for norm in (*BATCH, *INSTANCE, GROUP, *ROWS)}

# Of one layer for every function, all options, alone or with others.
OPTIONS = {
    "BatchNorm1d": [
        {},
        {"eps": 0.125},
        {"eps": 1},
        {"momentum": None},
        {"momentum": None, "eps": 1e-3},
        {"momentum": 1 / 3},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"dtype": "float64"},
        {"channel_axis": -1},
        {"correction": 0},
        {"correction": 1.5},
        {"nonfinite": "skip"},
    ],
    "InstanceNorm1d": [
        {},
        {"affine": True, "bias": False, "momentum": None, "eps": 0.25},
        {"affine": True, "track_running_stats": True, "correction": 0},
        {"track_running_stats": True, "channel_axis": -1, "dtype": "float64"},
        {"track_running_stats": True, "nonfinite": "skip"},
    ],
    "GroupNorm": [
        {},
        {"affine": False, "eps": 1},
        {"bias": False, "channel_axis": -1, "dtype": "float64"},
    ],
    "LayerNorm": [
        {},
        {"bias": False, "eps": 0.0},
        {"elementwise_affine": False, "dtype": "float64"},
    ],
    "RMSNorm": [{}, {"elementwise_affine": False, "eps": 0.5, "dtype": "float64"}],
}
WITH_OPTIONS = [(name, options) for name, choices in OPTIONS.items() for options in choices]
