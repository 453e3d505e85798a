"""A forked child computes as its parent does, with as many threads, whatever the parent has run."""

import os
import platform
import sys
from pathlib import Path

import pytest
from processes import TEAMS, printed_by

# Each in a process of its own, with a limit on its time: what is tested for is a hang.
PRELUDE = f"""{TEAMS}
import ctypes, sys, threading
import numpy as np

THREADS = 3
cbn.set_num_threads(THREADS)
x = np.random.default_rng(0).random((8, 64, 40, 40), dtype=np.float32)
bn = cbn.BatchNorm2d(64, track_running_stats=False)


def step():
    return bn(x).tobytes(), bn.backward(x).tobytes()


expected = step()
assert count_threads() >= THREADS, "no team in the parent"


def check(threads=THREADS):
    assert count_threads() == 1, "threads before the first call"
    assert step() == expected
    # NumPy and others may have started threads before the fork, but none survives it.
    assert count_threads() == threads, (threads, count_threads())
    return 0


def fork(in_child):
    pid = os.fork()
    if pid == 0:
        os._exit(in_child())
    assert os.waitpid(pid, 0)[1] == 0


"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def run(code, *arguments, prelude=PRELUDE, **variables):
    printed_by(prelude + code, *arguments, timeout=60, **variables)


def test_os_fork():
    run("fork(check)")


def test_the_parent_goes_on():
    run("""
for _ in range(5):
    fork(check)
    assert step() == expected
    assert count_threads() == THREADS
""")


def test_a_child_of_a_child():
    run("""
def parent():
    check()
    fork(check)
    return check_again()

def check_again():
    assert step() == expected
    assert count_threads() == THREADS
    return 0

fork(parent)
""")


def test_multiprocessing():
    run("""
import multiprocessing

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.apply(step) == expected
    assert set(pool.starmap(step, [()] * 8)) == {expected}
""")


def test_a_fork_in_c(other_library):
    code = """
child = ctypes.CFUNCTYPE(ctypes.c_int)(check)
assert ctypes.CDLL(sys.argv[1]).fork_and_run(child) == 0
assert step() == expected
"""
    run(code, other_library)


def test_a_fork_in_another_thread():
    run("""
failures = []

def target():
    try:
        step()
        fork(check)
        assert step() == expected
    except BaseException as failure:
        failures.append(failure)

thread = threading.Thread(target=target)
thread.start()
thread.join()
assert not failures, failures
fork(check)
""")


def test_a_fork_while_another_thread_calls():
    run("""
stop = threading.Event()

def work():
    while not stop.is_set():
        functional()

def functional():
    cbn.functional.batch_norm(x, None, None, training=True)

thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    fork(check)
stop.set()
thread.join()
""")


def test_where_the_team_cannot_be_given_up_the_child_is_serial(other_library):
    """OpenMP refuses to pause within a parallel loop."""
    code = """
child = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: check(threads=1))
assert ctypes.CDLL(sys.argv[1]).fork_and_run_in_a_team(2, child) == 0
assert step() == expected
assert count_threads() >= THREADS
"""
    run(code, other_library)


@pytest.mark.parametrize(("knows_forks", "threads"), [("TRUE", 3), ("FALSE", 1)])
def test_one_fork_after_another_with_the_runtime_of_llvm(knows_forks, threads):
    """Told to ignore forks, as scikit-learn tells it, it would wait for the parent's threads."""
    runtimes = sorted(Path("/usr/lib").glob("llvm-*/lib/libomp.so"))
    if not runtimes and os.environ.get("CBN_REQUIRE_LIBOMP") != "1":  # in CI it is an error
        pytest.skip("needs libomp")
    code = f"""
assert cbn.show_config("dicts")["threads"]["openmp"].startswith(sys.argv[1])
for _ in range(3):
    fork(lambda: check({threads}))
"""
    run(code, str(runtimes[0]), LD_PRELOAD=str(runtimes[0]), KMP_INIT_AT_FORK=knows_forks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces a function of glibc")
def test_where_forks_cannot_be_watched_the_import_fails(other_library):
    code = """
import numpy
try:
    import cbn
except MemoryError as error:
    assert "pthread_atfork: expected memory to watch forks" in str(error)
else:
    raise AssertionError("imported")
"""
    run(code, prelude="", LD_PRELOAD=other_library)
