/* The sums that gradients need: of grad_output, and of grad_output * (x - mean), in float64, where
   the product of two float32 is exact: sums that nearly cancel keep their digits. */

/* Of rows that share their parameters: what normalises each. */
struct T(Normal) {
    real mean[BAND], mean_low[BAND], scale[BAND];
};

/* Add up `vectors` vectors of columns of some rows, in registers. */
INLINE void T(multiply_rows)(const stored *grad_output, const stored *x, ptrdiff_t rows,
                             ptrdiff_t row_stride, const real *weight, const real *mean,
                             const struct T(Normal) *normal, const int way, const int vectors,
                             ptrdiff_t lanes, /* of a vector */
                             double *total, double *product) {
    doubles totals[4], products[4];
    few means[4], grad, centred;
    const int whole = lanes >= DOUBLES;
    EACH (v, vectors) {
        totals[v] = whole ? (doubles)DOUBLES_AT(total + v * DOUBLES) : some_doubles(total, lanes);
        products[v] = whole ? (doubles)DOUBLES_AT(product + v * DOUBLES) : some_doubles(product, lanes);
        if (!(way & BY_ROW))
            means[v] = way & BY_COLUMN ? few_reals(mean + v * DOUBLES) : all_few(mean[0]);
    }
    for (ptrdiff_t j = 0; j < rows; j++) {
        EACH (v, vectors) {
            grad = whole ? load_few(grad_output + v * DOUBLES) : load_some_few(grad_output, lanes);
            centred = whole ? load_few(x + v * DOUBLES) : load_some_few(x, lanes);
            if (way & BY_VALUE)
                grad *= few_reals(weight + v * DOUBLES);
            if (way & BY_ROW)
                centred = ((centred - normal->mean[j]) - normal->mean_low[j]) * normal->scale[j];
            else
                centred -= means[v];
            totals[v] += widen(grad);
            products[v] = T(add_product)(grad, centred, products[v]);
        }
        grad_output += row_stride;
        x += row_stride;
        if (way & BY_VALUE)
            weight += row_stride;
    }
    EACH (v, vectors) {
        if (whole) {
            DOUBLES_AT(total + v * DOUBLES) = totals[v];
            DOUBLES_AT(product + v * DOUBLES) = products[v];
        } else {
            put_doubles(total, totals[v], lanes);
            put_doubles(product, products[v], lanes);
        }
    }
}

/* Add up the columns of a few rows, as many columns at a time as registers hold. */
INLINE void T(multiply_band)(const stored *grad_output, const stored *x, ptrdiff_t rows,
                             ptrdiff_t row_stride, ptrdiff_t width, const real *weight,
                             const real *mean, const struct T(Normal) *normal, const int way,
                             double *total, double *product) {
    ptrdiff_t k = 0;
#define COLUMNS_FROM(k, vectors, lanes)                                                            \
    grad_output + k, x + k, rows, row_stride, way & BY_VALUE ? weight + k : NULL,              \
        way & BY_COLUMN ? mean + k : mean, normal, way, vectors, lanes, total + k, product + k
    for (; width - k >= 4 * DOUBLES; k += 4 * DOUBLES)
        T(multiply_rows)(COLUMNS_FROM(k, 4, DOUBLES));
    if (width - k >= 2 * DOUBLES) {
        T(multiply_rows)(COLUMNS_FROM(k, 2, DOUBLES));
        k += 2 * DOUBLES;
    }
    if (width - k >= DOUBLES) {
        T(multiply_rows)(COLUMNS_FROM(k, 1, DOUBLES));
        k += DOUBLES;
    }
    if (k < width)
        T(multiply_rows)(COLUMNS_FROM(k, 1, width - k));
#undef COLUMNS_FROM
}

/* The sums of a run, or of runs, in rows of FEW_LANES: longer rows take up to 20 % more time. */
INLINE struct Sums T(sums_of_plane)(const stored *grad_output, const stored *x, ptrdiff_t runs,
                                    ptrdiff_t run_stride, ptrdiff_t length, const real *weight,
                                    real mean, const int way) {
    double total[FEW_LANES], product[FEW_LANES], last_total[FEW_LANES], last_product[FEW_LANES];
    const ptrdiff_t rows = length / FEW_LANES, tail = length % FEW_LANES;
    struct Sums sums;
    ptrdiff_t at;
    for (int k = 0; k < FEW_LANES; k++)
        total[k] = product[k] = last_total[k] = last_product[k] = 0;
    /* The last row apart: what it changes a column at a time would have to reach memory before it
       is read as vectors. */
    for (ptrdiff_t i = 0; i < runs; i++) {
        at = i * run_stride;
        T(multiply_band)(grad_output + at, x + at, rows, FEW_LANES, FEW_LANES, weight, &mean, NULL,
                         way, total, product);
        if (tail)
            T(multiply_band)(grad_output + at + length - tail, x + at + length - tail, 1, 0, tail,
                             way & BY_VALUE ? weight + length - tail : NULL, &mean, NULL, way,
                             last_total, last_product);
    }
    sums.grad_output = sum_of(total, FEW_LANES);
    sums.grad_output_centred = sum_of(product, FEW_LANES);
    if (tail) {
        sums.grad_output += sum_of(last_total, tail);
        sums.grad_output_centred += sum_of(last_product, tail);
    }
    return sums;
}

/* The sums of each part of a channel, in a piece that may begin and end within one. */
static void T(sums_of_parts)(const stored *grad_output, const stored *x, const struct Pass *p,
                             const struct Sheet *sheet, real mean, ptrdiff_t parts,
                             struct Sums *into) {
    const ptrdiff_t length = p->geometry.S / p->geometry.parts, reached = sheet->start / length;
    const ptrdiff_t stop = sheet->start + sheet->length;
    ptrdiff_t first, end;
    for (ptrdiff_t q = 0; q < parts; q++) {
        first = max_of(sheet->start, (reached + q) * length);
        end = min_of(stop, (reached + q + 1) * length);
        into[q].grad_output = into[q].grad_output_centred = 0;
        if (first < end)
            into[q] = T(sums_of_plane)(grad_output + first - sheet->start, x + first - sheet->start,
                                       sheet->runs, sheet->run_stride, end - first, NULL, mean, 0);
    }
}

INLINE void T(sums_by_plane)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                             const real *mean, ptrdiff_t parts, struct Sums *into) {
    const stored *grad_output = p->grad_output, *x = p->x;
    ptrdiff_t at = sheet->offset;
    for (ptrdiff_t c = 0; c < sheet->channels; c++, at += p->geometry.S)
        if (p->geometry.by_value)
            into[c] = T(sums_of_plane)(grad_output + at, x + at, sheet->runs, sheet->run_stride,
                                       sheet->length, T(weights_of)(p, first + c) + sheet->start,
                                       mean[c], BY_VALUE);
        else if (parts > 1)
            T(sums_of_parts)(grad_output + at, x + at, p, sheet, mean[c], parts, into + c * parts);
        else
            into[c] = T(sums_of_plane)(grad_output + at, x + at, sheet->runs, sheet->run_stride,
                                       sheet->length, NULL, mean[c], 0);
}

static void T(sums_by_row)(const struct Pass *p, const struct Sheet *sheet, const real *mean,
                           ptrdiff_t parts, struct Sums *into) {
    const stored *grad_output = p->grad_output, *x = p->x;
    const ptrdiff_t period = sheet->channels * sheet->span, span = sheet->span / parts;
    const ptrdiff_t band = sheet->width <= LANES ? sheet->rows : BAND;
    real means[WIDTH + LANES_OF]; /* of each column */
    double total[WIDTH], product[WIDTH];
    ptrdiff_t at = sheet->offset, n;
    T(spread)(mean, sheet->channels, sheet->span, sheet->repeat, means);
    for (ptrdiff_t k = 0; k < sheet->width; k++)
        total[k] = product[k] = 0;
    for (ptrdiff_t rest = sheet->rows; rest > 0; rest -= n, at += n * sheet->row_stride) {
        n = min_of(band, rest);
        T(multiply_band)(grad_output + at, x + at, n, sheet->row_stride, sheet->width, NULL, means,
                         NULL, BY_COLUMN, total, product);
    }
    if (sheet->tail)
        T(multiply_band)(grad_output + at, x + at, 1, 0, sheet->tail, NULL, means, NULL,
                         BY_COLUMN, total, product);
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

/* The sums of at most WIDTH channels of a sheet, each in so many parts. mean is in two parts, and
   what depends on the second is left out of the loops:

     sum(grad_output * (x - mean)) = sum(grad_output * (x - high)) - low * sum(grad_output) */
static void T(sum_products)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            ptrdiff_t parts, struct Sums *into) {
    double mean[WIDTH], mean_low[WIDTH], low;
    real high[WIDTH];
    take_values(&p->mean, first, sheet->channels, mean);
    take_values(&p->mean_low, first, sheet->channels, mean_low);
    for (ptrdiff_t c = 0; c < sheet->channels; c++)
        high[c] = (real)mean[c];
    if (p->geometry.by_plane)
        T(sums_by_plane)(p, sheet, first, high, parts, into);
    else
        T(sums_by_row)(p, sheet, high, parts, into);
    for (ptrdiff_t c = 0; c < sheet->channels; c++) {
        low = (mean[c] - (double)high[c]) + mean_low[c];
        for (ptrdiff_t q = c * parts; q < (c + 1) * parts; q++)
            into[q].grad_output_centred -= low * into[q].grad_output;
    }
}

/* Add up what channels share, from `first` on, period by period: the gradients of weights and biases
   by value. */
static void T(share_products)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                              double *grad_bias, double *grad_weight) {
    const stored *grad_output = p->grad_output, *x = p->x;
    const ptrdiff_t period = p->geometry.period, S = p->geometry.S;
    struct T(Normal) normal;
    double mean[BAND], mean_low[BAND], reciprocal[BAND];
    ptrdiff_t n, at;
    for (ptrdiff_t k = 0; k < sheet->length; k++)
        grad_bias[k] = grad_weight[k] = 0;
    for (ptrdiff_t c = 0; c < sheet->channels; c += n * period) {
        n = min_of(BAND, (sheet->channels - c + period - 1) / period);
        for (ptrdiff_t j = 0; j < n; j++) {
            take_values(&p->mean, first + c + j * period, 1, mean + j);
            take_values(&p->mean_low, first + c + j * period, 1, mean_low + j);
            take_values(&p->var, first + c + j * period, 1, reciprocal + j);
        }
        for (ptrdiff_t j = 0; j < n; j++) {
            normal.mean[j] = (real)mean[j];
            normal.mean_low[j] = T(low_part)(normal.mean[j], mean[j], mean_low[j]);
            normal.scale[j] = (real)(1 / sqrt(reciprocal[j] + p->eps));
        }
        for (ptrdiff_t i = 0; i < sheet->runs; i++) {
            at = sheet->offset + c * S + i * sheet->run_stride;
            T(multiply_band)(grad_output + at, x + at, n, period * S, sheet->length, NULL, NULL,
                             &normal, BY_ROW, grad_bias, grad_weight);
        }
    }
}
