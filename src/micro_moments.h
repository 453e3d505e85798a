/* The sums of a block of a sheet around its column means, and their merging in float64. */

/* Add up `vectors` vectors of columns of some rows, in registers. The sums start at zero, because a
   sum of sums of a few rows is rounded less often than one sum: beside an outlier of 3000 standard
   deviations, a variance was off by 1e-6 of its value. */
INLINE void T(sum_rows)(const stored *x, ptrdiff_t rows, ptrdiff_t row_stride, const int vectors,
                        ptrdiff_t lanes,     /* of a vector */
                        const real *shift,   /* NULL: sum x; else x - shift and its square */
                        const real *factor,  /* of x, or NULL */
                        real *total, real *square) {
    vector shifts[4], factors[4], totals[4], squares[4], value;
    EACH (v, vectors) {
        totals[v] = squares[v] = all(0);
        if (shift)
            shifts[v] = T(reals)(shift + v * LANES_OF, lanes);
        if (factor)
            factors[v] = T(reals)(factor + v * LANES_OF, lanes);
    }
    for (ptrdiff_t j = 0; j < rows; j++, x += row_stride)
        EACH (v, vectors) {
            if (vectors > 1)
                __builtin_prefetch(x + BAND * row_stride + v * LANES_OF);
            value = lanes < LANES_OF ? load_some(x, lanes) : load(x + v * LANES_OF);
            if (factor)
                value *= factors[v];
            if (shift) {
                value -= shifts[v];
                squares[v] += value * value;
            }
            totals[v] += value;
        }
    EACH (v, vectors) {
        REALS(total + v * LANES_OF) += totals[v];
        if (shift)
            REALS(square + v * LANES_OF) += squares[v];
    }
}

/* Add up the columns of a few rows, as many columns at a time as registers hold. */
INLINE void T(sum_band)(const stored *x, ptrdiff_t rows, ptrdiff_t row_stride, ptrdiff_t width,
                        const real *shift, const real *factor, real *total, real *square) {
    ptrdiff_t k = 0;
#define COLUMNS_FROM(k) shift ? shift + k : NULL, factor ? factor + k : NULL, total + k, square + k
    for (; width - k >= 4 * LANES_OF; k += 4 * LANES_OF)
        T(sum_rows)(x + k, rows, row_stride, 4, LANES_OF, COLUMNS_FROM(k));
    for (; width - k >= LANES_OF; k += LANES_OF)
        T(sum_rows)(x + k, rows, row_stride, 1, LANES_OF, COLUMNS_FROM(k));
    if (k < width)
        T(sum_rows)(x + k, rows, row_stride, 1, width - k, COLUMNS_FROM(k));
#undef COLUMNS_FROM
}

/* Add up the columns of a sheet, a band of rows after the other. */
INLINE void T(sum_sheet)(const stored *x, const struct Sheet *sheet, const real *shift,
                         const real *factor, real *total, real *square) {
    ptrdiff_t n;
    x += sheet->offset;
    for (ptrdiff_t rest = sheet->rows; rest > 0; rest -= n, x += n * sheet->row_stride) {
        n = min_of(BAND, rest);
        T(sum_band)(x, n, sheet->row_stride, sheet->width, shift, factor, total, square);
    }
    if (sheet->tail)
        T(sum_band)(x, 1, 0, sheet->tail, shift, factor, total, square);
}

/* Whether a sum of squares is beyond the range of float32, or a NaN. NaN fails every comparison, so
   it is found by what does not hold. No "or", which would look at one column at a time. */
INLINE int T(is_outside)(real square, real smallest) {
    return LIMITED & (!(square < (real)1e38) | (square < smallest));
}

/* The sums of a block around shifts that are given, or else around its column means; return whether
   all are in range. */
INLINE int T(sum_block)(const stored *x, const struct Sheet *block, const int given,
                        const real *factor, real smallest, struct T(Block) *sums) {
    int outside = 0;
    real reciprocal;
    for (ptrdiff_t k = 0; k < block->width; k++)
        sums->total[k] = sums->square[k] = 0;
    if (!given) {
        T(sum_sheet)(x, block, NULL, factor, sums->total, sums->square);
        reciprocal = 1 / (real)(block->rows + 1);
        for (ptrdiff_t k = 0; k < block->tail; k++)
            sums->shift[k] = sums->total[k] * reciprocal;
        reciprocal = 1 / (real)block->rows;
        for (ptrdiff_t k = block->tail; k < block->width; k++)
            sums->shift[k] = sums->total[k] * reciprocal;
        for (ptrdiff_t k = 0; k < block->width; k++)
            sums->total[k] = 0;
    }
    T(sum_sheet)(x, block, sums->shift, factor, sums->total, sums->square);
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
        /* The others keep the very bits they would have had. */
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

/* Merge a block into columns of so many rows before, around whose means it is summed: why that is
   exact enough, add_blocks (moments.pxi) says. The first is summed around its own. */
static void T(add_block)(const void *x, const struct Sheet *block, double least, ptrdiff_t before,
                         struct Columns *columns) {
    const real smallest = (real)least;
    struct T(Block) sums;
    real factor[WIDTH], mean;
    double unit[WIDTH];
    int inside;
    for (ptrdiff_t k = 0; before > 0 && k < block->width; k++) {
        mean = (real)(columns->shift[k] + columns->mean[k]);
        sums.shift[k] = mean - mean == 0 ? mean : 0; /* what is not finite stays in its block */
    }
    inside = before > 0 ? T(sum_block)(x, block, 1, NULL, smallest, &sums)
                        : T(sum_block)(x, block, 0, NULL, smallest, &sums);
    if (inside) {
        T(merge_rows)(&sums, NULL, block, (double)before, columns);
        return;
    }
    /* In a unit near the largest value of the column, the digits are those that float32 without
       limits would give: so they do not depend on the unit of x. */
    T(scale_columns)(x, block, smallest, sums.square, factor, unit);
    T(sum_block)(x, block, 0, factor, smallest, &sums);
    T(merge_rows)(&sums, unit, block, (double)before, columns);
}

/* The sums of runs of so many values, times a factor, around a shift, in rows of `width`: of at most SUMMED rows in the
   type that is computed in, and of those in float64. */
INLINE void T(sum_runs)(const stored *x, ptrdiff_t runs, ptrdiff_t run_stride, ptrdiff_t length,
                        const int width, const int centred, real shift, const int scaled,
                        real factor, double *total, double *square) {
    enum { MOST = 4 * LANES_OF, HALVES = LANES_OF / DOUBLES };
    const int columns = width < MOST ? width : MOST, vectors = columns / LANES_OF;
    const ptrdiff_t rows = length / width, tail = length % width;
    double totals[LANES], squares[LANES];
    doubles sum[8], sum_of_squares[8];
    vector band_sum[4], band_squares[4], value;
    const stored *row;
    for (int k = 0; k < width; k += columns) {
        EACH (v, columns / DOUBLES)
            sum[v] = sum_of_squares[v] = all_doubles(0);
        for (ptrdiff_t i = 0; i < runs; i++) {
            row = x + i * run_stride + k;
            for (ptrdiff_t j = 0, end; j < rows + (tail > 0);) {
                EACH (v, vectors)
                    band_sum[v] = band_squares[v] = all(0);
                for (end = min_of(j + SUMMED, rows); j < end; j++, row += width)
                    EACH (v, vectors) {
                        value = load(row + v * LANES_OF);
                        if (scaled)
                            value *= factor;
                        if (centred) {
                            value -= all(shift);
                            band_squares[v] += value * value;
                        }
                        band_sum[v] += value;
                    }
                if (j == rows && tail) {
                    EACH (v, vectors) {
                        const ptrdiff_t lanes = tail - k - v * LANES_OF;
                        value = load_some(row + v * LANES_OF, lanes);
                        if (scaled)
                            value *= factor;
                        if (centred) {
                            value = T(first)(value - all(shift), lanes);
                            band_squares[v] += value * value;
                        }
                        band_sum[v] += value;
                    }
                    j++;
                }
                EACH (v, vectors) {
                    T(add_lanes)(sum + v * HALVES, band_sum[v]);
                    if (centred)
                        T(add_lanes)(sum_of_squares + v * HALVES, band_squares[v]);
                }
            }
        }
        EACH (v, columns / DOUBLES) {
            DOUBLES_AT(totals + k + v * DOUBLES) = sum[v];
            DOUBLES_AT(squares + k + v * DOUBLES) = sum_of_squares[v];
        }
    }
    *total = sum_of(totals, width);
    if (centred)
        *square = sum_of(squares, width);
}

/* The sums of a block of a channel around a shift, which is rounded; without one, around its mean. */
INLINE void T(sum_around)(const stored *x, const struct Sheet *block, ptrdiff_t length,
                          const int width, int centred, const int scaled, real factor,
                          double *shift, double *total, double *square) {
    if (!centred) {
        T(sum_runs)(x, block->runs, block->run_stride, length, width, 0, 0, scaled, factor, total,
                    square);
        *shift = *total / ((double)block->runs * length);
    }
    *shift = (real)*shift;
    T(sum_runs)(x, block->runs, block->run_stride, length, width, 1, (real)*shift, scaled, factor,
                total, square);
}

static void T(sum_plane)(const void *data, const struct Sheet *block, ptrdiff_t length,
                         int centred, double unit, double *shift, double *total, double *square) {
    const stored *x = (const stored *)data + block->offset;
    if (unit == 1)
        T(sum_around)(x, block, length, LANES, centred, 0, 1, shift, total, square);
    else
        T(sum_around)(x, block, length, LANES, centred, 1, (real)(1 / unit), shift, total, square);
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

/* The moments of channels too small for blocks, around their means, or around 0. */
static void T(short_moments)(const void *data, const struct Sheet *sheet, ptrdiff_t S, int centred,
                           double smallest, struct Moments *into) {
    /* Pass by pass, because the second pass over a channel has to wait for its mean; meanwhile the
       CPU is at the next channel. */
    const stored *x = (const stored *)data + sheet->offset;
    const double count = (double)sheet->runs * sheet->length;
    struct Sheet channel = *sheet;
    double total, square, unit;
    for (ptrdiff_t c = 0; c < sheet->channels; c++) {
        total = 0;
        if (centred)
            T(sum_runs)(x + c * S, sheet->runs, sheet->run_stride, sheet->length, FEW_LANES, 0, 0, 0,
                        1, &total, &square);
        into[c].shift = total / count;
    }
    for (ptrdiff_t c = 0; c < sheet->channels; c++) {
        T(sum_around)(x + c * S, sheet, sheet->length, FEW_LANES, 1, 0, 1, &into[c].shift, &total,
                      &square);
        unit = 1;
        if (T(is_outside)((real)square, (real)smallest)) {
            channel.offset = sheet->offset + c * S;
            unit = T(unit_of)(data, &channel);
            T(sum_around)(x + c * S, sheet, sheet->length, FEW_LANES, !centred, 1, (real)(1 / unit),
                          &into[c].shift, &total, &square);
        }
        into[c].count = count;
        into[c].shift *= unit;
        into[c].mean = centred ? total / count * unit : 0;
        into[c].m2 = (centred ? square - total * (total / count) : square) * (unit * unit);
    }
}
