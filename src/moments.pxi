# The mean and the variance of each channel.
#
# The first block of rows is read twice: its column sums give each column a shift close to its mean,
# so that the sums of (x - shift) and (x - shift)^2 lose nothing to cancellation. A later one is
# summed around the mean of those before it. Blocks are merged in float64 by the formula of Chan,
# Golub and LeVeque (1983), and so are columns and pieces, always in the same order.

cdef void column_moments(const Pass* p, const Sheet* sheet, double smallest,
                         Columns* columns) noexcept nogil:  # OUT
    """The moments of each column, block by block."""
    cdef Sheet block = sheet[0]
    cdef Py_ssize_t height = ceil_div(sheet.rows, ceil_div(sheet.rows, TALLEST)), done = 0
    while done < sheet.rows:
        block.rows = min(height, sheet.rows - done)
        block.tail = sheet.tail if done + block.rows == sheet.rows else 0
        micro_of(p).add_block(p.x, &block, smallest, done, sheet.rows - done - block.rows,
                              columns)
        done += block.rows
        block.offset += block.rows * block.row_stride


cdef bint add_blocks(const Pass* p, const Sheet* sheet, double smallest, double unit,
                     Moments* into) noexcept nogil:  # OUT
    """Merge the blocks of a channel in some unit; return whether all are in range."""
    # The first block is read twice, to know its mean. A later one is read once, around the mean of
    # those before: the sum of such squares is at most twice that around the final mean, whatever
    # the data, because Chan's formula adds n (mean - shift)^2 before / (before + n) for a block of
    # n values, of which n (mean - shift)^2 is what its squares had too many, and before >= n.
    cdef Sheet block = sheet[0]
    cdef Py_ssize_t i = 0, first, length
    cdef Py_ssize_t height = ceil_div(sheet.rows, ceil_div(sheet.rows, TALLEST)) * LANES
    cdef double shift = 0, total = 0, square = 0, count, mean, delta
    cdef bint inside = True
    into.count = into.shift = into.mean = into.m2 = 0
    while i < sheet.runs:
        # Several runs, or a part of one.
        block.runs = min(max(1, TALLEST * LANES // sheet.length), sheet.runs - i)
        first = 0
        while first < sheet.length:
            length = sheet.length - first
            if length - height >= LANES:   # or else the tail belongs to the block
                length = height
            block.offset = sheet.offset + i * sheet.run_stride + first
            micro_of(p).sum_plane(p.x, &block, length, into.count > 0 or not p.centred, unit,
                                  &shift, &total, &square)
            inside = inside and smallest <= square < 1e38
            count = <double>block.runs * length
            mean = total / count if p.centred else 0   # or else all is around 0
            if into.count == 0:
                into.shift = shift
            delta = (shift - into.shift) + (mean - into.mean)
            into.m2 += square - total * mean + delta * delta * (
                count * into.count / (into.count + count))
            into.count += count
            into.mean += delta * (count / into.count)
            shift = into.shift + into.mean
            first += length
        i += block.runs
    return inside


cdef Moments plane_moments(const Pass* p, const Sheet* sheet, double smallest) noexcept nogil:
    cdef Moments m
    cdef double unit
    if not add_blocks(p, sheet, smallest, 1, &m) and p.storage != FLOAT64:
        unit = micro_of(p).unit_of(p.x, sheet)
        add_blocks(p, sheet, 0, unit, &m)
        m.shift *= unit
        m.mean *= unit
        m.m2 *= unit * unit
    return m


cdef Moments merge(const Moments* found, Py_ssize_t pieces, Py_ssize_t stride) noexcept nogil:
    """The moments of a channel, from those of its pieces."""
    cdef Moments m = found[0]
    cdef const Moments* p
    cdef double deviation
    cdef Py_ssize_t i

    if pieces == 1:
        return m
    m.count = m.mean = m.m2 = 0
    for i in range(pieces):
        p = found + i * stride
        m.count += p.count
        m.mean += p.count * ((p.shift - m.shift) + p.mean)
    m.mean /= m.count
    for i in range(pieces):
        p = found + i * stride
        deviation = ((p.shift - m.shift) + p.mean) - m.mean
        m.m2 += p.m2 + p.count * (deviation * deviation)
    return m


cdef inline double smallest_of(const Pass* p) noexcept nogil:
    # Squares of float32 deviations whose sum is below 1e-30 may have underflowed. A larger eps
    # makes it irrelevant, and then channels of zeros need no second look.
    return 1e-30 if p.eps < 1e-20 else 0


cdef inline Columns columns_in(double* values, Py_ssize_t n) noexcept nogil:
    """Columns in memory for three times n values."""
    cdef Columns columns
    columns.shift, columns.mean, columns.m2 = values, values + n, values + 2 * n
    return columns


cdef void moments_in_blocks(const Pass* p, Sheet sheet, Columns* found) noexcept nogil:   # OUT
    cdef double smallest = smallest_of(p)
    cdef Moments m
    cdef Py_ssize_t c
    for c in range(sheet.channels):
        m = plane_moments(p, &sheet, smallest)
        found.shift[c], found.mean[c], found.m2[c] = m.shift, m.mean, m.m2
        sheet.offset += p.geometry.S


cdef void sheet_moments(const Pass* p, const Sheet* sheet, Columns* found) noexcept nogil:   # OUT
    """The moments of at most AT_ONCE channels by plane.

    A pointer, because to copy a sheet whose fields have just been set waits for all stores so far.
    """
    if sheet.width == SHORT_LANES or sheet.runs * sheet.length <= TALLEST * LANES:   # one block
        micro_of(p).channel_moments(p, sheet, smallest_of(p), found)
    else:
        moments_in_blocks(p, sheet[0], found)


cdef void reduce_planes(const Pass* p, Sheet sheet, Moments* into) noexcept nogil:   # OUT
    cdef double[3 * AT_ONCE] values
    cdef Columns found = columns_in(values, AT_ONCE)
    cdef Py_ssize_t rest = sheet.channels, c
    while rest > 0:
        sheet.channels = min(AT_ONCE, rest)
        sheet_moments(p, &sheet, &found)
        for c in range(sheet.channels):
            into[c].count = sheet.runs * sheet.length
            into[c].shift, into[c].mean, into[c].m2 = found.shift[c], found.mean[c], found.m2[c]
        into += sheet.channels
        sheet.offset += sheet.channels * p.geometry.S
        rest -= sheet.channels


cdef void reduce_moments(const Pass* p, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef double[3 * WIDTH] values
    cdef Columns columns = columns_in(values, WIDTH)
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef Moments* into = <Moments*>p.partial + piece * p.stride + (
        first_channel(g, strip) - p.origin)

    if g.by_plane:
        reduce_planes(p, sheet, into)
        return
    column_moments(p, &sheet, smallest_of(p), &columns)
    micro_of(p).fold(&sheet, &columns, into)
