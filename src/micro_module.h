/* A module of the micro-kernels for one instruction set: a _micro_*.c names it and includes this. */

#include <Python.h>
#include <math.h>
#include "_core.h" /* made by Cython of what _core.pyx calls public */
#include "lanes.h"

enum { /* what `way` says of a loop, as a literal: the compiler keeps what it needs */
    BACKWARD = 1,   /* grad_input is written, not y */
    STREAM = 2,     /* past the cache, where a loop has a form for it: whole cache lines */
    WEIGHTED = 4,   /* a channel has several weights; grad_output has its own as a coefficient */
    BY_COLUMN = 8,  /* coefficients, or means, are for a column each, not one for all */
    BY_VALUE = 16,  /* a weight and a bias beside each value of a run */
    BY_ROW = 32,    /* x is normalised first, by what each row has */
    MEANS = 64,     /* means go along with the columns */
    FUSED = 128,    /* steps go along with what is written */
    FETCHES = 256,  /* what is read next is fetched */
};

enum {
    WORTH_A_TABLE = 4096, /* values */
    /* Bytes from what is read to what is fetched, where it is streamed: no whole page, which would take
       the same places of the L1 cache. */
    FETCHED_AHEAD = 3 << 10,
    ALIGNED_RUN = 256,    /* values from which a run is worth a short start up to alignment */
    FILLED_ROW = 1 << 11, /* bytes of rows that are too long to fill lines before they are streamed */
    /* Of a table of coefficients: more than WIDTH, so that a row can start within a line and end within a
       step; and its rows do not lie whole pages apart, where they would fight for the same places of
       the L1 cache. */
    TABLE_WIDTH = WIDTH + 6 * LINE / 4,
    /* Of sums of columns. Arrays of them that are added to together lie neither whole pages apart nor a
       vector more, where a load would take the store before it for one to the same place. */
    SUMS_WIDTH = WIDTH + 16 * LINE / 4,
};

INLINE ptrdiff_t min_of(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
INLINE ptrdiff_t max_of(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

/* Bits are kept in the order of little-endian words, on any machine. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define LITTLE_ENDIAN_64(word) (word)
#define LITTLE_ENDIAN_32(word) (word)
#else
#define LITTLE_ENDIAN_64(word) __builtin_bswap64(word)
#define LITTLE_ENDIAN_32(word) __builtin_bswap32(word)
#endif

/* Words of which some bits are another thread's, or are not written yet. They are kept until there are 64,
   or up to the end: a locked instruction waits until all that was streamed is written. At the end of every
   row, it made training of 64x1024x14x14 with ReLU a tenth slower (benchmarks/compare.py). */
struct SharedWords {
    int n;
    struct {
        uint64_t *word, own, value;
    } of[64];
};

static NOINLINE void put_shared(struct SharedWords *shared) {
    for (int i = 0; i < shared->n; i++) {
        const uint64_t others = ~LITTLE_ENDIAN_64(shared->of[i].own);
        const uint64_t value = LITTLE_ENDIAN_64(shared->of[i].value);
        uint64_t *word = shared->of[i].word, before = __atomic_load_n(word, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(word, &before, (before & others) | value, 1,
                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
    shared->n = 0;
}

/* Bits that are put into an array one after the other; other threads may be putting others into the
   first word of them and the last. */
struct Bits {
    uint64_t *array;
    ptrdiff_t next;  /* the place of the next bit, of which those before, in its word, are held, ... */
    ptrdiff_t first; /* ... from this one of the array on */
    uint64_t held;
    struct SharedWords *shared;
};

static NOINLINE void keep_part_of_word(const struct Bits *bits) {
    struct SharedWords *shared = bits->shared;
    const ptrdiff_t n = bits->next - bits->first; /* less than a word */
    if (n == 0)
        return;
    if (shared->n == sizeof shared->of / sizeof *shared->of)
        put_shared(shared);
    shared->of[shared->n].word = bits->array + (size_t)bits->first / 64;
    shared->of[shared->n].own = (((uint64_t)1 << n) - 1) << (size_t)bits->first % 64;
    shared->of[shared->n++].value = bits->held;
}

/* Go on elsewhere. */
static NOINLINE void seek_bit(struct Bits *bits, ptrdiff_t place) {
    keep_part_of_word(bits);
    bits->held = 0;
    bits->first = bits->next = place;
}

INLINE void put_bits(struct Bits *bits, uint64_t values, ptrdiff_t lanes) {
    /* Unsigned, where places are divided: by a shift, and no more. */
    const int filled = (size_t)bits->next % 64, left = filled + (int)lanes - 64;
    const uint64_t value = lanes < 64 ? values & (((uint64_t)1 << lanes) - 1) : values;
    bits->held |= value << filled;
    bits->next += lanes;
    if (left < 0)
        return;
    if ((size_t)bits->first % 64 == 0)
        bits->array[(size_t)bits->first / 64] = LITTLE_ENDIAN_64(bits->held);
    else {
        struct Bits part = *bits;
        part.next -= left;
        keep_part_of_word(&part);
    }
    bits->held = left > 0 ? value >> (lanes - left) : 0;
    bits->first = bits->next - left;
}

/* At least 16 bits of an array from some place on, and what follows them in four bytes. */
INLINE unsigned bits_at(const unsigned char *array, ptrdiff_t place) {
    uint32_t word;
    memcpy(&word, array + place / 8, sizeof word);
    return LITTLE_ENDIAN_32(word) >> place % 8;
}

/* Lines that are filled before they are streamed, because rows begin and end within them: what is stored
   in two parts is read from memory first. */
struct Lines {
    char *to;             /* the line that the first bytes are of */
    ptrdiff_t begin, end; /* of what is filled */
    char bytes[4 * FILLED_ROW + LINE] __attribute__((aligned(LINE)));
};

_Static_assert(FILLED_ROW / 2 <= WIDTH, "a row that fills lines is a row of sums of columns");

static void begin_lines(struct Lines *lines, void *out) {
    lines->begin = lines->end = (uintptr_t)out % LINE;
    lines->to = (char *)out - lines->end;
}

/* Stream all lines that are full, after so many bytes more; what begins or ends within one is stored: at
   first the rest of a line, and all that is left at last. */
static void stream_lines(struct Lines *lines, ptrdiff_t more, int at_last) {
    const ptrdiff_t full = (lines->end + more) / LINE * LINE;
    ptrdiff_t k = 0;
    lines->end += more;
    if (lines->begin > 0 && full > 0) {
        memcpy(lines->to + lines->begin, lines->bytes + lines->begin, LINE - lines->begin);
        lines->begin = 0;
        k = LINE;
    }
    for (; k < full; k += VECTOR_BYTES)
        stream(lines->to + k, (doubles)DOUBLES_AT(lines->bytes + k));
    lines->to += full;
    lines->end -= full;
    if (full > 0)
        memcpy(lines->bytes, lines->bytes + full, LINE);
    if (at_last && lines->end > lines->begin)
        memcpy(lines->to + lines->begin, lines->bytes + lines->begin, lines->end - lines->begin);
}

/* The power of two at or below the root of a number that is not negative, from 2^-100 to 2^100; 1 for a
   NaN. Half of the exponent tells, where a root takes as long as ten values. */
INLINE double unit_of_root(double value) {
    union {
        double number;
        uint64_t bits;
    } unit = {value < 0x1p200 ? value > 0x1p-200 ? value : 0x1p-200
                              : value >= 0x1p200 ? 0x1p200 : 1};
    unit.bits = ((unit.bits >> 52) + 1023) >> 1 << 52;
    return unit.number;
}

/* Of all NaNs one, whose lower half is zero as a float: rounding to bfloat16 counts on it. */
INLINE double plain_nan(double value) { return value == value ? value : NAN; }

/* n values per channel, as the caller has them: float32, float64, or the same for all. */
static NOINLINE void take_values(const struct PerChannel *p, ptrdiff_t first, ptrdiff_t n, double *values) {
    if (p->single)
        for (ptrdiff_t c = 0; c < n; c++)
            values[c] = plain_nan(p->single[first + c]);
    else if (p->double_)
        for (ptrdiff_t c = 0; c < n; c++)
            values[c] = plain_nan(p->double_[first + c]);
    else
        for (ptrdiff_t c = 0; c < n; c++)
            values[c] = p->absent;
}

/* Whether no channel would be divided by the root of zero, or of less; a NaN stays a NaN. */
static int are_usable(const struct PerChannel *var, ptrdiff_t n, double eps) {
    double values[AT_ONCE];
    int unusable = 0;
    ptrdiff_t step;
    for (ptrdiff_t first = 0; first < n; first += step) {
        step = min_of(AT_ONCE, n - first);
        take_values(var, first, step, values);
        for (ptrdiff_t c = 0; c < step; c++) /* no early end, so that it is done with vectors */
            unusable |= values[c] + eps <= 0;
    }
    return !unusable;
}

/* Values that repeat after `period` channels. */
static void take_in_turn(const struct PerChannel *p, ptrdiff_t first, ptrdiff_t n, ptrdiff_t period,
                         double *values) {
    ptrdiff_t c = first % period, step;
    if (!p->single && !p->double_)
        period = n + c;
    for (ptrdiff_t done = 0; done < n; done += step, c = 0) {
        step = min_of(n - done, period - c);
        take_values(p, c, step, values + done);
    }
}

/* n sums of gradients from their chains: side by side, because one by one takes as long as adding up a
   short plane. */
static void fold_sums(double *totals, double *products, ptrdiff_t n, struct Sums *into) {
    double total[AT_ONCE], product[AT_ONCE];
    fold_chains(totals, n, total);
    fold_chains(products, n, product);
    for (ptrdiff_t k = 0; k < n; k++)
        into[k] = (struct Sums){total[k], product[k]};
}

/* The same once AT_ONCE are there; return how many are left. */
INLINE ptrdiff_t fold_full(double *totals, double *products, ptrdiff_t n, struct Sums **into) {
    if (n < AT_ONCE)
        return n;
    fold_sums(totals, products, n, *into);
    *into += n;
    return 0;
}

/* The moments of a channel from those of its n > 1 columns, around a shift; the first `more` of them
   have one more row. Each sum is that of sum_of. */
static struct Moments fold_columns(const struct Columns *columns, ptrdiff_t n, double rows,
                                   ptrdiff_t more, double count, double shift) {
    double mean = 0, sum = 0;
    for (int squares = 0; squares < 2; squares++) {
        doubles lane[VECTORS_OF_CHAINS], value, weight;
        EACH (v, VECTORS_OF_CHAINS)
            lane[v] = all_doubles(0);
        for (ptrdiff_t k = 0; k < n; k += CHAINS)
            EACH (v, VECTORS_OF_CHAINS) {
                const ptrdiff_t at = k + v * DOUBLES, left = n - at;
                weight = joined_doubles(all_doubles(rows + 1), all_doubles(rows), more - at);
                value = (doubles_at(columns->shift + at, left) - shift)
                        + doubles_at(columns->mean + at, left);
                if (squares)
                    value = doubles_at(columns->m2 + at, left)
                            + weight * ((value - mean) * (value - mean));
                else
                    value *= weight;
                lane[v] += left < DOUBLES ? joined_doubles(value, all_doubles(0), left) : value;
            }
        sum = sum_of_chains((const double *)lane);
        if (!squares)
            mean = sum / count;
    }
    return (struct Moments){count, shift, mean, sum};
}

/* The same of a channel that begins at column k. Where rows repeat, its columns are gathered first: such
   rows have fewer than 2 * NARROW columns. */
static struct Moments fold_channel(const struct Sheet *sheet, const struct Columns *columns,
                                   ptrdiff_t k, ptrdiff_t longer, double count) {
    const ptrdiff_t span = sheet->span, period = sheet->channels * span;
    const size_t bytes = span * sizeof(double);
    struct Columns of_channel = {columns->shift + k, columns->mean + k, columns->m2 + k};
    double shift[2 * NARROW], mean[2 * NARROW], m2[2 * NARROW];
    if (sheet->repeat > 1) {
        for (ptrdiff_t r = 0; r < sheet->repeat; r++) {
            memcpy(shift + r * span, of_channel.shift + r * period, bytes);
            memcpy(mean + r * span, of_channel.mean + r * period, bytes);
            memcpy(m2 + r * span, of_channel.m2 + r * period, bytes);
        }
        of_channel = (struct Columns){shift, mean, m2};
    }
    return fold_columns(&of_channel, span * sheet->repeat, (double)sheet->rows, longer * span,
                        count, columns->shift[k]);
}

/* The same of at most AT_ONCE channels of one column in every repeat, side by side, because a division
   has a long way. The chains are those of sum_of, in its order; those that it has more are zero. */
static void fold_side_by_side(const struct Sheet *sheet, const struct Columns *columns,
                              ptrdiff_t first, ptrdiff_t n, ptrdiff_t longer, double count,
                              struct Moments *into) {
    const double *shift = columns->shift + first;
    double mean[AT_ONCE], chain[CHAINS][AT_ONCE];
    int chains = 1;
    while (chains < CHAINS && chains < sheet->repeat)
        chains *= 2;
    for (int squares = 0; squares < 2; squares++) {
        memset(chain, 0, chains * sizeof *chain);
        for (ptrdiff_t r = 0; r < sheet->repeat; r++) {
            const double rows = (double)(sheet->rows + (r < longer));
            const ptrdiff_t at = r * sheet->channels + first;
            double *sum = chain[r % CHAINS];
            for (ptrdiff_t c = 0; c < n; c++) {
                double value = (columns->shift[at + c] - shift[c]) + columns->mean[at + c];
                if (squares)
                    value = columns->m2[at + c] + rows * ((value - mean[c]) * (value - mean[c]));
                else
                    value *= rows;
                sum[c] += value;
            }
        }
        for (int half = chains / 2; half > 0; half /= 2)
            for (int h = 0; h < half; h++)
                for (ptrdiff_t c = 0; c < n; c++)
                    chain[h][c] += chain[h + half][c];
        for (ptrdiff_t c = 0; c < n; c++)
            if (squares)
                into[c] = (struct Moments){count, shift[c], mean[c], chain[0][c]};
            else
                mean[c] = chain[0][c] / count;
    }
}

/* The moments of the channels of a sheet. */
static void fold(const struct Sheet *sheet, const struct Columns *columns, struct Moments *into) {
    const ptrdiff_t span = sheet->span;
    const ptrdiff_t longer = sheet->tail / (sheet->channels * span); /* repeats with one more row */
    const double count = (double)(span * (sheet->repeat * sheet->rows + longer));
    ptrdiff_t n;
    for (ptrdiff_t c = 0; c < sheet->channels; c += n) {
        n = span > 1 ? 1 : min_of(AT_ONCE, sheet->channels - c);
        if (span > 1)
            into[c] = fold_channel(sheet, columns, c * span, longer, count);
        else if (sheet->repeat > 1)
            fold_side_by_side(sheet, columns, c, n, longer, count, into + c);
        else
            for (ptrdiff_t k = c; k < c + n; k++)
                into[k] = (struct Moments){count, columns->shift[k], columns->mean[k],
                                           columns->m2[k]};
    }
}

/* The statistics of n channels, from the moments of so many values of each. */
static void finish_moments(const struct Pass *p, ptrdiff_t first, ptrdiff_t n,
                           const struct Columns *found) {
    const double count = (double)p->geometry.N * p->geometry.S;
    double *mean = p->statistics + first, *mean_low = mean + p->statistics_stride;
    double *var = mean_low + p->statistics_stride;
    for (ptrdiff_t c = 0; c < n; c++) {
        /* Two-sum (Knuth): mean and mean_low together are the exact sum of the two parts. */
        const double sum = found->shift[c] + found->mean[c], rounded = sum - found->shift[c];
        const double m2 = found->m2[c] / count;
        var[c] = m2 < 0 ? 0 : m2; /* negative by rounding, where all are equal; a NaN stays */
        mean[c] = sum;
        mean_low[c] = (found->shift[c] - (sum - rounded)) + (found->mean[c] - rounded);
    }
    if (!p->centred) /* the mean of the squares takes the place of the variance */
        for (ptrdiff_t c = 0; c < n; c++) {
            var[c] += mean[c] * mean[c];
            mean[c] = mean_low[c] = 0;
        }
}

enum {
    BESIDE = 8, /* rows whose products are added up at a time; or half as many: */
    /* Bytes. Eight rows that are so far apart, of each of two arrays, fill all places that the L1 cache
       has for them (benchmarks/compare.py: backward of planes by row). */
    HALF_PAGE = 1 << 11,
    ROWS_AHEAD = BESIDE, /* from what is added up of gradients to what is fetched */
    BANDS_AHEAD = 2,     /* the same of moments */
    SWEPT_AT_ONCE = 1 << 12, /* values of either array that the L1 cache holds until they are swept again */
    PARTS_BESIDE = 100,    /* the longest parts, in values, that are summed side by side in the cache */
    PARTS_FETCHED = 256,   /* from so many values on, parts from memory are left to the processor, ... */
    PARTS_AHEAD = 8 << 10, /* ... and shorter ones are fetched, so many bytes ahead */
    /* Along long rows in the cache, and in forward sums along rows that are far apart, the processor
       fetches by itself what is next. Elsewhere it is fetched early (benchmarks/compare.py: backward of
       layer norm, training of planes by row). */
    LONG_ROW = 1024,   /* values */
    CLOSE = 2 * WIDTH, /* values from row to row, at most */
    SIDE_BY_SIDE = VECTOR_BYTES == 64 ? 8 : 4, /* vectors whose sums fit the registers */
    SHORT_RUN = 512, /* values that are not worth rows of LANES */
};

_Static_assert(SUMMED % BESIDE == 0, "sums of gradients end with the rows of one step");

/* Names of a type that is computed in, and of one that data are kept in. */
#define PASTE(name, type) name##_##type
#define PASTED(name, type) PASTE(name, type)
#define R(name) PASTED(name, REAL)
#define T(name) PASTED(name, STORAGE)

#define real R(real)
#define vector R(vector)
#define LANES_OF R(LANES)
#define LIMITED R(LIMITED)
#define REALS(address) (*(R(any_vector) *)(address))
#define all R(all)
#define some_reals R(some_reals)

#define stored T(stored)
#define load T(load)
#define load_some T(load_some)

#define REAL f32
#include "micro_finish.h"
#define STORAGE f32
#include "micro.h"
#undef STORAGE
#define STORAGE f16
#include "micro.h"
#undef STORAGE
#define STORAGE bf16
#include "micro.h"
#undef STORAGE
#undef REAL

#define REAL f64
#include "micro_finish.h"
#define STORAGE f64
#include "micro.h"
#undef STORAGE
#undef REAL

static struct Micro table[STORAGES];

#define JOINED(a, b) a##b
#define INIT(name) JOINED(PyInit_, name)
#define QUOTED(name) #name
#define NAME(name) QUOTED(name)

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = NAME(MODULE),
    .m_size = -1,
};

PyMODINIT_FUNC INIT(MODULE)(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *capsule = PyCapsule_New(table, "cbn.micro", NULL);
    table[FLOAT32] = micro_f32;
    table[FLOAT64] = micro_f64;
    table[FLOAT16] = micro_f16;
    table[BFLOAT16] = micro_bf16;
    if (module && capsule && PyModule_AddObjectRef(module, "table", capsule) == 0) {
        Py_DECREF(capsule);
        return module;
    }
    Py_XDECREF(capsule);
    Py_XDECREF(module);
    return NULL;
}
