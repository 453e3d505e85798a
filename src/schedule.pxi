# Who does which task of a pass: the rounds of a team, and each thread's own tasks in them.

cdef enum Round:
    REDUCTIONS   # of tiles, or of strips from their reduction to their writing
    FINISHES     # of some channels each
    WRITES       # of tiles
    PARAMETERS   # of some parameters each that several channels share
    ROUNDS


cdef struct Team:
    int threads
    bint by_strip       # whether a thread does all of a strip, or a round of it
    Pace* paces         # (ROUNDS, threads)
    clockid_t clock     # that they are measured by


cdef void share_out(Team* team, Round round, Py_ssize_t tasks,
                    bint mirrored=False) noexcept nogil:
    """Give each thread its own tasks of a round, from the first on, or from the last."""
    cdef Pace* pace = team.paces + <int>round * team.threads
    cdef Py_ssize_t threads = team.threads, thread
    for thread in range(threads):
        pace.channels = 0
        if mirrored:
            pace.next = tasks - tasks * (thread + 1) // threads
            pace.end = tasks - tasks * thread // threads
        else:
            pace.next, pace.end = tasks * thread // threads, tasks * (thread + 1) // threads
        pace += 1


cdef Py_ssize_t take(Team* team, Round round, int thread, Py_ssize_t most,
                     Py_ssize_t* first) noexcept nogil:   # OUT
    """How many tasks of a round a thread does next: its own first, then others'; at the end none.

    Its own are the same at every call and in every round, as far as can be: their part of the
    memory is in its cache.
    """
    cdef Pace* paces = team.paces + <int>round * team.threads
    cdef Pace* pace
    cdef int k
    for k in range(team.threads):
        pace = paces + (thread + k) % team.threads
        first[0] = fetch_and_add(&pace.next, most)
        if first[0] < pace.end:
            return min(most, pace.end - first[0])
    return 0


cdef inline void wait_for(const Team* team) noexcept nogil:
    if team.threads > 1:   # alone, a thread may be one of somebody else's team
        wait_for_team()


cdef inline void begin_round(const Team* team, Pace* pace) noexcept nogil:
    if team.threads > 1:
        pace.began = seconds(team.clock)


cdef inline void end_round(const Team* team, Pace* pace) noexcept nogil:
    if team.threads > 1:
        pace.seconds = seconds(team.clock) - pace.began
