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
    NEAR = 512         # values of float64: threads may have small stacks
    HOLDS_GIL = 12288   # values, of which each counts for its cost


cdef inline bint is_streamed(size_t size, Kind kind) noexcept nogil:
    """Whether an output of so many bytes is written past the cache, unless it is an input too."""
    return size * (3 if kind == GRADIENTS else 2) >= STREAM_BYTES


cdef inline bint finds_statistics(const Pass* p) noexcept nogil:
    """Whether a pass finds the statistics of x, and is not given them."""
    return p.kind == STATISTICS or p.kind == NORMALISE or (p.kind == GRADIENTS
                                                           and p.mean.double_ == NULL)


cdef void reduce_tile(const Pass* p, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    if finds_statistics(p):
        reduce_moments(p, strip, piece)
    elif p.kind != GIVEN:
        reduce_gradients(p, strip, piece)


cdef void finish_channels(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Finish at most AT_ONCE channels."""
    cdef const Geometry* g = &p.geometry
    cdef const Micro* micro = micro_of(p)
    cdef double[AT_ONCE] reciprocal
    cdef double[AT_ONCE] total
    cdef double[AT_ONCE] product
    cdef double[3 * AT_ONCE] values
    cdef Columns found = columns_in(values, AT_ONCE)
    cdef Moments moments
    cdef Py_ssize_t c
    if finds_statistics(p):
        for c in range(n):
            moments = merge(<const Moments*>p.partial + first + c, g.pieces, g.channels)
            found.shift[c], found.mean[c], found.m2[c] = moments.shift, moments.mean, moments.m2
        micro.finish_moments(p, first, n, &found)
        if p.kind == STATISTICS:
            return
    if g.by_value and p.out == NULL:   # the gradients of parameters are in their shares
        return
    micro.finish_coefficients(p, first, n, reciprocal)
    if p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS:
        merge_gradients(p, first, n, reciprocal, total, product)
        micro.finish_gradients(p, first, n, reciprocal, total, product)


cdef void finish_some(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = first + n
    while first < end:
        finish_channels(p, first, min(AT_ONCE, end - first))
        first += AT_ONCE


cdef inline bint has_spans(const Pass* p) noexcept nogil:
    """Whether strips are run some channels at a time."""
    cdef const Geometry* g = &p.geometry
    return is_in_spans(g) and p.kind != FROZEN_GRADIENTS


cdef inline PerChannel per_channel_from(PerChannel values, Py_ssize_t first) noexcept nogil:
    if values.single != NULL:
        values.single += first
    if values.double_ != NULL:
        values.double_ += first
    return values


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
    cdef Py_ssize_t first = first_channel(g, strip), end = first + sheet.channels, n, k
    cdef Py_ssize_t span = span_of(p)
    cdef bint finds = finds_statistics(p)

    of_span.geometry.channels = AT_ONCE
    of_span.coefficients = coefficients
    if finds:
        of_span.statistics = statistics
        of_span.mean.double_ = statistics
        of_span.mean_low.double_ = statistics + AT_ONCE
        of_span.var.double_ = statistics + 2 * AT_ONCE
    if p.kind == GRADIENTS and p.shares != NULL:
        share = share_of(p, strip, 0)
        clear_share(p, &sheet, share)
    while first < end:
        n = sheet.channels = min(span, end - first)
        of_span.origin = first
        of_span.ahead = n * g.S
        if finds:
            sheet_moments(p, &sheet, &found)
            micro.finish_moments(&of_span, 0, n, &found)
            if p.statistics != NULL:
                for k in range(3):
                    memcpy(p.statistics + k * g.channels + first, statistics + k * AT_ONCE,
                           n * sizeof(double))
        else:
            of_span.mean = per_channel_from(p.mean, first)
            of_span.mean_low = per_channel_from(p.mean_low, first)
            of_span.var = per_channel_from(p.var, first)
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
    cdef Py_ssize_t first = first_channel(g, strip), piece
    cdef Sheet sheet
    if has_spans(p):
        run_spans(p, strip)
        return
    for piece in range(g.pieces):
        reduce_tile(p, strip, piece)
    finish_some(p, first, channels_of(g, strip))
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
    if not g.by_plane and (g.strip_channels * g.S * g.N > CACHED
                           or (num_threads == g.strips and g.batch_strips > 1 and g.N > FEW_ROWS)):
        return False
    return g.strips % num_threads == 0 or g.strips >= 4 * num_threads


cdef void run_rounds(const Pass* p, Team* team, int thread) noexcept nogil:
    """Tile by tile in the order of the memory, in rounds."""
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
    cdef Sheet sheet
    cdef Py_ssize_t k
    if p.kind != GIVEN:
        begin_round(team, pace)
        while take(team, REDUCTIONS, thread, 1, &k) > 0:
            reduce_tile(p, k % g.strips, k // g.strips)
            pace.channels += channels_of(g, k % g.strips)
        end_round(team, pace)
        wait_for(team)
    while take(team, FINISHES, thread, 1, &k) > 0:
        finish_some(p, k * FINISHED, min(FINISHED, g.channels - k * FINISHED))
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


cdef void work(const Pass* p, Team* team, int thread) noexcept nogil:
    """What one thread of a team does: strips, several at a time where they are small, or rounds."""
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
    cdef Py_ssize_t most, first, n = 1, k
    if team.by_strip:
        # A few at a time at most, so that who is done early finds some that are left.
        most = min(g.strips // (4 * team.threads),
                   PIECE // (g.strip_channels * g.S * g.N))
        begin_round(team, pace)
        while n > 0:
            n = take(team, REDUCTIONS, thread, max(1, most), &first)
            for k in range(first, first + n):
                run_strip(p, k)
                pace.channels += channels_of(g, k)
        end_round(team, pace)
    else:
        run_rounds(p, team, thread)
    if p.stream:   # once, because it waits until all lines are written
        fence_streams()
    if p.shares != NULL and p.grad_weight != NULL:
        wait_for(team)
        while take(team, PARAMETERS, thread, 1, &k) > 0:
            micro_of(p).finish_parameters(p, k * AT_ONCE, min(AT_ONCE, g.parameters - k * AT_ONCE))


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


cdef char* take_memory(Pass* p, Team* team, double* near) noexcept nogil:
    """What the pieces find (with given statistics, nothing), shares in gradients, paces, and the
    tables of coefficients and of weights and biases of parts of channels; near, where they fit."""
    cdef const Geometry* g = &p.geometry
    cdef bint gradients = p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS
    cdef bint spans = has_spans(p)   # which keep nothing of channels
    cdef size_t found = 0 if spans or p.kind == GIVEN else g.channels * g.pieces * (
        parts_kept(g) * sizeof(Sums) if gradients else sizeof(Moments))
    cdef size_t shares = 0
    if gradients and shares_parameters(g) and (p.grad_weight != NULL or not g.by_value):
        p.sharers = sharers_of(g)
        shares = p.sharers * 2 * g.parameters * sizeof(double)
    cdef size_t paces = <int>ROUNDS * team.threads * sizeof(Pace)
    cdef size_t real_size = sizeof(double) if p.storage == FLOAT64 else sizeof(float)
    cdef size_t coefficients = 0 if spans else g.channels * COEFFICIENTS * real_size
    cdef size_t parameters = 0 if g.parts == 1 else 2 * g.parameters * real_size
    cdef size_t size = found + shares + paces + coefficients + parameters
    cdef char* memory = <char*>(near if size <= NEAR * sizeof(double) else malloc(size))
    p.partial = memory
    p.shares = <double*>(memory + found) if shares else NULL
    team.paces = <Pace*>(memory + found + shares)
    p.coefficients = memory + found + shares + paces
    p.parameters = memory + found + shares + paces + coefficients
    return memory


cdef void prepare(Pass* p, Team* team) noexcept nogil:
    """What is done before the threads of a team go their ways."""
    cdef const Geometry* g = &p.geometry
    if g.parts > 1:
        micro_of(p).take_parameters(p)
        p.weight = per_channel_absent(1)
        p.bias = per_channel_absent(0)
    if team.threads == 1:
        join_strips(&p.geometry)
        join_strips(&p.writing)
    team.by_strip = goes_by_strip(p, team.threads)
    cdef const Geometry* writing = g if team.by_strip else &p.writing
    if (writing.by_plane and written_run(writing) < SHORTEST_STREAMED
            and (p.fuses or not writing.by_value)):
        p.stream = False
    share_out(team, REDUCTIONS, g.strips if team.by_strip else tiles_of(g))
    share_out(team, FINISHES, ceil_div(g.channels, FINISHED))
    share_out(team, WRITES, tiles_of(&p.writing), p.kind != GIVEN)
    share_out(team, PARAMETERS, ceil_div(g.parameters, AT_ONCE))


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
    cdef char* memory = take_memory(p, &team, near)
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
