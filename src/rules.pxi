# The rules of a call: what each argument must be. calls.pxi asks them of every call, and cbn/ where
# it reads an argument by itself, and words what breaks them; rules of several arguments stand in
# calls.pxi alone.

cdef tuple nonfinite_names = ("propagate", "raise", "skip")
NONFINITE = nonfinite_names
cdef tuple wanted_names = ("all", "input", "parameters")   # gradients
WANTED = wanted_names
cdef tuple activation_names = (None, "relu")
ACTIVATIONS = activation_names

cpdef enum:
    MOST_AXES = 64   # of an array of NumPy


# --------------------------------------------------------------------------------------- scalars


cpdef bint is_finite(value):
    """A finite float, or a small int such as the default of correction."""
    if type(value) is int:
        return -1000 < value < 1000
    return type(value) is float and -INFINITY < <double>value < INFINITY


cpdef bint is_non_negative(value):
    return is_finite(value) and <double>value >= 0


cdef inline bint is_nonfinite(value):
    """The name of what to do with statistics that are not finite."""
    return type(value) is str and value in nonfinite_names


cdef inline bint is_activation(value):
    """The name of a step after the norm, or None."""
    return value is None or (type(value) is str and value in activation_names)


cdef inline bint is_wanted(value):
    """The name of the gradients that are wanted."""
    return type(value) is str and value in wanted_names


# ---------------------------------------------------------------------------------------- arrays


cdef inline bint is_real(int type_num):
    """Whether cbn computes in this element type of NumPy."""
    return type_num == NPY_FLOAT or type_num == NPY_DOUBLE


cpdef bint is_float(dtype element):
    """Whether cbn computes in elements of this type, and parameters may be of it."""
    return is_real(element.type_num) and element.isnative


cpdef bint is_storage(dtype element):
    """Whether data may be of this type: of one that cbn computes in, or of half its size."""
    return storage_of_dtype(element) >= 0 and element.isnative


cpdef bint is_plain(array):
    """An ndarray, no subclass, that a kernel can read."""
    return PyArray_CheckExact(array) and PyArray_ISCARRAY_RO(<ndarray>array)


cdef dtype float32 = PyArray_DescrFromType(NPY_FLOAT)


cpdef bint is_of(element, like):
    """Whether an element type is that which is asked for, if any is."""
    return like is None or element is like or element == like


cpdef bint is_taken(dtype element, layer):
    """Whether a layer of some dtype, or a function, for which it is None, takes such data."""
    if is_half(storage_of_dtype(element)):
        element = float32
    return is_of(element, layer)


cdef inline bint is_data(array, like):
    """Data of one element type."""
    return (is_plain(array) and storage_of(<ndarray>array) >= 0
            and is_of(<object>PyArray_DESCR(<ndarray>array), like))


cdef inline bint is_input(array, layer):
    """Data that a layer of some dtype takes, or a function."""
    return (is_plain(array) and storage_of(<ndarray>array) >= 0
            and is_taken(<dtype>PyArray_DESCR(<ndarray>array), layer))


cpdef bint has_shape(ndarray array, tuple shape):
    cdef int i
    if PyArray_NDIM(array) != len(shape):
        return False
    for i in range(len(shape)):
        if PyArray_DIM(array, i) != <npy_intp>shape[i]:
            return False
    return True


cdef inline bint is_float_of_shape(array, tuple shape):
    return (PyArray_CheckExact(array) and is_real(PyArray_TYPE(<ndarray>array))
            and has_shape(<ndarray>array, shape))


cdef inline bint is_parameter(array, tuple shape):
    """A weight, a bias or a statistic, to be read."""
    return is_float_of_shape(array, shape) and PyArray_ISCARRAY_RO(<ndarray>array)


cpdef bint is_count(array):
    """A number of batches."""
    if not (isinstance(array, ndarray) and PyArray_NDIM(<ndarray>array) == 0
            and PyArray_ISINTEGER(<ndarray>array)):
        return False
    if is_int64(array):   # in a hundredth of the time
        return (<npy_int64*>PyArray_DATA(<ndarray>array))[0] >= 0
    return array >= 0


cdef inline bint is_int64(array):
    return is_plain(array) and PyArray_TYPE(<ndarray>array) == NPY_INT64


# ---------------------------------------------------------------------------------------- memory


cdef struct Ends:   # where an array begins and ends in memory
    size_t first
    size_t end


cdef inline Ends ends_of(ndarray array) noexcept:
    cdef Ends ends
    ends.first = ends.end = <size_t>PyArray_DATA(array)
    if PyArray_IS_C_CONTIGUOUS(array):
        ends.end += PyArray_NBYTES(array)
    elif PyArray_SIZE(array) > 0:
        add_strides(array, &ends)
    return ends


cdef void add_strides(ndarray array, Ends* ends) noexcept:   # IN, OUT
    cdef size_t reach
    cdef npy_intp stride
    cdef int i
    for i in range(PyArray_NDIM(array)):
        stride = PyArray_STRIDE(array, i)
        reach = (PyArray_DIM(array, i) - 1) * (stride if stride > 0 else -stride)
        if stride > 0:
            ends.end += reach
        else:
            ends.first -= reach
    ends.end += PyArray_ITEMSIZE(array)


cdef inline bint are_apart(Ends a, Ends b) noexcept:
    """Whether nothing between the ends of two arrays is in both."""
    return a.end <= b.first or b.end <= a.first or a.first == a.end or b.first == b.end


# ------------------------------------------------------------------------------------ statistics


cpdef bint are_enough(double count, double correction):
    """Whether an unbiased variance can be of so many values; an empty batch has none."""
    return not 0 < count <= max(1.0, correction)


cpdef bint are_usable(ndarray var, double eps):
    """Whether no channel would be divided by the root of 0 or less; NaN makes its channel NaN."""
    cdef PerChannel values = per_channel(var, 1)
    return micros.are_usable(&values, PyArray_DIM(var, 0), eps)
