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


cdef inline void add_row(const real* grad_output, const real* x, const double* mean,
                         const double* mean_low, const Py_ssize_t width,
                         const Py_ssize_t step,   # 1: a mean per column; 0: one for all
                         double* total, double* product) noexcept nogil:  # IN, OUT
    cdef Py_ssize_t k
    for k in range(width):
        total[k] += grad_output[k]
        product[k] += grad_output[k] * ((x[k] - mean[k * step]) - mean_low[k * step])


cdef inline void add_sheet(const real* grad_output, const real* x, const Sheet* sheet,
                           const double* mean, const double* mean_low, const Py_ssize_t width,
                           const Py_ssize_t step,
                           double* total, double* product) noexcept nogil:  # OUT
    # In float64, where the product of two float32 is exact: sums that nearly cancel keep their
    # digits.
    cdef Py_ssize_t i, j, k, at
    for k in range(width):
        total[k] = 0
        product[k] = 0
    for i in range(sheet.runs):
        at = sheet.offset + i * sheet.run_stride
        for j in range(sheet.rows):
            add_row(grad_output + at, x + at, mean, mean_low, width, step, total, product)
            at += sheet.row_stride
        if sheet.tail:
            add_row(grad_output + at, x + at, mean, mean_low, sheet.tail, step, total, product)


cdef inline Sums sums_of_plane(const real* grad_output, const real* x, const Sheet* sheet,
                               double mean, double mean_low,
                               const Py_ssize_t width) noexcept nogil:
    cdef double[LANES] total
    cdef double[LANES] product
    cdef Sums sums
    add_sheet(grad_output, x, sheet, &mean, &mean_low, width, 0, total, product)
    sums.grad_output = sum_of(total, width)
    sums.grad_output_centred = sum_of(product, width)
    return sums


cdef void reduce_gradients(const real* grad_output, const real* x, const Geometry* g,
                           Py_ssize_t strip, Py_ssize_t piece,
                           const PerChannel* mean, const PerChannel* mean_low,
                           Sums* partial) noexcept nogil:  # OUT (pieces, C)
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef double[WIDTH] high
    cdef double[WIDTH] low
    cdef double[WIDTH] total
    cdef double[WIDTH] product
    cdef Py_ssize_t first = strip * g.strip_channels
    cdef Sums* into = partial + piece * g.C + first
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t c, k, r

    if g.by_plane:
        high[0], low[0] = value_of(mean, first), value_of(mean_low, first)
        # A literal width lets the compiler keep the accumulators in registers.
        if sheet.width == LANES:
            into[0] = sums_of_plane(grad_output, x, &sheet, high[0], low[0], LANES)
        else:
            into[0] = sums_of_plane(grad_output, x, &sheet, high[0], low[0], FEW_LANES)
        return
    for c in range(sheet.channels):
        spread(value_of(mean, first + c), &sheet, c, high)
        spread(value_of(mean_low, first + c), &sheet, c, low)
    add_sheet(grad_output, x, &sheet, high, low, sheet.width, 1, total, product)
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
