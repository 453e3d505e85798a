"""Suites for pytest-benchmark: cbn alone, to follow it from one commit to the next.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare
pytest benchmarks --benchmark-disable    # every case once, checked, untimed
"""

from __future__ import annotations

from typing import Any

import pytest
from check import check, expected
from peers_numpy import Cbn
from shapes import Case, all_cases, make_data

import cbn

CASES = all_cases(("resnet_50",), quick=True) + all_cases(("features", "small"))
CASES += all_cases(("rows", "feature_maps", "images"), quick=True)
# Sizes that keep a run without timing to seconds.
LARGEST = 1 << 22


def suite(pass_: str) -> pytest.MarkDecorator:
    """Return the cases of a pass as parameters."""
    cases = [case for case in CASES if case.pass_ == pass_ and case.values <= LARGEST]
    return pytest.mark.parametrize("case", cases, ids=str)


def measure(benchmark: Any, case: Case) -> None:
    """Check a case and time it."""
    data = make_data(case)
    call = Cbn().call(case, data)
    check("cbn", case, call.results(call.run()), *expected(case, data))
    benchmark.group = str(case)
    benchmark.extra_info.update(
        bytes=case.bytes,
        threads=cbn.get_num_threads(),
        isa=cbn.show_config(mode="dicts")["instruction set"]["active"],
    )
    benchmark(call.run)


@suite("training")
def test_training(benchmark: Any, case: Case) -> None:
    """Forward by the statistics of the batch."""
    measure(benchmark, case)


@suite("inference")
def test_inference(benchmark: Any, case: Case) -> None:
    """Forward by the running statistics."""
    measure(benchmark, case)


@suite("forward")
def test_forward(benchmark: Any, case: Case) -> None:
    """Forward by the statistics of the input, in norms that have no others."""
    measure(benchmark, case)


@suite("backward")
def test_backward(benchmark: Any, case: Case) -> None:
    """Gradients through the statistics of the input."""
    measure(benchmark, case)
