"""What a ReLU and a residual cost in the pass of a batch norm, and as steps of their own.

    python benchmarks/fused.py
    python benchmarks/fused.py --threads 1 --shapes 32x64x56x56

For each shape, channels first and last: the time of the norm alone; with a ReLU, and with a
residual and a ReLU, over that (1.00 would be for nothing); and how many times as long PyTorch takes
for batch_norm, relu_ and add_ one after the other, or back through them. Outputs are given (out=);
inference keeps nothing for a pass backward, training does. All is timed turn by turn in one process
(turns.py says how).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from compare import HEAP, start_with
from turns import time_in_turns

import cbn
from cbn import functional

STEPS = {"norm": (None, False), "relu": ("relu", False), "add, relu": ("relu", True)}
PASSES = ("inference", "training", "backward")
Calls = dict[str, Callable[[], object]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--shapes", nargs="+", default=["32x64x56x56", "16x256x28x28", "64x512x7x7", "8x64x28x28"]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    arguments = parser.parse_args()
    start_with(HEAP)
    cbn.set_num_threads(arguments.threads)
    torch = load_torch(arguments.threads)
    print(f"threads: {arguments.threads}; " + cbn.show_config("dicts")["instruction set"]["active"])
    print(f"{'':<34}{'norm, us':>10}{'+relu':>7}{'+add':>7}   PyTorch: norm, +relu, +add")
    for text in arguments.shapes:
        shape = tuple(map(int, text.split("x")))
        for last in (False, True):
            for pass_ in PASSES:
                calls = calls_of_cbn(shape, last, pass_)
                if torch:
                    calls |= calls_of_torch(torch, shape, last, pass_)
                times = {
                    name: timing.median
                    for name, timing in time_in_turns(calls, arguments.seconds).items()
                }
                row = f"{text} {'last' if last else 'first':<6}{pass_}"
                ratios = [times[step] / times["norm"] for step in ("relu", "add, relu")]
                row = f"{row:<34}{times['norm'] * 1e6:10.0f}" + "".join(f"{r:7.2f}" for r in ratios)
                if torch:
                    theirs = [times[f"torch {step}"] / times[step] for step in STEPS]
                    row += "   " + " ".join(f"{ratio:6.2f}" for ratio in theirs)
                print(row, flush=True)


def load_torch(threads: int) -> Any:
    """PyTorch, or None where it is not installed."""
    if not find_spec("torch"):
        return None
    import torch

    torch.set_num_threads(threads)
    return torch


def data_of(shape: tuple[int, ...]) -> Any:
    """Input, residual and gradient, channels first, and an output."""
    return np.random.default_rng(0).standard_normal((4, *shape), np.float32)


def calls_of_cbn(shape: tuple[int, ...], last: bool, pass_: str) -> Calls:
    """The pass with each of the steps."""
    x, residual, grad_output, out = data_of((shape[0], *shape[2:], shape[1]) if last else shape)
    weight, bias = np.ones((2, shape[1]), np.float32)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    options: Any = {"channel_axis": -1 if last else 1}

    def call(step: str) -> Callable[[], object]:
        activation, has_residual = STEPS[step]
        steps: Any = {"activation": activation, "residual": residual if has_residual else None}
        forward: Any = functional.batch_norm_forward
        if pass_ == "inference":
            return lambda: functional.batch_norm(
                x, mean, var, weight, bias, out=out, **options, **steps
            )
        if pass_ == "training":
            return lambda: forward(x, None, None, weight, bias, True, out=out, **options, **steps)
        _, saved = forward(x, None, None, weight, bias, True, **options, **steps)
        return lambda: functional.norm_backward(grad_output, saved, weight, out=out)

    return {step: call(step) for step in STEPS}


def calls_of_torch(torch: Any, shape: tuple[int, ...], last: bool, pass_: str) -> Calls:
    """The same by PyTorch, step by step."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, residual, grad_output, _ = (
        torch.from_numpy(array).contiguous(memory_format=layout) for array in data_of(shape)
    )
    norm = torch.nn.BatchNorm2d(shape[1]).train(pass_ != "inference")

    def forward(step: str) -> Any:
        activation, has_residual = STEPS[step]
        y = norm(x)
        if has_residual:
            y = y.add_(residual)
        return y.relu_() if activation else y

    def call(step: str) -> Callable[[], object]:
        if pass_ != "backward":
            return torch.no_grad()(lambda: forward(step))
        inputs = [x.requires_grad_(), *norm.parameters()]
        if STEPS[step][1]:
            inputs.append(residual.requires_grad_())
        y = forward(step)
        return lambda: torch.autograd.grad(y, inputs, grad_output, retain_graph=True)

    return {f"torch {step}": call(step) for step in STEPS}


if __name__ == "__main__":
    main()
