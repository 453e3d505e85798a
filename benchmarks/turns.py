"""Timing calls side by side: turn by turn in one process.

A turn is a burst of calls of each library, one library after the other, each turn beginning with
the next one. A burst is

- untimed calls for 20 ms, at least one, and then
- samples for 20 ms, at least one: single calls, or as many as take 100 us together.

The number that counts is the median of the samples of all turns. The untimed calls are there for
the thread pools. Between calls the threads of a pool spin, waiting for more work: those of GNU
OpenMP for 3 to 17 ms, depending on the CPU. One pool that spins takes a core from the next library;
one that has gone to sleep must be woken. After 20 ms of its own calls every library has its own
pool awake, all others asleep, and its data in the caches as far as it fits.

What else was tried, on a virtual machine with 2 cores, GNU OpenMP and ONNX Runtime 1.31, for
inference of 64 x 32 x 32 float32 values on two threads (30 us with nothing else around):

- An idle gap of 20 ms before each library, then one untimed call: 4 ms. The thread that wakes is
  put on the core of the one that waits for it spinning, and runs when the scheduler parts them.
- OMP_WAIT_POLICY=passive, no spinning: 45 to 60 us, for the wake-up of a thread at every call.
  Nobody runs these libraries so unless told to, which is why it is not the default. On a machine
  that is busy with other work it is the better choice: there, spinning made it 9 ms. The option
  --passive sets it, and the same for ONNX Runtime.
- Single calls in turn, without a burst: 40 us, with the last library's data in the caches, and
  with ONNX Runtime 1.4 times as slow after a call of cbn as after one of its own.

PyTorch, oneDNN, cbn and the limit share one OpenMP and its pool where PyTorch's library has the
usual name (libgomp.so.1): the process then loads it once. compare.py prints those it found.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Mapping
from itertools import repeat
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter
from typing import NamedTuple, Self

import numpy as np

UNTIMED = 0.02
TIMED = 0.02
SAMPLE = 1e-4
MIN_TURNS = 3


class Timing(NamedTuple):
    """Seconds per call: the median and the quartiles; and how they came about."""

    median: float
    quartiles: tuple[float, float]
    samples: int
    calls_per_sample: int
    page_faults: float  # per call


class OtherWork:
    """How many cores other processes used within a ``with`` block, as far as Linux says."""

    cores = 0.0

    def __enter__(self) -> Self:
        """Begin."""
        self._begin = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        """End."""
        seconds, everyone, here = np.subtract(self._now(), self._begin)
        self.cores = float(max(0.0, everyone - here) / seconds)

    def _now(self) -> tuple[float, float, float]:
        own = os.times()
        stat = Path("/proc/stat")
        if not stat.exists():
            return own.elapsed, 0.0, 0.0
        user, nice, system, _, _, *interrupts_and_stolen = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + sum(interrupts_and_stolen)
        return own.elapsed, ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


def release_heap() -> None:
    """Give back what the last case left free, so that cases do not add up."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU
    if trim:
        trim(0)


def warm_heap(bytes_: int) -> None:
    """Make the heap hold three free outputs in a row, in memory that is already there.

    PyTorch asks for aligned memory. The C library (GNU before 2.38) finds no such block where the
    last one was freed if a few bytes next to it are in use, and takes fresh pages instead, whose
    faults take longer than the computation. In a larger free block it finds a place.
    """
    np.empty(3 * bytes_ + (1 << 22), np.uint8).fill(0)


def time_in_turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time calls side by side.

    Parameters
    ----------
    calls : mapping of str to callable
        What to call, by name.
    seconds : float
        When to stop, after at least three turns.

    Returns
    -------
    dict of str to Timing
        By name.
    """
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in order}
    sizes = {name: calls_per_sample(call) for name, call in calls.items()}
    page_faults = dict.fromkeys(order, 0)
    turns, end = 0, perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while turns < MIN_TURNS or perf_counter() < end:
            for name in order:
                page_faults[name] += burst(calls[name], sizes[name], samples[name])
            order.append(order.pop(0))
            turns += 1
    finally:
        gc.enable()
    return {
        name: Timing(
            median(samples[name]),
            tuple(np.quantile(samples[name], (0.25, 0.75)).tolist()),
            len(samples[name]),
            sizes[name],
            page_faults[name] / (len(samples[name]) * sizes[name]),
        )
        for name in calls
    }


def calls_per_sample(call: Callable[[], object]) -> int:
    """How many calls take as long as a sample should."""
    call()
    start = perf_counter()
    call()
    return max(1, int(SAMPLE / (perf_counter() - start)))


def burst(call: Callable[[], object], size: int, samples: list[float]) -> int:
    """Add the samples of a burst and return its page faults."""
    end = perf_counter() + UNTIMED
    call()
    while perf_counter() < end:
        call()
    faults = getrusage(RUSAGE_SELF).ru_minflt
    now = perf_counter()
    end = now + TIMED
    while now < end:
        start = perf_counter()
        for _ in repeat(None, size):
            call()
        now = perf_counter()
        samples.append((now - start) / size)
    return getrusage(RUSAGE_SELF).ru_minflt - faults
