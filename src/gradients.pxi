# The gradients of batch normalisation (Ioffe and Szegedy 2015), with m = N * S values per channel:
#
#   grad_bias   = sum(grad_output)
#   grad_weight = sum(grad_output * x_hat),                  x_hat = (x - mean) / std
#   grad_input  = weight / std * (grad_output - grad_bias / m - x_hat * grad_weight / m)
#
# With frozen statistics mean and std do not depend on x, and the two last terms are missing.

cdef struct Sums:
    double grad_output           # sum(grad_output)
    double grad_output_centred   # sum(grad_output * (x - mean))


cdef inline void add_rows(const real* grad_output, const real* x, const Sheet* sheet,
                          const Py_ssize_t width, const double* mean, const double* mean_low,
                          double* total, double* product) noexcept nogil:  # OUT
    cdef const real* grad_row
    cdef const real* row
    cdef Py_ssize_t i, j, k, offset
    cdef double[WIDTH] sum_grad
    cdef double[WIDTH] sum_product
    # In float64, where the product of two float32 is exact: sums that nearly cancel keep their
    # digits, and the conversions are hidden behind the two streams from memory.
    for k in range(width):
        sum_grad[k] = 0
        sum_product[k] = 0
    for i in range(sheet.runs):
        for j in range(sheet.rows):
            offset = sheet.offset + i * sheet.run_stride + j * sheet.row_stride
            grad_row = grad_output + offset
            row = x + offset
            for k in range(width):
                sum_grad[k] += grad_row[k]
                sum_product[k] += grad_row[k] * ((row[k] - mean[k]) - mean_low[k])
    for k in range(width):
        total[k] = sum_grad[k]
        product[k] = sum_product[k]


cdef void reduce_gradients(const real* grad_output, const real* x, const Geometry* g,
                           Py_ssize_t strip, Py_ssize_t piece,
                           const PerChannel* mean, const PerChannel* mean_low,
                           Sums* partial) noexcept nogil:  # OUT (pieces, C)
    cdef Sheet[2] sheets
    cdef double[WIDTH] high
    cdef double[WIDTH] low
    cdef double[WIDTH] total
    cdef double[WIDTH] product
    cdef Py_ssize_t first = strip * g.strip_channels
    cdef Sums* into = partial + piece * g.C + first
    cdef Sheet* sheet
    cdef Py_ssize_t c, width, which

    sheets_of(g, strip, piece, sheets)
    for c in range(sheets[0].channels):
        into[c].grad_output = into[c].grad_output_centred = 0
    for which in range(2):
        sheet = &sheets[which]
        if sheet.rows == 0:
            continue
        width = width_of(sheet)
        for c in range(sheet.channels):
            spread(value_of(mean, first + c), sheet, c, high)
            spread(value_of(mean_low, first + c), sheet, c, low)
        if width == LANES:
            add_rows(grad_output, x, sheet, LANES, high, low, total, product)
        else:
            add_rows(grad_output, x, sheet, width, high, low, total, product)
        for c in range(sheet.channels):
            into[c].grad_output += sum_of_channel(total, sheet, c)
            into[c].grad_output_centred += sum_of_channel(product, sheet, c)


cdef Sums merge_sums(const Sums* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    cdef Sums total
    cdef Py_ssize_t i
    total.grad_output = total.grad_output_centred = 0
    for i in range(parts):
        total.grad_output += part[i * stride].grad_output
        total.grad_output_centred += part[i * stride].grad_output_centred
    return total
