# A pass over an array: reduce every tile, finish every channel, apply to every tile.

cdef enum:
    AT_ONCE = 64       # channels that are finished side by side
    CACHED = 1 << 17   # values of a strip of rows that are still in the L2 cache (1 MiB) after


cdef inline bint has_batch_statistics(const Pass* p) noexcept nogil:
    return p.kind == STATISTICS or p.kind == BATCH


cdef void reduce_tile(const real* x, const real* grad_output, const Pass* p, Py_ssize_t strip,
                      Py_ssize_t piece) noexcept nogil:
    cdef double smallest
    if p.kind == GIVEN:
        return
    if has_batch_statistics(p):
        # Squares of float32 deviations whose sum is below 1e-30 may have underflowed. A larger
        # eps makes it irrelevant, and then channels of zeros need no second look.
        smallest = 1e-30 if p.eps < 1e-20 else 0
        reduce_moments(x, &p.geometry, strip, piece, smallest, <Moments*>p.partial)
    else:
        reduce_gradients(grad_output, x, p, strip, piece)


cdef inline void finish_moments(const Pass* p, Py_ssize_t c) noexcept nogil:
    """Merge what the pieces found of a channel, and keep it as the statistics of the batch."""
    cdef Py_ssize_t C = p.geometry.channels
    cdef Moments moments = merge(<const Moments*>p.partial + c, p.geometry.pieces, C)
    # Two-sum (Knuth): mean and mean_low together are the exact sum of the two parts.
    cdef double mean = moments.shift + moments.mean
    cdef double rounded = mean - moments.shift
    cdef double var = moments.m2 / moments.count
    # Negative by rounding, where all values are equal; a NaN stays.
    var = 0 if var < 0 else var
    if p.centred:
        p.statistics[c] = mean
        p.statistics[C + c] = (moments.shift - (mean - rounded)) + (moments.mean - rounded)
        p.statistics[2 * C + c] = var
    else:   # the mean of the squares takes the place of the variance
        p.statistics[c] = p.statistics[C + c] = 0
        p.statistics[2 * C + c] = var + mean * mean


cdef inline Sums merge_channel(const real* x,   # for its element type only
                               const Pass* p, Py_ssize_t c, double reciprocal) noexcept nogil:
    """Merge what the pieces found of a channel, and keep its part in gradients that are shared."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t kept = parts_kept(g), piece, first, q
    cdef const Sums* found = <const Sums*>p.partial + c * kept
    cdef const real* weight
    cdef double* grad_bias
    cdef double* grad_weight
    cdef Sums sums
    if g.by_value:
        return merge_sums(found, g.pieces, g.channels)
    grad_bias = p.shares + c // g.period * 2 * g.parameters + c % g.period * g.parts
    grad_weight = grad_bias + g.parameters
    if g.parts == 1:
        sums = merge_sums(found, g.pieces, g.channels)
        grad_bias[0] = sums.grad_output
        grad_weight[0] = sums.grad_output_centred * reciprocal
        return sums
    weight = weights_of(x, p, c)
    for q in range(g.parts):
        grad_bias[q] = grad_weight[q] = 0
    for piece in range(g.pieces):
        first = first_part(g, piece)
        for q in range(min(kept, g.parts - first)):
            grad_bias[first + q] += found[q].grad_output
            grad_weight[first + q] += found[q].grad_output_centred
        found += g.channels * kept
    sums.grad_output = sums.grad_output_centred = 0
    for q in range(g.parts):
        sums.grad_output += weight[q] * grad_bias[q]
        sums.grad_output_centred += weight[q] * grad_weight[q]
        grad_weight[q] *= reciprocal
    return sums


cdef inline void finish_gradients(const Pass* p, Py_ssize_t first, Py_ssize_t n,
                                  const double* reciprocal,
                                  real* coefficient) noexcept nogil:  # OUT
    """Merge what the pieces found of some channels, and keep the gradients of the parameters."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t C = g.channels
    cdef double count = <double>g.N * g.S
    cdef double[AT_ONCE] total
    cdef double[AT_ONCE] product
    cdef real* grad_weight = <real*>p.grad_weight
    cdef real* grad_bias = <real*>p.grad_bias
    cdef Sums sums
    cdef Py_ssize_t c
    for c in range(n):
        if p.shares == NULL:
            sums = merge_sums(<const Sums*>p.partial + first + c, g.pieces, C)
        else:
            sums = merge_channel(<const real*>coefficient, p, first + c, reciprocal[c])
        total[c], product[c] = sums.grad_output, sums.grad_output_centred
    if p.shares == NULL:
        for c in range(n):
            grad_bias[first + c] = <real>total[c]
        for c in range(n):
            grad_weight[first + c] = <real>(product[c] * reciprocal[c])
    for c in range(n):
        if p.kind == FROZEN_GRADIENTS:
            # grad_output takes the place of x, and nothing but the scale is left.
            coefficient[MEAN * C + c] = coefficient[MEAN_LOW * C + c] = 0
            coefficient[BIAS * C + c] = 0
        else:
            coefficient[MEAN_GRAD * C + c] = <real>(total[c] / count) if p.centred else 0
            coefficient[SLOPE * C + c] = <real>(product[c] / count
                                                * reciprocal[c] * reciprocal[c])


cdef void finish_parameters(const real* x,   # for its element type only
                            const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Add up the gradients of at most AT_ONCE parameters that several channels share."""
    cdef Py_ssize_t parameters = p.geometry.parameters, i, k
    cdef const double* share = p.shares + first
    cdef double[AT_ONCE] grad_bias
    cdef double[AT_ONCE] grad_weight
    for k in range(n):
        grad_bias[k] = grad_weight[k] = 0
    for i in range(p.sharers):
        for k in range(n):
            grad_bias[k] += share[k]
        for k in range(n):
            grad_weight[k] += share[parameters + k]
        share += 2 * parameters
    for k in range(n):
        (<real*>p.grad_bias)[first + k] = <real>grad_bias[k]
        (<real*>p.grad_weight)[first + k] = <real>grad_weight[k]


cdef inline Py_ssize_t parameter_chunks(const Pass* p) noexcept nogil:
    return ceil_div(p.geometry.parameters, AT_ONCE) if p.shares != NULL else 0


cdef inline void finish_chunk(const real* x, const Pass* p, Py_ssize_t chunk) noexcept nogil:
    finish_parameters(x, p, chunk * AT_ONCE,
                      min(AT_ONCE, p.geometry.parameters - chunk * AT_ONCE))


cdef void finish_channels(const real* x,   # for its element type only
                          const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Finish at most AT_ONCE channels, side by side: a root and a division have a long way."""
    cdef Py_ssize_t C = p.geometry.channels, c
    cdef real* coefficient = <real*>p.coefficients + first
    cdef double[AT_ONCE] mean
    cdef double[AT_ONCE] mean_low
    cdef double[AT_ONCE] reciprocal
    cdef double[AT_ONCE] weight
    cdef double[AT_ONCE] bias

    if has_batch_statistics(p):
        for c in range(first, first + n):
            finish_moments(p, c)
        if p.kind == STATISTICS:
            return
    values_of(&p.mean, first, n, mean)
    values_of(&p.mean_low, first, n, mean_low)
    values_of(&p.var, first, n, reciprocal)
    values_in_turn(&p.weight, first, n, p.geometry.period, weight)
    values_in_turn(&p.bias, first, n, p.geometry.period, bias)
    for c in range(n):
        reciprocal[c] = 1 / sqrt(reciprocal[c] + p.eps)
    for c in range(n):
        coefficient[MEAN * C + c] = <real>mean[c]
        coefficient[SCALE * C + c] = <real>(weight[c] * reciprocal[c])
        coefficient[BIAS * C + c] = <real>bias[c]
    for c in range(n):
        coefficient[MEAN_LOW * C + c] = low_part(coefficient[MEAN * C + c], mean[c], mean_low[c])
    if p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS:
        finish_gradients(p, first, n, reciprocal, coefficient)


cdef void finish_strip(const real* x, const Pass* p, Py_ssize_t strip) noexcept nogil:
    cdef Py_ssize_t first = first_channel(&p.geometry, strip)
    cdef Py_ssize_t end = first + channels_of(&p.geometry, strip)
    while first < end:
        finish_channels(x, p, first, min(AT_ONCE, end - first))
        first += AT_ONCE


cdef void write_tile(const real* x, const real* grad_output, real* out, const Pass* p,
                     Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    if p.kind == STATISTICS:
        return
    if p.kind != GRADIENTS:
        x = grad_output if p.kind == FROZEN_GRADIENTS else x
        grad_output = NULL
    apply_tile(x, grad_output, p, strip, piece, out)


cdef void run_strip(const real* x, const real* grad_output, real* out, const Pass* p,
                    Py_ssize_t strip) noexcept nogil:
    cdef Py_ssize_t piece
    if p.kind == GIVEN:
        finish_strip(x, p, strip)
        for piece in range(p.geometry.pieces):
            write_tile(x, grad_output, out, p, strip, piece)
        return
    for piece in range(p.geometry.pieces):
        reduce_tile(x, grad_output, p, strip, piece)
    finish_strip(x, p, strip)
    # The last piece first: it is the one still in the cache.
    for piece in range(p.geometry.pieces - 1, -1, -1):
        write_tile(x, grad_output, out, p, strip, piece)


cdef void run(const real* x, const real* grad_output, real* out, Pass* p,
              int num_threads) noexcept nogil:
    """Run a pass. The schedule is free: no result depends on it."""
    cdef Py_ssize_t strips = p.geometry.strips, pieces = p.geometry.pieces
    cdef Py_ssize_t tiles = strips * pieces
    cdef Py_ssize_t strip_values = p.geometry.strip_channels * p.geometry.S * p.geometry.N
    cdef Py_ssize_t strip, tile, chunk, at_a_time, chunks = parameter_chunks(p)
    # A thread computes in the modes of the caller: another library may have switched subnormal
    # numbers off, in the calling thread or in those of the pool. It gets its own back.
    cdef floating_point_modes modes = current_modes()
    cdef floating_point_modes own = modes   # set, because private variables begin as copies
    cdef Pace* pace = p.paces
    cdef int thread

    if p.geometry.parts > 1:
        use_parameters(x, p)
    if num_threads == 1:
        for strip in range(strips):
            run_strip(x, grad_output, out, p, strip)
        for chunk in range(chunks):
            finish_chunk(x, p, chunk)
        return
    for thread in range(num_threads * ROUNDS):   # a team may be smaller than it was meant to be
        p.paces[thread].channels = 0
    if ((strips % num_threads == 0 or strips >= 4 * num_threads or pieces == 1)
            and (p.geometry.by_plane or strip_values <= CACHED)):
        # Strip by strip, so that it is still in the cache when it is read again; several at a
        # time where they are small.
        at_a_time = max(1, min(strips // num_threads, PIECE // strip_values))
        p.seconds = seconds(CLOCK_MONOTONIC)
        with parallel(num_threads=num_threads):
            own = change_modes(modes)
            pace = p.paces + threadid()
            begin_round(pace, p.clock)
            for strip in prange(strips, schedule="dynamic", chunksize=at_a_time):
                run_strip(x, grad_output, out, p, strip)
                pace.channels += channels_of(&p.geometry, strip)
            end_round(pace, p.clock)
            if chunks:
                wait_for_team()   # Cython's loops in a parallel block do not
                for chunk in prange(chunks):
                    finish_chunk(x, p, chunk)
            change_modes(own)
        p.seconds = seconds(CLOCK_MONOTONIC) - p.seconds
        p.on_one_thread = alone_seconds(p.paces, num_threads)
    else:
        # Too few strips to keep all threads busy to the end, or parts of rows that would be
        # fetched a second time anyway: tile by tile in the order of the memory, in three rounds.
        p.seconds = seconds(CLOCK_MONOTONIC)
        with parallel(num_threads=num_threads):
            own = change_modes(modes)
            pace = p.paces + threadid()
            if p.kind != GIVEN:
                begin_round(pace, p.clock)
                for tile in prange(tiles, schedule="dynamic"):
                    reduce_tile(x, grad_output, p, tile % strips, tile // strips)
                    pace.channels += channels_of(&p.geometry, tile % strips)
                end_round(pace, p.clock)
                wait_for_team()
            for strip in prange(strips):
                finish_strip(x, p, strip)
            wait_for_team()
            for chunk in prange(chunks):
                finish_chunk(x, p, chunk)
            if p.kind != STATISTICS:
                pace = p.paces + num_threads + threadid()
                begin_round(pace, p.clock)
                for tile in prange(tiles, schedule="dynamic"):
                    write_tile(x, grad_output, out, p, tile % strips, (tiles - 1 - tile) // strips)
                    pace.channels += channels_of(&p.geometry, tile % strips)
                end_round(pace, p.clock)
            change_modes(own)
        p.seconds = seconds(CLOCK_MONOTONIC) - p.seconds
        if p.kind != GIVEN:
            p.on_one_thread += alone_seconds(p.paces, num_threads)
        if p.kind != STATISTICS:
            p.on_one_thread += alone_seconds(p.paces + num_threads, num_threads)
