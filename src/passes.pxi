# A pass over an array: reduce every tile, finish every channel, write every tile.

cdef enum:
    ROUNDS = 2         # of tiles: those that are reduced, and those that are written
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
    micro.finish_coefficients(p, first, n, reciprocal)
    if p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS:
        for c in range(n):
            if p.shares == NULL:
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


cdef inline Py_ssize_t parameter_chunks(const Pass* p) noexcept nogil:
    """Of parameters that several channels share, whose gradients are to be added up."""
    return ceil_div(p.geometry.parameters, AT_ONCE) if p.shares != NULL else 0


cdef inline void finish_chunk(const Pass* p, Py_ssize_t chunk) noexcept nogil:
    micro_of(p).finish_parameters(p, chunk * AT_ONCE,
                                  min(AT_ONCE, p.geometry.parameters - chunk * AT_ONCE))


cdef void write_tile(const Pass* p, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef Sheet sheet
    if p.kind != STATISTICS:
        sheet = sheet_of(&p.geometry, strip, piece)
        micro_of(p).write(p, &sheet, first_channel(&p.geometry, strip))


cdef inline bint has_spans(const Pass* p) noexcept nogil:
    """Whether strips are run some channels at a time."""
    cdef const Geometry* g = &p.geometry
    return g.by_value and g.pieces == 1 and p.kind != FROZEN_GRADIENTS


cdef inline PerChannel per_channel_from(PerChannel values, Py_ssize_t first) noexcept nogil:
    if values.single != NULL:
        values.single += first
    if values.double_ != NULL:
        values.double_ += first
    return values


cdef inline Py_ssize_t span_of(const Pass* p) noexcept nogil:
    """How many channels are run at a time: those whose values, of x or of both arrays, are SPAN."""
    cdef Py_ssize_t each = p.geometry.N * p.geometry.S
    cdef Py_ssize_t n = SPAN // each
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
    cdef Pass part = p[0]
    cdef Sheet sheet = sheet_of(g, strip, 0)
    cdef Py_ssize_t first = first_channel(g, strip), end = first + sheet.channels, n, k
    cdef Py_ssize_t span = span_of(p)
    cdef bint finds = finds_statistics(p)

    part.geometry.channels = AT_ONCE
    part.coefficients = coefficients
    if finds:
        part.statistics = statistics
        part.mean.double_ = statistics
        part.mean_low.double_ = statistics + AT_ONCE
        part.var.double_ = statistics + 2 * AT_ONCE
    if p.kind == GRADIENTS:
        share = share_of(p, strip, 0)
        clear_share(p, &sheet, share)
    while first < end:
        n = sheet.channels = min(span, end - first)
        part.origin = first
        part.ahead = n * g.S
        if finds:
            sheet_moments(p, sheet, &found)
            micro.finish_moments(&part, 0, n, &found)
            if p.statistics != NULL:
                for k in range(3):
                    memcpy(p.statistics + k * g.channels + first, statistics + k * AT_ONCE,
                           n * sizeof(double))
        else:
            part.mean = per_channel_from(p.mean, first)
            part.mean_low = per_channel_from(p.mean_low, first)
            part.var = per_channel_from(p.var, first)
        if p.kind != STATISTICS:
            micro.finish_coefficients(&part, 0, n, reciprocal)
        if p.kind == GRADIENTS:
            micro.row_products(&part, &sheet, 0, total, product)
            micro.finish_gradients(&part, 0, n, reciprocal, total, product)
            micro.write_sharing(&part, &sheet, 0, share)
        elif p.kind != STATISTICS:
            micro.write(&part, &sheet, 0)
        first += n
        sheet.offset += n * g.S


cdef void run_strip(const Pass* p, Py_ssize_t strip) noexcept nogil:
    cdef Py_ssize_t piece
    if has_spans(p):
        run_spans(p, strip)
        return
    if p.kind == GIVEN:
        finish_strip(p, strip)
        for piece in range(p.geometry.pieces):
            write_tile(p, strip, piece)
        return
    for piece in range(p.geometry.pieces):
        reduce_tile(p, strip, piece)
    finish_strip(p, strip)
    # The last piece first: it is the one still in the cache.
    for piece in range(p.geometry.pieces - 1, -1, -1):
        write_tile(p, strip, piece)


cdef void run(Pass* p, Team* team) noexcept nogil:
    """Run a pass. The schedule is free: no result depends on it."""
    cdef int num_threads = team.threads
    cdef Py_ssize_t strips = p.geometry.strips, pieces = p.geometry.pieces
    cdef Py_ssize_t tiles = strips * pieces
    cdef Py_ssize_t strip_values = p.geometry.strip_channels * p.geometry.S * p.geometry.N
    cdef Py_ssize_t strip, tile, chunk, at_a_time, chunks = parameter_chunks(p)
    # A thread computes in the modes of the caller: another library may have switched subnormal
    # numbers off, in the calling thread or in those of the pool. It gets its own back.
    cdef floating_point_modes modes = current_modes()
    cdef floating_point_modes before = modes   # set, because private variables begin as copies
    cdef Pace* pace = team.paces
    cdef int thread

    if p.geometry.parts > 1:
        micro_of(p).take_parameters(p)
        p.weight = per_channel_absent(1)
        p.bias = per_channel_absent(0)
    if num_threads == 1:
        for strip in range(strips):
            run_strip(p, strip)
        for chunk in range(chunks):
            finish_chunk(p, chunk)
        return
    for thread in range(num_threads * ROUNDS):   # a team may be smaller than it was meant to be
        team.paces[thread].channels = 0
    if ((strips % num_threads == 0 or strips >= 4 * num_threads or pieces == 1)
            and (p.geometry.by_plane or strip_values <= CACHED)):
        # Strip by strip, so that it is still in the cache when it is read again; several at a
        # time where they are small.
        at_a_time = max(1, min(strips // num_threads, PIECE // strip_values))
        team.seconds = seconds(CLOCK_MONOTONIC)
        with parallel(num_threads=num_threads):
            before = change_modes(modes)
            pace = team.paces + threadid()
            begin_round(pace, team.clock)
            for strip in prange(strips, schedule="dynamic", chunksize=at_a_time):
                run_strip(p, strip)
                pace.channels += channels_of(&p.geometry, strip)
            end_round(pace, team.clock)
            if chunks:
                wait_for_team()   # Cython's loops in a parallel block do not
                for chunk in prange(chunks):
                    finish_chunk(p, chunk)
            change_modes(before)
        team.seconds = seconds(CLOCK_MONOTONIC) - team.seconds
        team.on_one_thread = alone_seconds(team.paces, num_threads)
    else:
        # Too few strips to keep all threads busy to the end, or parts of rows that would be
        # fetched a second time anyway: tile by tile in the order of the memory, in three rounds.
        team.seconds = seconds(CLOCK_MONOTONIC)
        with parallel(num_threads=num_threads):
            before = change_modes(modes)
            pace = team.paces + threadid()
            if p.kind != GIVEN:
                begin_round(pace, team.clock)
                for tile in prange(tiles, schedule="dynamic"):
                    reduce_tile(p, tile % strips, tile // strips)
                    pace.channels += channels_of(&p.geometry, tile % strips)
                end_round(pace, team.clock)
                wait_for_team()
            for strip in prange(strips):
                finish_strip(p, strip)
            wait_for_team()
            for chunk in prange(chunks):
                finish_chunk(p, chunk)
            if p.kind != STATISTICS:
                pace = team.paces + num_threads + threadid()
                begin_round(pace, team.clock)
                for tile in prange(tiles, schedule="dynamic"):
                    write_tile(p, tile % strips, (tiles - 1 - tile) // strips)
                    pace.channels += channels_of(&p.geometry, tile % strips)
                end_round(pace, team.clock)
            change_modes(before)
        team.seconds = seconds(CLOCK_MONOTONIC) - team.seconds
        if p.kind != GIVEN:
            team.on_one_thread += alone_seconds(team.paces, num_threads)
        if p.kind != STATISTICS:
            team.on_one_thread += alone_seconds(team.paces + num_threads, num_threads)
