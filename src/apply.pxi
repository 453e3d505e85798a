# The two passes that write. A channel has a few coefficients, spread over its columns:
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
    MEAN_GRAD
    SLOPE
    COEFFICIENTS


cdef inline void apply_row(const real* x, const real* grad_output, const real* column,
                           const Py_ssize_t width,
                           real* out) noexcept nogil:  # OUT, may be x or grad_output
    # By way of a row of its own, because out may be x: nothing is left to prove about overlap.
    cdef real[LANES] row
    cdef const real* mean = column + MEAN * WIDTH
    cdef const real* mean_low = column + MEAN_LOW * WIDTH
    cdef const real* scale = column + SCALE * WIDTH
    cdef const real* bias = column + BIAS * WIDTH
    cdef const real* mean_grad = column + MEAN_GRAD * WIDTH
    cdef const real* slope = column + SLOPE * WIDTH
    cdef Py_ssize_t k
    if grad_output == NULL:
        for k in range(width):
            row[k] = ((x[k] - mean[k]) - mean_low[k]) * scale[k] + bias[k]
    else:
        for k in range(width):
            row[k] = ((grad_output[k] - mean_grad[k])
                      - ((x[k] - mean[k]) - mean_low[k]) * slope[k]) * scale[k]
    for k in range(width):
        out[k] = row[k]


cdef inline void apply_sheet(const real* x, const real* grad_output, const Sheet* sheet,
                             const real* column, const Py_ssize_t width,
                             real* out) noexcept nogil:  # OUT
    cdef Py_ssize_t i, j, k, at, chunk
    for i in range(sheet.runs):
        for j in range(sheet.rows):
            at = sheet.offset + i * sheet.run_stride + j * sheet.row_stride
            for chunk in range(width // LANES):
                k = chunk * LANES
                apply_row(x + at + k, grad_output + at + k if grad_output else NULL, column + k,
                          LANES, out + at + k)
            k = width - width % LANES
            if k < width:
                apply_row(x + at + k, grad_output + at + k if grad_output else NULL, column + k,
                          width - k, out + at + k)


cdef void apply_tile(const real* x, const real* grad_output, const Geometry* g, Py_ssize_t strip,
                     Py_ssize_t piece, const real* coefficients,  # IN (COEFFICIENTS, C)
                     real* out) noexcept nogil:                   # OUT
    cdef Sheet[2] sheets
    cdef Sheet* sheet
    cdef real[COEFFICIENTS * WIDTH] column
    cdef Py_ssize_t first = strip * g.strip_channels
    cdef Py_ssize_t which, c, q

    sheets_of(g, strip, piece, sheets)
    for which in range(2):
        sheet = &sheets[which]
        if sheet.rows == 0:
            continue
        for q in range(COEFFICIENTS):
            for c in range(sheet.channels):
                spread(coefficients[q * g.C + first + c], sheet, c, column + q * WIDTH)
        if width_of(sheet) == LANES:
            apply_sheet(x, grad_output, sheet, column, LANES, out)
        else:
            apply_sheet(x, grad_output, sheet, column, width_of(sheet), out)
