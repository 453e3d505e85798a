# What a pass is asked for, and the memory it works in.

cdef enum Kind:
    STATISTICS        # reduce, finish
    BATCH             # reduce, finish, apply: normalise by the statistics of the batch
    GIVEN             # finish, apply: normalise by given statistics
    GRADIENTS         # reduce, finish, apply: through the statistics of the batch
    FROZEN_GRADIENTS  # reduce, finish, apply: the statistics do not depend on x


cdef enum:
    ROUNDS = 2   # of tiles: those that are reduced, and those that are written


cdef struct Pass:
    Kind kind
    Geometry geometry
    bint centred            # whether the mean is subtracted; RMS norm does not
    PerChannel weight       # of a channel, where it has one
    PerChannel bias
    PerChannel mean         # given statistics; mean_low is what float64 rounds off mean
    PerChannel mean_low
    PerChannel var
    double eps
    bint stream             # write past the cache
    double* statistics      # OUT (3, channels): mean, mean_low and var
    void* grad_weight       # OUT (parameters,) of the element type of x, or NULL
    void* grad_bias
    void* partial           # (pieces, channels) Moments, or (pieces, channels, parts_kept) Sums
    void* coefficients      # (COEFFICIENTS, channels) of the element type of x
    void* parameters        # (2, parameters) of that type: weights and biases of parts of channels
    # The gradients of parameters that several channels share: OUT (sharers, 2, parameters), of the
    # biases and of the weights, to be added up.
    double* shares
    Py_ssize_t sharers
    Pace* paces             # (ROUNDS, threads) of a team
    clockid_t clock         # that they are measured by
    double seconds          # OUT: of a team's work, and what one thread would have taken; else 0
    double on_one_thread


cdef inline bint shares_parameters(const Geometry* g) noexcept nogil:
    return g.parts > 1 or g.period < g.channels


cdef inline Py_ssize_t parts_kept(const Geometry* g) noexcept nogil:
    """The parts of a channel whose sums for gradients a piece keeps: those that it reaches."""
    if g.parts == 1 or g.by_value:
        return 1
    return min(g.parts, g.parts // g.inner_pieces + 2)   # one of them cut at either end


cdef inline Py_ssize_t first_part(const Geometry* g, Py_ssize_t piece) noexcept nogil:
    """The first of them."""
    return 0 if g.inner_pieces == 1 else start_of(g, piece) // (g.S // g.parts)


cdef inline Py_ssize_t sharers_of(const Geometry* g) noexcept nogil:
    if g.by_value:
        return g.strips * g.outer_pieces
    return g.channels // g.period


cdef inline const real* weights_of(const real* x,   # for its element type only
                                   const Pass* p, Py_ssize_t c) noexcept nogil:
    """The weights of the parts of a channel."""
    # A division costs as much as ten values.
    cdef Py_ssize_t turn = 0 if p.geometry.period == 1 else c % p.geometry.period
    return <const real*>p.parameters + turn * p.geometry.parts


cdef inline const real* biases_of(const real* x, const Pass* p, Py_ssize_t c) noexcept nogil:
    return weights_of(x, p, c) + p.geometry.parameters


cdef inline real low_part(real high, double mean, double mean_low) noexcept nogil:
    """What is left of a mean in two parts beside its first digits."""
    cdef real low = <real>((mean - <double>high) + mean_low)
    return low if -INFINITY < low < INFINITY else 0   # it is not finite where the mean is not
