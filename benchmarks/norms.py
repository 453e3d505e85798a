"""Compare instance, group, layer and RMS norm with PyTorch, forward and backward.

    python benchmarks/norms.py --threads 2

Every case is checked against PyTorch in float64, then timed turn by turn as compare.py does
(turns.py says how): layers of both libraries with parameters. PyTorch's forward is without a graph,
its backward is torch.autograd.grad on one. Both allocate what they return. A row ends in * where
other processes took more than a tenth of a core meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from compare import HEAP, start_with
from report import Record, print_header, print_row, print_summary
from tqdm import tqdm
from turns import OtherWork, release_heap, time_in_turns, warm_heap

import cbn

ROWS = [(4096, 768), (128, 1024), (1024, 128), (512, 4096)]  # of transformers
PLANES = [(32, 64, 56, 56), (32, 256, 14, 14), (8, 512, 7, 7), (8, 128, 28, 28), (1, 64, 64, 64)]
IMAGES = [(1, 64, 256, 256), (1, 128, 128, 128), (1, 256, 64, 64), (8, 64, 32, 32)]
GROUPS = 32


class Norm(NamedTuple):
    """A kind of norm: its shapes, and how to make a layer for one, here (cbn) or there (torch)."""

    shapes: list[tuple[int, ...]]
    make: Callable[[Any, tuple[int, ...]], Any]


NORMS = {
    "layer": Norm(ROWS, lambda library, shape: library.LayerNorm(shape[-1])),
    "rms": Norm(ROWS, lambda library, shape: library.RMSNorm(shape[-1], eps=1e-5)),
    "group": Norm(PLANES, lambda library, shape: library.GroupNorm(GROUPS, shape[1])),
    "instance": Norm(IMAGES, lambda library, shape: library.InstanceNorm2d(shape[1], affine=True)),
}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--norms", choices=NORMS, nargs="+", default=list(NORMS))
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    start_with(HEAP)
    print(f"cbn {cbn.__version__}, PyTorch {torch.__version__}, NumPy {np.__version__}")
    cases = [(name, shape) for name in arguments.norms for shape in NORMS[name].shapes]
    records: list[Record] = []
    progress = tqdm(total=2 * len(cases) * len(arguments.threads), unit="case", file=sys.stderr)
    for threads in arguments.threads:
        cbn.set_num_threads(threads)
        torch.set_num_threads(threads)
        print_header(["cbn", "PyTorch"], threads)
        for name, shape in cases:
            for direction, calls in calls_of(name, shape).items():
                release_heap()
                size = 4 * int(np.prod(shape))
                warm_heap(size)
                with OtherWork() as other:
                    timings = time_in_turns(calls, arguments.seconds)
                record = {
                    "group": f"{name} {direction}",
                    "shape": shape,
                    "threads": threads,
                    "bytes": size * (2 if direction == "forward" else 3),
                    "libraries": {key: value._asdict() for key, value in timings.items()},
                    "other work": other.cores,
                }
                records.append(record)
                print_row(record, ["cbn", "PyTorch"])
                progress.update()
    progress.close()
    print_summary(records)


def calls_of(name: str, shape: tuple[int, ...]) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls to time, by direction and library, once their results have been checked."""
    rng = np.random.default_rng(0)
    x, grad_output = rng.standard_normal((2, *shape), dtype=np.float32)
    ours, theirs = NORMS[name].make(cbn, shape), NORMS[name].make(torch.nn, shape)
    exact = NORMS[name].make(torch.nn, shape).double()
    for key, value in ours._state().items():
        value[...] = rng.uniform(0.5, 2, value.shape)
        for layer in (theirs, exact):
            getattr(layer, key).data[...] = torch.from_numpy(value)
    tensor, grad = torch.from_numpy(x).requires_grad_(), torch.from_numpy(grad_output)
    output = theirs(tensor)
    inputs = [tensor, *theirs.parameters()]
    check(exact, x, grad_output, [ours(x), ours.backward(grad_output), *gradients_of(ours)])

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return theirs(tensor)

    def differentiate() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    return {
        "forward": {"cbn": lambda: ours(x), "PyTorch": infer},
        "backward": {"cbn": lambda: ours.backward(grad_output), "PyTorch": differentiate},
    }


def gradients_of(layer: cbn.layers.NormLayer) -> list[Any]:
    """Those of its parameters."""
    return [array for array in (layer.weight_grad, layer.bias_grad) if array is not None]


def check(layer: Any, x: Any, grad_output: Any, actual: list[Any]) -> None:
    """Compare with PyTorch in float64: output, and gradients of input, weight and bias."""
    tensor = torch.from_numpy(x).double().requires_grad_()
    output = layer(tensor)
    inputs = [tensor, *layer.parameters()]
    gradients = torch.autograd.grad(output, inputs, torch.from_numpy(grad_output).double())
    for array, expected in zip(actual, (output, *gradients), strict=True):
        expected = expected.detach().numpy()
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


if __name__ == "__main__":
    main()
