# The kernels, one text for every instruction set: a _kernels_*.pyx names a set and includes this.
#
# The functions at the end are what cbn/functional.py calls. They check nothing: arrays are
# C-contiguous, aligned, in native byte order and of the right sizes; x, grad_output, out,
# grad_weight and grad_bias share one element type, float32 or float64; weight, bias, mean and var
# may each be float32, float64 or None; batch statistics are float64.

from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from numpy cimport NPY_FLOAT, PyArray_DATA, PyArray_TYPE, import_array, ndarray

cdef extern from "threads.h":
    int omp_get_max_threads() nogil
    const char* openmp_library()
    int openmp_version()

cdef extern from "stream.h":
    void stream_lines(void* to, const void* from_, size_t bytes) nogil
    void stream_fence() nogil

ctypedef fused real:    # the element type of the data
    float
    double

ctypedef fused sum_t:   # the type that a block of it is summed in
    float
    double

include "geometry.pxi"
include "per_channel.pxi"
include "moments.pxi"
include "gradients.pxi"
include "apply.pxi"
include "passes.pxi"

import_array()

cdef enum:
    STREAM_BYTES = 1 << 25   # outputs from this size are written past the cache


def max_threads():
    """The threads OpenMP would use by itself; 1 in a build without OpenMP."""
    return omp_get_max_threads()


def openmp():
    """The OpenMP runtime: its file, and the value of _OPENMP. None in a build without OpenMP."""
    if openmp_version() == 0:
        return None
    return openmp_library().decode("utf-8", "replace"), openmp_version()


cdef inline void* data_of(ndarray array):
    return PyArray_DATA(array) if array is not None else NULL


cdef Pass new_pass(Kind kind, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, ndarray weight,
                   ndarray bias, ndarray mean, ndarray mean_low, ndarray var, double eps):
    cdef Pass p
    p.kind = kind
    p.geometry = cut(N, C, S)
    p.weight = per_channel(weight, 1)
    p.bias = per_channel(bias, 0)
    p.mean = per_channel(mean, 0)
    p.mean_low = per_channel(mean_low, 0)
    p.var = per_channel(var, 1)
    p.eps = eps
    p.batch_mean = p.batch_mean_low = p.batch_var = NULL
    p.grad_weight = p.grad_bias = NULL
    return p


cdef run_pass(Pass* p, ndarray x, ndarray grad_output, ndarray out, int num_threads):
    cdef void* x_data = data_of(x)
    cdef void* grad_data = data_of(grad_output)
    cdef void* out_data = data_of(out)
    cdef bint single = PyArray_TYPE(x) == NPY_FLOAT
    cdef size_t channels = p.geometry.C
    cdef size_t size = p.geometry.N * p.geometry.S * p.geometry.C * (4 if single else 8)
    # An output that is also an input is in the cache already, line by line.
    p.stream = size >= STREAM_BYTES and out_data != x_data and out_data != grad_data
    p.partial = malloc(channels * p.geometry.pieces * sizeof(Moments))
    p.coefficients = malloc(channels * COEFFICIENTS * sizeof(double))
    try:
        if p.partial == NULL or p.coefficients == NULL:
            raise MemoryError
        with nogil:
            if single:
                run(<const float*>x_data, <const float*>grad_data, <float*>out_data, p,
                    num_threads)
            else:
                run(<const double*>x_data, <const double*>grad_data, <double*>out_data, p,
                    num_threads)
    finally:
        free(p.partial)
        free(p.coefficients)


def batch_statistics(ndarray x, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S,
                     ndarray mean, ndarray mean_low, ndarray var,   # OUT
                     int num_threads):
    cdef Pass p = new_pass(STATISTICS, N, C, S, None, None, None, None, None, 0)
    p.batch_mean = <double*>data_of(mean)
    p.batch_mean_low = <double*>data_of(mean_low)
    p.batch_var = <double*>data_of(var)
    run_pass(&p, x, None, None, num_threads)


def normalise_batch(ndarray x, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, ndarray weight,
                    ndarray bias, double eps,
                    ndarray mean, ndarray mean_low, ndarray var, ndarray out,   # OUT
                    int num_threads):
    cdef Pass p = new_pass(BATCH, N, C, S, weight, bias, None, None, None, eps)
    p.batch_mean = <double*>data_of(mean)
    p.batch_mean_low = <double*>data_of(mean_low)
    p.batch_var = <double*>data_of(var)
    run_pass(&p, x, None, out, num_threads)


def normalise(ndarray x, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, ndarray mean, ndarray var,
              ndarray weight, ndarray bias, double eps,
              ndarray out,   # OUT
              int num_threads):
    cdef Pass p = new_pass(GIVEN, N, C, S, weight, bias, mean, None, var, eps)
    run_pass(&p, x, None, out, num_threads)


def gradients(ndarray grad_output, ndarray x, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S,
              ndarray mean, ndarray mean_low, ndarray var, ndarray weight, double eps, bint frozen,
              ndarray grad_input, ndarray grad_weight, ndarray grad_bias,   # OUT
              int num_threads):
    cdef Pass p = new_pass(FROZEN_GRADIENTS if frozen else GRADIENTS, N, C, S, weight, None,
                           mean, mean_low, var, eps)
    p.grad_weight = data_of(grad_weight)
    p.grad_bias = data_of(grad_bias)
    run_pass(&p, x, grad_output, grad_input, num_threads)


cdef void blend(real* running, const double* batch, Py_ssize_t C, double momentum,
                double factor) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(C):
        running[c] = <real>((1 - momentum) * running[c] + momentum * (batch[c] * factor))


def update_running(ndarray running,   # IN, OUT
                   ndarray batch, double momentum, double factor):
    """running = (1 - momentum) * running + momentum * (factor * batch)."""
    cdef const double* data = <const double*>data_of(batch)
    if PyArray_TYPE(running) == NPY_FLOAT:
        blend(<float*>data_of(running), data, batch.shape[0], momentum, factor)
    else:
        blend(<double*>data_of(running), data, batch.shape[0], momentum, factor)
