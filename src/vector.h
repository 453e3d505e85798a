/* What Cython cannot say of vectors. */
#ifndef CBN_VECTOR_H
#define CBN_VECTOR_H

#include <stddef.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

/* The widest vector of the instruction set, in bytes. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

/* a * b + c where the product is exact, as that of two floats is in double: then one rounding or
   two make no difference. */
static inline double multiply_add(double a, double b, double c) {
#ifdef __FMA__
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* A sum in eight chains, which an adder of four cycles' latency can take in parallel, folded by
   halves. gcc 12 folds a plain array lane by lane: gradients of planes of 48 took 20 % longer. */
static inline double sum_of(const double *value, ptrdiff_t n) {
    double rest[8] = {0};
    ptrdiff_t i = 0;
    if (n == 1)
        return value[0];
#ifdef __GNUC__
    typedef double eight_doubles __attribute__((vector_size(64)));
    typedef double four_doubles __attribute__((vector_size(32)));
    eight_doubles lane = {0}, next;
    four_doubles half[2];
    for (; i + 8 <= n; i += 8) {
        memcpy(&next, value + i, sizeof next);
        lane += next;
    }
    if (i < n) {
        for (int j = 0; j < n - i; j++)
            rest[j] = value[i + j];
        memcpy(&next, rest, sizeof next);
        lane += next;
    }
    memcpy(half, &lane, sizeof lane);
    half[0] += half[1];
    return (half[0][0] + half[0][2]) + (half[0][1] + half[0][3]);
#else
    for (; i < n; i++)
        rest[i % 8] += value[i];
    return ((rest[0] + rest[4]) + (rest[2] + rest[6])) + ((rest[1] + rest[5]) + (rest[3] + rest[7]));
#endif
}

/* Streaming stores: a line that is written whole need not be read first, which saves a third of the
   traffic of a pass that reads one array and writes another. */

/* Copy whole 64-byte lines to a 64-byte boundary, past the cache. */
static inline void stream_lines(void *to, const void *from, size_t bytes) {
#if defined(__AVX512F__)
    for (size_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512((__m512i *)((char *)to + i),
                            _mm512_loadu_si512((const char *)from + i));
#elif defined(__AVX__)
    for (size_t i = 0; i < bytes; i += 32)
        _mm256_stream_si256((__m256i *)((char *)to + i),
                            _mm256_loadu_si256((const __m256i *)((const char *)from + i)));
#elif defined(__SSE2__)
    for (size_t i = 0; i < bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)to + i),
                         _mm_loadu_si128((const __m128i *)((const char *)from + i)));
#else
    memcpy(to, from, bytes);
#endif
}

/* Make streamed lines visible before whatever the caller does next. */
static inline void stream_fence(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#endif
