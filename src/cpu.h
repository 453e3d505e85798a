/* Which x86-64 levels (System V psABI) this processor has and this operating system supports. */
#ifndef CBN_CPU_H
#define CBN_CPU_H

#if defined(__x86_64__)
#include <cpuid.h>

static inline unsigned long long enabled_state(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}

/* 1, 2, 3 or 4; levels below 3 are not told apart, because nothing is built for level 2. */
static int x86_64_level(void) {
    unsigned a, b, c, d, b7 = 0, extended = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 1;
    const unsigned leaf1 = bit_FMA | bit_MOVBE | bit_OSXSAVE | bit_AVX | bit_F16C;
    if ((c & leaf1) != leaf1)
        return 1;
    /* The operating system must save the upper halves of the registers it lets programs use. */
    unsigned long long state = enabled_state();
    if ((state & 0x6) != 0x6)
        return 1;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d))
        return 1;
    const unsigned leaf7 = bit_AVX2 | bit_BMI | bit_BMI2;
    if ((b7 & leaf7) != leaf7)
        return 1;
    if (!__get_cpuid(0x80000001, &a, &b, &extended, &d) || !(extended & bit_LZCNT))
        return 1;
    const unsigned avx512 =
        bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL;
    if ((b7 & avx512) != avx512 || (state & 0xe6) != 0xe6)
        return 3;
    return 4;
}

#else

static int x86_64_level(void) { return 0; }

#endif
#endif
