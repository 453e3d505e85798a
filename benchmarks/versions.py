"""How this version of cbn compares with another, in one process.

    git worktree add ../other 7dcffdc
    (cd ../other && python setup.py build_ext --inplace)
    python benchmarks/versions.py ../other
    python benchmarks/versions.py ../other --threads 2 --norms layer rms --runs 3

The cases are compare.py's, of layers and float32, each with its output allocated once, but for
those of more than ``--largest`` values. They are timed in turns (turns.py says how). A number is
the other version's time over this one's, the median of all runs: above 1, this one is faster.
Geometric means are printed by norm, pass and layout, and the cases that this one is slower in.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median
from types import ModuleType
from typing import Any

import numpy as np
from shapes import NORMS, Case, all_cases, make_data
from turns import time_in_turns

import cbn
from cbn import _dispatch

SLOWER = 0.95  # what is below is listed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, help="of the other version, built in place")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="over all cases (default: %(default)s)")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--largest", type=int, default=16_000_000, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a handful of shapes")
    arguments = parser.parse_args()
    other = load(arguments.tree.resolve())
    _dispatch.kernels.calls().judges = False  # a team wherever it is asked for
    for version in (cbn, other):
        version.set_num_threads(arguments.threads)
    # A layer has no other form for small cases, nor layer norm for another layout.
    cases = dict.fromkeys(
        Case(case.norm, "", case.pass_, case.layout, case.shape)
        for case in all_cases(norms=arguments.norms, quick=arguments.quick)
        if case.values <= arguments.largest
    )
    ratios: dict[Case, list[float]] = {case: [] for case in cases}
    for run in range(arguments.runs):
        for done, case in enumerate(cases):
            ratios[case].append(ratio(other, case))
            print(f"\rrun {run + 1}: {done + 1} of {len(cases)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    report({case: median(values) for case, values in ratios.items()})


def load(tree: Path) -> ModuleType:
    """Another cbn, beside the one that is imported already."""
    ours = take_modules()
    sys.path.insert(0, str(tree))
    try:
        other = import_module("cbn")
    finally:
        sys.path.pop(0)
        take_modules()
        sys.modules.update(ours)
    if Path(str(other.__file__)).parent.parent != tree:
        raise SystemExit(f"tree: expected a cbn built in {tree}, got {other.__file__}")
    return other


def take_modules() -> dict[str, ModuleType]:
    """Let Python forget the modules of a cbn, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "cbn"]
    return {name: sys.modules.pop(name) for name in names}


def ratio(other: ModuleType, case: Case) -> float:
    """The time of the other version over that of this one."""
    x, grad_output, *_ = make_data(case)
    out = np.zeros_like(x)
    calls: dict[str, Callable[[], object]] = {}
    for name, version in (("other", other), ("this", cbn)):
        layer = layer_for(version, case)
        layer(x)
        calls[name] = partial(layer.train(case.pass_ != "inference"), x, out)
        if case.pass_ == "backward":
            calls[name] = partial(layer.backward, grad_output, out)
    timings = time_in_turns(calls, 0)
    return timings["other"].median / timings["this"].median


def layer_for(version: Any, case: Case) -> Any:
    """The layer of a version that a case is of."""
    channels, axis = case.channels, case.channel_axis
    if case.norm == "layer":
        return version.LayerNorm(case.shape[-1])
    if case.norm == "rms":
        return version.RMSNorm(case.shape[-1])
    if case.norm == "group":
        return version.GroupNorm(case.groups, channels, channel_axis=axis)
    if case.norm == "instance":
        return version.InstanceNorm2d(channels, affine=True, channel_axis=axis)
    if case.layout == "NC":
        return version.BatchNorm1d(channels)
    return version.BatchNorm2d(channels, channel_axis=axis)


def report(ratios: dict[Case, float]) -> None:
    """Print geometric means, and what is slower."""
    groups: dict[str, list[float]] = defaultdict(list)
    for case, value in ratios.items():
        groups[case.group].append(value)
    for group, values in groups.items():
        slower = sum(value < SLOWER for value in values)
        print(
            f"{group:<28}{len(values):>5} cases {geometric_mean(values):>6.2f}, worst "
            f"{min(values):.2f}, {slower} below {SLOWER}"
        )
    for value, case in sorted((value, str(case)) for case, value in ratios.items()):
        if value < SLOWER:
            print(f"{value:.2f} {case}")


if __name__ == "__main__":
    main()
