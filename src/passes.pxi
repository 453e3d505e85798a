# A pass over an array: reduce every tile, finish every channel, write every tile.

cdef enum:
    FINISHED = 256     # channels that a thread finishes at a time
    SPAN = 4096        # values of some channels that are still in the L1 cache after
    EVEN = 8           # channels that are finished side by side, if there are so many
    CACHED = 1 << 17   # values of a strip of rows that are still in the L2 cache (1 MiB) after
    FEW_ROWS = 32      # in which two threads may write strips side by side
    # Bytes of an array whose rows are read in the order of the memory, which takes more loads and
    # stores of sums than a few rows side by side. On an EPYC, whose core then reads 20 GB/s rather
    # than 10, backward took three quarters of the time (channels last, benchmarks/compare.py).
    BEYOND_CACHES = 1 << 24
    # The output of a pass whose arrays are of this size together is written past the cache: no L2
    # holds them. Chains of layers that read each other's outputs of 8 to 48 MiB took a quarter
    # less, gradients of 6 MiB an eighth less; forward passes of 6 MiB differed either way.
    STREAM_BYTES = 1 << 24
    # But not where what is written without a gap is shorter: its ends are no whole lines. Short
    # rows with parameters by value fill lines first, if no steps go along (struct Lines): beyond
    # the caches layer norm of rows of 64 to 384 values took two thirds to nine tenths of the time
    # (shapes "rows" of benchmarks/compare.py).
    SHORTEST_STREAMED = 512
    # A small pass works in memory of the stack, and keeps the GIL: malloc, and to give up the GIL
    # and take it back, would be a tenth of its time (shapes "small" of benchmarks/compare.py).
    HOLDS_GIL = 12288   # values, of which each counts for its cost


cdef inline bint is_streamed(size_t size, Kind kind) noexcept nogil:
    """Whether an output of so many bytes is written past the cache, unless it is an input too."""
    return size * (3 if kind == GRADIENTS else 2) >= STREAM_BYTES


cdef void find_statistics(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The statistics of some channels, from what the pieces found."""
    cdef double[3 * AT_ONCE] values
    cdef Columns found = columns_in(values, AT_ONCE)
    cdef Moments moments
    cdef Py_ssize_t end = first + n, c
    while first < end:
        n = min(AT_ONCE, end - first)
        for c in range(n):
            moments = merge(<const Moments*>p.partial + first + c, p.geometry.pieces, p.stride)
            found.shift[c], found.mean[c], found.m2[c] = moments.shift, moments.mean, moments.m2
        micro_of(p).finish_moments(p, first, n, &found)
        first += n


cdef void find_coefficients(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The coefficients of some channels, from their statistics and, of gradients, their sums."""
    cdef const Micro* micro = micro_of(p)
    cdef double[AT_ONCE] reciprocal
    cdef double[AT_ONCE] total
    cdef double[AT_ONCE] product
    cdef Py_ssize_t end = first + n
    if p.kind == STATISTICS:
        return
    if p.geometry.by_value and p.out == NULL:   # the gradients of parameters are in their shares
        return
    while first < end:
        n = min(AT_ONCE, end - first)
        micro.finish_coefficients(p, first, n, reciprocal)
        if is_backward(p):
            merge_gradients(p, first, n, reciprocal, total, product)
            micro.finish_gradients(p, first, n, reciprocal, total, product)
        first += n


cdef inline Py_ssize_t span_of(const Pass* p) noexcept nogil:
    """How many channels are run at a time: those whose values, of x or of both arrays, are SPAN, of
    half the size twice as many."""
    cdef Py_ssize_t each = p.geometry.N * p.geometry.S
    cdef Py_ssize_t n = (2 * SPAN if is_half(p.storage) else SPAN) // each
    if p.kind != GRADIENTS:
        return min(AT_ONCE, n // EVEN * EVEN if n >= EVEN else max(1, n))
    # Of gradients of parameters, sums of SUMMED channels are added up.
    return min(AT_ONCE, max(SUMMED, n // 2 // SUMMED * SUMMED))


cdef void run_spans(const Pass* p, Py_ssize_t strip) noexcept nogil:
    """Run a strip of channels that have their parameters by value, some channels at a time, which
    stay in the L1 cache: as passes over an array of so many channels. All that is found of a
    channel is kept no longer, but for the statistics, where they are asked for."""
    cdef const Geometry* g = &p.geometry
    cdef const Micro* micro = micro_of(p)
    cdef double[COEFFICIENTS * AT_ONCE] coefficients   # or of float
    cdef double[3 * AT_ONCE] statistics
    cdef double[3 * AT_ONCE] moments
    cdef Columns found = columns_in(moments, AT_ONCE)
    cdef double[AT_ONCE] reciprocal
    cdef double[AT_ONCE] total
    cdef double[AT_ONCE] product
    cdef double* share = NULL
    cdef Pass of_span = p[0]
    cdef Sheet sheet = sheet_of(g, strip, 0)
    cdef Py_ssize_t first = first_channel(g, strip), end = first + sheet.channels, n
    cdef Py_ssize_t span = span_of(p)

    of_span.stride = AT_ONCE
    of_span.coefficients = coefficients
    if p.finds and p.statistics == NULL:
        keep_statistics(&of_span, statistics, AT_ONCE)
    if p.kind == GRADIENTS and p.shares != NULL:
        share = share_of(p, strip, 0)
        clear_share(p, &sheet, share)
    while first < end:
        n = sheet.channels = min(span, end - first)
        of_span.ahead = n * g.S
        begin_at(&of_span, p, first)
        if p.finds:
            sheet_moments(p, &sheet, &found)
            micro.finish_moments(&of_span, 0, n, &found)
        if p.kind != STATISTICS:
            micro.finish_coefficients(&of_span, 0, n, reciprocal)
        if p.kind == GRADIENTS and p.out == NULL:
            micro.share_products(&of_span, &sheet, 0, share)
        elif p.kind == GRADIENTS:
            micro.row_products(&of_span, &sheet, 0, total, product)
            micro.finish_gradients(&of_span, 0, n, reciprocal, total, product)
            if p.shares != NULL:
                micro.write_sharing(&of_span, &sheet, 0, share)
            else:
                micro.write(&of_span, &sheet, 0)
        elif p.out != NULL:
            micro.write(&of_span, &sheet, 0)
        first += n
        sheet.offset += n * g.S


cdef void run_strip(const Pass* p, Py_ssize_t strip) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t first = first_channel(g, strip) - p.origin, n = channels_of(g, strip), piece
    cdef Sheet sheet
    if has_spans(p):
        run_spans(p, strip)
        return
    if p.finds:
        for piece in range(g.pieces):
            reduce_moments(p, strip, piece)
        find_statistics(p, first, n)
    if is_backward(p):
        for piece in range(g.pieces):
            reduce_gradients(p, strip, piece)
    find_coefficients(p, first, n)
    if p.out != NULL:   # the last piece first: it is the one still in the cache
        for piece in range(g.pieces - 1, -1, -1):
            sheet = sheet_of(g, strip, piece)
            micro_of(p).write(p, &sheet, first)


cdef bint goes_by_strip(const Pass* p, int num_threads) noexcept nogil:
    """Whether a thread does all of a strip, which then is in the cache when it is read again.

    Not where it is more than a cache holds, or where strips are too few to keep all threads busy
    to the end. Nor where each thread has one of strips side by side in more than a few rows: they
    would write at a time the lines in which one ends and the next begins, and now and then that
    took three times as long (backward of 1x14x14x256, channels last, benchmarks/compare.py).
    """
    cdef const Geometry* g = &p.geometry
    if p.kind == GIVEN or (g.by_plane and g.pieces == 1):
        return g.pieces == 1
    if p.kind == GRADIENTS and p.finds:   # the rounds are for one reduction
        return True
    if not g.by_plane and (g.strip_channels * g.S * g.N > CACHED
                           or (num_threads == g.strips and g.batch_strips > 1 and g.N > FEW_ROWS)):
        return False
    return g.strips % num_threads == 0 or g.strips >= 4 * num_threads


cdef void run_rounds(const Pass* p, Team* team, int thread) noexcept nogil:
    """Tile by tile in the order of the memory, in rounds."""
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
    cdef Sheet sheet
    cdef Py_ssize_t k, n
    if p.kind != GIVEN:
        begin_round(team, pace)
        while take(team, REDUCTIONS, thread, 1, &k) > 0:
            if p.finds:
                reduce_moments(p, k % g.strips, k // g.strips)
            else:
                reduce_gradients(p, k % g.strips, k // g.strips)
            pace.channels += channels_of(g, k % g.strips)
        end_round(team, pace)
        wait_for(team)
    while take(team, FINISHES, thread, 1, &k) > 0:
        n = min(FINISHED, g.channels - k * FINISHED)
        if p.finds:
            find_statistics(p, k * FINISHED, n)
        find_coefficients(p, k * FINISHED, n)
    wait_for(team)
    if p.out != NULL:
        g = &p.writing
        pace += <int>WRITES * team.threads
        begin_round(team, pace)
        while take(team, WRITES, thread, 1, &k) > 0:
            if p.kind != GIVEN:   # what was reduced last comes first: it is still in the cache
                k = tiles_of(g) - 1 - k
            sheet = sheet_of(g, k % g.strips, k // g.strips)
            micro_of(p).write(p, &sheet, first_channel(g, k % g.strips))
            pace.channels += channels_of(g, k % g.strips)
        end_round(team, pace)


cdef void add_up(const Pass* p, Team* team, int thread) noexcept nogil:
    """Add up the gradients of parameters that channels share."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t k, n, i
    if p.shares == NULL or p.grad_weight == NULL:
        return
    wait_for(team)
    while take(team, PARAMETERS, thread, 1, &k) > 0:
        n = min(AT_ONCE, g.parameters - k * AT_ONCE)
        micro_of(p).finish_parameters(p, k * AT_ONCE, n)
        if has_turns(p, team):   # the next adds to the sum so far: the first two rows
            for i in range(2, 2 * p.sharers):
                memset(p.shares + i * g.parameters + k * AT_ONCE, 0, n * sizeof(double))


cdef void begin_turn(const Pass* p, Team* team, int thread, Py_ssize_t done) noexcept nogil:
    """Share out the next turn. Nobody takes strips until all are through with what the last shared,
    and the other way round."""
    wait_for(team)
    if thread == 0:
        share_out(team, REDUCTIONS, done, min(team.turn, p.geometry.strips - done))
        share_out(team, PARAMETERS, 0, ceil_div(p.geometry.parameters, AT_ONCE))
    wait_for(team)


cdef void work(const Pass* p, Team* team, int thread) noexcept nogil:
    """What one thread of a team does: strips, several at a time where they are small, or rounds.

    Each turn of strips adds what they share to the sum of those before, so that all is added in the
    order of the memory.
    """
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
    cdef Py_ssize_t done = 0, first, n, k
    # A few at a time at most, so that who is done early finds some that are left.
    cdef Py_ssize_t most = max(1, min(team.turn // (4 * team.threads),
                                      PIECE // (g.strip_channels * g.S * g.N)))
    cdef Pass own
    if team.apart:
        own = p[0]
        keep_in(&own, &team.tables, team.memory + thread * team.tables.size)
    if not team.by_strip:
        run_rounds(p, team, thread)
        add_up(p, team, thread)
    while team.by_strip and done < g.strips:
        if done > 0:
            begin_turn(p, team, thread, done)
        if has_turns(p, team):   # before those of the turn comes the sum so far
            own.first_sharer = first_channel(g, done) // g.period - 1
        begin_round(team, pace)
        n = take(team, REDUCTIONS, thread, most, &first)
        while n > 0:
            for k in range(first, first + n):
                if team.apart:
                    begin_at(&own, p, first_channel(g, k))
                    run_strip(&own, k)
                else:
                    run_strip(p, k)
                pace.channels += channels_of(g, k)
            n = take(team, REDUCTIONS, thread, most, &first)
        end_round(team, pace)
        add_up(p, team, thread)
        done += team.turn
    if p.stream:   # once, because it waits until all lines are written
        fence_streams()


cdef inline Py_ssize_t cost_of(Kind kind) noexcept nogil:
    """How much more a pass has to do for a value than one that only writes or only reduces; from
    how many values on a team pays, benchmarks/team_threshold.py tells."""
    if kind == GIVEN or kind == STATISTICS:
        return 1
    return 2 if kind == NORMALISE else 3


# A pass of fewer values, of which each counts for its cost (or all for half, run_pass says when),
# keeps to one thread; a larger one asks how many it may have. cbn/_threads.py says both.
cdef Py_ssize_t serial_below = 0
cdef object get_num_threads = None


def take_threads_from(function, Py_ssize_t serial_below_now):
    global get_num_threads, serial_below
    get_num_threads, serial_below = function, serial_below_now


cdef void arrange(Pass* p, Team* team) noexcept nogil:
    """Who does what, and whether each strip is a pass of its own."""
    cdef const Geometry* g = &p.geometry
    if team.threads == 1:
        join_strips(&p.geometry)
        join_strips(&p.writing)
    team.by_strip = goes_by_strip(p, team.threads)
    team.turn = g.strips
    # What is found twice of a strip takes the same memory, which is of no other strip.
    team.apart = team.by_strip and not has_spans(p) and (
        g.strips > team.threads or (p.finds and is_backward(p)))


cdef void prepare(Pass* p, Team* team) noexcept nogil:
    """What is done before the threads of a team go their ways."""
    cdef const Geometry* g = &p.geometry
    if g.parts > 1:
        micro_of(p).take_parameters(p)
        p.weight = per_channel_absent(1)
        p.bias = per_channel_absent(0)
    cdef const Geometry* writing = g if team.by_strip else &p.writing
    if (writing.by_plane and written_run(writing) < SHORTEST_STREAMED
            and (p.fuses or not writing.by_value)):
        p.stream = False
    share_out(team, REDUCTIONS, 0, team.turn if team.by_strip else tiles_of(g))
    share_out(team, FINISHES, 0, ceil_div(g.channels, FINISHED))
    share_out(team, WRITES, 0, tiles_of(&p.writing), p.kind != GIVEN)
    share_out(team, PARAMETERS, 0, ceil_div(g.parameters, AT_ONCE))


cdef double on_one_thread(const Pass* p, const Team* team) noexcept nogil:
    """The seconds that one thread would have taken, from what each has noted."""
    cdef double reducing = 0, writing = 0
    if team.by_strip or p.kind != GIVEN:
        reducing = alone_seconds(team.paces, team.threads)
    if not team.by_strip and p.out != NULL:
        writing = alone_seconds(team.paces + <int>WRITES * team.threads, team.threads)
    return reducing + writing


cdef run_pass(Pass* p, ndarray x, ndarray grad_output, ndarray out):
    """Run a pass. The schedule is free: no result depends on it."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t values = PyArray_SIZE(x)
    cdef size_t size = PyArray_NBYTES(x)
    p.finds = p.kind == STATISTICS or p.kind == NORMALISE or (
        p.kind == GRADIENTS and p.mean.double_ == NULL)
    cdef Py_ssize_t cost = cost_of(p.kind) * values
    # Where all there is to reduce is one tile, a team shares the writing at most, and has to meet
    # before it.
    cdef Py_ssize_t shared = cost if p.kind == GIVEN or tiles_of(g) > 1 else values // 2
    cdef int num_threads = 1 if shared < serial_below else get_num_threads()
    cdef double took = 0, alone = 0   # seconds: of the team, and of one thread in its place
    cdef double[NEAR] near
    cdef Team team
    # A thread computes in the modes of the caller: another library may have switched subnormal
    # numbers off, in the calling thread or in those of the pool. It gets its own back.
    cdef floating_point_modes modes = current_modes()
    cdef floating_point_modes before = modes   # set, because private variables begin as copies
    p.storage = <Storage>storage_of(x)
    p.x, p.grad_output, p.out = data_of(x), data_of(grad_output), data_of(out)
    p.from_memory = size >= BEYOND_CACHES
    p.fuses = (p.fused.relu or p.fused.residual != NULL or p.fused.grad_residual != NULL
               or (p.fused.back and p.fused.passed != NULL))
    # An output that is also an input is in the cache already, line by line.
    p.stream = (is_streamed(size, p.kind)
                and p.out != p.x and p.out != p.grad_output and p.out != p.fused.residual)
    num_threads = <int>min(num_threads, max(tiles_of(g), tiles_of(&p.writing)))
    team.threads = begin_pass(num_threads, values)
    team.clock = CLOCK_THREAD_CPUTIME_ID if values >= LONG_CALL else CLOCK_MONOTONIC
    arrange(p, &team)
    cdef char* memory = take_memory(p, &team, size, near)
    if memory == NULL:
        end_call()
        raise MemoryError
    if cost < HOLDS_GIL and team.threads == 1:
        prepare(p, &team)
        work(p, &team, 0)
    else:
        with nogil:
            prepare(p, &team)
            if team.threads == 1:
                work(p, &team, 0)
            else:
                took = seconds(CLOCK_MONOTONIC)
                with parallel(num_threads=team.threads):
                    before = change_modes(modes)
                    work(p, &team, threadid())
                    change_modes(before)
                took = seconds(CLOCK_MONOTONIC) - took
                alone = on_one_thread(p, &team)
    end_call()
    if memory != <char*>near:
        free(memory)
    if team.threads > 1 and contention.judges:
        contention.judge(seconds(CLOCK_MONOTONIC), took, alone,
                         team.threads if has_new_team() else 0)
