# The sums that the gradients of batch normalisation need (Ioffe and Szegedy 2015). With
# m = N * S values per channel and x_hat = (x - mean) / std:
#
#   grad_bias   = sum(grad_output)
#   grad_weight = sum(grad_output * x_hat)
#   grad_input  = weight / std * (grad_output - grad_bias / m - x_hat * grad_weight / m)
#
# With frozen statistics mean and std do not depend on x, and the two last terms are missing.
#
# Where the weight changes within a channel (group, layer and RMS norm), it belongs to grad_output
# everywhere but in grad_weight and grad_bias, which are summed over the values that share it:
#
#   grad_input  = (g - sum(g) / m - x_hat * sum(g * x_hat) / m) / std,  g = weight * grad_output

cdef struct Sums:
    double grad_output           # sum(grad_output)
    double grad_output_centred   # sum(grad_output * (x - mean))


# All sums are in float64, where the product of two float32 is exact: sums that nearly cancel keep
# their digits. mean is in two parts, and what depends on the second is left out of the loop:
#
#   sum(grad_output * (x - mean)) = sum(grad_output * (x - high)) - low * sum(grad_output)

cdef inline void multiply_row(const real* grad_output,
                              const real* weight,   # of grad_output, or NULL
                              const real* x,
                              const real* mean,     # of x, or NULL
                              const Py_ssize_t width,
                              double* total, double* product) noexcept nogil:  # IN, OUT
    cdef real grad, centred
    cdef Py_ssize_t k
    for k in range(width):
        grad = grad_output[k]
        if weight:
            grad = grad * weight[k]
        centred = x[k]
        if mean:
            centred = centred - mean[k]
        total[k] += grad
        if sizeof(real) < sizeof(double):
            product[k] = multiply_add(grad, centred, product[k])
        else:
            product[k] += grad * centred


cdef inline void multiply_rows(const real* grad_output, const real* weight, const real* x,
                               Py_ssize_t rows, Py_ssize_t row_stride, const real* mean,
                               const real* row_norms,   # (3, BAND), or NULL
                               const Py_ssize_t width,
                               const Py_ssize_t step,   # 1: a mean per column; 0: one for all
                               double* total, double* product) noexcept nogil:  # IN, OUT
    # In arrays of its own, of a literal width, which the compiler keeps in registers.
    cdef double[LANES] totals
    cdef double[LANES] products
    cdef real[LANES] means
    cdef real[LANES] normalised
    cdef Py_ssize_t j, k
    for k in range(width):
        totals[k] = total[k]
        products[k] = product[k]
    if not row_norms:
        for k in range(width):
            means[k] = mean[k * step]
    for j in range(rows):
        if row_norms:
            for k in range(width):
                normalised[k] = ((x[k] - row_norms[j]) - row_norms[BAND + j]) \
                    * row_norms[2 * BAND + j]
            multiply_row(grad_output, NULL, normalised, NULL, width, totals, products)
        else:
            multiply_row(grad_output, weight, x, means, width, totals, products)
        grad_output += row_stride
        x += row_stride
        if weight:
            weight += row_stride
    for k in range(width):
        total[k] = totals[k]
        product[k] = products[k]


cdef inline void multiply_band(const real* grad_output, const real* weight, const real* x,
                               Py_ssize_t rows, Py_ssize_t row_stride, const real* mean,
                               const real* row_norms, Py_ssize_t width, const Py_ssize_t step,
                               double* total, double* product) noexcept nogil:  # IN, OUT
    """Sum the columns of a few rows, as many columns at a time as registers hold."""
    cdef Py_ssize_t lanes = 4 * VECTOR_BYTES // sizeof(double)
    cdef Py_ssize_t k = 0
    while width - k >= lanes:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, lanes, step, total + k, product + k)
        k += lanes
    if (width - k) & 16:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, 16, step, total + k, product + k)
        k += 16
    if (width - k) & 8:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, 8, step, total + k, product + k)
        k += 8
    if (width - k) & 4:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, 4, step, total + k, product + k)
        k += 4
    if (width - k) & 2:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, 2, step, total + k, product + k)
        k += 2
    if (width - k) & 1:
        multiply_rows(grad_output + k, moved(weight, k), x + k, rows, row_stride,
                      moved(mean, k * step), row_norms, 1, step, total + k, product + k)


cdef inline void multiply_sheet(const real* grad_output,
                                const real* weight,   # of the values of a run, or NULL
                                const real* x, const Sheet* sheet, const Py_ssize_t width,
                                const real* mean, const Py_ssize_t step,
                                double* total, double* product,   # OUT
                                # OUT (tail,), or the same two: the sums of the last rows of runs
                                double* last_total, double* last_product) noexcept nogil:
    cdef Py_ssize_t i, j, k, at, along, n, band = max(1, sheet.rows) if width <= LANES else BAND
    for k in range(sheet.tail):
        last_total[k] = 0
        last_product[k] = 0
    for k in range(width):
        total[k] = 0
        product[k] = 0
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        along = 0
        for j in range(ceil_div(sheet.rows, band)):
            n = min(band, sheet.rows - j * band)
            multiply_band(grad_output + at, moved(weight, along), x + at, n, sheet.row_stride,
                          mean, NULL, width, step, total, product)
            at += n * sheet.row_stride
            along += n * sheet.row_stride
        if sheet.tail:
            multiply_band(grad_output + at, moved(weight, along), x + at, 1, 0, mean, NULL,
                          sheet.tail, step, last_total, last_product)


cdef inline void narrow(Sheet* sheet) noexcept nogil:  # IN, OUT
    """Make the rows of planes as short as FEW_LANES: it takes up to 20 % less time."""
    cdef Py_ssize_t run = sheet.rows * sheet.width + sheet.tail
    sheet.width = sheet.row_stride = FEW_LANES
    sheet.rows = run // FEW_LANES
    sheet.tail = run % FEW_LANES


cdef inline Sums sums_of_plane(const real* grad_output, const real* weight, const real* x,
                               const Sheet* sheet, real mean) noexcept nogil:
    cdef double[FEW_LANES] total
    cdef double[FEW_LANES] product
    cdef double[FEW_LANES] last_total
    cdef double[FEW_LANES] last_product
    cdef Sums sums
    # The last row apart: what it changes a column at a time would have to reach memory before it
    # is read as vectors.
    multiply_sheet(grad_output, weight, x, sheet, FEW_LANES, &mean, 0, total, product, last_total,
                   last_product)
    sums.grad_output = sum_of(total, FEW_LANES)
    sums.grad_output_centred = sum_of(product, FEW_LANES)
    if sheet.tail:
        sums.grad_output += sum_of(last_total, sheet.tail)
        sums.grad_output_centred += sum_of(last_product, sheet.tail)
    return sums


cdef void sums_of_parts(const real* grad_output, const real* x, const Geometry* g, Sheet sheet,
                        real mean, Py_ssize_t parts,
                        Sums* into) noexcept nogil:  # OUT (parts,)
    """The sums of each part of a channel, in a piece that may begin and end within one."""
    cdef Py_ssize_t length = g.S // g.parts, q, first, end
    cdef Py_ssize_t start = sheet.start, stop = start + sheet.rows * sheet.width + sheet.tail
    cdef Py_ssize_t offset = sheet.offset, reached = start // length
    for q in range(parts):
        first, end = max(start, (reached + q) * length), min(stop, (reached + q + 1) * length)
        into[q].grad_output = into[q].grad_output_centred = 0
        if first < end:
            sheet.offset = offset + first - start
            sheet.rows = (end - first) // FEW_LANES
            sheet.tail = (end - first) % FEW_LANES
            into[q] = sums_of_plane(grad_output, NULL, x, &sheet, mean)


cdef void share_columns(const real* grad_output, const real* x, const Pass* p, Py_ssize_t strip,
                        Py_ssize_t piece, const Sheet* sheet) noexcept nogil:
    """Sum what the channels of a tile share: the gradients of weights and biases by value."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t first = first_channel(g, strip), stride = g.period * g.S
    cdef Py_ssize_t width = sheet.rows * sheet.width + sheet.tail
    cdef Py_ssize_t r, c, i, j, k, n, at
    cdef double* grad_bias
    cdef double* grad_weight
    cdef real[3 * BAND] row_norms   # mean, mean_low and scale of a few channels
    cdef double mean
    for r in range(min(g.period, sheet.channels)):
        grad_bias = p.shares + 2 * g.parameters * (
            strip * g.outer_pieces + piece // g.inner_pieces) \
            + (first + r) % g.period * g.parts + sheet.start
        grad_weight = grad_bias + g.parameters
        for k in range(width):
            grad_bias[k] = grad_weight[k] = 0
        c = r
        while c < sheet.channels:
            n = min(BAND, ceil_div(sheet.channels - c, g.period))
            for j in range(n):
                k = first + c + j * g.period
                mean = value_of(&p.mean, k)
                row_norms[j] = <real>mean
                row_norms[BAND + j] = low_part(row_norms[j], mean, value_of(&p.mean_low, k))
                row_norms[2 * BAND + j] = <real>(1 / sqrt(value_of(&p.var, k) + p.eps))
            for i in range(sheet.runs):
                at = sheet.offset + c * g.S + i * sheet.run_stride
                multiply_band(grad_output + at, <const real*>NULL, x + at, n, stride,
                              <const real*>NULL, row_norms, width, 0, grad_bias, grad_weight)
            c += n * g.period


cdef void sums_by_row(const real* grad_output, const real* x, const Sheet* sheet, const real* high,
                      Py_ssize_t parts,   # of a channel that are kept apart
                      Sums* into) noexcept nogil:  # OUT (channels, parts)
    cdef real[WIDTH] columns   # the mean of each
    cdef double[WIDTH] total
    cdef double[WIDTH] product
    cdef Py_ssize_t period = sheet.channels * sheet.span, span = sheet.span // parts, k, r
    spread(high, sheet.channels, sheet.span, sheet.repeat, columns)
    multiply_sheet(grad_output, <const real*>NULL, x, sheet, sheet.width, columns, 1, total,
                   product, total, product)
    for r in range(1, sheet.repeat):
        for k in range(period):
            total[k] += total[r * period + k]
            product[k] += product[r * period + k]
    for k in range(sheet.channels * parts):
        into[k].grad_output = sum_of(total + k * span, span)
        into[k].grad_output_centred = sum_of(product + k * span, span)


cdef void reduce_gradients(const real* grad_output, const real* x, const Pass* p,
                           Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef Py_ssize_t first = first_channel(g, strip), end = first + sheet.channels, n, c
    cdef Py_ssize_t parts = parts_kept(g)
    cdef Sums* into = <Sums*>p.partial + (piece * g.channels + first) * parts
    if g.by_plane:
        narrow(&sheet)
    if g.by_value:
        share_columns(grad_output, x, p, strip, piece, &sheet)
    while first < end:   # one turn, but for channels by value
        n = min(WIDTH, end - first)
        reduce_channels(grad_output, x, p, &sheet, first, n, parts, into)
        first += n
        into += n
        sheet.offset += n * g.S


cdef void reduce_channels(const real* grad_output, const real* x, const Pass* p, Sheet* sheet,
                          Py_ssize_t first, Py_ssize_t channels, Py_ssize_t parts,
                          Sums* into) noexcept nogil:  # OUT (channels, parts)
    cdef const Geometry* g = &p.geometry
    cdef double[WIDTH] means
    cdef double[WIDTH] means_low
    cdef real[WIDTH] high
    cdef Py_ssize_t offset = sheet.offset, c, q
    values_of(&p.mean, first, channels, means)
    values_of(&p.mean_low, first, channels, means_low)
    for c in range(channels):
        high[c] = <real>means[c]
    if g.by_plane:
        for c in range(channels):
            sheet.offset = offset + c * g.S
            if g.by_value:
                into[c] = sums_of_plane(grad_output, weights_of(x, p, first + c) + sheet.start, x,
                                        sheet, high[c])
            elif parts > 1:
                sums_of_parts(grad_output, x, g, sheet[0], high[c], parts, into + c * parts)
            else:
                into[c] = sums_of_plane(grad_output, NULL, x, sheet, high[c])
        sheet.offset = offset
    else:
        sums_by_row(grad_output, x, sheet, high, parts, into)
    for c in range(channels):
        for q in range(c * parts, (c + 1) * parts):
            into[q].grad_output_centred -= \
                ((means[c] - <double>high[c]) + means_low[c]) * into[q].grad_output


cdef Sums merge_sums(const Sums* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    cdef Sums total
    cdef Py_ssize_t i
    total.grad_output = total.grad_output_centred = 0
    for i in range(parts):
        total.grad_output += part[i * stride].grad_output
        total.grad_output_centred += part[i * stride].grad_output_centred
    return total
