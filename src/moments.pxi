# The mean and the variance of each channel.
#
# A block of rows that fits the cache is read twice: its column sums give each column a shift close
# to its mean, so that the sums of (x - shift) and (x - shift)^2 lose nothing to cancellation.
# Blocks are merged in float64 by the formula of Chan, Golub and LeVeque (1983), and so are columns
# and pieces, always in the same order.

cdef struct Moments:
    double count
    double shift   # the mean is shift + mean: two numbers carry the digits that one would round off
    double mean
    double m2      # sum of squared deviations from the mean


cdef struct Columns:   # arrays of WIDTH, or what is left of them from some column on
    double* shift
    double* mean
    double* m2


cdef struct Rows:      # how many there are, in the columns of the tail and in the rest
    double tail
    double rest


cdef inline double rows_of(Rows rows, Py_ssize_t tail, Py_ssize_t k) noexcept nogil:
    return rows.tail if k < tail else rows.rest


cdef inline void add_columns(const real* shift, const real* total, const real* square,
                             const bint scaled, const double* unit,   # that they are in, or NULL
                             const Py_ssize_t width, Py_ssize_t tail, Rows rows, Rows before,
                             Columns* columns) noexcept nogil:  # IN, OUT
    """Merge the sums of so many rows into columns of so many rows before."""
    # Divided, not multiplied by a reciprocal: then the mean of equal values is that value.
    cdef Rows share, cross
    cdef double mean, delta, u = 1
    cdef Py_ssize_t k
    if before.rest == 0:
        for k in range(width):
            u = unit[k] if scaled else 1
            mean = total[k] / rows_of(rows, tail, k)
            columns.shift[k] = shift[k] * u
            columns.mean[k] = mean * u
            columns.m2[k] = (square[k] - total[k] * mean) * (u * u)
        return
    share.tail = rows.tail / (before.tail + rows.tail)
    share.rest = rows.rest / (before.rest + rows.rest)
    cross.tail = before.tail * share.tail
    cross.rest = before.rest * share.rest
    for k in range(width):
        u = unit[k] if scaled else 1
        mean = total[k] / rows_of(rows, tail, k)
        delta = (shift[k] * u - columns.shift[k]) + (mean * u - columns.mean[k])
        columns.mean[k] += delta * rows_of(share, tail, k)
        columns.m2[k] += (square[k] - total[k] * mean) * (u * u) \
            + delta * delta * rows_of(cross, tail, k)


cdef inline void sum_row(const real* x, const Py_ssize_t width,
                         const bint centred,   # False: sum x; True: x - shift and its square
                         const sum_t* factor,   # of x, or NULL
                         const sum_t* shift,
                         sum_t* total, sum_t* square) noexcept nogil:  # IN, OUT
    cdef sum_t d
    cdef Py_ssize_t k
    for k in range(width):
        d = x[k]
        if factor:
            d = d * factor[k]
        if centred:
            d = d - shift[k]
            square[k] += d * d
        total[k] += d


cdef inline void sum_rows(const real* x, Py_ssize_t rows, Py_ssize_t row_stride,
                          const Py_ssize_t width, const bint centred, const sum_t* factor,
                          const sum_t* shift,
                          sum_t* total, sum_t* square) noexcept nogil:  # IN, OUT
    # In arrays of its own, of a literal width, which the compiler keeps in registers: from memory
    # and back to it, each addition to a sum would wait five cycles longer for the one before.
    # They start at zero, because a sum of sums of a few rows is rounded less often than one sum:
    # beside an outlier of 3000 standard deviations, a variance was off by 1e-6 of its value.
    cdef sum_t[LANES] factors
    cdef sum_t[LANES] shifts
    cdef sum_t[LANES] totals
    cdef sum_t[LANES] squares
    cdef Py_ssize_t j, k
    for k in range(width):
        totals[k] = 0
    if centred:
        for k in range(width):
            shifts[k] = shift[k]
            squares[k] = 0
    if factor:
        for k in range(width):
            factors[k] = factor[k]
    for j in range(rows):
        sum_row(x, width, centred, factors if factor else NULL, shifts, totals, squares)
        x += row_stride
    for k in range(width):
        total[k] += totals[k]
    if centred:
        for k in range(width):
            square[k] += squares[k]


cdef inline void sum_few(const real* x, Py_ssize_t n, const bint centred, const sum_t* factor,
                         const sum_t* shift,
                         sum_t* total, sum_t* square) noexcept nogil:  # IN, OUT
    """Sum n < 16 columns of a row: what is left over beside whole vectors."""
    cdef Py_ssize_t k = 0
    if n & 8:
        sum_row(x, 8, centred, factor, shift, total, square)
        k += 8
    if n & 4:
        sum_row(x + k, 4, centred, moved(factor, k), shift + k, total + k, square + k)
        k += 4
    if n & 2:
        sum_row(x + k, 2, centred, moved(factor, k), shift + k, total + k, square + k)
        k += 2
    if n & 1:
        sum_row(x + k, 1, centred, moved(factor, k), shift + k, total + k, square + k)


cdef inline void sum_few_rows(const real* x, Py_ssize_t rows, Py_ssize_t row_stride, Py_ssize_t n,
                              const bint centred, const real* factor, const real* shift,
                              real* total, real* square) noexcept nogil:  # IN, OUT
    cdef real[16] totals
    cdef real[16] squares
    cdef Py_ssize_t j, k
    for k in range(16):
        totals[k] = squares[k] = 0
    for j in range(rows):
        sum_few(x + j * row_stride, n, centred, factor, shift, totals, squares)
    for k in range(n):
        total[k] += totals[k]
        if centred:
            square[k] += squares[k]


cdef inline void sum_band(const real* x, Py_ssize_t rows, Py_ssize_t row_stride, Py_ssize_t width,
                          const bint centred, const real* factor, const real* shift,
                          real* total, real* square) noexcept nogil:  # IN, OUT
    """Sum the columns of a few rows, as many columns at a time as registers hold."""
    cdef Py_ssize_t lanes = 4 * VECTOR_BYTES // sizeof(real)
    cdef Py_ssize_t vector = VECTOR_BYTES // sizeof(real)
    cdef Py_ssize_t k = 0
    while width - k >= lanes:
        sum_rows(x + k, rows, row_stride, lanes, centred, moved(factor, k), shift + k, total + k,
                 square + k)
        k += lanes
    while width - k >= vector:
        sum_rows(x + k, rows, row_stride, vector, centred, moved(factor, k), shift + k, total + k,
                 square + k)
        k += vector
    if k < width:
        sum_few_rows(x + k, rows, row_stride, width - k, centred, moved(factor, k), shift + k,
                     total + k, square + k)


cdef inline void sum_sheet(const real* x, const Sheet* sheet, Py_ssize_t width, Py_ssize_t tail,
                           const bint centred, const real* factor, const real* shift,
                           real* total, real* square) noexcept nogil:  # IN, OUT
    """Sum the columns of a sheet."""
    cdef const real* row
    cdef Py_ssize_t i, j, band = BAND
    if sheet.row_stride <= LANES:   # not the width: a column alone is summed as it is among others
        band = ceil_div(sheet.rows, ceil_div(sheet.rows, SLIM_BAND))
    for i in range(sheet.runs):
        row = x + sheet.offset + i * sheet.run_stride
        for j in range(ceil_div(sheet.rows, band)):
            sum_band(row, min(band, sheet.rows - j * band), sheet.row_stride, width, centred,
                     factor, shift, total, square)
            row += band * sheet.row_stride
        if tail:
            row = x + sheet.offset + i * sheet.run_stride + sheet.rows * sheet.row_stride
            sum_band(row, 1, 0, tail, centred, factor, shift, total, square)


cdef inline int is_outside(real square, real smallest) noexcept nogil:
    """Whether a sum of squares is beyond the range of float32, or a NaN."""
    # NaN fails every comparison, so it is found by what does not hold. No "or", which would look
    # at one column at a time.
    if sizeof(real) == sizeof(double):
        return 0
    return <int>(not square < <real>1e38) | <int>(square < smallest)


cdef inline bint sum_block(const real* x, const Sheet* block,
                           const real* factor,   # of each column, or NULL
                           real smallest,        # smaller sums of squares count as underflow
                           bint ends,            # whether the block holds the tail of its runs
                           real* shift, real* total, real* square) noexcept nogil:  # OUT
    """The sums of a block around its column means; return whether all are in range."""
    cdef Py_ssize_t tail = block.tail if ends else 0
    cdef real reciprocal
    cdef int outside = 0
    cdef Py_ssize_t k

    for k in range(block.width):
        total[k] = 0
        square[k] = 0
    sum_sheet(x, block, block.width, tail, False, factor, shift, total, square)
    reciprocal = 1 / <real>(block.runs * block.rows)
    for k in range(block.width):
        shift[k] = total[k] * reciprocal
    reciprocal = 1 / <real>(block.runs * (block.rows + 1))
    for k in range(tail):
        shift[k] = total[k] * reciprocal
    for k in range(block.width):
        total[k] = 0
    sum_sheet(x, block, block.width, tail, True, factor, shift, total, square)
    for k in range(block.width):
        outside |= is_outside(square[k], smallest)
    return not outside


cdef void scale_columns(const real* x, const Sheet* block, real smallest, bint ends,
                        const real* square,
                        real* factor, double* unit) noexcept nogil:  # OUT
    """Powers of two that bring the columns whose squares are out of range into it."""
    cdef real[WIDTH] largest
    cdef const real* row
    cdef int exponent
    cdef Py_ssize_t i, j, k
    for k in range(block.width):
        largest[k] = 0
    for i in range(block.runs):
        row = x + block.offset + i * block.run_stride
        for j in range(block.rows + (1 if ends and block.tail else 0)):
            for k in range(block.width if j < block.rows else block.tail):
                largest[k] = max(largest[k], <real>fabs(row[k]))
            row += block.row_stride
    for k in range(block.width):
        # The others keep the very bits they would have had.
        exponent = 0
        if is_outside(square[k], smallest) and largest[k] < INFINITY:
            frexp(largest[k], &exponent)
            exponent = min(max(exponent, -100), 100)
        factor[k] = <real>ldexp(1, -exponent)
        unit[k] = ldexp(1, exponent)


cdef void add_block(const real* x, const Sheet* block, real smallest, bint ends, Rows before,
                    Columns* columns) noexcept nogil:  # IN, OUT
    """Merge a block into columns."""
    cdef real[WIDTH] shift
    cdef real[WIDTH] total
    cdef real[WIDTH] square
    cdef real[WIDTH] factor
    cdef double[WIDTH] unit
    cdef Rows rows
    rows.rest = block.runs * block.rows
    rows.tail = rows.rest + block.runs if ends else rows.rest
    # Within a run too, the columns of its tail have had more rows before, in earlier runs.
    if sum_block(x, block, NULL, smallest, ends, shift, total, square):
        add_columns(shift, total, square, False, NULL, block.width, block.tail, rows, before,
                    columns)
        return
    # In a unit near the largest value of the column, the digits are those that float32 without
    # limits would give: so they do not depend on the unit of x.
    scale_columns(x, block, smallest, ends, square, factor, unit)
    sum_block(x, block, factor, smallest, ends, shift, total, square)
    add_columns(shift, total, square, True, unit, block.width, block.tail, rows, before, columns)


cdef void column_moments(const real* x, const Sheet* sheet, real smallest,
                         Columns* columns) noexcept nogil:  # OUT
    """The moments of each column, block by block."""
    cdef Sheet block = sheet[0]
    cdef Py_ssize_t height, parts, i, b
    cdef Rows before

    before.tail = before.rest = 0
    if sheet.runs * sheet.rows <= TALLEST:
        add_block(x, &block, smallest, True, before, columns)
    elif sheet.rows <= TALLEST:
        # Several runs in a block.
        height = TALLEST // sheet.rows
        for b in range(ceil_div(sheet.runs, height)):
            i = b * height
            block.offset = sheet.offset + i * sheet.run_stride
            block.runs = min(height, sheet.runs - i)
            before.rest = i * sheet.rows
            before.tail = before.rest + i
            add_block(x, &block, smallest, True, before, columns)
    else:
        # Several blocks in a run.
        height = ceil_div(sheet.rows, ceil_div(sheet.rows, TALLEST))
        parts = ceil_div(sheet.rows, height)
        block.runs = 1
        for i in range(sheet.runs):
            for b in range(parts):
                block.offset = sheet.offset + i * sheet.run_stride + b * height * sheet.row_stride
                block.rows = min(height, sheet.rows - b * height)
                before.rest = i * sheet.rows + b * height
                before.tail = before.rest + i
                add_block(x, &block, smallest, b == parts - 1, before, columns)


cdef inline void merge_repeats(const Sheet* sheet, Columns* columns) noexcept nogil:  # IN, OUT
    """Merge the columns of every repeat into those of the first."""
    cdef Py_ssize_t period = sheet.channels * sheet.span
    cdef Py_ssize_t r, k, other
    cdef double before = sheet.rows + (1 if sheet.tail else 0)
    cdef double rows, share, cross, delta
    for r in range(1, sheet.repeat):
        rows = sheet.rows + (1 if r * period < sheet.tail else 0)
        share = rows / (before + rows)
        cross = before * share
        before += rows
        for k in range(period):
            other = r * period + k
            delta = ((columns.shift[other] - columns.shift[k])
                     + (columns.mean[other] - columns.mean[k]))
            columns.mean[k] += delta * share
            columns.m2[k] += columns.m2[other] + delta * delta * cross


cdef inline Moments fold(const Columns* columns, Py_ssize_t first, const Py_ssize_t n,
                         Py_ssize_t tail, Rows rows) noexcept nogil:
    """The moments of a channel, from those of its n columns."""
    cdef const double* shift = columns.shift + first
    cdef const double* mean = columns.mean + first
    cdef const double* m2 = columns.m2 + first
    cdef double[WIDTH] deviation
    cdef Py_ssize_t k
    cdef Moments m

    m.shift = shift[0]
    if n == 1:
        m.count, m.mean, m.m2 = rows.rest, mean[0], m2[0]
        return m
    m.count = tail * rows.tail + (n - tail) * rows.rest
    for k in range(n):
        deviation[k] = rows_of(rows, tail, k) * ((shift[k] - m.shift) + mean[k])
    m.mean = sum_of(deviation, n) / m.count
    for k in range(n):
        deviation[k] = ((shift[k] - m.shift) + mean[k]) - m.mean
        deviation[k] = m2[k] + rows_of(rows, tail, k) * (deviation[k] * deviation[k])
    m.m2 = sum_of(deviation, n)
    return m


cdef inline void sum_runs(const real* x, const Sheet* sheet, const bint centred,
                          const double* shift,
                          double* total, double* square) noexcept nogil:  # OUT
    cdef const real* run
    cdef Py_ssize_t i, k
    for k in range(FEW_LANES):
        total[k] = 0
        square[k] = 0
    for i in range(sheet.runs):
        run = x + sheet.offset + i * sheet.run_stride
        sum_rows(run, sheet.rows, FEW_LANES, FEW_LANES, centred, NULL, shift, total, square)
        sum_few(run + sheet.rows * FEW_LANES, sheet.tail, centred, NULL, shift, total, square)


cdef inline void moments_of_few(const real* x, Sheet sheet, Py_ssize_t S,
                                Moments* into) noexcept nogil:  # OUT
    """The moments of channels too small for blocks: two passes in float64, around their means."""
    # Pass by pass, because the second pass over a channel has to wait for its mean; meanwhile the
    # CPU is at the next channel.
    cdef double[FEW_LANES] shift
    cdef double[FEW_LANES] total
    cdef double[FEW_LANES] square
    cdef double count = sheet.runs * (sheet.rows * FEW_LANES + sheet.tail)
    cdef double rest
    cdef Py_ssize_t first = sheet.offset, c, k

    for c in range(sheet.channels):
        sheet.offset = first + c * S
        sum_runs(x, &sheet, False, shift, total, square)
        into[c].shift = sum_of(total, FEW_LANES) / count
    for c in range(sheet.channels):
        sheet.offset = first + c * S
        for k in range(FEW_LANES):
            shift[k] = into[c].shift
        sum_runs(x, &sheet, True, shift, total, square)
        into[c].count = count
        into[c].mean = 0
        into[c].m2 = sum_of(square, FEW_LANES)
        if sizeof(real) == sizeof(double):
            # What the mean lost to rounding: next to nothing for float32, but not for float64.
            rest = sum_of(total, FEW_LANES)
            into[c].mean = rest / count
            into[c].m2 -= rest * into[c].mean


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
    cdef double[3][WIDTH] values
    cdef Columns columns
    cdef Rows rows
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef Moments* into = partial + piece * g.channels + first_channel(g, strip)
    cdef Py_ssize_t c

    columns.shift, columns.mean, columns.m2 = values[0], values[1], values[2]
    rows.rest = sheet.runs * sheet.rows
    rows.tail = rows.rest + sheet.runs
    if g.by_plane and sheet.width == FEW_LANES:
        moments_of_few(x, sheet, g.S, into)
        return
    if g.by_plane:
        for c in range(sheet.channels):
            column_moments(x, &sheet, <real>smallest, &columns)
            into[c] = fold(&columns, 0, LANES, sheet.tail, rows)
            sheet.offset += g.S
        return
    column_moments(x, &sheet, <real>smallest, &columns)
    merge_repeats(&sheet, &columns)
    rows.rest = rows.rest * sheet.repeat + sheet.tail // (sheet.channels * sheet.span)
    for c in range(sheet.channels):
        into[c] = fold(&columns, c * sheet.span, sheet.span, 0, rows)
