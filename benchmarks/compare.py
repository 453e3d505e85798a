"""Compare cbn with what else computes norms on the CPU (peers.py has the list), and with the limit.

    python benchmarks/compare.py --quick
    python benchmarks/compare.py --threads 1 2 --json results.json --figure speed.png
    python benchmarks/compare.py --norms layer rms group instance --layout NC NCHW --threads 2
    python benchmarks/compare.py --shapes 32x64x56x56 4096x768 --layout NCHW NC --markdown
    python benchmarks/compare.py --quick --dtypes float32 bfloat16 float16 --peers PyTorch
    python benchmarks/compare.py --family feature_maps --norms batch --steps none relu add-relu

Whatever is installed takes part; with data of half types cbn and PyTorch alone, whose parameters
stay float32. Every result is checked against cbn.reference, then the libraries are timed turn by
turn in this one process (turns.py says how), with the same number of threads (NumPy always has
one), and a table is printed: median time, GB/s, how many times as long each other
library takes, and the share of the limit, which is what a mere copy of the same arrays would leave
of the time (scale_copy.c). GB/s count what a pass must move at least: one read and one write, for
backward two reads and one write; a residual is one more, and so is its gradient. With steps that go
along with a batch norm (--steps), others take theirs one after the other or as their compiler fuses
them, and what a step costs in cbn's pass is printed at the end.

Every call allocates its output, as a user's call does, except in the rows marked out=. Fresh memory
would cost each a page fault per 4 KiB, which can take longer than the computation and depends on
the allocator alone. So the program first starts itself again with a C library that keeps freed
memory (the variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and
MALLOC_ARENA_MAX are read when a process starts), and each case begins with free memory for some
outputs that has been written to before, whichever library asks for it.
The page faults left over are in the JSON file, for every library and case.

What a library does once, for a case, is not in the times: torch.compile, ONNX Runtime, OpenVINO and
JAX compile a graph. How long everybody takes from a case to its first result is printed at the end.
torch.compile keeps what it has compiled on the disk, for the next run.

A row ends in * where other processes took more than a tenth of a core meanwhile. With as many
threads as cores that slows most what waits for its slowest thread, cbn and PyTorch among them;
measure again, or with --passive.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from check import check, expected
from figure import draw
from limit import ORDINARY, STREAMING, Limit
from peers import PEERS
from peers_base import Peer
from report import (
    print_first_calls,
    print_header,
    print_markdown,
    print_row,
    print_steps,
    print_summary,
)
from shapes import DTYPES, FAMILIES, LAYOUTS, NORMS, PASSES, STEPS, Case, all_cases, make_data
from tqdm import tqdm
from turns import OtherWork, release_heap, time_in_turns, warm_heap

import cbn

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",  # for JAX, whose threads would have heaps of 64 MB at most
}
Record = dict[str, Any]


def main() -> None:
    """Measure what the command line asks for."""
    arguments = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # a row when it is there, into a file too
    start_with(
        HEAP
        | xla(max(arguments.threads))
        | ({"OMP_WAIT_POLICY": "passive"} if arguments.passive else {})
    )
    cases = all_cases(
        arguments.family,
        arguments.pass_,
        arguments.layout,
        arguments.quick,
        arguments.norms,
        arguments.shapes,
        arguments.dtypes,
        arguments.steps,
    )
    if arguments.figure and not any(case.norm == "batch" for case in cases):
        sys.exit("--figure: there is no case of batch norm to draw")
    peers = installed(arguments.peers)
    limit = compiled_limit()
    machine = describe(peers, limit)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))

    records = []
    progress = tqdm(total=len(cases) * len(arguments.threads), unit="case", file=sys.stderr)
    for threads in arguments.threads:
        ready = [peer for peer in peers if peer.set_num_threads(threads)]
        for peer in peers:
            if peer not in ready:
                tqdm.write(f"{peer.name}: left out, it cannot change to {threads} threads")
        print_header([peer.name for peer in ready], threads)
        for case in cases:
            progress.set_postfix_str(str(case))
            record = measure(case, ready, limit, threads, arguments.seconds)
            print_row(record, [peer.name for peer in ready])
            records.append(record)
            progress.update()
    progress.close()

    print_summary(records)
    print_steps(records)
    print_first_calls(records)
    if arguments.markdown:
        print_markdown(records, [peer.name for peer in peers])
    machine["load after"] = os.getloadavg()[0]
    machine["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\npeak memory: {machine['peak memory, GB']:.2f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1))
    if arguments.figure:
        draw(records, machine, arguments.figure)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    names = [peer.name for peer in PEERS[1:]]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a handful of shapes only")
    add("--norms", nargs="+", choices=NORMS, default=list(NORMS), help="norms")
    add("--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="tables of shapes")
    add("--pass", nargs="+", choices=PASSES, default=PASSES, dest="pass_", help="passes")
    add("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="layouts")
    add("--shapes", nargs="+", default=(), metavar="NxCx...", help="of those, these shapes only")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of data")
    add("--steps", nargs="+", choices=STEPS, default=["none"], help="along with batch norm")
    add("--peers", nargs="*", choices=names, default=names, help="libraries beside cbn")
    add("--threads", nargs="+", type=int, default=[len(os.sched_getaffinity(0))], metavar="N")
    add("--passive", action="store_true", help="waiting threads sleep: for a machine that is busy")
    add("--seconds", type=float, default=1.0, help="time for each case (default: %(default)s)")
    add("--markdown", action="store_true", help="print the numbers as a table in Markdown, too")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--figure", type=Path, metavar="FILE", help="draw what was found of batch norm")
    return parser.parse_args()


def start_with(environment: dict[str, str]) -> None:
    """Start this program again, once, unless these variables are set already."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        print("starting again with", *(f"{name}={value}" for name, value in environment.items()))
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment})


def xla(threads: int) -> dict[str, str]:
    """Variables that give JAX's thread pool its size."""
    eigen = "true" if threads > 1 else "false"
    return {"NPROC": str(threads), "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={eigen}"}


def installed(names: list[str]) -> list[Peer]:
    """Return cbn and those of the named libraries that are there."""
    peers = []
    for peer in PEERS:
        if peer.name == "cbn" or peer.name in names:
            if missing := peer.missing():
                print(f"{peer.name}: left out, not installed: {', '.join(missing)}")
            else:
                peers.append(peer())
    return peers


def compiled_limit() -> Limit | None:
    """Return the scale-copy, or None with a note where it cannot be compiled."""
    try:
        return Limit(cbn.show_config(mode="dicts")["instruction set"]["active"])
    except FileNotFoundError:
        print("limit: left out, there is no gcc")
    except subprocess.CalledProcessError as error:
        print(f"limit: left out, gcc says: {error.stderr}")
    return None


def measure(
    case: Case, peers: list[Peer], limit: Limit | None, threads: int, seconds: float
) -> Record:
    """Check all libraries on a case, then time them."""
    release_heap()
    data = make_data(case)
    channels, right = expected(case, data)
    runs, first_calls = {}, {}
    for peer in peers:
        begin = perf_counter()
        if peer.takes(case) and (call := peer.call(case, data)):
            result = call.run()
            first_calls[peer.name] = perf_counter() - begin
            check(peer.name, case, call.results(result), channels, right)
            del result
            runs[peer.name] = call.run
    limits = limit.calls(case, data, threads) if limit else {}
    runs |= limits
    warm_heap(4 * case.values)
    with OtherWork() as other_work:
        timings = time_in_turns(runs, seconds)
    record = {
        "norm": case.norm,
        "family": case.family,
        "pass": case.pass_,
        "layout": case.layout,
        "shape": case.shape,
        "dtype": case.dtype,
        "steps": case.steps,
        "out": case.reuses_out,
        "group": case.group,
        "threads": threads,
        "bytes": case.bytes,
        "other work": other_work.cores,
        "first calls": first_calls,
        "libraries": {name: timing._asdict() for name, timing in timings.items()},
    }
    if limits:
        record["limit"] = min(timings[STREAMING].median, timings[ORDINARY].median)
    return record


def describe(peers: list[Peer], limit: Limit | None) -> Record:
    """Return what the numbers depend on."""
    config = cbn.show_config(mode="dicts")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    variables = ("OMP_", "GOMP_", "KMP_", "CBN_", "MALLOC_", "NPROC", "XLA_FLAGS")
    return {
        "cpu": models[0] if models else config["versions"]["platform"],
        "cores": len(os.sched_getaffinity(0)),
        "load before": os.getloadavg()[0],
        "python": config["versions"]["python"],
        "libraries": {peer.name: peer.version for peer in peers},
        "instruction set": config["instruction set"]["active"],
        # By name. One is shared by all who are linked to it.
        "openmp": [
            Path(file).name for file, pool in config["pools"].items() if pool["api"] == "OpenMP"
        ],
        "flags of the limit": " ".join(limit.flags) if limit else None,
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(variables)
        },
        "numpy": np.show_config(mode="dicts")["SIMD Extensions"],
    }


if __name__ == "__main__":
    main()
