/* The steps that go along with a pass that writes: y = relu(norm(x) + residual), and, on the way back,
   what relu lets through of the gradient of y, which is that of the residual too. What it lets through
   is kept as a bit for each value of an array. Loops that write take them where `way` is FUSED, and are
   compiled once more for it; sums ask for each vector whether there are such bits. */

struct T(Gate) { /* what relu has let through, or NULL: everything */
    const unsigned char *passed;
    const stored *first; /* of the gradients of outputs */
};

struct T(Steps) { /* a pointer is NULL where there is no such step */
    const stored *first; /* of the array of outputs, or of their gradients */
    const stored *residual;
    int fetches;        /* whether the residual is fetched, which comes from memory */
    ptrdiff_t next_run; /* to what is written next, if it is not what follows; or 0 */
    int relu;
    struct Bits bits; /* OUT: what relu lets through */
    struct T(Gate) gate;
    stored *grad_residual;
    int streams; /* whether the gradient of the residual goes past the cache */
};

/* Put vectors side by side, or some lanes of one. */
INLINE void T(put)(stored *to, const vector *value, const int n, ptrdiff_t lanes, int streams) {
    if (streams)
        T(stream)(to, value, n);
    else if (lanes < LANES_OF)
        T(store_some)(to, *value, lanes);
    else
        T(store)(to, value, n);
}

INLINE vector T(values_at)(const stored *at, ptrdiff_t lanes) {
    return lanes < LANES_OF ? load_some(at, lanes) : load(at);
}

/* Go on with the value that is written here. The first bits of another run that is written next are
   fetched: a store waits until its line is read. */
INLINE void T(seek)(struct T(Steps) *s, const stored *out) {
    if (!s->bits.array || s->bits.next == out - s->first)
        return;
    seek_bit(&s->bits, out - s->first);
    if (s->next_run) {
        const char *next = (const char *)s->bits.array + (out - s->first + s->next_run) / 8;
        EACH (v, WIDTH / 8 / LINE + 1) /* of a row of the widest sheet, from within a line on */
            __builtin_prefetch(next + v * LINE, 1);
    }
}

INLINE void T(finish_steps)(struct T(Steps) *s) {
    if (s->bits.array) {
        seek_bit(&s->bits, 0);
        put_shared(s->bits.shared);
    }
}

/* Outputs, some vectors side by side or some lanes of one, from what the norm has made; every step is
   rounded. */
INLINE void T(take_steps)(struct T(Steps) *s, vector *value, const stored *out, const int n,
                          ptrdiff_t lanes) {
    uint64_t passed = 0;
    unsigned bits;
    EACH (v, n)
        value[v] = T(rounded)(value[v]);
    if (s->residual)
        EACH (v, n) {
            const stored *at = s->residual + (out - s->first) + v * LANES_OF;
            if (BEGINS_LINE(v) && s->next_run)
                fetch(at + s->next_run);
            else if (BEGINS_LINE(v) && s->fetches)
                __builtin_prefetch(at + FETCHED_AHEAD / (ptrdiff_t)sizeof(stored));
            value[v] = T(rounded)(value[v] + T(values_at)(at, lanes));
        }
    if (s->relu) {
        EACH (v, n) {
            value[v] = R(rectified)(value[v], &bits);
            passed |= (uint64_t)bits << v * LANES_OF;
        }
        if (s->bits.array)
            put_bits(&s->bits, passed, n > 1 ? n * LANES_OF : lanes);
    }
}

/* What is let through of the gradient of an output. */
INLINE vector T(let_through)(const struct T(Gate) *gate, vector grad, const stored *at) {
    return gate->passed ? R(chosen)(grad, bits_at(gate->passed, at - gate->first)) : grad;
}

INLINE void T(put_grad_residual)(const struct T(Steps) *s, vector grad, const stored *at,
                                 ptrdiff_t lanes, int streams) {
    if (s->grad_residual)
        T(put)(s->grad_residual + (at - s->first), &grad, 1, lanes, streams && s->streams);
}

INLINE struct T(Gate) T(gate_of)(const struct Pass *p) {
    return (struct T(Gate)){p->fused.back ? p->fused.passed : NULL,
                            p->kind == GIVEN ? p->x : p->grad_output};
}

static struct T(Steps) T(steps_of)(const struct Pass *p, struct SharedWords *shared) {
    const struct Fused *fused = &p->fused;
    const size_t apart = (uintptr_t)fused->grad_residual - (uintptr_t)p->out;
    struct T(Steps) s = {.first = p->out, .gate = T(gate_of)(p)};
    if (fused->back) {
        s.first = s.gate.first;
        s.grad_residual = fused->grad_residual;
        s.streams = p->stream && apart % LINE == 0;
    } else {
        s.residual = fused->residual;
        s.fetches = p->stream;
        s.relu = fused->relu;
        s.bits.array = (uint64_t *)fused->passed;
        s.bits.shared = shared;
        shared->n = 0;
    }
    return s;
}
