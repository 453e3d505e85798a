# The sums that the gradients of batch normalisation need (Ioffe and Szegedy 2015). With
# m = N * S values per channel and x_hat = (x - mean) / std:
#
#   grad_bias   = sum(grad_output)
#   grad_weight = sum(grad_output * x_hat)
#   grad_input  = weight / std * (grad_output - grad_bias / m - x_hat * grad_weight / m)
#
# With frozen statistics mean and std do not depend on x, and the two last terms are missing.

cdef struct Sums:
    double grad_output           # sum(grad_output)
    double grad_output_centred   # sum(grad_output * (x - mean))


# All sums are in float64, where the product of two float32 is exact: sums that nearly cancel keep
# their digits. mean is in two parts, and what depends on the second is left out of the loop:
#
#   sum(grad_output * (x - mean)) = sum(grad_output * (x - high)) - low * sum(grad_output)

cdef inline void multiply_row(const real* grad_output, const real* x, const real* mean,
                              const Py_ssize_t width,
                              double* total, double* product) noexcept nogil:  # IN, OUT
    cdef real centred
    cdef Py_ssize_t k
    for k in range(width):
        centred = x[k] - mean[k]
        total[k] += grad_output[k]
        if sizeof(real) < sizeof(double):
            product[k] = multiply_add(grad_output[k], centred, product[k])
        else:
            product[k] += grad_output[k] * centred


cdef inline void multiply_rows(const real* grad_output, const real* x, Py_ssize_t rows,
                               Py_ssize_t row_stride, const real* mean, const Py_ssize_t width,
                               const Py_ssize_t step,   # 1: a mean per column; 0: one for all
                               double* total, double* product) noexcept nogil:  # IN, OUT
    # In arrays of its own, of a literal width, which the compiler keeps in registers.
    cdef double[LANES] totals
    cdef double[LANES] products
    cdef real[LANES] means
    cdef Py_ssize_t j, k
    for k in range(width):
        totals[k] = total[k]
        products[k] = product[k]
        means[k] = mean[k * step]
    for j in range(rows):
        multiply_row(grad_output, x, means, width, totals, products)
        grad_output += row_stride
        x += row_stride
    for k in range(width):
        total[k] = totals[k]
        product[k] = products[k]


cdef inline void multiply_band(const real* grad_output, const real* x, Py_ssize_t rows,
                               Py_ssize_t row_stride, const real* mean, Py_ssize_t width,
                               const Py_ssize_t step,
                               double* total, double* product) noexcept nogil:  # IN, OUT
    """Sum the columns of a few rows, as many columns at a time as registers hold."""
    cdef Py_ssize_t lanes = 4 * VECTOR_BYTES // sizeof(double)
    cdef Py_ssize_t k = 0
    while width - k >= lanes:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, lanes, step,
                      total + k, product + k)
        k += lanes
    if (width - k) & 16:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, 16, step,
                      total + k, product + k)
        k += 16
    if (width - k) & 8:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, 8, step,
                      total + k, product + k)
        k += 8
    if (width - k) & 4:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, 4, step,
                      total + k, product + k)
        k += 4
    if (width - k) & 2:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, 2, step,
                      total + k, product + k)
        k += 2
    if (width - k) & 1:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step, 1, step,
                      total + k, product + k)


cdef inline void multiply_sheet(const real* grad_output, const real* x, const Sheet* sheet,
                                const Py_ssize_t width, const real* mean, const Py_ssize_t step,
                                double* total, double* product) noexcept nogil:  # OUT
    cdef Py_ssize_t i, j, k, at, n, band = sheet.rows if width <= LANES else BAND
    for k in range(width):
        total[k] = 0
        product[k] = 0
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        for j in range(ceil_div(sheet.rows, band)):
            n = min(band, sheet.rows - j * band)
            multiply_band(grad_output + at, x + at, n, sheet.row_stride, mean, width, step, total,
                          product)
            at += n * sheet.row_stride
        if sheet.tail:
            multiply_band(grad_output + at, x + at, 1, 0, mean, sheet.tail, step, total, product)


cdef inline Sums sums_of_plane(const real* grad_output, const real* x, const Sheet* sheet,
                               const Py_ssize_t width, real mean) noexcept nogil:
    cdef double[LANES] total
    cdef double[LANES] product
    cdef Sums sums
    multiply_sheet(grad_output, x, sheet, width, &mean, 0, total, product)
    sums.grad_output = sum_of(total, width)
    sums.grad_output_centred = sum_of(product, width)
    return sums


cdef void reduce_gradients(const real* grad_output, const real* x, const Geometry* g,
                           Py_ssize_t strip, Py_ssize_t piece,
                           const PerChannel* mean, const PerChannel* mean_low,
                           Sums* partial) noexcept nogil:  # OUT (pieces, C)
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef double[WIDTH] means
    cdef double[WIDTH] means_low
    cdef real[WIDTH] high      # of each channel, ...
    cdef real[WIDTH] columns   # ... and of each column
    cdef double[WIDTH] total
    cdef double[WIDTH] product
    cdef Py_ssize_t first = strip * g.strip_channels
    cdef Sums* into = partial + piece * g.C + first
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t c, k, r

    values_of(mean, first, sheet.channels, means)
    values_of(mean_low, first, sheet.channels, means_low)
    for c in range(sheet.channels):
        high[c] = <real>means[c]
    if g.by_plane:
        for c in range(sheet.channels):
            if sheet.width == FEW_LANES:
                into[c] = sums_of_plane(grad_output, x, &sheet, FEW_LANES, high[c])
            else:
                into[c] = sums_of_plane(grad_output, x, &sheet, LANES, high[c])
            sheet.offset += g.S
    else:
        spread(high, sheet.channels, sheet.span, sheet.repeat, columns)
        multiply_sheet(grad_output, x, &sheet, sheet.width, columns, 1, total, product)
        for r in range(1, sheet.repeat):
            for k in range(period):
                total[k] += total[r * period + k]
                product[k] += product[r * period + k]
        for c in range(sheet.channels):
            into[c].grad_output = sum_of(total + c * sheet.span, sheet.span)
            into[c].grad_output_centred = sum_of(product + c * sheet.span, sheet.span)
    for c in range(sheet.channels):
        into[c].grad_output_centred -= \
            ((means[c] - <double>high[c]) + means_low[c]) * into[c].grad_output


cdef Sums merge_sums(const Sums* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    cdef Sums total
    cdef Py_ssize_t i
    total.grad_output = total.grad_output_centred = 0
    for i in range(parts):
        total.grad_output += part[i * stride].grad_output
        total.grad_output_centred += part[i * stride].grad_output_centred
    return total
