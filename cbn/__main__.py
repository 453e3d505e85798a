"""``python -m cbn``: what runs here, what is wrong with it, and a self-test.

Packages named as arguments are imported before cbn, for what only they bring: pools of threads, or
subnormal numbers switched off. The exit status is 1 where there is trouble.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from cbn import _dispatch, _pools, _processors, _self_test, _threads, show_config


def main() -> None:
    """Report on this process, or on one that imports other packages first."""
    parser = argparse.ArgumentParser(
        prog="python -m cbn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", nargs="*", help="to import first, such as torch")
    parser.add_argument("--no-self-test", action="store_true", help="look only")
    arguments = parser.parse_args()
    if arguments.packages:
        # By now cbn has its OpenMP runtime. It takes one that is there, so the order matters.
        imports = "".join(f"import {package}\n" for package in arguments.packages)
        call = f"from cbn.__main__ import report\nreport({not arguments.no_self_test})"
        raise SystemExit(subprocess.run([sys.executable, "-c", imports + call]).returncode)
    report(not arguments.no_self_test)


def report(self_test: bool) -> None:
    """Print, and exit."""
    show_config()
    found = list(troubles())
    if self_test:
        print("self-test")
        for isa, faults in _self_test.self_test():
            print(f"  {isa:<16}{'wrong' if faults else 'right'}")
            found += [f"{isa} computes wrong results: {fault}" for fault in faults]
    print("trouble")
    for trouble in found or ["none found"]:
        print(f"  {trouble}")
    raise SystemExit(bool(found))


def troubles() -> Iterator[str]:
    """What is likely to make cbn slow or wrong in this process, and the remedy."""
    threads, because = _threads.process_wide()
    quota = _processors.quota()
    if quota is not None and threads > math.ceil(quota):
        yield (
            f"{threads} threads ({because}) share a quota of {quota:g} CPUs and will be paused "
            f"together: set CBN_NUM_THREADS={math.ceil(quota)}"
        )
    if threads > _processors.affinity():
        yield (
            f"{threads} threads ({because}) on {_processors.affinity()} CPUs wait for each other: "
            f"set CBN_NUM_THREADS={_processors.affinity()}"
        )
    yield from troubles_of_pools(_pools.loaded())
    if np.float32(1e-39) * np.ones(1, np.float32) == 0:
        yield (
            "subnormal numbers are switched off in this thread, by a package built with "
            "-ffast-math or by torch.set_flush_denormal: results near 1e-38 differ from elsewhere"
        )
    if not _dispatch.kernels.forks():
        yield (
            "a forked child runs on one thread: needs GNU OpenMP of gcc 9 or newer, or LLVM's or "
            "Intel's without KMP_INIT_AT_FORK=FALSE, which scikit-learn sets when imported"
        )
    if _dispatch.kernels.openmp() is None:
        yield "built without OpenMP, one thread only: build again with a compiler that has it"
    if missing := [isa for isa in _dispatch.supported_by_cpu() if isa not in _dispatch.built()]:
        yield f"not built for {missing[0]}, which this CPU has: build again from source"


def troubles_of_pools(pools: dict[str, _pools.Pool]) -> Iterator[str]:
    """What some pools do to others. That there are several is no trouble: cbn gives way to them."""
    if _pools.RIVALS.issubset(pool.library for pool in pools.values()):
        rivals = [file for file, pool in pools.items() if pool.library in _pools.RIVALS]
        yield (
            f"the OpenMP runtimes of {' and '.join(sorted(_pools.RIVALS))} in one process, which "
            f"may end or hang it: {', '.join(rivals)}; import only packages with the same"
        )
    openmp = _dispatch.kernels.openmp()
    waiting = "" if openmp is None else _pools.waiting(openmp[0])
    if len(pools) > 1 and re.fullmatch(r"\w+=(active|infinit[ey])", waiting, re.IGNORECASE):
        yield (
            f"{waiting} lets the threads of cbn's OpenMP spin all the time, which keeps CPUs from "
            "the threads of other libraries: leave it unset"
        )


if __name__ == "__main__":
    main()
