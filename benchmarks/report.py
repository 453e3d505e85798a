"""The table on the screen and the summary below it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import geometric_mean, median
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]


def ratio(record: Record, peer: str) -> float | None:
    """How many times as long a library takes as cbn; None where it has no such call."""
    libraries = record["libraries"]
    if peer not in libraries:
        return None
    return float(libraries[peer]["median"] / libraries["cbn"]["median"])


def share_of_limit(record: Record) -> float | None:
    """The time of the copy over that of cbn."""
    if "limit" not in record:
        return None
    return float(record["limit"] / record["libraries"]["cbn"]["median"])


def disturbed(record: Record) -> bool:
    """Whether other processes took more than a tenth of a core."""
    return float(record["other work"]) > 0.1


def name_of(record: Record) -> str:
    """The case in a word."""
    return f"{record['group']} " + "x".join(map(str, record["shape"]))


def print_header(names: Sequence[str], threads: int) -> None:
    """Print the first line of a table."""
    peers = "".join(f"{'/ ' + name:>15}" for name in names[1:])
    tqdm.write(f"\n{f'threads: {threads}':<36}{'cbn, us':>12}{'GB/s':>8}{peers}{'limit':>8}")


def print_row(record: Record, names: Sequence[str]) -> None:
    """Print a case."""
    median = record["libraries"]["cbn"]["median"]
    ratios = "".join(f"{_or_dash(ratio(record, name), '.2f'):>15}" for name in names[1:])
    share = _or_dash(share_of_limit(record), ".0%")
    mark = " *" if disturbed(record) else ""
    speed = record["bytes"] / median / 1e9
    tqdm.write(f"{name_of(record):<36}{median * 1e6:12.1f}{speed:8.1f}{ratios}{share:>8}{mark}")


def print_summary(records: Sequence[Record]) -> None:
    """Print means and worst cases by threads, pass and layout, then every loss."""
    groups = defaultdict(list)
    losses = []
    for record in records:
        for peer in record["libraries"]:
            value = ratio(record, peer)
            if value and peer != "cbn" and not peer.startswith("limit"):
                groups[record["threads"], record["group"], peer].append((value, record))
                if value < 1:
                    losses.append((value, peer, record))

    titles = f"{'threads':<8}{'norm, pass, layout':<34}{'peer':<14}{'cases':>6}"
    print(f"\n{titles}{'mean':>8}{'worst':>8}")
    for (threads, group, peer), members in sorted(groups.items()):
        mean = geometric_mean(value for value, _ in members)
        worst, record = min(members, key=lambda member: member[0])
        shape = "x".join(map(str, record["shape"]))
        print(
            f"{threads:<8}{group:<34}{peer:<14}{len(members):6}{mean:8.2f}{worst:8.2f}  at {shape}"
        )

    print(f"\ncases beside other work: {sum(map(disturbed, records))} of {len(records)}")
    print(f"losses (cbn takes longer): {len(losses)}")
    for value, peer, record in sorted(losses, key=lambda loss: loss[0]):
        print(f"  {value:.2f} of {peer}: {name_of(record)}, threads: {record['threads']}")


def print_steps(records: Sequence[Record]) -> None:
    """Print how many times as long a pass takes with steps as without."""
    keys = ("threads", "norm", "pass", "layout", "dtype", "out")
    alone = {(*(r[key] for key in keys), *r["shape"]): r for r in records if r["steps"] == "none"}
    groups = defaultdict(list)
    for record in records:
        without = alone.get((*(record[key] for key in keys), *record["shape"]))
        if record["steps"] != "none" and without:
            medians = [r["libraries"]["cbn"]["median"] for r in (record, without)]
            groups[record["threads"], record["group"]].append(medians[0] / medians[1])
    if groups:
        titles = f"{'threads':<8}{'cbn with steps over without':<34}{'cases':>6}"
        print(f"\n{titles}{'mean':>8}{'worst':>8}")
    for (threads, group), times in sorted(groups.items()):
        mean, worst = geometric_mean(times), max(times)
        print(f"{threads:<8}{group:<34}{len(times):6}{mean:8.2f}{worst:8.2f}")


def print_first_calls(records: Sequence[Record]) -> None:
    """Print the seconds that each library took from a case to its first result."""
    print("\nseconds to the first result: median, most")
    for name in dict.fromkeys(name for record in records for name in record["first calls"]):
        seconds = [r["first calls"][name] for r in records if name in r["first calls"]]
        print(f"  {name:<14}{median(seconds):8.3f}{max(seconds):8.3f}")


def print_markdown(records: Sequence[Record], names: Sequence[str]) -> None:
    """Print a row for each case: time and share of the limit, then how long the others take."""
    titles = ["threads", "pass", "shape", "cbn, us", "limit", *(f"/ {name}" for name in names[1:])]
    print("\n| " + " | ".join(titles) + " |")
    print("|--:|---|---|" + "--:|" * (len(titles) - 3))
    for record in records:
        cells = [
            str(record["threads"]),
            record["group"],
            "x".join(map(str, record["shape"])),
            f"{record['libraries']['cbn']['median'] * 1e6:.1f}",
            _or_dash(share_of_limit(record), ".0%").replace("%", " %"),
            *(_or_dash(ratio(record, name), ".2f") for name in names[1:]),
        ]
        print("| " + " | ".join(cells) + " |")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
