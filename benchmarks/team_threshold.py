"""From how many values on a team of threads is faster than one thread.

    python benchmarks/team_threshold.py
    python benchmarks/team_threshold.py --threads 4 --passes inference backward

cbn gives a call a team where it has SERIAL_BELOW values or more (cbn/_threads.py); training counts
its input twice, backward three times. Here every pass is timed on one thread and with a team, at
sizes below that number and above it, in turns and with out= (turns.py says how; the team's threads
are awake). A number in the table is the time on one thread over that of the team. At the end of a
row is the number of values, counted so, from which on the team is faster at every size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np
from turns import time_in_turns

import cbn
from cbn import _dispatch

SIZES = [size for k in range(13, 19) for size in (1 << k, 3 << k - 1)]  # values of x
# How often a pass counts the values of x, if there is more than one tile to reduce.
COUNTS = {"inference": 1, "training": 2, "backward": 3}
# By a word, the shape of x without what makes it so large, which is -1, and its norm.
FORMS: dict[str, tuple[tuple[int, ...], Callable[[tuple[int, ...]], cbn.layers.NormLayer]]] = {
    "batch 1xCx16x16": ((1, -1, 16, 16), lambda shape: cbn.BatchNorm2d(shape[1])),
    "batch Nx32x8x8": ((-1, 32, 8, 8), lambda shape: cbn.BatchNorm2d(shape[1])),
    "batch Nx8x8x32": ((-1, 8, 8, 32), lambda shape: cbn.BatchNorm2d(shape[-1], channel_axis=-1)),
    "batch Nx64": ((-1, 64), lambda shape: cbn.BatchNorm1d(shape[1])),
    "layer Nx64": ((-1, 64), lambda shape: cbn.LayerNorm(shape[1])),
    "layer Nx512": ((-1, 512), lambda shape: cbn.LayerNorm(shape[1])),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of the team (default: %(default)s)")
    parser.add_argument("--passes", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each size")
    arguments = parser.parse_args()
    cbn.set_num_threads(arguments.threads)
    _dispatch.kernels.calls().judges = False  # a team wherever it is asked for
    instruction_set = cbn.show_config(mode="dicts")["instruction set"]["active"]
    print(f"threads: {arguments.threads}; {instruction_set}; float32")
    print(f"{'values of x':<28}" + "".join(f"{size:>8}" for size in SIZES) + f"{'counted':>9}")
    for form in arguments.forms:
        for pass_ in arguments.passes:
            if "layer" in form and pass_ == "inference":
                continue
            ratios = [ratio(form, pass_, size, arguments.seconds) for size in SIZES]
            slow = [size for size, value in zip(SIZES, ratios, strict=True) if value <= 1]
            faster = [size for size in SIZES if size > max(slow, default=0)]
            counted = COUNTS[pass_] * faster[0] if faster else "-"
            cells = "".join(f"{value:8.2f}" for value in ratios)
            print(f"{form + ' ' + pass_:<28}{cells}{counted:>9}", flush=True)


def ratio(form: str, pass_: str, size: int, seconds: float) -> float:
    """The time of a pass on one thread over that with a team."""
    pattern, layer_for = FORMS[form]
    size -= size % -prod(pattern)
    x, grad_output = np.random.default_rng(0).standard_normal((2, size), dtype=np.float32)
    x = x.reshape(pattern)
    layer = layer_for(x.shape).train(pass_ != "inference")
    y = layer(x)
    call = partial(layer, x, y)
    if pass_ == "backward":
        call = partial(layer.backward, grad_output.reshape(pattern), np.empty_like(x))

    def run(serial_below: int) -> None:
        _dispatch.kernels.take_threads_from(cbn.get_num_threads, serial_below)
        call()

    calls = {"team": partial(run, 0), "one": partial(run, COUNTS[pass_] * size + 1)}
    timings = time_in_turns(calls, seconds)
    return timings["one"].median / timings["team"].median


if __name__ == "__main__":
    main()
