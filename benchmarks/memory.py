"""Print the memory that calls take besides their inputs and outputs, as a share of the array.

    python benchmarks/memory.py
    python benchmarks/memory.py --norms layer rms --threads 1

No call should take more than a tenth, whatever the shape. Rows of two values and wide (N, C) are
the hard ones: there every mean, sum and coefficient is of few values. What remains above it here
are the statistics of such channels: three of float64, which a layer keeps for backward and batch
norm for the running ones, and which a backward function makes of those that it is given.

A row of the table is a pass over one float32 array of 34 MB, by a layer and by a function, without
and with out=: the most that it took at any time, and in brackets what is still taken when it has
returned, such as the statistics that a layer keeps for backward. More than a tenth is marked
with !.

Each number is from a process of its own. It makes the arrays and calls once with a smaller array,
which loads the code and starts the threads; for a layer's backward it also makes the forward call.
It sets back the peak of its resident memory (5 into /proc/self/clear_refs), calls, and reads the
peak (VmHWM) and what is resident (VmRSS). So memory counts that has been written to, whoever asked
for it, NumPy or the kernels. Freed memory goes back to the system at once, by the variables of
ALLOCATOR, and there are no huge pages, which would round up. Linux counts pages for each CPU and
adds up late: the error is some 100 kB, less than 1 % here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers_base import layer_of
from shapes import EPS, NORMS, Array, Case
from tqdm import tqdm

import cbn
from cbn import functional

Shapes = list[tuple[str, tuple[int, ...]]]
# 8 million values each.
ROWS: Shapes = [("NC", (1 << 22, 2)), ("NC", (1 << 19, 16)), ("NC", (10923, 768))]
IMAGES: Shapes = [("NCHW", (40, 64, 56, 56)), ("NHWC", (40, 56, 56, 64))]
PAIRS: Shapes = [("NCHW", (512, 8192, 1, 2))]  # planes of two values
WIDE: Shapes = [("NC", (8, 1 << 20)), ("NC", (2048, 4096))]
SHAPES: dict[str, Shapes] = {
    "batch": [*IMAGES, *WIDE],
    "layer": ROWS,
    "rms": ROWS,
    "group": [*IMAGES, *PAIRS],
    "instance": [*IMAGES, *PAIRS],
}
# Whether it is the function, and whether out= is given.
KINDS = {
    "layer": (False, False),
    "layer out=": (False, True),
    "function": (True, False),
    "function out=": (True, True),
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TENTH = 0.1
PR_SET_THP_DISABLE = 41


class Taken(NamedTuple):
    """Bytes: the most at any time, and those that are left."""

    most: int
    kept: int


def main() -> None:
    """Measure every case in a process of its own and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--threads", type=int, default=cbn.get_num_threads())
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cbn.set_num_threads(arguments.threads)
    if arguments.here:
        norm, layout, pass_, shape, kind = json.loads(arguments.here)
        print(json.dumps(taken_by(Case(norm, "", pass_, layout, tuple(shape)), *KINDS[kind])))
        return
    cases = [
        (norm, layout, pass_, shape)
        for norm in arguments.norms
        for (layout, shape), pass_ in product(SHAPES[norm], NORMS[norm].passes)
    ]
    print(f"threads: {arguments.threads}\n{'':<46}" + "".join(f"{kind:>18}" for kind in KINDS))
    shares = []
    for case in tqdm(cases, unit="case", file=sys.stderr):
        cells = []
        for kind in KINDS:
            most, kept = (
                bytes_ / (4 * prod(case[-1])) for bytes_ in in_own_process(case, kind, arguments)
            )
            shares.append(most)
            cells.append(f"{most:.0%} ({kept:.0%}) " + ("!" if most > TENTH else " "))
        norm, layout, pass_, shape = case
        title = f"{norm} {pass_} {layout} " + "x".join(map(str, shape))
        tqdm.write(f"{title:<46}" + "".join(f"{cell:>18}" for cell in cells))
    above = sum(share > TENTH for share in shares)
    print(f"\nmore than a tenth: {above} of {len(shares)}; most: {max(shares):.0%}")


def in_own_process(case: tuple[Any, ...], kind: str, arguments: argparse.Namespace) -> Taken:
    """What a call takes in a fresh process."""
    command = [sys.executable, __file__, "--here", json.dumps([*case, kind])]
    done = subprocess.run(
        [*command, "--threads", str(arguments.threads)],
        env=os.environ | ALLOCATOR,
        stdout=subprocess.PIPE,
        check=True,
    )
    return Taken(*json.loads(done.stdout))


def taken_by(case: Case, function: bool, reuses_out: bool) -> Taken:
    """What a call of a layer or of a function takes besides its inputs and outputs."""
    warnings.simplefilter("ignore", cbn.SmallBatchWarning)
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    x, grad_output, out = (np.empty(case.shape, np.float32) for _ in range(3))
    rng = np.random.default_rng(0)
    for array in (x, grad_output):
        rng.standard_normal(out=array, dtype=np.float32)
    out.fill(0)
    call_of = function_of if function else method_of
    smaller = tuple(n // 16 if n == max(case.shape) else n for n in case.shape)
    part = (x.ravel()[: prod(smaller)].reshape(smaller),) * 2
    call_of(replace(case, shape=smaller), *part)()
    call = call_of(case, x, grad_output)
    most, kept = taken(partial(call, out=out if reuses_out else None))
    output = 0 if reuses_out else x.nbytes
    if case.pass_ == "backward":  # the gradients of weight and bias
        output += 2 * case.channels * x.itemsize
    return Taken(most - output, kept - output)


def taken(call: Callable[[], object]) -> Taken:
    """The resident memory that a call adds, its result included."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = call()
    most, now = resident("VmHWM"), resident("VmRSS")
    del result
    return Taken(most - before, now - before)


def resident(which: str) -> int:
    """Bytes of this process that are, or were at most, in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{which}:")[2].split()[0])


def method_of(case: Case, x: Array, grad_output: Array) -> Callable[..., Array]:
    """The pass by a layer, whose forward call has been made where it is backward."""
    layout = {"channel_axis": case.channel_axis}
    if case.norm == "batch":
        batch_norm = cbn.BatchNorm1d if x.ndim == 2 else cbn.BatchNorm2d
        layer = batch_norm(case.channels, **layout).train(case.pass_ != "inference")
    else:
        layer = layer_of(case, cbn, **layout)
    if case.pass_ != "backward":
        return partial(layer, x)
    layer(x)
    return partial(layer.backward, grad_output)


def function_of(case: Case, x: Array, grad_output: Array) -> Callable[..., Array]:
    """The pass by a function."""
    rows = case.norm in ("layer", "rms")
    options: dict[str, Any] = {"eps": EPS, "weight": np.ones(case.channels, np.float32)}
    options |= {"normalized_shape": case.channels} if rows else {"channel_axis": case.channel_axis}
    if case.norm == "group":
        options["num_groups"] = case.groups
    if case.pass_ == "backward":
        statistics: tuple[Array, ...] = ()
        if case.norm == "batch":
            statistics = functional.batch_norm_stats(x, channel_axis=case.channel_axis)[:2]
        backward = getattr(functional, f"{case.norm}_norm_backward")
        return partial(backward, grad_output, x, *statistics, **options)
    if case.norm != "rms":
        options["bias"] = np.zeros(case.channels, np.float32)
    running: tuple[Array, ...] = ()
    if case.norm == "batch":
        # Not np.zeros: its pages are new when they are first written to, and would count.
        running = (np.full(case.channels, 0, np.float32), np.ones(case.channels, np.float32))
        options["training"] = case.pass_ == "training"
    return partial(getattr(functional, f"{case.norm}_norm"), x, *running, **options)


if __name__ == "__main__":
    main()
