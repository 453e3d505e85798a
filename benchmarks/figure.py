"""The figure of the README, from the numbers that compare.py measured.

python benchmarks/figure.py results.json speed.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import matplotlib
from report import ratio, share_of_limit

matplotlib.use("Agg")

import matplotlib.pyplot as plt

Record = dict[str, Any]

PEER = "PyTorch"
COLOURS = {"training": "tab:blue", "inference": "tab:orange", "backward": "tab:green"}
MARKERS = {"NCHW": "o", "NHWC": "s", "NC": "^"}


def draw(records: Sequence[Record], machine: Record, path: Path) -> None:
    """Draw speed-up by shape and share of the limit by size, at the largest number of threads.

    Parameters
    ----------
    records : sequence of dict
        Those of compare.py, of which those of batch norm are drawn.
    machine : dict
        Its description of the machine.
    path : Path
        The image; its suffix says of which kind.
    """
    threads = max(record["threads"] for record in records)
    records = [record for record in records if record["threads"] == threads]
    records = [record for record in records if record["norm"] == "batch" and not record["out"]]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.5), width_ratios=(1, 1.2), layout="constrained"
    )
    speed_up(left, records)
    limit(right, records)
    versions = ", ".join(" ".join(library) for library in machine["libraries"].items())
    figure.suptitle(
        f"float32, threads: {threads}; {machine['cpu']}, {machine['instruction set']}; {versions}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def speed_up(axes: Any, records: Sequence[Record]) -> None:
    """Draw the shapes of the first family, one per line, with as many samples as there are."""
    family = records[0]["family"]
    records = [record for record in records if record["family"] == family]
    largest: dict[tuple[int, ...], int] = {}
    for record in records:
        N, *rest = channels_first(record)
        largest[tuple(rest)] = max(N, largest.get(tuple(rest), 0))
    rows: dict[str, int] = {}
    for record in records:
        N, *rest = channels_first(record)
        speed_up = ratio(record, PEER)
        if speed_up and largest[tuple(rest)] == N:
            row = rows.setdefault("x".join(map(str, [N, *rest])), len(rows))
            axes.plot(speed_up, row, MARKERS[record["layout"]], **style(record))
    axes.axvline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel=f"speed-up over {PEER}", title=family)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.invert_yaxis()
    ticks = [0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def limit(axes: Any, records: Sequence[Record]) -> None:
    """Draw the share of the limit against the size of an array."""
    for record in records:
        share = share_of_limit(record)
        if share is not None:
            size = 4 * prod(record["shape"]) / 2**20
            axes.plot(size, share, MARKERS[record["layout"]], **style(record))
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(
        xscale="log",
        ylim=(0, None),
        xlabel="size of the array, MiB",
        ylabel="time of a copy / time of cbn",
        title="share of the limit",
    )
    axes.grid(alpha=0.3)
    for pass_, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=pass_)
    for layout, marker in MARKERS.items():
        axes.plot([], [], marker, color="grey", fillstyle="none", label=layout)
    axes.legend(fontsize="small", ncols=2)


def channels_first(record: Record) -> list[int]:
    """The shape as (N, C, ...)."""
    N, *rest = record["shape"]
    return [N, rest[-1], *rest[:-1]] if record["layout"] == "NHWC" else [N, *rest]


def style(record: Record) -> dict[str, Any]:
    """How a point looks."""
    return {"color": COLOURS[record["pass"]], "fillstyle": "none", "markersize": 5}


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    draw(results["cases"], results["machine"], Path(sys.argv[2]))
