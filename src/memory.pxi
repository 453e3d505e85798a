# What a pass keeps of its channels, and the memory for it.
#
# What the pieces find, statistics, coefficients: up to a hundred bytes of a channel, and some
# channels have two values. So a strip is a pass of its own where there are more of them than
# threads, in memory that the thread's next strip takes again: it stays in the cache, and is of as
# many strips as there are threads (benchmarks/memory.py).

cdef enum:
    NEAR = 512         # values of float64 that are kept on the stack: threads may have small ones
    # Rows of tables do not lie whole pages apart: they, x and what is written would take the same
    # places of the L1 cache. Long ones have an odd number of halves of this (backward of 64x4096,
    # benchmarks/compare.py: a tenth).
    ROW_STEP = 192     # channels
    LONG_TABLE = 512
    LEAST_SHARED = 1 << 19   # bytes of sums of shared parameters that are never too many


cdef inline bint is_backward(const Pass* p) noexcept nogil:
    return p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS


cdef inline bint has_spans(const Pass* p) noexcept nogil:
    """Whether strips are run some channels at a time."""
    return is_in_spans(&p.geometry) and p.kind != FROZEN_GRADIENTS


cdef inline size_t real_size_of(const Pass* p) noexcept nogil:
    return sizeof(double) if p.storage == FLOAT64 else sizeof(float)


cdef void keep_statistics(Pass* p, double* statistics, Py_ssize_t stride) noexcept nogil:
    """Let a pass keep those that it finds, in three rows so far apart."""
    p.statistics, p.statistics_stride = statistics, stride
    p.mean.double_ = statistics
    p.mean_low.double_ = statistics + stride
    p.var.double_ = statistics + 2 * stride


cdef Tables tables_of(const Pass* p, Py_ssize_t channels) noexcept nogil:
    """What a pass keeps of so many channels."""
    cdef const Geometry* g = &p.geometry
    cdef size_t moments = g.pieces * sizeof(Moments) if p.finds else 0
    cdef size_t sums = g.pieces * parts_kept(g) * sizeof(Sums) if is_backward(p) else 0
    cdef Tables tables
    tables.stride = channels
    if channels >= LONG_TABLE:
        tables.stride = ceil_div(channels, ROW_STEP) * ROW_STEP + ROW_STEP // 2
    tables.keeps_statistics = p.finds and p.statistics == NULL   # or else they are the caller's
    tables.statistics = tables.coefficients = tables.stride * max(moments, sums)
    if tables.keeps_statistics:
        tables.coefficients += tables.stride * 3 * sizeof(double)
    tables.size = tables.coefficients
    if p.kind != STATISTICS:
        tables.size += tables.stride * COEFFICIENTS * real_size_of(p)
    tables.size = ceil_div(tables.size, LINE) * LINE
    return tables


cdef void keep_in(Pass* p, const Tables* tables, char* memory) noexcept nogil:
    """Let a pass keep what it finds in some memory."""
    p.stride = tables.stride
    p.partial = memory
    p.coefficients = memory + tables.coefficients
    if tables.keeps_statistics:
        keep_statistics(p, <double*>(memory + tables.statistics), tables.stride)


cdef inline PerChannel per_channel_from(PerChannel values, Py_ssize_t first) noexcept nogil:
    if values.single != NULL:
        values.single += first
    if values.double_ != NULL:
        values.double_ += first
    return values


cdef void begin_at(Pass* own, const Pass* p, Py_ssize_t first) noexcept nogil:
    """Let a pass over some channels of another begin at this one. What is given of statistics, and
    what is kept of them, is the other's."""
    own.origin = first
    if p.statistics != NULL:
        own.statistics = p.statistics + first
    if p.statistics != NULL or not p.finds:
        own.mean = per_channel_from(p.mean, first)
        own.mean_low = per_channel_from(p.mean_low, first)
        own.var = per_channel_from(p.var, first)


cdef void set_turns(Pass* p, Team* team, Py_ssize_t size) noexcept nogil:
    """Set how many sharers of parameters are kept, and after how many strips they are added up.

    All at once, unless their sums would be more than a sixteenth of an array of this size (a tenth,
    with the tables): then those of a turn, which is of two samples or more, because after it all
    parameters are gone through; and before them one more, the sum of all that were.
    """
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t each = 2 * g.parameters * <Py_ssize_t>sizeof(double)
    cdef Py_ssize_t most = max(size // 16, LEAST_SHARED) // each, turn, sharers
    p.sharers = sharers_of(g)
    if team.apart and not g.by_value and p.sharers > most:
        turn = max(max(most, 2) * g.period // g.strip_channels, 8 * team.threads)
        sharers = ceil_div(turn * g.strip_channels, g.period) + 2   # it may be cut at either end
        if 4 * sharers <= 3 * p.sharers:   # or else little is gained
            team.turn, p.sharers = turn, sharers


cdef inline bint has_turns(const Pass* p, const Team* team) noexcept nogil:
    return team.turn < p.geometry.strips


cdef char* take_memory(Pass* p, Team* team, Py_ssize_t size,   # of the array
                       double* near) noexcept nogil:
    """What is kept of channels, the shares in gradients, paces, and the table of weights and biases
    of parts of channels; near, where they fit."""
    cdef const Geometry* g = &p.geometry
    team.tables = tables_of(
        p, 0 if has_spans(p) else g.strip_channels if team.apart else g.channels)
    cdef size_t kept = team.tables.size * (team.threads if team.apart else 1)
    cdef size_t shares = 0
    # Parts of channels have their sums there also where nobody wants them.
    if is_backward(p) and shares_parameters(g) and (
            p.grad_weight != NULL or (g.parts > 1 and not g.by_value)):
        set_turns(p, team, size)
        shares = p.sharers * 2 * g.parameters * sizeof(double)
    cdef size_t paces = <size_t>ROUNDS * team.threads * sizeof(Pace)
    cdef size_t parameters = 0 if g.parts == 1 else 2 * g.parameters * real_size_of(p)
    cdef size_t total = kept + shares + paces + parameters
    cdef char* memory = <char*>(near if total <= NEAR * sizeof(double) else malloc(total))
    if memory == NULL:
        return NULL
    team.memory = memory
    if not (team.apart or has_spans(p)):
        keep_in(p, &team.tables, memory)
    p.shares = <double*>(memory + kept) if shares else NULL
    team.paces = <Pace*>(memory + kept + shares)
    memset(team.paces, 0, paces)
    if has_turns(p, team):
        memset(p.shares, 0, shares)
    p.parameters = memory + kept + shares + paces
    return memory
