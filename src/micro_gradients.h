/* The sums that gradients need: of grad_output, and of grad_output * (x - mean). At most SUMMED rows
   are added up in the type that is computed in, and such sums in float64: so a gradient is off by
   about 1e-8 of the sum of the magnitudes of its terms, and costs a quarter of sums in float64. */

/* Of rows that share their parameters: what normalises each. */
struct T(Normal) {
    real mean[SUMMED], mean_low[SUMMED], scale[SUMMED];
};

/* Where loops are; weight is of each value of a run, mean and unit of each column or of all. */
struct T(Pair) {
    const stored *grad_output, *x;
    const stored *out; /* by value, what will be written, and so is fetched; or x once more */
    const real *weight, *mean, *unit;
    const struct T(Normal) *normal;
    ptrdiff_t ahead; /* not by value, of grad_output and x: what is read next from memory; or 0 */
    struct T(Gate) gate; /* what is let through of grad_output */
};

INLINE void T(move_pair)(struct T(Pair) *at, ptrdiff_t by, const int way) {
    at->grad_output += by;
    at->x += by;
    if (way & BY_VALUE) {
        at->out += by;
        at->weight += by;
    }
    if (way & BY_COLUMN && way & MEANS) {
        at->mean += by;
        at->unit += by;
    }
}

/* Add some vectors of row j, of which so many lanes are columns. */
INLINE void T(multiply_row)(const struct T(Pair) *at, ptrdiff_t j, const int vectors,
                            ptrdiff_t lanes, const vector *mean, const vector *unit,
                            const int way, vector *total, vector *product) {
    const int whole = lanes >= vectors * LANES_OF;
    EACH (v, vectors) {
        const ptrdiff_t k = v * LANES_OF;
        if (!whole && k >= lanes) /* nothing is left of this row */
            break;
        vector grad = whole ? load(at->grad_output + k) : load_some(at->grad_output + k, lanes - k);
        vector x = whole ? load(at->x + k) : load_some(at->x + k, lanes - k);
        grad = T(let_through)(&at->gate, grad, at->grad_output + k);
        if (way & BY_VALUE) {
            if (BEGINS_LINE(v))
                __builtin_prefetch(at->out + k, 1);
            grad *= R(reals)(at->weight + k, lanes - k);
        }
        if (way & FETCHES && BEGINS_LINE(v)) {
            fetch(at->grad_output + at->ahead + k);
            fetch(at->x + at->ahead + k);
        }
        if (way & BY_ROW)
            x = ((x - at->normal->mean[j]) - at->normal->mean_low[j]) * at->normal->scale[j];
        else
            x = (x - mean[way & BY_COLUMN ? v : 0]) * unit[way & BY_COLUMN ? v : 0];
        if (!whole) /* no product of 0 and what is not finite, such as a large mean in a small unit */
            x = R(joined)(x, all(0), lanes - k);
        total[v] += grad;
        product[v] += grad * x;
    }
}

/* Add some vectors of columns of a few rows; begins: the first of their sums. */
INLINE void T(multiply_rows)(struct T(Pair) at, ptrdiff_t j, ptrdiff_t end, ptrdiff_t row_stride,
                             const int vectors, ptrdiff_t lanes, const int way, int begins,
                             real *total, real *product) {
    vector totals[4], products[4], mean[4], unit[4];
    EACH (v, vectors) {
        totals[v] = begins ? all(0) : (vector)REALS(total + v * LANES_OF);
        products[v] = begins ? all(0) : (vector)REALS(product + v * LANES_OF);
        if (way & BY_COLUMN) {
            mean[v] = R(reals)(at.mean + v * LANES_OF, lanes - v * LANES_OF);
            unit[v] = R(reals)(at.unit + v * LANES_OF, lanes - v * LANES_OF);
        }
    }
    for (; j < end; j++) {
        T(multiply_row)(&at, j, vectors, lanes, mean, unit, way, totals, products);
        T(move_pair)(&at, row_stride, way);
    }
    EACH (v, vectors) {
        REALS(total + v * LANES_OF) = totals[v];
        REALS(product + v * LANES_OF) = products[v];
    }
}

/* Add up at most WIDTH columns of rows, and of one more row `tail`, of a few rows at a time, and of fewer
   where rows of both arrays would take the same places of the L1 cache. What comes from memory and has
   no gaps is read in its order, row by row. */
INLINE void T(multiply_columns)(struct T(Pair) at, ptrdiff_t rows, ptrdiff_t row_stride,
                                ptrdiff_t width, ptrdiff_t tail, int from_memory, const int way,
                                double *total, double *product) {
    const ptrdiff_t fit = row_stride * sizeof(stored) % HALF_PAGE ? BESIDE : BESIDE / 2;
    const ptrdiff_t beside = from_memory && row_stride == width ? 1 : fit;
    real band_total[SUMS_WIDTH], band_product[SUMS_WIDTH];
    struct T(Pair) row;
    for (ptrdiff_t j = 0, end, k; j < rows + (tail > 0); j = end) {
        const int begins = j % SUMMED == 0 || j == rows;
        end = min_of(rows, j + beside);
        if (j == rows) {
            end = rows + 1;
            width = tail;
        }
        row = at;
        if (j + ROWS_AHEAD >= rows) /* what would be fetched is no part of this */
            row.ahead = 0;
        for (k = 0; width - k >= 4 * LANES_OF; k += 4 * LANES_OF) {
            T(multiply_rows)(row, j, end, row_stride, 4, 4 * LANES_OF, way, begins, band_total + k,
                             band_product + k);
            T(move_pair)(&row, 4 * LANES_OF, way | MEANS);
        }
        for (; k < width; k += LANES_OF) {
            T(multiply_rows)(row, j, end, row_stride, 1, min_of(LANES_OF, width - k), way, begins,
                             band_total + k, band_product + k);
            T(move_pair)(&row, LANES_OF, way | MEANS);
        }
        T(move_pair)(&at, (end - j) * row_stride, way);
        if (end >= rows || end % SUMMED == 0)
            for (k = 0; k < width; k++) {
                total[k] += band_total[k];
                product[k] += band_product[k];
            }
    }
}

/* The sums of channels that lie `stride` apart, `beside` of them side by side, each of runs of so many
   values, in rows of `width`; once: of one run of no more than SUMMED rows. Where a row does not fit the
   registers it is read in several sweeps: over all runs, or, by band, of SUMMED rows, which are in the L1
   cache for the next. */
INLINE void T(sum_pairs)(const struct T(Pair) *at, ptrdiff_t stride, const int beside,
                         const int once, const int by_band, ptrdiff_t runs,
                         ptrdiff_t run_stride, ptrdiff_t length, const int width, const int way,
                         double *total,
                         double *product) { /* OUT (beside, CHAINS) */
    enum { MOST = 4 * LANES_OF, HALVES = LANES_OF / DOUBLES };
    const int columns = width * beside < MOST ? width : MOST / beside;
    const int vectors = columns / LANES_OF, groups = columns / CHAINS;
    const int swept = by_band ? width : columns, n = beside * columns / DOUBLES;
    const ptrdiff_t rows = length / width, tail = length % width;
    struct T(Pair) band, row, channel;
    vector mean[4], unit[4], band_total[4], band_product[4];
    doubles totals[LANES / DOUBLES], products[LANES / DOUBLES];
    EACH (r, beside) {
        mean[r] = all(at->mean[r]);
        unit[r] = all(at->unit[r]);
    }
    for (int first = 0; first < width; first += swept) {
        if (by_band) /* in memory: they are more than there are registers */
            for (int v = 0; v < swept / DOUBLES; v++)
                totals[v] = products[v] = all_doubles(0);
        else
            EACH (v, n) /* in registers */
                totals[v] = products[v] = all_doubles(0);
        for (ptrdiff_t i = 0; i < (once ? 1 : runs); i++) {
            ptrdiff_t begin, j = 0, end;
            row = *at;
            T(move_pair)(&row, first, way);
            row.grad_output += i * run_stride;
            row.x += i * run_stride;
            do {
                band = row;
                begin = j;
                for (int k = first, part = 0; k < first + swept; k += columns, part++) {
                    if (by_band) {
                        row = band;
                        T(move_pair)(&row, k, way);
                        j = begin;
                    }
                    EACH (v, beside * vectors)
                        band_total[v] = band_product[v] = all(0);
#define MULTIPLY(lanes)                                                                            \
    EACH (r, beside) {                                                                             \
        channel = row;                                                                             \
        channel.grad_output += r * stride;                                                         \
        channel.x += r * stride;                                                                   \
        channel.out += r * stride;                                                                 \
        T(multiply_row)(&channel, 0, vectors, lanes, mean + r, unit + r, way,                      \
                        band_total + r * vectors, band_product + r * vectors);                     \
    }
                    for (end = once ? rows : min_of(j + SUMMED, rows); j < end; j++) {
                        MULTIPLY(columns)
                        T(move_pair)(&row, width, way);
                    }
                    if (j == rows && tail) {
                        MULTIPLY(tail - k)
                        j++;
                    }
#undef MULTIPLY
                    EACH (v, beside * vectors) {
                        R(add_lanes)(totals + part * n + v * HALVES, band_total[v], once);
                        R(add_lanes)(products + part * n + v * HALVES, band_product[v], once);
                    }
                }
                if (by_band)
                    T(move_pair)(&row, -(swept - columns), way);
            } while (!once && j < rows + (tail > 0));
        }
        for (int k = first, part = 0; k < first + swept; k += columns, part++) {
            T(add_to_chains)(totals + part * n, beside, groups, k > 0, total);
            T(add_to_chains)(products + part * n, beside, groups, k > 0, product);
        }
    }
}

INLINE void T(sum_pairs_of_runs)(const struct T(Pair) *at, ptrdiff_t runs, ptrdiff_t run_stride,
                                 ptrdiff_t length, double *total, double *product) { /* OUT (CHAINS) */
#define SUM(once, width, way)                                                                      \
    T(sum_pairs)(at, 0, 1, once, 0, runs, run_stride, length, width, way, total, product)
    if (runs == 1 && length <= SUMMED * SHORT_LANES && at->ahead)
        SUM(1, SHORT_LANES, FETCHES);
    else if (runs == 1 && length <= SUMMED * SHORT_LANES)
        SUM(1, SHORT_LANES, 0);
    else if (length < SHORT_RUN && at->ahead)
        SUM(0, SHORT_LANES, FETCHES);
    else if (length < SHORT_RUN)
        SUM(0, SHORT_LANES, 0);
    else if (at->ahead)
        SUM(0, LANES, FETCHES);
    else
        SUM(0, LANES, 0);
#undef SUM
}

/* The sums of so many whole parts of channels, which follow each other. */
INLINE void T(sum_parts)(struct T(Pair) at, ptrdiff_t count, ptrdiff_t parts, const int once,
                         const int by_band, ptrdiff_t runs, ptrdiff_t run_stride,
                         ptrdiff_t length, const int width, const int way, struct Sums *into) {
    double totals[AT_ONCE * CHAINS], products[AT_ONCE * CHAINS];
    ptrdiff_t n = 0, q = 0;
    for (; count > 0; count--) {
        T(sum_pairs)(&at, 0, 1, once, by_band, runs, run_stride, length, width, way,
                     totals + n * CHAINS, products + n * CHAINS);
        T(move_pair)(&at, length, 0);
        n = fold_full(totals, products, n + 1, &into);
        if (++q == parts) {
            q = 0;
            at.mean++;
            at.unit++;
        }
    }
    fold_sums(totals, products, n, into);
}

/* Functions of their own, because what gcc 12 makes of a loop depends on those beside it: of one body,
   planes of 8 x 8 were up to an eighth slower, and others faster (backward, benchmarks/compare.py). */
#define SUM_PARTS(name, once, by_band, width, way)                                                 \
    static NOINLINE void T(name)(struct T(Pair) at, ptrdiff_t count, ptrdiff_t parts,              \
                                 ptrdiff_t runs, ptrdiff_t run_stride, ptrdiff_t length,           \
                                 struct Sums *into) {                                              \
        T(sum_parts)(at, count, parts, once, by_band, runs, run_stride, length, width, way, into); \
    }
SUM_PARTS(sum_shortest, 1, 0, SHORT_LANES, 0)
SUM_PARTS(sum_and_fetch_shortest, 1, 0, SHORT_LANES, FETCHES)
SUM_PARTS(sum_short, 0, 0, SHORT_LANES, 0)
SUM_PARTS(sum_and_fetch_short, 0, 0, SHORT_LANES, FETCHES)
SUM_PARTS(sum_long, 0, 0, LANES, 0)
SUM_PARTS(sum_and_fetch_long, 0, 0, LANES, FETCHES)
SUM_PARTS(sum_by_band, 0, 1, LANES, 0)
SUM_PARTS(sum_and_fetch_by_band, 0, 1, LANES, FETCHES)
#undef SUM_PARTS

/* The same, by the function for such parts. */
INLINE void T(sum_whole_parts)(struct T(Pair) at, ptrdiff_t count, ptrdiff_t parts, ptrdiff_t runs,
                               ptrdiff_t run_stride, ptrdiff_t length, struct Sums *into) {
    void (*sum)(struct T(Pair), ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                struct Sums *);
    if (runs == 1 && length <= SUMMED * SHORT_LANES)
        sum = at.ahead ? T(sum_and_fetch_shortest) : T(sum_shortest);
    else if (length < SHORT_RUN)
        sum = at.ahead ? T(sum_and_fetch_short) : T(sum_short);
    else if (runs * length > SWEPT_AT_ONCE)
        sum = at.ahead ? T(sum_and_fetch_by_band) : T(sum_by_band);
    else
        sum = at.ahead ? T(sum_and_fetch_long) : T(sum_long);
    sum(at, count, parts, runs, run_stride, length, into);
}

/* The sums of channels; of each part of one, in a piece that may begin and end within a part. The
   shortest that are whole go side by side, but not from memory, which is read faster in its order. */
INLINE void T(sums_by_plane)(struct T(Pair) at, const struct Pass *p, const struct Sheet *sheet,
                             ptrdiff_t parts, struct Sums *into) {
    enum { MOST_BESIDE = 4 };
    const int beside = T(CHANNELS_BESIDE);
    const ptrdiff_t length = p->geometry.S / p->geometry.parts;
    const ptrdiff_t start = sheet->start, stop = start + sheet->length;
    const ptrdiff_t reached = parts == 1 ? 0 : start / length;
    const int whole = sheet->length == p->geometry.S && sheet->runs == 1;
    const int side_by_side = beside > 1 && whole && !p->stream && length <= PARTS_BESIDE;
    double totals[AT_ONCE * CHAINS], products[AT_ONCE * CHAINS];
    ptrdiff_t rest = sheet->channels * parts, c = 0, q = 0, first = start, end = stop, n = 0;
    for (; side_by_side && rest >= beside; rest -= beside) {
        struct T(Pair) some = at;
        real mean[MOST_BESIDE], unit[MOST_BESIDE];
        some.out = at.x;
        some.mean = mean;
        some.unit = unit;
        EACH (r, beside) {
            mean[r] = at.mean[c];
            unit[r] = at.unit[c];
            if (++q == parts) {
                q = 0;
                c++;
            }
        }
        T(sum_pairs)(&some, length, beside, 1, 0, 1, 0, length, SHORT_LANES, 0, totals + n * CHAINS,
                     products + n * CHAINS);
        T(move_pair)(&at, beside * length, 0);
        n = fold_full(totals, products, n + beside, &into);
    }
    at.mean += c;
    at.unit += c;
    if (sheet->length == p->geometry.S && q == 0) {
        fold_sums(totals, products, n, into);
        T(sum_whole_parts)(at, rest, parts, sheet->runs, sheet->run_stride, length, into + n);
        return;
    }
    for (; rest > 0; rest--) {
        if (parts > 1) {
            first = max_of(start, (reached + q) * length);
            end = max_of(first, min_of(stop, (reached + q + 1) * length));
        }
        T(sum_pairs_of_runs)(&at, sheet->runs, sheet->run_stride, end - first, totals + n * CHAINS,
                             products + n * CHAINS);
        T(move_pair)(&at, end - first, 0);
        n = fold_full(totals, products, n + 1, &into);
        if (++q == parts) {
            q = 0;
            at.mean++;
            at.unit++;
            T(move_pair)(&at, p->geometry.S - sheet->length, 0);
        }
    }
    fold_sums(totals, products, n, into);
}

INLINE void T(sums_by_row)(struct T(Pair) at, const struct Sheet *sheet, ptrdiff_t parts,
                           int from_memory, struct Sums *into) {
    const ptrdiff_t period = sheet->channels * sheet->span, span = sheet->span / parts;
    real means[WIDTH], units[WIDTH]; /* of each column */
    double total[WIDTH], product[WIDTH];
    R(spread)(at.mean, sheet->channels, sheet->span, sheet->repeat, means);
    R(spread)(at.unit, sheet->channels, sheet->span, sheet->repeat, units);
    at.mean = means;
    at.unit = units;
    for (ptrdiff_t k = 0; k < sheet->width; k++)
        total[k] = product[k] = 0;
    if (at.ahead)
        T(multiply_columns)(at, sheet->rows, sheet->row_stride, sheet->width, sheet->tail,
                            from_memory, BY_COLUMN | FETCHES, total, product);
    else
        T(multiply_columns)(at, sheet->rows, sheet->row_stride, sheet->width, sheet->tail,
                            from_memory, BY_COLUMN, total, product);
    for (ptrdiff_t r = 1; r < sheet->repeat; r++)
        for (ptrdiff_t k = 0; k < period; k++) {
            total[k] += total[r * period + k];
            product[k] += product[r * period + k];
        }
    for (ptrdiff_t k = 0; k < sheet->channels * parts; k++) {
        into[k].grad_output = sum_of(total + k * span, span);
        into[k].grad_output_centred = sum_of(product + k * span, span);
    }
}

INLINE struct T(Pair) T(pair_of)(const struct Pass *p, ptrdiff_t at) {
    return (struct T(Pair)){.grad_output = (const stored *)p->grad_output + at,
                            .x = (const stored *)p->x + at,
                            .gate = T(gate_of)(p)};
}

/* What channels are centred and scaled by for their sums. mean is in two parts, and what depends on
   the second is left out of the loops:

     sum(grad_output * (x - mean)) = sum(grad_output * (x - high)) - low * sum(grad_output)

   Products are in a unit near the standard deviation, a power of two: so they stay in range, and the
   digits of the sums do not depend on the unit of x. */
struct T(Units) {
    real high[WIDTH], per_unit[WIDTH];
    double low[WIDTH], unit[WIDTH];
};

static void T(take_units)(const struct Pass *p, ptrdiff_t first, ptrdiff_t n,
                          struct T(Units) *units) {
    double mean[WIDTH], mean_low[WIDTH];
    take_values(&p->mean, first, n, mean);
    take_values(&p->mean_low, first, n, mean_low);
    take_values(&p->var, first, n, units->unit);
    for (ptrdiff_t c = 0; c < n; c++)
        units->high[c] = (real)mean[c];
    for (ptrdiff_t c = 0; c < n; c++)
        units->low[c] = (mean[c] - (double)units->high[c]) + mean_low[c];
    for (ptrdiff_t c = 0; c < n; c++)
        units->unit[c] = unit_of_root(units->unit[c] + p->eps);
    for (ptrdiff_t c = 0; c < n; c++)
        units->per_unit[c] = (real)(1 / units->unit[c]);
}

/* The sums of at most WIDTH channels of a sheet, each in so many parts. */
static void T(sum_products)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            ptrdiff_t parts, struct Sums *into) {
    struct T(Pair) at = T(pair_of)(p, sheet->offset);
    struct T(Units) units;
    T(take_units)(p, first, sheet->channels, &units);
    at.mean = units.high;
    at.unit = units.per_unit;
    if (p->stream && !p->geometry.by_plane)
        at.ahead = ROWS_AHEAD * sheet->row_stride;
    else if (p->stream && sheet->runs > 1)
        at.ahead = T(to_next_run)(sheet->runs, sheet->run_stride, sheet->length);
    else if (p->stream && p->geometry.S < PARTS_FETCHED * parts)
        at.ahead = PARTS_AHEAD / (ptrdiff_t)sizeof(stored);
    if (p->geometry.by_plane)
        T(sums_by_plane)(at, p, sheet, parts, into);
    else
        T(sums_by_row)(at, sheet, parts, p->from_memory, into);
    for (ptrdiff_t c = 0; c < sheet->channels; c++)
        for (ptrdiff_t q = c * parts; q < (c + 1) * parts; q++)
            into[q].grad_output_centred = into[q].grad_output_centred * units.unit[c]
                                          - units.low[c] * into[q].grad_output;
}

/* The sums of at most AT_ONCE channels that have a weight for each value; side by side where it is the
   same for all, and registers hold the sums of several. */
INLINE void T(row_products_in)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                               const int width, double *total, double *product) {
    const int beside = width == SHORT_LANES ? T(CHANNELS_BESIDE) : 1;
    const ptrdiff_t n = sheet->channels, S = p->geometry.S;
    struct T(Pair) at = T(pair_of)(p, sheet->offset);
    struct T(Units) units;
    double totals[AT_ONCE * CHAINS], products[AT_ONCE * CHAINS];
    ptrdiff_t c = 0;
    T(take_units)(p, first, n, &units);
    at.out = at.x;
    if (!p->stream && S < LONG_ROW) /* a store waits for its line */
        at.out = (const stored *)p->out + sheet->offset;
#define CHANNELS(beside, once)                                                                     \
    at.weight = R(weights_of)(p, first + c) + sheet->start;                                        \
    at.mean = units.high + c;                                                                      \
    at.unit = units.per_unit + c;                                                                  \
    T(sum_pairs)(&at, S, beside, once, 0, sheet->runs, sheet->run_stride, sheet->length, width,    \
                 BY_VALUE, totals + c * CHAINS, products + c * CHAINS);                            \
    at.grad_output += beside * S;                                                                  \
    at.x += beside * S;                                                                            \
    at.out += beside * S
    if (width == SHORT_LANES && p->geometry.period == 1 && sheet->runs == 1
        && sheet->length <= SUMMED * width)
        for (; n - c >= beside; c += beside) {
            CHANNELS(beside, 1);
        }
    if (p->geometry.period == 1)
        for (; n - c >= beside; c += beside) {
            CHANNELS(beside, 0);
        }
    for (; c < n; c++) {
        CHANNELS(1, 0);
    }
#undef CHANNELS
    fold_chains(totals, n, total);
    fold_chains(products, n, product);
    for (c = 0; c < n; c++)
        product[c] = product[c] * units.unit[c] - units.low[c] * total[c];
}

static void T(row_products)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            double *total, double *product) {
    if (sheet->length < SHORT_RUN)
        T(row_products_in)(p, sheet, first, SHORT_LANES, total, product);
    else
        T(row_products_in)(p, sheet, first, LANES, total, product);
}

/* Add up what channels share: the gradients of weights and biases by value. */
static void T(share_products)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                              double *share) {
    const ptrdiff_t period = p->geometry.period, S = p->geometry.S, parts = p->geometry.parts;
    const ptrdiff_t end = sheet->channels;
    struct T(Pair) pair;
    struct T(Normal) normal;
    double mean[SUMMED], mean_low[SUMMED], var[SUMMED], *grad_bias;
    ptrdiff_t n, width;
    for (ptrdiff_t r = 0; r < min_of(period, end); r++) {
        grad_bias = share + (p->origin + first + r) % period * parts + sheet->start;
        for (ptrdiff_t c = r; c < end; c += n * period) {
            n = min_of(SUMMED, (end - c + period - 1) / period);
            for (ptrdiff_t j = 0; j < n; j++) {
                take_values(&p->mean, first + c + j * period, 1, mean + j);
                take_values(&p->mean_low, first + c + j * period, 1, mean_low + j);
                take_values(&p->var, first + c + j * period, 1, var + j);
            }
            for (ptrdiff_t j = 0; j < n; j++) {
                normal.mean[j] = (real)mean[j];
                normal.mean_low[j] = R(low_part)(normal.mean[j], mean[j], mean_low[j]);
                normal.scale[j] = (real)(1 / sqrt(var[j] + p->eps));
            }
            for (ptrdiff_t i = 0; i < sheet->runs; i++)
                for (ptrdiff_t k = 0; k < sheet->length; k += WIDTH) {
                    width = min_of(WIDTH, sheet->length - k);
                    pair = T(pair_of)(p, sheet->offset + c * S + i * sheet->run_stride + k);
                    pair.normal = &normal;
                    T(multiply_columns)(pair, n, period * S, width, 0, 0, BY_ROW, grad_bias + k,
                                        grad_bias + p->geometry.parameters + k);
                }
        }
    }
}
