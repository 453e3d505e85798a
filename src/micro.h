/* The micro-kernels of one storage type: STORAGE says which, and REAL what it is computed in. They know
   addresses and lanes, of a sheet or of a strip at a time; what is cut, merged and shared out is
   decided in _core.pyx, whose structures they take. The same text is compiled for every instruction
   set. */

enum {
    T(LINE_VALUES) = LINE / sizeof(stored), /* in a cache line */
    T(LINE_OF) = T(LINE_VALUES) / LANES_OF, /* the same, in vectors */
    /* Vectors that are written side by side: what is loaded together fills no more registers. */
    T(ACROSS) = T(LINE_OF) > 4 ? 4 : T(LINE_OF) > 2 ? T(LINE_OF) : 2,
    /* Such vectors of outputs, in the order of the memory, where bits are put for all at once. */
    T(ACROSS_WITH_BITS) = 4,
    /* Rows that are written side by side, four vectors of all: each in whole lines, which are streamed
       whole, and few, because rows whole pages apart take the same places of the L1 cache. */
    T(ROWS) = T(LINE_OF) > 2 ? 1 : T(LINE_OF) > 1 ? 2 : 4,
    /* Such rows that are not streamed: pairs of vectors are rounded together. */
    T(ROWS_BESIDE) = T(PAIRS) ? 2 : 4,
    /* Values up to which a part is written on its own: beyond planes of 6 x 6 only pairs gain by it. */
    T(WRITTEN_APART) = T(PAIRS) ? 300 : 4 * LANES_OF < 39 ? 4 * LANES_OF : 39,
    /* Values up to which the next run of a channel is fetched while one is summed: a longer one of floats
       is read long enough for the processor's own fetching. */
    T(FETCHED_RUN) = sizeof(stored) < sizeof(real) ? 1 << 20 : 1 << 12,
    /* Channels in rows of SHORT_LANES whose sums fit the registers together. */
    T(CHANNELS_BESIDE) = SIDE_BY_SIDE < 8 ? 1 : 4 * LANES_OF / SHORT_LANES,
    /* Values from which a row is written on in the next: whole steps, and whole lines. */
    T(STEP) = T(LINE_OF) < T(ACROSS_WITH_BITS) ? T(ACROSS_WITH_BITS) * LANES_OF : T(LINE_VALUES),
};

_Static_assert(T(LINE_VALUES) + T(STEP) <= TABLE_WIDTH - WIDTH, "what a table holds beyond its columns");

/* Whether vector v of some side by side is the first in its cache line, where they begin at one: lines
   are fetched once. */
#define BEGINS_LINE(v) (T(LINE_OF) < 2 || (v) % T(LINE_OF) == 0)

struct T(Block) {
    real shift[SUMS_WIDTH], total[SUMS_WIDTH], square[SUMS_WIDTH];
};

#include "micro_moments.h"
#include "micro_steps.h"
#include "micro_gradients.h"
#include "micro_write.h"

static const struct Micro T(micro) = {
    take_values,
    are_usable,
    T(add_block),
    fold,
    T(sum_plane),
    T(unit_of),
    T(channel_moments),
    finish_moments,
    T(sum_products),
    T(row_products),
    T(share_products),
    R(take_parameters),
    R(finish_coefficients),
    R(finish_gradients),
    R(finish_parameters),
    T(write),
    T(write_sharing),
};

#undef BEGINS_LINE
