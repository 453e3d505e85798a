/* What the OpenMP runtime says of itself, also in a build without OpenMP. */
#ifndef CBN_THREADS_H
#define CBN_THREADS_H

#include <stddef.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* The CPUs of the machine, whatever this process may use of them. */
static inline int online_cpus(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }

/* The value before; one thread after the other. */
static inline ptrdiff_t fetch_and_add(ptrdiff_t *value, ptrdiff_t more) {
    return __atomic_fetch_add(value, more, __ATOMIC_RELAXED);
}

/* Make streamed lines visible to other threads before whatever this one does next. */
static inline void fence_streams(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#ifdef _OPENMP

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <omp.h>

static inline int openmp_version(void) { return _OPENMP; }

/* The file that the symbols come from: libgomp, libomp, libiomp5, or a copy of one of them. */
static inline const char *openmp_library(void) {
    Dl_info info;
    if (dladdr((void *)omp_get_max_threads, &info) && info.dli_fname)
        return info.dli_fname;
    return "unknown";
}

/* The CPUs of the process. The calling thread may be bound to one of them, and the process to some:
   to the places, which may overlap. */
static inline int usable_cpus(void) {
    int cpus = omp_get_num_procs(), in_places = 0;
    for (int place = 0; place < omp_get_num_places(); place++)
        in_places += omp_get_place_num_procs(place);
    return in_places > 0 && in_places < cpus ? in_places : cpus;
}

/* Until all threads of the team are here. */
static inline void wait_for_team(void) {
#pragma omp barrier
}

#else

static inline void wait_for_team(void) {}
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_limit(void) { return 1; }
static inline int usable_cpus(void) { return 0; }
static inline int openmp_version(void) { return 0; }
static inline const char *openmp_library(void) { return ""; }

#endif
#endif
