# The two passes that write, with a few coefficients for each channel:
#
#   y          = ((x - mean) - mean_low) * scale + bias
#   grad_input = ((grad_output - mean_grad) - ((x - mean) - mean_low) * slope) * scale
#
# x is centred before it is scaled, by a mean in two parts: x * alpha + beta would lose as many
# digits as the mean is larger than the standard deviation.
#
# scale is weight / std where a channel has one weight. Where it has several, scale is 1 / std, and
#
#   y          = ((x - mean) - mean_low) * scale * weight + bias
#   grad_input = ((grad_output * weight - mean_grad)
#                 - ((x - mean) - mean_low) * slope) * scale
#
# with weight and bias beside x, value by value, or, where they are for several values each, of the
# columns of a table: there y has weight in its scale, and grad_input finds it in WEIGHT.

cdef enum:   # rows of the (COEFFICIENTS, channels) table, in the element type of x
    MEAN
    MEAN_LOW
    SCALE
    BIAS
    SLOPE
    COEFFICIENTS
    MEAN_GRAD = BIAS         # a pass has one or the other
    WEIGHT = COEFFICIENTS    # only where it is put before a loop
    ALL_COEFFICIENTS


cdef enum:
    # A line more than WIDTH, so that a row can start within one; and rows of the table that lie
    # whole pages apart would fight for the same places of the L1 cache.
    TABLE_WIDTH = WIDTH + 16
    SHORT = 4096         # values too few to be worth a table
    ALIGNED_LINE = 256   # values from which a line is worth a short start up to alignment


cdef inline Py_ssize_t values_to_line(const real* at, Py_ssize_t n) noexcept nogil:
    """How many of n values lie before the first that begins a cache line."""
    return min(n, <Py_ssize_t>(-(<size_t>at // sizeof(real)) % (64 // sizeof(real))))


cdef inline void apply_row(const real* x, const real* grad_output,
                           const real* weights, const real* biases,   # value by value, or NULL
                           const real* coefficients, Py_ssize_t stride, const Py_ssize_t width,
                           const bint weighted,     # whether grad_output is, by a coefficient
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
    cdef const real* weight = coefficients + WEIGHT * stride
    cdef real grad
    cdef Py_ssize_t k
    if grad_output == NULL:
        for k in range(width):
            row[k] = ((x[k] - mean[k]) - mean_low[k]) * scale[k]
            if weights:
                row[k] = row[k] * weights[k] + biases[k]
            else:
                row[k] = row[k] + bias[k]
    else:
        for k in range(width):
            grad = grad_output[k]
            if weights:
                grad = grad * weights[k]
            elif weighted:
                grad = grad * weight[k]
            row[k] = ((grad - mean_grad[k])
                      - ((x[k] - mean[k]) - mean_low[k]) * slope[k]) * scale[k]
    if stream:
        stream_lines(out, row, width * sizeof(real))
    else:
        for k in range(width):
            out[k] = row[k]


cdef inline void apply_rows(const real* x, const real* grad_output, const real* weights,
                            const real* biases, Py_ssize_t rows, Py_ssize_t row_stride,
                            const real* coefficients, Py_ssize_t stride, const Py_ssize_t width,
                            const Py_ssize_t step,   # 1: coefficients per column; 0: one for all
                            const bint weighted, const bint stream,
                            real* out) noexcept nogil:  # OUT
    # Coefficients of its own, of a literal width, which the compiler keeps in registers.
    cdef real[ALL_COEFFICIENTS * LANES] own
    cdef Py_ssize_t j, k, q
    for q in range((ALL_COEFFICIENTS if weighted else COEFFICIENTS) if grad_output else SLOPE):
        for k in range(width):
            own[q * width + k] = coefficients[q * stride + k * step]
    for j in range(rows):
        apply_row(x, grad_output, weights, biases, own, width, width, weighted, stream, out)
        x += row_stride
        out += row_stride
        if grad_output:
            grad_output += row_stride
        if weights:
            weights += row_stride
            biases += row_stride


cdef inline void apply_powers(const real* x, const real* grad_output, const real* weights,
                              const real* biases, Py_ssize_t rows, Py_ssize_t row_stride,
                              const real* coefficients, Py_ssize_t stride, Py_ssize_t n,
                              const Py_ssize_t step, const bint weighted,
                              real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t k = 0
    if n & 8:
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), rows,
                   row_stride, coefficients + k * step, stride, 8, step, weighted, False, out + k)
        k += 8
    if n & 4:
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), rows,
                   row_stride, coefficients + k * step, stride, 4, step, weighted, False, out + k)
        k += 4
    if n & 2:
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), rows,
                   row_stride, coefficients + k * step, stride, 2, step, weighted, False, out + k)
        k += 2
    if n & 1:
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), rows,
                   row_stride, coefficients + k * step, stride, 1, step, weighted, False, out + k)


cdef void apply_few(const real* x, const real* grad_output, const real* weights,
                    const real* biases, Py_ssize_t rows, Py_ssize_t row_stride,
                    const real* coefficients, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t step,
                    bint weighted, real* out) noexcept nogil:  # OUT
    """Write n < 16 columns: what is left over beside whole vectors."""
    # Not inline: there would be dozens of copies, for few values beside many.
    cdef const real* none = NULL
    if weights and grad_output:
        apply_powers(x, grad_output, weights, biases, rows, row_stride, coefficients, stride, n, 0,
                     False, out)
    elif weights:
        apply_powers(x, none, weights, biases, rows, row_stride, coefficients, stride, n, 0,
                     False, out)
    elif grad_output and weighted:
        apply_powers(x, grad_output, none, none, rows, row_stride, coefficients, stride, n, step,
                     True, out)
    elif grad_output and step:
        apply_powers(x, grad_output, none, none, rows, row_stride, coefficients, stride, n, 1,
                     False, out)
    elif grad_output:
        apply_powers(x, grad_output, none, none, rows, row_stride, coefficients, stride, n, 0,
                     False, out)
    elif step:
        apply_powers(x, none, none, none, rows, row_stride, coefficients, stride, n, 1, False,
                     out)
    else:
        apply_powers(x, none, none, none, rows, row_stride, coefficients, stride, n, 0, False,
                     out)


cdef inline void apply_band(const real* x, const real* grad_output, const real* weights,
                            const real* biases, Py_ssize_t rows, Py_ssize_t row_stride,
                            const real* coefficients, Py_ssize_t stride, Py_ssize_t n,
                            const Py_ssize_t step, const bint weighted, const bint stream,
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
            apply_few(x, grad_output, weights, biases, rows, row_stride, coefficients, stride, k,
                      step, weighted, out)
    if step == 0:
        j = (n - k) // wide
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), j, wide,
                   coefficients, stride, wide, 0, weighted, stream, out + k)
        k += j * wide
    else:
        while n - k >= wide:
            apply_rows(x + k, moved(grad_output, k), <const real*>NULL, <const real*>NULL, rows,
                       row_stride, coefficients + k, stride, wide, 1, weighted, stream, out + k)
            k += wide
    while n - k >= vector:
        apply_rows(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), rows,
                   row_stride, coefficients + k * step, stride, vector, step, weighted, False,
                   out + k)
        k += vector
    if step == 0:   # planes may be short
        apply_powers(x + k, moved(grad_output, k), moved(weights, k), moved(biases, k), 1, 0,
                     coefficients, stride, n - k, 0, weighted, out + k)
    elif k < n:
        apply_few(x + k, moved(grad_output, k), <const real*>NULL, <const real*>NULL, rows,
                  row_stride, coefficients + k, stride, n - k, 1, weighted, out + k)


cdef inline void apply_planes(const real* x, const real* grad_output, const Sheet* sheet,
                              const real* coefficients, Py_ssize_t stride, const bint stream,
                              real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t run = sheet.rows * sheet.width + sheet.tail
    cdef Py_ssize_t i, c, at
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        for c in range(sheet.channels):
            apply_band(x + at, moved(grad_output, at), <const real*>NULL, <const real*>NULL, 1, 0,
                       coefficients + c, stride, run, 0, False, stream, out + at)
            at += run


cdef inline void apply_parts(const real* x, const real* grad_output, const Pass* p,
                             const Sheet* sheet, Py_ssize_t first, const bint stream,
                             real* out) noexcept nogil:  # OUT
    """Write by plane, with a weight and a bias for each part of a channel."""
    cdef Py_ssize_t S = p.geometry.S, length = S // p.geometry.parts
    cdef Py_ssize_t start = sheet.start, stop = start + sheet.rows * sheet.width + sheet.tail
    cdef const real* coefficients = <const real*>p.coefficients + first
    cdef const real* weight
    cdef const real* bias
    cdef real[ALL_COEFFICIENTS] own
    cdef Py_ssize_t i, c, q, k, at, begin, end
    for i in range(sheet.runs):
        for c in range(sheet.channels):
            weight, bias = weights_of(x, p, first + c), biases_of(x, p, first + c)
            for q in range(start // length, ceil_div(stop, length)):
                begin, end = max(start, q * length), min(stop, (q + 1) * length)
                at = sheet.offset + i * sheet.run_stride + c * S + begin - start
                for k in range(COEFFICIENTS):
                    own[k] = coefficients[k * p.geometry.channels + c]
                if grad_output:
                    own[WEIGHT] = weight[q]
                else:
                    own[SCALE] = own[SCALE] * weight[q]
                    own[BIAS] = bias[q]
                apply_band(x + at, moved(grad_output, at), <const real*>NULL, <const real*>NULL, 1,
                           0, own, 1, end - begin, 0, True, stream, out + at)


cdef inline void apply_values(const real* x, const real* grad_output, const Pass* p,
                              const Sheet* sheet, Py_ssize_t first, const bint stream,
                              real* out) noexcept nogil:  # OUT
    """Write by plane, with a weight and a bias for each value of a run."""
    cdef Py_ssize_t run = sheet.rows * sheet.width + sheet.tail, start = sheet.start
    cdef const real* coefficients = <const real*>p.coefficients + first
    cdef Py_ssize_t i, c, at
    for i in range(sheet.runs):
        for c in range(sheet.channels):
            at = sheet.offset + i * sheet.run_stride + c * p.geometry.S
            apply_band(x + at, moved(grad_output, at), weights_of(x, p, first + c) + start,
                       biases_of(x, p, first + c) + start, 1, 0, coefficients + c,
                       p.geometry.channels, run, 0, False, stream, out + at)


cdef inline void apply_sheet(const real* x, const real* grad_output, const Sheet* sheet,
                             const real* coefficients, Py_ssize_t stride, const bint weighted,
                             const bint stream, real* out) noexcept nogil:  # OUT
    # Rows that do not all begin alike in their cache lines are streamed one by one.
    cdef Py_ssize_t band = 1 if stream and sheet.row_stride * sizeof(real) % 64 else BAND
    cdef Py_ssize_t at = sheet.offset
    cdef Py_ssize_t j, n
    for j in range(ceil_div(sheet.rows, band)):
        n = min(band, sheet.rows - j * band)
        apply_band(x + at, moved(grad_output, at), <const real*>NULL, <const real*>NULL, n,
                   sheet.row_stride, coefficients, stride, sheet.width, 1, weighted, stream,
                   out + at)
        at += n * sheet.row_stride
    if sheet.tail:
        apply_band(x + at, moved(grad_output, at), <const real*>NULL, <const real*>NULL, 1, 0,
                   coefficients, stride, sheet.tail, 1, weighted, stream, out + at)


cdef inline void apply_columns(const real* x, const real* grad_output, const Sheet* sheet,
                               const real* coefficients, Py_ssize_t stride, bint weighted,
                               const bint stream, real* out) noexcept nogil:  # OUT
    """Decide here, once, what the loops would decide for every row."""
    if grad_output and weighted:
        apply_sheet(x, grad_output, sheet, coefficients, stride, True, stream, out)
    elif grad_output:
        apply_sheet(x, grad_output, sheet, coefficients, stride, False, stream, out)
    else:
        apply_sheet(x, <const real*>NULL, sheet, coefficients, stride, False, stream, out)


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


cdef inline void spread_parameters(const real* parameter,   # (channels, parts)
                                   const Sheet* sheet, Py_ssize_t parts,
                                   real* columns) noexcept nogil:  # OUT
    spread(parameter, sheet.channels * parts, sheet.span // parts, sheet.repeat, columns)


cdef inline void apply_table(const real* x, const real* grad_output, const Pass* p, Sheet sheet,
                             Py_ssize_t first, const bint stream,
                             real* out) noexcept nogil:  # OUT
    """Write by row, with a table of the coefficients of each column."""
    cdef real[ALL_COEFFICIENTS * TABLE_WIDTH] table
    cdef real[TABLE_WIDTH] weight
    cdef const real* coefficients = <const real*>p.coefficients + first
    cdef real* columns
    cdef bint weighted = p.geometry.parts > 1
    cdef Py_ssize_t start = sheet.offset, head = 0, k, q

    if sheet.row_stride == sheet.width:
        # From one cache line to the next: the table goes on for as long as the first row is late.
        head = values_to_line(out + start, sheet.rows * sheet.width)
        sheet = unbroken(&sheet, head)
    for q in range(COEFFICIENTS if grad_output else SLOPE):
        spread(coefficients + q * p.geometry.channels, sheet.channels, sheet.span, sheet.repeat,
               table + q * TABLE_WIDTH)
    if weighted and grad_output:
        spread_parameters(weights_of(x, p, first), &sheet, p.geometry.parts,
                          table + WEIGHT * TABLE_WIDTH)
    elif weighted:
        spread_parameters(weights_of(x, p, first), &sheet, p.geometry.parts, weight)
        spread_parameters(biases_of(x, p, first), &sheet, p.geometry.parts,
                          table + BIAS * TABLE_WIDTH)
        for k in range(sheet.width):
            table[SCALE * TABLE_WIDTH + k] *= weight[k]
    for q in range(ALL_COEFFICIENTS if weighted else COEFFICIENTS):
        columns = table + q * TABLE_WIDTH
        for k in range(head):
            columns[sheet.width + k] = columns[k]
    apply_few(x + start, moved(grad_output, start), NULL, NULL, 1, 0, table, TABLE_WIDTH, head, 1,
              weighted, out + start)
    apply_columns(x, grad_output, &sheet, table + head, TABLE_WIDTH, weighted, stream, out)


cdef inline void apply_any(const real* x, const real* grad_output, const Pass* p,
                           const Sheet* sheet, Py_ssize_t first, const bint by_plane,
                           const bint stream, real* out) noexcept nogil:  # OUT
    cdef const real* coefficients = <const real*>p.coefficients + first
    cdef Py_ssize_t stride = p.geometry.channels
    if by_plane:
        if p.geometry.by_value:
            apply_values(x, grad_output, p, sheet, first, stream, out)
        elif p.geometry.parts > 1:
            apply_parts(x, grad_output, p, sheet, first, stream, out)
        else:
            apply_planes(x, grad_output, sheet, coefficients, stride, stream, out)
    # Where a row holds each channel once, the coefficients lie as a table would.
    elif (sheet.repeat * sheet.span == 1
            and (sheet.width > WIDTH // 2 or sheet.rows * sheet.width < SHORT)):
        apply_columns(x, grad_output, sheet, coefficients, stride, False, stream, out)
    else:
        apply_table(x, grad_output, p, sheet[0], first, stream, out)


cdef inline void apply_any_gradient(const real* x, const real* grad_output, const Pass* p,
                                    const Sheet* sheet, Py_ssize_t first, const bint stream,
                                    real* out) noexcept nogil:  # OUT
    if not p.geometry.by_plane:
        apply_any(x, grad_output, p, sheet, first, False, stream, out)
    elif grad_output:
        apply_any(x, grad_output, p, sheet, first, True, stream, out)
    else:
        apply_any(x, <const real*>NULL, p, sheet, first, True, stream, out)


cdef void apply_tile(const real* x, const real* grad_output, const Pass* p, Py_ssize_t strip,
                     Py_ssize_t piece, real* out) noexcept nogil:      # OUT
    cdef Sheet sheet = sheet_of(&p.geometry, strip, piece)
    cdef Py_ssize_t first = first_channel(&p.geometry, strip)
    if p.stream:
        apply_any_gradient(x, grad_output, p, &sheet, first, True, out)
        stream_fence()
    else:
        apply_any_gradient(x, grad_output, p, &sheet, first, False, out)
