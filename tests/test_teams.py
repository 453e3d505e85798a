"""Calls from many threads at the same time: right, nothing lost, and few OpenMP teams."""

import gc
import os
import sys
import threading
import time

import numpy as np
import pytest
from processes import printed_by

import cbn

THREADS = 4
MOST_TEAMS = 2
CALLERS = 16


@pytest.fixture(autouse=True)
def _switch_often():
    """Between threads, as often as Python can: what is not safe then shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_the_same_time(callers, function):
    """Call function(index) in so many threads; raise what they raise, return what they return."""
    results, failures = [None] * callers, []
    barrier = threading.Barrier(callers)

    def call(index):
        try:
            barrier.wait()
            results[index] = function(index)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def count_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("shape", [(8, 64, 40, 40), (1, 64, 30, 30)], ids=["large", "small"])
def test_few_threads_keep_a_team(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    bn = cbn.BatchNorm2d(64)
    bn(x)
    bn.eval()
    expected = bn(x).tobytes()
    most = []

    def call(_):
        with cbn.num_threads(THREADS):
            for _ in range(30):
                assert bn(x).tobytes() == expected
        most.append(count_threads())

    before = count_threads()
    for _ in range(3):  # the teams of threads that have ended count no more
        at_the_same_time(CALLERS, call)
    assert max(most) <= before + CALLERS + MOST_TEAMS * (THREADS - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_thread_that_ends_leaves_its_place_to_another(rng):
    x = rng.standard_normal((64, 64, 64)).astype(np.float32)
    bn = cbn.BatchNorm1d(64).eval()
    usual = 0
    while usual != (usual := count_threads()):  # teams of the test before may be about to end
        time.sleep(0.1)

    def threads_after_a_call(_):
        with cbn.num_threads(THREADS):
            bn(x)
            return count_threads()

    for _ in range(2 * MOST_TEAMS):
        assert at_the_same_time(1, threads_after_a_call) == [usual + THREADS]
        while count_threads() > usual:  # the team of a thread that has ended ends a little later
            time.sleep(0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_where_no_end_of_a_thread_is_heard_of_no_team_is_kept(other_library):
    """All keys of the process have owners; its first key is not written to by mistake."""
    code = """
import ctypes, os, sys
import numpy as np

runtime = ctypes.CDLL(sys.argv[1])  # it must have OpenMP's key: without that it ends the process
c, key, first = ctypes.CDLL(None), ctypes.c_uint(), ctypes.c_uint(0)
c.pthread_getspecific.restype = ctypes.c_void_p
while c.pthread_key_create(ctypes.byref(key), None) == 0:
    pass
value = c.pthread_getspecific(first)
import cbn

before = len(os.listdir("/proc/self/task"))
with cbn.num_threads(3):
    for rows in (2**20, 2**18):  # with a team for the call alone, and without
        cbn.functional.batch_norm_stats(np.ones((rows, 2)))
assert c.pthread_getspecific(first) == value
while len(os.listdir("/proc/self/task")) > before:  # a team that is given up ends a little later
    pass
"""
    printed_by(code, other_library, timeout=60)


@pytest.mark.parametrize("counter", [np.int64, np.int32])
@pytest.mark.parametrize("shape", [(4, 3), (200, 3, 400)], ids=["small", "large"])
def test_training_calls_lose_no_update(rng, shape, counter):
    batches = rng.standard_normal((CALLERS, *shape)).astype(np.float32)
    bn = cbn.BatchNorm1d(3, momentum=None)
    bn.num_batches_tracked = np.array(0, counter)
    each = 50 if len(shape) == 2 else 5

    def train(index):
        for _ in range(each):
            bn(batches[index])

    at_the_same_time(CALLERS, train)
    assert bn.num_batches_tracked == each * CALLERS
    # The average over all batches, in whichever order they came.
    mean, _, _ = cbn.functional.batch_norm_stats(batches.reshape(-1, *shape[1:]))
    np.testing.assert_allclose(bn.running_mean, mean, atol=1e-6)


def test_skipping_loses_no_update_of_a_thread_that_a_collection_lets_run(rng):
    good = rng.normal(5, 1, (4, 300)).astype(np.float32)
    bn, alone = (cbn.BatchNorm1d(300, momentum=0.5, nonfinite="skip") for _ in range(2))

    def train_elsewhere(phase, info):
        if phase == "start":
            at_the_same_time(1, lambda _: bn(good))

    gc.callbacks.append(train_elsewhere)
    usual = gc.get_threshold()
    gc.set_threshold(1)  # a collection wherever there can be one
    try:
        bn(np.full_like(good, np.nan))
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(train_elsewhere)
    for _ in range(int(bn.num_batches_tracked) - 1):
        alone(good)
    assert bn.running_mean.tolist() == alone.running_mean.tolist()
    assert bn.running_var.tolist() == alone.running_var.tolist()


def test_eval_calls_on_one_layer_do_not_meet(rng):
    bn = cbn.BatchNorm1d(64).eval()
    bn.running_mean[...] = rng.standard_normal(64)
    inputs = [rng.standard_normal((50 + k, 64, 11)).astype(np.float32) for k in range(CALLERS)]
    expected = [bn(x).tobytes() for x in inputs]
    outputs = at_the_same_time(CALLERS, lambda k: [bn(inputs[k]).tobytes() for _ in range(20)])
    assert outputs == [[each] * 20 for each in expected]


def test_other_threads_run_while_a_kernel_does():
    x = np.zeros((64, 64, 64, 64), np.float32)
    began, ended, counted = threading.Event(), threading.Event(), []

    def count():
        began.wait()
        turns = 0
        while not ended.is_set():
            turns += 1
        counted.append(turns)

    thread = threading.Thread(target=count)
    thread.start()
    began.set()
    with cbn.num_threads(1):
        for _ in range(5):
            cbn.functional.batch_norm_stats(x)
    ended.set()
    thread.join()
    assert counted[0] > 1000
