"""memory.py measures what it says: a known allocation, and a call of cbn in its own process."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
from memory import in_own_process, taken

MEGABYTE = 1 << 20


def test_a_known_allocation() -> None:
    """What is freed before the end counts as taken, what is returned as kept."""

    def call() -> object:
        np.ones(64 * MEGABYTE, np.uint8)
        return np.ones(16 * MEGABYTE, np.uint8)

    most, kept = taken(call)
    assert abs(most - 64 * MEGABYTE) < 2 * MEGABYTE
    assert abs(kept - 16 * MEGABYTE) < 2 * MEGABYTE


def test_a_call() -> None:
    """Inference writes into the array that it is given and takes next to nothing."""
    case = ("batch", "NCHW", "inference", (40, 64, 56, 56))
    most, kept = in_own_process(case, "layer out=", Namespace(threads=1))
    assert max(most, kept) < MEGABYTE
