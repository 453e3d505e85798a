"""The example that folds the digits network."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

if os.environ.get("CBN_REQUIRE_SERVICE") != "1":  # in CI a missing package is an error
    for name in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(name, reason=f'{name} is missing: pip install ".[examples]"')

from digits_network import DigitsNetwork
from fold_digits import fold

SCRIPT = Path(__file__).parents[1] / "examples" / "fold_digits.py"


def test_the_folded_network_has_no_norm_layers_and_computes_the_same(rng):
    network = DigitsNetwork(seed=1)
    for _ in range(3):
        network.forward(rng.random((8, 1, 8, 8), np.float32))  # moves the statistics
    images = rng.random((5, 1, 8, 8), np.float32)
    folded = fold(network.eval())
    assert not any(name.startswith("norm") for name in folded.layers)
    # Float32 in another order: some units of the last place of the logits, which are about 1.
    np.testing.assert_allclose(folded.forward(images), network.forward(images), atol=1e-5)


def test_the_program_in_short():
    done = run_python(SCRIPT, "--epochs", "1", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    assert "Same predictions: 360 of 360 test images" in done.stdout
    difference = float(re.search(r"difference of logits: (\S+)", done.stdout)[1])
    assert 0 < difference < 1e-4
    assert re.search(r"Time before: [\d.]+ ms, after: [\d.]+ ms", done.stdout)
