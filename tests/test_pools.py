"""What show_config tells of pools of threads and of calls, and that PyTorch's OpenMP is cbn's too.

Most tests have a process of their own, in which only that is loaded which they name.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from processes import printed_by

import cbn
from cbn import _dispatch, _pools

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONFIG = "cbn.show_config('dicts')"
DEFAULT = "they spin for some milliseconds, then sleep (the runtime's default)"


def fresh(statements, expression=CONFIG, **environment):
    """The value of an expression in a new process, after some statements."""
    waiting = {name for variables, _ in _pools.WAITING.values() for name in variables}
    code = f"{statements}\nimport cbn, json\nprint(json.dumps({expression}))"
    return json.loads(printed_by(code, without=waiting, **environment))


def only_openmp(config):
    """The file of the only OpenMP runtime, which cbn has."""
    (file,) = (file for file, pool in config["pools"].items() if pool["api"] == "OpenMP")
    path = config["threads"]["openmp"].rpartition(" ")[0]
    assert os.path.realpath(file) == os.path.realpath(path)
    return file


@pytest.fixture
def gnu():
    openmp = _dispatch.kernels.openmp()
    if openmp is None or _pools.kind_of(openmp[0]).library != "GNU":
        pytest.skip("cbn was built with another OpenMP")


@pytest.fixture
def other(other_library, tmp_path):
    """A function that gives a user of GNU OpenMP, which answers for it, another name."""
    return lambda name: str(shutil.copy(other_library, tmp_path / name))


# ---------------------------------------------------------------------------------- what is loaded


def test_the_runtime_of_cbn():
    config = fresh("", OMP_NUM_THREADS="3")
    assert config["pools"][only_openmp(config)]["threads"] == 3


@pytest.mark.parametrize("packages", ["numpy", "sklearn", "scipy.linalg, sklearn, torch"])
def test_they_are_those_that_threadpoolctl_finds(packages):
    for package in ("threadpoolctl", *packages.split(", ")):
        pytest.importorskip(package)
    found, expected = fresh(
        f"import threadpoolctl, {packages}",
        f"[{CONFIG}['pools'], threadpoolctl.threadpool_info()]",
    )
    assert sorted((file, pool["api"].lower(), pool["threads"]) for file, pool in found.items()) == (
        sorted((pool["filepath"], pool["user_api"], pool["num_threads"]) for pool in expected)
    )


@pytest.mark.parametrize("order", ["import torch, cbn", "import cbn, torch"])
def test_pytorch_and_cbn_share_a_runtime(order, gnu):
    pytest.importorskip("torch")
    # Whoever is first brings the file; the other finds its plain name, libgomp.so.1, taken.
    config = fresh(f"{order}\ntorch.ones(1 << 20).add_(1)")
    assert ("/torch/" in only_openmp(config)) == order.startswith("import torch")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("libgomp-e985bcbb.so.1.0.0", ("OpenMP", "GNU")),
        ("libomp.so", ("OpenMP", "LLVM")),
        ("libomp5.so", ("OpenMP", "LLVM")),
        ("libiomp5.so", ("OpenMP", "Intel")),
        ("libopenblasp-r0.3.21.so", ("BLAS", "OpenBLAS")),
        ("libscipy_openblas64_-32a4b2a6.so", ("BLAS", "OpenBLAS")),
        ("libmkl_rt.so.2", ("BLAS", "MKL")),
        ("libblis.so.4", ("BLAS", "BLIS")),
        ("libflexiblas.so.3", ("BLAS", "FlexiBLAS")),
        ("libblas.so.3", None),
        ("libompl.so", None),
        ("_fblas.cpython-311-x86_64-linux-gnu.so", None),
    ],
)
def test_names(name, kind):
    found = _pools.kind_of(f"/a b/libgomp.so.1/{name}")
    assert (found and found[:2]) == kind


def test_any_path(other, tmp_path):
    folder = tmp_path / "a  b\té"
    folder.mkdir()
    file = shutil.move(other("libgomp-1.so"), folder)
    pools = fresh(f"import ctypes; ctypes.CDLL({str(file)!r})", OMP_NUM_THREADS="3")["pools"]
    assert pools[str(file)] == {"api": "OpenMP", "library": "GNU", "threads": 3}


def test_a_library_that_does_not_tell_its_threads(other):
    file = other("libmkl_rt.so")
    pools = fresh(f"import ctypes; ctypes.CDLL({file!r})")["pools"]
    assert pools[file] == {"api": "BLAS", "library": "MKL", "threads": None}


def test_a_library_that_has_been_deleted(other):
    file = other("libomp.so")
    pools = fresh(f"import ctypes, os; ctypes.CDLL({file!r}); os.unlink({file!r})")["pools"]
    assert pools[f"{file} (deleted)"]["threads"] is None


def test_runtimes_that_may_end_the_process_are_not_asked(other):
    """Intel's and LLVM's: the second to be used."""
    files = [other(name) for name in ("libomp.so", "libiomp5.so")]
    both = fresh(f"import ctypes; [*map(ctypes.CDLL, {files})]")["pools"]
    assert [both[file]["threads"] for file in files] == [None, None]
    for file in files:
        one = fresh(f"import ctypes; ctypes.CDLL({file!r})", OMP_NUM_THREADS="3")["pools"]
        assert one[file]["threads"] == 3


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(_pools, "MAPS", tmp_path / "maps")
    assert _pools.loaded() == {}


# --------------------------------------------------------------------------------- how they wait


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DEFAULT),
        ({"OMP_WAIT_POLICY": " "}, DEFAULT),
        ({"KMP_BLOCKTIME": "0"}, DEFAULT),  # not a word of this runtime
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive"),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}, "GOMP_SPINCOUNT=1000"),
    ],
    ids=str,
)
def test_waiting_threads_spin_as_they_were_told(environment, expected, gnu):
    assert fresh("", **environment)["threads"]["waiting"] == expected


def test_what_is_told_later_counts_for_nothing(gnu):
    later = "import cbn, os; os.environ['OMP_WAIT_POLICY'] = 'active'"
    assert fresh(later)["threads"]["waiting"] == DEFAULT


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/a/libomp.so", "they spin for 200 ms, then sleep (the runtime's default)"),
        ("/a/libnova.so", "unknown"),
    ],
)
def test_other_runtimes_wait_in_their_own_way(file, expected, monkeypatch):
    monkeypatch.setattr(_pools, "_environment", {"GOMP_SPINCOUNT": "1000"})
    assert _pools.waiting(file) == expected


# -------------------------------------------------------------------------------- how calls ran


def test_calls_are_counted():
    bn, x = cbn.BatchNorm2d(16).eval(), np.ones((8, 16, 40, 40), np.float32)
    before = cbn.show_config("dicts")["calls"]
    with cbn.num_threads(2):
        bn(x)
    bn(x[:1, :, :4])
    calls = _dispatch.kernels.calls()
    after = cbn.show_config("dicts")["calls"]
    assert after["team"] + after["contention"] == before["team"] + before["contention"] + 1
    assert after["one thread"] == before["one thread"] + 1
    counts = [calls.team_calls, calls.single_calls, calls.contended_calls]
    assert list(after.values())[:3] == counts


def test_a_pause_is_told(monkeypatch):
    calls = type(_dispatch.kernels.calls())()
    monkeypatch.setattr(_dispatch.kernels, "calls", lambda: calls)

    def now():
        return cbn.show_config("dicts")["calls"]["now"]

    assert now() == "a team once the machine has CPUs to spare"
    calls.look(1, room=True)
    assert now() == "a team where it pays"
    calls.judge(2, took=1, on_one_thread=1e-6)
    assert now() == "one thread for 0.02 s or more, because of contention"


def test_all_of_it_is_printed(capsys):
    cbn.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  contention      ") for line in lines)
    for file, (api, library, num_threads) in _pools.loaded().items():
        threads = "" if num_threads is None else f", threads {num_threads}"
        assert f"  {file:<15} api {api}, library {library}{threads}" in lines
