# How a kernel walks an array.
#
#   N  outer: samples (channels first), or every position of every sample (channels last)
#   C  channels
#   S  inner: the positions of one sample (channels first), or 1 (channels last)
#
# The array is one contiguous (N, C, S) view. It is cut into strips of whole channels and each
# strip into pieces; (strip, piece) is a tile, the unit of parallel work. A tile is read as at most
# two sheets, and a sheet is all that an inner loop ever sees: rows of `width` contiguous values,
# with one accumulator or coefficient per column. Columns never mix inside a loop, which is why the
# compiler may vectorise it at any width without changing a bit of the result.
#
#   by plane (S long):   a channel's run of S values is folded into rows of LANES values;
#                        what does not fill a row, S % LANES columns, is the second sheet.
#   by row   (S short):  a row holds the S columns of each channel of the strip, and `repeat` rows
#                        of the array where they are short; the N % repeat last ones are the
#                        second sheet.
#
# Every cut depends on the shape and the element size alone, never on the number of threads.

cdef enum:
    LANES = 64           # values in a row of a plane: 4 vectors of 512 bits of float
    WIDTH = 512          # most columns of a sheet: its accumulators (3 doubles each) stay in L1
    BLOCK_BYTES = 24576  # of LANES columns, read twice in a row by the statistics: fits L1 (32 KiB)
    PIECE = 65536        # values in a piece: far more work than it costs to hand it to a thread
    LONG_RUN = 128       # S from which a channel is walked by plane


cdef struct Geometry:
    Py_ssize_t N
    Py_ssize_t C
    Py_ssize_t S
    bint by_plane
    Py_ssize_t strip_channels
    Py_ssize_t strips
    Py_ssize_t repeat          # rows of the array in one row of a sheet
    Py_ssize_t piece_outer     # rows of the array in one piece
    Py_ssize_t piece_inner     # values of each of them
    Py_ssize_t inner_pieces    # pieces side by side
    Py_ssize_t pieces          # pieces of a strip


cdef struct Sheet:
    Py_ssize_t offset          # of its first value in the array
    Py_ssize_t runs
    Py_ssize_t run_stride
    Py_ssize_t rows            # of each run
    Py_ssize_t row_stride
    Py_ssize_t repeat          # a row is (repeat, channels, span)
    Py_ssize_t channels
    Py_ssize_t span


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Geometry cut(Py_ssize_t N, Py_ssize_t C, Py_ssize_t S) noexcept nogil:
    """The strips and pieces of a non-empty (N, C, S) array."""
    cdef Geometry g
    g.N, g.C, g.S = N, C, S
    g.by_plane = S >= LONG_RUN
    g.repeat = 1
    g.strip_channels = 1
    if not g.by_plane:
        # Strips of equal width, so that no thread is left with a sliver.
        g.strips = ceil_div(C, min(C, max(1, WIDTH // S)))
        g.strip_channels = ceil_div(C, g.strips)
        if g.strip_channels == C:
            g.repeat = max(1, min(N, WIDTH // (C * S)))
    g.strips = ceil_div(C, g.strip_channels)
    g.piece_inner = g.strip_channels * S
    g.inner_pieces = 1
    if g.by_plane and S > PIECE:
        g.piece_inner = PIECE
        g.inner_pieces = ceil_div(S, PIECE)
    g.piece_outer = max(1, PIECE // (g.piece_inner * g.repeat)) * g.repeat
    g.pieces = ceil_div(N, g.piece_outer) * g.inner_pieces
    return g


cdef void sheets_of(const Geometry* g, Py_ssize_t strip, Py_ssize_t piece,
                    Sheet* sheets) noexcept nogil:  # OUT: two, of which either may have no rows
    cdef Py_ssize_t channels = min(g.strip_channels, g.C - strip * g.strip_channels)
    cdef Py_ssize_t n = (piece // g.inner_pieces) * g.piece_outer
    cdef Py_ssize_t s = (piece % g.inner_pieces) * g.piece_inner
    cdef Py_ssize_t outer = min(g.piece_outer, g.N - n)
    cdef Py_ssize_t inner = min(g.piece_inner, channels * g.S - s)
    cdef Py_ssize_t line = g.C * g.S
    cdef Sheet* whole = &sheets[0]
    cdef Sheet* rest = &sheets[1]

    whole.offset = n * line + strip * g.strip_channels * g.S + s
    whole.channels = rest.channels = channels
    rest.repeat = rest.runs = 1
    rest.run_stride = 0
    rest.row_stride = line
    if g.by_plane:
        whole.runs, whole.run_stride = outer, line
        whole.rows, whole.row_stride = inner // LANES, LANES
        whole.repeat, whole.span = 1, LANES
        rest.span = inner % LANES
        rest.rows = outer if rest.span else 0
        rest.offset = whole.offset + whole.rows * LANES
    else:
        whole.runs, whole.run_stride = 1, 0
        whole.rows, whole.row_stride = outer // g.repeat, line * g.repeat
        whole.repeat = g.repeat
        whole.span = rest.span = g.S
        rest.rows = outer % g.repeat
        rest.offset = whole.offset + whole.rows * whole.row_stride


cdef inline Py_ssize_t width_of(const Sheet* sheet) noexcept nogil:
    return sheet.repeat * sheet.channels * sheet.span


cdef inline void spread(real value, const Sheet* sheet, Py_ssize_t c,
                        real* columns) noexcept nogil:  # OUT
    """Set every column of channel c."""
    cdef Py_ssize_t r, s, k
    for r in range(sheet.repeat):
        k = (r * sheet.channels + c) * sheet.span
        for s in range(sheet.span):
            columns[k + s] = value


cdef inline Py_ssize_t gather(const double* columns, const Sheet* sheet, Py_ssize_t c,
                              double* values) noexcept nogil:  # OUT
    """Copy the columns of channel c side by side; return how many there are."""
    cdef Py_ssize_t r, s, k
    for r in range(sheet.repeat):
        k = (r * sheet.channels + c) * sheet.span
        for s in range(sheet.span):
            values[r * sheet.span + s] = columns[k + s]
    return sheet.repeat * sheet.span


cdef double sum_of(const double* value, Py_ssize_t n) noexcept nogil:
    """A sum in eight chains, which an adder of four cycles' latency can take in parallel."""
    cdef double[8] lane
    cdef Py_ssize_t i, j, whole = n - n % 8
    for j in range(8):
        lane[j] = 0
    for i in range(0, whole, 8):
        for j in range(8):
            lane[j] += value[i + j]
    for j in range(n - whole):
        lane[j] += value[whole + j]
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))


cdef inline double sum_of_channel(const double* columns, const Sheet* sheet,
                                  Py_ssize_t c) noexcept nogil:
    cdef double[WIDTH] values
    if sheet.repeat * sheet.span == 1:
        return columns[c]
    return sum_of(values, gather(columns, sheet, c, values))
