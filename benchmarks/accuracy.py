"""The largest errors of cbn, NumPy, PyTorch, oneDNN and JAX in training, on data that is hard.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --norms batch --quick

Whatever is installed takes part, and cbn and PyTorch alone in norms other than batch norm. The data
are those of hard.py: combinations of mean, outlier and scale, for each channel or, in these norms,
for each group of values. An error is that of a float32 result against the formulas in float64 on
the same inputs, relative to max(1, |y|) for the output y, and to 3 max(1, |y|) / std for the input
gradient. The largest over all values and shapes is printed, in the form of Markdown. Batch norm of
cbn is measured in float64 too, against the formulas in long double, with 10^7 values in each
channel, and with data of float16 and bfloat16, whose rounding is most of the error; float16 only
where it can hold the data.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from check import by_formulas
from hard import MIXED, RATIOS, SCALES, Exact, Hard, all_kinds, centred, draw, errors, exact
from ml_dtypes import bfloat16
from peers import Cbn, Jax, NumPy, OneDNN, PyTorch
from peers_base import Peer
from shapes import NORMS, Array, Case, Data
from tqdm import tqdm

import cbn

Shapes = list[tuple[str, tuple[int, ...]]]
SHAPES: Shapes = [
    ("NCHW", (8, 8, 28, 28)),
    ("NCHW", (1, 8, 9, 9)),
    ("NCHW", (3, 8, 150, 150)),
    ("NHWC", (8, 28, 28, 8)),
    ("NC", (4096, 16)),
]
LARGE: Shapes = [
    ("NCHW", (10, 2, 1000, 1000)),
    ("NHWC", (10, 1000, 1000, 2)),
    ("NC", (10_000_000, 2)),
]
# Of each norm but batch norm, with the number of groups in an array.
GROUPED: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {
    "layer": [(64, "NC", (64, 768)), (9, "NC", (9, 5000))],
    "rms": [(64, "NC", (64, 768)), (9, "NC", (9, 5000))],
    "group": [(64, "NCHW", (2, 256, 7, 7)), (64, "NCHW", (2, 64, 28, 28))],
    "instance": [(24, "NCHW", (3, 8, 64, 64)), (24, "NCHW", (3, 8, 7, 7))],
}
PLAIN = Hard(0, 0, True, "1")
# What is in a column of the tables.
COLUMNS: dict[str, Callable[[Hard], bool]] = {
    **{f"mean / std {r:g}": PLAIN._replace(ratio=r).__eq__ for r in RATIOS},
    "outlier 3e3 std": lambda kind: kind._replace(first=True) == PLAIN._replace(outlier=3e3),
    "outlier 1e5 std": lambda kind: kind._replace(first=True) == PLAIN._replace(outlier=1e5),
    "near 1e25": PLAIN._replace(scale="1e25").__eq__,
    "channels from 1e-6 to 1e6": PLAIN._replace(scale=MIXED).__eq__,
    "all combinations": lambda _: True,
}
Row = tuple[str, float, float]  # a library and more, and the largest errors of two results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--quick", action="store_true", help="two scales, no large arrays")
    arguments = parser.parse_args()
    peers = [peer() for peer in (Cbn, NumPy, PyTorch, OneDNN, Jax) if not peer.missing()]
    kinds = list(all_kinds(("1", MIXED) if arguments.quick else SCALES))

    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # by row and column
    work: list[tuple[list[Any], list[Hard], Callable[..., Iterator[Row]]]] = []
    if "batch" in arguments.norms:
        work += [(SHAPES, kinds, partial(of_peers, peers)), (SHAPES, kinds, of_float64)]
        work.append((SHAPES, kinds, of_halves))
        if not arguments.quick:
            large = [kind for kind in kinds if kind.first and kind.scale in ("1", "1e25")]
            work.append((LARGE, large, of_large))
    with_layers = [peer for peer in peers if peer.name in ("cbn", "PyTorch")]
    for norm in arguments.norms:
        work.append((GROUPED.get(norm, []), kinds, partial(of_groups, with_layers, norm)))
    with tqdm(total=sum(len(shapes) * len(kinds) for shapes, kinds, _ in work)) as progress:
        for shapes, kinds, measure in work:
            for shape in shapes:
                for kind in kinds:
                    for row, *largest in measure(*shape, kind):
                        note(worst, row, kind, largest)
                    progress.update()
    print_tables(worst)
    print("\n" + ", ".join(f"{peer.name} {peer.version}" for peer in peers))


def of_peers(peers: list[Peer], layout: str, shape: tuple[int, ...], kind: Hard) -> Iterator[Row]:
    """The errors of each library that has the layout, in float32."""
    case = Case("batch", "hard", "training", layout, shape)
    axis = case.channel_axis
    data = data_of(case, *draw(kind, shape, axis, np.float32))
    right = exact(data.x, data.grad_output, data.weight, data.bias, axis)
    for name, *largest in of_calls(peers, case, data, right):
        yield f"{name}, {layout}", *largest


def of_groups(
    peers: list[Peer], norm: str, groups: int, layout: str, shape: tuple[int, ...], kind: Hard
) -> Iterator[Row]:
    """The errors of the libraries that have this other norm, in float32."""
    case = Case(norm, "hard", "forward", layout, shape)
    values, gradients = (
        array.T.copy() for array in draw(kind, (case.values // groups, groups), -1, np.float32)
    )
    data = data_of(case, values.reshape(shape), gradients.reshape(shape))
    wide, std = (array.reshape(shape) for array in centred(values, norm != "rms"))
    by_formula = by_formulas(case, data._replace(x=wide))
    right = Exact(by_formula["y"], by_formula["grad_input"], std)
    for name, *largest in of_calls(peers, case, data, right):
        yield f"{name}, {norm} norm", *largest


def of_calls(peers: list[Peer], case: Case, data: Data, right: Exact) -> Iterator[Row]:
    """The errors of each library that has a call for a case and the gradient of it."""
    for peer in peers:
        forward, backward = peer.call(case, data), peer.call(replace(case, pass_="backward"), data)
        if forward and backward:
            y = forward.results(forward.run())["y"]
            grad_input = backward.results(backward.run())["grad_input"]
            yield peer.name, *errors(right, y, grad_input)


def data_of(case: Case, x: Array, grad_output: Array) -> Data:
    """The arrays of a case."""
    weight, bias = parameters(case.channels, np.float32)
    return Data(x, grad_output, x, weight, bias, np.zeros_like(bias), np.ones_like(bias))


def of_large(layout: str, shape: tuple[int, ...], kind: Hard) -> Iterator[Row]:
    """The errors of a layer of cbn in float32."""
    yield f"cbn, {layout}, 1e7 values", *of_layer(layout, shape, kind, np.float32)


def of_float64(layout: str, shape: tuple[int, ...], kind: Hard) -> Iterator[Row]:
    """The errors of a layer of cbn in float64."""
    yield f"cbn, {layout}, float64", *of_layer(layout, shape, kind, np.float64)


def of_halves(layout: str, shape: tuple[int, ...], kind: Hard) -> Iterator[Row]:
    """The errors of a layer of cbn with data of half types."""
    yield f"cbn, {layout}, bfloat16", *of_layer(layout, shape, kind, np.float32, bfloat16)
    largest = kind.outlier + kind.ratio + 10
    if kind.scale == "1" and largest < np.finfo(np.float16).max:
        yield f"cbn, {layout}, float16", *of_layer(layout, shape, kind, np.float32, np.float16)


def of_layer(
    layout: str, shape: tuple[int, ...], kind: Hard, dtype: type[np.floating], data: Any = None
) -> tuple[float, float]:
    """The errors of a layer of cbn; data is their type, if it is not that of the layer."""
    axis = -1 if layout == "NHWC" else 1
    x, grad_output = draw(kind, shape, axis, dtype if data is None else data)
    layer = cbn.BatchNorm1d if x.ndim == 2 else cbn.BatchNorm2d
    bn = layer(shape[axis], dtype=dtype, channel_axis=axis, track_running_stats=False)
    bn.weight[...], bn.bias[...] = parameters(shape[axis], dtype)
    right = exact(x, grad_output, bn.weight, bn.bias, axis)
    y, grad_input = bn(x), bn.backward(grad_output)
    if data is not None:
        y, grad_input = y.astype(np.float64), grad_input.astype(np.float64)
    return errors(right, y, grad_input)


def parameters(channels: int, dtype: type[np.floating]) -> tuple[Array, Array]:
    """A weight and a bias."""
    rng = np.random.default_rng(1)
    weight, bias = rng.uniform(0.5, 1.5, channels), rng.standard_normal(channels)
    return weight.astype(dtype), bias.astype(dtype)


def note(
    worst: dict[tuple[str, str], dict[str, float]], row: str, kind: Hard, largest: list[float]
) -> None:
    """Keep the largest."""
    for column, belongs in COLUMNS.items():
        if belongs(kind):
            for result, error in zip(("y", "grad_input"), largest, strict=True):
                rows = worst[result, column]
                rows[row] = max(rows.get(row, 0), error)


def print_tables(worst: dict[tuple[str, str], dict[str, float]]) -> None:
    """Print a table for each result."""
    for result in ("y", "grad_input"):
        columns = [column for column in COLUMNS if worst[result, column]]
        print(f"\n| {result} | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
        for row in worst[result, columns[-1]]:
            cells = (worst[result, column].get(row) for column in columns)
            print(f"| {row} | " + " | ".join("" if c is None else f"{c:.0e}" for c in cells) + " |")


if __name__ == "__main__":
    main()
