/* The modes of floating-point arithmetic, which every thread has for itself. */
#ifndef CBN_FLOATING_POINT_H
#define CBN_FLOATING_POINT_H

/* Rounding, and whether subnormal numbers are taken for zero. Which exceptions trap and which have
   been seen is left to each thread. */
#if defined(__SSE2__)
#include <immintrin.h>
typedef unsigned floating_point_modes;
enum { MODES = 0xe040 };           /* of MXCSR: FTZ, rounding, DAZ */
static inline floating_point_modes control(void) { return _mm_getcsr(); }
static inline void set_control(floating_point_modes value) { _mm_setcsr(value); }
#elif defined(__aarch64__) && defined(__GNUC__)
typedef unsigned long long floating_point_modes;
enum { MODES = 0x3c80000 };        /* of FPCR: default NaN, FZ, rounding, FZ16 */
static inline floating_point_modes control(void) {
    floating_point_modes value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static inline void set_control(floating_point_modes value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value));
}
#else
typedef unsigned floating_point_modes;
enum { MODES = 0 };
static inline floating_point_modes control(void) { return 0; }
static inline void set_control(floating_point_modes value) { (void)value; }
#endif

/* The modes of this thread. */
static inline floating_point_modes current_modes(void) { return control() & MODES; }

/* Change the modes of this thread, and return those it had. */
static inline floating_point_modes change_modes(floating_point_modes modes) {
    floating_point_modes before = control();
    if ((before & MODES) != modes)
        set_control((before & ~(floating_point_modes)MODES) | modes);
    return before & MODES;
}

#endif
