"""Which calls keep to one thread in company: the decision, with times that are put in."""

import os
import threading
import time

import numpy as np
import pytest

import cbn
from cbn import _dispatch

FIRST, LONGEST, LAST_LOOK = 0.02, 0.9, 2  # seconds
ALONE = 1e-4  # what a call takes on one thread
GOOD, BAD = 6e-5, 8e-3  # what one takes with a team


class Clock:
    """A process whose calls take as long as the test says."""

    def __init__(self):
        self.now = 1000.0
        self.contention = type(_dispatch.kernels.calls())()

    def call(self, took, alone=ALONE):
        self.now += took
        self.contention.judge(self.now, took, alone)
        return self.contention.pausing

    def good_calls(self, seconds):
        for _ in range(round(seconds / GOOD)):
            assert not self.call(GOOD)

    def wait(self, room=True):
        """Wait until the pause is over; return for how long."""
        began = self.now
        while self.contention.pausing:
            if self.contention.looks(self.now):
                self.contention.look(self.now, room)
            self.now += 1e-3
        return self.now - began


@pytest.fixture
def clock():
    clock = Clock()
    clock.wait()
    return clock


@pytest.mark.parametrize(("room", "seconds"), [(True, 0), (False, LAST_LOOK)])
def test_the_first_team_waits_for_room(room, seconds):
    assert Clock().wait(room) == pytest.approx(seconds, abs=0.022)


def test_good_calls_keep_their_team(clock):
    clock.good_calls(1)
    assert clock.contention.pause == 0


@pytest.mark.parametrize("took", [BAD, 1.2 * ALONE + 6e-4])
def test_a_call_that_takes_too_long_begins_a_pause(clock, took):
    assert clock.call(took)
    assert clock.contention.pause == FIRST


def test_one_that_has_to_be_woken_up_does_not(clock):
    assert not clock.call(ALONE + 4e-4)  # nothing came before it
    clock.now += 0.01
    assert not clock.call(ALONE + 4e-4)
    assert clock.call(ALONE + 4e-4)  # at once: now the team was awake


def test_a_long_call_may_lose_a_fifth(clock):
    assert not clock.call(0.59, alone=0.5)
    assert clock.call(0.61, alone=0.5)


def test_a_few_hesitations_are_forgiven(clock):
    clock.good_calls(0.09)
    assert not clock.call(BAD)  # ten times 8 ms
    assert clock.call(BAD)


def test_no_more_of_them_after_a_longer_time(clock):
    clock.good_calls(2)
    assert not clock.call(BAD)
    assert clock.call(BAD)


def test_pauses_double_up_to_the_longest(clock):
    pauses = []
    for _ in range(8):
        assert clock.call(BAD)
        pauses.append(clock.contention.pause)
        assert clock.wait() == pytest.approx(pauses[-1], abs=2e-3)
    assert pauses == pytest.approx([FIRST * 2**i for i in range(6)] + [LONGEST] * 2)


def test_a_few_good_calls_do_not_shorten_them(clock):
    for expected in (FIRST, 2 * FIRST, 4 * FIRST):
        assert clock.call(BAD)
        assert clock.contention.pause == pytest.approx(expected)
        clock.wait()
        clock.good_calls(0.004)


def test_as_many_as_the_pause_was_long_do(clock):
    for _ in range(6):
        clock.call(BAD)
        clock.wait()
    clock.good_calls(LONGEST + 0.01)
    while not clock.call(BAD):
        pass
    assert clock.contention.pause == FIRST


def test_while_the_cpus_are_taken_a_pause_goes_on(clock):
    clock.call(BAD)
    assert clock.wait(room=False) == pytest.approx(LAST_LOOK, abs=0.022)


def test_it_ends_soon_after_they_are_free(clock):
    for _ in range(6):
        clock.call(BAD)
        clock.wait()
    clock.call(BAD)
    clock.now += LONGEST
    clock.contention.look(clock.now, room=False)
    assert clock.wait() <= 0.022


# ----------------------------------------------------------------------------- the calls themselves


def counts():
    calls = _dispatch.kernels.calls()
    return np.array([calls.team_calls, calls.single_calls, calls.contended_calls])


@pytest.fixture
def layer_and_data(rng):
    x = rng.standard_normal((8, 16, 40, 40)).astype(np.float32)
    return cbn.BatchNorm2d(16).eval(), x


def test_every_call_is_counted_once(layer_and_data):
    bn, x = layer_and_data
    before = counts()
    for threads in (1, 2, 3):
        with cbn.num_threads(threads):
            for _ in range(10):
                bn(x)
    bn(x[:1, :, :2, :2])
    team, single, contended = counts() - before
    assert team + contended == 20
    assert single == 11


def test_calls_of_several_threads_are_all_counted(layer_and_data):
    bn, x = layer_and_data
    before = counts()

    def work():
        for _ in range(50):
            bn(x)

    with cbn.num_threads(2):
        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert (counts() - before).sum() == 200


def test_a_pause_keeps_calls_to_one_thread_and_their_bits(layer_and_data):
    bn, x = layer_and_data
    with cbn.num_threads(2):
        expected = bn(x).tobytes()
        calls, before = _dispatch.kernels.calls(), counts()
        calls.judges = True
        later = time.monotonic() + 100  # CLOCK_MONOTONIC, as the calls read it
        while not calls.pausing:
            calls.judge(later, took=1, on_one_thread=1e-6)
        for _ in range(3):
            assert bn(x).tobytes() == expected
        assert (counts() - before).tolist() == [0, 0, 3]
        calls.look(later, room=True)
        calls.judges = False
        assert bn(x).tobytes() == expected
        assert (counts() - before).tolist() == [1, 0, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_starts_afresh(layer_and_data):
    bn, x = layer_and_data
    with cbn.num_threads(2):
        bn(x)
        child = os.fork()
        if child == 0:
            try:
                fresh = False
                bn(x)
                calls = _dispatch.kernels.calls()
                fresh = counts().tolist() == [1, 0, 0] and calls.pause == 0
            finally:
                os._exit(0 if fresh else 1)
        assert os.waitpid(child, 0)[1] == 0
