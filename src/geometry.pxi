# How a kernel walks an array.
#
#   B  batches, each with statistics of its own: nearly always 1
#   N  outer: samples (channels first), or every position of every sample (channels last)
#   C  channels
#   S  inner: the positions of one sample (channels first), or 1 (channels last)
#
# The array is one contiguous (B, N, C, S) view. A channel is whatever has a mean and a variance of
# its own, so that the other norms are views too:
#
#                      channels first (n, c, s)          channels last (n, s, c)
#   batch norm         (1, n, c, s)                      (1, n * s, c, 1)
#   instance norm      (1, 1, n * c, s)                  (n, s, c, 1)
#   group norm         (1, 1, n * groups, c/groups * s)  (n, s, groups, c/groups)
#   layer, RMS norm    (1, 1, rows, values)
#
# Where they differ is the affine step: a channel has `parts` weights and biases, each for the next
# S // parts of its values, and after `period` channels they repeat.
#
# The array is cut into strips of whole channels of a batch and each strip into pieces; (strip,
# piece) is a tile, the unit of parallel work. The reductions read a tile as a sheet: rows of
# `width` contiguous values, with one accumulator per column. Columns never mix inside a loop, which
# is why vectors of any width give the same bits.
#
#   by plane (S long):   each run of S values of a channel is folded into rows of `lanes` values;
#                        the last one may be shorter. A strip is one channel, or several that have
#                        few values, or, where nothing is reduced, several with their runs side by
#                        side.
#   by row   (S short):  a row holds the S columns of each channel of the strip, and `repeat` rows
#                        of the array side by side where they are short; the last one may be
#                        shorter.
#
# Short planes of many samples are read faster by row than by plane: the runs of one channel lie a
# page and more apart, and a strip of several channels has longer ones.
#
# Every cut depends on the shape alone, but one: what is cut in two strips for two threads, one
# thread joins again (join_strips). No sum depends on how wide a strip is. Where a channel is of one
# sample, what its values are added up by (lanes, rows, blocks, pieces) depends on the shape of that
# sample alone, so that it has the same bits in any batch; how many samples make a strip is free.

cdef enum:
    MOST_VIEWS = 1024    # that a norm remembers. Serving text, a layer may see one for every length

cdef public enum:
    LANES = 64           # values in a row of a plane: 4 vectors of 512 bits of float, ...
    SHORT_LANES = 16     # ... or fewer, where a channel is too small to be worth folding so many
    WIDTH = 1024         # most columns of a sheet: 4 KiB of float from each row of the array
    NARROW = 128         # columns from which there is nothing to gain from more
    # Rows of a block, which is summed in the element type of the array. LANES float columns of so
    # many are 24 KiB and fit L1 (32 KiB), and WIDTH of them fit L2; with fewer rows there would be
    # more merging in float64.
    TALLEST = 96
    # Rows read side by side, so that a column's sums are fetched once for all; the moments of each
    # such band are summed on their own, for their digits.
    BAND = 8
    SUMMED = 16          # rows whose sums for gradients are added up before they are in float64
    PIECE = 65536        # most values in a piece: far more work than to hand it to a thread, ...
    SMALL_PIECE = 16384  # ... and where an array has few of them
    SMALL_STRIP = 8192   # values that channels of few values are gathered to
    LONG_RUN = 512       # S from which a channel is walked by plane, ...
    FEW_VALUES = 64      # of a channel: with fewer, its coefficients would be a tenth of them
    LEAST_ROWS = 8       # ... or from SHORT_LANES, where N would leave a sheet fewer rows
    # Channels that share parameters and whose gradients a strip gathers: so many that the sums,
    # 16 bytes a parameter and strip, are a tenth of the values at most, and that they have
    # SMALL_PIECE values; in small arrays fewer, so that there are strips for all threads.
    GATHERED = 64
    LEAST_GATHERED = 40
    FEWEST_GATHERED = 8
    GATHERED_FROM = 1 << 18   # values of an array that is not small
    GATHERING_STRIPS = 16
    # Parameters in a piece of such channels, if they have more than are run as a whole.
    GATHERED_RUN = 4096
    GATHERED_WHOLE = 16384


cdef public struct Geometry:
    Py_ssize_t B
    Py_ssize_t N
    Py_ssize_t C
    Py_ssize_t S
    Py_ssize_t parts
    Py_ssize_t period
    Py_ssize_t channels        # of all batches: B * C
    Py_ssize_t parameters      # weights, and biases: period * parts
    bint by_plane
    # Whether parameters change from value to value along a run, so that they are read beside x, and
    # their gradients are gathered down the channels that share them.
    bint by_value
    Py_ssize_t lanes           # by plane, values in a row: LANES or SHORT_LANES
    Py_ssize_t strip_channels
    Py_ssize_t batch_strips    # of one batch
    Py_ssize_t strips          # of all
    Py_ssize_t repeat          # rows of the array in one row of a sheet
    Py_ssize_t outer_pieces    # pieces that N is cut into
    Py_ssize_t inner_pieces    # pieces that S is cut into
    Py_ssize_t pieces          # of a strip: the product of the two


cdef public struct Sheet:
    Py_ssize_t offset          # of its first value in the array
    Py_ssize_t start           # of its first value in the channel's run
    Py_ssize_t runs
    Py_ssize_t run_stride
    Py_ssize_t rows            # of each run (by plane, of a run of one channel); of short ones none
    Py_ssize_t row_stride
    Py_ssize_t width           # columns; they are (repeat, channels, span)
    Py_ssize_t tail            # columns that have one more row, the last of each run
    Py_ssize_t length          # by plane, of a run
    Py_ssize_t repeat
    Py_ssize_t channels
    Py_ssize_t span


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t channels_of_even_strips(Py_ssize_t channels,
                                               Py_ssize_t most) noexcept nogil:
    """The channels of a strip of at most so many, of an even number of strips where that can be:
    so two threads have the same to do."""
    cdef Py_ssize_t strips = ceil_div(channels, most)
    return ceil_div(channels, strips if strips == 1 else strips + strips % 2)


cdef inline Py_ssize_t piece_of(Py_ssize_t values) noexcept nogil:
    return min(PIECE, max(SMALL_PIECE, values))


cdef class View:
    """An array as a pass walks it, and what follows from that: the cuts of the passes that only
    write, of those that reduce, and of those that find gradients of parameters too."""

    cdef readonly Py_ssize_t B, N, C, S, parts, period
    cdef readonly bint of_samples         # whether each channel is of one sample
    cdef readonly bint turned             # whether it is of the transpose of the caller's array
    cdef readonly tuple shape             # of the array; None in a view that no Norm has made
    cdef readonly tuple parameter_shape   # of weight, bias, and running statistics
    cdef readonly Py_ssize_t values       # that a mean is of
    # Whether backward computes statistics that were not kept on its way through x, and whether they
    # are better not kept: where that is little work, and three of float64 would be more than a
    # tenth of a channel of float32.
    cdef readonly bint recomputes
    cdef readonly bint keeps_none
    cdef Geometry writing
    cdef Geometry reducing
    cdef Geometry gathering

    def __init__(self, Py_ssize_t B, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t parts,
                 Py_ssize_t period, bint of_samples, tuple parameter_shape, bint turned=False):
        self.B, self.N, self.C, self.S, self.parts, self.period = B, N, C, S, parts, period
        self.of_samples, self.parameter_shape = of_samples, parameter_shape
        self.turned = turned
        # Of no sample there are no values, but of a batch without any each mean would be of some.
        self.values = N * S if B * C > 0 or not of_samples else 0
        if B * N * C * S > 0:
            self.writing = cut(self, False, False)
            self.reducing = cut(self, True, False)
            self.gathering = cut(self, True, True)
        self.recomputes = self.values > 0 and (
            is_in_spans(&self.gathering)
            or (self.of_samples and self.values < LONG_RUN
                and self.reducing.pieces == self.gathering.pieces == 1))
        self.keeps_none = (self.recomputes and is_in_spans(&self.gathering)
                           and 10 * 3 * sizeof(double) > self.values * sizeof(float))

    cdef inline Py_ssize_t most(self):
        """The values in a piece."""
        if not self.of_samples:
            return piece_of(self.N * self.C * self.S // 8)
        # Half of a channel, or, where channels are walked together, half of all of the sample: two
        # pieces are enough for two threads, and more would cost large batches up to a tenth.
        return piece_of((self.S if self.N == 1 else self.N * self.C * self.S) // 2)


cdef class Norm:
    """A row of the table of norms (cbn/_norms.py), for one choice of its arguments."""

    cdef readonly bint centred   # whether the mean is subtracted
    cdef readonly dict views     # of shapes that it has seen, ...
    cdef View latest             # ... the last of which is found without making a tuple of it
    cdef readonly Norm turned    # for the transposes of (N, C) in Fortran order; None: by a copy
    cdef object make_view        # a function that returns the view of a shape, or refuses it

    def __init__(self, make_view, bint centred=True, Norm turned=None):
        self.make_view, self.centred, self.turned, self.views = make_view, centred, turned, {}

    def view(self, tuple shape):
        """The view of an array of this shape, or an error."""
        cdef View view = self.views.get(shape)
        if view is None:
            view = self.make_view(shape)
            view.shape = shape
            if len(self.views) >= MOST_VIEWS:
                self.views.clear()
            self.views[shape] = view
        return view


cdef inline View view_of(Norm norm, ndarray x):
    if norm.latest is None or not has_shape(x, norm.latest.shape):
        norm.latest = norm.view((<object>x).shape)
    return norm.latest


cdef Geometry cut(View view,
                  bint reduces,    # False: with given statistics it only writes
                  bint gathers     # True: a pass that finds gradients of parameters
                  ) noexcept:
    """The strips and pieces of a non-empty array."""
    cdef Geometry g
    cdef Py_ssize_t N = view.N, C = view.C, S = view.S, B = view.B
    cdef Py_ssize_t most = view.most(), most_outer = N, sharing, strips, gathered, fewest
    cdef bint gathers_values
    if N == 1:   # nothing lies between the channels of one batch and those of the next
        B, C = 1, B * C
    g.B, g.N, g.C, g.S, g.parts, g.period = B, N, C, S, view.parts, view.period
    g.channels, g.parameters = B * C, view.period * view.parts
    g.by_plane = S >= LONG_RUN or (
        (N < LEAST_ROWS or not reduces) and (S >= SHORT_LANES or g.parts > 1))
    g.by_value = g.by_plane and g.parts > 1 and g.parts == S
    gathers_values = gathers and g.by_value
    g.lanes = LANES if N * (S // LANES) >= SHORT_LANES else SHORT_LANES
    g.repeat = 1
    g.strip_channels = 1
    if not g.by_plane:
        # Strips of equal width, so that no thread is left with a sliver.
        g.strip_channels = ceil_div(C, ceil_div(C, max(1, WIDTH // S)))
        if S == 1 and C >= WIDTH and not reduces:
            # No accumulators, so nothing forbids whole rows, and memory likes them best. But not
            # where there would be more coefficients than values in a few rows.
            g.strip_channels = C
            if N < FEW_VALUES and C > 8 * WIDTH:
                g.strip_channels = channels_of_even_strips(C, max(WIDTH, most // N))
        elif g.strip_channels == C:
            while C * S * g.repeat < NARROW and N >= 2 * LEAST_ROWS * g.repeat:
                g.repeat *= 2
        if reduces:   # so many rows in a piece that their columns are worth folding
            most_outer = max(1, N // (g.repeat * 2 * TALLEST))
            if (B == most_outer == g.repeat == 1 and g.strip_channels == C
                    and N * C * S >= (2 if gathers else 4) * SMALL_PIECE):
                g.strip_channels = ceil_div(C, 2)   # what is one tile is shared by two threads
    elif not reduces:
        # Nothing is summed along a channel, so the array is walked in the order of the memory.
        g.strip_channels = ceil_div(C, ceil_div(C, max(1, most // S)))
    elif gathers_values:
        sharing = C // g.period
        strips = GATHERING_STRIPS
        if N * C * S >= GATHERED_FROM:   # an even number, for two threads
            strips = max(2, min(strips, sharing // LEAST_GATHERED // 2 * 2))
        gathered = min(max(GATHERED, SMALL_PIECE // g.parameters), ceil_div(sharing, strips))
        fewest = min(FEWEST_GATHERED, ceil_div(2 * SMALL_PIECE, g.parameters))
        g.strip_channels = g.period * min(sharing, max(fewest, gathered))
    elif N * S < SMALL_STRIP:
        g.strip_channels = channels_of_even_strips(C, min(WIDTH, SMALL_STRIP // (N * S)))
    g.batch_strips = ceil_div(C, g.strip_channels)
    g.strips = B * g.batch_strips
    g.inner_pieces = 1
    if gathers_values and N == 1:   # strips have channels of many samples, which do not count
        g.inner_pieces = 1 if S <= GATHERED_WHOLE else ceil_div(g.parameters, GATHERED_RUN)
    elif g.by_plane:
        g.inner_pieces = ceil_div(S * g.strip_channels if gathers_values else S, most)
    g.inner_pieces = min(g.inner_pieces, ceil_div(S, LANES))
    g.outer_pieces = min(most_outer,
                         ceil_div(N * g.strip_channels * ceil_div(S, g.inner_pieces), most))
    g.pieces = g.outer_pieces * g.inner_pieces
    return g


cdef inline Py_ssize_t tiles_of(const Geometry* g) noexcept nogil:
    return g.strips * g.pieces


cdef inline void join_strips(Geometry* g) noexcept nogil:
    """Make one strip again of what was cut for two threads: one alone is up to a tenth faster along
    whole rows (backward, channels last, benchmarks/compare.py)."""
    if not g.by_plane and g.pieces == 1 and g.C * g.S <= WIDTH:
        g.strip_channels = g.C
        g.batch_strips, g.strips = 1, g.B


cdef inline Py_ssize_t batch_of(const Geometry* g, Py_ssize_t strip) noexcept nogil:
    return 0 if g.B == 1 else strip // g.batch_strips   # a division costs as much as ten values


cdef inline Py_ssize_t first_channel(const Geometry* g, Py_ssize_t strip) noexcept nogil:
    """The number of a strip's first channel among those of all batches."""
    cdef Py_ssize_t b = batch_of(g, strip)
    return b * g.C + (strip - b * g.batch_strips) * g.strip_channels


cdef inline Py_ssize_t channels_of(const Geometry* g, Py_ssize_t strip) noexcept nogil:
    return min(g.strip_channels, (batch_of(g, strip) + 1) * g.C - first_channel(g, strip))


cdef inline Py_ssize_t start_of(const Geometry* g, Py_ssize_t piece) noexcept nogil:
    """Where in the runs of a channel a piece begins."""
    return piece % g.inner_pieces * g.S // g.inner_pieces


cdef inline Sheet sheet_of(const Geometry* g, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef Sheet sheet
    cdef Py_ssize_t b = batch_of(g, strip)
    cdef Py_ssize_t channels = channels_of(g, strip)
    cdef Py_ssize_t line = g.C * g.S
    cdef Py_ssize_t n = 0, s = 0, outer = g.N, inner = g.S, place

    # Divisions cost as much as ten values: none where there is one piece.
    if g.outer_pieces > 1:
        place = piece // g.inner_pieces
        n = place * g.N // g.outer_pieces
        outer = (place + 1) * g.N // g.outer_pieces - n
    if g.inner_pieces > 1:
        place = piece % g.inner_pieces
        s = start_of(g, piece)
        inner = (place + 1) * g.S // g.inner_pieces - s
    sheet.offset = (b * (g.N - 1) * g.C + first_channel(g, strip)) * g.S + n * line + s
    sheet.start = s
    sheet.channels = channels
    sheet.repeat = g.repeat
    if g.by_plane:
        sheet.width = sheet.span = g.lanes
        sheet.length = inner
        sheet.runs, sheet.run_stride = outer, line
        sheet.row_stride = g.lanes
        if g.lanes == LANES:   # literals, so that these are no divisions
            sheet.rows, sheet.tail = inner // LANES, inner % LANES
        else:
            sheet.rows, sheet.tail = inner // SHORT_LANES, inner % SHORT_LANES
    else:
        sheet.length = 0
        sheet.span = g.S
        sheet.width = g.repeat * channels * inner
        sheet.runs, sheet.run_stride = 1, 0
        sheet.rows, sheet.row_stride = outer, line
        sheet.tail = 0
        if g.repeat > 1:
            sheet.rows, sheet.row_stride = outer // g.repeat, line * g.repeat
            sheet.tail = outer % g.repeat * line
    return sheet


cdef inline bint is_in_spans(const Geometry* g) noexcept nogil:
    """Whether a strip is run some channels at a time, each with all that belongs to it."""
    return g.by_value and g.pieces == 1


cdef inline Py_ssize_t written_run(const Geometry* g) noexcept nogil:
    """By plane, the values that are written without a gap; by value, those of a channel."""
    if g.by_value:
        return g.S
    if g.strip_channels == g.C and g.inner_pieces == 1:
        return g.N // g.outer_pieces * g.C * g.S
    return g.strip_channels * g.S // g.inner_pieces
