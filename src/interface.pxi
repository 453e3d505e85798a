# What the micro-kernels (micro.h) are given, and what they are. Cython writes all that is public
# here and in geometry.pxi to _core.h, which they include.

cdef public enum:
    AT_ONCE = 64   # channels, or parameters, that are finished side by side
    LINE = 64      # bytes of a cache line


cdef public enum Storage:   # what the data are kept in
    FLOAT32
    FLOAT64
    FLOAT16    # computed in float32, as the next
    BFLOAT16
    STORAGES


cdef public enum Kind:
    STATISTICS        # reduce, finish
    NORMALISE         # reduce, finish, write: normalise by the statistics of the batch
    GIVEN             # finish, write: normalise by given statistics
    GRADIENTS         # reduce, finish, write: through the statistics of the batch
    FROZEN_GRADIENTS  # reduce, finish, write: the statistics do not depend on x


cdef public enum:   # rows of the (COEFFICIENTS, channels) table; micro_write.h says what they are
    MEAN
    MEAN_LOW
    SCALE
    BIAS
    SLOPE
    COEFFICIENTS
    MEAN_GRAD = BIAS         # a pass has one or the other
    WEIGHT = COEFFICIENTS    # only where it is put before a loop
    ALL_COEFFICIENTS


cdef public struct PerChannel:   # one value per channel, as the caller has it
    const float* single
    const double* double_
    double absent   # the value of every channel when there is no array


cdef public struct Moments:
    double count
    double shift   # the mean is shift + mean: two numbers carry the digits that one would round off
    double mean
    double m2      # sum of squared deviations from the mean


cdef public struct Columns:   # arrays of WIDTH, or of AT_ONCE channels
    double* shift
    double* mean
    double* m2


cdef public struct Sums:
    double grad_output           # sum(grad_output)
    double grad_output_centred   # sum(grad_output * (x - mean))


cdef public struct Fused:   # steps that go along with a pass
    bint relu
    const void* residual       # added to what the norm makes, or NULL
    # A bit for each value of the array, whether relu lets it through, or NULL: OUT, or, of a pass
    # back, IN.
    unsigned char* passed
    bint back
    void* grad_residual        # OUT, or NULL: what is let through of the gradient of the output


cdef public struct Pass:
    Kind kind
    Storage storage
    Geometry geometry
    Geometry writing        # what is written after everything was reduced is cut like this
    const void* x
    const void* grad_output
    void* out               # OUT
    # The number of the first channel in what is kept of each (partial, coefficients); numbers
    # of channels begin there. And how much further on, in values, x and grad_output are read next.
    Py_ssize_t origin
    Py_ssize_t ahead
    bint stream             # whether it is written past the cache
    bint from_memory        # whether x is larger than what a cache keeps of it from pass to pass
    bint centred            # whether the mean is subtracted; RMS norm does not
    bint finds              # whether it finds the statistics of x, and is not given them
    Fused fused
    bint fuses              # whether any of these steps goes along with what is written
    PerChannel weight       # of a channel, where it has one
    PerChannel bias
    PerChannel mean         # given statistics; mean_low is what float64 rounds off mean
    PerChannel mean_low
    PerChannel var
    double eps
    double* statistics      # OUT (3, channels): mean, mean_low and var, ...
    Py_ssize_t statistics_stride   # ... so far apart
    void* grad_weight       # OUT (parameters,) of the type that is computed in, or NULL
    void* grad_bias
    Py_ssize_t stride       # channels from one row of partial, or of coefficients, to the next
    void* partial           # (pieces, stride) Moments, or (pieces, stride, parts_kept) Sums
    # The next two are of the type that is computed in.
    void* coefficients      # (COEFFICIENTS, stride)
    void* parameters        # (2, parameters): weights and biases of parts of channels
    # The gradients of parameters that several channels share: OUT (sharers, 2, parameters), of the
    # biases and of the weights, to be added up.
    double* shares
    Py_ssize_t sharers
    Py_ssize_t first_sharer   # the number, among all, of the first of these


cdef public struct Micro:
    # Values per channel in float64, and whether no variance, with eps, would be divided by the root
    # of zero or of less; a NaN stays a NaN.
    void (*take_values)(const PerChannel* p, Py_ssize_t first, Py_ssize_t n,
                        double* values) noexcept nogil
    bint (*are_usable)(const PerChannel* var, Py_ssize_t n, double eps) noexcept nogil
    # Merge a block of a sheet into columns of so many rows before; so many follow.
    void (*add_block)(const void* x, const Sheet* block, double smallest, Py_ssize_t before,
                      Py_ssize_t following, Columns* columns) noexcept nogil
    # The moments of the channels of a sheet, from those of its columns.
    void (*fold)(const Sheet* sheet, const Columns* columns, Moments* into) noexcept nogil
    # The sums of a block of a channel, of runs of so many values in some unit, around a shift: that
    # given, or else its mean. And a unit for a channel whose squares are out of range in 1.
    void (*sum_plane)(const void* x, const Sheet* block, Py_ssize_t length, bint centred,
                      double unit, double* shift, double* total, double* square) noexcept nogil
    double (*unit_of)(const void* x, const Sheet* sheet) noexcept nogil
    # The moments of at most AT_ONCE channels of one block each; the statistics of as many.
    void (*channel_moments)(const Pass* p, const Sheet* sheet, double smallest,
                            Columns* into) noexcept nogil
    void (*finish_moments)(const Pass* p, Py_ssize_t first, Py_ssize_t n,
                           const Columns* found) noexcept nogil
    # The sums of channels for gradients, each in so many parts.
    void (*sum_products)(const Pass* p, const Sheet* sheet, Py_ssize_t first, Py_ssize_t parts,
                         Sums* into) noexcept nogil
    # Those of at most AT_ONCE channels that have their parameters by value.
    void (*row_products)(const Pass* p, const Sheet* sheet, Py_ssize_t first, double* total,
                         double* product) noexcept nogil
    # Add up what these channels share of the gradients of parameters.
    void (*share_products)(const Pass* p, const Sheet* sheet, Py_ssize_t first,
                           double* share) noexcept nogil
    # The weights and biases of parts of channels as a table.
    void (*take_parameters)(const Pass* p) noexcept nogil
    # At most AT_ONCE channels: their coefficients; those for gradients; shared parameters.
    void (*finish_coefficients)(const Pass* p, Py_ssize_t first, Py_ssize_t n,
                                double* reciprocal) noexcept nogil
    void (*finish_gradients)(const Pass* p, Py_ssize_t first, Py_ssize_t n,
                             const double* reciprocal, const double* total,
                             const double* product) noexcept nogil
    void (*finish_parameters)(const Pass* p, Py_ssize_t first, Py_ssize_t n) noexcept nogil
    # Write a sheet.
    void (*write)(const Pass* p, const Sheet* sheet, Py_ssize_t first) noexcept nogil
    # The same, and share_products.
    void (*write_sharing)(const Pass* p, const Sheet* sheet, Py_ssize_t first,
                          double* share) noexcept nogil


cdef const Micro* micros = NULL   # one for each storage, of the instruction set in use


def use(capsule):
    """Use the micro-kernels of a module cbn._micro_*, whose table this is."""
    global micros
    micros = <const Micro*>PyCapsule_GetPointer(capsule, "cbn.micro")


cdef inline const Micro* micro_of(const Pass* p) noexcept nogil:
    return micros + <int>p.storage


cdef inline PerChannel per_channel_absent(double value) noexcept nogil:
    cdef PerChannel p
    p.single = NULL
    p.double_ = NULL
    p.absent = value
    return p


cdef int bfloat16_type = NPY_NOTYPE   # the number that NumPy has given to it, once one was seen


cdef inline int storage_of_type(int type_num):
    """The Storage of an element type of NumPy, or -1; of a bfloat16 only once one was seen."""
    return (FLOAT32 if type_num == NPY_FLOAT else FLOAT64 if type_num == NPY_DOUBLE
            else FLOAT16 if type_num == NPY_HALF else BFLOAT16 if type_num == bfloat16_type else -1)


cdef int storage_of_dtype(dtype element):
    """The same. NumPy has no bfloat16: a library that has one gives it this name."""
    global bfloat16_type
    cdef int storage = storage_of_type(element.type_num)
    if (storage < 0 and element.type_num >= NPY_USERDEF and element.itemsize == 2
            and element.name == "bfloat16"):
        bfloat16_type = element.type_num
        return BFLOAT16
    return storage


cdef inline bint is_half(int storage) noexcept nogil:
    return storage == FLOAT16 or storage == BFLOAT16


cdef inline int storage_of(ndarray array):
    cdef int storage = storage_of_type(PyArray_TYPE(array))
    return storage if storage >= 0 else storage_of_dtype(<dtype>PyArray_DESCR(array))


cdef PerChannel per_channel(ndarray array, double absent) noexcept:
    cdef PerChannel p = per_channel_absent(absent)
    if array is not None:
        if PyArray_TYPE(array) == NPY_FLOAT:
            p.single = <const float*>PyArray_DATA(array)
        else:
            p.double_ = <const double*>PyArray_DATA(array)
    return p


cdef inline void* data_of(ndarray array) noexcept:
    return PyArray_DATA(array) if array is not None else NULL
