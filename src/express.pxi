# The ordinary call, from the layer's attributes to the kernel in one step.
#
# A service that normalises a few thousand values pays more for Python's checks than for the
# arithmetic. What nearly every call brings (plain contiguous arrays of matching shapes) is
# recognised here in C. These functions refuse nothing: they return None for whatever is not
# ordinary, and cbn/functional/ then looks at it closely, converts it or says what is wrong.

cdef enum:
    MOST_AXES = 64   # of an array of NumPy


cdef bint is_plain(object array, int type_num):
    """An ndarray, no subclass, that a kernel can read."""
    return (PyArray_CheckExact(array) and PyArray_TYPE(<ndarray>array) == type_num
            and PyArray_ISCARRAY_RO(<ndarray>array))


cdef bint is_per_channel(object array, Py_ssize_t C):
    return ((is_plain(array, NPY_FLOAT) or is_plain(array, NPY_DOUBLE))
            and PyArray_NDIM(<ndarray>array) == 1 and PyArray_DIM(<ndarray>array, 0) == C)


cdef bint is_per_channel_or_none(object array, Py_ssize_t C):
    return array is None or is_per_channel(array, C)


cdef bint is_running_or_none(object array, Py_ssize_t C):
    return array is None or (is_per_channel(array, C) and PyArray_ISWRITEABLE(<ndarray>array))


cdef bint is_parameter_or_none(object array, tuple shape):
    cdef int i
    if array is None:
        return True
    if not ((is_plain(array, NPY_FLOAT) or is_plain(array, NPY_DOUBLE))
            and PyArray_NDIM(<ndarray>array) == len(shape)):
        return False
    for i in range(len(shape)):
        if PyArray_DIM(<ndarray>array, i) != <npy_intp>shape[i]:
            return False
    return True


cdef bint is_counter(object array):
    return (is_plain(array, NPY_INT64) and PyArray_NDIM(<ndarray>array) == 0
            and PyArray_ISWRITEABLE(<ndarray>array)
            and (<npy_int64*>PyArray_DATA(<ndarray>array))[0] >= 0)


cdef bint are_apart(ndarray a, ndarray b):
    """Whether two contiguous arrays share no memory."""
    cdef size_t a_first = <size_t>PyArray_DATA(a), b_first = <size_t>PyArray_DATA(b)
    return (a_first + PyArray_NBYTES(a) <= b_first or b_first + PyArray_NBYTES(b) <= a_first)


cdef bint is_plain_out(object out, ndarray like):
    """Nothing, like itself, or a plain array of the same kind that shares no memory with it."""
    return (out is None or out is like
            or (is_plain(out, PyArray_TYPE(like)) and PyArray_SAMESHAPE(<ndarray>out, like)
                and are_apart(<ndarray>out, like))) \
        and (out is None or PyArray_ISWRITEABLE(<ndarray>out))


cdef ndarray new_like(ndarray x):
    return PyArray_EMPTY(PyArray_NDIM(x), PyArray_DIMS(x), PyArray_TYPE(x), 0)


cdef bint view_of(object x, object axes, object dtype,
                  Py_ssize_t* N, Py_ssize_t* C, Py_ssize_t* S):  # OUT
    """The (N, C, S) view of a plain, non-empty array of an accepted rank and element type."""
    # axes is an Axes of cbn/_checks.py, a kind of tuple.
    cdef tuple axis_of_rank = <tuple>PyTuple_GET_ITEM(axes, 0)
    cdef object channels = <object>PyTuple_GET_ITEM(axes, 1)
    cdef int rank, axis, i
    if not PyArray_CheckExact(x):
        return False
    rank = PyArray_NDIM(<ndarray>x)
    if (not (is_plain(x, NPY_FLOAT) or is_plain(x, NPY_DOUBLE)) or rank >= len(axis_of_rank)
            or not (dtype is None or dtype is <object>PyArray_DESCR(<ndarray>x))):
        return False
    axis = axis_of_rank[rank]
    if axis < 0 or PyArray_SIZE(<ndarray>x) == 0:
        return False
    N[0] = S[0] = 1
    for i in range(axis):
        N[0] *= PyArray_DIM(<ndarray>x, i)
    C[0] = PyArray_DIM(<ndarray>x, axis)
    for i in range(axis + 1, rank):
        S[0] *= PyArray_DIM(<ndarray>x, i)
    return channels is None or <npy_intp>channels == C[0]


cdef bint are_all_apart(object out, object a, object b, object c, object d):
    """Whether an output, or None, shares no memory with parameters and statistics, or None."""
    return out is None or (
        (a is None or are_apart(<ndarray>out, <ndarray>a))
        and (b is None or are_apart(<ndarray>out, <ndarray>b))
        and (c is None or are_apart(<ndarray>out, <ndarray>c))
        and (d is None or are_apart(<ndarray>out, <ndarray>d)))


cdef bint is_finite(object value):
    """A finite float, or a small int such as the default of correction."""
    if type(value) is int:
        return -1000 < value < 1000
    return type(value) is float and -INFINITY < <double>value < INFINITY


cdef bint is_non_negative(object value):
    return is_finite(value) and <double>value >= 0


cdef bint are_usable(const real* var, Py_ssize_t C, double eps) noexcept nogil:
    """Whether no channel would be divided by the root of zero, or of less; a NaN stays a NaN."""
    cdef int unusable = 0
    cdef Py_ssize_t c
    for c in range(C):   # no early end, so that it is done with vectors
        unusable |= <int>(var[c] + eps <= 0)
    return not unusable


cdef bint is_variance(object var, Py_ssize_t C, object eps):
    """One value per channel that can be normalised by with this eps."""
    if not (is_per_channel(var, C) and is_non_negative(eps)):
        return False
    if is_single(<ndarray>var):
        return are_usable(<const float*>PyArray_DATA(<ndarray>var), C, <double>eps)
    return are_usable(<const double*>PyArray_DATA(<ndarray>var), C, <double>eps)


cdef ndarray infer(x, axes, dtype, mean, var, weight, bias, eps, out, threads_for,
                   Py_ssize_t* N, Py_ssize_t* C, Py_ssize_t* S):  # OUT
    """The output, or None."""
    if not (view_of(x, axes, dtype, N, C, S)
            and is_per_channel(mean, C[0]) and is_variance(var, C[0], eps)
            and is_per_channel_or_none(weight, C[0]) and is_per_channel_or_none(bias, C[0])
            and is_plain_out(out, x)
            and are_all_apart(out, mean, var, weight, bias)):
        return None
    if out is None:
        out = new_like(x)
    normalise(x, N[0], C[0], S[0], mean, var, weight, bias, eps, out,
              threads_for(N[0] * C[0] * S[0]))
    return out


def express_inference(x, axes, dtype, mean, var, weight, bias, eps, out, threads_for):
    """Return the output and what makes a Forward (cbn/functional/_batch_norm.py), or None."""
    cdef Py_ssize_t N, C, S
    cdef ndarray y = infer(x, axes, dtype, mean, var, weight, bias, eps, out, threads_for,
                           &N, &C, &S)
    if y is None:
        return None
    # Without a weight no gradient depends on x, which is then not kept alive for nothing.
    return y, (None if y is x or weight is None else x, x.shape, <object>PyArray_DESCR(x),
               (N, C, S), given_statistics(mean, var), eps, True)


def express_training(x, axes, dtype, running_mean, running_var, num_batches_tracked, weight,
                     bias, momentum, eps, correction, nonfinite, out, threads_for):
    """Return the output and what makes a Forward (cbn/functional/_batch_norm.py), or None."""
    cdef Py_ssize_t N, C, S
    cdef ndarray statistics
    if type(nonfinite) is not str:
        return None
    cdef bint raises = nonfinite == "raise", skips = nonfinite == "skip"
    if not (raises or skips or nonfinite == "propagate"):
        return None
    if raises and out is not None:   # what is written to it could not be taken back
        return None
    if not (num_batches_tracked is None or is_counter(num_batches_tracked)):
        return None
    if not (view_of(x, axes, dtype, &N, &C, &S)
            and (is_finite(momentum) or (momentum is None and num_batches_tracked is not None))
            and is_non_negative(eps) and is_non_negative(correction)
            and is_running_or_none(running_mean, C) and is_running_or_none(running_var, C)
            and (running_mean is None) == (running_var is None)
            and (running_mean is None
                 or (<double>correction < N * S
                     and are_all_apart(x, running_mean, running_var, None, None)
                     and are_apart(<ndarray>running_mean, <ndarray>running_var)))
            and is_per_channel_or_none(weight, C) and is_per_channel_or_none(bias, C)
            and N * S > 1
            and is_plain_out(out, x)
            and are_all_apart(out, running_mean, running_var, weight, bias)):
        return None
    if out is None:
        out = new_like(x)
    statistics = new_statistics(C)
    normalise_batch(x, N, C, S, weight, bias, eps, statistics, out, threads_for(2 * N * C * S))
    if raises and not_finite(statistics, running_mean, running_var, N * S, correction):
        return None
    learn(running_mean, running_var, num_batches_tracked, statistics, momentum, N * S, correction,
          skips)
    return out, (None if out is x else x, x.shape, <object>PyArray_DESCR(x), (N, C, S), statistics,
                 eps, False)


def express_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps,
                       dict axes_of, channel_axis, correction, out, threads_for):
    """Return the output, or None."""
    cdef Py_ssize_t N, C, S
    cdef tuple done
    if not (type(channel_axis) is int and channel_axis in axes_of):
        return None
    axes = axes_of[channel_axis]
    if training is True:
        done = express_training(x, axes, None, running_mean, running_var, None, weight, bias,
                                momentum, eps, correction, "propagate", out, threads_for)
        return None if done is None else done[0]
    if training is False and is_finite(momentum) and is_non_negative(correction):
        return infer(x, axes, None, running_mean, running_var, weight, bias, eps, out,
                     threads_for, &N, &C, &S)
    return None


def express_forward(x, axes, mean, var, eps, training):
    """Return a Forward of cbn/functional/_batch_norm.py from what was kept elsewhere, or None."""
    cdef Py_ssize_t N, C, S
    if not (view_of(x, axes, None, &N, &C, &S)
            and is_per_channel(mean, C) and is_variance(var, C, eps) and type(training) is bool):
        return None
    return (x, x.shape, <object>PyArray_DESCR(x), (N, C, S), given_statistics(mean, var), eps,
            not training)


def express_backward(grad_output, tuple forward, weight, out, threads_for):
    """Return the gradients of input, weight and bias, or None."""
    cdef object x = forward[0], dtype = forward[2], statistics = forward[4], eps = forward[5]
    cdef tuple shape = forward[1], view = forward[3]
    cdef npy_intp C = view[1]
    cdef int type_num
    if not PyArray_CheckExact(x):
        return None
    type_num = PyArray_TYPE(<ndarray>x)
    # The caller may have changed the shape or the dtype of x since the forward pass.
    if not (is_plain(x, type_num) and <object>PyArray_DESCR(<ndarray>x) is dtype
            and x.shape == shape and PyArray_SIZE(<ndarray>x) > 0
            and is_plain(grad_output, type_num)
            and PyArray_SAMESHAPE(<ndarray>grad_output, <ndarray>x)
            and is_per_channel_or_none(weight, C) and is_plain_out(out, grad_output)
            and are_all_apart(out, x, statistics, weight, None)):
        return None
    if out is None:
        out = new_like(grad_output)
    grad_weight = PyArray_EMPTY(1, &C, type_num, 0)
    grad_bias = PyArray_EMPTY(1, &C, type_num, 0)
    gradients(grad_output, x, view[0], C, view[2], statistics, weight, eps, forward[6],
              out, grad_weight, grad_bias, threads_for(4 * PyArray_SIZE(<ndarray>x)))
    return out, grad_weight, grad_bias, False


def express_groups(x, dtype, tuple grouping, tuple parameter_shape, weight, bias, eps,
                   bint centred, out, threads_for):
    """Return the output and what makes a Forward (cbn/functional/_groups.py), or None."""
    # The grouping is that of the shape of x, which is not empty.
    cdef ndarray statistics
    cdef Py_ssize_t B = grouping[0], C = grouping[2]
    if not ((is_plain(x, NPY_FLOAT) or is_plain(x, NPY_DOUBLE))
            and (dtype is None or dtype is <object>PyArray_DESCR(x))
            and is_parameter_or_none(weight, parameter_shape)
            and is_parameter_or_none(bias, parameter_shape)
            and is_non_negative(eps) and is_plain_out(out, x)
            and are_all_apart(out, weight, bias, None, None)):
        return None
    if out is None:
        out = new_like(x)
    statistics = new_statistics(B * C)
    normalise_groups(x, grouping, weight, bias, eps, centred, statistics, out,
                     threads_for(2 * PyArray_SIZE(<ndarray>x)))
    return out, (None if out is x else x, x.shape, <object>PyArray_DESCR(x), grouping,
                 statistics, eps, centred, parameter_shape)


def express_group_gradients(grad_output, tuple forward, weight, out, threads_for):
    """Return the gradients of input, weight and bias, or None."""
    cdef object x = forward[0], dtype = forward[2], statistics = forward[4], eps = forward[5]
    cdef tuple shape = forward[1], grouping = forward[3], parameter_shape = forward[7]
    cdef npy_intp[MOST_AXES] parameter
    cdef npy_intp* lengths = parameter
    cdef int type_num, axes = len(parameter_shape), i
    if not (PyArray_CheckExact(x) and axes <= MOST_AXES):
        return None
    type_num = PyArray_TYPE(<ndarray>x)
    # The caller may have changed the shape or the dtype of x since the forward pass.
    if not (is_plain(x, type_num) and <object>PyArray_DESCR(<ndarray>x) is dtype
            and x.shape == shape and PyArray_SIZE(<ndarray>x) > 0
            and is_plain(grad_output, type_num)
            and PyArray_SAMESHAPE(<ndarray>grad_output, <ndarray>x)
            and is_parameter_or_none(weight, parameter_shape) and is_plain_out(out, grad_output)
            and are_all_apart(out, x, statistics, weight, None)):
        return None
    if out is None:
        out = new_like(grad_output)
    for i in range(axes):
        lengths[i] = parameter_shape[i]
    grad_weight = PyArray_EMPTY(axes, lengths, type_num, 0)
    grad_bias = PyArray_EMPTY(axes, lengths, type_num, 0)
    group_gradients(grad_output, x, grouping, statistics, weight, eps, forward[6], out,
                    grad_weight, grad_bias, threads_for(4 * PyArray_SIZE(<ndarray>x)))
    return out, grad_weight, grad_bias, False
