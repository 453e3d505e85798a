/* OpenMP's thread count, also in a build without OpenMP. */
#ifndef CBN_THREADS_H
#define CBN_THREADS_H

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
#endif

#endif
