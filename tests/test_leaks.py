"""Memory and threads stay as they are: over 10^5 calls, threads that end, and forks."""

import sys

import pytest
from processes import TEAMS, run_python

# Each in a process of its own, whose memory no other test has touched.
PRELUDE = f"""{TEAMS}
import gc, sys, tempfile, threading
import numpy as np
from cbn.functional import batch_norm, batch_norm_backward, batch_norm_stats

rng = np.random.default_rng(0)
large = rng.random((8, 64, 32, 32), np.float32)
bn = cbn.BatchNorm2d(64)
cbn.set_num_threads(2)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(function, times):
    # Of memory, and of Python's blocks, in so many calls after some whose caches are there to stay.
    for _ in range(times // 10):
        function()
    gc.collect()
    memory, blocks = resident(), sys.getallocatedblocks()
    for _ in range(times):
        function()
    gc.collect()
    memory, blocks = resident() - memory, sys.getallocatedblocks() - blocks
    print(memory, "bytes", blocks, "blocks", count_threads(), "threads")
    return memory, blocks


"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def run(code):
    done = run_python(
        *("-W", "ignore::DeprecationWarning", "-c", PRELUDE + code),
        timeout=300,
        MALLOC_ARENA_MAX="1",  # one heap: which thread uses which moves memory by megabytes
        OMP_WAIT_POLICY="passive",
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def test_calls():
    # A pass over so many channels takes 10 kB from malloc, and a Python object is a block. One of
    # either that is lost in one of the twelve calls makes 84 MB, or 8400 blocks.
    run("""
C = 300
x = rng.random((6, C, 5), np.float32)
rows = rng.random((6, C))
mean, var, weight = np.ones((3, C))
training, inference = cbn.BatchNorm1d(C), cbn.BatchNorm1d(C, momentum=None).eval()
double, careful = cbn.BatchNorm1d(C, dtype="float64"), cbn.BatchNorm1d(C, nonfinite="raise")
infinite, out, bands = np.full_like(x, np.inf), np.empty_like(x), np.empty((C, 6)).T
file = os.path.join(tempfile.mkdtemp(), "norm.npz")


def refused(function, *arguments, **named):
    try:
        function(*arguments, **named)
    except (TypeError, ValueError, FloatingPointError):
        return
    raise AssertionError("not refused")


def twelve_calls():
    y = training(x)
    training.backward(y)
    inference(x, out=out)
    inference.backward(y)
    batch_norm(x, mean, var, weight, None, training=True)
    batch_norm(x[::2, :, ::-1], mean, var, weight)   # by way of a copy
    batch_norm_stats(rows.tolist())
    batch_norm_backward(y, x, mean, var, weight, training=True)
    double(rows, out=bands)                          # by way of a temporary
    refused(training, rows[:, 1:])
    refused(batch_norm, x, mean, var, training=True, out=out[:1])
    refused(careful, infinite)


def calls():
    for _ in range(100):
        twelve_calls()
    training.save(file)
    cbn.BatchNorm1d.load(file)


memory, blocks = growth(calls, 84)
os.remove(file)
os.rmdir(os.path.dirname(file))
assert memory < 1e6, memory
assert blocks < 1000, blocks
""")


def test_threads_that_end():
    # A team that is lost leaves its threads, and the pool of OpenMP that knew them: kilobytes.
    # Outputs would hide that, here as after forks: where malloc puts them moves memory by one of
    # them now and then.
    run("""
out = np.empty_like(large)


def in_a_thread():
    thread = threading.Thread(target=bn, args=(large, out))
    thread.start()
    thread.join()


bn(large, out)
threads = count_threads()
memory, blocks = growth(in_a_thread, 1000)
assert memory < 1e6, memory
assert blocks < 1000, blocks
assert count_threads() <= threads + 1, count_threads()   # the last team takes a moment to end
""")


def test_forks():
    # Each gives up the team, and the parent makes another.
    run("""
out = np.empty_like(large)


def fork():
    pid = os.fork()
    if pid == 0:
        bn(large, out)
        os._exit(count_threads())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    bn(large, out)


fork()   # which ends the threads of NumPy's BLAS
threads = count_threads()
memory, blocks = growth(fork, 100)
assert memory < 1e5, memory
assert blocks < 100, blocks
assert count_threads() == threads, count_threads()
""")
