"""The passes over arrays, compiled once; loops over lanes are those of a module cbn._micro_*."""

# cbn/_engine.py makes the calls (calls.pxi), which hold their arguments against the rules
# (rules.pxi). The passes below check nothing: arrays are C-contiguous, aligned, in native byte
# order and of the right sizes; x, grad_output and out share one element type, a Storage, and
# grad_weight and grad_bias are of that which it is computed in, float32 or float64; weight, bias,
# mean and var may each be float32, float64 or None; statistics are the mean, what float64 rounds
# off it, and the variance of every channel: float64 of shape (3, channels).

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY
from libc.stdio cimport FILE, fclose, fopen, fscanf
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.time cimport (
    CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime, clockid_t, timespec,
)
from numpy cimport (
    NPY_DOUBLE, NPY_FLOAT, NPY_INT64, NPY_NOTYPE, NPY_UINT8, NPY_UINT64, PyArray_CheckExact,
    PyArray_CopyInto,
    PyArray_DATA, PyArray_DESCR, PyArray_DescrFromType, PyArray_DIM, PyArray_DIMS, PyArray_EMPTY,
    PyArray_IS_C_CONTIGUOUS, PyArray_ISCARRAY_RO, PyArray_ISINTEGER, PyArray_ISNOTSWAPPED,
    PyArray_ISWRITEABLE, PyArray_ITEMSIZE, PyArray_NBYTES, PyArray_NDIM, PyArray_SAMESHAPE,
    PyArray_SIZE, PyArray_STRIDE, PyArray_TYPE, dtype, import_array, ndarray, npy_int64, npy_intp,
)

cdef extern from "numpy/arrayobject.h":   # which Cython's numpy leaves out
    enum:
        NPY_HALF
        NPY_USERDEF

cdef extern from "cpu.h":
    int x86_64_level_of_cpu "x86_64_level"()

cdef extern from "threads.h":
    int omp_get_max_threads() nogil
    int omp_get_thread_limit() nogil
    int usable_cpus() nogil
    int online_cpus()
    void wait_for_team() nogil
    void fence_streams() nogil
    Py_ssize_t fetch_and_add(Py_ssize_t* value, Py_ssize_t more) nogil
    const char* openmp_library()
    int openmp_version()

cdef extern from "floating_point.h" nogil:
    ctypedef unsigned long long floating_point_modes
    floating_point_modes current_modes()
    floating_point_modes change_modes(floating_point_modes modes)

cdef extern from "teams.h":
    int begin_call(int num_threads, Py_ssize_t values)
    int has_new_team()
    void end_call()
    int is_new_child()
    int children_have_teams()
    int watch_forks_and_threads()

ctypedef fused real:    # the element type of statistics
    float
    double

import_array()

include "geometry.pxi"
include "interface.pxi"
include "rules.pxi"
include "contention.pxi"
include "moments.pxi"
include "gradients.pxi"
include "schedule.pxi"
include "memory.pxi"
include "passes.pxi"

if watch_forks_and_threads() != 0:   # a child would hang
    raise MemoryError("pthread_atfork: expected memory to watch forks, got none")


def x86_64_level():
    """The x86-64 level of this processor under this operating system: 1, 3 or 4; 0 elsewhere."""
    return x86_64_level_of_cpu()


def walk(Py_ssize_t N, Py_ssize_t C, Py_ssize_t S):
    """How a pass that reduces an array walks it, for tests that mean one way of it."""
    cdef View view = View(1, N, C, S, 1, C, False, (C,))
    cdef Geometry g = view.reducing
    way = "by row" if not g.by_plane else "by plane" if g.lanes == LANES else "few values"
    return way, g.strips, g.pieces


def max_threads():
    """The threads OpenMP would use by itself; 1 in a build without OpenMP."""
    return omp_get_max_threads()


def thread_limit():
    """The threads that OpenMP has at most; 1 in a build without it."""
    return omp_get_thread_limit()


def num_procs():
    """The CPUs that OpenMP may put the threads of this process on; 0 in a build without it."""
    return usable_cpus()


def forks():
    """Whether a forked child can have teams; it depends on the OpenMP runtime."""
    return bool(children_have_teams())


def openmp():
    """The OpenMP runtime: its file, and the value of _OPENMP. None in a build without OpenMP."""
    if openmp_version() == 0:
        return None
    return openmp_library().decode("utf-8", "replace"), openmp_version()


cdef void set_up(Pass* p, Kind kind, View view, ndarray weight, ndarray bias, ndarray mean,
                 ndarray var, double eps) noexcept:
    p.kind = kind
    p.geometry = (view.writing if kind == GIVEN else view.gathering if kind == GRADIENTS
                  else view.reducing)
    # By row, sums are of strips; with the coefficients at hand memory likes whole rows better.
    p.writing = p.geometry if p.geometry.by_plane or view.parts > 1 else view.writing
    p.centred = True
    p.weight = per_channel(weight, 1)
    p.bias = per_channel(bias, 0)
    p.mean = per_channel(mean, 0)
    p.mean_low = per_channel(None, 0)
    p.var = per_channel(var, 1)
    p.eps = eps
    p.statistics = NULL
    p.grad_weight = p.grad_bias = NULL
    memset(&p.fused, 0, sizeof(Fused))
    p.origin = p.ahead = p.first_sharer = 0


cdef void use_statistics(Pass* p, ndarray statistics) noexcept:
    if statistics is None:   # a pass finds them itself, and keeps none
        return
    p.mean.double_ = <const double*>data_of(statistics)
    p.mean_low.double_ = p.mean.double_ + p.geometry.channels
    p.var.double_ = p.mean.double_ + 2 * p.geometry.channels


cdef ndarray new_statistics(npy_intp C):
    cdef npy_intp[2] shape
    shape[0], shape[1] = 3, C
    return PyArray_EMPTY(2, shape, NPY_DOUBLE, 0)


cpdef ndarray given_statistics(ndarray mean, ndarray var):
    """A copy, for a backward pass: what it is taken from may change in between."""
    cdef Py_ssize_t C = PyArray_DIM(mean, 0)
    cdef PerChannel means = per_channel(mean, 0), vars = per_channel(var, 0)
    cdef ndarray statistics = new_statistics(C)
    cdef double* data = <double*>data_of(statistics)
    micros.take_values(&means, 0, C, data)
    memset(data + C, 0, C * sizeof(double))
    micros.take_values(&vars, 0, C, data + 2 * C)
    return statistics


cdef class Steps:
    """The steps that go along with an output."""

    cdef bint relu
    cdef ndarray residual
    cdef ndarray passed   # OUT, or None, where nobody keeps it


cdef Steps steps_of(activation, residual, ndarray x, bint keeps):
    """None where there are none."""
    cdef npy_intp[1] size
    cdef Steps steps
    if activation is None and residual is None:
        return None
    steps = Steps.__new__(Steps)
    steps.relu, steps.residual = activation == "relu", residual
    if steps.relu and keeps:
        # The last vector of a row is read in four bytes, also where none of its values is there.
        size[0] = PyArray_SIZE(x) // 64 + 3
        steps.passed = PyArray_EMPTY(1, size, NPY_UINT64, 0)
    return steps


cdef class Saved:
    """What a backward pass needs of its forward pass."""

    cdef public object x             # None: overwritten, or not needed
    cdef readonly tuple shape        # of x, and its dtype: both may have been changed since
    cdef readonly object dtype
    cdef readonly View view
    # float64 (3, B * C): mean, what float64 rounds off it, var. None: found again from x, the same
    # bits; not where they are frozen.
    cdef readonly ndarray statistics
    cdef readonly object eps
    cdef readonly bint centred       # whether the mean is subtracted; if not, var is a mean square
    cdef readonly bint frozen        # whether the statistics do not depend on x
    cdef readonly ndarray passed     # a bit for each value that relu let through; None: all were
    cdef readonly bint has_residual


cpdef Saved new_saved(x, dtype, View view, ndarray statistics, eps, bint centred, bint frozen,
                      Steps steps):
    cdef Saved saved = Saved.__new__(Saved)
    if steps is not None:
        saved.passed, saved.has_residual = steps.passed, steps.residual is not None
    saved.x, saved.shape, saved.dtype, saved.view = x, view.shape, dtype, view
    saved.statistics, saved.eps, saved.centred, saved.frozen = statistics, eps, centred, frozen
    return saved


cpdef statistics_of(ndarray x, View view,
                    double eps,           # that will be added to the variance
                    bint centred,
                    ndarray statistics):  # OUT
    cdef Pass p
    set_up(&p, STATISTICS, view, None, None, None, None, eps)
    p.centred = centred
    keep_statistics(&p, <double*>data_of(statistics), p.geometry.channels)
    run_pass(&p, x, None, None)


cdef void fuse(Pass* p, Steps steps) noexcept:
    """Let the steps of an output go along."""
    if steps is not None:
        p.fused.relu = steps.relu
        p.fused.residual = data_of(steps.residual)
        p.fused.passed = <unsigned char*>data_of(steps.passed)


cpdef normalise(ndarray x, View view, ndarray weight, ndarray bias, double eps, bint centred,
                ndarray statistics,   # OUT, or None, where nobody keeps them
                ndarray out,          # OUT
                Steps steps):
    """Normalise every channel by its own statistics."""
    cdef Pass p
    set_up(&p, NORMALISE, view, weight, bias, None, None, eps)
    p.centred = centred
    fuse(&p, steps)
    if statistics is not None:
        keep_statistics(&p, <double*>data_of(statistics), p.geometry.channels)
    run_pass(&p, x, None, out)


cpdef normalise_by(ndarray x, View view, ndarray statistics, ndarray weight, ndarray bias,
                   double eps,
                   ndarray out,   # OUT
                   Steps steps):
    """Normalise by statistics of x: the same bits as normalise."""
    cdef Pass p
    set_up(&p, GIVEN, view, weight, bias, None, None, eps)
    fuse(&p, steps)
    use_statistics(&p, statistics)
    run_pass(&p, x, None, out)


cpdef normalise_given(ndarray x, View view, ndarray mean, ndarray var, ndarray weight, ndarray bias,
                      double eps,
                      ndarray out,   # OUT
                      Steps steps):
    cdef Pass p
    set_up(&p, GIVEN, view, weight, bias, mean, var, eps)
    fuse(&p, steps)
    run_pass(&p, x, None, out)


cdef void gate(Pass* p, Saved saved, ndarray grad_residual) noexcept:
    """Let the steps back go along."""
    p.fused.back = True
    p.fused.passed = <unsigned char*>data_of(saved.passed)
    p.fused.grad_residual = data_of(grad_residual)


cpdef gradients_of_scaling(ndarray grad_output, Saved saved, ndarray weight,
                           ndarray grad_input,
                           ndarray grad_residual):   # OUT, both; the second, or None
    """The gradient of an input that the statistics do not depend on; it has no part in it."""
    cdef Pass p
    set_up(&p, GIVEN, saved.view, weight, None, None, saved.statistics[2], saved.eps)
    gate(&p, saved, grad_residual)
    run_pass(&p, grad_output, None, grad_input)


cpdef gradients(ndarray grad_output, Saved saved, ndarray weight,
                ndarray grad_input,                       # OUT, or None where it is not wanted
                ndarray grad_weight, ndarray grad_bias,   # OUT, or None, both
                ndarray grad_residual):                   # OUT, or None
    cdef Pass p
    set_up(&p, FROZEN_GRADIENTS if saved.frozen else GRADIENTS, saved.view, weight, None, None,
           None, saved.eps)
    p.centred = saved.centred
    use_statistics(&p, saved.statistics)
    p.grad_weight = data_of(grad_weight)
    p.grad_bias = data_of(grad_bias)
    gate(&p, saved, grad_residual)
    run_pass(&p, saved.x, grad_output, grad_input)


include "running.pxi"
include "calls.pxi"
