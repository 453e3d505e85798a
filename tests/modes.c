/* Another library that changes the floating-point modes of threads, for
   test_floating_point_modes.py. */
#include <omp.h>
#include <xmmintrin.h>

unsigned get_modes(void) { return _mm_getcsr(); }

void set_modes(unsigned modes) { _mm_setcsr(modes); }

/* The same for all threads of a team but the first, which is the caller. */
void get_modes_of_team(int size, unsigned *modes) {
#pragma omp parallel num_threads(size)
    modes[omp_get_thread_num()] = _mm_getcsr();
}

void set_modes_of_team(int size, unsigned modes) {
#pragma omp parallel num_threads(size)
    if (omp_get_thread_num() > 0)
        _mm_setcsr(modes);
}
