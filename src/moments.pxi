# The mean and the variance of each channel.
#
# A block of rows that fits the cache is read twice: its column sums give each column a shift close
# to its mean, so that the sums of (x - shift) and (x - shift)^2 lose nothing to cancellation.
# Blocks are merged in float64 by the formula of Chan, Golub and LeVeque (1983), and so are columns,
# sheets and pieces, always in the same order.

cdef struct Moments:
    double count
    double shift   # the mean is shift + mean: two numbers carry the digits that one would round off
    double mean
    double m2      # sum of squared deviations from the mean


cdef struct Columns:
    double count   # of each column: they all have the same
    double[WIDTH] shift
    double[WIDTH] mean
    double[WIDTH] m2


cdef inline bint add_block(const real* x, const Sheet* block, const Py_ssize_t width,
                           sum_t smallest,      # smaller sums of squares count as underflow
                           Columns* columns) noexcept nogil:  # OUT
    """Merge a block into columns, or return False when its squares left the range of sum_t."""
    cdef sum_t[WIDTH] shift
    cdef sum_t[WIDTH] total
    cdef sum_t[WIDTH] square
    cdef const real* row
    cdef sum_t d
    cdef double count = block.runs * block.rows
    cdef double merged = columns.count + count
    cdef double share = count / merged
    cdef double cross = columns.count * share
    cdef double mean, delta
    cdef int outside = 0
    cdef Py_ssize_t i, j, k

    for k in range(width):
        total[k] = 0
    for i in range(block.runs):
        for j in range(block.rows):
            row = x + block.offset + i * block.run_stride + j * block.row_stride
            for k in range(width):
                total[k] += row[k]
    for k in range(width):
        shift[k] = total[k] / <sum_t>count
        total[k] = 0
        square[k] = 0
    for i in range(block.runs):
        for j in range(block.rows):
            row = x + block.offset + i * block.run_stride + j * block.row_stride
            for k in range(width):
                d = row[k] - shift[k]
                total[k] += d
                square[k] += d * d

    if sizeof(sum_t) < sizeof(double):
        for k in range(width):
            # NaN fails every comparison, so it is found by what does not hold.
            outside |= not square[k] < <sum_t>1e38
            outside |= square[k] < smallest
        if outside:
            return False

    if columns.count == 0:
        for k in range(width):
            mean = total[k] / count
            columns.shift[k] = shift[k]
            columns.mean[k] = mean
            columns.m2[k] = square[k] - total[k] * mean
    else:
        for k in range(width):
            mean = total[k] / count
            delta = (shift[k] - columns.shift[k]) + (mean - columns.mean[k])
            columns.mean[k] += delta * share
            columns.m2[k] += (square[k] - total[k] * mean) + delta * delta * cross
    columns.count = merged
    return True


cdef void add_block_in_range(const real* x, const Sheet* block, Py_ssize_t width, real smallest,
                             Columns* columns) noexcept nogil:  # OUT
    cdef bint done
    # A literal width lets the compiler keep the accumulators of a plane in registers.
    if width == LANES:
        done = add_block[real, real](x, block, LANES, smallest, columns)
    else:
        done = add_block[real, real](x, block, width, smallest, columns)
    if not done:
        add_block[real, double](x, block, width, 0.0, columns)


cdef void column_moments(const real* x, const Sheet* sheet, real smallest,
                         Columns* columns) noexcept nogil:  # OUT
    cdef Py_ssize_t width = width_of(sheet)
    cdef Py_ssize_t tallest = max(1, BLOCK_BYTES // (LANES * <Py_ssize_t>sizeof(real)))
    cdef Py_ssize_t height, blocks, i, b
    cdef Sheet block = sheet[0]

    columns.count = 0
    if sheet.rows > tallest:
        blocks = ceil_div(sheet.rows, tallest)
        height = ceil_div(sheet.rows, blocks)
        block.runs = 1
        for i in range(sheet.runs):
            for b in range(ceil_div(sheet.rows, height)):
                block.offset = (sheet.offset + i * sheet.run_stride
                                + b * height * sheet.row_stride)
                block.rows = min(height, sheet.rows - b * height)
                add_block_in_range(x, &block, width, smallest, columns)
    else:
        height = tallest // sheet.rows
        for b in range(ceil_div(sheet.runs, height)):
            block.offset = sheet.offset + b * height * sheet.run_stride
            block.runs = min(height, sheet.runs - b * height)
            add_block_in_range(x, &block, width, smallest, columns)


cdef inline Moments fold(const Columns* columns, const Sheet* sheet, Py_ssize_t c) noexcept nogil:
    """The moments of channel c, from those of its columns."""
    cdef Moments m
    cdef double[WIDTH] deviation
    cdef double[WIDTH] mean
    cdef double[WIDTH] square
    cdef Py_ssize_t k, n

    m.count = columns.count
    m.shift = columns.shift[c * sheet.span]
    if sheet.repeat * sheet.span == 1:
        m.mean = columns.mean[c]
        m.m2 = columns.m2[c]
        return m
    gather(columns.shift, sheet, c, deviation)
    gather(columns.mean, sheet, c, mean)
    n = gather(columns.m2, sheet, c, square)
    for k in range(n):
        deviation[k] = (deviation[k] - m.shift) + mean[k]
    m.mean = sum_of(deviation, n) / n
    for k in range(n):
        square[k] += m.count * ((deviation[k] - m.mean) * (deviation[k] - m.mean))
    m.m2 = sum_of(square, n)
    m.count *= n
    return m


cdef Moments merge(const Moments* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    """The moments of a channel, from those of its non-empty parts."""
    cdef Moments m = part[0]
    cdef const Moments* p
    cdef double deviation
    cdef Py_ssize_t i

    if parts == 1:
        return m
    m.count = m.mean = m.m2 = 0
    for i in range(parts):
        p = part + i * stride
        m.count += p.count
        m.mean += p.count * ((p.shift - m.shift) + p.mean)
    m.mean /= m.count
    for i in range(parts):
        p = part + i * stride
        deviation = ((p.shift - m.shift) + p.mean) - m.mean
        m.m2 += p.m2 + p.count * (deviation * deviation)
    return m


cdef void reduce_moments(const real* x, const Geometry* g, Py_ssize_t strip, Py_ssize_t piece,
                         double smallest,
                         Moments* partial) noexcept nogil:  # OUT (pieces, C)
    cdef Columns columns
    cdef Sheet[2] sheets
    cdef Moments[2] both
    cdef Moments* into = partial + piece * g.C + strip * g.strip_channels
    cdef Py_ssize_t c

    sheets_of(g, strip, piece, sheets)
    if sheets[0].rows:
        column_moments(x, &sheets[0], <real>smallest, &columns)
        for c in range(sheets[0].channels):
            into[c] = fold(&columns, &sheets[0], c)
    if sheets[1].rows:
        column_moments(x, &sheets[1], <real>smallest, &columns)
        for c in range(sheets[1].channels):
            both[0] = into[c]
            both[1] = fold(&columns, &sheets[1], c)
            into[c] = merge(both, 2, 1) if sheets[0].rows else both[1]
