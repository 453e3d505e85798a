/* The micro-kernels of one storage type: STORAGE says which. They know addresses and lanes, of a
   sheet or of a strip at a time; what is cut, merged and shared out is decided in _core.pyx, whose
   structures they take. The same text is compiled for every instruction set. */

#define PASTE(name, storage) name##_##storage
#define PASTED(name, storage) PASTE(name, storage)
#define T(name) PASTED(name, STORAGE)

#define stored T(stored)
#define real T(real)
#define vector T(vector)
#define LANES_OF T(LANES)
#define LIMITED T(LIMITED)
#define REALS(address) (*(T(any_vector) *)(address))
#define all T(all)
#define some_reals T(some_reals)
#define load T(load)
#define load_some T(load_some)

struct T(Block) {
    real shift[WIDTH + LANES_OF], total[WIDTH + LANES_OF], square[WIDTH + LANES_OF];
};

#include "micro_finish.h"
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
    T(take_parameters),
    T(finish_coefficients),
    T(finish_gradients),
    T(finish_parameters),
    T(write),
    T(write_sharing),
};

#undef stored
#undef real
#undef vector
#undef LANES_OF
#undef LIMITED
#undef REALS
#undef all
#undef some_reals
#undef load
#undef load_some
#undef T
#undef PASTED
#undef PASTE
