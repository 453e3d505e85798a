# A pass over an array: reduce every tile, finish every channel, write every tile.

cdef enum Round:
    REDUCTIONS   # of tiles, or of strips from their reduction to their writing
    FINISHES     # of some channels each
    WRITES       # of tiles
    PARAMETERS   # of some parameters each that several channels share
    ROUNDS


cdef enum:
    FINISHED = 256     # channels that a thread finishes at a time
    SPAN = 4096        # values of some channels that are still in the L1 cache after
    EVEN = 8           # channels that are finished side by side, if there are so many
    CACHED = 1 << 17   # values of a strip of rows that are still in the L2 cache (1 MiB) after


cdef struct Team:
    int threads
    Pace* paces         # (ROUNDS, threads)
    clockid_t clock     # that they are measured by
    double seconds      # OUT: of its work, and what one thread would have taken; else 0
    double on_one_thread


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
    cdef Sums sums
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
        for c in range(n):
            if p.shares == NULL or g.by_value:
                sums = merge_sums(<const Sums*>p.partial + first + c, g.pieces, g.channels)
            else:
                sums = merge_channel(p, first + c, reciprocal[c])
            total[c], product[c] = sums.grad_output, sums.grad_output_centred
        micro.finish_gradients(p, first, n, reciprocal, total, product)


cdef void finish_some(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = first + n
    while first < end:
        finish_channels(p, first, min(AT_ONCE, end - first))
        first += AT_ONCE


cdef void finish_strip(const Pass* p, Py_ssize_t strip) noexcept nogil:
    finish_some(p, first_channel(&p.geometry, strip), channels_of(&p.geometry, strip))


cdef void write_tile(const Pass* p, const Geometry* g, Py_ssize_t strip,
                     Py_ssize_t piece) noexcept nogil:
    cdef Sheet sheet
    if p.out != NULL:
        sheet = sheet_of(g, strip, piece)
        micro_of(p).write(p, &sheet, first_channel(g, strip))


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
            sheet_moments(p, sheet, &found)
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
    cdef Py_ssize_t piece
    if has_spans(p):
        run_spans(p, strip)
        return
    for piece in range(p.geometry.pieces):
        reduce_tile(p, strip, piece)
    finish_strip(p, strip)
    # The last piece first: it is the one still in the cache.
    for piece in range(p.geometry.pieces - 1, -1, -1):
        write_tile(p, &p.geometry, strip, piece)


cdef bint goes_by_strip(const Pass* p, int num_threads) noexcept nogil:
    """Whether a thread does all of a strip, which then is in the cache when it is read again.

    Not where it is more than a cache holds, or where strips are too few to keep all threads busy
    to the end.
    """
    cdef const Geometry* g = &p.geometry
    if p.kind == GIVEN or (g.by_plane and g.pieces == 1):
        return g.pieces == 1
    if not (g.by_plane or g.strip_channels * g.S * g.N <= CACHED):
        return False
    return g.strips % num_threads == 0 or g.strips >= 4 * num_threads


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


cdef void run_strips(const Pass* p, Team* team, int thread) noexcept nogil:
    """Strip by strip; several at a time where they are small."""
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
    cdef Py_ssize_t values = g.strip_channels * g.S * g.N
    cdef Py_ssize_t most = max(1, min(g.strips // team.threads, PIECE // values))
    cdef Py_ssize_t first, n = 1, strip
    begin_round(team, pace)
    while n > 0:
        n = take(team, REDUCTIONS, thread, most, &first)
        for strip in range(first, first + n):
            run_strip(p, strip)
            pace.channels += channels_of(g, strip)
    end_round(team, pace)


cdef void run_rounds(const Pass* p, Team* team, int thread) noexcept nogil:
    """Tile by tile in the order of the memory, in rounds."""
    cdef const Geometry* g = &p.geometry
    cdef Pace* pace = team.paces + thread
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
            write_tile(p, g, k % g.strips, k // g.strips)
            pace.channels += channels_of(g, k % g.strips)
        end_round(team, pace)


cdef void work(const Pass* p, Team* team, bint by_strip, int thread) noexcept nogil:
    """What one thread of a team does."""
    cdef Py_ssize_t k
    if by_strip:
        run_strips(p, team, thread)
    else:
        run_rounds(p, team, thread)
    if p.shares != NULL and p.grad_weight != NULL:
        wait_for(team)
        while take(team, PARAMETERS, thread, 1, &k) > 0:
            micro_of(p).finish_parameters(p, k * AT_ONCE,
                                          min(AT_ONCE, p.geometry.parameters - k * AT_ONCE))


cdef void run(Pass* p, Team* team) noexcept nogil:
    """Run a pass. The schedule is free: no result depends on it."""
    cdef const Geometry* g = &p.geometry
    cdef bint by_strip = goes_by_strip(p, team.threads)
    # A thread computes in the modes of the caller: another library may have switched subnormal
    # numbers off, in the calling thread or in those of the pool. It gets its own back.
    cdef floating_point_modes modes = current_modes()
    cdef floating_point_modes before = modes   # set, because private variables begin as copies

    if g.parts > 1:
        micro_of(p).take_parameters(p)
        p.weight = per_channel_absent(1)
        p.bias = per_channel_absent(0)
    share_out(team, REDUCTIONS, g.strips if by_strip else tiles_of(g))
    share_out(team, FINISHES, ceil_div(g.channels, FINISHED))
    share_out(team, WRITES, tiles_of(&p.writing), p.kind != GIVEN)
    share_out(team, PARAMETERS, ceil_div(g.parameters, AT_ONCE))
    if team.threads == 1:
        work(p, team, by_strip, 0)
        return
    team.seconds = seconds(CLOCK_MONOTONIC)
    with parallel(num_threads=team.threads):
        before = change_modes(modes)
        work(p, team, by_strip, threadid())
        change_modes(before)
    team.seconds = seconds(CLOCK_MONOTONIC) - team.seconds
    if by_strip or p.kind != GIVEN:
        team.on_one_thread = alone_seconds(team.paces, team.threads)
    if not by_strip and p.out != NULL:
        team.on_one_thread += alone_seconds(team.paces + <int>WRITES * team.threads, team.threads)
