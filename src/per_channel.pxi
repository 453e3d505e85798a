# One value per channel, as the caller has it: float32, float64, or nothing at all.

cdef struct PerChannel:
    const float* single
    const double* double_
    double absent   # the value of every channel when there is no array


cdef inline PerChannel per_channel_absent(double value) noexcept nogil:
    cdef PerChannel p
    p.single = NULL
    p.double_ = NULL
    p.absent = value
    return p


cdef PerChannel per_channel(ndarray array, double absent):
    cdef PerChannel p = per_channel_absent(absent)
    if array is not None:
        if PyArray_TYPE(array) == NPY_FLOAT:
            p.single = <const float*>PyArray_DATA(array)
        else:
            p.double_ = <const double*>PyArray_DATA(array)
    return p


cdef inline double value_of(const PerChannel* p, Py_ssize_t c) noexcept nogil:
    if p.single:
        return p.single[c]
    if p.double_:
        return p.double_[c]
    return p.absent


cdef inline void values_of(const PerChannel* p, Py_ssize_t first, Py_ssize_t n,
                           double* values) noexcept nogil:  # OUT
    cdef Py_ssize_t c
    if p.single:
        for c in range(n):
            values[c] = p.single[first + c]
    elif p.double_:
        for c in range(n):
            values[c] = p.double_[first + c]
    else:
        for c in range(n):
            values[c] = p.absent


cdef inline void values_in_turn(const PerChannel* p, Py_ssize_t first, Py_ssize_t n,
                                Py_ssize_t period,   # channels after which the values repeat
                                double* values) noexcept nogil:  # OUT
    cdef Py_ssize_t done = 0, c = first % period, step
    while done < n:
        step = min(n - done, period - c)
        values_of(p, c, step, values + done)
        done += step
        c = 0
