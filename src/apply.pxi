# The two passes that write, with a few coefficients for each channel:
#
#   y          = ((x - mean) - mean_low) * scale + bias
#   grad_input = ((grad_output - mean_grad) - ((x - mean) - mean_low) * slope) * scale
#
# x is centred before it is scaled, by a mean in two parts: x * alpha + beta would lose as many
# digits as the mean is larger than the standard deviation.

cdef enum:   # rows of the (COEFFICIENTS, C) table, in the element type of x
    MEAN
    MEAN_LOW
    SCALE
    BIAS
    SLOPE
    COEFFICIENTS
    MEAN_GRAD = BIAS   # a pass has one or the other


cdef enum:
    ALIGNED_LINE = 256   # values from which a line is worth a short start up to alignment


cdef inline void apply_row(const real* x, const real* grad_output, const real* coefficients,
                           Py_ssize_t stride, const Py_ssize_t width,
                           const Py_ssize_t step,   # 1: coefficients per column; 0: one for all
                           const bint stream,       # out is aligned to whole cache lines
                           real* out) noexcept nogil:  # OUT, may be x or grad_output
    # By way of a row of its own, because out may be x: nothing is left to prove about overlap.
    cdef real[LANES] row
    cdef const real* mean = coefficients + MEAN * stride
    cdef const real* mean_low = coefficients + MEAN_LOW * stride
    cdef const real* scale = coefficients + SCALE * stride
    cdef const real* bias = coefficients + BIAS * stride
    cdef const real* mean_grad = coefficients + MEAN_GRAD * stride
    cdef const real* slope = coefficients + SLOPE * stride
    cdef Py_ssize_t k
    if grad_output == NULL:
        for k in range(width):
            row[k] = ((x[k] - mean[k * step]) - mean_low[k * step]) * scale[k * step] \
                + bias[k * step]
    else:
        for k in range(width):
            row[k] = ((grad_output[k] - mean_grad[k * step])
                      - ((x[k] - mean[k * step]) - mean_low[k * step]) * slope[k * step]) \
                * scale[k * step]
    if stream:
        stream_lines(out, row, width * sizeof(real))
    else:
        for k in range(width):
            out[k] = row[k]


cdef inline void apply_line(const real* x, const real* grad_output, const real* coefficients,
                            Py_ssize_t stride, Py_ssize_t n, const Py_ssize_t step,
                            const bint stream, real* out) noexcept nogil:  # OUT
    """Write n contiguous values."""
    cdef Py_ssize_t k = 0, chunk, head = 0
    if stream or n >= ALIGNED_LINE:
        # Up to the next cache line of out; arrays from one allocator are aligned alike, so the
        # loads of x gain as much as the stores.
        head = <Py_ssize_t>(-(<size_t>out // sizeof(real)) % (64 // sizeof(real)))
        head = min(n, head)
        if head:
            apply_row(x, grad_output, coefficients, stride, head, step, False, out)
    k = head
    for chunk in range((n - k) // LANES):
        apply_row(x + k, grad_output + k if grad_output else NULL, coefficients + k * step, stride,
                  LANES, step, stream, out + k)
        k += LANES
    for chunk in range((n - k) // FEW_LANES):
        apply_row(x + k, grad_output + k if grad_output else NULL, coefficients + k * step, stride,
                  FEW_LANES, step, False, out + k)
        k += FEW_LANES
    if k < n:
        apply_row(x + k, grad_output + k if grad_output else NULL, coefficients + k * step, stride,
                  n - k, step, False, out + k)


cdef inline void apply_sheet(const real* x, const real* grad_output, const Sheet* sheet,
                             const real* coefficients, Py_ssize_t stride, const Py_ssize_t step,
                             const bint stream, real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t i, j, at, run
    if step == 0:   # a plane needs no rows here
        run = (sheet.rows * sheet.width + sheet.tail) // sheet.channels
        for i in range(sheet.runs):
            at = sheet.offset + i * sheet.run_stride
            for j in range(sheet.channels):
                apply_line(x + at, grad_output + at if grad_output else NULL, coefficients + j,
                           stride, run, 0, stream, out + at)
                at += run
    else:
        at = sheet.offset
        for j in range(sheet.rows):
            apply_line(x + at, grad_output + at if grad_output else NULL, coefficients, stride,
                       sheet.width, 1, stream, out + at)
            at += sheet.row_stride
        if sheet.tail:
            apply_line(x + at, grad_output + at if grad_output else NULL, coefficients, stride,
                       sheet.tail, 1, stream, out + at)


cdef inline void apply_variant(const real* x, const real* grad_output, const Sheet* sheet,
                               const real* coefficients, Py_ssize_t stride, const Py_ssize_t step,
                               bint stream, real* out) noexcept nogil:  # OUT
    """One loop for each combination, free of decisions."""
    if grad_output and stream:
        apply_sheet(x, grad_output, sheet, coefficients, stride, step, True, out)
    elif grad_output:
        apply_sheet(x, grad_output, sheet, coefficients, stride, step, False, out)
    elif stream:
        apply_sheet(x, <const real*>NULL, sheet, coefficients, stride, step, True, out)
    else:
        apply_sheet(x, <const real*>NULL, sheet, coefficients, stride, step, False, out)


cdef void apply_tile(const real* x, const real* grad_output, const Geometry* g, Py_ssize_t strip,
                     Py_ssize_t piece, const real* coefficients,  # IN (COEFFICIENTS, C)
                     bint stream, real* out) noexcept nogil:      # OUT
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef real[COEFFICIENTS * WIDTH] column
    cdef Py_ssize_t c, q

    coefficients += strip * g.strip_channels
    if g.by_plane:
        apply_variant(x, grad_output, &sheet, coefficients, g.C, 0, stream, out)
    elif sheet.repeat * sheet.span == 1:
        apply_variant(x, grad_output, &sheet, coefficients, g.C, 1, stream, out)
    else:
        for q in range(COEFFICIENTS if grad_output else SLOPE):
            for c in range(sheet.channels):
                spread(coefficients[q * g.C + c], &sheet, c, column + q * WIDTH)
        apply_variant(x, grad_output, &sheet, column, WIDTH, 1, stream, out)
    if stream:
        stream_fence()
