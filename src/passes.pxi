# A pass over an array: reduce every tile, finish every channel, apply to every tile.

cdef enum Kind:
    STATISTICS        # reduce, finish
    BATCH             # reduce, finish, apply: normalise by the statistics of the batch
    GIVEN             # finish, apply: normalise by given statistics
    GRADIENTS         # reduce, finish, apply: through the statistics of the batch
    FROZEN_GRADIENTS  # reduce, finish, apply: the statistics do not depend on x


cdef struct Pass:
    Kind kind
    Geometry geometry
    PerChannel weight
    PerChannel bias
    PerChannel mean         # given statistics; mean_low is what float64 rounds off mean
    PerChannel mean_low
    PerChannel var
    double eps
    bint stream             # write past the cache
    double* batch_mean      # OUT (C,) statistics of the batch
    double* batch_mean_low
    double* batch_var
    void* grad_weight       # OUT (C,) of the element type of x, or NULL
    void* grad_bias
    void* partial           # (pieces, C) Moments or Sums
    void* coefficients      # (COEFFICIENTS, C) of the element type of x


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
        reduce_gradients(grad_output, x, &p.geometry, strip, piece, &p.mean, &p.mean_low,
                         <Sums*>p.partial)


cdef void finish_channel(const real* x, const Pass* p, Py_ssize_t c) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef real* coefficient = <real*>p.coefficients + c
    cdef double mean = value_of(&p.mean, c)
    cdef double mean_low = value_of(&p.mean_low, c)
    cdef double var = value_of(&p.var, c)
    cdef double count = <double>g.N * g.S
    cdef double reciprocal, rounded
    cdef Moments moments
    cdef Sums sums

    if has_batch_statistics(p):
        moments = merge(<const Moments*>p.partial + c, g.pieces, g.C)
        # Two-sum (Knuth): mean and mean_low together are the exact sum of the two parts.
        mean = moments.shift + moments.mean
        rounded = mean - moments.shift
        mean_low = (moments.shift - (mean - rounded)) + (moments.mean - rounded)
        var = moments.m2 / moments.count
        if var < 0:   # by rounding, where all values are equal; a NaN stays
            var = 0
        p.batch_mean[c] = mean
        p.batch_mean_low[c] = mean_low
        p.batch_var[c] = var
        if p.kind == STATISTICS:
            return

    reciprocal = 1 / sqrt(var + p.eps)
    coefficient[SCALE * g.C] = <real>(value_of(&p.weight, c) * reciprocal)
    coefficient[MEAN * g.C] = <real>mean
    coefficient[MEAN_LOW * g.C] = <real>((mean - <double><real>mean) + mean_low)
    if coefficient[MEAN_LOW * g.C] != coefficient[MEAN_LOW * g.C]:   # an infinite mean
        coefficient[MEAN_LOW * g.C] = 0
    coefficient[BIAS * g.C] = <real>value_of(&p.bias, c)
    if p.kind == BATCH or p.kind == GIVEN:
        return

    sums = merge_sums(<const Sums*>p.partial + c, g.pieces, g.C)
    if p.grad_bias:
        (<real*>p.grad_bias)[c] = <real>sums.grad_output
    if p.grad_weight:
        (<real*>p.grad_weight)[c] = <real>(sums.grad_output_centred * reciprocal)
    coefficient[MEAN_GRAD * g.C] = <real>(sums.grad_output / count)
    coefficient[SLOPE * g.C] = <real>(sums.grad_output_centred / count * reciprocal * reciprocal)
    if p.kind == FROZEN_GRADIENTS:
        # grad_output takes the place of x, and only the scale is left.
        coefficient[MEAN * g.C] = coefficient[MEAN_LOW * g.C] = coefficient[BIAS * g.C] = 0


cdef void finish_strip(const real* x, const Pass* p, Py_ssize_t strip) noexcept nogil:
    cdef Py_ssize_t first = strip * p.geometry.strip_channels
    cdef Py_ssize_t c
    for c in range(first, min(first + p.geometry.strip_channels, p.geometry.C)):
        finish_channel(x, p, c)


cdef void write_tile(const real* x, const real* grad_output, real* out, const Pass* p,
                     Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef const real* coefficients = <const real*>p.coefficients
    if p.kind == STATISTICS:
        return
    if p.kind != GRADIENTS:
        x = grad_output if p.kind == FROZEN_GRADIENTS else x
        grad_output = NULL
    apply_tile(x, grad_output, &p.geometry, strip, piece, coefficients, p.stream, out)


cdef void run_strip(const real* x, const real* grad_output, real* out, const Pass* p,
                    Py_ssize_t strip) noexcept nogil:
    cdef Py_ssize_t piece
    for piece in range(p.geometry.pieces):
        reduce_tile(x, grad_output, p, strip, piece)
    finish_strip(x, p, strip)
    # The last piece first: it is the one still in the cache.
    for piece in range(p.geometry.pieces - 1, -1, -1):
        write_tile(x, grad_output, out, p, strip, piece)


cdef void run(const real* x, const real* grad_output, real* out, const Pass* p,
              int num_threads) noexcept nogil:
    """Strip by strip, or tile by tile where strips are too few to keep all threads busy."""
    cdef Py_ssize_t strips = p.geometry.strips, pieces = p.geometry.pieces
    cdef Py_ssize_t tiles = strips * pieces
    cdef Py_ssize_t strip, tile, chunk

    if num_threads == 1:
        for strip in range(strips):
            run_strip(x, grad_output, out, p, strip)
    elif strips % num_threads == 0 or strips >= 4 * num_threads or pieces == 1:
        chunk = p.geometry.strip_channels * p.geometry.S * p.geometry.N
        chunk = max(1, min(strips // num_threads, PIECE // chunk))
        for strip in prange(strips, schedule="dynamic", chunksize=chunk, num_threads=num_threads):
            run_strip(x, grad_output, out, p, strip)
    else:
        for tile in prange(tiles, schedule="dynamic", num_threads=num_threads):
            reduce_tile(x, grad_output, p, tile % strips, tile // strips)
        for strip in prange(strips, num_threads=num_threads):
            finish_strip(x, p, strip)
        for tile in prange(tiles, schedule="dynamic", num_threads=num_threads):
            write_tile(x, grad_output, out, p, tile % strips, (tiles - 1 - tile) // strips)
