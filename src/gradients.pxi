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


cdef inline void multiply_row(const real* grad_output, const real* x, const real* mean,
                              const real* mean_low, const Py_ssize_t width,
                              const Py_ssize_t step,   # 1: a mean per column; 0: one for all
                              double* total, double* product) noexcept nogil:  # IN, OUT
    cdef real centred
    cdef Py_ssize_t k
    for k in range(width):
        centred = (x[k] - mean[k * step]) - mean_low[k * step]
        total[k] += grad_output[k]
        if sizeof(real) < sizeof(double):
            product[k] = multiply_add(grad_output[k], centred, product[k])
        else:
            product[k] += grad_output[k] * centred


cdef inline void multiply_rows(const real* grad_output, const real* x, Py_ssize_t rows,
                               Py_ssize_t row_stride, const real* mean, const real* mean_low,
                               const Py_ssize_t width, const Py_ssize_t step,
                               double* total, double* product) noexcept nogil:  # IN, OUT
    # In arrays of its own, of a literal width: the compiler keeps them in registers.
    cdef double[LANES] totals
    cdef double[LANES] products
    cdef real[LANES] means
    cdef real[LANES] means_low
    cdef Py_ssize_t j, k
    for k in range(width):
        totals[k] = total[k]
        products[k] = product[k]
        means[k] = mean[k * step]
        means_low[k] = mean_low[k * step]
    for j in range(rows):
        multiply_row(grad_output, x, means, means_low, width, 1, totals, products)
        grad_output += row_stride
        x += row_stride
    for k in range(width):
        total[k] = totals[k]
        product[k] = products[k]


cdef inline void multiply_few(const real* grad_output, const real* x, const real* mean,
                              const real* mean_low, Py_ssize_t n, const Py_ssize_t step,
                              double* total, double* product) noexcept nogil:  # IN, OUT
    """Sum n < 16 columns of a row: what is left over beside whole vectors."""
    cdef Py_ssize_t k = 0
    if n & 8:
        multiply_row(grad_output, x, mean, mean_low, 8, step, total, product)
        k += 8
    if n & 4:
        multiply_row(grad_output + k, x + k, mean + k * step, mean_low + k * step, 4, step,
                     total + k, product + k)
        k += 4
    if n & 2:
        multiply_row(grad_output + k, x + k, mean + k * step, mean_low + k * step, 2, step,
                     total + k, product + k)
        k += 2
    if n & 1:
        multiply_row(grad_output + k, x + k, mean + k * step, mean_low + k * step, 1, step,
                     total + k, product + k)


cdef inline void multiply_band(const real* grad_output, const real* x, Py_ssize_t rows,
                               Py_ssize_t row_stride, const real* mean, const real* mean_low,
                               Py_ssize_t width, const Py_ssize_t step,
                               double* total, double* product) noexcept nogil:  # IN, OUT
    cdef Py_ssize_t lanes = 4 * VECTOR_BYTES // sizeof(double)
    cdef Py_ssize_t vector = VECTOR_BYTES // sizeof(double)
    cdef Py_ssize_t k = 0, j
    while width - k >= lanes:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step,
                      mean_low + k * step, lanes, step, total + k, product + k)
        k += lanes
    while width - k >= vector:
        multiply_rows(grad_output + k, x + k, rows, row_stride, mean + k * step,
                      mean_low + k * step, vector, step, total + k,
                      product + k)
        k += vector
    if k < width:
        for j in range(rows):
            multiply_few(grad_output + k + j * row_stride, x + k + j * row_stride,
                         mean + k * step, mean_low + k * step, width - k, step,
                         total + k, product + k)


cdef inline void multiply_sheet(const real* grad_output, const real* x, const Sheet* sheet,
                                const real* mean, const real* mean_low, const Py_ssize_t step,
                                double* total, double* product) noexcept nogil:  # OUT
    # In float64, where the product of two float32 is exact: sums that nearly cancel keep their
    # digits.
    cdef Py_ssize_t i, j, k, at, n, band = sheet.rows if sheet.width <= LANES else BAND
    for k in range(sheet.width):
        total[k] = 0
        product[k] = 0
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        for j in range(ceil_div(sheet.rows, band)):
            n = min(band, sheet.rows - j * band)
            multiply_band(grad_output + at, x + at, n, sheet.row_stride, mean, mean_low,
                          sheet.width, step, total, product)
            at += n * sheet.row_stride
        if sheet.tail:
            multiply_band(grad_output + at, x + at, 1, 0, mean, mean_low, sheet.tail, step,
                          total, product)


cdef void reduce_gradients(const real* grad_output, const real* x, const Geometry* g,
                           Py_ssize_t strip, Py_ssize_t piece,
                           const PerChannel* mean, const PerChannel* mean_low,
                           Sums* partial) noexcept nogil:  # OUT (pieces, C)
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef real[WIDTH] high
    cdef real[WIDTH] low
    cdef double[WIDTH] total
    cdef double[WIDTH] product
    cdef Py_ssize_t first = strip * g.strip_channels
    cdef Sums* into = partial + piece * g.C + first
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t c, k, r
    cdef double m
    cdef real rounded

    if g.by_plane:
        for c in range(sheet.channels):
            m = value_of(mean, first + c)
            high[0] = <real>m
            low[0] = <real>((m - high[0]) + value_of(mean_low, first + c))
            multiply_sheet(grad_output, x, &sheet, high, low, 0, total, product)
            into[c].grad_output = sum_of(total, sheet.width)
            into[c].grad_output_centred = sum_of(product, sheet.width)
            sheet.offset += g.S
        return
    for c in range(sheet.channels):
        m = value_of(mean, first + c)
        rounded = <real>m
        spread(rounded, &sheet, c, high)
        spread(<real>((m - rounded) + value_of(mean_low, first + c)), &sheet, c, low)
    multiply_sheet(grad_output, x, &sheet, high, low, 1, total, product)
    for r in range(1, sheet.repeat):
        for k in range(period):
            total[k] += total[r * period + k]
            product[k] += product[r * period + k]
    for c in range(sheet.channels):
        into[c].grad_output = sum_of(total + c * sheet.span, sheet.span)
        into[c].grad_output_centred = sum_of(product + c * sheet.span, sheet.span)


cdef Sums merge_sums(const Sums* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    cdef Sums total
    cdef Py_ssize_t i
    total.grad_output = total.grad_output_centred = 0
    for i in range(parts):
        total.grad_output += part[i * stride].grad_output
        total.grad_output_centred += part[i * stride].grad_output_centred
    return total
