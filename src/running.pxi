# Running statistics, and what they learn.

cdef void blend(real* running, const double* batch, Py_ssize_t C, double momentum,
                double factor) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(C):
        running[c] = <real>((1 - momentum) * running[c] + momentum * (batch[c] * factor))


cdef inline bint fits(double value, bint single) noexcept nogil:
    """Whether a value is finite, also in the element type that it is to be kept in."""
    if single:
        value = <float>value
    return -INFINITY < value < INFINITY


cdef inline bint is_single(ndarray array):
    return array is not None and PyArray_TYPE(array) == NPY_FLOAT


cpdef ndarray averages(ndarray statistics, Py_ssize_t C):
    """Those of C channels over the samples of an instance norm."""
    from numpy import errstate
    with errstate(all="ignore"):
        # Axis 0 holds samples: their sums are in order, whatever the number of threads.
        return statistics.reshape(3, -1, C).mean(axis=1)


cpdef list not_finite(ndarray statistics, ndarray running_mean, ndarray running_var, double count,
                      double correction):
    """The channels with statistics that running statistics should not learn."""
    cdef Py_ssize_t C = PyArray_DIM(statistics, 1), c
    cdef const double* mean = <const double*>data_of(statistics)
    cdef const double* var = mean + 2 * C
    cdef double unbiased = 1 if running_var is None else count / (count - correction)
    cdef bint single_mean = is_single(running_mean), single_var = is_single(running_var)
    return [c for c in range(C)
            if not (fits(mean[c], single_mean) and fits(var[c] * unbiased, single_var))]


cpdef learn(ndarray running_mean, ndarray running_var, num_batches_tracked,   # IN, OUT, or None
            ndarray statistics, momentum, double count, double correction,
            bint skips):   # channels whose statistics are not finite
    """Let the running statistics learn those of a batch of count values per channel."""
    # The GIL is held throughout: calls from several threads lose nothing that one has learnt. No
    # container is made in between, because that may collect garbage and so let other threads run.
    if momentum is None:
        momentum = 1.0 / (<object>num_batches_tracked.item() + 1)
    if running_mean is not None:
        blend_both(running_mean, running_var, statistics, momentum, count / (count - correction),
                   skips)
    if num_batches_tracked is not None:
        if is_int64(num_batches_tracked):   # a microsecond less than the addition of arrays
            (<npy_int64*>PyArray_DATA(<ndarray>num_batches_tracked))[0] += 1
        else:
            num_batches_tracked += 1


cdef void blend_both(ndarray running_mean, ndarray running_var, ndarray statistics,
                     double momentum, double unbiased, bint skips):
    cdef Py_ssize_t C = PyArray_DIM(statistics, 1), first = 0, c
    cdef const double* mean = <const double*>data_of(statistics)
    cdef const double* var = mean + 2 * C
    cdef bint single_mean = is_single(running_mean), single_var = is_single(running_var)
    if skips:
        for c in range(C):   # from one channel that is not finite to the next
            if not (fits(mean[c], single_mean) and fits(var[c] * unbiased, single_var)):
                blend_some(running_mean, mean, first, c, momentum, 1)
                blend_some(running_var, var, first, c, momentum, unbiased)
                first = c + 1
    blend_some(running_mean, mean, first, C, momentum, 1)
    blend_some(running_var, var, first, C, momentum, unbiased)


cdef void blend_some(ndarray running, const double* batch, Py_ssize_t first, Py_ssize_t end,
                     double momentum, double factor):
    if is_single(running):
        blend(<float*>data_of(running) + first, batch + first, end - first, momentum, factor)
    else:
        blend(<double*>data_of(running) + first, batch + first, end - first, momentum, factor)
