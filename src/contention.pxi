# When a team of threads pays: alone on the machine it does, in company it may not.
#
# The threads of a team spin while they wait for each other. Where another library's threads spin
# too, or another process is busy, a thread that spins keeps the CPU from the very thread that it
# waits for, one slice of the scheduler (4 ms) after the other, and a call of 0.1 ms takes 8 ms. So
# every call of a team is judged by what one thread would have taken. After one that took longer,
# calls run on one thread for a while. Before the next team is tried, as before the first, calls
# wait some time for the machine to have CPUs to spare.
# benchmarks/company.py measures what it is good for.
#
# The call itself tells what one thread would have taken: each thread of its team notes how much it
# did and how long it worked, and the fastest of them is the one that was least interrupted.

cdef enum:
    # Calls of so many values last long enough that every thread may be interrupted. They are
    # measured by each thread's CPU time; that is a system call, too dear for shorter ones.
    LONG_CALL = 1 << 19

cdef double TOLERANCE = 1.2       # times what one thread takes, which is an estimate
cdef double SLACK = 1e-4          # seconds that a team may lose beside, ...
cdef double WAKE_UP = 5e-4        # ... and where it may have gone to sleep, ...
cdef double AWAKE = 1e-3          # ... because it has had nothing to do for longer than this
cdef double PRICE = 10            # seconds of good calls that make up for a second lost, ...
cdef double MOST_CREDIT = 0.1     # ... of which no more than these count
cdef double FIRST_PAUSE = 0.02    # seconds on one thread after a call that took too long, ...
cdef double LONGEST_PAUSE = 0.9   # ... twice as many after each that follows, but no more
cdef double LOOK_AGAIN = 0.02     # seconds from one look at the machine to the next, ...
cdef double LAST_LOOK = 2         # ... the last of which is so many after the pause began
# Of the pace that a thread has alone, what it keeps among many: they share the memory. 16 threads
# normalised 10^7 values at 0.63 of it, and differentiated at 0.97.
cdef double SHARED_PACE = 0.5


cdef struct Pace:
    # What a thread has to do in a round, how much it has done, and how long it took.
    Py_ssize_t next         # of its own tasks, which others take too once theirs are done
    Py_ssize_t end
    double began
    double seconds
    Py_ssize_t channels     # in every tile that it took
    Py_ssize_t[11] padding  # so that no two threads write to one cache line


cdef inline double seconds(clockid_t clock) noexcept nogil:
    cdef timespec now
    if clock_gettime(clock, &now) != 0:
        return 0
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


cdef double alone_seconds(const Pace* paces, int num_threads) noexcept nogil:
    """The seconds of a round if one thread, alone, did everything; infinite if nobody knows."""
    cdef double least = INFINITY
    cdef Py_ssize_t channels = 0
    cdef int thread, workers = 0
    for thread in range(num_threads):
        if paces[thread].channels > 0:
            workers += 1
            channels += paces[thread].channels
            least = min(least, paces[thread].seconds / paces[thread].channels)
    if not 0 < least < INFINITY:   # a clock of CPU time may tick too seldom, or be refused
        return INFINITY
    return least * channels * min(1.0, max(SHARED_PACE, 2.0 / workers))


cdef bint has_room(int num_threads):
    """Whether the machine has CPUs for a team, as far as the system tells."""
    cdef int runnable = 0   # threads that run or wait for a CPU, this one included
    cdef FILE* file
    if usable_cpus() < ONLINE_CPUS:   # what runs may run on other CPUs than those of this process
        return True
    file = fopen("/proc/loadavg", "re")
    if file != NULL:
        if fscanf(file, "%*f %*f %*f %d/", &runnable) != 1:
            runnable = 0
        fclose(file)
    return runnable + min(num_threads, ONLINE_CPUS) - 1 <= ONLINE_CPUS


cdef class Contention:
    """Which calls run on one thread because a team would suffer, and how many calls there were.

    The first team waits for room on the machine, as after a pause. Times are in seconds, of any
    clock.
    """

    cdef public bint judges                    # off: for tests that need a team, on any machine
    cdef readonly Py_ssize_t team_calls
    cdef readonly Py_ssize_t single_calls      # that were small, beside others, or told to
    cdef readonly Py_ssize_t contended_calls   # on one thread because of contention
    cdef readonly bint pausing
    cdef readonly double pause                 # how long the last one was, at least
    cdef double paused_at
    cdef double looks_at
    cdef double ended_at                       # the last call of a team
    cdef double credit                         # seconds
    cdef double good                           # seconds of good calls since the last pause

    def __cinit__(self, bint judges=True):
        self.judges = judges
        self.pausing = True

    cpdef judge(self, double now, double took, double on_one_thread, int threads_made=0):
        """Begin a pause if calls of a team, whose threads may be made for it, take too long."""
        cdef bint awake = now - took < self.ended_at + AWAKE
        self.ended_at = now
        cdef double slack = (SLACK if awake else WAKE_UP) + threads_made * WAKE_UP
        if took <= TOLERANCE * on_one_thread + slack:
            self.good += took
            self.credit = min(self.credit + took, MOST_CREDIT)
            return
        # Any machine hesitates now and then, which is no reason to give up a team.
        self.credit -= PRICE * (took - on_one_thread)
        if self.credit >= 0:
            return
        # In company, too, the first calls after a pause are good: a thread that has slept is served
        # before others. So pauses are short again only when a team has worked for as long as one.
        self.pause = (FIRST_PAUSE if self.good >= self.pause
                      else min(2 * self.pause, LONGEST_PAUSE))
        self.credit = self.good = 0
        self.pausing = True
        self.paused_at = now
        self.looks_at = now + self.pause

    cpdef bint looks(self, double now):
        """Whether the pause has lasted long enough to look at the machine."""
        return self.pausing and now >= self.looks_at

    cpdef look(self, double now, bint room):
        """End the pause, or prolong it while the CPUs are taken.

        It ends in any case after LAST_LOOK: who takes them may let this process go first.
        """
        if self.paused_at == 0:   # the first look of all
            self.paused_at = now
        if room or now >= self.paused_at + LAST_LOOK:
            self.pausing = False
        else:
            self.looks_at = now + LOOK_AGAIN

    cdef bint allows_team(self, int num_threads):
        """Whether a call may have a team of so many threads."""
        cdef double now
        if not (self.pausing and self.judges):
            return True
        now = seconds(CLOCK_MONOTONIC)
        if self.looks(now):
            self.look(now, has_room(num_threads))
        return not self.pausing


cdef int ONLINE_CPUS = online_cpus()
cdef Contention contention = Contention()


def calls():
    """How the calls of this process ran, and whether they keep to one thread now."""
    return contention_here()


cdef Contention contention_here():
    """That of this process: a forked child has one of its own."""
    global contention
    if is_new_child():
        contention = Contention(contention.judges)
    return contention


cdef int begin_pass(int num_threads, Py_ssize_t values):
    """The number of threads for a pass that may have so many."""
    cdef Contention contention = contention_here()
    cdef bint allowed = True
    if num_threads > 1:
        allowed = contention.allows_team(num_threads)
    num_threads = begin_call(num_threads if allowed else 1, values)
    if num_threads > 1:
        contention.team_calls += 1
    elif allowed:
        contention.single_calls += 1
    else:
        contention.contended_calls += 1
    return num_threads
