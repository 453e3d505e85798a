"""Fixtures of all tests: random numbers, torch, and the one table of tolerances."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cbn import _dispatch

# Tests ask for teams of threads and must get them, however busy the machine is.
_dispatch.kernels.calls().judges = False

pytest.register_assert_rewrite("refusals")  # so that its failures show both texts

# The defaults of torch.testing.assert_close: whoever compares cbn with PyTorch by PyTorch's own
# test function gets these. Every test compares at them and none widens them.
TOLERANCES = {
    "float32": {"rtol": 1.3e-6, "atol": 1e-5},
    "float64": {"rtol": 1e-7, "atol": 1e-7},
}


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture(scope="session")
def assert_close():
    def assert_close(quantity, actual, expected, dtype):
        """Compare at the tolerance of dtype, the element type of the data."""
        if expected is None:
            assert actual is None, f"{quantity}: expected None"
            return
        assert np.shape(actual) == np.shape(expected), f"{quantity}: shapes differ"
        tolerance = TOLERANCES[np.dtype(dtype).name]
        np.testing.assert_allclose(actual, expected, err_msg=quantity, **tolerance)

    return assert_close


@pytest.fixture(scope="session")
def other_library(tmp_path_factory):
    """The path of other_library.c, compiled."""
    if shutil.which("cc") is None:
        pytest.skip("compiles a library in C")
    target = tmp_path_factory.mktemp("other") / "library"
    source = Path(__file__).with_name("other_library.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-fopenmp", source, "-o", target], check=True)
    return str(target)


@pytest.fixture(scope="session")
def torch():
    if os.environ.get("CBN_REQUIRE_TORCH") == "1":
        torch = importlib.import_module("torch")
    else:
        torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its thread pool and that of cbn would compete for the same cores
    return torch
