/* The coefficients of channels and the gradients of parameters, from statistics and sums in float64;
   side by side, because a root and a division have a long way. All are of the type that is computed
   in, whatever the data are kept in. */

/* A vector of reals, of which so many lanes are there. */
INLINE vector R(reals)(const real *at, ptrdiff_t lanes) {
    return lanes >= LANES_OF ? (vector)REALS(at) : some_reals(at, lanes);
}

/* What is left of a mean in two parts beside its first digits. */
INLINE real R(low_part)(real high, double mean, double mean_low) {
    const real low = (real)((mean - (double)high) + mean_low);
    return -INFINITY < low && low < INFINITY ? low : 0; /* not finite where the mean is not */
}

/* The weights of the parts of a channel; their biases lie geometry.parameters further on. */
INLINE const real *R(weights_of)(const struct Pass *p, ptrdiff_t c) {
    /* A division costs as much as ten values. */
    const ptrdiff_t turn = p->geometry.period == 1 ? 0 : (p->origin + c) % p->geometry.period;
    return (const real *)p->parameters + turn * p->geometry.parts;
}

/* Take weights and biases of the parts of channels as a table. */
static void R(take_parameters)(const struct Pass *p) {
    real *parameter = p->parameters;
    double values[AT_ONCE];
    ptrdiff_t n;
    for (int role = 0; role < 2; role++)
        for (ptrdiff_t k = 0; k < p->geometry.parameters; k += n) {
            n = min_of(AT_ONCE, p->geometry.parameters - k);
            take_values(role == 0 ? &p->weight : &p->bias, k, n, values);
            for (ptrdiff_t i = 0; i < n; i++)
                *parameter++ = (real)values[i];
        }
}

/* Set every column to the value of its channel. */
static void R(spread)(const real *value, ptrdiff_t channels, ptrdiff_t span, ptrdiff_t repeat,
                      real *columns) {
    const ptrdiff_t width = repeat * channels * span;
    ptrdiff_t filled = 0, n;
    if (span == 1)
        for (; filled < channels; filled++)
            columns[filled] = value[filled];
    else
        for (ptrdiff_t c = 0; c < channels; c++)
            for (ptrdiff_t k = 0; k < span; k++)
                columns[filled++] = value[c];
    for (; filled < width; filled += n) { /* twice as many at each turn: one by one takes too long */
        n = min_of(filled, width - filled);
        for (ptrdiff_t k = 0; k < n; k++)
            columns[filled + k] = columns[k];
    }
}

/* The coefficients of at most AT_ONCE channels. */
static void R(finish_coefficients)(const struct Pass *p, ptrdiff_t first, ptrdiff_t n,
                                   double *reciprocal) {
    const ptrdiff_t C = p->stride, period = p->geometry.period;
    real *coefficient = (real *)p->coefficients + first;
    double mean[AT_ONCE], mean_low[AT_ONCE], weight[AT_ONCE], bias[AT_ONCE], low;
    take_values(&p->mean, first, n, mean);
    take_values(&p->mean_low, first, n, mean_low);
    take_values(&p->var, first, n, reciprocal);
    take_in_turn(&p->weight, p->origin + first, n, period, weight);
    take_in_turn(&p->bias, p->origin + first, n, period, bias);
    for (ptrdiff_t c = 0; c < n; c++)
        reciprocal[c] = 1 / sqrt(reciprocal[c] + p->eps);
    for (ptrdiff_t c = 0; c < n; c++) {
        coefficient[MEAN * C + c] = (real)mean[c];
        coefficient[SCALE * C + c] = (real)(weight[c] * reciprocal[c]);
    }
    for (ptrdiff_t c = 0; c < n; c++) {
        low = R(low_part)(coefficient[MEAN * C + c], mean[c], mean_low[c]);
        coefficient[MEAN_LOW * C + c] = (real)low;
        /* No product of 0 and a weight that is not finite. */
        coefficient[BIAS * C + c] =
            (real)(low == 0 ? bias[c] : bias[c] - low * (weight[c] * reciprocal[c]));
    }
}

/* The coefficients of grad_input of at most AT_ONCE channels, from the sums of each, and the
   gradients of parameters that each has for itself. */
static void R(finish_gradients)(const struct Pass *p, ptrdiff_t first, ptrdiff_t n,
                                const double *reciprocal, const double *total,
                                const double *product) {
    const ptrdiff_t C = p->stride;
    const double count = (double)p->geometry.N * p->geometry.S;
    real *coefficient = (real *)p->coefficients + first;
    real *grad_weight = p->grad_weight, *grad_bias = p->grad_bias;
    double slope, mean_grad;
    if (!p->shares && grad_weight)
        for (ptrdiff_t c = 0; c < n; c++) {
            grad_bias[p->origin + first + c] = (real)total[c];
            grad_weight[p->origin + first + c] = (real)(product[c] * reciprocal[c]);
        }
    for (ptrdiff_t c = 0; c < n; c++)
        if (p->kind == FROZEN_GRADIENTS) {
            /* grad_output takes the place of x, and nothing but the scale is left. */
            coefficient[MEAN * C + c] = coefficient[MEAN_LOW * C + c] = 0;
            coefficient[BIAS * C + c] = 0;
        } else {
            slope = product[c] / count * reciprocal[c] * reciprocal[c];
            mean_grad = p->centred ? total[c] / count : 0;
            if (!p->geometry.by_value && coefficient[MEAN_LOW * C + c] != 0)
                mean_grad -= coefficient[MEAN_LOW * C + c] * slope;
            coefficient[MEAN_GRAD * C + c] = (real)mean_grad;
            coefficient[SLOPE * C + c] = (real)slope;
        }
}

/* Add up the gradients of at most AT_ONCE parameters that several channels share, and keep the sums in
   place of the first sharer's: the next turn adds to them. */
static void R(finish_parameters)(const struct Pass *p, ptrdiff_t first, ptrdiff_t n) {
    const ptrdiff_t parameters = p->geometry.parameters;
    double *share = p->shares + first;
    double grad_bias[AT_ONCE], grad_weight[AT_ONCE];
    for (ptrdiff_t k = 0; k < n; k++)
        grad_bias[k] = grad_weight[k] = 0;
    for (ptrdiff_t i = 0; i < p->sharers; i++, share += 2 * parameters) {
        for (ptrdiff_t k = 0; k < n; k++)
            grad_bias[k] += share[k];
        for (ptrdiff_t k = 0; k < n; k++)
            grad_weight[k] += share[parameters + k];
    }
    share = p->shares + first;
    for (ptrdiff_t k = 0; k < n; k++) {
        share[k] = grad_bias[k];
        share[parameters + k] = grad_weight[k];
        ((real *)p->grad_bias)[first + k] = (real)grad_bias[k];
        ((real *)p->grad_weight)[first + k] = (real)grad_weight[k];
    }
}
