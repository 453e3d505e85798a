"""Latency of inference in a service with many request threads, and the threads that it ends with.

    python benchmarks/request_threads.py
    python benchmarks/request_threads.py --callers 16 --pause 5 --seconds 10

Each request thread normalises the activations of one image by the first, a middle and the last
batch norm layer of ResNet-50, again and again, with a pause between requests if there is one.
"""

from __future__ import annotations

import argparse
import os
import threading
from time import perf_counter, sleep

import numpy as np

import cbn

SHAPES = [(1, 64, 112, 112), (1, 256, 28, 28), (1, 2048, 7, 7)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--callers", type=int, default=16, help="request threads")
    parser.add_argument("--pause", type=float, default=0.0, help="milliseconds between requests")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES]
    layers = [cbn.BatchNorm2d(x.shape[1]).eval() for x in inputs]
    latencies: list[float] = []
    end = perf_counter() + arguments.seconds

    def serve() -> None:
        outputs = [np.empty_like(x) for x in inputs]
        while (start := perf_counter()) < end:
            for layer, x, out in zip(layers, inputs, outputs, strict=True):
                layer(x, out)
            latencies.append(perf_counter() - start)
            sleep(arguments.pause * 1e-3)

    callers = [threading.Thread(target=serve) for _ in range(arguments.callers)]
    for caller in callers:
        caller.start()
    sleep(arguments.seconds * 0.9)
    threads = len(os.listdir("/proc/self/task"))
    for caller in callers:
        caller.join()
    p50, p99 = np.quantile(latencies, [0.5, 0.99]) * 1e3
    print(
        f"{arguments.callers} callers, pause {arguments.pause:g} ms: "
        f"{len(latencies) / arguments.seconds:.0f} requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms; "
        f"{threads} threads in the process"
    )


if __name__ == "__main__":
    main()
