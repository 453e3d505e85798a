# The ordinary call, from the layer's attributes to the kernel in one step.
#
# A service that normalises a few thousand values pays more for Python's checks than for the
# arithmetic. What nearly every call brings (plain contiguous arrays of matching shapes) is
# recognised here in C. These functions refuse nothing: they return None for whatever is not
# ordinary, and cbn/_engine.py then looks at it closely, converts it or says what is wrong.

cdef enum:
    MOST_AXES = 64   # of an array of NumPy


cdef bint is_plain(object array, int type_num):
    """An ndarray, no subclass, that a kernel can read."""
    return (PyArray_CheckExact(array) and PyArray_TYPE(<ndarray>array) == type_num
            and PyArray_ISCARRAY_RO(<ndarray>array))


cdef bint is_parameter(object array, tuple shape):
    """A weight, a bias or a statistic of this shape."""
    cdef int i
    if not ((is_plain(array, NPY_FLOAT) or is_plain(array, NPY_DOUBLE))
            and PyArray_NDIM(<ndarray>array) == len(shape)):
        return False
    for i in range(len(shape)):
        if PyArray_DIM(<ndarray>array, i) != <npy_intp>shape[i]:
            return False
    return True


cdef bint is_parameter_or_none(object array, tuple shape):
    return array is None or is_parameter(array, shape)


cdef bint is_running_or_none(object array, tuple shape):
    return array is None or (is_parameter(array, shape) and PyArray_ISWRITEABLE(<ndarray>array))


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


cdef ndarray new_parameter(tuple shape, int type_num):
    cdef npy_intp[MOST_AXES] lengths
    cdef int i
    for i in range(len(shape)):
        lengths[i] = shape[i]
    return PyArray_EMPTY(len(shape), lengths, type_num, 0)


cdef View view_of(object x, tuple shape, object dtype, dict views):
    """The view of a plain, non-empty array of an accepted element type, if it has been seen."""
    if ((is_plain(x, NPY_FLOAT) or is_plain(x, NPY_DOUBLE)) and PyArray_SIZE(<ndarray>x) > 0
            and (dtype is None or dtype is <object>PyArray_DESCR(<ndarray>x))):
        return views.get(shape)
    return None


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


cdef bint is_variance(object var, tuple shape, object eps):
    """One value per channel that can be normalised by with this eps."""
    cdef PerChannel values
    if not (is_parameter(var, shape) and is_non_negative(eps)):
        return False
    values = per_channel(<ndarray>var, 1)
    return micros.are_usable(&values, PyArray_DIM(<ndarray>var, 0), <double>eps)


def express_forward(x, dict views, dtype, weight, bias, eps, bint centred, Py_ssize_t least, out,
                    running_mean, running_var, num_batches_tracked, momentum, correction,
                    nonfinite, threads_for):
    """Normalise by the statistics of x: return the output and a Saved, or None."""
    cdef tuple shape, parameter_shape
    cdef ndarray statistics, learnt
    cdef View view
    cdef Py_ssize_t count
    if not PyArray_CheckExact(x) or type(nonfinite) is not str:
        return None
    cdef bint raises = nonfinite == "raise", skips = nonfinite == "skip"
    if not (raises or skips or nonfinite == "propagate"):
        return None
    if raises and out is not None:   # what is written to it could not be taken back
        return None
    if not (num_batches_tracked is None or is_counter(num_batches_tracked)):
        return None
    shape = x.shape
    view = view_of(x, shape, dtype, views)
    if view is None:
        return None
    count = view.values
    parameter_shape = view.parameter_shape
    if not (count >= least
            and (is_finite(momentum) or (momentum is None and num_batches_tracked is not None))
            and is_non_negative(eps) and is_non_negative(correction)
            and is_running_or_none(running_mean, parameter_shape)
            and is_running_or_none(running_var, parameter_shape)
            and (running_mean is None) == (running_var is None)
            and (running_mean is None
                 or (<double>correction < count
                     and are_all_apart(x, running_mean, running_var, None, None)
                     and are_apart(<ndarray>running_mean, <ndarray>running_var)))
            and is_parameter_or_none(weight, parameter_shape)
            and is_parameter_or_none(bias, parameter_shape)
            and is_plain_out(out, x)
            and are_all_apart(out, running_mean, running_var, weight, bias)):
        return None
    if out is None:
        out = new_like(x)
    statistics = learnt = new_statistics(view.B * view.C)
    normalise(x, view, weight, bias, eps, centred, statistics, out, threads_for)
    if running_mean is not None or num_batches_tracked is not None or raises:
        if view.B * view.C != <Py_ssize_t>parameter_shape[0]:
            learnt = averages(statistics, parameter_shape[0])
        if raises and not_finite(learnt, running_mean, running_var, count, correction):
            return None
        learn(running_mean, running_var, num_batches_tracked, learnt, momentum, count, correction,
              skips)
    return out, new_saved(None if out is x else x, shape, <object>PyArray_DESCR(<ndarray>x), view,
                          statistics, eps, centred, False)


cdef ndarray infer(x, View view, mean, var, weight, bias, eps, out, threads_for):
    """The output, or None."""
    cdef tuple parameter_shape
    if view is None:
        return None
    parameter_shape = view.parameter_shape
    if not (is_parameter(mean, parameter_shape) and is_variance(var, parameter_shape, eps)
            and is_parameter_or_none(weight, parameter_shape)
            and is_parameter_or_none(bias, parameter_shape)
            and is_plain_out(out, x)
            and are_all_apart(out, mean, var, weight, bias)):
        return None
    if out is None:
        out = new_like(x)
    normalise_given(x, view, mean, var, weight, bias, eps, out, threads_for)
    return out


def express_inference(x, dict views, dtype, mean, var, weight, bias, eps, out, threads_for):
    """Normalise x by given statistics: return the output and a Saved, or None."""
    cdef tuple shape
    cdef ndarray y
    if not PyArray_CheckExact(x):
        return None
    shape = x.shape
    view = view_of(x, shape, dtype, views)
    y = infer(x, view, mean, var, weight, bias, eps, out, threads_for)
    if y is None:
        return None
    # Without a weight no gradient depends on x, which is then not kept alive for nothing.
    return y, new_saved(None if y is x or weight is None else x, shape,
                        <object>PyArray_DESCR(<ndarray>x), view, given_statistics(mean, var), eps,
                        True, True)


def express_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps,
                       dict views_of, channel_axis, correction, out, threads_for):
    """Return the output of the function batch_norm, which keeps nothing, or None."""
    cdef tuple done
    if not (type(channel_axis) is int and channel_axis in views_of and PyArray_CheckExact(x)):
        return None
    views = views_of[channel_axis]
    if training is True:
        done = express_forward(x, views, None, weight, bias, eps, True, 2, out, running_mean,
                               running_var, None, momentum, correction, "propagate", threads_for)
        return None if done is None else done[0]
    if training is False and is_finite(momentum) and is_non_negative(correction):
        return infer(x, view_of(x, x.shape, None, views), running_mean, running_var, weight, bias,
                     eps, out, threads_for)
    return None


def express_saved(x, dict views, mean, var, eps, training):
    """Return a Saved of statistics that were kept elsewhere, or None."""
    cdef tuple shape
    if not PyArray_CheckExact(x):
        return None
    shape = x.shape
    view = view_of(x, shape, None, views)
    if not (view is not None and is_parameter(mean, view.parameter_shape)
            and is_variance(var, view.parameter_shape, eps) and type(training) is bool):
        return None
    return new_saved(x, shape, <object>PyArray_DESCR(<ndarray>x), view,
                     given_statistics(mean, var), eps, True, not training)


def express_backward(grad_output, Saved saved, weight, out, threads_for):
    """Return the gradients of input, weight and bias, or None."""
    cdef object x = saved.x
    cdef tuple parameter_shape = saved.view.parameter_shape
    cdef int type_num
    if not PyArray_CheckExact(x):
        return None
    type_num = PyArray_TYPE(<ndarray>x)
    # The caller may have changed the shape or the dtype of x since the forward pass.
    if not (is_plain(x, type_num) and <object>PyArray_DESCR(<ndarray>x) is saved.dtype
            and x.shape == saved.shape and PyArray_SIZE(<ndarray>x) > 0
            and is_plain(grad_output, type_num)
            and PyArray_SAMESHAPE(<ndarray>grad_output, <ndarray>x)
            and is_parameter_or_none(weight, parameter_shape) and is_plain_out(out, grad_output)
            and are_all_apart(out, x, saved.statistics, weight, None)):
        return None
    if out is None:
        out = new_like(grad_output)
    grad_weight = new_parameter(parameter_shape, type_num)
    grad_bias = new_parameter(parameter_shape, type_num)
    gradients(grad_output, saved, weight, out, grad_weight, grad_bias, threads_for)
    return out, grad_weight, grad_bias
