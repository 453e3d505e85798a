"""How a refused call is checked, and a scene of every norm to call: for the tests of errors."""

import re
from functools import partial
from inspect import signature

import numpy as np
import pytest
from norms_table import NORMS

from cbn import functional
from cbn.layers import NormLayer


def check_refused(call, error, text):
    """Call is a partial: it must raise this very error, and change no array and no layer."""
    before = snapshot(call)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text
    assert snapshot(call) == before


def refused(text, error=ValueError):
    """A context that must raise an error of this very text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def snapshot(call):
    """All arrays that a call can reach: its arguments, and what a layer among them holds."""
    values = [getattr(call.func, "__self__", call.func), *call.args, *call.keywords.values()]
    for value in list(values):
        if isinstance(value, NormLayer):
            values += vars(value).values()
    return [
        (id(value), value.tobytes() if isinstance(value, np.ndarray) else None) for value in values
    ]


def by_arguments(rows):
    """Rows of a table whose first column is the keyword arguments, which make its id."""
    return [
        pytest.param(*row, id=",".join(f"{name}={value}" for name, value in row[0].items()))
        for row in rows
    ]


def read_only(array):
    array.flags.writeable = False
    return array


# ------------------------------------------------------------------------------------------ scenes

C = 3
SHAPE = (4, C, 2, 2)
STRIDES = (48, 16, 8, 4)

# Those that can learn statistics do so here, and normalise by the learnt ones in eval mode.
KINDS = {
    "batch": NORMS["BatchNorm2d"],
    "batch-eval": NORMS["BatchNorm2d"],
    "instance": NORMS["InstanceNorm2d"],
    "instance-eval": NORMS["InstanceNorm2d"],
    "group": NORMS["GroupNorm"],
    "layer": NORMS["LayerNorm"],
    "rms": NORMS["RMSNorm"],
}
EACH = pytest.mark.parametrize("kind", KINDS)
LEARNING = pytest.mark.parametrize("kind", ["batch", "instance"])
LEARNERS = [kind for kind, norm in KINDS.items() if norm.learns]


class Scene:
    """A layer after a call and its backward pass, the functions of its kind, and their arrays."""

    def __init__(self, kind):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal(SHAPE, np.float32)
        self.grad_output = rng.standard_normal(SHAPE, np.float32)
        norm, training = KINDS[kind], not kind.endswith("-eval")
        learning = {"affine": True, "track_running_stats": True} if norm.learns else {}
        self.layer = norm.layer(**learning).train(training)
        self.layer(self.x)
        self.layer.backward(self.grad_output)

        function = getattr(functional, norm.function)
        gradients = getattr(functional, f"{norm.function}_backward")
        taken = signature(function).parameters
        size = {name: value for name, value in norm.arguments().items() if name in taken}
        mean, var = rng.random((2, C), np.float32)
        self.function = partial(function, **size)
        self.gradients = partial(gradients, **size)
        if norm.learns:
            self.function = partial(self.function, running_mean=mean, running_var=var)
        if norm.function == "batch_norm":
            self.function = partial(self.function, training=training)
            self.gradients = partial(self.gradients, mean=mean, var=var, training=training)
        if norm.function == "instance_norm":
            self.function = partial(self.function, use_input_stats=training)
            self.gradients = self.gradients if training else None

    def with_(self, **attributes):
        for name, value in attributes.items():
            setattr(self.layer, name, value)
        return self.layer

    def calls(self, through, **values):
        """The calls that use these parameters or statistics, of the layer or of its functions."""
        if through == "layer":
            layer = self.with_(**values)
            forward, backward = partial(layer, self.x), partial(layer.backward, self.grad_output)
        else:
            forward = partial(self.function, self.x, **values)
            backward = self.gradients and partial(
                self.gradients, self.grad_output, self.x, **values
            )
        return [forward, backward] if backward and "weight" in values else [forward]


# ---------------------------------------------------------------------------- texts in many places

AXIS = "channel_axis: expected 1 (channels first) or -1 (channels last), got "
NON_NEGATIVE = "eps: expected a finite number >= 0, got "
OF_DATA = "float32, float64, float16 or bfloat16"
IN_PLACE = "which training updates in place"
COPY = "train a copy (copy.deepcopy), or use eval mode"

OVERLAPS = ("shifted", "reversed", "transposed")


def overlapping(how):
    """Two arrays of the usual shape that share some of their memory, and the strides of each."""
    memory = np.random.default_rng(1).standard_normal((5, C, 2, 2), np.float32)
    first = memory[:4]
    if how == "shifted":
        return first, memory[1:], STRIDES
    if how == "reversed":
        return first, first[::-1], (-48, 16, 8, 4)
    assert how == "transposed"
    return first, first.swapaxes(2, 3), (48, 16, 4, 8)


def overlap_text(name, strides):
    return (
        f"out: expected memory apart from {name}, or {name} itself, got a partial overlap "
        f"(shape (4, 3, 2, 2), strides {strides} over strides {STRIDES})"
    )


def unusable(seen, eps=1e-5, channel="2", name="running_var"):
    """Of a variance that nothing can be normalised by."""
    return (
        f"{name}: expected {name} + eps above 0 in every channel, got {seen} with eps={eps:g} in "
        f"channel {channel}; a variance is at least 0, and one of 0 needs an eps above 0"
    )
