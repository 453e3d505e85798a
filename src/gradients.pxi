# The sums that the gradients of batch normalisation need (Ioffe and Szegedy 2015). With
# m = N * S values per channel and x_hat = (x - mean) / std:
#
#   grad_bias   = sum(grad_output)
#   grad_weight = sum(grad_output * x_hat)
#   grad_input  = weight / std * (grad_output - grad_bias / m - x_hat * grad_weight / m)
#
# With frozen statistics mean and std do not depend on x, and the two last terms are missing.
#
# Where the weight changes within a channel (group, layer and RMS norm), it belongs to grad_output
# everywhere but in grad_weight and grad_bias, which are summed over the values that share it:
#
#   grad_input  = (g - sum(g) / m - x_hat * sum(g * x_hat) / m) / std,  g = weight * grad_output

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


cdef inline double* share_of(const Pass* p, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    """By value, what a tile finds of the gradients of biases and, further on, of weights."""
    cdef const Geometry* g = &p.geometry
    return p.shares + 2 * g.parameters * (strip * g.outer_pieces + piece // g.inner_pieces)


cdef void clear_share(const Pass* p, const Sheet* sheet, double* share) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t r
    for r in range(g.period * 2):
        memset(share + r * g.parts + sheet.start, 0, sheet.length * sizeof(double))


cdef void reduce_by_value(const Pass* p, Sheet sheet, Py_ssize_t first,
                          Sums* into) noexcept nogil:
    cdef double[AT_ONCE] total
    cdef double[AT_ONCE] product
    cdef Py_ssize_t end = first + sheet.channels, c
    while first < end:
        sheet.channels = min(AT_ONCE, end - first)
        micro_of(p).row_products(p, &sheet, first, total, product)
        for c in range(sheet.channels):
            into[c].grad_output, into[c].grad_output_centred = total[c], product[c]
        first += sheet.channels
        into += sheet.channels
        sheet.offset += sheet.channels * p.geometry.S


cdef void reduce_gradients(const Pass* p, Py_ssize_t strip, Py_ssize_t piece) noexcept nogil:
    cdef const Geometry* g = &p.geometry
    cdef Sheet sheet = sheet_of(g, strip, piece)
    cdef Py_ssize_t first = first_channel(g, strip) - p.origin, parts = parts_kept(g)
    cdef Sums* into = <Sums*>p.partial + (piece * p.stride + first) * parts
    if g.by_value:
        if p.shares != NULL:
            clear_share(p, &sheet, share_of(p, strip, piece))
            micro_of(p).share_products(p, &sheet, first, share_of(p, strip, piece))
        if p.out != NULL:
            reduce_by_value(p, sheet, first, into)
    else:
        micro_of(p).sum_products(p, &sheet, first, parts, into)


cdef void merge_sums(const Sums* found, Py_ssize_t pieces, Py_ssize_t stride, Py_ssize_t n,
                     double* total, double* product) noexcept nogil:   # OUT (n)
    """Merge what the pieces found of n channels."""
    cdef Py_ssize_t i, c
    for c in range(n):
        total[c] = product[c] = 0
    for i in range(pieces):
        for c in range(n):
            total[c] += found[c].grad_output
            product[c] += found[c].grad_output_centred
        found += stride


cdef inline double weight_of(const Pass* p, Py_ssize_t k) noexcept nogil:
    """The weight of a part of a channel."""
    if p.storage == FLOAT64:
        return (<const double*>p.parameters)[k]
    return (<const float*>p.parameters)[k]


cdef inline Sums merge_parts(const Pass* p, Py_ssize_t c,
                             Py_ssize_t weight,   # of its first part
                             double reciprocal,
                             double* grad_bias,   # OUT (parameters), and grad_weight after it
                             ) noexcept nogil:
    """Merge what the pieces found of a channel of several parts, and keep it of each of them."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t kept = parts_kept(g), piece, first, q
    cdef const Sums* found = <const Sums*>p.partial + c * kept
    cdef double* grad_weight = grad_bias + g.parameters
    cdef Sums sums
    for q in range(min(kept, g.parts)):
        grad_bias[q], grad_weight[q] = found[q].grad_output, found[q].grad_output_centred
    for q in range(kept, g.parts):
        grad_bias[q] = grad_weight[q] = 0
    for piece in range(1, g.pieces):
        found += p.stride * kept
        first = first_part(g, piece)
        for q in range(min(kept, g.parts - first)):
            grad_bias[first + q] += found[q].grad_output
            grad_weight[first + q] += found[q].grad_output_centred
    sums.grad_output = sums.grad_output_centred = 0
    for q in range(g.parts):
        sums.grad_output += weight_of(p, weight + q) * grad_bias[q]
        sums.grad_output_centred += weight_of(p, weight + q) * grad_weight[q]
        grad_weight[q] *= reciprocal
    return sums


cdef void merge_gradients(const Pass* p, Py_ssize_t first, Py_ssize_t n, const double* reciprocal,
                          double* total, double* product) noexcept nogil:   # OUT (n)
    """Merge what the pieces found of n channels; what goes into shared gradients is kept."""
    cdef const Geometry* g = &p.geometry
    cdef Py_ssize_t sharer, turn, c
    cdef double* share
    cdef Sums sums
    if g.parts == 1 or g.by_value:
        merge_sums(<const Sums*>p.partial + first, g.pieces, p.stride, n, total, product)
    if p.shares == NULL or g.by_value:
        return
    sharer, turn = (p.origin + first) // g.period, (p.origin + first) % g.period
    for c in range(n):
        share = p.shares + (sharer - p.first_sharer) * 2 * g.parameters + turn * g.parts
        if g.parts == 1:
            share[0], share[g.parameters] = total[c], product[c] * reciprocal[c]
        else:
            sums = merge_parts(p, first + c, turn * g.parts, reciprocal[c], share)
            total[c], product[c] = sums.grad_output, sums.grad_output_centred
        turn += 1
        if turn == g.period:
            sharer, turn = sharer + 1, 0
