# The mean and the variance of each channel.
#
# A block of rows that fits the cache is read twice: its column sums give each column a shift close
# to its mean, so that the sums of (x - shift) and (x - shift)^2 lose nothing to cancellation.
# Blocks are merged in float64 by the formula of Chan, Golub and LeVeque (1983), and so are columns
# and pieces, always in the same order.

cdef enum:
    TALLEST = 96       # rows of a block: 24 KiB of LANES float columns, which fit L1 (32 KiB)


cdef struct Moments:
    double count
    double shift   # the mean is shift + mean: two numbers carry the digits that one would round off
    double mean
    double m2      # sum of squared deviations from the mean


cdef struct Columns:   # arrays of WIDTH, or what is left of them from some column on
    double* count
    double* shift
    double* mean
    double* m2


cdef inline void add_columns(const sum_t* shift, const sum_t* total, const sum_t* square,
                             Py_ssize_t first, Py_ssize_t last, double count, double before,
                             Columns* columns) noexcept nogil:  # IN, OUT
    """Merge the sums of a block, of count rows, into columns of so many rows before."""
    cdef double reciprocal = 1 / count
    cdef double merged = before + count
    cdef double share = count / merged
    cdef double cross = before * share
    cdef double mean, delta
    cdef Py_ssize_t k
    if before == 0:
        for k in range(first, last):
            mean = total[k] * reciprocal
            columns.count[k] = count
            columns.shift[k] = shift[k]
            columns.mean[k] = mean
            columns.m2[k] = square[k] - total[k] * mean
    else:
        for k in range(first, last):
            mean = total[k] * reciprocal
            delta = (shift[k] - columns.shift[k]) + (mean - columns.mean[k])
            columns.count[k] = merged
            columns.mean[k] += delta * share
            columns.m2[k] += (square[k] - total[k] * mean) + delta * delta * cross


cdef inline bint add_block(const real* x, const Sheet* block, const Py_ssize_t width,
                           sum_t smallest,   # smaller sums of squares count as underflow
                           bint ends,        # whether the block holds the tail of its runs
                           Py_ssize_t before, Py_ssize_t tails_before,   # rows seen already
                           Columns* columns) noexcept nogil:  # IN, OUT
    """Merge a block into columns, or return False when its squares left the range of sum_t."""
    cdef sum_t[WIDTH] shift
    cdef sum_t[WIDTH] total
    cdef sum_t[WIDTH] square
    cdef const real* row
    cdef sum_t d, reciprocal, reciprocal_tail
    cdef Py_ssize_t count = block.runs * block.rows
    cdef Py_ssize_t tail = block.tail if ends else 0
    cdef Py_ssize_t tails = block.runs if ends else 0
    cdef int outside = 0
    cdef Py_ssize_t i, j, k

    for k in range(width):
        total[k] = 0
        square[k] = 0
    for i in range(block.runs):
        row = x + block.offset + i * block.run_stride
        for j in range(block.rows):
            for k in range(width):
                total[k] += row[k]
            row += block.row_stride
        for k in range(tail):
            total[k] += row[k]
    reciprocal = 1 / <sum_t>count
    reciprocal_tail = 1 / <sum_t>(count + tails)
    for k in range(width):
        shift[k] = total[k] * reciprocal
    for k in range(tail):
        shift[k] = total[k] * reciprocal_tail
    for k in range(width):
        total[k] = 0
    for i in range(block.runs):
        row = x + block.offset + i * block.run_stride
        for j in range(block.rows):
            for k in range(width):
                d = row[k] - shift[k]
                total[k] += d
                square[k] += d * d
            row += block.row_stride
        for k in range(tail):
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
    if block.tail:
        add_columns(shift, total, square, 0, block.tail, count + tails, before + tails_before,
                    columns)
    add_columns(shift, total, square, block.tail, width, count, before, columns)
    return True


cdef void add_block_in_range(const real* x, const Sheet* block, real smallest, bint ends,
                             Py_ssize_t before, Py_ssize_t tails_before,
                             Columns* columns) noexcept nogil:  # IN, OUT
    cdef Columns one = columns[0]
    cdef Sheet column = block[0]
    cdef Py_ssize_t k
    cdef bint done
    # A literal width lets the compiler keep the accumulators of a plane in registers.
    if block.width == LANES:
        done = add_block[real, real](x, block, LANES, smallest, ends, before, tails_before, columns)
    elif block.width == FEW_LANES:
        done = add_block[real, real](x, block, FEW_LANES, smallest, ends, before, tails_before,
                                     columns)
    else:
        done = add_block[real, real](x, block, block.width, smallest, ends, before, tails_before,
                                     columns)
    if done:
        return
    if block.channels == 1:
        add_block[real, double](x, block, block.width, 0.0, ends, before, tails_before, columns)
        return
    # One by one, so that the other channels keep the very bits they would have had.
    column.width = 1
    for k in range(block.width):
        column.tail = 1 if k < block.tail else 0
        if not add_block[real, real](x, &column, 1, smallest, ends, before, tails_before, &one):
            add_block[real, double](x, &column, 1, 0.0, ends, before, tails_before, &one)
        column.offset += 1
        one.count += 1
        one.shift += 1
        one.mean += 1
        one.m2 += 1


cdef void column_moments(const real* x, const Sheet* sheet, real smallest,
                         Columns* columns) noexcept nogil:  # OUT
    """The moments of each column, block by block."""
    cdef Sheet block = sheet[0]
    cdef Py_ssize_t height, parts, i, b

    if sheet.runs * sheet.rows <= TALLEST:
        add_block_in_range(x, &block, smallest, True, 0, 0, columns)
    elif sheet.rows <= TALLEST:
        # Several runs in a block.
        height = TALLEST // sheet.rows
        for b in range(ceil_div(sheet.runs, height)):
            i = b * height
            block.offset = sheet.offset + i * sheet.run_stride
            block.runs = min(height, sheet.runs - i)
            add_block_in_range(x, &block, smallest, True, i * sheet.rows, i, columns)
    else:
        # Several blocks in a run.
        height = ceil_div(sheet.rows, ceil_div(sheet.rows, TALLEST))
        parts = ceil_div(sheet.rows, height)
        block.runs = 1
        for i in range(sheet.runs):
            for b in range(parts):
                block.offset = sheet.offset + i * sheet.run_stride + b * height * sheet.row_stride
                block.rows = min(height, sheet.rows - b * height)
                add_block_in_range(x, &block, smallest, b == parts - 1,
                                   i * sheet.rows + b * height, i, columns)


cdef inline void merge_repeats(const Sheet* sheet, Columns* columns) noexcept nogil:  # IN, OUT
    """Merge the columns of every repeat into those of the first."""
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t r, k, other
    cdef double count, merged, share, cross, delta
    for r in range(1, sheet.repeat):
        count = columns.count[r * period]
        merged = columns.count[0] + count
        share = count / merged
        cross = columns.count[0] * share
        for k in range(period):
            other = r * period + k
            delta = ((columns.shift[other] - columns.shift[k])
                     + (columns.mean[other] - columns.mean[k]))
            columns.mean[k] += delta * share
            columns.m2[k] += columns.m2[other] + delta * delta * cross
            columns.count[k] = merged


cdef inline Moments fold(const Columns* columns, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The moments of a channel, from those of its n columns."""
    cdef const double* count = columns.count + first
    cdef const double* shift = columns.shift + first
    cdef const double* mean = columns.mean + first
    cdef const double* m2 = columns.m2 + first
    cdef double[WIDTH] deviation
    cdef Py_ssize_t k
    cdef Moments m

    m.count, m.shift, m.mean, m.m2 = count[0], shift[0], mean[0], m2[0]
    if n == 1:
        return m
    m.count = sum_of(count, n)
    for k in range(n):
        deviation[k] = count[k] * ((shift[k] - m.shift) + mean[k])
    m.mean = sum_of(deviation, n) / m.count
    for k in range(n):
        deviation[k] = ((shift[k] - m.shift) + mean[k]) - m.mean
        deviation[k] = m2[k] + count[k] * (deviation[k] * deviation[k])
    m.m2 = sum_of(deviation, n)
    return m


cdef Moments merge(const Moments* part, Py_ssize_t parts, Py_ssize_t stride) noexcept nogil:
    """The moments of a channel, from those of its parts."""
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
    cdef double[4][WIDTH] values
    cdef Columns columns
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef Moments* into = partial + piece * g.C + strip * g.strip_channels
    cdef Py_ssize_t c
    columns.count, columns.shift, columns.mean, columns.m2 = (values[0], values[1], values[2],
                                                              values[3])
    column_moments(x, &sheet, <real>smallest, &columns)
    merge_repeats(&sheet, &columns)
    for c in range(sheet.channels):
        into[c] = fold(&columns, c * sheet.span, sheet.span)
