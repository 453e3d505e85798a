"""For all tests: random numbers, comparing, instruction sets, torch; and how hypothesis draws."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from tolerances import CLOSE

from cbn import _dispatch, _threads

# Tests ask for teams of threads and must get them, on a busy machine and for small arrays.
_dispatch.kernels.calls().judges = False
SERIAL_BELOW = 16_384
_dispatch.kernels.take_threads_from(_threads.get_num_threads, SERIAL_BELOW)

# The same examples at every run: what fails here fails everywhere; and nothing by the clock.
settings.register_profile(
    "cbn",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cbn")

pytest.register_assert_rewrite("refusals")  # so that its failures show both texts


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture(scope="session")
def assert_close():
    def assert_close(quantity, actual, expected, dtype, more=0.0):
        """Compare at the tolerance of dtype, the element type of the data, and a little more."""
        if expected is None:
            assert actual is None, f"{quantity}: expected None"
            return
        assert np.shape(actual) == np.shape(expected), f"{quantity}: shapes differ"
        rtol, atol = CLOSE[np.dtype(dtype).name].values()
        if np.dtype(dtype).itemsize == 2:  # NumPy compares no bfloat16
            actual, expected = np.asarray(actual, float), np.asarray(expected, float)
        np.testing.assert_allclose(actual, expected, rtol, atol + more, err_msg=quantity)

    return assert_close


@pytest.fixture
def use_isa():
    """A function that makes calls compute on an instruction set, until the test ends."""
    yield _dispatch.use
    _dispatch.use(_dispatch.active)


@pytest.fixture
def use_threads():
    """A function that makes calls ask for so many threads, however small, until the test ends."""
    take = _dispatch.kernels.take_threads_from
    yield lambda num_threads: take(lambda: num_threads, 0)
    take(_threads.get_num_threads, SERIAL_BELOW)


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
