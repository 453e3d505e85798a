"""memory.py measures what it says: a known allocation, and a call of cbn in its own process."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
from memory import TENTH, in_own_process, taken

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


@pytest.mark.parametrize(
    ("norm", "layout", "pass_", "shape"),
    [
        ("layer", "NC", "backward", (1 << 22, 2)),
        ("instance", "NCHW", "forward", (512, 8192, 1, 2)),
        ("instance", "NCHW", "backward", (512, 8192, 1, 2)),
        ("instance", "NHWC", "backward", (512, 1, 2, 8192)),
        ("group", "NCHW", "backward", (512, 8192, 1, 2)),
        ("batch", "NC", "inference", (8, 1 << 20)),
    ],
)
def test_channels_of_few_values(norm: str, layout: str, pass_: str, shape: tuple[int, ...]) -> None:
    """What is found of millions of channels takes no more than a tenth of their values."""
    case = (norm, layout, pass_, shape)
    most, _ = in_own_process(case, "function out=", Namespace(threads=2))
    assert most < TENTH * 4 * np.prod(shape)
