# The kernels, one text for every instruction set: a _kernels_*.pyx names a set and includes this.
#
# The functions at the end are what cbn/_engine.py calls. They check nothing: arrays are
# C-contiguous, aligned, in native byte order and of the right sizes; x, grad_output, out,
# grad_weight and grad_bias share one element type, float32 or float64; weight, bias, mean and var
# may each be float32, float64 or None; statistics are the mean, what float64 rounds off it, and the
# variance of every channel: float64 of shape (3, channels).

from cpython.tuple cimport PyTuple_GET_ITEM
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY, fabs, frexp, ldexp, sqrt
from libc.stdio cimport FILE, fclose, fopen, fscanf
from libc.stdlib cimport free, malloc
from posix.time cimport (
    CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime, clockid_t, timespec,
)
from numpy cimport (
    NPY_DOUBLE, NPY_FLOAT, NPY_INT64, PyArray_CheckExact, PyArray_DATA, PyArray_DESCR,
    PyArray_DIM, PyArray_DIMS, PyArray_EMPTY, PyArray_ISCARRAY_RO, PyArray_ISWRITEABLE,
    PyArray_NBYTES, PyArray_NDIM, PyArray_SAMESHAPE, PyArray_SIZE, PyArray_TYPE, import_array,
    ndarray, npy_int64, npy_intp,
)

cdef extern from "threads.h":
    int omp_get_max_threads() nogil
    int omp_get_thread_limit() nogil
    int usable_cpus() nogil
    int online_cpus()
    void wait_for_team() nogil
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

cdef extern from "vector.h":
    enum:
        VECTOR_BYTES
    double multiply_add(double a, double b, double c) nogil
    double sum_of(const double* value, Py_ssize_t n) nogil
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
include "contention.pxi"
include "pass.pxi"
include "moments.pxi"
include "gradients.pxi"
include "apply.pxi"
include "passes.pxi"

import_array()
if watch_forks_and_threads() != 0:   # a child would hang
    raise MemoryError("pthread_atfork: expected memory to watch forks, got none")

cdef enum:
    # The output of a pass whose arrays are of this size together is written past the cache: no L2
    # holds them. Chains of layers that read each other's outputs of 8 to 48 MiB took a quarter
    # less, gradients of 6 MiB an eighth less; forward passes of 6 MiB differed either way.
    STREAM_BYTES = 1 << 24
    # But not where planes, or parts of them, are shorter: they are written one by one, and their
    # first and last lines not whole. Those of 49 took a third longer, of 98 as long, of 196 less.
    SHORTEST_STREAMED = 128


def walk(Py_ssize_t N, Py_ssize_t C, Py_ssize_t S):
    """How a pass that reduces an array walks it, for tests that mean one way of it."""
    cdef Geometry g = cut(batch_view(N, C, S), True, False)
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


cdef inline void* data_of(ndarray array):
    return PyArray_DATA(array) if array is not None else NULL


cdef Pass new_pass(Kind kind, View view, ndarray weight, ndarray bias, ndarray mean, ndarray var,
                   double eps):
    cdef Pass p
    p.kind = kind
    p.geometry = cut(view, kind != GIVEN, kind == GRADIENTS)
    p.centred = True
    p.weight = per_channel(weight, 1)
    p.bias = per_channel(bias, 0)
    p.mean = per_channel(mean, 0)
    p.mean_low = per_channel(None, 0)
    p.var = per_channel(var, 1)
    p.eps = eps
    p.statistics = NULL
    p.grad_weight = p.grad_bias = NULL
    return p


cdef void use_statistics(Pass* p, ndarray statistics):
    p.mean.double_ = <const double*>data_of(statistics)
    p.mean_low.double_ = p.mean.double_ + p.geometry.channels
    p.var.double_ = p.mean.double_ + 2 * p.geometry.channels


cdef void use_parameters(const real* x,   # for its element type only
                         Pass* p) noexcept nogil:
    """Take weights and biases of the parts of channels as a table of the element type of x."""
    cdef Py_ssize_t n = p.geometry.parameters, k
    cdef real* parameter = <real*>p.parameters
    for k in range(n):
        parameter[k] = <real>value_of(&p.weight, k)
    for k in range(n):
        parameter[n + k] = <real>value_of(&p.bias, k)
    p.weight = per_channel_absent(1)
    p.bias = per_channel_absent(0)


cdef run_pass(Pass* p, ndarray x, ndarray grad_output, ndarray out, int num_threads):
    cdef const Geometry* g = &p.geometry
    cdef void* x_data = data_of(x)
    cdef void* grad_data = data_of(grad_output)
    cdef void* out_data = data_of(out)
    cdef bint single = PyArray_TYPE(x) == NPY_FLOAT
    cdef bint gradients = p.kind == GRADIENTS or p.kind == FROZEN_GRADIENTS
    cdef size_t size = PyArray_NBYTES(x)
    # An output that is also an input is in the cache already, line by line.
    p.stream = (size * (3 if p.kind == GRADIENTS else 2) >= STREAM_BYTES
                and out_data != x_data and out_data != grad_data
                and (not g.by_plane or shortest_run(g) >= SHORTEST_STREAMED))
    # The table of coefficients, what the pieces find (with given statistics, nothing), weights and
    # biases of parts of channels, and shares in their gradients.
    cdef size_t table = g.channels * COEFFICIENTS * (sizeof(float) if single else sizeof(double))
    table += table % sizeof(double)   # what comes next is aligned
    cdef size_t found = 0 if p.kind == GIVEN else g.channels * g.pieces * (
        parts_kept(g) * sizeof(Sums) if gradients else sizeof(Moments))
    cdef size_t parameters = 0 if g.parts == 1 else 2 * g.parameters * sizeof(double)
    cdef size_t shares = 0
    if gradients and shares_parameters(g):
        p.sharers = sharers_of(g)
        shares = p.sharers * 2 * g.parameters * sizeof(double)
    num_threads = begin_pass(<int>min(num_threads, g.strips * g.pieces), PyArray_SIZE(x))
    cdef size_t paces = 0 if num_threads == 1 else num_threads * ROUNDS * sizeof(Pace)
    p.coefficients = malloc(table + found + parameters + shares + paces)
    if p.coefficients == NULL:
        end_call()
        raise MemoryError
    p.partial = <char*>p.coefficients + table
    p.parameters = <char*>p.partial + found
    p.shares = <double*>(<char*>p.parameters + parameters) if shares else NULL
    p.paces = <Pace*>(<char*>p.parameters + parameters + shares)
    p.seconds = p.on_one_thread = 0
    p.clock = CLOCK_THREAD_CPUTIME_ID if PyArray_SIZE(x) >= LONG_CALL else CLOCK_MONOTONIC
    with nogil:
        if single:
            run(<const float*>x_data, <const float*>grad_data, <float*>out_data, p, num_threads)
        else:
            run(<const double*>x_data, <const double*>grad_data, <double*>out_data, p,
                num_threads)
    end_call()
    free(p.coefficients)
    if num_threads > 1 and contention.judges:
        contention.judge(seconds(CLOCK_MONOTONIC), p.seconds, p.on_one_thread,
                         num_threads if has_new_team() else 0)


cdef int begin_pass(int num_threads, Py_ssize_t values):
    """The number of threads for a pass that may have so many."""
    cdef Contention contention = contention_here()
    cdef bint allowed = True
    if num_threads > 1:
        allowed = contention.allows_team(num_threads)
    num_threads = begin_call(num_threads if allowed else 1, values)
    if num_threads > 1:
        contention.team_calls += 1
    elif allowed:
        contention.single_calls += 1
    else:
        contention.contended_calls += 1
    return num_threads


cdef ndarray new_statistics(npy_intp C):
    cdef npy_intp[2] shape
    shape[0], shape[1] = 3, C
    return PyArray_EMPTY(2, shape, NPY_DOUBLE, 0)


cpdef ndarray given_statistics(ndarray mean, ndarray var):
    """A copy, for a backward pass: what it is taken from may change in between."""
    cdef Py_ssize_t C = PyArray_DIM(mean, 0), c
    cdef PerChannel means = per_channel(mean, 0), vars = per_channel(var, 0)
    cdef ndarray statistics = new_statistics(C)
    cdef double* data = <double*>data_of(statistics)
    for c in range(C):
        data[c] = value_of(&means, c)
        data[C + c] = 0
        data[2 * C + c] = value_of(&vars, c)
    return statistics


cdef class Saved:
    """What a backward pass needs of its forward pass."""

    cdef public object x             # None: overwritten, or not needed
    cdef readonly tuple shape        # of x, and its dtype: both may have been changed since
    cdef readonly object dtype
    cdef readonly object view         # a View (cbn/_norms.py)
    cdef readonly ndarray statistics   # float64 (3, B * C): mean, what float64 rounds off it, var
    cdef readonly object eps
    cdef readonly bint centred       # whether the mean is subtracted; if not, var is a mean square
    cdef readonly bint frozen        # whether the statistics do not depend on x

    def __init__(self, x, tuple shape, dtype, object view, ndarray statistics, eps,
                 bint centred=True, bint frozen=False):
        fill(self, x, shape, dtype, view, statistics, eps, centred, frozen)


cdef inline void fill(Saved saved, x, tuple shape, dtype, object view, ndarray statistics, eps,
                      bint centred, bint frozen):
    saved.x, saved.shape, saved.dtype, saved.view = x, shape, dtype, view
    saved.statistics, saved.eps, saved.centred, saved.frozen = statistics, eps, centred, frozen


cdef Saved new_saved(x, tuple shape, dtype, object view, ndarray statistics, eps, bint centred,
                     bint frozen):
    """A Saved, without the way through its arguments as objects."""
    cdef Saved saved = Saved.__new__(Saved)
    fill(saved, x, shape, dtype, view, statistics, eps, centred, frozen)
    return saved


cdef enum:   # places in a View of cbn/_norms.py, a kind of tuple
    OF_SAMPLES = 6
    PARAMETER_SHAPE = 7
    VALUES = 8


cdef inline Py_ssize_t number_in(object view, Py_ssize_t place):
    return <object>PyTuple_GET_ITEM(view, place)


cdef View view_from(object view):
    """A View of cbn/_norms.py as one of geometry.pxi."""
    cdef Py_ssize_t N = number_in(view, 1), C = number_in(view, 2), S = number_in(view, 3)
    if not number_in(view, OF_SAMPLES):
        return batch_view(N, C, S)
    return sample_view(number_in(view, 0), N, C, S, number_in(view, 4), number_in(view, 5))


cpdef statistics_of(ndarray x, object view,
                    double eps,           # that will be added to the variance
                    bint centred,
                    ndarray statistics,   # OUT
                    int num_threads):
    cdef Pass p = new_pass(STATISTICS, view_from(view), None, None, None, None, eps)
    p.centred = centred
    p.statistics = <double*>data_of(statistics)
    run_pass(&p, x, None, None, num_threads)


cpdef normalise_own(ndarray x, object view, ndarray weight, ndarray bias, double eps, bint centred,
                    ndarray statistics, ndarray out,   # OUT
                    int num_threads):
    """Normalise every channel by its own statistics."""
    cdef Pass p = new_pass(BATCH, view_from(view), weight, bias, None, None, eps)
    p.centred = centred
    use_statistics(&p, statistics)
    p.statistics = <double*>data_of(statistics)
    run_pass(&p, x, None, out, num_threads)


cpdef normalise_by(ndarray x, object view, ndarray statistics, ndarray weight, ndarray bias,
                   double eps,
                   ndarray out,   # OUT
                   int num_threads):
    """Normalise by statistics of x: the same bits as normalise_own."""
    cdef Pass p = new_pass(GIVEN, view_from(view), weight, bias, None, None, eps)
    use_statistics(&p, statistics)
    run_pass(&p, x, None, out, num_threads)


cpdef normalise(ndarray x, object view, ndarray mean, ndarray var, ndarray weight, ndarray bias,
                double eps,
                ndarray out,   # OUT
                int num_threads):
    cdef Pass p = new_pass(GIVEN, view_from(view), weight, bias, mean, var, eps)
    run_pass(&p, x, None, out, num_threads)


cpdef gradients(ndarray grad_output, Saved saved, ndarray weight,
                ndarray grad_input, ndarray grad_weight, ndarray grad_bias,   # OUT
                int num_threads):
    cdef Pass p = new_pass(FROZEN_GRADIENTS if saved.frozen else GRADIENTS, view_from(saved.view),
                           weight, None, None, None, saved.eps)
    p.centred = saved.centred
    use_statistics(&p, saved.statistics)
    p.grad_weight = data_of(grad_weight)
    p.grad_bias = data_of(grad_bias)
    run_pass(&p, saved.x, grad_output, grad_input, num_threads)


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
        if is_counter(num_batches_tracked):   # a microsecond less than the addition of arrays
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


include "express.pxi"
