/* The sums of a block of a sheet around its column means, and their merging in float64. */

/* Add up `vectors` vectors of columns of some rows, in registers. The sums start at zero, because a
   sum of sums of a few rows is rounded less often than one sum: beside an outlier of 3000 standard
   deviations, a variance was off by 1e-6 of its value. */
INLINE void T(sum_rows)(const stored *x, ptrdiff_t rows, ptrdiff_t row_stride,
                        ptrdiff_t next,      /* how many rows are fetched, each some bands further on */
                        const int fetches,   /* whether there are any, as a literal */
                        const int vectors,
                        ptrdiff_t lanes,     /* of a vector */
                        const real *shift,   /* NULL: sum x; else x - shift and its square */
                        const real *factor,  /* of x, or NULL */
                        real *total, real *square) {
    vector shifts[SIDE_BY_SIDE], factors[SIDE_BY_SIDE], value;
    vector totals[SIDE_BY_SIDE], squares[SIDE_BY_SIDE];
    EACH (v, vectors) {
        totals[v] = squares[v] = shifts[v] = factors[v] = all(0);
        if (shift)
            shifts[v] = R(reals)(shift + v * LANES_OF, lanes);
        if (factor)
            factors[v] = R(reals)(factor + v * LANES_OF, lanes);
    }
    for (ptrdiff_t j = 0; j < rows; j++, x += row_stride) {
        const stored *to_fetch = j < next ? x + BANDS_AHEAD * BAND * row_stride : x;
        EACH (v, vectors) {
            if (fetches && BEGINS_LINE(v))
                fetch(to_fetch + v * LANES_OF);
            value = lanes < LANES_OF ? load_some(x, lanes) : load(x + v * LANES_OF);
            if (factor)
                value *= factors[v];
            if (shift) {
                value -= shifts[v];
                squares[v] += value * value;
            }
            totals[v] += value;
        }
    }
    EACH (v, vectors) {
        REALS(total + v * LANES_OF) += totals[v];
        if (shift)
            REALS(square + v * LANES_OF) += squares[v];
    }
}

/* Add up the columns of a few rows, as many columns at a time as registers hold: memory likes it best
   if that is all of a row. */
INLINE void T(sum_band)(const stored *x, ptrdiff_t rows, ptrdiff_t row_stride, ptrdiff_t next,
                        ptrdiff_t width, const real *shift, const real *factor, real *total,
                        real *square) {
    ptrdiff_t k = 0;
#define COLUMNS_FROM(k) shift ? shift + k : NULL, factor ? factor + k : NULL, total + k, square + k
#define ROWS(vectors, lanes)                                                                       \
    T(sum_rows)(x + k, rows, row_stride, 0, 0, vectors, lanes, COLUMNS_FROM(k))
    for (; next > 0 && width - k >= SIDE_BY_SIDE * LANES_OF; k += SIDE_BY_SIDE * LANES_OF)
        T(sum_rows)(x + k, rows, row_stride, next, 1, SIDE_BY_SIDE, LANES_OF, COLUMNS_FROM(k));
    for (; width - k >= SIDE_BY_SIDE * LANES_OF; k += SIDE_BY_SIDE * LANES_OF)
        ROWS(SIDE_BY_SIDE, LANES_OF);
    if (SIDE_BY_SIDE > 4 && width - k >= 4 * LANES_OF) {
        ROWS(4, LANES_OF);
        k += 4 * LANES_OF;
    }
    for (; k < width; k += LANES_OF)
        ROWS(1, min_of(LANES_OF, width - k));
#undef ROWS
#undef COLUMNS_FROM
}

/* Add up the columns of a sheet, a band of rows after the other; what is not in the cache yet, from
   some row up to another, is fetched BANDS_AHEAD before, if rows are close to each other. */
INLINE void T(sum_sheet)(const stored *x, const struct Sheet *sheet, ptrdiff_t from, ptrdiff_t to,
                         const real *shift, const real *factor, real *total, real *square) {
    const ptrdiff_t stride = sheet->row_stride, fetched = stride <= CLOSE ? to : 0;
    ptrdiff_t n, width, next;
    x += sheet->offset;
    for (ptrdiff_t row = 0; row < sheet->rows + (sheet->tail > 0); row += n, x += n * stride) {
        n = row < sheet->rows ? min_of(BAND, sheet->rows - row) : 1;
        width = row < sheet->rows ? sheet->width : sheet->tail;
        next = row + BANDS_AHEAD * BAND;
        next = next < from ? 0 : fetched - next;
        T(sum_band)(x, n, stride, next, width, shift, factor, total, square);
    }
}

/* Whether a sum of squares is beyond the range of float32, or a NaN. NaN fails every comparison, so
   it is found by what does not hold. No "or", which would look at one column at a time. */
INLINE int T(is_outside)(real square, real smallest) {
    return LIMITED & (!(square < (real)1e38) | (square < smallest));
}

/* The sums of a block, after which so many rows follow, around shifts that are given, or else around
   its column means; return whether all are in range. */
INLINE int T(sum_block)(const stored *x, const struct Sheet *block, ptrdiff_t following, int given,
                        const real *factor, real smallest, struct T(Block) *sums) {
    const ptrdiff_t end = block->rows + following;
    int outside = 0;
    real reciprocal;
    for (ptrdiff_t k = 0; k < block->width; k++)
        sums->total[k] = sums->square[k] = 0;
    if (!given) {
        T(sum_sheet)(x, block, 0, block->rows, NULL, factor, sums->total, sums->square);
        reciprocal = 1 / (real)(block->rows + 1);
        for (ptrdiff_t k = 0; k < block->tail; k++)
            sums->shift[k] = sums->total[k] * reciprocal;
        reciprocal = 1 / (real)block->rows;
        for (ptrdiff_t k = block->tail; k < block->width; k++)
            sums->shift[k] = sums->total[k] * reciprocal;
        for (ptrdiff_t k = 0; k < block->width; k++)
            sums->total[k] = 0;
    }
    T(sum_sheet)(x, block, given ? 0 : block->rows, end, sums->shift, factor, sums->total,
                 sums->square);
    for (ptrdiff_t k = 0; k < block->width; k++)
        outside |= T(is_outside)(sums->square[k], smallest);
    return !outside;
}

/* Powers of two that bring the columns whose squares are out of range into it. */
static void T(scale_columns)(const stored *x, const struct Sheet *block, real smallest,
                             const real *square, real *factor, double *unit) {
    real largest[WIDTH], size;
    ptrdiff_t width;
    int exponent;
    for (ptrdiff_t k = 0; k < block->width; k++)
        largest[k] = 0;
    for (ptrdiff_t j = 0; j < block->rows + (block->tail > 0); j++) {
        width = j < block->rows ? block->width : block->tail;
        for (ptrdiff_t k = 0; k < width; k++) {
            size = T(value_at)(x + block->offset + j * block->row_stride + k);
            size = size < 0 ? -size : size;
            largest[k] = size > largest[k] ? size : largest[k];
        }
    }
    for (ptrdiff_t k = 0; k < block->width; k++) {
        exponent = 0;
        if (T(is_outside)(square[k], smallest) && largest[k] < INFINITY) {
            frexp(largest[k], &exponent);
            exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
        }
        factor[k] = (real)ldexp(1, -exponent);
        unit[k] = ldexp(1, exponent);
    }
}

/* Merge the sums of so many rows into columns of so many rows before. Divided, not multiplied by a
   reciprocal: then the mean of equal values is that value. */
INLINE void T(merge_block)(const struct T(Block) *sums, const double *unit, /* or NULL */
                           ptrdiff_t first, ptrdiff_t end, double rows, double before,
                           struct Columns *columns) {
    double share = rows / (before + rows), cross = before * share, mean, delta, u = 1;
    for (ptrdiff_t k = first; k < end; k++) {
        if (unit)
            u = unit[k];
        mean = sums->total[k] / rows;
        if (before == 0) {
            columns->shift[k] = sums->shift[k] * u;
            columns->mean[k] = mean * u;
            columns->m2[k] = (sums->square[k] - sums->total[k] * mean) * (u * u);
        } else {
            delta = (sums->shift[k] * u - columns->shift[k]) + (mean * u - columns->mean[k]);
            columns->mean[k] += delta * share;
            columns->m2[k] +=
                (sums->square[k] - sums->total[k] * mean) * (u * u) + delta * delta * cross;
        }
    }
}

INLINE void T(merge_rows)(const struct T(Block) *sums, const double *unit,
                          const struct Sheet *block, double before, struct Columns *columns) {
    T(merge_block)(sums, unit, 0, block->tail, (double)block->rows + 1, before, columns);
    T(merge_block)(sums, unit, block->tail, block->width, (double)block->rows, before, columns);
}

/* Merge a block of which some columns are out of range, these in units near their largest values. In such
   a unit the digits are those that float32 without limits would give: so they do not depend on the unit
   of x. The other columns keep their sums: no bit of them depends on who is beside them. */
static COLD void T(add_scaled_block)(const void *x, const struct Sheet *block, real smallest,
                                     double before, const struct T(Block) *sums,
                                     struct Columns *columns) {
    struct T(Block) scaled;
    real factor[WIDTH];
    double unit[WIDTH];
    T(scale_columns)(x, block, smallest, sums->square, factor, unit);
    T(sum_block)(x, block, 0, 0, factor, smallest, &scaled);
    for (ptrdiff_t k = 0; k < block->width; k++)
        if (!T(is_outside)(sums->square[k], smallest)) {
            scaled.shift[k] = sums->shift[k];
            scaled.total[k] = sums->total[k];
            scaled.square[k] = sums->square[k];
        }
    T(merge_rows)(&scaled, unit, block, before, columns);
}

/* Merge a block into columns of so many rows before, around whose means it is summed: why that is
   exact enough, add_blocks (moments.pxi) says. The first is summed around its own. */
static void T(add_block)(const void *x, const struct Sheet *block, double least, ptrdiff_t before,
                         ptrdiff_t following, struct Columns *columns) {
    const real smallest = (real)least;
    struct T(Block) sums;
    real mean;
    for (ptrdiff_t k = 0; before > 0 && k < block->width; k++) {
        mean = (real)(columns->shift[k] + columns->mean[k]);
        sums.shift[k] = mean - mean == 0 ? mean : 0; /* what is not finite stays in its block */
    }
    if (T(sum_block)(x, block, following, before > 0, NULL, smallest, &sums))
        T(merge_rows)(&sums, NULL, block, (double)before, columns);
    else
        T(add_scaled_block)(x, block, smallest, (double)before, &sums, columns);
}

/* Add sums of columns, `groups` times CHAINS for each of some channels, to the chains of each. */
INLINE void T(add_to_chains)(const doubles *sum, const int channels, const int groups, int more,
                             double *chain) { /* OUT (channels, CHAINS), and IN, if there are more */
    EACH (r, channels)
        EACH (h, VECTORS_OF_CHAINS) {
            double *to = chain + r * CHAINS + h * DOUBLES;
            const doubles *of_group = sum + r * groups * VECTORS_OF_CHAINS + h;
            doubles value = more ? (doubles)DOUBLES_AT(to) + of_group[0] : of_group[0];
            for (int g = 1; g < groups; g++)
                value += of_group[g * VECTORS_OF_CHAINS];
            DOUBLES_AT(to) = value;
        }
}

/* How far the next run of a channel is, if it is fetched while one is summed. */
INLINE ptrdiff_t T(to_next_run)(ptrdiff_t runs, ptrdiff_t run_stride, ptrdiff_t length) {
    return runs > 1 && length <= T(FETCHED_RUN) ? run_stride : 0;
}

/* The sums of channels that lie `stride` apart, `beside` of them side by side, each of runs of so many
   values, in rows of `width`: of at most SUMMED rows in the type that is computed in, and of those in
   float64. Of the values, times a factor, around a shift for each channel; without one, of the values
   alone. Without a shift, what lies so many bytes from x is fetched, because it will be written.
   once: whether there are no more rows than that, of one run. */
INLINE void T(sum_runs)(const stored *x, ptrdiff_t to_out, ptrdiff_t stride, const int beside,
                        const int once, ptrdiff_t runs, ptrdiff_t run_stride, ptrdiff_t length,
                        const int width,
                        const real *shift, const int scaled, real factor, double *total,
                        double *square) { /* OUT (beside, CHAINS), or NULL */
    enum { MOST = 4 * LANES_OF, HALVES = LANES_OF / DOUBLES };
    const int columns = width * beside < MOST ? width : MOST / beside;
    const int vectors = columns / LANES_OF, groups = columns / CHAINS;
    const ptrdiff_t rows = length / width, tail = length % width;
    doubles sum[8], sum_of_squares[8];
    vector band_sum[4], band_squares[4], shifts[4], value;
    const ptrdiff_t next_run = T(to_next_run)(runs, run_stride, length);
    const stored *row;
    EACH (r, beside)
        shifts[r] = all(shift ? shift[r] : 0);
    for (int k = 0; k < width; k += columns) {
        EACH (v, beside * columns / DOUBLES)
            sum[v] = sum_of_squares[v] = all_doubles(0);
        for (ptrdiff_t i = 0; i < (once ? 1 : runs); i++) {
            ptrdiff_t j = 0, end;
            row = x + i * run_stride + k;
            do {
                EACH (v, beside * vectors)
                    band_sum[v] = band_squares[v] = all(0);
                for (end = once ? rows : min_of(j + SUMMED, rows); j < end; j++, row += width)
                    EACH (v, beside * vectors) {
                        const stored *at = row + v / vectors * stride + v % vectors * LANES_OF;
                        value = load(at);
                        if (shift && !once && BEGINS_LINE(v % vectors))
                            fetch(at + next_run);
                        if (!shift && BEGINS_LINE(v % vectors))
                            __builtin_prefetch((const char *)at + to_out, 1);
                        if (scaled)
                            value *= factor;
                        if (shift)
                            value -= shifts[v / vectors];
                        if (total)
                            band_sum[v] += value;
                        if (square)
                            band_squares[v] += value * value;
                    }
                if (j == rows && tail) {
                    EACH (v, beside * vectors) {
                        const int column = v % vectors * LANES_OF;
                        const ptrdiff_t lanes = tail - k - column;
                        value = load_some(row + v / vectors * stride + column, lanes);
                        if (scaled)
                            value *= factor;
                        if (shift)
                            value = R(joined)(value - shifts[v / vectors], all(0), lanes);
                        if (total)
                            band_sum[v] += value;
                        if (square)
                            band_squares[v] += value * value;
                    }
                    j++;
                }
                EACH (v, beside * vectors) {
                    if (total)
                        R(add_lanes)(sum + v * HALVES, band_sum[v], once);
                    if (square)
                        R(add_lanes)(sum_of_squares + v * HALVES, band_squares[v], once);
                }
            } while (!once && j < rows + (tail > 0));
        }
        if (total)
            T(add_to_chains)(sum, beside, groups, k > 0, total);
        if (square)
            T(add_to_chains)(sum_of_squares, beside, groups, k > 0, square);
    }
}

/* The sums of a block of a channel around a shift, which is rounded; without one, around its mean. */
INLINE void T(sum_around)(const stored *x, const struct Sheet *block, ptrdiff_t length,
                          const int width, int centred, const int scaled, real factor,
                          double *shift, double *total, double *square) {
    double totals[CHAINS] = {0}, squares[CHAINS] = {0};
    real rounded = 0;
    if (!centred) {
        T(sum_runs)(x, 0, 0, 1, 0, block->runs, block->run_stride, length, width, NULL, scaled,
                    factor, totals, NULL);
        *shift = sum_of_chains(totals) / ((double)block->runs * length);
    }
    *shift = rounded = (real)*shift;
    T(sum_runs)(x, 0, 0, 1, 0, block->runs, block->run_stride, length, width, &rounded, scaled,
                factor, totals, squares);
    *total = sum_of_chains(totals);
    *square = sum_of_chains(squares);
}

static COLD void T(sum_scaled)(const stored *x, const struct Sheet *block, ptrdiff_t length,
                               int centred, real factor, double *shift, double *total,
                               double *square) {
    if (block->width == SHORT_LANES)
        T(sum_around)(x, block, length, SHORT_LANES, centred, 1, factor, shift, total, square);
    else
        T(sum_around)(x, block, length, LANES, centred, 1, factor, shift, total, square);
}

static void T(sum_plane)(const void *data, const struct Sheet *block, ptrdiff_t length,
                         int centred, double unit, double *shift, double *total, double *square) {
    const stored *x = (const stored *)data + block->offset;
    if (unit == 1)
        T(sum_around)(x, block, length, LANES, centred, 0, 1, shift, total, square);
    else
        T(sum_scaled)(x, block, length, centred, (real)(1 / unit), shift, total, square);
}

/* A power of two near the largest magnitude of a channel. In such a unit the digits are those that
   float32 without limits would give: so they do not depend on the unit of x. */
static double T(unit_of)(const void *data, const struct Sheet *sheet) {
    const stored *x = (const stored *)data + sheet->offset;
    double largest = 0, size;
    int exponent = 0;
    for (ptrdiff_t i = 0; i < sheet->runs; i++)
        for (ptrdiff_t k = 0; k < sheet->length; k++) {
            size = fabs((double)T(value_at)(x + i * sheet->run_stride + k));
            largest = size > largest ? size : largest;
        }
    if (largest < INFINITY)
        frexp(largest, &exponent);
    return ldexp(1, max_of(-100, min_of(exponent, 100)));
}

/* The sums of at most AT_ONCE channels, in rows of `width`; in the order of the memory, or side by side. */
INLINE void T(sum_channels)(const stored *x, ptrdiff_t to_out, const struct Sheet *sheet,
                            ptrdiff_t S, const int width, int in_order, const real *shift,
                            double *total, double *square) {
    const int beside = width == SHORT_LANES ? T(CHANNELS_BESIDE) : 1;
    const int once = width == SHORT_LANES && sheet->runs == 1 && sheet->length <= SUMMED * width;
    const ptrdiff_t n = sheet->channels, together = beside > 1 && in_order ? 0 : n - n % beside;
    double totals[AT_ONCE * CHAINS], squares[AT_ONCE * CHAINS];
    ptrdiff_t c = 0;
#define CHANNELS(beside, once)                                                                     \
    T(sum_runs)(x + c * S, to_out, S, beside, once, sheet->runs, sheet->run_stride, sheet->length, \
                width, shift ? shift + c : NULL, 0, 1, total ? totals + c * CHAINS : NULL,         \
                square ? squares + c * CHAINS : NULL)
    for (; once && c < together; c += beside)
        CHANNELS(beside, 1);
    for (; once && beside > 1 && c < n; c++)
        CHANNELS(1, 1);
    for (; c < together; c += beside)
        CHANNELS(beside, 0);
    for (; beside > 1 && c < n; c++)
        CHANNELS(1, 0);
#undef CHANNELS
    if (total)
        fold_chains(totals, n, total);
    if (square)
        fold_chains(squares, n, square);
}

/* The sums of at most AT_ONCE channels of one block each, around their means, or around 0. Sweep by
   sweep, because the second over a channel has to wait for its mean; meanwhile the CPU is at the next
   channel. */
INLINE void T(sum_in_rows)(const stored *x, ptrdiff_t to_out, const struct Sheet *sheet,
                           ptrdiff_t S, const int width, int in_order, int centred, real *shift,
                           double *total, double *square) { /* OUT */
    const double count = (double)sheet->runs * sheet->length;
    if (!centred) {
        T(sum_channels)(x, to_out, sheet, S, width, in_order, NULL, NULL, square);
        return;
    }
    T(sum_channels)(x, to_out, sheet, S, width, in_order, NULL, total, NULL);
    for (ptrdiff_t c = 0; c < sheet->channels; c++)
        shift[c] = (real)(total[c] / count);
    T(sum_channels)(x, 0, sheet, S, width, 0, shift, total, square);
}

static void T(channel_moments)(const struct Pass *p, const struct Sheet *sheet, double least,
                               struct Columns *into) {
    const stored *x = (const stored *)p->x + sheet->offset;
    const ptrdiff_t S = p->geometry.S, n = sheet->channels;
    const double count = (double)sheet->runs * sheet->length;
    const real smallest = (real)least;
    const int centred = p->centred;
    /* A store waits until its line is read, unless it goes past the cache. Not along long rows: LONG_ROW
       says why. */
    const int fetches = p->kind == NORMALISE && !p->stream && p->geometry.pieces == 1
                        && sheet->runs * sheet->length < LONG_ROW;
    const ptrdiff_t to_out = fetches ? (char *)p->out - (char *)p->x : 0;
    /* By value, the next channels have been fetched; others are read from memory faster in its order. */
    const int in_order = p->stream && !p->geometry.by_value;
    double total[AT_ONCE], square[AT_ONCE], unit;
    real shift[AT_ONCE];
    int outside = 0;
    if (sheet->width == SHORT_LANES)
        T(sum_in_rows)(x, to_out, sheet, S, SHORT_LANES, in_order, centred, shift, total, square);
    else
        T(sum_in_rows)(x, to_out, sheet, S, LANES, in_order, centred, shift, total, square);
    for (ptrdiff_t c = 0; c < n; c++)
        outside |= T(is_outside)((real)square[c], smallest);
    for (ptrdiff_t c = 0; c < n; c++) {
        into->shift[c] = centred ? shift[c] : 0;
        into->mean[c] = centred ? total[c] / count : 0;
        into->m2[c] = centred ? square[c] - total[c] * into->mean[c] : square[c];
    }
    for (ptrdiff_t c = 0; outside && c < n; c++)
        if (T(is_outside)((real)square[c], smallest)) {
            struct Sheet channel = *sheet;
            channel.offset += c * S;
            unit = T(unit_of)(p->x, &channel);
            into->shift[c] = 0;
            T(sum_scaled)(x + c * S, sheet, sheet->length, !centred, (real)(1 / unit),
                          into->shift + c, total, square);
            into->shift[c] *= unit;
            into->mean[c] = centred ? *total / count : 0;
            into->m2[c] = (centred ? *square - *total * into->mean[c] : *square) * (unit * unit);
            into->mean[c] *= unit;
        }
}
