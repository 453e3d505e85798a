"""The largest errors of instance, group, layer and RMS norm, here and in PyTorch, on hard data.

    python benchmarks/norms_accuracy.py

The data are those of hard.py, one channel of which is a group of values here. An error is that of
a float32 result against the same layer of PyTorch in float64, on inputs from which the first value
of every group is subtracted (hard.exact says why), relative to max(1, |y|) for the output, and to
3 max(1, |y|) / std for the input gradient. The largest over all values is printed, in the form of
Markdown.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from accuracy import note, print_tables
from hard import SCALES, Exact, Hard, all_kinds, draw, errors
from norms import GROUPS, NORMS
from shapes import EPS, Array
from tqdm import tqdm

import cbn

# (groups, values), and the shape of the array.
SHAPES: list[tuple[str, tuple[int, int], tuple[int, ...]]] = [
    ("layer", (64, 768), (64, 768)),
    ("layer", (9, 5000), (9, 5000)),
    ("rms", (64, 768), (64, 768)),
    ("rms", (9, 5000), (9, 5000)),
    ("group", (2 * GROUPS, 392), (2, 256, 7, 7)),
    ("group", (2 * GROUPS, 1568), (2, 64, 28, 28)),
    ("instance", (24, 4096), (3, 8, 64, 64)),
    ("instance", (24, 49), (3, 8, 7, 7)),
]


def main() -> None:
    """Measure and print."""
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # by row and column
    kinds = list(all_kinds(SCALES))
    with tqdm(total=len(SHAPES) * len(kinds)) as progress:
        for name, groups, shape in SHAPES:
            for kind in kinds:
                for library, *largest in measure(name, groups, shape, kind):
                    note(worst, f"{library}, {name} norm", kind, largest)
                progress.update()
    print_tables(worst)  # where they say channels, these are groups
    print(f"\ncbn {cbn.__version__}, NumPy {np.__version__}, PyTorch {torch.__version__}")


def measure(
    name: str, groups: tuple[int, int], shape: tuple[int, ...], kind: Hard
) -> list[tuple[str, float, float]]:
    """The errors of both libraries."""
    ours, theirs, exact = (
        NORMS[name].make(library, shape) for library in (cbn, torch.nn, torch.nn)
    )
    exact.double()
    rng = np.random.default_rng(1)
    for key, value in ours._state().items():
        value[...] = rng.uniform(0.5, 1.5, value.shape)
        for layer in (theirs, exact):
            getattr(layer, key).data[...] = torch.from_numpy(value)

    columns, gradients = draw(kind, groups[::-1], -1, np.float32)
    x, grad_output = (
        np.ascontiguousarray(array.T).reshape(shape) for array in (columns, gradients)
    )
    wide = columns.T.astype(np.float64)
    if name == "rms":
        var = np.mean(wide**2, axis=1)
    else:
        wide -= wide[:, :1].copy()
        var = wide.var(axis=1)
    std = np.repeat(np.sqrt(var + EPS), groups[1]).reshape(shape)
    right = Exact(*differentiate(exact, wide.reshape(shape), grad_output.astype(np.float64)), std)
    return [
        ("cbn", *errors(right, ours(x), ours.backward(grad_output))),
        ("PyTorch", *errors(right, *differentiate(theirs, x, grad_output))),
    ]


def differentiate(layer: Any, x: Array, grad_output: Array) -> tuple[Array, Array]:
    """The output and the input gradient of a layer of PyTorch."""
    tensor = torch.from_numpy(x).requires_grad_()
    y = layer(tensor)
    y.backward(torch.from_numpy(grad_output))
    return y.detach().numpy(), tensor.grad.numpy()


if __name__ == "__main__":
    main()
