# Who does which task of a pass: the rounds of a team, and each thread's own tasks in them.

cdef enum Round:
    REDUCTIONS   # of tiles, or of strips from their reduction to their writing
    FINISHES     # of some channels each
    WRITES       # of tiles
    PARAMETERS   # of some parameters each that several channels share
    ROUNDS


cdef struct Tables:       # bytes of what a pass, or one of some of its channels, keeps of them
    Py_ssize_t stride     # channels from one row to the next
    bint keeps_statistics
    size_t statistics     # where they begin, after what the pieces find
    size_t coefficients   # the same, after statistics: these may be float
    size_t size


cdef struct Team:
    int threads
    bint by_strip       # whether a thread does all of a strip, or a round of it
    bint apart          # whether each strip is a pass of its own
    Tables tables       # what each of them keeps, or, if not apart, all channels together
    char* memory        # for them, one for each thread
    # Strips after which what they share of gradients is added up, and its memory is free again.
    Py_ssize_t turn
    Pace* paces         # (ROUNDS, threads)
    clockid_t clock     # that they are measured by


cdef void share_out(Team* team, Round round, Py_ssize_t first, Py_ssize_t tasks,
                    bint mirrored=False) noexcept nogil:
    """Give each thread its own of the next tasks of a round, from the first of them on, or from the
    last."""
    cdef Pace* pace = team.paces + <int>round * team.threads
    cdef Py_ssize_t threads = team.threads, thread
    for thread in range(threads):
        if mirrored:
            pace.next = first + tasks - tasks * (thread + 1) // threads
            pace.end = first + tasks - tasks * thread // threads
        else:
            pace.next = first + tasks * thread // threads
            pace.end = first + tasks * (thread + 1) // threads
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
        pace.seconds += seconds(team.clock) - pace.began
