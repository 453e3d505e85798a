/* Lanes: vectors of the native width, and how a storage type is loaded into them and stored.

   A vector operator works lane by lane, so that no width changes a bit of a result. A storage type
   is what data are kept in; `real` is the type that they are computed in, and that coefficients and
   the sums of a block have. To add a storage type is to add its section at the end, and its lines in
   micro_module.h. */
#ifndef CBN_LANES_H
#define CBN_LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline, noclone)) /* copies of it would be large */
#define COLD __attribute__((noinline, cold))   /* rarely called: small rather than fast */
/* A loop over a few vectors that are held in registers, and so have literal places. */
#define EACH(v, vectors) _Pragma("GCC unroll 8") for (int v = 0; v < (vectors); v++)

enum {
    FLOATS = VECTOR_BYTES / 4, /* lanes of a vector of float */
    DOUBLES = VECTOR_BYTES / 8,
};

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float half_floats __attribute__((vector_size(VECTOR_BYTES / 2))); /* DOUBLES of them */
typedef double doubles __attribute__((vector_size(VECTOR_BYTES)));
/* The same at the address of any float, or double, as lvalues. */
typedef floats any_floats __attribute__((aligned(4), may_alias));
typedef doubles any_doubles __attribute__((aligned(8), may_alias));

#define FLOATS_AT(address) (*(any_floats *)(address))
#define DOUBLES_AT(address) (*(any_doubles *)(address))

INLINE floats all_floats(float value) { return value - (floats){0}; }
INLINE doubles all_doubles(double value) { return value - (doubles){0}; }

/* Tails that are loaded: of n lanes, n < 1 none and more than there are all. What is not loaded is zero.
   Two vectors are joined to the first n lanes of one and the others of the other. */

#if defined(__AVX512F__)

INLINE __mmask16 first_16(ptrdiff_t n) {
    return _mm512_cmplt_epi32_mask(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32((int)n));
}
INLINE floats some_floats(const float *at, ptrdiff_t n) {
    return (floats)_mm512_maskz_loadu_ps(first_16(n), at);
}
INLINE doubles some_doubles(const double *at, ptrdiff_t n) {
    return (doubles)_mm512_maskz_loadu_pd((__mmask8)first_16(n), at);
}
INLINE floats joined_floats(floats a, floats b, ptrdiff_t n) {
    return (floats)_mm512_mask_mov_ps((__m512)b, first_16(n), (__m512)a);
}
INLINE doubles joined_doubles(doubles a, doubles b, ptrdiff_t n) {
    return (doubles)_mm512_mask_mov_pd((__m512d)b, (__mmask8)first_16(n), (__m512d)a);
}

#else

INLINE floats joined_floats(floats a, floats b, ptrdiff_t n) {
    typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
#if VECTOR_BYTES == 32
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const ints lane = {0, 1, 2, 3};
#endif
    const ints is_first = lane < (int32_t)n - (ints){0};
    return (floats)(((ints)a & is_first) | ((ints)b & ~is_first));
}
INLINE doubles joined_doubles(doubles a, doubles b, ptrdiff_t n) {
    typedef int64_t longs __attribute__((vector_size(VECTOR_BYTES)));
#if VECTOR_BYTES == 32
    const longs lane = {0, 1, 2, 3};
#else
    const longs lane = {0, 1};
#endif
    const longs is_first = lane < (int64_t)n - (longs){0};
    return (doubles)(((longs)a & is_first) | ((longs)b & ~is_first));
}

#ifdef __AVX2__

INLINE __m256i first_8(ptrdiff_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE floats some_floats(const float *at, ptrdiff_t n) {
    return (floats)_mm256_maskload_ps(at, first_8(n));
}
INLINE doubles some_doubles(const double *at, ptrdiff_t n) {
    return (doubles)_mm256_maskload_pd(
        at, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
}

#else

static NOINLINE floats some_floats(const float *at, ptrdiff_t n) {
    floats value = all_floats(0);
    for (int i = 0; i < FLOATS && i < n; i++)
        value[i] = at[i];
    return value;
}
INLINE doubles some_doubles(const double *at, ptrdiff_t n) {
    return (doubles){n > 0 ? at[0] : 0, n > 1 ? at[1] : 0};
}

#endif
#endif

/* Tails that are stored, of at least one lane and not all: eight lanes, four, two, one. Not by a mask:
   for that, an EPYC takes many cycles, and waits where the line is not in its cache (training of planes
   of 28 x 28, benchmarks/compare.py). */
#ifdef __SSE2__
INLINE void put_four(float *at, __m128 four, ptrdiff_t n) {
    if (n & 2) {
        memcpy(at, &four, 2 * sizeof *at);
        at += 2;
        four = _mm_movehl_ps(four, four);
    }
    if (n & 1)
        _mm_store_ss(at, four);
}
#ifdef __AVX2__
INLINE void put_eight(float *at, __m256 eight, ptrdiff_t n) {
    __m128 four = _mm256_castps256_ps128(eight);
    if (n & 4) {
        _mm_storeu_ps(at, four);
        at += 4;
        four = _mm256_extractf128_ps(eight, 1);
    }
    put_four(at, four, n);
}
#endif
#endif
INLINE void put_floats(float *at, floats value, ptrdiff_t n) {
#if defined(__AVX512F__)
    __m256 eight = _mm512_castps512_ps256((__m512)value);
    if (n & 8) {
        _mm256_storeu_ps(at, eight);
        at += 8;
        eight = _mm512_extractf32x8_ps((__m512)value, 1);
    }
    put_eight(at, eight, n);
#elif defined(__AVX2__)
    put_eight(at, (__m256)value, n);
#elif defined(__SSE2__)
    put_four(at, (__m128)value, n);
#else
    for (ptrdiff_t i = 0; i < n; i++)
        at[i] = value[i];
#endif
}
INLINE void put_doubles(double *at, doubles value, ptrdiff_t n) {
#ifdef __SSE2__
    put_floats((float *)at, (floats)value, 2 * n); /* even: no lane is stored as a float of its own */
#else
    for (ptrdiff_t i = 0; i < n; i++)
        at[i] = value[i];
#endif
}

/* A vector of doubles, of which so many lanes are there. */
INLINE doubles doubles_at(const double *at, ptrdiff_t n) {
    return n >= DOUBLES ? (doubles)DOUBLES_AT(at) : some_doubles(at, n);
}

/* The positive lanes and NaNs, and a bit for each of these; the others are 0. */
INLINE floats rectified_floats(floats value, unsigned *passed) {
#if defined(__AVX512F__)
    *passed = _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_NLE_UQ);
    return (floats)_mm512_maskz_mov_ps((__mmask16)*passed, (__m512)value);
#elif defined(__AVX2__)
    const __m256 mask = _mm256_cmp_ps((__m256)value, _mm256_setzero_ps(), _CMP_NLE_UQ);
    *passed = (unsigned)_mm256_movemask_ps(mask);
    return (floats)_mm256_and_ps(mask, (__m256)value);
#elif defined(__SSE2__)
    const __m128 mask = _mm_cmpnle_ps((__m128)value, _mm_setzero_ps());
    *passed = (unsigned)_mm_movemask_ps(mask);
    return (floats)_mm_and_ps(mask, (__m128)value);
#else
    *passed = 0;
    for (int i = 0; i < FLOATS; i++)
        if (value[i] <= 0)
            value[i] = 0;
        else
            *passed |= 1u << i;
    return value;
#endif
}
INLINE doubles rectified_doubles(doubles value, unsigned *passed) {
#if defined(__AVX512F__)
    *passed = _mm512_cmp_pd_mask((__m512d)value, _mm512_setzero_pd(), _CMP_NLE_UQ);
    return (doubles)_mm512_maskz_mov_pd((__mmask8)*passed, (__m512d)value);
#elif defined(__AVX2__)
    const __m256d mask = _mm256_cmp_pd((__m256d)value, _mm256_setzero_pd(), _CMP_NLE_UQ);
    *passed = (unsigned)_mm256_movemask_pd(mask);
    return (doubles)_mm256_and_pd(mask, (__m256d)value);
#elif defined(__SSE2__)
    const __m128d mask = _mm_cmpnle_pd((__m128d)value, _mm_setzero_pd());
    *passed = (unsigned)_mm_movemask_pd(mask);
    return (doubles)_mm_and_pd(mask, (__m128d)value);
#else
    *passed = 0;
    for (int i = 0; i < DOUBLES; i++)
        if (value[i] <= 0)
            value[i] = 0;
        else
            *passed |= 1u << i;
    return value;
#endif
}

/* The lanes whose bits are set; the others are 0. */
INLINE floats chosen_floats(floats value, unsigned bits) {
#if defined(__AVX512F__)
    return (floats)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)value);
#else
    typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
#if VECTOR_BYTES == 32
    const ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
#else
    const ints bit = {1, 2, 4, 8};
#endif
    return (floats)((ints)value & ((((int32_t)bits - (ints){0}) & bit) == bit));
#endif
}
INLINE doubles chosen_doubles(doubles value, unsigned bits) {
#if defined(__AVX512F__)
    return (doubles)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)value);
#else
    typedef int64_t longs __attribute__((vector_size(VECTOR_BYTES)));
#if VECTOR_BYTES == 32
    const longs bit = {1, 2, 4, 8};
#else
    const longs bit = {1, 2};
#endif
    return (doubles)((longs)value & ((((int64_t)bits - (longs){0}) & bit) == bit));
#endif
}

/* To float64, of which every float32 is one. gcc 12 would take __builtin_convertvector apart. */
INLINE doubles widen(half_floats value) {
#if defined(__AVX512F__)
    return (doubles)_mm512_cvtps_pd((__m256)value);
#elif defined(__AVX2__)
    return (doubles)_mm256_cvtps_pd((__m128)value);
#else
    return (doubles){value[0], value[1]};
#endif
}

/* Lanes in float64, in two vectors. */
INLINE void widen_floats(floats value, doubles *halves) {
#if defined(__AVX512F__)
    halves[0] = widen((half_floats)_mm512_castps512_ps256((__m512)value));
    halves[1] = widen((half_floats)_mm512_extractf32x8_ps((__m512)value, 1));
#elif defined(__AVX2__)
    halves[0] = widen((half_floats)_mm256_castps256_ps128((__m256)value));
    halves[1] = widen((half_floats)_mm256_extractf128_ps((__m256)value, 1));
#else
    halves[0] = (doubles){value[0], value[1]};
    halves[1] = (doubles){value[2], value[3]};
#endif
}

/* Fetch a line that is read soon, into the L2 cache: more can be on their way to it than to L1. On an EPYC
   backward of layer norm beyond the caches took 0.6 to 0.85 of the time that it took with fetches to L1
   (benchmarks/compare.py). */
INLINE void fetch(const void *at) { __builtin_prefetch(at, 0, 2); }

/* Streaming stores: a line that is written whole need not be read first, which saves a third of the
   traffic of a pass that reads one array and writes another. */
INLINE void stream(void *at, doubles value) { /* a multiple of VECTOR_BYTES */
#if defined(__AVX512F__)
    _mm512_stream_pd((double *)at, (__m512d)value);
#elif defined(__AVX2__)
    _mm256_stream_pd((double *)at, (__m256d)value);
#elif defined(__SSE2__)
    _mm_stream_pd((double *)at, (__m128d)value);
#else
    *(doubles *)at = value;
#endif
}

/* A sum in CHAINS chains, which an adder of four cycles' latency can take in parallel, folded by
   halves. */
enum { CHAINS = 8, VECTORS_OF_CHAINS = CHAINS / DOUBLES };

INLINE double sum_of_chains(const double *chain) {
    typedef double four_doubles __attribute__((vector_size(32)));
    four_doubles half[2];
    memcpy(half, chain, sizeof half);
    half[0] += half[1];
    return (half[0][0] + half[0][2]) + (half[0][1] + half[0][3]);
}

INLINE double sum_of(const double *value, ptrdiff_t n) {
    doubles lane[VECTORS_OF_CHAINS];
    ptrdiff_t i = 0;
    if (n == 1)
        return value[0];
    for (int v = 0; v < VECTORS_OF_CHAINS; v++)
        lane[v] = all_doubles(0);
    for (; i + CHAINS <= n; i += CHAINS)
        for (int v = 0; v < VECTORS_OF_CHAINS; v++)
            lane[v] += DOUBLES_AT(value + i + v * DOUBLES);
    if (i < n)
        for (int v = 0; v < VECTORS_OF_CHAINS; v++)
            lane[v] += some_doubles(value + i + v * DOUBLES, n - i - v * DOUBLES);
    return sum_of_chains((const double *)lane);
}

/* The same for as many sums as a vector has lanes, side by side: what each step adds up of two
   vectors is brought into one first. */
#if defined(__AVX512F__)
INLINE doubles sums_of_chains(const double *chain) {
    doubles half[4], quarter[2];
#define CHOSEN(a, b, ...) _mm512_permutex2var_pd(a, _mm512_setr_epi64(__VA_ARGS__), b)
    EACH (i, 4) {
        const __m512d a = (__m512d)DOUBLES_AT(chain + i * CHAINS);
        const __m512d b = (__m512d)DOUBLES_AT(chain + (i + 4) * CHAINS);
        half[i] = (doubles)CHOSEN(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
                  + (doubles)CHOSEN(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    EACH (i, 2) {
        const __m512d a = (__m512d)half[i], b = (__m512d)half[i + 2];
        quarter[i] = (doubles)CHOSEN(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
                     + (doubles)CHOSEN(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
#undef CHOSEN
    return (doubles)_mm512_unpacklo_pd((__m512d)quarter[0], (__m512d)quarter[1])
           + (doubles)_mm512_unpackhi_pd((__m512d)quarter[0], (__m512d)quarter[1]);
}
#elif defined(__AVX2__)
INLINE doubles sums_of_chains(const double *chain) {
    doubles half[4], quarter[2];
    EACH (i, 4)
        half[i] = DOUBLES_AT(chain + i * CHAINS) + DOUBLES_AT(chain + i * CHAINS + 4);
    EACH (i, 2) {
        const __m256d a = (__m256d)half[i], b = (__m256d)half[i + 2];
        quarter[i] = (doubles)_mm256_permute2f128_pd(a, b, 0x20)
                     + (doubles)_mm256_permute2f128_pd(a, b, 0x31);
    }
    return (doubles)_mm256_unpacklo_pd((__m256d)quarter[0], (__m256d)quarter[1])
           + (doubles)_mm256_unpackhi_pd((__m256d)quarter[0], (__m256d)quarter[1]);
}
#else
INLINE doubles sums_of_chains(const double *chain) {
    doubles quarter[2];
    EACH (i, 2)
        quarter[i] = (DOUBLES_AT(chain + i * CHAINS) + DOUBLES_AT(chain + i * CHAINS + 4))
                     + (DOUBLES_AT(chain + i * CHAINS + 2) + DOUBLES_AT(chain + i * CHAINS + 6));
    return (doubles){quarter[0][0], quarter[1][0]} + (doubles){quarter[0][1], quarter[1][1]};
}
#endif

/* Fold n sums of chains; of the last vector, the missing chains are set to zero. */
INLINE void fold_chains(double *chain, ptrdiff_t n, double *sum) {
    for (ptrdiff_t c = n; c % DOUBLES; c++)
        memset(chain + c * CHAINS, 0, CHAINS * sizeof *chain);
    for (ptrdiff_t c = 0; c < n; c += DOUBLES)
        DOUBLES_AT(sum + c) = sums_of_chains(chain + c * CHAINS);
}

/* Halves: as many values of 16 bits as a vector has floats. They are computed with as words, each in
   the upper half of one. */

typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));

/* Some of four values, and of eight, for tails. */
INLINE void put_some_of_four(uint16_t *at, uint64_t four, ptrdiff_t n) {
    if (n >= 4)
        memcpy(at, &four, 8);
    else if (n >= 2)
        memcpy(at, &four, 4);
    if (n == 3)
        four >>= 32;
    if (n == 3 || n == 1)
        memcpy(at + n - 1, &four, 2);
}
#ifdef __AVX2__
static NOINLINE void put_some_of_eight(uint16_t *at, __m128i eight, ptrdiff_t n) {
    put_some_of_four(at, (uint64_t)_mm_cvtsi128_si64(eight), n);
    if (n > 4)
        put_some_of_four(at + 4, (uint64_t)_mm_extract_epi64(eight, 1), n - 4);
}
#endif

#if defined(__AVX512F__)

typedef __m256i halves;

INLINE halves load_halves(const uint16_t *at) { return _mm256_loadu_si256((const __m256i *)at); }
INLINE halves some_halves(const uint16_t *at, ptrdiff_t n) {
    return _mm256_maskz_loadu_epi16(first_16(n), at);
}
INLINE void put_halves(uint16_t *at, halves value) { _mm256_storeu_si256((__m256i *)at, value); }
INLINE void put_some_halves(uint16_t *at, halves value, ptrdiff_t n) {
    __m128i eight = _mm256_castsi256_si128(value);
    if (n & 8) {
        _mm_storeu_si128((__m128i *)at, eight);
        at += 8;
        eight = _mm256_extracti128_si256(value, 1);
    }
    put_some_of_eight(at, eight, n % 8);
}
INLINE void stream_halves(uint16_t *at, halves value) { _mm256_stream_si256((__m256i *)at, value); }
/* One permutation each, where widening and narrowing would need a shift too. */
INLINE words words_of(halves value) {
    const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                           6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return (words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, _mm512_castsi256_si512(value));
}
INLINE halves halves_of(words value) {
    const __m512i place = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29,
                                           27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(place, (__m512i)value));
}

#else

INLINE uint64_t some_of_four(const uint16_t *at, ptrdiff_t n) {
    uint64_t four = 0;
    uint32_t two;
    uint16_t one;
    if (n >= 4) {
        memcpy(&four, at, sizeof four);
        return four;
    }
    if (n & 1 && n > 0) {
        memcpy(&one, at + n - 1, sizeof one);
        four = (uint64_t)one << (n - 1) * 16;
    }
    if (n >= 2) {
        memcpy(&two, at, sizeof two);
        four |= two;
    }
    return four;
}
#ifdef __AVX2__

typedef __m128i halves;

INLINE halves load_halves(const uint16_t *at) { return _mm_loadu_si128((const __m128i *)at); }
static NOINLINE halves some_halves(const uint16_t *at, ptrdiff_t n) {
    return _mm_set_epi64x(n > 4 ? (int64_t)some_of_four(at + 4, n - 4) : 0,
                          (int64_t)some_of_four(at, n));
}
INLINE void put_halves(uint16_t *at, halves value) { _mm_storeu_si128((__m128i *)at, value); }
INLINE void put_some_halves(uint16_t *at, halves value, ptrdiff_t n) {
    put_some_of_eight(at, value, n);
}
INLINE void stream_halves(uint16_t *at, halves value) { _mm_stream_si128((__m128i *)at, value); }
INLINE words words_of(halves value) {
    return (words)_mm256_slli_epi32(_mm256_cvtepu16_epi32(value), 16);
}
INLINE halves halves_of(words value) {
    const __m256i lower = _mm256_srai_epi32((__m256i)value, 16); /* so that none is out of range */
    return _mm_packs_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
}

#else

typedef uint64_t halves;

INLINE halves load_halves(const uint16_t *at) { return some_of_four(at, 4); }
static NOINLINE halves some_halves(const uint16_t *at, ptrdiff_t n) { return some_of_four(at, n); }
INLINE void put_halves(uint16_t *at, halves value) { put_some_of_four(at, value, 4); }
static NOINLINE void put_some_halves(uint16_t *at, halves value, ptrdiff_t n) {
    put_some_of_four(at, value, n);
}
#ifdef __SSE2__
INLINE void stream_halves(uint16_t *at, halves value) {
    _mm_stream_si64((long long *)at, (long long)value);
}
INLINE words words_of(halves value) {
    return (words)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128((int64_t)value));
}
INLINE halves halves_of(words value) {
    const __m128i lower = _mm_srai_epi32((__m128i)value, 16); /* so that none is out of range */
    return (halves)_mm_cvtsi128_si64(_mm_packs_epi32(lower, lower));
}
#else
INLINE void stream_halves(uint16_t *at, halves value) { put_halves(at, value); }
typedef uint16_t lanes_of_halves __attribute__((vector_size(8)));
INLINE words words_of(halves value) {
    return __builtin_convertvector((lanes_of_halves)value, words) << 16;
}
INLINE halves halves_of(words value) {
    return (halves)__builtin_convertvector(value >> 16, lanes_of_halves);
}
#endif
#endif
#endif

INLINE words chosen(words mask, words a, words b) { return (mask & a) | (~mask & b); }

/* A bfloat16 is the upper half of a float. To the nearest, of two the even one. Nothing is done for a
   NaN: one that is made of a bfloat16, or by an operation, has a lower half of zeros, and so has what
   take_values makes of others. */
INLINE floats floats_of_bf16(halves value) { return (floats)words_of(value); }
INLINE halves bf16_of_floats(floats value) {
#if defined(__AVX512F__)
    const __m512i bits = (__m512i)value;
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    const __m512i more = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff),
                                                 _mm512_set1_epi32(0x8000));
    return halves_of((words)_mm512_add_epi32(bits, more));
#else
    const words bits = (words)value;
    return halves_of(bits + (0x7fff + (bits >> 16 & 1)));
#endif
}
#if defined(__AVX512F__)
/* Of two vectors one, rounded up where the lower half is more than a half: half of the steps. */
INLINE __m512i bf16_of_two(floats a, floats b) {
    const __m512i places = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34,
                                            32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                            2, 0);
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16((short)0x8000);
    const __m512i upper = _mm512_permutex2var_epi16((__m512i)a, _mm512_add_epi16(places, one),
                                                    (__m512i)b);
    const __m512i lower = _mm512_permutex2var_epi16((__m512i)a, places, (__m512i)b);
    /* lower | (upper & 1): of two that are as near, the even one */
    const __m512i rest = _mm512_ternarylogic_epi32(lower, upper, one, 0xf8);
    const __mmask32 is_more = _mm512_cmpgt_epu16_mask(rest, half);
    return _mm512_mask_add_epi16(upper, is_more, upper, one);
}
#endif

/* A float16, too, becomes and is made of the nearest float, whatever the modes of the thread are:
   instructions for it pass over these, and so does the arithmetic in their place. */
#if defined(__AVX512F__)

INLINE floats floats_of_f16(halves value) { return (floats)_mm512_cvtph_ps(value); }
INLINE halves f16_of_floats(floats value) {
    return _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__F16C__)

INLINE floats floats_of_f16(halves value) { return (floats)_mm256_cvtph_ps(value); }
INLINE halves f16_of_floats(floats value) {
    return _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}

#else

enum {
    ONE = 1 << 23,             /* the exponent of a float begins here; that of a float16 is 13 lower, */
    REBIASED = (127 - 15) * ONE, /* and so much less */
    TO_UPPER = 3,              /* from a float16 in the upper half of a word to the places of a float */
};

typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES))); /* which SSE2 compares at once */

static NOINLINE floats floats_of_f16(halves value) {
    const words bits = words_of(value);
    const ints size = (ints)(bits & 0x7fffffff) >> TO_UPPER;
    const ints is_small = size < ONE, is_large = size >= 31 * ONE, is_nan = size > 31 * ONE;
    const ints usual = (size + REBIASED + (is_large & REBIASED)) | (is_nan & ONE / 2);
    /* Subnormal numbers are counts of 2^-24. */
    const floats small = __builtin_convertvector(size >> 13, floats) * 0x1p-24f;
    return (floats)(chosen((words)is_small, (words)small, (words)usual) | (bits & 0x80000000));
}
static NOINLINE halves f16_of_floats(floats value) {
    const words bits = (words)value;
    const ints size = (ints)(bits & 0x7fffffff);
    const ints is_small = size < REBIASED + ONE, is_large = size >= REBIASED + 31 * ONE;
    const ints is_nan = size > 255 * ONE;
    const ints large = 31 << 10 | (is_nan & (1 << 9 | (size >> 13 & 0x3ff)));
    const ints usual = (size - REBIASED + 0xfff + (size >> 13 & 1)) >> 13;
    /* All of this is exact, up to the choice of the nearer count, or of the even one. */
    const floats units = (floats)(size & is_small) * 0x1p24f;
    const ints whole = __builtin_convertvector(units, ints);
    const floats rest = units - __builtin_convertvector(whole, floats);
    const ints up = (ints)(rest > 0.5f) | ((ints)(rest == 0.5f) & -(whole & 1));
    const words small = chosen((words)is_small, (words)(whole - up), (words)usual);
    return halves_of(chosen((words)is_large, (words)large, small) << 16 | (bits & 0x80000000));
}

#endif

/* What micro.h asks of a type that is computed in: real; vector, of LANES lanes of it; whether squares are
   LIMITED, and may leave its range. And of a storage type: stored; how vectors of it are loaded, and how
   some side by side are stored; whether PAIRS of them are rounded together. */

/* float32 */
typedef float stored_f32, real_f32;
typedef floats vector_f32;
typedef any_floats any_vector_f32;
enum { LANES_f32 = FLOATS, LIMITED_f32 = 1, PAIRS_f32 = 0 };
INLINE vector_f32 all_f32(float value) { return all_floats(value); }
INLINE vector_f32 some_reals_f32(const float *at, ptrdiff_t n) { return some_floats(at, n); }
INLINE float value_at_f32(const stored_f32 *at) { return *at; }
INLINE vector_f32 load_f32(const stored_f32 *at) { return FLOATS_AT(at); }
INLINE vector_f32 load_some_f32(const stored_f32 *at, ptrdiff_t n) { return some_floats(at, n); }
INLINE void store_f32(stored_f32 *at, const vector_f32 *value, const int n) {
    EACH (v, n)
        FLOATS_AT(at + v * FLOATS) = value[v];
}
INLINE void store_some_f32(stored_f32 *at, vector_f32 value, ptrdiff_t n) {
    put_floats(at, value, n);
}
INLINE void stream_f32(stored_f32 *at, const vector_f32 *value, const int n) {
    EACH (v, n)
        stream(at + v * FLOATS, (doubles)value[v]);
}
INLINE vector_f32 rounded_f32(vector_f32 value) { return value; }
INLINE vector_f32 joined_f32(vector_f32 a, vector_f32 b, ptrdiff_t n) {
    return joined_floats(a, b, n);
}
INLINE vector_f32 rectified_f32(vector_f32 value, unsigned *passed) {
    return rectified_floats(value, passed);
}
INLINE vector_f32 chosen_f32(vector_f32 value, unsigned bits) { return chosen_floats(value, bits); }
/* first: the sum begins with these, not with zero, which would cost an addition. */
INLINE void add_lanes_f32(doubles *to, vector_f32 value, const int first) {
    doubles halves[2];
    widen_floats(value, halves);
    to[0] = first ? halves[0] : to[0] + halves[0];
    to[1] = first ? halves[1] : to[1] + halves[1];
}

/* float64 */
typedef double stored_f64, real_f64;
typedef doubles vector_f64;
typedef any_doubles any_vector_f64;
enum { LANES_f64 = DOUBLES, LIMITED_f64 = 0, PAIRS_f64 = 0 };
INLINE vector_f64 all_f64(double value) { return all_doubles(value); }
INLINE vector_f64 some_reals_f64(const double *at, ptrdiff_t n) { return some_doubles(at, n); }
INLINE double value_at_f64(const stored_f64 *at) { return *at; }
INLINE vector_f64 load_f64(const stored_f64 *at) { return DOUBLES_AT(at); }
INLINE vector_f64 load_some_f64(const stored_f64 *at, ptrdiff_t n) { return some_doubles(at, n); }
INLINE void store_f64(stored_f64 *at, const vector_f64 *value, const int n) {
    EACH (v, n)
        DOUBLES_AT(at + v * DOUBLES) = value[v];
}
INLINE void store_some_f64(stored_f64 *at, vector_f64 value, ptrdiff_t n) {
    put_doubles(at, value, n);
}
INLINE void stream_f64(stored_f64 *at, const vector_f64 *value, const int n) {
    EACH (v, n)
        stream(at + v * DOUBLES, value[v]);
}
INLINE vector_f64 rounded_f64(vector_f64 value) { return value; }
INLINE vector_f64 joined_f64(vector_f64 a, vector_f64 b, ptrdiff_t n) {
    return joined_doubles(a, b, n);
}
INLINE vector_f64 rectified_f64(vector_f64 value, unsigned *passed) {
    return rectified_doubles(value, passed);
}
INLINE vector_f64 chosen_f64(vector_f64 value, unsigned bits) { return chosen_doubles(value, bits); }
INLINE void add_lanes_f64(doubles *to, vector_f64 value, const int first) {
    to[0] = first ? value : to[0] + value;
}

/* bfloat16, computed in float32 */
typedef uint16_t stored_bf16;
enum { PAIRS_bf16 = VECTOR_BYTES == 64 };
INLINE floats load_bf16(const stored_bf16 *at) { return floats_of_bf16(load_halves(at)); }
INLINE floats load_some_bf16(const stored_bf16 *at, ptrdiff_t n) {
    return floats_of_bf16(some_halves(at, n));
}
INLINE float value_at_bf16(const stored_bf16 *at) { return load_some_bf16(at, 1)[0]; }
INLINE void store_bf16(stored_bf16 *at, const floats *value, const int n) {
    int v = 0;
#if defined(__AVX512F__)
    for (; v + 1 < n; v += 2)
        _mm512_storeu_si512(at + v * FLOATS, bf16_of_two(value[v], value[v + 1]));
#endif
    for (; v < n; v++)
        put_halves(at + v * FLOATS, bf16_of_floats(value[v]));
}
INLINE void store_some_bf16(stored_bf16 *at, floats value, ptrdiff_t n) {
    put_some_halves(at, bf16_of_floats(value), n);
}
INLINE void stream_bf16(stored_bf16 *at, const floats *value, const int n) {
    int v = 0;
#if defined(__AVX512F__)
    for (; v + 1 < n; v += 2)
        stream(at + v * FLOATS, (doubles)bf16_of_two(value[v], value[v + 1]));
#endif
    for (; v < n; v++)
        stream_halves(at + v * FLOATS, bf16_of_floats(value[v]));
}
INLINE floats rounded_bf16(floats value) { return floats_of_bf16(bf16_of_floats(value)); }

/* float16, computed in float32 */
typedef uint16_t stored_f16;
enum { PAIRS_f16 = 0 };
INLINE floats load_f16(const stored_f16 *at) { return floats_of_f16(load_halves(at)); }
INLINE floats load_some_f16(const stored_f16 *at, ptrdiff_t n) {
    return floats_of_f16(some_halves(at, n));
}
INLINE float value_at_f16(const stored_f16 *at) { return load_some_f16(at, 1)[0]; }
INLINE void store_f16(stored_f16 *at, const floats *value, const int n) {
    EACH (v, n)
        put_halves(at + v * FLOATS, f16_of_floats(value[v]));
}
INLINE void store_some_f16(stored_f16 *at, floats value, ptrdiff_t n) {
    put_some_halves(at, f16_of_floats(value), n);
}
INLINE void stream_f16(stored_f16 *at, const floats *value, const int n) {
    EACH (v, n)
        stream_halves(at + v * FLOATS, f16_of_floats(value[v]));
}
INLINE floats rounded_f16(floats value) { return floats_of_f16(f16_of_floats(value)); }

#endif
