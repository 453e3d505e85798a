# What a pass is asked for, and the memory it works in.

cdef enum Kind:
    STATISTICS        # reduce, finish
    BATCH             # reduce, finish, apply: normalise by the statistics of the batch
    GIVEN             # finish, apply: normalise by given statistics
    GRADIENTS         # reduce, finish, apply: through the statistics of the batch
    FROZEN_GRADIENTS  # reduce, finish, apply: the statistics do not depend on x


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
    double* statistics      # OUT (3, C): mean, mean_low and var of the batch
    void* grad_weight       # OUT (C,) of the element type of x, or NULL
    void* grad_bias
    void* partial           # (pieces, channels) Moments, or (pieces, channels, parts kept) Sums
    void* coefficients      # (COEFFICIENTS, channels) of the element type of x
    void* parameters        # (2, parameters) of that type: weights and biases of parts of channels
    # The gradients of parameters that several channels share: OUT (sharers, 2, parameters), of the
    # biases and of the weights, to be added up.
    double* shares
    Py_ssize_t sharers


cdef inline bint shares_parameters(const Geometry* g) noexcept nogil:
    return g.parts > 1 or g.period < g.channels


cdef inline bint keeps_parts(const Geometry* g) noexcept nogil:
    """Whether sums for gradients are kept apart for each part of a channel."""
    return g.parts > 1 and not g.by_value


cdef inline Py_ssize_t sharers_of(const Geometry* g, bint gathers) noexcept nogil:
    if gathers and g.by_value:
        return g.strips * g.outer_pieces
    return g.channels // g.period


cdef inline const real* weights_of(const real* x,   # for its element type only
                                   const Pass* p, Py_ssize_t c) noexcept nogil:
    """The weights of the parts of a channel."""
    return <const real*>p.parameters + c % p.geometry.period * p.geometry.parts


cdef inline const real* biases_of(const real* x, const Pass* p, Py_ssize_t c) noexcept nogil:
    return weights_of(x, p, c) + p.geometry.parameters


cdef inline real low_part(real high, double mean, double mean_low) noexcept nogil:
    """What is left of a mean in two parts beside its first digits."""
    cdef real low = <real>((mean - <double>high) + mean_low)
    return low if -INFINITY < low < INFINITY else 0   # it is not finite where the mean is not
