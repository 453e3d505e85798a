/* What the OpenMP runtime says of itself, also in a build without OpenMP. */
#ifndef CBN_THREADS_H
#define CBN_THREADS_H

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

/* Until all threads of the team are here. */
static inline void wait_for_team(void) {
#pragma omp barrier
}

#else

static inline void wait_for_team(void) {}
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_limit(void) { return 1; }
static inline int openmp_version(void) { return 0; }
static inline const char *openmp_library(void) { return ""; }

#endif
#endif
