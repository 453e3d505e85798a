"""The thread count: it changes no bit, and who may set it for whom."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from processes import TEAMS, printed_by

import cbn
from cbn import _dispatch, functional

# (N, C, S) and how it is walked: the way, the strips, and the pieces; fewer and more strips than
# threads, one piece and many, with tails.
WALKS = {
    (12001, 3, 7): ("by row", 1, 7),
    (70001, 1, 1): ("by row", 1, 2),
    (40, 2049, 1): ("by row", 3, 1),
    (120, 601, 1): ("by row", 2, 1),
    (400, 67, 49): ("by row", 4, 2),
    (5, 70, 127): ("few values", 6, 1),
    (7, 701, 17): ("few values", 12, 1),
    (300, 5, 600): ("by plane", 5, 3),
    (3, 33, 400): ("by plane", 6, 1),
    (2, 1, 131135): ("by plane", 1, 10),
    (2, 3, 65537): ("by plane", 3, 4),
}
LAYOUT = pytest.mark.parametrize("channel_axis", [1, -1], ids=["first", "last"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.mark.parametrize("shape", WALKS, ids=str)
def test_shapes_are_walked_as_is_meant(shape):
    assert _dispatch.kernels.walk(*shape) == WALKS[shape]


@pytest.fixture(autouse=True)
def _restore_num_threads():
    old = cbn.get_num_threads()
    yield
    cbn.set_num_threads(old)


# ------------------------------------------------------------------------------------------- bits


@pytest.fixture
def run_pass(rng):
    def run_pass(name, shape, channel_axis, dtype):
        """A function without arguments that runs a pass and returns every array it makes."""
        if channel_axis == -1:
            shape = (shape[0], shape[2], shape[1])
        num_features = shape[channel_axis]
        x = rng.normal(1, 2, shape).astype(dtype)
        grad_output = rng.standard_normal(shape).astype(dtype)
        mean, var, weight, bias = rng.uniform(0.5, 2, (4, num_features))

        def stats():
            return functional.batch_norm_stats(x, channel_axis=channel_axis)[:2]

        def forward(training):
            running_mean, running_var = mean.copy(), var.copy()
            y = functional.batch_norm(
                x, running_mean, running_var, weight, bias, training, channel_axis=channel_axis
            )
            return y, running_mean, running_var

        def backward(training):
            return functional.batch_norm_backward(
                grad_output, x, mean, var, weight, training, channel_axis=channel_axis
            )

        return {
            "statistics": stats,
            "forward_training": lambda: forward(True),
            "forward_eval": lambda: forward(False),
            "backward_training": lambda: backward(True),
            "backward_eval": lambda: backward(False),
        }[name]

    return run_pass


@pytest.mark.parametrize(
    "name",
    ["statistics", "forward_training", "forward_eval", "backward_training", "backward_eval"],
)
@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", WALKS, ids=str)
def test_no_bit_depends_on_the_number_of_threads(
    run_pass, use_threads, shape, channel_axis, dtype, name
):
    run = run_pass(name, shape, channel_axis, dtype)
    use_threads(1)
    expected = [array.tobytes() for array in run()]
    calls = _dispatch.kernels.calls()
    teams = calls.team_calls
    for num_threads in (2, 3, 4, 7):
        use_threads(num_threads)
        actual = [array.tobytes() for array in run()]
        assert actual == expected, f"{num_threads} threads"
    if _dispatch.kernels.openmp():
        assert calls.team_calls >= teams + 4


@LAYOUT
def test_no_bit_depends_on_calls_at_the_same_time(run_pass, channel_axis):
    passes = [
        run_pass("forward_training", shape, channel_axis, "float32")
        for shape in ((3, 33, 400), (2, 3, 65537), (3001, 3, 7))
    ]
    expected = [[array.tobytes() for array in run()] for run in passes]
    with ThreadPoolExecutor(max_workers=3) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda run: [array.tobytes() for array in run()], passes))
            assert actual == expected


# ---------------------------------------------------------------------------------- set and context


def test_set_num_threads_returns_the_old_number():
    cbn.set_num_threads(3)
    assert cbn.set_num_threads(5) == 3
    assert cbn.get_num_threads() == 5


def test_set_num_threads_is_for_every_thread():
    cbn.set_num_threads(3)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(cbn.get_num_threads).result() == 3
        pool.submit(cbn.set_num_threads, 4).result()
    assert cbn.get_num_threads() == 4


def test_contexts_nest():
    cbn.set_num_threads(2)
    with cbn.num_threads(3):
        with cbn.num_threads(5):
            assert cbn.get_num_threads() == 5
        assert cbn.get_num_threads() == 3
    assert cbn.get_num_threads() == 2


def test_an_object_is_used_again_and_within_itself():
    cbn.set_num_threads(2)
    three, seen = cbn.num_threads(3), []
    for _ in range(2):
        with three:
            with cbn.num_threads(5), three:
                seen.append(cbn.get_num_threads())
            seen.append(cbn.get_num_threads())
        seen.append(cbn.get_num_threads())
    assert seen == [3, 3, 2] * 2


def test_an_object_is_used_by_several_threads_at_once():
    cbn.set_num_threads(2)
    three, barrier = cbn.num_threads(3), threading.Barrier(2, timeout=30)

    def work(leaves_first):
        with three:
            barrier.wait()  # both are inside
            if not leaves_first:
                barrier.wait()  # until the other has left
            inside = cbn.get_num_threads()
        after = cbn.get_num_threads()
        if leaves_first:
            barrier.wait()
        return inside, after

    with ThreadPoolExecutor(max_workers=2) as pool:
        assert list(pool.map(work, [True, False])) == [(3, 2), (3, 2)]


def test_an_object_is_a_decorator_too():
    cbn.set_num_threads(2)
    three = cbn.num_threads(3)

    @three
    def inside(depth):
        return [cbn.get_num_threads(), *(inside(depth - 1) if depth else [])]

    with three:
        assert inside(2) == [3, 3, 3]
    assert inside(1) == [3, 3]
    assert cbn.get_num_threads() == 2


def test_a_context_ends_with_an_exception():
    cbn.set_num_threads(2)
    with pytest.raises(KeyError), cbn.num_threads(3):
        raise KeyError
    assert cbn.get_num_threads() == 2


def test_set_num_threads_within_a_context_counts_after_it():
    cbn.set_num_threads(2)
    with cbn.num_threads(3):
        assert cbn.set_num_threads(4) == 2
        assert cbn.get_num_threads() == 3
    assert cbn.get_num_threads() == 4


def test_a_context_is_for_one_thread():
    cbn.set_num_threads(2)
    seen = []
    entered, left = threading.Event(), threading.Event()

    def other_thread():
        seen.append(cbn.get_num_threads())
        with cbn.num_threads(5):
            entered.set()
            left.wait(timeout=30)
            seen.append(cbn.get_num_threads())

    thread = threading.Thread(target=other_thread)
    with cbn.num_threads(3):
        thread.start()
        assert entered.wait(timeout=30)
        seen.append(cbn.get_num_threads())
    seen.append(cbn.get_num_threads())
    left.set()
    thread.join()
    assert seen == [2, 3, 2, 5]


def test_a_context_is_for_one_task():
    async def task(number, barrier):
        with cbn.num_threads(number):
            await barrier.wait()  # both are inside
            seen = cbn.get_num_threads()
            await barrier.wait()  # and stay there until both have looked
            return seen

    async def tasks():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(task(3, barrier), task(5, barrier))

    assert asyncio.run(tasks()) == [3, 5]


def test_an_integer_of_numpy_is_a_number_of_threads():
    cbn.set_num_threads(np.int64(3))
    assert cbn.get_num_threads() == 3


# ------------------------------------------------------------------------------------ new process

PRINT_NUM_THREADS = "import cbn; print(cbn.get_num_threads())"


# Where only the given variables speak of threads.
print_number = partial(printed_by, PRINT_NUM_THREADS, without=["CBN_NUM_*", "OMP_NUM_*"])


@pytest.mark.parametrize("value", ["1", "3", "07"])
def test_environment_variable_sets_the_number(value):
    assert print_number(CBN_NUM_THREADS=value, OMP_NUM_THREADS="2") == f"{int(value)}\n"


def test_without_environment_variable_openmp_decides():
    assert print_number(OMP_NUM_THREADS="3") in ("3\n", "1\n")  # 1: built without OpenMP


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
@pytest.mark.parametrize(
    ("rows", "started"),
    [("100_000", 2), ("cbn._threads.SERIAL_BELOW // 2 - 1", 0)],
    ids=["large", "below_the_serial_threshold"],
)
def test_a_call_runs_on_that_many_threads(rows, started):
    if print_number(OMP_NUM_THREADS="2") == "1\n":
        pytest.skip("built without OpenMP")
    code = f"""{TEAMS}
import numpy
x = numpy.ones(({rows}, 2))
before = count_threads()
with cbn.num_threads(3):
    cbn.functional.batch_norm_stats(x)
print(count_threads() - before)
"""
    assert printed_by(code) == f"{started}\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
@pytest.mark.parametrize(
    ("shape", "call", "started"),
    [
        ((20, 4, 512), "batch_norm(x, None, None, training=True)", 0),  # 40,960 values, twice
        ((20, 4, 512), "batch_norm_backward(x, x, *numpy.ones((2, 4)))", 2),  # and three times
        ((60, 1000), "batch_norm(x, None, None, training=True)", 0),  # one tile: half of them
        ((70, 1000), "batch_norm(x, None, None, training=True)", 2),
    ],
)
def test_a_pass_counts_its_values_for_what_a_team_can_share(shape, call, started):
    if print_number(OMP_NUM_THREADS="2") == "1\n":
        pytest.skip("built without OpenMP")
    code = f"""{TEAMS}
import numpy
x = numpy.ones({shape}, "float32")
before = count_threads()
with cbn.num_threads(3):
    cbn.functional.{call}
print(count_threads() - before)
"""
    assert printed_by(code) == f"{started}\n"
