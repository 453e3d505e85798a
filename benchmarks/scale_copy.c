/* The limit that a pass is held to: arrays of the same bytes read and written once, with nothing
   but a multiplication between. Streaming stores save the reading of the lines that are written,
   ordinary ones leave them in the cache: which is faster depends on the size, so both are here. */
#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
typedef __m512 vector;
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define STREAM _mm512_stream_ps
#define SET _mm512_set1_ps
#define ADD _mm512_add_ps
#define MUL _mm512_mul_ps
#elif defined(__AVX2__)
enum { LANES = 8 };
typedef __m256 vector;
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define STREAM _mm256_stream_ps
#define SET _mm256_set1_ps
#define ADD _mm256_add_ps
#define MUL _mm256_mul_ps
#elif defined(__SSE2__)
enum { LANES = 4 };
typedef __m128 vector;
#define LOAD _mm_loadu_ps
#define STORE _mm_storeu_ps
#define STREAM _mm_stream_ps
#define SET _mm_set1_ps
#define ADD _mm_add_ps
#define MUL _mm_mul_ps
#else
enum { LANES = 1 };
typedef float vector;
#define LOAD *
#define STORE(to, value) (*(to) = (value))
#define STREAM STORE
#define SET
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#endif

/* One loop for each number of inputs and each kind of store, so that no loop decides anything. */
#define LOOP(store, value)                                                                         \
    for (; i + LANES <= end; i += LANES)                                                           \
        store(out + i, value)
#define ONE MUL(LOAD(x + i), factor)
#define TWO MUL(ADD(LOAD(x + i), LOAD(other + i)), factor)

static void scale(float *out, const float *x, const float *other, size_t i, size_t end, float by,
                  int stream) {
    const vector factor = SET(by);
    for (; i < end && (uintptr_t)(out + i) % 64; i++)
        out[i] = (other ? x[i] + other[i] : x[i]) * by;
    if (other && stream) LOOP(STREAM, TWO);
    else if (other) LOOP(STORE, TWO);
    else if (stream) LOOP(STREAM, ONE);
    else LOOP(STORE, ONE);
    for (; i < end; i++)
        out[i] = (other ? x[i] + other[i] : x[i]) * by;
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#endif
}

/* out = x * by, or (x + other) * by unless other is NULL. */
void scale_copy(float *out, const float *x, const float *other, size_t size, float by, int stream,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++)
        scale(out, x, other, size * part / threads, size * (part + 1) / threads, by, stream);
}
