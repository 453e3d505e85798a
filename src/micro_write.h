/* The two passes that write, with a few coefficients for each channel:

     y          = (x - mean) * scale + bias
     grad_input = ((grad_output - mean_grad) - (x - mean) * slope) * scale

   x is centred before it is scaled: x * alpha + beta would lose as many digits as the mean is larger
   than the standard deviation. mean is rounded; what is left of it, mean_low, is in the others: in
   bias is -mean_low * scale too, in mean_grad -mean_low * slope.

   scale is weight / std where a channel has one weight. Where it has several, scale is 1 / std, and

     y          = (x - mean) * (scale * weight) + (the bias above, of a bias of 0) * weight + bias
     grad_input = ((grad_output * weight - mean_grad) - (x - mean) * slope) * scale

   with the weight and the bias of the columns of a table, or of a part of a plane: y has both in its
   coefficients, and grad_input finds the weight in WEIGHT. Or they are beside x, value by value:

     y          = ((x - mean) - mean_low) * scale * weight + bias
     grad_input = ((grad_output * weight - mean_grad) - ((x - mean) - mean_low) * slope) * scale  */

/* Where loops are, and what they write with. */
struct T(Place) {
    const stored *x, *grad_output;
    stored *out;                  /* may be x or grad_output */
    const real *coefficients;     /* a table with rows `stride` apart */
    ptrdiff_t stride;
    const real *weights, *biases; /* value by value */
    ptrdiff_t ahead;              /* of x, and of grad_output: what is read next */
};

struct T(Coefficients) {
    vector mean, mean_low, scale, bias, slope, weight; /* bias is also mean_grad */
};

/* The coefficients of some columns, or of one channel. */
INLINE struct T(Coefficients) T(coefficients)(const struct T(Place) *at, ptrdiff_t k,
                                              ptrdiff_t lanes, const int way) {
    struct T(Coefficients) c;
    const real *table = at->coefficients + k;
#define COEFFICIENT(row)                                                                           \
    way & BY_COLUMN ? T(reals)(table + row * at->stride, lanes) : all(table[row * at->stride])
    c.mean = COEFFICIENT(MEAN);
    if (way & BY_VALUE)
        c.mean_low = COEFFICIENT(MEAN_LOW);
    c.scale = COEFFICIENT(SCALE);
    c.bias = COEFFICIENT(BIAS);
    if (way & BACKWARD)
        c.slope = COEFFICIENT(SLOPE);
    if (way & BACKWARD && way & WEIGHTED)
        c.weight = COEFFICIENT(WEIGHT);
#undef COEFFICIENT
    return c;
}

/* Here an epilogue belongs: what becomes of a value before it is stored. What it makes of
   grad_output, multiply_row (micro_gradients.h) has to make of it too. */
INLINE vector T(result)(vector x, vector grad, const struct T(Coefficients) *c, const int way) {
    const vector centred = way & BY_VALUE ? (x - c->mean) - c->mean_low : x - c->mean;
    if (way & BACKWARD) {
        if (way & (BY_VALUE | WEIGHTED))
            grad *= c->weight;
        return ((grad - c->bias) - centred * c->slope) * c->scale;
    }
    if (way & BY_VALUE)
        return centred * c->scale * c->weight + c->bias;
    return centred * c->scale + c->bias;
}

/* Vectors that are loaded together: `across` of them side by side in each of some rows, four in all,
   or some lanes of one in each row. */
struct T(Loaded) {
    vector x[4], grad[4];
};

INLINE struct T(Loaded) T(load_vectors)(const struct T(Place) *at, ptrdiff_t k, const int rows,
                                        ptrdiff_t row_stride, const int across, ptrdiff_t lanes,
                                        const int way) {
    const int whole = lanes >= LANES_OF;
    struct T(Loaded) values;
    EACH (v, rows * across) {
        const ptrdiff_t i = k + v / across * row_stride + v % across * LANES_OF;
        values.x[v] = whole ? load(at->x + i) : load_some(at->x + i, lanes);
        if (way & BACKWARD)
            values.grad[v] =
                whole ? load(at->grad_output + i) : load_some(at->grad_output + i, lanes);
        if (way & BY_VALUE) { /* what comes from memory next, while this is computed */
            __builtin_prefetch(at->x + i + at->ahead);
            if (way & BACKWARD)
                __builtin_prefetch(at->grad_output + i + at->ahead);
        }
    }
    return values;
}

/* Write what was loaded, with coefficients that are for all columns (by value, for those of a row), or
   else for those from k on. */
INLINE void T(write_vectors)(const struct T(Place) *at, ptrdiff_t k, const int rows,
                             ptrdiff_t row_stride, const int across, ptrdiff_t lanes,
                             const struct T(Loaded) *values, struct T(Coefficients) *c,
                             const int way) {
    vector y[4];
    EACH (v, across)
        if (way & BY_COLUMN)
            c[v] = T(coefficients)(at, k + v * LANES_OF, lanes, way);
    EACH (v, rows * across) {
        const ptrdiff_t column = k + v % across * LANES_OF;
        struct T(Coefficients) used = c[way & BY_COLUMN ? v % across : v / across];
        if (way & BY_VALUE) {
            used.weight = T(reals)(at->weights + column, lanes);
            if (!(way & BACKWARD))
                used.bias = T(reals)(at->biases + column, lanes);
        }
        y[v] = T(result)(values->x[v], values->grad[v], &used, way);
    }
    EACH (v, rows * across) {
        stored *out = at->out + k + v / across * row_stride + v % across * LANES_OF;
        if (lanes < LANES_OF)
            T(store_some)(out, y[v], lanes);
        else if (way & STREAM)
            T(stream)(out, y[v]);
        else
            T(store)(out, y[v]);
    }
}

/* Write columns k to n of one row, or of some. The next vectors are loaded before these are stored: a
   load that follows a store to the same place in another page waits for it, and arrays are often
   about a whole number of pages apart. */
INLINE void T(write_rows)(const struct T(Place) *at, ptrdiff_t k, ptrdiff_t n, const int rows,
                          ptrdiff_t row_stride, const int across, const int way) {
    const ptrdiff_t step = across * LANES_OF;
    struct T(Coefficients) c[4];
    struct T(Loaded) now, next;
    if (!(way & BY_COLUMN))
        EACH (r, rows)
            c[r] = T(coefficients)(at, r, LANES_OF, way);
#define LOAD(k, across, lanes) T(load_vectors)(at, k, rows, row_stride, across, lanes, way)
#define WRITE(across, lanes, way)                                                                  \
    T(write_vectors)(at, k, rows, row_stride, across, lanes, &now, c, way)
    if (n - k >= step) {
        now = LOAD(k, across, LANES_OF);
        for (; n - k >= 2 * step; k += step) {
            next = LOAD(k + step, across, LANES_OF);
            WRITE(across, LANES_OF, way);
            now = next;
        }
        WRITE(across, LANES_OF, way);
        k += step;
    }
    for (; across > 1 && n - k >= LANES_OF; k += LANES_OF) {
        now = LOAD(k, 1, LANES_OF);
        WRITE(1, LANES_OF, way & ~STREAM);
    }
    if (k < n) {
        now = LOAD(k, 1, n - k);
        WRITE(1, n - k, way & ~STREAM);
    }
#undef LOAD
#undef WRITE
}

/* How many of n values lie before the first that begins a cache line. */
INLINE ptrdiff_t T(values_to_line)(const stored *at, ptrdiff_t n) {
    return min_of(n, (ptrdiff_t)(-((uintptr_t)at / sizeof(stored)) % (LINE / sizeof(stored))));
}

/* Write n columns of some rows, or n values of a run, from the next cache line of out on by whole
   vectors, if there are many. Arrays from one allocator are aligned alike, so the loads of x gain as
   much as the stores. */
INLINE void T(write_aligned)(const struct T(Place) *at, ptrdiff_t n, const int rows,
                             ptrdiff_t row_stride, const int across, const int way) {
    ptrdiff_t k = 0;
    if (way & STREAM || n >= ALIGNED_RUN) {
        k = T(values_to_line)(at->out, n);
        T(write_rows)(at, 0, k, rows, row_stride, 1, way & ~STREAM);
    }
    T(write_rows)(at, k, n, rows, row_stride, across, way);
}

INLINE struct T(Place) T(place_of)(const struct Pass *p, ptrdiff_t at, ptrdiff_t first,
                                   const int way) {
    struct T(Place) place;
    place.x = p->kind == FROZEN_GRADIENTS ? p->grad_output : p->x;
    place.x += at;
    place.out = (stored *)p->out + at;
    place.grad_output = way & BACKWARD ? (const stored *)p->grad_output + at : NULL;
    place.weights = place.biases = NULL;
    place.ahead = p->ahead;
    place.coefficients = (const real *)p->coefficients + first;
    place.stride = p->geometry.channels;
    return place;
}

INLINE void T(move)(struct T(Place) *place, ptrdiff_t by, const int way) {
    place->x += by;
    place->out += by;
    if (way & BACKWARD)
        place->grad_output += by;
}

/* Write by plane, with a weight and a bias for each part of a channel. */
INLINE void T(write_parts)(struct T(Place) place, const struct Pass *p, const struct Sheet *sheet,
                           ptrdiff_t c, const int way) {
    const ptrdiff_t length = p->geometry.S / p->geometry.parts;
    const ptrdiff_t start = sheet->start, stop = start + sheet->length;
    const real *weight = T(weights_of)(p, c), *bias = weight + p->geometry.parameters;
    real of_part[ALL_COEFFICIENTS];
    ptrdiff_t begin, end;
    for (int k = 0; k < COEFFICIENTS; k++)
        of_part[k] = place.coefficients[k * place.stride];
    const real scale = of_part[SCALE], shift = of_part[BIAS];
    place.coefficients = of_part;
    place.stride = 1;
    for (ptrdiff_t q = start / length; q * length < stop; q++) {
        begin = max_of(start, q * length);
        end = min_of(stop, (q + 1) * length);
        if (way & BACKWARD)
            of_part[WEIGHT] = weight[q];
        else {
            of_part[SCALE] = scale * weight[q];
            of_part[BIAS] = bias[q] + shift * weight[q];
        }
        T(write_aligned)(&place, end - begin, 1, 0, ACROSS, way);
        T(move)(&place, end - begin, way);
    }
}

/* Whether channels that have their parameters by value can be written side by side: where these are
   the same for all, and all begin alike in their cache lines, or are too short for it to matter. */
INLINE int T(lie_alike)(const struct Pass *p, const int way) {
    const ptrdiff_t S = p->geometry.S;
    return p->geometry.period == 1
           && (way & STREAM ? S * sizeof(stored) % LINE == 0 : S < ALIGNED_RUN);
}

INLINE void T(write_planes)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            const int way) {
    enum { LINE_OF = LINE / VECTOR_BYTES };
    const int many = way & BY_VALUE ? way & STREAM ? 4 / LINE_OF : 4 : 1; /* of streams whole lines */
    struct T(Place) place;
    for (ptrdiff_t i = 0; i < sheet->runs; i++) {
        place = T(place_of)(p, sheet->offset + i * sheet->run_stride, first, way);
        for (ptrdiff_t c = first, n; c < first + sheet->channels; c += n) {
            n = 1;
            if (way & BY_VALUE) {
                place.weights = T(weights_of)(p, c) + sheet->start;
                place.biases = place.weights + p->geometry.parameters;
                if (T(lie_alike)(p, way) && first + sheet->channels - c >= many)
                    n = many;
            }
            if (way & BY_PART)
                T(write_parts)(place, p, sheet, c, way & ~BY_PART);
            else if (n == many)
                T(write_aligned)(&place, sheet->length, many, p->geometry.S, 4 / many, way);
            else
                T(write_aligned)(&place, sheet->length, 1, 0, ACROSS, way);
            place.coefficients += n;
            T(move)(&place, n * p->geometry.S, way);
        }
    }
}

/* Write by row, with a coefficient for each column. */
INLINE void T(write_sheet)(struct T(Place) place, const struct Sheet *sheet, const int way) {
    /* Some rows at a time, for which coefficients are loaded once; of streams whole lines. */
    enum { LINE_OF = LINE / VECTOR_BYTES };
    const int rows = way & STREAM ? 4 / LINE_OF : 4;
    ptrdiff_t rest = sheet->rows;
    /* Not rows that begin at different places of their cache lines, if they are streamed or long: one
       by one they are written from line to line. */
    if (sheet->row_stride * sizeof(stored) % LINE == 0 || !(way & STREAM || sheet->width > WIDTH))
        for (; rest >= rows; rest -= rows) {
            T(write_aligned)(&place, sheet->width, rows, sheet->row_stride, 4 / rows, way);
            T(move)(&place, rows * sheet->row_stride, way);
        }
    for (; rest > 0; rest--) {
        T(write_aligned)(&place, sheet->width, 1, 0, ACROSS, way);
        T(move)(&place, sheet->row_stride, way);
    }
    if (sheet->tail)
        T(write_aligned)(&place, sheet->tail, 1, 0, ACROSS, way);
}

/* Write n values in the order of the memory, with a coefficient for each of `width` columns, again
   and again: what begins in a row goes on into the next by whole vectors, and so does the table. */
INLINE void T(write_wrapped)(struct T(Place) place, ptrdiff_t n, ptrdiff_t width, const int way) {
    enum { STEP = ACROSS * LANES_OF };
    const real *table = place.coefficients;
    ptrdiff_t column = 0, length;
    for (; n > 0; n -= length) {
        while (column >= width)
            column -= width;
        length = min_of(n, (width - column + STEP - 1) / STEP * STEP);
        place.coefficients = table + column;
        T(write_rows)(&place, 0, length, 1, 0, ACROSS, way);
        T(move)(&place, length, way);
        column += length;
    }
}

/* Rows without gaps between them, after the first few values: the same in longer rows. */
static struct Sheet T(unbroken)(struct Sheet sheet, ptrdiff_t head) {
    const ptrdiff_t period = sheet.channels * sheet.span;
    const ptrdiff_t n = sheet.rows * sheet.width + sheet.tail - head;
    sheet.repeat = max_of(1, min_of(WIDTH / period, n / (2 * BAND * period)));
    if (sheet.repeat >= 16)
        sheet.repeat -= sheet.repeat % 16; /* so that all rows begin alike in their cache lines */
    sheet.offset += head;
    sheet.width = sheet.row_stride = sheet.repeat * period;
    sheet.rows = n / sheet.width;
    sheet.tail = n % sheet.width;
    return sheet;
}

/* Write by row, with a table of the coefficients of each column. */
INLINE void T(write_table)(const struct Pass *p, struct Sheet sheet, ptrdiff_t first,
                           const int way) {
    /* A line more than WIDTH, so that a row can start within one; and rows of the table that lie
       whole pages apart would fight for the same places of the L1 cache. */
    enum { TABLE_WIDTH = WIDTH + 6 * LINE / 4, BACK = BACKWARD | WEIGHTED };
    real space[ALL_COEFFICIENTS * TABLE_WIDTH] __attribute__((aligned(LINE))), *table = space;
    real weight[WIDTH], bias[WIDTH];
    const ptrdiff_t C = p->geometry.channels, parts = p->geometry.parts;
    const real *weights = T(weights_of)(p, first), *coefficients = (real *)p->coefficients + first;
    const int rows = (way & BACK) == BACK ? ALL_COEFFICIENTS : way & BACKWARD ? COEFFICIENTS : SLOPE;
    struct T(Place) place = T(place_of)(p, sheet.offset, first, way);
    ptrdiff_t head = 0;
    real *columns;
    if (sheet.row_stride == sheet.width) {
        /* From one cache line to the next: the table goes on for as long as the first row is late. */
        head = T(values_to_line)(place.out, sheet.rows * sheet.width);
        sheet = T(unbroken)(sheet, head);
        table += -head & (LINE / sizeof(real) - 1);
    }
    for (int q = 0; q < min_of(rows, COEFFICIENTS); q++)
        if (q != MEAN_LOW)
            T(spread)(coefficients + q * C, sheet.channels, sheet.span, sheet.repeat,
                  table + q * TABLE_WIDTH);
    if (parts > 1) {
        columns = way & BACKWARD ? table + WEIGHT * TABLE_WIDTH : weight;
        T(spread)(weights, sheet.channels * parts, sheet.span / parts, sheet.repeat, columns);
        if (!(way & BACKWARD)) {
            T(spread)(weights + p->geometry.parameters, sheet.channels * parts, sheet.span / parts,
                      sheet.repeat, bias);
            for (ptrdiff_t k = 0; k < sheet.width; k++) {
                table[SCALE * TABLE_WIDTH + k] *= weight[k];
                table[BIAS * TABLE_WIDTH + k] = bias[k] + table[BIAS * TABLE_WIDTH + k] * weight[k];
            }
        }
    }
    for (int q = 0; q < rows; q++) {
        if (q == MEAN_LOW)
            continue;
        columns = table + q * TABLE_WIDTH;
        for (ptrdiff_t k = 0; k < head + ACROSS * LANES_OF; k++)
            columns[sheet.width + k] = columns[k];
    }
    place.coefficients = table;
    place.stride = TABLE_WIDTH;
    T(write_rows)(&place, 0, head, 1, 0, 1, way & ~STREAM);
    T(move)(&place, head, way);
    place.coefficients += head;
    if (sheet.row_stride == sheet.width
        && (way & STREAM || sheet.width * sizeof(stored) % LINE))
        T(write_wrapped)(place, sheet.rows * sheet.width + sheet.tail, sheet.width, way);
    else
        T(write_sheet)(place, &sheet, way);
}

INLINE void T(write_way)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                         const int way) {
    const ptrdiff_t parts = p->geometry.parts;
    if (sheet->length > 0) { /* by plane */
        if (p->geometry.by_value)
            T(write_planes)(p, sheet, first, way | BY_VALUE);
        else if (parts > 1)
            T(write_planes)(p, sheet, first, way | BY_PART | WEIGHTED);
        else
            T(write_planes)(p, sheet, first, way);
    } else if (sheet->repeat * sheet->span == 1
               && (sheet->rows * sheet->width < WORTH_A_TABLE || sheet->width > WIDTH
                   || (sheet->width > WIDTH / 2 && !(way & STREAM))))
        /* Where a row holds each channel once, the coefficients lie as a table would. */
        T(write_sheet)(T(place_of)(p, sheet->offset, first, way), sheet, way | BY_COLUMN);
    else if (parts > 1)
        T(write_table)(p, *sheet, first, way | BY_COLUMN | WEIGHTED);
    else
        T(write_table)(p, *sheet, first, way | BY_COLUMN);
}

static void T(write)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first) {
    if (p->kind == GRADIENTS && p->stream)
        T(write_way)(p, sheet, first, BACKWARD | STREAM);
    else if (p->kind == GRADIENTS)
        T(write_way)(p, sheet, first, BACKWARD);
    else if (p->stream)
        T(write_way)(p, sheet, first, STREAM);
    else
        T(write_way)(p, sheet, first, 0);
    if (p->stream)
        stream_fence();
}

/* Write what was loaded of grad_input in some rows, and add up what these find of the gradients of
   weights and biases. */
INLINE void T(write_summed)(const struct T(Place) *at, ptrdiff_t k, const int rows,
                            ptrdiff_t row_stride, ptrdiff_t lanes, const struct T(Loaded) *values,
                            struct T(Coefficients) *c, const int way, real *total,
                            real *product) {
    vector sum = REALS(total + k), sum_of_products = REALS(product + k), x_hat;
    EACH (r, rows) {
        x_hat = ((values->x[r] - c[r].mean) - c[r].mean_low) * c[r].scale;
        if (lanes < LANES_OF) /* no product of 0 and what is not finite */
            x_hat = T(first)(x_hat, lanes);
        sum += values->grad[r];
        sum_of_products += values->grad[r] * x_hat;
    }
    T(write_vectors)(at, k, rows, row_stride, 1, lanes, values, c, way);
    REALS(total + k) = sum;
    REALS(product + k) = sum_of_products;
}

/* All columns of some rows: as write_rows. */
INLINE void T(write_summed_rows)(const struct T(Place) *at, const int rows, ptrdiff_t row_stride,
                                 ptrdiff_t period, ptrdiff_t width, const int way, real *total,
                                 real *product) {
    const ptrdiff_t head = way & STREAM ? T(values_to_line)(at->out, width) : 0;
    struct T(Coefficients) c[4];
    struct T(Loaded) now, next;
    ptrdiff_t k = 0;
    EACH (r, rows)
        c[r] = T(coefficients)(at, r * period, LANES_OF, way);
#define LOAD(k, lanes) T(load_vectors)(at, k, rows, row_stride, 1, lanes, way)
#define WRITE(lanes, way)                                                                          \
    T(write_summed)(at, k, rows, row_stride, lanes, &now, c, way, total, product)
    for (ptrdiff_t n; k < head; k += n) {
        n = min_of(LANES_OF, head - k);
        now = LOAD(k, n);
        WRITE(n, way & ~STREAM);
    }
    if (width - k >= LANES_OF) {
        now = LOAD(k, LANES_OF);
        for (; width - k >= 2 * LANES_OF; k += LANES_OF) {
            next = LOAD(k + LANES_OF, LANES_OF);
            WRITE(LANES_OF, way);
            now = next;
        }
        WRITE(LANES_OF, way);
        k += LANES_OF;
    }
    if (k < width) {
        now = LOAD(k, width - k);
        WRITE(width - k, way & ~STREAM);
    }
#undef LOAD
#undef WRITE
}

/* At most SUMMED rows of at most WIDTH columns. */
INLINE void T(write_band)(struct T(Place) at, ptrdiff_t rows, ptrdiff_t row_stride, ptrdiff_t period,
                          ptrdiff_t width, const int way, double *grad_bias,
                          double *grad_weight) {
    real total[WIDTH + LANES_OF], product[WIDTH + LANES_OF];
    for (ptrdiff_t k = 0; k < width + LANES_OF; k++)
        total[k] = product[k] = 0;
    for (ptrdiff_t n; rows > 0; rows -= n) {
        if (rows >= BESIDE) {
            n = BESIDE;
            T(write_summed_rows)(&at, BESIDE, row_stride, period, width, way, total, product);
        } else {
            n = 1;
            T(write_summed_rows)(&at, 1, row_stride, period, width, way, total, product);
        }
        at.coefficients += n * period;
        T(move)(&at, n * row_stride, way);
    }
    for (ptrdiff_t k = 0; k < width; k++) {
        grad_bias[k] += total[k];
        grad_weight[k] += product[k];
    }
}

/* Write grad_input of channels with a weight for each value, and add up the gradients of the weights
   and biases that they share. */
INLINE void T(write_sharing_way)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                                 double *share, const int way) {
    const ptrdiff_t period = p->geometry.period, S = p->geometry.S, parts = p->geometry.parts;
    const ptrdiff_t end = sheet->channels;
    struct T(Place) place;
    double *grad_bias;
    ptrdiff_t rows, width;
    for (ptrdiff_t r = 0; r < min_of(period, end); r++) {
        grad_bias = share + (p->origin + first + r) % period * parts + sheet->start;
        for (ptrdiff_t c = r; c < end; c += rows * period) {
            rows = min_of(SUMMED, (end - c + period - 1) / period);
            for (ptrdiff_t i = 0; i < sheet->runs; i++)
                for (ptrdiff_t k = 0; k < sheet->length; k += width) {
                    width = min_of(WIDTH, sheet->length - k);
                    place = T(place_of)(p, sheet->offset + i * sheet->run_stride + c * S + k,
                                        first + c, way);
                    place.weights = T(weights_of)(p, first + c) + sheet->start + k;
                    T(write_band)(place, rows, period * S, period, width, way, grad_bias + k,
                                  grad_bias + p->geometry.parameters + k);
                }
        }
    }
}

static void T(write_sharing)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                             double *share) {
    if (!p->stream)
        T(write_sharing_way)(p, sheet, first, share, BACKWARD | BY_VALUE);
    else if (p->geometry.S * sizeof(stored) % LINE == 0) {
        T(write_sharing_way)(p, sheet, first, share, BACKWARD | BY_VALUE | STREAM);
        stream_fence();
    } else { /* rows that do not all begin alike in their cache lines are streamed one by one */
        T(share_products)(p, sheet, first, share);
        T(write)(p, sheet, first);
    }
}
