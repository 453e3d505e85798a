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
    ptrdiff_t ahead;              /* of x, and of grad_output: what is read next; or 0 */
    int streams;                  /* whole cache lines past the cache */
    struct T(Steps) *steps;       /* that go along */
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
    way & BY_COLUMN ? R(reals)(table + row * at->stride, lanes) : all(table[row * at->stride])
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
        if (way & FUSED && way & BACKWARD)
            values.grad[v] = T(let_through)(&at->steps->gate, values.grad[v], at->grad_output + i);
        else if (way & FUSED) /* where x is the gradient of an output */
            values.x[v] = T(let_through)(&at->steps->gate, values.x[v], at->x + i);
        /* What comes from memory next, while this is computed. */
        if (way & BY_VALUE && BEGINS_LINE(v % across)) {
            fetch(at->x + i + at->ahead);
            if (way & BACKWARD)
                fetch(at->grad_output + i + at->ahead);
        }
        if (way & BY_COLUMN && way & BACKWARD && BEGINS_LINE(v % across) && at->ahead) {
            fetch(at->x + i + at->ahead);
            fetch(at->grad_output + i + at->ahead);
        }
        /* What is streamed is read from memory too, which is asked early. */
        if (!(way & (BACKWARD | BY_VALUE)) && BEGINS_LINE(v % across) && at->streams)
            __builtin_prefetch(at->x + i + FETCHED_AHEAD / (ptrdiff_t)sizeof(stored));
    }
    return values;
}

/* Write what was loaded, with coefficients that are for all columns (by value, for those of a row), or
   else for those from k on. */
INLINE void T(write_vectors)(const struct T(Place) *at, ptrdiff_t k, const int rows,
                             ptrdiff_t row_stride, const int across, ptrdiff_t lanes,
                             int streams, const struct T(Loaded) *values,
                             struct T(Coefficients) *c, const int way) {
    vector y[4];
    EACH (v, across)
        if (way & BY_COLUMN)
            c[v] = T(coefficients)(at, k + v * LANES_OF, lanes, way);
    EACH (v, rows * across) {
        const ptrdiff_t column = k + v % across * LANES_OF;
        struct T(Coefficients) used = c[way & BY_COLUMN ? v % across : v / across];
        if (way & BY_VALUE) {
            used.weight = R(reals)(at->weights + column, lanes);
            if (!(way & BACKWARD))
                used.bias = R(reals)(at->biases + column, lanes);
        }
        y[v] = T(result)(values->x[v], values->grad[v], &used, way);
    }
    EACH (r, rows) {
        const ptrdiff_t i = k + r * row_stride;
        if (way & FUSED) {
            EACH (v, across) {
                const ptrdiff_t j = i + v * LANES_OF, w = r * across + v;
                T(put_grad_residual)(at->steps, way & BACKWARD ? values->grad[w] : values->x[w],
                                     (way & BACKWARD ? at->grad_output : at->x) + j, lanes,
                                     streams);
            }
            T(take_steps)(at->steps, y + r * across, at->out + i, across, lanes);
        }
        T(put)(at->out + i, y + r * across, across, lanes, streams);
    }
}

/* Write some lanes of a vector of some rows. */
INLINE void T(write_some)(const struct T(Place) *at, ptrdiff_t k, ptrdiff_t lanes, const int rows,
                          ptrdiff_t row_stride, struct T(Coefficients) *c, const int way) {
    const struct T(Loaded) values = T(load_vectors)(at, k, rows, row_stride, 1, lanes, way);
    T(write_vectors)(at, k, rows, row_stride, 1, lanes, 0, &values, c, way);
}

/* Write a stretch of whole vectors. The next are loaded before these are stored: a load that follows a
   store to the same place in another page waits for it, and arrays are often about a whole number of
   pages apart. */
INLINE void T(write_stretch)(const struct T(Place) *at, ptrdiff_t k, ptrdiff_t end, const int rows,
                             ptrdiff_t row_stride, const int across, struct T(Coefficients) *c,
                             const int way) {
    const ptrdiff_t step = across * LANES_OF;
    const int streams = at->streams;
    struct T(Loaded) now, next;
    next = T(load_vectors)(at, k, rows, row_stride, across, LANES_OF, way);
    for (; k < end; k += step) {
        now = next;
        if (k + step < end)
            next = T(load_vectors)(at, k + step, rows, row_stride, across, LANES_OF, way);
        T(write_vectors)(at, k, rows, row_stride, across, LANES_OF, streams, &now, c, way);
    }
}

/* The same. What looks like two calls for one keeps apart what gcc 12 makes of loops with steps that go
   along and of those without: as one, inference of planes of 7 x 7 was a fifth slower with AVX2
   (benchmarks/compare.py). */
INLINE void T(write_steps)(const struct T(Place) *at, ptrdiff_t k, ptrdiff_t end, const int rows,
                           ptrdiff_t row_stride, const int across, struct T(Coefficients) *c,
                           const int way) {
    if (way & FUSED) {
        T(write_stretch)(at, k, end, rows, row_stride, across, c, way);
        return;
    }
    T(write_stretch)(at, k, end, rows, row_stride, across, c, way);
}

/* How many of n values lie before the first that begins a cache line. */
INLINE ptrdiff_t T(values_to_line)(const stored *at, ptrdiff_t n) {
    return min_of(n, (ptrdiff_t)(-((uintptr_t)at / sizeof(stored)) % T(LINE_VALUES)));
}

/* Write n columns of some rows, or n values of a run, from the next cache line of out on in steps of
   whole vectors, if there are many. Arrays from one allocator are aligned alike, so the loads of x
   gain as much as the stores. Whole lines alone are streamed. */
INLINE void T(write_rows)(const struct T(Place) *place, ptrdiff_t n, const int rows,
                          ptrdiff_t row_stride, const int across, const int way) {
    struct T(Place) here = *place, *at = &here;
    struct T(Steps) steps;
    const ptrdiff_t vectors = across * LANES_OF;
    const ptrdiff_t step = at->streams ? max_of(vectors, T(LINE_VALUES)) : vectors;
    ptrdiff_t k = 0, head = 0, lanes, end;
    struct T(Coefficients) c[4];
    if (!(way & BY_COLUMN))
        EACH (r, rows)
            c[r] = T(coefficients)(at, r, LANES_OF, way);
    if (way & FUSED) { /* in registers meanwhile */
        T(seek)(place->steps, place->out);
        steps = *place->steps;
        here.steps = &steps;
    }
    if (at->streams || n >= ALIGNED_RUN)
        head = T(values_to_line)(at->out, n);
    for (; k < head; k += lanes) {
        lanes = min_of(LANES_OF, head - k);
        T(write_some)(at, k, lanes, rows, row_stride, c, way);
    }
    if (n - k >= step) {
        end = k + (n - k) / step * step;
        T(write_steps)(at, k, end, rows, row_stride, across, c, way);
        k = end;
    }
    for (; !(way & FUSED) && n - k >= LANES_OF; k += LANES_OF)
        T(write_some)(at, k, LANES_OF, rows, row_stride, c, way);
    for (; k < n; k += lanes) {
        lanes = min_of(LANES_OF, n - k);
        T(write_some)(at, k, lanes, rows, row_stride, c, way);
    }
    if (way & FUSED)
        place->steps->bits = steps.bits;
}

INLINE void T(move)(struct T(Place) *place, ptrdiff_t by, const int way) {
    place->x += by;
    place->out += by;
    if (way & BACKWARD)
        place->grad_output += by;
}

INLINE struct T(Place) T(place_of)(const struct Pass *p, ptrdiff_t at, ptrdiff_t first,
                                   struct T(Steps) *steps) {
    struct T(Place) place;
    place.x = p->kind == FROZEN_GRADIENTS ? p->grad_output : p->x;
    place.x += at;
    place.out = (stored *)p->out + at;
    place.grad_output = p->kind == GRADIENTS ? p->grad_output : p->x; /* or not read */
    place.grad_output += at;
    place.weights = place.biases = NULL;
    /* None backward along long rows in the cache: LONG_ROW says why. */
    place.ahead = 0;
    if (p->kind != GRADIENTS || p->stream || p->geometry.S < LONG_ROW)
        place.ahead = p->ahead;
    place.streams = p->stream;
    place.steps = steps;
    place.coefficients = (const real *)p->coefficients + first;
    place.stride = p->stride;
    return place;
}

/* Where a run is: in a part of a channel, which may be all of it, of which so many values are left. It
   knows what it needs of the pass: after a store, the compiler would have to look again. */
struct T(Walk) {
    const real *channel, *first, *end; /* coefficients; after the last channel comes the first, of the
                                          next sample */
    ptrdiff_t stride;
    ptrdiff_t part, parts, length, left;
    /* Of several parts, whose channels are of one run each: the weight of this one, and those of all,
       which repeat, with the biases after them. */
    const real *weight, *weights;
    ptrdiff_t parameters;
    struct T(Coefficients) here;
};

INLINE void T(enter_part)(struct T(Walk) *walk, const int way) {
    const real *channel = walk->channel;
    const ptrdiff_t stride = walk->stride;
    real scale = channel[SCALE * stride], bias = channel[BIAS * stride], of_grad = 1;
    if (walk->parts > 1 && way & BACKWARD)
        of_grad = *walk->weight;
    else if (walk->parts > 1) {
        scale *= *walk->weight;
        bias = walk->weight[walk->parameters] + bias * *walk->weight;
    }
    walk->here.mean = all(channel[MEAN * stride]);
    walk->here.scale = all(scale);
    walk->here.bias = all(bias);
    if (way & BACKWARD)
        walk->here.slope = all(channel[SLOPE * stride]);
    if (way & BACKWARD && way & WEIGHTED)
        walk->here.weight = all(of_grad);
}

INLINE void T(enter_next)(struct T(Walk) *walk, const int way) {
    if (walk->parts > 1 && ++walk->weight == walk->weights + walk->parameters)
        walk->weight = walk->weights;
    if (walk->parts == 1 || ++walk->part == walk->parts) {
        walk->part = 0;
        if (++walk->channel == walk->end)
            walk->channel = walk->first;
    }
    walk->left += walk->length;
    T(enter_part)(walk, way);
}

/* Coefficients of which the first n lanes are those of a part, and the others those of the next. */
INLINE struct T(Coefficients) T(joined_coefficients)(struct T(Coefficients) a,
                                                     struct T(Coefficients) b, ptrdiff_t n,
                                                     const int way) {
    a.mean = R(joined)(a.mean, b.mean, n);
    a.scale = R(joined)(a.scale, b.scale, n);
    a.bias = R(joined)(a.bias, b.bias, n);
    if (way & BACKWARD)
        a.slope = R(joined)(a.slope, b.slope, n);
    if (way & BACKWARD && way & WEIGHTED)
        a.weight = R(joined)(a.weight, b.weight, n);
    return a;
}

/* Write from k up to `end`, some lanes of a part at a time. */
INLINE void T(write_up_to)(const struct T(Place) *at, struct T(Walk) *walk, ptrdiff_t k,
                           ptrdiff_t end, const int way) {
    for (ptrdiff_t lanes; k < end; k += lanes, walk->left -= lanes) {
        if (walk->left == 0)
            T(enter_next)(walk, way);
        lanes = min_of(min_of(LANES_OF, end - k), walk->left);
        T(write_some)(at, k, lanes, 1, 0, &walk->here, way);
    }
}

INLINE void T(write_vector)(const struct T(Place) *at, ptrdiff_t k, struct T(Coefficients) *c,
                            const int way) {
    const struct T(Loaded) values = T(load_vectors)(at, k, 1, 0, 1, LANES_OF, way);
    T(write_vectors)(at, k, 1, 0, 1, LANES_OF, at->streams, &values, c, way);
}

/* A part as vectors that are loaded together, so many from its beginning and so many up to its end, which
   overlap where the length is not whole vectors. */
struct T(Part) {
    struct T(Loaded) begin, end;
};

INLINE struct T(Part) T(load_part)(const struct T(Place) *at, ptrdiff_t k, ptrdiff_t length,
                                   const int from_begin, const int to_end, const int way) {
    struct T(Part) part;
    if (from_begin > 0)
        part.begin = T(load_vectors)(at, k, 1, 0, from_begin, LANES_OF, way);
    part.end = T(load_vectors)(at, k + length - to_end * LANES_OF, 1, 0, to_end, LANES_OF, way);
    return part;
}

/* Write the whole parts of n values, from k on; return where they end. The next is loaded before one is
   stored, as in write_steps. */
INLINE ptrdiff_t T(write_whole_parts)(const struct T(Place) *at, struct T(Walk) *walk, ptrdiff_t k,
                                      ptrdiff_t n, const int from_begin, const int to_end,
                                      const int way) {
    const ptrdiff_t length = walk->length, last = length - to_end * LANES_OF;
    struct T(Part) part, next = T(load_part)(at, k, length, from_begin, to_end, way);
    for (; n - k >= length; k += length, walk->left = 0) {
        if (walk->left == 0)
            T(enter_next)(walk, way);
        part = next;
        if (n - k >= 2 * length)
            next = T(load_part)(at, k + length, length, from_begin, to_end, way);
        if (from_begin > 0)
            T(write_vectors)(at, k, 1, 0, from_begin, LANES_OF, 0, &part.begin, &walk->here, way);
        T(write_vectors)(at, k + last, 1, 0, to_end, LANES_OF, 0, &part.end, &walk->here, way);
    }
    return k;
}

/* The same of two parts or more of one vector each, two of them at a time. */
INLINE ptrdiff_t T(write_two_parts)(const struct T(Place) *at, struct T(Walk) *walk, ptrdiff_t k,
                                    ptrdiff_t n, const int way) {
    const ptrdiff_t step = 2 * LANES_OF;
    struct T(Loaded) now, next = T(load_vectors)(at, k, 1, 0, 2, LANES_OF, way);
    vector y[2];
    for (; n - k >= step; k += step, walk->left = 0) {
        now = next;
        if (n - k >= 2 * step)
            next = T(load_vectors)(at, k + step, 1, 0, 2, LANES_OF, way);
        if (walk->left == 0)
            T(enter_next)(walk, way);
        y[0] = T(result)(now.x[0], now.grad[0], &walk->here, way);
        T(enter_next)(walk, way);
        y[1] = T(result)(now.x[1], now.grad[1], &walk->here, way);
        T(store)(at->out + k, y, 2);
    }
    return k;
}

/* The same of longer parts, two vectors at a time. The last two are loaded before the others are stored:
   out may be x, and they overlap. */
INLINE ptrdiff_t T(write_long_parts)(const struct T(Place) *at, struct T(Walk) *walk, ptrdiff_t k,
                                     ptrdiff_t n, const int way) {
    const ptrdiff_t step = 2 * LANES_OF, length = walk->length, whole = length / step * step;
    struct T(Loaded) last;
    for (; n - k >= length; k += length, walk->left = 0) {
        const ptrdiff_t end = k + length - step;
        if (walk->left == 0)
            T(enter_next)(walk, way);
        if (whole < length)
            last = T(load_vectors)(at, end, 1, 0, 2, LANES_OF, way);
        T(write_steps)(at, k, k + whole, 1, 0, 2, &walk->here, way);
        if (whole < length)
            T(write_vectors)(at, end, 1, 0, 2, LANES_OF, 0, &last, &walk->here, way);
    }
    return k;
}

/* Write n values of short parts without a gap, part by part, each in whole vectors: that takes fewer
   steps than to join coefficients. What begins within a part, or is shorter than a vector, has tails. */
INLINE void T(write_parts)(const struct T(Place) *at, struct T(Walk) walk, ptrdiff_t n,
                           const int way) {
    const ptrdiff_t length = walk.length;
    ptrdiff_t k = walk.left < length ? min_of(walk.left, n) : 0;
    T(enter_part)(&walk, way);
    T(write_up_to)(at, &walk, 0, k, way);
    if (n - k >= length) {
        if (T(PAIRS) && length > 4 * LANES_OF)
            k = T(write_long_parts)(at, &walk, k, n, way);
        else if (length > 3 * LANES_OF)
            k = T(write_whole_parts)(at, &walk, k, n, 2, 2, way);
        else if (length > 2 * LANES_OF)
            k = T(write_whole_parts)(at, &walk, k, n, 2, 1, way);
        else if (length > LANES_OF)
            k = T(write_whole_parts)(at, &walk, k, n, 1, 1, way);
        else if (T(PAIRS) && length == LANES_OF && n - k >= 2 * length)
            k = T(write_two_parts)(at, &walk, k, n, way);
        else if (length == LANES_OF)
            k = T(write_whole_parts)(at, &walk, k, n, 0, 1, way);
    }
    T(write_up_to)(at, &walk, k, n, way);
}

/* Write some vectors, all of which are loaded before any is stored. */
INLINE void T(write_beside)(const struct T(Place) *at, ptrdiff_t k, const int across,
                            struct T(Coefficients) *c, const int way) {
    const struct T(Loaded) values = T(load_vectors)(at, k, 1, 0, across, LANES_OF, way);
    T(write_vectors)(at, k, 1, 0, across, LANES_OF, 0, &values, c, way);
}

/* How many of n values come before the first whole vector of a run in the cache. Short parts of whole
   vectors are better not moved to a line: none would be whole. */
INLINE ptrdiff_t T(head_of)(const struct T(Walk) *walk, const stored *out, ptrdiff_t n) {
    const int fits = walk->length % LANES_OF == 0 && walk->length < ALIGNED_RUN;
    return n >= ALIGNED_RUN && !fits ? T(values_to_line)(out, n) : 0;
}

/* Write n values as write_run does, where nothing is streamed, no steps go along, and a part is no shorter
   than a vector, so that a vector reaches into one more part at most. */
INLINE void T(write_run_in_cache)(const struct T(Place) *place, const struct T(Walk) *start,
                                  ptrdiff_t n, const int whole, const int way) {
    struct T(Place) here = {.x = place->x, .grad_output = place->grad_output, .out = place->out};
    struct T(Place) *const at = &here;
    struct T(Walk) own = *start;
    struct T(Walk) *const walk = &own;
    struct T(Coefficients) c;
    const ptrdiff_t head = T(head_of)(walk, at->out, n);
    const ptrdiff_t end = head + (n - head) / LANES_OF * LANES_OF;
    ptrdiff_t k = head, from, until, filled;
    if (whole)
        own.parts = 1; /* as a literal */
    T(enter_part)(walk, way);
    T(write_up_to)(at, walk, 0, k, way);
    while (k < end) {
        if (walk->left == 0)
            T(enter_next)(walk, way);
        from = k;
        until = min_of(end, k + walk->left);
        for (; until - k >= 4 * LANES_OF; k += 4 * LANES_OF)
            T(write_beside)(at, k, 4, &walk->here, way);
        if (until - k >= 2 * LANES_OF) {
            T(write_beside)(at, k, 2, &walk->here, way);
            k += 2 * LANES_OF;
        }
        if (until - k >= LANES_OF) {
            T(write_beside)(at, k, 1, &walk->here, way);
            k += LANES_OF;
        }
        walk->left -= k - from;
        if (k == end || walk->left == 0)
            continue;
        filled = walk->left;
        c = walk->here;
        T(enter_next)(walk, way);
        c = T(joined_coefficients)(c, walk->here, filled, way);
        T(write_beside)(at, k, 1, &c, way);
        k += LANES_OF;
        walk->left -= LANES_OF;
    }
    T(write_up_to)(at, walk, k, n, way);
}

/* Functions of their own, which know all that does not change: so a plane of 7 x 7 takes 85
   instructions of AVX2 and not 120, and gcc 12 leaves what belongs together together (inference of
   32x256x7x7, benchmarks/compare.py: two thirds to nine tenths of the time). */
static NOINLINE void T(write_channels)(const struct T(Place) *place, const struct T(Walk) *walk,
                                       ptrdiff_t n) {
    T(write_run_in_cache)(place, walk, n, 1, 0);
}

static NOINLINE void T(write_channel_parts)(const struct T(Place) *place,
                                            const struct T(Walk) *walk, ptrdiff_t n) {
    T(write_run_in_cache)(place, walk, n, 0, 0);
}

static NOINLINE void T(write_channels_back)(const struct T(Place) *place,
                                            const struct T(Walk) *walk, ptrdiff_t n) {
    T(write_run_in_cache)(place, walk, n, 1, BACKWARD);
}

static NOINLINE void T(write_channel_parts_back)(const struct T(Place) *place,
                                                 const struct T(Walk) *walk, ptrdiff_t n) {
    T(write_run_in_cache)(place, walk, n, 0, BACKWARD | WEIGHTED);
}

/* Write n values without a gap in the order of the memory, channel after channel, or part after part
   of one with several weights. A vector in which one ends and the next begins has coefficients of
   both: so short planes cost little more than long ones, and lines are streamed whole. The shortest are
   written by write_parts, unless lines are streamed or steps go along. */
INLINE void T(write_run)(const struct T(Place) *place, struct T(Walk) walk, ptrdiff_t n,
                         const int way) {
    const int across = way & FUSED && !(way & BACKWARD) ? T(ACROSS_WITH_BITS) : T(ACROSS);
    const ptrdiff_t step = across * LANES_OF;
    const ptrdiff_t unit = place->streams ? max_of(LANES_OF, T(LINE_VALUES)) : LANES_OF;
    const ptrdiff_t head = place->streams ? T(values_to_line)(place->out, n)
                                          : T(head_of)(&walk, place->out, n);
    const ptrdiff_t end = head + (n - head) / unit * unit;
    ptrdiff_t k = head;
    struct T(Place) here = *place, *at = &here;
    struct T(Coefficients) both;
    struct T(Steps) steps;
    if (way & FUSED) { /* in registers meanwhile */
        T(seek)(place->steps, place->out);
        steps = *place->steps;
        here.steps = &steps;
    }
    T(enter_part)(&walk, way);
    T(write_up_to)(at, &walk, 0, k, way);
    while (k < end) {
        const ptrdiff_t from = k, until = min_of(end, k + walk.left);
        if (T(PAIRS)) /* which are streamed as whole lines */
            for (; place->streams && (k - head) % unit && until - k >= LANES_OF; k += LANES_OF)
                T(write_vector)(at, k, &walk.here, way);
        if (until - k >= step) {
            const ptrdiff_t begin = k;
            k += (until - k) / step * step;
            T(write_steps)(at, begin, k, 1, 0, across, &walk.here, way);
        }
        for (; until - k >= LANES_OF; k += LANES_OF)
            T(write_vector)(at, k, &walk.here, way);
        walk.left -= k - from;
        if (walk.left == 0 && k < end)
            T(enter_next)(&walk, way);
        if (k == end || walk.left >= LANES_OF)
            continue;
        for (both = walk.here; walk.left < LANES_OF;) {
            const ptrdiff_t filled = walk.left;
            T(enter_next)(&walk, way);
            both = T(joined_coefficients)(both, walk.here, filled, way);
        }
        T(write_vector)(at, k, &both, way);
        k += LANES_OF;
        walk.left -= LANES_OF;
    }
    T(write_up_to)(at, &walk, k, n, way);
    if (way & FUSED)
        place->steps->bits = steps.bits;
}

INLINE struct T(Walk) T(walk_of)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first) {
    const ptrdiff_t length = p->geometry.S / p->geometry.parts, part = sheet->start / length;
    const real *channel = (const real *)p->coefficients + first;
    return (struct T(Walk)){
        .channel = channel, .first = channel, .end = channel + sheet->channels,
        .stride = p->stride, .part = part, .parts = p->geometry.parts,
        .length = length, .left = length - sheet->start % length,
        .weight = R(weights_of)(p, first) + part, .weights = p->parameters,
        .parameters = p->geometry.parameters};
}

/* Write by plane. A sheet holds whole channels, or a piece of one. */
INLINE void T(write_planes)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            struct T(Steps) *steps, const int way) {
    const ptrdiff_t values = sheet->channels * sheet->length;
    const int one_run = sheet->run_stride == values; /* of all samples */
    const ptrdiff_t runs = one_run ? 1 : sheet->runs, n = one_run ? values * sheet->runs : values;
    const ptrdiff_t longest = p->geometry.parts * T(WRITTEN_APART);
    const struct T(Walk) walk = T(walk_of)(p, sheet, first);
    struct T(Place) place;
    if (way & FUSED && p->stream)
        steps->next_run = T(to_next_run)(runs, sheet->run_stride, n);
    for (ptrdiff_t i = 0; i < runs; i++) {
        place = T(place_of)(p, sheet->offset + i * sheet->run_stride, first, steps);
        if (!(way & FUSED) && !p->stream && p->geometry.S <= longest)
            T(write_parts)(&place, walk, n, way);
        /* Backward, longer parts gain nothing. */
        else if (!(way & FUSED) && !T(PAIRS) && !p->stream && walk.length >= LANES_OF
                 && (!(way & BACKWARD) || walk.length < ALIGNED_RUN)) {
            if (way & BACKWARD && way & WEIGHTED)
                T(write_channel_parts_back)(&place, &walk, n);
            else if (way & BACKWARD)
                T(write_channels_back)(&place, &walk, n);
            else if (walk.parts > 1)
                T(write_channel_parts)(&place, &walk, n);
            else
                T(write_channels)(&place, &walk, n);
        }
        else
            T(write_run)(&place, walk, n, way);
    }
}

/* Whether whole channels that have their parameters by value fill lines before they are streamed: where
   they are short, and do not begin and end with lines anyway. */
INLINE int T(fills_lines)(const struct Pass *p, const struct Sheet *sheet) {
    const ptrdiff_t row = p->geometry.S * sizeof(stored);
    const stored *out = (stored *)p->out + sheet->offset;
    return p->stream && sheet->length == p->geometry.S && row < FILLED_ROW
           && (row % LINE || (uintptr_t)out % LINE);
}

/* Whether such channels can be written side by side: where their parameters are the same for all, and all
   begin alike in their cache lines, or are too short for it to matter. Streamed lines are whole. */
INLINE int T(lie_alike)(const struct Pass *p, int streams) {
    const ptrdiff_t S = p->geometry.S;
    const int whole = S * sizeof(stored) % LINE == 0;
    return p->geometry.period == 1 && (streams ? T(ROWS) > 1 && whole : whole || S < ALIGNED_RUN);
}

/* Write by plane, with a weight and a bias for each value; by way of lines that are filled, or not. */
INLINE void T(write_values)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                            struct T(Steps) *steps, const int fills, const int way) {
    const int streams = p->stream && !fills, rows = streams ? T(ROWS) : 4;
    const int alike = !(way & FUSED) && T(lie_alike)(p, streams);
    struct Lines lines;
    for (ptrdiff_t i = 0; i < sheet->runs; i++) {
        struct T(Place) place = T(place_of)(p, sheet->offset + i * sheet->run_stride, first, steps);
        place.streams = streams;
        if (fills)
            begin_lines(&lines, place.out);
        for (ptrdiff_t c = first, rest = sheet->channels, n; rest > 0; c += n, rest -= n) {
            place.weights = R(weights_of)(p, c) + sheet->start;
            place.biases = place.weights + p->geometry.parameters;
            if (fills)
                place.out = (stored *)(lines.bytes + lines.end);
            n = alike && rest >= rows ? rows : 1;
            if (n == 4)
                T(write_rows)(&place, sheet->length, 4, p->geometry.S, 1, way);
            else if (n == T(ROWS))
                T(write_rows)(&place, sheet->length, T(ROWS), p->geometry.S, 4 / T(ROWS), way);
            else
                T(write_rows)(&place, sheet->length, 1, 0, T(ACROSS), way);
            place.coefficients += n;
            T(move)(&place, n * p->geometry.S, way);
            if (fills)
                stream_lines(&lines, n * p->geometry.S * sizeof(stored), rest == n);
        }
    }
}

static NOINLINE void T(write_values_filling)(const struct Pass *p, const struct Sheet *sheet,
                                             ptrdiff_t first) {
    if (p->kind == GRADIENTS)
        T(write_values)(p, sheet, first, NULL, 1, BY_VALUE | BACKWARD);
    else
        T(write_values)(p, sheet, first, NULL, 1, BY_VALUE);
}

INLINE void T(write_by_value)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                              struct T(Steps) *steps, const int way) {
    if (!(way & FUSED) && T(fills_lines)(p, sheet))
        T(write_values_filling)(p, sheet, first);
    else
        T(write_values)(p, sheet, first, steps, 0, way);
}

/* Write by row, with a coefficient for each column. Where it wraps, in the order of the memory: what
   begins in a row goes on into the next by whole steps, and so does the table of coefficients. */
INLINE void T(write_columns_way)(struct T(Place) place, const struct Sheet *sheet, int wraps,
                                 const int way) {
    enum { STEP = T(STEP) };
    const ptrdiff_t width = sheet->width, stride = sheet->row_stride;
    const real *table = place.coefficients;
    ptrdiff_t rest = sheet->rows, column = 0, n;
    /* Some rows at a time, for which coefficients are loaded once. Not rows that begin at different
       places of their cache lines, if they are streamed or long: one by one they are written from
       line to line. And streamed lines are whole. */
    if (!wraps && !(way & FUSED) && !(place.streams && T(LINE_OF) > 1)
        && (stride * sizeof(stored) % LINE == 0 || !(place.streams || width > WIDTH)))
        for (; rest >= T(ROWS_BESIDE); rest -= T(ROWS_BESIDE)) {
            T(write_rows)(&place, width, T(ROWS_BESIDE), stride, 4 / T(ROWS_BESIDE), way);
            T(move)(&place, T(ROWS_BESIDE) * stride, way);
        }
    for (rest = rest * width + sheet->tail; rest > 0; rest -= n) {
        n = min_of(rest, wraps ? (width - column + STEP - 1) / STEP * STEP : width);
        place.coefficients = table + column;
        if (way & FUSED && !(way & BACKWARD) && wraps)
            T(write_rows)(&place, n, 1, 0, T(ACROSS_WITH_BITS), way);
        else
            T(write_rows)(&place, n, 1, 0, T(ACROSS), way);
        T(move)(&place, wraps ? n : stride, way);
        for (column += wraps ? n : 0; column >= width;)
            column -= width;
    }
}

INLINE void T(write_columns)(const struct Pass *p, struct T(Place) place, const struct Sheet *sheet,
                             int wraps, const int way) {
    if (p->kind != GRADIENTS)
        T(write_columns_way)(place, sheet, wraps, way | BY_COLUMN);
    else if (p->geometry.parts == 1)
        T(write_columns_way)(place, sheet, wraps, way | BY_COLUMN | BACKWARD);
    else
        T(write_columns_way)(place, sheet, wraps, way | BY_COLUMN | BACKWARD | WEIGHTED);
}

static NOINLINE void T(write_columns_plain)(const struct Pass *p, const struct T(Place) *place,
                                            const struct Sheet *sheet, int wraps) {
    T(write_columns)(p, *place, sheet, wraps, 0);
}

static NOINLINE void T(write_columns_fused)(const struct Pass *p, const struct T(Place) *place,
                                            const struct Sheet *sheet, int wraps) {
    struct T(Steps) steps = *place->steps;
    struct T(Place) with_steps = *place;
    with_steps.steps = &steps;
    T(write_columns)(p, with_steps, sheet, wraps, FUSED);
    T(finish_steps)(&steps);
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

/* Make a table of the coefficients of each column of a sheet, in rows TABLE_WIDTH apart. After the last
   come some of the first again, for rows that begin or end within one of the table. */
static void T(make_table)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                          ptrdiff_t beyond, real *table) { /* OUT */
    const ptrdiff_t C = p->stride, parts = p->geometry.parts;
    const real *weights = R(weights_of)(p, first), *coefficients = (real *)p->coefficients + first;
    const int backward = p->kind == GRADIENTS;
    const int rows = !backward ? SLOPE : parts > 1 ? ALL_COEFFICIENTS : COEFFICIENTS;
    real weight[WIDTH], bias[WIDTH], *columns;
    for (int q = 0; q < min_of(rows, COEFFICIENTS); q++)
        if (q != MEAN_LOW)
            R(spread)(coefficients + q * C, sheet->channels, sheet->span, sheet->repeat,
                      table + q * TABLE_WIDTH);
    if (parts > 1) {
        columns = backward ? table + WEIGHT * TABLE_WIDTH : weight;
        R(spread)(weights, sheet->channels * parts, sheet->span / parts, sheet->repeat, columns);
        if (!backward) {
            R(spread)(weights + p->geometry.parameters, sheet->channels * parts,
                      sheet->span / parts, sheet->repeat, bias);
            for (ptrdiff_t k = 0; k < sheet->width; k++) {
                table[SCALE * TABLE_WIDTH + k] *= weight[k];
                table[BIAS * TABLE_WIDTH + k] = bias[k] + table[BIAS * TABLE_WIDTH + k] * weight[k];
            }
        }
    }
    for (int q = 0; q < rows; q++) {
        columns = table + q * TABLE_WIDTH;
        if (q != MEAN_LOW)
            for (ptrdiff_t k = 0; k < beyond; k++)
                columns[sheet->width + k] = columns[k];
    }
}

/* Write by row, with a table where that pays; where a row holds each channel once, the coefficients
   lie as a table would. */
static void T(write_by_row)(const struct Pass *p, struct Sheet sheet, ptrdiff_t first) {
    void (*const write_columns)(const struct Pass *, const struct T(Place) *, const struct Sheet *,
                                int) = p->fuses ? T(write_columns_fused) : T(write_columns_plain);
    struct SharedWords shared;
    struct T(Steps) steps = T(steps_of)(p, &shared);
    real space[ALL_COEFFICIENTS * TABLE_WIDTH] __attribute__((aligned(LINE))), *table = space;
    struct T(Place) place = T(place_of)(p, sheet.offset, first, &steps);
    ptrdiff_t head = 0;
    int wraps = 0;
    if (p->stream && sheet.row_stride == sheet.width) /* or else what is next is not of this sheet */
        place.ahead = FETCHED_AHEAD / (ptrdiff_t)sizeof(stored);
    else if (p->stream)
        steps.next_run = sheet.row_stride;
    if (sheet.repeat * sheet.span > 1
        || (sheet.rows * sheet.width >= WORTH_A_TABLE
            && sheet.width <= (p->stream ? WIDTH : WIDTH / 2))) {
        if (sheet.row_stride == sheet.width) {
            /* From one cache line to the next: the table goes on for as long as the first row is
               late. */
            head = T(values_to_line)(place.out, sheet.rows * sheet.width);
            sheet = T(unbroken)(sheet, head);
            table += -head & (LINE / sizeof(real) - 1);
            wraps = p->stream || sheet.width * sizeof(stored) % LINE;
        }
        T(make_table)(p, &sheet, first, head + T(STEP), table);
        place.coefficients = table;
        place.stride = TABLE_WIDTH;
        write_columns(p, &place, &(struct Sheet){.width = head, .tail = head}, 0);
        T(move)(&place, head, BACKWARD);
        place.coefficients += head;
    }
    write_columns(p, &place, &sheet, wraps);
}

INLINE void T(write_by_plane)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                              const int way) {
    const int backward = p->kind == GRADIENTS;
    struct SharedWords shared;
    struct T(Steps) steps;
    if (way & FUSED)
        steps = T(steps_of)(p, &shared);
    if (p->geometry.by_value && backward)
        T(write_by_value)(p, sheet, first, &steps, way | BY_VALUE | BACKWARD);
    else if (p->geometry.by_value)
        T(write_by_value)(p, sheet, first, &steps, way | BY_VALUE);
    else if (backward && (way & FUSED || p->geometry.parts > 1))
        T(write_planes)(p, sheet, first, &steps, way | BACKWARD | WEIGHTED);
    else if (backward)
        T(write_planes)(p, sheet, first, &steps, way | BACKWARD);
    else
        T(write_planes)(p, sheet, first, &steps, way);
    if (way & FUSED)
        T(finish_steps)(&steps);
}

static NOINLINE void T(write_by_plane_fused)(const struct Pass *p, const struct Sheet *sheet,
                                             ptrdiff_t first) {
    T(write_by_plane)(p, sheet, first, FUSED);
}

static void T(write)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first) {
    if (sheet->length == 0)
        T(write_by_row)(p, *sheet, first);
    else if (p->fuses)
        T(write_by_plane_fused)(p, sheet, first);
    else
        T(write_by_plane)(p, sheet, first, 0);
}

/* Write what was loaded of grad_input in some rows, and add up what these find of the gradients of
   weights and biases; begins: these are the first of their sums. */
INLINE void T(write_summed)(const struct T(Place) *at, ptrdiff_t k, const int rows,
                            ptrdiff_t row_stride, const int across, ptrdiff_t lanes,
                            const struct T(Loaded) *values, struct T(Coefficients) *c,
                            const int way, int begins, real *total, real *product) {
    vector sums[4], sums_of_products[4], x_hat;
    EACH (v, across) {
        sums[v] = begins ? all(0) : (vector)REALS(total + k + v * LANES_OF);
        sums_of_products[v] = begins ? all(0) : (vector)REALS(product + k + v * LANES_OF);
    }
    EACH (v, rows * across) {
        const int r = v / across;
        x_hat = ((values->x[v] - c[r].mean) - c[r].mean_low) * c[r].scale;
        if (lanes < LANES_OF) /* no product of 0 and what is not finite */
            x_hat = R(joined)(x_hat, all(0), lanes);
        sums[v % across] += values->grad[v];
        sums_of_products[v % across] += values->grad[v] * x_hat;
    }
    T(write_vectors)(at, k, rows, row_stride, across, lanes, way & STREAM, values, c, way);
    EACH (v, across) {
        REALS(total + k + v * LANES_OF) = sums[v];
        REALS(product + k + v * LANES_OF) = sums_of_products[v];
    }
}

/* All columns of some rows: as write_rows. */
INLINE void T(write_summed_rows)(const struct T(Place) *at, const int rows, ptrdiff_t row_stride,
                                 ptrdiff_t period, ptrdiff_t width, const int across,
                                 const int way, int begins, real *total, real *product) {
    const ptrdiff_t step = across * LANES_OF;
    const ptrdiff_t head = way & STREAM ? T(values_to_line)(at->out, width) : 0;
    struct T(Coefficients) c[4];
    struct T(Loaded) now, next;
    ptrdiff_t k = 0, lanes, end;
    EACH (r, rows)
        c[r] = T(coefficients)(at, r * period, LANES_OF, way);
#define LOAD(k, across, lanes) T(load_vectors)(at, k, rows, row_stride, across, lanes, way)
#define WRITE(across, lanes, way)                                                                  \
    T(write_summed)(at, k, rows, row_stride, across, lanes, &now, c, way, begins, total, product)
    for (int ends = 0; ends < 2; ends++) {
        for (end = ends ? width : head; k < end; k += lanes) {
            lanes = min_of(LANES_OF, end - k);
            now = LOAD(k, 1, lanes);
            WRITE(1, lanes, way & ~STREAM);
        }
        if (!ends && width - k >= step)
            for (next = LOAD(k, across, LANES_OF); width - k >= step; k += step) {
                now = next;
                if (width - k >= 2 * step)
                    next = LOAD(k + step, across, LANES_OF);
                WRITE(across, LANES_OF, way);
            }
    }
#undef LOAD
#undef WRITE
}

/* At most SUMMED rows of at most WIDTH columns; by way of lines that are filled, or NULL. */
INLINE void T(write_band)(struct T(Place) at, ptrdiff_t rows, ptrdiff_t row_stride, ptrdiff_t period,
                          ptrdiff_t width, struct Lines *lines, const int way, double *grad_bias,
                          double *grad_weight) {
    const int beside = T(ROWS);
    real total[SUMS_WIDTH], product[SUMS_WIDTH];
    int begins = 1;
    for (ptrdiff_t n; rows > 0; rows -= n, begins = 0) {
        if (lines)
            at.out = (stored *)(lines->bytes + lines->end);
        if (rows >= beside) {
            n = beside;
            T(write_summed_rows)(&at, beside, row_stride, period, width, 4 / beside, way, begins,
                                 total, product);
        } else {
            n = 1;
            T(write_summed_rows)(&at, 1, row_stride, period, width, 4 / beside, way, begins, total,
                                 product);
        }
        at.coefficients += n * period;
        T(move)(&at, n * row_stride, way);
        if (lines)
            stream_lines(lines, n * row_stride * sizeof(stored), 0);
    }
    for (ptrdiff_t k = 0; k < width; k++) {
        grad_bias[k] += total[k];
        grad_weight[k] += product[k];
    }
}

/* Write grad_input of channels with a weight for each value, and add up the gradients of the weights
   and biases that they share. */
INLINE void T(write_sharing_way)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                                 double *share, struct Lines *lines, const int way) {
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
                                        first + c, NULL);
                    place.weights = R(weights_of)(p, first + c) + sheet->start + k;
                    T(write_band)(place, rows, period * S, period, width, lines, way,
                                  grad_bias + k, grad_bias + p->geometry.parameters + k);
                }
        }
    }
}

static void T(write_sharing)(const struct Pass *p, const struct Sheet *sheet, ptrdiff_t first,
                             double *share) {
    const int alike = p->geometry.S * sizeof(stored) % LINE == 0;
    const int fills = p->geometry.period == 1 && sheet->runs == 1 && T(fills_lines)(p, sheet);
    struct Lines lines;
    if (p->fuses || (p->stream && !alike && !fills)) {
        /* What is streamed and does not begin alike in cache lines, or has steps, goes row by row. */
        T(share_products)(p, sheet, first, share);
        T(write)(p, sheet, first);
    } else if (!p->stream)
        T(write_sharing_way)(p, sheet, first, share, NULL, BACKWARD | BY_VALUE);
    else if (fills) {
        begin_lines(&lines, (stored *)p->out + sheet->offset);
        T(write_sharing_way)(p, sheet, first, share, &lines, BACKWARD | BY_VALUE);
        stream_lines(&lines, 0, 1);
    } else
        T(write_sharing_way)(p, sheet, first, share, NULL, BACKWARD | BY_VALUE | STREAM);
}
