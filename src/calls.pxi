# The calls: hold every argument against its rule, allocate, run a pass.
#
# A service that normalises a few thousand values pays more for each of Python's steps than for its
# data, so all of a call is done here. A function returns what was asked for, or the name of the
# first rule that is broken, and of the argument where there are several: "parameter:weight".
# cbn/_mends.py then converts the argument, refuses it in words, or finds out what takes longer to
# know, and the call is made again:
#
#   data     the input as a kernel can read it, where the caller's array is of another layout; its
#            transpose, where the view is turned: then so is every other array of its shape
#   over_x   whether out is the very memory of x, where their ends alone do not tell; over_grad:
#            that of grad_output
#   spread   True: an out of another layout has no two elements in one place

cdef object seen(data, Norm norm, dtype):
    """The view of an input, or what is amiss."""
    return view_of(norm, data) if is_input(data, dtype) else "data:x"


cdef inline str amiss_in_parameters(weight, bias, tuple shape):
    if not (weight is None or is_parameter(weight, shape)):
        return "parameter:weight"
    if not (bias is None or is_parameter(bias, shape)):
        return "parameter:bias"
    return None


cdef str amiss_in_running_statistic(str name, array, tuple shape):
    if not is_float_of_shape(array, shape):
        return "running_statistic:" + name
    if not PyArray_ISWRITEABLE(<ndarray>array):
        return "read_only:" + name
    if not is_plain(array) and PyArray_SIZE(<ndarray>array) > 0:
        return "layout:" + name
    return None


cdef str amiss_in_running_statistics(running_mean, running_var, tuple shape, x):
    cdef str amiss
    if running_mean is None and running_var is None:
        return None
    if running_mean is None or running_var is None:
        return "both_or_none"
    amiss = amiss_in_running_statistic("running_mean", running_mean, shape)
    if amiss is None:
        amiss = amiss_in_running_statistic("running_var", running_var, shape)
    if amiss is not None:
        return amiss
    cdef Ends of_mean = ends_of(running_mean), of_var = ends_of(running_var), of_x = ends_of(x)
    if not are_apart(of_mean, of_var):
        return "apart:running_mean and running_var"
    if not are_apart(of_mean, of_x):
        return "apart:running_mean and x"
    if not are_apart(of_var, of_x):
        return "apart:running_var and x"
    return None


cdef str amiss_in_out(out, ndarray like, bint spread, running_mean, running_var, weight, bias):
    """An output of the kind of an input, apart from parameters and statistics."""
    if not PyArray_CheckExact(out):
        return "out"
    if not PyArray_SAMESHAPE(<ndarray>out, like):
        return "out_shape"
    if not (PyArray_TYPE(<ndarray>out) == PyArray_TYPE(like)
            and PyArray_ISNOTSWAPPED(<ndarray>out)):
        return "out_dtype"
    if not PyArray_ISWRITEABLE(<ndarray>out):
        return "out_read_only"
    if not (spread or PyArray_IS_C_CONTIGUOUS(<ndarray>out)):
        return "out_layout"
    cdef Ends of_out = ends_of(out)
    if not (running_mean is None or are_apart(of_out, ends_of(running_mean))):
        return "out_apart:running_mean"
    if not (running_var is None or are_apart(of_out, ends_of(running_var))):
        return "out_apart:running_var"
    if not (weight is None or are_apart(of_out, ends_of(weight))):
        return "out_apart:weight"
    if not (bias is None or are_apart(of_out, ends_of(bias))):
        return "out_apart:bias"
    return None


cdef str amiss_in_steps(activation, residual, data, out, over_residual):
    if not is_activation(activation):
        return "activation"
    if residual is None:
        return None
    if not is_data(residual, <object>PyArray_DESCR(<ndarray>data)):
        return "residual"
    if not PyArray_SAMESHAPE(<ndarray>residual, <ndarray>data):
        return "residual_shape"
    if not (out is None or is_known(out, residual, over_residual)):
        return "over_residual"
    return None


cdef inline bint is_known(out, like, over):
    """Whether it is known if an output is the very memory of an input."""
    return over is not None or out is like or are_apart(ends_of(out), ends_of(like))


cdef inline bint is_over(out, like, over):
    """Whether it is."""
    return out is not None and (out is like if over is None else over)


cdef ndarray new_like(ndarray x):
    return PyArray_EMPTY(PyArray_NDIM(x), PyArray_DIMS(x), PyArray_TYPE(x), 0)


cdef ndarray new_beside(ndarray x, ndarray other, Kind kind):
    """An array like x that a pass writes along with another: where they are streamed it begins at
    the same place of a cache line, if need be in a longer one, which is its base."""
    cdef ndarray made = new_like(x)
    cdef size_t apart = (<size_t>data_of(other) - <size_t>data_of(made)) % LINE
    cdef npy_intp[1] size
    if apart == 0 or not is_streamed(PyArray_NBYTES(x), kind):
        return made
    size[0] = PyArray_NBYTES(x) + LINE
    made = PyArray_EMPTY(1, size, NPY_UINT8, 0)
    apart = (<size_t>data_of(other) - <size_t>data_of(made)) % LINE
    return ndarray((<object>x).shape, (<object>x).dtype, made, apart)


cdef ndarray new_parameter(tuple shape, int type_num):
    cdef npy_intp[MOST_AXES] lengths
    cdef int i
    for i in range(len(shape)):
        lengths[i] = shape[i]
    return PyArray_EMPTY(len(shape), lengths, type_num, 0)


cdef inline ndarray written(out, ndarray x):
    """What a kernel writes: out where it can."""
    return <ndarray>out if is_plain(out) else new_like(x)


cdef inline ndarray returned(out, ndarray buffer):
    """What the caller gets: out where it is given."""
    if out is None or out is buffer:
        return buffer
    PyArray_CopyInto(<ndarray>out, buffer)
    return <ndarray>out


cpdef object forward(
        x, Norm norm, dtype, weight, bias, eps, out,
        Py_ssize_t least,   # values that each mean should be of; with 1, an unbiased one is none
        running_mean, running_var, num_batches_tracked, momentum, correction, nonfinite,
        bint keeps,         # whether there may be a backward pass
        activation, residual,   # steps after the norm, or None
        data=None, over_x=None, bint spread=False, over_residual=None):
    """Normalise by the statistics of x: return the output and a Saved, or None if none is kept.

    Where statistics that are not finite are refused, their channels are returned, in a list.
    """
    cdef str amiss
    cdef tuple parameter_shape
    cdef View view
    cdef Py_ssize_t count
    cdef ndarray statistics = None, learnt = None, buffer
    cdef bint empty, learns, raises, looks_first
    cdef Steps steps
    if num_batches_tracked is not None:
        if not is_count(num_batches_tracked):
            return "count"
        if not PyArray_ISWRITEABLE(<ndarray>num_batches_tracked):
            return "read_only:num_batches_tracked"
    if data is None:
        data = x
    found = seen(data, norm, dtype)
    if type(found) is str:
        return found
    view = found
    count = view.values
    parameter_shape = view.parameter_shape
    amiss = amiss_in_running_statistics(running_mean, running_var, parameter_shape, x)
    if amiss is None:
        amiss = amiss_in_parameters(weight, bias, parameter_shape)
    if amiss is not None:
        return amiss
    if not (is_finite(momentum) or (momentum is None and num_batches_tracked is not None)):
        return "momentum"
    if not is_non_negative(eps):
        return "non_negative:eps"
    if not is_non_negative(correction):
        return "non_negative:correction"
    if not is_nonfinite(nonfinite):
        return "nonfinite"
    if least > 1 and not are_enough(count, 0.0 if running_mean is None else correction):
        return "enough_values"
    if out is not None:
        amiss = amiss_in_out(out, data, spread, running_mean, running_var, weight, bias)
        if amiss is not None:
            return amiss
        if not is_known(out, x, over_x):
            return "over_x"
    amiss = amiss_in_steps(activation, residual, data, out, over_residual)
    if amiss is not None:
        return amiss
    if 0 < count < least:
        return "few_values"

    buffer = written(out, data)
    steps = steps_of(activation, residual, data, keeps)
    empty = PyArray_SIZE(<ndarray>data) == 0
    raises = nonfinite == "raise"
    learns = running_mean is not None or num_batches_tracked is not None
    if learns or raises or empty or (keeps and not view.keeps_none):
        statistics = learnt = new_statistics(view.B * view.C)
    looks_first = raises and out is not None   # what is written to it could not be taken back
    if empty:
        statistics[...] = 0
    elif looks_first:
        statistics_of(data, view, eps, norm.centred, statistics)
    else:
        normalise(data, view, weight, bias, eps, norm.centred, statistics, buffer, steps)
    if not empty and (learns or raises):
        if view.of_samples:
            learnt = averages(statistics, parameter_shape[0])
        if raises:
            lost = not_finite(learnt, running_mean, running_var, count, correction)
            if lost:
                return lost
        if looks_first:
            normalise_by(data, view, statistics, weight, bias, eps, buffer, steps)
        learn(running_mean, running_var, num_batches_tracked, learnt, momentum, count, correction,
              nonfinite == "skip")
    if not keeps:
        return returned(out, buffer), None
    return returned(out, buffer), new_saved(
        None if is_over(out, x, over_x) else data, <object>PyArray_DESCR(<ndarray>data), view,
        statistics, eps, norm.centred, False, steps)


cdef str amiss_in_inference(x, data, View view, running_mean, running_var, weight, bias, eps, out,
                            activation, residual, over_x, bint spread, over_residual):
    cdef str amiss
    cdef tuple parameter_shape = view.parameter_shape
    if not is_parameter(running_mean, parameter_shape):
        return "statistic:running_mean"
    if not is_parameter(running_var, parameter_shape):
        return "statistic:running_var"
    amiss = amiss_in_parameters(weight, bias, parameter_shape)
    if amiss is not None:
        return amiss
    if not is_non_negative(eps):
        return "non_negative:eps"
    if not are_usable(<ndarray>running_var, eps):
        return "usable:running_var"
    if out is not None:
        amiss = amiss_in_out(out, data, spread, running_mean, running_var, weight, bias)
        if amiss is not None:
            return amiss
        if not is_known(out, x, over_x):
            return "over_x"
    return amiss_in_steps(activation, residual, data, out, over_residual)


cdef object infer(data, View view, running_mean, running_var, weight, bias, eps, out, Steps steps):
    cdef ndarray buffer = written(out, data)
    if PyArray_SIZE(<ndarray>data) > 0:
        normalise_given(data, view, running_mean, running_var, weight, bias, eps, buffer, steps)
    return returned(out, buffer)


def forward_given(x, Norm norm, dtype, running_mean, running_var, weight, bias, eps, out,
                  bint keeps, activation, residual, data=None, over_x=None,
                  bint spread=False, over_residual=None):
    """Normalise x by given statistics: return the output and a Saved, or None if none is kept."""
    cdef str amiss
    cdef View view
    cdef Steps steps
    if data is None:
        data = x
    found = seen(data, norm, dtype)
    if type(found) is str:
        return found
    view = found
    amiss = amiss_in_inference(x, data, view, running_mean, running_var, weight, bias, eps, out,
                               activation, residual, over_x, spread, over_residual)
    if amiss is not None:
        return amiss
    steps = steps_of(activation, residual, data, keeps)
    y = infer(data, view, running_mean, running_var, weight, bias, eps, out, steps)
    if not keeps:
        return y, None
    return y, new_saved(
        None if is_over(out, x, over_x) else data, <object>PyArray_DESCR(<ndarray>data), view,
        given_statistics(running_mean, running_var), eps, True, True, steps)


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, dict norms,
               channel_axis, correction, out, activation, residual):
    """Return the output of the function of this name, or None where any argument is amiss."""
    cdef object done
    cdef Norm norm
    cdef View view
    if not (type(channel_axis) is int and channel_axis in norms):
        return None
    norm = norms[channel_axis]
    if training is True:
        done = forward(x, norm, None, weight, bias, eps, out, 2, running_mean, running_var, None,
                       momentum, correction, "propagate", False, activation, residual)
        return (<tuple>done)[0] if type(done) is tuple else None
    if not (training is False and is_finite(momentum) and is_non_negative(correction)
            and is_input(x, None)):
        return None
    view = view_of(norm, x)
    if amiss_in_inference(x, x, view, running_mean, running_var, weight, bias, eps, out,
                          activation, residual, None, False, None) is not None:
        return None
    return infer(x, view, running_mean, running_var, weight, bias, eps, out,
                 steps_of(activation, residual, x, False))


def saved_statistics(x, Norm norm, eps, data=None):
    """Return the Saved that a forward pass would have kept."""
    cdef str amiss
    cdef View view
    cdef ndarray statistics = None   # where backward computes them
    if data is None:
        data = x
    found = seen(data, norm, None)
    if type(found) is str:
        return found
    view = found
    if not is_non_negative(eps):
        return "non_negative:eps"
    if not view.recomputes:
        statistics = new_statistics(view.B * view.C)
        if PyArray_SIZE(<ndarray>data) > 0:
            statistics_of(data, view, eps, norm.centred, statistics)
        else:
            statistics[...] = 0
    return new_saved(data, <object>PyArray_DESCR(<ndarray>data), view, statistics, eps,
                     norm.centred, False, None)


def saved_given(x, Norm norm, mean, var, training, eps, data=None):
    """Return the Saved of statistics that the caller has kept."""
    cdef str amiss
    cdef tuple parameter_shape
    cdef View view
    if data is None:
        data = x
    found = seen(data, norm, None)
    if type(found) is str:
        return found
    view = found
    parameter_shape = view.parameter_shape
    if not is_parameter(mean, parameter_shape):
        return "parameter:mean"
    if not is_parameter(var, parameter_shape):
        return "parameter:var"
    if type(training) is not bool:
        return "flag:training"
    if not is_non_negative(eps):
        return "non_negative:eps"
    if not are_usable(<ndarray>var, eps):
        return "usable:var"
    return new_saved(data, <object>PyArray_DESCR(<ndarray>data), view,
                     given_statistics(mean, var), eps, True, not training, None)


def backward(grad_output, Saved saved, weight, out, wanted,
             given_x,   # the input of the forward pass as the caller has it, or None
             data=None, over_x=None, over_grad=None, bint spread=False):
    """Return the gradients of input, weight, bias and residual, None for what is not wanted."""
    cdef str amiss
    cdef object x = saved.x
    cdef View view = saved.view
    cdef ndarray buffer = None, grad_weight = None, grad_bias = None, grad_residual = None
    cdef bint of_input, of_parameters
    cdef int type_num
    if data is None:
        if view.turned:
            return "data:grad_output"
        data = grad_output
    if not is_data(data, saved.dtype):
        return "data:grad_output"
    if not has_shape(<ndarray>data, saved.shape):
        return "grad_shape"
    if not (weight is None or is_parameter(weight, view.parameter_shape)):
        return "parameter:weight"
    if x is None:
        if not (saved.frozen and wanted == "input"):
            return "input_gone"
    # The caller may have changed the shape or the dtype of x since the forward pass.
    elif not (is_data(x, saved.dtype) and has_shape(<ndarray>x, saved.shape)):
        return "input_changed"
    elif given_x is None:
        given_x = x
    if not is_wanted(wanted):
        return "wanted"
    of_input, of_parameters = wanted != "parameters", wanted != "input"
    if not of_input and out is not None:
        return "unwanted_out"
    if out is not None:
        amiss = amiss_in_out(out, data, spread, None, None, weight, None)
        if amiss is not None:
            return amiss
        if not is_known(out, grad_output, over_grad):
            return "over_grad"
        if not (x is None or is_known(out, given_x, over_x)):
            return "over_x"

    if of_input:
        buffer = written(out, data)
        if saved.has_residual:
            grad_residual = new_beside(data, buffer,
                                       FROZEN_GRADIENTS if saved.frozen else GRADIENTS)
    if of_parameters:
        type_num = NPY_DOUBLE if PyArray_TYPE(<ndarray>data) == NPY_DOUBLE else NPY_FLOAT
        grad_weight = new_parameter(view.parameter_shape, type_num)
        grad_bias = new_parameter(view.parameter_shape, type_num)
    if of_parameters and PyArray_SIZE(<ndarray>data) == 0:
        grad_weight[...] = 0
        grad_bias[...] = 0
    if PyArray_SIZE(<ndarray>data) > 0:
        if of_parameters or not saved.frozen:
            gradients(data, saved, weight, buffer, grad_weight, grad_bias, grad_residual)
        else:
            gradients_of_scaling(data, saved, weight, buffer, grad_residual)
    if x is not None and is_over(out, given_x, over_x):
        saved.x = None
    return returned(out, buffer), grad_weight, grad_bias, grad_residual
