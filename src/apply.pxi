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
    # A line more than WIDTH, so that a row can start within one; and rows of the table that lie
    # whole pages apart would fight for the same places of the L1 cache.
    TABLE_WIDTH = WIDTH + 16
    SHORT = 4096         # values too few to be worth a table
    ALIGNED_LINE = 256   # values from which a line is worth a short start up to alignment


cdef inline Py_ssize_t values_to_line(const real* at, Py_ssize_t n) noexcept nogil:
    """How many of n values lie before the first that begins a cache line."""
    return min(n, <Py_ssize_t>(-(<size_t>at // sizeof(real)) % (64 // sizeof(real))))


cdef inline void apply_row(const real* x, const real* grad_output, const real* coefficients,
                           Py_ssize_t stride, const Py_ssize_t width,
                           const Py_ssize_t step,   # 1: coefficients per column; 0: one for all
                           const bint stream,       # past the cache: out is whole cache lines
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


cdef inline void apply_rows(const real* x, const real* grad_output, Py_ssize_t rows,
                            Py_ssize_t row_stride, const real* coefficients, Py_ssize_t stride,
                            const Py_ssize_t width, const Py_ssize_t step, const bint stream,
                            real* out) noexcept nogil:  # OUT
    # Coefficients of its own, of a literal width, which the compiler keeps in registers.
    cdef real[COEFFICIENTS * LANES] own
    cdef Py_ssize_t j, k, q
    for q in range(COEFFICIENTS if grad_output else SLOPE):
        for k in range(width):
            own[q * width + k] = coefficients[q * stride + k * step]
    for j in range(rows):
        apply_row(x, grad_output, own, width, width, 1, stream, out)
        x += row_stride
        out += row_stride
        if grad_output:
            grad_output += row_stride


cdef inline void apply_powers(const real* x, const real* grad_output, Py_ssize_t rows,
                              Py_ssize_t row_stride, const real* coefficients,
                              Py_ssize_t stride, Py_ssize_t n, const Py_ssize_t step,
                              real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t k = 0
    if n & 8:
        apply_rows(x, grad_output, rows, row_stride, coefficients, stride, 8, step, False, out)
        k += 8
    if n & 4:
        apply_rows(x + k, moved(grad_output, k), rows, row_stride,
                   coefficients + k * step, stride, 4, step, False, out + k)
        k += 4
    if n & 2:
        apply_rows(x + k, moved(grad_output, k), rows, row_stride,
                   coefficients + k * step, stride, 2, step, False, out + k)
        k += 2
    if n & 1:
        apply_rows(x + k, moved(grad_output, k), rows, row_stride,
                   coefficients + k * step, stride, 1, step, False, out + k)


cdef void apply_few(const real* x, const real* grad_output, Py_ssize_t rows, Py_ssize_t row_stride,
                    const real* coefficients, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t step,
                    real* out) noexcept nogil:  # OUT
    """Write n < 16 columns: what is left over beside whole vectors."""
    # Not inline: there would be dozens of copies, for few values beside many.
    if grad_output and step:
        apply_powers(x, grad_output, rows, row_stride, coefficients, stride, n, 1, out)
    elif grad_output:
        apply_powers(x, grad_output, rows, row_stride, coefficients, stride, n, 0, out)
    elif step:
        apply_powers(x, <const real*>NULL, rows, row_stride, coefficients, stride, n, 1, out)
    else:
        apply_powers(x, <const real*>NULL, rows, row_stride, coefficients, stride, n, 0, out)


cdef inline void apply_band(const real* x, const real* grad_output, Py_ssize_t rows,
                            Py_ssize_t row_stride, const real* coefficients, Py_ssize_t stride,
                            Py_ssize_t n, const Py_ssize_t step, const bint stream,
                            real* out) noexcept nogil:  # OUT
    """Write n columns of some rows."""
    # Two vectors, whose coefficients fit the registers; but no less than a cache line.
    cdef Py_ssize_t wide = max(64, 2 * VECTOR_BYTES) // sizeof(real)
    cdef Py_ssize_t vector = VECTOR_BYTES // sizeof(real)
    cdef Py_ssize_t k = 0, j
    if stream or n >= ALIGNED_LINE:
        # Up to the next cache line of out; arrays from one allocator are aligned alike, so the
        # loads of x gain as much as the stores.
        k = values_to_line(out, n)
        if k:
            apply_few(x, grad_output, rows, row_stride, coefficients, stride, k, step, out)
    if step == 0:
        j = (n - k) // wide
        apply_rows(x + k, moved(grad_output, k), j, wide, coefficients, stride, wide, 0, stream,
                   out + k)
        k += j * wide
    else:
        while n - k >= wide:
            apply_rows(x + k, moved(grad_output, k), rows, row_stride, coefficients + k, stride,
                       wide, 1, stream, out + k)
            k += wide
    while n - k >= vector:
        apply_rows(x + k, moved(grad_output, k), rows, row_stride,
                   coefficients + k * step, stride, vector, step, False, out + k)
        k += vector
    if step == 0:   # planes may be short
        apply_powers(x + k, moved(grad_output, k), 1, 0, coefficients, stride, n - k, 0, out + k)
    elif k < n:
        apply_few(x + k, moved(grad_output, k), rows, row_stride, coefficients + k, stride, n - k,
                  1, out + k)


cdef inline void apply_planes(const real* x, const real* grad_output, const Sheet* sheet,
                              const real* coefficients, Py_ssize_t stride, const bint stream,
                              real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t run = sheet.rows * sheet.width + sheet.tail
    cdef Py_ssize_t i, c, at
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        for c in range(sheet.channels):
            apply_band(x + at, moved(grad_output, at), 1, 0, coefficients + c, stride, run, 0,
                       stream, out + at)
            at += run


cdef inline void apply_sheet(const real* x, const real* grad_output, const Sheet* sheet,
                             const real* coefficients, Py_ssize_t stride, const bint stream,
                             real* out) noexcept nogil:  # OUT
    # Rows that do not all begin alike in their cache lines are streamed one by one.
    cdef Py_ssize_t band = 1 if stream and sheet.row_stride * sizeof(real) % 64 else BAND
    cdef Py_ssize_t at = sheet.offset
    cdef Py_ssize_t j, n
    for j in range(ceil_div(sheet.rows, band)):
        n = min(band, sheet.rows - j * band)
        apply_band(x + at, moved(grad_output, at), n, sheet.row_stride, coefficients, stride,
                   sheet.width, 1, stream, out + at)
        at += n * sheet.row_stride
    if sheet.tail:
        apply_band(x + at, moved(grad_output, at), 1, 0, coefficients, stride, sheet.tail, 1,
                   stream, out + at)


cdef inline void apply_variant(const real* x, const real* grad_output, const Sheet* sheet,
                               const real* coefficients, Py_ssize_t stride, bint by_plane,
                               const bint stream, real* out) noexcept nogil:  # OUT
    """Decide here, once, what the loops would decide for every row."""
    if by_plane and grad_output:
        apply_planes(x, grad_output, sheet, coefficients, stride, stream, out)
    elif by_plane:
        apply_planes(x, <const real*>NULL, sheet, coefficients, stride, stream, out)
    elif grad_output:
        apply_sheet(x, grad_output, sheet, coefficients, stride, stream, out)
    else:
        apply_sheet(x, <const real*>NULL, sheet, coefficients, stride, stream, out)


cdef inline Sheet unbroken(const Sheet* sheet, Py_ssize_t head) noexcept nogil:
    """Rows without gaps between them, after the first few values: the same in longer rows."""
    cdef Sheet longer = sheet[0]
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t n = sheet.rows * sheet.width + sheet.tail - head
    longer.repeat = max(1, min(WIDTH // period, n // (2 * BAND * period)))
    if longer.repeat >= 16:
        longer.repeat -= longer.repeat % 16   # so that all rows begin alike in their cache lines
    longer.offset += head
    longer.width = longer.row_stride = longer.repeat * period
    longer.rows, longer.tail = n // longer.width, n % longer.width
    return longer


cdef inline void apply_table(const real* x, const real* grad_output, Sheet sheet,
                             const real* coefficients, Py_ssize_t C, const bint stream,
                             real* out) noexcept nogil:  # OUT
    """Write by row, with a table of the coefficients of each column."""
    cdef real[COEFFICIENTS * TABLE_WIDTH] table
    cdef real* columns
    cdef Py_ssize_t start = sheet.offset, head = 0, k, q

    if sheet.row_stride == sheet.width:
        # From one cache line to the next: the table goes on for as long as the first row is late.
        head = values_to_line(out + start, sheet.rows * sheet.width)
        sheet = unbroken(&sheet, head)
    for q in range(COEFFICIENTS if grad_output else SLOPE):
        columns = table + q * TABLE_WIDTH
        spread(coefficients + q * C, sheet.channels, sheet.span, sheet.repeat, columns)
        for k in range(head):
            columns[sheet.width + k] = columns[k]
    apply_few(x + start, moved(grad_output, start), 1, 0, table, TABLE_WIDTH, head, 1,
              out + start)
    apply_variant(x, grad_output, &sheet, table + head, TABLE_WIDTH, False, stream, out)


cdef inline void apply_any(const real* x, const real* grad_output, const Geometry* g,
                           const Sheet* sheet, const real* coefficients, const bint stream,
                           real* out) noexcept nogil:  # OUT
    # Where a row holds each channel once, the coefficients lie as a table would.
    cdef bint needs_no_table = (
        sheet.repeat * sheet.span == 1
        and (sheet.width > WIDTH // 2 or sheet.rows * sheet.width < SHORT))
    if g.by_plane or needs_no_table:
        apply_variant(x, grad_output, sheet, coefficients, g.C, g.by_plane, stream, out)
    else:
        apply_table(x, grad_output, sheet[0], coefficients, g.C, stream, out)


cdef void apply_tile(const real* x, const real* grad_output, const Geometry* g, Py_ssize_t strip,
                     Py_ssize_t piece, const real* coefficients,  # IN (COEFFICIENTS, C)
                     bint stream, real* out) noexcept nogil:      # OUT
    cdef Sheet sheet = sheet_of(g, strip, piece)
    coefficients += strip * g.strip_channels
    if stream:
        apply_any(x, grad_output, g, &sheet, coefficients, True, out)
        stream_fence()
    else:
        apply_any(x, grad_output, g, &sheet, coefficients, False, out)
